//! Gossip: how all members come to know the same, and who is thought to be alive. Pure: datagrams, time and randomness
//! come in, datagrams go out.
//!
//! * **Probes** (SWIM with Lifeguard): each period one member is pinged; when it does not answer, it is once more, also by
//!   way of others; then it stands accused. See [`liveness`] for what follows from that.
//! * **Rumours**: what is new is told to a few members at once, and to a few more later.
//! * **Reconciliation**: every few seconds the sums of all names are compared with one member's ([`catalogue`]). What
//!   rumours have missed is found by that.
//!
//! Members that do not answer are tried for ever, one every few seconds: a partition heals by itself.
//!
//! What is known is kept by a [`Store`]; only the names are kept here.

pub mod catalogue;
mod contact;
pub mod liveness;
mod probes;
mod rumours;
#[cfg(test)]
mod tests;
pub mod wire;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use mesh_keys::sorted_map::{SortedMap, make_room};
use mesh_keys::{ClusterId, NodeId, Signed};
use rand_chacha::ChaCha20Rng;
use rand_core::{RngCore as _, SeedableRng as _};

use self::catalogue::{Catalogue, Content, Kind, Name, Range, Sum};
use self::liveness::{Bundle, Entry, Life, Seen, Statement};
use self::probes::Probes;
use self::rumours::Rumours;
use self::wire::{Part, Writer};
use crate::time::Time;

/// What keeps the items that gossip spreads.
pub trait Store {
    /// The item of that name, as [`Store::offer`] takes it; `None` when there is none.
    fn item(&self, name: &Name) -> Option<Vec<u8>>;

    /// Takes an item from another member.
    fn offer(&mut self, kind: Kind, item: &[u8]) -> Offered;

    /// Whether a statement has the signature of that member, or of this node itself.
    fn check(&self, statement: &Signed<Statement>, signer: &NodeId) -> bool;

    /// Signs a statement about `subject`, with this node's key.
    fn sign(&self, subject: NodeId, life: Life) -> Option<Signed<Statement>>;
}

/// What became of an item.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Offered {
    /// It is new, or newer than what was there.
    New {
        /// Its name.
        name: Name,
        /// Its content.
        content: Content,
        /// The member, and its start, if that is what the item tells of.
        member: Option<(NodeId, u64)>,
    },
    /// It was known, or something newer is.
    Known,
    /// It is wrong, or its grounds are not known yet.
    Refused,
}

/// What the node is to do or to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Send a datagram with this payload.
    Send {
        /// To whom.
        to: NodeId,
        /// At most [`wire::MAX_PAYLOAD`] bytes.
        payload: Vec<u8>,
    },
    /// A member is thought to be unreachable now, or no longer.
    Reachable {
        /// The member.
        node: NodeId,
        /// Whether it is.
        reachable: bool,
    },
    /// A member has an item that does not fit into a datagram: it has to be asked for in another way.
    Fetch {
        /// The member.
        from: NodeId,
        /// The item.
        name: Name,
    },
    /// Somebody has this node's key and has answered accusations with it: this node itself before it was started again
    /// without a new generation, or a copy of it that still runs. Its incarnation has been taken over.
    Copied {
        /// The highest that has been seen.
        incarnation: u32,
    },
}

