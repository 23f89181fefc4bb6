//! Disks that were copied or put back.

use mesh_keys::Signed;

use super::super::copies::{HEAR_ALL, Superseded};
use super::scenarios::{SECOND, cluster, meshed};
use super::*;

/// A host that starts with a copy of another's disk, key and all.
fn copy(sim: &mut Sim, of: usize) -> usize {
    let seeds = sim.hosts[of].seeds.clone();
    let copy = sim.add(&seeds, SimSecret::Key(7));
    let (disk, lane, identity) =
        (sim.hosts[of].disk.clone(), sim.hosts[of].lane.clone(), sim.hosts[of].identity.clone());
    let host = &mut sim.hosts[copy];
    (host.disk, host.lane, host.identity) = (disk, lane, identity);
    copy
}

fn has_devices(sim: &Sim, at: usize) -> bool {
    sim.hosts[at].kernel.bridge.is_some() || !sim.hosts[at].kernel.lanes.is_empty()
}

/// Three hosts, and a copy of the second, which has a pod; the copy has not started.
fn copied(seed: u64) -> (Sim, usize) {
    let mut sim = cluster(seed, 3);
    meshed(&mut sim, 10 * SECOND);
    sim.run(3 * SECOND);
    sim.attach(1, "before").unwrap();
    let copy = copy(&mut sim, 1);
    (sim, copy)
}

fn copy_gets_nothing(sim: &mut Sim, copy: usize, seed: u64) {
    sim.start(copy);
    for _ in 0..30 {
        sim.run(SECOND);
        assert!(sim.attach(copy, "pod").is_err(), "seed {seed}");
    }
    assert!(sim.node(copy).is_outdated() && !has_devices(sim, copy), "seed {seed}");
}

#[test]
fn a_copy_of_a_running_node_gets_nothing_and_the_node_goes_on() {
    for seed in 0..8 {
        let (mut sim, copy) = copied(40 + seed);
        copy_gets_nothing(&mut sim, copy, seed);
        assert!(sim.attach(1, "after").is_ok(), "seed {seed}: {:?}", sim.node(1).status().problems);
        let problems = sim.node(1).status().problems;
        assert!(problems.iter().any(|problem| problem.contains("copy of this node's disk")), "{problems:?}");
    }
}

#[test]
fn a_node_that_is_copied_speaks_up_without_room_on_its_disk_and_goes_on_after_a_restart() {
    for seed in 0..8 {
        let (mut sim, copy) = copied(440 + seed);
        sim.hosts[1].disk_full = true;
        copy_gets_nothing(&mut sim, copy, seed);
        // The generation that it spoke up with is not on its disk.
        sim.kill(1);
        sim.hosts[1].disk_full = false;
        sim.start(1);
        sim.run(3 * SECOND);
        assert!(sim.attach(1, "after").is_ok(), "seed {seed}: {:?}", sim.node(1).status().problems);
        sim.run(30 * SECOND);
        assert!(sim.node(copy).is_outdated() && !sim.node(1).is_outdated(), "seed {seed}");
    }
}

#[test]
fn whoever_is_copied_hears_of_it_before_it_can_die() {
    for seed in 0..8 {
        let mut sim = cluster(400 + seed, 9);
        meshed(&mut sim, 20 * SECOND);
        sim.run(20 * SECOND);
        sim.attach(1, "pod").unwrap();
        let copy = copy(&mut sim, 1);
        sim.start(copy);
        let copied = |sim: &Sim| sim.node(copy).standing.confirmed.is_some();
        sim.run_until(10 * SECOND, copied).expect("a member that confirms the copy");
        let spoken_up = |sim: &Sim| sim.node(1).standing.contested;
        sim.run_until(SECOND, spoken_up).unwrap_or_else(|| panic!("seed {seed}: it does not know"));
        sim.run(SECOND);
        sim.kill(1);
        sim.run(20 * SECOND);
        assert!(sim.node(copy).is_outdated() && sim.attach(copy, "pod").is_err(), "seed {seed}");
    }
}

