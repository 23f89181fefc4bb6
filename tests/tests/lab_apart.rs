//! Hosts between which nothing gets through, or in one direction only.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test fails by panicking, and tells what it measured"
)]

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use mesh_lab::{Family, Host, Lab, Options, PingOptions, PingStats, Scanner, Secret, Where, poll_until};
use mesh_tests::{FAMILIES, logs, options, reaches_within};

const SECOND: Duration = Duration::from_secs(1);

fn id(host: &Host) -> String {
    host.status().unwrap()["node"]["id"].as_str().unwrap().to_owned()
}

/// Whether a host has agreed on a key with another one, and the kernel has it.
fn has_key(host: &Host, peer: &str) -> bool {
    let Ok(output) = host.exec(&["meshctl", "status", "-o", "json"]) else { return false };
    let status: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    let peers = status["peers"].as_array().cloned().unwrap_or_default();
    peers.iter().any(|entry| entry["id"] == *peer && entry["tunnel"]["ready"] == true)
}

#[test]
fn two_hosts_without_a_way_to_each_other_agree_on_a_key_through_a_third() {
    let lab =
        Lab::up(Options { nodes: 3, daemons: false, secret: Secret::Key, ..options("t-apart") }).unwrap();
    let (first, second, third) = (lab.host(0), lab.host(1), lab.host(2));
    lab.cut(&first, &second).unwrap();
    let key = ["--key-file", "/etc/meshd/key"];
    third.spawn_daemon_with(key.map(str::to_owned).to_vec()).unwrap();
    third.wait_ready(20 * SECOND).unwrap();
    let join = ["--join", &third.underlay(Family::V4).to_string()];
    let start = Instant::now();
    for host in [&first, &second] {
        host.spawn_daemon_with([&key[..], &join].concat().into_iter().map(str::to_owned).collect()).unwrap();
    }
    [&first, &second].iter().for_each(|host| host.wait_ready(20 * SECOND).unwrap());
    let (first_id, second_id) = (id(&first), id(&second));
    let agreed = poll_until("they have a key", 30 * SECOND, || {
        has_key(&first, &second_id) && has_key(&second, &first_id)
    });
    assert!(agreed.is_ok(), "{}", logs(&lab));
    println!("a key {:?} after the start", start.elapsed());
    let carrier = format!("through member {}", &id(&third)[..8]);
    for host in [&first, &second] {
        assert!(host.log().unwrap().contains(&carrier), "{}", logs(&lab));
    }
}

/// From now on a host takes no connections and datagrams that it has not asked for.
fn take_no_calls(host: &Host) {
    let rules = "table inet t-closed { chain input { type filter hook input priority -300; \
        meta l4proto { tcp, udp } ct state new iifname != lo drop; }; }";
    host.exec_ok(&["nft", rules]).unwrap();
}

#[test]
fn a_host_that_gets_through_to_nobody_joins_when_a_member_calls_it() {
    let lab =
        Lab::up(Options { nodes: 2, daemons: false, secret: Secret::Key, ..options("t-called") }).unwrap();
    let (member, late) = (lab.host(0), lab.host(1));
    let address = |host: &Host| host.underlay(Family::V4).to_string();
    let args = |join: Option<String>| {
        let join = join.into_iter().flat_map(|address| ["--join".to_owned(), address]);
        ["--key-file", "/etc/meshd/key"].map(str::to_owned).into_iter().chain(join).collect()
    };
    member.spawn_daemon_with(args(None)).unwrap();
    member.wait_ready(20 * SECOND).unwrap();
    take_no_calls(&member);
    late.spawn_daemon_with(args(Some(address(&member)))).unwrap();
    std::thread::sleep(5 * SECOND);
    assert!(late.wait_ready(SECOND).is_err(), "nothing gets through");

    member.stop_daemon().unwrap();
    let start = Instant::now();
    member.spawn_daemon_with(args(Some(address(&late)))).unwrap();
    let ready = late.wait_ready(20 * SECOND);
    assert!(ready.is_ok(), "{ready:?}\n{}", logs(&lab));
    println!("joined {:?} after the member knew where", start.elapsed());
    let (member_id, late_id) = (id(&member), id(&late));
    let agreed = poll_until("they have a key", 20 * SECOND, || {
        has_key(&member, &late_id) && has_key(&late, &member_id)
    });
    assert!(agreed.is_ok(), "{}", logs(&lab));
}

