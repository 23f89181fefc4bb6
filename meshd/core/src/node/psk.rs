//! Agreeing with each member on the pre-shared keys of the tunnels between the two, and on when they may carry
//! traffic.
//!
//! Each lane of this node and the member's lane with the same number have a tunnel, as far as both have one: so on no
//! device a member's ranges have two owners. Each tunnel has a key of its own, agreed by itself.
//!
//! The node with the lower id, C, leads; F follows. Both keep the keys on disk. Each agreement has a number, drawn by C.
//!
//! ```text
//! C → F  Probe(number, check)     does F hold the same key as C?
//! C ← F  Answer(number, check)    yes: done, the tunnel is confirmed. No, without a check:
//! C → F  Offer(number, check)     both derive the key from the session, their lanes' secrets and the number
//!        F installs the peer with the key, but no route: it can answer, and starts nothing
//! C ← F  Staged(number, check)
//!        C installs the peer and its routes: its first packet finds F ready
//! C → F  Commit(number, check)
//!        F installs its routes
//! C → F  Probe(number, check)     and so on from the beginning: has it all arrived?
//! ```
//!
//! Nothing is done on a bare word. Each check is a MAC by the key that it is about, over who says it, what, in which
//! session and under which number ([`psk_check`]); and the key takes the secret of one of the two lanes to derive
//! ([`pair_psk`]). So a member that says another's tunnel key is its own never gets as far as a peer in anybody's
//! kernel. It stays unsettled, and is asked again as long as it says so.
//!
//! F asks for a probe by an answer to none, when it has reason to and C has been silent.
//!
//! So no handshake meets an end that does not know the peer yet (WireGuard would wait 5 s before it tries again).
//! When a key is replaced, sessions of the tunnel live on through the moment in which the ends differ; whatever
//! is lost on the way, the next probe finds it. A tunnel that was confirmed keeps its routes meanwhile.
//!
//! A pair is *settled* when all its keys are confirmed and have been compared since both ends last started. Until then the
//! two call each other; then the control session between them may end.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use mesh_keys::{NodeId, PairEnd, Psk, PskCheck, PskStep, WgPublic, pair_psk, psk_check};
use rand_core::RngCore;

use super::{LaneConfig, Node, SessionId};
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

/// The tunnels between this node and another one.
#[derive(Debug, Default)]
pub(super) struct Pair {
    /// In the order of this node's lanes.
    lanes: Vec<LanePair>,
    /// When the next step towards settling it is due; also in [`Pairs::due`].
    next: Option<Time>,
}

/// The tunnel between a lane of this node and one of another.
#[derive(Debug, Default)]
struct LanePair {
    agreed: Option<StoredKey>,
    /// Start of the peer with which the key was last compared or agreed, by this start of ours.
    compared: Option<u64>,
    /// The agreement that this node leads at present.
    round: Option<Round>,
    /// The agreement of which the key is installed here, and not yet at the leader.
    staged: Option<(SessionId, u64)>,
    /// The tunnel key that the peer could not prove to be its own: said once.
    doubted: Option<WgPublic>,
}

/// An agreement under way, at the end that leads.
#[derive(Debug)]
struct Round {
    session: SessionId,
    epoch: u64,
    keys: (WgPublic, WgPublic),
    offered: Option<Psk>,
}

/// The tunnels between this node and all others.
#[derive(Debug, Default)]
pub(super) struct Pairs {
    all: BTreeMap<NodeId, Pair>,
    due: BTreeSet<(Time, NodeId)>,
    /// To be said to a peer about one of its lanes once the kernel has a revision.
    when_applied: BTreeMap<(NodeId, usize), (u64, SessionId, Message)>,
}

impl Pair {
    /// The key to install for a peer with these tunnel keys, and whether routes may lead there.
    pub(super) fn key_for(&self, keys: (WgPublic, WgPublic)) -> Option<(&Psk, bool)> {
        self.lanes.iter().find_map(|lane| lane.key_for(keys))
    }

    /// Whether the peer could not prove that this tunnel key is its own.
    pub(super) fn is_doubted(&self, key: &WgPublic) -> bool {
        self.lanes.iter().any(|lane| lane.doubted.as_ref() == Some(key))
    }

    fn lane(&mut self, at: usize) -> &mut LanePair {
        if self.lanes.len() <= at {
            self.lanes.resize_with(at + 1, LanePair::default);
        }
        &mut self.lanes[at]
    }

