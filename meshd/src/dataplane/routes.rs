//! Routes of our protocol number in the main table.
//!
//! # Metrics
//! Ours are lower than what others use: a route that somebody adds for one of our ranges must lose, or be refused
//! for having the same key, so that no cluster traffic leaves by it even when the guard has been flushed. A route
//! that ends (`unreachable`) comes just behind the one to a device for the same range: both exist side by side, and
//! what goes to a device that vanishes ends instead of taking the default route.
//!
//! # Several devices
//! A route over several devices goes by a nexthop group, one to a single device does not. Both have the same metric, so
//! that one replaces the other in one step.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use mesh_core::host::{ROUTE_PROTOCOL, Route};
use mesh_sys::rtnl::{self, Blocking, Family, Link, RouteFilter, RouteKind, RtnlError};

use super::nexthops::{Spread, Ways};

/// `main`.
const MAIN: u32 = 254;

/// Metric of a route to devices. The kernel takes 0 as 1024 for IPv6, so the lowest is 1 there.
fn device_metric(to: &IpNet) -> u32 {
    u32::from(to.addr().is_ipv6())
}

/// Metric of a route that ends.
fn unreachable_metric(to: &IpNet) -> u32 {
    device_metric(to) + 1
}

/// Why a route is not as it should be.
#[derive(Debug, thiserror::Error)]
pub(super) enum RouteError {
    /// The device is not there; of several, none carries anything.
    #[error("route to {to}: device {device} does not exist, or is down")]
    NoDevice {
        /// Destination.
        to: IpNet,
        /// The device.
        device: String,
    },
    /// A device of several is not there or carries nothing; the route leads to the others.
    #[error("route to {to}: it leaves out device {device}, which does not exist, is down or has no engine")]
    LeftOut {
        /// Destination.
        to: IpNet,
        /// The device.
        device: String,
    },
    /// The kernel.
    #[error(transparent)]
    Kernel(#[from] RtnlError),
}

/// Every route of ours, as the kernel has it.
pub(super) fn list(rtnl: &mut Blocking) -> Result<Vec<rtnl::Route>, RtnlError> {
    rtnl.routes(RouteFilter { family: None, table: Some(MAIN), protocol: Some(ROUTE_PROTOCOL) })
}

/// The routes of ours with one destination.
pub(super) fn to<'a>(found: &'a [rtnl::Route], destination: &IpNet) -> &'a [rtnl::Route] {
    let from = found.partition_point(|route| route.dst < *destination);
    let rest = found.get(from..).unwrap_or_default();
    rest.get(..rest.partition_point(|route| route.dst == *destination)).unwrap_or_default()
}

/// Routes by destination, the one that is taken each. `spreads` are the groups as we make them, by id. `closed` are ranges
/// that need a route that ends behind the one to a device. What is not as we make it shows as a device that nobody has.
pub(super) fn observe(
    found: &[rtnl::Route],
    links: &[Link],
    spreads: &BTreeMap<u32, Spread>,
    closed: &[IpNet],
) -> BTreeMap<IpNet, Route> {
    let names: BTreeMap<u32, &str> = links.iter().map(|link| (link.index, link.name.as_str())).collect();
    let mut by_destination: BTreeMap<IpNet, Vec<&rtnl::Route>> = BTreeMap::new();
    for route in found {
        by_destination.entry(route.dst).or_default().push(route);
    }
    let read = |(to, mut routes): (IpNet, Vec<&rtnl::Route>)| {
        routes.sort_by_key(|route| route.metric);
        let ends = |route: &&rtnl::Route| {
            route.kind == RouteKind::Unreachable && route.metric == unreachable_metric(&to)
        };
        let route = match routes.as_slice() {
            [only] if ends(only) => Route::Unreachable,
            [only] if !closed.contains(&to) => devices(only, &names, spreads),
            [first, second] if ends(second) => devices(first, &names, spreads),
            _ => other("several routes, or one with nothing behind it"),
        };
        (to, route)
    };
    by_destination.into_iter().map(read).collect()
}

fn devices(route: &rtnl::Route, names: &BTreeMap<u32, &str>, spreads: &BTreeMap<u32, Spread>) -> Route {
    let (indices, source) = match &route.kind {
        RouteKind::Unicast { dev, gateway: None, onlink: false, prefsrc } => {
            (BTreeSet::from([*dev]), *prefsrc)
        }
        RouteKind::Nexthop { id, prefsrc, .. } => match spreads.get(id) {
            Some(spread) => (spread.devices.clone(), *prefsrc),
            None => return other("a nexthop not as we make it"),
        },
        RouteKind::Unicast { .. }
        | RouteKind::Unreachable
        | RouteKind::Blackhole
        | RouteKind::Prohibit
        | RouteKind::Other(_) => return other("not as we make it"),
    };
    if route.metric != device_metric(&route.dst) {
        return other("another metric");
    }
    let found: Option<BTreeSet<String>> =
        indices.iter().map(|index| names.get(index).map(|name| (*name).to_owned())).collect();
    match found {
        Some(devices) => Route::Devices { devices, source, mtu: route.mtu },
        None => other("a device that is gone"),
    }
}

