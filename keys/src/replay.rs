//! A sliding window over counters, after RFC 4303, section 3.4.3.

/// Which counters of one sender were seen. Counters that are [`ReplayWindow::WIDTH`] or more behind the highest are
/// refused. There is one for every member: it is as small as it may be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ReplayWindow {
    highest: u64,
    /// The lowest bit is that of the highest counter, the bit above it that of the counter before; in two halves, the
    /// lower first.
    seen: [u64; 2],
}

impl ReplayWindow {
    /// Counters that can still be accepted when they arrive late: of those a sender counts for all its receivers, more
    /// than it sends in the time by which packets overtake each other.
    pub(crate) const WIDTH: u64 = 128;

    /// A window that has seen `counter`, and treats everything before it as seen as well.
    ///
    /// It starts at the first authenticated frame; what came before that frame may be a replay, and
    /// nothing here could tell.
    pub(crate) fn starting_at(counter: u64) -> Self {
        Self { highest: counter, seen: [u64::MAX; 2] }
    }

    /// Whether `counter` is new enough and was not seen. Changes nothing: a frame that turns out to
    /// be forged must leave no trace.
    pub(crate) fn check(&self, counter: u64) -> Result<(), ReplayVerdict> {
        if counter > self.highest {
            return Ok(());
        }
        match self.highest - counter {
            Self::WIDTH.. => Err(ReplayVerdict::TooOld),
            behind if self.bits() >> behind & 1 == 1 => Err(ReplayVerdict::Seen),
            _ => Ok(()),
        }
    }

    /// Marks `counter` as seen; only for counters that [`ReplayWindow::check`] lets through, and
    /// only after the frame was authenticated.
    pub(crate) fn record(&mut self, counter: u64) {
        let bits = if counter > self.highest {
            let ahead = counter - self.highest;
            self.highest = counter;
            let moved = if ahead < Self::WIDTH { self.bits() << ahead } else { 0 };
            moved | 1
        } else {
            // Too late for one that is further behind: it was let through by mistake, and there is nowhere to note it.
            self.bits()
                | 1u128.checked_shl((self.highest - counter).try_into().unwrap_or(u32::MAX)).unwrap_or(0)
        };
        self.seen = [bits as u64, (bits >> 64) as u64];
    }

    fn bits(&self) -> u128 {
        let [low, high] = self.seen;
        u128::from(high) << 64 | u128::from(low)
    }
}

/// Why a counter is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ReplayVerdict {
    Seen,
    TooOld,
}

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
            2 => (1u64..100).prop_map(Step::Ahead),
            1 => (100u64..300).prop_map(Step::Ahead),
            1 => any::<u32>().prop_map(|n| Step::Ahead(u64::from(n))),
            6 => (0u64..70).prop_map(Step::Behind),
            3 => (0u64..140).prop_map(Step::Behind),
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
        assert_eq!(window.check(5000 - 127), Ok(()));
        assert_eq!(window.check(5000 - 128), Err(ReplayVerdict::TooOld));
        for counter in 5000 - 127..5000 {
            assert_eq!(window.check(counter), Ok(()));
            window.record(counter);
            assert_eq!(window.check(counter), Err(ReplayVerdict::Seen));
        }
    }
}
