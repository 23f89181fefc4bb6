//! What a node keeps on disk, and its form.
//!
//! One file each, replaced as a whole. Layout: the line `hauberk-state-VERSION NAME`, the hexadecimal SHA-256 of the
//! rest, a line feed, then postcard, then 16 bytes with the number of the write ([`Writes`]). A file that does not match
//! its hash is refused, never half believed.
//!
//! The view of a large cluster has megabytes. It is written as a whole now and then ([`StateFile::Cluster`]), and in between
//! what was merged since ([`StateFile::Changes`]). Changes that are older than the view are all in it, or have given way since.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use mesh_keys::frame::GroupKey;
use mesh_keys::secret::Secret32;
use mesh_keys::{ClusterId, Genesis, NodeId, Psk, WgPublic};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::api::{AttachmentId, NetnsId};
use crate::leases::Lease;
use crate::message::GroupKeyShare;
use crate::node::StartMark;
use crate::said;
use crate::view::{Delta, View};
use crate::wiped;

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
    /// The keys of the group. Secret.
    Group,
    /// What was merged with the view since that was written as a whole.
    Changes,
}

impl StateFile {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::Cluster, Self::Node, Self::Leases, Self::Keys, Self::Group, Self::Changes];

    /// Name of the file below the state directory.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cluster => "cluster.state",
            Self::Node => "node.state",
            Self::Leases => "leases.state",
            Self::Keys => "keys.state",
            Self::Group => "group.state",
            Self::Changes => "changes.state",
        }
    }
}

/// The number of the newest write of each state file. A node counts its writes, of all files together. A disk with a lower
/// number than one that was durable before is an older state of itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Writes {
    /// In the order of [`StateFile::ALL`]; 0 for a file that was never written.
    pub numbers: [u64; StateFile::ALL.len()],
}

impl Writes {
    /// The number of the last write of all.
    pub fn last(&self) -> u64 {
        self.numbers.into_iter().max().unwrap_or(0)
    }

    /// The number of the last write of a file; 0 if there was none.
    pub fn of(&self, file: StateFile) -> u64 {
        self.numbers.get(file as usize).copied().unwrap_or(0)
    }

    /// Whether one of these writes was of the view, or of what is news of it.
    pub fn has_view(&self) -> bool {
        self.of(StateFile::Cluster).max(self.of(StateFile::Changes)) > 0
    }

    /// A file was written.
    pub fn note(&mut self, file: StateFile, number: u64) {
        if let Some(known) = self.numbers.get_mut(file as usize) {
            *known = number.max(*known);
        }
    }

    /// Takes the newer write of each file.
    pub fn join(&mut self, other: &Self) {
        self.numbers.iter_mut().zip(other.numbers).for_each(|(known, other)| *known = other.max(*known));
    }

    /// Whether some file is older than it was.
    pub fn is_older_than(&self, before: &Self) -> bool {
        self.numbers.iter().zip(before.numbers).any(|(now, before)| *now < before)
    }
}

/// What was on disk when the node started.
#[derive(Clone, Debug, Default)]
pub struct Stored {
    /// Which writes the files are from.
    pub writes: Writes,
    /// The cluster, once the node is in one.
    pub view: Option<View>,
    /// What the node knows of itself.
    pub node: StoredNode,
    /// The leases.
    pub leases: StoredLeases,
    /// The pre-shared keys.
    pub keys: BTreeMap<NodeId, Vec<StoredKey>>,
    /// The keys of the group.
    pub group: StoredGroup,
}

/// The keys that all members share, each with its epoch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StoredGroup {
    /// The keys.
    pub keys: Vec<(u64, GroupKey)>,
}

impl From<Vec<GroupKeyShare>> for StoredGroup {
    fn from(keys: Vec<GroupKeyShare>) -> Self {
        let keys = keys.into_iter().map(|key| (key.epoch, GroupKey::from_secret(key.secret)));
        Self { keys: keys.collect() }
    }
}

impl From<StoredGroup> for Vec<GroupKeyShare> {
    fn from(group: StoredGroup) -> Self {
        let keys = group.keys.into_iter();
        keys.map(|(epoch, key)| GroupKeyShare { epoch, secret: key.secret().clone() }).collect()
    }
}

