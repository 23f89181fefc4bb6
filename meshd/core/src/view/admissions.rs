//! Who belongs to the cluster: admissions let nodes in, removals put them out.
//!
//! Both sets only grow, and membership is a function of the two. Let `keep(k)` be the nodes that *all* removals
//! of `k` keep, or everyone when there is none:
//!
//! ```text
//! accepted(k) = k is the founder, or there is an admission of k by some s
//!               with accepted(s) and k ∈ keep(s)
//! member(k)   = accepted(k) and there is no removal of k
//! ```
//!
//! A grow-only set has no order in which things happened, so "admitted before the removal" cannot be read from
//! it. The removal says it instead: it names the nodes that its signer knows to be there by the subject's doing
//! ([`Removal::keep`]). They stay; whatever else the subject has signed or will sign lets nobody in. With several
//! removals of one node only those stay whom all of them keep. So a removal never brings anyone back, and what a
//! node promised about addresses when it was put out can never be owed to it again. Its price: a node that a
//! removed node had let in unknown to the remover is out, and joins anew under a new identity.
//!
//! A removed node can go on signing admissions without end, so what is void must not fill the set. An admission of k
//! by s is *void* if there is a removal of s and k ∉ keep(s). `keep` only shrinks, so void is for good.
//!
//! * With admin keys, an admission is there only if it is not void and its sponsor is accepted; a removal takes the
//!   others with it. Nothing that counts rests on them: who signs removals is no matter of admissions then. Of all
//!   copies that know the same removals, merging is the union of what is there; so copies become equal once the
//!   removals are known everywhere, which only grow and rest on nothing.
//!   A node whose own admissions are dropped is out itself in the view that drops them. It promises nothing any more,
//!   so no promise counts fewer admissions than its signer has signed.
//! * Without them, who was ever let in may sign removals, which have to be judged alike by those who hear of them
//!   later; so void admissions stay. They have room of their own ([`MAX_VOID`]) and take none from the others.
//!
//! A sponsor admits a node once: of several such statements the one with the lowest (serial, name) is there.

use std::collections::{BTreeSet, VecDeque};

use mesh_keys::frame::ShortId;
use mesh_keys::{
    AdmissionError, BodyId, ClusterId, Genesis, IdentityKey, JoinMode, NodeId, Removal, RemovalError,
    SignedAdmission, SignedRemoval, TokenId,
};

use super::items::{is_named, lowest};
use crate::persistent::{Bounded as _, Map, Pairs, Set};

/// Most members of a cluster at a time.
pub(super) const MAX_MEMBERS: usize = 16_384;

/// Most admissions of one node: it may join anew at several members, but not without end.
const MAX_PER_NODE: usize = 8;

/// Most admissions and most removals there ever were. They are kept for good, at about 200 bytes each; this
/// bounds what a member that misbehaves can make others store, at six times what 20,000 replaced nodes take.
const MAX_HISTORY: usize = 131_072;

/// Most admissions that count for nothing, in flat mode.
const MAX_VOID: usize = 16_384;

/// Grow-only sets of admissions and removals, and who is a member by them.
#[derive(Clone, Debug)]
pub struct Admissions {
    cluster: ClusterId,
    founder: IdentityKey,
    /// Empty in flat mode.
    admin_keys: Vec<IdentityKey>,
    statements: Map<BodyId, Statement>,
    /// Node → its admissions.
    admitted: Pairs<IdentityKey, BodyId>,
    /// Sponsor → its admissions, with their serials.
    by_sponsor: Pairs<IdentityKey, (u64, BodyId)>,
    /// Token → nodes that came by it, and their admissions.
    by_token: Pairs<TokenId, (IdentityKey, BodyId)>,
    keys: Map<NodeId, IdentityKey>,
    removals: Map<BodyId, (SignedRemoval, Removal)>,
    removed: Map<IdentityKey, Removed>,
    removed_ids: Map<NodeId, IdentityKey>,
    /// Removed nodes with those whom all of their removals keep and who were not known then.
    awaited: Set<(IdentityKey, NodeId)>,
    /// How many admissions are not void and by sponsors that are accepted.
    live: usize,
    /// What follows: see the module.
    accepted: Set<IdentityKey>,
    members: Map<NodeId, IdentityKey>,
}

