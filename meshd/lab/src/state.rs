//! What a lab remembers on disk, so that another process can use it and take it down.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use mesh_sys::files;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::binaries::Binaries;
use crate::process::ProcessRef;

/// Labs are directories below this one.
pub const LAB_ROOT: &str = "/run/mesh-lab";

/// Raised when [`LabState`] changes.
const VERSION: u32 = 2;

/// More than any real state file has, in bytes.
const MAX_STATE: usize = 16 << 20;

/// A holder and the namespaces that live as long as it does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct HolderState {
    pub(crate) process: ProcessRef,
    /// Inode number of its pid namespace.
    pub(crate) pid_ns: u64,
    /// Inode number of its network namespace.
    pub(crate) net_ns: u64,
}

/// A daemon as it was started last.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DaemonState {
    pub(crate) process: ProcessRef,
    /// Its id inside the host.
    pub(crate) inner_pid: i32,
    /// Its arguments, for a restart.
    pub(crate) args: Vec<String>,
}

/// An attached pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PodState {
    pub(crate) name: String,
    pub(crate) container_id: String,
    /// The plugin's answer to ADD.
    pub(crate) result: Value,
}

/// A host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct HostState {
    pub(crate) name: String,
    /// Its number, from 1.
    pub(crate) number: u8,
    pub(crate) holder: HolderState,
    pub(crate) daemon: Option<DaemonState>,
    pub(crate) pods: Vec<PodState>,
}

/// A lab.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LabState {
    pub(crate) version: u32,
    pub(crate) name: String,
    pub(crate) binaries: Binaries,
    /// Arguments that every daemon gets.
    pub(crate) daemon_args: Vec<String>,
    pub(crate) switch: Option<HolderState>,
    /// In the order of their numbers.
    pub(crate) routers: Vec<HolderState>,
    pub(crate) hosts: Vec<HostState>,
}

impl LabState {
    pub(crate) fn new(name: &str, binaries: Binaries, daemon_args: Vec<String>) -> Self {
        Self {
            version: VERSION,
            name: name.to_owned(),
            binaries,
            daemon_args,
            switch: None,
            routers: Vec::new(),
            hosts: Vec::new(),
        }
    }

    /// Reads the state of a lab that is up.
    ///
    /// # Errors
    /// When there is no such lab, or the file cannot be used.
    pub(crate) fn load(name: &str) -> Result<Self> {
        let dir = lab_dir(name)?;
        if !dir.exists() {
            let known = known_labs();
            let known = if known.is_empty() {
                "no lab is up".to_owned()
            } else {
                format!("up: {}", known.join(", "))
            };
            bail!("lab {name:?} is not up ({known}); `meshctl lab up` starts one");
        }
        let path = dir.join("state.json");
        let bytes = files::read_limited(&path, MAX_STATE)
            .context("the lab did not get far enough to be used; `meshctl lab down` removes what is there")?;
        let state: Self = serde_json::from_slice(&bytes)
            .with_context(|| format!("{} is not the state of a lab", path.display()))?;
        ensure!(state.version == VERSION, "{}: version {} is not {VERSION}", path.display(), state.version);
        Ok(state)
    }

    /// Writes the state, so that a reader sees the old or the new one.
    pub(crate) fn save(&self) -> Result<()> {
        let path = lab_dir(&self.name)?.join("state.json");
        files::write_atomic(&path, &serde_json::to_vec_pretty(self)?, 0o600)?;
        Ok(())
    }

    pub(crate) fn holders(&self) -> impl Iterator<Item = &HolderState> {
        self.hosts.iter().map(|host| &host.holder).chain(&self.routers).chain(&self.switch)
    }
}

/// Names of the labs that have a directory.
pub(crate) fn known_labs() -> Vec<String> {
    let Ok(entries) = fs::read_dir(LAB_ROOT) else { return Vec::new() };
    let mut names: Vec<_> =
        entries.filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned())).collect();
    names.sort();
    names
}

/// The directory of a lab.
///
/// # Errors
/// When the name is not 1 to 32 lower-case letters, digits and hyphens: it becomes part of paths.
pub(crate) fn lab_dir(name: &str) -> Result<PathBuf> {
    check_name("lab", name)?;
    Ok(Path::new(LAB_ROOT).join(name))
}

/// Checks a name of a lab, host or pod.
pub(crate) fn check_name(what: &str, name: &str) -> Result<()> {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    ensure!(
        (1..=32).contains(&name.len()) && name.chars().all(plain) && !name.starts_with('-'),
        "{what} name {name:?} is not valid: 1 to 32 lower-case letters, digits and hyphens, no hyphen first"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_leave_the_directory_are_refused() {
        for bad in ["", "..", "a/b", "-x", "A", "a b", "a:b", "a,b", &"x".repeat(33)] {
            assert!(lab_dir(bad).is_err(), "{bad:?}");
        }
        assert_eq!(lab_dir("default").unwrap(), Path::new("/run/mesh-lab/default"));
    }

    #[test]
    fn an_absent_lab_is_said_so() {
        let text = LabState::load("labw-never-there").unwrap_err().to_string();
        assert!(text.contains("not up"), "{text}");
    }
}
