//! Packets by their fields, with checksums computed slowly and plainly.
#![allow(dead_code, reason = "the benchmark uses a part of it")]

use std::ops::Range;

use mesh_sys::tun::{Coalescer, VnetHeader, segment};

pub(crate) const FIN: u8 = 0x01;
pub(crate) const SYN: u8 = 0x02;
pub(crate) const RST: u8 = 0x04;
pub(crate) const PSH: u8 = 0x08;
pub(crate) const ACK: u8 = 0x10;
pub(crate) const URG: u8 = 0x20;
pub(crate) const ECE: u8 = 0x40;
pub(crate) const CWR: u8 = 0x80;

const TCP: u8 = 6;
const UDP: u8 = 17;

/// The fields of one packet. What is not here follows from it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Packet {
    pub(crate) ip: Ip,
    /// DSCP and ECN.
    pub(crate) service: u8,
    pub(crate) hop_limit: u8,
    /// Last byte of the source address.
    pub(crate) host: u8,
    pub(crate) ports: (u16, u16),
    pub(crate) transport: Transport,
    pub(crate) payload: Vec<u8>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Ip {
    V4 {
        id: u16,
        /// Flags and offset as they stand in the header.
        fragment: u16,
        /// A multiple of four bytes.
        options: Vec<u8>,
    },
    V6 {
        label: u32,
        /// Extension headers of eight bytes each, by their numbers; what is behind the first two bytes.
        extensions: Vec<(u8, [u8; 6])>,
    },
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Transport {
    Tcp {
        sequence: u32,
        acknowledged: u32,
        flags: u8,
        window: u16,
        urgent: u16,
        /// A multiple of four bytes.
        options: Vec<u8>,
    },
    Udp {
        checksum: bool,
    },
}

/// The Internet checksum, word by word.
pub(crate) fn checksum(parts: &[&[u8]]) -> [u8; 2] {
    let bytes = parts.concat();
    let mut sum = 0u32;
    for pair in bytes.chunks(2) {
        sum += u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!(sum as u16)).to_be_bytes()
}

impl Packet {
    pub(crate) fn is_tcp(&self) -> bool {
        matches!(self.transport, Transport::Tcp { .. })
    }

    pub(crate) fn is_v4(&self) -> bool {
        matches!(self.ip, Ip::V4 { .. })
    }

    /// Length of the headers of layer 3.
    pub(crate) fn l4(&self) -> usize {
        match &self.ip {
            Ip::V4 { options, .. } => 20 + options.len(),
            Ip::V6 { extensions, .. } => 40 + 8 * extensions.len(),
        }
    }

    /// Length of all headers.
    pub(crate) fn header_len(&self) -> usize {
        self.l4()
            + match &self.transport {
                Transport::Tcp { options, .. } => 20 + options.len(),
                Transport::Udp { .. } => 8,
            }
    }

    /// Where the checksum of layer 4 stands, from its start.
    pub(crate) fn checksum_offset(&self) -> usize {
        if self.is_tcp() { 16 } else { 6 }
    }

    fn protocol(&self) -> u8 {
        if self.is_tcp() { TCP } else { UDP }
    }

    /// Source and destination.
    fn addresses(&self) -> [Vec<u8>; 2] {
        let address = |last| {
            if self.is_v4() { vec![10, 0, 0, last] } else { [&[0xfd; 15][..], &[last]].concat() }
        };
        [address(self.host), address(200)]
    }

    /// RFC 793 section 3.1, RFC 8200 section 8.1.
    fn pseudo_header(&self, length: usize) -> Vec<u8> {
        let tail = (u32::from(self.protocol()).to_be_bytes(), (length as u32).to_be_bytes());
        [self.addresses().concat(), tail.0.to_vec(), tail.1.to_vec()].concat()
    }

    fn internet_header(&self, length: usize) -> Vec<u8> {
        match &self.ip {
            Ip::V4 { id, fragment, options } => {
                let mut header = vec![0x45 + options.len() as u8 / 4, self.service];
                header.extend(((20 + options.len() + length) as u16).to_be_bytes());
                header.extend(id.to_be_bytes());
                header.extend(fragment.to_be_bytes());
                header.extend([self.hop_limit, self.protocol(), 0, 0]);
                header.extend(self.addresses().concat());
                header.extend(options);
                let sum = checksum(&[&header]);
                header[10..12].copy_from_slice(&sum);
                header
            }
            Ip::V6 { label, extensions } => {
                let first = 6 << 28 | u32::from(self.service) << 20 | label & 0xf_ffff;
                let mut header = first.to_be_bytes().to_vec();
                header.extend(((8 * extensions.len() + length) as u16).to_be_bytes());
                let mut numbers = extensions.iter().map(|(number, _)| *number).chain([self.protocol()]);
                header.extend([numbers.next().unwrap(), self.hop_limit]);
                header.extend(self.addresses().concat());
                for ((_, content), next) in extensions.iter().zip(numbers) {
                    header.extend([next, 0]);
                    header.extend(content);
                }
                header
            }
        }
    }

    /// Layer 4 with a checksum of zero.
    fn segment(&self) -> Vec<u8> {
        let mut bytes = [self.ports.0.to_be_bytes(), self.ports.1.to_be_bytes()].concat();
        match &self.transport {
            Transport::Tcp { sequence, acknowledged, flags, window, urgent, options } => {
                bytes.extend(sequence.to_be_bytes());
                bytes.extend(acknowledged.to_be_bytes());
                bytes.extend([(5 + options.len() as u8 / 4) << 4, *flags]);
                bytes.extend(window.to_be_bytes());
                bytes.extend([0, 0]);
                bytes.extend(urgent.to_be_bytes());
                bytes.extend(options);
            }
            Transport::Udp { .. } => {
                bytes.extend(((8 + self.payload.len()) as u16).to_be_bytes());
                bytes.extend([0, 0]);
            }
        }
        bytes.extend(&self.payload);
        bytes
    }

    /// The packet as it is on the wire.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut segment = self.segment();
        let at = self.checksum_offset();
        let sum = match (&self.transport, checksum(&[&self.pseudo_header(segment.len()), &segment])) {
            (Transport::Udp { checksum: false }, _) => [0, 0],
            (Transport::Udp { .. }, [0, 0]) => [0xff, 0xff],
            (_, sum) => sum,
        };
        segment[at..at + 2].copy_from_slice(&sum);
        [self.internet_header(segment.len()), segment].concat()
    }

    /// As the kernel hands it over: a superpacket that stands for segments of `size` bytes, checksum left open.
    pub(crate) fn superpacket(&self, size: u16) -> (VnetHeader, Vec<u8>) {
        let mut segment = self.segment();
        let at = self.checksum_offset();
        let [a, b] = checksum(&[&self.pseudo_header(segment.len())]);
        segment[at..at + 2].copy_from_slice(&[!a, !b]);
        let bytes = [self.internet_header(segment.len()), segment].concat();
        // struct virtio_net_hdr: "checksum needed"; kind, beside it "with CWR"; lengths and places.
        let kind: u8 = match (&self.transport, self.is_v4()) {
            (Transport::Udp { .. }, _) => 5,
            (Transport::Tcp { flags, .. }, v4) => (if v4 { 1 } else { 4 }) | flags & CWR,
        };
        let words = [self.header_len() as u16, size, self.l4() as u16, at as u16].map(u16::to_ne_bytes);
        let header = [&[1, kind][..], words.as_flattened()].concat();
        (VnetHeader::decode(&header.try_into().unwrap()), bytes)
    }

    /// The packets that a superpacket with segments of `size` bytes stands for, as the kernel's own code cuts it.
    pub(crate) fn cut(&self, size: usize) -> Vec<Self> {
        let count = self.payload.len().div_ceil(size);
        let piece = |(index, payload): (usize, &[u8])| {
            let mut packet = Self { payload: payload.to_vec(), ..self.clone() };
            if let Ip::V4 { id, .. } = &mut packet.ip {
                *id = id.wrapping_add(index as u16);
            }
            if let Transport::Tcp { sequence, flags, .. } = &mut packet.transport {
                *sequence = sequence.wrapping_add((index * size) as u32);
                if index + 1 < count {
                    *flags &= !(FIN | PSH);
                }
                if index > 0 {
                    *flags &= !CWR;
                }
            }
            packet
        };
        self.payload.chunks(size).enumerate().map(piece).collect()
    }
}

