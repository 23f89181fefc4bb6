//! What all members agree on, each having its own copy: who belongs to the cluster, who owns which
//! addresses, and what every node says of itself.
//!
//! Signed sets, together a join-semilattice, so that copies merge in any order, any number of times:
//!
//! * **admissions** and **removals** grow only; who is a member follows from both ([`Admissions`]);
//! * **grants** and **reclaims** grow only; they make a tree of address ranges rooted in the genesis ([`Ledger`]);
//! * **records**: of each node the one with the highest (generation, version, body id) ([`NodeRecord`]);
//! * **promises**: of each node the newest, about addresses of removed nodes ([`Promises`], [`reclaim`]).
//!
//! Records and promises of a removed node are dropped: its removal, once there, is there for good.
//!
//! A [`View`] is *closed*: everything in it is justified by other things in it and by the genesis document.
//! [`View::merge`] keeps it so: what a delta does not justify is left out, and comes again with the next
//! exchange. For closed views a, b, c (with ∨ for merging the whole of one into the other):
//! a ∨ a = a, a ∨ b = b ∨ a, (a ∨ b) ∨ c = a ∨ (b ∨ c).

mod admissions;
mod grants;
mod promises;
pub mod reclaim;
mod record;

use std::collections::{BTreeMap, BTreeSet};

use mesh_keys::{BodyId, ClusterId, Genesis, IdentityKey, NodeId, Signed, SignedAdmission, SignedRemoval};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use grants::Change;

pub use admissions::{Admissions, NotAdmitted, NotRemoved};
pub use grants::{Grant, GrantConflict, InvalidGrant, InvalidReclaim, Ledger, Reclaim};
pub use promises::{InvalidPromises, Promise, Promises};
pub use reclaim::{CannotRemove, Frozen, Missing};
pub use record::{InvalidRecord, LaneInfo, NodeRecord};

/// One node's copy of what all members agree on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct View {
    genesis: Genesis,
    admissions: Admissions,
    grants: Ledger,
    records: BTreeMap<NodeId, Entry>,
    promises: BTreeMap<NodeId, PromisesEntry>,
    /// What follows: the removed nodes whose era no reclaim has ended.
    pending: BTreeSet<IdentityKey>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    signed: Signed<NodeRecord>,
    record: NodeRecord,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct PromisesEntry {
    signed: Signed<Promises>,
    promises: Promises,
}

/// Some of what is in a view: to be merged into another.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Delta {
    /// Sponsors before those they admitted.
    pub admissions: Vec<SignedAdmission>,
    /// Grants before those that follow from them.
    pub grants: Vec<Signed<Grant>>,
    /// In no order.
    pub records: Vec<Signed<NodeRecord>>,
    /// In no order.
    pub removals: Vec<SignedRemoval>,
    /// Those that make someone an heir before those that the heir signed.
    pub reclaims: Vec<Signed<Reclaim>>,
    /// In no order.
    pub promises: Vec<Signed<Promises>>,
}

/// The names of all that is in a view; a fraction of its size.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Digest {
    /// Admissions.
    pub admissions: BTreeSet<BodyId>,
    /// Grants.
    pub grants: BTreeSet<BodyId>,
    /// Records: node, generation, version and body.
    pub records: BTreeMap<NodeId, (u64, u64, BodyId)>,
    /// Removals.
    pub removals: BTreeSet<BodyId>,
    /// Reclaims.
    pub reclaims: BTreeSet<BodyId>,
    /// Promises: node, version and body.
    pub promises: BTreeMap<NodeId, (u64, BodyId)>,
}

/// What merging did.
#[derive(Clone, Debug, Default)]
pub struct Merged {
    /// What was new, to be passed on.
    pub new: Delta,
    /// What was refused, and why.
    pub refused: Vec<String>,
}

impl Delta {
    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Number of items.
    pub fn len(&self) -> usize {
        self.admissions.len()
            + self.removals.len()
            + self.reclaims.len()
            + self.grants.len()
            + self.records.len()
            + self.promises.len()
    }

