//! Copies of this node's disk: how it finds out that it is not the only one with its identity, and what it does then.
//!
//! Every start has a number of its own, at random, which the node's record says beside its generation. A start goes on
//! from the one before when that was on this host, in this boot of it ([`Config::previous_start`]): no copy of the
//! disk can say that. A start of which that is not known (the host was rebooted; or the disk was copied, or put back)
//! waits until a member has confirmed that its record is the newest:
//!
//! * before, there are no devices on this host, unless they are there already, and it agrees on no keys: a copy has the
//!   addresses and the tunnel key of what it is a copy of;
//! * until [`PROBATION`] after that it leases, grants and admits nothing: whoever has its identity and runs already
//!   hears of it in that time.
//!
//! When the host remembers newer writes than its disk has, the disk was put back while the host ran on, with its pods.
//! What was leased to them since is forgotten, and no other member knows it: that start is *outdated* at once (see
//! below), and so is each after it until the host's next boot, which ends the pods.
//!
//! A node of which there is no doubt, and which a member has confirmed, *contests* another start of its identity: it
//! raises its generation and says so. Whoever hears of that, or of another start while in doubt itself, is *outdated*:
//! it leases, grants and admits nothing any more. So of two copies that reach a common member the one that ran first
//! goes on, and of two that started together at most one does. A cluster of one node has nobody to ask.
//!
//! [`Config::previous_start`]: super::Config::previous_start

use std::time::Duration;

use mesh_keys::NodeId;

use super::{Node, Pending, SessionId};
use crate::message::Message;
use crate::state::{StateFile, Writes};
use crate::time::Time;
use crate::view::Delta;

/// Time for news of this start to reach everybody, and for the answer to come back.
pub(super) const PROBATION: Duration = Duration::from_secs(10);

/// Why an outdated node does nothing.
const OUTDATED: &str = "another host has this node's identity, or its disk was put back to an older state: no address is leased or granted here until the state directory is removed and the node joins anew";

/// Why a node does nothing yet.
const UNCONFIRMED: &str = "this host was rebooted, or its disk was copied or put back: no address is leased until another member has confirmed that this is the only node with this identity";

/// Why a node does nothing until its host is rebooted.
const PUT_BACK: &str = "the disk was put back to an older state while this host and its pods ran on: what was leased to them since is not known. No address is leased or granted here until the host is rebooted, or the state directory is removed and the node joins anew";

/// What a host remembers of its node until its next boot, where no copy of the disk has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StartMark {
    /// The node. Of another one it says nothing.
    pub node: NodeId,
    /// Generation of its last start beyond doubt.
    pub generation: u64,
    /// What was durable at the last look. The disk is written first: after an honest crash it has at least that.
    pub writes: Writes,
    /// The disk was found to be older than that once: the forgotten leases stay forgotten.
    pub put_back: bool,
}

impl std::fmt::Display for StartMark {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.node, self.generation)?;
        self.writes.numbers.iter().try_for_each(|number| write!(f, " {number}"))?;
        f.write_str(if self.put_back { " put-back" } else { "" })
    }
}

/// A text that no daemon of this version has written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not node, generation and numbers of writes")]
pub struct NoStartMark;

impl std::str::FromStr for StartMark {
    type Err = NoStartMark;

    fn from_str(text: &str) -> Result<Self, NoStartMark> {
        let mut words = text.split_ascii_whitespace();
        let node = words.next().and_then(|word| word.parse().ok()).ok_or(NoStartMark)?;
        let mut number = || words.next().and_then(|word| word.parse::<u64>().ok()).ok_or(NoStartMark);
        let generation = number()?;
        let mut writes = Writes::default();
        for known in &mut writes.numbers {
            *known = number()?;
        }
        let put_back = match words.next() {
            None => false,
            Some("put-back") => true,
            Some(_) => return Err(NoStartMark),
        };
        if words.next().is_some() {
            Err(NoStartMark)
        } else {
            Ok(Self { node, generation, writes, put_back })
        }
    }
}

/// What a start of this identity may do.
#[derive(Debug)]
pub(super) struct Standing {
    /// Names this start.
    pub(super) start: u64,
    /// It goes on from the start before, on the same host.
    continued: bool,
    /// Its devices were on this host when it started.
    pub(super) was_here: bool,
    /// When a member first confirmed it.
    confirmed: Option<Time>,
    /// It has spoken up against another start.
    pub(super) contested: bool,
    /// That has still to be written to disk, and then said.
    unsaid: bool,
    outdated: bool,
    /// The disk is older than what this host remembers.
    put_back: Option<StartMark>,
}

impl Standing {
    /// `before` is what the host remembers of this node; `now` what the disk says.
    pub(super) fn new(start: u64, before: Option<StartMark>, now: StartMark, is_member: bool) -> Self {
        let before = before.filter(|before| is_member && before.node == now.node);
        let put_back = before.filter(|before| before.put_back || now.writes.is_older_than(&before.writes));
        let next = before.is_some_and(|before| before.generation.checked_add(1) == Some(now.generation));
        if put_back.is_some() {
            tracing::error!("{PUT_BACK}");
        }
        Self {
            start,
            // A node that is in no cluster yet has nothing that a copy could have, too.
            continued: !is_member || (next && put_back.is_none()),
            was_here: false,
            confirmed: None,
            contested: false,
            unsaid: false,
            outdated: put_back.is_some(),
            put_back,
        }
    }
}

