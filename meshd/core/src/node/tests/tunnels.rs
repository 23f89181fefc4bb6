//! Whose a tunnel key is, and what confirms a pre-shared key.

use mesh_keys::PskCheck;

use super::scenarios::{SECOND, cluster, meshed};
use super::*;
use crate::message::Message;

/// The hosts, by node id: who comes earlier leads.
fn by_id(sim: &Sim) -> Vec<usize> {
    let mut hosts: Vec<usize> = (0..sim.hosts.len()).collect();
    hosts.sort_by_key(|host| sim.hosts[*host].identity.public().node_id());
    hosts
}

fn id(sim: &Sim, at: usize) -> NodeId {
    sim.hosts[at].identity.public().node_id()
}

/// Whether `at` has a key for the tunnel to `peer`, and a confirmed one.
fn key(sim: &Sim, at: usize, peer: usize) -> Option<bool> {
    let (_, keys) = sim.node(at).tunnel_keys(&id(sim, peer)).next()?;
    let stored = sim.node(at).pairs.stored();
    let agreed = stored.get(&id(sim, peer))?.iter().find(|agreed| agreed.keys == keys)?;
    Some(agreed.confirmed)
}

/// Whether `at` would send anything of its pods to `peer`.
fn routed(sim: &Sim, at: usize, peer: usize) -> bool {
    let view = sim.node(at).view().unwrap();
    let Some(record) = view.record(&id(sim, peer)) else { return false };
    let routes = &sim.hosts[at].kernel.routes;
    super::super::desired::ranges_of(view, record).iter().any(|range| routes.contains_key(range))
}

/// The check of a message of the agreement.
fn check(message: &Message) -> Option<PskCheck> {
    match message {
        Message::PskProbe { check, .. } | Message::PskAnswer { check, .. } => *check,
        Message::PskOffer { check, .. }
        | Message::PskStaged { check, .. }
        | Message::PskCommit { check, .. } => Some(*check),
        _ => None,
    }
}

/// The same message with another check; an answer always has one.
fn with_check(message: Message, new: PskCheck) -> Message {
    match message {
        Message::PskProbe { keys, epoch, .. } => Message::PskProbe { keys, epoch, check: Some(new) },
        Message::PskAnswer { epoch, .. } => Message::PskAnswer { epoch, check: Some(new) },
        Message::PskOffer { keys, epoch, .. } => Message::PskOffer { keys, epoch, check: new },
        Message::PskStaged { epoch, .. } => Message::PskStaged { epoch, check: new },
        Message::PskCommit { epoch, .. } => Message::PskCommit { epoch, check: new },
        other => other,
    }
}

#[test]
fn who_claims_anothers_tunnel_key_gets_no_tunnel_and_takes_none_away() {
    for (seed, leads, late) in [(70, true, true), (71, true, false), (72, false, true), (73, false, false)] {
        let mut sim = Sim::new(seed);
        for _ in 0..4 {
            sim.add(&[0, 1, 2, 3], SimSecret::Key(7));
        }
        let order = by_id(&sim);
        let (liar, victim) = if leads { (order[0], order[1]) } else { (order[3], order[0]) };
        let stolen = sim.hosts[victim].lane.public();
        if !late {
            sim.hosts[liar].claims = Some(Claim::First(stolen));
        }
        (0..4).for_each(|host| sim.start(host));
        let honest: Vec<usize> = (0..4).filter(|host| *host != liar).collect();
        let whole = |sim: &Sim| honest.iter().all(|a| honest.iter().all(|b| a == b || sim.tunnel(*a, *b)));
        if late {
            meshed(&mut sim, 10 * SECOND);
            sim.kill(liar);
            sim.hosts[liar].claims = Some(Claim::First(stolen));
            sim.start(liar);
        } else {
            assert!(sim.run_until(10 * SECOND, whole).is_some(), "seed {seed}");
        }
        for _ in 0..60 {
            sim.run(SECOND);
            assert!(whole(&sim), "seed {seed}: a tunnel is gone");
        }
        for at in honest {
            let record = sim.node(at).view().unwrap().record(&id(&sim, liar)).unwrap();
            assert_eq!(record.lanes[0].key, stolen, "seed {seed}: the claim is known");
            assert_eq!(key(&sim, at, liar), None, "seed {seed}: host{at} has agreed on a key with the liar");
            assert!(!routed(&sim, at, liar), "seed {seed}: host{at}");
        }
    }
}

