//! Segmentation and coalescing undo each other; what cannot be joined passes untouched.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::Range;

use proptest::collection::vec;
use proptest::prelude::*;

use super::checksum::{add, finish, fold, pseudo_header};
use super::*;

const ACK: u8 = 0x10;
const PSH: u8 = 0x08;

/// A slow, obvious checksum to compare with.
fn reference_checksum(bytes: &[u8]) -> [u8; 2] {
    let mut sum = 0u32;
    for pair in bytes.chunks(2) {
        sum += u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!(sum as u16)).to_be_bytes()
}

/// One flow's fields, from which its packets are built.
#[derive(Debug, Clone)]
struct Flow {
    v6: bool,
    tcp: bool,
    port: u16,
    id: u16,
    sequence: u32,
    options: usize,
}

impl Flow {
    fn addresses(&self) -> (IpAddr, IpAddr) {
        if self.v6 {
            let address = |last| IpAddr::V6(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, last));
            (address(1), address(2))
        } else {
            (IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1)), IpAddr::V4(Ipv4Addr::new(10, 0, 0, 2)))
        }
    }

    fn packet(&mut self, payload: &[u8], flags: u8) -> Vec<u8> {
        let transport_len = if self.tcp { 20 + self.options } else { 8 } + payload.len();
        let mut transport = vec![0; transport_len - payload.len()];
        transport[..2].copy_from_slice(&self.port.to_be_bytes());
        transport[2..4].copy_from_slice(&4242u16.to_be_bytes());
        if self.tcp {
            transport[4..8].copy_from_slice(&self.sequence.to_be_bytes());
            transport[8..12].copy_from_slice(&77u32.to_be_bytes());
            transport[12] = ((20 + self.options) as u8 / 4) << 4;
            transport[13] = flags;
            transport[14..16].copy_from_slice(&500u16.to_be_bytes());
            transport[20..].fill(1);
            self.sequence = self.sequence.wrapping_add(payload.len() as u32);
        } else {
            transport[4..6].copy_from_slice(&(transport_len as u16).to_be_bytes());
        }
        transport.extend_from_slice(payload);
        let (source, destination) = self.addresses();
        let protocol = if self.tcp { 6 } else { 17 };
        let sum = add(pseudo_header(source, destination, protocol, transport_len as u16), &transport);
        let checksum = match finish(sum) {
            [0, 0] if !self.tcp => [0xff, 0xff],
            checksum => checksum,
        };
        let at = if self.tcp { 16 } else { 6 };
        transport[at..at + 2].copy_from_slice(&checksum);

        let mut packet = match (source, destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let mut ip = vec![0x45, 0];
                ip.extend(((20 + transport_len) as u16).to_be_bytes());
                ip.extend(self.id.to_be_bytes());
                ip.extend([0x40, 0, 64, protocol, 0, 0]);
                ip.extend(source.octets());
                ip.extend(destination.octets());
                let checksum = finish(add(0, &ip));
                ip[10..12].copy_from_slice(&checksum);
                self.id = self.id.wrapping_add(1);
                ip
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                let mut ip = vec![0x60, 0, 0, 0];
                ip.extend((transport_len as u16).to_be_bytes());
                ip.extend([protocol, 64]);
                ip.extend(source.octets());
                ip.extend(destination.octets());
                ip
            }
            _ => unreachable!("both addresses are of one family"),
        };
        packet.extend(transport);
        packet
    }
}

fn arena_of(packets: &[Vec<u8>]) -> (Vec<u8>, Vec<Range<usize>>) {
    let mut arena = Vec::new();
    let ranges = packets.iter().map(|packet| {
        let start = arena.len();
        arena.extend_from_slice(packet);
        start..arena.len()
    });
    let ranges = ranges.collect();
    (arena, ranges)
}

/// What would be written to the device: headers and whole superpackets.
fn coalesced(packets: &[Vec<u8>]) -> Vec<(VnetHeader, Vec<u8>)> {
    let (mut arena, ranges) = arena_of(packets);
    let mut coalescer = Coalescer::new(true);
    for range in ranges {
        coalescer.push(&arena, range);
    }
    let superpackets: Vec<_> = coalescer.finish(&mut arena).map(|s| (s.header, s.pieces.to_vec())).collect();
    superpackets
        .into_iter()
        .map(|(header, pieces)| {
            (header, pieces.into_iter().flat_map(|piece| arena[piece].to_vec()).collect())
        })
        .collect()
}

