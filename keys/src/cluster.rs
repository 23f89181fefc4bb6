//! The genesis document of a cluster, and what follows from it.
//!
//! Its hash is the cluster id; nodes with different documents never gossip. It is made once, from
//! random bytes, and never from the password: that would allow guesses offline.
//!
//! ## Layout
//!
//! ```text
//! 0        1    format version, 0x01
//! then postcard, in this order:
//!          str  name: varint length, UTF-8 (1 to 63 bytes of a-z, 0-9 and -)
//!          32   nonce
//!          4+1  IPv4 range: network address, prefix length
//!          1    block prefix length
//!          32   founder: identity key
//!          seq  admin keys: varint count (0 to 16), 32 bytes each, ascending, no duplicates
//!          1    join modes: bit 0 key file, bit 1 password
//! ```
//!
//! There is one encoding of a document: a document that encodes to other bytes than were read is
//! refused, and so are trailing bytes.
//!
//! ```text
//! cluster id    SHA-256("hauberk cluster id v1" 00 ‖ document)
//! IPv6 range    fd ‖ first 40 bits of the cluster id, /48 (RFC 4193)
//! node prefix   IPv6 range ‖ first 48 bits of
//!               SHA-256("hauberk node prefix v1" 00 ‖ identity key ‖ u32 LE salt), /96
//! ```

use crate::hexbytes::fixed_bytes;
use crate::identity::IdentityKey;
use ipnet::{Ipv4Net, Ipv6Net};
use rand_core::{CryptoRng, RngCore};
use serde::de::Visitor;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::{Digest as _, Sha256};
use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};

/// A genesis document that is known to be valid.
#[derive(Clone, PartialEq, Eq)]
pub struct Genesis {
    fields: GenesisFields,
    bytes: Vec<u8>,
    id: ClusterId,
}

/// What a genesis document says. [`Genesis::new`] checks it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GenesisFields {
    /// Label of the cluster: 1 to 63 characters a-z, 0-9 and -, neither first nor last a -.
    pub name: String,
    /// Makes the cluster id unique. Random.
    pub nonce: [u8; 32],
    /// The addresses of all pods.
    pub ipv4_range: Ipv4Net,
    /// Prefix length of the blocks that nodes are granted out of `ipv4_range`.
    pub block_prefix: u8,
    /// The first member. It owns the whole IPv4 range at first, and every chain of admissions ends
    /// at it.
    pub founder: IdentityKey,
    /// Who may sign removals. Empty: flat mode, any member may sign the removal of an unreachable one.
    pub admin_keys: Vec<IdentityKey>,
    /// How nodes may join.
    pub join_modes: JoinModes,
}

impl GenesisFields {
    /// The defaults: range 10.32.0.0/12 in blocks of /24, no admin keys.
    #[must_use]
    pub fn flat(
        name: &str,
        founder: IdentityKey,
        join_modes: JoinModes,
        rng: &mut (impl RngCore + CryptoRng),
    ) -> Self {
        let mut nonce = [0; 32];
        rng.fill_bytes(&mut nonce);
        Self {
            name: name.to_owned(),
            nonce,
            ipv4_range: Self::default_ipv4_range(),
            block_prefix: DEFAULT_BLOCK_PREFIX,
            founder,
            admin_keys: Vec::new(),
            join_modes,
        }
    }

    /// 10.32.0.0/12.
    #[must_use]
    pub const fn default_ipv4_range() -> Ipv4Net {
        Ipv4Net::new_assert(Ipv4Addr::new(10, 32, 0, 0), 12)
    }

