//! What the host's own networks mean for the mesh.
//!
//! A cluster's range that the host uses for something else is refused before anything is set up: a node that would
//! found the cluster, or belongs to it already, ends; one that has just joined, and heard of the range only then,
//! stays and says so, but sets up nothing until the overlap is gone. Once the mesh is in force on the host, an
//! overlap that appears is told and nothing is taken away: pods that talk would lose more than they can gain.

use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net};
use mesh_keys::Genesis;

use super::{HostFacts, Node, Output};
use crate::overlap::{describe, unclaimed};

impl Node {
    pub(super) fn on_host(&mut self, facts: HostFacts) {
        let known = self.host.as_ref();
        if known == Some(&facts) {
            return;
        }
        // Other networks of the host say nothing of who can be reached.
        let moved = known.is_none_or(|known| {
            (&known.addresses, known.underlay_mtu) != (&facts.addresses, facts.underlay_mtu)
        });
        let lost =
            known.is_some_and(|known| known.addresses.iter().any(|had| !facts.addresses.contains(had)));
        if known.is_none() {
            self.standing.was_here = facts.bridge;
            self.remember_route_mtus(&facts.route_mtus);
        }
        self.host = Some(facts);
        if moved {
            self.dialer.reset_backoff();
            self.nats_host_changed(lost);
            self.mtus_host_changed();
        }
        self.refresh_record();
        self.check_overlap();
    }

    /// Looks whether the host's networks and the cluster's ranges overlap, and tells when that has changed.
    pub(super) fn check_overlap(&mut self) {
        let found = self.view.as_ref().zip(self.host.as_ref()).and_then(|(view, host)| {
            let claims = describe(ranges(view.genesis()), &host.prefixes)?;
            Some(format!(
                "the cluster's {claims}: remove that from this host, or found the cluster anew with another --range (the range of a cluster stays as its founder chose it)"
            ))
        });
        if found == self.overlap {
            return;
        }
        self.overlap = found;
        match (&self.overlap, self.kept_out()) {
            // It has just started: its first look at the host is what brought this.
            (Some(_), Some(overlap)) if self.was_member => self.refuse_host(overlap.to_owned()),
            (Some(_), Some(overlap)) => tracing::error!("nothing is set up on this host: {overlap}"),
            (Some(overlap), None) => tracing::warn!("{overlap}"),
            (None, _) => tracing::info!("nothing of this host overlaps with the cluster's ranges any more"),
        }
    }

    /// Why nothing may be set up on this host; `None` when something may, or is already.
    pub(super) fn kept_out(&self) -> Option<&str> {
        let overlap = self.overlap.as_deref()?;
        let closed = &self.host.as_ref()?.closed;
        let in_force = ranges(self.view.as_ref()?.genesis()).iter().all(|range| closed.contains(range));
        (self.revision == 0 && !in_force).then_some(overlap)
    }

    /// Why this node may not found a cluster with these ranges on this host.
    pub(super) fn founding_overlap(&self, genesis: &Genesis) -> Option<String> {
        let host = self.host.as_ref()?;
        let claims = describe(ranges(genesis), &host.prefixes)?;
        let range: Ipv4Net = genesis.ipv4_range();
        let ipv4 = host.prefixes.iter().any(|prefix| prefix.claims(IpNet::V4(range)));
        let advice = match unclaimed(range, &host.prefixes) {
            Some(other) if ipv4 => {
                format!(
                    "choose another one with --range on every host, such as {other}, or remove that from this host"
                )
            }
            None if ipv4 => {
                "choose another one with --range on every host, or remove that from this host".to_owned()
            }
            Some(_) | None => {
                "remove that from this host (the IPv6 range follows from the cluster's id)".to_owned()
            }
        };
        Some(format!("{claims}: {advice}"))
    }

    /// Whether an address is of the cluster's own ranges: what is sent there goes through tunnels.
    pub(super) fn is_of_cluster(&self, address: IpAddr) -> bool {
        let ranges = self.view.as_ref().map(|view| ranges(view.genesis()));
        ranges.is_some_and(|ranges| ranges.iter().any(|range| range.contains(&address)))
    }

    /// Ends the node: it cannot work on this host.
    pub(super) fn refuse_host(&mut self, reason: String) {
        self.refused = true;
        self.emit(Output::Refuse { reason });
    }
}

fn ranges(genesis: &Genesis) -> [IpNet; 2] {
    [IpNet::V4(genesis.ipv4_range()), IpNet::V6(genesis.ipv6_range())]
}
