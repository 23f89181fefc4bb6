//! The process: standard input in, one JSON document or nothing out, logs on stderr.

use std::io::{self, Read, Write};
use std::process::ExitCode;

use serde_json::{Value, json};
use tracing::level_filters::LevelFilter;

use crate::error::{CniError, Code};
use crate::invocation::{Command, Invocation};
use crate::verbs::{add, check, del, gc, status};
use crate::version::CniVersion;

/// The largest standard input that is read: the list of a garbage collection for 50,000 attachments fits.
const MAX_STDIN: u64 = 8 * 1024 * 1024;

/// Runs the plugin once.
pub fn run() -> ExitCode {
    let env = |name: &str| std::env::var_os(name).map(|value| value.to_string_lossy().into_owned());
    let mut stdin = Vec::new();
    let outcome =
        read_stdin(&env, &mut stdin).and_then(|()| Invocation::parse(&env, &stdin)).and_then(execute);
    let (document, code) = match outcome {
        Ok(None) => return ExitCode::SUCCESS,
        Ok(Some(document)) => (document, ExitCode::SUCCESS),
        Err(error) => {
            tracing::error!(code = error.code().number(), "{error}");
            (error.to_json(), ExitCode::FAILURE)
        }
    };
    match writeln!(io::stdout().lock(), "{document}") {
        Ok(()) => code,
        Err(error) => {
            tracing::error!(%error, "the result cannot be written to standard output");
            ExitCode::FAILURE
        }
    }
}

fn read_stdin(env: &dyn Fn(&str) -> Option<String>, stdin: &mut Vec<u8>) -> Result<(), CniError> {
    if !Invocation::reads_stdin(env) {
        return Ok(());
    }
    let failed = |why: String| CniError::new(Code::Io, format!("standard input: {why}"));
    io::stdin().lock().take(MAX_STDIN + 1).read_to_end(stdin).map_err(|error| failed(error.to_string()))?;
    if stdin.len() as u64 > MAX_STDIN {
        return Err(failed(format!("longer than {MAX_STDIN} bytes")));
    }
    Ok(())
}

fn execute(command: Command) -> Result<Option<Value>, CniError> {
    let (level, version) = match &command {
        Command::About | Command::Version(_) => (LevelFilter::INFO, CniVersion::NEWEST),
        Command::Add(command) | Command::Check(command) => (command.conf.log_level, command.conf.version),
        Command::Del(command) => (command.conf.log_level, command.conf.version),
        Command::Status(conf) => (conf.log_level, conf.version),
        Command::Gc(command) => (command.conf.log_level, command.conf.version),
    };
    start_logging(level);
    let done = match &command {
        Command::About => about().map(|()| None),
        Command::Version(version) => Ok(Some(json!({
            "cniVersion": version.echoed,
            "supportedVersions": CniVersion::supported(),
        }))),
        Command::Add(command) => add::add(command).map(Some),
        Command::Del(command) => del::del(command).map(|()| None),
        Command::Check(command) => check::check(command).map(|()| None),
        Command::Status(conf) => status::status(conf).map(|()| None),
        Command::Gc(command) => gc::gc(command).map(|()| None),
    };
    done.map_err(|error| error.with_version(version))
}

/// For people who start the binary by hand.
fn about() -> Result<(), CniError> {
    writeln!(
        io::stderr().lock(),
        "mesh-cni {}, the CNI plugin of Hauberk; CNI versions supported: {}",
        env!("CARGO_PKG_VERSION"),
        CniVersion::supported().join(", ")
    )
    .map_err(|error| CniError::new(Code::Io, format!("standard error: {error}")))
}

fn start_logging(level: LevelFilter) {
    let subscriber = tracing_subscriber::fmt()
        .with_writer(io::stderr)
        .with_ansi(false)
        .with_target(false)
        .with_max_level(level)
        .finish();
    // It fails only when there is a subscriber already, as in a program that calls `run` twice.
    let _ = tracing::subscriber::set_global_default(subscriber);
}
