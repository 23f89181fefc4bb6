//! A node's identity: an Ed25519 key made on first start. Its hash is the node id.
//!
//! ## Layouts
//!
//! ```text
//! node id        first 16 bytes of SHA-256("hauberk node id v1" ‖ public key)
//! signed bytes   "hauberk signature v1" 00 ‖ u64 LE length of domain ‖ domain ‖ message
//! file           one line, see `armor`: hauberk-identity-1:<32-byte seed and checksum in hex>
//! ```
//!
//! The same key signs TLS 1.3 handshakes. Those signatures cover 64 bytes of 0x20 first (RFC 8446,
//! section 4.4.3), ours start with "hauberk", so neither can be passed off as the other.

use crate::armor::{self, ArmorError};
use crate::hexbytes::fixed_bytes;
use crate::memo;
use ed25519_dalek::{Signer as _, SigningKey, VerifyingKey};
use rand_core::{CryptoRng, RngCore};
use sha2::{Digest as _, Sha256};
use std::fmt;
use zeroize::Zeroizing;

/// The secret half of a node's identity.
///
/// It never changes while the node's state lives: lost or restored state means a new identity.
/// Wiped on drop; `Debug` shows the public half only.
#[derive(Clone)]
pub struct Identity {
    key: SigningKey,
}

impl Identity {
    /// Makes a new identity.
    #[must_use]
    pub fn generate(rng: &mut (impl RngCore + CryptoRng)) -> Self {
        let mut seed = Zeroizing::new([0; 32]);
        rng.fill_bytes(&mut *seed);
        Self::from_bytes(&seed)
    }

    /// The identity whose secret seed (RFC 8032, section 5.1.5) is `seed`.
    #[must_use]
    pub fn from_bytes(seed: &[u8; 32]) -> Self {
        Self { key: SigningKey::from_bytes(seed) }
    }

    /// The secret seed, for storage in a file of mode 0600.
    #[must_use]
    pub fn to_bytes(&self) -> Zeroizing<[u8; 32]> {
        Zeroizing::new(self.key.to_bytes())
    }

    /// The file form: one line with a checksum.
    #[must_use]
    pub fn to_text(&self) -> Zeroizing<String> {
        armor::encode(FILE_KIND, self.key.as_bytes())
    }

    /// Reads [`Identity::to_text`].
    ///
    /// # Errors
    /// [`ArmorError`] says whether the file is another kind of key, cut short or altered.
    pub fn from_text(text: &str) -> Result<Self, ArmorError> {
        Ok(Self::from_bytes(&*armor::decode(FILE_KIND, text)?))
    }

    /// The public half.
    #[must_use]
    pub fn public(&self) -> IdentityKey {
        IdentityKey(self.key.verifying_key().to_bytes())
    }

    /// The id of this node.
    #[must_use]
    pub fn node_id(&self) -> NodeId {
        NodeId::of(&self.public())
    }

    /// Signs `message` for the purpose named by `domain`; it verifies under the same domain only.
    #[must_use]
    pub fn sign(&self, domain: &str, message: &[u8]) -> Signature {
        memo::note_signed(|| self.public(), domain, message);
        Signature(self.key.sign(&signed_bytes(domain, message)).to_bytes())
    }

    pub(crate) fn secret_scalar(&self) -> [u8; 32] {
        self.key.to_scalar_bytes()
    }

    /// The secret key as PKCS#8 v1 DER (RFC 8410, section 7), which TLS libraries take.
    #[must_use]
    pub fn to_pkcs8_der(&self) -> Zeroizing<Vec<u8>> {
        let mut der = Zeroizing::new(Vec::with_capacity(PKCS8_PREFIX.len() + 32));
        der.extend_from_slice(&PKCS8_PREFIX);
        der.extend_from_slice(self.key.as_bytes());
        der
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity").field("public", &self.public()).finish_non_exhaustive()
    }
}

fixed_bytes! {
    /// The public half of a node's identity: an Ed25519 public key (RFC 8032).
    ///
    /// Bytes that are no valid key are accepted here and verify nothing.
    IdentityKey, 32, "identity key"
}

