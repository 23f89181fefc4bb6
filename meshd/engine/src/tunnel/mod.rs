//! Everything between this device and one peer: handshakes, sessions, timers, endpoint.
//!
//! Free of I/O and clocks: packets and the time come in, datagrams are left in a [`SendBatch`]. The caller calls
//! [`Tunnel::handle_timeout`] no later than [`Tunnel::poll_timeout`] says.
//!
//! # How boringtun is used
//! A boringtun `Tunn` is handshake, ring of eight sessions and timers in one. Three things about it do not fit:
//! - its preshared key cannot be changed, and replacing the `Tunn` would lose the live session;
//! - as a responder it puts every answered handshake into the ring, confirmed or not, so a peer whose preshared key
//!   differs for a while pushes the live session out by retrying eight times;
//! - its timers read the clock themselves, and its keepalive interval is fixed.
//!
//! So a `Tunn` here serves one handshake and the session that comes of it, nothing more:
//! `attempt` (we initiated) and `answered` (the peer initiated, not yet confirmed) become `live`, and what was live
//! becomes `previous`, as with the kernel's keypairs. A new preshared key goes into the next `Tunn`; the live one is
//! not touched. Timers are kept here, from section 6 of the WireGuard paper. What boringtun's own `Tunn` would check
//! across handshakes, the rising time stamp, is checked here before it sees an initiation.

mod timing;

use std::collections::VecDeque;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant, SystemTime};

use boringtun::noise::errors::WireGuardError;
use boringtun::noise::{Tunn, TunnResult};
use mesh_sys::uapi::{PublicKey, SecretKey};
use mesh_sys::udp::{Destination, SendBatch, Source};
use rand_core::{OsRng, RngCore as _};
use zeroize::Zeroizing;

use crate::index::{IndexTable, Prefix, Registration};
use crate::initiation::{Claimed, Timestamp};
use crate::keys::LocalKeys;
use crate::peer::Peer;

use timing::{
    INITIATION_INTERVAL, MAX_JITTER, REJECT_AFTER_TIME, REKEY_AFTER_MESSAGES, REKEY_AFTER_TIME,
    REKEY_ON_RECEIVE, REKEY_TIMEOUT,
};

/// Bytes that a data message adds to a packet: header of 16, tag of 16.
pub(crate) const OVERHEAD: usize = 32;
/// Longest handshake message.
const HANDSHAKE_ROOM: usize = 148;
/// Counters from here on are never valid (paper, section 6.1).
const REJECT_AFTER_MESSAGES: u64 = u64::MAX - (1 << 13);
/// Packets kept while a handshake is under way (the kernel's `MAX_STAGED_PACKETS`); the oldest go first.
const MAX_STAGED: usize = 128;

/// What became of a packet given to [`Tunnel::seal`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sealed {
    /// It is in the batch.
    Sent,
    /// It waits for a handshake, which is under way.
    Staged,
    /// There is no endpoint or no private key: it is gone.
    NoEndpoint,
    /// The batch has to be sent first; the packet was not taken.
    BatchFull,
}

/// What an authentic data message held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Opened {
    /// Nothing.
    Keepalive,
    /// An IP packet of this length, at the start of the buffer.
    Packet(usize),
}

/// Why a message was refused. The tunnel's state is as before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refused {
    #[error("no session or handshake of that index")]
    UnknownIndex,
    #[error("the session is too old")]
    Expired,
    #[error("a replay, or too far out of order")]
    Replayed,
    #[error("authentication failed")]
    NotAuthentic,
    #[error("too many handshake initiations")]
    Flood,
    #[error("the device has no private key")]
    NoKey,
    #[error("no room for the answer")]
    BatchFull,
}

/// One `Tunn` and its part of the index space.
struct Half {
    tunn: Box<Tunn>,
    registration: Registration,
    /// Which preshared key it was made with.
    psk_generation: u32,
}

struct Attempt {
    half: Half,
    started: Instant,
    retry_at: Instant,
    /// The index of the newest initiation. As in the kernel, answers to older ones are ignored: the peer has
    /// forgotten what it would need to go on with them.
    newest: u32,
}

struct Session {
    half: Half,
    established: Instant,
    initiated_here: bool,
    sent: u64,
}

/// State with one peer.
pub(crate) struct Tunnel {
    remote: PublicKey,
    local: Option<Arc<LocalKeys>>,
    static_shared: Option<Zeroizing<[u8; 32]>>,
    psk: SecretKey,
    psk_generation: u32,
    indices: Arc<IndexTable>,
    owner: Weak<Peer>,
    endpoint: Option<Destination>,

