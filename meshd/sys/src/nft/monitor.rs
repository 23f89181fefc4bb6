//! Notices changes that somebody else makes to our tables, `nft flush ruleset` above all.

use std::collections::VecDeque;

use super::table::{Table, TableFamily};
use super::{NFT_MSG_DELTABLE, NFT_MSG_GETGEN, NFT_MSG_NEWGEN, NftError, about, kind};
use crate::netlink::{Attr, Attrs, Bound, Failure, Listener, Message, Received};
use crate::netns::NetNs;

/// `NFNLGRP_NFTABLES` (7) as a bit.
const GROUP: u32 = 1 << 6;

/// What happened to a watched table.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// Somebody else deleted it.
    Deleted(Table),
    /// Somebody else made it, or changed something in it.
    Changed(Table),
    /// Notices were lost: look at everything.
    Resync,
}

/// A subscription to changes of some tables in one namespace, by others than the given handles.
#[derive(Debug)]
pub struct Monitor {
    listener: Listener,
    tables: Vec<Table>,
    own_ports: Vec<u32>,
    ready: VecDeque<Event>,
}

impl Monitor {
    /// Watches tables in the namespace of the calling thread. Changes made through handles with these
    /// ports ([`Nft::port`](super::Nft::port)) are our own and not told. Needs a tokio runtime with I/O
    /// enabled.
    ///
    /// # Errors
    /// [`NftError::Socket`].
    pub fn open(tables: Vec<Table>, own_ports: Vec<u32>) -> Result<Self, NftError> {
        let bound = Bound::open(netlink_sys::protocols::NETLINK_NETFILTER, GROUP);
        Self::with_socket(bound, tables, own_ports)
    }

    /// As [`Monitor::open`], in another namespace.
    ///
    /// # Errors
    /// [`NftError::Namespace`], [`NftError::Socket`].
    pub fn open_in(netns: &NetNs, tables: Vec<Table>, own_ports: Vec<u32>) -> Result<Self, NftError> {
        let bound = netns.run(|| Bound::open(netlink_sys::protocols::NETLINK_NETFILTER, GROUP))?;
        Self::with_socket(bound, tables, own_ports)
    }

    fn with_socket(
        bound: Result<Bound, Failure>,
        tables: Vec<Table>,
        own_ports: Vec<u32>,
    ) -> Result<Self, NftError> {
        let listener = bound.and_then(Bound::register).map_err(about("open", "nftables monitor"))?;
        Ok(Self { listener, tables, own_ports, ready: VecDeque::new() })
    }

    /// The next event. Events that came together are told once per table; a deletion covers the
    /// changes that led to it. Dropping the future loses nothing.
    ///
    /// # Errors
    /// [`NftError::Socket`]; the monitor is of no more use then.
    pub async fn next(&mut self) -> Result<Event, NftError> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Ok(event);
            }
            match self.listener.receive().await.map_err(about("watch", "nftables"))? {
                Received::Lost => self.ready.push_back(Event::Resync),
                Received::Messages(messages) => {
                    for message in &messages {
                        self.take(message);
                    }
                }
            }
        }
    }

    fn take(&mut self, message: &Message) {
        if self.own_ports.contains(&message.port)
            || [kind(NFT_MSG_NEWGEN), kind(NFT_MSG_GETGEN)].contains(&message.kind)
        {
            return;
        }
        let Some(table) = table_of(message).filter(|t| self.tables.contains(t)) else { return };
        let event = if message.kind == kind(NFT_MSG_DELTABLE) {
            self.ready.retain(|e| *e != Event::Changed(table.clone()));
            Event::Deleted(table)
        } else {
            Event::Changed(table)
        };
        if !self.ready.contains(&event) {
            self.ready.push_back(event);
        }
    }
}

/// In every kind of notice attribute 1 is the table's name.
fn table_of(message: &Message) -> Option<Table> {
    let family = TableFamily::from_raw(*message.body.first()?)?;
    let name = Attrs::after(&message.body, 4).find(1).map(Attr::string)?;
    Some(Table { family, name })
}
