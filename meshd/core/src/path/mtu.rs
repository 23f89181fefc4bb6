//! How long packets on a way may be: path MTU discovery by probes (RFC 8899), as a state machine without a clock.
//!
//! Sizes are those of whole packets of the underlay, in bytes, IP header included. A probe of a size is a datagram that
//! makes a packet of exactly that size, which nobody on the way may cut up; the other end answers it with a short one.
//! "Packet too big" plays no part: many networks swallow it, and anybody can forge it.
//!
//! | phase | begins | probes |
//! |---|---|---|
//! | search | with a way that nothing is known of | the largest size of use; when that stays without an answer, all [`USUAL`] ones at once; then some between the largest that passes and the smallest that does not, down to [`GRAIN`] |
//! | rest | with the end of a search | the size in force, every [`CONFIRMED`] while the way is used, and as soon as packets seem to vanish |
//! | search below | when three of these stay without an answer | as above, from [`BASE`] on. The size in force stays until another one is answered: a way that is dead says nothing of its MTU |
//! | search above | every [`RAISED`] while the way is used, unless the size in force is the largest of use | the largest size of use, then the usual ones |
//!
//! A size is in force only once it was answered, but for [`BASE`], which is taken to pass everywhere, and for what the
//! caller assumes at the start.

use std::collections::VecDeque;
use std::time::Duration;

use rand_core::RngCore;

use crate::time::Time;

/// The size that is taken to pass on every way: IPv6 promises it (RFC 8200, section 5), and IPv4 paths that are narrower
/// are hardly to be found.
pub const BASE: u16 = 1280;

/// Sizes between two that are known this near to each other are of no interest: WireGuard pads to 16 bytes anyway.
pub const GRAIN: u16 = 8;

/// A gap between two usual sizes that is not searched again with each try to find a larger one.
const NEAR: u16 = 64;

/// Sizes that networks have: behind tunnels of all kinds, clouds (1460), PPPoE (1492), Ethernet, FDDI, jumbo frames.
pub const USUAL: [u16; 12] = [BASE, 1300, 1360, 1400, 1420, 1460, 1480, 1492, 1500, 4352, 8900, 9000];

/// Pause between two probes of the size in force, while the way is used.
pub const CONFIRMED: Duration = Duration::from_secs(10);

/// Pause between two tries to find a larger size (`PMTU_RAISE_TIMER`, RFC 8899, section 5.1.1).
pub const RAISED: Duration = Duration::from_secs(600);

/// Probes of a size that have to be without an answer before it counts as too large (`MAX_PROBES`, RFC 8899, section 5.1.2).
const TRIES: u8 = 3;

/// Least time for an answer. It is longer on ways that are longer; but for the very first probe: when its answer comes late,
/// some other probes were sent in vain.
const PATIENCE: Duration = Duration::from_millis(200);

/// When one of several probes is answered, the others have as much time again as that took, and at least this.
const TOGETHER: Duration = Duration::from_millis(50);

/// Packets that seem to vanish are a reason to look no more often than this.
const SUSPECTED: Duration = Duration::from_secs(2);

/// Pause after a search in which nothing was answered; it doubles.
const DEAD: Duration = Duration::from_secs(2);
const MAX_DEAD: Duration = Duration::from_secs(60);

/// A way that nothing is known of is looked at so often, also when it is not used: whoever uses it then finds it measured.
const EAGER: u8 = 4;

/// Probes whose answers are still taken.
const REMEMBERED: usize = 64;

/// A probe to be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probe {
    /// To be put into the answer.
    pub number: u32,
    /// Length of the whole packet in bytes.
    pub size: u16,
}

/// What is known of the MTU of one way.
#[derive(Debug)]
pub struct PathMtu {
    /// The largest size that is of use.
    most: u16,
    /// The size in force.
    size: u16,
    /// Whether an answer has shown it.
    known: bool,
    /// It was in force before.
    assumed: bool,
    phase: Phase,
    /// When the size in force was last answered.
    confirmed: Option<Time>,
    /// When a larger one is tried.
    raise: Time,
    raise_pause: Duration,
    /// Pause after the next search in which nothing is answered.
    dead: Duration,
    /// How many such searches there were in a row.
    failed: u8,
    under_way: VecDeque<(u32, u16)>,
}

