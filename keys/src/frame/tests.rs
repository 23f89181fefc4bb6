use super::*;
use proptest::prelude::*;
use rand_chacha::ChaCha20Rng;
use rand_core::SeedableRng as _;

/// The node id of the identity whose seed is 01…01.
const NODE: &str = "a6af77f9540e681ec5193814216796bc";

fn node() -> NodeId {
    NODE.parse().unwrap()
}

fn other_node() -> NodeId {
    NodeId::from_bytes([7; 16])
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
    let mut opener = Opener::new(&[key(1)], 10).unwrap();
    let first = opener.open(&sealer.seal(b"hello").unwrap(), everyone).unwrap();
    assert!(first.first_contact);
    opener.accept(&first);
    (sealer, opener)
}

#[test]
fn golden_frame() {
    // Inputs: group key 42…42; sender a6af77f9540e681ec5193814216796bc; boot nonce a0a1…a7;
    // counter 0x0102. Computed outside of this program.
    let boot = BootNonce::from_bytes([0xa0, 0xa1, 0xa2, 0xa3, 0xa4, 0xa5, 0xa6, 0xa7]);
    let golden = "2117980e37a6af77f9540e681ea0a1a2a3a4a5a6a70201000000000000\
233f492bba151c4fd9fbd860b9ebe153a2f41fe4922dc4e9f9106fd21ce9e6419cbda4d735";
    let payload = b"a rumour about node 7";

    let mut sealer = Sealer::with_boot(&key(0x42), node(), boot);
    sealer.next = 0x0102;
    assert_eq!(sealer.key_id().to_string(), "17980e37");
    assert_eq!(hex::encode(sealer.seal(payload).unwrap()), golden);

    // The same from the primitives alone.
    let mut subkey = [0; 32];
    let info = hex::decode(format!("{NODE}a0a1a2a3a4a5a6a7")).unwrap();
    hkdf::Hkdf::<Sha256>::new(Some(b"hauberk gossip v1"), &[0x42; 32]).expand(&info, &mut subkey).unwrap();
    assert_eq!(hex::encode(subkey), "c0c07543dfeb411948b60fd5a9bb0a5df1979befc02128d97d0bd9f7d7ca9ffe");
    let header = hex::decode(&golden[..58]).unwrap();
    let nonce = Nonce::clone_from_slice(&[0, 0, 0, 0, 2, 1, 0, 0, 0, 0, 0, 0]);
    let mut sealed = payload.to_vec();
    let tag = ChaCha20Poly1305::new(&subkey.into())
        .encrypt_in_place_detached(&nonce, &header, &mut sealed)
        .unwrap();
    assert_eq!(hex::encode([header, sealed, tag.to_vec()].concat()), golden);

    let mut opener = Opener::new(&[key(1), key(0x42)], 1).unwrap();
    let opened = opener.open(&hex::decode(golden).unwrap(), everyone).unwrap();
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
    assert!(!(1..=4).contains(&sealer.seal(b"").unwrap()[0]));
}

#[test]
fn frames_arrive_once_in_any_order() {
    let (mut sealer, mut opener) = pair();
    let frames: Vec<_> = (0..50u8).map(|i| sealer.seal(&[i]).unwrap()).collect();
    for i in [3usize, 1, 49, 0, 48, 2] {
        let opened = opener.open(&frames[i], everyone).unwrap();
        assert_eq!((opened.payload, opened.first_contact), (vec![i as u8], false));
        let again = OpenError::Replayed { counter: opened.counter };
        assert_eq!(opener.open(&frames[i], everyone), Err(again));
    }
}

#[test]
fn a_forged_frame_does_not_move_the_window() {
    let (mut sealer, mut opener) = pair();
    let honest = sealer.seal(b"honest").unwrap();
    let mut forged = sealer.seal(b"forged").unwrap();
    // Far ahead: would push everything honest out of the window.
    forged[21..29].copy_from_slice(&u64::MAX.to_le_bytes());
    assert_eq!(opener.open(&forged, everyone), Err(OpenError::Forged));
    assert_eq!(opener.open(&honest, everyone).unwrap().payload, b"honest");
}

#[test]
fn first_contact_leaves_no_trace_until_accepted() {
    let mut sealer = Sealer::new(&key(1), node(), &mut rng());
    let mut opener = Opener::new(&[key(1)], 10).unwrap();
    let frames: Vec<_> = (0..3).map(|_| sealer.seal(b"x").unwrap()).collect();
    for _ in 0..2 {
        assert!(opener.open(&frames[1], everyone).unwrap().first_contact);
        assert_eq!(opener.remembered(), 0);
    }
    let opened = opener.open(&frames[1], everyone).unwrap();
    opener.accept(&opened);
    opener.accept(&opened);
    assert_eq!(opener.remembered(), 1);
    // What came before the accepted frame may be a replay.
    assert_eq!(opener.open(&frames[0], everyone), Err(OpenError::Replayed { counter: 0 }));
    assert_eq!(opener.open(&frames[1], everyone), Err(OpenError::Replayed { counter: 1 }));
    assert!(!opener.open(&frames[2], everyone).unwrap().first_contact);
}

