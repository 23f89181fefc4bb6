//! Tunnel devices with real engines. Their sockets are in a directory that all namespaces share, so every device has
//! a name of its own.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use mesh_core::host::{HostState, Lane, LanePeer, Route};
use mesh_core::node::Input;
use mesh_keys::rand_core::OsRng;
use mesh_keys::{Psk, WgPublic, WgSecret};
use meshd::dataplane::{LaneSecret, Options, Plane};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::node::{GATEWAY4, GATEWAY6, Node, Ns, wait};

const MTU: u32 = 1380;

/// A tunnel device of a namespace. Its engine ends with it.
pub(crate) struct Device<'a> {
    ns: &'a Ns,
    pub(crate) name: String,
    pub(crate) secret: WgSecret,
}

impl<'a> Device<'a> {
    pub(crate) fn new(ns: &'a Ns) -> Self {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        let n = COUNTER.fetch_add(1, Ordering::Relaxed);
        Self { ns, name: format!("meshwg{}{n}", std::process::id()), secret: WgSecret::generate(&mut OsRng) }
    }

    pub(crate) fn secrets(&self) -> Vec<LaneSecret> {
        vec![LaneSecret { device: self.name.clone(), secret: self.secret.clone() }]
    }

    /// The engine's process.
    fn pid(&self) -> Option<Pid> {
        let wanted = format!("mesh-wg\0{}\0", self.name);
        std::fs::read_dir("/proc").unwrap().find_map(|entry| {
            let entry = entry.unwrap();
            let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
            let command = std::fs::read(entry.path().join("cmdline")).ok()?;
            String::from_utf8_lossy(&command).ends_with(&wanted).then(|| Pid::from_raw(pid))
        })
    }

    pub(crate) fn state(
        &self,
        port: u16,
        own: [IpAddr; 2],
        peers: BTreeMap<WgPublic, LanePeer>,
    ) -> HostState {
        let mut state = HostState::default();
        for peer in peers.values() {
            for range in &peer.allowed_ips {
                let source = own.into_iter().find(|ip| ip.is_ipv4() == range.addr().is_ipv4());
                state.routes.insert(*range, Route::to_device(&self.name, source, None));
            }
        }
        let (public_key, addresses) = (self.secret.public(), BTreeSet::from(own));
        state.lanes.insert(self.name.clone(), Lane { port, public_key, mtu: MTU, addresses, peers });
        state
    }
}

impl Drop for Device<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.ns.rtnl().delete_link(&self.name) {
            eprintln!("cleaning up: {error}");
        }
    }
}

pub(crate) fn peer(psk: &Psk, endpoint: &str, ranges: [&str; 2]) -> LanePeer {
    LanePeer {
        psk: psk.clone(),
        endpoint: Some(endpoint.parse().unwrap()),
        force_endpoint: false,
        allowed_ips: ranges.iter().map(|range| range.parse::<IpNet>().unwrap()).collect(),
        keepalive: 0,
    }
}

