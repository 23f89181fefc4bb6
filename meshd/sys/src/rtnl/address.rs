//! Addresses of devices.

use std::net::IpAddr;

use ipnet::IpNet;
use nix::errno::Errno;

use super::types::octets;
use super::{Blocking, Family, RtnlError, Scope, about, deleted};
use crate::netlink::{Attr, Attrs, Body, NLM_F_CREATE, NLM_F_REPLACE};

const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
const RTM_GETADDR: u16 = 22;

const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_FLAGS: u16 = 8;
const IFA_F_NODAD: u32 = 0x02;
const IFA_F_DADFAILED: u32 = 0x08;
const IFA_F_TENTATIVE: u32 = 0x40;
const IFA_F_NOPREFIXROUTE: u32 = 0x200;
const IFADDRMSG: usize = 8;

/// An address as the kernel shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    /// Device.
    pub index: u32,
    /// Address and prefix length; the host part is kept.
    pub net: IpNet,
    /// Scope.
    pub scope: Scope,
    /// Not usable yet: duplicate address detection runs.
    pub tentative: bool,
    /// Not usable: somebody else on the link has it.
    pub duplicate: bool,
    /// The kernel made no route for its prefix.
    pub no_prefix_route: bool,
}

/// An address to add.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AddressSpec {
    /// Address and prefix length, with the host part.
    pub net: IpNet,
    /// Scope; [`Scope::Universe`] is usual.
    pub scope: Scope,
    /// Without duplicate address detection: usable at once. IPv4 has none, so it changes nothing there.
    pub no_dad: bool,
    /// Without the kernel's own route for the prefix.
    pub no_prefix_route: bool,
}

impl AddressSpec {
    /// Usable at once, without a route of its own: what the mesh's devices take.
    #[must_use]
    pub fn plain(net: IpNet) -> Self {
        Self { net, scope: Scope::Universe, no_dad: true, no_prefix_route: true }
    }
}

fn ifaddrmsg(index: u32, family: u8, prefix: u8, scope: u8) -> [u8; IFADDRMSG] {
    let mut header = [family, prefix, 0, scope, 0, 0, 0, 0];
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    header
}

impl Blocking {
    /// The addresses of a device, or of all devices, IPv4 first.
    ///
    /// # Errors
    /// [`RtnlError`].
    pub fn addresses(&mut self, index: Option<u32>) -> Result<Vec<Address>, RtnlError> {
        let mut found = Vec::new();
        for family in Family::BOTH {
            let body = Body::new(&ifaddrmsg(0, family.raw(), 0, 0));
            let list = self.dump(RTM_GETADDR, &body).map_err(about("list", "addresses"))?;
            found.extend(list.iter().filter(|m| m.kind == RTM_NEWADDR).filter_map(|m| parse(&m.body)));
        }
        found.retain(|a| index.is_none_or(|i| a.index == i));
        Ok(found)
    }

    /// Adds an address, or makes an existing one so.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn add_address(&mut self, index: u32, spec: AddressSpec) -> Result<(), RtnlError> {
        let body = body(index, &spec);
        let object = format!("{} on device {index}", spec.net);
        match self.request(RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, &body) {
            Ok(_) => Ok(()),
            Err(other) => Err(about("add address", object)(other)),
        }
    }

    /// Deletes an address; `false` when the device or the address is not there.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn del_address(&mut self, index: u32, net: IpNet) -> Result<bool, RtnlError> {
        let mut body = Body::new(&ifaddrmsg(index, Family::of(net.addr()).raw(), net.prefix_len(), 0));
        body.bytes(IFA_LOCAL, &octets(net.addr()));
        body.bytes(IFA_ADDRESS, &octets(net.addr()));
        let result = self.request(RTM_DELADDR, 0, &body);
        deleted(result, &[Errno::EADDRNOTAVAIL, Errno::ENODEV])
            .map_err(about("delete address", format!("{net} on device {index}")))
    }
}

fn body(index: u32, spec: &AddressSpec) -> Body {
    let ip = octets(spec.net.addr());
    let mut flags = 0;
    if spec.no_dad {
        flags |= IFA_F_NODAD;
    }
    if spec.no_prefix_route {
        flags |= IFA_F_NOPREFIXROUTE;
    }
    let family = Family::of(spec.net.addr()).raw();
    let mut body = Body::new(&ifaddrmsg(index, family, spec.net.prefix_len(), spec.scope.raw()));
    body.bytes(IFA_LOCAL, &ip).bytes(IFA_ADDRESS, &ip).u32(IFA_FLAGS, flags);
    body
}

fn parse(body: &[u8]) -> Option<Address> {
    let [family, prefix, flags, scope, i0, i1, i2, i3, ..] = *body else { return None };
    Family::from_raw(family)?;
    let attrs = Attrs::after(body, IFADDRMSG);
    // On a point-to-point device IFA_ADDRESS is the other end; IFA_LOCAL, if there, is ours.
    let ip: IpAddr = attrs.find(IFA_LOCAL).or_else(|| attrs.find(IFA_ADDRESS)).and_then(Attr::ip)?;
    let flags = attrs.find(IFA_FLAGS).and_then(Attr::u32).unwrap_or_else(|| u32::from(flags));
    Some(Address {
        index: u32::from_ne_bytes([i0, i1, i2, i3]),
        net: IpNet::new(ip, prefix).ok()?,
        scope: Scope::from_raw(scope),
        tentative: flags & IFA_F_TENTATIVE != 0,
        duplicate: flags & IFA_F_DADFAILED != 0,
        no_prefix_route: flags & IFA_F_NOPREFIXROUTE != 0,
    })
}
