//! Where things are, and what Cargo knows about the workspace.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::command::capture;

/// The source tree that this binary was built from.
pub(crate) struct Workspace {
    root: PathBuf,
}

/// A member of the workspace, as `cargo metadata` describes it.
pub(crate) struct Member {
    /// Name of the crate.
    pub(crate) name: String,
    /// The directory of its `Cargo.toml`.
    pub(crate) dir: PathBuf,
    /// Libraries, binaries, integration tests, …
    pub(crate) targets: Vec<Target>,
    /// Names of the members that it depends on outside of its tests.
    pub(crate) depends_on: Vec<String>,
}

/// A compilation target of a member.
pub(crate) struct Target {
    /// Name of the target.
    pub(crate) name: String,
    /// `lib`, `bin`, `test`, …
    pub(crate) kind: String,
    /// The file at its root.
    pub(crate) path: PathBuf,
}

impl Workspace {
    /// The tree that holds this crate; it must still be where it was at build time.
    pub(crate) fn find() -> Result<Self> {
        let crate_dir = Path::new(env!("CARGO_MANIFEST_DIR"));
        let root = crate_dir.ancestors().nth(2).context("the crate is not two levels below the workspace")?;
        if !root.join("Cargo.toml").is_file() {
            bail!("the source tree has moved away from {}: run this through `cargo xtask`", root.display());
        }
        Ok(Self { root: root.to_owned() })
    }

    /// The top directory.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// `cargo`, of the toolchain that runs us, in the top directory.
    pub(crate) fn cargo(&self) -> Command {
        let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        command.current_dir(&self.root);
        command
    }

    /// Where Cargo puts what it builds.
    pub(crate) fn target_dir(&self) -> PathBuf {
        match std::env::var_os("CARGO_TARGET_DIR") {
            Some(dir) => self.root.join(dir),
            None => self.root.join("target"),
        }
    }

    /// The binaries of the profile that tests, demo and everyday work share.
    pub(crate) fn binary_dir(&self) -> PathBuf {
        self.target_dir().join("debug")
    }

    /// All members, by name.
    pub(crate) fn members(&self) -> Result<BTreeMap<String, Member>> {
        let text = capture(self.cargo().args(["metadata", "--no-deps", "--format-version", "1"]))?;
        let metadata: Value = serde_json::from_str(&text).context("the output of `cargo metadata`")?;
        let packages = metadata["packages"].as_array().context("`cargo metadata` lists no packages")?;
        let names: Vec<&str> = packages.iter().filter_map(|package| package["name"].as_str()).collect();
        packages.iter().map(|package| member(package, &names)).collect()
    }

    /// All files of the tree with this extension, without build output and fuzzing finds.
    pub(crate) fn files(&self, extension: &str) -> Result<Vec<PathBuf>> {
        let mut files = Vec::new();
        let mut pending = vec![self.root.clone()];
        while let Some(dir) = pending.pop() {
            for entry in std::fs::read_dir(&dir).with_context(|| format!("cannot list {}", dir.display()))? {
                let entry = entry?;
                let path = entry.path();
                let name = entry.file_name();
                if entry.file_type()?.is_dir() {
                    if name != "target" && name != ".git" && name != "artifacts" {
                        pending.push(path);
                    }
                } else if path.extension().is_some_and(|found| found == extension) {
                    files.push(path);
                }
            }
        }
        files.sort();
        Ok(files)
    }

    /// A path as it is called inside the tree.
    pub(crate) fn relative<'a>(&self, path: &'a Path) -> std::path::Display<'a> {
        path.strip_prefix(&self.root).unwrap_or(path).display()
    }
}

fn member(package: &Value, names: &[&str]) -> Result<(String, Member)> {
    let text = |value: &Value, field: &str| -> Result<String> {
        let text = value[field].as_str();
        Ok(text.with_context(|| format!("`cargo metadata` gives no {field:?}"))?.to_owned())
    };
    let name = text(package, "name")?;
    let manifest = PathBuf::from(text(package, "manifest_path")?);
    let targets = package["targets"].as_array().into_iter().flatten();
    let dependencies = package["dependencies"].as_array().into_iter().flatten();
    let member = Member {
        dir: manifest.parent().context("a manifest outside of any directory")?.to_owned(),
        targets: targets
            .map(|target| {
                Ok(Target {
                    name: text(target, "name")?,
                    kind: target["kind"][0].as_str().unwrap_or_default().to_owned(),
                    path: text(target, "src_path")?.into(),
                })
            })
            .collect::<Result<_>>()?,
        depends_on: dependencies
            .filter(|dependency| dependency["kind"].is_null())
            .filter_map(|dependency| dependency["name"].as_str())
            .filter(|dependency| names.contains(dependency))
            .map(str::to_owned)
            .collect(),
        name: name.clone(),
    };
    Ok((name, member))
}
