//! What is refused, and whether the message says what is wrong.
#![allow(clippy::unwrap_used, reason = "tests")]

use mesh_keys::armor::ArmorError;
use mesh_keys::*;
use serde::{Deserialize, Serialize};

fn fields() -> GenesisFields {
    GenesisFields {
        name: "demo".to_owned(),
        nonce: [7; 32],
        ipv4_range: GenesisFields::default_ipv4_range(),
        block_prefix: 24,
        founder: Identity::from_bytes(&[1; 32]).public(),
        admin_keys: Vec::new(),
        join_modes: JoinModes::BOTH,
    }
}

fn refusal(change: impl FnOnce(&mut GenesisFields)) -> String {
    let mut fields = fields();
    change(&mut fields);
    Genesis::new(fields).unwrap_err().to_string()
}

/// Encodings of points of small order (4 and 1): they verify forged signatures in lax
/// implementations.
fn weak_keys() -> Vec<IdentityKey> {
    let mut neutral = [0; 32];
    neutral[0] = 1;
    vec![IdentityKey::from_bytes([0; 32]), IdentityKey::from_bytes(neutral)]
}

#[test]
fn each_field_of_a_genesis_document_is_checked_and_named() {
    let range = |text: &'static str| move |f: &mut GenesisFields| f.ipv4_range = text.parse().unwrap();
    for name in ["", "Demo", "a b", "-a", "a-", "ä", &"a".repeat(64)] {
        assert!(refusal(|f| f.name = name.to_owned()).contains("name"), "{name:?}");
    }
    assert_eq!(
        refusal(range("10.32.0.1/12")),
        "genesis, ipv4_range: 10.32.0.1/12 is not a network address; did you mean 10.32.0.0/12?"
    );
    for taken in ["127.0.0.0/16", "169.254.0.0/16", "224.0.0.0/8", "240.0.0.0/8", "0.0.0.0/8"] {
        assert!(refusal(range(taken)).contains("ipv4_range"), "{taken}");
    }
    assert!(refusal(range("0.0.0.0/0")).contains("/8 to /28"));
    assert!(refusal(range("10.0.0.0/30")).contains("/8 to /28"));
    assert!(refusal(|f| f.block_prefix = 11).contains("block_prefix"));
    assert!(refusal(|f| f.block_prefix = 29).contains("give /12 to /28"));
    let mut largest = fields();
    range("10.0.0.0/8")(&mut largest);
    assert!(Genesis::new(largest.clone()).is_ok(), "65,536 blocks");
    largest.block_prefix = 25;
    assert!(Genesis::new(largest).unwrap_err().to_string().contains("more than 2^16 blocks"));
}

#[test]
fn keys_in_a_genesis_document_are_checked() {
    for weak in weak_keys() {
        assert!(refusal(|f| f.founder = weak).contains("founder"));
        assert!(refusal(|f| f.admin_keys = vec![weak]).contains("admin_keys"));
    }
    let key = Identity::from_bytes(&[2; 32]).public();
    assert!(refusal(|f| f.admin_keys = vec![key, key]).contains("each once"));
    let many = (0..17).map(|i| Identity::from_bytes(&[i; 32]).public()).collect();
    assert!(refusal(|f| f.admin_keys = many).contains("at most 16"));
}

#[test]
fn admin_keys_are_put_in_order() {
    let keys: Vec<_> = (1..5).map(|i| Identity::from_bytes(&[i; 32]).public()).collect();
    let one = Genesis::new(GenesisFields { admin_keys: keys.clone(), ..fields() }).unwrap();
    let reversed = keys.into_iter().rev().collect();
    let other = Genesis::new(GenesisFields { admin_keys: reversed, ..fields() }).unwrap();
    assert_eq!(one.id(), other.id());
    assert!(!one.is_flat() && Genesis::new(fields()).unwrap().is_flat());
}

