//! Keeping all copies of the view equal, by [`crate::gossip`].
//!
//! Datagrams carry it ([`super::datagrams`]). What does not fit into one is asked for on a control session.

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::time::Duration;

use mesh_keys::{Identity, NodeId, Signed, WgPublic};
use rand_core::RngCore as _;

use super::desired::HANDSHAKE_STALE;
use super::sessions::{Session, Way};
use super::writing::MAX_LATER;
use super::{Node, SessionId, TunnelFacts};
use crate::gossip::catalogue::{Kind, Name};
use crate::gossip::liveness::{Life, Statement};
use crate::gossip::wire::{Part, Writer};
use crate::gossip::{Gossip, Offered, Store};
use crate::message::{Message, RefusalCode};
use crate::state::StateFile;
use crate::time::Time;
use crate::view::{Delta, LaneInfo, NodeRecord, Promises, View};

/// Most items in one push: checking their signatures takes some 10 ms. More are refused.
pub(super) const PUSH_ITEMS: usize = 256;

/// Most bytes in one push, but for a single item that is longer; and in all that answers one question.
const PUSH_BYTES: usize = 256 << 10;
const ANSWER_BYTES: usize = 2 << 20;

/// Promises that come in are looked at this long after the first.
const SETTLE_AFTER: Duration = Duration::from_millis(200);

/// Items that are kept until what they rest on is known.
const MAX_EARLY: usize = 256;

/// First pause before an heir is told again what this node promises, doubled each time, and the longest.
const TELL_HEIRS: Duration = Duration::from_millis(500);
const TELL_HEIRS_MAX: Duration = Duration::from_secs(30);

/// An heir that has said that it knows is asked after this time whether it still does.
const ASK_HEIRS: Duration = Duration::from_secs(300);

/// Promises that are too long for a datagram are sent again after this time at the earliest.
const PUSH_AGAIN: Duration = Duration::from_secs(10);

/// Heirs to which promises are handed on at a time.
const HANDED_ON: usize = 8;

/// Members that an heir has tell it long promises in a second, each in a control session.
const MAX_LONG: u32 = 20;

impl Kind {
    /// The sender has promises of the version that follows, and asks whether the receiver knows.
    const PROMISES_MADE: Self = Self(0x30);
    /// Of the receiver's promises the sender knows the version that follows; 0 if none.
    const PROMISES_KNOWN: Self = Self(0x31);
}

/// Whom this node's promises concern, and what they know of them.
#[derive(Debug, Default)]
pub(super) struct Heirs {
    /// When they are told again.
    next: Option<Time>,
    pause: Duration,
    all: BTreeMap<NodeId, Heir>,
    /// Members that were asked for long promises: since when, how many.
    asked: (Time, u32),
}

/// What an heir knows of this node's promises.
#[derive(Clone, Copy, Debug, Default)]
struct Heir {
    /// Start of the heir, version it said it knows, and when.
    known: Option<(u64, u64, Time)>,
    /// When they were last sent in a session.
    pushed: Option<Time>,
}

/// What a member says about promises, not to be kept.
#[derive(Debug, Default)]
struct Words {
    /// It wants to know what is known of its promises; they are of this version at least.
    asks: Option<u64>,
    /// It knows this version of this node's promises.
    knows: Option<u64>,
    /// Promises that came, as an item.
    promises: Option<Vec<u8>>,
}

/// Items that came before what they rest on, the latest last.
#[derive(Debug, Default)]
pub(super) struct Early(VecDeque<(Kind, Vec<u8>)>);

/// What gossip has changed in the view.
#[derive(Debug, Default)]
struct Learned {
    new: Delta,
    gone: Vec<Name>,
}

/// The view as gossip sees it.
struct Shelf<'a> {
    view: &'a mut View,
    identity: &'a Identity,
    early: &'a mut Early,
    /// Not to be shown yet: see [`Node::promises_wait`].
    hidden: Option<Name>,
    learned: Learned,
    words: Words,
}

