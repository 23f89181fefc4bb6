//! The names of everything a node knows, and the proof in 16 bytes that another node knows the same.
//!
//! Range reconciliation (Meyer, "Range-Based Set Reconciliation", 2023): names are spread evenly by hashing; those that
//! share the first hexadecimal digits form a range; each range has a sum over hashes of its names and contents. Whoever
//! gets a sum that differs from its own answers with the sums of the 16 parts of that range, or, when there are few names
//! in it, with the names. Equal nodes exchange one sum; what differs is found in as many steps as there are digits.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

/// What an item is. Kinds are never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Kind(pub u8);

impl Kind {
    /// Whether a member is alive; see [`super::liveness`].
    pub const LIVENESS: Self = Self(0);
}

/// Names an item. Of two items with the same name one replaces the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Name {
    /// A hash, so that names are spread evenly.
    pub id: [u8; 16],
    /// What it names.
    pub kind: Kind,
}

/// Distinguishes the contents that a name can have: part of a hash of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Content(pub [u8; 8]);

/// The sum of the hashes of what is in a range, modulo 2¹²⁸.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sum(pub u128);

/// All names that begin with the same digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Range {
    /// How many digits, at most [`Range::DEEPEST`].
    digits: u8,
    /// The digits.
    value: u16,
}

impl Range {
    /// All names.
    pub const ALL: Self = Self { digits: 0, value: 0 };
    /// Most digits: 4,096 ranges, a few names in each with 5,000 nodes.
    pub const DEEPEST: u8 = 3;

    /// The range of `name` with that many digits.
    fn of(name: &Name, digits: u8) -> Self {
        let first = u16::from_be_bytes([name.id[0], name.id[1]]);
        Self { digits, value: if digits == 0 { 0 } else { first >> (16 - 4 * u32::from(digits)) } }
    }

    /// The 16 parts of the range; `None` when it has none.
    fn parts(self) -> Option<impl Iterator<Item = Self>> {
        (self.digits < Self::DEEPEST).then(|| {
            (0..16).map(move |digit| Self { digits: self.digits + 1, value: self.value << 4 | digit })
        })
    }

    /// Whether it is one of those that [`Catalogue`] keeps sums of: what comes from others may not be.
    pub fn is_valid(self) -> bool {
        self.digits <= Self::DEEPEST && u32::from(self.value) < 1 << (4 * u32::from(self.digits))
    }

    fn contains(self, name: &Name) -> bool {
        Self::of(name, self.digits) == self
    }

    fn first(self) -> Name {
        let mut id = [0; 16];
        if self.digits > 0 {
            let value = self.value << (16 - 4 * u32::from(self.digits));
            id[..2].copy_from_slice(&value.to_be_bytes());
        }
        Name { id, kind: Kind(0) }
    }

    /// Place of its sum: ranges with fewer digits before those with more.
    fn place(self) -> usize {
        let before = [0, 1, 17, 273];
        before[usize::from(self.digits)] + usize::from(self.value)
    }
}

const RANGES: usize = 1 + 16 + 256 + 4096;

/// Few enough names to be listed rather than to be cut into parts.
const LISTED: usize = 8;

/// Names and contents of all items of a node, with the sums of all ranges.
#[derive(Clone, Debug)]
pub struct Catalogue {
    names: BTreeMap<Name, Content>,
    sums: Box<[u128]>,
}

/// What to answer to somebody's sums.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Differences {
    /// Sums of parts of ranges that differ.
    pub sums: Vec<(Range, Sum)>,
    /// Ranges that differ, with all their names.
    pub lists: Vec<(Range, Vec<(Name, Content)>)>,
}

/// What to do after somebody has listed a range.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Exchange {
    /// They lack these, or have other contents.
    pub give: Vec<Name>,
    /// We lack these, or have other contents.
    pub take: Vec<Name>,
}

impl Default for Catalogue {
    fn default() -> Self {
        Self { names: BTreeMap::new(), sums: vec![0; RANGES].into_boxed_slice() }
    }
}

