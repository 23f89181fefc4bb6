//! State files that survive a crash, and the guards around them.
//!
//! A file written by [`write_atomic`] is, after a crash at any instant, either the old one or the new
//! one, whole; when the call has returned it is the new one, also after a power cut.

use std::ffi::OsString;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use zeroize::{Zeroize as _, Zeroizing};

/// Why an operation on a file failed. The message names the path and, where one is known, the
/// likely cause.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FileError {
    /// A system call failed.
    #[error("{}: {action}: {source}{}", path.display(), hint(source))]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What was being done.
        action: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The file is larger than the reader allows.
    #[error("{}: larger than the {max} bytes allowed here", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// The limit in bytes.
        max: usize,
    },
    /// Owner or mode would let somebody else read or change it.
    #[error("{}: {problem}", path.display())]
    Insecure {
        /// The file or directory.
        path: PathBuf,
        /// What is wrong and what it should be.
        problem: String,
    },
    /// Another process holds the lock.
    #[error("{}: locked by {}", path.display(), holder(*pid))]
    Locked {
        /// The lock file.
        path: PathBuf,
        /// Process id of the holder, when it wrote one.
        pid: Option<u32>,
    },
}

impl FileError {
    /// Whether the file is simply not there.
    #[must_use]
    pub fn is_missing(&self) -> bool {
        match self {
            Self::Io { source, .. } => source.kind() == io::ErrorKind::NotFound,
            Self::TooLarge { .. } | Self::Insecure { .. } | Self::Locked { .. } => false,
        }
    }
}

fn holder(pid: Option<u32>) -> String {
    pid.map_or_else(|| "another process".to_owned(), |pid| format!("process {pid}"))
}

fn hint(error: &io::Error) -> &'static str {
    match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::ENOSPC) => " (the file system is full, or out of inodes)",
        Some(Errno::EDQUOT) => " (the quota is used up)",
        Some(Errno::EROFS) => " (the file system is mounted read-only)",
        Some(Errno::EACCES | Errno::EPERM) => {
            " (run as root, or check owner and mode of the directories above)"
        }
        Some(Errno::ENOENT) => " (it does not exist)",
        Some(Errno::ELOOP) => " (a symbolic link is not accepted here)",
        _ => "",
    }
}

fn io_error(path: &Path, action: &'static str) -> impl FnOnce(io::Error) -> FileError {
    move |source| FileError::Io { path: path.to_owned(), action, source }
}

/// Replaces `path` by a file with these contents and mode (for example `0o600`), atomically and
/// durably: temporary file beside it, fsync, rename, fsync of the directory.
///
/// The temporary file is made with mode 0600 and gets its final mode before the rename, so contents
/// are never readable by more than the final mode allows. Its name starts with a dot and ends in
/// `.tmp`, which directory watchers such as CNI runtimes ignore.
///
/// # Errors
/// [`FileError::Io`]. Before the rename: the old file is untouched and the temporary one removed.
/// When the final fsync of the directory fails the new file is in place but may not survive a power
/// cut.
pub fn write_atomic(path: &Path, contents: &[u8], mode: u32) -> Result<(), FileError> {
    let dir = parent(path);
    let (mut file, temp) = create_temp(path, dir)?;
    let filled = (|| {
        file.write_all(contents).map_err(io_error(path, "writing"))?;
        file.set_permissions(fs::Permissions::from_mode(mode)).map_err(io_error(path, "setting the mode"))?;
        file.sync_all().map_err(io_error(path, "syncing"))?;
        fs::rename(&temp, path).map_err(io_error(path, "renaming into place"))
    })();
    if let Err(error) = filled {
        // The first error is the one to report; a leftover temporary file does no harm.
        let _ = fs::remove_file(&temp);
        return Err(error);
    }
    sync_dir(dir)
}

/// Reads a file of at most `max` bytes. Nothing beyond that is ever allocated.
///
/// # Errors
/// [`FileError::Io`] (see [`FileError::is_missing`]), [`FileError::TooLarge`].
pub fn read_limited(path: &Path, max: usize) -> Result<Vec<u8>, FileError> {
    // O_NONBLOCK: a FIFO must not make us wait for its writer.
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map_err(io_error(path, "opening"))?;
    let meta = file.metadata().map_err(io_error(path, "inspecting"))?;
    if !meta.is_file() {
        return Err(FileError::Insecure { path: path.to_owned(), problem: "not a regular file".into() });
    }
    let limit = u64::try_from(max).unwrap_or(u64::MAX);
    if meta.len() > limit {
        return Err(FileError::TooLarge { path: path.to_owned(), max });
    }
    // One byte more, so that the end is found without growing: growing would leave copies of secrets behind.
    let mut bytes = vec![0; usize::try_from(meta.len()).unwrap_or(max).saturating_add(1)];
    let mut file = file.take(limit.saturating_add(1));
    let mut filled = 0;
    let error = loop {
        match file.read(&mut bytes[filled..]) {
            Ok(0) if filled <= max => {
                bytes.truncate(filled);
                return Ok(bytes);
            }
            Ok(0) => break FileError::TooLarge { path: path.to_owned(), max },
            // It has grown since, or does not tell its length.
            Ok(count) if filled + count == bytes.len() => {
                filled += count;
                bytes.resize(bytes.len() * 2 + 64, 0);
            }
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => break io_error(path, "reading")(error),
        }
    };
    bytes.zeroize();
    Err(error)
}

