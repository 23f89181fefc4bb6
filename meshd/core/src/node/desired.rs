//! What the kernel of this host should hold: a pure function of the node's state.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use ipnet::{IpNet, Ipv6Net};
use mesh_keys::{NodeId, WgPublic};

use super::writing::MAX_FLUSH_PAUSE;
use super::{HostFacts, MIN_TICK, Node, Output};
use crate::api::{AttachmentState, BRIDGE};
use crate::host::{Bridge, Guard, HostState, Lane, LanePeer, Port, PortGuard, Route};
use crate::leases::ipv6_for;
use crate::state::StateFile;
use crate::time::Time;
use crate::view::{LaneInfo, NodeRecord, View};

/// What WireGuard adds to a packet over IPv6: 40 IPv6, 8 UDP, 16 header, 16 tag (WireGuard paper, section 5.4.6).
pub(super) const WIREGUARD_OVERHEAD: u32 = 80;

/// MTU of an underlay nobody told us about.
const DEFAULT_UNDERLAY_MTU: u32 = 1500;

/// IPv6 links carry no less (RFC 8200, section 5).
pub(super) const MIN_MTU: u32 = 1280;

/// In a large cluster the state is computed at most once in this time for each member: ten times what it takes.
const COMPUTING: Duration = Duration::from_micros(20);

/// Older handshakes mean that the tunnel does not work: WireGuard renews them every 120 s, and ends sessions at
/// 180 s (WireGuard paper, section 6.1).
pub(super) const HANDSHAKE_STALE: Duration = Duration::from_secs(190);

impl Node {
    /// MTU of lanes and pods.
    pub(super) fn mtu(&self) -> u32 {
        let underlay = self.host.as_ref().and_then(|host| host.underlay_mtu).unwrap_or(DEFAULT_UNDERLAY_MTU);
        self.config.mtu.unwrap_or(underlay.saturating_sub(WIREGUARD_OVERHEAD)).max(MIN_MTU)
    }

    /// The revision that has, or will have, what this node wants now.
    pub(super) fn wanted_revision(&mut self) -> u64 {
        self.recompute_desired();
        let waits = self.stale && self.view.is_some() && self.host.is_some() && self.kept_out().is_none();
        self.promised |= waits;
        self.revision + u64::from(waits)
    }

    /// Computes the desired state; when it is new, it goes out as [`Output::Desired`].
    ///
    /// What the state follows from is durable first: a daemon that is killed at any instant wants the same when
    /// it is back, so it takes nothing away from the kernel. In a burst of changes the state waits for the next
    /// write, which is at most [`MAX_FLUSH_PAUSE`] away.
    pub(super) fn recompute_desired(&mut self) {
        self.stale |= self.leases.take_changed();
        let (Some(view), Some(host)) = (&self.view, &self.host) else { return };
        let held = self.held && !self.dirty.is_empty() && self.now < self.next_flush;
        if !self.stale || held || self.now < self.next_desired || self.kept_out().is_some() {
            return;
        }
        self.held = false;
        let members = self.gossip.as_ref().map_or(0, crate::gossip::Gossip::members);
        let pause = COMPUTING * u32::try_from(members).unwrap_or(u32::MAX);
        self.next_desired = if pause < MIN_TICK { self.now } else { self.now + pause };
        let owners = self.owners_of_tunnel_keys();
        let desired = self.desired_state(view, host, &owners);
        self.owners = owners;
        // Whoever was promised another revision gets it.
        if self.revision > 0 && *self.desired == desired && !self.promised {
            self.stale = false;
            self.paths.steps_need_nothing();
            return;
        }
        if self.dirty_later.take().is_some() {
            self.dirty.insert(StateFile::Cluster);
        }
        // A disk that fails holds nothing up: its next try is further away.
        let pause = self.next_flush.since(self.now);
        if !self.dirty.is_empty() && !pause.is_zero() && pause <= MAX_FLUSH_PAUSE {
            self.held = true;
            return;
        }
        self.flush();
        self.revision += 1;
        self.paths_in_revision(self.revision);
        (self.stale, self.promised) = (false, false);
        self.desired = Arc::new(desired);
        let (revision, state) = (self.revision, self.desired.clone());
        self.emit(Output::Desired { revision, state });
    }

    /// Whether the last state that went out follows from what the node knows now, or is about to be replaced.
    #[cfg(test)]
    pub(super) fn desires_what_it_should(&self) -> bool {
        let (Some(view), Some(host)) = (&self.view, &self.host) else { return true };
        let not_durable = self.dirty.contains(&StateFile::Cluster)
            || self.pending.values().any(super::writing::Pending::is_of_the_view);
        self.stale
            || not_durable
            || self.revision == 0
            || self.kept_out().is_some()
            || *self.desired == self.desired_state(view, host, &self.owners_of_tunnel_keys())
    }

    pub(super) fn desired_deadline(&self) -> Option<Time> {
        (self.stale && self.next_desired > self.now).then_some(self.next_desired)
    }

