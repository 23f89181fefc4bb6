//! The device's own key and what hangs on it.

use boringtun::noise::rate_limiter::RateLimiter;
use mesh_sys::uapi::{PublicKey, SecretKey};
use x25519_dalek::StaticSecret;

/// Handshake messages per second from which on senders must prove their address by a cookie. One costs about
/// 0.2 ms, so this bounds what strangers who know the public key can make a core do to a tenth; 4,000 peers that
/// each rekey every two minutes stay below.
const HANDSHAKES_PER_SECOND: u64 = 500;

/// The private key and what is derived from it. Wiped when the last user lets go.
pub(crate) struct LocalKeys {
    pub(crate) private: StaticSecret,
    pub(crate) public: PublicKey,
    /// The same, as the key exchange takes it.
    pub(crate) dh_public: x25519_dalek::PublicKey,
    /// Checks MAC1 and, under load, MAC2 of every handshake message.
    pub(crate) limiter: RateLimiter,
}

impl LocalKeys {
    /// `None` for the all-zero key, which stands for "no key".
    pub(crate) fn new(key: &SecretKey) -> Option<Self> {
        if key.is_zero() {
            return None;
        }
        let private = StaticSecret::from(*key.expose());
        let public = x25519_dalek::PublicKey::from(&private);
        Some(Self {
            private,
            public: PublicKey(public.to_bytes()),
            dh_public: public,
            limiter: RateLimiter::new(&public, HANDSHAKES_PER_SECOND),
        })
    }
}

impl std::fmt::Debug for LocalKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LocalKeys").field("public", &self.public).finish_non_exhaustive()
    }
}
