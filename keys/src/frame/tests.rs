use super::*;
use proptest::prelude::*;
use rand_chacha::ChaCha20Rng;
use rand_core::SeedableRng as _;

/// Node ids of the identities whose seeds are 01…01 and 02…02.
const NODE: &str = "a6af77f9540e681ec5193814216796bc";
const RECEIVER: &str = "a9d199952329dd76b39e5e8dd7b6679a";

fn node() -> NodeId {
    NODE.parse().unwrap()
}

fn receiver() -> NodeId {
    RECEIVER.parse().unwrap()
}

fn other_node() -> NodeId {
    NodeId::from_bytes([7; 16])
}

/// The secret of sender and receiver.
fn pair_secret() -> PairSecret {
    let key = crate::Identity::from_bytes(&[2; 32]).public();
    crate::Identity::from_bytes(&[1; 32]).agree(&key).unwrap()
}

fn with_all(_: &NodeId) -> Option<PairSecret> {
    Some(pair_secret())
}

fn seal(sealer: &mut Sealer, payload: &[u8]) -> Result<Vec<u8>, SealError> {
    sealer.seal(&receiver(), &pair_secret(), payload)
}

fn opener_with(keys: &[GroupKey], max_senders: usize) -> Opener {
    Opener::new(receiver(), keys, max_senders).unwrap()
}

fn key(byte: u8) -> GroupKey {
    GroupKey::from_secret(Secret32::from_bytes([byte; 32]))
}

fn rng() -> ChaCha20Rng {
    ChaCha20Rng::seed_from_u64(1)
}

fn everyone(short: &ShortId) -> Option<NodeId> {
    [node(), other_node()].into_iter().find(|id| ShortId::of(id) == *short)
}

/// An opener that has met the sealer.
fn pair() -> (Sealer, Opener) {
    let mut sealer = Sealer::new(&key(1), node(), &mut rng());
    let mut opener = opener_with(&[key(1)], 10);
    let first = opener.open(&seal(&mut sealer, b"hello").unwrap(), everyone, with_all).unwrap();
    assert!(first.first_contact);
    opener.accept(&first);
    (sealer, opener)
}

#[test]
fn golden_frame() {
    // Inputs: group key 42…42; sender and receiver as above; boot nonce a0a1…a7; counter 0x0102. Computed outside of
    // this program.
    let boot = BootNonce::from_bytes([0xa0, 0xa1, 0xa2, 0xa3, 0xa4, 0xa5, 0xa6, 0xa7]);
    let golden = "3117980e37a6af77f9540e681ea0a1a2a3a4a5a6a70201000000000000\
14c9a077482e6652edc29b54189433d89e128bed05a26cff61320486df2e869c9d392e2eba";
    let payload = b"a rumour about node 7";

    let mut sealer = Sealer::with_boot(&key(0x42), node(), boot);
    sealer.next = 0x0102;
    assert_eq!(sealer.key_id().to_string(), "17980e37");
    assert_eq!(hex::encode(seal(&mut sealer, payload).unwrap()), golden);

    // The same from the primitives alone.
    let mut subkey = [0; 32];
    let info = hex::decode(format!("{NODE}{RECEIVER}a0a1a2a3a4a5a6a7")).unwrap();
    let secrets = [[0x42; 32], *pair_secret().expose()].concat();
    hkdf::Hkdf::<Sha256>::new(Some(b"hauberk gossip v2"), &secrets).expand(&info, &mut subkey).unwrap();
    assert_eq!(hex::encode(subkey), "7b14677920ac1b37127fff541e04eb688b77bb0153f3fee35d71f0de40881d87");
    let header = hex::decode(&golden[..58]).unwrap();
    let nonce = Nonce::clone_from_slice(&[0, 0, 0, 0, 2, 1, 0, 0, 0, 0, 0, 0]);
    let mut sealed = payload.to_vec();
    let tag = ChaCha20Poly1305::new(&subkey.into())
        .encrypt_in_place_detached(&nonce, &header, &mut sealed)
        .unwrap();
    assert_eq!(hex::encode([header, sealed, tag.to_vec()].concat()), golden);

    let mut opener = opener_with(&[key(1), key(0x42)], 1);
    let opened = opener.open(&hex::decode(golden).unwrap(), everyone, with_all).unwrap();
    assert_eq!(opened.payload, payload);
    assert_eq!((opened.sender, opened.boot, opened.counter), (node(), boot, 0x0102));
}