    fn desired_state(&self, view: &View, host: &HostFacts, owners: &BTreeMap<WgPublic, NodeId>) -> HostState {
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
        self.add_lanes(view, owners, &own, &mut state);
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
        if self.config.lanes.len() > 1 {
            // By ports too: what two hosts say to each other is spread as well.
            for path in ["net/ipv4/fib_multipath_hash_policy", "net/ipv6/fib_multipath_hash_policy"] {
                sysctls.insert(path.to_owned(), "1".to_owned());
            }
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

    fn add_lanes(
        &self,
        view: &View,
        owners: &BTreeMap<WgPublic, NodeId>,
        own: &BTreeSet<IpAddr>,
        state: &mut HostState,
    ) {
        let sessions = self.session_addresses();
        // A prefix that several members have belongs to none of them: whoever made it so gets nothing by it.
        let contested = view.contested_prefixes();
        for config in &self.config.lanes {
            let mut lane = Lane {
                port: config.port,
                public_key: config.key,
                mtu: self.mtu(),
                addresses: own.clone(),
                peers: BTreeMap::new(),
            };
            // Who is out has no peers: they do not know it any more.
            for (id, pair) in self.pairs.iter().filter(|(id, _)| **id != self.id && !self.is_out()) {
                let Some(record) = view.record(id) else { continue };
                let mut theirs = record.lanes.iter().filter(|theirs| theirs.index == config.index);
                let Some(theirs) = theirs.find(|theirs| owners.get(&theirs.key) == Some(id)) else {
                    continue;
                };
                let Some((psk, confirmed)) = pair.key_for((config.key, theirs.key)) else { continue };
                let mut ranges = ranges_of(view, record);
                ranges.retain(|range| !matches!(range, IpNet::V6(prefix) if contested.contains_key(prefix)));
                let session = sessions.get(id).copied();
                let (endpoint, force_endpoint) = self.endpoint(id, record, theirs, session);
                let peer = LanePeer {
                    psk: psk.clone(),
                    endpoint,
                    force_endpoint,
                    allowed_ips: ranges.clone(),
                    keepalive: self.keepalive(id),
                };
                // Its routes stay: what comes in this moment is lost, and not answered with "unreachable".
                if !self.paths.is_left_out(id) {
                    lane.peers.insert(theirs.key, peer);
                }
                if confirmed {
                    let [ipv4_mtu, ipv6_mtu] = self.route_mtus(id, &ranges);
                    for range in ranges {
                        let source = own.iter().copied().find(|own| own.is_ipv4() == range.addr().is_ipv4());
                        let mtu = if range.addr().is_ipv4() { ipv4_mtu } else { ipv6_mtu };
                        state.routes.insert(range, Route::to_device(&config.device, source, mtu));
                    }
                }
            }
            state.lanes.insert(config.device.clone(), lane);
        }
    }

    /// Whose each tunnel key is. Only who has proved that it holds the secret of a key has a pre-shared key for it (see
    /// [`super::psk`]); that are several only where one has given it to another. Then the tunnel is that of the lowest
    /// id, among those with a confirmed key if there are any.
    fn owners_of_tunnel_keys(&self) -> BTreeMap<WgPublic, NodeId> {
        let mut owners: BTreeMap<WgPublic, (NodeId, bool)> = BTreeMap::new();
        for (id, pair) in self.pairs.iter() {
            for (_, keys) in self.tunnel_keys(id) {
                let Some((_, confirmed)) = pair.key_for(keys) else { continue };
                let owner = owners.entry(keys.1).or_insert((*id, confirmed));
                if confirmed && !owner.1 {
                    *owner = (*id, true);
                }
            }
        }
        owners.into_iter().map(|(key, (id, _))| (key, id)).collect()
    }

    /// Where to send to a peer first: where the control session with it leads or its datagrams come from, else what it
    /// says of itself.
    /// Once WireGuard has learned an endpoint, that is left alone as long as handshakes succeed.
    pub(super) fn endpoint(
        &self,
        id: &NodeId,
        record: &NodeRecord,
        lane: &LaneInfo,
        session: Option<IpAddr>,
    ) -> (Option<SocketAddr>, bool) {
        if let Some(relay) = self.paths.relay_to(id).and_then(|relay| self.datagrams.address(&relay)) {
            return (Some(relay), self.paths.is_forced(id));
        }
        let gossip = self.datagrams.address(id).map(|address| address.ip());
        let heard = gossip.or(session);
        let called = self.dialer.last_good(id).map(|address| address.ip());
        let address = heard.or(called).or_else(|| record.endpoints.first().copied());
        let endpoint = address.map(|ip| self.lane_at(id, record, lane, ip));
        let facts = self.tunnels.get(&lane.key).copied().unwrap_or_default();
        let stale = facts.handshake_age.is_some_and(|age| age > HANDSHAKE_STALE);
        let forced = self.paths.is_forced(id) || (stale && heard.is_some());
        (endpoint, forced && facts.endpoint != endpoint)
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
                state.routes.insert(IpNet::from(address), Route::to_device(BRIDGE, source, None));
            }
        }
    }
}

/// The ranges of a node: what it was granted, and the prefix that follows from its key.
pub(super) fn ranges_of(view: &View, record: &NodeRecord) -> BTreeSet<IpNet> {
    let granted = view.grants().owned_by(&record.node).nets();
    granted.into_iter().map(IpNet::V4).chain([IpNet::V6(record.ipv6_prefix())]).collect()
}
