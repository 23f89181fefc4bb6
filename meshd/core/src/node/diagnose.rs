//! The facts behind `meshctl why` and `meshctl doctor`, and the probes that are sent to have them.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use ipnet::IpNet;
use mesh_keys::NodeId;
use rand_core::RngCore as _;

use super::desired::ranges_of;
use super::policy::resolve;
use super::sessions::Way as SessionWay;
use super::{Node, Problem};
use crate::api::{
    ApiError, AttachmentId, AttachmentState, DoctorReport, ErrorCode, NodeName, WhyReport, WhyRequest,
};
use crate::diagnose::{
    DoctorFacts, End, Gossip, Key, Lane, LocalPort, Member, Owner, Path, Probe, Session, SessionState,
    Setting, Standing, WhyFacts, doctor, why,
};
use crate::host::Route;
use crate::leases::{Lease, ipv6_for};
use crate::view::{NodeRecord, View};

/// A probe that is not answered within this time is taken not to be.
const ANSWER: Duration = Duration::from_millis(1200);

/// What came of a probe is of interest for so long; and none is sent so soon after another.
const RECENT: Duration = Duration::from_secs(30);
const PAUSE: Duration = Duration::from_secs(4);

/// Members that are probed for people, at a time.
const MAX_LOOKS: usize = 64;

/// Addresses of one member that are probed.
const MAX_ADDRESSES: usize = 8;

/// Who was heard of so lately needs no probe.
const FRESH: Duration = Duration::from_secs(5);

/// What may be named.
const HINT: &str = "give an address, a node (`meshctl status peers` lists them), or a container's id or pod's name of this host";

/// Probes that people have asked for.
#[derive(Debug, Default)]
pub(super) struct Looks {
    of: BTreeMap<NodeId, Look>,
}

#[derive(Clone, Copy, Debug)]
struct Look {
    at: crate::time::Time,
    number: u32,
    is_answered: bool,
}

impl Looks {
    /// A probe was answered by the member itself.
    pub(super) fn answered(&mut self, from: &NodeId, number: u32) {
        if let Some(look) = self.of.get_mut(from).filter(|look| look.number == number) {
            look.is_answered = true;
        }
    }
}

impl Node {
    pub(super) fn why(&mut self, request: &WhyRequest) -> Result<WhyReport, ApiError> {
        let (to, port) = split_port("to", &request.to)?;
        let (from, from_port) = split_port("from", &request.from)?;
        if from_port.is_some() {
            let message =
                format!("field from: {:?} has a port; only the destination may have one", request.from);
            return Err(ApiError::new(ErrorCode::Invalid, message));
        }
        let waiting_for = self.view.is_none().then(|| self.waiting_for());
        let (from, to) = match waiting_for {
            Some(_) => {
                let nobody = |text: &str| End { text: text.to_owned(), address: None, owner: Owner::Outside };
                (nobody(&from), nobody(&to))
            }
            None => self.ends(&from, &to)?,
        };
        let member = match (&from.owner, &to.owner) {
            (Owner::Member { .. }, Owner::Member { .. }) => None,
            (Owner::Member { id, .. }, _) | (_, Owner::Member { id, .. }) => Some(*id),
            _ => None,
        };
        let probes = request.look && member.is_some_and(|id| self.look(id));
        let labels = self.labels();
        let record = |id: NodeId| Some((id, self.view.as_ref()?.record(&id)?));
        let member = member.and_then(record).map(|(id, record)| self.member_facts(id, record, &labels));
        let ping = member.as_ref().filter(|member| member.key == Key::Confirmed).and_then(|member| {
            let is_v6 = [from.address, to.address].into_iter().flatten().any(|address| address.is_ipv6());
            self.mesh_address(&member.id, is_v6)
        });
        Ok(why(&WhyFacts {
            here: self.name_of(&self.id, &labels),
            waiting_for,
            from,
            to,
            port,
            member,
            is_applied: self.applied > 0,
            problems: self.problems.clone(),
            pinged: request.pinged,
            ping,
            look_again_milliseconds: probes.then_some(LOOK_AGAIN),
        }))
    }

