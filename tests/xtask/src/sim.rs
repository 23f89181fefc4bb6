//! `cargo xtask sim`: builds the simulator in release mode and runs it.

use std::process::Command;

use anyhow::Result;
use clap::Args;

use crate::command::{capture, run};
use crate::packages;
use crate::workspace::Workspace;

#[derive(Args)]
#[command(disable_help_flag = true)]
pub(crate) struct Arguments {
    /// `--nodes N --seed S --minutes M --faults none|standard|chaos [--seeds A..B] [--json]`; `--help` tells all
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<String>,
}

/// Whatever the arguments mean is for the simulator to say. Nothing else goes to the standard output: it may be JSON.
pub(crate) fn run_simulator(workspace: &Workspace, arguments: &Arguments) -> Result<()> {
    packages::ensure(&[packages::BUILD])?;
    run(workspace.cargo().args(["build", "--quiet", "--release", "--package", "mesh-sim"]))?;
    let metadata = capture(workspace.cargo().args(["metadata", "--format-version", "1", "--no-deps"]))?;
    let metadata: serde_json::Value = serde_json::from_str(&metadata)?;
    let target = metadata["target_directory"].as_str().unwrap_or("target");
    run(Command::new(format!("{target}/release/mesh-sim")).args(&arguments.arguments))
}
