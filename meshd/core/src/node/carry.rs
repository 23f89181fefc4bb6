//! Control sessions through a member: two members that have no way to each other agree on keys all the same.
//!
//! The session is TLS between the two, as any other. A third member, the carrier, has sessions with both and hands the
//! bytes on; it cannot read them, and what it changes ends the session. Between two ends of a session these say which
//! connection (*link*) is meant by a number that the end which begins it has chosen; a hop is a link of a session.
//!
//! ```text
//! caller        carrier        called
//!   Call ──────────►  Called ──────►
//!   Carry ◄────────►  Carry ◄──────►      opaque, at most PIECE bytes
//!   Taken ◄────────►  Taken ◄──────►      the other end has used so many
//!   HangUp ◄───────►  HangUp ◄─────►
//! ```
//!
//! No more than [`WINDOW`] bytes of a link are on their way in one direction, so that a slow end holds up nobody: what waits
//! for a session at the carrier has a bound. Who sends more is hung up on. A carried session carries no others.

use std::collections::BTreeMap;
use std::time::Duration;

use mesh_keys::{IdentityKey, NodeId, SessionSecrets};

use super::sessions::Way;
use super::{Node, Output, SessionId};
use crate::message::Message;
use crate::time::Time;

/// Names a connection that another member carries, at one of its ends; never used twice by one process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CarriedId(pub u64);

/// Most bytes handed on in one message.
pub const PIECE: usize = 8 << 10;

/// Most bytes of a link on their way in one direction.
pub const WINDOW: u32 = 64 << 10;

/// What is to be done with a carried connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CarriedOutput {
    /// Begin: as the end that dials, or the one that accepts. Report [`super::Input::CarriedOpened`] once both ends have
    /// proved their identity keys. [`WINDOW`] bytes may be sent.
    Begin {
        /// Whether this end dials.
        dials: bool,
    },
    /// These came from the other end.
    Bytes(Vec<u8>),
    /// So many more bytes may be sent.
    Credit(u32),
    /// Nothing more comes, and nothing can be sent.
    End,
}

/// What has happened with a carried connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CarriedInput {
    /// These are for the other end; at most [`PIECE`], and no more than there is credit for.
    Bytes(Vec<u8>),
    /// So many of the bytes that came are used up.
    Taken(u32),
    /// It has ended at this end, or did not come about.
    Ended(String),
}

/// Most links of one session: at the carrier their windows fit into what may wait for it.
const MAX_LINKS: usize = 64;

/// Most hops of links between others.
const MAX_THROUGH: usize = 4096;

/// Most connections that this node has called for, and most that others have, while nothing is proved.
const MAX_UNPROVED: usize = 64;

/// Of those that others have, as many may come by one session: a carrier that lies keeps no other's from being taken.
const MAX_UNPROVED_OF_ONE: usize = 16;

/// Most calls that wait for a session with somebody, and most of those that came by one session.
const MAX_WAITING: usize = 64;
const MAX_WAITING_OF_ONE: usize = 8;

/// A call waits so long for a session with who is called, or with the carrier.
const CALL_WAITS: Duration = Duration::from_secs(10);

/// By then both ends have proved themselves.
const UNPROVED_FOR: Duration = Duration::from_secs(20);

/// A link of a session.
type Hop = (SessionId, u32);

/// What comes on a hop goes there.
#[derive(Clone, Copy, Debug)]
enum To {
    End(CarriedId),
    Hop(Hop),
}

#[derive(Debug)]
struct Link {
    to: To,
    /// Bytes that may still come on this hop.
    window: u32,
}

/// This node is an end.
#[derive(Debug)]
struct End {
    hop: Hop,
    peer: NodeId,
    dials: bool,
    begun: Time,
    /// The session inside, once there is one.
    session: Option<SessionId>,
    /// Bytes that the other end has not used up.
    sent: u32,
}

