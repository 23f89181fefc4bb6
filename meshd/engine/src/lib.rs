//! A userspace WireGuard device: the library under the `mesh-wg` program.
//!
//! # Shape
//! ```text
//!  TUN queues ─► superpacket ─► peer by destination ─► segment and seal in the send buffer ─► UDP_SEGMENT   threads "outbound"
//!  UDP_GRO ─► session by index ─► open in place ─► source belongs to peer? ─► coalesce ─► TUN queue         threads "inbound"
//!  retransmission, keepalive, rekey, expiry of sessions                                                     thread "timers"
//!  UAPI socket, link changes, signals                                                                       the caller of run()
//! ```
//! `device` is what they share. A `tunnel` is all state with one peer, behind one lock, free of I/O and clocks; it is
//! asked once for each run of packets, which are sealed and opened without it. No lock is held across a system call,
//! and nothing is allocated per packet once buffers have grown. `noise` and `handshake` make the keys of a `session`.
//!
//! # Order of locks
//! settings → peers → one peer's tunnel → indices. The table of allowed addresses is a leaf, too: whoever holds it takes
//! no other lock.
#![deny(unsafe_code, unsafe_op_in_unsafe_fn, rustdoc::broken_intra_doc_links)]
#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a test fails by panicking"))]

pub mod aead;
mod allowed_ips;
mod control;
mod counters;
pub mod daemon;
mod device;
mod engine;
mod handshake;
mod inbound;
mod index;
mod keys;
#[doc(hidden)]
pub mod measured;
mod noise;
mod outbound;
mod peer;
mod session;
mod socket_file;
mod timers;
mod tunnel;

pub use counters::{Counters, DropReason};
pub use engine::{Engine, Exit, StartError};
pub use socket_file::SocketError;