impl PartialEq for Admissions {
    /// The rest follows, or is what is left of the way that led there.
    fn eq(&self, other: &Self) -> bool {
        self.cluster == other.cluster
            && self.statements == other.statements
            && self.removals == other.removals
            && self.accepted == other.accepted
            && self.live == other.live
    }
}

impl Eq for Admissions {}

/// An admission, and what it says.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Statement {
    signed: SignedAdmission,
    subject: IdentityKey,
    sponsor: IdentityKey,
    serial: u64,
    mode: JoinMode,
}

/// What a removal did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Removing {
    /// The node that it removes.
    pub(super) subject: IdentityKey,
    /// What came of it for others.
    pub(super) gone: Gone,
}

/// What is there no more.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Gone {
    /// Admissions that became void, or rested on those.
    pub(super) admissions: Vec<BodyId>,
    /// Nodes that have no admission left.
    pub(super) nodes: Vec<IdentityKey>,
}

/// What the removals of one node say together.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Removed {
    removals: BTreeSet<BodyId>,
    keep: BTreeSet<NodeId>,
}

/// Why an admission does not count (yet). The set is unchanged.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotAdmitted {
    /// It is malformed, for another cluster or not signed by its sponsor.
    #[error(transparent)]
    Invalid(#[from] AdmissionError),
    /// Its sponsor is not known to be a member.
    #[error("its sponsor {} is no known member", .sponsor.short())]
    UnknownSponsor {
        /// The sponsor.
        sponsor: NodeId,
    },
    /// Its sponsor was removed, and its removals do not keep the node.
    #[error("its sponsor {} was removed, and the node is not among those that stay", .sponsor.short())]
    Void {
        /// The sponsor.
        sponsor: NodeId,
    },
    /// The set is full.
    #[error(
        "the cluster has {MAX_MEMBERS} members, the node {MAX_PER_NODE} admissions, or both sets {MAX_HISTORY} entries"
    )]
    Full,
    /// Two identity keys have the same node id.
    #[error("node id {node} belongs to another identity key")]
    SameNodeId {
        /// The node id.
        node: NodeId,
    },
}

/// Why a removal does not count (yet). The set is unchanged.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotRemoved {
    /// It is malformed, for another cluster or not signed by its signer.
    #[error(transparent)]
    Invalid(#[from] RemovalError),
    /// The cluster has admin keys, and none of them signed.
    #[error("{} holds no admin key of this cluster", .signer.short())]
    NotAdmin {
        /// Who signed.
        signer: NodeId,
    },
    /// Signer or subject was never a member, as far as known.
    #[error("{} is not known to have been a member", .node.short())]
    UnknownMember {
        /// Which of the two.
        node: NodeId,
    },
    /// The set is full.
    #[error("there were {MAX_HISTORY} removals already")]
    Full,
}

impl NotAdmitted {
    /// Whether it may count once more is known, or when there is room.
    pub(super) fn is_early(&self) -> bool {
        match self {
            Self::UnknownSponsor { .. } | Self::Full => true,
            Self::Invalid(_) | Self::SameNodeId { .. } | Self::Void { .. } => false,
        }
    }
}

impl NotRemoved {
    /// Whether it may count once more is known, or when there is room.
    pub(super) fn is_early(&self) -> bool {
        match self {
            Self::UnknownMember { .. } | Self::Full => true,
            Self::Invalid(_) | Self::NotAdmin { .. } => false,
        }
    }
}

