//! Addresses of this node and of its pods; requests of the control API.

use std::net::Ipv4Addr;
use std::time::Duration;

use ipnet::Ipv4Net;
use mesh_keys::NodeId;

use super::writing::Pending;
use super::{GUARD_OBJECT, Node, Problem, Request, RequestId, Response};
use crate::api::{
    ApiError, AttachRequest, Attachment, AttachmentId, AttachmentState, ErrorCode, GcReport, GcRequest,
    MacAddr,
};
use crate::leases::{Lease, ipv6_for};
use crate::message::Message;
use crate::ranges::RangeSet;
use crate::state::StateFile;
use crate::time::Time;
use crate::view::Delta;

/// With fewer free addresses than this the node asks others for more.
pub(super) const LOW_WATER: u64 = 16;

/// Pause between two requests for addresses.
const ASK_EVERY: Duration = Duration::from_secs(2);

/// Pause between two blocks for a member that has more than its share.
const RICH_PAUSE: Duration = Duration::from_secs(10);

/// Blocks that are no more than a fair share in any cluster.
const MIN_SHARE: u64 = 4;

/// Blocks handed over for one request.
const BLOCKS_PER_REQUEST: u32 = 1;

impl Node {
    // The node's own ranges.

    pub(super) fn owned(&self) -> RangeSet {
        self.view.as_ref().map(|view| view.usable_remembered(&self.me)).unwrap_or_default()
    }

    /// What this node does not give away: blocks in use, one to live in, and what it owns but may not use.
    pub(super) fn kept_addresses(&self) -> RangeSet {
        let Some(view) = &self.view else { return RangeSet::new() };
        let prefix = view.genesis().block_prefix();
        let mut kept = self.leases.blocks_in_use(prefix);
        let home = self.stored.mesh_ipv4.or_else(|| self.leases.first_unused(&self.owned()));
        if let Some(net) = home.and_then(|address| Ipv4Net::new(address, prefix).ok()) {
            kept.insert(net.trunc());
        }
        let mut frozen = view.grants().owned_by(&self.me);
        frozen.subtract(&self.owned());
        kept.union(&frozen);
        kept
    }

    /// Keeps one block more where it would soon ask for one itself: a single block that two such nodes ask each other for
    /// would never come to rest.
    fn keep_a_reserve(&self, kept: &mut RangeSet) {
        let reserved = self.stored.mesh_ipv4.unwrap_or(Ipv4Addr::UNSPECIFIED);
        let mut usable = self.owned();
        let mut spare = usable.clone();
        spare.subtract(kept);
        usable.subtract(&spare);
        if let Some(view) = &self.view
            && !self.leases.has_free(LOW_WATER, &usable, reserved)
            && let Some(first) = spare.nets().first()
            && let Ok(block) =
                Ipv4Net::new(first.addr(), view.genesis().block_prefix().max(first.prefix_len()))
        {
            kept.insert(block);
        }
    }

    pub(super) fn spare_addresses(&self) -> RangeSet {
        let mut spare = self.owned();
        spare.subtract(&self.kept_addresses());
        spare
    }

    /// Takes an address for the node itself, once it owns a range.
    pub(super) fn assign_address(&mut self) {
        if self.is_leaving() {
            return;
        }
        let owned = self.owned();
        if self.stored.mesh_ipv4.is_some_and(|address| owned.contains(address)) {
            return;
        }
        if let Some(address) = self.leases.first_unused(&owned) {
            tracing::info!(%address, "mesh address");
            self.stored.mesh_ipv4 = Some(address);
            self.stale = true;
            self.dirty.insert(StateFile::Node);
            self.refresh_record();
        }
    }

    pub(super) fn advance_addresses(&mut self) {
        if self.view.is_none() {
            return;
        }
        self.assign_address();
        if !self.runs_low() {
            self.asked_in_vain = 0;
            return;
        }
        if self.addresses_asked.is_some_and(|at| self.now.since(at) < ASK_EVERY) {
            return;
        }
        self.addresses_asked = Some(self.now);
        let Some(view) = &self.view else { return };
        // Who owns one block lives in it.
        let block = 1u64 << (32 - view.genesis().block_prefix());
        let owners = view.grants().owners();
        let mut givers: Vec<(u64, NodeId)> =
            owners.iter().map(|(key, owned)| (owned.len(), key.node_id())).collect();
        givers.retain(|(owned, peer)| {
            let reachable = self.gossip.as_ref().is_some_and(|gossip| gossip.is_reachable(peer));
            *owned > block && *peer != self.id && reachable
        });
        // Whoever owns the most is asked first; but which of its blocks it uses only it knows.
        givers.sort_unstable_by_key(|(owned, peer)| (std::cmp::Reverse(*owned), *peer));
        let Some(turn) = self.asked_in_vain.checked_rem(givers.len()) else { return };
        let (_, peer) = givers[turn];
        self.asked_in_vain += 1;
        if !self.dialer.is_waiting(&peer) {
            tracing::debug!(peer = %peer.short(), "asking for addresses");
            self.tell(peer, Message::GrantAsk);
        }
    }

