//! The handshake pattern of WireGuard: `Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s` (Noise Protocol Framework, revision 34).
//!
//! Only this one pattern, in the two messages it has. What WireGuard puts around it (indices, MACs, the time stamp as
//! first payload) is in [`handshake`](crate::handshake). Keys and ephemeral secrets come in as arguments, so that the
//! published test vectors run through the same functions as the traffic.

use blake2::{Blake2s256, Digest as _};
use hmac::{Mac as _, SimpleHmac};
use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use x25519_dalek::{PublicKey, StaticSecret};
use zeroize::Zeroizing;

const PROTOCOL_NAME: &[u8] = b"Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s";

/// Length of a key, a public key and a hash, in bytes.
pub(crate) const KEY_LEN: usize = 32;
/// Length of what the AEAD adds, in bytes.
pub(crate) const TAG_LEN: usize = 16;
/// Length of the first message around its payload: ephemeral key, sealed static key, tag of the payload.
pub(crate) const FIRST_OVERHEAD: usize = KEY_LEN + KEY_LEN + TAG_LEN + TAG_LEN;
/// Length of the second message around its payload: ephemeral key, tag of the payload.
pub(crate) const SECOND_OVERHEAD: usize = KEY_LEN + TAG_LEN;

/// A secret that is wiped.
pub(crate) type Key = Zeroizing<[u8; KEY_LEN]>;

/// The message is not for us, was tampered with, or one of the keys is of low order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the handshake message is not authentic")]
pub(crate) struct NotAuthentic;

/// Transport keys: what the initiator sends with, what the responder sends with (section 5.2, `Split`).
pub(crate) struct Split {
    pub(crate) initiator: Key,
    pub(crate) responder: Key,
}

/// `SymmetricState` of section 5.2. Every AEAD key of this pattern is used once, with nonce zero.
#[derive(Clone)]
struct State {
    chaining_key: Key,
    hash: Key,
}

impl State {
    fn new(prologue: &[u8], responder: &PublicKey) -> Self {
        let name = hash(&[PROTOCOL_NAME]);
        let mut state = Self { chaining_key: name.clone(), hash: name };
        state.mix_hash(prologue);
        state.mix_hash(responder.as_bytes());
        state
    }

    fn mix_hash(&mut self, data: &[u8]) {
        self.hash = hash(&[&self.hash[..], data]);
    }

    /// `MixKey`.
    fn mix_key(&mut self, input: &[u8]) -> Key {
        let [chaining_key, key] = hkdf(&self.chaining_key, input);
        self.chaining_key = chaining_key;
        key
    }

    /// `MixKey` with the outcome of a key exchange. A point of low order is refused, as in the kernel.
    fn mix_exchange(&mut self, secret: &StaticSecret, public: &PublicKey) -> Result<Key, NotAuthentic> {
        let shared = secret.diffie_hellman(public);
        if shared.was_contributory() { Ok(self.mix_key(shared.as_bytes())) } else { Err(NotAuthentic) }
    }

    /// `MixKeyAndHash`.
    fn mix_psk(&mut self, psk: &[u8; KEY_LEN]) -> Key {
        let [chaining_key, mixed, key] = hkdf(&self.chaining_key, psk);
        self.chaining_key = chaining_key;
        self.mix_hash(&mixed[..]);
        key
    }

    /// `EncryptAndHash` into `out`, which is [`TAG_LEN`] longer.
    fn seal(&mut self, key: &Key, plaintext: &[u8], out: &mut [u8]) -> Result<(), NotAuthentic> {
        let (sealed, tag) = out.split_at_mut(plaintext.len());
        sealed.copy_from_slice(plaintext);
        let made = aead(key)?.seal_in_place_separate_tag(zero(), Aad::from(&self.hash[..]), sealed);
        tag.copy_from_slice(made.map_err(|_| NotAuthentic)?.as_ref());
        self.mix_hash(out);
        Ok(())
    }

    /// `DecryptAndHash`, in place; `sealed` is mixed in as it came. Returns the plaintext.
    fn open<'a>(&mut self, key: &Key, sealed: &'a mut [u8]) -> Result<&'a mut [u8], NotAuthentic> {
        let before = self.hash.clone();
        self.mix_hash(sealed);
        let aad = Aad::from(&before[..]);
        aead(key)?.open_in_place(zero(), aad, sealed).map_err(|_| NotAuthentic)
    }

    fn split(self) -> Split {
        let [initiator, responder] = hkdf(&self.chaining_key, &[]);
        Split { initiator, responder }
    }
}

