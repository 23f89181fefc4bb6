//! GC: release whatever the runtime no longer knows.

use std::collections::BTreeSet;
use std::time::Duration;

use mesh_core::api::{AttachmentId, GcRequest};

use crate::daemon::Daemon;
use crate::error::{CniError, Code};
use crate::invocation::GcCommand;
use crate::lock::Lock;
use crate::wiring::Host;

/// For the whole operation; CRI-O gives up after 30 seconds.
const LIMIT: Duration = Duration::from_secs(25);

/// How long a restarting daemon is waited for.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long another operation on one attachment is waited for.
const LOCK_LIMIT: Duration = Duration::from_secs(2);

/// Removes devices and leases of this network that are not in the list.
///
/// As with DEL the devices go first. A device that cannot be removed keeps its lease.
///
/// # Errors
/// Everything that could not be removed, together; the rest is removed all the same.
pub(crate) fn gc(command: &GcCommand) -> Result<(), CniError> {
    let Some(valid) = &command.valid else {
        tracing::info!("the runtime sent no list of valid attachments; nothing is released");
        return Ok(());
    };
    let conf = &command.conf;
    let mut keep: BTreeSet<AttachmentId> = valid.iter().cloned().collect();
    let daemon = Daemon::new(&conf.socket, PATIENCE, LIMIT)?;
    let mut host = Host::open()?;
    let mut failures = Vec::new();
    for stale in daemon.attachments()? {
        if stale.network != conf.name || keep.contains(&stale.id) {
            continue;
        }
        let removed = Lock::acquire(&conf.state_dir, &stale.id, LOCK_LIMIT)
            .and_then(|_lock| host.delete(&stale.id.host_ifname()));
        if let Err(error) = removed {
            failures.push(format!("{}: {error}", stale.id));
            keep.insert(stale.id);
        }
    }
    let request = GcRequest { network: conf.name.clone(), valid: keep.into_iter().collect() };
    let report = daemon.gc(&request)?;
    for id in report.released {
        match host.delete(&id.host_ifname()) {
            Ok(_) => tracing::info!(attachment = %id, "released a stale attachment"),
            Err(error) => failures.push(format!("{id}: {error}")),
        }
    }
    if failures.is_empty() {
        return Ok(());
    }
    let summary =
        CniError::new(Code::Kernel, format!("{} stale attachments could not be removed", failures.len()));
    Err(failures.into_iter().fold(summary, CniError::with_details))
}
