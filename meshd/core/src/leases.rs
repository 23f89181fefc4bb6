//! The addresses this node has given to its pods.
//!
//! An address comes from the ranges that the node owns, and belongs to one attachment until that is released.
//! The IPv6 address of a pod is the node's /96 prefix with the pod's IPv4 address in the lowest 32 bits, so
//! one lease settles both. Addresses that end in 0 or 255 are left out: too much software takes them for
//! network or broadcast addresses. A released address rests for [`QUARANTINE`], and the search goes on where
//! it stopped, so that an address is not reused while someone still talks to its last owner. That holds across a
//! restart of the daemon, and of the host: what was leased when the host went down rests from its next start on.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use ipnet::{Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

use crate::api::{AttachRequest, AttachmentId, AttachmentState, MacAddr, NetnsId, PodIdentity};
use crate::ranges::RangeSet;
use crate::state::StoredLeases;
use crate::time::Time;

/// How long a released address rests.
pub const QUARANTINE: Duration = Duration::from_secs(60);

/// One attachment and its address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// The pod's IPv4 address.
    pub ipv4: Ipv4Addr,
    /// How far the attachment has come.
    pub state: AttachmentState,
    /// Path of the network namespace, as given.
    pub netns: String,
    /// Name of the CNI network.
    pub network: String,
    /// The pod, when the runtime told.
    pub pod: Option<PodIdentity>,
    /// Identity of the network namespace, when the plugin told.
    #[serde(skip)]
    pub netns_id: Option<NetnsId>,
}

impl Lease {
    /// The pod's Ethernet address: `0a:58` and the IPv4 address, unique on the node because that is.
    pub fn mac(&self) -> MacAddr {
        let [a, b, c, d] = self.ipv4.octets();
        MacAddr([0x0a, 0x58, a, b, c, d])
    }
}

/// The pod address below `prefix` that goes with `ipv4`.
pub fn ipv6_for(prefix: Ipv6Net, ipv4: Ipv4Addr) -> Ipv6Addr {
    Ipv6Addr::from(u128::from(prefix.network()) | u128::from(u32::from(ipv4)))
}

/// All leases of the node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Leases {
    leases: BTreeMap<AttachmentId, Lease>,
    resting: BTreeMap<Ipv4Addr, Time>,
    /// Where the next search starts.
    cursor: Option<Ipv4Addr>,
    /// Whether what is active has changed since somebody asked.
    changed: bool,
}

/// There is no free address in the node's ranges.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "this node has no free IPv4 address: of its {total}, {leased} are leased, {resting} rest for up to {} s after their release, and {own} is its own",
    QUARANTINE.as_secs()
)]
pub struct NoFreeAddress {
    /// Usable addresses of the node, free or not.
    pub total: u64,
    /// Those that are leased.
    pub leased: u64,
    /// Those at rest after a release.
    pub resting: u64,
    /// Those that the node itself has: one at most.
    pub own: u64,
}

/// How many of a node's usable IPv4 addresses are what; the last four add up to the first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// All that pods or the node itself could have.
    pub total: u64,
    /// The node's own: one at most.
    pub own: u64,
    /// Leased.
    pub leased: u64,
    /// At rest after a release.
    pub resting: u64,
    /// Can be leased now.
    pub free: u64,
}

impl Leases {
    /// The leases as they were stored. No pod outlives the `boot` of the host in which it was attached: when
    /// they are from another one, their addresses rest.
    pub fn restore(stored: StoredLeases, boot: &str, now: Time) -> Self {
        let StoredLeases { boot: stored_boot, leases, resting, namespaces } = stored;
        let mut leases: BTreeMap<AttachmentId, Lease> = leases.into_iter().collect();
        for (id, netns_id) in namespaces {
            if let Some(lease) = leases.get_mut(&id) {
                lease.netns_id = Some(netns_id);
            }
        }
        let mut resting: BTreeMap<Ipv4Addr, Time> = resting
            .into_iter()
            .map(|(address, seconds)| {
                // Never longer than at first, whatever the file says.
                (address, now + Duration::from_secs(seconds.into()).min(QUARANTINE))
            })
            .collect();
        let cursor = leases.values().map(|lease| lease.ipv4).chain(resting.keys().copied()).max();
        if stored_boot != boot {
            let gone = std::mem::take(&mut leases);
            resting.extend(gone.into_values().map(|lease| (lease.ipv4, now + QUARANTINE)));
        }
        Self { leases, resting, cursor, changed: true }
    }

