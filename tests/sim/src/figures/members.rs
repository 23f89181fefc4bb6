//! How long it takes a newcomer to be a member, and a removed member to be none.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use mesh_core::host::{HostState, Route};
use mesh_core::node::MAX_CALLS;
use mesh_core::time::Time;

use super::spread::Followed;
use super::{LIMIT, p99};
use crate::model::SECRET;
use crate::world::World;

/// Newcomers that are followed, and the pause between two.
const NEWCOMERS: usize = 50;
const NEWCOMER_EVERY: Duration = Duration::from_secs(1);

/// Members that are removed, at most, and tunnels whose end is enough for a figure.
const REMOVED: usize = 5;
const ENOUGH: usize = 5_000;

/// Pause between two removals.
const REMOVAL_EVERY: Duration = Duration::from_secs(10);

/// How often it is looked at what the kernels hold.
const LOOK: Duration = Duration::from_millis(20);

/// New hosts start: how long it takes until they have their first tunnel, and until all have their records, each 99
/// of 100.
pub(super) fn join(world: &mut World) -> Option<(Duration, Duration)> {
    let begun = world.now();
    let mut waiting: BTreeMap<usize, Time> = BTreeMap::new();
    let (mut started, mut first_tunnels) = (0, Vec::new());
    // Where members do not call each other, newcomers call all of them.
    world.max_calls = MAX_CALLS;
    while started < NEWCOMERS || !waiting.is_empty() || !world.followed.is_empty() {
        let now = world.now();
        if now.since(begun) > LIMIT {
            return None;
        }
        if started < NEWCOMERS && now >= begun + NEWCOMER_EVERY * u32::try_from(started).unwrap_or(u32::MAX) {
            started += 1;
            let seed = world.dice.below(world.settings.nodes);
            let at = world.add_host(vec![seed], SECRET, None);
            world.start(at);
            waiting.insert(at, now);
            let missing = (0..world.settings.nodes).collect();
            world.followed.push(Followed { host: at, order: None, since: now, missing });
        }
        world.run(LOOK);
        let now = world.now();
        waiting.retain(|at, since| {
            let waits = !has_tunnel(&world.hosts[*at].kernel);
            if !waits {
                first_tunnels.push(now.since(*since));
            }
            waits
        });
    }
    Some((p99(first_tunnels)?, p99(std::mem::take(&mut world.spread))?))
}

/// Whether a route leads into a tunnel: both ends have its key.
fn has_tunnel(kernel: &HostState) -> bool {
    let lane = |route: &Route| match route {
        Route::Devices { devices, .. } => {
            devices.iter().filter_map(|device| kernel.lanes.get(device)).any(|lane| !lane.peers.is_empty())
        }
        Route::Unreachable => false,
    };
    kernel.routes.values().any(lane)
}

/// How many members of a cluster of `nodes` are removed.
pub(super) fn removed(nodes: usize) -> usize {
    REMOVED.min(nodes / 4).min((ENOUGH / nodes.max(1)).max(1))
}

/// Members are removed that all have a tunnel to: how long it takes until that is gone, 99 of 100.
pub(super) fn removal(world: &mut World, subjects: &[usize]) -> Option<Duration> {
    let mut took = Vec::new();
    for subject in subjects {
        let (id, key) = (world.hosts[*subject].id(), world.hosts[*subject].disk.lane_key);
        let has = |world: &World, at: usize| {
            world.hosts[at].kernel.lanes.values().any(|lane| lane.peers.contains_key(&key))
        };
        let others = (0..world.hosts.len()).filter(|at| at != subject && has(world, *at));
        let mut waiting: BTreeSet<usize> = others.collect();
        if waiting.len() + 1 + took.len() / world.hosts.len() < world.hosts.len() - subjects.len() {
            // They were meant to have one.
            return None;
        }
        let by = (0..world.hosts.len()).find(|at| !subjects.contains(at))?;
        let since = world.now();
        world.ask_removal(by, id);
        while !waiting.is_empty() {
            if world.now().since(since) > LIMIT {
                return None;
            }
            world.run(LOOK);
            let (now, before) = (world.now(), waiting.len());
            waiting.retain(|at| has(world, *at));
            took.extend(std::iter::repeat_n(now.since(since), before - waiting.len()));
        }
        world.run(REMOVAL_EVERY);
    }
    p99(took)
}
