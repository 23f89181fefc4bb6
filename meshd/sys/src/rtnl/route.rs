//! Routes.

use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;
use nix::errno::Errno;

use super::types::octets;
use super::{Blocking, Family, RtnlError, about, deleted};
use crate::netlink::{Attr, Attrs, Body, Failure, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};

const RTM_NEWROUTE: u16 = 24;
const RTM_DELROUTE: u16 = 25;
const RTM_GETROUTE: u16 = 26;

const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_PRIORITY: u16 = 6;
const RTA_PREFSRC: u16 = 7;
const RTA_METRICS: u16 = 8;
const RTA_MULTIPATH: u16 = 9;
const RTA_TABLE: u16 = 15;
const RTA_NH_ID: u16 = 30;
const RTAX_MTU: u16 = 2;

const RTN_UNICAST: u8 = 1;
const RTN_BLACKHOLE: u8 = 6;
const RTN_UNREACHABLE: u8 = 7;
const RTN_PROHIBIT: u8 = 8;
const RTNH_F_ONLINK: u32 = 4;
const RTM_F_CLONED: u32 = 0x200;
const RT_SCOPE_NOWHERE: u8 = 255;
const RTMSG: usize = 12;

/// The main table.
pub(crate) const TABLE_MAIN: u32 = 254;
/// What the kernel puts in place of metric 0 for IPv6 (`IP6_RT_PRIO_USER`).
const IPV6_DEFAULT_METRIC: u32 = 1024;

/// How far a destination or address is (`rtnetlink(7)`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Scope {
    /// Anywhere: through a gateway.
    Universe,
    /// Within the site (old IPv6 use).
    Site,
    /// Directly on the link.
    Link,
    /// This host.
    Host,
    /// Another value.
    Other(u8),
}

impl Scope {
    pub(crate) fn raw(self) -> u8 {
        match self {
            Self::Universe => 0,
            Self::Site => 200,
            Self::Link => 253,
            Self::Host => 254,
            Self::Other(raw) => raw,
        }
    }

    pub(crate) fn from_raw(raw: u8) -> Self {
        match raw {
            0 => Self::Universe,
            200 => Self::Site,
            253 => Self::Link,
            254 => Self::Host,
            raw => Self::Other(raw),
        }
    }
}

/// What happens to packets that take a route.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RouteKind {
    /// They leave by a device.
    Unicast {
        /// Index of the device.
        dev: u32,
        /// Next hop; without one the destination is on the link itself.
        gateway: Option<IpAddr>,
        /// The next hop is on the link although no prefix of the device says so.
        onlink: bool,
        /// Source address for packets of this host.
        prefsrc: Option<IpAddr>,
    },
    /// They leave by a nexthop object or a group of such.
    Nexthop {
        /// Its id.
        id: u32,
        /// Source address for packets of this host.
        prefsrc: Option<IpAddr>,
        /// Index of the device, of a nexthop that is no group. Read only.
        dev: Option<u32>,
        /// Its gateway. Read only.
        gateway: Option<IpAddr>,
    },
    /// They end here, and the sender is told: no route to host.
    Unreachable,
    /// They end here silently.
    Blackhole,
    /// They end here, and the sender is told: administratively prohibited.
    Prohibit,
    /// Anything else the kernel has: several next hops, or the route type given. Read only.
    Other(u8),
}

/// A route. Its key in the kernel is table, destination and metric.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Route {
    /// Destination; host bits are ignored.
    pub dst: IpNet,
    /// What happens to packets.
    pub kind: RouteKind,
    /// Table; 254 is `main`.
    pub table: u32,
    /// Who made it (`rtm_protocol`); ours is told from others' by this.
    pub protocol: u8,
    /// Preference among routes of one destination, lower first. For IPv6 the kernel takes 0 as 1024.
    pub metric: u32,
    /// Path MTU in bytes.
    pub mtu: Option<u32>,
    /// Scope. `None` when adding: what fits, [`Scope::Link`] for an IPv4 device route without
    /// gateway, else [`Scope::Universe`]. Always given when read.
    pub scope: Option<Scope>,
}

