//! Control sessions on the simulated network: what is sent arrives, once and in order, as long as something gets
//! through.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use mesh_core::node::SessionId;
use mesh_core::time::Time;

use crate::dice::Dice;
use crate::network::Network;
use crate::queue::{Event, Queue};

/// A session ends when nothing gets through for this long.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Names a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct LinkId(pub u64);

/// One end of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct End {
    /// The host.
    pub host: usize,
    /// Which of its processes.
    pub epoch: u64,
    /// The name of the session there.
    pub session: SessionId,
    /// Whether the process knows of it.
    pub open: bool,
    /// The process wants nothing more of it, or is gone.
    pub done: bool,
}

/// What travels on a link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    /// A frame.
    Frame(Vec<u8>),
    /// The end of what is sent.
    End(String),
}

/// A piece that has come to an end.
pub struct Arrival {
    /// The session there.
    pub session: SessionId,
    /// The host at the other end.
    pub from: usize,
    /// The piece.
    pub piece: Piece,
}

#[derive(Default)]
struct Way {
    pieces: VecDeque<Piece>,
    last: Time,
    /// Pieces whose time came while nothing got through.
    held: usize,
}

/// A control session, both ends of it.
pub struct Link {
    /// The end that dialled, and the other.
    pub ends: [End; 2],
    ways: [Way; 2],
    blocked: Option<Time>,
    /// One end lost power: nothing gets through any more.
    dead: bool,
}

/// All control sessions.
#[derive(Default)]
pub struct Links {
    all: BTreeMap<LinkId, Link>,
    by_session: BTreeMap<(usize, SessionId), (LinkId, usize)>,
    count: u64,
}

impl Links {
    /// A link that is being set up; the sessions' names are new.
    pub fn add(&mut self, from: (usize, u64), to: (usize, u64)) -> LinkId {
        self.count += 1;
        let id = LinkId(self.count);
        let end = |(host, epoch): (usize, u64), session: u64| End {
            host,
            epoch,
            session: SessionId(session),
            open: false,
            done: false,
        };
        let ends = [end(from, 2 * self.count), end(to, 2 * self.count + 1)];
        for (at, end) in ends.iter().enumerate() {
            self.by_session.insert((end.host, end.session), (id, at));
        }
        self.all.insert(id, Link { ends, ways: Default::default(), blocked: None, dead: false });
        id
    }

    /// The link of a session and which end of it that is.
    pub fn of(&self, host: usize, session: SessionId) -> Option<(LinkId, usize)> {
        self.by_session.get(&(host, session)).copied()
    }

    /// Both ends at once are gone.
    pub fn drop_link(&mut self, id: LinkId) -> Option<Link> {
        let link = self.all.remove(&id)?;
        for end in &link.ends {
            self.by_session.remove(&(end.host, end.session));
        }
        Some(link)
    }

    /// Sends a piece from one end.
    pub fn send(&mut self, id: LinkId, from: usize, piece: Piece, network: &mut Network, queue: &mut Queue) {
        let Some(link) = self.all.get_mut(&id) else { return };
        let (sender, receiver) = (link.ends[from], link.ends[1 - from]);
        let way = &mut link.ways[from];
        way.pieces.push_back(piece);
        let arrives = queue.now + network.reliable_delay(sender.host, receiver.host);
        way.last = way.last.max(arrives);
        let after = way.last.since(queue.now);
        queue.put(after, receiver.host, receiver.epoch, Event::Arrived(id, 1 - from));
    }

    /// The piece whose time has come at an end, unless nothing gets through or nobody wants it any more.
    pub fn arrived(&mut self, id: LinkId, at: usize, network: &Network) -> Option<Arrival> {
        let link = self.all.get_mut(&id)?;
        let (end, other) = (link.ends[at], link.ends[1 - at].host);
        let way = &mut link.ways[1 - at];
        if end.done {
            let piece = way.pieces.pop_front();
            if matches!(piece, Some(Piece::End(_))) {
                self.drop_link(id);
            }
            return None;
        }
        // What was not yet told of the session waits as what is cut off does.
        if link.dead || !network.open(link.ends[0].host, link.ends[1].host) || !end.open || way.held > 0 {
            way.held += 1;
            return None;
        }
        let piece = way.pieces.pop_front()?;
        if matches!(piece, Piece::End(_)) {
            self.drop_link(id);
        }
        Some(Arrival { session: end.session, from: other, piece })
    }

