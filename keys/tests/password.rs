//! The password exchange: who gets in, who does not, and what either end learns.
#![allow(clippy::unwrap_used, reason = "tests")]

use mesh_keys::password::*;
use mesh_keys::{Identity, IdentityKey, Secret32};
use rand_chacha::ChaCha20Rng;
use rand_core::SeedableRng as _;

fn rng(seed: u64) -> ChaCha20Rng {
    ChaCha20Rng::seed_from_u64(seed)
}

fn key(byte: u8) -> IdentityKey {
    Identity::from_bytes(&[byte; 32]).public()
}

fn password(text: &str) -> Password {
    Password::from_file_contents(text.as_bytes().to_vec()).unwrap()
}

/// What one end believes the exchange to be about.
#[derive(Clone, Copy)]
struct View {
    binding: [u8; 32],
    joiner: IdentityKey,
    sponsor: IdentityKey,
}

impl View {
    fn honest() -> Self {
        Self { binding: [9; 32], joiner: key(1), sponsor: key(2) }
    }

    fn context(&self) -> PasswordContext<'_> {
        PasswordContext { binding: &self.binding, joiner: &self.joiner, sponsor: &self.sponsor }
    }
}

fn exchange(
    record: &PasswordRecord,
    typed: &str,
    at_joiner: View,
    at_sponsor: View,
) -> Result<(Secret32, Secret32), PasswordError> {
    let mut rng = rng(7);
    let (client, request) = PasswordClient::start(&password(typed), &mut rng)?;
    let (server, response) = PasswordServer::respond(record, &request, &at_sponsor.context(), &mut rng)?;
    let (finalization, at_client) = client.finish(&response, &at_joiner.context(), &mut rng)?;
    let at_server = server.finish(&finalization, &at_sponsor.context())?;
    Ok((at_client, at_server))
}

#[test]
fn the_same_password_gives_both_ends_the_same_key_and_another_one_is_refused() {
    let record = PasswordRecord::create(&password("correct horse"), &key(2), &mut rng(1)).unwrap();
    let view = View::honest();
    let (a, b) = exchange(&record, "correct horse", view, view).unwrap();
    assert_eq!(a, b);
    for wrong in ["correct horsf", "Correct horse", "correct horse ", "x"] {
        assert_eq!(
            exchange(&record, wrong, view, view).unwrap_err(),
            PasswordError::WrongPassword,
            "{wrong:?}"
        );
    }
    assert_eq!(PasswordError::WrongPassword.to_string(), "the password is not the one of the cluster");
    // The same record again, after a restart.
    let record = PasswordRecord::from_text(&record.to_text()).unwrap();
    assert!(exchange(&record, "correct horse", view, view).is_ok());
}

#[test]
fn an_exchange_is_bound_to_its_session_and_both_identities() {
    let record = PasswordRecord::create(&password("correct horse"), &key(2), &mut rng(1)).unwrap();
    let view = View::honest();
    // A man in the middle who ends TLS with both: another exporter value at each end.
    let other_session = View { binding: [8; 32], ..view };
    // ... or one who passes himself off as the joiner.
    let other_joiner = View { joiner: key(3), ..view };
    // ... or as the sponsor, whose record he cannot have.
    let other_sponsor = View { sponsor: key(3), ..view };
    for at_joiner in [other_session, other_joiner, other_sponsor] {
        assert_eq!(
            exchange(&record, "correct horse", at_joiner, view).unwrap_err(),
            PasswordError::WrongPassword
        );
    }
    assert_eq!(
        exchange(&record, "correct horse", view, other_sponsor).unwrap_err(),
        PasswordError::OtherSponsor
    );
}

#[test]
fn an_end_that_does_not_know_the_password_cannot_finish() {
    let mut rng = rng(3);
    let record = PasswordRecord::create(&password("correct horse"), &key(2), &mut rng).unwrap();
    let view = View::honest();
    let (client, request) = PasswordClient::start(&password("correct horse"), &mut rng).unwrap();
    let (server, response) = PasswordServer::respond(&record, &request, &view.context(), &mut rng).unwrap();
    let (finalization, _) = client.finish(&response, &view.context(), &mut rng).unwrap();
    // A finalization that is made up or changed in one bit is refused by the member.
    let mut changed = *finalization.as_bytes();
    changed[63] ^= 1;
    assert_eq!(
        server.finish(&PasswordFinalization::from_bytes(changed), &view.context()).unwrap_err(),
        PasswordError::WrongPassword
    );
    // One from another exchange too.
    let (_, request) = PasswordClient::start(&password("correct horse"), &mut rng).unwrap();
    let (server, _) = PasswordServer::respond(&record, &request, &view.context(), &mut rng).unwrap();
    assert_eq!(server.finish(&finalization, &view.context()).unwrap_err(), PasswordError::WrongPassword);
}

