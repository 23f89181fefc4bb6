//! Routers do what their names say: NATs of every kind of RFC 4787, probed in the manner of RFC 5780, and firewalls.
//! Needs root.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use common::binaries;
use mesh_lab::{Behaviour, Family, Host, Lab, Nat, Options, Out, Place, Router, Span, Topology};

use Behaviour::{AddressAndPortDependent, AddressDependent, EndpointIndependent};

/// Longer than any packet is on its way here.
const SOON: Duration = Duration::from_millis(100);

fn lab(name: &str, nodes: usize, topology: Topology) -> Lab {
    Lab::down(name).unwrap();
    Lab::up(Options { nodes, topology, daemons: false, ..Options::new(name, binaries()) }).unwrap()
}

fn nat(mapping: Behaviour, filtering: Behaviour) -> Nat {
    Nat::new(mapping, filtering)
}

/// A UDP socket of a host.
struct Socket {
    socket: UdpSocket,
    address: SocketAddr,
}

impl Socket {
    fn of(host: &Host, family: Family, port: u16) -> Self {
        let address = SocketAddr::new(host.underlay(family), port);
        let socket = host.net().run(|| UdpSocket::bind(address)).unwrap().unwrap();
        socket.set_read_timeout(Some(SOON)).unwrap();
        Self { socket, address }
    }

    fn v4(host: &Host, port: u16) -> Self {
        Self::of(host, Family::V4, port)
    }

    fn send(&self, to: SocketAddr, text: &str) {
        // What came of an earlier packet is told by the next call; it is no failure of this one.
        for _ in 0..2 {
            match self.socket.send_to(text.as_bytes(), to) {
                Ok(_) => return,
                Err(error) if error.kind() == ErrorKind::ConnectionRefused => {}
                Err(error) => panic!("{} > {to}: {error}", self.address),
            }
        }
    }

    /// The next packet; `None` when none comes soon.
    fn receive(&self) -> Option<(String, SocketAddr)> {
        let mut buffer = [0; 64];
        let deadline = Instant::now() + SOON;
        while Instant::now() < deadline {
            if let Ok((length, from)) = self.socket.recv_from(&mut buffer) {
                return Some((String::from_utf8_lossy(&buffer[..length]).into_owned(), from));
            }
        }
        None
    }

    /// Sends `text`, and returns the address that the receiver sees, if it gets there.
    fn seen_by(&self, other: &Self, text: &str) -> Option<SocketAddr> {
        self.send(other.address, text);
        let (received, from) = other.receive()?;
        assert_eq!(received, text);
        Some(from)
    }

    /// Whether a packet to `to` comes out at `inside`.
    fn gets_to(&self, to: SocketAddr, inside: &Self) -> bool {
        let text = format!("{} > {to}", self.address);
        self.send(to, &text);
        inside.receive().is_some_and(|(received, _)| received == text)
    }
}

/// Two addresses with two ports each.
struct Outside([[Socket; 2]; 2]);

impl Outside {
    fn of(a: &Host, b: &Host) -> Self {
        Self([a, b].map(|host| [7001, 7002].map(|port| Socket::v4(host, port))))
    }
}

/// RFC 5780, section 4.3: which destinations see the same outside address and port.
fn mapping(inside: &Socket, outside: &Outside) -> Behaviour {
    let see = |socket: &Socket| inside.seen_by(socket, "who am I").unwrap();
    let [[a1, a2], [b1, b2]] = outside.0.each_ref().map(|host| host.each_ref().map(see));
    match (a1 == a2, a1 == b1) {
        (true, true) if a1 == b2 => EndpointIndependent,
        (true, false) if b1 == b2 => AddressDependent,
        (false, false) if b1 != b2 && a1 != b2 && a2 != b1 => AddressAndPortDependent,
        _ => panic!("no behaviour of RFC 4787: {a1} {a2} {b1} {b2}"),
    }
}

/// RFC 5780, section 4.4: who gets through to a port from which one packet has gone to the first address and port.
fn filtering(inside: &Socket, outside: &Outside) -> Behaviour {
    let [[called, same_address], [other_address, _]] = &outside.0;
    let port = inside.seen_by(called, "hello").unwrap();
    assert!(called.gets_to(port, inside), "an answer comes back");
    let passed = (other_address.gets_to(port, inside), same_address.gets_to(port, inside));
    assert!(called.gets_to(port, inside), "it still does");
    match passed {
        (true, true) => EndpointIndependent,
        (false, true) => AddressDependent,
        (false, false) => AddressAndPortDependent,
        (true, false) => panic!("another address gets through and another port does not"),
    }
}

