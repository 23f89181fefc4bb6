//! Rules about the source tree that neither the compiler nor clippy checks.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};

use crate::command::capture;
use crate::rust_source::{code_only, lines_with_word};
use crate::workspace::{Member, Workspace};

/// The crates that may hold `unsafe` code: system calls, and the engine's I/O.
const UNSAFE_CRATES: &[&str] = &["mesh-sys", "mesh-engine"];

/// The crates without I/O, and what their dependency trees must not hold.
const PURE_CRATES: &[&str] = &["mesh-keys", "mesh-core", "mesh-sim"];
const IMPURE_DEPENDENCIES: &[&str] = &[
    "async-std",
    "boringtun",
    "hyper",
    "mio",
    "netlink-sys",
    "nix",
    "rtnetlink",
    "rustls",
    "smol",
    "socket2",
    "tokio",
];

/// Which of our crates each crate may use. Arrows point inward only; tests are not listed, they may use all.
const ARROWS: &[(&str, &[&str])] = &[
    ("mesh-keys", &[]),
    ("mesh-core", &["mesh-keys"]),
    ("mesh-sys", &[]),
    ("mesh-engine", &["mesh-sys"]),
    ("mesh-lab", &["mesh-sys"]),
    ("mesh-cni", &["mesh-core", "mesh-sys"]),
    ("meshd", &["mesh-core", "mesh-keys", "mesh-lab", "mesh-sys"]),
    ("mesh-sim", &["mesh-core", "mesh-keys"]),
    ("xtask", &[]),
];

/// Longest Rust file. What grows beyond it holds more than one concept.
const MAX_LINES: usize = 1000;

/// Checks all rules; fails with every place that breaks one.
pub(crate) fn check(workspace: &Workspace) -> Result<()> {
    let members = workspace.members()?;
    let mut broken = Vec::new();
    files(workspace, &members, &mut broken)?;
    crate_roots(workspace, &members, &mut broken)?;
    arrows(&members, &mut broken);
    dependency_trees(workspace, &mut broken)?;
    clippy_bans(workspace, &mut broken)?;
    if broken.is_empty() {
        return Ok(());
    }
    bail!("{} places break the rules of the source tree:\n    {}", broken.len(), broken.join("\n    "))
}

/// No `unsafe` outside of its crates, and no endless files.
fn files(workspace: &Workspace, members: &BTreeMap<String, Member>, broken: &mut Vec<String>) -> Result<()> {
    let unsafe_dirs: Vec<_> =
        UNSAFE_CRATES.iter().filter_map(|name| members.get(*name)).map(|member| &member.dir).collect();
    for file in workspace.files("rs")? {
        let source =
            std::fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        let name = workspace.relative(&file);
        let lines = source.lines().count();
        if lines > MAX_LINES {
            broken.push(format!("{name}: {lines} lines, more than {MAX_LINES}: split it by concept"));
        }
        if !unsafe_dirs.iter().any(|dir| file.starts_with(dir)) {
            for line in lines_with_word(&code_only(&source), "unsafe") {
                broken.push(format!("{name}:{line}: unsafe code outside of {}", UNSAFE_CRATES.join(" and ")));
            }
        }
    }
    Ok(())
}

/// Every library and program forbids `unsafe`, and every crate takes part in the workspace's lints.
fn crate_roots(
    workspace: &Workspace,
    members: &BTreeMap<String, Member>,
    broken: &mut Vec<String>,
) -> Result<()> {
    for member in members.values() {
        let manifest = member.dir.join("Cargo.toml");
        let text = std::fs::read_to_string(&manifest)?;
        if !text.contains("[lints]\nworkspace = true") {
            broken.push(format!("{}: no `[lints] workspace = true`", workspace.relative(&manifest)));
        }
        if UNSAFE_CRATES.contains(&member.name.as_str()) {
            continue;
        }
        for target in member.targets.iter().filter(|target| target.kind == "lib" || target.kind == "bin") {
            let source = std::fs::read_to_string(&target.path)
                .with_context(|| format!("cannot read {} of {}", target.path.display(), target.name))?;
            if !code_only(&source).contains("#![forbid(unsafe_code)]") {
                broken.push(format!("{}: no `#![forbid(unsafe_code)]`", workspace.relative(&target.path)));
            }
        }
    }
    Ok(())
}

fn arrows(members: &BTreeMap<String, Member>, broken: &mut Vec<String>) {
    for (name, allowed) in ARROWS {
        let Some(member) = members.get(*name) else {
            broken.push(format!("crate {name} has a place in the order of crates, but does not exist"));
            continue;
        };
        for dependency in
            member.depends_on.iter().filter(|dependency| !allowed.contains(&dependency.as_str()))
        {
            broken.push(format!(
                "{name} depends on {dependency}: against the order of crates (docs/architecture.md)"
            ));
        }
    }
}

fn dependency_trees(workspace: &Workspace, broken: &mut Vec<String>) -> Result<()> {
    for name in PURE_CRATES {
        let mut cargo = workspace.cargo();
        let tree = capture(cargo.args(["tree", "--package", name, "--edges", "normal", "--prefix", "none"]))?;
        for found in impure(&tree) {
            broken.push(format!(
                "{name} is pure, but {found} is in its dependency tree (`cargo tree -p {name} -i {found}`)"
            ));
        }
    }
    Ok(())
}

/// The forbidden crates in the output of `cargo tree --prefix none`.
fn impure(tree: &str) -> Vec<&'static str> {
    let has = |name: &&&str| tree.lines().any(|line| line.split(' ').next() == Some(**name));
    IMPURE_DEPENDENCIES.iter().filter(has).copied().collect()
}

/// Clippy takes the nearest file only, so the pure crates' files must repeat what holds for all.
fn clippy_bans(workspace: &Workspace, broken: &mut Vec<String>) -> Result<()> {
    let read = |file: &str| {
        std::fs::read_to_string(workspace.root().join(file)).with_context(|| format!("cannot read {file}"))
    };
    let shared = read(".clippy.toml")?;
    for file in ["keys/.clippy.toml", "meshd/core/.clippy.toml"] {
        let own = read(file)?;
        for missing in bans(&shared).filter(|ban| !bans(&own).any(|found| found == *ban)) {
            broken.push(format!("{file}: does not repeat the ban of {missing} in .clippy.toml"));
        }
    }
    Ok(())
}

fn bans(file: &str) -> impl Iterator<Item = &str> {
    file.lines().filter_map(|line| line.split("path = \"").nth(1)?.split('"').next())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forbidden_crates_are_found_by_their_whole_name() {
        let tree = "mesh-core v0.1.0 (/src)\ntokio-macros v2.5.0 (proc-macro)\nserde v1.0.1\n";
        assert!(impure(tree).is_empty());
        assert_eq!(impure(&format!("{tree}tokio v1.54.1 (*)\nnix v0.31.3\n")), ["nix", "tokio"]);
    }

    #[test]
    fn bans_are_read_line_by_line() {
        let file = "disallowed-methods = [\n  { path = \"std::env::set_var\", reason = \"x\" },\n]\n";
        assert_eq!(bans(file).collect::<Vec<_>>(), ["std::env::set_var"]);
    }

    #[test]
    fn this_tree_keeps_the_order_of_crates() {
        let mut broken = Vec::new();
        arrows(&Workspace::find().unwrap().members().unwrap(), &mut broken);
        assert_eq!(broken, Vec::<String>::new());
    }
}
