//! Everything between this device and one peer: handshakes, sessions, timers, endpoint.
//!
//! Free of I/O and clocks: packets and the time come in, datagrams are left in a [`SendBatch`]. The caller calls
//! [`Tunnel::handle_timeout`] no later than [`Tunnel::poll_timeout`] says.
//!
//! Data does not come through here, only the account of it: [`Tunnel::reserve`] hands out a session and counters for
//! a run of packets, which are then sealed without any lock; [`Tunnel::receive`] is told of a run of messages that
//! were opened, and says which of them are no replays.
//!
//! A peer has at most one session in each of three roles, as with the kernel's keypairs: `answered` (the peer
//! initiated and has not confirmed it), `live` (we send with it) and `previous`. A new preshared key counts from the
//! next handshake on; the live session is not touched. Timers follow section 6 of the WireGuard paper.

mod timing;

use std::collections::VecDeque;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant, SystemTime};

use mesh_sys::uapi::{PublicKey, SecretKey};
use mesh_sys::udp::{Destination, SendBatch, Source};
use rand_core::{OsRng, RngCore as _};
use zeroize::Zeroizing;

use crate::handshake::{self, Claimed, INITIATION_LEN, Initiation, Macs, RESPONSE_LEN, Remote, Timestamp};
use crate::index::{IndexTable, Registration};
use crate::keys::LocalKeys;
use crate::peer::Peer;
use crate::session::{HEADER_LEN, OVERHEAD, REJECT_AFTER_MESSAGES, ReplayWindow, Session};

use timing::{
    INITIATION_INTERVAL, MAX_JITTER, REJECT_AFTER_TIME, REKEY_AFTER_MESSAGES, REKEY_AFTER_TIME,
    REKEY_ON_RECEIVE, REKEY_TIMEOUT,
};

/// Packets kept while a handshake is under way (the kernel's `MAX_STAGED_PACKETS`); the oldest go first.
const MAX_STAGED: usize = 128;

/// How a run of packets may be sent; see [`Tunnel::reserve`].
pub(crate) enum Reserved {
    /// With this session and that many counters, beginning with this one, to there.
    Ready { session: Arc<Session>, counter: u64, to: Destination },
    /// Not yet: each packet goes to [`Tunnel::stage`], which waits for a handshake.
    Stage,
    /// There is no endpoint or no private key.
    NoEndpoint,
    /// The batch has to be sent first; nothing was reserved.
    BatchFull,
}

/// A data message that was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Received {
    /// Its counter.
    pub(crate) counter: u64,
    /// Length of the message in bytes.
    pub(crate) length: usize,
    /// Whether there is a packet in it; a keepalive has none.
    pub(crate) data: bool,
    /// Whether it is the first with its counter: set by [`Tunnel::receive`].
    pub(crate) fresh: bool,
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

/// A handshake that we began.
struct Attempt {
    /// The newest initiation. As in the kernel, answers to older ones are ignored: the peer has forgotten what it
    /// would need to go on with them. Nothing when it could not be sent yet.
    sent: Option<(Initiation, Registration)>,
    sent_at: Instant,
    psk_generation: u32,
    started: Instant,
    retry_at: Instant,
}

/// A session in one of its roles.
struct Keypair {
    session: Arc<Session>,
    window: Box<ReplayWindow>,
    /// Its initiation was sent or answered.
    began: Instant,
    /// It has keys.
    established: Instant,
    /// It became the one to send with.
    live_since: Option<Instant>,
    initiated_here: bool,
    /// Which preshared key it was made with.
    psk_generation: u32,
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

    macs: Macs,
    attempt: Option<Attempt>,
    answered: Option<Keypair>,
    live: Option<Keypair>,
    previous: Option<Keypair>,
    /// Of the newest initiation sent; later ones have later ones.
    sent_timestamp: Timestamp,
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
            macs: Macs::new(&remote),
            attempt: None,
            answered: None,
            live: None,
            previous: None,
            sent_timestamp: Timestamp::default(),
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