    fn validate(&self) -> Result<(), GenesisError> {
        check_name(&self.name)?;
        check_range(self.ipv4_range)?;
        let range = self.ipv4_range.prefix_len();
        if !(range..=MAX_BLOCK_PREFIX).contains(&self.block_prefix) {
            return Err(GenesisError::BlockPrefix { found: self.block_prefix, range: self.ipv4_range });
        }
        if self.block_prefix - range > MAX_BLOCK_BITS {
            return Err(GenesisError::TooManyBlocks { block: self.block_prefix, range: self.ipv4_range });
        }
        if !self.founder.is_usable() {
            return Err(GenesisError::UnusableKey { field: "founder", key: self.founder });
        }
        if self.admin_keys.len() > MAX_ADMIN_KEYS {
            return Err(GenesisError::TooManyAdminKeys { found: self.admin_keys.len() });
        }
        if let Some(key) = self.admin_keys.iter().find(|key| !key.is_usable()) {
            return Err(GenesisError::UnusableKey { field: "admin_keys", key: *key });
        }
        if !self.admin_keys.is_sorted_by(|a, b| a < b) {
            return Err(GenesisError::AdminKeyOrder);
        }
        self.join_modes.validate()
    }
}

impl Genesis {
    /// Checks the fields and makes the document. Admin keys are put in order; the same one twice is
    /// refused.
    ///
    /// # Errors
    /// [`GenesisError`] names the field.
    pub fn new(mut fields: GenesisFields) -> Result<Self, GenesisError> {
        fields.admin_keys.sort_unstable();
        fields.validate()?;
        let bytes = encode(&fields)?;
        Ok(Self::checked(fields, bytes))
    }

    /// Reads a document. Only the canonical encoding of a valid one is accepted.
    ///
    /// # Errors
    /// [`GenesisError`] names the field.
    pub fn decode(bytes: &[u8]) -> Result<Self, GenesisError> {
        if bytes.len() > Self::MAX_LEN {
            return Err(GenesisError::TooLong { found: bytes.len() });
        }
        match bytes.first() {
            Some(&FORMAT) => {}
            Some(&found) => return Err(GenesisError::Format { found }),
            None => return Err(GenesisError::Truncated),
        }
        let (wire, rest) = postcard::take_from_bytes::<Wire>(&bytes[1..]).map_err(|error| {
            if error == postcard::Error::DeserializeUnexpectedEnd {
                GenesisError::Truncated
            } else {
                GenesisError::Malformed { error }
            }
        })?;
        if !rest.is_empty() {
            return Err(GenesisError::TrailingBytes { found: rest.len() });
        }
        let fields = wire.into_fields()?;
        fields.validate()?;
        if encode(&fields)? != bytes {
            return Err(GenesisError::NotCanonical);
        }
        Ok(Self::checked(fields, bytes.to_vec()))
    }

    fn checked(fields: GenesisFields, bytes: Vec<u8>) -> Self {
        let hash = Sha256::new().chain_update(b"hauberk cluster id v1\0").chain_update(&bytes).finalize();
        Self { fields, bytes, id: ClusterId::from_bytes(hash.into()) }
    }

    /// The canonical encoding.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The canonical encoding.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        self.bytes.clone()
    }

    /// The cluster id.
    #[must_use]
    pub const fn id(&self) -> ClusterId {
        self.id
    }

    /// All fields.
    #[must_use]
    pub const fn fields(&self) -> &GenesisFields {
        &self.fields
    }

    /// Format version of the document.
    #[must_use]
    pub const fn version(&self) -> u8 {
        FORMAT
    }

    /// Label of the cluster.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.fields.name
    }

    /// The IPv4 addresses of all pods.
    #[must_use]
    pub const fn ipv4_range(&self) -> Ipv4Net {
        self.fields.ipv4_range
    }

    /// Prefix length of IPv4 blocks.
    #[must_use]
    pub const fn block_prefix(&self) -> u8 {
        self.fields.block_prefix
    }

    /// The first member.
    #[must_use]
    pub const fn founder(&self) -> IdentityKey {
        self.fields.founder
    }

    /// Who may sign removals; empty in flat mode.
    #[must_use]
    pub fn admin_keys(&self) -> &[IdentityKey] {
        &self.fields.admin_keys
    }

    /// Whether there is no admin key.
    #[must_use]
    pub fn is_flat(&self) -> bool {
        self.fields.admin_keys.is_empty()
    }

    /// How nodes may join.
    #[must_use]
    pub const fn join_modes(&self) -> JoinModes {
        self.fields.join_modes
    }

    /// The IPv6 addresses of all pods: a ULA /48 (RFC 4193) out of the cluster id.
    #[must_use]
    pub fn ipv6_range(&self) -> Ipv6Net {
        self.id.ipv6_range()
    }

    /// The IPv6 addresses of one node's pods: a /96 inside [`Genesis::ipv6_range`]. Another `salt`
    /// gives another prefix, for the rare case of two nodes with the same one.
    #[must_use]
    pub fn node_prefix(&self, node: &IdentityKey, salt: u32) -> Ipv6Net {
        self.id.node_prefix(node, salt)
    }

    /// Longest document accepted, in bytes.
    pub const MAX_LEN: usize = 1024;
}