impl Admissions {
    /// The set that has the founder only.
    pub fn new(genesis: &Genesis) -> Self {
        let founder = genesis.founder();
        let mut admissions = Self {
            cluster: genesis.id(),
            founder,
            admin_keys: genesis.admin_keys().to_vec(),
            statements: Map::default(),
            admitted: Pairs::default(),
            by_sponsor: Pairs::default(),
            by_token: Pairs::default(),
            keys: Map::default(),
            removals: Map::default(),
            removed: Map::default(),
            removed_ids: Map::default(),
            awaited: Set::default(),
            live: 0,
            accepted: Set::default(),
            members: Map::default(),
        };
        admissions.keys.insert(founder.node_id(), founder);
        admissions.accept(founder);
        admissions
    }

    /// Adds an admission; `None` when it was there already, or its sponsor has let the node in before. Else what it
    /// takes the place of.
    ///
    /// # Errors
    /// [`NotAdmitted`]; the set is unchanged.
    pub(super) fn insert(&mut self, signed: &SignedAdmission) -> Result<Option<Gone>, NotAdmitted> {
        let id = signed.id();
        if self.statements.contains_key(&id) {
            return Ok(None);
        }
        let claimed = signed.decode().map_err(AdmissionError::from)?;
        let (subject, sponsor, serial) = (claimed.subject, claimed.sponsor, claimed.issued_serial);
        let mode = claimed.mode;
        // Before the signature, which takes longest to check: all of this is for good, or asked again later.
        if claimed.cluster == self.cluster && !self.was_admitted(&sponsor) {
            return Err(NotAdmitted::UnknownSponsor { sponsor: sponsor.node_id() });
        }
        let vouched = self.vouches(&sponsor, &subject);
        if !vouched && !self.is_flat() {
            return Err(NotAdmitted::Void { sponsor: sponsor.node_id() });
        }
        let before = self.admission_by(&sponsor, &subject);
        if before.is_some_and(|before| before <= (serial, id)) {
            return Ok(None);
        }
        signed.check(&self.cluster)?;
        let node = subject.node_id();
        if self.keys.get(&node).is_some_and(|key| *key != subject) {
            return Err(NotAdmitted::SameNodeId { node });
        }
        let counts = vouched && self.accepted.contains(&sponsor);
        if before.is_none() {
            let known = self
                .admitted
                .of(&subject)
                .filter_map(|id| self.statements.get(id))
                .filter(|one| self.accepted.contains(&one.sponsor) && self.vouches(&one.sponsor, &subject))
                .count();
            let full = if counts {
                known >= MAX_PER_NODE
                    || (known == 0 && self.members.len() >= MAX_MEMBERS)
                    || self.live >= MAX_HISTORY
            } else {
                self.statements.len() - self.live >= MAX_VOID
            };
            if full {
                return Err(NotAdmitted::Full);
            }
        }
        let mut gone = Gone::default();
        if let Some((_, before)) = before {
            self.forget(&before);
            gone.admissions.push(before);
        }
        self.keys.insert(node, subject);
        self.awaited.remove(&(sponsor, node));
        if let JoinMode::Token(token) = mode {
            self.by_token.insert(token, (subject, id));
        }
        self.statements.insert(id, Statement { signed: signed.clone(), subject, sponsor, serial, mode });
        self.by_sponsor.insert(sponsor, (serial, id));
        self.admitted.insert(subject, id);
        if counts {
            self.live += 1;
            self.accept(subject);
        }
        Ok(Some(gone))
    }

    fn is_flat(&self) -> bool {
        self.admin_keys.is_empty()
    }

    /// Serial and name of the admission of `subject` by `sponsor`.
    fn admission_by(&self, sponsor: &IdentityKey, subject: &IdentityKey) -> Option<(u64, BodyId)> {
        let mut of_subject = self.admitted.of(subject).filter_map(|id| Some((id, self.statements.get(id)?)));
        of_subject
            .find(|(_, statement)| statement.sponsor == *sponsor)
            .map(|(id, statement)| (statement.serial, *id))
    }