    pub(super) fn doctor(&mut self, look: bool, settings: Result<Vec<Setting>, String>) -> DoctorReport {
        let members: Vec<NodeId> = match &self.view {
            Some(view) => view.records().map(|(id, _)| *id).filter(|id| *id != self.id).collect(),
            None => Vec::new(),
        };
        let mut probes = false;
        for id in members.iter().filter(|_| look) {
            let heard = self.datagrams.heard(id).map(|at| self.now.since(at));
            if heard.is_none_or(|heard| heard > FRESH) {
                probes |= self.look(*id);
            }
        }
        let labels = self.labels();
        let members = members.into_iter().filter_map(|id| {
            let record = self.view.as_ref()?.record(&id)?;
            Some(self.member_facts(id, record, &labels))
        });
        doctor(&DoctorFacts {
            members: members.collect(),
            here: self.name_of(&self.id, &labels),
            waiting_for: self.view.is_none().then(|| self.waiting_for()),
            is_applied: self.applied > 0,
            problems: self.problems.clone(),
            lanes: self.lane_status(),
            mtu: self.mtu(),
            cluster: self.cluster_problems(),
            networks: self.prefix_problems().into_iter().chain(self.overlap.clone()).collect(),
            is_behind_nat: self.nats.behind_one(),
            unix_seconds: self.wall_clock.map(|(seconds, at)| seconds + self.now.since(at).as_secs()),
            settings,
            look_again_milliseconds: probes.then_some(LOOK_AGAIN),
        })
    }

    /// Sends a probe to all addresses of a member, unless that was just done; whether its answer is awaited.
    fn look(&mut self, peer: NodeId) -> bool {
        let now = self.now;
        self.looks.of.retain(|_, look| now.since(look.at) < RECENT);
        match self.looks.of.get(&peer) {
            Some(look) if now.since(look.at) < PAUSE => {
                return !look.is_answered && now.since(look.at) < ANSWER;
            }
            None if self.looks.of.len() >= MAX_LOOKS => return false,
            Some(_) | None => {}
        }
        let addresses = self.addresses_to_look_at(&peer);
        if self.is_out() || addresses.is_empty() {
            return false;
        }
        let number = self.rng.next_u32();
        self.looks.of.insert(peer, Look { at: now, number, is_answered: false });
        self.probe_for_people(peer, number, &addresses);
        true
    }

    /// Where a member's control port may be, all that is known.
    fn addresses_to_look_at(&self, peer: &NodeId) -> Vec<SocketAddr> {
        let known = self.datagrams.address(peer).into_iter().chain(self.nats.control_port(peer));
        let mut addresses: Vec<SocketAddr> = Vec::new();
        for address in known.chain(self.addresses_of(peer, self.dialer.last_good(peer))) {
            if !addresses.contains(&address) {
                addresses.push(address);
            }
        }
        addresses.truncate(MAX_ADDRESSES);
        addresses
    }

    /// What people call each member: its name, and the first digits of its id where others have that name, too.
    fn labels(&self) -> BTreeMap<NodeId, String> {
        let Some(view) = &self.view else { return BTreeMap::new() };
        let mut count: BTreeMap<&str, usize> = BTreeMap::new();
        for (_, record) in view.records() {
            *count.entry(record.name.as_str()).or_default() += 1;
        }
        let label = |(id, record): (&NodeId, &NodeRecord)| {
            let is_alone = count.get(record.name.as_str()) == Some(&1);
            let label =
                if is_alone { record.name.clone() } else { format!("{} ({})", record.name, id.short()) };
            (*id, label)
        };
        view.records().map(label).collect()
    }

