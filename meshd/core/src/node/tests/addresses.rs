//! Addresses: what happens when they run out, are released, or are claimed by the host itself.

use std::time::Duration;

use super::*;
use crate::api::ErrorCode;
use crate::leases::QUARANTINE;
use crate::overlap::Origin;

const SECOND: Duration = Duration::from_secs(1);

/// Hosts that form a cluster of this range.
fn cluster(seed: u64, range: &str, hosts: usize) -> Sim {
    let mut sim = Sim::new(seed);
    sim.range = range.parse().unwrap();
    let seeds: Vec<usize> = (0..hosts).collect();
    for _ in 0..hosts {
        sim.add(&seeds, SimSecret::Key(7));
    }
    // One after the other: which of them gets which block does not depend on the seed.
    for host in 0..hosts {
        sim.start(host);
        sim.run_until(10 * SECOND, |sim| sim.node(host).is_ready()).expect("a ready node");
    }
    sim.run_until(10 * SECOND, Sim::meshed).expect("a mesh");
    sim
}

/// Attaches pods until it fails; how many, and how it failed.
fn fill(sim: &mut Sim, at: usize) -> (usize, ApiError) {
    for n in 0..2000 {
        if let Err(error) = sim.attach(at, &format!("fill{n}")) {
            sim.check();
            return (n, error);
        }
    }
    panic!("2000 pods and still addresses");
}

fn detach(sim: &mut Sim, at: usize, name: &str) {
    let id = AttachmentId::new(name, "eth0").unwrap();
    let request = sim.request(at, Request::Detach(id));
    assert_eq!(sim.answer(at, request), Ok(Response::Done));
}

fn restart(sim: &mut Sim, at: usize) {
    sim.kill(at);
    sim.start(at);
    sim.run_until(10 * SECOND, |sim| sim.node(at).is_ready()).expect("a ready node");
}

#[test]
fn what_is_leased_is_not_on_disk_before_the_grant_that_it_is_of() {
    let mut sim = cluster(31, "10.77.0.0/22", 2);
    sim.cut(0, 1);
    sim.run(20 * SECOND);
    fill(&mut sim, 1);
    sim.hosts[1].disk_full = true;
    sim.heal();
    let owned = |sim: &Sim| sim.node(1).owned().len();
    sim.run_until(120 * SECOND, |sim| owned(sim) > 256).expect("another block");
    sim.hosts[1].disk_full = false;
    sim.attach(1, "newcomer").unwrap();
    sim.kill(1);
    sim.cut(0, 1);
    sim.start(1);
    sim.run(SECOND);
    assert!(owned(&sim) > 256, "the grant is on disk");
    let node = sim.node(1);
    assert!(node.leases.all().values().all(|lease| node.owned().contains(lease.ipv4)));
}

#[test]
fn a_node_without_free_addresses_says_who_may_have_some_and_disturbs_nobody() {
    let mut sim = cluster(30, "10.77.0.0/22", 2);
    sim.cut(0, 1);
    sim.run(20 * SECOND);
    let (count, error) = fill(&mut sim, 1);
    assert_eq!(count, 253, "a block without .0, .255 and the node itself");
    assert_eq!(error.code, ErrorCode::Exhausted);
    for words in ["of its 254, 253 are leased", "10.77.0.0/22", "host0", "owns 768", "can be reached", "6783"]
    {
        assert!(error.message.contains(words), "{words:?}: {error}");
    }
    let kernel = sim.hosts[1].kernel.clone();
    let leases = sim.node(1).leases.clone();
    assert!(sim.attach(1, "another").is_err());
    sim.run(5 * SECOND);
    assert_eq!(sim.hosts[1].kernel, kernel, "pods that are there stay as they are");
    assert_eq!(sim.node(1).leases, leases);
    let status = sim.node(1).status();
    assert!(
        status.problems.iter().any(|text| text.contains("no pod can be attached")),
        "{:?}",
        status.problems
    );
    assert!(status.ipam.unwrap().shortage.unwrap().contains("host0"));
    // With the session back it gets a block by itself.
    sim.heal();
    sim.run_until(60 * SECOND, |sim| sim.node(1).status().problems.is_empty()).expect("more addresses");
    sim.attach(1, "another").unwrap();
    sim.check();
}

