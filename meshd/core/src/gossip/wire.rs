//! The payload of a gossip datagram: parts one behind the other, each with its kind and length.
//!
//! ```text
//! 0     1  kind
//! 1..3  2  length of what follows, u16 little-endian
//! 3..      the part's fields in postcard; fields of newer versions behind them
//! ```
//!
//! Parts of unknown kinds are skipped: they are a newer version's.

use std::net::SocketAddr;

use mesh_keys::{NodeId, WgPublic};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::catalogue::{Content, Kind, Name, Range, Sum};

/// Most bytes of a payload: what a sealed datagram has room for.
pub const MAX_PAYLOAD: usize = mesh_keys::frame::MAX_PAYLOAD;

const HEAD: usize = 3;

/// One part of a payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    /// Is the receiver there?
    Ping {
        /// To be put into the answer.
        number: u32,
    },
    /// It is.
    Ack {
        /// Of the ping.
        number: u32,
    },
    /// Ping somebody for me.
    Ask {
        /// To be put into the answer.
        number: u32,
        /// Whom.
        target: NodeId,
    },
    /// The one you asked for does not answer me either.
    Nack {
        /// Of the question.
        number: u32,
    },
    /// Sums of ranges, to be compared.
    Sums(Vec<(Range, Sum)>),
    /// All names in a range.
    List {
        /// The range.
        range: Range,
        /// The names.
        names: Vec<(Name, Content)>,
    },
    /// Send these.
    Want(Vec<Name>),
    /// There is an item that does not fit into a datagram.
    Have {
        /// Its name.
        name: Name,
        /// Its content.
        content: Content,
    },
    /// Is there a way to the receiver, the one that this comes by?
    Probe {
        /// To be put into the answer.
        number: u32,
        /// The relay that the tunnel between the two is to take: the word of the one that leads.
        relay: Option<NodeId>,
        /// The sender has trouble with the tunnel.
        alarm: bool,
    },
    /// There is, and back.
    ProbeAnswer {
        /// Of the probe.
        number: u32,
        /// Through a relay: whether the sender's lane is registered there.
        ready: bool,
        /// Directly: where the probe came from.
        seen: Option<SocketAddr>,
    },
    /// Does a packet of the length of this one get through? Of that length it is by what is behind the number:
    /// [`measure`] makes such a payload.
    Measure {
        /// To be put into the answer.
        number: u32,
    },
    /// It does.
    Measured {
        /// Of the [`Part::Measure`].
        number: u32,
    },
    /// To be handed on to a member, in [`Part::Passed`].
    Pass {
        /// To whom.
        to: NodeId,
        /// A datagram that is sealed for it.
        datagram: Vec<u8>,
    },
    /// A datagram from a member, which the sender of this one hands on.
    Passed {
        /// It is sealed for the receiver.
        datagram: Vec<u8>,
    },
    /// The lane with this key is where this datagram comes from: the receiver shall relay for it.
    LaneHello {
        /// Public key of the lane.
        key: WgPublic,
        /// Grows with each one.
        serial: u64,
    },
    /// The sender relays for the lane.
    LaneSeen {
        /// Public key of the lane.
        key: WgPublic,
        /// Of the [`Part::LaneHello`].
        serial: u64,
        /// Where that came from.
        address: SocketAddr,
        /// Whether it did so before already, and knows the sessions of the lane.
        known: bool,
    },
    /// Where what comes in the next [`Part::Passed`] was sent from.
    PassedFrom {
        /// As the sender of this one sees it.
        address: SocketAddr,
    },
    /// Where the sender's lane is seen by the relay that hands this on.
    LaneAt {
        /// As it has said.
        address: SocketAddr,
    },
    /// How long ago the sender's lane last received something from the receiver, and sent something to it, in milliseconds;
    /// none: not since it began to look. For people: it names the direction in which a port is closed.
    LaneTraffic {
        /// Number of the lane.
        lane: u8,
        /// Since something came.
        received: Option<u32>,
        /// Since something was sent.
        sent: Option<u32>,
    },
    /// An item, as its kind has it.
    Item {
        /// What it is.
        kind: Kind,
        /// The item.
        bytes: Vec<u8>,
    },
}

