//! Agreeing with each member on the pre-shared key of the tunnel between the two, and on when it may carry
//! traffic.
//!
//! The node with the lower id, C, leads; F follows. Both keep the key on disk.
//!
//! ```text
//! C → F  Probe(check)        does F hold the same key as C?
//! C ← F  Answer(same)        yes: done, the tunnel is confirmed
//!                            no:
//! C → F  Offer(epoch)        both derive the key from the session and the epoch
//!        F installs the peer with the key, but no route: it can answer, and starts nothing
//! C ← F  Staged(epoch)
//!        C installs the peer and its routes: its first packet finds F ready
//! C → F  Commit(epoch)
//!        F installs its routes
//! ```
//!
//! So no handshake meets an end that does not know the peer yet (WireGuard would wait 5 s before it tries again).
//! When a key is replaced, sessions of the tunnel live on through the moment in which the ends differ; whatever
//! is lost on the way, the next probe finds it. A tunnel that was confirmed keeps its routes meanwhile.

use std::time::Duration;

use mesh_keys::{NodeId, PairEnd, Psk, PskCheck, WgPublic, pair_psk, psk_check};
use rand_core::RngCore;

use super::{Node, SessionId};
use crate::message::Message;
use crate::state::{StateFile, StoredKey};
use crate::time::Time;

/// After this time without an answer the leader asks again.
const PATIENCE: Duration = Duration::from_secs(10);

/// The tunnel between this node and another one.
#[derive(Debug, Default)]
pub(super) struct Pair {
    agreed: Option<StoredKey>,
    /// Next time the leader asks; `None` once the key was compared on the present session.
    next_probe: Option<Time>,
    /// The session on which the key was last compared or agreed.
    session: Option<SessionId>,
    offered: Option<u64>,
    /// To be said once the kernel has a revision.
    when_applied: Option<(u64, SessionId, Message)>,
}

impl Pair {
    pub(super) fn restore(stored: StoredKey) -> Self {
        Self { agreed: Some(stored), ..Self::default() }
    }

    pub(super) fn stored(&self) -> Option<StoredKey> {
        self.agreed.clone()
    }

    /// The key to install for a peer with these tunnel keys, and whether routes may lead there.
    pub(super) fn key_for(&self, keys: (WgPublic, WgPublic)) -> Option<(&Psk, bool)> {
        self.agreed
            .as_ref()
            .filter(|agreed| agreed.keys == keys)
            .map(|agreed| (&agreed.psk, agreed.confirmed))
    }
}

impl Node {
    /// The tunnel keys of this node and a member: ours first.
    pub(super) fn tunnel_keys(&self, peer: &NodeId) -> Option<(WgPublic, WgPublic)> {
        let ours = self.config.lanes.first()?.key;
        let theirs = self.view.as_ref()?.record(peer)?.lanes.first()?.key;
        Some((ours, theirs))
    }

    fn leads(&self, peer: &NodeId) -> bool {
        self.id < *peer
    }

    /// Another session counts with this member now, or none.
    pub(super) fn pair_session_changed(&mut self, peer: NodeId) {
        let session = self.session_with(&peer);
        let (leads, now) = (self.leads(&peer), self.now);
        let pair = self.pairs.entry(peer).or_default();
        pair.next_probe = (session.is_some() && leads && pair.session != session).then_some(now);
    }

    /// The member says something new of itself, maybe another tunnel key.
    pub(super) fn pair_record_changed(&mut self, peer: &NodeId) {
        let keys = self.tunnel_keys(peer);
        let (leads, now, connected) = (self.leads(peer), self.now, self.session_with(peer).is_some());
        let Some(pair) = self.pairs.get_mut(peer) else { return };
        if keys.is_some() && pair.agreed.as_ref().map(|agreed| agreed.keys) != keys && leads && connected {
            pair.next_probe = Some(now);
        }
    }

    pub(super) fn advance_pairs(&mut self) {
        let now = self.now;
        let due: Vec<NodeId> = self
            .pairs
            .iter()
            .filter(|(_, pair)| pair.next_probe.is_some_and(|at| at <= now))
            .map(|(id, _)| *id)
            .collect();
        for peer in due {
            self.probe(peer);
        }
    }

    fn probe(&mut self, peer: NodeId) {
        let session = self.session_with(&peer);
        let keys = self.tunnel_keys(&peer);
        let binding = session.and_then(|id| self.sessions.get(&id)).map(|entry| entry.secrets.join_binding);
        let (me, now) = (self.id, self.now);
        let Some(pair) = self.pairs.get_mut(&peer) else { return };
        let (Some(session), Some(keys), Some(binding)) = (session, keys, binding) else {
            pair.next_probe = session.map(|_| now + PATIENCE);
            return;
        };
        pair.next_probe = Some(now + PATIENCE);
        pair.offered = None;
        let check = pair.key_for(keys).map(|(psk, _)| psk_check(psk, &binding, &me));
        self.send(session, &Message::PskProbe { keys, check });
    }

    pub(super) fn pair_deadline(&self) -> Option<Time> {
        self.pairs.values().filter_map(|pair| pair.next_probe).min()
    }