impl fmt::Debug for Genesis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Genesis").field("id", &self.id).field("fields", &self.fields).finish_non_exhaustive()
    }
}

/// One byte string in binary formats, hex in text formats.
impl Serialize for Genesis {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        if s.is_human_readable() {
            s.serialize_str(&hex::encode(&self.bytes))
        } else {
            s.serialize_bytes(&self.bytes)
        }
    }
}

impl<'de> Deserialize<'de> for Genesis {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct Document;
        impl Visitor<'_> for Document {
            type Value = Genesis;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a genesis document")
            }
            fn visit_bytes<E: serde::de::Error>(self, bytes: &[u8]) -> Result<Self::Value, E> {
                Genesis::decode(bytes).map_err(E::custom)
            }
            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Self::Value, E> {
                if text.len() > 2 * Genesis::MAX_LEN {
                    return Err(E::custom(GenesisError::TooLong { found: text.len() / 2 }));
                }
                let bytes = hex::decode(text).map_err(|e| E::custom(format_args!("genesis: {e}")))?;
                Genesis::decode(&bytes).map_err(E::custom)
            }
        }
        if d.is_human_readable() { d.deserialize_str(Document) } else { d.deserialize_bytes(Document) }
    }
}

fixed_bytes! {
    /// Which cluster: the hash of its genesis document.
    ClusterId, 32, "cluster id"
}

impl ClusterId {
    /// The first 8 hex digits, for people. Not unique enough for a decision.
    #[must_use]
    pub fn short(&self) -> String {
        hex::encode(&self.as_bytes()[..4])
    }

    /// See [`Genesis::ipv6_range`].
    #[must_use]
    pub fn ipv6_range(&self) -> Ipv6Net {
        let mut octets = [0; 16];
        octets[0] = 0xfd;
        octets[1..6].copy_from_slice(&self.as_bytes()[..5]);
        Ipv6Net::new_assert(Ipv6Addr::from(octets), 48)
    }

    /// See [`Genesis::node_prefix`].
    #[must_use]
    pub fn node_prefix(&self, node: &IdentityKey, salt: u32) -> Ipv6Net {
        let hash = Sha256::new()
            .chain_update(b"hauberk node prefix v1\0")
            .chain_update(node.as_bytes())
            .chain_update(salt.to_le_bytes())
            .finalize();
        let mut octets = self.ipv6_range().addr().octets();
        octets[6..12].copy_from_slice(&hash[..6]);
        Ipv6Net::new_assert(Ipv6Addr::from(octets), 96)
    }
}

/// A set of ways to join.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct JoinModes(u8);

impl JoinModes {
    /// Only by key file.
    pub const KEY_FILE: Self = Self(1);
    /// Only by password.
    pub const PASSWORD: Self = Self(2);
    /// Either way.
    pub const BOTH: Self = Self(3);

    /// Whether nodes may join by key file.
    #[must_use]
    pub const fn allows_key_file(self) -> bool {
        self.0 & Self::KEY_FILE.0 != 0
    }

