//! Sending.

use std::io;
use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::os::fd::AsRawFd as _;

use nix::errno::Errno;

use super::control::{SEND_WORDS, Writer};
use super::socket::{Sockets, Source, UdpSocket};

/// Most datagrams in one piece (`UDP_MAX_SEGMENTS` of kernels before 6.9).
const MAX_SEGMENTS: usize = 64;
/// Most bytes in one piece: what fits an IPv4 packet.
const MAX_PIECE: usize = 65_507;
/// Most pieces in one system call.
const MAX_PIECES: usize = 32;

/// Where a datagram goes, and from which of our addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Destination {
    /// The receiver.
    pub address: SocketAddr,
    /// The address to send from; `None` leaves it to the routes.
    pub source: Option<Source>,
}

/// What became of a batch.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct SendReport {
    /// Datagrams handed to the kernel.
    pub sent: usize,
    /// Datagrams the kernel refused; see `error`.
    pub dropped: usize,
    /// Why the last of them was refused.
    pub error: Option<Errno>,
    /// A source address that is no longer ours. Its datagrams were sent from another.
    pub stale_source: Option<Source>,
}

#[derive(Debug, Clone, Copy)]
struct Piece {
    to: Destination,
    start: usize,
    length: usize,
    segment_size: usize,
    count: usize,
}

/// Datagrams to be sent, in order. Runs of equal length to one destination become one piece.
#[derive(Debug)]
pub struct SendBatch {
    data: Box<[u8]>,
    used: usize,
    pieces: Vec<Piece>,
    max_pieces: usize,
}

impl SendBatch {
    /// Room for `capacity` bytes of datagrams in at most 256 pieces.
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        let max_pieces = 256;
        Self {
            data: vec![0; capacity].into_boxed_slice(),
            used: 0,
            pieces: Vec::with_capacity(max_pieces),
            max_pieces,
        }
    }

    /// Whether there is nothing to send.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// Space for one datagram of up to `length` bytes; `None` when the batch has to be sent first.
    pub fn space(&mut self, length: usize) -> Option<&mut [u8]> {
        if self.pieces.len() >= self.max_pieces {
            return None;
        }
        self.data.get_mut(self.used..self.used + length)
    }

    /// Whether a datagram of `length` bytes has space.
    #[must_use]
    pub fn has_space(&self, length: usize) -> bool {
        self.pieces.len() < self.max_pieces && self.used + length <= self.data.len()
    }

    /// Adds the first `length` bytes of the last [`SendBatch::space`] as a datagram.
    ///
    /// # Panics
    /// When there was no such space.
    pub fn commit(&mut self, to: &Destination, length: usize) {
        assert!(self.used + length <= self.data.len(), "only what was given as space can be committed");
        let start = self.used;
        self.used += length;
        if let Some(piece) = self.pieces.last_mut()
            && piece.to == *to
            && piece.length == piece.count * piece.segment_size
            && length <= piece.segment_size
            && length > 0
            && piece.count < MAX_SEGMENTS
            && piece.length + length <= MAX_PIECE
        {
            piece.length += length;
            piece.count += 1;
            return;
        }
        self.pieces.push(Piece { to: *to, start, length, segment_size: length, count: 1 });
    }

    /// The datagrams with their destinations, in order.
    pub fn iter(&self) -> impl Iterator<Item = (&Destination, &[u8])> {
        self.pieces.iter().flat_map(|piece| {
            let data = &self.data[piece.start..piece.start + piece.length];
            let empty = data.is_empty().then_some(data);
            let datagrams = empty.into_iter().chain(data.chunks(piece.segment_size.max(1)));
            datagrams.map(|datagram| (&piece.to, datagram))
        })
    }

    /// Forgets all datagrams.
    pub fn clear(&mut self) {
        self.used = 0;
        self.pieces.clear();
    }

    /// Sends everything, waiting for the kernel where its queue is full, and empties the batch.
    pub fn send(&mut self, sockets: &Sockets) -> SendReport {
        let mut report = SendReport::default();
        let mut rest = self.pieces.as_slice();
        while let Some(first) = rest.first() {
            let ipv4 = first.to.address.is_ipv4();
            let run = rest.iter().take_while(|piece| piece.to.address.is_ipv4() == ipv4).count();
            let (now, later) = rest.split_at(run);
            rest = later;
            match sockets.for_address(first.to.address.ip()) {
                Some(socket) => send_run(socket, &self.data, now, &mut report),
                None => {
                    report.dropped += now.iter().map(|piece| piece.count).sum::<usize>();
                    report.error = Some(Errno::EAFNOSUPPORT);
                }
            }
        }
        self.clear();
        report
    }
}

fn send_run(socket: &UdpSocket, data: &[u8], pieces: &[Piece], report: &mut SendReport) {
    let mut rest = pieces;
    while let Some(first) = rest.first() {
        // Where runs cannot go out in one piece, only what comes before the first run goes as it is.
        let whole = match socket.segmentation() {
            true => rest.len(),
            false => rest.iter().take_while(|piece| piece.count == 1).count(),
        };
        let result = if whole == 0 { Err(Errno::EIO) } else { send_pieces(socket, data, &rest[..whole]) };
        match result {
            Ok(sent) => {
                report.sent += rest[..sent].iter().map(|piece| piece.count).sum::<usize>();
                rest = &rest[sent..];
            }
            Err(Errno::EINTR) => {}
            Err(error) => {
                rescue(socket, data, first, error, report);
                rest = &rest[1..];
            }
        }
    }
}

