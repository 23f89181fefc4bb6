//! Whole nodes in one thread: virtual time, a network that fails, disks, kernels, container runtimes, adversaries,
//! and a reference model of what must hold.
//!
//! The nodes are [`mesh_core::node::Node`], the code that ships, by its inputs and outputs only. Everything that is
//! random follows from one seed: the same seed gives the same run, byte for byte ([`world::World::trace`]).
//!
//! | module | concept |
//! |---|---|
//! | [`settings`] | what a run is like |
//! | [`world`] | all hosts under one clock; carries out what nodes want, as the daemon does |
//! | [`node`] | the one place that knows the node's inputs and outputs |
//! | [`network`], [`nat`], [`links`] | delay, loss, cuts, NATs; control sessions on top |
//! | [`host`], [`pods`] | disk, kernel, daemon; the container runtime |
//! | [`faults`], [`clocks`] | what goes wrong; wall clocks, and what depends on them |
//! | `operators` | what operators decide, with and without an admin key |
//! | [`evil`], [`evil_datagrams`], [`outsider`] | members that mean harm; somebody on the network who does |
//! | [`tunnels`] | what WireGuard would carry between the hosts, and tells of it |
//! | [`model`] | what must hold at every moment |
//! | [`healing`] | what must hold once everything is mended |
//! | [`figures`] | how fast a cluster is, and what it costs |
//!
//! A node's own clock starts with the process and cannot be set. What a host's wall clock shows is told to it as the
//! daemon does.

#![forbid(unsafe_code)]
#![allow(clippy::indexing_slicing, reason = "hosts are numbered by the simulator itself")]

mod carried;
pub mod clocks;
pub mod dice;
pub mod evil;
pub mod evil_datagrams;
pub mod faults;
pub mod figures;
pub mod healing;
pub mod host;
pub mod links;
pub mod model;
pub mod nat;
pub mod network;
pub mod node;
mod operators;
pub mod outsider;
pub mod pods;
mod power;
pub mod queue;
pub mod settings;
mod snapshot;
pub mod tunnels;
pub mod world;

#[path = "../../../meshd/core/src/node/tests/wire.rs"]
mod wire;
