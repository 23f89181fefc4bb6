//! How long packets to others may be, and what the kernel gets of it.

use super::scenarios::{SECOND, cluster, meshed};
use super::*;
use crate::host::Route;

fn id(sim: &Sim, host: usize) -> NodeId {
    sim.hosts[host].identity.node_id()
}

/// The MTU of the routes at one host to another one's ranges, of IPv4 and IPv6.
fn routes(sim: &Sim, at: usize, to: usize) -> [Option<u32>; 2] {
    let view = sim.node(at).view().unwrap();
    let ranges = crate::node::desired::ranges_of(view, view.record(&id(sim, to)).unwrap());
    let of = |ipv4: bool| {
        let mut found: Vec<Option<u32>> = ranges
            .iter()
            .filter(|range| range.addr().is_ipv4() == ipv4)
            .map(|range| match sim.hosts[at].kernel.routes.get(range) {
                Some(Route::Devices { mtu, .. }) => *mtu,
                other => panic!("{range}: {other:?}"),
            })
            .collect();
        found.dedup();
        let [mtu] = found[..] else { panic!("{found:?}") };
        mtu
    };
    [of(true), of(false)]
}

/// In both directions.
fn narrow(sim: &mut Sim, a: usize, b: usize, most: usize) {
    sim.narrow.extend([((a, b), most), ((b, a), most)]);
}

/// Pods of two hosts exchange something for so long; or, if `vanishes`, send and get nothing.
fn talk(sim: &mut Sim, (a, b): (usize, usize), seconds: u64, vanishes: bool) {
    for _ in 0..seconds {
        for (at, to) in [(a, b), (b, a)] {
            let key = sim.hosts[to].lane.public();
            let mut facts = sim.node(at).tunnels.clone();
            let of = facts.entry(key).or_default();
            of.endpoint = Some(SocketAddr::new(address(to).ip(), 6784));
            of.handshake_age = Some(SECOND);
            of.tx_bytes += 10_000;
            of.rx_bytes += if vanishes { 0 } else { 10_000 };
            sim.input(at, Input::Tunnels(facts));
        }
        sim.run(SECOND);
    }
}

#[test]
fn a_pair_is_measured_before_it_is_used_and_costs_nothing_afterwards() {
    let mut sim = cluster(300, 4);
    meshed(&mut sim, 10 * SECOND);
    sim.run(3 * SECOND);
    for at in 0..4 {
        for to in (0..4).filter(|to| *to != at) {
            assert_eq!(routes(&sim, at, to), [None, None], "host{at} to host{to}");
        }
    }
    let before = sim.measured;
    assert!((12..=16).contains(&before), "{before} probes for 12 directions");
    sim.run(3600 * SECOND);
    assert_eq!(sim.measured, before);
}

#[test]
fn a_black_hole_is_known_from_the_start_and_the_other_pairs_keep_their_mtu() {
    let mut sim = Sim::new(301);
    for _ in 0..3 {
        sim.add(&[0, 1, 2], SimSecret::Key(7));
    }
    narrow(&mut sim, 0, 1, 1300);
    (0..3).for_each(|host| sim.start(host));
    meshed(&mut sim, 10 * SECOND);
    for (at, to) in [(0, 1), (1, 0)] {
        let [ipv4, ipv6] = routes(&sim, at, to);
        assert!(ipv4.is_some_and(|mtu| mtu <= 1232) && ipv6 == Some(1280), "{ipv4:?} {ipv6:?}");
    }
    sim.run(10 * SECOND);
    for (at, to) in [(0, 1), (1, 0)] {
        // In front of the tunnel's packet are 60 bytes; what is in it is padded to 16.
        assert_eq!(routes(&sim, at, to), [Some(1232), Some(1280)]);
        let status = sim.node(at).mtu_status(&id(&sim, to), &BTreeSet::new());
        assert_eq!((status.ipv4, status.ipv6, status.is_largest), (1232, 1280, false));
        assert!(status.underlay.is_some_and(|mtu| (1293..=1300).contains(&mtu)), "{status:?}");
    }
    for (at, to) in [(0, 2), (2, 0), (1, 2), (2, 1)] {
        assert_eq!(routes(&sim, at, to), [None, None]);
    }
    // IPv6's shortest packets do not fit: the kernel cuts up the tunnel's.
    let told = (address(1).ip(), 1300);
    assert_eq!(sim.hosts[0].narrowed, [told]);
    // It forgets.
    talk(&mut sim, (0, 1), 60, false);
    let again = sim.hosts[0].narrowed.len();
    assert!((5..=8).contains(&again) && sim.hosts[0].narrowed.iter().all(|this| *this == told), "{again}");
    assert_eq!(sim.hosts[2].narrowed, []);
    sim.check();
}

