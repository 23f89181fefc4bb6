//! Networks that the host has without the mesh, and whether they claim addresses of the cluster's ranges.
//!
//! A mesh whose range is in use elsewhere cuts the host off from there, or is itself cut by a more specific route.
//! A default route claims nothing in particular: the mesh's own routes are more specific than it. The halves of the
//! address space that some VPN clients install in its place (prefixes of one bit) count as a default route too. A
//! route by which packets end (unreachable, blackhole, prohibit) is no claim when the whole range lies in it, as
//! ours win then and nobody loses anything; inside of the range it is one.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};

use ipnet::{IpNet, Ipv4Net};

/// A prefix of an address or route of the host. The mesh's own are left out.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct HostPrefix {
    /// The prefix; for an address with its host part.
    pub net: IpNet,
    /// Why the host has it.
    pub origin: Origin,
}

/// Where a [`HostPrefix`] comes from.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Origin {
    /// A device has an address in it.
    Address {
        /// The device.
        device: String,
    },
    /// A route leads to it.
    Route {
        /// The device; absent when there are several next hops.
        device: Option<String>,
        /// The next hop; absent when the prefix is on the link.
        gateway: Option<IpAddr>,
    },
    /// A route by which packets end.
    Ending,
}

impl HostPrefix {
    /// Whether the prefix claims an address of `range`.
    pub fn claims(&self, range: IpNet) -> bool {
        let net = self.net.trunc();
        let overlaps = net.contains(&range.addr()) || range.trunc().contains(&net.addr());
        let specific = match &self.origin {
            Origin::Address { .. } | Origin::Route { .. } => net.prefix_len() > DEFAULT_HALVES,
            Origin::Ending => net.prefix_len() > range.prefix_len(),
        };
        overlaps && specific
    }
}

impl fmt::Display for HostPrefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.origin {
            Origin::Address { device } => write!(f, "address {} of device {device}", self.net),
            Origin::Route { device, gateway } => {
                write!(f, "route {}", self.net)?;
                if let Some(gateway) = gateway {
                    write!(f, " via {gateway}")?;
                }
                match device {
                    Some(device) => write!(f, " dev {device}"),
                    None => f.write_str(" with several next hops"),
                }
            }
            Origin::Ending => {
                write!(f, "route {} that is unreachable, a blackhole or prohibited", self.net)
            }
        }
    }
}