#[test]
fn the_aead_is_that_of_rfc_8439() {
    // RFC 8439, section 2.8.2.
    let cipher = ChaCha20Poly1305::new(&std::array::from_fn::<u8, 32, _>(|i| 0x80 + i as u8).into());
    let nonce = Nonce::clone_from_slice(&hex::decode("070000004041424344454647").unwrap());
    let aad = hex::decode("50515253c0c1c2c3c4c5c6c7").unwrap();
    let mut text =
        b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the future, \
sunscreen would be it."
            .to_vec();
    let tag = cipher.encrypt_in_place_detached(&nonce, &aad, &mut text).unwrap();
    assert_eq!(hex::encode(&text[..16]), "d31a8d34648e60db7b86afbc53ef7ec2");
    assert_eq!(hex::encode(tag), "1ae10b594f09e26a7e902ecbd0600691");
}

#[test]
fn the_key_derivation_is_that_of_rfc_5869() {
    // RFC 5869, appendix A.1, the first 32 bytes.
    let salt = hex::decode("000102030405060708090a0b0c").unwrap();
    let info = hex::decode("f0f1f2f3f4f5f6f7f8f9").unwrap();
    let okm = hkdf32(&salt, &[0x0b; 22], &[&info[..4], &info[4..]]);
    assert_eq!(hex::encode(okm.expose()), "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf");
}

#[test]
fn the_mac_is_that_of_rfc_4231() {
    use hmac::Mac as _;
    // Test case 1 has a key of 20 bytes; HMAC fills keys up with zeros, so it is ours with zeros.
    let mut key = [0; 32];
    key[..20].fill(0x0b);
    let mac =
        crate::secret::hmac(&Secret32::from_bytes(key)).chain_update(b"Hi There").finalize().into_bytes();
    assert_eq!(hex::encode(mac), "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7");
}

#[test]
fn the_first_byte_cannot_be_taken_for_wireguard() {
    let (mut sealer, _) = pair();
    assert!(!(1..=4).contains(&seal(&mut sealer, b"").unwrap()[0]));
}

#[test]
fn frames_arrive_once_in_any_order() {
    let (mut sealer, mut opener) = pair();
    let frames: Vec<_> = (0..50u8).map(|i| seal(&mut sealer, &[i]).unwrap()).collect();
    for i in [3usize, 1, 49, 0, 48, 2] {
        let opened = opener.open(&frames[i], everyone, with_all).unwrap();
        assert_eq!((opened.payload, opened.first_contact), (vec![i as u8], false));
        let again = OpenError::Replayed { counter: opened.counter };
        assert_eq!(opener.open(&frames[i], everyone, with_all), Err(again));
    }
}

#[test]
fn a_forged_frame_does_not_move_the_window() {
    let (mut sealer, mut opener) = pair();
    let honest = seal(&mut sealer, b"honest").unwrap();
    let mut forged = seal(&mut sealer, b"forged").unwrap();
    // Far ahead: would push everything honest out of the window.
    forged[21..29].copy_from_slice(&u64::MAX.to_le_bytes());
    assert_eq!(opener.open(&forged, everyone, with_all), Err(OpenError::Forged));
    assert_eq!(opener.open(&honest, everyone, with_all).unwrap().payload, b"honest");
}

