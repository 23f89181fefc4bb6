//! Paths to members: probes, what they say, and what the kernel gets of it.
//!
//! [`Path`] decides for one member; here are those of all. A probe through a relay is a datagram that is sealed for the
//! member, in one that is sealed for the relay, which hands it on: it proves itself as any other does, and the relay can
//! neither read nor forge it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use mesh_keys::NodeId;
use rand_core::RngCore as _;

use super::allowance::Allowance;
use super::datagrams::PerSecond;
use super::{MIN_TICK, Node, TunnelFacts};
use crate::gossip::wire::{Part, Writer};
use crate::path::{Act, Path, Way};
use crate::time::Time;

/// Paths that are looked at: each costs a few datagrams a second while its tunnel is in use.
const MAX_PATHS: usize = 2048;

/// Paths to members that were never reached, at a time: after a start that may be all.
const MAX_UNREACHED: usize = 32;

/// Answers to these show that a member speaks now.
const GREETINGS: usize = 128;

/// Datagrams a second that are handed on: of one member, and of all.
const PASSED_OF_ONE: u32 = 500;
const PASSED_OF_ALL: u32 = 8000;

/// What the other end has chosen is changed by its word no sooner again.
const FOLLOWED: Duration = Duration::from_millis(500);

/// For so long after a path was chosen it is looked at whether WireGuard has another one.
const JUST_CHOSEN: Duration = Duration::from_secs(5);

/// The order of candidates is worked out anew after this time.
const CANDIDATES: Duration = Duration::from_secs(1);

/// Addresses that a probe of the direct way is sent to, while none is known to work.
const ADDRESSES: usize = 4;

/// Seconds between keepalives where something on the way forgets: NATs keep a mapping for 30 s at the least, mostly.
pub(super) const KEEPALIVE: u16 = 25;

/// Probes that a node sends in a second where nothing is wrong, and altogether; of the latter so many at once, after a while
/// without. A node that cannot keep up would else take its ways to be lost, and send still more.
const ROUTINE: u32 = 50;
const PROBES: u32 = 250;
const PROBES_AT_ONCE: u32 = 1000;

/// Pause after which there are probes again when there were none, and the most that one waits where nothing is wrong: a
/// random part of it, so that all have their turn.
const WAIT: Duration = Duration::from_millis(100);
const ROUTINE_WAIT: Duration = Duration::from_secs(1);

/// Probes that are answered in a second: of one member, and of all.
const ANSWERED_OF_ONE: u32 = 50;
const ANSWERED_OF_ALL: u32 = 2000;

/// Where a datagram has come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// From the member itself, from that address; to that one of this host, if known.
    Address(SocketAddr, Option<IpAddr>),
    /// A member has handed it on.
    Relay(NodeId),
}

/// What the kernel is to do once, so that a tunnel takes another way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// The peer is left out, so that it is made anew.
    Without,
    /// The endpoint replaces one that WireGuard has learned.
    Forced,
}

/// The paths to all members that are looked at.
#[derive(Debug, Default)]
pub(super) struct Paths {
    all: BTreeMap<NodeId, Path>,
    /// When each has to be looked at.
    due: Deadlines,
    /// With the revision of the kernel's state that has it.
    steps: BTreeMap<NodeId, (Step, u64)>,
    greetings: VecDeque<(u32, NodeId)>,
    passed: PerSecond<PASSED_OF_ONE, PASSED_OF_ALL>,
    routine: Allowance<ROUTINE, ROUTINE>,
    probes: Allowance<PROBES, PROBES_AT_ONCE>,
    /// When there may be probes again.
    wait: Option<Time>,
    answered: PerSecond<ANSWERED_OF_ONE, ANSWERED_OF_ALL>,
    candidates: Option<(Time, Vec<NodeId>)>,
    /// How many more paths to members that were never reached there may be.
    unreached_room: usize,
}

impl Paths {
    pub(super) fn get(&self, peer: &NodeId) -> Option<&Path> {
        self.all.get(peer)
    }