/// Members told of news at a time.
const FANOUT: usize = 3;
/// News is passed on this long after it came in, so that what comes together goes together.
const SETTLE: Duration = Duration::from_millis(10);
/// Pause before what was told is told to others.
const REPEAT: Duration = Duration::from_millis(400);
/// Payloads of news at a time, and the pause while there is more.
const PAYLOADS: usize = 3;
const BACKLOG: Duration = Duration::from_millis(15);
/// Pieces of news that may fit into these.
const MOST_NAMES: usize = 64;
/// News that cannot be told in this many payloads is told less often; comparing finds what is missed.
const MANY: usize = 200;
/// How often each piece of news is told when there are that many.
const TOLD_OF_MANY: u8 = 3;
/// Pause between comparisons, and after one that found a difference.
const COMPARE: Duration = Duration::from_secs(10);
const COMPARE_AGAIN: Duration = Duration::from_secs(1);
/// Comparisons in quick succession after a difference.
const COMPARISONS: u8 = 10;
/// Ranges gone into for one datagram of sums: what they are cut into fills the answers.
const RANGES: usize = 24;
/// Datagrams that one of another member's can cause at once, to whomever: nobody can make others send much by sending
/// little. What does not fit is left out, and comparing finds it again.
const ANSWERS: usize = 8;
/// Names asked for in one part.
const WANTED: usize = 48;
/// Pause between attempts to reach one of the unreachable, when they are not few.
const RETRY: Duration = Duration::from_secs(2);
/// Each of the unreachable is tried by as many members in that time: a host that is down for long is not hammered by
/// thousands, and once it is up again it calls others by itself.
const TRIED_BY: usize = 64;
/// A node answers accusations at once only when it has not had to for so long; otherwise when it has to, see
/// [`Entry::answer_due`]: each answer goes to everybody, and one who accuses all the time should not decide how many.
const CALM: Duration = Duration::from_secs(10);
/// After as many answers in that time it takes all the time there is.
const ANSWERS_WHEN_HARASSED: usize = 4;
/// And it never answers more often than this.
const ANSWER: Duration = Duration::from_millis(200);

/// One node's part in gossip.
#[derive(Debug)]
pub struct Gossip {
    me: NodeId,
    cluster: ClusterId,
    rng: ChaCha20Rng,
    /// When this node has answered accusations, the last times.
    answered: VecDeque<Time>,
    members: Vec<Member>,
    places: SortedMap<NodeId, u32>,
    /// Places of those that are thought to be reachable, and of those that are not.
    reachable: Vec<u32>,
    unreachable: Vec<u32>,
    /// This node's own, and those of whom something has been said.
    lives: BTreeMap<NodeId, Entry>,
    /// When those that stand accused are taken for unreachable.
    verdicts: BTreeSet<(Time, NodeId)>,
    verdict_of: BTreeMap<NodeId, Time>,
    catalogue: Catalogue,
    rumours: Rumours,
    probes: Probes,
    /// Numbers of pings that greeted, and whom.
    greetings: VecDeque<(u32, NodeId)>,
    next_push: Time,
    next_repeat: Time,
    next_compare: Time,
    comparisons: u8,
    next_retry: Time,
    /// How often a member was taken for unreachable.
    given_up: u64,
    /// How many more datagrams may be sent because of the one that is being received.
    budget: usize,
    events: Vec<Event>,
}

/// What is kept of every member: see the memory test for what that costs with all else.
#[derive(Clone, Debug)]
struct Member {
    id: NodeId,
    /// Of its record.
    generation: u64,
    /// When something came from it, directly.
    heard: Option<Time>,
    /// When its packets came through its tunnel.
    tunnel: Option<Time>,
    /// Smoothed round-trip time in microseconds; 0 when it is not known.
    rtt: u32,
    reachable: bool,
    /// Its place in the list of those that are as reachable.
    rank: u32,
}

/// A place in half the bytes: no cluster has that many members.
fn short(place: usize) -> u32 {
    u32::try_from(place).unwrap_or(u32::MAX)
}

/// What one datagram is answered with.
#[derive(Default)]
struct Reply {
    writer: Writer,
    /// The sums that were in it, to be compared all at once.
    sums: Vec<(Range, Sum)>,
}

impl Gossip {
    /// A node that knows of nobody else. `generation` is that of its record.
    pub fn new(me: NodeId, cluster: ClusterId, generation: u64, seed: [u8; 32], now: Time) -> Self {
        let mut gossip = Self {
            me,
            cluster,
            rng: ChaCha20Rng::from_seed(seed),
            answered: VecDeque::new(),
            members: Vec::new(),
            places: SortedMap::new(),
            reachable: Vec::new(),
            unreachable: Vec::new(),
            lives: BTreeMap::from([(me, Entry::new(generation))]),
            verdicts: BTreeSet::new(),
            verdict_of: BTreeMap::new(),
            catalogue: Catalogue::default(),
            rumours: Rumours::default(),
            probes: Probes::new(now),
            greetings: VecDeque::new(),
            next_push: now,
            next_repeat: now,
            next_compare: now,
            comparisons: 0,
            next_retry: now,
            given_up: 0,
            budget: usize::MAX,
            events: Vec::new(),
        };
        // Nodes that start together do not act in step.
        gossip.next_compare = now + gossip.jitter(COMPARE);
        gossip.next_retry = now + gossip.jitter(RETRY);
        gossip.probes.delay(gossip.rng.next_u32());
        gossip
    }

