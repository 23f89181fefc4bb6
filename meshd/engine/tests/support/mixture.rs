//! A mixture of traffic drawn from a seed, and what of it arrived: the same over every path that loses nothing.

use std::io::{IoSlice, Read as _, Write as _};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, MsgFlags, SockaddrStorage, sendmsg, setsockopt, sockopt};

use super::{Namespace, Pattern};

const LIMIT: Duration = Duration::from_secs(10);
/// Datagrams, and bytes of datagrams, that are under way at a time: what every queue on the way holds.
const VOLLEY: usize = 8;
const VOLLEY_BYTES: usize = 100_000;
/// Payloads of datagrams that fit every path of these tests in one packet.
const NEVER_CUT: usize = 1200;
/// At and around the lengths where a header more or less, an MTU or a fragment makes a difference.
const SIZES: [usize; 24] = [
    1, 2, 3, 7, 8, 15, 16, 17, 512, 1280, 1352, 1371, 1372, 1373, 1391, 1392, 1393, 1452, 1472, 1473, 2800,
    9000, 30_000, 60_000,
];

/// Something that arrived.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Arrival {
    what: String,
    bytes: usize,
    digest: u64,
}

impl Arrival {
    fn new(what: impl Into<String>, payload: &[u8]) -> Self {
        // FNV-1a.
        let mix = |digest: u64, byte: &u8| (digest ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        let digest = payload.iter().fold(0xcbf2_9ce4_8422_2325, mix);
        Self { what: what.into(), bytes: payload.len(), digest }
    }
}

/// Sends the mixture of `seed` from one namespace to `addresses` of the other and back. Returns what arrived, in order.
pub fn exchange(from: &Namespace, to: &Namespace, addresses: [IpAddr; 2], seed: u64) -> Vec<Arrival> {
    for namespace in [from, to] {
        namespace.exec(&["sysctl", "-qw", "net.ipv4.tcp_ecn=1"]);
    }
    let mut draw = Pattern(seed);
    let mut arrivals = Vec::new();
    for address in addresses {
        arrivals.extend(datagrams(from, to, address, &mut draw));
        arrivals.extend(runs(from, to, address, &mut draw));
        arrivals.extend(connections(from, to, address, &mut draw));
        arrivals.extend(echoes(from, address));
    }
    arrivals
}

/// The payload number `number` of a seed.
fn payload(seed: u64, number: usize, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    // Any state but zero will do.
    Pattern(seed ^ (number as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1).fill(&mut bytes);
    bytes
}

/// A pair of sockets, the first connected to the second.
fn sockets(from: &Namespace, to: &Namespace, address: IpAddr) -> [UdpSocket; 2] {
    let server = to.inside(|| UdpSocket::bind(SocketAddr::new(address, 0)).unwrap());
    let any = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let client = from.inside(|| UdpSocket::bind(any).unwrap());
    client.connect(server.local_addr().unwrap()).unwrap();
    for socket in [&client, &server] {
        socket.set_read_timeout(Some(LIMIT)).unwrap();
        setsockopt(socket, sockopt::RcvBufForce, &(8 << 20)).unwrap();
    }
    [client, server]
}

/// Datagrams of 1 to 60,000 bytes, each sent back by the other side; with a checksum and without.
fn datagrams(from: &Namespace, to: &Namespace, address: IpAddr, draw: &mut Pattern) -> Vec<Arrival> {
    let mut arrivals = Vec::new();
    let mut buffer = vec![0; 1 << 16];
    for checksum in [true, false] {
        let [client, server] = sockets(from, to, address);
        if !checksum {
            without_checksum(&client, address);
            without_checksum(&server, address);
        }
        let random = (0..60).map(|_| 1 + draw.draw() as usize % 60_000).collect::<Vec<_>>();
        let small = (0..100).map(|_| 1 + draw.draw() as usize % 1400).collect::<Vec<_>>();
        let sizes = [&SIZES[..], &random, &small].concat();
        let seed = draw.draw();
        let mut rest = sizes.as_slice();
        let mut number = 0;
        while !rest.is_empty() {
            let mut bytes = 0;
            let fits = |size: &&usize| {
                bytes += **size;
                bytes <= VOLLEY_BYTES
            };
            let (now, later) = rest.split_at(rest.iter().take(VOLLEY).take_while(fits).count());
            rest = later;
            let expected: Vec<_> =
                (number..).zip(now).map(|(number, size)| payload(seed, number, *size)).collect();
            for payload in &expected {
                client.send(payload).unwrap();
            }
            for (socket, what) in [(&server, "datagram"), (&client, "datagram sent back")] {
                let arrived: Vec<_> = (now.iter())
                    .map(|_| {
                        let (length, sender) = socket.recv_from(&mut buffer).unwrap_or_else(|error| {
                            panic!("not all of {now:?} arrived ({what}, checksum {checksum}): {error}")
                        });
                        if what == "datagram" {
                            socket.send_to(&buffer[..length], sender).unwrap();
                        }
                        buffer[..length].to_vec()
                    })
                    .collect();
                check_order(&arrived, &expected);
                arrivals.extend(expected.iter().map(|payload| Arrival::new(what, payload)));
            }
            number += now.len();
        }
    }
    relabelled(arrivals, address)
}

/// All have arrived, each once, and those that fit a packet in the order in which they were sent. Fragments go other ways
/// than whole datagrams, because ports are in the first of them only: those may overtake each other.
fn check_order(arrived: &[Vec<u8>], expected: &[Vec<u8>]) {
    let sizes = |payloads: &[Vec<u8>]| payloads.iter().map(Vec::len).collect::<Vec<_>>();
    let difference = format!("{:?} arrived as {:?}", sizes(expected), sizes(arrived));
    let [mut all, mut wanted] = [arrived, expected].map(<[_]>::to_vec);
    all.sort();
    wanted.sort();
    assert!(all == wanted, "{difference}");
    let whole = |payloads: &[Vec<u8>]| {
        payloads.iter().filter(|payload| payload.len() <= NEVER_CUT).cloned().collect::<Vec<_>>()
    };
    assert!(whole(arrived) == whole(expected), "{difference}");
}

/// Runs of datagrams of one size, handed to the kernel in one piece.
fn runs(from: &Namespace, to: &Namespace, address: IpAddr, draw: &mut Pattern) -> Vec<Arrival> {
    let [client, server] = sockets(from, to, address);
    let mut arrivals = Vec::new();
    let mut buffer = vec![0; 1 << 16];
    for size in [1u16, 99, 100, 700, 1200, 1352, 1372] {
        for count in [2, 3, 17, 45] {
            let last = 1 + draw.draw() as usize % usize::from(size);
            let whole = payload(draw.draw(), 0, (count - 1) * usize::from(size) + last);
            let control = [ControlMessage::UdpGsoSegments(&size)];
            let sent = sendmsg::<SockaddrStorage>(
                client.as_raw_fd(),
                &[IoSlice::new(&whole)],
                &control,
                MsgFlags::empty(),
                None,
            );
            assert_eq!(sent.unwrap(), whole.len());
            for piece in whole.chunks(size.into()) {
                let length = server.recv(&mut buffer).unwrap();
                assert!(buffer[..length] == *piece, "of {count} datagrams of {size} bytes");
                arrivals.push(Arrival::new("datagram of a run", &buffer[..length]));
            }
        }
    }
    relabelled(arrivals, address)
}

/// Connections with data both ways at once, written in pieces of many sizes.
fn connections(from: &Namespace, to: &Namespace, address: IpAddr, draw: &mut Pattern) -> Vec<Arrival> {
    let listener = to.inside(|| TcpListener::bind(SocketAddr::new(address, 0)).unwrap());
    let target = listener.local_addr().unwrap();
    let mut arrivals = Vec::new();
    // Many small writes, each sent at once; writes around an MTU; large ones.
    for (total, largest) in [(50_000, 200), (500_000, 3000), (6_000_000, 200_000)] {
        let seeds = [draw.draw(), draw.draw()];
        let client = from.inside(|| TcpStream::connect_timeout(&target, LIMIT).unwrap());
        let (server, _) = listener.accept().unwrap();
        let halves = thread::scope(|scope| {
            let sides = [(&client, seeds[0]), (&server, seeds[1])];
            let writers =
                sides.map(|(stream, seed)| scope.spawn(move || write_pieces(stream, seed, total, largest)));
            let readers = sides.map(|(stream, _)| scope.spawn(move || read_all(stream)));
            writers.into_iter().for_each(|writer| writer.join().unwrap());
            readers.map(|reader| reader.join().unwrap())
        });
        for (received, seed) in halves.iter().zip([seeds[1], seeds[0]]) {
            assert!(*received == payload(seed, 0, total), "a connection of {total} bytes");
            arrivals.push(Arrival::new("stream", received));
        }
    }
    relabelled(arrivals, address)
}

fn write_pieces(mut stream: &TcpStream, seed: u64, total: usize, largest: u64) {
    stream.set_nodelay(true).unwrap();
    stream.set_write_timeout(Some(LIMIT)).unwrap();
    let all = payload(seed, 0, total);
    let (mut rest, mut draw) = (all.as_slice(), Pattern(seed | 1));
    while !rest.is_empty() {
        let size = 1 + (draw.draw() % largest) as usize;
        let (now, later) = rest.split_at(size.min(rest.len()));
        stream.write_all(now).unwrap();
        rest = later;
    }
    stream.shutdown(Shutdown::Write).unwrap();
}

fn read_all(mut stream: &TcpStream) -> Vec<u8> {
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    let mut all = Vec::new();
    stream.read_to_end(&mut all).unwrap();
    all
}

/// Pings of many sizes. `ping` compares what comes back with what it sent.
fn echoes(from: &Namespace, address: IpAddr) -> Vec<Arrival> {
    let ping = |size: usize| {
        let (size, target) = (size.to_string(), address.to_string());
        // One each: of several, `ping` gives up those that take more than twice as long as the others.
        let text = from.exec(&["ping", "-n", "-c", "1", "-W", "5", "-p", "5a", "-s", &size, &target]);
        assert!(text.contains(" 0% packet loss") && !text.contains("wrong"), "{text}");
        Arrival::new(format!("an echo of {size} bytes"), &[])
    };
    relabelled([0, 1, 16, 1352, 1392, 1393, 5000, 60_000].map(ping).into(), address)
}

/// Says of which family they are: addresses differ between paths.
fn relabelled(arrivals: Vec<Arrival>, address: IpAddr) -> Vec<Arrival> {
    let family = if address.is_ipv4() { "IPv4" } else { "IPv6" };
    let label = |arrival: Arrival| Arrival { what: format!("{family} {}", arrival.what), ..arrival };
    arrivals.into_iter().map(label).collect()
}

/// Sends datagrams with a checksum of zero, and takes them over IPv6 too.
fn without_checksum(socket: &UdpSocket, address: IpAddr) {
    // From linux/udp.h.
    const UDP_NO_CHECK6_TX: libc::c_int = 101;
    const UDP_NO_CHECK6_RX: libc::c_int = 102;
    let options: &[_] = if address.is_ipv4() {
        &[(libc::SOL_SOCKET, libc::SO_NO_CHECK)]
    } else {
        &[(libc::SOL_UDP, UDP_NO_CHECK6_TX), (libc::SOL_UDP, UDP_NO_CHECK6_RX)]
    };
    for (level, name) in options {
        let on: libc::c_int = 1;
        // SAFETY: the kernel reads one `int` through the pointer and keeps none.
        #[expect(unsafe_code, reason = "nix does not know these options")]
        let result = unsafe {
            let length = size_of::<libc::c_int>() as libc::socklen_t;
            libc::setsockopt(socket.as_raw_fd(), *level, *name, (&raw const on).cast(), length)
        };
        Errno::result(result).unwrap();
    }
}