fn segmented(header: &VnetHeader, packet: &[u8]) -> Vec<Vec<u8>> {
    let mut segments = segment(header, packet).unwrap();
    let mut out = vec![0; segments.max_len()];
    std::iter::from_fn(|| segments.write_next(&mut out).map(|length| out[..length].to_vec())).collect()
}

fn there_and_back(packets: &[Vec<u8>]) -> Vec<Vec<u8>> {
    coalesced(packets).iter().flat_map(|(header, packet)| segmented(header, packet)).collect()
}

prop_compose! {
    fn flow()(v6: bool, tcp: bool, id: u16, sequence: u32, options in 0usize..4) -> Flow {
        Flow { v6, tcp, port: 1000, id, sequence, options: options * 4 }
    }
}

proptest! {
    #[test]
    fn the_fast_checksum_is_the_checksum(bytes in vec(any::<u8>(), 0..300), split in 0usize..150) {
        prop_assert_eq!(finish(add(0, &bytes)), reference_checksum(&bytes));
        // Sums may be taken piece by piece at even places.
        let split = (split * 2).min(bytes.len() & !1);
        prop_assert_eq!(finish(add(add(0, &bytes[..split]), &bytes[split..])), reference_checksum(&bytes));
    }

    #[test]
    fn packets_of_one_flow_come_back_byte_for_byte(
        flow in flow(), sizes in vec((prop_oneof![Just(1400usize), 1usize..1400], any::<bool>()), 1..80),
    ) {
        let mut flow = flow;
        let packets: Vec<_> = sizes
            .iter()
            .enumerate()
            .map(|(n, (size, psh))| flow.packet(&vec![n as u8; *size], if *psh { ACK | PSH } else { ACK }))
            .collect();
        prop_assert_eq!(there_and_back(&packets), packets);
    }

    #[test]
    fn mixed_flows_keep_their_own_order(
        flows in vec(flow(), 1..5), picks in vec((0usize..5, 0usize..300, 0u8..64), 1..60),
    ) {
        let mut flows = flows;
        for (n, flow) in flows.iter_mut().enumerate() {
            flow.port = 1000 + n as u16;
        }
        let mut sent = vec![Vec::new(); flows.len()];
        let mut packets = Vec::new();
        for (pick, size, flags) in picks {
            let index = pick % flows.len();
            // Mostly plain data; now and then SYN, FIN, RST or nothing at all.
            let flags = if flags < 4 { 1 << flags | ACK } else { ACK };
            let packet = flows[index].packet(&vec![7; size], flags);
            sent[index].push(packet.clone());
            packets.push(packet);
        }
        let back = there_and_back(&packets);
        prop_assert_eq!(back.len(), packets.len());
        for (index, flow) in flows.iter().enumerate() {
            let l4 = if flow.v6 { 40 } else { 20 };
            let own: Vec<_> = back
                .iter()
                .filter(|p| (p[0] >> 4 == 6) == flow.v6 && p[l4..l4 + 2] == flow.port.to_be_bytes())
                .cloned()
                .collect();
            prop_assert_eq!(&own, &sent[index]);
        }
    }

    #[test]
    fn arbitrary_bytes_pass_untouched_and_never_panic(packets in vec(vec(any::<u8>(), 0..120), 0..10)) {
        let back: Vec<_> = coalesced(&packets).into_iter().map(|(_, packet)| packet).collect();
        prop_assert_eq!(back, packets);
    }

    #[test]
    fn arbitrary_virtio_headers_never_panic(
        header in any::<[u8; VNET_HEADER_LEN]>(), small: bool, packet in vec(any::<u8>(), 0..200), version: bool,
    ) {
        let (mut header, mut packet) = (header, packet);
        if small {
            // Offsets that lie inside of the packet, kinds that exist.
            header = VnetHeader {
                needs_checksum: true,
                gso: [GsoKind::Tcp4, GsoKind::Tcp6, GsoKind::Udp, GsoKind::None][usize::from(header[1] % 4)],
                header_len: 0,
                gso_size: u16::from(header[4]),
                checksum_start: u16::from(header[6] % 64),
                checksum_offset: if header[8] % 2 == 0 { 16 } else { 6 },
            }.encode();
        }
        if let Some(first) = packet.first_mut() {
            *first = if version { 0x45 } else { 0x60 };
        }
        let decoded = VnetHeader::decode(&header);
        if let Ok(mut segments) = segment(&decoded, &packet) {
            let mut out = vec![0; segments.max_len()];
            let mut total = 0;
            while let Some(length) = segments.write_next(&mut out) {
                prop_assert!(length <= out.len());
                total += 1;
            }
            prop_assert!(total >= 1 && total <= packet.len().max(1));
        }
    }

    #[test]
    fn virtio_headers_are_read_back_as_written(
        needs_checksum: bool, kind in 0usize..4, header_len: u16, gso_size: u16, checksum_start: u16,
        checksum_offset: u16,
    ) {
        let gso = [GsoKind::None, GsoKind::Tcp4, GsoKind::Tcp6, GsoKind::Udp][kind];
        let header =
            VnetHeader { needs_checksum, gso, header_len, gso_size, checksum_start, checksum_offset };
        prop_assert_eq!(VnetHeader::decode(&header.encode()), header);
    }
}

