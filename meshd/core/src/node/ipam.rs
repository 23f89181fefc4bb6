//! Who owns which addresses, for `meshctl status ipam`, and what helps a node that has run out.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use mesh_keys::IdentityKey;

use super::Node;
use super::attach::LOW_WATER;
use crate::api::{ApiError, ConflictStatus, ErrorCode, IpamStatus, OwnerStatus, UsageStatus};
use crate::leases::NoFreeAddress;
use crate::ranges::RangeSet;
use crate::view::{NodeRecord, View};

impl Node {
    pub(super) fn ipam_status(&self) -> Option<IpamStatus> {
        let view = self.view.as_ref()?;
        // Every member has an IPv6 prefix, also one that owns no IPv4 addresses yet.
        let mut owners: BTreeMap<IdentityKey, RangeSet> =
            view.records().map(|(_, record)| (record.node, RangeSet::new())).collect();
        owners.extend(view.grants().owners().into_iter().filter(|(_, owned)| !owned.is_empty()));
        let mut owners: Vec<OwnerStatus> =
            owners.into_iter().map(|(key, owned)| self.owner_status(view, &key, &owned)).collect();
        owners.sort_by(|a, b| b.ipv4_addresses.cmp(&a.ipv4_addresses).then_with(|| a.id.cmp(&b.id)));
        let usage = self.usage();
        let conflict = |conflict: &crate::view::GrantConflict| ConflictStatus {
            granter: conflict.granter.to_string(),
            range: conflict.range,
            loser: conflict.loser.to_string(),
        };
        Some(IpamStatus {
            ipv4: view.genesis().ipv4_range(),
            ipv6: view.genesis().ipv6_range(),
            block_prefix: view.genesis().block_prefix(),
            owners,
            shortage: (usage.free < LOW_WATER && !self.is_leaving()).then(|| self.what_helps(view)),
            usage,
            conflicts: view.grants().conflicts().iter().take(MAX_CONFLICTS).map(conflict).collect(),
        })
    }

    fn owner_status(&self, view: &View, key: &IdentityKey, owned: &RangeSet) -> OwnerStatus {
        let id = key.node_id();
        let record = view.record(&id);
        OwnerStatus {
            id: id.to_string(),
            name: record.map(|record| record.name.clone()),
            this_node: id == self.id,
            ipv4: owned.nets(),
            ipv4_addresses: owned.len(),
            ipv6: record.map(NodeRecord::ipv6_prefix),
        }
    }

    fn usage(&self) -> UsageStatus {
        let reserved = self.stored.mesh_ipv4.unwrap_or(Ipv4Addr::UNSPECIFIED);
        let usage = self.leases.usage(&self.owned(), reserved);
        let rest = self.leases.longest_rest(self.now);
        UsageStatus {
            usable: usage.total,
            own: usage.own,
            leased: usage.leased,
            resting: usage.resting,
            resting_seconds: rest.as_secs() + u64::from(rest.subsec_nanos() > 0),
            free: usage.free,
        }
    }

    /// Members that have one IPv6 prefix: nothing is sent to it.
    pub(super) fn prefix_problems(&self) -> Vec<String> {
        let contested = self.view.iter().flat_map(View::contested_prefixes);
        let describe = |(prefix, nodes): (
            &ipnet::Ipv6Net,
            &std::collections::BTreeSet<mesh_keys::NodeId>,
        )| {
            let nodes: Vec<String> = nodes.iter().map(mesh_keys::NodeId::short).collect();
            format!(
                "the nodes {} have the same IPv6 prefix {prefix}, which does not happen by chance: none of them can be reached by IPv6 until the others are removed",
                nodes.join(", ")
            )
        };
        contested.map(describe).collect()
    }

    /// The answer to an attach when every address is taken.
    pub(super) fn exhausted(&self, error: NoFreeAddress) -> ApiError {
        let help = self.view.as_ref().map(|view| self.what_helps(view)).unwrap_or_default();
        ApiError::new(ErrorCode::Exhausted, format!("{error}; {help}"))
    }

    /// The problem of a node that can lease nothing; `None` when it can.
    pub(super) fn exhaustion_problem(&self) -> Option<String> {
        let view = self.view.as_ref().filter(|_| self.usage().free == 0 && !self.is_leaving())?;
        Some(format!("no pod can be attached for want of an IPv4 address: {}", self.what_helps(view)))
    }

    /// Who may have free addresses, and how they get here. Which of its blocks another node uses, only that node
    /// knows; one that owns no more than the block it lives in hands nothing on.
    pub(super) fn what_helps(&self, view: &View) -> String {
        let range = view.genesis().ipv4_range();
        let block = 1u64 << (32 - view.genesis().block_prefix());
        let mut rich: Vec<(u64, IdentityKey)> = view
            .grants()
            .owners()
            .into_iter()
            .map(|(key, owned)| (owned.len(), key))
            .filter(|(len, key)| *len > block && *key != self.me)
            .collect();
        rich.sort_by(|a, b| b.0.cmp(&a.0).then_with(|| a.1.cmp(&b.1)));
        rich.truncate(NAMED);
        if rich.is_empty() {
            return format!(
                "no other node owns more of the cluster's range {range} than the block it lives in, so none can hand one on: delete pods here, or found the cluster anew with a wider --range"
            );
        }
        let reachable = rich.iter().any(|(_, key)| self.is_reachable(&key.node_id()));
        let names: Vec<String> = rich
            .into_iter()
            .map(|(len, key)| {
                let id = key.node_id();
                let name = view.record(&id).map_or("a node", |record| record.name.as_str());
                format!("{name} ({}) owns {len}", id.short())
            })
            .collect();
        let names = names.join(", ");
        if reachable {
            format!(
                "of the cluster's range {range}, {names}: free blocks of these are asked for, so try again in a few seconds; if it stays like this, all of theirs are in use, and deleting pods helps"
            )
        } else {
            format!(
                "of the cluster's range {range}, {names}, but none of these can be reached: is port {} open between the hosts, UDP and TCP, and does meshd run there?",
                self.config.control_port
            )
        }
    }
}

/// Conflicts that a status lists.
const MAX_CONFLICTS: usize = 100;

/// Owners that a sentence names.
const NAMED: usize = 3;
