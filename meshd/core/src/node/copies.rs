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
//! Beyond doubt, it gives addresses away only after it has heard all members, or has waited for that for [`HEAR_ALL`]: a
//! copy on one side of a partition was confirmed there, and does not know what was given away on the other.
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

use super::sessions::Way;
use super::writing::Pending;
use super::{Node, SessionId};
use crate::gossip::Gossip;
use crate::gossip::catalogue::Kind;
use crate::gossip::wire::Writer;
use crate::message::Message;
use crate::state::{StateFile, Writes};
use crate::time::Time;
use crate::view::Delta;

/// Time for news of this start to reach everybody, and for the answer to come back.
pub(super) const PROBATION: Duration = Duration::from_secs(10);

/// So long a start that is beyond doubt waits until it has heard all members, before it gives addresses away.
pub(super) const HEAR_ALL: Duration = Duration::from_secs(300);

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
    /// No start may go on from here.
    pub superseded: Option<Superseded>,
}

/// Why what is on a disk is not the newest state of a node any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Superseded {
    /// The disk was found to be older than what the host remembers: the forgotten leases stay forgotten.
    PutBack,
    /// Another start of the identity has the right to it.
    ByAnother,
}

impl Superseded {
    const ALL: [Self; 2] = [Self::PutBack, Self::ByAnother];

    fn word(self) -> &'static str {
        match self {
            Self::PutBack => "put-back",
            Self::ByAnother => "outdated",
        }
    }

    /// Why the node does nothing.
    fn reason(self) -> &'static str {
        match self {
            Self::PutBack => PUT_BACK,
            Self::ByAnother => OUTDATED,
        }
    }
}

impl std::fmt::Display for StartMark {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.node, self.generation)?;
        self.writes.numbers.iter().try_for_each(|number| write!(f, " {number}"))?;
        self.superseded.map_or(Ok(()), |why| write!(f, " {}", why.word()))
    }
}

/// A text that no daemon of this version has written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not node, generation and numbers of writes")]
pub struct NoStartMark;

/// State files of the version that first noted their writes.
const FIRST_FILES: usize = 5;

impl std::str::FromStr for StartMark {
    type Err = NoStartMark;

