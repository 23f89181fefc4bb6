//! How many tries to join by password have failed at each member.

use mesh_keys::{NodeId, Signed, SignedError, StatementError, Tries};

use super::View;

/// Why a member's count of tries is refused. Nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidTries {
    /// Malformed, for another cluster or not signed by the member.
    #[error(transparent)]
    Invalid(#[from] StatementError),
    /// The member is not known.
    #[error("node {} is no known member", .node.short())]
    NotAdmitted {
        /// The node.
        node: NodeId,
    },
}

impl InvalidTries {
    /// Whether its grounds may still come.
    pub(super) fn is_early(&self) -> bool {
        matches!(self, Self::NotAdmitted { .. })
    }
}

impl From<SignedError> for InvalidTries {
    fn from(error: SignedError) -> Self {
        Self::Invalid(error.into())
    }
}

impl View {
    pub(super) fn insert_tries(&mut self, signed: &Signed<Tries>) -> Result<bool, InvalidTries> {
        let claimed = signed.decode()?;
        let (node, order) = (claimed.node, (claimed.total, claimed.window));
        if self.admissions.is_removed(&node) || !self.tries.is_news(&node, order, signed) {
            return Ok(false);
        }
        if !self.admissions.was_admitted(&node) {
            return Err(InvalidTries::NotAdmitted { node: node.node_id() });
        }
        let tries = signed.check(&self.cluster())?;
        self.tries.put(node, order, signed, tries);
        Ok(true)
    }

    /// What a member has said of failed tries.
    pub fn tries_of(&self, node: &mesh_keys::IdentityKey) -> Option<&Tries> {
        self.tries.get(node)
    }
}
