//! Payloads of gossip, the items in them, and by what names and sums nodes compare what they know.

use std::fmt::Debug;

use mesh_core::gossip::catalogue::{Catalogue, Content, Kind, Name, Range, Sum};
use mesh_core::gossip::liveness::{Bundle, Entry as LifeEntry, Life, Statement};
use mesh_core::gossip::wire::{Part, Writer, read};
use mesh_core::time::Time;
use mesh_core::view::Delta;
use mesh_keys::{Signable, Signed, WgPublic};

use crate::golden_set::{Entry, assert_complete, variants};
use crate::say;
use crate::world::{WORLD, identity, node, record};

variants!(part_name, PARTS: Part {
    Part::Ping { .. } => "ping",
    Part::Ack { .. } => "ack",
    Part::Ask { .. } => "ask",
    Part::Nack { .. } => "nack",
    Part::Sums(_) => "sums",
    Part::List { .. } => "list",
    Part::Want(_) => "want",
    Part::Have { .. } => "have",
    Part::Item { .. } => "item",
    Part::Probe { .. } => "path-probe",
    Part::ProbeAnswer { .. } => "path-probe-answer",
    Part::Measure { .. } => "measure",
    Part::Measured { .. } => "measured",
    Part::Pass { .. } => "pass",
    Part::Passed { .. } => "passed",
    Part::LaneHello { .. } => "lane-hello",
    Part::LaneSeen { .. } => "lane-seen",
    Part::PassedFrom { .. } => "passed-from",
    Part::LaneAt { .. } => "lane-at",
    Part::LaneTraffic { .. } => "lane-traffic",
});

fn payload(parts: &[Part]) -> Vec<u8> {
    let mut writer = Writer::default();
    assert!(parts.iter().all(|part| writer.push(part)));
    writer.take()
}

fn of_parts(name: &str, what: &str, parts: &[Part]) -> Entry {
    Entry::bytes(name, what, payload(parts), |bytes| {
        let parts: Vec<Part> = read(bytes).collect::<Result<_, _>>().map_err(say)?;
        Ok(payload(&parts))
    })
}

pub(crate) fn parts() -> Vec<Entry> {
    let name = |byte, kind| Name { id: *node(byte).as_bytes(), kind };
    let range = Range::try_from((3, vec![0xab, 0xc0])).unwrap();
    let of_gossip = [
        ("is the receiver there?", Part::Ping { number: 70_000 }),
        ("it is", Part::Ack { number: 70_001 }),
        ("ping somebody for me", Part::Ask { number: 70_002, target: node(2) }),
        ("it does not answer me either", Part::Nack { number: 70_003 }),
        (
            "sums of ranges",
            Part::Sums(vec![(Range::ALL, Sum(u128::MAX / 3)), (range, Sum(0x0123_4567_89ab_cdef))]),
        ),
        (
            "the names in a range",
            Part::List {
                range,
                names: vec![
                    (name(1, Kind::RECORD), Content([1, 2, 3, 4, 5, 6, 7, 8])),
                    (name(2, Kind::TRIES), Content([9; 8])),
                ],
            },
        ),
        ("asks for items", Part::Want(vec![name(4, Kind::GRANT), name(1, Kind::POLICY)])),
        ("an item that is too long", Part::Have { name: name(2, Kind::REMOVAL), content: Content([10; 8]) }),
        ("an item", Part::Item { kind: Kind::ADMISSION, bytes: vec![11, 12, 13] }),
    ];
    let key = WgPublic::from_bytes([14; 32]);
    let of_paths = [
        (
            "is there a way to the receiver?",
            Part::Probe { number: 70_004, relay: Some(node(3)), alarm: true },
        ),
        (
            "there is",
            Part::ProbeAnswer { number: 70_005, ready: true, seen: Some("192.0.2.7:6783".parse().unwrap()) },
        ),
        ("does this length get through?", Part::Measure { number: 70_006 }),
        ("it does", Part::Measured { number: 70_007 }),
        ("to be handed on", Part::Pass { to: node(2), datagram: vec![15; 50] }),
        ("handed on", Part::Passed { datagram: vec![16; 50] }),
        ("where a lane is", Part::LaneHello { key, serial: 0x0123_4567_89ab_cdef }),
        (
            "a lane is served",
            Part::LaneSeen {
                key,
                serial: 300,
                address: "[2001:db8::7]:51820".parse().unwrap(),
                known: false,
            },
        ),
        ("what was handed on came from here", Part::PassedFrom { address: ([192, 0, 2, 7], 6783).into() }),
        ("where a relay sees the sender's lane", Part::LaneAt { address: ([192, 0, 2, 7], 51820).into() }),
        (
            "what a lane has carried of late",
            Part::LaneTraffic { lane: 1, received: Some(70_008), sent: None },
        ),
    ];
    let parts: Vec<(&str, Part)> = of_gossip.iter().chain(&of_paths).cloned().collect();
    assert_complete(PARTS, parts.iter().map(|(_, part)| part_name(part)));
    let mut entries: Vec<Entry> = parts
        .iter()
        .map(|(what, part)| of_parts(part_name(part), what, std::slice::from_ref(part)))
        .collect();
    let together = of_gossip.map(|(_, part)| part);
    entries.push(of_parts("all", "a payload of several parts", &together));
    entries
}

