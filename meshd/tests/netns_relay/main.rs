//! The relay on a host between two others that cannot reach each other, with real engines at both ends, in namespaces of
//! its own. Needs root.
#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]
#![allow(clippy::print_stderr, reason = "what was counted is for whoever runs the tests")]

mod ends;
#[path = "../support/flood.rs"]
mod flood;
mod floods;
#[path = "../support/ns.rs"]
mod ns;
mod passes;
