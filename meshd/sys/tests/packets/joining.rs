//! Packets from a peer, joined for the kernel and cut up again.

use std::collections::HashMap;

use mesh_sys::tun::{GsoKind, MAX_PIECES, VnetHeader};
use proptest::collection::vec;
use proptest::prelude::*;

use crate::build::*;

/// What makes a packet different from one that is just the next of its flow.
#[derive(Debug, Clone)]
enum Event {
    Plain,
    Push,
    /// Any flags, on this packet only.
    Flags(u8),
    /// DSCP and ECN from here on.
    Service(u8),
    HopLimit(u8),
    Label(u32),
    /// Acknowledgement, window and options (as timestamps change) from here on.
    Acknowledged(u32),
    Window(u16),
    Options(Vec<u8>),
    Urgent(u16),
    /// Nothing behind the headers.
    Empty,
    /// Packets are missing, or repeated.
    Gap(i32),
    /// All IPv4 identifications are the same from here on, or count again.
    FixedId(bool),
    MayFragment(bool),
    InternetOptions,
    Extension(u8),
    Fragment {
        offset: u16,
        more: bool,
    },
    WithoutChecksum,
    /// One bit is wrong.
    Damage(usize),
    /// Bytes behind the end of the packet, or too few.
    Length(i8),
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        30 => Just(Event::Plain),
        3 => Just(Event::Push),
        1 => any::<u8>().prop_map(Event::Flags),
        1 => prop::sample::select(vec![FIN | ACK, SYN, RST, ACK | ECE, ACK | CWR, ACK | URG, ACK]).prop_map(Event::Flags),
        2 => any::<u8>().prop_map(Event::Service),
        1 => any::<u8>().prop_map(Event::HopLimit),
        1 => any::<u32>().prop_map(Event::Label),
        1 => any::<u32>().prop_map(Event::Acknowledged),
        1 => any::<u16>().prop_map(Event::Window),
        2 => (0usize..=10).prop_flat_map(|words| vec(any::<u8>(), 4 * words)).prop_map(Event::Options),
        1 => any::<u16>().prop_map(Event::Urgent),
        1 => Just(Event::Empty),
        1 => (-3000i32..3000).prop_map(Event::Gap),
        1 => any::<bool>().prop_map(Event::FixedId),
        1 => any::<bool>().prop_map(Event::MayFragment),
        1 => Just(Event::InternetOptions),
        1 => prop::sample::select(vec![0u8, 43, 60]).prop_map(Event::Extension),
        2 => (0u16..3, any::<bool>()).prop_map(|(offset, more)| Event::Fragment { offset, more }),
        1 => Just(Event::WithoutChecksum),
        1 => any::<usize>().prop_map(Event::Damage),
        1 => (-9i8..9).prop_map(Event::Length),
    ]
}

/// A flow and where it is.
#[derive(Debug, Clone)]
struct Flow {
    next: Packet,
    fixed_id: bool,
}

prop_compose! {
    fn flow()(v4: bool, tcp: bool, host in 1u8..3, ports: (bool, bool), id: u16, sequence: u32, service: u8) -> Flow {
        let ip = if v4 {
            Ip::V4 { id, fragment: 0x4000, options: Vec::new() }
        } else {
            Ip::V6 { label: 7, extensions: Vec::new() }
        };
        let transport = if tcp {
            Transport::Tcp { sequence, acknowledged: 9, flags: ACK, window: 500, urgent: 0, options: vec![1; 12] }
        } else {
            Transport::Udp { checksum: true }
        };
        // Ports of few kinds: flows that differ in one thing only.
        let ports = (1000 + u16::from(ports.0), 2000 + u16::from(ports.1));
        let next = Packet { ip, service, hop_limit: 64, host, ports, transport, payload: Vec::new() };
        Flow { next, fixed_id: false }
    }
}