#[derive(Debug)]
enum Phase {
    /// The size in force is probed again at this time, if the way is used.
    Rest(Time),
    /// It is being probed: so often already, and next at this time.
    Confirm(u8, Time),
    Search(Search),
}

#[derive(Debug)]
struct Search {
    /// Upwards from a size that passes.
    above: bool,
    /// The largest that was answered.
    low: Option<u16>,
    /// The smallest that counts as too large.
    high: u16,
    stage: Stage,
    /// Those of this round.
    sizes: Vec<u16>,
    tries: u8,
    /// When they were sent last.
    asked: Time,
    due: Time,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Largest,
    Usual,
    Between,
}

impl Search {
    fn new(stage: Stage, above: Option<u16>, most: u16, now: Time) -> Self {
        let high = most.saturating_add(1);
        let mut search = Self {
            above: above.is_some(),
            low: above,
            high,
            stage,
            sizes: Vec::new(),
            tries: 0,
            asked: now,
            due: now,
        };
        search.begin(stage);
        search
    }

    fn floor(&self) -> u16 {
        self.low.unwrap_or(BASE)
    }

    fn begin(&mut self, stage: Stage) {
        let (low, high) = (self.low.unwrap_or(0), self.high);
        self.sizes = match stage {
            Stage::Largest => vec![high - 1],
            Stage::Usual => {
                let usual = USUAL.into_iter().filter(|size| *size < high - 1);
                usual.chain([high - 1]).filter(|size| *size > low).collect()
            }
            Stage::Between => between(self.floor(), high),
        };
        (self.stage, self.tries) = (stage, 0);
    }

    /// How often the sizes of this round are tried: the very first one only once, it is among the usual ones as well.
    fn limit(&self) -> u8 {
        if self.stage == Stage::Largest && !self.above { 1 } else { TRIES }
    }

    /// Sizes of this round that may still pass.
    fn open(&self) -> impl Iterator<Item = u16> {
        self.sizes.iter().copied().filter(|size| self.low.is_none_or(|low| *size > low))
    }

    /// From what passes to the next larger size.
    fn gap(&self, next: Option<u16>) -> u16 {
        next.unwrap_or(self.high).saturating_sub(self.floor())
    }

    /// The next round, if there is one.
    fn go_on(&mut self) -> bool {
        let open = self.open().min();
        match self.stage {
            Stage::Largest if open.is_none() => return false,
            Stage::Largest => {
                self.begin(Stage::Usual);
                return true;
            }
            // No usual size more than before: what little there may be is not worth looking for again and again.
            Stage::Usual
                if self.above && open == self.sizes.iter().copied().min() && self.gap(open) <= NEAR =>
            {
                return false;
            }
            Stage::Usual | Stage::Between => self.high = open.map_or(self.high, |open| open.min(self.high)),
        }
        self.begin(Stage::Between);
        !self.sizes.is_empty()
    }
}

/// A few sizes that cut what is between two in pieces of one length.
fn between(low: u16, high: u16) -> Vec<u16> {
    let width = high.saturating_sub(low);
    if width <= GRAIN {
        return Vec::new();
    }
    let step = width.div_ceil(4).max(GRAIN);
    (1..4).map(|number| low + number * step).filter(|size| *size < high).collect()
}

impl PathMtu {
    /// A way on which packets of more than `most` bytes are of no use. `assumed` is what was found before, if anything
    /// was: that is in force until something else is found. A larger size is tried every `raise`, [`RAISED`] in general.
    pub fn new(most: u16, assumed: Option<u16>, raise: Duration, now: Time) -> Self {
        let most = most.max(BASE);
        let phase = match assumed {
            Some(_) => Phase::Rest(now),
            None => Phase::Search(Search::new(Stage::Largest, None, most, now)),
        };
        Self {
            most,
            size: assumed.unwrap_or(BASE).clamp(BASE, most),
            known: false,
            assumed: assumed.is_some(),
            phase,
            confirmed: None,
            raise: now + raise,
            raise_pause: raise,
            dead: DEAD,
            failed: 0,
            under_way: VecDeque::new(),
        }
    }

