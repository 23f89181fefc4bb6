//! The WireGuard cross-platform userspace configuration protocol, as text and as clients.
//!
//! One exchange is one `key=value` line after another, closed by an empty line. A request starts with `get=1` or
//! `set=1`; every answer ends with `errno=N` and an empty line. The reference is
//! <https://www.wireguard.com/xplatform/>; where it is silent this module follows what `wg` sends and accepts.
//!
//! - [`Request`], [`SetDevice`], [`SetPeer`] and [`AllowedIpChange`] are what a client asks for.
//! - [`Device`] and [`Peer`] are what a device reports.
//! - [`Client`] (tokio) and [`BlockingClient`] speak to a running device over its unix socket.
//! - [`read_message`] reads one message from a stream within [`Limits`], for servers and clients alike.
//!
//! Parsing is pure but for one thing: the scope of a link-local endpoint may be an interface name, which is looked
//! up in the caller's network namespace.

mod client;
mod key;
mod message;
mod parse;
mod stream;

pub use client::{BlockingClient, Client, ClientError, DEFAULT_TIMEOUT, SOCKET_DIRECTORY, socket_path};
pub use key::{KEY_LEN, KeyError, PublicKey, SecretKey};
pub use message::{AllowedIpChange, Device, Peer, Request, SetDevice, SetPeer, format_errno};
pub use parse::{ParseError, ParseErrorKind, Place, ResponseError};
pub use stream::{Limits, ReadError, read_message};

#[cfg(test)]
mod tests;
