//! A node leaves the cluster: `meshctl leave`. It is mostly waiting until addresses have rested, beside other tests.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test fails by panicking, and tells what it measured"
)]

use std::time::{Duration, Instant};

use mesh_lab::{Host, Options, poll_until};
use mesh_tests::{FAMILIES, logs, options, reaches_within, up};

const SECOND: Duration = Duration::from_secs(1);

/// What `meshctl` says, and whether it succeeds.
fn meshctl(host: &Host, words: &[&str]) -> (bool, String) {
    let output = host.exec(&[&["meshctl"], words].concat()).unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8(text).unwrap())
}

fn status(host: &Host) -> serde_json::Value {
    serde_json::from_slice(&host.exec(&["meshctl", "status", "-o", "json"]).unwrap().stdout).unwrap()
}

/// How many IPv4 addresses each member owns, by the account of a host.
fn owners(host: &Host) -> Vec<(String, u64)> {
    let status = status(host);
    let owners = status["ipam"]["owners"].as_array().unwrap();
    let owner = |owner: &serde_json::Value| {
        (owner["id"].as_str().unwrap().to_owned(), owner["ipv4_addresses"].as_u64().unwrap())
    };
    owners.iter().map(owner).collect()
}

fn id(host: &Host) -> String {
    status(host)["node"]["id"].as_str().unwrap().to_owned()
}

fn has_bridge(host: &Host) -> bool {
    host.exec(&["ip", "link", "show", "mesh0"]).unwrap().status.success()
}

#[test]
fn a_node_leaves_after_a_crash_too_and_another_has_its_addresses_at_once() {
    let lab = up(Options { nodes: 3, pods: 1, ..options("t-leave") });
    let (first, second, third) = (lab.host(0), lab.host(1), lab.host(2));
    let (first_pod, second_pod) = (first.pod(0).unwrap(), second.pod(0).unwrap());
    let third_id = id(&third);
    let before: u64 = owners(&first).iter().map(|(_, owned)| owned).sum();

    let (done, said) = meshctl(&third, &["leave", "--yes"]);
    assert!(!done && said.contains("1 pod is attached here"), "{said}");
    let pod = third.pod(0).unwrap().name().to_owned();
    third.remove_pod(&pod).unwrap();
    let (done, said) = meshctl(&third, &["leave"]);
    assert!(!done && said.contains("for good") && said.contains("--yes"), "{said}");
    let (done, said) = meshctl(&third, &["leave", "--cancel"]);
    assert!(done, "staying is what it does: {said}\n{}", logs(&lab));

    let start = Instant::now();
    let (done, said) = meshctl(&third, &["leave", "--yes", "--no-wait"]);
    assert!(done && said.contains("is leaving"), "{said}");
    let gone = poll_until("the bridge is gone", 5 * SECOND, || !has_bridge(&third));
    assert!(gone.is_ok(), "{}", logs(&lab));
    let error = third.add_pod("late").err().map(|error| format!("{error:#}")).unwrap_or_default();
    assert!(error.contains("leaving the cluster"), "{error}");
    third.kill9_daemon().unwrap();
    third.restart_daemon().unwrap();
    let answers = poll_until("it answers", 5 * SECOND, || meshctl(&third, &["config"]).0);
    assert!(answers.is_ok(), "{}", logs(&lab));
    let (done, said) = meshctl(&third, &["leave"]);
    assert!(done && said.contains("has left the cluster"), "{said}\n{}", logs(&lab));
    println!("{:?} after the decision: {said}", start.elapsed());
    assert!(start.elapsed() >= 60 * SECOND, "addresses have to rest");

    // It was heard of by then: neither the node nor its addresses are anywhere else.
    for host in [&first, &second] {
        let out = poll_until("it is no member", 5 * SECOND, || {
            owners(host).iter().all(|(owner, _)| *owner != third_id)
                && status(host)["problems"].as_array().unwrap().is_empty()
        });
        assert!(out.is_ok(), "{:?}\n{}\n{}", owners(host), status(host)["problems"], logs(&lab));
        assert_eq!(owners(host).iter().map(|(_, owned)| owned).sum::<u64>(), before);
    }
    FAMILIES.iter().for_each(|family| reaches_within(&first_pod, &second_pod, *family, 5 * SECOND));
    let (done, said) = meshctl(&third, &["leave", "--cancel"]);
    assert!(!done && said.contains("was removed"), "{said}");
}
