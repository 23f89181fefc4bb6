//! Receiving.

use std::io;
use std::mem::MaybeUninit;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::ops::Range;
use std::os::fd::AsRawFd as _;

use nix::errno::Errno;

use super::control::{self, RECEIVE_WORDS};
use super::socket::{Source, UdpSocket};

/// Longest piece the kernel hands over.
const SLOT: usize = 65_536;

/// Memory for what one system call receives.
pub struct ReceiveBatch {
    data: Box<[u8]>,
    control: Box<[[usize; RECEIVE_WORDS]]>,
    names: Box<[libc::sockaddr_storage]>,
    received: Vec<Piece>,
}

/// Where a run of datagrams from one sender to one of our addresses lies in the memory of a [`ReceiveBatch`].
#[derive(Debug, Clone, Copy)]
pub struct Piece {
    /// Who sent them.
    pub from: SocketAddr,
    /// Which of our addresses they were sent to, when the kernel said so.
    pub to: Option<Source>,
    start: usize,
    length: usize,
    segment_size: usize,
}

impl Piece {
    /// The places of the datagrams, in order; at least one.
    pub fn datagrams(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let (start, end, step) = (self.start, self.start + self.length, self.segment_size.max(1));
        // An empty datagram is one datagram.
        let empty = (self.length == 0).then_some(start..start);
        empty.into_iter().chain((start..end).step_by(step).map(move |at| at..end.min(at + step)))
    }
}

impl ReceiveBatch {
    /// Room for `slots` pieces of up to 64 KiB each. Memory is touched only as far as it is used.
    #[must_use]
    pub fn new(slots: usize) -> Self {
        // SAFETY: `sockaddr_storage` is plain old data, for which all zeroes is a valid value.
        #[expect(unsafe_code, reason = "a C struct has no safe constructor")]
        let name: libc::sockaddr_storage = unsafe { MaybeUninit::zeroed().assume_init() };
        Self {
            data: vec![0; slots * SLOT].into_boxed_slice(),
            control: vec![[0; RECEIVE_WORDS]; slots].into_boxed_slice(),
            names: vec![name; slots].into_boxed_slice(),
            received: Vec::with_capacity(slots),
        }
    }

    /// Receives what is there, without waiting, and returns the number of pieces. What was received before is gone.
    ///
    /// # Errors
    /// `WouldBlock` when there is nothing; otherwise what the system says. An ICMP error for an earlier send counts
    /// as nothing received (`Ok(0)`).
    pub fn receive(&mut self, socket: &UdpSocket) -> io::Result<usize> {
        self.received.clear();
        let mut vectors: [libc::iovec; MAX_SLOTS] = zeroed_vectors();
        let mut headers: [libc::mmsghdr; MAX_SLOTS] = zeroed_headers();
        let slots = self.names.len().min(MAX_SLOTS);
        let parts = self.data.chunks_mut(SLOT).zip(&mut self.control).zip(&mut self.names);
        for (((data, control), name), (vector, header)) in parts.zip(vectors.iter_mut().zip(&mut headers)) {
            vector.iov_base = data.as_mut_ptr().cast();
            vector.iov_len = data.len();
            header.msg_hdr.msg_name = std::ptr::from_mut(name).cast();
            header.msg_hdr.msg_namelen = size_of::<libc::sockaddr_storage>() as libc::socklen_t;
            header.msg_hdr.msg_iov = vector;
            header.msg_hdr.msg_iovlen = 1;
            header.msg_hdr.msg_control = control.as_mut_ptr().cast();
            header.msg_hdr.msg_controllen = size_of::<[usize; RECEIVE_WORDS]>();
        }
        // SAFETY: the first `slots` headers point to memory owned by `self` and to `vectors`, all alive and not
        // otherwise used during the call, each with its true length; the descriptor is open.
        #[expect(unsafe_code, reason = "recvmmsg has no safe form that reuses its memory")]
        let count = unsafe {
            libc::recvmmsg(
                socket.as_raw_fd(),
                headers.as_mut_ptr(),
                slots as libc::c_uint,
                libc::MSG_DONTWAIT,
                std::ptr::null_mut(),
            )
        };
        let count = match Errno::result(count) {
            Ok(count) => count.cast_unsigned() as usize,
            Err(Errno::ECONNREFUSED | Errno::EHOSTUNREACH | Errno::ENETUNREACH | Errno::EINTR) => {
                return Ok(0);
            }
            Err(error) => return Err(error.into()),
        };
        let parts = headers[..count].iter().zip(&self.names).zip(&self.control);
        for (slot, ((header, name), control)) in parts.enumerate() {
            let said = control::read(control, header.msg_hdr.msg_controllen);
            let length = (header.msg_len as usize).min(SLOT);
            let from = read_name(name, header.msg_hdr.msg_namelen);
            // A cut datagram cannot be authentic; it keeps its slot as an empty one.
            let cut = header.msg_hdr.msg_flags & libc::MSG_TRUNC != 0 || from.is_none();
            self.received.push(Piece {
                start: slot * SLOT,
                length: if cut { 0 } else { length },
                segment_size: said.segment_size.unwrap_or(length),
                from: from.unwrap_or(SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), 0)),
                to: said.destination,
            });
        }
        Ok(count)
    }

    /// What the last [`ReceiveBatch::receive`] brought, and the memory that it lies in.
    pub fn parts(&mut self) -> (&[Piece], &mut [u8]) {
        (&self.received, &mut self.data)
    }
}

/// Most pieces in one call.
const MAX_SLOTS: usize = 32;

fn zeroed_vectors() -> [libc::iovec; MAX_SLOTS] {
    [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; MAX_SLOTS]
}

fn zeroed_headers() -> [libc::mmsghdr; MAX_SLOTS] {
    // SAFETY: `mmsghdr` is plain old data of integers and pointers, for which all zeroes is a valid value.
    #[expect(unsafe_code, reason = "a C struct with private padding has no safe constructor")]
    unsafe {
        MaybeUninit::zeroed().assume_init()
    }
}

fn read_name(name: &libc::sockaddr_storage, length: libc::socklen_t) -> Option<SocketAddr> {
    match libc::c_int::from(name.ss_family) {
        libc::AF_INET if length as usize >= size_of::<libc::sockaddr_in>() => {
            // SAFETY: the kernel has written a `sockaddr_in`, which the family says and the length allows;
            // `sockaddr_storage` is aligned for it and larger.
            #[expect(unsafe_code, reason = "socket addresses are a union told apart by their family")]
            let name = unsafe { &*std::ptr::from_ref(name).cast::<libc::sockaddr_in>() };
            let address = Ipv4Addr::from_bits(u32::from_be(name.sin_addr.s_addr));
            Some(SocketAddr::new(address.into(), u16::from_be(name.sin_port)))
        }
        libc::AF_INET6 if length as usize >= size_of::<libc::sockaddr_in6>() => {
            // SAFETY: as above, for `sockaddr_in6`.
            #[expect(unsafe_code, reason = "socket addresses are a union told apart by their family")]
            let name = unsafe { &*std::ptr::from_ref(name).cast::<libc::sockaddr_in6>() };
            let address = Ipv6Addr::from(name.sin6_addr.s6_addr);
            let port = u16::from_be(name.sin6_port);
            // The flow label of a packet is no part of where it came from.
            Some(SocketAddrV6::new(address, port, 0, name.sin6_scope_id).into())
        }
        _ => None,
    }
}
