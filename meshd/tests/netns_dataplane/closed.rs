//! Nothing of the cluster leaves by the underlay, and nothing comes in by it.

use std::net::IpAddr;
use std::time::Duration;

use mesh_core::host::{HostState, Route};
use mesh_core::node::GUARD_OBJECT;
use mesh_sys::packet::{Capture, CaptureConfig, Sender};
use mesh_sys::rtnl::Mac;

use crate::frames::{ether, ipv4, ipv6, mark, number};
use crate::node::{GATEWAY4, GATEWAY6, Node};

/// Addresses of the cluster that this node has no route to.
const ELSEWHERE: [&str; 2] = ["10.40.0.9", "fd32:0:0:7::9"];

/// Frames on the underlay that have an address of the cluster in them.
fn leaked(capture: &mut Capture) -> Vec<String> {
    let mut found = Vec::new();
    let in_cluster = |ip: IpAddr| match ip {
        IpAddr::V4(ip) => ip.octets()[0] == 10 && ip.octets()[1] & 0xf0 == 32,
        IpAddr::V6(ip) => ip.segments()[..3] == [0xfd32, 0, 0],
    };
    capture
        .read_for(Duration::from_millis(300), |frame| {
            let ips: Vec<IpAddr> = match frame.data.get(12..14) {
                Some([0x08, 0x00]) => [26, 30]
                    .iter()
                    .filter_map(|at| Some(IpAddr::from(*frame.data.get(*at..)?.first_chunk::<4>()?)))
                    .collect(),
                Some([0x86, 0xdd]) => [22, 38]
                    .iter()
                    .filter_map(|at| Some(IpAddr::from(*frame.data.get(*at..)?.first_chunk::<16>()?)))
                    .collect(),
                _ => Vec::new(),
            };
            if ips.iter().any(|ip| in_cluster(*ip)) {
                found.push(format!("{ips:?}"));
            }
        })
        .unwrap();
    assert_eq!(capture.statistics().unwrap().dropped, 0);
    found
}

fn underlay(node: &Node) -> Capture {
    let config =
        CaptureConfig { device: Some("eth0".to_owned()), promiscuous: true, ..CaptureConfig::default() };
    Capture::open_in(&node.wire.netns, &config).unwrap()
}

/// Everybody tries to reach what is not there.
fn try_all(node: &Node) {
    for to in ELSEWHERE {
        for ns in [&node.host, &node.pods[0].ns] {
            assert!(!ns.try_sh(&format!("ping -c2 -i0.1 -w1 -n {to}")).status.success(), "{to} answered");
        }
    }
}

#[test]
fn routes_alone_keep_the_cluster_off_the_underlay() {
    let node = Node::new();
    let mut plane = node.plane();
    // Without the mesh it would leave: the test can fail.
    let mut capture = underlay(&node);
    node.host.sh("sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1");
    try_all_host(&node);
    assert!(!leaked(&mut capture).is_empty(), "the underlay carries nothing: the test proves nothing");

    node.reach(&mut plane, &node.desired(true));
    drop(plane);
    let mut capture = underlay(&node);
    try_all(&node);
    assert_eq!(leaked(&mut capture), Vec::<String>::new());
    // As a reload of the nftables service does, while nobody is there to put them back.
    node.host.sh("nft flush ruleset");
    let mut capture = underlay(&node);
    try_all(&node);
    assert_eq!(leaked(&mut capture), Vec::<String>::new(), "with the tables flushed");
}

fn try_all_host(node: &Node) {
    for to in ELSEWHERE {
        let _unanswered = node.host.try_sh(&format!("ping -c2 -i0.1 -w1 -n {to}"));
    }
}

#[test]
fn rules_alone_keep_the_cluster_off_the_underlay() {
    let node = Node::new();
    let mut plane = node.plane();
    node.reach(&mut plane, &node.desired(true));
    // Somebody's own route for a part of the range, and a pod that is routed to the wrong side.
    node.host.sh("ip route add 10.40.0.0/16 via 192.0.2.2; ip -6 route add fd32:0:0:7::/64 via 2001:db8::2");
    let mut capture = underlay(&node);
    try_all(&node);
    assert_eq!(leaked(&mut capture), Vec::<String>::new());
    // With an address of the mesh, to somewhere else.
    let outside = [("192.0.2.2", IpAddr::V4(GATEWAY4)), ("2001:db8::2", GATEWAY6.into())];
    for (to, from) in outside {
        assert!(!node.host.try_sh(&format!("ping -c1 -w1 -n -I {from} {to}")).status.success());
    }
    assert_eq!(leaked(&mut capture), Vec::<String>::new(), "with a source of the cluster");
}

