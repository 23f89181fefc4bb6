//! A member is removed.

use mesh_keys::{SignedAdmission, SignedRemoval};

use super::scenarios::{SECOND, cluster, meshed};
use super::*;
use crate::gossip::catalogue::{Kind, Name};
use crate::gossip::wire;
use crate::message::{Hello, Message, PROTOCOL};

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
fn who_does_not_reach_the_heir_promises_by_way_of_another() {
    let mut sim = cluster(38, 4);
    meshed(&mut sim, 10 * SECOND);
    let gone = id(&sim, 3);
    sim.kill(3);
    sim.cut(0, 2);
    sim.run(60 * SECOND);
    remove(&mut sim, 0, gone).unwrap();
    sim.run(60 * SECOND);
    (0..3).for_each(|host| assert_eq!(frozen(&sim, host), 0, "host{host}"));
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

#[test]
fn a_promise_is_told_only_once_it_is_on_disk() {
    let mut sim = cluster(70, 4);
    meshed(&mut sim, 10 * SECOND);
    let (heir, maker, gone) = (id(&sim, 0), id(&sim, 1), id(&sim, 3));
    sim.hosts[1].disk_full = true;
    remove(&mut sim, 0, gone).unwrap();
    let heard = |sim: &Sim| sim.node(0).view().unwrap().promises_of(&maker).is_some();
    sim.run(2 * SECOND);
    assert!(sim.node(1).view().unwrap().promises_of(&maker).is_some(), "it is made");
    // Nor to those who ask.
    let name = Name::of_node(Kind::PROMISES, &maker);
    let mut question = wire::Writer::default();
    assert!(question.push(&wire::Part::Want(vec![name])));
    for message in [Message::Want { names: vec![name] }, Message::Gossip { payload: question.take() }] {
        let session = sim.node(1).session_with(&heir).unwrap();
        sim.input(1, Input::SessionFrame { session, frame: message.encode() });
    }
    sim.run(2 * SECOND);
    assert!(!heard(&sim) && frozen(&sim, 0) == 1);
    // What it forgets, nobody knows.
    sim.kill(1);
    sim.hosts[1].disk_full = false;
    sim.start(1);
    assert!(sim.node(1).view().unwrap().promises_of(&maker).is_none());
    sim.run(20 * SECOND);
    assert!(heard(&sim) && frozen(&sim, 0) == 0);
}

#[test]
fn who_is_a_member_again_by_a_late_admission_is_met_again() {
    let mut sim = cluster(39, 4);
    meshed(&mut sim, 10 * SECOND);
    let view = sim.node(0).view().unwrap().clone();
    let sponsored = |host: usize| view.admissions().dependants(&sim.hosts[host].identity.public());
    let sponsor = (0..4).find(|host| !sponsored(*host).is_empty()).unwrap();
    let back = (0..4).find(|host| sponsored(sponsor).contains(&id(&sim, *host))).unwrap();
    let [at, by] = (0..4).filter(|host| ![sponsor, back].contains(host)).collect::<Vec<_>>()[..] else {
        panic!("two others")
    };
    let (back, signer) = (sim.hosts[back].identity.clone(), sim.hosts[by].identity.clone());
    let mut keep = sponsored(sponsor);
    keep.retain(|node| *node != back.node_id());
    let (subject, heir) = (sim.hosts[sponsor].identity.public(), signer.public());
    let removal = SignedRemoval::issue(view.cluster(), subject, heir, keep, &signer).unwrap();
    let again =
        SignedAdmission::issue(view.cluster(), back.public(), &signer, mesh_keys::JoinMode::KeyFile, 1 << 40);
    let node = sim.hosts[at].node.as_mut().unwrap();
    let meets = |node: &Node| node.gossip.as_ref().unwrap().is_member(&back.node_id());
    assert!(meets(node));
    let push = |node: &mut Node, delta| {
        node.on_member_message(SessionId(u64::MAX), signer.node_id(), Message::Push { delta });
    };
    push(node, Delta { removals: vec![removal], ..Delta::default() });
    assert!(!meets(node));
    push(node, Delta { admissions: vec![again.unwrap()], ..Delta::default() });
    assert!(node.view().unwrap().admissions().contains(&back.public()));
    assert!(meets(node));
}

#[test]
fn a_greeting_of_who_is_no_member_adds_nothing() {
    for (removed, code) in [(true, "Removed"), (false, "NotMember")] {
        let mut sim = cluster(38, 3);
        meshed(&mut sim, 10 * SECOND);
        let record = sim.node(2).view().unwrap().signed_record(&id(&sim, 2)).unwrap().clone();
        let chain = sim.node(2).view().unwrap().admissions().chain(&sim.hosts[2].identity.public());
        let (zombie, stranger) = (sim.hosts[2].identity.clone(), Identity::from_bytes(&[99; 32]));
        if removed {
            sim.kill(2);
            let gone = zombie.node_id();
            remove(&mut sim, 0, gone).unwrap();
            sim.run(SECOND);
        }
        let before = sim.node(0).view().unwrap().clone();
        let cluster = before.cluster();
        let mode = mesh_keys::JoinMode::KeyFile;
        let sybil =
            SignedAdmission::issue(cluster, Identity::from_bytes(&[98; 32]).public(), &zombie, mode, 1 << 50);
        let chain: Vec<SignedAdmission> = chain.into_iter().chain(sybil).collect();
        let peer = if removed { zombie.public() } else { stranger.public() };
        let (_, ours) = MemoryChannel::pair(peer, sim.hosts[0].identity.public(), &[5; 32]);
        let session = SessionId(1 << 40);
        let secrets = SessionSecrets::derive(&ours).unwrap();
        let hello = Hello::Member { protocol: PROTOCOL, cluster, chain, record: Box::new(record) };
        let node = sim.hosts[0].node.as_mut().unwrap();
        while !matches!(node.poll_output(), Output::Timeout(_)) {}
        node.on_session_opened(session, peer, crate::node::sessions::Way::Accepted(address(2)), secrets);
        node.on_frame(session, &Message::Hello(Box::new(hello)).encode());
        let said: Vec<String> = std::iter::from_fn(|| Some(node.poll_output()))
            .take_while(|output| !matches!(output, Output::Timeout(_)))
            .filter_map(|output| match output {
                Output::Send { frame, .. } => Some(format!("{:?}", Message::decode(&frame).unwrap())),
                _ => None,
            })
            .collect();
        assert!(said.last().unwrap().contains(code), "{said:?}");
        assert_eq!(said.iter().any(|message| message.contains("Push")), removed, "and it is shown why");
        assert_eq!(node.view(), Some(&before));
    }
}