impl Shelf<'_> {
    fn take(&mut self, kind: Kind, item: &[u8]) -> Offered {
        let delta = match Delta::of_item(kind, item) {
            Some(Ok(delta)) => delta,
            // A newer version's.
            None => return Offered::Refused,
            Some(Err(error)) => {
                tracing::debug!(kind = kind.0, %error, "malformed item");
                return Offered::Refused;
            }
        };
        let merged = self.view.merge(&delta);
        for refused in &merged.refused {
            tracing::debug!(refused, "item refused");
        }
        self.learned.gone.extend(merged.gone);
        if !merged.new.is_empty() {
            self.learned.new.append(merged.new);
            return Offered::Known;
        }
        if merged.early > 0 && !self.early.0.iter().any(|(_, other)| *other == item) {
            if self.early.0.len() >= MAX_EARLY {
                self.early.0.pop_front();
            }
            self.early.0.push_back((kind, item.to_vec()));
        }
        if merged.refused.is_empty() { Offered::Known } else { Offered::Refused }
    }
}

impl Store for Shelf<'_> {
    fn item(&self, name: &Name) -> Option<Vec<u8>> {
        self.view.item(name).filter(|_| self.hidden != Some(*name))
    }

    /// What is new is published by [`Node::learned`], with all that it brings about.
    fn offer(&mut self, kind: Kind, item: &[u8]) -> Offered {
        if matches!(kind, Kind::PROMISES_MADE | Kind::PROMISES_KNOWN) {
            let Ok(version) = <[u8; 8]>::try_from(item).map(u64::from_le_bytes) else {
                return Offered::Refused;
            };
            let place =
                if kind == Kind::PROMISES_MADE { &mut self.words.asks } else { &mut self.words.knows };
            *place = Some(version);
            return Offered::Known;
        }
        if kind == Kind::PROMISES {
            self.words.asks.get_or_insert(0);
            self.words.promises = Some(item.to_vec());
        }
        let before = self.learned.new.len();
        let offered = self.take(kind, item);
        // What waited for it goes in after it, and what waited for that.
        let founds = matches!(kind, Kind::ADMISSION | Kind::REMOVAL | Kind::RECLAIM | Kind::GRANT);
        let mut grown = self.learned.new.len() > before && founds;
        while grown && !self.early.0.is_empty() {
            let before = self.learned.new.len();
            for (kind, item) in std::mem::take(&mut self.early.0) {
                self.take(kind, &item);
            }
            grown = self.learned.new.len() > before;
        }
        offered
    }

    fn check(&self, statement: &Signed<Statement>, signer: &NodeId) -> bool {
        self.view.key_of(signer).is_some_and(|key| statement.verify(&key).is_ok())
    }

    fn sign(&self, subject: NodeId, life: Life) -> Option<Signed<Statement>> {
        Statement::sign(&self.view.cluster(), subject, life, self.identity).ok()
    }
}

impl Node {
    /// Begins with all that the view has.
    pub(super) fn start_gossip(&mut self) {
        let Some(view) = &self.view else { return };
        let mut seed = [0; 32];
        self.rng.fill_bytes(&mut seed);
        let mut gossip = Gossip::new(self.id, view.cluster(), self.stored.generation, seed, self.now);
        let members = view.records().count();
        gossip.start_with(view.catalogue(), members);
        self.datagrams.reserve(members);
        for (id, record) in view.records() {
            gossip.add_member(*id, record.generation);
        }
        self.gossip = Some(gossip);
        self.heirs.next = Some(self.now);
        self.heirs.pause = TELL_HEIRS;
        let members: Vec<NodeId> = view.records().map(|(id, _)| *id).collect();
        for member in members {
            self.pair_record_changed(&member);
        }
        // Of another start it may have heard before it was started itself.
        let own = self.view.as_ref().and_then(|view| view.record(&self.id));
        if let Some(record) = own.filter(|record| record.start != self.standing.start).cloned() {
            self.on_own_record(&record);
        }
    }

