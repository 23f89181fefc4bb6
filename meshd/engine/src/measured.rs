//! What the benchmarks measure, made reachable for them. Not part of the interface.

use std::net::IpAddr;
use std::sync::{Arc, Weak};

use ipnet::IpNet;
use zeroize::Zeroizing;

use crate::allowed_ips::AllowedIps;
use crate::handshake::TransportKeys;
use crate::index::IndexTable;
use crate::session::Session;

/// Bytes that a message is longer than the packet in it.
pub const OVERHEAD: usize = crate::session::OVERHEAD;

/// A session that talks to itself.
pub struct Echo(Arc<Session>);

impl Echo {
    /// With a fixed key. `None` when the library refuses it.
    #[must_use]
    pub fn new() -> Option<Self> {
        let key = || Zeroizing::new([7; 32]);
        let keys = TransportKeys { remote_index: 1, sending: key(), receiving: key() };
        let registration = Arc::new(IndexTable::default()).register(&Weak::new());
        Session::new(&keys, registration).ok().map(Self)
    }

    /// Encrypts the packet in `message` in place.
    #[must_use]
    pub fn seal(&self, message: &mut [u8]) -> bool {
        self.0.seal(self.0.reserve(1), message).is_ok()
    }

    /// Decrypts `message` in place; the length of the packet in it.
    #[must_use]
    pub fn open(&self, message: &mut [u8]) -> Option<usize> {
        self.0.open(message).ok().map(|(_counter, length)| length)
    }
}

/// A table of allowed addresses, each prefix its own number's.
pub struct Table(AllowedIps<usize>);

impl Table {
    /// With these prefixes.
    pub fn new(prefixes: impl IntoIterator<Item = IpNet>) -> Self {
        let mut table = AllowedIps::new();
        for (number, prefix) in prefixes.into_iter().enumerate() {
            table.insert(prefix, number);
        }
        Self(table)
    }

    /// Whose an address is.
    #[must_use]
    pub fn lookup(&self, address: IpAddr) -> Option<usize> {
        self.0.lookup(address).copied()
    }
}