#[test]
fn first_contact_leaves_no_trace_until_accepted() {
    let mut sealer = Sealer::new(&key(1), node(), &mut rng());
    let mut opener = opener_with(&[key(1)], 10);
    let frames: Vec<_> = (0..3).map(|_| seal(&mut sealer, b"x").unwrap()).collect();
    for _ in 0..2 {
        assert!(opener.open(&frames[1], everyone, with_all).unwrap().first_contact);
        assert_eq!(opener.remembered(), 0);
    }
    let opened = opener.open(&frames[1], everyone, with_all).unwrap();
    opener.accept(&opened);
    opener.accept(&opened);
    assert_eq!(opener.remembered(), 1);
    // What came before the accepted frame may be a replay.
    assert_eq!(opener.open(&frames[0], everyone, with_all), Err(OpenError::Replayed { counter: 0 }));
    assert_eq!(opener.open(&frames[1], everyone, with_all), Err(OpenError::Replayed { counter: 1 }));
    assert!(!opener.open(&frames[2], everyone, with_all).unwrap().first_contact);
}

#[test]
fn errors_by_kind_in_the_order_of_the_checks() {
    let (mut sealer, mut opener) = pair();
    let frame = seal(&mut sealer, b"payload").unwrap();
    let with = |at: usize, byte: u8| {
        let mut changed = frame.clone();
        changed[at] = byte;
        changed
    };
    assert_eq!(opener.open(&[], everyone, with_all), Err(OpenError::Length { found: 0 }));
    assert_eq!(opener.open(&frame[..44], everyone, with_all), Err(OpenError::Length { found: 44 }));
    let found = MAX_LONG_DATAGRAM + 1;
    assert_eq!(opener.open(&vec![KIND; found], everyone, with_all), Err(OpenError::Length { found }));
    assert_eq!(opener.open(&with(0, 0x21), everyone, with_all), Err(OpenError::Kind { found: 0x21 }));
    assert!(matches!(
        opener.open(&with(1, frame[1] ^ 1), everyone, with_all),
        Err(OpenError::UnknownKey { .. })
    ));
    assert!(matches!(
        opener.open(&with(5, frame[5] ^ 1), everyone, with_all),
        Err(OpenError::UnknownSender { .. })
    ));
    assert!(matches!(opener.open(&frame, |_| None, with_all), Err(OpenError::UnknownSender { .. })));
    // A resolver that answers with another node is not believed.
    assert!(matches!(
        opener.open(&frame, |_| Some(other_node()), with_all),
        Err(OpenError::UnknownSender { .. })
    ));
    assert_eq!(opener.open(&with(44, frame[44] ^ 1), everyone, with_all), Err(OpenError::Forged));
    // Nobody is resolved for a frame under an unknown key: no work for outsiders.
    let unknown = opener.open(&with(1, frame[1] ^ 1), |_| panic!("resolved too early"), with_all);
    assert!(unknown.is_err());
    assert!(opener.open(&frame, everyone, with_all).is_ok());
}

#[test]
fn another_sender_start_or_key_cannot_open_it() {
    let (mut sealer, mut opener) = pair();
    let frame = seal(&mut sealer, b"payload").unwrap();
    // The same short id, another node: 8 bytes of a node id can be ground out.
    let mut twin = *node().as_bytes();
    twin[15] ^= 1;
    assert_eq!(opener.open(&frame, |_| Some(NodeId::from_bytes(twin)), with_all), Err(OpenError::Forged));
    let mut other_boot = frame.clone();
    other_boot[13] ^= 1;
    assert_eq!(opener.open(&other_boot, everyone, with_all), Err(OpenError::Forged));
    let mut other_key = frame;
    other_key[1..5].copy_from_slice(key(2).id().as_bytes());
    opener.replace_keys(&[key(1), key(2)]).unwrap();
    assert_eq!(opener.open(&other_key, everyone, with_all), Err(OpenError::Forged));
}

