//! `cargo xtask crowd`: many real daemons on one machine; see [`mesh_tests::crowd`].

#![forbid(unsafe_code)]

use std::io::{self, Write as _};
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Parser;
use mesh_lab::{Binaries, Lab, Options};
use mesh_tests::crowd::{self, Plan};
use tokio::signal::unix::{SignalKind, signal};

/// Brings up many real daemons on this machine, cuts them into halves and joins those again, removes one, adds one,
/// has everybody ping everybody, and prints what it took.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask crowd")]
struct Arguments {
    /// Number of hosts at first
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u8).range(4..=250))]
    nodes: u8,
    /// Seconds for which the halves are apart at least
    #[arg(long, default_value_t = 75)]
    split: u64,
    /// Seconds of idleness for which processor time is measured
    #[arg(long, default_value_t = 60)]
    idle: u64,
    /// Seconds that any wait may take
    #[arg(long, default_value_t = 180)]
    patience: u64,
    /// Name of the lab
    #[arg(long, default_value = "crowd")]
    name: String,
    /// Leave the lab up for a look, whatever happens; `meshctl lab down --name crowd` takes it down
    #[arg(long)]
    keep: bool,
}

fn main() -> ExitCode {
    let done = go(&Arguments::parse());
    if let Err(error) = &done {
        // There is nobody to tell when standard error is gone too.
        let _ = writeln!(io::stderr(), "error: {error:#}");
    }
    if done.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn go(arguments: &Arguments) -> Result<()> {
    let plan = Plan {
        nodes: arguments.nodes.into(),
        split: Duration::from_secs(arguments.split),
        idle: Duration::from_secs(arguments.idle),
        patience: Duration::from_secs(arguments.patience),
    };
    let options = Options {
        keep: arguments.keep,
        log_filter: std::env::var("RUST_LOG").ok(),
        ..Options::new(&arguments.name, Binaries::beside_current_exe()?)
    };
    Lab::down(&arguments.name).context("removing what an earlier run has left")?;
    if !arguments.keep {
        take_down_when_told_to_end(&arguments.name)?;
    }
    crowd::run(options, &plan, &mut io::stdout())
}

/// Nothing of the lab ends with this process by itself, so ^C takes it down first.
fn take_down_when_told_to_end(lab: &str) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    let (mut interrupt, mut terminate) = {
        let _inside = runtime.enter();
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?)
    };
    let lab = lab.to_owned();
    let wait_and_end = move || {
        let code = runtime.block_on(async {
            tokio::select! {
                _ = interrupt.recv() => 130,
                _ = terminate.recv() => 143,
            }
        });
        if let Err(error) = Lab::down(&lab) {
            let _ = writeln!(io::stderr(), "error: {error:#}");
        }
        std::process::exit(code)
    };
    thread::Builder::new()
        .name("crowd-signals".to_owned())
        .spawn(wait_and_end)
        .context("starting a thread")?;
    Ok(())
}
