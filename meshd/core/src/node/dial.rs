//! Whom to call, when, and at which address.
//!
//! Seeds and members without a session are tried for ever, with growing pauses. Both ends of a pair try; the
//! one with the higher id waits a moment first, so that in the usual case one session comes of it and not two.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::Duration;

use mesh_keys::NodeId;

use super::{Node, Output};
use crate::message::RefusalCode;
use crate::time::Time;

/// First pause of a node that is in no cluster yet, doubled with each failure.
const JOIN_PAUSE: Duration = Duration::from_millis(200);

/// Longest pause of a node that is in no cluster yet.
const JOIN_PAUSE_MAX: Duration = Duration::from_secs(2);

/// First pause of a member.
const MEMBER_PAUSE: Duration = Duration::from_millis(500);

/// Longest pause of a member: a lost node is found again within it.
const MEMBER_PAUSE_MAX: Duration = Duration::from_secs(30);

/// Pause after a refusal that time does not heal.
const REFUSED_PAUSE: Duration = Duration::from_secs(30);

/// How long the node with the higher id leaves the first call to the other.
const COURTESY: Duration = Duration::from_secs(1);

/// The state of all calls.
#[derive(Debug, Default)]
pub(super) struct Dialer {
    seeds: BTreeMap<SocketAddr, SeedState>,
    members: BTreeMap<NodeId, MemberState>,
    in_flight: BTreeMap<SocketAddr, Option<NodeId>>,
}

#[derive(Debug, Default)]
struct SeedState {
    node: Option<NodeId>,
    outcome: SeedOutcome,
    failures: u32,
    next: Time,
}

/// What a seed said last.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) enum SeedOutcome {
    /// Nothing yet.
    #[default]
    Unknown,
    /// Nobody answers there, or only a node that is in no cluster itself.
    Absent(String),
    /// There is a cluster, and it does not let us in.
    Refused(String),
}

#[derive(Debug, Default)]
struct MemberState {
    last_good: Option<SocketAddr>,
    last_error: Option<String>,
    turn: usize,
    failures: u32,
    next: Time,
}

impl Dialer {
    pub(super) fn on_opened(&mut self, target: SocketAddr, node: NodeId) {
        self.in_flight.remove(&target);
        if let Some(seed) = self.seeds.get_mut(&target) {
            seed.node = Some(node);
        }
    }

    pub(super) fn on_member(&mut self, node: NodeId) {
        let state = self.members.entry(node).or_default();
        state.failures = 0;
        state.last_error = None;
        for seed in self.seeds.values_mut().filter(|seed| seed.node == Some(node)) {
            seed.failures = 0;
        }
    }

    pub(super) fn on_lost(&mut self, node: NodeId, last_good: Option<SocketAddr>, reason: &str, now: Time) {
        let state = self.members.entry(node).or_default();
        state.last_good = last_good.or(state.last_good);
        state.last_error = Some(reason.to_owned());
        state.next = now;
    }

    pub(super) fn on_failed(&mut self, target: SocketAddr, reason: String, now: Time) {
        self.outcome(target, SeedOutcome::Absent(reason), None, now);
    }

    pub(super) fn on_refused(&mut self, target: SocketAddr, code: RefusalCode, reason: String, now: Time) {
        match code {
            RefusalCode::NoCluster => self.outcome(target, SeedOutcome::Absent(reason), None, now),
            RefusalCode::Busy => self.outcome(target, SeedOutcome::Refused(reason), None, now),
            RefusalCode::Version
            | RefusalCode::OtherCluster
            | RefusalCode::NotMember
            | RefusalCode::WrongKey
            | RefusalCode::WrongPassword
            | RefusalCode::WrongMethod
            | RefusalCode::Protocol
            | RefusalCode::Removed => {
                self.outcome(target, SeedOutcome::Refused(reason), Some(REFUSED_PAUSE), now);
            }
        }
    }

    fn outcome(&mut self, target: SocketAddr, outcome: SeedOutcome, pause: Option<Duration>, now: Time) {
        let member = self.in_flight.remove(&target).flatten().or_else(|| self.seeds.get(&target)?.node);
        if let Some(state) = member.and_then(|node| self.members.get_mut(&node)) {
            let (SeedOutcome::Absent(reason) | SeedOutcome::Refused(reason)) = &outcome else { return };
            state.last_error = Some(format!("{target}: {reason}"));
        }
        if let Some(seed) = self.seeds.get_mut(&target) {
            seed.outcome = outcome;
            if let Some(pause) = pause {
                seed.next = now + pause;
            }
        }
    }

    /// Everything is tried again at once: the host's addresses have changed.
    pub(super) fn reset_backoff(&mut self) {
        self.seeds.values_mut().for_each(|seed| (seed.failures, seed.next) = (0, Time::ZERO));
        self.members.values_mut().for_each(|member| (member.failures, member.next) = (0, Time::ZERO));
    }

    /// Why there is no session with a member, as far as known.
    pub(super) fn last_error(&self, node: &NodeId) -> Option<String> {
        self.members.get(node)?.last_error.clone()
    }
}

impl Node {
    pub(super) fn on_dial_failed(&mut self, target: SocketAddr, reason: String) {
        tracing::debug!(%target, reason, "call failed");
        self.dialer.on_failed(target, reason, self.now);
    }

