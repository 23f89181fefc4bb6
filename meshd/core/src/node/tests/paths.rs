//! Tunnels that take a relay, and who may have what handed on.

use super::carried::apart;
use super::scenarios::{SECOND, cluster, meshed};
use super::*;
use crate::gossip::wire::{Part, Writer};
use crate::path::Way;
use crate::relay::Endpoint;

pub(super) fn id(sim: &Sim, host: usize) -> NodeId {
    sim.hosts[host].identity.node_id()
}

/// What the tunnels of all hosts have carried: pods on two of them talk to each other.
#[derive(Default)]
pub(super) struct Traffic {
    /// Directions in which the lanes' ports are closed.
    pub(super) closed: BTreeSet<(usize, usize)>,
    facts: BTreeMap<(usize, usize), TunnelFacts>,
    /// Which relay has passed on the handshake of a session.
    sessions: BTreeMap<(usize, usize), Option<usize>>,
    arrived: BTreeMap<(usize, usize), Time>,
}

impl Traffic {
    /// The relay that a packet takes and where it seems to come from, if it arrives.
    fn passage(&self, sim: &Sim, from: usize, to: usize) -> Option<(Option<usize>, SocketAddr)> {
        let endpoint = self.facts.get(&(from, to))?.endpoint?;
        let lane = |host: usize| SocketAddr::new(address(host).ip(), 6784);
        if endpoint == lane(to) {
            let open = sim.connected(from, to) && !self.closed.contains(&(from, to));
            return open.then_some((None, lane(from)));
        }
        let relay = (0..sim.hosts.len()).find(|host| address(*host) == endpoint)?;
        let host = &sim.hosts[relay];
        let open = host.node.is_some() && sim.connected(from, relay) && sim.connected(relay, to);
        host.relay.source(&lane(from)).filter(|_| open)?;
        let next = host.relay.endpoint_of(&sim.hosts[to].lane.public(), sim.now)?;
        (next.remote == lane(to)).then_some((Some(relay), address(relay)))
    }

    /// The kernels take up what is wanted; a peer that is made anew has no session.
    fn take_up(&mut self, sim: &mut Sim, from: usize, to: usize) {
        let key = sim.hosts[to].lane.public();
        if sim.hosts[from].peers_gone.remove(&key) {
            self.facts.remove(&(from, to));
            self.sessions.remove(&(from, to));
        }
        let peers = sim.hosts[from].kernel.lanes.get("meshwg0").map(|lane| &lane.peers);
        let Some(peer) = peers.and_then(|peers| peers.get(&key)) else { return };
        let facts = self.facts.entry((from, to)).or_default();
        if peer.force_endpoint || facts.endpoint.is_none() {
            facts.endpoint = peer.endpoint;
        }
    }

    /// A second passes in which two hosts send something to each other, or the first one to the second.
    pub(super) fn second(&mut self, sim: &mut Sim, between: (usize, usize), both: bool) {
        for _ in 0..20 {
            sim.run(SECOND / 20);
            for (from, to) in [between, (between.1, between.0)] {
                self.take_up(sim, from, to);
            }
        }
        let directions = [between, (between.1, between.0)];
        for (from, to) in directions {
            // A keepalive begins a session when there is none.
            let peer = sim.hosts[from].kernel.lanes["meshwg0"].peers.get(&sim.hosts[to].lane.public());
            let keeps =
                peer.is_some_and(|peer| peer.keepalive > 0) && !self.sessions.contains_key(&(from, to));
            if !both && (from, to) != between && !keeps {
                continue;
            }
            if !self.facts.contains_key(&(from, to)) || !self.facts.contains_key(&(to, from)) {
                continue;
            }
            self.facts.entry((from, to)).or_default().tx_bytes += 1_000;
            let Some((relay, seen)) = self.passage(sim, from, to) else { continue };
            let session = self.sessions.get(&(from, to)).filter(|_| self.sessions.contains_key(&(to, from)));
            match session {
                None => {
                    self.sessions.extend([((from, to), relay), ((to, from), relay)]);
                }
                // Nobody else knows the session's indices.
                Some(session) if relay.is_some() && *session != relay => continue,
                Some(_) => {}
            }
            for end in [(from, to), (to, from)] {
                self.facts.entry(end).or_default().handshake_age = Some(SECOND);
            }
            let back = self.facts.entry((to, from)).or_default();
            back.rx_bytes += 1_000;
            back.endpoint = Some(seen);
            self.arrived.insert((from, to), sim.now);
        }
        for host in [between.0, between.1] {
            let facts = self.facts.iter().filter(|((from, _), _)| *from == host);
            let facts = facts.map(|((_, to), facts)| (sim.hosts[*to].lane.public(), *facts)).collect();
            sim.input(host, Input::Tunnels(facts));
        }
    }