impl Part {
    /// Whether it is about paths, and none of gossip's.
    pub fn is_of_paths(&self) -> bool {
        match self {
            Self::Probe { .. }
            | Self::ProbeAnswer { .. }
            | Self::Measure { .. }
            | Self::Measured { .. }
            | Self::Pass { .. }
            | Self::Passed { .. }
            | Self::LaneHello { .. }
            | Self::LaneSeen { .. }
            | Self::PassedFrom { .. }
            | Self::LaneAt { .. }
            | Self::LaneTraffic { .. } => true,
            Self::Ping { .. }
            | Self::Ack { .. }
            | Self::Ask { .. }
            | Self::Nack { .. }
            | Self::Sums(_)
            | Self::List { .. }
            | Self::Want(_)
            | Self::Have { .. }
            | Self::Item { .. } => false,
        }
    }
}

const PING: u8 = 1;
const ACK: u8 = 2;
const ASK: u8 = 3;
const NACK: u8 = 4;
const SUMS: u8 = 5;
const LIST: u8 = 6;
const WANT: u8 = 7;
const HAVE: u8 = 8;
const PROBE: u8 = 9;
const PROBE_ANSWER: u8 = 10;
const PASS: u8 = 11;
const PASSED: u8 = 12;
const LANE_HELLO: u8 = 13;
const LANE_SEEN: u8 = 14;
const PASSED_FROM: u8 = 15;
const LANE_AT: u8 = 16;
const MEASURE: u8 = 17;
const MEASURED: u8 = 18;
const LANE_TRAFFIC: u8 = 20;
/// And the kind of the item: none of the others may come here.
const ITEM: u8 = 0x40;

/// A payload that does not consist of parts. Those before the fault are good.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// The payload ends within a part.
    #[error("the payload ends {missing} bytes before its last part does")]
    Cut {
        /// Bytes missing.
        missing: usize,
    },
    /// The fields of a part.
    #[error("part of kind {kind:#04x}: {error}")]
    Fields {
        /// Its kind.
        kind: u8,
        /// What the decoder says.
        error: postcard::Error,
    },
}

/// Collects parts into payloads that each fit into a datagram.
#[derive(Debug, Default)]
pub struct Writer {
    bytes: Vec<u8>,
}

impl Writer {
    /// Appends a part if there is room for it; whether there was.
    pub fn push(&mut self, part: &Part) -> bool {
        match part {
            Part::Ping { number } => self.write(PING, number),
            Part::Ack { number } => self.write(ACK, number),
            Part::Ask { number, target } => self.write(ASK, &(number, target)),
            Part::Nack { number } => self.write(NACK, number),
            Part::Sums(sums) => self.write(SUMS, sums),
            Part::List { range, names } => self.write(LIST, &(range, names)),
            Part::Want(names) => self.write(WANT, names),
            Part::Have { name, content } => self.write(HAVE, &(name, content)),
            Part::Probe { number, relay, alarm } => self.write(PROBE, &(number, relay, alarm)),
            Part::ProbeAnswer { number, ready, seen } => self.write(PROBE_ANSWER, &(number, ready, seen)),
            Part::Measure { number } => self.write(MEASURE, number),
            Part::Measured { number } => self.write(MEASURED, number),
            Part::Pass { to, datagram } => self.write(PASS, &(to, datagram)),
            Part::Passed { datagram } => self.write(PASSED, datagram),
            Part::LaneHello { key, serial } => self.write(LANE_HELLO, &(key, serial)),
            Part::LaneSeen { key, serial, address, known } => {
                self.write(LANE_SEEN, &(key, serial, address, known))
            }
            Part::PassedFrom { address } => self.write(PASSED_FROM, address),
            Part::LaneAt { address } => self.write(LANE_AT, address),
            Part::LaneTraffic { lane, received, sent } => self.write(LANE_TRAFFIC, &(lane, received, sent)),
            Part::Item { kind, bytes } => self.push_item(*kind, bytes),
        }
    }

    /// Appends an item if there is room for it; whether there was.
    pub fn push_item(&mut self, kind: Kind, item: &[u8]) -> bool {
        let Some(length) = u16::try_from(item.len()).ok().filter(|_| kind.0 < 0x40) else { return false };
        if self.bytes.len() + HEAD + item.len() > MAX_PAYLOAD {
            return false;
        }
        self.bytes.push(ITEM | kind.0);
        self.bytes.extend_from_slice(&length.to_le_bytes());
        self.bytes.extend_from_slice(item);
        true
    }

