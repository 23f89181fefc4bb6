//! The guard ruleset: what keeps cluster traffic on the mesh's own devices, and forged frames out of the bridge.
//!
//! Two tables, built here as data and put in force by the [keeper](super::keeper):
//!
//! - `inet meshd`: packets of the cluster's ranges pass only between `mesh0`, `meshwg*` and `lo`. What a pod sends
//!   out of the cluster is refused and its sender told. The check on the way out hangs at *postrouting*, not at
//!   output: when a service address is translated in output, the packet is routed again, but rules in output still
//!   see the device of the first route, and would drop what the host sends to a service.
//! - `bridge meshd`: a frame that comes in at a pod's port carries the addresses of that pod, goes to the bridge
//!   itself, and is IPv4, IPv6 or ARP. Nothing goes to all ports. A unicast frame that is on its way from port to
//!   port can then only be one that `br_netfilter` has re-addressed after a translation, and may pass.
//!
//! The static part is all that follows from the ranges and the bridge's address. It is stated in the comment of both
//! tables, with a digest of the rules, so that what is in force can be told from what an older version left. Which
//! pod has which port are the elements of two sets; they come and go without touching the rules.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use mesh_core::api::{BRIDGE, MacAddr};
use mesh_core::host::{Guard, PortGuard};
use mesh_sys::nft::{
    Base, Chain, Cmp, Element, Field, FieldType, Hook, Part, Policy, Reject, Rule, Set, Table, TableFamily,
    TableOptions, Transaction,
};
use mesh_sys::rtnl::Mac;
use sha2::{Digest as _, Sha256};

/// The host's ends of pods' veth pairs.
pub(super) const PORTS: &str = "mv*";

/// Tunnel devices.
pub(super) const LANES: &str = "meshwg*";

/// Set of `port . Ethernet address . IPv4 address`.
pub(super) const PORT4: &str = "port4";

/// Set of `port . Ethernet address . IPv6 address`.
pub(super) const PORT6: &str = "port6";

/// A little before the chains of others: what we drop, they need not see.
const BEFORE_FILTER: i32 = -5;
const MANGLE: i32 = -150;
/// Before `br_netfilter` (0): it sees what the pod sent.
const BRIDGE_DSTNAT: i32 = -300;
const BRIDGE_FILTER: i32 = -200;

/// The bit that tells group addresses from those of one station.
const GROUP_BIT: [u8; 6] = [1, 0, 0, 0, 0, 0];

const ICMP_REDIRECT: u8 = 5;
const ROUTER_ADVERTISEMENT: u8 = 134;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
const ND_REDIRECT: u8 = 137;

/// The type of a frame as it came in, a VLAN tag included: the kernel has taken the tag off by then, and shows it
/// here all the same.
const ETHER_TYPE: Field = Field::Payload { base: Base::Link, offset: 12, len: 2 };

/// `inet meshd`.
pub(super) fn inet() -> Table {
    Table::new(TableFamily::Inet, "meshd")
}

/// `bridge meshd`.
pub(super) fn bridge() -> Table {
    Table::new(TableFamily::Bridge, "meshd")
}

/// A table with all that is in it but for elements.
pub(super) struct Ruleset {
    pub(super) table: Table,
    pub(super) sets: Vec<Set>,
    /// Chains in an order in which every jump leads to one that is there already, each with its rules.
    pub(super) chains: Vec<(Chain, Vec<Named>)>,
}

/// A rule with the comment by which it is known.
pub(super) struct Named {
    pub(super) comment: &'static str,
    pub(super) rule: Rule,
}

fn named(comment: &'static str, rule: Rule) -> Named {
    Named { comment, rule: rule.comment(comment) }
}

/// The static part of both tables.
pub(super) fn rulesets(guard: &Guard) -> [Ruleset; 2] {
    [inet_rules(guard), bridge_rules(guard.bridge_mac)]
}