/// Reads a file that holds a secret: as [`read_limited`], and refused when others may read or write
/// it, or when it belongs to somebody else than this process or root.
///
/// # Errors
/// As [`read_limited`]; [`FileError::Insecure`].
pub fn read_secret(path: &Path, max: usize) -> Result<Zeroizing<Vec<u8>>, FileError> {
    let meta = fs::metadata(path).map_err(io_error(path, "inspecting"))?;
    check_owner(path, &meta)?;
    let mode = meta.mode() & 0o777;
    if mode & 0o077 != 0 {
        return Err(FileError::Insecure {
            path: path.to_owned(),
            problem: format!("holds a secret and has mode {mode:03o}: chmod 600 it"),
        });
    }
    read_limited(path, max).map(Zeroizing::new)
}

/// Whose a directory is that is there already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ours {
    /// Ours, whatever is in it.
    Known,
    /// Ours if nothing is in it: it was made for us, by a package or a container runtime.
    WhenEmpty,
}

/// Makes sure that `path` is a directory with at most this mode (0700 for state): creates it and its missing parents,
/// tightens a looser mode if it is ours, refuses a symbolic link, a foreign owner, and a looser mode of what is not ours:
/// others use it too, such as `/tmp`.
///
/// # Errors
/// [`FileError::Io`], [`FileError::Insecure`].
pub fn secure_dir(path: &Path, mode: u32, ours: Ours) -> Result<(), FileError> {
    if let Some(up) = path.parent().filter(|p| !p.as_os_str().is_empty()) {
        DirBuilder::new().recursive(true).mode(0o755).create(up).map_err(io_error(up, "creating"))?;
    }
    match DirBuilder::new().mode(mode).create(path) {
        Ok(()) => sync_dir(parent(path))?,
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
        Err(e) => return Err(io_error(path, "creating")(e)),
    }
    // Checked and changed through one descriptor, so that what is checked is what is changed.
    let dir = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW)
        .open(path)
        .map_err(io_error(path, "opening"))?;
    let meta = dir.metadata().map_err(io_error(path, "inspecting"))?;
    check_owner(path, &meta)?;
    let present = meta.mode() & 0o7777;
    if present & !mode & 0o777 != 0 {
        let empty = || fs::read_dir(path).map(|mut entries| entries.next().is_none());
        if ours == Ours::WhenEmpty && !empty().map_err(io_error(path, "listing"))? {
            return Err(FileError::Insecure {
                path: path.to_owned(),
                problem: format!(
                    "is open to others (mode {present:04o}), and what is in it is not ours: give a directory that nothing else uses, or close it (mode {mode:04o})"
                ),
            });
        }
        dir.set_permissions(fs::Permissions::from_mode(mode)).map_err(io_error(path, "setting the mode"))?;
        tracing::warn!(
            path = %path.display(),
            was = format!("{present:04o}"),
            now = format!("{mode:04o}"),
            "directory was open to others; closed it"
        );
    }
    Ok(())
}

fn check_owner(path: &Path, meta: &fs::Metadata) -> Result<(), FileError> {
    let me = nix::unistd::geteuid().as_raw();
    if meta.uid() != me && meta.uid() != 0 {
        return Err(FileError::Insecure {
            path: path.to_owned(),
            problem: format!("belongs to user {}, not to user {me} or root", meta.uid()),
        });
    }
    Ok(())
}

/// Removes a file so that it stays removed after a power cut. A missing file is success; returns
/// whether it was there.
///
/// # Errors
/// [`FileError::Io`].
pub fn remove_durable(path: &Path) -> Result<bool, FileError> {
    match fs::remove_file(path) {
        Ok(()) => sync_dir(parent(path)).map(|()| true),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(io_error(path, "removing")(e)),
    }
}

/// A lock that lives as long as this value or its process, whichever ends first (`flock`).
///
/// The file stays when the lock is released: removing it would let two processes lock two different
/// files of one name.
#[derive(Debug)]
pub struct LockFile {
    path: PathBuf,
    _file: Flock<File>,
}

impl LockFile {
    /// Takes the lock without waiting and writes this process's id into the file.
    ///
    /// # Errors
    /// [`FileError::Locked`] with the holder's process id; [`FileError::Io`].
    pub fn acquire(path: &Path) -> Result<Self, FileError> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(path)
            .map_err(io_error(path, "opening"))?;
        let mut locked = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(locked) => locked,
            Err((mut file, Errno::EWOULDBLOCK)) => {
                return Err(FileError::Locked { path: path.to_owned(), pid: read_pid(&mut file) });
            }
            Err((_, e)) => return Err(io_error(path, "locking")(e.into())),
        };
        locked.set_len(0).map_err(io_error(path, "emptying"))?;
        locked.rewind().map_err(io_error(path, "rewinding"))?;
        writeln!(locked, "{}", std::process::id()).map_err(io_error(path, "writing"))?;
        Ok(Self { path: path.to_owned(), _file: locked })
    }

    /// The lock file's path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