/// Another way for a piece that the kernel refused: from any source address, then datagram by datagram.
fn rescue(socket: &UdpSocket, data: &[u8], piece: &Piece, error: Errno, report: &mut SendReport) {
    let source = piece.to.source;
    let mut piece = *piece;
    let mut error = error;
    // EINVAL, EADDRNOTAVAIL: the source is not ours (any more). ENETUNREACH, ENODEV: no route from it.
    if matches!(error, Errno::EINVAL | Errno::EADDRNOTAVAIL | Errno::ENETUNREACH | Errno::ENODEV)
        && let Some(source) = piece.to.source.take()
    {
        match send_pieces(socket, data, &[piece]) {
            Ok(_one) => {
                report.sent += piece.count;
                report.stale_source = Some(source);
                return;
            }
            Err(again) => error = again,
        }
    }
    // EIO: a device without checksum offload, for every piece. EINVAL, EMSGSIZE: this piece does not suit the path.
    if piece.count > 1 && matches!(error, Errno::EIO | Errno::EINVAL | Errno::EMSGSIZE | Errno::EOPNOTSUPP) {
        if error == Errno::EIO {
            socket.disable_segmentation();
        }
        // It was not to blame for a piece that is too long for the path.
        piece.to.source = source;
        let end = piece.start + piece.length;
        let singles = (piece.start..end).step_by(piece.segment_size).map(|start| {
            let length = piece.segment_size.min(end - start);
            Piece { to: piece.to, start, length, segment_size: length, count: 1 }
        });
        let mut one_by_one = [piece; MAX_SEGMENTS];
        let mut count = 0;
        for (slot, single) in one_by_one.iter_mut().zip(singles) {
            *slot = single;
            count += 1;
        }
        let mut rest = &one_by_one[..count];
        while !rest.is_empty() {
            match send_pieces(socket, data, rest) {
                Ok(sent) => {
                    report.sent += sent;
                    rest = &rest[sent..];
                }
                Err(Errno::EINTR) => {}
                Err(refused) => {
                    rescue(socket, data, &rest[0], refused, report);
                    rest = &rest[1..];
                }
            }
        }
        return;
    }
    report.dropped += piece.count;
    report.error = Some(error);
}

/// One system call. Returns how many pieces went out, at least one.
fn send_pieces(socket: &UdpSocket, data: &[u8], pieces: &[Piece]) -> Result<usize, Errno> {
    // SAFETY: all three are plain old data of integers and pointers, for which all zeroes is a valid value.
    #[expect(unsafe_code, reason = "C structs have no safe constructors")]
    let (mut headers, mut vectors, mut names): (
        [libc::mmsghdr; MAX_PIECES],
        [libc::iovec; MAX_PIECES],
        [Name; MAX_PIECES],
    ) = unsafe { MaybeUninit::zeroed().assume_init() };
    let mut controls = [[0usize; SEND_WORDS]; MAX_PIECES];
    let count = pieces.len().min(MAX_PIECES);
    for (index, piece) in pieces[..count].iter().enumerate() {
        let datagrams = &data[piece.start..piece.start + piece.length];
        vectors[index].iov_base = datagrams.as_ptr().cast_mut().cast();
        vectors[index].iov_len = datagrams.len();
        let name_len = names[index].fill(&piece.to.address);
        let mut control = Writer::new(&mut controls[index]);
        if piece.count > 1 {
            control.segment_size(piece.segment_size as u16);
        }
        if let Some(source) = &piece.to.source {
            control.source(source);
        }
        let control_len = control.finish();
        let header = &mut headers[index].msg_hdr;
        header.msg_name = std::ptr::from_mut(&mut names[index]).cast();
        header.msg_namelen = name_len;
        header.msg_iov = &raw mut vectors[index];
        header.msg_iovlen = 1;
        if control_len > 0 {
            header.msg_control = controls[index].as_mut_ptr().cast();
            header.msg_controllen = control_len;
        }
    }
    // SAFETY: the first `count` headers point into `data`, `vectors`, `names` and `controls`, all alive during the
    // call, each with its true length; sendmmsg writes only the headers' lengths. The descriptor is open.
    #[expect(unsafe_code, reason = "sendmmsg has no safe form that reuses its memory")]
    let sent = unsafe { libc::sendmmsg(socket.as_raw_fd(), headers.as_mut_ptr(), count as libc::c_uint, 0) };
    Errno::result(sent).map(|sent| sent.cast_unsigned() as usize)
}

/// A socket address of either family.
#[repr(C)]
#[derive(Clone, Copy)]
union Name {
    v4: libc::sockaddr_in,
    v6: libc::sockaddr_in6,
}

impl Name {
    /// Writes the address and returns its length in bytes.
    fn fill(&mut self, address: &SocketAddr) -> libc::socklen_t {
        match address {
            SocketAddr::V4(address) => {
                self.v4 = libc::sockaddr_in {
                    sin_family: libc::AF_INET as libc::sa_family_t,
                    sin_port: address.port().to_be(),
                    sin_addr: libc::in_addr { s_addr: address.ip().to_bits().to_be() },
                    sin_zero: [0; 8],
                };
                size_of::<libc::sockaddr_in>() as libc::socklen_t
            }
            SocketAddr::V6(address) => {
                self.v6 = libc::sockaddr_in6 {
                    sin6_family: libc::AF_INET6 as libc::sa_family_t,
                    sin6_port: address.port().to_be(),
                    sin6_flowinfo: 0,
                    sin6_addr: libc::in6_addr { s6_addr: address.ip().octets() },
                    sin6_scope_id: address.scope_id(),
                };
                size_of::<libc::sockaddr_in6>() as libc::socklen_t
            }
        }
    }
}

impl SendReport {
    /// The last refusal as an error for a message.
    #[must_use]
    pub fn io_error(&self) -> Option<io::Error> {
        self.error.map(Into::into)
    }
}
