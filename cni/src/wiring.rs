//! The kernel's side of an attachment: the veth pair, and what is configured inside the container.

use std::net::IpAddr;

use ipnet::IpNet;
use mesh_core::api::{Attachment, AttachmentId, MacAddr, NetnsId};
use mesh_sys::netns::{NetNs, NetNsError};
use mesh_sys::rtnl::{
    AddrGenMode, AddressSpec, Blocking, Family, Link, LinkChange, Mac, Route, RouteFilter, RouteKind,
    RtnlError, Rule, RuleAction, VethPeer, VethSpec,
};
use mesh_sys::sysctl::{Sysctl, SysctlError};

use crate::error::{CniError, Code};

/// Our mark on routes (`rtm_protocol`), the same as the daemon's.
pub(crate) const ROUTE_PROTOCOL: u8 = 118;

/// `main`.
const TABLE_MAIN: u32 = 254;

/// Metric of our routes in a container that has such routes already. Above the kernel's default for IPv6
/// (1024), so that the interface that was there first keeps its traffic.
const SECONDARY_METRIC: u32 = 2000;

/// Where the routes of a second interface are for packets from its own address: one table for each device
/// index above this.
const SECONDARY_TABLE: u32 = 118_000_000;

/// Priority of the rules that lead there; behind the local table (0), before main (32766).
const SECONDARY_RULE: u32 = 11_800;

/// What a refusal of the kernel is to the runtime.
pub(crate) fn refused(error: &RtnlError) -> CniError {
    CniError::new(Code::Kernel, error.to_string())
}

/// The host's network namespace, in which the plugin runs.
#[derive(Debug)]
pub(crate) struct Host {
    rtnl: Blocking,
}

impl Host {
    /// Opens the namespace of this process.
    pub(crate) fn open() -> Result<Self, CniError> {
        Ok(Self { rtnl: Blocking::open().map_err(|error| refused(&error))? })
    }

    /// A device by name.
    pub(crate) fn link(&mut self, name: &str) -> Result<Option<Link>, CniError> {
        self.rtnl.link(name).map_err(|error| refused(&error))
    }

    /// Deletes a device, and with it the other end of its pair; whether it was there.
    pub(crate) fn delete(&mut self, name: &str) -> Result<bool, CniError> {
        self.rtnl.delete_link(name).map_err(|error| refused(&error))
    }

    /// Makes the pair with the container's end inside its namespace. Both ends are down: the daemon brings up
    /// the host's once it filters what comes from it. The kernel gives that end no address of its own.
    pub(crate) fn create_pair(
        &mut self,
        attachment: &Attachment,
        mtu: u32,
        container: &Container,
    ) -> Result<Link, CniError> {
        let ifname = attachment.id.ifname();
        let netns =
            container.netns.try_clone().map_err(|error| CniError::new(Code::Io, error.to_string()))?;
        let spec = VethSpec {
            name: attachment.host_ifname.clone(),
            mac: None,
            mtu: Some(mtu),
            master: None,
            peer: VethPeer {
                name: ifname.to_owned(),
                mac: Some(mac(attachment.mac)),
                mtu: Some(mtu),
                netns: Some(netns),
            },
        };
        let index = self.rtnl.create_veth(spec).map_err(|error| {
            let code = if error.is_exists() { Code::Exists } else { Code::Kernel };
            CniError::new(code, error.to_string())
        })?;
        let change = LinkChange {
            alias: Some(alias(&attachment.id)),
            addr_gen: Some(AddrGenMode::None),
            ..LinkChange::default()
        };
        self.rtnl.set_link(index, change).map_err(|error| refused(&error))?;
        match self.rtnl.link_by_index(index).map_err(|error| refused(&error))? {
            Some(link) => Ok(link),
            None => Err(CniError::new(
                Code::Kernel,
                format!("{} vanished right after its creation", attachment.host_ifname),
            )),
        }
    }

    /// Brings a device up.
    pub(crate) fn set_up(&mut self, link: &Link) -> Result<(), CniError> {
        if link.up {
            return Ok(());
        }
        self.rtnl
            .set_link(link.index, LinkChange { up: Some(true), ..LinkChange::default() })
            .map_err(|error| refused(&error))
    }
}

