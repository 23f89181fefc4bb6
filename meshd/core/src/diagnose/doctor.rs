//! `meshctl doctor`: how this host and its view of the mesh are.

use std::collections::{BTreeMap, BTreeSet};

use super::member::{Carries, Refusal};
use super::{Answers, Extend as _, Key, Member, SessionState, Silence, finding, some};
use crate::api::{
    Backend, DIAGNOSIS_SCHEMA_VERSION, Direction, DoctorReport, Finding, LaneStatus, Level, NodeName,
    PortFailure, Protocol, Subject,
};
use crate::node::Problem;
use crate::path::Why;

/// What is looked at.
#[derive(Clone, Debug)]
pub struct DoctorFacts {
    /// This node.
    pub here: NodeName,
    /// What the node waits for, as long as it is in no cluster.
    pub waiting_for: Option<String>,
    /// Every other member.
    pub members: Vec<Member>,
    /// Whether the kernel was ever brought to what this node wants.
    pub is_applied: bool,
    /// What is not as it should be in the kernel.
    pub problems: Vec<Problem>,
    /// The tunnel devices.
    pub lanes: Vec<LaneStatus>,
    /// MTU of the tunnel devices, in bytes.
    pub mtu: u32,
    /// What the cluster has against this node, or waits for.
    pub cluster: Vec<String>,
    /// Ranges that overlap with networks of the host, or that several members have.
    pub networks: Vec<String>,
    /// Whether others see this host at an address that it does not have.
    pub is_behind_nat: bool,
    /// What the host's clock shows, in seconds since 1970.
    pub unix_seconds: Option<u64>,
    /// Settings of the host that were changed; or why they are not known.
    pub settings: Result<Vec<Setting>, String>,
    /// Probes are under way: look again after so many milliseconds.
    pub look_again_milliseconds: Option<u64>,
}

/// A setting of the host that the daemon has changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    /// Path below `/proc/sys`.
    pub path: String,
    /// What it was.
    pub before: String,
    /// What it is, if it can be read.
    pub now: Option<String>,
}

/// Clocks before this are wrong: the first version is younger. 2025-01-01.
const EARLIEST: u64 = 1_735_689_600;

/// All findings.
pub fn doctor(facts: &DoctorFacts) -> DoctorReport {
    let mut findings = Vec::new();
    match &facts.waiting_for {
        Some(waiting_for) => findings.push(finding(
            Subject::Membership,
            Level::Problem,
            format!("this node is in no cluster yet, and waits for {waiting_for}"),
        )),
        None => findings.push(finding(
            Subject::Membership,
            Level::Ok,
            format!("{} is a member, with {} others", facts.here.name, facts.members.len()),
        )),
    }
    findings.push(host(facts));
    findings.extend(engines(facts));
    findings.extend(facts.cluster.iter().map(|text| finding(Subject::Cluster, Level::Problem, text.clone())));
    findings.extend(networks(facts));
    if facts.waiting_for.is_none() {
        findings.extend(ports(facts));
        findings.extend(keys(facts));
        findings.extend(relays(facts));
        findings.push(mtus(facts));
    }
    findings.push(if facts.is_behind_nat {
        finding(
            Subject::Nat,
            Level::Note,
            "this host is behind a NAT: others see it at an address that it does not have; ways through it are held open by probes",
        )
    } else {
        finding(Subject::Nat, Level::Ok, "no NAT in front of this host was noticed")
    });
    findings.push(settings(facts));
    findings.push(clock(facts.unix_seconds));
    DoctorReport {
        schema_version: DIAGNOSIS_SCHEMA_VERSION,
        node: facts.here.clone(),
        level: findings.iter().map(|finding| finding.level).max().unwrap_or(Level::Ok),
        findings,
        look_again_milliseconds: facts.look_again_milliseconds,
    }
}

fn host(facts: &DoctorFacts) -> Finding {
    let texts: Vec<String> =
        facts.problems.iter().map(|problem| format!("{}: {}", problem.object, problem.text)).collect();
    match (facts.is_applied, texts.is_empty()) {
        (false, _) => finding(
            Subject::Host,
            if facts.waiting_for.is_some() { Level::Note } else { Level::Problem },
            "devices, routes and rules of this host are not set up yet",
        ),
        (true, true) => {
            finding(Subject::Host, Level::Ok, "devices, routes and rules of this host are as they should be")
        }
        (true, false) => finding(Subject::Host, Level::Problem, texts.join("; ")).advise(
            "the daemon tries again by itself, at least every 30 s; its log has what the kernel says",
        ),
    }
}