#[test]
fn every_nat_is_of_the_kind_that_it_is_called() {
    let kinds: Vec<(Behaviour, Behaviour)> = Behaviour::ALL
        .into_iter()
        .flat_map(|mapping| Behaviour::ALL.map(|filtering| (mapping, filtering)))
        .collect();
    let mut topology = Topology::default();
    for (index, (mapping, filtering)) in kinds.iter().enumerate() {
        let router = format!("n{index}");
        topology = topology.router(&router, Router::nat(nat(*mapping, *filtering)));
        for host in [3, 4] {
            topology = topology.host(&format!("h{}", host + 2 * index), Place::behind(&router));
        }
    }
    let lab = lab("labw-nats", 2 + 2 * kinds.len(), topology);
    let outside = Outside::of(&lab.host(0), &lab.host(1));
    for (index, kind) in kinds.iter().enumerate() {
        let (one, two) = (lab.host(2 + 2 * index), lab.host(3 + 2 * index));
        let network = lab.host(0).address(Family::V4).unwrap();
        assert_ne!(one.underlay(Family::V4), network);
        assert_eq!(one.address(Family::V6), None);
        let sockets = [&one, &two].map(|host| Socket::v4(host, 4000));
        // The second host uses the same source port: its mappings are others, and the first one's stay.
        let first = sockets[0].seen_by(&outside.0[0][0], "first").unwrap();
        let second = sockets[1].seen_by(&outside.0[0][0], "second").unwrap();
        assert_eq!(first.ip(), second.ip());
        assert_eq!([first.port(), second.port()], [20_000, 20_001], "counted up");
        for (socket, port) in sockets.iter().zip([first, second]) {
            assert!(outside.0[0][0].gets_to(port, socket));
            assert_eq!(mapping(socket, &outside), kind.0, "{kind:?}");
        }
        // A filter knows who was called from a port, so that each host begins with a fresh one.
        for host in [&one, &two] {
            assert_eq!(filtering(&Socket::v4(host, 4001), &outside), kind.1, "{kind:?}");
        }
    }
}

#[test]
fn mappings_end_after_their_timeout_unless_packets_pass() {
    let timeout = Span(Duration::from_secs(2));
    let office = Nat { timeout, ..nat(EndpointIndependent, EndpointIndependent) };
    let topology =
        Topology::default().router("office", Router::nat(office)).host("h3", Place::behind("office"));
    let lab = lab("labw-timeout", 3, topology);
    let (a, b) = (Socket::v4(&lab.host(0), 7001), Socket::v4(&lab.host(1), 7001));
    let (idle, busy) = (Socket::v4(&lab.host(2), 4000), Socket::v4(&lab.host(2), 4001));
    let ports = [&idle, &busy].map(|socket| socket.seen_by(&a, "hello").unwrap());
    // Also packets from outside, and from others than those that were called, keep a mapping.
    let start = Instant::now();
    while start.elapsed() < Duration::from_millis(3200) {
        thread::sleep(Duration::from_millis(400));
        assert!(b.gets_to(ports[1], &busy));
    }
    assert_eq!(busy.seen_by(&a, "again"), Some(ports[1]));
    assert!(!a.gets_to(ports[0], &idle));
    assert_ne!(idle.seen_by(&a, "again").unwrap(), ports[0]);
}

#[test]
fn a_rebind_gives_other_ports_and_closes_the_old_ones() {
    for kind in [EndpointIndependent, AddressAndPortDependent] {
        let topology = Topology::default()
            .router("office", Router::nat(nat(kind, EndpointIndependent)))
            .router("wall", Router::firewall())
            .host("h2", Place::behind("office"));
        let lab = lab("labw-rebind", 2, topology);
        let (outside, inside) = (Socket::v4(&lab.host(0), 7001), Socket::v4(&lab.host(1), 4000));
        let mut ports = vec![inside.seen_by(&outside, "hello").unwrap()];
        for _ in 0..2 {
            lab.rebind("office").unwrap();
            for old in &ports {
                assert!(!outside.gets_to(*old, &inside), "{old}");
            }
            let port = inside.seen_by(&outside, "again").unwrap();
            assert!(!ports.contains(&port), "{port} {ports:?}");
            assert!(outside.gets_to(port, &inside));
            ports.push(port);
        }
        let errors = [lab.rebind("wall").unwrap_err(), lab.rebind("home").unwrap_err()];
        let texts = errors.map(|error| format!("{error:#}"));
        assert!(texts[0].contains("does not translate") && texts[1].contains("office, wall"), "{texts:?}");
    }
}

