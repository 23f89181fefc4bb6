//! Initiations, 100,000 a second, for two seconds; what the honest lanes send meanwhile is the same for every kind.

use super::*;

const RATE: u64 = 100_000;
const SECONDS: u64 = 2;

/// The usual limits, but tables that a flood could fill.
const LIMITS: Limits =
    Limits { lanes: 8, routes: 8_192, routes_per_lane: 4_096, initiations: 500, searches: 50, macs: 200_000 };

/// What became of a flood.
type Fate = BTreeMap<Result<u8, Dropped>, u64>;

/// Sends what `forged` makes of a number, with the address of a lane, while 1 and 2 have a session, 2 begins another one
/// with 1 now and then, and so do 3 and 4 with each other.
fn endures(forged: impl Fn(u32) -> (u8, Vec<u8>)) -> Fate {
    let mut relay = relay(LIMITS, 4);
    let honest = |relay: &mut Relay, from, to, index, now| {
        assert_eq!(send(relay, from, &initiation(to, index), now), Ok(to), "{index}");
        assert_eq!(send(relay, to, &response(from, index + 1, index), now), Ok(from), "{index}");
        assert_eq!(send(relay, from, &data(index + 1), now), Ok(to), "{index}");
        assert_eq!(send(relay, to, &data(index), now), Ok(from), "{index}");
    };
    honest(&mut relay, 1, 2, 1 << 30, Time::ZERO);
    let mut fate = Fate::new();
    for number in 0..RATE * SECONDS {
        let now = Time::from_origin(Duration::from_micros(number * 1_000_000 / RATE));
        let number = u32::try_from(number).unwrap();
        let (from, message) = forged(number);
        *fate.entry(send(&mut relay, from, &message, now)).or_default() += 1;
        if number.is_multiple_of(50) {
            assert_eq!(send(&mut relay, 1, &data((1 << 30) + 1), now), Ok(2));
            assert_eq!(send(&mut relay, 2, &data(1 << 30), now), Ok(1));
        }
        if number.is_multiple_of(10_000) {
            let index = (1 << 31) + number;
            honest(&mut relay, 2, 1, index, now);
            honest(&mut relay, 3, 4, index + 2, now);
            let (lanes, routes) = relay.load();
            assert!(lanes == 4 && routes <= LIMITS.routes / 2, "{routes} indices");
        }
    }
    // And the lane itself, when it is over.
    let over = secs(SECONDS + 1);
    honest(&mut relay, 1, 2, (1 << 30) + 2, over);
    honest(&mut relay, 1, 3, (1 << 30) + 4, over);
    assert_eq!(fate.values().sum::<u64>(), RATE * SECONDS);
    fate
}

/// How many were passed on to a lane.
fn passed(fate: &Fate, to: u8) -> u64 {
    fate.get(&Ok(to)).copied().unwrap_or_default()
}

#[test]
fn initiations_for_a_peer_of_the_lane_whose_address_they_have() {
    let fate = endures(|number| (1, initiation(2, number)));
    let most = u64::from(LIMITS.initiations) * (SECONDS + 1);
    assert!((most / 2..=most).contains(&passed(&fate, 2)), "{fate:?}");
    assert_eq!(fate.len(), 2);
    assert!(fate.contains_key(&Err(Dropped::TooMany)), "{fate:?}");
}

#[test]
fn initiations_for_a_lane_that_is_no_peer_are_searched_for_seldom() {
    let fate = endures(|number| (1, initiation(3, number)));
    let most = u64::from(LIMITS.searches) * (SECONDS + 1);
    assert!((most / 2..=most).contains(&passed(&fate, 3)), "{fate:?}");
    assert_eq!(fate.len(), 2);
    assert!(fate.contains_key(&Err(Dropped::Busy)), "{fate:?}");
}

#[test]
fn initiations_that_are_for_nobody() {
    let fate = endures(|number| {
        let mut message = initiation(2, number);
        message[116] ^= 0x55;
        (1, message)
    });
    let searched = fate[&Err(Dropped::NoSuchLane)];
    assert!(searched <= u64::from(LIMITS.searches) * (SECONDS + 1), "{fate:?}");
    assert_eq!(fate[&Err(Dropped::Busy)], RATE * SECONDS - searched, "{fate:?}");
}

#[test]
fn initiations_from_addresses_that_nobody_has_registered() {
    let fate = endures(|number| (100 + (number % 100) as u8, initiation(1 + (number % 4) as u8, number)));
    assert_eq!(fate, BTreeMap::from([(Err(Dropped::Stranger), RATE * SECONDS)]));
}

#[test]
fn the_same_initiation_again_and_again() {
    let fate = endures(|_| (1, initiation(2, 7)));
    assert_eq!(passed(&fate, 2), 3, "{fate:?}");
    assert_eq!(fate[&Err(Dropped::TooMany)], RATE * SECONDS - 3);
}

#[test]
fn all_kinds_from_all_lanes_at_once() {
    let fate = endures(|number| {
        let (from, to) = [(1, 2), (1, 3), (1, 4), (9, 1)][number as usize % 4];
        (from, initiation(to, number))
    });
    let on = (2..=4).map(|to| passed(&fate, to)).sum::<u64>();
    assert!(on <= u64::from(LIMITS.initiations) * (SECONDS + 1), "{fate:?}");
    assert_eq!(passed(&fate, 1), 0);
}
