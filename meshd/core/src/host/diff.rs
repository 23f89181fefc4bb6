//! From the observed to the desired state of the host.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use mesh_keys::wireguard::{Psk, WgPublic};

use super::{Bridge, Guard, HostState, Lane, Port, Route};

/// One change of the host. Each is complete in itself: when the process dies between two of them, the next
/// observation shows what is left to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Write a setting below `/proc/sys`.
    SetSysctl {
        /// Path relative to `/proc/sys`.
        path: String,
        /// The value.
        value: String,
    },
    /// Replace the guard ruleset in one transaction.
    SetGuard(Guard),
    /// Create the bridge, or set its address and MTU.
    SetBridge(Bridge),
    /// Create the device, start its engine, or set key, port and MTU. Peers are separate.
    SetLane {
        /// Name of the device.
        device: String,
        /// UDP port.
        port: u16,
        /// Its public key.
        public_key: WgPublic,
        /// MTU in bytes.
        mtu: u32,
    },
    /// Give a device of ours an address (/32 or /128).
    AddAddress {
        /// Name of the device.
        device: String,
        /// The address.
        address: IpAddr,
    },
    /// Take an address from a device of ours.
    RemoveAddress {
        /// Name of the device.
        device: String,
        /// The address.
        address: IpAddr,
    },
    /// Create a peer with its pre-shared key, or change what is given; nothing else of it changes and its
    /// session goes on.
    SetPeer {
        /// Name of the device.
        device: String,
        /// The peer.
        peer: WgPublic,
        /// New pre-shared key.
        psk: Option<Psk>,
        /// New endpoint.
        endpoint: Option<SocketAddr>,
        /// New keepalive in seconds; 0 is off.
        keepalive: Option<u16>,
        /// Prefixes to add; each leaves the peer that had it.
        add_allowed_ips: BTreeSet<IpNet>,
        /// Prefixes to take away.
        remove_allowed_ips: BTreeSet<IpNet>,
    },
    /// Remove a peer and its session.
    RemovePeer {
        /// Name of the device.
        device: String,
        /// The peer.
        peer: WgPublic,
    },
    /// Put a veth end into the bridge with its flags, forwarding entry and neighbours, and bring it up; or
    /// set what differs.
    SetPort {
        /// Name of the veth end.
        name: String,
        /// What it should be.
        port: Port,
    },
    /// Take a veth end out of the bridge by deleting it, and its neighbours.
    RemovePort {
        /// Name of the veth end.
        name: String,
        /// What it was.
        port: Port,
    },
    /// Add or replace a route.
    SetRoute {
        /// Destination.
        to: IpNet,
        /// Where it leads.
        route: Route,
    },
    /// Remove a route.
    RemoveRoute {
        /// Destination.
        to: IpNet,
    },
    /// Stop the engine and delete the device.
    RemoveLane {
        /// Name of the device.
        device: String,
    },
    /// Delete the bridge.
    RemoveBridge {
        /// Name of the device.
        name: String,
    },
}

/// The operations that lead from `observed` to `desired`; empty when nothing differs.
///
/// The guard and the unreachable routes are never removed: a desired state without them leaves them alone.
pub fn diff(observed: &HostState, desired: &HostState) -> Vec<Op> {
    let mut ops = Vec::new();
    close(observed, desired, &mut ops);
    devices(observed, desired, &mut ops);
    open(observed, desired, &mut ops);
    remove(observed, desired, &mut ops);
    ops
}

/// What closes: sysctls that the rest relies on, unreachable routes, the guard.
fn close(observed: &HostState, desired: &HostState, ops: &mut Vec<Op>) {
    for (to, route) in &desired.routes {
        if *route == Route::Unreachable && observed.routes.get(to) != Some(route) {
            ops.push(Op::SetRoute { to: *to, route: route.clone() });
        }
    }
    if let Some(guard) = &desired.guard
        && observed.guard.as_ref() != Some(guard)
    {
        ops.push(Op::SetGuard(guard.clone()));
    }
}

