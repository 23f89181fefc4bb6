//! What a router does with a packet that is too long for the next link: RFC 1812 and RFC 4443. Pure.

use std::net::{Ipv4Addr, Ipv6Addr};

use crate::ping::checksum;

/// Length of an Ethernet header, in bytes.
const ETHERNET: usize = 14;

/// Length of an IPv4 header without options, in bytes, and of an ICMP header.
const IPV4: usize = 20;
const ICMP: usize = 8;

/// Length of an IPv6 header, in bytes.
const IPV6: usize = 40;

/// The longest error messages, whole packets, in bytes: RFC 1812 (4.3.2.3) and RFC 4443 (2.4).
const LONGEST_V4: usize = 576;
const LONGEST_V6: usize = 1280;

/// The addresses from which a router complains.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Complainer {
    pub(crate) mac: [u8; 6],
    pub(crate) v4: Ipv4Addr,
    pub(crate) v6: Ipv6Addr,
}

/// What becomes of a packet that is too long.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// A frame to its sender.
    Complaint(Vec<u8>),
    /// Frames that go on instead of it.
    Fragments(Vec<Vec<u8>>),
    /// Nothing: it cannot be understood.
    None,
}

/// The length of the IP packet in a frame, in bytes; `None` for other frames.
pub(crate) fn ip_length(frame: &[u8]) -> Option<usize> {
    match frame.get(12..14)? {
        [0x08, 0x00] => Some(usize::from(u16_at(frame, ETHERNET + 2)?)),
        [0x86, 0xdd] => Some(IPV6 + usize::from(u16_at(frame, ETHERNET + 4)?)),
        _ => None,
    }
}

/// What a router says about, or makes of, a frame whose packet is longer than `mtu`.
pub(crate) fn answer(frame: &[u8], mtu: u16, from: &Complainer) -> Answer {
    let found = match frame.get(12..14) {
        Some([0x08, 0x00]) => {
            let may_be_cut = u16_at(frame, ETHERNET + 6).is_some_and(|flags| flags & DONT_FRAGMENT == 0);
            if may_be_cut {
                fragments(frame, mtu).map(Answer::Fragments)
            } else {
                complain_v4(frame, mtu, from).map(Answer::Complaint)
            }
        }
        Some([0x86, 0xdd]) => complain_v6(frame, mtu, from).map(Answer::Complaint),
        _ => None,
    };
    found.unwrap_or(Answer::None)
}

const DONT_FRAGMENT: u16 = 0x4000;
const MORE_FRAGMENTS: u16 = 0x2000;

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

/// A frame back to where another one came from.
fn back_to(frame: &[u8], from: &Complainer) -> Option<Vec<u8>> {
    Some([frame.get(6..12)?, &from.mac, frame.get(12..14)?].concat())
}

fn complain_v4(frame: &[u8], mtu: u16, from: &Complainer) -> Option<Vec<u8>> {
    let packet = frame.get(ETHERNET..)?;
    let quoted = &packet[..packet.len().min(LONGEST_V4 - IPV4 - ICMP)];
    // Destination unreachable, fragmentation needed.
    let mut icmp = [&[3, 4, 0, 0, 0, 0][..], &mtu.to_be_bytes(), quoted].concat();
    let sum = checksum(&icmp);
    icmp[2..4].copy_from_slice(&sum.to_be_bytes());
    let length = u16::try_from(IPV4 + icmp.len()).ok()?.to_be_bytes();
    let mut header = [
        &[0x45, 0xc0, length[0], length[1], 0, 0, 0, 0, 64, 1, 0, 0],
        &from.v4.octets()[..],
        packet.get(12..16)?,
    ]
    .concat();
    let sum = checksum(&header);
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    Some([back_to(frame, from)?, header, icmp].concat())
}

fn complain_v6(frame: &[u8], mtu: u16, from: &Complainer) -> Option<Vec<u8>> {
    let packet = frame.get(ETHERNET..)?;
    let quoted = &packet[..packet.len().min(LONGEST_V6 - IPV6 - ICMP)];
    // Packet too big.
    let mut icmp = [&[2, 0, 0, 0, 0, 0][..], &mtu.to_be_bytes(), quoted].concat();
    let length = u16::try_from(icmp.len()).ok()?.to_be_bytes();
    let (source, target) = (from.v6.octets(), packet.get(8..24)?);
    let pseudo = [&source[..], target, &[0, 0], &length, &[0, 0, 0, 58], &icmp].concat();
    let sum = checksum(&pseudo);
    icmp[2..4].copy_from_slice(&sum.to_be_bytes());
    let header = [&[0x60, 0, 0, 0, length[0], length[1], 58, 64], &source[..], target].concat();
    Some([back_to(frame, from)?, header, icmp].concat())
}