#[test]
fn a_copy_on_one_side_of_a_partition_gives_no_addresses_away() {
    let mut sim = cluster(420, 4);
    meshed(&mut sim, 10 * SECOND);
    sim.run(5 * SECOND);
    let copy = copy(&mut sim, 0);
    let newcomer = sim.add(&[copy], SimSecret::Key(7));
    let here = [2, 3, copy, newcomer];
    for there in [0, 1] {
        here.iter().for_each(|host| sim.cut(*host, there));
    }
    sim.start(copy);
    sim.run(30 * SECOND);
    assert!(sim.node(copy).doubt().is_none(), "it was confirmed on its side");
    let (founder, joiner) = (sim.hosts[0].identity.public(), sim.hosts[newcomer].identity.public());
    let owned = |sim: &Sim, by: usize| sim.node(by).view().unwrap().grants().owned_by(&founder).len();
    let before = owned(&sim, copy);
    sim.start(newcomer);
    sim.run(30 * SECOND);
    assert!(sim.node(copy).view().unwrap().admissions().contains(&joiner));
    assert_eq!(owned(&sim, copy), before, "the copy has admitted a node, and gave it nothing");
    sim.heal();
    sim.run(60 * SECOND);
    assert!(sim.node(copy).is_outdated() && !sim.node(0).is_outdated());
    assert!(sim.node(0).view().unwrap().grants().conflicts().is_empty());
    // Nor does it forget that, when its daemon is started again and reaches nobody.
    sim.kill(copy);
    (0..4).for_each(|host| sim.cut(copy, host));
    sim.cut(copy, newcomer);
    sim.start(copy);
    sim.run(30 * SECOND);
    assert!(sim.node(copy).is_outdated() && !has_devices(&sim, copy) && sim.attach(copy, "pod").is_err());
}

#[test]
fn a_copy_that_starts_again_and_again_does_not_outlive_the_node() {
    let mut sim = cluster(430, 3);
    meshed(&mut sim, 10 * SECOND);
    let copy = copy(&mut sim, 1);
    for round in 0..4 {
        sim.start(copy);
        sim.run(20 * SECOND);
        assert!(sim.node(copy).is_outdated() && sim.attach(copy, "pod").is_err(), "round {round}");
        let problems = sim.node(1).status().problems;
        assert!(!sim.node(1).is_outdated(), "round {round}: {problems:?}");
        sim.attach(1, &format!("pod{round}")).unwrap();
        sim.kill(copy);
        // Its host is rebooted.
        sim.hosts[copy].last_start = None;
    }
}

#[test]
fn a_founder_that_was_rebooted_does_not_wait_for_ever_for_a_member_that_is_no_more() {
    let mut sim = cluster(421, 3);
    meshed(&mut sim, 10 * SECOND);
    sim.kill(2);
    sim.kill(0);
    sim.boot = "next boot";
    sim.hosts[0].kernel = HostState::default();
    sim.start(0);
    sim.run(30 * SECOND);
    let founder = sim.hosts[0].identity.public();
    let owned = |sim: &Sim| sim.node(0).view().unwrap().grants().owned_by(&founder).len();
    let before = owned(&sim);
    let mut join = || {
        let newcomer = sim.add(&[0], SimSecret::Key(7));
        sim.start(newcomer);
        sim.run(10 * SECOND);
        assert!(sim.node(newcomer).view().is_some());
        let owned = owned(&sim);
        sim.run(HEAR_ALL);
        owned
    };
    assert_eq!(join(), before, "not yet");
    assert!(join() < before);
}

#[test]
fn a_copy_that_reaches_nobody_has_no_devices_and_leases_nothing() {
    let mut sim = cluster(50, 3);
    meshed(&mut sim, 10 * SECOND);
    sim.attach(1, "before").unwrap();
    let copy = copy(&mut sim, 1);
    (0..3).for_each(|host| sim.cut(copy, host));
    sim.start(copy);
    sim.run(120 * SECOND);
    assert!(!has_devices(&sim, copy), "its addresses and keys are another's");
    let error = sim.attach(copy, "pod").unwrap_err();
    assert!(error.message.contains("confirmed"), "{error}");
    // Nor when its daemon is started again on that host.
    sim.kill(copy);
    sim.start(copy);
    sim.run(20 * SECOND);
    assert!(sim.attach(copy, "pod").is_err() && !has_devices(&sim, copy));
    sim.heal();
    sim.run(60 * SECOND);
    assert!(sim.attach(copy, "pod").is_err());
    assert!(sim.attach(1, "after").is_ok());
}

