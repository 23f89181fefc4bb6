//! Who owns which IPv4 addresses.
//!
//! A *grant* hands a range from its owner to another node, and is signed by that owner. It names the grant by
//! which the owner came to the range, so grants form a tree whose root is the genesis document (the founder
//! owns the whole range). A *reclaim* ends the era of a removed node: it names the statements of that node that
//! go on counting, and hands what the node has left to the member that signs it ([`super::reclaim`] says when).
//!
//! Let `line(k)` be k, then who reclaimed what k had, then who reclaimed what that one had, and so on; let a
//! statement *count* if its signer was not reclaimed, or the reclaim names it. Let `eff(g)` be what a grant `g`
//! conveys and `own(g)` what is left of it with the holder, the last of `line(receiver of g)`:
//!
//! ```text
//! eff(root) = range of the genesis
//! eff(g)    = g.range ∩ eff(parent of g) ∖ ⋃ { s.range : s sibling of g, s before g }
//! own(g)    = eff(g) ∖ ⋃ { c.range : c child of g }
//! owner(a)  = holder of the one g with a ∈ own(g)
//! ```
//!
//! where siblings and children are those that count and are signed by someone in the line of the parent's
//! receiver; s is before g if its signer comes earlier in the line or, with one signer, a removal of that names s and not
//! g or, if that says nothing, its id is lower. So what a removed node signs takes nothing from whom it had given
//! something before, as far as those knew it who removed it.
//!
//! So every address has exactly one owner, in every set of grants and reclaims, and equal sets give equal owners.
//! An honest owner grants a range once (it is durable on its disk before anyone else hears of it), so siblings
//! do not overlap; those that do show a copied disk or a member that lies, and are reported ([`GrantConflict`]).
//!
//! So that nobody fills the set alone: a node hands nothing to itself, and has to have been let in or removed for what
//! it signs to be there at all. Of its grants resting on one grant, those of the lowest ids are there, twice as many as
//! blocks in it; of all its grants, as many as a reclaim can name. What is beyond that is dropped with all that
//! rests on it. A grant rests on one other only, and more grants never make more room, so the order of arrival does not
//! matter.

mod lineage;
mod statements;

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use mesh_keys::{BodyId, ClusterId, Genesis, Identity, IdentityKey, Signed};

use super::admissions::Admissions;
use super::items::{is_named, lowest};
use crate::persistent::{Map, Pairs, Set};
use crate::ranges::RangeSet;
use lineage::Lineage;
pub use statements::{Grant, GrantConflict, InvalidGrant, InvalidReclaim, Reclaim};

/// What became of a grant: what it takes the place of when it is new, `None` when it was there already.
pub(super) type Inserted = Result<Option<Vec<BodyId>>, InvalidGrant>;

/// Most ranges in different hands at a time: a cluster has at most 2^16 blocks.
const MAX_RANGES: usize = 65_536;

/// Most grants and most reclaims there ever were. They are kept for good, at 200 to 300 bytes each; see the
/// history of admissions.
const MAX_HISTORY: usize = 262_144;

/// Most grants by one node: what a [`Reclaim`] of it has room for.
const MAX_BY_SIGNER: usize = 32_000;

/// From this number of new grants on, what follows from them is computed for all together.
const MANY: usize = 64;