impl Route {
    /// A route out of a device, in the main table.
    #[must_use]
    pub fn dev(dst: IpNet, dev: u32, protocol: u8) -> Self {
        let kind = RouteKind::Unicast { dev, gateway: None, onlink: false, prefsrc: None };
        Self { dst, kind, table: TABLE_MAIN, protocol, metric: 0, mtu: None, scope: None }
    }

    /// A route by a nexthop object or group, in the main table.
    #[must_use]
    pub fn by_nexthop(dst: IpNet, id: u32, protocol: u8) -> Self {
        let kind = RouteKind::Nexthop { id, prefsrc: None, dev: None, gateway: None };
        Self { dst, kind, table: TABLE_MAIN, protocol, metric: 0, mtu: None, scope: None }
    }

    /// A route that ends here, in the main table. Give it a metric worse than that of real routes of
    /// the same destination.
    #[must_use]
    pub fn unreachable(dst: IpNet, protocol: u8) -> Self {
        let kind = RouteKind::Unreachable;
        Self { dst, kind, table: TABLE_MAIN, protocol, metric: 0, mtu: None, scope: None }
    }

    /// The form in which the kernel shows this route: host bits cleared, defaults filled in. Two
    /// routes are the same when their normal forms are equal.
    #[must_use]
    pub fn normalized(&self) -> Self {
        let v4 = self.dst.addr().is_ipv4();
        let link = match &self.kind {
            RouteKind::Unicast { gateway, .. } => v4 && gateway.is_none(),
            RouteKind::Nexthop { .. }
            | RouteKind::Unreachable
            | RouteKind::Blackhole
            | RouteKind::Prohibit
            | RouteKind::Other(_) => false,
        };
        let fitting = if link { Scope::Link } else { Scope::Universe };
        let mut kind = self.kind.clone();
        if let RouteKind::Nexthop { dev, gateway, .. } = &mut kind {
            (*dev, *gateway) = (None, None);
        }
        Self {
            dst: self.dst.trunc(),
            kind,
            metric: if !v4 && self.metric == 0 { IPV6_DEFAULT_METRIC } else { self.metric },
            scope: Some(if v4 { self.scope.unwrap_or(fitting) } else { Scope::Universe }),
            ..self.clone()
        }
    }

    fn key(&self) -> (u32, IpNet, u32) {
        let n = self.normalized();
        (n.table, n.dst, n.metric)
    }
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.kind {
            RouteKind::Unicast { dev, gateway, .. } => {
                write!(f, "{}", self.dst)?;
                if let Some(gateway) = gateway {
                    write!(f, " via {gateway}")?;
                }
                write!(f, " dev {dev}")?;
            }
            RouteKind::Nexthop { id, .. } => write!(f, "{} nexthop {id}", self.dst)?,
            RouteKind::Unreachable => write!(f, "unreachable {}", self.dst)?,
            RouteKind::Blackhole => write!(f, "blackhole {}", self.dst)?,
            RouteKind::Prohibit => write!(f, "prohibit {}", self.dst)?,
            RouteKind::Other(raw) => write!(f, "(type {raw}) {}", self.dst)?,
        }
        write!(f, " metric {} table {} protocol {}", self.metric, self.table, self.protocol)
    }
}

/// Which routes to list; `None` is any.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RouteFilter {
    /// IP version.
    pub family: Option<Family>,
    /// Table.
    pub table: Option<u32>,
    /// Who made it.
    pub protocol: Option<u8>,
}

