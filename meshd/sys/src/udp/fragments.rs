//! Whether datagrams may be cut up on their way, and at which length this host does so itself.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd;

use nix::errno::Errno;
use socket2::{Domain, Protocol, Socket, Type};

use super::borrowed::{checksum, source_for, udp_header_bytes};

/// Destination unreachable: fragmentation needed (RFC 792).
const ICMP_FRAGMENTATION_NEEDED: [u8; 2] = [3, 4];

/// Packet too big (RFC 4443, section 3.2).
const ICMP6_PACKET_TOO_BIG: [u8; 2] = [2, 0];

/// Who may cut up what a socket sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fragments {
    /// Nobody: neither routers nor this host, whatever it believes of the path's MTU. It does not learn from such packets
    /// either.
    Never,
    /// Everybody, of IPv4; of IPv6 this host, as nobody else may.
    Allowed,
}

impl Fragments {
    pub(super) fn set_on(self, socket: &impl AsRawFd, ipv4: bool) -> io::Result<()> {
        let (level, option, value) = match (self, ipv4) {
            (Self::Never, true) => (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_PROBE),
            (Self::Never, false) => (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_PROBE),
            (Self::Allowed, true) => (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_DONT),
            (Self::Allowed, false) => return Ok(()),
        };
        // SAFETY: the descriptor is open, and the option's value is an int that is alive during the call.
        #[expect(unsafe_code, reason = "nix does not have this option")]
        let result = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                level,
                option,
                (&raw const value).cast(),
                size_of::<libc::c_int>() as libc::socklen_t,
            )
        };
        Errno::result(result)?;
        Ok(())
    }
}

/// Tells the kernel that packets to an address may have so many bytes at most, IP header included: it cuts up what is
/// longer from then on, for ten minutes. It only ever lowers what it believes (RFC 8201, section 4).
///
/// It hears so as from a router: there is no other way to say it of one destination, but routes, which are the host's.
/// The message goes by the loopback device, and is about a datagram from `port` of this host, which has a socket there.
///
/// # Errors
/// Those of the kernel: no route, or no right to do so (`CAP_NET_RAW`).
pub fn narrow(port: u16, to: SocketAddr, mtu: u16) -> io::Result<()> {
    let from = SocketAddr::new(source_for(to)?, port);
    let (domain, protocol) = match to {
        SocketAddr::V4(_) => (Domain::IPV4, Protocol::ICMPV4),
        SocketAddr::V6(_) => (Domain::IPV6, Protocol::ICMPV6),
    };
    let socket = Socket::new(domain, Type::RAW, Some(protocol))?;
    let message = too_big(from, to, mtu).ok_or(io::ErrorKind::InvalidInput)?;
    let sent = socket.send_to(&message, &SocketAddr::new(from.ip(), 0).into())?;
    if sent == message.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

/// The message with the headers of a packet that was too long. Of IPv6 the kernel fills in the checksum.
fn too_big(from: SocketAddr, to: SocketAddr, mtu: u16) -> Option<Vec<u8>> {
    let kind = match (from.ip(), to.ip()) {
        (IpAddr::V4(_), IpAddr::V4(_)) => ICMP_FRAGMENTATION_NEEDED,
        (IpAddr::V6(_), IpAddr::V6(_)) => ICMP6_PACKET_TOO_BIG,
        _ => return None,
    };
    let mut message = kind.to_vec();
    message.extend([0; 4]);
    message.extend(mtu.to_be_bytes());
    message.extend(udp_header_bytes(from, to, mtu)?);
    if from.is_ipv4() {
        let sum = checksum(&[&message]);
        message[2..4].copy_from_slice(&sum.to_be_bytes());
    }
    Some(message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_message_has_the_headers_of_what_was_too_long() {
        let v4 = too_big("192.0.2.1:6784".parse().unwrap(), "192.0.2.2:7".parse().unwrap(), 1300).unwrap();
        assert_eq!((v4.len(), &v4[..2], &v4[4..8]), (8 + 28, &[3, 4][..], &[0, 0, 5, 20][..]));
        assert_eq!(checksum(&[&v4]), 0);
        assert_eq!((&v4[8 + 20..8 + 22], &v4[8 + 22..8 + 24]), (&[26, 128][..], &[0, 7][..]));
        let v6 = too_big("[2001:db8::1]:6784".parse().unwrap(), "[::9]:7".parse().unwrap(), 1400).unwrap();
        assert_eq!((v6.len(), &v6[..2], &v6[4..8]), (8 + 48, &[2, 0][..], &[0, 0, 5, 120][..]));
        assert_eq!(too_big("192.0.2.1:1".parse().unwrap(), "[::1]:1".parse().unwrap(), 1300), None);
    }
}
