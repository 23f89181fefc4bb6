//! A host with an underlay and pods, each in a namespace that goes away with its guard, and the desired state that
//! belongs to it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use mesh_core::api::MacAddr;
use mesh_core::host::{Bridge, Guard, HostState, Port, PortGuard, Route};
use mesh_core::node::{Input, Problem};
use mesh_sys::nft;
use mesh_sys::rtnl::{AddressSpec, Mac, RouteKind};
use meshd::dataplane::{self, LaneSecret, Options, Plane};
use tokio::sync::{mpsc, watch};

pub(crate) use crate::ns::{Ns, veth};

pub(crate) const BRIDGE_MAC: Mac = Mac([0x02, 0x4d, 0, 0, 0, 1]);
pub(crate) const GATEWAY4: Ipv4Addr = Ipv4Addr::new(10, 32, 1, 1);
pub(crate) const GATEWAY6: Ipv6Addr = Ipv6Addr::new(0xfd32, 0, 0, 0, 0, 0, 0, 1);
pub(crate) const MTU: u32 = 1400;

/// A pod as the plugin makes it: its own end is up and configured, the host's end is down and in no bridge.
pub(crate) struct Pod {
    pub(crate) ns: Ns,
    pub(crate) port: String,
    pub(crate) mac: Mac,
    pub(crate) v4: Ipv4Addr,
    pub(crate) v6: Ipv6Addr,
}

impl Pod {
    fn new(host: &Ns, n: u8) -> Self {
        let pod = Self {
            ns: Ns::new("pod"),
            port: format!("mv0000000000{n:02x}"),
            mac: Mac([0x02, 0x4d, 0, 0, 1, n]),
            v4: Ipv4Addr::new(10, 32, 1, 10 + n),
            v6: Ipv6Addr::new(0xfd32, 0, 0, 0, 0, 0, 1, u16::from(n)),
        };
        pod.plug(host);
        pod
    }

    pub(crate) fn plug(&self, host: &Ns) {
        veth(host, &self.port, &self.ns, "eth0", Some(self.mac));
        let mut inside = self.ns.rtnl();
        let eth0 = self.ns.index("eth0");
        self.ns.up(eth0);
        for (ip, gateway) in [(IpAddr::V4(self.v4), IpAddr::V4(GATEWAY4)), (self.v6.into(), GATEWAY6.into())]
        {
            inside.add_address(eth0, AddressSpec::plain(IpNet::from(ip))).unwrap();
            inside.add_neighbour(eth0, gateway, BRIDGE_MAC).unwrap();
            inside.add_route(mesh_sys::rtnl::Route::dev(IpNet::from(gateway), eth0, 118)).unwrap();
            let all = if ip.is_ipv4() { "0.0.0.0/0" } else { "::/0" };
            let mut default = mesh_sys::rtnl::Route::dev(all.parse().unwrap(), eth0, 118);
            default.kind =
                RouteKind::Unicast { dev: eth0, gateway: Some(gateway), onlink: true, prefsrc: None };
            inside.add_route(default).unwrap();
        }
    }

    pub(crate) fn addresses(&self) -> [IpAddr; 2] {
        [self.v4.into(), self.v6.into()]
    }
}

/// A host with an underlay that would carry anything, and two pods that are not attached yet.
pub(crate) struct Node {
    pub(crate) host: Ns,
    /// The other end of the underlay.
    pub(crate) wire: Ns,
    pub(crate) pods: Vec<Pod>,
    pub(crate) state_dir: tempfile::TempDir,
}

