//! Judging captured frames: is this what an underlay may carry?

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::{Arc, Mutex, PoisonError};

use ipnet::{Ipv4Net, Ipv6Net};
use memchr::memmem;
use mesh_sys::packet::Frame;

use crate::plan;
use crate::router::is_outside_port;
use crate::stream::MARKER;

/// Control sessions by TCP, gossip by UDP.
const CONTROL_PORT: u16 = 6783;
/// First byte of a sealed gossip datagram.
const GOSSIP: u8 = 0x31;
/// WireGuard.
const TUNNEL_PORT: u16 = 6784;

/// The address ranges that must never be seen on the underlay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClusterRanges {
    /// IPv4.
    pub ipv4: Ipv4Net,
    /// IPv6.
    pub ipv6: Ipv6Net,
}

/// Frames and bytes by kind.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally(pub BTreeMap<&'static str, (u64, u64)>);

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, (kind, (frames, bytes))) in self.0.iter().enumerate() {
            let separator = if number == 0 { "" } else { "\n" };
            write!(f, "{separator}{kind:<24} {frames:>9} frames {bytes:>13} bytes")?;
        }
        Ok(())
    }
}

/// Accepts what the underlay of a mesh may carry: ARP, neighbour and multicast listener discovery, TCP port
/// 6783, sealed datagrams on UDP port 6783 and UDP port 6784 between underlay addresses, without the lab's marker anywhere.
#[derive(Clone, Debug)]
pub struct Scanner {
    ranges: Option<ClusterRanges>,
    marker: memmem::Finder<'static>,
    tally: Arc<Mutex<Tally>>,
}

impl Scanner {
    /// A scanner that also knows which ranges must not be seen, when there are any yet.
    #[must_use]
    pub fn new(ranges: Option<ClusterRanges>) -> Self {
        Self { ranges, marker: memmem::Finder::new(&MARKER), tally: Arc::default() }
    }

    /// What was accepted so far. Clones of a scanner count together.
    #[must_use]
    pub fn tally(&self) -> Tally {
        self.tally.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether the frame contains the marker of the lab's own traffic.
    #[must_use]
    pub fn has_marker(&self, frame: &[u8]) -> bool {
        self.marker.find(frame).is_some()
    }

    /// What is wrong with a frame of the underlay; `None` when nothing is.
    #[must_use]
    pub fn inspect(&self, frame: &Frame<'_>) -> Option<String> {
        if self.has_marker(frame.data) {
            return Some("pod payload in the clear".to_owned());
        }
        match self.classify(frame.data) {
            Ok(kind) => {
                let mut tally = self.tally.lock().unwrap_or_else(PoisonError::into_inner);
                let entry = tally.0.entry(kind).or_default();
                entry.0 += 1;
                entry.1 += frame.data.len() as u64;
                None
            }
            Err(finding) => Some(finding),
        }
    }

    fn classify(&self, frame: &[u8]) -> Result<&'static str, String> {
        let short = || "a frame cut short".to_owned();
        let kind = frame.get(12..14).ok_or_else(short)?;
        let packet = &frame[14..];
        match kind {
            [0x08, 0x06] => {
                let arp = packet.get(..28).ok_or_else(short)?;
                for address in [v4_at(arp, 14), v4_at(arp, 24)].into_iter().flatten() {
                    self.check(address.into(), "ARP")?;
                }
                Ok("ARP")
            }
            [0x08, 0x00] => self.classify_v4(packet),
            [0x86, 0xdd] => self.classify_v6(packet),
            other => Err(format!("ethertype {:02x}{:02x}", other[0], other[1])),
        }
    }