    fn is_to_be_compared(&mut self) {
        self.lanes.iter_mut().for_each(|lane| lane.compared = None);
    }
}

impl LanePair {
    fn key_for(&self, keys: (WgPublic, WgPublic)) -> Option<(&Psk, bool)> {
        self.agreed
            .as_ref()
            .filter(|agreed| agreed.keys == keys)
            .map(|agreed| (&agreed.psk, agreed.confirmed))
    }
}

impl Pairs {
    /// Those that were on disk, as far as `lanes` are still this node's.
    pub(super) fn restore(stored: BTreeMap<NodeId, Vec<StoredKey>>, lanes: &[LaneConfig]) -> Self {
        let mut pairs = Self::default();
        for (id, keys) in stored {
            let pair = pairs.all.entry(id).or_default();
            for key in keys {
                if let Some(at) = lanes.iter().position(|lane| lane.key == key.keys.0) {
                    pair.lane(at).agreed = Some(key);
                }
            }
        }
        pairs
    }

    pub(super) fn stored(&self) -> BTreeMap<NodeId, Vec<StoredKey>> {
        let keys = |pair: &Pair| pair.lanes.iter().filter_map(|lane| lane.agreed.clone()).collect::<Vec<_>>();
        self.all.iter().map(|(id, pair)| (*id, keys(pair))).filter(|(_, keys)| !keys.is_empty()).collect()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&NodeId, &Pair)> {
        self.all.iter()
    }

    pub(super) fn get(&self, peer: &NodeId) -> Option<&Pair> {
        self.all.get(peer)
    }

    /// Keeps those that `keep` says; whether others went.
    pub(super) fn retain(&mut self, keep: impl Fn(&NodeId) -> bool) -> bool {
        let before = self.all.len();
        self.all.retain(|id, _| keep(id));
        self.due.retain(|(_, id)| keep(id));
        self.when_applied.retain(|(id, _), _| keep(id));
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
    /// The keys of the tunnels between this node and a member: ours first, with the place of our lane among all of ours.
    pub(super) fn tunnel_keys(
        &self,
        peer: &NodeId,
    ) -> impl Iterator<Item = (usize, (WgPublic, WgPublic))> + '_ {
        let record = self.view.as_ref().and_then(|view| view.record(peer));
        self.config.lanes.iter().enumerate().filter_map(move |(at, ours)| {
            let theirs = record?.lanes.iter().find(|theirs| theirs.index == ours.index)?;
            Some((at, (ours.key, theirs.key)))
        })
    }

    /// The place of the lane of ours between which and the member's there is a tunnel with these keys.
    fn lane_with(&self, peer: &NodeId, keys: (WgPublic, WgPublic)) -> Option<usize> {
        self.tunnel_keys(peer).find(|(_, these)| *these == keys).map(|(at, _)| at)
    }

    /// The keys of the tunnel of a lane of ours.
    fn keys_at(&self, peer: &NodeId, at: usize) -> Option<(WgPublic, WgPublic)> {
        self.tunnel_keys(peer).find(|(other, _)| *other == at).map(|(_, keys)| keys)
    }

    pub(super) fn leads(&self, peer: &NodeId) -> bool {
        self.id < *peer
    }

    /// Whether nothing has to be said about the tunnels with a member.
    pub(super) fn is_settled(&self, peer: &NodeId) -> bool {
        self.tunnel_keys(peer).all(|(at, keys)| self.is_lane_settled(peer, at, keys))
    }

    fn is_lane_settled(&self, peer: &NodeId, at: usize, keys: (WgPublic, WgPublic)) -> bool {
        let generation =
            self.view.as_ref().and_then(|view| view.record(peer)).map(|record| record.generation);
        self.pairs.get(peer).and_then(|pair| pair.lanes.get(at)).is_some_and(|lane| {
            lane.compared == generation && lane.key_for(keys).is_some_and(|(_, confirmed)| confirmed)
        })
    }