    /// An answer with this number shows that the member speaks now.
    pub(super) fn greeting(&mut self, number: u32, peer: NodeId) {
        if self.greetings.len() >= GREETINGS {
            self.greetings.pop_front();
        }
        self.greetings.push_back((number, peer));
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        self.all.len()
    }

    /// Whether an answer with this number shows that the member speaks now.
    pub(super) fn proves(&self, from: &NodeId, part: &Part) -> bool {
        let Part::ProbeAnswer { number, .. } = part else { return false };
        self.greetings.contains(&(*number, *from))
            || self.all.get(from).is_some_and(|path| path.awaits(*number))
    }

    /// Whether the peer is left out of the kernel's state for a moment.
    pub(super) fn is_left_out(&self, peer: &NodeId) -> bool {
        matches!(self.steps.get(peer), Some((Step::Without, _)))
    }

    /// Whether the endpoint replaces one that WireGuard has learned.
    pub(super) fn is_forced(&self, peer: &NodeId) -> bool {
        matches!(self.steps.get(peer), Some((Step::Forced, _)))
    }

    /// The relay that the tunnel to a member takes.
    pub(super) fn relay_to(&self, peer: &NodeId) -> Option<NodeId> {
        self.all.get(peer)?.way().relay()
    }

    /// The relays that a path takes or might take.
    pub(super) fn relays(&self) -> impl Iterator<Item = (NodeId, bool)> {
        let of = |path: &Path| -> Vec<(NodeId, bool)> {
            let in_use = path.way().relay();
            path.relays().map(|(relay, _)| (*relay, in_use == Some(*relay))).collect()
        };
        self.all.values().flat_map(of)
    }

    /// The kernel's state is as it was, with the steps that are to be taken in it.
    pub(super) fn steps_need_nothing(&mut self) {
        self.steps.retain(|_, (_, revision)| *revision != u64::MAX);
    }

    /// Forgets the members that `keep` does not say.
    pub(super) fn retain(&mut self, keep: impl Fn(&NodeId) -> bool) {
        let gone: Vec<NodeId> = self.all.keys().filter(|id| !keep(id)).copied().collect();
        for id in gone {
            self.all.remove(&id);
            self.due.set(id, None);
        }
        self.steps.retain(|id, _| keep(id));
    }
}

/// When something is due for each of several members.
#[derive(Debug, Default)]
pub(super) struct Deadlines {
    of: BTreeMap<NodeId, Time>,
    order: BTreeSet<(Time, NodeId)>,
}

impl Deadlines {
    pub(super) fn set(&mut self, node: NodeId, at: Option<Time>) {
        let before = match at {
            Some(at) => self.of.insert(node, at),
            None => self.of.remove(&node),
        };
        if let Some(before) = before {
            self.order.remove(&(before, node));
        }
        self.order.extend(at.map(|at| (at, node)));
    }

    pub(super) fn first(&self) -> Option<(Time, NodeId)> {
        self.order.first().copied()
    }
}

impl Node {
    /// Whether the member has answered this node itself since its start, by a datagram or in a session.
    fn was_reached(&self, peer: &NodeId) -> bool {
        self.datagrams.address(peer).is_some()
            || self.direct_session_with(peer).is_some()
            || self.dialer.last_good(peer).is_some()
    }

    /// A session with a member, or a datagram from it, shows that it can be reached.
    pub(super) fn path_reached(&mut self, peer: &NodeId) {
        if let Some(path) = self.paths.all.get_mut(peer) {
            path.reached();
        }
    }

    /// Seconds between keepalives to a member; 0: none.
    pub(super) fn keepalive(&self, peer: &NodeId) -> u16 {
        let relayed = self.paths.relay_to(peer).is_some();
        let opened = self.paths.get(peer).is_some_and(|path| path.is_kept() || path.is_on_trial());
        let wanted = if relayed { self.leads(peer) } else { self.nats.behind_one() || opened };
        let wanted = self.keepalives_of_move().unwrap_or(wanted);
        if wanted { KEEPALIVE } else { 0 }
    }

