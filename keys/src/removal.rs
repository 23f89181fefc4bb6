//! A signed statement that a node is no member any more.
//!
//! Removals form a grow-only set: there is no way back for an identity. Who may sign one is for the caller to
//! judge: an admin key of the genesis document or, in flat mode, a member. [`Signed::check`](crate::Signed)
//! does what one removal allows to check alone.
//!
//! ## Body (postcard), domain "hauberk removal v1"
//!
//! ```text
//! 0..32      cluster id
//! 32..64     subject: identity key of the node that is removed
//! 64..96     signer: identity key that signs
//! 96..128    heir: identity key of the member that takes over the subject's addresses
//! 128..      keep: varint count, 16 bytes each, ascending, no duplicates: ids of the nodes that the subject
//!            had admitted and that stay
//! ..         grants: varint count, 16 bytes each, ascending, no duplicates: first bytes of the names of grants that the
//!            subject had signed
//! ```

use crate::cluster::ClusterId;
use crate::identity::{Identity, IdentityKey, NodeId};
use crate::signed::{BodyId, Signable, Signed, SignedError};
use serde::{Deserialize, Serialize};

/// The statement. Signed, it is a [`SignedRemoval`].
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Removal {
    /// The cluster that the subject leaves.
    pub cluster: ClusterId,
    /// Who is removed.
    pub subject: IdentityKey,
    /// Who signs.
    pub signer: IdentityKey,
    /// Who takes over the subject's addresses, once that is safe.
    pub heir: IdentityKey,
    /// The nodes admitted by the subject whose admissions go on counting. Any other admission by the subject,
    /// made before the removal or after it, is void.
    pub keep: Vec<NodeId>,
    /// Grants that the subject had signed when it was removed, by the first bytes of their names: no other grant by
    /// it takes anything from these. Of a node that had signed more than [`MAX_GRANTS`], those with the highest names.
    pub grants: Vec<[u8; 16]>,
}

/// Most grants that a removal names.
pub const MAX_GRANTS: usize = 8192;

impl Signable for Removal {
    const DOMAIN: &'static str = "hauberk removal v1";
    // A seed of a cluster may have admitted all of its 16,384 members, and given most of them addresses.
    const MAX_LEN: usize = 416 * 1024;
}

/// A removal with its signature.
pub type SignedRemoval = Signed<Removal>;

impl Signed<Removal> {
    /// The same without naming any grants.
    ///
    /// # Errors
    /// See [`SignedRemoval::issue_naming`](Self::issue_naming).
    pub fn issue(
        cluster: ClusterId,
        subject: IdentityKey,
        heir: IdentityKey,
        keep: Vec<NodeId>,
        signer: &Identity,
    ) -> Result<Self, RemovalError> {
        Self::issue_naming(cluster, subject, heir, keep, &[], signer)
    }

    /// Removes `subject` from `cluster` in the name of `signer`. Both lists are put in order.
    ///
    /// # Errors
    /// [`RemovalError::OwnHeir`], or [`RemovalError::Signed`] when `keep` is too long.
    pub fn issue_naming(
        cluster: ClusterId,
        subject: IdentityKey,
        heir: IdentityKey,
        mut keep: Vec<NodeId>,
        grants: &[BodyId],
        signer: &Identity,
    ) -> Result<Self, RemovalError> {
        if subject == heir {
            return Err(RemovalError::OwnHeir);
        }
        keep.sort_unstable();
        keep.dedup();
        let first = |id: &BodyId| {
            let mut first = [0; 16];
            first.copy_from_slice(&id.as_bytes()[..16]);
            first
        };
        let mut grants: Vec<[u8; 16]> = grants.iter().map(first).collect();
        grants.sort_unstable();
        grants.dedup();
        grants.drain(..grants.len().saturating_sub(MAX_GRANTS));
        let removal = Removal { cluster, subject, signer: signer.public(), heir, keep, grants };
        Ok(Self::sign(&removal, signer)?)
    }

    /// Checks what can be checked without knowing the members: that it is for `cluster`, that the subject does
    /// not inherit from itself, that there is one way to write it, and that the signer named in it signed it.
    ///
    /// # Errors
    /// [`RemovalError`]; nothing else may be concluded from the body then.
    pub fn check(&self, cluster: &ClusterId) -> Result<Removal, RemovalError> {
        let claimed = self.decode()?;
        if claimed.cluster != *cluster {
            return Err(RemovalError::OtherCluster { expected: *cluster, found: claimed.cluster });
        }
        if claimed.subject == claimed.heir {
            return Err(RemovalError::OwnHeir);
        }
        if !claimed.keep.is_sorted_by(|a, b| a < b) {
            return Err(RemovalError::KeepOrder);
        }
        if !claimed.grants.is_sorted_by(|a, b| a < b) {
            return Err(RemovalError::GrantOrder);
        }
        Ok(self.verify(&claimed.signer)?)
    }
}

