//! `mesh-wg`: a userspace WireGuard interface that `wg` and `wg-quick` drive.

use std::io::{self, Write as _};
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser;
use mesh_engine::aead::{self, Choice};
use mesh_engine::daemon::{self, Side};
use mesh_engine::{Engine, Exit};
use mesh_sys::uapi::socket_path;
use tracing::level_filters::LevelFilter;

/// Userspace WireGuard interface.
///
/// Makes the network interface INTERFACE and the socket /var/run/wireguard/INTERFACE.sock, through which `wg` and
/// `wg-quick` configure it. Ends on SIGTERM or SIGINT, when the interface is deleted (`ip link del`), or when the
/// socket is removed; interface and socket are then both gone.
#[derive(Parser)]
#[command(name = "mesh-wg", version, after_help = ENVIRONMENT)]
struct Arguments {
    /// Stay in the foreground.
    #[arg(short, long)]
    foreground: bool,
    /// What encrypts packets: both do the same, one may be faster.
    #[arg(long, value_enum, default_value_t)]
    aead: Choice,
    /// Name of the interface, 1 to 15 bytes.
    interface: String,
}

const ENVIRONMENT: &str = "Environment:
  LOG_LEVEL                silent, error, warn, info (default), debug, trace; verbose means debug.
                           In the background, logs are kept only when it is set.
  WG_PROCESS_FOREGROUND=1  the same as --foreground
  WG_TUN_NAME_FILE         not supported: the interface always has the given name";

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(&format!("{error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn complain(message: &str) {
    // Nothing is left to do when even this fails.
    let _told = writeln!(io::stderr(), "mesh-wg: {message}");
}

fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let level = std::env::var("LOG_LEVEL").ok();
    let filter = parse_level(level.as_deref())?;
    let foreground = arguments.foreground || std::env::var("WG_PROCESS_FOREGROUND").is_ok_and(|v| v == "1");
    if foreground {
        start_logging(filter);
        let engine = start(arguments)?;
        return serve(engine);
    }
    match daemon::split().context("going to the background")? {
        Side::Parent(result) => result.map_err(anyhow::Error::msg),
        Side::Child(report) => {
            start_logging(filter);
            let engine = match start(arguments) {
                Ok(engine) => engine,
                Err(error) => {
                    // The parent tells the user.
                    report.failed(&format!("{error:#}"));
                    std::process::exit(1);
                }
            };
            let keep_output = level.is_some() && filter != LevelFilter::OFF;
            report.up(keep_output).context("leaving the terminal")?;
            serve(engine)
        }
    }
}

fn start(arguments: &Arguments) -> anyhow::Result<Engine> {
    let interface = &arguments.interface;
    let chosen = aead::choose(arguments.aead).context("--aead")?;
    let engine = Engine::start(interface, &socket_path(interface))?;
    tracing::info!("packets are encrypted by {chosen}");
    Ok(engine)
}

fn serve(engine: Engine) -> anyhow::Result<()> {
    match engine.run().context("the device failed")? {
        Exit::Signal(signal) => tracing::info!(%signal, "ended by a signal"),
        Exit::InterfaceGone => tracing::info!("ended: the interface was deleted"),
        Exit::SocketGone => tracing::info!("ended: the configuration socket was removed"),
    }
    Ok(())
}

/// The words of the other implementations, and the usual ones.
fn parse_level(level: Option<&str>) -> anyhow::Result<LevelFilter> {
    Ok(match level.map(str::to_ascii_lowercase).as_deref() {
        None | Some("" | "info") => LevelFilter::INFO,
        Some("silent" | "off") => LevelFilter::OFF,
        Some("error") => LevelFilter::ERROR,
        Some("warn") => LevelFilter::WARN,
        Some("verbose" | "debug" | "max") => LevelFilter::DEBUG,
        Some("trace") => LevelFilter::TRACE,
        Some(other) => anyhow::bail!(
            "LOG_LEVEL={other:?} is not known: use silent, error, warn, info, debug (or verbose) or trace"
        ),
    })
}

fn start_logging(level: LevelFilter) {
    tracing_subscriber::fmt().with_max_level(level).with_writer(io::stderr).with_ansi(false).init();
}