fn engines(facts: &DoctorFacts) -> Vec<Finding> {
    let of = |lane: &LaneStatus| {
        let backend = match lane.backend {
            Backend::Kernel => "the kernel's WireGuard",
            Backend::Userspace => "mesh-wg",
            Backend::Unknown => "an unknown backend",
        };
        let text = format!("{} on UDP {}, carried by {backend} ({})", lane.device, lane.port, lane.reason);
        if lane.up {
            finding(Subject::Engine, Level::Ok, text)
        } else {
            finding(Subject::Engine, Level::Problem, format!("{text}, is not up"))
                .advise("`meshctl status` and the daemon's log say why")
        }
    };
    facts.lanes.iter().map(of).collect()
}

fn networks(facts: &DoctorFacts) -> Vec<Finding> {
    if facts.networks.is_empty() {
        let text = "no network of this host overlaps with the cluster's ranges, and no range has two owners";
        return vec![finding(Subject::Networks, Level::Ok, text)];
    }
    facts.networks.iter().map(|text| finding(Subject::Networks, Level::Problem, text.clone())).collect()
}

/// A way in which a member's port fails; members for which it is the same are told together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Failing {
    level: Level,
    kind: Kind,
    port: u16,
    lane: Option<u8>,
    direction: Direction,
    answers: Answers,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    /// Nothing of the member is heard at all.
    Gone,
    /// UDP, the control port.
    Gossip,
    /// TCP, the control port.
    Session(Refusal),
    /// UDP, a lane's port; now, or when it was tried last.
    Lane { is_past: bool },
}

fn failing(member: &Member) -> Vec<Failing> {
    let answers = member.gossip.answers();
    let carries = member.carries(None);
    let port = member.gossip.port;
    let worst = if carries == Carries::Yes { Level::Warning } else { Level::Problem };
    let gone = answers == Answers::No && carries != Carries::Yes
        || !member.reachable && answers != Answers::Yes && carries != Carries::Yes;
    if gone {
        let (direction, lane) = (Direction::Either, None);
        return vec![Failing {
            level: Level::Problem,
            kind: Kind::Gone,
            port,
            lane,
            direction,
            answers: Answers::No,
        }];
    }
    let mut all = Vec::new();
    let direction = match answers {
        Answers::OnlySpeaks => Some(Direction::ToMember),
        Answers::No => Some(Direction::Either),
        Answers::Yes | Answers::Unknown => None,
    };
    if let Some(direction) = direction {
        all.push(Failing { level: worst, kind: Kind::Gossip, port, lane: None, direction, answers });
    }
    if let Some((_, error)) =
        member.session.failed.as_ref().filter(|_| member.session.state != SessionState::Open)
    {
        let level = if member.key == Key::Confirmed { Level::Warning } else { Level::Problem };
        let kind = Kind::Session(Refusal::of(error));
        all.push(Failing { level, kind, port, lane: None, direction: Direction::ToMember, answers });
    }
    let closed = member.path.as_ref().is_some_and(|path| path.why == Why::PortClosed && path.relay.is_some());
    for (at, lane) in member.lanes.iter().enumerate() {
        let silence = lane.silence.map(|Silence { direction, ended, .. }| (direction, ended.is_some()));
        let silence = silence.or((closed && at == 0).then_some((Direction::Either, true)));
        let Some((direction, is_past)) = silence else { continue };
        let level = if is_past { Level::Warning } else { worst };
        let (kind, lane, port) = (Kind::Lane { is_past }, Some(lane.index), lane.port);
        all.push(Failing { level, kind, port, lane, direction, answers });
    }
    all
}

fn ports(facts: &DoctorFacts) -> Vec<Finding> {
    let mut groups: BTreeMap<Failing, Vec<&Member>> = BTreeMap::new();
    for member in &facts.members {
        for failing in failing(member) {
            groups.entry(failing).or_default().push(member);
        }
    }
    if groups.is_empty() {
        let text = match facts.members.len() {
            0 => "there is no other member yet".to_owned(),
            1 => "the only other member is reached; no port is known to be closed".to_owned(),
            all => format!("all {all} other members are reached; no port is known to be closed"),
        };
        return vec![finding(Subject::Members, Level::Ok, text)];
    }
    groups.into_iter().map(|(failing, members)| group(failing, &members, facts.members.len())).collect()
}