fn devices(observed: &HostState, desired: &HostState, ops: &mut Vec<Op>) {
    if let Some(bridge) = &desired.bridge {
        let before = observed.bridge.as_ref().filter(|before| before.name == bridge.name);
        if before.is_none_or(|before| before.mac != bridge.mac || before.mtu != bridge.mtu) {
            ops.push(Op::SetBridge(bridge.clone()));
        }
        let had = before.map(|before| before.addresses.clone()).unwrap_or_default();
        addresses(&bridge.name, &had, &bridge.addresses, ops);
    }
    for (device, lane) in &desired.lanes {
        let before = observed.lanes.get(device);
        if before.is_none_or(|before| {
            before.port != lane.port || before.public_key != lane.public_key || before.mtu != lane.mtu
        }) {
            ops.push(Op::SetLane {
                device: device.clone(),
                port: lane.port,
                public_key: lane.public_key,
                mtu: lane.mtu,
            });
        }
        let had = before.map(|before| before.addresses.clone()).unwrap_or_default();
        addresses(device, &had, &lane.addresses, ops);
        peers(device, before, lane, ops);
    }
    for (path, value) in &desired.sysctls {
        if observed.sysctls.get(path) != Some(value) {
            ops.push(Op::SetSysctl { path: path.clone(), value: value.clone() });
        }
    }
}

fn addresses(device: &str, had: &BTreeSet<IpAddr>, wanted: &BTreeSet<IpAddr>, ops: &mut Vec<Op>) {
    let device = || device.to_owned();
    ops.extend(wanted.difference(had).map(|address| Op::AddAddress { device: device(), address: *address }));
    ops.extend(
        had.difference(wanted).map(|address| Op::RemoveAddress { device: device(), address: *address }),
    );
}

fn peers(device: &str, before: Option<&Lane>, lane: &Lane, ops: &mut Vec<Op>) {
    // A prefix that goes to another peer moves when that one gets it: it is never without an owner.
    let claimed: BTreeSet<&IpNet> = lane.peers.values().flat_map(|peer| &peer.allowed_ips).collect();
    for (key, peer) in &lane.peers {
        let had = before.and_then(|before| before.peers.get(key));
        let none = BTreeSet::new();
        let prefixes = had.map_or(&none, |had| &had.allowed_ips);
        // A learned endpoint that works is never overwritten; the node says when it no longer does.
        let endpoint = peer.endpoint.filter(|wanted| {
            had.is_none_or(|had| {
                had.endpoint.is_none() || (peer.force_endpoint && had.endpoint != Some(*wanted))
            })
        });
        let op = Op::SetPeer {
            device: device.to_owned(),
            peer: *key,
            psk: had.is_none_or(|had| had.psk != peer.psk).then(|| peer.psk.clone()),
            endpoint,
            keepalive: had.is_none_or(|had| had.keepalive != peer.keepalive).then_some(peer.keepalive),
            add_allowed_ips: peer.allowed_ips.difference(prefixes).copied().collect(),
            remove_allowed_ips: prefixes.iter().filter(|net| !claimed.contains(net)).copied().collect(),
        };
        let changes = !matches!(
            &op,
            Op::SetPeer { psk: None, endpoint: None, keepalive: None, add_allowed_ips, remove_allowed_ips, .. }
                if add_allowed_ips.is_empty() && remove_allowed_ips.is_empty()
        );
        if changes {
            ops.push(op);
        }
    }
    for key in before.into_iter().flat_map(|before| before.peers.keys()) {
        if !lane.peers.contains_key(key) {
            ops.push(Op::RemovePeer { device: device.to_owned(), peer: *key });
        }
    }
}

/// What opens: ports, and the routes that lead somewhere.
fn open(observed: &HostState, desired: &HostState, ops: &mut Vec<Op>) {
    for (name, port) in &desired.ports {
        if observed.ports.get(name) != Some(port) {
            ops.push(Op::SetPort { name: name.clone(), port: port.clone() });
        }
    }
    for (to, route) in &desired.routes {
        if *route != Route::Unreachable && observed.routes.get(to) != Some(route) {
            ops.push(Op::SetRoute { to: *to, route: route.clone() });
        }
    }
}

fn remove(observed: &HostState, desired: &HostState, ops: &mut Vec<Op>) {
    for (to, route) in &observed.routes {
        if *route != Route::Unreachable && !desired.routes.contains_key(to) {
            ops.push(Op::RemoveRoute { to: *to });
        }
    }
    for (name, port) in &observed.ports {
        if !desired.ports.contains_key(name) {
            ops.push(Op::RemovePort { name: name.clone(), port: port.clone() });
        }
    }
    for device in observed.lanes.keys() {
        if !desired.lanes.contains_key(device) {
            ops.push(Op::RemoveLane { device: device.clone() });
        }
    }
    if let Some(bridge) = &observed.bridge
        && desired.bridge.as_ref().is_none_or(|wanted| wanted.name != bridge.name)
    {
        ops.push(Op::RemoveBridge { name: bridge.name.clone() });
    }
}
