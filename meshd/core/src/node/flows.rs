//! What the tunnels carry on the direct way, and what does not get through: for people who ask why.
//!
//! WireGuard's counters say that something is sent and nothing comes back, and not in which direction it is lost. So two
//! members tell each other, beside the probes of their path, when their lane received and sent something last
//! ([`Part::LaneTraffic`]). What a relay was chosen for is kept until the direct way carries the tunnel again.
//!
//! Nothing is decided by this: a member that says something false misleads the reader of `meshctl why`, and nobody else.

use std::collections::BTreeMap;
use std::time::Duration;

use mesh_keys::NodeId;

use super::{Node, TunnelFacts};
use crate::api::Direction;
use crate::diagnose::Silence;
use crate::gossip::wire::Part;
use crate::path::Way;
use crate::time::Time;

/// Counters are looked at every second at each end: what is closer together may be the same packet.
const SLACK: Duration = Duration::from_millis(1500);

/// What has arrived so long after a packet was seen to be sent is a later one.
const MEANWHILE: Duration = Duration::from_millis(500);

/// What was sent more than once within so long, and has not arrived, does not by chance.
const LOST: Duration = Duration::from_secs(2);

/// WireGuard answers by itself within 10 s (`KEEPALIVE_TIMEOUT`; paper, section 6.5), if the other end has a session.
const ANSWERED_BY: Duration = Duration::from_secs(12);

/// A handshake is answered at once; this is one that was tried twice.
const HANDSHAKE: Duration = Duration::from_secs(6);

/// Bytes that nobody answers: a keepalive or two, of 32 each (paper, section 5.4.6).
const KEEPALIVES: u64 = 64;

/// After this time on the direct way nothing is on its way through the relay any more.
const SETTLED: Duration = Duration::from_secs(3);

/// What has carried nothing for so long is forgotten, unless it has failed.
const FORGOTTEN: Duration = Duration::from_secs(600);

/// A session that is older does not work (paper, section 6.1).
const SESSION_AGE: Duration = Duration::from_secs(190);

/// The lanes that have carried something of late.
#[derive(Debug, Default)]
pub(super) struct Flows {
    of: BTreeMap<(NodeId, u8), Flow>,
}

/// Something that was sent several times.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Sent {
    since: Time,
    last: Time,
    bytes: u64,
}

impl Sent {
    fn at(now: Time, bytes: u64) -> Self {
        Self { since: now, last: now, bytes }
    }

    fn more(&mut self, now: Time, bytes: u64) {
        (self.last, self.bytes) = (now, self.bytes.saturating_add(bytes));
    }

    fn spans(&self) -> Duration {
        self.last.since(self.since)
    }
}

/// One lane to one member.
#[derive(Debug, Default)]
pub(super) struct Flow {
    received: Option<Time>,
    sent: Option<Time>,
    /// Since when the tunnel goes directly.
    direct: Option<Time>,
    has_session: bool,
    /// Sent directly since anything came back.
    unanswered: Option<Sent>,
    /// Sent directly, and the member has not said that it has come.
    unheard: Option<Sent>,
    /// The member says that it has not.
    lost: bool,
    /// The member says that it has sent something directly, and nothing has come since.
    awaited: Option<Sent>,
    /// When the member's lane has received something, as it says.
    heard_there: Option<Time>,
    /// Why the direct way was given up, and when.
    failure: Option<(Silence, Time)>,
}

impl Flow {
    fn observe(&mut self, sent: u64, received: u64, direct: bool, now: Time) {
        if direct && self.direct.is_none() {
            self.direct = Some(now);
        } else if !direct && self.direct.is_some() {
            self.given_up(now);
        }
        if received > 0 {
            self.received = Some(now);
            (self.unanswered, self.awaited) = (None, None);
            if self.direct.is_some_and(|since| now.since(since) >= SETTLED) && !self.lost {
                self.failure = None;
            }
        }
        if sent == 0 {
            return;
        }
        self.sent = Some(now);
        if !direct {
            return;
        }
        match &mut self.unheard {
            Some(unheard) => unheard.more(now, sent),
            None => self.unheard = Some(Sent::at(now, sent)),
        }
        if received == 0 && sent > KEEPALIVES {
            match &mut self.unanswered {
                Some(unanswered) => unanswered.more(now, sent),
                None => self.unanswered = Some(Sent::at(now, sent)),
            }
        }
    }

