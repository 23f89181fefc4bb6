//! The names of everything a node knows, and the proof in 16 bytes that another node knows the same.
//!
//! Range reconciliation (Meyer, "Range-Based Set Reconciliation", 2023): names are spread evenly by hashing; those that
//! share the first hexadecimal digits form a range; each range has a sum over hashes of its names and contents. Whoever
//! gets a sum that differs from its own answers with the sums of the 16 parts of that range, or, when there are few names
//! in it, with the names. Equal nodes exchange one sum; what differs is found in as many steps as there are digits.
//!
//! That always ends: a range that differs has a part that does, and at the latest the range of a single name is listed.
//! Names that somebody has chosen to begin alike therefore cost steps, but hide nothing.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::persistent::Map;

/// What an item is. Kinds are never reused.
///
/// Sums and lists are about the kinds 0 to 10, in all versions: over items that an earlier version cannot have they would
/// never agree. Kinds that are added need sums and lists apart.
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

/// All names that begin with the same hexadecimal digits. The digits of a name are those of its id and then those of its
/// kind, so that the smallest ranges hold one name each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(into = "(u8, Vec<u8>)", try_from = "(u8, Vec<u8>)")]
pub struct Range {
    /// The digits, two in a byte; zeros behind them.
    prefix: [u8; Name::LEN],
    /// How many digits.
    digits: u8,
}

/// The digits of a range are not as many as it says, or more than names have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not the digits of a range")]
pub struct NotARange;

impl Name {
    const LEN: usize = 17;

    fn bytes(&self) -> [u8; Self::LEN] {
        let mut bytes = [self.kind.0; Self::LEN];
        bytes[..16].copy_from_slice(&self.id);
        bytes
    }

    fn from_bytes(bytes: [u8; Self::LEN]) -> Self {
        let [id @ .., kind] = bytes;
        Self { id, kind: Kind(kind) }
    }
}

impl Range {
    /// All names.
    pub const ALL: Self = Self { prefix: [0; Name::LEN], digits: 0 };
    /// All digits of a name.
    const DEEPEST: u8 = 2 * Name::LEN as u8;

    /// The range of `name` with that many digits.
    fn of(name: &Name, digits: u8) -> Self {
        let mut prefix = name.bytes();
        let whole = usize::from(digits / 2);
        if let Some(cut) = prefix.get_mut(whole) {
            *cut &= if digits % 2 == 1 { 0xf0 } else { 0 };
        }
        prefix.iter_mut().skip(whole + 1).for_each(|byte| *byte = 0);
        Self { prefix, digits }
    }

    /// The 16 parts of the range; none when it has room for one name only.
    fn parts(self) -> impl Iterator<Item = Self> {
        let parts = if self.digits < Self::DEEPEST { 16 } else { 0 };
        (0..parts).map(move |digit| {
            let mut prefix = self.prefix;
            prefix[usize::from(self.digits / 2)] |=
                if self.digits.is_multiple_of(2) { digit << 4 } else { digit };
            Self { prefix, digits: self.digits + 1 }
        })
    }

    /// Which of its parts a name in it belongs to.
    fn part_of(self, name: &Name) -> usize {
        let byte = name.bytes()[usize::from(self.digits / 2).min(Name::LEN - 1)];
        usize::from(if self.digits.is_multiple_of(2) { byte >> 4 } else { byte & 0xf })
    }

    fn contains(self, name: &Name) -> bool {
        Self::of(name, self.digits) == self
    }

    fn first(self) -> Name {
        Name::from_bytes(self.prefix)
    }

    fn last(self) -> Name {
        let mut bytes = [0xff; Name::LEN];
        let whole = usize::from(self.digits / 2);
        bytes[..whole].copy_from_slice(&self.prefix[..whole]);
        if self.digits % 2 == 1 {
            bytes[whole] = self.prefix[whole] | 0xf;
        }
        Name::from_bytes(bytes)
    }

    /// Place of its sum, when that is kept: ranges with fewer digits before those with more.
    fn place(self) -> Option<usize> {
        let before = *[0, 1, 17, 273].get(usize::from(self.digits))?;
        let value = u16::from_be_bytes([self.prefix[0], self.prefix[1]]);
        Some(before + usize::from(value.checked_shr(16 - 4 * u32::from(self.digits)).unwrap_or(0)))
    }
}

impl From<Range> for (u8, Vec<u8>) {
    fn from(range: Range) -> Self {
        (range.digits, range.prefix[..usize::from(range.digits.div_ceil(2))].to_vec())
    }
}

impl TryFrom<(u8, Vec<u8>)> for Range {
    type Error = NotARange;

    fn try_from((digits, bytes): (u8, Vec<u8>)) -> Result<Self, NotARange> {
        let mut prefix = [0; Name::LEN];
        if digits > Self::DEEPEST || bytes.len() != usize::from(digits.div_ceil(2)) {
            return Err(NotARange);
        }
        prefix[..bytes.len()].copy_from_slice(&bytes);
        let range = Self { prefix, digits };
        if range == Self::of(&range.first(), digits) { Ok(range) } else { Err(NotARange) }
    }
}

