//! What a view costs, and what a clone of it costs once it has changed.
//!
//! Memory is what the kernel says this process has: a test of its own program, so that nobody else allocates.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::disallowed_methods,
    reason = "a test fails by panicking, prints its figures, and takes real time and memory"
)]

use std::net::Ipv4Addr;
use std::time::Instant;

use mesh_core::view::{Delta, Grant, LaneInfo, NodeRecord, View};
use mesh_keys::{
    BodyId, Genesis, GenesisFields, Identity, JoinMode, JoinModes, Signed, SignedAdmission, WgSecret,
};
use rand_chacha::ChaCha20Rng;
use rand_core::SeedableRng as _;

/// Bytes of memory that this process has.
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 1024
}

fn identity(n: usize) -> Identity {
    let mut seed = [0x5a; 32];
    seed[..8].copy_from_slice(&n.to_be_bytes());
    Identity::from_bytes(&seed)
}

fn record(genesis: &Genesis, n: usize, version: u64) -> Signed<NodeRecord> {
    let identity = identity(n);
    let lane = |index: u8| LaneInfo {
        index,
        key: WgSecret::from_bytes(&[(n as u8 & 0x3f) + index + 1; 32]).public(),
        port: 6784 + u16::from(index),
    };
    let record = NodeRecord {
        cluster: genesis.id(),
        node: identity.public(),
        generation: 1,
        version,
        name: format!("node-{n}.example.org"),
        software: "0.1.0".into(),
        salt: 0,
        mesh_ipv4: None,
        control_port: 6783,
        endpoints: vec![Ipv4Addr::new(192, 0, (n >> 8) as u8, n as u8).into()],
        lanes: vec![lane(0), lane(1)],
        start: 0,
        contested: false,
    };
    Signed::sign(&record, &identity).unwrap()
}

/// A cluster of so many members, all let in by the founder, each with a block and a record.
fn cluster(members: usize) -> (Genesis, Delta) {
    let founder = identity(0);
    let mut rng = ChaCha20Rng::seed_from_u64(1);
    let mut fields = GenesisFields::flat("memory", founder.public(), JoinModes::KEY_FILE, &mut rng);
    fields.ipv4_range = "10.0.0.0/8".parse().unwrap();
    let genesis = Genesis::new(fields).unwrap();
    let mut delta = Delta { records: vec![record(&genesis, 0, 1)], ..Delta::default() };
    for n in 1..members {
        let subject = identity(n).public();
        let admission = SignedAdmission::issue(genesis.id(), subject, &founder, JoinMode::KeyFile, n as u64);
        let grant = Grant {
            cluster: genesis.id(),
            parent: BodyId::from_bytes(*genesis.id().as_bytes()),
            network: Ipv4Addr::new(10, (n >> 8) as u8, n as u8, 0),
            prefix: 24,
            from: founder.public(),
            to: subject,
        };
        delta.admissions.push(admission.unwrap());
        delta.grants.push(Signed::sign(&grant, &founder).unwrap());
        delta.records.push(record(&genesis, n, 1));
    }
    (genesis, delta)
}

/// The figures of a view of so many members and of clones of it: bytes per member, bytes per changed clone.
fn figures(members: usize, clones: usize) -> (usize, usize) {
    let (genesis, delta) = cluster(members);
    // Bytes that share nothing with the delta, as they come from a disk.
    let bytes = postcard::to_allocvec(&delta).unwrap();
    let read: Delta = postcard::from_bytes(&bytes).unwrap();
    let changes: Vec<Delta> = (0..clones)
        .map(|clone| record(&genesis, clone * members / clones, 2))
        .map(|record| Delta { records: vec![record], ..Delta::default() })
        .collect();
    let before = resident();
    let started = Instant::now();
    let mut view = View::new(genesis);
    assert_eq!(view.merge(&read).refused, Vec::<String>::new());
    let built = started.elapsed();
    // The bodies are shared with the delta, and counted as long as that is there.
    let bodies: usize = delta.admissions.iter().map(|item| item.body().len()).sum::<usize>()
        + delta.grants.iter().map(|item| item.body().len()).sum::<usize>()
        + delta.records.iter().map(|item| item.body().len()).sum::<usize>();
    let per_member = (resident().saturating_sub(before) + bodies) / members;
    assert_eq!(view.admissions().members().count(), members);

    let mut copies = Vec::with_capacity(clones);
    let before = resident();
    let started = Instant::now();
    for change in &changes {
        let mut copy = view.clone();
        assert_eq!(copy.merge(change).new.len(), 1);
        copies.push(copy);
    }
    let merged = started.elapsed() / u32::try_from(clones).unwrap();
    let per_clone = resident().saturating_sub(before) / clones;
    println!(
        "{members} members: {per_member} bytes each, built in {built:?}; a clone with one record changed: \
         {per_clone} bytes, {merged:?}"
    );
    drop((delta, read, copies));
    (per_member, per_clone)
}

#[test]
fn a_changed_clone_costs_what_has_changed() {
    let (per_member, per_clone) = figures(2_000, 100);
    assert!(per_clone < 16_384, "{per_clone} bytes for one changed record");
    assert!(per_member < 6_000, "{per_member} bytes for one member");
}

#[test]
#[ignore = "figures of a large cluster, for the report"]
fn figures_of_a_large_cluster() {
    figures(5_000, 5_000);
}
