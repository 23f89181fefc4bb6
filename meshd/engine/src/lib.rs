//! A userspace WireGuard device over boringtun's protocol: the library under the `mesh-wg` program.
//!
//! # Shape
//! ```text
//!            TUN superpacket ─► segment ─► peer by destination ─► seal ─► SendBatch ─► UDP_SEGMENT     thread "outbound"
//!  UDP_GRO datagrams ─► peer by index ─► open ─► source belongs to peer? ─► coalesce ─► TUN write     thread "inbound"
//!  retransmission, keepalive, rekey, expiry of sessions                                               thread "timers"
//!  UAPI socket, link changes, signals                                                                 the caller of run()
//! ```
//! `device` is what they share. A `tunnel` is all state with one peer, behind one lock, free of I/O and clocks:
//! it takes packets and the time and leaves datagrams in a batch. No lock is held across a system call, and nothing
//! is allocated per packet once buffers have grown.
//!
//! # Order of locks
//! settings → peers → one peer's tunnel → indices. The table of allowed addresses is a leaf, too: whoever holds it takes
//! no other lock.
#![deny(unsafe_code, unsafe_op_in_unsafe_fn, rustdoc::broken_intra_doc_links)]
#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a test fails by panicking"))]

mod allowed_ips;
mod control;
mod counters;
pub mod daemon;
mod device;
mod engine;
mod inbound;
mod index;
mod initiation;
mod keys;
mod outbound;
mod peer;
mod socket_file;
mod timers;
mod tunnel;

pub use counters::{Counters, DropReason};
pub use engine::{Engine, Exit, StartError};
pub use socket_file::SocketError;
