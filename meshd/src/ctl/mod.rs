//! `meshctl`: what an operator asks the daemon, and says to it.
//!
//! Exit status:
//!
//! | | |
//! |---|---|
//! | 0 | all is well; `why`: nothing that this node knows stops the flow; `doctor`: nothing worse than a warning |
//! | 1 | an error, told on standard error |
//! | 2 | wrong usage |
//! | 3 | the daemon does not answer |
//! | 4 | `status`: the node is not a member yet, or something is not as it should be; `why`: something stops the flow; `doctor`: there is a problem |
//! | 5 | `why`: neither end is of this host; the answer says where to ask |

mod authority;
mod client;
mod diagnosis;
mod echo;
mod ipam;
mod leave;
mod paths;
mod status;
mod token;

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::{CommandFactory as _, Parser, Subcommand, ValueEnum};
use mesh_core::api::{DEFAULT_SOCKET, Membership, Status};
use mesh_keys::join::JoinKey;
use mesh_keys::rand_core::OsRng;
use mesh_lab::{Binaries, LabCommand};

pub use client::{Client, ClientError};

/// Looks at and steers the mesh from one of its hosts.
#[derive(Debug, Parser)]
#[command(name = "meshctl", version, about)]
struct Arguments {
    /// Unix socket of the daemon
    #[arg(long, env = "MESHD_CONTROL_SOCKET", default_value = DEFAULT_SOCKET, global = true, value_name = "SOCKET")]
    control_socket: PathBuf,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// What this node is, whom it reaches and how
    Status {
        /// Only a part of it
        #[arg(value_enum)]
        part: Option<Part>,
        /// As a table, or as JSON with a versioned schema
        #[arg(short, long, value_enum, default_value_t = Format::Table)]
        output: Format,
    },
    /// What a flow meets on its way, and what stops it: pods, route, key, path, ports. Probes what is not known
    Why(diagnosis::WhyArguments),
    /// How this host and its view of the mesh are, and what to do about it
    Doctor(diagnosis::DoctorArguments),
    /// Make a join key: write it to a file of mode 0600 on every host, for `meshd --key-file`
    Keygen {
        /// Make an admin key instead: the secret one is written to this new file, to be kept off the nodes; the
        /// public one is printed, for `meshd --admin-key` where the cluster is founded
        #[arg(long, value_name = "FILE")]
        admin: Option<PathBuf>,
    },
    /// Remove a node from the cluster for good: its tunnels, sessions and addresses
    Remove(authority::RemoveArguments),
    /// Take this node out of the cluster for good: its addresses go to another member, then it is no member any more
    Leave(leave::LeaveArguments),
    /// When nodes may join by password or key file
    JoinWindow {
        /// What to do
        #[command(subcommand)]
        verb: authority::WindowVerb,
    },
    /// Tokens: each lets so many hosts join, until it ends or is revoked
    Token {
        /// What to do
        #[command(subcommand)]
        verb: token::TokenVerb,
    },
    /// The configuration the daemon runs with; it holds names of secret files, never secrets
    Config,
    /// Meshes on this one machine, of namespaces, real daemons and real packets
    #[command(subcommand)]
    Lab(LabCommand),
    /// A completion script for a shell
    Completion {
        /// The shell
        #[arg(value_enum)]
        shell: clap_complete::Shell,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// The other members: sessions, tunnels, traffic
    Peers,
    /// The ways that tunnels take: directly or through a relay, why, and what else there is
    Paths,
    /// Who owns which addresses, what is free here, and what would free more
    Ipam,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    Table,
    Json,
}

/// The daemon does not answer.
const EXIT_UNREACHABLE: u8 = 3;

/// The node is not a member yet, or something is not as it should be.
const EXIT_DEGRADED: u8 = 4;

/// Neither end of a flow is of this host.
const EXIT_ELSEWHERE: u8 = 5;

/// Runs `meshctl` with the arguments of this process. To be called before any thread is started.
pub fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let done = match arguments.verb {
        Verb::Status { part, output } => show_status(&arguments.control_socket, part, output),
        Verb::Why(what) => diagnosis::why(&Client::new(&arguments.control_socket), &what),
        Verb::Doctor(how) => diagnosis::doctor(&Client::new(&arguments.control_socket), &how),
        Verb::Keygen { admin: None } => print(JoinKey::generate(&mut OsRng).to_text().trim_end()),
        Verb::Keygen { admin: Some(file) } => authority::make_admin_key(&file),
        Verb::Remove(what) => authority::remove(&Client::new(&arguments.control_socket), &what),
        Verb::Leave(how) => leave::leave(&Client::new(&arguments.control_socket), &how),
        Verb::JoinWindow { verb } => authority::join_window(&Client::new(&arguments.control_socket), &verb),
        Verb::Token { verb } => token::run(&Client::new(&arguments.control_socket), &verb),
        Verb::Config => show_config(&arguments.control_socket),
        Verb::Lab(command) => Binaries::beside_current_exe()
            .and_then(|binaries| mesh_lab::run(command, &binaries))
            .map(|()| ExitCode::SUCCESS),
        Verb::Completion { shell } => {
            clap_complete::generate(shell, &mut Arguments::command(), "meshctl", &mut std::io::stdout());
            Ok(ExitCode::SUCCESS)
        }
    };
    done.unwrap_or_else(|error| {
        // Standard error is all that is left to tell it; when that is gone, so is the reader.
        let _ = writeln!(std::io::stderr(), "meshctl: {error:#}");
        ExitCode::from(status_of(&error))
    })
}

