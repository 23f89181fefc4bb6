//! `cargo xtask bench`: measurements. Whatever is compared is measured in the same run, in turns, so that a busy
//! machine hurts all alike; the answer is a median with its spread, never a single number.

mod carrier;
mod engine;
mod flood;
mod load;
mod middle;
mod network;
mod process;
mod quantity;
mod relay;
mod report;
mod samples;

use anyhow::Result;
use clap::{Args, Subcommand};

use crate::command::step;
use crate::workspace::Workspace;

#[derive(Args)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    suite: Suite,
}

#[derive(Subcommand)]
enum Suite {
    /// mesh-wg beside plain veth, VXLAN, wireguard-go, boringtun and gotatun: throughput, latency, processor, memory
    Engine(engine::Arguments),
    /// The relay beside a direct way, a forwarder that looks at nothing, and nftables
    Relay(relay::Arguments),
    /// Single functions of the data path, one thread: segment, coalesce, seal, open, look-ups
    Micro,
}

/// Runs one suite of measurements.
pub(crate) fn run_suite(workspace: &Workspace, arguments: &Arguments) -> Result<()> {
    match &arguments.suite {
        Suite::Engine(arguments) => engine::measure(workspace, arguments),
        Suite::Relay(arguments) => relay::measure(workspace, arguments),
        Suite::Micro => step("cargo bench").run(workspace.cargo().args([
            "bench",
            "--package",
            "mesh-engine",
            "--package",
            "mesh-sys",
        ])),
    }
}
