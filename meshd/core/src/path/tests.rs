//! One path, with a network that is told what to let through.

use rand_chacha::ChaCha20Rng;
use rand_core::SeedableRng as _;

use super::*;

const STEP: Duration = Duration::from_millis(50);
const SECOND: Duration = Duration::from_secs(1);

fn relay(byte: u8) -> NodeId {
    NodeId::from_bytes([byte; 16])
}

/// A path, both ends of which send something all the time, or do not.
struct Bench {
    path: Path,
    rng: ChaCha20Rng,
    now: Time,
    facts: TunnelFacts,
    /// When the ends agreed on a session last.
    session: Option<Time>,
    /// Which ways let probes through, and what they take.
    open: BTreeMap<Way, Duration>,
    /// Which ways let the tunnel through.
    carries: Vec<Way>,
    /// Relays at which both ends are registered.
    ready: Vec<NodeId>,
    sends: bool,
    answers: bool,
    candidates: Vec<NodeId>,
    under_way: Vec<(Time, Way, u32)>,
    probes: BTreeMap<Way, u32>,
    moves: Vec<(Time, Way, bool)>,
}

impl Bench {
    fn new(leads: bool) -> Self {
        let now = Time::ZERO + Duration::from_secs(100);
        Self {
            path: Path::new(leads, None, false, now),
            rng: ChaCha20Rng::seed_from_u64(3),
            now,
            facts: TunnelFacts::default(),
            session: None,
            open: BTreeMap::from([(Way::Direct, STEP)]),
            carries: vec![Way::Direct],
            ready: Vec::new(),
            sends: true,
            answers: true,
            candidates: Vec::new(),
            under_way: Vec::new(),
            probes: BTreeMap::new(),
            moves: Vec::new(),
        }
    }

    /// With relays that take 4, 2 and 3 steps.
    fn with_relays(leads: bool) -> Self {
        let mut bench = Self::new(leads);
        bench.candidates = (1..=3).map(relay).collect();
        bench.ready = bench.candidates.clone();
        for (byte, steps) in [(1, 4), (2, 2), (3, 3)] {
            bench.open.insert(Way::Relay(relay(byte)), STEP * steps);
            bench.carries.push(Way::Relay(relay(byte)));
        }
        bench
    }

    fn cut(&mut self, way: Way) {
        self.open.remove(&way);
        self.carries.retain(|other| *other != way);
    }

    fn open(&mut self, way: Way) {
        self.open.insert(way, STEP);
        self.carries.push(way);
    }

    fn run(&mut self, span: Duration) {
        let end = self.now + span;
        while self.now < end {
            self.step();
        }
    }

    /// Runs until the tunnel takes another way; how long that took, and which.
    fn moved(&mut self, limit: Duration) -> Option<(Duration, Way, bool)> {
        let (start, count) = (self.now, self.moves.len());
        while self.moves.len() == count {
            if self.now.since(start) > limit {
                return None;
            }
            self.step();
        }
        self.moves.last().map(|(at, way, anew)| (at.since(start), *way, *anew))
    }

    fn step(&mut self) {
        self.now = self.now + STEP;
        let now = self.now;
        let (due, later) = self.under_way.drain(..).partition(|(at, ..)| *at <= now);
        self.under_way = later;
        let due: Vec<(Time, Way, u32)> = due;
        for (_, way, number) in due {
            let ready = way.relay().is_none_or(|relay| self.ready.contains(&relay));
            self.path.answered(way, number, ready, now);
        }
        // The counters are looked at once a second.
        if now.since_origin().subsec_millis() < 50 {
            let through = self.carries.contains(&self.path.way());
            if through && (self.sends || self.path.is_on_trial()) {
                let is_old = |at: Time| now.since(at) >= Duration::from_secs(120);
                self.session = self.session.filter(|at| !is_old(*at)).or(Some(now));
            }
            self.facts.handshake_age = self.session.map(|at| now.since(at));
            self.facts.tx_bytes += u64::from(self.sends) * 1000;
            self.facts.rx_bytes += u64::from(self.answers && through) * 1000;
            self.path.observe(&self.facts, now);
        }
        let wants = self.path.wants_candidates(now);
        let candidates = self.candidates.clone();
        for act in self.path.advance(wants.then_some(&candidates[..]), &mut self.rng, now) {
            match act {
                Act::Probe { way, number } => {
                    *self.probes.entry(way).or_default() += 1;
                    if let Some(takes) = self.open.get(&way) {
                        self.under_way.push((now + *takes, way, number));
                    }
                }
                Act::Moved { anew } => {
                    self.session = self.session.filter(|_| !anew);
                    self.moves.push((now, self.path.way(), anew));
                }
            }
        }
    }
}

