//! Founding a cluster, joining one, and letting others join.
//!
//! # Who founds
//!
//! A node without seeds founds at once. With seeds, only the node whose own address stands first in the list
//! may, and only when every other seed turns out to have no cluster: it asks them first, for at most
//! [`ASK_SEEDS`]. A seed that has a cluster but refuses us stops it for good: better to wait and say so than to
//! make a second cluster. All others wait, and say for what.
//!
//! # Called by a member
//!
//! A member that nobody can call, behind a NAT, calls its own seeds. Who has a key file joins then, too
//! ([`Node::joins_when_called`]). Until the caller has proved that it has the key, its call keeps this node from nothing:
//! neither from joining by a call of its own, nor from founding.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::Duration;

use mesh_keys::password::{PasswordClient, PasswordContext, PasswordError, PasswordServer};
use mesh_keys::{Genesis, GenesisFields, JoinMode, JoinModes, SignedAdmission};
use zeroize::Zeroizing;

use super::dial::SeedOutcome;
use super::sessions::Phase;
use super::writing::Pending;
use super::{JoinSecret, Node, Output, SessionId};
use crate::message::{Hello, Message, PROTOCOL, RefusalCode};
use crate::state::{self, StateFile};
use crate::time::Time;
use crate::view::{Delta, View};

/// How long a node that may found a cluster waits for an answer of the other seeds.
const ASK_SEEDS: Duration = Duration::from_secs(3);

/// Wrong keys that a sponsor hears within [`WRONG_KEYS_WINDOW`] before it makes everyone wait.
const MAX_WRONG_KEYS: usize = 60;

/// See [`MAX_WRONG_KEYS`].
const WRONG_KEYS_WINDOW: Duration = Duration::from_secs(60);

/// What is said to a node that joins and has been a member.
const KNOWN: &str = "a node with this identity is a member already, and what this one has been is not on its disk: it was lost, or the disk was copied; remove the state directory, identity and all, and it joins as a new node";

/// Most blocks that a joining node gets at once.
const FIRST_BLOCKS_MAX: u64 = 64;

/// Most items of a view that a joining node takes: all that the sets of a view can hold.
const WELCOME_ITEMS_MAX: usize = 1 << 20;

/// Most items and bytes in a part of a welcome.
const PART_ITEMS: usize = 4096;
const PART_BYTES: usize = 256 << 10;

/// Parts of a welcome that are on their way at a time: as much as a way of 100 ms and 40 Mbit/s holds, and far less than
/// may wait to be sent.
const PARTS_AHEAD: usize = 4;

/// Most nodes that are told a long history at a time.
const MAX_WELCOMING: usize = 8;

/// The way into a cluster.
#[derive(Debug, Default)]
pub(super) struct Join {
    /// The session through which this node joins at present.
    current: Option<SessionId>,
    /// The cluster is being written to disk.
    storing: bool,
    /// Why the last try failed.
    last_failure: Option<String>,
    /// When others have come with wrong keys.
    wrong_keys: Vec<Time>,
    serial: u64,
    /// The view of the member that welcomes us, as far as it has arrived.
    parts: Delta,
}

/// How far joining through a session has come.
pub(super) enum Joining {
    /// There is a cluster; our turn has not come.
    Ready,
    /// Our key proof is out.
    KeySent,
    /// Our first OPAQUE message is out.
    PasswordSent(Box<PasswordClient>),
    /// Our last OPAQUE message is out.
    PasswordFinished,
    /// We have a token, and the sponsor is to prove itself.
    TokenAsked,
    /// Our token is out.
    TokenSent,
    /// Both ends have proved themselves; we asked to be let in.
    Asked,
}

/// How far letting a node in has come.
pub(super) enum Sponsoring {
    /// The ways to join are told.
    Offered,
    /// Our OPAQUE answer is out.
    Password(Box<PasswordServer>),
    /// We have proved to be a member to a node with a token.
    TokenProved,
    /// The node has proved itself.
    Proven(JoinMode),
    /// Its admission is on its way, behind these parts of the view.
    Welcoming(VecDeque<Delta>),
    /// Its admission is being written to disk, or was sent.
    Welcomed,
}

