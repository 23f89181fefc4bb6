//! What is written to disk, and what follows once it is durable.
//!
//! A change waits for others a moment, longer on a slow disk. What others are to hear of is said when it is on disk, not
//! before; a write that fails is tried again.

use std::collections::BTreeSet;
use std::time::Duration;

use zeroize::Zeroizing;

use super::{MIN_TICK, Node, Output, RequestId, Response, SessionId, Ticket};
use crate::api::{ApiError, AttachmentId};
use crate::state::{self, StateFile, Writes};
use crate::time::Time;
use crate::view::{Delta, View};

/// What follows once files are durable, or cannot be made so.
pub(super) enum Pending {
    /// Nothing waits for it.
    Nothing,
    /// The cluster this node founded or joined is on disk.
    Member { view: Box<View>, sponsor: Option<SessionId> },
    /// A joiner's admission and first range are on disk.
    Welcome { session: SessionId, delta: Box<Delta> },
    /// The generation by which this node speaks up against another start of its identity is on disk.
    Contested,
    /// A range granted to a member, a promise or a reclaim is on disk.
    Granted { delta: Box<Delta> },
    /// Statements of an authority, such as the removal of a member, are on disk.
    Declared { request: Option<RequestId>, delta: Box<Delta> },
    /// That the node leaves, or stays, is on disk.
    Decided { request: RequestId, leave: bool },
    /// A lease is on disk.
    Leased { request: RequestId, id: AttachmentId },
    /// An attachment is noted as active on disk.
    Activated { request: RequestId, id: AttachmentId },
    /// Leases were released.
    Released { request: Option<RequestId>, leases: Vec<(AttachmentId, crate::leases::Lease)>, gc: bool },
}

impl Pending {
    /// What of the view others are to hear of once it is on disk.
    pub(super) fn delta(&self) -> Option<&Delta> {
        match self {
            Self::Welcome { delta, .. } | Self::Granted { delta } | Self::Declared { delta, .. } => {
                Some(delta)
            }
            Self::Nothing
            | Self::Member { .. }
            | Self::Contested
            | Self::Decided { .. }
            | Self::Leased { .. }
            | Self::Activated { .. }
            | Self::Released { .. } => None,
        }
    }

    /// Whether something of the view waits to be on disk.
    pub(super) fn is_of_the_view(&self) -> bool {
        match self {
            Self::Member { .. } | Self::Welcome { .. } | Self::Granted { .. } | Self::Declared { .. } => true,
            Self::Nothing
            | Self::Contested
            | Self::Decided { .. }
            | Self::Leased { .. }
            | Self::Activated { .. }
            | Self::Released { .. } => false,
        }
    }
}

impl Node {
    /// What of the view is being written, or waits for that.
    pub(super) fn being_written(&self) -> impl Iterator<Item = &Delta> {
        self.pending.values().filter_map(Pending::delta)
    }

    /// Has files written and remembers what follows.
    ///
    /// The view is written first if it has changed: an address that is leased, or the node's own, is of a grant in it.
    pub(super) fn persist(&mut self, files: &[StateFile], then: Pending) {
        let mut files: BTreeSet<StateFile> = files.iter().copied().collect();
        files.extend(self.dirty.contains(&StateFile::Cluster).then_some(StateFile::Cluster));
        let contents = files
            .into_iter()
            .filter_map(|file| {
                self.dirty.remove(&file);
                self.encode(file).map(|(file, bytes)| (file, Zeroizing::new(bytes)))
            })
            .collect();
        if !self.unsaid.is_empty() {
            self.dirty.insert(StateFile::Cluster);
        }
        self.persist_bytes(contents, then);
    }

    pub(super) fn persist_bytes(&mut self, files: Vec<(StateFile, Zeroizing<Vec<u8>>)>, then: Pending) {
        self.tickets += 1;
        let ticket = Ticket(self.tickets);
        self.pending.insert(ticket, then);
        self.writes += 1;
        let mut writes = Writes::default();
        let mut number = |(file, bytes): (StateFile, Zeroizing<Vec<u8>>)| {
            writes.note(file, self.writes);
            (file, Zeroizing::new(state::numbered(file, &bytes, self.writes)))
        };
        let files: Vec<_> = files.into_iter().map(&mut number).collect();
        let whole = files.iter().any(|(file, _)| *file == StateFile::Cluster);
        let merged = self.view.as_ref().filter(|_| whole).map_or(0, View::merged_so_far);
        self.writing.insert(ticket, (writes, merged));
        self.emit(Output::Persist { ticket, files });
    }

    /// The contents of a file; of the view what is news, unless that is so much that it is better written as a whole.
    pub(super) fn encode(&self, file: StateFile) -> Option<(StateFile, Vec<u8>)> {
        let bytes = match file {
            StateFile::Cluster | StateFile::Changes => {
                let view = self.view.as_ref()?;
                return Some(match view.news(MOST_NEWS) {
                    Some(news) => (StateFile::Changes, state::encode_changes(view.cluster(), &news)),
                    None => (StateFile::Cluster, state::encode_cluster(view)),
                });
            }
            StateFile::Node => state::encode_node(&self.stored),
            StateFile::Leases => state::encode_leases(&self.leases.stored(&self.config.boot, self.now)),
            StateFile::Keys => state::encode_keys(&self.pairs.stored()),
            StateFile::Group => state::encode_group(self.datagrams.stored()),
        };
        Some((file, bytes))
    }