    fn write(&mut self, kind: u8, fields: &impl Serialize) -> bool {
        // Fails only for types that postcard cannot express; a test writes every part.
        let body = postcard::to_allocvec(fields).unwrap_or_default();
        let Ok(length) = u16::try_from(body.len()) else { return false };
        if self.bytes.len() + HEAD + body.len() > MAX_PAYLOAD {
            return false;
        }
        self.bytes.push(kind);
        self.bytes.extend_from_slice(&length.to_le_bytes());
        self.bytes.extend_from_slice(&body);
        true
    }

    /// Whether nothing has been written.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The payload; the writer is empty then.
    pub fn take(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.bytes)
    }
}

/// A payload of exactly `length` bytes that asks whether a packet with it gets through; `None` when that is too short or
/// too long for one.
pub fn measure(number: u32, length: usize) -> Option<Vec<u8>> {
    let mut writer = Writer::default();
    writer.push(&Part::Measure { number });
    let mut payload = writer.take();
    let behind = u16::try_from(length.checked_sub(HEAD)?).ok().filter(|_| length >= payload.len())?;
    payload.get_mut(1..HEAD)?.copy_from_slice(&behind.to_le_bytes());
    payload.resize(length, 0);
    Some(payload)
}

/// Reads a payload, part by part.
pub fn read(payload: &[u8]) -> impl Iterator<Item = Result<Part, Malformed>> {
    let mut rest = payload;
    std::iter::from_fn(move || {
        loop {
            let (&kind, after) = rest.split_first()?;
            let Some((length, after)) = after.split_first_chunk() else {
                let missing = 2 - after.len();
                rest = &[];
                return Some(Err(Malformed::Cut { missing }));
            };
            let length = usize::from(u16::from_le_bytes(*length));
            let Some((body, after)) = after.split_at_checked(length) else {
                let missing = length - after.len();
                rest = &[];
                return Some(Err(Malformed::Cut { missing }));
            };
            rest = after;
            if let Some(part) = part(kind, body) {
                return Some(part);
            }
        }
    })
}

fn part(kind: u8, body: &[u8]) -> Option<Result<Part, Malformed>> {
    let part = match kind {
        PING => fields(kind, body).map(|number| Part::Ping { number }),
        ACK => fields(kind, body).map(|number| Part::Ack { number }),
        ASK => fields(kind, body).map(|(number, target)| Part::Ask { number, target }),
        NACK => fields(kind, body).map(|number| Part::Nack { number }),
        SUMS => fields(kind, body).map(Part::Sums),
        LIST => fields(kind, body).map(|(range, names)| Part::List { range, names }),
        WANT => fields(kind, body).map(Part::Want),
        HAVE => fields(kind, body).map(|(name, content)| Part::Have { name, content }),
        PROBE => fields(kind, body).map(|(number, relay, alarm)| Part::Probe { number, relay, alarm }),
        PROBE_ANSWER => {
            fields(kind, body).map(|(number, ready, seen)| Part::ProbeAnswer { number, ready, seen })
        }
        MEASURE => fields(kind, body).map(|number| Part::Measure { number }),
        MEASURED => fields(kind, body).map(|number| Part::Measured { number }),
        PASS => fields(kind, body).map(|(to, datagram)| Part::Pass { to, datagram }),
        PASSED => fields(kind, body).map(|datagram| Part::Passed { datagram }),
        LANE_HELLO => fields(kind, body).map(|(key, serial)| Part::LaneHello { key, serial }),
        LANE_SEEN => fields(kind, body).map(|(key, serial, address, known)| Part::LaneSeen {
            key,
            serial,
            address,
            known,
        }),
        PASSED_FROM => fields(kind, body).map(|address| Part::PassedFrom { address }),
        LANE_AT => fields(kind, body).map(|address| Part::LaneAt { address }),
        LANE_TRAFFIC => {
            fields(kind, body).map(|(lane, received, sent)| Part::LaneTraffic { lane, received, sent })
        }
        ITEM..0x80 => Ok(Part::Item { kind: Kind(kind & !ITEM), bytes: body.to_vec() }),
        _ => return None,
    };
    Some(part)
}

