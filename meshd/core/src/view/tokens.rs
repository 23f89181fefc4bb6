//! Tokens: what authorities have handed out for joining, and taken back.
//!
//! Two sets. In a flat cluster the tokens of a node that was removed let nobody in any more, and go; its revocations
//! count on, as they only ever take away. How often a token was used is read from the admissions, which
//! name it.

use std::collections::BTreeMap;

use mesh_keys::token::TokenSecret;
use mesh_keys::{
    BodyId, IdentityKey, JoinMode, Signable, Signed, SignedError, SignedRevocation, SignedToken,
    StatementError, Token, TokenId,
};

use super::items::{is_named, lowest};
use super::policy::NoAuthority;
use super::{Admissions, View};

/// Most tokens, and most revocations, that there ever were. They are kept for good, at about 250 bytes each.
const MAX_TOKENS: usize = 16_384;

/// Signed statements by their names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Set<T: Signable>(BTreeMap<BodyId, (Signed<T>, T)>);

impl<T: Signable> Default for Set<T> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl Set<Token> {
    /// Drops the tokens of `signer`. Their names.
    pub(super) fn forget(&mut self, signer: &IdentityKey) -> Vec<BodyId> {
        self.0.extract_if(.., |_, (_, token)| token.signer == *signer).map(|(id, _)| id).collect()
    }
}

impl<T: Signable> Set<T> {
    fn values(&self) -> impl Iterator<Item = &T> {
        self.0.values().map(|(_, value)| value)
    }

    pub(super) fn in_order(&self) -> Vec<Signed<T>> {
        self.0.values().map(|(signed, _)| signed.clone()).collect()
    }

    pub(super) fn ids(&self) -> impl Iterator<Item = &BodyId> {
        self.0.keys()
    }

    /// The statement that gossip calls by that name.
    pub(super) fn named(&self, name: &[u8; 16]) -> Option<&Signed<T>> {
        let (id, (signed, _)) = self.0.range(lowest(name)..).next()?;
        is_named(id, name).then_some(signed)
    }
}

/// Why a token or revocation is refused. Nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidToken {
    /// Not by an authority, malformed, or for another cluster.
    #[error(transparent)]
    NoAuthority(#[from] NoAuthority),
    /// The set is full.
    #[error("there were {MAX_TOKENS} of them already")]
    Full,
}

impl InvalidToken {
    /// Whether its grounds may still come, or room.
    pub(super) fn is_early(&self) -> bool {
        matches!(self, Self::NoAuthority(NoAuthority::UnknownMember { .. }) | Self::Full)
    }
}

impl From<StatementError> for InvalidToken {
    fn from(error: StatementError) -> Self {
        Self::NoAuthority(error.into())
    }
}

impl From<SignedError> for InvalidToken {
    fn from(error: SignedError) -> Self {
        Self::NoAuthority(error.into())
    }
}

/// Why a token lets nobody in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenRefused {
    /// There is none of that name with that secret.
    #[error("the token is not known, or its secret is wrong")]
    Unknown,
    /// An authority has taken it back.
    #[error("the token was revoked")]
    Revoked,
    /// Its end has come.
    #[error("the token has expired")]
    Expired,
    /// As many nodes as it is for have joined by it.
    #[error("the token was used as often as it may be")]
    UsedUp,
    /// Without the time, nothing that expires is valid.
    #[error("this member does not know the time yet, and so not whether the token is still valid")]
    NoTime,
}

impl View {
    pub(super) fn insert_token(&mut self, signed: &SignedToken) -> Result<bool, InvalidToken> {
        let claimed = signed.decode()?;
        let id = signed.id();
        if self.tokens.0.contains_key(&id) {
            return Ok(false);
        }
        if !self.heeds(&claimed.signer)? {
            return Ok(false);
        }
        let token = signed.check(&self.cluster())?;
        room(&self.tokens)?;
        self.tokens.0.insert(id, (signed.clone(), token));
        Ok(true)
    }

    pub(super) fn insert_revocation(&mut self, signed: &SignedRevocation) -> Result<bool, InvalidToken> {
        let id = signed.id();
        if self.revocations.0.contains_key(&id) {
            return Ok(false);
        }
        self.heeds(&signed.decode()?.signer)?;
        let revocation = signed.check(&self.cluster())?;
        room(&self.revocations)?;
        self.revoked.insert(revocation.id);
        self.revocations.0.insert(id, (signed.clone(), revocation));
        Ok(true)
    }

    /// All tokens whose signers are authorities.
    pub fn tokens(&self) -> impl Iterator<Item = &Token> {
        self.tokens.values().filter(|token| self.is_authority(&token.signer))
    }

    /// How many nodes have joined by tokens called `id`.
    pub fn token_uses(&self, id: &TokenId) -> usize {
        self.admissions.let_in_by_token(id)
    }

    /// Whether a token lets somebody in at the moment `now`, in seconds since 1970.
    ///
    /// # Errors
    /// [`TokenRefused`] says why not.
    pub fn check_token(&self, token: &Token, now: Option<u64>) -> Result<(), TokenRefused> {
        if self.revoked.contains(&token.id) {
            return Err(TokenRefused::Revoked);
        }
        if now.ok_or(TokenRefused::NoTime)? >= token.expires {
            return Err(TokenRefused::Expired);
        }
        if self.token_uses(&token.id) >= usize::try_from(token.uses).unwrap_or(usize::MAX) {
            return Err(TokenRefused::UsedUp);
        }
        Ok(())
    }

    /// The token of that name and secret, if it lets somebody in at the moment `now`.
    ///
    /// # Errors
    /// [`TokenRefused`] says why not; what is known of a token is said to nobody without its secret.
    pub fn redeem(
        &self,
        id: &TokenId,
        secret: &TokenSecret,
        now: Option<u64>,
    ) -> Result<Token, TokenRefused> {
        let mut refused = TokenRefused::Unknown;
        for token in self.tokens().filter(|token| token.id == *id && token.fits(secret)) {
            match self.check_token(token, now) {
                Ok(()) => return Ok(*token),
                Err(error) => refused = error,
            }
        }
        Err(refused)
    }
}

impl Admissions {
    /// Whether a node may have the secret by which others join: unless it came by a token each time.
    pub fn knows_join_secret(&self, key: &IdentityKey) -> bool {
        let mut modes = self.modes_of(key).peekable();
        modes.peek().is_none() || !modes.all(|mode| matches!(mode, JoinMode::Token(_)))
    }
}

fn room<T: Signable>(set: &Set<T>) -> Result<(), InvalidToken> {
    if set.0.len() < MAX_TOKENS { Ok(()) } else { Err(InvalidToken::Full) }
}