/// Never equal to a wanted one: no device has such a name.
fn other(what: &str) -> Route {
    Route::to_device(format!("({what})"), None, None)
}

/// A route to devices, as wanted.
#[derive(Debug)]
pub(super) struct Lead<'a> {
    to: IpNet,
    devices: &'a BTreeSet<String>,
    source: Option<IpAddr>,
    mtu: Option<u32>,
}

impl<'a> Lead<'a> {
    /// `None` for a route that ends.
    pub(super) fn of(to: IpNet, route: &'a Route) -> Option<Self> {
        match route {
            Route::Unreachable => None,
            Route::Devices { devices, source, mtu } => Some(Self { to, devices, source: *source, mtu: *mtu }),
        }
    }
}

/// Makes a route to end. `found` are the routes of ours that there are for that destination.
///
/// # Errors
/// The kernel refuses.
pub(super) fn end(rtnl: &mut Blocking, to: IpNet, found: &[rtnl::Route]) -> Result<(), RouteError> {
    put(rtnl, ending(to), found)?;
    clear(rtnl, unreachable_metric(&to), found)
}

/// Makes a route to lead to devices; it is replaced in one step. Of several devices, those that carry nothing now are left
/// out. `all` are the routes of ours, by destination.
///
/// # Errors
/// [`RouteError`]; after [`RouteError::LeftOut`] the route leads to the devices that are left.
pub(super) fn lead(
    rtnl: &mut Blocking,
    ways: &mut Option<Ways>,
    wanted: &Lead<'_>,
    all: &[rtnl::Route],
    closed: &[IpNet],
) -> Result<(), RouteError> {
    let (to, found) = (wanted.to, self::to(all, &wanted.to));
    if closed.contains(&to) {
        // First, and also when there is no device: then this is what is left.
        put(rtnl, ending(to), found)?;
    }
    let ways = match ways {
        Some(ways) => ways,
        // Not before: the devices are as they should be by now.
        None => ways.insert(Ways::read(rtnl, all)?),
    };
    let (devices, left_out) = usable(ways, wanted)?;
    let mut route = match devices.first() {
        Some(only) if devices.len() == 1 => rtnl::Route::dev(to, *only, ROUTE_PROTOCOL),
        _ => {
            let family = Family::of(to.addr());
            let spread = Spread { family, devices, source: wanted.source, mtu: wanted.mtu };
            rtnl::Route::by_nexthop(to, ways.group(rtnl, &spread)?, ROUTE_PROTOCOL)
        }
    };
    if let RouteKind::Unicast { prefsrc, .. } | RouteKind::Nexthop { prefsrc, .. } = &mut route.kind {
        *prefsrc = wanted.source;
    }
    let metric = device_metric(&to);
    put(rtnl, rtnl::Route { mtu: wanted.mtu, metric, ..route }, found)?;
    clear(rtnl, metric, found)?;
    left_out.map_or(Ok(()), Err)
}

fn ending(to: IpNet) -> rtnl::Route {
    rtnl::Route { metric: unreachable_metric(&to), ..rtnl::Route::unreachable(to, ROUTE_PROTOCOL) }
}

/// Takes away what else there is, after what is wanted is there: never without a route meanwhile. A route that ends behind
/// another stays.
fn clear(rtnl: &mut Blocking, metric: u32, found: &[rtnl::Route]) -> Result<(), RouteError> {
    for route in found {
        let fallback = route.kind == RouteKind::Unreachable && route.metric == unreachable_metric(&route.dst);
        if route.metric != metric && !fallback {
            rtnl.del_route(route.clone())?;
        }
    }
    Ok(())
}

/// Indices of the devices that a route can lead to now, never none, and of several the first that it cannot.
fn usable(ways: &Ways, wanted: &Lead<'_>) -> Result<(BTreeSet<u32>, Option<RouteError>), RouteError> {
    let (mut usable, mut missing) = (BTreeSet::new(), None);
    for device in wanted.devices {
        match ways.link(device) {
            // Whether a single one carries is the kernel's to say.
            Some(link) if wanted.devices.len() == 1 || (link.up && link.carrier) => {
                usable.insert(link.index);
            }
            Some(_) | None => {
                missing.get_or_insert_with(|| device.clone());
            }
        }
    }
    let to = wanted.to;
    match missing {
        Some(device) if usable.is_empty() => Err(RouteError::NoDevice { to, device }),
        Some(device) => Ok((usable, Some(RouteError::LeftOut { to, device }))),
        None => Ok((usable, None)),
    }
}

/// Adds a route, or puts it in the place of one of ours with the same metric.
fn put(rtnl: &mut Blocking, route: rtnl::Route, found: &[rtnl::Route]) -> Result<(), RtnlError> {
    match found.iter().find(|had| had.metric == route.metric) {
        Some(had) if had.normalized() == route.normalized() => Ok(()),
        Some(_) => rtnl.replace_route(route),
        None => rtnl.add_route(route),
    }
}

