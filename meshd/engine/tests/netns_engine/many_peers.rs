//! One device with a thousand peers, a hundred of which talk.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use mesh_sys::uapi::{AllowedIpChange, BlockingClient, PublicKey, SecretKey, SetDevice, SetPeer};
use nix::sys::signal::Signal;
use nix::sys::socket::{setsockopt, sockopt};

use crate::support::{Kind, Namespace, Pattern, Process, eventually, require_root, run};

/// Namespaces, devices in each, and peers that never say anything.
const SITES: u8 = 10;
const DEVICES: u8 = 10;
const SILENT: u32 = 900;
const LIMIT: Duration = Duration::from_secs(15);

/// Addresses of the hub inside of the tunnel.
const HUB: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(10, 9, 0, 1)), IpAddr::V6(Ipv6Addr::new(0xfd09, 0, 0, 0, 0, 0, 0, 1))];

/// A pair of keys, another one for each number.
fn keys(number: u64) -> (SecretKey, PublicKey) {
    let mut bytes = [0; 32];
    Pattern(number + 1).fill(&mut bytes);
    let public = x25519_dalek::PublicKey::from(&x25519_dalek::StaticSecret::from(bytes));
    (SecretKey::new(&bytes), PublicKey(public.to_bytes()))
}

/// Adds this one address.
fn host(address: IpAddr) -> AllowedIpChange {
    AllowedIpChange::Add(address.into())
}

/// A namespace with devices, joined to the hub by a veth.
struct Site {
    number: u8,
    devices: Vec<Process>,
    namespace: Namespace,
}

impl Site {
    fn new(number: u8, hub: &Namespace) -> Self {
        let namespace = Namespace::new();
        let [name, hub_name] = [&namespace.name, &hub.name];
        let port = format!("u{number}");
        run(
            "ip",
            &["-n", hub_name, "link", "add", &port, "type", "veth", "peer", "name", "u0", "netns", name],
        );
        hub.ip(&format!("addr add 198.51.{number}.1/24 dev {port}"));
        hub.ip(&format!("link set {port} up"));
        namespace.ip(&format!("addr add 198.51.{number}.2/24 dev u0"));
        namespace.ip("link set u0 up");
        let devices = (0..DEVICES).map(|_| Process::start(Kind::Mesh, &namespace)).collect();
        Self { number, devices, namespace }
    }

    /// Gives each device its key, its addresses and the hub as its peer. Returns them as peers for the hub.
    fn configure(&self, hub: PublicKey) -> Vec<SetPeer> {
        let configure = |(index, device): (u8, &Process)| {
            let interface = &device.interface;
            let (private_key, public_key) = keys(1 + u64::from(self.number) * 100 + u64::from(index));
            let mut peer = SetPeer::new(hub);
            peer.endpoint = Some(SocketAddr::from(([198, 51, self.number, 1], 5000)));
            peer.allowed_ips = HUB.map(host).into();
            let change =
                SetDevice { private_key: Some(private_key), peers: vec![peer], ..SetDevice::default() };
            BlockingClient::new(interface).set(&change).unwrap();
            let addresses = self.addresses(index);
            for address in addresses {
                let nodad = if address.is_ipv6() { " nodad" } else { "" };
                self.namespace.ip(&format!("addr add {address} dev {interface}{nodad}"));
            }
            self.namespace.ip(&format!("link set {interface} up"));
            // Sockets bound to the interface choose among these.
            for hub in HUB {
                self.namespace.ip(&format!("route add {hub} dev {interface} metric {}", 10 + index));
            }
            let mut peer = SetPeer::new(public_key);
            peer.allowed_ips = addresses.map(host).into();
            peer
        };
        (0..).zip(&self.devices).map(configure).collect()
    }

    fn addresses(&self, device: u8) -> [IpAddr; 2] {
        let site = self.number;
        [format!("10.9.{}.{}", site + 1, device + 1), format!("fd09::{}:{}", site + 1, device + 1)]
            .map(|address| address.parse().unwrap())
    }

    /// Every device asks the hub `rounds` times over both families, all at once, and gets its own answers. Returns the
    /// longest wait for all answers of a round.
    fn ask(&self, rounds: usize, hub: [SocketAddr; 2]) -> Duration {
        let sockets: Vec<_> = self.namespace.inside(|| {
            let open = |(index, device): (u8, &Process)| {
                let address = self.addresses(index);
                [0, 1].map(|family| {
                    let socket = UdpSocket::bind((address[family], 0)).unwrap();
                    setsockopt(&socket, sockopt::BindToDevice, &(&device.interface).into()).unwrap();
                    socket.connect(hub[family]).unwrap();
                    socket.set_read_timeout(Some(LIMIT)).unwrap();
                    socket
                })
            };
            (0..).zip(&self.devices).flat_map(open).collect()
        });
        let mut draw = Pattern(u64::from(self.number) + 1);
        let mut buffer = [0; 4096];
        let mut longest = Duration::ZERO;
        for _ in 0..rounds {
            let started = Instant::now();
            let questions: Vec<_> = sockets
                .iter()
                .map(|socket| {
                    let mut question = vec![0; 8 + draw.draw() as usize % 3000];
                    draw.fill(&mut question);
                    socket.send(&question).unwrap();
                    question
                })
                .collect();
            for (socket, question) in sockets.iter().zip(questions) {
                let length = socket.recv(&mut buffer).unwrap_or_else(|error| {
                    panic!("{} of site {} got no answer: {error}", socket.local_addr().unwrap(), self.number)
                });
                assert!(buffer[..length] == question, "the answer to another question");
            }
            longest = longest.max(started.elapsed());
        }
        longest
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        // All at once: ending takes each a while.
        for device in &self.devices {
            device.signal(Signal::SIGTERM);
        }
    }
}

