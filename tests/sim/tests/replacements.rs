//! Thousands of nodes come and go in a cluster of four, as autoscaling makes them: nothing is used up.
//!
//! All members share one view here: how it gets from one to the other is tested elsewhere.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::print_stdout,
    reason = "a test fails by panicking, and prints its figures"
)]

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use mesh_core::ranges::RangeSet;
use mesh_core::state::{StateFile, Stored, StoredNode, encode_cluster, encode_node};
use mesh_core::view::{Delta, LaneInfo, NodeRecord, View};
use mesh_keys::{
    Genesis, GenesisFields, Identity, JoinMode, JoinModes, Signed, SignedAdmission, SignedRemoval, WgSecret,
    memo,
};
use rand_chacha::ChaCha20Rng;
use rand_core::{RngCore as _, SeedableRng as _};

/// Members at a time.
const MEMBERS: usize = 4;

/// The first of them, in which also those are replaced that others have handed their addresses to.
const MIXED: usize = 200;

/// 32 blocks: all of them change hands hundreds of times.
const RANGE: &str = "10.9.0.0/22";
const BLOCK: u8 = 27;

struct Cluster {
    view: View,
    members: Vec<Identity>,
    admin: Option<Identity>,
    rng: ChaCha20Rng,
    serials: u64,
}

impl Cluster {
    fn new(anchored: bool) -> Self {
        let mut rng = ChaCha20Rng::seed_from_u64(20_000);
        let founder = Identity::generate(&mut rng);
        let admin = anchored.then(|| Identity::generate(&mut rng));
        let mut fields = GenesisFields::flat("scaled", founder.public(), JoinModes::KEY_FILE, &mut rng);
        fields.admin_keys = admin.iter().map(Identity::public).collect();
        fields.ipv4_range = RANGE.parse().unwrap();
        fields.block_prefix = BLOCK;
        let view = View::new(Genesis::new(fields).unwrap());
        let mut cluster = Self { view, members: vec![founder], admin, rng, serials: 0 };
        cluster.say_record(0);
        while cluster.members.len() < MEMBERS {
            cluster.join();
        }
        cluster
    }

    fn merge(&mut self, delta: &Delta) {
        let merged = self.view.merge(delta);
        assert_eq!(merged.refused, Vec::<String>::new());
    }

    fn say_record(&mut self, member: usize) {
        let identity = &self.members[member];
        let owned = self.view.usable(&identity.public());
        let record = NodeRecord {
            cluster: self.view.cluster(),
            node: identity.public(),
            generation: 1,
            version: 1,
            name: "scaled".to_owned(),
            software: "test".to_owned(),
            salt: 0,
            mesh_ipv4: owned.addresses_from(Ipv4Addr::UNSPECIFIED).nth(1),
            control_port: 6783,
            endpoints: vec![Ipv4Addr::new(192, 0, 2, 1 + (self.rng.next_u32() % 200) as u8).into()],
            lanes: vec![LaneInfo { index: 0, key: WgSecret::generate(&mut self.rng).public(), port: 6784 }],
            start: 0,
            contested: false,
            leaving: false,
        };
        let record = Signed::sign(&record, &self.members[member]).unwrap();
        self.merge(&Delta { records: vec![record], ..Delta::default() });
    }

    /// A new node is let in by a member, makes its promises, and is granted a block by the richest one.
    fn join(&mut self) {
        let newcomer = Identity::generate(&mut self.rng);
        let sponsor = self.rng.next_u32() as usize % self.members.len();
        self.serials += 1;
        let admission = SignedAdmission::issue(
            self.view.cluster(),
            newcomer.public(),
            &self.members[sponsor],
            JoinMode::KeyFile,
            self.serials,
        );
        self.merge(&Delta { admissions: vec![admission.unwrap()], ..Delta::default() });
        let promises = self.view.promise_as_newcomer(&newcomer).into_iter().collect();
        self.merge(&Delta { promises, ..Delta::default() });
        let owned = |identity: &Identity| self.view.usable(&identity.public()).len();
        let richest = self.members.iter().max_by_key(|identity| owned(identity)).unwrap();
        let home: RangeSet = self
            .view
            .usable(&richest.public())
            .nets()
            .first()
            .map(|net| ipnet::Ipv4Net::new(net.network(), BLOCK).unwrap())
            .into_iter()
            .collect();
        let grant = self.view.grants().grant(richest, newcomer.public(), 1, &home);
        let grants = vec![grant.expect("a member has a block to spare")];
        self.merge(&Delta { grants, ..Delta::default() });
        self.members.push(newcomer);
        self.say_record(self.members.len() - 1);
    }

