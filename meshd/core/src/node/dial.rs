//! Whom to call, when, and at which address.
//!
//! Seeds are called until they are members that gossip reaches, and for ever when they are not, with growing pauses.
//! A member is called when there is something to say: the key of the tunnel is not settled ([`super::psk`]), or a
//! message waits for it. Members that gossip does not reach are called in turn, so that one whose datagrams are
//! dropped on the way is found all the same.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::Duration;

use mesh_keys::NodeId;

use super::sessions::{Phase, Session};
use super::{Node, Output, Seed};
use crate::message::{Message, RefusalCode};
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

/// Pause between calls to members that gossip does not reach, while they are not few among many.
const UNREACHABLE_PAUSE: Duration = Duration::from_secs(5);

/// A member that gossip does not reach is called by so many others in a pause, by one after the other.
const CALLERS: u32 = 64;

/// Calls to members under way at a time, unless configured.
pub const MAX_CALLS: usize = 16;

/// A call that has come to nothing for so long does not keep another address of the member from being called.
const ANOTHER_ADDRESS: Duration = Duration::from_millis(1500);

/// After so many calls in vain, what waits for a member is dropped: it must not keep others waiting.
const GIVE_UP: u32 = 8;

/// So many calls are tried before another member is asked to carry the session.
const DIRECT_FIRST: u32 = 2;

/// Messages that may wait for one member, and members they may wait for.
const MAX_WAITING: usize = 16;

/// The state of all calls.
#[derive(Debug, Default)]
pub(super) struct Dialer {
    seeds: BTreeMap<SocketAddr, SeedState>,
    members: BTreeMap<NodeId, MemberState>,
    in_flight: BTreeMap<SocketAddr, Option<NodeId>>,
    /// What is to be said to members as soon as there is a session, and when they are called next.
    waiting: BTreeMap<NodeId, (Time, Vec<Message>)>,
    next_unreachable: Time,
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
    /// The last call that came to nothing, if none has succeeded since.
    failed: Option<Box<(Time, String)>>,
    turn: usize,
    failures: u32,
    called: Time,
}

impl Dialer {
    /// Takes these for the seeds. What is known of one that was there before stays.
    pub(super) fn set_seeds(&mut self, seeds: &[Seed]) {
        let addresses: BTreeSet<SocketAddr> =
            seeds.iter().flat_map(|seed| seed.addresses.iter().copied()).collect();
        self.seeds.retain(|address, _| addresses.contains(address));
        addresses.into_iter().for_each(|address| {
            self.seeds.entry(address).or_default();
        });
    }

    pub(super) fn on_opened(&mut self, target: SocketAddr, node: NodeId) {
        self.in_flight.remove(&target);
        if let Some(state) = self.members.get_mut(&node) {
            state.failed = None;
        }
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

    pub(super) fn on_lost(&mut self, node: NodeId, last_good: Option<SocketAddr>, reason: &str) {
        let state = self.members.entry(node).or_default();
        state.last_good = last_good.or(state.last_good);
        state.last_error = Some(reason.to_owned());
    }

    /// A session with a member was ended here. Only an address that was called is known to be listened at.
    pub(super) fn on_ended(&mut self, node: NodeId, dialled: Option<SocketAddr>) {
        let state = self.members.entry(node).or_default();
        state.last_good = dialled.or(state.last_good);
    }

    /// What waited for a session with a member.
    pub(super) fn take_waiting(&mut self, node: &NodeId) -> Vec<Message> {
        self.waiting.remove(node).map(|(_, messages)| messages).unwrap_or_default()
    }

    /// Whether something waits for a session with a member.
    pub(super) fn is_waiting(&self, node: &NodeId) -> bool {
        self.waiting.contains_key(node)
    }

    /// A call through another member came to nothing.
    pub(super) fn on_not_carried(&mut self, node: NodeId, reason: &str) {
        if let Some(state) = self.members.get_mut(&node) {
            state.last_error.get_or_insert_with(|| reason.to_owned());
        }
    }

    /// Forgets the members that `keep` does not say.
    pub(super) fn retain_members(&mut self, keep: impl Fn(&NodeId) -> bool) {
        self.members.retain(|id, _| keep(id));
        self.waiting.retain(|id, _| keep(id));
    }

    /// Where a member was reached last.
    pub(super) fn last_good(&self, node: &NodeId) -> Option<SocketAddr> {
        self.members.get(node)?.last_good
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
            | RefusalCode::Known
            | RefusalCode::Protocol
            | RefusalCode::Removed
            | RefusalCode::JoinsClosed
            | RefusalCode::BadToken
            | RefusalCode::Unknown => {
                self.outcome(target, SeedOutcome::Refused(reason), Some(REFUSED_PAUSE), now);
            }
        }
    }

