//! WireGuard's handshake messages (WireGuard paper, sections 5.4.2 to 5.4.7): the Noise messages with indices, time
//! stamp, MACs and cookies around them.

use std::time::{Duration, Instant, SystemTime};

use blake2::Blake2sMac;
use blake2::digest::consts::U16;
use blake2::digest::{KeyInit as _, Mac};
use chacha20poly1305::aead::AeadInPlace as _;
use chacha20poly1305::{Tag, XChaCha20Poly1305, XNonce};
use mesh_sys::uapi::{PublicKey, SecretKey};
use rand_core::OsRng;
use x25519_dalek::StaticSecret;
use zeroize::Zeroizing;

use crate::keys::LocalKeys;
use crate::noise::{self, FirstSent, Key, NotAuthentic, StaticKeys};

/// Length of an initiation, in bytes.
pub(crate) const INITIATION_LEN: usize = 148;
/// Length of the answer to one, in bytes.
pub(crate) const RESPONSE_LEN: usize = 92;
/// Length of a cookie reply, in bytes.
pub(crate) const COOKIE_LEN: usize = 64;

/// The first four bytes of each kind of message, little-endian.
pub(crate) const INITIATION: u32 = 1;
pub(crate) const RESPONSE: u32 = 2;
pub(crate) const COOKIE: u32 = 3;
pub(crate) const DATA: u32 = 4;

const _: () = assert!(
    INITIATION_LEN == 8 + noise::FIRST_OVERHEAD + Timestamp::LEN + 2 * MAC_LEN
        && RESPONSE_LEN == 12 + noise::SECOND_OVERHEAD + 2 * MAC_LEN
);

const IDENTIFIER: &[u8] = b"WireGuard v1 zx2c4 Jason@zx2c4.com";
const MAC_LEN: usize = 16;
/// A cookie is good for this long after its arrival (two minutes at its sender, less five seconds on the way).
const COOKIE_LIFETIME: Duration = Duration::from_secs(115);

/// A TAI64N time stamp; later ones compare greater.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub(crate) struct Timestamp([u8; Self::LEN]);

impl Timestamp {
    const LEN: usize = 12;
    /// Seconds of TAI64 at the Unix epoch.
    const EPOCH: u64 = (1 << 62) + 10;
    /// Times are told in steps of this many nanoseconds, as the kernel does, so that a handshake does not tell the
    /// exact time of its host.
    const STEP: u32 = 1 << 24;

    /// The present time, or the step after `last` when the clock has not come so far.
    pub(crate) fn after(last: Self, now: SystemTime) -> Self {
        let since_epoch = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let step = since_epoch.subsec_nanos() / Self::STEP * Self::STEP;
        let now = Self::new(Self::EPOCH + since_epoch.as_secs(), step);
        if now > last { now } else { last.next() }
    }

    fn new(seconds: u64, nanoseconds: u32) -> Self {
        let mut bytes = [0; Self::LEN];
        bytes[..8].copy_from_slice(&seconds.to_be_bytes());
        bytes[8..].copy_from_slice(&nanoseconds.to_be_bytes());
        Self(bytes)
    }

    fn next(self) -> Self {
        let mut number = [0; 16];
        number[4..].copy_from_slice(&self.0);
        let number = u128::from_be_bytes(number);
        let (seconds, nanoseconds) = ((number >> 32) as u64, number as u32 / Self::STEP * Self::STEP);
        match nanoseconds + Self::STEP {
            later if later < 1_000_000_000 => Self::new(seconds, later),
            _ => Self::new(seconds + 1, 0),
        }
    }
}

/// What both ends of a handshake that worked out have.
pub(crate) struct TransportKeys {
    /// The other end's index: goes into what is sent.
    pub(crate) remote_index: u32,
    pub(crate) sending: Key,
    pub(crate) receiving: Key,
}

/// An initiation that was sent and may be answered.
pub(crate) struct Initiation(FirstSent);

/// What is known of the other end of handshakes.
pub(crate) struct Remote<'a> {
    pub(crate) public: &'a PublicKey,
    /// Agreed between both long-term keys.
    pub(crate) static_shared: &'a [u8; 32],
}

