//! What a pod cannot forge, and how pods of one node are kept apart, in a `bridge` table: the rules the
//! mesh puts in, tried with raw frames.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use common::{BRIDGE_MAC, GATEWAY4, GATEWAY6, Node, Pod};
use mesh_sys::nft::{
    Blocking, Chain, Cmp, Element, Field, FieldType, Hook, Part, Policy, Rule, Set, Table, TableFamily,
    TableOptions, Transaction,
};
use mesh_sys::packet::{Capture, CaptureConfig, Sender};
use mesh_sys::rtnl::{BridgePortChange, Mac};

const GROUP_BIT: [u8; 6] = [1, 0, 0, 0, 0, 0];

fn bridge() -> Table {
    Table::new(TableFamily::Bridge, "meshd")
}

fn rule() -> Rule {
    Rule::new(TableFamily::Bridge)
}

/// The checks: whatever comes from a pod must carry what was given to that port; a pod sends unicast to
/// the bridge only; nothing goes to all ports.
fn checks(node: &Node) -> Transaction {
    use Field::{
        ArpSenderIp, ArpSenderMac, EtherDaddr, EtherSaddr, Icmp6Type, Iifname, Ip4Saddr, Ip6Saddr, NdTarget,
    };
    let t = bridge();
    let mut tx = Transaction::new();
    tx.delete_table(&t).add_table(&t, &TableOptions::default());
    tx.add_set(&t, &Set::new("pod4", [FieldType::Ifname, FieldType::Mac, FieldType::V4]));
    tx.add_set(&t, &Set::new("pod6", [FieldType::Ifname, FieldType::Mac, FieldType::V6]));
    tx.add_chain(&t, &Chain::regular("pod"));
    tx.add_chain(&t, &Chain::filter("prerouting", Hook::Prerouting, -300, Policy::Accept));
    tx.add_chain(&t, &Chain::filter("forward", Hook::Forward, -200, Policy::Accept));
    tx.add_rule(&t, "prerouting", &rule().iifname("mv*").goto("pod"));
    let unicast = rule().masked(EtherDaddr, GROUP_BIT, Cmp::Eq, [0; 6]);
    tx.add_rule(&t, "pod", &unicast.ne(EtherDaddr, BRIDGE_MAC.0).counter().drop().comment("past the bridge"));
    tx.add_rule(&t, "pod", &rule().in_set(&[Iifname, EtherSaddr, Ip4Saddr], "pod4").accept());
    let arp = rule().in_set(&[Iifname, EtherSaddr, ArpSenderIp], "pod4");
    tx.add_rule(&t, "pod", &arp.in_set(&[Iifname, ArpSenderMac, ArpSenderIp], "pod4").accept());
    tx.add_rule(&t, "pod", &rule().eq(Icmp6Type, [134]).counter().drop().comment("router advertisement"));
    tx.add_rule(&t, "pod", &rule().eq(Icmp6Type, [137]).counter().drop().comment("redirect"));
    let advertised = rule().eq(Icmp6Type, [136]).not_in_set(&[Iifname, EtherSaddr, NdTarget], "pod6");
    tx.add_rule(&t, "pod", &advertised.counter().drop().comment("another's address advertised"));
    tx.add_rule(&t, "pod", &rule().in_set(&[Iifname, EtherSaddr, Ip6Saddr], "pod6").accept());
    tx.add_rule(&t, "pod", &rule().counter().drop().comment("forged"));
    let all = rule().iifname("mv*").masked(EtherDaddr, GROUP_BIT, Cmp::Ne, [0; 6]);
    tx.add_rule(&t, "forward", &all.counter().drop().comment("to all ports"));
    for pod in &node.pods {
        let key = |ip| Element::new(&[Part::Ifname(pod.port.clone()), Part::Mac(pod.mac), ip]);
        tx.add_elements(&t, "pod4", &[key(Part::V4(pod.v4))]);
        tx.add_elements(&t, "pod6", &[key(Part::V6(pod.v6))]);
    }
    tx
}

fn ether(to: Mac, from: Mac, kind: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = [to.0, from.0].concat();
    frame.extend_from_slice(&kind.to_be_bytes());
    frame.extend_from_slice(payload);
    frame
}