    fn classify_v4(&self, packet: &[u8]) -> Result<&'static str, String> {
        let short = || "an IPv4 packet cut short".to_owned();
        let header = packet.get(..20).ok_or_else(short)?;
        let (from, to) = (v4_at(header, 12).ok_or_else(short)?, v4_at(header, 16).ok_or_else(short)?);
        self.check(from.into(), "IPv4")?;
        self.check(to.into(), "IPv4")?;
        if u16::from_be_bytes([header[6], header[7]]) & 0x3fff != 0 {
            return Err(format!("a fragment {from} > {to}"));
        }
        let payload = packet.get(usize::from(header[0] & 0xf) * 4..).ok_or_else(short)?;
        // An error quotes the packet it is about: that must be one that may be there itself.
        if let (1, Some(3 | 11)) = (header[9], payload.first()) {
            return self.classify_v4(payload.get(8..).ok_or_else(short)?).map(|_| "ICMP errors about these");
        }
        transport(header[9], payload, from.into(), to.into())
    }

    fn classify_v6(&self, packet: &[u8]) -> Result<&'static str, String> {
        let short = || "an IPv6 packet cut short".to_owned();
        let header = packet.get(..40).ok_or_else(short)?;
        let (from, to) = (v6_at(header, 8).ok_or_else(short)?, v6_at(header, 24).ok_or_else(short)?);
        self.check(from.into(), "IPv6")?;
        self.check(to.into(), "IPv6")?;
        let (mut next, mut payload) = (header[6], &packet[40..]);
        // Multicast listener reports carry a router alert in a hop-by-hop header.
        if next == 0 {
            let extension = payload.get(..2).ok_or_else(short)?;
            next = extension[0];
            payload = payload.get(8 + 8 * usize::from(extension[1])..).ok_or_else(short)?;
        }
        if next == 58 {
            return match payload.first().ok_or_else(short)? {
                133..=137 => Ok("ICMPv6 neighbour disc."),
                130..=132 | 143 => Ok("ICMPv6 multicast list."),
                1..=3 => {
                    self.classify_v6(payload.get(8..).ok_or_else(short)?).map(|_| "ICMP errors about these")
                }
                other => Err(format!("ICMPv6 type {other} {from} > {to}")),
            };
        }
        transport(next, payload, from.into(), to.into())
    }

    /// An address in a header must be the underlay's own, link-local, multicast or unspecified.
    fn check(&self, address: IpAddr, header: &str) -> Result<(), String> {
        let in_cluster = self.ranges.is_some_and(|ranges| match address {
            IpAddr::V4(v4) => ranges.ipv4.contains(&v4),
            IpAddr::V6(v6) => ranges.ipv6.contains(&v6),
        });
        if in_cluster {
            return Err(format!("cluster address {address} in an {header} header"));
        }
        let expected = match address {
            IpAddr::V4(v4) => plan::RANGES_V4.iter().any(|range| range.contains(&v4)) || v4.is_unspecified(),
            IpAddr::V6(v6) => {
                plan::RANGE_V6.contains(&v6)
                    || v6.is_unicast_link_local()
                    || v6.is_multicast()
                    || v6.is_unspecified()
            }
        };
        if expected { Ok(()) } else { Err(format!("foreign address {address} in an {header} header")) }
    }
}

fn transport(protocol: u8, payload: &[u8], from: IpAddr, to: IpAddr) -> Result<&'static str, String> {
    let ports = payload.get(..4).ok_or_else(|| "a transport header cut short".to_owned())?;
    let (source, destination) =
        (u16::from_be_bytes([ports[0], ports[1]]), u16::from_be_bytes([ports[2], ports[3]]));
    match protocol {
        6 if source == CONTROL_PORT || destination == CONTROL_PORT => Ok("TCP 6783 (control)"),
        17 if source == TUNNEL_PORT || destination == TUNNEL_PORT => Ok("UDP 6784 (WireGuard)"),
        17 if source == CONTROL_PORT && destination == CONTROL_PORT => match payload.get(8) {
            Some(&GOSSIP) | None => Ok("UDP 6783 (gossip)"),
            Some(other) => {
                Err(format!("UDP {from} > {to}, port {CONTROL_PORT}, but no gossip: {other:#04x}"))
            }
        },
        // A NAT was in between: the ports say nothing, the first bytes do.
        17 if is_outside_port(source) || is_outside_port(destination) => match payload.get(8..) {
            Some([1..=4, 0, 0, 0, ..]) => Ok("UDP 6784 (WireGuard)"),
            Some([] | [GOSSIP, ..]) | None => Ok("UDP 6783 (gossip)"),
            Some(other) => Err(format!(
                "UDP {from} > {to}, through a NAT, but neither gossip nor WireGuard: {other:02x?}"
            )),
        },
        6 => Err(format!("TCP {from} > {to}, neither port is {CONTROL_PORT}")),
        17 => Err(format!("UDP {from} > {to}, neither port is {TUNNEL_PORT}")),
        other => Err(format!("IP protocol {other} {from} > {to}")),
    }
}

fn v4_at(bytes: &[u8], at: usize) -> Option<Ipv4Addr> {
    Some(Ipv4Addr::from(<[u8; 4]>::try_from(bytes.get(at..at + 4)?).ok()?))
}