    /// A member is gone for good: another one, or the admin, removes it; all others promise, and the heir takes over,
    /// which is the longest-serving member or any.
    fn leave(&mut self, member: usize, any_heir: bool) {
        let gone = self.members.remove(member);
        let heir = if any_heir { self.rng.next_u32() as usize % self.members.len() } else { 0 };
        let signer = &self.members[heir];
        let removal = match &self.admin {
            None => self.view.removal(&gone.node_id(), signer).unwrap(),
            Some(admin) => {
                let (subject, heir, keep) =
                    self.view.prepare_removal(&gone.node_id(), &signer.public()).unwrap();
                SignedRemoval::issue(self.view.cluster(), subject, heir, keep, admin).unwrap()
            }
        };
        self.merge(&Delta { removals: vec![removal], ..Delta::default() });
        assert!(!self.view.admissions().contains(&gone.public()));
        let promises = self.members.iter().filter_map(|identity| self.view.promise(identity)).collect();
        self.merge(&Delta { promises, ..Delta::default() });
        let reclaims = self.members.iter().flat_map(|identity| self.view.reclaim(identity)).collect();
        self.merge(&Delta { reclaims, ..Delta::default() });
        assert!(self.view.frozen().is_empty(), "{:?}", self.view.frozen());
    }

    /// All addresses are owned by somebody who is there, and each by one.
    fn check(&self) {
        let view = &self.view;
        assert_eq!(view.admissions().members().count(), MEMBERS);
        let mut all = RangeSet::new();
        for identity in &self.members {
            let usable = view.usable(&identity.public());
            assert!(usable.len() >= 1 << (32 - BLOCK), "a member without a block");
            let before = all.len();
            all.union(&usable);
            assert_eq!(all.len(), before + usable.len(), "a block with two owners");
        }
        assert_eq!(all.nets(), vec![RANGE.parse::<ipnet::Ipv4Net>().unwrap()]);
        assert_eq!(view.records().count(), MEMBERS);
    }
}

/// `anchored`: removals are signed by an admin key, not by members.
fn replaced(replacements: usize, anchored: bool) -> Cluster {
    // What is tested is not the signatures.
    memo::install();
    let mut cluster = Cluster::new(anchored);
    for number in 0..replacements {
        // At first all are replaced, the founder before the others, and anybody inherits; then one member stays. (When
        // heirs are replaced again and again, each takeover looks at the whole history.)
        let mixed = number < MIXED;
        let place = if mixed { number % MEMBERS } else { 1 + number % (MEMBERS - 1) };
        cluster.leave(place, mixed);
        cluster.join();
        if number % 500 == 0 {
            cluster.check();
        }
    }
    cluster.check();
    cluster
}

fn is_read_again(cluster: &Cluster, replacements: usize) {
    let bytes = encode_cluster(&cluster.view);
    println!("{} bytes after {replacements} replacements", bytes.len());
    let node = StoredNode { generation: 1, mesh_ipv4: None, leaving: false };
    let files = BTreeMap::from([(StateFile::Cluster, bytes), (StateFile::Node, encode_node(&node))]);
    let view = Stored::decode(&files).unwrap().view.unwrap();
    assert_eq!(view.fingerprint(), cluster.view.fingerprint());
    assert!(view.admissions().members().eq(cluster.view.admissions().members()));
}

/// Replaces so many, in one mode, and looks whether one more can be.
fn exhaust_nothing(replacements: usize, anchored: bool) {
    let mut cluster = replaced(replacements, anchored);
    is_read_again(&cluster, replacements);
    cluster.leave(0, true);
    cluster.join();
    cluster.check();
}

#[test]
fn a_thousand_replacements_exhaust_nothing_in_flat_mode() {
    exhaust_nothing(1_000, false);
}

#[test]
fn a_thousand_replacements_exhaust_nothing_in_anchored_mode() {
    exhaust_nothing(1_000, true);
}

#[test]
#[ignore = "takes minutes: most removals still cost time that grows with the history"]
fn twenty_thousand_replacements_exhaust_nothing_in_flat_mode() {
    exhaust_nothing(20_000, false);
}

#[test]
#[ignore = "takes minutes: most removals still cost time that grows with the history"]
fn twenty_thousand_replacements_exhaust_nothing_in_anchored_mode() {
    exhaust_nothing(20_000, true);
}
