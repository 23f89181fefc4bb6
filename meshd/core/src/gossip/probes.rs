//! Probing one member after the other, and what follows from silence.

use std::collections::BTreeMap;
use std::time::Duration;

use mesh_keys::NodeId;
use mesh_keys::sorted_map::make_room;
use rand_core::RngCore as _;

use super::catalogue::Kind;
use super::wire::{Part, Writer};
use super::{Gossip, Member, Store};
use crate::time::Time;

/// Pause between probes, when all is well. Each member is then probed twice a second by somebody, at random: with once a
/// second one crash in fifty would be noticed only after four.
const PERIOD: Duration = Duration::from_millis(500);
/// Members asked to probe in our place.
const HELPERS: usize = 3;
/// Longest and shortest time to wait for an answer, and how many round-trip times otherwise.
const MIN_WAIT: Duration = Duration::from_millis(200);
const MAX_WAIT: Duration = Duration::from_secs(2);
const ROUND_TRIPS: u32 = 4;
/// While the round-trip time of a member is not known; among many, where it takes long to get to know all, enough for one
/// that handles what arrives only after a second, most of the time.
const UNKNOWN_WAIT: Duration = Duration::from_millis(600);
const UNKNOWN_WAIT_OF_MANY: Duration = Duration::from_secs(1);
/// So many are many.
const MANY_MEMBERS: usize = 300;
/// Probes under way at a time.
const MAX_PROBES: usize = 8;
/// Probes on behalf of others at a time, of one of them no more than it can have under way itself: beyond that they get no
/// answer, as from a node that is busy.
const MAX_ASKED: usize = 64;
/// Highest local health score: with 7 all waits are eight times as long (Lifeguard, section IV-A).
const WORST: u32 = 7;
/// A member that has been heard of so lately is not probed.
const FRESH: Duration = Duration::from_millis(500);
/// Nor one whose packets have come through its tunnel so lately: somewhat longer than the second in which counters are
/// looked at. As long as this lasts nobody begins to doubt; with two seconds, a crash among ten that talk to each other all
/// the time was known to all after 5.4 s, of which 5 are asked.
const TUNNEL_FRESH: Duration = Duration::from_millis(1200);
/// Members passed over in search of one to probe: when so many are fresh, this turn can do without.
const PASSED_OVER: usize = 16;
/// How many members see for themselves when one is accused, on average.
const WITNESSES: u32 = 6;

/// Probes under way, and whose turn it is.
#[derive(Debug)]
pub(super) struct Probes {
    /// Places of all members, shuffled; each has its turn once in a round.
    order: Vec<u32>,
    turn: usize,
    next: Time,
    own: BTreeMap<u32, Probe>,
    asked: BTreeMap<u32, Asked>,
    /// How unwell this node itself seems to be.
    score: u32,
}

#[derive(Debug)]
struct Probe {
    target: NodeId,
    sent: Time,
    due: Time,
    /// Whom we asked for help; nobody while we wait for a direct answer.
    helpers: Vec<NodeId>,
    nacks: usize,
    again: bool,
}

#[derive(Debug)]
struct Asked {
    by: NodeId,
    target: NodeId,
    number: u32,
    due: Time,
}

impl Probes {
    pub(super) fn new(now: Time) -> Self {
        Self { order: Vec::new(), turn: 0, next: now, own: BTreeMap::new(), asked: BTreeMap::new(), score: 0 }
    }

    /// Puts the first probe off by a part of the period.
    pub(super) fn delay(&mut self, random: u32) {
        self.next = self.next + PERIOD * (random >> 16) / 65_536;
    }

    /// There will be so many members.
    pub(super) fn reserve(&mut self, members: usize) {
        self.order.reserve_exact(members);
    }

    /// A member has come, in the last place; it has its turn at a random moment.
    pub(super) fn add(&mut self, place: u32, random: u32) {
        let at = random as usize % (self.order.len() + 1);
        make_room(&mut self.order);
        self.order.push(place);
        let last = self.order.len() - 1;
        self.order.swap(at, last);
    }