fn inet_rules(guard: &Guard) -> Ruleset {
    let r = || Rule::new(TableFamily::Inet);
    let not_out = |rule: Rule| rule.oifname_not(BRIDGE).oifname_not(LANES).oifname_not("lo");
    let not_in = |rule: Rule| rule.iifname_not(BRIDGE).iifname_not(LANES).iifname_not("lo");
    let ranges = [IpNet::V4(guard.cluster_ipv4), IpNet::V6(guard.cluster_ipv6)];
    let each = |comment, build: &dyn Fn(IpNet) -> Rule| ranges.map(|net| named(comment, build(net)));

    let mut forward = Vec::new();
    forward.extend(each("from a pod out of the cluster", &|net| {
        not_out(r().saddr(net)).counter().reject(Reject::Prohibited)
    }));
    forward
        .extend(each("to the cluster by a foreign device", &|net| not_out(r().daddr(net)).counter().drop()));
    forward.extend(each("forged cluster source", &|net| not_in(r().saddr(net)).counter().drop()));
    forward.extend(each("to the cluster from outside", &|net| not_in(r().daddr(net)).counter().drop()));

    let mut input = Vec::new();
    input.extend(each("forged cluster source", &|net| not_in(r().saddr(net)).counter().drop()));
    input.extend(each("to a mesh address from outside", &|net| not_in(r().daddr(net)).counter().drop()));
    input.push(named(
        "router advertisement from a pod",
        r().iifname(BRIDGE).eq(Field::Icmp6Type, [ROUTER_ADVERTISEMENT]).counter().drop(),
    ));

    let mut leave = Vec::new();
    leave.extend(each("to the cluster by a foreign device", &|net| not_out(r().daddr(net)).counter().drop()));
    leave.extend(each("cluster source by a foreign device", &|net| not_out(r().saddr(net)).counter().drop()));
    leave.push(named(
        "redirect to a pod",
        r().oifname(BRIDGE).eq(Field::IcmpType, [ICMP_REDIRECT]).counter().drop(),
    ));
    leave.push(named(
        "redirect to a pod",
        r().oifname(BRIDGE).eq(Field::Icmp6Type, [ND_REDIRECT]).counter().drop(),
    ));

    let mss = vec![
        named("segments that fit the tunnel", r().oifname(LANES).clamp_mss()),
        named("segments that fit the tunnel", r().iifname(LANES).clamp_mss()),
    ];

    let filter = |name, hook, priority| Chain::filter(name, hook, priority, Policy::Accept);
    Ruleset {
        table: inet(),
        sets: Vec::new(),
        chains: vec![
            (filter("forward", Hook::Forward, BEFORE_FILTER), forward),
            (filter("input", Hook::Input, BEFORE_FILTER), input),
            (filter("leave", Hook::Postrouting, BEFORE_FILTER), leave),
            (filter("mss", Hook::Forward, MANGLE), mss),
        ],
    }
}

fn bridge_rules(mac: MacAddr) -> Ruleset {
    use Field::{
        ArpSenderIp, ArpSenderMac, EtherDaddr, EtherSaddr, Icmp6Type, Iifname, Ip4Saddr, Ip6Saddr, NdTarget,
    };
    let r = || Rule::new(TableFamily::Bridge);
    let kind = |kind: u16| r().eq(ETHER_TYPE, kind.to_be_bytes());
    let to_all = || r().masked(EtherDaddr, GROUP_BIT, Cmp::Ne, [0; 6]);

    let pod = vec![
        named(
            "past the bridge",
            r().masked(EtherDaddr, GROUP_BIT, Cmp::Eq, [0; 6]).ne(EtherDaddr, mac.0).counter().drop(),
        ),
        named("ARP", kind(0x0806).goto("arp")),
        named("IPv4", kind(0x0800).goto("ipv4")),
        named("IPv6", kind(0x86dd).goto("ipv6")),
        named("neither IP nor ARP", r().counter().drop()),
    ];
    let arp = vec![
        named(
            "its own addresses",
            r().in_set(&[Iifname, EtherSaddr, ArpSenderIp], PORT4)
                .in_set(&[Iifname, ArpSenderMac, ArpSenderIp], PORT4)
                .accept(),
        ),
        named("forged ARP sender", r().counter().drop()),
    ];
    let ipv4 = vec![
        named("its own addresses", r().in_set(&[Iifname, EtherSaddr, Ip4Saddr], PORT4).accept()),
        named("forged IPv4 source", r().counter().drop()),
    ];
    let ipv6 = vec![
        named("router advertisement", r().eq(Icmp6Type, [ROUTER_ADVERTISEMENT]).counter().drop()),
        named("redirect", r().eq(Icmp6Type, [ND_REDIRECT]).counter().drop()),
        named(
            "another's address advertised",
            r().eq(Icmp6Type, [NEIGHBOUR_ADVERTISEMENT])
                .not_in_set(&[Iifname, EtherSaddr, NdTarget], PORT6)
                .counter()
                .drop(),
        ),
        named("its own addresses", r().in_set(&[Iifname, EtherSaddr, Ip6Saddr], PORT6).accept()),
        named("forged IPv6 source", r().counter().drop()),
    ];
    let forward = vec![
        named("from a pod to all ports", to_all().iifname(PORTS).counter().drop()),
        named("to all pods", to_all().oifname(PORTS).counter().drop()),
        named("from a pod to a foreign port", r().iifname(PORTS).oifname_not(PORTS).counter().drop()),
        named("from a foreign port to a pod", r().oifname(PORTS).iifname_not(PORTS).counter().drop()),
    ];
    let filter = |name, hook, priority| Chain::filter(name, hook, priority, Policy::Accept);
    Ruleset {
        table: bridge(),
        sets: vec![
            Set::new(PORT4, [FieldType::Ifname, FieldType::Mac, FieldType::V4]),
            Set::new(PORT6, [FieldType::Ifname, FieldType::Mac, FieldType::V6]),
        ],
        chains: vec![
            (Chain::regular("arp"), arp),
            (Chain::regular("ipv4"), ipv4),
            (Chain::regular("ipv6"), ipv6),
            (Chain::regular("pod"), pod),
            (
                filter("prerouting", Hook::Prerouting, BRIDGE_DSTNAT),
                vec![named("what pods send", r().iifname(PORTS).goto("pod"))],
            ),
            (filter("forward", Hook::Forward, BRIDGE_FILTER), forward),
        ],
    }
}