fn group(failing: Failing, members: &[&Member], all: usize) -> Finding {
    let Failing { level, kind, port, lane, direction, answers } = failing;
    let labels: Vec<String> = members.iter().map(|member| member.label.clone()).collect();
    let who = match members.len() {
        1 => labels.concat(),
        count => format!("{count} of {all} members ({})", some(&labels)),
    };
    let is_one = members.len() == 1;
    // Where most of several fail it is this host's side, else theirs.
    let side = match (members.len(), all) {
        (1, 1) => "in the firewall of one of the two hosts, or between them",
        (count, all) if count * 2 > all => "in the firewall of this host's site",
        (1, _) => "in the firewall of that host, or its site's",
        (_, _) => "in the firewalls of those hosts, or of their site",
    };
    let control = members.first().map_or(port, |member| member.gossip.port);
    let probes = match (answers, is_one) {
        (Answers::Yes, true) => format!("; probes on UDP {control} are answered"),
        (Answers::Yes, false) => format!("; probes on UDP {control} are answered by all of them"),
        (Answers::OnlySpeaks | Answers::No, _) => {
            format!("; probes on UDP {control} are not answered either")
        }
        (Answers::Unknown, _) => String::new(),
    };
    let (about, protocol, text, advice) = match kind {
        Kind::Gone => {
            let tcp = members.iter().find_map(|member| {
                let (_, error) = member.session.failed.as_ref()?;
                Some(match Refusal::of(error) {
                    Refusal::Refused => format!(", and TCP {port} is refused: is meshd running there?"),
                    Refusal::Silent => format!(", nor on TCP {port}"),
                    Refusal::Other => String::new(),
                })
            });
            let text = format!("nothing comes back from {who} on UDP {port}{}", tcp.unwrap_or_default());
            let advice = format!(
                "is it up? If it will not come back, `meshctl remove`; if it is up, UDP and TCP {port} are closed {side}"
            );
            (Subject::Members, Protocol::Udp, text, advice)
        }
        Kind::Gossip => {
            let works = if level == Level::Warning { "; the tunnels carry all the same" } else { "" };
            let text = match direction {
                Direction::ToMember => format!(
                    "UDP {port} from this host to {who}: datagrams come from there, and what this host sends is not answered{works}"
                ),
                Direction::FromMember | Direction::Both | Direction::Either | Direction::Unknown => {
                    format!("UDP {port} from this host: nothing comes back from {who}{works}")
                }
            };
            (Subject::Gossip, Protocol::Udp, text, format!("is UDP {port} open {side}?"))
        }
        Kind::Session(refusal) => {
            let what = match refusal {
                Refusal::Refused => "connection refused".to_owned(),
                Refusal::Silent => "timed out, nothing comes back".to_owned(),
                Refusal::Other => {
                    let error = members.first().and_then(|member| member.session.failed.as_ref());
                    error.map_or_else(String::new, |(_, error)| error.clone())
                }
            };
            let means =
                if level == Level::Warning { "the tunnels have their keys" } else { "no key is agreed" };
            let text = format!("TCP {port} from this host to {who}: {what}; {means}");
            (Subject::Session, Protocol::Tcp, text, format!("is TCP {port} open {side}?"))
        }
        Kind::Lane { is_past } => {
            let when = if is_past { " (when it was tried last; a relay is in use)" } else { "" };
            let text = match direction {
                Direction::ToMember => format!(
                    "UDP {port} from this host to {who}: nothing arrives there, {}{when}{probes}",
                    if is_one { "as it says itself" } else { "as they say themselves" }
                ),
                Direction::FromMember => {
                    format!("UDP {port} from {who} to this host: nothing arrives here{when}{probes}")
                }
                Direction::Both => {
                    format!(
                        "UDP {port} between this host and {who}: nothing arrives in either direction{when}{probes}"
                    )
                }
                Direction::Either | Direction::Unknown => {
                    format!("UDP {port} from this host: nothing comes back from {who}{when}{probes}")
                }
            };
            (Subject::Tunnel, Protocol::Udp, text, format!("is UDP {port} open {side}?"))
        }
    };
    let addresses = members.iter().flat_map(|member| match kind {
        Kind::Lane { .. } => {
            let of = |known: &&super::Lane| Some(known.index) == lane;
            member.lanes.iter().filter(of).filter_map(|lane| lane.direct).collect::<Vec<_>>()
        }
        Kind::Session(_) => member.session.addresses.clone(),
        Kind::Gone | Kind::Gossip => member.gossip.addresses.clone(),
    });
    let failure =
        PortFailure { protocol, port, lane, direction, addresses: addresses.take(ADDRESSES).collect() };
    let mut finding = finding(about, level, text).fails(failure).advise(advice);
    finding.members = members.iter().map(|member| member.id.to_string()).collect();
    finding
}

/// Addresses that a group of members names, at most.
const ADDRESSES: usize = 64;

