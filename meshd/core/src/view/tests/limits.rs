//! What members that lie, and nodes that were removed, can make others store.

use super::*;

fn stranger(n: u32) -> IdentityKey {
    let mut seed = [0x77; 32];
    seed[..4].copy_from_slice(&n.to_be_bytes());
    Identity::from_bytes(&seed).public()
}

fn let_in(view: &View, sponsor: usize, subject: IdentityKey, serial: u64) -> SignedAdmission {
    let sponsor = &identities()[sponsor];
    SignedAdmission::issue(view.cluster(), subject, sponsor, JoinMode::KeyFile, serial).unwrap()
}

fn admissions(admissions: Vec<SignedAdmission>) -> Delta {
    Delta { admissions, ..Delta::default() }
}

fn grants(grants: Vec<Signed<Grant>>) -> Delta {
    Delta { grants, ..Delta::default() }
}

/// Three members let in by the founder, 4 by 1.
fn five(anchored: bool) -> View {
    let admit = |sponsor, subject| Act::Admit { sponsor, subject };
    view_in(anchored, &[admit(0, 1), admit(0, 2), admit(0, 3), admit(1, 4)])
}

fn without(view: &View, subject: usize) -> View {
    let mut view = view.clone();
    perform(&mut view, &identities(), &Act::Remove { signer: 2, subject });
    view
}

#[test]
fn a_removed_node_of_an_anchored_cluster_adds_nothing() {
    let before = five(true);
    let mut zombie = before.clone();
    let flood = admissions((0..50).map(|n| let_in(&before, 1, stranger(n), n.into())).collect());
    assert_eq!(zombie.merge(&flood).new.len(), 50);
    let mut below = zombie.clone();
    let sybil = Identity::from_bytes(&{
        let mut seed = [0x77; 32];
        seed[..4].copy_from_slice(&7u32.to_be_bytes());
        seed
    });
    let deeper =
        SignedAdmission::issue(before.cluster(), stranger(99), &sybil, JoinMode::KeyFile, 1).unwrap();
    assert_eq!(below.merge(&admissions(vec![deeper])).new.len(), 1);

    let after = without(&before, 1);
    assert!(after.admissions().contains(&identities()[4].public()), "its removal keeps who was there");
    let mut flooded = after.clone();
    let merged = flooded.merge(&flood);
    assert_eq!((merged.new.len(), merged.early), (0, 0), "{:?}", merged.refused.first());
    assert_eq!(flooded, after);
    // Whoever had heard it drops it, and what rests on it; gossip is told.
    let removal = Delta { removals: after.to_delta().removals, ..Delta::default() };
    let merged = below.merge(&removal);
    assert_eq!(below, after);
    assert_eq!(below.fingerprint(), after.fingerprint());
    assert_eq!(merged.gone.iter().filter(|name| name.kind == Kind::ADMISSION).count(), 51);
    assert_eq!(taught(&after, &zombie), after);
}

#[test]
fn the_records_of_those_who_go_with_a_removed_sponsor_go_too() {
    let before = five(true);
    let mut zombie = before.clone();
    zombie.merge(&admissions(vec![let_in(&before, 4, stranger(1), 1)]));
    let removal = without(&before, 1).to_delta().removals;
    // An admin that knows of nobody whom 1 let in.
    let nodes = identities();
    let none =
        SignedRemoval::issue(before.cluster(), nodes[1].public(), nodes[2].public(), Vec::new(), &admin());
    perform(&mut zombie, &nodes, &Act::Record { node: 4, generation: 1, version: 1, port: 1 });
    perform(&mut zombie, &nodes, &Act::Grant { from: 0, to: 4, blocks: 1 });
    assert_eq!(zombie.merge(&Delta { removals: removal, ..Delta::default() }).gone, []);
    let merged = zombie.merge(&Delta { removals: vec![none.unwrap()], ..Delta::default() });
    let gone: Vec<Kind> = merged.gone.iter().map(|name| name.kind).collect();
    assert_eq!(gone, [Kind::ADMISSION, Kind::ADMISSION, Kind::RECORD]);
    assert_eq!(zombie.admissions().members().count(), 3);
    // What it owns is not lost: it can be removed by its id.
    let owner = nodes[4].public();
    assert!(!zombie.grants().owned_by(&owner).is_empty());
    assert!(zombie.not_removed().contains_key(&owner.node_id()));
    assert!(zombie.removal(&owner.node_id(), &admin()).is_ok());
}

