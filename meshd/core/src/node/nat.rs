//! NATs: whether there is one in front of this host, and how two that are behind one each get to each other.
//!
//! The relay between the two is the observer: it sees the addresses that their control ports and lanes have outside, and
//! tells. Both ends then send probes to the other's control port there, and each of these opens the NAT of its sender
//! for the other's. When they are answered, so would be what the tunnel sends: the lanes have opened their NATs by empty
//! datagrams in the meantime. Where a NAT has another address for each destination none is answered, and the tunnel stays
//! with the relay (RFC 4787, sections 4.1 and 5, and RFC 5128, section 3.3).

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use mesh_keys::NodeId;

use super::{Node, Output};
use crate::path::{Opening, Path, Way};
use crate::time::Time;
use crate::view::{LaneInfo, NodeRecord};

/// Members whose word is needed that this host is behind a NAT, where there are so many.
const WITNESSES: usize = 3;

/// After it got other addresses, a host sends a keepalive to all, who follow it to where that comes from. WireGuard sends one when
/// keepalives are switched on: so they are off for a moment, and on until the second of these is over.
const KEEPALIVES_OFF: Duration = Duration::from_millis(300);
const KEEPALIVES_ON: Duration = Duration::from_secs(5);

/// A session that was made before is over by then, and with it what WireGuard has learned (paper, section 6.1).
const REMEMBERED: Duration = Duration::from_secs(240);

/// Pause between two datagrams that open the NAT in front of this host for one lane.
const OPENING_PAUSE: Duration = Duration::from_millis(250);

/// Most paths, for some to be held open at all times.
const HELD_OPEN: usize = 1024;

/// What is known of NATs.
#[derive(Debug, Default)]
pub(super) struct Nats {
    /// Who sees this host at an address that it does not have.
    seen_elsewhere: BTreeSet<NodeId>,
    /// So do enough of them.
    behind_one: bool,
    mapped: BTreeMap<NodeId, Mapped>,
    /// When datagrams of members began to come from another address, while that may be news to WireGuard.
    peers_moved: BTreeMap<NodeId, Time>,
    /// When this host got other addresses, and what keepalives were when that was looked at last.
    host_moved: Option<Time>,
    were_on: Option<bool>,
}

/// Where a relay sees a member that has probed by way of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Mapped {
    control: SocketAddr,
    lane: Option<SocketAddr>,
    /// When the lane was seen there first.
    since: Time,
    /// When the NAT in front of this host was last opened for it.
    opened: Option<Time>,
}

impl Nats {
    /// Whether there is one in front of this host.
    pub(super) fn behind_one(&self) -> bool {
        self.behind_one
    }

    /// Where a relay sees the control port of a member.
    pub(super) fn control_port(&self, peer: &NodeId) -> Option<SocketAddr> {
        self.mapped.get(peer).map(|mapped| mapped.control)
    }

    /// Forgets the members that `keep` does not say.
    pub(super) fn retain(&mut self, keep: impl Fn(&NodeId) -> bool) {
        self.seen_elsewhere.retain(|id| keep(id));
        self.mapped.retain(|id, _| keep(id));
        self.peers_moved.retain(|id, _| keep(id));
    }
}

impl Node {
    /// What a member sees as the address of this host. One alone may be mistaken, or lie.
    pub(super) fn seen_at(&mut self, by: NodeId, address: IpAddr) {
        let Some(host) = self.host.as_ref().filter(|host| !host.addresses.is_empty()) else { return };
        let seen = &mut self.nats.seen_elsewhere;
        if host.addresses.contains(&address.to_canonical()) {
            seen.remove(&by);
        } else if seen.len() < 2 * WITNESSES {
            seen.insert(by);
        }
        let others = self.gossip.as_ref().map_or(0, crate::gossip::Gossip::members);
        let behind_one = !seen.is_empty() && seen.len() >= WITNESSES.min(others);
        if behind_one && !self.nats.behind_one {
            tracing::info!(%address, "behind a NAT: others see this host at an address that it does not have");
        }
        self.stale |= behind_one != self.nats.behind_one;
        self.nats.behind_one = behind_one;
    }

    /// The host has other addresses; `lost` says that one which it had is gone.
    pub(super) fn nats_host_changed(&mut self, lost: bool) {
        self.nats.seen_elsewhere.clear();
        self.nats.behind_one = false;
        if lost {
            self.nats.host_moved = Some(self.now);
            self.stale = true;
            self.register_everywhere();
        }
    }

    /// Whether keepalives are on because this host got other addresses a moment ago, or off.
    pub(super) fn keepalives_of_move(&self) -> Option<bool> {
        self.nats.host_moved.map(|at| self.now.since(at) >= KEEPALIVES_OFF)
    }

    /// When that changes.
    pub(super) fn nats_deadline(&self) -> Option<Time> {
        let on = self.keepalives_of_move()?;
        self.nats.host_moved.map(|at| at + if on { KEEPALIVES_ON } else { KEEPALIVES_OFF })
    }