/// Bytes behind the fields are a newer version's.
fn fields<T: DeserializeOwned>(kind: u8, body: &[u8]) -> Result<T, Malformed> {
    postcard::take_from_bytes(body)
        .map(|(fields, _newer)| fields)
        .map_err(|error| Malformed::Fields { kind, error })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn every_part() -> Vec<Part> {
        let node = NodeId::from_bytes([7; 16]);
        let name = Name { id: [3; 16], kind: Kind(2) };
        vec![
            Part::Ping { number: u32::MAX },
            Part::Ack { number: 300 },
            Part::Ask { number: 4, target: node },
            Part::Nack { number: 5 },
            Part::Sums(vec![(Range::ALL, Sum(u128::MAX))]),
            Part::List { range: Range::ALL, names: vec![(name, Content([1; 8]))] },
            Part::Want(vec![name, name]),
            Part::Have { name, content: Content([2; 8]) },
            Part::Probe { number: 6, relay: Some(node), alarm: true },
            Part::ProbeAnswer { number: 7, ready: true, seen: Some(([192, 0, 2, 1], 6783).into()) },
            Part::Measure { number: 300 },
            Part::Measured { number: u32::MAX },
            Part::Pass { to: node, datagram: vec![6; 60] },
            Part::Passed { datagram: vec![7; 60] },
            Part::LaneHello { key: WgPublic::from_bytes([8; 32]), serial: u64::MAX },
            Part::PassedFrom { address: ([192, 0, 2, 1], 6783).into() },
            Part::LaneAt { address: ([192, 0, 2, 1], 20_000).into() },
            Part::LaneTraffic { lane: 1, received: Some(u32::MAX), sent: None },
            Part::LaneSeen {
                key: WgPublic::from_bytes([8; 32]),
                serial: 9,
                address: "[2001:db8::1]:51820".parse().unwrap(),
                known: true,
            },
            Part::Item { kind: Kind(0x3f), bytes: vec![5; 300] },
        ]
    }

    #[test]
    fn what_is_written_is_read() {
        let mut writer = Writer::default();
        assert!(every_part().iter().all(|part| writer.push(part)));
        let read: Result<Vec<_>, _> = read(&writer.take()).collect();
        assert_eq!(read, Ok(every_part()));
        assert!(writer.is_empty());
    }

    #[test]
    fn newer_parts_and_fields_are_passed_over() {
        let mut payload = vec![0x20, 3, 0, 1, 2, 3];
        payload.extend([ACK, 4, 0, 9, 77, 77, 77]);
        payload.extend([0x80, 0, 0]);
        let read: Result<Vec<_>, _> = read(&payload).collect();
        assert_eq!(read, Ok(vec![Part::Ack { number: 9 }]));
    }

    #[test]
    fn what_measures_has_the_length_that_is_wanted() {
        for number in [0, 127, 128, u32::MAX] {
            for length in [8, 9, 1_100, 9_000] {
                let payload = measure(number, length).unwrap();
                assert_eq!(payload.len(), length);
                let read: Result<Vec<_>, _> = read(&payload).collect();
                assert_eq!(read, Ok(vec![Part::Measure { number }]));
            }
        }
        assert_eq!((measure(u32::MAX, 7), measure(0, HEAD + 65_536)), (None, None));
    }

    #[test]
    fn a_payload_is_never_longer_than_a_datagram_has_room_for() {
        let mut writer = Writer::default();
        let item = Part::Item { kind: Kind(1), bytes: vec![0; 300] };
        let mut count = 0;
        while writer.push(&item) {
            count += 1;
        }
        assert_eq!((count, writer.push(&Part::Ack { number: 1 })), (3, true));
        assert!(writer.take().len() <= MAX_PAYLOAD);
        assert!(!writer.push(&Part::Item { kind: Kind(1), bytes: vec![0; MAX_PAYLOAD] }));
        assert!(!writer.push(&Part::Item { kind: Kind(0x40), bytes: vec![] }), "no such kind");
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(payload in prop::collection::vec(any::<u8>(), 0..300)) {
            let parts: Vec<_> = read(&payload).collect();
            prop_assert!(parts.len() <= payload.len());
        }

        #[test]
        fn what_is_cut_off_is_noticed(length in 1usize..500) {
            let mut writer = Writer::default();
            every_part().iter().for_each(|part| { writer.push(part); });
            let whole = writer.take();
            let cut = length.min(whole.len() - 1);
            let (good, bad): (Vec<_>, Vec<_>) = read(&whole[..cut]).partition(Result::is_ok);
            let good: Vec<_> = good.into_iter().flatten().collect();
            prop_assert_eq!(&good[..], &every_part()[..good.len()]);
            prop_assert!(bad.len() <= 1 && good.len() < every_part().len());
        }
    }
}