    fn runs_low(&self) -> bool {
        let reserved = self.stored.mesh_ipv4.unwrap_or(Ipv4Addr::UNSPECIFIED);
        let needs_any = self.doubt().is_none() && !self.is_out() && !self.is_leaving();
        needs_any && !self.leases.has_free(LOW_WATER, &self.owned(), reserved)
    }

    pub(super) fn addresses_deadline(&self) -> Option<Time> {
        let asked = self.addresses_asked.unwrap_or(self.now);
        (self.view.is_some() && self.runs_low()).then_some(asked + ASK_EVERY)
    }

    pub(super) fn on_grant_ask(&mut self, peer: NodeId) {
        let mut kept = self.kept_addresses();
        if !self.may_give() || self.is_out() || self.is_leaving() {
            return;
        }
        let Some(view) = &self.view else { return };
        let Some(key) = view.key_of(&peer) else { return };
        // What a member uses only it knows. Who has more than a fair share may have it, but not fast, and not the last
        // that this node could give to one that has less.
        let block = 1u64 << (32 - view.genesis().block_prefix());
        let members = view.admissions().members().count().max(1) as u64;
        let share = (1u64 << (32 - view.genesis().ipv4_range().prefix_len())) / members;
        let theirs = view.grants().owned_by(&key).len();
        let rich = theirs + block > share.max(MIN_SHARE * block);
        let pause = if rich { RICH_PAUSE } else { ASK_EVERY / 2 };
        let again = self.gave.get(&peer).is_some_and(|at| self.now.since(*at) < pause);
        if again || (rich && self.spare_addresses().len() < 2 * block) {
            tracing::debug!(peer = %peer.short(), theirs, "asks for more addresses than it gets");
            return;
        }
        if theirs > 0 {
            self.keep_a_reserve(&mut kept);
        }
        let Some(view) = &mut self.view else { return };
        let Some(grant) = view.grants().grant(&self.identity, key, BLOCKS_PER_REQUEST, &kept) else {
            tracing::debug!(peer = %peer.short(), "asked for addresses, and has none to spare");
            return;
        };
        let now = self.now;
        self.gave.retain(|_, at| now.since(*at) < RICH_PAUSE);
        self.gave.insert(peer, now);
        let delta = Delta { grants: vec![grant], ..Delta::default() };
        for refused in view.merge(&delta).refused {
            tracing::error!(refused, "this node's own grant is refused");
        }
        self.persist(&[StateFile::Cluster], Pending::Granted { delta: Box::new(delta) });
    }

    // Requests.

    pub(super) fn on_request(&mut self, id: RequestId, request: Request) {
        let answer = match request {
            Request::Status => Ok(Response::Status(Box::new(self.status()))),
            Request::Why(request) => self.why(&request).map(|report| Response::Why(Box::new(report))),
            Request::Doctor { look, settings } => Ok(Response::Doctor(Box::new(self.doctor(look, settings)))),
            Request::Ready => self.readiness().map(|_| Response::Done),
            Request::Attach(request) => return self.on_attach(id, request),
            Request::Activate(attachment) => return self.on_activate(id, attachment),
            Request::Get(attachment) => {
                self.attachment(&attachment).map(|a| Response::Attachment(Box::new(a)))
            }
            Request::List => Ok(Response::Attachments(
                self.leases.all().keys().filter_map(|id| self.attachment(id).ok()).collect(),
            )),
            Request::Detach(attachment) => return self.release_all(Some(id), &[attachment], false),
            Request::Gc(request) => return self.on_gc(id, &request),
            Request::Remove(node) => return self.on_remove(id, node),
            Request::Leave(leave) => return self.on_leave(id, leave),
            Request::Declare(delta) => return self.on_declare(id, &delta),
            Request::SetJoinWindow(window) => return self.on_set_join_window(id, window),
            Request::PrepareRemoval(node) => {
                self.removal_plan(&node).map(|plan| Response::RemovalPlan(Box::new(plan)))
            }
            Request::CreateToken(token) => return self.on_create_token(id, &token),
            Request::RevokeToken(token) => return self.on_revoke_token(id, token),
            Request::Tokens => self.token_list().map(Response::Tokens),
            Request::JoinWindow => self.join_window_status().map(Response::JoinWindow),
        };
        self.reply(id, answer);
    }