/// The container's network namespace.
#[derive(Debug)]
pub(crate) struct Container {
    netns: NetNs,
    rtnl: Blocking,
}

impl Container {
    /// Opens the namespace at `path`.
    ///
    /// # Errors
    /// Code 8 when there is no namespace, or when it is the plugin's own.
    pub(crate) fn open(path: &str) -> Result<Self, CniError> {
        let unusable = |error: NetNsError| CniError::new(Code::InvalidNetns, format!("CNI_NETNS: {error}"));
        let netns = NetNs::open(path).map_err(unusable)?;
        if netns.same_as(&NetNs::current().map_err(unusable)?) {
            return Err(CniError::new(
                Code::InvalidNetns,
                format!(
                    "CNI_NETNS: {path} is the plugin's own network namespace; is this a pod on the host network?"
                ),
            ));
        }
        let rtnl = Blocking::open_in(&netns).map_err(|error| refused(&error))?;
        Ok(Self { netns, rtnl })
    }

    /// What tells the namespace from others.
    pub(crate) fn netns_id(&self) -> NetnsId {
        let id = self.netns.id();
        NetnsId { dev: id.dev, ino: id.ino }
    }

    /// A device by name.
    pub(crate) fn link(&mut self, name: &str) -> Result<Option<Link>, CniError> {
        match self.rtnl.link(name) {
            Ok(link) => Ok(link),
            // The kernel takes no such name, although the specification allows it.
            Err(error @ RtnlError::BadName { .. }) => {
                Err(CniError::new(Code::Environment, format!("CNI_IFNAME: {error}")))
            }
            Err(error) => Err(refused(&error)),
        }
    }

    /// Configures the container's end and `lo`; returns the end and the routes to destinations beyond the
    /// gateway. Everything is usable on return: no address waits for duplicate address detection, no neighbour
    /// for resolution.
    pub(crate) fn configure(
        &mut self,
        attachment: &Attachment,
        host_end: &Link,
    ) -> Result<(Link, Vec<Route>), CniError> {
        let ifname = attachment.id.ifname();
        // Whoever runs in the namespace already may have renamed it since.
        let Some(link) = self.link(ifname)?.filter(|link| host_end.peer_index == Some(link.index)) else {
            return Err(CniError::new(Code::Kernel, format!("{ifname} vanished right after its creation")));
        };
        self.set_sysctls(ifname)?;
        let existing = self.main_routes()?;
        let wanted = Wanted::new(attachment, link.index, &existing);
        self.apply(attachment, &link, &wanted).map_err(|error| refused(&error))?;
        let in_result = |route: &Route| route.table == TABLE_MAIN && next_hop(route).1.is_some();
        match self.link(ifname)? {
            Some(link) => Ok((link, wanted.routes.into_iter().filter(in_result).collect())),
            None => Err(CniError::new(Code::Kernel, format!("{ifname} vanished while it was configured"))),
        }
    }

    /// The kernel reads these when the device comes up, so they come first.
    fn set_sysctls(&self, ifname: &str) -> Result<(), CniError> {
        let work = || -> Result<(), SysctlError> {
            let sysctl = Sysctl::new();
            // Runtimes switch IPv6 off in namespaces of networks they think have none.
            sysctl.set_if_different(&["net", "ipv6", "conf", ifname, "disable_ipv6"], "0")?;
            for key in ["accept_dad", "accept_ra", "accept_redirects"] {
                sysctl.set_if_different(&["net", "ipv6", "conf", ifname, key], "0")?;
            }
            // A host that does not forward accepts redirects when either of the two says so.
            for conf in ["all", ifname] {
                sysctl.set_if_different(&["net", "ipv4", "conf", conf, "accept_redirects"], "0")?;
            }
            Ok(())
        };
        self.netns
            .run(work)
            .map_err(|error| CniError::new(Code::InvalidNetns, error.to_string()))?
            .map_err(|error| CniError::new(Code::Kernel, error.to_string()))
    }

    fn main_routes(&mut self) -> Result<Vec<Route>, CniError> {
        let filter = RouteFilter { table: Some(TABLE_MAIN), ..RouteFilter::default() };
        self.rtnl.routes(filter).map_err(|error| refused(&error))
    }