impl Node {
    pub(super) fn advance_join(&mut self) {
        if self.view.is_some() || self.join.storing || self.refused {
            return;
        }
        if self.may_found() {
            return self.found();
        }
        if self.join.current.is_none() {
            let ready = self
                .sessions
                .iter()
                .find(|(_, session)| matches!(session.phase, Phase::Joining(Joining::Ready)))
                .map(|(id, _)| *id);
            if let Some(session) = ready {
                self.join.current = Some(session);
                self.prove(session);
            }
        }
    }

    pub(super) fn join_deadline(&self) -> Option<Time> {
        (self.view.is_none() && self.own_seed_is_first())
            .then_some(self.started + ASK_SEEDS)
            .filter(|at| *at > self.now)
    }

    /// What the node waits for, in a sentence.
    pub(super) fn waiting_for(&self) -> String {
        if self.host.is_none() {
            return "the kernel to tell the addresses and routes of this host".to_owned();
        }
        if self.join.storing {
            return "the disk: the cluster is being written".to_owned();
        }
        if self.join.current.is_some() {
            return "a member's answer: joining is under way".to_owned();
        }
        let mut parts: Vec<String> = self
            .seed_outcomes()
            .into_iter()
            .map(|(address, outcome)| match outcome {
                SeedOutcome::Unknown => format!("{address}: no answer yet"),
                SeedOutcome::Absent(reason) => format!("{address}: {reason}"),
                SeedOutcome::Refused(reason) => format!("{address} has a cluster, but: {reason}"),
            })
            .collect();
        parts.extend(
            self.config
                .seeds
                .iter()
                .filter(|seed| seed.addresses.is_empty())
                .map(|seed| format!("{}: name does not resolve", seed.text)),
        );
        if let Some(failure) = &self.join.last_failure {
            parts.push(failure.clone());
        }
        let who = match self.config.seeds.first() {
            _ if matches!(self.config.secret, JoinSecret::Token(_)) => {
                "a member among the --join addresses; a host with a token founds no cluster".to_owned()
            }
            Some(first) if !self.own_seed_is_first() => {
                format!(
                    "a member among the --join addresses; only {}, the first of them, may found a cluster",
                    first.text
                )
            }
            _ => "the other --join addresses to say that they have no cluster".to_owned(),
        };
        if parts.is_empty() { who } else { format!("{who} ({})", parts.join("; ")) }
    }

    fn own_seed_is_first(&self) -> bool {
        self.config
            .seeds
            .first()
            .is_some_and(|seed| seed.addresses.iter().any(|address| self.is_own(address)))
    }

    fn may_found(&self) -> bool {
        // Its range must be free on this host.
        if self.host.is_none() {
            return false;
        }
        if matches!(self.config.secret, JoinSecret::Token(_) | JoinSecret::None) {
            return false;
        }
        if self.config.seeds.is_empty() {
            return true;
        }
        if !self.own_seed_is_first() || self.join.current.is_some() {
            return false;
        }
        let outcomes = self.seed_outcomes();
        if outcomes.iter().any(|(_, outcome)| matches!(outcome, SeedOutcome::Refused(_)))
            || self
                .sessions
                .values()
                .any(|session| session.way.is_dialled() && matches!(session.phase, Phase::Joining(_)))
        {
            return false;
        }
        let unresolved = self.config.seeds.iter().any(|seed| seed.addresses.is_empty());
        let all_absent = outcomes.iter().all(|(_, outcome)| matches!(outcome, SeedOutcome::Absent(_)));
        (all_absent && !unresolved) || self.now.since(self.started) >= ASK_SEEDS
    }

    fn found(&mut self) {
        let modes = match self.config.secret {
            JoinSecret::Key(_) => JoinModes::KEY_FILE,
            JoinSecret::Password { .. } => JoinModes::PASSWORD,
            JoinSecret::Token(_) | JoinSecret::None => return,
        };
        let mut fields = GenesisFields::flat(&self.config.cluster_name, self.me, modes, &mut self.rng);
        fields.ipv4_range = self.config.ipv4_range;
        fields.block_prefix = self.config.block_prefix;
        fields.admin_keys = self.config.admin_keys.clone();
        match Genesis::new(fields) {
            Ok(genesis) => {
                if let Some(reason) = self.founding_overlap(&genesis) {
                    return self.refuse_host(reason);
                }
                tracing::info!(cluster = %genesis.id().short(), name = genesis.name(), ipv4 = %genesis.ipv4_range(), ipv6 = %genesis.ipv6_range(), admin_keys = genesis.admin_keys().len(), "founding a cluster");
                self.store_membership(View::new(genesis), None);
            }
            Err(error) => {
                // The configuration was checked at start: only a mistake of ours leads here.
                tracing::error!(%error, "the genesis document cannot be made");
                self.join.last_failure = Some(error.to_string());
            }
        }
    }

