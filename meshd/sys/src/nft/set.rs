//! Sets, maps and their elements.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

use super::expr::NFTA_DATA_VALUE;
use super::table::{comment_data, header, verdict_data};
use super::{Table, Verdict};
use crate::netlink::Body;
use crate::rtnl::Mac;

const NFTA_SET_TABLE: u16 = 1;
pub(super) const NFTA_SET_NAME: u16 = 2;
pub(super) const NFTA_SET_FLAGS: u16 = 3;
const NFTA_SET_KEY_TYPE: u16 = 4;
const NFTA_SET_KEY_LEN: u16 = 5;
const NFTA_SET_DATA_TYPE: u16 = 6;
const NFTA_SET_DATA_LEN: u16 = 7;
const NFTA_SET_DESC: u16 = 9;
const NFTA_SET_ID: u16 = 10;
pub(super) const NFTA_SET_USERDATA: u16 = 13;
const NFTA_SET_DESC_CONCAT: u16 = 2;
const NFTA_SET_FIELD_LEN: u16 = 1;
const NFTA_LIST_ELEM: u16 = 1;

const SET_INTERVAL: u32 = 0x4;
const SET_MAP: u32 = 0x8;
const SET_CONCAT: u32 = 0x80;
const DATA_VERDICT: u32 = 0xffff_ff00;

const UDATA_KEY_BYTEORDER: u8 = 0;
pub(super) const UDATA_SET_COMMENT: u8 = 7;
const HOST_ENDIAN: u32 = 1;
const BIG_ENDIAN: u32 = 2;

pub(super) const NFTA_SET_ELEM_LIST_TABLE: u16 = 1;
pub(super) const NFTA_SET_ELEM_LIST_SET: u16 = 2;
pub(super) const NFTA_SET_ELEM_LIST_ELEMENTS: u16 = 3;
pub(super) const NFTA_SET_ELEM_KEY: u16 = 1;
pub(super) const NFTA_SET_ELEM_DATA: u16 = 2;
pub(super) const NFTA_SET_ELEM_FLAGS: u16 = 3;
pub(super) const NFTA_SET_ELEM_KEY_END: u16 = 10;
pub(super) const ELEM_INTERVAL_END: u32 = 1;

/// A nested attribute's length has 16 bits. Staying well below leaves room for one more element of
/// any size.
const MAX_LIST: usize = 60_000;

/// Type of a key's field.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FieldType {
    /// Device name, 16 bytes.
    Ifname,
    /// Ethernet address, 6 bytes.
    Mac,
    /// IPv4 address.
    V4,
    /// IPv6 address.
    V6,
    /// Transport protocol number, 1 byte.
    Proto,
    /// Port, 2 bytes.
    Port,
    /// Mark, 4 bytes.
    Mark,
    /// Ethernet type, 2 bytes.
    EtherType,
}

impl FieldType {
    /// Length in bytes, without padding.
    #[must_use]
    pub fn len(self) -> usize {
        match self {
            Self::Ifname | Self::V6 => 16,
            Self::Mac => 6,
            Self::V4 | Self::Mark => 4,
            Self::Proto => 1,
            Self::Port | Self::EtherType => 2,
        }
    }

    /// Never: every field has bytes.
    #[must_use]
    pub fn is_empty(self) -> bool {
        false
    }

    /// The number `nft` knows the type by; the kernel only stores it.
    fn nft_type(self) -> u32 {
        match self {
            Self::V4 => 7,
            Self::V6 => 8,
            Self::Mac => 9,
            Self::EtherType => 10,
            Self::Proto => 12,
            Self::Port => 13,
            Self::Mark => 19,
            Self::Ifname => 41,
        }
    }

    fn byteorder(self) -> u32 {
        match self {
            Self::Ifname | Self::Mark => HOST_ENDIAN,
            Self::Mac | Self::V4 | Self::V6 | Self::Proto | Self::Port | Self::EtherType => BIG_ENDIAN,
        }
    }
}

/// One field of a key.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Part {
    /// Device name.
    Ifname(String),
    /// Ethernet address.
    Mac(Mac),
    /// IPv4 address.
    V4(Ipv4Addr),
    /// IPv6 address.
    V6(Ipv6Addr),
    /// Transport protocol number.
    Proto(u8),
    /// Port.
    Port(u16),
    /// Mark.
    Mark(u32),
    /// Ethernet type.
    EtherType(u16),
}

impl Part {
    /// The part for an address of either family.
    #[must_use]
    pub fn ip(ip: IpAddr) -> Self {
        match ip {
            IpAddr::V4(ip) => Self::V4(ip),
            IpAddr::V6(ip) => Self::V6(ip),
        }
    }

