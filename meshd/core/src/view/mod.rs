//! What all members agree on, each having its own copy: who belongs to the cluster, who owns which
//! addresses, and what every node says of itself.
//!
//! Signed sets, together a join-semilattice, so that copies merge in any order, any number of times:
//!
//! * **admissions** and **removals** grow only; who is a member follows from both ([`Admissions`]);
//! * **grants** and **reclaims** grow only; they make a tree of address ranges rooted in the genesis ([`Ledger`]);
//! * **records**: of each node the one with the highest (generation, version, body id) ([`NodeRecord`]);
//! * **promises**: of each node the newest, about addresses of removed nodes ([`Promises`], [`reclaim`]);
//! * **join policies**: of each authority the newest ([`View::join_window`]);
//! * **tokens** and **revocations** grow only ([`View::redeem`]);
//! * **tries**: of each node how often joining by password failed there.
//!
//! Records, promises, tries and tokens of a removed node are dropped: its removal, once there, is there for good. With
//! admin keys, so are admissions that a removal has made void, and what those say whom nothing else let in ([`Admissions`]).
//!
//! A [`View`] is *closed*: everything in it is justified by other things in it and by the genesis document.
//! [`View::merge`] keeps it so: what a delta does not justify is left out, and comes again with the next
//! exchange. For closed views a, b, c (with ∨ for merging the whole of one into the other):
//! a ∨ a = a, a ∨ b = b ∨ a, (a ∨ b) ∨ c = a ∨ (b ∨ c). With admin keys the last holds for views that have the same
//! removals; else what a removal has made void in one may be founded anew by the next, and has to be told again.

mod admissions;
mod grants;
mod items;
mod policy;
mod promises;
pub mod reclaim;
mod record;
mod registers;
mod tokens;
mod tries;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, OnceLock};

use ipnet::Ipv6Net;
use mesh_keys::{
    BodyId, ClusterId, Genesis, IdentityKey, JoinPolicy, NodeId, Revocation, Signable, Signed,
    SignedAdmission, SignedJoinPolicy, SignedRemoval, SignedRevocation, SignedToken, Token, TokenId, Tries,
};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::gossip::catalogue::{Catalogue, Kind, Name};
use crate::persistent::Map;
use crate::ranges::RangeSet;
use admissions::{Gone, Removing};
use grants::Change;
use registers::Registers;

pub use admissions::{Admissions, NotAdmitted, NotRemoved};
pub use grants::{Grant, GrantConflict, InvalidGrant, InvalidReclaim, Ledger, Reclaim};
pub use policy::NoAuthority;
pub use promises::{InvalidPromises, Promise, Promises};
pub use reclaim::{CannotRemove, Frozen, Missing};
pub use record::{InvalidRecord, LaneInfo, NodeRecord};
pub use registers::Order;
pub use tokens::{InvalidToken, TokenRefused};
pub use tries::InvalidTries;

/// One node's copy of what all members agree on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct View {
    genesis: Arc<Genesis>,
    admissions: Admissions,
    grants: Ledger,
    records: Map<NodeId, Entry>,
    promises: Map<NodeId, PromisesEntry>,
    policies: Registers<JoinPolicy>,
    tries: Registers<Tries>,
    tokens: tokens::Set<Token>,
    revocations: tokens::Set<Revocation>,
    /// What follows: the tokens that were revoked,
    revoked: BTreeSet<TokenId>,
    /// and the removed nodes whose era no reclaim has ended.
    pending: BTreeSet<IdentityKey>,
    /// What somebody may use, until something changes.
    usable: Remembered<(IdentityKey, RangeSet)>,
    /// The names of all items, until something changes.
    catalogue: Remembered<Catalogue>,
    /// The IPv6 prefixes that several members have, until there are others with records.
    contested: Remembered<BTreeMap<Ipv6Net, BTreeSet<NodeId>>>,
    news: News,
}

/// The names of what was merged last, in that order. Of no weight in comparisons: equal views may have come about in
/// different ways.
#[derive(Clone, Debug, Default)]
struct News {
    names: Vec<Name>,
    /// How many there were before these,
    before: usize,
    /// and how many of them all are no news any more.
    old: usize,
}

impl News {
    /// So many are kept in mind, even if they cannot be written.
    const MOST: usize = 4096;

    fn add(&mut self, names: impl Iterator<Item = Name>) {
        self.names.extend(names);
        if self.names.len() > Self::MOST {
            self.drop_before(self.before + self.names.len());
        }
    }

    fn drop_before(&mut self, count: usize) {
        let number = count.saturating_sub(self.before).min(self.names.len());
        self.names.drain(..number);
        self.names.shrink_to_fit();
        self.before += number;
    }
}