    fn store_membership(&mut self, view: View, sponsor: Option<SessionId>) {
        self.join.storing = true;
        let bytes = Zeroizing::new(state::encode_cluster(&view));
        self.persist_bytes(
            vec![(StateFile::Cluster, bytes)],
            Pending::Member { view: Box::new(view), sponsor },
        );
    }

    /// The cluster is on disk: this node belongs to it from now on.
    pub(super) fn become_member(&mut self, mut view: View, sponsor: Option<SessionId>) {
        tracing::info!(cluster = %view.cluster().short(), name = view.genesis().name(), members = view.records().count() + 1, "member of the cluster");
        self.join.storing = false;
        self.join.current = None;
        view.drop_news(view.merged_so_far());
        self.view = Some(view);
        if sponsor.is_none() {
            self.make_group_key();
        }
        self.start_gossip();
        if let Some(problem) = self.authority_problem() {
            tracing::warn!("{problem}");
        }
        self.check_overlap();
        self.assign_address();
        self.refresh_record();
        let others: Vec<SessionId> = self
            .sessions
            .iter()
            .filter(|(id, session)| {
                Some(**id) != sponsor && matches!(session.phase, Phase::Joining(_) | Phase::Greeting)
            })
            .map(|(id, _)| *id)
            .collect();
        for session in others {
            self.close(session, "joined through another member");
        }
        self.dialer.reset_backoff();
        let Some(session) = sponsor else { return };
        let Some((record, view)) =
            self.view.as_ref().and_then(|view| Some((view.signed_record(&self.id)?, view)))
        else {
            return;
        };
        let hello = Hello::Member {
            protocol: PROTOCOL,
            cluster: view.cluster(),
            chain: self.own_chain(view),
            record: Box::new(record.clone()),
        };
        self.send(session, &Message::Hello(Box::new(hello)));
        self.enter_membership(session);
    }

    pub(super) fn join_failed(&mut self, sponsor: Option<SessionId>, error: &str) {
        self.join.storing = false;
        self.join.current = None;
        self.join.last_failure = Some(format!("the cluster could not be written to disk: {error}"));
        if let Some(session) = sponsor {
            self.close(session, "the cluster could not be written to disk");
        }
    }

    /// A session through which this node wanted to join is gone.
    pub(super) fn join_session_gone(
        &mut self,
        session: SessionId,
        dialled: Option<SocketAddr>,
        reason: &str,
    ) {
        if self.join.current == Some(session) && !self.join.storing {
            self.join.current = None;
            if let Some(target) = dialled {
                self.join.last_failure = Some(format!("{target}: {reason}"));
            }
        }
    }

    pub(super) fn join_refused(&mut self, session: SessionId, code: RefusalCode, reason: &str) {
        let Some(entry) = self.sessions.get(&session) else { return };
        if matches!(entry.phase, Phase::Sponsoring(_)) && code == RefusalCode::WrongPassword {
            tracing::warn!(remote = %entry.way, node = %entry.peer_id.short(), "a node tried to join with a wrong password");
        }
        if self.join.current == Some(session) {
            self.join.last_failure = Some(format!("{}: {reason}", entry.way));
        }
    }

    // The joining end.

    /// Whether this node may join through a session that the other end opened, which can be anybody. Nobody guesses the
    /// 256 bits of a key file; but each session could be a guess of the password, and tokens are for those whose address the
    /// operator has given.
    pub(super) fn joins_when_called(&self) -> bool {
        matches!(self.config.secret, JoinSecret::Key(_))
    }