    /// Whether nodes may join by password.
    #[must_use]
    pub const fn allows_password(self) -> bool {
        self.0 & Self::PASSWORD.0 != 0
    }

    fn validate(self) -> Result<(), GenesisError> {
        if self.0 == 0 || self.0 & !Self::BOTH.0 != 0 {
            return Err(GenesisError::JoinModes { found: self.0 });
        }
        Ok(())
    }
}

impl fmt::Debug for JoinModes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JoinModes")
            .field("key_file", &self.allows_key_file())
            .field("password", &self.allows_password())
            .finish()
    }
}

/// What is wrong with a genesis document. Nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GenesisError {
    /// The document ends too early.
    #[error("genesis: the document is cut short")]
    Truncated,
    /// The document is longer than any valid one.
    #[error("genesis: {found} bytes, but at most {} are allowed", Genesis::MAX_LEN)]
    TooLong {
        /// Length in bytes.
        found: usize,
    },
    /// An unknown format version.
    #[error("genesis: unknown format version {found}; it was made by a newer version of this program")]
    Format {
        /// The first byte.
        found: u8,
    },
    /// Not a genesis document.
    #[error("genesis: cannot be decoded: {error}")]
    Malformed {
        /// What the decoder met.
        error: postcard::Error,
    },
    /// There are bytes after the last field.
    #[error("genesis: {found} bytes too many at the end")]
    TrailingBytes {
        /// How many.
        found: usize,
    },
    /// The same document has another encoding.
    #[error("genesis: not in canonical form")]
    NotCanonical,
    /// The name has a length or a character that is not allowed.
    #[error("genesis, name: must be 1 to 63 characters a-z, 0-9 and -, not starting or ending with -")]
    Name,
    /// The range has bits set after its prefix, or an impossible prefix length.
    #[error("genesis, ipv4_range: {found} is not a network address{}", hint(*found))]
    RangeHostBits {
        /// As given.
        found: Ipv4Net,
    },
    /// The prefix length is out of bounds.
    #[error("genesis, ipv4_range: /{found} is out of bounds; give /8 to /28")]
    RangePrefix {
        /// As given.
        found: u8,
    },
    /// The range can never be routed to pods.
    #[error("genesis, ipv4_range: {found} overlaps {reserved}, which hosts use for something else")]
    RangeReserved {
        /// As given.
        found: Ipv4Net,
        /// What it overlaps.
        reserved: Ipv4Net,
    },
    /// Blocks do not fit into the range.
    #[error("genesis, block_prefix: /{found} is out of bounds for {range}; give /{} to /{MAX_BLOCK_PREFIX}", range.prefix_len())]
    BlockPrefix {
        /// As given.
        found: u8,
        /// The range.
        range: Ipv4Net,
    },
    /// More blocks than can be kept track of.
    #[error(
        "genesis, block_prefix: {range} in blocks of /{block} makes more than 2^{MAX_BLOCK_BITS} blocks; take larger blocks"
    )]
    TooManyBlocks {
        /// Block prefix as given.
        block: u8,
        /// The range.
        range: Ipv4Net,
    },
    /// The key is no Ed25519 key.
    #[error("genesis, {field}: {key} is no valid identity key")]
    UnusableKey {
        /// Which field.
        field: &'static str,
        /// As given.
        key: IdentityKey,
    },
    /// Too many admin keys.
    #[error("genesis, admin_keys: {found} keys, but at most {MAX_ADMIN_KEYS} are allowed")]
    TooManyAdminKeys {
        /// As given.
        found: usize,
    },
    /// Not ascending, or the same twice.
    #[error("genesis, admin_keys: must be in ascending order, each once")]
    AdminKeyOrder,
    /// No way to join, or one that this version does not know.
    #[error("genesis, join_modes: {found:#04x} is not a set of known join modes (1 key file, 2 password)")]
    JoinModes {
        /// As given.
        found: u8,
    },
}

