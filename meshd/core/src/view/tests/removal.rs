//! Removals, and what becomes of the addresses of who was removed.

use super::*;
use crate::view::{Frozen, Missing};

/// The founder lets in 1, 2 and 3.
const FOUR: [Act; 3] = [
    Act::Admit { sponsor: 0, subject: 1 },
    Act::Admit { sponsor: 0, subject: 2 },
    Act::Admit { sponsor: 0, subject: 3 },
];

fn after(acts: &[Act]) -> View {
    view(&[&FOUR[..], acts].concat())
}

fn is_member(view: &View, node: usize) -> bool {
    view.admissions().contains(&identities()[node].public())
}

fn owner(view: &View, block: u8) -> usize {
    let owner = view.grants().owner_of(Ipv4Addr::new(10, 47, block, 1)).unwrap();
    identities().iter().position(|node| node.public() == owner).unwrap()
}

fn uses(view: &View, node: usize, block: u8) -> bool {
    view.usable(&identities()[node].public()).contains(Ipv4Addr::new(10, 47, block, 1))
}

fn frozen(view: &View, removed: usize) -> Option<Frozen> {
    let id = identities()[removed].node_id();
    view.frozen().into_iter().find(|frozen| frozen.removed == id)
}

fn missing(view: &View, removed: usize) -> Vec<Missing> {
    frozen(view, removed).expect("frozen").missing.into_iter().collect()
}

fn id(node: usize) -> NodeId {
    identities()[node].node_id()
}

fn act(view: &mut View, act: Act) {
    perform(view, &identities(), &act);
}

#[test]
fn a_removed_node_is_out_with_its_record_and_does_not_come_back() {
    let record = Act::Record { node: 1, generation: 1, version: 1, port: 1 };
    let mut view = after(&[record.clone(), Act::Remove { signer: 2, subject: 1 }]);
    assert!(!is_member(&view, 1));
    assert_eq!(view.record(&id(1)), None);
    act(&mut view, record);
    act(&mut view, Act::Admit { sponsor: 3, subject: 1 });
    assert!(!is_member(&view, 1), "not even by another sponsor");
    assert_eq!(view.record(&id(1)), None);
    assert_eq!(view.admissions().members().count(), 3);
}

#[test]
fn who_was_let_in_by_a_removed_node_stays_and_whom_it_lets_in_later_does_not_count() {
    let mut zombie = after(&[Act::Admit { sponsor: 1, subject: 4 }]);
    let mut view = zombie.clone();
    act(&mut view, Act::Remove { signer: 2, subject: 1 });
    assert!(is_member(&view, 4), "admitted before the removal");

    let mut view = after(&[Act::Remove { signer: 2, subject: 1 }]);
    assert!(is_member(&zombie, 4), "by the view of the removed node");
    for merged in [joined(&view, &zombie), joined(&zombie, &view)] {
        assert!(!is_member(&merged, 4), "unknown to the remover, in whatever order it is heard");
    }
    act(&mut zombie, Act::Record { node: 4, generation: 1, version: 1, port: 1 });
    view.merge(&zombie.to_delta());
    assert_eq!(view.record(&id(4)), None, "and what it says is not listened to");
}

#[test]
fn the_removal_of_a_sponsor_keeps_those_who_are_there_through_removed_nodes() {
    // 0 let in 1, 1 let in 4, 1 is removed, then 0: the chain of 4 leads through both.
    let view = after(&[
        Act::Admit { sponsor: 1, subject: 4 },
        Act::Remove { signer: 2, subject: 1 },
        Act::Remove { signer: 3, subject: 0 },
    ]);
    assert_eq!([0, 1, 2, 3, 4].map(|node| is_member(&view, node)), [false, false, true, true, true]);
    let copy = joined(&View::new(view.genesis().clone()), &view);
    assert_eq!(copy.admissions(), view.admissions());
}

#[test]
fn of_two_removals_of_a_sponsor_only_those_stay_whom_both_keep() {
    let one = after(&[Act::Remove { signer: 2, subject: 1 }]);
    let other = after(&[Act::Admit { sponsor: 1, subject: 4 }, Act::Remove { signer: 3, subject: 1 }]);
    assert!(is_member(&other, 4));
    assert!(!is_member(&joined(&other, &one), 4));
    assert_eq!(joined(&other, &one), joined(&one, &other));
}

