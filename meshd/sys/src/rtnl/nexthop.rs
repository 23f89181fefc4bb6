//! Nexthop objects: ways that many routes share, and groups of them over which flows are spread.
//!
//! What the kernel keeps of a route it keeps at the nexthop, for all routes by it alike: routes with different
//! MTUs or source addresses by one nexthop get each other's (tried on Linux 6.18, in both families).

use std::collections::BTreeSet;
use std::fmt;

use nix::errno::Errno;

use super::{Blocking, Family, RtnlError, about, deleted};
use crate::netlink::{Attrs, Body, Failure, NLM_F_CREATE, NLM_F_EXCL};

pub(super) const RTM_NEWNEXTHOP: u16 = 104;
pub(super) const RTM_DELNEXTHOP: u16 = 105;
const RTM_GETNEXTHOP: u16 = 106;

const NHA_ID: u16 = 1;
const NHA_GROUP: u16 = 2;
const NHA_GROUP_TYPE: u16 = 3;
const NHA_BLACKHOLE: u16 = 4;
const NHA_OIF: u16 = 5;
const NHA_GATEWAY: u16 = 6;
const NHA_ENCAP: u16 = 8;
const NHA_FDB: u16 = 11;
/// `NEXTHOP_GRP_TYPE_MPATH`: by the hash of a flow alone.
const BY_HASH: [u8; 2] = [0; 2];
/// `struct nhmsg`.
const HEADER: usize = 8;
/// `struct nexthop_grp`: id, weight less one, and what must be zero.
const ENTRY: usize = 8;

/// What a nexthop is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum NexthopKind {
    /// Out of a device, without a gateway. The device is up and has a carrier: when it loses one of them, the kernel
    /// deletes the nexthop.
    Device {
        /// IP version of the routes by it.
        family: Family,
        /// Index of the device.
        dev: u32,
    },
    /// Each flow by one of these nexthops, in equal shares. The kernel takes a member that is deleted out of the
    /// group, and deletes the group with its last one, and routes with the group.
    Group(BTreeSet<u32>),
    /// Anything else the kernel has. Read only.
    Other,
}

/// A nexthop object.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Nexthop {
    /// Its id, not 0; one number space for nexthops and groups of both families.
    pub id: u32,
    /// Who made it (`nhm_protocol`).
    pub protocol: u8,
    /// What it is.
    pub kind: NexthopKind,
}

impl fmt::Display for Nexthop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.id)?;
        match &self.kind {
            NexthopKind::Device { family, dev } => write!(f, " dev {dev} ({family:?})")?,
            NexthopKind::Group(members) => write!(f, " group {members:?}")?,
            NexthopKind::Other => write!(f, " (other kind)")?,
        }
        write!(f, " protocol {}", self.protocol)
    }
}

impl Blocking {
    /// All nexthops, of whatever protocol, by id; none on a kernel that knows no nexthop objects (before Linux 5.3).
    ///
    /// # Errors
    /// [`RtnlError`].
    pub fn nexthops(&mut self) -> Result<Vec<Nexthop>, RtnlError> {
        let list = match self.dump(RTM_GETNEXTHOP, &Body::new(&[0; HEADER])) {
            Err(Failure::Kernel(refusal)) if refusal.errno == Errno::EOPNOTSUPP => Vec::new(),
            list => list.map_err(about("list", "nexthops"))?,
        };
        Ok(list.iter().filter(|m| m.kind == RTM_NEWNEXTHOP).filter_map(|m| parse(&m.body)).collect())
    }

    /// Adds a nexthop; the same one is success. None is ever changed.
    ///
    /// # Errors
    /// [`RtnlError::Occupied`] when the id belongs to another one; [`RtnlError::Invalid`]; otherwise the kernel's
    /// refusal, with `ENETDOWN` when the device is down or has no carrier.
    pub fn add_nexthop(&mut self, nexthop: Nexthop) -> Result<(), RtnlError> {
        let body = body(&nexthop)?;
        match self.request(RTM_NEWNEXTHOP, NLM_F_CREATE | NLM_F_EXCL, &body) {
            Ok(_) => return Ok(()),
            Err(Failure::Kernel(refusal)) if refusal.errno == Errno::EEXIST => {}
            Err(other) => return Err(about("add nexthop", nexthop.to_string())(other)),
        }
        match self.nexthops()?.into_iter().find(|present| present.id == nexthop.id) {
            Some(present) if present == nexthop => Ok(()),
            present => Err(RtnlError::Occupied {
                operation: "add nexthop",
                object: nexthop.to_string(),
                present: present.map_or_else(|| "another".to_owned(), |present| present.to_string()),
            }),
        }
    }

    /// Deletes a nexthop with the routes by it, whoever made them, and takes it out of groups; `false` when there is
    /// none of that id.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn del_nexthop(&mut self, id: u32) -> Result<bool, RtnlError> {
        let mut body = Body::new(&[0; HEADER]);
        body.u32(NHA_ID, id);
        let result = self.request(RTM_DELNEXTHOP, 0, &body);
        deleted(result, &[Errno::ENOENT]).map_err(about("delete nexthop", id.to_string()))
    }
}

