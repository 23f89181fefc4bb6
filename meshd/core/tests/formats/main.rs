//! The golden sets of this crate: see `golden_set`.
#![allow(clippy::unwrap_used, reason = "tests")]

mod api;
#[path = "../../../../keys/tests/golden_set/mod.rs"]
mod golden_set;
mod gossip;
mod messages;
mod newer;
mod state;
mod world;

use golden_set::{Era, Make, check};

const HOME: &str = env!("CARGO_MANIFEST_DIR");

/// All sets of this crate, with the entries that they must have.
const SETS: [(&str, Era, Make); 8] = [
    ("v1/leases", Era::Past, state::first_leases),
    ("v3/api", Era::Present, api::entries),
    ("v3/items", Era::Present, gossip::items),
    ("v3/messages", Era::Present, messages::entries),
    ("v3/parts", Era::Present, gossip::parts),
    ("v3/state", Era::Past, state::without_changes),
    ("v3/statements", Era::Present, gossip::statements),
    ("v4/state", Era::Present, state::entries),
];

#[test]
fn what_was_ever_released_is_read_as_it_was_meant() {
    for (set, era, entries) in SETS {
        check(HOME, set, era, &entries());
    }
    assert!(golden_set::sets(HOME).iter().map(String::as_str).eq(SETS.map(|(set, _, _)| set)));
}

fn say(error: impl std::fmt::Display) -> String {
    error.to_string()
}