    /// The counters of all tunnels are about to be looked at.
    pub(super) fn begin_observing(&mut self) {
        let unreached = self.paths.all.values().filter(|path| path.is_unreached()).count();
        self.paths.unreached_room = MAX_UNREACHED.saturating_sub(unreached);
    }

    /// What the tunnel to a member has carried. To be told for each one that there is a tunnel to.
    pub(super) fn observe_path(&mut self, peer: NodeId, before: Option<&TunnelFacts>, facts: &TunnelFacts) {
        let now = self.now;
        if self.is_out() {
            return;
        }
        if let Some(path) = self.paths.all.get_mut(&peer) {
            path.observe(facts, now);
            let next = path.next(now);
            let left = path.left();
            let young = now.since(path.reason().1) < JUST_CHOSEN;
            self.paths.due.set(peer, Some(next));
            let relay = left.and_then(|relay| self.datagrams.address(&relay));
            if relay.is_some() && relay == facts.endpoint && self.may_force(&peer) {
                // Something was still on its way through the relay, and WireGuard has followed it.
                self.take_step(peer, Step::Forced);
            } else if self.has_lane_moved(&peer) {
                self.take_step(peer, Step::Forced);
            } else if !self.leads(&peer) && self.paths.relay_to(&peer).is_none() {
                // WireGuard has followed the end that leads before that has said anything.
                let is_news = young || before.is_none_or(|before| before.endpoint != facts.endpoint);
                let endpoint = facts.endpoint.filter(|_| is_news);
                let relay = endpoint.and_then(|endpoint| self.relay_at(&endpoint, &peer));
                // Its own word is not enough: that address may be the other end's.
                let relay = relay.filter(|relay| self.datagrams.address(relay) == endpoint);
                self.found_relay(peer, relay);
            }
            return;
        }
        let bytes = |facts: &TunnelFacts| (facts.rx_bytes, facts.tx_bytes);
        let moved = match before {
            Some(before) => bytes(before) != bytes(facts),
            // What it was before this start, or before the last look, is of interest only if it came to nothing.
            None => facts.tx_bytes > 0 && facts.handshake_age.is_none(),
        };
        // Whoever ran here before may have chosen a relay, or the other end has.
        let new =
            facts.endpoint.filter(|endpoint| before.is_none_or(|before| before.endpoint != Some(*endpoint)));
        let relay = new.and_then(|endpoint| self.relay_at(&endpoint, &peer));
        let unreached = self.paths.unreached_room > 0
            && self.leads(&peer)
            && self.is_reachable(&peer)
            && !self.was_reached(&peer);
        if !moved && relay.is_none() && !unreached {
            return;
        }
        let Some(path) = self.path(peer) else { return };
        path.observe(before.unwrap_or(&TunnelFacts::default()), now);
        path.observe(facts, now);
        self.paths.unreached_room = self.paths.unreached_room.saturating_sub(usize::from(unreached));
        self.found_relay(peer, relay);
    }

    /// WireGuard sends to this relay.
    fn found_relay(&mut self, peer: NodeId, relay: Option<NodeId>) {
        let (now, path) = (self.now, self.paths.all.get_mut(&peer));
        let Some((relay, path)) = relay.zip(path) else { return };
        if path.found(Way::Relay(relay), now) {
            self.stale = true;
            self.want_registration(relay, true);
        }
    }

    /// Whether this end may have WireGuard send to the other end's own address: when that is one that it has, or the choice
    /// is this end's.
    fn may_force(&self, peer: &NodeId) -> bool {
        let address = self.datagrams.address(peer).map(|address| address.ip());
        let record = self.view.as_ref().and_then(|view| view.record(peer));
        let has_it = record.zip(address).is_some_and(|(record, address)| record.endpoints.contains(&address));
        has_it || self.leads(peer) || self.nats.behind_one()
    }