#[test]
fn what_counts_for_nothing_takes_no_room_from_what_counts_in_flat_mode() {
    let mut view = without(&five(false), 1);
    let flood = (0..17_000).map(|n| let_in(&view, 1, stranger(n), n.into())).collect();
    let merged = view.merge(&admissions(flood));
    assert_eq!(merged.new.len(), 16_384);
    let honest = let_in(&view, 2, stranger(20_000), 1);
    assert_eq!(view.merge(&admissions(vec![honest])).new.len(), 1);
    assert!(view.admissions().contains(&stranger(20_000)));
}

#[test]
fn a_sponsor_lets_a_node_in_once_and_the_first_one_stays() {
    for anchored in [false, true] {
        let view = five(anchored);
        let many: Vec<SignedAdmission> =
            (1..=20).map(|serial| let_in(&view, 2, stranger(1), serial)).collect();
        let (mut up, mut down) = (view.clone(), view.clone());
        for one in &many {
            up.merge(&admissions(vec![one.clone()]));
        }
        for one in many.iter().rev() {
            let merged = down.merge(&admissions(vec![one.clone()]));
            assert_eq!((merged.new.len(), merged.refused.len()), (1, 0));
        }
        assert_eq!(up, down);
        assert_eq!(up.fingerprint(), down.fingerprint());
        assert_eq!(up.items().count(), view.items().count() + 1);
        assert_eq!(up.admissions().highest_serial(&identities()[2].public()), 1);
    }
}

fn grant(view: &View, parent: BodyId, block: u8, from: &Identity, to: IdentityKey) -> Signed<Grant> {
    let grant = Grant {
        cluster: view.cluster(),
        parent,
        network: Ipv4Addr::new(10, 47, block, 0),
        prefix: 24,
        from: from.public(),
        to,
    };
    Signed::sign(&grant, from).unwrap()
}

/// The block 10.47.255.0/24 is with 1.
fn with_a_block() -> (View, BodyId) {
    let mut view = five(true);
    let nodes = identities();
    let first = view.grants().grant(&nodes[0], nodes[1].public(), 1, &RangeSet::new()).unwrap();
    assert_eq!(view.merge(&grants(vec![first.clone()])).new.len(), 1);
    (view, first.id())
}

#[test]
fn one_block_is_no_ground_for_grants_without_end() {
    let (view, parent) = with_a_block();
    let nodes = identities();
    for view in [view.clone(), without(&view, 1)] {
        let flood: Vec<_> = (0..100).map(|n| grant(&view, parent, 255, &nodes[1], stranger(n))).collect();
        let (mut up, mut down) = (view.clone(), view.clone());
        for one in &flood {
            up.merge(&grants(vec![one.clone()]));
        }
        for one in flood.iter().rev() {
            down.merge(&grants(vec![one.clone()]));
        }
        let mut whole = view.clone();
        whole.merge(&grants(flood.clone()));
        assert_eq!(up.grants().ids().count(), view.grants().ids().count() + 2, "one block, twice");
        for other in [&down, &whole] {
            assert_eq!(*other, up);
            assert_eq!(other.grants().owners(), up.grants().owners());
            assert_eq!(other.fingerprint(), up.fingerprint());
        }
        // Those who got it were never let in, and hand nothing on.
        let held: Vec<BodyId> = up.grants().ids().copied().collect();
        for n in 0..100u32 {
            let sybil = Identity::from_bytes(&{
                let mut seed = [0x77; 32];
                seed[..4].copy_from_slice(&n.to_be_bytes());
                seed
            });
            for parent in &held {
                let merged = up.merge(&grants(vec![grant(&view, *parent, 255, &sybil, stranger(n + 1))]));
                assert_eq!(merged.new.len(), 0);
            }
        }
        let own = grant(&view, parent, 255, &nodes[1], nodes[1].public());
        assert!(up.merge(&grants(vec![own])).refused[0].contains("to its owner"));
    }
}

