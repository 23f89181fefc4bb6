//! What a pod cannot forge.

use std::net::Ipv4Addr;
use std::time::Duration;

use mesh_sys::packet::{Capture, CaptureConfig, Sender};
use mesh_sys::rtnl::BridgePortChange;

use crate::frames::{ALL, arp, ether, icmpv6, ipv4, ipv6, mark, neighbour, number, router};
use crate::node::{BRIDGE_MAC, GATEWAY4, GATEWAY6, Node};

#[test]
fn forged_frames_arrive_nowhere_and_change_nothing() {
    let node = Node::new();
    let mut plane = node.plane();
    let [a, b] = node.pods.as_slice() else { unreachable!() };
    let (m, g4, g6) = (BRIDGE_MAC, GATEWAY4, GATEWAY6);
    let nd_group = "ff02::1".parse().unwrap();
    let udp = [0, 9, 0, 9, 0, 24, 0, 0];
    let tagged = |inner: &[u8]| [&[0, 5, 0x08, 0x00][..], inner].concat();
    type Build<'a> = Box<dyn Fn(usize) -> Vec<u8> + 'a>;
    let frames: Vec<(&str, bool, Build<'_>)> = vec![
        ("own IPv4", true, Box::new(|_| ether(m, a.mac, 0x0800, &ipv4(a.v4, g4)))),
        ("own IPv6", true, Box::new(|_| ether(m, a.mac, 0x86dd, &ipv6(a.v6, g6, 17, &udp)))),
        ("own ARP", true, Box::new(|_| ether(ALL, a.mac, 0x0806, &arp(1, a.mac, a.v4, g4)))),
        (
            "own address advertised",
            true,
            Box::new(|n| ether(m, a.mac, 0x86dd, &icmpv6(a.v6, g6, &neighbour(136, a.v6, a.mac), n))),
        ),
        (
            "own question",
            true,
            Box::new(|n| ether(m, a.mac, 0x86dd, &icmpv6(a.v6, g6, &neighbour(135, g6, a.mac), n))),
        ),
        ("IPv4 with b's MAC", false, Box::new(|_| ether(m, b.mac, 0x0800, &ipv4(a.v4, g4)))),
        ("b's MAC and IPv4", false, Box::new(|_| ether(m, b.mac, 0x0800, &ipv4(b.v4, g4)))),
        ("b's IPv4", false, Box::new(|_| ether(m, a.mac, 0x0800, &ipv4(b.v4, g4)))),
        ("the gateway's IPv4", false, Box::new(|_| ether(m, a.mac, 0x0800, &ipv4(g4, g4)))),
        (
            "a foreign IPv4",
            false,
            Box::new(|_| ether(m, a.mac, 0x0800, &ipv4(Ipv4Addr::new(192, 0, 2, 2), g4))),
        ),
        ("IPv4 in a VLAN", false, Box::new(|_| ether(m, a.mac, 0x8100, &tagged(&ipv4(a.v4, g4))))),
        ("b's IPv6", false, Box::new(|_| ether(m, a.mac, 0x86dd, &ipv6(b.v6, g6, 17, &udp)))),
        ("the gateway's IPv6", false, Box::new(|_| ether(m, a.mac, 0x86dd, &ipv6(g6, g6, 17, &udp)))),
        (
            "link-local IPv6",
            false,
            Box::new(|_| ether(m, a.mac, 0x86dd, &ipv6("fe80::1".parse().unwrap(), g6, 17, &udp))),
        ),
        ("ARP for b", false, Box::new(|_| ether(ALL, a.mac, 0x0806, &arp(2, a.mac, b.v4, g4)))),
        ("ARP for the gateway", false, Box::new(|_| ether(ALL, a.mac, 0x0806, &arp(2, a.mac, g4, g4)))),
        ("ARP with b's MAC inside", false, Box::new(|_| ether(ALL, a.mac, 0x0806, &arp(2, b.mac, a.v4, g4)))),
        (
            "ARP with b's MAC outside",
            false,
            Box::new(|_| ether(ALL, b.mac, 0x0806, &arp(2, a.mac, a.v4, g4))),
        ),
        (
            "b advertised",
            false,
            Box::new(|n| ether(m, a.mac, 0x86dd, &icmpv6(a.v6, g6, &neighbour(136, b.v6, a.mac), n))),
        ),
        (
            "the gateway advertised",
            false,
            Box::new(|n| ether(m, a.mac, 0x86dd, &icmpv6(a.v6, g6, &neighbour(136, g6, a.mac), n))),
        ),
        (
            "router advertisement",
            false,
            Box::new(|n| {
                ether(ALL, a.mac, 0x86dd, &icmpv6("fe80::1".parse().unwrap(), nd_group, &router(), n))
            }),
        ),
        (
            "router advertisement from its own address",
            false,
            Box::new(|n| ether(ALL, a.mac, 0x86dd, &icmpv6(a.v6, nd_group, &router(), n))),
        ),
        ("to b's MAC", false, Box::new(|_| ether(b.mac, a.mac, 0x0800, &ipv4(a.v4, b.v4)))),
        ("another protocol", false, Box::new(|_| ether(m, a.mac, 0x88cc, &[]))),
    ];
    let sender = Sender::open_in(&a.ns.netns, "eth0").unwrap();
    // Without rules and lock all of them arrive but for the one that isolation stops: so it is the rules that stop
    // the others.
    node.reach(&mut plane, &node.desired(true));
    let unlocked = BridgePortChange { locked: Some(false), ..BridgePortChange::default() };
    node.host.rtnl().set_bridge_port(node.host.index(&a.port), unlocked).unwrap();
    node.host.sh("nft flush ruleset");
    let config = CaptureConfig { device: Some("mesh0".to_owned()), ..CaptureConfig::default() };
    let mut on_bridge = Capture::open_in(&node.host.netns, &config).unwrap();
    for (n, (_, _, build)) in frames.iter().enumerate() {
        sender.send(&mark(build(n), n)).unwrap();
    }
    let mut missing: Vec<&str> = frames.iter().map(|(what, _, _)| *what).collect();
    on_bridge
        .read_for(Duration::from_millis(300), |frame| {
            if let Some(n) = number(frame.data) {
                missing.retain(|what| *what != frames[n].0);
            }
        })
        .unwrap();
    assert_eq!(missing, ["to b's MAC"]);

    for on in [false, true] {
        node.bridge_netfilter(on);
        node.reach(&mut plane, &node.desired(!on));
        let bridge = node.host.index("mesh0");
        let learned = || {
            let mut neighbours = node.host.rtnl().neighbours(bridge).unwrap();
            // The kernel's own, for the groups it joins.
            neighbours.retain(|neighbour| !neighbour.ip.is_multicast());
            let routes = node.host.sh("ip -6 route show table all");
            let routes: Vec<String> =
                routes.lines().filter(|r| !r.contains("eth0 ")).map(str::to_owned).collect();
            (neighbours, routes)
        };
        let before = learned();
        let config = CaptureConfig { device: Some("mesh0".to_owned()), ..CaptureConfig::default() };
        let mut on_bridge = Capture::open_in(&node.host.netns, &config).unwrap();
        let mut at_b = Capture::open_in(&b.ns.netns, &CaptureConfig::default()).unwrap();
        for (n, (_, _, build)) in frames.iter().enumerate() {
            sender.send(&mark(build(n), n)).unwrap();
        }
        let mut arrived = vec![false; frames.len()];
        on_bridge
            .read_for(Duration::from_millis(300), |frame| {
                if let Some(n) = number(frame.data) {
                    arrived[n] = true;
                }
            })
            .unwrap();
        for (arrived, (what, honest, _)) in arrived.iter().zip(&frames) {
            assert_eq!(arrived, honest, "nf-call {on}: {what}");
        }
        let mut leaked = Vec::new();
        at_b.read_for(Duration::from_millis(100), |frame| leaked.extend(number(frame.data))).unwrap();
        assert_eq!(leaked, Vec::<usize>::new(), "nf-call {on}: another pod got a frame");
        assert_eq!(on_bridge.statistics().unwrap().dropped + at_b.statistics().unwrap().dropped, 0);
        assert_eq!(learned(), before, "nf-call {on}");
        assert_eq!(node.reconcile(&mut plane, &node.desired(!on)), []);
        assert!(b.ns.pings(GATEWAY4) && b.ns.pings(a.v6), "nf-call {on}: honest pods are hindered");
    }
}

