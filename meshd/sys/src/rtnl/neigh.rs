//! Neighbour entries (IP to Ethernet) and bridge forwarding entries (Ethernet to port).

use std::net::IpAddr;

use nix::errno::Errno;

use super::types::octets;
use super::{Blocking, Family, Mac, RtnlError, about, deleted};
use crate::netlink::{Attr, Attrs, Body, NLM_F_CREATE, NLM_F_REPLACE};

const RTM_NEWNEIGH: u16 = 28;
const RTM_DELNEIGH: u16 = 29;
const RTM_GETNEIGH: u16 = 30;

const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;
const NDA_IFINDEX: u16 = 8;
const NUD_NOARP: u16 = 0x40;
const NUD_PERMANENT: u16 = 0x80;
const NTF_SELF: u8 = 0x02;
const NTF_MASTER: u8 = 0x04;
const NTF_PROXY: u8 = 0x08;
const AF_BRIDGE: u8 = 7;
const NDMSG: usize = 12;

/// A neighbour entry as the kernel shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Neighbour {
    /// Device.
    pub index: u32,
    /// IP address.
    pub ip: IpAddr,
    /// Ethernet address, where one is known.
    pub mac: Option<Mac>,
    /// Set by hand and never changed by ARP or ND.
    pub permanent: bool,
}

/// A bridge forwarding entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FdbEntry {
    /// The bridge port, or the bridge itself.
    pub index: u32,
    /// Ethernet address.
    pub mac: Mac,
    /// Whose table.
    pub target: FdbTarget,
    /// Static (does not age and does not move with [`BridgePort::learning`](super::BridgePort) on
    /// another port), as [`Blocking::add_fdb`] makes them. `false` for learned entries and for the
    /// devices' own addresses.
    pub is_static: bool,
}

/// Whose forwarding table an entry is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FdbTarget {
    /// That of the bridge the device is a port of (`bridge fdb … master`).
    Master,
    /// The device's own (`… self`).
    Own,
}

impl FdbEntry {
    /// A static entry in the table of the port's bridge.
    #[must_use]
    pub fn on_port(index: u32, mac: Mac) -> Self {
        Self { index, mac, target: FdbTarget::Master, is_static: true }
    }
}

fn ndmsg(family: u8, index: u32, state: u16, flags: u8) -> [u8; NDMSG] {
    let mut header = [0; NDMSG];
    header[0] = family;
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    header[8..10].copy_from_slice(&state.to_ne_bytes());
    header[10] = flags;
    header
}

impl Blocking {
    /// The neighbour entries of a device, both families, without proxy entries.
    ///
    /// # Errors
    /// [`RtnlError`].
    pub fn neighbours(&mut self, index: u32) -> Result<Vec<Neighbour>, RtnlError> {
        let mut found = Vec::new();
        for family in Family::BOTH {
            let mut body = Body::new(&ndmsg(family.raw(), 0, 0, 0));
            body.u32(NDA_IFINDEX, index);
            let list = self
                .dump(RTM_GETNEIGH, &body)
                .map_err(about("list", format!("neighbours of device {index}")))?;
            found.extend(list.iter().filter(|m| m.kind == RTM_NEWNEIGH).filter_map(|m| parse(&m.body)));
        }
        found.retain(|n| n.index == index);
        Ok(found)
    }