    /// The member tells how long ago its lane received and sent something.
    fn told(&mut self, received: Option<Duration>, sent: Option<Duration>, now: Time) {
        self.heard_there = received.map(|ago| now.before(ago));
        if self.direct.is_none() {
            return;
        }
        if let Some(unheard) = &self.unheard {
            let has_come = self.heard_there.is_some_and(|at| at + SLACK >= unheard.since);
            if has_come {
                (self.unheard, self.lost) = (None, false);
            } else if unheard.spans() >= LOST && now.since(unheard.since) >= LOST + SLACK {
                self.lost = true;
            }
        }
        let Some(sent) = sent.map(|ago| now.before(ago)) else { return };
        // What came by a relay until a moment ago was not sent directly.
        let begun = self.direct.map_or(now, |since| since + SLACK);
        if sent >= begun && self.received.is_none_or(|received| sent > received + SLACK) {
            match &mut self.awaited {
                Some(awaited) => awaited.more(sent.max(awaited.last), 0),
                None => self.awaited = Some(Sent::at(sent, 0)),
            }
        }
    }

    /// The tunnel goes through a relay from now on.
    fn given_up(&mut self, now: Time) {
        let said = self.silence(now);
        // The path may know sooner than what is sure by itself.
        let silence = said.or_else(|| {
            let unanswered = self.unanswered.as_ref()?;
            let has_come = self.heard_there.is_some_and(|at| at >= unanswered.since + MEANWHILE);
            let direction = if has_come { Direction::FromMember } else { Direction::Either };
            Some(silence_of(direction, unanswered, now))
        });
        if let Some(mut silence) = silence {
            if let (Direction::Either, Some((before, _))) = (silence.direction, &self.failure) {
                // A short try of a way that was found closed before.
                silence.direction = before.direction;
            }
            self.failure = Some((silence, now));
        }
        (self.direct, self.unanswered, self.unheard, self.awaited, self.lost) =
            (None, None, None, None, false);
    }

    /// What does not get through directly now, as far as that is beyond doubt.
    fn silence(&self, now: Time) -> Option<Silence> {
        let awaited = self
            .awaited
            .as_ref()
            .filter(|awaited| awaited.spans() >= LOST && now.since(awaited.since) >= LOST + SLACK);
        let lost = self.unheard.as_ref().filter(|_| self.lost);
        let unanswered = self.unanswered.as_ref().filter(|unanswered| {
            let patience = if self.has_session { ANSWERED_BY } else { HANDSHAKE };
            unanswered.spans() >= LOST && now.since(unanswered.since) >= patience
        });
        match (lost, awaited) {
            (Some(lost), Some(_)) => Some(silence_of(Direction::Both, lost, now)),
            (Some(lost), None) => Some(silence_of(Direction::ToMember, lost, now)),
            (None, Some(awaited)) => {
                let sent = self.unanswered.as_ref().map_or(0, |unanswered| unanswered.bytes);
                Some(Silence { sent, ..silence_of(Direction::FromMember, awaited, now) })
            }
            (None, None) => {
                let unanswered = unanswered?;
                let has_come = self.heard_there.is_some_and(|at| at + SLACK >= unanswered.since);
                let direction = if has_come { Direction::FromMember } else { Direction::Either };
                Some(silence_of(direction, unanswered, now))
            }
        }
    }

    fn is_forgotten(&self, now: Time) -> bool {
        let last = self.received.max(self.sent);
        self.failure.is_none() && last.is_none_or(|last| now.since(last) > FORGOTTEN)
    }
}

fn silence_of(direction: Direction, sent: &Sent, now: Time) -> Silence {
    Silence { direction, sent: sent.bytes, over: now.since(sent.since), ended: None }
}

/// What is known of a lane, for people.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Seen {
    /// Since something came.
    pub(super) received: Option<Duration>,
    /// Since something was sent.
    pub(super) sent: Option<Duration>,
    /// What does not get through directly, or did not when that was tried last.
    pub(super) silence: Option<Silence>,
}

