//! `meshctl why`: what a flow meets.

use std::net::IpAddr;

use ipnet::IpNet;
use mesh_keys::NodeId;

use super::member::Carries;
use super::{Extend as _, Key, Member, finding, within};
use crate::api::{
    BRIDGE, DIAGNOSIS_SCHEMA_VERSION, EndStatus, Finding, Level, NodeName, Pinged, Subject, Verdict,
    WhyReport,
};
use crate::node::{GUARD_OBJECT, Problem};

/// Who is at an end of a flow.
#[derive(Clone, Debug)]
pub struct End {
    /// As it was named.
    pub text: String,
    /// Its address; absent where a node has none yet.
    pub address: Option<IpAddr>,
    /// Whose that is.
    pub owner: Owner,
}

/// Whose an address is.
#[derive(Clone, Debug)]
pub enum Owner {
    /// A pod of this host has it.
    Pod(LocalPort),
    /// This node itself.
    ThisNode,
    /// It is of this node's ranges, and no pod has it.
    Free,
    /// Another member.
    Member {
        /// Its id.
        id: NodeId,
        /// What people call it.
        label: String,
        /// The range that it is in, where it is not the node's own address.
        range: Option<IpNet>,
    },
    /// It is in the cluster's ranges, and no member that is known owns it.
    Nobody,
    /// A host has it on the network between the hosts; this one, or that of the member with this label.
    Underlay(Option<String>),
    /// It is none of the cluster's.
    Outside,
}

/// The port of a pod of this host.
#[derive(Clone, Debug)]
pub struct LocalPort {
    /// The attachment: container and interface.
    pub attachment: String,
    /// Namespace and name of the pod, when the runtime told.
    pub pod: Option<String>,
    /// The host's end of its veth pair.
    pub device: String,
    /// How far it is.
    pub standing: Standing,
}

/// How far a pod's port is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Its port is in the bridge, with guard and route.
    Applied,
    /// It has an address, and the plugin has not attached it yet.
    Leased,
    /// It is attached, and the kernel does not have it yet.
    Waiting,
    /// The kernel does not have it as it should be.
    Problem(String),
}

/// All that is known of a flow.
#[derive(Clone, Debug)]
pub struct WhyFacts {
    /// This node.
    pub here: NodeName,
    /// What the node waits for, as long as it is in no cluster.
    pub waiting_for: Option<String>,
    /// Where the flow begins.
    pub from: End,
    /// Where it ends.
    pub to: End,
    /// The port, if one was named.
    pub port: Option<u16>,
    /// The member at the other end, if exactly one of the two is of this host.
    pub member: Option<Member>,
    /// Whether the kernel was ever brought to what this node wants.
    pub is_applied: bool,
    /// What is not as it should be in the kernel.
    pub problems: Vec<Problem>,
    /// What came of pings through the tunnel, if that was tried.
    pub pinged: Option<Pinged>,
    /// An address of the member that may be pinged.
    pub ping: Option<IpAddr>,
    /// Probes are under way: look again after so many milliseconds.
    pub look_again_milliseconds: Option<u64>,
}

/// What a flow meets, and what stops it.
pub fn why(facts: &WhyFacts) -> WhyReport {
    let status = |end: &End| EndStatus {
        text: end.text.clone(),
        address: end.address,
        node: match &end.owner {
            Owner::Pod(_) | Owner::ThisNode | Owner::Free | Owner::Underlay(None) => Some(facts.here.clone()),
            Owner::Member { id, label, .. } => {
                Some(NodeName { id: id.to_string(), name: label.clone(), this_node: false })
            }
            Owner::Nobody | Owner::Underlay(Some(_)) | Owner::Outside => None,
        },
        attachment: match &end.owner {
            Owner::Pod(port) => Some(port.attachment.clone()),
            Owner::ThisNode
            | Owner::Free
            | Owner::Member { .. }
            | Owner::Nobody
            | Owner::Underlay(_)
            | Owner::Outside => None,
        },
    };
    let (verdict, summary, findings) = judge(facts);
    WhyReport {
        schema_version: DIAGNOSIS_SCHEMA_VERSION,
        source: status(&facts.from),
        destination: status(&facts.to),
        port: facts.port,
        verdict,
        summary,
        findings,
        ping: facts.ping,
        look_again_milliseconds: facts.look_again_milliseconds,
    }
}

