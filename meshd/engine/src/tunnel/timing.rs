//! The timers of a tunnel: section 6 of the WireGuard paper, with the kernel's choices where the paper leaves any.

use std::time::{Duration, Instant};

use mesh_sys::udp::SendBatch;

use super::Tunnel;

/// The initiator of a session makes a new one when it sends with one this old.
pub(super) const REKEY_AFTER_TIME: Duration = Duration::from_secs(120);
/// No session is used when it is this old.
pub(super) const REJECT_AFTER_TIME: Duration = Duration::from_secs(180);
/// An unanswered handshake is given up after this time.
pub(super) const REKEY_ATTEMPT_TIME: Duration = Duration::from_secs(90);
/// An unanswered initiation is repeated after this time, plus jitter.
pub(super) const REKEY_TIMEOUT: Duration = Duration::from_secs(5);
/// Whoever received data and has nothing to send says so after this time.
pub(super) const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// The initiator of a session makes a new one when it receives with one this old, so that a peer that only sends
/// does not run into the end.
pub(super) const REKEY_ON_RECEIVE: Duration =
    REJECT_AFTER_TIME.saturating_sub(KEEPALIVE_TIMEOUT).saturating_sub(REKEY_TIMEOUT);
/// Whoever initiates makes a new session after this many messages.
pub(super) const REKEY_AFTER_MESSAGES: u64 = 1 << 60;
/// So that two ends that initiate at the same moment do not do so again.
pub(super) const MAX_JITTER: Duration = Duration::from_millis(333);
/// A peer may initiate this often (the kernel's 50 per second).
pub(super) const INITIATION_INTERVAL: Duration = Duration::from_millis(20);

impl Tunnel {
    /// When [`Tunnel::handle_timeout`] has something to do; `None` when only a packet can change that.
    ///
    /// Every call that takes a time may bring this forward, but never to less than a second after that time; only
    /// changes of the configuration make it immediate.
    #[must_use]
    pub(crate) fn poll_timeout(&self, now: Instant) -> Option<Instant> {
        let can_send = self.endpoint.is_some() && self.local.is_some();
        let sending = [
            self.attempt.as_ref().map(|attempt| attempt.retry_at),
            self.awaiting_since.map(|since| since + KEEPALIVE_TIMEOUT + REKEY_TIMEOUT),
            self.owing_since.map(|since| since + KEEPALIVE_TIMEOUT),
            (!self.keepalive.is_zero()).then(|| self.last_traffic.map_or(now, |last| last + self.keepalive)),
            (self.rekey_now || (!self.staged.is_empty() && self.has_usable_session(now))).then_some(now),
        ];
        let expiring = [
            self.attempt.as_ref().map(|attempt| attempt.started + REKEY_ATTEMPT_TIME),
            self.live.as_ref().map(|session| session.established + REJECT_AFTER_TIME),
            self.previous.as_ref().map(|session| session.established + REJECT_AFTER_TIME),
            self.answered.as_ref().map(|session| session.established + REJECT_AFTER_TIME),
        ];
        sending.into_iter().filter(|_| can_send).chain(expiring).flatten().min()
    }

    /// Does what is due.
    pub(crate) fn handle_timeout(&mut self, now: Instant, out: &mut SendBatch) {
        let expired = |since: Instant, limit| now.duration_since(since) >= limit;
        // Keys are gone as soon as nothing may use them, sooner than the paper's three times this age.
        self.previous.take_if(|session| expired(session.established, REJECT_AFTER_TIME));
        self.answered.take_if(|session| expired(session.established, REJECT_AFTER_TIME));
        self.live.take_if(|session| expired(session.established, REJECT_AFTER_TIME));
        if self.live.is_none() {
            self.owing_since = None;
        }

        if self.attempt.take_if(|attempt| expired(attempt.started, REKEY_ATTEMPT_TIME)).is_some() {
            tracing::debug!(peer = %self.remote, "handshake given up: no answer within 90 s");
            self.staged.clear();
            self.awaiting_since = None;
        } else if self.attempt.as_ref().is_some_and(|attempt| now >= attempt.retry_at) {
            // Perhaps the peer does not hear us because of where we send from.
            self.forget_any_source();
            self.send_initiation(now, out);
        }
        if std::mem::take(&mut self.rekey_now) {
            self.initiate(now, out);
        }
        if self.awaiting_since.is_some_and(|since| expired(since, KEEPALIVE_TIMEOUT + REKEY_TIMEOUT)) {
            self.awaiting_since = None;
            self.forget_any_source();
            self.initiate(now, out);
        }
        if self.owing_since.is_some_and(|since| expired(since, KEEPALIVE_TIMEOUT)) {
            self.owing_since = None;
            self.send_keepalive(now, out);
        }
        if !self.keepalive.is_zero() && self.last_traffic.is_none_or(|last| expired(last, self.keepalive)) {
            self.last_traffic = Some(now);
            self.send_keepalive(now, out);
        }
        self.flush_staged(now, out);
    }

    fn send_keepalive(&mut self, now: Instant, out: &mut SendBatch) {
        if self.has_usable_session(now) {
            self.seal_live(&[], now, out);
        } else {
            self.initiate(now, out);
        }
    }

    fn forget_any_source(&mut self) {
        if let Some(endpoint) = &mut self.endpoint {
            endpoint.source = None;
        }
    }

    pub(super) fn note_sent(&mut self, data: bool, now: Instant) {
        self.last_traffic = Some(now);
        self.owing_since = None;
        if data && self.awaiting_since.is_none() {
            self.awaiting_since = Some(now);
        }
    }

    pub(super) fn note_received(&mut self, data: bool, now: Instant) {
        self.last_traffic = Some(now);
        self.awaiting_since = None;
        if data && self.owing_since.is_none() {
            self.owing_since = Some(now);
        }
    }
}
