//! What must hold of a cluster, scenario by scenario.

use std::time::Duration;

use super::*;
use crate::message::{Hello, Message, Refusal, RefusalCode};
use crate::node::sessions::Phase;
use crate::node::writing::{MAX_LATER, MOST_NEWS};
use crate::state::write_of;

pub(super) const SECOND: Duration = Duration::from_secs(1);

pub(super) fn cluster(seed: u64, hosts: usize) -> Sim {
    let mut sim = Sim::new(seed);
    let seeds: Vec<usize> = (0..hosts).collect();
    for _ in 0..hosts {
        sim.add(&seeds, SimSecret::Key(7));
    }
    for host in 0..hosts {
        sim.start(host);
    }
    sim
}

pub(super) fn meshed(sim: &mut Sim, limit: Duration) -> Duration {
    match sim.run_until(limit, Sim::meshed) {
        Some(took) => {
            sim.check();
            took
        }
        None => {
            let nodes: Vec<_> = sim.running().into_iter().map(|host| sim.node(host).status()).collect();
            panic!("no mesh within {limit:?}: {nodes:#?}");
        }
    }
}

#[test]
fn a_node_without_seeds_founds_a_cluster_at_once() {
    let mut sim = Sim::new(1);
    sim.add(&[], SimSecret::Key(1));
    sim.start(0);
    assert!(meshed(&mut sim, SECOND) < SECOND / 10);
    assert!(sim.attach(0, "pod").is_ok());
    sim.check();
}

#[test]
fn five_hosts_started_at_once_with_the_same_command_make_one_cluster() {
    for seed in 0..20 {
        let mut sim = cluster(seed, 5);
        let took = meshed(&mut sim, 10 * SECOND);
        assert!(took < 3 * SECOND, "{took:?}");
    }
}

#[test]
fn a_cut_at_the_start_does_not_make_two_clusters() {
    for seed in 0..20 {
        let mut sim = cluster(seed, 5);
        for a in 0..2 {
            for b in 2..5 {
                sim.cut(a, b);
            }
        }
        sim.run(20 * SECOND);
        assert!(sim.node(1).view().is_some(), "the founder's side works");
        assert!(sim.node(4).view().is_none(), "the other side waits");
        assert!(sim.node(4).waiting_for().contains("198.18.0.1:6783"), "{}", sim.node(4).waiting_for());
        sim.heal();
        meshed(&mut sim, 30 * SECOND);
    }
}

#[test]
fn the_first_host_does_not_found_a_second_cluster_after_losing_its_disk() {
    let mut sim = cluster(3, 3);
    meshed(&mut sim, 10 * SECOND);
    let cluster = sim.node(1).view().unwrap().cluster();
    sim.kill(0);
    let replacement = sim.add(&[], SimSecret::Key(7));
    let fresh = sim.hosts.remove(replacement);
    sim.hosts[0] = Host { seeds: vec![0, 1, 2], ..fresh };
    sim.start(0);
    sim.run(20 * SECOND);
    assert_eq!(sim.node(0).view().unwrap().cluster(), cluster);
}

#[test]
fn a_fourth_host_joins_with_one_address_within_a_second() {
    let mut sim = cluster(4, 3);
    meshed(&mut sim, 10 * SECOND);
    let before = sim.hosts[0].kernel.clone();
    let fourth = sim.add(&[1], SimSecret::Key(7));
    sim.start(fourth);
    assert!(meshed(&mut sim, 5 * SECOND) < SECOND);
    let after = &sim.hosts[0].kernel;
    for (key, peer) in &before.lanes["meshwg0"].peers {
        assert_eq!(
            after.lanes["meshwg0"].peers[key].psk, peer.psk,
            "tunnels that were there are not disturbed"
        );
    }
}

