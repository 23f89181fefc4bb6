//! What becomes of the addresses of removed nodes.
//!
//! A removed node may still be running, cut off or not yet told, and go on handing out addresses; and grants it
//! made before may still be on their way. So its addresses are frozen until nobody can come to use them any more:
//!
//! 1. Every member that learns of the removal *promises*, before anything else: of what the node signed, what I
//!    use now rests on these statements, and I accept nothing more ([`View::promise`]; [`View::usable`] holds it
//!    to that). A node that joins with the removal in its first view accepts nothing of the removed node at all.
//! 2. The *heir*, one member by a rule that all agree on, waits until it knows that it knows all members and
//!    has a promise of each ([`View::frozen`] says what is missing), then ends the removed node's era by a
//!    [`Reclaim`] that names all statements which members rest on. All others are void in every view that has
//!    the reclaim, and what the node owned is the heir's ([`View::reclaim`]).
//!
//! Why no two members use one address. A member uses what rests on statements of removed node D only if these
//! are in its promise or, later, in the reclaim. The heir has all promises, so all of that is in the reclaim,
//! and what is not is used by nobody. Who is not among the members whose promises it has was admitted later, by a member that had
//! promised already, and so knew of the removal from the start. It knows that it knows all others: each promise
//! says how many admissions its signer had signed, and each removal whom the removed node had admitted.
//!
//! Why no two heirs. The heir is named by the removal; with several removals of one node, by the one with the
//! lowest id. A promise lists the removals its signer has seen, and the heir needs promises with the same list
//! as its own; one that has reclaimed says nothing more about the node. So two heirs with different lists would
//! need different things from the same member. An heir that is removed is succeeded by its own heir, once that has
//! reclaimed what it had; a reclaim by it that no member had seen by then is void like all else it signed.
//!
//! Lost or restored state means a new identity: a member that forgot its promise would break it.

use std::collections::{BTreeMap, BTreeSet};

use mesh_keys::{
    BodyId, Identity, IdentityKey, NodeId, RemovalError, Signed, SignedAdmission, SignedRemoval,
};

use super::{Promise, Promises, Reclaim, View};
use crate::ranges::RangeSet;

/// Addresses that nobody may use for now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frozen {
    /// The removed node they belong to.
    pub removed: NodeId,
    /// The addresses; empty when it owns none that this node knows of.
    pub ranges: RangeSet,
    /// Who will have them.
    pub heir: NodeId,
    /// What they wait for; empty when only for the heir.
    pub missing: BTreeSet<Missing>,
}

/// What the addresses of a removed node wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Missing {
    /// A promise of this member about all removals of the node. If the member does not come back, its own
    /// removal ends the wait.
    Promise(NodeId),
    /// Some admissions by this member.
    AdmissionsBy(NodeId),
    /// The admission of this node, which a removal keeps.
    Admission(NodeId),
    /// A grant or reclaim that a member's addresses rest on.
    Statement(BodyId),
    /// The heir was removed, and what it had is frozen too; or it is no member.
    Heir(NodeId),
}

/// Why a removal cannot be made. Nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CannotRemove {
    /// The node is no member.
    #[error("{} is no member of this cluster", .0.short())]
    NoMember(NodeId),
    /// Nobody would be left.
    #[error("it is the only member of this cluster")]
    LastMember,
    /// The cluster has admin keys, and this is none of them.
    #[error("this cluster has admin keys: one of them has to sign removals")]
    NotAdmin,
    /// It cannot be signed.
    #[error(transparent)]
    Invalid(#[from] RemovalError),
}

impl View {
    /// Signs the removal of a member, which keeps all others in. The heir is the signer or, if that is no
    /// (other) member, the member with the lowest id.
    ///
    /// # Errors
    /// [`CannotRemove`].
    pub fn removal(&self, subject: &NodeId, signer: &Identity) -> Result<SignedRemoval, CannotRemove> {
        self.removal_for(subject, signer, &signer.public())
    }

    fn removal_for(
        &self,
        subject: &NodeId,
        signer: &Identity,
        heir: &IdentityKey,
    ) -> Result<SignedRemoval, CannotRemove> {
        let admins = self.genesis().admin_keys();
        if !admins.is_empty() && !admins.contains(&signer.public()) {
            return Err(CannotRemove::NotAdmin);
        }
        let (subject, heir, keep) = self.prepare_removal(subject, heir)?;
        let grants = self.grants().worth_naming(&subject);
        Ok(SignedRemoval::issue_naming(self.cluster(), subject, heir, keep, &grants, signer)?)
    }

    /// Signs the removal of the signer itself, which leaves its place to `heir`.
    ///
    /// # Errors
    /// [`CannotRemove`].
    pub fn departure(&self, identity: &Identity, heir: &IdentityKey) -> Result<SignedRemoval, CannotRemove> {
        self.removal_for(&identity.public().node_id(), identity, heir)
    }

