//! A node is removed by an operator: `meshctl remove`, in a flat cluster and in an anchored one.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test fails by panicking, and tells what it measured"
)]

use std::time::{Duration, Instant};

use mesh_lab::{Family, Host, Lab, Options, Secret, poll_until};
use mesh_tests::{FAMILIES, every, logs, options, reaches_within, up};

const SECOND: Duration = Duration::from_secs(1);

/// The key pair with the seed 02…02: the golden tests of `mesh-keys` have it too.
const ADMIN_KEY: &str =
    "hauberk-admin-1:02020202020202020202020202020202020202020202020202020202020202025fa8a684\n";
const ADMIN_PUBLIC: &str =
    "hauberk-admin-public-1:8139770ea87d175f56a35466c34c7ecccb8d8a91b4ee37a25df60f5b8fc9b39480575c0a";

/// What `meshctl` says, and whether it succeeds.
fn meshctl(host: &Host, words: &[&str]) -> (bool, String) {
    let output = host.exec(&[&["meshctl"], words].concat()).unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8(text).unwrap())
}

/// The status also of a node that has problems, which a removed one has and, for a moment, those that removed it.
fn status(host: &Host) -> Option<serde_json::Value> {
    serde_json::from_slice(&host.exec(&["meshctl", "status", "-o", "json"]).ok()?.stdout).ok()
}

/// Ids of the members that a host knows besides itself.
fn peers(host: &Host) -> Vec<String> {
    let status = status(host).unwrap();
    status["peers"].as_array().unwrap().iter().map(|peer| peer["id"].as_str().unwrap().to_owned()).collect()
}

fn id(host: &Host) -> String {
    status(host).unwrap()["node"]["id"].as_str().unwrap().to_owned()
}

/// Number of peers that the engine itself has.
fn tunnels(host: &Host) -> usize {
    host.exec_ok(&["wg", "show", "meshwg0", "peers"]).unwrap().lines().count()
}

fn says_removed(host: &Host) -> bool {
    status(host).is_some_and(|status| status["problems"].to_string().contains("was removed from the cluster"))
}

/// Waits until the others have no tunnel to `gone` and it says so itself.
fn wait_gone(lab: &Lab, gone: &Host, gone_id: &String, start: Instant) {
    for host in lab.hosts().iter().filter(|host| host.name() != gone.name()) {
        let out = poll_until("the tunnel is gone", 5 * SECOND, || {
            !peers(host).contains(gone_id) && tunnels(host) == 1
        });
        assert!(out.is_ok(), "{}: {:?}\n{}", host.name(), peers(host), logs(lab));
    }
    println!("no tunnel to the removed node is left {:?} after the command", start.elapsed());
    assert!(start.elapsed() < 5 * SECOND, "{:?}", start.elapsed());
    assert!(poll_until("it says so", 5 * SECOND, || says_removed(gone)).is_ok(), "{}", logs(lab));
}

#[test]
fn a_member_of_a_flat_cluster_is_removed_by_any_other() {
    let lab = up(Options { nodes: 3, pods: 1, ..options("t-remove") });
    let (first, third) = (lab.host(0), lab.host(2));
    let pod = third.pod(0).unwrap();
    FAMILIES.iter().for_each(|family| reaches_within(&first.pod(0).unwrap(), &pod, *family, 10 * SECOND));
    assert!(meshctl(&first, &["status"]).1.contains("flat: any member can remove others"));

    let third_id = id(&third);
    let (done, said) = meshctl(&first, &["remove", &third_id[..8]]);
    assert!(!done && said.contains("alive") && said.contains("--yes"), "{said}");
    assert!(!meshctl(&first, &["remove", &third_id[..7], "--yes"]).0, "too short");
    let start = Instant::now();
    let (done, said) = meshctl(&first, &["remove", &third_id[..8], "--yes"]);
    assert!(done && said.contains("removed for good"), "{said}");
    wait_gone(&lab, &third, &third_id, start);

    for family in FAMILIES {
        let stats = first.pod(0).unwrap().ping(pod.address(family), every(SECOND / 50, 10)).unwrap();
        assert!(stats.sent > 0 && stats.received == 0, "{family:?}: {stats:?}");
        reaches_within(&first.pod(0).unwrap(), &lab.host(1).pod(0).unwrap(), family, 5 * SECOND);
    }
    let (done, said) = meshctl(&third, &["remove", &id(&first), "--yes"]);
    assert!(!done && said.contains("was removed"), "it has no say any more: {said}");
}