    attempt: Option<Attempt>,
    answered: Option<(Half, Instant)>,
    live: Option<Session>,
    previous: Option<Session>,
    /// Of the newest initiation accepted; older ones are replays.
    newest_timestamp: Timestamp,
    last_initiation: Option<Instant>,
    staged: VecDeque<Vec<u8>>,

    keepalive: Duration,
    /// When the last authentic message went either way; persistent keepalives count from here.
    last_traffic: Option<Instant>,
    /// Data went out at this time, and nothing has come back since.
    awaiting_since: Option<Instant>,
    /// Data came in at this time, and nothing has gone out since.
    owing_since: Option<Instant>,
    /// The next handshake is due at once.
    rekey_now: bool,

    last_handshake: Option<SystemTime>,
    rx_bytes: u64,
    tx_bytes: u64,
}

impl Tunnel {
    pub(crate) fn new(
        remote: PublicKey,
        local: Option<Arc<LocalKeys>>,
        indices: Arc<IndexTable>,
        owner: Weak<Peer>,
    ) -> Self {
        Self {
            remote,
            local,
            static_shared: None,
            psk: SecretKey::ZERO,
            psk_generation: 0,
            indices,
            owner,
            endpoint: None,
            attempt: None,
            answered: None,
            live: None,
            previous: None,
            newest_timestamp: Timestamp::default(),
            last_initiation: None,
            staged: VecDeque::new(),
            keepalive: Duration::ZERO,
            last_traffic: None,
            awaiting_since: None,
            owing_since: None,
            rekey_now: false,
            last_handshake: None,
            rx_bytes: 0,
            tx_bytes: 0,
        }
    }

    /// Changes the device's own key: every session ends, and staged packets wait for the next one.
    pub(crate) fn set_local(&mut self, local: Option<Arc<LocalKeys>>) {
        self.local = local;
        self.static_shared = None;
        self.attempt = None;
        self.answered = None;
        self.live = None;
        self.previous = None;
        self.awaiting_since = None;
        self.owing_since = None;
        self.rekey_now = false;
        if self.local.is_none() {
            self.staged.clear();
        }
    }

    /// Changes the preshared key. The live session goes on; a handshake with the new key is due at once, so that the
    /// new key protects soon. Until the peer has it too, such handshakes fail and are repeated, which disturbs nothing.
    pub(crate) fn set_psk(&mut self, psk: SecretKey) {
        if psk == self.psk {
            return;
        }
        self.psk = psk;
        self.psk_generation = self.psk_generation.wrapping_add(1);
        // An answer to the initiation under way could only fail.
        let was_trying = self.attempt.take().is_some();
        self.rekey_now = was_trying || self.live.is_some();
    }

    pub(crate) fn set_endpoint(&mut self, address: std::net::SocketAddr) {
        if self.endpoint.is_none_or(|endpoint| endpoint.address != address) {
            self.endpoint = Some(Destination { address, source: None });
        }
    }

    /// Forgets the local address `source`, which is no longer ours.
    pub(crate) fn forget_source(&mut self, source: Source) {
        if let Some(endpoint) = &mut self.endpoint
            && endpoint.source == Some(source)
        {
            endpoint.source = None;
        }
    }

    /// Changes the persistent keepalive; zero switches it off. Switched on, the first is due at once.
    pub(crate) fn set_keepalive(&mut self, seconds: u16) {
        let interval = Duration::from_secs(seconds.into());
        if self.keepalive.is_zero() && !interval.is_zero() {
            self.last_traffic = None;
        }
        self.keepalive = interval;
    }

    /// What the configuration protocol reports, but for the allowed addresses.
    pub(crate) fn report(&self) -> mesh_sys::uapi::Peer {
        let since_epoch = |time: SystemTime| time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        mesh_sys::uapi::Peer {
            preshared_key: Some(self.psk.clone()).filter(|key| !key.is_zero()),
            endpoint: self.endpoint.map(|endpoint| endpoint.address),
            persistent_keepalive: u16::try_from(self.keepalive.as_secs()).unwrap_or(u16::MAX),
            last_handshake_time: self.last_handshake.map(since_epoch).unwrap_or_default(),
            rx_bytes: self.rx_bytes,
            tx_bytes: self.tx_bytes,
            ..mesh_sys::uapi::Peer::new(self.remote)
        }
    }

