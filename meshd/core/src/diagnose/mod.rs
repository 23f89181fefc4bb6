//! What keeps traffic from flowing: from facts to findings, for `meshctl why` and `meshctl doctor`.
//!
//! Pure: the node collects the facts, what is said of them is decided here, and the [documents](crate::api) are what the
//! two commands show. Ports are facts: a member names those of its lanes in its record.
//!
//! Three things are told apart, as each has another remedy: *the member is gone* (nothing of it is answered), *a port is
//! closed* (something else of the same host is answered), and *this host waits* (nothing failed yet).

mod doctor;
mod member;
#[cfg(test)]
mod tests;
mod why;

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use ipnet::IpNet;
use mesh_keys::NodeId;

pub use self::doctor::{DoctorFacts, Setting, doctor};
pub use self::why::{End, LocalPort, Owner, Standing, WhyFacts, why};
use crate::api::{Direction, Finding, Level, MtuStatus, PortFailure, Subject};
use crate::path::Why;

/// A member, and how this node fares with it.
#[derive(Clone, Debug)]
pub struct Member {
    /// Its id.
    pub id: NodeId,
    /// What people call it: its name, with the first digits of its id where others have the same name.
    pub label: String,
    /// Whether gossip takes it to be there.
    pub reachable: bool,
    /// Its control port, by UDP.
    pub gossip: Gossip,
    /// Its control port, by TCP.
    pub session: Session,
    /// The key of the tunnel with it.
    pub key: Key,
    /// Its tunnel ports, as its record has them; the first one first.
    pub lanes: Vec<Lane>,
    /// The way that the tunnel takes; absent while nothing is sent: then it is the direct one.
    pub path: Option<Path>,
    /// How long packets to it may be.
    pub mtu: Option<MtuStatus>,
    /// What the kernel sends into a tunnel: some of its ranges, as this node wants it, with the device.
    pub routes: Vec<(IpNet, String)>,
    /// Its ranges.
    pub ranges: Vec<IpNet>,
}

/// A member's control port by UDP: gossip, and the probes of paths.
#[derive(Clone, Debug)]
pub struct Gossip {
    /// The port.
    pub port: u16,
    /// Where the member may be: what its record names, and where it was seen.
    pub addresses: Vec<SocketAddr>,
    /// Where its datagrams come from.
    pub from: Option<SocketAddr>,
    /// Time since one came.
    pub heard: Option<Duration>,
    /// What became of this node's own probes.
    pub probe: Probe,
    /// Smoothed time from a probe to its answer.
    pub rtt: Option<Duration>,
}

/// What became of probes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Probe {
    /// None was sent of late.
    None,
    /// It may still be answered.
    UnderWay,
    /// The last one was answered.
    Answered,
    /// None was, for so long.
    Unanswered(Duration),
}

/// Whether something of a member's host answers on its control port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Answers {
    /// It does.
    Yes,
    /// Its own datagrams come, and what this host sends is not answered.
    OnlySpeaks,
    /// Nothing comes.
    No,
    /// Nothing was sent.
    Unknown,
}

/// What comes so long after a probe that is not answered was not under way with it.
const LATER: Duration = Duration::from_secs(2);

/// Its own datagrams are news for so long.
const HEARD: Duration = Duration::from_secs(10);

impl Gossip {
    pub(crate) fn answers(&self) -> Answers {
        match self.probe {
            Probe::Answered => Answers::Yes,
            Probe::Unanswered(over)
                if self.heard.is_some_and(|heard| heard < HEARD && heard + LATER < over) =>
            {
                Answers::OnlySpeaks
            }
            Probe::Unanswered(_) => Answers::No,
            Probe::None | Probe::UnderWay if self.heard.is_some_and(|heard| heard < HEARD) => Answers::Yes,
            Probe::None | Probe::UnderWay => Answers::Unknown,
        }
    }
}

/// Control sessions with a member: TCP.
#[derive(Clone, Debug)]
pub struct Session {
    /// Whether there is one now.
    pub state: SessionState,
    /// The last call that failed, if none has succeeded since: time since then, and why, the address in front.
    pub failed: Option<(Duration, String)>,
    /// Where the member is called.
    pub addresses: Vec<SocketAddr>,
    /// Whether it is called now.
    pub is_calling: bool,
}