    pub(super) fn on_join_offer(&mut self, session: SessionId, key: bool, password: bool) {
        let called = self.sessions.get(&session).is_none_or(|entry| !entry.way.is_dialled());
        if self.view.is_some() || (called && !self.joins_when_called()) {
            return self.refuse(session, RefusalCode::Protocol, "a join offer does not belong here");
        }
        let theirs = match (key, password) {
            (true, _) => "a key file",
            (false, true) => "a password",
            (false, false) => "tokens only, as it came by one itself",
        };
        let (fits, ours) = match &self.config.secret {
            JoinSecret::Key(_) => (key, "a key file"),
            JoinSecret::Password { .. } => (password, "a password"),
            JoinSecret::Token(_) => (true, "a token"),
            JoinSecret::None => (false, "no secret to join with"),
        };
        if !fits {
            let reason = format!("this node has {ours}, but the member admits by {theirs}");
            tracing::warn!("{reason}");
            return self.refuse(session, RefusalCode::WrongMethod, &reason);
        }
        if called {
            return self.prove(session);
        }
        self.set_phase(session, Phase::Joining(Joining::Ready));
    }

    fn prove(&mut self, session: SessionId) {
        let Some(entry) = self.sessions.get(&session) else { return };
        let (binding, sponsor) = (entry.secrets.join_binding, entry.peer);
        let (message, phase) = match &self.config.secret {
            JoinSecret::Key(key) => {
                (Message::JoinKey { proof: key.client_proof(&binding, &self.me, &sponsor) }, Joining::KeySent)
            }
            JoinSecret::Password { password, .. } => match PasswordClient::start(password, &mut self.rng) {
                Ok((client, request)) => {
                    (Message::JoinPassword { request }, Joining::PasswordSent(Box::new(client)))
                }
                Err(error) => return self.refuse(session, RefusalCode::Protocol, &error.to_string()),
            },
            JoinSecret::Token(token) => (Message::TokenAsk { cluster: token.cluster }, Joining::TokenAsked),
            JoinSecret::None => return,
        };
        self.set_phase(session, Phase::Joining(phase));
        self.send(session, &message);
    }

    pub(super) fn on_joining(&mut self, session: SessionId, message: Message) {
        let Some(entry) = self.sessions.get_mut(&session) else { return };
        let (binding, sponsor, remote) = (entry.secrets.join_binding, entry.peer, entry.way);
        let Phase::Joining(joining) = &mut entry.phase else { return };
        match (std::mem::replace(joining, Joining::Asked), message) {
            (Joining::KeySent, Message::JoinKeyOk { proof }) => {
                let JoinSecret::Key(key) = &self.config.secret else { return };
                match key.verify_server_proof(&binding, &self.me, &sponsor, &proof) {
                    Ok(()) if self.join.current.is_some_and(|current| current != session) => {
                        self.close(session, "joining through another member");
                    }
                    Ok(()) => {
                        self.join.current = Some(session);
                        self.ask(session);
                    }
                    Err(error) => {
                        tracing::warn!(%remote, "cannot join through {remote}: {error}");
                        self.refuse(session, RefusalCode::WrongKey, &error.to_string());
                    }
                }
            }
            (Joining::PasswordSent(client), Message::JoinPasswordAnswer { response }) => {
                let context = PasswordContext { binding: &binding, joiner: &self.me, sponsor: &sponsor };
                match client.finish(&response, &context, &mut self.rng) {
                    Ok((finalization, _)) => {
                        self.set_phase(session, Phase::Joining(Joining::PasswordFinished));
                        self.send(session, &Message::JoinPasswordFinish { finalization });
                    }
                    Err(error) => {
                        tracing::warn!(%remote, "cannot join through {remote}: {error}");
                        self.refuse(session, password_code(&error), &error.to_string());
                    }
                }
            }
            (Joining::PasswordFinished, Message::JoinPasswordOk)
            | (Joining::TokenSent, Message::JoinTokenOk) => self.ask(session),
            (Joining::TokenAsked, Message::TokenProof { genesis, chain }) => {
                self.on_token_proof(session, &genesis, chain);
            }
            (Joining::Asked, Message::WelcomePart { view }) => {
                if view.is_empty() || self.join.parts.len() + view.len() > WELCOME_ITEMS_MAX {
                    return self.refuse(
                        session,
                        RefusalCode::Protocol,
                        "its view has an empty part, or more items than any cluster",
                    );
                }
                self.join.parts.append(view);
                self.send(session, &Message::WelcomeNext);
            }
            (Joining::Asked, Message::Welcome { genesis, view }) => {
                let mut all = std::mem::take(&mut self.join.parts);
                all.append(view);
                self.on_welcome(session, &genesis, &all);
            }
            (_, message) => {
                let reason = format!("a {} does not belong here", message.kind());
                self.refuse(session, RefusalCode::Protocol, &reason);
            }
        }
    }

