//! How long packets to each member may be, and what the kernel gets of it.
//!
//! [`PathMtu`] finds it for one way; here are the ways of all members. Probes go between the control ports, to the address
//! that the tunnel's packets go to, and are no longer than what the tunnel's device could send. What is found becomes the
//! MTU of the routes to the member's ranges: the kernel then says "packet too big" to pods by itself, and the clamp of TCP's
//! segments follows it.
//!
//! IPv6 carries packets of 1,280 bytes on every link (RFC 8200, section 5), so that routes of IPv6 ranges have no less. Where
//! such a packet in its tunnel is longer than the way allows, the tunnel's datagram is cut up by this host, as RFC 2473
//! (section 7.1) has it: the kernel does so once it knows the way's MTU, and [`Output::Narrow`] tells it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use ipnet::IpNet;
use mesh_keys::NodeId;
use mesh_keys::frame::{MAX_LONG_DATAGRAM, OVERHEAD};

use super::datagrams::PerSecond;
use super::desired::MIN_MTU;
use super::paths::Deadlines;
use super::{MIN_TICK, Node, Output, TunnelFacts};
use crate::api::MtuStatus;
use crate::gossip::wire::{Part, Writer, measure};
use crate::path::LOST;
use crate::path::mtu::{BASE, PathMtu, Probe};
use crate::time::Time;

/// A tunnel that carried something within this time is used.
const USED: Duration = Duration::from_secs(20);

/// Bytes that say nothing of whether somebody talks: a keepalive or two, of 32 each (WireGuard paper, section 5.4.6).
const KEEPALIVES: u64 = 64;

/// Probes that this node sends in a second, at most: some 150 kB. A thousand new tunnels are measured in ten seconds.
const PROBES: u32 = 100;

/// Probes that are answered in a second: of one member, and of all.
const ANSWERED_OF_ONE: u32 = 40;
const ANSWERED_OF_ALL: u32 = 2000;

/// Addresses of one member of which it is remembered what was found, the one in use apart.
const REMEMBERED: usize = 3;

/// WireGuard pads to a multiple of this, but for packets as long as its device allows (paper, section 5.4.6).
const PADDING: u32 = 16;

/// Pause before a way is looked at again by which nothing comes.
const SILENT: Duration = Duration::from_secs(2);

/// The kernel is not told the same again sooner than this.
const NARROWED: Duration = Duration::from_secs(5);

const UDP_HEADER: u32 = 8;

/// The ways to all members that were looked at.
#[derive(Debug, Default)]
pub(super) struct Mtus {
    of: BTreeMap<NodeId, Measured>,
    due: Deadlines,
    /// What the kernel's routes had when this node started: found by the one before it. None: all that the device sends.
    found: BTreeMap<IpNet, Option<u32>>,
    answered: PerSecond<ANSWERED_OF_ONE, ANSWERED_OF_ALL>,
    /// Probes sent in the second since then.
    sent: (Time, u32),
}

/// The way to one member.
#[derive(Debug)]
struct Measured {
    /// Its address.
    to: IpAddr,
    mtu: PathMtu,
    /// When the tunnel carried something last.
    used: Option<Time>,
    /// What the kernel was told of it last.
    narrowed: Option<(u16, Time)>,
    /// Ways that the tunnel took before.
    others: Vec<(IpAddr, PathMtu)>,
}

impl Measured {
    fn is_used(&self, now: Time) -> bool {
        self.used.is_some_and(|at| now.since(at) < USED)
    }
}

impl Mtus {
    /// Forgets the members that `keep` does not say.
    pub(super) fn retain(&mut self, keep: impl Fn(&NodeId) -> bool) {
        let gone: Vec<NodeId> = self.of.keys().filter(|id| !keep(id)).copied().collect();
        for id in gone {
            self.of.remove(&id);
            self.due.set(id, None);
        }
    }

    /// Whether another probe may be sent in this second.
    fn may_send(&mut self, now: Time) -> bool {
        if now.since(self.sent.0) >= Duration::from_secs(1) {
            self.sent = (now, 0);
        }
        self.sent.1 < PROBES
    }

    fn status(&self, peer: &NodeId) -> Option<&PathMtu> {
        self.of.get(peer).map(|way| &way.mtu)
    }
}

fn ip_header(to: IpAddr) -> u32 {
    if to.is_ipv4() { 20 } else { 40 }
}

/// What WireGuard adds to a packet: IP and UDP headers, a header and a tag of 16 bytes each (paper, section 5.4.6).
fn overhead(to: IpAddr) -> u32 {
    ip_header(to) + UDP_HEADER + 32
}

