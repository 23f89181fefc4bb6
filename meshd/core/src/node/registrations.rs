//! Lanes at relays: those of this node at others, and those of others here.
//!
//! A lane registers from its own port, whatever carries it: a datagram that is sealed for the relay, sent by the shell with
//! the lane's port as its source. So the relay learns where WireGuard's datagrams will come from, NATs included, and
//! this node learns in the answer what the relay sees.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use mesh_keys::{NodeId, WgPublic};

use super::{Node, Output};
use crate::gossip::wire::{Part, Writer};
use crate::relay::{Endpoint, REGISTERED_FOR};
use crate::time::Time;

/// Pause between two registrations: three in the time for which one counts.
const RENEWED: Duration = Duration::from_secs(20);

/// The same at a relay that carries something now: so it is noticed soon when it has started anew.
const WATCHED: Duration = Duration::from_secs(2);

/// Who probes through a relay, or is probed so, has been seen there lately: a NAT may have forgotten the lane since.
const SEEN_LATELY: Duration = Duration::from_secs(5);

/// Pause after one that is not answered, the first few times.
const IMPATIENCE: Duration = Duration::from_millis(300);
const IMPATIENT: u32 = 5;

/// A relay is used for so long after somebody has asked for it, or a path might have taken it.
const WANTED: Duration = Duration::from_secs(120);

/// Relays that this node registers at.
const MAX_RELAYS: usize = 64;

/// The lanes of this node at relays.
#[derive(Debug, Default)]
pub(super) struct Registrations {
    at: BTreeMap<NodeId, Registration>,
    count: u32,
    next: Option<Time>,
}

#[derive(Debug)]
struct Registration {
    wanted: Time,
    /// A tunnel goes through it.
    in_use: bool,
    next: Time,
    /// The last that was sent, and how many were since the last answer.
    serial: u64,
    unanswered: u32,
    /// The relay's generation: another one knows nothing of this.
    generation: u64,
    /// When the relay has said so last, and what it saw.
    seen: Option<(Time, SocketAddr)>,
}

impl Registrations {
    /// Whether a tunnel goes through that relay.
    pub(super) fn is_in_use(&self, relay: &NodeId) -> bool {
        self.at.get(relay).is_some_and(|registration| registration.in_use)
    }

    /// Where a relay sees this node's lane.
    pub(super) fn seen_by(&self, relay: &NodeId) -> Option<SocketAddr> {
        self.at.get(relay)?.seen.map(|(_, address)| address)
    }

    /// Forgets the members that `keep` does not say.
    pub(super) fn retain(&mut self, keep: impl Fn(&NodeId) -> bool) {
        self.at.retain(|id, _| keep(id));
        if self.at.is_empty() {
            self.next = None;
        }
    }
}

impl Node {
    /// Whether a relay has said that it serves this node's lane. When that was long ago, the lane is registered anew.
    pub(super) fn is_registered_at(&mut self, relay: &NodeId) -> bool {
        let now = self.now;
        let Some(registration) = self.registrations.at.get_mut(relay) else { return false };
        let age = registration.seen.map(|(at, _)| now.since(at));
        if registration.unanswered == 0 && age.is_none_or(|age| age >= SEEN_LATELY) {
            registration.next = now;
            self.registrations.next = Some(now);
        }
        age.is_some_and(|age| age < REGISTERED_FOR)
    }

    /// Something may come by way of a relay: this node's lane is to be registered there.
    pub(super) fn want_registration(&mut self, relay: NodeId, in_use: bool) {
        let now = self.now;
        let generation = self.generation_of(&relay);
        let registrations = &mut self.registrations;
        if !registrations.at.contains_key(&relay) {
            if registrations.at.len() >= MAX_RELAYS {
                // Any member can have this node register at others: what is in use stays.
                let idle = registrations.at.iter().filter(|(_, registration)| !registration.in_use);
                let oldest =
                    idle.min_by_key(|(_, registration)| registration.wanted).map(|(relay, _)| *relay);
                let Some(oldest) = oldest else { return };
                registrations.at.remove(&oldest);
            }
            let registration = Registration {
                wanted: now,
                in_use: false,
                next: now,
                serial: 0,
                unanswered: 0,
                generation,
                seen: None,
            };
            registrations.at.insert(relay, registration);
        }
        if let Some(registration) = registrations.at.get_mut(&relay) {
            registration.wanted = now + WANTED;
            if in_use && !std::mem::replace(&mut registration.in_use, true) {
                registration.next = registration.next.min(now + WATCHED);
            }
            let next = registration.next;
            registrations.next = Some(registrations.next.map_or(next, |before| before.min(next)));
        }
    }

    /// A member says something new of itself: when it has started anew, it relays nothing yet.
    pub(super) fn relay_record_changed(&mut self, relay: &NodeId) {
        let generation = self.generation_of(relay);
        let now = self.now;
        let Some(registration) = self.registrations.at.get_mut(relay) else { return };
        if registration.generation != generation {
            let was_served = registration.seen.take().is_some();
            (registration.generation, registration.unanswered, registration.next) = (generation, 0, now);
            self.registrations.next = Some(now);
            if was_served {
                self.relay_forgot(relay);
            }
        }
    }

