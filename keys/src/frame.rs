//! The gossip datagram: one UDP payload, sealed for one member with a key that only sender and receiver have.
//!
//! ```text
//! 0        1    0x31: version 3, type 1. Never 1 to 4, so it cannot be taken for WireGuard
//! 1..5     4    group key id
//! 5..13    8    sender: first 8 bytes of its node id
//! 13..21   8    boot nonce: random, drawn when the sender starts
//! 21..29   8    counter, u64 little-endian, from 0
//! 29..          ChaCha20-Poly1305 (RFC 8439) ciphertext, then its tag of 16 bytes
//!
//! group key id   first 4 bytes of SHA-256("hauberk group key id v1" 00 ‖ group key)
//! pair secret    X25519 between the identity keys of sender and receiver: see `agreement`
//! key            HKDF-SHA256(group key ‖ pair secret, salt = "hauberk gossip v2",
//!                            info = sender's node id(16) ‖ receiver's node id(16) ‖ boot nonce(8))
//! nonce          00 00 00 00 ‖ counter, u64 little-endian
//! AAD            bytes 0..29
//! ```
//!
//! A datagram has at most 1,200 bytes, 45 of them overhead. One that only measures how long packets may be on a way is
//! longer: [`Sealer::seal_long`].
//!
//! ## What it gives and what not
//!
//! The pair secret says who has sent it: nobody else, no other member and no removed one, can seal in
//! the sender's name or read what is sealed for the receiver. The group key came over a control
//! session, whose key exchange withstands a quantum computer: with it in the derivation, what is
//! recorded today stays hidden from one that breaks X25519 later.
//!
//! A thief of an identity can read what was sealed for it (there is no forward secrecy): nothing in
//! gossip is secret from a member.
//!
//! Nonces cannot repeat: key and counter belong to one start of one node, and [`Sealer`] draws the
//! boot nonce itself.
//!
//! ## Order of checks
//!
//! Length, first byte, key id, sender, replay window, AEAD; the window moves only after the AEAD
//! has succeeded, so a forged datagram changes nothing.
//!
//! ## First contact
//!
//! The first frame of a sender's start may be a replay from long ago, and nothing in it can tell.
//! [`Opener::open`] hands it out with [`Opened::first_contact`] set and keeps no state. The caller
//! checks freshness, by a time in the payload within 120 s of its own or by an echo of a token of
//! its own, and only then calls [`Opener::accept`]. Until then every frame of that start is a first
//! contact.

use crate::agreement::PairSecret;
use crate::hexbytes::fixed_bytes;
use crate::identity::NodeId;
use crate::replay::{ReplayVerdict, ReplayWindow};
use crate::secret::{Secret32, hkdf32};
use crate::sorted_map::SortedMap;
use chacha20poly1305::{AeadInPlace as _, ChaCha20Poly1305, KeyInit as _, Nonce, Tag};
use rand_core::{CryptoRng, RngCore};
use sha2::{Digest as _, Sha256};
use std::fmt;
use zeroize::{Zeroize as _, Zeroizing};

/// The key that all members share, for one epoch.
#[derive(Clone, PartialEq, Eq)]
pub struct GroupKey {
    id: GroupKeyId,
    secret: Secret32,
}

impl GroupKey {
    /// Makes a new key.
    #[must_use]
    pub fn generate(rng: &mut (impl RngCore + CryptoRng)) -> Self {
        Self::from_secret(Secret32::generate(rng))
    }

    /// Takes the key's bytes.
    #[must_use]
    pub fn from_secret(secret: Secret32) -> Self {
        let mut hash =
            Sha256::new().chain_update(b"hauberk group key id v1\0").chain_update(secret.expose()).finalize();
        let mut id = [0; 4];
        id.copy_from_slice(&hash[..4]);
        hash.as_mut_slice().zeroize();
        Self { id: GroupKeyId(id), secret }
    }

    /// Names the key on the wire.
    #[must_use]
    pub const fn id(&self) -> GroupKeyId {
        self.id
    }