/// Three hosts with a pod each, the first two of which have no way to each other from the start.
fn apart(name: &str, nodes: usize) -> Lab {
    let lab =
        Lab::up(Options { nodes, pods: 0, daemons: false, secret: Secret::Key, ..options(name) }).unwrap();
    lab.cut(&lab.host(0), &lab.host(1)).unwrap();
    let hosts = lab.hosts();
    let public: Vec<String> = hosts[2..].iter().map(|host| host.underlay(Family::V4).to_string()).collect();
    for (at, host) in hosts.iter().enumerate().rev() {
        let join = public.iter().filter(|_| at + 1 < hosts.len()).flat_map(|address| ["--join", address]);
        let args = ["--key-file", "/etc/meshd/key"].into_iter().chain(join);
        host.spawn_daemon_with(args.map(str::to_owned).collect()).unwrap();
        if at + 1 == hosts.len() {
            host.wait_ready(20 * SECOND).unwrap();
        }
    }
    for host in &hosts {
        host.wait_ready(20 * SECOND).unwrap();
        host.add_pod("p1").unwrap();
    }
    lab
}

#[test]
fn pods_on_hosts_without_a_way_to_each_other_talk_through_a_third_host() {
    let lab = apart("t-relay", 3);
    let (a, b) = (lab.host(0).pod(0).unwrap(), lab.host(1).pod(0).unwrap());
    let start = Instant::now();
    for family in FAMILIES {
        reaches_within(&a, &b, family, 20 * SECOND);
    }
    println!("through a relay after {:?}", start.elapsed());
    // The relay's own device is where its datagrams come and go.
    let scanner = Scanner::new(Some(lab.cluster_ranges().unwrap()));
    let capture = lab.capture(&Where::Underlay, move |frame: &_| scanner.inspect(frame)).unwrap();
    for family in FAMILIES {
        b.tcp_send_to(&a, family, 4 << 20).unwrap();
    }
    let (seen, _) = capture.stop().unwrap();
    assert!(seen.frames > 1000 && seen.dropped == 0, "{seen:?}");
    assert_eq!(seen.found, 0, "{seen:?}");
    let relay = lab.host(2);
    let metrics = metrics(&relay);
    let passed = metrics.lines().find_map(|line| line.strip_prefix("mesh_relay_passed_bytes_total "));
    assert!(passed.unwrap().parse::<u64>().unwrap() > 8 << 20, "{metrics}");
    assert!(metrics.contains("mesh_relay_lanes 2"), "{metrics}");
    let ways = lab.host(0).exec_ok(&["meshctl", "status", "paths"]).unwrap();
    assert!(ways.contains(&format!("through {}", relay.name())), "{ways}");
    println!("{ways}");

    // Its daemon is killed, and comes back: it has forgotten what it relayed.
    let running = a.start_ping(b.address(Family::V4), DENSE).unwrap();
    std::thread::sleep(2 * SECOND);
    relay.kill9_daemon().unwrap();
    relay.restart_daemon().unwrap();
    relay.wait_ready(20 * SECOND).unwrap();
    std::thread::sleep(8 * SECOND);
    let stats = running.stop().unwrap();
    println!("the only relay starts anew: {:?} without an answer", gap(&stats));
    assert!(gap(&stats) < 7 * SECOND, "{}", logs(&lab));
}

/// What a daemon tells monitoring.
fn metrics(host: &Host) -> String {
    let read = || {
        let mut stream = TcpStream::connect(("127.0.0.1", 6782))?;
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).map(|_| answer)
    };
    host.net().run(read).unwrap().unwrap()
}

/// A ping every 10 ms for as long as wanted.
const DENSE: PingOptions =
    PingOptions { count: u32::MAX, interval: Duration::from_millis(10), linger: SECOND, payload: 64 };

/// How long nothing came back.
fn gap(stats: &PingStats) -> Duration {
    DENSE.interval * stats.longest_gap
}

/// The way that a host's tunnel to another one takes.
fn way(host: &Host, peer: &str) -> String {
    let status = host.status().unwrap();
    let peers = status["peers"].as_array().cloned().unwrap_or_default();
    let entry = peers.into_iter().find(|entry| entry["id"] == *peer).unwrap_or_default();
    entry["path"]["relay"].as_str().unwrap_or("direct").to_owned()
}