    /// Begins with what the store has already, from disk or from a snapshot; that has so many members.
    pub fn start_with(&mut self, catalogue: Catalogue, members: usize) {
        self.catalogue = catalogue;
        self.members.reserve_exact(members);
        self.places.reserve(members);
        self.reachable.reserve_exact(members);
        self.probes.reserve(members);
    }

    /// Takes an item out of the catalogue: it is no more.
    pub fn remove(&mut self, name: Name) {
        self.catalogue.set(name, None);
        self.rumours.forget(&name);
    }

    /// There is something new from this node itself.
    pub fn publish(&mut self, name: Name, content: Content, now: Time) {
        self.catalogue.set(name, Some(content));
        self.spread(name, now);
    }

    /// There is a member, or a member has started anew. Does nothing for this node itself.
    pub fn add_member(&mut self, id: NodeId, generation: u64) {
        if id == self.me {
            return;
        }
        let Some(place) = self.place(&id) else {
            let place = short(self.members.len());
            let rank = short(self.reachable.len());
            make_room(&mut self.reachable);
            self.reachable.push(place);
            let new = Member { id, generation, heard: None, tunnel: None, rtt: 0, reachable: true, rank };
            make_room(&mut self.members);
            self.members.push(new);
            self.places.insert(id, place);
            let at = self.rng.next_u32();
            self.probes.add(place, at);
            return;
        };
        if generation > self.members[place].generation {
            // What was said of earlier lives is void.
            self.members[place].generation = generation;
            if self.lives.remove(&id).is_some() {
                self.catalogue.set(life_name(id), None);
            }
            self.set_verdict(id, None);
            self.set_reachable(id, true);
        }
    }

    /// A member is none any more: it gets nothing, nothing is taken from it, and its vote against others is withdrawn.
    /// Those that were found unreachable with that vote remain so until they are heard of.
    pub fn remove_member(&mut self, id: &NodeId) {
        let Some(place) = self.place(id) else { return };
        self.places.remove(id);
        self.set_verdict(*id, None);
        self.leave_rank(place);
        let last = self.members.len() - 1;
        self.members.swap_remove(place);
        if let Some(moved) = self.members.get(place) {
            let (id, reachable, rank) = (moved.id, moved.reachable, moved.rank);
            self.places.insert(id, short(place));
            self.ranks(reachable)[rank as usize] = short(place);
        }
        self.probes.remove(id, short(place), short(last));
        self.lives.remove(id);
        self.remove(life_name(*id));
        let of_whom = self.lives.iter_mut().filter_map(|(of, entry)| entry.withdraw(id).then_some(*of));
        for of in of_whom.collect::<Vec<_>>() {
            self.note_life(of);
        }
    }

    /// A tunnel says that a member is alive: its packets come in. `now` is when that was seen. It counts as the answer to
    /// a probe.
    pub fn heard(&mut self, id: &NodeId, now: Time) {
        if let Some(place) = self.place(id) {
            self.members[place].tunnel = Some(now);
            self.probes.answered_otherwise(id);
            self.set_reachable(*id, true);
        }
    }

    fn place(&self, id: &NodeId) -> Option<usize> {
        self.places.get(id).map(|place| *place as usize)
    }

    fn member(&self, id: &NodeId) -> Option<&Member> {
        self.members.get(self.place(id)?)
    }

    /// Whether a member is thought to be reachable; `false` for those that are none.
    pub fn is_reachable(&self, id: &NodeId) -> bool {
        self.member(id).is_some_and(|member| member.reachable)
    }

    /// Number of members that are thought to be unreachable.
    pub fn unreachable(&self) -> usize {
        self.unreachable.len()
    }

