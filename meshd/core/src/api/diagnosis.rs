//! What keeps traffic from flowing: the documents behind `meshctl why` and `meshctl doctor`.

use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

/// Schema of [`WhyReport`] and [`DoctorReport`]; raised when a field changes its meaning or goes away.
pub const DIAGNOSIS_SCHEMA_VERSION: u32 = 1;

/// A flow to be explained: the body of `POST /v1/why`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WhyRequest {
    /// Where it begins: an address of a pod, of a node in the mesh or of its host; a node's name, id or the first 8 or more
    /// digits of that; a container's id, or a pod's name, of this host.
    pub from: String,
    /// Where it ends; the same, and maybe a port: `10.32.0.2:80`, `[fd00::2]:80`, `web-0:80`.
    pub to: String,
    /// Whether the daemon sends probes to find out what it does not know.
    #[serde(default)]
    pub look: bool,
    /// What came of pings through the tunnel to [`WhyReport::ping`], once that was tried.
    #[serde(default)]
    pub pinged: Option<Pinged>,
}

/// What came of pings through a tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Pinged {
    /// One was answered.
    Answered {
        /// Time from the ping to its answer.
        microseconds: u32,
    },
    /// None was.
    Unanswered {
        /// How many were sent.
        count: u32,
    },
    /// What a newer client says.
    #[serde(other)]
    Unknown,
}

/// What a flow meets on its way, and what stops it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WhyReport {
    /// [`DIAGNOSIS_SCHEMA_VERSION`] of the daemon.
    pub schema_version: u32,
    /// Where it begins.
    pub source: EndStatus,
    /// Where it ends.
    pub destination: EndStatus,
    /// The port, if one was named.
    pub port: Option<u16>,
    /// Whether it gets there.
    pub verdict: Verdict,
    /// The verdict in a sentence.
    pub summary: String,
    /// What it meets, in the order of the way.
    pub findings: Vec<Finding>,
    /// An address at the other end of the tunnel: whether it answers pings says what the daemon cannot see.
    pub ping: Option<IpAddr>,
    /// Probes are under way: after so many milliseconds there is more to say.
    pub look_again_milliseconds: Option<u64>,
}

/// An end of a flow.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndStatus {
    /// As it was named.
    pub text: String,
    /// Its address.
    pub address: Option<IpAddr>,
    /// The node that owns the address.
    pub node: Option<NodeName>,
    /// Its attachment, if it is a pod of this host: container and interface.
    pub attachment: Option<String>,
}

/// A node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeName {
    /// Node id, 32 hexadecimal digits.
    pub id: String,
    /// Label; two nodes may have the same.
    pub name: String,
    /// Whether it is the node of this daemon.
    pub this_node: bool,
}

/// Whether a flow gets to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// Nothing that this node knows stops it.
    Flows,
    /// Something does: the findings with [`Level::Problem`].
    Stopped,
    /// Neither end is of this host: another daemon has to be asked.
    AskElsewhere,
    /// A verdict of a newer daemon.
    #[serde(other)]
    Unknown,
}

/// What this host and its view of the mesh are like.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DoctorReport {
    /// [`DIAGNOSIS_SCHEMA_VERSION`] of the daemon.
    pub schema_version: u32,
    /// The node.
    pub node: NodeName,
    /// The worst of the findings.
    pub level: Level,
    /// One or more for each thing that was looked at.
    pub findings: Vec<Finding>,
    /// Probes are under way: after so many milliseconds there is more to say.
    pub look_again_milliseconds: Option<u64>,
}

/// Something that was looked at, and how it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// What was looked at.
    pub about: Subject,
    /// How it is.
    pub level: Level,
    /// The same in a sentence.
    pub text: String,
    /// What to do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub advice: Option<String>,
    /// The port that does not let something through.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<PortFailure>,
    /// Ids of the members that it is about.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub members: Vec<String>,
}

/// How something is, the best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Level {
    /// As it should be.
    Ok,
    /// Worth knowing; nothing is wrong.
    Note,
    /// It works, and not as it should.
    Warning,
    /// It does not work.
    Problem,
    /// A level of a newer daemon.
    #[serde(other)]
    Unknown,
}

/// What a finding is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Subject {
    /// Whether this node is in a cluster.
    Membership,
    /// Where a flow begins.
    Source,
    /// Where it ends.
    Destination,
    /// Policies.
    Policy,
    /// Devices, routes and rules of this host.
    Host,
    /// Who carries the tunnels.
    Engine,
    /// Where packets for an address go.
    Route,
    /// The key of a tunnel.
    Key,
    /// Control sessions: TCP.
    Session,
    /// Gossip and probes: UDP, the same port.
    Gossip,
    /// The way that a tunnel takes.
    Path,
    /// A tunnel: UDP, a port for each lane.
    Tunnel,
    /// How long packets may be.
    Mtu,
    /// Members that are thought to be gone.
    Members,
    /// Whether there is a NAT in front of this host.
    Nat,
    /// Networks of the host and ranges of the cluster.
    Networks,
    /// Settings of the host that the daemon has changed.
    Sysctls,
    /// The host's clock.
    Clock,
    /// What the cluster says of this node.
    Cluster,
    /// Something that a newer daemon looks at.
    #[serde(other)]
    Unknown,
}

/// A port that does not let something through.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PortFailure {
    /// Of which protocol.
    pub protocol: Protocol,
    /// The member's port.
    pub port: u16,
    /// Number of the lane whose port it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lane: Option<u8>,
    /// In which direction nothing gets through.
    pub direction: Direction,
    /// The member's addresses that were tried.
    pub addresses: Vec<SocketAddr>,
}

/// A protocol with ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Protocol {
    /// UDP.
    Udp,
    /// TCP.
    Tcp,
}

/// In which direction nothing gets through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Direction {
    /// From this host to the member.
    ToMember,
    /// From the member to this host.
    FromMember,
    /// In both.
    Both,
    /// In one of them at least; which one is not known here.
    Either,
    /// A direction of a newer daemon.
    #[serde(other)]
    Unknown,
}