fn ipv4(from: Ipv4Addr) -> Vec<u8> {
    let mut packet = vec![0x45, 0, 0, 28 + 16, 0, 0, 0, 0, 64, 17, 0, 0];
    packet.extend_from_slice(&from.octets());
    packet.extend_from_slice(&[10, 32, 9, 9]);
    let sum: u32 = packet.chunks(2).map(|c| u32::from(u16::from_be_bytes([c[0], c[1]]))).sum();
    // br_netfilter drops a packet whose header checksum is wrong.
    let folded = u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap();
    packet[10..12].copy_from_slice(&(!folded).to_be_bytes());
    packet.extend_from_slice(&[0, 9, 0, 9, 0, 24, 0, 0]);
    packet
}

fn ipv6(from: Ipv6Addr, next: u8, payload: &[u8]) -> Vec<u8> {
    // 16 bytes for the mark that every frame of the test carries at its end.
    let len = u16::try_from(payload.len() + 16).unwrap();
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend_from_slice(&len.to_be_bytes());
    packet.extend_from_slice(&[next, 255]);
    packet.extend_from_slice(&from.octets());
    packet.extend_from_slice(&"fd32::9".parse::<Ipv6Addr>().unwrap().octets());
    packet.extend_from_slice(payload);
    packet
}

fn neighbour(kind: u8, target: Ipv6Addr) -> Vec<u8> {
    let mut message = vec![kind, 0, 0, 0, 0x60, 0, 0, 0];
    message.extend_from_slice(&target.octets());
    message
}

fn arp(mac: Mac, ip: Ipv4Addr) -> Vec<u8> {
    let mut packet = vec![0, 1, 8, 0, 6, 4, 0, 1];
    packet.extend_from_slice(&mac.0);
    packet.extend_from_slice(&ip.octets());
    packet.extend_from_slice(&[0; 6]);
    packet.extend_from_slice(&[10, 32, 1, 1]);
    packet
}