    fn name_of(&self, id: &NodeId, labels: &BTreeMap<NodeId, String>) -> NodeName {
        let this_node = *id == self.id;
        let own = || if this_node { self.config.name.clone() } else { id.short() };
        NodeName { id: id.to_string(), name: labels.get(id).cloned().unwrap_or_else(own), this_node }
    }

    fn member_facts(&self, id: NodeId, record: &NodeRecord, labels: &BTreeMap<NodeId, String>) -> Member {
        let now = self.now;
        let label = |id: &NodeId| labels.get(id).cloned().unwrap_or_else(|| id.short());
        let since = |at: crate::time::Time| now.since(at);
        let ranges = self.view.as_ref().map(|view| ranges_of(view, record)).unwrap_or_default();
        let state = match self.session_with(&id).and_then(|session| self.sessions.get(&session)) {
            None => SessionState::None,
            Some(session) => match session.way {
                SessionWay::Dialled(_) | SessionWay::Accepted(_) => SessionState::Open,
                SessionWay::Through { carrier, .. } => SessionState::Carried(label(&carrier)),
            },
        };
        // The first lane carries, whatever becomes of the others.
        let key = self.tunnel_keys(&id).next().and_then(|(_, keys)| {
            let pair = self.pairs.get(&id)?;
            Some(match pair.key_for(keys) {
                Some((_, true)) => Key::Confirmed,
                Some((_, false)) => Key::Agreed,
                None if pair.is_doubted(&keys.1) => Key::Doubted,
                None => Key::None,
            })
        });
        let path = self.paths.get(&id).map(|path| {
            let (why, at) = path.reason();
            let relay = path.way().relay();
            let leg = relay.map_or(Some(path.direct()), |relay| {
                path.relays().find(|(id, _)| **id == relay).map(|(_, leg)| leg)
            });
            Path {
                relay: relay.as_ref().map(label),
                why,
                since: since(at),
                chosen_here: path.leads(),
                rtt: leg.and_then(crate::path::Leg::rtt),
            }
        });
        let leads_to = |range: &IpNet| match self.in_kernel.routes.get(range) {
            Some(Route::Devices { devices, .. })
                if devices.iter().all(|device| self.in_kernel.lanes.contains_key(device)) =>
            {
                Some((*range, devices.iter().map(String::as_str).collect::<Vec<_>>().join(", ")))
            }
            Some(Route::Devices { .. } | Route::Unreachable) | None => None,
        };
        let failed = self.dialer.last_failure(&id).map(|(at, reason)| (since(at), reason.to_owned()));
        let acquaintance = self.gossip.as_ref().and_then(|gossip| gossip.acquaintance(&id));
        let direct_rtt = self.paths.get(&id).and_then(|path| path.direct().rtt());
        Member {
            id,
            label: label(&id),
            reachable: self.is_reachable(&id),
            gossip: Gossip {
                port: record.control_port,
                addresses: self.addresses_to_look_at(&id),
                from: self.datagrams.address(&id),
                heard: self.datagrams.heard(&id).map(since),
                probe: self.probe_of(&id),
                rtt: direct_rtt.or_else(|| Some(Duration::from_micros(acquaintance?.0?.into()))),
            },
            session: Session {
                state,
                failed,
                addresses: self.addresses_of(&id, self.dialer.last_good(&id)),
                is_calling: self.is_calling(&id),
            },
            key: key.unwrap_or(Key::None),
            lanes: record.lanes.iter().map(|lane| self.lane_facts(id, record, lane)).collect(),
            path,
            mtu: Some(self.mtu_status(&id, &ranges)),
            routes: ranges.iter().filter_map(leads_to).collect(),
            ranges: ranges.into_iter().collect(),
        }
    }

