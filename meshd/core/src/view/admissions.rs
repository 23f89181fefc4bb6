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

use std::collections::{BTreeSet, VecDeque};

use mesh_keys::frame::ShortId;
use mesh_keys::{
    AdmissionError, BodyId, ClusterId, Genesis, IdentityKey, JoinMode, NodeId, Removal, RemovalError,
    SignedAdmission, SignedRemoval,
};

use super::items::{is_named, lowest};
use super::persistent::{Bounded as _, Map, Pairs, Set};

/// Most members of a cluster at a time.
pub(super) const MAX_MEMBERS: usize = 16_384;

/// Most admissions of one node: it may join anew at several members, but not without end.
const MAX_PER_NODE: usize = 8;

/// Most admissions and most removals there ever were. They are kept for good, at about 200 bytes each; this
/// bounds what a member that misbehaves can make others store, at six times what 20,000 replaced nodes take.
const MAX_HISTORY: usize = 131_072;

/// Grow-only sets of admissions and removals, and who is a member by them.
#[derive(Clone, Debug, PartialEq, Eq)]
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
    keys: Map<NodeId, IdentityKey>,
    removals: Map<BodyId, (SignedRemoval, Removal)>,
    removed: Map<IdentityKey, Removed>,
    removed_ids: Set<NodeId>,
    /// Nodes that some removal keeps and whose admission has not arrived.
    awaited: Set<NodeId>,
    /// What follows: see the module.
    accepted: Set<IdentityKey>,
    members: Map<NodeId, IdentityKey>,
}

/// An admission, and what it says.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Statement {
    signed: SignedAdmission,
    subject: IdentityKey,
    sponsor: IdentityKey,
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
            Self::Invalid(_) | Self::SameNodeId { .. } => false,
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
            keys: Map::default(),
            removals: Map::default(),
            removed: Map::default(),
            removed_ids: Set::default(),
            awaited: Set::default(),
            accepted: Set::default(),
            members: Map::default(),
        };
        admissions.keys.insert(founder.node_id(), founder);
        admissions.accept(founder);
        admissions
    }

    /// Adds an admission; `false` when it was there already.
    ///
    /// # Errors
    /// [`NotAdmitted`]; the set is unchanged.
    pub fn insert(&mut self, signed: &SignedAdmission) -> Result<bool, NotAdmitted> {
        let id = signed.id();
        if self.statements.contains_key(&id) {
            return Ok(false);
        }
        let admission = signed.check(&self.cluster)?;
        if !self.was_admitted(&admission.sponsor) {
            return Err(NotAdmitted::UnknownSponsor { sponsor: admission.sponsor.node_id() });
        }
        let (subject, sponsor) = (admission.subject, admission.sponsor);
        let node = subject.node_id();
        if self.keys.get(&node).is_some_and(|key| *key != subject) {
            return Err(NotAdmitted::SameNodeId { node });
        }
        let known = self.admitted.of(&subject).count();
        if known >= MAX_PER_NODE
            || (known == 0 && self.members.len() >= MAX_MEMBERS)
            || self.statements.len() >= MAX_HISTORY
        {
            return Err(NotAdmitted::Full);
        }
        self.keys.insert(node, subject);
        self.awaited.remove(&node);
        self.statements.insert(id, Statement { signed: signed.clone(), subject, sponsor });
        self.by_sponsor.insert(sponsor, (admission.issued_serial, id));
        self.admitted.insert(subject, id);
        if self.accepted.contains(&sponsor) && self.vouches(&sponsor, &subject) {
            self.accept(subject);
        }
        Ok(true)
    }

    /// Adds a removal. The node that it removes; `None` when it was there already.
    ///
    /// In flat mode its signer may be any node that was ever let in, even one that was removed since: two members
    /// that remove each other without knowing of it are both out, in whatever order others hear of it.
    ///
    /// # Errors
    /// [`NotRemoved`]; the set is unchanged.
    pub fn remove(&mut self, signed: &SignedRemoval) -> Result<Option<IdentityKey>, NotRemoved> {
        let id = signed.id();
        if self.removals.contains_key(&id) {
            return Ok(None);
        }
        let removal = signed.check(&self.cluster)?;
        if self.admin_keys.is_empty() {
            if let Some(key) = [removal.signer, removal.subject].iter().find(|key| !self.was_admitted(key)) {
                return Err(NotRemoved::UnknownMember { node: key.node_id() });
            }
        } else if !self.admin_keys.contains(&removal.signer) {
            return Err(NotRemoved::NotAdmin { signer: removal.signer.node_id() });
        }
        if self.removals.len() >= MAX_HISTORY {
            return Err(NotRemoved::Full);
        }
        let subject = removal.subject;
        for node in removal.keep.iter().filter(|node| !self.keys.contains_key(node)) {
            self.awaited.insert(*node);
        }
        let mut removed =
            Removed { removals: BTreeSet::from([id]), keep: removal.keep.iter().copied().collect() };
        if let Some(before) = self.removed.get(&subject) {
            removed.removals.extend(&before.removals);
            removed.keep.retain(|node| before.keep.contains(node));
        }
        self.removed.insert(subject, removed);
        self.removals.insert(id, (signed.clone(), removal));
        self.removed_ids.insert(subject.node_id());
        if self.accepted.contains(&subject) {
            self.members.remove(&subject.node_id());
        }
        let someone_lost = self
            .sponsored(&subject)
            .any(|child| self.accepted.contains(&child.subject) && !self.vouches(&subject, &child.subject));
        if someone_lost {
            self.accepted = Set::default();
            self.members = Map::default();
            self.accept(self.founder);
        }
        Ok(Some(subject))
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
        self.removed_ids.contains(node)
    }

    /// A node that was removed, by the first bytes of its id.
    pub fn removed_with(&self, short: &ShortId) -> Option<NodeId> {
        self.removed_ids.at_or_after(short.first_node()).filter(|id| ShortId::of(id) == *short).copied()
    }

    /// The identity key of a member.
    pub fn key_of(&self, node: &NodeId) -> Option<IdentityKey> {
        self.members.get(node).copied()
    }

    /// The identity key of a node that was ever let in, member or not.
    pub fn known_key(&self, node: &NodeId) -> Option<IdentityKey> {
        self.keys.get(node).copied()
    }

    /// The nodes that were ever let in.
    pub(super) fn admitted_nodes(&self) -> impl Iterator<Item = &IdentityKey> {
        self.admitted.keys()
    }

    /// How a node was let in, each time.
    pub(super) fn modes_of(&self, node: &IdentityKey) -> impl Iterator<Item = JoinMode> {
        let statements = self.admitted.of(node).filter_map(|id| self.statements.get(id));
        statements.filter_map(|statement| Some(statement.signed.decode().ok()?.mode))
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

    /// Nodes that a removal keeps and whose admission has not arrived: members that are not known yet.
    pub fn awaited(&self) -> impl Iterator<Item = &NodeId> {
        self.awaited.iter()
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
