//! Joining packets of one flow into a superpacket, so that the kernel walks its stack once for all of them.
//!
//! Packets stay where the caller has them, in one arena; a superpacket is a list of pieces of it, for one vectored
//! write. Only packets that [`segment`](super::segment()) would give back byte for byte are joined, with one exception:
//! the IPv4 identification of packets that must not be fragmented means nothing (RFC 6864) and may differ if it is
//! constant in the flow. Everything else passes untouched. The order of packets within a flow is kept.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::Range;

use super::checksum::{add, finish, fold, pseudo_header};
use super::header::{GsoKind, VnetHeader};
use super::segment::{PROTOCOL_TCP, PROTOCOL_UDP};

/// Most packets in one superpacket. The kernel's own limit for UDP is 64 (`UDP_GRO_CNT_MAX`); for TCP the limit of
/// 64 KiB usually comes first.
pub const MAX_PIECES: usize = 64;

const TCP_ACK: u8 = 0x10;
const TCP_PSH: u8 = 0x08;

/// What to write to the TUN device in one go: `header`, then the pieces of the arena in order.
#[derive(Debug)]
pub struct Superpacket<'a> {
    /// Goes before the packet.
    pub header: VnetHeader,
    /// Where in the arena the bytes are. The first piece holds the headers.
    pub pieces: &'a [Range<usize>],
}

/// Collects packets between two writes. Its memory is reused: in steady state nothing is allocated.
#[derive(Debug, Default)]
pub struct Coalescer {
    groups: Vec<Group>,
    used: usize,
    join_udp: bool,
}

#[derive(Debug)]
struct Group {
    flow: Option<Flow>,
    pieces: Vec<Range<usize>>,
    /// Payload of all pieces.
    payload: usize,
    /// Nothing may be appended.
    closed: bool,
    /// All identifications so far are equal rather than consecutive.
    fixed_id: bool,
    psh: bool,
}

/// The fields of a packet that decide what it may be joined with.
#[derive(Debug, Clone, Copy)]
struct Flow {
    hash: u32,
    protocol: u8,
    source: IpAddr,
    destination: IpAddr,
    header_len: usize,
    l4: usize,
    payload: usize,
    sequence: u32,
    psh: bool,
    /// Identification and whether fragmentation is forbidden; IPv6 has none.
    id: Option<(u16, bool)>,
}

impl Coalescer {
    /// An empty one. `join_udp` needs a kernel that takes UDP superpackets (see
    /// [`Offloads`](super::Offloads)).
    #[must_use]
    pub fn new(join_udp: bool) -> Self {
        Self { groups: Vec::new(), used: 0, join_udp }
    }

    /// Forgets all packets.
    pub fn clear(&mut self) {
        self.used = 0;
    }

    /// Whether there is nothing to write.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.used == 0
    }

    /// Adds the packet at `range` of `arena`.
    ///
    /// # Panics
    /// When `range` is outside of `arena`.
    pub fn push(&mut self, arena: &[u8], range: Range<usize>) {
        let packet = &arena[range.clone()];
        let Some((flow, closes)) = classify(packet, self.join_udp) else {
            // It may still belong to a flow (a bare ACK, a FIN): nothing may overtake it.
            if let Some(key) = flow_key(packet) {
                self.close(&key);
            }
            self.start(None, range, true, false);
            return;
        };
        let newest = self.groups[..self.used]
            .iter_mut()
            .rev()
            .find(|group| group.flow.as_ref().is_some_and(|other| other.same_flow(&flow)));
        if let Some(group) = newest {
            if group.takes(arena, &flow, packet) {
                group.append(&flow, range, closes);
                return;
            }
            group.closed = true;
        }
        self.start(Some(flow), range, closes, flow.psh);
    }

    /// Completes the headers in the arena and hands out what is to be written, in order.
    pub fn finish<'a>(&'a mut self, arena: &mut [u8]) -> impl Iterator<Item = Superpacket<'a>> + use<'a> {
        for group in &self.groups[..self.used] {
            group.patch(arena);
        }
        self.groups[..self.used]
            .iter()
            .map(|group| Superpacket { header: group.header(), pieces: &group.pieces })
    }

    fn close(&mut self, key: &FlowKey) {
        for group in &mut self.groups[..self.used] {
            if group.flow.as_ref().is_some_and(|flow| key.matches(flow)) {
                group.closed = true;
            }
        }
    }

    fn start(&mut self, flow: Option<Flow>, range: Range<usize>, closed: bool, psh: bool) {
        if self.used == self.groups.len() {
            let pieces = Vec::with_capacity(MAX_PIECES);
            self.groups.push(Group { flow, pieces, payload: 0, closed, fixed_id: false, psh });
        }
        let group = &mut self.groups[self.used];
        group.pieces.clear();
        group.pieces.push(range);
        (group.flow, group.closed, group.fixed_id, group.psh) = (flow, closed, false, psh);
        group.payload = flow.map_or(0, |flow| flow.payload);
        self.used += 1;
    }
}