    /// Encrypts `packet`, already padded, into the batch, or keeps it until there is a session.
    pub(crate) fn seal(&mut self, packet: &[u8], now: Instant, out: &mut SendBatch) -> Sealed {
        if self.endpoint.is_none() || self.local.is_none() {
            return Sealed::NoEndpoint;
        }
        if !self.has_usable_session(now) {
            if self.staged.len() >= MAX_STAGED {
                self.staged.pop_front();
            }
            self.staged.push_back(packet.to_vec());
            self.initiate(now, out);
            return Sealed::Staged;
        }
        if !self.staged.is_empty() && !self.flush_staged(now, out) {
            return Sealed::BatchFull;
        }
        if !self.seal_live(packet, now, out) {
            return Sealed::BatchFull;
        }
        if self.live.as_ref().is_some_and(|session| session.wants_rekey_on_send(now)) {
            self.initiate(now, out);
        }
        Sealed::Sent
    }

    /// Decrypts a data message into `plain`, which must be as long as the message.
    pub(crate) fn open(
        &mut self,
        message: &[u8],
        from: &Destination,
        now: Instant,
        plain: &mut [u8],
        out: &mut SendBatch,
    ) -> Result<Opened, Refused> {
        let (Some(index), Some(counter)) = (word(message, 4), message.get(8..16)) else {
            return Err(Refused::NotAuthentic);
        };
        // boringtun would take any counter from an authentic sender, and overflow on the last ones.
        if u64::from_le_bytes(counter.try_into().unwrap_or([0xff; 8])) >= REJECT_AFTER_MESSAGES {
            return Err(Refused::Replayed);
        }
        let prefix = Prefix::of(index);
        let (mut confirms, mut by_previous) = (false, false);
        let (half, established) = if let Some(session) = &mut self.live
            && session.half.registration.prefix == prefix
        {
            (&mut session.half, session.established)
        } else if let Some(session) = &mut self.previous
            && session.half.registration.prefix == prefix
        {
            by_previous = true;
            (&mut session.half, session.established)
        } else if let Some((half, since)) = &mut self.answered
            && half.registration.prefix == prefix
        {
            confirms = true;
            (half, *since)
        } else {
            return Err(Refused::UnknownIndex);
        };
        if now.duration_since(established) >= REJECT_AFTER_TIME {
            return Err(Refused::Expired);
        }
        let opened = match half.tunn.decapsulate(None, message, plain) {
            TunnResult::WriteToTunnelV4(packet, _) | TunnResult::WriteToTunnelV6(packet, _) => {
                Opened::Packet(packet.len())
            }
            TunnResult::Done => Opened::Keepalive,
            // Authentic, but not IP: the sender is alive, the content is dropped. (Length and type were checked, so
            // this cannot come from parsing the message.)
            TunnResult::Err(WireGuardError::InvalidPacket) => Opened::Keepalive,
            TunnResult::Err(WireGuardError::InvalidCounter | WireGuardError::DuplicateCounter) => {
                return Err(Refused::Replayed);
            }
            TunnResult::Err(_) | TunnResult::WriteToNetwork(_) => return Err(Refused::NotAuthentic),
        };
        self.rx_bytes += message.len() as u64;
        self.roam(from);
        if confirms && let Some((half, _)) = self.answered.take() {
            if half.psk_generation == self.psk_generation {
                self.attempt = None;
                self.rekey_now = false;
            }
            self.promote(half, false, now);
        }
        if by_previous {
            self.settle();
        }
        self.note_received(opened != Opened::Keepalive, now);
        if self.live.as_ref().is_some_and(|session| session.wants_rekey_on_receive(now)) {
            self.initiate(now, out);
        }
        if !self.staged.is_empty() {
            self.flush_staged(now, out);
        }
        Ok(opened)
    }

    /// Answers a handshake initiation whose MACs have been checked.
    pub(crate) fn handle_initiation(
        &mut self,
        claimed: Claimed,
        message: &[u8],
        from: &Destination,
        now: Instant,
        out: &mut SendBatch,
    ) -> Result<(), Refused> {
        let timestamp = claimed.prove(&*self.static_shared()?).map_err(|_| Refused::NotAuthentic)?;
        if timestamp <= self.newest_timestamp {
            return Err(Refused::Replayed);
        }
        if self.last_initiation.is_some_and(|last| now.duration_since(last) < INITIATION_INTERVAL) {
            return Err(Refused::Flood);
        }
        if !out.has_space(HANDSHAKE_ROOM) {
            return Err(Refused::BatchFull);
        }
        let mut half = match self.answered.take() {
            Some((half, _)) if half.psk_generation == self.psk_generation => half,
            _ => self.new_half()?,
        };
        let Some(space) = out.space(HANDSHAKE_ROOM) else { return Err(Refused::BatchFull) };
        let length = match half.tunn.decapsulate(None, message, space) {
            TunnResult::WriteToNetwork(response) => response.len(),
            TunnResult::Done
            | TunnResult::Err(_)
            | TunnResult::WriteToTunnelV4(..)
            | TunnResult::WriteToTunnelV6(..) => return Err(Refused::NotAuthentic),
        };
        out.commit(from, length);
        self.answered = Some((half, now));
        self.newest_timestamp = timestamp;
        self.last_initiation = Some(now);
        self.rx_bytes += message.len() as u64;
        self.tx_bytes += length as u64;
        self.last_traffic = Some(now);
        self.roam(from);
        tracing::debug!(peer = %self.remote, "answered a handshake");
        Ok(())
    }