    fn ask(&mut self, session: SessionId) {
        self.set_phase(session, Phase::Joining(Joining::Asked));
        self.join.parts = Delta::default();
        // The member has proved itself; its welcome may be long.
        self.emit(Output::Trust { session });
        self.send(session, &Message::JoinAsk);
    }

    fn on_welcome(&mut self, session: SessionId, genesis: &[u8], delta: &Delta) {
        if self.join.storing || self.view.is_some() {
            return self.close(session, "joined already");
        }
        let genesis = match Genesis::decode(genesis) {
            Ok(genesis) => genesis,
            Err(error) => {
                return self.refuse(
                    session,
                    RefusalCode::Protocol,
                    &format!("its genesis document: {error}"),
                );
            }
        };
        let mut view = View::new(genesis);
        let refused = view.merge(delta).refused;
        if !view.admissions().contains(&self.me) {
            let why = refused.into_iter().next().unwrap_or_default();
            return self.refuse(
                session,
                RefusalCode::Protocol,
                &format!("its welcome does not admit this node ({why})"),
            );
        }
        if view.record(&self.id).is_some() {
            return self.refuse(session, RefusalCode::Known, KNOWN);
        }
        let promises = view.promise_as_newcomer(&self.identity).into_iter().collect();
        view.merge(&Delta { promises, ..Delta::default() });
        self.store_membership(view, Some(session));
    }

    // The admitting end.

    pub(super) fn start_sponsoring(&mut self, session: SessionId, name: &str) {
        if let Some(doubt) = self.doubt() {
            return self.refuse(session, RefusalCode::Busy, &format!("it admits nobody: {doubt}"));
        }
        let peer = self.sessions.get(&session).map(|entry| entry.peer);
        if let (Some(view), Some(peer)) = (&self.view, peer)
            && view.admissions().was_admitted(&peer)
            && !view.admissions().contains(&peer)
        {
            return self.refuse(session, RefusalCode::Removed, super::removal::REMOVED);
        }
        if let (Some(view), Some(peer)) = (&self.view, peer)
            && view.record(&peer.node_id()).is_some()
        {
            return self.refuse(session, RefusalCode::Known, KNOWN);
        }
        let name: String = name.chars().filter(|c| !c.is_control()).take(64).collect();
        if let Some(entry) = self.sessions.get(&session) {
            tracing::debug!(remote = %entry.way, node = %entry.peer_id.short(), name, "a node wants to join");
        }
        self.set_phase(session, Phase::Sponsoring(Sponsoring::Offered));
        let key = matches!(self.config.secret, JoinSecret::Key(_));
        let password = matches!(self.config.secret, JoinSecret::Password { .. });
        self.send(session, &Message::JoinOffer { key, password });
    }