    /// Adds the items of `other`, which may rest on those that are there.
    pub fn append(&mut self, mut other: Self) {
        self.admissions.append(&mut other.admissions);
        self.grants.append(&mut other.grants);
        self.records.append(&mut other.records);
        self.removals.append(&mut other.removals);
        self.reclaims.append(&mut other.reclaims);
        self.promises.append(&mut other.promises);
    }

    /// Cuts the delta into parts of at most `items` items, in an order that keeps each justified by those
    /// before it.
    pub fn chunks(mut self, items: usize) -> Vec<Self> {
        let items = items.max(1);
        let mut parts = Vec::new();
        while !self.is_empty() {
            let mut part = Self::default();
            part.admissions = take(&mut self.admissions, items);
            part.removals = take(&mut self.removals, items - part.len());
            part.reclaims = take(&mut self.reclaims, items - part.len());
            part.grants = take(&mut self.grants, items - part.len());
            part.records = take(&mut self.records, items - part.len());
            part.promises = take(&mut self.promises, items - part.len());
            parts.push(part);
        }
        parts
    }
}

fn take<T>(from: &mut Vec<T>, most: usize) -> Vec<T> {
    let rest = from.split_off(most.min(from.len()));
    std::mem::replace(from, rest)
}

impl View {
    /// The view of a cluster that has its founder only.
    pub fn new(genesis: Genesis) -> Self {
        Self {
            admissions: Admissions::new(&genesis),
            grants: Ledger::new(&genesis),
            records: BTreeMap::new(),
            promises: BTreeMap::new(),
            pending: BTreeSet::new(),
            genesis,
        }
    }

    /// Merges `delta`. Each item is checked on its own: a bad one is refused and the others go in.
    pub fn merge(&mut self, delta: &Delta) -> Merged {
        let mut merged = Merged::default();
        self.merge_membership(delta, &mut merged);
        for item in &delta.reclaims {
            match self.insert_reclaim(item) {
                Ok(true) => merged.new.reclaims.push(item.clone()),
                Ok(false) => {}
                Err(error) => merged.refused.push(format!("reclaim: {error}")),
            }
        }
        for (item, result) in self.grants.insert_many(&delta.grants) {
            match result {
                Ok(true) => merged.new.grants.push(item.clone()),
                Ok(false) => {}
                Err(error) => merged.refused.push(format!("grant: {error}")),
            }
        }
        for item in &delta.records {
            match self.insert_record(item) {
                Ok(true) => merged.new.records.push(item.clone()),
                Ok(false) => {}
                Err(error) => merged.refused.push(format!("record: {error}")),
            }
        }
        for item in &delta.promises {
            match self.insert_promises(item) {
                Ok(true) => merged.new.promises.push(item.clone()),
                Ok(false) => {}
                Err(error) => merged.refused.push(format!("promises: {error}")),
            }
        }
        merged
    }

    /// Admissions and removals. An old cluster has had more members than it may have at a time: where admissions
    /// find no room, the removals that make it come first, and then the rest.
    fn merge_membership(&mut self, delta: &Delta, merged: &mut Merged) {
        let mut admissions: Vec<&SignedAdmission> = delta.admissions.iter().collect();
        let mut removals: Vec<&SignedRemoval> = delta.removals.iter().collect();
        loop {
            let (mut full, mut removed, mut refused) = (false, false, Vec::new());
            admissions.retain(|item| match self.admissions.insert(item) {
                Ok(new) => {
                    merged.new.admissions.extend(new.then(|| (*item).clone()));
                    false
                }
                Err(error) => {
                    full |= error == NotAdmitted::Full;
                    refused.push(format!("admission: {error}"));
                    true
                }
            });
            removals.retain(|item| match self.remove(item) {
                Ok(new) => {
                    removed |= new;
                    merged.new.removals.extend(new.then(|| (*item).clone()));
                    false
                }
                Err(error) => {
                    refused.push(format!("removal: {error}"));
                    true
                }
            });
            if !(full && removed) {
                merged.refused.append(&mut refused);
                return;
            }
        }
    }

    fn remove(&mut self, signed: &SignedRemoval) -> Result<bool, NotRemoved> {
        let new = self.admissions.remove(signed)?;
        if new && let Some(removal) = self.admissions.removal(&signed.id()) {
            let subject = removal.subject;
            self.records.remove(&subject.node_id());
            self.promises.remove(&subject.node_id());
            if !self.grants.is_reclaimed(&subject) {
                self.pending.insert(subject);
            }
        }
        Ok(new)
    }