    /// The secret, for handing to another member over a control session.
    #[must_use]
    pub const fn secret(&self) -> &Secret32 {
        &self.secret
    }

    fn cipher(
        &self,
        pair: &PairSecret,
        sender: &NodeId,
        receiver: &NodeId,
        boot: &BootNonce,
    ) -> ChaCha20Poly1305 {
        let mut secrets = Zeroizing::new([0; 64]);
        secrets[..32].copy_from_slice(self.secret.expose());
        secrets[32..].copy_from_slice(pair.expose());
        let info = [&sender.as_bytes()[..], receiver.as_bytes(), boot.as_bytes()];
        let key = hkdf32(b"hauberk gossip v2", &*secrets, &info);
        ChaCha20Poly1305::new(key.expose().into())
    }
}

impl fmt::Debug for GroupKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GroupKey").field("id", &self.id).finish_non_exhaustive()
    }
}

fixed_bytes! {
    /// Names a group key on the wire. Not secret.
    GroupKeyId, 4, "group key id"
}

fixed_bytes! {
    /// Names a sender on the wire: the first 8 bytes of its node id.
    ShortId, 8, "short node id"
}

impl ShortId {
    /// The short id of `node`.
    #[must_use]
    pub fn of(node: &NodeId) -> Self {
        let mut short = [0; 8];
        short.copy_from_slice(&node.as_bytes()[..8]);
        Self(short)
    }

    /// The lowest node id that has this short id: where to look for it among ids in order.
    #[must_use]
    pub fn first_node(&self) -> NodeId {
        let mut id = [0; 16];
        id[..8].copy_from_slice(&self.0);
        NodeId::from_bytes(id)
    }
}

fixed_bytes! {
    /// Names one start of a sender.
    BootNonce, 8, "boot nonce"
}

/// Seals datagrams of this node. There is one per start of the node: it cannot be cloned.
pub struct Sealer {
    sender: NodeId,
    boot: BootNonce,
    key: GroupKey,
    next: u64,
}

impl Sealer {
    /// Starts sealing for `sender`, with a fresh boot nonce.
    #[must_use]
    pub fn new(key: &GroupKey, sender: NodeId, rng: &mut (impl RngCore + CryptoRng)) -> Self {
        let mut boot = [0; 8];
        rng.fill_bytes(&mut boot);
        Self::with_boot(key, sender, BootNonce(boot))
    }

    fn with_boot(key: &GroupKey, sender: NodeId, boot: BootNonce) -> Self {
        Self { sender, boot, key: key.clone(), next: 0 }
    }

    /// Goes on with another group key. Counters go on too, so receivers keep their window.
    pub fn rekey(&mut self, key: &GroupKey) {
        self.key = key.clone();
    }

    /// Seals `payload` into one datagram for `receiver`, with whom this node has the secret `pair`.
    ///
    /// # Errors
    /// [`SealError`]; no counter is used up then.
    pub fn seal(
        &mut self,
        receiver: &NodeId,
        pair: &PairSecret,
        payload: &[u8],
    ) -> Result<Vec<u8>, SealError> {
        if payload.len() > MAX_PAYLOAD {
            return Err(SealError::TooLong { found: payload.len() });
        }
        self.seal_long(receiver, pair, payload)
    }

    /// The same for a datagram that may be lost for its length: one that measures how long packets may be on a way.
    ///
    /// # Errors
    /// [`SealError`]; no counter is used up then.
    pub fn seal_long(
        &mut self,
        receiver: &NodeId,
        pair: &PairSecret,
        payload: &[u8],
    ) -> Result<Vec<u8>, SealError> {
        if payload.len() > MAX_LONG_DATAGRAM - OVERHEAD {
            return Err(SealError::TooLong { found: payload.len() });
        }
        let counter = self.next;
        // The last counter is never used, so that `next` cannot wrap.
        self.next = counter.checked_add(1).ok_or(SealError::Exhausted)?;
        let header =
            Header { key_id: self.key.id, sender: ShortId::of(&self.sender), boot: self.boot, counter };
        let aad = header.to_bytes();
        let mut datagram = Vec::with_capacity(OVERHEAD + payload.len());
        datagram.extend_from_slice(&aad);
        datagram.extend_from_slice(payload);
        let tag = self
            .key
            .cipher(pair, &self.sender, receiver, &self.boot)
            .encrypt_in_place_detached(&nonce(counter), &aad, &mut datagram[HEADER_LEN..])
            // ChaCha20-Poly1305 refuses only payloads of more than 256 GiB.
            .map_err(|_| SealError::TooLong { found: payload.len() })?;
        datagram.extend_from_slice(&tag);
        Ok(datagram)
    }