/// The longest packet that fits into a tunnel's packet of `size` bytes, if that is shorter than the device's `mtu`.
fn inside(size: u16, overhead: u32, mtu: u32) -> Option<u32> {
    let room = u32::from(size).saturating_sub(overhead);
    (room < mtu).then_some(room / PADDING * PADDING)
}

impl Node {
    /// The MTU of the routes to a member's ranges, of IPv4 and of IPv6, where it is less than the device's.
    pub(super) fn route_mtus(&self, peer: &NodeId, ranges: &BTreeSet<IpNet>) -> [Option<u32>; 2] {
        let mtu = self.mtu();
        let room = if let Some(relay) = self.paths.relay_to(peer) {
            // The relay's own way to the member is not known here.
            let to = self.datagrams.address(&relay).map_or(IpAddr::from([0; 16]), |address| address.ip());
            inside(BASE, overhead(to), mtu)
        } else if let Some(way) = self.mtus.of.get(peer) {
            inside(way.mtu.size(), overhead(way.to), mtu)
        } else {
            let found = ranges.iter().find_map(|range| self.mtus.found.get(range));
            let unknown = || inside(BASE, overhead(IpAddr::from([0; 16])), mtu);
            found.map_or_else(unknown, |found| found.filter(|found| *found < mtu))
        };
        let ipv6 = room.map(|room| room.max(MIN_MTU)).filter(|room| *room < mtu);
        [room, ipv6]
    }

    /// What an earlier start of the daemon found, as the kernel still has it.
    pub(super) fn remember_route_mtus(&mut self, found: &BTreeMap<IpNet, Option<u32>>) {
        self.mtus.found.clone_from(found);
    }

    /// There is a tunnel to a member: how long its packets may be is found before it is used, unless that is known.
    pub(super) fn measure(&mut self, peer: NodeId) {
        if self.mtus.of.contains_key(&peer) || self.assumed(&peer).is_some() {
            return;
        }
        if let Some(to) = self.tunnel_address(&peer) {
            self.measure_to(peer, to);
        }
    }

    /// What the tunnel to a member has carried. To be told for each one that there is a tunnel to.
    pub(super) fn observe_mtu(&mut self, peer: NodeId, before: Option<&TunnelFacts>, facts: &TunnelFacts) {
        let Some((before, endpoint)) = before.zip(facts.endpoint) else { return };
        let now = self.now;
        let sent = facts.tx_bytes.saturating_sub(before.tx_bytes);
        let received = facts.rx_bytes.saturating_sub(before.rx_bytes);
        let used = sent > KEEPALIVES || received > KEEPALIVES;
        let elsewhere = self.mtus.of.get(&peer).map(|way| way.to != endpoint.ip());
        if self.is_out() || self.paths.relay_to(&peer).is_some() || !elsewhere.unwrap_or(used) && !used {
            return;
        }
        if elsewhere != Some(false) {
            self.measure_to(peer, endpoint.ip());
        }
        let Some(way) = self.mtus.of.get_mut(&peer).filter(|_| used) else { return };
        way.used = Some(now);
        if sent > KEEPALIVES && received == 0 {
            way.mtu.suspect(now);
        }
        let next = way.mtu.next(true);
        self.mtus.due.set(peer, next);
    }

    /// The tunnel to a member goes to this address from now on.
    fn measure_to(&mut self, peer: NodeId, to: IpAddr) {
        let (now, most) = (self.now, self.largest_to(to));
        let assumed = self.assumed(&peer).map(|mtu| match mtu {
            Some(mtu) => u16::try_from(mtu + overhead(to)).unwrap_or(most),
            None => most,
        });
        let raise = self.config.mtu_raise;
        self.stale = true;
        let fresh = |assumed| PathMtu::new(most, assumed, raise, now);
        let next = match self.mtus.of.get_mut(&peer) {
            None => {
                let way =
                    Measured { to, mtu: fresh(assumed), used: None, narrowed: None, others: Vec::new() };
                self.mtus.of.entry(peer).or_insert(way).mtu.next(false)
            }
            Some(way) => {
                let known = way.others.iter().position(|(other, _)| *other == to);
                let mtu = known.map_or_else(|| fresh(None), |at| way.others.remove(at).1);
                let before = std::mem::replace(&mut way.mtu, mtu);
                way.narrowed = None;
                way.others.push((std::mem::replace(&mut way.to, to), before));
                if way.others.len() > REMEMBERED {
                    way.others.remove(0);
                }
                way.mtu.next(way.is_used(now))
            }
        };
        self.mtus.due.set(peer, next);
    }

