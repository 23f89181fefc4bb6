//! Who owns which IPv4 addresses.
//!
//! A *grant* hands a range from its owner to another node, and is signed by that owner. It names the grant by
//! which the owner came to the range, so grants form a tree whose root is the genesis document (the founder
//! owns the whole range). Let `eff(g)` be what a grant `g` conveys and `own(g)` what its receiver still has of
//! it:
//!
//! ```text
//! eff(root) = range of the genesis
//! eff(g)    = g.range ∩ eff(parent of g) ∖ ⋃ { s.range : s sibling of g, id(s) < id(g) }
//! own(g)    = eff(g) ∖ ⋃ { c.range : c child of g }
//! owner(a)  = receiver of the one g with a ∈ own(g)
//! ```
//!
//! So every address has exactly one owner, in every set of grants, and equal sets give equal owners. An honest
//! owner grants a range once (it is durable on its disk before anyone else hears of it), so siblings do not
//! overlap; those that do show a copied disk or a member that lies, and are reported ([`GrantConflict`]).

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use mesh_keys::{BodyId, ClusterId, Genesis, Identity, IdentityKey, NodeId, Signable, Signed, SignedError};
use serde::{Deserialize, Serialize};

use crate::ranges::RangeSet;

/// Most grants of a cluster.
pub(super) const MAX_GRANTS: usize = 65_536;

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

/// The tree of grants.
#[derive(Clone, Debug)]
pub struct Ledger {
    cluster: ClusterId,
    block_prefix: u8,
    range: Ipv4Net,
    founder: IdentityKey,
    grants: BTreeMap<BodyId, Entry>,
    /// Parent → children.
    children: BTreeMap<BodyId, BTreeSet<BodyId>>,
    /// What follows: what each grant still conveys to its receiver.
    own: BTreeMap<BodyId, RangeSet>,
    conflicts: BTreeSet<GrantConflict>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    signed: Signed<Grant>,
    to: IdentityKey,
    parent: BodyId,
    range: Ipv4Net,
}

impl PartialEq for Ledger {
    fn eq(&self, other: &Self) -> bool {
        self.cluster == other.cluster && self.grants == other.grants
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
    /// Who signed does not own the range.
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
    #[error("the cluster has {MAX_GRANTS} grants already")]
    Full,
}

impl Ledger {
    /// The ledger in which the founder owns everything.
    pub fn new(genesis: &Genesis) -> Self {
        let mut ledger = Self {
            cluster: genesis.id(),
            block_prefix: genesis.block_prefix(),
            range: genesis.ipv4_range(),
            founder: genesis.founder(),
            grants: BTreeMap::new(),
            children: BTreeMap::new(),
            own: BTreeMap::new(),
            conflicts: BTreeSet::new(),
        };
        ledger.recompute_below(root(&genesis.id()));
        ledger
    }

    /// Adds one; `false` when it was there already.
    ///
    /// # Errors
    /// [`InvalidGrant`]; the ledger is unchanged.
    pub fn insert(&mut self, signed: &Signed<Grant>) -> Result<bool, InvalidGrant> {
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
        let (holder, held) = self.conveyed(&grant.parent).ok_or(InvalidGrant::UnknownParent)?;
        if holder != grant.from || !held.contains(&range) {
            return Err(InvalidGrant::NotOwner { from: grant.from.node_id(), range });
        }
        signed.verify(&grant.from)?;
        if self.grants.len() >= MAX_GRANTS {
            return Err(InvalidGrant::Full);
        }
        self.grants.insert(id, Entry { signed: signed.clone(), to: grant.to, parent: grant.parent, range });
        self.children.entry(grant.parent).or_default().insert(id);
        self.recompute_below(grant.parent);
        Ok(true)
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
        let mut owned = RangeSet::new();
        for (_, own) in self.holdings(key) {
            owned.union(own);
        }
        owned
    }

    /// The owner of an address of the cluster's range.
    pub fn owner_of(&self, address: Ipv4Addr) -> Option<IdentityKey> {
        self.own
            .iter()
            .find(|(_, own)| own.contains(address))
            .and_then(|(id, _)| self.conveyed(id))
            .map(|(key, _)| key)
    }

    /// Owners with all their addresses.
    pub fn owners(&self) -> BTreeMap<IdentityKey, RangeSet> {
        let mut owners: BTreeMap<IdentityKey, RangeSet> = BTreeMap::new();
        for (id, own) in &self.own {
            if let Some((key, _)) = self.conveyed(id) {
                owners.entry(key).or_default().union(own);
            }
        }
        owners
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
            for id in self.children.get(&parent).into_iter().flatten() {
                if let Some(entry) = self.grants.get(id) {
                    ordered.push(entry.signed.clone());
                    queue.push(*id);
                }
            }
        }
        ordered
    }

    /// The names of all grants.
    pub fn ids(&self) -> BTreeSet<BodyId> {
        self.grants.keys().copied().collect()
    }

    /// Receiver and range of a grant, or of the genesis.
    fn conveyed(&self, id: &BodyId) -> Option<(IdentityKey, Ipv4Net)> {
        if *id == root(&self.cluster) {
            return Some((self.founder, self.range));
        }
        self.grants.get(id).map(|entry| (entry.to, entry.range))
    }

    fn holdings(&self, key: &IdentityKey) -> impl Iterator<Item = (BodyId, &RangeSet)> {
        self.own
            .iter()
            .filter(move |(id, own)| !own.is_empty() && self.conveyed(id).is_some_and(|(to, _)| to == *key))
            .map(|(id, own)| (*id, own))
    }

    /// Computes `own` anew for `top` and all that rests on it.
    fn recompute_below(&mut self, top: BodyId) {
        let mut queue = vec![(top, self.effective(&top))];
        while let Some((id, mut effective)) = queue.pop() {
            let mut given = RangeSet::new();
            for child in self.children.get(&id).into_iter().flatten() {
                let Some(entry) = self.grants.get(child) else { continue };
                let mut conveyed = effective.clone();
                conveyed.intersect(entry.range);
                let before = conveyed.len();
                conveyed.subtract(&given);
                if conveyed.len() < before
                    && let Some((granter, _)) = self.conveyed(&id)
                {
                    self.conflicts.insert(GrantConflict {
                        granter: granter.node_id(),
                        range: entry.range,
                        loser: entry.to.node_id(),
                    });
                }
                given.insert(entry.range);
                queue.push((*child, conveyed));
            }
            effective.subtract(&given);
            self.own.insert(id, effective);
        }
    }

    /// What a grant conveys. The way up is walked in a loop: a member can make it long.
    fn effective(&self, id: &BodyId) -> RangeSet {
        let mut path = Vec::new();
        let mut at = *id;
        while let Some(entry) = self.grants.get(&at) {
            path.push((at, entry));
            at = entry.parent;
        }
        let mut effective = RangeSet::from_iter([self.range]);
        for (id, entry) in path.into_iter().rev() {
            effective.intersect(entry.range);
            for sibling in
                self.children.get(&entry.parent).into_iter().flatten().take_while(|sibling| **sibling < id)
            {
                if let Some(sibling) = self.grants.get(sibling) {
                    effective.remove(sibling.range);
                }
            }
        }
        effective
    }
}

/// The name that stands for the genesis document in [`Grant::parent`].
fn root(cluster: &ClusterId) -> BodyId {
    BodyId::from_bytes(*cluster.as_bytes())
}
