//! A member is removed.

use super::scenarios::{SECOND, cluster, meshed};
use super::*;

fn remove(sim: &mut Sim, at: usize, subject: NodeId) -> Result<Response, ApiError> {
    let request = sim.request(at, Request::Remove(subject));
    sim.answer(at, request)
}

fn id(sim: &Sim, host: usize) -> NodeId {
    sim.hosts[host].identity.node_id()
}

fn frozen(sim: &Sim, at: usize) -> usize {
    sim.node(at).view().unwrap().frozen().len()
}

/// Addresses in the hands of a host, by another's view.
fn owned(sim: &Sim, at: usize, host: usize) -> RangeSet {
    sim.node(at).view().unwrap().grants().owned_by(&sim.hosts[host].identity.public())
}

#[test]
fn a_removed_node_has_no_tunnels_and_sessions_any_more_and_knows_it() {
    let mut sim = cluster(30, 4);
    meshed(&mut sim, 10 * SECOND);
    let gone = id(&sim, 3);
    let ranges = owned(&sim, 0, 3);
    assert!(!ranges.is_empty());
    assert_eq!(remove(&mut sim, 1, gone), Ok(Response::Done));
    sim.run(2 * SECOND);
    let lane = sim.hosts[3].lane.public();
    for host in 0..3 {
        let kernel = &sim.hosts[host].kernel;
        assert!(!kernel.lanes["meshwg0"].peers.contains_key(&lane), "host{host} has no tunnel to it");
        assert_eq!(kernel.lanes["meshwg0"].peers.len(), 2, "and keeps the others");
        assert_eq!(sim.node(host).session_with(&gone), None);
        assert_eq!(frozen(&sim, host), 0, "all have promised, and its addresses are in other hands");
        for net in ranges.nets() {
            assert!(owned(&sim, host, 1).covers(net), "those of the member that removed it");
        }
    }
    assert!(sim.node(3).is_out());
    assert!(sim.hosts[3].kernel.lanes["meshwg0"].peers.is_empty());
    let error = sim.attach(3, "pod").unwrap_err();
    assert!(error.message.contains("removed"), "{error}");
    assert!(sim.node(3).status().problems.iter().any(|problem| problem.contains("removed")));
    assert!(sim.node(3).owned().is_empty());
    sim.check();

    sim.kill(3);
    meshed(&mut sim, 5 * SECOND);
    (0..3).for_each(|host| assert!(sim.attach(host, "pod").is_ok()));
    sim.check();
}

#[test]
fn a_removed_node_does_not_come_back_but_its_host_does_as_a_new_one() {
    let mut sim = cluster(31, 3);
    meshed(&mut sim, 10 * SECOND);
    sim.kill(2);
    let gone = id(&sim, 2);
    remove(&mut sim, 0, gone).unwrap();
    sim.run(SECOND);
    // It was off when it was removed, and hears of it from the first member that it calls.
    sim.start(2);
    sim.run(5 * SECOND);
    assert!(sim.node(2).is_out());
    assert!((0..2).all(|host| sim.node(host).session_with(&gone).is_none()));
    assert!((0..2).all(|host| sim.node(host).view().unwrap().record(&gone).is_none()));
    // Without its state, but with its old key, it is refused.
    sim.kill(2);
    sim.hosts[2].disk.clear();
    sim.hosts[2].seeds = vec![0];
    sim.start(2);
    sim.run(5 * SECOND);
    assert!(sim.node(2).view().is_none());
    assert!(sim.node(2).waiting_for().contains("removed"), "{}", sim.node(2).waiting_for());
    sim.kill(2);
    sim.hosts[2].identity = Identity::from_bytes(&[77; 32]);
    sim.hosts[2].disk.clear();
    sim.start(2);
    meshed(&mut sim, 10 * SECOND);
    assert!(sim.attach(2, "pod").is_ok());
    sim.check();
}

#[test]
fn a_member_that_is_away_keeps_addresses_frozen_until_it_is_back_or_removed() {
    for comes_back in [true, false] {
        let mut sim = cluster(32, 4);
        meshed(&mut sim, 10 * SECOND);
        let (gone, away) = (id(&sim, 3), id(&sim, 2));
        sim.kill(2);
        sim.kill(3);
        remove(&mut sim, 1, gone).unwrap();
        sim.run(60 * SECOND);
        assert_eq!((frozen(&sim, 0), frozen(&sim, 1)), (1, 1));
        let problems = sim.node(0).status().problems;
        assert!(problems.iter().any(|problem| problem.contains(&away.short())), "{problems:?}");
        if comes_back {
            sim.start(2);
            meshed(&mut sim, 60 * SECOND);
        } else {
            remove(&mut sim, 0, away).unwrap();
        }
        sim.run(15 * SECOND);
        assert_eq!((frozen(&sim, 0), frozen(&sim, 1)), (0, 0));
        assert!(owned(&sim, 0, 3).is_empty());
        sim.check();
    }
}

#[test]
fn the_founder_is_removed_and_the_cluster_goes_on() {
    let mut sim = cluster(33, 3);
    meshed(&mut sim, 10 * SECOND);
    sim.attach(1, "before").unwrap();
    let founder = (0..3)
        .find(|host| sim.hosts[*host].identity.public() == sim.node(0).view().unwrap().genesis().founder());
    assert_eq!(founder, Some(0));
    sim.kill(0);
    let gone = id(&sim, 0);
    remove(&mut sim, 2, gone).unwrap();
    meshed(&mut sim, 10 * SECOND);
    let late = sim.add(&[1], SimSecret::Key(7));
    sim.start(late);
    meshed(&mut sim, 10 * SECOND);
    assert!(sim.attach(late, "pod").is_ok());
    assert!(sim.attach(1, "after").is_ok());
    sim.check();
}

#[test]
fn a_removal_that_cannot_be_made_changes_nothing() {
    let mut sim = cluster(34, 2);
    meshed(&mut sim, 10 * SECOND);
    let before = sim.node(0).view().unwrap().clone();
    let error = remove(&mut sim, 0, NodeId::from_bytes([9; 16])).unwrap_err();
    assert!(error.message.contains("no member"), "{error}");
    assert_eq!(sim.node(0).view(), Some(&before));
}

#[test]
fn a_removal_survives_a_crash_of_who_signed_it() {
    let mut sim = cluster(35, 3);
    meshed(&mut sim, 10 * SECOND);
    let gone = id(&sim, 2);
    for host in 1..3 {
        sim.cut(0, host);
    }
    remove(&mut sim, 0, gone).unwrap();
    sim.kill(0);
    sim.heal();
    sim.start(0);
    assert!(sim.node(0).view().unwrap().promises_of(&id(&sim, 0)).is_some(), "and so does its promise");
    sim.run(30 * SECOND);
    assert!(sim.node(2).is_out());
    assert_eq!(frozen(&sim, 1), 0);
    sim.check();
}
