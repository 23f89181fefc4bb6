//! What members sign and pass on: records, grants, admissions.
//!
//! The first byte says what kind of statement it is and which member signs it; the rest is its body, which is then
//! really signed: the worst that a member can do is to sign anything.

use mesh_core::view::{Delta, Grant, LaneInfo, NodeRecord, View};
use mesh_keys::{Admission, BodyId, Identity, JoinMode, Signable, Signed, SignedError, WgPublic};

use crate::Target;
use crate::world::WORLD;

pub(crate) const TARGET: Target = Target {
    name: "record",
    run,
    seeds,
    words: &[&[0xff, 0xff, 0xff, 0xff, 0x0f], &[0x80], &[10, 32, 0, 0]],
};

const RECORD: u8 = 0;
const GRANT: u8 = 1;
const ADMISSION: u8 = 2;
/// Set when the founder signs, not the member.
const BY_FOUNDER: u8 = 0x80;

fn run(data: &[u8]) {
    unsigned::<NodeRecord>(data);
    let Some((&kind, body)) = data.split_first() else { return };
    let signer = if kind & BY_FOUNDER == 0 { &WORLD.member } else { &WORLD.founder };
    let mut delta = Delta::default();
    match kind & !BY_FOUNDER {
        RECORD => delta.records.extend(signed(body, signer)),
        GRANT => delta.grants.extend(signed(body, signer)),
        ADMISSION => delta.admissions.extend(signed(body, signer)),
        _ => {}
    }
    merge(&delta, signer);
}

/// Bytes of which nothing is known.
fn unsigned<T: Signable>(data: &[u8]) {
    if let Ok(read) = Signed::<T>::from_bytes(data) {
        assert_eq!(read.to_bytes(), data, "not passed on byte for byte");
        assert!(read.body().len() <= T::MAX_LEN);
    }
}

/// A statement with this body and a good signature; `None` when it is refused for its length.
fn signed<T: Signable>(body: &[u8], signer: &Identity) -> Option<Signed<T>> {
    let signature = signer.sign(T::DOMAIN, body);
    let bytes = [&[1], &signature.as_bytes()[..], body].concat();
    match Signed::<T>::from_bytes(&bytes) {
        Ok(signed) => {
            // Whatever can be decoded can be written, and is then decoded to the same.
            if let Ok(value) = signed.verify(&signer.public()) {
                let again =
                    Signed::sign(&value, signer).expect("the known fields are no longer than all of them");
                let value_again = again.verify(&signer.public()).expect("what we write we read");
                let encoded = |value: &T| postcard::to_allocvec(value).expect("it was read from postcard");
                assert_eq!(encoded(&value), encoded(&value_again));
            }
            Some(signed)
        }
        Err(SignedError::TooLong { found, max, .. }) => {
            assert!(found > max);
            None
        }
        Err(error) => panic!("a well-formed statement is refused: {error}"),
    }
}

/// What one member says goes into the view of another.
fn merge(delta: &Delta, signer: &Identity) {
    let mut view = WORLD.view();
    let before = view.fingerprint();
    let merged = view.merge(delta);
    assert_eq!(view.fingerprint() == before, merged.new.is_empty(), "the fingerprint tells what is new");
    assert!(merged.refused.iter().all(|reason| !reason.is_empty()));

    let after = view.fingerprint();
    let again = view.merge(delta);
    assert!(again.new.is_empty() && view.fingerprint() == after, "merging twice is merging once");

    // What was taken in can be handed to a third node, which then has the same view.
    let mut third = View::new(WORLD.genesis.clone());
    let handed = third.merge(&view.to_delta());
    assert!(handed.refused.is_empty(), "{:?}", handed.refused);
    assert_eq!(third.fingerprint(), after);

    // No member speaks for another.
    for record in &merged.new.records {
        let record = record.decode().expect("it was taken in");
        assert_eq!(record.node, signer.public());
        record.validate(&WORLD.genesis).expect("it was taken in");
    }
    let innocent = if signer.public() == WORLD.founder.public() { &WORLD.member } else { &WORLD.founder };
    let (owned_before, owned) =
        (WORLD.view().grants().owned_by(&innocent.public()), view.grants().owned_by(&innocent.public()));
    for net in owned_before.nets() {
        assert!(owned.covers(net), "{net} was taken from a node that did not sign");
    }
}

fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let cluster = WORLD.genesis.id();
    let record = NodeRecord {
        cluster,
        node: WORLD.member.public(),
        generation: 3,
        version: 7,
        name: "node-b".to_owned(),
        software: "0.1.0".to_owned(),
        salt: 0,
        mesh_ipv4: Some([10, 32, 1, 1].into()),
        control_port: 6783,
        endpoints: vec![
            [192, 0, 2, 7].into(),
            std::net::Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 7).into(),
        ],
        lanes: vec![LaneInfo { index: 0, key: WgPublic::from_bytes([9; 32]), port: 6784 }],
        start: 0,
        contested: false,
        leaving: false,
    };
    let founders =
        NodeRecord { node: WORLD.founder.public(), mesh_ipv4: None, lanes: Vec::new(), ..record.clone() };
    let grant = Grant {
        cluster,
        parent: BodyId::from_bytes(*cluster.as_bytes()),
        network: [10, 47, 255, 0].into(),
        prefix: 24,
        from: WORLD.founder.public(),
        to: WORLD.member.public(),
    };
    let stolen = Grant { from: WORLD.member.public(), ..grant.clone() };
    let admission = Admission {
        cluster,
        subject: Identity::from_bytes(&[5; 32]).public(),
        sponsor: WORLD.member.public(),
        mode: JoinMode::Password,
        issued_serial: 2,
    };
    vec![
        ("record", statement(RECORD, &record)),
        ("record-without-lanes", statement(RECORD | BY_FOUNDER, &founders)),
        ("record-of-another", statement(RECORD | BY_FOUNDER, &record)),
        ("record-of-a-newer-version", [statement(RECORD, &record), vec![1, 2, 3]].concat()),
        ("grant", statement(GRANT | BY_FOUNDER, &grant)),
        ("grant-by-no-owner", statement(GRANT, &stolen)),
        (
            "grant-of-everything",
            statement(GRANT | BY_FOUNDER, &Grant { network: [10, 32, 0, 0].into(), prefix: 12, ..grant }),
        ),
        ("admission", statement(ADMISSION, &admission)),
        ("signed", WORLD.admission.to_bytes()),
    ]
}

fn statement<T: Signable>(kind: u8, value: &T) -> Vec<u8> {
    [vec![kind], postcard::to_allocvec(value).expect("our types can be written")].concat()
}
