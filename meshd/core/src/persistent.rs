//! Ordered maps and sets that share what they have in common with those they were cloned from: cloning takes no time, and
//! a change afterwards copies the way to it, not the rest.
//!
//! So a copy of a view, to try something on or to compare with, costs what differs; and a program that runs many nodes
//! keeps what all of them know once.

use std::fmt;
use std::ops::RangeBounds;

use mesh_keys::{BodyId, IdentityKey};
use rpds::RedBlackTreeMapSync;

/// An ordered map.
pub(crate) struct Map<K: Ord, V>(RedBlackTreeMapSync<K, V>);

impl<K: Ord + Copy, V> Map<K, V> {
    pub(crate) fn get(&self, key: &K) -> Option<&V> {
        self.0.get(key)
    }

    pub(crate) fn contains_key(&self, key: &K) -> bool {
        self.0.contains_key(key)
    }

    pub(crate) fn len(&self) -> usize {
        self.0.size()
    }

    pub(crate) fn insert(&mut self, key: K, value: V) {
        self.0.insert_mut(key, value);
    }

    /// Whether it was there.
    pub(crate) fn remove(&mut self, key: &K) -> bool {
        // Looking first leaves everything shared when it was not.
        self.0.contains_key(key) && self.0.remove_mut(key)
    }

    pub(crate) fn get_mut(&mut self, key: &K) -> Option<&mut V>
    where
        V: Clone,
    {
        self.0.get_mut(key)
    }

    pub(crate) fn take(&mut self, key: &K) -> Option<V>
    where
        V: Clone,
    {
        let value = self.0.get(key).cloned()?;
        self.0.remove_mut(key);
        Some(value)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&K, &V)> {
        self.0.iter()
    }

    pub(crate) fn keys(&self) -> impl Iterator<Item = &K> {
        self.0.keys()
    }

    pub(crate) fn values(&self) -> impl Iterator<Item = &V> {
        self.0.values()
    }

    /// The entries whose keys are in `range`, in order.
    pub(crate) fn range(&self, range: impl RangeBounds<K>) -> impl Iterator<Item = (&K, &V)> {
        self.0.range(range)
    }

    /// The entry with the lowest key that is not below `key`.
    pub(crate) fn at_or_after(&self, key: K) -> Option<(&K, &V)> {
        self.0.range(key..).next()
    }
}

/// An ordered set.
pub(crate) struct Set<K: Ord>(Map<K, ()>);

impl<K: Ord + Copy> Set<K> {
    pub(crate) fn contains(&self, key: &K) -> bool {
        self.0.contains_key(key)
    }

    pub(crate) fn insert(&mut self, key: K) {
        self.0.insert(key, ());
    }

    pub(crate) fn remove(&mut self, key: &K) {
        self.0.remove(key);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.len() == 0
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &K> {
        self.0.keys()
    }

    /// Those that are not below `key`.
    pub(crate) fn iter_from(&self, key: K) -> impl Iterator<Item = &K> {
        self.0.0.range(key..).map(|(key, ())| key)
    }

    /// Adds all of `other`.
    pub(crate) fn append(&mut self, mut other: Self) {
        // The order of the two does not matter, and the smaller is the one that takes time.
        if other.0.len() > self.0.len() {
            std::mem::swap(self, &mut other);
        }
        for key in other.iter() {
            self.insert(*key);
        }
    }
}

impl<K: Ord + Copy> FromIterator<K> for Set<K> {
    fn from_iter<I: IntoIterator<Item = K>>(keys: I) -> Self {
        let mut set = Self::default();
        for key in keys {
            set.insert(key);
        }
        set
    }
}

/// What has a lowest and a highest value.
pub(crate) trait Bounded {
    const LOWEST: Self;
    const HIGHEST: Self;
}

impl Bounded for BodyId {
    const LOWEST: Self = Self::from_bytes([0; Self::LEN]);
    const HIGHEST: Self = Self::from_bytes([0xff; Self::LEN]);
}

impl Bounded for (u64, BodyId) {
    const LOWEST: Self = (0, BodyId::LOWEST);
    const HIGHEST: Self = (u64::MAX, BodyId::HIGHEST);
}

impl Bounded for (IdentityKey, BodyId) {
    const LOWEST: Self = (IdentityKey::from_bytes([0; 32]), BodyId::LOWEST);
    const HIGHEST: Self = (IdentityKey::from_bytes([0xff; 32]), BodyId::HIGHEST);
}

/// Several values for each key, in order: a set of pairs, so that a key with one value costs no set of its own.
pub(crate) struct Pairs<K: Ord, V: Ord>(Map<(K, V), ()>);

impl<K: Ord + Copy, V: Ord + Copy + Bounded> Pairs<K, V> {
    pub(crate) fn insert(&mut self, key: K, value: V) {
        self.0.insert((key, value), ());
    }

    pub(crate) fn remove(&mut self, key: K, value: V) {
        self.0.remove(&(key, value));
    }

    pub(crate) fn has(&self, key: &K) -> bool {
        self.of(key).next().is_some()
    }

    /// The values of `key`.
    pub(crate) fn of(&self, key: &K) -> impl DoubleEndedIterator<Item = &V> + use<'_, K, V> {
        self.up_to(key, V::HIGHEST)
    }

    /// The values of `key` that are not above `highest`.
    pub(crate) fn up_to(&self, key: &K, highest: V) -> impl DoubleEndedIterator<Item = &V> + use<'_, K, V> {
        self.0.0.range((*key, V::LOWEST)..=(*key, highest)).map(|((_, value), ())| value)
    }

    /// The keys, each once.
    pub(crate) fn keys(&self) -> impl Iterator<Item = &K> {
        let mut last = None;
        self.0.keys().map(|(key, _)| key).filter(move |key| last.replace(*key) != Some(*key))
    }
}

// Derives would ask more of keys and values than cloning and comparing these takes.

macro_rules! persistent {
    ($name:ident<$($of:ident),*>) => {
        impl<$($of: Ord),*> Clone for $name<$($of),*> {
            fn clone(&self) -> Self {
                Self(self.0.clone())
            }
        }

        impl<$($of: Ord),*> Default for $name<$($of),*> {
            fn default() -> Self {
                Self(Map::default())
            }
        }

        impl<$($of: Ord),*> PartialEq for $name<$($of),*> {
            fn eq(&self, other: &Self) -> bool {
                self.0 == other.0
            }
        }

        impl<$($of: Ord),*> Eq for $name<$($of),*> {}

        impl<$($of: Ord + fmt::Debug),*> fmt::Debug for $name<$($of),*> {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.debug_set().entries(self.0.0.keys()).finish()
            }
        }
    };
}

persistent!(Set<K>);
persistent!(Pairs<K, V>);

impl<K: Ord, V> Clone for Map<K, V> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<K: Ord, V> Default for Map<K, V> {
    fn default() -> Self {
        Self(RedBlackTreeMapSync::new_sync())
    }
}

impl<K: Ord, V: PartialEq> PartialEq for Map<K, V> {
    fn eq(&self, other: &Self) -> bool {
        self.0.ptr_eq(&other.0) || (self.0.size() == other.0.size() && self.0.iter().eq(other.0.iter()))
    }
}

impl<K: Ord, V: Eq> Eq for Map<K, V> {}

impl<K: Ord + fmt::Debug, V: fmt::Debug> fmt::Debug for Map<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.0.iter()).finish()
    }
}
