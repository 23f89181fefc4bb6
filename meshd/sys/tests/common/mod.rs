//! What the namespace tests share: a namespace that goes away with its guard, and commands inside it.
#![allow(dead_code, reason = "each test binary uses a part of it")]
#![allow(clippy::print_stderr, reason = "a failed clean-up must be seen, and must not panic while panicking")]

use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};

use mesh_sys::netns::NetNs;
use mesh_sys::rtnl::{
    AddressSpec, Blocking, BridgePortChange, BridgeSpec, LinkChange, Mac, Route, VethPeer, VethSpec,
};

/// A namespace of this test; deleted when dropped, also by a panic.
pub(crate) struct Ns {
    pub(crate) name: String,
    pub(crate) netns: NetNs,
}

impl Ns {
    pub(crate) fn new(label: &str) -> Self {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        assert!(nix::unistd::geteuid().is_root(), "this test needs root: it makes network namespaces");
        let n = COUNTER.fetch_add(1, Ordering::Relaxed);
        let name = format!("sysw-{}-{label}-{n}", std::process::id());
        let netns = NetNs::create_named(&name).unwrap();
        let mut rtnl = Blocking::open_in(&netns).unwrap();
        let up = LinkChange { up: Some(true), ..LinkChange::default() };
        rtnl.set_link(1, up).unwrap();
        Self { name, netns }
    }

    pub(crate) fn rtnl(&self) -> Blocking {
        Blocking::open_in(&self.netns).unwrap()
    }

    /// Runs a command inside; its output, which must be a success.
    pub(crate) fn sh(&self, command: &str) -> String {
        let output = self.try_sh(command);
        assert!(
            output.status.success(),
            "`{command}` in {}: {}{}",
            self.name,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).unwrap()
    }

    pub(crate) fn try_sh(&self, command: &str) -> Output {
        self.netns.run(|| Command::new("sh").args(["-c", command]).output().unwrap()).unwrap()
    }

    /// Whether one ping gets through.
    pub(crate) fn pings(&self, to: &str) -> bool {
        self.try_sh(&format!("ping -c1 -W1 -n {to}")).status.success()
    }
}

impl Drop for Ns {
    fn drop(&mut self) {
        if let Err(error) = NetNs::delete_named(&self.name) {
            eprintln!("cleaning up: {error}");
        }
    }
}

/// A bridge with pods as its ports, wired as the mesh does it.
pub(crate) struct Node {
    pub(crate) host: Ns,
    pub(crate) pods: Vec<Pod>,
}

pub(crate) struct Pod {
    pub(crate) ns: Ns,
    pub(crate) port: String,
    pub(crate) port_index: u32,
    pub(crate) mac: Mac,
    pub(crate) v4: std::net::Ipv4Addr,
    pub(crate) v6: std::net::Ipv6Addr,
}

pub(crate) const BRIDGE_MAC: Mac = Mac([0x02, 0x4d, 0, 0, 0, 1]);
pub(crate) const GATEWAY4: &str = "10.32.1.1";
pub(crate) const GATEWAY6: &str = "fd32::1";

impl Node {
    pub(crate) fn new(pods: u8, isolated: bool) -> Self {
        let host = Ns::new("host");
        let mut rtnl = host.rtnl();
        host.sh("sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1 net.ipv4.conf.all.send_redirects=0 net.ipv4.conf.default.send_redirects=0");
        let bridge = rtnl
            .create_bridge(BridgeSpec {
                name: "mesh0".into(),
                mac: Some(BRIDGE_MAC),
                mtu: Some(1400),
                multicast_snooping: false,
            })
            .unwrap();
        for net in ["10.32.1.1/32", "fd32::1/128"] {
            rtnl.add_address(bridge, AddressSpec::plain(net.parse().unwrap())).unwrap();
        }
        rtnl.set_link(bridge, LinkChange { up: Some(true), ..LinkChange::default() }).unwrap();
        let pods = (0..pods).map(|n| pod(&mut rtnl, bridge, n, isolated)).collect();
        Self { host, pods }
    }
}

fn pod(rtnl: &mut Blocking, bridge: u32, n: u8, isolated: bool) -> Pod {
    let ns = Ns::new("pod");
    let mac = Mac([0x02, 0x4d, 0, 0, 1, n]);
    let port = format!("mv{n}");
    let v4 = std::net::Ipv4Addr::new(10, 32, 1, 10 + n);
    let v6 = std::net::Ipv6Addr::new(0xfd32, 0, 0, 0, 0, 0, 1, u16::from(n));
    let port_index = rtnl
        .create_veth(VethSpec {
            name: port.clone(),
            mac: None,
            mtu: Some(1400),
            master: Some(bridge),
            peer: VethPeer {
                name: "eth0".into(),
                mac: Some(mac),
                mtu: Some(1400),
                netns: Some(ns.netns.try_clone().unwrap()),
            },
        })
        .unwrap();
    let settings = BridgePortChange {
        isolated: Some(isolated),
        learning: Some(false),
        unicast_flood: Some(false),
        multicast_flood: Some(!isolated),
        broadcast_flood: Some(!isolated),
        ..BridgePortChange::default()
    };
    rtnl.set_bridge_port(port_index, settings).unwrap();
    rtnl.set_link(port_index, LinkChange { up: Some(true), ..LinkChange::default() }).unwrap();
    rtnl.add_fdb(mesh_sys::rtnl::FdbEntry::on_port(port_index, mac)).unwrap();
    rtnl.add_neighbour(bridge, v4.into(), mac).unwrap();
    rtnl.add_neighbour(bridge, v6.into(), mac).unwrap();
    let mut inside = ns.rtnl();
    let eth0 = inside.link("eth0").unwrap().unwrap().index;
    inside.set_link(eth0, LinkChange { up: Some(true), ..LinkChange::default() }).unwrap();
    for (ip, gateway) in [(std::net::IpAddr::from(v4), GATEWAY4), (v6.into(), GATEWAY6)] {
        let bits = if ip.is_ipv4() { 32 } else { 128 };
        let net = ipnet::IpNet::new(ip, bits).unwrap();
        inside.add_address(eth0, AddressSpec::plain(net)).unwrap();
        let gateway: std::net::IpAddr = gateway.parse().unwrap();
        inside.add_route(Route::dev(ipnet::IpNet::new(gateway, bits).unwrap(), eth0, 118)).unwrap();
        let all = if ip.is_ipv4() { "0.0.0.0/0" } else { "::/0" };
        let mut default = Route::dev(all.parse().unwrap(), eth0, 118);
        default.kind = mesh_sys::rtnl::RouteKind::Unicast {
            dev: eth0,
            gateway: Some(gateway),
            onlink: true,
            prefsrc: None,
        };
        inside.add_route(default).unwrap();
        rtnl.add_route(Route::dev(net, bridge, 118)).unwrap();
    }
    assert!(rtnl.wait_port_forwarding(port_index, std::time::Duration::from_secs(3)).unwrap());
    Pod { ns, port, port_index, mac, v4, v6 }
}
