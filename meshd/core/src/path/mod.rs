//! Which way the tunnel to a member takes: to the member itself, or through a relay.
//!
//! The node with the lower id of a pair *leads*: it chooses for both. A relay knows the indices of a session only from the
//! handshake that it has passed on, so the two must not have one relay each.
//!
//! A path is judged by two things, neither of which is enough. **Probes** are datagrams between the control ports, with an
//! answer; they go to the member itself, or are handed on by a relay, and so say how long the way is and whether the
//! member is registered there. The tunnel's port may be closed all the same. The tunnel's **counters** say what it really
//! carries, but not whether anybody had a reason to answer. So:
//!
//! | the way is taken to be dead | after |
//! |---|---|
//! | probes were answered, and are no more; and what is sent is not answered either, or the other end has trouble | [`LOST`] |
//! | probes never were answered; packets are sent, and there is no session | [`NO_SESSION`] |
//! | probes are answered; packets are sent, and there is no session: the tunnel's port is closed | [`PORT_CLOSED`] |
//! | packets are sent, none comes, though WireGuard would have answered by now (paper, section 6.5) | [`SILENT`] |
//!
//! Paths are looked at only where it matters: where something has been sent or received of late, where a relay is in use,
//! and where the member was never reached. All others cost nothing. A path on which nothing is wrong is probed by the end
//! that leads; the other one begins when what it sends is not answered. Where a NAT or a firewall lets in only what it knows
//! from the way out, each end behind one opens the way by probes of its own.
//!
//! What is decided here is pure: time, numbers and candidates are arguments, and what is to be done is returned.

mod leg;
pub mod mtu;
pub mod spread;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::time::Duration;

use mesh_keys::NodeId;
use rand_core::RngCore;
use serde::{Deserialize, Serialize};

pub use self::leg::Leg;
use crate::node::TunnelFacts;
use crate::time::Time;

/// Silence after which a way is dead, probes having been answered before.
pub const LOST: Duration = Duration::from_millis(1200);

/// After so long without answers nobody is in a hurry any more.
pub const GONE: Duration = Duration::from_secs(5);

/// Packets without a session, on a way on which no probe was ever answered.
pub const NO_SESSION: Duration = Duration::from_millis(1500);

/// Packets without a session, on a way on which probes are answered: WireGuard has tried it twice.
pub const PORT_CLOSED: Duration = Duration::from_secs(6);

/// Packets without an answer: `KEEPALIVE_TIMEOUT` and `REKEY_TIMEOUT` of WireGuard's, and a second.
pub const SILENT: Duration = Duration::from_secs(16);

/// A tunnel that carried something within this time is watched.
pub const WATCHED: Duration = Duration::from_secs(6);

/// Bytes that say nothing of whether somebody talks: a keepalive or two, of 32 each (paper, section 5.4.6); and with a new
/// session an initiation, a response and a keepalive (sections 5.4.2 and 5.4.3).
const KEEPALIVES: u64 = 64;
const HANDSHAKE: u64 = 148 + 92 + 32;

/// Bytes of a handshake initiation (paper, section 5.4.2).
const INITIATION: u64 = 148;

/// A relay that is not ready after so many probes makes room for another one.
const ENOUGH_PROBES: u32 = 4;

/// A session that is older does not work (WireGuard paper, section 6.1).
const SESSION_AGE: Duration = Duration::from_secs(190);

/// Pause between probes: of the way in use, and of one of which the last probe is unanswered; of ways that might be better;
/// and of what is in use without anything being sent.
const PACE: Duration = Duration::from_secs(1);
const FAST_PACE: Duration = Duration::from_millis(250);
const SLOW_PACE: Duration = Duration::from_secs(4);
const IDLE_PACE: Duration = Duration::from_secs(40);

/// Pause between probes that hold a way open: NATs keep a mapping for 30 s at the least, mostly.
const OPENING_PACE: Duration = Duration::from_secs(20);

/// Relays that are tried at a time.
pub const TRIED: usize = 3;

/// Relays that a path knows at a time, at most.
const KNOWN: usize = 2 * TRIED + 2;

/// A relay that was given up is the last choice for so long.
const FAILED: Duration = Duration::from_secs(120);

