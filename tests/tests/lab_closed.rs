//! Fail closed (promise P1): what cannot be sent encrypted is not sent.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test fails by panicking, and tells what it measured"
)]

use std::net::IpAddr;
use std::time::Duration;

use mesh_lab::{Family, Host, Lab, Options, Pod, Scanner, Where};
use mesh_tests::{FAMILIES, every, options, up};

/// Pings addresses of the cluster that lead nowhere, and proves that nothing of it is on the underlay.
fn leaks_nothing(lab: &Lab, pod: &Pod, targets: &[IpAddr], why: &str) {
    let scanner = Scanner::new(Some(lab.cluster_ranges().unwrap()));
    let capture = lab.capture(&Where::Underlay, move |frame: &_| scanner.inspect(frame)).unwrap();
    for target in targets {
        let stats = pod.ping(*target, every(Duration::from_millis(20), 10)).unwrap();
        assert_eq!(stats.received, 0, "{why}: somebody answered for {target}");
    }
    let (seen, _) = capture.stop().unwrap();
    assert_eq!((seen.found, seen.dropped), (0, 0), "{why}: {seen:?}");
}

/// Addresses of the cluster's ranges that no node owns a route for.
fn unknown(lab: &Lab) -> Vec<IpAddr> {
    let prefix = lab.host(0).status().unwrap()["cluster"]["ipv6"].as_str().unwrap().to_owned();
    let ipv6 = prefix.replace("::/48", ":dead:beef:dead:beef:1");
    vec!["10.47.255.1".parse().unwrap(), ipv6.parse().unwrap()]
}

fn stop_engine(host: &Host) {
    for (process, words) in host.processes().unwrap() {
        if words.first().is_some_and(|word| word.ends_with("mesh-wg")) {
            process.signal(nix::sys::signal::Signal::SIGKILL).unwrap();
            process.wait_gone(Duration::from_secs(5)).unwrap();
        }
    }
}

#[test]
fn packets_for_the_cluster_never_take_the_default_route() {
    let lab = up(Options { nodes: 2, pods: 1, ..options("t-closed") });
    let (host, pod) = (lab.host(0), lab.host(0).pod(0).unwrap());
    let nowhere = unknown(&lab);
    let peer: Vec<IpAddr> =
        FAMILIES.iter().map(|family| lab.host(1).pod(0).unwrap().address(*family)).collect();

    // The capture works: the same packets without our help would be on the underlay.
    let route = host.exec_ok(&["ip", "route", "show", "default"]).unwrap();
    assert!(route.contains("eth0"), "the host has a default route over the underlay: {route}");

    leaks_nothing(&lab, &pod, &nowhere, "an address that nobody has");
    host.stop_daemon().unwrap();
    leaks_nothing(&lab, &pod, &nowhere, "daemon stopped");
    stop_engine(&host);
    leaks_nothing(&lab, &pod, &[&nowhere[..], &peer[..]].concat(), "daemon and engine gone");
    host.exec_ok(&["nft", "flush", "ruleset"]).unwrap();
    leaks_nothing(&lab, &pod, &[&nowhere[..], &peer[..]].concat(), "rules flushed: routes alone hold");
    assert_eq!(host.exec_ok(&["nft", "list", "tables"]).unwrap().trim(), "", "nobody has put them back");
}

#[test]
fn flushed_rules_are_back_within_a_moment() {
    let lab = up(Options { nodes: 1, pods: 1, ..options("t-flush") });
    let host = lab.host(0);
    let rules = || host.exec_ok(&["nft", "list", "ruleset"]).unwrap_or_default();
    let stateless = |text: String| {
        text.lines()
            .map(|line| line.split("counter packets").next().unwrap_or_default().trim_end().to_owned())
            .collect::<Vec<_>>()
    };
    let before = stateless(rules());
    assert!(before.iter().any(|line| line.contains("inet meshd")));
    host.exec_ok(&["nft", "flush", "ruleset"]).unwrap();
    mesh_lab::poll_until("the rules are back", Duration::from_secs(2), || stateless(rules()) == before)
        .unwrap();
}

#[test]
fn what_comes_from_the_underlay_with_an_address_of_the_cluster_is_not_let_in() {
    let lab = up(Options { nodes: 2, pods: 1, ..options("t-inject") });
    let outsider = lab.add_host().unwrap();
    let (victim, pod) = (lab.host(0), lab.host(0).pod(0).unwrap());
    let peer = lab.host(1).pod(0).unwrap();
    // The outsider routes the cluster through the victim and borrows the address of a pod elsewhere.
    let via = victim.underlay(Family::V4).to_string();
    let (target, borrowed) = (pod.address(Family::V4).to_string(), peer.address(Family::V4).to_string());
    outsider.exec_ok(&["ip", "addr", "add", &format!("{borrowed}/32"), "dev", "lo"]).unwrap();
    outsider
        .exec_ok(&["ip", "route", "add", &format!("{target}/32"), "via", &via, "src", &borrowed])
        .unwrap();
    let arrived = lab
        .capture(&Where::Pod(pod.clone()), |frame: &mesh_lab::Frame<'_>| {
            (frame.data.get(12..14) == Some(&[8, 0]) && frame.data.get(23) == Some(&1))
                .then(|| "ICMP".to_owned())
        })
        .unwrap();
    for source in [borrowed.as_str(), &outsider.underlay(Family::V4).to_string()] {
        let out =
            outsider.exec(&["ping", "-c", "5", "-i", "0.05", "-W", "1", "-I", source, &target]).unwrap();
        assert!(!out.status.success(), "the pod answered an outsider that is {source}");
    }
    // The capture is alive.
    peer.tcp_send_to(&pod, Family::V4, 1000).unwrap();
    let (seen, _) = arrived.stop().unwrap();
    assert!(seen.frames > 0, "{seen:?}");
    assert_eq!(seen.found, 0, "a packet of the outsider reached the pod: {seen:?}");
}
