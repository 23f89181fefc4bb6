//! Control sessions: who is at the other end, and which of several sessions with one member counts.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use mesh_keys::{IdentityKey, NodeId, SessionSecrets, SignedAdmission};

use super::join::{Joining, Sponsoring};
use super::{Node, Output, SessionId};
use crate::message::{Hello, MalformedMessage, Message, OLDEST_PROTOCOL, PROTOCOL, Refusal, RefusalCode};
use crate::time::Time;
use crate::view::{Delta, View};

/// A session with a member in which nothing is said for so long is ended by the node with the lower id; by the other
/// a little later.
const IDLE_LIMIT: Duration = Duration::from_secs(30);

/// A session must have led to something within this time; while a node is told of the cluster, something must have
/// been said.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(20);

/// A node that was told of the whole cluster may take so long to check it: a million signatures are 40 s.
const CHECK_LIMIT: Duration = Duration::from_secs(60);

/// Within this time it has to be told of the whole cluster.
const WELCOME_LIMIT: Duration = Duration::from_secs(900);

/// A session that another one has replaced is kept this long, for what is still on its way.
const REPLACED_LIMIT: Duration = Duration::from_secs(5);

/// Most admissions in a greeting, at about 170 bytes each: it has to fit a frame from an end that has not proved
/// itself.
const MAX_CHAIN: usize = 200;

/// Most sessions at once with ends that have not proved to be members.
const MAX_STRANGERS: usize = 256;

/// Most sessions at once with one member. Both ends may call in the same moment, and what a killed process leaves behind
/// is noticed late.
const MAX_OF_MEMBER: usize = 4;

/// How a session came about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// This node dialled that address.
    Dialled(SocketAddr),
    /// The other end dialled, from that address.
    Accepted(SocketAddr),
    /// A member carries it.
    Through {
        /// Which one.
        carrier: NodeId,
        /// Whether this node called.
        dialled: bool,
    },
}

impl Way {
    pub(super) fn is_dialled(self) -> bool {
        matches!(self, Self::Dialled(_) | Self::Through { dialled: true, .. })
    }

    pub(super) fn is_direct(self) -> bool {
        !matches!(self, Self::Through { .. })
    }

    /// The address that was dialled.
    pub(super) fn target(self) -> Option<SocketAddr> {
        match self {
            Self::Dialled(target) => Some(target),
            Self::Accepted(_) | Self::Through { .. } => None,
        }
    }

    /// The member that carries it.
    pub(super) fn carrier(self) -> Option<NodeId> {
        match self {
            Self::Dialled(_) | Self::Accepted(_) => None,
            Self::Through { carrier, .. } => Some(carrier),
        }
    }

    /// The address of the other end.
    pub(super) fn address(self) -> Option<SocketAddr> {
        match self {
            Self::Dialled(address) | Self::Accepted(address) => Some(address),
            Self::Through { .. } => None,
        }
    }
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dialled(address) | Self::Accepted(address) => address.fmt(f),
            Self::Through { carrier, .. } => write!(f, "through member {}", carrier.short()),
        }
    }
}

/// One control session.
pub(super) struct Session {
    pub(super) peer: IdentityKey,
    /// Which node that is.
    pub(super) peer_id: NodeId,
    pub(super) way: Way,
    pub(super) secrets: SessionSecrets,
    pub(super) opened: Time,
    /// When something was said last, at either end.
    pub(super) used: Time,
    pub(super) phase: Phase,
    /// Since when another session with the same member counts instead.
    pub(super) replaced: Option<Time>,
}

impl Session {
    /// Whether it is with a member that takes this node for one.
    pub(super) fn is_of_member(&self) -> bool {
        matches!(self.phase, Phase::Member)
    }
}

/// All sessions.
#[derive(Default)]
pub(super) struct Sessions {
    all: BTreeMap<SessionId, Session>,
    of_peer: BTreeMap<NodeId, BTreeSet<SessionId>>,
    /// Those that are not with members, closing ones among them.
    strangers: BTreeSet<SessionId>,
    /// When each has to be looked at: not later than something is due.
    due: BTreeSet<(Time, SessionId)>,
}