    fn apply(&mut self, attachment: &Attachment, link: &Link, wanted: &Wanted) -> Result<(), RtnlError> {
        let up = || LinkChange { up: Some(true), ..LinkChange::default() };
        if let Some(lo) = self.rtnl.link("lo")? {
            self.rtnl.set_link(lo.index, up())?;
        }
        self.rtnl.set_link(link.index, up())?;
        for net in addresses(attachment) {
            self.rtnl.add_address(link.index, AddressSpec::plain(net))?;
        }
        for gateway in gateways(attachment) {
            self.rtnl.add_neighbour(link.index, gateway, mac(attachment.gateway_mac))?;
        }
        for route in &wanted.routes {
            self.rtnl.add_route(route.clone())?;
        }
        for rule in &wanted.rules {
            self.rtnl.add_rule(rule.clone())?;
        }
        Ok(())
    }

    fn has_rule(&mut self, family: Family, dev: u32) -> Result<bool, CniError> {
        let rules = self.rtnl.rules(family).map_err(|error| refused(&error))?;
        Ok(rules.iter().any(|rule| rule.action == RuleAction::Table(SECONDARY_TABLE + dev)))
    }

    /// Removes the rules of a device, which outlive it. Without their table they do nothing, so that what is
    /// left after a kill does no harm.
    pub(crate) fn delete_rules(&mut self, dev: u32) -> Result<(), CniError> {
        for family in Family::BOTH {
            for rule in self.rtnl.rules(family).map_err(|error| refused(&error))? {
                if rule.protocol == ROUTE_PROTOCOL && rule.action == RuleAction::Table(SECONDARY_TABLE + dev)
                {
                    self.rtnl.del_rule(rule).map_err(|error| refused(&error))?;
                }
            }
        }
        Ok(())
    }

    /// What of an attachment's configuration is missing, in sentences; `routes` are those expected beyond the
    /// gateway.
    pub(crate) fn missing(
        &mut self,
        attachment: &Attachment,
        link: &Link,
        listed: &[IpNet],
        expects_route: impl Fn(IpNet, IpAddr) -> bool,
    ) -> Result<Vec<String>, CniError> {
        let mut missing = Vec::new();
        let ifname = &link.name;
        let present = self.rtnl.addresses(Some(link.index)).map_err(|error| refused(&error))?;
        let mut expected: Vec<IpNet> = addresses(attachment).to_vec();
        expected.extend(listed.iter().copied().filter(|net| !addresses(attachment).contains(net)));
        for net in expected {
            if !present.iter().any(|address| address.net == net && !address.duplicate) {
                missing.push(format!("address {net} is not on {ifname}"));
            }
        }
        let neighbours = self.rtnl.neighbours(link.index).map_err(|error| refused(&error))?;
        // The kernel drops all entries of a device whose Ethernet address a later plugin changes.
        let same_mac = link.mac == Some(mac(attachment.mac));
        for gateway in gateways(attachment) {
            let found = neighbours.iter().any(|entry| {
                entry.ip == gateway && entry.permanent && entry.mac == Some(mac(attachment.gateway_mac))
            });
            if !found && same_mac {
                missing.push(format!("no permanent neighbour entry for gateway {gateway} on {ifname}"));
            }
        }
        let routes = self.main_routes()?;
        let leaves_by = |dst: IpNet, via: Option<IpAddr>| {
            routes.iter().any(|route| {
                let (dev, gateway) = next_hop(route);
                route.dst.trunc() == dst && dev == Some(link.index) && gateway == via
            })
        };
        for gateway in gateways(attachment) {
            if !leaves_by(IpNet::from(gateway), None) {
                missing.push(format!("no route to gateway {gateway} on {ifname}"));
            }
            let secondary = routes.iter().any(|route| {
                next_hop(route) == (Some(link.index), None)
                    && route.dst.trunc() == IpNet::from(gateway)
                    && route.metric >= SECONDARY_METRIC
            });
            if secondary && !self.has_rule(Family::of(gateway), link.index)? {
                missing.push(format!("no rule for packets from {ifname}"));
            }
            for dst in beyond(attachment, gateway) {
                if expects_route(dst, gateway) && !leaves_by(dst, Some(gateway)) {
                    missing.push(format!("no route to {dst} via {gateway} on {ifname}"));
                }
            }
        }
        Ok(missing)
    }
}