#[test]
fn when_the_direct_path_is_cut_a_relay_takes_over_and_afterwards_nothing_is_lost() {
    let lab = mesh_tests::up(Options { nodes: 4, pods: 1, ..options("t-failover") });
    let hosts = lab.hosts();
    let ids: Vec<String> = hosts.iter().map(id).collect();
    let (first, second) = (&hosts[0], &hosts[1]);
    let (a, b) = (first.pod(0).unwrap(), second.pod(0).unwrap());
    for family in FAMILIES {
        let running = a.start_ping(b.address(family), DENSE).unwrap();
        std::thread::sleep(3 * SECOND);
        lab.cut(first, second).unwrap();
        std::thread::sleep(6 * SECOND);
        let stats = running.stop().unwrap();
        println!("{family:?}: cut, {stats:?} without an answer", stats = gap(&stats));
        assert!(gap(&stats) < 6 * SECOND, "{}", logs(&lab));
        let relay = way(first, &ids[1]);
        let number = ids.iter().position(|id| *id == relay).expect("a relay");

        // The relay's daemon dies.
        let running = a.start_ping(b.address(family), DENSE).unwrap();
        std::thread::sleep(3 * SECOND);
        hosts[number].kill9_daemon().unwrap();
        std::thread::sleep(6 * SECOND);
        let stats = running.stop().unwrap();
        println!("{family:?}: relay killed, {:?} without an answer", gap(&stats));
        assert!(gap(&stats) < 6 * SECOND, "{}", logs(&lab));
        assert_ne!(way(first, &ids[1]), relay);
        hosts[number].restart_daemon().unwrap();
        hosts[number].wait_ready(20 * SECOND).unwrap();

        let running = a.start_ping(b.address(family), DENSE).unwrap();
        std::thread::sleep(2 * SECOND);
        lab.heal_all().unwrap();
        let start = Instant::now();
        poll_until("the direct path is back", 30 * SECOND, || way(first, &ids[1]) == "direct").unwrap();
        let took = start.elapsed();
        std::thread::sleep(6 * SECOND);
        let stats = running.stop().unwrap();
        println!("{family:?}: healed, direct after {took:?}, {} of {} lost", stats.lost, stats.sent);
        assert_eq!((stats.lost, way(first, &ids[1]).as_str()), (0, "direct"), "{}", logs(&lab));
    }
}

#[test]
fn a_host_that_lets_nothing_in_is_reached_by_a_way_that_it_opens_itself() {
    let lab =
        Lab::up(Options { nodes: 2, pods: 0, daemons: false, secret: Secret::Key, ..options("t-shut") })
            .unwrap();
    let (open, shut) = (lab.host(0), lab.host(1));
    take_no_calls(&shut);
    let key = ["--key-file", "/etc/meshd/key"];
    open.spawn_daemon_with(key.map(str::to_owned).to_vec()).unwrap();
    open.wait_ready(20 * SECOND).unwrap();
    let join = open.underlay(Family::V4).to_string();
    shut.spawn_daemon_with([&key[..], &["--join", &join]].concat().into_iter().map(str::to_owned).collect())
        .unwrap();
    shut.wait_ready(20 * SECOND).unwrap();
    let (to, from) = (shut.add_pod("p1").unwrap(), open.add_pod("p1").unwrap());
    let start = Instant::now();
    for family in FAMILIES {
        reaches_within(&from, &to, family, 20 * SECOND);
    }
    println!("a pod behind it is reached after {:?}", start.elapsed());
}

#[test]
fn a_host_that_gets_another_address_is_followed_there() {
    let lab = mesh_tests::up(Options { nodes: 3, pods: 1, ..options("t-moves") });
    let (stays, moves) = (lab.host(0), lab.host(1));
    let (a, b) = (stays.pod(0).unwrap(), moves.pod(0).unwrap());
    for (from, to) in [(&a, &b), (&b, &a)] {
        for family in FAMILIES {
            let running = from.start_ping(to.address(family), DENSE).unwrap();
            std::thread::sleep(3 * SECOND);
            lab.renumber(&moves).unwrap();
            std::thread::sleep(8 * SECOND);
            let stats = running.stop().unwrap();
            println!("{} to {}: {:?} without an answer", from.full_name(), to.full_name(), gap(&stats));
            assert!(gap(&stats) < 6 * SECOND, "{}", logs(&lab));
        }
    }
    assert_eq!(way(&stays, &id(&moves)), "direct");
    // And with one that had said nothing to it for a while.
    let third = lab.host(2).pod(0).unwrap();
    for family in FAMILIES {
        reaches_within(&third, &b, family, 3 * SECOND);
    }
}