    /// A relay is at another address now: what goes through it goes there.
    pub(super) fn relay_moved(&mut self, relay: &NodeId) {
        let through = self.paths.all.iter().filter(|(_, path)| path.way() == Way::Relay(*relay));
        let peers: Vec<NodeId> = through.map(|(peer, _)| *peer).collect();
        for peer in peers {
            self.take_step(peer, Step::Forced);
        }
        self.register_again(relay);
    }

    /// The path to a member, which is looked at from now on; none when there are too many.
    fn path(&mut self, peer: NodeId) -> Option<&mut Path> {
        let (leads, unreached) = (self.leads(&peer), !self.was_reached(&peer));
        let heard = self.datagrams.heard(&peer);
        if self.paths.all.len() >= MAX_PATHS && !self.paths.all.contains_key(&peer) {
            return None;
        }
        let now = self.now;
        self.paths.due.set(peer, Some(now));
        Some(self.paths.all.entry(peer).or_insert_with(|| Path::new(leads, heard, unreached, now)))
    }

    /// The member other than `peer` whose control port this is.
    fn relay_at(&self, endpoint: &SocketAddr, peer: &NodeId) -> Option<NodeId> {
        let view = self.view.as_ref()?;
        let of_lanes = |lane: &crate::view::LaneInfo| lane.port == endpoint.port();
        if view.record(peer).is_none_or(|record| record.lanes.iter().any(of_lanes)) {
            return None;
        }
        let is_at = |id: &NodeId, record: &crate::view::NodeRecord| {
            self.datagrams.address(id) == Some(*endpoint)
                || (record.control_port == endpoint.port() && record.endpoints.contains(&endpoint.ip()))
        };
        let mut records = view.records().filter(|(id, _)| *id != peer && **id != self.id);
        records.find(|(id, record)| is_at(id, record)).map(|(id, _)| *id)
    }

    /// Something about the path to a member may be new, if it is looked at.
    pub(super) fn look_at_path(&mut self, peer: &NodeId, tell: impl FnOnce(&mut Path, Time)) {
        let now = self.now;
        if let Some(path) = self.paths.all.get_mut(peer) {
            tell(path, now);
            self.paths.due.set(*peer, Some(now));
        }
    }

    pub(super) fn advance_paths(&mut self) {
        let now = self.now;
        if self.is_out() || self.gossip.is_none() {
            return;
        }
        self.paths.wait = None;
        while let Some((_, peer)) = self.paths.due.first().filter(|(due, _)| *due <= now) {
            if !self.paths.probes.has_one(now) {
                self.paths.wait = Some(now + WAIT);
                return;
            }
            let in_doubt = self.paths.get(&peer).is_some_and(|path| path.is_in_doubt(now));
            if !in_doubt && !self.paths.routine.has_one(now) {
                let wait = WAIT + ROUTINE_WAIT.mul_f64(f64::from(self.rng.next_u32()) / f64::from(u32::MAX));
                self.paths.due.set(peer, Some(now + wait));
                continue;
            }
            let wants = self.paths.get(&peer).is_some_and(|path| path.wants_candidates(now));
            let candidates = wants.then(|| self.relay_candidates(&peer));
            let is_reachable = self.is_reachable(&peer);
            let opening = self.opening_for(&peer);
            // Who is gone is not looked for unless there is something to say.
            let is_idle = |path: &Path| {
                let is_gone = path.is_unreached() && path.way() == Way::Direct && !is_reachable;
                path.is_idle(now) || (is_gone && !path.is_watched(now))
            };
            if let Some(path) = self.paths.all.get_mut(&peer) {
                path.set_opening(opening);
            }
            let path = self.paths.all.get_mut(&peer).filter(|path| !is_idle(path));
            let Some(path) = path else {
                self.stale |= self.paths.all.remove(&peer).is_some_and(|path| path.is_kept());
                self.paths.due.set(peer, None);
                continue;
            };
            let (alarm, was_on_trial) = (path.alarms(now), path.is_on_trial());
            let acts = path.advance(candidates.as_deref(), &mut self.rng, now);
            // What is due at once again waits for the next moment.
            let next = path.next(now).max(now + MIN_TICK);
            self.stale |= path.is_on_trial() != was_on_trial;
            self.paths.due.set(peer, Some(next));
            let count = acts.iter().filter(|act| matches!(act, Act::Probe { .. })).count();
            let count = u32::try_from(count).unwrap_or(u32::MAX);
            self.paths.probes.take(count);
            if !in_doubt {
                self.paths.routine.take(count);
            }
            for act in acts {
                match act {
                    Act::Probe { way, number } => self.send_probe(peer, way, number, alarm),
                    Act::Moved { anew } => self.path_moved(peer, anew),
                }
            }
        }
    }

