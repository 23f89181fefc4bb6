//! What the threads share, and how the configuration changes it.

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use ipnet::IpNet;
use mesh_sys::uapi::{self, AllowedIpChange, PublicKey, SecretKey, SetDevice, SetPeer};
use mesh_sys::udp::{SendBatch, SocketGroup};
use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::allowed_ips::AllowedIps;
use crate::counters::{Counters, DropReason};
use crate::index::IndexTable;
use crate::keys::LocalKeys;
use crate::peer::Peer;
use crate::timers::Timers;

/// The device, without its threads and its TUN interface.
#[derive(Debug)]
pub(crate) struct Device {
    /// Held for the whole of a change, so that changes are applied one after the other.
    settings: Mutex<Settings>,
    local: RwLock<Option<Arc<LocalKeys>>>,
    peers: RwLock<HashMap<PublicKey, Arc<Peer>>>,
    allowed: RwLock<AllowedIps<Arc<Peer>>>,
    sockets: RwLock<Option<Arc<SocketGroup>>>,
    pub(crate) indices: Arc<IndexTable>,
    pub(crate) timers: Timers,
    pub(crate) counters: Counters,
    /// Of the TUN interface, in bytes; packets are not padded beyond it.
    pub(crate) mtu: AtomicU32,
    /// Wakes an inbound thread each: new sockets, or the end.
    pub(crate) wake_inbound: Vec<EventFd>,
    /// Wakes all outbound threads: the end.
    pub(crate) wake_outbound: EventFd,
    stopping: AtomicBool,
}

#[derive(Debug, Default)]
struct Settings {
    private_key: Option<SecretKey>,
    fwmark: u32,
}

/// Why a change was not applied.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ApplyError {
    /// Nothing was changed.
    #[error("listen_port: UDP port {port} cannot be bound: {source}")]
    Bind { port: u16, source: io::Error },
    /// Nothing was changed.
    #[error("fwmark: {mark:#x} cannot be set: {source}")]
    Mark { mark: u32, source: io::Error },
}

impl ApplyError {
    /// For the answer.
    pub(crate) fn errno(&self) -> i32 {
        let (Self::Bind { source, .. } | Self::Mark { source, .. }) = self;
        source.raw_os_error().unwrap_or(libc::EIO)
    }
}

fn read<T>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

fn write<T>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}

