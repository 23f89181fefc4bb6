//! Keys as the protocol carries them: 32 bytes, in hexadecimal on the wire and in base64 for people.

use std::fmt;

use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

/// Length of every WireGuard key, in bytes.
pub const KEY_LEN: usize = 32;

/// Why a text is not a key. Never quotes the text, which may be a secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// The text does not have 64 characters.
    #[error("a key has 64 hexadecimal digits, this has {0} characters")]
    Length(usize),
    /// A character is not a hexadecimal digit.
    #[error("character {0} of the key is not a hexadecimal digit")]
    Digit(usize),
}

/// A Curve25519 public key. Shown in base64, as `wg` shows it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PublicKey(pub [u8; KEY_LEN]);

impl PublicKey {
    /// Reads 64 hexadecimal digits, upper or lower case.
    ///
    /// # Errors
    /// [`KeyError`] when the length or a digit is wrong.
    pub fn from_hex(text: &[u8]) -> Result<Self, KeyError> {
        let mut bytes = [0; KEY_LEN];
        decode_hex(text, &mut bytes)?;
        Ok(Self(bytes))
    }

    /// The raw bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; KEY_LEN] {
        &self.0
    }

    /// Lower-case hexadecimal, as the protocol has it.
    #[must_use]
    pub fn to_hex(&self) -> String {
        let mut out = String::with_capacity(2 * KEY_LEN);
        push_hex(&self.0, &mut out);
        out
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&base64(&self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({self})")
    }
}

/// A private or preshared key: wiped from memory when dropped, never shown by `Debug`.
///
/// All zeroes is the protocol's way to say "none"; see [`SecretKey::is_zero`].
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct SecretKey([u8; KEY_LEN]);

impl SecretKey {
    /// The value that clears a private or preshared key.
    pub const ZERO: Self = Self([0; KEY_LEN]);

    /// Takes a copy of `bytes`; wiping the original is the caller's part.
    #[must_use]
    pub fn new(bytes: &[u8; KEY_LEN]) -> Self {
        Self(*bytes)
    }

    /// Reads 64 hexadecimal digits, upper or lower case.
    ///
    /// # Errors
    /// [`KeyError`] when the length or a digit is wrong. The error does not quote the text.
    pub fn from_hex(text: &[u8]) -> Result<Self, KeyError> {
        let mut key = Self::ZERO;
        decode_hex(text, &mut key.0)?;
        Ok(key)
    }

    /// The raw bytes, for the code that feeds them to the protocol.
    #[must_use]
    pub fn expose(&self) -> &[u8; KEY_LEN] {
        &self.0
    }

    /// Whether every byte is zero, which stands for "no key".
    #[must_use]
    pub fn is_zero(&self) -> bool {
        self.0.iter().fold(0, |acc, byte| acc | byte) == 0
    }
}

/// In constant time: comparing a live key with a new one happens on every reconfiguration.
impl PartialEq for SecretKey {
    fn eq(&self, other: &Self) -> bool {
        self.0.iter().zip(&other.0).fold(0, |acc, (a, b)| acc | (a ^ b)) == 0
    }
}

impl Eq for SecretKey {}

impl fmt::Debug for SecretKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretKey(redacted)")
    }
}

/// Appends the hexadecimal form of `bytes`.
pub(super) fn push_hex(bytes: &[u8; KEY_LEN], out: &mut String) {
    for byte in bytes {
        for nibble in [byte >> 4, byte & 15] {
            out.push(char::from(if nibble < 10 { b'0' + nibble } else { b'a' + nibble - 10 }));
        }
    }
}

fn decode_hex(text: &[u8], out: &mut [u8; KEY_LEN]) -> Result<(), KeyError> {
    if text.len() != 2 * KEY_LEN {
        return Err(KeyError::Length(text.len()));
    }
    let mut bytes = Zeroizing::new([0u8; KEY_LEN]);
    for (position, character) in text.iter().enumerate() {
        let nibble = match character {
            b'0'..=b'9' => character - b'0',
            b'a'..=b'f' => character - b'a' + 10,
            b'A'..=b'F' => character - b'A' + 10,
            _ => return Err(KeyError::Digit(position + 1)),
        };
        bytes[position / 2] |= nibble << if position % 2 == 0 { 4 } else { 0 };
    }
    out.copy_from_slice(&*bytes);
    Ok(())
}

/// Standard base64 with padding of exactly 32 bytes: 44 characters.
fn base64(bytes: &[u8; KEY_LEN]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::with_capacity(44);
    for chunk in bytes.chunks(3) {
        let group =
            chunk.iter().fold(0u32, |acc, byte| acc << 8 | u32::from(*byte)) << (8 * (3 - chunk.len()));
        for place in 0..4 {
            if place <= chunk.len() {
                out.push(char::from(ALPHABET[(group >> (18 - 6 * place) & 63) as usize]));
            } else {
                out.push('=');
            }
        }
    }
    out
}