#[test]
fn without_the_tables_the_lock_still_stops_a_forged_station_and_isolation_a_neighbour() {
    let node = Node::new();
    let mut plane = node.plane();
    let [a, b] = node.pods.as_slice() else { unreachable!() };
    node.reach(&mut plane, &node.desired(true));
    node.host.sh("nft flush ruleset");
    let config = CaptureConfig { device: Some("mesh0".to_owned()), ..CaptureConfig::default() };
    let mut on_bridge = Capture::open_in(&node.host.netns, &config).unwrap();
    let mut at_b = Capture::open_in(&b.ns.netns, &CaptureConfig::default()).unwrap();
    let sender = Sender::open_in(&a.ns.netns, "eth0").unwrap();
    let frames = [
        ether(BRIDGE_MAC, a.mac, 0x0800, &ipv4(a.v4, GATEWAY4)),
        ether(BRIDGE_MAC, b.mac, 0x0800, &ipv4(b.v4, GATEWAY4)),
        ether(b.mac, a.mac, 0x0800, &ipv4(a.v4, b.v4)),
        ether(ALL, a.mac, 0x0806, &arp(1, a.mac, a.v4, b.v4)),
    ];
    for (n, frame) in frames.into_iter().enumerate() {
        sender.send(&mark(frame, n)).unwrap();
    }
    let mut arrived = Vec::new();
    on_bridge.read_for(Duration::from_millis(200), |frame| arrived.extend(number(frame.data))).unwrap();
    arrived.dedup();
    assert_eq!(arrived, [0, 3], "the honest ones, and not the one with another's MAC");
    let mut leaked = Vec::new();
    at_b.read_for(Duration::from_millis(100), |frame| leaked.extend(number(frame.data))).unwrap();
    assert_eq!(leaked, Vec::<usize>::new());
}
