//! What a view costs, and what a clone of it costs once it has changed.

use std::time::Instant;

use mesh_core::view::{Delta, View};

use crate::cluster::{cluster, record};
use crate::resident;

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

    // As when it is on disk.
    view.drop_news(view.merged_so_far());
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
