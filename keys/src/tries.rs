//! A member's signed count of failed tries to join by password, so that all members together can limit them.
//!
//! ## Body (postcard), domain "hauberk tries v1"
//!
//! ```text
//! 0..32     cluster id
//! 32..64    node: identity key of the member, that signs
//! 64..      window: minutes since 1970, varint u64; it never decreases
//! +         count: tries that failed in the window, varint u32
//! +         total: tries that ever failed, varint u64; it never decreases
//! ```

use crate::cluster::ClusterId;
use crate::identity::IdentityKey;
use crate::policy::{StatementError, for_cluster};
use crate::signed::{Signable, Signed};
use serde::{Deserialize, Serialize};

/// The statement; of each member the one with the highest window and total counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Tries {
    /// The cluster.
    pub cluster: ClusterId,
    /// The member whose tries these are, and that signs.
    pub node: IdentityKey,
    /// Minutes since 1970.
    pub window: u64,
    /// Tries that failed in the window.
    pub count: u32,
    /// Tries that ever failed.
    pub total: u64,
}

impl Signable for Tries {
    const DOMAIN: &'static str = "hauberk tries v1";
    const MAX_LEN: usize = 512;
}

impl Signed<Tries> {
    /// Checks that it is for `cluster` and that the member named in it signed it.
    ///
    /// # Errors
    /// [`StatementError`]; nothing else may be concluded from the body then.
    pub fn check(&self, cluster: &ClusterId) -> Result<Tries, StatementError> {
        let claimed = self.decode()?;
        for_cluster(cluster, claimed.cluster)?;
        Ok(self.verify(&claimed.node)?)
    }
}