#[test]
fn with_the_whole_range_given_out_the_error_says_so() {
    let mut sim = cluster(31, "10.77.0.0/23", 2);
    let (count, error) = fill(&mut sim, 1);
    assert_eq!((count, error.code), (253, ErrorCode::Exhausted));
    assert!(error.message.contains("no other node owns more of the cluster's range 10.77.0.0/23"), "{error}");
    assert!(error.message.contains("--range"), "{error}");
    // A third node is let in, and gets nothing.
    let third = sim.add(&[0], SimSecret::Key(7));
    sim.start(third);
    sim.run(10 * SECOND);
    assert!(sim.node(third).view().is_some());
    let error = sim.attach(third, "pod").unwrap_err();
    assert_eq!(error.code, ErrorCode::NotReady);
    assert!(error.message.contains("owns no IPv4 addresses yet; no other node owns more"), "{error}");
    // What the second node gives up, it can use again itself.
    detach(&mut sim, 1, "fill7");
    sim.run(QUARANTINE);
    sim.attach(1, "again").unwrap();
    sim.check();
}

#[test]
fn a_released_address_rests_across_a_kill_of_the_daemon_and_a_restart_of_the_host() {
    let mut sim = cluster(32, "10.77.0.0/24", 1);
    assert_eq!(fill(&mut sim, 0).0, 253);
    let freed = sim.node(0).leases.get(&AttachmentId::new("fill3", "eth0").unwrap()).unwrap().ipv4;
    detach(&mut sim, 0, "fill3");
    let released = sim.now;
    for _ in 0..3 {
        restart(&mut sim, 0);
        let error = sim.attach(0, "new").unwrap_err();
        assert!(error.message.contains("252 are leased, 1 rest"), "{error}");
        let usage = sim.node(0).status().ipam.unwrap().usage;
        assert_eq!((usage.free, usage.resting, usage.leased), (0, 1, 252));
        assert!((1..=61).contains(&usage.resting_seconds), "{usage:?}");
        sim.run(5 * SECOND);
    }
    let again = loop {
        sim.run(SECOND);
        if let Ok(pod) = sim.attach(0, "new") {
            break pod;
        }
    };
    assert_eq!(again.ipv4, freed);
    let rested = sim.now.since(released);
    assert!(rested >= QUARANTINE && rested < 3 * QUARANTINE, "{rested:?}");
    // After a restart of the host all pods are new, and their addresses too for a while.
    sim.kill(0);
    sim.boot = "next boot";
    sim.hosts[0].kernel = HostState::default();
    sim.start(0);
    sim.run_until(10 * SECOND, |sim| sim.node(0).is_ready()).expect("a ready node");
    assert!(sim.attach(0, "pod").unwrap_err().message.contains("0 are leased, 253 rest"));
    restart(&mut sim, 0);
    assert!(sim.attach(0, "pod").is_err(), "the rest is on disk");
    sim.run(QUARANTINE + 2 * SECOND);
    sim.attach(0, "pod").unwrap();
}

/// Tells the node what is left of an attachment.
fn tell(sim: &mut Sim, at: usize, id: &AttachmentId, host_end: bool, netns: NetnsLook) {
    let remains = BTreeMap::from([(id.clone(), Remains { host_end, netns })]);
    let begun = sim.now;
    sim.input(at, Input::Remains { begun, remains });
}

#[test]
fn an_attachment_of_which_nothing_is_left_is_released_after_a_while() {
    let mut sim = cluster(33, "10.77.0.0/24", 1);
    let (gone, stays) = (sim.attach(0, "gone").unwrap(), sim.attach(0, "stays").unwrap());
    let other = NetnsLook::Found(crate::api::NetnsId { ino: 7, ..NETNS });
    for netns in [NetnsLook::Missing, other] {
        tell(&mut sim, 0, &gone.id, false, netns);
        assert!(sim.node(0).has_lease(&gone.id), "one look is not enough");
        sim.run(GONE_FOR - SECOND);
        tell(&mut sim, 0, &gone.id, false, netns);
        assert!(sim.node(0).has_lease(&gone.id), "nor are two at short distance");
        // Seen alive once, all begins anew.
        tell(&mut sim, 0, &gone.id, true, NetnsLook::Unknown);
        sim.run(2 * SECOND);
    }
    tell(&mut sim, 0, &gone.id, false, other);
    sim.run(GONE_FOR);
    tell(&mut sim, 0, &gone.id, false, NetnsLook::Missing);
    sim.run(SECOND);
    assert!(!sim.node(0).has_lease(&gone.id));
    assert_eq!(sim.hosts[0].kernel.ports.keys().collect::<Vec<_>>(), [&stays.host_ifname]);
    assert_eq!(sim.node(0).status().ipam.unwrap().usage.resting, 1, "its address rests like any other");
    restart(&mut sim, 0);
    assert!(!sim.node(0).has_lease(&gone.id), "the release is on disk");
    assert!(sim.node(0).has_lease(&stays.id));
}