#[test]
fn what_rests_on_a_grant_that_is_too_many_goes_with_it() {
    let (view, parent) = with_a_block();
    let nodes = identities();
    let mut flood: Vec<_> =
        (0..3).map(|n| grant(&view, parent, 255, &nodes[1], nodes[2 + n].public())).collect();
    flood.sort_by_key(|one| one.id());
    let top = flood.pop().unwrap();
    let to = nodes.iter().find(|node| node.public() == top.decode().unwrap().to).unwrap();
    let below = grant(&view, top.id(), 255, to, nodes[0].public());
    let mut early = view.clone();
    assert_eq!(early.merge(&grants(vec![top.clone(), below.clone()])).new.len(), 2);
    assert_eq!(early.grants().owner_of(Ipv4Addr::new(10, 47, 255, 1)), Some(nodes[0].public()));
    let merged = early.merge(&grants(flood.clone()));
    assert_eq!(merged.gone.len(), 2);
    let mut late = view;
    late.merge(&grants(flood));
    assert_eq!(late.merge(&grants(vec![top, below])).new.len(), 0);
    assert_eq!(early, late);
    assert_eq!(early.grants().owners(), late.grants().owners());
    assert_eq!(early.fingerprint(), late.fingerprint());
}

#[test]
fn a_node_does_not_choose_its_ipv6_prefix() {
    let nodes = identities();
    let mut view = five(false);
    let record = NodeRecord {
        cluster: view.cluster(),
        node: nodes[1].public(),
        generation: 1,
        version: 1,
        name: "grinder".into(),
        software: String::new(),
        salt: 7,
        mesh_ipv4: None,
        control_port: 1,
        endpoints: Vec::new(),
        lanes: vec![LaneInfo { index: 0, key: WgSecret::from_bytes(&[9; 32]).public(), port: 1 }],
        start: 0,
        contested: false,
        leaving: false,
    };
    let records = vec![Signed::sign(&record, &nodes[1]).unwrap()];
    let refused = view.merge(&Delta { records, ..Delta::default() }).refused;
    assert!(refused[0].contains("salt") && refused[0].contains("does not choose"), "{refused:?}");
}

#[test]
fn an_invented_node_that_a_removal_keeps_holds_nothing_up_for_good() {
    let nodes = identities();
    let invented = NodeId::from_bytes([9; 16]);
    let mut view = five(true);
    let keep = vec![nodes[4].node_id(), invented];
    let lie = SignedRemoval::issue(view.cluster(), nodes[1].public(), nodes[2].public(), keep, &admin());
    assert_eq!(view.merge(&Delta { removals: vec![lie.unwrap()], ..Delta::default() }).new.len(), 1);
    assert_eq!(view.admissions().awaited().collect::<Vec<_>>(), [&invented]);
    let again = view.removal(&nodes[1].node_id(), &admin()).unwrap();
    let removals = vec![again];
    assert_eq!(view.merge(&Delta { removals, ..Delta::default() }).new.len(), 1);
    assert_eq!(view.admissions().awaited().count(), 0);
    assert!(view.admissions().contains(&nodes[4].public()), "who is there stays");
    assert_eq!(view.removal(&nodes[1].node_id(), &admin()), Err(CannotRemove::NoMember(nodes[1].node_id())));
}

#[test]
fn a_removed_node_withdraws_nothing_that_its_removal_names() {
    let (view, parent) = with_a_block();
    let nodes = identities();
    // Ground until it comes first: to a node of its choice.
    let honest = grant(&view, parent, 255, &nodes[1], nodes[3].public());
    let lower =
        (0..).map(|n| grant(&view, parent, 255, &nodes[1], stranger(n))).find(|g| g.id() < honest.id());
    let lower = lower.unwrap();
    let address = Ipv4Addr::new(10, 47, 255, 1);
    let mut known = view.clone();
    known.merge(&grants(vec![honest.clone()]));
    let removals = without(&known, 1).to_delta().removals;
    let deltas = [grants(vec![honest]), grants(vec![lower]), Delta { removals, ..Delta::default() }];
    for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
        let mut view = view.clone();
        for at in order {
            assert_eq!(view.merge(&deltas[at]).refused, Vec::<String>::new());
        }
        assert_eq!(view.grants().owner_of(address), Some(nodes[3].public()), "{order:?}");
        assert!(view.usable(&nodes[3].public()).contains(address));
        assert_eq!(view.grants().owners().values().map(RangeSet::len).sum::<u64>(), 1 << 20);
        let copy = joined(&View::new(view.genesis().clone()), &view);
        assert_eq!(copy.grants().owner_of(address), Some(nodes[3].public()));
    }
}