impl Catalogue {
    /// Number of items.
    pub fn len(&self) -> usize {
        self.names.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    /// The content of an item.
    pub fn get(&self, name: &Name) -> Option<Content> {
        self.names.get(name).copied()
    }

    /// Notes that an item has this content now, or is gone.
    pub fn set(&mut self, name: Name, content: Option<Content>) {
        let before = match content {
            Some(content) => self.names.insert(name, content),
            None => self.names.remove(&name),
        };
        let change = content
            .map_or(0, |content| hash(&name, content))
            .wrapping_sub(before.map_or(0, |before| hash(&name, before)));
        for digits in 0..=Range::DEEPEST {
            let sum = &mut self.sums[Range::of(&name, digits).place()];
            *sum = sum.wrapping_add(change);
        }
    }

    /// The sum of a range that [is valid](Range::is_valid).
    pub fn sum(&self, range: Range) -> Sum {
        Sum(self.sums[range.place()])
    }

    /// Answers to sums of another node: at most `most` ranges that differ are gone into, the others come again.
    pub fn compare(&self, theirs: &[(Range, Sum)], most: usize) -> Differences {
        let mut found = Differences::default();
        let differing = theirs.iter().filter(|(range, sum)| range.is_valid() && self.sum(*range) != *sum);
        for (range, _) in differing.take(most) {
            let few = self.in_range(*range).nth(LISTED).is_none();
            match range.parts() {
                Some(parts) if !few => found.sums.extend(parts.map(|part| (part, self.sum(part)))),
                Some(_) | None => found.lists.push((*range, self.in_range(*range).collect())),
            }
        }
        found
    }

    /// What follows from another node's list of all its names in `range`.
    pub fn settle(&self, range: Range, theirs: &[(Name, Content)]) -> Exchange {
        let mut exchange = Exchange::default();
        if !range.is_valid() {
            return exchange;
        }
        let theirs: BTreeMap<Name, Content> =
            theirs.iter().filter(|(name, _)| range.contains(name)).copied().collect();
        for (name, content) in self.in_range(range) {
            if theirs.get(&name) != Some(&content) {
                exchange.give.push(name);
            }
        }
        exchange.take.extend(
            theirs
                .iter()
                .filter(|(name, content)| self.names.get(name) != Some(content))
                .map(|(name, _)| *name),
        );
        exchange
    }

    fn in_range(&self, range: Range) -> impl Iterator<Item = (Name, Content)> {
        self.names
            .range(range.first()..)
            .take_while(move |(name, _)| range.contains(name))
            .map(|(name, content)| (*name, *content))
    }
}

fn hash(name: &Name, content: Content) -> u128 {
    let hash = Sha256::new()
        .chain_update(b"hauberk item v1\0")
        .chain_update([name.kind.0])
        .chain_update(name.id)
        .chain_update(content.0)
        .finalize();
    let mut first = [0; 16];
    first.copy_from_slice(&hash[..16]);
    u128::from_le_bytes(first)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn name(seed: u16) -> Name {
        let hash = Sha256::digest(seed.to_le_bytes());
        Name { id: hash[..16].try_into().unwrap(), kind: Kind((seed % 3) as u8) }
    }

    fn catalogue(items: &BTreeMap<u16, u8>) -> Catalogue {
        let mut catalogue = Catalogue::default();
        for (seed, content) in items {
            catalogue.set(name(*seed), Some(Content([*content; 8])));
        }
        catalogue
    }

    /// Runs the protocol between two nodes until nothing differs; the number of messages.
    fn reconcile(a: &mut Catalogue, b: &mut Catalogue, most: usize) -> usize {
        let mut messages = 0;
        while a.sum(Range::ALL) != b.sum(Range::ALL) {
            assert!(messages < 10_000, "never equal");
            let mut sums = vec![(Range::ALL, a.sum(Range::ALL))];
            let (mut near, mut far) = (&mut *a, &mut *b);
            loop {
                messages += 1;
                let found = far.compare(&sums, most);
                assert!(found.lists.len() + found.sums.len() / 16 <= most);
                for (range, list) in &found.lists {
                    let exchange = near.settle(*range, list);
                    // The larger content wins, as a record with a higher version would.
                    for name in exchange.give {
                        let ours = near.get(&name);
                        if ours > far.get(&name) {
                            far.set(name, ours);
                        }
                    }
                    for name in exchange.take {
                        let theirs = far.get(&name);
                        if theirs > near.get(&name) {
                            near.set(name, theirs);
                        }
                    }
                }
                if found.sums.is_empty() {
                    break;
                }
                sums = found.sums;
                std::mem::swap(&mut near, &mut far);
            }
        }
        messages
    }

    proptest! {
        #[test]
        fn any_two_become_equal_and_keep_the_newest(
            a in prop::collection::btree_map(any::<u16>(), 0u8..4, 0..600),
            b in prop::collection::btree_map(any::<u16>(), 0u8..4, 0..600),
            most in 1usize..40,
        ) {
            let mut union = a.clone();
            for (seed, content) in &b {
                let entry = union.entry(*seed).or_insert(*content);
                *entry = (*entry).max(*content);
            }
            let (mut left, mut right) = (catalogue(&a), catalogue(&b));
            reconcile(&mut left, &mut right, most);
            let expected = catalogue(&union);
            prop_assert_eq!(&left.names, &expected.names);
            prop_assert_eq!(&right.names, &expected.names);
            prop_assert_eq!(&left.sums, &expected.sums);
        }

        #[test]
        fn sums_follow_from_what_is_there_and_not_from_how_it_came(
            items in prop::collection::btree_map(any::<u16>(), any::<u8>(), 0..100),
            gone in prop::collection::btree_map(any::<u16>(), any::<u8>(), 0..100),
        ) {
            let mut other = catalogue(&gone);
            for (seed, content) in items.iter().rev() {
                other.set(name(*seed), Some(Content([*content; 8])));
            }
            for seed in gone.keys().filter(|seed| !items.contains_key(seed)) {
                other.set(name(*seed), None);
            }
            prop_assert_eq!(other.sums, catalogue(&items).sums);
        }
    }

    #[test]
    fn one_difference_among_fifteen_thousand_takes_few_messages() {
        let items: BTreeMap<u16, u8> = (0..15_000).map(|seed| (seed, 1)).collect();
        let mut changed = items.clone();
        changed.insert(777, 2);
        let (mut a, mut b) = (catalogue(&items), catalogue(&changed));
        assert_eq!(reconcile(&mut a, &mut b, 16), 4);
        assert_eq!(reconcile(&mut a, &mut b, 16), 0);
    }

    #[test]
    fn ranges_from_others_are_not_believed() {
        let catalogue = catalogue(&BTreeMap::from([(1, 1)]));
        for range in
            [Range { digits: 4, value: 0 }, Range { digits: 1, value: 16 }, Range { digits: 255, value: 9 }]
        {
            assert_eq!(catalogue.compare(&[(range, Sum(1))], 9), Differences::default());
            assert_eq!(catalogue.settle(range, &[(name(5), Content([0; 8]))]), Exchange::default());
        }
        let foreign = Range::of(&name(1), 3);
        let listed = catalogue.settle(foreign, &[(name(2), Content([0; 8]))]);
        assert!(listed.take.is_empty(), "a name outside of the range it is listed in");
    }
}
