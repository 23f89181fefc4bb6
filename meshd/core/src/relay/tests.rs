//! The relay by itself, with messages that look like WireGuard's to it.

mod floods;
mod forgeries;

use proptest::prelude::*;

use super::routes::{ANSWERED_FOR, UNANSWERED_FOR};
use super::*;

const LIMITS: Limits =
    Limits { lanes: 8, routes: 64, routes_per_lane: 24, initiations: 20, searches: 5, macs: 1_000 };

fn key(lane: u8) -> WgPublic {
    WgPublic::from_bytes([lane; 32])
}

fn address(lane: u8) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, lane], 6784))
}

fn endpoint(lane: u8) -> Endpoint {
    Endpoint { remote: address(lane), local: None }
}

fn secs(secs: u64) -> Time {
    Time::from_origin(Duration::from_secs(secs))
}

fn marked<const LEN: usize>(kind: u8, words: &[u32], to: &WgPublic) -> Vec<u8> {
    let mut message = vec![0; LEN];
    message[0] = kind;
    for (at, word) in words.iter().enumerate() {
        message[4 + 4 * at..8 + 4 * at].copy_from_slice(&word.to_le_bytes());
    }
    Mac1Key::of(to).mark(&mut message);
    message
}

/// An initiation for lane `to`.
fn initiation(to: u8, sender: u32) -> Vec<u8> {
    marked::<INITIATION_LEN>(1, &[sender], &key(to))
}

/// A response for lane `to`.
fn response(to: u8, sender: u32, receiver: u32) -> Vec<u8> {
    marked::<RESPONSE_LEN>(2, &[sender, receiver], &key(to))
}

fn with_index(kind: u8, length: usize, receiver: u32) -> Vec<u8> {
    let mut message = vec![0; length];
    message[0] = kind;
    message[4..8].copy_from_slice(&receiver.to_le_bytes());
    message
}

fn cookie(receiver: u32) -> Vec<u8> {
    with_index(3, COOKIE_LEN, receiver)
}

fn data(receiver: u32) -> Vec<u8> {
    with_index(4, 100, receiver)
}

/// A relay with lanes 1 to `count` registered.
fn relay(limits: Limits, count: u8) -> Relay {
    let mut relay = Relay::new(limits, Time::ZERO);
    (1..=count).for_each(|lane| {
        relay.register(key(lane), endpoint(lane), 1, Time::ZERO).unwrap();
    });
    relay
}

/// What becomes of a datagram from the address of a lane: the lane whose address it goes to.
fn send(relay: &mut Relay, from: u8, message: &[u8], now: Time) -> Result<u8, Dropped> {
    let from = relay.source(&address(from)).ok_or(Dropped::Stranger)?;
    let SocketAddr::V4(to) = relay.route(from, message, now)?.remote else {
        panic!("all lanes are at IPv4 addresses")
    };
    Ok(to.ip().octets()[3])
}

/// Lanes 1 and 2 have a session: 1 calls it 10, 2 calls it 20.
fn connected() -> Relay {
    let mut relay = relay(LIMITS, 4);
    assert_eq!(send(&mut relay, 1, &initiation(2, 10), Time::ZERO), Ok(2));
    assert_eq!(send(&mut relay, 2, &response(1, 20, 10), Time::ZERO), Ok(1));
    relay
}

#[test]
fn a_handshake_finds_its_way_and_data_follows_it() {
    let mut relay = relay(LIMITS, 4);
    let mut send = |from, message: &[u8]| send(&mut relay, from, message, Time::ZERO);
    assert_eq!(send(1, &initiation(2, 10)), Ok(2));
    assert_eq!(send(2, &data(10)), Err(Dropped::NoRoute), "not before the handshake is answered");
    assert_eq!(send(2, &cookie(10)), Ok(1), "a cookie is an answer too, but not one that lets data flow");
    assert_eq!(send(2, &data(10)), Err(Dropped::NoRoute));
    assert_eq!(send(3, &response(1, 30, 10)), Err(Dropped::NoRoute), "another lane was not asked");
    assert_eq!(send(2, &response(3, 20, 10)), Err(Dropped::Mismatch), "for another than who has asked");
    assert_eq!(send(2, &response(1, 20, 10)), Ok(1));
    assert_eq!((send(1, &data(20)), send(2, &data(10))), (Ok(2), Ok(1)));
    assert_eq!(send(1, &response(2, 11, 20)), Err(Dropped::NoRoute), "a response is no question");
    assert_eq!(send(3, &data(20)), Err(Dropped::NoRoute), "an index means nothing from another lane");
    assert_eq!(send(1, &data(10)), Err(Dropped::NoRoute), "nor from the lane whose own it is");
}

