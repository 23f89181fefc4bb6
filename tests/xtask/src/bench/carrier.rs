//! What can carry the packets between the two ends, and where the programs for it come from.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::ValueEnum;

use crate::command::{find_program, run};
use crate::packages;
use crate::peers::{self, Crate};
use crate::workspace::Workspace;

/// What carries the packets. The order is that of the columns in the tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Carrier {
    /// The veth pair itself.
    Veth,
    /// The kernel's VXLAN, which encrypts nothing.
    Vxlan,
    /// The reference userspace implementation, as Debian ships it.
    WireguardGo,
    /// Cloudflare's implementation, from crates.io.
    Boringtun,
    /// Mullvad's descendant of boringtun, from crates.io.
    Gotatun,
    /// Our engine.
    MeshWg,
}

/// The program of a userspace engine.
#[derive(Debug)]
pub(crate) struct Program {
    /// The file.
    pub(crate) path: PathBuf,
    /// What it needs to stay in the foreground as root; the name of the device comes behind it.
    pub(crate) options: &'static [&'static str],
    /// Environment: errors are logged and nothing else.
    pub(crate) environment: &'static [(&'static str, &'static str)],
}

impl Carrier {
    /// All of them.
    pub(crate) const ALL: &[Self] =
        &[Self::Veth, Self::Vxlan, Self::WireguardGo, Self::Boringtun, Self::Gotatun, Self::MeshWg];

    /// How it is called in the results and on the command line.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Veth => "veth",
            Self::Vxlan => "vxlan",
            Self::WireguardGo => "wireguard-go",
            Self::Boringtun => "boringtun",
            Self::Gotatun => "gotatun",
            Self::MeshWg => "mesh-wg",
        }
    }

    /// Whether a run goes on without it. Ours and the machine's own must work; a peer may be missing.
    pub(crate) fn may_be_missing(self) -> bool {
        !matches!(self, Self::Veth | Self::MeshWg)
    }

    /// The largest packet that it carries, in bytes, on an underlay with packets of `underlay` bytes.
    ///
    /// All tunnels get what WireGuard over IPv6 leaves. VXLAN would have room for more, but segments of the same
    /// size make the same number of packets.
    pub(crate) fn mtu(self, underlay: u32) -> u32 {
        match self {
            Self::Veth => underlay,
            Self::Vxlan | Self::WireguardGo | Self::Boringtun | Self::Gotatun | Self::MeshWg => underlay - 80,
        }
    }

    /// Builds or installs its engine; `None` when the kernel does the work.
    pub(crate) fn prepare(self, workspace: &Workspace, release: bool) -> Result<Option<Program>> {
        let program = match self {
            Self::Veth | Self::Vxlan => return Ok(None),
            Self::MeshWg => Program {
                path: build_mesh_wg(workspace, release)?,
                options: &["--foreground"],
                environment: &[("LOG_LEVEL", "error")],
            },
            Self::WireguardGo => {
                packages::ensure(&[packages::BENCH_WIREGUARD_GO])?;
                Program {
                    path: find_program("wireguard-go").context("no program wireguard-go")?,
                    options: &["--foreground"],
                    // The variable, unlike the option, also silences its advice to use the kernel's WireGuard.
                    environment: &[("LOG_LEVEL", "error"), ("WG_PROCESS_FOREGROUND", "1")],
                }
            }
            Self::Boringtun => install(workspace, &peers::BORINGTUN)?,
            Self::Gotatun => install(workspace, &peers::GOTATUN)?,
        };
        Ok(Some(program))
    }
}

fn build_mesh_wg(workspace: &Workspace, release: bool) -> Result<PathBuf> {
    eprintln!("==> build mesh-wg");
    let mut build = workspace.cargo();
    build.args(["build", "--quiet", "--package", "mesh-engine", "--bin", "mesh-wg"]);
    if release {
        build.arg("--release");
    }
    run(&mut build)?;
    Ok(workspace.target_dir().join(if release { "release" } else { "debug" }).join("mesh-wg"))
}

/// As `cargo install` made it.
fn install(workspace: &Workspace, wanted: &Crate) -> Result<Program> {
    Ok(Program {
        path: peers::install(workspace, wanted)?,
        options: &["--foreground", "--disable-drop-privileges"],
        environment: &[("WG_LOG_LEVEL", "error")],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_the_command_line() {
        for carrier in Carrier::ALL {
            assert_eq!(Carrier::from_str(carrier.name(), false), Ok(*carrier));
        }
        assert_eq!(Carrier::ALL, Carrier::value_variants());
    }
}
