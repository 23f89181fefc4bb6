//! What is said of the way to one member.

use std::time::Duration;

use super::{
    Answers, Extend as _, Key, Lane, Member, Probe, SessionState, Silence, finding, ip, list, rtt, span,
};
use crate::api::{Direction, Finding, Level, Pinged, PortFailure, Protocol, Subject};
use crate::path::Why;

/// Older handshakes mean that the tunnel does not work (WireGuard paper, section 6.1).
pub(super) const HANDSHAKE_STALE: Duration = Duration::from_secs(190);

/// What came through a tunnel so lately shows that it carries something.
const LATELY: Duration = Duration::from_secs(4);

/// What was sent so lately is answered by now, or not at all.
const SENT_LATELY: Duration = Duration::from_secs(30);

/// Whether a tunnel carries what is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Carries {
    /// It does, as far as can be seen here.
    Yes,
    /// It does not.
    No,
    /// Nothing was sent of late.
    Unknown,
}

impl Member {
    /// Whether the tunnel carries something now, by whatever way.
    pub(super) fn carries(&self, pinged: Option<Pinged>) -> Carries {
        if let Some(Pinged::Answered { .. }) = pinged {
            return Carries::Yes;
        }
        let is_relayed = self.relay().is_some();
        let is_silent =
            |lane: &Lane| lane.silence.is_some_and(|silence| silence.ended.is_none()) && !is_relayed;
        let is_fresh = |lane: &Lane| lane.handshake.is_some_and(|age| age < HANDSHAKE_STALE);
        if self.key == Key::None || self.lanes.iter().any(is_silent) {
            return Carries::No;
        }
        if matches!(pinged, Some(Pinged::Unanswered { .. })) {
            return Carries::No;
        }
        let waits = |lane: &Lane| {
            let sent = lane.sent.filter(|sent| *sent < SENT_LATELY);
            sent.is_some_and(|sent| lane.received.is_none_or(|received| received > sent + LATELY))
        };
        match (self.lanes.iter().any(is_fresh), self.lanes.iter().any(waits)) {
            (true, _) => Carries::Yes,
            (false, true) => Carries::No,
            (false, false) => Carries::Unknown,
        }
    }

    pub(super) fn key_finding(&self) -> Finding {
        let name = &self.label;
        let waits = match &self.session.state {
            SessionState::Open => "there is a control session, on which they are agreeing now".to_owned(),
            SessionState::Carried(through) => {
                format!("there is a control session, carried by {through}, on which they are agreeing now")
            }
            SessionState::None if self.session.failed.is_some() => {
                "it is agreed in a control session, and there is none".to_owned()
            }
            SessionState::None if self.session.is_calling => {
                "it is agreed in a control session, and this host is calling now".to_owned()
            }
            SessionState::None => {
                "it is agreed in a control session, and there was none yet: it waits for its turn to call"
                    .to_owned()
            }
        };
        let of = |level, text: String| finding(Subject::Key, level, text).of(self);
        match self.key {
            Key::Confirmed => {
                of(Level::Ok, format!("the key of the tunnel with {name} is agreed and confirmed"))
            }
            Key::Agreed => of(
                Level::Problem,
                format!("the key of the tunnel with {name} is agreed, and not confirmed by it yet: {waits}"),
            ),
            Key::Doubted => of(
                Level::Problem,
                format!(
                    "{name} does not prove that the tunnel key in its record is its own: it gets no tunnel"
                ),
            )
            .advise(format!(
                "if that lasts, {name} is not what it says, or two hosts have its identity: look at its log"
            )),
            Key::None => of(Level::Problem, format!("no key is agreed for the tunnel with {name}: {waits}")),
        }
    }

    /// Only if calls fail.
    pub(super) fn session_finding(&self) -> Option<Finding> {
        let (ago, error) = self.session.failed.as_ref()?;
        if self.session.state == SessionState::Open {
            return None;
        }
        let (name, port) = (&self.label, self.gossip.port);
        let (level, meaning) = match (self.key, &self.session.state) {
            (Key::Confirmed, SessionState::Carried(through)) => {
                (Level::Warning, format!("; {through} carries the session, and the tunnel has its key"))
            }
            (Key::Confirmed, _) => {
                (Level::Warning, "; the tunnel has its key, and needs no session now".to_owned())
            }
            (_, SessionState::Carried(through)) => {
                (Level::Warning, format!("; {through} carries the session"))
            }
            (_, _) => (Level::Problem, "; no other member could carry the session".to_owned()),
        };
        let failure = PortFailure {
            protocol: Protocol::Tcp,
            port,
            lane: None,
            direction: Direction::ToMember,
            addresses: self.session.addresses.clone(),
        };
        let text = format!(
            "TCP {port} to {name} ({}): {} ({} ago){meaning}",
            list(&self.session.addresses),
            reason(error),
            span(*ago)
        );
        let finding = finding(Subject::Session, level, text).of(self).fails(failure);
        Some(finding.advise(match Refusal::of(error) {
            Refusal::Refused => format!(
                "something refuses TCP {port}: is meshd running on {name}, and is that its port? else a firewall does"
            ),
            Refusal::Silent | Refusal::Other => {
                format!("open TCP {port} from this host to {name}, or in the other direction: one of the two is enough")
            }
        }))
    }