#[test]
fn of_two_copies_that_start_together_at_most_one_ever_leases() {
    for seed in 0..8 {
        let mut sim = cluster(60 + seed, 3);
        meshed(&mut sim, 10 * SECOND);
        sim.kill(1);
        let copies = [copy(&mut sim, 1), copy(&mut sim, 1)];
        copies.iter().for_each(|copy| sim.start(*copy));
        let mut leased = [false; 2];
        for n in 0..30 {
            sim.run(SECOND);
            for (copy, leased) in copies.iter().zip(&mut leased) {
                *leased |= sim.attach(*copy, &format!("pod{n}")).is_ok();
            }
        }
        assert!(!(leased[0] && leased[1]), "seed {seed}");
        assert!(copies.iter().any(|copy| sim.node(*copy).is_outdated()), "seed {seed}");
    }
}

#[test]
fn hosts_that_were_all_rebooted_confirm_each_other() {
    let mut sim = cluster(52, 3);
    meshed(&mut sim, 10 * SECOND);
    (0..3).for_each(|host| sim.kill(host));
    sim.boot = "second boot";
    sim.hosts.iter_mut().for_each(|host| host.kernel = HostState::default());
    sim.start(0);
    sim.run(20 * SECOND);
    assert!(!has_devices(&sim, 0), "nobody has confirmed it");
    sim.start(1);
    sim.start(2);
    meshed(&mut sim, 30 * SECOND);
    (0..3).for_each(|host| assert!(sim.attach(host, "pod").is_ok()));
    sim.check();
    // A daemon that is started again in this boot needs nobody.
    (0..3).for_each(|host| sim.kill(host));
    sim.start(2);
    sim.run(SECOND);
    assert!(sim.attach(2, "other").is_ok());
}

#[test]
fn a_disk_that_was_put_back_is_found_out_though_the_host_is_the_same() {
    let mut sim = cluster(53, 3);
    meshed(&mut sim, 10 * SECOND);
    let old = sim.hosts[1].disk.clone();
    for _ in 0..2 {
        sim.kill(1);
        sim.start(1);
        sim.run(5 * SECOND);
    }
    sim.attach(1, "later").unwrap();
    sim.kill(1);
    sim.hosts[1].disk = old;
    sim.start(1);
    for _ in 0..20 {
        sim.run(SECOND);
        assert!(sim.attach(1, "pod").is_err());
    }
    assert!(sim.node(1).is_outdated());
    assert!(has_devices(&sim, 1), "what runs on this host is not cut off");
}

/// A host with pods, as its disk was a moment before the last of them came.
fn host_with_an_older_disk(seed: u64) -> (Sim, BTreeMap<StateFile, Vec<u8>>) {
    let mut sim = cluster(seed, 3);
    meshed(&mut sim, 10 * SECOND);
    sim.attach(1, "before").unwrap();
    let old = sim.hosts[1].disk.clone();
    sim.attach(1, "later").unwrap();
    sim.run(SECOND);
    sim.kill(1);
    (sim, old)
}

#[test]
fn a_disk_of_the_same_start_that_was_put_back_under_running_pods_leases_nothing_until_the_next_boot() {
    let (mut sim, old) = host_with_an_older_disk(55);
    sim.hosts[1].disk = old;
    for starts in 0..4 {
        sim.start(1);
        for _ in 0..15 {
            sim.run(SECOND);
            let error = sim.attach(1, "pod").unwrap_err();
            assert!(error.message.contains("put back to an older state"), "start {starts}: {error}");
        }
        assert!(has_devices(&sim, 1), "what runs on this host is not cut off");
        // It goes on writing, and has more writes than the host remembers by then.
        sim.kill(1);
    }
    // The pods end with the boot; a member confirms it then.
    sim.boot = "second boot";
    sim.hosts[1].kernel = HostState::default();
    sim.start(1);
    sim.run(20 * SECOND);
    sim.attach(1, "pod").unwrap();
}

#[test]
fn one_file_alone_that_was_put_back_is_found_out() {
    let (mut sim, old) = host_with_an_older_disk(56);
    sim.hosts[1].disk.insert(StateFile::Leases, old[&StateFile::Leases].clone());
    sim.start(1);
    sim.run(15 * SECOND);
    assert!(sim.attach(1, "pod").unwrap_err().message.contains("older state"));
}