    fn insert_reclaim(&mut self, signed: &Signed<Reclaim>) -> Result<bool, InvalidReclaim> {
        match self.grants.reclaim(signed, &self.admissions)? {
            Change::None => return Ok(false),
            Change::Local(removed) => {
                self.pending.remove(&removed);
            }
            Change::Tree => {
                let removed = self.admissions.removed();
                self.pending = removed.filter(|key| !self.grants.is_reclaimed(key)).copied().collect();
            }
        }
        Ok(true)
    }

    fn insert_promises(&mut self, signed: &Signed<Promises>) -> Result<bool, InvalidPromises> {
        let claimed = signed.decode()?;
        let id = claimed.node.node_id();
        if self.admissions.is_removed(&claimed.node) {
            return Ok(false);
        }
        if let Some(entry) = self.promises.get(&id)
            && (entry.promises.version, &entry.signed) >= (claimed.version, signed)
        {
            return Ok(false);
        }
        if !self.admissions.was_admitted(&claimed.node) {
            return Err(InvalidPromises::NotAdmitted { node: id });
        }
        let promises = signed.verify(&claimed.node)?;
        promises.validate(self.genesis.id())?;
        self.promises.insert(id, PromisesEntry { signed: signed.clone(), promises });
        Ok(true)
    }

    fn insert_record(&mut self, signed: &Signed<NodeRecord>) -> Result<bool, InvalidRecord> {
        let claimed = signed.decode()?;
        let id = claimed.node.node_id();
        if self.admissions.is_removed(&claimed.node) {
            return Ok(false);
        }
        if let Some(entry) = self.records.get(&id)
            && (entry.record.order(), entry.signed.id(), &entry.signed)
                >= (claimed.order(), signed.id(), signed)
        {
            return Ok(false);
        }
        if !self.admissions.was_admitted(&claimed.node) {
            return Err(InvalidRecord::NotAdmitted { node: id });
        }
        let record = signed.verify(&claimed.node)?;
        record.validate(&self.genesis)?;
        self.records.insert(id, Entry { signed: signed.clone(), record });
        Ok(true)
    }

    /// The genesis document.
    pub fn genesis(&self) -> &Genesis {
        &self.genesis
    }

    /// The cluster id.
    pub fn cluster(&self) -> ClusterId {
        self.genesis.id()
    }

    /// Who belongs to the cluster.
    pub fn admissions(&self) -> &Admissions {
        &self.admissions
    }

    /// Who owns which addresses.
    pub fn grants(&self) -> &Ledger {
        &self.grants
    }

    /// What the member `node` says of itself.
    pub fn record(&self, node: &NodeId) -> Option<&NodeRecord> {
        self.member_record(node).map(|entry| &entry.record)
    }

    /// The same, as it was signed.
    pub fn signed_record(&self, node: &NodeId) -> Option<&Signed<NodeRecord>> {
        self.member_record(node).map(|entry| &entry.signed)
    }

    /// The records of all members.
    pub fn records(&self) -> impl Iterator<Item = (&NodeId, &NodeRecord)> {
        let members = self.records.iter().filter(|(_, entry)| self.admissions.contains(&entry.record.node));
        members.map(|(id, entry)| (id, &entry.record))
    }

    fn member_record(&self, node: &NodeId) -> Option<&Entry> {
        self.records.get(node).filter(|entry| self.admissions.contains(&entry.record.node))
    }

    /// The promises of a node about removed nodes.
    pub fn promises_of(&self, node: &NodeId) -> Option<&Promises> {
        self.promises.get(node).map(|entry| &entry.promises)
    }

    /// The identity key of a member.
    pub fn key_of(&self, node: &NodeId) -> Option<IdentityKey> {
        self.admissions.key_of(node)
    }