#[test]
fn two_members_that_remove_each_other_are_both_out() {
    let one = after(&[Act::Remove { signer: 1, subject: 2 }]);
    let other = after(&[Act::Remove { signer: 2, subject: 1 }]);
    for merged in [joined(&one, &other), joined(&other, &one)] {
        assert_eq!([0, 1, 2, 3].map(|node| is_member(&merged, node)), [true, false, false, true]);
    }
}

#[test]
fn with_admin_keys_only_they_remove() {
    let nodes = identities();
    let mut view = view_in(true, &FOUR);
    let before = view.clone();
    let heir = nodes[2].public();
    let by = |signer: &Identity| {
        let removal = SignedRemoval::issue(before.cluster(), nodes[1].public(), heir, Vec::new(), signer);
        Delta { removals: vec![removal.unwrap()], ..Delta::default() }
    };
    let refused = view.merge(&by(&nodes[0])).refused;
    assert!(refused[0].contains("no admin key"), "{refused:?}");
    assert_eq!(view, before);
    assert_eq!(view.removal(&id(1), &nodes[0]), Err(CannotRemove::NotAdmin));
    assert_eq!(view.merge(&by(&admin())).refused, Vec::<String>::new());
    assert!(!is_member(&view, 1));
}

#[test]
fn without_admin_keys_strangers_do_not_remove() {
    let nodes = identities();
    let mut view = after(&[]);
    let removal =
        SignedRemoval::issue(view.cluster(), nodes[1].public(), nodes[4].public(), Vec::new(), &nodes[4]);
    let refused = view.merge(&Delta { removals: vec![removal.unwrap()], ..Delta::default() }).refused;
    assert!(refused[0].contains("not known to have been a member"), "{refused:?}");
    assert!(is_member(&view, 1));
}

#[test]
fn addresses_come_back_when_all_have_promised() {
    let mut view = after(&[
        Act::Grant { from: 0, to: 1, blocks: 1 },
        Act::Remove { signer: 2, subject: 1 },
        Act::Reclaim { node: 2 },
    ]);
    assert_eq!(owner(&view, 255), 1);
    assert_eq!(frozen(&view, 1).unwrap().ranges.nets(), ["10.47.255.0/24".parse().unwrap()]);
    assert_eq!(frozen(&view, 1).unwrap().heir, id(2));
    for node in [0, 2, 3] {
        assert!(missing(&view, 1).contains(&Missing::Promise(id(node))));
        act(&mut view, Act::Reclaim { node: 2 });
        assert_eq!(owner(&view, 255), 1, "frozen");
        act(&mut view, Act::Promise { node });
    }
    assert_eq!(missing(&view, 1), []);
    act(&mut view, Act::Reclaim { node: 3 });
    assert_eq!(owner(&view, 255), 1, "only the heir takes it");
    act(&mut view, Act::Reclaim { node: 2 });
    assert_eq!(owner(&view, 255), 2);
    assert!(uses(&view, 2, 255));
    assert_eq!(view.frozen(), []);
    assert!(view.promise(&identities()[0]).is_none(), "nothing is left to be promised");
    act(&mut view, Act::Grant { from: 2, to: 3, blocks: 1 });
    assert_eq!(owner(&view, 255), 3, "and is handed on");
}

#[test]
fn a_member_that_is_away_keeps_them_frozen_until_it_is_removed_too() {
    let mut view = after(&[Act::Grant { from: 0, to: 1, blocks: 1 }, Act::Remove { signer: 2, subject: 1 }]);
    for node in [0, 2] {
        act(&mut view, Act::Promise { node });
    }
    act(&mut view, Act::Reclaim { node: 2 });
    assert_eq!(missing(&view, 1), [Missing::Promise(id(3))]);
    act(&mut view, Act::Remove { signer: 2, subject: 3 });
    act(&mut view, Act::Reclaim { node: 2 });
    assert_eq!(owner(&view, 255), 2);
}

#[test]
fn what_a_removed_node_hands_on_after_the_promises_is_void() {
    let before = after(&[Act::Grant { from: 0, to: 1, blocks: 4 }]);
    let mut view = before.clone();
    act(&mut view, Act::Remove { signer: 2, subject: 1 });
    for node in [0, 2, 3] {
        act(&mut view, Act::Promise { node });
    }
    let mut zombie = before;
    act(&mut zombie, Act::Grant { from: 1, to: 3, blocks: 1 });
    let mut view = joined(&view, &zombie);
    assert_eq!(owner(&view, 255), 3, "as far as the grants go");
    assert!(!uses(&view, 3, 255), "but it has promised");
    act(&mut view, Act::Reclaim { node: 2 });
    assert_eq!(owner(&view, 255), 2);
    assert!(uses(&view, 2, 255));
}