/// The tree of grants, and the reclaims.
#[derive(Clone, Debug)]
pub struct Ledger {
    cluster: ClusterId,
    block_prefix: u8,
    range: Ipv4Net,
    founder: IdentityKey,
    grants: Map<BodyId, Entry>,
    reclaims: Map<BodyId, ReclaimEntry>,
    /// Parent → children.
    children: Pairs<BodyId, BodyId>,
    /// Signer → grants.
    granted: Pairs<IdentityKey, BodyId>,
    /// How many grants there are by a signer, and by it resting on each grant.
    signed: Map<IdentityKey, usize>,
    siblings: Map<(BodyId, IdentityKey), usize>,
    /// Removed node → its reclaims.
    reclaims_of: Pairs<IdentityKey, BodyId>,
    /// Signer → reclaims.
    reclaims_by: Pairs<IdentityKey, BodyId>,
    /// Removed nodes with the grants that their removals name, by the lowest names that these could stand for.
    named: Set<(IdentityKey, BodyId)>,
    /// Whether any node was reclaimed twice: only members that lie do that.
    contested: bool,
    /// What follows: the reclaim that counts for each node,
    reclaimed: Map<IdentityKey, BodyId>,
    /// the last of each node's line,
    lineage: Lineage,
    /// what a grant conveys, where that is not its whole range,
    effective: Map<BodyId, RangeSet>,
    /// what is left of it, where anything is,
    own: Map<BodyId, RangeSet>,
    /// and the grants that each holder has something of.
    held: Map<IdentityKey, Set<BodyId>>,
    conflicts: BTreeSet<GrantConflict>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct ReclaimEntry {
    signed: Signed<Reclaim>,
    removed: IdentityKey,
    /// As the removal says.
    heir: IdentityKey,
    to: IdentityKey,
    kept: BTreeSet<BodyId>,
}

/// What a new statement changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// It was there already.
    None,
    /// What this node had is in other hands, and nothing else.
    Local(IdentityKey),
    /// Other reclaims may have begun or ceased to count.
    Tree,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    signed: Signed<Grant>,
    from: IdentityKey,
    to: IdentityKey,
    parent: BodyId,
    range: Ipv4Net,
}

impl PartialEq for Ledger {
    fn eq(&self, other: &Self) -> bool {
        self.cluster == other.cluster && self.grants == other.grants && self.reclaims == other.reclaims
    }
}

impl Eq for Ledger {}

impl Ledger {
    /// The ledger in which the founder owns everything.
    pub fn new(genesis: &Genesis) -> Self {
        let mut ledger = Self {
            cluster: genesis.id(),
            block_prefix: genesis.block_prefix(),
            range: genesis.ipv4_range(),
            founder: genesis.founder(),
            grants: Map::default(),
            reclaims: Map::default(),
            children: Pairs::default(),
            granted: Pairs::default(),
            signed: Map::default(),
            siblings: Map::default(),
            reclaims_of: Pairs::default(),
            reclaims_by: Pairs::default(),
            named: Set::default(),
            contested: false,
            reclaimed: Map::default(),
            lineage: Lineage::default(),
            effective: Map::default(),
            own: Map::default(),
            held: Map::default(),
            conflicts: BTreeSet::new(),
        };
        ledger.recompute_all();
        ledger
    }