/// Writes an initiation without MACs; [`Macs::stamp`] adds them.
pub(crate) fn initiate(
    local: &LocalKeys,
    remote: &Remote<'_>,
    index: u32,
    timestamp: Timestamp,
    out: &mut [u8; INITIATION_LEN],
) -> Result<Initiation, NotAuthentic> {
    let (message, _macs) = out.split_at_mut(INITIATION_LEN - 2 * MAC_LEN);
    let (header, body) = message.split_at_mut(8);
    header[..4].copy_from_slice(&INITIATION.to_le_bytes());
    header[4..].copy_from_slice(&index.to_le_bytes());
    let own = own(local);
    let ephemeral = StaticSecret::random_from_rng(OsRng);
    let public = (*remote.public.as_bytes()).into();
    noise::write_first(IDENTIFIER, &own, &public, remote.static_shared, ephemeral, &timestamp.0, body)
        .map(Initiation)
}

impl Initiation {
    /// Reads the answer. The caller has checked its length, its MAC1 and that its receiver index is that of this
    /// initiation. A forged answer changes nothing.
    pub(crate) fn finish(
        &self,
        local: &LocalKeys,
        psk: &SecretKey,
        message: &[u8],
    ) -> Result<TransportKeys, NotAuthentic> {
        let mut message: [u8; RESPONSE_LEN] = message.try_into().map_err(|_| NotAuthentic)?;
        let remote_index = u32::from_le_bytes([message[4], message[5], message[6], message[7]]);
        let body = &mut message[12..RESPONSE_LEN - 2 * MAC_LEN];
        let (split, _empty) = self.0.read_second(&local.private, psk.expose(), body)?;
        Ok(TransportKeys { remote_index, sending: split.initiator, receiving: split.responder })
    }
}

/// An initiation whose sender is known but not proven yet: anyone who knows a public key can name it here.
pub(crate) struct Claimed<'a> {
    pub(crate) sender: PublicKey,
    remote_index: u32,
    noise: noise::Claimed<'a>,
}

/// An initiation that is proven to come from its sender.
pub(crate) struct Proven<'a> {
    pub(crate) timestamp: Timestamp,
    remote_index: u32,
    noise: noise::Proven<'a>,
}

/// Reads who sent an initiation, overwriting it. The caller has checked its MAC1.
pub(crate) fn read_initiation<'a>(
    local: &LocalKeys,
    message: &'a mut [u8; INITIATION_LEN],
) -> Result<Claimed<'a>, NotAuthentic> {
    let remote_index = u32::from_le_bytes([message[4], message[5], message[6], message[7]]);
    let body = &mut message[8..INITIATION_LEN - 2 * MAC_LEN];
    let noise = noise::read_first(IDENTIFIER, &own(local), body)?;
    Ok(Claimed { sender: PublicKey(noise.sender.to_bytes()), remote_index, noise })
}

impl<'a> Claimed<'a> {
    /// Proves the claim with the key agreed between both long-term keys, and reads the time.
    pub(crate) fn prove(self, static_shared: &[u8; 32]) -> Result<Proven<'a>, NotAuthentic> {
        let noise = self.noise.prove(static_shared)?;
        let timestamp = Timestamp(noise.payload.try_into().map_err(|_| NotAuthentic)?);
        Ok(Proven { timestamp, remote_index: self.remote_index, noise })
    }
}

impl Proven<'_> {
    /// Writes the answer without MACs; [`Macs::stamp`] adds them.
    pub(crate) fn respond(
        self,
        psk: &SecretKey,
        index: u32,
        out: &mut [u8; RESPONSE_LEN],
    ) -> Result<TransportKeys, NotAuthentic> {
        let (message, _macs) = out.split_at_mut(RESPONSE_LEN - 2 * MAC_LEN);
        let (header, body) = message.split_at_mut(12);
        header[..4].copy_from_slice(&RESPONSE.to_le_bytes());
        header[4..8].copy_from_slice(&index.to_le_bytes());
        header[8..].copy_from_slice(&self.remote_index.to_le_bytes());
        let ephemeral = StaticSecret::random_from_rng(OsRng);
        let split = self.noise.write_second(&ephemeral, psk.expose(), &[], body)?;
        Ok(TransportKeys {
            remote_index: self.remote_index,
            sending: split.responder,
            receiving: split.initiator,
        })
    }
}

