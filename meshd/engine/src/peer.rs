//! A peer: its key and its tunnel behind one lock.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mesh_sys::uapi::PublicKey;

use crate::index::IndexTable;
use crate::keys::LocalKeys;
use crate::tunnel::Tunnel;

#[derive(Debug)]
pub(crate) struct Peer {
    pub(crate) key: PublicKey,
    tunnel: Mutex<Tunnel>,
    /// The timer thread knows of this peer.
    pub(crate) armed: AtomicBool,
    /// The peer was removed; whoever still holds it should let go.
    gone: AtomicBool,
}

impl Peer {
    pub(crate) fn new(key: PublicKey, local: Option<Arc<LocalKeys>>, indices: &Arc<IndexTable>) -> Arc<Self> {
        Arc::new_cyclic(|this| Self {
            key,
            tunnel: Mutex::new(Tunnel::new(key, local, Arc::clone(indices), this.clone())),
            armed: AtomicBool::new(false),
            gone: AtomicBool::new(false),
        })
    }

    /// A panic while the lock was held ends the process (see [`engine`](crate::engine)), so poison means nothing.
    pub(crate) fn tunnel(&self) -> MutexGuard<'_, Tunnel> {
        self.tunnel.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }

    /// Forgets all keys. Called after the peer has been taken out of every table.
    pub(crate) fn retire(&self) {
        self.gone.store(true, Ordering::Release);
        self.tunnel().set_local(None);
    }
}
