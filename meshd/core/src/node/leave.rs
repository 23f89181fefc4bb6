//! Leaving: the node gives all its addresses to another member, by its own signature, and in a flat cluster then removes
//! itself. In an anchored one an admin key has to say the last word.
//!
//! It is decided once, and durable: a node that was killed meanwhile goes on leaving. Every step follows from what is there.

use std::time::Duration;

use mesh_keys::{IdentityKey, NodeId};

use super::writing::Pending;
use super::{Node, RequestId, Response};
use crate::api::{ApiError, BRIDGE, ErrorCode, LeaveStatus};
use crate::leases::QUARANTINE;
use crate::state::StateFile;
use crate::time::Time;
use crate::view::Delta;

/// What a node that leaves has done since it decided so, or since it started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Leave {
    /// By then its own address and those of its pods have rested.
    gives_from: Time,
    /// When it gave addresses last.
    gave: Time,
    /// Whom it gave them to.
    heir: Option<IdentityKey>,
}

impl Leave {
    pub(super) fn new(now: Time) -> Self {
        Self { gives_from: now + QUARANTINE, gave: now, heir: None }
    }
}

/// Most grants written at once; one conveys a range of any size.
const GRANTS_AT_ONCE: usize = 64;

/// By then the members that can be reached have heard of a grant. Who hears of the removal first has to wait for the
/// promises of all others before it may use what the grant gives it.
const HEARD: Duration = Duration::from_secs(3);

/// Pause between two looks at what a leave waits for.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

impl Node {
    /// Whether the operator has decided that this node leaves.
    pub(super) fn is_leaving(&self) -> bool {
        self.leave.is_some()
    }

    /// The operator decides that this node leaves the cluster, or that it stays after all.
    pub(super) fn on_leave(&mut self, request: RequestId, leave: bool) {
        let refusal = if leave { self.cannot_leave() } else { self.speaker().err() };
        if let Some(error) = refusal {
            return self.reply(request, Err(error));
        }
        if leave == self.is_leaving() {
            return self.reply(request, Ok(Response::Done));
        }
        self.set_leaving(leave);
        self.persist(&[StateFile::Node, StateFile::Leases], Pending::Decided { request, leave });
    }

    fn set_leaving(&mut self, leave: bool) {
        self.stored.leaving = leave;
        self.leave = leave.then(|| Leave::new(self.now));
        if leave {
            self.stored.mesh_ipv4 = None;
        }
        self.stale = true;
        self.dirty.insert(StateFile::Node);
        self.refresh_record();
    }

    /// Whether the node leaves, or stays, is not on disk: it does as before. An address that it has given up is not its own
    /// any more, but others of its range may be.
    pub(super) fn decision_failed(&mut self, request: RequestId, leave: bool, error: &str) {
        self.set_leaving(!leave);
        let message = format!("it could not be written to disk, nothing was changed: {error}");
        self.reply(request, Err(ApiError::new(ErrorCode::Internal, message)));
    }

    fn cannot_leave(&self) -> Option<ApiError> {
        let view = match self.speaker() {
            Ok(view) => view,
            Err(error) => return Some(error),
        };
        let conflict = |message: String| Some(ApiError::new(ErrorCode::Conflict, message));
        if let Some(doubt) = self.doubt() {
            return Some(ApiError::new(ErrorCode::NotReady, doubt));
        }
        if let Some(first) = self.leases.all().keys().next() {
            let number = self.leases.all().len();
            return conflict(format!(
                "{number} {} attached here, {first} among them: drain the host first",
                if number == 1 { "pod is" } else { "pods are" }
            ));
        }
        if view.admissions().members().count() < 2 {
            return conflict(
                "it is the only member of this cluster: stop meshd and remove its state directory".to_owned(),
            );
        }
        if self.heir().is_none() {
            return conflict(format!(
                "no other member that stays can be reached, and one has to take over the addresses: is port {} open between the hosts, UDP and TCP, and does meshd run there?",
                self.config.control_port
            ));
        }
        None
    }

    /// Who gets the addresses: the first member that can be reached and stays.
    fn heir(&self) -> Option<IdentityKey> {
        let view = self.view.as_ref()?;
        let fits = |id: &NodeId| {
            *id != self.id
                && self.is_reachable(id)
                && view.record(id).is_some_and(|record| !record.leaving && !record.contested)
        };
        view.admissions().members().find(|(id, _)| fits(id)).map(|(_, key)| *key)
    }