/// The host's `/32` and `/128`: every packet of the container goes through the gateway.
pub(crate) fn addresses(attachment: &Attachment) -> [IpNet; 2] {
    [IpNet::from(IpAddr::V4(attachment.ipv4)), IpNet::from(IpAddr::V6(attachment.ipv6))]
}

fn gateways(attachment: &Attachment) -> [IpAddr; 2] {
    [IpAddr::V4(attachment.gateway_ipv4), IpAddr::V6(attachment.gateway_ipv6)]
}

/// The destinations that may be routed via a gateway: everything, and the cluster's range.
fn beyond(attachment: &Attachment, gateway: IpAddr) -> [IpNet; 2] {
    match gateway {
        IpAddr::V4(_) => [IpNet::V4(ipnet::Ipv4Net::default()), IpNet::V4(attachment.cluster_ipv4.trunc())],
        IpAddr::V6(_) => [IpNet::V6(ipnet::Ipv6Net::default()), IpNet::V6(attachment.cluster_ipv6.trunc())],
    }
}

/// The routes and rules of a container's end.
#[derive(Debug, PartialEq, Eq)]
struct Wanted {
    /// The gateway on the link, then everything via the gateway.
    routes: Vec<Route>,
    rules: Vec<Rule>,
}

impl Wanted {
    /// Where the container has a default route already, it keeps it, and only the cluster's range goes our
    /// way. Where it has ours already, by another interface, that one keeps its traffic. In both cases packets
    /// from the new address still leave by the new interface, by a table of its own: the host accepts them
    /// nowhere else.
    fn new(attachment: &Attachment, dev: u32, existing: &[Route]) -> Self {
        let others: Vec<&Route> = existing.iter().filter(|route| next_hop(route).0 != Some(dev)).collect();
        let taken = |dst: IpNet| others.iter().any(|route| route.dst.trunc() == dst);
        let (mut routes, mut rules) = (Vec::new(), Vec::new());
        for (gateway, own) in gateways(attachment).into_iter().zip(addresses(attachment)) {
            let [default, cluster] = beyond(attachment, gateway);
            let via = if taken(default) { cluster } else { default };
            let on_link = IpNet::from(gateway);
            let metric = if taken(on_link) || taken(via) { SECONDARY_METRIC + dev } else { 0 };
            let prefsrc = Some(own.addr());
            let route = |dst, gateway, table, metric| {
                // Not `onlink`: IPv6 refuses that where another device leads to the same gateway, and the
                // route before this one makes it unnecessary.
                let kind = RouteKind::Unicast { dev, gateway, onlink: false, prefsrc };
                Route { kind, table, metric, ..Route::dev(dst, dev, ROUTE_PROTOCOL) }
            };
            routes.push(route(on_link, None, TABLE_MAIN, metric));
            routes.push(route(via, Some(gateway), TABLE_MAIN, metric));
            if taken(default) || metric != 0 {
                let table = SECONDARY_TABLE + dev;
                routes.push(route(on_link, None, table, 0));
                routes.push(route(default, Some(gateway), table, 0));
                rules.push(source_rule(own, table));
            }
        }
        Self { routes, rules }
    }
}

fn source_rule(own: IpNet, table: u32) -> Rule {
    Rule {
        family: Family::of(own.addr()),
        priority: SECONDARY_RULE,
        action: RuleAction::Table(table),
        iif: None,
        oif: None,
        src: Some(own),
        dst: None,
        fwmark: None,
        invert: false,
        suppress_prefix_len: None,
        protocol: ROUTE_PROTOCOL,
    }
}

/// Device and gateway of a route.
pub(crate) fn next_hop(route: &Route) -> (Option<u32>, Option<IpAddr>) {
    match route.kind {
        RouteKind::Unicast { dev, gateway, .. } => (Some(dev), gateway),
        RouteKind::Nexthop { dev, gateway, .. } => (dev, gateway),
        RouteKind::Unreachable | RouteKind::Blackhole | RouteKind::Prohibit | RouteKind::Other(_) => {
            (None, None)
        }
    }
}

