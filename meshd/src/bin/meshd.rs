//! The daemon; see [`meshd::daemon`].

#![forbid(unsafe_code)]

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::Parser;
use meshd::config::{Config, DEFAULT_CONFIG, LogFormat, Settings};
use tracing_subscriber::EnvFilter;

/// Makes this host a node of an encrypted mesh. The same command on every host, first or last.
#[derive(Debug, Parser)]
#[command(name = "meshd", version, about)]
struct Arguments {
    /// Configuration file; every other option may stand in it, or in the environment as MESHD_OPTION
    #[arg(long, env = "MESHD_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    settings: Settings,
}

fn main() -> ExitCode {
    match start(Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The log may not be set up yet; standard error goes to the journal like the log.
            let _ = writeln!(std::io::stderr(), "meshd: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn start(arguments: Arguments) -> Result<()> {
    let path = arguments.config.as_deref();
    let file = Settings::from_file(path.unwrap_or(Path::new(DEFAULT_CONFIG)), path.is_some())?;
    let env = Settings::from_env(std::env::vars_os())?;
    // The customary variable of Rust programs comes last.
    let customary = Settings { log: std::env::var("RUST_LOG").ok(), ..Settings::default() };
    let config = customary.overlaid(file).overlaid(env).overlaid(arguments.settings).check()?;
    log_to_stderr(&config)?;
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("the runtime")?
        .block_on(meshd::daemon::run(config))
}

fn log_to_stderr(config: &Config) -> Result<()> {
    let filter = EnvFilter::try_new(&config.log).with_context(|| {
        format!("log: {:?} is no level or filter (try info, or info,mesh_core=debug)", config.log)
    })?;
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match config.log_format {
        LogFormat::Text => log.with_ansi(false).init(),
        LogFormat::Json => log.json().init(),
    }
    Ok(())
}
