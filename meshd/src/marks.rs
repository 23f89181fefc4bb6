//! What lies beside the control socket until the host's next boot, and is on no copy of the state directory.

use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use mesh_core::api::HEARTBEAT_FILE;
use mesh_core::node::StartMark;
use mesh_sys::files;

/// What the host remembers of its node.
const START_FILE: &str = "start";

/// Longest such file, in bytes.
const MAX_START: usize = 1024;

/// Pause after a write that failed.
const RETRY: Duration = Duration::from_secs(5);

/// Tells the CNI plugin that the daemon was able to serve a moment ago.
#[derive(Debug)]
pub struct Heartbeat(PathBuf);

impl Heartbeat {
    /// The plugin looks for it beside the socket.
    pub fn new(socket: &Path) -> Self {
        Self(socket.with_file_name(HEARTBEAT_FILE))
    }

    /// The daemon can serve now.
    pub fn beat(&self) {
        let written = std::fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&self.0)
            .and_then(|mut file| file.write_all(b""));
        // The plugin takes a missing heartbeat for a daemon that is gone: a warning is all there is to do.
        if let Err(error) = written {
            tracing::warn!(path = %self.0.display(), %error, "heartbeat cannot be written");
        }
    }
}

/// Remembers the node's last start on this host, and its writes, until the next boot.
#[derive(Debug)]
pub struct Starts {
    path: PathBuf,
    boot: String,
    noted: Option<StartMark>,
    failed: Option<Instant>,
}

impl Starts {
    /// Beside the control socket.
    pub fn new(socket: &Path, boot: &str) -> Self {
        Self { path: socket.with_file_name(START_FILE), boot: boot.to_owned(), noted: None, failed: None }
    }

    /// What was noted last since the host's boot.
    pub fn read(&self) -> Option<StartMark> {
        let path = self.path.display();
        let bytes = match files::read_limited(&self.path, MAX_START) {
            Ok(bytes) => bytes,
            Err(error) if error.is_missing() => return None,
            Err(error) => {
                tracing::warn!(%error, "what was noted of the last start cannot be read");
                return None;
            }
        };
        let text = String::from_utf8_lossy(&bytes);
        let (boot, mark) = text.trim_end().split_once(' ').unwrap_or_default();
        if boot != self.boot {
            return None;
        }
        mark.parse::<StartMark>()
            .inspect_err(|error| tracing::warn!(%path, %error, "what was noted of the last start is no use"))
            .ok()
    }

    /// Notes what the next start needs, if it is not noted yet. What is there is replaced as a whole.
    pub fn note(&mut self, mark: Option<StartMark>) {
        let Some(mark) = mark.filter(|mark| self.noted != Some(*mark)) else { return };
        if self.failed.is_some_and(|failed| failed.elapsed() < RETRY) {
            return;
        }
        match files::write_atomic(&self.path, format!("{} {mark}\n", self.boot).as_bytes(), 0o600) {
            Ok(()) => (self.noted, self.failed) = (Some(mark), None),
            Err(error) => {
                // What is noted is of an earlier start, which another member has to confirm, or of earlier writes.
                tracing::warn!(%error, "this start cannot be noted; it is tried again");
                self.failed = Some(Instant::now());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use mesh_core::state::Writes;
    use mesh_keys::Identity;

    use super::*;

    fn mark(generation: u64) -> StartMark {
        let writes = Writes { numbers: [generation + 1; 6] };
        StartMark { node: Identity::from_bytes(&[1; 32]).node_id(), generation, writes, superseded: None }
    }

    #[test]
    fn a_start_is_remembered_until_the_next_boot() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("meshd.sock");
        let mut starts = Starts::new(&socket, "boot-1");
        assert_eq!(starts.read(), None);
        starts.note(None);
        assert_eq!(starts.read(), None);
        for generation in [1, 2] {
            starts.note(Some(mark(generation)));
            assert_eq!(Starts::new(&socket, "boot-1").read(), Some(mark(generation)));
        }
        for other in ["boot-2", "boot", "boot-11", ""] {
            assert_eq!(Starts::new(&socket, other).read(), None, "{other:?}");
        }
        let mode = std::fs::metadata(dir.path().join("start")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn what_an_earlier_version_or_nobody_wrote_is_not_believed() {
        let dir = tempfile::tempdir().unwrap();
        let starts = Starts::new(&dir.path().join("meshd.sock"), "b");
        for text in ["b 7\n", "b ", "b", "", "\u{fffd}", &format!("b {} 8\n", mark(1))] {
            std::fs::write(dir.path().join("start"), text).unwrap();
            assert_eq!(starts.read(), None, "{text:?}");
        }
    }

    #[test]
    fn what_could_not_be_noted_is_noted_later() {
        let dir = tempfile::tempdir().unwrap();
        let gone = dir.path().join("run");
        let mut starts = Starts::new(&gone.join("meshd.sock"), "b");
        starts.note(Some(mark(1)));
        assert_eq!(starts.read(), None);
        std::fs::create_dir(&gone).unwrap();
        starts.failed = starts.failed.and_then(|at| at.checked_sub(RETRY));
        starts.note(Some(mark(1)));
        assert_eq!(starts.read(), Some(mark(1)));
    }

    #[test]
    fn a_heartbeat_is_for_root_and_moves_on() {
        let dir = tempfile::tempdir().unwrap();
        let heartbeat = Heartbeat::new(&dir.path().join("meshd.sock"));
        let path = dir.path().join(HEARTBEAT_FILE);
        heartbeat.beat();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let long_ago = std::time::SystemTime::now() - Duration::from_secs(3600);
        std::fs::File::options().write(true).open(&path).unwrap().set_modified(long_ago).unwrap();
        heartbeat.beat();
        assert!(std::fs::metadata(&path).unwrap().modified().unwrap() > long_ago + Duration::from_secs(3000));
    }
}