    /// Names this start of the node.
    #[must_use]
    pub const fn boot(&self) -> BootNonce {
        self.boot
    }

    /// The group key in use.
    #[must_use]
    pub const fn key_id(&self) -> GroupKeyId {
        self.key.id
    }
}

impl fmt::Debug for Sealer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sealer")
            .field("sender", &self.sender)
            .field("boot", &self.boot)
            .field("key_id", &self.key.id)
            .field("next", &self.next)
            .finish_non_exhaustive()
    }
}

/// Why a payload was not sealed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SealError {
    /// It does not fit into a datagram.
    #[error("the payload has {found} bytes, more than fit into a datagram (gossip: {MAX_PAYLOAD})")]
    TooLong {
        /// Length in bytes.
        found: usize,
    },
    /// All counters of this start are used up.
    #[error("all frame counters of this start are used up; restart the daemon")]
    Exhausted,
}

/// Opens datagrams of other members, and remembers which it has seen. Memory is bounded by the
/// number of senders given at its making.
pub struct Opener {
    receiver: NodeId,
    keys: Vec<GroupKey>,
    senders: SortedMap<(NodeId, BootNonce), SenderState>,
    max_senders: usize,
    clock: u64,
}

struct SenderState {
    window: ReplayWindow,
    /// When it was last heard, in frames accepted by the opener.
    heard: u64,
}

impl Opener {
    /// An opener without keys, which opens nothing yet.
    #[must_use]
    pub fn without_keys(receiver: NodeId, max_senders: usize) -> Self {
        Self { receiver, keys: Vec::new(), senders: SortedMap::new(), max_senders, clock: 0 }
    }

    /// An opener for `receiver` that accepts frames under `keys` (at most [`MAX_KEYS`]) and remembers up to
    /// `max_senders` starts of senders; beyond that the one not heard for longest is forgotten, and
    /// is a first contact again.
    ///
    /// # Errors
    /// [`TooManyKeys`].
    pub fn new(receiver: NodeId, keys: &[GroupKey], max_senders: usize) -> Result<Self, TooManyKeys> {
        let mut opener = Self::without_keys(receiver, max_senders);
        opener.replace_keys(keys)?;
        Ok(opener)
    }

    /// Accepts frames under `keys` and no others from now on. Replay windows stay.
    ///
    /// # Errors
    /// [`TooManyKeys`]; the keys are as before then.
    pub fn replace_keys(&mut self, keys: &[GroupKey]) -> Result<(), TooManyKeys> {
        if keys.len() > MAX_KEYS {
            return Err(TooManyKeys { found: keys.len() });
        }
        self.keys = keys.to_vec();
        Ok(())
    }

