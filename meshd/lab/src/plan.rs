//! Which addresses, networks and devices a topology has: pure figures.
//!
//! A *segment* is an Ethernet: number 0 is the public underlay, number k the inside of router k. Routers are numbered
//! from 1 in the order of their names. In every segment the last figure of an address says whose it is: of a host its
//! own (its number, until it is renumbered), of router k, on the segment that it is behind on, 254 - k, and 254 is the
//! gateway.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Context, Result};
use ipnet::{Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

use crate::family::Family;
use crate::topology::{Families, Router, Topology, host_number};

/// Last figure of the gateway of every segment.
pub(crate) const GATEWAY: u8 = 254;

/// All IPv4 addresses of all segments: for benchmarks (RFC 2544), which no real host has, for carriers, and private.
pub(crate) const RANGES_V4: [Ipv4Net; 3] = [
    Ipv4Net::new_assert(Ipv4Addr::new(198, 18, 0, 0), 16),
    Ipv4Net::new_assert(Ipv4Addr::new(100, 64, 0, 0), 16),
    Ipv4Net::new_assert(Ipv4Addr::new(192, 168, 0, 0), 16),
];

/// All IPv6 addresses of all segments.
pub(crate) const RANGE_V6: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::new(0xfd00, 0x18, 0, 0, 0, 0, 0, 0), 48);

/// The number of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct Segment(pub(crate) u8);

impl Segment {
    pub(crate) const PUBLIC: Self = Self(0);

    /// The bridge that it is, in the switch.
    pub(crate) fn bridge(self) -> String {
        match self {
            Self::PUBLIC => "underlay".to_owned(),
            Self(number) => format!("lan{number}"),
        }
    }
}

/// A place on the way of packets where those of one host to another can be told from all others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Passage {
    /// The segment.
    pub(crate) segment: Segment,
    /// The port by which they come in.
    pub(crate) port: String,
    /// What they have in common there, one expression of nftables each.
    pub(crate) matches: Vec<String>,
}

/// Topology and present addresses.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan<'a> {
    pub(crate) topology: &'a Topology,
    /// The last figures of the hosts' addresses, by their numbers.
    pub(crate) figures: &'a BTreeMap<u8, u8>,
}

impl<'a> Plan<'a> {
    /// The routers in the order of their numbers.
    pub(crate) fn routers(self) -> impl Iterator<Item = (u8, &'a str, &'a Router)> {
        (1..).zip(&self.topology.routers).map(|(number, (name, router))| (number, name.as_str(), router))
    }