#[test]
fn a_host_that_cannot_keep_what_it_is_told_is_let_in_once_wherever_it_asks() {
    let mut sim = cluster(70, 12);
    meshed(&mut sim, 20 * SECOND);
    let members: Vec<usize> = (0..12).collect();
    let late = sim.add(&members, SimSecret::Key(7));
    sim.hosts[late].disk_full = true;
    sim.start(late);
    sim.run(60 * SECOND);
    sim.hosts[late].disk_full = false;
    meshed(&mut sim, 60 * SECOND);
    let key = sim.hosts[late].identity.public();
    for host in sim.running() {
        let admissions = sim.node(host).view().unwrap().to_delta().admissions;
        let of_it = admissions.iter().filter(|one| one.decode().unwrap().subject == key).count();
        assert!(
            (1..=3).contains(&of_it),
            "host {host} knows {of_it} admissions: those of members that did not know of each other's"
        );
    }
}

/// A founder that nobody calls, and another host in its list, which knows nobody else.
fn called(seed: u64, founder: SimSecret, other: SimSecret, seeds_of_other: &[usize]) -> Sim {
    let mut sim = Sim::new(seed);
    sim.add(&[0, 1], founder);
    sim.add(seeds_of_other, other);
    sim.start(0);
    sim.run(5 * SECOND);
    sim.start(1);
    sim
}

const NOBODY: usize = 77;

#[test]
fn a_host_that_reaches_no_member_joins_when_one_calls_it() {
    let mut sim = called(60, SimSecret::Key(7), SimSecret::Key(7), &[NOBODY]);
    sim.on_wire = |_, frame| {
        if let Ok(Message::Hello(hello)) = Message::decode(&frame)
            && let Hello::Joiner { name, .. } = *hello
        {
            assert_eq!(name, "", "whoever calls may be anybody");
        }
        vec![frame]
    };
    let took = meshed(&mut sim, 60 * SECOND);
    assert!(took < 35 * SECOND, "with the next call: {took:?}");
    assert!(sim.attach(1, "pod").is_ok());
    // Both call at once: it is let in once.
    for seed in 61..81 {
        let mut sim = called(seed, SimSecret::Key(7), SimSecret::Key(7), &[0, 1]);
        sim.run(u32::try_from(seed % 5).unwrap() * SECOND / 20);
        meshed(&mut sim, 5 * SECOND);
        assert_eq!(sim.node(0).view().unwrap().admissions().members().count(), 2);
    }
}

/// Somebody calls host 1, offers to let it in, and says nothing more.
fn call_in_silence(sim: &mut Sim) {
    let session = SessionId(u64::MAX);
    let stranger = Identity::generate(&mut sim.rng).public();
    let (_, channel) = MemoryChannel::pair(stranger, sim.hosts[1].identity.public(), &[1; 32]);
    let secrets = SessionSecrets::derive(&channel).unwrap();
    let remote = address(NOBODY);
    let hello = Message::Hello(Box::new(sim.node(0).hello()));
    sim.input(1, Input::SessionOpened { session, peer: stranger, dialled: None, remote, secrets });
    for message in [hello, Message::JoinOffer { key: true, password: false }] {
        sim.input(1, Input::SessionFrame { session, frame: message.encode() });
    }
    let session = sim.node(1).sessions.get(&session).unwrap();
    assert!(matches!(session.phase, Phase::Joining(_)), "it was told the proof of the key");
}

#[test]
fn whoever_calls_without_the_key_keeps_nobody_from_founding_or_joining() {
    for founds in [true, false] {
        let mut sim = called(90, SimSecret::Key(8), SimSecret::Key(7), &[usize::from(founds), 2]);
        if !founds {
            sim.add(&[], SimSecret::Key(7));
            sim.start(2);
        }
        call_in_silence(&mut sim);
        sim.run(3 * SECOND);
        let own = sim.node(1).view().unwrap().genesis();
        let founder = if founds { 1 } else { 2 };
        assert_eq!(own.founder(), sim.hosts[founder].identity.public());
        sim.run(40 * SECOND);
    }
}