impl Blocking {
    /// The routes that pass the filter. Entries the kernel makes by itself per destination (PMTU
    /// exceptions) are not routes and not listed.
    ///
    /// # Errors
    /// [`RtnlError`].
    pub fn routes(&mut self, filter: RouteFilter) -> Result<Vec<Route>, RtnlError> {
        let mut found = Vec::new();
        for family in Family::BOTH {
            if filter.family.is_some_and(|f| f != family) {
                continue;
            }
            // The kernel filters by protocol; filtering by table there would turn a table that does
            // not exist yet into an error.
            let header = [family.raw(), 0, 0, 0, 0, filter.protocol.unwrap_or(0), 0, 0, 0, 0, 0, 0];
            let list = self.dump(RTM_GETROUTE, &Body::new(&header)).map_err(about("list", "routes"))?;
            found.extend(list.iter().filter(|m| m.kind == RTM_NEWROUTE).filter_map(|m| parse(&m.body)));
        }
        found.retain(|r| {
            filter.table.is_none_or(|t| r.table == t) && filter.protocol.is_none_or(|p| r.protocol == p)
        });
        Ok(found)
    }

    /// Adds a route. One of the same key (table, destination, metric) that carries the same protocol
    /// number is replaced, without a moment in which there is none; another's is never touched.
    ///
    /// # Errors
    /// [`RtnlError::Occupied`] when the key belongs to a route of another protocol; otherwise the
    /// kernel's refusal.
    pub fn add_route(&mut self, route: Route) -> Result<(), RtnlError> {
        let body = body(&route)?;
        match self.request(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_EXCL, &body) {
            Ok(_) => return Ok(()),
            Err(Failure::Kernel(r)) if r.errno == Errno::EEXIST => {}
            Err(other) => return Err(about("add route", route.to_string())(other)),
        }
        let filter = RouteFilter {
            family: Some(Family::of(route.dst.addr())),
            table: Some(route.table),
            protocol: None,
        };
        let wanted = route.normalized();
        let present: Vec<Route> =
            self.routes(filter)?.into_iter().filter(|r| r.key() == route.key()).collect();
        if present.iter().any(|r| r.normalized() == wanted) {
            return Ok(());
        }
        if let Some(foreign) = present.iter().find(|r| r.protocol != route.protocol) {
            return Err(RtnlError::Occupied {
                operation: "add route",
                object: route.to_string(),
                present: foreign.to_string(),
            });
        }
        self.request(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, &body)
            .map_err(about("replace route", route.to_string()))?;
        Ok(())
    }

    /// Replaces the route of the same key (table, destination, metric), whosever it is, without a moment in which
    /// there is none: for routes that were just seen to be the caller's own. Unlike [`Blocking::add_route`] it does
    /// not look first, which takes long where there are many. Where there is none, the route is added.
    ///
    /// # Errors
    /// As [`Blocking::add_route`].
    pub fn replace_route(&mut self, route: Route) -> Result<(), RtnlError> {
        match self.request(RTM_NEWROUTE, NLM_F_REPLACE, &body(&route)?) {
            Ok(_) => Ok(()),
            Err(Failure::Kernel(refusal)) if refusal.errno == Errno::ENOENT => self.add_route(route),
            Err(other) => Err(about("replace route", route.to_string())(other)),
        }
    }

    /// Deletes the route of this key, kind and protocol; `false` when there is none.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn del_route(&mut self, route: Route) -> Result<bool, RtnlError> {
        // MTU, preferred source and scope do not take part: any of them may have changed since.
        let mut any_scope = Route { mtu: None, scope: Some(Scope::Other(RT_SCOPE_NOWHERE)), ..route.clone() };
        if let RouteKind::Unicast { prefsrc, .. } | RouteKind::Nexthop { prefsrc, .. } = &mut any_scope.kind {
            *prefsrc = None;
        }
        let result = self.request(RTM_DELROUTE, 0, &body(&any_scope)?);
        // ENODEV: the device is gone, and its routes with it.
        deleted(result, &[Errno::ESRCH, Errno::ENODEV, Errno::ENOENT])
            .map_err(about("delete route", route.to_string()))
    }
}