#[test]
fn a_tunnel_comes_up_changes_its_key_survives_its_engine_and_is_adopted() {
    let node = Node::new();
    let (here, there) = (Device::new(&node.host), Device::new(&node.wire));
    let there4: IpAddr = "10.32.2.1".parse().unwrap();
    let there6: IpAddr = "fd32:0:0:2::1".parse().unwrap();
    let own = [IpAddr::V4(GATEWAY4), GATEWAY6.into()];
    let state_here = |psk: &Psk| {
        let peers = peer(psk, "192.0.2.2:7002", ["10.32.2.0/24", "fd32:0:0:2::/64"]);
        let lane = here.state(7001, own, BTreeMap::from([(there.secret.public(), peers)]));
        let mut state = node.desired(true);
        state.lanes = lane.lanes;
        state.routes.extend(lane.routes);
        state
    };
    let state_there = |psk: &Psk| {
        let peers = peer(psk, "192.0.2.1:7001", ["10.32.1.0/24", "fd32::/64"]);
        there.state(7002, [there4, there6], BTreeMap::from([(here.secret.public(), peers)]))
    };
    let psk = Psk::random(&mut OsRng);
    let mut other = other_host(&node, &there);
    let other_reaches = |plane: &mut Plane, psk: &Psk| {
        let problems = node.wire.netns.run(|| plane.reconcile(&state_there(psk))).unwrap();
        assert_eq!(problems, []);
    };
    other_reaches(&mut other, &psk);

    let started = Instant::now();
    let mut running = node.start(here.secrets(), state_here(&psk));
    assert_eq!(running.applied(), []);
    eprintln!("first state with an engine reached in {:?}", started.elapsed());
    let engine = here.pid().expect("an engine runs");
    let environment = std::fs::read_to_string(format!("/proc/{engine}/environ")).unwrap();
    let names: Vec<&str> = environment.split('\0').filter_map(|entry| entry.split('=').next()).collect();
    assert!(names.iter().all(|name| ["", "PATH", "LOG_LEVEL"].contains(name)), "{names:?}");
    assert!(node.host.pings(there4) && node.host.pings(there6), "the host reaches the other");
    assert!(node.pods[0].ns.pings(there4) && node.pods[0].ns.pings(there6), "a pod reaches the other");
    let fact = running.expect("a handshake is told of", Duration::from_secs(6), |input| match input {
        Input::Tunnels(facts) => {
            facts.get(&there.secret.public()).copied().filter(|f| f.handshake_age.is_some())
        }
        _ => None,
    });
    assert_eq!(fact.endpoint, Some(SocketAddr::from(([192, 0, 2, 2], 7002))));
    assert!(
        fact.handshake_age < Some(Duration::from_secs(10)) && fact.rx_bytes > 0 && fact.tx_bytes > 0,
        "{fact:?}"
    );

    let renewed = Psk::random(&mut OsRng);
    assert_eq!(running.want(state_here(&renewed)), []);
    other_reaches(&mut other, &renewed);
    assert!(node.host.pings(there4), "the key changes without an interruption");
    assert_eq!(here.pid(), Some(engine));

    // The engine dies: device, routes and peers are back.
    let mut watcher = node.host.netns.run(|| Plane::open(node.options(here.secrets())).unwrap()).unwrap();
    let wanted = state_here(&renewed);
    kill(engine, Signal::SIGKILL).unwrap();
    let killed = Instant::now();
    wait("the engine is gone", Duration::from_secs(1), || here.pid() != Some(engine));
    wait("another engine runs, with all that belongs to it", Duration::from_secs(1), || {
        let seen = node.host.netns.run(|| plane_sees(&mut watcher, &wanted)).unwrap();
        seen.is_some_and(|seen| mesh_core::host::diff(&seen, &wanted).is_empty())
    });
    eprintln!("tunnel back {:?} after its engine was killed", killed.elapsed());
    assert!(killed.elapsed() < Duration::from_secs(1));
    wait("the tunnel carries packets again", Duration::from_secs(8), || node.host.pings(there6));
    let engine = here.pid().expect("another engine runs");

    // The daemon ends: the engine goes on, and the next daemon takes it as it is.
    running.stop();
    assert!(node.host.pings(there4), "the tunnel works without the daemon");
    let mut running = node.start(here.secrets(), state_here(&renewed));
    assert_eq!(running.applied(), []);
    assert_eq!(here.pid(), Some(engine), "the engine is taken over");
    assert!(node.host.pings(there4));

    // A lane that is not wanted any more goes, and its engine with it; its ranges are closed.
    let mut without = state_here(&renewed);
    without.lanes.clear();
    without.routes = node.desired(true).routes;
    assert_eq!(running.want(without), []);
    wait("the engine ends with its device", Duration::from_secs(3), || here.pid().is_none());
    assert!(!node.host.pings(there4));
    running.stop();
}

/// `None` while the device comes and goes.
fn plane_sees(plane: &mut Plane, desired: &HostState) -> Option<HostState> {
    plane.observe(desired).ok()
}

/// The other end of the underlay as another host of the mesh.
pub(crate) fn other_host(node: &Node, device: &Device<'_>) -> Plane {
    let options = node.options(device.secrets());
    node.wire.netns.run(|| Plane::open(options).unwrap()).unwrap()
}

