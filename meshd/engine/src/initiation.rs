//! Opening a handshake initiation far enough to know who sent it, and when.
//!
//! boringtun can tell who sent an initiation, but keeps the time stamp inside of the one `Tunn` that answers. Here
//! `Tunn`s come and go with every handshake (see [`tunnel`](crate::tunnel)), so the newest time stamp, which stops
//! replays, is kept by the peer and has to be read first. This costs nothing extra: it is the same work that
//! boringtun's `parse_handshake_anon` would do, and one decryption more. WireGuard paper, section 5.4.2.

use blake2::{Blake2s256, Digest as _};
use hmac::{Mac as _, SimpleHmac};
use mesh_sys::uapi::PublicKey;
use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use zeroize::Zeroizing;

use crate::keys::LocalKeys;

/// Length of the message, in bytes.
pub(crate) const INITIATION_LEN: usize = 148;

const CONSTRUCTION: &[u8] = b"Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s";
const IDENTIFIER: &[u8] = b"WireGuard v1 zx2c4 Jason@zx2c4.com";

/// A TAI64N time stamp; later ones compare greater.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub(crate) struct Timestamp([u8; 12]);

/// The initiation is not for us or was tampered with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the handshake initiation is not authentic")]
pub(crate) struct NotAuthentic;

type Hash = Zeroizing<[u8; 32]>;

/// An initiation whose sender is known but not proven yet: anyone who knows a public key can name it here.
pub(crate) struct Claimed {
    pub(crate) sender: PublicKey,
    chaining_key: Hash,
    hash: Hash,
    timestamp: [u8; 28],
}

/// Reads the claim. The caller has checked length and MAC1.
pub(crate) fn claimed(keys: &LocalKeys, message: &[u8]) -> Result<Claimed, NotAuthentic> {
    let message: &[u8; INITIATION_LEN] = message.try_into().map_err(|_| NotAuthentic)?;
    let (ephemeral, sealed_static, sealed_timestamp) = (&message[8..40], &message[40..88], &message[88..116]);

    let chaining_key = hash(&[CONSTRUCTION]);
    let mut transcript = hash(&[&chaining_key[..], IDENTIFIER]);
    transcript = hash(&[&transcript[..], keys.public.as_bytes()]);
    transcript = hash(&[&transcript[..], ephemeral]);
    let chaining_key = hmac(&*hmac(&*chaining_key, &[ephemeral]), &[&[1]]);

    let mut point = [0; 32];
    point.copy_from_slice(ephemeral);
    let shared = keys.private.diffie_hellman(&point.into());
    if !shared.was_contributory() {
        return Err(NotAuthentic);
    }
    let (chaining_key, key) = derive(&chaining_key, shared.as_bytes());
    let mut sender = [0; 48];
    sender.copy_from_slice(sealed_static);
    open(&key, &mut sender, &*transcript)?;
    transcript = hash(&[&transcript[..], sealed_static]);

    let mut public = [0; 32];
    public.copy_from_slice(&sender[..32]);
    let mut timestamp = [0; 28];
    timestamp.copy_from_slice(sealed_timestamp);
    Ok(Claimed { sender: PublicKey(public), chaining_key, hash: transcript, timestamp })
}

impl Claimed {
    /// Proves the claim with the key agreed between our and the sender's long-term keys, and reads the time.
    pub(crate) fn prove(mut self, static_shared: &[u8; 32]) -> Result<Timestamp, NotAuthentic> {
        let (_, key) = derive(&self.chaining_key, static_shared);
        open(&key, &mut self.timestamp, &*self.hash)?;
        let mut timestamp = [0; 12];
        timestamp.copy_from_slice(&self.timestamp[..12]);
        Ok(Timestamp(timestamp))
    }
}

fn hash(parts: &[&[u8]]) -> Hash {
    let mut hasher = Blake2s256::new();
    for part in parts {
        hasher.update(part);
    }
    Zeroizing::new(hasher.finalize().into())
}

#[expect(clippy::unwrap_used, reason = "HMAC takes keys of every length")]
fn hmac(key: &[u8], parts: &[&[u8]]) -> Hash {
    let mut mac = SimpleHmac::<Blake2s256>::new_from_slice(key).unwrap();
    for part in parts {
        mac.update(part);
    }
    Zeroizing::new(mac.finalize().into_bytes().into())
}

/// `KDF2` of the paper.
fn derive(chaining_key: &Hash, input: &[u8]) -> (Hash, Hash) {
    let secret = hmac(&chaining_key[..], &[input]);
    let first = hmac(&secret[..], &[&[1]]);
    let second = hmac(&secret[..], &[&first[..], &[2]]);
    (first, second)
}

/// Opens in place with counter zero.
fn open(key: &Hash, sealed: &mut [u8], aad: &[u8]) -> Result<(), NotAuthentic> {
    let key = UnboundKey::new(&CHACHA20_POLY1305, &key[..]).map_err(|_| NotAuthentic)?;
    let nonce = Nonce::assume_unique_for_key([0; 12]);
    LessSafeKey::new(key).open_in_place(nonce, Aad::from(aad), sealed).map_err(|_| NotAuthentic)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use boringtun::noise::{Tunn, TunnResult};
    use mesh_sys::uapi::SecretKey;

    use super::*;

    fn keys(byte: u8) -> LocalKeys {
        LocalKeys::new(&SecretKey::new(&[byte; 32])).unwrap()
    }

    fn initiation(from: &LocalKeys, to: &LocalKeys) -> Vec<u8> {
        let to = x25519_dalek::PublicKey::from(*to.public.as_bytes());
        let mut tunn = Tunn::new(from.private.clone(), to, None, None, 1, None);
        let mut buffer = [0; INITIATION_LEN];
        let result = tunn.format_handshake_initiation(&mut buffer, false);
        let TunnResult::WriteToNetwork(message) = result else { panic!("{result:?}") };
        message.to_vec()
    }

    fn shared(a: &LocalKeys, b: &LocalKeys) -> [u8; 32] {
        a.private.diffie_hellman(&(*b.public.as_bytes()).into()).to_bytes()
    }

    #[test]
    fn what_boringtun_sends_is_understood_and_times_rise() {
        let (alice, bob) = (keys(1), keys(2));
        let mut last = Timestamp::default();
        for _ in 0..3 {
            let claimed = claimed(&bob, &initiation(&alice, &bob)).unwrap();
            assert_eq!(claimed.sender, alice.public);
            let timestamp = claimed.prove(&shared(&alice, &bob)).unwrap();
            assert!(timestamp > last);
            last = timestamp;
        }
    }

    #[test]
    fn a_false_claim_is_found_out() {
        let (alice, bob, mallory) = (keys(1), keys(2), keys(3));
        let message = initiation(&alice, &bob);
        let found = claimed(&bob, &message).unwrap().prove(&shared(&mallory, &bob));
        assert_eq!(found, Err(NotAuthentic));
        assert!(claimed(&mallory, &message).is_err(), "not addressed to mallory");
        for at in [8, 39, 40, 87, 88, 115] {
            let mut damaged = message.clone();
            damaged[at] ^= 1;
            let found = claimed(&bob, &damaged).and_then(|claimed| claimed.prove(&shared(&alice, &bob)));
            assert_eq!(found, Err(NotAuthentic), "byte {at}");
        }
        assert!(claimed(&bob, &message[1..]).is_err());
        let mut low_order = message;
        low_order[8..40].fill(0);
        assert!(claimed(&bob, &low_order).is_err());
    }
}