    /// What the kernel's routes to a member had at the start; inner: all that the device sends.
    fn assumed(&self, peer: &NodeId) -> Option<Option<u32>> {
        if self.mtus.found.is_empty() {
            return None;
        }
        let view = self.view.as_ref()?;
        let ranges = super::desired::ranges_of(view, view.record(peer)?);
        ranges.iter().find_map(|range| self.mtus.found.get(range)).copied()
    }

    /// The size of the longest packets that the tunnel's device can make of what it is given.
    fn largest_to(&self, to: IpAddr) -> u16 {
        let most = MAX_LONG_DATAGRAM + (ip_header(to) + UDP_HEADER) as usize;
        let most = u16::try_from(most).unwrap_or(u16::MAX);
        u16::try_from(self.mtu() + overhead(to)).unwrap_or(most).min(most)
    }

    /// Where the tunnel's packets go, or will.
    fn tunnel_address(&self, peer: &NodeId) -> Option<IpAddr> {
        let record = self.view.as_ref()?.record(peer)?;
        let lane = record.lanes.first()?;
        let used = self.tunnels.get(&lane.key).and_then(|facts| facts.endpoint);
        let session = || self.session_addresses().get(peer).copied();
        let endpoint = used.or_else(|| self.endpoint(peer, record, lane, session()).0);
        endpoint.filter(|_| self.paths.relay_to(peer).is_none()).map(|endpoint| endpoint.ip())
    }

    /// The host's devices are others: so may be what they carry.
    pub(super) fn mtus_host_changed(&mut self) {
        let now = self.now;
        let peers: Vec<(NodeId, IpAddr)> = self.mtus.of.iter().map(|(peer, way)| (*peer, way.to)).collect();
        for (peer, to) in peers {
            let most = self.largest_to(to);
            let Some(way) = self.mtus.of.get_mut(&peer) else { continue };
            way.others.clear();
            way.mtu.set_most(most, now);
            way.mtu.suspect(now);
            let next = way.mtu.next(way.is_used(now));
            self.mtus.due.set(peer, next);
        }
    }

    pub(super) fn advance_mtus(&mut self) {
        let now = self.now;
        if self.is_out() || self.gossip.is_none() {
            return;
        }
        while let Some((_, peer)) = self.mtus.due.first().filter(|(due, _)| *due <= now) {
            if !self.mtus.may_send(now) {
                return;
            }
            let relayed = self.paths.relay_to(&peer).is_some();
            if !relayed && self.is_silent(&peer) {
                // How long the packets may be of a way that nothing comes by, nobody can say.
                self.mtus.due.set(peer, Some(now + SILENT));
                continue;
            }
            let rtt = self.gossip.as_ref().and_then(|gossip| gossip.acquaintance(&peer)?.0);
            let rtt = rtt.map(|rtt| Duration::from_micros(rtt.into()));
            let Some(way) = self.mtus.of.get_mut(&peer).filter(|_| !relayed) else {
                self.mtus.due.set(peer, None);
                continue;
            };
            let (used, to, before) = (way.is_used(now), way.to, way.mtu.size());
            let probes = way.mtu.advance(used, rtt, &mut self.rng, now);
            // What is due at once again waits for the next moment.
            let next = way.mtu.next(used).map(|next| next.max(now + MIN_TICK));
            self.mtus.due.set(peer, next);
            self.mtu_changed(peer, before);
            self.narrow(peer);
            for probe in probes {
                self.mtus.sent.1 += 1;
                self.send_measure(peer, to, probe);
            }
        }
    }

    /// Whether a member answers nothing that is sent to it directly.
    fn is_silent(&self, peer: &NodeId) -> bool {
        let path = self.paths.get(peer);
        !self.is_reachable(peer) || path.is_some_and(|path| path.direct().lost_for(self.now) >= LOST)
    }

    pub(super) fn mtu_deadline(&self) -> Option<Time> {
        let due = self.mtus.due.first().map(|(due, _)| due)?;
        let (since, count) = self.mtus.sent;
        let budget = if count < PROBES { due } else { since + Duration::from_secs(1) };
        (!self.is_out() && self.gossip.is_some()).then_some(due.max(budget))
    }

    fn send_measure(&mut self, peer: NodeId, to: IpAddr, probe: Probe) {
        let known = self.datagrams.address(&peer).filter(|address| address.ip() == to);
        let port = self.view.as_ref().and_then(|view| view.record(&peer)).map(|record| record.control_port);
        let Some(to) = known.or_else(|| Some(SocketAddr::new(to, port?))) else { return };
        let around = (ip_header(to.ip()) + UDP_HEADER) as usize + OVERHEAD;
        let payload = usize::from(probe.size).checked_sub(around);
        let Some(payload) = payload.and_then(|length| measure(probe.number, length)) else { return };
        if let Some(bytes) = self.sealed_long(&peer, &payload) {
            self.emit(Output::Measure { to, bytes });
        }
    }