fn judge(facts: &WhyFacts) -> (Verdict, String, Vec<Finding>) {
    if let Some(waiting_for) = &facts.waiting_for {
        let text = format!("this node is in no cluster yet, and waits for {waiting_for}");
        let finding = finding(Subject::Membership, Level::Problem, text.clone());
        return (Verdict::Stopped, text, vec![finding]);
    }
    if let (Owner::Member { label: from, .. }, Owner::Member { label: to, .. }) =
        (&facts.from.owner, &facts.to.owner)
    {
        let on = if from == to { from.clone() } else { format!("{from} or on {to}") };
        let text = format!(
            "neither end is of this host ({}), which sees nothing of it: ask on {on}, `meshctl why {} {}`",
            facts.here.name, facts.from.text, facts.to.text
        );
        return (Verdict::AskElsewhere, text, Vec::new());
    }
    let mut findings = vec![
        end(&facts.from, Subject::Source, &facts.here),
        end(&facts.to, Subject::Destination, &facts.here),
    ];
    if let Some(port) = facts.port {
        let text = format!(
            "port {port}: NetworkPolicies are NOT evaluated by this version, and whether something listens there only the \
             destination knows; all else is said of the two addresses"
        );
        findings.push(finding(Subject::Policy, Level::Note, text));
    }
    findings.push(host(facts));
    if let Some(member) = &facts.member {
        let remote = if is_local(&facts.from.owner) { &facts.to } else { &facts.from };
        findings.push(route(member, remote.address));
        findings.push(member.key_finding());
        findings.extend(member.session_finding());
        findings.push(member.gossip_finding(facts.pinged));
        findings.push(member.path_finding());
        findings.extend(member.tunnel_findings(facts.pinged));
        findings.extend(member.mtu_finding());
    }
    let mut problems = findings.iter().filter(|finding| finding.level == Level::Problem);
    let closed = problems.clone().find(|finding| finding.failure.is_some());
    let tunnel = problems.clone().find(|finding| finding.about == Subject::Tunnel);
    // Where the port of the tunnel is known to be closed, that is what stops the flow, and not that gossip does not get through.
    let worst = tunnel.filter(|finding| finding.failure.is_some()).or(closed).or_else(|| problems.next());
    match worst {
        Some(worst) => (Verdict::Stopped, worst.text.clone(), findings),
        None => (Verdict::Flows, flows(facts), findings),
    }
}

fn flows(facts: &WhyFacts) -> String {
    let Some(member) = &facts.member else {
        return format!("nothing that {} knows stops it; it does not leave this host", facts.here.name);
    };
    let way = match member.relay() {
        Some(relay) => format!("through the relay {relay}"),
        None => "directly".to_owned(),
    };
    match member.carries(facts.pinged) {
        Carries::Unknown => format!(
            "nothing that {} knows stops it; nothing was sent to {} of late, so that is not tried",
            facts.here.name, member.label
        ),
        Carries::Yes | Carries::No => {
            format!("nothing that {} knows stops it; it goes {way}", facts.here.name)
        }
    }
}

fn is_local(owner: &Owner) -> bool {
    match owner {
        Owner::Pod(_) | Owner::ThisNode | Owner::Free | Owner::Underlay(None) => true,
        Owner::Member { .. } | Owner::Nobody | Owner::Underlay(Some(_)) | Owner::Outside => false,
    }
}