    /// What a removal of `subject` has to say so that all others stay in: subject, heir and whom it keeps. The heir
    /// is `preferred` or, if that is no (other) member, the member with the lowest id.
    ///
    /// # Errors
    /// [`CannotRemove::NoMember`] or [`CannotRemove::LastMember`].
    pub fn prepare_removal(
        &self,
        subject: &NodeId,
        preferred: &IdentityKey,
    ) -> Result<(IdentityKey, IdentityKey, Vec<NodeId>), CannotRemove> {
        let members = self.admissions();
        // Also a node that is out because of its sponsor: its addresses come back by its own removal only. And one whose
        // removal keeps nodes that nobody knows: all reclaims wait for these, until another removal does not keep them.
        let key = self
            .known_key(subject)
            .filter(|key| !members.is_removed(key) || members.awaits_by(key))
            .ok_or(CannotRemove::NoMember(*subject))?;
        let heir = Some(*preferred)
            .filter(|by| *by != key && members.contains(by))
            .or_else(|| members.members().map(|(_, other)| *other).find(|other| *other != key))
            .ok_or(CannotRemove::LastMember)?;
        Ok((key, heir, members.dependants(&key)))
    }

    /// All nodes that may be removed: that were let in, or own addresses although their admission is gone.
    pub fn not_removed(&self) -> BTreeMap<NodeId, IdentityKey> {
        let members = self.admissions();
        let owners = self.grants().holders().filter(|key| !members.is_removed(key));
        let owners = owners.map(|key| (key.node_id(), *key));
        owners.chain(members.not_removed().map(|(id, key)| (*id, *key))).collect()
    }

    /// The removed among `node` and those who let it in, as far as known here and as `chain` says.
    pub fn removed_above(&self, node: &IdentityKey, chain: &[SignedAdmission]) -> Vec<IdentityKey> {
        let members = self.admissions();
        let known = members.chain(node);
        let sponsors = known.iter().chain(chain).filter_map(|one| Some(one.decode().ok()?.sponsor));
        let above: BTreeSet<IdentityKey> = sponsors.chain([*node]).collect();
        above.into_iter().filter(|key| members.is_removed(key)).collect()
    }

    fn known_key(&self, node: &NodeId) -> Option<IdentityKey> {
        let owner = || self.grants().holders().find(|key| key.node_id() == *node).copied();
        self.admissions().known_key(node).or_else(owner)
    }

    /// The promises that `identity` has to make now; `None` when all are made, or it is no member.
    pub fn promise(&self, identity: &Identity) -> Option<Signed<Promises>> {
        self.promise_about(identity, true)
    }

    /// Likewise, for a node that joins with this view as its first: it has accepted nothing from the nodes
    /// removed by then, and never will.
    pub fn promise_as_newcomer(&self, identity: &Identity) -> Option<Signed<Promises>> {
        self.promise_about(identity, false)
    }

    fn promise_about(&self, identity: &Identity, accepted: bool) -> Option<Signed<Promises>> {
        let me = identity.public();
        if self.pending.is_empty() || !self.admissions().contains(&me) {
            return None;
        }
        let before = self.promises_of(&me.node_id());
        let mut entries = Vec::new();
        let mut news = false;
        for removed in &self.unsettled(before, accepted) {
            let made = before.and_then(|before| before.about(removed));
            let removals: Vec<BodyId> = self.admissions().removals_of(removed).into_iter().collect();
            news |= made.is_none_or(|made| made.removals != removals);
            let kept = match made {
                Some(made) => made.kept.clone(),
                None if accepted => self.grants().rests_on(&me, removed).into_iter().collect(),
                None => Vec::new(),
            };
            entries.push(Promise { removed: *removed, removals, kept });
        }
        if !news {
            return None;
        }
        let Some(version) = before.map_or(0, |before| before.version).checked_add(1) else {
            tracing::error!(
                "somebody else has signed promises in the name of this node, the last there can be: it needs a new identity"
            );
            return None;
        };
        let promises = Promises {
            cluster: self.cluster(),
            node: me,
            version,
            sponsored: (self.admissions().highest_serial(&me), self.admissions().count_up_to(&me, u64::MAX)),
            entries,
        };
        match Signed::sign(&promises, identity) {
            Ok(signed) => Some(signed),
            Err(error) => {
                tracing::error!(%error, "the promises about removed nodes cannot be signed: their addresses stay frozen");
                None
            }
        }
    }

