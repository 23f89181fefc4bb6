//! WireGuard keys, and the pre-shared key of a pair of nodes.
//!
//! ## Layouts
//!
//! ```text
//! public key   32 bytes; base64 in text, as `wg` shows it
//! file         one line, see `armor`: hauberk-wireguard-1:<32 bytes and checksum in hex>
//! PSK          HKDF-SHA256(psk_seed, salt = "hauberk wg psk v1",
//!                info = lower node id(16) ‖ higher node id(16)
//!                     ‖ its WireGuard key(32) of the lower ‖ of the higher(32) ‖ u64 LE epoch)
//! check        first 16 bytes of HMAC-SHA256(C, prover's node id(16) ‖ binding(32))
//! C            HKDF-SHA256(PSK, salt = "hauberk wg psk check v1", info = "")
//! ```

use crate::armor::{self, ArmorError};
use crate::hexbytes::fixed_bytes;
use crate::identity::NodeId;
use crate::secret::{Secret32, hkdf32};
use base64ct::{Base64, Encoding as _};
use hmac::Mac as _;
use rand_core::{CryptoRng, RngCore};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::str::FromStr;
use subtle::ConstantTimeEq as _;
use x25519_dalek::{PublicKey, StaticSecret};
use zeroize::{Zeroize as _, Zeroizing};

/// A WireGuard private key: an X25519 scalar, clamped (RFC 7748, section 5).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WgSecret(Secret32);

impl WgSecret {
    /// Makes a new key.
    #[must_use]
    pub fn generate(rng: &mut (impl RngCore + CryptoRng)) -> Self {
        Self::clamped(Secret32::generate(rng))
    }

    /// Takes the key's bytes, and clamps them as every WireGuard implementation does.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; 32]) -> Self {
        Self::clamped(Secret32::from_bytes(*bytes))
    }

    fn clamped(mut secret: Secret32) -> Self {
        let bytes = secret.expose_mut();
        bytes[0] &= 248;
        bytes[31] = bytes[31] & 127 | 64;
        Self(secret)
    }

    /// Reads the base64 form of `wg genkey`.
    ///
    /// # Errors
    /// [`WgKeyError`].
    pub fn from_base64(text: &str) -> Result<Self, WgKeyError> {
        Ok(Self::clamped(Secret32::from_bytes(*decode_base64(text)?)))
    }

    /// The base64 form of `wg genkey`, for configuration files of mode 0600.
    #[must_use]
    pub fn expose_base64(&self) -> Zeroizing<String> {
        Zeroizing::new(Base64::encode_string(self.0.expose()))
    }

    /// The file form: one line with a checksum.
    #[must_use]
    pub fn to_text(&self) -> Zeroizing<String> {
        armor::encode(FILE_KIND, self.0.expose())
    }

    /// Reads [`WgSecret::to_text`].
    ///
    /// # Errors
    /// [`ArmorError`].
    pub fn from_text(text: &str) -> Result<Self, ArmorError> {
        Ok(Self::from_bytes(&*armor::decode(FILE_KIND, text)?))
    }

    /// The private bytes, for handing to a WireGuard device.
    #[must_use]
    pub const fn expose(&self) -> &[u8; 32] {
        self.0.expose()
    }

    /// The public half.
    #[must_use]
    pub fn public(&self) -> WgPublic {
        let secret = StaticSecret::from(*self.0.expose());
        WgPublic(PublicKey::from(&secret).to_bytes())
    }
}

/// A WireGuard public key. `Display` and `FromStr` use base64, as `wg` does.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WgPublic([u8; 32]);

impl WgPublic {
    /// Takes the bytes as they are.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Display for WgPublic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&Base64::encode_string(&self.0))
    }
}

impl fmt::Debug for WgPublic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "WgPublic({self})")
    }
}

impl FromStr for WgPublic {
    type Err = WgKeyError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(Self(*decode_base64(text)?))
    }
}

/// 32 bytes without a length in binary formats, base64 in text formats.
impl Serialize for WgPublic {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        if s.is_human_readable() { s.collect_str(self) } else { self.0.serialize(s) }
    }
}