impl Flows {
    /// What is known of a lane to a member.
    pub(super) fn seen(&self, peer: &NodeId, lane: u8, now: Time) -> Seen {
        let Some(flow) = self.of.get(&(*peer, lane)) else { return Seen::default() };
        let since = |at: Option<Time>| at.map(|at| now.since(at));
        let failed = flow.failure.map(|(silence, at)| Silence { ended: Some(now.since(at)), ..silence });
        Seen { received: since(flow.received), sent: since(flow.sent), silence: flow.silence(now).or(failed) }
    }

    /// Forgets the members that `keep` does not say.
    pub(super) fn retain(&mut self, keep: impl Fn(&NodeId) -> bool) {
        self.of.retain(|(peer, _), _| keep(peer));
    }
}

impl Node {
    /// What a lane to a member has carried.
    pub(super) fn observe_flow(
        &mut self,
        peer: NodeId,
        lane: u8,
        before: Option<&TunnelFacts>,
        facts: &TunnelFacts,
    ) {
        let now = self.now;
        // Counters start again with a peer that is made anew.
        let base = before.copied().unwrap_or(*facts);
        let is_same = base.rx_bytes <= facts.rx_bytes && base.tx_bytes <= facts.tx_bytes;
        let base = if is_same { base } else { TunnelFacts::default() };
        let (sent, received) = (facts.tx_bytes - base.tx_bytes, facts.rx_bytes - base.rx_bytes);
        let direct = self.paths.get(&peer).is_none_or(|path| path.way() == Way::Direct);
        let flows = &mut self.flows.of;
        if sent == 0 && received == 0 && !flows.contains_key(&(peer, lane)) {
            return;
        }
        let flow = flows.entry((peer, lane)).or_default();
        flow.has_session = facts.handshake_age.is_some_and(|age| age < SESSION_AGE);
        flow.observe(sent, received, direct, now);
        if flow.is_forgotten(now) {
            flows.remove(&(peer, lane));
        }
    }

    /// What the other end is told of this node's lanes.
    pub(super) fn lane_traffic(&self, peer: &NodeId) -> impl Iterator<Item = Part> {
        let now = self.now;
        let ago =
            move |at: Option<Time>| at.map(|at| u32::try_from(now.since(at).as_millis()).unwrap_or(u32::MAX));
        let peer = *peer;
        self.flows.of.range((peer, 0)..=(peer, u8::MAX)).map(move |((_, lane), flow)| Part::LaneTraffic {
            lane: *lane,
            received: ago(flow.received),
            sent: ago(flow.sent),
        })
    }

    /// The other end tells of its lanes.
    pub(super) fn on_lane_traffic(
        &mut self,
        from: NodeId,
        lane: u8,
        received: Option<u32>,
        sent: Option<u32>,
    ) {
        let now = self.now;
        let of = |ago: Option<u32>| ago.map(|ago| Duration::from_millis(ago.into()));
        if let Some(flow) = self.flows.of.get_mut(&(from, lane)) {
            flow.told(of(received), of(sent), now);
        } else if sent.is_some() && self.has_lane(&from, lane) {
            // It sends, and nothing was ever seen here.
            let flow =
                Flow { direct: self.paths.relay_to(&from).is_none().then_some(now), ..Flow::default() };
            self.flows.of.entry((from, lane)).or_insert(flow).told(of(received), of(sent), now);
        }
    }

