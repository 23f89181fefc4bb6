//! What operators decide: who is removed, when nodes may join, and by which tokens. In a flat cluster the node they ask
//! signs it; in an anchored one they ask it what is to be said, sign with the admin key, and hand that in, as
//! `meshctl` does.

use mesh_core::api::{AttachmentId, JoinWindowStatus, LeaveStatus, NewToken, RemovalPlan};
use mesh_core::node::{Request, Response};
use mesh_core::view::Delta;
use mesh_keys::{
    AdminKey, JoinWindow, NodeId, Signed, SignedJoinPolicy, SignedRemoval, SignedRevocation, Token, TokenId,
};

use crate::dice::Dice;
use crate::pods::Asked;
use crate::settings::Settings;
use crate::world::World;

/// The admin key of the cluster, if it has one.
pub(crate) fn admin_key(settings: &Settings) -> Option<AdminKey> {
    settings.anchored.then(|| AdminKey::generate(Dice::new(settings.seed, 10).rng()))
}

impl World {
    /// The operator of a host removes a member.
    pub(crate) fn ask_removal(&mut self, by: usize, subject: NodeId) {
        self.model.may_go(subject);
        if self.admin.is_some() {
            self.ask(by, Request::PrepareRemoval(subject.to_string()), Asked::RemovalPlan(subject));
        } else {
            self.ask(by, Request::Remove(subject), Asked::Remove(subject));
        }
    }

    /// The operator of a host drains it and has its node leave the cluster.
    pub(crate) fn ask_leave(&mut self, at: usize) {
        let pods: Vec<AttachmentId> = self.hosts[at].pods.keys().cloned().collect();
        pods.iter().for_each(|id| self.delete(at, id, false));
        let id = self.hosts[at].id();
        self.say(format!("host{at} ({}) is to leave", id.short()));
        self.model.may_go(id);
        self.ask(at, Request::Leave(true), Asked::Leave);
    }

    /// What is left for operators to do about nodes that leave. Some stay after all: of those that leave all at once, none
    /// could take the addresses of the others.
    pub(crate) fn see_leaves_through(&mut self, by: usize) {
        for at in 0..self.hosts.len() {
            let Some(leave) = self.hosts[at].node().and_then(|node| node.status().leave) else { continue };
            let (id, stays) = (self.hosts[at].id(), self.dice.chance(2_000));
            match leave {
                LeaveStatus::AddressesGiven if at != by => self.ask_removal(by, id),
                LeaveStatus::Leaving { .. } | LeaveStatus::AddressesGiven if stays => {
                    self.say(format!("host{at} stays after all"));
                    self.ask(at, Request::Leave(false), Asked::Leave);
                }
                LeaveStatus::Leaving { .. } | LeaveStatus::AddressesGiven | LeaveStatus::Left => {}
            }
        }
    }

    /// The operator of a host decides when nodes may join.
    pub(crate) fn ask_join_window(&mut self, by: usize, window: JoinWindow) {
        if self.admin.is_some() {
            self.ask(by, Request::JoinWindow, Asked::JoinWindow(window));
        } else {
            self.ask(by, Request::SetJoinWindow(window), Asked::Decide);
        }
    }

    /// The operator of a host makes a token.
    pub(crate) fn ask_token(&mut self, by: usize, new: NewToken) {
        let Some((view, admin)) = self.view(by).zip(self.admin.as_ref()) else {
            self.ask(by, Request::CreateToken(new), Asked::Decide);
            return;
        };
        let NewToken { id, hash, expires, uses } = new;
        let token = Token { cluster: view.cluster(), id, hash, expires, uses, signer: admin.public() };
        let tokens = Signed::sign(&token, admin.signer()).into_iter().collect();
        self.declare(by, Delta { tokens, ..Delta::default() }, Asked::Decide);
    }

    /// The operator of a host revokes a token.
    pub(crate) fn ask_revocation(&mut self, by: usize, id: TokenId) {
        let Some((view, admin)) = self.view(by).zip(self.admin.as_ref()) else {
            self.ask(by, Request::RevokeToken(id), Asked::Decide);
            return;
        };
        let revocation = SignedRevocation::issue(view.cluster(), id, admin.signer());
        let revocations = revocation.into_iter().collect();
        self.declare(by, Delta { revocations, ..Delta::default() }, Asked::Decide);
    }

    /// The node of a host has said what a removal has to say.
    pub(crate) fn sign_removal(&mut self, by: usize, plan: &RemovalPlan) {
        // The removed node has the key file, too: mostly joining ends with it.
        let close = self.dice.chance(3_000);
        let Some(admin) = &self.admin else { return };
        let (signer, keep) = (admin.signer(), plan.keep.clone());
        let removal =
            SignedRemoval::issue_naming(plan.cluster, plan.subject, plan.heir, keep, &plan.grants, signer);
        let closed = close.then(|| {
            SignedJoinPolicy::issue(plan.cluster, plan.joins.next_serial, JoinWindow::Closed, signer)
        });
        let removal = match removal {
            Ok(removal) => removal,
            Err(error) => return self.say(format!("host{by}: the removal cannot be signed: {error}")),
        };
        let delta = Delta {
            removals: vec![removal],
            policies: closed.into_iter().flatten().collect(),
            ..Delta::default()
        };
        self.declare(by, delta, Asked::Remove(plan.node));
    }

    /// The node of a host has said which serial comes next.
    pub(crate) fn sign_join_window(&mut self, by: usize, status: &JoinWindowStatus, window: JoinWindow) {
        let Some(admin) = &self.admin else { return };
        let policy = SignedJoinPolicy::issue(status.cluster, status.next_serial, window, admin.signer());
        let policies = policy.into_iter().collect();
        self.declare(by, Delta { policies, ..Delta::default() }, Asked::Decide);
    }

    fn declare(&mut self, by: usize, delta: Delta, asked: Asked) {
        self.ask(by, Request::Declare(Box::new(delta)), asked);
    }

    /// A host's answer to what its operator asked before he signs.
    pub(crate) fn prepared(&mut self, by: usize, asked: &Asked, answer: &Response) {
        match (asked, answer) {
            (Asked::RemovalPlan(_), Response::RemovalPlan(plan)) => self.sign_removal(by, plan),
            (Asked::JoinWindow(window), Response::JoinWindow(status)) => {
                self.sign_join_window(by, status, *window);
            }
            _ => {}
        }
    }
}
