//! Control sessions: who is at the other end, and which of several sessions with one member counts.

use std::net::SocketAddr;
use std::time::Duration;

use mesh_keys::{IdentityKey, NodeId, SessionSecrets, SignedAdmission};

use super::join::{Joining, Sponsoring};
use super::{Node, Output, SessionId};
use crate::message::{Hello, Message, PROTOCOL, Refusal, RefusalCode};
use crate::time::Time;
use crate::view::{Delta, View};

/// A session with a member in which nothing is said for so long is ended by the node with the lower id; by the other
/// a little later.
const IDLE_LIMIT: Duration = Duration::from_secs(30);

/// A session must have led to something within this time.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(20);

/// A session that another one has replaced is kept this long, for what is still on its way.
const REPLACED_LIMIT: Duration = Duration::from_secs(5);

/// Most admissions in a greeting, at about 170 bytes each: it has to fit a frame from an end that has not proved
/// itself.
const MAX_CHAIN: usize = 200;

/// Most sessions at once with ends that have not proved to be members.
const MAX_STRANGERS: usize = 256;

/// One control session.
pub(super) struct Session {
    pub(super) peer: IdentityKey,
    pub(super) dialled: Option<SocketAddr>,
    pub(super) remote: SocketAddr,
    pub(super) secrets: SessionSecrets,
    pub(super) opened: Time,
    /// When something was said last, at either end.
    pub(super) used: Time,
    pub(super) phase: Phase,
    /// Since when another session with the same member counts instead.
    pub(super) replaced: Option<Time>,
}

/// How far a session has come.
pub(super) enum Phase {
    /// Nothing was heard yet.
    Greeting,
    /// We join through it.
    Joining(Joining),
    /// The other end joins through it.
    Sponsoring(Sponsoring),
    /// The other end is a member, and takes us for one.
    Member,
    /// It is being closed: nothing more is said or heard.
    Closing,
}

impl Node {
    pub(super) fn on_session_opened(
        &mut self,
        session: SessionId,
        peer: IdentityKey,
        dialled: Option<SocketAddr>,
        remote: SocketAddr,
        secrets: SessionSecrets,
    ) {
        if let Some(target) = dialled {
            self.dialer.on_opened(target, peer.node_id());
        }
        let entry = Session {
            peer,
            dialled,
            remote,
            secrets,
            opened: self.now,
            used: self.now,
            phase: Phase::Greeting,
            replaced: None,
        };
        self.sessions.insert(session, entry);
        if peer == self.me {
            // Our own address is in the list, or another host has a copy of our disk.
            if dialled.is_none() {
                tracing::debug!(%remote, "session with this node's own identity key");
            }
            return self.close(session, "it is this node itself");
        }
        if self.is_out() {
            return self.close(session, "this node was removed from the cluster");
        }
        let strangers = self.sessions.values().filter(|s| !matches!(s.phase, Phase::Member)).count();
        if dialled.is_none() && strangers > MAX_STRANGERS {
            return self.refuse(session, RefusalCode::Busy, "too many nodes are joining at once; try again");
        }
        if dialled.is_some() {
            let hello = self.hello();
            self.send(session, &Message::Hello(Box::new(hello)));
        }
    }

    fn hello(&self) -> Hello {
        match (&self.view, self.view.as_ref().and_then(|view| view.signed_record(&self.id))) {
            (Some(view), Some(record)) => Hello::Member {
                protocol: PROTOCOL,
                cluster: view.cluster(),
                chain: self.own_chain(view),
                record: Box::new(record.clone()),
            },
            _ => Hello::Joiner { protocol: PROTOCOL, name: self.config.name.clone() },
        }
    }

    /// The admissions that show this node to be a member, those nearest to it: in a cluster whose nodes were
    /// replaced many times they are many, and a member knows the old ones.
    pub(super) fn own_chain(&self, view: &View) -> Vec<SignedAdmission> {
        let mut chain = view.admissions().chain(&self.me);
        chain.split_off(chain.len().saturating_sub(MAX_CHAIN))
    }

    pub(super) fn on_frame(&mut self, session: SessionId, frame: &[u8]) {
        let now = self.now;
        let Some(entry) = self.sessions.get_mut(&session) else { return };
        entry.used = now;
        let peer = entry.peer.node_id();
        if matches!(entry.phase, Phase::Closing) {
            return;
        }
        let message = match Message::decode(frame) {
            Ok(message) => message,
            Err(error) => {
                tracing::warn!(peer = %peer.short(), remote = %entry.remote, %error, "malformed frame");
                return self.refuse(session, RefusalCode::Protocol, &format!("malformed frame: {error}"));
            }
        };
        tracing::trace!(peer = %peer.short(), kind = message.kind(), "received");
        match (&entry.phase, message) {
            (_, Message::Refuse(refusal)) => self.on_refused(session, &refusal),
            (Phase::Greeting, Message::Hello(hello)) => self.on_hello(session, *hello),
            (Phase::Greeting, Message::JoinOffer { key, password }) => {
                self.on_join_offer(session, key, password)
            }
            (Phase::Joining(_), message) => self.on_joining(session, message),
            (Phase::Sponsoring(_), message) => self.on_sponsoring(session, message),
            (Phase::Member, message) => self.on_member_message(session, peer, message),
            (_, message) => {
                let kind = message.kind();
                self.refuse(session, RefusalCode::Protocol, &format!("a {kind} does not belong here"));
            }
        }
    }