#[test]
fn a_direct_way_that_works_is_kept_whatever_relays_there_are() {
    let mut bench = Bench::with_relays(true);
    bench.run(300 * SECOND);
    assert_eq!(bench.moves, []);
    assert_eq!(bench.probes.keys().collect::<Vec<_>>(), [&Way::Direct], "no relay is bothered");
    // Now and then one is lost.
    let mut bench = Bench::with_relays(true);
    for _ in 0..20 {
        bench.run(5 * SECOND);
        bench.under_way.clear();
    }
    assert_eq!(bench.moves, []);
}

#[test]
fn nobody_probes_what_is_idle() {
    let mut bench = Bench::with_relays(true);
    bench.run(30 * SECOND);
    (bench.sends, bench.answers) = (false, false);
    bench.run(WATCHED + 2 * SECOND);
    assert!(bench.path.is_idle(bench.now));
    // What is relayed is looked at now and then, so that it works when it is needed.
    let mut bench = Bench::with_relays(true);
    bench.cut(Way::Direct);
    bench.run(10 * SECOND);
    (bench.sends, bench.answers) = (false, false);
    bench.run(WATCHED + 2 * SECOND);
    bench.probes.clear();
    bench.run(600 * SECOND);
    assert!(!bench.path.is_idle(bench.now));
    let count: u32 = bench.probes.values().sum();
    assert!((30..150).contains(&count), "{:?}", bench.probes);
}

#[test]
fn where_nothing_is_wrong_one_end_alone_probes() {
    let mut bench = Bench::with_relays(false);
    bench.path = Path::new(false, Some(bench.now), false, bench.now);
    bench.run(60 * SECOND);
    assert!(bench.probes.is_empty(), "{:?}", bench.probes);
    assert!(!bench.path.alarms(bench.now));
    bench.cut(Way::Direct);
    bench.run(3 * SECOND);
    assert!(bench.path.alarms(bench.now), "it has something to send, and nothing comes");
    assert!(bench.path.relays().any(|(_, leg)| leg.is_ready(bench.now)), "and a way to say so");
    bench.open(Way::Direct);
    bench.run(PROMOTED + 5 * SECOND);
    bench.probes.clear();
    bench.run(60 * SECOND);
    assert!(bench.probes.is_empty(), "{:?}", bench.probes);
}

#[test]
fn what_the_other_end_says_of_itself_is_not_said_back() {
    let mut bench = Bench::new(true);
    bench.path = Path::new(true, Some(bench.now), false, bench.now);
    (bench.sends, bench.answers) = (false, false);
    bench.cut(Way::Direct);
    bench.path.alarm(false, bench.now);
    let mut searched = false;
    for _ in 0..10 {
        bench.run(SECOND);
        searched |= bench.path.searches(bench.now);
        assert!(!bench.path.alarms(bench.now));
    }
    assert!(searched && bench.path.is_idle(bench.now), "the alarm has had its effect, and is over");
}

#[test]
fn a_handshake_and_keepalives_are_no_talk() {
    let now = Time::from_origin(Duration::from_secs(1000));
    let facts = |rx_bytes, tx_bytes, age| TunnelFacts {
        rx_bytes,
        tx_bytes,
        handshake_age: Some(Duration::from_secs(age)),
        ..TunnelFacts::default()
    };
    for (begins, answers) in [(148 + 32, 92 + 32), (92 + 32, 148 + 32), (148 + 92 + 32, 148 + 92 + 32)] {
        let mut path = Path::new(true, Some(now), false, now);
        path.observe(&facts(1_000, 1_000, 119), now);
        path.observe(&facts(1_000 + answers, 1_000 + begins, 0), now + SECOND);
        assert!(path.is_idle(now + SECOND));
        // Not new: somebody wants something.
        path.observe(&facts(1_000 + answers, 1_000 + 2 * begins, 1), now + 2 * SECOND);
        assert!(path.is_watched(now + 2 * SECOND));
    }
}

