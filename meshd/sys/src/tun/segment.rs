//! Cutting a superpacket into the packets it stands for, and completing checksums the kernel left open.

use super::checksum::{add, copy_and_add, finish, word};
use super::header::{GsoKind, VnetHeader};

/// Why a packet from the kernel cannot be sent on. It is dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SegmentError {
    /// The packet is not IPv4 or IPv6, or shorter than its headers.
    #[error("the packet is shorter than its headers or not IP")]
    Malformed,
    /// Header fields point outside of the packet or contradict it.
    #[error("the virtio header does not fit the packet")]
    BadHeader,
    /// A kind of superpacket that was not asked for.
    #[error("unknown kind of superpacket {0}")]
    UnknownKind(u8),
}

const TCP: u8 = 6;
const UDP: u8 = 17;
const TCP_FIN_PSH: u8 = 0x09;
const TCP_CWR: u8 = 0x80;

/// The packets of one TUN read, written out one by one by [`Segments::write_next`].
#[derive(Debug)]
pub struct Segments<'a> {
    packet: &'a [u8],
    kind: Kind,
    /// Bytes of headers that every segment repeats.
    header_len: usize,
    /// Where layer 4 begins.
    l4: usize,
    /// Payload bytes per segment.
    size: usize,
    /// Payload bytes already written.
    done: usize,
    /// Segments already written.
    count: usize,
    finished: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Copied as it is, checksum completed at this offset if there is one.
    Whole {
        checksum_at: Option<usize>,
    },
    Tcp,
    Udp,
}

/// Plans the segmentation of what one TUN read returned.
///
/// # Errors
/// [`SegmentError`] when header and packet do not fit each other.
pub fn segment<'a>(header: &VnetHeader, packet: &'a [u8]) -> Result<Segments<'a>, SegmentError> {
    let version = packet.first().ok_or(SegmentError::Malformed)? >> 4;
    let ip_len = match version {
        4 => usize::from(packet[0] & 15) * 4,
        6 => 40,
        _ => return Err(SegmentError::Malformed),
    };
    if packet.len() < ip_len || ip_len < 20 || packet.len() > usize::from(u16::MAX) + 40 {
        return Err(SegmentError::Malformed);
    }
    let l4 = usize::from(header.checksum_start);
    let checksum_at = l4 + usize::from(header.checksum_offset);
    if header.needs_checksum && (l4 < ip_len || checksum_at + 2 > packet.len()) {
        return Err(SegmentError::BadHeader);
    }
    let mut segments =
        Segments { packet, kind: Kind::Tcp, header_len: 0, l4, size: 0, done: 0, count: 0, finished: false };
    let transport_len = match header.gso {
        GsoKind::None => {
            segments.kind = Kind::Whole { checksum_at: header.needs_checksum.then_some(checksum_at) };
            return Ok(segments);
        }
        GsoKind::Tcp4 | GsoKind::Tcp6 => {
            if (header.gso == GsoKind::Tcp4) != (version == 4) || header.checksum_offset != 16 {
                return Err(SegmentError::BadHeader);
            }
            usize::from(packet.get(l4 + 12).ok_or(SegmentError::BadHeader)? >> 4) * 4
        }
        GsoKind::Udp => {
            if header.checksum_offset != 6 {
                return Err(SegmentError::BadHeader);
            }
            segments.kind = Kind::Udp;
            8
        }
        GsoKind::Unknown(kind) => return Err(SegmentError::UnknownKind(kind)),
    };
    segments.header_len = l4 + transport_len;
    segments.size = usize::from(header.gso_size);
    let shortest = if segments.kind == Kind::Tcp { 20 } else { 8 };
    if !header.needs_checksum
        || segments.size == 0
        || transport_len < shortest
        || segments.header_len > packet.len()
        || packet.len() - l4 > usize::from(u16::MAX)
    {
        return Err(SegmentError::BadHeader);
    }
    Ok(segments)
}

