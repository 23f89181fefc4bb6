//! `cargo xtask demo`: from a fresh clone to a mesh of three hosts on this machine.

use std::ffi::OsString;
use std::process::Command;

use anyhow::Result;
use clap::Args;

use crate::command::{run, step};
use crate::workspace::Workspace;
use crate::{machine, packages};

/// The packages with the programs that the lab starts.
pub(crate) const PROGRAMS: &[&str] = &["meshd", "mesh-engine", "mesh-cni"];

#[derive(Args)]
pub(crate) struct Arguments {
    /// Passed on to `meshctl lab demo`
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    lab: Vec<OsString>,
}

/// Builds the programs, then hands over to `meshctl lab demo`.
pub(crate) fn run_demo(workspace: &Workspace, arguments: &Arguments) -> Result<()> {
    machine::require_root("the demo")?;
    packages::ensure(&[packages::BUILD, packages::DEMO])?;
    machine::require_networking()?;
    build(workspace)?;
    // No heading: from here on the lab explains what it does.
    let meshctl = workspace.binary_dir().join("meshctl");
    run(Command::new(meshctl).args(["lab", "demo"]).args(&arguments.lab).current_dir(workspace.root()))
}

/// Builds the four programs in the profile that everything shares.
pub(crate) fn build(workspace: &Workspace) -> Result<()> {
    let mut cargo = workspace.cargo();
    cargo.args(["build", "--bins"]);
    for package in PROGRAMS {
        cargo.args(["--package", package]);
    }
    step("build meshd, meshctl, mesh-wg, mesh-cni").run(&mut cargo)
}
