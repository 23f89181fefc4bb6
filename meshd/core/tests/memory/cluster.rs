//! A large cluster.

use std::net::Ipv4Addr;

use mesh_core::view::{Delta, Grant, LaneInfo, NodeRecord};
use mesh_keys::{
    BodyId, Genesis, GenesisFields, Identity, JoinMode, JoinModes, Signed, SignedAdmission, WgSecret,
};
use rand_chacha::ChaCha20Rng;
use rand_core::SeedableRng as _;

/// A member.
pub(crate) fn identity(n: usize) -> Identity {
    let mut seed = [0x5a; 32];
    seed[..8].copy_from_slice(&n.to_be_bytes());
    Identity::from_bytes(&seed)
}

/// What a member says of itself.
pub(crate) fn record(genesis: &Genesis, n: usize, version: u64) -> Signed<NodeRecord> {
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
        leaving: false,
    };
    Signed::sign(&record, &identity).unwrap()
}

/// A cluster of so many members, all let in by the founder, each with a block and a record.
pub(crate) fn cluster(members: usize) -> (Genesis, Delta) {
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