#[test]
fn what_a_member_had_from_a_removed_node_stays_with_it() {
    let mut view = after(&[
        Act::Grant { from: 0, to: 1, blocks: 4 },
        Act::Grant { from: 1, to: 3, blocks: 1 },
        Act::Remove { signer: 2, subject: 1 },
    ]);
    for node in [0, 2, 3] {
        act(&mut view, Act::Promise { node });
        assert!(uses(&view, 3, 255));
    }
    act(&mut view, Act::Reclaim { node: 2 });
    assert_eq!([252, 253, 254, 255].map(|block| owner(&view, block)), [2, 2, 2, 3]);
    assert!(uses(&view, 3, 255));
}

#[test]
fn the_founder_can_be_removed_and_its_range_lives_on() {
    let mut view = after(&[Act::Grant { from: 0, to: 1, blocks: 1 }, Act::Remove { signer: 2, subject: 0 }]);
    for node in [1, 2, 3] {
        assert!(is_member(&view, node));
        act(&mut view, Act::Promise { node });
    }
    act(&mut view, Act::Reclaim { node: 2 });
    assert_eq!((owner(&view, 255), owner(&view, 0)), (1, 2));
    act(&mut view, Act::Grant { from: 2, to: 3, blocks: 1 });
    assert_eq!(owner(&view, 254), 3);
}

#[test]
fn an_heir_that_is_removed_is_succeeded_by_its_own_heir() {
    let mut view = after(&[
        Act::Grant { from: 0, to: 1, blocks: 1 },
        Act::Remove { signer: 2, subject: 1 },
        Act::Remove { signer: 3, subject: 2 },
    ]);
    for node in [0, 3] {
        act(&mut view, Act::Promise { node });
    }
    assert_eq!(missing(&view, 1), [Missing::Heir(id(2))]);
    act(&mut view, Act::Reclaim { node: 3 });
    assert_eq!((frozen(&view, 2), missing(&view, 1)), (None, vec![]));
    act(&mut view, Act::Reclaim { node: 3 });
    assert_eq!(owner(&view, 255), 3);
}

#[test]
fn a_reclaim_that_no_member_had_seen_goes_with_the_heir_that_signed_it() {
    let mut before =
        after(&[Act::Grant { from: 0, to: 1, blocks: 1 }, Act::Remove { signer: 2, subject: 1 }]);
    for node in [0, 2, 3] {
        act(&mut before, Act::Promise { node });
    }
    let mut heir = before.clone();
    act(&mut heir, Act::Reclaim { node: 2 });
    assert_eq!(owner(&heir, 255), 2);
    let mut others = before;
    act(&mut others, Act::Remove { signer: 3, subject: 2 });
    for node in [0, 3] {
        act(&mut others, Act::Promise { node });
    }
    for _ in 0..2 {
        act(&mut others, Act::Reclaim { node: 3 });
    }
    assert_eq!(owner(&others, 255), 3);
    let merged = joined(&others, &heir);
    assert_eq!(owner(&merged, 255), 3, "the old heir's reclaim does not count");
    assert_eq!(conclusions(&merged), conclusions(&joined(&heir, &others)));
}

#[test]
fn with_two_removals_of_one_node_there_is_one_heir() {
    let before = after(&[Act::Grant { from: 0, to: 1, blocks: 1 }]);
    let mut views = [2, 3].map(|signer| {
        let mut view = before.clone();
        act(&mut view, Act::Remove { signer, subject: 1 });
        for node in [0, 2, 3] {
            act(&mut view, Act::Promise { node });
        }
        view
    });
    let merged = joined(&views[0], &views[1]);
    assert!(!missing(&merged, 1).is_empty(), "promises about one removal do not count for two");
    // Whoever is first, with the promises of all about one removal, is the only one.
    act(&mut views[0], Act::Reclaim { node: 2 });
    let mut merged = joined(&views[0], &views[1]);
    for node in [0, 2, 3] {
        act(&mut merged, Act::Promise { node });
        act(&mut merged, Act::Reclaim { node: 3 });
    }
    assert_eq!(owner(&merged, 255), 2);
}