    /// Lets gossip act on the view, and draws the consequences.
    fn with_gossip(&mut self, act: impl FnOnce(&mut Gossip, &mut Shelf<'_>, Time)) -> Words {
        let hidden = self.hidden();
        let (Some(gossip), Some(view)) = (&mut self.gossip, &mut self.view) else { return Words::default() };
        let mut shelf = Shelf {
            view,
            identity: &self.identity,
            early: &mut self.early,
            hidden,
            learned: Learned::default(),
            words: Words::default(),
        };
        act(gossip, &mut shelf, self.now);
        let (Learned { new, gone }, words) = (shelf.learned, shelf.words);
        self.learned(&new, &gone);
        words
    }

    /// A payload came from a member. `proved`: it was sent just now, and not repeated by somebody else.
    pub(super) fn gossip_received(&mut self, from: NodeId, payload: &[u8], proved: bool) {
        let words = self.with_gossip(|gossip, shelf, now| {
            gossip.receive(from, payload, proved, shelf, now);
        });
        if proved {
            self.heed_words(from, &words);
        }
    }

    /// What is new is told to some members now, not in a moment.
    pub(super) fn say_now(&mut self) {
        self.with_gossip(|gossip, shelf, now| gossip.push(shelf, now));
        self.send_gossip(None, usize::MAX);
    }

    pub(super) fn advance_gossip(&mut self) {
        if self.gossip.as_ref().is_some_and(|gossip| gossip.poll_timeout() <= self.now) {
            self.with_gossip(|gossip, shelf, now| gossip.tick(shelf, now));
        }
        if self.next_settle.is_some_and(|at| at <= self.now) {
            self.next_settle = None;
            self.settle_addresses();
        }
        if self.heirs.next.is_some_and(|at| at <= self.now) {
            self.tell_heirs();
        }
        self.send_gossip(None, usize::MAX);
    }

    pub(super) fn gossip_deadline(&self) -> Option<Time> {
        self.gossip
            .as_ref()
            .map(Gossip::poll_timeout)
            .into_iter()
            .chain(self.heirs.next)
            .chain(self.next_settle)
            .min()
    }

    pub(super) fn on_member_message(&mut self, session: SessionId, peer: NodeId, message: Message) {
        let hidden = self.hidden();
        let Some(view) = &mut self.view else { return };
        match message {
            Message::Gossip { payload } => {
                self.gossip_received(peer, &payload, true);
                self.send_gossip(None, usize::MAX);
            }
            Message::GroupKeys { keys } => {
                let keys: crate::state::StoredGroup = keys.into();
                self.add_group_keys(keys.keys);
            }
            Message::Want { names } => {
                let mut delta = Delta::default();
                let mut room = ANSWER_BYTES;
                for name in names.iter().take(PUSH_ITEMS).filter(|name| hidden != Some(**name)) {
                    let Some(item) = view.item(name) else { continue };
                    // What finds no room is asked for again, when views are compared.
                    if item.len() > room && !delta.is_empty() {
                        break;
                    }
                    if let Some(Ok(item)) = Delta::of_item(name.kind, &item) {
                        delta.append(item);
                    }
                    room = room.saturating_sub(item.len());
                }
                for delta in delta.chunks(PUSH_ITEMS, PUSH_BYTES) {
                    self.send(session, &Message::Push { delta });
                }
            }
            Message::Push { delta } if delta.len() > PUSH_ITEMS => {
                let reason = format!("a push of {} items, and {PUSH_ITEMS} are allowed", delta.len());
                tracing::warn!(peer = %peer.short(), "refused: {reason}");
                self.refuse(session, RefusalCode::Protocol, &reason);
            }
            Message::Push { delta } => {
                let merged = view.merge(&delta);
                for refused in &merged.refused {
                    tracing::debug!(peer = %peer.short(), refused, "part of a push was refused");
                }
                self.learned(&merged.new, &merged.gone);
                if !delta.promises.is_empty() {
                    self.heed_words(peer, &Words { asks: Some(0), ..Words::default() });
                }
            }
            Message::YourRecord { generation, start } => self.on_your_record(generation, start),
            Message::Seen { address } => {
                let dialled = |entry: &Session| matches!(entry.way, Way::Dialled(_));
                if self.sessions.get(&session).is_some_and(dialled) {
                    self.seen_at(peer, address);
                }
            }
            Message::GrantAsk => self.on_grant_ask(peer),
            Message::PskProbe { keys, epoch, check } => self.on_psk_probe(session, peer, keys, epoch, check),
            Message::PskAnswer { epoch, check } => self.on_psk_answer(session, peer, epoch, check),
            Message::PskOffer { keys, epoch, check } => self.on_psk_offer(session, peer, keys, epoch, check),
            Message::PskStaged { epoch, check } => self.on_psk_staged(session, peer, epoch, check),
            Message::PskCommit { epoch, check } => self.on_psk_commit(session, peer, epoch, check),
            Message::Call { link, to } => self.on_call(session, peer, link, to),
            Message::Called { link, from } => self.on_called(session, peer, link, from),
            Message::Carry { link, bytes } => self.on_carry(session, link, bytes),
            Message::Taken { link, bytes } => self.on_taken(session, link, bytes),
            Message::HangUp { link, reason } => self.on_hang_up(session, link, &reason),
            // A joiner that was welcomed says hello as a member, possibly after we took it for one.
            Message::Hello(_) => {}
            message @ (Message::Refuse(_)
            | Message::JoinOffer { .. }
            | Message::JoinKey { .. }
            | Message::JoinKeyOk { .. }
            | Message::JoinPassword { .. }
            | Message::JoinPasswordAnswer { .. }
            | Message::JoinPasswordFinish { .. }
            | Message::JoinPasswordOk
            | Message::JoinAsk
            | Message::Welcome { .. }
            | Message::WelcomePart { .. }
            | Message::WelcomeNext
            | Message::TokenAsk { .. }
            | Message::TokenProof { .. }
            | Message::JoinToken { .. }
            | Message::JoinTokenOk) => {
                let reason = format!("a {} does not belong here", message.kind());
                self.refuse(session, RefusalCode::Protocol, &reason);
            }
        }
    }

    /// The view has grown by `new`, and has lost `gone` by it.
    pub(super) fn learned(&mut self, new: &Delta, gone: &[Name]) {
        if !new.is_empty() {
            self.take_news(new);
        }
        // Last: something may have come and gone at once.
        if let Some(gossip) = &mut self.gossip {
            gone.iter().for_each(|name| gossip.remove(*name));
        }
    }

    fn take_news(&mut self, new: &Delta) {
        self.stale = true;
        if new.records.len() < new.len() {
            self.dirty.insert(StateFile::Cluster);
        } else {
            self.dirty_later.get_or_insert(self.now + MAX_LATER);
        }
        self.spread(new);
        for record in new.records.iter().filter_map(|signed| signed.decode().ok()) {
            if record.node == self.me {
                self.on_own_record(&record);
            } else {
                let id = record.node.node_id();
                tracing::debug!(peer = %id.short(), name = record.name, generation = record.generation, version = record.version, "record");
                if let Some(gossip) = &mut self.gossip
                    && self.view.as_ref().is_some_and(|view| view.record(&id).is_some())
                {
                    let before = gossip.life_of(&id).map(|life| life.generation);
                    gossip.add_member(id, record.generation);
                    if before.is_some_and(|before| before < record.generation) {
                        self.tell_earlier_start(&id);
                    }
                }
                self.pair_record_changed(&id);
                self.relay_record_changed(&id);
            }
        }
        self.report_conflicts();
        self.heed_removals(new);
        self.meet_again(new);
        self.heed_tries(new);
        let on = [new.admissions.len(), new.removals.len(), new.reclaims.len(), new.grants.len()];
        if on.iter().any(|number| *number > 0) {
            self.settle_addresses();
        } else if !new.promises.is_empty() {
            // They come from all members, one by one.
            self.next_settle.get_or_insert(self.now + SETTLE_AFTER);
        }
    }

    /// Who was out as its sponsor was removed is a member by another admission that came late; so are those whom it
    /// let in. Their records were there already.
    fn meet_again(&mut self, new: &Delta) {
        if new.admissions.is_empty() || self.is_out() {
            return;
        }
        let (Some(view), Some(gossip)) = (&self.view, &mut self.gossip) else { return };
        let strange = |gossip: &Gossip, id: &NodeId| *id != self.id && !gossip.is_member(id);
        let mut subjects = new.admissions.iter().filter_map(|signed| Some(signed.decode().ok()?.subject));
        let returns = |key: mesh_keys::IdentityKey| {
            let id = key.node_id();
            (view.record(&id).is_some() && strange(gossip, &id)) || view.admissions().has_let_in(&key)
        };
        if !subjects.any(returns) {
            return;
        }
        let back: Vec<(NodeId, u64)> = view
            .records()
            .filter(|(id, _)| strange(gossip, id))
            .map(|(id, record)| (*id, record.generation))
            .collect();
        for (id, generation) in &back {
            gossip.add_member(*id, *generation);
        }
        for (id, _) in back {
            tracing::info!(peer = %id.short(), "a member again");
            self.pair_record_changed(&id);
        }
    }

    /// WireGuard tells what came in: who sends something is alive.
    pub(super) fn on_tunnels(&mut self, tunnels: BTreeMap<WgPublic, TunnelFacts>) {
        let before = std::mem::replace(&mut self.tunnels, tunnels);
        // Counters come every second; what the kernel should hold follows from these two only.
        let fails = |tunnels: &BTreeMap<WgPublic, TunnelFacts>| -> Vec<(WgPublic, Option<SocketAddr>)> {
            let stale = |facts: &TunnelFacts| facts.handshake_age.is_some_and(|age| age > HANDSHAKE_STALE);
            tunnels
                .iter()
                .filter(|(_, facts)| stale(facts))
                .map(|(key, facts)| (*key, facts.endpoint))
                .collect()
        };
        self.stale |= fails(&before) != fails(&self.tunnels);
        let (Some(view), Some(gossip)) = (&self.view, &mut self.gossip) else { return };
        let mut broken = Vec::new();
        let (mut seen, mut flows) = (Vec::new(), Vec::new());
        let received = |tunnels: &BTreeMap<WgPublic, TunnelFacts>, lane: &LaneInfo| {
            tunnels.get(&lane.key).map(|facts| facts.rx_bytes)
        };
        for (id, record) in view.records() {
            let mut lanes = record.lanes.iter();
            if lanes.any(|lane| {
                received(&before, lane).is_some_and(|before| received(&self.tunnels, lane) > Some(before))
            }) {
                gossip.heard(id, self.now);
            }
            if let Some((key, facts)) =
                record.lanes.first().and_then(|lane| self.tunnels.get_key_value(&lane.key))
            {
                seen.push((*id, before.get(key).copied(), *facts));
            }
            flows.extend(record.lanes.iter().filter_map(|lane| {
                let facts = self.tunnels.get(&lane.key)?;
                Some((*id, lane.index, before.get(&lane.key).copied(), *facts))
            }));
            let fails = |lane: &LaneInfo| {
                let (before, now) = (before.get(&lane.key), self.tunnels.get(&lane.key));
                before.zip(now).is_some_and(|(before, now)| {
                    now.tx_bytes > before.tx_bytes
                        && now.handshake_age.is_none_or(|age| age > HANDSHAKE_STALE)
                })
            };
            if record.lanes.iter().any(fails) {
                broken.push(*id);
            }
        }
        for (id, lane, before, facts) in flows {
            self.observe_flow(id, lane, before.as_ref(), &facts);
        }
        self.begin_observing();
        for (id, before, facts) in seen {
            self.observe_path(id, before.as_ref(), &facts);
            self.observe_mtu(id, before.as_ref(), &facts);
        }
        for id in broken {
            self.pair_fails(id);
        }
    }

    /// Others hold a record of this node that it does not know of.
    fn on_own_record(&mut self, record: &NodeRecord) {
        if record.generation < self.stored.generation {
            return;
        }
        if record.start != self.standing.start || record.generation > self.stored.generation {
            self.on_copied(record.generation, record.contested);
        } else if record.version >= self.version {
            // Somebody who has the key of this node says something else in its name; of two records of one version the
            // higher hash counts.
            self.version = record.version;
            self.refresh_record();
            self.compare_all_keys();
        }
    }

    fn report_conflicts(&mut self) {
        if let Some(view) = &self.view {
            for conflict in view.grants().conflicts() {
                tracing::debug!(granter = %conflict.granter.short(), range = %conflict.range, loser = %conflict.loser.short(), "range granted twice");
            }
        }
    }

    /// Tells others what is new here. Promises only concern heirs.
    pub(super) fn spread(&mut self, delta: &Delta) {
        let now = self.now;
        if let (Some(gossip), Some(view)) = (&mut self.gossip, &self.view) {
            for (name, _) in delta.names() {
                // What had to wait for the disk may have been overtaken.
                if let Some(content) = view.content(&name) {
                    gossip.publish(name, content, now);
                }
            }
        }
        if !delta.promises.is_empty() || !delta.removals.is_empty() || !delta.reclaims.is_empty() {
            self.heirs.next = Some(now);
            self.heirs.pause = TELL_HEIRS;
        }
    }

    /// Whether what this node promises is not on disk yet. Others rely on it for good: a node that has told it and then
    /// forgets it would promise something else, under the same version.
    fn promises_wait(&self) -> bool {
        self.being_written().chain([&self.unsaid]).any(|delta| !delta.promises.is_empty())
    }

    /// What is in the view and must not be shown to anybody, although its name can be guessed.
    fn hidden(&self) -> Option<Name> {
        self.promises_wait().then(|| Name::of_node(Kind::PROMISES, &self.id))
    }

    /// What this node promises, as an item, and the version of that, once it is on disk.
    fn promises_to_tell(&self) -> Option<(Vec<u8>, u64)> {
        let view = self.view.as_ref().filter(|_| !self.promises_wait())?;
        let item = view.item(&Name::of_node(Kind::PROMISES, &self.id))?;
        Some((item, view.promises_of(&self.id)?.version))
    }

    /// Tells those who wait for it what this node promises about removed nodes: until they say that they know.
    fn tell_heirs(&mut self) {
        self.heirs.next = None;
        let Some((item, version)) = self.promises_to_tell() else { return };
        let Some(view) = &self.view else { return };
        let now = self.now;
        let mut heirs = view.heirs();
        heirs.remove(&self.id);
        self.heirs.all.retain(|heir, _| heirs.contains(heir));
        let (mut tell, mut ask, mut ask_next) = (Vec::new(), Vec::new(), None);
        for id in heirs {
            let heir = self.heirs.all.entry(id).or_default();
            let start = view.record(&id).map_or(0, |record| record.start);
            match heir.known.filter(|(at_start, known, _)| (*at_start, *known) == (start, version)) {
                Some((_, _, at)) if now.since(at) < ASK_HEIRS => {
                    ask_next = ask_next.into_iter().chain([at + ASK_HEIRS]).min();
                }
                Some(_) => ask.push(id),
                None => tell.push(id),
            }
        }
        if !tell.is_empty() || !ask.is_empty() {
            ask_next = Some(now + self.jitter(self.heirs.pause));
            self.heirs.pause = (self.heirs.pause * 2).min(TELL_HEIRS_MAX);
        }
        self.heirs.next = ask_next;
        let mut question = Writer::default();
        question.push_item(Kind::PROMISES_MADE, &version.to_le_bytes());
        let question = question.take();
        let mut whole = Writer::default();
        // What does not fit into a datagram is sent to those who say that they do not know it.
        let whole = if whole.push_item(Kind::PROMISES, &item) { whole.take() } else { question.clone() };
        for heir in tell {
            // Two nodes behind NATs do not reach each other: another member hands it on.
            if self.session_with(&heir).is_none()
                && !self.datagrams.is_fresh(&heir, now)
                && let Some(other) = self.gossip.as_mut().and_then(Gossip::pick_reachable)
            {
                self.send_payload(other, &whole);
            }
            self.send_payload(heir, &whole);
        }
        for heir in ask {
            self.send_payload(heir, &question);
        }
    }

    /// Hands a member's promises on to those whom they concern, if that is not this node.
    fn hand_on(&mut self, from: NodeId, promises: &[u8]) {
        let Some(view) = &self.view else { return };
        let author = Signed::<Promises>::from_bytes(promises).and_then(|signed| signed.decode());
        let heirs = view.heirs();
        // From the author only: so it goes no further than one step, and as often as that one sends it.
        if heirs.contains(&self.id) || !author.is_ok_and(|author| author.node.node_id() == from) {
            return;
        }
        let mut writer = Writer::default();
        if writer.push_item(Kind::PROMISES, promises) {
            let payload = writer.take();
            let start = self.rng.next_u32() as usize % heirs.len().max(1);
            for heir in heirs.iter().cycle().skip(start).take(HANDED_ON.min(heirs.len())) {
                self.send_payload(*heir, &payload);
            }
        }
    }

    /// A member has asked about its promises, or says what it knows of those of this node.
    fn heed_words(&mut self, peer: NodeId, words: &Words) {
        if let Some(promises) = &words.promises {
            self.hand_on(peer, promises);
        }
        let Some(view) = &self.view else { return };
        let now = self.now;
        if let Some(made) = words.asks {
            let known = view.promises_of(&peer).map_or(0, |promises| promises.version);
            if known < made {
                // They will come in a session: not in all that there may be at once.
                let (since, number) = &mut self.heirs.asked;
                if now.since(*since) >= Duration::from_secs(1) {
                    (*since, *number) = (now, 0);
                }
                if *number >= MAX_LONG {
                    return;
                }
                *number += 1;
            }
            let mut answer = Writer::default();
            answer.push_item(Kind::PROMISES_KNOWN, &known.to_le_bytes());
            self.send_payload(peer, &answer.take());
        }
        let Some((item, version)) = self.promises_to_tell() else { return };
        let Some(view) = &self.view else { return };
        let (Some(known), Some(heir)) = (words.knows, self.heirs.all.get_mut(&peer)) else { return };
        if known == version {
            let start = view.record(&peer).map_or(0, |record| record.start);
            heir.known = Some((start, version, now));
            // The others are told in time.
            return;
        }
        heir.known = None;
        let is_long = !Writer::default().push_item(Kind::PROMISES, &item);
        let again = heir.pushed.is_none_or(|at| now.since(at) >= PUSH_AGAIN);
        if known < version
            && again
            && is_long
            && !self.dialer.is_waiting(&peer)
            && let Some(Ok(delta)) = Delta::of_item(Kind::PROMISES, &item)
        {
            heir.pushed = Some(now);
            self.tell(peer, Message::Push { delta });
        }
    }

    /// A removal of `node`, to be shown to it.
    pub(super) fn removal_item(&self, node: &NodeId) -> Option<Part> {
        let members = self.view.as_ref()?.admissions();
        let key = members.removed_key(node)?;
        let removal = members.removals_of(&key).first().and_then(|id| members.signed_removal(id))?;
        Some(Part::Item { kind: Kind::REMOVAL, bytes: removal.to_bytes() })
    }

    /// Says anew what this node is, if that has changed.
    pub(super) fn refresh_record(&mut self) {
        let (Some(view), Some(host)) = (&self.view, &self.host) else { return };
        if self.is_out() {
            return;
        }
        let cluster = view.cluster();
        let endpoints =
            if self.config.advertise.is_empty() { &host.addresses } else { &self.config.advertise };
        let ranges = (view.genesis().ipv4_range(), view.genesis().ipv6_range());
        let endpoints = endpoints
            .iter()
            .filter(|ip| match ip {
                std::net::IpAddr::V4(v4) => !ranges.0.contains(v4),
                std::net::IpAddr::V6(v6) => !ranges.1.contains(v6),
            })
            .take(16)
            .copied()
            .collect();
        let mut record = NodeRecord {
            cluster,
            node: self.me,
            generation: self.stored.generation,
            version: self.version,
            name: self.config.name.clone(),
            software: self.config.software.clone(),
            salt: 0,
            mesh_ipv4: self.stored.mesh_ipv4,
            control_port: self.config.control_port,
            endpoints,
            lanes: self
                .config
                .lanes
                .iter()
                .map(|lane| LaneInfo { index: lane.index, key: lane.key, port: lane.port })
                .collect(),
            start: self.standing.start,
            contested: self.standing.contested,
            leaving: self.is_leaving(),
        };
        if view.record(&self.id) == Some(&record) {
            return;
        }
        let Some(version) = self.version.checked_add(1) else {
            // Whoever said that in this node's name has its key.
            tracing::error!("somebody else has signed a record of this node, the last there can be");
            return self.on_copied(self.stored.generation, false);
        };
        self.version = version;
        record.version = self.version;
        let signed = match Signed::sign(&record, &self.identity) {
            Ok(signed) => signed,
            Err(error) => {
                tracing::error!(%error, "this node's record cannot be signed");
                return;
            }
        };
        let Some(view) = &mut self.view else { return };
        let merged = view.merge(&Delta { records: vec![signed], ..Delta::default() });
        for refused in &merged.refused {
            tracing::error!(refused, "this node's own record is refused");
        }
        if !merged.new.is_empty() {
            self.stale = true;
            self.dirty.insert(StateFile::Cluster);
            self.spread(&merged.new);
        }
    }
}
