//! Views in parts, and what is remembered of them.

use super::*;
use crate::view::{Promise, Promises};

#[test]
fn long_items_make_small_parts() {
    let nodes = identities();
    let view = view(&[]);
    let long = |entries: usize| {
        let kept = vec![BodyId::from_bytes([7; 32]); 40];
        let entry = Promise { removed: nodes[1].public(), removals: Vec::new(), kept };
        let entries = vec![entry; entries];
        let promises = Promises {
            cluster: view.cluster(),
            node: nodes[0].public(),
            version: 1,
            sponsored: (0, 0),
            entries,
        };
        Signed::sign(&promises, &nodes[0]).unwrap()
    };
    // 13 kB each, and one of 65 kB.
    let mut promises = vec![long(10); 100];
    promises.insert(50, long(50));
    let delta = Delta { promises: promises.clone(), ..Delta::default() };
    let parts = delta.chunks(256, 48 << 10);
    assert!((33..=40).contains(&parts.len()), "{}", parts.len());
    for part in &parts {
        let length = postcard::to_allocvec(part).unwrap().len();
        assert!(length <= 48 << 10 || part.len() == 1, "{length}");
    }
    let together: Vec<_> = parts.into_iter().flat_map(|part| part.promises).collect();
    assert_eq!(together, promises);
}

#[test]
fn what_somebody_may_use_is_computed_when_something_changes() {
    let nodes = identities();
    let mut view = view(&[Act::Admit { sponsor: 0, subject: 1 }]);
    let (founder, other) = (nodes[0].public(), nodes[1].public());
    let before = view.usable_remembered(&founder);
    assert_eq!(before, view.usable(&founder));
    assert!(view.usable.0.get().is_some());
    assert_eq!(
        view.usable_remembered(&other),
        view.usable(&other),
        "it is remembered for the first one only"
    );
    // A record changes nothing of it, nor what is known already.
    perform(&mut view, &nodes, &Act::Record { node: 1, generation: 1, version: 1, port: 1 });
    let all = view.to_delta();
    view.merge(&all);
    assert!(view.usable.0.get().is_some());
    perform(&mut view, &nodes, &Act::Grant { from: 0, to: 1, blocks: 1 });
    assert!(view.usable.0.get().is_none());
    assert_ne!(view.usable_remembered(&founder), before);
    assert_eq!(view.usable_remembered(&founder), view.usable(&founder));
}
