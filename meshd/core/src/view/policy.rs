//! When nodes may join by key file or password, and who may say so.
//!
//! Who may say so, the *authorities*: in an anchored cluster the admin keys of the genesis document, in a flat one
//! its members. Each has one register, its newest statement; of all authorities' statements the one with the
//! highest (serial, body id) is in force. In a flat cluster a node's statement goes when the node is removed, as
//! its record does; so a removed node closes no doors.

use mesh_keys::{
    Identity, IdentityKey, JoinPolicy, JoinWindow, NodeId, SignedError, SignedJoinPolicy, StatementError,
};

use super::View;

/// Why a statement of an authority is refused. Nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoAuthority {
    /// Malformed, for another cluster or not signed by its signer.
    #[error(transparent)]
    Invalid(#[from] StatementError),
    /// The cluster has admin keys, and none of them signed.
    #[error("{} holds no admin key of this cluster", .signer.short())]
    NotAdmin {
        /// Who signed.
        signer: NodeId,
    },
    /// The signer was never a member, as far as known.
    #[error("{} is not known to have been a member", .signer.short())]
    UnknownMember {
        /// Who signed.
        signer: NodeId,
    },
}

impl NoAuthority {
    /// Whether its grounds may still come.
    pub(super) fn is_early(&self) -> bool {
        matches!(self, Self::UnknownMember { .. })
    }
}

impl From<SignedError> for NoAuthority {
    fn from(error: SignedError) -> Self {
        Self::Invalid(error.into())
    }
}

impl View {
    /// Whether `signer` may direct the cluster; `false` when it was removed and what it says is dropped.
    pub(super) fn heeds(&self, signer: &IdentityKey) -> Result<bool, NoAuthority> {
        if !self.genesis.is_flat() {
            let admin = self.genesis.admin_keys().contains(signer);
            return if admin { Ok(true) } else { Err(NoAuthority::NotAdmin { signer: signer.node_id() }) };
        }
        if self.admissions.is_removed(signer) {
            return Ok(false);
        }
        let known = self.admissions.was_admitted(signer);
        if known { Ok(true) } else { Err(NoAuthority::UnknownMember { signer: signer.node_id() }) }
    }

    /// Whether what `signer` has said is in force.
    pub(super) fn is_authority(&self, signer: &IdentityKey) -> bool {
        !self.genesis.is_flat() || self.admissions.contains(signer)
    }

    pub(super) fn insert_policy(&mut self, signed: &SignedJoinPolicy) -> Result<bool, NoAuthority> {
        let claimed = signed.decode()?;
        let order = (claimed.serial, 0);
        if !self.heeds(&claimed.signer)? || !self.policies.is_news(&claimed.signer, order, signed) {
            return Ok(false);
        }
        let policy = signed.check(&self.cluster())?;
        self.policies.put(policy.signer, order, signed, policy);
        Ok(true)
    }

    /// The join policy in force; `None` when nobody has said anything, and joining is open.
    pub fn join_policy(&self) -> Option<&JoinPolicy> {
        self.policies
            .iter()
            .filter(|(signer, ..)| self.is_authority(signer))
            .max_by_key(|(_, id, policy)| (policy.serial, *id))
            .map(|(.., policy)| policy)
    }

    /// When nodes may join by key file or password.
    pub fn join_window(&self) -> JoinWindow {
        self.join_policy().map_or(JoinWindow::Open, |policy| policy.window)
    }

    /// The serial that a statement needs to be in force: higher than all there are.
    pub fn next_policy_serial(&self) -> u64 {
        self.policies.iter().map(|(.., policy)| policy.serial).max().unwrap_or(0).saturating_add(1)
    }

    /// Signs a join policy that takes the place of the one in force.
    ///
    /// # Errors
    /// [`NoAuthority`] when the signer may not.
    pub fn issue_policy(
        &self,
        window: JoinWindow,
        signer: &Identity,
    ) -> Result<SignedJoinPolicy, NoAuthority> {
        let by = signer.public();
        self.heeds(&by)?;
        if !self.is_authority(&by) {
            return Err(NoAuthority::UnknownMember { signer: by.node_id() });
        }
        Ok(SignedJoinPolicy::issue(self.cluster(), self.next_policy_serial(), window, signer)?)
    }
}