fn read_pid(file: &mut File) -> Option<u32> {
    let mut text = String::new();
    file.take(16).read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    }
}

fn create_temp(path: &Path, dir: &Path) -> Result<(File, PathBuf), FileError> {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let Some(name) = path.file_name() else {
        return Err(FileError::Insecure { path: path.to_owned(), problem: "has no file name".into() });
    };
    // A crashed predecessor with our process id may have left some of these names behind.
    for _ in 0..1000 {
        let mut temp = OsString::from(".");
        temp.push(name);
        temp.push(format!(".{}.{}.tmp", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed)));
        let temp = dir.join(temp);
        match OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temp) {
            Ok(file) => return Ok((file, temp)),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(io_error(path, "creating a temporary file beside it")(e)),
        }
    }
    Err(io_error(path, "creating a temporary file beside it")(io::Error::from_raw_os_error(libc::EEXIST)))
}

fn sync_dir(dir: &Path) -> Result<(), FileError> {
    File::open(dir).and_then(|d| d.sync_all()).map_err(io_error(dir, "syncing the directory"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_replaces_the_whole_file_and_leaves_nothing_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        write_atomic(&path, b"one, and long", 0o600).unwrap();
        write_atomic(&path, b"two", 0o644).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o644);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_failed_write_leaves_the_old_state() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("d");
        fs::create_dir(&path).unwrap();
        let error = write_atomic(&path, b"x", 0o600).unwrap_err();
        assert!(error.to_string().contains("renaming into place"), "{error}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "temporary file left behind");
        let error = write_atomic(&dir.path().join("absent/file"), b"x", 0o600).unwrap_err();
        assert!(error.to_string().contains("absent/file"), "{error}");
    }

    #[test]
    fn reading_stops_at_the_limit() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        fs::write(&path, b"12345").unwrap();
        assert_eq!(read_limited(&path, 5).unwrap(), b"12345");
        assert!(matches!(read_limited(&path, 4), Err(FileError::TooLarge { max: 4, .. })));
        // It does not tell its length.
        assert!(read_limited(Path::new("/proc/self/maps"), 1 << 20).unwrap().len() > 64);
        assert!(matches!(read_limited(Path::new("/proc/self/maps"), 64), Err(FileError::TooLarge { .. })));
        // Endless, and says it has length 0.
        assert!(read_limited(Path::new("/dev/zero"), 10).is_err());
        assert!(read_limited(&dir.path().join("none"), 10).unwrap_err().is_missing());
    }

    #[test]
    fn secrets_open_to_others_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        write_atomic(&path, b"secret", 0o600).unwrap();
        let secret = read_secret(&path, 100).unwrap();
        assert_eq!((&secret[..], secret.capacity()), (&b"secret"[..], 7), "read without growing");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        let error = read_secret(&path, 100).unwrap_err();
        assert!(error.to_string().contains("chmod 600"), "{error}");
    }

    #[test]
    fn a_state_directory_is_made_and_tightened_but_never_followed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b/state");
        let mode = || fs::metadata(&path).unwrap().mode() & 0o7777;
        let loosen = |mode| fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        for ours in [Ours::WhenEmpty, Ours::WhenEmpty, Ours::Known] {
            secure_dir(&path, 0o700, ours).unwrap();
            assert_eq!(mode(), 0o700);
            loosen(0o755);
        }
        fs::write(path.join("something"), b"").unwrap();
        secure_dir(&path, 0o755, Ours::WhenEmpty).unwrap();
        loosen(0o1777);
        let error = secure_dir(&path, 0o755, Ours::WhenEmpty).unwrap_err();
        assert!(error.to_string().contains("1777"), "{error}");
        assert_eq!(mode(), 0o1777, "others use it");
        secure_dir(&path, 0o700, Ours::Known).unwrap();
        assert_eq!(mode(), 0o700);
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(secure_dir(&link, 0o700, Ours::Known).is_err());
        let file = dir.path().join("file");
        fs::write(&file, b"").unwrap();
        assert!(secure_dir(&file, 0o700, Ours::Known).is_err());
    }

    #[test]
    fn a_lock_has_one_holder_and_names_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let lock = LockFile::acquire(&path).unwrap();
        assert_eq!(lock.path(), path);
        let error = LockFile::acquire(&path).unwrap_err();
        assert!(error.to_string().ends_with(&format!("locked by process {}", std::process::id())), "{error}");
        drop(lock);
        LockFile::acquire(&path).unwrap();
    }

    #[test]
    fn removing_twice_is_success() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        fs::write(&path, b"").unwrap();
        assert!(remove_durable(&path).unwrap());
        assert!(!remove_durable(&path).unwrap());
    }
}
