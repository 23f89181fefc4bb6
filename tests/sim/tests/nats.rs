//! Hosts behind NATs of every kind, and who of them needs a relay.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test fails by panicking, and tells what it measured"
)]

use std::time::Duration;

use mesh_sim::faults::Relief;
use mesh_sim::model::SECRET;
use mesh_sim::nat::{NatKind, meet_directly};
use mesh_sim::queue::Event;
use mesh_sim::settings::Settings;
use mesh_sim::world::World;

const SECOND: Duration = Duration::from_secs(1);

const PUBLIC: usize = 3;

/// Two hosts behind NATs of each kind, and some that are behind none.
fn world(seed: u64) -> World {
    let kinds: Vec<Option<NatKind>> =
        [None; PUBLIC].into_iter().chain(NatKind::all().flat_map(|kind| [Some(kind); 2])).collect();
    let settings = Settings { tunnels: true, ..Settings::calm(kinds.len(), seed, Duration::ZERO) };
    let mut world = World::new(settings);
    let seeds: Vec<usize> = (0..PUBLIC).collect();
    for (at, nat) in kinds.into_iter().enumerate() {
        world.add_host(seeds.clone(), SECRET, nat);
        world.queue.put(Duration::from_millis(100 * at as u64), at, 0, Event::Relief(Relief::Start));
    }
    world
}

fn pairs(world: &World) -> Vec<(usize, usize)> {
    let count = world.hosts.len();
    (0..count).flat_map(|a| (0..count).filter(move |b| *b != a).map(move |b| (a, b))).collect()
}

/// Whether two hosts get to each other without a relay.
fn may_meet(world: &World, a: usize, b: usize) -> bool {
    match (world.network.nat(a), world.network.nat(b)) {
        (Some(a), Some(b)) => meet_directly(a, b),
        _ => true,
    }
}

/// Which tunnels take another way than they should.
fn astray(world: &World) -> Vec<String> {
    let wrong = pairs(world).into_iter().filter(|(a, b)| world.is_relayed(*a, *b) == may_meet(world, *a, *b));
    let tell = |(a, b)| {
        let relayed = world.is_relayed(a, b);
        format!(
            "host{a} {:?} to host{b} {:?}: relayed: {relayed}",
            world.network.nat(a),
            world.network.nat(b)
        )
    };
    wrong.map(tell).collect()
}

/// Runs until everybody is connected with everybody by the best way there is; how long that took.
fn settle(world: &mut World, limit: Duration) -> Duration {
    let is_done = |world: &mut World| world.is_whole().is_ok() && astray(world).is_empty();
    world.run_until(limit, SECOND, is_done).unwrap_or_else(|| {
        panic!("not after {limit:?}: {:?}\n{}", world.is_whole(), astray(world).join("\n"))
    })
}

#[test]
fn who_can_meet_does_and_all_others_have_a_relay() {
    for seed in 1..6 {
        let mut world = world(seed);
        let took = settle(&mut world, 120 * SECOND);
        println!("seed {seed}: everybody on the best way after {took:?}");
        world.run(60 * SECOND);
        assert_eq!(astray(&world), Vec::<String>::new(), "and so it stays");
        assert_eq!(world.is_whole(), Ok(()));
        assert!(world.model.breaches.is_empty(), "{:?}", world.model.breaches);
    }
}

#[test]
fn nats_that_forget_everything_are_opened_again() {
    for seed in 11..14 {
        let mut world = world(seed);
        settle(&mut world, 120 * SECOND);
        for _ in 0..3 {
            world.network.reboot_nats();
            // What was in use has ended everywhere.
            world.run(5 * SECOND);
            let took = settle(&mut world, 120 * SECOND);
            println!("seed {seed}: everybody on the best way again after {took:?}");
        }
        assert!(world.model.breaches.is_empty(), "{:?}", world.model.breaches);
    }
}
