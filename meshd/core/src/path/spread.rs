//! Over which of its lanes a node sends to a member.
//!
//! Each lane of a node has a tunnel to the member's lane of the same number. What is sent is spread over several of them by the
//! ports of each flow, so that one pair of hosts has more than one flow of datagrams between them: more than one queue, and
//! more than one processor. Each end decides for itself, for what it sends; it takes in what comes by any lane.
//!
//! | a lane | when |
//! |---|---|
//! | is called: a keepalive begins a session | much is sent or received, by the direct way ([`MUCH`]) |
//! | carries | it was called, and has a session |
//! | is held back for [`HELD`] | it has no session [`CALLED`] after it was called, or what it carries is not answered for [`SILENT`]: its port is closed on the way |
//! | rests | little has been sent and received for [`QUIET`], or the way is not the direct one |
//!
//! The first lane is not called, it carries: also where nothing is known. So idle tunnels cost nothing for having several lanes,
//! and where only the first port is open, that is enough.

use std::time::Duration;

use super::{KEEPALIVES, SILENT};
use crate::node::TunnelFacts;
use crate::time::Time;

/// Bytes in a second, in both directions together, from which on it is worth to use several lanes.
pub const MUCH: u64 = 256 * 1024;

/// Less than that for so long, and the first lane is enough again.
pub const QUIET: Duration = Duration::from_secs(60);

/// A lane that was called has a session within this time: WireGuard has tried it four times.
pub const CALLED: Duration = Duration::from_secs(16);

/// A lane that does not work is not called again for so long.
pub const HELD: Duration = Duration::from_secs(300);

/// Sessions that are older are not used any more (`REJECT_AFTER_TIME`, WireGuard paper, section 6.1).
const SESSION: Duration = Duration::from_secs(180);

/// Over which lanes a node sends to one member.
#[derive(Debug, Default)]
pub struct Spread {
    /// But for the first one.
    others: Vec<Other>,
    counters: Option<(u64, Time)>,
    /// When much was sent or received last.
    much: Option<Time>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Other {
    state: State,
    counters: Option<(u64, u64)>,
    /// Since when what it carries is not answered.
    unanswered: Option<Time>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Rests,
    Called(Time),
    Carries,
    Held(Time),
}

impl Spread {
    /// What the tunnels of all lanes have carried, the first lane's in front; `direct`: they go to the member itself. To be told
    /// every second. Whether other lanes carry now, or are called.
    pub fn observe(&mut self, lanes: &[Option<TunnelFacts>], direct: bool, now: Time) -> bool {
        let before = self.summary();
        let bytes = lanes.iter().flatten().map(|facts| facts.rx_bytes.saturating_add(facts.tx_bytes));
        let bytes = bytes.fold(0, u64::saturating_add);
        if let Some((had, at)) = self.counters.replace((bytes, now)) {
            let millis = u64::try_from(now.since(at).as_millis()).unwrap_or(u64::MAX).max(1);
            if bytes.saturating_sub(had).saturating_mul(1000) / millis >= MUCH {
                self.much = Some(now);
            }
        }
        let wanted = direct && self.much.is_some_and(|at| now.since(at) < QUIET);
        self.others.resize(lanes.len().saturating_sub(1), Other::default());
        for (other, facts) in self.others.iter_mut().zip(lanes.iter().skip(1)) {
            other.observe(*facts, wanted, now);
        }
        self.summary() != before
    }

    /// Whether a lane carries; the first one does.
    pub fn carries(&self, lane: usize) -> bool {
        lane == 0 || self.state(lane) == State::Carries
    }

    /// Whether keepalives begin and hold a session of a lane.
    pub fn is_kept(&self, lane: usize) -> bool {
        matches!(self.state(lane), State::Called(_) | State::Carries) && lane > 0
    }

    /// Whether there is nothing to remember.
    pub fn is_idle(&self, now: Time) -> bool {
        self.much.is_none_or(|at| now.since(at) >= QUIET)
            && self.others.iter().all(|other| match other.state {
                State::Rests => true,
                State::Held(until) => until <= now,
                State::Called(_) | State::Carries => false,
            })
    }

    fn state(&self, lane: usize) -> State {
        let other = lane.checked_sub(1).and_then(|at| self.others.get(at));
        other.map_or(State::Rests, |other| other.state)
    }

