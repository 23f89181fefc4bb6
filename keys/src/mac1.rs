//! The first MAC of WireGuard's handshake messages: it says whom a message is for, to those who know that key.
//!
//! WireGuard paper, section 5.4.4:
//!
//! ```text
//! mac1 = BLAKE2s-128 keyed with BLAKE2s-256("mac1----" ‖ static public key of the receiver),
//!        over the message up to mac1
//! ```
//!
//! The key is public, so a MAC proves nothing of its sender.

use blake2::digest::consts::U16;
use blake2::digest::{KeyInit, Mac as _};
use blake2::{Blake2s256, Blake2sMac, Digest as _};
use subtle::ConstantTimeEq as _;

use crate::wireguard::WgPublic;

/// Length of a handshake initiation, in bytes.
pub const INITIATION_LEN: usize = 148;

/// Length of a handshake response, in bytes.
pub const RESPONSE_LEN: usize = 92;

/// Length of each of the two MACs at the end of a handshake message, in bytes.
const MAC_LEN: usize = 16;

/// What marks messages for the holder of one WireGuard key.
#[derive(Clone, Debug)]
pub struct Mac1Key(Blake2sMac<U16>);

impl Mac1Key {
    /// For messages to `receiver`.
    #[must_use]
    pub fn of(receiver: &WgPublic) -> Self {
        let key = Blake2s256::new().chain_update(b"mac1----").chain_update(receiver.as_bytes()).finalize();
        Self(<Blake2sMac<U16> as KeyInit>::new(&key))
    }

    /// Whether `message`, an initiation or a response, is for that receiver.
    #[must_use]
    pub fn matches(&self, message: &[u8]) -> bool {
        if !matches!(message.len(), INITIATION_LEN | RESPONSE_LEN) {
            return false;
        }
        let (rest, _mac2) = message.split_at(message.len() - MAC_LEN);
        let (covered, mac1) = rest.split_at(rest.len() - MAC_LEN);
        self.mac(covered).ct_eq(mac1).into()
    }

    /// Marks `message`, whose length is that of an initiation or a response.
    #[cfg(any(test, feature = "testing"))]
    pub fn mark(&self, message: &mut [u8]) {
        let at = message.len() - 2 * MAC_LEN;
        let mac = self.mac(&message[..at]);
        message[at..at + MAC_LEN].copy_from_slice(&mac);
    }

    fn mac(&self, covered: &[u8]) -> [u8; MAC_LEN] {
        self.0.clone().chain_update(covered).finalize().into_bytes().into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Computed with another implementation of BLAKE2s: key bytes 0 to 31, message type 1 and then multiples of 7.
    const MAC: &str = "de53fbae57962fb7f7f2dea79f2e4f59";

    fn initiation() -> (Mac1Key, [u8; INITIATION_LEN]) {
        let key = Mac1Key::of(&WgPublic::from_bytes(std::array::from_fn(|at| at as u8)));
        let mut message = [0; INITIATION_LEN];
        message[0] = 1;
        for (at, byte) in message[4..116].iter_mut().enumerate() {
            *byte = (at * 7) as u8;
        }
        (key, message)
    }

    #[test]
    fn the_mac_is_that_of_the_paper() {
        let (key, mut message) = initiation();
        message[116..132].copy_from_slice(&hex::decode(MAC).unwrap());
        assert!(key.matches(&message));
        let marked = message;
        key.mark(&mut message);
        assert_eq!(message, marked);
    }

    #[test]
    fn what_is_changed_too_short_or_for_another_does_not_match() {
        let (key, mut message) = initiation();
        key.mark(&mut message);
        let other = Mac1Key::of(&WgPublic::from_bytes([9; 32]));
        assert!(key.matches(&message) && !other.matches(&message));
        assert!(!key.matches(&message[..147]) && !key.matches(&[]) && !key.matches(&message[56..]));
        for at in [0, 60, 115, 116, 131] {
            let mut changed = message;
            changed[at] ^= 1;
            assert!(!key.matches(&changed), "byte {at}");
        }
        message[147] ^= 1;
        assert!(key.matches(&message), "the second MAC is none of its business");
    }
}
