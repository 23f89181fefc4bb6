//! The admin key of an anchored cluster: kept off the nodes, it signs who has to leave and when others may join.
//!
//! Its public half is pinned in the genesis document when the cluster is founded, and stays.
//!
//! ## Layouts
//!
//! ```text
//! secret file    one line, see `armor`: hauberk-admin-1:<32-byte Ed25519 seed and checksum in hex>
//! public key     one line, see `armor`: hauberk-admin-public-1:<32-byte Ed25519 key and checksum in hex>
//! ```
//!
//! The public half has a checksum too: a mistyped key in a genesis document could never be put right.

use crate::armor::{self, ArmorError};
use crate::identity::{Identity, IdentityKey};
use rand_core::{CryptoRng, RngCore};
use zeroize::Zeroizing;

/// The secret half. Wiped on drop; `Debug` shows the public half only.
#[derive(Clone, Debug)]
pub struct AdminKey(Identity);

impl AdminKey {
    /// Makes a new key.
    #[must_use]
    pub fn generate(rng: &mut (impl RngCore + CryptoRng)) -> Self {
        Self(Identity::generate(rng))
    }

    /// The file form: one line with a checksum, for a file of mode 0600.
    #[must_use]
    pub fn to_text(&self) -> Zeroizing<String> {
        armor::encode(SECRET_KIND, &*self.0.to_bytes())
    }

    /// Reads [`AdminKey::to_text`].
    ///
    /// # Errors
    /// [`ArmorError`] says whether the file is another kind of key, cut short or altered.
    pub fn from_text(text: &str) -> Result<Self, ArmorError> {
        Ok(Self(Identity::from_bytes(&*armor::decode(SECRET_KIND, text)?)))
    }

    /// The public half, which the genesis document names.
    #[must_use]
    pub fn public(&self) -> IdentityKey {
        self.0.public()
    }

    /// What signs.
    #[must_use]
    pub const fn signer(&self) -> &Identity {
        &self.0
    }
}

/// The public half as a line of text, without a newline.
#[must_use]
pub fn public_to_text(key: &IdentityKey) -> String {
    armor::encode(PUBLIC_KIND, key.as_bytes()).trim_end().to_owned()
}

/// Reads [`public_to_text`].
///
/// # Errors
/// [`ArmorError`] says whether it is another kind of key, cut short or altered.
pub fn public_from_text(text: &str) -> Result<IdentityKey, ArmorError> {
    Ok(IdentityKey::from_bytes(*armor::decode(PUBLIC_KIND, text)?))
}

/// Whether a text means to be a public admin key, and not the name of a file that holds one.
#[must_use]
pub fn is_public_text(text: &str) -> bool {
    text.trim_start().starts_with("hauberk-admin-public-")
}

const SECRET_KIND: &str = "hauberk-admin-1";
const PUBLIC_KIND: &str = "hauberk-admin-public-1";