#[test]
fn a_second_lane_claims_nothing() {
    let mut sim = cluster(74, 4);
    meshed(&mut sim, 10 * SECOND);
    let order = by_id(&sim);
    let (liar, victim) = (order[0], order[1]);
    sim.kill(liar);
    sim.hosts[liar].claims = Some(Claim::Second(sim.hosts[victim].lane.public()));
    sim.start(liar);
    sim.run(30 * SECOND);
    for a in 0..4 {
        for b in (0..4).filter(|b| *b != a) {
            assert!(sim.tunnel(a, b), "from host{a} to host{b}");
        }
    }
}

#[test]
fn flows_are_told_apart_by_their_ports_where_there_are_several_lanes() {
    let mut sim = cluster(79, 2);
    meshed(&mut sim, 10 * SECOND);
    sim.kill(0);
    sim.hosts[0].claims = Some(Claim::Second(WgSecret::from_bytes(&[79; 32]).public()));
    sim.start(0);
    sim.run(10 * SECOND);
    for path in ["net/ipv4/fib_multipath_hash_policy", "net/ipv6/fib_multipath_hash_policy"] {
        let values = [0, 1].map(|host| sim.hosts[host].kernel.sysctls.get(path).map(String::as_str));
        assert_eq!(values, [Some("1"), None], "{path}");
    }
}

/// What `liar` says is changed by `lie`; nobody may have a confirmed key with it, until it speaks the truth.
fn proves_nothing(seed: u64, leads: bool, lie: impl Fn(usize) -> Lie) {
    let mut sim = cluster(seed, 3);
    let order = by_id(&sim);
    let liar = if leads { order[0] } else { order[2] };
    sim.lie = Some(lie(liar));
    let honest: Vec<usize> = (0..3).filter(|host| *host != liar).collect();
    for _ in 0..40 {
        sim.run(SECOND);
        for at in honest.iter().filter(|at| sim.node(**at).view().is_some()) {
            assert_ne!(key(&sim, *at, liar), Some(true), "seed {seed}: host{at} is sure of the liar's key");
            assert!(!routed(&sim, *at, liar), "seed {seed}: host{at} has a route to the liar");
        }
    }
    assert!(sim.tunnel(honest[0], honest[1]));
    sim.lie = None;
    meshed(&mut sim, 60 * SECOND);
}

#[test]
fn a_check_that_is_echoed_or_made_up_proves_nothing() {
    for (seed, leads) in [(75, true), (76, false)] {
        proves_nothing(seed, leads, |liar| {
            Box::new(move |from, _, message| match check(&message) {
                Some(_) if from == liar => with_check(message, PskCheck::from_bytes([0; 16])),
                _ => message,
            })
        });
        // What the other end said last, and so under the same number.
        proves_nothing(seed, leads, |liar| {
            let mut heard = BTreeMap::new();
            Box::new(move |from, to, message| {
                if to == liar
                    && let Some(check) = check(&message)
                {
                    heard.insert(from, check);
                }
                match heard.get(&to) {
                    Some(echo) if from == liar => with_check(message, *echo),
                    _ if from == liar => with_check(message, PskCheck::from_bytes([1; 16])),
                    _ => message,
                }
            })
        });
    }
}

#[test]
fn what_was_proved_for_one_step_or_number_is_worthless_for_another() {
    // The check of the offer again, for the commit.
    proves_nothing(77, true, |liar| {
        let mut offered = BTreeMap::new();
        Box::new(move |from, to, message| match message {
            Message::PskOffer { check, .. } if from == liar => {
                offered.insert(to, check);
                message
            }
            Message::PskCommit { .. } if from == liar => with_check(message, offered[&to]),
            Message::PskProbe { keys, epoch, .. } if from == liar => {
                Message::PskProbe { keys, epoch, check: None }
            }
            other => other,
        })
    });
    // The right check, and another number.
    proves_nothing(78, true, |liar| {
        Box::new(move |from, _, message| match message {
            Message::PskCommit { epoch, check } if from == liar => {
                Message::PskCommit { epoch: epoch ^ 1, check }
            }
            Message::PskProbe { keys, epoch, .. } if from == liar => {
                Message::PskProbe { keys, epoch, check: None }
            }
            other => other,
        })
    });
    // Staged, of another number.
    proves_nothing(79, false, |liar| {
        Box::new(move |from, _, message| match message {
            Message::PskStaged { epoch, check } if from == liar => {
                Message::PskStaged { epoch: epoch ^ 1, check }
            }
            other => other,
        })
    });
}

