//! Superpackets as the kernel hands them over, cut up for the peer, and joined again by the other end.

use mesh_sys::tun::{GsoKind, MAX_PIECES, VnetHeader};
use proptest::collection::vec;
use proptest::prelude::*;

use crate::build::*;

prop_compose! {
    /// Layer 3, with what a kernel may put there and without.
    fn internet()(
        v4: bool, id: u16, label: u32, dont_fragment: bool, odd in 0u8..6, words in 1usize..10,
        numbers in vec(prop::sample::select(vec![0u8, 60]), 1..3),
    ) -> Ip {
        if v4 {
            let options = if odd == 0 { vec![1; 4 * words] } else { Vec::new() };
            Ip::V4 { id, fragment: if dont_fragment { 0x4000 } else { 0 }, options }
        } else {
            let extensions = if odd == 0 { numbers } else { Vec::new() };
            Ip::V6 { label, extensions: extensions.into_iter().map(|number| (number, [1, 4, 0, 0, 0, 0])).collect() }
        }
    }
}

fn transport() -> impl Strategy<Value = Transport> {
    let flags = prop_oneof![
        6 => Just(ACK), 3 => Just(ACK | PSH), 1 => Just(ACK | FIN), 1 => Just(ACK | PSH | FIN), 1 => Just(ACK | CWR),
        1 => Just(ACK | ECE | PSH),
    ];
    // None, timestamps, timestamps and SACK blocks.
    let options = prop::sample::select(vec![0usize, 12, 32, 40]);
    let tcp = (any::<u32>(), any::<u32>(), flags, any::<u16>(), options);
    prop_oneof![
        3 => tcp.prop_map(|(sequence, acknowledged, flags, window, length)| Transport::Tcp {
            sequence, acknowledged, flags, window, urgent: 0, options: vec![1; length],
        }),
        1 => Just(Transport::Udp { checksum: true }),
    ]
}

prop_compose! {
    /// A superpacket with the length of its segments.
    fn superpacket()(
        ip in internet(), transport in transport(), service: u8, hop_limit in 1u8.., ports: (u16, u16),
        seed: u8, size in prop_oneof![1u16..9000, Just(1448u16), Just(1368u16), Just(1u16)],
        length in prop_oneof![1usize..=65_400, 1usize..3000],
    ) -> (Packet, u16) {
        let mut packet = Packet { ip, service, hop_limit, host: 1, ports, transport, payload: Vec::new() };
        let room = usize::from(u16::MAX) - packet.header_len();
        // So many segments the kernel makes of one.
        let length = length.min(room).min(usize::from(size) * 200);
        packet.payload = (0..length).map(|at| (at / 3) as u8 ^ seed).collect();
        (packet, size)
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn a_superpacket_is_cut_as_the_kernel_would((packet, size) in superpacket(), hint: u16) {
        let (mut header, bytes) = packet.superpacket(size);
        // The length of the headers is a hint, which may be wrong.
        if hint % 4 == 0 {
            header.header_len = hint;
        }
        let expected: Vec<_> = packet.cut(size.into()).iter().map(Packet::bytes).collect();
        prop_assert_eq!(segmented(&header, &bytes), expected);
    }

    #[test]
    fn a_cut_superpacket_is_joined_to_the_same((packet, size) in superpacket()) {
        let (header, bytes) = packet.superpacket(size);
        let segments = segmented(&header, &bytes);
        let joined = joined(&segments, true);
        let joinable = match (&packet.ip, &packet.transport) {
            (Ip::V4 { options, .. }, _) if !options.is_empty() => false,
            (Ip::V6 { extensions, .. }, _) if !extensions.is_empty() => false,
            // What ends a flow, or says something about congestion, travels alone; so do its neighbours perhaps.
            (_, Transport::Tcp { flags, .. }) => flags & !(ACK | PSH) == 0,
            (_, Transport::Udp { .. }) => true,
        };
        if joinable && segments.len() <= MAX_PIECES {
            prop_assert_eq!(joined.len(), 1);
            let (joined_header, joined_bytes, pieces) = &joined[0];
            prop_assert_eq!(*pieces, segments.len());
            if segments.len() == 1 {
                prop_assert_eq!((joined_header, joined_bytes), (&VnetHeader::PLAIN, &segments[0]));
            } else {
                prop_assert_eq!(joined_header, &header);
                prop_assert_eq!(joined_bytes, &bytes);
            }
        }
        let again: Vec<_> = joined.iter().flat_map(|(header, bytes, _)| segmented(header, bytes)).collect();
        prop_assert_eq!(again, segments);
    }

    #[test]
    fn a_packet_with_an_open_checksum_is_completed((packet, _) in superpacket()) {
        let (header, bytes) = packet.superpacket(1);
        let header = VnetHeader { gso: GsoKind::None, gso_size: 0, ..header };
        prop_assert_eq!(segmented(&header, &bytes), [packet.bytes()]);
    }

    #[test]
    fn a_packet_that_needs_nothing_is_passed_on((packet, _) in superpacket()) {
        prop_assert_eq!(segmented(&VnetHeader::PLAIN, &packet.bytes()), [packet.bytes()]);
    }
}