fn v6_at(bytes: &[u8], at: usize) -> Option<Ipv6Addr> {
    Some(Ipv6Addr::from(<[u8; 16]>::try_from(bytes.get(at..at + 16)?).ok()?))
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use mesh_sys::packet::Direction;

    use super::*;

    fn scanner() -> Scanner {
        let ranges = ClusterRanges {
            ipv4: "10.32.0.0/12".parse().unwrap(),
            ipv6: "fd11:2233:4455::/48".parse().unwrap(),
        };
        Scanner::new(Some(ranges))
    }

    fn frame(data: &[u8]) -> Frame<'_> {
        Frame { index: 1, direction: Direction::Outgoing, time: SystemTime::UNIX_EPOCH, data }
    }

    fn judge(bytes: &[u8]) -> Option<String> {
        scanner().inspect(&frame(bytes))
    }

    fn v4(from: [u8; 4], to: [u8; 4], protocol: u8, ports: (u16, u16), payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![0; 12];
        frame.extend([0x08, 0x00, 0x45, 0, 0, 0, 0, 0, 0, 0, 64, protocol, 0, 0]);
        frame.extend(from);
        frame.extend(to);
        frame.extend(ports.0.to_be_bytes());
        frame.extend(ports.1.to_be_bytes());
        frame.extend(payload);
        frame
    }

    fn v6(from: &str, to: &str, next: u8, payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![0; 12];
        frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 0, next, 64]);
        frame.extend(from.parse::<Ipv6Addr>().unwrap().octets());
        frame.extend(to.parse::<Ipv6Addr>().unwrap().octets());
        frame.extend(payload);
        frame
    }

    const A: [u8; 4] = [198, 18, 0, 1];
    const B: [u8; 4] = [198, 18, 0, 2];

    #[test]
    fn what_a_mesh_sends_is_accepted_and_counted() {
        let scanner = scanner();
        let frames = [
            v4(A, B, 17, (6784, 6784), b"ciphertext"),
            v4(A, B, 6, (40000, 6783), b"tls"),
            v4(A, B, 17, (6783, 6783), &[0, 0, 0, 0, GOSSIP, 7]),
            v6("fd00:18::1", "fd00:18::2", 17, &[0x1a, 0x80, 0x1a, 0x80, 0, 0]),
            v6("fe80::1", "ff02::1:ff00:2", 58, &[135, 0, 0, 0]),
            v6("::", "ff02::16", 0, &[58, 0, 5, 2, 0, 0, 1, 0, 143, 0]),
        ];
        for bytes in &frames {
            assert_eq!(scanner.inspect(&frame(bytes)), None);
        }
        assert_eq!(scanner.tally().0["UDP 6784 (WireGuard)"].0, 2);
        assert_eq!(scanner.tally().0["UDP 6783 (gossip)"].0, 1);
    }

    #[test]
    fn an_error_is_accepted_for_what_it_quotes() {
        let quoting = |frame: &[u8]| {
            let quoted = &frame[14..];
            let mut bytes = v4(A, B, 1, (0x0303, 0), &[0; 4]);
            bytes.extend(quoted);
            bytes
        };
        assert_eq!(judge(&quoting(&v4(B, A, 17, (6784, 6784), b""))), None);
        let leak = judge(&quoting(&v4([10, 32, 0, 5], A, 17, (6784, 6784), b"")));
        assert!(leak.unwrap().contains("cluster address 10.32.0.5"));
        assert!(judge(&quoting(&v4(B, A, 17, (53, 53), b""))).is_some());
    }

    #[test]
    fn what_must_not_be_there_is_found() {
        let cases: [(Vec<u8>, &str); 11] = [
            (v4(A, B, 17, (20_001, 6783), &[0, 0, 0, 0, 5, 0, 0, 0]), "through a NAT"),
            (v4(A, B, 17, (6783, 6783), &[0, 0, 0, 0, 4, 0, 0, 0]), "no gossip: 0x04"),
            (v4(A, B, 17, (6784, 6784), &MARKER), "payload in the clear"),
            (v4([10, 32, 0, 5], B, 17, (6784, 6784), b""), "cluster address 10.32.0.5"),
            (v4(A, [8, 8, 8, 8], 17, (6784, 6784), b""), "foreign address 8.8.8.8"),
            (v4(A, B, 17, (53, 53), b""), "neither port is 6784"),
            (v4(A, B, 1, (0, 0), b""), "IP protocol 1"),
            (
                v6("fd11:2233:4455::1", "fd00:18::2", 17, &[0x1a, 0x80, 0x1a, 0x80]),
                "cluster address fd11:2233:4455::1",
            ),
            (v6("fd00:18::1", "fd00:18::2", 58, &[128, 0, 0, 0]), "ICMPv6 type 128"),
            (vec![0; 13], "cut short"),
            ([vec![0; 12], vec![0x88, 0xcc]].concat(), "ethertype 88cc"),
        ];
        for (frame, expected) in cases {
            let finding = judge(&frame).unwrap_or_default();
            assert!(finding.contains(expected), "{finding:?} instead of {expected:?}");
        }
    }

    #[test]
    fn behind_a_nat_the_first_bytes_tell_what_it_is() {
        for data in [&[0, 0, 0, 0, 4, 0, 0, 0][..], &[0, 0, 0, 0, GOSSIP, 1], &[0, 0, 0, 0]] {
            assert_eq!(judge(&v4([192, 168, 1, 2], B, 17, (20_001, 20_002), data)), None);
        }
    }

    #[test]
    fn arp_for_a_pod_address_is_found() {
        let mut frame = vec![0; 12];
        frame.extend([0x08, 0x06, 0, 1, 8, 0, 6, 4, 0, 1, 0, 0, 0, 0, 0, 0]);
        frame.extend(A);
        frame.extend([0; 6]);
        frame.extend([10, 40, 0, 9]);
        assert!(judge(&frame).unwrap().contains("10.40.0.9"));
    }

    #[test]
    fn no_prefix_of_a_frame_panics() {
        for whole in [v4(A, B, 6, (1, 2), b"abc"), v6("::1", "::2", 0, &[0; 16])] {
            for length in 0..whole.len() {
                let _ = judge(&whole[..length]);
            }
        }
    }
}