#[test]
fn a_path_that_becomes_narrow_and_wide_again_is_followed_while_it_is_used() {
    let mut sim = cluster(302, 3);
    meshed(&mut sim, 10 * SECOND);
    sim.run(3 * SECOND);
    talk(&mut sim, (0, 1), 5, false);
    narrow(&mut sim, 0, 1, 1400);
    talk(&mut sim, (0, 1), 4, true);
    for (at, to) in [(0, 1), (1, 0)] {
        assert_eq!(routes(&sim, at, to), [Some(1328), Some(1328)]);
    }
    assert_eq!(routes(&sim, 0, 2), [None, None]);
    assert_eq!(sim.hosts[0].narrowed, [], "all packets of IPv6 fit as they are");
    sim.narrow.clear();
    talk(&mut sim, (0, 1), 640, false);
    for (at, to) in [(0, 1), (1, 0)] {
        assert_eq!(routes(&sim, at, to), [None, None]);
    }
    // A way that is used costs a probe of each end in ten seconds.
    let before = sim.measured;
    talk(&mut sim, (0, 1), 100, false);
    assert!((18..=22).contains(&(sim.measured - before)), "{}", sim.measured - before);
}

#[test]
fn the_end_that_only_answers_looks_as_well_when_the_other_one_does() {
    let mut sim = cluster(307, 2);
    meshed(&mut sim, 10 * SECOND);
    talk(&mut sim, (0, 1), 3, false);
    narrow(&mut sim, 0, 1, 1400);
    let key = sim.hosts[1].lane.public();
    for _ in 0..4 {
        let mut facts = sim.node(0).tunnels.clone();
        facts.entry(key).or_default().tx_bytes += 10_000;
        sim.input(0, Input::Tunnels(facts));
        sim.run(SECOND);
    }
    for (at, to) in [(0, 1), (1, 0)] {
        assert_eq!(routes(&sim, at, to), [Some(1328), Some(1328)]);
    }
}

#[test]
fn a_daemon_that_starts_anew_goes_on_with_what_the_kernel_has() {
    let mut sim = cluster(303, 3);
    meshed(&mut sim, 10 * SECOND);
    narrow(&mut sim, 0, 1, 1300);
    talk(&mut sim, (0, 1), 8, true);
    let found = [Some(1232), Some(1280)];
    assert_eq!((routes(&sim, 0, 1), routes(&sim, 0, 2)), (found, [None, None]));
    // Until nothing is used any more.
    sim.run(30 * SECOND);
    let before = sim.measured;
    sim.kill(0);
    sim.start(0);
    for _ in 0..50 {
        sim.run(SECOND / 5);
        assert_eq!((routes(&sim, 0, 1), routes(&sim, 0, 2)), (found, [None, None]));
    }
    assert_eq!(sim.measured, before, "nothing is sent");
    sim.narrow.clear();
    narrow(&mut sim, 0, 1, 1400);
    talk(&mut sim, (0, 1), 20, false);
    assert_eq!(routes(&sim, 0, 1), found, "that passes, and is enough for now");
    talk(&mut sim, (0, 1), 600, false);
    assert_eq!(routes(&sim, 0, 1), [Some(1328), Some(1328)]);
}

#[test]
fn what_goes_through_a_relay_is_no_longer_than_what_passes_everywhere() {
    let mut sim = cluster(306, 3);
    meshed(&mut sim, 10 * SECOND);
    sim.run(3 * SECOND);
    sim.cut.insert((0, 1));
    talk(&mut sim, (0, 1), 30, true);
    assert!(sim.node(0).paths.relay_to(&id(&sim, 1)).is_some());
    let before = sim.measured;
    assert_eq!((routes(&sim, 0, 1), routes(&sim, 0, 2)), ([Some(1216), Some(1280)], [None, None]));
    talk(&mut sim, (0, 1), 30, true);
    assert_eq!(sim.measured, before);
    assert_eq!(sim.node(0).mtu_status(&id(&sim, 1), &BTreeSet::new()).underlay, None);
}

#[test]
fn a_member_that_says_nothing_to_probes_gets_packets_that_pass_everywhere() {
    let mut sim = cluster(304, 2);
    narrow(&mut sim, 0, 1, 0);
    meshed(&mut sim, 10 * SECOND);
    sim.run(60 * SECOND);
    assert_eq!(routes(&sim, 0, 1), [Some(1216), Some(1280)]);
    let before = sim.measured;
    talk(&mut sim, (0, 1), 600, false);
    assert_eq!(routes(&sim, 0, 1), [Some(1216), Some(1280)]);
    assert!(sim.measured - before < 600, "{}", sim.measured - before);
    // It learns to.
    sim.narrow.clear();
    talk(&mut sim, (0, 1), 70, false);
    assert_eq!(routes(&sim, 0, 1), [None, None]);
}

#[test]
fn the_probes_of_all_tunnels_together_have_a_limit() {
    let mut sim = cluster(305, 30);
    let mut most = 0;
    for _ in 0..100 {
        let before = sim.measured;
        sim.run(SECOND);
        most = most.max(sim.measured - before);
    }
    assert!(sim.measured >= 30 * 29);
    assert!(most <= 30 * 100, "{most} in a second");
}
