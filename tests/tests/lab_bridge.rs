//! Pods of one node, and pods that lie.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test fails by panicking, and tells what it measured"
)]

use std::time::Duration;

use mesh_lab::{Family, Host, Options, Pod, poll_until};
use mesh_tests::{FAMILIES, every, options, up};

const SECOND: Duration = Duration::from_secs(1);

fn set_bridge_netfilter(host: &Host, value: &str) {
    for name in ["bridge-nf-call-iptables", "bridge-nf-call-ip6tables"] {
        host.exec_ok(&["sh", "-c", &format!("echo {value} > /proc/sys/net/bridge/{name}")]).unwrap();
    }
    // There is no notice of it in Linux: the daemon looks every second.
    let wanted = if value == "1" { "isolated off" } else { "isolated on" };
    poll_until("the ports are set for it", 5 * SECOND, || {
        let ports = host.exec_ok(&["bridge", "-d", "link", "show"]).unwrap_or_default();
        ports.matches("isolated o").count() == 2 && ports.matches(wanted).count() == 2
    })
    .unwrap();
}

/// The Ethernet address of a pod's eth0.
fn mac_of(pod: &Pod) -> String {
    let link = pod.exec_ok(&["ip", "-o", "link", "show", "eth0"]).unwrap();
    let mut words = link.split_whitespace().skip_while(|word| *word != "link/ether");
    words.nth(1).expect("an Ethernet address").to_owned()
}

#[test]
fn pods_of_one_node_talk_directly_and_through_a_translated_address() {
    let lab = up(Options { nodes: 1, pods: 2, ..options("t-bridge") });
    let host = lab.host(0);
    let (a, b) = (host.pod(0).unwrap(), host.pod(1).unwrap());
    host.exec_ok(&["sh", "-c", "echo 1 > /proc/sys/net/ipv4/conf/all/send_redirects"]).unwrap();
    // What a service does: an address of its own, translated on the node.
    let rules = format!(
        "table inet service {{ chain pre {{ type nat hook prerouting priority -100; \
         ip daddr 10.96.0.10 dnat ip to {}; ip6 daddr fd96::10 dnat ip6 to {}; }}; }}",
        b.address(Family::V4),
        b.address(Family::V6)
    );
    host.exec_ok(&["nft", &rules]).unwrap();
    for bridge_netfilter in ["0", "1"] {
        set_bridge_netfilter(&host, bridge_netfilter);
        for (from, to) in [(&a, &b), (&b, &a)] {
            for family in FAMILIES {
                let stats = from.ping(to.address(family), every(Duration::from_millis(10), 100)).unwrap();
                assert!(stats.all_answered(), "bridge-nf-call {bridge_netfilter}, {family:?}: {stats:?}");
            }
        }
        for service in ["10.96.0.10", "fd96::10"] {
            let stats = a.ping(service.parse().unwrap(), every(Duration::from_millis(10), 100)).unwrap();
            assert!(stats.all_answered(), "bridge-nf-call {bridge_netfilter}, {service}: {stats:?}");
        }
    }
}

#[test]
fn a_pod_that_forges_addresses_gains_nothing() {
    let lab = up(Options { nodes: 2, pods: 2, ..options("t-spoof") });
    let host = lab.host(0);
    let (attacker, victim) = (host.pod(0).unwrap(), host.pod(1).unwrap());
    let remote = lab.host(1).pod(0).unwrap();
    for bridge_netfilter in ["0", "1"] {
        set_bridge_netfilter(&host, bridge_netfilter);
        let (victim4, victim6) =
            (victim.address(Family::V4).to_string(), victim.address(Family::V6).to_string());
        let mac = mac_of(&victim);

        // It takes the victim's addresses beside its own, and uses them.
        attacker.exec_ok(&["ip", "addr", "add", &format!("{victim4}/32"), "dev", "eth0"]).unwrap();
        attacker.exec_ok(&["ip", "addr", "add", &format!("{victim6}/128"), "dev", "eth0", "nodad"]).unwrap();
        for (source, family) in [(&victim4, Family::V4), (&victim6, Family::V6)] {
            let target = remote.address(family).to_string();
            let out =
                attacker.exec(&["ping", "-c", "3", "-i", "0.05", "-W", "1", "-I", source, &target]).unwrap();
            assert!(!out.status.success(), "a packet with the victim's {family:?} address was answered");
        }
        // It asks for its gateway as the victim: whoever believes the question sends it the victim's packets.
        let gateway = host.mesh_addresses().unwrap();
        for (flush, gateway) in [("-4", gateway.0.to_string()), ("-6", gateway.1.to_string())] {
            attacker.exec_ok(&["ip", flush, "neigh", "flush", "dev", "eth0", "nud", "permanent"]).unwrap();
            let source = if flush == "-4" { &victim4 } else { &victim6 };
            let out =
                attacker.exec(&["ping", "-c", "2", "-i", "0.05", "-W", "1", "-I", source, &gateway]).unwrap();
            assert!(!out.status.success(), "the gateway answered {source} at the wrong port");
        }
        attacker.exec_ok(&["ip", "addr", "del", &format!("{victim4}/32"), "dev", "eth0"]).unwrap();
        attacker.exec_ok(&["ip", "addr", "del", &format!("{victim6}/128"), "dev", "eth0"]).unwrap();

        // It takes the victim's Ethernet address.
        let own = mac_of(&attacker);
        let gateway4 = gateway.0.to_string();
        attacker.exec_ok(&["ip", "link", "set", "eth0", "address", &mac]).unwrap();
        let out = attacker.exec(&["ping", "-c", "3", "-i", "0.05", "-W", "1", &gateway4]).unwrap();
        assert!(!out.status.success(), "a frame with the victim's Ethernet address was answered");
        attacker.exec_ok(&["ip", "link", "set", "eth0", "address", &own]).unwrap();

        // The host still knows the victim where it is.
        let neighbours = host.exec_ok(&["ip", "neigh", "show", "dev", "mesh0"]).unwrap();
        for address in [&victim4, &victim6] {
            let line =
                neighbours.lines().find(|line| line.starts_with(&format!("{address} "))).unwrap_or_default();
            assert!(line.contains(&*mac) && line.contains("PERMANENT"), "{neighbours}");
        }

        // And the victim has lost nothing.
        for family in FAMILIES {
            let stats = remote.ping(victim.address(family), every(Duration::from_millis(10), 50)).unwrap();
            assert!(stats.all_answered(), "bridge-nf-call {bridge_netfilter}, {family:?}: {stats:?}");
        }
    }
}
