//! Two hosts with WireGuard each, and the host between them with the relay.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use mesh_core::node::Input;
use mesh_core::relay::Endpoint;
use mesh_core::time::Time;
use mesh_keys::rand_core::OsRng;
use mesh_keys::{Psk, WgPublic, WgSecret};
use mesh_sys::rtnl::AddressSpec;
use mesh_sys::uapi::{AllowedIpChange, BlockingClient, PublicKey, SecretKey, SetDevice, SetPeer};
use meshd::datagrams::{Datagrams, Incoming};

use crate::ns::{Ns, veth};

/// Port of the relay.
pub(crate) const RELAY_PORT: u16 = 6783;

/// Port of the engines.
const LANE_PORT: u16 = 6784;

/// Which WireGuard stands at an end.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Engine {
    /// Ours.
    MeshWg,
    /// The reference implementation.
    WireguardGo,
}

/// A host with a tunnel device.
pub(crate) struct End {
    pub(crate) ns: Ns,
    /// 1 or 2: the last number in its addresses.
    pub(crate) number: u8,
    pub(crate) device: String,
    pub(crate) key: WgPublic,
    engine: Child,
}

/// The three hosts. Each end has a wire to the relay and to nobody else; nothing is forwarded by the kernel.
pub(crate) struct Site {
    pub(crate) ends: [End; 2],
    pub(crate) between: Ns,
    pub(crate) relay: Datagrams,
    /// What the relay has for the node.
    pub(crate) node: Incoming,
    started: Instant,
}

/// Underlay address of an end, or of the relay on the wire to it, by family.
pub(crate) fn outer(end: u8, host: u8, ipv4: bool) -> IpAddr {
    if ipv4 {
        IpAddr::from([192, 0, 2, end * 16 + host])
    } else {
        format!("2001:db8:{end}::{host}").parse().unwrap()
    }
}

/// Addresses of an end inside of the tunnel.
pub(crate) fn inner(end: u8) -> [IpAddr; 2] {
    [IpAddr::from([10, 9, 0, end]), format!("fd09::{end}").parse().unwrap()]
}

pub(crate) fn add_address(ns: &Ns, device: &str, address: IpAddr, prefix: u8) {
    let net = IpNet::new(address, prefix).unwrap();
    let spec = AddressSpec { no_prefix_route: false, ..AddressSpec::plain(net) };
    ns.rtnl().add_address(ns.index(device), spec).unwrap();
}

impl Site {
    /// The ends reach the relay by these families: IPv4 when true.
    pub(crate) fn new(engines: [Engine; 2], families: [bool; 2]) -> Self {
        let between = Ns::new("between");
        let started = Instant::now();
        let relay = between.netns.run(|| Datagrams::bind(RELAY_PORT, Time::ZERO).unwrap()).unwrap();
        let clock = move || Time::from_origin(started.elapsed());
        let node = relay.receive(clock).unwrap();
        let secrets = [(); 2].map(|()| WgSecret::generate(&mut OsRng));
        let psk = Psk::random(&mut OsRng);
        let mut number = 0;
        let ends = engines.map(|engine| {
            let index = usize::from(number);
            number += 1;
            let ns = Ns::new("end");
            let wire = format!("wire{number}");
            veth(&between, &wire, &ns, "eth0", None);
            for (ns, device, host) in [(&between, wire.as_str(), 1), (&ns, "eth0", 2)] {
                ns.up(ns.index(device));
                let ipv4 = families[index];
                add_address(ns, device, outer(number, host, ipv4), if ipv4 { 28 } else { 64 });
            }
            let own = &secrets[index];
            let end = End::new(ns, number, engine, own.public());
            end.configure(own, &secrets[1 - index].public(), &psk, outer(number, 1, families[index]));
            end
        });
        Self { ends, between, relay, node, started }
    }

    pub(crate) fn now(&self) -> Time {
        Time::from_origin(self.started.elapsed())
    }

