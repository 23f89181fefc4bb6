//! What is due, in order of time; of the same time, in the order in which it was put there.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Duration;

use mesh_core::node::{Input, Ticket};
use mesh_core::state::StateFile;
use mesh_core::time::Time;

use crate::faults::Relief;
use crate::links::LinkId;

/// Something that happens at a host, for the process that ran when it was put there.
#[derive(Debug)]
pub enum Event {
    /// The node asked to be woken.
    Tick,
    /// The node is told something.
    Tell(Box<Input>),
    /// The files of a write are on disk.
    Written(Ticket, Vec<(StateFile, Vec<u8>)>),
    /// The kernel takes up the newest desired state.
    Apply,
    /// A call has come to its destination.
    Called(Box<Call>),
    /// One end of a link is set up.
    Opened(LinkId, usize),
    /// The next piece has come to one end of a link.
    Arrived(LinkId, usize),
    /// A link through which nothing gets has to end.
    Expired(LinkId),
    /// A pod comes or goes.
    Pods,
    /// The shell looks what is left of pods.
    Look,
    /// An adversary acts.
    Evil,
    /// Who listens on the network repeats something.
    Outsider,
    /// Packets go through the tunnels of a host.
    Traffic,
    /// Its daemon looks at the counters.
    Tunnels,
    /// Something that was broken is mended.
    Relief(Relief),
    /// The next fault.
    Fault,
}

/// A call on its way.
#[derive(Debug)]
pub struct Call {
    /// Who calls, and which of its processes.
    pub from: (usize, u64),
    /// Whom.
    pub target: std::net::SocketAddr,
}

struct Entry {
    at: (Time, u64),
    host: usize,
    epoch: u64,
    event: Event,
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.at == other.at
    }
}

impl Eq for Entry {}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Entry {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.at.cmp(&other.at)
    }
}

/// What is due.
pub struct Queue {
    heap: BinaryHeap<Reverse<Entry>>,
    sequence: u64,
    /// The virtual clock.
    pub now: Time,
}

impl Default for Queue {
    fn default() -> Self {
        Self { heap: BinaryHeap::new(), sequence: 0, now: Time::from_origin(Duration::from_secs(1)) }
    }
}

impl Queue {
    /// Puts an event `after` now; `epoch` counts the processes of the host.
    pub fn put(&mut self, after: Duration, host: usize, epoch: u64, event: Event) {
        self.sequence += 1;
        self.heap.push(Reverse(Entry { at: (self.now + after, self.sequence), host, epoch, event }));
    }

    /// Takes what is due next, not later than `end`, and sets the clock.
    pub fn take(&mut self, end: Time) -> Option<(usize, u64, Event)> {
        if self.heap.peek()?.0.at.0 > end {
            return None;
        }
        let Reverse(entry) = self.heap.pop()?;
        self.now = entry.at.0;
        Some((entry.host, entry.epoch, entry.event))
    }

    /// The files that a process of a host is writing.
    pub fn written(&self, host: usize, epoch: u64) -> Option<Vec<(StateFile, Vec<u8>)>> {
        self.heap.iter().find_map(|Reverse(entry)| match &entry.event {
            Event::Written(_, files) if (entry.host, entry.epoch) == (host, epoch) => Some(files.clone()),
            Event::Written(..) | Event::Tick | Event::Tell(_) | Event::Apply | Event::Called(_) => None,
            Event::Opened(..) | Event::Arrived(..) | Event::Expired(_) | Event::Pods | Event::Look => None,
            Event::Evil
            | Event::Outsider
            | Event::Traffic
            | Event::Tunnels
            | Event::Relief(_)
            | Event::Fault => None,
        })
    }
}