#[test]
fn no_attachment_that_could_be_alive_is_ever_released() {
    let mut sim = cluster(34, "10.77.0.0/24", 1);
    let pod = sim.attach(0, "pod").unwrap();
    let own = NetnsLook::Found(NETNS);
    for (host_end, netns) in
        [(true, NetnsLook::Missing), (true, NetnsLook::Unknown), (false, own), (false, NetnsLook::Unknown)]
    {
        for _ in 0..4 {
            tell(&mut sim, 0, &pod.id, host_end, netns);
            sim.run(GONE_FOR);
        }
        assert!(sim.node(0).has_lease(&pod.id), "{host_end} {netns:?}");
    }
    // Of whom nothing is told, nothing is concluded.
    tell(&mut sim, 0, &pod.id, false, NetnsLook::Missing);
    sim.run(GONE_FOR);
    let begun = sim.now;
    sim.input(0, Input::Remains { begun, remains: BTreeMap::new() });
    assert!(sim.node(0).has_lease(&pod.id));
    // A look that began at once after the first, and whose result came late, is no look at a distance.
    tell(&mut sim, 0, &pod.id, true, NetnsLook::Unknown);
    let late = Remains { host_end: false, netns: NetnsLook::Missing };
    for _ in 0..2 {
        let (begun, remains) = (sim.now, BTreeMap::from([(pod.id.clone(), late)]));
        tell(&mut sim, 0, &pod.id, false, NetnsLook::Missing);
        sim.run(2 * GONE_FOR);
        sim.input(0, Input::Remains { begun, remains });
        assert!(sim.node(0).has_lease(&pod.id));
        tell(&mut sim, 0, &pod.id, true, NetnsLook::Unknown);
    }
    tell(&mut sim, 0, &pod.id, false, NetnsLook::Missing);
    sim.run(GONE_FOR);
    // Attached anew meanwhile: what was seen before does not count against it.
    let request = AttachRequest {
        id: pod.id.clone(),
        netns: "/run/netns/y".into(),
        network: "mesh".into(),
        pod: None,
        netns_id: None,
    };
    let missing = Problem { object: pod.host_ifname.clone(), text: "it does not exist".into() };
    let revision = sim.node(0).revision;
    sim.input(0, Input::Applied { revision, problems: vec![missing] });
    let lease = sim.request(0, Request::Attach(request));
    sim.answer(0, lease).unwrap();
    tell(&mut sim, 0, &pod.id, false, NetnsLook::Missing);
    assert!(sim.node(0).has_lease(&pod.id));
    // Its plugin did not tell which namespace it is: any at that path may be it.
    for _ in 0..4 {
        tell(&mut sim, 0, &pod.id, false, own);
        sim.run(GONE_FOR);
    }
    assert!(sim.node(0).has_lease(&pod.id));
    // A daemon that starts anew remembers the namespaces, and not what it suspected.
    let other = sim.attach(0, "other").unwrap();
    tell(&mut sim, 0, &other.id, false, NetnsLook::Missing);
    sim.run(GONE_FOR);
    restart(&mut sim, 0);
    for _ in 0..4 {
        tell(&mut sim, 0, &other.id, false, own);
        sim.run(GONE_FOR);
    }
    assert!(sim.node(0).has_lease(&other.id));
}

#[test]
fn a_disk_that_is_full_does_not_lose_the_release_of_a_vanished_attachment() {
    let mut sim = cluster(35, "10.77.0.0/24", 1);
    let pod = sim.attach(0, "pod").unwrap();
    sim.hosts[0].disk_full = true;
    for _ in 0..3 {
        tell(&mut sim, 0, &pod.id, false, NetnsLook::Missing);
        sim.run(GONE_FOR);
    }
    assert!(sim.node(0).has_lease(&pod.id), "what is not on disk is not released");
    sim.hosts[0].disk_full = false;
    for _ in 0..3 {
        tell(&mut sim, 0, &pod.id, false, NetnsLook::Missing);
        sim.run(GONE_FOR);
    }
    assert!(!sim.node(0).has_lease(&pod.id));
}