    /// A member wants to know whether a datagram of that length gets here. Who tries shorter ones than get there has a
    /// reason to, which may be one for this end as well.
    pub(super) fn on_measure(&mut self, from: NodeId, address: SocketAddr, number: u32, length: usize) {
        let now = self.now;
        if !self.mtus.answered.take(from, now) {
            return;
        }
        let mut writer = Writer::default();
        writer.push(&Part::Measured { number });
        self.seal_to(from, address, &writer.take());
        let Some(way) = self.mtus.of.get_mut(&from).filter(|way| way.is_used(now)) else { return };
        if length + ((ip_header(way.to) + UDP_HEADER) as usize) < usize::from(way.mtu.size()) {
            way.mtu.suspect(now);
            let next = way.mtu.next(true);
            self.mtus.due.set(from, next);
        }
    }

    /// One has got there.
    pub(super) fn on_measured(&mut self, from: NodeId, number: u32) {
        let now = self.now;
        let Some(way) = self.mtus.of.get_mut(&from) else { return };
        let before = way.mtu.size();
        if !way.mtu.answered(number, now) {
            return;
        }
        let next = way.mtu.next(way.is_used(now)).map(|next| next.max(now));
        self.mtus.due.set(from, next);
        self.mtu_changed(from, before);
        self.narrow(from);
    }

    fn mtu_changed(&mut self, peer: NodeId, before: u16) {
        let Some(way) = self.mtus.of.get(&peer).filter(|way| way.mtu.size() != before) else { return };
        let mtu = way.mtu.size();
        if mtu < before {
            tracing::info!(peer = %peer.short(), to = %way.to, mtu, before, "long packets vanish on the path: shorter ones from now on");
        } else {
            tracing::debug!(peer = %peer.short(), to = %way.to, mtu, before, "path MTU");
        }
        self.stale = true;
    }

    /// The tunnel's datagrams are cut up where IPv6's shortest packets do not fit. The kernel forgets that after ten
    /// minutes, and never takes back what it believes before: it hears of it when that is beyond doubt, again and again.
    fn narrow(&mut self, peer: NodeId) {
        let now = self.now;
        let Some(way) = self.mtus.of.get_mut(&peer) else { return };
        let (to, mtu) = (way.to, way.mtu.size());
        if !way.mtu.is_settled() || u32::from(mtu) >= MIN_MTU + overhead(to) {
            return;
        }
        let told = way.narrowed.replace((mtu, now));
        if told.is_some_and(|(before, at)| before == mtu && now.since(at) < NARROWED) {
            way.narrowed = told;
            return;
        }
        self.emit(Output::Narrow { to, mtu });
    }

    pub(super) fn mtu_status(&self, peer: &NodeId, ranges: &BTreeSet<IpNet>) -> MtuStatus {
        let [ipv4, ipv6] = self.route_mtus(peer, ranges);
        let way = self.mtus.status(peer).filter(|_| self.paths.relay_to(peer).is_none());
        MtuStatus {
            ipv4: ipv4.unwrap_or(self.mtu()),
            ipv6: ipv6.unwrap_or(self.mtu()),
            underlay: way.filter(|way| way.is_known()).map(|way| u32::from(way.size())),
            is_largest: way.is_some_and(|way| way.is_known() && way.size() == way.most()),
            confirmed_seconds: way.and_then(|way| Some(self.now.since(way.confirmed()?).as_secs())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fits_into_a_tunnel_is_what_wireguard_pads_to() {
        let (v4, v6) = (overhead([192, 0, 2, 1].into()), overhead(IpAddr::from([0; 16])));
        assert_eq!((v4, v6), (60, 80));
        // All that the device sends: it does not pad beyond its own MTU.
        assert_eq!((inside(1480, v4, 1420), inside(1500, v6, 1420)), (None, None));
        assert_eq!((inside(1479, v4, 1420), inside(1499, v6, 1420)), (Some(1408), Some(1408)));
        assert_eq!((inside(1300, v4, 1420), inside(1300, v6, 1420)), (Some(1232), Some(1216)));
        for size in BASE..1500 {
            for overhead in [v4, v6] {
                let Some(room) = inside(size, overhead, 1420) else { continue };
                let padded = room.next_multiple_of(PADDING).min(1420.max(room));
                assert!(padded + overhead <= u32::from(size));
            }
        }
    }
}
