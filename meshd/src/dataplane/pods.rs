//! The bridge, and the ports by which pods are attached to it.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use mesh_core::api::MacAddr;
use mesh_core::host::{Bridge, Port};
use mesh_sys::rtnl::{
    AddrGenMode, Blocking, BridgePort, BridgePortChange, BridgeSpec, FdbEntry, FdbTarget, Link, LinkChange,
    Mac, Neighbour, RtnlError,
};
use mesh_sys::sysctl::SysctlError;

use super::settings::Settings;

/// Beginning of the names of the host's ends of pods' veth pairs.
pub(super) const PORT_PREFIX: &str = "mv";

/// The kernel lets a port pass frames within a second of both ends being up; asked for it, at once.
const FORWARDING_LIMIT: Duration = Duration::from_secs(2);

/// Why the bridge or a port is not as it should be.
#[derive(Debug, thiserror::Error)]
pub(super) enum PodError {
    /// There is no such veth end.
    #[error(
        "{0} does not exist: the container's network namespace is gone, or the plugin has not created it"
    )]
    NoLink(String),
    /// There is no bridge.
    #[error("the bridge does not exist")]
    NoBridge,
    /// Something else has the name.
    #[error("a device of kind {kind} is in the way; it is left alone")]
    Occupied {
        /// What it is.
        kind: String,
    },
    /// A setting of the device.
    #[error(transparent)]
    Setting(#[from] SysctlError),
    /// The kernel.
    #[error(transparent)]
    Kernel(#[from] RtnlError),
}

/// The flags of every port. Pods address the bridge and nobody else, so nothing is flooded or learned; where a
/// translated packet may come back to the pod that sent it (only without isolation), hairpin lets it.
fn flags(isolated: bool, locked: bool) -> BridgePortChange {
    BridgePortChange {
        isolated: Some(isolated),
        hairpin: Some(!isolated),
        learning: Some(false),
        unicast_flood: Some(false),
        multicast_flood: Some(false),
        broadcast_flood: Some(false),
        neigh_suppress: Some(false),
        locked: locked.then_some(true),
    }
}

fn has_flags(port: &BridgePort, locked: bool) -> bool {
    port.hairpin != port.isolated
        && !port.learning
        && !port.unicast_flood
        && !port.multicast_flood
        && !port.broadcast_flood
        && !port.neigh_suppress
        && (port.locked || !locked)
}

/// Makes the bridge, or what is there like it.
///
/// It has no link-local address: so the kernel never sends pods neighbour discovery redirects, which need one as
/// their source.
pub(super) fn set_bridge(rtnl: &mut Blocking, settings: &Settings, bridge: &Bridge) -> Result<(), PodError> {
    let index = rtnl.create_bridge(BridgeSpec {
        name: bridge.name.clone(),
        mac: Some(Mac(bridge.mac.0)),
        mtu: Some(bridge.mtu),
        multicast_snooping: false,
    })?;
    settings.set_own(&format!("net/ipv6/conf/{}/accept_dad", bridge.name), "0")?;
    settings.set_own(&format!("net/ipv6/conf/{}/accept_ra", bridge.name), "0")?;
    no_link_local(rtnl, settings, &bridge.name, index)?;
    let change = LinkChange { up: Some(true), mac: Some(Mac(bridge.mac.0)), ..LinkChange::default() };
    Ok(rtnl.set_link(index, change)?)
}

fn no_link_local(rtnl: &mut Blocking, settings: &Settings, name: &str, index: u32) -> Result<(), PodError> {
    // Without IPv6 the kernel refuses the request that switches part of it off.
    if settings.read(&format!("net/ipv6/conf/{name}/addr_gen_mode"))?.is_some() {
        rtnl.set_link(index, LinkChange { addr_gen: Some(AddrGenMode::None), ..LinkChange::default() })?;
    }
    Ok(())
}

pub(super) fn remove_bridge(rtnl: &mut Blocking, name: &str) -> Result<(), PodError> {
    match rtnl.link(name)? {
        Some(link) if link.kind.as_deref() == Some("bridge") => {
            rtnl.delete_link(name)?;
            Ok(())
        }
        Some(link) => Err(occupied(link)),
        None => Ok(()),
    }
}

fn occupied(link: Link) -> PodError {
    PodError::Occupied { kind: link.kind.unwrap_or_else(|| "physical".to_owned()) }
}

/// Puts a veth end into the bridge, or sets what differs. It is up only when all the rest is in force.
///
/// `locked`: whether the kernel has that flag; found out here at the first port.
pub(super) fn set_port(
    rtnl: &mut Blocking,
    settings: &Settings,
    bridge: &str,
    name: &str,
    port: &Port,
    locked: &mut bool,
) -> Result<(), PodError> {
    let link = rtnl.link(name)?.ok_or_else(|| PodError::NoLink(name.to_owned()))?;
    if link.kind.as_deref() != Some("veth") {
        return Err(occupied(link));
    }
    let bridge = rtnl.link(bridge)?.ok_or(PodError::NoBridge)?.index;
    let mac = Mac(port.mac.0);
    let attached = link.master == Some(bridge);
    if link.up && !attached {
        rtnl.set_link(link.index, LinkChange { up: Some(false), ..LinkChange::default() })?;
    }
    no_link_local(rtnl, settings, name, link.index)?;
    settings.set_own(&format!("net/ipv6/conf/{name}/disable_ipv6"), "1")?;
    let change = LinkChange {
        mtu: (link.mtu != port.mtu).then_some(port.mtu),
        master: (!attached).then_some(Some(bridge)),
        ..LinkChange::default()
    };
    if change != LinkChange::default() {
        rtnl.set_link(link.index, change)?;
    }
    set_flags(rtnl, link.index, port.isolated, locked)?;

    // A stale entry goes before the right one comes: frames for an address must never have two ways.
    for entry in rtnl.fdb(link.index)? {
        if entry.target == FdbTarget::Master && entry.mac != mac && Some(entry.mac) != link.mac {
            rtnl.del_fdb(entry)?;
        }
    }
    rtnl.add_fdb(FdbEntry::on_port(link.index, mac))?;
    let own = [IpAddr::V4(port.ipv4), IpAddr::V6(port.ipv6)];
    for neighbour in rtnl.neighbours(bridge)? {
        if neighbour.mac == Some(mac) && !own.contains(&neighbour.ip) {
            rtnl.del_neighbour(bridge, neighbour.ip)?;
        }
    }
    for ip in own {
        rtnl.add_neighbour(bridge, ip, mac)?;
    }

    if !link.up || !attached {
        rtnl.set_link(link.index, LinkChange { up: Some(true), ..LinkChange::default() })?;
    }
    let carrier = rtnl.link_by_index(link.index)?.is_some_and(|link| link.carrier);
    if carrier && !rtnl.wait_port_forwarding(link.index, FORWARDING_LIMIT)? {
        tracing::warn!(port = name, "port is up and does not pass frames yet");
    }
    Ok(())
}

fn set_flags(rtnl: &mut Blocking, index: u32, isolated: bool, locked: &mut bool) -> Result<(), PodError> {
    match rtnl.set_bridge_port(index, flags(isolated, *locked)) {
        Err(error) if *locked => {
            tracing::debug!(%error, "port flags are tried without the lock");
            rtnl.set_bridge_port(index, flags(isolated, false))?;
            *locked = false;
        }
        other => other?,
    }
    let set = rtnl.link_by_index(index)?.and_then(|link| link.port);
    if *locked && set.is_some_and(|port| !port.locked) {
        *locked = false;
    }
    Ok(())
}

/// Deletes a veth end with what the bridge knows of it.
pub(super) fn remove_port(
    rtnl: &mut Blocking,
    bridge: &str,
    name: &str,
    port: &Port,
) -> Result<(), PodError> {
    if let Some(bridge) = rtnl.link(bridge)? {
        for neighbour in rtnl.neighbours(bridge.index)? {
            if neighbour.mac == Some(Mac(port.mac.0)) {
                rtnl.del_neighbour(bridge.index, neighbour.ip)?;
            }
        }
    }
    match rtnl.link(name)? {
        Some(link) if link.kind.as_deref() == Some("veth") => {
            rtnl.delete_link(name)?;
            Ok(())
        }
        Some(link) => Err(occupied(link)),
        None => Ok(()),
    }
}

/// The ports of a bridge as they are. What is wrong with one shows as a value that nobody wants: MTU 0,
/// unspecified addresses.
pub(super) fn observe(
    links: &[Link],
    bridge: u32,
    fdb: &[FdbEntry],
    neighbours: &[Neighbour],
    locked: bool,
) -> BTreeMap<String, Port> {
    let ports = links.iter().filter(|link| link.master == Some(bridge) && link.name.starts_with(PORT_PREFIX));
    ports.map(|link| (link.name.clone(), observe_port(link, fdb, neighbours, locked))).collect()
}

fn observe_port(link: &Link, fdb: &[FdbEntry], neighbours: &[Neighbour], locked: bool) -> Port {
    let mut entries = fdb
        .iter()
        .filter(|entry| entry.index == link.index && entry.is_static && entry.target == FdbTarget::Master);
    let mac = match (entries.next(), entries.next()) {
        (Some(entry), None) => entry.mac,
        (None, _) | (Some(_), Some(_)) => Mac::default(),
    };
    let of_mac = || neighbours.iter().filter(|n| n.permanent && n.mac == Some(mac)).map(|n| n.ip);
    let mut v4 = of_mac().filter_map(|ip| match ip {
        IpAddr::V4(ip) => Some(ip),
        IpAddr::V6(_) => None,
    });
    let mut v6 = of_mac().filter_map(|ip| match ip {
        IpAddr::V6(ip) => Some(ip),
        IpAddr::V4(_) => None,
    });
    let fine = link.up && link.port.is_some_and(|port| has_flags(&port, locked));
    Port {
        mac: MacAddr(mac.0),
        ipv4: v4.next().filter(|_| v4.next().is_none()).unwrap_or(Ipv4Addr::UNSPECIFIED),
        ipv6: v6.next().filter(|_| v6.next().is_none()).unwrap_or(Ipv6Addr::UNSPECIFIED),
        mtu: if fine { link.mtu } else { 0 },
        isolated: link.port.is_some_and(|port| port.isolated),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: Mac = Mac([2, 0, 0, 0, 0, 9]);

    fn link() -> Link {
        let port = BridgePort { isolated: true, locked: true, forwarding: true, ..BridgePort::default() };
        Link {
            index: 7,
            name: "mv0123456789ab".to_owned(),
            kind: Some("veth".to_owned()),
            mac: Some(Mac([2, 0, 0, 0, 0, 1])),
            mtu: 1420,
            up: true,
            carrier: true,
            txqlen: 1000,
            master: Some(3),
            peer_index: Some(2),
            peer_netns_id: Some(0),
            alias: None,
            port: Some(port),
        }
    }

    fn neighbour(ip: &str) -> Neighbour {
        Neighbour { index: 3, ip: ip.parse().unwrap(), mac: Some(MAC), permanent: true }
    }

    fn port(link: Link, fdb: &[FdbEntry], neighbours: &[Neighbour]) -> Port {
        let ports = observe(std::slice::from_ref(&link), 3, fdb, neighbours, true);
        ports.get(&link.name).unwrap().clone()
    }

    #[test]
    fn a_port_is_read_from_its_entries() {
        let wanted = Port {
            mac: MacAddr(MAC.0),
            ipv4: "10.32.0.9".parse().unwrap(),
            ipv6: "fd00::9".parse().unwrap(),
            mtu: 1420,
            isolated: true,
        };
        let neighbours = [neighbour("10.32.0.9"), neighbour("fd00::9")];
        assert_eq!(port(link(), &[FdbEntry::on_port(7, MAC)], &neighbours), wanted);
    }

    #[test]
    fn whatever_is_wrong_with_a_port_shows() {
        let fdb = [FdbEntry::on_port(7, MAC)];
        let neighbours = [neighbour("10.32.0.9"), neighbour("fd00::9")];
        let good = port(link(), &fdb, &neighbours);
        let spoil: [fn(&mut Link); 6] = [
            |link| link.up = false,
            |link| link.port.as_mut().unwrap().isolated = false,
            |link| link.port.as_mut().unwrap().learning = true,
            |link| link.port.as_mut().unwrap().hairpin = true,
            |link| link.port.as_mut().unwrap().unicast_flood = true,
            |link| link.port.as_mut().unwrap().locked = false,
        ];
        for (n, spoil) in spoil.iter().enumerate() {
            let mut link = link();
            spoil(&mut link);
            assert_ne!(port(link, &fdb, &neighbours), good, "{n}");
        }
        assert_ne!(port(link(), &[], &neighbours), good, "no forwarding entry");
        let two = [fdb[0], FdbEntry::on_port(7, Mac([2; 6]))];
        assert_ne!(port(link(), &two, &neighbours), good, "a second station");
        assert_ne!(port(link(), &fdb, &neighbours[..1]), good, "no IPv6 neighbour");
        let more = [neighbours[0].clone(), neighbours[1].clone(), neighbour("10.32.0.10")];
        assert_ne!(port(link(), &fdb, &more), good, "a second address");
        let mut learned = neighbours.clone();
        learned[0].permanent = false;
        assert_ne!(port(link(), &fdb, &learned), good, "a neighbour that may change");
    }

    #[test]
    fn other_devices_are_no_ports() {
        let mut foreign = link();
        foreign.name = "eth7".to_owned();
        assert!(observe(&[foreign], 3, &[], &[], true).is_empty());
        let mut leased = link();
        leased.master = None;
        assert!(observe(&[leased], 3, &[], &[], true).is_empty());
    }
}
