//! Sets of IPv4 addresses, kept as disjoint intervals.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;

/// A set of IPv4 addresses. Equal sets compare equal however they were built.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RangeSet {
    /// First and last addresses, both inclusive; ascending, neither overlapping nor adjacent. Most sets have one.
    spans: Vec<(u32, u32)>,
}

impl RangeSet {
    /// The empty set.
    pub fn new() -> Self {
        Self::default()
    }

    /// The addresses of all `sets`.
    pub fn of_all<'a>(sets: impl IntoIterator<Item = &'a Self>) -> Self {
        Self::of_spans(sets.into_iter().flat_map(|set| set.spans.iter().copied()).collect())
    }

    fn of_spans(mut spans: Vec<(u32, u32)>) -> Self {
        spans.sort_unstable();
        spans.dedup_by(|(first, last), (_, end)| {
            let touching = *first <= end.saturating_add(1);
            if touching {
                *end = (*end).max(*last);
            }
            touching
        });
        Self { spans }
    }

    /// Adds all addresses of `net`.
    pub fn insert(&mut self, net: Ipv4Net) {
        let (mut first, mut last) = bounds(net);
        let touching = self.overlapping(first.saturating_sub(1), last.saturating_add(1));
        if let Some(spans) = self.spans.get(touching.clone())
            && let (Some((start, _)), Some((_, end))) = (spans.first(), spans.last())
        {
            first = first.min(*start);
            last = last.max(*end);
        }
        self.spans.splice(touching, [(first, last)]);
    }

    /// Removes all addresses of `net`.
    pub fn remove(&mut self, net: Ipv4Net) {
        let (first, last) = bounds(net);
        self.remove_span(first, last);
    }

    fn remove_span(&mut self, first: u32, last: u32) {
        let touched = self.overlapping(first, last);
        let Some(spans) = self.spans.get(touched.clone()) else { return };
        let before = spans.first().filter(|(start, _)| *start < first).map(|(start, _)| (*start, first - 1));
        let after = spans.last().filter(|(_, end)| *end > last).map(|(_, end)| (last + 1, *end));
        self.spans.splice(touched, before.into_iter().chain(after));
    }

    /// Places of the spans that have addresses from `first` to `last`.
    fn overlapping(&self, first: u32, last: u32) -> std::ops::Range<usize> {
        let start = self.spans.partition_point(|(_, end)| *end < first);
        let end = self.spans.partition_point(|(start, _)| *start <= last);
        start..end.max(start)
    }

    /// Adds all addresses of `other`.
    pub fn union(&mut self, other: &Self) {
        *self = Self::of_all([&*self, other]);
    }

    /// Removes all addresses of `other`.
    pub fn subtract(&mut self, other: &Self) {
        let (Some((first, _)), Some((_, last))) = (self.spans.first(), self.spans.last()) else { return };
        for (start, end) in other.spans.get(other.overlapping(*first, *last)).into_iter().flatten() {
            self.remove_span(*start, *end);
        }
    }

    /// Those of the addresses that are in `net` too.
    #[must_use]
    pub fn within(&self, net: Ipv4Net) -> Self {
        let (first, last) = bounds(net);
        let spans = self.spans.get(self.overlapping(first, last)).into_iter().flatten();
        Self { spans: spans.map(|(start, end)| ((*start).max(first), (*end).min(last))).collect() }
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
        self.spans.get(self.overlapping(bits, bits)).is_some_and(|spans| !spans.is_empty())
    }

    /// Whether every address of `net` is in the set.
    pub fn covers(&self, net: Ipv4Net) -> bool {
        let (first, last) = bounds(net);
        let spans = self.spans.get(self.overlapping(first, last)).unwrap_or_default();
        spans.first().is_some_and(|(start, end)| *start <= first && *end >= last)
    }

    /// The first and the last address of each interval, both in the set; ascending.
    pub fn spans(&self) -> impl Iterator<Item = (Ipv4Addr, Ipv4Addr)> {
        self.spans.iter().map(|(first, last)| (Ipv4Addr::from(*first), Ipv4Addr::from(*last)))
    }

    /// The set as the fewest prefixes, in ascending order.
    pub fn nets(&self) -> Vec<Ipv4Net> {
        let mut nets = Vec::new();
        for &(start, end) in &self.spans {
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
            .filter(move |(_, end)| *end >= from)
            .flat_map(move |(start, end)| (*start).max(from)..=*end);
        let before = self
            .spans
            .iter()
            .filter(move |(start, _)| *start < from)
            .flat_map(move |(start, end)| *start..=(*end).min(from - 1));
        after.chain(before).map(Ipv4Addr::from)
    }

    /// The first aligned prefix of length `prefix` that is wholly in the set, highest address first:
    /// a granter gives from the far end and keeps its own addresses together.
    pub fn last_net(&self, prefix: u8) -> Option<Ipv4Net> {
        let size = 1u64 << 32u8.checked_sub(prefix)?;
        self.spans.iter().rev().find_map(|&(start, end)| {
            let at = ((u64::from(end) + 1) / size).checked_mul(size)?.checked_sub(size)?;
            (at >= u64::from(start))
                .then(|| Ipv4Net::new(Ipv4Addr::from(u32::try_from(at).ok()?), prefix).ok())?
        })
    }
}

impl FromIterator<Ipv4Net> for RangeSet {
    fn from_iter<I: IntoIterator<Item = Ipv4Net>>(nets: I) -> Self {
        Self::of_spans(nets.into_iter().map(bounds).collect())
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
