//! What a member promises about removed nodes.

use mesh_keys::{BodyId, ClusterId, IdentityKey, Signable, SignedError};
use serde::{Deserialize, Serialize};

/// A member's promises, signed by itself: the newest takes the place of those before. Newer versions append
/// fields.
///
/// Each entry says, durably and for good: "of what this removed node signed, I use what is named here, and accept
/// nothing more". The entry for a node goes when its addresses are in other hands ([`super::Reclaim`]).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Promises {
    /// The cluster.
    pub cluster: ClusterId,
    /// The member.
    pub node: IdentityKey,
    /// Counts the changes.
    pub version: u64,
    /// The highest serial among the admissions this member had signed, and how many there were: who has fewer
    /// does not know all members. Nodes admitted later know of the removals from the start.
    pub sponsored: (u64, u64),
    /// In ascending order of the removed nodes.
    pub entries: Vec<Promise>,
}

/// A promise about one removed node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Promise {
    /// The removed node.
    pub removed: IdentityKey,
    /// All its removals that the member has seen. Ascending.
    pub removals: Vec<BodyId>,
    /// The statements of the removed node that the member's own addresses rest on. Ascending; never changes.
    pub kept: Vec<BodyId>,
}

impl Signable for Promises {
    const DOMAIN: &'static str = "hauberk promises v1";
    const MAX_LEN: usize = 1 << 20;
}

/// Why promises are refused. Nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidPromises {
    /// Malformed, or not signed by the member they are of.
    #[error(transparent)]
    Signed(#[from] SignedError),
    /// The member is not known.
    #[error("node {} is no known member", .node.short())]
    NotAdmitted {
        /// The node.
        node: mesh_keys::NodeId,
    },
    /// They are about another cluster.
    #[error("they are for cluster {}", .0.short())]
    OtherCluster(ClusterId),
    /// A list is not in ascending order.
    #[error("field {field}: not in ascending order, each once")]
    Order {
        /// The field.
        field: &'static str,
    },
}

impl Promises {
    /// The promise about `removed`.
    pub fn about(&self, removed: &IdentityKey) -> Option<&Promise> {
        let place = self.entries.binary_search_by(|entry| entry.removed.cmp(removed)).ok()?;
        self.entries.get(place)
    }

    /// Checks the order of all lists: there is one way to write a promise.
    ///
    /// # Errors
    /// [`InvalidPromises`] names the field.
    pub fn validate(&self, cluster: ClusterId) -> Result<(), InvalidPromises> {
        let order = |ok: bool, field| if ok { Ok(()) } else { Err(InvalidPromises::Order { field }) };
        if self.cluster != cluster {
            return Err(InvalidPromises::OtherCluster(self.cluster));
        }
        order(self.entries.is_sorted_by(|a, b| a.removed < b.removed), "entries")?;
        for entry in &self.entries {
            order(entry.removals.is_sorted_by(|a, b| a < b), "removals")?;
            order(entry.kept.is_sorted_by(|a, b| a < b), "kept")?;
        }
        Ok(())
    }
}