    fn has_lane(&self, peer: &NodeId, lane: u8) -> bool {
        let record = self.view.as_ref().and_then(|view| view.record(peer));
        record.is_some_and(|record| record.lanes.iter().any(|known| known.index == lane))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// Seconds in which this host sends and receives so many bytes, the member says how long ago it received and sent
    /// something, and the tunnel has a session.
    fn after(seconds: u32, sent: u64, received: u64, told: Option<[Option<u32>; 2]>) -> (Flow, Time) {
        let mut flow = Flow { has_session: true, ..Flow::default() };
        let mut now = Time::from_origin(SECOND * 1000);
        for _ in 0..seconds {
            now = now + SECOND;
            flow.observe(sent, received, true, now);
            if let Some(told) = told {
                let [received, sent] =
                    told.map(|ago| ago.map(|ago| Duration::from_millis(ago.into()).min(now.since_origin())));
                flow.told(received, sent, now);
            }
        }
        (flow, now)
    }

    fn direction(flow: &Flow, now: Time) -> Option<Direction> {
        flow.silence(now).map(|silence| silence.direction)
    }

    #[test]
    fn the_direction_follows_from_what_both_ends_say() {
        let long = 900_000;
        for (sent, received, told, expected) in [
            // All is well.
            (100, 100, [Some(300), Some(300)], None),
            // Nobody sends anything.
            (0, 0, [Some(long), Some(long)], None),
            // This host sends, and the member has received nothing for long.
            (100, 0, [Some(long), Some(long)], Some(Direction::ToMember)),
            (100, 0, [None, None], Some(Direction::ToMember)),
            // It is so also when the member's own packets come.
            (100, 100, [Some(long), Some(300)], Some(Direction::ToMember)),
            // The member receives, and its answers are lost.
            (100, 0, [Some(300), Some(300)], Some(Direction::FromMember)),
            // It says that it sends, and nothing comes.
            (0, 0, [Some(long), Some(300)], Some(Direction::FromMember)),
            (100, 0, [Some(long), Some(300)], Some(Direction::Both)),
        ] {
            let (flow, now) = after(8, sent, received, Some(told));
            assert_eq!(direction(&flow, now), expected, "{sent} {received} {told:?}");
        }
    }

    #[test]
    fn an_older_member_says_nothing_and_the_direction_is_not_known() {
        let (flow, now) = after(8, 100, 0, None);
        assert_eq!(direction(&flow, now), None, "it may have had nothing to say");
        let (flow, now) = after(14, 100, 0, None);
        let silence = flow.silence(now).unwrap();
        assert_eq!((silence.direction, silence.sent), (Direction::Either, 1400));
        assert_eq!(silence.over, SECOND * 13);
        let (mut flow, now) = after(8, 100, 0, None);
        flow.has_session = false;
        assert_eq!(direction(&flow, now), Some(Direction::Either), "a handshake is answered at once");
    }

    #[test]
    fn keepalives_are_not_answered_and_need_not_be() {
        let (flow, now) = after(60, 32, 0, None);
        assert_eq!(direction(&flow, now), None);
        // A last word, and then nothing for long.
        let (mut flow, now) = after(1, 500, 0, None);
        let later = now + SECOND * 60;
        flow.observe(0, 0, true, later);
        assert_eq!(direction(&flow, later), None);
    }

    #[test]
    fn a_single_packet_that_is_lost_is_no_closed_port() {
        let (mut flow, mut now) = after(1, 100, 0, None);
        for _ in 0..8 {
            now = now + SECOND;
            flow.observe(0, 0, true, now);
            flow.told(Some(SECOND * 900), Some(SECOND * 900), now);
        }
        assert_eq!(direction(&flow, now), None);
    }

    #[test]
    fn what_a_relay_was_chosen_for_is_kept_until_the_direct_way_carries_something() {
        let (mut flow, mut now) = after(8, 100, 0, Some([None, None]));
        for _ in 0..30 {
            now = now + SECOND;
            flow.observe(100, 100, false, now);
        }
        let (failed, _) = flow.failure.expect("a failure");
        assert_eq!(failed.direction, Direction::ToMember);
        assert_eq!(direction(&flow, now), None, "through the relay all is well");
        // A short try.
        for _ in 0..2 {
            now = now + SECOND;
            flow.observe(100, 0, true, now);
        }
        now = now + SECOND;
        flow.observe(100, 100, false, now);
        let (failed, at) = flow.failure.expect("a failure");
        assert_eq!((failed.direction, at), (Direction::ToMember, now), "and it is not forgotten by that");
        // What was on its way through the relay comes a moment after the change.
        for second in 0..6 {
            now = now + SECOND;
            flow.observe(100, 100, true, now);
            flow.told(Some(SECOND), Some(SECOND), now);
            assert_eq!(flow.failure.is_some(), second < 3, "after {second} s");
        }
    }
}