#[test]
fn nobody_else_can_seal_in_its_name_or_read_what_it_sealed() {
    let (mut sealer, mut opener) = pair();
    let third = crate::Identity::from_bytes(&[3; 32]);
    let with = |seed: u8| third.agree(&crate::Identity::from_bytes(&[seed; 32]).public()).unwrap();
    // It has the group key and says that it is the sender.
    let mut forger = Sealer::with_boot(&key(1), node(), sealer.boot());
    forger.next = u64::MAX - 1;
    let forged = forger.seal(&receiver(), &with(2), b"forged").unwrap();
    assert_eq!(opener.open(&forged, everyone, with_all), Err(OpenError::Forged));
    let honest = seal(&mut sealer, b"honest").unwrap();
    let mut reader = opener_with(&[key(1)], 10);
    assert_eq!(reader.open(&honest, everyone, |_| Some(with(1))), Err(OpenError::Forged));
    // Nor does it open for another receiver of the same two keys.
    let mut elsewhere = Opener::new(other_node(), &[key(1)], 10).unwrap();
    assert_eq!(elsewhere.open(&honest, everyone, with_all), Err(OpenError::Forged));
    assert!(opener.open(&honest, everyone, with_all).is_ok());
}

#[test]
fn a_group_key_is_replaced_without_a_lost_or_repeated_frame() {
    let (mut sealer, mut opener) = pair();
    let old = seal(&mut sealer, b"old").unwrap();
    opener.replace_keys(&[key(1), key(2)]).unwrap();
    sealer.rekey(&key(2));
    let new = seal(&mut sealer, b"new").unwrap();
    assert_eq!(opener.open(&new, everyone, with_all).unwrap().payload, b"new");
    assert_eq!(opener.open(&old, everyone, with_all).unwrap().payload, b"old");
    assert!(matches!(opener.open(&new, everyone, with_all), Err(OpenError::Replayed { .. })));
    let late = {
        sealer.rekey(&key(1));
        seal(&mut sealer, b"late").unwrap()
    };
    opener.replace_keys(&[key(2)]).unwrap();
    assert_eq!(opener.open(&late, everyone, with_all), Err(OpenError::UnknownKey { id: key(1).id() }));
    assert_eq!(opener.replace_keys(&[1, 2, 3, 4, 5].map(key)), Err(TooManyKeys { found: 5 }));
    sealer.rekey(&key(2));
    assert!(
        opener.open(&seal(&mut sealer, b"x").unwrap(), everyone, with_all).is_ok(),
        "the keys are as before"
    );
}

#[test]
fn two_keys_with_one_id_are_not_mixed_up() {
    let (mut sealer, mut opener) = pair();
    let mut clash = key(2);
    clash.id = key(1).id;
    assert!(opener.open(&seal(&mut sealer, b"under key 1").unwrap(), everyone, with_all).is_ok());
    opener.replace_keys(std::slice::from_ref(&clash)).unwrap();
    sealer.rekey(&clash);
    assert_eq!(
        opener.open(&seal(&mut sealer, b"under the other").unwrap(), everyone, with_all).unwrap().payload,
        b"under the other"
    );
}

#[test]
fn memory_is_bounded_by_senders_and_starts() {
    let mut rng = rng();
    let mut opener = opener_with(&[key(1)], 8);
    let mut meet = |opener: &mut Opener, id: NodeId| {
        let mut sealer = Sealer::new(&key(1), id, &mut rng);
        let opened = opener.open(&seal(&mut sealer, b"x").unwrap(), |_| Some(id), with_all).unwrap();
        opener.accept(&opened);
        sealer
    };
    // A node that restarts again and again, or a member who makes it look so.
    let mut steady = meet(&mut opener, other_node());
    for _ in 0..20 {
        meet(&mut opener, node());
    }
    assert_eq!(opener.remembered(), 1 + MAX_STARTS_PER_SENDER);
    let opened = opener.open(&seal(&mut steady, b"x").unwrap(), everyone, with_all).unwrap();
    assert!(!opened.first_contact, "others are not pushed out by it");
    // Many nodes: the one not heard for longest goes.
    for i in 0..20 {
        meet(&mut opener, NodeId::from_bytes([100 + i; 16]));
        assert!(!opener.open(&seal(&mut steady, b"x").unwrap(), everyone, with_all).unwrap().first_contact);
    }
    assert_eq!(opener.remembered(), 8);
    opener.forget(&other_node());
    assert!(opener.open(&seal(&mut steady, b"x").unwrap(), everyone, with_all).unwrap().first_contact);
    let mut none = opener_with(&[key(1)], 0);
    let opened = none.open(&seal(&mut steady, b"x").unwrap(), everyone, with_all).unwrap();
    none.accept(&opened);
    assert_eq!(none.remembered(), 0);
}