impl IdentityKey {
    /// The key on the Montgomery curve (RFC 7748, section 4.1); none when it is no point.
    pub(crate) fn to_montgomery(self) -> Option<[u8; 32]> {
        VerifyingKey::from_bytes(&self.0).ok().map(|key| key.to_montgomery().to_bytes())
    }

    /// Checks that `signature` was made by this identity over `message` for `domain`.
    ///
    /// Strict: small-order keys and non-canonical signatures are refused, so that a signature stands
    /// for one key and one message.
    ///
    /// # Errors
    /// [`BadSignature`], without saying which of the three does not fit.
    pub fn verify(&self, domain: &str, message: &[u8], signature: &Signature) -> Result<(), BadSignature> {
        memo::checked(self, domain, message, signature, || {
            let key = VerifyingKey::from_bytes(&self.0).map_err(|_| BadSignature)?;
            let signature = ed25519_dalek::Signature::from_bytes(&signature.0);
            key.verify_strict(&signed_bytes(domain, message), &signature).map_err(|_| BadSignature)
        })
    }

    /// Whether the bytes are a key that can verify anything: on the curve and not of small order.
    #[must_use]
    pub fn is_usable(&self) -> bool {
        VerifyingKey::from_bytes(&self.0).is_ok_and(|key| !key.is_weak())
    }

    /// The id of the node with this identity.
    #[must_use]
    pub fn node_id(&self) -> NodeId {
        NodeId::of(self)
    }

    /// The key as SubjectPublicKeyInfo DER (RFC 8410, section 4), the form of a TLS raw public key.
    #[must_use]
    pub fn to_spki_der(&self) -> [u8; SPKI_LEN] {
        let mut der = [0; SPKI_LEN];
        der[..SPKI_PREFIX.len()].copy_from_slice(&SPKI_PREFIX);
        der[SPKI_PREFIX.len()..].copy_from_slice(&self.0);
        der
    }

    /// Reads exactly the form that [`IdentityKey::to_spki_der`] writes; `None` for anything else,
    /// also for a key that [`IdentityKey::is_usable`] refuses.
    #[must_use]
    pub fn from_spki_der(der: &[u8]) -> Option<Self> {
        let key = Self(der.strip_prefix(SPKI_PREFIX.as_slice())?.try_into().ok()?);
        key.is_usable().then_some(key)
    }
}

fixed_bytes! {
    /// An Ed25519 signature (RFC 8032).
    Signature, 64, "signature"
}

fixed_bytes! {
    /// Which node: a hash of its identity key. Shown as 32 hex digits.
    NodeId, 16, "node id"
}

impl NodeId {
    /// The id that belongs to `key`.
    #[must_use]
    pub fn of(key: &IdentityKey) -> Self {
        let hash = Sha256::new().chain_update(NODE_ID_DOMAIN).chain_update(key.0).finalize();
        let mut id = [0; 16];
        id.copy_from_slice(&hash[..16]);
        Self(id)
    }

    /// The first 8 hex digits, for people. Not unique enough for a decision.
    #[must_use]
    pub fn short(&self) -> String {
        hex::encode(&self.0[..4])
    }
}

/// The signature does not fit the key, the domain and the message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the signature does not verify")]
pub struct BadSignature;

fn signed_bytes(domain: &str, message: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(SIGNATURE_PREFIX.len() + 8 + domain.len() + message.len());
    bytes.extend_from_slice(SIGNATURE_PREFIX);
    bytes.extend_from_slice(&(domain.len() as u64).to_le_bytes());
    bytes.extend_from_slice(domain.as_bytes());
    bytes.extend_from_slice(message);
    bytes
}

/// Length of an Ed25519 SubjectPublicKeyInfo.
pub const SPKI_LEN: usize = 44;

const FILE_KIND: &str = "hauberk-identity-1";
const NODE_ID_DOMAIN: &[u8] = b"hauberk node id v1";
const SIGNATURE_PREFIX: &[u8] = b"hauberk signature v1\0";
/// SEQUENCE { SEQUENCE { OID 1.3.101.112 } BIT STRING of 32 bytes }.
const SPKI_PREFIX: [u8; 12] = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];
/// SEQUENCE { INTEGER 0, SEQUENCE { OID 1.3.101.112 }, OCTET STRING { OCTET STRING of 32 bytes } }.
const PKCS8_PREFIX: [u8; 16] =
    [0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20];