    /// Sets a permanent neighbour entry, over whatever entry there was for that address.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn add_neighbour(&mut self, index: u32, ip: IpAddr, mac: Mac) -> Result<(), RtnlError> {
        let mut body = Body::new(&ndmsg(Family::of(ip).raw(), index, NUD_PERMANENT, 0));
        body.bytes(NDA_DST, &octets(ip)).bytes(NDA_LLADDR, &mac.0);
        self.request(RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, &body)
            .map_err(about("set neighbour", format!("{ip} on device {index}")))?;
        Ok(())
    }

    /// Deletes a neighbour entry; `false` when the device or the entry is not there.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn del_neighbour(&mut self, index: u32, ip: IpAddr) -> Result<bool, RtnlError> {
        let mut body = Body::new(&ndmsg(Family::of(ip).raw(), index, 0, 0));
        body.bytes(NDA_DST, &octets(ip));
        let result = self.request(RTM_DELNEIGH, 0, &body);
        deleted(result, &[Errno::ENOENT, Errno::ENODEV, Errno::ENXIO])
            .map_err(about("delete neighbour", format!("{ip} on device {index}")))
    }

    /// The forwarding entries of a bridge port, or of a bridge (then of all its ports too).
    ///
    /// # Errors
    /// [`RtnlError`].
    pub fn fdb(&mut self, index: u32) -> Result<Vec<FdbEntry>, RtnlError> {
        let list = self
            .dump(RTM_GETNEIGH, &Body::new(&ndmsg(AF_BRIDGE, 0, 0, 0)))
            .map_err(about("list", format!("forwarding entries of device {index}")))?;
        let links = self.links()?;
        let wanted = |i: u32| i == index || links.iter().any(|l| l.index == i && l.master == Some(index));
        let entries = list.iter().filter(|m| m.kind == RTM_NEWNEIGH).filter_map(|m| parse_fdb(&m.body));
        Ok(entries.filter(|e| wanted(e.index)).collect())
    }

    /// Sets a static forwarding entry, over whatever entry there was for that address.
    ///
    /// # Errors
    /// [`RtnlError::Invalid`] for an entry that is not static; otherwise the kernel's refusal.
    pub fn add_fdb(&mut self, entry: FdbEntry) -> Result<(), RtnlError> {
        let object = format!("{} on device {}", entry.mac, entry.index);
        if !entry.is_static {
            let problem = "only static entries are made by hand";
            return Err(RtnlError::Invalid { operation: "set forwarding entry", object, problem });
        }
        let body = fdb_body(&entry, NUD_NOARP);
        self.request(RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, &body)
            .map_err(about("set forwarding entry", object))?;
        Ok(())
    }

    /// Deletes a forwarding entry; `false` when the device or the entry is not there.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn del_fdb(&mut self, entry: FdbEntry) -> Result<bool, RtnlError> {
        let result = self.request(RTM_DELNEIGH, 0, &fdb_body(&entry, 0));
        deleted(result, &[Errno::ENOENT, Errno::ENODEV])
            .map_err(about("delete forwarding entry", format!("{} on device {}", entry.mac, entry.index)))
    }
}

fn fdb_body(entry: &FdbEntry, state: u16) -> Body {
    let flags = match entry.target {
        FdbTarget::Master => NTF_MASTER,
        FdbTarget::Own => NTF_SELF,
    };
    let mut body = Body::new(&ndmsg(AF_BRIDGE, entry.index, state, flags));
    body.bytes(NDA_LLADDR, &entry.mac.0);
    body
}

fn header(body: &[u8]) -> Option<(u8, u32, u16, u8)> {
    let [family, _, _, _, i0, i1, i2, i3, s0, s1, flags, _, ..] = *body else { return None };
    Some((family, u32::from_ne_bytes([i0, i1, i2, i3]), u16::from_ne_bytes([s0, s1]), flags))
}

fn parse(body: &[u8]) -> Option<Neighbour> {
    let (family, index, state, flags) = header(body)?;
    Family::from_raw(family)?;
    if flags & NTF_PROXY != 0 {
        return None;
    }
    let attrs = Attrs::after(body, NDMSG);
    Some(Neighbour {
        index,
        ip: attrs.find(NDA_DST).and_then(Attr::ip)?,
        mac: attrs.find(NDA_LLADDR).and_then(Attr::mac).map(Mac),
        permanent: state & NUD_PERMANENT != 0,
    })
}

fn parse_fdb(body: &[u8]) -> Option<FdbEntry> {
    let (family, index, state, flags) = header(body)?;
    if family != AF_BRIDGE {
        return None;
    }
    let mac = Attrs::after(body, NDMSG).find(NDA_LLADDR).and_then(Attr::mac).map(Mac)?;
    let target = if flags & NTF_SELF != 0 { FdbTarget::Own } else { FdbTarget::Master };
    Some(FdbEntry { index, mac, target, is_static: state & NUD_NOARP != 0 })
}