/// Addresses, protocol and a hash over the ports, of packets that are not joined.
struct FlowKey {
    /// Nothing when the ports are out of sight, behind IPv6 extension headers or in another fragment.
    hash: Option<u32>,
    source: IpAddr,
    destination: IpAddr,
}

impl FlowKey {
    fn matches(&self, flow: &Flow) -> bool {
        self.hash.is_none_or(|hash| hash == flow.hash)
            && self.source == flow.source
            && self.destination == flow.destination
    }
}

fn hash(protocol: u8, ports: &[u8]) -> u32 {
    u32::from_be_bytes([ports[0], ports[1], ports[2], ports[3]]) ^ u32::from(protocol)
}

fn addresses(packet: &[u8]) -> Option<(IpAddr, IpAddr, u8, usize)> {
    match packet.first()? >> 4 {
        4 if packet.len() >= 20 => {
            let address = |at: usize| {
                IpAddr::V4(Ipv4Addr::new(packet[at], packet[at + 1], packet[at + 2], packet[at + 3]))
            };
            Some((address(12), address(16), packet[9], usize::from(packet[0] & 15) * 4))
        }
        6 if packet.len() >= 40 => {
            let address = |at: usize| {
                let mut octets = [0; 16];
                octets.copy_from_slice(&packet[at..at + 16]);
                IpAddr::V6(Ipv6Addr::from(octets))
            };
            Some((address(8), address(24), packet[6], 40))
        }
        _ => None,
    }
}

fn flow_key(packet: &[u8]) -> Option<FlowKey> {
    let (source, destination, protocol, l4) = addresses(packet)?;
    let later_fragment = source.is_ipv4() && u16::from_be_bytes([packet[6], packet[7]]) & 0x1fff != 0;
    let hash = match protocol {
        PROTOCOL_TCP | PROTOCOL_UDP if later_fragment => None,
        PROTOCOL_TCP | PROTOCOL_UDP => Some(hash(protocol, packet.get(l4..l4 + 4)?)),
        _ if source.is_ipv6() => None,
        _ => return None,
    };
    Some(FlowKey { hash, source, destination })
}

/// `None` when the packet must pass as it is. The flag says that nothing may follow it in a superpacket.
fn classify(packet: &[u8], join_udp: bool) -> Option<(Flow, bool)> {
    let (source, destination, protocol, l4) = addresses(packet)?;
    let id = if source.is_ipv4() {
        let total = usize::from(u16::from_be_bytes([packet[2], packet[3]]));
        let fragment = u16::from_be_bytes([packet[6], packet[7]]);
        // Options, fragments (more to come, or an offset) and trailing bytes pass as they are; a wrong header checksum
        // must be seen by the kernel, not mended here.
        if l4 != 20
            || total != packet.len()
            || fragment & !0x4000 != 0
            || finish(add(0, &packet[..20])) != [0, 0]
        {
            return None;
        }
        Some((u16::from_be_bytes([packet[4], packet[5]]), fragment & 0x4000 != 0))
    } else {
        if usize::from(u16::from_be_bytes([packet[4], packet[5]])) + 40 != packet.len() {
            return None;
        }
        None
    };
    let transport = &packet[l4..];
    let (transport_len, sequence, psh) = match protocol {
        PROTOCOL_TCP if transport.len() >= 20 => {
            let flags = transport[13];
            let length = usize::from(transport[12] >> 4) * 4;
            if flags & !TCP_PSH != TCP_ACK || length < 20 {
                return None;
            }
            let sequence = u32::from_be_bytes([transport[4], transport[5], transport[6], transport[7]]);
            (length, sequence, flags & TCP_PSH != 0)
        }
        PROTOCOL_UDP if join_udp && transport.len() >= 8 => {
            let length = usize::from(u16::from_be_bytes([transport[4], transport[5]]));
            // A datagram without checksum (IPv4 only) would get one.
            if length != transport.len() || transport[6..8] == [0, 0] {
                return None;
            }
            (8, 0, false)
        }
        _ => return None,
    };
    let payload = transport.len().checked_sub(transport_len).filter(|payload| *payload > 0)?;
    // The superpacket's checksum is computed anew by the kernel: a damaged packet must not become a good one.
    let length = u16::try_from(transport.len()).ok()?;
    if finish(add(pseudo_header(source, destination, protocol, length), transport)) != [0, 0] {
        return None;
    }
    let hash = hash(protocol, transport);
    let header_len = l4 + transport_len;
    let flow = Flow { hash, protocol, source, destination, header_len, l4, payload, sequence, psh, id };
    Some((flow, psh))
}

