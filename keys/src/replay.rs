//! A sliding window over counters, after RFC 6479: blocks of a ring are cleared as the window moves,
//! nothing is ever shifted.

/// Which counters of one sender were seen. Counters more than [`ReplayWindow::WIDTH`] behind the
/// highest are refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ReplayWindow {
    highest: u64,
    ring: [u64; BLOCKS],
}

impl ReplayWindow {
    /// Counters that can still be accepted when they arrive late.
    pub(crate) const WIDTH: u64 = 1024;

    /// A window that has seen `counter`, and treats everything before it as seen as well.
    ///
    /// It starts at the first authenticated frame; what came before that frame may be a replay, and
    /// nothing here could tell.
    pub(crate) fn starting_at(counter: u64) -> Self {
        // All ones: all of the past counts as seen. Blocks are cleared as the window reaches them.
        let mut window = Self { highest: counter, ring: [u64::MAX; BLOCKS] };
        let (index, bit) = position(counter);
        // Later counters of the same block are yet to come.
        window.ring[index] = if bit == 63 { u64::MAX } else { (1 << (bit + 1)) - 1 };
        window
    }

    /// Whether `counter` is new enough and was not seen. Changes nothing: a frame that turns out to
    /// be forged must leave no trace.
    pub(crate) fn check(&self, counter: u64) -> Result<(), ReplayVerdict> {
        if counter > self.highest {
            return Ok(());
        }
        if self.highest - counter >= Self::WIDTH {
            return Err(ReplayVerdict::TooOld);
        }
        let (index, bit) = position(counter);
        if self.ring[index] >> bit & 1 == 1 { Err(ReplayVerdict::Seen) } else { Ok(()) }
    }

    /// Marks `counter` as seen; only for counters that [`ReplayWindow::check`] lets through, and
    /// only after the frame was authenticated.
    pub(crate) fn record(&mut self, counter: u64) {
        if counter > self.highest {
            let from = self.highest / 64;
            let blocks = (counter / 64 - from).min(BLOCKS as u64);
            for step in 1..=blocks {
                self.ring[((from + step) % BLOCKS as u64) as usize] = 0;
            }
            self.highest = counter;
        }
        let (index, bit) = position(counter);
        self.ring[index] |= 1 << bit;
    }
}

/// Why a counter is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ReplayVerdict {
    Seen,
    TooOld,
}

fn position(counter: u64) -> (usize, u32) {
    ((counter / 64 % BLOCKS as u64) as usize, (counter % 64) as u32)
}

/// One block more than the window takes, because the highest counter's block is only partly in it.
const BLOCKS: usize = ReplayWindow::WIDTH as usize / 64 + 1;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    /// What the window must do, in the plainest words: it remembers everything.
    struct Model {
        first: u64,
        seen: BTreeSet<u64>,
    }

    impl Model {
        fn check(&self, counter: u64) -> Result<(), ReplayVerdict> {
            let highest = *self.seen.last().unwrap();
            if counter > highest {
                Ok(())
            } else if highest - counter >= ReplayWindow::WIDTH {
                Err(ReplayVerdict::TooOld)
            } else if counter <= self.first || self.seen.contains(&counter) {
                Err(ReplayVerdict::Seen)
            } else {
                Ok(())
            }
        }
    }

    #[derive(Clone, Debug)]
    enum Step {
        /// So far ahead of the highest.
        Ahead(u64),
        /// So far behind it.
        Behind(u64),
    }

    fn steps() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (1u64..4).prop_map(Step::Ahead),
            2 => (1u64..200).prop_map(Step::Ahead),
            1 => (900u64..2500).prop_map(Step::Ahead),
            1 => any::<u32>().prop_map(|n| Step::Ahead(u64::from(n))),
            6 => (0u64..70).prop_map(Step::Behind),
            3 => (0u64..1100).prop_map(Step::Behind),
            1 => any::<u64>().prop_map(Step::Behind),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]

        #[test]
        fn the_window_does_what_the_model_does(
            first in prop_oneof![0u64..200, any::<u64>().prop_map(|n| n / 2), Just(u64::MAX - 5)],
            steps in prop::collection::vec(steps(), 1..200),
        ) {
            let mut window = ReplayWindow::starting_at(first);
            let mut model = Model { first, seen: BTreeSet::from([first]) };
            for step in steps {
                let highest = *model.seen.last().unwrap();
                let counter = match step {
                    Step::Ahead(n) => highest.saturating_add(n),
                    Step::Behind(n) => highest.saturating_sub(n),
                };
                let verdict = model.check(counter);
                prop_assert_eq!(window.check(counter), verdict, "counter {}, highest {}", counter, highest);
                if verdict.is_ok() {
                    window.record(counter);
                    model.seen.insert(counter);
                    prop_assert_eq!(window.check(counter), Err(ReplayVerdict::Seen));
                }
            }
        }
    }

    #[test]
    fn all_of_the_window_is_used_and_no_more() {
        let mut window = ReplayWindow::starting_at(0);
        window.record(5000);
        assert_eq!(window.check(5000 - 1023), Ok(()));
        assert_eq!(window.check(5000 - 1024), Err(ReplayVerdict::TooOld));
        for counter in 5000 - 1023..5000 {
            assert_eq!(window.check(counter), Ok(()));
            window.record(counter);
            assert_eq!(window.check(counter), Err(ReplayVerdict::Seen));
        }
    }
}