#[test]
fn nobody_who_calls_gets_a_guess_of_the_password_or_the_token() {
    let password = || SimSecret::Password("correct horse battery");
    let mut sim = called(92, password(), password(), &[NOBODY]);
    sim.run(60 * SECOND);
    assert!(sim.node(1).view().is_none());
    let view = sim.node(0).view().unwrap();
    assert!(view.tries_of(&sim.hosts[0].identity.public()).is_none(), "no try was made");
    let token = mesh_keys::JoinToken::generate(&view.cluster(), &mut ChaCha20Rng::seed_from_u64(1));
    let mut sim = called(93, password(), SimSecret::Token(token), &[NOBODY]);
    sim.run(60 * SECOND);
    assert!(sim.node(1).view().is_none());
}

#[test]
fn a_password_joins_and_a_wrong_one_is_told_so_at_both_ends() {
    let mut sim = Sim::new(5);
    sim.add(&[], SimSecret::Password("correct horse battery"));
    sim.add(&[0], SimSecret::Password("correct horse battery"));
    sim.add(&[0], SimSecret::Password("wrong horse battery"));
    sim.start(0);
    sim.start(1);
    meshed(&mut sim, 10 * SECOND);
    let before = sim.hosts[0].kernel.clone();
    sim.start(2);
    sim.run(5 * SECOND);
    assert!(sim.node(2).view().is_none());
    assert!(sim.node(2).waiting_for().contains("password"), "{}", sim.node(2).waiting_for());
    let tries = sim.node(0).view().unwrap().tries_of(&sim.hosts[0].identity.public()).copied();
    assert!(tries.is_some_and(|tries| tries.total > 0), "the sponsor counts the try");
    assert_eq!(sim.hosts[0].kernel, before, "nothing else is disturbed");
}

#[test]
fn a_wrong_key_is_refused_and_does_not_lead_to_a_second_cluster() {
    let mut sim = Sim::new(6);
    sim.add(&[0, 1], SimSecret::Key(1));
    sim.start(0);
    meshed(&mut sim, 10 * SECOND);
    // The second host believes to be the first of its list: it could found a cluster, and must not.
    sim.add(&[1, 0], SimSecret::Key(2));
    sim.start(1);
    sim.run(20 * SECOND);
    assert!(sim.node(1).view().is_none());
    assert!(sim.node(1).waiting_for().contains("key"), "{}", sim.node(1).waiting_for());
}

#[test]
fn members_of_different_clusters_refuse_each_other() {
    let mut sim = Sim::new(7);
    sim.add(&[], SimSecret::Key(1));
    sim.add(&[], SimSecret::Key(1));
    sim.start(0);
    sim.start(1);
    sim.run(SECOND);
    let clusters = [0, 1].map(|host| sim.node(host).view().unwrap().cluster());
    assert_ne!(clusters[0], clusters[1]);
    sim.kill(1);
    sim.hosts[1].seeds = vec![0];
    sim.start(1);
    sim.run(10 * SECOND);
    assert_eq!(clusters, [0, 1].map(|host| sim.node(host).view().unwrap().cluster()));
    assert!(sim.hosts.iter().all(|host| host.kernel.lanes["meshwg0"].peers.is_empty()));
    sim.check();
}

#[test]
fn a_killed_daemon_comes_back_with_identity_addresses_and_pods_and_disturbs_nothing() {
    let mut sim = cluster(8, 3);
    meshed(&mut sim, 10 * SECOND);
    let pods: Vec<_> = (0..3).map(|host| sim.attach(host, &format!("pod{host}")).unwrap()).collect();
    sim.run(SECOND);
    let kernels: Vec<_> = sim.hosts.iter().map(|host| host.kernel.clone()).collect();
    for (host, pod) in pods.iter().enumerate() {
        sim.kill(host);
        sim.run(2 * SECOND);
        sim.start(host);
        sim.run(5 * SECOND);
        meshed(&mut sim, 10 * SECOND);
        for (before, after) in kernels.iter().zip(&sim.hosts) {
            assert_eq!(diff(before, &after.kernel), [], "the kernel is as it was");
        }
        let again = sim.request(host, Request::Get(pod.id.clone()));
        assert_eq!(sim.answer(host, again), Ok(Response::Attachment(Box::new(pod.clone()))));
    }
}