/// Rounds of a search at full speed; further ones have pauses that double, up to [`IDLE_PACE`].
const EAGER_ROUNDS: u32 = 8;

/// Answers in a row before the direct way is taken again: by a tunnel that carries something, and by an idle one.
const STREAK: u32 = 3;
const IDLE_STREAK: u32 = 6;

/// Pause after the direct way has proved useless for the tunnel though probes are answered; it doubles.
const HOLD: Duration = Duration::from_secs(10);
const MAX_HOLD: Duration = Duration::from_secs(900);

/// Within this time after it was chosen again the direct way has to show that it carries the tunnel.
const PROMOTED: Duration = Duration::from_secs(20);

/// A way to a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Way {
    /// To the member itself.
    Direct,
    /// Through this member.
    Relay(NodeId),
}

impl Way {
    /// The relay, if there is one.
    pub fn relay(self) -> Option<NodeId> {
        match self {
            Self::Direct => None,
            Self::Relay(relay) => Some(relay),
        }
    }
}

/// Why a way was chosen; for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// Nothing speaks against it.
    Default,
    /// The member never answered by itself.
    Unreached,
    /// The way before was taken to be dead.
    Lost,
    /// Probes are answered, and the tunnel carries nothing: its port is closed on the way.
    PortClosed,
    /// The direct way works again.
    Restored,
    /// WireGuard, or the node that leads, has it so.
    Found,
}

impl Why {
    /// A few words.
    pub fn text(self) -> &'static str {
        match self {
            Self::Default => "nothing speaks against it",
            Self::Unreached => "the member does not answer by itself",
            Self::Lost => "the way before was lost",
            Self::PortClosed => "the member answers on its control port, and its tunnel's port is closed",
            Self::Restored => "the member answers by itself again",
            Self::Found => "as the other end has chosen",
        }
    }
}

/// What the node is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// Send a probe with this number.
    Probe {
        /// Which way.
        way: Way,
        /// What the answer will have.
        number: u32,
    },
    /// The way has changed: from the next moment on the tunnel takes that of [`Path::way`].
    Moved {
        /// Sessions that there are cannot go that way: a new one has to be made.
        anew: bool,
    },
}

/// What this end has to do so that the other one's packets get in by the direct way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Opening {
    /// Nothing: they do.
    #[default]
    None,
    /// It sends something itself, as long as anybody talks.
    WhileBusy,
    /// The same at all times, as neither end gets in at the other by itself.
    Always,
}

/// What a tunnel has carried, as far as it matters.
#[derive(Clone, Copy, Debug, Default)]
struct Traffic {
    counters: Option<(u64, u64)>,
    /// When the session began, as far as the age says.
    session: Option<Time>,
    received: Option<Time>,
    /// When there was more than keepalives, in either direction.
    busy: Option<Time>,
    /// Since when packets were sent and none received.
    unanswered: Option<Time>,
    has_session: bool,
}

/// The way to one member.
#[derive(Debug)]
pub struct Path {
    leads: bool,
    begun: Time,
    way: Way,
    why: Why,
    since: Time,
    traffic: Traffic,
    direct: Leg,
    relays: BTreeMap<NodeId, Leg>,
    /// The other end has asked for attention.
    alarmed: Option<Time>,
    /// The end that leads has sent a probe by any way: it does what there is to do.
    led: Option<Time>,
    /// The other end does not get in here but by a way that this one holds open.
    kept: bool,
    opening: Opening,
    /// It never answered by itself, as far as the node knows.
    unreached: bool,
    /// Relays that were given up, and until when that counts.
    failed: BTreeMap<NodeId, Time>,
    /// The relay that was in use before the direct way.
    left: Option<NodeId>,
    /// Packets came through the tunnel shortly before the way in use was chosen.
    talked: bool,
    /// The direct way was chosen again while nothing was sent: a new session shows whether it carries the tunnel.
    on_trial: bool,
    /// The relay in use has lost what it knew: a new session is made once both ends are registered there again.
    forgotten: bool,
    /// When that was last.
    forgot: Option<Time>,
    /// The direct way is not taken again before this.
    held: Option<Time>,
    hold: Duration,
    /// Rounds of the search for a relay, and when the next one begins.
    rounds: u32,
    next_round: Time,
    /// When a relay was searched last.
    searched: Time,
}

