//! Which peer a datagram is for: the table of receiver indices.
//!
//! boringtun counts sessions in the low 8 bits of an index and leaves the high 24 bits to its user, so what is
//! registered here is the high part. It is drawn at random, so that an observer cannot count peers.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock, Weak};

use rand_core::{OsRng, RngCore as _};

use crate::peer::Peer;

/// The high 24 bits of a receiver index.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Prefix(u32);

impl Prefix {
    /// The prefix of an index from the wire.
    pub(crate) fn of(index: u32) -> Self {
        Self(index >> 8)
    }

    /// As boringtun wants it: shifted down.
    pub(crate) fn for_boringtun(self) -> u32 {
        self.0
    }
}

#[derive(Debug, Default)]
pub(crate) struct IndexTable(RwLock<HashMap<Prefix, Weak<Peer>>>);

impl IndexTable {
    pub(crate) fn peer(&self, prefix: Prefix) -> Option<Arc<Peer>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).get(&prefix)?.upgrade()
    }

    /// Reserves a prefix for `owner` until the registration is dropped.
    pub(crate) fn register(self: &Arc<Self>, owner: &Weak<Peer>) -> Registration {
        let mut table = self.0.write().unwrap_or_else(PoisonError::into_inner);
        loop {
            // A peer holds at most four of 16 million, so this ends at once.
            let prefix = Prefix(OsRng.next_u32() >> 8);
            if let std::collections::hash_map::Entry::Vacant(entry) = table.entry(prefix) {
                entry.insert(owner.clone());
                return Registration { prefix, table: Arc::clone(self) };
            }
        }
    }

    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.0.read().unwrap_or_else(PoisonError::into_inner).len()
    }
}

/// Holding it is owning the prefix.
#[derive(Debug)]
pub(crate) struct Registration {
    pub(crate) prefix: Prefix,
    table: Arc<IndexTable>,
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.table.0.write().unwrap_or_else(PoisonError::into_inner).remove(&self.prefix);
    }
}