    pub(super) fn on_sponsoring(&mut self, session: SessionId, message: Message) {
        let Some(entry) = self.sessions.get_mut(&session) else { return };
        let (binding, joiner, remote) = (entry.secrets.join_binding, entry.peer, entry.way);
        let Phase::Sponsoring(sponsoring) = &mut entry.phase else { return };
        match (std::mem::replace(sponsoring, Sponsoring::Welcomed), message) {
            (Sponsoring::Offered, Message::JoinKey { proof }) => {
                let JoinSecret::Key(key) = &self.config.secret else {
                    return self.refuse(
                        session,
                        RefusalCode::WrongMethod,
                        "this member does not admit by key file",
                    );
                };
                let now = self.now;
                self.join.wrong_keys.retain(|at| now.since(*at) < WRONG_KEYS_WINDOW);
                if self.join.wrong_keys.len() >= MAX_WRONG_KEYS {
                    return self.refuse(
                        session,
                        RefusalCode::Busy,
                        "too many wrong keys; try again in a minute",
                    );
                }
                if let Err((code, reason)) = self.joins_open() {
                    return self.refuse(session, code, &reason);
                }
                match key.verify_client_proof(&binding, &joiner, &self.me, &proof) {
                    Ok(()) => {
                        let proof = key.server_proof(&binding, &joiner, &self.me);
                        self.set_phase(session, Phase::Sponsoring(Sponsoring::Proven(JoinMode::KeyFile)));
                        self.send(session, &Message::JoinKeyOk { proof });
                    }
                    Err(_) => {
                        self.join.wrong_keys.push(now);
                        tracing::warn!(%remote, node = %joiner.node_id().short(), "a node tried to join with a wrong key");
                        self.refuse(
                            session,
                            RefusalCode::WrongKey,
                            "the join key is wrong: start the node with the key file of this cluster",
                        );
                    }
                }
            }
            (Sponsoring::Offered, Message::JoinPassword { request }) => {
                if let Err((code, reason)) = self.joins_open() {
                    return self.refuse(session, code, &reason);
                }
                if matches!(self.config.secret, JoinSecret::Password { .. })
                    && let Err(wait) = self.begin_try(session)
                {
                    let seconds = wait.as_secs() + 1;
                    let reason = format!("too many tries to join by password; try again in {seconds} s");
                    return self.refuse(session, RefusalCode::Busy, &reason);
                }
                let JoinSecret::Password { record, .. } = &self.config.secret else {
                    return self.refuse(
                        session,
                        RefusalCode::WrongMethod,
                        "this member does not admit by password",
                    );
                };
                let context = PasswordContext { binding: &binding, joiner: &joiner, sponsor: &self.me };
                match PasswordServer::respond(record, &request, &context, &mut self.rng) {
                    Ok((server, response)) => {
                        self.set_phase(session, Phase::Sponsoring(Sponsoring::Password(Box::new(server))));
                        self.send(session, &Message::JoinPasswordAnswer { response: Box::new(response) });
                    }
                    Err(error) => self.refuse(session, password_code(&error), &error.to_string()),
                }
            }
            (Sponsoring::Password(server), Message::JoinPasswordFinish { finalization }) => {
                let context = PasswordContext { binding: &binding, joiner: &joiner, sponsor: &self.me };
                match server.finish(&finalization, &context) {
                    Ok(_) => {
                        self.try_succeeded(session);
                        self.set_phase(session, Phase::Sponsoring(Sponsoring::Proven(JoinMode::Password)));
                        self.send(session, &Message::JoinPasswordOk);
                    }
                    Err(error) => {
                        tracing::warn!(%remote, node = %joiner.node_id().short(), "a node tried to join with a wrong password");
                        self.refuse(session, password_code(&error), &error.to_string());
                    }
                }
            }
            (Sponsoring::Offered, Message::TokenAsk { cluster }) => self.on_token_ask(session, &cluster),
            (Sponsoring::TokenProved, Message::JoinToken { id, secret }) => {
                self.on_token(session, &id, &secret);
            }
            (Sponsoring::Proven(mode), Message::JoinAsk) => self.admit(session, mode),
            (Sponsoring::Welcoming(parts), Message::WelcomeNext) => {
                self.set_phase(session, Phase::Sponsoring(Sponsoring::Welcoming(parts)));
                self.welcome_on(session);
            }
            // For the last parts: the welcome itself is on its way.
            (Sponsoring::Welcomed, Message::WelcomeNext) => {}
            (Sponsoring::Welcomed, Message::Hello(hello)) => {
                let Hello::Member { chain, record, .. } = *hello else {
                    return self.refuse(session, RefusalCode::Protocol, "it was let in, and asks to join");
                };
                let Some(view) = &mut self.view else { return };
                let merged =
                    view.merge(&Delta { admissions: chain, records: vec![*record], ..Delta::default() });
                if view.record(&joiner.node_id()).is_none() {
                    let why = merged.refused.into_iter().next().unwrap_or_default();
                    return self.refuse(
                        session,
                        RefusalCode::NotMember,
                        &format!("its record is refused ({why})"),
                    );
                }
                self.learned(&merged.new, &merged.gone);
                self.enter_membership(session);
            }
            (_, message) => {
                let reason = format!("a {} does not belong here", message.kind());
                self.refuse(session, RefusalCode::Protocol, &reason);
            }
        }
    }

