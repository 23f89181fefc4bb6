//! An ordered map in one piece of memory: for thousands of small values that come once and stay. A tree takes half as much
//! again.

/// An ordered map. Looking up takes the logarithm of its length, putting in and taking out move what is behind.
#[derive(Clone, Debug)]
pub struct SortedMap<K, V>(Vec<(K, V)>);

impl<K: Ord, V> SortedMap<K, V> {
    /// An empty one.
    #[must_use]
    pub const fn new() -> Self {
        Self(Vec::new())
    }

    /// How many entries there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Makes room for so many entries in all.
    pub fn reserve(&mut self, entries: usize) {
        self.0.reserve_exact(entries.saturating_sub(self.0.len()));
    }

    fn place(&self, key: &K) -> Result<usize, usize> {
        self.0.binary_search_by(|(other, _)| other.cmp(key))
    }

    /// The value of a key.
    #[must_use]
    pub fn get(&self, key: &K) -> Option<&V> {
        self.place(key).ok().and_then(|at| self.0.get(at)).map(|(_, value)| value)
    }

    /// The value of a key.
    pub fn get_mut(&mut self, key: &K) -> Option<&mut V> {
        let at = self.place(key).ok()?;
        self.0.get_mut(at).map(|(_, value)| value)
    }

    /// Sets the value of a key.
    pub fn insert(&mut self, key: K, value: V) {
        match self.place(&key) {
            Ok(at) => self.0[at].1 = value,
            Err(at) => {
                make_room(&mut self.0);
                self.0.insert(at, (key, value));
            }
        }
    }

    /// The value of a key; the default from now on when it has none.
    pub fn entry_or_default(&mut self, key: K) -> &mut V
    where
        V: Default,
    {
        let at = self.place(&key).unwrap_or_else(|at| {
            make_room(&mut self.0);
            self.0.insert(at, (key, V::default()));
            at
        });
        &mut self.0[at].1
    }

    /// Takes a key out; whether it was there.
    pub fn remove(&mut self, key: &K) -> bool {
        self.place(key).map(|at| self.0.remove(at)).is_ok()
    }

    /// Keeps what `keep` says.
    pub fn retain(&mut self, mut keep: impl FnMut(&K, &mut V) -> bool) {
        self.0.retain_mut(|(key, value)| keep(key, value));
    }

    /// All entries, in the order of the keys.
    pub fn iter(&self) -> impl Iterator<Item = (&K, &V)> {
        self.0.iter().map(|(key, value)| (key, value))
    }

    /// The entries that are not below `key`, in order.
    pub fn iter_from(&self, key: &K) -> impl Iterator<Item = (&K, &V)> {
        let (Ok(at) | Err(at)) = self.place(key);
        self.0.iter().skip(at).map(|(key, value)| (key, value))
    }
}

/// Makes room for one more where there is none: an eighth more, and not the double.
pub fn make_room<T>(entries: &mut Vec<T>) {
    if entries.len() == entries.capacity() {
        entries.reserve_exact(entries.len() / 8 + 4);
    }
}

impl<K: Ord, V> Default for SortedMap<K, V> {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug)]
    enum Act {
        Insert(u8, u16),
        Add(u8, u16),
        Remove(u8),
        Retain(u8),
    }

    fn act() -> impl Strategy<Value = Act> {
        prop_oneof![
            4 => (any::<u8>(), any::<u16>()).prop_map(|(key, value)| Act::Insert(key, value)),
            4 => (any::<u8>(), 0..9u16).prop_map(|(key, value)| Act::Add(key, value)),
            2 => any::<u8>().prop_map(Act::Remove),
            1 => (2..9u8).prop_map(Act::Retain),
        ]
    }

    proptest! {
        #[test]
        fn does_as_a_tree(acts in prop::collection::vec(act(), 0..200)) {
            let (mut map, mut tree) = (SortedMap::new(), BTreeMap::new());
            for act in acts {
                match act {
                    Act::Insert(key, value) => {
                        map.insert(key, value);
                        tree.insert(key, value);
                    }
                    Act::Add(key, value) => {
                        let of = map.entry_or_default(key);
                        *of = u16::wrapping_add(*of, value);
                        let of = tree.entry(key).or_default();
                        *of = u16::wrapping_add(*of, value);
                    }
                    Act::Remove(key) => prop_assert_eq!(map.remove(&key), tree.remove(&key).is_some()),
                    Act::Retain(modulus) => {
                        map.retain(|key, _| key % modulus != 0);
                        tree.retain(|key, _| key % modulus != 0);
                    }
                }
                prop_assert_eq!((map.len(), map.is_empty()), (tree.len(), tree.is_empty()));
            }
            prop_assert!(map.iter().eq(tree.iter()));
            for key in 0..=255u8 {
                prop_assert_eq!(map.get(&key), tree.get(&key));
                prop_assert_eq!(map.get_mut(&key).copied(), tree.get(&key).copied());
                prop_assert!(map.iter_from(&key).eq(tree.range(key..)));
            }
        }
    }
}