    /// Takes an admission out. Its subject, if that has no other.
    fn forget(&mut self, id: &BodyId) -> Option<IdentityKey> {
        let Statement { subject, sponsor, serial, mode, .. } = self.statements.take(id)?;
        if let JoinMode::Token(token) = mode {
            self.by_token.remove(token, (subject, *id));
        }
        if self.vouches(&sponsor, &subject) && self.accepted.contains(&sponsor) {
            self.live -= 1;
        }
        self.by_sponsor.remove(sponsor, (serial, *id));
        self.admitted.remove(subject, *id);
        (subject != self.founder && !self.admitted.has(&subject)).then_some(subject)
    }

    /// Adds a removal; `None` when it was there already.
    ///
    /// In flat mode its signer may be any node that was ever let in, even one that was removed since: two members
    /// that remove each other without knowing of it are both out, in whatever order others hear of it.
    ///
    /// # Errors
    /// [`NotRemoved`]; the set is unchanged.
    pub(super) fn remove(&mut self, signed: &SignedRemoval) -> Result<Option<Removing>, NotRemoved> {
        let id = signed.id();
        if self.removals.contains_key(&id) {
            return Ok(None);
        }
        // Who may sign is looked up before the signature is checked, which takes longer.
        let claimed = signed.decode().map_err(RemovalError::from)?;
        if claimed.cluster == self.cluster {
            let strange = |key: &&IdentityKey| !self.was_admitted(key);
            if self.is_flat() {
                if let Some(key) = [claimed.signer, claimed.subject].iter().find(strange) {
                    return Err(NotRemoved::UnknownMember { node: key.node_id() });
                }
            } else if !self.admin_keys.contains(&claimed.signer) {
                return Err(NotRemoved::NotAdmin { signer: claimed.signer.node_id() });
            }
        }
        let removal = signed.check(&self.cluster)?;
        if self.removals.len() >= MAX_HISTORY {
            return Err(NotRemoved::Full);
        }
        let subject = removal.subject;
        let mut removed =
            Removed { removals: BTreeSet::from([id]), keep: removal.keep.iter().copied().collect() };
        if let Some(before) = self.removed.get(&subject) {
            removed.removals.extend(&before.removals);
            removed.keep.retain(|node| before.keep.contains(node));
        }
        let lost: Vec<(BodyId, IdentityKey)> = self
            .by_sponsor
            .of(&subject)
            .filter_map(|(_, id)| Some((*id, self.statements.get(id)?.subject)))
            .filter(|(_, child)| self.vouches(&subject, child) && !removed.keep.contains(&child.node_id()))
            .collect();
        if self.accepted.contains(&subject) {
            self.live -= lost.len();
            self.members.remove(&subject.node_id());
        }
        for (_, node) in self.awaited_of(&subject) {
            self.awaited.remove(&(subject, node));
        }
        for node in removed.keep.iter().filter(|node| !self.keys.contains_key(node)) {
            self.awaited.insert((subject, *node));
        }
        self.removed.insert(subject, removed);
        self.removals.insert(id, (signed.clone(), removal));
        self.removed_ids.insert(subject.node_id(), subject);
        self.put_out(lost.iter().map(|(_, child)| *child).collect());
        let gone = if self.is_flat() || lost.is_empty() { Gone::default() } else { self.drop_void(lost) };
        Ok(Some(Removing { subject, gone }))
    }

