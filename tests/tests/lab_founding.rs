//! Five hosts started at once with the same command, again and again: one cluster, one genesis.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test fails by panicking, and tells what it measured"
)]

use std::collections::BTreeSet;
use std::time::Duration;

use mesh_lab::{Family, Host, Lab, Options, Secret, poll_until};
use mesh_tests::{cluster_of, options};

const HOSTS: usize = 5;

/// Runs in all: 25 with a whole underlay and 25 with one that is cut in two at the start.
const ROUNDS: usize = 50;

fn join_list(lab: &Lab) -> Vec<String> {
    lab.hosts().iter().flat_map(|host| ["--join".to_owned(), host.underlay(Family::V4).to_string()]).collect()
}

fn clusters(hosts: &[Host]) -> BTreeSet<Option<String>> {
    hosts.iter().map(cluster_of).collect()
}

fn members(host: &Host) -> Option<u64> {
    host.status().ok()?["cluster"]["members"].as_u64()
}

/// Kills everything of the daemons and forgets their state: the next start is a first one.
fn wipe(host: &Host) {
    host.kill9_daemon().unwrap();
    for (process, words) in host.processes().unwrap() {
        if words.first().is_some_and(|word| word.ends_with("mesh-wg")) {
            process.signal(nix::sys::signal::Signal::SIGKILL).unwrap();
            process.wait_gone(Duration::from_secs(5)).unwrap();
        }
    }
    host.exec_ok(&["sh", "-c", "rm -rf /var/lib/meshd/* && ip link del mesh0 2>/dev/null; true"]).unwrap();
}

#[test]
fn five_hosts_started_at_once_make_one_cluster_fifty_times_over() {
    let lab =
        Lab::up(Options { nodes: HOSTS, daemons: false, secret: Secret::Key, ..options("t-found") }).unwrap();
    let hosts = lab.hosts();
    let args: Vec<String> =
        ["--key-file", "/etc/meshd/key"].map(str::to_owned).into_iter().chain(join_list(&lab)).collect();
    for round in 0..ROUNDS {
        let cut = round % 2 == 1;
        // Every way of cutting five hosts in two groups comes up.
        let left: Vec<Host> =
            (0..HOSTS).filter(|n| (round / 2 + 1) >> n & 1 == 1).map(|n| hosts[n].clone()).collect();
        let right: Vec<Host> =
            (0..HOSTS).filter(|n| (round / 2 + 1) >> n & 1 == 0).map(|n| hosts[n].clone()).collect();
        if cut {
            lab.cut_groups(&[&left, &right]).unwrap();
        }
        std::thread::scope(|scope| {
            for host in &hosts {
                let args = args.clone();
                scope.spawn(move || host.spawn_daemon_with(args).unwrap());
            }
        });
        if cut {
            // The side of the first host founds the cluster; the other waits.
            let first = &hosts[0];
            let side = if left.iter().any(|host| host.name() == first.name()) { &left } else { &right };
            poll_until("one side is a cluster", Duration::from_secs(20), || {
                side.iter().all(|host| members(host) == Some(side.len() as u64))
            })
            .unwrap();
            let known: BTreeSet<String> = clusters(&hosts).into_iter().flatten().collect();
            assert_eq!(known.len(), 1, "round {round}: two clusters");
            lab.heal_all().unwrap();
        }
        let whole = poll_until("all are members of one cluster", Duration::from_secs(30), || {
            hosts.iter().all(|host| members(host) == Some(HOSTS as u64))
        });
        if whole.is_err() {
            let status: Vec<_> =
                hosts.iter().map(|host| host.status().map(|s| s["membership"].to_string())).collect();
            panic!("round {round}, cut {cut}: {status:?}");
        }
        let known = clusters(&hosts);
        assert_eq!(known.len(), 1, "round {round}, cut {cut}: {known:?}");
        hosts.iter().for_each(wipe);
    }
}