    fn from_str(text: &str) -> Result<Self, NoStartMark> {
        let mut words = text.split_ascii_whitespace().peekable();
        let node = words.next().and_then(|word| word.parse().ok()).ok_or(NoStartMark)?;
        let mut number =
            || words.next_if(|word| word.starts_with(|first: char| first.is_ascii_digit())).map(str::parse);
        let generation = number().ok_or(NoStartMark)?.map_err(|_| NoStartMark)?;
        let mut writes = Writes::default();
        // Files that the version did not have yet were never written.
        for (place, known) in writes.numbers.iter_mut().enumerate() {
            match number() {
                Some(number) => *known = number.map_err(|_| NoStartMark)?,
                None if place < FIRST_FILES => return Err(NoStartMark),
                None => {}
            }
        }
        let known =
            |word: &str| Superseded::ALL.into_iter().find(|why| why.word() == word).ok_or(NoStartMark);
        let superseded = words.next().map(known).transpose()?;
        if words.next().is_some() {
            Err(NoStartMark)
        } else {
            Ok(Self { node, generation, writes, superseded })
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
    pub(super) confirmed: Option<Time>,
    /// When it had heard all members.
    heard_all: Option<Time>,
    /// It has spoken up against another start.
    pub(super) contested: bool,
    /// That has still to be written to disk, and then said.
    unsaid: bool,
    outdated: Option<Superseded>,
}

impl Standing {
    /// `before` is what the host remembers of this node; `now` what the disk says.
    pub(super) fn new(start: u64, before: Option<StartMark>, now: StartMark, is_member: bool) -> Self {
        let before = before.filter(|before| is_member && before.node == now.node);
        let older =
            |before: StartMark| now.writes.is_older_than(&before.writes).then_some(Superseded::PutBack);
        let outdated = before.and_then(|before| before.superseded.or_else(|| older(before)));
        let next = before.is_some_and(|before| before.generation.checked_add(1) == Some(now.generation));
        if let Some(why) = outdated {
            tracing::error!("{}", why.reason());
        }
        Self {
            start,
            // A node that is in no cluster yet has nothing that a copy could have, too.
            continued: !is_member || (next && outdated.is_none()),
            was_here: false,
            confirmed: None,
            heard_all: None,
            contested: false,
            unsaid: false,
            outdated,
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
        let superseded = self.standing.outdated;
        (superseded.is_some() || self.doubt().is_none()).then_some(StartMark {
            node: self.id,
            generation: self.stored.generation,
            writes: self.durable,
            superseded,
        })
    }

    /// Whether this node may have devices, tunnels and addresses on this host.
    pub(super) fn is_established(&self) -> bool {
        let standing = &self.standing;
        standing.continued
            || standing.was_here
            || self.is_alone()
            || (standing.confirmed.is_some() && standing.outdated.is_none())
    }

    fn is_alone(&self) -> bool {
        self.gossip.as_ref().is_none_or(|gossip| gossip.members() == 0)
    }

    /// Whether another start of this identity has the right to it.
    pub(super) fn is_outdated(&self) -> bool {
        self.standing.outdated.is_some()
    }

    /// Why it signs nothing any more, if so.
    pub(super) fn outdated(&self) -> Option<&'static str> {
        self.standing.outdated.map(Superseded::reason)
    }

    /// Why this node leases, grants and admits nothing at present, if so.
    pub(super) fn doubt(&self) -> Option<&'static str> {
        if let Some(why) = self.outdated() {
            return Some(why);
        }
        let over = self.standing.confirmed.is_some_and(|at| self.now.since(at) >= PROBATION);
        (!self.standing.continued && !over && !self.is_alone()).then_some(UNCONFIRMED)
    }

    /// Whether this node may give addresses to others.
    pub(super) fn may_give(&mut self) -> bool {
        if self.doubt().is_some() {
            return false;
        }
        let standing = &mut self.standing;
        let Some(confirmed) = standing.confirmed.filter(|_| !standing.continued) else { return true };
        if standing.heard_all.is_none() && self.gossip.as_ref().is_none_or(Gossip::has_heard_all) {
            standing.heard_all = Some(self.now);
        }
        // What they know comes within moments.
        standing.heard_all.is_some_and(|at| self.now.since(at) >= PROBATION)
            || self.now.since(confirmed) >= HEAR_ALL
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
        if let Some(Way::Accepted(remote)) = self.sessions.get(&session).map(|entry| entry.way) {
            self.send(session, &Message::Seen { address: remote.ip() });
        }
    }

    /// A member has started anew, it says: whoever was that member until now hears of it at once, where it was heard last. It
    /// may still run, and be what the new start was copied from; then it has not long to speak up.
    pub(super) fn tell_earlier_start(&mut self, member: &NodeId) {
        let Some(signed) = self.view.as_ref().and_then(|view| view.signed_record(member)).cloned() else {
            return;
        };
        if let Some(address) = self.datagrams.address(member) {
            let mut writer = Writer::default();
            if writer.push_item(Kind::RECORD, &signed.to_bytes()) {
                self.seal_to(*member, address, &writer.take());
            }
        }
        let push = Message::Push { delta: Delta { records: vec![signed], ..Delta::default() } };
        for session in self.sessions_with(member) {
            self.send(session, &push);
        }
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
        if standing.outdated.is_some() {
            return;
        }
        let next = generation.max(self.stored.generation).checked_add(1);
        let settled = standing.confirmed.is_some_and(|at| standing.continued || now.since(at) >= PROBATION);
        let was_first = settled && !against_this;
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
                standing.outdated = Some(Superseded::ByAnother);
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

    /// The higher generation is on disk, or there is no room for it.
    pub(super) fn contest(&mut self) {
        self.compare_all_keys();
        self.version = 0;
        self.start_gossip();
        self.refresh_record();
    }
}