    fn outcome(&mut self, target: SocketAddr, outcome: SeedOutcome, pause: Option<Duration>, now: Time) {
        let member = self.in_flight.remove(&target).flatten().or_else(|| self.seeds.get(&target)?.node);
        if let Some(state) = member.and_then(|node| self.members.get_mut(&node)) {
            let (SeedOutcome::Absent(reason) | SeedOutcome::Refused(reason)) = &outcome else { return };
            state.last_error = Some(format!("{target}: {reason}"));
            if matches!(outcome, SeedOutcome::Absent(_)) {
                state.failed = Some(Box::new((now, format!("{target}: {reason}"))));
            }
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
        self.members.values_mut().for_each(|member| member.failures = 0);
        self.waiting.values_mut().for_each(|(next, _)| *next = Time::ZERO);
    }

    /// The last call of a member that failed, and why, if none has succeeded since.
    pub(super) fn last_failure(&self, node: &NodeId) -> Option<(Time, &str)> {
        self.members.get(node)?.failed.as_deref().map(|(at, reason)| (*at, reason.as_str()))
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
        let others = self.dialer.seeds.iter().filter(|(address, _)| !self.is_own(address));
        others.map(|(address, seed)| (*address, seed.outcome.clone())).collect()
    }

    pub(super) fn advance_dialer(&mut self) {
        self.call_seeds();
        let due: Vec<NodeId> = self
            .dialer
            .waiting
            .iter()
            .filter(|(_, (next, _))| *next <= self.now)
            .map(|(node, _)| *node)
            .collect();
        for node in due {
            let next = self.now + if self.may_call() { self.call(node) } else { MEMBER_PAUSE };
            let given_up = self.dialer.members.get(&node).is_some_and(|state| state.failures > GIVE_UP);
            if given_up {
                self.dialer.waiting.remove(&node);
            } else if let Some((at, _)) = self.dialer.waiting.get_mut(&node) {
                *at = next;
            }
        }
        let pause = self.unreachable_pause();
        // It was set while there were fewer.
        self.dialer.next_unreachable = self.dialer.next_unreachable.min(self.now + pause * 2);
        if self.has_unreachable() && self.dialer.next_unreachable <= self.now {
            self.dialer.next_unreachable = self.now + self.jitter(pause);
            let node = self.gossip.as_mut().and_then(crate::gossip::Gossip::pick_unreachable);
            if let Some(node) = node.filter(|node| self.may_call() && self.session_with(node).is_none()) {
                self.call(node);
            }
        }
    }

    fn unreachable_pause(&self) -> Duration {
        self.gossip
            .as_ref()
            .map_or(UNREACHABLE_PAUSE, |gossip| unreachable_pause(gossip.members(), gossip.unreachable()))
    }

    fn has_unreachable(&self) -> bool {
        self.gossip.as_ref().is_some_and(|gossip| gossip.unreachable() > 0)
    }

    /// The seeds that are to be called, each when its time has come.
    fn seeds_to_call(&self) -> impl Iterator<Item = (SocketAddr, &SeedState)> {
        let seeds = self.dialer.seeds.iter().map(|(address, seed)| (*address, seed));
        seeds.filter(|(address, seed)| {
            !self.seed_is_met(seed) && !self.dialer.in_flight.contains_key(address) && !self.is_own(address)
        })
    }

    /// Whether nothing has to be asked of a seed: there is a session, or it is a member that gossip reaches.
    fn seed_is_met(&self, seed: &SeedState) -> bool {
        let Some(node) = &seed.node else { return false };
        let heard = self.gossip.as_ref().is_some_and(|gossip| gossip.is_heard(node));
        let is_open = |(_, session): (_, &Session)| !matches!(session.phase, Phase::Closing);
        heard || self.sessions.with(node).any(is_open)
    }

    fn call_seeds(&mut self) {
        let now = self.now;
        let joining = self.view.is_none();
        let due = self.seeds_to_call().filter(|(_, seed)| seed.next <= now);
        let due: Vec<_> = due.map(|(address, seed)| (address, seed.failures)).collect();
        for (address, failures) in due {
            let (first, longest) =
                if joining { (JOIN_PAUSE, JOIN_PAUSE_MAX) } else { (MEMBER_PAUSE, MEMBER_PAUSE_MAX) };
            let pause = backoff(first, longest, failures);
            let pause = self.jitter(pause);
            if let Some(state) = self.dialer.seeds.get_mut(&address) {
                state.failures = failures.saturating_add(1);
                state.next = now + pause;
            }
            self.dialer.in_flight.insert(address, None);
            self.emit(Output::Dial { target: address });
        }
    }

    /// Whether another member may be called now.
    pub(super) fn may_call(&self) -> bool {
        self.dialer.in_flight.values().flatten().count() < self.config.max_calls
    }

    /// Whether a member was called a moment ago and has not answered yet.
    pub(super) fn is_calling(&self, node: &NodeId) -> bool {
        let recent = |state: &MemberState| self.now.since(state.called) < ANOTHER_ADDRESS;
        self.carrier.is_calling(node)
            || self.dialer.members.get(node).is_some_and(recent)
                && self.dialer.in_flight.values().any(|called| called.as_ref() == Some(node))
    }

    /// Calls a member at the next of its addresses. Returns the pause before it should be called again.
    pub(super) fn call(&mut self, node: NodeId) -> Duration {
        let state = self.dialer.members.entry(node).or_default();
        let (turn, failures, last_good) = (state.turn, state.failures, state.last_good);
        state.turn = turn.wrapping_add(1);
        state.called = self.now;
        state.failures = failures.saturating_add(1);
        // It may be that no way leads there: every other time another member is asked to carry the session.
        if failures >= DIRECT_FIRST && failures % 2 == 0 {
            self.call_through(node, ((failures - DIRECT_FIRST) / 2) as usize);
        }
        let candidates = self.addresses_of(&node, last_good);
        let count = candidates.len().max(1);
        if let Some(target) = candidates.get(turn % count).copied()
            && let std::collections::btree_map::Entry::Vacant(free) = self.dialer.in_flight.entry(target)
        {
            free.insert(Some(node));
            self.emit(Output::Dial { target });
        }
        self.jitter(backoff(MEMBER_PAUSE, MEMBER_PAUSE_MAX, failures))
    }

    /// Says something to a member: now, or as soon as there is a session. What cannot be said for long is dropped:
    /// whoever needs it asks again.
    pub(super) fn tell(&mut self, node: NodeId, message: Message) {
        if let Some(session) = self.session_with(&node) {
            return self.send(session, &message);
        }
        if !self.dialer.waiting.contains_key(&node) && self.dialer.waiting.len() >= MAX_WAITING {
            return;
        }
        let (_, waiting) = self.dialer.waiting.entry(node).or_insert_with(|| (self.now, Vec::new()));
        if waiting.len() < MAX_WAITING {
            waiting.push(message);
        }
    }

    /// A session with a member is needed, and nothing to be said in it yet.
    pub(super) fn want_session(&mut self, node: NodeId) {
        if self.dialer.waiting.contains_key(&node) || self.dialer.waiting.len() < MAX_WAITING {
            self.dialer.waiting.entry(node).or_insert_with(|| (self.now, Vec::new()));
        }
    }

    pub(super) fn dial_deadline(&self) -> Option<Time> {
        let seeds = self.seeds_to_call().map(|(_, seed)| seed.next);
        let waiting = self.dialer.waiting.values().map(|(next, _)| *next);
        let unreachable = self.has_unreachable().then_some(self.dialer.next_unreachable);
        seeds.chain(waiting).chain(unreachable).min()
    }

    /// Where a member's control port may be.
    pub(super) fn addresses_of(&self, node: &NodeId, last_good: Option<SocketAddr>) -> Vec<SocketAddr> {
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

/// Pause between two calls of one of `members` to one of those that gossip does not reach. The fewer these are and the
/// more there are to call them, the longer: they are not to be flooded, above all not when they come back. Whoever hears
/// from one by a datagram needs no call.
fn unreachable_pause(members: usize, unreachable: usize) -> Duration {
    let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
    UNREACHABLE_PAUSE * (count(members) / CALLERS.saturating_mul(count(unreachable.max(1)))).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_away_is_called_by_few_of_many() {
        for members in [1, 10, 100, 1_000, 5_000] {
            for unreachable in [1, 3, members / 2 + 1, members] {
                let pause = unreachable_pause(members, unreachable).as_secs_f64();
                assert!(pause >= 5.0);
                let calls = members as f64 / pause / unreachable as f64;
                assert!(calls <= 26.0, "{calls} calls a second to one of {unreachable} of {members}");
            }
        }
        assert_eq!(unreachable_pause(60, 1), UNREACHABLE_PAUSE);
    }
}
