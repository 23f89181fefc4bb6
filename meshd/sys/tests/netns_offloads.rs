//! What this kernel hands over and takes: real superpackets, cut up, joined and handed back. Needs root.
//!
//! Two namespaces with a TUN device each, and a thread for each direction as the wire between them.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test fails by panicking, and prints what it measured"
)]

mod common;

use std::io::{self, IoSlice, Read as _, Write as _};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::ops::Range;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::Ns;
use mesh_sys::tun::{Coalescer, GsoKind, Superpacket, Tun, VnetHeader, segment};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessage, MsgFlags, SockaddrStorage, sendmsg, setsockopt, sockopt};

const LIMIT: Duration = Duration::from_secs(20);
const ARENA: usize = 512 << 10;
/// Longest packet or superpacket.
const LONGEST: usize = 65_575;

/// A namespace with a TUN device, 10.7.0.N and fd07::N.
struct End {
    ns: Ns,
    tun: Tun,
}

impl End {
    fn new(number: u8) -> Self {
        let ns = Ns::new("tun");
        let tun = ns.netns.run(|| Tun::open("t0", 1)).unwrap().unwrap();
        ns.sh("sysctl -qw net.ipv4.tcp_ecn=1");
        ns.sh(&format!("ip addr add 10.7.0.{number}/24 dev t0"));
        ns.sh(&format!("ip addr add fd07::{number}/64 dev t0 nodad"));
        ns.sh("ip link set t0 mtu 1420 up");
        Self { ns, tun }
    }

    fn read(&self, packet: &mut [u8]) -> io::Result<(VnetHeader, usize)> {
        self.tun.queues()[0].read(packet)
    }

    fn write(&self, packet: &Superpacket<'_>, arena: &[u8]) -> io::Result<()> {
        self.tun.queues()[0].write(packet, arena)
    }

    fn run<T: Send>(&self, body: impl FnOnce() -> T + Send) -> T {
        self.ns.netns.run(body).unwrap()
    }
}

/// What passed in one direction.
#[derive(Debug, Default, Clone, Copy)]
struct Counts {
    /// Superpackets that the kernel handed over, by what they are made of.
    tcp4: usize,
    tcp6: usize,
    udp: usize,
    /// Packets that they, and all others, stood for.
    packets: usize,
    /// Superpackets that were cut up and joined to what they had been.
    restored: usize,
    /// What was written, and what of it was joined.
    written: usize,
    joined: usize,
    lost: usize,
    marked: usize,
}

/// What the wire does to packets: loses, and marks as having met congestion, one of so many; 0 is never.
#[derive(Debug, Clone, Copy)]
struct Wire {
    lose: usize,
    mark: usize,
}

