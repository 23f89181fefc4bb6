//! What all members agree on, each having its own copy: who belongs to the cluster, who owns which
//! addresses, and what every node says of itself.
//!
//! Three signed sets, each a join-semilattice, so that copies merge in any order, any number of times:
//!
//! * **admissions** grow only; one counts if a chain of sponsors leads to the founder ([`Admissions`]);
//! * **grants** grow only; they form a tree of address ranges rooted in the genesis ([`Ledger`]);
//! * **records**: of each node the one with the highest (generation, version, body id) ([`NodeRecord`]).
//!
//! A [`View`] is *closed*: everything in it is justified by other things in it and by the genesis document.
//! [`View::merge`] keeps it so: what a delta does not justify is left out, and comes again with the next
//! exchange. For closed views a, b, c (with ∨ for merging the whole of one into the other):
//! a ∨ a = a, a ∨ b = b ∨ a, (a ∨ b) ∨ c = a ∨ (b ∨ c).

mod admissions;
mod grants;
mod record;

use std::collections::{BTreeMap, BTreeSet};

use mesh_keys::{BodyId, ClusterId, Genesis, IdentityKey, NodeId, Signed, SignedAdmission};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

pub use admissions::{Admissions, NotAdmitted};
pub use grants::{Grant, GrantConflict, InvalidGrant, Ledger};
pub use record::{InvalidRecord, LaneInfo, NodeRecord};

/// One node's copy of what all members agree on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct View {
    genesis: Genesis,
    admissions: Admissions,
    grants: Ledger,
    records: BTreeMap<NodeId, Entry>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    signed: Signed<NodeRecord>,
    record: NodeRecord,
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
        self.admissions.is_empty() && self.grants.is_empty() && self.records.is_empty()
    }

    /// Cuts the delta into parts of at most `items` items, in an order that keeps each justified by those
    /// before it.
    pub fn chunks(mut self, items: usize) -> Vec<Self> {
        let items = items.max(1);
        let mut parts = Vec::new();
        while !self.is_empty() {
            let mut part = Self::default();
            part.admissions = take(&mut self.admissions, items);
            part.grants = take(&mut self.grants, items - part.admissions.len());
            part.records = take(&mut self.records, items - part.admissions.len() - part.grants.len());
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
        let admissions = Admissions::new(genesis.id(), genesis.founder());
        let grants = Ledger::new(&genesis);
        Self { genesis, admissions, grants, records: BTreeMap::new() }
    }

    /// Merges `delta`. Each item is checked on its own: a bad one is refused and the others go in.
    pub fn merge(&mut self, delta: &Delta) -> Merged {
        let mut merged = Merged::default();
        for item in &delta.admissions {
            match self.admissions.insert(item) {
                Ok(true) => merged.new.admissions.push(item.clone()),
                Ok(false) => {}
                Err(error) => merged.refused.push(format!("admission: {error}")),
            }
        }
        for item in &delta.grants {
            match self.grants.insert(item) {
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
        merged
    }

    fn insert_record(&mut self, signed: &Signed<NodeRecord>) -> Result<bool, InvalidRecord> {
        let claimed = signed.decode()?;
        let id = claimed.node.node_id();
        if let Some(entry) = self.records.get(&id)
            && (entry.record.order(), entry.signed.id(), &entry.signed)
                >= (claimed.order(), signed.id(), signed)
        {
            return Ok(false);
        }
        if !self.admissions.contains(&claimed.node) {
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

    /// What `node` says of itself.
    pub fn record(&self, node: &NodeId) -> Option<&NodeRecord> {
        self.records.get(node).map(|entry| &entry.record)
    }

    /// The same, as it was signed.
    pub fn signed_record(&self, node: &NodeId) -> Option<&Signed<NodeRecord>> {
        self.records.get(node).map(|entry| &entry.signed)
    }

    /// All records.
    pub fn records(&self) -> impl Iterator<Item = (&NodeId, &NodeRecord)> {
        self.records.iter().map(|(id, entry)| (id, &entry.record))
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
        }
    }

    /// One value that equal views have in common, and no others.
    pub fn fingerprint(&self) -> [u8; 32] {
        let digest = self.digest();
        let mut hash = Sha256::new();
        hash.update(b"hauberk view v1");
        for set in [&digest.admissions, &digest.grants] {
            hash.update((set.len() as u64).to_le_bytes());
            set.iter().for_each(|id| hash.update(id.as_bytes()));
        }
        for (node, (generation, version, body)) in &digest.records {
            hash.update(node.as_bytes());
            hash.update(generation.to_le_bytes());
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
        delta
    }

    /// Whether a view with `theirs` as its digest has something that this one lacks.
    pub fn lacks(&self, theirs: &Digest) -> bool {
        let ours = self.digest();
        !theirs.admissions.is_subset(&ours.admissions)
            || !theirs.grants.is_subset(&ours.grants)
            || theirs.records.iter().any(|(id, (generation, version, body))| {
                ours.records.get(id).is_none_or(|(our_generation, our_version, our_body)| {
                    (our_generation, our_version, our_body) < (generation, version, body)
                })
            })
    }
}

#[cfg(test)]
mod tests;
