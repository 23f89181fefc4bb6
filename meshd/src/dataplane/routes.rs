//! Routes of our protocol number in the main table.
//!
//! # Metrics
//! Ours are lower than what others use: a route that somebody adds for one of our ranges must lose, or be refused
//! for having the same key, so that no cluster traffic leaves by it even when the guard has been flushed. A route
//! that ends (`unreachable`) comes just behind the one to a device for the same range: both exist side by side, and
//! what goes to a device that vanishes ends instead of taking the default route.

use std::collections::BTreeMap;

use ipnet::IpNet;
use mesh_core::host::{ROUTE_PROTOCOL, Route};
use mesh_sys::rtnl::{self, Blocking, Link, RouteFilter, RouteKind, RtnlError};

/// `main`.
const MAIN: u32 = 254;

/// Metric of a route to a device. The kernel takes 0 as 1024 for IPv6, so the lowest is 1 there.
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
    /// The device is not there.
    #[error("route to {to}: device {device} does not exist")]
    NoDevice {
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

/// Routes by destination, the one that is taken each. `closed` are ranges that need a route that ends behind the
/// one to a device. What is not as we make it shows as a device that nobody has.
pub(super) fn observe(found: &[rtnl::Route], links: &[Link], closed: &[IpNet]) -> BTreeMap<IpNet, Route> {
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
            [only] if !closed.contains(&to) => device(only, links),
            [first, second] if ends(second) => device(first, links),
            _ => other("several routes, or one with nothing behind it"),
        };
        (to, route)
    };
    by_destination.into_iter().map(read).collect()
}

fn device(route: &rtnl::Route, links: &[Link]) -> Route {
    match &route.kind {
        RouteKind::Unicast { dev, gateway: None, onlink: false, prefsrc }
            if route.metric == device_metric(&route.dst) =>
        {
            match links.iter().find(|link| link.index == *dev) {
                Some(link) => Route::Device { device: link.name.clone(), source: *prefsrc, mtu: route.mtu },
                None => other("a device that is gone"),
            }
        }
        RouteKind::Unicast { .. }
        | RouteKind::Nexthop { .. }
        | RouteKind::Unreachable
        | RouteKind::Blackhole
        | RouteKind::Prohibit
        | RouteKind::Other(_) => other("not as we make it"),
    }
}

/// Never equal to a wanted one: no device has such a name.
fn other(what: &str) -> Route {
    Route::Device { device: format!("({what})"), source: None, mtu: None }
}

/// Makes a route to be as wanted, whatever of ours there is for that destination.
pub(super) fn set(
    rtnl: &mut Blocking,
    to: IpNet,
    wanted: &Route,
    closed: &[IpNet],
) -> Result<(), RouteError> {
    let ends =
        || rtnl::Route { metric: unreachable_metric(&to), ..rtnl::Route::unreachable(to, ROUTE_PROTOCOL) };
    let mut keep = Vec::new();
    match wanted {
        Route::Unreachable => keep.push(ends()),
        Route::Device { device, source, mtu } => {
            if closed.contains(&to) {
                // First, and also when there is no device: then this is what is left.
                rtnl.add_route(ends())?;
            }
            let index =
                rtnl.link(device)?.ok_or_else(|| RouteError::NoDevice { to, device: device.clone() })?.index;
            let kind = RouteKind::Unicast { dev: index, gateway: None, onlink: false, prefsrc: *source };
            let route = rtnl::Route::dev(to, index, ROUTE_PROTOCOL);
            keep.push(rtnl::Route { kind, mtu: *mtu, metric: device_metric(&to), ..route });
        }
    }
    for route in &keep {
        rtnl.add_route(route.clone())?;
    }
    // What else there is goes last: never without a route meanwhile.
    for route in list(rtnl)? {
        let kept = keep.iter().any(|kept| kept.metric == route.metric);
        let fallback = route.kind == RouteKind::Unreachable && route.metric == unreachable_metric(&to);
        if route.dst == to && !kept && !fallback {
            rtnl.del_route(route)?;
        }
    }
    Ok(())
}

/// Takes away what leads somewhere; a route that ends stays.
pub(super) fn remove(rtnl: &mut Blocking, to: IpNet) -> Result<(), RouteError> {
    for route in list(rtnl)? {
        if route.dst == to && route.kind != RouteKind::Unreachable {
            rtnl.del_route(route)?;
        }
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
        let found = observe(routes, &[link(5, "meshwg0")], closed);
        assert_eq!(found.len(), 1);
        found.into_values().next().unwrap()
    }

    #[test]
    fn the_route_that_is_taken_is_the_one_that_counts() {
        let lane = Route::Device { device: "meshwg0".to_owned(), source: None, mtu: None };
        assert_eq!(see(&[to_device("10.32.1.0/24", 0)], &[]), lane);
        assert_eq!(see(&[to_device("fd00::/48", 1)], &[]), lane);
        assert_eq!(see(&[ends("10.32.0.0/12", 1)], &[]), Route::Unreachable);
        assert_eq!(see(&[ends("10.32.0.0/12", 1), to_device("10.32.0.0/12", 0)], &[]), lane);
    }

    #[test]
    fn a_range_of_the_cluster_has_an_end_behind_its_route() {
        let closed = [net("10.32.0.0/12")];
        let lane = Route::Device { device: "meshwg0".to_owned(), source: None, mtu: None };
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
            vec![rtnl::Route::dev(net("10.32.1.0/24"), 6, ROUTE_PROTOCOL)],
        ] {
            let Route::Device { device, .. } = see(&routes, &[]) else { panic!("{routes:?}") };
            assert!(mesh_sys::rtnl::check_name(&device).is_err(), "{device} could be a device");
        }
    }
}
