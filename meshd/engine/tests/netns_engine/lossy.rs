//! Over a path that drops, repeats, damages and reorders, the same way each time.

use std::net::UdpSocket;
use std::time::{Duration, Instant};

use nix::sys::socket::{setsockopt, sockopt};

use crate::support::relay::{Mischief, Relay};
use crate::support::{Kind, Link, Underlay, require_root};

const MESH: [Kind; 2] = [Kind::Mesh, Kind::Mesh];

#[test]
fn tcp_is_whole_where_every_fiftieth_datagram_is_lost() {
    require_root();
    for other in [Kind::Mesh, Kind::Go, Kind::Boringtun] {
        let link = Link::new([Kind::Mesh, other], Underlay::V4, None);
        let relay = Relay::between(&link, Mischief { drop: 50, ..Mischief::default() });
        let started = Instant::now();
        link.check_tcp(8 << 20);
        println!("16 MiB with {other:?} in {:?}: {}", started.elapsed(), relay.counts);
    }
}

#[test]
fn tcp_is_whole_where_datagrams_are_lost_repeated_damaged_and_reordered() {
    require_root();
    let link = Link::new(MESH, Underlay::V4, None);
    let mischief = Mischief { drop: 53, duplicate: 7, replay: 13, damage: 17, reorder: 11 };
    let relay = Relay::between(&link, mischief);
    let started = Instant::now();
    link.check_tcp(8 << 20);
    println!("16 MiB in {:?}: {}", started.elapsed(), relay.counts);
}

/// Datagrams under way at a time.
const WINDOW: u32 = 200;

#[test]
fn what_is_not_lost_is_delivered_once_and_nothing_else_is() {
    require_root();
    let link = Link::new(MESH, Underlay::V4, None);
    let relay = Relay::between(&link, Mischief { drop: 0, duplicate: 2, replay: 3, damage: 5, reorder: 7 });
    let [a, b] = &link.ends;
    // Without a session only 128 packets would wait for it.
    assert_eq!(a.namespace.ping_loss("-c 1 -W 5 10.9.0.2"), 0.0, "{}", link.logs());
    for address in link.inside(1) {
        let receiver = b.namespace.inside(|| UdpSocket::bind((address, 0)).unwrap());
        receiver.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        setsockopt(&receiver, sockopt::RcvBufForce, &(8 << 20)).unwrap();
        let sender = a
            .namespace
            .inside(|| UdpSocket::bind((link.inside(0)[usize::from(address.is_ipv6())], 0)).unwrap());
        sender.connect(receiver.local_addr().unwrap()).unwrap();

        const TOTAL: u32 = 15_000;
        let datagram = |number: u32| {
            // Runs of equal length, so that they are joined on the way.
            let length = 100 + (number / 20 % 10) as usize * 100;
            number.to_be_bytes().repeat(length / 4)
        };
        let mut delivered = vec![false; TOTAL as usize];
        let mut buffer = [0; 2048];
        let (mut sent, mut received) = (0, 0);
        while received < TOTAL {
            while sent < TOTAL && sent - received < WINDOW {
                sender.send(&datagram(sent)).unwrap();
                sent += 1;
            }
            let length = receiver.recv(&mut buffer).unwrap_or_else(|error| {
                panic!("{received} of {sent} datagrams arrived: {error}\n{}", relay.counts)
            });
            let number = u32::from_be_bytes(buffer[..4].try_into().unwrap());
            assert!(buffer[..length] == datagram(number), "datagram {number} is damaged");
            assert!(!std::mem::replace(&mut delivered[number as usize], true), "{number} arrived twice");
            received += 1;
        }
        receiver.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        assert!(receiver.recv(&mut buffer).is_err(), "nothing comes after the last");
    }
    println!("{}", relay.counts);
}
