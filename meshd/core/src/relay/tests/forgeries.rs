//! Somebody who knows all keys, addresses and indices, and can send with the address of any lane.

use super::*;

#[test]
fn a_registration_counts_once() {
    let mut relay = connected();
    let elsewhere = endpoint(9);
    assert!(relay.register(key(1), endpoint(1), 5, secs(10)).is_ok());
    for serial in [1, 4, 5] {
        let repeated = relay.register(key(1), elsewhere, serial, secs(20));
        assert_eq!(repeated, Err(RegisterError::Outdated), "{serial}");
    }
    assert_eq!(relay.register(key(1), endpoint(1), 5, secs(20)), Err(RegisterError::Outdated));
    assert_eq!(relay.endpoint_of(&key(1), secs(84)), Some(endpoint(1)));
    assert_eq!(relay.endpoint_of(&key(1), secs(85)), None, "a repetition prolongs nothing");
}

#[test]
fn nobody_has_the_peers_of_a_lane_forgotten_that_have_answered_it() {
    let mut relay = relay(Limits { lanes: 64, searches: 40, ..LIMITS }, 40);
    assert_eq!(send(&mut relay, 1, &initiation(2, 10), Time::ZERO), Ok(2));
    assert_eq!(send(&mut relay, 2, &response(1, 20, 10), Time::ZERO), Ok(1));
    let tries = (0u8..100).map(|n| (3 + n % 30, 100 + u32::from(n)));
    let asked = tries.filter(|(to, sender)| send(&mut relay, 1, &initiation(*to, *sender), secs(1)).is_ok());
    assert_eq!(asked.count() as u32, LIMITS.initiations, "more than are remembered");
    while send(&mut relay, 1, &initiation(60, 11), secs(2)) != Err(Dropped::Busy) {}
    assert_eq!(send(&mut relay, 1, &initiation(2, 11), secs(2)), Ok(2), "without a search");
    while send(&mut relay, 2, &initiation(60, 12), secs(2)) != Err(Dropped::Busy) {}
    assert_eq!(send(&mut relay, 2, &initiation(1, 12), secs(2)), Ok(1), "nor does who has answered need one");
}

#[test]
fn one_initiation_has_few_answers_and_they_prolong_nothing() {
    let mut relay = connected();
    let again = |relay: &mut Relay, now| {
        (0..10).filter(|n| send(relay, 2, &response(1, 100 + n, 10), now).is_ok()).count()
    };
    assert_eq!(again(&mut relay, secs(5)), 2);
    let end = Time::ZERO + ANSWERED_FOR;
    for lane in 1..=2 {
        relay.register(key(lane), endpoint(lane), 2, end).unwrap();
    }
    for (from, index) in [(1, 20), (1, 100), (2, 10)] {
        assert_eq!(send(&mut relay, from, &data(index), end), Err(Dropped::NoRoute), "{index}");
    }
    relay.expire(secs(5) + ANSWERED_FOR);
    assert_eq!(relay.load().1, 0);
}

/// Sessions end after 180 s, and what the relay knows of them after 210 s: in between the same indices may be drawn again.
#[test]
fn a_new_handshake_does_not_rest_on_what_is_left_of_an_old_one() {
    let mut relay = connected();
    let late = Time::ZERO + REJECT_AFTER;
    for lane in 1..=3 {
        relay.register(key(lane), endpoint(lane), 2, late).unwrap();
    }
    assert_eq!(send(&mut relay, 1, &initiation(2, 10), late), Err(Dropped::Collision));
    assert_eq!(send(&mut relay, 2, &response(1, 20, 10), late), Err(Dropped::Collision));
    assert_eq!(send(&mut relay, 2, &response(1, 21, 10), late), Err(Dropped::Collision));
    assert_eq!(send(&mut relay, 1, &initiation(2, 11), late), Ok(2), "WireGuard draws another one");
}

/// What arrives at the relay: what honest lanes 1 to 3 send, and what is forged.
#[derive(Clone, Debug)]
enum Arrives {
    /// An initiation of an honest lane.
    Asks {
        from: u8,
        to: u8,
        index: u32,
    },
    /// The answer of an honest lane to one of the initiations that it has got, not always to the latest.
    Answers {
        which: usize,
        index: u32,
    },
    /// Data of a session that both ends believe in, from one or the other.
    Data {
        which: usize,
        end: usize,
    },
    /// Anything, with the address of a lane (4 is the adversary's own) or another one.
    Forged {
        address: u8,
        kind: u8,
        to: u8,
        indices: [usize; 2],
    },
    /// The adversary moves its own lane to and fro.
    Moves {
        place: u8,
    },
    Expires,
    Passes(u64),
}

