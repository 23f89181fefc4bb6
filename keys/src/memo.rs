//! A memory of signatures, for simulators.
//!
//! A simulator runs thousands of nodes in one thread, and every node checks the same signatures anew. Once
//! [`install`]ed, a signature that was found right in this thread is not computed again: it is known by a hash of
//! key, domain, message and signature. Besides, what was *signed* in this thread is noted: a simulator can then say
//! of any statement whether the key's owner made it, without trusting the check that it tests.
//!
//! With [`install_notes`] only what was signed is noted, and everything is computed: slow, and what the daemon does.
//!
//! It is off unless installed, per thread. The daemon never installs it: there it would be a cache in the middle of
//! the one check that everything rests on.

use std::cell::RefCell;
use std::collections::BTreeSet;

use sha2::{Digest as _, Sha256};

use crate::identity::{IdentityKey, Signature};
use crate::secret::Secret32;

thread_local! {
    static MEMO: RefCell<Option<Memo>> = const { RefCell::new(None) };
}

type Hash = [u8; 32];

#[derive(Default)]
struct Memo {
    /// Nothing is computed twice.
    saves: bool,
    right: BTreeSet<Hash>,
    signed: BTreeSet<Hash>,
}

/// Begins to remember, in this thread, from nothing.
pub fn install() {
    MEMO.with_borrow_mut(|memo| *memo = Some(Memo { saves: true, ..Memo::default() }));
}

/// Begins to note what is signed, in this thread, and computes everything as if it did not.
pub fn install_notes() {
    MEMO.with_borrow_mut(|memo| *memo = Some(Memo::default()));
}

/// Forgets, and remembers nothing more in this thread.
pub fn remove() {
    MEMO.with_borrow_mut(|memo| *memo = None);
}

/// Whether `key` signed `message` for `domain` in this thread since [`install`].
#[must_use]
pub fn was_signed(key: &IdentityKey, domain: &str, message: &[u8]) -> bool {
    MEMO.with_borrow(|memo| {
        memo.as_ref().is_some_and(|memo| memo.signed.contains(&hash(key, domain, message, None)))
    })
}

pub(crate) fn note_signed(key: impl FnOnce() -> IdentityKey, domain: &str, message: &[u8]) {
    MEMO.with_borrow_mut(|memo| {
        if let Some(memo) = memo {
            memo.signed.insert(hash(&key(), domain, message, None));
        }
    });
}

/// `check`, unless the same was found right before.
pub(crate) fn checked<E>(
    key: &IdentityKey,
    domain: &str,
    message: &[u8],
    signature: &Signature,
    check: impl FnOnce() -> Result<(), E>,
) -> Result<(), E> {
    let name = MEMO.with_borrow(|memo| {
        let saving = memo.as_ref().filter(|memo| memo.saves);
        let name = saving.map(|memo| (memo, hash(key, domain, message, Some(signature))));
        name.map(|(memo, name)| (name, memo.right.contains(&name)))
    });
    let Some((name, known)) = name else { return check() };
    if !known {
        check()?;
        MEMO.with_borrow_mut(|memo| memo.as_mut().map(|memo| memo.right.insert(name)));
    }
    Ok(())
}

/// In a simulator, what stands in for the secret of two identities ([`Identity::agree`](crate::Identity::agree)): a hash
/// of both keys. Millions of agreements would take hours.
pub(crate) fn agreed(own: impl FnOnce() -> IdentityKey, peer: &IdentityKey) -> Option<Secret32> {
    MEMO.with_borrow(|memo| {
        memo.as_ref().filter(|memo| memo.saves)?;
        let own = own();
        let (low, high) = if own < *peer { (own, *peer) } else { (*peer, own) };
        let hash = Sha256::new().chain_update(low.as_bytes()).chain_update(high.as_bytes());
        Some(Secret32::from_bytes(hash.finalize().into()))
    })
}

fn hash(key: &IdentityKey, domain: &str, message: &[u8], signature: Option<&Signature>) -> Hash {
    let mut hash = Sha256::new()
        .chain_update(key.as_bytes())
        .chain_update((domain.len() as u64).to_le_bytes())
        .chain_update(domain)
        .chain_update((message.len() as u64).to_le_bytes())
        .chain_update(message);
    if let Some(signature) = signature {
        hash.update(signature.as_bytes());
    }
    hash.finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Identity;

    #[test]
    fn what_is_remembered_is_what_was_signed_and_nothing_else_passes() {
        let [a, b] = [1, 2].map(|seed| Identity::from_bytes(&[seed; 32]));
        let before = a.sign("d", b"m");
        install();
        assert!(!was_signed(&a.public(), "d", b"m"), "before it was installed");
        let signature = a.sign("d", b"m");
        assert!(was_signed(&a.public(), "d", b"m"));
        for (key, domain, message) in [(&b, "d", "m"), (&a, "e", "m"), (&a, "d", "n")] {
            assert!(!was_signed(&key.public(), domain, message.as_bytes()));
        }
        // Twice each: the second time by heart.
        for _ in 0..2 {
            assert!(a.public().verify("d", b"m", &signature).is_ok());
            assert!(a.public().verify("d", b"m", &before).is_ok());
            assert!(b.public().verify("d", b"m", &signature).is_err());
            assert!(a.public().verify("e", b"m", &signature).is_err());
            assert!(a.public().verify("d", b"n", &signature).is_err());
            assert!(a.public().verify("d", b"m", &b.sign("d", b"m")).is_err());
        }
        remove();
        assert!(!was_signed(&a.public(), "d", b"m"));
    }

    #[test]
    fn notes_alone_change_nothing() {
        let [a, b] = [1, 2].map(|seed| Identity::from_bytes(&[seed; 32]));
        let agreed = || agreed(|| a.public(), &b.public());
        install_notes();
        let signature = a.sign("d", b"m");
        assert!(was_signed(&a.public(), "d", b"m"));
        let computed = std::cell::Cell::new(0);
        let check = |_: ()| {
            checked(&a.public(), "d", b"m", &signature, || -> Result<(), ()> {
                computed.set(computed.get() + 1);
                Ok(())
            })
        };
        assert_eq!((check(()), check(())), (Ok(()), Ok(())));
        assert_eq!((computed.get(), agreed().is_none()), (2, true));
        install();
        assert_eq!((check(()), check(())), (Ok(()), Ok(())));
        assert_eq!((computed.get(), agreed().is_some()), (3, true));
        remove();
    }
}