fn body(nexthop: &Nexthop) -> Result<Body, RtnlError> {
    let invalid =
        |problem| Err(RtnlError::Invalid { operation: "nexthop", object: nexthop.to_string(), problem });
    if nexthop.id == 0 {
        return invalid("it needs an id");
    }
    let mut header = [0; HEADER];
    header[2] = nexthop.protocol;
    if let NexthopKind::Device { family, .. } = &nexthop.kind {
        header[0] = family.raw();
    }
    let mut body = Body::new(&header);
    body.u32(NHA_ID, nexthop.id);
    match &nexthop.kind {
        NexthopKind::Device { dev, .. } => body.u32(NHA_OIF, *dev),
        NexthopKind::Group(members) if members.is_empty() => return invalid("a group has members"),
        NexthopKind::Group(members) => {
            let entries = members.iter().flat_map(|id| id.to_ne_bytes().into_iter().chain([0; 4]));
            body.bytes(NHA_GROUP, &entries.collect::<Vec<u8>>())
        }
        NexthopKind::Other => return invalid("nexthops of this kind can be read, not made"),
    };
    Ok(body)
}

/// Protocol number of the nexthop that a message is about.
pub(super) fn protocol(body: &[u8]) -> Option<u8> {
    body.get(..HEADER)?.get(2).copied()
}

fn parse(body: &[u8]) -> Option<Nexthop> {
    let [family, _scope, protocol, ..] = *body.get(..HEADER)? else { return None };
    let attrs = Attrs::after(body, HEADER);
    let id = attrs.find(NHA_ID)?.u32()?;
    let device = attrs.find(NHA_OIF).and_then(|oif| oif.u32());
    let special = [NHA_BLACKHOLE, NHA_GATEWAY, NHA_ENCAP, NHA_FDB];
    let plain = special.into_iter().all(|kind| attrs.find(kind).is_none());
    let by_hash = attrs.find(NHA_GROUP_TYPE).is_none_or(|kind| kind.0 == BY_HASH);
    let kind = match (attrs.find(NHA_GROUP), device, Family::from_raw(family)) {
        (Some(group), _, _) if plain && by_hash => {
            members(group.0).map_or(NexthopKind::Other, NexthopKind::Group)
        }
        (None, Some(dev), Some(family)) if plain => NexthopKind::Device { family, dev },
        _ => NexthopKind::Other,
    };
    Some(Nexthop { id, protocol, kind })
}

/// Ids of the members of a group; `None` when their shares differ or there is none.
fn members(group: &[u8]) -> Option<BTreeSet<u32>> {
    let entries = group.chunks_exact(ENTRY);
    if group.is_empty() || !entries.remainder().is_empty() {
        return None;
    }
    entries
        .map(|entry| {
            let (id, [0, 0, ..]) = (entry.first_chunk()?, entry.get(4..)?) else { return None };
            Some(u32::from_ne_bytes(*id))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_written_is_read_back() {
        for kind in [
            NexthopKind::Device { family: Family::V4, dev: 7 },
            NexthopKind::Device { family: Family::V6, dev: 7 },
            NexthopKind::Group(BTreeSet::from([3, 4_000_000_000])),
        ] {
            let nexthop = Nexthop { id: 0x6862_0001, protocol: 118, kind };
            let written = body(&nexthop).unwrap();
            assert_eq!(parse(written.finish().unwrap()), Some(nexthop));
        }
    }

    #[test]
    fn what_we_cannot_make_is_refused_by_us() {
        for (id, kind) in [
            (0, NexthopKind::Device { family: Family::V4, dev: 7 }),
            (1, NexthopKind::Group(BTreeSet::new())),
            (1, NexthopKind::Other),
        ] {
            let refused = body(&Nexthop { id, protocol: 118, kind });
            assert!(matches!(refused, Err(RtnlError::Invalid { .. })));
        }
    }

    #[test]
    fn what_we_would_not_have_made_is_of_another_kind() {
        let of = |family: u8, attributes: &[(u16, &[u8])]| {
            let mut body = Body::new(&[family, 0, 118, 0, 0, 0, 0, 0]);
            body.u32(NHA_ID, 5);
            for (kind, value) in attributes {
                body.bytes(*kind, value);
            }
            parse(body.finish().unwrap()).unwrap().kind
        };
        let group = |weight: u8| {
            let member = |id: u32, weight: u8| id.to_ne_bytes().into_iter().chain([weight, 0, 0, 0]);
            member(9, 0).chain(member(8, weight)).collect::<Vec<u8>>()
        };
        assert_eq!(of(0, &[(NHA_GROUP, &group(0))]), NexthopKind::Group([8, 9].into()));
        for other in [
            of(2, &[(NHA_OIF, &[7, 0, 0, 0]), (NHA_GATEWAY, &[192, 0, 2, 1])]),
            of(2, &[(NHA_BLACKHOLE, &[])]),
            of(0, &[(NHA_GROUP, &group(1))]),
            of(0, &[(NHA_GROUP, &group(0)[..12])]),
            of(0, &[(NHA_GROUP, &group(0)), (NHA_GROUP_TYPE, &[1, 0])]),
        ] {
            assert_eq!(other, NexthopKind::Other);
        }
    }

    proptest! {
        #[test]
        fn any_message_ends_without_panic(bytes: Vec<u8>) {
            let _ = parse(&bytes);
        }
    }
}
