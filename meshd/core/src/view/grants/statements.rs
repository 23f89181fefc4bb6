//! What is signed about ranges of addresses, and why a statement is refused.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use mesh_keys::{BodyId, ClusterId, IdentityKey, NodeId, Signable, SignedError};
use serde::{Deserialize, Serialize};

use super::{MAX_BY_SIGNER, MAX_HISTORY, MAX_RANGES};

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
/// Whoever signs it knows that no other member will take anything more from that node: see [`crate::view::reclaim`].
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
    /// Who signed is not known to have been let in.
    #[error("{} is not known to have been let in", .from.short())]
    UnknownSigner {
        /// Who signed.
        from: NodeId,
    },
    /// A node gives something to itself.
    #[error("it hands a range to its owner")]
    ToItself,
    /// Who signed has signed too many.
    #[error("{} has signed more grants than there are blocks, or more than {MAX_BY_SIGNER}", .from.short())]
    TooMany {
        /// Who signed.
        from: NodeId,
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
    pub(in crate::view) fn is_early(&self) -> bool {
        match self {
            Self::UnknownParent | Self::UnknownSigner { .. } | Self::NotOwner { .. } | Self::Full => true,
            Self::Signed(_)
            | Self::OtherCluster(_)
            | Self::NotConveyed { .. }
            | Self::ToItself
            | Self::TooMany { .. }
            | Self::Range { .. } => false,
        }
    }
}

impl InvalidReclaim {
    /// Whether it may count once more is known, or when there is room.
    pub(in crate::view) fn is_early(&self) -> bool {
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