    /// The whole view.
    pub fn to_delta(&self) -> Delta {
        Delta {
            admissions: self.admissions.in_order(),
            grants: self.grants.in_order(),
            records: self.records.values().map(|entry| entry.signed.clone()).collect(),
            removals: self.admissions.removals().cloned().collect(),
            reclaims: self.grants.reclaims_in_order(),
            promises: self.promises.values().map(|entry| entry.signed.clone()).collect(),
        }
    }

    /// The names of all that is in the view.
    pub fn digest(&self) -> Digest {
        Digest {
            admissions: self.admissions.ids(),
            grants: self.grants.ids(),
            records: self
                .records
                .iter()
                .map(|(id, entry)| {
                    let (generation, version) = entry.record.order();
                    (*id, (generation, version, entry.signed.id()))
                })
                .collect(),
            removals: self.admissions.removal_ids(),
            reclaims: self.grants.reclaim_ids(),
            promises: self
                .promises
                .iter()
                .map(|(id, entry)| (*id, (entry.promises.version, entry.signed.id())))
                .collect(),
        }
    }

    /// One value that equal views have in common, and no others.
    pub fn fingerprint(&self) -> [u8; 32] {
        let digest = self.digest();
        let mut hash = Sha256::new();
        hash.update(b"hauberk view v2");
        for set in [&digest.admissions, &digest.grants, &digest.removals, &digest.reclaims] {
            hash.update((set.len() as u64).to_le_bytes());
            set.iter().for_each(|id| hash.update(id.as_bytes()));
        }
        hash.update((digest.records.len() as u64).to_le_bytes());
        for (node, (generation, version, body)) in &digest.records {
            hash.update(node.as_bytes());
            hash.update(generation.to_le_bytes());
            hash.update(version.to_le_bytes());
            hash.update(body.as_bytes());
        }
        for (node, (version, body)) in &digest.promises {
            hash.update(node.as_bytes());
            hash.update(version.to_le_bytes());
            hash.update(body.as_bytes());
        }
        hash.finalize().into()
    }

    /// What a view with `theirs` as its digest lacks.
    pub fn missing_in(&self, theirs: &Digest) -> Delta {
        let mut delta = self.to_delta();
        delta.admissions.retain(|item| !theirs.admissions.contains(&item.id()));
        delta.grants.retain(|item| !theirs.grants.contains(&item.id()));
        delta.records = self
            .records
            .iter()
            .filter(|(id, entry)| {
                theirs.records.get(id).is_none_or(|(generation, version, body)| {
                    let ours = entry.record.order();
                    (ours, entry.signed.id()) > ((*generation, *version), *body)
                })
            })
            .map(|(_, entry)| entry.signed.clone())
            .collect();
        delta.removals.retain(|item| !theirs.removals.contains(&item.id()));
        delta.reclaims.retain(|item| !theirs.reclaims.contains(&item.id()));
        delta.promises = self
            .promises
            .iter()
            .filter(|(id, entry)| {
                theirs.promises.get(id).is_none_or(|(version, body)| {
                    let ours = entry.promises.version;
                    ours > *version || (ours == *version && entry.signed.id() != *body)
                })
            })
            .map(|(_, entry)| entry.signed.clone())
            .collect();
        delta
    }

    /// Whether a view with `theirs` as its digest has something that this one lacks.
    pub fn lacks(&self, theirs: &Digest) -> bool {
        let ours = self.digest();
        // What a node said that we know to be removed is not wanted.
        let wanted = |id: &NodeId| !self.admissions.is_removed_id(id);
        !theirs.admissions.is_subset(&ours.admissions)
            || !theirs.removals.is_subset(&ours.removals)
            || !theirs.reclaims.is_subset(&ours.reclaims)
            || !theirs.grants.is_subset(&ours.grants)
            || theirs.records.iter().filter(|(id, _)| wanted(id)).any(|(id, (generation, version, body))| {
                ours.records.get(id).is_none_or(|(our_generation, our_version, our_body)| {
                    (our_generation, our_version, our_body) < (generation, version, body)
                })
            })
            || theirs.promises.iter().filter(|(id, _)| wanted(id)).any(|(id, (version, body))| {
                ours.promises.get(id).is_none_or(|(our_version, our_body)| {
                    our_version < version || (our_version == version && our_body != body)
                })
            })
    }
}

#[cfg(test)]
mod tests;