    /// Adds grants, each checked on its own: of each, whether it is new and what it takes the place of, or `None` when it was
    /// there already. What follows from many is computed once for all, which keeps the time to read an old and large
    /// ledger in proportion to its size.
    pub(super) fn insert_many<'a>(
        &mut self,
        many: &'a [Signed<Grant>],
        admissions: &Admissions,
    ) -> Vec<(&'a Signed<Grant>, Inserted)> {
        let later = many.len() >= MANY;
        let results: Vec<_> =
            many.iter().map(|signed| (signed, self.insert_one(signed, later, admissions))).collect();
        if later && results.iter().any(|(_, result)| matches!(result, Ok(Some(_)))) {
            self.recompute_all();
        }
        results
    }

    /// With `later`, what follows is left as it is.
    fn insert_one(
        &mut self,
        signed: &Signed<Grant>,
        later: bool,
        admissions: &Admissions,
    ) -> Result<Option<Vec<BodyId>>, InvalidGrant> {
        let id = signed.id();
        if self.grants.contains_key(&id) {
            return Ok(None);
        }
        let grant = signed.decode()?;
        if grant.cluster != self.cluster {
            return Err(InvalidGrant::OtherCluster(grant.cluster));
        }
        let range = Ipv4Net::new(grant.network, grant.prefix)
            .ok()
            .filter(|net| net.network() == grant.network && grant.prefix <= self.block_prefix)
            .ok_or(InvalidGrant::Range { network: grant.network, prefix: grant.prefix })?;
        let (receiver, conveyed) = self.conveyed(&grant.parent).ok_or(InvalidGrant::UnknownParent)?;
        if !conveyed.contains(&range) {
            return Err(InvalidGrant::NotConveyed { range });
        }
        if !self.may_succeed(receiver, &grant.from) {
            return Err(InvalidGrant::NotOwner { from: grant.from.node_id(), range });
        }
        let (from, to, parent) = (grant.from, grant.to, grant.parent);
        if to == from {
            return Err(InvalidGrant::ToItself);
        }
        if !admissions.was_admitted(&from) && !admissions.is_removed(&from) {
            return Err(InvalidGrant::UnknownSigner { from: from.node_id() });
        }
        let displaced = self.displaced_by(&id, &from, &parent, conveyed)?;
        signed.verify(&from)?;
        if displaced.is_none() && (self.own.len() >= MAX_RANGES || self.grants.len() >= MAX_HISTORY) {
            return Err(InvalidGrant::Full);
        }
        let gone = displaced.map(|displaced| self.drop_with_all_below(displaced, later)).unwrap_or_default();
        // Of what the signer still has, by a statement that counts: nobody else is touched.
        let plain =
            self.holder(receiver) == from && self.own.get(&parent).is_some_and(|own| own.covers(range));
        self.grants.insert(id, Entry { signed: signed.clone(), from, to, parent, range });
        self.children.insert(parent, id);
        self.granted.insert(from, id);
        count(&mut self.signed, from, 1);
        count(&mut self.siblings, (parent, from), 1);
        if later {
            return Ok(Some(gone));
        }
        if plain {
            let mut rest = self.own.get(&parent).cloned().unwrap_or_default();
            rest.remove(range);
            self.set_own(parent, rest);
            self.set_own(id, RangeSet::from_iter([range]));
        } else {
            self.recompute_below(parent);
        }
        Ok(Some(gone))
    }

    /// Which grant has to go for a new one by `from` that rests on `parent`, if any; an error when it is the new one.
    fn displaced_by(
        &self,
        new: &BodyId,
        from: &IdentityKey,
        parent: &BodyId,
        conveyed: Ipv4Net,
    ) -> Result<Option<BodyId>, InvalidGrant> {
        let bits = self.block_prefix.saturating_sub(conveyed.prefix_len());
        let most = 2usize.checked_shl(bits.into()).unwrap_or(usize::MAX);
        let last = if self.siblings.get(&(*parent, *from)).is_some_and(|count| *count >= most) {
            let by_it = |id: &&BodyId| self.grants.get(*id).is_some_and(|entry| entry.from == *from);
            self.children.of(parent).rev().filter(by_it).find(|id| !self.is_named(from, id))
        } else if self.signed.get(from).is_some_and(|count| *count >= MAX_BY_SIGNER) {
            self.granted.of(from).rev().find(|id| !self.is_named(from, id))
        } else {
            None
        };
        match last {
            Some(last) if last < new && !self.is_named(from, new) => {
                Err(InvalidGrant::TooMany { from: from.node_id() })
            }
            last => Ok(last.copied()),
        }
    }

    /// Takes a grant out, and those that rest on it. Their names. With `later`, what follows is left as it is.
    fn drop_with_all_below(&mut self, top: BodyId, later: bool) -> Vec<BodyId> {
        let above = self.grants.get(&top).map(|entry| entry.parent);
        let mut gone = vec![top];
        let mut at = 0;
        while let Some(id) = gone.get(at) {
            gone.extend(self.children.of(id).copied().collect::<Vec<_>>());
            at += 1;
        }
        for id in &gone {
            self.set_own(*id, RangeSet::new());
            self.effective.remove(id);
            if let Some(entry) = self.grants.take(id) {
                self.children.remove(entry.parent, *id);
                self.granted.remove(entry.from, *id);
                count(&mut self.signed, entry.from, -1);
                count(&mut self.siblings, (entry.parent, entry.from), -1);
            }
        }
        if let Some(above) = above.filter(|_| !later) {
            self.recompute_below(above);
        }
        gone
    }

    /// The removal of `signer` names these grants by it.
    pub(super) fn name(&mut self, signer: &IdentityKey, grants: &[[u8; 16]]) {
        let mut parents = BTreeSet::new();
        for name in grants {
            let lowest = lowest(name);
            self.named.insert((*signer, lowest));
            let found = self.grants.at_or_after(lowest).filter(|(id, _)| is_named(id, name));
            parents.extend(found.map(|(_, entry)| entry.parent));
        }
        // The order of siblings matters only where some have less than was granted.
        for parent in parents.into_iter().filter(|_| self.effective.len() > 0).collect::<Vec<_>>() {
            if self.children.of(&parent).any(|child| self.effective.contains_key(child)) {
                self.recompute_below(parent);
            }
        }
    }

    fn is_named(&self, signer: &IdentityKey, id: &BodyId) -> bool {
        let mut name = [0; 16];
        name.copy_from_slice(&id.as_bytes()[..16]);
        self.named.contains(&(*signer, lowest(&name)))
    }

    /// The grants by `signer` that convey something: what its removal should name.
    pub fn worth_naming(&self, signer: &IdentityKey) -> Vec<BodyId> {
        let conveys = |id: &&BodyId| self.effective.get(id).is_none_or(|rest| !rest.is_empty());
        self.granted_by(signer).filter(conveys).copied().collect()
    }

    /// Adds a reclaim.
    ///
    /// # Errors
    /// [`InvalidReclaim`]; the ledger is unchanged.
    pub(super) fn reclaim(
        &mut self,
        signed: &Signed<Reclaim>,
        admissions: &Admissions,
    ) -> Result<Change, InvalidReclaim> {
        let id = signed.id();
        if self.reclaims.contains_key(&id) {
            return Ok(Change::None);
        }
        let reclaim = signed.decode()?;
        if reclaim.cluster != self.cluster {
            return Err(InvalidReclaim::OtherCluster(reclaim.cluster));
        }
        if !reclaim.kept.is_sorted_by(|a, b| a < b) {
            return Err(InvalidReclaim::KeptOrder);
        }
        let (removed, to) = (reclaim.removed, reclaim.to);
        if to == removed {
            return Err(InvalidReclaim::OwnHeir);
        }
        let removal = admissions.removal(&reclaim.removal).ok_or(InvalidReclaim::UnknownRemoval)?;
        if removal.subject != removed {
            return Err(InvalidReclaim::OtherRemoval);
        }
        if !self.may_succeed(removal.heir, &to) {
            return Err(InvalidReclaim::NotHeir { to: to.node_id(), removed: removed.node_id() });
        }
        let heir = removal.heir;
        signed.verify(&to)?;
        if self.reclaims.len() >= MAX_HISTORY {
            return Err(InvalidReclaim::Full);
        }
        let kept: BTreeSet<BodyId> = reclaim.kept.into_iter().collect();
        self.contested |= self.reclaims_of.has(&removed);
        let local = !self.contested
            && self.counts(&self.reclaimed, &to, &id)
            && self.reclaims_by.of(&removed).all(|signed| kept.contains(signed));
        // What is void now was taken from these.
        let touched: BTreeSet<BodyId> = self
            .granted_by(&removed)
            .filter(|grant| !kept.contains(*grant))
            .filter_map(|grant| self.grants.get(grant).map(|entry| entry.parent))
            .collect();
        self.reclaims.insert(id, ReclaimEntry { signed: signed.clone(), removed, heir, to, kept });
        self.reclaims_of.insert(removed, id);
        self.reclaims_by.insert(to, id);
        if local && self.lineage.inherit(removed, to) {
            // What the removed node held has another holder, and nobody else is touched.
            self.reclaimed.insert(removed, id);
            let holder = self.holder(to);
            if let Some(mut held) = self.held.take(&removed) {
                held.append(self.held.take(&holder).unwrap_or_default());
                self.held.insert(holder, held);
            }
            for parent in touched {
                self.recompute_below(parent);
            }
            return Ok(Change::Local(removed));
        }
        self.resolve();
        self.recompute_all();
        Ok(Change::Tree)
    }

    /// Signs over a range of `blocks` blocks or, when there is no such range in one piece, the largest one
    /// that there is. `None` when `identity` owns nothing beyond `keep`.
    pub fn grant(
        &self,
        identity: &Identity,
        to: IdentityKey,
        blocks: u32,
        keep: &RangeSet,
    ) -> Option<Signed<Grant>> {
        let from = identity.public();
        let bits = u8::try_from(blocks.max(1).ilog2()).ok()?;
        let widest = self.block_prefix.saturating_sub(bits).max(self.range.prefix_len());
        (widest..=self.block_prefix).find_map(|prefix| {
            self.holdings(&from).find_map(|(parent, own)| {
                let mut free = own.clone();
                free.subtract(keep);
                let range = free.last_net(prefix)?;
                let grant =
                    Grant { cluster: self.cluster, parent, network: range.network(), prefix, from, to };
                Signed::sign(&grant, identity).ok()
            })
        })
    }

    /// The addresses that `key` owns.
    pub fn owned_by(&self, key: &IdentityKey) -> RangeSet {
        RangeSet::of_all(self.holdings(key).map(|(_, own)| own))
    }

    /// The owner of an address of the cluster's range.
    pub fn owner_of(&self, address: Ipv4Addr) -> Option<IdentityKey> {
        self.own
            .iter()
            .find(|(_, own)| own.contains(address))
            .and_then(|(id, _)| self.conveyed(id))
            .map(|(receiver, _)| self.holder(receiver))
    }

    /// Owners with all their addresses.
    pub fn owners(&self) -> BTreeMap<IdentityKey, RangeSet> {
        self.held.keys().map(|key| (*key, self.owned_by(key))).collect()
    }

    /// Who owns any addresses.
    pub fn holders(&self) -> impl Iterator<Item = &IdentityKey> {
        self.held.keys()
    }

    /// Whether the era of `key` has ended: what it had is in other hands.
    pub fn is_reclaimed(&self, key: &IdentityKey) -> bool {
        self.reclaimed.contains_key(key)
    }

    /// Who has what was granted to `key`: itself, or who reclaimed it.
    pub fn holder(&self, key: IdentityKey) -> IdentityKey {
        self.lineage.last(key)
    }

    /// Whether a grant or reclaim of this name is known.
    pub fn contains(&self, id: &BodyId) -> bool {
        self.grants.contains_key(id) || self.reclaims.contains_key(id)
    }

    /// The reclaims signed by `key` that count, each with the node whose era it ended.
    pub fn reclaims_by(&self, key: &IdentityKey) -> impl Iterator<Item = (&BodyId, &IdentityKey)> {
        let signed = self.reclaims_by.of(key);
        signed
            .filter_map(|id| self.reclaims.get(id).map(|entry| (id, &entry.removed)))
            .filter(|(id, removed)| self.reclaimed.get(*removed) == Some(id))
    }

    /// The grants signed by `key`.
    pub fn granted_by(&self, key: &IdentityKey) -> impl Iterator<Item = &BodyId> {
        self.granted.of(key)
    }

    /// The statements of `signer` that what `key` was granted rests on: the grants by it to `key` or above one to
    /// `key`, and its reclaims.
    pub fn rests_on(&self, key: &IdentityKey, signer: &IdentityKey) -> BTreeSet<BodyId> {
        let reclaims = self.reclaims_by.of(signer);
        let grants = self
            .granted_by(signer)
            .filter(|id| self.below(id).any(|entry| entry.to == *key || self.holder(entry.to) == *key));
        reclaims.chain(grants).copied().collect()
    }

    /// What `key` owns of a grant, or of grants that rest on it.
    pub fn owned_below(&self, id: &BodyId, key: &IdentityKey) -> RangeSet {
        let mut owned = RangeSet::new();
        let mut queue = vec![*id];
        while let Some(id) = queue.pop() {
            if let Some(own) = self.own.get(&id)
                && self.held.get(key).is_some_and(|held| held.contains(&id))
            {
                owned.union(own);
            }
            queue.extend(self.children.of(&id));
        }
        owned
    }

    /// A grant, and those that rest on it.
    fn below(&self, id: &BodyId) -> impl Iterator<Item = &Entry> {
        let mut queue = vec![*id];
        std::iter::from_fn(move || {
            let id = queue.pop()?;
            queue.extend(self.children.of(&id));
            self.grants.get(&id)
        })
    }

    /// Ranges that were granted twice.
    pub fn conflicts(&self) -> &BTreeSet<GrantConflict> {
        &self.conflicts
    }

    /// All grants, each after the one it rests on.
    pub fn in_order(&self) -> Vec<Signed<Grant>> {
        let mut ordered = Vec::with_capacity(self.grants.len());
        let mut queue = vec![root(&self.cluster)];
        while let Some(parent) = queue.pop() {
            for id in self.children.of(&parent) {
                if let Some(entry) = self.grants.get(id) {
                    ordered.push(entry.signed.clone());
                    queue.push(*id);
                }
            }
        }
        ordered
    }

    /// The names of all grants.
    pub fn ids(&self) -> impl Iterator<Item = &BodyId> {
        self.grants.keys()
    }

    /// The grant that gossip calls by that name.
    pub(super) fn grant_named(&self, name: &[u8; 16]) -> Option<&Signed<Grant>> {
        let (id, entry) = self.grants.at_or_after(lowest(name))?;
        is_named(id, name).then_some(&entry.signed)
    }

    /// The reclaim that gossip calls by that name.
    pub(super) fn reclaim_named(&self, name: &[u8; 16]) -> Option<&Signed<Reclaim>> {
        let (id, entry) = self.reclaims.at_or_after(lowest(name))?;
        is_named(id, name).then_some(&entry.signed)
    }

    /// All reclaims, each after those that make its signer an heir.
    pub fn reclaims_in_order(&self) -> Vec<Signed<Reclaim>> {
        let (mut ready, mut waiting): (BTreeSet<BodyId>, Vec<_>) = (BTreeSet::new(), Vec::new());
        let mut ordered = Vec::with_capacity(self.reclaims.len());
        for (id, entry) in self.reclaims.iter() {
            if entry.to == entry.heir {
                ready.insert(*id);
                ordered.push(entry.signed.clone());
            } else {
                waiting.push((*id, entry));
            }
        }
        // Those signed by the heir of an heir rest on others. There are few, and fewer each time.
        loop {
            let before = waiting.len();
            waiting.retain(|(id, entry)| {
                let justified = self.leads_to(entry.heir, &entry.to, |reclaim| ready.contains(reclaim));
                if justified {
                    ready.insert(*id);
                    ordered.push(entry.signed.clone());
                }
                !justified
            });
            if waiting.len() == before {
                return ordered;
            }
        }
    }

    /// The names of all reclaims.
    pub fn reclaim_ids(&self) -> impl Iterator<Item = &BodyId> {
        self.reclaims.keys()
    }

    /// Receiver and range of a grant, or of the genesis.
    fn conveyed(&self, id: &BodyId) -> Option<(IdentityKey, Ipv4Net)> {
        if *id == root(&self.cluster) {
            return Some((self.founder, self.range));
        }
        self.grants.get(id).map(|entry| (entry.to, entry.range))
    }

    fn holdings(&self, key: &IdentityKey) -> impl Iterator<Item = (BodyId, &RangeSet)> {
        let held = self.held.get(key).into_iter().flat_map(Set::iter);
        held.filter_map(|id| self.own.get(id).map(|own| (*id, own)))
    }

    fn set_own(&mut self, id: BodyId, own: RangeSet) {
        let Some((receiver, _)) = self.conveyed(&id) else { return };
        let holder = self.holder(receiver);
        if own.is_empty() {
            self.own.remove(&id);
            if let Some(held) = self.held.get_mut(&holder) {
                held.remove(&id);
                if held.is_empty() {
                    self.held.remove(&holder);
                }
            }
        } else {
            self.own.insert(id, own);
            match self.held.get_mut(&holder) {
                Some(held) => held.insert(id),
                None => self.held.insert(holder, Set::from_iter([id])),
            }
        }
    }

    /// `key`, who reclaimed what it had, and so on.
    fn line(&self, key: IdentityKey) -> Vec<IdentityKey> {
        let mut line = vec![key];
        let mut at = key;
        while let Some(entry) = self.reclaimed.get(&at).and_then(|id| self.reclaims.get(id)) {
            line.push(entry.to);
            at = entry.to;
        }
        line
    }

    /// Whether `to` is `from`, or known reclaims lead there, counting or not: once true, always true.
    fn may_succeed(&self, from: IdentityKey, to: &IdentityKey) -> bool {
        if self.holder(from) == *to {
            return true;
        }
        if !self.contested {
            return self.line_from(from).any(|key| key == *to);
        }
        self.leads_to(from, to, |_| true)
    }

    /// `from`, and those that known reclaims lead to, while no node was reclaimed twice.
    fn line_from(&self, from: IdentityKey) -> impl Iterator<Item = IdentityKey> {
        // Members that lie reclaim in a circle: no line is longer than there are reclaims.
        let next = |key: &IdentityKey| {
            let id = self.reclaims_of.of(key).next()?;
            self.reclaims.get(id).map(|entry| entry.to)
        };
        std::iter::successors(Some(from), next).take(self.reclaims.len() + 1)
    }

    /// Whether those of the known reclaims that `admits` lets through lead from one node to the other.
    fn leads_to(&self, from: IdentityKey, to: &IdentityKey, admits: impl Fn(&BodyId) -> bool) -> bool {
        let mut seen = BTreeSet::from([from]);
        let mut queue = vec![from];
        while let Some(key) = queue.pop() {
            if key == *to {
                return true;
            }
            for id in self.reclaims_of.of(&key).filter(|id| admits(id)) {
                if let Some(entry) = self.reclaims.get(id)
                    && seen.insert(entry.to)
                {
                    queue.push(entry.to);
                }
            }
        }
        false
    }

    /// Whether a statement of `signer` counts, given the reclaims that count.
    fn counts(&self, reclaimed: &Map<IdentityKey, BodyId>, signer: &IdentityKey, id: &BodyId) -> bool {
        reclaimed
            .get(signer)
            .and_then(|reclaim| self.reclaims.get(reclaim))
            .is_none_or(|reclaim| reclaim.kept.contains(id))
    }

    /// Finds the reclaim that counts for each node: of those whose signer was not reclaimed itself, or was by a
    /// reclaim that names them, the one with the lowest id. Members that lie can reclaim in a circle; it is cut
    /// at the highest key.
    fn resolve(&mut self) {
        let mut resolved = Map::default();
        let mut begun = BTreeSet::new();
        for key in self.reclaims_of.keys() {
            let mut stack = vec![*key];
            while let Some(key) = stack.last().copied() {
                let candidates = || self.reclaims_of.of(&key);
                if begun.insert(key) {
                    let signers = candidates().filter_map(|id| self.reclaims.get(id)).map(|entry| entry.to);
                    stack.extend(signers.filter(|to| self.reclaims_of.has(to) && !begun.contains(to)));
                    continue;
                }
                stack.pop();
                let first = candidates().find(|id| {
                    self.reclaims.get(*id).is_some_and(|entry| self.counts(&resolved, &entry.to, id))
                });
                if let Some(id) = first
                    && !resolved.contains_key(&key)
                {
                    resolved.insert(key, *id);
                }
            }
        }
        self.lineage = Lineage::default();
        self.reclaimed = Map::default();
        for (removed, id) in resolved.iter() {
            if self.reclaims.get(id).is_some_and(|entry| self.lineage.inherit(*removed, entry.to)) {
                self.reclaimed.insert(*removed, *id);
            }
        }
    }

    /// The children of a grant in their order, and whether each counts.
    fn ordered_children(&self, id: &BodyId) -> Vec<(BodyId, bool)> {
        let Some((receiver, _)) = self.conveyed(id) else { return Vec::new() };
        let mut places = BTreeMap::from([(receiver, 0)]);
        if self.signers_of_children(id).any(|signer| signer != receiver) {
            places.extend(self.line(receiver).into_iter().zip(0..));
        }
        let mut children: Vec<(usize, bool, BodyId, bool)> = self
            .children
            .of(id)
            .filter_map(|child| {
                let from = self.grants.get(child)?.from;
                let place = places.get(&from).copied();
                let counts = place.is_some() && self.counts(&self.reclaimed, &from, child);
                Some((place.unwrap_or(usize::MAX), !self.is_named(&from, child), *child, counts))
            })
            .collect();
        children.sort_unstable();
        children.into_iter().map(|(_, _, child, counts)| (child, counts)).collect()
    }

    fn signers_of_children(&self, id: &BodyId) -> impl Iterator<Item = IdentityKey> {
        self.children.of(id).filter_map(|child| self.grants.get(child)).map(|entry| entry.from)
    }

    /// Computes all that follows anew.
    fn recompute_all(&mut self) {
        let root = root(&self.cluster);
        self.own = Map::default();
        self.held = Map::default();
        self.conflicts.clear();
        self.effective = Map::default();
        self.recompute_below(root);
    }

    /// Computes anew what follows from what `top` conveys, for it and all that rests on it.
    fn recompute_below(&mut self, top: BodyId) {
        let Some((_, range)) = self.conveyed(&top) else { return };
        let effective = self.effective.get(&top).cloned().unwrap_or_else(|| RangeSet::from_iter([range]));
        let mut queue = vec![(top, range, effective)];
        while let Some((id, range, effective)) = queue.pop() {
            let mut given = RangeSet::new();
            for (child, counts) in self.ordered_children(&id) {
                let Some(entry) = self.grants.get(&child) else { continue };
                if !counts {
                    queue.push((child, entry.range, RangeSet::new()));
                    continue;
                }
                let mut conveyed = effective.within(entry.range);
                let before = conveyed.len();
                conveyed.subtract(&given);
                if conveyed.len() < before {
                    self.conflicts.insert(GrantConflict {
                        granter: entry.from.node_id(),
                        range: entry.range,
                        loser: entry.to.node_id(),
                    });
                }
                given.insert(entry.range);
                queue.push((child, entry.range, conveyed));
            }
            let mut own = effective.clone();
            own.subtract(&given);
            self.set_own(id, own);
            if effective.covers(range) {
                self.effective.remove(&id);
            } else {
                self.effective.insert(id, effective);
            }
        }
    }
}

fn count<K: Ord + Copy>(counts: &mut Map<K, usize>, key: K, change: isize) {
    match counts.get(&key).copied().unwrap_or(0).saturating_add_signed(change) {
        0 => drop(counts.remove(&key)),
        count => counts.insert(key, count),
    }
}

/// The name that stands for the genesis document in [`Grant::parent`].
fn root(cluster: &ClusterId) -> BodyId {
    BodyId::from_bytes(*cluster.as_bytes())
}