    /// Its type.
    #[must_use]
    pub fn field_type(&self) -> FieldType {
        match self {
            Self::Ifname(_) => FieldType::Ifname,
            Self::Mac(_) => FieldType::Mac,
            Self::V4(_) => FieldType::V4,
            Self::V6(_) => FieldType::V6,
            Self::Proto(_) => FieldType::Proto,
            Self::Port(_) => FieldType::Port,
            Self::Mark(_) => FieldType::Mark,
            Self::EtherType(_) => FieldType::EtherType,
        }
    }

    /// Its bytes as they stand in a register, without padding.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        match self {
            Self::Ifname(name) => ifname(name),
            Self::Mac(mac) => mac.0.to_vec(),
            Self::V4(ip) => ip.octets().to_vec(),
            Self::V6(ip) => ip.octets().to_vec(),
            Self::Proto(proto) => vec![*proto],
            Self::Port(port) => port.to_be_bytes().to_vec(),
            Self::Mark(mark) => mark.to_ne_bytes().to_vec(),
            Self::EtherType(kind) => kind.to_be_bytes().to_vec(),
        }
    }
}

/// A device name as the kernel compares it: 16 bytes, filled with zeros. Longer names are cut, and
/// match nothing then, as no device has such a name.
pub(super) fn ifname(name: &str) -> Vec<u8> {
    let mut bytes = name.as_bytes().to_vec();
    bytes.resize(16, 0);
    bytes
}

/// The bytes of a key. A field alone stands as it is; in a concatenation each is padded to a multiple
/// of four bytes, because each starts in a register of its own.
#[must_use]
pub fn key(parts: &[Part]) -> Vec<u8> {
    if let [single] = parts {
        return single.bytes();
    }
    let mut bytes = Vec::new();
    for part in parts {
        bytes.extend_from_slice(&part.bytes());
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }
    bytes
}

/// What a set maps its keys to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SetData {
    /// Nothing: a plain set.
    None,
    /// A verdict.
    Verdict,
    /// A value.
    Value(FieldType),
}

/// A set or map to make.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Set {
    /// Name, at most 255 bytes.
    pub name: String,
    /// The key's fields in order.
    pub key: Vec<FieldType>,
    /// Keys are ranges. Elements of a single-field set must not overlap (see [`Element::prefixes`]).
    pub interval: bool,
    /// What keys map to.
    pub data: SetData,
    /// Shown by `nft list`; at most 254 bytes.
    pub comment: Option<String>,
}

impl Set {
    /// A plain set.
    #[must_use]
    pub fn new(name: impl Into<String>, key: impl Into<Vec<FieldType>>) -> Self {
        Self { name: name.into(), key: key.into(), interval: false, data: SetData::None, comment: None }
    }

    /// A set of prefixes or ranges.
    #[must_use]
    pub fn intervals(name: impl Into<String>, key: impl Into<Vec<FieldType>>) -> Self {
        Self { interval: true, ..Self::new(name, key) }
    }

    /// A verdict map.
    #[must_use]
    pub fn verdict_map(name: impl Into<String>, key: impl Into<Vec<FieldType>>) -> Self {
        Self { data: SetData::Verdict, ..Self::new(name, key) }
    }

    /// With a comment.
    #[must_use]
    pub fn comment(mut self, comment: impl Into<String>) -> Self {
        self.comment = Some(comment.into());
        self
    }

    fn key_len(&self) -> u32 {
        let len: usize = match self.key.as_slice() {
            [single] => single.len(),
            fields => fields.iter().map(|f| f.len().next_multiple_of(4)).sum(),
        };
        u32::try_from(len).unwrap_or(u32::MAX)
    }

