//! The golden sets of this crate: see `golden_set`. What the bytes mean is checked against other implementations in
//! `golden.rs`; here nothing may change any more.
#![allow(clippy::unwrap_used, reason = "tests")]

#[path = "golden_set/mod.rs"]
mod golden_set;

use std::fmt::Debug;

use golden_set::{Entry, Era, Make, assert_complete, check, variants};
use mesh_keys::frame::{GroupKey, MAX_PAYLOAD, Opener, Sealer, ShortId};
use mesh_keys::password::{
    Password, PasswordClient, PasswordContext, PasswordFinalization, PasswordRecord, PasswordRequest,
    PasswordResponse, PasswordServer,
};
use mesh_keys::{
    AdminKey, Admission, ClusterId, Genesis, GenesisFields, Identity, JoinKey, JoinMode, JoinModes,
    JoinPolicy, JoinToken, JoinWindow, NodeId, Removal, Revocation, Secret32, Signable, Signed, Token,
    TokenId, Tries, WgSecret, admin,
};
use rand_chacha::ChaCha20Rng;
use rand_chacha::rand_core::SeedableRng as _;

const HOME: &str = env!("CARGO_MANIFEST_DIR");
const CLUSTER: ClusterId = ClusterId::from_bytes([0xc1; 32]);
const TOKEN: &str =
    "hbt1.01234567.c1c1c1c1c1c1c1c1c1c1c1c1c1c1c1c1.000102030405060708090a0b0c0d0e0f.adcd138f";
const PASSWORD: &str = "correct horse battery staple";

/// All sets of this crate, with the entries that they must have.
const SETS: [(&str, Era, Make); 5] = [
    ("v3/texts", Era::Present, texts),
    ("v3/genesis", Era::Present, genesis),
    ("v3/statements", Era::Present, statements),
    ("v3/frames", Era::Present, frames),
    ("v3/password", Era::Present, password),
];

#[test]
fn what_was_ever_released_is_read_as_it_was_meant() {
    for (set, era, entries) in SETS {
        check(HOME, set, era, &entries());
    }
    let record = golden_set::entry(HOME, "v3/password", "record");
    let record = PasswordRecord::from_text(std::str::from_utf8(&record).unwrap()).unwrap();
    assert!(exchange(&record, None).is_ok(), "a node joins with the password of the golden record");
    assert!(golden_set::sets(HOME).iter().map(String::as_str).eq({
        let mut names = SETS.map(|(set, _, _)| set);
        names.sort_unstable();
        names
    }));
}

fn identity(byte: u8) -> Identity {
    Identity::from_bytes(&[byte; 32])
}

fn rng(seed: u8) -> ChaCha20Rng {
    ChaCha20Rng::from_seed([seed; 32])
}

/// Files of one line, and what people copy from one terminal to another.
fn texts() -> Vec<Entry> {
    vec![
        Entry::text("identity", "identity.key of a node", &identity(1).to_text(), |text| {
            Ok(Identity::from_text(text).map_err(say)?.to_text().to_string())
        }),
        Entry::text(
            "wireguard",
            "wireguard-0.key of a node",
            &WgSecret::from_bytes(&[2; 32]).to_text(),
            |text| Ok(WgSecret::from_text(text).map_err(say)?.to_text().to_string()),
        ),
        Entry::text(
            "join-key",
            "key file by which nodes join",
            &JoinKey::from_secret(Secret32::from_bytes([3; 32])).to_text(),
            |text| Ok(JoinKey::from_text(text).map_err(say)?.to_text().to_string()),
        ),
        Entry::text(
            "admin-key",
            "secret half of an admin key",
            &format!("hauberk-admin-1:{}5fa8a684", "02".repeat(32)),
            |text| Ok(AdminKey::from_text(text).map_err(say)?.to_text().to_string()),
        ),
        Entry::text(
            "admin-public",
            "public half of an admin key",
            &admin::public_to_text(&identity(4).public()),
            |text| Ok(admin::public_to_text(&admin::public_from_text(text).map_err(say)?)),
        ),
        Entry::text("token", "token by which a node joins", TOKEN, |text| {
            Ok(JoinToken::from_text(text).map_err(say)?.to_text().to_string())
        }),
    ]
}

fn token() -> JoinToken {
    JoinToken::from_text(TOKEN).unwrap()
}