    /// Takes the answer to our initiation; its MACs have been checked.
    pub(crate) fn handle_response(
        &mut self,
        message: &[u8],
        from: &Destination,
        now: Instant,
        out: &mut SendBatch,
    ) -> Result<(), Refused> {
        let mut attempt = match self.attempt.take() {
            Some(attempt) if Some(attempt.newest) == word(message, 8) => attempt,
            other => {
                self.attempt = other;
                return Err(Refused::UnknownIndex);
            }
        };
        let Some(space) = out.space(HANDSHAKE_ROOM) else {
            self.attempt = Some(attempt);
            return Err(Refused::BatchFull);
        };
        // The answer is a keepalive, which confirms the session to the peer.
        let TunnResult::WriteToNetwork(keepalive) = attempt.half.tunn.decapsulate(None, message, space)
        else {
            self.attempt = Some(attempt);
            return Err(Refused::NotAuthentic);
        };
        let length = keepalive.len();
        out.commit(from, length);
        self.rx_bytes += message.len() as u64;
        self.tx_bytes += length as u64;
        self.rekey_now = false;
        self.roam(from);
        self.promote(attempt.half, true, now);
        self.note_received(false, now);
        self.flush_staged(now, out);
        Ok(())
    }

    /// Takes a cookie for our initiation or answer; the next one will carry it.
    pub(crate) fn handle_cookie(&mut self, message: &[u8]) -> Result<(), Refused> {
        let prefix = Prefix::of(word(message, 4).ok_or(Refused::NotAuthentic)?);
        let attempt = self.attempt.as_mut().map(|attempt| &mut attempt.half);
        let answered = self.answered.as_mut().map(|(half, _)| half);
        let half = attempt
            .into_iter()
            .chain(answered)
            .find(|half| half.registration.prefix == prefix)
            .ok_or(Refused::UnknownIndex)?;
        match half.tunn.decapsulate(None, message, &mut []) {
            TunnResult::Done => {
                self.rx_bytes += message.len() as u64;
                Ok(())
            }
            TunnResult::Err(_)
            | TunnResult::WriteToNetwork(_)
            | TunnResult::WriteToTunnelV4(..)
            | TunnResult::WriteToTunnelV6(..) => Err(Refused::NotAuthentic),
        }
    }

    fn has_usable_session(&self, now: Instant) -> bool {
        self.live.as_ref().is_some_and(|session| session.is_usable(now))
    }

    /// Encrypts with the live session, which the caller has found usable. False when the batch is full.
    fn seal_live(&mut self, packet: &[u8], now: Instant, out: &mut SendBatch) -> bool {
        let (Some(session), Some(to)) = (&mut self.live, &self.endpoint) else { return true };
        let Some(space) = out.space((packet.len() + OVERHEAD).max(HANDSHAKE_ROOM)) else { return false };
        if let TunnResult::WriteToNetwork(message) = session.half.tunn.encapsulate(packet, space) {
            let length = message.len();
            out.commit(to, length);
            session.sent += 1;
            self.tx_bytes += length as u64;
            self.note_sent(!packet.is_empty(), now);
        }
        true
    }

    /// Sends what waited for a session. False when the batch was full before the end.
    fn flush_staged(&mut self, now: Instant, out: &mut SendBatch) -> bool {
        while self.has_usable_session(now)
            && let Some(packet) = self.staged.pop_front()
        {
            if !self.seal_live(&packet, now, out) {
                self.staged.push_front(packet);
                return false;
            }
        }
        true
    }

    /// Starts a handshake unless one is under way.
    fn initiate(&mut self, now: Instant, out: &mut SendBatch) {
        if self.attempt.is_some() || self.endpoint.is_none() {
            return;
        }
        if let Ok(half) = self.new_half() {
            self.attempt = Some(Attempt { half, started: now, retry_at: now, newest: 0 });
            self.send_initiation(now, out);
        }
    }