    /// Reserves what it takes to send `count` data messages of `bytes` bytes altogether.
    pub(crate) fn reserve(
        &mut self,
        count: usize,
        bytes: usize,
        now: Instant,
        out: &mut SendBatch,
    ) -> Reserved {
        if self.local.is_none() {
            return Reserved::NoEndpoint;
        }
        let Some(to) = self.endpoint else { return Reserved::NoEndpoint };
        if !self.has_usable_session(now) {
            return Reserved::Stage;
        }
        if !self.staged.is_empty() && !self.flush_staged(now, out) {
            return Reserved::BatchFull;
        }
        let Some(live) = &self.live else { return Reserved::Stage };
        let session = Arc::clone(&live.session);
        let counter = session.reserve(count as u64);
        if live.wants_rekey_on_send(now) {
            self.initiate(now, out);
        }
        self.tx_bytes += bytes as u64;
        self.note_sent(true, now);
        Reserved::Ready { session, counter, to }
    }

    /// Keeps a packet, already padded, until there is a session, for which a handshake is begun if none is under way.
    pub(crate) fn stage(&mut self, packet: &[u8], now: Instant, out: &mut SendBatch) {
        if self.staged.len() >= MAX_STAGED {
            self.staged.pop_front();
        }
        self.staged.push_back(packet.to_vec());
        self.initiate(now, out);
    }

    /// Takes notice of messages that were opened with `session`, all from the same address, and marks those that
    /// were never received before.
    pub(crate) fn receive(
        &mut self,
        session: &Arc<Session>,
        from: &Destination,
        now: Instant,
        run: &mut [Received],
        out: &mut SendBatch,
    ) -> Result<(), Refused> {
        let is = |keypair: &&mut Keypair| Arc::ptr_eq(&keypair.session, session);
        let (mut confirms, mut by_previous) = (false, false);
        let keypair = if let Some(keypair) = self.live.as_mut().filter(is) {
            keypair
        } else if let Some(keypair) = self.previous.as_mut().filter(is) {
            by_previous = true;
            keypair
        } else if let Some(keypair) = self.answered.as_mut().filter(is) {
            confirms = true;
            keypair
        } else {
            return Err(Refused::UnknownIndex);
        };
        if now.duration_since(keypair.established) >= REJECT_AFTER_TIME {
            return Err(Refused::Expired);
        }
        let (mut any, mut data) = (false, false);
        for message in run {
            message.fresh = keypair.window.accept(message.counter);
            if message.fresh {
                any = true;
                data |= message.data;
                self.rx_bytes += message.length as u64;
            }
        }
        if !any {
            return Err(Refused::Replayed);
        }
        self.roam(from);
        if confirms && let Some(answered) = self.answered.take() {
            if answered.psk_generation == self.psk_generation {
                self.attempt = None;
                self.rekey_now = false;
            }
            self.promote(answered, now);
        }
        if by_previous {
            self.settle();
        }
        self.note_received(data, now);
        if self.live.as_ref().is_some_and(|live| live.wants_rekey_on_receive(now)) {
            self.initiate(now, out);
        }
        if !self.staged.is_empty() {
            self.flush_staged(now, out);
        }
        Ok(())
    }