#[derive(Serialize, Deserialize)]
struct Wire {
    name: String,
    nonce: [u8; 32],
    ipv4_address: [u8; 4],
    ipv4_prefix: u8,
    block_prefix: u8,
    founder: IdentityKey,
    admin_keys: Vec<IdentityKey>,
    join_modes: u8,
}

impl Wire {
    fn into_fields(self) -> Result<GenesisFields, GenesisError> {
        let ipv4_range = Ipv4Net::new(self.ipv4_address.into(), self.ipv4_prefix)
            .map_err(|_| GenesisError::RangePrefix { found: self.ipv4_prefix })?;
        Ok(GenesisFields {
            name: self.name,
            nonce: self.nonce,
            ipv4_range,
            block_prefix: self.block_prefix,
            founder: self.founder,
            admin_keys: self.admin_keys,
            join_modes: JoinModes(self.join_modes),
        })
    }
}

fn encode(fields: &GenesisFields) -> Result<Vec<u8>, GenesisError> {
    let wire = Wire {
        name: fields.name.clone(),
        nonce: fields.nonce,
        ipv4_address: fields.ipv4_range.addr().octets(),
        ipv4_prefix: fields.ipv4_range.prefix_len(),
        block_prefix: fields.block_prefix,
        founder: fields.founder,
        admin_keys: fields.admin_keys.clone(),
        join_modes: fields.join_modes.0,
    };
    postcard::to_extend(&wire, vec![FORMAT]).map_err(|error| GenesisError::Malformed { error })
}

/// Most admin keys of a cluster.
pub const MAX_ADMIN_KEYS: usize = 16;

/// Checks the label of a cluster: 1 to 63 characters a-z, 0-9 and -, neither first nor last a -.
///
/// # Errors
/// [`GenesisError`] says what is wrong.
pub fn check_name(name: &str) -> Result<(), GenesisError> {
    let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    let fits = (1..=MAX_NAME_LEN).contains(&name.len())
        && name.bytes().all(allowed)
        && !name.starts_with('-')
        && !name.ends_with('-');
    if fits { Ok(()) } else { Err(GenesisError::Name) }
}

fn check_range(range: Ipv4Net) -> Result<(), GenesisError> {
    if !(MIN_RANGE_PREFIX..=MAX_BLOCK_PREFIX).contains(&range.prefix_len()) {
        return Err(GenesisError::RangePrefix { found: range.prefix_len() });
    }
    if range.trunc() != range {
        return Err(GenesisError::RangeHostBits { found: range });
    }
    for (address, prefix) in RESERVED {
        let reserved = Ipv4Net::new_assert(address, prefix);
        if reserved.contains(&range) || range.contains(&reserved) {
            return Err(GenesisError::RangeReserved { found: range, reserved });
        }
    }
    Ok(())
}

fn hint(range: Ipv4Net) -> String {
    format!("; did you mean {}?", range.trunc())
}

const FORMAT: u8 = 1;
const DEFAULT_BLOCK_PREFIX: u8 = 24;
const MAX_NAME_LEN: usize = 63;
/// A larger range than any that is reserved for private use.
const MIN_RANGE_PREFIX: u8 = 8;
/// Smaller blocks would spend most of their addresses on nothing.
const MAX_BLOCK_PREFIX: u8 = 28;
/// 65,536 blocks: with defaults a /12 has 4,096.
const MAX_BLOCK_BITS: u8 = 16;
/// "This network", loopback, link-local, multicast and the reserved top (RFC 6890).
const RESERVED: [(Ipv4Addr, u8); 5] = [
    (Ipv4Addr::new(0, 0, 0, 0), 8),
    (Ipv4Addr::new(127, 0, 0, 0), 8),
    (Ipv4Addr::new(169, 254, 0, 0), 16),
    (Ipv4Addr::new(224, 0, 0, 0), 4),
    (Ipv4Addr::new(240, 0, 0, 0), 4),
];