fn genesis() -> Vec<Entry> {
    let document = |name: &str, admin_keys, join_modes| {
        let fields = GenesisFields {
            nonce: [7; 32],
            ipv4_range: "10.64.0.0/11".parse().unwrap(),
            block_prefix: 22,
            admin_keys,
            ..GenesisFields::flat(name, identity(1).public(), join_modes, &mut rng(0))
        };
        Genesis::new(fields).unwrap().encode()
    };
    let reread = |bytes: &[u8]| {
        let fields = Genesis::decode(bytes).map_err(say)?.fields().clone();
        Ok(Genesis::new(fields).map_err(say)?.encode())
    };
    let admins = vec![identity(4).public(), identity(5).public()];
    vec![
        Entry::bytes(
            "flat",
            "a cluster without admin keys",
            document("flat", vec![], JoinModes::KEY_FILE),
            reread,
        ),
        Entry::bytes(
            "anchored",
            "a cluster with two admin keys",
            document("an-chored", admins, JoinModes::BOTH),
            reread,
        ),
    ]
}

fn signed<T>(name: &str, what: &str, signer: u8, value: &T) -> Entry
where
    T: Signable + PartialEq + Debug,
{
    let signer = identity(signer);
    let written = Signed::sign(value, &signer).unwrap().to_bytes();
    Entry::bytes(name, what, written, move |bytes| {
        let value = Signed::<T>::from_bytes(bytes).map_err(say)?.verify(&signer.public()).map_err(say)?;
        Ok(Signed::sign(&value, &signer).map_err(say)?.to_bytes())
    })
}

variants!(mode_name, MODES: JoinMode {
    JoinMode::KeyFile => "admission-by-key",
    JoinMode::Password => "admission-by-password",
    JoinMode::Token(_) => "admission-by-token",
    JoinMode::Other(_) => "admission-by-other",
});

variants!(window_name, WINDOWS: JoinWindow {
    JoinWindow::Open => "policy-open",
    JoinWindow::Closed => "policy-closed",
    JoinWindow::Until(_) => "policy-until",
});

fn statements() -> Vec<Entry> {
    let token = token();
    let [one, two, three, admin] = [1, 2, 3, 4].map(|byte| identity(byte).public());
    let modes = [JoinMode::KeyFile, JoinMode::Password, JoinMode::Token(token.id), JoinMode::Other(0xee)];
    let windows = [JoinWindow::Open, JoinWindow::Closed, JoinWindow::Until(1_700_000_000)];
    assert_complete(MODES, modes.iter().map(mode_name));
    assert_complete(WINDOWS, windows.iter().map(window_name));
    let mut keep = vec![three.node_id(), identity(6).node_id()];
    keep.sort_unstable();
    let mut entries = vec![
        signed(
            "removal",
            "removal of node 2 by an admin, which keeps two nodes",
            4,
            &Removal {
                cluster: CLUSTER,
                subject: two,
                signer: admin,
                heir: one,
                keep,
                grants: vec![[7; 16]],
            },
        ),
        signed(
            "tries",
            "count of tries to join by password",
            1,
            &Tries { cluster: CLUSTER, node: one, window: 28_333_333, count: 7, total: 1000 },
        ),
        signed(
            "token",
            "token for 300 nodes",
            4,
            &Token {
                cluster: CLUSTER,
                id: token.id,
                hash: token.hash(),
                expires: 1_700_000_001,
                uses: 300,
                signer: admin,
            },
        ),
        signed(
            "revocation",
            "a token taken back",
            4,
            &Revocation { cluster: CLUSTER, id: TokenId::from_bytes([8, 9, 10, 11]), signer: admin },
        ),
    ];
    for (serial, mode) in (300..).zip(modes) {
        let admission =
            Admission { cluster: CLUSTER, subject: two, sponsor: one, mode, issued_serial: serial };
        entries.push(signed(mode_name(&mode), "node 2 is let in by node 1", 1, &admission));
    }
    for (serial, window) in (400..).zip(windows) {
        let policy = JoinPolicy { cluster: CLUSTER, serial, signer: admin, window };
        entries.push(signed(window_name(&window), "when nodes may join", 4, &policy));
    }
    entries
}

/// Sealed with the key `[3; 32]` by node 2 for node 1, in the start that `rng(5)` names.
fn sealed(number: usize, payload: &[u8]) -> Vec<u8> {
    let key = GroupKey::from_secret(Secret32::from_bytes([3; 32]));
    let mut sealer = Sealer::new(&key, identity(2).node_id(), &mut rng(5));
    let (receiver, pair) = (identity(1).node_id(), identity(2).agree(&identity(1).public()).unwrap());
    (0..number).for_each(|_| drop(sealer.seal(&receiver, &pair, &[]).unwrap()));
    sealer.seal(&receiver, &pair, payload).unwrap()
}