/// Digits of the ranges whose sums are kept; those of smaller ranges follow from the few names that are in them.
const KEPT: u8 = 3;
/// Ranges with so few digits.
const RANGES: usize = 1 + 16 + 256 + 4096;

/// Few enough names to be listed rather than to be cut into parts.
const LISTED: usize = 8;

/// Names and contents of all items of a node, with the sums of ranges. Cloning takes no time.
#[derive(Clone, Debug)]
pub struct Catalogue {
    names: Map<Name, Content>,
    sums: Arc<[u128]>,
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
        Self { names: Map::default(), sums: Arc::new([0; RANGES]) }
    }
}

impl Catalogue {
    /// Number of items.
    pub fn len(&self) -> usize {
        self.names.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The content of an item.
    pub fn get(&self, name: &Name) -> Option<Content> {
        self.names.get(name).copied()
    }

    /// Notes that an item has this content now, or is gone.
    pub fn set(&mut self, name: Name, content: Option<Content>) {
        let before = self.get(&name);
        if before == content {
            return;
        }
        match content {
            Some(content) => self.names.insert(name, content),
            None => _ = self.names.remove(&name),
        }
        let [now, before] =
            [content, before].map(|content| content.map_or(0, |content| hash(&name, content)));
        let change = now.wrapping_sub(before);
        let sums = Arc::make_mut(&mut self.sums);
        for place in (0..=KEPT).filter_map(|digits| Range::of(&name, digits).place()) {
            sums[place] = sums[place].wrapping_add(change);
        }
    }

    /// The sum of a range.
    pub fn sum(&self, range: Range) -> Sum {
        let add = |sum: u128, (name, content)| sum.wrapping_add(hash(&name, content));
        let count = || self.in_range(range).fold(0, add);
        Sum(range.place().map_or_else(count, |place| self.sums[place]))
    }

    /// Answers to sums of another node. At most `most` ranges that differ are gone into, the others come again: `turn`
    /// says where to begin, and should be another one each time, so that none is left out for ever. Of ranges that
    /// overlap only one is looked at: no name is counted twice, however often it is asked for.
    pub fn compare(&self, theirs: &[(Range, Sum)], most: usize, turn: usize) -> Differences {
        let mut found = Differences::default();
        let mut theirs = theirs.to_vec();
        theirs.sort_unstable_by_key(|(range, _)| *range);
        let mut end = None;
        let mut differing: Vec<Range> = theirs
            .iter()
            .filter(|(range, _)| {
                let follows = end.is_none_or(|end| range.first() > end);
                end = end.max(Some(range.last()));
                follows
            })
            .filter(|(range, sum)| self.sum(*range) != *sum)
            .map(|(range, _)| *range)
            .collect();
        if !differing.is_empty() {
            let turn = turn % differing.len();
            differing.rotate_left(turn);
        }
        for range in differing.into_iter().take(most) {
            if self.in_range(range).nth(LISTED).is_none() {
                found.lists.push((range, self.in_range(range).collect()));
            } else {
                found.sums.extend(range.parts().zip(self.sums_of_parts(range)));
            }
        }
        found
    }

    /// What follows from another node's list of all its names in `range`.
    pub fn settle(&self, range: Range, theirs: &[(Name, Content)]) -> Exchange {
        let theirs: BTreeMap<Name, Content> =
            theirs.iter().filter(|(name, _)| range.contains(name)).copied().collect();
        let ours = self.in_range(range);
        Exchange {
            give: ours
                .filter(|(name, content)| theirs.get(name) != Some(content))
                .map(|(name, _)| name)
                .collect(),
            take: theirs
                .iter()
                .filter(|(name, content)| self.get(name) != Some(**content))
                .map(|(name, _)| *name)
                .collect(),
        }
    }

    fn sums_of_parts(&self, range: Range) -> [Sum; 16] {
        let mut sums = [Sum::default(); 16];
        if range.digits < KEPT {
            for (sum, part) in sums.iter_mut().zip(range.parts()) {
                *sum = self.sum(part);
            }
        } else {
            for (name, content) in self.in_range(range) {
                let Sum(sum) = &mut sums[range.part_of(&name)];
                *sum = sum.wrapping_add(hash(&name, content));
            }
        }
        sums
    }

    fn in_range(&self, range: Range) -> impl Iterator<Item = (Name, Content)> {
        self.names.range(range.first()..=range.last()).map(|(name, content)| (*name, *content))
    }
}

/// Of name and content.
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
                let found = far.compare(&sums, most, messages);
                assert!(found.lists.len() + found.sums.len() / 16 <= most);
                for (range, list) in &found.lists {
                    assert!(list.len() <= LISTED);
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

    /// Names that have their first `alike` bytes in common, as somebody would choose them.
    fn chosen(seed: u16, alike: usize) -> Name {
        let mut bytes = [0xab; Name::LEN];
        let [high, low] = seed.to_be_bytes();
        bytes[alike..].iter_mut().for_each(|byte| *byte = low);
        bytes[alike] = high;
        Name::from_bytes(bytes)
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

        #[test]
        fn what_somebody_has_chosen_becomes_equal_too(
            a in prop::collection::btree_set((any::<u16>(), 0usize..16), 0..300),
            b in prop::collection::btree_set((any::<u16>(), 0usize..16), 0..300),
            most in 1usize..40,
        ) {
            let [mut left, mut right] = [&a, &b].map(|names| {
                let mut catalogue = Catalogue::default();
                names.iter().for_each(|(seed, alike)| catalogue.set(chosen(*seed, *alike), Some(Content([1; 8]))));
                catalogue
            });
            reconcile(&mut left, &mut right, most);
            let union: std::collections::BTreeSet<Name> =
                a.union(&b).map(|(seed, alike)| chosen(*seed, *alike)).collect();
            prop_assert!(left.names.keys().eq(&union) && right.names.keys().eq(&union));
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
    fn five_thousand_names_that_begin_alike_are_reconciled() {
        for alike in [2, 9, 15] {
            let all: Vec<Name> = (0..5_000).map(|seed| chosen(seed, alike)).collect();
            let (mut a, mut b, mut union) =
                (Catalogue::default(), Catalogue::default(), Catalogue::default());
            for (number, name) in all.iter().enumerate() {
                let content = Content([1; 8]);
                union.set(*name, Some(content));
                // Most are known to both, some to one of them.
                if number % 10 != 0 {
                    a.set(*name, Some(content));
                }
                if number % 7 != 0 || number % 10 == 0 {
                    b.set(*name, Some(content));
                }
            }
            reconcile(&mut a, &mut b, 24);
            assert_eq!((&a.names, &b.names), (&union.names, &union.names));
            a.set(all[4_321], Some(Content([2; 8])));
            let steps = reconcile(&mut a, &mut b, 24);
            assert!(steps <= 2 * alike + 5, "one difference: {steps} messages");
        }
    }

    #[test]
    fn names_that_differ_in_their_kinds_only_are_reconciled() {
        let (mut a, mut b) = (Catalogue::default(), Catalogue::default());
        for kind in 0..=255 {
            let name = Name { id: [7; 16], kind: Kind(kind) };
            a.set(name, Some(Content([1; 8])));
            if kind % 3 == 0 {
                b.set(name, Some(Content([2; 8])));
            }
        }
        reconcile(&mut a, &mut b, 2);
        assert_eq!((a.names.len(), &a.names), (256, &b.names));
    }

    #[test]
    fn the_parts_of_a_range_make_it_up() {
        let mut range = Range::ALL;
        for digits in 0..Range::DEEPEST {
            let parts: Vec<_> = range.parts().collect();
            assert_eq!((parts[0].first(), parts[15].last()), (range.first(), range.last()));
            for (number, part) in parts.iter().enumerate() {
                assert_eq!(
                    (Range::of(&part.last(), digits), Range::of(&part.first(), digits + 1)),
                    (range, *part)
                );
                assert_eq!((range.part_of(&part.first()), range.part_of(&part.last())), (number, number));
            }
            assert!(parts.windows(2).all(|pair| pair[0].last() < pair[1].first()));
            range = parts[usize::from(digits * 7 % 16)];
        }
        assert_eq!((range.first(), range.parts().count()), (range.last(), 0));
    }

    #[test]
    fn ranges_from_others_are_not_believed() {
        let wrong: [(u8, Vec<u8>); 6] = [
            (35, vec![1; 18]),
            (1, vec![0x1f]),
            (1, vec![]),
            (2, vec![1, 2]),
            (255, vec![9; 128]),
            (0, vec![0]),
        ];
        for range in wrong {
            let bytes = postcard::to_allocvec(&range).unwrap();
            assert!(postcard::from_bytes::<Range>(&bytes).is_err(), "{range:?}");
        }
        let catalogue = catalogue(&(0..100).map(|seed| (seed, 1)).collect());
        let foreign = Range::of(&name(1), 3);
        let listed = catalogue.settle(foreign, &[(name(200), Content([0; 8]))]);
        assert!(listed.take.is_empty(), "a name outside of the range it is listed in");
        let again = vec![(Range::ALL, Sum(1)), (Range::ALL, Sum(1)), (foreign, Sum(1)), (Range::ALL, Sum(2))];
        assert_eq!(catalogue.compare(&again, 9, 0), catalogue.compare(&again[..1], 9, 0), "once each");
    }

    #[test]
    fn no_range_waits_for_ever() {
        let catalogue = catalogue(&(0..100).map(|seed| (seed, 1)).collect());
        let theirs: Vec<_> = Range::ALL.parts().map(|part| (part, Sum(1))).collect();
        let gone_into = |turn| catalogue.compare(&theirs, 3, turn).lists.into_iter().map(|(range, _)| range);
        let listed: std::collections::BTreeSet<_> = (0..16).flat_map(gone_into).collect();
        let few = Range::ALL.parts().filter(|part| catalogue.in_range(*part).count() <= LISTED);
        assert_eq!(listed.into_iter().collect::<Vec<_>>(), few.collect::<Vec<_>>());
    }
}