    /// Answers a handshake initiation whose MACs have been checked.
    pub(crate) fn handle_initiation(
        &mut self,
        claimed: Claimed<'_>,
        from: &Destination,
        now: Instant,
        out: &mut SendBatch,
    ) -> Result<(), Refused> {
        let proven = claimed.prove(&*self.static_shared()?).map_err(|_| Refused::NotAuthentic)?;
        let timestamp = proven.timestamp;
        if timestamp <= self.newest_timestamp {
            return Err(Refused::Replayed);
        }
        if self.last_initiation.is_some_and(|last| now.duration_since(last) < INITIATION_INTERVAL) {
            return Err(Refused::Flood);
        }
        let space = out.space(RESPONSE_LEN).and_then(|space| space.first_chunk_mut::<RESPONSE_LEN>());
        let space = space.ok_or(Refused::BatchFull)?;
        let registration = self.indices.register(&self.owner);
        let keys = proven.respond(&self.psk, registration.index, space).map_err(|_| Refused::NotAuthentic)?;
        self.macs.stamp(space, now);
        let session = Session::new(&keys, registration).map_err(|_| Refused::NotAuthentic)?;
        out.commit(from, RESPONSE_LEN);
        self.answered = Some(Keypair::new(session, now, now, false, self.psk_generation));
        self.newest_timestamp = timestamp;
        self.last_initiation = Some(now);
        self.rx_bytes += INITIATION_LEN as u64;
        self.tx_bytes += RESPONSE_LEN as u64;
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
        let local = self.local.as_ref().ok_or(Refused::NoKey)?;
        let attempt = self.attempt.as_mut().ok_or(Refused::UnknownIndex)?;
        let (initiation, registration) = attempt
            .sent
            .take_if(|(_, registration)| Some(registration.index) == word(message, 8))
            .ok_or(Refused::UnknownIndex)?;
        // The confirming keepalive must have room, or the peer would wait for one.
        let answer = match out.has_space(OVERHEAD) {
            true => initiation.finish(local, &self.psk, message).map_err(|_| Refused::NotAuthentic),
            false => Err(Refused::BatchFull),
        };
        let keys = match answer {
            Ok(keys) => keys,
            Err(refused) => {
                attempt.sent = Some((initiation, registration));
                return Err(refused);
            }
        };
        let (began, psk_generation) = (attempt.sent_at, attempt.psk_generation);
        self.attempt = None;
        let session = Session::new(&keys, registration).map_err(|_| Refused::NotAuthentic)?;
        self.rx_bytes += RESPONSE_LEN as u64;
        self.rekey_now = false;
        self.roam(from);
        self.promote(Keypair::new(session, began, now, true, psk_generation), now);
        self.note_received(false, now);
        if self.staged.is_empty() {
            self.seal_live(&[], now, out);
        } else {
            self.flush_staged(now, out);
        }
        Ok(())
    }

    /// Takes a cookie for our initiation or answer; the next one will carry it.
    pub(crate) fn handle_cookie(&mut self, message: &[u8], now: Instant) -> Result<(), Refused> {
        self.macs.take_reply(message, now).map_err(|_| Refused::NotAuthentic)?;
        self.rx_bytes += message.len() as u64;
        Ok(())
    }

    fn has_usable_session(&self, now: Instant) -> bool {
        self.live.as_ref().is_some_and(|live| live.is_usable(now))
    }

