//! STATUS: can ADD be served?

use std::path::Path;
use std::time::{Duration, SystemTime};

use crate::config::NetConf;
use crate::daemon::{Daemon, DaemonError};
use crate::error::{CniError, Code};

/// Runtimes ask inside their own status call and hold a lock while they wait, so an answer within a second
/// must be there whatever the daemon does; the rest of the second is for starting the process.
const LIMIT: Duration = Duration::from_millis(800);

/// The file in the run directory that the daemon touches while it can serve ADD.
pub(crate) const HEARTBEAT_FILE: &str = "heartbeat";

/// How long a daemon may be away (for an upgrade, say) before the node is reported as not ready. Runtimes
/// have no grace period of their own.
pub(crate) const GRACE: Duration = Duration::from_secs(30);

/// Asks the daemon, or its heartbeat.
///
/// # Errors
/// Code 50 with the reason.
pub(crate) fn status(conf: &NetConf) -> Result<(), CniError> {
    let daemon = Daemon::new(&conf.socket, Duration::ZERO, LIMIT)?;
    let error = match daemon.ready() {
        Ok(()) => return Ok(()),
        Err(error) => error,
    };
    let not_available = CniError::new(Code::NotAvailable, error.to_string());
    match error {
        DaemonError::Refused(_) | DaemonError::Nonsense { .. } => Err(not_available),
        DaemonError::Away { .. } => match heartbeat_age(&conf.run_dir, SystemTime::now()) {
            Some(age) if age < GRACE => {
                tracing::warn!(age_seconds = age.as_secs(), "meshd is away; its heartbeat is recent enough");
                Ok(())
            }
            Some(age) => Err(not_available.with_details(format!("last heartbeat {} s ago", age.as_secs()))),
            None => Err(not_available.with_details("no heartbeat")),
        },
    }
}

/// How long ago the daemon last said that it can serve. None when it never did since boot, or when the clock
/// was set back since, so that one cannot tell.
fn heartbeat_age(run_dir: &Path, now: SystemTime) -> Option<Duration> {
    let modified = std::fs::metadata(run_dir.join(HEARTBEAT_FILE)).ok()?.modified().ok()?;
    now.duration_since(modified).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn s086_the_heartbeat_has_an_age() {
        let dir = tempfile::tempdir().unwrap();
        let now = SystemTime::now();
        assert_eq!(heartbeat_age(dir.path(), now), None);
        let file = std::fs::File::create(dir.path().join(HEARTBEAT_FILE)).unwrap();
        file.set_modified(now - Duration::from_secs(29)).unwrap();
        assert_eq!(heartbeat_age(dir.path(), now).map(|age| age.as_secs()), Some(29));
        file.set_modified(now + Duration::from_secs(3600)).unwrap();
        assert_eq!(heartbeat_age(dir.path(), now), None, "a clock that was set back proves nothing");
    }
}