    pub(crate) fn router(self, number: u8) -> &'a Router {
        let mut routers = self.routers();
        routers
            .find(|(of, _, _)| *of == number)
            .map_or_else(|| unreachable!("no router {number}"), |found| found.2)
    }

    pub(crate) fn router_number(self, name: &str) -> Result<u8> {
        let known = || self.topology.routers.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
        let found = self.routers().find(|(_, of, _)| *of == name).map(|(number, _, _)| number);
        found.with_context(|| format!("no router {name:?}; there are: {}", known()))
    }

    fn segment_behind(self, router: Option<&str>) -> Segment {
        let number = router.and_then(|router| self.router_number(router).ok());
        number.map_or(Segment::PUBLIC, Segment)
    }

    /// Where a host is.
    pub(crate) fn segment_of(self, host: u8) -> Segment {
        let place = self.topology.hosts.get(&format!("h{host}"));
        self.segment_behind(place.and_then(|place| place.behind.as_deref()))
    }

    /// The segment that a router is behind on.
    pub(crate) fn above(self, router: u8) -> Segment {
        self.segment_behind(self.router(router).behind.as_deref())
    }

    /// The routers between a segment and the public underlay, the nearest first.
    pub(crate) fn way_up(self, segment: Segment) -> Vec<u8> {
        let mut way = Vec::new();
        let mut at = segment;
        while at != Segment::PUBLIC {
            way.push(at.0);
            at = self.above(at.0);
        }
        way
    }

    /// The IPv4 network of a segment. Addresses behind a translating router are private ones, or, where other routers
    /// are behind it, those that RFC 6598 has for carriers.
    pub(crate) fn net_v4(self, segment: Segment) -> Ipv4Net {
        let Segment(number) = segment;
        let carrier = || self.routers().any(|(router, _, _)| self.above(router) == segment);
        let base = match segment {
            Segment::PUBLIC => Ipv4Addr::new(198, 18, 0, 0),
            _ if self.router(number).nat.is_none() => Ipv4Addr::new(198, 18, number, 0),
            _ if carrier() => Ipv4Addr::new(100, 64, number, 0),
            _ => Ipv4Addr::new(192, 168, number, 0),
        };
        Ipv4Net::new_assert(base, 24)
    }

    /// The IPv6 network of a segment, if it has one.
    pub(crate) fn net_v6(self, segment: Segment) -> Option<Ipv6Net> {
        let there_is = segment == Segment::PUBLIC || self.router(segment.0).has_ipv6();
        let base = Ipv6Addr::new(0xfd00, 0x18, 0, segment.0.into(), 0, 0, 0, 0);
        there_is.then(|| Ipv6Net::new_assert(base, 64))
    }

    /// The address with a last figure in a segment.
    pub(crate) fn address(self, segment: Segment, figure: u8, family: Family) -> Option<IpAddr> {
        match family {
            Family::V4 => {
                let [a, b, c, _] = self.net_v4(segment).addr().octets();
                Some(Ipv4Addr::new(a, b, c, figure).into())
            }
            Family::V6 => {
                let net = self.net_v6(segment)?.addr().to_bits();
                Some(Ipv6Addr::from_bits(net | u128::from(figure)).into())
            }
        }
    }

    /// The address of a host's `eth0`, if it has one of that family.
    pub(crate) fn host_address(self, host: u8, family: Family) -> Option<IpAddr> {
        let families =
            self.topology.hosts.get(&format!("h{host}")).map_or(Families::Both, |place| place.families);
        let wanted = match families {
            Families::Both => true,
            Families::Ipv4 => family == Family::V4,
            Families::Ipv6 => family == Family::V6,
        };
        let figure = self.figures.get(&host).copied().unwrap_or(host);
        wanted.then(|| self.address(self.segment_of(host), figure, family)).flatten()
    }

    /// The outer address of a router.
    pub(crate) fn router_address(self, router: u8, family: Family) -> Option<IpAddr> {
        self.address(self.above(router), GATEWAY - router, family)
    }

    /// The address by which `to` is seen from the place of `from`: its own, or that of the last router in between
    /// that translates.
    fn seen(self, from: u8, to: u8, family: Family) -> Option<IpAddr> {
        self.host_address(from, family)?;
        let mut address = self.host_address(to, family)?;
        let near = self.way_up(self.segment_of(from));
        for router in self.way_up(self.segment_of(to)) {
            if near.contains(&router) {
                break;
            }
            if family == Family::V4 && self.router(router).nat.is_some() {
                address = self.router_address(router, family)?;
            }
        }
        Some(address)
    }

    /// Those of `to`'s addresses by which `from` sees it and nobody else; `None` when one is shared.
    fn seen_alone(self, from: u8, to: u8) -> Option<Vec<(Family, IpAddr)>> {
        let mut alone = Vec::new();
        for family in Family::BOTH {
            let Some(address) = self.seen(from, to, family) else { continue };
            let others = self.figures.keys().filter(|other| **other != from && **other != to);
            if others.into_iter().any(|other| self.seen(from, *other, family) == Some(address)) {
                return None;
            }
            alone.push((family, address));
        }
        Some(alone)
    }

    /// Where packets from one host to another can be told from all others.
    ///
    /// # Errors
    /// When both hosts share the address of a translating router with others.
    pub(crate) fn passage(self, from: u8, to: u8) -> Result<Passage> {
        let (near, far) = (self.segment_of(from), self.segment_of(to));
        let word = |family| if family == Family::V4 { "ip" } else { "ip6" };
        if near == far {
            let matches = vec![format!("ether daddr {}", host_mac(to))];
            return Ok(Passage { segment: near, port: host_port(from), matches });
        }
        if let Some(seen) = self.seen_alone(from, to) {
            let matches = seen.iter().map(|(family, address)| format!("{} daddr {address}", word(*family)));
            return Ok(Passage { segment: near, port: host_port(from), matches: matches.collect() });
        }
        let seen = self.seen_alone(to, from).filter(|_| far != Segment::PUBLIC).with_context(|| {
            format!(
                "h{from} and h{to} each share the address of a NAT with other hosts: nowhere on the way can their \
                 packets be told from those of the others"
            )
        })?;
        let mac = host_mac(to);
        let matches = seen
            .iter()
            .map(|(family, address)| format!("ether daddr {mac} {} saddr {address}", word(*family)));
        Ok(Passage { segment: far, port: inner_port(far.0), matches: matches.collect() })
    }

    /// A last figure that no host and no router has, the highest first: hosts to come take the low ones.
    pub(crate) fn free_figure(self) -> Option<u8> {
        let routers = u8::try_from(self.topology.routers.len()).unwrap_or(GATEWAY);
        (1..GATEWAY.saturating_sub(routers)).rev().find(|figure| self.is_free(*figure))
    }

    /// Whether a last figure is nobody's.
    pub(crate) fn is_free(self, figure: u8) -> bool {
        let routers = self.topology.routers.len();
        let router = usize::from(GATEWAY.saturating_sub(figure)) <= routers;
        !router && self.figures.values().all(|taken| *taken != figure)
    }

    /// The addresses that all of `hosts` hosts can be told to join by: those of the first host on the public underlay
    /// with which each has a family in common; of IPv6 only if one needs it.
    pub(crate) fn join_addresses(self, hosts: u8) -> Option<Vec<IpAddr>> {
        let has = |host: u8, family| self.host_address(host, family).is_some();
        let meet =
            |one: u8, other: u8| Family::BOTH.iter().any(|family| has(one, *family) && has(other, *family));
        let everybody_calls = |host: &u8| {
            self.segment_of(*host) == Segment::PUBLIC && (1..=hosts).all(|other| meet(*host, other))
        };
        let host = (1..=hosts).find(everybody_calls)?;
        let needed = |family: &Family| match family {
            Family::V4 => true,
            Family::V6 => (1..=hosts).any(|other| !has(other, Family::V4)),
        };
        let families = Family::BOTH.into_iter().filter(needed);
        Some(families.filter_map(|family| self.host_address(host, family)).collect())
    }
}