    /// The member in `place` has gone, and the last one has taken its place. Whatever was to be found out about the one
    /// that has gone, or on its behalf, is no longer of interest.
    pub(super) fn remove(&mut self, id: &NodeId, place: u32, last: u32) {
        self.order.retain(|other| *other != place);
        self.order.iter_mut().filter(|other| **other == last).for_each(|other| *other = place);
        if self.turn >= self.order.len() {
            self.turn = 0;
        }
        self.own.retain(|_, probe| probe.target != *id);
        self.asked.retain(|_, asked| asked.by != *id);
    }

    /// A member has been heard of in another way: that answers probes of it.
    pub(super) fn answered_otherwise(&mut self, id: &NodeId) {
        self.own.retain(|_, probe| probe.target != *id);
    }

    pub(super) fn next_due(&self) -> Time {
        let own = self.own.values().map(|probe| probe.due);
        let asked = self.asked.values().map(|asked| asked.due);
        own.chain(asked).fold(self.next, Time::min)
    }

    /// Whether `number` is that of a probe of `target` under way.
    pub(super) fn awaits(&self, number: u32, target: &NodeId) -> bool {
        self.own.get(&number).is_some_and(|probe| probe.target == *target)
    }

    pub(super) fn take_nack(&mut self, from: NodeId, number: u32) {
        if let Some(probe) = self.own.get_mut(&number).filter(|probe| probe.helpers.contains(&from)) {
            probe.nacks += 1;
        }
    }
}

impl Member {
    fn is_fresh(&self, now: Time) -> bool {
        let within = |heard: Option<Time>, span| heard.is_some_and(|heard| now.since(heard) < span);
        within(self.heard, FRESH) || within(self.tunnel, TUNNEL_FRESH)
    }

    fn wait(&self, members: usize) -> Duration {
        match self.rtt {
            0 if members < MANY_MEMBERS => UNKNOWN_WAIT,
            0 => UNKNOWN_WAIT_OF_MANY,
            rtt => (Duration::from_micros(rtt.into()) * ROUND_TRIPS).clamp(MIN_WAIT, MAX_WAIT),
        }
    }

    fn measure(&mut self, sample: Duration) {
        let sample = u32::try_from(sample.as_micros()).unwrap_or(u32::MAX).max(1);
        self.rtt = match self.rtt {
            0 => sample,
            // As TCP smooths it (RFC 6298): an eighth of what is new.
            rtt => rtt - rtt / 8 + sample / 8,
        };
    }
}

impl Gossip {
    pub(super) fn advance_probes(&mut self, store: &mut impl Store, now: Time) {
        while let Some((number, _)) = self.probes.asked.iter().find(|(_, asked)| asked.due <= now) {
            let number = *number;
            if let Some(asked) = self.probes.asked.remove(&number) {
                self.send_part(asked.by, &Part::Nack { number: asked.number });
            }
        }
        let due: Vec<u32> =
            self.probes.own.iter().filter(|(_, probe)| probe.due <= now).map(|(number, _)| *number).collect();
        for number in due {
            self.probe_is_due(number, store, now);
        }
        if now >= self.probes.next {
            let pause = PERIOD * (1 + self.probes.score);
            self.probes.next = now + pause;
            if let Some(target) = self.next_target(now) {
                self.probe(target, now);
            }
        }
    }

    /// Whose turn it is: members that are thought to be reachable and have not been heard of just now.
    fn next_target(&mut self, now: Time) -> Option<NodeId> {
        let members = self.probes.order.len();
        for _ in 0..members.min(PASSED_OVER) {
            // Fisher and Yates, a step at a time: each round is in another order.
            let turn = self.probes.turn;
            let other = turn + self.rng.next_u32() as usize % (members - turn);
            self.probes.order.swap(turn, other);
            self.probes.turn = (turn + 1) % members;
            let member = &self.members[self.probes.order[turn] as usize];
            if member.reachable && !member.is_fresh(now) {
                return Some(member.id);
            }
        }
        None
    }

    pub(super) fn probe(&mut self, target: NodeId, now: Time) {
        let probed = self.probes.own.values().any(|probe| probe.target == target);
        // A probe whose ping is not sent would end in an accusation.
        if self.probes.own.len() >= MAX_PROBES || probed || self.budget == 0 {
            return;
        }
        let wait = self.wait_for(&target);
        let number = self.ping_once(target);
        let probe = Probe { target, sent: now, due: now + wait, helpers: Vec::new(), nacks: 0, again: false };
        self.probes.own.insert(number, probe);
    }

