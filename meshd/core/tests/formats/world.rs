//! A cluster with something of everything in it.

use std::sync::LazyLock;

use mesh_core::ranges::RangeSet;
use mesh_core::view::{Delta, Grant, LaneInfo, NodeRecord, View};
use mesh_keys::{
    Genesis, GenesisFields, Identity, JoinMode, JoinModes, JoinWindow, NodeId, Signed, SignedAdmission,
    SignedJoinPolicy, SignedRevocation, Token, TokenId, Tries, WgPublic,
};
use rand_chacha::ChaCha20Rng;
use rand_core::SeedableRng as _;

/// Node 1 has founded it and let in 2, 3 and 4. Node 3 had addresses, gave some to 2, and was removed; 1 has taken over
/// what was left.
pub(crate) static WORLD: LazyLock<View> = LazyLock::new(world);

pub(crate) fn identity(byte: u8) -> Identity {
    Identity::from_bytes(&[byte; 32])
}

pub(crate) fn node(byte: u8) -> NodeId {
    identity(byte).node_id()
}

pub(crate) fn genesis() -> Genesis {
    let founder = identity(1).public();
    let fields =
        GenesisFields::flat("golden", founder, JoinModes::BOTH, &mut ChaCha20Rng::from_seed([7; 32]));
    Genesis::new(fields).unwrap()
}

pub(crate) fn record(byte: u8) -> NodeRecord {
    NodeRecord {
        cluster: genesis().id(),
        node: identity(byte).public(),
        generation: 300 + u64::from(byte),
        version: 400,
        name: format!("node-{byte}"),
        software: "0.1.0".to_owned(),
        salt: 0,
        mesh_ipv4: Some([10, 32, 0, byte].into()),
        control_port: 6783,
        endpoints: vec![[192, 0, 2, byte].into(), [0x2001, 0xdb8, 0, 0, 0, 0, 0, byte.into()].into()],
        lanes: vec![
            LaneInfo { index: 0, key: WgPublic::from_bytes([0x20 + byte; 32]), port: 6784 },
            LaneInfo { index: 1, key: WgPublic::from_bytes([0x30 + byte; 32]), port: 6785 },
        ],
        start: 0x0123_4567_89ab_cdef,
        contested: true,
        leaving: false,
    }
}

fn world() -> View {
    let mut view = View::new(genesis());
    let cluster = view.cluster();
    let one = identity(1);
    let id = TokenId::from_bytes([1, 2, 3, 4]);
    let mut add = |make: &dyn Fn(&View) -> Delta| {
        let delta = make(&view);
        assert!(!delta.is_empty());
        assert_eq!(view.merge(&delta).refused, Vec::<String>::new());
    };
    for (byte, mode) in [(2, JoinMode::KeyFile), (3, JoinMode::Password), (4, JoinMode::Token(id))] {
        let admission =
            SignedAdmission::issue(cluster, identity(byte).public(), &one, mode, u64::from(byte)).unwrap();
        add(&|_| Delta { admissions: vec![admission.clone()], ..Delta::default() });
    }
    for byte in [1, 2, 4] {
        let record = Signed::sign(&record(byte), &identity(byte)).unwrap();
        add(&|_| Delta { records: vec![record.clone()], ..Delta::default() });
    }
    for (from, to) in [(1, 2), (1, 3), (3, 2)] {
        let grant = |view: &View| -> Signed<Grant> {
            let blocks = if from == 1 { 4 } else { 1 };
            view.grants().grant(&identity(from), identity(to).public(), blocks, &RangeSet::new()).unwrap()
        };
        add(&|view| Delta { grants: vec![grant(view)], ..Delta::default() });
    }
    add(&|view| Delta { removals: vec![view.removal(&node(3), &one).unwrap()], ..Delta::default() });
    for byte in [1, 2, 4] {
        add(&|view| Delta { promises: vec![view.promise(&identity(byte)).unwrap()], ..Delta::default() });
    }
    add(&|view| Delta { reclaims: view.reclaim(&one), ..Delta::default() });
    let tries = Tries { cluster, node: identity(2).public(), window: 28_333_333, count: 5, total: 6 };
    let token = Token {
        cluster,
        id,
        hash: mesh_keys::token::TokenHash::from_bytes([0x40; 32]),
        expires: 1_700_000_000,
        uses: 300,
        signer: one.public(),
    };
    let revoked = SignedRevocation::issue(cluster, TokenId::from_bytes([5, 6, 7, 8]), &one).unwrap();
    let policy = SignedJoinPolicy::issue(cluster, 9, JoinWindow::Until(1_700_000_001), &identity(2)).unwrap();
    add(&|_| Delta {
        tries: vec![Signed::sign(&tries, &identity(2)).unwrap()],
        tokens: vec![Signed::sign(&token, &one).unwrap()],
        revocations: vec![revoked.clone()],
        policies: vec![policy.clone()],
        ..Delta::default()
    });
    complete(&view.to_delta());
    view
}

/// A list that is added does not compile before something of it is here.
fn complete(delta: &Delta) {
    let Delta {
        admissions,
        grants,
        records,
        removals,
        reclaims,
        promises,
        tries,
        tokens,
        revocations,
        policies,
    } = delta;
    let lengths = [
        admissions.len(),
        grants.len(),
        records.len(),
        removals.len(),
        reclaims.len(),
        promises.len(),
        tries.len(),
        tokens.len(),
        revocations.len(),
        policies.len(),
    ];
    assert!(lengths.iter().all(|length| *length > 0), "{lengths:?}");
    let promised = promises.iter().map(|signed| signed.decode().unwrap());
    assert!(promised.flat_map(|promises| promises.entries).any(|entry| !entry.kept.is_empty()));
    assert!(reclaims.iter().any(|signed| !signed.decode().unwrap().kept.is_empty()));
}
