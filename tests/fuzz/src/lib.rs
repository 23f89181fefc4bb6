//! Fuzz targets for everything in Hauberk that reads bytes from elsewhere.
//!
//! A target is a function that takes any bytes and panics when a promise is broken: a parser that panics, a value
//! that does not survive being written and read again, a forgery that is let through. The same functions serve
//!
//! - `cargo xtask test fuzz`, which replays the committed corpus and then tries a bounded number of mutations,
//!   the same ones every time ([`mutator`]);
//! - `cargo xtask fuzz`, where libFuzzer looks for new inputs, guided by coverage.
//!
//! An input that was found stays: it goes into `corpus/TARGET/`, under a name that says what it showed.
//!
//! | target | who sends it | promise |
//! |---|---|---|
//! | `frame` | anyone, UDP 6783 | nothing forged opens, no frame opens twice |
//! | `record` | a member | a lying member changes nothing but what is its own; merging is idempotent |
//! | `message` | anyone, TCP 6783 inside TLS | what was decoded is written and decoded alike |
//! | `genesis` | a sponsor, to a node that joins | only the canonical form of a valid document is read |
//! | `cni_stdin` | a container runtime, environment and standard input | accepted commands are within bounds; errors are documents of the specification |
//! | `gossip` | members, sealed | whatever comes causes at most eight datagrams, none too long; what is read is written alike |
//! | `uapi` | root, on the engine's socket | what was parsed is written and parsed alike; errors name line and key |

#![forbid(unsafe_code)]

mod cni_stdin;
mod frame;
mod genesis;
mod gossip;
mod message;
pub mod mutator;
mod record;
mod uapi;
mod world;

/// A parser under test.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// How it is called on the command line, and its directory below `corpus/`.
    pub name: &'static str,
    /// Tries one input; panics when a promise is broken.
    pub run: fn(&[u8]),
    /// Real examples, from which the corpus started: a name for the file, and what is in it.
    pub seeds: fn() -> Vec<(&'static str, Vec<u8>)>,
    /// Words of the format, which mutation puts in.
    pub words: &'static [&'static [u8]],
}

/// All targets.
pub const TARGETS: &[Target] = &[
    frame::TARGET,
    gossip::TARGET,
    record::TARGET,
    message::TARGET,
    genesis::TARGET,
    cni_stdin::TARGET,
    uapi::TARGET,
];

/// The target of this name.
#[must_use]
pub fn target(name: &str) -> Option<&'static Target> {
    TARGETS.iter().find(|target| target.name == name)
}