fn tcp(v6: bool) -> Flow {
    Flow { v6, tcp: true, port: 1000, id: 0xfff0, sequence: u32::MAX - 3000, options: 12 }
}

#[test]
fn a_full_run_becomes_one_superpacket() {
    for v6 in [false, true] {
        for tcp_flow in [false, true] {
            let mut flow = Flow { tcp: tcp_flow, ..tcp(v6) };
            let mut packets: Vec<_> = (0..40).map(|n| flow.packet(&[n; 1368], ACK)).collect();
            packets.push(flow.packet(&[9; 100], ACK | PSH));
            let superpackets = coalesced(&packets);
            assert_eq!(superpackets.len(), 1, "v6 {v6} tcp {tcp_flow}");
            let (header, packet) = &superpackets[0];
            assert_eq!(header.gso_size, 1368);
            assert_eq!(packet.len(), packets[0].len() + 39 * 1368 + 100);
            assert_eq!(segmented(header, packet), packets);
        }
    }
}

#[test]
fn the_limit_of_64_kib_starts_another_superpacket() {
    let mut flow = tcp(false);
    let packets: Vec<_> = (0..60).map(|n| flow.packet(&[n; 1368], ACK)).collect();
    let superpackets = coalesced(&packets);
    assert_eq!(superpackets.len(), 2);
    assert!(superpackets.iter().all(|(_, packet)| packet.len() <= 65_535));
}

#[test]
fn a_damaged_packet_is_not_mended() {
    for damage in [10usize, 30, 36, 60, 200] {
        let mut flow = tcp(false);
        let mut packets: Vec<_> = (0..3).map(|n| flow.packet(&[n; 500], ACK)).collect();
        packets[1][damage] ^= 0x40;
        let superpackets = coalesced(&packets);
        assert_eq!(superpackets.len(), 3, "byte {damage}");
        for ((header, packet), original) in superpackets.iter().zip(&packets) {
            assert_eq!((header, packet), (&VnetHeader::PLAIN, original));
        }
    }
}

#[test]
fn differing_headers_are_not_joined() {
    // Time to live, service class, window, acknowledgement, an option, urgent pointer.
    for (at, fix_ip) in [(8, true), (1, true), (34, false), (28, false), (44, false), (38, false)] {
        let mut flow = tcp(false);
        let mut packets: Vec<_> = (0..2).map(|n| flow.packet(&[n; 500], ACK)).collect();
        packets[1][at] ^= 0x04;
        if fix_ip {
            packets[1][10..12].fill(0);
            let checksum = finish(add(0, &packets[1][..20]));
            packets[1][10..12].copy_from_slice(&checksum);
        } else {
            let (source, destination) = flow.addresses();
            packets[1][36..38].fill(0);
            let length = packets[1].len() as u16 - 20;
            let sum = add(pseudo_header(source, destination, 6, length), &packets[1][20..]);
            packets[1][36..38].copy_from_slice(&finish(sum));
        }
        let superpackets = coalesced(&packets);
        assert_eq!(superpackets.len(), 2, "byte {at}");
        assert_eq!(superpackets[1].1, packets[1]);
    }
}

