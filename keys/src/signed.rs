//! A signed body, kept byte for byte as its signer wrote it.
//!
//! A member that runs an older version stores and passes on what it cannot fully read: it decodes
//! the fields it knows, and bytes after them are the fields of a newer version. So nothing is
//! re-encoded on the way, and the signature stays valid.
//!
//! ## Layout
//!
//! ```text
//! 0        1    format version, 0x01
//! 1..65    64   Ed25519 signature over the body, for the type's domain (see `identity`)
//! 65..          body: the type's fields in postcard, then fields of newer versions
//! ```
//!
//! Serde writes this as one byte string (binary formats) or hex string (text formats).

use crate::hexbytes::fixed_bytes;
use crate::identity::{BadSignature, Identity, IdentityKey, Signature};
use serde::de::{DeserializeOwned, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::{Digest as _, Sha256};
use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;

/// A type whose values can be signed.
///
/// Fields are only ever appended, as postcard writes them; any other change of layout takes a new
/// [`Signable::DOMAIN`].
pub trait Signable: Serialize + DeserializeOwned {
    /// What the signature is for, with a version: `"hauberk admission v1"`. Unique in the program.
    const DOMAIN: &'static str;
    /// Longest body accepted, in bytes: room for today's fields and for tomorrow's.
    const MAX_LEN: usize;
}

/// A body of type `T` and its signature. Holding one says nothing about its truth: [`Signed::verify`]
/// does.
///
/// Clones share the body.
pub struct Signed<T> {
    body: Arc<[u8]>,
    signature: Signature,
    kind: PhantomData<fn() -> T>,
}

impl<T: Signable> Signed<T> {
    /// Encodes and signs `value`.
    ///
    /// # Errors
    /// [`SignedError::TooLong`] if it would not be accepted by others.
    pub fn sign(value: &T, signer: &Identity) -> Result<Self, SignedError> {
        let body = encoded(value)?;
        let signature = signer.sign(T::DOMAIN, &body);
        Ok(Self { body: body.into(), signature, kind: PhantomData })
    }

    /// Puts together again what was kept apart: `value` as this version writes it, and the signature that somebody made
    /// of just these bytes. It verifies only if they were the same.
    ///
    /// # Errors
    /// [`SignedError::TooLong`] if it would not be accepted by others.
    pub fn from_parts(value: &T, signature: Signature) -> Result<Self, SignedError> {
        Ok(Self { body: encoded(value)?.into(), signature, kind: PhantomData })
    }

    /// Checks that `signer` signed it, and decodes it.
    ///
    /// # Errors
    /// [`SignedError::BadSignature`] or [`SignedError::Malformed`].
    pub fn verify(&self, signer: &IdentityKey) -> Result<T, SignedError> {
        signer
            .verify(T::DOMAIN, &self.body, &self.signature)
            .map_err(|BadSignature| SignedError::BadSignature { domain: T::DOMAIN })?;
        self.decode()
    }

    /// Decodes the known fields without checking the signature: to find out who should have signed.
    ///
    /// # Errors
    /// [`SignedError::Malformed`].
    pub fn decode(&self) -> Result<T, SignedError> {
        postcard::take_from_bytes(&self.body)
            .map(|(value, _newer_fields)| value)
            .map_err(|error| SignedError::Malformed { domain: T::DOMAIN, error })
    }

    /// Name of the body: the same for the same body, whatever its signature.
    #[must_use]
    pub fn id(&self) -> BodyId {
        let hash = Sha256::new()
            .chain_update(b"hauberk body id v1\0")
            .chain_update((T::DOMAIN.len() as u64).to_le_bytes())
            .chain_update(T::DOMAIN)
            .chain_update(&self.body)
            .finalize();
        BodyId::from_bytes(hash.into())
    }

    /// The body as signed.
    #[must_use]
    pub fn body(&self) -> &[u8] {
        &self.body
    }

    /// The signature.
    #[must_use]
    pub const fn signature(&self) -> &Signature {
        &self.signature
    }

    /// The layout above.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEAD_LEN + self.body.len());
        bytes.push(FORMAT);
        bytes.extend_from_slice(self.signature.as_bytes());
        bytes.extend_from_slice(&self.body);
        bytes
    }

    /// Reads the layout above. The signature is not checked, nor that the body can be decoded.
    ///
    /// # Errors
    /// [`SignedError`] for another format version or a length out of bounds.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, SignedError> {
        let domain = T::DOMAIN;
        match bytes.first() {
            Some(&FORMAT) => {}
            Some(&found) => return Err(SignedError::Format { domain, found }),
            None => return Err(SignedError::TooShort { domain }),
        }
        let (Some(signature), Some(body)) =
            (bytes.get(1..HEAD_LEN).and_then(|s| s.try_into().ok()), bytes.get(HEAD_LEN..))
        else {
            return Err(SignedError::TooShort { domain });
        };
        if body.len() > T::MAX_LEN {
            return Err(SignedError::TooLong { domain, max: T::MAX_LEN, found: body.len() });
        }
        Ok(Self { body: body.into(), signature: Signature::from_bytes(signature), kind: PhantomData })
    }
}

