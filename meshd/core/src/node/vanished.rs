//! Attachments that ended without a word: no DEL came, and no tombstone is there.
//!
//! A container runtime that is killed, or a host that is cleaned up by hand, leaves a lease behind. Its address is
//! released when nothing is left that could use it: the host's end of its veth pair is gone, which ends the other
//! end too, and so is the network namespace. The namespace alone proves nothing, because the daemon may not see the
//! paths of the runtime; the device alone proves nothing, because an ADD makes it only after the lease. And both
//! must be gone for [`GONE_FOR`], at every look in between.

use std::collections::BTreeMap;
use std::time::Duration;

use super::Node;
use crate::api::{AttachmentId, NetnsId};
use crate::leases::Lease;
use crate::time::Time;

/// How long nothing must have been left. Longer than the plugin's limit for an ADD (45 s): between the lease and
/// the device that follows it, no attachment is taken for a vanished one.
pub const GONE_FOR: Duration = Duration::from_secs(60);

/// What is left of an attachment on this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Remains {
    /// Whether the host's end of the veth pair exists.
    pub host_end: bool,
    /// What is at the path of the network namespace.
    pub netns: NetnsLook,
}

/// What is at a path where a network namespace was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NetnsLook {
    /// Nothing, or no network namespace.
    Missing,
    /// This namespace.
    Found(NetnsId),
    /// The look failed, or there was no need for it.
    Unknown,
}

impl Remains {
    /// Whether nothing is left that could use the address of `lease`.
    fn nothing_of(&self, lease: &Lease) -> bool {
        let other = match self.netns {
            NetnsLook::Missing => true,
            NetnsLook::Found(found) => lease.netns_id.is_some_and(|known| known != found),
            NetnsLook::Unknown => false,
        };
        !self.host_end && other
    }
}

impl Node {
    /// The leases, for a look at what is left of them.
    pub fn leases(&self) -> impl Iterator<Item = (&AttachmentId, &Lease)> {
        self.leases.all().iter()
    }

    pub(super) fn on_remains(&mut self, remains: &BTreeMap<AttachmentId, Remains>, begun: Time) {
        let (now, leases) = (self.now, &self.leases);
        self.vanishing.retain(|id, _| leases.get(id).is_some());
        let mut gone = Vec::new();
        for (id, remains) in remains {
            let Some(lease) = leases.get(id) else { continue };
            if !remains.nothing_of(lease) {
                self.vanishing.remove(id);
                continue;
            }
            // From when the first look was heard of to when this one began: a result that waited says nothing of
            // the time that it waited.
            let since = *self.vanishing.entry(id.clone()).or_insert(now);
            if begun.since(since) >= GONE_FOR {
                gone.push(id.clone());
            }
        }
        if gone.is_empty() {
            return;
        }
        for id in &gone {
            tracing::info!(attachment = %id, "device and network namespace are gone without a DEL");
            self.vanishing.remove(id);
        }
        self.release_all(None, &gone, false);
    }
}
