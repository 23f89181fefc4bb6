//! The sockets.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Protocol, Socket, Type};

use super::fragments::Fragments;

/// How much the kernel may queue in each direction, in bytes. wireguard-go found that 7 MiB lift a single stream by a
/// quarter; without the right to exceed `net.core.rmem_max` the kernel grants less.
const SOCKET_BUFFER: usize = 7 << 20;

/// How often a random port is tried before the other family is given up: it may be taken there.
const PORT_ATTEMPTS: u32 = 10;

/// The local address a peer reached us at. Answers come from the same one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Source {
    /// The address.
    pub address: IpAddr,
    /// The interface; 0 unless the address is link-local.
    pub interface: u32,
}

/// One UDP socket of one family.
#[derive(Debug)]
pub struct UdpSocket {
    socket: Socket,
    ipv4: bool,
    /// Cleared when a device on the way cannot do it.
    segmentation: AtomicBool,
    /// The kernel hands over several datagrams in one piece.
    coalescing: bool,
}

impl UdpSocket {
    /// With `shared`, beside others on the same port.
    fn bind(ipv4: bool, port: u16, shared: bool) -> io::Result<Self> {
        let (domain, any) = if ipv4 {
            (Domain::IPV4, IpAddr::V4(Ipv4Addr::UNSPECIFIED))
        } else {
            (Domain::IPV6, IpAddr::V6(Ipv6Addr::UNSPECIFIED))
        };
        let socket = Socket::new(domain, Type::DGRAM, Some(Protocol::UDP))?;
        if !ipv4 {
            socket.set_only_v6(true)?;
        }
        socket.set_reuse_port(shared)?;
        socket.bind(&SocketAddr::new(any, port).into())?;
        enlarge(&socket);
        // Which of our addresses was meant. Without it answers leave from whichever the routes prefer.
        if ipv4 {
            setsockopt(&socket, sockopt::Ipv4PacketInfo, &true)?;
        } else {
            setsockopt(&socket, sockopt::Ipv6RecvPacketInfo, &true)?;
        }
        // A kernel before 4.18 / 5.0 lacks these; then every datagram goes alone.
        let segmentation = setsockopt(&socket, sockopt::UdpGsoSegment, &0).is_ok();
        let coalescing = setsockopt(&socket, sockopt::UdpGroSegment, &true).is_ok();
        Ok(Self { socket, ipv4, segmentation: AtomicBool::new(segmentation), coalescing })
    }

    /// Whether runs of datagrams go out in one piece.
    #[must_use]
    pub fn segmentation(&self) -> bool {
        self.segmentation.load(Ordering::Relaxed)
    }

    /// Whether runs of datagrams come in in one piece.
    #[must_use]
    pub fn coalescing(&self) -> bool {
        self.coalescing
    }

    /// Never again tries to send runs in one piece; for devices that fail them.
    pub(super) fn disable_segmentation(&self) {
        if self.segmentation.swap(false, Ordering::Relaxed) {
            tracing::info!(
                ipv4 = self.ipv4,
                "a network device cannot segment UDP: sending datagrams one by one"
            );
        }
    }

    /// Whether this is the IPv4 socket of the pair.
    #[must_use]
    pub fn is_ipv4(&self) -> bool {
        self.ipv4
    }

    fn port(&self) -> io::Result<u16> {
        let address = self.socket.local_addr()?;
        address.as_socket().map(|address| address.port()).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }
}

impl AsFd for UdpSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for UdpSocket {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.socket.as_raw_fd()
    }
}

/// Best effort: the traffic flows with any size.
fn enlarge(socket: &Socket) {
    let forced = setsockopt(socket, sockopt::RcvBufForce, &SOCKET_BUFFER)
        .and_then(|()| setsockopt(socket, sockopt::SndBufForce, &SOCKET_BUFFER));
    if forced.is_err() {
        let granted = socket
            .set_recv_buffer_size(SOCKET_BUFFER)
            .and_then(|()| socket.set_send_buffer_size(SOCKET_BUFFER));
        tracing::debug!(?granted, "socket buffers are bounded by net.core.rmem_max and wmem_max");
    }
}

/// A socket per family on one port. A host without one of the families has only the other.
#[derive(Debug)]
pub struct Sockets {
    /// The IPv4 socket.
    pub v4: Option<UdpSocket>,
    /// The IPv6 socket, for IPv6 only.
    pub v6: Option<UdpSocket>,
    port: u16,
}

