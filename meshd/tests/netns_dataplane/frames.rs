//! Frames as an attacker makes them. Each carries a mark at its end by which it is found again.

use std::net::{Ipv4Addr, Ipv6Addr};

use mesh_sys::rtnl::Mac;

pub(crate) const ALL: Mac = Mac([0xff; 6]);

/// Length of the mark.
const MARK: usize = 16;

pub(crate) fn mark(mut frame: Vec<u8>, number: usize) -> Vec<u8> {
    frame.extend_from_slice(format!("dpw-frame-{number:06}").as_bytes());
    frame
}

/// The number that [`mark`] gave.
pub(crate) fn number(frame: &[u8]) -> Option<usize> {
    let tail = frame.get(frame.len().checked_sub(MARK)?..)?;
    std::str::from_utf8(tail).ok()?.strip_prefix("dpw-frame-")?.parse().ok()
}

pub(crate) fn ether(to: Mac, from: Mac, kind: u16, payload: &[u8]) -> Vec<u8> {
    [&to.0[..], &from.0, &kind.to_be_bytes(), payload].concat()
}

/// A UDP datagram to port 9, of which the mark is part.
pub(crate) fn ipv4(from: Ipv4Addr, to: Ipv4Addr) -> Vec<u8> {
    let mut packet = vec![0x45, 0, 0, 28 + MARK as u8, 0, 0, 0, 0, 64, 17, 0, 0];
    packet.extend_from_slice(&from.octets());
    packet.extend_from_slice(&to.octets());
    let sum: u32 = packet.chunks(2).map(|c| u32::from(u16::from_be_bytes([c[0], c[1]]))).sum();
    let folded = u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap();
    packet[10..12].copy_from_slice(&(!folded).to_be_bytes());
    packet.extend_from_slice(&[0, 9, 0, 9, 0, 8 + MARK as u8, 0, 0]);
    packet
}

pub(crate) fn ipv6(from: Ipv6Addr, to: Ipv6Addr, next: u8, payload: &[u8]) -> Vec<u8> {
    let len = u16::try_from(payload.len() + MARK).unwrap();
    let [hi, lo] = len.to_be_bytes();
    [&[0x60, 0, 0, 0, hi, lo, next, 255][..], &from.octets(), &to.octets(), payload].concat()
}

/// As [`ipv6`], with a right checksum of an ICMPv6 message that ends in the mark of this number.
pub(crate) fn icmpv6(from: Ipv6Addr, to: Ipv6Addr, message: &[u8], number: usize) -> Vec<u8> {
    let mut message = mark(message.to_vec(), number);
    let len = u32::try_from(message.len()).unwrap();
    let pseudo = [&from.octets()[..], &to.octets(), &len.to_be_bytes(), &[0, 0, 0, 58], &message].concat();
    let mut sum: u32 =
        pseudo.chunks(2).map(|c| u32::from(u16::from_be_bytes([c[0], c.get(1).copied().unwrap_or(0)]))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    message[2..4].copy_from_slice(&(!u16::try_from(sum).unwrap()).to_be_bytes());
    message.truncate(message.len() - MARK);
    ipv6(from, to, 58, &message)
}

/// A neighbour solicitation (135) or advertisement (136: solicited, override) with its link-layer option.
pub(crate) fn neighbour(kind: u8, target: Ipv6Addr, mac: Mac) -> Vec<u8> {
    let option = if kind == 135 { 1 } else { 2 };
    [&[kind, 0, 0, 0, 0x60, 0, 0, 0][..], &target.octets(), &[option, 1], &mac.0].concat()
}

/// A router advertisement that offers a default route for half an hour, and a prefix.
pub(crate) fn router() -> Vec<u8> {
    let mut message = vec![134, 0, 0, 0, 64, 0, 0x07, 0x08, 0, 0, 0, 0, 0, 0, 0, 0];
    message.extend_from_slice(&[3, 4, 64, 0xc0, 0, 0, 0x0e, 0x10, 0, 0, 0x0e, 0x10, 0, 0, 0, 0]);
    message.extend_from_slice(&"2001:db8:bad::".parse::<Ipv6Addr>().unwrap().octets());
    // An option of an unknown kind that holds the mark: 2 bytes of head, 6 of padding, then the mark.
    message.extend_from_slice(&[200, 3, 0, 0, 0, 0, 0, 0]);
    message
}

pub(crate) fn arp(operation: u8, mac: Mac, ip: Ipv4Addr, target: Ipv4Addr) -> Vec<u8> {
    [&[0, 1, 8, 0, 6, 4, 0, operation][..], &mac.0, &ip.octets(), &[0; 6], &target.octets()].concat()
}