impl Node {
    /// What the next start on this host needs as [`Config::previous_start`], once there is no doubt about this one. To be
    /// kept where no copy of the disk has it, until the host's next boot; and before anybody hears of what was written,
    /// so before the outputs that follow [`Input::Persisted`].
    ///
    /// [`Config::previous_start`]: super::Config::previous_start
    /// [`Input::Persisted`]: super::Input::Persisted
    pub fn start_to_note(&self) -> Option<StartMark> {
        match self.standing.put_back {
            Some(before) => Some(StartMark { put_back: true, ..before }),
            None => self.doubt().is_none().then_some(StartMark {
                node: self.id,
                generation: self.stored.generation,
                writes: self.durable,
                put_back: false,
            }),
        }
    }

    /// Whether this node may have devices, tunnels and addresses on this host.
    pub(super) fn is_established(&self) -> bool {
        let standing = &self.standing;
        standing.continued
            || standing.was_here
            || self.is_alone()
            || (standing.confirmed.is_some() && !standing.outdated)
    }

    fn is_alone(&self) -> bool {
        self.gossip.as_ref().is_none_or(|gossip| gossip.members() == 0)
    }

    /// Whether another start of this identity has the right to it.
    pub(super) fn is_outdated(&self) -> bool {
        self.standing.outdated
    }

    /// Why it signs nothing any more, if so.
    pub(super) fn outdated(&self) -> Option<&'static str> {
        let why = if self.standing.put_back.is_some() { PUT_BACK } else { OUTDATED };
        self.standing.outdated.then_some(why)
    }

    /// Why this node leases, grants and admits nothing at present, if so.
    pub(super) fn doubt(&self) -> Option<&'static str> {
        if let Some(why) = self.outdated() {
            return Some(why);
        }
        let over = self.standing.confirmed.is_some_and(|at| self.now.since(at) >= PROBATION);
        (!self.standing.continued && !over && !self.is_alone()).then_some(UNCONFIRMED)
    }

    /// What the status says of it.
    pub(super) fn copies_problem(&self) -> Option<String> {
        let contested = "another host was started with a copy of this node's disk: it leases nothing, and has to be given an identity of its own by removing its state directory";
        let contested = self.standing.contested.then_some(contested);
        self.doubt().or(contested).map(str::to_owned)
    }

    pub(super) fn standing_deadline(&self) -> Option<Time> {
        let due = self.standing.confirmed? + PROBATION;
        (!self.standing.continued && due > self.now).then_some(due)
    }

    /// Tells a member what is known of it here, so that it learns whether it is the only one with its identity.
    pub(super) fn tell_what_is_known(&mut self, session: SessionId, peer: &NodeId) {
        let known = self.view.as_ref().and_then(|view| view.record(peer).zip(view.signed_record(peer)));
        let Some((record, signed)) = known else { return };
        let (generation, start) = (record.generation, record.start);
        let delta = Delta { records: vec![signed.clone()], ..Delta::default() };
        // A bare word could be a lie: what speaks against the member is its own signature.
        self.send(session, &Message::Push { delta });
        self.send(session, &Message::YourRecord { generation, start });
    }

    pub(super) fn on_your_record(&mut self, generation: u64, start: u64) {
        let ours = (generation, start) == (self.stored.generation, self.standing.start);
        if ours && self.standing.confirmed.is_none() {
            self.standing.confirmed = Some(self.now);
            self.stale = true;
            self.settle_pairs();
        }
    }

    /// Another start of this identity has said something: of that generation, and maybe against this one.
    pub(super) fn on_copied(&mut self, generation: u64, against_this: bool) {
        let now = self.now;
        let standing = &mut self.standing;
        if standing.outdated {
            return;
        }
        let next = generation.max(self.stored.generation).checked_add(1);
        let settled = standing.confirmed.is_some_and(|at| standing.continued || now.since(at) >= PROBATION);
        let was_first = settled && !standing.contested && !against_this;
        match next.filter(|_| was_first) {
            Some(next) => {
                tracing::error!(
                    theirs = generation,
                    "another host was started with a copy of this node's disk; this node speaks up against it"
                );
                standing.contested = true;
                standing.unsaid = true;
                self.stored.generation = next;
                self.dirty.insert(StateFile::Node);
                self.say_contest();
            }
            None => {
                tracing::error!(theirs = generation, ours = self.stored.generation, "{OUTDATED}");
                standing.outdated = true;
                self.stale = true;
            }
        }
    }

    /// Speaks up against another start: as soon as the higher generation is on disk.
    pub(super) fn say_contest(&mut self) {
        if std::mem::take(&mut self.standing.unsaid) {
            self.persist(&[StateFile::Node], Pending::Contested);
        }
    }

    /// The higher generation could not be written.
    pub(super) fn contest_later(&mut self) {
        self.standing.unsaid = true;
    }

    /// The higher generation is on disk.
    pub(super) fn contest(&mut self) {
        self.compare_all_keys();
        self.version = 0;
        self.start_gossip();
        self.refresh_record();
    }
}
