//! 32 secret bytes: wiped when dropped, never printed, compared in constant time.

use rand_core::{CryptoRng, RngCore};
use std::fmt;
use subtle::{Choice, ConstantTimeEq};
use zeroize::{Zeroize, ZeroizeOnDrop};

/// A secret of 32 bytes.
///
/// `Debug` shows no byte of it, `==` takes the same time for all values, and the memory is
/// overwritten on drop. It has no `Display` and no serde; a message that has to carry one says so
/// with `#[serde(with = "mesh_keys::secret::exposed")]`.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct Secret32([u8; 32]);

impl Secret32 {
    /// Takes ownership of `bytes`. The caller's own copy, if any, is the caller's to wipe.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// Draws a fresh secret.
    #[must_use]
    pub fn generate(rng: &mut (impl RngCore + CryptoRng)) -> Self {
        let mut secret = Self([0; 32]);
        rng.fill_bytes(&mut secret.0);
        secret
    }

    /// The secret bytes. Keep the borrow short and copy nothing out of it that is not wiped.
    #[must_use]
    pub const fn expose(&self) -> &[u8; 32] {
        &self.0
    }

    /// For filling in place, so that no unwiped copy stays on the stack.
    pub(crate) const fn expose_mut(&mut self) -> &mut [u8; 32] {
        &mut self.0
    }

    pub(crate) const fn zero() -> Self {
        Self([0; 32])
    }
}

impl ConstantTimeEq for Secret32 {
    fn ct_eq(&self, other: &Self) -> Choice {
        self.0.ct_eq(&other.0)
    }
}

impl PartialEq for Secret32 {
    fn eq(&self, other: &Self) -> bool {
        self.ct_eq(other).into()
    }
}

impl Eq for Secret32 {}

impl fmt::Debug for Secret32 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret32(redacted)")
    }
}

/// Serde for a [`Secret32`] field that is meant to leave the process, over an encrypted session or
/// into a file of mode 0600: `#[serde(with = "mesh_keys::secret::exposed")]`.
///
/// Binary formats get 32 bytes without a length, text formats 64 hex digits.
pub mod exposed {
    use super::Secret32;
    use serde::{Deserializer, Serializer};

    /// Writes the secret bytes.
    ///
    /// # Errors
    /// Those of the serializer.
    pub fn serialize<S: Serializer>(secret: &Secret32, s: S) -> Result<S::Ok, S::Error> {
        crate::hexbytes::array::serialize(secret.expose(), s)
    }

    /// Reads the secret bytes.
    ///
    /// # Errors
    /// Those of the deserializer; a text of another length than 64 digits.
    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Secret32, D::Error> {
        crate::hexbytes::array::deserialize("secret", d).map(Secret32::from_bytes)
    }
}

/// HKDF-SHA256 (RFC 5869) to 32 bytes. `info` is the concatenation of its parts: parts of variable
/// length must be made unambiguous by the caller.
pub(crate) fn hkdf32(salt: &[u8], key: &[u8], info: &[&[u8]]) -> Secret32 {
    let mut out = Secret32::zero();
    let filled =
        hkdf::Hkdf::<sha2::Sha256>::new(Some(salt), key).expand_multi_info(info, out.expose_mut()).is_ok();
    // HKDF-SHA256 refuses only more than 255 · 32 bytes of output.
    assert!(filled, "HKDF-SHA256 gives 32 bytes");
    out
}

/// HMAC-SHA256 (RFC 2104) keyed by 32 bytes.
pub(crate) fn hmac(key: &Secret32) -> hmac::Hmac<sha2::Sha256> {
    use hmac::Mac as _;
    // A key of one block is what HMAC takes as it is: 32 bytes, filled up with zeros.
    let mut block = zeroize::Zeroizing::new(hmac::digest::Key::<hmac::Hmac<sha2::Sha256>>::default());
    block[..32].copy_from_slice(key.expose());
    hmac::Hmac::new(&block)
}
