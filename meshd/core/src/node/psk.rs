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
//! C → F  Probe(check)        and so on from the beginning: has it all arrived?
//! ```
//!
//! So no handshake meets an end that does not know the peer yet (WireGuard would wait 5 s before it tries again).
//! When a key is replaced, sessions of the tunnel live on through the moment in which the ends differ; whatever
//! is lost on the way, the next probe finds it. A tunnel that was confirmed keeps its routes meanwhile.
//!
//! A pair is *settled* when the key is confirmed and has been compared since both ends last started. Until then the
//! two call each other; then the control session between them may end.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use mesh_keys::{NodeId, PairEnd, Psk, PskCheck, WgPublic, pair_psk, psk_check};
use rand_core::RngCore;

use super::{Node, SessionId};
use crate::message::Message;
use crate::state::{StateFile, StoredKey};
use crate::time::Time;

/// After this time without an answer the leader asks again.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long the node with the higher id leaves the first call to the other.
const COURTESY: Duration = Duration::from_secs(1);

/// A newcomer is called by all others within as many times this span: not by thousands in the same moment.
const CALL_SPREAD: Duration = Duration::from_millis(5);

/// Keys are compared this long after they were agreed.
const COMPARE_AFTER: Duration = Duration::from_secs(1);

/// Next try after a session that ended too early.
const RETRY_LOST: Duration = Duration::from_millis(100);

/// Next try when too many calls are under way; longer when many wait for that.
const CALLS_BUSY: Duration = Duration::from_millis(100);

/// The tunnel between this node and another one.
#[derive(Debug, Default)]
pub(super) struct Pair {
    agreed: Option<StoredKey>,
    /// Start of the peer with which the key was last compared or agreed, by this start of ours.
    compared: Option<u64>,
    /// When the next step towards settling it is due; also in [`Pairs::due`].
    next: Option<Time>,
    offered: Option<u64>,
    /// To be said once the kernel has a revision.
    when_applied: Option<(u64, SessionId, Message)>,
}

/// The tunnels between this node and all others.
#[derive(Debug, Default)]
pub(super) struct Pairs {
    all: BTreeMap<NodeId, Pair>,
    due: BTreeSet<(Time, NodeId)>,
}

impl Pair {
    /// The key to install for a peer with these tunnel keys, and whether routes may lead there.
    pub(super) fn key_for(&self, keys: (WgPublic, WgPublic)) -> Option<(&Psk, bool)> {
        self.agreed
            .as_ref()
            .filter(|agreed| agreed.keys == keys)
            .map(|agreed| (&agreed.psk, agreed.confirmed))
    }
}

impl Pairs {
    pub(super) fn restore(stored: BTreeMap<NodeId, StoredKey>) -> Self {
        let pair = |key| Pair { agreed: Some(key), ..Pair::default() };
        Self { all: stored.into_iter().map(|(id, key)| (id, pair(key))).collect(), due: BTreeSet::new() }
    }

    pub(super) fn stored(&self) -> BTreeMap<NodeId, StoredKey> {
        self.all.iter().filter_map(|(id, pair)| Some((*id, pair.agreed.clone()?))).collect()
    }

    pub(super) fn get(&self, peer: &NodeId) -> Option<&Pair> {
        self.all.get(peer)
    }

    /// Keeps those that `keep` says; whether others went.
    pub(super) fn retain(&mut self, keep: impl Fn(&NodeId) -> bool) -> bool {
        let before = self.all.len();
        self.all.retain(|id, _| keep(id));
        self.due.retain(|(_, id)| keep(id));
        self.all.len() < before
    }

