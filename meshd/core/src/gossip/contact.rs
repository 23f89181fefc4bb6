//! What the node asks of gossip, and tells it, about single members.

use mesh_keys::NodeId;
use mesh_keys::frame::ShortId;
use rand_core::RngCore as _;

use super::catalogue::Range;
use super::wire::{Part, Writer};
use super::{Gossip, life_name};
use crate::time::Time;

/// Greetings whose answers are remembered.
const GREETINGS: usize = 128;

impl Gossip {
    /// Number of members, this node left out.
    pub fn members(&self) -> usize {
        self.members.len()
    }

    /// Whether `id` is a member, other than this node.
    pub fn is_member(&self, id: &NodeId) -> bool {
        self.places.get(id).is_some()
    }

    /// The member with that short id.
    pub fn member_with(&self, short: &ShortId) -> Option<NodeId> {
        let (id, _) = self.places.iter_from(&short.first_node()).next()?;
        (ShortId::of(id) == *short).then_some(*id)
    }

    /// Whether a member has said something itself since this node's start, and is thought to be reachable.
    pub fn is_heard(&self, id: &NodeId) -> bool {
        self.member(id).is_some_and(|member| member.reachable && member.heard.is_some())
    }

    /// Whether all members have said something themselves since this node's start.
    pub fn has_heard_all(&self) -> bool {
        self.members.iter().all(|member| member.heard.is_some())
    }

    /// Smoothed round-trip time to a member in microseconds, if known; and when it was heard of last.
    pub fn acquaintance(&self, id: &NodeId) -> Option<(Option<u32>, Option<Time>)> {
        let member = self.member(id)?;
        Some(((member.rtt > 0).then_some(member.rtt), member.heard))
    }

    /// One of the members that are thought to be reachable, at random.
    pub fn pick_reachable(&mut self) -> Option<NodeId> {
        self.pick(true)
    }

    /// One of the members that are thought to be unreachable, at random.
    pub fn pick_unreachable(&mut self) -> Option<NodeId> {
        self.pick(false)
    }

    /// Begins to talk to a member: a ping, whose answer [shows](Gossip::proves) that it speaks now, and a comparison of
    /// what both know.
    pub fn greet(&mut self, id: NodeId) {
        if !self.is_member(&id) {
            return;
        }
        let number = self.greeting(id);
        let mut writer = Writer::default();
        writer.push(&Part::Ping { number });
        writer.push(&Part::Sums(vec![(Range::ALL, self.fingerprint())]));
        self.send(id, &mut writer);
    }

    /// The number of a ping whose answer proves that the member speaks now.
    pub(super) fn greeting(&mut self, id: NodeId) -> u32 {
        let number = self.rng.next_u32();
        if self.greetings.len() >= GREETINGS {
            self.greetings.pop_front();
        }
        self.greetings.push_back((number, id));
        number
    }

    /// Whether `part` is the answer of `from` to a ping of this node, and so was not sent before that.
    pub fn proves(&self, from: &NodeId, part: &Part) -> bool {
        let Part::Ack { number } = part else { return false };
        self.probes.awaits(*number, from) || self.greetings.contains(&(*number, *from))
    }

    /// Keeps the members that `keep` says; of the others nothing is said any more.
    pub fn retain_members(&mut self, keep: impl Fn(&NodeId) -> bool) {
        let gone: Vec<NodeId> = self.members.iter().map(|member| member.id).filter(|id| !keep(id)).collect();
        for id in gone {
            self.remove_member(&id);
            self.rumours.forget(&life_name(id));
        }
    }
}