impl Sessions {
    fn insert(&mut self, id: SessionId, session: Session) {
        self.of_peer.entry(session.peer_id).or_default().insert(id);
        self.strangers.insert(id);
        self.due.insert((session.opened + HANDSHAKE_LIMIT, id));
        self.all.insert(id, session);
    }

    fn remove(&mut self, id: &SessionId) -> Option<Session> {
        let session = self.all.remove(id)?;
        self.strangers.remove(id);
        if let Some(of_peer) = self.of_peer.get_mut(&session.peer_id) {
            of_peer.remove(id);
            if of_peer.is_empty() {
                self.of_peer.remove(&session.peer_id);
            }
        }
        Some(session)
    }

    pub(super) fn get(&self, id: &SessionId) -> Option<&Session> {
        self.all.get(id)
    }

    pub(super) fn get_mut(&mut self, id: &SessionId) -> Option<&mut Session> {
        self.all.get_mut(id)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&SessionId, &Session)> {
        self.all.iter()
    }

    pub(super) fn values(&self) -> impl Iterator<Item = &Session> {
        self.all.values()
    }

    /// Those with one node.
    pub(super) fn with(&self, peer: &NodeId) -> impl Iterator<Item = (SessionId, &Session)> {
        let ids = self.of_peer.get(peer).into_iter().flatten();
        ids.filter_map(|id| self.all.get(id).map(|session| (*id, session)))
    }
}

/// Carried by nobody, dialled by the node with the lower id, when it was opened, and its name.
type Rank = (bool, bool, Time, SessionId);

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

/// The admissions that lead to a node, those nearest to it.
pub(super) fn nearest_chain(view: &View, node: &IdentityKey) -> Vec<SignedAdmission> {
    let mut chain = view.admissions().chain(node);
    chain.split_off(chain.len().saturating_sub(MAX_CHAIN))
}

impl Node {
    pub(super) fn on_session_opened(
        &mut self,
        session: SessionId,
        peer: IdentityKey,
        way: Way,
        secrets: SessionSecrets,
    ) {
        let peer_id = peer.node_id();
        if let Some(target) = way.target() {
            self.dialer.on_opened(target, peer_id);
        }
        if way.is_direct() {
            self.path_reached(&peer_id);
        }
        let entry = Session {
            peer,
            peer_id,
            way,
            secrets,
            opened: self.now,
            used: self.now,
            phase: Phase::Greeting,
            replaced: None,
        };
        self.sessions.insert(session, entry);
        if peer == self.me {
            // Our own address is in the list, or another host has a copy of our disk.
            if !way.is_dialled() {
                tracing::debug!(remote = %way, "session with this node's own identity key");
            }
            return self.close(session, "it is this node itself");
        }
        if self.is_out() {
            return self.close(session, "this node was removed from the cluster");
        }
        if !way.is_dialled() && self.sessions.strangers.len() > MAX_STRANGERS {
            return self.refuse(session, RefusalCode::Busy, "too many nodes are joining at once; try again");
        }
        if way.is_dialled() {
            let hello = self.hello();
            self.send(session, &Message::Hello(Box::new(hello)));
        }
    }

    pub(super) fn hello(&self) -> Hello {
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
        nearest_chain(view, &self.me)
    }