    pub(super) fn reply(&mut self, id: RequestId, answer: Result<Response, ApiError>) {
        self.emit(super::Output::Reply(id, answer));
    }

    /// The node's own addresses, if an attach can be served.
    pub(super) fn readiness(&self) -> Result<(Ipv4Addr, &crate::view::View), ApiError> {
        let not_ready = |message: String| ApiError::new(ErrorCode::NotReady, message);
        let Some(view) = &self.view else {
            return Err(not_ready(format!(
                "this node is in no cluster yet; it waits for {}",
                self.waiting_for()
            )));
        };
        if let Some(doubt) = self.doubt() {
            return Err(not_ready(doubt.to_owned()));
        }
        if self.is_out() {
            return Err(not_ready(super::removal::REMOVED.to_owned()));
        }
        if self.is_leaving() {
            return Err(not_ready("this node is leaving the cluster".to_owned()));
        }
        if let Some(overlap) = self.kept_out() {
            return Err(not_ready(format!("nothing is set up on this host: {overlap}")));
        }
        let Some(address) = self.stored.mesh_ipv4 else {
            let help = self.what_helps(view);
            return Err(not_ready(format!("this node owns no IPv4 addresses yet; {help}")));
        };
        if self.applied == 0 || self.desired.bridge.is_none() {
            return Err(not_ready("the node's devices are not set up yet".to_owned()));
        }
        let blocking =
            |problem: &&Problem| problem.object == GUARD_OBJECT || problem.object == crate::api::BRIDGE;
        if let Some(problem) = self.problems.iter().find(blocking) {
            return Err(not_ready(format!("{}: {}", problem.object, problem.text)));
        }
        Ok((address, view))
    }

    fn on_attach(&mut self, id: RequestId, request: AttachRequest) {
        let reserved = match self.readiness() {
            Ok((reserved, _)) => reserved,
            Err(error) => return self.reply(id, Err(error)),
        };
        let active = self.leases.is_active(&request.id);
        // A host that lost the device (its container died without a DEL) may attach again, with the same address.
        let host_ifname = request.id.host_ifname();
        if active && !self.problems.iter().any(|problem| problem.object == host_ifname) {
            let error = ApiError::new(
                ErrorCode::Conflict,
                format!("{} is attached already; detach it first", request.id),
            );
            return self.reply(id, Err(error));
        }
        self.vanishing.remove(&request.id);
        let owned = self.owned();
        match self.leases.lease(&request, &owned, reserved, self.now) {
            Ok(_) => self.persist(&[StateFile::Leases], Pending::Leased { request: id, id: request.id }),
            Err(error) => {
                let error = self.exhausted(error);
                tracing::warn!(attachment = %request.id, "{error}");
                self.reply(id, Err(error));
            }
        }
    }

    pub(super) fn leased(&mut self, request: RequestId, id: &AttachmentId) {
        let answer = self.attachment(id).map(|attachment| Response::Attachment(Box::new(attachment)));
        self.reply(request, answer);
    }

    pub(super) fn lease_failed(&mut self, request: RequestId, id: &AttachmentId, error: &str) {
        self.leases.release(id, self.now);
        let message = format!("the lease could not be written to disk, nothing was attached: {error}");
        self.reply(request, Err(ApiError::new(ErrorCode::Internal, message)));
    }

    fn on_activate(&mut self, request: RequestId, id: AttachmentId) {
        if !self.leases.set_state(&id, AttachmentState::Active) {
            let error = ApiError::new(ErrorCode::NotFound, format!("{id} has no lease; attach it first"));
            return self.reply(request, Err(error));
        }
        self.vanishing.remove(&id);
        // On disk before it is in the kernel: a daemon that starts anew must not take the port for a leftover.
        self.persist(&[StateFile::Leases], Pending::Activated { request, id });
    }

    pub(super) fn activated(&mut self, request: RequestId, id: AttachmentId) {
        let revision = self.wanted_revision();
        self.activating.push((request, id, revision));
        self.activations_applied();
    }

    pub(super) fn activation_failed(&mut self, request: RequestId, id: &AttachmentId, error: &str) {
        self.leases.set_state(id, AttachmentState::Leased);
        let message = format!("the attachment could not be written to disk, nothing was changed: {error}");
        self.reply(request, Err(ApiError::new(ErrorCode::Internal, message)));
    }

    pub(super) fn on_applied(&mut self, revision: u64, problems: Vec<Problem>) {
        for problem in problems.iter().filter(|problem| !self.problems.contains(problem)) {
            tracing::warn!(object = problem.object, "{}", problem.text);
        }
        self.applied = self.applied.max(revision);
        if revision == self.revision {
            self.in_kernel = self.desired.clone();
        }
        self.problems = problems;
        self.paths_applied();
        self.pairs_applied();
        self.activations_applied();
    }

