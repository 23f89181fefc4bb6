//! What the node is and does: the document behind `meshctl status`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

use crate::said;

/// The whole status of a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// [`super::SCHEMA_VERSION`] of the daemon.
    pub schema_version: u32,
    /// Version of the daemon.
    pub version: String,
    /// This node.
    pub node: NodeStatus,
    /// The cluster, once the node is in one.
    pub cluster: Option<ClusterStatus>,
    /// Whether the node is in a cluster, and what it waits for when it is not.
    pub membership: Membership,
    /// The addresses of this node.
    pub addresses: Option<AddressStatus>,
    /// The tunnel devices of this node.
    pub lanes: Vec<LaneStatus>,
    /// Every other member.
    pub peers: Vec<PeerStatus>,
    /// Number of attachments: leased and active together.
    pub attachments: usize,
    /// What keeps the node from working as it should, in sentences; empty when all is well.
    pub problems: Vec<String>,
    /// Who owns which addresses, once the node is in a cluster. Older daemons do not say.
    #[serde(default)]
    pub ipam: Option<IpamStatus>,
    /// How far the node is with leaving the cluster; absent unless its operator has decided that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub leave: Option<LeaveStatus>,
}

/// How far a node is with leaving the cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "state")]
pub enum LeaveStatus {
    /// It is at it.
    Leaving {
        /// What it waits for, in a sentence.
        waiting_for: String,
    },
    /// Its addresses are in other hands. It is a member until an admin key signs its removal.
    AddressesGiven,
    /// It is no member any more: `meshd` may be stopped, and its state directory removed.
    Left,
}

/// This node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeStatus {
    /// Node id, 32 hexadecimal digits.
    pub id: String,
    /// Label; not an identity.
    pub name: String,
    /// Identity key (Ed25519), 64 hexadecimal digits.
    pub identity_key: String,
}

/// The cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterStatus {
    /// Cluster id, 64 hexadecimal digits.
    pub id: String,
    /// Name from the genesis document.
    pub name: String,
    /// Node id of the founder.
    pub founder: String,
    /// The cluster's IPv4 range.
    pub ipv4: Ipv4Net,
    /// The cluster's IPv6 range.
    pub ipv6: Ipv6Net,
    /// Known members, this one included.
    pub members: usize,
    /// The keys that may sign removals, 64 hexadecimal digits each. None: the cluster is flat, and cannot evict a
    /// malicious member. Older daemons do not say.
    #[serde(default)]
    pub admin_keys: Option<Vec<String>>,
    /// Whether nodes may join by key file or password at the moment. Older daemons do not say.
    #[serde(default)]
    pub joins_open: Option<bool>,
}

/// Whether the node is in a cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "state")]
pub enum Membership {
    /// It has no cluster yet.
    Joining {
        /// What it waits for, in a sentence.
        waiting_for: String,
    },
    /// It is a member.
    Member,
}

/// The addresses of this node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddressStatus {
    /// The node's own mesh address, gateway of its pods.
    pub ipv4: Ipv4Addr,
    /// Likewise, IPv6.
    pub ipv6: Ipv6Addr,
    /// The IPv4 ranges this node owns.
    pub owned_ipv4: Vec<Ipv4Net>,
    /// The IPv6 prefix this node owns.
    pub owned_ipv6: Ipv6Net,
    /// Leased IPv4 addresses.
    pub leased: u64,
    /// IPv4 addresses that can be leased now.
    pub free: u64,
}

/// Who owns which addresses of the cluster, and what this node does with its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IpamStatus {
    /// The cluster's IPv4 range.
    pub ipv4: Ipv4Net,
    /// The cluster's IPv6 range.
    pub ipv6: Ipv6Net,
    /// Length of the prefix of a block: the least that one node hands to another.
    pub block_prefix: u8,
    /// Every node that owns addresses; those with the most IPv4 addresses first. Every IPv4 address of the range
    /// has one owner.
    pub owners: Vec<OwnerStatus>,
    /// The addresses of this node.
    pub usage: UsageStatus,
    /// What would give this node more addresses, in a sentence; only when it is short of them.
    pub shortage: Option<String>,
    /// Ranges that one owner granted twice.
    pub conflicts: Vec<ConflictStatus>,
}

/// A node that owns addresses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwnerStatus {
    /// Node id, 32 hexadecimal digits.
    pub id: String,
    /// Label, when the node has said one; two nodes may have the same.
    pub name: Option<String>,
    /// Whether it is this node.
    pub this_node: bool,
    /// Its IPv4 ranges, as few prefixes as possible.
    pub ipv4: Vec<Ipv4Net>,
    /// Number of addresses in them.
    pub ipv4_addresses: u64,
    /// Its IPv6 prefix, which follows from its key, when the node has said it.
    pub ipv6: Option<Ipv6Net>,
}

/// How many of this node's IPv4 addresses are what: `own`, `leased`, `resting` and `free` add up to `usable`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UsageStatus {
    /// All that pods or the node can have: those that it owns without the ones that end in .0 and .255.
    pub usable: u64,
    /// The node's own: one, once it has an address.
    pub own: u64,
    /// Leased to attachments.
    pub leased: u64,
    /// At rest after a release.
    pub resting: u64,
    /// Seconds until the last of those at rest can be leased again.
    pub resting_seconds: u64,
    /// Can be leased now.
    pub free: u64,
}

