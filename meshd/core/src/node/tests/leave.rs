//! A node leaves the cluster.

use super::authority::anchored;
use super::scenarios::{SECOND, cluster, meshed};
use super::*;
use crate::api::LeaveStatus;
use crate::leases::QUARANTINE;

fn leave(sim: &mut Sim, at: usize, leave: bool) -> Result<Response, ApiError> {
    let request = sim.request(at, Request::Leave(leave));
    sim.answer(at, request)
}

fn leave_status(sim: &Sim, at: usize) -> Option<LeaveStatus> {
    sim.node(at).status().leave
}

fn gives_up(sim: &mut Sim, at: usize, name: &str) {
    let request = sim.request(at, Request::Detach(AttachmentId::new(name, "eth0").unwrap()));
    assert_eq!(sim.answer(at, request), Ok(Response::Done));
}

/// Addresses in the hands of a host, by another's view.
fn owned(sim: &Sim, at: usize, host: usize) -> RangeSet {
    sim.node(at).view().unwrap().grants().owned_by(&sim.hosts[host].identity.public())
}

fn key_of_lowest(sim: &Sim, hosts: &[usize]) -> usize {
    *hosts.iter().min_by_key(|host| sim.hosts[**host].identity.node_id()).unwrap()
}

#[test]
fn who_leaves_gives_its_addresses_away_by_its_own_word_and_is_no_member_then() {
    let mut sim = cluster(70, 4);
    meshed(&mut sim, 10 * SECOND);
    sim.attach(3, "pod").unwrap();
    let error = leave(&mut sim, 3, true).unwrap_err();
    assert!(error.message.contains("1 pod is attached here, pod"), "{error}");
    assert_eq!(leave_status(&sim, 3), None);
    gives_up(&mut sim, 3, "pod");

    let (ranges, heir) = (owned(&sim, 0, 3), key_of_lowest(&sim, &[0, 1, 2]));
    // One that is away promises nothing: what is given by the leaving node's own word waits for nobody.
    let away = (0..3).find(|host| *host != heir).unwrap();
    sim.kill(away);
    sim.run(30 * SECOND);
    let begun = sim.now;
    leave(&mut sim, 3, true).unwrap();
    let error = sim.attach(3, "late").unwrap_err();
    assert!(error.message.contains("leaving"), "{error}");
    sim.run(SECOND);
    assert!(sim.hosts[3].kernel.bridge.is_none(), "it has no address any more");
    assert!(sim.node(heir).status().peers.iter().any(|peer| peer.leaving));
    assert!(
        matches!(leave_status(&sim, 3), Some(LeaveStatus::Leaving { waiting_for }) if waiting_for.contains("rest"))
    );
    // Nobody may have an address that a pod had a moment ago.
    sim.run(QUARANTINE - 2 * SECOND);
    assert_eq!(owned(&sim, heir, 3), ranges);
    sim.run_until(10 * SECOND, |sim| leave_status(sim, 3) == Some(LeaveStatus::Left)).expect("it has left");
    assert!(sim.now.since(begun) < QUARANTINE + 6 * SECOND);
    sim.run(SECOND);
    assert!(sim.node(3).is_out());
    let usable = sim.node(heir).owned();
    for net in ranges.nets() {
        assert!(usable.covers(net), "{net} is in use by the heir at once");
    }
    let lane = sim.hosts[3].lane.public();
    assert!(!sim.hosts[heir].kernel.lanes["meshwg0"].peers.contains_key(&lane));
    sim.check();

    sim.start(away);
    sim.kill(3);
    meshed(&mut sim, 20 * SECOND);
    sim.run(20 * SECOND);
    assert!(sim.node(heir).view().unwrap().frozen().is_empty());
    sim.check();
}

#[test]
fn in_an_anchored_cluster_the_admin_key_has_the_last_word() {
    let mut sim = anchored(71, 3);
    meshed(&mut sim, 10 * SECOND);
    let ranges = owned(&sim, 0, 2);
    leave(&mut sim, 2, true).unwrap();
    sim.run(QUARANTINE + 5 * SECOND);
    assert_eq!(leave_status(&sim, 2), Some(LeaveStatus::AddressesGiven));
    assert!(!sim.node(2).is_out());
    assert!(owned(&sim, 0, 2).is_empty());
    let heir = key_of_lowest(&sim, &[0, 1]);
    ranges.nets().into_iter().for_each(|net| assert!(sim.node(heir).owned().covers(net)));
    let problems = sim.node(2).status().problems;
    assert!(problems.iter().any(|problem| problem.contains("--admin-key-file")), "{problems:?}");
    // It asks for no new ones, also after a start.
    sim.kill(2);
    sim.start(2);
    sim.run(2 * QUARANTINE);
    assert!(owned(&sim, 0, 2).is_empty());
    assert_eq!(leave_status(&sim, 2), Some(LeaveStatus::AddressesGiven));
    sim.check();

    leave(&mut sim, 2, false).unwrap();
    sim.run_until(10 * SECOND, |sim| sim.node(2).is_ready()).expect("it stays, and has new addresses");
    assert!(sim.attach(2, "pod").is_ok());
    sim.check();
}

