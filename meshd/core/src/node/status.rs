//! The node's account of itself, for `meshctl status` and `/metrics`.

use ipnet::IpNet;
use mesh_keys::NodeId;

use super::Node;
use super::desired::ranges_of;
use super::sessions::Way;
use crate::api::{
    AddressStatus, ClusterStatus, GossipStatus, LaneStatus, Membership, NodeStatus, PathStatus, PeerStatus,
    SCHEMA_VERSION, SessionStatus, Status, TunnelStatus, WayStatus,
};
use crate::host::Route;
use crate::leases::ipv6_for;
use crate::path::Leg;

impl Node {
    /// The whole status.
    pub fn status(&self) -> Status {
        let mut problems: Vec<String> =
            self.problems.iter().map(|problem| format!("{}: {}", problem.object, problem.text)).collect();
        problems.extend(self.cluster_problems());
        problems.extend(self.prefix_problems());
        problems.extend(self.overlap.clone());
        Status {
            schema_version: SCHEMA_VERSION,
            version: self.config.software.clone(),
            node: NodeStatus {
                id: self.id.to_string(),
                name: self.config.name.clone(),
                identity_key: self.me.to_string(),
            },
            cluster: self.view.as_ref().map(|view| ClusterStatus {
                id: view.cluster().to_string(),
                name: view.genesis().name().to_owned(),
                founder: view.genesis().founder().node_id().to_string(),
                ipv4: view.genesis().ipv4_range(),
                ipv6: view.genesis().ipv6_range(),
                members: view.records().count(),
                admin_keys: Some(view.genesis().admin_keys().iter().map(ToString::to_string).collect()),
                joins_open: Some(self.joins_open().is_ok()),
            }),
            membership: match &self.view {
                Some(_) => Membership::Member,
                None => Membership::Joining { waiting_for: self.waiting_for() },
            },
            addresses: self.address_status(),
            lanes: self.lane_status(),
            peers: self.peer_status(),
            attachments: self.leases.all().len(),
            problems,
            ipam: self.ipam_status(),
            leave: self.leave_status(),
        }
    }

    /// What the cluster has against this node, or waits for; and what keeps it from giving addresses to pods.
    pub(super) fn cluster_problems(&self) -> Vec<String> {
        let mut problems: Vec<String> = self.copies_problem().into_iter().collect();
        problems.extend(self.removal_problems());
        problems.extend(self.authority_problem());
        problems.extend(self.tries_problem());
        if let Some(view) = &self.view {
            problems.extend(view.grants().conflicts().iter().map(|conflict| {
                format!(
                    "node {} granted {} twice; {} does not get it",
                    conflict.granter.short(),
                    conflict.range,
                    conflict.loser.short()
                )
            }));
        }
        problems.extend(self.exhaustion_problem());
        problems.extend(self.leave_problem());
        problems
    }

    fn address_status(&self) -> Option<AddressStatus> {
        let (view, ipv4) = self.view.as_ref().zip(self.stored.mesh_ipv4)?;
        let owned = self.owned();
        let prefix = view.cluster().node_prefix(&self.me, 0);
        Some(AddressStatus {
            ipv4,
            ipv6: ipv6_for(prefix, ipv4),
            owned_ipv4: owned.nets(),
            owned_ipv6: prefix,
            leased: self.leases.all().len() as u64,
            free: self.leases.free(&owned, ipv4),
        })
    }

    pub(super) fn lane_status(&self) -> Vec<LaneStatus> {
        self.config
            .lanes
            .iter()
            .map(|lane| LaneStatus {
                device: lane.device.clone(),
                backend: self.config.backend.0,
                reason: self.config.backend.1.clone(),
                port: lane.port,
                public_key: lane.key.to_string(),
                up: self.applied > 0 && !self.problems.iter().any(|problem| problem.object == lane.device),
            })
            .collect()
    }

