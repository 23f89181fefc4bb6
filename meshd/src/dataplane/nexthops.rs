//! Nexthop groups of our protocol number: what routes over several devices go by.
//!
//! A [`Spread`] is what a group is for: devices, and what the routes by it have in common. It has a group and
//! members of its own, since routes with different MTUs by one nexthop get each other's from the kernel. A group is
//! never changed: routes move from one to another, and what no route goes by is deleted.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::ops::RangeInclusive;

use mesh_core::host::ROUTE_PROTOCOL;
use mesh_sys::rtnl::{Blocking, Family, Link, Nexthop, NexthopKind, Route, RouteKind, RtnlError};

use super::routes;

/// Ids that we take, those of others left out: away from the first ones, which the kernel and people give out, and
/// from those of routing daemons (FRR: below 600,000,000).
const IDS: RangeInclusive<u32> = 0x6862_0000..=0x6862_ffff;

/// What a group of nexthops is for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Spread {
    pub(super) family: Family,
    /// Indices of the devices.
    pub(super) devices: BTreeSet<u32>,
    /// Source address of the routes.
    pub(super) source: Option<IpAddr>,
    /// MTU of the routes in bytes.
    pub(super) mtu: Option<u32>,
}

/// The groups that are as we make them, by id, with what they are for. A group without routes is for nothing.
pub(super) fn spreads(nexthops: &[Nexthop], routes: &[Route]) -> BTreeMap<u32, Spread> {
    let by_id: BTreeMap<u32, &Nexthop> = nexthops.iter().map(|nexthop| (nexthop.id, nexthop)).collect();
    let mut memberships: BTreeMap<u32, usize> = BTreeMap::new();
    for nexthop in nexthops {
        if let NexthopKind::Group(members) = &nexthop.kind {
            members.iter().for_each(|member| *memberships.entry(*member).or_default() += 1);
        }
    }
    let mut users: BTreeMap<u32, (Option<IpAddr>, Option<u32>)> = BTreeMap::new();
    let mut mixed = BTreeSet::new();
    for route in routes {
        if let RouteKind::Nexthop { id, prefsrc, .. } = &route.kind {
            let first = users.entry(*id).or_insert((*prefsrc, route.mtu));
            if *first != (*prefsrc, route.mtu) {
                mixed.insert(*id);
            }
        }
    }
    // A member that is in two groups, or has a route of its own, gives each the MTU of the other.
    let device = |member: &u32| {
        let nexthop = by_id.get(member)?;
        let alone = memberships.get(member) == Some(&1) && !users.contains_key(member);
        match &nexthop.kind {
            NexthopKind::Device { family, dev } if is_ours(nexthop) && alone => Some((*family, *dev)),
            NexthopKind::Device { .. } | NexthopKind::Group(_) | NexthopKind::Other => None,
        }
    };
    let spread = |group: &Nexthop| {
        let NexthopKind::Group(members) = &group.kind else { return None };
        let (source, mtu) = *users.get(&group.id).filter(|_| is_ours(group) && !mixed.contains(&group.id))?;
        let found: Vec<(Family, u32)> = members.iter().map(device).collect::<Option<_>>()?;
        let (family, _) = *found.first()?;
        let devices: BTreeSet<u32> = found.iter().map(|(_, dev)| *dev).collect();
        let plain = devices.len() == found.len() && found.iter().all(|(other, _)| *other == family);
        plain.then_some((group.id, Spread { family, devices, source, mtu }))
    };
    nexthops.iter().filter_map(spread).collect()
}

/// Nexthops of ours by which nothing goes, groups first.
pub(super) fn unused(nexthops: &[Nexthop], routes: &[Route]) -> Vec<u32> {
    let by_routes: BTreeSet<u32> = routes
        .iter()
        .filter_map(|route| if let RouteKind::Nexthop { id, .. } = route.kind { Some(id) } else { None })
        .collect();
    let idle = |nexthop: &Nexthop| is_ours(nexthop) && !by_routes.contains(&nexthop.id);
    let (mut unused, mut members, mut others) = (Vec::new(), BTreeSet::<u32>::new(), Vec::new());
    for nexthop in nexthops {
        match &nexthop.kind {
            NexthopKind::Group(_) if idle(nexthop) => unused.push(nexthop.id),
            NexthopKind::Group(of) => members.extend(of),
            NexthopKind::Device { .. } | NexthopKind::Other => others.push(nexthop),
        }
    }
    others.retain(|nexthop| idle(nexthop) && !members.contains(&nexthop.id));
    unused.extend(others.into_iter().map(|nexthop| nexthop.id));
    unused
}

/// Deletes nexthops of ours by which nothing goes. What remains is found by the next look.
///
/// # Errors
/// The kernel cannot be read, or refuses.
pub(super) fn collect(rtnl: &mut Blocking) -> Result<(), RtnlError> {
    let nexthops = rtnl.nexthops()?;
    if !nexthops.iter().any(is_ours) {
        return Ok(());
    }
    for id in unused(&nexthops, &routes::list(rtnl)?) {
        rtnl.del_nexthop(id)?;
    }
    Ok(())
}

fn is_ours(nexthop: &Nexthop) -> bool {
    nexthop.protocol == ROUTE_PROTOCOL
}

/// What the routes of one attempt are made of: the devices as they are now, and groups, made as they are needed.
#[derive(Debug)]
pub(super) struct Ways {
    links: BTreeMap<String, Link>,
    taken: BTreeSet<u32>,
    groups: BTreeMap<Spread, u32>,
}

