//! How soon it is known that a node is gone, how soon a split is overcome, and how often a live node is given up.

use std::collections::BTreeSet;
use std::time::Duration;

use mesh_core::node::Node;
use mesh_keys::NodeId;

use super::LIMIT;
use super::spread::CHANGES;
use crate::settings::{Chance, NetworkSettings};
use crate::world::World;

/// Crashes that are followed.
const CRASHES: usize = 5;

/// How long the network is split.
const SPLIT: Duration = Duration::from_secs(120);

/// Loss, and share of slow hosts, while it is counted how often a live node is called unreachable.
const BAD_NETWORK: (Chance, Chance) = (500, 500);

/// A slow host handles what arrives up to so much later.
const SLOWNESS: Duration = Duration::from_secs(1);

pub(super) fn crash_known(world: &mut World) -> Option<Duration> {
    let mut longest = Duration::ZERO;
    for _ in 0..CRASHES {
        settle(world);
        let at = world.dice.below(world.hosts.len());
        let id = world.hosts[at].id();
        world.power_off(at);
        let took = world.run_until(LIMIT, Duration::from_millis(500), |world| {
            world.hosts.iter().filter_map(|host| host.node()).all(|node| !node.is_reachable(&id))
        })?;
        longest = longest.max(took);
        world.start(at);
    }
    Some(longest)
}

/// Waits until nobody takes a live node for unreachable.
fn settle(world: &mut World) {
    world.run_until(LIMIT, Duration::from_secs(1), |world| doubts(world).is_empty());
}

pub(super) fn heal(world: &mut World) -> Option<Duration> {
    let parts = (0..world.hosts.len()).map(|host| (host, host % 2)).collect();
    world.network.split(parts, world.now());
    world.network_changed();
    for change in 0..10 {
        let host = world.dice.below(world.hosts.len());
        world.change_record(host, CHANGES + change);
        world.run(SPLIT / 10);
    }
    world.network.heal(world.now());
    world.network_changed();
    world.run_until(LIMIT, Duration::from_millis(200), |world| {
        let mut sums = world.hosts.iter().filter_map(|host| host.node().and_then(Node::gossip_fingerprint));
        let first = sums.next();
        sums.all(|sum| Some(sum) == first)
    })
}

/// Live nodes that are called unreachable: by whom, and whom.
fn doubts(world: &World) -> BTreeSet<(usize, NodeId)> {
    let alive: BTreeSet<NodeId> =
        world.hosts.iter().filter(|host| host.process.is_some()).map(|host| host.id()).collect();
    let of = |host: &crate::host::Host| {
        let doubted = host.node().map(Node::unreachable).unwrap_or_default();
        let at = host.at;
        doubted.into_iter().filter(|id| alive.contains(id)).map(move |id| (at, id)).collect::<Vec<_>>()
    };
    world.hosts.iter().flat_map(of).collect()
}

/// How often a live node is called unreachable by another one. There is at least one slow host.
pub(super) fn false_unreachable(world: &mut World, span: Duration) -> u64 {
    settle(world);
    let (loss, slow) = BAD_NETWORK;
    world.network.lose_more(loss.saturating_sub(NetworkSettings::default().loss));
    let hosts = world.hosts.len();
    let count = (hosts * slow as usize).div_ceil(10_000);
    let mut slow: BTreeSet<usize> = BTreeSet::new();
    while slow.len() < count {
        slow.insert(world.dice.below(hosts));
    }
    for host in &slow {
        world.network.slow_down(*host, SLOWNESS);
    }
    let given_up = |world: &World| -> u64 {
        world.hosts.iter().filter_map(|host| host.node()).map(Node::given_up).sum()
    };
    let before = given_up(world);
    world.run(span);
    let count = given_up(world) - before;
    slow.iter().for_each(|host| world.network.slow_down(*host, Duration::ZERO));
    world.network.lose_more(0);
    count
}