impl Node {
    pub(crate) fn new() -> Self {
        let (host, wire) = (Ns::new("host"), Ns::new("wire"));
        veth(&host, "eth0", &wire, "eth0", None);
        for (ns, last) in [(&host, 1), (&wire, 2)] {
            let eth0 = ns.index("eth0");
            ns.up(eth0);
            for net in [format!("192.0.2.{last}/24"), format!("2001:db8::{last}/64")] {
                let spec = AddressSpec { no_prefix_route: false, ..AddressSpec::plain(net.parse().unwrap()) };
                ns.rtnl().add_address(eth0, spec).unwrap();
            }
        }
        host.sh("ip route add default via 192.0.2.2; ip -6 route add default via 2001:db8::2");
        // What is routed wrongly must really leave, not wait for a neighbour.
        let mac = wire.rtnl().link("eth0").unwrap().unwrap().mac.unwrap();
        for ip in ["192.0.2.2", "2001:db8::2"] {
            host.rtnl().add_neighbour(host.index("eth0"), ip.parse().unwrap(), mac).unwrap();
        }
        // As on a host on which nobody has been yet, and in the worst case.
        host.sh("sysctl -qw net.ipv4.conf.all.send_redirects=1 net.ipv4.conf.default.send_redirects=1");
        let pods = (1..=2).map(|n| Pod::new(&host, n)).collect();
        let node = Self { host, wire, pods, state_dir: tempfile::tempdir().unwrap() };
        node.bridge_netfilter(false);
        node
    }

    pub(crate) fn bridge_netfilter(&self, on: bool) {
        let value = u8::from(on);
        self.host.sh(&format!(
            "sysctl -qw net.bridge.bridge-nf-call-iptables={value} net.bridge.bridge-nf-call-ip6tables={value}"
        ));
    }

    pub(crate) fn options(&self, lanes: Vec<LaneSecret>) -> Options {
        let test = std::env::current_exe().unwrap();
        // target/debug/deps/netns_dataplane-…
        let mesh_wg = test.ancestors().nth(2).unwrap().join("mesh-wg");
        Options { mesh_wg, lanes, state_dir: self.state_dir.path().to_owned(), proc_sys: None }
    }

    pub(crate) fn plane(&self) -> Plane {
        self.host.netns.run(|| Plane::open(self.options(Vec::new())).unwrap()).unwrap()
    }

    pub(crate) fn reconcile(&self, plane: &mut Plane, desired: &HostState) -> Vec<Problem> {
        self.host.netns.run(|| plane.reconcile(desired)).unwrap()
    }

    pub(crate) fn observe(&self, plane: &mut Plane, desired: &HostState) -> HostState {
        self.host.netns.run(|| plane.observe(desired).unwrap()).unwrap()
    }

    /// Brings the host to the state, which must succeed.
    pub(crate) fn reach(&self, plane: &mut Plane, desired: &HostState) {
        assert_eq!(self.reconcile(plane, desired), []);
    }

    pub(crate) fn nft(&self) -> nft::Blocking {
        nft::Blocking::open_in(&self.host.netns).unwrap()
    }

    /// The state that belongs to these pods, with `isolated` ports.
    pub(crate) fn desired(&self, isolated: bool) -> HostState {
        let own = BTreeSet::from([IpAddr::V4(GATEWAY4), GATEWAY6.into()]);
        let mac = MacAddr(BRIDGE_MAC.0);
        let ranges = ["10.32.0.0/12", "fd32::/48"];
        let mut state = HostState {
            sysctls: [
                ("net/ipv4/ip_forward", "1"),
                ("net/ipv6/conf/all/forwarding", "1"),
                ("net/ipv4/conf/mesh0/rp_filter", "2"),
                ("net/ipv4/conf/mesh0/send_redirects", "0"),
                ("net/ipv6/conf/mesh0/accept_ra", "0"),
            ]
            .map(|(path, value)| (path.to_owned(), value.to_owned()))
            .into(),
            guard: Some(Guard {
                cluster_ipv4: "10.32.0.0/12".parse().unwrap(),
                cluster_ipv6: "fd32::/48".parse().unwrap(),
                bridge_mac: mac,
                ports: BTreeMap::new(),
            }),
            bridge: Some(Bridge { name: "mesh0".to_owned(), mac, mtu: MTU, addresses: own }),
            lanes: BTreeMap::new(),
            ports: BTreeMap::new(),
            routes: ranges.map(|range| (range.parse().unwrap(), Route::Unreachable)).into(),
        };
        for pod in &self.pods {
            let (mac, ipv4, ipv6) = (MacAddr(pod.mac.0), pod.v4, pod.v6);
            state.ports.insert(pod.port.clone(), Port { mac, ipv4, ipv6, mtu: MTU, isolated });
            state.guard.as_mut().unwrap().ports.insert(pod.port.clone(), PortGuard { mac, ipv4, ipv6 });
            for (ip, own) in [(IpAddr::V4(ipv4), IpAddr::V4(GATEWAY4)), (ipv6.into(), GATEWAY6.into())] {
                state.routes.insert(IpNet::from(ip), Route::to_device("mesh0", Some(own), None));
            }
        }
        state
    }