    pub(super) fn advance_nats(&mut self) {
        if self.nats.host_moved.is_some_and(|at| self.now.since(at) >= KEEPALIVES_ON) {
            self.nats.host_moved = None;
        }
        let on = self.keepalives_of_move();
        self.stale |= std::mem::replace(&mut self.nats.were_on, on) != on;
    }

    /// A member has probed by way of a relay, which sees it at `control`; and its lane there, as it says itself.
    pub(super) fn mapped_at(&mut self, peer: NodeId, control: SocketAddr, lane: Option<SocketAddr>) {
        let is_some_host = |address: &SocketAddr| {
            let ip = address.ip();
            let is_local = match ip {
                IpAddr::V4(ip) => ip.is_link_local() || ip.is_broadcast(),
                IpAddr::V6(ip) => ip.is_unicast_link_local(),
            };
            let is_nobody = ip.is_unspecified() || ip.is_multicast() || ip.is_loopback() || is_local;
            address.port() > 0 && !is_nobody && !self.is_of_cluster(ip) && !self.is_own(address)
        };
        if !is_some_host(&control) {
            return;
        }
        let before = self.nats.mapped.get(&peer).copied();
        // A probe may come before the answer of the relay at which it registers.
        let lane = lane.filter(is_some_host).or(before.and_then(|before| before.lane));
        let since = before.filter(|before| before.lane == lane).map_or(self.now, |before| before.since);
        let mapped = Mapped { control, lane, since, opened: before.and_then(|before| before.opened) };
        if before == Some(mapped) {
            return;
        }
        self.nats.mapped.insert(peer, mapped);
        self.look_at_path(&peer, Path::try_direct);
    }

    /// A member's datagrams come from another address than before.
    pub(super) fn peer_moved(&mut self, peer: NodeId) {
        let now = self.now;
        self.nats.peers_moved.retain(|_, at| now.since(*at) < REMEMBERED);
        self.nats.peers_moved.insert(peer, now);
    }

    /// Whether the address that a member speaks from is none of its own: there is a NAT in front of it.
    pub(super) fn is_mapped(&self, peer: &NodeId) -> bool {
        let address = self.datagrams.address(peer).map(|address| address.ip());
        let record = self.view.as_ref().and_then(|view| view.record(peer));
        address.zip(record).is_some_and(|(address, record)| !record.endpoints.contains(&address))
    }

    /// What this end has to do so that the other one's packets get in by the direct way.
    pub(super) fn opening_for(&self, peer: &NodeId) -> Opening {
        let is_kept = self.paths.get(peer).is_some_and(Path::is_kept);
        match (self.nats.behind_one, self.is_mapped(peer)) {
            (true, true) if self.paths.count() <= HELD_OPEN => Opening::Always,
            (true, true) => Opening::WhileBusy,
            (true, false) => Opening::WhileBusy,
            (false, _) if is_kept => Opening::WhileBusy,
            (false, _) => Opening::None,
        }
    }

    /// Where a member's lane is, if its datagrams come from `address`.
    pub(super) fn lane_at(
        &self,
        id: &NodeId,
        record: &NodeRecord,
        lane: &LaneInfo,
        address: IpAddr,
    ) -> SocketAddr {
        let mapped = self.nats.mapped.get(id).and_then(|mapped| mapped.lane);
        // A NAT that both are behind lets them talk by their own addresses.
        let mapped = mapped.filter(|_| !record.endpoints.contains(&address));
        mapped.unwrap_or(SocketAddr::new(address, lane.port))
    }

    /// Whether a member, or its lane, is seen somewhere else since anything came through the tunnel: what WireGuard has
    /// learned is out of date.
    pub(super) fn has_lane_moved(&self, peer: &NodeId) -> bool {
        let mapped = self.nats.mapped.get(peer).filter(|mapped| mapped.lane.is_some());
        let moved = self.nats.peers_moved.get(peer).filter(|_| mapped.is_some() || !self.is_mapped(peer));
        let since = mapped.map(|mapped| mapped.since).max(moved.copied());
        let path = self.paths.get(peer).filter(|path| path.way() == Way::Direct);
        since.zip(path).is_some_and(|(since, path)| path.is_silent_since(since, self.now))
    }

    /// Opens the NAT in front of this host for the lane of a member to which nothing goes directly: the datagram says
    /// nothing, and gets no further than the other's NAT, or its lane.
    pub(super) fn open_for_lane(&mut self, peer: NodeId) {
        let is_relayed = self.paths.get(&peer).is_some_and(|path| path.way() != Way::Direct);
        let is_wanted = is_relayed || self.has_lane_moved(&peer);
        let now = self.now;
        let mapped = self.nats.mapped.get_mut(&peer).filter(|mapped| {
            is_wanted && mapped.opened.is_none_or(|opened| now.since(opened) >= OPENING_PAUSE)
        });
        let Some((mapped, lane)) = mapped.zip(self.config.lanes.first()) else { return };
        let Some(to) = mapped.lane else { return };
        mapped.opened = Some(now);
        let port = lane.port;
        if let Some(bytes) = self.sealed(&peer, &[]) {
            self.emit(Output::LaneDatagram { port, to, bytes });
        }
    }
}