/// Carries packets from one end to the other until it is told to stop.
fn carry(from: &End, to: &End, wire: Wire, stop: &AtomicBool) -> Counts {
    let mut counts = Counts::default();
    let mut packet = vec![0; LONGEST];
    let mut arena = vec![0; ARENA];
    let (mut coalescer, mut alone) = (Coalescer::new(true), Coalescer::new(true));
    while !stop.load(Ordering::Relaxed) {
        let mut fds = [PollFd::new(from.tun.queues()[0].as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::from(50u8)).unwrap();
        let mut used = 0;
        while used + 2 * LONGEST < ARENA {
            let (header, length) = match from.read(&mut packet) {
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => panic!("reading from the device: {error}"),
            };
            match header.gso {
                GsoKind::Tcp4 => counts.tcp4 += 1,
                GsoKind::Tcp6 => counts.tcp6 += 1,
                GsoKind::Udp => counts.udp += 1,
                GsoKind::None => {}
                GsoKind::Unknown(kind) => panic!("a superpacket of kind {kind}, which nobody asked for"),
            }
            let start = used;
            let mut ranges = Vec::new();
            let mut segments = segment(&header, &packet[..length]).unwrap();
            while let Some(length) = segments.write_next(&mut arena[used..]) {
                ranges.push(used..used + length);
                used += length;
            }
            counts.packets += ranges.len();
            if ranges.len() > 1 {
                counts.restored +=
                    restored(&mut alone, &arena[start..used], &ranges, &header, &packet[..length]);
            }
            for (number, range) in (counts.packets - ranges.len()..).zip(ranges) {
                let hit = |every: usize| every > 0 && number % every == every - 1;
                if hit(wire.lose) {
                    counts.lost += 1;
                    continue;
                }
                if hit(wire.mark) && mark_congestion(&mut arena[range.clone()]) {
                    counts.marked += 1;
                }
                coalescer.push(&arena, range);
            }
        }
        for packet in coalescer.finish(&mut arena) {
            counts.written += 1;
            counts.joined += usize::from(packet.pieces.len() > 1);
            to.write(&packet, &arena)
                .unwrap_or_else(|error| panic!("the kernel refuses {:?}: {error}", packet.header));
        }
        coalescer.clear();
    }
    counts
}

/// Whether the segments of a superpacket become that superpacket again. If one of them ends something or says
/// something about congestion, they may become several.
fn restored(
    coalescer: &mut Coalescer,
    segments: &[u8],
    ranges: &[Range<usize>],
    header: &VnetHeader,
    whole: &[u8],
) -> usize {
    let mut arena = segments.to_vec();
    let origin = ranges[0].start;
    for range in ranges {
        coalescer.push(&arena, range.start - origin..range.end - origin);
    }
    let joined: Vec<_> =
        coalescer.finish(&mut arena).map(|packet| (packet.header, packet.pieces.to_vec())).collect();
    coalescer.clear();
    let [(joined_header, pieces)] = joined.as_slice() else { return 0 };
    let bytes: Vec<u8> = pieces.iter().flat_map(|piece| arena[piece.clone()].iter().copied()).collect();
    // The length of the headers is a hint, and the kernel's own differs.
    let joined_header = VnetHeader { header_len: header.header_len, ..*joined_header };
    assert!(joined_header == *header && bytes == whole, "{header:?} became {joined_header:?}");
    1
}

/// Sets "congestion experienced" where the transport takes part in that (RFC 3168).
fn mark_congestion(packet: &mut [u8]) -> bool {
    if packet[0] >> 4 == 4 {
        if !matches!(packet[1] & 3, 1 | 2) {
            return false;
        }
        let before = u16::from_be_bytes([packet[0], packet[1]]);
        packet[1] |= 3;
        // RFC 1624: the checksum's change is that of the word.
        let sum = u32::from(!u16::from_be_bytes([packet[10], packet[11]]))
            + u32::from(!before)
            + u32::from(u16::from_be_bytes([packet[0], packet[1]]));
        let sum = (sum & 0xffff) + (sum >> 16);
        let sum = (sum & 0xffff) + (sum >> 16);
        packet[10..12].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    } else {
        if !matches!(packet[1] >> 4 & 3, 1 | 2) {
            return false;
        }
        packet[1] |= 0x30;
    }
    true
}

/// Runs `body` with both directions carried, and returns what passed.
fn connected(wire: Wire, body: impl FnOnce(&End, &End)) -> [Counts; 2] {
    let [a, b] = [End::new(1), End::new(2)];
    let offloads = a.tun.offloads();
    assert!(offloads.checksum && offloads.tcp && offloads.udp, "this kernel has them all: {offloads:?}");
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let carriers = [(&a, &b), (&b, &a)].map(|(from, to)| scope.spawn(|| carry(from, to, wire, &stop)));
        // The carriers end also when the body fails.
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| body(&a, &b)));
        stop.store(true, Ordering::Relaxed);
        let counts = carriers.map(|carrier| carrier.join().unwrap());
        outcome.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        counts
    })
}

/// A counter of the namespace's IP stack.
fn statistic(end: &End, table: &str, name: &str) -> u64 {
    let text = end.ns.sh("cat /proc/net/netstat");
    let mut lines = text.lines().filter_map(|line| line.strip_prefix(&format!("{table}: ")));
    let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
    let at = names.split(' ').position(|other| other == name).unwrap();
    values.split(' ').nth(at).unwrap().parse().unwrap()
}

/// Bytes that differ by their place.
fn pattern(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2).wrapping_add(1);
    let mut bytes = vec![0; length];
    for chunk in bytes.chunks_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        chunk.copy_from_slice(&state.to_le_bytes()[..chunk.len()]);
    }
    bytes
}