    /// Until packets arrive in both directions; how long that took.
    #[track_caller]
    fn until_it_arrives(&mut self, sim: &mut Sim, between: (usize, usize), limit: u32) -> u32 {
        for second in 0..limit {
            self.second(sim, between, true);
            let arrived = |end| self.arrived.get(&end) == Some(&sim.now);
            if arrived(between) && arrived((between.1, between.0)) {
                return second;
            }
        }
        panic!("nothing arrives within {limit} s: {:?}", self.facts);
    }

    pub(super) fn seconds(&mut self, sim: &mut Sim, between: (usize, usize), count: u32) {
        (0..count).for_each(|_| self.second(sim, between, true));
    }
}

fn way(sim: &Sim, at: usize, to: usize) -> Way {
    sim.node(at).paths.get(&id(sim, to)).map_or(Way::Direct, crate::path::Path::way)
}

/// Who of the first two chooses.
pub(super) fn leader(sim: &Sim) -> (usize, usize) {
    if id(sim, 0) < id(sim, 1) { (0, 1) } else { (1, 0) }
}

#[test]
fn two_without_a_way_to_each_other_talk_through_a_third() {
    for (seed, hosts) in [(200, 3), (201, 4), (202, 6)] {
        let mut sim = apart(seed, hosts);
        meshed(&mut sim, 30 * SECOND);
        let mut traffic = Traffic::default();
        let took = traffic.until_it_arrives(&mut sim, (0, 1), 10);
        assert!(took <= 4, "{took} s");
        let (first, second) = (way(&sim, 0, 1), way(&sim, 1, 0));
        assert!(first == second && first != Way::Direct, "{first:?} {second:?}");
        // It stays so, whatever the daemons do.
        traffic.seconds(&mut sim, (0, 1), 300);
        assert_eq!((way(&sim, 0, 1), way(&sim, 1, 0)), (first, second));
        for host in [0, 1] {
            sim.kill(host);
            sim.start(host);
            traffic.seconds(&mut sim, (0, 1), 5);
            let before = traffic.facts[&(1, 0)].rx_bytes;
            traffic.seconds(&mut sim, (0, 1), 200);
            assert!(traffic.facts[&(1, 0)].rx_bytes >= before + 195_000, "after host{host} had started anew");
        }
        sim.check();
    }
}

