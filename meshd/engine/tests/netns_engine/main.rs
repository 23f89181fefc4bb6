//! Real devices in real namespaces, against each other and against Debian's `wireguard-go`. Needs root.
//!
//! One binary, so that the test that sits through a rekey after 120 seconds does so while the others run.
#![allow(
    clippy::unwrap_used,
    unreachable_pub,
    dead_code,
    reason = "a test fails by panicking; its scaffolding is shared with an example"
)]

#[path = "../support/mod.rs"]
mod support;

mod aging;
mod configuration;
mod lifecycle;
mod tunnel;
mod wireguard_go;