    fn on_hello(&mut self, session: SessionId, hello: Hello) {
        let Some(entry) = self.sessions.get(&session) else { return };
        let (dialled, peer, remote) = (entry.dialled.is_some(), entry.peer, entry.remote);
        let (Hello::Joiner { protocol, .. } | Hello::Member { protocol, .. }) = &hello;
        if *protocol != PROTOCOL {
            let reason =
                format!("this node speaks protocol {PROTOCOL}, the other {protocol}; upgrade the older one");
            return self.refuse(session, RefusalCode::Version, &reason);
        }
        let Some(view) = &mut self.view else {
            // Nobody here can judge it. We dial members ourselves.
            return self.refuse(session, RefusalCode::NoCluster, "this node is in no cluster yet");
        };
        match hello {
            Hello::Joiner { name, .. } => {
                if dialled {
                    return self.refuse(
                        session,
                        RefusalCode::Protocol,
                        "the end that was dialled cannot join",
                    );
                }
                self.start_sponsoring(session, &name);
            }
            Hello::Member { cluster, chain, record, .. } => {
                if cluster != view.cluster() {
                    let reason = format!(
                        "it is a member of another cluster ({}; this one is {}): start it with a fresh state directory to join this one",
                        cluster.short(),
                        view.cluster().short()
                    );
                    tracing::warn!(%remote, peer = %peer.node_id().short(), "refused: {reason}");
                    return self.refuse(session, RefusalCode::OtherCluster, &reason);
                }
                let delta = Delta { admissions: chain, records: vec![*record], ..Delta::default() };
                let merged = view.merge(&delta);
                self.learned(&merged.new, &merged.gone);
                let Some(view) = &self.view else { return };
                if view.admissions().was_admitted(&peer) && !view.admissions().contains(&peer) {
                    tracing::warn!(%remote, peer = %peer.node_id().short(), "refused: it was removed from this cluster");
                    if !dialled {
                        let hello = self.hello();
                        self.send(session, &Message::Hello(Box::new(hello)));
                    }
                    self.prove_removal(session, &peer);
                    return self.refuse(session, RefusalCode::Removed, super::removal::REMOVED);
                }
                if !view.admissions().contains(&peer) || view.record(&peer.node_id()).is_none() {
                    let why = merged.refused.into_iter().next().unwrap_or_default();
                    let reason = format!(
                        "no chain of admissions leads from it to the founder of this cluster ({why})"
                    );
                    tracing::warn!(%remote, peer = %peer.node_id().short(), "refused: {reason}");
                    return self.refuse(session, RefusalCode::NotMember, &reason);
                }
                if !dialled {
                    let hello = self.hello();
                    self.send(session, &Message::Hello(Box::new(hello)));
                }
                self.enter_membership(session);
            }
        }
    }

    /// The other end is a member and takes us for one.
    pub(super) fn enter_membership(&mut self, session: SessionId) {
        let Some(entry) = self.sessions.get_mut(&session) else { return };
        entry.phase = Phase::Member;
        let peer = entry.peer.node_id();
        tracing::info!(peer = %peer.short(), remote = %entry.remote, dialled = entry.dialled.is_some(), "session established");
        self.emit(Output::Trust { session });
        self.dialer.on_member(peer);
        self.choose_session(peer);
        let keys = self.group_keys();
        self.send(session, &keys);
        self.tell_what_is_known(session, &peer);
        for message in self.dialer.take_waiting(&peer) {
            self.send(session, &message);
        }
        if let Some(gossip) = &mut self.gossip {
            gossip.greet(peer);
        }
        self.send_gossip(None, usize::MAX);
        self.pair_session_changed(peer);
    }

    /// Of several sessions with one member, the one that the node with the lower id dialled counts; of those,
    /// the newest. The node with the lower id closes the others.
    fn choose_session(&mut self, peer: NodeId) {
        let Some(chosen) = self.session_with(&peer) else { return };
        let now = self.now;
        for (id, session) in &mut self.sessions {
            if *id != chosen && matches!(session.phase, Phase::Member) && session.peer.node_id() == peer {
                session.replaced.get_or_insert(now);
            }
        }
        if let Some(session) = self.sessions.get_mut(&chosen) {
            session.replaced = None;
        }
    }

    /// The session that counts with a member.
    pub(super) fn session_with(&self, peer: &NodeId) -> Option<SessionId> {
        let by_lower = |session: &Session| (session.dialled.is_some()) == (self.id < *peer);
        self.sessions
            .iter()
            .filter(|(_, session)| matches!(session.phase, Phase::Member) && session.peer.node_id() == *peer)
            .max_by_key(|(id, session)| (by_lower(session), session.opened, **id))
            .map(|(id, _)| *id)
    }

