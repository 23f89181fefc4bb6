//! How long it takes until all know something new.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv6Addr};
use std::time::Duration;

use mesh_core::time::Time;
use mesh_keys::NodeId;

use super::{LIMIT, p99};
use crate::world::World;

/// Changes of a record that are followed.
pub(super) const CHANGES: usize = 200;

/// Pause between two of them.
const CHANGE_EVERY: Duration = Duration::from_millis(500);

/// A record, if need be at least as new as a certain one, and who does not have it yet.
pub struct Followed {
    pub(super) host: usize,
    pub(super) order: Option<(u64, u64)>,
    pub(super) since: Time,
    pub(super) missing: BTreeSet<usize>,
}

pub(super) fn record_to_all(world: &mut World) -> Option<Duration> {
    let nodes = world.hosts.len();
    for change in 0..CHANGES {
        let host = world.dice.below(nodes);
        world.change_record(host, change);
        world.run(CHANGE_EVERY);
    }
    world.run_until(LIMIT, Duration::from_secs(1), |world| world.followed.is_empty())?;
    p99(std::mem::take(&mut world.spread))
}

impl World {
    /// A host gets one more address, and so a new record, which is followed.
    pub(super) fn change_record(&mut self, host: usize, change: usize) {
        let mut facts = self.facts(host);
        let number = u16::try_from(change).unwrap_or_default();
        facts.addresses.push(IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 1, number)));
        self.tell(host, mesh_core::node::Input::Host(facts));
        let id = self.hosts[host].id();
        let Some(order) = self.order_at(host, &id) else { return };
        let missing = self.running().into_iter().filter(|other| *other != host).collect();
        self.followed.push(Followed { host, order: Some(order), since: self.now(), missing });
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
                if self.order_at(at, &id).is_some_and(|order| Some(order) >= change.order) {
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