fn arrives() -> impl Strategy<Value = Arrives> {
    let honest = || 1u8..=3;
    let any = any::<usize>;
    prop_oneof![
        3 => (honest(), honest(), 0u32..4).prop_map(|(from, to, index)| Arrives::Asks { from, to, index }),
        3 => (any(), 0u32..4).prop_map(|(which, index)| Arrives::Answers { which, index }),
        6 => (any(), 0usize..2).prop_map(|(which, end)| Arrives::Data { which, end }),
        12 => (1u8..=9, 1u8..=5, 1u8..=6, [any(), any()])
            .prop_map(|(address, kind, to, indices)| Arrives::Forged { address, kind, to, indices }),
        1 => (4u8..=7).prop_map(|place| Arrives::Moves { place }),
        1 => Just(Arrives::Expires),
        2 => (0u64..40).prop_map(Arrives::Passes),
    ]
}

/// WireGuard takes no data after this time.
const REJECT_AFTER: Duration = Duration::from_secs(180);

/// What the honest lanes know, and what the adversary has seen.
struct World {
    relay: Relay,
    now: Time,
    serial: u64,
    /// The place of the adversary's lane.
    place: u8,
    /// Whether honest lanes draw numbers that nobody foresees; else all are from 0 to 3.
    unforeseen: bool,
    next: u32,
    /// Initiations that have come where they should: from, to, index, when.
    asked: Vec<(u8, u8, u32, Time)>,
    sessions: Vec<Session>,
    seen: Vec<u32>,
}

impl World {
    fn new(unforeseen: bool) -> Self {
        let relay = relay(Limits { initiations: 1_000, searches: 1_000, macs: 100_000, ..LIMITS }, 4);
        let (asked, sessions, seen) = (Vec::new(), Vec::new(), (0..4).collect());
        Self { relay, now: Time::ZERO, serial: 1, place: 4, unforeseen, next: 1_000, asked, sessions, seen }
    }

    /// The index that a lane draws: none that it has in use itself.
    fn drawn(&mut self, by: u8, index: u32) -> Option<u32> {
        if self.unforeseen {
            self.next += 1;
            return Some(self.next);
        }
        let in_use = self.asked.iter().any(|(from, _, used, _)| (*from, *used) == (by, index))
            || self.sessions.iter().any(|session| session.ends.contains(&(by, index)));
        (!in_use).then_some(index)
    }

    fn send(&mut self, from: u8, message: &[u8]) -> Option<u8> {
        send(&mut self.relay, from, message, self.now).ok()
    }

    /// An honest lane sends; what it sends comes to `to`, or to nobody. Whether it does.
    fn comes_to(&mut self, to: u8, from: u8, message: &[u8]) -> Result<bool, TestCaseError> {
        let got = self.send(from, message);
        prop_assert!(got.is_none_or(|got| got == to), "{from} to {to}: came to {got:?}");
        Ok(got.is_some())
    }