/// One owner granted the same range twice. Every member settles it alike: one of the two grants counts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConflictStatus {
    /// Node id of the owner that did.
    pub granter: String,
    /// The range.
    pub range: Ipv4Net,
    /// Node id of the node that does not get it.
    pub loser: String,
}

/// Who carries the tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Backend {
    /// The kernel's WireGuard.
    Kernel,
    /// The process `mesh-wg`.
    Userspace,
    /// A backend of a newer daemon.
    #[serde(other)]
    Unknown,
}

/// A tunnel device of this node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LaneStatus {
    /// Name of the device.
    pub device: String,
    /// Who carries it.
    pub backend: Backend,
    /// Why this backend was chosen.
    pub reason: String,
    /// UDP port.
    pub port: u16,
    /// WireGuard public key, base64.
    pub public_key: String,
    /// Whether the device exists and is configured as it should be.
    pub up: bool,
}

/// Another member.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerStatus {
    /// Node id, 32 hexadecimal digits.
    pub id: String,
    /// Label; two nodes may have the same.
    pub name: String,
    /// Version of its daemon, as it said.
    pub version: String,
    /// Whether it is leaving the cluster; absent unless it is.
    #[serde(default, skip_serializing_if = "said::is_false")]
    pub leaving: bool,
    /// The addresses it said it can be reached at.
    pub advertised: Vec<IpAddr>,
    /// Its ranges.
    pub ranges: Vec<IpNet>,
    /// Its mesh addresses.
    pub mesh_ipv4: Option<Ipv4Addr>,
    /// Likewise, IPv6.
    pub mesh_ipv6: Ipv6Addr,
    /// The control session with it.
    pub session: SessionStatus,
    /// What gossip knows of it. Older daemons do not say.
    #[serde(default)]
    pub gossip: GossipStatus,
    /// The tunnel to it.
    pub tunnel: TunnelStatus,
    /// The way that the tunnel takes; absent while nothing is sent and nothing speaks against the direct one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<PathStatus>,
    /// How long packets to it may be. Older daemons do not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<MtuStatus>,
}

/// How long packets to a member may be, in bytes, IP header included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MtuStatus {
    /// Pods' IPv4 packets.
    pub ipv4: u32,
    /// Pods' IPv6 packets.
    pub ipv6: u32,
    /// The tunnel's packets on the way to the member, as probes have shown; absent while none was answered, and where the
    /// tunnel goes through a relay: then it is taken to be 1,280.
    pub underlay: Option<u32>,
    /// Whether that is all that the tunnel's device can make use of.
    pub is_largest: bool,
    /// Seconds since a probe of that size was answered.
    pub confirmed_seconds: Option<u64>,
}

/// The way that a tunnel takes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathStatus {
    /// Id of the member that relays it; absent: it goes directly.
    pub relay: Option<String>,
    /// Why it is this one.
    pub why: String,
    /// Seconds since it is.
    pub since_seconds: u64,
    /// Whether this node chooses it, and not the other end.
    pub chosen_here: bool,
    /// The ways that are known, the direct one first.
    pub ways: Vec<WayStatus>,
}

/// A way that a tunnel might take.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WayStatus {
    /// Id of the member that would relay it; absent: the direct one.
    pub relay: Option<String>,
    /// Smoothed time from a probe to its answer, once one was answered.
    pub rtt_microseconds: Option<u32>,
    /// Seconds since a probe was answered.
    pub answered_seconds: Option<u64>,
    /// Whether the tunnel could take it now.
    pub usable: bool,
}

/// What gossip knows of a member. It is a hint: nothing is taken from a member that is thought to be unreachable.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GossipStatus {
    /// Whether it is thought to be reachable.
    pub reachable: bool,
    /// Where its datagrams come from, once some have.
    pub address: Option<SocketAddr>,
    /// Smoothed round-trip time, once it has answered.
    pub rtt_microseconds: Option<u32>,
    /// Seconds since something came from it directly.
    pub heard_seconds: Option<u64>,
}

/// The control session with a member: there is one while there is something to say.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "state")]
pub enum SessionStatus {
    /// Established.
    Up {
        /// The other end.
        remote: SocketAddr,
        /// Seconds since it was established.
        since_seconds: u64,
    },
    /// Established by way of another member, which carries it and cannot read it.
    Carried {
        /// Id of that member.
        through: String,
        /// Seconds since it was established.
        since_seconds: u64,
    },
    /// None at present.
    Down {
        /// Why the last one ended, or could not be made.
        reason: Option<String>,
    },
}

/// The tunnel to a member.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TunnelStatus {
    /// Whether the kernel sends what is for the member's ranges into the tunnel.
    pub ready: bool,
    /// Where its packets go.
    pub endpoint: Option<SocketAddr>,
    /// Seconds since the last handshake; absent when there was none.
    pub handshake_age_seconds: Option<u64>,
    /// Bytes received.
    pub rx_bytes: u64,
    /// Bytes sent.
    pub tx_bytes: u64,
}