fn bundle(accused: bool) -> Bundle {
    let (cluster, subject) = (WORLD.cluster(), identity(2));
    let life = Life { generation: record(2).generation, incarnation: 5 };
    let say = |by: u8| Statement::sign(&cluster, subject.node_id(), life, &identity(by)).unwrap();
    let accusations = if accused { vec![say(1), say(4)] } else { Vec::new() };
    Bundle { subject: subject.node_id(), alive: Some(say(2)), accusations }
}

/// What the item of each kind is, one of the golden cluster.
fn item(kind: Kind) -> (&'static str, Vec<u8>) {
    fn first<T: Signable>(items: &[Signed<T>]) -> Vec<u8> {
        items[0].to_bytes()
    }
    let all = WORLD.to_delta();
    match kind {
        Kind::LIVENESS => ("liveness", postcard::to_allocvec(&bundle(true)).unwrap()),
        Kind::ADMISSION => ("admission", first(&all.admissions)),
        Kind::REMOVAL => ("removal", first(&all.removals)),
        Kind::RECLAIM => ("reclaim", first(&all.reclaims)),
        Kind::GRANT => ("grant", first(&all.grants)),
        Kind::RECORD => ("record", first(&all.records)),
        Kind::PROMISES => ("promises", first(&all.promises)),
        Kind::TRIES => ("tries", first(&all.tries)),
        Kind::TOKEN => ("token", first(&all.tokens)),
        Kind::REVOCATION => ("revocation", first(&all.revocations)),
        Kind::POLICY => ("policy", first(&all.policies)),
        Kind(other) => panic!("kind {other} has no entry"),
    }
}

/// Reads an item of whatever kind, and writes it.
fn reread(bytes: &[u8]) -> Result<Vec<u8>, String> {
    let part = read(bytes).next().ok_or("empty")?.map_err(say)?;
    let Part::Item { kind, bytes } = part else { return Err("no item".to_owned()) };
    let again = if kind == Kind::LIVENESS {
        postcard::to_allocvec(&postcard::from_bytes::<Bundle>(&bytes).map_err(say)?).map_err(say)?
    } else {
        let delta = Delta::of_item(kind, &bytes).ok_or("unknown kind")?.map_err(say)?;
        if delta.names().len() != usize::from(kind != Kind::PROMISES) {
            return Err("it has no name".to_owned());
        }
        let Delta {
            admissions,
            grants,
            records,
            removals,
            reclaims,
            promises,
            tries,
            tokens,
            revocations,
            policies,
        } = delta;
        fn all<T: Signable>(items: Vec<Signed<T>>) -> Vec<u8> {
            items.iter().flat_map(Signed::to_bytes).collect()
        }
        [
            all(admissions),
            all(grants),
            all(records),
            all(removals),
            all(reclaims),
            all(promises),
            all(tries),
            all(tokens),
            all(revocations),
            all(policies),
        ]
        .concat()
    };
    Ok(payload(&[Part::Item { kind, bytes: again }]))
}

