//! Who reaches whom, with br_netfilter off and on.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use mesh_sys::nft::{Chain, Hook, Rule, Table, TableFamily, TableOptions, Transaction};

use crate::node::{GATEWAY4, GATEWAY6, Node, Ns, Pod};

/// What came back from a service address.
fn ask(from: &Ns, address: SocketAddr) -> Option<String> {
    from.netns
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

/// What kube-proxy does for a service: translated for pods and for the host itself, and masqueraded where a pod
/// reaches itself.
fn service(node: &Node, services: [IpAddr; 2], target: &Pod) {
    let table = Table::new(TableFamily::Inet, "services");
    let r = || Rule::new(TableFamily::Inet);
    let mut tx = Transaction::new();
    tx.delete_table(&table).add_table(&table, &TableOptions::default());
    tx.add_chain(&table, &Chain::nat("pre", Hook::Prerouting, -100));
    tx.add_chain(&table, &Chain::nat("out", Hook::Output, -100));
    tx.add_chain(&table, &Chain::nat("post", Hook::Postrouting, 100));
    for (service, pod) in services.into_iter().zip(target.addresses()) {
        for chain in ["pre", "out"] {
            tx.add_rule(&table, chain, &r().daddr(service.into()).l4proto(6).dport(80).dnat(pod, Some(8080)));
        }
        tx.add_rule(&table, "post", &r().saddr(pod.into()).daddr(pod.into()).masquerade());
        // What the host sends was given the underlay's address, before it was translated.
        tx.add_rule(&table, "post", &r().oifname("mesh0").saddr_not(cluster(pod)).masquerade());
    }
    node.nft().commit(&tx).unwrap();
}

fn cluster(ip: IpAddr) -> ipnet::IpNet {
    if ip.is_ipv4() { "10.32.0.0/12" } else { "fd32::/48" }.parse().unwrap()
}

#[test]
fn pods_reach_the_gateway_each_other_and_services_with_br_netfilter_off_and_on() {
    let node = Node::new();
    let mut plane = node.plane();
    let [a, b] = node.pods.as_slice() else { unreachable!() };
    serve(a, "a");
    serve(b, "b");
    let services: [IpAddr; 2] = ["10.99.0.1".parse().unwrap(), "fd99::1".parse().unwrap()];
    for on in [false, true, false] {
        node.bridge_netfilter(on);
        node.reach(&mut plane, &node.desired(!on));
        for pod in [a, b] {
            assert!(pod.ns.pings(GATEWAY4) && pod.ns.pings(GATEWAY6), "nf-call {on}: gateway");
            for to in node.pods.iter().flat_map(Pod::addresses) {
                assert!(pod.ns.pings(to), "nf-call {on}: {} to {to}", pod.v4);
                assert!(node.host.pings(to), "nf-call {on}: host to {to}");
            }
        }
        for (target, answer) in [(b, "b"), (a, "a")] {
            service(&node, services, target);
            for address in services {
                let got = ask(&a.ns, SocketAddr::new(address, 80));
                assert_eq!(got.as_deref(), Some(answer), "nf-call {on}: a to {address} -> {answer}");
                let got = ask(&node.host, SocketAddr::new(address, 80));
                assert_eq!(got.as_deref(), Some(answer), "nf-call {on}: host to {address} -> {answer}");
            }
        }
    }
}

#[test]
fn a_pod_is_told_that_it_has_no_way_out_of_the_cluster() {
    let node = Node::new();
    let mut plane = node.plane();
    node.reach(&mut plane, &node.desired(true));
    for to in ["192.0.2.2", "2001:db8::2"] {
        let output = node.pods[0].ns.try_sh(&format!("ping -c5 -i0.2 -w2 -n {to}"));
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(!output.status.success(), "a pod got out to {to}");
        assert!(text.contains("filtered") || text.contains("prohibited"), "{to}: {text}");
    }
}