    /// Opens one datagram. `resolve` finds the member that a short id belongs to, `pair` the secret that this node has
    /// with it; that is asked for last, for it may have to be computed.
    ///
    /// # Errors
    /// [`OpenError`] by kind; nothing was changed then.
    pub fn open(
        &mut self,
        datagram: &[u8],
        resolve: impl FnOnce(&ShortId) -> Option<NodeId>,
        pair: impl FnOnce(&NodeId) -> Option<PairSecret>,
    ) -> Result<Opened, OpenError> {
        let header = Header::parse(datagram)?;
        let key = self
            .keys
            .iter()
            .find(|key| key.id == header.key_id)
            .ok_or(OpenError::UnknownKey { id: header.key_id })?;
        let sender = resolve(&header.sender)
            .filter(|node| ShortId::of(node) == header.sender)
            .ok_or(OpenError::UnknownSender { sender: header.sender })?;
        let mut known = self.senders.get_mut(&(sender, header.boot));
        if let Some(state) = &known {
            state.window.check(header.counter).map_err(|verdict| match verdict {
                ReplayVerdict::Seen => OpenError::Replayed { counter: header.counter },
                ReplayVerdict::TooOld => OpenError::TooOld { counter: header.counter },
            })?;
        }
        let pair = pair(&sender).ok_or(OpenError::UnknownSender { sender: header.sender })?;
        let cipher = key.cipher(&pair, &sender, &self.receiver, &header.boot);
        let (aad, sealed) = datagram.split_at(HEADER_LEN);
        let (ciphertext, tag) = sealed.split_at(sealed.len() - TAG_LEN);
        let mut payload = ciphertext.to_vec();
        cipher
            .decrypt_in_place_detached(&nonce(header.counter), aad, &mut payload, Tag::from_slice(tag))
            .map_err(|_| OpenError::Forged)?;

        let first_contact = known.is_none();
        if let Some(state) = &mut known {
            self.clock += 1;
            state.heard = self.clock;
            state.window.record(header.counter);
        }
        Ok(Opened { sender, boot: header.boot, counter: header.counter, first_contact, payload })
    }

    /// Remembers the start of a sender whose first frame the caller has found to be fresh. Frames
    /// with lower counters are refused from now on. Does nothing if it is known already.
    pub fn accept(&mut self, opened: &Opened) {
        let start = (opened.sender, opened.boot);
        if self.max_senders == 0 || self.senders.get(&start).is_some() {
            return;
        }
        let earlier: Vec<_> = self
            .senders
            .iter_from(&(opened.sender, BootNonce([0; 8])))
            .take_while(|((sender, _), _)| *sender == opened.sender)
            .map(|(start, state)| (state.heard, *start))
            .collect();
        if earlier.len() >= MAX_STARTS_PER_SENDER {
            if let Some((_, oldest)) = earlier.iter().min() {
                self.senders.remove(oldest);
            }
        } else if self.senders.len() >= self.max_senders {
            let oldest = self.senders.iter().map(|(start, state)| (state.heard, *start)).min();
            if let Some((_, oldest)) = oldest {
                self.senders.remove(&oldest);
            }
        }
        self.clock += 1;
        let window = ReplayWindow::starting_at(opened.counter);
        self.senders.insert(start, SenderState { window, heard: self.clock });
    }

    /// Forgets a node that is no member any more.
    pub fn forget(&mut self, node: &NodeId) {
        self.senders.retain(|(sender, _), _| sender != node);
    }

    /// Makes room for so many senders.
    pub fn reserve(&mut self, senders: usize) {
        self.senders.reserve(senders.min(self.max_senders));
    }

    /// How many starts of senders are remembered.
    #[must_use]
    pub fn remembered(&self) -> usize {
        self.senders.len()
    }
}

impl fmt::Debug for Opener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Opener")
            .field("keys", &self.keys)
            .field("remembered", &self.senders.len())
            .finish_non_exhaustive()
    }
}

/// An opened datagram.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Opened {
    /// Who has sent it.
    pub sender: NodeId,
    /// Which start of the sender.
    pub boot: BootNonce,
    /// The sender's counter.
    pub counter: u64,
    /// Whether nothing is known of this start: see the module's documentation.
    pub first_contact: bool,
    /// What was sealed.
    pub payload: Vec<u8>,
}