#[test]
fn strangers_and_what_is_not_of_wireguard_go_nowhere() {
    let mut relay = connected();
    let mut send = |from, message: &[u8]| send(&mut relay, from, message, Time::ZERO);
    assert_eq!(send(9, &initiation(2, 1)), Err(Dropped::Stranger));
    assert_eq!(send(9, &data(20)), Err(Dropped::Stranger));
    assert_eq!(send(1, &initiation(9, 1)), Err(Dropped::NoSuchLane), "whose key nobody has registered");
    assert_eq!(send(1, &initiation(1, 1)), Err(Dropped::NoSuchLane), "to itself");
    for length in [0, 1, 3, 4, 31, 147, 149] {
        let message = vec![1; length];
        assert_eq!(send(1, &message), Err(Dropped::Malformed), "{length} bytes");
    }
    assert_eq!(send(1, &data(20)[..31]), Err(Dropped::Malformed));
    assert_eq!(send(1, &data(20)[..32]), Ok(2), "a keepalive");
    let mut reserved = data(20);
    reserved[1] = 1;
    assert_eq!(send(1, &reserved), Err(Dropped::Malformed));
    let mut unmarked = initiation(2, 1);
    unmarked[120] ^= 1;
    assert_eq!(send(1, &unmarked), Err(Dropped::NoSuchLane));
}

#[test]
fn wireguard_is_told_from_gossip_by_its_first_bytes() {
    assert!([1, 2, 3, 4].iter().all(|kind| is_wireguard(&[*kind, 0, 0, 0])));
    assert!(!is_wireguard(&[0x31, 0, 0, 0]) && !is_wireguard(&[1, 0, 0]) && !is_wireguard(&[4, 0, 1, 0]));
}

#[test]
fn an_index_never_has_two_meanings() {
    let mut relay = connected();
    let mut send = |from, message: &[u8]| send(&mut relay, from, message, Time::ZERO);
    // Another initiator has drawn the same index.
    assert_eq!(send(3, &initiation(2, 10)), Err(Dropped::Collision));
    assert_eq!(send(3, &initiation(2, 11)), Ok(2));
    // Another responder has drawn the index that the initiator has as the first one's.
    assert_eq!(send(1, &initiation(4, 12)), Ok(4));
    assert_eq!(send(4, &response(1, 20, 12)), Err(Dropped::Collision));
    assert_eq!(send(1, &data(20)), Ok(2));
    assert_eq!(send(4, &response(1, 21, 12)), Ok(1));
    assert_eq!((send(1, &data(21)), send(1, &data(20)), send(2, &data(10))), (Ok(4), Ok(2), Ok(1)));
}

#[test]
fn a_lane_takes_its_sessions_along_to_another_address() {
    let mut relay = connected();
    let remote = SocketAddr::from(([198, 51, 100, 7], 40_000));
    let moved = Endpoint { remote, local: Some([203, 0, 113, 1].into()) };
    let now = secs(20);
    let id = relay.register(key(1), moved, 3, now).unwrap();
    assert_eq!(relay.source(&address(1)), None);
    assert_eq!(relay.source(&remote), Some(id));
    assert_eq!(relay.route(id, &data(20), now), Ok(endpoint(2)));
    let peer = relay.source(&address(2)).unwrap();
    assert_eq!(relay.route(peer, &data(10), now), Ok(moved));
    // What was on its way meanwhile.
    assert_eq!(relay.register(key(1), endpoint(1), 2, now), Err(RegisterError::Outdated));
    assert_eq!(relay.route(peer, &data(10), now), Ok(moved));
}

