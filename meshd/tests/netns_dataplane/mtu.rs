//! Routes into a tunnel that carry less than its device: what pods hear of it, and what their TCP does.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use mesh_core::host::{HostState, Route};
use mesh_keys::Psk;
use mesh_keys::rand_core::OsRng;
use socket2::SockRef;

use crate::lanes::{Device, other_host, peer};
use crate::node::{GATEWAY4, GATEWAY6, Node, Pod};

/// The MTU of the routes to the other host, of both families; that of all devices is more.
const ROUTE: [u32; 2] = [1232, 1280];

/// Whether a packet of so many bytes that nobody may cut up is answered, and what is said.
fn ping(pod: &Pod, to: IpAddr, bytes: u32) -> (bool, String) {
    let headers = if to.is_ipv4() { 28 } else { 48 };
    let output = pod.ns.try_sh(&format!("ping -M do -c1 -W1 -n -s {} {to}", bytes - headers));
    (output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Bytes of TCP segments that either end of a connection from the pod sends.
fn segments(node: &Node, pod: &Pod, to: IpAddr) -> [u32; 2] {
    let listener = node.wire.netns.run(|| TcpListener::bind((to, 0)).unwrap()).unwrap();
    let target = SocketAddr::new(to, listener.local_addr().unwrap().port());
    let connect = || TcpStream::connect_timeout(&target, Duration::from_secs(5)).unwrap();
    let mut here = pod.ns.netns.run(connect).unwrap();
    let (mut there, _) = listener.accept().unwrap();
    for stream in [&here, &there] {
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    }
    // Both ways more than one segment.
    let bytes = vec![7; 100_000];
    let mut read = vec![0; bytes.len()];
    here.write_all(&bytes).unwrap();
    there.read_exact(&mut read).unwrap();
    there.write_all(&bytes).unwrap();
    here.read_exact(&mut read).unwrap();
    [&here, &there].map(|stream| SockRef::from(stream).tcp_mss().unwrap())
}

#[test]
fn pods_hear_how_long_packets_may_be_and_their_tcp_keeps_to_it() {
    let node = Node::new();
    let (here, there) = (Device::new(&node.host), Device::new(&node.wire));
    let (there4, there6): (IpAddr, IpAddr) = ("10.32.2.1".parse().unwrap(), "fd32:0:0:2::1".parse().unwrap());
    let psk = Psk::random(&mut OsRng);
    let of_there = peer(&psk, "192.0.2.1:7004", ["10.32.1.0/24", "fd32::/64"]);
    let state_there = there.state(7005, [there4, there6], BTreeMap::from([(here.secret.public(), of_there)]));
    let mut other = other_host(&node, &there);
    assert_eq!(node.wire.netns.run(|| other.reconcile(&state_there)).unwrap(), []);

    let own = [IpAddr::V4(GATEWAY4), GATEWAY6.into()];
    let of_here = peer(&psk, "192.0.2.2:7005", ["10.32.2.0/24", "fd32:0:0:2::/64"]);
    let lane = here.state(7004, own, BTreeMap::from([(there.secret.public(), of_here)]));
    let state = |mtus: Option<[u32; 2]>| -> HostState {
        let mut state = node.desired(true);
        state.lanes.clone_from(&lane.lanes);
        for (to, route) in &lane.routes {
            let Route::Devices { devices, source, .. } = route.clone() else { unreachable!() };
            let mtu = mtus.map(|[v4, v6]| if to.addr().is_ipv4() { v4 } else { v6 });
            state.routes.insert(*to, Route::Devices { devices, source, mtu });
        }
        state
    };
    let mut running = node.start(here.secrets(), state(None));
    assert_eq!(running.applied(), []);
    let [pod, second] = node.pods.as_slice() else { unreachable!() };
    let targets = [there4, there6];
    for to in targets {
        assert!(pod.ns.pings(to));
        assert!(ping(pod, to, 1380).0, "all that the device carries");
    }
    let wide = targets.map(|to| segments(&node, pod, to));

    assert_eq!(running.want(state(Some(ROUTE))), []);
    for ((to, mtu), wide) in targets.into_iter().zip(ROUTE).zip(wide) {
        // The connection is new, and its segments fit from the first on, in both directions. Of 1,380 they were 1,328 and
        // 1,308: 12 are for time stamps.
        let headers = if to.is_ipv4() { 40 } else { 60 };
        assert_eq!(wide, [1380 - headers - 12; 2]);
        assert_eq!(segments(&node, pod, to), [mtu - headers - 12; 2], "{to}");
        // The second pod has sent nothing there yet.
        let (answered, said) = ping(second, to, mtu + 1);
        let told = [format!("(mtu = {mtu})"), format!("mtu={mtu}\n")];
        assert!(!answered && told.iter().any(|told| said.contains(told)), "{said}");
        let (answered, said) = ping(second, to, mtu + 1);
        assert!(!answered && !said.contains("From"), "its own kernel knows: {said}");
        assert!(ping(second, to, mtu).0, "{to}");
    }
    // Another daemon sees what this one has found.
    let mut plane =
        node.host.netns.run(|| meshd::dataplane::Plane::open(node.options(here.secrets())).unwrap()).unwrap();
    let facts = node.host.netns.run(|| plane.facts(None).unwrap()).unwrap();
    let found: Vec<Option<u32>> = facts.route_mtus.values().copied().collect();
    assert_eq!(found, ROUTE.map(Some), "{:?}", facts.route_mtus);
    let later = node.host.netns.run(|| plane.facts(Some(&state(None))).unwrap()).unwrap();
    assert!(later.route_mtus.is_empty());

    assert_eq!(running.want(state(None)), []);
    // Who was told that a packet is too big believes it for ten minutes; the other pod was not.
    assert_eq!(targets.map(|to| segments(&node, pod, to)), wide, "for new connections at once");
    running.stop();
}