#[test]
fn a_newcomer_accepts_nothing_from_who_was_removed_before_it_came() {
    let nodes = identities();
    let mut view = after(&[
        Act::Grant { from: 0, to: 4, blocks: 1 },
        Act::Remove { signer: 2, subject: 0 },
        Act::Admit { sponsor: 1, subject: 4 },
    ]);
    view.merge(&Delta {
        promises: view.promise_as_newcomer(&nodes[4]).into_iter().collect(),
        ..Delta::default()
    });
    assert!(!uses(&view, 4, 255));
    for node in [1, 2, 3] {
        act(&mut view, Act::Promise { node });
    }
    act(&mut view, Act::Reclaim { node: 2 });
    assert_eq!(owner(&view, 255), 2);
}

#[test]
fn an_heir_that_does_not_know_all_members_waits() {
    let nodes = identities();
    // 4 was let in by 3 before 3 promised, and 2 has not heard of 4.
    let mut known = after(&[Act::Grant { from: 0, to: 1, blocks: 1 }, Act::Remove { signer: 2, subject: 1 }]);
    let mut threes = known.clone();
    act(&mut threes, Act::Admit { sponsor: 3, subject: 4 });
    let promise = Delta { promises: threes.promise(&nodes[3]).into_iter().collect(), ..Delta::default() };
    known.merge(&promise);
    for node in [0, 2] {
        act(&mut known, Act::Promise { node });
    }
    assert_eq!(missing(&known, 1), [Missing::AdmissionsBy(id(3))]);
    let known = joined(&known, &threes);
    assert_eq!(missing(&known, 1), [Missing::Promise(id(4))]);
}

/// What 20,000 replacements leave: a new node comes, gets a block, and the oldest of four is removed.
fn replace(anchored: bool) {
    const REPLACEMENTS: u32 = 20_000;
    let identity = |n: u32| {
        let mut seed = [0x5a; 32];
        seed[..4].copy_from_slice(&n.to_be_bytes());
        Identity::from_bytes(&seed)
    };
    let admin = admin();
    let mut view = View::new(genesis(&identity(0), anchored));
    let mut members = std::collections::VecDeque::from([identity(0)]);
    let accept = |view: &mut View, delta: Delta| {
        let merged = view.merge(&delta);
        assert_eq!(merged.refused, Vec::<String>::new());
        merged.new.len()
    };
    for n in 1..=REPLACEMENTS + 3 {
        let (sponsor, newcomer) = (members[0].clone(), identity(n));
        let admission =
            SignedAdmission::issue(view.cluster(), newcomer.public(), &sponsor, JoinMode::KeyFile, n.into());
        let admissions = vec![admission.unwrap()];
        accept(&mut view, Delta { admissions, ..Delta::default() });
        let mut owners = members.iter();
        let grant = owners
            .find_map(|owner| view.grants().grant(owner, newcomer.public(), 1, &RangeSet::new()))
            .unwrap_or_else(|| panic!("no addresses for node {n}"));
        accept(&mut view, Delta { grants: vec![grant], ..Delta::default() });
        assert!(!view.usable(&newcomer.public()).is_empty());
        members.push_back(newcomer);
        if members.len() <= 4 {
            continue;
        }
        let oldest = members.pop_front().unwrap();
        let signer = if anchored { &admin } else { &members[0] };
        let removals = vec![view.removal(&oldest.node_id(), signer).unwrap()];
        accept(&mut view, Delta { removals, ..Delta::default() });
        for member in &members {
            let promises = view.promise(member).into_iter().collect();
            accept(&mut view, Delta { promises, ..Delta::default() });
        }
        let reclaims = members.iter().flat_map(|member| view.reclaim(member)).collect();
        assert_eq!(accept(&mut view, Delta { reclaims, ..Delta::default() }), 1, "replacement {n}");
    }
    assert_eq!(view.admissions().members().count(), 4);
    assert_eq!(view.frozen(), []);
    let owned = members.iter().map(|member| view.grants().owned_by(&member.public()).len());
    assert_eq!(owned.sum::<u64>(), 1 << 20, "nothing of the range is lost");
    // All of it can be told to a node that comes now.
    let delta = view.to_delta();
    let bytes = postcard::to_allocvec(&delta).unwrap().len();
    assert!(bytes < 900 * REPLACEMENTS as usize, "{bytes} bytes");
    let mut copy = View::new(view.genesis().clone());
    assert_eq!(accept(&mut copy, delta.clone()), delta.len());
    assert!(copy == view);
    assert_eq!(copy.grants().owners(), view.grants().owners());
}

#[test]
fn twenty_thousand_replacements_exhaust_nothing_in_flat_mode() {
    replace(false);
}

#[test]
fn twenty_thousand_replacements_exhaust_nothing_in_anchored_mode() {
    replace(true);
}