fn own(local: &LocalKeys) -> StaticKeys<'_> {
    StaticKeys { private: &local.private, public: &local.dh_public }
}

/// MACs for handshake messages to one peer, and the cookie it has sent.
pub(crate) struct Macs {
    mac1_key: Key,
    cookie_key: Key,
    cookie: Option<(Zeroizing<[u8; MAC_LEN]>, Instant)>,
    /// MAC1 of the newest message: a cookie reply proves that its sender has seen it.
    last: Option<[u8; MAC_LEN]>,
}

impl Macs {
    pub(crate) fn new(remote: &PublicKey) -> Self {
        Self {
            mac1_key: noise::hash(&[b"mac1----", remote.as_bytes()]),
            cookie_key: noise::hash(&[b"cookie--", remote.as_bytes()]),
            cookie: None,
            last: None,
        }
    }

    /// Writes both MACs at the end of `message`; the second is zero without a fresh cookie.
    pub(crate) fn stamp(&mut self, message: &mut [u8], now: Instant) {
        let at = message.len() - 2 * MAC_LEN;
        let mac1 = mac(&self.mac1_key[..], &message[..at]);
        message[at..at + MAC_LEN].copy_from_slice(&mac1);
        self.last = Some(mac1);
        self.cookie.take_if(|(_, since)| now.duration_since(*since) >= COOKIE_LIFETIME);
        let (before, mac2) = message.split_at_mut(at + MAC_LEN);
        match &self.cookie {
            Some((cookie, _)) => mac2.copy_from_slice(&mac(&cookie[..], before)),
            None => mac2.fill(0),
        }
    }

    /// Takes a cookie reply, which is valid once for the newest message.
    pub(crate) fn take_reply(&mut self, message: &[u8], now: Instant) -> Result<(), NotAuthentic> {
        let message: &[u8; COOKIE_LEN] = message.try_into().map_err(|_| NotAuthentic)?;
        let last = self.last.ok_or(NotAuthentic)?;
        let (nonce, sealed) = message[8..].split_at(24);
        let (cookie, tag) = sealed.split_at(MAC_LEN);
        let mut opened = Zeroizing::new([0; MAC_LEN]);
        opened.copy_from_slice(cookie);
        XChaCha20Poly1305::new((&*self.cookie_key).into())
            .decrypt_in_place_detached(
                XNonce::from_slice(nonce),
                &last,
                &mut opened[..],
                Tag::from_slice(tag),
            )
            .map_err(|_| NotAuthentic)?;
        self.cookie = Some((opened, now));
        self.last = None;
        Ok(())
    }
}

/// Keyed BLAKE2s with an output of 16 bytes (RFC 7693).
#[expect(clippy::unwrap_used, reason = "every key here is 16 or 32 bytes long, BLAKE2s takes up to 32")]
fn mac(key: &[u8], message: &[u8]) -> [u8; MAC_LEN] {
    let mut mac = <Blake2sMac<U16> as Mac>::new_from_slice(key).unwrap();
    mac.update(message);
    mac.finalize().into_bytes().into()
}

#[cfg(test)]
mod tests {
    use boringtun::noise::rate_limiter::RateLimiter;
    use boringtun::noise::{Tunn, TunnResult};

    use super::*;

    fn keys(byte: u8) -> LocalKeys {
        LocalKeys::new(&SecretKey::new(&[byte; 32])).unwrap()
    }

    fn shared(a: &LocalKeys, b: &LocalKeys) -> [u8; 32] {
        a.private.diffie_hellman(&b.dh_public).to_bytes()
    }

    /// The oracle: boringtun's tunnel from `local` to `remote`.
    fn boringtun(local: &LocalKeys, remote: &LocalKeys, psk: [u8; 32]) -> Tunn {
        Tunn::new(local.private.clone(), remote.dh_public, Some(psk), None, 7, None)
    }