    fn step(&mut self, event: Arrives) -> Result<(), TestCaseError> {
        // All lanes say all the time where they are.
        self.serial += 1;
        for lane in 1..=4 {
            let place = if lane == 4 { self.place } else { lane };
            self.relay.register(key(lane), endpoint(place), self.serial, self.now).unwrap();
        }
        let now = self.now;
        self.asked.retain(|(.., at)| now.since(*at) < UNANSWERED_FOR);
        self.sessions.retain(|session| now.since(session.at) < REJECT_AFTER);
        match event {
            Arrives::Asks { from, to, index } => {
                let Some(index) = self.drawn(from, index).filter(|_| from != to) else { return Ok(()) };
                if self.comes_to(to, from, &initiation(to, index))? {
                    self.asked.push((from, to, index, now));
                    self.seen.push(index);
                }
            }
            Arrives::Answers { which, index } => {
                let Some(at) = which.checked_rem(self.asked.len()) else { return Ok(()) };
                let (asker, by, asked, _) = self.asked[at];
                let Some(index) = self.drawn(by, index) else { return Ok(()) };
                self.asked.swap_remove(at);
                if self.comes_to(asker, by, &response(asker, index, asked))? {
                    self.sessions.push(Session { ends: [(asker, asked), (by, index)], at: now });
                    self.seen.push(index);
                }
            }
            Arrives::Data { which, end } => {
                let Some(at) = which.checked_rem(self.sessions.len()) else { return Ok(()) };
                let ends = self.sessions[at].ends;
                let ((from, _), (to, index)) = (ends[end], ends[1 - end]);
                let came = self.comes_to(to, from, &data(index))?;
                prop_assert!(came || !self.unforeseen, "a session that was delivered goes on");
            }
            Arrives::Forged { address, kind, to, indices } => {
                let [sender, receiver] = indices.map(|index| self.seen[index % self.seen.len()]);
                let message = match kind {
                    1 => initiation(to, sender),
                    2 => response(to, sender, receiver),
                    3 => cookie(receiver),
                    4 => data(receiver),
                    _ => marked::<INITIATION_LEN>(1, &[sender], &key(99)),
                };
                let got = self.send(address, &message);
                let registered = (1..=3).contains(&address) || address == self.place;
                prop_assert!(registered || got.is_none(), "a stranger is served");
                prop_assert!(got.is_none_or(|got| got <= 3 || got == self.place), "it goes where nobody is");
                prop_assert!(got != Some(address), "it goes back");
            }
            Arrives::Moves { place } => self.place = place,
            Arrives::Expires => self.relay.expire(now),
            Arrives::Passes(span) => self.now = now + Duration::from_secs(span),
        }
        let (lanes, routes) = self.relay.load();
        prop_assert!(lanes <= 4 && routes <= LIMITS.routes);
        Ok(())
    }

    /// When it is over, everything is as it was.
    fn recovers(&mut self) -> Result<(), TestCaseError> {
        self.now = self.now + ANSWERED_FOR;
        self.step(Arrives::Expires)?;
        prop_assert_eq!(self.relay.load().1, 0);
        for (from, to) in [(1, 2), (2, 3), (3, 1)] {
            prop_assert!(self.comes_to(to, from, &initiation(to, 1))?);
            prop_assert!(self.comes_to(from, to, &response(from, 2, 1))?);
            prop_assert!(self.comes_to(to, from, &data(2))? && self.comes_to(from, to, &data(1))?);
        }
        Ok(())
    }
}

proptest! {
    /// Whatever is forged, and though four indices are all that there are: what an honest lane sends comes to the lane whose
    /// index it bears, or to nobody. When indices cannot be foreseen, every session that came about keeps working.
    #[test]
    fn nothing_forged_leads_what_is_honest_astray(
        unforeseen in any::<bool>(),
        history in prop::collection::vec(arrives(), 1..300),
    ) {
        let mut world = World::new(unforeseen);
        for event in history {
            world.step(event)?;
        }
        world.recovers()?;
    }

    /// However registrations are delayed, swapped and repeated, from wherever: a lane is where the latest of them came from
    /// first, until the time of that has passed; and its session goes with it.
    #[test]
    fn the_latest_registration_counts_and_repetitions_do_not(
        arrivals in prop::collection::vec((1u8..=2, 2u64..12, 0u8..3, 0u64..20), 1..80),
    ) {
        let mut relay = connected();
        let mut now = Time::ZERO;
        let mut truth = BTreeMap::from([(1u8, (1, endpoint(1), Time::ZERO)), (2, (1, endpoint(2), Time::ZERO))]);
        for (lane, serial, place, passes) in arrivals {
            now = now + Duration::from_secs(passes);
            let from = endpoint(10 * lane + place);
            let told = relay.register(key(lane), from, serial, now);
            let known = truth.get_mut(&lane).unwrap();
            prop_assert_eq!(told.is_ok(), serial > known.0);
            if told.is_ok() {
                *known = (serial, from, now);
            }
            let lives = |lane: u8| now.since(truth[&lane].2) < REGISTERED_FOR;
            for lane in 1..=2 {
                let there = lives(lane).then_some(truth[&lane].1);
                prop_assert_eq!(relay.endpoint_of(&key(lane), now), there);
            }
            for (from, to, index) in [(1, 2, 20), (2, 1, 10)] {
                let SocketAddr::V4(address) = truth[&from].1.remote else { unreachable!() };
                let got = send(&mut relay, address.ip().octets()[3], &data(index), now).ok();
                let SocketAddr::V4(peer) = truth[&to].1.remote else { unreachable!() };
                let works = lives(from) && lives(to) && now.since(Time::ZERO) < ANSWERED_FOR;
                prop_assert_eq!(got, works.then_some(peer.ip().octets()[3]));
            }
        }
    }
}
