//! What was dropped, and why.

use std::sync::atomic::{AtomicU64, Ordering};

/// Why a packet or datagram went nowhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub enum DropReason {
    /// A packet from the TUN device whose destination no peer owns.
    NoPeer,
    /// A packet for a peer without a known endpoint, or while the device has no private key.
    NoEndpoint,
    /// A packet from the TUN device that is no IP packet.
    MalformedPacket,
    /// A datagram the kernel refused to send.
    SendFailed,
    /// A datagram that is no WireGuard message, or names no session of ours.
    UnknownDatagram,
    /// A datagram that failed authentication, or repeats an earlier one.
    NotAuthentic,
    /// An authentic packet whose inner source address is not its sender's.
    ForeignSource,
    /// A packet the TUN device did not take.
    TunRefused,
}

const REASONS: usize = 8;

/// Counts of dropped packets since the start.
#[derive(Debug, Default)]
pub struct Counters([AtomicU64; REASONS]);

impl Counters {
    /// How many were dropped for `reason`.
    #[must_use]
    pub fn dropped(&self, reason: DropReason) -> u64 {
        self.0[reason as usize].load(Ordering::Relaxed)
    }

    pub(crate) fn count(&self, reason: DropReason) {
        self.count_many(reason, 1);
    }

    pub(crate) fn count_many(&self, reason: DropReason, many: usize) {
        self.0[reason as usize].fetch_add(many as u64, Ordering::Relaxed);
    }
}