/// What both tables carry as their comment: the facts behind the static part, and a digest of the rules made of them.
pub(super) fn comment(guard: &Guard) -> String {
    let mut digest = Sha256::new();
    for ruleset in rulesets(guard) {
        digest.update(format!("{} {:?}", ruleset.table, ruleset.sets));
        for (chain, rules) in ruleset.chains {
            digest.update(format!("{chain:?}"));
            for named in rules {
                digest.update(format!("{:?}", named.rule));
            }
        }
    }
    let digest: String = digest.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    format!("hauberk guard {} {} {} {digest}", guard.cluster_ipv4, guard.cluster_ipv6, guard.bridge_mac)
}

/// The static part that a comment tells of, if this version makes the same rules of it.
pub(super) fn from_comment(text: &str) -> Option<Guard> {
    let mut words = text.strip_prefix("hauberk guard ")?.split(' ');
    let guard = Guard {
        cluster_ipv4: words.next()?.parse().ok()?,
        cluster_ipv6: words.next()?.parse().ok()?,
        bridge_mac: words.next()?.parse().ok()?,
        ports: BTreeMap::new(),
    };
    (comment(&guard) == text).then_some(guard)
}

/// Everything anew, in one step: there is no moment without rules.
pub(super) fn rewrite(guard: &Guard) -> Transaction {
    let mut tx = Transaction::new();
    let options = TableOptions { comment: Some(comment(guard)), ..TableOptions::default() };
    for ruleset in rulesets(guard) {
        let table = &ruleset.table;
        tx.delete_table(table).add_table(table, &options);
        for set in &ruleset.sets {
            tx.add_set(table, set);
        }
        for (chain, rules) in &ruleset.chains {
            tx.add_chain(table, chain);
            for named in rules {
                tx.add_rule(table, &chain.name, &named.rule);
            }
        }
    }
    let (v4, v6): (Vec<_>, Vec<_>) = guard.ports.iter().map(|(name, port)| elements(name, port)).unzip();
    tx.add_elements(&bridge(), PORT4, &v4).add_elements(&bridge(), PORT6, &v6);
    tx
}

/// From one set of ports to another, the static part being the same.
pub(super) fn update(from: &BTreeMap<String, PortGuard>, to: &BTreeMap<String, PortGuard>) -> Transaction {
    let mut tx = Transaction::new();
    let differing = |one: &BTreeMap<String, PortGuard>, other: &BTreeMap<String, PortGuard>| {
        let pairs = one.iter().filter(|(name, port)| other.get(*name) != Some(port));
        pairs.map(|(name, port)| elements(name, port)).unzip::<_, _, Vec<_>, Vec<_>>()
    };
    let (gone4, gone6) = differing(from, to);
    let (new4, new6) = differing(to, from);
    let table = bridge();
    tx.delete_elements(&table, PORT4, &gone4).delete_elements(&table, PORT6, &gone6);
    tx.add_elements(&table, PORT4, &new4).add_elements(&table, PORT6, &new6);
    tx
}

fn elements(name: &str, port: &PortGuard) -> (Element, Element) {
    let of = |ip| Element::new(&[Part::Ifname(name.to_owned()), Part::Mac(Mac(port.mac.0)), ip]);
    (of(Part::V4(port.ipv4)), of(Part::V6(port.ipv6)))
}