    fn lane_facts(&self, id: NodeId, record: &NodeRecord, lane: &crate::view::LaneInfo) -> Lane {
        let facts = self.tunnels.get(&lane.key).copied().unwrap_or_default();
        let seen = self.flows.seen(&id, lane.index, self.now);
        let own = self.config.lanes.iter().find(|own| own.index == lane.index);
        let is_relayed = self.paths.relay_to(&id).is_some();
        let address =
            self.datagrams.address(&id).or_else(|| self.dialer.last_good(&id)).map(|address| address.ip());
        let expected = || {
            let ip = address.or_else(|| record.endpoints.first().copied())?;
            Some(self.lane_at(&id, record, lane, ip))
        };
        Lane {
            index: lane.index,
            port: lane.port,
            device: own.map(|own| own.device.clone()),
            endpoint: facts.endpoint,
            direct: facts.endpoint.filter(|_| !is_relayed).or_else(expected),
            handshake: facts.handshake_age,
            received: seen.received,
            sent: seen.sent,
            silence: seen.silence,
        }
    }

    /// What became of this node's probes on the direct way: those of the path, and those that people have asked for.
    fn probe_of(&self, id: &NodeId) -> Probe {
        let now = self.now;
        let leg = self.paths.get(id).map(crate::path::Path::direct);
        let lost = leg.map_or(Duration::ZERO, |leg| leg.lost_for(now));
        let answered = leg.and_then(crate::path::Leg::last_answer);
        let look = self.looks.of.get(id).filter(|look| now.since(look.at) < RECENT);
        match look {
            _ if lost >= ANSWER => {
                let before =
                    look.filter(|look| !look.is_answered).map_or(Duration::ZERO, |look| now.since(look.at));
                Probe::Unanswered(lost.max(before))
            }
            Some(look) if look.is_answered || answered.is_some_and(|at| at > look.at) => Probe::Answered,
            Some(look) if now.since(look.at) < ANSWER => Probe::UnderWay,
            Some(look) => Probe::Unanswered(now.since(look.at)),
            None if answered.is_some_and(|at| now.since(at) < RECENT) => Probe::Answered,
            None => Probe::None,
        }
    }

    fn mesh_address(&self, id: &NodeId, is_v6: bool) -> Option<IpAddr> {
        let record = self.view.as_ref()?.record(id)?;
        let ipv4 = record.mesh_ipv4?;
        Some(if is_v6 { IpAddr::V6(ipv6_for(record.ipv6_prefix(), ipv4)) } else { IpAddr::V4(ipv4) })
    }

    /// Both ends, in one family.
    fn ends(&self, from: &str, to: &str) -> Result<(End, End), ApiError> {
        let Some(view) = &self.view else {
            return Err(ApiError::new(ErrorCode::NotReady, "this node is in no cluster yet"));
        };
        let literal = |text: &str| text.parse::<IpAddr>().ok();
        if let (Some(a), Some(b)) = (literal(from), literal(to))
            && a.is_ipv4() != b.is_ipv4()
        {
            let message =
                format!("fields from and to: {a} and {b} are of two families; nothing flows between them");
            return Err(ApiError::new(ErrorCode::Invalid, message));
        }
        let is_v6 = [from, to].into_iter().filter_map(literal).any(|address| address.is_ipv6());
        Ok((self.end(view, "from", from, is_v6)?, self.end(view, "to", to, is_v6)?))
    }