#[test]
fn a_genesis_document_has_one_encoding() {
    let bytes = Genesis::new(fields()).unwrap().encode();
    assert_eq!(Genesis::decode(&[]).unwrap_err(), GenesisError::Truncated);
    for cut in 1..bytes.len() {
        assert_eq!(Genesis::decode(&bytes[..cut]).unwrap_err(), GenesisError::Truncated, "cut at {cut}");
    }
    let longer = [bytes.as_slice(), &[0]].concat();
    assert_eq!(Genesis::decode(&longer).unwrap_err(), GenesisError::TrailingBytes { found: 1 });
    let newer = [&[2], &bytes[1..]].concat();
    assert_eq!(Genesis::decode(&newer).unwrap_err(), GenesisError::Format { found: 2 });
    assert_eq!(
        Genesis::decode(&vec![1; Genesis::MAX_LEN + 1]).unwrap_err(),
        GenesisError::TooLong { found: Genesis::MAX_LEN + 1 }
    );
    // The name's length, 4, as a varint of two bytes: the same document to a lax reader.
    let padded = [&bytes[..1], &[0x84, 0x00], &bytes[2..]].concat();
    assert_eq!(Genesis::decode(&padded).unwrap_err(), GenesisError::NotCanonical);
    // Host bits in the range, an unknown join mode, admin keys in the wrong order.
    let range_at = 1 + 1 + 4 + 32;
    let mut host_bits = bytes.clone();
    host_bits[range_at + 3] = 1;
    assert!(matches!(Genesis::decode(&host_bits), Err(GenesisError::RangeHostBits { .. })));
    let mut modes = bytes.clone();
    *modes.last_mut().unwrap() = 4;
    assert_eq!(Genesis::decode(&modes).unwrap_err(), GenesisError::JoinModes { found: 4 });
    *modes.last_mut().unwrap() = 0;
    assert_eq!(Genesis::decode(&modes).unwrap_err(), GenesisError::JoinModes { found: 0 });
    let mut keys: Vec<_> = (1..3).map(|i| Identity::from_bytes(&[i; 32]).public()).collect();
    let two = Genesis::new(GenesisFields { admin_keys: keys.clone(), ..fields() }).unwrap().encode();
    keys.sort_unstable();
    let keys_at = two.len() - 1 - 64;
    let swapped = [
        &two[..keys_at],
        &two[keys_at + 32..keys_at + 64],
        &two[keys_at..keys_at + 32],
        &two[two.len() - 1..],
    ];
    assert_eq!(Genesis::decode(&swapped.concat()).unwrap_err(), GenesisError::AdminKeyOrder);
}

#[test]
fn an_announced_length_that_is_not_there_takes_no_memory() {
    // A name of 2^32 - 1 bytes.
    assert_eq!(Genesis::decode(&[1, 0xff, 0xff, 0xff, 0xff, 0x0f]).unwrap_err(), GenesisError::Truncated);
    // A signed body of 2^32 - 1 bytes.
    assert!(postcard::from_bytes::<SignedAdmission>(&[0xff, 0xff, 0xff, 0xff, 0x0f, 1]).is_err());
}

