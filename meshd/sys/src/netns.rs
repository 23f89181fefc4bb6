//! Network namespaces: open, create, list and delete them as `ip netns` does, and run code inside.
//!
//! A namespace is a property of a *thread*. [`NetNs::run`] therefore never moves the caller: it
//! starts a fresh thread, moves that one, runs the closure there and lets the thread end. What the
//! closure makes (sockets above all) keeps belonging to the namespace afterwards.
//!
//! Inside the closure `/proc/sys/net` shows the namespace's own values, because the kernel resolves
//! it by the calling thread. `/proc/net` and `/sys/class/net` do not follow: the first is a link to
//! the *process* leader's view (use `/proc/thread-self/net`), the second was fixed when sysfs was
//! mounted. Use netlink instead of either.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};

/// Where `ip netns` keeps its named namespaces.
pub const NETNS_DIR: &str = "/run/netns";

/// `NSFS_MAGIC` of `linux/magic.h`: the file system type of every namespace file.
const NSFS_MAGIC: i64 = 0x6e73_6673;

/// An open network namespace. It lives at least as long as this value.
#[derive(Debug)]
pub struct NetNs {
    file: File,
    id: NetNsId,
}

/// What tells two namespaces apart: device and inode number of the namespace file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NetNsId {
    /// Device number of nsfs.
    pub dev: u64,
    /// Inode number, the figure that `readlink /proc/self/ns/net` shows.
    pub ino: u64,
}

impl std::fmt::Display for NetNsId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "net:[{}]", self.ino)
    }
}

/// Why an operation on a namespace failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NetNsError {
    /// The path could not be opened.
    #[error("network namespace {path}: {source}{}", hint(source))]
    Open {
        /// The path as given.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The path is a file, but not a namespace.
    #[error("{path} is not a network namespace (an ordinary file, or its bind mount is gone)")]
    NotANamespace {
        /// The path as given.
        path: PathBuf,
    },
    /// The name cannot be a file name below [`NETNS_DIR`].
    #[error("network namespace name {name:?} is not usable: {reason}")]
    BadName {
        /// The name as given.
        name: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A namespace of this name exists already.
    #[error("network namespace {name:?} exists already")]
    Exists {
        /// The name as given.
        name: String,
    },
    /// A step of creating or deleting failed.
    #[error("network namespace {name:?}: {step}: {source}{}", hint(source))]
    Step {
        /// The name as given.
        name: String,
        /// What was being done.
        step: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The fresh thread could not be started or moved.
    #[error("cannot enter network namespace {id}: {source}{}", hint(source))]
    Enter {
        /// The namespace that was to be entered.
        id: NetNsId,
        /// The kernel's answer.
        source: io::Error,
    },
}

fn hint(error: &io::Error) -> &'static str {
    match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::EPERM) => " (needs CAP_SYS_ADMIN)",
        Some(Errno::EACCES) => " (needs root)",
        Some(Errno::ENOENT) => " (it does not exist, or not in this mount namespace)",
        _ => "",
    }
}

impl NetNs {
    /// The namespace of the calling thread.
    ///
    /// # Errors
    /// [`NetNsError::Open`] when `/proc` is not mounted.
    pub fn current() -> Result<Self, NetNsError> {
        Self::open("/proc/thread-self/ns/net")
    }