#[test]
fn an_idle_tunnel_leaves_its_relay_too_and_shows_by_a_new_session_that_it_may() {
    for carries in [true, false] {
        let mut bench = Bench::with_relays(true);
        bench.cut(Way::Direct);
        bench.run(20 * SECOND);
        (bench.sends, bench.answers) = (false, false);
        bench.run(60 * SECOND);
        assert_eq!(bench.moves.len(), 1);
        bench.open(Way::Direct);
        if !carries {
            bench.carries.retain(|way| *way != Way::Direct);
        }
        let (took, way, anew) = bench.moved(90 * SECOND).expect("the direct way");
        assert_eq!((way, anew), (Way::Direct, true), "after {took:?}");
        assert!(bench.path.is_on_trial());
        if carries {
            bench.run(PROMOTED + 2 * SECOND);
            assert!(bench.path.is_idle(bench.now) && bench.moves.len() == 2);
        } else {
            let (took, way, _) = bench.moved(10 * SECOND).expect("the relay again");
            assert!(way != Way::Direct && took <= PORT_CLOSED + SECOND, "{way:?} after {took:?}");
            bench.run(3600 * SECOND);
            let tries = bench.moves.iter().filter(|(_, way, _)| *way == Way::Direct).count();
            assert!((3..=10).contains(&tries), "{:?}", bench.moves);
        }
    }
}

#[test]
fn when_the_direct_way_is_cut_the_nearest_relay_takes_over_and_it_is_taken_again_when_it_works() {
    for offset in 0..20 {
        let mut bench = Bench::with_relays(true);
        bench.run(10 * SECOND + STEP * offset);
        bench.cut(Way::Direct);
        let (took, way, anew) = bench.moved(5 * SECOND).expect("a relay");
        assert!(took <= Duration::from_millis(2500), "{took:?} at {offset}");
        assert_eq!((way, anew), (Way::Relay(relay(2)), true));
        bench.run(20 * SECOND);
        bench.open(Way::Direct);
        let (took, way, anew) = bench.moved(20 * SECOND).expect("direct again");
        assert!(took <= 10 * SECOND, "{took:?}");
        assert_eq!((way, anew), (Way::Direct, false), "the session goes on");
        bench.run(60 * SECOND);
        assert_eq!(bench.moves.len(), 2);
    }
}

#[test]
fn when_the_relay_dies_another_one_that_is_ready_takes_over() {
    for offset in 0..20 {
        let mut bench = Bench::with_relays(true);
        bench.cut(Way::Direct);
        bench.run(10 * SECOND + STEP * offset);
        assert_eq!(bench.path.way(), Way::Relay(relay(2)));
        bench.cut(Way::Relay(relay(2)));
        let (took, way, anew) = bench.moved(5 * SECOND).expect("another relay");
        assert!(took <= Duration::from_millis(2500), "{took:?}");
        assert_eq!((way, anew), (Way::Relay(relay(3)), true));
    }
}

#[test]
fn a_relay_at_which_not_both_are_registered_is_not_taken() {
    let mut bench = Bench::with_relays(true);
    bench.ready = vec![relay(1)];
    bench.cut(Way::Direct);
    assert_eq!(bench.moved(10 * SECOND).unwrap().1, Way::Relay(relay(1)));
    let mut bench = Bench::with_relays(true);
    bench.ready.clear();
    bench.cut(Way::Direct);
    assert_eq!(bench.moved(120 * SECOND), None);
    bench.probes.clear();
    bench.run(600 * SECOND);
    let count: u32 =
        bench.probes.iter().filter(|(way, _)| **way != Way::Direct).map(|(_, count)| count).sum();
    assert!((20..250).contains(&count), "it is not hammered: {:?}", bench.probes);
}

#[test]
fn of_many_candidates_the_one_that_works_is_found() {
    let mut bench = Bench::new(true);
    bench.candidates = (1..=40).map(relay).collect();
    bench.ready = vec![relay(37)];
    bench.open(Way::Relay(relay(37)));
    bench.cut(Way::Direct);
    let (took, way, _) = bench.moved(900 * SECOND).expect("a relay");
    assert_eq!(way, Way::Relay(relay(37)));
    assert!(took < 400 * SECOND, "{took:?}");
}