#[test]
fn errors_by_kind_in_the_order_of_the_checks() {
    let (mut sealer, mut opener) = pair();
    let frame = sealer.seal(b"payload").unwrap();
    let with = |at: usize, byte: u8| {
        let mut changed = frame.clone();
        changed[at] = byte;
        changed
    };
    assert_eq!(opener.open(&[], everyone), Err(OpenError::Length { found: 0 }));
    assert_eq!(opener.open(&frame[..44], everyone), Err(OpenError::Length { found: 44 }));
    assert_eq!(opener.open(&vec![KIND; 1201], everyone), Err(OpenError::Length { found: 1201 }));
    assert_eq!(opener.open(&with(0, 0x22), everyone), Err(OpenError::Kind { found: 0x22 }));
    assert!(matches!(opener.open(&with(1, frame[1] ^ 1), everyone), Err(OpenError::UnknownKey { .. })));
    assert!(matches!(opener.open(&with(5, frame[5] ^ 1), everyone), Err(OpenError::UnknownSender { .. })));
    assert!(matches!(opener.open(&frame, |_| None), Err(OpenError::UnknownSender { .. })));
    // A resolver that answers with another node is not believed.
    assert!(matches!(opener.open(&frame, |_| Some(other_node())), Err(OpenError::UnknownSender { .. })));
    assert_eq!(opener.open(&with(44, frame[44] ^ 1), everyone), Err(OpenError::Forged));
    // Nobody is resolved for a frame under an unknown key: no work for outsiders.
    let unknown = opener.open(&with(1, frame[1] ^ 1), |_| panic!("resolved too early"));
    assert!(unknown.is_err());
    assert!(opener.open(&frame, everyone).is_ok());
}

#[test]
fn another_sender_start_or_key_cannot_open_it() {
    let (mut sealer, mut opener) = pair();
    let frame = sealer.seal(b"payload").unwrap();
    // The same short id, another node: 8 bytes of a node id can be ground out.
    let mut twin = *node().as_bytes();
    twin[15] ^= 1;
    assert_eq!(opener.open(&frame, |_| Some(NodeId::from_bytes(twin))), Err(OpenError::Forged));
    let mut other_boot = frame.clone();
    other_boot[13] ^= 1;
    assert_eq!(opener.open(&other_boot, everyone), Err(OpenError::Forged));
    let mut other_key = frame;
    other_key[1..5].copy_from_slice(key(2).id().as_bytes());
    opener.replace_keys(&[key(1), key(2)]).unwrap();
    assert_eq!(opener.open(&other_key, everyone), Err(OpenError::Forged));
}

#[test]
fn a_group_key_is_replaced_without_a_lost_or_repeated_frame() {
    let (mut sealer, mut opener) = pair();
    let old = sealer.seal(b"old").unwrap();
    opener.replace_keys(&[key(1), key(2)]).unwrap();
    sealer.rekey(&key(2));
    let new = sealer.seal(b"new").unwrap();
    assert_eq!(opener.open(&new, everyone).unwrap().payload, b"new");
    assert_eq!(opener.open(&old, everyone).unwrap().payload, b"old");
    assert!(matches!(opener.open(&new, everyone), Err(OpenError::Replayed { .. })));
    let late = {
        sealer.rekey(&key(1));
        sealer.seal(b"late").unwrap()
    };
    opener.replace_keys(&[key(2)]).unwrap();
    assert_eq!(opener.open(&late, everyone), Err(OpenError::UnknownKey { id: key(1).id() }));
    assert_eq!(opener.replace_keys(&[1, 2, 3, 4, 5].map(key)), Err(TooManyKeys { found: 5 }));
    sealer.rekey(&key(2));
    assert!(opener.open(&sealer.seal(b"x").unwrap(), everyone).is_ok(), "the keys are as before");
}

#[test]
fn two_keys_with_one_id_are_not_mixed_up() {
    let (mut sealer, mut opener) = pair();
    let mut clash = key(2);
    clash.id = key(1).id;
    assert!(opener.open(&sealer.seal(b"under key 1").unwrap(), everyone).is_ok());
    opener.replace_keys(std::slice::from_ref(&clash)).unwrap();
    sealer.rekey(&clash);
    assert_eq!(
        opener.open(&sealer.seal(b"under the other").unwrap(), everyone).unwrap().payload,
        b"under the other"
    );
}