    pub(super) fn gossip_finding(&self, pinged: Option<Pinged>) -> Finding {
        let (name, port) = (&self.label, self.gossip.port);
        let of = |level, text: String| finding(Subject::Gossip, level, text).of(self);
        let from = self.gossip.from.map_or_else(String::new, |from| format!(" at {from}"));
        let fails = |direction| PortFailure {
            protocol: Protocol::Udp,
            port,
            lane: None,
            direction,
            addresses: self.gossip.addresses.clone(),
        };
        let carries = self.carries(pinged);
        let level = match carries {
            Carries::Yes => Level::Warning,
            Carries::No | Carries::Unknown => Level::Problem,
        };
        let tunnel = match carries {
            Carries::Yes => "; the tunnel carries all the same",
            Carries::No | Carries::Unknown => "",
        };
        match self.gossip.answers() {
            Answers::Yes => {
                let time = self.gossip.rtt.map_or_else(String::new, |time| format!(" in {}", rtt(time)));
                of(Level::Ok, format!("UDP {port}: {name} answers{from}{time}"))
            }
            Answers::OnlySpeaks => of(
                level,
                format!(
                    "UDP {port}: datagrams of {name} come here{from}, and probes of this host are not answered: the port is \
                     closed in the direction from this host to {name}{tunnel}"
                ),
            )
            .fails(fails(Direction::ToMember))
            .advise(format!(
                "let UDP {port} out of this host and its site, and into {name}; a NAT that forgets quickly looks alike"
            )),
            Answers::No => of(
                level,
                format!(
                    "UDP {port} is answered by nobody at any of the addresses of {name} ({}){}{tunnel}",
                    list(&self.gossip.addresses),
                    match self.gossip.heard {
                        Some(heard) => format!("; its last datagram came {} ago", span(heard)),
                        None => "; no datagram of it ever came".to_owned(),
                    }
                ),
            )
            .fails(fails(Direction::Either))
            .advise(match carries {
                Carries::Yes => format!(
                    "open UDP {port} between the two hosts, in both directions; `meshctl why` on {name} says which one it is"
                ),
                Carries::No | Carries::Unknown => format!(
                    "is {name} up, with meshd running? Then open UDP {port} between the two hosts, in both directions"
                ),
            }),
            Answers::Unknown => {
                let waits = match self.gossip.probe {
                    Probe::UnderWay => "a probe is under way",
                    Probe::None | Probe::Answered | Probe::Unanswered(_) => "nothing was sent there of late",
                };
                of(Level::Note, format!("UDP {port}: {waits}"))
            }
        }
    }

    pub(super) fn path_finding(&self) -> Finding {
        let of = |level, text: String| finding(Subject::Path, level, text).of(self);
        let first = self.lanes.first();
        let to = first.and_then(|lane| lane.direct);
        let to = to.map_or_else(|| "no address yet".to_owned(), |to| to.to_string());
        let Some(path) = &self.path else {
            return of(
                Level::Ok,
                format!("the tunnel to {} goes directly, to {to}; nothing speaks against it", self.label),
            );
        };
        let time = path.rtt.map_or_else(String::new, |time| format!(", {} there and back", rtt(time)));
        let who = if path.chosen_here { "" } else { "; the other end chooses" };
        let since = span(path.since);
        match &path.relay {
            None => {
                let why = path.why.text();
                of(
                    Level::Ok,
                    format!(
                        "the tunnel to {} goes directly, to {to}{time}: {why} (for {since}{who})",
                        self.label
                    ),
                )
            }
            Some(relay) => {
                let why = match path.why {
                    Why::Found => "as the other end has chosen",
                    other @ (Why::Default | Why::Unreached | Why::Lost | Why::PortClosed | Why::Restored) => {
                        other.text()
                    }
                };
                let text = format!(
                    "the tunnel to {} goes through the relay {relay}{time}: {why} (for {since}{who})",
                    self.label
                );
                of(Level::Warning, text)
            }
        }
    }