    fn end(&self, view: &View, field: &str, text: &str, is_v6: bool) -> Result<End, ApiError> {
        let text_of = text.to_owned();
        if let Ok(address) = text.parse::<IpAddr>() {
            return Ok(End {
                text: text_of,
                address: Some(address),
                owner: self.owner_of_address(view, address),
            });
        }
        let pods: Vec<(&AttachmentId, &Lease)> =
            self.leases.all().iter().filter(|(id, lease)| names_pod(text, id, lease)).collect();
        match (resolve(view, text), pods.as_slice()) {
            (Ok(node), []) => {
                let address = self.mesh_address(&node, is_v6);
                let owner = if node == self.id {
                    Owner::ThisNode
                } else {
                    let labels = self.labels();
                    let label = labels.get(&node).cloned().unwrap_or_else(|| node.short());
                    Owner::Member { id: node, label, range: None }
                };
                Ok(End { text: text_of, address, owner })
            }
            (Err(error), [] | [_, ..]) if error.code == ErrorCode::Ambiguous => Err(error),
            (Err(_), [(id, lease)]) => {
                let prefix = view.cluster().node_prefix(&self.me, 0);
                let address =
                    if is_v6 { IpAddr::V6(ipv6_for(prefix, lease.ipv4)) } else { IpAddr::V4(lease.ipv4) };
                Ok(End {
                    text: text_of,
                    address: Some(address),
                    owner: Owner::Pod(self.local_port(id, lease)),
                })
            }
            (Err(_), []) => Err(ApiError::new(
                ErrorCode::NotFound,
                format!("field {field}: {text:?} is no address, no node and no pod of this host; {HINT}"),
            )),
            (node, several) => {
                let ids: Vec<String> = several.iter().map(|(id, _)| id.to_string()).collect();
                let node = if node.is_ok() { "a node and " } else { "" };
                let message = format!(
                    "field {field}: {text:?} names {node}{}; give an address or an id",
                    ids.join(", ")
                );
                Err(ApiError::new(ErrorCode::Ambiguous, message))
            }
        }
    }

    fn owner_of_address(&self, view: &View, address: IpAddr) -> Owner {
        let labels = self.labels();
        let label = |id: &NodeId| labels.get(id).cloned().unwrap_or_else(|| id.short());
        if !self.is_of_cluster(address) {
            if self.host.as_ref().is_some_and(|host| host.addresses.contains(&address)) {
                return Owner::Underlay(None);
            }
            let has = |(_, record): &(&NodeId, &NodeRecord)| record.endpoints.contains(&address);
            return match view.records().find(has) {
                Some((id, _)) if *id == self.id => Owner::Underlay(None),
                Some((id, _)) => Owner::Underlay(Some(label(id))),
                None => Owner::Outside,
            };
        }
        // A pod's IPv6 address has its IPv4 address in it.
        let (owner, ipv4) = match address {
            IpAddr::V4(ipv4) => (view.grants().owner_of(ipv4).map(|key| key.node_id()), ipv4),
            IpAddr::V6(ipv6) => {
                let owner = view.records().find(|(_, record)| record.ipv6_prefix().contains(&ipv6));
                let [.., a, b, c, d] = ipv6.octets();
                (owner.map(|(id, _)| *id), Ipv4Addr::new(a, b, c, d))
            }
        };
        let Some(owner) = owner else { return Owner::Nobody };
        if owner == self.id {
            let lease = self.leases.all().iter().find(|(_, lease)| lease.ipv4 == ipv4);
            return match lease {
                Some((id, lease)) => Owner::Pod(self.local_port(id, lease)),
                None if self.stored.mesh_ipv4 == Some(ipv4) => Owner::ThisNode,
                None => Owner::Free,
            };
        }
        let Some(record) = view.record(&owner) else { return Owner::Nobody };
        let is_node = record.mesh_ipv4 == Some(ipv4);
        let range = ranges_of(view, record).into_iter().find(|range| range.contains(&address));
        Owner::Member { id: owner, label: label(&owner), range: range.filter(|_| !is_node) }
    }

    fn local_port(&self, id: &AttachmentId, lease: &Lease) -> LocalPort {
        let device = id.host_ifname();
        let problem = self.problems.iter().find(|Problem { object, .. }| *object == device);
        let standing = match (lease.state, problem) {
            (AttachmentState::Leased, _) => Standing::Leased,
            (AttachmentState::Active, Some(problem)) => Standing::Problem(problem.text.clone()),
            (AttachmentState::Active, None) if self.in_kernel.ports.contains_key(&device) => {
                Standing::Applied
            }
            (AttachmentState::Active, None) => Standing::Waiting,
        };
        let pod = lease.pod.as_ref().filter(|pod| !pod.name.is_empty());
        let pod = pod.map(|pod| format!("pod {}/{}", pod.namespace, pod.name));
        LocalPort { attachment: id.to_string(), pod, device, standing }
    }
}