    pub(super) fn on_frame(&mut self, session: SessionId, frame: &[u8]) {
        let now = self.now;
        let Some(entry) = self.sessions.get_mut(&session) else { return };
        entry.used = now;
        let peer = entry.peer_id;
        if matches!(entry.phase, Phase::Closing) {
            return;
        }
        let message = match Message::decode(frame) {
            Ok(message) => message,
            Err(error @ MalformedMessage::Unknown { .. }) if entry.is_of_member() => {
                return tracing::debug!(peer = %peer.short(), %error, "passed over");
            }
            Err(error) => {
                tracing::warn!(peer = %peer.short(), remote = %entry.way, %error, "malformed frame");
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
        let (way, peer) = (entry.way, entry.peer);
        let (dialled, remote) = (way.is_dialled(), way);
        let (Hello::Joiner { protocol, .. } | Hello::Member { protocol, .. }) = &hello;
        // A newer one decides for itself whether it speaks with this one.
        if *protocol < OLDEST_PROTOCOL {
            let reason = format!(
                "this node speaks protocol {OLDEST_PROTOCOL} to {PROTOCOL}, the other {protocol}: upgrade that one"
            );
            return self.refuse(session, RefusalCode::Version, &reason);
        }
        let Some(view) = &mut self.view else {
            if matches!(hello, Hello::Member { .. }) && !dialled && self.joins_when_called() {
                // Anybody can say so: what this host is called is not for them.
                let hello = Hello::Joiner { protocol: PROTOCOL, name: String::new() };
                return self.send(session, &Message::Hello(Box::new(hello)));
            }
            return self.refuse(session, RefusalCode::NoCluster, "this node is in no cluster yet");
        };
        match hello {
            Hello::Joiner { .. } if !way.is_direct() => {
                self.refuse(session, RefusalCode::Protocol, "who joins calls a member itself");
            }
            Hello::Joiner { name, .. } => self.start_sponsoring(session, &name),
            Hello::Member { cluster, chain, record, .. } => {
                if cluster != view.cluster() {
                    // Not which one this is: it has proved nothing.
                    let reason = "it is a member of another cluster: start it with a fresh state directory to join this one";
                    tracing::warn!(%remote, peer = %peer.node_id().short(), cluster = %cluster.short(), "refused: {reason}");
                    return self.refuse(session, RefusalCode::OtherCluster, reason);
                }
                // Judged on a copy: who is no member adds nothing.
                let delta = Delta { admissions: chain, records: vec![*record], ..Delta::default() };
                let mut judged = view.clone();
                let merged = judged.merge(&delta);
                let removed = judged.removed_above(&peer, &delta.admissions);
                if !judged.admissions().contains(&peer) && !removed.is_empty() {
                    tracing::warn!(%remote, peer = %peer.node_id().short(), "refused: it was removed from this cluster");
                    if !dialled {
                        let hello = self.hello();
                        self.send(session, &Message::Hello(Box::new(hello)));
                    }
                    self.prove_removal(session, &removed);
                    return self.refuse(session, RefusalCode::Removed, super::removal::REMOVED);
                }
                if !judged.admissions().contains(&peer) || judged.record(&peer.node_id()).is_none() {
                    let why = merged.refused.into_iter().next().unwrap_or_default();
                    let reason = format!(
                        "no chain of admissions leads from it to the founder of this cluster ({why})"
                    );
                    tracing::warn!(%remote, peer = %peer.node_id().short(), "refused: {reason}");
                    return self.refuse(session, RefusalCode::NotMember, &reason);
                }
                self.view = Some(judged);
                self.learned(&merged.new, &merged.gone);
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
        let (peer, direct) = (entry.peer_id, entry.way.is_direct());
        self.sessions.strangers.remove(&session);
        self.stale = true;
        let Some(entry) = self.sessions.get(&session) else { return };
        tracing::info!(peer = %peer.short(), remote = %entry.way, dialled = entry.way.is_dialled(), "session established");
        self.emit(Output::Trust { session });
        self.dialer.on_member(peer);
        self.choose_session(peer);
        self.close_surplus(peer);
        let keys = self.group_keys();
        self.send(session, &keys);
        self.tell_what_is_known(session, &peer);
        for message in self.dialer.take_waiting(&peer) {
            self.send(session, &message);
        }
        if let (true, Some(gossip)) = (direct, &mut self.gossip) {
            gossip.greet(peer);
        }
        self.send_gossip(None, usize::MAX);
        self.pair_session_changed(peer);
        self.carry_on(peer);
    }

    /// Of several sessions with one member, one that nobody carries counts; of those, the one that the node with the lower
    /// id dialled; of those, the newest. The node with the lower id closes the others.
    fn choose_session(&mut self, peer: NodeId) {
        let Some(chosen) = self.session_with(&peer) else { return };
        let now = self.now;
        let others: Vec<SessionId> = self
            .sessions
            .with(&peer)
            .filter(|(id, session)| *id != chosen && session.is_of_member())
            .map(|(id, _)| id)
            .collect();
        for id in others {
            if let Some(session) = self.sessions.get_mut(&id) {
                session.replaced.get_or_insert(now);
            }
            self.sessions.due.insert((now + REPLACED_LIMIT, id));
        }
        if let Some(session) = self.sessions.get_mut(&chosen) {
            session.replaced = None;
        }
    }

    /// Ends the oldest sessions of a member that has more than it needs.
    fn close_surplus(&mut self, peer: NodeId) {
        let chosen = self.session_with(&peer);
        let mut others: Vec<(Time, SessionId)> = self
            .sessions
            .with(&peer)
            .filter(|(id, session)| Some(*id) != chosen && session.is_of_member())
            .map(|(id, session)| (session.opened, id))
            .collect();
        others.sort_unstable();
        let surplus = (others.len() + 1).saturating_sub(MAX_OF_MEMBER);
        for (_, session) in others.into_iter().take(surplus) {
            self.close(session, "there are too many sessions with the same node");
        }
    }

    /// All sessions with a member.
    pub(super) fn sessions_with(&self, peer: &NodeId) -> Vec<SessionId> {
        let with_peer = self.sessions.with(peer);
        with_peer.filter(|(_, session)| session.is_of_member()).map(|(id, _)| id).collect()
    }

    /// The session that counts with a member.
    pub(super) fn session_with(&self, peer: &NodeId) -> Option<SessionId> {
        let with_peer = self.sessions.with(peer);
        with_peer.filter_map(|(id, session)| self.rank(id, session)).max().map(|(_, _, _, id)| id)
    }

    /// The session that counts with a member, if nobody carries it.
    pub(super) fn direct_session_with(&self, peer: &NodeId) -> Option<SessionId> {
        let is_direct = |id: &SessionId| self.sessions.get(id).is_some_and(|session| session.way.is_direct());
        self.session_with(peer).filter(is_direct)
    }

    /// Whether there is a session with a node that has not come to anything yet, but may any moment.
    pub(super) fn is_greeting(&self, peer: &NodeId) -> bool {
        let mut with_peer = self.sessions.values().filter(|session| session.peer_id == *peer);
        with_peer.any(|session| matches!(session.phase, Phase::Greeting))
    }

    /// Which of several sessions with a member counts: the highest. Those with others have none.
    fn rank(&self, id: SessionId, session: &Session) -> Option<Rank> {
        let by_lower = session.way.is_dialled() == (self.id < session.peer_id);
        session.is_of_member().then_some((session.way.is_direct(), by_lower, session.opened, id))
    }

    /// Where the sessions that count lead to.
    pub(super) fn session_addresses(&self) -> BTreeMap<NodeId, IpAddr> {
        let mut best: BTreeMap<NodeId, (Rank, IpAddr)> = BTreeMap::new();
        for (id, session) in self.sessions.iter() {
            if let Some((rank, address)) = self.rank(*id, session).zip(session.way.address()) {
                let of_this = (rank, address.ip());
                let best = best.entry(session.peer_id).or_insert(of_this);
                *best = (*best).max(of_this);
            }
        }
        best.into_iter().map(|(peer, (_, address))| (peer, address)).collect()
    }

    fn on_refused(&mut self, session: SessionId, refusal: &Refusal) {
        let Some(entry) = self.sessions.get(&session) else { return };
        let (remote, dialled) = (entry.way, entry.way.target());
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
        let peer = entry.peer_id;
        self.carry_no_more(session);
        match entry.phase {
            Phase::Member => {
                self.stale = true;
                if self.session_with(&peer).is_none() {
                    tracing::debug!(peer = %peer.short(), remote = %entry.way, reason, "session ended");
                    self.dialer.on_lost(peer, entry.way.address(), reason);
                } else {
                    self.choose_session(peer);
                }
                self.pair_session_changed(peer);
            }
            Phase::Joining(_) | Phase::Greeting => {
                self.join_session_gone(session, entry.way.target(), reason);
                if let Some(target) = entry.way.target() {
                    self.dialer.on_failed(target, reason.to_owned(), self.now);
                }
            }
            Phase::Sponsoring(_) | Phase::Closing => {}
        }
    }

    /// Closes what took too long, and what was replaced.
    pub(super) fn sweep_sessions(&mut self) {
        while let Some((_, id)) = self.sessions.due.first().copied().filter(|(due, _)| *due <= self.now) {
            self.sessions.due.pop_first();
            let Some(session) = self.sessions.get(&id) else { continue };
            if matches!(session.phase, Phase::Closing) {
                continue;
            }
            match self.session_due(session) {
                Some((due, reason)) if due <= self.now => self.close(id, reason),
                // It was used meanwhile; or its end depends on whether datagrams arrive, and they do not yet.
                due => {
                    let again = due.map_or(self.now + IDLE_LIMIT, |(due, _)| due);
                    self.sessions.due.insert((again, id));
                }
            }
        }
    }

    /// When a session is to be ended, and why.
    fn session_due(&self, session: &Session) -> Option<(Time, &'static str)> {
        const IN_VAIN: &str = "nothing came of it in time";
        let longest = session.opened + WELCOME_LIMIT;
        match session.phase {
            Phase::Closing => None,
            Phase::Member => {
                let replaced = session.replaced.filter(|_| self.id < session.peer_id);
                let replaced = replaced
                    .map(|since| (since + REPLACED_LIMIT, "another session with the same node is used"));
                let idle = self.idle_limit(session).map(|at| (at, "nothing to say"));
                replaced.into_iter().chain(idle).min_by_key(|(at, _)| *at)
            }
            Phase::Joining(Joining::Asked) | Phase::Sponsoring(Sponsoring::Welcoming(_)) => {
                Some((longest.min(session.used + HANDSHAKE_LIMIT), IN_VAIN))
            }
            Phase::Sponsoring(Sponsoring::Welcomed) => {
                Some((longest.min(session.used + CHECK_LIMIT), IN_VAIN))
            }
            Phase::Greeting | Phase::Joining(_) | Phase::Sponsoring(_) => {
                Some((session.opened + HANDSHAKE_LIMIT, IN_VAIN))
            }
        }
    }

    pub(super) fn session_deadline(&self) -> Option<Time> {
        self.sessions.due.first().map(|(due, _)| *due)
    }

    /// When a session with a member is ended, if nothing else is said. One that nobody carries is the only way to a member
    /// whose datagrams do not arrive.
    fn idle_limit(&self, session: &Session) -> Option<Time> {
        let peer = session.peer_id;
        if session.way.is_direct() {
            self.datagrams.address(&peer)?;
        }
        let patience = if self.id < peer { IDLE_LIMIT } else { IDLE_LIMIT * 4 / 3 };
        Some(session.used + patience)
    }

    pub(super) fn send(&mut self, session: SessionId, message: &Message) {
        let now = self.now;
        if let Some(entry) = self.sessions.get_mut(&session)
            && !matches!(entry.phase, Phase::Closing)
        {
            entry.used = now;
            tracing::trace!(peer = %entry.peer_id.short(), kind = message.kind(), "sending");
            self.emit(Output::Send { session, frame: message.encode() });
        }
    }

    /// Tells the other end why, and ends the session.
    pub(super) fn refuse(&mut self, session: SessionId, code: RefusalCode, reason: &str) {
        self.send(session, &Message::Refuse(Refusal::new(code, reason)));
        if let Some(target) = self.sessions.get(&session).and_then(|entry| entry.way.target()) {
            self.dialer.on_refused(target, code, reason.to_owned(), self.now);
        }
        self.close(session, reason);
    }

    pub(super) fn close(&mut self, session: SessionId, reason: &str) {
        let Some(entry) = self.sessions.get_mut(&session) else { return };
        let was = std::mem::replace(&mut entry.phase, Phase::Closing);
        let (peer, dialled) = (entry.peer_id, entry.way.target());
        match was {
            Phase::Closing => return,
            Phase::Joining(_) => self.join_session_gone(session, dialled, reason),
            Phase::Member => {
                self.stale = true;
                self.dialer.on_ended(peer, dialled);
                self.pair_session_changed(peer);
            }
            Phase::Greeting | Phase::Sponsoring(_) => {}
        }
        self.carry_no_more(session);
        self.emit(Output::Close { session, reason: reason.to_owned() });
    }
}
