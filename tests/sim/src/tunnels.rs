//! What WireGuard would carry between the hosts, by what their kernels hold, and what the daemons are told of it.
//!
//! Pods talk without pause: once a second each host sends something to every peer that it has a route to. It arrives when
//! the network lets it through to the endpoint, and the host there has the sender as a peer with the same pre-shared key.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use mesh_core::host::{LanePeer, Route};
use mesh_core::node::{Input, TunnelFacts};
use mesh_core::time::Time;
use mesh_keys::WgPublic;

use crate::network::CONTROL_PORT;
use crate::node::{LANE, LANE_PORT};
use crate::queue::Event;
use crate::world::World;

/// Pause between two looks at the counters of the tunnels.
pub(crate) const LOOK_AT_TUNNELS: Duration = Duration::from_secs(1);

/// What one host sends another in that time, in bytes.
const SENT: u64 = 10_000;

/// A session that is older is replaced, and one that is older still is of no use (WireGuard paper, section 6.1).
const REKEY_AFTER: Duration = Duration::from_secs(120);
const REJECT_AFTER: Duration = Duration::from_secs(180);

/// Without an answer for so long WireGuard begins a new session: `KEEPALIVE_TIMEOUT` and `REKEY_TIMEOUT`.
const NO_ANSWER: Duration = Duration::from_secs(15);

/// A process that relays: the host, and which of its processes.
type RelayProcess = (usize, u64);

/// What a tunnel has carried; the engine counts it, whether the daemon runs or not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Where packets go to.
    pub endpoint: Option<SocketAddr>,
    /// When the two ends last agreed on a key of their own.
    pub handshake: Option<Time>,
    /// Bytes received.
    pub received: u64,
    /// Bytes sent.
    pub sent: u64,
    /// Where the handshake went through: no other relay knows what the session's packets mean.
    relay: Option<RelayProcess>,
    /// Since when something was sent and nothing came.
    unanswered: Option<Time>,
    /// When something came last.
    arrived: Option<Time>,
}

/// A way for the packets of a tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Passage {
    /// The host that they get to.
    pub(crate) to: usize,
    /// Where they seem to come from there.
    seen: SocketAddr,
    relay: Option<RelayProcess>,
    /// Whether answers come back.
    back: bool,
}

impl World {
    /// The lane of a host as a peer of another one.
    fn peer(&self, at: usize, key: &WgPublic) -> Option<&LanePeer> {
        self.hosts[at].kernel.lanes.get(LANE)?.peers.get(key)
    }

    /// Packets go through the tunnels of a host: half of the time between two looks, as little in step with what the daemon
    /// does as pods are.
    pub(crate) fn send_through_tunnels(&mut self, at: usize) {
        let epoch = self.hosts[at].epoch;
        self.queue.put(LOOK_AT_TUNNELS, at, epoch, Event::Traffic);
        self.take_up_peers(at);
        let kernel = self.hosts[at].kernel.clone();
        let Some(lane) = kernel.lanes.get(LANE) else { return };
        let routed = |net| matches!(kernel.routes.get(net), Some(Route::Devices { devices, .. }) if devices.contains(LANE));
        for (key, peer) in &lane.peers {
            let traffic = self.hosts[at].traffic.entry(*key).or_default();
            if peer.allowed_ips.iter().any(routed) {
                traffic.sent += SENT;
                let endpoint = traffic.endpoint;
                self.carry(at, key, endpoint);
            }
        }
    }

    /// The daemon of a host looks at the counters of its tunnels.
    pub(crate) fn look_at_tunnels(&mut self, at: usize) {
        let (now, epoch) = (self.queue.now, self.hosts[at].epoch);
        self.queue.put(LOOK_AT_TUNNELS, at, epoch, Event::Tunnels);
        let facts: BTreeMap<WgPublic, TunnelFacts> = self.hosts[at]
            .traffic
            .iter()
            .map(|(key, traffic)| {
                let facts = TunnelFacts {
                    endpoint: traffic.endpoint,
                    handshake_age: traffic.handshake.map(|at| now.since(at)),
                    rx_bytes: traffic.received,
                    tx_bytes: traffic.sent,
                };
                (*key, facts)
            })
            .collect();
        self.tell(at, Input::Tunnels(facts));
    }

    /// The kernel of a host has new peers, other endpoints, or lacks some: what was counted for those is gone.
    pub(crate) fn take_up_peers(&mut self, at: usize) {
        let host = &mut self.hosts[at];
        let Some(lane) = host.kernel.lanes.get(LANE) else { return host.traffic.clear() };
        host.traffic.retain(|key, _| lane.peers.contains_key(key));
        for (key, peer) in &lane.peers {
            let traffic = host.traffic.entry(*key).or_default();
            if peer.force_endpoint || traffic.endpoint.is_none() {
                traffic.endpoint = peer.endpoint;
            }
        }
    }

