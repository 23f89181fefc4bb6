//! TUN devices with offloads: superpackets of up to 64 KiB in both directions, one system call each.
//!
//! With `IFF_VNET_HDR` every read and write carries a [`VnetHeader`] before the packet. The kernel may hand over one
//! TCP or UDP superpacket instead of dozens of segments ([`segment()`] cuts it up), and takes one back ([`Coalescer`]
//! builds it from the packets of one flow). Both are pure; [`Tun`] and its
//! [`Queue`]s do the system calls. A [`Tap`] is of frames, and plain.

mod checksum;
mod coalesce;
mod device;
mod header;
mod segment;
mod steer;
mod tap;

pub use coalesce::{Coalescer, MAX_PIECES, Superpacket};
pub use device::{LinkWatch, Offloads, Queue, Tun, TunError};
pub use header::{GsoKind, VNET_HEADER_LEN, VnetHeader};
pub use segment::{SegmentError, Segments, segment};
pub use steer::steer;
pub use tap::Tap;

#[cfg(test)]
mod tests;
