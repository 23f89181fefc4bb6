//! Laws of every format: reading gives back what was written, a changed bit is refused, and what was
//! made for one purpose is worthless for another.
#![allow(clippy::unwrap_used, reason = "tests")]

use mesh_keys::armor::ArmorError;
use mesh_keys::*;
use proptest::prelude::*;
use serde::{Deserialize, Serialize};

fn identity(seed: [u8; 32]) -> Identity {
    Identity::from_bytes(&seed)
}

fn cluster() -> ClusterId {
    ClusterId::from_bytes([5; 32])
}

/// The same fields as an admission, for another purpose.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Lookalike(Admission);

impl Signable for Lookalike {
    const DOMAIN: &'static str = "hauberk lookalike v1";
    const MAX_LEN: usize = 512;
}

/// What a newer version may make of an admission: fields appended, same domain.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct NewerAdmission {
    known: Admission,
    reason: String,
    weight: u32,
}

impl Signable for NewerAdmission {
    const DOMAIN: &'static str = Admission::DOMAIN;
    const MAX_LEN: usize = 512;
}

fn flipped(bytes: &[u8], bit: usize) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    let bit = bit % (bytes.len() * 8);
    bytes[bit / 8] ^= 1 << (bit % 8);
    bytes
}

prop_compose! {
    fn admissions()(
        subject in any::<[u8; 32]>(), sponsor in any::<[u8; 32]>(), mode in prop_oneof![0..6u8, any::<u8>()], serial in any::<u64>(),
    ) -> (Admission, Identity) {
        let sponsor = identity(sponsor);
        let admission = Admission {
            cluster: cluster(),
            subject: identity(subject).public(),
            sponsor: sponsor.public(),
            mode: match mode {
                1 => JoinMode::KeyFile,
                2 => JoinMode::Password,
                3 => JoinMode::Token(TokenId::from_bytes(*b"name")),
                other => JoinMode::Other(other),
            },
            issued_serial: serial,
        };
        (admission, sponsor)
    }
}