#[test]
fn a_leave_goes_on_after_a_crash_at_any_moment() {
    for moment in (0..70).step_by(5) {
        let mut sim = cluster(72, 3);
        meshed(&mut sim, 10 * SECOND);
        sim.attach(0, "pod").unwrap();
        leave(&mut sim, 2, true).unwrap();
        sim.run(SECOND * moment);
        sim.kill(2);
        sim.run(SECOND);
        sim.start(2);
        let left = sim.run_until(QUARANTINE + 15 * SECOND, |sim| {
            sim.check();
            leave_status(sim, 2) == Some(LeaveStatus::Left)
        });
        assert!(left.is_some(), "killed after {moment} s: {:?}", sim.node(2).status().problems);
        sim.kill(2);
        meshed(&mut sim, 20 * SECOND);
    }
}

#[test]
fn nobody_leaves_everything_to_nobody() {
    let mut sim = cluster(73, 3);
    meshed(&mut sim, 10 * SECOND);
    let requests: Vec<_> = (0..3).map(|host| sim.request(host, Request::Leave(true))).collect();
    for (host, request) in requests.into_iter().enumerate() {
        assert_eq!(sim.answer(host, request), Ok(Response::Done));
    }
    sim.run(2 * QUARANTINE);
    (0..3).for_each(|host| {
        let status = leave_status(&sim, host);
        let waits = matches!(&status, Some(LeaveStatus::Leaving { waiting_for }) if waiting_for.contains("another member"));
        assert!(waits, "host{host}: {status:?}");
    });
    leave(&mut sim, 1, false).unwrap();
    sim.run(20 * SECOND);
    assert_eq!(leave_status(&sim, 0), Some(LeaveStatus::Left));
    assert_eq!(leave_status(&sim, 2), Some(LeaveStatus::Left));
    assert!(sim.attach(1, "pod").is_ok());
    sim.check();

    let error = leave(&mut sim, 1, true).unwrap_err();
    assert!(error.message.contains("attached"), "{error}");
    gives_up(&mut sim, 1, "pod");
    let error = leave(&mut sim, 1, true).unwrap_err();
    assert!(error.message.contains("only member"), "{error}");

    let mut sim = cluster(74, 2);
    meshed(&mut sim, 10 * SECOND);
    sim.kill(0);
    sim.run(60 * SECOND);
    let error = leave(&mut sim, 1, true).unwrap_err();
    assert!(error.message.contains("can be reached"), "{error}");
    assert!(sim.attach(1, "pod").is_ok());
}

#[test]
fn a_decision_that_is_not_on_disk_does_not_hold() {
    let mut sim = cluster(75, 3);
    meshed(&mut sim, 10 * SECOND);
    sim.hosts[2].disk_full = true;
    let error = leave(&mut sim, 2, true).unwrap_err();
    assert!(error.message.contains("nothing was changed"), "{error}");
    sim.hosts[2].disk_full = false;
    sim.run(20 * SECOND);
    assert_eq!(leave_status(&sim, 2), None);
    assert!(sim.attach(2, "pod").is_ok());
    sim.check();
}

#[test]
fn a_node_on_which_nothing_could_be_set_up_leaves_too() {
    let mut sim = Sim::new(76);
    sim.range = "10.64.0.0/12".parse().unwrap();
    sim.add(&[], SimSecret::Key(7));
    sim.start(0);
    meshed(&mut sim, SECOND);
    let late = sim.add(&[0], SimSecret::Key(7));
    sim.hosts[late].prefixes = vec![super::addresses::by_gateway("10.70.0.0/16")];
    sim.start(late);
    sim.run(10 * SECOND);
    assert!(sim.node(late).kept_out().is_some() && !owned(&sim, 0, late).is_empty());
    leave(&mut sim, late, true).unwrap();
    sim.run_until(QUARANTINE + 10 * SECOND, |sim| leave_status(sim, late) == Some(LeaveStatus::Left))
        .expect("it has left");
    sim.run(SECOND);
    assert!(owned(&sim, 0, late).is_empty());
}