/// A call that waits for a session.
#[derive(Debug)]
struct Waiting {
    /// With whom a session is needed.
    needs: NodeId,
    /// Whom the call is for.
    to: NodeId,
    /// The hop that it came on; `None` for a call by this node.
    from: Option<Hop>,
    until: Time,
}

/// All that this node carries, and is carried for it.
#[derive(Debug, Default)]
pub(super) struct Carrier {
    links: BTreeMap<Hop, Link>,
    ends: BTreeMap<CarriedId, End>,
    waiting: Vec<Waiting>,
    numbers: u32,
    count: u64,
}

impl Carrier {
    /// Whether a connection with a member is on its way.
    pub(super) fn is_calling(&self, node: &NodeId) -> bool {
        self.ends.values().any(|end| end.peer == *node && end.dials && end.session.is_none())
            || self.waiting.iter().any(|call| call.to == *node && call.from.is_none())
    }

    /// Whether nothing is carried, and nobody waits for that.
    #[cfg(test)]
    pub(super) fn is_idle(&self) -> bool {
        self.links.is_empty() && self.ends.is_empty() && self.waiting.is_empty()
    }

    /// How many calls by others wait for a session.
    #[cfg(test)]
    pub(super) fn calls_waiting(&self) -> usize {
        self.waiting.iter().filter(|call| call.from.is_some()).count()
    }

    fn links_of(&self, session: SessionId) -> impl Iterator<Item = (&Hop, &Link)> {
        self.links.range((session, 0)..=(session, u32::MAX))
    }

    fn unproved(&self, dials: bool) -> impl Iterator<Item = &End> {
        self.ends.values().filter(move |end| end.dials == dials && end.session.is_none())
    }

    pub(super) fn through(&self) -> usize {
        self.links.values().filter(|link| matches!(link.to, To::Hop(_))).count()
    }

    /// A new number for a link; the two ends of a session count even and odd ones.
    fn number(&mut self, session: SessionId, odd: bool) -> u32 {
        loop {
            self.numbers = self.numbers.wrapping_add(1);
            let number = self.numbers << 1 | u32::from(odd);
            if !self.links.contains_key(&(session, number)) {
                return number;
            }
        }
    }

    fn add_end(&mut self, hop: Hop, peer: NodeId, dials: bool, now: Time) -> CarriedId {
        self.count += 1;
        let id = CarriedId(self.count);
        self.ends.insert(id, End { hop, peer, dials, begun: now, session: None, sent: 0 });
        self.links.insert(hop, Link { to: To::End(id), window: WINDOW });
        id
    }

    fn join(&mut self, a: Hop, b: Hop) {
        self.links.insert(a, Link { to: To::Hop(b), window: WINDOW });
        self.links.insert(b, Link { to: To::Hop(a), window: WINDOW });
    }

    /// When something has waited long enough.
    fn due(&self) -> Option<Time> {
        let waiting = self.waiting.iter().map(|call| call.until);
        let unproved = self.ends.values().filter(|end| end.session.is_none());
        waiting.chain(unproved.map(|end| end.begun + UNPROVED_FOR)).min()
    }
}

impl Node {
    // Calls.

    /// Calls a member through another one, the `turn`th that may do: both ends try them in the same order, as far as they
    /// reach them.
    pub(super) fn call_through(&mut self, node: NodeId, turn: usize) {
        if self.carrier.is_calling(&node)
            || self.carrier.unproved(true).count() >= MAX_UNPROVED
            || !self.is_reachable(&node)
        {
            return;
        }
        let carriers = self.carriers(&node);
        let Some(carrier) = turn.checked_rem(carriers.len()).map(|turn| carriers[turn]) else { return };
        tracing::debug!(peer = %node.short(), through = %carrier.short(), "calling");
        match self.direct_session_with(&carrier) {
            Some(session) => self.place_call(session, carrier, node),
            None => self.wait_for(carrier, node, None),
        }
    }