    /// The way that a packet for the peer with `key` takes, if it arrives.
    pub(crate) fn passage(&mut self, from: usize, key: &WgPublic, endpoint: SocketAddr) -> Option<Passage> {
        let now = self.queue.now;
        let source = self.network.source(from, LANE_PORT, endpoint, now);
        let (host, port) = self.network.destination(source, endpoint, now)?;
        if !self.network.passes(from, host) || !self.hosts[host].powered {
            return None;
        }
        if port == LANE_PORT {
            let back = self.network.passes(host, from);
            let is_peer = self.hosts[host].disk.lane_key == *key;
            return is_peer.then_some(Passage { to: host, seen: source, relay: None, back });
        }
        let (epoch, process) = (self.hosts[host].epoch, self.hosts[host].process.as_ref()?);
        let clock = crate::node::clock(now, process.started);
        process.relay.source(&source).filter(|_| port == CONTROL_PORT)?;
        let next = process.relay.endpoint_of(key, clock)?.remote;
        let relay = SocketAddr::new(self.network.place(host).own, CONTROL_PORT);
        let (to, port) = self.network.destination(relay, next, now)?;
        let is_peer = port == LANE_PORT && self.hosts[to].powered && self.hosts[to].disk.lane_key == *key;
        let back = self.network.passes(to, host) && self.network.passes(host, from);
        (is_peer && self.network.passes(host, to)).then_some(Passage {
            to,
            seen: relay,
            relay: Some((host, epoch)),
            back,
        })
    }

    /// Sends something to a peer, and counts it where it arrives.
    fn carry(&mut self, from: usize, key: &WgPublic, endpoint: Option<SocketAddr>) {
        let now = self.queue.now;
        self.hosts[from].traffic.entry(*key).or_default().unanswered.get_or_insert(now);
        let Some(passage) = endpoint.and_then(|endpoint| self.passage(from, key, endpoint)) else { return };
        let (to, ours) = (passage.to, self.hosts[from].disk.lane_key);
        let (Some(here), Some(there)) = (self.peer(from, key), self.peer(to, &ours)) else { return };
        let same_key = here.psk == there.psk;
        let traffic = self.hosts[from].traffic.entry(*key).or_default();
        let age = traffic.handshake.map(|at| now.since(at));
        let silent = traffic.unanswered.is_some_and(|at| now.since(at) >= NO_ANSWER);
        if passage.back && same_key && (silent || age.is_none_or(|age| age >= REKEY_AFTER)) {
            // Both ways are needed to agree on a key, and the same pre-shared key.
            (traffic.handshake, traffic.relay, traffic.unanswered) = (Some(now), passage.relay, None);
            let other = self.hosts[to].traffic.entry(ours).or_default();
            (other.handshake, other.relay) = (Some(now), passage.relay);
        }
        let other_session = self.hosts[to].traffic.get(&ours).and_then(|other| other.handshake);
        let (session, relay) = (self.hosts[from].traffic.get(key), passage.relay);
        let Some(session) = session.copied() else { return };
        let is_good = session.handshake.is_some_and(|at| now.since(at) < REJECT_AFTER)
            && session.handshake == other_session
            && (relay.is_none() || session.relay == relay);
        if is_good {
            let other = self.hosts[to].traffic.entry(ours).or_default();
            other.endpoint = Some(passage.seen);
            other.received += SENT;
            (other.unanswered, other.arrived) = (None, Some(now));
        }
    }

    /// Whether a host sends to another one through a relay.
    pub fn is_relayed(&self, from: usize, to: usize) -> bool {
        let traffic = self.hosts[from].traffic.get(&self.hosts[to].disk.lane_key);
        let endpoint = traffic.and_then(|traffic| traffic.endpoint);
        // A NAT has other ports.
        endpoint.is_some_and(|endpoint| endpoint.port() == CONTROL_PORT)
    }

    /// Whether what one host sent to another one lately has arrived: pods talk without pause.
    ///
    /// # Errors
    /// What is missing.
    pub fn carries(&self, from: usize, to: usize) -> Result<(), &'static str> {
        if !self.settings.tunnels {
            return Ok(());
        }
        let now = self.queue.now;
        let traffic = self.hosts[to].traffic.get(&self.hosts[from].disk.lane_key);
        let Some(arrived) = traffic.and_then(|traffic| traffic.arrived) else {
            return Err("nothing arrives");
        };
        if now.since(arrived) < LOOK_AT_TUNNELS * 3 { Ok(()) } else { Err("nothing arrives any more") }
    }
}
