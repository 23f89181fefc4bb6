//! Keeping all copies of the view equal, over control sessions.
//!
//! What is new is passed on at once to every member with a session. Besides, each node compares fingerprints
//! with one member now and then: what was lost on the way is found by that. (The seam for the datagram
//! protocol: [`Node::broadcast`] and the three messages Summary, Digest, Push.)

use std::time::Duration;

use mesh_keys::{NodeId, Signed};
use rand_core::RngCore;

use super::{Node, SessionId};
use crate::message::{Message, RefusalCode};
use crate::state::StateFile;
use crate::time::Time;
use crate::view::{Delta, LaneInfo, NodeRecord};

/// Pause between two comparisons.
const COMPARE_EVERY: Duration = Duration::from_secs(10);

/// Items in one push.
pub(super) const PUSH_ITEMS: usize = 256;

/// When the next comparison is due.
#[derive(Debug, Default)]
pub(super) struct Gossip {
    next: Time,
}

impl Node {
    /// First words to a member.
    pub(super) fn greet_member(&mut self, session: SessionId) {
        if let Some(view) = &self.view {
            let fingerprint = view.fingerprint();
            self.send(session, &Message::Summary { fingerprint });
        }
    }

    pub(super) fn on_member_message(&mut self, session: SessionId, peer: NodeId, message: Message) {
        let Some(view) = &mut self.view else { return };
        match message {
            Message::Summary { fingerprint } => {
                if fingerprint != view.fingerprint() {
                    let digest = view.digest();
                    self.send(session, &Message::Digest { digest, answer: true });
                }
            }
            Message::Digest { digest, answer } => {
                let missing = view.missing_in(&digest);
                let own = (answer && view.lacks(&digest)).then(|| view.digest());
                for delta in missing.chunks(PUSH_ITEMS) {
                    self.send(session, &Message::Push { delta });
                }
                if let Some(digest) = own {
                    self.send(session, &Message::Digest { digest, answer: false });
                }
            }
            Message::Push { delta } => {
                let merged = view.merge(&delta);
                for refused in &merged.refused {
                    tracing::debug!(peer = %peer.short(), refused, "part of a push was refused");
                }
                self.learned(&merged.new, Some(session));
            }
            Message::GrantAsk => self.on_grant_ask(peer),
            Message::PskProbe { keys, check } => self.on_psk_probe(session, peer, keys, check),
            Message::PskAnswer { same } => self.on_psk_answer(session, peer, same),
            Message::PskOffer { keys, epoch } => self.on_psk_offer(session, peer, keys, epoch),
            Message::PskStaged { epoch } => self.on_psk_staged(session, peer, epoch),
            Message::PskCommit { epoch } => self.on_psk_commit(peer, epoch),
            // A joiner that was welcomed says hello as a member, possibly after we took it for one.
            Message::Hello(_) => {}
            message @ (Message::Refuse(_)
            | Message::JoinOffer { .. }
            | Message::JoinKey { .. }
            | Message::JoinKeyOk { .. }
            | Message::JoinPassword { .. }
            | Message::JoinPasswordAnswer { .. }
            | Message::JoinPasswordFinish { .. }
            | Message::JoinPasswordOk
            | Message::JoinAsk
            | Message::Welcome { .. }
            | Message::WelcomePart { .. }) => {
                let reason = format!("a {} does not belong here", message.kind());
                self.refuse(session, RefusalCode::Protocol, &reason);
            }
        }
    }

    /// The view has grown by `new`.
    pub(super) fn learned(&mut self, new: &Delta, from: Option<SessionId>) {
        if new.is_empty() {
            return;
        }
        self.dirty.insert(StateFile::Cluster);
        for record in new.records.iter().filter_map(|signed| signed.decode().ok()) {
            if record.node == self.me {
                self.on_own_record(&record);
            } else {
                let id = record.node.node_id();
                tracing::debug!(peer = %id.short(), name = record.name, generation = record.generation, version = record.version, "record");
                self.pair_record_changed(&id);
            }
        }
        self.report_conflicts();
        // First to all, those who are out among them: that is how they hear of it.
        self.broadcast(new, from);
        self.heed_removals(new);
        self.settle_addresses();
    }