#[test]
fn a_cut_is_got_round_and_the_direct_way_taken_again() {
    let mut sim = cluster(203, 4);
    meshed(&mut sim, 10 * SECOND);
    let mut traffic = Traffic::default();
    traffic.seconds(&mut sim, (0, 1), 5);
    assert_eq!(way(&sim, 0, 1), Way::Direct);
    sim.cut(0, 1);
    let took = traffic.until_it_arrives(&mut sim, (0, 1), 10);
    assert!(took <= 3, "{took} s");
    let (leads, follows) = leader(&sim);
    let Way::Relay(relay) = way(&sim, leads, follows) else { panic!("direct") };
    assert!(id(&sim, 2) == relay || id(&sim, 3) == relay);
    // What the relay forgets is said again.
    let at = if id(&sim, 2) == relay { 2 } else { 3 };
    sim.hosts[at].relay = Relay::new(Limits::default(), sim.now);
    let took = traffic.until_it_arrives(&mut sim, (0, 1), 10);
    assert!(took <= 4, "{took} s");
    // It dies: the other one takes over.
    sim.kill(at);
    let took = traffic.until_it_arrives(&mut sim, (0, 1), 10);
    assert!(took <= 3, "{took} s");
    assert_eq!(way(&sim, leads, follows), Way::Relay(id(&sim, 5 - at)));
    sim.heal();
    let before = traffic.facts[&(0, 1)].rx_bytes;
    traffic.seconds(&mut sim, (0, 1), 10);
    assert_eq!((way(&sim, 0, 1), way(&sim, 1, 0)), (Way::Direct, Way::Direct));
    assert_eq!(traffic.facts[&(0, 1)].rx_bytes, before + 10_000, "and nothing is lost");
    sim.check();
}

#[test]
fn when_only_the_one_that_follows_has_something_to_say_the_other_one_chooses_a_relay_too() {
    let mut sim = cluster(204, 3);
    meshed(&mut sim, 10 * SECOND);
    let (leads, follows) = leader(&sim);
    let mut traffic = Traffic::default();
    traffic.seconds(&mut sim, (0, 1), 5);
    sim.run(60 * SECOND);
    sim.cut(0, 1);
    for _ in 0..8 {
        traffic.second(&mut sim, (follows, leads), false);
    }
    assert_eq!(way(&sim, leads, follows), Way::Relay(id(&sim, 2)));
    assert_eq!(way(&sim, follows, leads), Way::Relay(id(&sim, 2)));
    assert_eq!(traffic.arrived.get(&(follows, leads)), Some(&sim.now));
}

/// What `from` seals for `to`.
fn sealed(sim: &mut Sim, from: usize, to: usize, part: &Part) -> Vec<u8> {
    let mut writer = Writer::default();
    assert!(writer.push(part));
    let to = id(sim, to);
    let payload = writer.take();
    sim.hosts[from].node.as_mut().unwrap().sealed(&to, &payload).unwrap()
}

/// What comes of a datagram at `at`, without the simulation: what it sends, and what it registers.
fn hears(sim: &mut Sim, at: usize, from: SocketAddr, bytes: Vec<u8>) -> (Vec<SocketAddr>, Vec<Endpoint>) {
    let now = sim.now;
    let node = sim.hosts[at].node.as_mut().unwrap();
    node.handle(Input::Datagram { from, to: None, bytes }, now);
    let (mut sent, mut registered) = (Vec::new(), Vec::new());
    loop {
        match node.poll_output() {
            Output::Timeout(_) => return (sent, registered),
            Output::Datagram { to, .. } => sent.push(to),
            Output::Register { endpoint, .. } => registered.push(endpoint),
            _ => {}
        }
    }
}

#[test]
fn a_lane_is_registered_only_by_who_has_shown_to_hold_its_key() {
    let mut sim = cluster(205, 3);
    meshed(&mut sim, 10 * SECOND);
    let from = SocketAddr::new(address(0).ip(), 6784);
    let contact = sim.node(2).datagrams.address(&id(&sim, 0));
    let hello = |sim: &mut Sim, key, serial| {
        let bytes = sealed(sim, 0, 2, &Part::LaneHello { key, serial });
        hears(sim, 2, from, bytes).1
    };
    let own = sim.hosts[0].lane.public();
    assert_eq!(hello(&mut sim, own, 1), [Endpoint { remote: from, local: None }]);
    // Not another member's, nor any.
    let others = sim.hosts[1].lane.public();
    assert_eq!(hello(&mut sim, others, 2), []);
    assert_eq!(hello(&mut sim, WgPublic::from_bytes([9; 32]), 3), []);
    // Nor is it taken for the address of its control port.
    assert_eq!(sim.node(2).datagrams.address(&id(&sim, 0)), contact);
    // What was recorded is worth nothing.
    let bytes = sealed(&mut sim, 0, 2, &Part::LaneHello { key: own, serial: 4 });
    assert_eq!(hears(&mut sim, 2, from, bytes.clone()).1.len(), 1);
    let elsewhere = SocketAddr::new(address(1).ip(), 6784);
    assert_eq!(hears(&mut sim, 2, elsewhere, bytes).1, []);
}

