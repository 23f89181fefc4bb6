//! What the kernel of this host should hold: a pure function of the node's state.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use mesh_keys::{IdentityKey, NodeId, WgPublic};

use super::{HostFacts, MAX_FLUSH_PAUSE, Node, Output};
use crate::api::{AttachmentState, BRIDGE};
use crate::host::{Bridge, Guard, HostState, Lane, LanePeer, Port, PortGuard, Route};
use crate::leases::ipv6_for;
use crate::ranges::RangeSet;
use crate::state::StateFile;
use crate::view::{NodeRecord, View};

/// What WireGuard adds to a packet over IPv6: 40 IPv6, 8 UDP, 16 header, 16 tag (WireGuard paper, section 5.4.6).
pub(super) const WIREGUARD_OVERHEAD: u32 = 80;

/// MTU of an underlay nobody told us about.
const DEFAULT_UNDERLAY_MTU: u32 = 1500;

/// IPv6 links carry no less (RFC 8200, section 5).
const MIN_MTU: u32 = 1280;

/// Older handshakes mean that the tunnel does not work: WireGuard renews them every 120 s, and ends sessions at
/// 180 s (WireGuard paper, section 6.1).
pub(super) const HANDSHAKE_STALE: Duration = Duration::from_secs(190);

impl Node {
    /// MTU of lanes and pods.
    pub(super) fn mtu(&self) -> u32 {
        let underlay = self.host.as_ref().and_then(|host| host.underlay_mtu).unwrap_or(DEFAULT_UNDERLAY_MTU);
        self.config.mtu.unwrap_or(underlay.saturating_sub(WIREGUARD_OVERHEAD)).max(MIN_MTU)
    }

    /// Computes the desired state; when it is new, it goes out as [`Output::Desired`]. Returns the revision that
    /// has, or will have, what this node wants now.
    ///
    /// What the state follows from is durable first: a daemon that is killed at any instant wants the same when
    /// it is back, so it takes nothing away from the kernel. In a burst of changes the state waits for the next
    /// write, which is at most [`MAX_FLUSH_PAUSE`] away.
    pub(super) fn recompute_desired(&mut self) -> u64 {
        if !self.stale {
            return self.revision;
        }
        let (Some(view), Some(host)) = (&self.view, &self.host) else { return self.revision };
        if self.kept_out().is_some() {
            return self.revision;
        }
        let desired = self.desired_state(view, host);
        if self.revision > 0 && *self.desired == desired {
            self.stale = false;
            return self.revision;
        }
        if self.dirty_later.take().is_some() {
            self.dirty.insert(StateFile::Cluster);
        }
        // A disk that fails holds nothing up: its next try is further away.
        let pause = self.next_flush.since(self.now);
        if !self.dirty.is_empty() && !pause.is_zero() && pause <= MAX_FLUSH_PAUSE {
            return self.revision + 1;
        }
        self.flush();
        self.revision += 1;
        self.stale = false;
        self.desired = Arc::new(desired);
        let (revision, state) = (self.revision, self.desired.clone());
        self.emit(Output::Desired { revision, state });
        revision
    }

    fn desired_state(&self, view: &View, host: &HostFacts) -> HostState {
        let (ipv4, ipv6) = (view.genesis().ipv4_range(), view.genesis().ipv6_range());
        let mut state = HostState {
            guard: Some(Guard {
                cluster_ipv4: ipv4,
                cluster_ipv6: ipv6,
                bridge_mac: self.bridge_mac(),
                ports: BTreeMap::new(),
            }),
            routes: BTreeMap::from([
                (IpNet::V4(ipv4), Route::Unreachable),
                (IpNet::V6(ipv6), Route::Unreachable),
            ]),
            sysctls: self.sysctls(host),
            ..HostState::default()
        };
        let prefix = view.cluster().node_prefix(&self.me, 0);
        let own: BTreeSet<IpAddr> = self
            .stored
            .mesh_ipv4
            .map(|v4| BTreeSet::from([IpAddr::V4(v4), IpAddr::V6(ipv6_for(prefix, v4))]))
            .unwrap_or_default();
        if !self.is_established() {
            return state;
        }
        self.add_lanes(view, &own, &mut state);
        if !own.is_empty() {
            state.bridge = Some(Bridge {
                name: BRIDGE.to_owned(),
                mac: self.bridge_mac(),
                mtu: self.mtu(),
                addresses: own,
            });
            self.add_pods(prefix, host, &mut state);
        }
        state
    }

    fn sysctls(&self, host: &HostFacts) -> BTreeMap<String, String> {
        let mut sysctls: BTreeMap<String, String> =
            [("net/ipv4/ip_forward".to_owned(), "1"), ("net/ipv6/conf/all/forwarding".to_owned(), "1")]
                .into_iter()
                .chain(
                    // Forwarding would end what these learn from routers.
                    host.router_advertisements
                        .iter()
                        .map(|device| (format!("net/ipv6/conf/{device}/accept_ra"), "2")),
                )
                .map(|(path, value)| (path, value.to_owned()))
                .collect();
        for lane in &self.config.lanes {
            sysctls.insert(format!("net/ipv4/conf/{}/rp_filter", lane.device), "2".to_owned());
        }
        if self.stored.mesh_ipv4.is_some() {
            for (path, value) in [
                ("net/ipv4/conf/mesh0/rp_filter", "2"),
                ("net/ipv4/conf/mesh0/send_redirects", "0"),
                ("net/ipv4/conf/mesh0/accept_redirects", "0"),
                ("net/ipv6/conf/mesh0/accept_redirects", "0"),
                ("net/ipv6/conf/mesh0/accept_ra", "0"),
            ] {
                sysctls.insert(path.to_owned(), value.to_owned());
            }
        }
        sysctls
    }

