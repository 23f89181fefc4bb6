//! DEL: always possible, also without namespace, daemon, or anything to delete.

use std::time::Duration;

use crate::daemon::Daemon;
use crate::error::{CniError, Code};
use crate::invocation::DelCommand;
use crate::lock::Lock;
use crate::tombstone;
use crate::wiring::{Container, Host};

/// For the daemon. A daemon that hangs must not keep pods in Terminating.
const LIMIT: Duration = Duration::from_secs(10);

/// How long another operation on the same attachment is waited for.
const LOCK_LIMIT: Duration = Duration::from_secs(10);

/// Detaches the container.
///
/// The device goes first: as long as it is there, the container may use its addresses, and they must not be
/// leased again.
///
/// # Errors
/// When the device cannot be removed, or the lease can neither be released now nor noted for later.
pub(crate) fn del(command: &DelCommand) -> Result<(), CniError> {
    let (conf, id) = (&command.conf, &command.id);
    let _lock = match Lock::acquire(&conf.state_dir, id, LOCK_LIMIT) {
        Ok(lock) => Some(lock),
        Err(error) if error.code() == Code::TryAgainLater => return Err(error),
        Err(error) => {
            tracing::warn!(%error, "going on without the lock");
            None
        }
    };
    let mut host = Host::open()?;
    if let Err(error) = delete_rules(command, &mut host) {
        // The namespace is gone or was never there, or rules are left in it that lead nowhere.
        tracing::debug!(%error, "nothing was changed inside the container");
    }
    let removed = host.delete(&id.host_ifname())?;
    let daemon = Daemon::new(&conf.socket, Duration::ZERO, LIMIT)?;
    match daemon.detach(id) {
        Ok(()) => {
            tombstone::remove(&conf.state_dir, id)?;
            tracing::info!(attachment = %id, netns = command.netns, device = removed, "detached");
        }
        Err(error) if error.is_away() => {
            tombstone::write(&conf.state_dir, id)?;
            // The daemon may have looked for tombstones just before this one was there.
            match daemon.detach(id) {
                Ok(()) => tombstone::remove(&conf.state_dir, id)?,
                Err(_) => {
                    tracing::warn!(attachment = %id, device = removed, %error, "detached; meshd will release the lease when it is back");
                }
            }
        }
        Err(error) => return Err(error.into()),
    }
    Ok(())
}

/// Whatever else is in the container goes with the device. Nothing is done unless the device is ours.
fn delete_rules(command: &DelCommand, host: &mut Host) -> Result<(), CniError> {
    let (Some(netns), Some(host_end)) = (&command.netns, host.link(&command.id.host_ifname())?) else {
        return Ok(());
    };
    let mut container = Container::open(netns)?;
    match container.link(command.id.ifname())? {
        Some(link) if host_end.peer_index == Some(link.index) => container.delete_rules(link.index),
        Some(_) | None => Ok(()),
    }
}
