//! Datagrams that come from the port of another socket, over a real link.

#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use common::Ns;
use mesh_sys::rtnl::{LinkChange, VethPeer, VethSpec};
use mesh_sys::udp::{Destination, SendBatch, Sockets, narrow, send_from, send_whole_from};

/// The two ends of a link, with addresses of both families.
fn link() -> [Ns; 2] {
    let (here, there) = (Ns::new("here"), Ns::new("there"));
    let netns = Some(there.netns.try_clone().unwrap());
    let peer = VethPeer { name: "link".into(), mac: None, mtu: None, netns };
    let spec = VethSpec { name: "link".into(), mac: None, mtu: None, master: None, peer };
    here.rtnl().create_veth(spec).unwrap();
    for (end, number) in [(&here, 1), (&there, 2)] {
        let mut rtnl = end.rtnl();
        let index = rtnl.link("link").unwrap().unwrap().index;
        rtnl.set_link(index, LinkChange { up: Some(true), ..LinkChange::default() }).unwrap();
        end.sh(&format!("ip address add 192.0.2.{number}/24 dev link"));
        end.sh(&format!("ip address add 2001:db8::{number}/64 dev link nodad"));
    }
    // The kernel takes a moment to see that there is a carrier.
    let reaches = || {
        std::thread::sleep(Duration::from_millis(100));
        ["192.0.2.2", "2001:db8::2"].iter().all(|address| here.pings(address))
    };
    assert!((0..50).any(|_| reaches()), "the two ends of the link do not reach each other");
    [here, there]
}

#[test]
fn a_datagram_comes_from_the_port_of_another_socket_and_that_goes_on_as_before() {
    let [here, there] = link();
    for (from, to) in [("192.0.2.1:51820", "192.0.2.2:6783"), ("[2001:db8::1]:51820", "[2001:db8::2]:6783")] {
        let (from, to): (SocketAddr, SocketAddr) = (from.parse().unwrap(), to.parse().unwrap());
        let owner = here.netns.run(|| UdpSocket::bind(from).unwrap()).unwrap();
        let receiver = there.netns.run(|| UdpSocket::bind(to).unwrap()).unwrap();
        for socket in [&owner, &receiver] {
            socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        }
        for payload in [&b""[..], b"odd", &[7; 1200]] {
            here.netns.run(|| send_from(from.port(), to, payload)).unwrap().unwrap();
            let mut bytes = [0; 2000];
            let (length, seen) = receiver.recv_from(&mut bytes).unwrap();
            assert_eq!((&bytes[..length], seen), (payload, from));
        }
        // Answers go to the owner of the port, which can send as well.
        receiver.send_to(b"answer", from).unwrap();
        let mut bytes = [0; 16];
        assert_eq!(owner.recv_from(&mut bytes).unwrap(), (6, to));
        owner.send_to(b"more", to).unwrap();
        assert_eq!(receiver.recv_from(&mut bytes).unwrap(), (4, from));
    }
}

#[test]
fn without_a_route_it_is_an_error() {
    let here = Ns::new("alone");
    let to = "198.51.100.1:6783".parse().unwrap();
    let failed = here.netns.run(|| send_from(51820, to, b"x")).unwrap();
    assert_eq!(failed.unwrap_err().kind(), std::io::ErrorKind::NetworkUnreachable);
}

/// What nftables at the receiver has counted of a kind of packets.
fn counted(there: &Ns, comment: &str) -> u64 {
    let rules = there.sh("nft list chain inet count input");
    let line = rules.lines().find(|line| line.contains(comment)).unwrap();
    let packets = line.split("packets ").nth(1).unwrap();
    packets.split(' ').next().unwrap().parse().unwrap()
}

#[test]
fn a_narrow_path_is_told_to_the_kernel_and_what_measures_it_ignores_that() {
    let [here, there] = link();
    // Before fragments are put together again: the first of several, and what nobody may cut up.
    let rules = "table inet count {
        chain input {
            type filter hook prerouting priority -450
            ip protocol udp ip frag-off & 0x2000 != 0 counter comment first-v4
            frag more-fragments 1 counter comment first-v6
            ip protocol udp ip frag-off & 0x4000 != 0 counter comment whole-v4
            meta l4proto udp meta length > 1300 counter comment long
        }
    }";
    there.sh(&format!("nft -f - <<'end'\n{rules}\nend"));
    let port = 51820;
    let sockets = here.netns.run(|| Sockets::bind(port).unwrap()).unwrap();
    sockets.allow_fragments().unwrap();
    for (number, to) in ["192.0.2.2:6783", "[2001:db8::2]:6783"].into_iter().enumerate() {
        let to: SocketAddr = to.parse().unwrap();
        let receiver = there.netns.run(|| UdpSocket::bind(to).unwrap()).unwrap();
        receiver.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let mut bytes = [0; 2000];
        let mut batch = SendBatch::new(10_000);
        let mut send = |count: usize| {
            for _ in 0..count {
                batch.space(1312).unwrap().fill(7);
                batch.commit(&Destination { address: to, source: None }, 1312);
            }
            let report = here.netns.run(|| batch.send(&sockets)).unwrap();
            assert_eq!((report.sent, report.dropped), (count, 0), "{report:?}");
            for _ in 0..count {
                assert_eq!(receiver.recv(&mut bytes).unwrap(), 1312);
            }
        };
        let first = ["first-v4", "first-v6"][number];
        send(3);
        assert_eq!(counted(&there, first), 0);
        let long = counted(&there, "long");
        here.netns.run(|| narrow(port, to, 1300)).unwrap().unwrap();
        send(1);
        assert_eq!(counted(&there, first), 1, "cut up here");
        // A run of datagrams goes out one by one then.
        send(3);
        assert_eq!((counted(&there, first), counted(&there, "long")), (4, long));
        assert!(sockets.iter().all(mesh_sys::udp::UdpSocket::segmentation), "runs to others go as before");
        here.netns.run(|| send_whole_from(port, to, &[7; 1400])).unwrap().unwrap();
        let mut bytes = [0; 2000];
        assert_eq!(receiver.recv(&mut bytes).unwrap(), 1400);
        assert_eq!(counted(&there, "long"), long + 1, "in one piece");
        // The device carries no more.
        let failed = here.netns.run(|| send_whole_from(port, to, &[7; 1480])).unwrap();
        assert_eq!(failed.unwrap_err().raw_os_error(), Some(nix::libc::EMSGSIZE));
    }
    assert_eq!(counted(&there, "whole-v4"), 1, "and only that one must not be cut up");
}