fn keys(facts: &DoctorFacts) -> Option<Finding> {
    let without: Vec<&Member> = facts
        .members
        .iter()
        .filter(|member| member.key != Key::Confirmed && member.reachable && member.session.failed.is_none())
        .collect();
    if without.is_empty() {
        return None;
    }
    let labels: Vec<String> = without.iter().map(|member| member.label.clone()).collect();
    let doubted = without.iter().any(|member| member.key == Key::Doubted);
    let text = format!("no key is agreed yet for the tunnels with {}", some(&labels));
    let level = if doubted { Level::Problem } else { Level::Warning };
    let mut finding = finding(Subject::Key, level, text)
        .advise("that takes a moment after a start; `meshctl why` says what each waits for");
    finding.members = without.iter().map(|member| member.id.to_string()).collect();
    Some(finding)
}

fn relays(facts: &DoctorFacts) -> Vec<Finding> {
    let mut groups: BTreeMap<(String, &'static str), Vec<&Member>> = BTreeMap::new();
    for member in &facts.members {
        let Some(path) = &member.path else { continue };
        let Some(relay) = &path.relay else { continue };
        groups.entry((relay.clone(), path.why.text())).or_default().push(member);
    }
    if groups.is_empty() {
        return vec![finding(Subject::Path, Level::Ok, "no tunnel of this host takes a relay")];
    }
    let of = |((relay, why), members): ((String, &str), Vec<&Member>)| {
        let labels: Vec<String> = members.iter().map(|member| member.label.clone()).collect();
        let text = format!("{} reached through the relay {relay} only: {why}", are(&labels));
        let mut finding = finding(Subject::Path, Level::Warning, text)
            .advise("`meshctl why` with one of them says what is wrong with the direct way");
        finding.members = members.iter().map(|member| member.id.to_string()).collect();
        finding
    };
    groups.into_iter().map(of).collect()
}

fn are(labels: &[String]) -> String {
    if labels.len() == 1 { format!("{} is", labels.concat()) } else { format!("{} are", some(labels)) }
}

fn mtus(facts: &DoctorFacts) -> Finding {
    let narrow: Vec<(&Member, u32)> = facts
        .members
        .iter()
        .filter_map(|member| {
            let mtu = member.mtu.filter(|mtu| !mtu.is_largest)?;
            Some((member, mtu.underlay?))
        })
        .collect();
    if narrow.is_empty() {
        let text =
            format!("no path that was measured is narrower than the device's MTU of {} bytes", facts.mtu);
        return finding(Subject::Mtu, Level::Ok, text);
    }
    let labels: Vec<String> = narrow
        .iter()
        .map(|(member, underlay)| format!("{} ({underlay} bytes outside)", member.label))
        .collect();
    let text = format!(
        "paths narrower than the device's MTU of {} bytes: {}; routes have it so",
        facts.mtu,
        some(&labels)
    );
    let mut finding = finding(Subject::Mtu, Level::Note, text);
    let ids: BTreeSet<String> = narrow.iter().map(|(member, _)| member.id.to_string()).collect();
    finding.members = ids.into_iter().collect();
    finding
}

fn settings(facts: &DoctorFacts) -> Finding {
    match &facts.settings {
        Err(error) => finding(
            Subject::Sysctls,
            Level::Warning,
            format!("which settings of the host the daemon has changed cannot be read: {error}"),
        ),
        Ok(settings) if settings.is_empty() => {
            finding(Subject::Sysctls, Level::Ok, "the daemon has changed no settings of the whole host")
        }
        Ok(settings) => {
            let text = |setting: &Setting| {
                let now = setting.now.as_deref().unwrap_or("not there");
                format!("{} is {now} (was {})", setting.path.replace('/', "."), setting.before)
            };
            let texts: Vec<String> = settings.iter().map(text).collect();
            let text = format!("settings of the host that the daemon has changed: {}", texts.join(", "));
            finding(Subject::Sysctls, Level::Note, text)
        }
    }
}

fn clock(unix_seconds: Option<u64>) -> Finding {
    match unix_seconds {
        None => finding(
            Subject::Clock,
            Level::Warning,
            "what the host's clock shows is not known: nothing that expires is valid here",
        ),
        Some(seconds) if seconds < EARLIEST => finding(
            Subject::Clock,
            Level::Problem,
            "the host's clock is before 2025: tokens and join windows are taken for valid or not by it",
        )
        .advise("set the clock, by NTP say"),
        Some(_) => finding(
            Subject::Clock,
            Level::Note,
            "the host's clock is set; members do not tell each other their time, so it is compared with nobody's",
        ),
    }
}