prop_compose! {
    fn genesis()(
        name in "[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?",
        nonce in any::<[u8; 32]>(),
        founder in any::<[u8; 32]>(),
        admins in prop::collection::btree_set(any::<[u8; 32]>(), 0..5),
        range in prop::sample::select(vec!["10.32.0.0/12", "10.0.0.0/8", "192.168.4.0/22", "100.64.0.0/10"]),
        block in 22u8..=24,
        modes in prop::sample::select(vec![JoinModes::KEY_FILE, JoinModes::PASSWORD, JoinModes::BOTH]),
    ) -> GenesisFields {
        GenesisFields {
            name,
            nonce,
            ipv4_range: range.parse().unwrap(),
            block_prefix: block,
            founder: identity(founder).public(),
            admin_keys: admins.into_iter().map(|seed| identity(seed).public()).collect(),
            join_modes: modes,
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn an_admission_survives_every_encoding((admission, sponsor) in admissions()) {
        let signed = Signed::sign(&admission, &sponsor).unwrap();
        prop_assert_eq!(signed.decode().unwrap(), admission);
        prop_assert_eq!(signed.check(&cluster()).unwrap(), admission);
        prop_assert_eq!(&SignedAdmission::from_bytes(&signed.to_bytes()).unwrap(), &signed);
        let wire = postcard::to_allocvec(&signed).unwrap();
        prop_assert_eq!(&postcard::from_bytes::<SignedAdmission>(&wire).unwrap(), &signed);
        let text = serde_json::to_string(&signed).unwrap();
        prop_assert_eq!(&serde_json::from_str::<SignedAdmission>(&text).unwrap(), &signed);
    }

    #[test]
    fn a_flipped_bit_in_an_admission_is_refused((admission, sponsor) in admissions(), bit in any::<usize>()) {
        let bytes = Signed::sign(&admission, &sponsor).unwrap().to_bytes();
        let refused = match SignedAdmission::from_bytes(&flipped(&bytes, bit)) {
            Ok(changed) => changed.check(&cluster()).is_err() && changed.verify(&sponsor.public()).is_err(),
            Err(_) => true,
        };
        prop_assert!(refused);
    }

    #[test]
    fn a_shortened_admission_is_refused((admission, sponsor) in admissions(), cut in any::<usize>()) {
        let bytes = Signed::sign(&admission, &sponsor).unwrap().to_bytes();
        let refused = match SignedAdmission::from_bytes(&bytes[..cut % bytes.len()]) {
            Ok(changed) => changed.verify(&sponsor.public()).is_err(),
            Err(_) => true,
        };
        prop_assert!(refused);
    }

    #[test]
    fn random_bytes_never_pass_for_a_signed_body(bytes in prop::collection::vec(any::<u8>(), 0..700)) {
        if let Ok(signed) = SignedAdmission::from_bytes(&bytes) {
            prop_assert!(signed.check(&cluster()).is_err());
        }
        prop_assert!(Genesis::decode(&bytes).is_err());
    }

    #[test]
    fn a_signature_for_one_type_is_refused_for_another((admission, sponsor) in admissions()) {
        let as_admission = Signed::sign(&admission, &sponsor).unwrap();
        let as_lookalike = Signed::sign(&Lookalike(admission), &sponsor).unwrap();
        prop_assert_eq!(as_admission.body(), as_lookalike.body());
        prop_assert_ne!(as_admission.id(), as_lookalike.id());
        let passed_off = SignedAdmission::from_bytes(&as_lookalike.to_bytes()).unwrap();
        prop_assert_eq!(
            passed_off.verify(&sponsor.public()),
            Err(SignedError::BadSignature { domain: Admission::DOMAIN })
        );
    }

    #[test]
    fn a_domain_and_message_are_not_confused_with_another_split(
        seed in any::<[u8; 32]>(), text in "[a-z ]{2,40}", cut in any::<prop::sample::Index>(),
    ) {
        let signer = identity(seed);
        let at = cut.index(text.len());
        let signature = signer.sign(&text[..at], &text.as_bytes()[at..]);
        prop_assert!(signer.public().verify(&text[..at], &text.as_bytes()[at..], &signature).is_ok());
        for other in (0..text.len()).filter(|other| *other != at) {
            let (domain, message) = text.split_at(other);
            prop_assert!(signer.public().verify(domain, message.as_bytes(), &signature).is_err());
        }
    }

    #[test]
    fn fields_of_a_newer_version_pass_through(
        (known, sponsor) in admissions(), reason in ".{0,40}", weight in any::<u32>(),
    ) {
        let newer = NewerAdmission { known, reason, weight };
        let by_newer = Signed::sign(&newer, &sponsor).unwrap();
        // An older member reads what it knows, stores it, and hands it on.
        let at_older = SignedAdmission::from_bytes(&by_newer.to_bytes()).unwrap();
        prop_assert_eq!(at_older.check(&cluster()).unwrap(), known);
        let handed_on = postcard::to_allocvec(&at_older).unwrap();
        let at_newer: Signed<NewerAdmission> = postcard::from_bytes(&handed_on).unwrap();
        prop_assert_eq!(at_newer.verify(&sponsor.public()).unwrap(), newer);
    }

    #[test]
    fn a_genesis_document_survives_every_encoding(fields in genesis()) {
        let genesis = Genesis::new(fields).unwrap();
        prop_assert_eq!(&Genesis::decode(genesis.as_bytes()).unwrap(), &genesis);
        let wire = postcard::to_allocvec(&genesis).unwrap();
        prop_assert_eq!(&postcard::from_bytes::<Genesis>(&wire).unwrap(), &genesis);
        let text = serde_json::to_string(&genesis).unwrap();
        prop_assert_eq!(&serde_json::from_str::<Genesis>(&text).unwrap(), &genesis);
        prop_assert!(genesis.ipv6_range().contains(&genesis.node_prefix(&genesis.founder(), 0)));
        prop_assert!(genesis.as_bytes().len() <= Genesis::MAX_LEN);
    }

    #[test]
    fn a_flipped_bit_makes_another_cluster_or_none(fields in genesis(), bit in any::<usize>()) {
        let genesis = Genesis::new(fields).unwrap();
        if let Ok(changed) = Genesis::decode(&flipped(genesis.as_bytes(), bit)) {
            prop_assert_ne!(changed.id(), genesis.id());
            prop_assert_ne!(changed.fields(), genesis.fields());
        }
    }

    #[test]
    fn a_key_file_survives_and_every_change_of_a_digit_is_noticed(
        bytes in any::<[u8; 32]>(), at in any::<prop::sample::Index>(), digit in "[0-9a-f]",
    ) {
        let key = JoinKey::from_secret(Secret32::from_bytes(bytes));
        let text = key.to_text();
        prop_assert_eq!(JoinKey::from_text(&text).unwrap(), key.clone());
        let line = text.trim_end();
        let digits = line.len() - "hauberk-key-1:".len();
        let position = line.len() - digits + at.index(digits);
        let mut changed = line.to_owned();
        changed.replace_range(position..=position, &digit);
        if changed == line {
            prop_assert_eq!(JoinKey::from_text(&changed).unwrap(), key);
        } else {
            prop_assert_eq!(JoinKey::from_text(&changed), Err(ArmorError::Checksum { kind: "hauberk-key-1" }));
        }
        // A paste that was cut short at any place.
        prop_assert!(JoinKey::from_text(&line[..position]).is_err());
    }

    #[test]
    fn a_join_proof_holds_for_one_key_session_pair_and_role(
        key in any::<[u8; 32]>(), binding in any::<[u8; 32]>(), bit in 0usize..256,
    ) {
        let key = JoinKey::from_secret(Secret32::from_bytes(key));
        let (joiner, sponsor) = (identity([1; 32]).public(), identity([2; 32]).public());
        let proof = key.client_proof(&binding, &joiner, &sponsor);
        prop_assert_eq!(key.verify_client_proof(&binding, &joiner, &sponsor, &proof), Ok(()));
        prop_assert_eq!(key.verify_server_proof(&binding, &joiner, &sponsor, &proof), Err(WrongJoinKey));
        prop_assert_eq!(key.verify_client_proof(&binding, &sponsor, &joiner, &proof), Err(WrongJoinKey));
        let mut other = binding;
        other[bit / 8] ^= 1 << (bit % 8);
        prop_assert_eq!(key.verify_client_proof(&other, &joiner, &sponsor, &proof), Err(WrongJoinKey));
        let other_key = JoinKey::from_secret(Secret32::from_bytes(other));
        prop_assert_eq!(other_key.verify_client_proof(&binding, &joiner, &sponsor, &proof), Err(WrongJoinKey));
        let mut changed = *proof.as_bytes();
        changed[bit / 8] ^= 1 << (bit % 8);
        let changed = JoinProof::from_bytes(changed);
        prop_assert_eq!(key.verify_client_proof(&binding, &joiner, &sponsor, &changed), Err(WrongJoinKey));
        let back = key.server_proof(&binding, &joiner, &sponsor);
        prop_assert_eq!(key.verify_server_proof(&binding, &joiner, &sponsor, &back), Ok(()));
        prop_assert_eq!(key.verify_client_proof(&binding, &joiner, &sponsor, &back), Err(WrongJoinKey));
    }

    #[test]
    fn both_ends_of_a_pair_have_the_same_psk_and_nothing_else_gives_it(
        seed in any::<[u8; 32]>(), a in any::<[u8; 16]>(), b in any::<[u8; 16]>(),
        wg_a in any::<[u8; 32]>(), wg_b in any::<[u8; 32]>(), epoch in any::<u64>(), bit in 0usize..128,
    ) {
        let (wg_a, wg_b) = (WgSecret::from_bytes(&wg_a), WgSecret::from_bytes(&wg_b));
        prop_assume!(a != b && wg_a != wg_b);
        let end = |node, key: &WgSecret| PairEnd { node: NodeId::from_bytes(node), wireguard: key.public() };
        let (end_a, end_b) = (end(a, &wg_a), end(b, &wg_b));
        let secret = Secret32::from_bytes(seed);
        let psk = pair_psk(&secret, &end_a, &wg_a, &end_b, epoch).unwrap();
        prop_assert_eq!(&pair_psk(&secret, &end_b, &wg_b, &end_a, epoch).unwrap(), &psk);
        let swapped = (end(a, &wg_b), end(b, &wg_a));
        prop_assert_ne!(&pair_psk(&secret, &swapped.0, &wg_b, &swapped.1, epoch).unwrap(), &psk);
        let other_epoch = epoch ^ 1 << (bit % 64);
        prop_assert_ne!(&pair_psk(&secret, &end_a, &wg_a, &end_b, other_epoch).unwrap(), &psk);
        let mut other = seed;
        other[bit / 8] ^= 1 << (bit % 8);
        let other_seed = Secret32::from_bytes(other);
        prop_assert_ne!(&pair_psk(&other_seed, &end_a, &wg_a, &end_b, epoch).unwrap(), &psk);
        // Who says that the first key is its own, and has another's secret.
        let without = WgSecret::from_bytes(&other);
        prop_assume!(without != wg_a);
        prop_assert_ne!(&pair_psk(&secret, &end_a, &without, &end_b, epoch).unwrap(), &psk);

        let (prover, verifier) = (NodeId::from_bytes(a), NodeId::from_bytes(b));
        let check = |binding, who, step, epoch| psk_check(&psk, binding, who, step, epoch);
        let said = check(&seed, &prover, PskStep::Staged, epoch);
        prop_assert!(said.matches(&check(&seed, &prover, PskStep::Staged, epoch)));
        prop_assert!(!said.matches(&check(&seed, &verifier, PskStep::Staged, epoch)), "an echo proves nothing");
        prop_assert!(!said.matches(&check(&other, &prover, PskStep::Staged, epoch)), "another session");
        prop_assert!(!said.matches(&check(&seed, &prover, PskStep::Staged, other_epoch)), "another agreement");
        for step in [PskStep::Probe, PskStep::Answer, PskStep::Offer, PskStep::Commit] {
            prop_assert!(!said.matches(&check(&seed, &prover, step, epoch)), "another step");
        }
    }

    #[test]
    fn wireguard_keys_survive_their_text_forms(bytes in any::<[u8; 32]>(), flip in 0usize..43) {
        let key = WgSecret::from_bytes(&bytes);
        prop_assert_eq!(&WgSecret::from_base64(&key.expose_base64()).unwrap(), &key);
        prop_assert_eq!(&WgSecret::from_text(&key.to_text()).unwrap(), &key);
        let public = key.public();
        let text = public.to_string();
        prop_assert_eq!(text.parse::<WgPublic>().unwrap(), public);
        prop_assert_eq!(serde_json::from_str::<WgPublic>(&serde_json::to_string(&public).unwrap()).unwrap(), public);
        let wire = postcard::to_allocvec(&public).unwrap();
        prop_assert_eq!(wire.len(), 32);
        prop_assert_eq!(postcard::from_bytes::<WgPublic>(&wire).unwrap(), public);
        let mut changed = text.clone();
        changed.replace_range(flip..=flip, "!");
        prop_assert!(changed.parse::<WgPublic>().is_err());
    }

    #[test]
    fn ids_survive_their_text_and_binary_forms(bytes in any::<[u8; 32]>()) {
        let id = ClusterId::from_bytes(bytes);
        prop_assert_eq!(id.to_string().parse::<ClusterId>().unwrap(), id);
        prop_assert_eq!(serde_json::to_string(&id).unwrap(), format!("\"{id}\""));
        prop_assert_eq!(serde_json::from_str::<ClusterId>(&format!("\"{id}\"")).unwrap(), id);
        let wire = postcard::to_allocvec(&id).unwrap();
        prop_assert_eq!(wire.as_slice(), id.as_bytes().as_slice());
        prop_assert_eq!(postcard::from_bytes::<ClusterId>(&wire).unwrap(), id);
    }

    #[test]
    fn parsers_of_text_never_panic(text in ".{0,120}") {
        let _ = text.parse::<NodeId>();
        let _ = text.parse::<WgPublic>();
        let _ = WgSecret::from_base64(&text);
        prop_assert!(JoinKey::from_text(&text).is_err());
        let with_kind = ["hauberk-key-1:", &text].concat();
        prop_assert!(JoinKey::from_text(&with_kind).is_err());
        prop_assert!(Identity::from_text(&text).is_err());
    }
}