#[test]
fn of_two_lanes_at_one_address_the_later_one_is_there() {
    let mut relay = connected();
    let id = relay.register(key(3), endpoint(1), 5, Time::ZERO).unwrap();
    assert_eq!((relay.source(&address(1)), relay.source(&address(3))), (Some(id), None));
    assert_eq!(
        send(&mut relay, 1, &data(20), Time::ZERO),
        Err(Dropped::NoRoute),
        "the session was another lane's"
    );
    assert_eq!(send(&mut relay, 2, &data(10), Time::ZERO), Err(Dropped::NoRoute));
    assert_eq!(relay.load().0, 3);
}

#[test]
fn what_is_not_renewed_comes_to_an_end() {
    let mut relay = relay(LIMITS, 2);
    let mut serial = 1;
    let mut keep = |relay: &mut Relay, now| {
        serial += 1;
        (1..=2).for_each(|lane| {
            relay.register(key(lane), endpoint(lane), serial, now).unwrap();
        });
    };
    assert_eq!(send(&mut relay, 1, &initiation(2, 10), Time::ZERO), Ok(2));
    let late = Time::ZERO + UNANSWERED_FOR;
    assert_eq!(send(&mut relay, 2, &response(1, 20, 10), late), Err(Dropped::NoRoute));
    assert_eq!(send(&mut relay, 1, &initiation(2, 11), late), Ok(2));
    assert_eq!(send(&mut relay, 2, &response(1, 20, 11), late), Ok(1));
    let end = late + ANSWERED_FOR;
    let mut now = late;
    while now < end {
        assert_eq!(
            (send(&mut relay, 1, &data(20), now), send(&mut relay, 2, &data(11), now)),
            (Ok(2), Ok(1))
        );
        now = now + Duration::from_secs(30);
        keep(&mut relay, now);
    }
    assert_eq!(send(&mut relay, 1, &data(20), end), Err(Dropped::NoRoute));
    relay.expire(end);
    assert_eq!(relay.load(), (2, 0));
    // A lane that does not say that it is there.
    let gone = now + REGISTERED_FOR;
    assert_eq!(send(&mut relay, 1, &initiation(2, 12), gone), Err(Dropped::Stranger));
    relay.register(key(1), endpoint(1), 1_000, gone).unwrap();
    assert_eq!(send(&mut relay, 1, &initiation(2, 12), gone), Err(Dropped::NoRoute));
    relay.expire(gone);
    assert_eq!(relay.load().0, 1);
}

#[test]
fn only_keys_of_members_are_served() {
    let mut relay = connected();
    relay.retain(|lane| *lane != key(2));
    assert_eq!(send(&mut relay, 2, &data(10), Time::ZERO), Err(Dropped::Stranger));
    assert_eq!(send(&mut relay, 1, &data(20), Time::ZERO), Err(Dropped::NoRoute));
    assert_eq!(relay.load().0, 3);
}

#[test]
fn who_sends_garbage_from_the_address_of_a_lane_does_not_keep_it_from_its_peers() {
    let mut relay = connected();
    let mut dropped = BTreeMap::<Dropped, u32>::new();
    for nonsense in 0..10_000u32 {
        let mut message = initiation(2, nonsense);
        message[116] ^= 0x55;
        let error = send(&mut relay, 1, &message, Time::ZERO).unwrap_err();
        *dropped.entry(error).or_default() += 1;
    }
    assert_eq!(dropped, BTreeMap::from([(Dropped::NoSuchLane, 4), (Dropped::Busy, 9_996)]), "few searches");
    assert_eq!(send(&mut relay, 1, &initiation(2, 77), Time::ZERO), Ok(2), "found without a search");
    assert_eq!(send(&mut relay, 1, &initiation(3, 78), Time::ZERO), Err(Dropped::Busy));
    assert_eq!(
        send(&mut relay, 3, &initiation(4, 79), Time::ZERO),
        Ok(4),
        "others have searches of their own"
    );
    assert_eq!(send(&mut relay, 1, &initiation(3, 78), secs(1)), Ok(3));
}

