//! Limits on tries to join by password, for one member and for all together.
//!
//! A try counts from the moment its OPAQUE answer is out, as the answer is what lets the other end test a guess;
//! it stops counting when the right password turns out to be at the other end. At one member a source
//! (an IPv4 address, an IPv6 /64) has [`PER_SOURCE`] tries a minute and all together have [`PER_NODE`]. What failed is
//! published ([`Tries`]). Every member adds up what it heard in the last minute, at most [`PER_NODE`] of each
//! member, for no honest one has more; from [`PER_CLUSTER`] on it answers no try for a minute, and for twice as
//! long each time it happens again soon after, up to an hour.
//!
//! Tries by key file are not limited here: nobody guesses 256 bits.

use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, Ipv6Addr};
use std::time::Duration;

use mesh_keys::{IdentityKey, Signed, Tries};

use super::sessions::Phase;
use super::{Node, SessionId};
use crate::state::StateFile;
use crate::time::Time;
use crate::view::Delta;

/// Tries of one source at one member within [`WINDOW`].
const PER_SOURCE: usize = 5;

/// Tries at one member within [`WINDOW`].
const PER_NODE: usize = 10;

/// Failed tries at all members within [`WINDOW`] that close all doors.
const PER_CLUSTER: usize = 60;

/// The time in which tries are counted.
const WINDOW: Duration = Duration::from_secs(60);

/// Longest time for which all doors stay closed.
const LONGEST_LOCK: Duration = Duration::from_secs(3600);

/// What is known of tries at present.
#[derive(Debug, Default)]
pub(super) struct Watch {
    /// Tries at this member that have not succeeded, the oldest first.
    own: Vec<Try>,
    /// What other members have said.
    heard: BTreeMap<IdentityKey, Heard>,
    lock: Option<Lock>,
}

#[derive(Debug)]
struct Try {
    at: Time,
    source: IpAddr,
    /// The session, as long as it may still succeed.
    open: Option<SessionId>,
}

#[derive(Debug, Default)]
struct Heard {
    /// The last total.
    total: Option<u64>,
    /// When failed tries were heard of, the oldest first; at most [`PER_NODE`].
    at: VecDeque<Time>,
}

#[derive(Clone, Copy, Debug)]
struct Lock {
    until: Time,
    span: Duration,
}

impl Watch {
    fn expire(&mut self, now: Time) {
        self.own.retain(|one| now.since(one.at) < WINDOW);
        for heard in self.heard.values_mut() {
            while heard.at.front().is_some_and(|at| now.since(*at) >= WINDOW) {
                heard.at.pop_front();
            }
        }
    }

    /// Forgets what members said that are none any more.
    pub(super) fn retain(&mut self, stays: impl Fn(&IdentityKey) -> bool) {
        self.heard.retain(|key, _| stays(key));
    }

    #[cfg(test)]
    pub(super) fn under_way(&self) -> usize {
        self.own.iter().filter(|one| one.open.is_some()).count()
    }

    /// How long the doors are closed for all.
    fn locked(&self, now: Time) -> Option<Duration> {
        self.lock.filter(|lock| lock.until > now).map(|lock| lock.until - now)
    }

    /// Whether a try from `source` is answered, or for how long not.
    fn admit(&mut self, source: IpAddr, now: Time) -> Result<(), Duration> {
        self.expire(now);
        if let Some(wait) = self.locked(now) {
            return Err(wait);
        }
        let of_source: Vec<Time> =
            self.own.iter().filter(|one| one.source == source).map(|one| one.at).collect();
        let first = |full: bool, at: Option<Time>| at.filter(|_| full).map(|at| at + WINDOW - now);
        let waits = [
            first(self.own.len() >= PER_NODE, self.own.first().map(|one| one.at)),
            first(of_source.len() >= PER_SOURCE, of_source.first().copied()),
        ];
        waits.into_iter().flatten().max().map_or(Ok(()), Err)
    }

    /// Closes the doors when too many tries have failed everywhere.
    fn judge(&mut self, now: Time) {
        self.expire(now);
        let own = self.own.iter().filter(|one| one.open.is_none()).count();
        let failed = own + self.heard.values().map(|heard| heard.at.len()).sum::<usize>();
        if failed < PER_CLUSTER || self.locked(now).is_some() {
            return;
        }
        let again = self.lock.filter(|lock| now.since(lock.until) < 2 * WINDOW);
        let span = again.map_or(WINDOW, |lock| (lock.span * 2).min(LONGEST_LOCK));
        tracing::warn!(
            failed,
            seconds = span.as_secs(),
            "too many tries to join by password failed: none is answered for a while"
        );
        self.lock = Some(Lock { until: now + span, span });
    }
}

impl Node {
    /// Whether a try to join by password on this session is answered, or after how long.
    pub(super) fn begin_try(&mut self, session: SessionId) -> Result<(), Duration> {
        let Some(entry) = self.sessions.get(&session) else { return Ok(()) };
        let source = source_of(
            entry.way.address().map_or(std::net::Ipv6Addr::UNSPECIFIED.into(), |address| address.ip()),
        );
        self.tries.admit(source, self.now)?;
        self.tries.own.push(Try { at: self.now, source, open: Some(session) });
        Ok(())
    }

    /// The right password was at the other end.
    pub(super) fn try_succeeded(&mut self, session: SessionId) {
        self.tries.own.retain(|one| one.open != Some(session));
    }

    /// Counts the tries whose sessions have ended without the right password, and tells the others.
    pub(super) fn advance_tries(&mut self) {
        let mut failed = 0;
        for one in &mut self.tries.own {
            let ended = one.open.is_some_and(|session| {
                self.sessions.get(&session).is_none_or(|entry| matches!(entry.phase, Phase::Closing))
            });
            if ended {
                one.open = None;
                failed += 1;
            }
        }
        if failed > 0 {
            self.publish_tries(failed);
            self.tries.judge(self.now);
        }
    }

