//! Nexthop objects and routes by them against the running kernel.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::collections::BTreeSet;

use common::Ns;
use mesh_sys::rtnl::{
    Blocking, Family, LinkChange, Nexthop, NexthopKind, Route, RouteFilter, RouteKind, RtnlError, VethPeer,
    VethSpec,
};
use nix::errno::Errno;

const OURS: RouteFilter = RouteFilter { family: None, table: None, protocol: Some(118) };

/// Two devices that are up and have a carrier.
fn devices(rtnl: &mut Blocking) -> [u32; 2] {
    [("v0", "w0"), ("v1", "w1")].map(|(near, far)| {
        let peer = VethPeer { name: far.into(), mac: None, mtu: None, netns: None };
        let spec = VethSpec { name: near.into(), mac: None, mtu: None, master: None, peer };
        let index = rtnl.create_veth(spec).unwrap();
        let far = rtnl.link(far).unwrap().unwrap().index;
        for end in [far, index] {
            rtnl.set_link(end, LinkChange { up: Some(true), ..LinkChange::default() }).unwrap();
        }
        index
    })
}

fn nexthop(id: u32, kind: NexthopKind) -> Nexthop {
    Nexthop { id, protocol: 118, kind }
}

/// Two members and their group, with ids from `first` on.
fn group(family: Family, first: u32, devices: [u32; 2]) -> [Nexthop; 3] {
    let [one, two] = devices.map(|dev| NexthopKind::Device { family, dev });
    let members = NexthopKind::Group(BTreeSet::from([first, first + 1]));
    [nexthop(first, one), nexthop(first + 1, two), nexthop(first + 2, members)]
}

fn plain(net: &str, dev: u32) -> Route {
    Route { metric: 1, ..Route::dev(net.parse().unwrap(), dev, 118) }
}

fn by(net: &str, id: u32) -> Route {
    Route { metric: 1, mtu: Some(1300), ..Route::by_nexthop(net.parse().unwrap(), id, 118) }
}

#[test]
fn groups_are_made_read_back_used_and_deleted_in_both_families() {
    let ns = Ns::new("group");
    let mut rtnl = ns.rtnl();
    let devices = devices(&mut rtnl);
    for (family, first, net) in [(Family::V4, 100, "10.70.0.0/16"), (Family::V6, 200, "fd70::/16")] {
        let wanted = group(family, first, devices);
        for nexthop in &wanted {
            rtnl.add_nexthop(nexthop.clone()).unwrap();
            rtnl.add_nexthop(nexthop.clone()).unwrap();
        }
        let found = rtnl.nexthops().unwrap();
        assert!(wanted.iter().all(|nexthop| found.contains(nexthop)), "{found:?}");
        let other = Nexthop { protocol: 4, ..wanted[0].clone() };
        let error = rtnl.add_nexthop(other).unwrap_err();
        assert!(matches!(error, RtnlError::Occupied { .. }) && error.is_exists(), "{error}");

        // One route all the while: by a device, by the group, by the other device.
        for route in [plain(net, devices[0]), by(net, first + 2), plain(net, devices[1]), by(net, first + 2)]
        {
            rtnl.replace_route(route.clone()).unwrap();
            let found: Vec<Route> = rtnl.routes(OURS).unwrap().iter().map(Route::normalized).collect();
            assert_eq!(found, [route.normalized()]);
        }
        assert!(!rtnl.del_route(by(net, first)).unwrap(), "deleted a route by another nexthop");
        assert!(rtnl.del_route(by(net, first + 2)).unwrap());
        for nexthop in wanted.iter().rev() {
            assert!(rtnl.del_nexthop(nexthop.id).unwrap());
            assert!(!rtnl.del_nexthop(nexthop.id).unwrap());
        }
    }
    assert_eq!(rtnl.nexthops().unwrap(), []);
}

#[test]
fn a_device_that_goes_down_leaves_its_groups_and_the_last_one_takes_the_routes_along() {
    let ns = Ns::new("down");
    let mut rtnl = ns.rtnl();
    let devices = devices(&mut rtnl);
    for (family, first, net) in [(Family::V4, 100, "10.70.0.0/16"), (Family::V6, 200, "fd70::/16")] {
        for nexthop in group(family, first, devices) {
            rtnl.add_nexthop(nexthop).unwrap();
        }
        rtnl.add_route(by(net, first + 2)).unwrap();
    }
    ns.sh("ip link set v0 down");
    let error = rtnl.add_nexthop(group(Family::V4, 300, devices)[0].clone()).unwrap_err();
    assert_eq!(error.errno(), Some(Errno::ENETDOWN), "{error}");
    let left = [101, 201].map(|member| nexthop(member + 1, NexthopKind::Group(BTreeSet::from([member]))));
    let found = rtnl.nexthops().unwrap();
    assert!(found.len() == 4 && left.iter().all(|group| found.contains(group)), "{found:?}");
    let routes = rtnl.routes(OURS).unwrap();
    assert!(matches!(routes[..], [Route { kind: RouteKind::Nexthop { id: 102, .. }, .. }, _]), "{routes:?}");
    ns.sh("ip link del v1");
    assert_eq!((rtnl.nexthops().unwrap(), rtnl.routes(OURS).unwrap()), (vec![], vec![]));
}

#[test]
fn what_others_make_is_of_another_kind() {
    let ns = Ns::new("others");
    let mut rtnl = ns.rtnl();
    let [v0, _] = devices(&mut rtnl);
    ns.sh("ip addr add 192.0.2.1/24 dev v0; ip nexthop add id 1 via 192.0.2.2 dev v0; ip nexthop add id 2 dev v1");
    ns.sh("ip nexthop add id 3 group 1/2,5; ip nexthop add id 4 blackhole; ip route add 10.71.0.0/16 nhid 1");
    let found = rtnl.nexthops().unwrap();
    let others: Vec<u32> =
        found.iter().filter(|nexthop| nexthop.kind == NexthopKind::Other).map(|nexthop| nexthop.id).collect();
    assert_eq!(others, [1, 3, 4]);
    // The kernel tells device and gateway as well.
    let routes = rtnl.routes(RouteFilter::default()).unwrap();
    let by_nexthop = routes.iter().find(|route| route.dst == "10.71.0.0/16".parse().unwrap()).unwrap();
    let gateway = Some([192, 0, 2, 2].into());
    let dev = Some(v0);
    assert_eq!(by_nexthop.kind, RouteKind::Nexthop { id: 1, prefsrc: None, dev, gateway });
}
