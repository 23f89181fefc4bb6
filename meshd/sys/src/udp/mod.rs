//! UDP in batches: many datagrams per system call, by `UDP_SEGMENT` and `sendmmsg` one way and by `UDP_GRO` and
//! `recvmmsg` the other.
//!
//! [`Sockets`] is a pair of one IPv4 and one IPv6 socket on the same port, [`SocketGroup`] several of them. [`SendBatch`] and [`ReceiveBatch`] are
//! memory that is filled and used again; nothing is allocated per datagram.

mod borrowed;
mod control;
mod fragments;
mod receive;
mod send;
mod socket;

pub use borrowed::{send_from, send_whole_from};
pub use fragments::narrow;
pub use receive::{Piece, ReceiveBatch};
pub use send::{Destination, SendBatch, SendReport};
pub use socket::{SocketGroup, Sockets, Source, UdpSocket};

#[cfg(test)]
mod tests;