    pub(super) fn path_deadline(&self) -> Option<Time> {
        let due = self.paths.due.first().map(|(due, _)| due.max(self.paths.wait.unwrap_or(due)));
        due.filter(|_| !self.is_out() && self.gossip.is_some())
    }

    /// The tunnel to a member takes another way from now on.
    fn path_moved(&mut self, peer: NodeId, anew: bool) {
        let Some(path) = self.paths.all.get(&peer) else { return };
        let (way, (why, _)) = (path.way(), path.reason());
        match way {
            Way::Direct => tracing::info!(peer = %peer.short(), why = why.text(), "direct path"),
            Way::Relay(relay) => {
                tracing::info!(peer = %peer.short(), relay = %relay.short(), why = why.text(), "path through a relay");
                self.want_registration(relay, true);
            }
        }
        self.take_step(peer, if anew { Step::Without } else { Step::Forced });
    }

    fn take_step(&mut self, peer: NodeId, step: Step) {
        self.paths.steps.insert(peer, (step, u64::MAX));
        self.stale = true;
    }

    /// The steps that are to be taken are in this revision.
    pub(super) fn paths_in_revision(&mut self, revision: u64) {
        for (_, wanted) in self.paths.steps.values_mut().filter(|(_, wanted)| *wanted == u64::MAX) {
            *wanted = revision;
        }
    }

    /// The kernel has a revision: what was to be done once is done.
    pub(super) fn paths_applied(&mut self) {
        let before = self.paths.steps.len();
        let applied = self.applied;
        self.paths.steps.retain(|_, (_, revision)| *revision > applied);
        self.stale |= self.paths.steps.len() != before;
    }

    /// Members that might relay, those that are tried first in front.
    fn relay_candidates(&mut self, peer: &NodeId) -> Vec<NodeId> {
        let now = self.now;
        let fresh = self.paths.candidates.take().filter(|(at, _)| now.since(*at) < CANDIDATES);
        let (at, order) = fresh.unwrap_or_else(|| (now, self.order_of_relays()));
        let carrier = self.session_with(peer).and_then(|session| self.sessions.get(&session)?.way.carrier());
        let mut candidates: Vec<NodeId> = carrier.into_iter().collect();
        candidates.extend(order.iter().copied().filter(|id| id != peer && Some(*id) != carrier));
        self.paths.candidates = Some((at, order));
        candidates
    }

    /// First those that relay already, then by the length of the way; who is behind a NAT itself comes last.
    fn order_of_relays(&self) -> Vec<NodeId> {
        let Some((view, gossip)) = self.view.as_ref().zip(self.gossip.as_ref()) else { return Vec::new() };
        let mut order: Vec<_> = view
            .records()
            .map(|(id, _)| *id)
            .filter(|id| *id != self.id && self.is_reachable(id) && self.datagrams.address(id).is_some())
            .map(|id| {
                let rtt = gossip.acquaintance(&id).and_then(|(rtt, _)| rtt).unwrap_or(u32::MAX);
                (!self.registrations.is_in_use(&id), self.is_mapped(&id), rtt, id)
            })
            .collect();
        order.sort_unstable();
        order.into_iter().map(|(.., id)| id).collect()
    }

    fn probe_part(&self, peer: &NodeId, number: u32, alarm: bool) -> Part {
        let relay = self.paths.relay_to(peer).filter(|_| self.leads(peer));
        Part::Probe { number, relay, alarm }
    }

