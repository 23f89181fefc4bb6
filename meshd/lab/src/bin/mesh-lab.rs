//! The lab by itself, without the rest of `meshctl`: for this crate's own tests.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;
use mesh_lab::{Binaries, LabCommand};

#[derive(Parser)]
#[command(name = "mesh-lab")]
struct Cli {
    #[command(subcommand)]
    command: LabCommand,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match Binaries::beside_current_exe().and_then(|binaries| mesh_lab::run(cli.command, &binaries)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            use std::io::Write;
            // With standard error closed the exit code still tells.
            let _ = writeln!(std::io::stderr(), "mesh-lab: {error:#}");
            ExitCode::FAILURE
        }
    }
}
