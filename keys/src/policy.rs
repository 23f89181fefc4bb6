//! A signed statement that says when nodes may join by key file or password.
//!
//! Each signer's newest statement counts, and of several signers' the one with the highest serial. Who may sign is
//! for the caller to judge: an admin key of the genesis document or, in flat mode, a member.
//! [`Signed::check`](crate::Signed) does what one statement allows to check alone.
//!
//! ## Body (postcard), domain "hauberk join policy v1"
//!
//! ```text
//! 0..32     cluster id
//! 32..      serial: varint u64
//! +32       signer: identity key that signs
//! +1        0 open, 1 closed, 2 open until a moment: then its seconds since 1970 follow, varint u64
//! ```

use crate::cluster::ClusterId;
use crate::identity::{Identity, IdentityKey};
use crate::signed::{Signable, Signed, SignedError};
use serde::{Deserialize, Serialize};

/// The statement. Signed, it is a [`SignedJoinPolicy`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct JoinPolicy {
    /// The cluster it is for.
    pub cluster: ClusterId,
    /// The highest counts.
    pub serial: u64,
    /// Who signs.
    pub signer: IdentityKey,
    /// What it says.
    pub window: JoinWindow,
}

/// When nodes may join by key file or password.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum JoinWindow {
    /// At any time.
    Open,
    /// Not at all.
    Closed,
    /// Before this moment, in seconds since 1970.
    Until(u64),
}

impl Signable for JoinPolicy {
    const DOMAIN: &'static str = "hauberk join policy v1";
    const MAX_LEN: usize = 512;
}

/// A join policy with its signature.
pub type SignedJoinPolicy = Signed<JoinPolicy>;

impl Signed<JoinPolicy> {
    /// Says it in the name of `signer`.
    ///
    /// # Errors
    /// None in practice: the body has a bounded length.
    pub fn issue(
        cluster: ClusterId,
        serial: u64,
        window: JoinWindow,
        signer: &Identity,
    ) -> Result<Self, SignedError> {
        Self::sign(&JoinPolicy { cluster, serial, signer: signer.public(), window }, signer)
    }

    /// Checks that it is for `cluster` and that the signer named in it signed it.
    ///
    /// # Errors
    /// [`StatementError`]; nothing else may be concluded from the body then.
    pub fn check(&self, cluster: &ClusterId) -> Result<JoinPolicy, StatementError> {
        let claimed = self.decode()?;
        for_cluster(cluster, claimed.cluster)?;
        Ok(self.verify(&claimed.signer)?)
    }
}

/// Why a statement is refused. Nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StatementError {
    /// Not signed by the signer it names, or malformed.
    #[error(transparent)]
    Signed(#[from] SignedError),
    /// It is about another cluster.
    #[error("it is for cluster {}, but this is cluster {}", found.short(), expected.short())]
    OtherCluster {
        /// The cluster asked for.
        expected: ClusterId,
        /// The cluster named in the statement.
        found: ClusterId,
    },
}

pub(crate) fn for_cluster(expected: &ClusterId, found: ClusterId) -> Result<(), StatementError> {
    if found == *expected { Ok(()) } else { Err(StatementError::OtherCluster { expected: *expected, found }) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tries::Tries;

    fn node(seed: u8) -> Identity {
        Identity::from_bytes(&[seed; 32])
    }

    #[test]
    fn statements_of_others_and_for_others_are_refused() {
        let [cluster, other] = [5, 6].map(|byte| ClusterId::from_bytes([byte; 32]));
        let signer = node(1).public();
        let policy = JoinPolicy { cluster, serial: 3, signer, window: JoinWindow::Closed };
        let tries = Tries { cluster, node: signer, window: 1, count: 2, total: 3 };
        assert_eq!(Signed::sign(&policy, &node(1)).unwrap().check(&cluster), Ok(policy));
        assert_eq!(Signed::sign(&tries, &node(1)).unwrap().check(&cluster), Ok(tries));
        for error in [
            Signed::sign(&policy, &node(2)).unwrap().check(&cluster).unwrap_err(),
            Signed::sign(&tries, &node(2)).unwrap().check(&cluster).unwrap_err(),
        ] {
            assert!(matches!(error, StatementError::Signed(SignedError::BadSignature { .. })), "{error}");
        }
        for error in [
            Signed::sign(&policy, &node(1)).unwrap().check(&other).unwrap_err(),
            Signed::sign(&tries, &node(1)).unwrap().check(&other).unwrap_err(),
        ] {
            assert!(matches!(error, StatementError::OtherCluster { .. }), "{error}");
        }
    }

    #[test]
    fn a_window_of_a_newer_version_is_refused() {
        let cluster = ClusterId::from_bytes([5; 32]);
        let closed = SignedJoinPolicy::issue(cluster, 3, JoinWindow::Closed, &node(1)).unwrap();
        let mut bytes = closed.to_bytes();
        *bytes.last_mut().unwrap() = 3;
        let error = SignedJoinPolicy::from_bytes(&bytes).unwrap().check(&cluster).unwrap_err();
        assert!(matches!(error, StatementError::Signed(SignedError::Malformed { .. })), "{error}");
    }
}