#[test]
fn a_closed_port_of_the_tunnel_is_noticed_and_the_direct_way_then_tried_less_and_less() {
    let mut bench = Bench::with_relays(true);
    bench.carries.retain(|way| *way != Way::Direct);
    let (took, way, _) = bench.moved(20 * SECOND).expect("a relay");
    assert!(took >= PORT_CLOSED && took < PORT_CLOSED + 3 * SECOND, "{took:?}");
    assert_eq!((way, bench.path.reason().0), (Way::Relay(relay(2)), Why::PortClosed));
    bench.run(3600 * SECOND);
    let tries = bench.moves.iter().filter(|(_, way, _)| *way == Way::Direct).count();
    assert!((3..=10).contains(&tries), "{:?}", bench.moves);
}

#[test]
fn handshakes_that_the_other_end_begins_in_vain_are_no_answer() {
    let mut bench = Bench::with_relays(true);
    bench.run(10 * SECOND);
    bench.carries.retain(|way| *way != Way::Direct);
    // What is sent does not arrive there: the other end hears nothing, and begins anew.
    for _ in 0..6 {
        bench.run(5 * SECOND);
        bench.facts.rx_bytes += 148;
    }
    let (_, way, _) = *bench.moves.first().expect("a relay");
    assert_eq!(way, Way::Relay(relay(2)), "{:?}", bench.moves);
}

#[test]
fn what_is_sent_in_one_direction_only_is_no_reason_to_change() {
    let mut bench = Bench::with_relays(true);
    bench.answers = false;
    // WireGuard says something after ten seconds: a keepalive.
    for _ in 0..30 {
        bench.run(10 * SECOND);
        bench.facts.rx_bytes += 32;
    }
    assert_eq!(bench.moves, []);
}

#[test]
fn while_the_tunnel_carries_in_both_directions_unanswered_probes_are_no_reason_to_change() {
    let mut bench = Bench::with_relays(true);
    bench.run(10 * SECOND);
    bench.open.remove(&Way::Direct);
    assert_eq!(bench.moved(60 * SECOND), None);
    // In one direction only, as the other end says.
    bench.path.alarm(false, bench.now);
    let (took, ..) = bench.moved(SECOND).expect("a relay");
    assert!(took < SECOND / 2, "{took:?}");
}

#[test]
fn who_is_behind_a_nat_opens_the_way_while_somebody_talks_and_always_when_the_other_end_is_so_too() {
    for (opening, watched, idle) in
        [(Opening::None, 0, 0), (Opening::WhileBusy, 3, 0), (Opening::Always, 3, 30)]
    {
        let mut bench = Bench::with_relays(false);
        bench.path = Path::new(false, Some(bench.now), false, bench.now);
        bench.path.set_opening(opening);
        bench.run(60 * SECOND);
        let count = bench.probes.remove(&Way::Direct).unwrap_or(0);
        assert!((watched..=watched + 1).contains(&count), "{opening:?}: {count}");
        (bench.sends, bench.answers) = (false, false);
        bench.run(WATCHED + 2 * SECOND);
        bench.probes.clear();
        assert_eq!(bench.path.is_idle(bench.now), opening != Opening::Always);
        bench.run(600 * SECOND);
        let count = bench.probes.remove(&Way::Direct).unwrap_or(0);
        if opening == Opening::Always {
            assert!((idle..=idle + 1).contains(&count), "{count}");
        }
        assert_eq!(bench.moves, []);
    }
}

#[test]
fn who_follows_finds_relays_and_leaves_the_choice_to_the_other_end() {
    let mut bench = Bench::with_relays(false);
    bench.cut(Way::Direct);
    bench.run(30 * SECOND);
    assert_eq!(bench.moves, []);
    assert!(bench.path.searches(bench.now));
    assert!(bench.path.relays().any(|(_, leg)| leg.is_ready(bench.now)));
    bench.path.found(Way::Relay(relay(3)), bench.now);
    bench.run(3 * SECOND);
    assert_eq!((bench.path.way(), bench.path.searches(bench.now)), (Way::Relay(relay(3)), false));
}

