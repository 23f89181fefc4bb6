//! What an authority has said, and says: who has to leave, and when others may join.
//!
//! In a flat cluster every member is one and this node signs itself; in an anchored one the statements come signed.

use std::collections::BTreeMap;

use mesh_keys::{IdentityKey, JoinMode, JoinWindow, NodeId, SignedJoinPolicy};

use super::writing::Pending;
use super::{Node, RequestId, Response};
use crate::api::{ApiError, ErrorCode, JoinWindowStatus, RemovalPlan};
use crate::message::RefusalCode;
use crate::state::StateFile;
use crate::view::{Delta, View};

/// Fewest digits that name a node.
const MIN_PREFIX: usize = 8;

/// A tunnel that shook hands within this time carries packets.
const ALIVE_HANDSHAKE: std::time::Duration = std::time::Duration::from_secs(180);

impl Node {
    /// What the host's clock shows now, in seconds since 1970.
    pub(super) fn unix_now(&self) -> Option<u64> {
        let (shown, at) = self.wall_clock?;
        Some(shown.saturating_add(self.now.since(at).as_secs()))
    }

    /// The view, when this node may speak for the cluster.
    pub(super) fn speaker(&self) -> Result<&View, ApiError> {
        let conflict = |message: &str| Err(ApiError::new(ErrorCode::Conflict, message));
        match &self.view {
            None => Err(ApiError::new(ErrorCode::NotReady, "this node is in no cluster yet")),
            Some(_) if self.is_out() => conflict(super::removal::REMOVED),
            // What an operator decides on this host holds also while nobody else can be asked: the last node that is left
            // after a reboot gets out of that by removing the others.
            Some(view) => self.outdated().map_or(Ok(view), conflict),
        }
    }

    /// The view, when this node may sign what only an authority may.
    pub(super) fn signing_speaker(&self) -> Result<&View, ApiError> {
        let view = self.speaker()?;
        if view.genesis().is_flat() {
            Ok(view)
        } else {
            Err(ApiError::new(
                ErrorCode::Forbidden,
                "this cluster has admin keys: one of them has to sign; give the file with --admin-key-file",
            ))
        }
    }

    /// Takes statements of an authority: all of them, or none.
    pub(super) fn on_declare(&mut self, request: RequestId, delta: &Delta) {
        if let Err(error) = self.declare(Some(request), delta) {
            self.reply(request, Err(error));
        }
    }

    /// Likewise; an answer to the request follows, if it is taken.
    pub(super) fn declare(&mut self, request: Option<RequestId>, delta: &Delta) -> Result<(), ApiError> {
        let mut view = self.speaker()?.clone();
        let merged = view.merge(delta);
        if let Some(refused) = merged.refused.into_iter().next() {
            return Err(ApiError::new(ErrorCode::Forbidden, refused));
        }
        if delta.policies.iter().any(|signed| !is_in_force(&view, signed)) {
            let message = "not in force: a join policy with a higher serial is known by now; ask for the join window and sign anew";
            return Err(ApiError::new(ErrorCode::Conflict, message));
        }
        self.view = Some(view);
        if let Some(gossip) = &mut self.gossip {
            merged.gone.iter().for_each(|name| gossip.remove(*name));
        }
        let delta = Box::new(merged.new);
        self.persist(&[StateFile::Cluster], Pending::Declared { request, delta: delta.clone() });
        // Only once it is on disk do others hear of it; here it holds at once. A node that removes itself has to
        // tell them before it takes the consequences.
        if !self.is_out() {
            self.heed_removals(&delta);
            self.settle_addresses();
        }
        Ok(())
    }

    /// What an authority has declared is on disk.
    pub(super) fn declared(&mut self, request: Option<RequestId>, delta: &Delta) {
        self.spread(delta);
        if self.is_out() {
            self.say_now();
            self.heed_removals(delta);
        }
        if let Some(request) = request {
            self.reply(request, Ok(Response::Done));
        }
    }

    pub(super) fn on_set_join_window(&mut self, request: RequestId, window: JoinWindow) {
        let policy = self.signing_speaker().and_then(|view| {
            SignedJoinPolicy::issue(view.cluster(), self.next_policy_serial(view), window, &self.identity)
                .map_err(|error| ApiError::new(ErrorCode::Forbidden, error.to_string()))
        });
        match policy {
            Ok(policy) => self.on_declare(request, &Delta { policies: vec![policy], ..Delta::default() }),
            Err(error) => self.reply(request, Err(error)),
        }
    }

    /// Higher than all that are known, and than those of a while ago that are not known here yet.
    fn next_policy_serial(&self, view: &View) -> u64 {
        view.next_policy_serial().max(self.unix_now().unwrap_or(0))
    }

