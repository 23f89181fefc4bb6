//! What `cargo xtask crowd` does with sixty hosts, with a few: split into halves and healed, one removed, one added.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use mesh_tests::crowd::{self, Plan};
use mesh_tests::options;

#[test]
fn a_crowd_is_split_and_healed_loses_one_and_wins_one_and_everybody_pings_everybody() {
    // No longer apart than until each half calls the other unreachable; the figures of idleness are not for here.
    let plan = Plan { split: Duration::ZERO, idle: Duration::from_secs(1), ..Plan::new(8) };
    crowd::run(options("t-crowd"), &plan, &mut std::io::stdout()).unwrap();
}
