//! What a node says of itself.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

use ipnet::Ipv6Net;
use mesh_keys::{ClusterId, Genesis, IdentityKey, NodeId, Signable, SignedError, WgPublic};
use serde::{Deserialize, Serialize};

use super::View;
use crate::said;

/// A node's own account of itself, signed by itself. Newer versions append fields.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeRecord {
    /// The cluster.
    pub cluster: ClusterId,
    /// The node.
    pub node: IdentityKey,
    /// Counts the node's starts; durable before it says anything.
    pub generation: u64,
    /// Counts the changes since the start.
    pub version: u64,
    /// Label, 1 to 253 characters; not an identity, and not unique.
    pub name: String,
    /// Version of its daemon, at most 64 characters.
    pub software: String,
    /// Always zero: the node's IPv6 prefix follows from its identity key alone. Whoever could choose it would find one
    /// that makes the prefix that of another node.
    pub salt: u32,
    /// Its mesh address, once it owns one.
    pub mesh_ipv4: Option<Ipv4Addr>,
    /// TCP port for control sessions.
    pub control_port: u16,
    /// Addresses it may be reached at, the likeliest first; at most 16.
    pub endpoints: Vec<IpAddr>,
    /// Its WireGuard devices; at most 8.
    pub lanes: Vec<LaneInfo>,
    /// Names this start of the node, at random: two hosts with copies of one disk differ in it.
    pub start: u64,
    /// Whether the node has spoken up against another start of its identity.
    pub contested: bool,
    /// Whether the node is leaving the cluster: nobody should give it addresses. Said only if it is so.
    #[serde(default, skip_serializing_if = "said::is_false", deserialize_with = "said::or_false")]
    pub leaving: bool,
}

/// A WireGuard device of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LaneInfo {
    /// Number of the lane.
    pub index: u8,
    /// Its public key.
    pub key: WgPublic,
    /// Its UDP port.
    pub port: u16,
}

impl Signable for NodeRecord {
    const DOMAIN: &'static str = "hauberk node record v1";
    const MAX_LEN: usize = 4096;
}

/// Why a record is refused. Nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidRecord {
    /// Malformed, or not signed by the node it is about.
    #[error(transparent)]
    Signed(#[from] SignedError),
    /// The node is not a known member.
    #[error("node {} is no known member", .node.short())]
    NotAdmitted {
        /// The node.
        node: NodeId,
    },
    /// It is about another cluster.
    #[error("field cluster: it is for cluster {}", .0.short())]
    OtherCluster(ClusterId),
    /// A field is out of bounds.
    #[error("field {field}: {problem}")]
    Field {
        /// The field.
        field: &'static str,
        /// What is wrong with it.
        problem: &'static str,
    },
}

impl NodeRecord {
    /// Orders the records of one node: later starts before earlier ones, later changes before earlier ones.
    pub fn order(&self) -> (u64, u64) {
        (self.generation, self.version)
    }

    /// The node's IPv6 prefix, which follows from its key.
    pub fn ipv6_prefix(&self) -> Ipv6Net {
        self.cluster.node_prefix(&self.node, self.salt)
    }

    /// Checks the fields against their bounds.
    ///
    /// # Errors
    /// [`InvalidRecord`] names the field.
    pub fn validate(&self, genesis: &Genesis) -> Result<(), InvalidRecord> {
        let field =
            |ok: bool, field, problem| if ok { Ok(()) } else { Err(InvalidRecord::Field { field, problem }) };
        if self.cluster != genesis.id() {
            return Err(InvalidRecord::OtherCluster(self.cluster));
        }
        let printable = |text: &str| text.chars().all(|c| !c.is_control());
        field(
            (1..=253).contains(&self.name.len()) && printable(&self.name),
            "name",
            "not 1 to 253 printable bytes",
        )?;
        field(
            self.software.len() <= 64 && printable(&self.software),
            "software",
            "more than 64 printable bytes",
        )?;
        field(
            self.mesh_ipv4.is_none_or(|address| genesis.ipv4_range().contains(&address)),
            "mesh_ipv4",
            "outside of the cluster's range",
        )?;
        field(self.salt == 0, "salt", "not zero: a node does not choose its IPv6 prefix")?;
        field(self.control_port != 0, "control_port", "zero")?;
        field(self.endpoints.len() <= 16, "endpoints", "more than 16 addresses")?;
        field(self.endpoints.iter().all(usable), "endpoints", "an address that no other host can send to")?;
        field((1..=8).contains(&self.lanes.len()), "lanes", "not 1 to 8 lanes")?;
        field(self.lanes.iter().all(|lane| lane.port != 0), "lanes", "port zero")?;
        let mut keys: Vec<_> = self.lanes.iter().map(|lane| lane.key).collect();
        let mut indices: Vec<_> = self.lanes.iter().map(|lane| lane.index).collect();
        keys.sort_unstable();
        keys.dedup();
        indices.sort_unstable();
        indices.dedup();
        field(keys.len() == self.lanes.len(), "lanes", "the same key twice")?;
        field(indices.len() == self.lanes.len(), "lanes", "the same index twice")
    }
}

/// Whether another host could send to `address`.
fn usable(address: &IpAddr) -> bool {
    let unusable = match address {
        IpAddr::V4(v4) => v4.is_broadcast(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    !(unusable || address.is_unspecified() || address.is_loopback() || address.is_multicast())
}

impl View {
    /// IPv6 prefixes that several members have, with these. That takes keys made for it: whoever makes some 2^36 of them finds
    /// one with the prefix of *some* member of thousands.
    pub fn contested_prefixes(&self) -> &BTreeMap<Ipv6Net, BTreeSet<NodeId>> {
        let prefixes = || self.records().map(|(id, record)| (*id, record.ipv6_prefix()));
        self.contested.0.get_or_init(|| contested(prefixes()))
    }
}

fn contested(prefixes: impl Iterator<Item = (NodeId, Ipv6Net)>) -> BTreeMap<Ipv6Net, BTreeSet<NodeId>> {
    let mut sorted: Vec<(Ipv6Net, NodeId)> = prefixes.map(|(id, prefix)| (prefix, id)).collect();
    sorted.sort_unstable();
    let mut contested: BTreeMap<Ipv6Net, BTreeSet<NodeId>> = BTreeMap::new();
    for pair in sorted.windows(2) {
        if let [(prefix, one), (same, other)] = pair
            && prefix == same
        {
            contested.entry(*prefix).or_default().extend([*one, *other]);
        }
    }
    contested
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_that_several_nodes_have_are_found() {
        let id = |n| NodeId::from_bytes([n; 16]);
        let net = |n: u8| format!("fd00:0:0:{n:x}::/96").parse::<Ipv6Net>().unwrap();
        let prefixes = [(1, 7), (2, 5), (3, 7), (4, 6), (5, 7)].map(|(node, prefix)| (id(node), net(prefix)));
        let found = contested(prefixes.into_iter());
        assert_eq!(found, BTreeMap::from([(net(7), BTreeSet::from([id(1), id(3), id(5)]))]));
    }
}