    /// The members that this node reaches itself, in an order that depends on the pair.
    fn carriers(&self, node: &NodeId) -> Vec<NodeId> {
        let Some(view) = &self.view else { return Vec::new() };
        let number = |id: &NodeId| u128::from_be_bytes(*id.as_bytes());
        let pair = number(&self.id) ^ number(node);
        let mut carriers: Vec<NodeId> = view
            .records()
            .map(|(id, _)| *id)
            .filter(|id| *id != self.id && id != node && self.is_reachable(id))
            .filter(|id| {
                // Who is behind a NAT may be reached by datagrams, and cannot be called.
                let is_callable = self.datagrams.address(id).is_some() && !self.is_mapped(id);
                is_callable || self.direct_session_with(id).is_some()
            })
            .collect();
        carriers.sort_unstable_by_key(|id| number(id) ^ pair);
        carriers
    }

    fn place_call(&mut self, session: SessionId, carrier: NodeId, to: NodeId) {
        if self.carrier.links_of(session).count() >= MAX_LINKS {
            return;
        }
        let link = self.carrier.number(session, self.id > carrier);
        let id = self.carrier.add_end((session, link), to, true, self.now);
        self.send(session, &Message::Call { link, to });
        self.emit(Output::Carried { id, what: CarriedOutput::Begin { dials: true } });
    }

    fn wait_for(&mut self, needs: NodeId, to: NodeId, from: Option<Hop>) {
        let session = from.map(|hop| hop.0);
        let of_one = self.carrier.waiting.iter().filter(|call| call.from.map(|hop| hop.0) == session);
        let most = if session.is_some() { MAX_WAITING_OF_ONE } else { MAX_WAITING };
        if of_one.count() >= most || self.carrier.waiting.len() >= MAX_WAITING {
            return from.into_iter().for_each(|hop| self.say_hang_up(hop, "too many calls wait"));
        }
        self.carrier.waiting.push(Waiting { needs, to, from, until: self.now + CALL_WAITS });
        self.want_session(needs);
    }

    /// There is a session with a member: what waited for it goes on.
    pub(super) fn carry_on(&mut self, peer: NodeId) {
        let Some(session) = self.direct_session_with(&peer) else { return };
        let waiting = std::mem::take(&mut self.carrier.waiting);
        let (ready, waiting): (Vec<_>, Vec<_>) = waiting.into_iter().partition(|call| call.needs == peer);
        self.carrier.waiting = waiting;
        for call in ready {
            match call.from {
                None => self.place_call(session, peer, call.to),
                Some(from) => self.connect(from, session, peer),
            }
        }
    }

    /// The carrier's part: from now on what comes on one hop goes to the other.
    fn connect(&mut self, from: Hop, session: SessionId, to: NodeId) {
        let Some(caller) = self.sessions.get(&from.0).map(|session| session.peer_id) else { return };
        let full = self.carrier.links_of(session).count() >= MAX_LINKS
            || self.carrier.links_of(from.0).count() >= MAX_LINKS
            || self.carrier.through() >= MAX_THROUGH;
        if full {
            return self.say_hang_up(from, "it carries as much as it can");
        }
        let link = self.carrier.number(session, self.id > to);
        self.carrier.join(from, (session, link));
        self.send(session, &Message::Called { link, from: caller });
    }

    // Messages of members.

    /// Another member wants this node to carry a connection.
    pub(super) fn on_call(&mut self, session: SessionId, peer: NodeId, link: u32, to: NodeId) {
        let hop = (session, link);
        if !self.may_begin(hop, &peer) {
            return;
        }
        let is_member = self.view.as_ref().is_some_and(|view| view.record(&to).is_some());
        if !is_member || to == self.id || to == peer {
            return self.say_hang_up(hop, "it does not reach that member");
        }
        match self.direct_session_with(&to) {
            Some(other) => self.connect(hop, other, to),
            None => self.wait_for(to, to, Some(hop)),
        }
    }