    fn message(result: TunnResult<'_>) -> Vec<u8> {
        let TunnResult::WriteToNetwork(message) = result else { panic!("{result:?}") };
        message.to_vec()
    }

    fn initiation(from: &LocalKeys, to: &LocalKeys) -> [u8; INITIATION_LEN] {
        let mut tunn = boringtun(from, to, [0; 32]);
        message(tunn.format_handshake_initiation(&mut [0; INITIATION_LEN], false)).try_into().unwrap()
    }

    #[test]
    fn boringtun_answers_our_initiation_and_both_have_the_same_keys() {
        let (alice, bob, psk) = (keys(1), keys(2), SecretKey::new(&[9; 32]));
        let mut theirs = boringtun(&bob, &alice, [9; 32]);
        let mut macs = Macs::new(&bob.public);
        let mut first = [0; INITIATION_LEN];
        let remote = Remote { public: &bob.public, static_shared: &shared(&alice, &bob) };
        let now = Timestamp::after(Timestamp::default(), SystemTime::now());
        let initiation = initiate(&alice, &remote, 0x1234_5678, now, &mut first).unwrap();
        macs.stamp(&mut first, Instant::now());
        let second = message(theirs.decapsulate(None, &first, &mut [0; 256]));
        assert_eq!(second[8..12], 0x1234_5678u32.to_le_bytes());
        let keys = initiation.finish(&alice, &psk, &second).unwrap();

        // boringtun takes what is sealed with our keys, and we open what it seals.
        let indices = std::sync::Arc::new(crate::index::IndexTable::default());
        let registration = indices.register(&std::sync::Weak::new());
        let session = crate::session::Session::new(&keys, registration).unwrap();
        let mut packet = [0; 20];
        (packet[0], packet[3]) = (0x45, 20);
        let mut sealed = [0; 20 + crate::session::OVERHEAD];
        sealed[16..36].copy_from_slice(&packet);
        session.seal(0, &mut sealed).unwrap();
        let mut space = [0; 256];
        let TunnResult::WriteToTunnelV4(opened, _) = theirs.decapsulate(None, &sealed, &mut space) else {
            panic!("not taken")
        };
        assert_eq!(opened, packet);
        let mut sealed = message(theirs.encapsulate(&packet, &mut space));
        let (counter, length) = session.open(&mut sealed).unwrap();
        assert_eq!((counter, &sealed[16..16 + length]), (0, &packet[..]));
        sealed[20] ^= 1;
        assert!(session.open(&mut sealed).is_err());

        // Another preshared key, a changed bit: refused, and the right answer is still taken.
        assert!(initiation.finish(&alice, &SecretKey::ZERO, &second).is_err());
        for at in [12, 43, 44, 59] {
            let mut damaged = second.clone();
            damaged[at] ^= 1;
            assert!(initiation.finish(&alice, &psk, &damaged).is_err(), "byte {at}");
        }
        assert!(initiation.finish(&alice, &psk, &second).is_ok());
    }

    #[test]
    fn boringtun_takes_our_answer() {
        let (alice, bob) = (keys(1), keys(2));
        let mut theirs = boringtun(&alice, &bob, [5; 32]);
        let mut first: [u8; INITIATION_LEN] =
            message(theirs.format_handshake_initiation(&mut [0; INITIATION_LEN], false)).try_into().unwrap();
        let proven = read_initiation(&bob, &mut first).unwrap().prove(&shared(&alice, &bob)).unwrap();
        let mut second = [0; RESPONSE_LEN];
        proven.respond(&SecretKey::new(&[5; 32]), 99, &mut second).unwrap();
        Macs::new(&alice.public).stamp(&mut second, Instant::now());
        let keepalive = message(theirs.decapsulate(None, &second, &mut [0; 256]));
        assert_eq!((keepalive.len(), &keepalive[4..8]), (32, &99u32.to_le_bytes()[..]));
    }

    #[test]
    fn senders_are_known_and_their_times_rise() {
        let (alice, bob) = (keys(1), keys(2));
        let mut last = Timestamp::default();
        for _ in 0..3 {
            let mut message = initiation(&alice, &bob);
            let claimed = read_initiation(&bob, &mut message).unwrap();
            assert_eq!(claimed.sender, alice.public);
            let timestamp = claimed.prove(&shared(&alice, &bob)).unwrap().timestamp;
            assert!(timestamp > last);
            last = timestamp;
        }
    }

