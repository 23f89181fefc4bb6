//! Gossip datagrams: each is sealed for the member that it goes to, and where that is.
//!
//! The first datagram of a member's start may be a repetition of an old one; nothing in it can tell. It is believed as
//! far as that does no harm: what it says is signed, and it gets at most one datagram in answer, a few times a second.
//! With that goes a ping: the answer to it proves that the member sent it now.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use mesh_keys::frame::{
    GroupKey, GroupKeyId, Header, MAX_DATAGRAM, MAX_KEYS, OpenError, Opened, Opener, SealError, Sealer,
    ShortId,
};
use mesh_keys::sorted_map::SortedMap;
use mesh_keys::{Identity, IdentityKey, NodeId, PairSecret};
use rand_chacha::ChaCha20Rng;

use super::paths::Origin;
use super::{Node, Output};
use crate::gossip::Event;
use crate::gossip::wire::{self, Part};
use crate::message::Message;
use crate::state::{StateFile, StoredGroup};
use crate::time::Time;

/// Starts of members whose datagrams are told from repetitions: more than there are members.
const MAX_SENDERS: usize = 32_768;

/// Secrets that are kept: more than there are members in most clusters. In a large one a node talks to another one each
/// time, and computes some ten secrets a second anew, each in some 40 µs.
const MAX_SECRETS: usize = 256;

/// An address that was silent for this long is not the only one tried.
const STALE: Duration = Duration::from_secs(10);

/// A member that was silent for this long, and speaks from another address, is there now.
const MOVED: Duration = Duration::from_secs(2);

/// Addresses tried at a time, while none is known to work.
const TRIED: u16 = 3;

/// Datagrams a second that are answered without proof that they are new: from one member, and from all.
const UNPROVED_OF_ONE: u32 = 4;
const UNPROVED_OF_ALL: u32 = 64;

/// Pause between two answers to a node that was removed.
const REMOVED_PAUSE: Duration = Duration::from_secs(5);

/// The keys of the group, the highest epoch last; and what is known of the ways to the members.
#[derive(Debug)]
pub(super) struct Datagrams {
    keys: BTreeMap<(u64, GroupKeyId), GroupKey>,
    sealer: Option<Sealer>,
    opener: Opener,
    secrets: Secrets,
    contacts: SortedMap<NodeId, Contact>,
    unproved: PerSecond<UNPROVED_OF_ONE, UNPROVED_OF_ALL>,
    /// When nodes that were removed were last told so.
    told_removed: Option<Time>,
}

/// Secrets shared with members, those that were used lately: computing one takes longer than sealing a datagram.
#[derive(Debug, Default)]
struct Secrets {
    known: BTreeMap<NodeId, (u64, PairSecret)>,
    used: BTreeMap<u64, NodeId>,
    count: u64,
}

impl Secrets {
    /// The secret with `node`, whose key is `key`.
    fn with(&mut self, identity: &Identity, node: NodeId, key: &IdentityKey) -> Option<PairSecret> {
        self.count += 1;
        let secret = match self.known.remove(&node) {
            Some((used, secret)) => {
                self.used.remove(&used);
                secret
            }
            None => identity.agree(key)?,
        };
        self.known.insert(node, (self.count, secret.clone()));
        self.used.insert(self.count, node);
        if self.known.len() > MAX_SECRETS
            && let Some((_, oldest)) = self.used.pop_first()
        {
            self.known.remove(&oldest);
        }
        Some(secret)
    }
}

/// The way to a member; there are thousands.
#[derive(Debug)]
struct Contact {
    /// Where its datagrams come from, those that were proved to be new: IPv4 addresses mapped (RFC 4291, section 2.5.5.2),
    /// and port 0 when that is not known.
    ip: Ipv6Addr,
    port: u16,
    /// Which of its addresses are tried next.
    turn: u16,
    heard: Time,
}

impl Default for Contact {
    fn default() -> Self {
        Self { ip: Ipv6Addr::UNSPECIFIED, port: 0, turn: 0, heard: Time::ZERO }
    }
}

impl Contact {
    fn address(&self) -> Option<SocketAddr> {
        (self.port > 0).then(|| SocketAddr::new(self.ip.to_canonical(), self.port))
    }

    fn set_address(&mut self, address: SocketAddr) {
        self.ip = match address.ip() {
            IpAddr::V4(v4) => v4.to_ipv6_mapped(),
            IpAddr::V6(v6) => v6,
        };
        self.port = address.port();
    }

    fn is_fresh(&self, now: Time) -> bool {
        self.port > 0 && now.since(self.heard) < STALE
    }
}