/// The name of a host's port in the switch.
pub(crate) fn host_port(host: u8) -> String {
    format!("port{host}")
}

/// The name of a router's inner port in the switch.
pub(crate) fn inner_port(router: u8) -> String {
    format!("r{router}lan")
}

/// The name of a router's outer port in the switch.
pub(crate) fn outer_port(router: u8) -> String {
    format!("r{router}wan")
}

/// The hardware address of a host's `eth0`: locally administered, and the same in every lab.
pub(crate) fn host_mac(host: u8) -> String {
    format!("02:00:c6:12:00:{host:02x}")
}

/// The hardware addresses of a router's `wan0` and `lan0`.
pub(crate) fn router_macs(router: u8) -> [String; 2] {
    [1, 2].map(|side| format!("02:00:c6:12:{side:02x}:{router:02x}"))
}

/// The number of a host by its name.
///
/// # Errors
/// When it is no name of a host.
pub(crate) fn number_of(name: &str) -> Result<u8> {
    host_number(name).with_context(|| format!("{name:?} is no host such as h1"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topology::{Behaviour, Nat, Place};

    fn figures(hosts: u8) -> BTreeMap<u8, u8> {
        (1..=hosts).map(|host| (host, host)).collect()
    }

    fn nat() -> Router {
        Router::nat(Nat::new(Behaviour::EndpointIndependent, Behaviour::AddressDependent))
    }

    /// h1 and h2 behind `a`, h3 behind `b` behind `c`, h4 behind the firewall `d`, h5 public.
    fn town() -> Topology {
        Topology::default()
            .router("a", nat())
            .router("b", nat().behind("c"))
            .router("c", nat())
            .router("d", Router::firewall())
            .host("h1", Place::behind("a"))
            .host("h2", Place::behind("a"))
            .host("h3", Place::behind("b"))
            .host("h4", Place::behind("d"))
    }

    #[test]
    fn every_kind_of_place_has_its_kind_of_address() {
        let (topology, figures) = (town(), figures(5));
        let plan = Plan { topology: &topology, figures: &figures };
        let address =
            |host| Family::BOTH.map(|family| plan.host_address(host, family).map(|a| a.to_string()));
        assert_eq!(address(1), [Some("192.168.1.1".into()), None]);
        assert_eq!(address(3), [Some("192.168.2.3".into()), None]);
        assert_eq!(address(4), [Some("198.18.4.4".into()), Some("fd00:18:0:4::4".into())]);
        assert_eq!(address(5), [Some("198.18.0.5".into()), Some("fd00:18::5".into())]);
        let outer = |router| plan.router_address(router, Family::V4).unwrap().to_string();
        assert_eq!([1, 2, 3].map(outer), ["198.18.0.253", "100.64.3.252", "198.18.0.251"]);
        assert_eq!(plan.way_up(Segment(2)), [2, 3]);
        assert_eq!(plan.free_figure(), Some(249));
        assert!(!plan.is_free(250) && !plan.is_free(5) && plan.is_free(6));
    }

    #[test]
    fn packets_are_told_apart_where_no_other_host_has_the_same_address() {
        let (topology, figures) = (town(), figures(5));
        let plan = Plan { topology: &topology, figures: &figures };
        let passage = |from, to| plan.passage(from, to).map(|p| (p.segment.0, p.port, p.matches.join(" | ")));
        let at = |segment: u8, port: &str, matches: &str| (segment, port.to_owned(), matches.to_owned());
        assert_eq!(passage(1, 2).unwrap(), at(1, "port1", "ether daddr 02:00:c6:12:00:02"));
        assert_eq!(passage(1, 5).unwrap(), at(1, "port1", "ip daddr 198.18.0.5"));
        // h1's outside address is h2's as well: the packets are told by their source behind the router.
        assert_eq!(
            passage(5, 1).unwrap(),
            at(1, "r1lan", "ether daddr 02:00:c6:12:00:01 ip saddr 198.18.0.5")
        );
        // h3 is alone behind both of its routers.
        assert_eq!(passage(5, 3).unwrap(), at(0, "port5", "ip daddr 198.18.0.251"));
        assert_eq!(passage(1, 3).unwrap(), at(1, "port1", "ip daddr 198.18.0.251"));
        assert_eq!(passage(4, 5).unwrap(), at(4, "port4", "ip daddr 198.18.0.5 | ip6 daddr fd00:18::5"));
        assert_eq!(passage(5, 4).unwrap(), at(0, "port5", "ip daddr 198.18.4.4 | ip6 daddr fd00:18:0:4::4"));

        let both =
            topology.clone().router("z", nat()).host("h4", Place::behind("z")).host("h5", Place::behind("z"));
        let plan = Plan { topology: &both, figures: &figures };
        let text = plan.passage(1, 4).unwrap_err().to_string();
        assert!(text.contains("h1 and h4"), "{text}");
    }

    #[test]
    fn all_join_by_a_host_that_everybody_can_call() {
        let figures = figures(4);
        let join = |topology: Topology| {
            let addresses = Plan { topology: &topology, figures: &figures }.join_addresses(4);
            addresses.map(|addresses| addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "))
        };
        assert_eq!(join(Topology::default()).unwrap(), "198.18.0.1");
        assert_eq!(join(town()), None, "h4 is behind a firewall, the others behind NATs");
        let mixed = Topology::default().host("h1", Place::ipv6_only()).host("h2", Place::ipv4_only());
        assert_eq!(join(mixed.clone()).unwrap(), "198.18.0.3 fd00:18::3");
        assert_eq!(join(mixed.host("h3", Place::ipv4_only()).host("h4", Place::ipv6_only())), None);
    }
}
