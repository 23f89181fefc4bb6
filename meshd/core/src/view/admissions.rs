//! Who belongs to the cluster.

use std::collections::{BTreeMap, BTreeSet};

use mesh_keys::{AdmissionError, BodyId, ClusterId, IdentityKey, NodeId, SignedAdmission};

/// Most members of a cluster; bounds what a member that misbehaves can make others store.
pub(super) const MAX_MEMBERS: usize = 16_384;

/// Most admissions of one node: it may join anew at several members, but not without end.
const MAX_PER_NODE: usize = 8;

/// A grow-only set of admissions in which every sponsor is the founder or is admitted itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Admissions {
    cluster: ClusterId,
    founder: IdentityKey,
    members: BTreeMap<IdentityKey, BTreeMap<BodyId, SignedAdmission>>,
    /// Admission → (subject, sponsor).
    sponsors: BTreeMap<BodyId, (IdentityKey, IdentityKey)>,
    keys: BTreeMap<NodeId, IdentityKey>,
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
    #[error("the cluster has {MAX_MEMBERS} members already, or the node {MAX_PER_NODE} admissions")]
    Full,
    /// Two identity keys have the same node id.
    #[error("node id {node} belongs to another identity key")]
    SameNodeId {
        /// The node id.
        node: NodeId,
    },
}

impl Admissions {
    /// The set that has the founder only.
    pub fn new(cluster: ClusterId, founder: IdentityKey) -> Self {
        let keys = BTreeMap::from([(founder.node_id(), founder)]);
        Self { cluster, founder, members: BTreeMap::new(), sponsors: BTreeMap::new(), keys }
    }

    /// Adds one; `false` when it was there already.
    ///
    /// # Errors
    /// [`NotAdmitted`]; the set is unchanged.
    pub fn insert(&mut self, signed: &SignedAdmission) -> Result<bool, NotAdmitted> {
        let id = signed.id();
        if self.sponsors.contains_key(&id) {
            return Ok(false);
        }
        let admission = signed.check(&self.cluster)?;
        if !self.contains(&admission.sponsor) {
            return Err(NotAdmitted::UnknownSponsor { sponsor: admission.sponsor.node_id() });
        }
        let node = admission.subject.node_id();
        if self.keys.get(&node).is_some_and(|key| *key != admission.subject) {
            return Err(NotAdmitted::SameNodeId { node });
        }
        let known = self.members.get(&admission.subject).map_or(0, BTreeMap::len);
        if known >= MAX_PER_NODE || (known == 0 && self.keys.len() >= MAX_MEMBERS) {
            return Err(NotAdmitted::Full);
        }
        self.keys.insert(node, admission.subject);
        self.sponsors.insert(id, (admission.subject, admission.sponsor));
        self.members.entry(admission.subject).or_default().insert(id, signed.clone());
        Ok(true)
    }

    /// Whether `key` belongs to the cluster.
    pub fn contains(&self, key: &IdentityKey) -> bool {
        *key == self.founder || self.members.contains_key(key)
    }

    /// The identity key of a member.
    pub fn key_of(&self, node: &NodeId) -> Option<IdentityKey> {
        self.keys.get(node).copied()
    }

    /// All members, the founder among them.
    pub fn members(&self) -> impl Iterator<Item = (&NodeId, &IdentityKey)> {
        self.keys.iter()
    }

    /// The admissions that show `key` to be a member, founder's end first; empty for the founder and for
    /// strangers.
    pub fn chain(&self, key: &IdentityKey) -> Vec<SignedAdmission> {
        let mut chain = Vec::new();
        let mut wanted = BTreeSet::from([*key]);
        // Insertion guarantees that sponsors were members before: walking up ends at the founder.
        let mut queue = vec![*key];
        while let Some(subject) = queue.pop() {
            let Some(admissions) = self.members.get(&subject) else { continue };
            for (id, signed) in admissions {
                chain.push(signed.clone());
                if let Some((_, sponsor)) = self.sponsors.get(id)
                    && wanted.insert(*sponsor)
                {
                    queue.push(*sponsor);
                }
            }
        }
        self.sort(chain)
    }

    /// All of them, sponsors before those they admitted.
    pub fn in_order(&self) -> Vec<SignedAdmission> {
        self.sort(self.members.values().flat_map(|of| of.values().cloned()).collect())
    }

    /// Their names.
    pub fn ids(&self) -> BTreeSet<BodyId> {
        self.sponsors.keys().copied().collect()
    }

    /// Brings sponsors before those they admitted, without looking at the order of arrival: rounds outwards
    /// from the founder.
    fn sort(&self, items: Vec<SignedAdmission>) -> Vec<SignedAdmission> {
        let mut sorted = Vec::with_capacity(items.len());
        let mut reached = BTreeSet::from([self.founder]);
        let mut waiting: Vec<(IdentityKey, IdentityKey, SignedAdmission)> = items
            .into_iter()
            .filter_map(|item| {
                self.sponsors.get(&item.id()).map(|(subject, sponsor)| (*subject, *sponsor, item))
            })
            .collect();
        while !waiting.is_empty() {
            let (ready, rest): (Vec<_>, Vec<_>) =
                waiting.into_iter().partition(|(_, sponsor, _)| reached.contains(sponsor));
            if ready.is_empty() {
                break;
            }
            for (subject, _, item) in ready {
                reached.insert(subject);
                sorted.push(item);
            }
            waiting = rest;
        }
        sorted
    }
}