    /// The size in force, in bytes.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// The largest size of use, in bytes.
    pub fn most(&self) -> u16 {
        self.most
    }

    /// Whether an answer has shown the size in force, and it is not only assumed.
    pub fn is_known(&self) -> bool {
        self.known
    }

    /// Whether larger sizes were tried in vain, so that the size in force says what does not pass, too.
    pub fn is_settled(&self) -> bool {
        self.known
            && match &self.phase {
                Phase::Rest(_) | Phase::Confirm(..) => true,
                Phase::Search(search) => search.above || search.stage == Stage::Between || search.tries > 1,
            }
    }

    /// When the size in force was last answered.
    pub fn confirmed(&self) -> Option<Time> {
        self.confirmed
    }

    /// Another size is the largest of use: the device's has changed.
    pub fn set_most(&mut self, most: u16, now: Time) {
        let most = most.max(BASE);
        if most == self.most {
            return;
        }
        self.most = most;
        self.size = self.size.min(most);
        match self.phase {
            Phase::Search(_) => self.phase = Phase::Search(Search::new(Stage::Largest, None, most, now)),
            // What was enough before may not be all that passes.
            Phase::Rest(_) | Phase::Confirm(..) => self.raise = now,
        }
    }

    /// Packets are sent and nothing comes back: too long for the way, perhaps.
    pub fn suspect(&mut self, now: Time) {
        if let Phase::Rest(due) = &mut self.phase
            && self.confirmed.is_none_or(|at| now.since(at) >= SUSPECTED)
        {
            *due = (*due).min(now);
        }
    }

    /// An answer has come; whether it was to one of these probes.
    pub fn answered(&mut self, number: u32, now: Time) -> bool {
        let Some(at) = self.under_way.iter().position(|(known, _)| *known == number) else { return false };
        let Some((_, size)) = self.under_way.remove(at) else { return false };
        if size > self.most {
            return true;
        }
        (self.dead, self.failed) = (DEAD, 0);
        let grows = size >= self.size;
        match &mut self.phase {
            Phase::Rest(due) | Phase::Confirm(_, due) if grows => {
                self.phase = Phase::Rest((*due).max(now + CONFIRMED));
            }
            Phase::Rest(_) | Phase::Confirm(..) => {}
            Phase::Search(search) => {
                search.low = search.low.max(Some(size));
                // It came late: the size had been given up.
                search.high = search.high.max(size.saturating_add(1));
                if search.open().next().is_some() {
                    // The others are about to come: only the largest of them is to be in force.
                    search.due = search.due.min(now + TOGETHER.max(now.since(search.asked)));
                    return true;
                }
                search.due = now;
            }
        }
        if grows {
            (self.size, self.known, self.confirmed) = (size, true, Some(now));
        }
        true
    }