    #[test]
    fn a_false_claim_is_found_out() {
        let (alice, bob, mallory) = (keys(1), keys(2), keys(3));
        let message = initiation(&alice, &bob);
        let prove = |mut message: [u8; INITIATION_LEN], to: &LocalKeys, shared: [u8; 32]| {
            read_initiation(to, &mut message).and_then(|claimed| claimed.prove(&shared).map(|_| ()))
        };
        assert_eq!(prove(message, &bob, shared(&alice, &bob)), Ok(()));
        assert_eq!(prove(message, &bob, shared(&mallory, &bob)), Err(NotAuthentic));
        assert_eq!(
            prove(message, &mallory, shared(&alice, &mallory)),
            Err(NotAuthentic),
            "not addressed to mallory"
        );
        for at in [8, 39, 40, 87, 88, 115] {
            let mut damaged = message;
            damaged[at] ^= 1;
            assert_eq!(prove(damaged, &bob, shared(&alice, &bob)), Err(NotAuthentic), "byte {at}");
        }
        let mut low_order = message;
        low_order[8..40].fill(0);
        assert_eq!(prove(low_order, &bob, shared(&alice, &bob)), Err(NotAuthentic));
    }

    #[test]
    fn a_cookie_counts_once_for_two_minutes_and_only_for_the_newest_message() {
        let (alice, bob) = (keys(1), keys(2));
        let limiter = RateLimiter::new(&bob.dh_public, 0);
        let from = Some(std::net::IpAddr::from([192, 0, 2, 1]));
        let (mut macs, now) = (Macs::new(&bob.public), Instant::now());
        let stamped = |macs: &mut Macs, now| {
            let mut message = [1; INITIATION_LEN];
            message[..4].copy_from_slice(&INITIATION.to_le_bytes());
            macs.stamp(&mut message, now);
            message
        };
        let ask = |message: &[u8]| {
            let mut space = [0; COOKIE_LEN];
            match limiter.verify_packet(from, message, &mut space) {
                Ok(_) => None,
                Err(TunnResult::WriteToNetwork(cookie)) => Some(cookie.to_vec()),
                Err(other) => panic!("{other:?}"),
            }
        };
        let cookie = ask(&stamped(&mut macs, now)).expect("under load");
        let mut forged = cookie.clone();
        forged[40] ^= 1;
        assert_eq!(macs.take_reply(&forged, now), Err(NotAuthentic));
        assert_eq!(Macs::new(&alice.public).take_reply(&cookie, now), Err(NotAuthentic), "never asked");
        assert_eq!(macs.take_reply(&cookie, now), Ok(()));
        assert_eq!(macs.take_reply(&cookie, now), Err(NotAuthentic), "once");
        assert_eq!(ask(&stamped(&mut macs, now)), None, "the address is proven");
        assert!(ask(&stamped(&mut macs, now + COOKIE_LIFETIME)).is_some(), "not with an old one");
    }

    #[test]
    fn times_rise_even_when_the_clock_does_not() {
        let at = |seconds, nanos| SystemTime::UNIX_EPOCH + Duration::new(seconds, nanos);
        let first = Timestamp::after(Timestamp::default(), at(1000, 999_999_999));
        assert_eq!(first.0[..8], (Timestamp::EPOCH + 1000).to_be_bytes());
        assert_eq!(u32::from_be_bytes(first.0[8..].try_into().unwrap()) % Timestamp::STEP, 0);
        let second = Timestamp::after(first, at(1000, 999_999_999));
        assert_eq!((second > first, &second.0[8..]), (true, &[0; 4][..]), "into the next second");
        let third = Timestamp::after(second, at(3, 0));
        assert!(third > second && Timestamp::after(third, at(2000, 0)) > third);
        assert_eq!(Timestamp::after(third, at(2000, 5)), Timestamp::after(Timestamp::default(), at(2000, 7)));
    }
}
