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

use crate::node::{LANE, LANE_PORT};
use crate::queue::Event;
use crate::world::World;

/// Pause between two looks at the counters of the tunnels.
pub(crate) const LOOK_AT_TUNNELS: Duration = Duration::from_secs(1);

/// What one host sends another in that time, in bytes.
const SENT: u64 = 10_000;

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
}

impl World {
    /// The lane of a host as a peer of another one.
    fn peer(&self, at: usize, key: &WgPublic) -> Option<&LanePeer> {
        self.hosts[at].kernel.lanes.get(LANE)?.peers.get(key)
    }

    /// Packets go through the tunnels of a host, and its daemon looks at the counters.
    pub(crate) fn look_at_tunnels(&mut self, at: usize) {
        let epoch = self.hosts[at].epoch;
        self.queue.put(LOOK_AT_TUNNELS, at, epoch, Event::Tunnels);
        self.forget_traffic(at);
        let kernel = self.hosts[at].kernel.clone();
        let Some(lane) = kernel.lanes.get(LANE) else { return };
        let routed =
            |net| matches!(kernel.routes.get(net), Some(Route::Device { device, .. }) if device == LANE);
        for (key, peer) in &lane.peers {
            let traffic = self.hosts[at].traffic.entry(*key).or_default();
            if peer.force_endpoint || traffic.endpoint.is_none() {
                traffic.endpoint = peer.endpoint;
            }
            if peer.allowed_ips.iter().any(routed) {
                traffic.sent += SENT;
                let endpoint = traffic.endpoint;
                self.carry(at, key, endpoint);
            }
        }
        let now = self.queue.now;
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

    /// What was counted for peers that are none any more is gone.
    fn forget_traffic(&mut self, at: usize) {
        let host = &mut self.hosts[at];
        let peers = host.kernel.lanes.get(LANE).map(|lane| &lane.peers);
        host.traffic.retain(|key, _| peers.is_some_and(|peers| peers.contains_key(key)));
    }

    /// The host that a packet for the peer with `key` gets to.
    pub(crate) fn lane_end(
        &self,
        from: usize,
        key: &WgPublic,
        endpoint: Option<SocketAddr>,
    ) -> Option<usize> {
        let to = self.network.host_at(endpoint?.ip())?;
        let there = &self.hosts[to];
        let ours = self.hosts[from].disk.lane_key;
        // Into a NAT only as an answer.
        let answers = || {
            let back = self.hosts[to].traffic.get(&ours).and_then(|traffic| traffic.endpoint);
            back.is_some_and(|back| self.network.host_at(back.ip()) == Some(from))
        };
        let reaches = self.network.listens(to, endpoint?.ip())
            || (self.network.place(to).nat == endpoint.map(|endpoint| endpoint.ip()) && answers());
        let one_open = self.network.place(from).nat.is_none() || self.network.place(to).nat.is_none();
        let is_peer = there.powered && there.disk.lane_key == *key;
        (is_peer && reaches && one_open && self.network.passes(from, to)).then_some(to)
    }

    fn carry(&mut self, from: usize, key: &WgPublic, endpoint: Option<SocketAddr>) {
        let Some(to) = self.lane_end(from, key, endpoint) else { return };
        let ours = self.hosts[from].disk.lane_key;
        let (Some(here), Some(there)) = (self.peer(from, key), self.peer(to, &ours)) else { return };
        // Both ways are needed to agree on a key, and the same pre-shared key.
        let agree = here.psk == there.psk && self.network.open(from, to);
        let now = self.queue.now;
        let seen = SocketAddr::new(self.network.place(from).seen(), LANE_PORT);
        if agree {
            self.hosts[from].traffic.entry(*key).or_default().handshake = Some(now);
            let back = self.hosts[to].traffic.entry(ours).or_default();
            (back.handshake, back.endpoint) = (Some(now), Some(seen));
            back.received += SENT;
        }
    }
}
