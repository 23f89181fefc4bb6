//! The Hauberk CNI plugin: a short-lived process that attaches a container to the mesh.
//!
//! The daemon leases addresses and guards the host's side; the plugin makes the veth pair and configures the
//! container's side, because only it is sure to see the container's namespace. See `docs/cni.md` for what it
//! promises; tests name the numbered statement they check (`s004_…`).
//!
//! [`Invocation::parse`] is the pure part: from environment and standard input to a checked [`Command`].
//! [`run`] is the process around it.

#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a failed unwrap fails the test"))]

mod config;
mod daemon;
mod error;
mod fields;
mod invocation;
mod lock;
mod process;
mod result;
mod tombstone;
mod verbs;
mod version;
mod wiring;

pub use config::{AttachConf, MAX_MTU, MIN_MTU, NetConf};
pub use error::{CniError, Code};
pub use invocation::{AddCommand, Command, DelCommand, GcCommand, Invocation, VersionCommand};
pub use process::run;
pub use result::{Attached, Dns, Interface, Ip, PrevInterface, PrevIp, PrevResult, PrevRoute, Route};
pub use version::CniVersion;