    /// Drops admissions that are void now, and those by sponsors that are not accepted any more.
    fn drop_void(&mut self, void: Vec<(BodyId, IdentityKey)>) -> Gone {
        let mut gone = Gone { admissions: void.into_iter().map(|(id, _)| id).collect(), nodes: Vec::new() };
        let unfounded = self.statements.iter().filter(|(_, one)| !self.accepted.contains(&one.sponsor));
        gone.admissions.extend(unfounded.map(|(id, _)| *id));
        for id in &gone.admissions {
            gone.nodes.extend(self.forget(id));
        }
        for key in &gone.nodes {
            self.keys.remove(&key.node_id());
        }
        // They may be kept by the removal of a sponsor that turns out to be accepted by another way.
        if !gone.nodes.is_empty() {
            let unknown = self.removed.iter().flat_map(|(subject, removed)| {
                let unknown = removed.keep.iter().filter(|node| !self.keys.contains_key(node));
                unknown.map(|node| (*subject, *node))
            });
            self.awaited = unknown.collect();
        }
        gone
    }

    /// Puts out `lost` and those who are there by them, but for those who are there by others too. Only these are looked
    /// at: in a cluster whose nodes come and go, most removals lose somebody who was removed before.
    fn put_out(&mut self, lost: Vec<IdentityKey>) {
        let mut out = Vec::new();
        let mut queue = lost;
        while let Some(key) = queue.pop() {
            if key == self.founder || !self.accepted.contains(&key) {
                continue;
            }
            self.accepted.remove(&key);
            self.members.remove(&key.node_id());
            let children = self.sponsored(&key).map(|child| child.subject);
            let vouched: Vec<IdentityKey> = children.filter(|child| self.vouches(&key, child)).collect();
            self.live -= vouched.len();
            queue.extend(vouched);
            out.push(key);
        }
        for key in out {
            let stays = self
                .admitted
                .of(&key)
                .filter_map(|id| Some(self.statements.get(id)?.sponsor))
                .any(|sponsor| self.accepted.contains(&sponsor) && self.vouches(&sponsor, &key));
            if stays {
                self.accept(key);
            }
        }
    }

    /// Takes a node in, and those who are there by it.
    fn accept(&mut self, key: IdentityKey) {
        let mut queue = vec![key];
        while let Some(key) = queue.pop() {
            if self.accepted.contains(&key) {
                continue;
            }
            self.accepted.insert(key);
            if !self.removed.contains_key(&key) {
                self.members.insert(key.node_id(), key);
            }
            let vouched: Vec<IdentityKey> = self
                .sponsored(&key)
                .map(|child| child.subject)
                .filter(|child| self.vouches(&key, child))
                .collect();
            self.live += vouched.len();
            queue.extend(vouched);
        }
    }

    fn sponsored(&self, sponsor: &IdentityKey) -> impl Iterator<Item = &Statement> {
        self.by_sponsor.of(sponsor).filter_map(|(_, id)| self.statements.get(id))
    }

    /// Whether the removals of `sponsor`, if any, keep `subject`.
    fn vouches(&self, sponsor: &IdentityKey, subject: &IdentityKey) -> bool {
        self.removed.get(sponsor).is_none_or(|removed| removed.keep.contains(&subject.node_id()))
    }

    /// Whether `key` belongs to the cluster.
    pub fn contains(&self, key: &IdentityKey) -> bool {
        self.accepted.contains(key) && !self.removed.contains_key(key)
    }

    /// Whether a chain of sponsors leads from `key` to the founder, removed or not.
    pub fn was_admitted(&self, key: &IdentityKey) -> bool {
        *key == self.founder || self.admitted.has(key)
    }

    /// Whether there is a removal of `key`.
    pub fn is_removed(&self, key: &IdentityKey) -> bool {
        self.removed.contains_key(key)
    }

    /// The same by node id.
    pub fn is_removed_id(&self, node: &NodeId) -> bool {
        self.removed_ids.contains_key(node)
    }

    /// A node that was removed, by the first bytes of its id.
    pub fn removed_with(&self, short: &ShortId) -> Option<NodeId> {
        let (id, _) = self.removed_ids.at_or_after(short.first_node())?;
        (ShortId::of(id) == *short).then_some(*id)
    }