    /// The members that are thought to be unreachable.
    pub fn unreachable_members(&self) -> impl Iterator<Item = NodeId> {
        self.unreachable.iter().map(|place| self.members[*place as usize].id)
    }

    /// How often a member was taken for unreachable.
    pub fn given_up(&self) -> u64 {
        self.given_up
    }

    /// The life of a member or of this node itself, as far as it is known.
    pub fn life_of(&self, id: &NodeId) -> Option<Life> {
        let begun = |member: &Member| Life { generation: member.generation, incarnation: 0 };
        self.lives.get(id).map(Entry::life).or_else(|| self.member(id).map(begun))
    }

    /// One value that nodes have in common that know the same.
    pub fn fingerprint(&self) -> Sum {
        self.catalogue.sum(Range::ALL)
    }

    /// What is to be done. Empty when all has been taken.
    pub fn take_events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.events)
    }

    /// When [`Gossip::tick`] has something to do.
    pub fn poll_timeout(&self) -> Time {
        let push = (!self.rumours.is_empty()).then_some(self.next_push);
        let verdict = self.verdicts.first().map(|(due, _)| *due);
        let retry = (!self.unreachable.is_empty()).then_some(self.next_retry);
        let probe = Some(self.probes.next_due());
        let times = [push, verdict, retry, probe, self.answer_due(), Some(self.next_compare)];
        times.into_iter().flatten().min().unwrap_or(self.next_compare)
    }

    /// Does what is due.
    pub fn tick(&mut self, store: &mut impl Store, now: Time) {
        self.advance_probes(store, now);
        while let Some((due, id)) = self.verdicts.first().copied().filter(|(due, _)| *due <= now) {
            self.judge(id, due, now);
        }
        self.defend(store, now);
        if now >= self.next_push && !self.rumours.is_empty() {
            self.push(store, now);
        }
        if now >= self.next_compare {
            self.compare(now);
        }
        if now >= self.next_retry {
            self.next_retry = now + self.retry_pause();
            if let Some(id) = self.pick(false) {
                self.ping_once(id);
            }
        }
    }

    /// Takes a payload that came from a member. `proved`: it was sent just now, and not repeated by somebody else.
    pub fn receive(&mut self, from: NodeId, payload: &[u8], proved: bool, store: &mut impl Store, now: Time) {
        let Some(place) = self.place(&from) else { return };
        if proved {
            self.members[place].heard = Some(now);
        }
        // One is kept for what is in the writer at the end.
        self.budget = ANSWERS - 1;
        let mut reply = Reply::default();
        if !proved {
            // In front: of what is answered to that, only the first datagram is sent.
            let number = self.greeting(from);
            reply.writer.push(&Part::Ping { number });
        }
        if proved && !self.members[place].reachable {
            self.set_reachable(from, true);
            // Where there was a partition there is much to tell; and it should know that it stands accused.
            reply.writer.push(&Part::Sums(vec![(Range::ALL, self.fingerprint())]));
            self.ping_once(from);
        }
        for part in wire::read(payload) {
            match part {
                Ok(part) => self.take(from, part, &mut reply, store, now),
                Err(error) => tracing::debug!(peer = %from.short(), %error, "part of a datagram dropped"),
            }
        }
        self.answer_sums(from, &mut reply);
        self.budget = usize::MAX;
        self.send(from, &mut reply.writer);
    }

    fn take(&mut self, from: NodeId, part: Part, reply: &mut Reply, store: &mut impl Store, now: Time) {
        match part {
            Part::Ping { number } => {
                self.answer(from, reply, &Part::Ack { number });
            }
            Part::Ack { number } => self.take_ack(from, number, now),
            Part::Ask { number, target } => self.take_ask(from, number, target, now),
            Part::Nack { number } => self.probes.take_nack(from, number),
            // The node's own.
            Part::Probe { .. }
            | Part::ProbeAnswer { .. }
            | Part::Measure { .. }
            | Part::Measured { .. }
            | Part::Pass { .. }
            | Part::Passed { .. }
            | Part::LaneHello { .. }
            | Part::LaneSeen { .. }
            | Part::PassedFrom { .. }
            | Part::LaneAt { .. }
            | Part::LaneTraffic { .. } => {}
            Part::Sums(sums) => reply.sums.extend(sums),
            // What would not be answered is not looked up.
            Part::List { .. } | Part::Want(_) if self.budget == 0 => {}
            Part::List { range, names } => {
                let mut exchange = self.catalogue.settle(range, &names);
                // What only a newer version knows is refused each time: to ask for it would never end.
                exchange.take.retain(|name| name.kind.is_known());
                if !exchange.give.is_empty() || !exchange.take.is_empty() {
                    self.compare_soon(now);
                }
                for names in exchange.take.chunks(WANTED) {
                    self.answer(from, reply, &Part::Want(names.to_vec()));
                }
                // Not all of it may fit; next time it is something else.
                let start = self.turn() % exchange.give.len().max(1);
                exchange.give.rotate_left(start);
                self.give(from, &exchange.give, reply, store);
            }
            Part::Want(names) => self.give(from, &names, reply, store),
            Part::Have { name, content } => {
                let wanted = name.kind.is_known() && self.catalogue.get(&name) != Some(content);
                if wanted && self.budget > 0 {
                    self.budget -= 1;
                    self.events.push(Event::Fetch { from, name });
                }
            }
            Part::Item { kind: Kind::LIVENESS, bytes } => self.take_life(&bytes, store, now),
            Part::Item { kind, bytes } => match store.offer(kind, &bytes) {
                Offered::New { name, content, member } => {
                    if let Some((id, generation)) = member {
                        self.add_member(id, generation);
                    }
                    self.publish(name, content, now);
                }
                Offered::Known | Offered::Refused => {}
            },
        }
    }

    /// Puts a part into the answer, which is sent when it is full; whether there was room.
    fn answer(&mut self, to: NodeId, reply: &mut Reply, part: &Part) -> bool {
        if reply.writer.push(part) {
            return true;
        }
        if self.budget == 0 {
            return false;
        }
        self.send(to, &mut reply.writer);
        reply.writer.push(part)
    }

    /// Sends what has been written, if the budget allows.
    fn send(&mut self, to: NodeId, writer: &mut Writer) {
        if !writer.is_empty() && self.budget > 0 {
            self.budget -= 1;
            self.events.push(Event::Send { to, payload: writer.take() });
        }
    }

    // Rumours.

    fn spread(&mut self, name: Name, now: Time) {
        self.rumours.add(name);
        self.next_push = self.next_push.min(now + SETTLE);
    }

    /// Tells news that is due, and what has not been told yet.
    pub fn push(&mut self, store: &impl Store, now: Time) {
        let digits = (self.members.len() + 1).ilog10() as u8 + 1;
        let (many, partitioned) = (self.rumours.len() > MANY, self.is_partitioned());
        let limit = |kind| {
            let rarely = many || partitioned && kind == Kind::LIVENESS;
            if rarely { TOLD_OF_MANY } else { 4 * digits }
        };
        let untold_only = now < self.next_repeat;
        let names = self.rumours.take(MOST_NAMES, untold_only);
        let complete = names.len() < MOST_NAMES;
        let mut names = names.into_iter().peekable();
        for _ in 0..PAYLOADS {
            let mut writer = Writer::default();
            while let Some(name) = names.peek().copied() {
                match item(&self.cluster, &self.lives, store, &name) {
                    Some(bytes) if writer.push_item(name.kind, &bytes) => {
                        self.rumours.told(name, FANOUT as u8, limit(name.kind));
                    }
                    Some(_) if !writer.is_empty() => break,
                    // Longer than a datagram.
                    Some(_) => {
                        if let Some(content) = self.catalogue.get(&name)
                            && writer.push(&Part::Have { name, content })
                        {
                            self.rumours.told(name, FANOUT as u8, limit(name.kind));
                        }
                    }
                    None => self.rumours.forget(&name),
                }
                names.next();
            }
            if writer.is_empty() {
                break;
            }
            let payload = writer.take();
            for to in self.pick_some(FANOUT, None) {
                self.events.push(Event::Send { to, payload: payload.clone() });
            }
        }
        let complete = complete && names.peek().is_none();
        names.for_each(|name| self.rumours.put_back(name));
        if !untold_only {
            let pause = if complete { REPEAT } else { BACKLOG };
            self.next_repeat = now + self.jitter(pause);
        }
        self.next_push =
            if self.rumours.has_untold() { now + self.jitter(BACKLOG) } else { self.next_repeat };
    }

    // Reconciliation.

    fn compare(&mut self, now: Time) {
        self.comparisons = self.comparisons.saturating_sub(1);
        let pause = if self.comparisons > 0 { COMPARE_AGAIN } else { COMPARE };
        self.next_compare = now + self.jitter(pause);
        // One in five goes to the unreachable, if they are not few.
        let spared = self.turn() % self.members.len().max(1) >= TRIED_BY * self.unreachable.len();
        let reachable = !self.rng.next_u32().is_multiple_of(5) || spared;
        if let Some(to) = self.pick(reachable).or_else(|| self.pick(!reachable)) {
            let mut writer = Writer::default();
            writer.push(&Part::Sums(vec![(Range::ALL, self.fingerprint())]));
            self.send(to, &mut writer);
        }
    }

    /// Where one thing was missing there may be more.
    fn compare_soon(&mut self, now: Time) {
        self.comparisons = COMPARISONS;
        let soon = now + self.jitter(COMPARE_AGAIN);
        self.next_compare = self.next_compare.min(soon);
    }

    fn answer_sums(&mut self, from: NodeId, reply: &mut Reply) {
        if reply.sums.is_empty() {
            return;
        }
        let turn = self.turn();
        let differences = self.catalogue.compare(&reply.sums, RANGES, turn);
        for (range, names) in differences.lists {
            self.answer(from, reply, &Part::List { range, names });
        }
        for sums in differences.sums.chunks(16) {
            self.answer(from, reply, &Part::Sums(sums.to_vec()));
        }
    }

    fn give(&mut self, to: NodeId, names: &[Name], reply: &mut Reply, store: &impl Store) {
        for name in names {
            let Some(bytes) = item(&self.cluster, &self.lives, store, name) else { continue };
            let item = Part::Item { kind: name.kind, bytes };
            if self.answer(to, reply, &item) {
                continue;
            }
            if self.budget == 0 {
                return;
            }
            // Longer than a datagram.
            if let Some(content) = self.catalogue.get(name) {
                self.answer(to, reply, &Part::Have { name: *name, content });
            }
        }
    }

    // Lives.

    fn take_life(&mut self, bytes: &[u8], store: &mut impl Store, now: Time) {
        let Ok((bundle, _newer)) = postcard::take_from_bytes::<Bundle>(bytes) else { return };
        let id = bundle.subject;
        let seen = Seen::of(bytes);
        if self.lives.get(&id).is_some_and(|entry| entry.has_seen(seen)) {
            return;
        }
        // One that is refused may be right later, when the grounds are known.
        if self.merge_life(&bundle, store, now)
            && let Some(entry) = self.lives.get_mut(&id)
        {
            entry.note_seen(seen);
        }
    }

    /// Merges what somebody knows of a member's life, or of this node's; whether all of it was right.
    fn merge_life(&mut self, bundle: &Bundle, store: &mut impl Store, now: Time) -> bool {
        let id = bundle.subject;
        let Some(Life { generation, .. }) = self.life_of(&id) else { return false };
        let entry = self.lives.entry(id).or_insert_with(|| Entry::new(generation));
        let (before, content) = (entry.life(), entry.content());
        let (me, places) = (self.me, &self.places);
        let has_vote = |signer: &NodeId| *signer == id || *signer == me || places.get(signer).is_some();
        let check = |statement: &_, signer: &_| has_vote(signer) && store.check(statement, signer);
        let merged = entry.merge(&self.cluster, bundle, now, check);
        let is_right = merged.is_ok();
        let accused = entry.is_accused();
        let changed = entry.content() != content;
        let change = merged.unwrap_or_else(|error| {
            tracing::debug!(peer = %id.short(), %error, "statement refused");
            liveness::Change { news: changed, accused: false }
        });
        if !change.news {
            return is_right;
        }
        let life = entry.life();
        let answered = life > before;
        let accusers = entry.accusers();
        self.note_life(id);
        if id == self.me {
            if answered {
                tracing::warn!(incarnation = life.incarnation, "another node speaks with this node's key");
                self.events.push(Event::Copied { incarnation: life.incarnation });
            }
            self.defend(store, now);
            return is_right;
        }
        // Where many stand accused there is a partition: one vote each is enough then, and spares the network.
        let few = !self.is_partitioned();
        if few || answered || accusers == 1 {
            self.spread(life_name(id), now);
        }
        if answered && !accused {
            self.set_reachable(id, true);
        }
        if few && change.accused && accusers < liveness::ACCUSERS {
            self.see_for_oneself(id, now);
        }
        is_right
    }

    /// Whether so many stand accused that it is not they who have failed but the network.
    fn is_partitioned(&self) -> bool {
        self.verdicts.len() + self.unreachable.len() > MANY.min(self.members.len() / 20).max(5)
    }

    /// Keeps catalogue and verdict in step with what is known of a life.
    fn note_life(&mut self, id: NodeId) {
        let Some(entry) = self.lives.get(&id) else { return };
        self.catalogue.set(life_name(id), entry.content());
        let deadline = entry.deadline(self.members.len() + 1);
        if let Some(place) = self.place(&id) {
            let wanted = deadline.filter(|_| self.members[place].reachable);
            self.set_verdict(id, wanted);
        }
    }

    fn set_verdict(&mut self, id: NodeId, due: Option<Time>) {
        let before = match due {
            Some(due) => self.verdict_of.insert(id, due),
            None => self.verdict_of.remove(&id),
        };
        if let Some(before) = before {
            self.verdicts.remove(&(before, id));
        }
        if let Some(due) = due {
            self.verdicts.insert((due, id));
        }
    }

    fn judge(&mut self, id: NodeId, due: Time, now: Time) {
        let Some(place) = self.place(&id) else {
            self.verdicts.remove(&(due, id));
            return;
        };
        self.set_verdict(id, None);
        let Some(entry) = self.lives.get(&id) else { return };
        let (Some(since), Some(deadline)) = (entry.accused_since(), entry.deadline(self.members.len() + 1))
        else {
            return;
        };
        // What this node has heard itself counts for more than what others say: the time to answer begins anew with it.
        let heard = self.members[place].heard.max(self.members[place].tunnel);
        let due = deadline.max(heard.unwrap_or(since) + deadline.since(since));
        if due <= now {
            self.set_reachable(id, false);
            self.given_up += 1;
            let retry = now + self.retry_pause();
            self.next_retry = self.next_retry.min(retry);
        } else {
            self.set_verdict(id, Some(due));
        }
    }

    fn set_reachable(&mut self, id: NodeId, reachable: bool) {
        let Some(place) = self.place(&id) else { return };
        if self.members[place].reachable == reachable {
            return;
        }
        self.leave_rank(place);
        let ranks = self.ranks(reachable);
        let rank = short(ranks.len());
        ranks.push(short(place));
        (self.members[place].reachable, self.members[place].rank) = (reachable, rank);
        self.events.push(Event::Reachable { node: id, reachable });
        self.note_life(id);
    }

    fn ranks(&mut self, reachable: bool) -> &mut Vec<u32> {
        if reachable { &mut self.reachable } else { &mut self.unreachable }
    }

    /// Takes a member out of the list of those that are as reachable.
    fn leave_rank(&mut self, place: usize) {
        let Member { reachable, rank, .. } = self.members[place];
        let ranks = self.ranks(reachable);
        ranks.swap_remove(rank as usize);
        if let Some(moved) = ranks.get(rank as usize).copied() {
            self.members[moved as usize].rank = rank;
        }
    }

    /// When this node is to say that it is alive: if it stands accused, and has an incarnation left to say so.
    fn answer_due(&self) -> Option<Time> {
        let own = self.lives.get(&self.me).filter(|own| own.life().incarnation < u32::MAX)?;
        let since = own.accused_since()?;
        let Some(answered) = self.answered.back().copied() else { return Some(since) };
        let calm = since.since(answered) >= CALM;
        let earlier = self.answered.len().checked_sub(ANSWERS_WHEN_HARASSED);
        let harassed = earlier.is_some_and(|at| since.since(self.answered[at]) < CALM);
        let due = if calm { Some(since) } else { own.answer_due(self.members.len() + 1, harassed) };
        due.map(|due| due.max(answered + ANSWER))
    }

    /// Says that this node is alive, if that is due.
    fn defend(&mut self, store: &mut impl Store, now: Time) {
        if self.answer_due().is_none_or(|due| due > now) {
            return;
        }
        self.answered.push_back(now);
        if self.answered.len() > ANSWERS_WHEN_HARASSED {
            self.answered.pop_front();
        }
        let Some(own) = self.lives.get_mut(&self.me) else { return };
        // Never beyond the last: that is not due.
        let life = Life { incarnation: own.life().incarnation.saturating_add(1), ..own.life() };
        let Some(signed) = store.sign(self.me, life) else { return };
        let bundle = Bundle { subject: self.me, alive: Some(signed), accusations: Vec::new() };
        // Our own signature needs no check.
        if own.merge(&self.cluster, &bundle, now, |_, _| true).is_ok() {
            self.note_life(self.me);
            self.spread(life_name(self.me), now);
        }
    }

    fn accuse(&mut self, id: NodeId, store: &mut impl Store, now: Time) {
        let known = self.lives.get(&id);
        if known.is_some_and(|entry| entry.accusers() >= liveness::ACCUSERS || entry.is_accused_by(&self.me))
        {
            return;
        }
        let bundle = known.map(|entry| entry.bundle(&self.cluster, id));
        let mut bundle = bundle.unwrap_or(Bundle { subject: id, alive: None, accusations: Vec::new() });
        let Some(signed) = self.life_of(&id).and_then(|life| store.sign(id, life)) else { return };
        bundle.accusations.push(signed);
        tracing::debug!(peer = %id.short(), "does not answer");
        self.merge_life(&bundle, store, now);
    }

    fn retry_pause(&mut self) -> Duration {
        let times = self.members.len() / (TRIED_BY * self.unreachable.len().max(1));
        let times = u32::try_from(times).unwrap_or(u32::MAX).max(1);
        self.jitter(RETRY) * times
    }

    // Choice.

    fn jitter(&mut self, span: Duration) -> Duration {
        let share = u32::from(self.rng.next_u32() as u16);
        span * 4 / 5 + span * 2 / 5 * share / 65_536
    }

    /// Where to begin when not everything can be done.
    fn turn(&mut self) -> usize {
        self.rng.next_u32() as usize
    }

    /// A member that is thought to be reachable, or one that is not.
    fn pick(&mut self, reachable: bool) -> Option<NodeId> {
        let random = self.turn();
        let ranks = self.ranks(reachable);
        let place = *ranks.get(random.checked_rem(ranks.len())?)?;
        Some(self.members[place as usize].id)
    }

    /// Up to `count` different members that are thought to be reachable, none of them `but`.
    fn pick_some(&mut self, count: usize, but: Option<NodeId>) -> Vec<NodeId> {
        let mut picked = Vec::with_capacity(count);
        for _attempt in 0..4 * count {
            if picked.len() == count {
                break;
            }
            if let Some(id) = self.pick(true)
                && Some(id) != but
                && !picked.contains(&id)
            {
                picked.push(id);
            }
        }
        picked
    }
}

fn life_name(id: NodeId) -> Name {
    Name { id: *id.as_bytes(), kind: Kind::LIVENESS }
}

fn item(
    cluster: &ClusterId,
    lives: &BTreeMap<NodeId, Entry>,
    store: &impl Store,
    name: &Name,
) -> Option<Vec<u8>> {
    if name.kind != Kind::LIVENESS {
        return store.item(name);
    }
    let id = NodeId::from_bytes(name.id);
    let entry = lives.get(&id).filter(|entry| entry.content().is_some())?;
    postcard::to_allocvec(&entry.bundle(cluster, id)).ok()
}
