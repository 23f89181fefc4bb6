//! Control sessions that a third member carries.

use super::scenarios::{SECOND, cluster, meshed};
use super::*;
use crate::api::SessionStatus;
use crate::message::Message;

fn id(sim: &Sim, host: usize) -> NodeId {
    sim.hosts[host].identity.node_id()
}

/// Hosts of which the first two have no way to each other, from the start.
pub(super) fn apart(seed: u64, hosts: usize) -> Sim {
    let mut sim = Sim::new(seed);
    let seeds: Vec<usize> = (0..hosts).rev().collect();
    for _ in 0..hosts {
        sim.add(&seeds, SimSecret::Key(7));
    }
    sim.cut(0, 1);
    for host in (0..hosts).rev() {
        sim.start(host);
    }
    sim
}

fn carried_by(sim: &Sim, at: usize, peer: usize) -> Option<String> {
    let peers = sim.node(at).status().peers;
    let peer = peers.into_iter().find(|entry| entry.id == id(sim, peer).to_string())?;
    match peer.session {
        SessionStatus::Carried { through, .. } => Some(through),
        SessionStatus::Up { .. } | SessionStatus::Down { .. } => None,
    }
}

#[test]
fn two_that_have_no_way_to_each_other_agree_on_a_key_through_a_third() {
    for (seed, hosts) in [(80, 3), (81, 4), (82, 9)] {
        let mut sim = apart(seed, hosts);
        let took = sim.run_until(20 * SECOND, |sim| carried_by(sim, 0, 1).is_some()).expect("a session");
        let carrier = carried_by(&sim, 0, 1).unwrap();
        assert!((2..hosts).any(|host| id(&sim, host).to_string() == carrier), "after {took:?}");
        meshed(&mut sim, 10 * SECOND);
        assert!(sim.tunnel(0, 1) && sim.tunnel(1, 0));
        // It is there as long as there is something to say.
        sim.run(60 * SECOND);
        assert_eq!(carried_by(&sim, 0, 1), None);
        for host in 0..hosts {
            assert!(sim.node(host).carrier.is_idle(), "host{host}");
            assert!(sim.hosts[host].carried.is_empty());
        }
        sim.check();
    }
}

#[test]
fn a_tunnel_key_that_changes_is_agreed_on_again_through_a_third() {
    let mut sim = apart(83, 4);
    meshed(&mut sim, 30 * SECOND);
    sim.kill(0);
    sim.hosts[0].lane = WgSecret::generate(&mut ChaCha20Rng::seed_from_u64(5));
    sim.run(SECOND);
    sim.start(0);
    meshed(&mut sim, 60 * SECOND);
    assert!(sim.tunnel(0, 1) && sim.tunnel(1, 0));
}

#[test]
fn when_the_carrier_dies_another_is_asked() {
    let mut sim = apart(84, 5);
    sim.run_until(20 * SECOND, |sim| !sim.node(0).carrier.is_idle()).expect("a call");
    // Those that may carry it die one after the other, as soon as one is asked.
    let first = (2..5).find(|host| !sim.node(*host).carrier.is_idle()).unwrap_or(2);
    sim.kill(first);
    let alive: Vec<usize> = sim.running();
    sim.run_until(120 * SECOND, |sim| sim.tunnel(0, 1) && sim.tunnel(1, 0)).expect("a key");
    sim.run(60 * SECOND);
    alive.into_iter().for_each(|host| assert!(sim.node(host).carrier.is_idle(), "host{host}"));
    sim.check();
}

#[test]
fn what_the_carrier_changes_gives_no_session_with_somebody_else() {
    let mut sim = apart(85, 3);
    let third = id(&sim, 2);
    // The carrier says that itself is who was called, and the other way round.
    sim.lie = Some(Box::new(move |from, _, message| match message {
        Message::Called { link, from: caller } if from == 2 && caller != third => {
            Message::Called { link, from: third }
        }
        other => other,
    }));
    sim.run(60 * SECOND);
    assert_eq!(carried_by(&sim, 0, 1), None);
    assert!(!sim.tunnel(0, 1));
}