/// What is done for others in the second since `since`: so often for one of them, and for all.
#[derive(Debug, Default)]
pub(super) struct PerSecond<const OF_ONE: u32, const OF_ALL: u32> {
    since: Time,
    of_all: u32,
    of: BTreeMap<NodeId, u32>,
}

impl<const OF_ONE: u32, const OF_ALL: u32> PerSecond<OF_ONE, OF_ALL> {
    /// Whether it may be done for `node` once more.
    pub(super) fn take(&mut self, node: NodeId, now: Time) -> bool {
        if now.since(self.since) >= Duration::from_secs(1) {
            *self = Self { since: now, ..Self::default() };
        }
        let of_one = self.of.get(&node).copied().unwrap_or(0);
        let may = of_one < OF_ONE && self.of_all < OF_ALL;
        if may {
            self.of_all += 1;
            self.of.insert(node, of_one + 1);
        }
        may
    }
}

impl Datagrams {
    /// Those that were on disk.
    pub(super) fn restore(stored: StoredGroup, me: NodeId, rng: &mut ChaCha20Rng) -> Self {
        let mut datagrams = Self {
            keys: BTreeMap::new(),
            sealer: None,
            opener: Opener::without_keys(me, MAX_SENDERS),
            secrets: Secrets::default(),
            contacts: SortedMap::new(),
            unproved: PerSecond::default(),
            told_removed: None,
        };
        datagrams.add(stored.keys, me, rng);
        datagrams
    }

    pub(super) fn stored(&self) -> StoredGroup {
        StoredGroup { keys: self.keys.iter().map(|((epoch, _), key)| (*epoch, key.clone())).collect() }
    }

    fn has_keys(&self) -> bool {
        self.sealer.is_some()
    }

    /// Takes keys over; whether there was a new one. The newest are kept.
    fn add(&mut self, keys: Vec<(u64, GroupKey)>, me: NodeId, rng: &mut ChaCha20Rng) -> bool {
        let before: Vec<_> = self.keys.keys().copied().collect();
        self.keys.extend(keys.into_iter().map(|(epoch, key)| ((epoch, key.id()), key)));
        while self.keys.len() > MAX_KEYS {
            self.keys.pop_first();
        }
        if self.keys.keys().copied().eq(before) {
            return false;
        }
        let keys: Vec<GroupKey> = self.keys.values().cloned().collect();
        if let Err(error) = self.opener.replace_keys(&keys) {
            tracing::error!(%error, "the group keys cannot be used");
        }
        if let Some(newest) = keys.last() {
            match &mut self.sealer {
                Some(sealer) => sealer.rekey(newest),
                None => self.sealer = Some(Sealer::new(newest, me, rng)),
            }
        }
        true
    }

    /// Where a member's datagrams come from.
    pub(super) fn address(&self, node: &NodeId) -> Option<SocketAddr> {
        self.contacts.get(node)?.address()
    }

    /// When a datagram has come from a member itself last.
    pub(super) fn heard(&self, node: &NodeId) -> Option<Time> {
        self.contacts.get(node).filter(|contact| contact.port > 0).map(|contact| contact.heard)
    }

    /// Whether datagrams have come from a member a moment ago, and so get there.
    pub(super) fn is_fresh(&self, node: &NodeId, now: Time) -> bool {
        self.contacts.get(node).is_some_and(|contact| contact.is_fresh(now))
    }

    /// There are so many members.
    pub(super) fn reserve(&mut self, members: usize) {
        self.contacts.reserve(members);
        self.opener.reserve(members);
    }

    /// Forgets the members that `keep` does not say.
    pub(super) fn retain(&mut self, keep: impl Fn(&NodeId) -> bool) {
        self.contacts.retain(|id, _| keep(id));
    }
}

impl Node {
    /// A cluster is founded: its members will share this key.
    pub(super) fn make_group_key(&mut self) {
        if !self.datagrams.has_keys() {
            let key = GroupKey::generate(&mut self.rng);
            self.add_group_keys(vec![(0, key)]);
        }
    }

    /// A member hands on the keys of the group: to one that has none. Nobody can change them by his word alone.
    pub(super) fn add_group_keys(&mut self, keys: Vec<(u64, GroupKey)>) {
        if !self.datagrams.has_keys() && self.datagrams.add(keys, self.id, &mut self.rng) {
            self.dirty.insert(StateFile::Group);
        }
    }

    /// The keys of the group, for another member.
    pub(super) fn group_keys(&self) -> Message {
        Message::GroupKeys { keys: self.datagrams.stored().into() }
    }

