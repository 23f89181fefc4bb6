//! Other userspace engines from crates.io, which tests and measurements put at the other end.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::command::{capture, run};
use crate::workspace::Workspace;

/// A program from crates.io, in the version that we compare ourselves with.
pub(crate) struct Crate {
    name: &'static str,
    version: &'static str,
    /// Name of the binary.
    binary: &'static str,
}

/// Cloudflare's.
pub(crate) const BORINGTUN: Crate =
    Crate { name: "boringtun-cli", version: "0.7.1", binary: "boringtun-cli" };

/// Mullvad's. Its binary is not called as its package.
pub(crate) const GOTATUN: Crate = Crate { name: "gotatun-cli", version: "0.10.2", binary: "gotatun" };

/// Installs a program into `peers` of the target directory, once for each version, and says where it is.
pub(crate) fn install(workspace: &Workspace, wanted: &Crate) -> Result<PathBuf> {
    let root = workspace.target_dir().join("peers");
    let path = root.join("bin").join(wanted.binary);
    if !(path.is_file() && is_installed(workspace, &root, wanted)?) {
        eprintln!("==> install {} {} from crates.io: minutes, but only once", wanted.name, wanted.version);
        // Apart from our own build, whose profile and lock it would share otherwise.
        let build = root.join("build");
        let mut install = workspace.cargo();
        install.args(["install", "--locked", "--force", "--root"]).arg(&root).arg("--target-dir").arg(&build);
        run(install.args([wanted.name, "--version", wanted.version]))?;
        std::fs::remove_dir_all(&build).with_context(|| format!("cannot remove {}", build.display()))?;
        if !path.is_file() {
            bail!("{} {} has no program {:?}", wanted.name, wanted.version, wanted.binary);
        }
    }
    Ok(path)
}

fn is_installed(workspace: &Workspace, root: &Path, wanted: &Crate) -> Result<bool> {
    let list = capture(workspace.cargo().args(["install", "--list", "--root"]).arg(root))?;
    Ok(lists(&list, wanted))
}

/// Reads `cargo install --list`: a line `NAME vVERSION:` for each package, its binaries indented below.
fn lists(list: &str, wanted: &Crate) -> bool {
    let line = format!("{} v{}:", wanted.name, wanted.version);
    list.lines().any(|found| found == line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_version_is_not_the_wanted_one() {
        let list = "boringtun-cli v0.7.1:\n    boringtun-cli\ngotatun-cli v0.10.1:\n    gotatun\n";
        assert!(lists(list, &BORINGTUN));
        assert!(!lists(list, &GOTATUN));
    }
}