    /// Others hold a record of this node that it does not know of.
    fn on_own_record(&mut self, record: &NodeRecord) {
        if record.order() > (self.stored.generation, self.version) && !self.outdated {
            self.outdated = true;
            tracing::warn!(
                theirs = record.generation,
                ours = self.stored.generation,
                "another host has this node's identity, or its disk was put back to an older state: no address is leased or granted here until the state directory is removed and the node joins anew"
            );
        }
    }

    fn report_conflicts(&mut self) {
        if let Some(view) = &self.view {
            for conflict in view.grants().conflicts() {
                tracing::debug!(granter = %conflict.granter.short(), range = %conflict.range, loser = %conflict.loser.short(), "range granted twice");
            }
        }
    }

    /// Sends `delta` to every member with a session.
    pub(super) fn broadcast(&mut self, delta: &Delta, except: Option<SessionId>) {
        for (_, session) in self.member_sessions() {
            if Some(session) != except {
                for delta in delta.clone().chunks(PUSH_ITEMS) {
                    self.send(session, &Message::Push { delta });
                }
            }
        }
    }

    pub(super) fn advance_gossip(&mut self) {
        if self.view.is_none() || self.gossip.next > self.now {
            return;
        }
        let pause = self.jitter(COMPARE_EVERY);
        self.gossip.next = self.now + pause;
        let sessions = self.member_sessions();
        if !sessions.is_empty() {
            let pick = self.rng.next_u32() as usize % sessions.len();
            if let Some((_, session)) = sessions.get(pick) {
                self.greet_member(*session);
            }
        }
    }

    pub(super) fn gossip_deadline(&self) -> Option<Time> {
        self.view.is_some().then_some(self.gossip.next)
    }

    /// Says anew what this node is, if that has changed.
    pub(super) fn refresh_record(&mut self) {
        let (Some(view), Some(host)) = (&self.view, &self.host) else { return };
        if self.is_out() {
            return;
        }
        let cluster = view.cluster();
        let endpoints =
            if self.config.advertise.is_empty() { &host.addresses } else { &self.config.advertise };
        let ranges = (view.genesis().ipv4_range(), view.genesis().ipv6_range());
        let endpoints = endpoints
            .iter()
            .filter(|ip| match ip {
                std::net::IpAddr::V4(v4) => !ranges.0.contains(v4),
                std::net::IpAddr::V6(v6) => !ranges.1.contains(v6),
            })
            .take(16)
            .copied()
            .collect();
        let mut record = NodeRecord {
            cluster,
            node: self.me,
            generation: self.stored.generation,
            version: self.version,
            name: self.config.name.clone(),
            software: self.config.software.clone(),
            salt: 0,
            mesh_ipv4: self.stored.mesh_ipv4,
            control_port: self.config.control_port,
            endpoints,
            lanes: self
                .config
                .lanes
                .iter()
                .map(|lane| LaneInfo { index: lane.index, key: lane.key, port: lane.port })
                .collect(),
        };
        if view.record(&self.id) == Some(&record) {
            return;
        }
        self.version += 1;
        record.version = self.version;
        let signed = match Signed::sign(&record, &self.identity) {
            Ok(signed) => signed,
            Err(error) => {
                tracing::error!(%error, "this node's record cannot be signed");
                return;
            }
        };
        let Some(view) = &mut self.view else { return };
        let merged = view.merge(&Delta { records: vec![signed], ..Delta::default() });
        for refused in &merged.refused {
            tracing::error!(refused, "this node's own record is refused");
        }
        if !merged.new.is_empty() {
            self.dirty.insert(StateFile::Cluster);
            self.broadcast(&merged.new, None);
        }
    }
}