/// Sends back what comes until the socket has been quiet for a while.
fn echo(socket: &UdpSocket) {
    socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    let mut buffer = [0; 4096];
    while let Ok((length, sender)) = socket.recv_from(&mut buffer) {
        socket.send_to(&buffer[..length], sender).unwrap();
    }
}

#[test]
fn a_hundred_of_a_thousand_peers_get_their_answers() {
    require_root();
    let namespace = Namespace::new();
    let hub = Process::start(Kind::Mesh, &namespace);
    let empty = hub.resident();
    let started = Instant::now();
    let sites: Vec<Site> = thread::scope(|scope| {
        let sites: Vec<_> = (0..SITES)
            .map(|number| {
                scope.spawn({
                    let namespace = &namespace;
                    move || Site::new(number, namespace)
                })
            })
            .collect();
        sites.into_iter().map(|site| site.join().unwrap()).collect()
    });
    println!("{} devices started in {:.1} s", SITES * DEVICES, started.elapsed().as_secs_f64());

    let (private_key, public_key) = keys(0);
    namespace.ip(&format!("addr add 10.9.0.1/16 dev {}", hub.interface));
    namespace.ip(&format!("addr add fd09::1/64 dev {} nodad", hub.interface));
    namespace.ip(&format!("link set {} up", hub.interface));
    let change = Mutex::new(SetDevice {
        private_key: Some(private_key),
        listen_port: Some(5000),
        ..SetDevice::default()
    });
    thread::scope(|scope| {
        for site in &sites {
            scope.spawn(|| {
                let peers = site.configure(public_key);
                change.lock().unwrap().peers.extend(peers);
            });
        }
    });
    let mut change = change.into_inner().unwrap();
    for number in 0..SILENT {
        let mut key = [9; 32];
        key[..4].copy_from_slice(&number.to_le_bytes());
        let mut peer = SetPeer::new(PublicKey(key));
        peer.endpoint = Some(SocketAddr::from(([198, 51, 0, 77], 9)));
        let net = Ipv4Addr::from_bits(0x0a0a_0000 + number);
        peer.allowed_ips.push(host(net.into()));
        change.peers.push(peer);
    }
    BlockingClient::new(&hub.interface).set(&change).unwrap();
    assert_eq!(hub.state().peers.len(), 1000);
    let configured = hub.resident();

    let (before, started) = (hub.cpu_seconds(), Instant::now());
    let servers = namespace.inside(|| {
        HUB.map(|address| {
            let socket = UdpSocket::bind((address, 0)).unwrap();
            setsockopt(&socket, sockopt::RcvBufForce, &(8 << 20)).unwrap();
            socket
        })
    });
    let addresses = servers.each_ref().map(|server| server.local_addr().unwrap());
    thread::scope(|scope| {
        for server in &servers {
            scope.spawn(|| echo(server));
        }
        let asking: Vec<_> = sites.iter().map(|site| scope.spawn(|| site.ask(50, addresses))).collect();
        let longest = asking.into_iter().map(|asking| asking.join().unwrap()).max().unwrap();
        println!(
            "{} questions of 100 peers answered in {:.1} s ({:.2} s of the hub), one round in {longest:?} at most",
            50 * 2 * 100,
            started.elapsed().as_secs_f64(),
            hub.cpu_seconds() - before
        );
    });
    let talked = hub.state().peers.iter().filter(|peer| !peer.last_handshake_time.is_zero()).count();
    assert_eq!(talked, 100, "peers with a session");

    let idle = |what: &str, process: &Process| {
        let before = process.cpu_seconds();
        thread::sleep(Duration::from_secs(3));
        let spent = process.cpu_seconds() - before;
        println!("{what}: {:.0} ms of processor time in 3 s without traffic", spent * 1000.0);
        assert!(spent <= 0.1, "{what} does something while nothing happens");
    };
    idle("the hub", &hub);
    println!(
        "resident: {empty} KiB empty, {configured} KiB with 1,000 peers, {} KiB after the traffic; a device with one \
         peer: {} KiB",
        hub.resident(),
        sites[0].devices[0].resident()
    );
    for site in &sites {
        for device in &site.devices {
            device.signal(Signal::SIGTERM);
        }
    }
    let gone = || sites.iter().flat_map(|site| &site.devices).all(ended);
    eventually("all devices end", LIMIT, gone);
}

/// Whether a process has ended and only waits to be reaped.
fn ended(device: &Process) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", device.child.id())).unwrap_or_default();
    stat.rsplit(')').next().is_none_or(|rest| rest.trim_start().starts_with('Z'))
}
