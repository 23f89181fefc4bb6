//! Real devices in real namespaces, against each other and against Debian's `wireguard-go` and
//! `boringtun-cli`. Needs root.
//!
//! One binary, so that the test that sits through a rekey after 120 seconds does so while the others run.
#![allow(
    clippy::unwrap_used,
    unreachable_pub,
    clippy::print_stdout,
    dead_code,
    reason = "a test fails by panicking and prints what it measured; its scaffolding is shared with an example"
)]

#[path = "../support/mod.rs"]
mod support;

mod aead;
mod aging;
mod boringtun;
mod configuration;
mod lifecycle;
mod lossy;
mod many_peers;
mod payloads;
mod tunnel;
mod under_load;
mod wireguard_go;
