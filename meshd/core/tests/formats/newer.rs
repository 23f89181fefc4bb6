//! What a newer version adds does not keep this one from what it knows.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use mesh_core::api::{ApiError, AttachRequest, Attachment, GcRequest, Status, Tombstone};
use mesh_core::gossip::catalogue::{Catalogue, Content, Kind, Name};
use mesh_core::gossip::liveness::{Life, Statement};
use mesh_core::gossip::wire::{Part, Writer, read};
use mesh_core::gossip::{Event, Gossip, Offered, Store};
use mesh_core::message::{MalformedMessage, Message, RefusalCode};
use mesh_core::state::{StateFile, Stored};
use mesh_core::time::Time;
use mesh_core::view::{Delta, NodeRecord};
use mesh_keys::{ClusterId, IdentityKey, JoinPolicy, JoinWindow, NodeId, Signable, Signed};
use sha2::{Digest as _, Sha256};

use crate::HOME;
use crate::golden_set;
use crate::messages::messages;
use crate::state::files;
use crate::world::{WORLD, identity, node, record};

/// What a newer version may append.
const ADDED: [u8; 5] = [0xff, 1, 2, 3, 0xfe];

#[test]
fn fields_behind_a_message_are_passed_over() {
    for (name, _, message) in messages() {
        let frame = [message.encode().to_vec(), ADDED.to_vec()].concat();
        assert_eq!(Message::decode(&frame).unwrap().encode(), message.encode(), "{name}");
    }
}

#[test]
fn a_message_of_a_newer_version_is_told_from_a_malformed_one() {
    for variant in [Message::VARIANTS, 300, u32::MAX] {
        let frame = [postcard::to_allocvec(&variant).unwrap(), ADDED.to_vec()].concat();
        assert_eq!(Message::decode(&frame).unwrap_err(), MalformedMessage::Unknown { variant });
    }
    for malformed in [vec![], vec![0xff; 9], vec![1]] {
        assert!(matches!(Message::decode(&malformed).unwrap_err(), MalformedMessage::Decode(_)));
    }
}

#[test]
fn a_refusal_of_a_newer_version_keeps_its_sentence() {
    let Message::Refuse(refusal) = Message::decode(b"\x01\x63\x03why").unwrap() else { panic!() };
    assert_eq!((refusal.code, refusal.reason.as_str()), (RefusalCode::Unknown, "why"));
}

#[test]
fn what_a_newer_version_appends_to_a_state_file_is_passed_over() {
    for file in StateFile::ALL {
        let name = file.name().strip_suffix(".state").unwrap();
        let golden = golden_set::entry(HOME, "v4/state", name);
        let header = golden.iter().position(|byte| *byte == b'\n').unwrap() + 1;
        let contents = [&golden[header + 65..], &ADDED].concat();
        let hash = hex::encode(Sha256::digest(&contents));
        let newer = [&golden[..header], hash.as_bytes(), b"\n", &contents].concat();
        let read = |bytes: &[u8]| {
            let stored = Stored::decode(&files(file, bytes)).unwrap();
            (stored.view, stored.node, stored.leases, stored.keys, stored.group)
        };
        assert_eq!(read(&newer), read(&golden), "{name}");
    }
}

#[test]
fn fields_that_a_document_has_more_are_passed_over() {
    fn read<T: serde::de::DeserializeOwned + PartialEq + std::fmt::Debug>(name: &str) {
        let golden = golden_set::entry(HOME, "v3/api", name);
        let mut value: serde_json::Value = serde_json::from_slice(&golden).unwrap();
        value.as_object_mut().unwrap().insert("added".to_owned(), serde_json::json!({ "later": [1, null] }));
        let expected: T = serde_json::from_slice(&golden).unwrap();
        assert_eq!(serde_json::from_value::<T>(value).unwrap(), expected, "{name}");
    }
    read::<AttachRequest>("attach");
    read::<Attachment>("attachment-active");
    read::<GcRequest>("gc");
    read::<Tombstone>("tombstone");
    read::<Status>("status-member");
    read::<ApiError>("error-exhausted");
    let code = br#"{"code":"of-a-newer-daemon","message":"why"}"#;
    assert_eq!(serde_json::from_slice::<ApiError>(code).unwrap().message, "why");
}