    /// A member brings a connection from another one.
    pub(super) fn on_called(&mut self, session: SessionId, peer: NodeId, link: u32, from: NodeId) {
        let hop = (session, link);
        if !self.may_begin(hop, &peer) {
            return;
        }
        let is_member = self.view.as_ref().is_some_and(|view| view.record(&from).is_some());
        if !is_member || from == self.id || from == peer {
            return self.say_hang_up(hop, "the caller is no member");
        }
        let of_one = self.carrier.unproved(false).filter(|end| end.hop.0 == session);
        let busy = of_one.count() >= MAX_UNPROVED_OF_ONE
            || self.carrier.unproved(false).count() >= MAX_UNPROVED
            || self.carrier.links_of(session).count() >= MAX_LINKS;
        if busy {
            return self.say_hang_up(hop, "too many calls at once");
        }
        let id = self.carrier.add_end(hop, from, false, self.now);
        self.emit(Output::Carried { id, what: CarriedOutput::Begin { dials: false } });
    }

    /// Whether the other end of a session may begin a link with that number.
    fn may_begin(&mut self, hop: Hop, peer: &NodeId) -> bool {
        let theirs = (hop.1 & 1 == 1) == (*peer > self.id);
        let taken = self.carrier.links.contains_key(&hop)
            || self.carrier.waiting.iter().any(|call| call.from == Some(hop));
        let direct = self.sessions.get(&hop.0).is_some_and(|session| session.way.is_direct());
        if theirs && !taken && direct && self.is_established() {
            return true;
        }
        tracing::debug!(peer = %peer.short(), "a call that cannot be");
        self.say_hang_up(hop, "not here");
        false
    }

    /// Bytes of a link have come.
    pub(super) fn on_carry(&mut self, session: SessionId, link: u32, bytes: Vec<u8>) {
        let hop = (session, link);
        // After it was hung up some may still come.
        let Some(entry) = self.carrier.links.get_mut(&hop) else { return };
        let len = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        if !(1..=PIECE).contains(&bytes.len()) || len > entry.window {
            return self.hang_up(hop, "more than may be on its way");
        }
        entry.window -= len;
        match entry.to {
            To::End(id) => self.emit(Output::Carried { id, what: CarriedOutput::Bytes(bytes) }),
            To::Hop((session, link)) => self.send(session, &Message::Carry { link, bytes }),
        }
    }

    /// The other end has used up bytes of a link.
    pub(super) fn on_taken(&mut self, session: SessionId, link: u32, bytes: u32) {
        let Some(to) = self.carrier.links.get(&(session, link)).map(|link| link.to) else { return };
        match to {
            To::End(id) => {
                let Some(end) = self.carrier.ends.get_mut(&id) else { return };
                let taken = bytes.min(end.sent);
                end.sent -= taken;
                if taken > 0 {
                    self.emit(Output::Carried { id, what: CarriedOutput::Credit(taken) });
                }
            }
            To::Hop(hop) => {
                let Some(other) = self.carrier.links.get_mut(&hop) else { return };
                let taken = bytes.min(WINDOW - other.window);
                other.window += taken;
                if taken > 0 {
                    self.send(hop.0, &Message::Taken { link: hop.1, bytes: taken });
                }
            }
        }
    }

    /// The other end of a link is gone.
    pub(super) fn on_hang_up(&mut self, session: SessionId, link: u32, reason: &str) {
        let printable: String = reason.chars().filter(|c| !c.is_control()).take(MAX_REASON).collect();
        self.drop_link((session, link), &printable);
    }

    // What the shell tells.

    /// Something has happened with a connection of which this node is an end.
    pub(super) fn on_carried(&mut self, id: CarriedId, what: CarriedInput) {
        let Some(end) = self.carrier.ends.get_mut(&id) else { return };
        let (session, link) = end.hop;
        match what {
            CarriedInput::Bytes(bytes) => {
                end.sent = end.sent.saturating_add(u32::try_from(bytes.len()).unwrap_or(u32::MAX));
                self.send(session, &Message::Carry { link, bytes });
            }
            CarriedInput::Taken(bytes) => {
                if let Some(entry) = self.carrier.links.get_mut(&(session, link)) {
                    entry.window = entry.window.saturating_add(bytes).min(WINDOW);
                }
                self.send(session, &Message::Taken { link, bytes });
            }
            CarriedInput::Ended(reason) => self.hang_up((session, link), &reason),
        }
    }