/// What a node knows of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredNode {
    /// Counts the starts of this node.
    pub generation: u64,
    /// The node's own IPv4 address.
    pub mesh_ipv4: Option<Ipv4Addr>,
    /// Whether the operator has decided that it leaves the cluster. Written only if it is so.
    #[serde(default, skip_serializing_if = "said::is_false", deserialize_with = "said::or_false")]
    pub leaving: bool,
}

/// The leases, and the boot of the host they are from.
///
/// On disk, what later versions added comes after what earlier ones wrote: an earlier version reads as far as it
/// knows, and a later one takes what is absent for empty.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct StoredLeases {
    /// Identifies the boot of the host: no pod outlives it.
    pub boot: String,
    /// The leases.
    pub leases: Vec<(AttachmentId, Lease)>,
    /// Released addresses, and for how many seconds each has still to rest.
    pub resting: Vec<(Ipv4Addr, u32)>,
    /// Identities of the attachments' network namespaces, as far as they are known.
    pub namespaces: Vec<(AttachmentId, NetnsId)>,
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
            stored.writes.note(*file, number_of(contents(*file, bytes)?).1);
            match file {
                StateFile::Cluster => {
                    let (genesis, delta) = open_cluster(bytes)?;
                    let unusable = |problem: String| UnusableState::Contents { file: file.name(), problem };
                    let genesis = Genesis::decode(&genesis).map_err(|error| unusable(error.to_string()))?;
                    let mut view = View::new(genesis);
                    if let Some(refused) = view.merge(&delta).refused.into_iter().next() {
                        return Err(unusable(refused));
                    }
                    view.drop_news(view.merged_so_far());
                    stored.view = Some(view);
                }
                // Comes after the file of the cluster.
                StateFile::Changes => {
                    let unusable = |problem: String| UnusableState::Contents { file: file.name(), problem };
                    let missing = || unusable(format!("{} is gone; restore it", StateFile::Cluster.name()));
                    let view = stored.view.as_mut().ok_or_else(missing)?;
                    let (cluster, delta): (ClusterId, Delta) = open(*file, bytes)?;
                    if cluster != view.cluster() {
                        return Err(unusable("it is of another cluster".to_owned()));
                    }
                    // What has given way since would be refused.
                    if stored.writes.of(*file) < stored.writes.of(StateFile::Cluster) {
                        continue;
                    }
                    if let Some(refused) = view.merge(&delta).refused.into_iter().next() {
                        return Err(unusable(refused));
                    }
                }
                StateFile::Node => stored.node = open(*file, bytes)?,
                StateFile::Group => stored.group = open::<Vec<GroupKeyShare>>(*file, bytes)?.into(),
                StateFile::Leases => stored.leases = open_leases(bytes)?,
                StateFile::Keys => {
                    let keys: Vec<DiskKey> = open(*file, bytes)?;
                    for key in keys {
                        let psk = Psk::from_secret(key.psk);
                        let stored = stored.keys.entry(key.node).or_default();
                        stored.push(StoredKey { psk, keys: key.keys, confirmed: key.confirmed });
                    }
                }
            }
        }
        Ok(stored)
    }

    /// Counts the start of `node` that reads this. Returns the file that has to be durable before the node starts.
    ///
    /// `before` is what the host remembers: it may have spoken up with a generation that found no room on the disk.
    pub fn count_start(&mut self, node: &NodeId, before: Option<&StartMark>) -> (StateFile, Vec<u8>) {
        let goes_on = |before: &&StartMark| {
            before.node == *node && before.superseded.is_none() && !self.writes.is_older_than(&before.writes)
        };
        let said = before.filter(goes_on).map_or(0, |before| before.generation);
        self.node.generation = self.node.generation.max(said) + 1;
        let number = self.writes.last() + 1;
        self.writes.note(StateFile::Node, number);
        (StateFile::Node, numbered(StateFile::Node, &encode_node(&self.node), number))
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

/// The contents of [`StateFile::Changes`]: what is [news](View::news).
pub fn encode_changes(cluster: ClusterId, news: &Delta) -> Vec<u8> {
    seal(StateFile::Changes, &(cluster, news))
}

/// The contents of [`StateFile::Node`].
pub fn encode_node(node: &StoredNode) -> Vec<u8> {
    seal(StateFile::Node, node)
}

/// The contents of [`StateFile::Leases`].
pub fn encode_leases(leases: &StoredLeases) -> Vec<u8> {
    seal(StateFile::Leases, leases)
}

/// The contents of [`StateFile::Keys`].
pub fn encode_keys(keys: &BTreeMap<NodeId, Vec<StoredKey>>) -> Vec<u8> {
    let keys: Vec<DiskKey> = keys
        .iter()
        .flat_map(|(node, keys)| keys.iter().map(move |key| (node, key)))
        .map(|(node, key)| DiskKey {
            node: *node,
            psk: Secret32::from_bytes(*key.psk.expose()),
            keys: key.keys,
            confirmed: key.confirmed,
        })
        .collect();
    seal(StateFile::Keys, &keys)
}

/// The contents of [`StateFile::Group`].
pub fn encode_group(group: StoredGroup) -> Vec<u8> {
    seal(StateFile::Group, &Vec::<GroupKeyShare>::from(group))
}

fn header(file: StateFile) -> String {
    // The first version does not know that changes may lie beside it: it must not read it.
    let version = if file == StateFile::Cluster { 2 } else { 1 };
    format!("hauberk-state-{version} {}\n", file.name())
}

/// The header of the file of the cluster before there were changes beside it.
const FIRST_CLUSTER: &[u8] = b"hauberk-state-1 cluster.state\n";

fn seal(file: StateFile, contents: &impl Serialize) -> Vec<u8> {
    // Fails only for types that postcard cannot express; every type here is stored by a test.
    assemble(file, &[wiped::encode(contents).as_slice()])
}

fn assemble(file: StateFile, contents: &[&[u8]]) -> Vec<u8> {
    let mut hash = Sha256::new();
    contents.iter().for_each(|part| hash.update(part));
    let header = header(file);
    let mut bytes =
        Vec::with_capacity(header.len() + 65 + contents.iter().map(|part| part.len()).sum::<usize>());
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend_from_slice(hex::encode(hash.finalize()).as_bytes());
    bytes.push(b'\n');
    contents.iter().for_each(|part| bytes.extend_from_slice(part));
    bytes
}

/// What is before the number of the write at the end of a file. What earlier versions wrote has none, and earlier
/// versions read no further than they know.
const NUMBER: &[u8; 8] = b"\nwrite: ";

/// The same file with the number of this write of it.
pub fn numbered(file: StateFile, bytes: &[u8], number: u64) -> Vec<u8> {
    let contents = bytes.get(header(file).len() + 65..).unwrap_or_default();
    assemble(file, &[contents, NUMBER, &number.to_le_bytes()])
}

/// The number of the write that a file is from; 0 for a file without. Whether the file is whole is not looked at.
pub fn write_of(bytes: &[u8]) -> u64 {
    number_of(bytes).1
}

/// What is before the number of the write, and that; 0 for a file without.
fn number_of(contents: &[u8]) -> (&[u8], u64) {
    contents
        .split_last_chunk::<8>()
        .and_then(|(rest, number)| Some((rest.strip_suffix(NUMBER)?, u64::from_le_bytes(*number))))
        .unwrap_or((contents, 0))
}

fn open<T: DeserializeOwned>(file: StateFile, bytes: &[u8]) -> Result<T, UnusableState> {
    Ok(take(file, number_of(contents(file, bytes)?).0)?.0)
}

/// Lists that later versions added stand at the end of a view: what an earlier version wrote is read as if they
/// were there and empty, each a zero byte. The checksum has shown that nothing is cut off.
fn open_cluster(bytes: &[u8]) -> Result<(Vec<u8>, Delta), UnusableState> {
    let file = StateFile::Cluster;
    let filled = [number_of(contents(file, bytes)?).0, &[0; ADDED_LISTS]].concat();
    Ok(take(file, &filled)?.0)
}

/// Lists of a [`Delta`] that the first version with removals did not write.
const ADDED_LISTS: usize = 4;

fn open_leases(bytes: &[u8]) -> Result<StoredLeases, UnusableState> {
    let file = StateFile::Leases;
    let ((boot, leases), added) = take(file, number_of(contents(file, bytes)?).0)?;
    // The checksum has shown that nothing is cut off: what is not there was never written.
    let (resting, namespaces) = if added.is_empty() { Default::default() } else { take(file, added)?.0 };
    Ok(StoredLeases { boot, leases, resting, namespaces })
}

/// What is behind header and checksum.
fn contents(file: StateFile, bytes: &[u8]) -> Result<&[u8], UnusableState> {
    let expected = header(file);
    let first = || (file == StateFile::Cluster).then(|| bytes.strip_prefix(FIRST_CLUSTER)).flatten();
    let rest = bytes.strip_prefix(expected.as_bytes()).or_else(first).ok_or_else(|| {
        UnusableState::Header { file: file.name(), expected: expected.trim_end().to_owned() }
    })?;
    let damaged = || UnusableState::Checksum { file: file.name() };
    let (hash, contents) = rest.split_at_checked(65).ok_or_else(damaged)?;
    if hash.strip_suffix(b"\n") != Some(hex::encode(Sha256::digest(contents)).as_bytes()) {
        return Err(damaged());
    }
    Ok(contents)
}

/// Reads a value and returns what comes after it.
fn take<T: DeserializeOwned>(file: StateFile, contents: &[u8]) -> Result<(T, &[u8]), UnusableState> {
    postcard::take_from_bytes(contents)
        .map_err(|error| UnusableState::Contents { file: file.name(), problem: error.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::{AttachmentState, PodIdentity};

    /// What the first version wrote: a pod and a bare container, leased in boot `b`.
    const FIRST_VERSION: &str = concat!(
        "6861756265726b2d73746174652d31206c65617365732e73746174650a643063636464373532316561356237",
        "6139326462306635613633303532356330316134336538633031303466396132646365656661316231616139",
        "30313532610a016202016104657468300a200002010c2f72756e2f6e65746e732f32046d65736801026e7303",
        "77656201750162046e6574310a200003000c2f72756e2f6e65746e732f33046d65736800",
    );

    fn decode(bytes: Vec<u8>) -> Result<StoredLeases, UnusableState> {
        Ok(Stored::decode(&BTreeMap::from([(StateFile::Leases, bytes)]))?.leases)
    }

    fn leases() -> Vec<(AttachmentId, Lease)> {
        let lease = |last, state, pod| Lease {
            ipv4: Ipv4Addr::new(10, 32, 0, last),
            state,
            netns: format!("/run/netns/{last}"),
            network: "mesh".into(),
            pod,
            netns_id: None,
        };
        let pod = PodIdentity { namespace: "ns".into(), name: "web".into(), uid: "u".into() };
        vec![
            (AttachmentId::new("a", "eth0").unwrap(), lease(2, AttachmentState::Active, Some(pod))),
            (AttachmentId::new("b", "net1").unwrap(), lease(3, AttachmentState::Leased, None)),
        ]
    }

    #[test]
    fn leases_of_the_first_version_are_read() {
        let expected = StoredLeases { boot: "b".into(), leases: leases(), ..StoredLeases::default() };
        assert_eq!(decode(hex::decode(FIRST_VERSION).unwrap()), Ok(expected));
    }

    #[test]
    fn the_first_version_reads_todays_leases_as_far_as_it_knows() {
        let bytes = numbered(StateFile::Leases, &encode_leases(&today()), 300);
        // As the first version read: two fields, whatever follows.
        let (boot, read): (String, Vec<(AttachmentId, Lease)>) = open(StateFile::Leases, &bytes).unwrap();
        assert_eq!((boot, read), ("b".into(), leases()));
    }

    #[test]
    fn what_is_written_is_read_back_and_damage_is_refused() {
        let bytes = encode_leases(&today());
        assert_eq!(decode(bytes.clone()), Ok(today()));
        let bytes = numbered(StateFile::Leases, &bytes, 300);
        assert_eq!(decode(bytes.clone()), Ok(today()));
        for cut in 1..bytes.len() {
            let error = decode(bytes[..cut].to_vec()).unwrap_err().to_string();
            assert!(error.contains("leases.state"), "{error}");
        }
    }

    #[test]
    fn a_view_that_an_earlier_version_wrote_is_read() {
        let founder = mesh_keys::Identity::from_bytes(&[1; 32]).public();
        let mut rng = <rand_chacha::ChaCha20Rng as rand_core::SeedableRng>::seed_from_u64(1);
        let fields = mesh_keys::GenesisFields::flat("old", founder, mesh_keys::JoinModes::KEY_FILE, &mut rng);
        let view = View::new(Genesis::new(fields).unwrap());
        let contents = postcard::to_allocvec(&(view.genesis().encode(), view.to_delta())).unwrap();
        let earlier = &contents[..contents.len() - ADDED_LISTS];
        let mut bytes = FIRST_CLUSTER.to_vec();
        bytes.extend_from_slice(format!("{}\n", hex::encode(Sha256::digest(earlier))).as_bytes());
        bytes.extend_from_slice(earlier);
        let files = |bytes| BTreeMap::from([(StateFile::Cluster, bytes)]);
        assert_eq!(Stored::decode(&files(bytes)).unwrap().view, Some(view.clone()));
        let today = encode_cluster(&view);
        assert_eq!(Stored::decode(&files(today.clone())).unwrap().view, Some(view.clone()));
        let numbered = numbered(StateFile::Cluster, &today, 7);
        assert_eq!(Stored::decode(&files(numbered)).unwrap().view, Some(view));
    }

    #[test]
    fn changes_that_are_older_than_the_view_are_passed_over() {
        let identity = mesh_keys::Identity::from_bytes(&[1; 32]);
        let founder = identity.public();
        let mut rng = <rand_chacha::ChaCha20Rng as rand_core::SeedableRng>::seed_from_u64(1);
        let fields = mesh_keys::GenesisFields::flat("old", founder, mesh_keys::JoinModes::KEY_FILE, &mut rng);
        let view = View::new(Genesis::new(fields).unwrap());
        let cluster = view.cluster();
        // As one that has given way to another since.
        let refused = crate::view::Grant {
            cluster,
            parent: mesh_keys::BodyId::from_bytes([9; 32]),
            network: Ipv4Addr::new(10, 32, 0, 0),
            prefix: 24,
            from: founder,
            to: mesh_keys::Identity::from_bytes(&[2; 32]).public(),
        };
        let grant = mesh_keys::Signed::sign(&refused, &identity).unwrap();
        let news = Delta { grants: vec![grant], ..Delta::default() };
        let read = |view_from, changes_from| {
            Stored::decode(&BTreeMap::from([
                (StateFile::Cluster, numbered(StateFile::Cluster, &encode_cluster(&view), view_from)),
                (
                    StateFile::Changes,
                    numbered(StateFile::Changes, &encode_changes(cluster, &news), changes_from),
                ),
            ]))
        };
        let stored = read(8, 7).unwrap();
        assert_eq!((stored.view.as_ref(), stored.writes.of(StateFile::Changes)), (Some(&view), 7));
        assert!(read(7, 8).unwrap_err().to_string().contains("changes.state"));
    }

    #[test]
    fn each_file_says_which_write_it_is_from() {
        let file = |number| numbered(StateFile::Leases, &encode_leases(&today()), number);
        let disk = |bytes: Vec<u8>| BTreeMap::from([(StateFile::Leases, bytes)]);
        let writes = |bytes| Stored::decode(&disk(bytes)).unwrap().writes;
        assert_eq!(writes(encode_leases(&today())), Writes::default(), "as earlier versions wrote it");
        let (old, new) = (writes(file(299)), writes(file(300)));
        assert_eq!((old.last(), new.last()), (299, 300));
        assert!(old.is_older_than(&new) && !new.is_older_than(&old) && !new.is_older_than(&new));

        let mut stored = Stored::decode(&disk(file(300))).unwrap();
        let (name, bytes) = stored.count_start(&NodeId::from_bytes([1; 16]), None);
        let mut files = disk(file(300));
        files.insert(name, bytes);
        let again = Stored::decode(&files).unwrap();
        assert_eq!((again.node.generation, again.writes), (1, stored.writes));
        assert_eq!(again.writes.last(), 301);
        // One file alone that is put back shows as well.
        files.insert(StateFile::Leases, file(12));
        assert!(Stored::decode(&files).unwrap().writes.is_older_than(&again.writes));
    }

    fn today() -> StoredLeases {
        StoredLeases {
            boot: "b".into(),
            leases: leases(),
            resting: vec![(Ipv4Addr::new(10, 32, 0, 9), 60)],
            namespaces: vec![(leases()[0].0.clone(), NetnsId { dev: 4, ino: 4_026_532_000 })],
        }
    }
}
