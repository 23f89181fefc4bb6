//! What the host is like: its addresses, its MTU, its other networks, and settings that decide how we set ours.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use mesh_core::api::BRIDGE;
use mesh_core::host::ROUTE_PROTOCOL;
use mesh_core::node::HostFacts;
use mesh_core::overlap::{HostPrefix, Origin};
use mesh_sys::rtnl::{Address, Blocking, Link, Route, RouteFilter, RouteKind, Scope};

use super::plane::is_lane;
use super::pods::PORT_PREFIX;
use super::settings::Settings;

/// Route protocol of routes learned from router advertisements (`RTPROT_RA`).
const PROTOCOL_RA: u8 = 9;

/// The kernel's own table of the host's addresses (`RT_TABLE_LOCAL`).
const TABLE_LOCAL: u32 = 255;

/// Route type of several next hops, as of one (`RTN_UNICAST`).
const UNICAST: u8 = 1;

/// Most networks that are told: a router of the internet has a million. Private ones, among which a cluster's range
/// is, come first.
const MAX_PREFIXES: usize = 4096;

/// Devices of containers and other overlays: what is behind them is not how others reach this host.
const NOT_UNDERLAY: [&str; 12] =
    [BRIDGE, "meshwg", "mv", "docker", "br-", "cni", "veth", "podman", "virbr", "flannel", "cali", "cilium"];

/// Looks at the host. Addresses in the ranges `inside`, which are the cluster's, are not how others reach it. At the `first`
/// look, what an earlier daemon has found out of paths is there too.
pub(super) fn read(
    rtnl: &mut Blocking,
    settings: &Settings,
    inside: &[IpNet],
    first: bool,
) -> anyhow::Result<HostFacts> {
    let links = rtnl.links()?;
    let found = rtnl.addresses(None)?;
    let routes = rtnl.routes(RouteFilter::default())?;
    let (addresses, underlay_mtu) = underlay(&links, &found, inside);
    let route_mtus = if first { route_mtus(&routes, &links) } else { BTreeMap::new() };
    let mut facts = HostFacts {
        addresses,
        underlay_mtu,
        bridge_netfilter: bridge_netfilter(settings)?,
        router_advertisements: Vec::new(),
        prefixes: prefixes(&links, &found, &routes),
        closed: closed(&routes),
        route_mtus,
        bridge: links.iter().any(|link| link.name == BRIDGE),
    };
    for route in routes.into_iter().filter(|route| route.protocol == PROTOCOL_RA) {
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

/// The addresses by which others reach this host, and the largest MTU of the devices that have them: routes to members that
/// are reached by another device have less. A device without a wire, such as kube-proxy's `kube-ipvs0`, reaches nobody.
fn underlay(links: &[Link], addresses: &[Address], inside: &[IpNet]) -> (Vec<IpAddr>, Option<u32>) {
    let (mut found, mut most): (Vec<IpAddr>, Option<u32>) = (Vec::new(), None);
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
            if link.kind.as_deref() != Some("dummy") {
                most = most.max(Some(link.mtu));
            }
            found.push(ip);
        }
    }
    // In one order whatever the kernel's, IPv4 first: what others are told changes only when it does.
    found.sort_unstable();
    found.dedup();
    (found, most)
}

/// The networks that the host has without us: addresses of its devices, and routes that others made.
fn prefixes(links: &[Link], addresses: &[Address], routes: &[Route]) -> Vec<HostPrefix> {
    let link = |index: u32| links.iter().find(|link| link.index == index);
    // What is in a routing domain of its own is not in the way of anything outside of it.
    let other_domain =
        |of: &Link| of.master.and_then(link).is_some_and(|master| master.kind.as_deref() == Some("vrf"));
    let counts = |of: &&Link| of.up && !is_ours(&of.name) && !other_domain(of);
    let of_addresses = addresses.iter().filter_map(|address| {
        let device = link(address.index).filter(counts)?.name.clone();
        Some(HostPrefix { net: address.net, origin: Origin::Address { device } })
    });
    let of_routes = routes
        .iter()
        .filter(|route| route.table != TABLE_LOCAL && route.protocol != ROUTE_PROTOCOL)
        .filter_map(|route| {
            let origin = match &route.kind {
                RouteKind::Unicast { dev, gateway, .. } => {
                    let device = link(*dev).filter(counts)?.name.clone();
                    Origin::Route { device: Some(device), gateway: *gateway }
                }
                RouteKind::Nexthop { dev: Some(dev), gateway, .. } => {
                    let device = link(*dev).filter(counts)?.name.clone();
                    Origin::Route { device: Some(device), gateway: *gateway }
                }
                RouteKind::Nexthop { dev: None, .. } | RouteKind::Other(UNICAST) => {
                    Origin::Route { device: None, gateway: None }
                }
                RouteKind::Unreachable | RouteKind::Blackhole | RouteKind::Prohibit => Origin::Ending,
                RouteKind::Other(_) => return None,
            };
            Some(HostPrefix { net: route.dst, origin })
        });
    let mut found: Vec<HostPrefix> =
        of_addresses.chain(of_routes).filter(|prefix| !stays_on_link(prefix.net.addr())).collect();
    found.sort_unstable_by(|a, b| (!is_private(a.net), a).cmp(&(!is_private(b.net), b)));
    found.dedup();
    found.truncate(MAX_PREFIXES);
    found
}