/// When the answers to probes are there.
const LOOK_AGAIN: u64 = 1500;

/// Shortest prefix of a container's id.
const MIN_PREFIX: usize = 8;

fn names_pod(text: &str, id: &AttachmentId, lease: &Lease) -> bool {
    let of_container = id.container() == text
        || (text.len() >= MIN_PREFIX && id.container().starts_with(text))
        || id.to_string() == text;
    let of_pod = |pod: &crate::api::PodIdentity| {
        !pod.name.is_empty() && (pod.name == text || format!("{}/{}", pod.namespace, pod.name) == text)
    };
    of_container || lease.pod.as_ref().is_some_and(of_pod)
}

/// An end, and the port behind it.
fn split_port(field: &str, text: &str) -> Result<(String, Option<u16>), ApiError> {
    let invalid =
        |message: String| Err(ApiError::new(ErrorCode::Invalid, format!("field {field}: {message}")));
    let text = text.trim();
    if text.is_empty() {
        return invalid(format!("it is empty; {HINT}"));
    }
    if text.parse::<IpAddr>().is_ok() {
        return Ok((text.to_owned(), None));
    }
    let (end, port) = match text.strip_prefix('[').map(|rest| rest.split_once(']')) {
        Some(Some((end, ""))) => (end, None),
        Some(Some((end, rest))) => match rest.strip_prefix(':') {
            Some(port) => (end, Some(port)),
            None => {
                return invalid(format!(
                    "{text:?}: behind the bracket comes a colon and a port, as in [fd00::2]:80"
                ));
            }
        },
        Some(None) => return invalid(format!("{text:?}: the bracket is not closed, as in [fd00::2]:80")),
        None => match text.rsplit_once(':') {
            Some((end, _)) if end.contains(':') => {
                return invalid(format!(
                    "{text:?} is no address; an IPv6 address with a port is written [fd00::2]:80"
                ));
            }
            Some((end, port)) => (end, Some(port)),
            None => (text, None),
        },
    };
    let Some(port) = port else { return Ok((end.to_owned(), None)) };
    match port.parse::<u16>() {
        Ok(port) if port > 0 && !end.is_empty() => Ok((end.to_owned(), Some(port))),
        _ => invalid(format!("{port:?} in {text:?} is no port: a number from 1 to 65535")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_told_from_an_address() {
        let split = |text: &str| split_port("to", text).map_err(|error| error.message);
        for (text, end, port) in [
            ("10.32.0.2", "10.32.0.2", None),
            ("10.32.0.2:80", "10.32.0.2", Some(80)),
            ("fd00::2", "fd00::2", None),
            ("[fd00::2]", "fd00::2", None),
            ("[fd00::2]:443", "fd00::2", Some(443)),
            ("web-0:8080", "web-0", Some(8080)),
            ("default/web-0", "default/web-0", None),
        ] {
            assert_eq!(split(text), Ok((end.to_owned(), port)), "{text}");
        }
        for (text, says) in [
            ("", "it is empty"),
            ("10.32.0.2:0", "no port"),
            ("10.32.0.2:http", "no port"),
            ("web:65536", "no port"),
            (":80", "no port"),
            ("[fd00::2:80", "not closed"),
            ("[fd00::2]80", "a colon and a port"),
            ("fd00::zz:80", "[fd00::2]:80"),
        ] {
            let error = split(text).unwrap_err();
            assert!(error.starts_with("field to: ") && error.contains(says), "{error}");
        }
    }
}
