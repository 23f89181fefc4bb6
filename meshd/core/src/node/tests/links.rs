//! Sessions: how many, how long, and what is said in them.

use super::scenarios::{SECOND, cluster, meshed};
use super::*;
use crate::message::Message;

fn id(sim: &Sim, host: usize) -> NodeId {
    sim.hosts[host].identity.node_id()
}

#[test]
fn a_push_of_more_items_than_allowed_ends_the_session() {
    let mut sim = cluster(60, 2);
    meshed(&mut sim, 10 * SECOND);
    let other = id(&sim, 1);
    let session = sim.node(0).session_with(&other).expect("it was used a moment ago");
    let record = sim.node(0).view().unwrap().signed_record(&other).unwrap().clone();
    let push =
        |items| Message::Push { delta: Delta { records: vec![record.clone(); items], ..Delta::default() } };
    sim.input(0, Input::SessionFrame { session, frame: push(256).encode() });
    assert_eq!(sim.node(0).session_with(&other), Some(session));
    sim.input(0, Input::SessionFrame { session, frame: push(257).encode() });
    assert_eq!(sim.node(0).session_with(&other), None);
}

#[test]
fn a_member_has_few_sessions_at_a_time() {
    let mut sim = cluster(61, 2);
    meshed(&mut sim, 10 * SECOND);
    for _ in 0..12 {
        sim.open(0, address(1));
    }
    sim.run(SECOND);
    for (host, other) in [(0, 1), (1, 0)] {
        let other = id(&sim, other);
        let node = sim.node(host);
        assert!((1..=4).contains(&node.sessions.with(&other).count()));
        assert!(node.session_with(&other).is_some(), "and one of them counts");
    }
    sim.run(120 * SECOND);
    for (host, other) in [(0, 1), (1, 0)] {
        assert_eq!(sim.node(host).sessions.with(&id(&sim, other)).count(), 0, "nothing was to be said");
    }
}

#[test]
fn heirs_are_told_until_they_know_and_then_left_alone() {
    const REMOVED: usize = 24;
    let mut sim = cluster(62, REMOVED + 4);
    meshed(&mut sim, 30 * SECOND);
    // One that is away keeps the addresses of the others frozen; what a member promises is too long for a datagram.
    sim.kill(1);
    for host in 4..REMOVED + 4 {
        sim.kill(host);
        let gone = id(&sim, host);
        let request = sim.request(0, Request::Remove(gone));
        assert_eq!(sim.answer(0, request), Ok(Response::Done));
    }
    sim.run(120 * SECOND);
    let heir = sim.node(0).view().unwrap();
    assert_eq!(heir.frozen().len(), REMOVED);
    for host in [2, 3] {
        let promises = heir.promises_of(&id(&sim, host)).expect("the heir knows what others promise");
        assert_eq!(promises.entries.len(), REMOVED);
        let name = crate::gossip::catalogue::Name::of_node(
            crate::gossip::catalogue::Kind::PROMISES,
            &id(&sim, host),
        );
        assert!(heir.item(&name).unwrap().len() > crate::gossip::wire::MAX_PAYLOAD);
    }
    let before = sim.next_session;
    sim.run(900 * SECOND);
    assert_eq!(sim.next_session, before, "sessions, only to repeat what the heir knows");

    // The last one comes back, and all is settled.
    sim.start(1);
    let settled = sim.run_until(60 * SECOND, |sim| sim.node(0).view().unwrap().frozen().is_empty());
    assert!(settled.is_some(), "{:?}", sim.node(0).view().unwrap().frozen().first());
}
