//! Removing members, and being removed.

use std::collections::BTreeSet;
use std::time::Duration;

use mesh_keys::{IdentityKey, NodeId};

use super::gossip::PUSH_ITEMS;
use super::sessions::nearest_chain;
use super::writing::Pending;
use super::{Node, RequestId, SessionId};
use crate::api::{ApiError, ErrorCode};
use crate::message::{Message, RefusalCode};
use crate::state::StateFile;
use crate::view::{Delta, Frozen, Missing};

/// What is said to a node that was removed, and to who is one.
pub(super) const REMOVED: &str = "this identity was removed from the cluster and does not come back: to join as a new node, remove the state directory and start again";

/// Most bytes in a push to a node that may not take this one for a member yet: it takes no frames of more than 64 KiB.
const UNPROVEN_BYTES: usize = 48 << 10;

/// Next look at what has to be promised, while this node signs nothing.
const SETTLE_LATER: Duration = Duration::from_secs(2);

impl Node {
    /// Whether this node was removed, or was let in by one that was and is not kept.
    pub(super) fn is_out(&self) -> bool {
        self.view.as_ref().is_some_and(|view| !view.admissions().contains(&self.me))
    }

    /// Signs the removal of a member, if this node may.
    pub(super) fn on_remove(&mut self, request: RequestId, node: NodeId) {
        let removal = self.signing_speaker().and_then(|view| {
            view.removal(&node, &self.identity)
                .map_err(|error| ApiError::new(ErrorCode::Conflict, error.to_string()))
        });
        match removal {
            Ok(removal) => self.on_declare(request, &Delta { removals: vec![removal], ..Delta::default() }),
            Err(error) => self.reply(request, Err(error)),
        }
    }

    /// Draws the consequences of new removals: sessions and keys of those who are out are dropped.
    pub(super) fn heed_removals(&mut self, new: &Delta) {
        let Some(view) = &self.view else { return };
        if new.removals.is_empty() {
            return;
        }
        for removal in new.removals.iter().filter_map(|signed| signed.decode().ok()) {
            tracing::info!(node = %removal.subject.node_id().short(), by = %removal.signer.node_id().short(), heir = %removal.heir.node_id().short(), "member removed");
        }
        let members = view.admissions();
        let out = !members.contains(&self.me);
        let stays = |id: &NodeId| !out && members.key_of(id).is_some();
        if self.pairs.retain(stays) {
            self.dirty.insert(StateFile::Keys);
        }
        self.dialer.retain_members(stays);
        self.datagrams.retain(stays);
        self.paths.retain(stays);
        self.nats.retain(stays);
        self.mtus.retain(stays);
        self.registrations.retain(stays);
        self.flows.retain(stays);
        if let Some(gossip) = &mut self.gossip {
            gossip.retain_members(stays);
        }
        self.stale = true;
        let removed: Vec<IdentityKey> =
            new.removals.iter().filter_map(|signed| Some(signed.decode().ok()?.subject)).collect();
        self.tries.retain(|key| members.contains(key));
        let closing: Vec<SessionId> = self
            .sessions
            .iter()
            .filter(|(_, session)| {
                let known = members.was_admitted(&session.peer) || session.is_of_member();
                out || (known && !members.contains(&session.peer))
            })
            .map(|(id, _)| *id)
            .collect();
        if out {
            tracing::error!(
                "this node was removed from the cluster: it leases and grants no addresses and has no tunnels any more; to join as a new node, remove its state directory and start it again"
            );
        }
        for session in closing {
            if !out {
                self.prove_removal(session, &removed);
            }
            self.refuse(session, RefusalCode::Removed, REMOVED);
        }
    }

    /// Shows a node that it was removed, or that one was who let it in, through others or itself: a refusal alone is
    /// one member's word.
    pub(super) fn prove_removal(&mut self, session: SessionId, removed: &[IdentityKey]) {
        let Some(view) = &self.view else { return };
        let members = view.admissions();
        let ids: BTreeSet<_> = removed.iter().flat_map(|key| members.removals_of(key)).collect();
        let removals: Vec<_> = ids.iter().filter_map(|id| members.signed_removal(id)).cloned().collect();
        let signers: BTreeSet<_> =
            ids.iter().filter_map(|id| members.removal(id)).map(|removal| removal.signer).collect();
        let admissions = signers.iter().flat_map(|signer| nearest_chain(view, signer)).collect();
        let delta = Delta { admissions, removals, ..Delta::default() };
        for delta in delta.chunks(PUSH_ITEMS, UNPROVEN_BYTES) {
            self.send(session, &Message::Push { delta });
        }
    }

    /// Promises what has to be promised about removed nodes, and takes over what this node inherits. Durable
    /// before others hear of it.
    pub(super) fn settle_addresses(&mut self) {
        if self.doubt().is_some() {
            // As soon as that is over: what a copy signs would count as this node's word.
            self.next_settle = (!self.is_outdated()).then_some(self.now + SETTLE_LATER);
            return;
        }
        let Some(view) = &mut self.view else { return };
        let mut said = Delta::default();
        said.promises.extend(view.promise(&self.identity));
        let mut refused = view.merge(&said).refused;
        loop {
            // What was taken over may make this node the heir of others.
            let reclaims = view.reclaim(&self.identity);
            let merged = view.merge(&Delta { reclaims, ..Delta::default() });
            refused.extend(merged.refused);
            if merged.new.reclaims.is_empty() {
                break;
            }
            said.reclaims.extend(merged.new.reclaims);
        }
        for refused in refused {
            tracing::error!(refused, "what this node says about removed nodes is refused");
        }
        for reclaim in said.reclaims.iter().filter_map(|signed| signed.decode().ok()) {
            tracing::info!(node = %reclaim.removed.node_id().short(), "took over the addresses of a removed node");
        }
        if !said.is_empty() {
            self.persist(&[StateFile::Cluster], Pending::Granted { delta: Box::new(said) });
        }
    }

    /// What the status says about removals.
    pub(super) fn removal_problems(&self) -> Vec<String> {
        let Some(view) = &self.view else { return Vec::new() };
        let own = self.is_out().then(|| REMOVED.to_owned());
        own.into_iter().chain(view.frozen().iter().map(describe)).collect()
    }
}

fn describe(frozen: &Frozen) -> String {
    let nets: Vec<String> = frozen.ranges.nets().iter().map(ToString::to_string).collect();
    let waits: Vec<String> = frozen
        .missing
        .iter()
        .map(|missing| match missing {
            Missing::Promise(node) => {
                format!("{} to be heard from (or to be removed, if it does not come back)", node.short())
            }
            Missing::AdmissionsBy(node) => format!("news of nodes that {} let in", node.short()),
            Missing::Admission(node) => format!("news of node {}", node.short()),
            Missing::Statement(_) => "news of a grant".to_owned(),
            Missing::Heir(node) => format!("what the removed node {} had to be taken over", node.short()),
        })
        .collect();
    let waits = if waits.is_empty() {
        format!("node {} to take them over", frozen.heir.short())
    } else {
        waits.join(", ")
    };
    let what = if nets.is_empty() { "no addresses that are known here".to_owned() } else { nets.join(", ") };
    format!(
        "node {} was removed; its addresses ({what}) are frozen and wait for {waits}",
        frozen.removed.short()
    )
}