impl Device {
    pub(crate) fn new(mtu: u32, inbound_threads: usize) -> io::Result<Self> {
        let event = || EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC);
        Ok(Self {
            settings: Mutex::default(),
            local: RwLock::new(None),
            peers: RwLock::default(),
            allowed: RwLock::new(AllowedIps::new()),
            sockets: RwLock::new(None),
            indices: Arc::default(),
            timers: Timers::default(),
            counters: Counters::default(),
            mtu: AtomicU32::new(mtu),
            wake_inbound: (0..inbound_threads).map(|_| event()).collect::<Result<_, _>>()?,
            wake_outbound: event()?,
            stopping: AtomicBool::new(false),
        })
    }

    pub(crate) fn local(&self) -> Option<Arc<LocalKeys>> {
        read(&self.local).clone()
    }

    pub(crate) fn sockets(&self) -> Option<Arc<SocketGroup>> {
        read(&self.sockets).clone()
    }

    pub(crate) fn peer(&self, key: &PublicKey) -> Option<Arc<Peer>> {
        read(&self.peers).get(key).cloned()
    }

    /// The table of allowed addresses, for a few look-ups; no other lock may be taken meanwhile.
    pub(crate) fn allowed(&self) -> RwLockReadGuard<'_, AllowedIps<Arc<Peer>>> {
        read(&self.allowed)
    }

    pub(crate) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// Has all threads end.
    pub(crate) fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        self.wake_inbound.iter().for_each(wake);
        wake(&self.wake_outbound);
        self.timers.stop();
    }

    /// Wipes all keys. The threads have ended.
    pub(crate) fn clear(&self) {
        for (_, peer) in write(&self.peers).drain() {
            peer.retire();
        }
        *write(&self.allowed) = AllowedIps::new();
        *write(&self.local) = None;
        self.settings().private_key = None;
    }

    fn settings(&self) -> std::sync::MutexGuard<'_, Settings> {
        self.settings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends a batch with the sockets of thread `number`, and empties it.
    pub(crate) fn send(&self, number: usize, batch: &mut SendBatch) {
        if batch.is_empty() {
            return;
        }
        let Some(sockets) = self.sockets() else {
            self.counters.count_many(DropReason::SendFailed, batch.iter().count());
            batch.clear();
            return;
        };
        let report = batch.send(sockets.of(number));
        if report.dropped > 0 {
            self.counters.count_many(DropReason::SendFailed, report.dropped);
            tracing::debug!(dropped = report.dropped, reason = ?report.error, "datagrams could not be sent");
        }
        if let Some(source) = report.stale_source {
            tracing::debug!(address = %source.address, "a local address is gone");
            for peer in read(&self.peers).values() {
                peer.tunnel().forget_source(source);
            }
        }
    }

    /// What `get=1` reports.
    pub(crate) fn report(&self) -> uapi::Device {
        let settings = self.settings();
        let peers: Vec<Arc<Peer>> = read(&self.peers).values().cloned().collect();
        let mut prefixes: HashMap<PublicKey, Vec<IpNet>> = HashMap::new();
        for (prefix, owner) in read(&self.allowed).iter() {
            prefixes.entry(owner.key).or_default().push(prefix);
        }
        let report = |peer: &Arc<Peer>| uapi::Peer {
            allowed_ips: prefixes.remove(&peer.key).unwrap_or_default(),
            ..peer.tunnel().report()
        };
        uapi::Device {
            private_key: settings.private_key.clone(),
            listen_port: self.sockets().map_or(0, |sockets| sockets.port()),
            fwmark: settings.fwmark,
            peers: peers.iter().map(report).collect(),
        }
    }

    /// Applies a change. What can fail is done first: then either all of it is applied or nothing.
    pub(crate) fn apply(&self, change: SetDevice) -> Result<(), ApplyError> {
        let mut settings = self.settings();
        let mark = change.fwmark.unwrap_or(settings.fwmark);
        let present = self.sockets();
        let port = match (change.listen_port, &present) {
            (Some(port), Some(sockets)) if port == sockets.port() => None,
            (None, Some(_)) => None,
            (port, _) => Some(port.unwrap_or(0)),
        };
        let set_mark = |sockets: &SocketGroup| {
            sockets.set_mark(mark).map_err(|source| ApplyError::Mark { mark, source })
        };
        if let Some(port) = port {
            let count = self.wake_inbound.len();
            let sockets =
                SocketGroup::bind(port, count).map_err(|source| ApplyError::Bind { port, source })?;
            // As the kernel's WireGuard: better in pieces than not at all.
            sockets.allow_fragments().map_err(|source| ApplyError::Bind { port, source })?;
            if mark != 0 {
                set_mark(&sockets)?;
            }
            tracing::info!(port = sockets.port(), "listening");
            *write(&self.sockets) = Some(Arc::new(sockets));
            self.wake_inbound.iter().for_each(wake);
        } else if mark != settings.fwmark
            && let Some(sockets) = &present
        {
            set_mark(sockets)?;
        }
        settings.fwmark = mark;

        if let Some(key) = change.private_key {
            self.set_private_key(&mut settings, key);
        }
        if change.replace_peers {
            let all: Vec<_> = write(&self.peers).drain().map(|(_, peer)| peer).collect();
            *write(&self.allowed) = AllowedIps::new();
            all.iter().for_each(|peer| peer.retire());
        }
        for peer in change.peers {
            self.apply_peer(peer);
        }
        Ok(())
    }

    fn set_private_key(&self, settings: &mut Settings, key: SecretKey) {
        let key = Some(key).filter(|key| !key.is_zero());
        if key == settings.private_key {
            return;
        }
        let local = key.as_ref().and_then(LocalKeys::new).map(Arc::new);
        settings.private_key = key;
        (*write(&self.local)).clone_from(&local);
        if let Some(local) = &local {
            tracing::info!(public_key = %local.public, "private key set");
            // A device is no peer of its own.
            self.remove_peer(&local.public);
        }
        for peer in read(&self.peers).values() {
            peer.tunnel().set_local(local.clone());
            self.timers.arm_now(peer);
        }
    }

    fn remove_peer(&self, key: &PublicKey) {
        if let Some(peer) = write(&self.peers).remove(key) {
            write(&self.allowed).remove_all(|owner| owner.key == *key);
            peer.retire();
            tracing::debug!(peer = %key, "peer removed");
        }
    }

    fn apply_peer(&self, change: SetPeer) {
        let key = change.public_key;
        if change.remove {
            self.remove_peer(&key);
            return;
        }
        let local = self.local();
        if local.as_ref().is_some_and(|local| local.public == key) {
            tracing::debug!(peer = %key, "a device is no peer of its own: ignored");
            return;
        }
        let peer = match self.peer(&key) {
            Some(peer) => peer,
            None if change.update_only => return,
            None => {
                let peer = Peer::new(key, local, &self.indices);
                write(&self.peers).insert(key, Arc::clone(&peer));
                tracing::debug!(peer = %key, "peer added");
                peer
            }
        };
        {
            // One lock for all of it: there is no moment without a route to a peer whose list is replaced.
            let mut allowed = write(&self.allowed);
            if change.replace_allowed_ips {
                allowed.remove_all(|owner| Arc::ptr_eq(owner, &peer));
            }
            for change in change.allowed_ips {
                match change {
                    AllowedIpChange::Add(prefix) => {
                        allowed.insert(prefix, Arc::clone(&peer));
                    }
                    AllowedIpChange::Remove(prefix) => {
                        allowed.remove_if(prefix, |owner| Arc::ptr_eq(owner, &peer));
                    }
                }
            }
        }
        {
            let mut tunnel = peer.tunnel();
            if let Some(psk) = change.preshared_key {
                tunnel.set_psk(psk);
            }
            if let Some(endpoint) = change.endpoint {
                let canonical = std::net::SocketAddr::new(endpoint.ip().to_canonical(), endpoint.port());
                // The scope of a link-local address is lost by making it canonical; only mapped ones need that.
                tunnel.set_endpoint(if canonical.is_ipv4() { canonical } else { endpoint });
            }
            if let Some(seconds) = change.persistent_keepalive {
                tunnel.set_keepalive(seconds);
            }
        }
        self.timers.arm_now(&peer);
    }
}

/// An event that is already pending need not be raised again.
fn wake(event: &EventFd) {
    match event.write(1) {
        Ok(_) | Err(Errno::EAGAIN) => {}
        Err(error) => tracing::error!(%error, "a thread could not be woken"),
    }
}