    fn summary(&self) -> Vec<(bool, bool)> {
        (1..=self.others.len()).map(|lane| (self.carries(lane), self.is_kept(lane))).collect()
    }
}

impl Other {
    fn observe(&mut self, facts: Option<TunnelFacts>, wanted: bool, now: Time) {
        let Some(facts) = facts else {
            *self = Self::default();
            return;
        };
        let before = self.counters.replace((facts.rx_bytes, facts.tx_bytes));
        let (had_received, had_sent) = before.unwrap_or((facts.rx_bytes, facts.tx_bytes));
        if facts.rx_bytes > had_received || self.state != State::Carries {
            self.unanswered = None;
        } else if facts.tx_bytes > had_sent.saturating_add(KEEPALIVES) {
            self.unanswered.get_or_insert(now);
        }
        let has_session = facts.handshake_age.is_some_and(|age| age < SESSION);
        let is_silent = self.unanswered.is_some_and(|at| now.since(at) >= SILENT);
        self.state = match self.state {
            State::Held(until) if until > now => self.state,
            _ if !wanted => State::Rests,
            State::Rests | State::Held(_) => State::Called(now),
            State::Called(_) if has_session => State::Carries,
            State::Called(since) if now.since(since) >= CALLED => State::Held(now + HELD),
            State::Carries if !has_session || is_silent => State::Held(now + HELD),
            State::Called(_) | State::Carries => self.state,
        };
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// The lanes of two hosts, of which some work.
    struct World {
        spread: Spread,
        facts: Vec<Option<TunnelFacts>>,
        open: Vec<bool>,
        direct: bool,
        now: Time,
    }

    impl World {
        fn new(lanes: usize) -> Self {
            let facts = vec![Some(TunnelFacts::default()); lanes];
            Self { spread: Spread::default(), facts, open: vec![true; lanes], direct: true, now: Time::ZERO }
        }

        fn carrying(&self) -> Vec<usize> {
            (0..self.facts.len()).filter(|lane| self.spread.carries(*lane)).collect()
        }

        /// So many bytes are sent in a second, evenly over the lanes that carry, and as many come back by the first one.
        fn second(&mut self, bytes: u64) -> bool {
            let carrying = self.carrying();
            for (lane, facts) in self.facts.iter_mut().enumerate() {
                let Some(facts) = facts else { continue };
                let session = facts.handshake_age.map(|age| age + SECOND);
                facts.handshake_age = session.filter(|age| *age < 2 * SESSION);
                let used = carrying.contains(&lane) && bytes > 0;
                let is_old = facts.handshake_age.is_none_or(|age| age >= Duration::from_secs(120));
                if (used || self.spread.is_kept(lane)) && is_old && self.open[lane] {
                    facts.handshake_age = Some(Duration::ZERO);
                }
                if used {
                    facts.tx_bytes += bytes / carrying.len() as u64;
                    // Who has nothing to say keeps the tunnel alive.
                    facts.rx_bytes += if self.open[lane] { 32 } else { 0 };
                }
            }
            if self.open[0]
                && let Some(first) = &mut self.facts[0]
            {
                first.rx_bytes += bytes;
            }
            self.now = self.now + SECOND;
            self.spread.observe(&self.facts, self.direct, self.now)
        }

        fn seconds(&mut self, count: u32, bytes: u64) {
            for _ in 0..count {
                self.second(bytes);
            }
        }
    }

    #[test]
    fn whoever_sends_much_uses_all_lanes_and_whoever_sends_little_the_first() {
        let mut world = World::new(3);
        world.seconds(100, 1000);
        assert_eq!(world.carrying(), [0]);
        assert!(!world.spread.is_kept(1), "and nothing is done for the others");
        world.seconds(4, 4 * MUCH);
        assert_eq!(world.carrying(), [0, 1, 2]);
        world.seconds(59, 1000);
        assert_eq!(world.carrying(), [0, 1, 2]);
        world.seconds(2, 1000);
        assert_eq!(world.carrying(), [0]);
        assert!(world.spread.is_idle(world.now));
    }

    #[test]
    fn a_lane_whose_port_is_closed_is_not_used_and_not_called_all_the_time() {
        let mut world = World::new(2);
        world.open[1] = false;
        let mut called = 0;
        for _ in 0..600 {
            world.second(4 * MUCH);
            assert_eq!(world.carrying(), [0]);
            called += u32::from(world.spread.is_kept(1));
        }
        assert!((16..=40).contains(&called), "{called} s");
    }

    #[test]
    fn a_lane_that_stops_working_is_left_and_taken_again_later() {
        let mut world = World::new(2);
        world.seconds(10, 4 * MUCH);
        assert_eq!(world.carrying(), [0, 1]);
        world.open[1] = false;
        world.seconds(20, 4 * MUCH);
        assert_eq!(world.carrying(), [0]);
        world.open[1] = true;
        world.seconds(320, 4 * MUCH);
        assert_eq!(world.carrying(), [0, 1]);
    }

    #[test]
    fn a_way_through_a_relay_has_the_first_lane_only_and_at_once() {
        let mut world = World::new(2);
        world.seconds(10, 4 * MUCH);
        world.direct = false;
        assert!(world.second(4 * MUCH));
        assert_eq!(world.carrying(), [0]);
    }

    proptest! {
        #[test]
        fn what_carries_has_a_tunnel_with_a_session_and_changes_are_told(
            lanes in 1_usize..5,
            steps in prop::collection::vec((0_u64..3 * MUCH, any::<u8>(), 0_usize..5), 1..400),
        ) {
            let mut world = World::new(lanes);
            for (bytes, dice, lane) in steps {
                match (dice, world.facts.get(lane)) {
                    (0..4, Some(_)) => world.open[lane] = !world.open[lane],
                    (4..6, _) => world.direct = !world.direct,
                    // Its key is not agreed any more, or is.
                    (6..8, Some(None)) => world.facts[lane] = Some(TunnelFacts::default()),
                    (6..8, Some(Some(_))) if lane > 0 => world.facts[lane] = None,
                    _ => {}
                }
                let before = world.carrying();
                let told = world.second(bytes);
                let after = world.carrying();
                prop_assert!(told || before == after, "{before:?} {after:?}");
                prop_assert!(after.contains(&0));
                for lane in after.into_iter().filter(|lane| *lane > 0) {
                    prop_assert!(world.direct);
                    let facts = world.facts[lane].expect("a tunnel");
                    prop_assert!(facts.handshake_age.is_some_and(|age| age < SESSION));
                }
            }
        }
    }
}
