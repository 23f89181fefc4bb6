//! What a cluster costs and how fast it is: the figures of `--faults standard`.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv6Addr};
use std::time::Duration;

use mesh_core::node::Node;
use mesh_core::time::Time;
use mesh_keys::NodeId;

use crate::settings::{Chance, NetworkSettings, Settings};
use crate::world::World;

/// Changes of a record that are followed.
const CHANGES: usize = 200;

/// Pause between two of them.
const CHANGE_EVERY: Duration = Duration::from_millis(500);

/// Crashes that are followed.
const CRASHES: usize = 5;

/// How long the network is split.
const SPLIT: Duration = Duration::from_secs(120);

/// How long a figure is waited for.
const LIMIT: Duration = Duration::from_secs(300);

/// Loss, and share of slow hosts, while it is counted how often a live node is called unreachable.
const BAD_NETWORK: (Chance, Chance) = (500, 500);

/// The figures; what could not be had in time is absent.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Figures {
    /// Time in which 99 of 100 changes of a record were known to all.
    pub record_to_all_p99: Option<Duration>,
    /// Bytes of frames and datagrams that a node sends per second in peace.
    pub bytes_per_node: f64,
    /// The longest time until all knew of a crash.
    pub crash_known: Option<Duration>,
    /// Time until all views were equal after an even split.
    pub heal: Option<Duration>,
    /// How often a live node was called unreachable.
    pub false_unreachable: usize,
    /// What was broken meanwhile.
    pub breaches: usize,
}

/// A change of a record, and who does not have it yet.
pub struct Followed {
    host: usize,
    order: (u64, u64),
    since: Time,
    missing: BTreeSet<usize>,
}

/// Takes all figures.
///
/// # Errors
/// The cluster could not be made.
pub fn take(settings: Settings) -> Result<Figures, String> {
    let (nodes, span) = (settings.nodes, settings.span);
    let lossy = settings.network.loss > 0;
    let mut world = World::new(settings);
    world.converged()?;
    world.run(Duration::from_secs(60));
    let mut figures = Figures { record_to_all_p99: record_to_all(&mut world), ..Figures::default() };

    world.run(Duration::from_secs(30));
    let (before, quiet) = (world.sent, span.max(Duration::from_secs(60)));
    world.run(quiet);
    figures.bytes_per_node = (world.sent - before) as f64 / nodes as f64 / quiet.as_secs_f64();

    if lossy {
        figures.crash_known = crash_known(&mut world);
        figures.heal = heal(&mut world);
        figures.false_unreachable = false_unreachable(&mut world, quiet);
    }
    figures.breaches = world.breaches().len();
    Ok(figures)
}

fn record_to_all(world: &mut World) -> Option<Duration> {
    let nodes = world.hosts.len();
    for change in 0..CHANGES {
        let host = world.dice.below(nodes);
        world.change_record(host, change);
        world.run(CHANGE_EVERY);
    }
    world.run_until(LIMIT, Duration::from_secs(1), |world| world.followed.is_empty())?;
    let mut took = std::mem::take(&mut world.spread);
    took.sort_unstable();
    took.get((took.len() * 99).div_ceil(100).saturating_sub(1)).copied()
}

fn crash_known(world: &mut World) -> Option<Duration> {
    let mut longest = Duration::ZERO;
    for _ in 0..CRASHES {
        let at = world.dice.below(world.hosts.len());
        let id = world.hosts[at].id();
        world.power_off(at);
        let took = world.run_until(LIMIT, Duration::from_millis(500), |world| {
            world.hosts.iter().filter_map(|host| host.node()).all(|node| !node.is_reachable(&id))
        })?;
        longest = longest.max(took);
        world.start(at);
        world.run_until(LIMIT, Duration::from_secs(1), |world| doubts(world).is_empty());
    }
    Some(longest)
}

fn heal(world: &mut World) -> Option<Duration> {
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
    let took = world.run_until(LIMIT, Duration::from_millis(200), |world| {
        let mut sums = world.hosts.iter().filter_map(|host| host.node().and_then(Node::gossip_fingerprint));
        let first = sums.next();
        sums.all(|sum| Some(sum) == first)
    });
    world.run_until(LIMIT, Duration::from_secs(1), |world| doubts(world).is_empty());
    took
}

/// Live nodes that are called unreachable: by whom, and whom.
fn doubts(world: &World) -> BTreeSet<(usize, NodeId)> {
    let alive: Vec<NodeId> =
        world.hosts.iter().filter(|host| host.process.is_some()).map(|host| host.id()).collect();
    let doubted = |host: &crate::host::Host| -> Vec<(usize, NodeId)> {
        let Some(node) = host.node() else { return Vec::new() };
        let others = alive.iter().filter(|id| **id != host.id());
        others.filter(|id| !node.is_reachable(id)).map(|id| (host.at, *id)).collect()
    };
    world.hosts.iter().flat_map(doubted).collect()
}

fn false_unreachable(world: &mut World, span: Duration) -> usize {
    let (loss, slow) = BAD_NETWORK;
    world.network.lose_more(loss.saturating_sub(NetworkSettings::default().loss));
    for host in 0..world.hosts.len() {
        if world.dice.chance(slow) {
            world.network.slow_down(host, Duration::from_secs(1));
        }
    }
    let mut before = doubts(world);
    let mut count = 0;
    let end = world.now() + span;
    while world.now() < end {
        world.run(Duration::from_secs(1));
        let now = doubts(world);
        count += now.difference(&before).count();
        before = now;
    }
    count
}

impl World {
    /// A host gets one more address, and so a new record, which is followed.
    fn change_record(&mut self, host: usize, change: usize) {
        let mut facts = self.facts(host);
        let number = u16::try_from(change).unwrap_or_default();
        facts.addresses.push(IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 1, number)));
        self.tell(host, mesh_core::node::Input::Host(facts));
        let id = self.hosts[host].id();
        let Some(order) = self.order_at(host, &id) else { return };
        let missing = self.running().into_iter().filter(|other| *other != host).collect();
        self.followed.push(Followed { host, order, since: self.now(), missing });
    }

    fn order_at(&self, at: usize, id: &NodeId) -> Option<(u64, u64)> {
        Some(self.hosts[at].node()?.view()?.record(id)?.order())
    }

    /// The node of a host may have learned something.
    pub(crate) fn follow(&mut self, at: usize) {
        let now = self.now();
        let mut followed = std::mem::take(&mut self.followed);
        followed.retain_mut(|change| {
            if change.missing.contains(&at) {
                let id = self.hosts[change.host].id();
                if self.order_at(at, &id).is_some_and(|order| order >= change.order) {
                    change.missing.remove(&at);
                }
            }
            let done = change.missing.is_empty();
            if done {
                self.spread.push(now.since(change.since));
            }
            !done
        });
        self.followed = followed;
    }
}
