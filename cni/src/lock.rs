//! One operation at a time on one attachment.
//!
//! Runtimes promise not to run two operations on one container at once, and break the promise when they
//! restart. A second ADD that took the first one's device for a leftover of a killed ADD would destroy it.
//!
//! All attachments share one lock file; each locks one byte of it, at the place its hash says. The kernel
//! releases the lock when the process ends, however it ends, and no files pile up.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use mesh_core::api::{AttachmentId, DEFAULT_STATE_DIR};
use mesh_sys::files::{self, FileError, Ours};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

use crate::error::{CniError, Code};

/// The lock file in the state directory.
const LOCK_FILE: &str = "cni.lock";

/// An operation takes some ten milliseconds; the pause is short beside it.
const PAUSE: Duration = Duration::from_millis(10);

/// The right to work on an attachment, held until dropped.
#[derive(Debug)]
pub(crate) struct Lock {
    _file: File,
}

impl Lock {
    /// Waits for the right to work on `id`.
    ///
    /// # Errors
    /// Code 11 when another operation holds it for longer than `limit`; code 5 when there can be no lock file.
    pub(crate) fn acquire(state_dir: &Path, id: &AttachmentId, limit: Duration) -> Result<Self, CniError> {
        secure_state_dir(state_dir).map_err(|error| CniError::new(Code::Io, error.to_string()))?;
        let path = state_dir.join(LOCK_FILE);
        let failed =
            |error: io::Error| CniError::new(Code::Io, format!("lock file {}: {error}", path.display()));
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC)
            .open(&path)
            .map_err(failed)?;
        let place = place(id);
        let range = libc::flock {
            l_type: libc::F_WRLCK as libc::c_short,
            l_whence: libc::SEEK_SET as libc::c_short,
            l_start: place,
            l_len: 1,
            l_pid: 0,
        };
        let give_up = Instant::now() + limit;
        loop {
            match fcntl(&file, FcntlArg::F_OFD_SETLK(&range)) {
                Ok(_) => return Ok(Self { _file: file }),
                Err(Errno::EAGAIN | Errno::EACCES) if Instant::now() < give_up => std::thread::sleep(PAUSE),
                Err(Errno::EAGAIN | Errno::EACCES) => {
                    return Err(CniError::new(
                        Code::TryAgainLater,
                        format!("another operation on {id} is still running after {} s", limit.as_secs()),
                    ));
                }
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(failed(errno.into())),
            }
        }
    }
}

/// The byte of an attachment: the hash in the name of its host interface, 48 bits.
fn place(id: &AttachmentId) -> libc::off_t {
    id.host_ifname()
        .bytes()
        .filter_map(|b| char::from(b).to_digit(16))
        .fold(0, |n, digit| n << 4 | i64::from(digit))
}

/// Makes sure that there is a state directory that is closed to others. One that is not the daemon's, because the
/// configuration names another, is not touched.
pub(crate) fn secure_state_dir(state_dir: &Path) -> Result<(), FileError> {
    let known = state_dir == Path::new(DEFAULT_STATE_DIR) || state_dir.join("identity.key").exists();
    files::secure_dir(state_dir, 0o700, if known { Ours::Known } else { Ours::WhenEmpty })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(container: &str) -> AttachmentId {
        AttachmentId::new(container, "eth0").unwrap()
    }

    #[test]
    fn s059_one_attachment_is_locked_and_others_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state");
        let held = Lock::acquire(&state, &id("a"), Duration::ZERO).unwrap();
        let other = Lock::acquire(&state, &id("b"), Duration::ZERO).unwrap();
        let error = Lock::acquire(&state, &id("a"), Duration::from_millis(30)).unwrap_err();
        assert_eq!(error.code(), Code::TryAgainLater);
        assert!(error.msg().contains("a/eth0"), "{error}");
        drop(held);
        Lock::acquire(&state, &id("a"), Duration::ZERO).unwrap();
        drop(other);
    }

    #[test]
    fn the_place_is_the_hash_of_48_bits() {
        let id = id("c");
        let hex = id.host_ifname()[2..].to_owned();
        assert_eq!(place(&id), i64::from_str_radix(&hex, 16).unwrap());
        assert_eq!(hex.len(), 12);
    }

    #[test]
    fn a_directory_that_others_use_is_left_as_it_is() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("something"), "").unwrap();
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o1777)).unwrap();
        let error = Lock::acquire(dir.path(), &id("a"), Duration::ZERO).unwrap_err();
        assert!(error.msg().contains("open to others"), "{error}");
        assert_eq!(std::fs::metadata(dir.path()).unwrap().permissions().mode() & 0o7777, 0o1777);
    }

    #[test]
    fn a_state_directory_that_cannot_be_is_an_error_with_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        let error = Lock::acquire(&file.join("state"), &id("a"), Duration::ZERO).unwrap_err();
        assert_eq!(error.code(), Code::Io);
        assert!(error.msg().contains("file"), "{error}");
    }
}