#[test]
fn a_pod_that_forges_gains_nothing_and_an_honest_one_is_not_hindered() {
    const ALL: Mac = Mac([0xff; 6]);
    let node = Node::new(2, true);
    let [a, b] = node.pods.as_slice() else { unreachable!() };
    let mut nft = Blocking::open_in(&node.host.netns).unwrap();
    let udp = [0, 9, 0, 9, 0, 24, 0, 0];
    let hop_by_hop = |next: u8, inner: &[u8]| {
        let mut header = vec![next, 0, 1, 4, 0, 0, 0, 0];
        header.extend_from_slice(inner);
        header
    };
    let vlan = |inner: u16, payload: &[u8]| {
        let mut tagged = vec![0, 5];
        tagged.extend_from_slice(&inner.to_be_bytes());
        tagged.extend_from_slice(payload);
        tagged
    };
    let m = BRIDGE_MAC;
    let frames: Vec<(&str, bool, Vec<u8>)> = vec![
        ("own IPv4", true, ether(m, a.mac, 0x0800, &ipv4(a.v4))),
        ("own IPv4 to all", true, ether(ALL, a.mac, 0x0800, &ipv4(a.v4))),
        ("own IPv6", true, ether(m, a.mac, 0x86dd, &ipv6(a.v6, 17, &udp))),
        ("own IPv6 behind an option", true, ether(m, a.mac, 0x86dd, &ipv6(a.v6, 0, &hop_by_hop(17, &udp)))),
        ("own ARP", true, ether(ALL, a.mac, 0x0806, &arp(a.mac, a.v4))),
        ("question for a neighbour", true, ether(m, a.mac, 0x86dd, &ipv6(a.v6, 58, &neighbour(135, b.v6)))),
        ("own address advertised", true, ether(m, a.mac, 0x86dd, &ipv6(a.v6, 58, &neighbour(136, a.v6)))),
        ("IPv4 with b's MAC", false, ether(m, b.mac, 0x0800, &ipv4(a.v4))),
        ("IPv4 with b's MAC and address", false, ether(m, b.mac, 0x0800, &ipv4(b.v4))),
        ("b's IPv4", false, ether(m, a.mac, 0x0800, &ipv4(b.v4))),
        ("the gateway's IPv4", false, ether(m, a.mac, 0x0800, &ipv4(GATEWAY4.parse().unwrap()))),
        ("no IPv4", false, ether(m, a.mac, 0x0800, &ipv4(Ipv4Addr::UNSPECIFIED))),
        ("b's IPv4 in a VLAN", false, ether(m, a.mac, 0x8100, &vlan(0x0800, &ipv4(b.v4)))),
        ("b's IPv6", false, ether(m, a.mac, 0x86dd, &ipv6(b.v6, 17, &udp))),
        ("the gateway's IPv6", false, ether(m, a.mac, 0x86dd, &ipv6(GATEWAY6.parse().unwrap(), 17, &udp))),
        ("ARP for b's address", false, ether(ALL, a.mac, 0x0806, &arp(a.mac, b.v4))),
        ("ARP with b's MAC inside", false, ether(ALL, a.mac, 0x0806, &arp(b.mac, a.v4))),
        ("ARP with b's MAC outside", false, ether(ALL, b.mac, 0x0806, &arp(a.mac, a.v4))),
        ("b's address advertised", false, ether(m, a.mac, 0x86dd, &ipv6(a.v6, 58, &neighbour(136, b.v6)))),
        (
            "b's address advertised behind an option",
            false,
            ether(m, a.mac, 0x86dd, &ipv6(a.v6, 0, &hop_by_hop(58, &neighbour(136, b.v6)))),
        ),
        ("router advertisement", false, ether(m, a.mac, 0x86dd, &ipv6(a.v6, 58, &neighbour(134, a.v6)))),
        ("redirect", false, ether(m, a.mac, 0x86dd, &ipv6(a.v6, 58, &neighbour(137, a.v6)))),
        ("straight to b's MAC", false, ether(b.mac, a.mac, 0x0800, &ipv4(a.v4))),
        ("another protocol", false, ether(m, a.mac, 0x88cc, &[])),
    ];
    let config = CaptureConfig { device: Some("mesh0".into()), ..CaptureConfig::default() };
    let sender = Sender::open_in(&a.ns.netns, "eth0").unwrap();
    for (guarded, call) in [(false, 0), (true, 0), (true, 1)] {
        // A new namespace starts with br_netfilter on where the kernel has it.
        node.host.sh(&format!(
            "sysctl -qw net.bridge.bridge-nf-call-iptables={call} net.bridge.bridge-nf-call-ip6tables={call}"
        ));
        if guarded {
            nft.commit(&checks(&node)).unwrap();
        }
        let mut on_bridge = Capture::open_in(&node.host.netns, &config).unwrap();
        let mut at_b = Capture::open_in(&b.ns.netns, &CaptureConfig::default()).unwrap();
        for (i, (_, _, frame)) in frames.iter().enumerate() {
            let mut marked = frame.clone();
            marked.extend_from_slice(format!("mesh-frame-{i:05}").as_bytes());
            sender.send(&marked).unwrap();
        }
        let mut seen = vec![false; frames.len()];
        let mut note = |data: &[u8]| {
            let tail = data.len().checked_sub(16).and_then(|at| data.get(at..)).unwrap_or_default();
            if let Some(i) = std::str::from_utf8(tail).ok().and_then(|t| t.strip_prefix("mesh-frame-")) {
                seen[i.parse::<usize>().unwrap()] = true;
            }
        };
        on_bridge.read_for(Duration::from_millis(300), |f| note(f.data)).unwrap();
        let mut leaked = 0;
        at_b.read_for(Duration::from_millis(100), |f| {
            leaked += usize::from(f.data.ends_with(b"mesh-frame-00022"));
        })
        .unwrap();
        assert_eq!(leaked, 0, "isolated ports let a frame through");
        assert_eq!(on_bridge.statistics().unwrap().dropped, 0);
        for (seen, (what, honest, _)) in seen.iter().zip(&frames) {
            if guarded {
                assert_eq!(seen, honest, "{what}");
            } else {
                // Without the checks all arrive, but for what is not addressed to the bridge and, in
                // a VLAN, has no device there: so it is the checks that stop the others.
                let stopped = *what == "straight to b's MAC";
                assert!(*seen != stopped, "{what}: seen without the checks: {seen}");
            }
        }
    }
    assert!(a.ns.pings(GATEWAY4) && a.ns.pings(GATEWAY6), "an honest pod is hindered");
    assert!(a.ns.pings(&b.v4.to_string()) && a.ns.pings(&b.v6.to_string()), "honest pods are hindered");
    let text = node.host.sh("nft list table bridge meshd");
    for wanted in [
        r#"iifname . ether saddr . ip saddr @pod4 accept"#,
        r#"iifname . ether saddr . arp saddr ip @pod4 iifname . arp saddr ether . arp saddr ip @pod4 accept"#,
        r#"iifname . ether saddr . ip6 saddr @pod6 accept"#,
        r#"icmpv6 type nd-router-advert"#,
    ] {
        assert!(text.contains(wanted), "{wanted} not in\n{text}");
    }
}