/// Whether these are the bytes of an initiation or two, and nothing else: other messages but responses have a multiple of 16,
/// or the length of the device's MTU. Where the port is closed in one direction, the other end begins handshakes in vain: that
/// is no answer.
fn is_initiations(bytes: u64) -> bool {
    bytes == INITIATION || bytes == 2 * INITIATION
}

impl Path {
    /// The way to a member; `leads` if this node chooses. It has answered itself at `heard`, if ever; `unreached`: nor did it
    /// in any other way.
    pub fn new(leads: bool, heard: Option<Time>, unreached: bool, now: Time) -> Self {
        Self {
            leads,
            begun: now,
            way: Way::Direct,
            why: Why::Default,
            since: now,
            traffic: Traffic::default(),
            direct: Leg::heard(heard, now),
            relays: BTreeMap::new(),
            alarmed: None,
            led: None,
            kept: false,
            opening: Opening::None,
            unreached,
            failed: BTreeMap::new(),
            left: None,
            talked: false,
            on_trial: false,
            forgotten: false,
            forgot: None,
            held: None,
            hold: HOLD,
            rounds: 0,
            next_round: now,
            searched: now,
        }
    }

    /// The way that the tunnel takes.
    pub fn way(&self) -> Way {
        self.way
    }

    /// Why, and since when.
    pub fn reason(&self) -> (Why, Time) {
        (self.why, self.since)
    }

    /// Whether this node chooses.
    pub fn leads(&self) -> bool {
        self.leads
    }

    /// What is known of the direct way.
    pub fn direct(&self) -> &Leg {
        &self.direct
    }

    /// What is known of the ways through relays.
    pub fn relays(&self) -> impl Iterator<Item = (&NodeId, &Leg)> {
        self.relays.iter()
    }

    /// Whether the path needs no attention: the tunnel goes directly, carries nothing, and nothing is to be remembered.
    pub fn is_idle(&self, now: Time) -> bool {
        let remembers = self.held.is_some_and(|held| now < held + self.hold)
            || (self.why == Why::Restored && now.since(self.since) < PROMOTED);
        let is_held_open = self.opening == Opening::Always;
        self.way == Way::Direct && !self.unreached && !self.is_watched(now) && !remembers && !is_held_open
    }

    /// Whether it is there because the member was never reached.
    pub fn is_unreached(&self) -> bool {
        self.unreached
    }

    /// The relay that was in use before the direct way: what still comes by it has WireGuard send there again.
    pub fn left(&self) -> Option<NodeId> {
        self.left.filter(|_| self.way == Way::Direct)
    }

    /// Whether something was sent or received of late, or the other end says that it would like to.
    pub fn is_watched(&self, now: Time) -> bool {
        self.is_busy(now) || self.is_alarmed(now)
    }

    fn is_busy(&self, now: Time) -> bool {
        self.traffic.busy.is_some_and(|at| now.since(at) < WATCHED)
    }

    fn is_alarmed(&self, now: Time) -> bool {
        self.alarmed.is_some_and(|at| now.since(at) < WATCHED)
    }

    /// Whether this end itself would send something, and the way is in doubt: the other end is to look at it, too. What
    /// the other end has said of itself is not said back.
    pub fn alarms(&self, now: Time) -> bool {
        (self.is_busy(now) || (self.unreached && self.way == Way::Direct)) && self.searches(now)
    }

    /// Whether the direct way was chosen while nothing was sent: a keepalive begins a session, to see whether it carries.
    pub fn is_on_trial(&self) -> bool {
        self.on_trial
    }

    /// What this end has to do for the direct way, as far as is known now.
    pub fn set_opening(&mut self, opening: Opening) {
        self.opening = opening;
    }

    /// Whether nothing has come through the tunnel since `at`, though something was sent. What was before the path was looked
    /// at says nothing, if there is a session.
    pub fn is_silent_since(&self, at: Time, now: Time) -> bool {
        let traffic = &self.traffic;
        let unanswered = traffic.unanswered.is_some_and(|since| now.since(since) >= LOST);
        (!traffic.has_session || (unanswered && at >= self.begun))
            && traffic.received.is_none_or(|received| received < at)
    }