/// Why a datagram was refused. Nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// Too short or too long for a gossip datagram.
    #[error("a datagram has {OVERHEAD} to {MAX_LONG_DATAGRAM} bytes, but {found} were received")]
    Length {
        /// Length in bytes.
        found: usize,
    },
    /// The first byte is another one.
    #[error("the first byte is {found:#04x}, which is no gossip datagram of a known version")]
    Kind {
        /// The first byte.
        found: u8,
    },
    /// Sealed with a group key that this node does not have: catch up over a control session.
    #[error("sealed with group key {id}, which this node does not have")]
    UnknownKey {
        /// The id in the header.
        id: GroupKeyId,
    },
    /// The sender is no known member.
    #[error("sent by {sender}, which is no known member")]
    UnknownSender {
        /// The id in the header.
        sender: ShortId,
    },
    /// The same frame was received before.
    #[error("frame {counter} was received before")]
    Replayed {
        /// The sender's counter.
        counter: u64,
    },
    /// Too far behind the newest frame to tell whether it was received before.
    #[error("frame {counter} is too old")]
    TooOld {
        /// The sender's counter.
        counter: u64,
    },
    /// Altered, or not sealed by that member for this one.
    #[error("the frame does not authenticate")]
    Forged,
}

/// More group keys than a node may hold at one time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{found} group keys, but at most {MAX_KEYS} may be in use at one time")]
pub struct TooManyKeys {
    /// How many were given.
    pub found: usize,
}

/// The bytes in front of the ciphertext.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Which group key.
    pub key_id: GroupKeyId,
    /// Who is said to have sent it.
    pub sender: ShortId,
    /// Which start of the sender.
    pub boot: BootNonce,
    /// The sender's counter.
    pub counter: u64,
}

impl Header {
    /// Reads the header of a whole datagram; nothing in it is authenticated.
    ///
    /// # Errors
    /// [`OpenError::Length`], [`OpenError::Kind`].
    pub fn parse(datagram: &[u8]) -> Result<Self, OpenError> {
        let length = OpenError::Length { found: datagram.len() };
        if !(OVERHEAD..=MAX_LONG_DATAGRAM).contains(&datagram.len()) {
            return Err(length);
        }
        let (kind, rest) = datagram.split_first().ok_or(length)?;
        if *kind != KIND {
            return Err(OpenError::Kind { found: *kind });
        }
        let (key_id, rest) = rest.split_first_chunk().ok_or(length)?;
        let (sender, rest) = rest.split_first_chunk().ok_or(length)?;
        let (boot, rest) = rest.split_first_chunk().ok_or(length)?;
        let (counter, _) = rest.split_first_chunk().ok_or(length)?;
        Ok(Self {
            key_id: GroupKeyId(*key_id),
            sender: ShortId(*sender),
            boot: BootNonce(*boot),
            counter: u64::from_le_bytes(*counter),
        })
    }

    fn to_bytes(self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[0] = KIND;
        bytes[1..5].copy_from_slice(&self.key_id.0);
        bytes[5..13].copy_from_slice(&self.sender.0);
        bytes[13..21].copy_from_slice(&self.boot.0);
        bytes[21..29].copy_from_slice(&self.counter.to_le_bytes());
        bytes
    }
}

fn nonce(counter: u64) -> Nonce {
    let mut nonce = Nonce::default();
    nonce[4..].copy_from_slice(&counter.to_le_bytes());
    nonce
}

/// First byte of a gossip datagram.
pub const KIND: u8 = 0x31;
/// Longest datagram, in bytes: fits the IPv6 minimum MTU of 1,280 with headers and a tunnel's to spare.
pub const MAX_DATAGRAM: usize = 1200;
/// Longest datagram that measures a way, in bytes: of jumbo frames, and a little more.
pub const MAX_LONG_DATAGRAM: usize = 9216;
/// Bytes around the payload.
pub const OVERHEAD: usize = HEADER_LEN + TAG_LEN;
/// Longest payload, in bytes.
pub const MAX_PAYLOAD: usize = MAX_DATAGRAM - OVERHEAD;
/// Group keys in use at one time: two while a key is replaced, twice that when a healed partition
/// has replaced it on both sides.
pub const MAX_KEYS: usize = 4;

const HEADER_LEN: usize = 29;
const TAG_LEN: usize = 16;
/// The running start and the one before it, whose last frames may still be under way.
const MAX_STARTS_PER_SENDER: usize = 2;

#[cfg(test)]
mod tests;