impl PartialEq for News {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for News {}

/// What was computed of the rest of a view, and so is equal if that is.
#[derive(Clone, Debug)]
struct Remembered<T>(OnceLock<T>);

impl<T> Default for Remembered<T> {
    fn default() -> Self {
        Self(OnceLock::new())
    }
}

impl<T> PartialEq for Remembered<T> {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl<T> Eq for Remembered<T> {}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    id: BodyId,
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
    /// In no order.
    pub tries: Vec<Signed<Tries>>,
    /// In no order.
    pub tokens: Vec<SignedToken>,
    /// In no order.
    pub revocations: Vec<SignedRevocation>,
    /// In no order.
    pub policies: Vec<SignedJoinPolicy>,
}

/// What merging did.
#[derive(Clone, Debug, Default)]
pub struct Merged {
    /// What was new, to be passed on.
    pub new: Delta,
    /// The names of what is there no more, and is not replaced by what is new.
    pub gone: Vec<Name>,
    /// What was refused, and why.
    pub refused: Vec<String>,
    /// How many of these are not wrong in themselves: what they rest on may be on its way, or room be made for them.
    pub early: usize,
}

impl Merged {
    fn refuse(&mut self, what: &str, error: impl std::fmt::Display, early: bool) {
        self.refused.push(format!("{what}: {error}"));
        self.early += usize::from(early);
    }
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
            + self.tries.len()
            + self.tokens.len()
            + self.revocations.len()
            + self.policies.len()
    }

    /// Adds the items of `other`, which may rest on those that are there.
    pub fn append(&mut self, mut other: Self) {
        self.admissions.append(&mut other.admissions);
        self.grants.append(&mut other.grants);
        self.records.append(&mut other.records);
        self.removals.append(&mut other.removals);
        self.reclaims.append(&mut other.reclaims);
        self.promises.append(&mut other.promises);
        self.tries.append(&mut other.tries);
        self.tokens.append(&mut other.tokens);
        self.revocations.append(&mut other.revocations);
        self.policies.append(&mut other.policies);
    }

    /// Takes the items of `other` out.
    pub fn remove(&mut self, other: &Self) {
        fn without<T>(all: &mut Vec<Signed<T>>, other: &[Signed<T>]) {
            if !other.is_empty() {
                all.retain(|item| !other.contains(item));
            }
        }
        without(&mut self.admissions, &other.admissions);
        without(&mut self.grants, &other.grants);
        without(&mut self.records, &other.records);
        without(&mut self.removals, &other.removals);
        without(&mut self.reclaims, &other.reclaims);
        without(&mut self.promises, &other.promises);
        without(&mut self.tries, &other.tries);
        without(&mut self.tokens, &other.tokens);
        without(&mut self.revocations, &other.revocations);
        without(&mut self.policies, &other.policies);
    }

    /// Cuts the delta into parts of at most `items` items and `bytes` bytes, in an order that keeps each justified by
    /// those before it. An item that is longer has a part of its own.
    pub fn chunks(self, items: usize, bytes: usize) -> Vec<Self> {
        let mut cutter = Cutter { items, bytes, left: (0, 0), parts: Vec::new() };
        cutter.add(self.admissions, |part| &mut part.admissions);
        cutter.add(self.removals, |part| &mut part.removals);
        cutter.add(self.reclaims, |part| &mut part.reclaims);
        cutter.add(self.grants, |part| &mut part.grants);
        cutter.add(self.records, |part| &mut part.records);
        cutter.add(self.promises, |part| &mut part.promises);
        cutter.add(self.tries, |part| &mut part.tries);
        cutter.add(self.tokens, |part| &mut part.tokens);
        cutter.add(self.revocations, |part| &mut part.revocations);
        cutter.add(self.policies, |part| &mut part.policies);
        cutter.parts
    }
}

/// Most bytes of an encoded signed statement beside its body: signature, format and length.
const SIGNED_HEAD: usize = 80;

/// Makes parts of a delta.
struct Cutter {
    items: usize,
    bytes: usize,
    /// Items and bytes that the last part has room for.
    left: (usize, usize),
    parts: Vec<Delta>,
}

impl Cutter {
    fn add<T: Signable>(&mut self, items: Vec<Signed<T>>, of: fn(&mut Delta) -> &mut Vec<Signed<T>>) {
        for item in items {
            let length = item.body().len() + SIGNED_HEAD;
            if self.left.0 == 0 || self.left.1 < length {
                self.parts.push(Delta::default());
                self.left = (self.items, self.bytes);
            }
            self.left = (self.left.0.saturating_sub(1), self.left.1.saturating_sub(length));
            if let Some(part) = self.parts.last_mut() {
                of(part).push(item);
            }
        }
    }
}