    /// The leases and what rests, to be stored. There is no clock that outlives the host: what is stored is how long
    /// an address has still to rest, and that time begins anew with each restart.
    pub fn stored(&self, boot: &str, now: Time) -> StoredLeases {
        StoredLeases {
            boot: boot.to_owned(),
            leases: self.leases.iter().map(|(id, lease)| (id.clone(), lease.clone())).collect(),
            resting: self
                .resting
                .iter()
                .map(|(address, until)| (*address, until.since(now)))
                .filter(|(_, left)| !left.is_zero())
                .map(|(address, left)| (address, u32::try_from(left.as_secs() + 1).unwrap_or(u32::MAX)))
                .collect(),
            namespaces: self
                .leases
                .iter()
                .filter_map(|(id, lease)| Some((id.clone(), lease.netns_id?)))
                .collect(),
        }
    }

    /// Ends the rest of those that have rested for long enough.
    pub fn expire(&mut self, now: Time) {
        self.resting.retain(|_, until| *until > now);
    }

    /// Whether what is active has changed since the last call.
    pub fn take_changed(&mut self) -> bool {
        std::mem::take(&mut self.changed)
    }

    /// All leases.
    pub fn all(&self) -> &BTreeMap<AttachmentId, Lease> {
        &self.leases
    }

    /// Whether an attachment is there and active.
    pub fn is_active(&self, id: &AttachmentId) -> bool {
        self.leases.get(id).is_some_and(|lease| lease.state == AttachmentState::Active)
    }

    /// The lease of an attachment.
    pub fn get(&self, id: &AttachmentId) -> Option<&Lease> {
        self.leases.get(id)
    }

    /// Leases an address of `owned`, never `reserved` (the node's own). An attachment that has a lease keeps it.
    ///
    /// # Errors
    /// [`NoFreeAddress`]; nothing was changed.
    pub fn lease(
        &mut self,
        request: &AttachRequest,
        owned: &RangeSet,
        reserved: Ipv4Addr,
        now: Time,
    ) -> Result<&Lease, NoFreeAddress> {
        self.expire(now);
        let had =
            self.leases.get(&request.id).map(|lease| lease.ipv4).filter(|address| owned.contains(*address));
        let ipv4 = match had {
            Some(address) => address,
            None => self.find(owned, reserved).ok_or_else(|| self.none_free(owned, reserved))?,
        };
        self.cursor = Some(ipv4);
        let lease = Lease {
            ipv4,
            state: AttachmentState::Leased,
            netns: request.netns.clone(),
            network: request.network.clone(),
            pod: request.pod.clone(),
            netns_id: request.netns_id,
        };
        self.changed |= self.is_active(&request.id);
        let entry = self.leases.entry(request.id.clone()).insert_entry(lease);
        Ok(entry.into_mut())
    }

    /// Notes that an attachment is active, or no longer; `false` when there is none.
    pub fn set_state(&mut self, id: &AttachmentId, state: AttachmentState) -> bool {
        let Some(lease) = self.leases.get_mut(id) else { return false };
        self.changed |= lease.state != state;
        lease.state = state;
        true
    }

    /// Releases an attachment's address into quarantine.
    pub fn release(&mut self, id: &AttachmentId, now: Time) -> Option<Lease> {
        self.changed |= self.is_active(id);
        let lease = self.leases.remove(id)?;
        self.resting.insert(lease.ipv4, now + QUARANTINE);
        Some(lease)
    }

    /// Puts a lease back that was released and could not be stored.
    pub fn put_back(&mut self, id: AttachmentId, lease: Lease) {
        self.changed = true;
        self.resting.remove(&lease.ipv4);
        self.leases.insert(id, lease);
    }

    /// How many of the addresses of `owned` are what; `reserved` is the node's own.
    pub fn usage(&self, owned: &RangeSet, reserved: Ipv4Addr) -> Usage {
        let count = |addresses: &mut dyn Iterator<Item = Ipv4Addr>| {
            addresses.filter(|address| owned.contains(*address)).count() as u64
        };
        let total = usable(owned);
        let own = u64::from(owned.contains(reserved) && !odd(reserved));
        let leased = count(&mut self.leases.values().map(|lease| lease.ipv4));
        let resting = count(&mut self.resting.keys().copied());
        Usage { total, own, leased, resting, free: total.saturating_sub(own + leased + resting) }
    }

    /// How long until the last of the addresses at rest can be leased again.
    pub fn longest_rest(&self, now: Time) -> Duration {
        self.resting.values().max().map(|until| until.since(now)).unwrap_or_default()
    }

    /// Addresses of `owned` that could be leased now.
    pub fn free(&self, owned: &RangeSet, reserved: Ipv4Addr) -> u64 {
        self.usage(owned, reserved).free
    }

