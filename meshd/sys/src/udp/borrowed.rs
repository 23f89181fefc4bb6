//! Datagrams with the port of somebody else's socket as their source.
//!
//! Whoever gets one sees it come from where that socket's own datagrams come from, through the same NATs. The socket
//! itself, a kernel's WireGuard for instance, takes no part. Answers would go to it: there are none.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

use socket2::{Domain, Protocol, Socket, Type};

use super::fragments::Fragments;

/// UDP (RFC 768).
const UDP: u8 = 17;
const UDP_HEADER: usize = 8;

/// As most hosts begin with (RFC 1700).
const HOP_LIMIT: u8 = 64;

/// `IPPROTO_RAW`: the caller makes the IP header, and nothing is ever received.
const RAW: i32 = 255;

/// Sends a datagram from a port of this host that another socket may have. The address is the one that the routes prefer.
///
/// # Errors
/// Those of the kernel: no route, or no right to do so (`CAP_NET_RAW`).
pub fn send_from(port: u16, to: SocketAddr, payload: &[u8]) -> io::Result<()> {
    send(port, to, payload, None)
}

/// The same as one packet that nobody may cut up, whatever the kernel believes of the path's MTU.
///
/// # Errors
/// As for [`send_from`]; and `EMSGSIZE` if the device that it leaves by cannot send that much at once.
pub fn send_whole_from(port: u16, to: SocketAddr, payload: &[u8]) -> io::Result<()> {
    send(port, to, payload, Some(Fragments::Never))
}

fn send(port: u16, to: SocketAddr, payload: &[u8], fragments: Option<Fragments>) -> io::Result<()> {
    let domain = if to.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 };
    let socket = Socket::new(domain, Type::RAW, Some(Protocol::from(RAW)))?;
    let from = SocketAddr::new(source_for(to)?, port);
    if let Some(fragments) = fragments {
        fragments.set_on(&socket, to.is_ipv4())?;
    }
    let packet = packet(from, to, payload, fragments == Some(Fragments::Never))
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "the datagram is too long"))?;
    // The port is in the packet.
    let mut name = to;
    name.set_port(0);
    let sent = socket.send_to(&packet, &name.into())?;
    if sent == packet.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

/// The address that the kernel sends from when nobody says which.
pub(super) fn source_for(to: SocketAddr) -> io::Result<IpAddr> {
    let any: IpAddr = if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0))?;
    // Nothing is sent by that.
    socket.connect(to)?;
    Ok(socket.local_addr()?.ip())
}

/// The whole packet; `None` when it would be too long, or the two addresses are not of one family.
fn packet(from: SocketAddr, to: SocketAddr, payload: &[u8], whole: bool) -> Option<Vec<u8>> {
    let length = u16::try_from(UDP_HEADER + payload.len()).ok()?;
    let mut udp = Vec::with_capacity(usize::from(length));
    udp.extend(udp_header(from, to, length));
    udp.extend(payload);
    let mut packet = ip_header(from.ip(), to.ip(), length, whole)?;
    let addresses = packet.get(if from.is_ipv4() { 12 } else { 8 }..)?.to_vec();
    // Over the pseudo-header as well (RFC 768, and RFC 8200, section 8.1): both come to the same sum.
    let pseudo = [&addresses[..], &[0, UDP], &length.to_be_bytes()].concat();
    let sum = match checksum(&[&pseudo, &udp]) {
        // Zero would say that there is none.
        0 => 0xffff,
        sum => sum,
    };
    udp[6..8].copy_from_slice(&sum.to_be_bytes());
    packet.extend(udp);
    Some(packet)
}

/// RFC 768, without a checksum.
fn udp_header(from: SocketAddr, to: SocketAddr, length: u16) -> [u8; UDP_HEADER] {
    let mut header = [0; UDP_HEADER];
    header[..2].copy_from_slice(&from.port().to_be_bytes());
    header[2..4].copy_from_slice(&to.port().to_be_bytes());
    header[4..6].copy_from_slice(&length.to_be_bytes());
    header
}

/// In front of `length` bytes; the addresses are at its end. `None` when that is too long, or the two addresses are not of
/// one family.
fn ip_header(from: IpAddr, to: IpAddr, length: u16, whole: bool) -> Option<Vec<u8>> {
    match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            // RFC 791, section 3.1; the kernel fills in the checksum and an identification.
            let total = length.checked_add(20)?;
            let flags = if whole { 0x40 } else { 0 };
            let mut header = vec![0x45, 0];
            header.extend(total.to_be_bytes());
            header.extend([0, 0, flags, 0, HOP_LIMIT, UDP, 0, 0]);
            header.extend(from.octets());
            header.extend(to.octets());
            Some(header)
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            // RFC 8200, section 3.
            let mut header = vec![0x60, 0, 0, 0];
            header.extend(length.to_be_bytes());
            header.extend([UDP, HOP_LIMIT]);
            header.extend(from.octets());
            header.extend(to.octets());
            Some(header)
        }
        _ => None,
    }
}

/// The headers of a packet that is a little longer than `mtu`.
pub(super) fn udp_header_bytes(from: SocketAddr, to: SocketAddr, mtu: u16) -> Option<Vec<u8>> {
    let mut headers = ip_header(from.ip(), to.ip(), mtu, true)?;
    headers.extend(udp_header(from, to, mtu));
    Some(headers)
}

/// The Internet checksum (RFC 1071) of parts, all but the last of which have an even length.
pub(super) fn checksum(parts: &[&[u8]]) -> u16 {
    let words = parts.iter().flat_map(|part| part.chunks(2));
    let sum: u32 =
        words.map(|word| u32::from(u16::from_be_bytes([word[0], *word.get(1).unwrap_or(&0)]))).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !u16::try_from((folded & 0xffff) + (folded >> 16)).unwrap_or(u16::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_that_of_rfc_1071() {
        // Its own example, in section 3.
        assert_eq!(checksum(&[&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]]), !0xddf2);
        assert_eq!(checksum(&[&[0xff, 0xff], &[0x12]]), !0x1200);
    }

    #[test]
    fn a_packet_adds_up_in_both_families() {
        for (from, to) in [("192.0.2.1:51820", "198.51.100.7:6783"), ("[2001:db8::1]:7", "[2001:db8::2]:9")] {
            let (from, to): (SocketAddr, SocketAddr) = (from.parse().unwrap(), to.parse().unwrap());
            for length in [0, 1, 2, 333] {
                let payload = vec![0xa5; length];
                let packet = packet(from, to, &payload, false).unwrap();
                let (at, width) = if from.is_ipv4() { (20, 4) } else { (40, 16) };
                let udp = &packet[at..];
                assert_eq!(udp[..2], from.port().to_be_bytes());
                assert_eq!(udp[2..4], to.port().to_be_bytes());
                assert_eq!(udp[8..], payload);
                let pseudo = [&packet[at - 2 * width..at], &[0, UDP], &udp[4..6]].concat();
                // A receiver adds the checksum itself, and gets nothing.
                assert_eq!(checksum(&[&pseudo, udp]), 0);
            }
            assert!(packet(from, to, &[0; 65_530], false).is_none());
        }
    }
}