#[test]
fn every_node_tells_the_same_owners_and_they_make_up_the_range() {
    let mut sim = cluster(36, "10.64.0.0/12", 4);
    sim.attach(1, "pod").unwrap();
    let all: Vec<_> = (0..4).map(|at| sim.node(at).status().ipam.unwrap()).collect();
    for (at, ipam) in all.iter().enumerate() {
        let mut whole = crate::ranges::RangeSet::new();
        for owner in &ipam.owners {
            let count: u64 = owner.ipv4.iter().map(|net| 1u64 << (32 - net.prefix_len())).sum();
            assert_eq!(count, owner.ipv4_addresses);
            owner.ipv4.iter().for_each(|net| whole.insert(*net));
            assert!(ipam.ipv6.contains(&owner.ipv6.unwrap()));
        }
        assert_eq!(whole.nets(), [ipam.ipv4], "every address has an owner");
        assert_eq!(ipam.owners.iter().map(|owner| owner.ipv4_addresses).sum::<u64>(), 1 << 20, "and no two");
        assert_eq!(ipam.owners.len(), 4);
        assert!(ipam.owners.is_sorted_by_key(|owner| std::cmp::Reverse(owner.ipv4_addresses)));
        let own: Vec<_> = ipam.owners.iter().filter(|owner| owner.this_node).collect();
        assert_eq!(
            own.iter().map(|owner| owner.name.clone().unwrap()).collect::<Vec<_>>(),
            [format!("host{at}")]
        );
        let usage = ipam.usage;
        assert_eq!(usage.own + usage.leased + usage.resting + usage.free, usage.usable);
        assert_eq!((usage.own, usage.leased), (1, u64::from(at == 1)));
        assert_eq!((&ipam.shortage, ipam.conflicts.len()), (&None, 0));
        let others = |ipam: &crate::api::IpamStatus| {
            ipam.owners.iter().map(|owner| (owner.id.clone(), owner.ipv4.clone())).collect::<Vec<_>>()
        };
        assert_eq!(others(ipam), others(&all[0]));
    }
    // The document survives its form on the wire, and one of an older daemon is read too.
    let status = sim.node(0).status();
    let mut json = serde_json::to_value(&status).unwrap();
    assert_eq!(serde_json::from_value::<Status>(json.clone()).unwrap(), status);
    json.as_object_mut().unwrap().remove("ipam");
    assert_eq!(serde_json::from_value::<Status>(json).unwrap().ipam, None);
}

pub(super) fn by_gateway(net: &str) -> HostPrefix {
    let origin = Origin::Route { device: Some("eth0".into()), gateway: "198.18.0.250".parse().ok() };
    HostPrefix { net: net.parse().unwrap(), origin }
}

#[test]
fn a_founder_whose_host_uses_the_range_is_refused_at_start() {
    for (net, words) in [
        (
            "10.0.0.0/8",
            &["range 10.32.0.0/12", "route 10.0.0.0/8 via 198.18.0.250 dev eth0", "--range", "172.16.0.0/12"]
                [..],
        ),
        ("10.33.0.0/16", &["route 10.33.0.0/16 via 198.18.0.250 dev eth0", "--range", "10.0.0.0/12"]),
        ("fd00::/8", &["route fd00::/8 via", "remove that", "IPv6 range follows from the cluster"]),
    ] {
        let mut sim = Sim::new(37);
        sim.add(&[], SimSecret::Key(1));
        sim.hosts[0].prefixes = vec![by_gateway("0.0.0.0/0"), by_gateway(net), by_gateway("::/0")];
        sim.start(0);
        sim.run(SECOND);
        let reason = sim.hosts[0].refused.clone().expect("a refusal");
        assert!(words.iter().all(|words| reason.contains(words)), "{reason}");
        assert_eq!(sim.hosts[0].kernel, HostState::default(), "nothing was set up");
        assert!(!sim.hosts[0].disk.contains_key(&StateFile::Cluster), "nothing was founded");
        // Another range is fine, or the same with the route gone.
        if net.starts_with("10.") {
            sim.range = "172.16.0.0/12".parse().unwrap();
        } else {
            sim.hosts[0].prefixes.clear();
        }
        sim.start(0);
        sim.run_until(SECOND, |sim| sim.node(0).is_ready()).expect("a node");
    }
}