#[test]
fn little_is_handed_on_and_only_to_members() {
    let mut sim = cluster(206, 3);
    meshed(&mut sim, 10 * SECOND);
    sim.run(20 * SECOND);
    let pass = |sim: &mut Sim, to: NodeId| {
        let bytes = sealed(sim, 0, 2, &Part::Pass { to, datagram: vec![7; 60] });
        hears(sim, 2, address(0), bytes).0.iter().filter(|to| **to == address(1)).count()
    };
    let (itself, other) = (id(&sim, 0), id(&sim, 1));
    sim.run(2 * SECOND);
    assert_eq!(pass(&mut sim, other), 1);
    assert_eq!(pass(&mut sim, itself), 0);
    assert_eq!(pass(&mut sim, NodeId::from_bytes([9; 16])), 0);
    let count: usize = (0..1000).map(|_| pass(&mut sim, other)).sum();
    assert!((450..=500).contains(&count), "{count} in one moment");
    sim.run(2 * SECOND);
    assert_eq!(pass(&mut sim, other), 1, "and later again");
}

#[test]
fn nothing_is_handed_on_twice_and_no_relay_speaks_for_another_member() {
    let mut sim = cluster(207, 4);
    meshed(&mut sim, 10 * SECOND);
    sim.run(10 * SECOND);
    // 0 has 2 hand on to 1 what asks 1 to hand on to 3.
    let to = id(&sim, 3);
    let inner = sealed(&mut sim, 0, 1, &Part::Pass { to, datagram: vec![7; 60] });
    let bytes = sealed(&mut sim, 2, 1, &Part::Passed { datagram: inner });
    let (sent, _) = hears(&mut sim, 1, address(2), bytes);
    assert!(!sent.contains(&address(3)), "{sent:?}");
    // A probe that 2 has sealed itself is none of 0's, whatever it says: it is answered to 2 only.
    let (leads, follows) = leader(&sim);
    let probe = Part::Probe { number: 7, relay: Some(id(&sim, 2)), alarm: false };
    let inner = sealed(&mut sim, 2, follows, &probe);
    let bytes = sealed(&mut sim, 2, follows, &Part::Passed { datagram: inner });
    hears(&mut sim, follows, address(2), bytes);
    assert_eq!(way(&sim, follows, leads), Way::Direct);
    // That of the one that leads is followed; that of the one that follows is not.
    let inner = sealed(&mut sim, follows, leads, &probe);
    let bytes = sealed(&mut sim, 2, leads, &Part::Passed { datagram: inner });
    hears(&mut sim, leads, address(2), bytes);
    assert_eq!(way(&sim, leads, follows), Way::Direct);
    let inner = sealed(&mut sim, leads, follows, &probe);
    let bytes = sealed(&mut sim, 2, follows, &Part::Passed { datagram: inner });
    hears(&mut sim, follows, address(2), bytes);
    assert_eq!(way(&sim, follows, leads), Way::Relay(id(&sim, 2)));
}