fn end(end: &End, about: Subject, here: &NodeName) -> Finding {
    let of = |level, text: String| finding(about, level, text);
    let name = match end.address {
        Some(address) if address.to_string() != end.text => format!("{} ({address})", end.text),
        Some(_) | None => end.text.clone(),
    };
    match &end.owner {
        Owner::Pod(port) => {
            let pod = port.pod.as_ref().map_or_else(String::new, |pod| format!(", {pod}"));
            let who = format!("{name} is the attachment {} of this host{pod}", port.attachment);
            match &port.standing {
                Standing::Applied => of(
                    Level::Ok,
                    format!("{who}; its port {} is in {BRIDGE}, with its guard and its routes", port.device),
                ),
                Standing::Leased => of(
                    Level::Problem,
                    format!(
                        "{who}, which has an address and is not attached yet: the plugin has not asked for it"
                    ),
                )
                .advise("if that lasts, look at the container runtime's log for an ADD that failed"),
                Standing::Waiting => of(
                    Level::Problem,
                    format!("{who}; the kernel does not have its port {} yet", port.device),
                )
                .advise("ask again in a moment"),
                Standing::Problem(problem) => {
                    of(Level::Problem, format!("{who}; its port {}: {problem}", port.device))
                }
            }
        }
        Owner::ThisNode => of(Level::Ok, format!("{name} is this node, {}", here.name)),
        Owner::Free => of(
            Level::Problem,
            format!("{name} is of the ranges of this node, {}, and no pod has it", here.name),
        )
        .advise("`meshctl status ipam` shows the ranges; the pod may be gone, or have another address now"),
        Owner::Member { label, range: None, .. } => of(Level::Ok, format!("{name} is the node {label}")),
        Owner::Member { label, range: Some(range), .. } => of(
            Level::Ok,
            format!(
                "{name} is of {range}, a range of {label}; whether a pod has it, and how that is, only {label} knows"
            ),
        ),
        Owner::Nobody => of(
            Level::Problem,
            format!("{name} is in the range of the cluster, and no member that is known here owns it"),
        )
        .advise(
            "`meshctl status ipam` shows who owns which addresses; those of a removed node wait for its heir",
        ),
        Owner::Underlay(whose) => {
            let whose =
                whose.as_ref().map_or_else(|| "this host".to_owned(), |label| format!("the host of {label}"));
            of(
                Level::Problem,
                format!("{name} is an address of {whose} outside of the mesh: pods do not reach it"),
            )
            .advise(
                "use the node's mesh address; `meshctl status peers` shows it. There is no masquerading yet",
            )
        }
        Owner::Outside => of(Level::Problem, format!("{name} is none of the cluster's addresses"))
            .advise("pods reach pods and nodes of the mesh only: there is no masquerading yet"),
    }
}

/// What the settings of the host begin with.
const SETTINGS: &str = "net/";

/// What concerns every flow: pods' ports are told with their pods.
fn host(facts: &WhyFacts) -> Finding {
    let devices: Vec<&str> = facts
        .member
        .iter()
        .flat_map(|member| &member.lanes)
        .filter_map(|lane| lane.device.as_deref())
        .collect();
    let ranges: &[IpNet] = facts.member.as_ref().map_or(&[], |member| &member.ranges);
    let concerns = |problem: &&Problem| {
        let object = problem.object.as_str();
        let is_range = object.parse::<IpNet>().is_ok_and(|range| ranges.contains(&range));
        object == GUARD_OBJECT
            || object == BRIDGE
            || object.starts_with(SETTINGS)
            || devices.contains(&object)
            || is_range
    };
    let texts: Vec<String> = facts
        .problems
        .iter()
        .filter(concerns)
        .map(|problem| format!("{}: {}", problem.object, problem.text))
        .collect();
    if !facts.is_applied {
        return finding(
            Subject::Host,
            Level::Problem,
            "devices, routes and rules of this host are not set up yet",
        )
        .advise("ask again in a moment; `meshctl status` says what is in the way");
    }
    if texts.is_empty() {
        return finding(
            Subject::Host,
            Level::Ok,
            "devices, routes and rules of this host are as they should be",
        );
    }
    finding(Subject::Host, Level::Problem, texts.join("; "))
        .advise("the daemon tries again by itself; see its log")
}

fn route(member: &Member, address: Option<IpAddr>) -> Finding {
    let of = |level, text: String| finding(Subject::Route, level, text).of(member);
    let Some(address) = address else {
        return of(Level::Problem, format!("{} has no address in the mesh yet", member.label));
    };
    let found = member.routes.iter().find(|(range, _)| range.contains(&address));
    match (found, within(address, &member.ranges)) {
        (Some((range, device)), _) => of(Level::Ok, format!("the route for {range} of {} leads to {device}", member.label)),
        (None, Some(range)) if member.key == Key::Confirmed => of(
            Level::Problem,
            format!("there is no route for {range} of {}, though its tunnel has a key", member.label),
        )
        .advise("ask again in a moment; if it lasts, `meshctl doctor` says what the kernel refuses, or whose the range is"),
        (None, Some(range)) => of(
            Level::Note,
            format!("there is no route for {range} of {} until the key of its tunnel is confirmed", member.label),
        ),
        (None, None) => of(Level::Problem, format!("{} does not own {address}, as far as is known here", member.label)),
    }
}
