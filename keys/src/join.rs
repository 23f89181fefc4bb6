//! Joining by key file: both ends prove that they hold the same 32 random bytes.
//!
//! The proofs are bound to the TLS session they are sent in and to both identities, so they are
//! worthless anywhere else, also to a man in the middle who ends both sessions himself.
//!
//! ## Layouts
//!
//! ```text
//! file           one line, see `armor`: hauberk-key-1:<32 bytes and checksum in hex>
//! K              HKDF-SHA256(key, salt = "hauberk join v1", info = "auth")
//! client proof   HMAC-SHA256(K, "c" ‖ binding(32) ‖ joiner's key(32) ‖ sponsor's key(32))
//! server proof   HMAC-SHA256(K, "s" ‖ the same)
//! ```
//!
//! `binding` is [`SessionSecrets::join_binding`](crate::SessionSecrets). A MAC is safe here because
//! the key has 256 bits; a password never goes this way (see [`crate::password`]).

use crate::armor::{self, ArmorError};
use crate::hexbytes::fixed_bytes;
use crate::identity::IdentityKey;
use crate::secret::{Secret32, hkdf32};
use hmac::{Hmac, Mac as _};
use rand_core::{CryptoRng, RngCore};
use sha2::Sha256;
use zeroize::Zeroizing;

/// The contents of a key file. Whoever holds it may join.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JoinKey(Secret32);

impl JoinKey {
    /// Makes a new key.
    #[must_use]
    pub fn generate(rng: &mut (impl RngCore + CryptoRng)) -> Self {
        Self(Secret32::generate(rng))
    }

    /// Takes the key's bytes.
    #[must_use]
    pub const fn from_secret(secret: Secret32) -> Self {
        Self(secret)
    }

    /// The file form: one line with a checksum.
    #[must_use]
    pub fn to_text(&self) -> Zeroizing<String> {
        armor::encode(FILE_KIND, self.0.expose())
    }

    /// Reads [`JoinKey::to_text`]; white space around the line does not matter.
    ///
    /// # Errors
    /// [`ArmorError`] says whether the file is another kind of file, cut short or altered.
    pub fn from_text(text: &str) -> Result<Self, ArmorError> {
        let bytes = armor::decode::<32>(FILE_KIND, text)?;
        Ok(Self(Secret32::from_bytes(*bytes)))
    }

    /// What the joining end sends.
    #[must_use]
    pub fn client_proof(&self, binding: &[u8; 32], joiner: &IdentityKey, sponsor: &IdentityKey) -> JoinProof {
        JoinProof(self.mac(b"c", binding, joiner, sponsor).finalize().into_bytes().into())
    }

    /// What the admitting end sends.
    #[must_use]
    pub fn server_proof(&self, binding: &[u8; 32], joiner: &IdentityKey, sponsor: &IdentityKey) -> JoinProof {
        JoinProof(self.mac(b"s", binding, joiner, sponsor).finalize().into_bytes().into())
    }

    /// Checks the joining end's proof, in constant time.
    ///
    /// # Errors
    /// [`WrongJoinKey`].
    pub fn verify_client_proof(
        &self,
        binding: &[u8; 32],
        joiner: &IdentityKey,
        sponsor: &IdentityKey,
        proof: &JoinProof,
    ) -> Result<(), WrongJoinKey> {
        self.mac(b"c", binding, joiner, sponsor).verify_slice(&proof.0).map_err(|_| WrongJoinKey)
    }

    /// Checks the admitting end's proof, in constant time.
    ///
    /// # Errors
    /// [`WrongJoinKey`].
    pub fn verify_server_proof(
        &self,
        binding: &[u8; 32],
        joiner: &IdentityKey,
        sponsor: &IdentityKey,
        proof: &JoinProof,
    ) -> Result<(), WrongJoinKey> {
        self.mac(b"s", binding, joiner, sponsor).verify_slice(&proof.0).map_err(|_| WrongJoinKey)
    }

    fn mac(
        &self,
        role: &[u8; 1],
        binding: &[u8; 32],
        joiner: &IdentityKey,
        sponsor: &IdentityKey,
    ) -> Hmac<Sha256> {
        let key = hkdf32(b"hauberk join v1", self.0.expose(), &[b"auth"]);
        crate::secret::hmac(&key)
            .chain_update(role)
            .chain_update(binding)
            .chain_update(joiner.as_bytes())
            .chain_update(sponsor.as_bytes())
    }
}

fixed_bytes! {
    /// A proof of holding the join key. Not secret; compare it only by the `verify` methods.
    JoinProof, 32, "join proof"
}

/// The two ends hold different key files, or there is someone between them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the other end holds a different join key; start both with the same key file")]
pub struct WrongJoinKey;

const FILE_KIND: &str = "hauberk-key-1";