impl<'de> Deserialize<'de> for WgPublic {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        if d.is_human_readable() {
            let text = String::deserialize(d)?;
            text.parse().map_err(serde::de::Error::custom)
        } else {
            <[u8; 32]>::deserialize(d).map(Self)
        }
    }
}

/// A text is no WireGuard key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WgKeyError {
    /// Another length than a key in base64 has.
    #[error("a WireGuard key has 44 base64 characters, but {found} were given")]
    Length {
        /// Bytes found.
        found: usize,
    },
    /// Not base64, or not its canonical form.
    #[error("not a WireGuard key: the text is no canonical base64")]
    Encoding,
}

/// A WireGuard pre-shared key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Psk(Secret32);

impl Psk {
    /// Draws a key that nobody else knows: what a peer is configured with until a common one is
    /// agreed. A fixed value there would be as good as none.
    #[must_use]
    pub fn random(rng: &mut (impl RngCore + CryptoRng)) -> Self {
        Self(Secret32::generate(rng))
    }

    /// Takes the key's bytes.
    #[must_use]
    pub const fn from_secret(secret: Secret32) -> Self {
        Self(secret)
    }

    /// The secret bytes, for handing to a WireGuard device or for storage.
    #[must_use]
    pub const fn expose(&self) -> &[u8; 32] {
        self.0.expose()
    }
}

/// One end of a tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PairEnd {
    /// The node.
    pub node: NodeId,
    /// The key of its WireGuard device that the tunnel ends in.
    pub wireguard: WgPublic,
}

/// The pre-shared key of the tunnel between two ends. Both nodes compute the same one, whichever
/// end they name first. `epoch` counts the renewals.
#[must_use]
pub fn pair_psk(psk_seed: &Secret32, one: &PairEnd, other: &PairEnd, epoch: u64) -> Psk {
    let order = |end: &PairEnd| (*end.node.as_bytes(), *end.wireguard.as_bytes());
    let (low, high) = if order(one) <= order(other) { (one, other) } else { (other, one) };
    Psk(hkdf32(
        b"hauberk wg psk v1",
        psk_seed.expose(),
        &[
            low.node.as_bytes(),
            high.node.as_bytes(),
            low.wireguard.as_bytes(),
            high.wireguard.as_bytes(),
            &epoch.to_le_bytes(),
        ],
    ))
}

/// What `prover` sends in a session to show that it holds `psk`, without revealing it.
///
/// `binding` is the session's [`join_binding`](crate::SessionSecrets), so the value is worthless in
/// another session; the prover is part of it, so an end cannot send back what it was sent.
#[must_use]
pub fn psk_check(psk: &Psk, binding: &[u8; 32], prover: &NodeId) -> PskCheck {
    let key = hkdf32(b"hauberk wg psk check v1", psk.expose(), &[]);
    let mac = crate::secret::hmac(&key).chain_update(prover.as_bytes()).chain_update(binding).finalize();
    let mut check = [0; 16];
    check.copy_from_slice(&mac.into_bytes()[..16]);
    PskCheck(check)
}

fixed_bytes! {
    /// See [`psk_check`]. Compare with [`PskCheck::matches`].
    PskCheck, 16, "PSK check"
}

impl PskCheck {
    /// Whether both values are the same, in constant time.
    #[must_use]
    pub fn matches(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

fn decode_base64(text: &str) -> Result<Zeroizing<[u8; 32]>, WgKeyError> {
    if text.len() != BASE64_LEN {
        return Err(WgKeyError::Length { found: text.len() });
    }
    let mut padded = Zeroizing::new([0; 33]);
    let decoded = Base64::decode(text, &mut *padded).map_err(|_| WgKeyError::Encoding)?;
    let mut key = Zeroizing::new([0; 32]);
    let fits = decoded.len() == key.len();
    if fits {
        key.copy_from_slice(decoded);
    }
    padded.zeroize();
    if fits { Ok(key) } else { Err(WgKeyError::Encoding) }
}

const FILE_KIND: &str = "hauberk-wireguard-1";
const BASE64_LEN: usize = 44;
