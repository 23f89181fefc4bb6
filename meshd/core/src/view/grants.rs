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
//! receiver; s is before g if its signer comes earlier in the line or, with one signer, its id is lower.
//!
//! So every address has exactly one owner, in every set of grants and reclaims, and equal sets give equal owners.
//! An honest owner grants a range once (it is durable on its disk before anyone else hears of it), so siblings
//! do not overlap; those that do show a copied disk or a member that lies, and are reported ([`GrantConflict`]).

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use mesh_keys::{BodyId, ClusterId, Genesis, Identity, IdentityKey, NodeId, Signable, Signed, SignedError};
use serde::{Deserialize, Serialize};

use super::admissions::Admissions;
use super::items::{is_named, lowest};
use super::persistent::{Map, Pairs, Set};
use crate::ranges::RangeSet;

/// Most ranges in different hands at a time: a cluster has at most 2^16 blocks.
const MAX_RANGES: usize = 65_536;

/// Most grants and most reclaims there ever were. They are kept for good, at 200 to 300 bytes each; see the
/// history of admissions.
const MAX_HISTORY: usize = 262_144;

/// From this number of new grants on, what follows from them is computed for all together.
const MANY: usize = 64;

/// A range of addresses changes hands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grant {
    /// The cluster.
    pub cluster: ClusterId,
    /// The grant by which `from` owns the range; the cluster id stands for the genesis document.
    pub parent: BodyId,
    /// First address.
    pub network: Ipv4Addr,
    /// Length of the prefix.
    pub prefix: u8,
    /// The owner, who signs.
    pub from: IdentityKey,
    /// The new owner.
    pub to: IdentityKey,
}

impl Signable for Grant {
    const DOMAIN: &'static str = "hauberk grant v1";
    const MAX_LEN: usize = 512;
}

/// The era of a removed node ends: what it still owned goes to the member that signs.
///
/// Whoever signs it knows that no other member will take anything more from that node: see [`super::reclaim`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reclaim {
    /// The cluster.
    pub cluster: ClusterId,
    /// The removed node.
    pub removed: IdentityKey,
    /// Its removal.
    pub removal: BodyId,
    /// Who takes over and signs: the heir that the removal names, or who reclaimed what that one had.
    pub to: IdentityKey,
    /// The grants and reclaims signed by the removed node that go on counting; all others are void.
    /// Ascending, no duplicates.
    pub kept: Vec<BodyId>,
}

impl Signable for Reclaim {
    const DOMAIN: &'static str = "hauberk reclaim v1";
    // Room for 32,000 grants by one node.
    const MAX_LEN: usize = 1 << 20;
}

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
    /// Removed node → its reclaims.
    reclaims_of: Pairs<IdentityKey, BodyId>,
    /// Signer → reclaims.
    reclaims_by: Pairs<IdentityKey, BodyId>,
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

/// One owner granted the same addresses twice.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct GrantConflict {
    /// The owner that did.
    pub granter: NodeId,
    /// The range that lost.
    pub range: Ipv4Net,
    /// Whom it was granted to.
    pub loser: NodeId,
}

/// Why a grant is refused. The ledger is unchanged.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidGrant {
    /// Malformed, or not signed by the owner it names.
    #[error(transparent)]
    Signed(#[from] SignedError),
    /// It is about another cluster.
    #[error("it is for cluster {}", .0.short())]
    OtherCluster(ClusterId),
    /// The grant it rests on is not known.
    #[error("it rests on a grant that is not known")]
    UnknownParent,
    /// The grant it rests on conveys no such range.
    #[error("{range} is not part of what the grant it names conveys")]
    NotConveyed {
        /// The range.
        range: Ipv4Net,
    },
    /// Who signed does not own the range, as far as known.
    #[error("{} does not own {range} by the grant it names", .from.short())]
    NotOwner {
        /// Who signed.
        from: NodeId,
        /// The range.
        range: Ipv4Net,
    },
    /// The range has host bits, or is smaller than a block.
    #[error("range {network}/{prefix} is not made of whole blocks")]
    Range {
        /// First address.
        network: Ipv4Addr,
        /// Length of the prefix.
        prefix: u8,
    },
    /// The ledger is full.
    #[error("the cluster has {MAX_RANGES} ranges in different hands, or {MAX_HISTORY} grants already")]
    Full,
}

/// Why a reclaim is refused. The ledger is unchanged.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidReclaim {
    /// Malformed, or not signed by the member it names.
    #[error(transparent)]
    Signed(#[from] SignedError),
    /// It is about another cluster.
    #[error("it is for cluster {}", .0.short())]
    OtherCluster(ClusterId),
    /// The removal it rests on is not known.
    #[error("it rests on a removal that is not known")]
    UnknownRemoval,
    /// The removal it rests on is of another node.
    #[error("it rests on the removal of another node")]
    OtherRemoval,
    /// Who signed is the removed node.
    #[error("a node that is removed cannot be its own heir")]
    OwnHeir,
    /// Who signed is not the heir, as far as known.
    #[error("{} is not the heir of {}", .to.short(), .removed.short())]
    NotHeir {
        /// Who signed.
        to: NodeId,
        /// The removed node.
        removed: NodeId,
    },
    /// The list of what goes on counting is not in order.
    #[error("the statements that go on counting are not in ascending order, each once")]
    KeptOrder,
    /// The ledger is full.
    #[error("the cluster has had {MAX_HISTORY} reclaims already")]
    Full,
}