/// Takes away what leads somewhere, of the routes `found` for a destination; a route that ends stays.
pub(super) fn remove(rtnl: &mut Blocking, found: &[rtnl::Route]) -> Result<(), RouteError> {
    for route in found.iter().filter(|route| route.kind != RouteKind::Unreachable) {
        rtnl.del_route(route.clone())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    fn link(index: u32, name: &str) -> Link {
        Link {
            index,
            name: name.to_owned(),
            kind: None,
            mac: None,
            mtu: 1420,
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

    fn to_device(to: &str, metric: u32) -> rtnl::Route {
        rtnl::Route { metric, ..rtnl::Route::dev(net(to), 5, ROUTE_PROTOCOL) }
    }

    fn ends(to: &str, metric: u32) -> rtnl::Route {
        rtnl::Route { metric, ..rtnl::Route::unreachable(net(to), ROUTE_PROTOCOL) }
    }

    fn see(routes: &[rtnl::Route], closed: &[IpNet]) -> Route {
        let spread = Spread { family: Family::V4, devices: [5, 6].into(), source: None, mtu: None };
        let links = [link(5, "meshwg0"), link(6, "meshwg1")];
        let found = observe(routes, &links, &BTreeMap::from([(9, spread)]), closed);
        assert_eq!(found.len(), 1);
        found.into_values().next().unwrap()
    }

    #[test]
    fn the_route_that_is_taken_is_the_one_that_counts() {
        let lane = Route::to_device("meshwg0", None, None);
        assert_eq!(see(&[to_device("10.32.1.0/24", 0)], &[]), lane);
        assert_eq!(see(&[to_device("fd00::/48", 1)], &[]), lane);
        assert_eq!(see(&[ends("10.32.0.0/12", 1)], &[]), Route::Unreachable);
        assert_eq!(see(&[ends("10.32.0.0/12", 1), to_device("10.32.0.0/12", 0)], &[]), lane);
    }

    #[test]
    fn a_route_by_a_group_leads_to_its_devices() {
        let route = rtnl::Route {
            mtu: Some(1300),
            ..rtnl::Route::by_nexthop(net("10.32.1.0/24"), 9, ROUTE_PROTOCOL)
        };
        let devices = ["meshwg0", "meshwg1"].map(str::to_owned).into();
        assert_eq!(see(&[route], &[]), Route::Devices { devices, source: None, mtu: Some(1300) });
    }

    #[test]
    fn the_routes_to_a_destination_are_found_among_all() {
        let mut all = vec![
            ends("10.32.0.0/12", 1),
            to_device("10.32.0.0/12", 0),
            to_device("10.32.1.0/24", 0),
            to_device("fd00::/48", 1),
        ];
        all.sort_by_key(|route| route.dst);
        assert_eq!(to(&all, &net("10.32.0.0/12")), [ends("10.32.0.0/12", 1), to_device("10.32.0.0/12", 0)]);
        assert_eq!(to(&all, &net("fd00::/48")), [to_device("fd00::/48", 1)]);
        assert_eq!(to(&all, &net("10.32.0.0/24")), []);
    }

    #[test]
    fn a_range_of_the_cluster_has_an_end_behind_its_route() {
        let closed = [net("10.32.0.0/12")];
        let lane = Route::to_device("meshwg0", None, None);
        assert_ne!(see(&[to_device("10.32.0.0/12", 0)], &closed), lane);
        assert_eq!(see(&[to_device("10.32.0.0/12", 0), ends("10.32.0.0/12", 1)], &closed), lane);
    }

    #[test]
    fn what_we_would_not_have_made_equals_nothing_wanted() {
        let mut by_gateway = to_device("10.32.1.0/24", 0);
        by_gateway.kind =
            RouteKind::Unicast { dev: 5, gateway: Some([192, 0, 2, 1].into()), onlink: false, prefsrc: None };
        for routes in [
            vec![by_gateway],
            vec![to_device("10.32.1.0/24", 7)],
            vec![ends("10.32.1.0/24", 0)],
            vec![to_device("10.32.1.0/24", 0), to_device("10.32.1.0/24", 7)],
            vec![rtnl::Route::dev(net("10.32.1.0/24"), 7, ROUTE_PROTOCOL)],
            vec![rtnl::Route::by_nexthop(net("10.32.1.0/24"), 8, ROUTE_PROTOCOL)],
            vec![rtnl::Route {
                metric: 7,
                ..rtnl::Route::by_nexthop(net("10.32.1.0/24"), 9, ROUTE_PROTOCOL)
            }],
        ] {
            let Route::Devices { devices, .. } = see(&routes, &[]) else { panic!("{routes:?}") };
            for device in devices {
                assert!(mesh_sys::rtnl::check_name(&device).is_err(), "{device} could be a device");
            }
        }
    }
}