/// The initiator after its message.
pub(crate) struct FirstSent {
    state: State,
    ephemeral: StaticSecret,
}

/// The long-term keys of one end.
pub(crate) struct StaticKeys<'a> {
    pub(crate) private: &'a StaticSecret,
    pub(crate) public: &'a PublicKey,
}

/// Writes `e, es, s, ss` and the payload into `out`, which is [`FIRST_OVERHEAD`] longer than the payload.
/// `static_shared` is what the long-term keys of both ends agree on.
pub(crate) fn write_first(
    prologue: &[u8],
    own: &StaticKeys<'_>,
    remote: &PublicKey,
    static_shared: &[u8; KEY_LEN],
    ephemeral: StaticSecret,
    payload: &[u8],
    out: &mut [u8],
) -> Result<FirstSent, NotAuthentic> {
    let mut state = State::new(prologue, remote);
    let (head, sealed_payload) = out.split_at_mut(2 * KEY_LEN + TAG_LEN);
    let (e, sealed_static) = head.split_at_mut(KEY_LEN);
    e.copy_from_slice(PublicKey::from(&ephemeral).as_bytes());
    state.mix_hash(e);
    // In patterns with a preshared key, ephemeral keys are mixed in as keys, too (section 9.2).
    state.mix_key(e);
    let key = state.mix_exchange(&ephemeral, remote)?;
    state.seal(&key, own.public.as_bytes(), sealed_static)?;
    let key = state.mix_key(static_shared);
    state.seal(&key, payload, sealed_payload)?;
    Ok(FirstSent { state, ephemeral })
}

/// A first message whose sender is known but not proven yet: anyone can name a public key here.
pub(crate) struct Claimed<'a> {
    state: State,
    ephemeral: PublicKey,
    pub(crate) sender: PublicKey,
    sealed_payload: &'a mut [u8],
}

/// Reads `e, es, s`. The message is overwritten.
pub(crate) fn read_first<'a>(
    prologue: &[u8],
    own: &StaticKeys<'_>,
    message: &'a mut [u8],
) -> Result<Claimed<'a>, NotAuthentic> {
    let (e, rest) = message.split_first_chunk::<KEY_LEN>().ok_or(NotAuthentic)?;
    let ephemeral = PublicKey::from(*e);
    debug_assert!(rest.len() + KEY_LEN >= FIRST_OVERHEAD, "the caller has checked the length");
    let (sealed_static, sealed_payload) =
        message.split_at_mut_checked(2 * KEY_LEN + TAG_LEN).ok_or(NotAuthentic)?;
    let mut state = State::new(prologue, own.public);
    state.mix_hash(ephemeral.as_bytes());
    state.mix_key(ephemeral.as_bytes());
    let key = state.mix_exchange(own.private, &ephemeral)?;
    let sender = state.open(&key, &mut sealed_static[KEY_LEN..])?;
    let sender: [u8; KEY_LEN] = (&*sender).try_into().map_err(|_| NotAuthentic)?;
    Ok(Claimed { state, ephemeral, sender: sender.into(), sealed_payload })
}

/// The responder after a first message that is proven to come from its sender.
pub(crate) struct Proven<'a> {
    state: State,
    ephemeral: PublicKey,
    sender: PublicKey,
    pub(crate) payload: &'a [u8],
}

impl<'a> Claimed<'a> {
    /// Reads `ss` and the payload.
    pub(crate) fn prove(mut self, static_shared: &[u8; KEY_LEN]) -> Result<Proven<'a>, NotAuthentic> {
        let key = self.state.mix_key(static_shared);
        let payload = self.state.open(&key, self.sealed_payload)?;
        Ok(Proven { state: self.state, ephemeral: self.ephemeral, sender: self.sender, payload })
    }
}