    /// The removed nodes whose era has not ended for a member that has made these promises: it does not go by a
    /// reclaim that it had not seen when it promised to accept nothing more from the node that signed it.
    fn unsettled(&self, promises: Option<&Promises>, accepted: bool) -> BTreeSet<IdentityKey> {
        let mut unsettled = self.pending.clone();
        let mut queue: Vec<IdentityKey> = self.pending.iter().copied().collect();
        while let Some(signer) = queue.pop() {
            let promise = promises.and_then(|promises| promises.about(&signer));
            for (id, removed) in self.grants().reclaims_by(&signer) {
                let seen = promise.map_or(accepted, |promise| promise.kept.binary_search(id).is_ok());
                if !seen && unsettled.insert(*removed) {
                    queue.push(*removed);
                }
            }
        }
        unsettled
    }

    /// The addresses that `key` owns and may use: none that rest on a statement of a removed node which it had
    /// not seen when it made its promise about that node.
    pub fn usable(&self, key: &IdentityKey) -> RangeSet {
        if !self.admissions().contains(key) {
            return RangeSet::new();
        }
        let mut usable = self.grants().owned_by(key);
        let Some(promises) = self.promises_of(&key.node_id()) else { return usable };
        for removed in self.unsettled(Some(promises), true) {
            let Some(promise) = promises.about(&removed) else { continue };
            for grant in self.grants().granted_by(&removed) {
                if promise.kept.binary_search(grant).is_err() {
                    usable.subtract(&self.grants().owned_below(grant, key));
                }
            }
        }
        usable
    }

    /// The statements of a removed node that members' promises name.
    fn kept(&self, removed: &IdentityKey) -> BTreeSet<BodyId> {
        let members = self.admissions().members().filter_map(|(id, _)| self.promises_of(id));
        let promises = members.filter_map(|promises| promises.about(removed));
        promises.flat_map(|promise| promise.kept.iter().copied()).collect()
    }

    /// Who takes over what `removed` had, as far as known.
    fn heir(&self, removed: &IdentityKey) -> Option<(BodyId, IdentityKey)> {
        let first = self.admissions().removals_of(removed).into_iter().next()?;
        let removal = self.admissions().removal(&first)?;
        Some((first, self.grants().holder(removal.heir)))
    }

    /// What keeps `heir` from reclaiming what `removed` had.
    fn missing(&self, removed: &IdentityKey, heir: &IdentityKey) -> BTreeSet<Missing> {
        let members = self.admissions();
        let mut missing: BTreeSet<Missing> = members.awaited().copied().map(Missing::Admission).collect();
        if !members.contains(heir) {
            missing.insert(Missing::Heir(heir.node_id()));
        }
        let removals = members.removals_of(removed);
        for (id, key) in members.members() {
            let promises = self.promises_of(id);
            let Some(promises) = promises.filter(|promises| {
                promises.about(removed).is_some_and(|promise| promise.removals.iter().eq(&removals))
            }) else {
                missing.insert(Missing::Promise(*id));
                continue;
            };
            let (serial, count) = promises.sponsored;
            if members.count_up_to(key, serial) < count {
                missing.insert(Missing::AdmissionsBy(*id));
            }
        }
        let kept = self.kept(removed);
        missing.extend(kept.into_iter().filter(|id| !self.grants().contains(id)).map(Missing::Statement));
        missing
    }

    /// The addresses of all removed nodes whose era has not ended, and what would free them.
    pub fn frozen(&self) -> Vec<Frozen> {
        self.pending
            .iter()
            .filter_map(|removed| {
                let (_, heir) = self.heir(removed)?;
                Some(Frozen {
                    removed: removed.node_id(),
                    ranges: self.grants().owned_by(removed),
                    heir: heir.node_id(),
                    missing: self.missing(removed, &heir),
                })
            })
            .collect()
    }

    /// Who waits for the promises of all members.
    pub fn heirs(&self) -> BTreeSet<NodeId> {
        self.pending.iter().filter_map(|removed| Some(self.heir(removed)?.1.node_id())).collect()
    }

    /// Ends the eras of all removed nodes that `identity` inherits from and nothing is missing for.
    pub fn reclaim(&self, identity: &Identity) -> Vec<Signed<Reclaim>> {
        let me = identity.public();
        self.pending
            .iter()
            .filter_map(|removed| {
                let (removal, _) = self.heir(removed).filter(|(_, heir)| *heir == me)?;
                if !self.missing(removed, &me).is_empty() {
                    return None;
                }
                let kept = self.kept(removed).into_iter().collect();
                let reclaim = Reclaim { cluster: self.cluster(), removed: *removed, removal, to: me, kept };
                Signed::sign(&reclaim, identity)
                    .inspect_err(|error| tracing::error!(%error, removed = %removed.node_id().short(), "a reclaim cannot be signed"))
                    .ok()
            })
            .collect()
    }
}