/// What came back from a service address, asked from inside a pod.
fn ask(pod: &Pod, address: SocketAddr) -> Option<String> {
    pod.ns
        .netns
        .run(|| {
            let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(1)).ok()?;
            stream.set_read_timeout(Some(Duration::from_secs(2))).ok()?;
            let mut text = String::new();
            stream.read_to_string(&mut text).ok()?;
            Some(text)
        })
        .unwrap()
}

fn serve(pod: &Pod, name: &'static str) {
    let listener = pod.ns.netns.run(|| TcpListener::bind("[::]:8080").unwrap()).unwrap();
    // Ends with the process; the socket keeps the namespace alive, not its name.
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let _ = stream.write_all(name.as_bytes());
        }
    });
}

/// A service address that leads to a pod of the same node, with br_netfilter off and on: isolated ports
/// with it off, ports that are kept apart by the checks with it on.
#[test]
fn a_pod_reaches_a_pod_of_its_node_through_a_translated_address() {
    let node = Node::new(2, true);
    let [a, b] = node.pods.as_slice() else { unreachable!() };
    let services: [IpAddr; 2] = ["10.99.0.1".parse().unwrap(), "fd99::1".parse().unwrap()];
    serve(a, "a");
    serve(b, "b");
    let mut nft = Blocking::open_in(&node.host.netns).unwrap();
    let mut rtnl = node.host.rtnl();
    nft.commit(&checks(&node)).unwrap();
    let inet = Table::new(TableFamily::Inet, "services");
    let r = || Rule::new(TableFamily::Inet);
    for (call, isolated, expected) in [(0, true, true), (1, false, true), (1, true, false)] {
        node.host.sh(&format!(
            "sysctl -qw net.bridge.bridge-nf-call-iptables={call} net.bridge.bridge-nf-call-ip6tables={call}"
        ));
        for pod in &node.pods {
            let change = BridgePortChange {
                isolated: Some(isolated),
                hairpin: Some(true),
                ..BridgePortChange::default()
            };
            rtnl.set_bridge_port(pod.port_index, change).unwrap();
        }
        for (target, answer) in [(b, "b"), (a, "a")] {
            let mut tx = Transaction::new();
            tx.delete_table(&inet).add_table(&inet, &TableOptions::default());
            tx.add_chain(&inet, &Chain::nat("pre", Hook::Prerouting, -100));
            tx.add_chain(&inet, &Chain::nat("post", Hook::Postrouting, 100));
            for (service, pod) in services.into_iter().zip([IpAddr::from(target.v4), target.v6.into()]) {
                tx.add_rule(
                    &inet,
                    "pre",
                    &r().daddr(service.into()).l4proto(6).dport(80).dnat(pod, Some(8080)),
                );
                tx.add_rule(&inet, "post", &r().saddr(pod.into()).daddr(pod.into()).masquerade());
            }
            nft.commit(&tx).unwrap();
            for service in services {
                let got = ask(a, SocketAddr::new(service, 80));
                let wanted = expected.then(|| answer.to_owned());
                assert_eq!(got, wanted, "nf-call {call}, isolated {isolated}, {service} -> {answer}");
            }
        }
        // Past the bridge: never.
        let sender = Sender::open_in(&a.ns.netns, "eth0").unwrap();
        let mut at_b = Capture::open_in(&b.ns.netns, &CaptureConfig::default()).unwrap();
        let mut frame = ether(b.mac, a.mac, 0x0800, &ipv4(a.v4));
        frame.extend_from_slice(b"mesh-frame-00000");
        sender.send(&frame).unwrap();
        let mut to_all = ether(Mac([0xff; 6]), a.mac, 0x0800, &ipv4(a.v4));
        to_all.extend_from_slice(b"mesh-frame-00000");
        sender.send(&to_all).unwrap();
        let mut leaked = 0;
        at_b.read_for(Duration::from_millis(200), |f| {
            leaked += usize::from(f.data.ends_with(b"mesh-frame-00000"))
        })
        .unwrap();
        assert_eq!(leaked, 0, "nf-call {call}, isolated {isolated}: a frame went past the bridge");
    }
}