#[test]
fn hosts_behind_one_nat_reach_each_others_outside_ports_only_with_hairpinning() {
    let kinds = [(false, EndpointIndependent), (true, EndpointIndependent), (true, AddressAndPortDependent)];
    for (hairpin, filtering) in kinds {
        let office = Nat { hairpin, ..nat(EndpointIndependent, filtering) };
        let topology = Topology::default()
            .router("office", Router::nat(office))
            .host("h2", Place::behind("office"))
            .host("h3", Place::behind("office"));
        let lab = lab("labw-hairpin", 3, topology);
        let outside = Socket::v4(&lab.host(0), 7001);
        let sockets = [1, 2].map(|host| Socket::v4(&lab.host(host), 4000));
        let [one, two] = &sockets;
        let ports = sockets.each_ref().map(|socket| socket.seen_by(&outside, "hello").unwrap());
        // Directly they reach each other by their inside addresses in any case.
        assert_eq!(one.seen_by(two, "direct"), Some(one.address));
        one.send(ports[1], "through the router");
        let from = two.receive().map(|(_, from)| from);
        match (hairpin, filtering) {
            (false, _) => assert_eq!(from, None),
            // The source is the outside one, so that the answer comes back the same way.
            (true, EndpointIndependent) => assert_eq!(from, Some(ports[0])),
            (true, AddressDependent | AddressAndPortDependent) => {
                assert_eq!(from, None, "nothing was sent to the other one yet");
                two.send(ports[0], "and back");
                assert_eq!(one.receive(), Some(("and back".to_owned(), ports[1])), "both have sent now");
            }
        }
        if hairpin {
            assert!(one.gets_to(ports[1], two) && two.gets_to(ports[0], one));
        }
    }
}

#[test]
fn a_nat_behind_a_nat_is_as_strict_as_both() {
    let topology = Topology::default()
        .router("carrier", Router::nat(nat(EndpointIndependent, AddressDependent)))
        .router("home", Router::nat(nat(EndpointIndependent, EndpointIndependent)).behind("carrier"))
        .router("odd", Router::nat(nat(AddressAndPortDependent, EndpointIndependent)).behind("carrier"))
        .host("h3", Place::behind("home"))
        .host("h4", Place::behind("odd"))
        .host("h5", Place::behind("carrier"));
    let lab = lab("labw-carrier", 5, topology);
    let outside = Outside::of(&lab.host(0), &lab.host(1));
    let at = |host: usize, port| Socket::v4(&lab.host(host), port);
    assert_eq!(mapping(&at(2, 4000), &outside), EndpointIndependent);
    assert_eq!(filtering(&at(2, 4001), &outside), AddressDependent, "the carrier's");
    assert_eq!(mapping(&at(3, 4000), &outside), AddressAndPortDependent, "the inner one's");
    assert_eq!(filtering(&at(3, 4001), &outside), AddressDependent, "the carrier's");
    // A host between the two is seen by the inner ones with its own address, and sees their middle one.
    let middle = at(4, 4000);
    let from = at(2, 4002).seen_by(&middle, "hello").unwrap();
    assert_eq!(
        (from.ip(), middle.address.ip()),
        ("100.64.1.252".parse().unwrap(), "100.64.1.5".parse().unwrap())
    );
    // Errors come back through both: nobody listens there.
    let closed = at(2, 4003);
    closed.socket.connect((outside.0[0][0].address.ip(), 9)).unwrap();
    closed.socket.send(b"knock").unwrap();
    assert_eq!(closed.socket.recv(&mut [0; 8]).unwrap_err().kind(), ErrorKind::ConnectionRefused);
}

/// Whether a TCP connection comes about; an error tells of a refusal.
fn connects(from: &Host, to: &Host, family: Family) -> Result<bool, ErrorKind> {
    let listener = to.net().run(|| TcpListener::bind((to.underlay(family), 7100))).unwrap().unwrap();
    let address = listener.local_addr().unwrap();
    let result = from.net().run(|| TcpStream::connect_timeout(&address, 3 * SOON)).unwrap();
    match result {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == ErrorKind::TimedOut => Ok(false),
        Err(error) => Err(error.kind()),
    }
}

fn pings(from: &Host, to: IpAddr) -> bool {
    from.exec(&["ping", "-c", "1", "-W", "0.3", &to.to_string()]).unwrap().status.success()
}