    /// Starts [`dataplane::run`] in the host's namespace.
    pub(crate) fn start(&self, lanes: Vec<LaneSecret>, desired: HostState) -> Running {
        let (sender, receiver) = watch::channel(Some((1, Arc::new(desired))));
        let (inputs, inbox) = mpsc::channel(4096);
        let (netns, options) = (self.host.netns.try_clone().unwrap(), self.options(lanes));
        let thread = std::thread::spawn(move || {
            netns
                .run(move || {
                    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                    runtime.block_on(dataplane::run(options, receiver, inputs))
                })
                .unwrap()
        });
        Running { sender: Some(sender), inbox, thread: Some(thread), revision: 1 }
    }
}

/// The latest desired state and its revision.
type Latest = Option<(u64, Arc<HostState>)>;

/// The task of the daemon, without the daemon.
pub(crate) struct Running {
    sender: Option<watch::Sender<Latest>>,
    pub(crate) inbox: mpsc::Receiver<Input>,
    thread: Option<JoinHandle<anyhow::Result<()>>>,
    revision: u64,
}

impl Running {
    /// Wants another state; what could not be done of it.
    pub(crate) fn want(&mut self, desired: HostState) -> Vec<Problem> {
        self.revision += 1;
        self.sender.as_ref().unwrap().send_replace(Some((self.revision, Arc::new(desired))));
        self.applied()
    }

    /// What could not be done of the latest state.
    pub(crate) fn applied(&mut self) -> Vec<Problem> {
        let latest = self.revision;
        self.expect("the state was applied", Duration::from_secs(15), |input| match input {
            Input::Applied { revision, problems } if revision == latest => Some(problems),
            _ => None,
        })
    }

    /// Waits for an input.
    pub(crate) fn expect<T>(
        &mut self,
        what: &str,
        at_most: Duration,
        mut wanted: impl FnMut(Input) -> Option<T>,
    ) -> T {
        let deadline = Instant::now() + at_most;
        loop {
            match self.inbox.try_recv() {
                Ok(input) => {
                    if let Some(found) = wanted(input) {
                        return found;
                    }
                }
                Err(mpsc::error::TryRecvError::Empty) => {
                    assert!(Instant::now() < deadline, "within {at_most:?}: {what}");
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(mpsc::error::TryRecvError::Disconnected) => panic!("the task ended: {:?}", self.end()),
            }
        }
    }

    fn end(&mut self) -> anyhow::Result<()> {
        drop(self.sender.take());
        match self.thread.take() {
            Some(thread) => thread.join().unwrap(),
            None => Ok(()),
        }
    }

    /// Closes the receiver, by which the task ends.
    pub(crate) fn stop(mut self) {
        self.end().unwrap();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            eprintln!("the task ended with {error:#}");
        }
    }
}

/// Waits until something holds; how long that took.
pub(crate) fn wait(what: &str, at_most: Duration, mut holds: impl FnMut() -> bool) -> Duration {
    let started = Instant::now();
    while !holds() {
        assert!(started.elapsed() < at_most, "within {at_most:?}: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
    started.elapsed()
}