/// Says which of `prefixes` claim addresses of the ranges; `None` when none does.
pub fn describe(ranges: [IpNet; 2], prefixes: &[HostPrefix]) -> Option<String> {
    let mut parts = Vec::new();
    for range in ranges {
        let claims: Vec<&HostPrefix> = prefixes.iter().filter(|prefix| prefix.claims(range)).collect();
        if claims.is_empty() {
            continue;
        }
        let named: Vec<String> = claims.iter().take(NAMED).map(ToString::to_string).collect();
        let more = match claims.len().saturating_sub(NAMED) {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        parts.push(format!("range {range} overlaps with this host's {}{more}", named.join(", ")));
    }
    (!parts.is_empty()).then(|| parts.join("; "))
}

/// An IPv4 range as long as `like` from the private address space (RFC 1918) that no prefix of the host claims.
pub fn unclaimed(like: Ipv4Net, prefixes: &[HostPrefix]) -> Option<Ipv4Net> {
    let claimed = |net: &Ipv4Net| prefixes.iter().any(|prefix| prefix.claims(IpNet::V4(*net)));
    PRIVATE
        .into_iter()
        .filter_map(|(network, prefix)| Ipv4Net::new(network, prefix).ok())
        .filter_map(|space| space.subnets(like.prefix_len()).ok())
        .flatten()
        .find(|net| !claimed(net))
}

/// Longest prefix that counts as a default route.
const DEFAULT_HALVES: u8 = 1;

/// Claims that are named, of each range.
const NAMED: usize = 3;

/// Private address space: network and prefix length.
const PRIVATE: [(Ipv4Addr, u8); 3] = [
    (Ipv4Addr::new(10, 0, 0, 0), 8),
    (Ipv4Addr::new(172, 16, 0, 0), 12),
    (Ipv4Addr::new(192, 168, 0, 0), 16),
];

#[cfg(test)]
mod tests {
    use super::*;

    const RANGE: &str = "10.32.0.0/12";

    fn address(net: &str) -> HostPrefix {
        HostPrefix { net: net.parse().unwrap(), origin: Origin::Address { device: "eth1".into() } }
    }

    fn route(net: &str) -> HostPrefix {
        let origin = Origin::Route { device: Some("eth0".into()), gateway: "192.0.2.1".parse().ok() };
        HostPrefix { net: net.parse().unwrap(), origin }
    }

    fn ending(net: &str) -> HostPrefix {
        HostPrefix { net: net.parse().unwrap(), origin: Origin::Ending }
    }

    #[test]
    fn what_shares_an_address_with_the_range_claims_it() {
        let range = RANGE.parse().unwrap();
        for claims in ["10.32.0.0/12", "10.47.255.255/32", "10.33.0.0/16", "10.0.0.0/8", "8.0.0.0/5"] {
            assert!(route(claims).claims(range), "{claims}");
            assert!(address(claims).claims(range), "{claims}");
        }
        for other in ["10.48.0.0/12", "10.31.255.255/32", "172.16.0.0/12", "::/0", "fd00::/8"] {
            assert!(!route(other).claims(range), "{other}");
        }
        let v6 = "fd12:3456:789a::/48".parse().unwrap();
        assert!(route("fd00::/8").claims(v6) && address("fd12:3456:789a:1::7/64").claims(v6));
        assert!(!route("fd12:3456:789b::/48").claims(v6) && !route("2000::/3").claims(v6));
    }

    #[test]
    fn a_default_route_claims_nothing_whole_or_in_halves() {
        let (v4, v6) = (RANGE.parse().unwrap(), "fd12:3456:789a::/48".parse().unwrap());
        assert!(["0.0.0.0/0", "0.0.0.0/1", "128.0.0.0/1"].iter().all(|net| !route(net).claims(v4)));
        assert!(["::/0", "8000::/1"].iter().all(|net| !route(net).claims(v6)));
        assert!(route("0.0.0.0/2").claims(v4), "a quarter is more than a default route");
    }

    #[test]
    fn a_route_by_which_packets_end_claims_only_what_is_inside_of_the_range() {
        let range = RANGE.parse().unwrap();
        assert!(!ending("10.0.0.0/8").claims(range));
        assert!(!ending("10.32.0.0/12").claims(range));
        assert!(ending("10.33.0.0/24").claims(range));
    }

    #[test]
    fn the_words_name_route_device_and_range() {
        let ranges = [RANGE.parse().unwrap(), "fd12:3456:789a::/48".parse().unwrap()];
        let several = HostPrefix {
            net: "10.34.0.0/16".parse().unwrap(),
            origin: Origin::Route { device: None, gateway: None },
        };
        let all = [
            route("10.0.0.0/8"),
            address("10.40.1.5/16"),
            several,
            ending("10.33.0.0/24"),
            route("10.35.0.0/16"),
            route("fd00::/8"),
            route("0.0.0.0/0"),
        ];
        assert_eq!(
            describe(ranges, &all).unwrap(),
            "range 10.32.0.0/12 overlaps with this host's route 10.0.0.0/8 via 192.0.2.1 dev eth0, \
             address 10.40.1.5/16 of device eth1, route 10.34.0.0/16 with several next hops and 2 more; \
             range fd12:3456:789a::/48 overlaps with this host's route fd00::/8 via 192.0.2.1 dev eth0"
        );
        assert_eq!(describe(ranges, &all[6..]), None);
        assert!(ending("10.33.0.0/24").to_string().contains("blackhole"));
    }

    #[test]
    fn a_range_is_proposed_that_nothing_claims() {
        let like = RANGE.parse().unwrap();
        assert_eq!(unclaimed(like, &[]).unwrap().to_string(), "10.0.0.0/12");
        let taken = [route("10.0.0.0/9"), address("10.130.0.1/24"), route("0.0.0.0/0")];
        assert_eq!(unclaimed(like, &taken).unwrap().to_string(), "10.144.0.0/12");
        let wide = [route("10.0.0.0/8")];
        assert_eq!(unclaimed(like, &wide).unwrap().to_string(), "172.16.0.0/12");
        assert_eq!(unclaimed("10.0.0.0/9".parse().unwrap(), &wide), None);
        let all = [route("10.0.0.0/8"), route("172.16.0.0/12"), route("192.168.0.0/16")];
        assert_eq!(unclaimed("10.0.0.0/24".parse().unwrap(), &all), None);
    }
}
