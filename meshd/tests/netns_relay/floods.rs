//! Initiations that nobody has begun, from a third host, with the addresses of others.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use mesh_core::relay::{Dropped, Endpoint, Limits};
use mesh_keys::WgPublic;

use crate::ends::{Engine, RELAY_PORT, Site, add_address, inner, outer};
use crate::flood::{Flood, Kind};
use crate::ns::{Ns, veth};
use crate::passes::{connected, reaches};

const RATE: u32 = 20_000;
const SPAN: Duration = Duration::from_secs(2);

/// Nobody waits longer for a byte.
const STALLED: Duration = Duration::from_secs(60);

/// A third host at the relay, which sends with any address; it has a lane of its own, that nobody talks to.
fn stranger(site: &Site) -> (Ns, UdpSocket) {
    let ns = Ns::new("stranger");
    veth(&site.between, "wire3", &ns, "eth0", None);
    for (ns, device, host) in [(&site.between, "wire3", 1), (&ns, "eth0", 2)] {
        ns.up(ns.index(device));
        add_address(ns, device, outer(3, host, true), 28);
    }
    site.between.sh("sysctl -qw net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.wire3.rp_filter=0");
    let remote = SocketAddr::new(outer(3, 2, true), 6784);
    let socket = ns.netns.run(|| UdpSocket::bind(remote)).unwrap().unwrap();
    socket.set_nonblocking(true).unwrap();
    let endpoint = Endpoint { remote, local: None };
    site.relay.relay().register(WgPublic::from_bytes([3; 32]), endpoint, 1, site.now()).unwrap();
    (ns, socket)
}

/// Has an end count the initiations of a flood that come to it: those of WireGuard have a random key there.
fn count_forged(end: &Ns) {
    end.sh("nft 'add table inet t; add counter inet t forged; \
         add chain inet t c { type filter hook input priority 0; }; \
         add rule inet t c udp length 156 @th,64,32 0x01000000 @th,128,32 0 counter name forged'");
}

fn forged(end: &Ns) -> u64 {
    let text = end.sh("nft list counter inet t forged");
    let mut words = text.split_whitespace().skip_while(|word| *word != "packets");
    words.nth(1).unwrap().parse().unwrap()
}

/// Sends bytes from one end to the other until `ended`, then what they are has to be right. How many there were.
fn transfer(site: &Site, ended: &AtomicBool) -> usize {
    let address = SocketAddr::new(inner(2)[0], 7_000);
    let listener = site.ends[1].ns.netns.run(|| TcpListener::bind(address)).unwrap().unwrap();
    let mut near = site.ends[0].ns.netns.run(|| TcpStream::connect(address)).unwrap().unwrap();
    let (mut far, _) = listener.accept().unwrap();
    near.set_write_timeout(Some(STALLED)).unwrap();
    far.set_read_timeout(Some(STALLED)).unwrap();
    // A prime length: no two blocks look the same to whoever counts bytes.
    let block: Vec<u8> = (0..65_521usize).map(|at| (at * at % 251) as u8).collect();
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut sent = 0;
            while !ended.load(Ordering::Relaxed) {
                near.write_all(&block).unwrap();
                sent += block.len();
            }
            drop(near);
            sent
        });
        let (mut received, mut buffer) = (0, vec![0; block.len()]);
        while far.read_exact(&mut buffer).is_ok() {
            assert!(buffer == block, "other bytes after {received}");
            received += block.len();
        }
        assert_eq!(received, writer.join().unwrap());
        received
    })
}

fn stands(kind: Kind) {
    let site = connected([Engine::MeshWg; 2], [true, true]);
    let (third, bystander) = stranger(&site);
    site.ends.iter().for_each(|end| count_forged(&end.ns));
    let lanes = [0, 1].map(|end| match site.endpoint(end) {
        SocketAddr::V4(address) => (site.ends[end].key, address),
        SocketAddr::V6(address) => panic!("{address}"),
    });
    let SocketAddr::V4(to) = SocketAddr::new(outer(3, 1, true), RELAY_PORT) else { panic!("not IPv4") };
    let counted = || Dropped::ALL.map(|reason| site.relay.counters().dropped(reason));
    let before = counted();

    let ended = AtomicBool::new(false);
    let started = Instant::now();
    let (sent, bytes) = std::thread::scope(|scope| {
        let flood = scope.spawn(|| {
            let sent = third.netns.run(|| pour(to, kind, &lanes));
            ended.store(true, Ordering::Relaxed);
            sent.unwrap()
        });
        let bytes = transfer(&site, &ended);
        (flood.join().unwrap(), bytes)
    });
    let (_, routes) = site.relay.relay().load();
    let span = started.elapsed();
    assert!(reaches(&site, 0) && reaches(&site, 1), "{kind:?}: {:?}", site.relay.counters());

    let at_ends = [0, 1].map(|end| forged(&site.ends[end].ns));
    let after = counted();
    let dropped = |reason: Dropped| after[reason as usize] - before[reason as usize];
    eprintln!(
        "{kind:?}: {sent} sent, {at_ends:?} delivered, {bytes} bytes of TCP, {routes} indices, {:?}",
        Dropped::ALL.map(dropped)
    );
    assert!(sent > 1_000 && bytes > 0);
    let nothing = bystander.recv(&mut [0; 1]).unwrap_err();
    assert_eq!(nothing.kind(), ErrorKind::WouldBlock, "something came to the third lane");
    assert_eq!(site.relay.relay().load().0, 3);
    let limits = Limits::default();
    let most = |rate: u32| (f64::from(rate) * (span.as_secs_f64() + 1.0)) as u64;
    // Those of the honest sessions are a handful.
    let may = if kind == Kind::Lane { 2 * most(limits.initiations) } else { 0 };
    assert!(routes as u64 <= may + 16, "{routes} indices, {at_ends:?} delivered in {span:?}");
    match kind {
        Kind::Lane => {
            let fits = |count: &u64| (1..=most(limits.initiations)).contains(count);
            assert!(at_ends.iter().all(fits), "{at_ends:?}");
            assert!(dropped(Dropped::TooMany) > 0);
            assert_eq!(dropped(Dropped::Stranger), 0);
        }
        Kind::LaneGarbled => {
            assert_eq!(at_ends, [0, 0]);
            assert!(dropped(Dropped::Busy) > 0);
            assert!(dropped(Dropped::NoSuchLane) <= 2 * most(limits.searches));
        }
        Kind::Stranger | Kind::StrangerGarbled => {
            assert_eq!(at_ends, [0, 0]);
            let all = Dropped::ALL.into_iter().map(dropped).sum::<u64>();
            assert!(dropped(Dropped::Stranger) > 0 && dropped(Dropped::Stranger) == all);
        }
    }
}

/// Sends for a while. How many.
fn pour(to: SocketAddrV4, kind: Kind, lanes: &[(WgPublic, SocketAddrV4)]) -> u32 {
    let mut flood = Flood::new(to, &[kind], lanes).unwrap();
    let started = Instant::now();
    flood.run(RATE, || started.elapsed() < SPAN).unwrap();
    flood.sent()
}

#[test]
fn what_is_honest_gets_through_whatever_pours_in() {
    Kind::ALL.into_iter().for_each(stands);
}
