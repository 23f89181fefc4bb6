//! Pings through a tunnel (RFC 792, RFC 4443): whether one is answered says what the daemon cannot see.

use std::io::Read as _;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use mesh_core::api::Pinged;
use socket2::{Domain, Protocol, Socket, Type};

/// Pings that are sent, and the time for the answer to each: by the end of it the daemon knows of what is not answered.
const COUNT: u32 = 6;
const ANSWER: Duration = Duration::from_secs(1);

/// Types of the messages: a request and an answer of ICMP, and of ICMPv6.
const V4: (u8, u8) = (8, 0);
const V6: (u8, u8) = (128, 129);

/// Pings an address until one ping is answered. `None` where pings cannot be sent: as a user without the right, say.
pub(super) fn ping(to: IpAddr) -> Option<Pinged> {
    let (domain, protocol) = match to {
        IpAddr::V4(_) => (Domain::IPV4, Protocol::ICMPV4),
        IpAddr::V6(_) => (Domain::IPV6, Protocol::ICMPV6),
    };
    let mut socket = Socket::new(domain, Type::RAW, Some(protocol)).ok()?;
    let identifier = std::process::id() as u16;
    for sequence in 1..=COUNT {
        let begun = Instant::now();
        let sequence = u16::try_from(sequence).unwrap_or(u16::MAX);
        let request = request(to, identifier, sequence);
        // Without a route there is no answer either.
        let is_sent = socket.send_to(&request, &SocketAddr::new(to, 0).into()).is_ok();
        loop {
            let left = ANSWER.checked_sub(begun.elapsed()).filter(|left| !left.is_zero());
            let Some(left) = left else { break };
            if !is_sent {
                std::thread::sleep(left);
                break;
            }
            socket.set_read_timeout(Some(left)).ok()?;
            let mut buffer = [0; 1500];
            let Ok(length) = socket.read(&mut buffer) else { break };
            if buffer.get(..length).is_some_and(|packet| is_answer(to, packet, identifier, sequence)) {
                let microseconds = u32::try_from(begun.elapsed().as_micros()).unwrap_or(u32::MAX);
                return Some(Pinged::Answered { microseconds });
            }
        }
    }
    Some(Pinged::Unanswered { count: COUNT })
}

/// An echo request without data. The kernel computes the checksum of ICMPv6, which covers addresses.
fn request(to: IpAddr, identifier: u16, sequence: u16) -> [u8; 8] {
    let kind = if to.is_ipv4() { V4.0 } else { V6.0 };
    let ([a, b], [c, d]) = (identifier.to_be_bytes(), sequence.to_be_bytes());
    let sum = u32::from(u16::from_be_bytes([kind, 0])) + u32::from(identifier) + u32::from(sequence);
    let folded = (sum & 0xffff) + (sum >> 16);
    let folded = (folded & 0xffff) + (folded >> 16);
    let [x, y] = if to.is_ipv4() { (!(folded as u16)).to_be_bytes() } else { [0, 0] };
    [kind, 0, x, y, a, b, c, d]
}

/// Whether what was received answers that request. IPv4 sockets of this kind get the IP header as well.
fn is_answer(to: IpAddr, packet: &[u8], identifier: u16, sequence: u16) -> bool {
    let (kind, message) = match to {
        IpAddr::V4(_) => {
            let header = packet.first().map_or(0, |first| usize::from(first & 0x0f) * 4);
            (V4.1, packet.get(header..))
        }
        IpAddr::V6(_) => (V6.1, Some(packet)),
    };
    let ([a, b], [c, d]) = (identifier.to_be_bytes(), sequence.to_be_bytes());
    let fields = message.and_then(|message| message.first_chunk::<8>());
    fields.is_some_and(|[found, _, _, _, rest @ ..]| *found == kind && *rest == [a, b, c, d])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_has_a_checksum_that_adds_up() {
        for (identifier, sequence) in [(0, 1), (0xffff, 0xffff), (0x1234, 7)] {
            let request = request([10, 0, 0, 1].into(), identifier, sequence);
            let sum: u32 =
                request.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
            assert_eq!((sum & 0xffff) + (sum >> 16), 0xffff, "{request:?}");
        }
    }

    #[test]
    fn answers_are_told_from_other_messages() {
        let (v4, v6) = ([10, 0, 0, 1].into(), IpAddr::from([0; 16]));
        let mut packet = vec![0x45; 20];
        packet.extend([0, 0, 9, 9, 0x12, 0x34, 0, 7]);
        assert!(is_answer(v4, &packet, 0x1234, 7));
        assert!(!is_answer(v4, &packet, 0x1234, 8) && !is_answer(v4, &packet[..24], 0x1234, 7));
        packet[20] = 8;
        assert!(!is_answer(v4, &packet, 0x1234, 7), "a request");
        assert!(is_answer(v6, &[129, 0, 9, 9, 0x12, 0x34, 0, 7], 0x1234, 7));
        assert!(!is_answer(v6, &[], 0x1234, 7));
    }
}