#[test]
fn a_search_that_is_too_long_for_now_gets_its_turn_though_others_are_asked_for_all_the_time() {
    let mut relay = relay(Limits { macs: 10, ..LIMITS }, 8);
    let millis = |millis| Time::from_origin(Duration::from_millis(millis));
    assert_eq!(send(&mut relay, 1, &initiation(2, 1), Time::ZERO), Ok(2));
    let tries: Vec<_> = (1..=8)
        .map(|number| send(&mut relay, 3, &initiation(4, number), millis(100 * u64::from(number))))
        .collect();
    let first = tries.iter().position(|tried| *tried == Ok(4));
    assert_eq!(first, Some(5), "2 were left, and 6 more came in 600 ms: {tries:?}");
}

#[test]
fn what_is_repeated_is_passed_on_a_few_times_and_changes_nothing() {
    let mut relay = connected();
    let load = relay.load();
    let repeated: Vec<_> = (0..5).map(|_| send(&mut relay, 1, &initiation(2, 10), secs(1)).is_ok()).collect();
    assert_eq!(repeated, [true, true, false, false, false]);
    let repeated: Vec<_> =
        (0..5).map(|_| send(&mut relay, 2, &response(1, 20, 10), secs(1)).is_ok()).collect();
    assert_eq!(repeated, [true, true, false, false, false]);
    assert_eq!(relay.load(), load);
    let end = Time::ZERO + ANSWERED_FOR;
    relay.register(key(1), endpoint(1), 2, end).unwrap();
    relay.register(key(2), endpoint(2), 2, end).unwrap();
    assert_eq!(
        send(&mut relay, 1, &data(20), end),
        Err(Dropped::NoRoute),
        "a session is not kept alive by that"
    );
}

#[test]
fn a_lane_fills_no_more_than_its_part_of_the_table() {
    let mut relay = relay(Limits { searches: 1_000, macs: 100_000, ..LIMITS }, 4);
    let mut passed = 0;
    for (second, count) in [(1, 20), (2, 20), (3, 20)] {
        for number in 0..count {
            passed += u32::from(
                send(&mut relay, 1, &initiation(2, second * 100 + number), secs(second.into())).is_ok(),
            );
        }
    }
    assert_eq!(passed, LIMITS.routes_per_lane);
    assert_eq!(send(&mut relay, 3, &initiation(2, 1), secs(3)), Ok(2));
    assert_eq!(send(&mut relay, 2, &response(3, 9, 1), secs(3)), Ok(3));
    // And no faster than it may.
    let burst = (0..100).filter(|n| send(&mut relay, 4, &initiation(2, 1_000 + n), secs(4)).is_ok()).count();
    assert_eq!(burst as u32, LIMITS.initiations);
    // Lanes have a bound too.
    (5..=8).for_each(|lane| assert!(relay.register(key(lane), endpoint(lane), 1, secs(4)).is_ok()));
    assert_eq!(relay.register(key(9), endpoint(9), 1, secs(4)), Err(RegisterError::Full));
    let later = secs(4) + REGISTERED_FOR;
    assert!(relay.register(key(9), endpoint(9), 1, later).is_ok());
}

/// Something that happens to a relay with lanes 1 to 4. Few indices, so that they collide.
#[derive(Clone, Debug)]
enum Happens {
    Initiation { from: u8, to: u8, sender: u32 },
    Response { from: u8, to: u8, sender: u32, receiver: u32 },
    Data { from: u8, receiver: u32 },
    Moves { lane: u8, place: u8 },
    Expires,
    Passes(u64),
}

fn happens() -> impl Strategy<Value = Happens> {
    let (lane, index) = (|| 1u8..=4, || 0u32..4);
    prop_oneof![
        6 => (lane(), lane(), index()).prop_map(|(from, to, sender)| Happens::Initiation { from, to, sender }),
        6 => (lane(), lane(), index(), index())
            .prop_map(|(from, to, sender, receiver)| Happens::Response { from, to, sender, receiver }),
        8 => (lane(), index()).prop_map(|(from, receiver)| Happens::Data { from, receiver }),
        1 => (lane(), 1u8..=8).prop_map(|(lane, place)| Happens::Moves { lane, place }),
        1 => Just(Happens::Expires),
        2 => (0u64..70).prop_map(Happens::Passes),
    ]
}