#[test]
fn a_default_route_is_no_overlap() {
    let mut sim = Sim::new(38);
    sim.add(&[], SimSecret::Key(1));
    sim.hosts[0].prefixes =
        ["0.0.0.0/0", "0.0.0.0/1", "128.0.0.0/1", "::/0", "8000::/1"].map(by_gateway).to_vec();
    sim.start(0);
    sim.run_until(SECOND, |sim| sim.node(0).is_ready()).expect("a node");
    assert_eq!(sim.node(0).status().problems, Vec::<String>::new());
}

#[test]
fn a_joiner_whose_host_uses_the_range_says_so_and_sets_up_nothing_until_it_is_free() {
    let mut sim = cluster(39, "10.64.0.0/12", 2);
    let late = sim.add(&[0], SimSecret::Key(7));
    sim.hosts[late].prefixes = vec![by_gateway("10.70.0.0/16")];
    sim.start(late);
    sim.run(10 * SECOND);
    assert_eq!(sim.hosts[late].refused, None, "it learned of the range only after the join");
    assert!(sim.node(late).view().is_some());
    assert!(!sim.node(late).is_ready());
    let error = sim.attach(late, "pod").unwrap_err();
    assert_eq!(error.code, ErrorCode::NotReady);
    assert!(error.message.contains("nothing is set up on this host"), "{error}");
    assert!(error.message.contains("route 10.70.0.0/16 via 198.18.0.250 dev eth0"), "{error}");
    let problems = sim.node(late).status().problems;
    assert!(problems.iter().any(|text| text.contains("10.70.0.0/16")), "{problems:?}");
    assert_eq!(sim.hosts[late].kernel, HostState::default());
    // Started again, it knows the range before it does anything.
    sim.kill(late);
    sim.start(late);
    sim.run(SECOND);
    let reason = sim.hosts[late].refused.take().expect("a refusal");
    assert!(reason.contains("10.70.0.0/16") && reason.contains("cluster's range 10.64.0.0/12"), "{reason}");
    // Gone while it runs, or before it starts: then it comes up.
    let other = sim.add(&[0], SimSecret::Key(7));
    sim.hosts[other].prefixes = vec![by_gateway("10.70.0.0/16")];
    sim.start(other);
    sim.run(10 * SECOND);
    assert!(!sim.node(other).is_ready());
    sim.hosts[other].prefixes.clear();
    sim.look(other);
    sim.hosts[late].prefixes.clear();
    sim.start(late);
    sim.run_until(60 * SECOND, Sim::meshed).expect("a mesh of all");
    sim.attach(other, "pod").unwrap();
    assert_eq!(sim.node(other).status().problems, Vec::<String>::new());
}

#[test]
fn an_overlap_that_comes_later_is_told_and_takes_nothing_away() {
    let mut sim = cluster(40, "10.64.0.0/12", 2);
    sim.attach(0, "pod").unwrap();
    sim.run(SECOND);
    let kernel = sim.hosts[0].kernel.clone();
    sim.hosts[0].prefixes = vec![by_gateway("10.0.0.0/8")];
    sim.look(0);
    let overlaps = |sim: &Sim| sim.node(0).status().problems.iter().any(|text| text.contains("10.0.0.0/8"));
    assert!(overlaps(&sim));
    assert!(sim.node(0).is_ready(), "pods come and go as before");
    sim.attach(0, "second").unwrap();
    detach(&mut sim, 0, "second");
    sim.run(SECOND);
    assert_eq!(diff(&sim.hosts[0].kernel, &kernel), []);
    // A daemon that starts anew finds the mesh in force, and goes on.
    restart(&mut sim, 0);
    assert_eq!(sim.hosts[0].refused, None);
    assert!(overlaps(&sim));
    assert_eq!(diff(&sim.hosts[0].kernel, &kernel), []);
    sim.run_until(30 * SECOND, Sim::meshed).expect("a mesh");
    // After a restart of the host there is nothing to keep.
    sim.kill(0);
    sim.boot = "next boot";
    sim.hosts[0].kernel = HostState::default();
    sim.start(0);
    assert!(sim.hosts[0].refused.as_ref().is_some_and(|reason| reason.contains("10.0.0.0/8")));
}