    /// What comes for the node of the relay's host within a tenth of a second.
    pub(crate) fn for_the_node(&mut self) -> Option<Input> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let next = self.node.next(|| Time::ZERO);
        runtime
            .block_on(async { tokio::time::timeout(Duration::from_millis(100), next).await.ok().flatten() })
    }

    /// Where the relay sees an end.
    pub(crate) fn endpoint(&self, end: usize) -> SocketAddr {
        let end = &self.ends[end];
        let ipv4 = end.ns.sh("ip -4 -o addr show eth0").contains("inet");
        SocketAddr::new(outer(end.number, 2, ipv4), LANE_PORT)
    }

    /// Both ends are served.
    pub(crate) fn register(&self) {
        for end in 0..2 {
            let endpoint = Endpoint { remote: self.endpoint(end), local: None };
            self.relay.relay().register(self.ends[end].key, endpoint, 1, self.now()).unwrap();
        }
    }
}

impl End {
    fn new(ns: Ns, number: u8, engine: Engine, key: WgPublic) -> Self {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        let n = COUNTER.fetch_add(1, Ordering::Relaxed);
        let device = format!("nr{:x}n{n}", std::process::id());
        let program = match engine {
            Engine::MeshWg => mesh_wg(),
            Engine::WireguardGo => PathBuf::from("wireguard-go"),
        };
        let start = || {
            let mut command = Command::new(&program);
            command.args(["-f", &device]).env("WG_PROCESS_FOREGROUND", "1").env("LOG_LEVEL", "error");
            command.stdin(Stdio::null()).stdout(Stdio::null()).spawn()
        };
        let engine =
            ns.netns.run(start).unwrap().unwrap_or_else(|error| panic!("{}: {error}", program.display()));
        let end = Self { ns, number, device, key, engine };
        let deadline = Instant::now() + Duration::from_secs(10);
        while end.client().get().is_err() {
            assert!(Instant::now() < deadline, "{} is not up", program.display());
            std::thread::sleep(Duration::from_millis(20));
        }
        end
    }

    fn client(&self) -> BlockingClient {
        BlockingClient::new(&self.device)
    }

    fn configure(&self, own: &WgSecret, peer: &WgPublic, psk: &Psk, relay: IpAddr) {
        let mut other = SetPeer::new(PublicKey(*peer.as_bytes()));
        other.preshared_key = Some(SecretKey::new(psk.expose()));
        other.endpoint = Some(SocketAddr::new(relay, RELAY_PORT));
        other.allowed_ips = inner(3 - self.number).map(|ip| AllowedIpChange::Add(IpNet::from(ip))).to_vec();
        let change = SetDevice {
            private_key: Some(SecretKey::new(own.expose())),
            listen_port: Some(LANE_PORT),
            peers: vec![other],
            ..SetDevice::default()
        };
        self.client().set(&change).unwrap();
        for ip in inner(self.number) {
            add_address(&self.ns, &self.device, ip, if ip.is_ipv4() { 24 } else { 64 });
        }
        self.ns.up(self.ns.index(&self.device));
    }

    /// Sends from another port from now on.
    pub(crate) fn listen_at(&self, port: u16) {
        self.client().set(&SetDevice { listen_port: Some(port), ..SetDevice::default() }).unwrap();
    }

    /// Time of the last handshake, since the epoch.
    pub(crate) fn last_handshake(&self) -> Duration {
        self.client().get().unwrap().peers[0].last_handshake_time
    }
}

impl Drop for End {
    fn drop(&mut self) {
        if let Err(error) = self.engine.kill().and_then(|()| self.engine.wait()) {
            eprintln!("cleaning up: {error}");
        }
        // It could not do so itself.
        let _removed = std::fs::remove_file(mesh_sys::uapi::socket_path(&self.device));
    }
}

fn mesh_wg() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    // target/debug/deps/netns_relay-…
    test.ancestors().nth(2).unwrap().join("mesh-wg")
}