fn mac(address: MacAddr) -> Mac {
    Mac(address.0)
}

/// What `ip link` shows beside the host's end; the kernel takes at most 255 bytes.
fn alias(id: &AttachmentId) -> String {
    let mut text = id.to_string();
    let end = (0..=text.len().min(255)).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
    text.truncate(end);
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_core::api::AttachmentState;

    fn attachment() -> Attachment {
        let id = AttachmentId::new("c1", "eth0").unwrap();
        Attachment {
            host_ifname: id.host_ifname(),
            id,
            state: AttachmentState::Leased,
            netns: "/run/netns/x".into(),
            network: "mesh".into(),
            pod: None,
            mac: MacAddr([2, 0, 0, 0, 0, 1]),
            ipv4: "10.32.0.5".parse().unwrap(),
            ipv6: "fd00::5".parse().unwrap(),
            gateway_ipv4: "10.32.0.1".parse().unwrap(),
            gateway_ipv6: "fd00::1".parse().unwrap(),
            gateway_mac: MacAddr([2, 0, 0, 0, 0, 2]),
            cluster_ipv4: "10.32.0.0/12".parse().unwrap(),
            cluster_ipv6: "fd00::/48".parse().unwrap(),
            mtu: 1420,
        }
    }

    fn shown(routes: &[Route]) -> Vec<String> {
        routes
            .iter()
            .map(|route| match next_hop(route).1 {
                Some(gateway) => {
                    format!("{} via {gateway} table {} metric {}", route.dst, route.table, route.metric)
                }
                None => format!("{} table {} metric {}", route.dst, route.table, route.metric),
            })
            .collect()
    }

    #[test]
    fn a_fresh_container_gets_default_routes() {
        let Wanted { routes, rules } = Wanted::new(&attachment(), 2, &[]);
        assert_eq!(
            shown(&routes),
            [
                "10.32.0.1/32 table 254 metric 0",
                "0.0.0.0/0 via 10.32.0.1 table 254 metric 0",
                "fd00::1/128 table 254 metric 0",
                "::/0 via fd00::1 table 254 metric 0"
            ]
        );
        assert!(routes.iter().all(|route| route.protocol == ROUTE_PROTOCOL));
        assert_eq!(rules, []);
    }

    #[test]
    fn s060_a_second_interface_leaves_the_default_route_to_the_first() {
        let foreign = Route::dev("0.0.0.0/0".parse().unwrap(), 9, 3);
        let Wanted { routes, rules } = Wanted::new(&attachment(), 2, &[foreign]);
        assert_eq!(
            shown(&routes),
            [
                "10.32.0.1/32 table 254 metric 0",
                "10.32.0.0/12 via 10.32.0.1 table 254 metric 0",
                "10.32.0.1/32 table 118000002 metric 0",
                "0.0.0.0/0 via 10.32.0.1 table 118000002 metric 0",
                "fd00::1/128 table 254 metric 0",
                "::/0 via fd00::1 table 254 metric 0",
            ],
            "the other family is judged for itself"
        );
        assert_eq!(rules, [source_rule("10.32.0.5/32".parse().unwrap(), 118_000_002)]);

        let first = Wanted::new(&attachment(), 7, &[]);
        let second = Wanted::new(&attachment(), 8, &first.routes);
        assert_eq!(
            shown(&second.routes),
            [
                "10.32.0.1/32 table 254 metric 2008",
                "10.32.0.0/12 via 10.32.0.1 table 254 metric 2008",
                "10.32.0.1/32 table 118000008 metric 0",
                "0.0.0.0/0 via 10.32.0.1 table 118000008 metric 0",
                "fd00::1/128 table 254 metric 2008",
                "fd00::/48 via fd00::1 table 254 metric 2008",
                "fd00::1/128 table 118000008 metric 0",
                "::/0 via fd00::1 table 118000008 metric 0",
            ]
        );
        assert_eq!(second.rules.len(), 2);
    }

    #[test]
    fn aliases_fit_the_kernel() {
        let id = AttachmentId::new("c".repeat(255), "\u{e4}th0").unwrap();
        assert_eq!(alias(&id).len(), 255);
        assert_eq!(alias(&AttachmentId::new("c", "eth0").unwrap()), "c/eth0");
    }
}
