//! `cargo xtask crowd`: many real daemons on this machine, in release mode.

use std::ffi::OsString;
use std::process::Command;

use anyhow::Result;
use clap::Args;

use crate::command::{run, step};
use crate::demo::PROGRAMS;
use crate::leaks::Watch;
use crate::workspace::Workspace;
use crate::{machine, packages};

#[derive(Args)]
#[command(disable_help_flag = true)]
pub(crate) struct Arguments {
    /// `--nodes N`, `--split SECONDS`, `--idle SECONDS`, `--patience SECONDS`, `--keep`; `--help` tells all
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<OsString>,
}

/// Builds the programs, runs the crowd, looks for what it left behind. What the arguments mean is for it to say.
pub(crate) fn run_crowd(workspace: &Workspace, arguments: &Arguments) -> Result<()> {
    machine::require_root("the crowd")?;
    packages::ensure(&[packages::BUILD, packages::DEMO])?;
    machine::require_networking()?;
    let mut build = workspace.cargo();
    build.args(["build", "--release", "--bins", "--package", "mesh-tests"]);
    PROGRAMS.iter().for_each(|program| {
        build.args(["--package", program]);
    });
    step("build meshd, meshctl, mesh-wg, mesh-cni and the crowd, in release mode").run(&mut build)?;
    let mut crowd = Command::new(workspace.target_dir().join("release").join("mesh-crowd"));
    crowd.args(&arguments.arguments);
    // What is kept on purpose is not left behind.
    if arguments.arguments.iter().any(|argument| argument == "--keep") {
        return run(&mut crowd);
    }
    let watch = Watch::start()?;
    watch.prepare(&mut crowd);
    let outcome = run(&mut crowd);
    let leaks = watch.finish();
    match (outcome, leaks) {
        (Err(failed), Err(leaks)) => anyhow::bail!("{failed:#}; also, {leaks:#}"),
        (outcome, leaks) => outcome.and(leaks),
    }
}
