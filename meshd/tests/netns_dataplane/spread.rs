//! Routes over two lanes, with real engines at both ends: the first peers with the first, the second with the second.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use mesh_core::host::{HostState, ROUTE_PROTOCOL, Route, diff};
use mesh_keys::Psk;
use mesh_keys::rand_core::OsRng;
use mesh_sys::rtnl::NexthopKind;
use mesh_sys::uapi::BlockingClient;
use meshd::dataplane::{LaneSecret, Plane};
use socket2::SockRef;

use crate::lanes::{Device, peer};
use crate::node::{GATEWAY4, GATEWAY6, Node, Ns, wait};

/// The ranges of both hosts.
const HERE: [&str; 2] = ["10.32.1.0/24", "fd32::/64"];
const THERE: [&str; 2] = ["10.32.2.0/24", "fd32:0:0:2::/64"];

/// Of more flows than this many, some go by each of two lanes: none of 32 by one of them is one try in 10^9.
const FLOWS: usize = 32;

/// Two lanes between the host and the other end of its underlay.
struct Lanes<'a> {
    node: &'a Node,
    here: [Device<'a>; 2],
    there: [Device<'a>; 2],
    psk: Psk,
}

impl<'a> Lanes<'a> {
    fn new(node: &'a Node) -> Self {
        let devices = |ns: &'a Ns| [Device::new(ns), Device::new(ns)];
        Self { node, here: devices(&node.host), there: devices(&node.wire), psk: Psk::random(&mut OsRng) }
    }

    /// The state of one end, with routes over these of its lanes.
    fn state(&self, here: bool, over: &[usize]) -> HostState {
        let (own, other, underlay, ranges) = if here {
            (&self.here, &self.there, "192.0.2.2", THERE)
        } else {
            (&self.there, &self.here, "192.0.2.1", HERE)
        };
        let addresses = if here { [GATEWAY4.into(), GATEWAY6.into()] } else { self.targets() };
        let port = |here: bool, lane: u16| if here { 7020 + lane } else { 7030 + lane };
        let mut state = if here { self.node.desired(true) } else { HostState::default() };
        for (n, (device, far)) in (0..).zip(own.iter().zip(other)) {
            let peer = peer(&self.psk, &format!("{underlay}:{}", port(!here, n)), ranges);
            let peers = BTreeMap::from([(far.secret.public(), peer)]);
            state.lanes.extend(device.state(port(here, n), addresses, peers).lanes);
        }
        let devices: BTreeSet<String> = over.iter().map(|n| own[*n].name.clone()).collect();
        for range in ranges.map(|range| range.parse::<IpNet>().unwrap()) {
            let source = addresses.into_iter().find(|ip| ip.is_ipv4() == range.addr().is_ipv4());
            state.routes.insert(range, Route::Devices { devices: devices.clone(), source, mtu: None });
        }
        for family in ["ipv4", "ipv6"] {
            state.sysctls.insert(format!("net/{family}/fib_multipath_hash_policy"), "1".to_owned());
        }
        state
    }

    fn secrets(&self, here: bool) -> Vec<LaneSecret> {
        (if here { &self.here } else { &self.there }).iter().flat_map(Device::secrets).collect()
    }

    fn plane(&self, here: bool) -> Plane {
        let options = self.node.options(self.secrets(here));
        let ns = if here { &self.node.host } else { &self.node.wire };
        ns.netns.run(|| Plane::open(options).unwrap()).unwrap()
    }

    /// Addresses of the other end.
    fn targets(&self) -> [IpAddr; 2] {
        ["10.32.2.1".parse().unwrap(), "fd32:0:0:2::1".parse().unwrap()]
    }

    /// Bytes that each lane of the host has sent and got.
    fn bytes(&self) -> [(u64, u64); 2] {
        self.here.each_ref().map(|device| {
            let peer = BlockingClient::new(&device.name).get().unwrap().peers.remove(0);
            (peer.tx_bytes, peer.rx_bytes)
        })
    }

    fn there_reaches(&self, plane: &mut Plane, over: &[usize]) {
        let state = self.state(false, over);
        assert_eq!(self.node.wire.netns.run(|| plane.reconcile(&state)).unwrap(), []);
    }

    /// Handshakes on both lanes.
    fn warm(&self, here: &mut Plane, there: &mut Plane) {
        for lane in [0, 1] {
            self.node.reach(here, &self.state(true, &[lane]));
            self.there_reaches(there, &[lane]);
            for to in self.targets() {
                assert!(self.node.pods[0].ns.pings(to), "lane {lane} to {to}");
            }
        }
    }
}

/// Brings a host to a state as the daemon does: an engine that does not answer in time is asked again.
fn settle(ns: &Ns, plane: &mut Plane, state: &HostState) {
    wait("the state is reached", Duration::from_secs(30), || {
        ns.netns.run(|| plane.reconcile(state)).unwrap().is_empty()
    });
}

/// Ids of the nexthops of ours.
fn nexthops(ns: &Ns) -> (Vec<u32>, Vec<u32>) {
    let ours = ns.rtnl().nexthops().unwrap().into_iter().filter(|nexthop| nexthop.protocol == ROUTE_PROTOCOL);
    let (groups, members): (Vec<_>, Vec<_>) =
        ours.partition(|nexthop| matches!(nexthop.kind, NexthopKind::Group(_)));
    let ids = |list: Vec<mesh_sys::rtnl::Nexthop>| list.iter().map(|nexthop| nexthop.id).collect();
    (ids(groups), ids(members))
}

/// Sends back whatever comes, until dropped.
struct Echo {
    to: SocketAddr,
    heard: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Echo {
    fn new(ns: &Ns, at: IpAddr) -> Self {
        let socket = ns.netns.run(|| UdpSocket::bind((at, 0)).unwrap()).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        SockRef::from(&socket).set_recv_buffer_size(4 << 20).unwrap();
        let to = socket.local_addr().unwrap();
        let (heard, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (counter, ends) = (Arc::clone(&heard), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            let mut buffer = [0; 256];
            while !ends.load(Ordering::Relaxed) {
                if let Ok((length, from)) = socket.recv_from(&mut buffer) {
                    counter.fetch_add(1, Ordering::Relaxed);
                    socket.send_to(&buffer[..length], from).unwrap();
                }
            }
        });
        Self { to, heard, stop, thread: Some(thread) }
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap();
    }
}

/// Sockets in a pod, each a flow of its own to the echo.
fn flows(ns: &Ns, echo: &Echo, count: usize) -> Vec<UdpSocket> {
    let any = if echo.to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let open = || {
        let socket = UdpSocket::bind(any).unwrap();
        socket.connect(echo.to).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
        SockRef::from(&socket).set_recv_buffer_size(4 << 20).unwrap();
        socket
    };
    ns.netns.run(|| (0..count).map(|_| open()).collect()).unwrap()
}

/// How many of the flows get an answer.
fn answered(flows: &[UdpSocket]) -> usize {
    flows.iter().for_each(|flow| assert_eq!(flow.send(&[7; 100]).unwrap(), 100));
    // The first that waits in vain gives the others time enough.
    let mut patience = Duration::from_millis(500);
    let mut is_answered = |flow: &&UdpSocket| {
        flow.set_read_timeout(Some(patience)).unwrap();
        let answered = flow.recv(&mut [0; 256]).is_ok();
        patience = if answered { patience } else { Duration::from_millis(1) };
        answered
    };
    flows.iter().filter(|flow| is_answered(flow)).count()
}

/// Sends a packet every millisecond, and checks that all are answered; how many they were. While many answers are
/// outstanding it waits: on a busy machine an engine may not run for a second, and nothing may be lost in a full queue.
fn send_until(stop: &AtomicBool, flow: &UdpSocket) -> u64 {
    const WINDOW: u64 = 16;
    flow.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
    let (got, done) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
    let (counter, ends, answers) = (Arc::clone(&got), Arc::clone(&done), flow.try_clone().unwrap());
    let receiver = std::thread::spawn(move || {
        while !ends.load(Ordering::Relaxed) {
            counter.fetch_add(u64::from(answers.recv(&mut [0; 256]).is_ok()), Ordering::Relaxed);
        }
    });
    let mut sent = 0;
    while !stop.load(Ordering::Relaxed) {
        if sent < got.load(Ordering::Relaxed) + WINDOW {
            assert_eq!(flow.send(&[7; 100]).unwrap(), 100);
            sent += 1;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    wait("all packets are answered", Duration::from_secs(10), || got.load(Ordering::Relaxed) == sent);
    done.store(true, Ordering::Relaxed);
    receiver.join().unwrap();
    sent
}

#[test]
fn flows_use_both_lanes_and_a_change_of_the_lanes_loses_no_packet() {
    let node = Node::new();
    let lanes = Lanes::new(&node);
    let (mut here, mut there) = (lanes.plane(true), lanes.plane(false));
    lanes.warm(&mut here, &mut there);
    let (wide_here, wide_there) = (lanes.state(true, &[0, 1]), lanes.state(false, &[0, 1]));
    let both = [0, 1].as_slice();
    node.reach(&mut here, &wide_here);
    lanes.there_reaches(&mut there, both);
    assert_eq!(node.observe(&mut here, &wide_here), wide_here);
    assert_eq!(
        node.wire.netns.run(|| there.observe(&wide_there).unwrap()).unwrap().routes,
        wide_there.routes
    );

    let saved = std::fs::read_to_string(node.state_dir.path().join("sysctl.saved")).unwrap();
    assert_eq!(saved.matches("fib_multipath_hash_policy\": \"0\"").count(), 2, "{saved}");

    let echoes = lanes.targets().map(|to| Echo::new(&node.wire, to));
    for echo in &echoes {
        let before = lanes.bytes();
        let flows = flows(&node.pods[0].ns, echo, FLOWS);
        assert_eq!(answered(&flows), FLOWS);
        let after = lanes.bytes();
        eprintln!("{FLOWS} flows to {}: bytes of the lanes {before:?}, then {after:?}", echo.to);
        for (before, after) in before.into_iter().zip(after) {
            assert!(after.0 > before.0 + 100 && after.1 > before.1 + 100, "both lanes, both ways");
        }
    }

    // Every millisecond a packet of each flow, while routes change at both ends.
    let heard = || echoes.iter().map(|echo| echo.heard.load(Ordering::Relaxed)).sum::<u64>();
    let before = heard();
    let stop = Arc::new(AtomicBool::new(false));
    let senders: Vec<JoinHandle<u64>> = echoes
        .iter()
        .flat_map(|echo| flows(&node.pods[1].ns, echo, 4))
        .map(|flow| {
            let stop = Arc::clone(&stop);
            std::thread::spawn(move || send_until(&stop, &flow))
        })
        .collect();
    let mut changes = 0;
    let started = Instant::now();
    while started.elapsed() < Duration::from_secs(3) {
        for over in [&[1][..], both, &[0], &[1], both] {
            settle(&node.host, &mut here, &lanes.state(true, over));
            settle(&node.wire, &mut there, &lanes.state(false, over));
            std::thread::sleep(Duration::from_millis(30));
            changes += 1;
        }
    }
    stop.store(true, Ordering::Relaxed);
    let sent: u64 = senders.into_iter().map(|sender| sender.join().unwrap()).sum();
    let arrived = heard() - before;
    eprintln!("{changes} changes at both ends: {sent} packets sent, {arrived} arrived, all answered");
    assert_eq!(sent, arrived);
    for ns in [&node.host, &node.wire] {
        let (groups, members) = nexthops(ns);
        assert_eq!((groups.len(), members.len()), (2, 4), "those of before are gone");
    }
    node.reach(&mut here, &lanes.state(true, &[0]));
    assert_eq!(nexthops(&node.host), (vec![], vec![]), "one lane needs none");
}

#[test]
fn what_others_break_of_a_spread_route_is_put_right_and_nothing_is_left_in_the_end() {
    let node = Node::new();
    let lanes = Lanes::new(&node);
    let mut there = lanes.plane(false);
    lanes.warm(&mut lanes.plane(true), &mut there);
    lanes.there_reaches(&mut there, &[0, 1]);
    let wanted = lanes.state(true, &[0, 1]);
    // Somebody else's, one of them in the range of ids that we take.
    node.host.sh("ip nexthop add id 1 blackhole; ip nexthop add id 1751252992 blackhole proto static");
    let mut running = node.start(lanes.secrets(true), wanted.clone());
    assert_eq!(running.applied(), []);
    let echoes = lanes.targets().map(|to| Echo::new(&node.wire, to));
    let pod = &node.pods[0].ns;
    let mut watcher = lanes.plane(true);
    let is_right = |plane: &mut Plane| {
        let seen = node.host.netns.run(|| plane.observe(&wanted).ok()).unwrap();
        seen.is_some_and(|seen| diff(&seen, &wanted).is_empty())
    };
    let host = &node.host;
    let (one, two) = (&lanes.here[0].name, &lanes.here[1].name);
    let group = |at: usize| nexthops(host).0[at];
    let member = |at: usize| nexthops(host).1[at];
    let spoil: [(&str, &dyn Fn() -> String); 11] = [
        ("the second lane's device deleted", &|| format!("ip link del {two}")),
        ("the first lane's device deleted", &|| format!("ip link del {one}")),
        ("a lane down", &|| format!("ip link set {two} down")),
        ("a member deleted", &|| format!("ip nexthop del id {}", member(0))),
        ("a group deleted", &|| format!("ip nexthop del id {}", group(0))),
        ("the other group deleted", &|| format!("ip nexthop del id {}", group(1))),
        ("all nexthops deleted", &|| "ip nexthop flush protocol 118".to_owned()),
        ("a group changed", &|| format!("ip nexthop replace id {} group {} proto 118", group(0), member(0))),
        ("a member changed", &|| {
            let replace = format!("nexthop replace id {} dev eth0 proto static", member(1));
            format!("ip -4 {replace} || ip -6 {replace}")
        }),
        ("a route changed", &|| format!("ip route replace {} dev {one} proto 118", THERE[0])),
        ("a route deleted", &|| format!("ip -6 route del {}", THERE[1])),
    ];
    for (what, command) in spoil {
        wait(what, Duration::from_secs(5), || is_right(&mut watcher));
        let command = command();
        let broken = Instant::now();
        host.sh(&command);
        // Before it is mended, too: the other lane carries on. What comes back is another matter: the other end has
        // lost no lane, and sends by both.
        if what.contains("lane") {
            for echo in &echoes {
                let heard = || echo.heard.load(Ordering::Relaxed);
                let before = heard();
                let flows = flows(pod, echo, FLOWS);
                flows.iter().for_each(|flow| assert_eq!(flow.send(&[7; 100]).unwrap(), 100));
                wait(what, Duration::from_secs(5), || heard() >= before + FLOWS as u64);
            }
        }
        wait(what, Duration::from_secs(8), || is_right(&mut watcher));
        let took = broken.elapsed();
        let started = Instant::now();
        for echo in &echoes {
            wait(what, Duration::from_secs(20), || answered(&flows(pod, echo, FLOWS)) == FLOWS);
        }
        eprintln!("{what}: right again after {took:?}, all answered after another {:?}", started.elapsed());
    }
    wait("no nexthop too many", Duration::from_secs(3), || {
        let (groups, members) = nexthops(host);
        (groups.len(), members.len()) == (2, 4)
    });

    let mut without = wanted.clone();
    without.lanes.clear();
    without.routes = node.desired(true).routes;
    assert_eq!(running.want(without), []);
    assert_eq!(host.sh("ip nexthop show protocol 118"), "");
    // With the member that was made somebody else's.
    assert_eq!(host.rtnl().nexthops().unwrap().len(), 3, "those of others are left alone");
    running.stop();
}

#[test]
fn a_lane_that_cannot_be_made_is_left_out_and_told_of() {
    let node = Node::new();
    let lanes = Lanes::new(&node);
    let mut there = lanes.plane(false);
    lanes.there_reaches(&mut there, &[0]);
    let (wanted, second) = (lanes.state(true, &[0, 1]), lanes.here[1].name.as_str());
    node.host.sh(&format!("ip link add {second} type bridge"));
    let mut here = lanes.plane(true);
    for _ in 0..2 {
        let problems = node.reconcile(&mut here, &wanted);
        let [problem] = problems.as_slice() else { panic!("{problems:?}") };
        assert!(problem.object == second && problem.text.contains("in the way"), "{problem:?}");
        assert_eq!(nexthops(&node.host), (vec![], vec![]));
        for to in lanes.targets() {
            assert!(node.pods[0].ns.pings(to), "the first lane carries what goes to {to}");
        }
    }
    node.host.sh(&format!("ip link del {second}"));
    node.reach(&mut here, &wanted);
    assert_eq!(node.observe(&mut here, &wanted), wanted);
}

#[test]
fn routes_over_the_same_lanes_keep_their_own_mtu() {
    let node = Node::new();
    let lanes = Lanes::new(&node);
    let mut here = lanes.plane(true);
    let mut state = lanes.state(true, &[0, 1]);
    let mtus = [None, Some(1300), Some(1344), None];
    let net = |family: usize, n: usize| match family {
        0 => format!("10.32.{}.0/24", 20 + n),
        _ => format!("fd32:0:0:{}::/64", 20 + n),
    };
    for (family, range) in THERE.iter().enumerate() {
        let Route::Devices { devices, source, .. } = state.routes[&range.parse().unwrap()].clone() else {
            unreachable!()
        };
        for (n, mtu) in mtus.into_iter().enumerate() {
            let route = Route::Devices { devices: devices.clone(), source, mtu };
            state.routes.insert(net(family, n).parse().unwrap(), route);
        }
    }
    node.reach(&mut here, &state);
    assert_eq!(node.observe(&mut here, &state), state);
    let (groups, members) = nexthops(&node.host);
    assert_eq!((groups.len(), members.len()), (6, 12), "three MTUs in two families");
    // What the kernel keeps at a nexthop is there from the first packet on, so all are asked twice.
    for _ in 0..2 {
        for family in [0, 1] {
            for (n, mtu) in mtus.into_iter().enumerate() {
                for host in 1..=4 {
                    let to = net(family, n)
                        .replace(".0/24", &format!(".{host}"))
                        .replace("/64", &host.to_string());
                    let output = node.host.try_sh(&format!("ping -c1 -W0.05 -n -M do -s 1325 {to} 2>&1"));
                    let said = String::from_utf8_lossy(&output.stdout).into_owned();
                    let told =
                        said.split("mtu").nth(1).map(|rest| rest.trim_matches(|c: char| !c.is_ascii_digit()));
                    let told = told.map(|rest| rest.split(|c: char| !c.is_ascii_digit()).next().unwrap());
                    assert_eq!(told, mtu.map(|mtu| mtu.to_string()).as_deref(), "{to}: {said}");
                }
            }
        }
    }
    // Another daemon knows them.
    let facts = node.host.netns.run(|| lanes.plane(true).facts(None).unwrap()).unwrap();
    assert_eq!(facts.route_mtus.values().flatten().count(), 4);
}

#[test]
fn many_routes_share_a_group_and_move_in_good_time() {
    let node = Node::new();
    let lanes = Lanes::new(&node);
    let mut here = lanes.plane(true);
    let many = |over: &[usize]| {
        let mut state = lanes.state(true, over);
        for range in THERE {
            let route = state.routes[&range.parse().unwrap()].clone();
            let nets = (0..1000).map(|n| match range.contains(':') {
                false => format!("10.33.{}.{}/32", n / 250, n % 250),
                true => format!("fd32:0:0:1{n:03}::/64"),
            });
            state.routes.extend(nets.map(|net| (net.parse().unwrap(), route.clone())));
        }
        state
    };
    for over in [&[0][..], &[0, 1], &[1], &[0, 1]] {
        let state = many(over);
        let started = Instant::now();
        node.reach(&mut here, &state);
        eprintln!("2,000 routes over {over:?} after {:?}", started.elapsed());
        assert_eq!(node.observe(&mut here, &state).routes, state.routes);
        let (groups, members) = nexthops(&node.host);
        assert_eq!((groups.len(), members.len()), if over.len() > 1 { (2, 4) } else { (0, 0) });
    }
}
