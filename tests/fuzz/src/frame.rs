//! The sealed gossip datagram.

use std::collections::BTreeSet;
use std::sync::LazyLock;

use mesh_keys::frame::{Header, KIND, MAX_PAYLOAD, OVERHEAD, OpenError, Opener, SealError, Sealer, ShortId};
use mesh_keys::{NodeId, PairSecret};

use crate::Target;
use crate::world::{WORLD, rng};

pub(crate) const TARGET: Target =
    Target { name: "frame", run, seeds, words: &[&[KIND], &[0xff; 8], &[0; 8]] };

/// How many frames of one sender are there to be delivered, dropped, repeated and put out of order. More than
/// a replay window has places, so that frames fall out of it.
const FRAMES: usize = 1024;

/// What the sender sealed since it started.
static SEALED: LazyLock<Vec<Vec<u8>>> = LazyLock::new(|| {
    let mut sealer = sealer();
    let sealed = |number: usize| seal(&mut sealer, &number.to_le_bytes()).expect("eight bytes fit");
    (0..FRAMES).map(sealed).collect()
});

fn run(data: &[u8]) {
    anything(data);
    forgery(data);
    schedule(data);
}

/// Any bytes as a datagram.
fn anything(data: &[u8]) {
    let mut opener = opener();
    match (Header::parse(data), opener.open(data, resolve, pair)) {
        (Ok(header), Ok(opened)) => {
            assert_eq!(header.sender, ShortId::of(&opened.sender));
            assert_eq!((header.boot, header.counter), (opened.boot, opened.counter));
            assert_eq!(opened.payload.len(), data.len() - OVERHEAD);
        }
        (Err(parse), Err(open)) => assert_eq!(parse, open),
        (Ok(_), Err(error)) => {
            assert!(!matches!(error, OpenError::Length { .. } | OpenError::Kind { .. }), "{error}");
        }
        (Err(error), Ok(_)) => panic!("opened, although its header is refused: {error}"),
    }
    assert_eq!(opener.remembered(), 0, "a frame was remembered before its sender's start was accepted");
}

/// What is sealed opens to the same bytes; with one bit changed it opens to nothing and leaves no trace.
fn forgery(data: &[u8]) {
    let Some((choice, payload)) = data.split_first_chunk::<2>() else { return };
    let payload = &payload[..payload.len().min(MAX_PAYLOAD)];
    let mut sealed = seal(&mut sealer(), payload).expect("the payload fits");
    let mut opener = opener();
    let opened = opener.open(&sealed, resolve, pair).expect("a member sealed it");
    assert_eq!(opened.payload, payload);
    assert!(opened.first_contact);
    opener.accept(&opened);

    let bit = usize::from(u16::from_le_bytes(*choice)) % (sealed.len() * 8);
    sealed[bit / 8] ^= 1 << (bit % 8);
    assert!(opener.open(&sealed, resolve, pair).is_err(), "bit {bit} changed and nobody noticed");
    assert_eq!(opener.remembered(), 1);
}

/// Each pair of bytes names a frame that arrives: none opens twice once its start is accepted, and those that are
/// refused are repeated or late.
fn schedule(data: &[u8]) {
    let mut opener = opener();
    let mut arrived = BTreeSet::new();
    let mut first = None;
    for chunk in data.as_chunks::<2>().0 {
        let number = usize::from(u16::from_le_bytes(*chunk)) % FRAMES;
        match opener.open(&SEALED[number], resolve, pair) {
            Ok(opened) => {
                assert_eq!(opened.payload, number.to_le_bytes());
                assert_eq!(opened.first_contact, first.is_none());
                opener.accept(&opened);
                first.get_or_insert(number);
                assert!(arrived.insert(number), "frame {number} was opened twice");
            }
            // What was sealed before the first frame that was accepted counts as seen.
            Err(OpenError::Replayed { .. }) => {
                assert!(arrived.contains(&number) || first > Some(number), "frame {number} is new");
            }
            Err(OpenError::TooOld { .. }) => {
                assert!(arrived.last() > Some(&number), "frame {number} is the newest");
            }
            Err(error) => panic!("frame {number}: {error}"),
        }
    }
}

/// What the founder shares with itself and with the member: computing it takes longer than all the rest.
static SECRETS: LazyLock<[(NodeId, PairSecret); 2]> = LazyLock::new(|| {
    [&WORLD.founder, &WORLD.member]
        .map(|other| (other.node_id(), WORLD.founder.agree(&other.public()).expect("both are keys")))
});

fn sealer() -> Sealer {
    Sealer::new(&WORLD.group_key, WORLD.member.node_id(), &mut rng())
}

fn opener() -> Opener {
    Opener::new(WORLD.founder.node_id(), std::slice::from_ref(&WORLD.group_key), 4)
        .expect("one key is allowed")
}

/// From the member, for the founder.
fn seal(sealer: &mut Sealer, payload: &[u8]) -> Result<Vec<u8>, SealError> {
    let [_, (_, pair)] = &*SECRETS;
    sealer.seal(&WORLD.founder.node_id(), pair, payload)
}

fn pair(node: &NodeId) -> Option<PairSecret> {
    SECRETS.iter().find(|(other, _)| other == node).map(|(_, secret)| secret.clone())
}

fn resolve(short: &ShortId) -> Option<NodeId> {
    [WORLD.founder.node_id(), WORLD.member.node_id()].into_iter().find(|node| ShortId::of(node) == *short)
}

fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let mut longest = sealer();
    let in_order: Vec<u8> = (0..64u16).flat_map(u16::to_le_bytes).collect();
    let backwards: Vec<u8> = (0..64u16).rev().flat_map(u16::to_le_bytes).collect();
    let repeated: Vec<u8> = [5u16, 5, 900, 5, 6, 1023, 900].into_iter().flat_map(u16::to_le_bytes).collect();
    vec![
        ("sealed", SEALED[0].clone()),
        ("sealed-second", SEALED[1].clone()),
        ("sealed-empty", seal(&mut sealer(), &[]).expect("nothing fits")),
        ("sealed-longest", seal(&mut longest, &[7; MAX_PAYLOAD]).expect("the longest payload fits")),
        ("cut-off", SEALED[0][..OVERHEAD - 1].to_vec()),
        ("wireguard-initiation", [&[1u8, 0, 0, 0][..], &[9; 144]].concat()),
        ("schedule-in-order", in_order),
        ("schedule-backwards", backwards),
        ("schedule-repeated", repeated),
    ]
}
