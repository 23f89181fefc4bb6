//! Public values of a fixed number of bytes, shown as hex.
//!
//! In binary formats such a value is its bytes and nothing else (no length); in human-readable ones
//! (JSON) it is a string of hex digits.

/// Why a text is not the hex form of a value.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HexError {
    /// The text has another length than the value needs.
    #[error("{what} must have {expected} hex digits, but {found} characters were given")]
    Length {
        /// What was being read, for example "node id".
        what: &'static str,
        /// Digits needed.
        expected: usize,
        /// Characters found.
        found: usize,
    },
    /// A character is no hex digit.
    #[error("{what}: character {position} is no hex digit (0-9, a-f)")]
    Digit {
        /// What was being read.
        what: &'static str,
        /// Position of the character, counted from 1.
        position: usize,
    },
}

/// Reads exactly `out.len()` bytes from hex digits of either case.
///
/// # Errors
/// [`HexError`] names `what`; `out` is then unspecified.
pub(crate) fn decode_hex(what: &'static str, text: &str, out: &mut [u8]) -> Result<(), HexError> {
    let found = text.chars().count();
    let expected = out.len() * 2;
    if found != expected {
        return Err(HexError::Length { what, expected, found });
    }
    if let Some(at) = text.chars().position(|c| !c.is_ascii_hexdigit()) {
        return Err(HexError::Digit { what, position: at + 1 });
    }
    // Both checks above leave nothing that could fail here.
    hex::decode_to_slice(text, out).map_err(|_| HexError::Length { what, expected, found })
}

/// Serde for byte arrays of any length: bytes without a length in binary formats, hex in text.
pub(crate) mod array {
    use serde::de::{Error, SeqAccess, Visitor};
    use serde::ser::SerializeTuple;
    use serde::{Deserializer, Serializer};
    use std::fmt;

    pub(crate) fn serialize<S: Serializer, const N: usize>(bytes: &[u8; N], s: S) -> Result<S::Ok, S::Error> {
        if s.is_human_readable() {
            return s.serialize_str(&hex::encode(bytes));
        }
        let mut tuple = s.serialize_tuple(N)?;
        for byte in bytes {
            tuple.serialize_element(byte)?;
        }
        tuple.end()
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>, const N: usize>(
        what: &'static str,
        d: D,
    ) -> Result<[u8; N], D::Error> {
        struct Bytes<const N: usize>(&'static str);
        impl<'de, const N: usize> Visitor<'de> for Bytes<N> {
            type Value = [u8; N];
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{} of {N} bytes", self.0)
            }
            fn visit_str<E: Error>(self, text: &str) -> Result<Self::Value, E> {
                let mut out = [0; N];
                super::decode_hex(self.0, text, &mut out).map_err(E::custom)?;
                Ok(out)
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
                let mut out = [0; N];
                for (at, slot) in out.iter_mut().enumerate() {
                    *slot = seq.next_element()?.ok_or_else(|| A::Error::invalid_length(at, &self))?;
                }
                Ok(out)
            }
        }
        if d.is_human_readable() {
            d.deserialize_str(Bytes::<N>(what))
        } else {
            d.deserialize_tuple(N, Bytes::<N>(what))
        }
    }
}

/// Declares a public newtype over `[u8; N]`: hex in `Display`, `Debug` and `FromStr`, serde, order.
macro_rules! fixed_bytes {
    ($(#[$meta:meta])* $name:ident, $len:literal, $what:literal) => {
        $(#[$meta])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name([u8; $len]);

        impl $name {
            /// Length in bytes.
            pub const LEN: usize = $len;

            /// Takes the bytes as they are.
            #[must_use]
            pub const fn from_bytes(bytes: [u8; $len]) -> Self {
                Self(bytes)
            }

            /// The bytes.
            #[must_use]
            pub const fn as_bytes(&self) -> &[u8; $len] {
                &self.0
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(&hex::encode(self.0))
            }
        }

        impl std::fmt::Debug for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self)
            }
        }

        impl std::str::FromStr for $name {
            type Err = $crate::hexbytes::HexError;
            fn from_str(text: &str) -> Result<Self, Self::Err> {
                let mut bytes = [0; $len];
                $crate::hexbytes::decode_hex($what, text, &mut bytes)?;
                Ok(Self(bytes))
            }
        }

        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                $crate::hexbytes::array::serialize(&self.0, s)
            }
        }

        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                $crate::hexbytes::array::deserialize($what, d).map(Self)
            }
        }
    };
}
pub(crate) use fixed_bytes;