    /// Whether something is not answered that should be: what is to be done is not to wait.
    pub fn is_in_doubt(&self, now: Time) -> bool {
        self.direct.is_doubtful() || self.traffic.unanswered.is_some() || self.searches(now)
    }

    /// There is news of how to get to the other end directly.
    pub fn try_direct(&mut self, now: Time) {
        self.direct.hasten_after(FAST_PACE, now);
    }

    /// Whether keepalives hold the direct way open.
    pub fn is_kept(&self) -> bool {
        self.kept
    }

    /// The other end has trouble: this one looks for itself. When it says so by the direct way (`directly`), its packets may
    /// come in once some have gone out: then keepalives do that, as long as the path is looked at.
    pub fn alarm(&mut self, directly: bool, now: Time) {
        self.kept |= directly && self.way == Way::Direct;
        if self.alarmed.replace(now).is_none_or(|before| now.since(before) >= PACE) {
            self.hasten(now);
        }
    }

    /// The other end, which leads, has sent a probe.
    pub fn led(&mut self, now: Time) {
        self.led = Some(now);
    }

    /// Whether it did so a moment ago: what it looks for, this end finds by that.
    fn is_led(&self, now: Time) -> bool {
        self.led.is_some_and(|at| now.since(at) < LOST)
    }

    /// The member has answered by itself in some other way.
    pub fn reached(&mut self) {
        self.unreached = false;
    }

    /// What the tunnel's counters are now. To be told every second.
    pub fn observe(&mut self, facts: &TunnelFacts, now: Time) {
        let was_watched = self.is_watched(now);
        let traffic = &mut self.traffic;
        traffic.has_session = facts.handshake_age.is_some_and(|age| age < SESSION_AGE);
        let session = facts.handshake_age.map(|age| now.before(age));
        // The age is in whole seconds.
        let is_new = session > traffic.session.map(|at| at + Duration::from_secs(2));
        if is_new {
            traffic.session = session;
        }
        let nothing = if is_new { KEEPALIVES + HANDSHAKE } else { KEEPALIVES };
        let (received, sent) = (facts.rx_bytes, facts.tx_bytes);
        // Counters start again with a peer that is made anew.
        let before = traffic.counters.replace((received, sent));
        let Some(before) = before.filter(|before| before.0 <= received && before.1 <= sent) else { return };
        if received > before.0 && !is_initiations(received - before.0) {
            traffic.received = Some(now);
            traffic.unanswered = None;
        }
        let says = sent > before.1 + nothing;
        if says || received > before.0 + nothing {
            traffic.busy = Some(now);
        }
        if says && received == before.0 {
            traffic.unanswered.get_or_insert(now);
        }
        if !was_watched && self.is_watched(now) {
            self.hasten(now);
        }
    }

    /// WireGuard sends to this relay, or the end that leads says that it shall be so. Whether that is new.
    pub fn found(&mut self, way: Way, now: Time) -> bool {
        let news = self.way != way;
        if news {
            if self.relays.len() >= KNOWN {
                self.relays.clear();
            }
            self.choose(way, Why::Found, now);
        }
        news
    }

    /// An answer has come to a probe that went this way; `ready`: the member is registered at the relay, and so is this node.
    /// Whether the probe was under way.
    pub fn answered(&mut self, way: Way, number: u32, ready: bool, now: Time) -> bool {
        let leg = match way {
            Way::Direct => Some(&mut self.direct),
            Way::Relay(relay) => self.relays.get_mut(&relay),
        };
        let known = leg.is_some_and(|leg| leg.answered(number, ready, now));
        if known && way == Way::Direct {
            self.unreached = false;
        }
        known
    }

    /// Whether a probe with this number is under way.
    pub fn awaits(&self, number: u32) -> bool {
        self.direct.awaits(number) || self.relays.values().any(|leg| leg.awaits(number))
    }