    pub(super) fn body(&self, table: &Table, id: u32) -> Body {
        let concat = self.key.len() > 1;
        let mut flags = 0;
        if self.interval {
            flags |= SET_INTERVAL;
        }
        if concat {
            flags |= SET_CONCAT;
        }
        if self.data != SetData::None {
            flags |= SET_MAP;
        }
        let mut body = header(table.family.raw());
        body.str(NFTA_SET_TABLE, &table.name).str(NFTA_SET_NAME, &self.name).be32(NFTA_SET_FLAGS, flags);
        // nft packs the types of a concatenation into six bits each.
        let key_type = self.key.iter().fold(0u32, |all, f| (all << 6) | f.nft_type());
        body.be32(NFTA_SET_KEY_TYPE, key_type).be32(NFTA_SET_KEY_LEN, self.key_len());
        match self.data {
            SetData::None => {}
            SetData::Verdict => {
                body.be32(NFTA_SET_DATA_TYPE, DATA_VERDICT);
            }
            SetData::Value(field) => {
                let len = u32::try_from(field.len()).unwrap_or(u32::MAX);
                body.be32(NFTA_SET_DATA_TYPE, field.nft_type()).be32(NFTA_SET_DATA_LEN, len);
            }
        }
        if concat {
            body.nest(NFTA_SET_DESC, |desc| {
                desc.nest(NFTA_SET_DESC_CONCAT, |fields| {
                    for field in &self.key {
                        fields.nest(NFTA_LIST_ELEM, |f| {
                            f.be32(NFTA_SET_FIELD_LEN, u32::try_from(field.len()).unwrap_or(u32::MAX));
                        });
                    }
                });
            });
        }
        body.be32(NFTA_SET_ID, id);
        let mut userdata = Vec::new();
        if let [single] = self.key.as_slice() {
            userdata.extend_from_slice(&[UDATA_KEY_BYTEORDER, 4]);
            userdata.extend_from_slice(&single.byteorder().to_ne_bytes());
        }
        if let Some(comment) = &self.comment {
            userdata.extend_from_slice(&comment_data(UDATA_SET_COMMENT, comment));
        }
        if !userdata.is_empty() {
            body.bytes(NFTA_SET_USERDATA, &userdata);
        }
        body
    }
}

/// What a map's element maps to.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Value {
    /// A verdict.
    Verdict(Verdict),
    /// Bytes of the map's type.
    Bytes(Vec<u8>),
}

/// An element of a set or map.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Element {
    /// The key, or the first key of a range.
    pub key: Vec<u8>,
    /// In concatenations of ranges: the last key, included.
    pub key_end: Option<Vec<u8>>,
    /// In single-field interval sets: this key is the first one behind a range.
    pub interval_end: bool,
    /// What it maps to.
    pub value: Option<Value>,
}

impl Element {
    /// A plain key.
    #[must_use]
    pub fn new(parts: &[Part]) -> Self {
        Self { key: key(parts), key_end: None, interval_end: false, value: None }
    }

    /// A key with a verdict.
    #[must_use]
    pub fn verdict(parts: &[Part], verdict: Verdict) -> Self {
        Self { value: Some(Value::Verdict(verdict)), ..Self::new(parts) }
    }

    /// A key with a value.
    #[must_use]
    pub fn value(parts: &[Part], value: &Part) -> Self {
        Self { value: Some(Value::Bytes(value.bytes())), ..Self::new(parts) }
    }

    /// A range of concatenated keys, both ends included, field by field.
    #[must_use]
    pub fn range(from: &[Part], to: &[Part]) -> Self {
        Self { key_end: Some(key(to)), ..Self::new(from) }
    }

    /// The elements of a single-field interval set that hold exactly these prefixes. Overlapping and
    /// adjacent ones are merged, as the kernel refuses overlaps. All must be of the set's family.
    #[must_use]
    pub fn prefixes(nets: &[IpNet]) -> Vec<Self> {
        let mut elements = Vec::new();
        for (from, to) in merge(nets) {
            let bytes = |ip: IpAddr| Part::ip(ip).bytes();
            elements.push(Self { key: bytes(from), key_end: None, interval_end: false, value: None });
            // A range up to the very last address has no address behind it.
            if let Some(behind) = next(to) {
                elements.push(Self { key: bytes(behind), key_end: None, interval_end: true, value: None });
            }
        }
        elements
    }

    fn write(&self, list: &mut Body) {
        let data = |body: &mut Body, kind, value: &[u8]| {
            body.nest(kind, |d| {
                d.bytes(NFTA_DATA_VALUE, value);
            });
        };
        list.nest(NFTA_LIST_ELEM, |element| {
            data(element, NFTA_SET_ELEM_KEY, &self.key);
            if let Some(end) = &self.key_end {
                data(element, NFTA_SET_ELEM_KEY_END, end);
            }
            match &self.value {
                Some(Value::Verdict(verdict)) => verdict_data(element, NFTA_SET_ELEM_DATA, verdict),
                Some(Value::Bytes(bytes)) => data(element, NFTA_SET_ELEM_DATA, bytes),
                None => {}
            }
            if self.interval_end {
                element.be32(NFTA_SET_ELEM_FLAGS, ELEM_INTERVAL_END);
            }
        });
    }
}

/// The messages that hold these elements: as few as fit the length field.
pub(super) fn element_bodies(table: &Table, set: &str, elements: &[Element]) -> Vec<Body> {
    let mut bodies = Vec::new();
    let mut rest = elements;
    while !rest.is_empty() {
        let mut body = header(table.family.raw());
        body.str(NFTA_SET_ELEM_LIST_TABLE, &table.name).str(NFTA_SET_ELEM_LIST_SET, set);
        let mut taken = 0;
        body.nest(NFTA_SET_ELEM_LIST_ELEMENTS, |list| {
            let start = list.len();
            for element in rest {
                if list.len() - start > MAX_LIST {
                    break;
                }
                element.write(list);
                taken += 1;
            }
        });
        rest = rest.get(taken..).unwrap_or_default();
        bodies.push(body);
    }
    bodies
}