impl Sockets {
    /// Binds both families to `port`; 0 takes a random one that is free in both.
    ///
    /// # Errors
    /// What the system says, `EADDRINUSE` above all. Nothing stays bound.
    pub fn bind(port: u16) -> io::Result<Self> {
        let mut attempt = 1;
        loop {
            match Self::bind_once(port) {
                Err(error)
                    if port == 0 && attempt < PORT_ATTEMPTS && error.kind() == io::ErrorKind::AddrInUse =>
                {
                    attempt += 1;
                }
                result => return result,
            }
        }
    }

    fn bind_once(port: u16) -> io::Result<Self> {
        let v4 = available(UdpSocket::bind(true, port, false))?;
        let port = v4.as_ref().map_or(Ok(port), UdpSocket::port)?;
        let v6 = available(UdpSocket::bind(false, port, false))?;
        let port = v6.as_ref().map_or(Ok(port), UdpSocket::port)?;
        if v4.is_none() && v6.is_none() {
            return Err(io::Error::from_raw_os_error(libc::EAFNOSUPPORT));
        }
        Ok(Self { v4, v6, port })
    }

    /// More sockets on the same port, in the same families.
    fn beside(&self) -> io::Result<Self> {
        let beside = |socket: &Option<UdpSocket>, ipv4| -> io::Result<Option<UdpSocket>> {
            let Some(socket) = socket else { return Ok(None) };
            socket.socket.set_reuse_port(true)?;
            UdpSocket::bind(ipv4, self.port, true).map(Some)
        };
        Ok(Self { v4: beside(&self.v4, true)?, v6: beside(&self.v6, false)?, port: self.port })
    }

    /// The port in use.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The sockets there are.
    pub fn iter(&self) -> impl Iterator<Item = &UdpSocket> {
        self.v4.iter().chain(&self.v6)
    }

    /// The socket for packets to `address`.
    #[must_use]
    pub fn for_address(&self, address: IpAddr) -> Option<&UdpSocket> {
        if address.is_ipv4() { self.v4.as_ref() } else { self.v6.as_ref() }
    }

    /// What is sent from now on may be cut up by anybody on its way: "don't fragment" is not set. As far as the kernel knows
    /// the path's MTU, it is cut up here.
    ///
    /// # Errors
    /// What the system says.
    pub fn allow_fragments(&self) -> io::Result<()> {
        self.iter().try_for_each(|socket| Fragments::Allowed.set_on(socket, socket.ipv4))
    }

    /// Marks everything sent from now on; 0 removes the mark.
    ///
    /// # Errors
    /// What the system says, above all `EPERM` without `CAP_NET_ADMIN`.
    pub fn set_mark(&self, mark: u32) -> io::Result<()> {
        self.iter().try_for_each(|socket| socket.socket.set_mark(mark))
    }
}

/// Several [`Sockets`] on one port. The kernel spreads what comes in by addresses and ports, so that whatever one
/// sender sends comes in at the same one, in order.
#[derive(Debug)]
pub struct SocketGroup(Vec<Sockets>);

impl SocketGroup {
    /// Binds `count` of them, at least one, to `port`; 0 takes a random one that is free in both families.
    ///
    /// # Errors
    /// As [`Sockets::bind`]. The port must be free: nobody else's sockets are joined.
    pub fn bind(port: u16, count: usize) -> io::Result<Self> {
        let mut all = vec![Sockets::bind(port)?];
        for _ in 1..count {
            all.push(all[0].beside()?);
        }
        Ok(Self(all))
    }

    /// Those that thread `number` should use.
    #[must_use]
    pub fn of(&self, number: usize) -> &Sockets {
        &self.0[number % self.0.len()]
    }

    /// The port in use.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.0[0].port
    }

    /// As [`Sockets::allow_fragments`], for all.
    ///
    /// # Errors
    /// As there.
    pub fn allow_fragments(&self) -> io::Result<()> {
        self.0.iter().try_for_each(Sockets::allow_fragments)
    }

    /// As [`Sockets::set_mark`], for all.
    ///
    /// # Errors
    /// As there.
    pub fn set_mark(&self, mark: u32) -> io::Result<()> {
        self.0.iter().try_for_each(|sockets| sockets.set_mark(mark))
    }
}

/// A family that the kernel lacks, or that is switched off, is no failure.
fn available(socket: io::Result<UdpSocket>) -> io::Result<Option<UdpSocket>> {
    match socket {
        Ok(socket) => Ok(Some(socket)),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL)) => {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}
