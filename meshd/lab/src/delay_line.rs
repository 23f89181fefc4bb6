//! One direction of a bad link: a queue in which packets are lost, doubled, slowed down and delayed.
//!
//! Pure: the caller says what time it is. Call [`DelayLine::handle_frame`] for each frame that comes,
//! [`DelayLine::poll_frame`] until it returns nothing, and again at [`DelayLine::poll_timeout`]. Time must not go back.
//! The same seed and the same frames at the same times have the same fates.
//!
//! A packet first waits its turn at the rate, then is on its way for its delay:
//!
//! - it leaves at `max(now, when the one before has left) + length / rate`, and is lost if it would wait for longer
//!   than [`LONGEST_QUEUE`] before its turn;
//! - it arrives `delay ± jitter` later, never before a packet that was in front of it; one that overtakes
//!   (`reorder`) arrives as soon as it has left.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::impairment::Impairment;
use crate::stream::next_random;

/// How long a packet waits for its turn at most: what routers at home do, give or take.
const LONGEST_QUEUE: Duration = Duration::from_millis(100);

/// What became of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// It will arrive so often: once or twice.
    Taken(u8),
    /// Lost by chance.
    Lost,
    /// Lost because too many are waiting.
    Overflown,
}

/// The state of a direction. `F` is a frame.
#[derive(Debug)]
pub(crate) struct DelayLine<F> {
    impairment: Impairment,
    random: u64,
    /// Frames on their way, by the time of their arrival and the order in which they came.
    under_way: BTreeMap<(Instant, u64), F>,
    counter: u64,
    /// When the last packet has left.
    free: Option<Instant>,
    /// When the last packet arrives, but for those that overtake.
    last: Option<Instant>,
}

impl<F: Clone> DelayLine<F> {
    /// An empty line. Cuts, and the longest packet, are the caller's concern.
    pub(crate) fn new(impairment: Impairment, seed: u64) -> Self {
        Self { impairment, random: seed, under_way: BTreeMap::new(), counter: 0, free: None, last: None }
    }

    /// Takes a frame of `length` bytes.
    pub(crate) fn handle_frame(&mut self, frame: F, length: usize, now: Instant) -> Fate {
        // Every frame draws as many numbers, so that one setting does not change the fates by another.
        let [lost, doubled] = [self.draw(), self.draw()];
        let draws = [[self.draw(), self.draw()], [self.draw(), self.draw()]];
        if self.impairment.loss.takes(lost) {
            return Fate::Lost;
        }
        let copies = 1 + usize::from(self.impairment.duplicate.takes(doubled));
        let mut taken = 0;
        for [jitter, overtakes] in &draws[..copies] {
            let Some(leaves) = self.turn(length, now) else { break };
            let arrives = if self.impairment.reorder.takes(*overtakes) {
                leaves
            } else {
                let arrives = leaves + self.delay(*jitter);
                *self.last.insert(self.last.map_or(arrives, |last| last.max(arrives)))
            };
            self.counter += 1;
            self.under_way.insert((arrives, self.counter), frame.clone());
            taken += 1;
        }
        if taken == 0 { Fate::Overflown } else { Fate::Taken(taken) }
    }

    /// The next frame that has arrived.
    #[must_use]
    pub(crate) fn poll_frame(&mut self, now: Instant) -> Option<F> {
        let first = self.under_way.first_entry()?;
        (first.key().0 <= now).then(|| first.remove())
    }

    /// When the next frame arrives; `None` when none is under way.
    #[must_use]
    pub(crate) fn poll_timeout(&self) -> Option<Instant> {
        self.under_way.first_key_value().map(|((arrives, _), _)| *arrives)
    }

    fn draw(&mut self) -> u64 {
        next_random(&mut self.random)
    }

    /// When a frame has left, or `None` when too many are before it.
    fn turn(&mut self, length: usize, now: Instant) -> Option<Instant> {
        let Some(rate) = self.impairment.rate else { return Some(now) };
        let start = self.free.map_or(now, |free| free.max(now));
        if start - now > LONGEST_QUEUE {
            return None;
        }
        Some(*self.free.insert(start + rate.time_for(length)))
    }

