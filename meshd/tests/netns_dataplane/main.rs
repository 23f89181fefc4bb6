//! The kernel task against a real kernel, in namespaces of its own: states are reached and kept, pods talk, forged
//! frames do not, and nothing of the cluster leaves by the underlay. Needs root.
#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]
#![allow(clippy::wildcard_enum_match_arm, reason = "tests wait for the one input they are about")]
#![allow(clippy::print_stderr, reason = "measured times are for whoever runs the tests")]

mod closed;
mod forged;
mod frames;
mod lanes;
mod mtu;
mod node;
#[path = "../support/ns.rs"]
mod ns;
mod reach;
mod spread;
mod state;