    /// What the next step waits for, in a sentence.
    fn leave_waits_for(&self, leave: &Leave) -> Option<String> {
        if let Some(doubt) = self.doubt() {
            return Some(doubt.to_owned());
        }
        if let Some(first) = self.leases.all().keys().next() {
            return Some(format!("the pod {first} to be detached"));
        }
        let rest = self.leases.longest_rest(self.now).max(leave.gives_from.since(self.now));
        if !rest.is_zero() {
            return Some(format!("its last addresses to rest for {} s more", rest.as_secs_f64().ceil()));
        }
        // After a start nothing is known of the kernel before a state was applied, and none has the bridge.
        let trouble = self.problems.iter().any(|problem| problem.object == BRIDGE);
        let may_be_there = self.applied == 0 || self.in_kernel.bridge.is_some() || trouble;
        if may_be_there && self.kept_out().is_none() {
            return Some(format!("{BRIDGE} and its address to be taken away"));
        }
        if self.has_unsaid() {
            return Some("the disk".to_owned());
        }
        if self.heir().is_none() {
            return Some("another member that can be reached, to take over the addresses".to_owned());
        }
        None
    }

    /// Whether the decision, or a grant, is not on disk yet.
    fn has_unsaid(&self) -> bool {
        let decides = |pending: &Pending| matches!(pending, Pending::Decided { .. });
        !self.unsaid.is_empty()
            || self.being_written().any(|delta| !delta.grants.is_empty())
            || self.pending.values().any(decides)
    }

    /// Takes the next step, if it is time.
    pub(super) fn advance_leave(&mut self) {
        let Some(leave) = self.leave.filter(|_| self.view.is_some() && !self.is_out()) else { return };
        if self.leave_waits_for(&leave).is_some() || !self.may_give() {
            return;
        }
        if !self.owned().is_empty() {
            return self.give_all();
        }
        if self.now.since(leave.gave) >= HEARD {
            self.sign_off(leave.heir);
        }
    }

    pub(super) fn leave_deadline(&self) -> Option<Time> {
        let leave = self.leave.filter(|_| !self.is_out())?;
        Some(leave.gives_from.max(self.now + LOOK_AGAIN))
    }

    fn give_all(&mut self) {
        let (give, Some(heir)) = (self.owned(), self.heir()) else { return };
        let Some(view) = &mut self.view else { return };
        // What it owns and may not use waits for others' promises, and goes the way of what a removed node had.
        let mut keep = view.grants().owned_by(&self.me);
        keep.subtract(&give);
        let mut delta = Delta::default();
        while delta.grants.len() < GRANTS_AT_ONCE
            && let Some(grant) = view.grants().grant(&self.identity, heir, u32::MAX, &keep)
        {
            let one = Delta { grants: vec![grant], ..Delta::default() };
            let merged = view.merge(&one);
            if let Some(refused) = merged.refused.into_iter().next() {
                tracing::error!(refused, "this node's own grant is refused");
                break;
            }
            delta.append(merged.new);
        }
        if delta.is_empty() {
            return;
        }
        tracing::info!(to = %heir.node_id().short(), grants = delta.grants.len(), "gave its addresses away to leave");
        self.leave = self.leave.map(|leave| Leave { gave: self.now, heir: Some(heir), ..leave });
        self.stale = true;
        self.persist(&[StateFile::Cluster], Pending::Granted { delta: Box::new(delta) });
    }

    /// The last word in a flat cluster: the node removes itself.
    fn sign_off(&mut self, heir: Option<IdentityKey>) {
        let Some(view) = self.view.as_ref().filter(|view| view.genesis().is_flat()) else { return };
        let Some(heir) = heir.or_else(|| self.heir()) else { return };
        let signed = view.departure(&self.identity, &heir).map_err(|error| error.to_string());
        let done = signed.and_then(|removal| {
            let delta = Delta { removals: vec![removal], ..Delta::default() };
            self.declare(None, &delta).map_err(|error| error.to_string())
        });
        if let Err(error) = done {
            tracing::error!(error, "this node cannot sign that it leaves");
        }
    }

    /// How far a leave is.
    pub(super) fn leave_status(&self) -> Option<LeaveStatus> {
        let leave = self.leave.as_ref()?;
        let view = self.view.as_ref()?;
        if self.is_out() {
            return Some(LeaveStatus::Left);
        }
        if let Some(waiting_for) = self.leave_waits_for(leave) {
            return Some(LeaveStatus::Leaving { waiting_for });
        }
        if view.genesis().is_flat() || !self.owned().is_empty() {
            let waiting_for = "the other members to hear of it".to_owned();
            return Some(LeaveStatus::Leaving { waiting_for });
        }
        Some(LeaveStatus::AddressesGiven)
    }

    /// What the status says to who did not ask for it.
    pub(super) fn leave_problem(&self) -> Option<String> {
        match self.leave_status()? {
            LeaveStatus::Leaving { waiting_for } => {
                Some(format!("this node is leaving the cluster, and waits for {waiting_for}"))
            }
            LeaveStatus::AddressesGiven => Some(format!(
                "this node is leaving the cluster: its addresses are in other hands, and an admin key has to sign its removal: `meshctl remove {} --admin-key-file FILE` on any member",
                self.id
            )),
            LeaveStatus::Left => None,
        }
    }
}