fn status_of(error: &anyhow::Error) -> u8 {
    match error.downcast_ref::<ClientError>() {
        Some(ClientError::Unreachable { .. } | ClientError::Timeout) => EXIT_UNREACHABLE,
        Some(ClientError::Refused(_) | ClientError::Answer(_)) | None => 1,
    }
}

/// Writes a line to standard output. A reader that has gone away, as `head` does, is no error.
fn print(text: &str) -> Result<ExitCode> {
    match writeln!(std::io::stdout(), "{text}") {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(ExitCode::SUCCESS),
        other => other.map(|()| ExitCode::SUCCESS).context("standard output"),
    }
}

fn show_status(socket: &std::path::Path, part: Option<Part>, output: Format) -> Result<ExitCode> {
    let status: Status = Client::new(socket).get("/v1/status")?;
    let text = match (output, part) {
        (Format::Json, None) => serde_json::to_string_pretty(&status)?,
        (Format::Json, Some(Part::Peers)) => serde_json::to_string_pretty(
            &serde_json::json!({ "schema_version": status.schema_version, "peers": status.peers }),
        )?,
        (Format::Json, Some(Part::Paths)) => serde_json::to_string_pretty(&paths::json(&status))?,
        (Format::Json, Some(Part::Ipam)) => serde_json::to_string_pretty(
            &serde_json::json!({ "schema_version": status.schema_version, "ipam": status.ipam }),
        )?,
        (Format::Table, None) => status::overview(&status),
        (Format::Table, Some(Part::Peers)) => status::peers(&status),
        (Format::Table, Some(Part::Paths)) => paths::table(&status),
        (Format::Table, Some(Part::Ipam)) => ipam::table(&status),
    };
    print(text.trim_end())?;
    let well = status.membership == Membership::Member && status.problems.is_empty();
    Ok(if well { ExitCode::SUCCESS } else { ExitCode::from(EXIT_DEGRADED) })
}

fn show_config(socket: &std::path::Path) -> Result<ExitCode> {
    let config: serde_json::Value = Client::new(socket).get("/v1/config")?;
    print(&serde_json::to_string_pretty(&config)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_daemon_that_does_not_answer_has_an_exit_status_of_its_own() {
        let gone = std::io::Error::from(std::io::ErrorKind::NotFound);
        for (error, status) in [
            (ClientError::Unreachable { socket: "/s".into(), source: gone }, 3),
            (ClientError::Timeout, 3),
            (ClientError::Answer("?".into()), 1),
        ] {
            assert_eq!(status_of(&anyhow::Error::from(error).context("while asking")), status);
        }
    }
}