fn body(route: &Route) -> Result<Body, RtnlError> {
    let n = route.normalized();
    let invalid = |problem| RtnlError::Invalid { operation: "route", object: route.to_string(), problem };
    let (kind, flags) = match &n.kind {
        RouteKind::Unicast { onlink, .. } => (RTN_UNICAST, if *onlink { RTNH_F_ONLINK } else { 0 }),
        RouteKind::Nexthop { .. } => (RTN_UNICAST, 0),
        RouteKind::Unreachable => (RTN_UNREACHABLE, 0),
        RouteKind::Blackhole => (RTN_BLACKHOLE, 0),
        RouteKind::Prohibit => (RTN_PROHIBIT, 0),
        RouteKind::Other(_) => return Err(invalid("routes of this kind can be read, not made")),
    };
    let table = u8::try_from(n.table).unwrap_or(0);
    let scope = n.scope.unwrap_or(Scope::Universe).raw();
    let mut header = [0; RTMSG];
    header[0] = Family::of(n.dst.addr()).raw();
    header[1] = n.dst.prefix_len();
    header[4] = table;
    header[5] = n.protocol;
    header[6] = scope;
    header[7] = kind;
    header[8..12].copy_from_slice(&flags.to_ne_bytes());
    let mut body = Body::new(&header);
    body.bytes(RTA_DST, &octets(n.dst.addr())).u32(RTA_TABLE, n.table);
    if n.metric != 0 {
        body.u32(RTA_PRIORITY, n.metric);
    }
    let addresses = match &n.kind {
        RouteKind::Unicast { dev, gateway, onlink: _, prefsrc } => {
            body.u32(RTA_OIF, *dev);
            [(RTA_GATEWAY, *gateway), (RTA_PREFSRC, *prefsrc)]
        }
        RouteKind::Nexthop { id, prefsrc, dev: _, gateway: _ } => {
            body.u32(RTA_NH_ID, *id);
            [(RTA_GATEWAY, None), (RTA_PREFSRC, *prefsrc)]
        }
        RouteKind::Unreachable | RouteKind::Blackhole | RouteKind::Prohibit | RouteKind::Other(_) => {
            [(RTA_GATEWAY, None), (RTA_PREFSRC, None)]
        }
    };
    for (attribute, ip) in addresses {
        if let Some(ip) = ip {
            if ip.is_ipv4() != n.dst.addr().is_ipv4() {
                return Err(invalid("destination, gateway and source are of different IP versions"));
            }
            body.bytes(attribute, &octets(ip));
        }
    }
    if let Some(mtu) = n.mtu {
        body.nest(RTA_METRICS, |metrics| {
            metrics.u32(RTAX_MTU, mtu);
        });
    }
    Ok(body)
}