    /// The identity key of a node that was removed.
    pub fn removed_key(&self, node: &NodeId) -> Option<IdentityKey> {
        self.removed_ids.get(node).copied()
    }

    /// The identity key of a member.
    pub fn key_of(&self, node: &NodeId) -> Option<IdentityKey> {
        self.members.get(node).copied()
    }

    /// The identity key of a node that was ever let in, member or not.
    pub fn known_key(&self, node: &NodeId) -> Option<IdentityKey> {
        self.keys.get(node).copied()
    }

    /// How a node was let in, each time.
    pub(super) fn modes_of(&self, node: &IdentityKey) -> impl Iterator<Item = JoinMode> {
        let statements = self.admitted.of(node).filter_map(|id| self.statements.get(id));
        statements.map(|statement| statement.mode)
    }

    /// How many nodes have joined by tokens called `id`.
    pub(super) fn let_in_by_token(&self, id: &TokenId) -> usize {
        let mut last = None;
        self.by_token.of(id).filter(|(node, _)| last.replace(*node) != Some(*node)).count()
    }

    /// Whether `key` has let anyone in.
    pub fn has_let_in(&self, key: &IdentityKey) -> bool {
        self.by_sponsor.has(key)
    }

    /// All nodes that were ever let in and were not removed, members or not.
    pub fn not_removed(&self) -> impl Iterator<Item = (&NodeId, &IdentityKey)> {
        self.keys.iter().filter(|(_, key)| !self.removed.contains_key(key))
    }

    /// All members.
    pub fn members(&self) -> impl Iterator<Item = (&NodeId, &IdentityKey)> {
        self.members.iter()
    }

    /// All nodes that were removed.
    pub fn removed(&self) -> impl Iterator<Item = &IdentityKey> {
        self.removed.keys()
    }

    /// The names of the removals of `key`.
    pub fn removals_of(&self, key: &IdentityKey) -> BTreeSet<BodyId> {
        self.removed.get(key).map(|removed| removed.removals.clone()).unwrap_or_default()
    }

    /// What a removal says.
    pub fn removal(&self, id: &BodyId) -> Option<&Removal> {
        self.removals.get(id).map(|(_, removal)| removal)
    }

    /// Nodes that all removals of a node keep, and whose admission has not arrived: members that are not known yet.
    /// Only one that is accepted itself has let in members.
    pub fn awaited(&self) -> impl Iterator<Item = &NodeId> {
        let unknown = self
            .awaited
            .iter()
            .filter(|(subject, node)| self.accepted.contains(subject) && !self.keys.contains_key(node));
        unknown.map(|(_, node)| node)
    }

    /// Whether the removals of `subject` keep someone whose admission has not arrived.
    pub(super) fn awaits_by(&self, subject: &IdentityKey) -> bool {
        self.awaited_of(subject).iter().any(|(_, node)| !self.keys.contains_key(node))
    }

    fn awaited_of(&self, subject: &IdentityKey) -> Vec<(IdentityKey, NodeId)> {
        let lowest = (*subject, NodeId::from_bytes([0; 16]));
        let from = self.awaited.iter_from(lowest);
        from.take_while(|(removed, _)| removed == subject).copied().collect()
    }

    /// The highest serial among the admissions by `sponsor`.
    pub fn highest_serial(&self, sponsor: &IdentityKey) -> u64 {
        self.by_sponsor.of(sponsor).next_back().map_or(0, |(serial, _)| *serial)
    }

    /// How many admissions by `sponsor` there are up to `serial`.
    pub fn count_up_to(&self, sponsor: &IdentityKey, serial: u64) -> u64 {
        self.by_sponsor.up_to(sponsor, (serial, BodyId::HIGHEST)).count() as u64
    }