impl Proven<'_> {
    /// Writes `e, ee, se, psk` and the payload into `out`, which is [`SECOND_OVERHEAD`] longer than the payload.
    pub(crate) fn write_second(
        mut self,
        ephemeral: &StaticSecret,
        psk: &[u8; KEY_LEN],
        payload: &[u8],
        out: &mut [u8],
    ) -> Result<Split, NotAuthentic> {
        let (e, sealed_payload) = out.split_at_mut(KEY_LEN);
        e.copy_from_slice(PublicKey::from(ephemeral).as_bytes());
        self.state.mix_hash(e);
        self.state.mix_key(e);
        self.state.mix_exchange(ephemeral, &self.ephemeral)?;
        self.state.mix_exchange(ephemeral, &self.sender)?;
        let key = self.state.mix_psk(psk);
        self.state.seal(&key, payload, sealed_payload)?;
        Ok(self.state.split())
    }
}

impl FirstSent {
    /// Reads the answer, overwriting it; returns the keys and the payload. A forged answer changes nothing.
    pub(crate) fn read_second<'a>(
        &self,
        own: &StaticSecret,
        psk: &[u8; KEY_LEN],
        message: &'a mut [u8],
    ) -> Result<(Split, &'a [u8]), NotAuthentic> {
        let (e, sealed_payload) = message.split_first_chunk_mut::<KEY_LEN>().ok_or(NotAuthentic)?;
        let ephemeral = PublicKey::from(*e);
        let mut state = self.state.clone();
        state.mix_hash(e);
        state.mix_key(e);
        state.mix_exchange(&self.ephemeral, &ephemeral)?;
        state.mix_exchange(own, &ephemeral)?;
        let key = state.mix_psk(psk);
        let payload = state.open(&key, sealed_payload)?;
        Ok((state.split(), payload))
    }
}

fn aead(key: &Key) -> Result<LessSafeKey, NotAuthentic> {
    Ok(LessSafeKey::new(UnboundKey::new(&CHACHA20_POLY1305, &key[..]).map_err(|_| NotAuthentic)?))
}

fn zero() -> Nonce {
    Nonce::assume_unique_for_key([0; 12])
}

/// BLAKE2s with an output of 32 bytes (RFC 7693).
pub(crate) fn hash(parts: &[&[u8]]) -> Key {
    let mut hasher = Blake2s256::new();
    for part in parts {
        hasher.update(part);
    }
    Zeroizing::new(hasher.finalize().into())
}

#[expect(clippy::unwrap_used, reason = "HMAC takes keys of every length")]
fn hmac(key: &[u8], parts: &[&[u8]]) -> Key {
    let mut mac = SimpleHmac::<Blake2s256>::new_from_slice(key).unwrap();
    for part in parts {
        mac.update(part);
    }
    Zeroizing::new(mac.finalize().into_bytes().into())
}