/// A statement with more in it than this version writes.
fn newer<T: Signable>(value: &T, added: &[u8], signer: u8) -> Signed<T> {
    let body = [&postcard::to_allocvec(value).unwrap(), added].concat();
    let signature = identity(signer).sign(T::DOMAIN, &body);
    Signed::from_bytes(&[&[1], &signature.as_bytes()[..], &body].concat()).unwrap()
}

#[test]
fn a_record_with_more_fields_is_taken_and_passed_on_as_it_is() {
    let mut view = WORLD.clone();
    let signed = newer(&NodeRecord { version: 401, ..record(2) }, &ADDED, 2);
    let delta = Delta { records: vec![signed.clone()], ..Delta::default() };
    assert_eq!(view.merge(&delta).refused, Vec::<String>::new());
    assert_eq!(view.record(&node(2)).unwrap().version, 401);
    let (name, _) = delta.names()[0];
    assert_eq!(view.item(&name), Some(signed.to_bytes()));
}

#[test]
fn a_statement_that_says_what_this_version_does_not_know_is_refused_alone() {
    let mut view = WORLD.clone();
    // As the policy is written, up to its window; there is no window 3.
    let until = JoinPolicy {
        cluster: view.cluster(),
        serial: 10,
        signer: identity(1).public(),
        window: JoinWindow::Open,
    };
    #[derive(serde::Serialize, serde::Deserialize)]
    struct Later(ClusterId, u64, IdentityKey, u8, u64);
    impl Signable for Later {
        const DOMAIN: &'static str = JoinPolicy::DOMAIN;
        const MAX_LEN: usize = JoinPolicy::MAX_LEN;
    }
    let later = newer(&Later(until.cluster, until.serial, until.signer, 3, 5), &[], 1);
    let policy = Signed::<JoinPolicy>::from_bytes(&later.to_bytes()).unwrap();
    let record = Signed::sign(&NodeRecord { version: 401, ..record(2) }, &identity(2)).unwrap();
    let merged = view.merge(&Delta { policies: vec![policy], records: vec![record], ..Delta::default() });
    assert_eq!((merged.refused.len(), merged.new.len()), (1, 1), "{:?}", merged.refused);
    assert_eq!(view.record(&node(2)).unwrap().version, 401);
}

/// A shelf of items that are their own names and contents.
#[derive(Default)]
struct Shelf {
    items: BTreeMap<Name, Content>,
    refused: BTreeSet<Kind>,
}

impl Store for Shelf {
    fn item(&self, name: &Name) -> Option<Vec<u8>> {
        Some([&name.id[..], &self.items.get(name)?.0].concat())
    }

    fn offer(&mut self, kind: Kind, item: &[u8]) -> Offered {
        let Some((id, content)) = item.split_first_chunk().filter(|_| kind.is_known()) else {
            self.refused.insert(kind);
            return Offered::Refused;
        };
        let (name, content) = (Name { id: *id, kind }, Content(content.try_into().unwrap()));
        if self.items.insert(name, content) == Some(content) {
            return Offered::Known;
        }
        Offered::New { name, content, member: None }
    }

    fn check(&self, _: &Signed<Statement>, _: &NodeId) -> bool {
        false
    }

    fn sign(&self, _: NodeId, _: Life) -> Option<Signed<Statement>> {
        None
    }
}

fn name(number: u16, kind: Kind) -> Name {
    let hash = Sha256::digest(number.to_le_bytes());
    Name { id: hash[..16].try_into().unwrap(), kind }
}

fn pair() -> [(NodeId, Gossip, Shelf); 2] {
    [(1, 2), (2, 1)].map(|(me, other)| {
        let mut gossip = Gossip::new(node(me), WORLD.cluster(), 1, [me; 32], Time::ZERO);
        gossip.add_member(node(other), 1);
        (node(me), gossip, Shelf::default())
    })
}