    fn delay(&self, random: u64) -> Duration {
        let Impairment { delay, jitter, .. } = self.impairment;
        // Up to twice the jitter, from `delay - jitter` on; at most two hours in nanoseconds, so nothing is cut off.
        let range = u64::try_from(jitter.0.as_nanos() * 2).unwrap_or(u64::MAX);
        let part = ((u128::from(random) * (u128::from(range) + 1)) >> 64) as u64;
        (delay.0 + Duration::from_nanos(part)).saturating_sub(jitter.0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::quantity::{Rate, Share, Span};

    const MS: Duration = Duration::from_millis(1);
    const NONE: Impairment = Impairment::NONE;

    /// When frames arrive that come at these times with these lengths, as (number, time since the start).
    fn run(
        impairment: Impairment,
        seed: u64,
        frames: &[(Duration, usize)],
    ) -> (Vec<(usize, Duration)>, Vec<Fate>) {
        let start = Instant::now();
        let mut line = DelayLine::new(impairment, seed);
        let (mut arrived, mut fates) = (Vec::new(), Vec::new());
        let mut drain = |line: &mut DelayLine<usize>, until: Option<Instant>| {
            while let Some(at) = line.poll_timeout().filter(|at| until.is_none_or(|until| *at <= until)) {
                assert_eq!(line.poll_frame(at - Duration::from_nanos(1)), None, "not before its time");
                arrived.push((line.poll_frame(at).unwrap(), at - start));
            }
        };
        for (number, (at, length)) in frames.iter().enumerate() {
            drain(&mut line, Some(start + *at));
            fates.push(line.handle_frame(number, *length, start + *at));
        }
        drain(&mut line, None);
        assert_eq!(line.poll_frame(start + Duration::from_secs(100_000)), None);
        (arrived, fates)
    }

    /// So many frames, one every millisecond.
    fn steady(count: u32) -> Vec<(Duration, usize)> {
        (0..count).map(|number| (number * MS, 1000)).collect()
    }

    #[test]
    fn without_impairment_frames_arrive_at_once() {
        let (arrived, fates) = run(NONE, 1, &steady(10));
        assert_eq!(arrived, (0..10).map(|n| (n, n as u32 * MS)).collect::<Vec<_>>());
        assert!(fates.iter().all(|fate| *fate == Fate::Taken(1)));
    }

    #[test]
    fn a_delay_is_the_same_for_all_and_jitter_keeps_the_order_within_its_bounds() {
        let (arrived, _) = run(Impairment { delay: Span(40 * MS), ..NONE }, 1, &steady(100));
        assert!(arrived.iter().all(|(n, at)| *at == *n as u32 * MS + 40 * MS));
        let (arrived, _) =
            run(Impairment { delay: Span(40 * MS), jitter: Span(10 * MS), ..NONE }, 1, &steady(2000));
        let delays: Vec<_> = arrived.iter().map(|(n, at)| *at - *n as u32 * MS).collect();
        assert!(delays.iter().all(|delay| (30 * MS..=50 * MS).contains(delay)), "{delays:?}");
        assert!(delays.iter().any(|d| *d < 38 * MS) && delays.iter().any(|d| *d > 49 * MS));
        assert!(arrived.is_sorted());
    }

    #[test]
    fn shares_are_met() {
        let count = |impairment, which: fn(&Fate) -> bool| {
            run(impairment, 7, &steady(20_000)).1.iter().filter(|fate| which(fate)).count()
        };
        let lost = count(Impairment { loss: Share::percent(10), ..NONE }, |fate| *fate == Fate::Lost);
        assert!((1800..2200).contains(&lost), "{lost}");
        let doubled =
            count(Impairment { duplicate: Share::percent(5), ..NONE }, |fate| *fate == Fate::Taken(2));
        assert!((900..1100).contains(&doubled), "{doubled}");
        let reorder = Impairment { delay: Span(20 * MS), reorder: Share::percent(5), ..NONE };
        let (arrived, _) = run(reorder, 7, &steady(20_000));
        let early = arrived.iter().filter(|(n, at)| *at == *n as u32 * MS).count();
        assert!((900..1100).contains(&early), "{early}");
        let late = arrived.iter().filter(|(n, at)| *at == *n as u32 * MS + 20 * MS).count();
        assert_eq!(early + late, 20_000);
    }

    #[test]
    fn a_rate_spaces_packets_and_a_long_queue_overflows() {
        let slow = Impairment { rate: Some(Rate::bits_per_second(1_000_000)), ..NONE };
        let frames = vec![(Duration::ZERO, 1250); 20];
        let (arrived, fates) = run(slow, 1, &frames);
        // 10 ms each: those that would start after more than 100 ms are lost.
        assert_eq!(arrived, (0..11).map(|n| (n, (n as u32 + 1) * 10 * MS)).collect::<Vec<_>>());
        assert!(fates[11..].iter().all(|fate| *fate == Fate::Overflown));
    }

    fn impairments() -> impl Strategy<Value = Impairment> {
        let share = || (0u32..=100).prop_map(Share::percent);
        let micros = |most: u64| 0..=most;
        (
            micros(200_000),
            0.0..=1.0f64,
            share(),
            share(),
            share(),
            proptest::option::of(4_000u64..1_000_000_000),
        )
            .prop_map(|(delay, jitter, loss, duplicate, reorder, rate)| Impairment {
                delay: Span(Duration::from_micros(delay)),
                jitter: Span(Duration::from_micros((delay as f64 * jitter) as u64)),
                loss,
                duplicate,
                reorder,
                rate: rate.map(Rate::bits_per_second),
                ..NONE
            })
    }

    proptest! {
        #[test]
        fn frames_keep_the_bounds_that_the_link_promises(
            impairment in impairments(),
            seed: u64,
            steps in proptest::collection::vec((0u64..20_000, 14usize..1514), 1..80),
        ) {
            let mut at = Duration::ZERO;
            let frames: Vec<_> = steps
                .iter()
                .map(|(pause, length)| {
                    at += Duration::from_micros(*pause);
                    (at, *length)
                })
                .collect();
            let (arrived, fates) = run(impairment, seed, &frames);
            prop_assert_eq!(run(impairment, seed, &frames), (arrived.clone(), fates.clone()), "same seed");

            // As many arrive as were taken.
            for (number, fate) in fates.iter().enumerate() {
                let copies = arrived.iter().filter(|(of, _)| *of == number).count();
                let expected = match fate {
                    Fate::Taken(copies) => usize::from(*copies),
                    Fate::Lost | Fate::Overflown => 0,
                };
                prop_assert_eq!(copies, expected);
                prop_assert!(impairment.rate.is_some() || *fate != Fate::Overflown);
            }
            // Nothing is earlier than the shortest delay, unless it overtakes; nothing is later than queue, turn and delay.
            let longest = impairment.delay.0 + impairment.jitter.0;
            for (number, at) in &arrived {
                let took = *at - frames[*number].0;
                let turn = impairment.rate.map_or(Duration::ZERO, |rate| rate.time_for(frames[*number].1));
                prop_assert!(took >= turn);
                if impairment.reorder == Share::NONE {
                    prop_assert!(took >= impairment.delay.0.saturating_sub(impairment.jitter.0));
                }
                let queue = impairment.rate.map_or(Duration::ZERO, |rate| LONGEST_QUEUE + rate.time_for(1514));
                prop_assert!(took <= longest + turn + queue, "{took:?} {longest:?} {turn:?}");
            }
            // Order, unless packets overtake.
            if impairment.reorder == Share::NONE {
                prop_assert!(arrived.iter().map(|(number, _)| number).is_sorted());
            }
            // Never more than the rate in any stretch of time, when nothing bends it.
            if let Some(rate) = impairment.rate
                && impairment.jitter == Span::default()
                && impairment.reorder == Share::NONE
            {
                for pair in arrived.windows(2) {
                    prop_assert!(pair[1].1 - pair[0].1 >= rate.time_for(frames[pair[1].0].1));
                }
            }
        }
    }
}