#[test]
fn a_bare_yes_to_a_probe_is_a_no() {
    let mut sim = cluster(80, 2);
    meshed(&mut sim, 10 * SECOND);
    sim.run(60 * SECOND);
    let order = by_id(&sim);
    let (leader, follower) = (order[0], order[1]);
    sim.lie = Some(Box::new(move |from, _, message| match message {
        Message::PskAnswer { .. } if from == follower => with_check(message, PskCheck::from_bytes([0; 16])),
        other => other,
    }));
    let agreed = |sim: &Sim| sim.node(leader).pairs.stored()[&id(sim, follower)][0].psk.clone();
    let before = agreed(&sim);
    sim.kill(follower);
    sim.start(follower);
    sim.run(20 * SECOND);
    assert_ne!(agreed(&sim), before, "it is no proof that both have the same: they agree on another");
    assert!(sim.tunnel(leader, follower) && sim.tunnel(follower, leader), "and keep the tunnel meanwhile");
}

/// They come every second, and with thousands of members the state takes long to compute.
#[test]
fn counters_alone_do_not_have_the_state_computed() {
    let mut sim = cluster(82, 2);
    meshed(&mut sim, 10 * SECOND);
    sim.run(60 * SECOND);
    let lane = sim.hosts[1].lane.public();
    let facts = |bytes, age| TunnelFacts {
        endpoint: Some(address(1)),
        handshake_age: Some(Duration::from_secs(age)),
        rx_bytes: bytes,
        tx_bytes: bytes,
    };
    let revision = sim.node(0).revision;
    let now = sim.now;
    let node = sim.hosts[0].node.as_mut().unwrap();
    // It would be computed anew in `handle`; a pause shows that it should be.
    node.next_desired = now + 100 * SECOND;
    for (bytes, age) in [(0, 1), (900, 2), (1800, 189)] {
        node.handle(Input::Tunnels(BTreeMap::from([(lane, facts(bytes, age))])), now);
        assert!(!node.stale, "{bytes} bytes");
    }
    node.handle(Input::Tunnels(BTreeMap::from([(lane, facts(1800, 191))])), now);
    assert!(node.stale, "the last handshake is too old: it may have to be sent to another address");
    assert_eq!(node.revision, revision);
}

#[test]
fn a_tunnel_without_handshakes_has_its_keys_compared() {
    for at in [0, 1] {
        let mut sim = cluster(81, 2);
        meshed(&mut sim, 10 * SECOND);
        sim.run(60 * SECOND);
        let other = 1 - at;
        let (peer, lane) = (id(&sim, other), sim.hosts[other].lane.public());
        sim.hosts[at].node.as_mut().unwrap().lose_key(&peer);
        let tunnels = |sim: &mut Sim, tx_bytes, age: Option<u64>| {
            let facts = TunnelFacts {
                tx_bytes,
                handshake_age: age.map(Duration::from_secs),
                ..TunnelFacts::default()
            };
            sim.input(at, Input::Tunnels(BTreeMap::from([(lane, facts)])));
            sim.run(10 * SECOND);
        };
        // No traffic; traffic with handshakes; a counter that begins anew, without handshakes.
        for (tx, age) in [(500, None), (500, None), (700, Some(20)), (900, Some(189)), (10, None)] {
            tunnels(&mut sim, tx, age);
            assert!(!sim.tunnel(at, other), "host{at} has no reason to compare keys");
        }
        tunnels(&mut sim, 20, None);
        assert!(sim.tunnel(at, other) && sim.tunnel(other, at), "host{at}");
        sim.hosts[at].node.as_mut().unwrap().lose_key(&peer);
        tunnels(&mut sim, 30, Some(191));
        assert!(sim.tunnel(at, other) && sim.tunnel(other, at), "host{at}: the last handshake is too old");
    }
}