#[test]
fn peers_and_prefixes_come_move_and_go_as_wanted() {
    let node = Node::new();
    let device = Device::new(&node.host);
    let mut plane = node.host.netns.run(|| Plane::open(node.options(device.secrets())).unwrap()).unwrap();
    let keys: Vec<WgPublic> = (0..3).map(|_| WgSecret::generate(&mut OsRng).public()).collect();
    let psk = Psk::random(&mut OsRng);
    let with = |entries: &[(usize, &str)]| {
        let mut peers: BTreeMap<WgPublic, LanePeer> = BTreeMap::new();
        for (key, range) in entries {
            let entry = LanePeer {
                psk: psk.clone(),
                endpoint: Some("192.0.2.2:7002".parse().unwrap()),
                force_endpoint: false,
                allowed_ips: BTreeSet::new(),
                keepalive: 25,
            };
            peers.entry(keys[*key]).or_insert(entry).allowed_ips.insert(range.parse().unwrap());
        }
        let mut state = device.state(7003, ["10.32.1.1".parse().unwrap(), "fd32::1".parse().unwrap()], peers);
        state.routes.clear();
        state
    };
    for entries in [
        &[(0, "10.32.2.0/24"), (0, "fd32:0:0:2::/64"), (1, "10.32.3.0/24")][..],
        &[(1, "10.32.2.0/24"), (0, "fd32:0:0:2::/64"), (1, "10.32.3.0/24")],
        &[(2, "10.32.2.0/24"), (1, "10.32.3.0/24")],
        &[(2, "10.32.2.0/24"), (2, "10.32.3.0/24"), (0, "fd32:0:0:2::/64")],
        &[],
    ] {
        let desired = with(entries);
        node.reach(&mut plane, &desired);
        let seen = node.observe(&mut plane, &desired);
        assert_eq!(seen.lanes, desired.lanes);
    }
    // Port and MTU change under the running engine.
    let engine = device.pid();
    let mut desired = with(&[(0, "10.32.2.0/24")]);
    let lane = desired.lanes.get_mut(&device.name).unwrap();
    (lane.port, lane.mtu) = (7004, 1300);
    node.reach(&mut plane, &desired);
    assert_eq!(node.observe(&mut plane, &desired).lanes, desired.lanes);
    assert_eq!(device.pid(), engine);
}

#[test]
fn a_device_without_an_engine_is_made_anew_and_one_of_another_kind_is_left_alone() {
    let node = Node::new();
    let device = Device::new(&node.host);
    let mut plane = node.host.netns.run(|| Plane::open(node.options(device.secrets())).unwrap()).unwrap();
    let own = ["10.32.1.1".parse().unwrap(), "fd32::1".parse().unwrap()];
    let desired = device.state(7005, own, BTreeMap::new());
    node.host.sh(&format!("ip link add {} type bridge", device.name));
    let problems = node.reconcile(&mut plane, &desired);
    let [problem] = problems.as_slice() else { panic!("{problems:?}") };
    assert!(
        problem.object == device.name && problem.text.contains("of kind bridge is in the way"),
        "{problem:?}"
    );
    node.host.sh(&format!("ip link del {0}; ip tuntap add {0} mode tun", device.name));
    node.reach(&mut plane, &desired);
    assert!(device.pid().is_some());
}

#[test]
fn an_engine_that_does_not_start_is_a_problem_of_its_device_alone() {
    let node = Node::new();
    let device = Device::new(&node.host);
    let options = Options { mesh_wg: "/bin/false".into(), ..node.options(device.secrets()) };
    let mut plane = node.host.netns.run(|| Plane::open(options).unwrap()).unwrap();
    let own = [IpAddr::V4(GATEWAY4), GATEWAY6.into()];
    let peers = peer(&Psk::random(&mut OsRng), "192.0.2.2:7002", ["10.32.2.0/24", "fd32:0:0:2::/64"]);
    let lane = device.state(7006, own, BTreeMap::from([(WgSecret::generate(&mut OsRng).public(), peers)]));
    let mut desired = node.desired(true);
    desired.lanes = lane.lanes;
    desired.routes.extend(lane.routes);
    let problems = node.reconcile(&mut plane, &desired);
    let [problem] = problems.as_slice() else { panic!("{problems:?}") };
    assert!(problem.object == device.name && problem.text.contains("/bin/false ended with"), "{problem:?}");
    assert!(node.pods[0].ns.pings(node.pods[1].v4), "pods talk all the same");
}