    /// A relay has forgotten what it knew: sessions through it are of no use.
    pub fn relay_forgot(&mut self, relay: &NodeId, now: Time) {
        if let Some(leg) = self.relays.get_mut(relay) {
            leg.forget();
            leg.hasten(now);
            if self.way == Way::Relay(*relay) {
                // Twice in a short time: it does not mean it well, or is not well.
                if self.forgotten || self.forgot.is_some_and(|at| now.since(at) < FAILED) {
                    self.failed.insert(*relay, now + FAILED);
                }
                self.forgotten = true;
                self.forgot = Some(now);
            }
        }
    }

    /// Whether [`Path::advance`] needs candidates.
    pub fn wants_candidates(&self, now: Time) -> bool {
        self.searches(now) && !self.is_led(now) && self.next_round <= now
    }

    /// Does what is due. `candidates` are members that might relay, those that are tried first in front, if they are
    /// [wanted](Path::wants_candidates).
    pub fn advance(&mut self, candidates: Option<&[NodeId]>, rng: &mut impl RngCore, now: Time) -> Vec<Act> {
        let mut acts = Vec::new();
        let (dead, searching) = (self.death(now), self.searches(now) && !self.is_led(now));
        if !searching {
            self.rounds = 0;
            self.next_round = now;
        } else if let Some(candidates) = candidates {
            self.search(candidates, now);
        }
        if searching {
            self.searched = now;
        } else if self.way == Way::Direct && now.since(self.since.max(self.searched)) > PROMOTED {
            // What was held ready for the case that the direct way does not hold.
            self.relays.clear();
        }
        self.failed.retain(|_, until| *until > now);
        self.probe_direct(&mut acts, rng, now);
        self.probe_relays(searching, &mut acts, rng, now);
        if self.leads {
            self.decide(dead, &mut acts, now);
        }
        acts
    }

    /// When something is due by itself.
    pub fn next(&self, now: Time) -> Time {
        let legs = self.relays.values().map(Leg::due).chain([self.direct.due()]);
        let soon = now + FAST_PACE;
        let next = legs.min().unwrap_or(soon);
        // What is waited for comes to its end between two probes.
        if self.searches(now) { next.min(soon) } else { next }
    }

    /// Why the way in use is taken to be dead, if it is.
    fn death(&self, now: Time) -> Option<Why> {
        let traffic = &self.traffic;
        let leg = match self.way {
            Way::Direct => &self.direct,
            Way::Relay(relay) => self.relays.get(&relay)?,
        };
        let since = |at: Option<Time>| at.map_or(Duration::ZERO, |at| now.since(at));
        let comes = traffic.received.is_some_and(|at| now.since(at) < LOST);
        let lost = leg.lost_for(now);
        let unanswered = since(traffic.unanswered);
        // What goes through the tunnel in both directions is not lost, whatever becomes of probes.
        let in_trouble = unanswered > Duration::ZERO || self.is_alarmed(now) || !traffic.has_session;
        if leg.was_answered() && lost >= LOST && (in_trouble || self.way != Way::Direct) {
            return Some(Why::Lost);
        }
        if self.way == Way::Direct {
            let restored = now.since(self.since) < PROMOTED && self.why == Why::Restored;
            if restored && self.talked && unanswered >= LOST * 2 {
                return Some(Why::PortClosed);
            }
            if self.on_trial && now.since(self.since) >= PORT_CLOSED {
                return Some(Why::PortClosed);
            }
            if !leg.was_answered() && !traffic.has_session && !comes {
                if unanswered >= NO_SESSION {
                    return Some(Why::Lost);
                }
                if self.unreached && lost >= LOST {
                    return Some(Why::Unreached);
                }
            }
            if !traffic.has_session && unanswered >= PORT_CLOSED {
                return Some(Why::PortClosed);
            }
        } else if !traffic.has_session && unanswered >= PORT_CLOSED {
            return Some(Why::Lost);
        }
        let why = if self.way == Way::Direct && leg.works(now) { Why::PortClosed } else { Why::Lost };
        (unanswered >= SILENT).then_some(why)
    }