    /// Whether `address` is this node's own control address.
    pub(super) fn is_own(&self, address: &SocketAddr) -> bool {
        let known = self.dialer.seeds.get(address).and_then(|seed| seed.node) == Some(self.id);
        let ip = address.ip();
        let local = ip.is_loopback()
            || self.host.as_ref().is_some_and(|host| host.addresses.contains(&ip))
            || self.config.advertise.contains(&ip);
        known || (local && address.port() == self.config.control_port)
    }

    /// What the seeds said, own addresses left out.
    pub(super) fn seed_outcomes(&self) -> Vec<(SocketAddr, SeedOutcome)> {
        self.seed_addresses()
            .into_iter()
            .map(|address| {
                let outcome = self.dialer.seeds.get(&address).map(|seed| seed.outcome.clone());
                (address, outcome.unwrap_or_default())
            })
            .collect()
    }

    fn seed_addresses(&self) -> Vec<SocketAddr> {
        let all: BTreeSet<SocketAddr> =
            self.config.seeds.iter().flat_map(|seed| seed.addresses.iter().copied()).collect();
        all.into_iter().filter(|address| !self.is_own(address)).collect()
    }

    pub(super) fn advance_dialer(&mut self) {
        if self.is_out() {
            return;
        }
        let now = self.now;
        let joining = self.view.is_none();
        for address in self.seed_addresses() {
            let state = self.dialer.seeds.entry(address).or_default();
            let has_session = state.node.is_some_and(|node| {
                self.sessions
                    .values()
                    .any(|s| s.peer.node_id() == node && !matches!(s.phase, super::sessions::Phase::Closing))
            });
            if state.next > now || has_session || self.dialer.in_flight.contains_key(&address) {
                continue;
            }
            let (first, longest) =
                if joining { (JOIN_PAUSE, JOIN_PAUSE_MAX) } else { (MEMBER_PAUSE, MEMBER_PAUSE_MAX) };
            let pause = backoff(first, longest, state.failures);
            state.failures = state.failures.saturating_add(1);
            let pause = self.jitter(pause);
            if let Some(state) = self.dialer.seeds.get_mut(&address) {
                state.next = now + pause;
            }
            self.dialer.in_flight.insert(address, None);
            self.emit(Output::Dial { target: address });
        }
        for node in self.unconnected_members() {
            let me_first = self.id < node;
            let state = self.dialer.members.entry(node).or_insert_with(|| MemberState {
                next: if me_first { now } else { now + COURTESY },
                ..Default::default()
            });
            if state.next > now {
                continue;
            }
            let (turn, failures, last_good) = (state.turn, state.failures, state.last_good);
            let candidates = self.addresses_of(&node, last_good);
            let pause = self.jitter(backoff(MEMBER_PAUSE, MEMBER_PAUSE_MAX, failures));
            if let Some(state) = self.dialer.members.get_mut(&node) {
                state.next = now + pause;
                state.turn = turn.wrapping_add(1);
                state.failures = failures.saturating_add(1);
            }
            let count = candidates.len().max(1);
            if let Some(target) = candidates.get(turn % count).copied()
                && let std::collections::btree_map::Entry::Vacant(free) = self.dialer.in_flight.entry(target)
            {
                free.insert(Some(node));
                self.emit(Output::Dial { target });
            }
        }
    }

    pub(super) fn dial_deadline(&self) -> Option<Time> {
        if self.is_out() {
            return None;
        }
        let seeds = self.seed_addresses().into_iter().filter_map(|address| {
            let state = self.dialer.seeds.get(&address)?;
            let connected = state.node.is_some_and(|node| self.session_with(&node).is_some());
            (!connected && !self.dialer.in_flight.contains_key(&address)).then_some(state.next)
        });
        let members = self
            .unconnected_members()
            .into_iter()
            .filter_map(|node| Some(self.dialer.members.get(&node)?.next));
        seeds.chain(members).min()
    }

    fn unconnected_members(&self) -> Vec<NodeId> {
        let Some(view) = &self.view else { return Vec::new() };
        view.records()
            .map(|(id, _)| *id)
            .filter(|id| *id != self.id && self.session_with(id).is_none())
            .collect()
    }

    fn addresses_of(&self, node: &NodeId, last_good: Option<SocketAddr>) -> Vec<SocketAddr> {
        let Some(record) = self.view.as_ref().and_then(|view| view.record(node)) else { return Vec::new() };
        let port = record.control_port;
        // A remembered peer may have called us: its address is good, its port was any.
        let remembered = last_good.map(|address| SocketAddr::new(address.ip(), port));
        let mut addresses: Vec<SocketAddr> = Vec::new();
        for address in
            remembered.into_iter().chain(record.endpoints.iter().map(|ip| SocketAddr::new(*ip, port)))
        {
            if !addresses.contains(&address) && !self.is_own(&address) {
                addresses.push(address);
            }
        }
        addresses
    }
}

fn backoff(first: Duration, longest: Duration, failures: u32) -> Duration {
    first.saturating_mul(1u32.checked_shl(failures.min(16)).unwrap_or(u32::MAX)).min(longest)
}