#[test]
fn frames_of_the_cluster_that_come_by_the_underlay_end_there() {
    let node = Node::new();
    let mut plane = node.plane();
    node.reach(&mut plane, &node.desired(true));
    let pod = &node.pods[0];
    let to = node.host.rtnl().link("eth0").unwrap().unwrap().mac.unwrap();
    let from = Mac([2, 0, 0, 0, 0, 0x66]);
    let udp = [0, 9, 0, 9, 0, 24, 0, 0];
    let sender = Sender::open_in(&node.wire.netns, "eth0").unwrap();
    let send = || {
        let frames = [
            ether(to, from, 0x0800, &ipv4("192.0.2.2".parse().unwrap(), pod.v4)),
            ether(to, from, 0x0800, &ipv4(node.pods[1].v4, pod.v4)),
            ether(to, from, 0x86dd, &ipv6("2001:db8::2".parse().unwrap(), pod.v6, 17, &udp)),
            ether(to, from, 0x86dd, &ipv6(node.pods[1].v6, pod.v6, 17, &udp)),
        ];
        let mut at_pod = Capture::open_in(&pod.ns.netns, &CaptureConfig::default()).unwrap();
        for (n, frame) in frames.into_iter().enumerate() {
            sender.send(&mark(frame, n)).unwrap();
        }
        let mut arrived = Vec::new();
        at_pod.read_for(Duration::from_millis(300), |frame| arrived.extend(number(frame.data))).unwrap();
        arrived
    };
    assert_eq!(send(), Vec::<usize>::new());
    // It is the rules that stop them; reverse path filters are not asked.
    node.host
        .sh("nft flush ruleset; sysctl -qw net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.eth0.rp_filter=0");
    assert!(send().contains(&0), "without the rules they arrive, or the test proves nothing");
}

#[test]
fn a_lane_for_the_whole_range_that_vanishes_leaves_the_range_closed() {
    let node = Node::new();
    let mut plane = node.plane();
    // A tunnel device stands in for the lane: the first node may own the whole range.
    node.host.sh("ip tuntap add meshwg99 mode tun && ip link set meshwg99 up");
    let mut desired = node.desired(true);
    desired.ports.clear();
    let guard = desired.guard.as_mut().unwrap();
    guard.ports.clear();
    let ranges = [guard.cluster_ipv4.into(), guard.cluster_ipv6.into()];
    for range in ranges {
        desired.routes.insert(range, Route::to_device("meshwg99", None, None));
    }
    let problems = node.reconcile(&mut plane, &desired);
    // The device itself is none that is wanted, and goes; with it go the routes.
    assert!(problems.iter().any(|problem| problem.object == "meshwg99"), "{problems:?}");
    let routes =
        node.observe(&mut plane, &HostState { guard: desired.guard.clone(), ..HostState::default() }).routes;
    for range in ranges {
        assert_eq!(routes.get(&range), Some(&Route::Unreachable), "{range}");
    }
    let mut capture = underlay(&node);
    node.host.sh("nft flush ruleset");
    try_all_host(&node);
    assert_eq!(leaked(&mut capture), Vec::<String>::new());
}

#[test]
fn a_route_of_somebody_elses_for_the_whole_range_is_a_problem_that_all_see() {
    let node = Node::new();
    let mut plane = node.plane();
    node.host.sh("ip route add 10.32.0.0/12 via 192.0.2.2 metric 1");
    let problems = node.reconcile(&mut plane, &node.desired(true));
    let [problem] = problems.iter().filter(|p| p.object == GUARD_OBJECT).collect::<Vec<_>>()[..] else {
        panic!("{problems:?}")
    };
    assert!(problem.text.contains("is in the way"), "{problem:?}");
}