#[test]
fn all_daemons_killed_at_once_come_back_as_the_same_cluster() {
    let mut sim = cluster(9, 4);
    meshed(&mut sim, 10 * SECOND);
    let cluster = sim.node(0).view().unwrap().cluster();
    (0..4).for_each(|host| sim.kill(host));
    sim.run(SECOND);
    (0..4).rev().for_each(|host| sim.start(host));
    meshed(&mut sim, 10 * SECOND);
    assert!((0..4).all(|host| sim.node(host).view().unwrap().cluster() == cluster));
}

#[test]
fn a_partition_heals_and_withdraws_no_tunnel_meanwhile() {
    let mut sim = cluster(10, 6);
    meshed(&mut sim, 10 * SECOND);
    for a in 0..3 {
        for b in 3..6 {
            sim.cut(a, b);
        }
    }
    sim.run(120 * SECOND);
    assert!((0..6).all(|a| (0..6).all(|b| a == b || sim.tunnel(a, b))), "tunnels stay in a partition");
    let late = sim.add(&[4], SimSecret::Key(7));
    sim.start(late);
    sim.run(10 * SECOND);
    sim.heal();
    let took = meshed(&mut sim, 60 * SECOND);
    assert!(took < 45 * SECOND, "{took:?}");
}

#[test]
fn the_death_of_the_founder_does_not_keep_others_out() {
    let mut sim = cluster(11, 3);
    meshed(&mut sim, 10 * SECOND);
    sim.kill(0);
    let fourth = sim.add(&[2], SimSecret::Key(7));
    sim.start(fourth);
    meshed(&mut sim, 10 * SECOND);
    assert!(sim.attach(fourth, "pod").is_ok());
    sim.start(0);
    meshed(&mut sim, 40 * SECOND);
}

#[test]
fn a_full_disk_refuses_the_attach_and_harms_nothing() {
    let mut sim = cluster(12, 2);
    meshed(&mut sim, 10 * SECOND);
    sim.attach(0, "before").unwrap();
    sim.hosts[0].disk_full = true;
    let error = sim.attach(0, "during").unwrap_err();
    assert!(error.message.contains("no space left"), "{error}");
    assert_eq!(sim.hosts[0].kernel.ports.len(), 1);
    sim.hosts[0].disk_full = false;
    sim.attach(0, "after").unwrap();
    sim.check();
}

#[test]
fn a_node_with_an_old_disk_leases_and_grants_nothing() {
    let mut sim = cluster(13, 3);
    meshed(&mut sim, 10 * SECOND);
    let old = sim.hosts[1].disk.clone();
    for _ in 0..2 {
        sim.kill(1);
        sim.start(1);
        sim.run(5 * SECOND);
    }
    meshed(&mut sim, 20 * SECOND);
    sim.kill(1);
    sim.hosts[1].disk = old;
    sim.start(1);
    sim.run(30 * SECOND);
    let error = sim.attach(1, "pod").unwrap_err();
    assert!(error.message.contains("older"), "{error}");
}