    /// Whether [`Leases::free`] are `least` or more.
    pub fn has_free(&self, least: u64, owned: &RangeSet, reserved: Ipv4Addr) -> bool {
        let most_taken = 1 + self.leases.len() + self.resting.len();
        usable(owned) >= least + most_taken as u64 || self.free(owned, reserved) >= least
    }

    fn none_free(&self, owned: &RangeSet, reserved: Ipv4Addr) -> NoFreeAddress {
        let Usage { total, own, leased, resting, free: _ } = self.usage(owned, reserved);
        NoFreeAddress { total, leased, resting, own }
    }

    /// The blocks (prefixes of length `prefix`) in which an address is in use or resting.
    pub fn blocks_in_use(&self, prefix: u8) -> RangeSet {
        let addresses = self.leases.values().map(|lease| lease.ipv4).chain(self.resting.keys().copied());
        addresses.filter_map(|address| Ipv4Net::new(address, prefix).ok()).map(|net| net.trunc()).collect()
    }

    /// The first address of `owned` that the node may have as its own: no pod has it, or had it lately.
    pub fn first_unused(&self, owned: &RangeSet) -> Option<Ipv4Addr> {
        let used: BTreeSet<Ipv4Addr> = self.leases.values().map(|lease| lease.ipv4).collect();
        let unused = |address: &Ipv4Addr| !used.contains(address) && !self.resting.contains_key(address);
        owned.addresses_from(Ipv4Addr::UNSPECIFIED).find(|address| !odd(*address) && unused(address))
    }

    fn find(&self, owned: &RangeSet, reserved: Ipv4Addr) -> Option<Ipv4Addr> {
        let used: BTreeSet<Ipv4Addr> = self.leases.values().map(|lease| lease.ipv4).collect();
        let from =
            self.cursor.and_then(|cursor| u32::from(cursor).checked_add(1)).map_or(reserved, Ipv4Addr::from);
        owned.addresses_from(from).find(|address| {
            !odd(*address)
                && *address != reserved
                && !used.contains(address)
                && !self.resting.contains_key(address)
        })
    }
}

fn odd(address: Ipv4Addr) -> bool {
    matches!(address.octets()[3], 0 | 255)
}