    fn publish_tries(&mut self, failed: u32) {
        let minute = self.unix_now().unwrap_or(0) / 60;
        let Some(view) = &mut self.view else { return };
        let before = view.tries_of(&self.me).copied();
        // The present minute also after a clock that was ahead: what counts as newer is the total.
        let window = minute;
        let in_window = before.filter(|before| before.window == window).map_or(0, |before| before.count);
        let tries = Tries {
            cluster: view.cluster(),
            node: self.me,
            window,
            count: in_window.saturating_add(failed),
            total: before.map_or(0, |before| before.total).saturating_add(failed.into()),
        };
        match Signed::sign(&tries, &self.identity) {
            Ok(signed) => {
                let new = view.merge(&Delta { tries: vec![signed], ..Delta::default() }).new;
                self.dirty.insert(StateFile::Cluster);
                self.spread(&new);
            }
            Err(error) => tracing::error!(%error, "the count of failed tries cannot be signed"),
        }
    }

    /// Other members have counted failed tries.
    pub(super) fn heed_tries(&mut self, new: &Delta) {
        if new.tries.is_empty() {
            return;
        }
        let minute = self.unix_now().map(|now| now / 60);
        for tries in new.tries.iter().filter_map(|signed| signed.decode().ok()) {
            if tries.node == self.me {
                continue;
            }
            let heard = self.tries.heard.entry(tries.node).or_default();
            let more = heard.total.map_or(tries.count.into(), |before| tries.total.saturating_sub(before));
            heard.total = Some(tries.total);
            // What comes late, from a part of the network that was cut off, is over.
            if minute.is_some_and(|minute| minute.abs_diff(tries.window) > 1) {
                continue;
            }
            let more = usize::try_from(more).unwrap_or(PER_NODE).min(PER_NODE);
            heard.at.extend(std::iter::repeat_n(self.now, more));
            while heard.at.len() > PER_NODE {
                heard.at.pop_front();
            }
        }
        self.tries.judge(self.now);
    }

    /// What the status says about it.
    pub(super) fn tries_problem(&self) -> Option<String> {
        let wait = self.tries.locked(self.now)?;
        Some(format!(
            "too many tries to join by password have failed in this cluster: none is answered for another {} s",
            wait.as_secs() + 1
        ))
    }
}

/// What one attacker has at least: an IPv4 address, or an IPv6 /64.
fn source_of(ip: IpAddr) -> IpAddr {
    match ip.to_canonical() {
        IpAddr::V6(ip) => IpAddr::V6(Ipv6Addr::from_bits(ip.to_bits() & !u128::from(u64::MAX))),
        v4 @ IpAddr::V4(_) => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn at(seconds: u64) -> Time {
        Time::ZERO + Duration::from_secs(seconds)
    }

    fn source(last: u8) -> IpAddr {
        IpAddr::from([192, 0, 2, last])
    }

    /// As many failed tries as there are at `nodes` other members in a minute.
    fn heard(watch: &mut Watch, nodes: u8, now: Time) {
        for node in 0..nodes {
            let heard = watch.heard.entry(IdentityKey::from_bytes([node; 32])).or_default();
            heard.at = std::iter::repeat_n(now, PER_NODE).collect();
        }
        watch.judge(now);
    }

    #[test]
    fn a_source_has_five_tries_a_minute_and_a_member_ten() {
        let mut watch = Watch::default();
        for n in 0..10 {
            let from = source((n / 5) as u8);
            assert_eq!(watch.admit(from, at(n)), Ok(()));
            watch.own.push(Try { at: at(n), source: from, open: None });
            if n == 4 {
                assert_eq!(watch.admit(from, at(5)), Err(55 * SECOND));
            }
        }
        assert_eq!(watch.admit(source(9), at(20)), Err(40 * SECOND));
        assert_eq!(watch.admit(source(9), at(60)), Ok(()));
    }

    #[test]
    fn sixty_failures_at_all_members_close_every_door_ever_longer() {
        let mut watch = Watch::default();
        heard(&mut watch, 5, at(0));
        assert_eq!(watch.admit(source(1), at(0)), Ok(()), "fifty are not sixty");
        let mut now = at(10);
        for minutes in [1, 2, 4, 8, 16, 32, 60, 60] {
            heard(&mut watch, 6, now);
            assert_eq!(watch.admit(source(1), now), Err(60 * minutes * SECOND));
            now = now + 60 * minutes * SECOND + SECOND;
            assert_eq!(watch.admit(source(1), now), Ok(()));
        }
        now = now + 3 * WINDOW;
        heard(&mut watch, 6, now);
        assert_eq!(watch.admit(source(1), now), Err(WINDOW), "after some quiet it starts anew");
    }

    #[test]
    fn one_member_cannot_close_the_doors_alone() {
        let mut watch = Watch::default();
        let heard = watch.heard.entry(IdentityKey::from_bytes([1; 32])).or_default();
        heard.at = std::iter::repeat_n(at(0), PER_NODE).collect();
        watch.judge(at(0));
        assert_eq!(watch.admit(source(1), at(0)), Ok(()));
    }

    #[test]
    fn a_source_is_an_ipv4_address_or_an_ipv6_64() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        assert_eq!(source_of(ip("::ffff:192.0.2.1")), ip("192.0.2.1"));
        assert_eq!(source_of(ip("2001:db8:1:2:3:4:5:6")), ip("2001:db8:1:2::"));
        assert_ne!(source_of(ip("2001:db8:1:3::")), source_of(ip("2001:db8:1:2::")));
    }
}
