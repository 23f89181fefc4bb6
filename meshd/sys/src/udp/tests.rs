//! Over loopback: what is sent arrives, whole, in order, from the right address.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};

use proptest::collection::vec;
use proptest::prelude::*;

use super::control::{RECEIVE_WORDS, Received, SEND_WORDS, Writer, read};
use super::*;

fn to(address: IpAddr, port: u16) -> Destination {
    Destination { address: SocketAddr::new(address, port), source: None }
}

fn fill(batch: &mut SendBatch, to: &Destination, datagrams: &[Vec<u8>]) {
    for datagram in datagrams {
        batch.space(datagram.len()).unwrap()[..datagram.len()].copy_from_slice(datagram);
        batch.commit(to, datagram.len());
    }
}

/// Receives until `count` datagrams are there or two seconds are over.
fn receive(socket: &UdpSocket, count: usize) -> Vec<(SocketAddr, Option<Source>, Vec<u8>)> {
    let mut batch = ReceiveBatch::new(8);
    let mut datagrams = Vec::new();
    let deadline = Instant::now() + Duration::from_secs(2);
    while datagrams.len() < count && Instant::now() < deadline {
        match batch.receive(socket) {
            Ok(_pieces) => {
                let (pieces, data) = batch.parts();
                for piece in pieces {
                    datagrams.extend(piece.datagrams().map(|d| (piece.from, piece.to, data[d].to_vec())));
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(error) => panic!("receiving: {error}"),
        }
    }
    datagrams
}

#[test]
fn both_families_share_a_random_port_and_carry_batches() {
    let (a, b) = (Sockets::bind(0).unwrap(), Sockets::bind(0).unwrap());
    assert_ne!(a.port(), 0);
    let mut batch = SendBatch::new(1 << 20);
    for address in [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)] {
        let Some(receiver) = b.for_address(address) else { continue };
        // Runs of one length, a shorter one that ends a run, an empty one, a change of length.
        let sizes = [[1400; 50].as_slice(), &[700], &[0], &[1400; 3], &[100; 70]].concat();
        let datagrams: Vec<_> = sizes.iter().enumerate().map(|(n, size)| vec![n as u8; *size]).collect();
        fill(&mut batch, &to(address, b.port()), &datagrams);
        let report = batch.send(&a);
        assert_eq!(report, SendReport { sent: datagrams.len(), ..SendReport::default() });
        assert!(batch.is_empty());
        let received = receive(receiver, datagrams.len());
        assert_eq!(received.iter().map(|(_, _, d)| d.clone()).collect::<Vec<_>>(), datagrams);
        for (from, to, _) in received {
            assert_eq!(from, SocketAddr::new(address, a.port()));
            assert_eq!(to.unwrap().address, address);
        }
    }
}

#[test]
fn the_source_address_is_kept_and_given_up_when_it_is_not_ours() {
    let (a, b) = (Sockets::bind(0).unwrap(), Sockets::bind(0).unwrap());
    let mut batch = SendBatch::new(1 << 16);
    for (source, stale) in [([127, 0, 0, 9], false), ([192, 0, 2, 77], true)] {
        let source = Source { address: Ipv4Addr::from(source).into(), interface: 0 };
        let destination = Destination { source: Some(source), ..to(Ipv4Addr::LOCALHOST.into(), b.port()) };
        fill(&mut batch, &destination, &[vec![1; 500], vec![2; 500]]);
        let report = batch.send(&a);
        assert_eq!((report.sent, report.dropped, report.stale_source), (2, 0, stale.then_some(source)));
        let received = receive(b.v4.as_ref().unwrap(), 2);
        assert_eq!(received.len(), 2);
        assert_eq!(received[0].0.ip() == source.address, !stale);
    }
}

#[test]
fn a_run_too_large_for_the_path_is_sent_one_by_one() {
    // Loopback has an MTU of 65,536: a run of 40,000-byte datagrams is longer than a piece may be, so each goes alone;
    // a datagram longer than UDP allows is refused and the ones around it are not.
    let (a, b) = (Sockets::bind(0).unwrap(), Sockets::bind(0).unwrap());
    let mut batch = SendBatch::new(1 << 20);
    let destination = to(Ipv4Addr::LOCALHOST.into(), b.port());
    fill(&mut batch, &destination, &[vec![1; 40_000], vec![2; 40_000], vec![3; 65_530], vec![4; 10]]);
    let report = batch.send(&a);
    assert_eq!((report.sent, report.dropped, report.error), (3, 1, Some(nix::errno::Errno::EMSGSIZE)));
    let received = receive(b.v4.as_ref().unwrap(), 3);
    assert_eq!(received.iter().map(|(_, _, d)| d[0]).collect::<Vec<_>>(), [1, 2, 4]);
}

#[test]
fn a_taken_port_is_refused() {
    let first = Sockets::bind(0).unwrap();
    let error = Sockets::bind(first.port()).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::AddrInUse);
}

