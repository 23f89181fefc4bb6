//! Random faults of all kinds, and what must hold meanwhile and afterwards.
//!
//! 200 seeds at 5 to 10 nodes and 25 seconds of faults each: 125 s of processor time with the `dev` profile, about a
//! minute on two idle cores. More of it: `cargo xtask sim --faults chaos --seeds 1..1001 --minutes 5`.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test fails by panicking, and tells what it measured"
)]

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use mesh_sim::healing::{self, Outcome};
use mesh_sim::settings::{Fault, Settings};

/// Runs many seeds on two threads, and returns those with breaches, and how often the exception of P2 for copies of a disk
/// was made use of.
fn broken(seeds: std::ops::Range<u64>, settings: impl Fn(u64) -> Settings + Sync) -> (Vec<Outcome>, usize) {
    let next = AtomicU64::new(seeds.start);
    let excused = AtomicUsize::new(0);
    let worker = || {
        let mut broken = Vec::new();
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= seeds.end {
                return broken;
            }
            let outcome = healing::chaos(settings(seed));
            excused.fetch_add(outcome.excused, Ordering::Relaxed);
            if !outcome.breaches.is_empty() {
                broken.push(outcome);
            }
        }
    };
    let broken = std::thread::scope(|scope| {
        let workers = [scope.spawn(worker), scope.spawn(worker)];
        workers.into_iter().flat_map(|worker| worker.join().unwrap()).collect()
    });
    (broken, excused.into_inner())
}

#[test]
fn nothing_breaks_in_200_runs_of_chaos() {
    let (broken, excused) = broken(1..201, Settings::short);
    println!("addresses in use at two copies of one disk that reached no common member: {excused}");
    let told: Vec<String> =
        broken.iter().map(|outcome| format!("{}\n    {:?}", outcome.replay, outcome.breaches)).collect();
    assert!(broken.is_empty(), "{}", told.join("\n"));
}

#[test]
fn the_same_seed_gives_the_same_run_and_another_seed_another() {
    let [one, same, other] = [3, 3, 4].map(|seed| healing::chaos(Settings::short(seed)));
    assert!(one.events > 1_000);
    assert_eq!(one, same);
    assert_ne!(one.trace, other.trace);
}

#[test]
fn in_an_anchored_cluster_operators_remove_members_with_the_admin_key() {
    let faults = vec![Fault::LostDisk, Fault::Remove];
    let outcome = healing::chaos(Settings { anchored: true, faults, ..Settings::short(7) });
    assert_eq!(outcome.breaches, []);
    assert!(outcome.trail.iter().any(|line| line.contains("has removed")), "{:?}", outcome.trail);
}

#[test]
fn nothing_but_joining_depends_on_the_wall_clock() {
    let about_time = [Fault::ClockStep, Fault::JoinWindow, Fault::Token, Fault::Intruder];
    let run = |wall_clock| {
        let mut settings = Settings { wall_clock, ..Settings::short(6) };
        settings.faults.retain(|fault| !about_time.contains(fault));
        healing::chaos(settings)
    };
    let (now, long_ago) = (run(1_750_000_000), run(86_400));
    assert!(now.events > 1_000 && now.breaches.is_empty());
    assert_eq!(now.trace, long_ago.trace);
}
