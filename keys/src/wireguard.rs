//! WireGuard keys, and the pre-shared key of a pair of nodes.
//!
//! ## Layouts
//!
//! ```text
//! public key   32 bytes; base64 in text, as `wg` shows it
//! file         one line, see `armor`: hauberk-wireguard-1:<32 bytes and checksum in hex>
//! PSK          HKDF-SHA256(psk_seed(32) ‖ X25519(own WireGuard secret, peer's WireGuard key)(32),
//!                salt = "hauberk wg psk v2",
//!                info = lower node id(16) ‖ higher node id(16)
//!                     ‖ WireGuard key of the lower(32) ‖ of the higher(32) ‖ u64 LE epoch)
//! check        first 16 bytes of HMAC-SHA256(C,
//!                kind(1) ‖ prover's node id(16) ‖ binding(32) ‖ u64 LE epoch)
//! C            HKDF-SHA256(PSK, salt = "hauberk wg psk check v2", info = "")
//! kind         0 probe, 1 answer, 2 offer, 3 staged, 4 commit
//! ```
//!
//! The two secrets of a PSK are concatenated, as in NIST SP 800-56C rev. 2, section 2 (a shared secret and an auxiliary
//! one), and in the hybrid key exchange of TLS 1.3 (draft-ietf-tls-hybrid-design, section 3.3). Whoever lacks either of
//! them cannot tell the PSK from a random one: the first keeps it from those who break X25519 later, the second
//! from those who do not hold one of the two WireGuard keys. Both have one length only, and what they are for is in
//! `info`.

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

/// The other end's WireGuard key is a point of low order: the shared secret would be zero, whoever computes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the other end's WireGuard key is of low order: whoever likes can compute what is shared with it")]
pub struct WeakWgKey;

/// The pre-shared key of the tunnel between two ends. Both nodes compute the same one. `secret` is that of
/// `ours.wireguard`; `epoch` tells the keys of one session apart.
///
/// It takes the secret of one of the two WireGuard keys to compute it. So an end that shows by a [`psk_check`] that
/// it has the key, and is not ourselves, holds the secret of the WireGuard key that it says is its own.
///
/// # Errors
/// [`WeakWgKey`] (RFC 7748, section 6.1: the check for the all-zero value).
pub fn pair_psk(
    psk_seed: &Secret32,
    ours: &PairEnd,
    secret: &WgSecret,
    theirs: &PairEnd,
    epoch: u64,
) -> Result<Psk, WeakWgKey> {
    let lane = StaticSecret::from(*secret.expose()).diffie_hellman(&PublicKey::from(theirs.wireguard.0));
    if !lane.was_contributory() {
        return Err(WeakWgKey);
    }
    let mut secrets = Zeroizing::new([0; 64]);
    secrets[..32].copy_from_slice(psk_seed.expose());
    secrets[32..].copy_from_slice(lane.as_bytes());
    let order = |end: &PairEnd| (*end.node.as_bytes(), *end.wireguard.as_bytes());
    let (low, high) = if order(ours) <= order(theirs) { (ours, theirs) } else { (theirs, ours) };
    Ok(Psk(hkdf32(
        b"hauberk wg psk v2",
        &*secrets,
        &[
            low.node.as_bytes(),
            high.node.as_bytes(),
            low.wireguard.as_bytes(),
            high.wireguard.as_bytes(),
            &epoch.to_le_bytes(),
        ],
    )))
}

/// What an end says when it shows that it holds a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum PskStep {
    /// It holds this key; does the other end?
    Probe = 0,
    /// It does.
    Answer = 1,
    /// This key should be used.
    Offer = 2,
    /// It is installed, and answers.
    Staged = 3,
    /// Both ends have it installed.
    Commit = 4,
}

/// What `prover` sends in a session to show that it holds `psk`, without revealing it, as it takes `step` in the
/// agreement of number `epoch`.
///
/// `binding` is the session's [`join_binding`](crate::SessionSecrets), so the value is worthless in
/// another session; the prover is part of it, so an end cannot send back what it was sent; step and number are, so
/// that nothing that was said once can be said for something else, or later.
#[must_use]
pub fn psk_check(psk: &Psk, binding: &[u8; 32], prover: &NodeId, step: PskStep, epoch: u64) -> PskCheck {
    let key = hkdf32(b"hauberk wg psk check v2", psk.expose(), &[]);
    let mac = crate::secret::hmac(&key)
        .chain_update([step as u8])
        .chain_update(prover.as_bytes())
        .chain_update(binding)
        .chain_update(epoch.to_le_bytes())
        .finalize();
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