#[test]
fn detach_and_gc_release_what_they_should_and_nothing_else() {
    let mut sim = cluster(14, 1);
    meshed(&mut sim, 10 * SECOND);
    let pods: Vec<_> = (0..4).map(|n| sim.attach(0, &format!("pod{n}")).unwrap()).collect();
    let detach = sim.request(0, Request::Detach(pods[0].id.clone()));
    assert_eq!(sim.answer(0, detach), Ok(Response::Done));
    let again = sim.request(0, Request::Detach(pods[0].id.clone()));
    assert_eq!(sim.answer(0, again), Ok(Response::Done));
    let keep = GcRequest { network: "mesh".into(), valid: vec![pods[1].id.clone()] };
    let gc = sim.request(0, Request::Gc(keep));
    let Ok(Response::Gc(report)) = sim.answer(0, gc) else { panic!() };
    assert_eq!(report.released.len(), 2);
    let other = GcRequest { network: "other".into(), valid: Vec::new() };
    let gc = sim.request(0, Request::Gc(other));
    assert_eq!(sim.answer(0, gc), Ok(Response::Gc(GcReport::default())));
    sim.run(SECOND);
    assert_eq!(sim.hosts[0].kernel.ports.keys().collect::<Vec<_>>(), [&pods[1].host_ifname]);
}

#[test]
fn a_node_that_runs_out_of_addresses_gets_more() {
    let mut sim = cluster(15, 2);
    meshed(&mut sim, 10 * SECOND);
    let other = sim.node(1).owned().len();
    let want = other as usize + 10;
    for n in 0..want.min(700) {
        if sim.attach(1, &format!("pod{n}")).is_err() {
            sim.run(3 * SECOND);
            sim.attach(1, &format!("pod{n}")).unwrap();
        }
    }
    sim.check();
}

#[test]
fn the_same_seed_gives_the_same_cluster() {
    let run = |seed| {
        let mut sim = cluster(seed, 4);
        meshed(&mut sim, 10 * SECOND);
        sim.run(30 * SECOND);
        (sim.fingerprint(), sim.hosts.iter().map(|host| host.disk.clone()).collect::<Vec<_>>())
    };
    assert!(run(16) == run(16));
    assert!(run(16) != run(17));
}

#[test]
fn an_idle_cluster_writes_nothing_to_disk() {
    let mut sim = cluster(18, 3);
    meshed(&mut sim, 10 * SECOND);
    sim.run(5 * SECOND);
    let before: Vec<_> = sim.hosts.iter().map(|host| host.wrote).collect();
    sim.run(300 * SECOND);
    assert_eq!(before, sim.hosts.iter().map(|host| host.wrote).collect::<Vec<_>>());
}

#[test]
fn a_view_is_written_as_a_whole_only_when_there_is_much_news() {
    let mut sim = cluster(20, 3);
    meshed(&mut sim, 10 * SECOND);
    sim.run(60 * SECOND);
    let number = |sim: &Sim, file| sim.hosts[0].disk.get(&file).map_or(0, |bytes| write_of(bytes));
    let read = |sim: &Sim| Stored::decode(&sim.hosts[0].disk).unwrap().view.unwrap().fingerprint();
    let (mut before, mut wholes) = (number(&sim, StateFile::Cluster), 0);
    for change in 0..2 * MOST_NEWS as u64 {
        sim.kill(2);
        sim.start(2);
        sim.run(MAX_LATER + SECOND);
        assert_eq!(read(&sim), sim.node(0).view().unwrap().fingerprint(), "change {change}");
        let written = number(&sim, StateFile::Cluster);
        wholes += u64::from(written > before);
        before = written;
    }
    let changes = sim.hosts[0].disk[&StateFile::Changes].len();
    assert!((1..=4).contains(&wholes), "written as a whole {wholes} times");
    assert!(changes < 64 * 1024, "{changes} bytes");
}

#[test]
fn garbage_on_a_session_closes_it_and_the_mesh_heals() {
    let mut sim = cluster(19, 3);
    meshed(&mut sim, 10 * SECOND);
    let (session, _) = sim.node(0).sessions.iter().next().map(|(id, s)| (*id, s.peer)).unwrap();
    let refusal = Message::Refuse(Refusal::new(RefusalCode::Protocol, "x".repeat(10_000))).encode();
    for frame in [vec![].into(), vec![0xff; 64].into(), refusal] {
        sim.input(0, Input::SessionFrame { session, frame });
    }
    sim.run(5 * SECOND);
    meshed(&mut sim, 40 * SECOND);
}