    /// Whether nodes may join by key file or password now; a sentence for them if not.
    pub(super) fn joins_open(&self) -> Result<(), (RefusalCode, String)> {
        let closed = |why: &str| {
            let how = "; an operator opens it with `meshctl join-window open` on any member";
            Err((RefusalCode::JoinsClosed, format!("joining this cluster is closed{why}{how}")))
        };
        match self.view.as_ref().map_or(JoinWindow::Closed, View::join_window) {
            JoinWindow::Open => Ok(()),
            JoinWindow::Closed => closed(""),
            JoinWindow::Until(end) => match self.unix_now() {
                Some(now) if now < end => Ok(()),
                Some(_) => closed(": the time for it is over"),
                None => closed(": this member does not know the time yet"),
            },
        }
    }

    /// Whether a node that has proved itself in this way is let in: since then the window may have closed, and
    /// others may have used the token.
    pub(super) fn still_admits(&self, mode: JoinMode) -> Result<(), (RefusalCode, String)> {
        match mode {
            JoinMode::Token(id) => self.token_still_valid(&id),
            JoinMode::KeyFile | JoinMode::Password | JoinMode::Other(_) => self.joins_open(),
        }
    }

    /// What the status says when the cluster is not what the operator wanted it to be.
    pub(super) fn authority_problem(&self) -> Option<String> {
        let found = self.view.as_ref()?.genesis().admin_keys();
        let wanted = &self.config.admin_keys;
        if wanted.is_empty() || wanted.iter().all(|key| found.contains(key)) {
            return None;
        }
        let what = if found.is_empty() { "is flat" } else { "has other admin keys" };
        Some(format!(
            "--admin-key is given, but this cluster {what}: only its founder's --admin-key counts, and a cluster keeps the keys it was founded with"
        ))
    }

    pub(super) fn join_window_status(&self) -> Result<JoinWindowStatus, ApiError> {
        let view = self.speaker()?;
        Ok(JoinWindowStatus {
            cluster: view.cluster(),
            admin_keys: view.genesis().admin_keys().to_vec(),
            window: view.join_window(),
            open: self.joins_open().is_ok(),
            signer: view.join_policy().map(|policy| policy.signer),
            next_serial: self.next_policy_serial(view),
        })
    }

    /// What the removal of the node called `text` has to say.
    pub(super) fn removal_plan(&self, text: &str) -> Result<RemovalPlan, ApiError> {
        let joins = self.join_window_status()?;
        let view = self.speaker()?;
        let node = resolve(view, text)?;
        let (subject, heir, keep) = view
            .prepare_removal(&node, &self.me)
            .map_err(|error| ApiError::new(ErrorCode::Conflict, error.to_string()))?;
        Ok(RemovalPlan {
            cluster: view.cluster(),
            admin_keys: view.genesis().admin_keys().to_vec(),
            node,
            name: view.record(&node).map(|record| record.name.clone()),
            this_node: node == self.id,
            alive: self.sign_of_life(view, &node),
            knows_join_secret: view.admissions().knows_join_secret(&subject),
            subject,
            heir,
            keep,
            grants: view.grants().worth_naming(&subject),
            joins,
        })
    }

    fn sign_of_life(&self, view: &View, node: &NodeId) -> Option<String> {
        if *node == self.id {
            return Some("it is the node of this daemon".to_owned());
        }
        if self.session_with(node).is_some() {
            return Some("there is a control session with it".to_owned());
        }
        let lanes = &view.record(node)?.lanes;
        let age = lanes.iter().filter_map(|lane| self.tunnels.get(&lane.key)?.handshake_age).min()?;
        (age < ALIVE_HANDSHAKE).then(|| format!("its tunnel shook hands {} s ago", age.as_secs()))
    }
}

fn is_in_force(view: &View, signed: &SignedJoinPolicy) -> bool {
    signed.decode().is_ok_and(|policy| view.join_policy() == Some(&policy))
}

/// The node that `text` names: an id, the first digits of one, or a label.
pub(super) fn resolve(view: &View, text: &str) -> Result<NodeId, ApiError> {
    let is_id = text.len() >= MIN_PREFIX && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    let name = |id: &NodeId| view.record(id).map(|record| record.name.as_str());
    let prefix = text.to_ascii_lowercase();
    let known: BTreeMap<NodeId, IdentityKey> = view.not_removed();
    let fits = |id: &&NodeId| (is_id && id.to_string().starts_with(&prefix)) || name(id) == Some(text);
    let fitting: Vec<&NodeId> = known.keys().filter(fits).collect();
    match fitting.as_slice() {
        [one] => Ok(**one),
        [] => {
            let hint = if is_id || text.bytes().any(|byte| !byte.is_ascii_hexdigit()) {
                "`meshctl status peers` lists the nodes"
            } else {
                "an id needs at least 8 digits"
            };
            Err(ApiError::new(ErrorCode::NotFound, format!("no node is called {text:?}; {hint}")))
        }
        several => {
            let list: Vec<String> =
                several.iter().map(|id| format!("{} {id}", name(id).unwrap_or("(no name)"))).collect();
            let message =
                format!("{text:?} names {} nodes; give the id of one: {}", list.len(), list.join(", "));
            Err(ApiError::new(ErrorCode::Ambiguous, message))
        }
    }
}