impl InvalidGrant {
    /// Whether it may count once more is known, or when there is room.
    pub(super) fn is_early(&self) -> bool {
        match self {
            Self::UnknownParent | Self::NotOwner { .. } | Self::Full => true,
            Self::Signed(_) | Self::OtherCluster(_) | Self::NotConveyed { .. } | Self::Range { .. } => false,
        }
    }
}

impl InvalidReclaim {
    /// Whether it may count once more is known, or when there is room.
    pub(super) fn is_early(&self) -> bool {
        match self {
            Self::UnknownRemoval | Self::NotHeir { .. } | Self::Full => true,
            Self::Signed(_)
            | Self::OtherCluster(_)
            | Self::OtherRemoval
            | Self::OwnHeir
            | Self::KeptOrder => false,
        }
    }
}

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
            reclaims_of: Pairs::default(),
            reclaims_by: Pairs::default(),
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

    /// Adds one; `false` when it was there already.
    ///
    /// # Errors
    /// [`InvalidGrant`]; the ledger is unchanged.
    pub fn insert(&mut self, signed: &Signed<Grant>) -> Result<bool, InvalidGrant> {
        self.insert_one(signed, false)
    }

    /// Adds many, each checked on its own: what follows from them is computed once for all, which keeps the time
    /// to read an old and large ledger in proportion to its size.
    pub(super) fn insert_many<'a>(
        &mut self,
        many: &'a [Signed<Grant>],
    ) -> Vec<(&'a Signed<Grant>, Result<bool, InvalidGrant>)> {
        let later = many.len() >= MANY;
        let results: Vec<_> = many.iter().map(|signed| (signed, self.insert_one(signed, later))).collect();
        if later && results.iter().any(|(_, result)| *result == Ok(true)) {
            self.recompute_all();
        }
        results
    }

    /// With `later`, what follows is left as it is.
    fn insert_one(&mut self, signed: &Signed<Grant>, later: bool) -> Result<bool, InvalidGrant> {
        let id = signed.id();
        if self.grants.contains_key(&id) {
            return Ok(false);
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
        signed.verify(&grant.from)?;
        if self.own.len() >= MAX_RANGES || self.grants.len() >= MAX_HISTORY {
            return Err(InvalidGrant::Full);
        }
        let (from, to, parent) = (grant.from, grant.to, grant.parent);
        // Of what the signer still has, by a statement that counts: nobody else is touched.
        let plain =
            self.holder(receiver) == from && self.own.get(&parent).is_some_and(|own| own.covers(range));
        self.grants.insert(id, Entry { signed: signed.clone(), from, to, parent, range });
        self.children.insert(parent, id);
        self.granted.insert(from, id);
        if later {
            return Ok(true);
        }
        if plain {
            let mut rest = self.own.get(&parent).cloned().unwrap_or_default();
            rest.remove(range);
            self.set_own(parent, rest);
            self.set_own(id, RangeSet::from_iter([range]));
        } else {
            self.recompute_below(parent);
        }
        Ok(true)
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
        let mut children: Vec<(usize, BodyId, bool)> = self
            .children
            .of(id)
            .filter_map(|child| {
                let from = self.grants.get(child)?.from;
                let place = places.get(&from).copied();
                let counts = place.is_some() && self.counts(&self.reclaimed, &from, child);
                Some((place.unwrap_or(usize::MAX), *child, counts))
            })
            .collect();
        children.sort_unstable();
        children.into_iter().map(|(_, child, counts)| (child, counts)).collect()
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

/// The name that stands for the genesis document in [`Grant::parent`].
fn root(cluster: &ClusterId) -> BodyId {
    BodyId::from_bytes(*cluster.as_bytes())
}

/// Who is the last of each node's line. Lines join and never part, so a disjoint-set forest answers in a few
/// steps however long they have grown.
#[derive(Clone, Debug, Default)]
struct Lineage(Map<IdentityKey, Tree>);

#[derive(Clone, Copy, Debug)]
struct Tree {
    /// Itself at the top.
    parent: IdentityKey,
    size: usize,
    last: IdentityKey,
}

impl Lineage {
    /// `to` takes over what `from` has; `false` if that would make a circle.
    fn inherit(&mut self, from: IdentityKey, to: IdentityKey) -> bool {
        let ((a, one), (b, other)) = (self.top(from), self.top(to));
        if a == b {
            return false;
        }
        let (large, small) = if one.size >= other.size { (a, b) } else { (b, a) };
        self.0.insert(small, Tree { parent: large, ..if small == a { one } else { other } });
        self.0.insert(large, Tree { parent: large, size: one.size + other.size, last: other.last });
        true
    }

    fn last(&self, key: IdentityKey) -> IdentityKey {
        self.top(key).1.last
    }

    fn top(&self, key: IdentityKey) -> (IdentityKey, Tree) {
        let mut at = key;
        let mut tree = Tree { parent: key, size: 1, last: key };
        while let Some(found) = self.0.get(&at) {
            tree = *found;
            if tree.parent == at {
                break;
            }
            at = tree.parent;
        }
        (at, tree)
    }
}