/// A handshake whose two messages were delivered.
#[derive(Clone, Debug)]
struct Session {
    ends: [(u8, u32); 2],
    at: Time,
}

proptest! {
    /// Whatever happens: data goes only to the one lane that, in a handshake which was delivered both ways, has named that
    /// index to the sender; and it does go there.
    #[test]
    fn data_goes_to_whom_the_sender_has_a_session_with(history in prop::collection::vec(happens(), 1..200)) {
        let mut relay = relay(Limits { initiations: 1_000, searches: 1_000, ..LIMITS }, 4);
        let (mut now, mut serial) = (Time::ZERO, 1);
        let mut places: BTreeMap<u8, u8> = (1..=4).map(|lane| (lane, lane)).collect();
        let mut asked: Vec<(u8, u8, u32, Time)> = Vec::new();
        let mut sessions: Vec<Session> = Vec::new();
        let lane_at = |places: &BTreeMap<u8, u8>, place: u8| {
            places.iter().find(|(_, at)| **at == place).map(|(lane, _)| *lane)
        };
        for event in history {
            // All lanes that have a place say so all the time.
            serial += 1;
            for (lane, place) in &places {
                relay.register(key(*lane), endpoint(*place), serial, now).unwrap();
            }
            let mut from_lane = |from: u8, message: &[u8]| {
                let place = *places.get(&from)?;
                let to = send(&mut relay, place, message, now).ok()?;
                Some(lane_at(&places, to).expect("nothing goes where nobody is"))
            };
            match event {
                Happens::Initiation { from, to, sender } => {
                    if let Some(got) = from_lane(from, &initiation(to, sender)) {
                        prop_assert!(got == to && got != from);
                        asked.push((from, to, sender, now));
                    }
                }
                Happens::Response { from, to, sender, receiver } => {
                    if let Some(got) = from_lane(from, &response(to, sender, receiver)) {
                        prop_assert_eq!(got, to);
                        let was_asked = asked.iter().any(|(by, of, index, _)| (*by, *of, *index) == (to, from, receiver));
                        prop_assert!(was_asked, "an answer to nothing");
                        // What is repeated begins nothing anew.
                        let ends = [(from, sender), (to, receiver)];
                        let lives = |session: &Session| session.ends == ends && now.since(session.at) < ANSWERED_FOR;
                        if !sessions.iter().any(lives) {
                            // Another answer to the same initiation lives no longer than the first.
                            let first = sessions.iter().find(|session| {
                                (session.ends[0].0, session.ends[1]) == (from, (to, receiver))
                                    && now.since(session.at) < ANSWERED_FOR
                            });
                            let at = first.map_or(now, |first| first.at);
                            sessions.push(Session { ends, at });
                        }
                    }
                }
                Happens::Data { from, receiver } => {
                    let got = from_lane(from, &data(receiver));
                    let live = sessions.iter().filter(|session| now.since(session.at) < ANSWERED_FOR);
                    let mut peers: Vec<u8> = live
                        .filter_map(|session| {
                            let [a, b] = session.ends;
                            if a.0 == from && b.1 == receiver {
                                Some(b.0)
                            } else {
                                (b.0 == from && a.1 == receiver).then_some(a.0)
                            }
                        })
                        .collect();
                    peers.sort_unstable();
                    peers.dedup();
                    prop_assert!(peers.len() <= 1, "an index with two meanings: {peers:?}");
                    prop_assert_eq!(got, peers.first().copied());
                }
                Happens::Moves { lane, place } => {
                    // Who was there is nowhere from now on, and what it had is over; it comes back at its own place.
                    if let Some(other) = lane_at(&places, place).filter(|other| *other != lane) {
                        places.remove(&other);
                        sessions.retain(|session| session.ends.iter().all(|end| end.0 != other));
                        asked.retain(|(by, of, ..)| *by != other && *of != other);
                    }
                    places.insert(lane, place);
                }
                Happens::Expires => relay.expire(now),
                Happens::Passes(span) => now = now + Duration::from_secs(span),
            }
        }
    }
}
