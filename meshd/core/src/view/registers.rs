//! Statements of which each signer's newest counts: a map that merges by taking the greater.

use std::collections::BTreeMap;

use mesh_keys::{BodyId, IdentityKey, Signable, Signed};

/// The place of a statement among those of its signer.
pub type Order = (u64, u64);

/// Of each signer the newest statement.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Registers<T: Signable> {
    entries: BTreeMap<IdentityKey, Entry<T>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry<T: Signable> {
    order: Order,
    signed: Signed<T>,
    value: T,
}

impl<T: Signable> Default for Registers<T> {
    fn default() -> Self {
        Self { entries: BTreeMap::new() }
    }
}

impl<T: Signable> Registers<T> {
    /// Whether `signed` would take the place of what `signer` said before.
    pub(super) fn is_news(&self, signer: &IdentityKey, order: Order, signed: &Signed<T>) -> bool {
        self.entries.get(signer).is_none_or(|entry| {
            (entry.order, entry.signed.id(), &entry.signed) < (order, signed.id(), signed)
        })
    }

    /// Puts a statement that was checked in the place of the one before.
    pub(super) fn put(&mut self, signer: IdentityKey, order: Order, signed: &Signed<T>, value: T) {
        self.entries.insert(signer, Entry { order, signed: signed.clone(), value });
    }

    /// Whether there was something.
    pub(super) fn forget(&mut self, signer: &IdentityKey) -> bool {
        self.entries.remove(signer).is_some()
    }

    pub(super) fn get(&self, signer: &IdentityKey) -> Option<&T> {
        self.entries.get(signer).map(|entry| &entry.value)
    }

    /// All of them with their names, by signer.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&IdentityKey, BodyId, &T)> {
        self.entries.iter().map(|(signer, entry)| (signer, entry.signed.id(), &entry.value))
    }

    pub(super) fn in_order(&self) -> Vec<Signed<T>> {
        self.entries.values().map(|entry| entry.signed.clone()).collect()
    }

    /// The names of all of them, by signer.
    pub(super) fn ids(&self) -> impl Iterator<Item = (&IdentityKey, BodyId)> {
        self.entries.iter().map(|(signer, entry)| (signer, entry.signed.id()))
    }

    pub(super) fn signed(&self, signer: &IdentityKey) -> Option<&Signed<T>> {
        self.entries.get(signer).map(|entry| &entry.signed)
    }
}