    fn on_refused(&mut self, session: SessionId, refusal: &Refusal) {
        let Some(entry) = self.sessions.get(&session) else { return };
        let (remote, dialled) = (entry.remote, entry.dialled);
        let reason = refusal.printable_reason();
        if matches!(refusal.code, RefusalCode::NoCluster | RefusalCode::Busy) {
            tracing::debug!(%remote, reason, "not now");
        } else {
            tracing::warn!(%remote, "{remote} refused: {reason}");
        }
        self.join_refused(session, refusal.code, &reason);
        if let Some(target) = dialled {
            self.dialer.on_refused(target, refusal.code, format!("refused: {reason}"), self.now);
        }
        self.close(session, &format!("refused by the other end: {reason}"));
    }

    pub(super) fn on_session_closed(&mut self, session: SessionId, reason: &str) {
        let Some(entry) = self.sessions.remove(&session) else { return };
        let peer = entry.peer.node_id();
        match entry.phase {
            Phase::Member => {
                if self.session_with(&peer).is_none() {
                    tracing::debug!(peer = %peer.short(), remote = %entry.remote, reason, "session ended");
                    self.dialer.on_lost(peer, entry.dialled.or(Some(entry.remote)), reason);
                } else {
                    self.choose_session(peer);
                }
                self.pair_session_changed(peer);
            }
            Phase::Joining(_) | Phase::Greeting => {
                self.join_session_gone(session, entry.dialled, reason);
                if let Some(target) = entry.dialled {
                    self.dialer.on_failed(target, reason.to_owned(), self.now);
                }
            }
            Phase::Sponsoring(_) | Phase::Closing => {}
        }
    }

    /// Closes what took too long, and what was replaced.
    pub(super) fn sweep_sessions(&mut self) {
        let now = self.now;
        let late: Vec<(SessionId, &'static str)> = self
            .sessions
            .iter()
            .filter_map(|(id, session)| match session.phase {
                Phase::Closing => None,
                Phase::Member => {
                    let due = session.replaced.is_some_and(|since| now.since(since) >= REPLACED_LIMIT);
                    if due && self.id < session.peer.node_id() {
                        return Some((*id, "another session with the same node is used"));
                    }
                    self.idle_limit(session).filter(|limit| now >= *limit).map(|_| (*id, "nothing to say"))
                }
                Phase::Greeting | Phase::Joining(_) | Phase::Sponsoring(_) => (now.since(session.opened)
                    >= HANDSHAKE_LIMIT)
                    .then_some((*id, "nothing came of it in time")),
            })
            .collect();
        for (session, reason) in late {
            self.close(session, reason);
        }
    }

    pub(super) fn session_deadline(&self) -> Option<Time> {
        self.sessions
            .values()
            .filter_map(|session| match session.phase {
                Phase::Closing => None,
                Phase::Member => session
                    .replaced
                    .filter(|_| self.id < session.peer.node_id())
                    .map(|since| since + REPLACED_LIMIT)
                    .into_iter()
                    .chain(self.idle_limit(session))
                    .min(),
                Phase::Greeting | Phase::Joining(_) | Phase::Sponsoring(_) => {
                    Some(session.opened + HANDSHAKE_LIMIT)
                }
            })
            .min()
    }

    /// When a session with a member is ended, if nothing else is said. It is the only way to a member whose
    /// datagrams do not arrive.
    fn idle_limit(&self, session: &Session) -> Option<Time> {
        let peer = session.peer.node_id();
        self.datagrams.address(&peer)?;
        let patience = if self.id < peer { IDLE_LIMIT } else { IDLE_LIMIT * 4 / 3 };
        Some(session.used + patience)
    }

    pub(super) fn send(&mut self, session: SessionId, message: &Message) {
        let now = self.now;
        if let Some(entry) = self.sessions.get_mut(&session)
            && !matches!(entry.phase, Phase::Closing)
        {
            entry.used = now;
            tracing::trace!(peer = %entry.peer.node_id().short(), kind = message.kind(), "sending");
            self.emit(Output::Send { session, frame: message.encode() });
        }
    }

    /// Tells the other end why, and ends the session.
    pub(super) fn refuse(&mut self, session: SessionId, code: RefusalCode, reason: &str) {
        self.send(session, &Message::Refuse(Refusal::new(code, reason)));
        if let Some(target) = self.sessions.get(&session).and_then(|entry| entry.dialled) {
            self.dialer.on_refused(target, code, reason.to_owned(), self.now);
        }
        self.close(session, reason);
    }

    pub(super) fn close(&mut self, session: SessionId, reason: &str) {
        let Some(entry) = self.sessions.get_mut(&session) else { return };
        let was = std::mem::replace(&mut entry.phase, Phase::Closing);
        let (peer, dialled) = (entry.peer.node_id(), entry.dialled);
        match was {
            Phase::Closing => return,
            Phase::Joining(_) => self.join_session_gone(session, dialled, reason),
            Phase::Member => {
                self.dialer.on_ended(peer, dialled);
                self.pair_session_changed(peer);
            }
            Phase::Greeting | Phase::Sponsoring(_) => {}
        }
        self.emit(Output::Close { session, reason: reason.to_owned() });
    }
}