    fn activations_applied(&mut self) {
        let applied = self.applied;
        let (ready, waiting): (Vec<_>, Vec<_>) = std::mem::take(&mut self.activating)
            .into_iter()
            .partition(|(_, _, revision)| *revision <= applied);
        self.activating = waiting;
        for (request, id, _) in ready {
            let host_ifname = id.host_ifname();
            let problem = self
                .problems
                .iter()
                .find(|problem| {
                    problem.object == host_ifname
                        || problem.object == GUARD_OBJECT
                        || problem.object == crate::api::BRIDGE
                })
                .map(|problem| problem.text.clone());
            let answer = match problem {
                Some(text) => {
                    self.leases.set_state(&id, AttachmentState::Leased);
                    self.dirty.insert(StateFile::Leases);
                    Err(ApiError::new(
                        ErrorCode::Internal,
                        format!("{id} could not be put on the network: {text}"),
                    ))
                }
                None => self.attachment(&id).map(|attachment| Response::Attachment(Box::new(attachment))),
            };
            self.reply(request, answer);
        }
    }

    fn on_gc(&mut self, request: RequestId, gc: &GcRequest) {
        let stale: Vec<AttachmentId> = self
            .leases
            .all()
            .iter()
            .filter(|(id, lease)| lease.network == gc.network && !gc.valid.contains(id))
            .map(|(id, _)| id.clone())
            .collect();
        self.release_all(Some(request), &stale, true);
    }

    pub(super) fn on_tombstones(&mut self, ids: &[AttachmentId]) {
        if ids.iter().any(|id| self.leases.get(id).is_some()) {
            self.release_all(None, ids, false);
        }
    }

    /// Whether an attachment has an address.
    pub fn has_lease(&self, id: &AttachmentId) -> bool {
        self.leases.get(id).is_some()
    }

    pub(super) fn release_all(&mut self, request: Option<RequestId>, ids: &[AttachmentId], gc: bool) {
        let now = self.now;
        let released: Vec<(AttachmentId, Lease)> =
            ids.iter().filter_map(|id| Some((id.clone(), self.leases.release(id, now)?))).collect();
        if released.is_empty() {
            return self.released(request, released, gc);
        }
        for (id, lease) in &released {
            tracing::info!(attachment = %id, address = %lease.ipv4, "released");
        }
        self.persist(&[StateFile::Leases], Pending::Released { request, leases: released, gc });
    }

    pub(super) fn released(
        &mut self,
        request: Option<RequestId>,
        leases: Vec<(AttachmentId, Lease)>,
        gc: bool,
    ) {
        let Some(request) = request else { return };
        let response = if gc {
            Response::Gc(GcReport { released: leases.into_iter().map(|(id, _)| id).collect() })
        } else {
            Response::Done
        };
        self.reply(request, Ok(response));
    }

    pub(super) fn release_failed(
        &mut self,
        request: Option<RequestId>,
        leases: Vec<(AttachmentId, Lease)>,
        error: &str,
    ) {
        for (id, lease) in leases {
            self.leases.put_back(id, lease);
        }
        if let Some(request) = request {
            let message = format!("the release could not be written to disk, nothing was changed: {error}");
            self.reply(request, Err(ApiError::new(ErrorCode::Internal, message)));
        }
    }

    fn attachment(&self, id: &AttachmentId) -> Result<Attachment, ApiError> {
        let not_found = || ApiError::new(ErrorCode::NotFound, format!("{id} is not attached here"));
        let lease = self.leases.get(id).ok_or_else(not_found)?;
        let (view, gateway_ipv4) = self.view.as_ref().zip(self.stored.mesh_ipv4).ok_or_else(not_found)?;
        let prefix = view.cluster().node_prefix(&self.me, 0);
        Ok(Attachment {
            id: id.clone(),
            state: lease.state,
            netns: lease.netns.clone(),
            network: lease.network.clone(),
            pod: lease.pod.clone(),
            host_ifname: id.host_ifname(),
            mac: lease.mac(),
            ipv4: lease.ipv4,
            ipv6: ipv6_for(prefix, lease.ipv4),
            gateway_ipv4,
            gateway_ipv6: ipv6_for(prefix, gateway_ipv4),
            gateway_mac: self.bridge_mac(),
            cluster_ipv4: view.genesis().ipv4_range(),
            cluster_ipv6: view.genesis().ipv6_range(),
            mtu: self.mtu(),
        })
    }

    /// Ethernet address of the bridge: locally administered, from the node id.
    pub(super) fn bridge_mac(&self) -> MacAddr {
        let id = self.id.as_bytes();
        MacAddr([0x02, id[0], id[1], id[2], id[3], id[4]])
    }
}