    /// Writes what has changed, several changes at once.
    pub(super) fn flush(&mut self) {
        if self.dirty_later.is_some_and(|at| at <= self.now) {
            self.dirty.insert(StateFile::Cluster);
        }
        if self.dirty.contains(&StateFile::Cluster) {
            self.dirty_later = None;
        }
        if !self.dirty.is_empty() && self.now >= self.next_flush {
            self.say_contest();
            self.flushed = self.now;
            self.next_flush = self.now + MAX_FLUSH_PAUSE;
            let files: Vec<_> = self.dirty.iter().copied().collect();
            let unsaid = if self.dirty.contains(&StateFile::Cluster) {
                std::mem::take(&mut self.unsaid)
            } else {
                Delta::default()
            };
            let then = if unsaid.is_empty() {
                Pending::Nothing
            } else {
                Pending::Granted { delta: Box::new(unsaid) }
            };
            self.persist(&files, then);
        }
    }

    pub(super) fn flush_deadline(&self) -> Option<Time> {
        let soon = (!self.dirty.is_empty()).then_some(self.next_flush);
        soon.into_iter().chain(self.dirty_later).min()
    }

    pub(super) fn retry_flush_later(&mut self) {
        self.next_flush = self.now + FLUSH_RETRY;
    }

    pub(super) fn on_persisted(&mut self, ticket: Ticket) {
        if let Some((writes, merged)) = self.writing.remove(&ticket) {
            self.durable.join(&writes);
            if let Some(view) = &mut self.view {
                view.drop_news(merged);
            }
        }
        match self.pending.remove(&ticket) {
            None => {}
            Some(Pending::Nothing) => {
                let took = self.now.since(self.flushed);
                self.next_flush = self.now + (took * FLUSH_SHARE).clamp(MIN_TICK, MAX_FLUSH_PAUSE);
            }
            Some(Pending::Member { view, sponsor }) => self.become_member(*view, sponsor),
            Some(Pending::Welcome { session, delta }) => self.welcome(session, *delta),
            Some(Pending::Contested) => self.contest(),
            Some(Pending::Granted { delta }) => self.spread(&delta),
            Some(Pending::Declared { request, delta }) => self.declared(request, &delta),
            Some(Pending::Decided { request, .. }) => self.reply(request, Ok(Response::Done)),
            Some(Pending::Leased { request, id }) => self.leased(request, &id),
            Some(Pending::Activated { request, id }) => self.activated(request, id),
            Some(Pending::Released { request, leases, gc }) => self.released(request, leases, gc),
        }
    }

    pub(super) fn on_persist_failed(&mut self, ticket: Ticket, error: &str) {
        tracing::error!(error, "state could not be written; what depended on it is not done");
        let pending = self.pending.remove(&ticket);
        let had_view = self.writing.remove(&ticket).is_some_and(|(writes, _)| writes.has_view());
        if had_view && self.view.is_some() {
            self.dirty.insert(StateFile::Cluster);
            self.retry_flush_later();
        }
        // What others are to hear of is said once it is on disk after all.
        if let Some(delta) = pending.as_ref().and_then(Pending::delta) {
            self.unsaid.append(delta.clone());
        }
        if matches!(pending, Some(Pending::Contested)) {
            // The copy does not wait for this disk, and the host remembers the generation.
            self.contest();
        }
        match pending {
            None => {}
            // Tried again with the next change, at the latest when the node says something new of itself.
            Some(Pending::Nothing | Pending::Granted { .. } | Pending::Contested) => {
                self.dirty.insert(StateFile::Keys);
                self.dirty.insert(StateFile::Node);
                self.dirty.insert(StateFile::Leases);
                self.dirty.insert(StateFile::Group);
                self.retry_flush_later();
            }
            Some(Pending::Declared { request, .. }) => {
                let message = format!("it is in force here, but could not be written to disk yet: {error}");
                let error = ApiError::new(crate::api::ErrorCode::Internal, message);
                request.into_iter().for_each(|request| self.reply(request, Err(error.clone())));
            }
            Some(Pending::Decided { request, leave }) => self.decision_failed(request, leave, error),
            Some(Pending::Member { sponsor, .. }) => self.join_failed(sponsor, error),
            Some(Pending::Welcome { session, .. }) => {
                self.refuse(session, crate::message::RefusalCode::Busy, "the sponsor cannot write its state");
            }
            Some(Pending::Leased { request, id }) => self.lease_failed(request, &id, error),
            Some(Pending::Activated { request, id }) => self.activation_failed(request, &id, error),
            Some(Pending::Released { request, leases, .. }) => self.release_failed(request, leases, error),
        }
    }
}

/// Pauses between writes are this many times as long as the last write took: a large state on a slow disk leaves
/// time for other things.
const FLUSH_SHARE: u32 = 4;

/// So much of what was merged with a view is written beside it, some 64 kB. Among 5,000 members the view has 3.5 MB, and
/// a write takes the least on average where the news have about the square root of twice that times an item.
pub(super) const MOST_NEWS: usize = 128;

/// Longest pause between two writes.
pub(super) const MAX_FLUSH_PAUSE: Duration = Duration::from_millis(200);

/// How long others' records may be in memory only, while the kernel's state does not follow from them.
pub(super) const MAX_LATER: Duration = Duration::from_secs(30);

/// Pause after a write that failed.
const FLUSH_RETRY: Duration = Duration::from_secs(5);