    /// Whether another way is looked for: before the one in use is taken to be dead, so that it is known by then.
    pub fn searches(&self, now: Time) -> bool {
        if self.death(now).is_some() {
            return true;
        }
        if !self.is_watched(now) && !self.unreached {
            return false;
        }
        let leg = match self.way {
            Way::Direct => Some(&self.direct),
            Way::Relay(relay) => self.relays.get(&relay),
        };
        let comes = self.traffic.received.is_some_and(|at| now.since(at) < LOST);
        if self.way == Way::Direct
            && comes
            && self.traffic.has_session
            && self.traffic.unanswered.is_none()
            && !self.is_alarmed(now)
        {
            // It carries the tunnel: where all are busy answers come late, and searching would make that worse.
            return false;
        }
        let unanswered = self.traffic.unanswered.is_some_and(|at| now.since(at) >= FAST_PACE);
        leg.is_none_or(|leg| leg.lost_for(now) >= FAST_PACE * 2)
            || (unanswered && !self.traffic.has_session)
            || (self.unreached && self.way == Way::Direct && self.direct.lost_for(now) >= LOST)
    }

    fn probe_direct(&mut self, acts: &mut Vec<Act>, rng: &mut impl RngCore, now: Time) {
        if self.direct.due() > now {
            return;
        }
        let in_doubt = self.traffic.unanswered.is_some() || self.unreached || self.direct.is_doubtful();
        let routine = !self.leads && !in_doubt && !self.is_alarmed(now);
        if self.way == Way::Direct && routine && self.opening == Opening::None {
            return self.direct.wait(now + FAST_PACE);
        }
        let gone = self.direct.lost_for(now) >= GONE;
        let idle = if self.opening == Opening::Always { OPENING_PACE } else { IDLE_PACE };
        let (pause, impatience) = match (self.way, self.is_watched(now)) {
            (Way::Direct, true) if gone => (PACE, PACE * 2),
            (Way::Direct, true) if routine => (OPENING_PACE, FAST_PACE),
            (Way::Direct, true) => (PACE, FAST_PACE),
            (Way::Direct, false) if gone => (PACE, idle),
            (Way::Direct, false) => (idle, FAST_PACE),
            // The first answer is followed by others soon.
            (Way::Relay(_), true) => (PACE, SLOW_PACE),
            (Way::Relay(_), false) => (SLOW_PACE, IDLE_PACE),
        };
        let number = rng.next_u32();
        self.direct.sent(number, pause, impatience, now);
        acts.push(Act::Probe { way: Way::Direct, number });
    }

    fn probe_relays(&mut self, searching: bool, acts: &mut Vec<Act>, rng: &mut impl RngCore, now: Time) {
        let watched = self.is_watched(now);
        let round = self.next_round.max(now + FAST_PACE).since(now);
        for (relay, leg) in &mut self.relays {
            if leg.due() > now {
                continue;
            }
            let in_use = self.way == Way::Relay(*relay);
            let (pause, impatience) = match (in_use, watched) {
                // The first probe has both ends register there, the next one finds them registered.
                _ if searching && !in_use && leg.count() < ENOUGH_PROBES => (FAST_PACE, FAST_PACE),
                _ if searching && !in_use => (round, round),
                (true, _) if leg.lost_for(now) >= GONE => (PACE, IDLE_PACE),
                // The end that leads finds out when it is dead.
                (true, true) if !self.leads => (SLOW_PACE, FAST_PACE),
                (true, true) => (PACE, FAST_PACE),
                (true, false) => (IDLE_PACE, FAST_PACE),
                (false, true) => (SLOW_PACE, SLOW_PACE),
                (false, false) => (IDLE_PACE, IDLE_PACE),
            };
            let number = rng.next_u32();
            leg.sent(number, pause, impatience, now);
            acts.push(Act::Probe { way: Way::Relay(*relay), number });
        }
    }

    /// Tries some members as relays, others in each round.
    fn search(&mut self, candidates: &[NodeId], now: Time) {
        if self.next_round > now {
            return;
        }
        let in_use = self.way.relay();
        self.relays
            .retain(|relay, leg| Some(*relay) == in_use || leg.is_ready(now) || leg.count() < ENOUGH_PROBES);
        let wanted = TRIED.saturating_sub(self.relays.keys().filter(|relay| Some(**relay) != in_use).count());
        let count = candidates.len();
        // The best ones are tried again and again; of the others always the next.
        let at = (self.rounds as usize * TRIED) % count.max(1);
        let mut taken = 0;
        for relay in candidates.iter().cycle().skip(at).take(count) {
            if taken < wanted && !self.relays.contains_key(relay) {
                self.relays.insert(*relay, Leg::new(now));
                taken += 1;
            }
        }
        self.rounds = self.rounds.saturating_add(1);
        let pause = match self.rounds.checked_sub(EAGER_ROUNDS) {
            None => LOST,
            Some(more) => LOST.saturating_mul(1 << more.min(8)).min(IDLE_PACE),
        };
        self.next_round = now + pause;
    }