#[test]
fn memory_is_bounded_by_senders_and_starts() {
    let mut rng = rng();
    let mut opener = Opener::new(&[key(1)], 8).unwrap();
    let mut meet = |opener: &mut Opener, id: NodeId| {
        let mut sealer = Sealer::new(&key(1), id, &mut rng);
        let opened = opener.open(&sealer.seal(b"x").unwrap(), |_| Some(id)).unwrap();
        opener.accept(&opened);
        sealer
    };
    // A node that restarts again and again, or a member who makes it look so.
    let mut steady = meet(&mut opener, other_node());
    for _ in 0..20 {
        meet(&mut opener, node());
    }
    assert_eq!(opener.remembered(), 1 + MAX_STARTS_PER_SENDER);
    let opened = opener.open(&steady.seal(b"x").unwrap(), everyone).unwrap();
    assert!(!opened.first_contact, "others are not pushed out by it");
    // Many nodes: the one not heard for longest goes.
    for i in 0..20 {
        meet(&mut opener, NodeId::from_bytes([100 + i; 16]));
        assert!(!opener.open(&steady.seal(b"x").unwrap(), everyone).unwrap().first_contact);
    }
    assert_eq!(opener.remembered(), 8);
    opener.forget(&other_node());
    assert!(opener.open(&steady.seal(b"x").unwrap(), everyone).unwrap().first_contact);
    let mut none = Opener::new(&[key(1)], 0).unwrap();
    let opened = none.open(&steady.seal(b"x").unwrap(), everyone).unwrap();
    none.accept(&opened);
    assert_eq!(none.remembered(), 0);
}

#[test]
fn a_payload_that_does_not_fit_and_a_used_up_counter_are_refused() {
    let (mut sealer, mut opener) = pair();
    let largest = sealer.seal(&[7; MAX_PAYLOAD]).unwrap();
    assert_eq!(largest.len(), MAX_DATAGRAM);
    assert_eq!(opener.open(&largest, everyone).unwrap().payload, [7; MAX_PAYLOAD]);
    let next = sealer.next;
    assert_eq!(sealer.seal(&[7; MAX_PAYLOAD + 1]), Err(SealError::TooLong { found: MAX_PAYLOAD + 1 }));
    assert_eq!(sealer.next, next);
    sealer.next = u64::MAX - 1;
    assert!(sealer.seal(b"last").is_ok());
    assert_eq!(sealer.seal(b"none"), Err(SealError::Exhausted));
    assert_eq!(sealer.seal(b"none"), Err(SealError::Exhausted));
}

#[test]
fn starts_of_one_node_have_different_nonces_and_keys() {
    let mut rng = rng();
    let (mut a, mut b) = (Sealer::new(&key(1), node(), &mut rng), Sealer::new(&key(1), node(), &mut rng));
    assert_ne!(a.boot(), b.boot());
    let (a, b) = (a.seal(&[0; 64]).unwrap(), b.seal(&[0; 64]).unwrap());
    assert_eq!(a[21..29], b[21..29], "the same counter");
    assert_ne!(a[29..], b[29..]);
}

proptest! {
    #[test]
    fn opening_gives_back_what_was_sealed(payload in prop::collection::vec(any::<u8>(), 0..=MAX_PAYLOAD)) {
        let (mut sealer, mut opener) = pair();
        let opened = opener.open(&sealer.seal(&payload).unwrap(), everyone).unwrap();
        prop_assert_eq!(opened.payload, payload);
    }

    #[test]
    fn a_flipped_bit_anywhere_is_refused(
        payload in prop::collection::vec(any::<u8>(), 0..200), bit in any::<prop::sample::Index>(),
    ) {
        let (mut sealer, mut opener) = pair();
        let frame = sealer.seal(&payload).unwrap();
        let mut changed = frame.clone();
        let bit = bit.index(frame.len() * 8);
        changed[bit / 8] ^= 1 << (bit % 8);
        prop_assert!(opener.open(&changed, everyone).is_err());
        prop_assert!(opener.open(&frame, everyone).is_ok(), "and changes nothing");
    }

    #[test]
    fn random_bytes_are_refused(mut bytes in prop::collection::vec(any::<u8>(), 0..1300), ours in any::<bool>()) {
        let (_, mut opener) = pair();
        if ours && bytes.len() > 13 {
            bytes[0] = KIND;
            bytes[1..5].copy_from_slice(key(1).id().as_bytes());
            bytes[5..13].copy_from_slice(ShortId::of(&node()).as_bytes());
        }
        prop_assert!(opener.open(&bytes, everyone).is_err());
    }
}
