//! Control messages beside datagrams: written and read without pointers.
//!
//! The layout is the one of `cmsg(3)`: a header of length, level and type, then data, everything aligned to the size
//! of the length field. Buffers are arrays of words, so they are aligned by their type.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::socket::Source;

const WORD: usize = size_of::<usize>();
/// `sizeof(struct cmsghdr)`: a word and two ints.
const HEADER: usize = WORD + 8;

/// Room for the segment size and one address, each with its header.
pub(super) const SEND_WORDS: usize = (2 * HEADER + WORD + 24) / WORD;
/// Room for what the kernel sends: as above, and then some.
pub(super) const RECEIVE_WORDS: usize = 16;

/// Writes control messages one behind the other.
pub(super) struct Writer<'a> {
    words: &'a mut [usize],
    used: usize,
}

impl<'a> Writer<'a> {
    pub(super) fn new(words: &'a mut [usize]) -> Self {
        Self { words, used: 0 }
    }

    /// Adds a message; `data` holds at most 24 bytes.
    fn push(&mut self, level: libc::c_int, kind: libc::c_int, data: &[u8]) {
        let length = HEADER + data.len();
        let words = length.div_ceil(WORD);
        let mut bytes = [0u8; HEADER + 24];
        bytes[..WORD].copy_from_slice(&length.to_ne_bytes());
        bytes[WORD..WORD + 4].copy_from_slice(&level.to_ne_bytes());
        bytes[WORD + 4..HEADER].copy_from_slice(&kind.to_ne_bytes());
        bytes[HEADER..length].copy_from_slice(data);
        for (word, piece) in self.words[self.used..self.used + words].iter_mut().zip(bytes.chunks(WORD)) {
            let mut whole = [0; WORD];
            whole[..piece.len()].copy_from_slice(piece);
            *word = usize::from_ne_bytes(whole);
        }
        self.used += words;
    }

    pub(super) fn segment_size(&mut self, size: u16) {
        self.push(libc::SOL_UDP, libc::UDP_SEGMENT, &size.to_ne_bytes());
    }

    pub(super) fn source(&mut self, source: &Source) {
        match source.address {
            IpAddr::V4(address) => {
                // struct in_pktinfo: interface, address to send from, (unused when sending) destination.
                let mut data = [0; 12];
                data[..4].copy_from_slice(&source.interface.to_ne_bytes());
                data[4..8].copy_from_slice(&address.octets());
                self.push(libc::IPPROTO_IP, libc::IP_PKTINFO, &data);
            }
            IpAddr::V6(address) => {
                // struct in6_pktinfo: address, interface.
                let mut data = [0; 20];
                data[..16].copy_from_slice(&address.octets());
                data[16..].copy_from_slice(&source.interface.to_ne_bytes());
                self.push(libc::IPPROTO_IPV6, libc::IPV6_PKTINFO, &data);
            }
        }
    }

    /// Bytes written.
    pub(super) fn finish(self) -> usize {
        self.used * WORD
    }
}

/// What the kernel said beside a datagram.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct Received {
    /// Length of each datagram in the piece but perhaps the last.
    pub(super) segment_size: Option<usize>,
    /// The address the datagram was sent to.
    pub(super) destination: Option<Source>,
}

/// Reads `length` bytes of control messages. What is unknown or malformed is skipped.
pub(super) fn read(words: &[usize], length: usize) -> Received {
    let mut received = Received::default();
    let mut bytes = [0u8; RECEIVE_WORDS * WORD];
    for (piece, word) in bytes.chunks_mut(WORD).zip(words) {
        piece.copy_from_slice(&word.to_ne_bytes());
    }
    let mut rest = &bytes[..length.min(bytes.len())];
    while rest.len() >= HEADER {
        let mut word = [0; WORD];
        word.copy_from_slice(&rest[..WORD]);
        let length = usize::from_ne_bytes(word);
        if length < HEADER || length > rest.len() {
            break;
        }
        let int = |at: usize| {
            rest.get(at..at + 4).map(|b| i32::from_ne_bytes([b[0], b[1], b[2], b[3]])).unwrap_or_default()
        };
        let data = &rest[HEADER..length];
        match (int(WORD), int(WORD + 4)) {
            (libc::SOL_UDP, libc::UDP_GRO) if data.len() >= 4 => {
                received.segment_size = usize::try_from(int(HEADER)).ok().filter(|size| *size > 0);
            }
            (libc::IPPROTO_IP, libc::IP_PKTINFO) if data.len() >= 12 => {
                // The second member is the local address the packet was delivered to.
                let address = Ipv4Addr::new(data[4], data[5], data[6], data[7]);
                received.destination = Some(Source { address: address.into(), interface: 0 });
            }
            (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) if data.len() >= 20 => {
                let mut octets = [0; 16];
                octets.copy_from_slice(&data[..16]);
                let address = Ipv6Addr::from(octets);
                let interface =
                    if address.is_unicast_link_local() { int(HEADER + 16).cast_unsigned() } else { 0 };
                received.destination = Some(Source { address: address.into(), interface });
            }
            _ => {}
        }
        rest = rest.get(length.next_multiple_of(WORD)..).unwrap_or_default();
    }
    received
}