    fn decide(&mut self, dead: Option<Why>, acts: &mut Vec<Act>, now: Time) {
        let is_watched = self.is_watched(now);
        let direct_works = self.direct.streak() >= if is_watched { STREAK } else { IDLE_STREAK }
            && self.direct.works(now)
            && self.held.is_none_or(|held| held <= now);
        if self.traffic.has_session && self.traffic.session > Some(self.since) {
            self.on_trial = false;
        }
        match (self.way, dead) {
            (Way::Relay(_), _) if direct_works => {
                self.choose(Way::Direct, Why::Restored, now);
                // Nobody is there to miss the session, and only a new one shows that the way carries the tunnel.
                self.on_trial = !is_watched;
                acts.push(Act::Moved { anew: self.on_trial });
            }
            (Way::Direct, Some(why)) => {
                let Some(relay) = self.best_relay(None, now) else { return };
                if why == Why::PortClosed {
                    self.held = Some(now + self.hold);
                    self.hold = (self.hold * 2).min(MAX_HOLD);
                }
                self.choose(Way::Relay(relay), why, now);
                acts.push(Act::Moved { anew: true });
            }
            (Way::Relay(before), dead) => {
                let best = self.best_relay(Some(before), now);
                let has_failed = |relay: &NodeId| self.failed.contains_key(relay);
                let better = has_failed(&before) && best.is_some_and(|relay| !has_failed(&relay));
                let dead = dead.or(better.then_some(Why::Lost));
                if let Some((relay, why)) = best.zip(dead) {
                    self.failed.insert(before, now + FAILED);
                    self.choose(Way::Relay(relay), why, now);
                    acts.push(Act::Moved { anew: true });
                } else if self.forgotten && self.relays.get(&before).is_some_and(|leg| leg.is_ready(now)) {
                    self.forgotten = false;
                    self.traffic.unanswered = None;
                    acts.push(Act::Moved { anew: true });
                }
            }
            (Way::Direct, None) => {
                // What has carried the tunnel for a while may be trusted again.
                if now.since(self.since) > PROMOTED && self.traffic.received > Some(self.since + PROMOTED) {
                    self.hold = HOLD;
                }
            }
        }
    }

    /// The relay with the shortest way, of those at which both ends are registered.
    fn best_relay(&self, except: Option<NodeId>, now: Time) -> Option<NodeId> {
        let ready = self.relays.iter().filter(|(relay, leg)| Some(**relay) != except && leg.is_ready(now));
        let rank = |(relay, leg): &(&NodeId, &Leg)| (self.failed.contains_key(relay), leg.rtt(), **relay);
        ready.min_by_key(rank).map(|(relay, _)| *relay)
    }

    fn choose(&mut self, way: Way, why: Why, now: Time) {
        if let Way::Relay(relay) = way {
            self.relays.entry(relay).or_insert_with(|| Leg::new(now));
        }
        self.left = self.way.relay().or(self.left);
        // Also when the two have just made a session, and had no time to.
        self.talked = self.traffic.received.is_some_and(|at| now.since(at) < LOST)
            || self.traffic.session.is_some_and(|at| now.since(at) < GONE);
        (self.way, self.why, self.since) = (way, why, now);
        (self.forgotten, self.on_trial) = (false, false);
        self.traffic.unanswered = None;
        // The other end hears of it at once.
        self.hasten(now);
    }

    /// The way in use, and the direct one, are looked at now.
    fn hasten(&mut self, now: Time) {
        self.direct.hasten(now);
        if let Some(leg) = self.way.relay().and_then(|relay| self.relays.get_mut(&relay)) {
            leg.hasten(now);
        }
    }
}
