//! Sets of IPv4 addresses, kept as disjoint intervals.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;

/// A set of IPv4 addresses. Equal sets compare equal however they were built.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RangeSet {
    /// First address → last address, both inclusive; neither overlapping nor adjacent.
    spans: BTreeMap<u32, u32>,
}

impl RangeSet {
    /// The empty set.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds all addresses of `net`.
    pub fn insert(&mut self, net: Ipv4Net) {
        let (mut first, mut last) = bounds(net);
        let touching: Vec<u32> = self
            .spans
            .range(..=last.saturating_add(1))
            .rev()
            .take_while(|(_, end)| end.saturating_add(1) >= first)
            .map(|(start, _)| *start)
            .collect();
        for start in touching {
            if let Some(end) = self.spans.remove(&start) {
                first = first.min(start);
                last = last.max(end);
            }
        }
        self.spans.insert(first, last);
    }

    /// Removes all addresses of `net`.
    pub fn remove(&mut self, net: Ipv4Net) {
        let (first, last) = bounds(net);
        let touched: Vec<(u32, u32)> = self
            .spans
            .range(..=last)
            .rev()
            .take_while(|(_, end)| **end >= first)
            .map(|(start, end)| (*start, *end))
            .collect();
        for (start, end) in touched {
            self.spans.remove(&start);
            if start < first {
                self.spans.insert(start, first - 1);
            }
            if end > last {
                self.spans.insert(last + 1, end);
            }
        }
    }

    /// Adds all addresses of `other`.
    pub fn union(&mut self, other: &Self) {
        for net in other.nets() {
            self.insert(net);
        }
    }

    /// Removes all addresses of `other`.
    pub fn subtract(&mut self, other: &Self) {
        for net in other.nets() {
            self.remove(net);
        }
    }

    /// Keeps only the addresses that are in `net` too.
    pub fn intersect(&mut self, net: Ipv4Net) {
        let (first, last) = bounds(net);
        self.spans = self
            .spans
            .iter()
            .filter(|(start, end)| **start <= last && **end >= first)
            .map(|(start, end)| ((*start).max(first), (*end).min(last)))
            .collect();
    }

    /// Whether the set has no address.
    pub fn is_empty(&self) -> bool {
        self.spans.is_empty()
    }

    /// Number of addresses.
    pub fn len(&self) -> u64 {
        self.spans.iter().map(|(start, end)| u64::from(end - start) + 1).sum()
    }

    /// Whether `address` is in the set.
    pub fn contains(&self, address: Ipv4Addr) -> bool {
        let bits = u32::from(address);
        self.spans.range(..=bits).next_back().is_some_and(|(_, end)| *end >= bits)
    }

    /// Whether every address of `net` is in the set.
    pub fn covers(&self, net: Ipv4Net) -> bool {
        let (first, last) = bounds(net);
        self.spans.range(..=first).next_back().is_some_and(|(_, end)| *end >= last)
    }

    /// The set as the fewest prefixes, in ascending order.
    pub fn nets(&self) -> Vec<Ipv4Net> {
        let mut nets = Vec::new();
        for (&start, &end) in &self.spans {
            let mut at = u64::from(start);
            let end = u64::from(end);
            while at <= end {
                let aligned = if at == 0 { 32 } else { at.trailing_zeros().min(32) };
                let fitting = (end - at + 1).ilog2();
                let bits = aligned.min(fitting);
                let prefix = u8::try_from(32 - bits).unwrap_or(32);
                let address = u32::try_from(at).map(Ipv4Addr::from).ok();
                nets.extend(address.and_then(|address| Ipv4Net::new(address, prefix).ok()));
                at += 1u64 << bits;
            }
        }
        nets
    }

    /// The addresses at or after `from`, in ascending order, then the ones before it.
    pub fn addresses_from(&self, from: Ipv4Addr) -> impl Iterator<Item = Ipv4Addr> {
        let from = u32::from(from);
        let after = self
            .spans
            .iter()
            .filter(move |(_, end)| **end >= from)
            .flat_map(move |(start, end)| (*start).max(from)..=*end);
        let before = self
            .spans
            .iter()
            .filter(move |(start, _)| **start < from)
            .flat_map(move |(start, end)| *start..=(*end).min(from - 1));
        after.chain(before).map(Ipv4Addr::from)
    }

    /// The first aligned prefix of length `prefix` that is wholly in the set, highest address first:
    /// a granter gives from the far end and keeps its own addresses together.
    pub fn last_net(&self, prefix: u8) -> Option<Ipv4Net> {
        let size = 1u64 << 32u8.checked_sub(prefix)?;
        self.spans.iter().rev().find_map(|(&start, &end)| {
            let at = ((u64::from(end) + 1) / size).checked_mul(size)?.checked_sub(size)?;
            (at >= u64::from(start))
                .then(|| Ipv4Net::new(Ipv4Addr::from(u32::try_from(at).ok()?), prefix).ok())?
        })
    }
}

impl FromIterator<Ipv4Net> for RangeSet {
    fn from_iter<I: IntoIterator<Item = Ipv4Net>>(nets: I) -> Self {
        let mut set = Self::new();
        for net in nets {
            set.insert(net);
        }
        set
    }
}

fn bounds(net: Ipv4Net) -> (u32, u32) {
    (u32::from(net.network()), u32::from(net.broadcast()))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    /// Prefixes inside 10.0.0.0/24, so that a set of plain addresses can be the reference.
    fn small_net() -> impl Strategy<Value = Ipv4Net> {
        (24u8..=32, any::<u8>())
            .prop_map(|(prefix, last)| Ipv4Net::new(Ipv4Addr::new(10, 0, 0, last), prefix).unwrap().trunc())
    }

    proptest! {
        #[test]
        fn behaves_as_a_set_of_addresses(ops in proptest::collection::vec((any::<bool>(), small_net()), 0..24)) {
            let mut set = RangeSet::new();
            let mut reference = BTreeSet::new();
            for (add, net) in ops {
                let hosts = (u32::from(net.network())..=u32::from(net.broadcast())).map(Ipv4Addr::from);
                if add {
                    set.insert(net);
                    reference.extend(hosts);
                } else {
                    set.remove(net);
                    hosts.for_each(|a| { reference.remove(&a); });
                }
                prop_assert_eq!(set.len(), reference.len() as u64);
            }
            let listed: BTreeSet<_> = set.addresses_from(Ipv4Addr::new(10, 0, 0, 77)).collect();
            prop_assert_eq!(&listed, &reference);
            let rebuilt: RangeSet = set.nets().into_iter().collect();
            prop_assert_eq!(&rebuilt, &set);
            for last in 0..=255u8 {
                let address = Ipv4Addr::new(10, 0, 0, last);
                prop_assert_eq!(set.contains(address), reference.contains(&address));
            }
            for prefix in 24..=32u8 {
                let found = set.last_net(prefix);
                if let Some(net) = found {
                    prop_assert!(set.covers(net));
                    prop_assert_eq!(net.prefix_len(), prefix);
                }
                let any = (0..=255u8).any(|last| {
                    set.covers(Ipv4Net::new(Ipv4Addr::new(10, 0, 0, last), prefix).unwrap().trunc())
                });
                prop_assert_eq!(found.is_some(), any);
            }
        }
    }

    #[test]
    fn the_whole_address_space_is_one_prefix() {
        let mut set = RangeSet::new();
        set.insert("0.0.0.0/0".parse().unwrap());
        assert_eq!(set.len(), 1 << 32);
        assert_eq!(set.nets(), ["0.0.0.0/0".parse().unwrap()]);
    }
}