/// The ports that the elements of both sets tell of; `None` when they do not fit together.
pub(super) fn ports(port4: &[Element], port6: &[Element]) -> Option<BTreeMap<String, PortGuard>> {
    let mut ports = BTreeMap::new();
    for element in port4 {
        let (name, mac, rest) = split(&element.key)?;
        let ipv4 = Ipv4Addr::from(<[u8; 4]>::try_from(rest).ok()?);
        let port = PortGuard { mac, ipv4, ipv6: Ipv6Addr::UNSPECIFIED };
        if ports.insert(name, port).is_some() {
            return None;
        }
    }
    for element in port6 {
        let (name, mac, rest) = split(&element.key)?;
        let port: &mut PortGuard =
            ports.get_mut(&name).filter(|port| port.mac == mac && port.ipv6.is_unspecified())?;
        port.ipv6 = Ipv6Addr::from(<[u8; 16]>::try_from(rest).ok()?);
    }
    ports.values().all(|port| !port.ipv6.is_unspecified()).then_some(ports)
}

/// Name (16 bytes), Ethernet address (6, and 2 of padding), and what follows.
fn split(key: &[u8]) -> Option<(String, MacAddr, &[u8])> {
    let (name, rest) = key.split_at_checked(16)?;
    let (mac, rest) = rest.split_at_checked(8)?;
    let name = name.split(|byte| *byte == 0).next()?;
    Some((String::from_utf8(name.to_vec()).ok()?, MacAddr(*mac.first_chunk()?), rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guard() -> Guard {
        Guard {
            cluster_ipv4: "10.32.0.0/12".parse().unwrap(),
            cluster_ipv6: "fd12:3456:789a::/48".parse().unwrap(),
            bridge_mac: MacAddr([2, 0, 0, 0, 0, 1]),
            ports: BTreeMap::new(),
        }
    }

    fn port(n: u8) -> PortGuard {
        PortGuard {
            mac: MacAddr([2, 0, 0, 0, 1, n]),
            ipv4: Ipv4Addr::new(10, 32, 0, n),
            ipv6: Ipv6Addr::new(0xfd12, 0, 0, 0, 0, 0, 0, u16::from(n)),
        }
    }

    #[test]
    fn the_comment_gives_the_static_part_back_and_fits_a_table() {
        let guard = guard();
        let text = comment(&guard);
        assert!(text.len() <= 254, "{text}");
        assert_eq!(from_comment(&text), Some(guard.clone()));
        // Of another version: other rules, another digest.
        let mut other = text.clone();
        other.replace_range(text.len() - 1.., if text.ends_with('0') { "1" } else { "0" });
        assert_eq!(from_comment(&other), None);
        assert_eq!(from_comment(&text.replace("10.32.0.0/12", "10.32.0.0/13")), None);
        assert_eq!(from_comment("hauberk guard"), None);
        let mut moved = guard;
        moved.bridge_mac = MacAddr([2, 0, 0, 0, 0, 2]);
        assert_ne!(comment(&moved), text);
    }

    #[test]
    fn ports_survive_the_way_through_elements() {
        let wanted: BTreeMap<_, _> = (1..=3).map(|n| (format!("mv00000000000{n}"), port(n))).collect();
        let (v4, v6): (Vec<_>, Vec<_>) = wanted.iter().map(|(name, port)| elements(name, port)).unzip();
        assert_eq!(ports(&v4, &v6), Some(wanted));
    }

    #[test]
    fn elements_that_do_not_fit_together_are_no_ports() {
        let (v4, v6) = elements("mva", &port(1));
        assert_eq!(ports(std::slice::from_ref(&v4), &[]), None, "no IPv6");
        assert_eq!(ports(&[], std::slice::from_ref(&v6)), None, "no IPv4");
        assert_eq!(
            ports(&[v4.clone(), elements("mva", &port(2)).0], std::slice::from_ref(&v6)),
            None,
            "two addresses"
        );
        assert_eq!(ports(&[v4], &[elements("mva", &port(2)).1]), None, "two Ethernet addresses");
        let short = Element { key: vec![1, 2, 3], key_end: None, interval_end: false, value: None };
        assert_eq!(ports(&[short], &[]), None);
    }

    #[test]
    fn an_update_touches_only_what_differs() {
        let had = BTreeMap::from([("mva".to_owned(), port(1)), ("mvb".to_owned(), port(2))]);
        assert!(update(&had, &had).is_empty());
        let mut wanted = had.clone();
        wanted.remove("mvb");
        assert_eq!(update(&had, &wanted).len(), 2, "one element of each set goes");
        wanted.insert("mvc".to_owned(), port(3));
        assert_eq!(update(&had, &wanted).len(), 4);
    }
}
