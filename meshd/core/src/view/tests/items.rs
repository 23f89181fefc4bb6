//! A view as gossip sees it.

use std::collections::BTreeMap;

use super::*;
use crate::gossip::catalogue::{Content, Kind, Name};

fn items(view: &View) -> BTreeMap<Name, Content> {
    let items: Vec<_> = view.items().collect();
    let map: BTreeMap<_, _> = items.iter().copied().collect();
    assert_eq!(map.len(), items.len(), "each name once");
    map
}

/// The view without promises.
fn spread(view: &View) -> View {
    let mut copy = View::new(view.genesis().clone());
    copy.merge(&Delta { promises: Vec::new(), ..view.to_delta() });
    copy
}

/// What merging says and does, for one delta.
fn merge(view: &mut View, delta: &Delta) -> Merged {
    let mut expected = items(view);
    let merged = view.merge(delta);
    for name in &merged.gone {
        assert!(expected.remove(name).is_some(), "gone, and was there");
    }
    let new = merged.new.names();
    assert_eq!(new.len() + merged.new.promises.len(), merged.new.len());
    expected.extend(new);
    assert_eq!(items(view), expected, "what is new and what is gone tells all that changed");
    merged
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn views_are_equal_if_and_only_if_their_items_are(anchored: bool, a in acts(), b in acts()) {
        let (mut a, mut b) = (view_in(anchored, &a), view_in(anchored, &b));
        prop_assert_eq!(items(&a) == items(&b), spread(&a) == spread(&b));
        if anchored {
            (a, b) = (aware(&a, &[&b]), aware(&b, &[&a]));
        }
        let (ab, ba) = (joined(&a, &b), joined(&b, &a));
        prop_assert_eq!(items(&ab), items(&ba));
        prop_assert_eq!(items(&spread(&ab)), items(&ab));
        prop_assert_eq!(items(&ab), ab.to_delta().names().into_iter().collect::<BTreeMap<_, _>>());
    }

    #[test]
    fn items_one_by_one_in_any_order_make_the_view(a in acts(), b in acts(), seed: u64) {
        let (a, mut view) = (view(&a), view(&b));
        let expected = joined(&view, &spread(&a));
        let mut names: Vec<Name> = items(&a).into_keys().collect();
        names.sort_by_key(|name| (name.id[usize::from(seed as u8 % 16)] ^ (seed >> 8) as u8, *name));
        // What came too early comes again.
        while !names.is_empty() {
            let before = names.len();
            names.retain(|name| {
                let delta = Delta::of_item(name.kind, &a.item(name).unwrap()).unwrap().unwrap();
                assert!(delta.names().iter().any(|(other, _)| other == name));
                let merged = merge(&mut view, &delta);
                assert_eq!(merged.early, merged.refused.len(), "only early, not wrong: {:?}", merged.refused);
                merged.early > 0
            });
            prop_assert!(names.len() < before, "the grounds never come");
        }
        prop_assert_eq!(items(&view), items(&expected));
        prop_assert_eq!(view, expected);
    }

    #[test]
    fn whole_views_tell_what_changed(anchored: bool, a in acts(), b in acts()) {
        let (mut a, mut b) = (view_in(anchored, &a), view_in(anchored, &b));
        if anchored {
            b = aware(&b, &[&a]);
        }
        let merged = merge(&mut a, &b.to_delta());
        prop_assert_eq!(merged.early, 0);
        let (mut others, new) = (a.to_delta(), merged.new);
        let all = others.len();
        others.remove(&new);
        // Of promises, what is new may have been overtaken in the same delta.
        prop_assert!(others.len() >= all - new.len() && others.len() <= all - new.names().len());
        prop_assert!(new.names().iter().all(|(name, _)| others.names().iter().all(|(other, _)| other != name)));
    }
}

#[test]
fn promises_can_be_passed_on_but_are_not_among_the_items() {
    let view = view(&[
        Act::Admit { sponsor: 0, subject: 1 },
        Act::Remove { signer: 0, subject: 1 },
        Act::Promise { node: 0 },
    ]);
    let name = Name { id: *identities()[0].node_id().as_bytes(), kind: Kind::PROMISES };
    assert!(!items(&view).contains_key(&name));
    let delta = Delta::of_item(name.kind, &view.item(&name).unwrap()).unwrap().unwrap();
    assert_eq!((delta.promises.len(), delta.names()), (1, Vec::new()));
    let mut copy = spread(&view);
    assert_ne!(copy, view);
    copy.merge(&delta);
    assert_eq!(copy, view);
}

#[test]
fn what_is_no_item_of_a_view_is_told_apart() {
    let view = view(&[Act::Admit { sponsor: 0, subject: 1 }]);
    let (name, _) = view.items().next().unwrap();
    for kind in [Kind::LIVENESS, Kind::REMOVAL, Kind::RECLAIM, Kind::GRANT, Kind::RECORD, Kind(11)] {
        assert_eq!(view.item(&Name { kind, ..name }), None);
    }
    let (mut near, mut far) = (name, name);
    near.id[15] ^= 1;
    far.id = [0xff; 16];
    assert_eq!((view.item(&near), view.item(&far)), (None, None));
    assert!(Delta::of_item(Kind::LIVENESS, &[]).is_none());
    assert!(Delta::of_item(Kind(11), &[]).is_none());
    assert!(Delta::of_item(Kind::GRANT, &[1, 2, 3]).unwrap().is_err());
}

#[test]
fn what_is_wrong_is_not_waited_for() {
    let nodes = identities();
    let mut view = view(&[Act::Admit { sponsor: 0, subject: 1 }]);
    let other = view_in(true, &[Act::Admit { sponsor: 0, subject: 2 }]).to_delta();
    let merged = view.merge(&other);
    assert_eq!((merged.refused.len(), merged.early), (1, 0), "{:?}", merged.refused);
    let beyond = Grant {
        cluster: view.cluster(),
        parent: BodyId::from_bytes(*view.cluster().as_bytes()),
        network: Ipv4Addr::new(192, 168, 0, 0),
        prefix: 24,
        from: nodes[0].public(),
        to: nodes[1].public(),
    };
    let unknown = Grant { parent: BodyId::from_bytes([7; 32]), ..beyond.clone() };
    let grants = [beyond, unknown].map(|grant| Signed::sign(&grant, &nodes[0]).unwrap()).to_vec();
    let merged = view.merge(&Delta { grants, ..Delta::default() });
    assert_eq!((merged.refused.len(), merged.early), (2, 1), "{:?}", merged.refused);
}
