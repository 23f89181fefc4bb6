//! Which queue of a TUN device a flow belongs to.

/// The queue for a packet of a device with `queues` of them.
///
/// Both directions of a flow have the same queue. When packets that come in are written to it, the kernel hands out
/// the flow's packets that go out there, too (`tun_flow_update` in `drivers/net/tun.c`), so flows share the queues and
/// the threads that serve them, and each stays in order. The first queue is kept for what is neither TCP nor UDP,
/// above all ICMP: it does not wait behind anybody's bulk data.
#[must_use]
pub fn steer(packet: &[u8], queues: usize) -> usize {
    match flow_hash(packet) {
        Some(hash) if queues > 1 => 1 + ((u64::from(hash) * (queues as u64 - 1)) >> 32) as usize,
        _ => 0,
    }
}

/// A hash that both directions of a TCP or UDP flow have in common. All fragments of a datagram have the same.
fn flow_hash(packet: &[u8]) -> Option<u32> {
    let (addresses, protocol, l4, fragment) = match packet.first()? >> 4 {
        4 => {
            let fragment = u16::from_be_bytes([*packet.get(6)?, packet[7]]) & 0x3fff != 0;
            (packet.get(12..20)?, packet[9], usize::from(packet[0] & 15) * 4, fragment)
        }
        6 => (packet.get(8..40)?, packet[6], 40, false),
        _ => return None,
    };
    const TCP: u8 = 6;
    const UDP: u8 = 17;
    let ports = match (protocol, fragment) {
        (TCP | UDP, false) => {
            let ports = packet.get(l4..l4 + 4)?;
            u32::from(u16::from_be_bytes([ports[0], ports[1]]) ^ u16::from_be_bytes([ports[2], ports[3]]))
        }
        (TCP | UDP, true) => 0,
        _ => return None,
    };
    // Exclusive or forgets who is the sender.
    let words =
        addresses.chunks_exact(4).map(|word| u32::from_be_bytes([word[0], word[1], word[2], word[3]]));
    let sum = words.fold(ports, |sum, word| sum ^ word);
    // Fibonacci hashing, twice: ports differ in few bits.
    let mixed = (sum ^ u32::from(protocol) << 24).wrapping_mul(0x9e37_79b9);
    Some((mixed ^ mixed >> 15).wrapping_mul(0x85eb_ca6b))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp4(source: [u8; 4], destination: [u8; 4], ports: [u16; 2]) -> Vec<u8> {
        let mut packet = vec![0; 40];
        (packet[0], packet[9]) = (0x45, 6);
        packet[12..16].copy_from_slice(&source);
        packet[16..20].copy_from_slice(&destination);
        packet[20..22].copy_from_slice(&ports[0].to_be_bytes());
        packet[22..24].copy_from_slice(&ports[1].to_be_bytes());
        packet
    }

    #[test]
    fn both_directions_share_a_queue_and_flows_spread() {
        let mut used = [0; 8];
        for port in 40_000..40_400 {
            let there = tcp4([10, 0, 0, 1], [10, 0, 0, 2], [port, 5201]);
            let back = tcp4([10, 0, 0, 2], [10, 0, 0, 1], [5201, port]);
            assert_eq!(steer(&there, 8), steer(&back, 8));
            used[steer(&there, 8)] += 1;
        }
        assert_eq!(used[0], 0, "kept for others");
        assert!(used[1..].iter().all(|count| (30..90).contains(count)), "{used:?}");
    }

    #[test]
    fn what_is_neither_tcp_nor_udp_or_no_packet_has_the_first_queue() {
        let mut ping = tcp4([10, 0, 0, 1], [10, 0, 0, 2], [8, 0]);
        ping[9] = 1;
        for packet in [&ping[..], &[], &[0x45], &[0x60; 20], &[0xff; 60]] {
            assert_eq!(steer(packet, 8), 0);
        }
        assert_eq!(steer(&tcp4([1; 4], [2; 4], [3, 4]), 1), 0);
    }

    #[test]
    fn fragments_stay_together() {
        let mut first = tcp4([10, 0, 0, 1], [10, 0, 0, 2], [1, 2]);
        (first[9], first[6]) = (17, 0x20);
        let mut second = tcp4([10, 0, 0, 1], [10, 0, 0, 2], [9, 9]);
        (second[9], second[7]) = (17, 100);
        assert_eq!(steer(&first, 8), steer(&second, 8));
    }
}
