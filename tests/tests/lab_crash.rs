//! Crash-only: whatever dies, pods keep talking or come back, and nothing is given twice.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test fails by panicking, and tells what it measured"
)]

use std::time::Duration;

use mesh_lab::{Family, Options, poll_until};
use mesh_tests::{FAMILIES, every, logs, options, reaches_within, up};

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn a_killed_daemon_loses_no_ping_and_comes_back_as_it_was() {
    let lab = up(Options { nodes: 3, pods: 2, ..options("t-kill") });
    let pods: Vec<_> = lab.pods().unwrap();
    let (a, b) = (lab.host(0).pod(0).unwrap(), lab.host(1).pod(0).unwrap());
    for host in lab.hosts() {
        let before = host.status().unwrap();
        let pings: Vec<_> = FAMILIES
            .iter()
            .map(|family| {
                a.start_ping(b.address(*family), every(Duration::from_millis(10), 100_000)).unwrap()
            })
            .collect();
        host.kill9_daemon().unwrap();
        // Nobody is there to help: what works now works by itself.
        for family in FAMILIES {
            let stats = a.ping(b.address(family), every(Duration::from_millis(10), 50)).unwrap();
            assert!(stats.all_answered(), "daemon of {} down: {stats:?}\n{}", host.name(), logs(&lab));
        }
        host.restart_daemon().unwrap();
        host.wait_ready(20 * SECOND).unwrap();
        for (family, ping) in FAMILIES.iter().zip(pings) {
            let stats = ping.stop().unwrap();
            println!(
                "kill -9 and restart of {}: {family:?}, {} sent, {} lost, longest gap {}",
                host.name(),
                stats.sent,
                stats.lost,
                stats.longest_gap
            );
            assert!(stats.all_answered(), "{stats:?}\n{}", logs(&lab));
        }
        let after = host.status().unwrap();
        for field in ["node", "cluster", "addresses", "attachments"] {
            assert_eq!(before[field], after[field], "{field}");
        }
        assert_eq!(before["lanes"][0]["public_key"], after["lanes"][0]["public_key"]);
    }
    // New pods get new addresses.
    let mut addresses: Vec<_> = pods.iter().map(|pod| pod.address(Family::V4)).collect();
    for host in lab.hosts() {
        addresses.push(host.add_pod("late").unwrap().address(Family::V4));
    }
    let count = addresses.len();
    addresses.sort();
    addresses.dedup();
    assert_eq!(addresses.len(), count, "an address was given twice");
    lab.wait_meshed(20 * SECOND).unwrap();
    assert_eq!(lab.check(10 * SECOND).unwrap().failed().count(), 0);
}

#[test]
fn a_killed_engine_is_started_again_and_nothing_leaks_meanwhile() {
    let lab = up(Options { nodes: 2, pods: 1, ..options("t-engine") });
    let (a, b) = (lab.host(0).pod(0).unwrap(), lab.host(1).pod(0).unwrap());
    let host = lab.host(0);
    let engine = host
        .processes()
        .unwrap()
        .into_iter()
        .find(|(_, words)| words.first().is_some_and(|word| word.ends_with("mesh-wg")))
        .expect("an engine")
        .0;
    let ranges = lab.cluster_ranges().unwrap();
    let scanner = mesh_lab::Scanner::new(Some(ranges));
    let capture = lab.capture(&mesh_lab::Where::Underlay, move |frame: &_| scanner.inspect(frame)).unwrap();
    let ping = a.start_ping(b.address(Family::V4), every(Duration::from_millis(10), 100_000)).unwrap();
    engine.signal(nix::sys::signal::Signal::SIGKILL).unwrap();
    poll_until("the tunnel is back", 20 * SECOND, || {
        a.ping(b.address(Family::V4), every(Duration::from_millis(10), 1))
            .is_ok_and(|stats| stats.all_answered())
    })
    .unwrap();
    let stats = ping.stop().unwrap();
    println!("engine killed: {} of {} pings lost, longest gap {}", stats.lost, stats.sent, stats.longest_gap);
    for family in FAMILIES {
        reaches_within(&b, &a, family, 10 * SECOND);
    }
    let (seen, _) = capture.stop().unwrap();
    assert!(seen.frames > 0, "{seen:?}");
    assert_eq!((seen.found, seen.dropped), (0, 0), "{seen:?}");
}

#[test]
fn a_daemon_that_is_started_again_needs_nobody_also_after_a_start_that_failed() {
    let lab = up(Options { nodes: 2, pods: 1, ..options("t-alone") });
    let host = lab.host(0);
    lab.hosts().iter().for_each(|host| host.kill9_daemon().unwrap());
    // A mistake of the operator's, found and mended.
    let password = host.dir().join("etc").join("password");
    let away = password.with_extension("away");
    std::fs::rename(&password, &away).unwrap();
    for _ in 0..2 {
        let failed = host.restart_daemon().and_then(|_| host.wait_ready(5 * SECOND));
        assert!(format!("{:#}", failed.unwrap_err()).contains("password-file"), "{}", logs(&lab));
    }
    std::fs::rename(&away, &password).unwrap();
    host.restart_daemon().unwrap();
    // Nobody else is there to confirm it.
    host.wait_ready(20 * SECOND).unwrap();
    host.add_pod("alone").unwrap();
}

#[test]
fn a_disk_that_is_put_back_under_running_pods_gives_no_address() {
    let lab = up(Options { nodes: 2, pods: 1, ..options("t-putback") });
    let host = lab.host(0);
    let (state, backup) = (host.dir().join("state"), host.dir().join("backup"));
    let copy = |from: &std::path::Path, to: &std::path::Path| {
        let status = std::process::Command::new("cp").arg("-aT").arg(from).arg(to).status().unwrap();
        assert!(status.success());
    };
    copy(&state, &backup);
    host.add_pod("later").unwrap();
    host.stop_daemon().unwrap();
    copy(&backup, &state);
    host.restart_daemon().unwrap();
    let refused = || host.log().is_ok_and(|log| log.contains("put back to an older state"));
    assert!(poll_until("it is found out", 10 * SECOND, refused).is_ok(), "{}", logs(&lab));
    // Also when others have had the time to confirm it.
    std::thread::sleep(13 * SECOND);
    let error = format!("{:#}", host.add_pod("new").unwrap_err());
    assert!(error.contains("older state"), "{error}");
    // What it knows of runs on.
    for family in FAMILIES {
        reaches_within(&lab.host(1).pod(0).unwrap(), &host.pod(0).unwrap(), family, 10 * SECOND);
    }
}

#[test]
fn a_pod_deleted_while_the_daemon_is_down_is_released_when_it_is_back() {
    let lab = up(Options { nodes: 1, pods: 2, ..options("t-tombstone") });
    let host = lab.host(0);
    host.kill9_daemon().unwrap();
    host.remove_pod("p1").unwrap();
    host.restart_daemon().unwrap();
    host.wait_ready(20 * SECOND).unwrap();
    poll_until("the lease is released", 10 * SECOND, || {
        host.status().is_ok_and(|status| status["attachments"] == 1)
    })
    .unwrap();
    assert!(std::fs::read_dir(host.dir().join("state").join("tombstones")).unwrap().next().is_none());
}