pub(super) fn parse(body: &[u8]) -> Option<Route> {
    let [family, dst_len, _src_len, _tos, table, protocol, scope, kind, f0, f1, f2, f3, ..] = *body else {
        return None;
    };
    let flags = u32::from_ne_bytes([f0, f1, f2, f3]);
    if flags & RTM_F_CLONED != 0 {
        return None;
    }
    let family = Family::from_raw(family)?;
    let attrs = Attrs::after(body, RTMSG);
    let unspecified = match family {
        Family::V4 => IpAddr::from([0; 4]),
        Family::V6 => IpAddr::from([0; 16]),
    };
    let dst = attrs.find(RTA_DST).and_then(Attr::ip).unwrap_or(unspecified);
    let ip = |kind| attrs.find(kind).and_then(Attr::ip);
    let number = |kind| attrs.find(kind).and_then(Attr::u32);
    let (gateway, prefsrc) = (ip(RTA_GATEWAY), ip(RTA_PREFSRC));
    let kind = match kind {
        RTN_UNICAST => match (number(RTA_NH_ID), number(RTA_OIF)) {
            (Some(id), dev) => RouteKind::Nexthop { id, prefsrc, dev, gateway },
            (None, Some(dev)) if attrs.find(RTA_MULTIPATH).is_none() => {
                RouteKind::Unicast { dev, gateway, onlink: flags & RTNH_F_ONLINK != 0, prefsrc }
            }
            (None, _) => RouteKind::Other(RTN_UNICAST),
        },
        RTN_UNREACHABLE => RouteKind::Unreachable,
        RTN_BLACKHOLE => RouteKind::Blackhole,
        RTN_PROHIBIT => RouteKind::Prohibit,
        other => RouteKind::Other(other),
    };
    Some(Route {
        dst: IpNet::new(dst, dst_len).ok()?,
        kind,
        table: number(RTA_TABLE).unwrap_or(u32::from(table)),
        protocol,
        metric: number(RTA_PRIORITY).unwrap_or(0),
        mtu: attrs.find(RTA_METRICS).and_then(|m| m.nested().find(RTAX_MTU)).and_then(Attr::u32),
        scope: Some(Scope::from_raw(scope)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    #[test]
    fn the_normal_form_is_what_the_kernel_shows() {
        let v4 = Route::dev(net("10.32.1.7/24"), 3, 118).normalized();
        assert_eq!((v4.dst, v4.metric, v4.scope), (net("10.32.1.0/24"), 0, Some(Scope::Link)));
        let v6 = Route::dev(net("fd00::7/64"), 3, 118).normalized();
        assert_eq!((v6.dst, v6.metric, v6.scope), (net("fd00::/64"), 1024, Some(Scope::Universe)));
        assert_eq!(Route::unreachable(net("10.32.0.0/12"), 118).normalized().scope, Some(Scope::Universe));
    }

    #[test]
    fn what_is_written_is_read_back() {
        let gateway = "10.0.0.1".parse().unwrap();
        let prefsrc = "10.0.0.2".parse().unwrap();
        let mut route = Route::dev(net("10.32.1.0/24"), 3, 118);
        route.kind =
            RouteKind::Unicast { dev: 3, gateway: Some(gateway), onlink: true, prefsrc: Some(prefsrc) };
        route.mtu = Some(1380);
        route.metric = 50;
        route.table = 100_000;
        let written = body(&route).unwrap();
        assert_eq!(parse(written.finish().unwrap()).unwrap(), route.normalized());
    }

    #[test]
    fn a_route_by_a_nexthop_is_read_back() {
        let mut route = Route::by_nexthop(net("fd00::/64"), 0x6862_0001, 118);
        route.mtu = Some(1380);
        let RouteKind::Nexthop { prefsrc, .. } = &mut route.kind else { unreachable!() };
        *prefsrc = Some("fd00::1".parse().unwrap());
        let mut written = body(&route).unwrap();
        assert_eq!(parse(written.finish().unwrap()).unwrap(), route.normalized());
        // The kernel shows the device, too.
        written.u32(RTA_OIF, 3);
        let shown = parse(written.finish().unwrap()).unwrap();
        assert!(matches!(shown.kind, RouteKind::Nexthop { dev: Some(3), .. }), "{shown:?}");
        assert_eq!(shown.normalized(), route.normalized());
    }

    #[test]
    fn mixed_ip_versions_are_refused_by_us() {
        let mut route = Route::dev(net("fd00::/64"), 3, 118);
        let gateway = Some("10.0.0.1".parse().unwrap());
        route.kind = RouteKind::Unicast { dev: 3, gateway, onlink: false, prefsrc: None };
        assert!(matches!(body(&route), Err(RtnlError::Invalid { .. })));
    }

    proptest! {
        #[test]
        fn any_message_ends_without_panic(bytes: Vec<u8>) {
            let _ = parse(&bytes);
        }
    }
}
