//! Control sessions: TLS 1.3 between two identities, and frames inside.
//!
//! ```text
//! TCP 6783   TLS 1.3 only, X25519MLKEM768 only, raw Ed25519 keys at both ends (RFC 7250),
//!            ALPN "hauberk/1", no resumption, no tickets, no early data
//! inside     frames: u32 little-endian length (1 to the limit) ‖ that many bytes
//! ```
//!
//! A session that is set up says one thing: the other end holds the secret key of
//! [`Session::peer`]. Whether that key belongs to a member is for the protocol inside to find out.
//! Until it has, frames are limited to [`MAX_FRAME_UNPROVEN`].
//!
//! The end that dials has its session before the other end has checked the dialler's key; a refusal
//! then comes as an error of the first [`FrameReader::recv`].

mod framing;
mod gate;
mod tls;

pub use framing::{FrameReader, FrameWriter, MAX_FRAME_MEMBER, MAX_FRAME_UNPROVEN};
pub use gate::HandshakeSlot;
pub(crate) use tls::MAX_SEGMENT;
pub use tls::{ALPN, TlsIdentity, accept, carried, dial};

use mesh_keys::{IdentityKey, SessionSecrets};
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

/// Where the other end of a session is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Remote {
    /// At that address.
    At(SocketAddr),
    /// Another member carries the session.
    Carried,
}

impl fmt::Display for Remote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::At(address) => address.fmt(f),
            Self::Carried => f.write_str("the other end of a carried session"),
        }
    }
}

/// An encrypted connection with the holder of an identity.
#[derive(Debug)]
pub struct Session {
    /// Who the other end is.
    pub peer: IdentityKey,
    /// Where the other end is.
    pub remote: Remote,
    /// What only the two ends of this session know.
    pub secrets: SessionSecrets,
    /// Frames from the other end.
    pub reader: FrameReader,
    /// Frames to the other end.
    pub writer: FrameWriter,
    /// On the accepting end: this session's share of the limit on sessions whose peer is not known
    /// to be a member. Drop it when the peer has proved to be one, not earlier.
    pub slot: Option<HandshakeSlot>,
}

impl Session {
    /// The peer has proved to be a member: frames may be longer now, and the session no longer
    /// counts as one of a stranger.
    ///
    /// The peer must come to the same conclusion before it reads the first long frame, or wait with that frame
    /// until it does.
    pub fn trust_peer(&mut self) {
        self.reader.set_max_frame(MAX_FRAME_MEMBER);
        self.writer.set_max_frame(MAX_FRAME_MEMBER);
        self.slot = None;
    }
}

/// Why there is no session, or no longer one. The connection is closed, unless said otherwise.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// No TCP connection.
    #[error("cannot connect to {remote}: {source}")]
    Connect {
        /// Where to.
        remote: Remote,
        /// What the operating system said.
        source: io::Error,
    },
    /// The connection could not be prepared.
    #[error("cannot set up the connection with {remote}: {source}")]
    Socket {
        /// The other end.
        remote: Remote,
        /// What the operating system said.
        source: io::Error,
    },
    /// The other end was too slow.
    #[error(
        "{remote} did not complete {step} within {after:?}; is a firewall in between, or is it another program's port?"
    )]
    Timeout {
        /// The other end.
        remote: Remote,
        /// What was waited for.
        step: &'static str,
        /// For how long.
        after: Duration,
    },
    /// Too many strangers at one time; the connection was closed unread.
    #[error("refused {remote}: too many connections that have not proved to be a member yet ({limit})")]
    TooManyHandshakes {
        /// The other end.
        remote: Remote,
        /// Which limit was reached.
        limit: &'static str,
    },
    /// The other end speaks something else.
    #[error("{remote} does not speak TLS: {reason}; is it another program's port?")]
    NotTls {
        /// The other end.
        remote: Remote,
        /// What was found.
        reason: String,
    },
    /// The other end speaks TLS, but not as control sessions do.
    #[error(
        "{remote} is no Hauberk node, or one of another version: a session takes TLS 1.3, X25519MLKEM768 and raw Ed25519 keys ({reason})"
    )]
    Incompatible {
        /// The other end.
        remote: Remote,
        /// What was found.
        reason: String,
    },
    /// The other end ended the handshake.
    #[error("{remote} refused the TLS session: {reason}")]
    Refused {
        /// The other end.
        remote: Remote,
        /// The alert it sent.
        reason: String,
    },
    /// The other end does not hold the key it shows, or the session was tampered with.
    #[error("TLS with {remote} failed: {reason}")]
    Tls {
        /// The other end.
        remote: Remote,
        /// What was found.
        reason: String,
    },
    /// The connection ended during the handshake.
    #[error("{remote} closed the connection during the TLS handshake")]
    HandshakeCut {
        /// The other end.
        remote: Remote,
    },
    /// The connection broke.
    #[error("the connection with {remote} is lost: {source}")]
    Lost {
        /// The other end.
        remote: Remote,
        /// What the operating system said.
        source: io::Error,
    },
    /// The connection ended in the middle of a frame, or without a farewell.
    #[error("the connection with {remote} was cut off")]
    CutOff {
        /// The other end.
        remote: Remote,
    },
    /// The other end does not take what is sent to it.
    #[error("{remote} has not taken any data for {after:?}")]
    Stalled {
        /// The other end.
        remote: Remote,
        /// For how long.
        after: Duration,
    },
    /// A frame with an impossible length. Outgoing: nothing was sent, and the session goes on.
    #[error("a frame of {found} bytes {direction} {remote}, but 1 to {max} are allowed")]
    FrameLength {
        /// `from` or `to`.
        direction: &'static str,
        /// The other end.
        remote: Remote,
        /// Length in bytes.
        found: usize,
        /// The limit in force, in bytes.
        max: usize,
    },
    /// Too much is waiting to be sent. Nothing was queued, and the session goes on.
    #[error("too much is waiting to be sent to {remote}")]
    QueueFull {
        /// The other end.
        remote: Remote,
    },
    /// The session is over.
    #[error("the session with {remote} is closed")]
    Closed {
        /// The other end.
        remote: Remote,
    },
    /// This node's identity cannot be used for TLS.
    #[error("the node's identity key cannot be used for TLS: {reason}")]
    Identity {
        /// What the TLS library said.
        reason: String,
    },
}