fn frames() -> Vec<Entry> {
    let reread = |bytes: &[u8]| {
        let key = GroupKey::from_secret(Secret32::from_bytes([3; 32]));
        let node = identity(2).node_id();
        let opener = &mut Opener::new(identity(1).node_id(), &[key], 1).map_err(say)?;
        let resolve = |short: &ShortId| (ShortId::of(&node) == *short).then_some(node);
        let pair = |_: &NodeId| identity(1).agree(&identity(2).public());
        let opened = opener.open(bytes, resolve, pair).map_err(say)?;
        Ok(sealed(usize::try_from(opened.counter).map_err(say)?, &opened.payload))
    };
    vec![
        Entry::bytes("first", "the first datagram of a node's start", sealed(0, b"payload"), reread),
        Entry::bytes("empty", "a datagram without payload, after 299 others", sealed(299, &[]), reread),
        Entry::bytes(
            "longest",
            "the longest datagram",
            sealed(1, &std::array::from_fn::<u8, MAX_PAYLOAD, _>(|i| i as u8)),
            reread,
        ),
    ]
}

/// A member's record of the password, and an exchange with it.
fn password() -> Vec<Entry> {
    let record = PasswordRecord::create(&the_password(), &identity(1).public(), &mut rng(6)).unwrap();
    let exchanged = [exchange(&record, None).unwrap(), exchange(&record, None).unwrap()];
    assert_eq!(exchanged[0], exchanged[1], "seeds make it repeatable");
    let [exchanged, _] = exchanged;
    vec![
        Entry::text("record", "record of the password, of node 1", &record.to_text(), |text| {
            Ok(PasswordRecord::from_text(text).map_err(say)?.to_text().to_string())
        })
        .written_once(),
        Entry::bytes("exchange", "node 2 proves to node 1 that it has the password", exchanged, |bytes| {
            let record = String::from_utf8(golden_set::entry(HOME, "v3/password", "record")).map_err(say)?;
            exchange(&PasswordRecord::from_text(&record).map_err(say)?, Some(bytes))
        })
        .written_once(),
    ]
}

fn the_password() -> Password {
    Password::from_file_contents(PASSWORD.into()).unwrap()
}

/// The three messages and the session key. With those of an earlier exchange, each end is given what the other end said
/// then, and must say what it said then: it draws from a seed. If it does not, the library may only have come to draw in
/// another order; then the record above tells whether the password is still the password.
fn exchange(record: &PasswordRecord, earlier: Option<&[u8]>) -> Result<Vec<u8>, String> {
    const PARTS: [usize; 3] = [PasswordRequest::LEN, PasswordResponse::LEN, PasswordFinalization::LEN];
    let earlier = |part: usize, now: &[u8]| -> Result<Vec<u8>, String> {
        let start = PARTS[..part].iter().sum();
        earlier.map_or(Ok(now.to_vec()), |all| {
            Ok(all.get(start..start + PARTS[part]).ok_or("cut short")?.to_vec())
        })
    };
    let (joiner, sponsor) = (identity(2).public(), identity(1).public());
    let context = PasswordContext { binding: &[9; 32], joiner: &joiner, sponsor: &sponsor };
    let (client, request) = PasswordClient::start(&the_password(), &mut rng(7)).map_err(say)?;
    let heard = earlier(0, request.as_bytes())?.try_into().map_err(|_| "no request")?;
    let heard = PasswordRequest::from_bytes(heard);
    let (server, response) = PasswordServer::respond(record, &heard, &context, &mut rng(8)).map_err(say)?;
    let heard = earlier(1, response.as_bytes())?.try_into().map_err(|_| "no response")?;
    let heard = PasswordResponse::from_bytes(heard);
    let (finalization, key) = client.finish(&heard, &context, &mut rng(9)).map_err(say)?;
    let heard = earlier(2, finalization.as_bytes())?.try_into().map_err(|_| "no finalization")?;
    let heard = PasswordFinalization::from_bytes(heard);
    if server.finish(&heard, &context).map_err(say)? != key {
        return Err("the two ends have different session keys".to_owned());
    }
    Ok([&request.as_bytes()[..], response.as_bytes(), finalization.as_bytes(), key.expose()].concat())
}

fn say(error: impl std::fmt::Display) -> String {
    error.to_string()
}