    pub(super) fn tunnel_findings(&self, pinged: Option<Pinged>) -> Vec<Finding> {
        let mut findings: Vec<Finding> =
            self.lanes.iter().filter_map(|lane| self.lane_finding(lane, pinged)).collect();
        let of = |level, text: String| finding(Subject::Tunnel, level, text).of(self);
        match pinged {
            Some(Pinged::Answered { microseconds }) => {
                let time = rtt(Duration::from_micros(microseconds.into()));
                findings.push(of(
                    Level::Ok,
                    format!("{} answers a ping through the tunnel in {time}", self.label),
                ));
            }
            Some(Pinged::Unanswered { count }) => {
                let comes = self.lanes.iter().any(|lane| lane.received.is_some_and(|ago| ago < LATELY));
                let explained = findings.iter().any(|finding| finding.level == Level::Problem);
                let text = format!("{count} pings through the tunnel to {} were not answered", self.label);
                findings.push(match (comes, explained) {
                    (true, false) => {
                        of(Level::Problem, format!("{text}, though something comes through the tunnel")).advise(format!(
                            "if {} drops pings that is all; else look from there: `meshctl why` on {}",
                            self.label, self.label
                        ))
                    }
                    (false, false) => of(Level::Problem, text).advise(format!(
                        "ask again in a few seconds, when it is known which port it is; and look from there: `meshctl why` on {}",
                        self.label
                    )),
                    (_, true) => of(Level::Note, text),
                });
            }
            Some(Pinged::Unknown) | None => {}
        }
        findings
    }

    fn lane_finding(&self, lane: &Lane, pinged: Option<Pinged>) -> Option<Finding> {
        if self.key == Key::None || self.key == Key::Doubted {
            return None;
        }
        let of = |level, text: String| finding(Subject::Tunnel, level, text).of(self);
        let carries = self.carries(pinged);
        if let Some(silence) = lane.silence {
            return Some(self.silence_finding(lane, &silence, carries));
        }
        let is_closed =
            self.path.as_ref().is_some_and(|path| path.why == Why::PortClosed && path.relay.is_some());
        if is_closed {
            let silence = Silence {
                direction: Direction::Either,
                sent: 0,
                over: Duration::ZERO,
                ended: Some(Duration::ZERO),
            };
            return Some(self.silence_finding(lane, &silence, carries));
        }
        let (port, age) = (lane.port, lane.handshake);
        let to = lane.endpoint.map_or_else(|| format!("UDP {port}"), |to| to.to_string());
        Some(match (age, lane.sent) {
            (Some(age), _) if age < HANDSHAKE_STALE => {
                of(Level::Ok, format!("the last handshake with {} ({to}) was {} ago", self.label, span(age)))
            }
            (_, Some(sent)) if carries == Carries::No => of(
                Level::Problem,
                format!(
                    "something was sent to {} ({to}) {} ago, and there is no session: {}",
                    self.label,
                    span(sent),
                    match age {
                        Some(age) => format!("the last handshake was {} ago", span(age)),
                        None => "there was no handshake yet".to_owned(),
                    }
                ),
            ),
            (Some(age), _) => of(
                Level::Note,
                format!(
                    "the last handshake with {} ({to}) was {} ago; nothing is sent, so no newer one is needed",
                    self.label,
                    span(age)
                ),
            ),
            (None, _) => of(
                Level::Note,
                format!("there was no handshake with {} ({to}) yet, as nothing was sent", self.label),
            ),
        })
    }