#[test]
fn a_crash_after_a_write_and_before_the_host_remembers_it_leaves_no_doubt() {
    let mut sim = cluster(57, 3);
    meshed(&mut sim, 10 * SECOND);
    let mark = sim.hosts[1].last_start;
    sim.attach(1, "pod").unwrap();
    assert_ne!(sim.hosts[1].last_start, mark);
    sim.kill(1);
    sim.hosts[1].last_start = mark;
    (0..3).for_each(|other| sim.cut(1, other));
    sim.start(1);
    sim.run(SECOND);
    sim.attach(1, "other").unwrap();
}

#[test]
fn what_a_host_remembers_of_another_node_says_nothing() {
    let (mut sim, old) = host_with_an_older_disk(58);
    let mark = sim.hosts[0].last_start;
    (sim.hosts[1].disk, sim.hosts[1].last_start) = (old, mark);
    sim.start(1);
    sim.run(SECOND);
    assert!(sim.attach(1, "pod").unwrap_err().message.contains("confirmed"));
}

/// Somebody has a copy of the key, and says in the node's name that its tunnel is another.
#[test]
fn what_others_sign_with_the_key_of_a_node_does_not_stand() {
    for case in ["same version", "next version", "next generation"] {
        let mut sim = cluster(59, 3);
        meshed(&mut sim, 10 * SECOND);
        sim.run(60 * SECOND);
        let (id, lane) = (sim.node(1).id, sim.hosts[1].lane.public());
        let view = sim.node(0).view().unwrap();
        let (record, before) = (view.record(&id).unwrap().clone(), view.signed_record(&id).unwrap().id());
        let forged = (1..=64).map(|byte| {
            let mut forged = record.clone();
            forged.lanes[0].key = WgSecret::from_bytes(&[byte; 32]).public();
            match case {
                "same version" => {}
                "next version" => forged.version += 1,
                _ => (forged.generation, forged.version) = (record.generation + 1, 0),
            }
            Signed::sign(&forged, &sim.hosts[1].identity).unwrap()
        });
        // Of the same version the higher hash counts.
        let forged = forged.into_iter().find(|forged| forged.id() > before).unwrap();
        let node = sim.hosts[0].node.as_mut().unwrap();
        let delta = Delta { records: vec![forged], ..Delta::default() };
        let merged = node.view.as_mut().unwrap().merge(&delta);
        assert_eq!(merged.new.len(), 1, "{case}");
        node.learned(&merged.new, &merged.gone);
        sim.run(60 * SECOND);
        for host in 0..3 {
            let record = sim.node(host).view().unwrap().record(&id).unwrap();
            assert_eq!(record.lanes[0].key, lane, "{case}: host{host}");
        }
        meshed(&mut sim, 10 * SECOND);
        let said = sim.node(1).status().problems.join(" ");
        assert_eq!(said.contains("copy of this node's disk"), case == "next generation", "{case}: {said}");
    }
}

#[test]
fn what_a_host_remembers_has_one_form() {
    let node = Identity::from_bytes(&[1; 32]).node_id();
    let writes = crate::state::Writes { numbers: [1, 2, 3, 4, u64::MAX, 0] };
    for superseded in [None, Some(Superseded::PutBack), Some(Superseded::ByAnother)] {
        let mark = StartMark { node, generation: 7, writes, superseded };
        let text = mark.to_string();
        assert_eq!(text.parse(), Ok(mark));
        for bad in ["", "7", &text[1..], &text[..38], &format!("{text} more"), &text.replace('7', "x")] {
            assert_eq!(bad.parse::<StartMark>(), Err(NoStartMark), "{bad:?}");
        }
        // As it was before there was a sixth file.
        assert_eq!(
            text.replacen(&format!(" {} 0", u64::MAX), &format!(" {}", u64::MAX), 1).parse(),
            Ok(mark)
        );
    }
}

#[test]
fn an_identity_that_has_been_a_member_does_not_join_again() {
    let mut sim = cluster(54, 3);
    meshed(&mut sim, 10 * SECOND);
    sim.kill(2);
    sim.hosts[2].disk.clear();
    sim.hosts[2].seeds = vec![0];
    sim.start(2);
    sim.run(5 * SECOND);
    assert!(sim.node(2).view().is_none());
    assert!(sim.node(2).waiting_for().contains("a member already"), "{}", sim.node(2).waiting_for());
}