#[test]
fn other_networks_of_the_host_change_no_record_and_nothing_in_the_kernel() {
    let mut sim = cluster(41, "10.64.0.0/12", 2);
    // The path is measured.
    sim.run(SECOND);
    let before = (sim.node(0).version, sim.hosts[0].kernel.clone(), sim.hosts[0].wrote);
    sim.hosts[0].prefixes = vec![by_gateway("172.31.0.0/16")];
    sim.look(0);
    sim.run(SECOND);
    assert_eq!((sim.node(0).version, sim.hosts[0].kernel.clone(), sim.hosts[0].wrote), before);
    assert_eq!(sim.node(0).status().problems, Vec::<String>::new());
}

#[test]
fn a_member_that_asks_on_and_on_gets_a_block_at_a_time_and_leaves_one_for_others() {
    let mut sim = cluster(47, "10.77.0.0/20", 3);
    let asker = sim.hosts[2].identity.clone();
    let owned = |sim: &Sim| sim.node(0).view().unwrap().grants().owned_by(&asker.public()).len() / 256;
    let ask = |sim: &mut Sim| {
        for _ in 0..100 {
            sim.hosts[0].node.as_mut().unwrap().on_grant_ask(asker.node_id());
        }
        sim.look(0);
    };
    let before = owned(&sim);
    ask(&mut sim);
    assert_eq!(owned(&sim), before + 1, "one, however often it asks");
    for _ in 0..120 {
        sim.run(5 * SECOND);
        ask(&mut sim);
    }
    let spare = sim.node(0).spare_addresses().len() / 256;
    assert_eq!(spare, 1, "the last that it can spare is for one that has less");
    let needy = sim.hosts[1].identity.node_id();
    sim.hosts[0].node.as_mut().unwrap().on_grant_ask(needy);
    sim.look(0);
    assert_eq!(sim.node(0).spare_addresses().len(), 0);
    sim.check();
}

/// How many blocks each of the hosts owns.
fn blocks<const N: usize>(sim: &Sim) -> [usize; N] {
    let grants = sim.node(0).view().unwrap().grants();
    let of = |host: usize| grants.owned_by(&sim.hosts[host].identity.public()).len() / 256;
    std::array::from_fn(|host| usize::try_from(of(host)).unwrap())
}

#[test]
fn the_richest_owner_may_give_nothing_and_another_is_asked() {
    let mut sim = cluster(36, "10.77.0.0/21", 4);
    let attach = |sim: &mut Sim, at: usize| {
        (0..240).for_each(|n| drop(sim.attach(at, &format!("pod{n}")).unwrap()));
        sim.run(10 * SECOND);
    };
    attach(&mut sim, 1);
    assert_eq!(blocks(&sim), [4, 2, 1, 1]);
    (0..10).for_each(|n| detach(&mut sim, 1, &format!("pod{n}")));
    sim.run(QUARANTINE + SECOND);
    // A member is away for good, and the founder's host is rebooted: it waits for that member for a while.
    sim.kill(3);
    sim.kill(0);
    sim.hosts[0].kernel = HostState::default();
    sim.hosts[0].last_start = None;
    sim.start(0);
    sim.run(30 * SECOND);
    attach(&mut sim, 2);
    assert_eq!(blocks(&sim), [4, 1, 2, 1]);
    sim.check();
}

#[test]
fn a_last_spare_block_does_not_go_back_and_forth() {
    let mut sim = cluster(37, "10.77.0.0/22", 3);
    for at in [1, 0, 2] {
        (0..240).for_each(|n| drop(sim.attach(at, &format!("pod{n}")).unwrap()));
    }
    sim.run(60 * SECOND);
    let grants = |sim: &Sim| sim.node(0).view().unwrap().to_delta().grants.len();
    let before = (blocks(&sim), grants(&sim));
    assert_eq!(before, ([1, 2, 1], 3), "one each at first, and the last to the first that ran low");
    sim.run(120 * SECOND);
    assert_eq!((blocks(&sim), grants(&sim)), before);
    // Who has nothing at all gets it.
    let newcomer = sim.add(&[0], SimSecret::Key(7));
    sim.start(newcomer);
    sim.run_until(30 * SECOND, |sim| sim.node(newcomer).is_ready()).expect("a block for the newcomer");
    assert_eq!(blocks(&sim), [1, 1, 1, 1]);
    sim.check();
}