#[test]
fn admissions_of_another_cluster_or_of_oneself_are_refused() {
    let (a, b) = (Identity::from_bytes(&[1; 32]), Identity::from_bytes(&[2; 32]));
    let (here, there) = (ClusterId::from_bytes([1; 32]), ClusterId::from_bytes([2; 32]));
    let signed = SignedAdmission::issue(there, b.public(), &a, JoinMode::KeyFile, 0).unwrap();
    assert!(matches!(signed.check(&here), Err(AdmissionError::OtherCluster { .. })));
    assert_eq!(
        SignedAdmission::issue(here, a.public(), &a, JoinMode::KeyFile, 0).unwrap_err(),
        AdmissionError::SelfSponsored
    );
    let admission = |subject, sponsor| Admission {
        cluster: here,
        subject,
        sponsor,
        mode: JoinMode::KeyFile,
        issued_serial: 0,
    };
    let own = Signed::sign(&admission(a.public(), a.public()), &a).unwrap();
    assert_eq!(own.check(&here).unwrap_err(), AdmissionError::SelfSponsored);
    // Signed by b, but naming a as the sponsor.
    let forged = Signed::sign(&admission(b.public(), a.public()), &b).unwrap();
    assert!(matches!(forged.check(&here), Err(AdmissionError::Signed(SignedError::BadSignature { .. }))));
    for weak in weak_keys() {
        let subject = Signed::sign(&admission(weak, a.public()), &a).unwrap();
        assert!(matches!(subject.check(&here), Err(AdmissionError::UnusableSubject { .. })));
        let sponsor = Signed::sign(&admission(b.public(), weak), &a).unwrap();
        assert!(matches!(
            sponsor.check(&here),
            Err(AdmissionError::Signed(SignedError::BadSignature { .. }))
        ));
    }
}

#[test]
fn a_weak_key_verifies_nothing() {
    // With the neutral element as the public key, R = neutral element and s = 0 satisfy the equation
    // of lax verifiers for every message.
    let mut lax = [0; 64];
    lax[0] = 1;
    for key in weak_keys() {
        assert!(!key.is_usable());
        assert_eq!(key.verify("domain", b"message", &Signature::from_bytes(lax)), Err(BadSignature));
        assert_eq!(IdentityKey::from_spki_der(&key.to_spki_der()), None);
    }
}

#[test]
fn a_signature_has_one_encoding() {
    let signer = Identity::from_bytes(&[1; 32]);
    let signature = signer.sign("domain", b"message");
    // s + L is the same scalar to a lax verifier (RFC 8032, section 8.4).
    let order: [u8; 32] = [
        0xed, 0xd3, 0xf5, 0x5c, 0x1a, 0x63, 0x12, 0x58, 0xd6, 0x9c, 0xf7, 0xa2, 0xde, 0xf9, 0xde, 0x14, 0, 0,
        0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x10,
    ];
    let mut other = *signature.as_bytes();
    let mut carry = 0;
    for (byte, add) in other[32..].iter_mut().zip(order) {
        let sum = u16::from(*byte) + u16::from(add) + carry;
        *byte = sum as u8;
        carry = sum >> 8;
    }
    assert_eq!(carry, 0);
    assert_eq!(signer.public().verify("domain", b"message", &signature), Ok(()));
    assert_eq!(
        signer.public().verify("domain", b"message", &Signature::from_bytes(other)),
        Err(BadSignature)
    );
}

