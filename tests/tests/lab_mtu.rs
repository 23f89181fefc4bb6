//! Paths that swallow long packets, and say nothing.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test fails by panicking, and tells what it measured"
)]

use std::net::{SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use mesh_lab::{Family, Host, Impairment, Lab, Options, Pod, Secret, poll_until};
use mesh_tests::{FAMILIES, logs, options};
use serde_json::Value;

const SECOND: Duration = Duration::from_secs(1);
const MIB: u64 = 1 << 20;

/// What is longer vanishes.
fn swallows(bytes: u16) -> Impairment {
    Impairment { mtu: Some(bytes), ..Impairment::NONE }
}

/// Hosts, the first two of which have a narrow path between them before any daemon runs. Their tunnels take this family.
fn narrow(name: &str, bytes: u16, underlay: Family) -> Lab {
    let args = ["--mtu-raise", "5"].map(str::to_owned).to_vec();
    let lab = Lab::up(Options {
        nodes: 3,
        daemons: false,
        secret: Secret::Key,
        daemon_args: args.clone(),
        ..options(name)
    })
    .unwrap();
    lab.impair(&lab.host(0), &lab.host(1), swallows(bytes)).unwrap();
    let seed = lab.host(0).underlay(underlay).to_string();
    for (at, host) in lab.hosts().iter().enumerate() {
        let join = ["--join", &seed];
        let join = join.iter().filter(|_| at > 0);
        let own = host.underlay(underlay).to_string();
        let all = ["--key-file", "/etc/meshd/key", "--advertise", &own];
        let all = all.iter().chain(join).map(|arg| (*arg).to_owned());
        host.spawn_daemon_with(all.chain(args.clone()).collect()).unwrap();
        host.wait_ready(20 * SECOND).unwrap();
    }
    lab
}

/// What a host knows of the MTU to another one.
fn mtu(host: &Host, peer: &Host) -> Value {
    let status = host.status().unwrap();
    let peers = status["peers"].as_array().cloned().unwrap_or_default();
    peers.into_iter().find(|entry| entry["name"] == peer.name()).unwrap_or_default()["mtu"].clone()
}

/// The MTU of pods' packets, IPv4 and IPv6.
fn inside(host: &Host, peer: &Host) -> (u64, u64) {
    let mtu = mtu(host, peer);
    (mtu["ipv4"].as_u64().unwrap_or_default(), mtu["ipv6"].as_u64().unwrap_or_default())
}

/// A datagram of so many bytes gets from one pod to another, within two seconds.
fn datagram_passes(from: &Pod, to: &Pod, family: Family, bytes: usize) -> bool {
    let target = SocketAddr::new(to.address(family), 7777);
    let receiver = to.net().run(|| UdpSocket::bind(target).unwrap()).unwrap();
    receiver.set_read_timeout(Some(SECOND / 10)).unwrap();
    let sender = from.net().run(|| UdpSocket::bind((from.address(family), 0)).unwrap()).unwrap();
    let mut buffer = [0; 2000];
    (0..20).any(|_| {
        // The first may be refused: the host says that it is too long.
        let _ = from.net().run(|| sender.send_to(&vec![7; bytes], target)).unwrap();
        receiver.recv(&mut buffer).is_ok_and(|length| length == bytes)
    })
}

#[test]
fn through_a_black_hole_tcp_works_from_the_first_second_and_other_pairs_keep_their_mtu() {
    // 60 and 80 bytes around pods' packets, which are padded to 16.
    through("t-hole4", Family::V4, (1232, 1280));
}

#[test]
fn so_it_does_where_the_tunnels_take_ipv6() {
    through("t-hole6", Family::V6, (1216, 1280));
}

/// A path that lets 1,300 bytes through, so that there are `room` for pods' packets of IPv4 and IPv6.
fn through(name: &str, underlay: Family, room: (u64, u64)) {
    let lab = narrow(name, 1300, underlay);
    let hosts = lab.hosts();
    let (first, second, third) = (&hosts[0], &hosts[1], &hosts[2]);
    let pods: Vec<Pod> = hosts.iter().map(|host| host.add_pod("p1").unwrap()).collect();
    let (a, b, c) = (&pods[0], &pods[1], &pods[2]);
    let begun = Instant::now();
    // As soon as there is a way at all: a ping says nothing of long packets.
    mesh_tests::reaches_within(a, b, Family::V4, 20 * SECOND);
    println!("a way after {:?}", begun.elapsed());
    for (from, to) in [(a, b), (b, a)] {
        for family in FAMILIES {
            let sent = from.tcp_send_to(to, family, MIB);
            let sent = sent.unwrap_or_else(|error| panic!("{error:#}\n{}", logs(&lab)));
            println!(
                "{family:?}: 1 MiB from {} to {} in {:?}",
                from.full_name(),
                to.full_name(),
                sent.elapsed
            );
            assert!(sent.elapsed < 3 * SECOND, "{}", logs(&lab));
        }
    }
    for (from, to) in [(a, b), (b, a)] {
        for family in FAMILIES {
            assert!(datagram_passes(from, to, family, 1200), "{family:?}: {}", logs(&lab));
            assert!(datagram_passes(from, to, family, 1400), "{family:?}, in pieces: {}", logs(&lab));
        }
    }
    let found = poll_until("the path is measured", 10 * SECOND, || {
        inside(first, second) == room && inside(second, first) == room
    });
    assert!(found.is_ok(), "{} {}\n{}", mtu(first, second), mtu(second, first), logs(&lab));
    for (one, other) in [(first, third), (third, first), (second, third), (third, second)] {
        assert_eq!(inside(one, other), (1420, 1420), "{}", mtu(one, other));
    }
    for family in FAMILIES {
        assert!(datagram_passes(a, c, family, 1350), "in one piece");
        a.tcp_send_to(c, family, MIB).unwrap();
    }
    let endpoints = || -> Vec<SocketAddr> {
        let status = first.status().unwrap();
        let peers = status["peers"].as_array().unwrap().iter();
        peers.filter_map(|peer| peer["tunnel"]["endpoint"].as_str()?.parse().ok()).collect()
    };
    poll_until("the tunnels were looked at", 5 * SECOND, || endpoints().len() == 2).unwrap();
    let right = |endpoint: &SocketAddr| endpoint.is_ipv4() == (underlay == Family::V4);
    assert!(endpoints().iter().all(right), "{:?}", endpoints());
    println!("{}", first.exec_ok(&["meshctl", "status", "paths"]).unwrap());
    println!("{}", first.exec_ok(&["ip", "route", "show", "proto", "118"]).unwrap());
}

/// The most that one connection moves at a time.
const PART: u64 = 256 << 10;

#[test]
fn a_path_that_becomes_narrow_under_a_transfer_is_noticed_and_so_is_that_it_is_wide_again() {
    let lab = narrow("t-shrinks", 1400, Family::V4);
    let hosts = lab.hosts();
    let (first, second) = (&hosts[0], &hosts[1]);
    let pods: Vec<Pod> = hosts.iter().map(|host| host.add_pod("p1").unwrap()).collect();
    let (a, b) = (&pods[0], &pods[1]);
    for family in FAMILIES {
        mesh_tests::reaches_within(a, b, family, 20 * SECOND);
    }
    let both = |wanted: (u64, u64)| inside(first, second) == wanted && inside(second, first) == wanted;
    let until = |what: &str, wanted: (u64, u64), limit: Duration| {
        let start = Instant::now();
        // Paths are looked at where something is sent.
        let sends = || a.tcp_send_to(b, Family::V4, PART).unwrap();
        let done = poll_until(what, limit, || {
            sends();
            both(wanted)
        });
        assert!(done.is_ok(), "{} {}\n{}", mtu(first, second), mtu(second, first), logs(&lab));
        println!("{what}: after {:?}", start.elapsed());
    };
    until("1400 found", (1328, 1328), 20 * SECOND);
    lab.impair(first, second, Impairment::NONE).unwrap();
    until("wide again", (1420, 1420), 20 * SECOND);

    for family in FAMILIES {
        // A connection that was made while the path was wide.
        let running = std::thread::scope(|scope| {
            let transfer = scope.spawn(|| a.tcp_send_to(b, family, 768 * MIB));
            std::thread::sleep(SECOND / 2);
            assert!(!transfer.is_finished(), "too short for this machine");
            lab.impair(first, second, swallows(1400)).unwrap();
            let start = Instant::now();
            let found = poll_until("1400 found again", 10 * SECOND, || both((1328, 1328)));
            println!("{family:?}: noticed after {:?}", start.elapsed());
            assert!(found.is_ok(), "{}", logs(&lab));
            transfer.join().unwrap()
        });
        let moved = running.unwrap_or_else(|error| panic!("{error:#}\n{}", logs(&lab)));
        println!(
            "{family:?}: {} MiB in {:?}, with a black hole in between",
            moved.bytes / MIB,
            moved.elapsed
        );
        lab.impair(first, second, Impairment::NONE).unwrap();
        until("wide again", (1420, 1420), 20 * SECOND);
    }
}
