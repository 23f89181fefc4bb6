//! What a datagram is for: the table of receiver indices.
//!
//! Indices are drawn at random, so that an observer cannot count peers or sessions.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock, RwLockWriteGuard, Weak};

use rand_core::{OsRng, RngCore as _};

use crate::peer::Peer;
use crate::session::Session;

#[derive(Debug, Default)]
pub(crate) struct IndexTable(RwLock<HashMap<u32, Entry>>);

#[derive(Debug)]
struct Entry {
    peer: Weak<Peer>,
    /// Nothing while the handshake is under way.
    session: Weak<Session>,
}

impl IndexTable {
    /// The peer of a handshake or session.
    pub(crate) fn peer(&self, index: u32) -> Option<Arc<Peer>> {
        let peer = self.0.read().unwrap_or_else(PoisonError::into_inner).get(&index)?.peer.clone();
        peer.upgrade()
    }

    /// A session and its peer.
    pub(crate) fn session(&self, index: u32) -> Option<(Arc<Peer>, Arc<Session>)> {
        let (peer, session) = {
            let table = self.0.read().unwrap_or_else(PoisonError::into_inner);
            let entry = table.get(&index)?;
            (entry.peer.clone(), entry.session.clone())
        };
        // Outside of the lock: whoever lets go of the last reference takes registrations out of the table.
        Some((peer.upgrade()?, session.upgrade()?))
    }

    /// Reserves an index for `owner` until the registration is dropped.
    pub(crate) fn register(self: &Arc<Self>, owner: &Weak<Peer>) -> Registration {
        let mut table = self.write();
        loop {
            // A peer holds at most four of four billion, so this ends at once.
            let index = OsRng.next_u32();
            if let std::collections::hash_map::Entry::Vacant(entry) = table.entry(index) {
                entry.insert(Entry { peer: owner.clone(), session: Weak::new() });
                return Registration { index, table: Arc::clone(self) };
            }
        }
    }

    fn write(&self) -> RwLockWriteGuard<'_, HashMap<u32, Entry>> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }

    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.0.read().unwrap_or_else(PoisonError::into_inner).len()
    }
}

/// Holding it is owning the index.
#[derive(Debug)]
pub(crate) struct Registration {
    pub(crate) index: u32,
    table: Arc<IndexTable>,
}

impl Registration {
    /// Data messages with this index are for `session`, which holds this registration.
    pub(crate) fn lead_to(&self, session: &Arc<Session>) {
        if let Some(entry) = self.table.write().get_mut(&self.index) {
            entry.session = Arc::downgrade(session);
        }
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.table.write().remove(&self.index);
    }
}