/// A session of a host with another one.
fn session(sim: &Sim, at: usize, with: usize) -> SessionId {
    sim.node(at).direct_session_with(&id(sim, with)).expect("a session")
}

/// Host 2 hears a message from host 0.
fn says(sim: &mut Sim, message: &Message) {
    let session = session(sim, 2, 0);
    sim.input(2, Input::SessionFrame { session, frame: message.encode() });
}

/// A number by which host 0 may begin a link with host 2.
fn number(sim: &Sim) -> u32 {
    1_000 + u32::from(id(sim, 0) > id(sim, 2))
}

#[test]
fn a_carrier_takes_no_more_than_the_window() {
    for (pieces, size, holds) in [(8, PIECE, true), (9, PIECE, false), (1, PIECE + 1, false), (1, 0, false)] {
        let mut sim = cluster(86, 3);
        meshed(&mut sim, 10 * SECOND);
        // The one that is called does not say what it has used up, or that it hangs up.
        sim.on_wire = |at, frame| if at == 1 { Vec::new() } else { vec![frame] };
        let (link, to) = (number(&sim), id(&sim, 1));
        says(&mut sim, &Message::Call { link, to });
        assert!(!sim.node(2).carrier.is_idle());
        for _ in 0..pieces {
            says(&mut sim, &Message::Carry { link, bytes: vec![0; size] });
        }
        assert_eq!(!sim.node(2).carrier.is_idle(), holds, "{pieces} pieces of {size}");
    }
}

#[test]
fn calls_that_cannot_be_are_hung_up_on() {
    let mut sim = cluster(87, 3);
    meshed(&mut sim, 10 * SECOND);
    let (link, itself, carrier) = (number(&sim), id(&sim, 0), id(&sim, 2));
    let nobody = Identity::from_bytes(&[9; 32]).node_id();
    let calls = [
        Message::Call { link: link ^ 1, to: id(&sim, 1) },
        Message::Call { link, to: itself },
        Message::Call { link, to: carrier },
        Message::Call { link, to: nobody },
        Message::Called { link, from: itself },
        Message::Called { link, from: carrier },
        Message::Called { link, from: nobody },
        Message::Carry { link, bytes: vec![1] },
        Message::Taken { link, bytes: 7 },
        Message::HangUp { link, reason: String::new() },
    ];
    for call in calls {
        says(&mut sim, &call);
        assert!(sim.node(2).carrier.is_idle(), "{call:?}");
    }
    // What is not proved yet, and what waits for somebody, has a bound for each session.
    sim.on_wire = |_, _| Vec::new();
    let from = id(&sim, 1);
    for number in 0..100 {
        says(&mut sim, &Message::Called { link: link + 1_000 + 2 * number, from });
    }
    assert_eq!(sim.hosts[2].carried.len(), 16);
    sim.run(25 * SECOND);
    assert!(sim.node(2).carrier.is_idle(), "nothing came of it");
    // As many as the session may have, and no more.
    let to = id(&sim, 1);
    for number in 0..100 {
        says(&mut sim, &Message::Call { link: link + 2 * number, to });
    }
    assert_eq!(sim.node(2).carrier.through(), 2 * 64);
    // All of it ends with the session.
    let session = session(&sim, 2, 0);
    sim.input(2, Input::SessionClosed { session, reason: "gone".into() });
    assert!(sim.node(2).carrier.is_idle());
}

#[test]
fn few_calls_wait_for_a_member_that_is_away_and_not_for_long() {
    let mut sim = cluster(88, 3);
    meshed(&mut sim, 10 * SECOND);
    sim.kill(1);
    sim.run(SECOND);
    let (link, to) = (number(&sim), id(&sim, 1));
    for number in 0..20 {
        says(&mut sim, &Message::Call { link: link + 2 * number, to });
    }
    assert_eq!(sim.node(2).carrier.calls_waiting(), 8);
    sim.run(11 * SECOND);
    assert_eq!(sim.node(2).carrier.calls_waiting(), 0);
}