    /// Both ends of a carried connection have proved who they are.
    pub(super) fn on_carried_opened(
        &mut self,
        id: CarriedId,
        session: SessionId,
        peer: IdentityKey,
        secrets: SessionSecrets,
    ) {
        let carrier = self.carrier.ends.get(&id).and_then(|end| self.sessions.get(&end.hop.0));
        let carrier = carrier.map(|session| session.peer_id);
        let end = self.carrier.ends.get_mut(&id).filter(|end| end.peer == peer.node_id());
        let (Some(end), Some(carrier)) = (end, carrier) else {
            // It was hung up meanwhile, or the carrier has brought somebody else.
            return self.emit(Output::Close { session, reason: "it is not who was called".to_owned() });
        };
        end.session = Some(session);
        let way = Way::Through { carrier, dialled: end.dials };
        self.on_session_opened(session, peer, way, secrets);
    }

    // The end.

    /// Ends a link, and says so in both directions.
    fn hang_up(&mut self, hop: Hop, reason: &str) {
        self.say_hang_up(hop, reason);
        self.drop_link(hop, reason);
    }

    fn say_hang_up(&mut self, (session, link): Hop, reason: &str) {
        let reason = reason.chars().take(MAX_REASON).collect();
        self.send(session, &Message::HangUp { link, reason });
    }

    /// A link has ended on one side, where this is known already: the other is told.
    fn drop_link(&mut self, hop: Hop, reason: &str) {
        self.carrier.waiting.retain(|call| call.from != Some(hop));
        match self.carrier.links.remove(&hop).map(|link| link.to) {
            None => {}
            Some(To::Hop(other)) => {
                self.carrier.links.remove(&other);
                self.say_hang_up(other, reason);
            }
            Some(To::End(id)) => {
                if let Some(end) = self.carrier.ends.remove(&id)
                    && end.dials
                    && end.session.is_none()
                {
                    self.dialer.on_not_carried(end.peer, reason);
                }
                self.emit(Output::Carried { id, what: CarriedOutput::End });
            }
        }
    }

    /// A session is gone, and with it what it carried.
    pub(super) fn carry_no_more(&mut self, session: SessionId) {
        let hops: Vec<Hop> = self.carrier.links_of(session).map(|(hop, _)| *hop).collect();
        hops.into_iter().for_each(|hop| self.drop_link(hop, "the carrier has lost the session"));
        self.carrier.waiting.retain(|call| call.from.is_none_or(|hop| hop.0 != session));
    }

    /// Ends what has waited long enough.
    pub(super) fn sweep_carried(&mut self) {
        let now = self.now;
        if self.carrier.due().is_none_or(|due| due > now) {
            return;
        }
        let waiting = std::mem::take(&mut self.carrier.waiting);
        let (over, waiting): (Vec<_>, Vec<_>) = waiting.into_iter().partition(|call| call.until <= now);
        self.carrier.waiting = waiting;
        for call in over {
            match call.from {
                Some(hop) => self.say_hang_up(hop, "the carrier does not reach it either"),
                None => self.dialer.on_not_carried(call.to, "no member that could carry the session answers"),
            }
        }
        let unproved = self.carrier.ends.values().filter(|end| end.session.is_none());
        let over: Vec<Hop> =
            unproved.filter(|end| end.begun + UNPROVED_FOR <= now).map(|end| end.hop).collect();
        over.into_iter().for_each(|hop| self.hang_up(hop, "nothing came of it in time"));
    }

    pub(super) fn carried_deadline(&self) -> Option<Time> {
        self.carrier.due()
    }
}

/// Longest reason for hanging up, in characters.
const MAX_REASON: usize = 200;