fn usable(owned: &RangeSet) -> u64 {
    // Counted by the /24 pieces, not by the address: a range may have a million of them.
    owned
        .spans()
        .map(|(first, last)| {
            let (first, last) = (u64::from(u32::from(first)), u64::from(u32::from(last)));
            let zeros = last / 256 + 1 - first.div_ceil(256);
            let ends = (last + 1) / 256 - first / 256;
            (last - first + 1).saturating_sub(zeros + ends)
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn request(n: u32) -> AttachRequest {
        AttachRequest {
            id: AttachmentId::new(format!("c{n}"), "eth0").unwrap(),
            netns: "/run/netns/x".into(),
            network: "mesh".into(),
            pod: None,
            netns_id: None,
        }
    }

    fn owned(nets: &[&str]) -> RangeSet {
        nets.iter().map(|net| net.parse().unwrap()).collect()
    }

    #[test]
    fn every_address_is_given_once_and_then_there_is_none() {
        let owned = owned(&["10.0.0.0/24"]);
        let own = Leases::default().first_unused(&owned).unwrap();
        let mut leases = Leases::default();
        let mut seen = std::collections::BTreeSet::from([own]);
        for n in 0..253 {
            assert_eq!(leases.free(&owned, own), u64::from(253 - n));
            assert!(seen.insert(leases.lease(&request(n), &owned, own, Time::ZERO).unwrap().ipv4));
        }
        let none = NoFreeAddress { total: 254, leased: 253, resting: 0, own: 1 };
        assert_eq!(leases.lease(&request(999), &owned, own, Time::ZERO), Err(none));
        assert_eq!(
            none.to_string(),
            "this node has no free IPv4 address: of its 254, 253 are leased, 0 rest for up to 60 s after their release, and 1 is its own"
        );
        assert!(seen.iter().all(|address| owned.contains(*address) && !odd(*address)));
    }

    #[test]
    fn a_released_address_rests_before_it_is_used_again() {
        let owned = owned(&["10.0.0.0/30"]);
        let own = Ipv4Addr::new(10, 0, 0, 1);
        let mut leases = Leases::default();
        let first = leases.lease(&request(1), &owned, own, Time::ZERO).unwrap().ipv4;
        leases.lease(&request(2), &owned, own, Time::ZERO).unwrap();
        leases.release(&request(1).id, Time::ZERO).unwrap();
        let soon = Time::ZERO + QUARANTINE / 2;
        assert!(leases.lease(&request(3), &owned, own, soon).is_err());
        let later = Time::ZERO + QUARANTINE;
        assert_eq!(leases.lease(&request(3), &owned, own, later).unwrap().ipv4, first);
    }

    #[test]
    fn what_a_pod_has_or_had_lately_is_not_for_the_node() {
        let owned = owned(&["10.32.1.0/24"]);
        let mut leases = Leases::default();
        for n in 0..4 {
            leases.lease(&request(n), &owned, Ipv4Addr::UNSPECIFIED, Time::ZERO).unwrap();
        }
        leases.release(&request(2).id, Time::ZERO).unwrap();
        assert_eq!(leases.first_unused(&owned), Some(Ipv4Addr::new(10, 32, 1, 5)));
    }

    #[test]
    fn asking_again_gives_the_same_address() {
        let owned = owned(&["10.0.0.0/24"]);
        let own = Ipv4Addr::new(10, 0, 0, 1);
        let mut leases = Leases::default();
        let first = leases.lease(&request(1), &owned, own, Time::ZERO).unwrap().ipv4;
        assert_eq!(leases.lease(&request(1), &owned, own, Time::ZERO).unwrap().ipv4, first);
        assert_eq!(leases.all().len(), 1);
    }

    #[test]
    fn a_restart_ends_no_rest_and_makes_none_longer_than_it_was_at_first() {
        let owned = owned(&["10.0.0.0/30"]);
        let own = Ipv4Addr::new(10, 0, 0, 1);
        let mut leases = Leases::default();
        let first = leases.lease(&request(1), &owned, own, Time::ZERO).unwrap().ipv4;
        leases.lease(&request(2), &owned, own, Time::ZERO).unwrap();
        leases.release(&request(1).id, Time::ZERO).unwrap();
        // Each restart begins a time of its own, and what was written last counts.
        let third = QUARANTINE / 3;
        for _ in 0..2 {
            let stored = leases.stored("boot", Time::ZERO + third);
            leases = Leases::restore(stored, "boot", Time::ZERO);
            assert!(leases.lease(&request(3), &owned, own, Time::ZERO).is_err());
        }
        assert!(
            leases.lease(&request(3), &owned, own, Time::ZERO + (third - Duration::from_secs(1))).is_err()
        );
        let done = Time::ZERO + third + Duration::from_secs(3);
        assert_eq!(leases.lease(&request(3), &owned, own, done).unwrap().ipv4, first);
        assert_eq!(leases.stored("boot", done).resting, []);
        let liar =
            StoredLeases { resting: vec![(first, u32::MAX)], boot: "boot".into(), ..Default::default() };
        let mut leases = Leases::restore(liar, "boot", Time::ZERO);
        leases.expire(Time::ZERO + QUARANTINE);
        assert_eq!(leases.usage(&owned, own).resting, 0);
    }

    #[test]
    fn what_was_leased_when_the_host_went_down_rests_at_its_next_start() {
        let owned = owned(&["10.0.0.0/30"]);
        let own = Ipv4Addr::new(10, 0, 0, 1);
        let mut leases = Leases::default();
        let first = leases.lease(&request(1), &owned, own, Time::ZERO).unwrap().ipv4;
        let stored = leases.stored("boot 1", Time::ZERO);
        let mut leases = Leases::restore(stored, "boot 2", Time::ZERO);
        assert!(leases.all().is_empty(), "no pod outlives the host");
        assert_ne!(leases.lease(&request(2), &owned, own, Time::ZERO).unwrap().ipv4, first);
        assert!(leases.lease(&request(3), &owned, own, Time::ZERO).is_err());
        let usage = Usage { total: 3, own: 1, leased: 1, resting: 1, free: 0 };
        assert_eq!(leases.usage(&owned, own), usage);
        assert_eq!(leases.lease(&request(3), &owned, own, Time::ZERO + QUARANTINE).unwrap().ipv4, first);
    }

    proptest! {
        #[test]
        fn the_count_of_usable_addresses_is_that_of_counting_them(
            nets in proptest::collection::vec((20u8..=32, any::<u16>()), 0..5)
        ) {
            let owned: RangeSet = nets
                .into_iter()
                .map(|(prefix, low)| Ipv4Net::new(Ipv4Addr::from(0x0a20_0000 | u32::from(low)), prefix).unwrap().trunc())
                .collect();
            let counted = owned.addresses_from(Ipv4Addr::UNSPECIFIED).filter(|a| !odd(*a)).count() as u64;
            prop_assert_eq!(usable(&owned), counted);
        }
    }
}