    /// Encrypts with the live session, which the caller has found usable. False when the batch is full.
    fn seal_live(&mut self, packet: &[u8], now: Instant, out: &mut SendBatch) -> bool {
        let (Some(live), Some(to)) = (&self.live, &self.endpoint) else { return true };
        let length = packet.len() + OVERHEAD;
        let Some(space) = out.space(length) else { return false };
        space[HEADER_LEN..HEADER_LEN + packet.len()].copy_from_slice(packet);
        if live.session.seal(live.session.reserve(1), &mut space[..length]).is_ok() {
            out.commit(to, length);
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
        if self.attempt.is_some() || self.endpoint.is_none() || self.local.is_none() {
            return;
        }
        let psk_generation = self.psk_generation;
        self.attempt =
            Some(Attempt { sent: None, sent_at: now, psk_generation, started: now, retry_at: now });
        self.send_initiation(now, out);
    }

    /// Sends the (next) initiation of the handshake under way. When the batch is full it stays due.
    fn send_initiation(&mut self, now: Instant, out: &mut SendBatch) {
        let (Ok(static_shared), Some(local), Some(to)) =
            (self.static_shared(), self.local.clone(), self.endpoint)
        else {
            return;
        };
        let Some(attempt) = &mut self.attempt else { return };
        let Some(space) = out.space(INITIATION_LEN).and_then(|space| space.first_chunk_mut()) else { return };
        let jitter = Duration::from_millis(u64::from(OsRng.next_u32()) % (MAX_JITTER.as_millis() as u64 + 1));
        attempt.retry_at = now + REKEY_TIMEOUT + jitter;
        let registration = self.indices.register(&self.owner);
        let timestamp = Timestamp::after(self.sent_timestamp, SystemTime::now());
        let remote = Remote { public: &self.remote, static_shared: &static_shared };
        match handshake::initiate(&local, &remote, registration.index, timestamp, space) {
            Ok(initiation) => {
                self.macs.stamp(space, now);
                out.commit(&to, INITIATION_LEN);
                attempt.sent = Some((initiation, registration));
                attempt.sent_at = now;
                self.sent_timestamp = timestamp;
                self.tx_bytes += INITIATION_LEN as u64;
                self.last_traffic = Some(now);
                tracing::debug!(peer = %self.remote, endpoint = %to.address, "sent a handshake initiation");
            }
            Err(error) => {
                tracing::debug!(peer = %self.remote, %error, "the peer's key allows no handshake");
            }
        }
    }

    /// The key agreed between both long-term keys, computed when first needed.
    fn static_shared(&mut self) -> Result<Zeroizing<[u8; 32]>, Refused> {
        let local = self.local.as_ref().ok_or(Refused::NoKey)?;
        let shared = self.static_shared.get_or_insert_with(|| {
            let remote = x25519_dalek::PublicKey::from(*self.remote.as_bytes());
            Zeroizing::new(local.private.diffie_hellman(&remote).to_bytes())
        });
        // With a public key of low order anyone could take the peer's part.
        if **shared == [0; 32] {
            return Err(Refused::NotAuthentic);
        }
        Ok(shared.clone())
    }

    /// A handshake is complete on both sides.
    fn promote(&mut self, mut keypair: Keypair, now: Instant) {
        let initiated_here = keypair.initiated_here;
        keypair.live_since = Some(now);
        self.last_handshake = Some(SystemTime::now());
        if let Some(live) = self.live.replace(keypair) {
            self.previous = Some(live);
        }
        tracing::debug!(peer = %self.remote, initiated_here, "session established");
    }

    /// A data message came by the previous session. When both ends initiated at the same moment and both handshakes
    /// went through, they may have settled on different ones, each on the one in which it is not bound to rekey. The
    /// one initiated by the end with the smaller public key is kept. A handshake that began when the one before it was
    /// done had a reason (the peer lost its state, say), and so had one with another preshared key: a message that is
    /// merely late leads back to neither.
    fn settle(&mut self) {
        if let (Some(live), Some(previous), Some(local)) = (&mut self.live, &mut self.previous, &self.local)
            && live.initiated_here != previous.initiated_here
            && live.psk_generation == previous.psk_generation
            && previous.live_since.is_some_and(|done| live.began <= done)
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

impl Keypair {
    fn new(
        session: Arc<Session>,
        began: Instant,
        now: Instant,
        initiated_here: bool,
        psk_generation: u32,
    ) -> Self {
        let window = Box::new(ReplayWindow::new());
        Self { session, window, began, established: now, live_since: None, initiated_here, psk_generation }
    }

    fn is_usable(&self, now: Instant) -> bool {
        now.duration_since(self.established) < REJECT_AFTER_TIME
            && self.session.sent() < REJECT_AFTER_MESSAGES
    }

    fn wants_rekey_on_send(&self, now: Instant) -> bool {
        self.session.sent() >= REKEY_AFTER_MESSAGES
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
