//! What the host is like: its addresses, its MTU, and settings that decide how we set ours.

use std::net::IpAddr;

use ipnet::IpNet;
use mesh_core::api::BRIDGE;
use mesh_core::node::HostFacts;
use mesh_sys::rtnl::{Address, Blocking, Link, RouteFilter, RouteKind, Scope};

use super::settings::Settings;

/// Route protocol of routes learned from router advertisements (`RTPROT_RA`).
const PROTOCOL_RA: u8 = 9;

/// Devices of containers and other overlays: what is behind them is not how others reach this host.
const NOT_UNDERLAY: [&str; 12] =
    [BRIDGE, "meshwg", "mv", "docker", "br-", "cni", "veth", "podman", "virbr", "flannel", "cali", "cilium"];

/// Looks at the host. Addresses in the ranges `inside`, which are the cluster's, are not how others reach it.
pub(super) fn read(rtnl: &mut Blocking, settings: &Settings, inside: &[IpNet]) -> anyhow::Result<HostFacts> {
    let links = rtnl.links()?;
    let (addresses, underlay_mtu) = underlay(&links, &rtnl.addresses(None)?, inside);
    let bridge_netfilter = bridge_netfilter(settings)?;
    let mut facts = HostFacts { addresses, underlay_mtu, bridge_netfilter, ..HostFacts::default() };
    let learned = RouteFilter { protocol: Some(PROTOCOL_RA), ..RouteFilter::default() };
    for route in rtnl.routes(learned)? {
        let RouteKind::Unicast { dev, .. } = route.kind else { continue };
        let Some(link) = links.iter().find(|link| link.index == dev) else { continue };
        let accepts =
            setting(settings, &format!("net/ipv6/conf/{}/accept_ra", link.name))?.as_deref() == Some("1");
        if accepts && !facts.router_advertisements.contains(&link.name) {
            facts.router_advertisements.push(link.name.clone());
        }
    }
    facts.router_advertisements.sort_unstable();
    Ok(facts)
}

/// The addresses by which others reach this host, and the smallest MTU of the devices that have them.
fn underlay(links: &[Link], addresses: &[Address], inside: &[IpNet]) -> (Vec<IpAddr>, Option<u32>) {
    let (mut found, mut least): (Vec<IpAddr>, Option<u32>) = (Vec::new(), None);
    for address in addresses {
        let ip = address.net.addr();
        let Some(link) = links.iter().find(|link| link.index == address.index) else { continue };
        let usable = link.up
            && link.name != "lo"
            && !NOT_UNDERLAY.iter().any(|prefix| link.name.starts_with(prefix))
            && address.scope == Scope::Universe
            && !address.tentative
            && !address.duplicate
            && !ip.is_loopback()
            && !inside.iter().any(|range| range.contains(&ip));
        if usable {
            least = Some(least.map_or(link.mtu, |mtu| mtu.min(link.mtu)));
            found.push(ip);
        }
    }
    // In one order whatever the kernel's, IPv4 first: what others are told changes only when it does.
    found.sort_unstable();
    found.dedup();
    (found, least)
}

/// Whether frames between bridge ports go through iptables, in either family.
pub(super) fn bridge_netfilter(settings: &Settings) -> anyhow::Result<bool> {
    for path in ["net/bridge/bridge-nf-call-iptables", "net/bridge/bridge-nf-call-ip6tables"] {
        if setting(settings, path)?.as_deref() == Some("1") {
            return Ok(true);
        }
    }
    Ok(false)
}

/// A setting that need not be there: without br_netfilter there is none of its settings.
fn setting(settings: &Settings, path: &str) -> anyhow::Result<Option<String>> {
    Ok(settings.read(path)?.map(|value| value.trim().to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(index: u32, name: &str, mtu: u32) -> Link {
        Link {
            index,
            name: name.to_owned(),
            kind: None,
            mac: None,
            mtu,
            up: true,
            carrier: true,
            txqlen: 0,
            master: None,
            peer_index: None,
            peer_netns_id: None,
            alias: None,
            port: None,
        }
    }

    fn address(index: u32, net: &str) -> Address {
        let net = net.parse().unwrap();
        let (tentative, duplicate, no_prefix_route) = (false, false, false);
        Address { index, net, scope: Scope::Universe, tentative, duplicate, no_prefix_route }
    }

    #[test]
    fn addresses_of_the_underlay_count_and_no_others() {
        let down = Link { up: false, ..link(9, "eth9", 500) };
        let links = [
            link(1, "lo", 65_536),
            link(2, "eth0", 1500),
            link(3, "docker0", 1200),
            link(4, "mesh0", 1280),
            link(5, "meshwg0", 1280),
            link(6, "lowpan0", 1400),
            link(7, "eth1", 1300),
            down,
        ];
        let found = [
            address(1, "127.0.0.1/8"),
            address(2, "2001:db8::1/64"),
            address(2, "192.0.2.1/24"),
            Address { scope: Scope::Link, ..address(2, "fe80::1/64") },
            Address { tentative: true, ..address(2, "2001:db8::9/64") },
            address(3, "172.17.0.1/16"),
            address(4, "10.32.0.1/32"),
            address(5, "10.32.0.1/32"),
            address(6, "198.51.100.7/24"),
            address(7, "10.33.0.1/32"),
            address(9, "203.0.113.1/24"),
        ];
        let (addresses, mtu) = underlay(&links, &found, &["10.32.0.0/12".parse().unwrap()]);
        let wanted: Vec<IpAddr> =
            ["192.0.2.1", "198.51.100.7", "2001:db8::1"].iter().map(|ip| ip.parse().unwrap()).collect();
        assert_eq!(addresses, wanted);
        assert_eq!(mtu, Some(1400), "a device with nothing but a cluster address does not count");
    }
}