/// Ranges that cover exactly the union of the prefixes, ascending, with gaps between them.
fn merge(nets: &[IpNet]) -> Vec<(IpAddr, IpAddr)> {
    let mut ranges: Vec<(IpAddr, IpAddr)> = nets.iter().map(|n| (n.network(), last(n))).collect();
    ranges.sort_unstable();
    let mut merged: Vec<(IpAddr, IpAddr)> = Vec::new();
    for (from, to) in ranges {
        match merged.last_mut() {
            Some((_, end)) if from <= *end || next(*end) == Some(from) => *end = (*end).max(to),
            _ => merged.push((from, to)),
        }
    }
    merged
}

fn last(net: &IpNet) -> IpAddr {
    net.broadcast()
}

fn next(ip: IpAddr) -> Option<IpAddr> {
    match ip {
        IpAddr::V4(ip) => u32::from(ip).checked_add(1).map(|n| Ipv4Addr::from(n).into()),
        IpAddr::V6(ip) => u128::from(ip).checked_add(1).map(|n| Ipv6Addr::from(n).into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn nets(texts: &[&str]) -> Vec<IpNet> {
        texts.iter().map(|t| t.parse().unwrap()).collect()
    }

    #[test]
    fn a_field_alone_is_not_padded_but_in_a_concatenation_it_is() {
        assert_eq!(key(&[Part::Port(80)]), [0, 80]);
        assert_eq!(key(&[Part::Port(80), Part::Proto(6)]), [0, 80, 0, 0, 6, 0, 0, 0]);
        let spoof =
            key(&[Part::Ifname("mv1".into()), Part::Mac(Mac([1; 6])), Part::V4([10, 0, 0, 1].into())]);
        assert_eq!(spoof.len(), 16 + 8 + 4);
    }

    #[test]
    fn prefixes_become_ranges_without_overlap() {
        let elements =
            Element::prefixes(&nets(&["10.0.0.0/24", "10.0.1.0/24", "10.0.0.128/25", "192.168.0.0/16"]));
        let keys: Vec<_> = elements.iter().map(|e| (e.key.clone(), e.interval_end)).collect();
        assert_eq!(
            keys,
            [
                (vec![10, 0, 0, 0], false),
                (vec![10, 0, 2, 0], true),
                (vec![192, 168, 0, 0], false),
                (vec![192, 169, 0, 0], true)
            ]
        );
    }

    #[test]
    fn the_range_up_to_the_last_address_has_no_end() {
        assert_eq!(Element::prefixes(&nets(&["0.0.0.0/0"])).len(), 1);
        assert_eq!(Element::prefixes(&nets(&["ffff::/16"])).len(), 1);
        assert_eq!(Element::prefixes(&nets(&["fd00::/8"])).len(), 2);
    }

    #[test]
    fn many_elements_are_spread_over_messages_and_none_is_lost() {
        let table = Table::new(super::super::TableFamily::Inet, "t");
        let elements: Vec<_> = (0..10_000u32).map(|n| Element::new(&[Part::V4(n.into())])).collect();
        let bodies = element_bodies(&table, "s", &elements);
        assert!(bodies.len() > 1);
        let mut count = 0;
        for body in &bodies {
            let bytes = body.finish().expect("fits its length field");
            let list = crate::netlink::Attrs::after(bytes, 4).find(NFTA_SET_ELEM_LIST_ELEMENTS).unwrap();
            count += list.nested().count();
        }
        assert_eq!(count, elements.len());
    }

    proptest! {
        #[test]
        fn merged_prefixes_hold_the_same_addresses(
            input in prop::collection::vec((any::<u8>(), 24u8..=32), 0..20),
            probe: u8,
        ) {
            let nets: Vec<IpNet> = input
                .iter()
                .map(|(host, len)| IpNet::new(Ipv4Addr::new(10, 0, 0, *host).into(), *len).unwrap())
                .collect();
            let probe = IpAddr::from([10, 0, 0, probe]);
            let ranges = merge(&nets);
            prop_assert_eq!(
                nets.iter().any(|n| n.contains(&probe)),
                ranges.iter().any(|(from, to)| *from <= probe && probe <= *to)
            );
            for pair in ranges.windows(2) {
                prop_assert!(next(pair[0].1).unwrap() < pair[1].0, "overlap or touch");
            }
        }
    }
}