    fn add_lanes(&self, view: &View, own: &BTreeSet<IpAddr>, state: &mut HostState) {
        let owners = view.grants().owners();
        // One tunnel key belongs to one node: the one with which a pre-shared key was agreed, else the lower id.
        let mut claims: BTreeMap<WgPublic, NodeId> = BTreeMap::new();
        for (id, record) in view.records().filter(|(id, _)| **id != self.id) {
            for lane in &record.lanes {
                let holder = claims.entry(lane.key).or_insert(*id);
                if *holder != *id && self.peer_key(id).is_some() && self.peer_key(holder).is_none() {
                    *holder = *id;
                }
            }
        }
        for config in &self.config.lanes {
            let mut lane = Lane {
                port: config.port,
                public_key: config.key,
                mtu: self.mtu(),
                addresses: own.clone(),
                peers: BTreeMap::new(),
            };
            // Who is out has no peers: they do not know it any more.
            let peers = view.records().filter(|(id, _)| **id != self.id && !self.is_out());
            for (id, record) in peers {
                let Some(theirs) = record.lanes.first().filter(|theirs| claims.get(&theirs.key) == Some(id))
                else {
                    continue;
                };
                let Some((psk, confirmed)) =
                    self.pairs.get(id).and_then(|pair| pair.key_for((config.key, theirs.key)))
                else {
                    continue;
                };
                let ranges = node_ranges(record, owners.get(&record.node));
                let (endpoint, force_endpoint) = self.endpoint(id, record, theirs.key, theirs.port);
                let peer = LanePeer {
                    psk: psk.clone(),
                    endpoint,
                    force_endpoint,
                    allowed_ips: ranges.clone(),
                    keepalive: 0,
                };
                lane.peers.insert(theirs.key, peer);
                if confirmed {
                    for range in ranges {
                        let source = own.iter().copied().find(|own| own.is_ipv4() == range.addr().is_ipv4());
                        let route = Route::Device { device: config.device.clone(), source, mtu: None };
                        state.routes.insert(range, route);
                    }
                }
            }
            state.lanes.insert(config.device.clone(), lane);
        }
    }

    fn peer_key(&self, id: &NodeId) -> Option<()> {
        let keys = self.tunnel_keys(id)?;
        self.pairs.get(id)?.key_for(keys).map(|_| ())
    }

    /// Where to send to a peer first: where the control session with it leads or its datagrams come from, else what it
    /// says of itself.
    /// Once WireGuard has learned an endpoint, that is left alone as long as handshakes succeed.
    fn endpoint(
        &self,
        id: &NodeId,
        record: &NodeRecord,
        key: WgPublic,
        port: u16,
    ) -> (Option<SocketAddr>, bool) {
        let session =
            self.session_with(id).and_then(|session| self.sessions.get(&session)).map(|s| s.remote.ip());
        let gossip = self.datagrams.address(id).map(|address| address.ip());
        let heard = session.or(gossip);
        let called = self.dialer.last_good(id).map(|address| address.ip());
        let address = heard.or(called).or_else(|| record.endpoints.first().copied());
        let endpoint = address.map(|ip| SocketAddr::new(ip, port));
        let facts = self.tunnels.get(&key).copied().unwrap_or_default();
        let stale = facts.handshake_age.is_some_and(|age| age > HANDSHAKE_STALE);
        (endpoint, stale && heard.is_some() && facts.endpoint != endpoint)
    }

    fn add_pods(&self, prefix: Ipv6Net, host: &HostFacts, state: &mut HostState) {
        let active = self.leases.all().iter().filter(|(_, lease)| lease.state == AttachmentState::Active);
        for (id, lease) in active {
            let name = id.host_ifname();
            let (mac, ipv4, ipv6) = (lease.mac(), lease.ipv4, ipv6_for(prefix, lease.ipv4));
            let port = Port { mac, ipv4, ipv6, mtu: self.mtu(), isolated: !host.bridge_netfilter };
            state.ports.insert(name.clone(), port);
            if let Some(guard) = &mut state.guard {
                guard.ports.insert(name, PortGuard { mac, ipv4, ipv6 });
            }
            for address in [IpAddr::V4(ipv4), IpAddr::V6(ipv6)] {
                let source = state
                    .bridge
                    .iter()
                    .flat_map(|bridge| bridge.addresses.iter().copied())
                    .find(|own| own.is_ipv4() == address.is_ipv4());
                let route = Route::Device { device: BRIDGE.to_owned(), source, mtu: None };
                state.routes.insert(IpNet::from(address), route);
            }
        }
    }
}

/// The ranges of a node: what it was granted, and the prefix that follows from its key.
pub(super) fn node_ranges(record: &NodeRecord, owned: Option<&RangeSet>) -> BTreeSet<IpNet> {
    let granted: Vec<Ipv4Net> = owned.map(RangeSet::nets).unwrap_or_default();
    granted.into_iter().map(IpNet::V4).chain([IpNet::V6(record.ipv6_prefix())]).collect()
}

/// The same from a key alone.
pub(super) fn ranges_of(view: &View, key: &IdentityKey, record: &NodeRecord) -> BTreeSet<IpNet> {
    node_ranges(record, Some(&view.grants().owned_by(key)))
}