    /// Lets the node in: an admission and, when it owns nothing yet, a first range. Both are durable here before
    /// it hears of them.
    fn admit(&mut self, session: SessionId, mode: JoinMode) {
        let Some(joiner) = self.sessions.get(&session).map(|entry| entry.peer) else { return };
        let welcoming = self
            .sessions
            .values()
            .filter(|entry| matches!(entry.phase, Phase::Sponsoring(Sponsoring::Welcoming(_))));
        if welcoming.count() >= MAX_WELCOMING {
            let reason = "it tells as many nodes as it can of this cluster; try again";
            return self.refuse(session, RefusalCode::Busy, reason);
        }
        if let Err((code, reason)) = self.still_admits(mode) {
            return self.refuse(session, code, &reason);
        }
        if self.is_leaving() {
            return self.refuse(session, RefusalCode::Busy, "this member is leaving; ask another");
        }
        let Some(view) = &self.view else { return };
        let (cluster, is_member) = (view.cluster(), view.admissions().contains(&joiner));
        let mut delta = Delta::default();
        // A node that could not keep what it was told is let in by the admission that it has. Were each member that it asks
        // to sign another one, there would be more than are kept, and not the same ones everywhere.
        if !is_member {
            self.join.serial += 1;
            let serial = self.stored.generation << 32 | self.join.serial;
            match SignedAdmission::issue(cluster, joiner, &self.identity, mode, serial) {
                Ok(admission) => delta.admissions.push(admission),
                Err(error) => return self.refuse(session, RefusalCode::Protocol, &error.to_string()),
            }
        }
        if self.may_give() {
            delta.grants.extend(self.first_range(&joiner));
        }
        let Some(view) = &mut self.view else { return };
        let merged = view.merge(&delta);
        let delta = merged.new;
        if !view.admissions().contains(&joiner) {
            let why = merged.refused.into_iter().next().unwrap_or_default();
            return self.refuse(session, RefusalCode::Busy, &format!("it cannot be admitted: {why}"));
        }
        tracing::info!(node = %joiner.node_id().short(), by = %mode, range = ?delta.grants.first().and_then(|grant| grant.decode().ok()).map(|grant| format!("{}/{}", grant.network, grant.prefix)), "admitted");
        self.persist(&[StateFile::Cluster], Pending::Welcome { session, delta: Box::new(delta) });
    }

    fn first_range(&self, joiner: &mesh_keys::IdentityKey) -> Option<mesh_keys::Signed<crate::view::Grant>> {
        let view = self.view.as_ref()?;
        if !view.grants().owned_by(joiner).is_empty() {
            return None;
        }
        let block = 1u64 << (32 - view.genesis().block_prefix());
        let spare = self.spare_addresses();
        let blocks = (spare.len() / block / 16).clamp(1, FIRST_BLOCKS_MAX);
        view.grants().grant(&self.identity, *joiner, u32::try_from(blocks).ok()?, &self.kept_addresses())
    }

    /// The admission is on disk: the joiner may have it, and everyone else.
    pub(super) fn welcome(&mut self, session: SessionId, delta: Delta) {
        let Some(view) = &self.view else { return };
        let mut told = view.to_delta();
        // What has come since is told later: it could still be forgotten here.
        self.being_written().for_each(|delta| told.remove(delta));
        let parts = told.chunks(PART_ITEMS, PART_BYTES).into();
        self.set_phase(session, Phase::Sponsoring(Sponsoring::Welcoming(parts)));
        self.emit(Output::Trust { session });
        for _ in 0..PARTS_AHEAD {
            self.welcome_on(session);
        }
        self.spread(&delta);
    }

    /// Sends the next part of a welcome; with the last one the welcome is complete.
    fn welcome_on(&mut self, session: SessionId) {
        let Some(genesis) = self.view.as_ref().map(|view| view.genesis().encode()) else { return };
        let Some(entry) = self.sessions.get_mut(&session) else { return };
        let Phase::Sponsoring(Sponsoring::Welcoming(parts)) = &mut entry.phase else { return };
        let view = parts.pop_front().unwrap_or_default();
        if parts.is_empty() {
            entry.phase = Phase::Sponsoring(Sponsoring::Welcomed);
            self.send(session, &Message::Welcome { genesis, view });
        } else {
            self.send(session, &Message::WelcomePart { view });
        }
    }

    pub(super) fn set_phase(&mut self, session: SessionId, phase: Phase) {
        if let Some(entry) = self.sessions.get_mut(&session)
            && !matches!(entry.phase, Phase::Closing)
        {
            entry.phase = phase;
        }
    }
}

fn password_code(error: &PasswordError) -> RefusalCode {
    if matches!(error, PasswordError::WrongPassword) {
        RefusalCode::WrongPassword
    } else {
        RefusalCode::Protocol
    }
}