fn fragments(frame: &[u8], mtu: u16) -> Option<Vec<Vec<u8>>> {
    let (ethernet, packet) = frame.split_at_checked(ETHERNET)?;
    let header_length = usize::from(packet.first()? & 0xf) * 4;
    let header = packet.get(..header_length).filter(|header| header.len() >= IPV4)?;
    let payload = packet.get(header_length..usize::from(u16_at(packet, 2)?))?;
    let (flags, first) = (u16_at(packet, 6)? & MORE_FRAGMENTS, u16_at(packet, 6)? & 0x1fff);
    // Offsets are counted in eights.
    let step = usize::from(mtu).checked_sub(header_length)? & !7;
    let mut made = Vec::new();
    for (number, piece) in payload.chunks(step.max(8)).enumerate() {
        let last = (number + 1) * step >= payload.len();
        let more = if last { flags } else { MORE_FRAGMENTS };
        let offset = first + u16::try_from(number * step / 8).ok()?;
        let mut header = header.to_vec();
        header[2..4].copy_from_slice(&u16::try_from(header_length + piece.len()).ok()?.to_be_bytes());
        header[6..8].copy_from_slice(&(more | offset).to_be_bytes());
        header[10..12].fill(0);
        let sum = checksum(&header);
        header[10..12].copy_from_slice(&sum.to_be_bytes());
        made.push([ethernet, &header, piece].concat());
    }
    Some(made)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ROUTER: Complainer = Complainer {
        mac: [2, 0, 0, 0, 0, 9],
        v4: Ipv4Addr::new(198, 18, 0, 254),
        v6: Ipv6Addr::new(0xfd00, 0x18, 0, 0, 0, 0, 0, 0xfe),
    };

    fn v4(payload: usize, flags: u16) -> Vec<u8> {
        let length = u16::try_from(IPV4 + payload).unwrap().to_be_bytes();
        let flags = flags.to_be_bytes();
        let mut header = vec![
            0x45, 0, length[0], length[1], 7, 7, flags[0], flags[1], 64, 17, 0, 0, 198, 18, 0, 1, 198, 18, 0,
            2,
        ];
        let sum = checksum(&header);
        header[10..12].copy_from_slice(&sum.to_be_bytes());
        let payload: Vec<u8> = (0..payload).map(|at| at as u8).collect();
        [&[2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0][..], &header, &payload].concat()
    }

    fn v6(payload: usize) -> Vec<u8> {
        let length = u16::try_from(payload).unwrap().to_be_bytes();
        let mut packet = vec![0x60, 0, 0, 0, length[0], length[1], 17, 64];
        packet.extend([1; 16]);
        packet.extend([2; 16]);
        packet.resize(IPV6 + payload, 0x55);
        [&[2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 0x86, 0xdd][..], &packet].concat()
    }

    #[test]
    fn a_packet_that_may_not_be_cut_is_answered_with_the_length_that_may() {
        let frame = v4(1400, DONT_FRAGMENT);
        assert_eq!(ip_length(&frame), Some(1420));
        let Answer::Complaint(answer) = answer(&frame, 1300, &ROUTER) else { panic!() };
        assert_eq!(answer[..14], [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 9, 8, 0]);
        assert_eq!(answer.len(), 14 + 576);
        assert_eq!(ip_length(&answer), Some(576));
        assert_eq!((checksum(&answer[14..34]), checksum(&answer[34..])), (0, 0));
        assert_eq!((&answer[26..30], &answer[30..34]), (&[198, 18, 0, 254][..], &[198, 18, 0, 1][..]));
        assert_eq!((&answer[34..36], u16_at(&answer, 40)), (&[3, 4][..], Some(1300)));
        assert_eq!(answer[42..], frame[14..14 + 548]);
    }

    #[test]
    fn ipv6_is_never_cut() {
        let frame = v6(1400);
        assert_eq!(ip_length(&frame), Some(1440));
        let Answer::Complaint(answer) = answer(&frame, 1280, &ROUTER) else { panic!() };
        assert_eq!(answer.len(), 14 + 1280);
        let pseudo = [&answer[22..54], &[0, 0], &answer[18..20], &[0, 0, 0, 58], &answer[54..]].concat();
        assert_eq!(checksum(&pseudo), 0);
        assert_eq!((&answer[38..54], answer[54], u16_at(&answer, 60)), (&[1; 16][..], 2, Some(1280)));
    }

    proptest! {
        #[test]
        fn fragments_make_up_the_packet(payload in 1usize..1480, mtu in 576u16..1500) {
            let frame = v4(payload, 0);
            let Answer::Fragments(fragments) = answer(&frame, mtu, &ROUTER) else { panic!() };
            let mut whole = vec![0; payload];
            for (number, fragment) in fragments.iter().enumerate() {
                prop_assert!(ip_length(fragment).unwrap() <= usize::from(mtu));
                prop_assert_eq!(ip_length(fragment).unwrap() + 14, fragment.len());
                prop_assert_eq!(checksum(&fragment[14..34]), 0);
                let flags = u16_at(fragment, 20).unwrap();
                prop_assert_eq!(flags & MORE_FRAGMENTS != 0, number + 1 < fragments.len());
                let at = usize::from(flags & 0x1fff) * 8;
                whole[at..at + fragment.len() - 34].copy_from_slice(&fragment[34..]);
            }
            prop_assert_eq!(&whole, &frame[34..]);
        }

        #[test]
        fn no_frame_makes_it_panic(frame in proptest::collection::vec(any::<u8>(), 0..120), mtu in 576u16..1500, kind in 0..3) {
            let mut frame = frame;
            if let Some(place) = frame.get_mut(12..14) {
                place.copy_from_slice([[8, 0], [0x86, 0xdd], [8, 6]][usize::try_from(kind).unwrap()].as_slice());
            }
            let _ = (ip_length(&frame), answer(&frame, mtu, &ROUTER));
        }
    }
}