impl Flow {
    fn same_flow(&self, other: &Self) -> bool {
        self.hash == other.hash
            && self.protocol == other.protocol
            && self.source == other.source
            && self.destination == other.destination
    }
}

impl Group {
    fn takes(&self, arena: &[u8], next: &Flow, packet: &[u8]) -> bool {
        let Some(first) = &self.flow else { return false };
        let count = self.pieces.len();
        if self.closed
            || next.header_len != first.header_len
            || next.payload > first.payload
            || count >= MAX_PIECES
            || first.header_len + self.payload + next.payload > usize::from(u16::MAX)
        {
            return false;
        }
        let leader = &arena[self.pieces[0].clone()];
        let same = |range: Range<usize>| leader[range.clone()] == packet[range];
        let l4 = first.l4;
        let ip_fits = match (first.id, next.id) {
            (Some((first_id, dont_fragment)), Some((id, _))) => {
                let consecutive = id == first_id.wrapping_add(count as u16) && !self.fixed_id;
                let fixed = id == first_id && dont_fragment && (count == 1 || self.fixed_id);
                // Version, length of header and service class; flags; time to live and protocol.
                (consecutive || fixed) && same(0..2) && same(6..10)
            }
            // Version, traffic class and flow label; next header and hop limit.
            (None, None) => same(0..4) && same(6..8),
            _ => false,
        };
        let transport_fits = match first.protocol {
            PROTOCOL_TCP => {
                // Acknowledgement, length of header; window; urgent pointer and all options.
                next.sequence == first.sequence.wrapping_add(self.payload as u32)
                    && same(l4 + 8..l4 + 13)
                    && same(l4 + 14..l4 + 16)
                    && same(l4 + 18..first.header_len)
            }
            _ => true,
        };
        ip_fits && transport_fits
    }

    fn append(&mut self, next: &Flow, range: Range<usize>, closes: bool) {
        let Some(first) = &self.flow else { return };
        if let (Some((first_id, _)), Some((id, _))) = (first.id, next.id) {
            self.fixed_id = first_id == id;
        }
        self.closed = closes || next.payload < first.payload;
        self.psh |= next.psh;
        self.payload += next.payload;
        self.pieces.push(range.start + next.header_len..range.end);
    }

    fn header(&self) -> VnetHeader {
        match &self.flow {
            Some(flow) if self.pieces.len() > 1 => VnetHeader {
                needs_checksum: true,
                gso: match (flow.protocol, flow.source) {
                    (PROTOCOL_UDP, _) => GsoKind::Udp,
                    (_, IpAddr::V4(_)) => GsoKind::Tcp4,
                    (_, IpAddr::V6(_)) => GsoKind::Tcp6,
                },
                header_len: flow.header_len as u16,
                gso_size: flow.payload as u16,
                checksum_start: flow.l4 as u16,
                checksum_offset: if flow.protocol == PROTOCOL_TCP { 16 } else { 6 },
            },
            _ => VnetHeader::PLAIN,
        }
    }

    /// Writes the lengths and the pseudo-header's sum of the whole into the first packet's headers.
    fn patch(&self, arena: &mut [u8]) {
        let Some(flow) = &self.flow else { return };
        if self.pieces.len() < 2 {
            return;
        }
        let packet = &mut arena[self.pieces[0].clone()];
        let total = flow.header_len + self.payload;
        let transport_len = (total - flow.l4) as u16;
        if flow.source.is_ipv4() {
            packet[2..4].copy_from_slice(&(total as u16).to_be_bytes());
            packet[10..12].fill(0);
            let checksum = finish(add(0, &packet[..20]));
            packet[10..12].copy_from_slice(&checksum);
        } else {
            packet[4..6].copy_from_slice(&((total - 40) as u16).to_be_bytes());
        }
        let pseudo = fold(pseudo_header(flow.source, flow.destination, flow.protocol, transport_len));
        let transport = &mut packet[flow.l4..];
        if flow.protocol == PROTOCOL_TCP {
            if self.psh {
                transport[13] |= TCP_PSH;
            }
            transport[16..18].copy_from_slice(&pseudo);
        } else {
            transport[4..6].copy_from_slice(&transport_len.to_be_bytes());
            transport[6..8].copy_from_slice(&pseudo);
        }
    }
}