    pub(super) fn on_psk_probe(
        &mut self,
        session: SessionId,
        peer: NodeId,
        keys: (WgPublic, WgPublic),
        check: Option<PskCheck>,
    ) {
        if self.leads(&peer) {
            tracing::debug!(peer = %peer.short(), "a probe from the end that should follow");
            return;
        }
        let ours = (keys.1, keys.0);
        let known = self.tunnel_keys(&peer) == Some(ours);
        let Some(binding) = self.sessions.get(&session).map(|entry| entry.secrets.join_binding) else {
            return;
        };
        let pair = self.pairs.entry(peer).or_default();
        let same = known
            && match (pair.key_for(ours), check) {
                (Some((psk, _)), Some(check)) => psk_check(psk, &binding, &peer).matches(&check),
                _ => false,
            };
        pair.session = Some(session);
        self.send(session, &Message::PskAnswer { same });
        if same {
            self.confirm(peer);
        }
    }

    pub(super) fn on_psk_answer(&mut self, session: SessionId, peer: NodeId, same: bool) {
        if !self.leads(&peer) || self.session_with(&peer) != Some(session) {
            return;
        }
        let Some(keys) = self.tunnel_keys(&peer) else { return };
        if same {
            let pair = self.pairs.entry(peer).or_default();
            pair.next_probe = None;
            pair.session = Some(session);
            return self.confirm(peer);
        }
        let epoch = self.rng.next_u64();
        self.pairs.entry(peer).or_default().offered = Some(epoch);
        self.send(session, &Message::PskOffer { keys, epoch });
    }

    pub(super) fn on_psk_offer(
        &mut self,
        session: SessionId,
        peer: NodeId,
        keys: (WgPublic, WgPublic),
        epoch: u64,
    ) {
        let ours = (keys.1, keys.0);
        if self.leads(&peer) || self.tunnel_keys(&peer) != Some(ours) {
            // Its record, or ours, has not arrived at the other end: it asks again.
            tracing::debug!(peer = %peer.short(), "an offer for other tunnel keys");
            return;
        }
        self.adopt_key(session, peer, ours, epoch, false);
        self.say_when_applied(peer, session, Message::PskStaged { epoch });
    }

    pub(super) fn on_psk_staged(&mut self, session: SessionId, peer: NodeId, epoch: u64) {
        let Some(keys) = self.tunnel_keys(&peer) else { return };
        let Some(pair) = self.pairs.get_mut(&peer) else { return };
        if pair.offered != Some(epoch) || !self.id.lt(&peer) {
            return;
        }
        pair.offered = None;
        pair.next_probe = None;
        pair.session = Some(session);
        self.adopt_key(session, peer, keys, epoch, true);
        self.say_when_applied(peer, session, Message::PskCommit { epoch });
    }

    pub(super) fn on_psk_commit(&mut self, peer: NodeId, epoch: u64) {
        tracing::debug!(peer = %peer.short(), epoch, "pre-shared key committed");
        self.confirm(peer);
    }

    /// Takes the key of `session` and `epoch`. Routes stay if there were any.
    fn adopt_key(
        &mut self,
        session: SessionId,
        peer: NodeId,
        keys: (WgPublic, WgPublic),
        epoch: u64,
        confirmed: bool,
    ) {
        let Some(entry) = self.sessions.get(&session) else { return };
        let ours = PairEnd { node: self.id, wireguard: keys.0 };
        let theirs = PairEnd { node: peer, wireguard: keys.1 };
        let psk = pair_psk(&entry.secrets.psk_seed, &ours, &theirs, epoch);
        let pair = self.pairs.entry(peer).or_default();
        let before = pair.agreed.as_ref().is_some_and(|agreed| agreed.confirmed && agreed.keys == keys);
        pair.agreed = Some(StoredKey { psk, keys, confirmed: confirmed || before });
        self.dirty.insert(StateFile::Keys);
        tracing::info!(peer = %peer.short(), "pre-shared key agreed");
    }

    fn confirm(&mut self, peer: NodeId) {
        if let Some(agreed) = self.pairs.get_mut(&peer).and_then(|pair| pair.agreed.as_mut())
            && !agreed.confirmed
        {
            agreed.confirmed = true;
            self.dirty.insert(StateFile::Keys);
        }
    }

    /// Sends `message` as soon as the kernel has what this node now wants.
    fn say_when_applied(&mut self, peer: NodeId, session: SessionId, message: Message) {
        let revision = self.recompute_desired();
        if let Some(pair) = self.pairs.get_mut(&peer) {
            pair.when_applied = Some((revision, session, message));
        }
        self.pairs_applied();
    }

    /// The kernel has a revision: what waited for it is said. A lane that has a problem says nothing; the leader
    /// asks again.
    pub(super) fn pairs_applied(&mut self) {
        let lanes_ok = self
            .config
            .lanes
            .iter()
            .all(|lane| !self.problems.iter().any(|problem| problem.object == lane.device));
        let applied = self.applied;
        let ready: Vec<(SessionId, Message)> = self
            .pairs
            .values_mut()
            .filter_map(|pair| {
                pair.when_applied
                    .take_if(|(revision, _, _)| *revision <= applied)
                    .filter(|_| lanes_ok)
                    .map(|(_, session, message)| (session, message))
            })
            .collect();
        for (session, message) in ready {
            self.send(session, &message);
        }
    }
}
