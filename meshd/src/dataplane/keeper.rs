//! Keeps the guard ruleset in force.
//!
//! It has its own handle and its own lock: a ruleset that somebody flushes is back before anything that takes longer,
//! such as starting a tunnel engine, is done.

use mesh_core::host::Guard;
use mesh_sys::nft::{Blocking, Hook, NftError, TableInfo};

use super::guard;

/// Others may change something else between two reads; then the reads do not belong together.
const ATTEMPTS: usize = 8;

/// Hooks as the kernel counts them for the families of our tables (`linux/netfilter.h`).
fn hook_number(hook: Hook) -> Option<u32> {
    match hook {
        Hook::Prerouting => Some(0),
        Hook::Input => Some(1),
        Hook::Forward => Some(2),
        Hook::Output => Some(3),
        Hook::Postrouting => Some(4),
        Hook::Ingress => None,
    }
}

/// A handle on nftables, what should be in force, and what was found last.
#[derive(Debug)]
pub(super) struct Keeper {
    nft: Blocking,
    wanted: Option<Guard>,
    /// What was in force at a generation: as long as that number stands, nothing has changed.
    seen: Option<(u32, Option<Guard>)>,
    /// Handles of the rules as we made them. A rule that was deleted and made again has a new one.
    handles: Option<Vec<u64>>,
}

impl Keeper {
    /// Opens a handle in the namespace of the calling thread.
    ///
    /// # Errors
    /// The kernel has no nftables, or root is missing.
    pub(super) fn open() -> Result<Self, NftError> {
        Ok(Self { nft: Blocking::open()?, wanted: None, seen: None, handles: None })
    }

    /// By which a monitor tells our own changes from others'.
    pub(super) fn port(&self) -> u32 {
        self.nft.port()
    }

    /// What [`Keeper::restore`] restores from now on.
    pub(super) fn want(&mut self, guard: Option<&Guard>) {
        if self.wanted.as_ref() != guard {
            self.wanted = guard.cloned();
        }
    }

    /// What is in force. `None` when it is not a ruleset of this version, whole and unchanged.
    ///
    /// # Errors
    /// Nothing could be read, or others made changes all the while.
    pub(super) fn look(&mut self) -> Result<Option<Guard>, NftError> {
        let mut error = None;
        for _ in 0..ATTEMPTS {
            let before = self.nft.generation()?;
            if let Some((generation, guard)) = &self.seen
                && *generation == before
            {
                return Ok(guard.clone());
            }
            let found = self.read();
            if self.nft.generation()? != before {
                continue;
            }
            match found {
                Ok(found) => {
                    self.seen = Some((before, found.clone()));
                    return Ok(found);
                }
                Err(failed) => error = Some(failed),
            }
        }
        Err(error.unwrap_or_else(|| NftError::Changing { operation: "list", object: "the guard".to_owned() }))
    }

    fn read(&mut self) -> Result<Option<Guard>, NftError> {
        let tables = self.nft.tables()?;
        let comment = |wanted| {
            let found = tables.iter().find(|info: &&TableInfo| info.table == wanted)?;
            found.comment.as_deref()
        };
        let Some(text) = comment(guard::inet()).filter(|text| comment(guard::bridge()) == Some(*text)) else {
            return Ok(None);
        };
        let Some(mut found) = guard::from_comment(text) else { return Ok(None) };
        let mut handles = Vec::new();
        for expected in guard::rulesets(&found) {
            if !self.is_whole(&expected, &mut handles)? {
                return Ok(None);
            }
        }
        if self.handles.as_ref().is_some_and(|known| *known != handles) {
            return Ok(None);
        }
        let port4 = self.nft.elements(&guard::bridge(), guard::PORT4)?;
        let port6 = self.nft.elements(&guard::bridge(), guard::PORT6)?;
        let Some(ports) = guard::ports(&port4, &port6) else { return Ok(None) };
        found.ports = ports;
        // After a restart there is nothing to compare with: what is there is what counts from now on.
        self.handles = Some(handles);
        Ok(Some(found))
    }

    /// Whether a table has the chains, rules and sets it should have, and no others.
    fn is_whole(&mut self, expected: &guard::Ruleset, handles: &mut Vec<u64>) -> Result<bool, NftError> {
        let chains = self.nft.chains(&expected.table)?;
        let sets = self.nft.sets(&expected.table)?;
        let rules = self.nft.rules(&expected.table)?;
        if chains.len() != expected.chains.len()
            || sets.len() != expected.sets.len()
            || !expected.sets.iter().all(|set| sets.iter().any(|found| found.name == set.name))
        {
            return Ok(false);
        }
        let mut count = 0;
        for (chain, wanted) in &expected.chains {
            let same = chains.iter().find(|found| found.name == chain.name).is_some_and(|found| {
                match (&chain.base, &found.base) {
                    (None, None) => true,
                    (Some(base), Some((kind, hook, priority, policy))) => {
                        kind == "filter"
                            && hook_number(base.hook) == Some(*hook)
                            && base.priority == *priority
                            && base.policy == *policy
                    }
                    (Some(_), None) | (None, Some(_)) => false,
                }
            });
            let found: Vec<_> = rules.iter().filter(|rule| rule.chain == chain.name).collect();
            let comments = wanted.iter().map(|named| Some(named.comment));
            if !same || !found.iter().map(|rule| rule.comment.as_deref()).eq(comments) {
                return Ok(false);
            }
            handles.extend(found.iter().map(|rule| rule.handle));
            count += found.len();
        }
        Ok(count == rules.len())
    }

    /// Puts this guard in force, in one step: element by element where only ports differ, else as a whole.
    ///
    /// # Errors
    /// The kernel refused; what was in force still is.
    pub(super) fn set(&mut self, wanted: &Guard) -> Result<(), NftError> {
        let found = self.look().unwrap_or_else(|error| {
            tracing::debug!(%error, "guard cannot be read; it is written anew");
            None
        });
        if let Some(found) = found {
            if found == *wanted {
                return Ok(());
            }
            let same_rules = found.cluster_ipv4 == wanted.cluster_ipv4
                && found.cluster_ipv6 == wanted.cluster_ipv6
                && found.bridge_mac == wanted.bridge_mac;
            if same_rules {
                self.seen = None;
                let update = guard::update(&found.ports, &wanted.ports);
                match self.nft.commit(&update) {
                    Ok(()) => return Ok(()),
                    // Somebody changed or flushed it at this very moment.
                    Err(error) => tracing::debug!(%error, "guard elements not changed; it is written anew"),
                }
            }
        }
        self.rewrite(wanted)
    }

    fn rewrite(&mut self, wanted: &Guard) -> Result<(), NftError> {
        (self.seen, self.handles) = (None, None);
        self.nft.commit(&guard::rewrite(wanted))
    }

    /// Puts the wanted guard back where it is not in force, or in any case when `changed`: a rule that was replaced
    /// by another with the same comment looks the same. Whether anything was written.
    ///
    /// # Errors
    /// As [`Keeper::set`].
    pub(super) fn restore(&mut self, changed: bool) -> Result<bool, NftError> {
        let Some(wanted) = self.wanted.clone() else { return Ok(false) };
        if !changed && self.look().is_ok_and(|found| found.as_ref() == Some(&wanted)) {
            return Ok(false);
        }
        self.rewrite(&wanted)?;
        Ok(true)
    }
}
