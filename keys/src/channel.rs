//! What a control session between two nodes must offer, whatever carries it.
//!
//! The daemon's sessions are TLS 1.3 with raw Ed25519 keys and X25519MLKEM768; a simulator uses
//! `testing::MemoryChannel` (feature `testing`). Everything above this trait is the same for both.

use crate::identity::IdentityKey;
use crate::secret::Secret32;

/// An encrypted session whose other end has proved its identity.
///
/// # Security
///
/// Implementations must hold: the peer has signed this very session with [`SecureChannel::peer`];
/// [`SecureChannel::exporter`] gives the same value at both ends, an unpredictable one to anyone
/// else, and another one in any other session, also between the same two nodes (RFC 9266). A channel
/// that resumes old secrets does not.
///
/// The exporter of TLS 1.3 covers the handshake up to the server's part, so the client's key does
/// not go into it. Whatever is derived from it and meant for two identities names both.
pub trait SecureChannel {
    /// Who the other end is.
    fn peer(&self) -> IdentityKey;

    /// A secret that only the two ends of this session know (RFC 8446, section 7.5).
    ///
    /// # Errors
    /// [`ExporterError`] before the session is set up.
    fn exporter(&self, label: &str, context: &[u8]) -> Result<Secret32, ExporterError>;
}

/// The session gives no secrets: it is not set up, or already gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the session has no key material to export")]
pub struct ExporterError;

/// What the protocols above draw from a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionSecrets {
    /// Names the session, for proofs that must not be valid in another one. It may be known to the
    /// other end only; it is no key.
    pub join_binding: [u8; 32],
    /// Where the pre-shared WireGuard keys of the two nodes come from: see
    /// [`pair_psk`](crate::wireguard::pair_psk).
    pub psk_seed: Secret32,
}

impl SessionSecrets {
    /// Draws both from a session.
    ///
    /// # Errors
    /// [`ExporterError`].
    pub fn derive(channel: &impl SecureChannel) -> Result<Self, ExporterError> {
        Ok(Self {
            join_binding: *channel.exporter(JOIN_LABEL, b"")?.expose(),
            psk_seed: channel.exporter(PSK_LABEL, b"")?,
        })
    }
}

/// Exporter label of [`SessionSecrets::join_binding`].
pub const JOIN_LABEL: &str = "EXPORTER-hauberk-join";
/// Exporter label of [`SessionSecrets::psk_seed`].
pub const PSK_LABEL: &str = "EXPORTER-hauberk-wg-psk";

/// Channels without a network, for simulators and tests.
#[cfg(any(test, feature = "testing"))]
pub mod testing {
    use super::{ExporterError, SecureChannel};
    use crate::identity::IdentityKey;
    use crate::secret::{Secret32, hkdf32};

    /// One end of a channel in memory. It carries no bytes: it is the identities and the exporter.
    #[derive(Clone, Debug)]
    pub struct MemoryChannel {
        peer: IdentityKey,
        secret: Secret32,
    }

    impl MemoryChannel {
        /// Both ends of a session between `a` and `b`: the first is held by `a`. Another `seed` is
        /// another session.
        #[must_use]
        pub fn pair(a: IdentityKey, b: IdentityKey, seed: &[u8; 32]) -> (Self, Self) {
            let secret = hkdf32(b"hauberk memory channel", seed, &[a.as_bytes(), b.as_bytes()]);
            (Self { peer: b, secret: secret.clone() }, Self { peer: a, secret })
        }
    }

    impl SecureChannel for MemoryChannel {
        fn peer(&self) -> IdentityKey {
            self.peer
        }

        fn exporter(&self, label: &str, context: &[u8]) -> Result<Secret32, ExporterError> {
            let length = (label.len() as u64).to_le_bytes();
            Ok(hkdf32(
                b"hauberk memory exporter",
                self.secret.expose(),
                &[&length, label.as_bytes(), context],
            ))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::testing::MemoryChannel;
    use super::*;

    fn key(seed: u8) -> IdentityKey {
        crate::Identity::from_bytes(&[seed; 32]).public()
    }

    #[test]
    fn both_ends_of_a_session_draw_the_same_secrets_and_no_other_session_does() {
        let [a, b, c] = [1, 2, 3].map(key);
        let (at_a, at_b) = MemoryChannel::pair(a, b, &[7; 32]);
        assert_eq!((at_a.peer(), at_b.peer()), (b, a));
        let secrets = SessionSecrets::derive(&at_a).unwrap();
        assert_eq!(SessionSecrets::derive(&at_b).unwrap(), secrets);
        assert_ne!(&secrets.join_binding, secrets.psk_seed.expose());
        for (one, other, seed) in [(a, b, [8; 32]), (a, c, [7; 32]), (b, a, [7; 32])] {
            let (channel, _) = MemoryChannel::pair(one, other, &seed);
            let others = SessionSecrets::derive(&channel).unwrap();
            assert_ne!(others.join_binding, secrets.join_binding);
            assert_ne!(others.psk_seed, secrets.psk_seed);
        }
    }

    #[test]
    fn label_and_context_are_kept_apart() {
        let [a, b] = [1, 2].map(key);
        let (channel, _) = MemoryChannel::pair(a, b, &[7; 32]);
        assert_ne!(channel.exporter("label", b"x").unwrap(), channel.exporter("labelx", b"").unwrap());
        assert_ne!(channel.exporter("label", b"x").unwrap(), channel.exporter("label", b"y").unwrap());
    }
}
