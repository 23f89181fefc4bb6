//! One way to a member, and how probes fare on it.

use std::collections::VecDeque;
use std::time::Duration;

use crate::time::Time;

/// Probes that are remembered while they are not answered.
const REMEMBERED: usize = 8;

/// An answer says for so long that the way works.
const FRESH: Duration = Duration::from_secs(60);

/// Probes that have to be unanswered before a way counts as lost: a single one may be.
const UNANSWERED: usize = 3;

/// One way to a member.
#[derive(Debug)]
pub struct Leg {
    /// Those that are not answered, oldest first.
    under_way: VecDeque<(u32, Time)>,
    /// How many were sent altogether.
    count: u32,
    /// When the oldest probe since the last answer was sent, and how many were.
    lost: Option<(Time, usize)>,
    answered: Option<Time>,
    streak: u32,
    rtt: Option<Duration>,
    ready: bool,
    due: Time,
    /// Pause from a probe that is answered to the next.
    pause: Duration,
}

impl Leg {
    /// A way on which nothing was tried yet.
    pub fn new(now: Time) -> Self {
        Self {
            under_way: VecDeque::new(),
            count: 0,
            lost: None,
            answered: None,
            streak: 0,
            rtt: None,
            ready: false,
            due: now,
            pause: Duration::ZERO,
        }
    }

    /// A way that something came by before.
    pub(super) fn heard(at: Option<Time>, now: Time) -> Self {
        Self { answered: at, ..Self::new(now) }
    }

    /// When the next probe is due.
    pub(super) fn due(&self) -> Time {
        self.due
    }

    /// The next probe is due now.
    pub(super) fn hasten(&mut self, now: Time) {
        self.due = self.due.min(now);
    }

    /// Nothing is probed before this.
    pub(super) fn wait(&mut self, until: Time) {
        self.due = until;
    }

    /// Whether the last probe is not answered yet.
    pub(super) fn is_doubtful(&self) -> bool {
        self.lost.is_some()
    }

    /// The next probe is due now, or so long after the last one.
    pub(super) fn hasten_after(&mut self, pause: Duration, now: Time) {
        let last = self.under_way.back().map_or(now, |(_, sent)| now.max(*sent + pause));
        self.due = self.due.min(last);
    }

    /// A probe was sent. The next one is due after `pause` when it is answered, and after `impatience` when it is not.
    pub(super) fn sent(&mut self, number: u32, pause: Duration, impatience: Duration, now: Time) {
        if self.lost.is_some_and(|(since, _)| now.since(since) >= super::LOST) {
            self.streak = 0;
        }
        if self.under_way.len() >= REMEMBERED {
            self.under_way.pop_front();
        }
        self.under_way.push_back((number, now));
        let (since, count) = self.lost.unwrap_or((now, 0));
        self.lost = Some((since, count + 1));
        self.count = self.count.saturating_add(1);
        (self.pause, self.due) = (pause, now + impatience);
    }

    /// An answer has come; whether the probe was under way.
    pub(super) fn answered(&mut self, number: u32, ready: bool, now: Time) -> bool {
        let Some(at) = self.under_way.iter().position(|(known, _)| *known == number) else { return false };
        if let Some((_, sent)) = self.under_way.get(at) {
            let rtt = now.since(*sent);
            // As TCP smooths it (RFC 6298, section 2).
            self.rtt = Some(self.rtt.map_or(rtt, |before| (before * 7 + rtt) / 8));
            self.due = now.max(*sent + self.pause);
        }
        self.under_way.drain(..=at);
        self.lost = self.under_way.front().map(|(_, sent)| (*sent, self.under_way.len()));
        self.answered = Some(now);
        self.streak = self.streak.saturating_add(1);
        self.ready = ready;
        true
    }

    /// What was answered before says nothing of now.
    pub(super) fn forget(&mut self) {
        self.ready = false;
    }

    /// Whether a probe with this number is under way.
    pub(super) fn awaits(&self, number: u32) -> bool {
        self.under_way.iter().any(|(known, _)| *known == number)
    }

    /// Since when probes have been unanswered, when several were.
    pub fn lost_for(&self, now: Time) -> Duration {
        self.lost
            .filter(|(_, count)| *count >= UNANSWERED)
            .map_or(Duration::ZERO, |(since, _)| now.since(since))
    }

    /// Whether a probe was answered a moment ago, and none since was not.
    pub fn works(&self, now: Time) -> bool {
        self.answered.is_some_and(|at| now.since(at) < super::GONE)
            && self.lost.is_none_or(|(since, _)| now.since(since) < super::LOST)
    }

    /// Whether a probe was answered ever.
    pub fn was_answered(&self) -> bool {
        self.answered.is_some()
    }

    /// Number of probes sent.
    pub(super) fn count(&self) -> u32 {
        self.count
    }

    /// Answers in a row.
    pub(super) fn streak(&self) -> u32 {
        self.streak
    }

    /// When a probe was answered last.
    pub fn last_answer(&self) -> Option<Time> {
        self.answered
    }

    /// Smoothed time from a probe to its answer.
    pub fn rtt(&self) -> Option<Duration> {
        self.rtt
    }

    /// Whether the tunnel can go this way now.
    pub fn is_ready(&self, now: Time) -> bool {
        self.ready
            && self.answered.is_some_and(|at| now.since(at) < FRESH)
            && self.lost_for(now) < super::LOST
    }
}
