//! One line of text for key material in a file.
//!
//! ```text
//! <kind>:<hex digits of bytes ‖ checksum>
//! checksum   first 4 bytes of SHA-256("hauberk armor v1" 00 ‖ kind ‖ 00 ‖ bytes)
//! ```
//!
//! The kind names purpose and version (`hauberk-key-1`), so a file given to the wrong option is
//! recognised. The checksum is there for pastes that were cut short or mistyped; it is no protection
//! against a person who means harm, and it reveals nothing that the line does not say anyway.

use sha2::{Digest as _, Sha256};
use zeroize::{Zeroize as _, Zeroizing};

/// Why a line is not the key that was expected.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ArmorError {
    /// Nothing but white space.
    #[error("the file is empty; it must hold one line that starts with `{expected}:`")]
    Empty {
        /// The kind that was expected.
        expected: &'static str,
    },
    /// Some other text, for example a password.
    #[error(
        "the file does not hold a line that starts with `{expected}:`; is it another kind of file, such as a password?"
    )]
    NotArmored {
        /// The kind that was expected.
        expected: &'static str,
    },
    /// A key of ours, but for another purpose or of another version.
    #[error("the file holds a `{found}`, but a `{expected}` is needed here")]
    OtherKind {
        /// The kind that was expected.
        expected: &'static str,
        /// The kind that was found.
        found: String,
    },
    /// More than one line.
    #[error("the `{expected}` file must hold one line, but it has more")]
    ManyLines {
        /// The kind that was expected.
        expected: &'static str,
    },
    /// Too few or too many digits.
    #[error(
        "the `{kind}` line has {found} digits instead of {expected}; was it cut short or joined with another line when it was copied?"
    )]
    Length {
        /// The kind of the line.
        kind: &'static str,
        /// Digits needed.
        expected: usize,
        /// Digits found.
        found: usize,
    },
    /// A character that cannot be there.
    #[error(
        "the `{kind}` line has a character at position {position} that is no hex digit; was it mistyped?"
    )]
    Digit {
        /// The kind of the line.
        kind: &'static str,
        /// Position in the line, counted from 1.
        position: usize,
    },
    /// All digits are there, but some are not the right ones.
    #[error("the checksum of the `{kind}` line does not fit; a digit was changed when it was copied")]
    Checksum {
        /// The kind of the line.
        kind: &'static str,
    },
}

/// Writes `bytes` as a line of `kind`, with a newline at its end.
pub(crate) fn encode(kind: &str, bytes: &[u8]) -> Zeroizing<String> {
    let mut text = Zeroizing::new(String::with_capacity(kind.len() + 2 + 2 * (bytes.len() + CHECKSUM_LEN)));
    text.push_str(kind);
    text.push(':');
    for byte in bytes.iter().chain(&checksum(kind, bytes)) {
        text.push(digit(byte >> 4));
        text.push(digit(byte & 0x0f));
    }
    text.push('\n');
    text
}

/// Reads a line of `kind` that holds exactly `N` bytes.
pub(crate) fn decode<const N: usize>(
    kind: &'static str,
    text: &str,
) -> Result<Zeroizing<[u8; N]>, ArmorError> {
    let line = text.trim();
    if line.is_empty() {
        return Err(ArmorError::Empty { expected: kind });
    }
    if line.contains('\n') {
        return Err(ArmorError::ManyLines { expected: kind });
    }
    let Some((found, digits)) = line.split_once(':') else {
        return Err(ArmorError::NotArmored { expected: kind });
    };
    if found != kind {
        // Anything that is not one of ours may be a password, which must not be shown.
        return Err(if is_kind(found) {
            ArmorError::OtherKind { expected: kind, found: found.to_owned() }
        } else {
            ArmorError::NotArmored { expected: kind }
        });
    }
    if let Some(at) = digits.bytes().position(|b| !b.is_ascii_hexdigit()) {
        return Err(ArmorError::Digit { kind, position: kind.len() + 2 + at });
    }
    let expected = 2 * (N + CHECKSUM_LEN);
    if digits.len() != expected {
        return Err(ArmorError::Length { kind, expected, found: digits.len() });
    }
    let mut bytes = Zeroizing::new([0; N]);
    let mut sum = [0; CHECKSUM_LEN];
    for (slot, pair) in bytes.iter_mut().chain(&mut sum).zip(digits.as_bytes().chunks_exact(2)) {
        *slot = value(pair[0]) << 4 | value(pair[1]);
    }
    if sum != checksum(kind, &*bytes) {
        return Err(ArmorError::Checksum { kind });
    }
    Ok(bytes)
}

fn is_kind(text: &str) -> bool {
    KINDS.iter().filter_map(|stem| text.strip_prefix(stem)).any(|version| {
        !version.is_empty() && version.len() <= 3 && version.bytes().all(|b| b.is_ascii_digit())
    })
}

fn checksum(kind: &str, bytes: &[u8]) -> [u8; CHECKSUM_LEN] {
    let mut hash = Sha256::new()
        .chain_update(b"hauberk armor v1\0")
        .chain_update(kind)
        .chain_update([0])
        .chain_update(bytes)
        .finalize();
    let mut sum = [0; CHECKSUM_LEN];
    sum.copy_from_slice(&hash[..CHECKSUM_LEN]);
    hash.as_mut_slice().zeroize();
    sum
}

// Digits are computed, not looked up: a table indexed by secret bytes leaks them through the cache.

fn digit(nibble: u8) -> char {
    let letter = (nibble + 6) >> 4; // 1 for 10 to 15
    char::from(b'0' + nibble + letter * (b'a' - b'0' - 10))
}

fn value(digit: u8) -> u8 {
    let letter = digit >> 6; // 1 for a to f and A to F
    (digit & 0x0f) + 9 * letter
}

const CHECKSUM_LEN: usize = 4;

/// All kinds, without their versions.
const KINDS: [&str; 6] = [
    "hauberk-key-",
    "hauberk-identity-",
    "hauberk-wireguard-",
    "hauberk-password-record-",
    "hauberk-admin-",
    "hauberk-admin-public-",
];
