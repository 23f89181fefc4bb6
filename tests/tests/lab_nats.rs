//! Hosts behind NATs and firewalls of every kind, each with each: who reaches whom, directly or through a relay.
//!
//! `cargo xtask test nat-matrix` prints the table.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test fails by panicking, and tells what it measured"
)]

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::{Duration, Instant};

use mesh_lab::Behaviour::{AddressAndPortDependent, AddressDependent, EndpointIndependent};
use mesh_lab::{Behaviour, Host, Lab, Nat, Options, Place, Router, Secret, Topology, poll_until};
use mesh_sim::nat::{Depends, NatKind, meet_directly};
use mesh_tests::{FAMILIES, every, logs, options};

const SECOND: Duration = Duration::from_secs(1);

/// Control port of every host: what goes there goes through a relay. One that is behind a NAT itself has another outside.
const CONTROL_PORT: u16 = 6783;

/// What is between a host and all others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Nothing, and it has both families.
    None,
    /// A NAT; IPv4 only.
    Nat(Behaviour, Behaviour),
    /// A NAT behind a NAT, as carriers have it; IPv4 only.
    TwoNats(Behaviour, Behaviour),
    /// Nothing, and it has IPv6 only.
    V6,
    /// A firewall that lets in only what answers; both families.
    Firewall,
}

const KINDS: [(&str, Kind); 8] = [
    ("none", Kind::None),
    ("endpoint-independent", Kind::Nat(EndpointIndependent, EndpointIndependent)),
    ("the same, filters ports", Kind::Nat(EndpointIndependent, AddressAndPortDependent)),
    ("address-dependent", Kind::Nat(AddressDependent, AddressDependent)),
    ("address and port", Kind::Nat(AddressAndPortDependent, AddressAndPortDependent)),
    ("two levels", Kind::TwoNats(EndpointIndependent, AddressAndPortDependent)),
    ("IPv6 only", Kind::V6),
    ("firewall, out only", Kind::Firewall),
];

/// Two hosts of each kind: h1 and h2 of the first, and so on.
fn topology() -> Topology {
    let hosts = KINDS.iter().flat_map(|kind| [*kind; 2]).enumerate();
    hosts.fold(Topology::default(), |topology, (at, (_, kind))| {
        let (name, router) = (format!("h{}", at + 1), format!("r{}", at + 1));
        let nat = |mapping, filtering| Router::nat(Nat::new(mapping, filtering));
        match kind {
            Kind::None => topology,
            Kind::V6 => topology.host(&name, Place::ipv6_only()),
            Kind::Firewall => {
                topology.router(&router, Router::firewall()).host(&name, Place::behind(&router))
            }
            Kind::Nat(mapping, filtering) => {
                topology.router(&router, nat(mapping, filtering)).host(&name, Place::behind(&router))
            }
            Kind::TwoNats(mapping, filtering) => {
                let carrier = format!("c{}", at + 1);
                let inner = Router { behind: Some(carrier.clone()), ..nat(mapping, filtering) };
                topology
                    .router(&carrier, nat(mapping, filtering))
                    .router(&router, inner)
                    .host(&name, Place::behind(&router))
            }
        }
    })
}

/// Whether two hosts get to each other without a third one, as far as NATs and families go.
fn may_meet(a: Kind, b: Kind) -> bool {
    let depends = |behaviour| match behaviour {
        EndpointIndependent => Depends::Nothing,
        AddressDependent => Depends::Address,
        AddressAndPortDependent => Depends::AddressAndPort,
    };
    // What changes no address maps every port to itself.
    let as_nat = |kind| match kind {
        Kind::None | Kind::V6 => NatKind { mapping: Depends::Nothing, filtering: Depends::Nothing },
        Kind::Firewall => NatKind { mapping: Depends::Nothing, filtering: Depends::AddressAndPort },
        Kind::Nat(mapping, filtering) | Kind::TwoNats(mapping, filtering) => {
            NatKind { mapping: depends(mapping), filtering: depends(filtering) }
        }
    };
    let has_v4 = |kind| kind != Kind::V6;
    let has_v6 = |kind| matches!(kind, Kind::None | Kind::V6 | Kind::Firewall);
    let one_family = (has_v4(a) && has_v4(b)) || (has_v6(a) && has_v6(b));
    one_family && (a == Kind::None || b == Kind::None || meet_directly(as_nat(a), as_nat(b)))
}