/// Whether there is a control session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SessionState {
    /// There is.
    Open,
    /// This member carries it.
    Carried(String),
    /// None: there may be nothing to say.
    None,
}

/// The key of a tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    /// Both ends have it, and have said so.
    Confirmed,
    /// This end has it, and does not know yet whether the other one does.
    Agreed,
    /// The member does not prove that the tunnel key which it names is its own.
    Doubted,
    /// There is none.
    None,
}

/// A lane to a member.
#[derive(Clone, Debug)]
pub struct Lane {
    /// Number of the lane.
    pub index: u8,
    /// The member's UDP port for it, as its record says.
    pub port: u16,
    /// The device of this host.
    pub device: Option<String>,
    /// Where its packets go; absent: it has no peer yet.
    pub endpoint: Option<SocketAddr>,
    /// Where they would go directly.
    pub direct: Option<SocketAddr>,
    /// Age of the last handshake.
    pub handshake: Option<Duration>,
    /// Time since something came through it.
    pub received: Option<Duration>,
    /// Time since something was sent.
    pub sent: Option<Duration>,
    /// What does not get through directly, or did not when that was tried last.
    pub silence: Option<Silence>,
}

/// Something that is sent by the direct way and does not get through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Silence {
    /// In which direction.
    pub direction: Direction,
    /// Bytes that this host has sent meanwhile.
    pub sent: u64,
    /// How long it was, or is.
    pub over: Duration,
    /// How long ago that was, if the direct way was given up for it; else it goes on.
    pub ended: Option<Duration>,
}

/// The way that a tunnel takes.
#[derive(Clone, Debug)]
pub struct Path {
    /// What people call the relay; absent: it goes directly.
    pub relay: Option<String>,
    /// Why.
    pub why: Why,
    /// How long it has done so.
    pub since: Duration,
    /// Whether this node chooses.
    pub chosen_here: bool,
    /// Smoothed time there and back.
    pub rtt: Option<Duration>,
}

impl Member {
    /// The relay that the tunnel takes.
    fn relay(&self) -> Option<&str> {
        self.path.as_ref()?.relay.as_deref()
    }
}

fn finding(about: Subject, level: Level, text: impl Into<String>) -> Finding {
    Finding { about, level, text: text.into(), advice: None, failure: None, members: Vec::new() }
}

trait Extend: Sized {
    fn advise(self, advice: impl Into<String>) -> Self;
    fn fails(self, failure: PortFailure) -> Self;
    fn of(self, member: &Member) -> Self;
}

impl Extend for Finding {
    fn advise(mut self, advice: impl Into<String>) -> Self {
        self.advice = Some(advice.into());
        self
    }

    fn fails(mut self, failure: PortFailure) -> Self {
        self.failure = Some(failure);
        self
    }

    fn of(mut self, member: &Member) -> Self {
        self.members = vec![member.id.to_string()];
        self
    }
}

/// A time, for people.
fn span(span: Duration) -> String {
    match span.as_secs() {
        0 => "less than 1 s".to_owned(),
        seconds @ 1..120 => format!("{seconds} s"),
        seconds @ 120..7200 => format!("{} min", seconds / 60),
        seconds @ 7200..172_800 => format!("{} h", seconds / 3600),
        seconds => format!("{} days", seconds / 86_400),
    }
}

fn rtt(time: Duration) -> String {
    format!("{:.1} ms", time.as_secs_f64() * 1000.0)
}

fn list<T: ToString>(items: &[T]) -> String {
    items.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// Names of several, some of them if there are many.
fn some(labels: &[String]) -> String {
    const NAMED: usize = 4;
    match labels.len().checked_sub(NAMED) {
        None | Some(0) => labels.join(", "),
        Some(more) => format!("{} and {more} more", labels[..NAMED].join(", ")),
    }
}

fn ip(address: Option<SocketAddr>) -> String {
    address.map_or_else(|| "an address that is not known yet".to_owned(), |address| address.ip().to_string())
}

/// Whether an address is in one of the ranges.
fn within(address: IpAddr, ranges: &[IpNet]) -> Option<&IpNet> {
    ranges.iter().find(|range| range.contains(&address))
}