impl Ways {
    /// Looks at the devices and nexthops; `routes` are all of ours.
    pub(super) fn read(rtnl: &mut Blocking, routes: &[Route]) -> Result<Self, RtnlError> {
        let links = rtnl.links()?.into_iter().map(|link| (link.name.clone(), link)).collect();
        let nexthops = rtnl.nexthops()?;
        let groups = spreads(&nexthops, routes).into_iter().map(|(id, spread)| (spread, id)).collect();
        Ok(Self { links, taken: nexthops.iter().map(|nexthop| nexthop.id).collect(), groups })
    }

    /// A device by its name.
    pub(super) fn link(&self, name: &str) -> Option<&Link> {
        self.links.get(name)
    }

    /// The id of the group for this; it is made if there is none.
    ///
    /// # Errors
    /// The kernel refuses: most likely a device went down.
    pub(super) fn group(&mut self, rtnl: &mut Blocking, spread: &Spread) -> Result<u32, RtnlError> {
        if let Some(id) = self.groups.get(spread) {
            return Ok(*id);
        }
        let family = spread.family;
        let members = spread.devices.iter().map(|dev| NexthopKind::Device { family, dev: *dev });
        let members = members.map(|kind| self.make(rtnl, kind)).collect::<Result<BTreeSet<u32>, _>>()?;
        let id = self.make(rtnl, NexthopKind::Group(members))?;
        self.groups.insert(spread.clone(), id);
        Ok(id)
    }

    fn make(&mut self, rtnl: &mut Blocking, kind: NexthopKind) -> Result<u32, RtnlError> {
        loop {
            let free = IDS.into_iter().find(|id| !self.taken.contains(id));
            // With none left, the kernel says so of the last.
            let id = free.unwrap_or(*IDS.end());
            self.taken.insert(id);
            match rtnl.add_nexthop(Nexthop { id, protocol: ROUTE_PROTOCOL, kind: kind.clone() }) {
                // Somebody took it this moment.
                Err(error) if error.is_exists() && free.is_some() => {}
                made => return made.map(|()| id),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(id: u32, dev: u32) -> Nexthop {
        Nexthop { id, protocol: ROUTE_PROTOCOL, kind: NexthopKind::Device { family: Family::V4, dev } }
    }

    fn group(id: u32, members: &[u32]) -> Nexthop {
        let kind = NexthopKind::Group(members.iter().copied().collect());
        Nexthop { id, protocol: ROUTE_PROTOCOL, kind }
    }

    fn route(n: u8, id: u32, mtu: Option<u32>) -> Route {
        let to = format!("10.32.{n}.0/24").parse().unwrap();
        Route { mtu, ..Route::by_nexthop(to, id, ROUTE_PROTOCOL) }
    }

    fn foreign(nexthop: Nexthop) -> Nexthop {
        Nexthop { protocol: 4, ..nexthop }
    }

    #[test]
    fn a_group_is_what_its_members_and_routes_are() {
        let nexthops = [device(1, 5), device(2, 6), group(3, &[1, 2]), group(4, &[]), device(7, 5)];
        let routes = [route(1, 3, Some(1300)), route(2, 3, Some(1300))];
        let expected = Spread { family: Family::V4, devices: [5, 6].into(), source: None, mtu: Some(1300) };
        assert_eq!(spreads(&nexthops, &routes), [(3, expected)].into());
        assert_eq!(spreads(&nexthops, &[]), [].into(), "for nothing, so far");
    }

    #[test]
    fn what_we_would_not_have_made_is_no_spread() {
        let (a, b) = (device(1, 5), device(2, 6));
        let v6 = Nexthop { kind: NexthopKind::Device { family: Family::V6, dev: 6 }, ..b.clone() };
        let both = route(1, 3, None);
        let pair = group(3, &[1, 2]);
        for (nexthops, routes) in [
            (vec![a.clone(), b.clone(), pair.clone()], vec![both.clone(), route(2, 3, Some(1300))]),
            (vec![a.clone(), b.clone(), pair.clone()], vec![both.clone(), route(2, 1, None)]),
            (vec![a.clone(), b.clone(), pair.clone(), foreign(group(4, &[2]))], vec![both.clone()]),
            (vec![a.clone(), b.clone(), foreign(pair.clone())], vec![both.clone()]),
            (vec![a.clone(), foreign(b.clone()), pair.clone()], vec![both.clone()]),
            (vec![a.clone(), v6, pair.clone()], vec![both.clone()]),
            (vec![a.clone(), device(2, 5), pair.clone()], vec![both.clone()]),
            (vec![a.clone(), pair.clone()], vec![both.clone()]),
        ] {
            assert_eq!(spreads(&nexthops, &routes), [].into(), "{nexthops:?} {routes:?}");
        }
    }

    #[test]
    fn what_nothing_goes_by_is_unused_groups_first() {
        let nexthops = [
            device(1, 5),
            device(2, 6),
            group(3, &[1, 2]),
            device(4, 5),
            device(5, 6),
            group(6, &[4, 5]),
            device(7, 5),
            foreign(group(8, &[7])),
            foreign(device(9, 5)),
            device(10, 5),
            device(11, 5),
        ];
        assert_eq!(unused(&nexthops, &[route(1, 3, None), route(2, 10, None)]), [6, 4, 5, 11]);
        assert_eq!(unused(&nexthops, &[]), [3, 6, 1, 2, 4, 5, 10, 11]);
    }
}