/// Ranges that end in a route of ours.
fn closed(routes: &[Route]) -> Vec<IpNet> {
    let ends = |route: &&Route| route.protocol == ROUTE_PROTOCOL && route.kind == RouteKind::Unreachable;
    let mut closed: Vec<IpNet> = routes.iter().filter(ends).map(|route| route.dst).collect();
    closed.sort_unstable();
    closed.dedup();
    closed
}

/// The MTU of our routes into tunnels.
fn route_mtus(routes: &[Route], links: &[Link]) -> BTreeMap<IpNet, Option<u32>> {
    let is_lane = |dev: u32| links.iter().any(|link| link.index == dev && is_lane(&link.name));
    let of = |route: &Route| match route.kind {
        RouteKind::Unicast { dev, .. } if route.protocol == ROUTE_PROTOCOL && is_lane(dev) => {
            Some((route.dst, route.mtu))
        }
        // Only lanes are several.
        RouteKind::Nexthop { .. } if route.protocol == ROUTE_PROTOCOL => Some((route.dst, route.mtu)),
        RouteKind::Unicast { .. }
        | RouteKind::Nexthop { .. }
        | RouteKind::Unreachable
        | RouteKind::Blackhole
        | RouteKind::Prohibit
        | RouteKind::Other(_) => None,
    };
    routes.iter().filter_map(of).collect()
}

/// Whether a device is the bridge, a pod's port or a lane, of whatever mesh was on this host.
fn is_ours(name: &str) -> bool {
    let digits = name.strip_prefix(PORT_PREFIX).unwrap_or_default();
    let port = digits.len() == 12 && digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    name == BRIDGE || is_lane(name) || port
}