    /// Another session counts with this member now, or none.
    pub(super) fn pair_session_changed(&mut self, peer: NodeId) {
        let leads = self.leads(&peer);
        let connected = self.session_with(&peer).is_some();
        if connected && leads {
            // The other end may have called because it is not settled there.
            self.pairs.all.entry(peer).or_default().is_to_be_compared();
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
                true => {
                    self.ask_for_probe(peer);
                    PATIENCE
                }
                // It will be there in a moment, and a second session would begin everything anew.
                false if self.is_greeting(&peer) || self.is_calling(&peer) => COURTESY,
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
        let open = self.tunnel_keys(&peer).filter(|(at, keys)| !self.is_lane_settled(&peer, *at, *keys));
        for (at, keys) in open.collect::<Vec<_>>() {
            self.probe_lane(peer, session, at, keys);
        }
    }

    fn probe_lane(&mut self, peer: NodeId, session: SessionId, at: usize, keys: (WgPublic, WgPublic)) {
        let Some(binding) = self.binding(session) else { return };
        // Where the kernel is slow an offer is answered late. Another one would be another key: it would have to be
        // installed anew, and come later still.
        let round = self.pairs.get(&peer).and_then(|pair| pair.lanes.get(at)?.round.as_ref());
        if let Some(round) = round.filter(|round| (round.session, round.keys) == (session, keys))
            && let Some(psk) = &round.offered
        {
            let epoch = round.epoch;
            let check = psk_check(psk, &binding, &self.id, PskStep::Offer, epoch);
            return self.send(session, &Message::PskOffer { keys, epoch, check });
        }
        let epoch = self.rng.next_u64();
        let lane = self.pairs.all.entry(peer).or_default().lane(at);
        lane.round = Some(Round { session, epoch, keys, offered: None });
        let check =
            lane.key_for(keys).map(|(psk, _)| psk_check(psk, &binding, &self.id, PskStep::Probe, epoch));
        self.send(session, &Message::PskProbe { keys, epoch, check });
    }

    /// An answer to nothing: this end has a reason to compare keys of which the leader does not know.
    fn ask_for_probe(&mut self, peer: NodeId) {
        if let Some(session) =
            self.session_with(&peer).filter(|_| !self.leads(&peer) && self.is_established())
        {
            self.send(session, &Message::PskAnswer { epoch: 0, check: None });
        }
    }

    fn binding(&self, session: SessionId) -> Option<[u8; 32]> {
        self.sessions.get(&session).map(|entry| entry.secrets.join_binding)
    }

    /// The key that a session gives for the two lanes; none for a session that is gone, or a tunnel key that proves
    /// nothing.
    fn derive(
        &self,
        session: SessionId,
        peer: NodeId,
        keys: (WgPublic, WgPublic),
        epoch: u64,
    ) -> Option<Psk> {
        let lane = self.config.lanes.iter().find(|lane| lane.key == keys.0)?;
        let seed = &self.sessions.get(&session)?.secrets.psk_seed;
        let ours = PairEnd { node: self.id, wireguard: keys.0 };
        let theirs = PairEnd { node: peer, wireguard: keys.1 };
        pair_psk(seed, &ours, &lane.secret, &theirs, epoch)
            .inspect_err(|error| tracing::debug!(peer = %peer.short(), %error, "no pre-shared key"))
            .ok()
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
        pair.is_to_be_compared();
        if self.session_with(&peer).is_some() {
            return self.pairs.set_next(peer, Some(self.now));
        }
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
        epoch: u64,
        check: Option<PskCheck>,
    ) {
        if self.leads(&peer) || !self.is_established() {
            tracing::debug!(peer = %peer.short(), "a probe from the end that should follow, or before this node is confirmed");
            return;
        }
        let ours = (keys.1, keys.0);
        let Some(binding) = self.binding(session) else { return };
        let at = self.lane_with(&peer, ours);
        let held = at.and_then(|at| self.pairs.get(&peer)?.lanes.get(at)?.key_for(ours));
        let answer = held.zip(check).and_then(|((psk, _), check)| {
            let same = psk_check(psk, &binding, &peer, PskStep::Probe, epoch).matches(&check);
            same.then(|| psk_check(psk, &binding, &self.id, PskStep::Answer, epoch))
        });
        let same = at.filter(|_| answer.is_some());
        self.send(session, &Message::PskAnswer { epoch, check: answer });
        if let Some(at) = same {
            self.confirm(peer, at);
        }
    }

    pub(super) fn on_psk_answer(
        &mut self,
        session: SessionId,
        peer: NodeId,
        epoch: u64,
        check: Option<PskCheck>,
    ) {
        if !self.leads(&peer) || self.session_with(&peer) != Some(session) {
            return;
        }
        let Some(binding) = self.binding(session) else { return };
        let Some(pair) = self.pairs.get(&peer) else { return };
        let asked = self.tunnel_keys(&peer).find(|(at, keys)| {
            pair.lanes.get(*at).and_then(|lane| lane.round.as_ref()).is_some_and(|round| {
                round.offered.is_none() && (round.session, round.epoch, round.keys) == (session, epoch, *keys)
            })
        });
        let Some((at, keys)) = asked else {
            if check.is_none() && pair.next.is_none() {
                self.pairs.all.entry(peer).or_default().is_to_be_compared();
                self.pairs.set_next(peer, Some(self.now));
            }
            return;
        };
        let same = pair.lanes.get(at).and_then(|lane| lane.key_for(keys)).zip(check).is_some_and(
            |((psk, _), check)| psk_check(psk, &binding, &peer, PskStep::Answer, epoch).matches(&check),
        );
        let offered = if same { None } else { self.derive(session, peer, keys, epoch) };
        let offer = offered.as_ref().map(|psk| psk_check(psk, &binding, &self.id, PskStep::Offer, epoch));
        let lane = self.pairs.all.entry(peer).or_default().lane(at);
        lane.round = offered.map(|psk| Round { session, epoch, keys, offered: Some(psk) });
        match offer {
            Some(check) => self.send(session, &Message::PskOffer { keys, epoch, check }),
            None if same => self.confirm(peer, at),
            None => self.doubt_key(peer, at, keys.1),
        }
    }

    pub(super) fn on_psk_offer(
        &mut self,
        session: SessionId,
        peer: NodeId,
        keys: (WgPublic, WgPublic),
        epoch: u64,
        check: PskCheck,
    ) {
        let ours = (keys.1, keys.0);
        if self.session_with(&peer) != Some(session) {
            // Both ends called at once. What is agreed on the session that counts must not be replaced by an offer
            // that was made on the other one before, and comes later.
            return;
        }
        let lane = self.lane_with(&peer, ours).filter(|_| !self.leads(&peer) && self.is_established());
        let Some(at) = lane else {
            // Its record, or ours, has not arrived at the other end: it asks again.
            tracing::debug!(peer = %peer.short(), "an offer for other tunnel keys");
            return;
        };
        let Some(binding) = self.binding(session) else { return };
        let psk = self.derive(session, peer, ours, epoch);
        let proved = psk.filter(|psk| psk_check(psk, &binding, &peer, PskStep::Offer, epoch).matches(&check));
        let Some(psk) = proved else { return self.doubt_key(peer, at, ours.1) };
        let check = psk_check(&psk, &binding, &self.id, PskStep::Staged, epoch);
        self.adopt_key(peer, at, ours, psk, false);
        self.pairs.all.entry(peer).or_default().lane(at).staged = Some((session, epoch));
        self.say_when_applied((peer, at), session, Message::PskStaged { epoch, check });
    }

    pub(super) fn on_psk_staged(&mut self, session: SessionId, peer: NodeId, epoch: u64, check: PskCheck) {
        let Some(binding) = self.binding(session).filter(|_| self.leads(&peer)) else { return };
        let Some(pair) = self.pairs.all.get_mut(&peer) else { return };
        let is_meant = |round: &Round| (round.session, round.epoch) == (session, epoch);
        let mut lanes = pair.lanes.iter_mut().enumerate();
        let offered = lanes.find_map(|(at, lane)| Some((at, lane.round.take_if(|round| is_meant(round))?)));
        let Some((at, Round { keys, offered: Some(psk), .. })) = offered else { return };
        if self.keys_at(&peer, at) != Some(keys) {
            return;
        }
        if !psk_check(&psk, &binding, &peer, PskStep::Staged, epoch).matches(&check) {
            return self.doubt_key(peer, at, keys.1);
        }
        let check = psk_check(&psk, &binding, &self.id, PskStep::Commit, epoch);
        self.adopt_key(peer, at, keys, psk, true);
        // It is settled once they have been compared: whether the commit arrives is not known.
        self.pairs.set_next(peer, Some(self.now + COMPARE_AFTER));
        self.say_when_applied((peer, at), session, Message::PskCommit { epoch, check });
    }

    pub(super) fn on_psk_commit(&mut self, session: SessionId, peer: NodeId, epoch: u64, check: PskCheck) {
        let (Some(pair), Some(binding)) = (self.pairs.get(&peer), self.binding(session)) else { return };
        let proved = self.tunnel_keys(&peer).find(|(at, keys)| {
            let lane = pair.lanes.get(*at).filter(|lane| lane.staged == Some((session, epoch)));
            lane.and_then(|lane| lane.key_for(*keys)).is_some_and(|(psk, _)| {
                psk_check(psk, &binding, &peer, PskStep::Commit, epoch).matches(&check)
            })
        });
        let Some((at, _)) = proved else {
            tracing::debug!(peer = %peer.short(), epoch, "a commit to nothing that is installed here");
            return;
        };
        self.pairs.all.entry(peer).or_default().lane(at).staged = None;
        tracing::debug!(peer = %peer.short(), epoch, "pre-shared key committed");
        self.confirm(peer, at);
    }

    /// This end has another key than the peer from now on, and nobody knows.
    #[cfg(test)]
    pub(super) fn lose_key(&mut self, peer: &NodeId) {
        let wrong = Psk::random(&mut self.rng);
        for lane in self.pairs.all.get_mut(peer).into_iter().flat_map(|pair| &mut pair.lanes) {
            if let Some(agreed) = &mut lane.agreed {
                agreed.psk = wrong.clone();
            }
        }
        self.stale = true;
        self.dirty.insert(StateFile::Keys);
    }

    /// The peer has not shown that it holds the secret of the tunnel key that its record names.
    fn doubt_key(&mut self, peer: NodeId, at: usize, key: WgPublic) {
        let lane = self.pairs.all.entry(peer).or_default().lane(at);
        if lane.doubted.replace(key) != Some(key) {
            tracing::warn!(peer = %peer.short(), %key, "a member says that this tunnel key is its own, and does not prove it: it gets no tunnel");
        }
    }

    /// Takes a key that the peer has proved to hold. Routes stay if there were any.
    fn adopt_key(&mut self, peer: NodeId, at: usize, keys: (WgPublic, WgPublic), psk: Psk, confirmed: bool) {
        let lane = self.pairs.all.entry(peer).or_default().lane(at);
        let same_keys = lane.agreed.as_ref().filter(|agreed| agreed.keys == keys);
        if same_keys.is_some_and(|agreed| agreed.psk == psk && agreed.confirmed >= confirmed) {
            return;
        }
        let before = same_keys.is_some_and(|agreed| agreed.confirmed);
        lane.agreed = Some(StoredKey { psk, keys, confirmed: confirmed || before });
        self.stale = true;
        self.dirty.insert(StateFile::Keys);
        tracing::info!(peer = %peer.short(), lane = self.config.lanes[at].index, "pre-shared key agreed");
        self.measure(peer);
    }

    /// Both ends have the key, and the other one has just proved it.
    fn confirm(&mut self, peer: NodeId, at: usize) {
        let generation =
            self.view.as_ref().and_then(|view| view.record(&peer)).map(|record| record.generation);
        let lane = self.pairs.all.entry(peer).or_default().lane(at);
        let Some(agreed) = &mut lane.agreed else { return };
        lane.compared = generation;
        if !agreed.confirmed {
            agreed.confirmed = true;
            self.stale = true;
            self.dirty.insert(StateFile::Keys);
        }
        if self.is_settled(&peer) {
            self.pairs.set_next(peer, None);
        }
        self.measure(peer);
    }

    /// Sends `message` as soon as the kernel has what this node now wants.
    fn say_when_applied(&mut self, (peer, at): (NodeId, usize), session: SessionId, message: Message) {
        self.stale = true;
        let revision = self.wanted_revision();
        if self.pairs.all.contains_key(&peer) {
            self.pairs.when_applied.insert((peer, at), (revision, session, message));
        }
        self.pairs_applied();
    }

    /// The kernel has a revision: what waited for it is said. A lane that has a problem says nothing; the leader
    /// asks again.
    pub(super) fn pairs_applied(&mut self) {
        let is_well = |at: usize| {
            let lane = self.config.lanes.get(at);
            lane.is_some_and(|lane| !self.problems.iter().any(|problem| problem.object == lane.device))
        };
        let applied = self.applied;
        let waiting = std::mem::take(&mut self.pairs.when_applied);
        let (ready, waiting): (BTreeMap<_, _>, _) =
            waiting.into_iter().partition(|(_, (revision, ..))| *revision <= applied);
        self.pairs.when_applied = waiting;
        let ready: Vec<_> = ready.into_iter().filter(|((_, at), _)| is_well(*at)).collect();
        for (_, (_, session, message)) in ready {
            self.send(session, &message);
        }
    }
}