impl Segments<'_> {
    /// Length of the longest packet that [`Segments::write_next`] will write.
    #[must_use]
    pub fn max_len(&self) -> usize {
        match self.kind {
            Kind::Whole { .. } => self.packet.len(),
            Kind::Tcp | Kind::Udp => self.packet.len().min(self.header_len + self.size),
        }
    }

    /// How many packets [`Segments::write_next`] will write.
    #[must_use]
    pub fn count(&self) -> usize {
        match self.kind {
            Kind::Whole { .. } => 1,
            Kind::Tcp | Kind::Udp => (self.packet.len() - self.header_len).div_ceil(self.size).max(1),
        }
    }

    /// Length of the last packet; those before it all have [`Segments::max_len`].
    #[must_use]
    pub fn last_len(&self) -> usize {
        match self.kind {
            Kind::Whole { .. } => self.packet.len(),
            Kind::Tcp | Kind::Udp => self.packet.len() - (self.count() - 1) * self.size,
        }
    }

    /// Writes the next packet to the start of `out` and returns its length, `None` when all are written.
    ///
    /// # Panics
    /// When `out` is shorter than [`Segments::max_len`].
    pub fn write_next(&mut self, out: &mut [u8]) -> Option<usize> {
        if self.finished {
            return None;
        }
        match self.kind {
            Kind::Whole { checksum_at } => {
                self.finished = true;
                let out = &mut out[..self.packet.len()];
                out.copy_from_slice(self.packet);
                if let Some(at) = checksum_at {
                    // What stands there is the pseudo-header's sum, so it takes part in the sum like any other word.
                    let mut checksum = finish(add(0, &out[self.l4..]));
                    // UDP writes zero as its other representation (RFC 768).
                    if checksum == [0, 0] && at == self.l4 + 6 && self.protocol_is_udp() {
                        checksum = [0xff, 0xff];
                    }
                    out[at..at + 2].copy_from_slice(&checksum);
                }
                Some(out.len())
            }
            Kind::Tcp | Kind::Udp => Some(self.write_segment(out)),
        }
    }

    fn protocol_is_udp(&self) -> bool {
        // Behind IPv6 extension headers only TCP (offset 16) and ICMPv6 (offset 2) compete, so the offset decides.
        self.packet[0] >> 4 == 6 || self.packet[9] == UDP
    }

    fn write_segment(&mut self, out: &mut [u8]) -> usize {
        let payload = &self.packet[self.header_len..];
        let size = self.size.min(payload.len() - self.done);
        let last = self.done + size == payload.len();
        let length = self.header_len + size;
        let out = &mut out[..length];
        out[..self.header_len].copy_from_slice(&self.packet[..self.header_len]);
        let (headers, body) = out.split_at_mut(self.header_len);
        // Headers of both layers have an even length, so the sum of the payload stands by itself.
        let payload_sum = copy_and_add(0, &payload[self.done..self.done + size], body);
        let (ip, transport) = headers.split_at_mut(self.l4);
        let transport_len = (length - self.l4) as u16;

        if ip[0] >> 4 == 4 {
            let header_len = usize::from(ip[0] & 15) * 4;
            ip[2..4].copy_from_slice(&(length as u16).to_be_bytes());
            let id = u16::from_be_bytes([ip[4], ip[5]]).wrapping_add(self.count as u16);
            ip[4..6].copy_from_slice(&id.to_be_bytes());
            ip[10..12].fill(0);
            let checksum = finish(add(0, &ip[..header_len]));
            ip[10..12].copy_from_slice(&checksum);
        } else {
            ip[4..6].copy_from_slice(&((length - 40) as u16).to_be_bytes());
        }

        // The pseudo-header's sum stands in the checksum field; only its length differs for a segment. Taking it from
        // there is right behind IPv6 routing headers too, where the sum is over the final destination.
        let whole_len = (self.packet.len() - self.l4) as u16;
        let checksum_at = if self.kind == Kind::Tcp { 16 } else { 6 };
        let pseudo = u64::from(u16::from_ne_bytes([transport[checksum_at], transport[checksum_at + 1]]))
            + word(!whole_len)
            + word(transport_len);
        transport[checksum_at..checksum_at + 2].fill(0);
        if self.kind == Kind::Tcp {
            let sequence = u32::from_be_bytes([transport[4], transport[5], transport[6], transport[7]]);
            let sequence = sequence.wrapping_add(self.done as u32);
            transport[4..8].copy_from_slice(&sequence.to_be_bytes());
            if !last {
                transport[13] &= !TCP_FIN_PSH;
            }
            if self.count > 0 {
                transport[13] &= !TCP_CWR;
            }
        } else {
            transport[4..6].copy_from_slice(&transport_len.to_be_bytes());
        }
        let mut checksum = finish(add(pseudo + payload_sum, transport));
        if self.kind == Kind::Udp && checksum == [0, 0] {
            checksum = [0xff, 0xff];
        }
        transport[checksum_at..checksum_at + 2].copy_from_slice(&checksum);

        self.done += size;
        self.count += 1;
        self.finished = last;
        length
    }
}

/// Protocol numbers shared with the coalescer.
pub(super) const PROTOCOL_TCP: u8 = TCP;
/// See [`PROTOCOL_TCP`].
pub(super) const PROTOCOL_UDP: u8 = UDP;