    /// Sends the (next) initiation of the handshake under way. When the batch is full it stays due.
    fn send_initiation(&mut self, now: Instant, out: &mut SendBatch) {
        let (Some(attempt), Some(to)) = (&mut self.attempt, &self.endpoint) else { return };
        let Some(space) = out.space(HANDSHAKE_ROOM) else { return };
        let jitter = Duration::from_millis(u64::from(OsRng.next_u32()) % (MAX_JITTER.as_millis() as u64 + 1));
        attempt.retry_at = now + REKEY_TIMEOUT + jitter;
        if let TunnResult::WriteToNetwork(message) =
            attempt.half.tunn.format_handshake_initiation(space, true)
        {
            let length = message.len();
            attempt.newest = word(message, 4).unwrap_or_default();
            out.commit(to, length);
            self.tx_bytes += length as u64;
            self.last_traffic = Some(now);
            tracing::debug!(peer = %self.remote, endpoint = %to.address, "sent a handshake initiation");
        }
    }

    fn new_half(&self) -> Result<Half, Refused> {
        let local = self.local.as_ref().ok_or(Refused::NoKey)?;
        let registration = self.indices.register(&self.owner);
        // boringtun copies the preshared key and does not wipe its copy; a wiped one here bounds that to one.
        let psk = Some(*self.psk.expose()).filter(|_| !self.psk.is_zero());
        let tunn = Box::new(Tunn::new(
            local.private.clone(),
            (*self.remote.as_bytes()).into(),
            psk,
            None,
            registration.prefix.for_boringtun(),
            Some(Arc::clone(&local.passed)),
        ));
        Ok(Half { tunn, registration, psk_generation: self.psk_generation })
    }

    /// The key agreed between both long-term keys, computed when first needed.
    fn static_shared(&mut self) -> Result<Zeroizing<[u8; 32]>, Refused> {
        let local = self.local.as_ref().ok_or(Refused::NoKey)?;
        let shared = self.static_shared.get_or_insert_with(|| {
            let remote = x25519_dalek::PublicKey::from(*self.remote.as_bytes());
            Zeroizing::new(local.private.diffie_hellman(&remote).to_bytes())
        });
        Ok(shared.clone())
    }

    /// A handshake is complete on both sides.
    fn promote(&mut self, half: Half, initiated_here: bool, now: Instant) {
        let session = Session { half, established: now, initiated_here, sent: 0 };
        self.last_handshake = Some(SystemTime::now());
        if let Some(live) = self.live.replace(session) {
            self.previous = Some(live);
        }
        tracing::debug!(peer = %self.remote, initiated_here, "session established");
    }

    /// A data message came by the previous session. When both ends initiated at the same moment and both handshakes
    /// went through, they may have settled on different ones, each on the one in which it is not bound to rekey. The
    /// one initiated by the end with the smaller public key is kept. (A peer that lost its state and began anew never
    /// uses the previous one, so this cannot lead back to a session that is gone.)
    fn settle(&mut self) {
        if let (Some(live), Some(previous), Some(local)) = (&mut self.live, &mut self.previous, &self.local)
            && live.initiated_here != previous.initiated_here
            && live.established.duration_since(previous.established) < REKEY_TIMEOUT
            && (local.public < self.remote) == previous.initiated_here
        {
            std::mem::swap(live, previous);
        }
    }

    /// The peer is where its authentic messages come from.
    fn roam(&mut self, from: &Destination) {
        match &self.endpoint {
            Some(endpoint) if endpoint == from => {}
            Some(endpoint) if endpoint.address == from.address => self.endpoint = Some(*from),
            _ => {
                tracing::debug!(peer = %self.remote, endpoint = %from.address, "peer has a new endpoint");
                self.endpoint = Some(*from);
            }
        }
    }
}

impl Session {
    fn is_usable(&self, now: Instant) -> bool {
        now.duration_since(self.established) < REJECT_AFTER_TIME && self.sent < REJECT_AFTER_MESSAGES
    }

    fn wants_rekey_on_send(&self, now: Instant) -> bool {
        self.sent >= REKEY_AFTER_MESSAGES
            || (self.initiated_here && now.duration_since(self.established) >= REKEY_AFTER_TIME)
    }

    fn wants_rekey_on_receive(&self, now: Instant) -> bool {
        self.initiated_here && now.duration_since(self.established) >= REKEY_ON_RECEIVE
    }
}

/// A little-endian number from a message.
pub(crate) fn word(message: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(message.get(at..at + 4)?.try_into().ok()?))
}

impl std::fmt::Debug for Tunnel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tunnel").field("remote", &self.remote).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