    /// Opens a namespace by path: `/run/netns/NAME`, `/proc/PID/ns/net`, or a runtime's own.
    ///
    /// # Errors
    /// [`NetNsError::Open`], or [`NetNsError::NotANamespace`] when the path leads to anything else.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, NetNsError> {
        let path = path.as_ref();
        let open_error = |source| NetNsError::Open { path: path.to_owned(), source };
        // O_NONBLOCK: a FIFO in this place must give an error, not wait for a writer.
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK)
            .open(path)
            .map_err(open_error)?;
        Self::from_file(file).map_err(|error| match error {
            FromFile::Io(source) => open_error(source),
            FromFile::NotANamespace => NetNsError::NotANamespace { path: path.to_owned() },
        })
    }

    /// Opens the namespace that `ip netns` knows as `name`.
    ///
    /// # Errors
    /// As [`NetNs::open`]; [`NetNsError::BadName`].
    pub fn open_named(name: &str) -> Result<Self, NetNsError> {
        Self::open(named_path(name)?)
    }

    /// Takes an already open namespace file, for example one received over a socket.
    ///
    /// # Errors
    /// [`NetNsError::NotANamespace`] when the descriptor is something else.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, NetNsError> {
        let path = PathBuf::from(format!("file descriptor {}", fd.as_raw_fd()));
        Self::from_file(File::from(fd)).map_err(|error| match error {
            FromFile::Io(source) => NetNsError::Open { path, source },
            FromFile::NotANamespace => NetNsError::NotANamespace { path },
        })
    }

    fn from_file(file: File) -> Result<Self, FromFile> {
        let stat = nix::sys::statfs::fstatfs(&file).map_err(|e| FromFile::Io(e.into()))?;
        if stat.filesystem_type().0 != NSFS_MAGIC || !is_network(&file) {
            return Err(FromFile::NotANamespace);
        }
        let meta = file.metadata().map_err(FromFile::Io)?;
        Ok(Self { id: NetNsId { dev: meta.dev(), ino: meta.ino() }, file })
    }

    /// Makes a new, empty namespace and binds it to `/run/netns/NAME`, so that `ip netns exec NAME`
    /// finds it. Its loopback device is down, as with `ip netns add`.
    ///
    /// # Errors
    /// [`NetNsError::Exists`], [`NetNsError::BadName`], or the step that failed. Nothing is left
    /// behind then.
    pub fn create_named(name: &str) -> Result<Self, NetNsError> {
        let path = named_path(name)?;
        let step = |step, source: io::Error| NetNsError::Step { name: name.to_owned(), step, source };
        let _lock = prepare_dir().map_err(|e| step("preparing /run/netns", e))?;
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(0o000);
        match options.open(&path) {
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                return Err(NetNsError::Exists { name: name.to_owned() });
            }
            Err(e) => return Err(step("creating the mount point", e)),
        }
        let made = std::thread::scope(|scope| {
            let worker = std::thread::Builder::new().name("netns-new".into()).spawn_scoped(scope, || {
                unshare(CloneFlags::CLONE_NEWNET).map_err(|e| step("unshare", e.into()))?;
                mount(Some("/proc/thread-self/ns/net"), &path, None::<&str>, MsFlags::MS_BIND, None::<&str>)
                    .map_err(|e| step("bind mount", e.into()))?;
                Self::current()
            });
            match worker.map_err(|e| step("starting a thread", e))?.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        });
        made.inspect_err(|_| {
            // Best effort on the way out of another error, which is the one that gets reported.
            let _ = umount2(&path, MntFlags::MNT_DETACH);
            let _ = fs::remove_file(&path);
        })
    }

    /// Deletes the name. The namespace itself goes when its last user is gone. A name that does not
    /// exist is success; returns whether it did.
    ///
    /// # Errors
    /// [`NetNsError::BadName`], or the step that failed.
    pub fn delete_named(name: &str) -> Result<bool, NetNsError> {
        let path = named_path(name)?;
        match umount2(&path, MntFlags::MNT_DETACH) {
            // EINVAL: the file is there but nothing is mounted on it.
            Ok(()) | Err(Errno::EINVAL) => {}
            Err(Errno::ENOENT) => return Ok(false),
            Err(e) => {
                return Err(NetNsError::Step { name: name.to_owned(), step: "unmounting", source: e.into() });
            }
        }
        match fs::remove_file(&path) {
            Ok(()) => Ok(true),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(e) => {
                Err(NetNsError::Step { name: name.to_owned(), step: "removing the mount point", source: e })
            }
        }
    }

    /// The names below [`NETNS_DIR`], sorted. Whether each still is a namespace is not checked.
    ///
    /// # Errors
    /// [`NetNsError::Open`] when the directory exists and cannot be read.
    pub fn list_named() -> Result<Vec<String>, NetNsError> {
        let open_error = |source| NetNsError::Open { path: NETNS_DIR.into(), source };
        let entries = match fs::read_dir(NETNS_DIR) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(open_error(e)),
        };
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry.map_err(open_error)?;
            if let Ok(name) = entry.file_name().into_string() {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }

    /// Whether both are the same namespace, however they were opened.
    #[must_use]
    pub fn same_as(&self, other: &Self) -> bool {
        self.id == other.id
    }

    /// The namespace's identity.
    #[must_use]
    pub fn id(&self) -> NetNsId {
        self.id
    }

    /// Another handle on the same namespace.
    ///
    /// # Errors
    /// [`NetNsError::Open`] when no descriptor is left.
    pub fn try_clone(&self) -> Result<Self, NetNsError> {
        let file = self
            .file
            .try_clone()
            .map_err(|source| NetNsError::Open { path: self.id.to_string().into(), source })?;
        Ok(Self { file, id: self.id })
    }

    /// Runs `work` on a fresh thread inside the namespace and returns its value.
    ///
    /// The caller waits. Errors of the closure are part of its value; a panic in it goes on in the
    /// caller.
    ///
    /// # Errors
    /// [`NetNsError::Enter`] when the thread could not be started or moved; `work` did not run then.
    pub fn run<T, F>(&self, work: F) -> Result<T, NetNsError>
    where
        F: FnOnce() -> T + Send,
        T: Send,
    {
        let enter_error = |source| NetNsError::Enter { id: self.id, source };
        std::thread::scope(|scope| {
            let worker = std::thread::Builder::new()
                .name(format!("netns-{}", self.id.ino))
                .spawn_scoped(scope, || {
                    setns(&self.file, CloneFlags::CLONE_NEWNET).map_err(|e| enter_error(e.into()))?;
                    Ok(work())
                })
                .map_err(enter_error)?;
            match worker.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }
}

impl AsFd for NetNs {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl AsRawFd for NetNs {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

enum FromFile {
    Io(io::Error),
    NotANamespace,
}

/// Asks the kernel which kind of namespace the file stands for (`NS_GET_NSTYPE`, ioctl_nsfs(2)).
fn is_network(file: &File) -> bool {
    // _IO(0xb7, 0x3)
    const NS_GET_NSTYPE: libc::Ioctl = 0xb703;
    #[expect(unsafe_code, reason = "no safe wrapper exists for this ioctl")]
    // SAFETY: the descriptor is open for the duration of the call; this ioctl takes no argument.
    let kind = unsafe { libc::ioctl(file.as_raw_fd(), NS_GET_NSTYPE) };
    kind == libc::CLONE_NEWNET
}

fn named_path(name: &str) -> Result<PathBuf, NetNsError> {
    let bad = |reason| NetNsError::BadName { name: name.to_owned(), reason };
    if name.is_empty() || name == "." || name == ".." {
        return Err(bad("it is empty or a dot"));
    }
    if name.len() > 255 {
        return Err(bad("it is longer than 255 bytes"));
    }
    if name.contains(['/', '\0']) {
        return Err(bad("it contains a slash or a zero byte"));
    }
    Ok(Path::new(NETNS_DIR).join(name))
}

/// Makes the directory a shared mount point of its own, so that namespaces bound there appear in
/// every mount namespace that follows this one. Returns the lock that serialises this step between
/// processes; it is the directory's own flock, the one `ip netns` takes.
fn prepare_dir() -> io::Result<Flock<File>> {
    fs::create_dir_all(NETNS_DIR)?;
    let dir = File::open(NETNS_DIR)?;
    let lock = Flock::lock(dir, FlockArg::LockExclusive).map_err(|(_, e)| io::Error::from(e))?;
    let share =
        || mount(None::<&str>, NETNS_DIR, None::<&str>, MsFlags::MS_SHARED | MsFlags::MS_REC, None::<&str>);
    match share() {
        Ok(()) => {}
        Err(Errno::EINVAL) => {
            // Not a mount point yet: make it one by binding it onto itself, then share that.
            mount(
                Some(NETNS_DIR),
                NETNS_DIR,
                None::<&str>,
                MsFlags::MS_BIND | MsFlags::MS_REC,
                None::<&str>,
            )?;
            share()?;
        }
        Err(e) => return Err(e.into()),
    }
    Ok(lock)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_current_namespace_is_itself_and_a_namespace() {
        let a = NetNs::current().unwrap();
        let b = NetNs::open("/proc/self/ns/net").unwrap();
        assert!(a.same_as(&b));
        assert_eq!(fs::read_link("/proc/self/ns/net").unwrap().to_str().unwrap(), a.id().to_string());
        assert!(a.try_clone().unwrap().same_as(&a));
    }

    #[test]
    fn other_files_are_refused_by_name() {
        for path in ["/proc/self/ns/mnt", "/proc/self/status", "/"] {
            let error = NetNs::open(path).unwrap_err();
            assert!(matches!(error, NetNsError::NotANamespace { .. }), "{path}: {error}");
            assert!(error.to_string().contains(path));
        }
        assert!(matches!(NetNs::open("/nonexistent/ns").unwrap_err(), NetNsError::Open { .. }));
    }

    #[test]
    fn names_that_leave_the_directory_are_refused() {
        for name in ["", ".", "..", "a/b", "../x", "a\0b", &"x".repeat(256)] {
            assert!(matches!(NetNs::delete_named(name), Err(NetNsError::BadName { .. })), "{name:?}");
            assert!(matches!(NetNs::create_named(name), Err(NetNsError::BadName { .. })), "{name:?}");
        }
    }
}
