//! `cargo xtask bench`: measurements. Whatever is compared is measured in the same run, in turns, so that a busy
//! machine hurts all alike; the answer is a median with its spread, never a single number.

mod engine;
mod network;
mod samples;

use anyhow::Result;
use clap::{Args, Subcommand};

use crate::workspace::Workspace;

#[derive(Args)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    suite: Suite,
}

#[derive(Subcommand)]
enum Suite {
    /// mesh-wg beside plain veth and wireguard-go: throughput, processor time, latency under load
    Engine(engine::Arguments),
}

/// Runs one suite of measurements.
pub(crate) fn run_suite(workspace: &Workspace, arguments: &Arguments) -> Result<()> {
    match &arguments.suite {
        Suite::Engine(arguments) => engine::measure(workspace, arguments),
    }
}
