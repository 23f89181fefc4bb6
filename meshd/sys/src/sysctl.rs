//! Kernel settings below `/proc/sys`.
//!
//! A key is written as path components (`["net", "ipv4", "conf", "eth0.100", "rp_filter"]`), never as
//! a dotted string: interface names may contain dots. Components are checked, so a name cannot leave
//! the tree.
//!
//! Which network namespace a `net` key belongs to is decided by the *thread* that opens the file: call
//! from inside [`NetNs::run`](crate::netns::NetNs::run) for another one.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use nix::errno::Errno;

/// Values longer than this are not settings of ours; reading stops with an error.
const MAX_VALUE: usize = 64 * 1024;

/// Why a setting could not be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SysctlError {
    /// A component is empty, a dot, or contains a slash or zero byte.
    #[error("kernel setting {key}: component {component:?} is not a file name")]
    BadKey {
        /// The whole key, joined by slashes.
        key: String,
        /// The bad part.
        component: String,
    },
    /// Reading failed.
    #[error("cannot read kernel setting {}: {source}{}", path.display(), hint(source))]
    Read {
        /// The file.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Writing failed.
    #[error("cannot set kernel setting {} to {value:?}: {source}{}", path.display(), hint(source))]
    Write {
        /// The file.
        path: PathBuf,
        /// What was to be written.
        value: String,
        /// The kernel's answer.
        source: io::Error,
    },
}

impl SysctlError {
    /// Whether the setting does not exist: the kernel has no such feature, or the device is gone.
    #[must_use]
    pub fn is_missing(&self) -> bool {
        match self {
            Self::BadKey { .. } => false,
            Self::Read { source, .. } | Self::Write { source, .. } => {
                source.kind() == io::ErrorKind::NotFound
            }
        }
    }
}

fn hint(error: &io::Error) -> &'static str {
    match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::ENOENT) => " (this kernel has no such setting, or the device does not exist)",
        Some(Errno::EROFS) => {
            " (/proc/sys is mounted read-only, as in an unprivileged container: mount the host's)"
        }
        Some(Errno::EACCES | Errno::EPERM) => " (needs root, CAP_NET_ADMIN for net settings)",
        Some(Errno::EINVAL) => " (the kernel does not accept this value)",
        _ => "",
    }
}

/// A `/proc/sys` tree.
#[derive(Debug, Clone)]
pub struct Sysctl {
    root: PathBuf,
}

impl Default for Sysctl {
    fn default() -> Self {
        Self::new()
    }
}

impl Sysctl {
    /// The usual tree, `/proc/sys`.
    #[must_use]
    pub fn new() -> Self {
        Self::with_root("/proc/sys")
    }

    /// Another mount of it, such as `/host/proc/sys` in a container whose own is read-only.
    #[must_use]
    pub fn with_root(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The file that stands for a key.
    ///
    /// # Errors
    /// [`SysctlError::BadKey`].
    pub fn path(&self, key: &[&str]) -> Result<PathBuf, SysctlError> {
        let bad = key.iter().find(|c| c.is_empty() || **c == "." || **c == ".." || c.contains(['/', '\0']));
        if let Some(component) = bad {
            return Err(SysctlError::BadKey { key: key.join("/"), component: (*component).to_owned() });
        }
        if key.is_empty() {
            return Err(SysctlError::BadKey { key: String::new(), component: String::new() });
        }
        Ok(key.iter().fold(self.root.clone(), |path, c| path.join(c)))
    }

    /// The value without its trailing line end.
    ///
    /// # Errors
    /// [`SysctlError::BadKey`], [`SysctlError::Read`].
    pub fn get(&self, key: &[&str]) -> Result<String, SysctlError> {
        read(&self.path(key)?)
    }

    /// Writes the value, whatever it was.
    ///
    /// # Errors
    /// [`SysctlError::BadKey`], [`SysctlError::Write`].
    pub fn set(&self, key: &[&str], value: &str) -> Result<(), SysctlError> {
        write(&self.path(key)?, value)
    }

    /// Writes the value only when it differs and returns the old one in that case.
    ///
    /// Comparing first keeps the kernel from acting on a write that changes nothing (writing
    /// `ip_forward` resets every interface's own setting) and works where writing is forbidden but
    /// the value is right already. White space between fields does not count as a difference.
    ///
    /// # Errors
    /// [`SysctlError::BadKey`], [`SysctlError::Read`], [`SysctlError::Write`].
    pub fn set_if_different(&self, key: &[&str], value: &str) -> Result<Option<String>, SysctlError> {
        let path = self.path(key)?;
        let old = read(&path)?;
        if old.split_whitespace().eq(value.split_whitespace()) {
            return Ok(None);
        }
        write(&path, value)?;
        tracing::debug!(setting = %path.display(), old, new = value, "kernel setting changed");
        Ok(Some(old))
    }
}

fn read(path: &Path) -> Result<String, SysctlError> {
    let error = |source| SysctlError::Read { path: path.to_owned(), source };
    let bytes = fs::read(path).map_err(error)?;
    if bytes.len() > MAX_VALUE {
        return Err(error(io::Error::from_raw_os_error(libc::EFBIG)));
    }
    let text = String::from_utf8(bytes).map_err(|e| error(io::Error::new(io::ErrorKind::InvalidData, e)))?;
    Ok(text.trim_end_matches('\n').to_owned())
}

fn write(path: &Path, value: &str) -> Result<(), SysctlError> {
    let error = |source| SysctlError::Write { path: path.to_owned(), value: value.to_owned(), source };
    // Not truncating and not creating: these files are not files. One write call, as the kernel
    // takes each write as a whole value.
    let mut file = fs::OpenOptions::new().write(true).open(path).map_err(error)?;
    let written = file.write(value.as_bytes()).map_err(error)?;
    if written != value.len() {
        return Err(error(io::Error::from(io::ErrorKind::WriteZero)));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn components_keep_their_dots_and_cannot_climb() {
        let sysctl = Sysctl::with_root("/host/proc/sys");
        assert_eq!(
            sysctl.path(&["net", "ipv4", "conf", "eth0.100", "rp_filter"]).unwrap(),
            Path::new("/host/proc/sys/net/ipv4/conf/eth0.100/rp_filter")
        );
        for bad in ["", ".", "..", "a/b", "x\0"] {
            let error = sysctl.path(&["net", bad]).unwrap_err();
            assert!(matches!(error, SysctlError::BadKey { .. }));
            assert!(!error.is_missing());
        }
        assert!(sysctl.path(&[]).is_err());
    }

    #[test]
    fn a_missing_setting_is_told_apart() {
        let error = Sysctl::new().get(&["net", "ipv4", "no_such_setting"]).unwrap_err();
        assert!(error.is_missing());
        assert!(error.to_string().contains("/proc/sys/net/ipv4/no_such_setting"), "{error}");
    }

    #[test]
    fn a_value_is_written_only_when_it_differs() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("net")).unwrap();
        let file = dir.path().join("net/ports");
        fs::write(&file, "32768\t60999\n").unwrap();
        let sysctl = Sysctl::with_root(dir.path());
        assert_eq!(sysctl.set_if_different(&["net", "ports"], "32768 60999").unwrap(), None);
        assert_eq!(
            sysctl.set_if_different(&["net", "ports"], "10000 50000").unwrap().as_deref(),
            Some("32768\t60999")
        );
        assert!(fs::read_to_string(&file).unwrap().starts_with("10000 50000"));
        assert!(sysctl.set(&["net", "absent"], "1").unwrap_err().is_missing(), "writing must not create");
    }
}