/// Both ends send each other `length` bytes at once, and check them.
fn converse(a: &End, b: &End, address: IpAddr, length: usize) {
    let listener = b.run(|| TcpListener::bind(SocketAddr::new(address, 0)).unwrap());
    let target = listener.local_addr().unwrap();
    let client = a.run(|| TcpStream::connect_timeout(&target, LIMIT).unwrap());
    let (server, _) = listener.accept().unwrap();
    thread::scope(|scope| {
        for (number, stream) in [(0, &client), (1, &server)] {
            stream.set_read_timeout(Some(LIMIT)).unwrap();
            stream.set_write_timeout(Some(LIMIT)).unwrap();
            let (mut writer, mut reader) = (stream, stream);
            scope.spawn(move || {
                writer.write_all(&pattern(number, length)).unwrap();
                writer.shutdown(Shutdown::Write).unwrap();
            });
            scope.spawn(move || {
                let mut received = Vec::with_capacity(length);
                reader.read_to_end(&mut received).unwrap();
                assert!(received == pattern(1 - number, length), "{} bytes arrived damaged", received.len());
            });
        }
    });
}

const ADDRESSES: [&str; 2] = ["10.7.0.2", "fd07::2"];

#[test]
fn real_tcp_superpackets_are_cut_and_joined_and_arrive() {
    let started = Instant::now();
    let counts = connected(Wire { lose: 0, mark: 0 }, |a, b| {
        for address in ADDRESSES {
            converse(a, b, address.parse().unwrap(), 24 << 20);
        }
    });
    println!("{:?}: {counts:#?}", started.elapsed());
    for Counts { tcp4, tcp6, restored, joined, .. } in counts {
        assert!(tcp4 > 50 && tcp6 > 50, "superpackets of both families");
        assert!(restored * 10 >= (tcp4 + tcp6) * 9, "nearly all were joined to what they had been");
        assert!(joined > 100);
    }
}

#[test]
fn real_tcp_survives_loss_and_congestion_marks() {
    let started = Instant::now();
    // Losses bring selective acknowledgements and holes inside of superpackets, marks bring ECE and CWR.
    let counts = connected(Wire { lose: 211, mark: 97 }, |a, b| {
        for address in ADDRESSES {
            converse(a, b, address.parse().unwrap(), 6 << 20);
        }
        for end in [a, b] {
            assert!(statistic(end, "IpExt", "InCEPkts") > 0, "the kernel has seen the marks");
        }
    });
    println!("{:?}: {counts:#?}", started.elapsed());
    for Counts { tcp4, tcp6, lost, marked, .. } in counts {
        assert!(tcp4 > 10 && tcp6 > 10 && lost > 10 && marked > 10);
    }
    // Few: what carries the news of congestion is not joined, and here both directions have it to tell.
    assert!(counts.iter().any(|counts| counts.joined > 10));
}

#[test]
fn real_udp_superpackets_are_cut_and_joined_and_arrive() {
    let counts = connected(Wire { lose: 0, mark: 0 }, |a, b| {
        for address in ADDRESSES {
            let address: IpAddr = address.parse().unwrap();
            let server = b.run(|| UdpSocket::bind(SocketAddr::new(address, 0)).unwrap());
            let any = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
            let client = a.run(|| UdpSocket::bind(any).unwrap());
            client.connect(server.local_addr().unwrap()).unwrap();
            server.set_read_timeout(Some(LIMIT)).unwrap();
            setsockopt(&server, sockopt::RcvBufForce, &(8 << 20)).unwrap();
            let mut buffer = [0; 2048];
            for size in [1u16, 2, 333, 1000, 1371, 1372] {
                for (count, last) in [(2, 1), (3, size), (45, size / 2 + 1), (47, size)] {
                    let whole = pattern(u64::from(size), (count - 1) * usize::from(size) + usize::from(last));
                    let control = [ControlMessage::UdpGsoSegments(&size)];
                    let pieces = [IoSlice::new(&whole)];
                    let none = MsgFlags::empty();
                    let sent = sendmsg::<SockaddrStorage>(client.as_raw_fd(), &pieces, &control, none, None);
                    assert_eq!(sent.unwrap(), whole.len());
                    for piece in whole.chunks(size.into()) {
                        let length = server.recv(&mut buffer).unwrap();
                        assert!(buffer[..length] == *piece, "of {count} datagrams of {size} bytes");
                    }
                }
            }
        }
    });
    println!("{counts:#?}");
    let Counts { udp, restored, .. } = counts[0];
    assert!(udp >= 40, "superpackets of UDP: {udp}");
    assert_eq!(restored, udp, "all were joined to what they had been");
}