#[test]
fn an_alarm_has_the_one_that_leads_look_for_itself() {
    let mut bench = Bench::with_relays(true);
    bench.path = Path::new(true, Some(bench.now), false, bench.now);
    (bench.sends, bench.answers) = (false, false);
    bench.cut(Way::Direct);
    bench.path.alarm(false, bench.now);
    assert!(bench.path.is_watched(bench.now));
    assert_eq!(bench.moved(5 * SECOND).unwrap().1, Way::Relay(relay(2)));
}

#[test]
fn one_that_was_never_reached_is_relayed_before_anything_is_sent() {
    let mut bench = Bench::with_relays(true);
    bench.path = Path::new(true, None, true, bench.now);
    (bench.sends, bench.answers) = (false, false);
    bench.cut(Way::Direct);
    let (took, way, _) = bench.moved(5 * SECOND).expect("a relay");
    assert_eq!((way, bench.path.reason().0), (Way::Relay(relay(2)), Why::Unreached));
    assert!(took < 3 * SECOND, "{took:?}");
    // And one that answers is not.
    let mut bench = Bench::with_relays(true);
    bench.path = Path::new(true, None, true, bench.now);
    (bench.sends, bench.answers) = (false, false);
    bench.run(5 * SECOND);
    assert!(bench.path.is_idle(bench.now) && bench.moves.is_empty());
}

#[test]
fn when_the_relay_has_forgotten_sessions_are_made_anew_once_both_are_registered_again() {
    for leads in [true, false] {
        let mut bench = Bench::with_relays(leads);
        bench.cut(Way::Direct);
        if leads {
            bench.run(20 * SECOND);
        } else {
            bench.path.found(Way::Relay(relay(2)), bench.now);
        }
        let count = bench.moves.len();
        bench.ready = Vec::new();
        bench.carries.clear();
        bench.path.relay_forgot(&relay(2), bench.now);
        bench.run(SECOND);
        assert_eq!(bench.moves.len(), count);
        bench.ready = vec![relay(2)];
        bench.run(SECOND);
        let moved: Vec<(Way, bool)> =
            bench.moves[count..].iter().map(|(_, way, anew)| (*way, *anew)).collect();
        assert_eq!(moved, if leads { vec![(Way::Relay(relay(2)), true)] } else { vec![] });
    }
}

#[test]
fn relays_that_answer_probes_and_carry_nothing_are_the_last_choice() {
    let mut bench = Bench::with_relays(true);
    bench.cut(Way::Direct);
    bench.carries = vec![Way::Relay(relay(1))];
    bench.run(60 * SECOND);
    assert_eq!(bench.path.way(), Way::Relay(relay(1)), "{:?}", bench.moves);
    let count = bench.moves.len();
    bench.run(600 * SECOND);
    assert_eq!(bench.moves.len(), count);
}

#[test]
fn what_is_sent_in_one_direction_only_stays_on_a_direct_way_that_works_again() {
    let mut bench = Bench::with_relays(true);
    bench.cut(Way::Direct);
    bench.run(20 * SECOND);
    bench.answers = false;
    bench.run(5 * SECOND);
    bench.open(Way::Direct);
    for _ in 0..10 {
        bench.run(10 * SECOND);
        bench.facts.rx_bytes += 32;
    }
    assert_eq!(bench.path.way(), Way::Direct);
    assert_eq!(bench.moves.len(), 2, "{:?}", bench.moves);
}

#[test]
fn what_the_other_end_says_takes_a_bounded_place() {
    let mut path = Path::new(false, None, false, Time::ZERO);
    for number in 0..1_000u64 {
        let relay = NodeId::from_bytes([number as u8; 16]);
        path.found(Way::Relay(relay), Time::ZERO + Duration::from_secs(number));
        assert!(path.relays().count() <= KNOWN);
    }
}

#[test]
fn where_nothing_carries_the_tunnel_nobody_is_in_a_hurry() {
    let mut bench = Bench::with_relays(true);
    bench.cut(Way::Direct);
    bench.carries.clear();
    bench.run(600 * SECOND);
    assert!(bench.moves.len() <= 100, "{}", bench.moves.len());
    for pair in bench.moves.windows(2) {
        assert!(pair[1].0.since(pair[0].0) >= SECOND, "{pair:?}");
    }
}
