//! What the whole-system tests share: labs of real daemons, and ways to look at them.

#![forbid(unsafe_code)]

pub mod crowd;

use std::time::Duration;

use mesh_lab::{Binaries, Family, Host, Lab, Options, PingOptions, Pod, poll_until};

/// Both address families.
pub const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

/// The options of a lab. One of that name that a killed run has left is removed. Daemons log as `RUST_LOG` says.
///
/// # Panics
/// Without root, or without the programs under test.
pub fn options(name: &str) -> Options {
    assert!(
        nix::unistd::geteuid().is_root(),
        "this test builds networks and needs root: run `cargo xtask test` as root, or `cargo xtask test unit` for the tests that do not"
    );
    let binaries = Binaries::beside_current_exe().expect("the path of the test");
    binaries.check().expect("the programs under test (`cargo xtask test` builds them)");
    Lab::down(name).expect("removing what an earlier run has left");
    Options { log_filter: std::env::var("RUST_LOG").ok(), ..Options::new(name, binaries) }
}

/// A lab of daemons that are ready.
///
/// # Panics
/// When it does not come up.
pub fn up(options: Options) -> Lab {
    let lab = Lab::up(options).expect("the lab");
    lab.wait_meshed(Duration::from_secs(30)).expect("a mesh");
    lab
}

/// A ping every `interval`, `count` times.
pub fn every(interval: Duration, count: u32) -> PingOptions {
    PingOptions { count, interval, ..PingOptions::default() }
}

/// Whether one ping gets through, in both directions of time: it is tried until `limit`.
///
/// # Panics
/// When none gets through.
pub fn reaches_within(from: &Pod, to: &Pod, family: Family, limit: Duration) {
    let what = format!("{} reaches {} over {family:?}", from.full_name(), to.full_name());
    let options = PingOptions { linger: Duration::from_millis(200), ..PingOptions::default() };
    poll_until(&what, limit, || {
        from.ping(to.address(family), options).is_ok_and(|stats| stats.all_answered())
    })
    .expect("a ping");
}

/// What the daemons have logged, for the message of a failed test.
pub fn logs(lab: &Lab) -> String {
    let log = |host: &Host| host.log().unwrap_or_else(|error| format!("{error:#}"));
    lab.hosts().iter().map(|host| format!("--- log of {} ---\n{}", host.name(), log(host))).collect()
}

/// The cluster id that a node says it is in.
pub fn cluster_of(host: &Host) -> Option<String> {
    Some(host.status().ok()?["cluster"]["id"].as_str()?.to_owned())
}