impl Flow {
    /// What tells flows apart.
    fn key(&self) -> (bool, bool, u8, (u16, u16)) {
        (self.next.is_v4(), self.next.is_tcp(), self.next.host, self.next.ports)
    }

    /// The next packet, with one thing about it changed, on the wire.
    fn packet(&mut self, event: &Event, payload: Vec<u8>) -> Vec<u8> {
        let next = &mut self.next;
        // What stays.
        match (event, &mut next.ip, &mut next.transport) {
            (Event::Service(value), ..) => next.service = *value,
            (Event::HopLimit(value), ..) => next.hop_limit = *value,
            (Event::Label(value), Ip::V6 { label, .. }, _) => *label = *value,
            (Event::MayFragment(may), Ip::V4 { fragment, .. }, _) => {
                *fragment = if *may { 0 } else { 0x4000 }
            }
            (Event::FixedId(fixed), ..) => self.fixed_id = *fixed,
            (Event::Acknowledged(value), _, Transport::Tcp { acknowledged, .. }) => *acknowledged = *value,
            (Event::Window(value), _, Transport::Tcp { window, .. }) => *window = *value,
            (Event::Options(value), _, Transport::Tcp { options, .. }) => options.clone_from(value),
            (Event::Gap(gap), _, Transport::Tcp { sequence, .. }) => {
                *sequence = sequence.wrapping_add_signed(*gap);
            }
            (Event::Gap(gap), Ip::V4 { id, .. }, _) => *id = id.wrapping_add_signed(*gap as i16),
            _ => {}
        }
        let mut packet = Packet { payload, ..next.clone() };
        if let Event::Empty = event {
            packet.payload.clear();
        }
        match &mut next.ip {
            Ip::V4 { id, .. } if !self.fixed_id => *id = id.wrapping_add(1),
            Ip::V4 { .. } | Ip::V6 { .. } => {}
        }
        if let Transport::Tcp { sequence, .. } = &mut next.transport {
            *sequence = sequence.wrapping_add(packet.payload.len() as u32);
        }
        // What passes.
        match (event, &mut packet.ip, &mut packet.transport) {
            (Event::Push, _, Transport::Tcp { flags, .. }) => *flags |= PSH,
            (Event::Flags(value), _, Transport::Tcp { flags, .. }) => *flags = *value,
            (Event::Urgent(value), _, Transport::Tcp { urgent, .. }) => *urgent = *value,
            (Event::InternetOptions, Ip::V4 { options, .. }, _) => *options = vec![1; 8],
            (Event::Extension(number), Ip::V6 { extensions, .. }, _) => {
                extensions.push((*number, [1, 4, 0, 0, 0, 0]));
            }
            (Event::Fragment { offset, more }, Ip::V4 { fragment, .. }, _) => {
                *fragment = offset | u16::from(*more) << 13;
            }
            (Event::Fragment { offset, more }, Ip::V6 { extensions, .. }, _) => {
                let [a, b] = (offset << 3 | u16::from(*more)).to_be_bytes();
                extensions.push((44, [a, b, 0, 0, 0, 1]));
            }
            (Event::WithoutChecksum, _, Transport::Udp { checksum }) => *checksum = false,
            _ => {}
        }
        let mut bytes = packet.bytes();
        if let Event::Damage(bit) = event {
            // Not in what tells flows apart: the packet would be one of another flow.
            let addresses = if packet.is_v4() { [0..1, 9..10, 12..20] } else { [0..1, 6..7, 8..40] };
            let ports = packet.l4()..packet.l4() + 4;
            let bit = bit % (8 * bytes.len());
            if !addresses.iter().chain([&ports]).any(|range| range.contains(&(bit / 8))) {
                bytes[bit / 8] ^= 1 << (bit % 8);
            }
        }
        if let Event::Length(by) = event {
            let length = bytes.len().saturating_add_signed(isize::from(*by)).max(packet.header_len());
            bytes.resize(length, 0);
        }
        bytes
    }
}

