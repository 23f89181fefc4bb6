//! `cargo xtask lint`: everything that is checked without running the programs.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use clap::Args;

use crate::command::{find_program, run, run_within, seconds, step};
use crate::workspace::Workspace;
use crate::{packages, purity};

/// How long fetching the advisory database may take; it is a few megabytes.
const FETCH_LIMIT: Duration = Duration::from_secs(120);

#[derive(Args)]
pub(crate) struct Arguments {
    /// Only these checks; default: all
    #[arg(value_enum)]
    checks: Vec<Check>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Check {
    /// Rules of the source tree: where `unsafe` may be, who may depend on whom, length of files
    Purity,
    /// `cargo fmt --check`
    Format,
    /// `cargo clippy` with warnings as errors, all targets
    Clippy,
    /// Documentation of public and private items builds without warnings
    Doc,
    /// `cargo deny`: licences, sources, banned and doubled crates, advisories
    Deny,
}

/// Runs the checks, all of them even when one fails, and fails with the names of those that did.
pub(crate) fn run_checks(workspace: &Workspace, arguments: &Arguments) -> Result<()> {
    let started = Instant::now();
    let all = [Check::Purity, Check::Format, Check::Clippy, Check::Doc, Check::Deny];
    let checks = if arguments.checks.is_empty() { &all[..] } else { &arguments.checks };
    packages::ensure(&[packages::BUILD])?;
    let mut failed = Vec::new();
    let mut skipped = "";
    for check in checks {
        match check.run(workspace) {
            Ok(Done::Whole) => {}
            Ok(Done::WithoutAdvisories) => skipped = ", advisories NOT CHECKED (see above)",
            Err(error) => {
                println!("FAILED {error:#}");
                failed.push(format!("{check:?}").to_lowercase());
            }
        }
    }
    println!("lint: {} checks in {}{skipped}", checks.len(), seconds(started.elapsed()));
    if !failed.is_empty() {
        bail!("failed: {}", failed.join(", "));
    }
    Ok(())
}

/// How much of a check could be done.
enum Done {
    Whole,
    WithoutAdvisories,
}

impl Check {
    fn run(self, workspace: &Workspace) -> Result<Done> {
        let mut cargo = workspace.cargo();
        match self {
            Self::Purity => {
                let step = step("rules of the source tree");
                purity::check(workspace)?;
                step.done();
            }
            Self::Format => step("cargo fmt").run(cargo.args(["fmt", "--all", "--check"]))?,
            Self::Clippy => {
                let step = step("cargo clippy");
                run(cargo.args([
                    "clippy",
                    "--locked",
                    "--workspace",
                    "--all-targets",
                    "--",
                    "-D",
                    "warnings",
                ]))?;
                // The program that libFuzzer drives is not part of ordinary builds.
                packages::ensure(&[packages::FUZZ])?;
                let mut cargo = workspace.cargo();
                cargo.args(["clippy", "--locked", "--package", "mesh-fuzz", "--features", "libfuzzer"]);
                run(cargo.args(["--all-targets", "--", "-D", "warnings"]))?;
                step.done();
            }
            Self::Doc => {
                // Private items are in it, so links to them lead somewhere.
                cargo.env("RUSTDOCFLAGS", "-D warnings -A rustdoc::private_intra_doc_links");
                step("cargo doc").run(cargo.args([
                    "doc",
                    "--workspace",
                    "--no-deps",
                    "--document-private-items",
                ]))?;
            }
            Self::Deny => return deny(workspace),
        }
        Ok(Done::Whole)
    }
}

fn deny(workspace: &Workspace) -> Result<Done> {
    if find_program("cargo-deny").is_none() {
        // Elsewhere than in the tree: its toolchain file and configuration are not for other projects.
        let mut cargo = workspace.cargo();
        let install = cargo.current_dir("/").args(["install", "--quiet", "--locked", "cargo-deny"]);
        step("install cargo-deny (a few minutes, once)").run(install)?;
    }
    let mut cargo = workspace.cargo();
    cargo.args(["deny", "--locked", "check", "--hide-inclusion-graph", "--deny", "unnecessary-skip"]);
    step("cargo deny: bans, licences, sources").run(cargo.args(["bans", "licenses", "sources"]))?;

    let advisories = step("cargo deny: advisories");
    let mut cargo = workspace.cargo();
    if let Err(error) = run_within(cargo.args(["deny", "fetch", "db"]), FETCH_LIMIT) {
        println!(
            "    ************************************************************************\n    \
             WARNING: ADVISORIES NOT CHECKED: the database is unreachable from here.\n    \
             ({error:#})\n    \
             ************************************************************************"
        );
        return Ok(Done::WithoutAdvisories);
    }
    let mut cargo = workspace.cargo();
    advisories.run(cargo.args(["deny", "--offline", "check", "advisories"]))?;
    Ok(Done::Whole)
}