    fn send_probe(&mut self, peer: NodeId, way: Way, number: u32, alarm: bool) {
        let probe = self.probe_part(&peer, number, alarm);
        let parts: Vec<Part> = std::iter::once(probe).chain(self.lane_traffic(&peer)).collect();
        match way {
            Way::Direct => {
                let payload = payload_of(&parts);
                let known = self.datagrams.address(&peer);
                let works = self.paths.get(&peer).is_some_and(|path| path.direct().works(self.now));
                let mut addresses: Vec<SocketAddr> = known.into_iter().collect();
                if !works {
                    let others = self.addresses_of(&peer, self.dialer.last_good(&peer));
                    for address in self.nats.control_port(&peer).into_iter().chain(others) {
                        if !addresses.contains(&address) {
                            addresses.push(address);
                        }
                    }
                }
                for address in addresses.into_iter().take(ADDRESSES) {
                    self.seal_to(peer, address, &payload);
                }
                self.open_for_lane(peer);
            }
            Way::Relay(relay) => self.send_through(relay, peer, &parts),
        }
    }

    /// Sends a probe of the direct way that is no part of a path's.
    pub(super) fn probe_for_people(&mut self, peer: NodeId, number: u32, addresses: &[SocketAddr]) {
        self.paths.greeting(number, peer);
        let probe = self.probe_part(&peer, number, false);
        let parts: Vec<Part> = std::iter::once(probe).chain(self.lane_traffic(&peer)).collect();
        let payload = payload_of(&parts);
        for address in addresses {
            self.seal_to(peer, *address, &payload);
        }
    }

    /// Has a relay hand something on to a member.
    fn send_through(&mut self, relay: NodeId, peer: NodeId, parts: &[Part]) {
        let Some(address) = self.datagrams.address(&relay) else { return };
        let lane = self.registrations.seen_by(&relay).map(|address| Part::LaneAt { address });
        let parts: Vec<Part> = parts.iter().cloned().chain(lane).collect();
        let Some(datagram) = self.sealed(&peer, &payload_of(&parts)) else { return };
        self.seal_to(relay, address, &payload_of(&[Part::Pass { to: peer, datagram }]));
    }

    fn answer_by(&mut self, to: NodeId, origin: Origin, parts: &[Part]) {
        match origin {
            Origin::Address(address, _) => self.seal_to(to, address, &payload_of(parts)),
            Origin::Relay(relay) => self.send_through(relay, to, parts),
        }
    }

    /// A part of a datagram that is about paths; `proved`: it was sent now. Others are not for here.
    pub(super) fn on_path_part(&mut self, from: NodeId, origin: Origin, part: Part, proved: bool) {
        match (part, origin) {
            (Part::Probe { number, relay, alarm }, _) => {
                self.on_probe(from, origin, number, (relay, alarm), proved);
            }
            (Part::ProbeAnswer { number, ready, seen }, _) if proved => {
                if let (Origin::Address(..), Some(seen)) = (origin, seen) {
                    self.seen_at(from, seen.ip());
                }
                if matches!(origin, Origin::Address(..)) {
                    self.looks.answered(&from, number);
                }
                let way = match origin {
                    Origin::Address(..) => Way::Direct,
                    Origin::Relay(relay) => Way::Relay(relay),
                };
                if let Some(relay) = way.relay() {
                    self.want_registration(relay, false);
                }
                let ready = ready && way.relay().is_none_or(|relay| self.is_registered_at(&relay));
                let now = self.now;
                if let Some(path) = self.paths.all.get_mut(&from)
                    && path.answered(way, number, ready, now)
                {
                    let next = path.next(now);
                    self.paths.due.set(from, Some(next));
                }
            }
            (Part::LaneTraffic { lane, received, sent }, _) if proved => {
                self.on_lane_traffic(from, lane, received, sent);
            }
            (Part::Measured { number }, Origin::Address(..)) if proved => self.on_measured(from, number),
            (Part::Pass { to, datagram }, Origin::Address(address, _)) if proved => {
                self.pass_on((from, address), to, datagram);
            }
            (Part::LaneHello { key, serial }, Origin::Address(address, local)) if proved => {
                self.on_lane_hello(from, key, serial, (address, local));
            }
            (Part::LaneSeen { serial, address, known, .. }, Origin::Address(..)) if proved => {
                self.on_lane_seen(from, serial, address, known);
            }
            _ => {}
        }
    }