/// An IPv4 packet without its identification, which means nothing where fragmenting is forbidden (RFC 6864).
fn without_id(packet: &[u8]) -> Vec<u8> {
    let mut packet = packet.to_vec();
    if packet[0] == 0x45 && packet[6] & 0x40 != 0 && checksum(&[&packet[..20]]) == [0, 0] {
        packet[4..6].fill(0);
        packet[10..12].fill(0);
    }
    packet
}

/// A superpacket as the kernel checks it, and as it would count its bytes.
fn check_superpacket(header: &VnetHeader, packet: &[u8], pieces: usize) -> Result<(), TestCaseError> {
    prop_assert!((2..=MAX_PIECES).contains(&pieces));
    prop_assert!(header.needs_checksum && header.gso_size > 0);
    let v4 = packet[0] >> 4 == 4;
    let l4 = usize::from(header.checksum_start);
    prop_assert_eq!(l4, if v4 { 20 } else { 40 });
    let header_len = match header.gso {
        GsoKind::Tcp4 | GsoKind::Tcp6 => {
            prop_assert_eq!((header.gso == GsoKind::Tcp4, header.checksum_offset), (v4, 16));
            l4 + usize::from(packet[l4 + 12] >> 4) * 4
        }
        GsoKind::Udp => {
            prop_assert_eq!(header.checksum_offset, 6);
            prop_assert_eq!(packet[l4 + 4..l4 + 6].to_vec(), ((packet.len() - l4) as u16).to_be_bytes());
            l4 + 8
        }
        GsoKind::None | GsoKind::Unknown(_) => return Err(TestCaseError::fail("not a superpacket")),
    };
    prop_assert_eq!(usize::from(header.header_len), header_len);
    let payload = packet.len() - header_len;
    prop_assert_eq!(payload.div_ceil(header.gso_size.into()), pieces);
    let (at, counted) = if v4 { (2, packet.len()) } else { (4, packet.len() - 40) };
    prop_assert!(counted <= usize::from(u16::MAX));
    prop_assert_eq!(packet[at..at + 2].to_vec(), (counted as u16).to_be_bytes());
    if v4 {
        prop_assert_eq!(checksum(&[&packet[..20]]), [0, 0]);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn every_flow_comes_back_packet_by_packet_in_order(
        flows in vec(flow(), 1..5),
        events in vec((any::<prop::sample::Index>(), event(), 0usize..4), 1..120),
        size in 1usize..1400,
        join_udp: bool,
    ) {
        let mut flows = flows;
        flows.sort_by_key(Flow::key);
        flows.dedup_by_key(|flow| flow.key());
        let mut sent = vec![Vec::new(); flows.len()];
        let mut packets = Vec::new();
        let mut owners = HashMap::new();
        for (number, (index, event, kind)) in events.iter().enumerate() {
            let index = index.index(flows.len());
            // Mostly one length, so that there are runs.
            let length = [size, size, size / 2 + 1, (size * 7 / 5).min(1400)][*kind];
            // Every payload is another one, so that every packet is known by its bytes.
            let payload = (number as u32).to_be_bytes().repeat(length / 4 + 1);
            let packet = flows[index].packet(event, payload);
            owners.insert(without_id(&packet), index);
            sent[index].push(packet.clone());
            packets.push(packet);
        }

        let mut back = vec![Vec::new(); flows.len()];
        for (header, packet, pieces) in joined(&packets, join_udp) {
            if pieces == 1 {
                prop_assert_eq!(header, VnetHeader::PLAIN);
                let owner = owners.get(&without_id(&packet)).copied();
                prop_assert!(owner.is_some(), "a packet that was joined with nothing was changed");
                back[owner.unwrap()].push(packet);
                continue;
            }
            check_superpacket(&header, &packet, pieces)?;
            let segments = segmented(&header, &packet);
            prop_assert_eq!(segments.len(), pieces);
            for segment in segments {
                let owner = owners.get(&without_id(&segment)).copied();
                prop_assert!(owner.is_some(), "a superpacket holds a packet that nobody sent");
                back[owner.unwrap()].push(segment);
            }
        }
        for ((flow, sent), back) in flows.iter().zip(&sent).zip(&back) {
            let all = |packets: &[Vec<u8>]| packets.iter().map(|packet| without_id(packet)).collect::<Vec<_>>();
            prop_assert_eq!(all(back), all(sent), "the flow of {:?}", flow);
            let fixed = events.iter().any(|(_, event, _)| matches!(event, Event::FixedId(true) | Event::Gap(_)));
            if !fixed {
                prop_assert_eq!(back, sent, "and the identifications, which count");
            }
        }
    }

    #[test]
    fn interleaved_flows_become_one_superpacket_each(
        flows in vec(flow(), 1..5), order in vec(any::<prop::sample::Index>(), 1..200), size in 4usize..1300,
    ) {
        let mut flows = flows;
        flows.sort_by_key(Flow::key);
        flows.dedup_by_key(|flow| flow.key());
        let mut counts = vec![0; flows.len()];
        let mut packets = Vec::new();
        for index in order {
            let index = index.index(flows.len());
            let header_len = flows[index].next.header_len();
            if counts[index] < MAX_PIECES && header_len + size * (counts[index] + 1) <= usize::from(u16::MAX) {
                counts[index] += 1;
                packets.push(flows[index].packet(&Event::Plain, vec![5; size]));
            }
        }
        let joined = joined(&packets, true);
        let mut pieces: Vec<_> = joined.iter().map(|(_, _, pieces)| *pieces).collect();
        let mut counts: Vec<_> = counts.into_iter().filter(|count| *count > 0).collect();
        pieces.sort_unstable();
        counts.sort_unstable();
        prop_assert_eq!(pieces, counts);
    }
}

/// Sends what `odd` makes of the second of three packets, and expects it between the two others.
#[track_caller]
fn nothing_overtakes(flow: &mut Flow, odd: &Event) {
    let packets = [
        flow.packet(&Event::Plain, vec![1; 800]),
        flow.packet(odd, vec![2; 900]),
        flow.packet(&Event::Plain, vec![3; 700]),
    ];
    let back: Vec<_> =
        joined(&packets, true).iter().flat_map(|(header, packet, _)| segmented(header, packet)).collect();
    assert_eq!(back, packets, "{odd:?}");
}

fn plain_flow(v4: bool, tcp: bool) -> Flow {
    let ip = if v4 {
        Ip::V4 { id: 0, fragment: 0x4000, options: Vec::new() }
    } else {
        Ip::V6 { label: 0, extensions: Vec::new() }
    };
    let transport = if tcp {
        Transport::Tcp {
            sequence: 1,
            acknowledged: 9,
            flags: ACK,
            window: 500,
            urgent: 0,
            options: Vec::new(),
        }
    } else {
        Transport::Udp { checksum: true }
    };
    let ports = (1000, 2000);
    let next = Packet { ip, service: 0, hop_limit: 64, host: 1, ports, transport, payload: Vec::new() };
    Flow { next, fixed_id: true }
}

#[test]
fn no_datagram_overtakes_a_fragment_of_its_flow() {
    for v4 in [true, false] {
        let mut flow = plain_flow(v4, false);
        nothing_overtakes(&mut flow, &Event::Fragment { offset: 0, more: true });
    }
}

#[test]
fn no_packet_overtakes_one_of_its_flow_with_an_extension_header_or_options() {
    for tcp in [true, false] {
        nothing_overtakes(&mut plain_flow(true, tcp), &Event::InternetOptions);
        for extension in [0, 43, 60] {
            nothing_overtakes(&mut plain_flow(false, tcp), &Event::Extension(extension));
        }
    }
}