/// Why a removal is refused. Nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RemovalError {
    /// Not signed by the signer it names, or malformed.
    #[error(transparent)]
    Signed(#[from] SignedError),
    /// It is about another cluster.
    #[error("the removal is for cluster {}, but this is cluster {}", found.short(), expected.short())]
    OtherCluster {
        /// The cluster asked for.
        expected: ClusterId,
        /// The cluster named in the removal.
        found: ClusterId,
    },
    /// The subject would take over its own addresses.
    #[error("a node that is removed cannot be its own heir")]
    OwnHeir,
    /// The list of nodes that stay is not in order.
    #[error("the nodes that stay are not in ascending order, each once")]
    KeepOrder,
    /// The list of grants is not in order.
    #[error("the grants that a removal names are not in ascending order, each once")]
    GrantOrder,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(seed: u8) -> Identity {
        Identity::from_bytes(&[seed; 32])
    }

    fn removal() -> (Removal, ClusterId) {
        let cluster = ClusterId::from_bytes([5; 32]);
        let keep = vec![NodeId::from_bytes([1; 16]), NodeId::from_bytes([2; 16])];
        let removal = Removal {
            cluster,
            subject: node(1).public(),
            signer: node(2).public(),
            heir: node(3).public(),
            keep,
            grants: vec![[3; 16], [4; 16]],
        };
        (removal, cluster)
    }

    #[test]
    fn issuing_puts_the_lists_in_order() {
        let (removal, cluster) = removal();
        let keep = [&removal.keep[1], &removal.keep[0], &removal.keep[1]].map(|id| *id).to_vec();
        let signed = Signed::<Removal>::issue_naming(
            cluster,
            removal.subject,
            removal.heir,
            keep,
            &[4, 3, 4].map(|byte| BodyId::from_bytes([byte; 32])),
            &node(2),
        )
        .unwrap();
        assert_eq!(signed.check(&cluster), Ok(removal));
    }

    #[test]
    fn the_body_has_the_layout_that_is_documented() {
        let (removal, _) = removal();
        let signed = Signed::sign(&removal, &node(2)).unwrap();
        let expected = [
            removal.cluster.as_bytes().as_slice(),
            removal.subject.as_bytes(),
            removal.signer.as_bytes(),
            removal.heir.as_bytes(),
            &[2],
            &[1; 16],
            &[2; 16],
            &[2],
            &[3; 16],
            &[4; 16],
        ]
        .concat();
        assert_eq!(signed.body(), expected);
    }

    #[test]
    fn what_is_wrong_is_refused() {
        let (good, cluster) = removal();
        let check =
            |removal: &Removal, signer: u8| Signed::sign(removal, &node(signer)).unwrap().check(&cluster);
        assert_eq!(check(&good, 2), Ok(good.clone()));
        assert!(matches!(check(&good, 4), Err(RemovalError::Signed(SignedError::BadSignature { .. }))));
        let other = Removal { cluster: ClusterId::from_bytes([6; 32]), ..good.clone() };
        assert!(matches!(check(&other, 2), Err(RemovalError::OtherCluster { .. })));
        let own_heir = Removal { heir: good.subject, ..good.clone() };
        assert_eq!(check(&own_heir, 2), Err(RemovalError::OwnHeir));
        let disordered = Removal { keep: good.keep.iter().rev().copied().collect(), ..good.clone() };
        assert_eq!(check(&disordered, 2), Err(RemovalError::KeepOrder));
        let twice = Removal { keep: vec![good.keep[0]; 2], ..good.clone() };
        assert_eq!(check(&twice, 2), Err(RemovalError::KeepOrder));
        for grants in [vec![[4; 16], [3; 16]], vec![[3; 16]; 2]] {
            assert_eq!(check(&Removal { grants, ..good.clone() }, 2), Err(RemovalError::GrantOrder));
        }
    }

    #[test]
    fn a_cluster_of_the_largest_size_fits() {
        let keep = (0..16_384u32).map(|n| {
            let mut id = [0; 16];
            id[..4].copy_from_slice(&n.to_be_bytes());
            NodeId::from_bytes(id)
        });
        let (removal, cluster) = removal();
        let grants: Vec<BodyId> = (0..1000 + MAX_GRANTS as u32)
            .map(|n| {
                let mut id = [0; 32];
                id[..4].copy_from_slice(&n.to_be_bytes());
                BodyId::from_bytes(id)
            })
            .collect();
        let issued = Signed::<Removal>::issue_naming(
            cluster,
            removal.subject,
            removal.heir,
            keep.collect(),
            &grants,
            &node(2),
        );
        let removal = issued.unwrap().check(&cluster).unwrap();
        assert_eq!((removal.keep.len(), removal.grants.len()), (16_384, MAX_GRANTS));
        assert_eq!(removal.grants[0][..4], 1000u32.to_be_bytes());
    }
}