#[test]
fn a_payload_that_does_not_fit_and_a_used_up_counter_are_refused() {
    let (mut sealer, mut opener) = pair();
    let largest = seal(&mut sealer, &[7; MAX_PAYLOAD]).unwrap();
    assert_eq!(largest.len(), MAX_DATAGRAM);
    assert_eq!(opener.open(&largest, everyone, with_all).unwrap().payload, [7; MAX_PAYLOAD]);
    let long = vec![7; MAX_LONG_DATAGRAM - OVERHEAD + 1];
    let longest = sealer.seal_long(&receiver(), &pair_secret(), &long[1..]).unwrap();
    assert_eq!(longest.len(), MAX_LONG_DATAGRAM);
    assert_eq!(opener.open(&longest, everyone, with_all).unwrap().payload, long[1..]);
    let next = sealer.next;
    let refused = sealer.seal_long(&receiver(), &pair_secret(), &long);
    assert_eq!(refused, Err(SealError::TooLong { found: long.len() }));
    assert_eq!(seal(&mut sealer, &[7; MAX_PAYLOAD + 1]), Err(SealError::TooLong { found: MAX_PAYLOAD + 1 }));
    assert_eq!(sealer.next, next);
    sealer.next = u64::MAX - 1;
    assert!(seal(&mut sealer, b"last").is_ok());
    assert_eq!(seal(&mut sealer, b"none"), Err(SealError::Exhausted));
    assert_eq!(seal(&mut sealer, b"none"), Err(SealError::Exhausted));
}

#[test]
fn starts_of_one_node_have_different_nonces_and_keys() {
    let mut rng = rng();
    let (mut a, mut b) = (Sealer::new(&key(1), node(), &mut rng), Sealer::new(&key(1), node(), &mut rng));
    assert_ne!(a.boot(), b.boot());
    let (a, b) = (seal(&mut a, &[0; 64]).unwrap(), seal(&mut b, &[0; 64]).unwrap());
    assert_eq!(a[21..29], b[21..29], "the same counter");
    assert_ne!(a[29..], b[29..]);
}

proptest! {
    #[test]
    fn opening_gives_back_what_was_sealed(payload in prop::collection::vec(any::<u8>(), 0..=MAX_PAYLOAD)) {
        let (mut sealer, mut opener) = pair();
        let opened = opener.open(&seal(&mut sealer, &payload).unwrap(), everyone, with_all).unwrap();
        prop_assert_eq!(opened.payload, payload);
    }

    #[test]
    fn a_flipped_bit_anywhere_is_refused(
        payload in prop::collection::vec(any::<u8>(), 0..200), bit in any::<prop::sample::Index>(),
    ) {
        let (mut sealer, mut opener) = pair();
        let frame = seal(&mut sealer, &payload).unwrap();
        let mut changed = frame.clone();
        let bit = bit.index(frame.len() * 8);
        changed[bit / 8] ^= 1 << (bit % 8);
        prop_assert!(opener.open(&changed, everyone, with_all).is_err());
        prop_assert!(opener.open(&frame, everyone, with_all).is_ok(), "and changes nothing");
    }

    #[test]
    fn random_bytes_are_refused(mut bytes in prop::collection::vec(any::<u8>(), 0..1300), ours in any::<bool>()) {
        let (_, mut opener) = pair();
        if ours && bytes.len() > 13 {
            bytes[0] = KIND;
            bytes[1..5].copy_from_slice(key(1).id().as_bytes());
            bytes[5..13].copy_from_slice(ShortId::of(&node()).as_bytes());
        }
        prop_assert!(opener.open(&bytes, everyone, with_all).is_err());
    }
}