/// The packets one behind the other, and where each is.
pub(crate) fn arena(packets: &[Vec<u8>]) -> (Vec<u8>, Vec<Range<usize>>) {
    let mut arena = Vec::new();
    let place = |packet: &Vec<u8>| {
        let start = arena.len();
        arena.extend_from_slice(packet);
        start..arena.len()
    };
    let ranges = packets.iter().map(place).collect();
    (arena, ranges)
}

/// What would be written to the device for `packets`, with the number of pieces of each.
pub(crate) fn joined(packets: &[Vec<u8>], join_udp: bool) -> Vec<(VnetHeader, Vec<u8>, usize)> {
    let (mut arena, ranges) = arena(packets);
    let mut coalescer = Coalescer::new(join_udp);
    for range in ranges {
        coalescer.push(&arena, range);
    }
    let written: Vec<_> =
        coalescer.finish(&mut arena).map(|packet| (packet.header, packet.pieces.to_vec())).collect();
    let whole = |(header, pieces): (_, Vec<Range<usize>>)| {
        let count = pieces.len();
        (header, pieces.into_iter().flat_map(|piece| arena[piece].to_vec()).collect(), count)
    };
    written.into_iter().map(whole).collect()
}

/// What would be sent for a packet that was read from the device.
pub(crate) fn segmented(header: &VnetHeader, packet: &[u8]) -> Vec<Vec<u8>> {
    let mut segments = segment(header, packet).unwrap();
    let mut out = vec![0; segments.max_len()];
    std::iter::from_fn(|| segments.write_next(&mut out).map(|length| out[..length].to_vec())).collect()
}