#[test]
fn only_an_ed25519_key_is_read_from_der() {
    let key = Identity::from_bytes(&[1; 32]).public();
    let der = key.to_spki_der();
    assert_eq!(IdentityKey::from_spki_der(&der), Some(key));
    assert_eq!(IdentityKey::from_spki_der(&der[..43]), None);
    assert_eq!(IdentityKey::from_spki_der(&[der.as_slice(), &[0]].concat()), None);
    for at in 0..12 {
        let mut other = der;
        other[at] ^= 1;
        assert_eq!(IdentityKey::from_spki_der(&other), None, "byte {at}");
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct Long(Vec<u8>);

impl Signable for Long {
    const DOMAIN: &'static str = "test long v1";
    const MAX_LEN: usize = 100;
}

#[test]
fn a_signed_body_is_bounded() {
    let signer = Identity::from_bytes(&[1; 32]);
    let fits = Signed::sign(&Long(vec![0; 99]), &signer).unwrap();
    assert!(Signed::<Long>::from_bytes(&fits.to_bytes()).is_ok());
    assert_eq!(
        Signed::sign(&Long(vec![0; 100]), &signer).unwrap_err(),
        SignedError::TooLong { domain: "test long v1", max: 100, found: 101 }
    );
    let longer = [fits.to_bytes().as_slice(), &[0]].concat();
    assert!(matches!(Signed::<Long>::from_bytes(&longer), Err(SignedError::TooLong { found: 101, .. })));
    assert!(serde_json::from_str::<Signed<Long>>(&format!("\"{}\"", hex::encode(&longer))).is_err());
    assert!(matches!(Signed::<Long>::from_bytes(&[1; 64]), Err(SignedError::TooShort { .. })));
    assert!(matches!(Signed::<Long>::from_bytes(&[2; 70]), Err(SignedError::Format { found: 2, .. })));
}

#[test]
fn a_key_file_says_what_is_wrong_with_it() {
    let text = JoinKey::from_secret(Secret32::from_bytes([3; 32])).to_text();
    let line = text.trim_end();
    let error = |text: &str| JoinKey::from_text(text).unwrap_err();
    let kind = "hauberk-key-1";
    assert_eq!(error(" \n"), ArmorError::Empty { expected: kind });
    assert_eq!(error(&line[..40]), ArmorError::Length { kind, expected: 72, found: 26 });
    assert_eq!(error(&format!("{line}{line}")), ArmorError::Digit { kind, position: 87 });
    assert_eq!(error(&format!("{line}\n{line}\n")), ArmorError::ManyLines { expected: kind });
    assert_eq!(error(&line.replacen("03", "0g", 1)), ArmorError::Digit { kind, position: 16 });
    assert_eq!(error(&line.replacen("03", "04", 1)), ArmorError::Checksum { kind });
    assert_eq!(
        error(&line.replacen("key-1", "key-2", 1)),
        ArmorError::OtherKind { expected: kind, found: "hauberk-key-2".to_owned() }
    );
    assert!(error(&line[..40]).to_string().contains("cut short"));
    // Windows line ends and blanks around the line are fine.
    assert!(JoinKey::from_text(&format!("  {line}\r\n")).is_ok());
}

#[test]
fn a_password_in_the_place_of_a_key_file_is_recognised_and_not_shown() {
    for password in ["correct horse", "user:pass", "hauberk-key-secret:abc"] {
        let error = JoinKey::from_text(password).unwrap_err();
        assert_eq!(error, ArmorError::NotArmored { expected: "hauberk-key-1" });
        assert!(error.to_string().contains("password"));
        assert!(!error.to_string().contains(password));
    }
}

#[test]
fn ids_say_what_is_wrong_with_them() {
    let error = |text: &str| text.parse::<NodeId>().unwrap_err().to_string();
    assert_eq!(error("a6af77f9"), "node id must have 32 hex digits, but 8 characters were given");
    assert_eq!(error("a6af77f9540e681ec519381421679xbc"), "node id: character 30 is no hex digit (0-9, a-f)");
    assert!(serde_json::from_str::<NodeId>("\"a6\"").unwrap_err().to_string().contains("node id"));
}

#[test]
fn wireguard_keys_say_what_is_wrong_with_them() {
    use wireguard::WgKeyError;
    let error = |text: &str| text.parse::<WgPublic>().unwrap_err();
    assert_eq!(error(""), WgKeyError::Length { found: 0 });
    assert_eq!(error("pOCSkrZRwni5dyxWn1+puxPZBrRqtoyd+dwrRAn4ogk"), WgKeyError::Length { found: 43 });
    // 44 characters, but 33 or 31 bytes.
    assert_eq!(error("pOCSkrZRwni5dyxWn1+puxPZBrRqtoyd+dwrRAn4ogkA"), WgKeyError::Encoding);
    assert_eq!(error("pOCSkrZRwni5dyxWn1+puxPZBrRqtoyd+dwrRAn4og=="), WgKeyError::Encoding);
    // The same 32 bytes to a lax reader.
    assert_eq!(error("pOCSkrZRwni5dyxWn1+puxPZBrRqtoyd+dwrRAn4ogl="), WgKeyError::Encoding);
}