fn encoded<T: Signable>(value: &T) -> Result<Vec<u8>, SignedError> {
    let body =
        postcard::to_allocvec(value).map_err(|error| SignedError::Malformed { domain: T::DOMAIN, error })?;
    if body.len() > T::MAX_LEN {
        return Err(SignedError::TooLong { domain: T::DOMAIN, max: T::MAX_LEN, found: body.len() });
    }
    Ok(body)
}

fixed_bytes! {
    /// Name of a signed body: SHA-256("hauberk body id v1" 00 ‖ u64 LE length of domain ‖ domain ‖ body).
    BodyId, 32, "body id"
}

/// Why a signed body is refused. Nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SignedError {
    /// Fewer bytes than a signature takes.
    #[error("{domain}: too short to be signed")]
    TooShort {
        /// Which type.
        domain: &'static str,
    },
    /// More bytes than this type may have.
    #[error("{domain}: {found} bytes, but at most {max} are allowed")]
    TooLong {
        /// Which type.
        domain: &'static str,
        /// The limit, in bytes.
        max: usize,
        /// The length found, in bytes.
        found: usize,
    },
    /// A format version that this program does not know.
    #[error("{domain}: unknown format {found:#04x}; it was written by a newer version")]
    Format {
        /// Which type.
        domain: &'static str,
        /// The first byte.
        found: u8,
    },
    /// The signature does not fit.
    #[error("{domain}: the signature does not verify")]
    BadSignature {
        /// Which type.
        domain: &'static str,
    },
    /// The body is not this type.
    #[error("{domain}: cannot be decoded: {error}")]
    Malformed {
        /// Which type.
        domain: &'static str,
        /// What the decoder met.
        error: postcard::Error,
    },
}

// Derives would ask the same of `T`, which is only a marker here.

impl<T> Clone for Signed<T> {
    fn clone(&self) -> Self {
        Self { body: Arc::clone(&self.body), signature: self.signature, kind: PhantomData }
    }
}

impl<T> PartialEq for Signed<T> {
    fn eq(&self, other: &Self) -> bool {
        self.body == other.body && self.signature == other.signature
    }
}

impl<T> Eq for Signed<T> {}

impl<T> PartialOrd for Signed<T> {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl<T> Ord for Signed<T> {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (&self.body, &self.signature).cmp(&(&other.body, &other.signature))
    }
}

impl<T: Signable + fmt::Debug> fmt::Debug for Signed<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut out = f.debug_struct("Signed");
        match self.decode() {
            Ok(value) => out.field("body", &value),
            Err(error) => out.field("body", &error),
        };
        out.field("id", &self.id()).finish_non_exhaustive()
    }
}

impl<T: Signable> Serialize for Signed<T> {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        let bytes = self.to_bytes();
        if s.is_human_readable() { s.serialize_str(&hex::encode(bytes)) } else { s.serialize_bytes(&bytes) }
    }
}

impl<'de, T: Signable> Deserialize<'de> for Signed<T> {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct Layout<T>(PhantomData<fn() -> T>);
        impl<T: Signable> Visitor<'_> for Layout<T> {
            type Value = Signed<T>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a signed body ({})", T::DOMAIN)
            }
            fn visit_bytes<E: serde::de::Error>(self, bytes: &[u8]) -> Result<Self::Value, E> {
                Signed::from_bytes(bytes).map_err(E::custom)
            }
            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Self::Value, E> {
                if text.len() > 2 * (HEAD_LEN + T::MAX_LEN) {
                    return Err(E::invalid_length(text.len() / 2, &self));
                }
                let bytes =
                    hex::decode(text).map_err(|error| E::custom(format_args!("{}: {error}", T::DOMAIN)))?;
                Signed::from_bytes(&bytes).map_err(E::custom)
            }
        }
        if d.is_human_readable() {
            d.deserialize_str(Layout(PhantomData))
        } else {
            d.deserialize_bytes(Layout(PhantomData))
        }
    }
}

const FORMAT: u8 = 1;
const HEAD_LEN: usize = 1 + Signature::LEN;
