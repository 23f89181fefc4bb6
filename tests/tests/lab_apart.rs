//! Hosts between which nothing gets through, or in one direction only.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test fails by panicking, and tells what it measured"
)]

use std::time::{Duration, Instant};

use mesh_lab::{Family, Host, Lab, Options, Secret, poll_until};
use mesh_tests::{logs, options};

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