    /// Does what is due: probes to be sent. `used`: packets go this way now. `rtt`: how long an answer takes.
    #[must_use]
    pub fn advance(
        &mut self,
        used: bool,
        rtt: Option<Duration>,
        rng: &mut impl RngCore,
        now: Time,
    ) -> Vec<Probe> {
        let patience = PATIENCE.max(rtt.unwrap_or_default() * 2);
        let mut sizes = Vec::new();
        // A phase ends where another begins at once.
        while let Some(due) = self.next(used).filter(|due| *due <= now) {
            match &mut self.phase {
                Phase::Rest(at) if *at <= due && (self.known || self.assumed) => {
                    self.phase = Phase::Confirm(0, now);
                }
                Phase::Rest(at) if *at <= due => {
                    self.phase = Phase::Search(Search::new(Stage::Largest, None, self.most, now));
                }
                Phase::Rest(_) => {
                    let search = Search::new(Stage::Largest, Some(self.size), self.most, now);
                    self.phase = Phase::Search(search);
                    self.raise = now + self.raise_pause;
                }
                Phase::Confirm(tries, at) if *tries < TRIES => {
                    sizes.push(self.size);
                    *tries += 1;
                    *at = now + patience;
                }
                Phase::Confirm(..) => {
                    self.phase = Phase::Search(Search::new(Stage::Usual, None, self.size, now));
                }
                Phase::Search(search) => {
                    if let Some(low) =
                        search.low.filter(|low| search.tries > 0 && (*low != self.size || !self.known))
                    {
                        (self.size, self.known, self.confirmed) = (low, true, Some(now));
                    }
                    if search.tries < search.limit() && search.open().next().is_some() {
                        sizes.extend(search.open());
                        search.tries += 1;
                        let first = search.stage == Stage::Largest && !search.above;
                        (search.asked, search.due) = (now, now + if first { PATIENCE } else { patience });
                    } else if search.low.is_none() && search.stage != Stage::Largest {
                        self.phase = Phase::Rest(now + self.dead);
                        self.dead = (self.dead * 2).min(MAX_DEAD);
                        self.failed = self.failed.saturating_add(1);
                    } else if !search.go_on() {
                        self.phase = Phase::Rest(now + CONFIRMED);
                        self.raise = now + self.raise_pause;
                    }
                }
            }
        }
        sizes.into_iter().map(|size| self.probe(size, rng)).collect()
    }

    /// When something is due by itself.
    pub fn next(&self, used: bool) -> Option<Time> {
        let found = self.known || self.assumed;
        let eager = !found && self.failed < EAGER;
        match &self.phase {
            Phase::Rest(due) if eager => Some(*due),
            Phase::Rest(due) if used && found && self.size < self.most => Some((*due).min(self.raise)),
            Phase::Rest(due) => used.then_some(*due),
            Phase::Confirm(_, due) => Some(*due),
            Phase::Search(search) => Some(search.due),
        }
    }

