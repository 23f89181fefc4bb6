//! The Linux side of Hauberk: netlink, nftables, namespaces, TUN, UDP batches, files.
//!
//! Everything here talks to the kernel and decides nothing: which routes, rules and devices
//! there should be is decided by the callers. `unsafe` in this workspace lives here (and in the
//! engine's I/O) in small blocks, each with the reason why it is sound.
//!
//! Namespaces: a socket belongs to the network namespace in which it was made, whatever its
//! process does later. Everything below `/proc/sys/net` belongs to the namespace of the *thread*
//! that opens the file. See [`netns`].
#![deny(unsafe_code, unsafe_op_in_unsafe_fn, rustdoc::broken_intra_doc_links)]
#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a test fails by panicking"))]

pub mod files;
pub mod ipsec_mb;
pub mod netns;
pub mod nft;
pub mod packet;
pub mod rtnl;
pub mod sysctl;
pub mod tun;
pub mod uapi;
pub mod udp;

mod netlink;