    /// Whom a removal of `subject` must keep so that nobody else is put out by it: those let in by it who are
    /// members, or through whom others are.
    pub fn dependants(&self, subject: &IdentityKey) -> Vec<NodeId> {
        let mut barren = BTreeSet::from([*subject]);
        let children: BTreeSet<IdentityKey> = self.sponsored(subject).map(|child| child.subject).collect();
        let kept = children
            .into_iter()
            .filter(|child| self.vouches(subject, child) && self.leads_to_member(*child, &mut barren));
        kept.map(|child| child.node_id()).collect()
    }

    /// Whether `key` or someone who is there by it is a member, but for those in `barren`; it grows by those of
    /// whom it turns out that they are not.
    fn leads_to_member(&self, key: IdentityKey, barren: &mut BTreeSet<IdentityKey>) -> bool {
        let mut seen = BTreeSet::new();
        let mut queue = vec![key];
        while let Some(key) = queue.pop() {
            if barren.contains(&key) || !seen.insert(key) {
                continue;
            }
            if self.contains(&key) {
                return true;
            }
            let children = self.sponsored(&key).map(|child| child.subject);
            queue.extend(children.filter(|child| self.vouches(&key, child)));
        }
        barren.append(&mut seen);
        false
    }

    /// The admissions that lead from `key` up to the founder, founder's end first; empty for the founder and for
    /// strangers.
    pub fn chain(&self, key: &IdentityKey) -> Vec<SignedAdmission> {
        let mut wanted = BTreeSet::from([*key]);
        // Insertion guarantees that sponsors were admitted before: walking up ends at the founder.
        let mut queue = vec![*key];
        while let Some(subject) = queue.pop() {
            for id in self.admitted.of(&subject) {
                if let Some(statement) = self.statements.get(id)
                    && wanted.insert(statement.sponsor)
                {
                    queue.push(statement.sponsor);
                }
            }
        }
        self.outwards(|subject| wanted.contains(subject))
    }

    /// All admissions, sponsors before those they admitted.
    pub fn in_order(&self) -> Vec<SignedAdmission> {
        self.outwards(|_| true)
    }

    /// All removals.
    pub fn removals(&self) -> impl Iterator<Item = &SignedRemoval> {
        self.removals.values().map(|(signed, _)| signed)
    }

    /// The admission that gossip calls by that name.
    pub(super) fn admission_named(&self, name: &[u8; 16]) -> Option<&SignedAdmission> {
        let (id, statement) = self.statements.at_or_after(lowest(name))?;
        is_named(id, name).then_some(&statement.signed)
    }

    /// A removal, as it was signed.
    pub fn signed_removal(&self, id: &BodyId) -> Option<&SignedRemoval> {
        self.removals.get(id).map(|(signed, _)| signed)
    }

    /// The removal that gossip calls by that name.
    pub(super) fn removal_named(&self, name: &[u8; 16]) -> Option<&SignedRemoval> {
        let (id, (signed, _)) = self.removals.at_or_after(lowest(name))?;
        is_named(id, name).then_some(signed)
    }

    /// The names of the admissions.
    pub fn ids(&self) -> impl Iterator<Item = &BodyId> {
        self.statements.keys()
    }

    /// The names of the removals.
    pub fn removal_ids(&self) -> impl Iterator<Item = &BodyId> {
        self.removals.keys()
    }

    /// The admissions of the nodes that `wanted` picks, outwards from the founder, whatever the order of arrival.
    fn outwards(&self, wanted: impl Fn(&IdentityKey) -> bool) -> Vec<SignedAdmission> {
        let mut sorted = Vec::new();
        let mut reached = BTreeSet::from([self.founder]);
        let mut queue = VecDeque::from([self.founder]);
        while let Some(sponsor) = queue.pop_front() {
            for (_, id) in self.by_sponsor.of(&sponsor) {
                let Some(statement) = self.statements.get(id) else { continue };
                let subject = statement.subject;
                if !wanted(&subject) {
                    continue;
                }
                sorted.push(statement.signed.clone());
                if reached.insert(subject) {
                    queue.push_back(subject);
                }
            }
        }
        sorted
    }
}
