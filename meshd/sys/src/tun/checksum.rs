//! The Internet checksum (RFC 1071).

use std::net::IpAddr;

/// Adds `bytes` to the running sum. The sum is over 16-bit words in native byte order, which RFC 1071 section 2(B)
/// allows as long as the result is stored the same way; an odd last byte counts as the first of its word.
pub(super) fn add(sum: u64, bytes: &[u8]) -> u64 {
    if bytes.len() < BLOCK {
        return add_short(fold_once(sum), bytes);
    }
    // Shorter ones are headers, for which the detour does not pay.
    #[cfg(target_arch = "x86_64")]
    if bytes.len() >= 128 && std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has AVX2.
        #[expect(unsafe_code, reason = "code for a processor feature may run only where that was detected")]
        return unsafe { avx2::add(sum, bytes) };
    }
    add_portable(sum, bytes)
}

/// Copies `from` to `to`, which is as long, and adds it to the running sum.
pub(super) fn copy_and_add(sum: u64, from: &[u8], to: &mut [u8]) -> u64 {
    #[cfg(target_arch = "x86_64")]
    if from.len() >= 128 && std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has AVX2.
        #[expect(unsafe_code, reason = "code for a processor feature may run only where that was detected")]
        return unsafe { avx2::copy_and_add(sum, from, to) };
    }
    copy_and_add_portable(sum, from, to)
}

/// The portable functions, compiled for AVX2: what the compiler makes of them sums 32 bytes at a time.
#[cfg(target_arch = "x86_64")]
mod avx2 {
    #[target_feature(enable = "avx2")]
    pub(super) fn add(sum: u64, bytes: &[u8]) -> u64 {
        super::add_portable(sum, bytes)
    }

    #[target_feature(enable = "avx2")]
    pub(super) fn copy_and_add(sum: u64, from: &[u8], to: &mut [u8]) -> u64 {
        super::copy_and_add_portable(sum, from, to)
    }
}

const BLOCK: usize = 64;

#[inline(always)]
fn add_block(lanes: &mut [u64; BLOCK / 4], block: &[u8; BLOCK]) {
    for (lane, word) in lanes.iter_mut().zip(block.as_chunks::<4>().0) {
        *lane += u64::from(u32::from_ne_bytes(*word));
    }
}

#[inline(always)]
fn add_rest(sum: u64, lanes: &[u64; BLOCK / 4], rest: &[u8]) -> u64 {
    let mut total = fold_once(sum);
    for lane in lanes {
        total += lane;
    }
    add_short(total, rest)
}

/// For headers, and what is left of blocks.
#[inline(always)]
fn add_short(mut total: u64, bytes: &[u8]) -> u64 {
    let (words, rest) = bytes.as_chunks::<4>();
    for word in words {
        total += u64::from(u32::from_ne_bytes(*word));
    }
    let (words, rest) = rest.as_chunks::<2>();
    for word in words {
        total += u64::from(u16::from_ne_bytes(*word));
    }
    if let [last] = rest {
        total += u64::from(u16::from_ne_bytes([*last, 0]));
    }
    total
}

#[inline(always)]
fn add_portable(sum: u64, bytes: &[u8]) -> u64 {
    let mut lanes = [0; BLOCK / 4];
    let (blocks, rest) = bytes.as_chunks::<BLOCK>();
    for block in blocks {
        add_block(&mut lanes, block);
    }
    add_rest(sum, &lanes, rest)
}

#[inline(always)]
fn copy_and_add_portable(sum: u64, from: &[u8], to: &mut [u8]) -> u64 {
    let mut lanes = [0; BLOCK / 4];
    let (blocks, rest) = from.as_chunks::<BLOCK>();
    let (copies, rest_copy) = to.as_chunks_mut::<BLOCK>();
    for (block, copy) in blocks.iter().zip(copies) {
        *copy = *block;
        add_block(&mut lanes, block);
    }
    rest_copy.copy_from_slice(rest);
    add_rest(sum, &lanes, rest)
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// As RFC 1071 has it: word by word.
    fn plain(bytes: &[u8]) -> [u8; 2] {
        let mut sum = 0u32;
        for word in bytes.chunks(2) {
            sum += u32::from(u16::from_be_bytes([word[0], word.get(1).copied().unwrap_or(0)]));
            sum = (sum & 0xffff) + (sum >> 16);
        }
        (!(sum as u16)).to_be_bytes()
    }

    proptest! {
        #[test]
        fn every_way_to_sum_gives_the_same(
            bytes in prop::collection::vec(any::<u8>(), 0..3000), cut in 0usize..1500,
        ) {
            let cut = (cut * 2).min(bytes.len() / 2 * 2);
            let (head, tail) = bytes.split_at(cut);
            let mut copy = vec![0; tail.len()];
            prop_assert_eq!(finish(add(0, &bytes)), plain(&bytes));
            prop_assert_eq!(finish(add(add(0, head), tail)), plain(&bytes));
            prop_assert_eq!(finish(copy_and_add(add(0, head), tail, &mut copy)), plain(&bytes));
            prop_assert_eq!(&copy[..], tail);
            prop_assert_eq!(finish(add_portable(0, &bytes)), plain(&bytes));
        }
    }
}
