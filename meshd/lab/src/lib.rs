//! N-host meshes on one machine, in network namespaces.
//!
//! A *lab* is a few *hosts* on one private Ethernet, the *underlay*, or behind routers on it ([`Topology`]). A host is a tree of processes in
//! network, mount, pid and uts namespaces of its own, with a private `/run`, `/var/lib/meshd`,
//! `/etc/meshd` and `/etc/cni/net.d`: the real daemon, plugin and engine run in it at their default
//! paths. A *pod* is a named network namespace of a host, attached by running the real CNI plugin.
//!
//! Pid 1 of each host, its *holder*, is this crate's own hidden subcommand ([`LabCommand`]). Nothing of
//! a host is bound to a name on the real machine, so killing the holder takes everything with it:
//! processes, namespaces, mounts and interfaces. What remains is the lab's directory below
//! [`LAB_ROOT`], which `lab down` removes.
//!
//! ```no_run
//! # fn main() -> anyhow::Result<()> {
//! use mesh_lab::{Binaries, Family, Lab, Options};
//! let lab = Lab::up(Options { nodes: 3, pods: 1, ..Options::new("example", Binaries::beside_current_exe()?) })?;
//! let (a, b) = (lab.host(0).pod(0)?, lab.host(1).pod(0)?);
//! a.tcp_send_to(&b, Family::V6, 100 << 20)?;
//! # Ok(()) }
//! ```
#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a test fails by panicking"))]

mod binaries;
mod capture;
mod check;
mod cli;
mod cli_link;
mod cni;
mod control;
mod delay_line;
mod demo;
mod family;
mod forwarder;
mod holder;
mod host;
mod impairment;
mod inspect;
mod lab;
mod links;
mod measure;
mod network;
mod ping;
mod plan;
mod pod;
mod process;
mod quantity;
mod router;
mod space;
mod state;
mod stream;
mod teardown;
mod too_long;
mod topology;
mod underlay;
mod usage;
mod wait;

pub use binaries::Binaries;
pub use capture::{CaptureReport, RunningCapture, Where};
pub use check::{CheckReport, Probe};
pub use cli::{ForwarderArgs, HostInitArgs, LabCommand, UpArgs, run};
pub use cli_link::LinkArgs;
pub use family::Family;
pub use host::{Daemon, Host};
pub use impairment::Impairment;
pub use inspect::{ClusterRanges, Scanner, Tally};
pub use lab::{Lab, Options, Secret};
pub use links::LinkState;
pub use mesh_sys::packet::Frame;
pub use ping::{PingOptions, PingStats, RunningPing};
pub use pod::Pod;
pub use process::ProcessRef;
pub use quantity::{Rate, Share, Span};
pub use state::LAB_ROOT;
pub use stream::{MARKER, Transfer};
pub use topology::{Behaviour, Families, Link, Nat, Out, Place, Router, Topology};
pub use usage::Usage;
pub use wait::{poll_until, poll_until_some};
