//! The Internet checksum (RFC 1071).

use std::net::IpAddr;

/// Adds `bytes` to the running sum. The sum is over 16-bit words in native byte order, which RFC 1071 section 2(B)
/// allows as long as the result is stored the same way; an odd last byte counts as the first of its word.
pub(super) fn add(sum: u64, bytes: &[u8]) -> u64 {
    let mut lanes = [0u64; 8];
    let mut blocks = bytes.chunks_exact(32);
    for block in &mut blocks {
        for (lane, word) in lanes.iter_mut().zip(block.chunks_exact(4)) {
            *lane += u64::from(u32::from_ne_bytes([word[0], word[1], word[2], word[3]]));
        }
    }
    let mut total = fold_once(sum);
    for lane in lanes {
        total += lane;
    }
    let mut words = blocks.remainder().chunks_exact(2);
    for word in &mut words {
        total += u64::from(u16::from_ne_bytes([word[0], word[1]]));
    }
    if let [last] = words.remainder() {
        total += u64::from(u16::from_ne_bytes([*last, 0]));
    }
    total
}

fn fold_once(sum: u64) -> u64 {
    (sum & 0xffff_ffff) + (sum >> 32)
}

/// Folds a sum to the 16 bits that stand in a packet, not complemented.
pub(super) fn fold(sum: u64) -> [u8; 2] {
    let mut sum = fold_once(fold_once(sum));
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (sum as u16).to_ne_bytes()
}

/// Folds and complements: the checksum itself.
pub(super) fn finish(sum: u64) -> [u8; 2] {
    let [a, b] = fold(sum);
    [!a, !b]
}

/// The sum of a 16-bit number in network order.
pub(super) fn word(value: u16) -> u64 {
    u64::from(u16::from_ne_bytes(value.to_be_bytes()))
}

/// The sum of the pseudo-header (RFC 793 section 3.1, RFC 8200 section 8.1) for `length` bytes of layer 4.
pub(super) fn pseudo_header(source: IpAddr, destination: IpAddr, protocol: u8, length: u16) -> u64 {
    let mut sum = word(protocol.into()) + word(length);
    for address in [source, destination] {
        sum = match address {
            IpAddr::V4(address) => add(sum, &address.octets()),
            IpAddr::V6(address) => add(sum, &address.octets()),
        };
    }
    sum
}