    fn probe(&mut self, size: u16, rng: &mut impl RngCore) -> Probe {
        let number = rng.next_u32();
        if self.under_way.len() >= REMEMBERED {
            self.under_way.pop_front();
        }
        self.under_way.push_back((number, size));
        Probe { number, size }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand_chacha::ChaCha20Rng;
    use rand_core::{RngCore as _, SeedableRng};

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// A way with an MTU, that loses what the dice say, and the end that probes it.
    struct World {
        mtu: PathMtu,
        now: Time,
        rng: ChaCha20Rng,
        truth: u16,
        /// Of 256.
        loss: u8,
        alive: bool,
        rtt: Duration,
        sent: usize,
        answers: VecDeque<(Time, u32)>,
    }

    impl World {
        fn new(truth: u16, most: u16, assumed: Option<u16>) -> Self {
            let now = Time::from_origin(SECOND);
            Self {
                mtu: PathMtu::new(most, assumed, RAISED, now),
                now,
                rng: ChaCha20Rng::from_seed([7; 32]),
                truth,
                loss: 0,
                alive: true,
                rtt: Duration::from_millis(20),
                sent: 0,
                answers: VecDeque::new(),
            }
        }

        /// Until then, in a way that is used or not.
        fn run(&mut self, span: Duration, used: bool) {
            let end = self.now + span;
            loop {
                let answer = self.answers.front().map(|(at, _)| *at);
                let next = self.mtu.next(used).into_iter().chain(answer).min();
                let Some(next) = next.filter(|next| *next <= end) else { break };
                self.now = self.now.max(next);
                while let Some((_, number)) = self.answers.pop_front_if(|(at, _)| *at <= self.now) {
                    assert!(self.mtu.answered(number, self.now));
                }
                for probe in self.mtu.advance(used, Some(self.rtt), &mut self.rng, self.now) {
                    self.sent += 1;
                    assert!((BASE..=self.mtu.most()).contains(&probe.size), "{probe:?}");
                    let lost = (self.rng.next_u32() as u8) < self.loss;
                    if self.alive && probe.size <= self.truth && !lost {
                        self.answers.push_back((self.now + self.rtt, probe.number));
                    }
                }
            }
            self.now = end;
        }

        fn found(&self) -> u16 {
            assert!(self.mtu.is_known());
            self.mtu.size()
        }
    }

    #[test]
    fn where_the_largest_passes_one_probe_is_enough() {
        let mut world = World::new(1500, 1480, None);
        assert_eq!((world.mtu.size(), world.mtu.is_known()), (BASE, false), "nothing is known yet");
        world.run(world.rtt, false);
        assert_eq!((world.found(), world.sent), (1480, 1));
        world.run(SECOND * 100_000, false);
        assert_eq!(world.sent, 1, "a way that is not used costs nothing");
    }

    #[test]
    fn the_usual_sizes_are_found_within_a_third_of_a_second_and_what_does_not_pass_is_known_too() {
        for truth in USUAL {
            let mut world = World::new(truth, 9000, None);
            world.run(PATIENCE + world.rtt + TOGETHER, true);
            assert_eq!((world.found(), world.mtu.is_settled()), (truth, true));
            world.run(SECOND * 30, true);
            assert_eq!(world.found(), truth, "and stays");
        }
    }

    #[test]
    fn a_way_that_is_used_costs_a_probe_in_ten_seconds() {
        let mut world = World::new(1500, 1480, None);
        world.run(SECOND * 2, true);
        world.sent = 0;
        world.run(SECOND * 500, true);
        assert!((45..=50).contains(&world.sent), "{}", world.sent);
    }

    #[test]
    fn a_black_hole_is_found_and_what_gets_through_it_is_in_force_at_once() {
        let mut world = World::new(1500, 1480, None);
        world.run(SECOND * 5, true);
        world.truth = 1300;
        world.mtu.suspect(world.now);
        world.run(PATIENCE * 4 + world.rtt, true);
        assert_eq!(world.found(), 1300);
    }

    #[test]
    fn it_is_found_without_a_suspicion_too() {
        let mut world = World::new(1500, 1480, None);
        world.run(SECOND * 5, true);
        world.truth = 1333;
        world.run(CONFIRMED + SECOND * 2, true);
        assert!((1300..=1333).contains(&world.found()), "{}", world.found());
        world.run(SECOND * 6, true);
        assert!((1333 - GRAIN..=1333).contains(&world.found()), "{}", world.found());
    }

    #[test]
    fn a_way_that_is_dead_keeps_its_size() {
        let mut world = World::new(1500, 1480, None);
        world.run(SECOND * 5, true);
        world.alive = false;
        world.sent = 0;
        world.run(SECOND * 600, true);
        assert_eq!(world.found(), 1480);
        assert!(world.sent < 1000, "{} probes into the void", world.sent);
        world.alive = true;
        world.run(MAX_DEAD + SECOND, true);
        assert_eq!(world.found(), 1480);
        assert!(world.mtu.confirmed().is_some_and(|at| world.now.since(at) <= MAX_DEAD + SECOND));
    }

    #[test]
    fn who_answers_late_is_measured_before_the_way_is_used() {
        let mut world = World::new(1500, 1480, None);
        world.alive = false;
        world.run(SECOND * 10, false);
        world.alive = true;
        world.run(SECOND * 10, false);
        assert_eq!(world.found(), 1480);
        // Who never answers is left alone.
        let mut world = World::new(1500, 1480, None);
        world.alive = false;
        world.run(SECOND * 1000, false);
        assert_eq!((world.mtu.size(), world.mtu.next(false)), (BASE, None));
    }

    #[test]
    fn a_larger_size_is_noticed_when_it_is_tried_again() {
        let mut world = World::new(1300, 1480, None);
        world.run(SECOND * 10, true);
        assert_eq!(world.found(), 1300);
        world.truth = 1500;
        world.run(RAISED - SECOND * 20, true);
        assert_eq!(world.found(), 1300);
        world.run(SECOND * 20, true);
        assert_eq!(world.found(), 1480);
    }

    #[test]
    fn nobody_looks_for_a_larger_size_where_nothing_is_sent() {
        let mut world = World::new(1300, 1480, None);
        world.run(SECOND * 10, true);
        world.sent = 0;
        world.truth = 1500;
        world.run(SECOND * 10_000, false);
        assert_eq!((world.sent, world.found()), (0, 1300));
        world.run(SECOND, true);
        assert_eq!(world.found(), 1480, "as soon as something is");
    }

    #[test]
    fn what_was_assumed_is_in_force_until_something_else_is_found() {
        let mut world = World::new(1300, 1480, Some(1480));
        world.run(SECOND * 100, false);
        assert_eq!((world.mtu.size(), world.sent, world.mtu.is_known()), (1480, 0, false));
        world.run(SECOND + PATIENCE, true);
        assert_eq!(world.found(), 1300);
        assert_eq!(PathMtu::new(1480, Some(9000), RAISED, world.now).size(), 1480);
    }

    #[test]
    fn another_largest_size_is_looked_for() {
        let mut world = World::new(9000, 1480, None);
        world.run(SECOND, true);
        world.mtu.set_most(8980, world.now);
        world.run(SECOND, true);
        assert_eq!(world.found(), 8980);
        world.mtu.set_most(1400, world.now);
        assert_eq!(world.mtu.size(), 1400);
    }

    #[test]
    fn an_answer_that_takes_long_counts_all_the_same() {
        let mut world = World::new(1500, 1480, None);
        world.rtt = SECOND * 2;
        // Nobody has said yet that it takes long.
        let probes = world.mtu.advance(true, None, &mut world.rng, world.now);
        let later = world.now + SECOND;
        let more = world.mtu.advance(true, None, &mut world.rng, later);
        assert!(more.len() > 1);
        assert!(world.mtu.answered(probes[0].number, later + SECOND));
        assert_eq!(world.mtu.size(), 1480);
        assert!(!world.mtu.answered(probes[0].number, later + SECOND), "once");
    }

    proptest! {
        #[test]
        fn what_is_found_is_never_too_large_and_hardly_too_small(
            truth in BASE..=9000,
            most in BASE..=9000,
            rtt in 1..120u64,
        ) {
            let mut world = World::new(truth, most, None);
            world.rtt = Duration::from_millis(rtt);
            world.run(SECOND * 20, true);
            let best = truth.min(most);
            prop_assert!(world.found() <= best && best - world.found() < GRAIN, "{} of {best}", world.found());
            prop_assert!(world.sent <= 80, "{} probes", world.sent);
        }

        #[test]
        fn whatever_is_lost_it_is_never_too_large(
            truth in BASE..=9000,
            most in BASE..=9000,
            loss in 0..200u8,
            seed in any::<[u8; 32]>(),
        ) {
            let mut world = World::new(truth, most, None);
            (world.loss, world.rng) = (loss, ChaCha20Rng::from_seed(seed));
            for _ in 0..40 {
                world.run(SECOND / 2, true);
                prop_assert!(world.mtu.size() <= truth.min(most).max(BASE));
            }
            // What one search has missed by bad luck, a later one finds.
            world.loss = 0;
            world.run(RAISED * 2 + SECOND * 60, true);
            let best = truth.min(most);
            prop_assert!(world.found() <= best && best - world.found() <= NEAR, "{} of {best}", world.found());
        }

        #[test]
        fn whatever_the_way_becomes_it_is_followed(
            truths in prop::collection::vec(BASE..=9000, 1..5),
            assumed in prop::option::of(BASE..=8980),
        ) {
            let mut world = World::new(1500, 8980, assumed);
            for truth in truths {
                world.truth = truth;
                world.run(RAISED * 2 + SECOND * 60, true);
                let best = truth.min(8980);
                let found = world.found();
                prop_assert!(found <= best && best - found <= NEAR, "{found} of {best}");
            }
        }
    }
}