    pub(super) fn on_datagram(&mut self, from: SocketAddr, to: Option<IpAddr>, bytes: &[u8]) {
        let Some((opened, proved)) = self.open(from, bytes) else { return };
        let sender = opened.sender;
        if self.gossip.as_ref().is_none_or(|gossip| !gossip.is_member(&sender)) {
            return self.tell_removed(sender, from);
        }
        if bytes.len() > MAX_DATAGRAM {
            // Only what measures a way may be that long.
            if let (Some(Ok(Part::Measure { number })), true) = (wire::read(&opened.payload).next(), proved) {
                self.on_measure(sender, from, number, bytes.len());
            }
            return;
        }
        let parts: Vec<Part> = wire::read(&opened.payload).flatten().filter(Part::is_of_paths).collect();
        // That one comes from the port of a lane.
        let is_hello = parts.iter().any(|part| matches!(part, Part::LaneHello { .. }));
        if proved && !is_hello {
            self.heard_from(sender, from);
        }
        self.gossip_received(sender, &opened.payload, proved);
        self.send_gossip(Some((sender, from)), if proved { usize::MAX } else { 1 });
        let mut passed_from = None;
        for part in parts {
            if let Part::PassedFrom { address } = part {
                passed_from = Some(address);
            } else if let Part::Passed { datagram } = &part {
                if proved {
                    self.on_passed(sender, passed_from.take(), datagram);
                }
            } else {
                self.on_path_part(sender, Origin::Address(from, to), part, proved);
            }
        }
    }

    /// A relay hands on what a member has sealed for this node; and sees that one at `source`.
    fn on_passed(&mut self, relay: NodeId, source: Option<SocketAddr>, bytes: &[u8]) {
        let from = self.datagrams.address(&relay);
        let Some((opened, proved)) = from.and_then(|from| self.open(from, bytes)) else { return };
        let sender = opened.sender;
        if sender == relay || self.gossip.as_ref().is_none_or(|gossip| !gossip.is_member(&sender)) {
            return;
        }
        let mut lane = None;
        for part in wire::read(&opened.payload).flatten() {
            if let Part::LaneAt { address } = part {
                lane = Some(address);
            } else if matches!(part, Part::Probe { .. } | Part::ProbeAnswer { .. } | Part::LaneTraffic { .. })
            {
                // Nothing is handed on twice.
                self.on_path_part(sender, Origin::Relay(relay), part, proved);
            }
        }
        if let Some(source) = source.filter(|_| proved) {
            self.mapped_at(sender, source, lane);
        }
    }

    /// Opens a datagram; and whether it was sent now. One that may be old is for the caller only if it may be answered.
    fn open(&mut self, from: SocketAddr, bytes: &[u8]) -> Option<(Opened, bool)> {
        let gossip = self.gossip.as_ref()?;
        let members = self.view.as_ref().map(crate::view::View::admissions);
        let known = |short: &ShortId| {
            gossip.member_with(short).or_else(|| members.and_then(|members| members.removed_with(short)))
        };
        let (identity, secrets) = (&self.identity, &mut self.datagrams.secrets);
        let pair = |node: &NodeId| secrets.with(identity, *node, &members?.known_key(node)?);
        let opened = match self.datagrams.opener.open(bytes, known, pair) {
            Ok(opened) => opened,
            Err(OpenError::UnknownKey { .. }) if !self.datagrams.has_keys() => {
                self.on_unknown_key(bytes);
                return None;
            }
            Err(error) => {
                tracing::debug!(%from, %error, "datagram dropped");
                return None;
            }
        };
        let sender = opened.sender;
        if !gossip.is_member(&sender) {
            return Some((opened, false));
        }
        let proves = |part: &Part| gossip.proves(&sender, part) || self.paths.proves(&sender, part);
        let proved = !opened.first_contact || wire::read(&opened.payload).flatten().any(|part| proves(&part));
        if proved {
            self.datagrams.opener.accept(&opened);
        } else if !self.datagrams.unproved.take(sender, self.now) {
            return None;
        }
        Some((opened, proved))
    }

    /// A member speaks now, from this address.
    fn heard_from(&mut self, sender: NodeId, from: SocketAddr) {
        let now = self.now;
        let contact = self.datagrams.contacts.entry_or_default(sender);
        // A member with several addresses may use one and the other; one is enough.
        let address = contact.address();
        if address == Some(from) {
            contact.heard = now;
        } else if address.is_none() || now.since(contact.heard) >= MOVED {
            tracing::debug!(peer = %sender.short(), %from, "datagrams come from here");
            contact.set_address(from);
            contact.heard = now;
            self.stale = true;
            self.path_reached(&sender);
            if address.is_some() {
                self.peer_moved(sender);
                self.relay_moved(&sender);
            }
        }
    }