#[test]
fn changed_messages_are_refused() {
    let mut rng = rng(4);
    let record = PasswordRecord::create(&password("correct horse"), &key(2), &mut rng).unwrap();
    let view = View::honest();
    // One bit in each part of the response: OPRF element, masking nonce, masked response, nonce, key, MAC.
    for at in [0, 32, 64, 191, 192, 224, 319] {
        let (client, request) = PasswordClient::start(&password("correct horse"), &mut rng).unwrap();
        let (_, response) = PasswordServer::respond(&record, &request, &view.context(), &mut rng).unwrap();
        let mut changed = *response.as_bytes();
        changed[at] ^= 1;
        let error =
            client.finish(&PasswordResponse::from_bytes(changed), &view.context(), &mut rng).unwrap_err();
        assert!(
            matches!(
                error,
                PasswordError::WrongPassword | PasswordError::Malformed { what: "password response" }
            ),
            "byte {at}: {error:?}"
        );
    }
    // Elements that are none, or the neutral one.
    for bytes in [[0; 96], [0xff; 96]] {
        let error =
            PasswordServer::respond(&record, &PasswordRequest::from_bytes(bytes), &view.context(), &mut rng)
                .unwrap_err();
        assert_eq!(error, PasswordError::Malformed { what: "password request" });
    }
    let (client, _) = PasswordClient::start(&password("correct horse"), &mut rng).unwrap();
    let error =
        client.finish(&PasswordResponse::from_bytes([0xff; 320]), &view.context(), &mut rng).unwrap_err();
    assert_eq!(error, PasswordError::Malformed { what: "password response" });
    // A member that sends our own blinded element back learns nothing from the answer.
    let (client, request) = PasswordClient::start(&password("correct horse"), &mut rng).unwrap();
    let (_, response) = PasswordServer::respond(&record, &request, &view.context(), &mut rng).unwrap();
    let mut reflected = *response.as_bytes();
    reflected[..32].copy_from_slice(&request.as_bytes()[..32]);
    let error =
        client.finish(&PasswordResponse::from_bytes(reflected), &view.context(), &mut rng).unwrap_err();
    assert_eq!(error, PasswordError::Malformed { what: "password response" });
}

#[test]
fn messages_and_records_of_the_same_password_have_nothing_in_common() {
    let mut rng = rng(5);
    let (_, one) = PasswordClient::start(&password("correct horse"), &mut rng).unwrap();
    let (_, other) = PasswordClient::start(&password("correct horse"), &mut rng).unwrap();
    for part in 0..3 {
        let range = part * 32..part * 32 + 32;
        assert_ne!(one.as_bytes()[range.clone()], other.as_bytes()[range]);
    }
    let record = |rng: &mut _| PasswordRecord::create(&password("correct horse"), &key(2), rng).unwrap();
    let (one, other) = (record(&mut rng), record(&mut rng));
    assert_ne!(one.to_text()[100..], other.to_text()[100..]);
    let mut text = one.to_text().to_string();
    text.replace_range(200..201, if &text[200..201] == "0" { "1" } else { "0" });
    assert!(matches!(PasswordRecord::from_text(&text), Err(PasswordError::Armor(_))));
}

#[test]
fn a_password_file_is_read_byte_for_byte_but_for_its_last_newline() {
    let read = |bytes: &[u8]| Password::from_file_contents(bytes.to_vec());
    assert_eq!(read(b"secret word\n").unwrap(), read(b"secret word").unwrap());
    assert_eq!(read(b"secret word\r\n").unwrap(), read(b"secret word").unwrap());
    assert_ne!(read(b"secret word\n\n").unwrap(), read(b"secret word").unwrap());
    assert_ne!(read(b" secret word").unwrap(), read(b"secret word").unwrap());
    // The same letter in two Unicode forms is two passwords: no normalisation.
    assert_ne!(read("é".as_bytes()).unwrap(), read("e\u{301}".as_bytes()).unwrap());
    for empty in [&b""[..], b"\n", b"\r\n"] {
        assert_eq!(read(empty).unwrap_err(), PasswordError::Empty);
    }
    assert_eq!(read(&[b'a'; 1025]).unwrap_err(), PasswordError::TooLong { found: 1025 });
    assert!(read(&[0xff; 1024]).is_ok());
}

#[test]
fn weak_passwords_are_allowed_with_a_hint() {
    assert_eq!(password("seven77").weakness(), Some(WeakPassword::Short));
    assert_eq!(password("aaaaabbbbb").weakness(), Some(WeakPassword::Repetitive));
    assert_eq!(password("correct horse").weakness(), None);
    assert!(WeakPassword::Short.to_string().contains("meshctl keygen"));
}