/// `HKDF` of section 4.3 with `N` outputs.
fn hkdf<const N: usize>(chaining_key: &Key, input: &[u8]) -> [Key; N] {
    let secret = hmac(&chaining_key[..], &[input]);
    let mut last: Option<Key> = None;
    std::array::from_fn(|index| {
        let previous = last.as_ref().map_or(&[][..], |key| &key[..]);
        let output = hmac(&secret[..], &[previous, &[index as u8 + 1]]);
        last = Some(output.clone());
        output
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// From the test vectors of the cacophony implementation, which the Noise community shares.
    mod vector {
        pub(super) const PROLOGUE: &str = "4a6f686e2047616c74";
        pub(super) const PSK: &str = "54686973206973206d7920417573747269616e20706572737065637469766521";
        pub(super) const INITIATOR: &str = "e61ef9919cde45dd5f82166404bd08e38bceb5dfdfded0a34c8df7ed542214d1";
        pub(super) const INITIATOR_EPHEMERAL: &str =
            "893e28b9dc6ca8d611ab664754b8ceb7bac5117349a4439a6b0569da977c464a";
        pub(super) const RESPONDER: &str = "4a3acbfdb163dec651dfa3194dece676d437029c62a408b4c5ea9114246e4893";
        pub(super) const RESPONDER_EPHEMERAL: &str =
            "bbdb4cdbd309f1a1f2e1456967fe288cadd6f712d65dc7b7793d5e63da6b375b";
        /// Payload and message.
        pub(super) const FIRST: [&str; 2] = [
            "4c756477696720766f6e204d69736573",
            "ca35def5ae56cec33dc2036731ab14896bc4c75dbb07a61f879f8e3afa4c7944001e21de9f98ddd8e2ad57527207feb5\
             6253c9c94a9e496782ecfcb2a75fbcaf1b52948cc48daefe660c62119ab5000980c84831215f2441eba616548e832985\
             464cf17e51ee93109008399a21f7e13f",
        ];
        pub(super) const SECOND: [&str; 2] = [
            "4d757272617920526f746862617264",
            "95ebc60d2b1fa672c1f46a8aa265ef51bfe38e7ccb39ec5be34069f144808843cb765f2caef0751b8f007572dab03222\
             17755c0632f365717edbf34d33e87a",
        ];
        /// The first transport message of each end.
        pub(super) const BY_INITIATOR: [&str; 2] =
            ["462e20412e20486179656b", "8153ca9833bc3c1b91a7e66e5f4d4f5b59bf9e64c2f20d15f0bba7"];
        pub(super) const BY_RESPONDER: [&str; 2] =
            ["4361726c204d656e676572", "07af0c9c86e1b4e80f36b04ff7688d51141af3debd0332f0a705ef"];
    }

    fn hex(text: &str) -> Vec<u8> {
        let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
        let digit = |byte: u8| (byte as char).to_digit(16).unwrap() as u8;
        digits.chunks(2).map(|pair| digit(pair[0]) << 4 | digit(pair[1])).collect()
    }

    fn secret(text: &str) -> StaticSecret {
        StaticSecret::from(<[u8; 32]>::try_from(hex(text)).unwrap())
    }

    fn sealed(key: &Key, plaintext: &str) -> Vec<u8> {
        let mut message = hex(plaintext);
        aead(key).unwrap().seal_in_place_append_tag(zero(), Aad::empty(), &mut message).unwrap();
        message
    }

    #[test]
    fn the_published_vector_holds_at_both_ends() {
        let (initiator, responder) = (secret(vector::INITIATOR), secret(vector::RESPONDER));
        let (initiator_public, responder_public) = (PublicKey::from(&initiator), PublicKey::from(&responder));
        let shared = initiator.diffie_hellman(&responder_public).to_bytes();
        let prologue = hex(vector::PROLOGUE);
        let psk: [u8; 32] = hex(vector::PSK).try_into().unwrap();
        let alice = StaticKeys { private: &initiator, public: &initiator_public };
        let bob = StaticKeys { private: &responder, public: &responder_public };

        let payload = hex(vector::FIRST[0]);
        let mut first = vec![0; payload.len() + FIRST_OVERHEAD];
        let ephemeral = secret(vector::INITIATOR_EPHEMERAL);
        let sent =
            write_first(&prologue, &alice, &responder_public, &shared, ephemeral, &payload, &mut first)
                .unwrap();
        assert_eq!(first, hex(vector::FIRST[1]));
        let claimed = read_first(&prologue, &bob, &mut first).unwrap();
        assert_eq!(claimed.sender, initiator_public);
        let proven = claimed.prove(&shared).unwrap();
        assert_eq!(proven.payload, payload);

        let payload = hex(vector::SECOND[0]);
        let mut second = vec![0; payload.len() + SECOND_OVERHEAD];
        let ephemeral = secret(vector::RESPONDER_EPHEMERAL);
        let at_bob = proven.write_second(&ephemeral, &psk, &payload, &mut second).unwrap();
        assert_eq!(second, hex(vector::SECOND[1]));
        let (at_alice, read) = sent.read_second(&initiator, &psk, &mut second).unwrap();
        assert_eq!(read, payload);

        for split in [at_alice, at_bob] {
            assert_eq!(sealed(&split.initiator, vector::BY_INITIATOR[0]), hex(vector::BY_INITIATOR[1]));
            assert_eq!(sealed(&split.responder, vector::BY_RESPONDER[0]), hex(vector::BY_RESPONDER[1]));
        }
    }

    #[test]
    fn points_of_low_order_are_refused() {
        let own = StaticSecret::from([7; 32]);
        let public = PublicKey::from(&own);
        let keys = StaticKeys { private: &own, public: &public };
        let mut message = [0; FIRST_OVERHEAD + 12];
        assert!(read_first(b"", &keys, &mut message).is_err());
        let zero = PublicKey::from([0; 32]);
        let ephemeral = StaticSecret::from([9; 32]);
        assert!(write_first(b"", &keys, &zero, &[0; 32], ephemeral, &[0; 12], &mut message).is_err());
    }
}