#[test]
fn several_members_have_to_see_this_host_behind_a_nat() {
    let mut sim = cluster(208, 5);
    meshed(&mut sim, 10 * SECOND);
    let ids: Vec<NodeId> = (0..5).map(|host| id(&sim, host)).collect();
    let (own, other) = (address(0).ip(), IpAddr::from([203, 0, 113, 7]));
    let node = sim.hosts[0].node.as_mut().unwrap();
    let mut says = |by: usize, address| {
        node.seen_at(ids[by], address);
        node.keepalive(&ids[4]) > 0
    };
    assert!(!says(1, other) && !says(1, other) && !says(2, other));
    assert!(says(3, other));
    assert!(!says(2, own), "who sees it where it is, is no witness any more");
    assert!(says(4, other));
}

#[test]
fn what_another_member_sees_in_a_session_is_said() {
    let mut sim = cluster(209, 2);
    meshed(&mut sim, 10 * SECOND);
    let (dialler, acceptor) = {
        let other = id(&sim, 1);
        let session = sim.node(0).direct_session_with(&other).expect("a session");
        let dialled = sim.node(0).sessions.get(&session).unwrap().way.is_dialled();
        if dialled { (0, 1) } else { (1, 0) }
    };
    let message = crate::message::Message::Seen { address: IpAddr::from([203, 0, 113, 7]) };
    for (at, from, believed) in [(acceptor, dialler, false), (dialler, acceptor, true)] {
        let from = id(&sim, from);
        let session = sim.node(at).direct_session_with(&from).unwrap();
        sim.input(at, Input::SessionFrame { session, frame: message.encode() });
        assert_eq!(sim.node(at).keepalive(&from) > 0, believed, "only who has dialled can be told");
    }
}

#[test]
fn who_falls_silent_is_left_alone_whatever_was_wrong_before() {
    let mut sim = cluster(230, 2);
    meshed(&mut sim, 30 * SECOND);
    // Tunnels that carry nothing, between control ports that do, and no relay that might help.
    let mut facts = TunnelFacts::default();
    let mut seconds = |sim: &mut Sim, count, bytes| {
        for _ in 0..count {
            sim.run(SECOND);
            facts.tx_bytes += bytes;
            for (host, other) in [(0, 1), (1, 0)] {
                let key = sim.hosts[other].lane.public();
                sim.input(host, Input::Tunnels(BTreeMap::from([(key, facts)])));
            }
        }
    };
    seconds(&mut sim, 30, 1_000);
    assert!([0, 1].iter().all(|host| sim.node(*host).paths.get(&id(&sim, 1 - *host)).is_some()));
    seconds(&mut sim, 30, 0);
    assert!([0, 1].iter().all(|host| sim.node(*host).paths.get(&id(&sim, 1 - *host)).is_none()));
    sim.check();
}

#[test]
fn a_datagram_full_of_probes_is_not_answered_by_as_many() {
    let mut sim = cluster(240, 2);
    meshed(&mut sim, 30 * SECOND);
    let (ids, from) = ([id(&sim, 0), id(&sim, 1)], address(1));
    let mut writer = Writer::default();
    let probe = |number| Part::Probe { number, relay: None, alarm: false };
    let count = (0..).take_while(|number| writer.push(&probe(*number))).count();
    assert!(count > 100, "{count}");
    let payload = writer.take();
    let mut sealed = || {
        let node = sim.hosts[1].node.as_mut().unwrap();
        node.sealed(&ids[0], &payload).unwrap()
    };
    let datagrams: Vec<Vec<u8>> = (0..10).map(|_| sealed()).collect();
    let now = sim.now;
    let node = sim.hosts[0].node.as_mut().unwrap();
    let mut answers = 0;
    for bytes in datagrams {
        node.handle(Input::Datagram { from, to: None, bytes }, now);
        let outputs = std::iter::from_fn(|| Some(node.poll_output()));
        let outputs = outputs.take_while(|output| !matches!(output, Output::Timeout(_)));
        answers +=
            outputs.filter(|output| matches!(output, Output::Datagram { to, .. } if *to == from)).count();
    }
    assert!((40..=60).contains(&answers), "{answers} answers to {} probes", 10 * count);
}