    fn set_next(&mut self, peer: NodeId, next: Option<Time>) {
        let pair = self.all.entry(peer).or_default();
        if let Some(before) = std::mem::replace(&mut pair.next, next) {
            self.due.remove(&(before, peer));
        }
        if let Some(next) = next {
            self.due.insert((next, peer));
        }
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

    /// Whether nothing has to be said about the tunnel with a member.
    pub(super) fn is_settled(&self, peer: &NodeId) -> bool {
        let Some(keys) = self.tunnel_keys(peer) else { return true };
        let generation =
            self.view.as_ref().and_then(|view| view.record(peer)).map(|record| record.generation);
        self.pairs.get(peer).is_some_and(|pair| {
            pair.compared == generation && pair.key_for(keys).is_some_and(|(_, confirmed)| confirmed)
        })
    }

    /// Another session counts with this member now, or none.
    pub(super) fn pair_session_changed(&mut self, peer: NodeId) {
        let leads = self.leads(&peer);
        let connected = self.session_with(&peer).is_some();
        if connected && leads {
            // The other end may have called because it is not settled there.
            self.pairs.all.entry(peer).or_default().compared = None;
        }
        let settled = self.is_settled(&peer);
        // Whoever leads speaks at once; without a session both try to have one.
        let pause = match (connected, leads) {
            (true, true) => Some(Duration::ZERO),
            (true, false) => Some(PATIENCE),
            (false, true) => Some(self.jitter(RETRY_LOST)),
            (false, false) => Some(COURTESY + self.jitter(RETRY_LOST)),
        };
        let next = pause.filter(|_| !settled).map(|pause| self.now + pause);
        self.pairs.set_next(peer, next);
    }

    /// The member says something new of itself, maybe another tunnel key, or that it has started anew.
    pub(super) fn pair_record_changed(&mut self, peer: &NodeId) {
        if self.config.max_calls == 0 || *peer == self.id || self.is_settled(peer) {
            return;
        }
        let waits = self.pairs.get(peer).is_some_and(|pair| pair.next.is_some());
        if self.session_with(peer).is_some() {
            return self.pair_session_changed(*peer);
        }
        if !waits {
            let members = self.gossip.as_ref().map_or(0, crate::gossip::Gossip::members);
            let span = CALL_SPREAD * u32::try_from(members).unwrap_or(u32::MAX);
            let pause = span * u32::from(self.rng.next_u32() as u16) / 65_536;
            let courtesy = if self.leads(peer) { Duration::ZERO } else { COURTESY };
            self.pairs.set_next(*peer, Some(self.now + courtesy + pause));
        }
    }

    /// Takes the next step with all that are not settled: a word, or a call.
    pub(super) fn advance_pairs(&mut self) {
        while let Some((_, peer)) = self.pairs.due.first().copied().filter(|(due, _)| *due <= self.now) {
            if self.is_settled(&peer) || self.is_out() {
                self.pairs.set_next(peer, None);
                continue;
            }
            let connected = self.session_with(&peer).is_some();
            let pause = match connected {
                true if self.leads(&peer) && self.is_established() => {
                    self.probe(peer);
                    PATIENCE
                }
                true => PATIENCE,
                false if !self.may_call() => {
                    let waiting = u32::try_from(self.pairs.due.len()).unwrap_or(u32::MAX);
                    self.jitter(CALLS_BUSY * (1 + waiting / 32))
                }
                false => self.call(peer),
            };
            self.pairs.set_next(peer, Some(self.now + pause));
        }
    }

    fn probe(&mut self, peer: NodeId) {
        let Some(session) = self.session_with(&peer) else { return };
        let binding = self.sessions.get(&session).map(|entry| entry.secrets.join_binding);
        let (Some(keys), Some(binding)) = (self.tunnel_keys(&peer), binding) else { return };
        let pair = self.pairs.all.entry(peer).or_default();
        pair.offered = None;
        let check = pair.key_for(keys).map(|(psk, _)| psk_check(psk, &binding, &self.id));
        self.send(session, &Message::PskProbe { keys, check });
    }

    /// Somebody has used this node's identity, and may have agreed on other keys in its name.
    pub(super) fn compare_all_keys(&mut self) {
        let peers: Vec<NodeId> = self.pairs.all.keys().copied().collect();
        for peer in peers {
            self.pair_fails(peer);
        }
    }

    /// Something is sent through the tunnel, and there are no handshakes: the keys are compared once more.
    pub(super) fn pair_fails(&mut self, peer: NodeId) {
        let Some(pair) = self.pairs.all.get_mut(&peer).filter(|pair| pair.next.is_none()) else { return };
        pair.compared = None;
        self.pair_record_changed(&peer);
    }

    /// This node may agree on keys from now on.
    pub(super) fn settle_pairs(&mut self) {
        let waiting: Vec<NodeId> = self.pairs.due.iter().map(|(_, peer)| *peer).collect();
        for peer in waiting {
            if self.session_with(&peer).is_some() {
                self.pairs.set_next(peer, Some(self.now));
            }
        }
    }

    pub(super) fn pair_deadline(&self) -> Option<Time> {
        self.pairs.due.first().map(|(due, _)| *due)
    }

    pub(super) fn on_psk_probe(
        &mut self,
        session: SessionId,
        peer: NodeId,
        keys: (WgPublic, WgPublic),
        check: Option<PskCheck>,
    ) {
        if self.leads(&peer) || !self.is_established() {
            tracing::debug!(peer = %peer.short(), "a probe from the end that should follow, or before this node is confirmed");
            return;
        }
        let ours = (keys.1, keys.0);
        let known = self.tunnel_keys(&peer) == Some(ours);
        let Some(binding) = self.sessions.get(&session).map(|entry| entry.secrets.join_binding) else {
            return;
        };
        let pair = self.pairs.get(&peer);
        let same = known
            && match (pair.and_then(|pair| pair.key_for(ours)), check) {
                (Some((psk, _)), Some(check)) => psk_check(psk, &binding, &peer).matches(&check),
                _ => false,
            };
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
            return self.confirm(peer);
        }
        let epoch = self.rng.next_u64();
        self.pairs.all.entry(peer).or_default().offered = Some(epoch);
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
        if self.session_with(&peer) != Some(session) {
            // Both ends called at once. What is agreed on the session that counts must not be replaced by an offer
            // that was made on the other one before, and comes later.
            return;
        }
        if self.leads(&peer) || !self.is_established() || self.tunnel_keys(&peer) != Some(ours) {
            // Its record, or ours, has not arrived at the other end: it asks again.
            tracing::debug!(peer = %peer.short(), "an offer for other tunnel keys");
            return;
        }
        self.adopt_key(session, peer, ours, epoch, false);
        self.say_when_applied(peer, session, Message::PskStaged { epoch });
    }