    /// This node has no key of the group, and a member has one. Anybody can make it believe so, but only as long as it
    /// has none.
    fn on_unknown_key(&mut self, bytes: &[u8]) {
        let sender = Header::parse(bytes)
            .ok()
            .and_then(|header| self.gossip.as_ref()?.member_with(&header.sender))
            .filter(|sender| !self.dialer.is_waiting(sender));
        if let Some(sender) = sender {
            tracing::debug!(peer = %sender.short(), "a datagram under a key of the group that is not known here");
            let keys = self.group_keys();
            self.tell(sender, keys);
        }
    }

    /// A node that was removed is still there: it hears why nobody answers.
    fn tell_removed(&mut self, node: NodeId, from: SocketAddr) {
        if self.datagrams.told_removed.is_some_and(|at| self.now.since(at) < REMOVED_PAUSE) {
            return;
        }
        let Some(item) = self.removal_item(&node) else { return };
        self.datagrams.told_removed = Some(self.now);
        let mut writer = wire::Writer::default();
        if writer.push(&item) {
            self.seal_to(node, from, &writer.take());
        }
    }

    /// Sends what gossip wants to say, at most `most` datagrams. `answer` is who gets an answer, and where.
    pub(super) fn send_gossip(&mut self, answer: Option<(NodeId, SocketAddr)>, most: usize) {
        let events = self.gossip.as_mut().map(crate::gossip::Gossip::take_events).unwrap_or_default();
        let mut sent = 0;
        for event in events {
            match event {
                Event::Send { to, payload } => {
                    sent += 1;
                    match answer {
                        _ if sent > most => {}
                        Some((node, address)) if node == to => self.seal_to(to, address, &payload),
                        _ => self.send_payload(to, &payload),
                    }
                }
                Event::Reachable { node, reachable } => {
                    tracing::info!(peer = %node.short(), reachable, "reachable by gossip");
                }
                Event::Fetch { from, name } => self.tell(from, Message::Want { names: vec![name] }),
                Event::Copied { .. } => self.on_copied(self.stored.generation, false),
            }
        }
    }

    /// Sends a payload to a member, by the way that works or by several that may.
    pub(super) fn send_payload(&mut self, to: NodeId, payload: &[u8]) {
        let now = self.now;
        let contact = self.datagrams.contacts.entry_or_default(to);
        let (fresh, address, turn) = (contact.is_fresh(now), contact.address(), usize::from(contact.turn));
        if let Some(address) = address {
            self.seal_to(to, address, payload);
            if fresh {
                return;
            }
        }
        if let Some(session) = self.direct_session_with(&to) {
            self.send(session, &Message::Gossip { payload: payload.to_vec() });
        }
        let tried = if address.is_some() { 1 } else { TRIED };
        let others: Vec<SocketAddr> = self
            .addresses_of(&to, self.dialer.last_good(&to))
            .into_iter()
            .filter(|candidate| Some(*candidate) != address)
            .collect();
        let count = others.len();
        for candidate in others.iter().cycle().skip(turn % count.max(1)).take(usize::from(tried).min(count)) {
            self.seal_to(to, *candidate, payload);
        }
        if let Some(contact) = self.datagrams.contacts.get_mut(&to) {
            contact.turn = contact.turn.wrapping_add(tried);
        }
    }

    pub(super) fn seal_to(&mut self, node: NodeId, to: SocketAddr, payload: &[u8]) {
        if let Some(bytes) = self.sealed(&node, payload) {
            self.emit(Output::Datagram { to, bytes });
        }
    }

    /// A payload as a datagram for a member.
    pub(super) fn sealed(&mut self, node: &NodeId, payload: &[u8]) -> Option<Vec<u8>> {
        self.sealed_by(node, |sealer, secret| sealer.seal(node, secret, payload))
    }

    /// The same for one that measures a way.
    pub(super) fn sealed_long(&mut self, node: &NodeId, payload: &[u8]) -> Option<Vec<u8>> {
        self.sealed_by(node, |sealer, secret| sealer.seal_long(node, secret, payload))
    }

    fn sealed_by(
        &mut self,
        node: &NodeId,
        seal: impl FnOnce(&mut Sealer, &PairSecret) -> Result<Vec<u8>, SealError>,
    ) -> Option<Vec<u8>> {
        let key = self.view.as_ref()?.admissions().known_key(node)?;
        let sealer = self.datagrams.sealer.as_mut()?;
        let secret = self.datagrams.secrets.with(&self.identity, *node, &key)?;
        seal(sealer, &secret)
            .inspect_err(|error| tracing::error!(%error, "a gossip payload cannot be sent"))
            .ok()
    }
}