#[test]
fn what_stands_beside_parts_and_items_of_a_newer_version_is_heeded() {
    let [(_, mut gossip, mut shelf), (peer, _, _)] = pair();
    let mut writer = Writer::default();
    let later = name(1, Kind(11));
    assert!(writer.push(&Part::Item { kind: later.kind, bytes: vec![5; 40] }));
    assert!(writer.push(&Part::Have { name: later, content: Content([1; 8]) }));
    assert!(writer.push(&Part::Ping { number: 77 }));
    let payload = [vec![0x20, 3, 0, 1, 2, 3], writer.take(), vec![0xf0, 0, 0]].concat();
    gossip.receive(peer, &payload, true, &mut shelf, Time::ZERO);
    let events = gossip.take_events();
    assert!(!events.iter().any(|event| matches!(event, Event::Fetch { .. })), "{events:?}");
    let sent = events
        .iter()
        .filter_map(|event| if let Event::Send { payload, .. } = event { Some(payload) } else { None });
    let mut parts = sent.flat_map(|payload| read(payload));
    assert!(parts.any(|part| part == Ok(Part::Ack { number: 77 })));
}

/// Nothing but comparing, for two minutes, with a node that has `later` items of a kind that this version does not know,
/// and breaks the rule that they are compared apart. How many bytes this one says.
fn compared(later: u16) -> usize {
    let mut pair = pair();
    for number in 0..500 {
        for (_, _, shelf) in &mut pair {
            shelf.items.insert(name(number, Kind::RECORD), Content([1; 8]));
        }
    }
    let extra = (0..later).map(|number| name(10_000 + number, Kind(11)));
    for name in extra.chain([name(20_000, Kind::GRANT)]) {
        pair[1].2.items.insert(name, Content([2; 8]));
    }
    for (_, gossip, shelf) in &mut pair {
        let mut catalogue = Catalogue::default();
        shelf.items.iter().for_each(|(name, content)| catalogue.set(*name, Some(*content)));
        gossip.start_with(catalogue, 1);
    }
    let mut said = 0;
    let mut now = Time::ZERO;
    while now < Time::ZERO + Duration::from_secs(120) {
        now = pair.iter().map(|(_, gossip, _)| gossip.poll_timeout()).min().unwrap().max(now);
        for (_, gossip, shelf) in &mut pair {
            gossip.tick(shelf, now);
        }
        loop {
            let mut sent = Vec::new();
            for (at, (_, gossip, _)) in pair.iter_mut().enumerate() {
                for event in gossip.take_events() {
                    match event {
                        Event::Send { payload, .. } => sent.push((at, payload)),
                        Event::Fetch { name, .. } => panic!("{name:?} fits into a datagram"),
                        Event::Reachable { .. } | Event::Copied { .. } => {}
                    }
                }
            }
            if sent.is_empty() {
                break;
            }
            for (from, payload) in sent {
                if from == 0 {
                    said += payload.len();
                    let wanted = read(&payload)
                        .flatten()
                        .filter_map(|part| if let Part::Want(names) = part { Some(names) } else { None });
                    assert!(wanted.flatten().all(|name| name.kind.is_known()), "asks for what it refuses");
                }
                let sender = pair[from].0;
                let (_, gossip, shelf) = &mut pair[1 - from];
                gossip.receive(sender, &payload, true, shelf, now);
            }
        }
        now = now + Duration::from_millis(1);
    }
    assert!(pair[0].2.items.contains_key(&name(20_000, Kind::GRANT)), "what it knows it learns");
    assert!(pair[0].2.items.keys().all(|name| name.kind.is_known()));
    said
}

#[test]
fn items_of_a_newer_version_are_not_asked_for_and_keep_nothing_back() {
    assert!(compared(0) < compared(300), "sums over items that one of the two cannot have never agree");
}

#[test]
fn the_kinds_that_sums_and_lists_are_about_are_these_for_ever() {
    let kinds: BTreeSet<u8> = Kind::ALL.iter().map(|kind| kind.0).collect();
    let compared: BTreeSet<u8> = (0..=10).collect();
    assert_eq!(
        kinds, compared,
        "a kind that is added needs sums and lists apart: CONTRIBUTING.md, \"Formats\""
    );
}
