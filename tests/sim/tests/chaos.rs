//! Random faults of all kinds, and what must hold meanwhile and afterwards.
//!
//! 200 seeds at 5 to 10 nodes and 25 seconds of faults each: 125 s of processor time with the `dev` profile, about a
//! minute on two idle cores. More of it: `cargo xtask sim --faults chaos --seeds 1..1001 --minutes 5`.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use mesh_sim::healing::{self, Outcome};
use mesh_sim::settings::Settings;

fn settings(seed: u64) -> Settings {
    let mut settings = Settings::chaos(5 + (seed % 6) as usize, seed, Duration::from_secs(25));
    settings.fault_pause = Duration::from_secs(2);
    settings
}

/// Runs many seeds on two threads, and returns those with breaches.
fn broken(seeds: std::ops::Range<u64>, settings: impl Fn(u64) -> Settings + Sync) -> Vec<Outcome> {
    let next = AtomicU64::new(seeds.start);
    let worker = || {
        let mut broken = Vec::new();
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= seeds.end {
                return broken;
            }
            let outcome = healing::chaos(settings(seed));
            if !outcome.breaches.is_empty() {
                broken.push(outcome);
            }
        }
    };
    std::thread::scope(|scope| {
        let workers = [scope.spawn(worker), scope.spawn(worker)];
        workers.into_iter().flat_map(|worker| worker.join().unwrap()).collect()
    })
}

#[test]
fn nothing_breaks_in_200_runs_of_chaos() {
    let broken = broken(1..201, settings);
    let told: Vec<String> =
        broken.iter().map(|outcome| format!("{}\n    {:?}", outcome.replay, outcome.breaches)).collect();
    assert!(broken.is_empty(), "{}", told.join("\n"));
}

#[test]
fn the_same_seed_gives_the_same_run_and_another_seed_another() {
    let [one, same, other] = [3, 3, 4].map(|seed| healing::chaos(settings(seed)));
    assert!(one.events > 1_000);
    assert_eq!(one, same);
    assert_ne!(one.trace, other.trace);
}