#[test]
fn only_the_admin_key_removes_a_member_of_an_anchored_cluster_closes_joining_and_makes_tokens() {
    let daemon_args = vec!["--admin-key".to_owned(), ADMIN_PUBLIC.to_owned()];
    let lab = up(Options { nodes: 3, secret: Secret::Key, daemon_args, ..options("t-anchored") });
    let (first, third) = (lab.host(0), lab.host(2));
    assert!(meshctl(&first, &["status"]).1.contains("anchored: one admin key"));
    let path = first.dir().join("etc").join("admin.key");
    mesh_sys::files::write_atomic(&path, ADMIN_KEY.as_bytes(), 0o600).unwrap();
    let with_key = ["--admin-key-file", "/etc/meshd/admin.key"];

    // It is off when it is removed, and hears of it from whom it calls.
    let third_id = id(&third);
    third.kill9_daemon().unwrap();
    let (done, said) = meshctl(&first, &["remove", &third_id, "--yes"]);
    assert!(!done && said.contains("--admin-key-file"), "{said}");
    let start = Instant::now();
    let (done, said) = meshctl(&first, &[&["remove", &third_id, "--yes"][..], &with_key].concat());
    assert!(done && said.contains("Joining is closed now"), "{said}");
    third.restart_daemon().unwrap();
    wait_gone(&lab, &third, &third_id, start);
    // By the first member that it says anything to, in a datagram or in a session.
    let told = || third.log().is_ok_and(|log| log.contains("this node was removed from the cluster"));
    assert!(poll_until("it is told", 5 * SECOND, told).is_ok(), "{}", logs(&lab));

    let fourth = lab.add_host().unwrap();
    let address = first.underlay(Family::V4).to_string();
    let args = ["--key-file", "/etc/meshd/key", "--join", &address].map(str::to_owned).to_vec();
    fourth.spawn_daemon_with(args).unwrap();
    let told = || fourth.log().is_ok_and(|log| log.contains("joining this cluster is closed"));
    assert!(poll_until("it is told", 10 * SECOND, told).is_ok(), "{}", logs(&lab));
    let (done, said) = meshctl(&first, &["join-window", "open", "--for", "10m"]);
    assert!(!done && said.contains("--admin-key-file"), "{said}");
    let open = [&["join-window", "open", "--for", "10m"][..], &with_key].concat();
    let (done, said) = meshctl(&first, &open);
    assert!(done && said.contains("open for another"), "{said}");
    fourth.restart_daemon().unwrap();
    fourth.wait_ready(20 * SECOND).unwrap();

    // A fifth comes by a token while joining is closed, and restarts without it.
    assert!(meshctl(&first, &[&["join-window", "close"][..], &with_key].concat()).0);
    let (done, said) = meshctl(&first, &[&["token", "create"][..], &with_key].concat());
    let token = said.lines().find(|line| line.starts_with("hbt1.")).unwrap_or_else(|| panic!("{said}"));
    assert!(done);
    let fifth = lab.add_host().unwrap();
    let path = fifth.dir().join("etc").join("token");
    mesh_sys::files::write_atomic(&path, token.as_bytes(), 0o600).unwrap();
    let args = ["--token-file", "/etc/meshd/token", "--join", &address].map(str::to_owned).to_vec();
    fifth.spawn_daemon_with(args).unwrap();
    fifth.wait_ready(20 * SECOND).unwrap();
    std::fs::remove_file(&path).unwrap();
    fifth.restart_daemon().unwrap();
    fifth.wait_ready(20 * SECOND).unwrap();
    let (_, said) = meshctl(&first, &["token", "list"]);
    assert!(said.contains("1 of 1") && said.contains("used as often"), "{said}");
}