#[test]
fn a_gap_or_a_repetition_is_not_joined() {
    for skip in [1000u32, u32::MAX - 499] {
        let mut flow = tcp(true);
        let first = flow.packet(&[1; 500], ACK);
        flow.sequence = flow.sequence.wrapping_add(skip);
        let second = flow.packet(&[2; 500], ACK);
        assert_eq!(coalesced(&[first, second]).len(), 2);
    }
}

#[test]
fn a_constant_identification_is_joined_where_fragmenting_is_forbidden() {
    let mut flow = tcp(false);
    let packets: Vec<_> = (0..4)
        .map(|n| {
            flow.id = 5;
            flow.packet(&[n; 500], ACK)
        })
        .collect();
    let superpackets = coalesced(&packets);
    assert_eq!(superpackets.len(), 1);
    for (back, sent) in segmented(&superpackets[0].0, &superpackets[0].1).iter().zip(&packets) {
        assert_eq!(back[20..], sent[20..], "only the IP header's identification and checksum differ");
    }
}

#[test]
fn fragments_options_extension_headers_and_bare_datagrams_pass_untouched() {
    let mut flow = tcp(false);
    let mut fragment = flow.packet(&[0; 100], ACK);
    fragment[6] = 0x20;
    let mut options = flow.packet(&[0; 100], ACK);
    options[0] = 0x46;
    let mut flow6 = tcp(true);
    let mut extension = flow6.packet(&[0; 100], ACK);
    extension[6] = 0;
    let mut udp = Flow { tcp: false, ..tcp(false) };
    let mut bare = udp.packet(&[0; 100], 0);
    bare[26..28].fill(0);
    for packet in [fragment, options, extension, bare] {
        let twice = [packet.clone(), packet.clone()];
        let back: Vec<_> = coalesced(&twice);
        assert_eq!(back, [(VnetHeader::PLAIN, packet.clone()), (VnetHeader::PLAIN, packet)]);
    }
}

#[test]
fn an_open_checksum_is_completed() {
    for (v6, is_tcp) in [(false, true), (true, true), (false, false), (true, false)] {
        let mut flow = Flow { tcp: is_tcp, ..tcp(v6) };
        let complete = flow.packet(&[3; 77], ACK);
        let l4 = if v6 { 40 } else { 20 };
        let offset = if is_tcp { 16 } else { 6 };
        let (source, destination) = flow.addresses();
        let length = (complete.len() - l4) as u16;
        let mut open = complete.clone();
        let pseudo = fold(pseudo_header(source, destination, if is_tcp { 6 } else { 17 }, length));
        open[l4 + offset..l4 + offset + 2].copy_from_slice(&pseudo);
        let header = VnetHeader {
            needs_checksum: true,
            checksum_start: l4 as u16,
            checksum_offset: offset as u16,
            ..VnetHeader::PLAIN
        };
        assert_eq!(segmented(&header, &open), [complete]);
    }
}

#[test]
fn a_superpacket_behind_an_ipv6_extension_header_is_cut_up() {
    // The kernel may hand one over: hop-by-hop options, then TCP. Built from a coalesced one by wedging 8 bytes in.
    let mut flow = tcp(true);
    let packets: Vec<_> = (0..3).map(|n| flow.packet(&[n; 1000], ACK)).collect();
    let (mut header, mut packet) = coalesced(&packets).remove(0);
    let wedge = [6, 0, 1, 4, 0, 0, 0, 0];
    packet.splice(40..40, wedge);
    packet[6] = 0;
    let length = (packet.len() - 40) as u16;
    packet[4..6].copy_from_slice(&length.to_be_bytes());
    header.checksum_start += 8;
    let back = segmented(&header, &packet);
    assert_eq!(back.len(), 3);
    for (back, sent) in back.iter().zip(&packets) {
        assert_eq!(back[40..48], wedge);
        assert_eq!(back[48..], sent[40..], "the TCP segment with its checksum is the same");
        assert_eq!(usize::from(u16::from_be_bytes([back[4], back[5]])), back.len() - 40);
    }
}

#[test]
fn names_that_no_interface_can_have_are_refused_before_the_kernel_is_asked() {
    for name in ["", ".", "..", "a/b", "a b", "wg%d", "sixteen-bytes-xx"] {
        assert!(matches!(Tun::open(name, 1), Err(TunError::BadName { .. })), "{name}");
    }
}
