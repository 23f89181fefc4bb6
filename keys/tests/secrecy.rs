//! No secret shows in `Debug`, whatever way it is looked at.
#![allow(clippy::unwrap_used, reason = "tests")]

use mesh_keys::frame::{GroupKey, Opener, Sealer};
use mesh_keys::password::{Password, PasswordClient, PasswordContext, PasswordRecord, PasswordServer};
use mesh_keys::*;
use rand_chacha::ChaCha20Rng;
use rand_core::{RngCore as _, SeedableRng as _};
use std::fmt::Debug;

/// Fails if any four neighbouring bytes of `secret` show, in hex, as a list of numbers, as text or
/// in base64.
fn assert_hidden(what: &str, value: &impl Debug, secret: &[u8]) {
    for shown in [format!("{value:?}"), format!("{value:#?}")] {
        let plain: String = shown.chars().filter(|c| !c.is_whitespace()).collect();
        for window in secret.windows(4) {
            let list: Vec<_> = window.iter().map(u8::to_string).collect();
            assert!(!plain.to_lowercase().contains(&hex::encode(window)), "{what}: {shown}");
            assert!(!plain.contains(&list.join(",")), "{what}: {shown}");
            if let Ok(text) = std::str::from_utf8(window) {
                assert!(!plain.contains(text), "{what}: {shown}");
            }
        }
    }
}

#[test]
fn debug_output_of_secrets_shows_no_secret_byte() {
    let mut rng = ChaCha20Rng::seed_from_u64(1);
    let mut bytes = [0; 32];
    rng.fill_bytes(&mut bytes);
    let secret = || Secret32::from_bytes(bytes);

    assert_hidden("Secret32", &secret(), &bytes);
    assert_hidden("Option<Secret32>", &Some(secret()), &bytes);
    assert_hidden("Identity", &Identity::from_bytes(&bytes), &bytes);
    assert_hidden("JoinKey", &JoinKey::from_secret(secret()), &bytes);
    let wg = WgSecret::from_bytes(&bytes);
    assert_hidden("WgSecret", &wg, wg.expose());
    assert_hidden("Psk", &Psk::from_secret(secret()), &bytes);
    let key = GroupKey::from_secret(secret());
    assert_hidden("GroupKey", &key, &bytes);
    assert_hidden("Sealer", &Sealer::new(&key, NodeId::from_bytes([1; 16]), &mut rng), &bytes);
    assert_hidden("Opener", &Opener::new(NodeId::from_bytes([2; 16]), &[key], 1).unwrap(), &bytes);
    assert_hidden("PairSecret", &PairSecret::from_secret(secret()), &bytes);
    assert_hidden("SessionSecrets", &SessionSecrets { join_binding: [0; 32], psk_seed: secret() }, &bytes);
}

#[test]
fn debug_output_of_the_password_exchange_shows_no_secret_byte() {
    let mut rng = ChaCha20Rng::seed_from_u64(2);
    let text = b"correct horse battery staple";
    let password = Password::from_file_contents(text.to_vec()).unwrap();
    let (joiner, sponsor) = (Identity::generate(&mut rng), Identity::generate(&mut rng));
    let (joiner, sponsor) = (joiner.public(), sponsor.public());
    let context = PasswordContext { binding: &[1; 32], joiner: &joiner, sponsor: &sponsor };
    let record = PasswordRecord::create(&password, &sponsor, &mut rng).unwrap();
    let (client, request) = PasswordClient::start(&password, &mut rng).unwrap();
    let (server, _) = PasswordServer::respond(&record, &request, &context, &mut rng).unwrap();
    assert_hidden("Password", &password, text);
    assert_hidden("PasswordClient", &client, text);
    assert_eq!(format!("{server:?}"), "PasswordServer(redacted)");
    // The digits after the kind and the sponsor's public key.
    let file = record.to_text();
    let digits = hex::decode(file.trim_end().split_once(':').unwrap().1).unwrap();
    assert_hidden("PasswordRecord", &record, &digits[32..]);
}

#[test]
fn secrets_are_compared_by_value() {
    assert_eq!(Secret32::from_bytes([1; 32]), Secret32::from_bytes([1; 32]));
    for at in 0..256 {
        let mut other = [1; 32];
        other[at / 8] ^= 1 << (at % 8);
        assert_ne!(Secret32::from_bytes([1; 32]), Secret32::from_bytes(other));
    }
}