#[test]
fn a_firewall_lets_only_answers_in_and_one_for_udp_nothing_else_out() {
    let topology = Topology::default()
        .router("wall", Router::firewall())
        .router("udp", Router::firewall().lets_out(Out::Udp))
        .router("nat", Router::nat(nat(EndpointIndependent, EndpointIndependent)).with_ipv6(true))
        .router("natudp", Router::nat(nat(EndpointIndependent, EndpointIndependent)).lets_out(Out::Udp))
        .host("h2", Place::behind("wall"))
        .host("h3", Place::behind("udp"))
        .host("h4", Place::behind("nat"))
        .host("h5", Place::behind("natudp"));
    let lab = lab("labw-wall", 5, topology);
    let hosts = lab.hosts();
    let public = &hosts[0];
    for family in Family::BOTH {
        for (host, udp_only) in [(1, false), (2, true), (3, false), (4, true)] {
            let host = &hosts[host];
            let what = format!("{} {family}", host.name());
            let Some(address) = host.address(family) else {
                assert_eq!((host.name(), family), ("h5", Family::V6));
                continue;
            };
            let translated = family == Family::V4 && ["h4", "h5"].contains(&host.name());
            let (outside, other) = (Socket::of(public, family, 7001), Socket::of(public, family, 7002));
            let inside = Socket::of(host, family, 4000);
            if !translated {
                assert!(!outside.gets_to(inside.address, &inside), "{what}");
                assert!(!pings(public, address), "{what}");
                assert_eq!(connects(public, host, family), Ok(false), "{what}");
            }
            let seen = inside.seen_by(&outside, "hello").unwrap();
            assert_eq!(seen == inside.address, !translated, "{what}: {seen}");
            assert!(outside.gets_to(seen, &inside), "{what}");
            assert_eq!(
                other.gets_to(seen, &inside),
                translated,
                "{what}: only answers, or a NAT that filters nothing"
            );
            assert_eq!(pings(host, public.underlay(family)), !udp_only, "{what}");
            let tcp = if udp_only { Err(ErrorKind::ConnectionRefused) } else { Ok(true) };
            assert_eq!(connects(host, public, family), tcp, "{what}");
        }
    }
    // What a router lets out can change; a connection that there is goes on.
    let (wall, family) = (&hosts[1], Family::V6);
    let address = SocketAddr::new(public.underlay(family), 7101);
    let listener = public.net().run(|| TcpListener::bind(address)).unwrap().unwrap();
    let mut stream = wall.net().run(|| TcpStream::connect(address)).unwrap().unwrap();
    lab.set_out("wall", Out::Udp).unwrap();
    assert_eq!(connects(wall, public, family), Err(ErrorKind::ConnectionRefused));
    stream.write_all(b"still").unwrap();
    listener.accept().unwrap().0.read_exact(&mut [0; 5]).unwrap();
    lab.set_out("wall", Out::Tcp).unwrap();
    assert_eq!(connects(wall, public, family), Ok(true));
    let (inside, outside) = (Socket::of(wall, family, 4200), Socket::of(public, family, 7001));
    assert_eq!(inside.seen_by(&outside, "hello"), None);
    lab.set_out("wall", Out::All).unwrap();
    assert_eq!(inside.seen_by(&outside, "hello"), Some(inside.address));
    // Two hosts behind firewalls meet when both send.
    for family in Family::BOTH {
        let (a, b) = (Socket::of(&hosts[1], family, 4100), Socket::of(&hosts[2], family, 4100));
        assert!(!a.gets_to(b.address, &b));
        assert!(b.gets_to(a.address, &a) && a.gets_to(b.address, &b));
    }
}

#[test]
fn hosts_of_one_family_have_no_other() {
    let topology = Topology::default().host("h1", Place::ipv4_only()).host("h2", Place::ipv6_only());
    let lab = lab("labw-families", 3, topology);
    let (v4, v6, both) = (lab.host(0), lab.host(1), lab.host(2));
    assert_eq!((v4.address(Family::V6), v6.address(Family::V4)), (None, None));
    for (host, family, flag) in [(&v4, Family::V4, "-6"), (&v6, Family::V6, "-4")] {
        assert!(pings(&both, host.underlay(family)) && pings(host, both.underlay(family)));
        let rest = host.exec_ok(&["ip", flag, "addr", "show", "dev", "eth0"]).unwrap();
        assert!(!rest.contains("inet"), "{rest}");
    }
}

#[test]
fn a_topology_that_does_not_fit_is_refused_before_anything_is_made() {
    let try_up = |nodes, topology, daemons| {
        let options = Options { nodes, topology, daemons, ..Options::new("labw-refused", binaries()) };
        format!("{:#}", Lab::up(options).unwrap_err())
    };
    let behind = |router: &str, host: &str| Topology::default().host(host, Place::behind(router));
    assert!(try_up(1, behind("x", "h1"), false).contains("no router \"x\""));
    let named = try_up(2, behind("x", "h3").router("x", Router::firewall()), false);
    assert!(named.contains("h3") && named.contains("2 hosts"), "{named}");
    assert!(!std::path::Path::new("/run/mesh-lab/labw-refused").exists());
}
