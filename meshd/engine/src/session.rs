//! A session: the transport keys of one handshake (WireGuard paper, section 5.4.6).
//!
//! Sealing and opening need no lock, so that any number of threads can work for one peer: counters to send with are
//! reserved in runs, and which counters have been received is kept apart, in a [`ReplayWindow`].

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::aead::Key;
use crate::handshake::{DATA, TransportKeys};
use crate::index::Registration;
use crate::noise::NotAuthentic;

/// Type, receiver index, counter.
pub(crate) const HEADER_LEN: usize = 16;
/// Bytes that a data message adds to a packet: header and tag.
pub(crate) const OVERHEAD: usize = HEADER_LEN + 16;
/// Counters from here on are never valid (paper, section 6.1).
pub(crate) const REJECT_AFTER_MESSAGES: u64 = u64::MAX - (1 << 13);

/// The keys of a session and the counter to send with.
pub(crate) struct Session {
    remote_index: u32,
    sending: Key,
    receiving: Key,
    next: AtomicU64,
    registration: Registration,
}

impl Session {
    /// The index of `registration` leads to this session from now on.
    pub(crate) fn new(keys: &TransportKeys, registration: Registration) -> Result<Arc<Self>, NotAuthentic> {
        let session = Arc::new(Self {
            remote_index: keys.remote_index,
            sending: Key::new(&keys.sending)?,
            receiving: Key::new(&keys.receiving)?,
            next: AtomicU64::new(0),
            registration,
        });
        session.registration.lead_to(&session);
        Ok(session)
    }

    /// Our index: comes in with what is received.
    #[cfg(test)]
    pub(crate) fn index(&self) -> u32 {
        self.registration.index
    }

    /// Messages sealed or about to be.
    pub(crate) fn sent(&self) -> u64 {
        self.next.load(Ordering::Relaxed)
    }

    /// Takes the next `count` counters and returns the first.
    pub(crate) fn reserve(&self, count: u64) -> u64 {
        self.next.fetch_add(count, Ordering::Relaxed)
    }

    /// Makes a data message of the packet that lies in `message` between [`HEADER_LEN`] bytes and the 16 for the
    /// tag. Every counter must be used only once.
    pub(crate) fn seal(&self, counter: u64, message: &mut [u8]) -> Result<(), NotAuthentic> {
        let (header, body) = message.split_first_chunk_mut::<HEADER_LEN>().ok_or(NotAuthentic)?;
        let (packet, tag) = body.split_last_chunk_mut::<16>().ok_or(NotAuthentic)?;
        header[..4].copy_from_slice(&DATA.to_le_bytes());
        header[4..8].copy_from_slice(&self.remote_index.to_le_bytes());
        header[8..].copy_from_slice(&counter.to_le_bytes());
        *tag = self.sending.seal(counter, packet)?;
        Ok(())
    }

    /// Decrypts a data message in place; the packet begins after [`HEADER_LEN`] bytes and has the returned length.
    /// Whether the counter was seen before is for the [`ReplayWindow`] to say.
    pub(crate) fn open(&self, message: &mut [u8]) -> Result<(u64, usize), NotAuthentic> {
        let (header, body) = message.split_first_chunk_mut::<HEADER_LEN>().ok_or(NotAuthentic)?;
        let [.., a, b, c, d, e, f, g, h] = *header;
        let counter = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
        Ok((counter, self.receiving.open(counter, body)?))
    }
}

const WORDS: usize = 128;

/// Which counters have been received: RFC 6479, with the 8,192 bits of the kernel, of which one word is always being
/// reused. Threads that send for one peer side by side may mix up that many messages.
pub(crate) struct ReplayWindow {
    /// One more than the highest counter received.
    next: u64,
    words: [u64; WORDS],
}

impl ReplayWindow {
    /// Counters this far behind the highest are refused unseen.
    pub(crate) const SIZE: u64 = (WORDS as u64 - 1) * 64;

    pub(crate) fn new() -> Self {
        Self { next: 0, words: [0; WORDS] }
    }

    /// Marks a counter as received. False when it was before, is too old to tell, or is none of the valid ones.
    pub(crate) fn accept(&mut self, counter: u64) -> bool {
        if counter >= REJECT_AFTER_MESSAGES || counter + Self::SIZE < self.next {
            return false;
        }
        let word = counter / 64;
        if counter >= self.next {
            let newest = self.next.saturating_sub(1) / 64;
            for skipped in (newest + 1..=word).take(WORDS) {
                self.words[skipped as usize % WORDS] = 0;
            }
            self.next = counter + 1;
        }
        let (slot, bit) = (&mut self.words[word as usize % WORDS], 1 << (counter % 64));
        let fresh = *slot & bit == 0;
        *slot |= bit;
        fresh
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_window_ends_where_it_should() {
        let mut window = ReplayWindow::new();
        let top = 100_000;
        assert!(window.accept(top));
        assert!(!window.accept(top));
        assert!(window.accept(top + 1 - ReplayWindow::SIZE));
        assert!(!window.accept(top + 1 - ReplayWindow::SIZE));
        assert!(!window.accept(top - ReplayWindow::SIZE));
        assert!(!window.accept(REJECT_AFTER_MESSAGES) && !window.accept(u64::MAX));
        assert!(window.accept(REJECT_AFTER_MESSAGES - 1));
    }

    proptest! {
        /// Whatever comes in whatever order: nothing twice, and nothing recent refused.
        #[test]
        fn the_window_knows_what_it_has_seen(
            steps in prop::collection::vec((0u64..3, 0u64..20_000), 1..300),
            start in 0u64..1 << 40,
        ) {
            let (mut window, mut seen, mut top) = (ReplayWindow::new(), BTreeSet::new(), start);
            for (kind, distance) in steps {
                let counter = match kind {
                    0 => top + distance % 130,
                    1 => top.saturating_sub(distance),
                    _ => top + distance,
                };
                let recent = counter + ReplayWindow::SIZE > top || seen.is_empty();
                let accepted = window.accept(counter);
                if recent {
                    prop_assert_eq!(accepted, !seen.contains(&counter), "{}", counter);
                } else {
                    prop_assert!(!(accepted && seen.contains(&counter)), "{} twice", counter);
                }
                if accepted {
                    seen.insert(counter);
                    top = top.max(counter);
                }
            }
        }
    }
}
