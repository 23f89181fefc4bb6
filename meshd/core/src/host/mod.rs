//! What the kernel of this host should hold, what it does hold, and the way from one to the other.
//!
//! [`HostState`] describes only what is ours: the bridge, the lanes and their peers, routes of our protocol
//! number, the ports of attached pods, the guard ruleset, a few sysctls. The same type serves as the desired
//! state (computed by the node) and the observed one (read from the kernel). [`diff()`] gives the operations
//! that lead from one to the other, in an order that never opens a gap:
//!
//! 1. sysctls, unreachable routes and the guard: whatever closes comes first;
//! 2. devices and addresses; peers are added before prefixes move, prefixes move before peers go;
//! 3. ports (their guard entries are in force already), neighbours, routes that open;
//! 4. removals: routes first, then neighbours, ports, devices.
//!
//! Applying the operations to the observed state gives the desired one; a property test holds it to that.

mod apply;
mod diff;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use mesh_keys::wireguard::{Psk, WgPublic};

pub use diff::{Op, diff};

use crate::api::MacAddr;

/// Route protocol number of every route we install (`ip route … proto 118`).
pub const ROUTE_PROTOCOL: u8 = 118;

/// What is ours in the kernel of one host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostState {
    /// Settings below `/proc/sys`, by path relative to it, such as `net/ipv4/ip_forward`.
    pub sysctls: BTreeMap<String, String>,
    /// The nftables rules that keep cluster traffic in and forged frames out.
    pub guard: Option<Guard>,
    /// The bridge that pods are attached to.
    pub bridge: Option<Bridge>,
    /// Tunnel devices by name.
    pub lanes: BTreeMap<String, Lane>,
    /// Veth ends in the bridge by name.
    pub ports: BTreeMap<String, Port>,
    /// Routes by destination.
    pub routes: BTreeMap<IpNet, Route>,
}

impl HostState {
    /// The ranges that routes lead into a tunnel, each with its MTU in bytes, if it has one.
    pub fn tunnel_mtus(&self) -> BTreeMap<IpNet, Option<u32>> {
        let of = |(to, route): (&IpNet, &Route)| match route {
            Route::Devices { devices, mtu, .. }
                if devices.iter().all(|name| self.lanes.contains_key(name)) =>
            {
                Some((*to, *mtu))
            }
            Route::Devices { .. } | Route::Unreachable => None,
        };
        self.routes.iter().filter_map(of).collect()
    }
}

/// The bridge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bridge {
    /// Name of the device.
    pub name: String,
    /// Its Ethernet address; fixed, so that pods can have it as a permanent neighbour.
    pub mac: MacAddr,
    /// MTU in bytes.
    pub mtu: u32,
    /// The node's mesh addresses.
    pub addresses: BTreeSet<IpAddr>,
}

/// A tunnel device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lane {
    /// UDP port.
    pub port: u16,
    /// Its public key; the secret stays with the shell.
    pub public_key: WgPublic,
    /// MTU in bytes.
    pub mtu: u32,
    /// The node's mesh addresses.
    pub addresses: BTreeSet<IpAddr>,
    /// The other ends.
    pub peers: BTreeMap<WgPublic, LanePeer>,
}

/// The other end of a tunnel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LanePeer {
    /// The pre-shared key. A peer is never installed without one.
    pub psk: Psk,
    /// Desired: where to send first. Observed: where WireGuard sends now.
    pub endpoint: Option<SocketAddr>,
    /// Desired: the endpoint replaces one that WireGuard has learned. Observed: always false.
    pub force_endpoint: bool,
    /// Ranges of the peer.
    pub allowed_ips: BTreeSet<IpNet>,
    /// Persistent keepalive in seconds; 0 is off.
    pub keepalive: u16,
}

/// The host's end of a pod's veth pair, in the bridge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    /// The pod's Ethernet address, as a static forwarding entry.
    pub mac: MacAddr,
    /// The pod's addresses, as permanent neighbours on the bridge.
    pub ipv4: Ipv4Addr,
    /// Likewise, IPv6.
    pub ipv6: Ipv6Addr,
    /// MTU in bytes.
    pub mtu: u32,
    /// Whether the bridge passes no frame between this port and another isolated one.
    pub isolated: bool,
}

/// A route in the main table, with our protocol number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Route {
    /// Nothing below this prefix may leave, unless a longer prefix says where to.
    Unreachable,
    /// Directly to a device, or spread over several, each flow by one of them.
    Devices {
        /// Names of the devices; never empty.
        devices: BTreeSet<String>,
        /// Source address that the host itself uses.
        source: Option<IpAddr>,
        /// Path MTU in bytes, when less than the devices'.
        mtu: Option<u32>,
    },
}

impl Route {
    /// A route to one device; `mtu` in bytes, when less than the device's.
    pub fn to_device(device: impl Into<String>, source: Option<IpAddr>, mtu: Option<u32>) -> Self {
        Self::Devices { devices: BTreeSet::from([device.into()]), source, mtu }
    }
}

/// The facts from which the guard ruleset is made (tables `inet meshd` and `bridge meshd`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Guard {
    /// Cluster traffic may use the bridge and the lanes only.
    pub cluster_ipv4: Ipv4Net,
    /// Likewise, IPv6.
    pub cluster_ipv6: Ipv6Net,
    /// Frames that the host itself sends into the bridge have this source.
    pub bridge_mac: MacAddr,
    /// Who may speak on which port.
    pub ports: BTreeMap<String, PortGuard>,
}

/// The one Ethernet address and the two IP addresses that may come in at a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortGuard {
    /// Source of every frame, and sender of every ARP packet.
    pub mac: MacAddr,
    /// Source of every IPv4 packet, and sender of every ARP packet.
    pub ipv4: Ipv4Addr,
    /// Source of every IPv6 packet, and target of every neighbour advertisement.
    pub ipv6: Ipv6Addr,
}
