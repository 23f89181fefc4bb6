//! What changed, coarsely: enough to know what to read again.

use std::collections::VecDeque;

use super::nexthop::{RTM_DELNEXTHOP, RTM_NEWNEXTHOP};
use super::{RtnlError, about, link, nexthop, route};
use crate::netlink::{Bound, Failure, Listener, Message, Received};
use crate::netns::NetNs;

const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
const RTM_NEWROUTE: u16 = 24;
const RTM_DELROUTE: u16 = 25;
const RTM_NEWNEIGH: u16 = 28;
const RTM_DELNEIGH: u16 = 29;
const RTM_NEWRULE: u16 = 32;
const RTM_DELRULE: u16 = 33;

/// Multicast groups as bits (`rtnetlink.h`, group number minus one): link, neigh, IPv4 address,
/// IPv4 route, IPv4 rule, IPv6 address, IPv6 route, IPv6 rule, nexthop. The kernel passes over bits that it does not
/// know.
const GROUPS: u32 = 1 | 1 << 2 | 1 << 4 | 1 << 6 | 1 << 7 | 1 << 8 | 1 << 10 | 1 << 18 | 1 << 31;

/// Something changed.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// A device appeared, changed or went. Bridge ports report changes of their port settings too.
    LinkChanged {
        /// Index.
        index: u32,
        /// Name at that moment.
        name: String,
        /// It is gone.
        removed: bool,
    },
    /// An address of a device came or went.
    AddrChanged {
        /// Device.
        index: u32,
    },
    /// A route came, changed or went.
    RouteChanged {
        /// Table.
        table: u32,
        /// Who made it.
        protocol: u8,
        /// It is gone.
        removed: bool,
    },
    /// A nexthop or group came, changed or went. The kernel tells of none that it deletes because of its device.
    NexthopChanged {
        /// Who made it.
        protocol: u8,
        /// It is gone.
        removed: bool,
    },
    /// A rule came or went.
    RuleChanged,
    /// A neighbour or forwarding entry changed.
    NeighChanged {
        /// Device.
        index: u32,
    },
    /// Events were lost, or could not be understood: read everything again.
    Resync,
}

/// A subscription to changes in one namespace. Nothing is missed between two calls of
/// [`Monitor::next`]: what does not fit the kernel's buffer comes as [`Event::Resync`].
#[derive(Debug)]
pub struct Monitor {
    listener: Listener,
    ready: VecDeque<Event>,
}

impl Monitor {
    /// Listens in the namespace of the calling thread. Needs a tokio runtime with I/O enabled.
    ///
    /// # Errors
    /// [`RtnlError::Socket`].
    pub fn open() -> Result<Self, RtnlError> {
        let bound = Bound::open(netlink_sys::protocols::NETLINK_ROUTE, GROUPS);
        Self::with_socket(bound)
    }

    /// Listens in another namespace. Needs a tokio runtime with I/O enabled.
    ///
    /// # Errors
    /// [`RtnlError::Namespace`], [`RtnlError::Socket`].
    pub fn open_in(netns: &NetNs) -> Result<Self, RtnlError> {
        Self::with_socket(netns.run(|| Bound::open(netlink_sys::protocols::NETLINK_ROUTE, GROUPS))?)
    }

    fn with_socket(bound: Result<Bound, Failure>) -> Result<Self, RtnlError> {
        let listener = bound.and_then(Bound::register).map_err(about("open", "rtnetlink monitor"))?;
        Ok(Self { listener, ready: VecDeque::new() })
    }

    /// The next event. Equal events that came together are given once. Dropping the future loses
    /// nothing.
    ///
    /// # Errors
    /// [`RtnlError::Socket`]; the monitor is of no more use then.
    pub async fn next(&mut self) -> Result<Event, RtnlError> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Ok(event);
            }
            match self.listener.receive().await.map_err(about("watch", "rtnetlink"))? {
                Received::Lost => self.ready.push_back(Event::Resync),
                Received::Messages(messages) => {
                    for message in &messages {
                        let Some(event) = classify(message) else { continue };
                        if !self.ready.contains(&event) {
                            self.ready.push_back(event);
                        }
                    }
                }
            }
        }
    }
}

fn classify(message: &Message) -> Option<Event> {
    let body = message.body.as_slice();
    let index = || Some(u32::from_ne_bytes(*body.get(4..8)?.first_chunk()?));
    let event = match message.kind {
        RTM_NEWLINK | RTM_DELLINK => link::parse_body(body).map(|l| Event::LinkChanged {
            index: l.index,
            name: l.name,
            // A port that leaves its bridge is told of as deleted too, with the bridge's family.
            removed: message.kind == RTM_DELLINK && body.first() == Some(&0),
        }),
        RTM_NEWADDR | RTM_DELADDR => index().map(|index| Event::AddrChanged { index }),
        RTM_NEWROUTE | RTM_DELROUTE => {
            // Not a route: an exception of the kernel's own, or a family we have no business with.
            let route = route::parse(body)?;
            let removed = message.kind == RTM_DELROUTE;
            return Some(Event::RouteChanged { table: route.table, protocol: route.protocol, removed });
        }
        RTM_NEWNEXTHOP | RTM_DELNEXTHOP => nexthop::protocol(body)
            .map(|protocol| Event::NexthopChanged { protocol, removed: message.kind == RTM_DELNEXTHOP }),
        RTM_NEWNEIGH | RTM_DELNEIGH => index().map(|index| Event::NeighChanged { index }),
        RTM_NEWRULE | RTM_DELRULE => Some(Event::RuleChanged),
        _ => return None,
    };
    Some(event.unwrap_or(Event::Resync))
}