    fn gossip_status(&self, id: &NodeId) -> GossipStatus {
        let known = self.gossip.as_ref().and_then(|gossip| gossip.acquaintance(id));
        let (rtt, heard) = known.unwrap_or_default();
        GossipStatus {
            reachable: self.is_reachable(id),
            address: self.datagrams.address(id),
            rtt_microseconds: rtt,
            heard_seconds: heard.map(|at| self.now.since(at).as_secs()),
        }
    }

    fn path_status(&self, peer: &NodeId) -> Option<PathStatus> {
        let path = self.paths.get(peer)?;
        let way = |relay: Option<&NodeId>, leg: &Leg, usable: bool| WayStatus {
            relay: relay.map(ToString::to_string),
            rtt_microseconds: leg.rtt().map(|rtt| u32::try_from(rtt.as_micros()).unwrap_or(u32::MAX)),
            answered_seconds: leg.last_answer().map(|at| self.now.since(at).as_secs()),
            usable,
        };
        let direct = way(None, path.direct(), path.direct().works(self.now));
        let relays = path.relays().map(|(relay, leg)| way(Some(relay), leg, leg.is_ready(self.now)));
        let (why, since) = path.reason();
        Some(PathStatus {
            relay: path.way().relay().map(|relay| relay.to_string()),
            why: why.text().to_owned(),
            since_seconds: self.now.since(since).as_secs(),
            chosen_here: path.leads(),
            ways: std::iter::once(direct).chain(relays).collect(),
        })
    }

    /// Whether the kernel sends packets for `range` into a tunnel.
    fn leads_to_lane(&self, range: &IpNet) -> bool {
        matches!(
            self.in_kernel.routes.get(range),
            Some(Route::Devices { devices, .. })
                if devices.iter().all(|device| self.in_kernel.lanes.contains_key(device))
        )
    }

    fn peer_status(&self) -> Vec<PeerStatus> {
        let Some(view) = &self.view else { return Vec::new() };
        view.records()
            .filter(|(id, _)| **id != self.id)
            .map(|(id, record)| {
                let session = match self.session_with(id).and_then(|session| self.sessions.get(&session)) {
                    Some(session) => {
                        let since_seconds = self.now.since(session.opened).as_secs();
                        match session.way {
                            Way::Dialled(remote) | Way::Accepted(remote) => {
                                SessionStatus::Up { remote, since_seconds }
                            }
                            Way::Through { carrier, .. } => {
                                SessionStatus::Carried { through: carrier.to_string(), since_seconds }
                            }
                        }
                    }
                    None => SessionStatus::Down { reason: self.dialer.last_error(id) },
                };
                let facts = record.lanes.first().and_then(|lane| self.tunnels.get(&lane.key)).copied();
                let facts = facts.unwrap_or_default();
                let ranges = ranges_of(view, record);
                let mtu = Some(self.mtu_status(id, &ranges));
                let ready = ranges.iter().all(|range| self.leads_to_lane(range));
                PeerStatus {
                    id: id.to_string(),
                    name: record.name.clone(),
                    version: record.software.clone(),
                    leaving: record.leaving,
                    advertised: record.endpoints.clone(),
                    ranges: ranges.into_iter().collect(),
                    mesh_ipv4: record.mesh_ipv4,
                    mesh_ipv6: ipv6_for(
                        record.ipv6_prefix(),
                        record.mesh_ipv4.unwrap_or(std::net::Ipv4Addr::UNSPECIFIED),
                    ),
                    session,
                    gossip: self.gossip_status(id),
                    tunnel: TunnelStatus {
                        ready,
                        endpoint: facts.endpoint,
                        handshake_age_seconds: facts.handshake_age.map(|age| age.as_secs()),
                        rx_bytes: facts.rx_bytes,
                        tx_bytes: facts.tx_bytes,
                    },
                    path: self.path_status(id),
                    mtu,
                }
            })
            .collect()
    }
}