fn admission_names(gone: &Gone) -> impl Iterator<Item = Name> {
    gone.admissions.iter().map(|id| Name::of_statement(Kind::ADMISSION, id))
}

impl View {
    /// The view of a cluster that has its founder only.
    pub fn new(genesis: Genesis) -> Self {
        Self {
            admissions: Admissions::new(&genesis),
            grants: Ledger::new(&genesis),
            records: Map::default(),
            promises: Map::default(),
            policies: Registers::default(),
            tries: Registers::default(),
            tokens: tokens::Set::default(),
            revocations: tokens::Set::default(),
            revoked: BTreeSet::new(),
            pending: BTreeSet::new(),
            usable: Remembered::default(),
            catalogue: Remembered::default(),
            contested: Remembered::default(),
            news: News::default(),
            genesis: Arc::new(genesis),
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
                Err(error) => merged.refuse("reclaim", &error, error.is_early()),
            }
        }
        for (item, result) in self.grants.insert_many(&delta.grants, &self.admissions) {
            match result {
                Ok(Some(gone)) => {
                    merged.new.grants.push(item.clone());
                    merged.gone.extend(gone.iter().map(|id| Name::of_statement(Kind::GRANT, id)));
                }
                Ok(None) => {}
                Err(error) => merged.refuse("grant", &error, error.is_early()),
            }
        }
        for item in &delta.records {
            match self.insert_record(item) {
                Ok(true) => merged.new.records.push(item.clone()),
                Ok(false) => {}
                Err(error) => {
                    merged.refuse("record", &error, matches!(error, InvalidRecord::NotAdmitted { .. }))
                }
            }
        }
        for item in &delta.promises {
            match self.insert_promises(item) {
                Ok(true) => merged.new.promises.push(item.clone()),
                Ok(false) => {}
                Err(error) => {
                    merged.refuse("promises", &error, matches!(error, InvalidPromises::NotAdmitted { .. }))
                }
            }
        }
        for item in &delta.tries {
            match self.insert_tries(item) {
                Ok(true) => merged.new.tries.push(item.clone()),
                Ok(false) => {}
                Err(error) => merged.refuse("tries", &error, error.is_early()),
            }
        }
        for item in &delta.tokens {
            match self.insert_token(item) {
                Ok(true) => merged.new.tokens.push(item.clone()),
                Ok(false) => {}
                Err(error) => merged.refuse("token", &error, error.is_early()),
            }
        }
        for item in &delta.revocations {
            match self.insert_revocation(item) {
                Ok(true) => merged.new.revocations.push(item.clone()),
                Ok(false) => {}
                Err(error) => merged.refuse("revocation", &error, error.is_early()),
            }
        }
        for item in &delta.policies {
            match self.insert_policy(item) {
                Ok(true) => merged.new.policies.push(item.clone()),
                Ok(false) => {}
                Err(error) => merged.refuse("join policy", &error, error.is_early()),
            }
        }
        let new = &merged.new;
        let on = [
            new.admissions.len(),
            new.removals.len(),
            new.reclaims.len(),
            new.grants.len(),
            new.promises.len(),
        ];
        if on.iter().any(|number| *number > 0) {
            self.usable = Remembered::default();
        }
        if !new.is_empty() || !merged.gone.is_empty() {
            self.catalogue = Remembered::default();
        }
        self.news.add(merged.new.all_names().into_iter().map(|(name, _)| name));
        if !merged.gone.is_empty() {
            // An earlier state still has it, and it could take the room of what is news.
            self.news.drop_before(self.merged_so_far());
        }
        merged
    }

    /// How many items were merged since this view, or that which it is a clone of, was new.
    pub fn merged_so_far(&self) -> usize {
        self.news.before + self.news.names.len()
    }

    /// The first `count` that were merged are no news any more.
    pub fn drop_news(&mut self, count: usize) {
        self.news.old = self.news.old.max(count);
        self.news.drop_before(count);
    }

    /// What is news: merged with a view that has all the rest, it makes one that is equal to this view. `None` if it has
    /// more than `most` items, or if something has gone meanwhile.
    pub fn news(&self, most: usize) -> Option<Delta> {
        let number = self.merged_so_far().saturating_sub(self.news.old);
        if number > most { None } else { self.merged_since(self.news.old) }
    }

    /// What was merged after the first `count` items, as far as it has not been replaced; `None` if not all of that is kept
    /// in mind.
    pub fn merged_since(&self, count: usize) -> Option<Delta> {
        let names = self.news.names.get(count.checked_sub(self.news.before)?..)?;
        let (mut since, mut seen) = (Delta::default(), BTreeSet::new());
        for name in names.iter().filter(|name| seen.insert(**name)) {
            if let Some(Ok(item)) = self.item(name).and_then(|bytes| Delta::of_item(name.kind, &bytes)) {
                since.append(item);
            }
        }
        Some(since)
    }

    /// Admissions and removals. An old cluster has had more members than it may have at a time: where admissions
    /// find no room, the removals that make it come first, and then the rest.
    fn merge_membership(&mut self, delta: &Delta, merged: &mut Merged) {
        let mut admissions: Vec<&SignedAdmission> = delta.admissions.iter().collect();
        let mut removals: Vec<&SignedRemoval> = delta.removals.iter().collect();
        loop {
            let (mut full, mut removed, mut refused) = (false, false, Merged::default());
            admissions.retain(|item| match self.admissions.insert(item) {
                Ok(new) => {
                    if let Some(gone) = new {
                        merged.new.admissions.push((*item).clone());
                        merged.gone.extend(admission_names(&gone));
                    }
                    false
                }
                Err(error) => {
                    full |= error == NotAdmitted::Full;
                    refused.refuse("admission", &error, error.is_early());
                    true
                }
            });
            removals.retain(|item| match self.remove(item) {
                Ok(new) => {
                    removed |= new.is_some();
                    if let Some(gone) = new {
                        merged.new.removals.push((*item).clone());
                        merged.gone.extend(gone);
                    }
                    false
                }
                Err(error) => {
                    refused.refuse("removal", &error, error.is_early());
                    true
                }
            });
            if !(full && removed) {
                merged.refused.append(&mut refused.refused);
                merged.early += refused.early;
                return;
            }
        }
    }

    /// Adds a removal. `None` when it was there already; else the names of what goes with it.
    fn remove(&mut self, signed: &SignedRemoval) -> Result<Option<Vec<Name>>, NotRemoved> {
        let Some(Removing { subject, gone: others }) = self.admissions.remove(signed)? else {
            return Ok(None);
        };
        if let Some(removal) = self.admissions.removal(&signed.id()) {
            self.grants.name(&removal.subject, &removal.grants);
        }
        let mut gone: Vec<Name> = admission_names(&others).collect();
        for key in others.nodes.iter().chain([&subject]) {
            let node = key.node_id();
            let mut drop = |kind, was_there: bool| gone.extend(was_there.then(|| Name::of_node(kind, &node)));
            drop(Kind::RECORD, self.records.remove(&node));
            self.contested = Remembered::default();
            drop(Kind::TRIES, self.tries.forget(key));
            drop(Kind::POLICY, self.genesis.is_flat() && self.policies.forget(key));
            self.promises.remove(&node);
        }
        if self.genesis.is_flat() {
            let tokens = self.tokens.forget(&subject);
            gone.extend(tokens.iter().map(|id| Name::of_statement(Kind::TOKEN, id)));
        }
        if !self.grants.is_reclaimed(&subject) {
            self.pending.insert(subject);
        }
        Ok(Some(gone))
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
        let node = claimed.node.node_id();
        if self.admissions.is_removed(&claimed.node) {
            return Ok(false);
        }
        let id = signed.id();
        if let Some(entry) = self.records.get(&node)
            && (entry.record.order(), entry.id, &entry.signed) >= (claimed.order(), id, signed)
        {
            return Ok(false);
        }
        if !self.admissions.was_admitted(&claimed.node) {
            return Err(InvalidRecord::NotAdmitted { node });
        }
        let record = signed.verify(&claimed.node)?;
        record.validate(&self.genesis)?;
        if !self.records.contains_key(&node) {
            self.contested = Remembered::default();
        }
        self.records.insert(node, Entry { id, signed: signed.clone(), record });
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

    /// [`View::usable`] of one node, remembered until the view changes: it is asked for with every datagram.
    pub fn usable_remembered(&self, key: &IdentityKey) -> RangeSet {
        let (known, usable) = self.usable.0.get_or_init(|| (*key, self.usable(key)));
        if known == key { usable.clone() } else { self.usable(key) }
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
            tries: self.tries.in_order(),
            tokens: self.tokens.in_order(),
            revocations: self.revocations.in_order(),
            policies: self.policies.in_order(),
        }
    }

    /// One value that equal views have in common, and no others.
    pub fn fingerprint(&self) -> [u8; 32] {
        let mut hash = Sha256::new();
        hash.update(b"hauberk view v3");
        for entry in self.promises.values() {
            hash.update(entry.signed.id().as_bytes());
        }
        for (name, content) in self.items() {
            hash.update([name.kind.0]);
            hash.update(name.id);
            hash.update(content.0);
        }
        hash.finalize().into()
    }
}

#[cfg(test)]
mod tests;
