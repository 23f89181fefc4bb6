//! Multicast groups: what the kernel tells without being asked.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use netlink_sys::{Socket, SocketAddr};
use nix::errno::Errno;
use nix::sys::socket::{setsockopt, sockopt};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::{Failure, Message, Reply, borrow, split};

/// Room for bursts. When it overflows, the kernel says so.
const RECEIVE_BUFFER: usize = 1 << 20;

/// What one read gave.
pub(crate) enum Received {
    Messages(Vec<Message>),
    /// The buffer overflowed, or something came that made no sense.
    Lost,
}

/// A bound socket that no runtime knows yet, so that it can be made on a thread of another namespace.
#[derive(Debug)]
pub(crate) struct Bound(Socket);

impl AsFd for Bound {
    fn as_fd(&self) -> BorrowedFd<'_> {
        borrow(&self.0)
    }
}

impl AsRawFd for Bound {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl Bound {
    /// Listens to the groups given as bits (group number minus one).
    pub(crate) fn open(protocol: isize, groups: u32) -> Result<Self, Failure> {
        let fail = |action| move |source| Failure::Socket { action, source };
        let mut socket = Socket::new(protocol).map_err(fail("opening a netlink socket"))?;
        if setsockopt(&borrow(&socket), sockopt::RcvBufForce, &RECEIVE_BUFFER).is_err() {
            socket.set_rx_buf_sz(RECEIVE_BUFFER).map_err(fail("enlarging the receive buffer"))?;
        }
        socket.bind(&SocketAddr::new(0, groups)).map_err(fail("joining the multicast groups"))?;
        socket.set_non_blocking(true).map_err(fail("making the socket non-blocking"))?;
        Ok(Self(socket))
    }

    /// Hands the socket to the runtime of the caller.
    pub(crate) fn register(self) -> Result<Listener, Failure> {
        #[expect(unsafe_code, reason = "tokio asks for the promise that the descriptor stays open")]
        // SAFETY: `Bound` owns its socket, never replaces or closes it before it is dropped, and
        // always returns that one descriptor.
        let registered = unsafe { AsyncFd::register_with_interest(self, Interest::READABLE) };
        registered
            .map(Listener)
            .map_err(|e| Failure::Socket { action: "registering with the runtime", source: e.into() })
    }
}

/// A listening socket within a tokio runtime.
#[derive(Debug)]
pub(crate) struct Listener(AsyncFd<Bound>);

impl Listener {
    /// Waits for the next datagram. Dropping the future loses nothing.
    pub(crate) async fn receive(&self) -> Result<Received, Failure> {
        self.0
            .async_io(Interest::READABLE, |bound| receive(&bound.0))
            .await
            .map_err(|source| Failure::Socket { action: "receiving from the kernel", source })
    }
}

fn receive(socket: &Socket) -> io::Result<Received> {
    match socket.recv_from_full() {
        Ok((bytes, from)) if from.port_number() == 0 => {
            let Ok(replies) = split(&bytes) else { return Ok(Received::Lost) };
            let messages = replies.into_iter().filter_map(|reply| match reply {
                Reply::Data(message) => Some(message),
                Reply::Done { .. } | Reply::Refused(_) => None,
            });
            Ok(Received::Messages(messages.collect()))
        }
        // From another process, which may send whatever it likes.
        Ok(_) => Ok(Received::Messages(Vec::new())),
        Err(e) if is_overflow(&e) => {
            drain(socket)?;
            Ok(Received::Lost)
        }
        Err(e) => Err(e),
    }
}

/// Empties the queue. After an overflow the kernel drops everything, and says so no second time, until
/// the queue has been read empty: whoever is told of the loss earlier, and reads the state again, would
/// miss what changes meanwhile.
fn drain(socket: &Socket) -> io::Result<()> {
    loop {
        match socket.recv_from_full() {
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(e) if is_overflow(&e) || e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

fn is_overflow(error: &io::Error) -> bool {
    error.raw_os_error() == Some(Errno::ENOBUFS as i32)
}