    fn on_probe(
        &mut self,
        from: NodeId,
        origin: Origin,
        number: u32,
        (chosen, alarm): (Option<NodeId>, bool),
        proved: bool,
    ) {
        let now = self.now;
        if !self.paths.answered.take(from, now) {
            return;
        }
        let (ready, seen) = match origin {
            Origin::Address(address, _) => (true, Some(address)),
            Origin::Relay(relay) => {
                self.want_registration(relay, false);
                (self.is_registered_at(&relay), None)
            }
        };
        let mut parts = vec![Part::ProbeAnswer { number, ready, seen }];
        parts.extend(self.lane_traffic(&from).take(if proved { usize::MAX } else { 0 }));
        if !proved {
            // The answer shows that the other end speaks now.
            let number = self.rng.next_u32();
            self.paths.greeting(number, from);
            parts.push(self.probe_part(&from, number, false));
        }
        self.answer_by(from, origin, &parts);
        if !proved {
            return;
        }
        if matches!(origin, Origin::Address(..)) {
            // The one that leads may choose this way, as it is answered.
            self.open_for_lane(from);
        }
        if alarm && let Some(path) = self.path(from) {
            let before = path.is_kept();
            path.alarm(matches!(origin, Origin::Address(..)), now);
            self.stale |= path.is_kept() != before;
        }
        if self.leads(&from) {
            return;
        }
        if let Some(path) = self.paths.all.get_mut(&from) {
            path.led(now);
        }
        let is_member = |relay: &NodeId| {
            *relay != from && self.gossip.as_ref().is_some_and(|gossip| gossip.is_member(relay))
        };
        let way = match chosen {
            None => Way::Direct,
            Some(relay) if is_member(&relay) => Way::Relay(relay),
            Some(_) => return,
        };
        // Whoever leads may be mistaken often, but not without end.
        let recent = self.paths.get(&from).is_some_and(|path| now.since(path.reason().1) < FOLLOWED);
        if self.paths.relay_to(&from) == way.relay() || (recent && way != Way::Direct) {
            return;
        }
        let Some(path) = self.path(from) else { return };
        path.found(way, now);
        self.stale = true;
        match way {
            Way::Relay(relay) => self.want_registration(relay, true),
            Way::Direct if self.may_force(&from) => self.take_step(from, Step::Forced),
            Way::Direct => {}
        }
    }

    /// A relay has lost what it knew: sessions through it are of no use.
    pub(super) fn relay_forgot(&mut self, relay: &NodeId) {
        let now = self.now;
        let Paths { all, due, .. } = &mut self.paths;
        for (peer, path) in all.iter_mut().filter(|(_, path)| path.relays().any(|(other, _)| other == relay))
        {
            path.relay_forgot(relay, now);
            due.set(*peer, Some(now));
        }
    }

    fn pass_on(&mut self, (from, source): (NodeId, SocketAddr), to: NodeId, datagram: Vec<u8>) {
        let is_member = self.gossip.as_ref().is_some_and(|gossip| gossip.is_member(&to));
        let Some(address) = self.datagrams.address(&to).filter(|_| is_member && to != from) else { return };
        if self.paths.passed.take(from, self.now) {
            let parts = [Part::PassedFrom { address: source }, Part::Passed { datagram }];
            self.seal_to(to, address, &payload_of(&parts));
        }
    }
}

fn payload_of(parts: &[Part]) -> Vec<u8> {
    let mut writer = Writer::default();
    for part in parts {
        // What does not fit came from a member that sent more than this version does.
        writer.push(part);
    }
    writer.take()
}
