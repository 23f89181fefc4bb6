//! The files of the state directory.

use std::collections::BTreeMap;

use mesh_core::api::{AttachmentId, AttachmentState, NetnsId, PodIdentity};
use mesh_core::leases::Lease;
use mesh_core::state::{
    StateFile, Stored, StoredGroup, StoredKey, StoredLeases, StoredNode, Writes, encode_changes,
    encode_cluster, encode_group, encode_keys, encode_leases, encode_node,
};
use mesh_core::view::View;
use mesh_keys::frame::GroupKey;
use mesh_keys::{Psk, Secret32, WgPublic};

use crate::golden_set::Entry;
use crate::say;
use crate::world::{WORLD, node};

/// What the daemon writes for a file that it has read.
fn encode(file: StateFile, stored: Stored) -> Result<Vec<u8>, String> {
    Ok(match file {
        StateFile::Cluster => encode_cluster(&stored.view.ok_or("no view")?),
        StateFile::Node => encode_node(&stored.node),
        StateFile::Leases => encode_leases(&stored.leases),
        StateFile::Keys => encode_keys(&stored.keys),
        StateFile::Group => encode_group(stored.group),
        StateFile::Changes => {
            let view = stored.view.ok_or("no view")?;
            encode_changes(view.cluster(), &view.news(usize::MAX).ok_or("not all is kept in mind")?)
        }
    })
}

fn entry(name: &str, what: &str, file: StateFile, written: Vec<u8>) -> Entry {
    Entry::bytes(name, what, written, move |bytes| {
        encode(file, Stored::decode(&files(file, bytes)).map_err(say)?)
    })
}

/// A state directory with that file, and what it takes to read that.
pub(crate) fn files(file: StateFile, bytes: &[u8]) -> BTreeMap<StateFile, Vec<u8>> {
    // The changes are those since there was the founder only.
    let cluster = encode_cluster(&View::new(WORLD.genesis().clone()));
    let cluster = (file == StateFile::Changes).then_some((StateFile::Cluster, cluster));
    cluster.into_iter().chain([(file, bytes.to_vec())]).collect()
}

fn stored() -> Stored {
    let key = |mine, theirs, byte, confirmed| StoredKey {
        psk: Psk::from_secret(Secret32::from_bytes([byte; 32])),
        keys: (WgPublic::from_bytes([mine; 32]), WgPublic::from_bytes([theirs; 32])),
        confirmed,
    };
    let group = |epoch, byte| (epoch, GroupKey::from_secret(Secret32::from_bytes([byte; 32])));
    let leases = leases();
    Stored {
        view: Some(WORLD.clone()),
        writes: Writes::default(),
        node: StoredNode { generation: 300, mesh_ipv4: Some([10, 32, 0, 1].into()), leaving: false },
        keys: BTreeMap::from([
            (node(2), vec![key(0x51, 0x52, 0x53, true)]),
            (node(4), vec![key(0x54, 0x55, 0x56, false)]),
        ]),
        group: StoredGroup { keys: vec![group(0, 0x57), group(300, 0x58)] },
        leases: StoredLeases {
            boot: "6f5d1f2e-boot".to_owned(),
            resting: vec![([10, 32, 0, 9].into(), 60), ([10, 32, 1, 9].into(), 59)],
            namespaces: vec![(leases[0].0.clone(), NetnsId { dev: 4, ino: 4_026_532_000 })],
            leases,
        },
    }
}

fn leases() -> Vec<(AttachmentId, Lease)> {
    let lease = |last, state, pod| Lease {
        ipv4: [10, 32, 0, last].into(),
        state,
        netns: format!("/run/netns/{last}"),
        network: "mesh".to_owned(),
        pod,
        netns_id: None,
    };
    let text = str::to_owned;
    let pod = PodIdentity { namespace: text("ns"), name: text("web"), uid: text("u") };
    vec![
        (AttachmentId::new("a", "eth0").unwrap(), lease(2, AttachmentState::Active, Some(pod))),
        (AttachmentId::new("b", "net1").unwrap(), lease(3, AttachmentState::Leased, None)),
    ]
}

pub(crate) fn entries() -> Vec<Entry> {
    entries_of(&StateFile::ALL)
}

fn entries_of(files: &[StateFile]) -> Vec<Entry> {
    let mut entries: Vec<Entry> = files
        .iter()
        .map(|file| {
            let name = file.name().strip_suffix(".state").unwrap();
            entry(name, file.name(), *file, encode(*file, stored()).unwrap())
        })
        .collect();
    let fresh = encode_node(&StoredNode { generation: 1, mesh_ipv4: None, leaving: false });
    entries.push(entry("node-without-address", "node.state", StateFile::Node, fresh));
    entries
}

/// Before changes lay beside the cluster.
pub(crate) fn without_changes() -> Vec<Entry> {
    entries_of(&StateFile::ALL[..5])
}

/// Before addresses rested, and namespaces were told apart.
pub(crate) fn first_leases() -> Vec<Entry> {
    let leases = StoredLeases { boot: "b".to_owned(), leases: leases(), ..StoredLeases::default() };
    vec![entry("leases", "leases.state", StateFile::Leases, encode_leases(&leases))]
}