pub(crate) fn items() -> Vec<Entry> {
    let mut entries = Vec::new();
    for kind in Kind::ALL {
        let (name, bytes) = item(kind);
        let part = payload(&[Part::Item { kind, bytes }]);
        entries.push(Entry::bytes(name, format!("an item of kind {}", kind.0), part, reread));
    }

    // What two nodes know alike has the same names and the same sum, or they would compare for ever.
    let names: Vec<(Name, Content)> = WORLD.items().collect();
    let mut catalogue = Catalogue::default();
    for (name, content) in &names {
        catalogue.set(*name, Some(*content));
    }
    let sum = catalogue.sum(Range::ALL);
    entries.push(Entry::bytes(
        "names",
        "names and contents of all items of the golden cluster",
        postcard::to_allocvec(&names).unwrap(),
        |bytes| {
            postcard::to_allocvec(&postcard::from_bytes::<Vec<(Name, Content)>>(bytes).map_err(say)?)
                .map_err(say)
        },
    ));
    entries.push(Entry::bytes("sum", "sum of them", postcard::to_allocvec(&sum).unwrap(), |bytes| {
        postcard::to_allocvec(&postcard::from_bytes::<Sum>(bytes).map_err(say)?).map_err(say)
    }));
    let lives = [false, true].map(|accused| {
        let mut life = LifeEntry::new(record(2).generation);
        life.merge(&WORLD.cluster(), &bundle(accused), Time::ZERO, |_, _| true).unwrap();
        life.content().unwrap()
    });
    entries.push(Entry::bytes(
        "lives",
        "contents of the life of a node that is alive, and of one that stands accused",
        postcard::to_allocvec(&lives).unwrap(),
        |bytes| {
            postcard::to_allocvec(&postcard::from_bytes::<[Content; 2]>(bytes).map_err(say)?).map_err(say)
        },
    ));
    entries
}

fn signed<T>(name: &str, what: &str, signer: u8, written: &Signed<T>) -> Entry
where
    T: Signable + PartialEq + Debug,
{
    let signer = identity(signer);
    Entry::bytes(name, what, written.to_bytes(), move |bytes| {
        let value = Signed::<T>::from_bytes(bytes).map_err(say)?.verify(&signer.public()).map_err(say)?;
        Ok(Signed::sign(&value, &signer).map_err(say)?.to_bytes())
    })
}

/// Those that this crate defines; the others are among the golden sets of the keys.
pub(crate) fn statements() -> Vec<Entry> {
    let all = WORLD.to_delta();
    let by = |removed: u8| {
        let promises = WORLD.promises_of(&node(removed)).unwrap();
        Signed::sign(promises, &identity(removed)).unwrap()
    };
    let alive = bundle(true);
    vec![
        signed("record", "what node 2 says of itself", 2, &WORLD.signed_record(&node(2)).unwrap().clone()),
        signed(
            "grant",
            "addresses go from node 3 to node 2",
            3,
            all.grants.iter().find(|grant| grant.decode().unwrap().from == identity(3).public()).unwrap(),
        ),
        signed("reclaim", "node 1 takes over what node 3 had", 1, &all.reclaims[0]),
        signed("promises", "node 2 uses nothing more of node 3", 2, &by(2)),
        signed("alive", "node 2 says that it is alive", 2, alive.alive.as_ref().unwrap()),
        signed("accusation", "node 4 says that node 2 does not answer", 4, &alive.accusations[1]),
    ]
}
