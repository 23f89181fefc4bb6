//! The configuration socket as a file: made for us alone, replaced when stale, removed at the end.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{DirBuilderExt as _, FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::stat::{Mode, umask};

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Another process answers there.
    #[error("{path} is answered by another process: already running?")]
    Live {
        /// The socket.
        path: PathBuf,
    },
    /// Something that is no socket is in the way; it is left alone.
    #[error("{path} exists and is no socket: remove it if nobody needs it")]
    NotASocket {
        /// The file.
        path: PathBuf,
    },
    /// A step failed.
    #[error("{what} {path}: {source}")]
    Io {
        /// The step.
        what: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// A listening socket and the file it is known by. Dropping it removes the file if it is still ours.
#[derive(Debug)]
pub(crate) struct SocketFile {
    path: PathBuf,
    listener: UnixListener,
    /// Device and inode: a file of the same name may be somebody else's.
    identity: (u64, u64),
    watch: Inotify,
}

/// Fails when a live process answers at `path`. Cheap, so it comes before anything is made.
pub(crate) fn refuse_live(path: &Path) -> Result<(), SocketError> {
    match UnixStream::connect(path) {
        Ok(_stream) => Err(SocketError::Live { path: path.to_owned() }),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            // A socket nobody listens on, or a file that is no socket at all.
            let is_socket = fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket());
            if is_socket { Ok(()) } else { Err(SocketError::NotASocket { path: path.to_owned() }) }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(source) => {
            Err(SocketError::Io { what: "looking for another process at", path: path.to_owned(), source })
        }
    }
}

impl SocketFile {
    /// Listens at `path`, mode 0600. The process must have only one thread yet, or none that makes files: the mask
    /// for new files is narrowed for a moment.
    pub(crate) fn bind(path: &Path) -> Result<Self, SocketError> {
        let failed = |what, path: &Path| {
            let path = path.to_owned();
            move |source| SocketError::Io { what, path, source }
        };
        let directory = path.parent().unwrap_or(Path::new("/"));
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(directory)
            .map_err(failed("making", directory))?;
        refuse_live(path)?;
        match fs::remove_file(path) {
            Ok(()) => tracing::info!(path = %path.display(), "removed the socket of a process that is gone"),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed("removing the stale socket", path)(error)),
        }
        let before = umask(Mode::from_bits_truncate(0o177));
        let listener = UnixListener::bind(path);
        umask(before);
        let listener = listener.map_err(failed("binding", path))?;
        let restrict = || -> io::Result<(u64, u64)> {
            fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
            let meta = fs::symlink_metadata(path)?;
            Ok((meta.dev(), meta.ino()))
        };
        let identity = restrict().map_err(failed("restricting", path))?;
        listener.set_nonblocking(true).map_err(failed("preparing", path))?;
        let watch = || -> Result<Inotify, Errno> {
            let watch = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
            // On the file, not on what happens around it: other devices' sockets are in the same directory. Removing a
            // name changes the number of links, which is an attribute.
            let moved = AddWatchFlags::IN_DELETE_SELF | AddWatchFlags::IN_MOVE_SELF;
            watch.add_watch(path, moved | AddWatchFlags::IN_ATTRIB)?;
            watch.add_watch(directory, moved)?;
            Ok(watch)
        };
        let watch = watch().map_err(|errno| failed("watching", path)(errno.into()))?;
        Ok(Self { path: path.to_owned(), listener, identity, watch })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn listener(&self) -> &UnixListener {
        &self.listener
    }

    /// Becomes readable when the file may have been removed or renamed.
    pub(crate) fn watch(&self) -> BorrowedFd<'_> {
        self.watch.as_fd()
    }

    /// After [`SocketFile::watch`] became readable: whether our file is still there.
    pub(crate) fn is_present(&self) -> bool {
        loop {
            match self.watch.read_events() {
                Ok(_events) => {}
                Err(Errno::EAGAIN) => break,
                Err(Errno::EINTR) => {}
                Err(error) => {
                    tracing::warn!(%error, "the watch on the socket's directory failed");
                    break;
                }
            }
        }
        self.is_ours()
    }

    fn is_ours(&self) -> bool {
        fs::symlink_metadata(&self.path).is_ok_and(|meta| (meta.dev(), meta.ino()) == self.identity)
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if self.is_ours()
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::warn!(path = %self.path.display(), %error, "the socket could not be removed");
        }
    }
}

#[cfg(test)]
mod tests {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    use super::*;

    #[test]
    fn a_stale_socket_is_replaced_and_a_live_one_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("deep/wg.sock");
        let first = SocketFile::bind(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(matches!(SocketFile::bind(&path), Err(SocketError::Live { .. })));
        // As a killed process leaves it.
        let SocketFile { listener, .. } = &first;
        let stale = listener.try_clone().unwrap();
        let kept = directory.path().join("deep/kept.sock");
        fs::rename(&path, &kept).unwrap();
        assert!(!first.is_present());
        drop((stale, first));
        assert!(kept.exists(), "what was renamed is not ours to remove");
        fs::rename(&kept, &path).unwrap();
        let second = SocketFile::bind(&path).unwrap();
        assert!(second.is_present());
        drop(second);
        assert!(!path.exists());
    }

    #[test]
    fn a_file_in_the_way_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("wg.sock");
        fs::write(&path, "precious").unwrap();
        assert!(matches!(SocketFile::bind(&path), Err(SocketError::NotASocket { .. })));
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    }

    #[test]
    fn a_removed_socket_is_noticed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("wg.sock");
        let socket = SocketFile::bind(&path).unwrap();
        let told = || {
            let mut fds = [PollFd::new(socket.watch(), PollFlags::POLLIN)];
            poll(&mut fds, PollTimeout::from(200u8)).unwrap() == 1
        };
        fs::write(directory.path().join("other"), "").unwrap();
        fs::remove_file(directory.path().join("other")).unwrap();
        assert!(!told() && socket.is_present(), "other files do not matter");
        fs::remove_file(&path).unwrap();
        assert!(told() && !socket.is_present());
    }
}