    /// This node's lane is to be registered anew wherever it is.
    pub(super) fn register_everywhere(&mut self) {
        let now = self.now;
        let is_old = |registration: &Registration| {
            let lately = registration.seen.is_some_and(|(at, _)| now.since(at) < SEEN_LATELY);
            registration.unanswered == 0 && !lately
        };
        for registration in self.registrations.at.values_mut().filter(|registration| is_old(registration)) {
            registration.next = now;
            self.registrations.next = Some(now);
        }
    }

    /// This node's lane is to be registered at a relay now, if it is registered there.
    pub(super) fn register_again(&mut self, relay: &NodeId) {
        let now = self.now;
        if let Some(registration) = self.registrations.at.get_mut(relay) {
            registration.next = now;
            self.registrations.next = Some(now);
        }
    }

    fn generation_of(&self, node: &NodeId) -> u64 {
        let record = self.view.as_ref().and_then(|view| view.record(node));
        record.map_or(0, |record| record.generation)
    }

    pub(super) fn advance_registrations(&mut self) {
        let now = self.now;
        if self.registrations.next.is_none_or(|next| next > now) || self.is_out() {
            return;
        }
        let mut relays: BTreeMap<NodeId, bool> = BTreeMap::new();
        for (relay, in_use) in self.paths.relays() {
            *relays.entry(relay).or_default() |= in_use;
        }
        for (relay, registration) in &mut self.registrations.at {
            registration.in_use = relays.get(relay).copied().unwrap_or_default();
        }
        for (relay, in_use) in relays {
            self.want_registration(relay, in_use);
        }
        self.registrations.at.retain(|_, registration| registration.wanted > now);
        let due: Vec<NodeId> = self
            .registrations
            .at
            .iter()
            .filter(|(_, registration)| registration.next <= now)
            .map(|(relay, _)| *relay)
            .collect();
        for relay in due {
            self.register_at(relay);
        }
        self.registrations.next = self.registrations.at.values().map(|registration| registration.next).min();
    }

    pub(super) fn registration_deadline(&self) -> Option<Time> {
        self.registrations.next.filter(|_| !self.is_out())
    }

    fn register_at(&mut self, relay: NodeId) {
        let now = self.now;
        self.registrations.count = self.registrations.count.wrapping_add(1);
        // Grows over restarts as well.
        let serial = (self.stored.generation << 32) | u64::from(self.registrations.count);
        let Some(registration) = self.registrations.at.get_mut(&relay) else { return };
        registration.unanswered = registration.unanswered.saturating_add(1);
        registration.serial = serial;
        let pause = match registration {
            Registration { unanswered: 2..IMPATIENT, .. }
            | Registration { seen: None, unanswered: 1, .. } => IMPATIENCE,
            Registration { in_use: true, .. } => WATCHED,
            Registration { .. } => RENEWED,
        };
        registration.next = now + pause;
        let Some(lane) = self.config.lanes.first() else { return };
        let (port, key) = (lane.port, lane.key);
        let Some(address) = self.datagrams.address(&relay) else { return };
        let mut writer = Writer::default();
        writer.push(&Part::LaneHello { key, serial });
        if let Some(bytes) = self.sealed(&relay, &writer.take()) {
            self.emit(Output::LaneDatagram { port, to: address, bytes });
        }
        // What the relay hands on comes to the control port: that stays open on the way, too.
        if let Some(gossip) = &mut self.gossip {
            gossip.ping_once(relay);
        }
        self.send_gossip(None, usize::MAX);
    }

    /// A relay serves this node's lane.
    pub(super) fn on_lane_seen(&mut self, relay: NodeId, serial: u64, address: SocketAddr, known: bool) {
        let now = self.now;
        let Some(registration) = self.registrations.at.get_mut(&relay) else { return };
        if registration.serial != serial {
            return;
        }
        let before = registration.seen.replace((now, address));
        // Each is answered once.
        (registration.unanswered, registration.serial) = (0, 0);
        let pause = if registration.in_use { WATCHED } else { RENEWED };
        registration.next = registration.next.max(now + pause);
        if before.is_none_or(|(_, before)| before != address) {
            tracing::debug!(relay = %relay.short(), %address, "registered at a relay");
        }
        if before.is_some_and(|(_, before)| before != address) {
            // What one relay sees, the others will.
            self.register_everywhere();
        }
        self.seen_at(relay, address.ip());
        if !known && before.is_some_and(|(at, _)| now.since(at) < REGISTERED_FOR) {
            self.relay_forgot(&relay);
        }
    }

    /// A member wants this node to relay for its lane: for one whose key it has shown to hold, see [`super::psk`].
    pub(super) fn on_lane_hello(
        &mut self,
        from: NodeId,
        key: WgPublic,
        serial: u64,
        (remote, local): (SocketAddr, Option<IpAddr>),
    ) {
        if self.owners.get(&key) != Some(&from) || self.is_out() {
            return tracing::debug!(peer = %from.short(), %key, "no relay for a lane that is not known to be its own");
        }
        self.emit(Output::Register { node: from, key, endpoint: Endpoint { remote, local }, serial });
    }

    /// The shell relays for a lane: its node hears of it.
    pub(super) fn on_registered(
        &mut self,
        node: NodeId,
        key: WgPublic,
        serial: u64,
        address: SocketAddr,
        known: bool,
    ) {
        let Some(to) = self.datagrams.address(&node) else { return };
        let mut writer = Writer::default();
        writer.push(&Part::LaneSeen { key, serial, address, known });
        self.seal_to(node, to, &writer.take());
    }
}