    /// One end wants nothing more, and says why.
    pub fn close(
        &mut self,
        (id, at): (LinkId, usize),
        reason: &str,
        network: &mut Network,
        queue: &mut Queue,
    ) {
        let Some(link) = self.all.get_mut(&id) else { return };
        (link.ends[at].done, link.ends[at].open) = (true, false);
        if link.ends[1 - at].done {
            self.drop_link(id);
        } else {
            self.send(id, at, Piece::End(reason.to_owned()), network, queue);
        }
    }

    /// One end has lost power: the other hears nothing more.
    pub fn die(&mut self, id: LinkId, at: usize, queue: &mut Queue) {
        let Some(link) = self.all.get_mut(&id) else { return };
        (link.ends[at].done, link.ends[at].open, link.dead) = (true, false, true);
        link.blocked = Some(queue.now);
        queue.put(PATIENCE, link.ends[0].host, 0, Event::Expired(id));
    }

    /// An end is set up: what came before is delivered now.
    pub fn opened(&mut self, id: LinkId, at: usize, queue: &mut Queue) -> Option<(End, End)> {
        let link = self.all.get_mut(&id)?;
        link.ends[at].open = true;
        release(id, link, at, Duration::ZERO, queue);
        Some((link.ends[at], link.ends[1 - at]))
    }

    /// The network has changed: what was held up goes on, what is held up now will end.
    pub fn network_changed(&mut self, network: &Network, queue: &mut Queue, dice: &mut Dice) {
        for (id, link) in self.all.iter_mut().filter(|(_, link)| !link.dead) {
            let open = network.open(link.ends[0].host, link.ends[1].host);
            match (open, link.blocked) {
                (false, None) => {
                    link.blocked = Some(queue.now);
                    queue.put(PATIENCE, link.ends[0].host, 0, Event::Expired(*id));
                }
                (true, Some(_)) => {
                    link.blocked = None;
                    for at in 0..2 {
                        if link.ends[at].open {
                            let pause = dice.span(Duration::from_millis(200), Duration::from_secs(2));
                            release(*id, link, at, pause, queue);
                        }
                    }
                }
                (false, Some(_)) | (true, None) => {}
            }
        }
    }

    /// Whether nothing got through a link for long enough to end it.
    pub fn expired(&self, id: LinkId, now: Time) -> bool {
        self.all.get(&id).and_then(|link| link.blocked).is_some_and(|since| now.since(since) >= PATIENCE)
    }

    /// The dialling end of a link, and the other.
    pub fn ends(&self, id: LinkId) -> Option<[End; 2]> {
        self.all.get(&id).map(|link| link.ends)
    }

    /// The links of a host, and which end it has.
    pub fn of_host(&self, host: usize) -> Vec<(LinkId, usize)> {
        let ends = self.by_session.range((host, SessionId(0))..=(host, SessionId(u64::MAX)));
        ends.map(|(_, end)| *end).collect()
    }

    /// The sessions that a process has.
    pub fn sessions_of(&self, host: usize) -> Vec<SessionId> {
        let ends = self.by_session.range((host, SessionId(0))..=(host, SessionId(u64::MAX)));
        ends.filter(|(_, (id, at))| self.all.get(id).is_some_and(|link| link.ends[*at].open))
            .map(|((_, session), _)| *session)
            .collect()
    }

    /// How many links there are.
    pub fn len(&self) -> usize {
        self.all.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }
}

fn release(id: LinkId, link: &mut Link, at: usize, pause: Duration, queue: &mut Queue) {
    let receiver = link.ends[at];
    let way = &mut link.ways[1 - at];
    let held = std::mem::take(&mut way.held);
    way.last = way.last.max(queue.now + pause);
    for _ in 0..held {
        let after = (queue.now + pause).since(queue.now);
        queue.put(after, receiver.host, receiver.epoch, Event::Arrived(id, at));
    }
}
