//! The secret that two nodes have in common by their identity keys alone.
//!
//! ```text
//! pair secret    X25519(secret scalar of the one's Ed25519 key, public key of the other's on the Montgomery curve)
//! ```
//!
//! An Ed25519 key is brought to the Montgomery curve by the birational map of RFC 7748, section 4.1; its secret scalar is
//! that of RFC 8032, section 5.1.5. Thormarker ("On using the same key pair for Ed25519 and an X25519 based KEM", IACR
//! ePrint 2021/509) shows that signatures and key agreement with one key pair do not weaken each other, given that the
//! agreement is hashed: whoever takes a pair secret derives keys from it by HKDF, with both ends' names.

use std::fmt;

use zeroize::Zeroizing;

use crate::identity::{Identity, IdentityKey};
use crate::memo;
use crate::secret::Secret32;

/// The same for both ends; see the module's documentation. Wiped on drop.
#[derive(Clone, PartialEq, Eq)]
pub struct PairSecret(Secret32);

impl PairSecret {
    /// Takes the bytes.
    #[must_use]
    pub const fn from_secret(secret: Secret32) -> Self {
        Self(secret)
    }

    pub(crate) const fn expose(&self) -> &[u8; 32] {
        self.0.expose()
    }
}

impl fmt::Debug for PairSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PairSecret").finish_non_exhaustive()
    }
}

impl Identity {
    /// The secret that this node has with `peer`; none when `peer` is no key, or one of small order, with which there
    /// is no secret. It takes about as long as verifying a signature.
    #[must_use]
    pub fn agree(&self, peer: &IdentityKey) -> Option<PairSecret> {
        if let Some(secret) = memo::agreed(|| self.public(), peer) {
            return Some(PairSecret(secret));
        }
        let scalar = Zeroizing::new(self.secret_scalar());
        let shared = Zeroizing::new(x25519_dalek::x25519(*scalar, peer.to_montgomery()?));
        // RFC 7748, section 6.1.
        (*shared != [0; 32]).then(|| PairSecret(Secret32::from_bytes(*shared)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(byte: u8) -> Identity {
        Identity::from_bytes(&[byte; 32])
    }

    #[test]
    fn both_ends_have_the_same_and_nobody_else() {
        let secret = |a: u8, b: u8| identity(a).agree(&identity(b).public()).unwrap();
        assert_eq!(secret(1, 2), secret(2, 1));
        assert_ne!(secret(1, 2), secret(1, 3));
        assert_ne!(secret(1, 2), secret(3, 2));
    }

    #[test]
    fn golden_agreement() {
        // Seeds 01…01 and 02…02. Computed outside of this program.
        let secret = identity(1).agree(&identity(2).public()).unwrap();
        assert_eq!(
            hex::encode(secret.expose()),
            "4181d7302557342bdb6d061c4b1eebea828ecb625c3368b7111680793307220b"
        );
    }

    #[test]
    fn keys_of_small_order_give_nothing() {
        // The neutral element, and one that is no point of the curve.
        let mut neutral = [0; 32];
        neutral[0] = 1;
        for bytes in [neutral, [0; 32], [2; 32]] {
            assert_eq!(identity(1).agree(&IdentityKey::from_bytes(bytes)), None, "{bytes:?}");
        }
    }
}
