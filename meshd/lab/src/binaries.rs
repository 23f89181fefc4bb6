//! Where the programs under test are.

use std::env;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

/// The programs that a lab runs, by absolute path.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Binaries {
    /// The daemon.
    pub meshd: PathBuf,
    /// The command line tool.
    pub meshctl: PathBuf,
    /// The CNI plugin.
    pub mesh_cni: PathBuf,
    /// The userspace WireGuard engine.
    pub mesh_wg: PathBuf,
    /// A command that understands the hidden subcommands of [`crate::LabCommand`]: `meshctl lab`.
    pub helper: Vec<String>,
}

impl Binaries {
    /// The programs in the directory of the running one, where Cargo and packages put them together. A
    /// test binary in Cargo's `deps` looks one directory up.
    ///
    /// # Errors
    /// When the path of the running program is unknown. Whether the programs exist is asked when a lab
    /// needs them ([`Binaries::check`]).
    pub fn beside_current_exe() -> Result<Self> {
        let exe = env::current_exe().context("finding the path of the running program")?;
        let mut dir = exe.parent().context("the running program has no directory")?;
        if dir.file_name().is_some_and(|name| name == "deps") {
            dir = dir.parent().context("the test directory has no parent")?;
        }
        Ok(Self::in_dir(dir))
    }

    /// The programs in `dir`.
    #[must_use]
    pub fn in_dir(dir: &Path) -> Self {
        let meshctl = dir.join("meshctl");
        Self {
            meshd: dir.join("meshd"),
            mesh_cni: dir.join("mesh-cni"),
            mesh_wg: dir.join("mesh-wg"),
            helper: vec![meshctl.to_string_lossy().into_owned(), "lab".to_owned()],
            meshctl,
        }
    }

    /// Fails with the names of all that are missing.
    ///
    /// # Errors
    /// When one of the four programs is not there.
    pub fn check(&self) -> Result<()> {
        let missing: Vec<_> = [&self.meshd, &self.meshctl, &self.mesh_cni, &self.mesh_wg]
            .into_iter()
            .filter(|path| !path.is_file())
            .map(|path| path.display().to_string())
            .collect();
        if missing.is_empty() {
            return Ok(());
        }
        bail!("not found: {}; build them first (`cargo build`)", missing.join(", "))
    }

    /// What `PATH` is inside a host: the programs under test first.
    pub(crate) fn search_path(&self) -> String {
        let own = self.meshctl.parent().unwrap_or(Path::new("/")).display();
        format!("{own}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_missing_program_is_named() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("meshd"), "").unwrap();
        let text = Binaries::in_dir(dir.path()).check().unwrap_err().to_string();
        assert!(!text.contains("/meshd,") && text.contains("meshctl") && text.contains("mesh-wg"), "{text}");
    }
}
