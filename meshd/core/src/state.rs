//! What a node keeps on disk, and its form.
//!
//! One file each, replaced as a whole. Layout: the line `hauberk-state-1 NAME`, the hexadecimal SHA-256 of the
//! rest, a line feed, then postcard. A file that does not match its hash is refused, never half believed.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use mesh_keys::secret::Secret32;
use mesh_keys::{Genesis, NodeId, Psk, WgPublic};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::api::AttachmentId;
use crate::leases::Lease;
use crate::view::{Delta, View};

/// The files of the state directory that the core writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum StateFile {
    /// The genesis document and the view.
    Cluster,
    /// What the node knows of itself: start counter, mesh address.
    Node,
    /// The leases.
    Leases,
    /// The pre-shared keys. Secret.
    Keys,
}

impl StateFile {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Cluster, Self::Node, Self::Leases, Self::Keys];

    /// Name of the file below the state directory.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cluster => "cluster.state",
            Self::Node => "node.state",
            Self::Leases => "leases.state",
            Self::Keys => "keys.state",
        }
    }
}

/// What was on disk when the node started.
#[derive(Clone, Debug, Default)]
pub struct Stored {
    /// The cluster, once the node is in one.
    pub view: Option<View>,
    /// What the node knows of itself.
    pub node: StoredNode,
    /// The leases.
    pub leases: StoredLeases,
    /// The pre-shared keys.
    pub keys: BTreeMap<NodeId, StoredKey>,
}

/// What a node knows of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredNode {
    /// Counts the starts of this node.
    pub generation: u64,
    /// The node's own IPv4 address.
    pub mesh_ipv4: Option<Ipv4Addr>,
}

/// The leases, and the boot of the host they are from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredLeases {
    /// Identifies the boot of the host: no pod outlives it.
    pub boot: String,
    /// The leases.
    pub leases: Vec<(AttachmentId, Lease)>,
}

/// A pre-shared key agreed with another node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredKey {
    /// The key.
    pub psk: Psk,
    /// Tunnel keys it is for: ours, the peer's.
    pub keys: (WgPublic, WgPublic),
    /// Whether both ends have it installed.
    pub confirmed: bool,
}

/// A state file that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnusableState {
    /// Written by something else, or a newer version.
    #[error(
        "state file {file}: it does not start with {expected:?}; it belongs to another version or program"
    )]
    Header {
        /// Name of the file.
        file: &'static str,
        /// What it should start with.
        expected: String,
    },
    /// The hash does not match.
    #[error("state file {file}: its checksum does not match; the disk or a copy of it is damaged")]
    Checksum {
        /// Name of the file.
        file: &'static str,
    },
    /// The contents make no sense.
    #[error("state file {file}: {problem}")]
    Contents {
        /// Name of the file.
        file: &'static str,
        /// What is wrong.
        problem: String,
    },
}

impl Stored {
    /// Reads the files that exist.
    ///
    /// # Errors
    /// [`UnusableState`] names the file. Nothing is thrown away: the operator decides.
    pub fn decode(files: &BTreeMap<StateFile, Vec<u8>>) -> Result<Self, UnusableState> {
        let mut stored = Self::default();
        for (file, bytes) in files {
            match file {
                StateFile::Cluster => {
                    let (genesis, delta): (Vec<u8>, Delta) = open(*file, bytes)?;
                    let contents = |problem: String| UnusableState::Contents { file: file.name(), problem };
                    let genesis = Genesis::decode(&genesis).map_err(|error| contents(error.to_string()))?;
                    let mut view = View::new(genesis);
                    if let Some(refused) = view.merge(&delta).refused.into_iter().next() {
                        return Err(contents(refused));
                    }
                    stored.view = Some(view);
                }
                StateFile::Node => stored.node = open(*file, bytes)?,
                StateFile::Leases => stored.leases = open(*file, bytes)?,
                StateFile::Keys => {
                    let keys: Vec<DiskKey> = open(*file, bytes)?;
                    stored.keys = keys
                        .into_iter()
                        .map(|key| {
                            let psk = Psk::from_secret(key.psk);
                            (key.node, StoredKey { psk, keys: key.keys, confirmed: key.confirmed })
                        })
                        .collect();
                }
            }
        }
        Ok(stored)
    }
}

#[derive(Serialize, Deserialize)]
struct DiskKey {
    node: NodeId,
    #[serde(with = "mesh_keys::secret::exposed")]
    psk: Secret32,
    keys: (WgPublic, WgPublic),
    confirmed: bool,
}

/// The contents of [`StateFile::Cluster`].
pub fn encode_cluster(view: &View) -> Vec<u8> {
    seal(StateFile::Cluster, &(view.genesis().encode(), view.to_delta()))
}

/// The contents of [`StateFile::Node`].
pub fn encode_node(node: &StoredNode) -> Vec<u8> {
    seal(StateFile::Node, node)
}

/// The contents of [`StateFile::Leases`].
pub fn encode_leases(boot: &str, leases: &BTreeMap<AttachmentId, Lease>) -> Vec<u8> {
    let leases = leases.iter().map(|(id, lease)| (id.clone(), lease.clone())).collect();
    seal(StateFile::Leases, &StoredLeases { boot: boot.to_owned(), leases })
}

/// The contents of [`StateFile::Keys`].
pub fn encode_keys(keys: &BTreeMap<NodeId, StoredKey>) -> Vec<u8> {
    let keys: Vec<DiskKey> = keys
        .iter()
        .map(|(node, key)| DiskKey {
            node: *node,
            psk: Secret32::from_bytes(*key.psk.expose()),
            keys: key.keys,
            confirmed: key.confirmed,
        })
        .collect();
    seal(StateFile::Keys, &keys)
}

fn header(file: StateFile) -> String {
    format!("hauberk-state-1 {}\n", file.name())
}

fn seal(file: StateFile, contents: &impl Serialize) -> Vec<u8> {
    // Fails only for types that postcard cannot express; every type here is stored by a test.
    let contents = postcard::to_allocvec(contents).unwrap_or_default();
    let mut bytes = header(file).into_bytes();
    bytes.extend_from_slice(hex::encode(Sha256::digest(&contents)).as_bytes());
    bytes.push(b'\n');
    bytes.extend_from_slice(&contents);
    bytes
}

fn open<T: DeserializeOwned>(file: StateFile, bytes: &[u8]) -> Result<T, UnusableState> {
    let expected = header(file);
    let rest = bytes.strip_prefix(expected.as_bytes()).ok_or_else(|| UnusableState::Header {
        file: file.name(),
        expected: expected.trim_end().to_owned(),
    })?;
    let damaged = || UnusableState::Checksum { file: file.name() };
    let (hash, contents) = rest.split_at_checked(65).ok_or_else(damaged)?;
    if hash.strip_suffix(b"\n") != Some(hex::encode(Sha256::digest(contents)).as_bytes()) {
        return Err(damaged());
    }
    postcard::from_bytes(contents)
        .map_err(|error| UnusableState::Contents { file: file.name(), problem: error.to_string() })
}