/// Whether a host sends to each other one through a relay, by where WireGuard sends to and what the daemon says.
fn relayed(host: &Host) -> BTreeMap<String, bool> {
    let status = host.status().unwrap();
    let peers = status["peers"].as_array().unwrap().iter();
    let way = |peer: &serde_json::Value| {
        let endpoint = peer["tunnel"]["endpoint"].as_str()?;
        let port = endpoint.rsplit(':').next()?.parse::<u16>().ok()?;
        let relayed = port == CONTROL_PORT || peer["path"]["relay"].is_string();
        Some((peer["name"].as_str()?.to_owned(), relayed))
    };
    peers.filter_map(way).collect()
}

/// Every pair, and whether a ping from the one is answered by the other over both families.
fn unanswered(lab: &Lab) -> Vec<(String, String)> {
    let pods: Vec<_> =
        lab.hosts().iter().map(|host| (host.name().to_owned(), host.pod(0).unwrap())).collect();
    std::thread::scope(|scope| {
        let of = pods.iter().map(|(name, from)| {
            let pods = &pods;
            scope.spawn(move || {
                let others = pods.iter().filter(|(other, _)| other != name);
                let silent = others.filter(|(_, to)| {
                    FAMILIES.iter().any(|family| {
                        !from
                            .ping(to.address(*family), every(SECOND / 10, 1))
                            .is_ok_and(|stats| stats.all_answered())
                    })
                });
                silent.map(|(other, _)| (name.clone(), other.clone())).collect::<Vec<_>>()
            })
        });
        let threads: Vec<_> = of.collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    })
}

fn kind_of(host: &str) -> (usize, Kind) {
    let at = (host[1..].parse::<usize>().unwrap() - 1) / 2;
    (at, KINDS[at].1)
}

fn table(ways: &BTreeMap<(String, String), bool>) -> String {
    let mut text = format!("{:<26}", "");
    for (name, _) in KINDS {
        write!(text, "{name:>26}").unwrap();
    }
    for (at, (name, _)) in KINDS.iter().enumerate() {
        write!(text, "\n{name:<26}").unwrap();
        for to in 0..KINDS.len() {
            let all = ways.iter().filter(|((a, b), _)| (kind_of(a).0, kind_of(b).0) == (at, to));
            let relayed: Vec<bool> = all.map(|(_, relayed)| *relayed).collect();
            let cell = match (relayed.contains(&true), relayed.contains(&false)) {
                (true, false) => "relay",
                (false, true) => "direct",
                (true, true) => "either",
                (false, false) => "none",
            };
            write!(text, "{cell:>26}").unwrap();
        }
    }
    text
}

#[test]
fn every_kind_reaches_every_kind_and_takes_a_relay_only_where_it_must() {
    let options = Options {
        nodes: 2 * KINDS.len(),
        pods: 1,
        topology: topology(),
        secret: Secret::Key,
        patience: 60 * SECOND,
        ..options("t-nats")
    };
    let start = Instant::now();
    let lab = Lab::up(options).expect("the lab");
    println!("up after {:?}", start.elapsed());
    let mut silent = Vec::new();
    let met = poll_until("everybody reaches everybody", 120 * SECOND, || {
        silent = unanswered(&lab);
        silent.is_empty()
    });
    assert!(met.is_ok(), "{silent:?}\n{}", logs(&lab));
    println!("every pair is connected after {:?}, over IPv4 and IPv6", start.elapsed());
    let mut ways = BTreeMap::new();
    let mut wrong = Vec::new();
    let settled = poll_until("everybody takes the best way", 60 * SECOND, || {
        // Tunnels that carry nothing are left as they are.
        silent = unanswered(&lab);
        for host in lab.hosts() {
            let of = relayed(&host).into_iter();
            ways.extend(of.map(|(peer, relayed)| ((host.name().to_owned(), peer), relayed)));
        }
        let is_wrong = |((a, b), relayed): &(&(String, String), &bool)| {
            **relayed == may_meet(kind_of(a).1, kind_of(b).1)
        };
        wrong = ways.iter().filter(is_wrong).map(|(pair, relayed)| (pair.clone(), *relayed)).collect();
        wrong.is_empty() && silent.is_empty()
    });
    println!("{}", table(&ways));
    assert!(settled.is_ok(), "still (relayed: true) {wrong:?}, no answer: {silent:?}\n{}", logs(&lab));
    let count = 2 * KINDS.len();
    assert_eq!(ways.len(), count * (count - 1));
    println!("by the best way after {:?}", start.elapsed());
}