#[test]
fn a_full_batch_says_so() {
    let mut batch = SendBatch::new(1000);
    assert!(batch.space(1001).is_none());
    batch.space(600).unwrap().fill(1);
    batch.commit(&to(Ipv4Addr::LOCALHOST.into(), 1), 600);
    assert!(batch.space(600).is_none() && !batch.has_space(401));
    assert!(batch.space(400).is_some() && batch.has_space(400));
    batch.clear();
    assert!(batch.space(1000).is_some());
}

proptest! {
    #[test]
    fn a_batch_gives_back_what_was_put_in(entries in vec((0u16..3, 0usize..200), 0..200)) {
        let mut batch = SendBatch::new(1 << 16);
        let mut expected = Vec::new();
        for (n, (port, size)) in entries.into_iter().enumerate() {
            let datagram = vec![n as u8; size];
            let destination = to(Ipv4Addr::LOCALHOST.into(), port + 1);
            if batch.space(size).is_none() {
                break;
            }
            fill(&mut batch, &destination, std::slice::from_ref(&datagram));
            expected.push((destination, datagram));
        }
        let back: Vec<_> = batch.iter().map(|(to, datagram)| (*to, datagram.to_vec())).collect();
        prop_assert_eq!(back, expected);
    }

    #[test]
    fn control_messages_of_the_kernel_never_panic(words in any::<[usize; RECEIVE_WORDS]>(), length in 0usize..200) {
        let _parsed = read(&words, length);
    }

    #[test]
    fn a_source_is_read_back_as_written(v4: bool, bits: u128, interface in 1u32..) {
        let address = if v4 { IpAddr::V4(Ipv4Addr::from_bits(bits as u32)) } else { Ipv6Addr::from_bits(bits).into() };
        let local = matches!(address, IpAddr::V6(address) if address.is_unicast_link_local());
        let source = Source { address, interface: if local { interface } else { 0 } };
        let mut words = [0; SEND_WORDS];
        let mut writer = Writer::new(&mut words);
        writer.segment_size(1400);
        writer.source(&source);
        let length = writer.finish();
        let read = read(&words, length);
        prop_assert_eq!(read, Received { segment_size: None, destination: Some(source) });
    }
}

#[test]
fn a_group_shares_a_port_among_itself_and_each_sender_has_one_of_it() {
    const SENDERS: usize = 40;
    let group = SocketGroup::bind(0, 4).unwrap();
    let taken = Sockets::bind(group.port()).unwrap_err();
    assert_eq!(taken.kind(), std::io::ErrorKind::AddrInUse, "nobody else gets in");
    assert!(SocketGroup::bind(group.port(), 4).is_err(), "not even another group");
    let senders: Vec<Sockets> = (0..SENDERS).map(|_| Sockets::bind(0).unwrap()).collect();
    for address in [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)] {
        if group.of(0).for_address(address).is_none() {
            continue;
        }
        let to = Destination { address: SocketAddr::new(address, group.port()), source: None };
        for round in 0..3u8 {
            for sender in &senders {
                let mut batch = SendBatch::new(64);
                batch.space(1).unwrap()[0] = round;
                batch.commit(&to, 1);
                assert_eq!(batch.send(sender).sent, 1);
            }
        }
        let received: Vec<_> = (0..4)
            .map(|number| {
                let socket = group.of(number).for_address(address).unwrap();
                let mut batch = ReceiveBatch::new(8);
                let mut received = Vec::new();
                while batch.receive(socket).is_ok() {
                    let (pieces, data) = batch.parts();
                    for piece in pieces {
                        received.extend(piece.datagrams().map(|place| (piece.from, data[place][0])));
                    }
                }
                received
            })
            .collect();
        assert_eq!(received.iter().map(Vec::len).sum::<usize>(), 3 * SENDERS);
        assert!(received.iter().filter(|at| !at.is_empty()).count() > 1, "all came in at one socket");
        for at in &received {
            for (from, _) in at {
                let rounds: Vec<u8> =
                    at.iter().filter(|(other, _)| other == from).map(|(_, round)| *round).collect();
                assert_eq!(rounds, [0, 1, 2], "what one sender sends stays together and in order");
            }
        }
    }
}