    fn wait_for(&self, target: &NodeId) -> Duration {
        let members = self.members.len();
        let wait = self.member(target).map(|member| member.wait(members));
        let wait = wait.unwrap_or(UNKNOWN_WAIT);
        wait * (1 + self.probes.score)
    }

    /// Sends a ping to a member and returns its number.
    pub fn ping_once(&mut self, target: NodeId) -> u32 {
        // Nobody can know it but who gets the ping.
        let number = self.rng.next_u32();
        self.ping_as(target, number);
        number
    }

    /// With the accusations of the one that is pinged, so that it can answer them.
    fn ping_as(&mut self, target: NodeId, number: u32) {
        let mut writer = Writer::default();
        writer.push(&Part::Ping { number });
        if let Some(entry) = self.lives.get(&target).filter(|entry| entry.is_accused())
            && let Ok(bundle) = postcard::to_allocvec(&entry.bundle(&self.cluster, target))
        {
            writer.push_item(Kind::LIVENESS, &bundle);
        }
        self.send(target, &mut writer);
    }

    fn send_part(&mut self, to: NodeId, part: &Part) {
        let mut writer = Writer::default();
        writer.push(part);
        self.send(to, &mut writer);
    }

    fn probe_is_due(&mut self, number: u32, store: &mut impl Store, now: Time) {
        let Some(probe) = self.probes.own.get(&number) else { return };
        let target = probe.target;
        if !probe.again {
            // Once more, and by way of others.
            let wait = self.wait_for(&target) * 3 / 2;
            self.ping_as(target, number);
            let helpers = self.pick_some(HELPERS, Some(target));
            for helper in &helpers {
                self.send_part(*helper, &Part::Ask { number, target });
            }
            if let Some(probe) = self.probes.own.get_mut(&number) {
                (probe.again, probe.helpers, probe.due) = (true, helpers, now + wait);
            }
            return;
        }
        let Some(probe) = self.probes.own.remove(&number) else { return };
        // Helpers that do not even say that they have failed: it may well be this node that is cut off.
        if !probe.helpers.is_empty() && probe.nacks == 0 {
            self.probes.score = (self.probes.score + 1).min(WORST);
        }
        self.accuse(target, store, now);
    }

    pub(super) fn take_ack(&mut self, from: NodeId, number: u32, now: Time) {
        if self.probes.asked.get(&number).is_some_and(|asked| asked.target == from)
            && let Some(asked) = self.probes.asked.remove(&number)
        {
            self.send_part(asked.by, &Part::Ack { number: asked.number });
        }
        // Only the one that was pinged, or who was asked to ping it, can say so.
        let may_answer = |probe: &Probe| probe.target == from || probe.helpers.contains(&from);
        if !self.probes.own.get(&number).is_some_and(may_answer) {
            return;
        }
        let Some(probe) = self.probes.own.remove(&number) else { return };
        self.probes.score = self.probes.score.saturating_sub(1);
        if let Some(place) = self.place(&probe.target) {
            // Which of two pings it answers cannot be told (Karn's rule).
            if from == probe.target && !probe.again {
                self.members[place].measure(now.since(probe.sent));
            }
            self.members[place].heard = Some(now);
            self.set_reachable(probe.target, true);
        }
    }

    pub(super) fn take_ask(&mut self, by: NodeId, number: u32, target: NodeId, now: Time) {
        let of_this = self.probes.asked.values().filter(|asked| asked.by == by).count();
        let busy = self.probes.asked.len() >= MAX_ASKED || of_this >= MAX_PROBES || self.budget == 0;
        if busy || !self.is_member(&target) {
            return;
        }
        let due = now + self.wait_for(&target);
        let own = self.ping_once(target);
        self.probes.asked.insert(own, Asked { by, target, number, due });
    }

    /// A member was accused by somebody else: some of the others look for themselves. If it is dead, that is sooner
    /// beyond doubt; if it is not, it learns that it must answer.
    pub(super) fn see_for_oneself(&mut self, id: NodeId, now: Time) {
        let members = u32::try_from(self.members.len()).unwrap_or(u32::MAX).max(1);
        if self.rng.next_u32() % members < WITNESSES {
            self.probe(id, now);
        }
    }
}