    /// The lane's port does not let something through.
    fn silence_finding(&self, lane: &Lane, silence: &Silence, carries: Carries) -> Finding {
        let (name, port) = (&self.label, lane.port);
        let is_past = silence.ended.is_some();
        let amount = match (silence.sent, silence.ended) {
            (0, _) => String::new(),
            (bytes, None) => {
                format!(" (sent {bytes} bytes in the last {}, received 0)", span(silence.over))
            }
            (bytes, Some(ago)) => {
                format!(
                    " (sent {bytes} bytes in {}, received 0, until {} ago)",
                    span(silence.over),
                    span(ago)
                )
            }
        };
        let (sends, nothing, is) =
            if is_past { ("sent", "nothing came", "was") } else { ("sends", "nothing comes", "is") };
        let control = self.gossip.port;
        let what = match silence.direction {
            Direction::ToMember => {
                format!("what this host {sends} does not arrive at {name}, as that says itself{amount}")
            }
            Direction::FromMember if silence.sent == 0 => {
                format!("{name} says that it {sends} something, and {nothing} here")
            }
            Direction::FromMember => {
                format!("{name} receives what this host {sends}, and {nothing} back{amount}")
            }
            Direction::Both => {
                format!("this host and {name} both send, and {nothing} in either direction{amount}")
            }
            Direction::Either | Direction::Unknown => format!("this host {sends}, {nothing} back{amount}"),
        };
        let answers = self.gossip.answers();
        let probes = match answers {
            Answers::Yes => format!("probes on UDP {control} to the same host are answered"),
            Answers::OnlySpeaks => {
                format!("on UDP {control} its datagrams come, and probes are not answered")
            }
            Answers::No => format!("UDP {control} is not answered either"),
            Answers::Unknown => format!("whether UDP {control} is answered is not known"),
        };
        let meaning = match (answers, silence.direction) {
            (Answers::No, Direction::Either | Direction::Both | Direction::Unknown) => {
                format!("the host of {name} is down, or nothing gets through between the two")
            }
            (_, Direction::ToMember) => {
                format!("UDP {port} {is} closed on the way, in the direction from this host to {name}")
            }
            (_, Direction::FromMember) => {
                format!("UDP {port} {is} closed on the way, in the direction from {name} to this host")
            }
            (_, Direction::Both) => format!("UDP {port} {is} closed on the way, in both directions"),
            (_, Direction::Either | Direction::Unknown) => format!(
                "UDP {port} {is} closed on the way, in the direction from this host to {name}, or the answers are, in the \
                 direction back; `meshctl why` on {name} may know"
            ),
        };
        let level = match (carries, is_past) {
            (Carries::Yes, _) | (_, true) => Level::Warning,
            (Carries::No | Carries::Unknown, false) => Level::Problem,
        };
        let when = if is_past { ", when it was tried last" } else { "" };
        let text = format!("UDP {port} to {} directly{when}: {what}; {probes}: {meaning}", ip(lane.direct));
        let failure = PortFailure {
            protocol: Protocol::Udp,
            port,
            lane: Some(lane.index),
            direction: silence.direction,
            addresses: lane.direct.into_iter().collect(),
        };
        finding(Subject::Tunnel, level, text).of(self).fails(failure).advise(opening(
            port,
            silence.direction,
            name,
        ))
    }

    pub(super) fn mtu_finding(&self) -> Option<Finding> {
        let mtu = self.mtu?;
        let inside = if mtu.ipv4 == mtu.ipv6 {
            format!("{} bytes", mtu.ipv4)
        } else {
            format!("{} bytes (IPv4), {} bytes (IPv6)", mtu.ipv4, mtu.ipv6)
        };
        let outside = match (mtu.underlay, mtu.is_largest) {
            (_, true) => "all that the device allows".to_owned(),
            (Some(underlay), false) => format!("the path takes packets of {underlay} bytes at most"),
            (None, false) if self.relay().is_some() => {
                "what passes everywhere, as it goes through a relay".to_owned()
            }
            (None, false) => "what passes everywhere, until the path is measured".to_owned(),
        };
        Some(
            finding(
                Subject::Mtu,
                Level::Ok,
                format!("packets to {} may be {inside} long: {outside}", self.label),
            )
            .of(self),
        )
    }
}

/// What to open.
pub(super) fn opening(port: u16, direction: Direction, name: &str) -> String {
    match direction {
        Direction::ToMember => {
            format!("let UDP {port} out of this host and its site, and into {name} and its site")
        }
        Direction::FromMember => {
            format!("let UDP {port} into this host and its site, and out of {name} and its site")
        }
        Direction::Both | Direction::Either | Direction::Unknown => {
            format!("open UDP {port} between this host and {name}, in both directions")
        }
    }
}

/// How a call failed, as the operating system said it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Refusal {
    /// By a reset.
    Refused,
    /// Nothing came back.
    Silent,
    /// In another way.
    Other,
}

impl Refusal {
    pub(super) fn of(error: &str) -> Self {
        let error = error.to_ascii_lowercase();
        if error.contains("connection refused") {
            Self::Refused
        } else if error.contains("the tcp connection within") || error.contains("timed out") {
            Self::Silent
        } else {
            Self::Other
        }
    }
}

/// The sentence of a failed call, in fewer words where they are known.
fn reason(error: &str) -> String {
    match Refusal::of(error) {
        Refusal::Refused => "connection refused".to_owned(),
        Refusal::Silent => "timed out, nothing comes back".to_owned(),
        Refusal::Other => error.to_owned(),
    }
}