/// Addresses that every host has, or none for itself.
fn stays_on_link(ip: IpAddr) -> bool {
    let link_local = match ip {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    link_local || ip.is_loopback() || ip.is_multicast()
}

/// Networks with private addresses (RFC 1918, RFC 4193), and those that have such in them.
fn is_private(net: IpNet) -> bool {
    let private = match net.addr() {
        IpAddr::V4(v4) => v4.is_private(),
        IpAddr::V6(v6) => v6.is_unique_local(),
    };
    private || net.prefix_len() < 8
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

    fn to_device(dst: &str, dev: u32) -> Route {
        Route::dev(dst.parse().unwrap(), dev, 3)
    }

    fn words(prefixes: &[HostPrefix]) -> Vec<String> {
        prefixes.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn networks_of_others_are_told_and_ours_are_not() {
        let links = [
            link(1, "lo", 65_536),
            link(2, "eth0", 1500),
            link(3, "mesh0", 1420),
            link(4, "meshwg0", 1420),
            link(5, "mv0123456789ab", 1420),
            link(6, "mvneta", 1500),
            Link { up: false, ..link(7, "eth9", 1500) },
        ];
        let addresses = [
            address(1, "127.0.0.1/8"),
            address(1, "10.40.0.1/32"),
            address(2, "10.33.0.7/16"),
            address(2, "fe80::7/64"),
            address(3, "10.32.0.1/32"),
            address(4, "10.32.0.1/32"),
            address(7, "10.34.0.1/16"),
        ];
        let mut by_gateway = to_device("10.0.0.0/8", 2);
        by_gateway.kind =
            RouteKind::Unicast { dev: 2, gateway: "192.0.2.1".parse().ok(), onlink: false, prefsrc: None };
        let other_table = Route { table: 52, ..to_device("10.36.0.0/16", 2) };
        let several = Route { kind: RouteKind::Other(UNICAST), ..to_device("fd11::/16", 2) };
        let local = Route { table: TABLE_LOCAL, ..to_device("10.33.0.7/32", 2) };
        let routes = [
            by_gateway,
            to_device("10.35.0.0/16", 6),
            other_table,
            several,
            Route { kind: RouteKind::Blackhole, ..to_device("10.37.0.0/16", 0) },
            Route { kind: RouteKind::Other(5), ..to_device("10.38.0.0/16", 2) },
            local,
            Route { protocol: ROUTE_PROTOCOL, ..to_device("10.32.1.0/24", 2) },
            Route::unreachable("10.32.0.0/12".parse().unwrap(), ROUTE_PROTOCOL),
            to_device("10.32.0.9/32", 3),
            to_device("fd32::/64", 4),
            to_device("10.32.0.8/32", 5),
            to_device("ff00::/8", 2),
        ];
        assert_eq!(
            words(&prefixes(&links, &addresses, &routes)),
            [
                "route 10.0.0.0/8 via 192.0.2.1 dev eth0",
                "address 10.33.0.7/16 of device eth0",
                "route 10.35.0.0/16 dev mvneta",
                "route 10.36.0.0/16 dev eth0",
                "route 10.37.0.0/16 that is unreachable, a blackhole or prohibited",
                "address 10.40.0.1/32 of device lo",
                "route fd11::/16 with several next hops",
            ]
        );
        assert_eq!(closed(&routes), ["10.32.0.0/12".parse().unwrap()]);
    }

    #[test]
    fn a_routing_domain_of_its_own_is_in_nobodys_way() {
        let vrf = Link { kind: Some("vrf".to_owned()), ..link(9, "blue", 65_575) };
        let inside = Link { master: Some(9), ..link(2, "eth0", 1500) };
        let bridged = Link { master: Some(3), ..link(4, "eth1", 1500) };
        let bridge = Link { kind: Some("bridge".to_owned()), ..link(3, "br7", 1500) };
        let links = [vrf, inside, bridge, bridged];
        let addresses = [address(2, "10.33.0.7/16"), address(4, "10.34.0.7/16")];
        let routes = [Route { table: 10, ..to_device("10.33.0.0/16", 2) }];
        let found = prefixes(&links, &addresses, &routes);
        assert_eq!(words(&found), ["address 10.34.0.7/16 of device eth1"]);
    }

    #[test]
    fn of_very_many_networks_the_private_ones_are_told() {
        let links = [link(2, "eth0", 1500)];
        let public = (0..20_000u32).map(|n| {
            let net = IpNet::new(std::net::Ipv4Addr::from(0x0500_0000 + (n << 8)).into(), 24).unwrap();
            Route::dev(net, 2, 186)
        });
        let private = ["172.16.0.0/12", "192.168.7.0/24", "fd00::/8", "8.0.0.0/5", "::/0"];
        let routes: Vec<Route> = public.chain(private.map(|net| to_device(net, 2))).collect();
        let found = prefixes(&links, &[], &routes);
        assert_eq!(found.len(), MAX_PREFIXES);
        for net in private {
            assert!(found.iter().any(|prefix| prefix.net.to_string() == net), "{net}");
        }
    }

    #[test]
    fn addresses_of_the_underlay_count_and_no_others() {
        let down = Link { up: false, ..link(9, "eth9", 9000) };
        let dummy = Link { kind: Some("dummy".to_owned()), ..link(10, "kube-ipvs0", 9000) };
        let links = [
            link(1, "lo", 65_536),
            link(2, "eth0", 1500),
            link(3, "docker0", 9000),
            link(4, "mesh0", 1280),
            link(5, "meshwg0", 1280),
            link(6, "lowpan0", 1400),
            link(7, "eth1", 9000),
            down,
            dummy,
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
            address(10, "203.0.113.2/32"),
        ];
        let (addresses, mtu) = underlay(&links, &found, &["10.32.0.0/12".parse().unwrap()]);
        let wanted: Vec<IpAddr> = ["192.0.2.1", "198.51.100.7", "203.0.113.2", "2001:db8::1"]
            .iter()
            .map(|ip| ip.parse().unwrap())
            .collect();
        assert_eq!(addresses, wanted);
        assert_eq!(mtu, Some(1500), "devices without an address that others reach do not count");
    }
}