    pub(super) fn on_psk_staged(&mut self, session: SessionId, peer: NodeId, epoch: u64) {
        let Some(keys) = self.tunnel_keys(&peer) else { return };
        let leads = self.leads(&peer);
        let Some(pair) = self.pairs.all.get_mut(&peer) else { return };
        if pair.offered != Some(epoch) || !leads {
            return;
        }
        pair.offered = None;
        self.adopt_key(session, peer, keys, epoch, true);
        // It is settled once they have been compared: whether the commit arrives is not known.
        self.pairs.set_next(peer, Some(self.now + COMPARE_AFTER));
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
        let pair = self.pairs.all.entry(peer).or_default();
        let before = pair.agreed.as_ref().is_some_and(|agreed| agreed.confirmed && agreed.keys == keys);
        pair.agreed = Some(StoredKey { psk, keys, confirmed: confirmed || before });
        self.dirty.insert(StateFile::Keys);
        tracing::info!(peer = %peer.short(), "pre-shared key agreed");
    }

    /// Both ends have the key.
    fn confirm(&mut self, peer: NodeId) {
        let generation =
            self.view.as_ref().and_then(|view| view.record(&peer)).map(|record| record.generation);
        let Some(pair) = self.pairs.all.get_mut(&peer) else { return };
        let Some(agreed) = &mut pair.agreed else { return };
        pair.compared = generation;
        if !agreed.confirmed {
            agreed.confirmed = true;
            self.dirty.insert(StateFile::Keys);
        }
        if self.is_settled(&peer) {
            self.pairs.set_next(peer, None);
        }
    }

    /// Sends `message` as soon as the kernel has what this node now wants.
    fn say_when_applied(&mut self, peer: NodeId, session: SessionId, message: Message) {
        self.stale = true;
        let revision = self.recompute_desired();
        if let Some(pair) = self.pairs.all.get_mut(&peer) {
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
            .all
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
