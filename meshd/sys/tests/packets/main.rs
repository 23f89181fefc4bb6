//! Cutting up and joining undo each other, for all the packets that a kernel or a peer may come up with.
//!
//! From outside, with packets and checksums made independently; the tests inside of the crate have single cases.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod build;
mod cutting;
mod joining;
