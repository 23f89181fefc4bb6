//! Whole Ethernet frames past the IP stack: captured to prove what did (not) cross a wire, and sent to
//! try what an attacker would.
//!
//! Needs CAP_NET_RAW. A proof that something was absent is only as good as the capture: check
//! [`Statistics::dropped`] afterwards.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, LinkAddr, MsgFlags, SockFlag, SockType, recvmsg, setsockopt, socket,
    sockopt,
};
use nix::sys::time::TimeSpec;

use crate::netns::{NetNs, NetNsError};

/// Room for the largest frame there is: 64 KiB of segmentation offload and its headers.
const FRAME_ROOM: usize = 66 * 1024;

/// Why a capture or a raw send failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PacketError {
    /// A system call failed.
    #[error("packet socket on {device}: {action}: {source}{}", hint(source))]
    Socket {
        /// Device name, or `all devices`.
        device: String,
        /// What was being done.
        action: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The namespace could not be entered.
    #[error(transparent)]
    Namespace(#[from] NetNsError),
}

fn hint(error: &io::Error) -> &'static str {
    match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::EPERM | Errno::EACCES) => " (needs CAP_NET_RAW)",
        Some(Errno::ENODEV | Errno::ENXIO) => " (no such device here)",
        Some(Errno::ENETDOWN) => " (the device is down)",
        Some(Errno::EMSGSIZE) => " (longer than the device's MTU)",
        _ => "",
    }
}

/// What to capture.
#[derive(Debug, Clone)]
pub struct CaptureConfig {
    /// One device, or all of the namespace.
    pub device: Option<String>,
    /// Also frames to other stations' addresses. Only with a device.
    pub promiscuous: bool,
    /// Kernel memory for frames not yet read, in bytes.
    pub buffer: usize,
}

impl Default for CaptureConfig {
    fn default() -> Self {
        Self { device: None, promiscuous: false, buffer: 64 << 20 }
    }
}

/// Where a frame was going.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// To this host.
    Host,
    /// To all.
    Broadcast,
    /// To a group.
    Multicast,
    /// To another station, seen in promiscuous mode.
    OtherHost,
    /// From this host.
    Outgoing,
    /// Another value of `PACKET_*`.
    Other(u8),
}

/// One captured frame, borrowed from the capture's buffer.
#[derive(Debug)]
pub struct Frame<'a> {
    /// Device.
    pub index: u32,
    /// Where it was going.
    pub direction: Direction,
    /// When the kernel saw it.
    pub time: SystemTime,
    /// The bytes from the Ethernet header on. A frame not yet cut into segments (offload) comes whole.
    pub data: &'a [u8],
}

/// Counts of the kernel since the capture began.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Statistics {
    /// Frames seen, the dropped ones included.
    pub received: u64,
    /// Frames lost because the buffer was full.
    pub dropped: u64,
}

/// A running capture.
#[derive(Debug)]
pub struct Capture {
    fd: OwnedFd,
    device: String,
    buffer: Vec<u8>,
    total: Statistics,
}

impl Capture {
    /// Starts a capture in the namespace of the calling thread.
    ///
    /// # Errors
    /// [`PacketError::Socket`].
    pub fn open(config: &CaptureConfig) -> Result<Self, PacketError> {
        let device = config.device.clone().unwrap_or_else(|| "all devices".to_owned());
        let fail = |action| {
            let device = device.as_str();
            move |e| failure(device, action, e)
        };
        let index = match &config.device {
            Some(name) => {
                nix::net::if_::if_nametoindex(name.as_str()).map_err(fail("looking up the device"))?
            }
            None => 0,
        };
        let fd = raw_socket().map_err(fail("opening"))?;
        if setsockopt(&fd, sockopt::RcvBufForce, &config.buffer).is_err() {
            setsockopt(&fd, sockopt::RcvBuf, &config.buffer).map_err(fail("enlarging the buffer"))?;
        }
        setsockopt(&fd, sockopt::ReceiveTimestampns, &true).map_err(fail("asking for time stamps"))?;
        if config.promiscuous && index != 0 {
            promiscuous(&fd, index).map_err(fail("entering promiscuous mode"))?;
        }
        // Bound last: frames come from this moment on, and none before it from other devices.
        bind(&fd, index, libc::ETH_P_ALL).map_err(fail("binding"))?;
        Ok(Self { fd, device, buffer: vec![0; FRAME_ROOM], total: Statistics::default() })
    }

    /// Starts a capture in another namespace.
    ///
    /// # Errors
    /// [`PacketError::Namespace`], [`PacketError::Socket`].
    pub fn open_in(netns: &NetNs, config: &CaptureConfig) -> Result<Self, PacketError> {
        netns.run(|| Self::open(config))?
    }

    /// Hands every frame that arrives within `wait` to `each`; returns how many. Call it in a loop, on
    /// a thread of its own where much is captured.
    ///
    /// # Errors
    /// [`PacketError::Socket`].
    pub fn read_for(
        &mut self,
        wait: Duration,
        mut each: impl FnMut(&Frame<'_>),
    ) -> Result<usize, PacketError> {
        let deadline = Instant::now() + wait;
        let mut count = 0;
        loop {
            while self.read_one(&mut each)? {
                count += 1;
                // Bounded also under a flood that never lets the queue run empty.
                if count % 1024 == 0 && Instant::now() >= deadline {
                    return Ok(count);
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(count);
            }
            let millis = u16::try_from(left.as_millis()).unwrap_or(u16::MAX).max(1);
            match poll(&mut [PollFd::new(self.fd.as_fd(), PollFlags::POLLIN)], PollTimeout::from(millis)) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(e) => return Err(failure(&self.device, "waiting", e)),
            }
        }
    }

    fn read_one(&mut self, each: &mut impl FnMut(&Frame<'_>)) -> Result<bool, PacketError> {
        let mut control = nix::cmsg_space!(TimeSpec);
        let mut slices = [IoSliceMut::new(&mut self.buffer)];
        let flags = MsgFlags::MSG_DONTWAIT;
        let message = match recvmsg::<LinkAddr>(self.fd.as_raw_fd(), &mut slices, Some(&mut control), flags) {
            Ok(message) => message,
            Err(Errno::EAGAIN) => return Ok(false),
            // The device went down, or a signal came: neither ends the capture.
            Err(Errno::ENETDOWN | Errno::EINTR) => return Ok(true),
            Err(e) => return Err(failure(&self.device, "receiving", e)),
        };
        let mut time = SystemTime::now();
        let stamps = message.cmsgs().map_err(|e| failure(&self.device, "reading the time stamp", e))?;
        for stamp in stamps {
            if let ControlMessageOwned::ScmTimestampns(stamp) = stamp {
                time = UNIX_EPOCH + Duration::from(stamp);
            }
        }
        let (index, kind) =
            message.address.map_or((0, 0), |a| (u32::try_from(a.ifindex()).unwrap_or(0), a.pkttype()));
        let len = message.bytes.min(FRAME_ROOM);
        let direction = match kind {
            libc::PACKET_HOST => Direction::Host,
            libc::PACKET_BROADCAST => Direction::Broadcast,
            libc::PACKET_MULTICAST => Direction::Multicast,
            libc::PACKET_OTHERHOST => Direction::OtherHost,
            libc::PACKET_OUTGOING => Direction::Outgoing,
            other => Direction::Other(other),
        };
        each(&Frame { index, direction, time, data: self.buffer.get(..len).unwrap_or_default() });
        Ok(true)
    }

    /// Counts since the capture began.
    ///
    /// # Errors
    /// [`PacketError::Socket`].
    pub fn statistics(&mut self) -> Result<Statistics, PacketError> {
        let mut raw = libc::tpacket_stats { tp_packets: 0, tp_drops: 0 };
        let mut len = size_of_u32::<libc::tpacket_stats>();
        #[expect(unsafe_code, reason = "no safe wrapper exists for this socket option")]
        // SAFETY: `raw` is a writable `tpacket_stats` and `len` its length; the kernel writes at most
        // that many bytes. Both live until after the call.
        let result = unsafe {
            libc::getsockopt(
                self.fd.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_STATISTICS,
                (&raw mut raw).cast(),
                &raw mut len,
            )
        };
        Errno::result(result).map_err(|e| failure(&self.device, "reading the statistics", e))?;
        // The kernel starts from zero after each reading.
        self.total.received += u64::from(raw.tp_packets);
        self.total.dropped += u64::from(raw.tp_drops);
        Ok(self.total)
    }
}

fn failure(device: &str, action: &'static str, errno: Errno) -> PacketError {
    PacketError::Socket { device: device.to_owned(), action, source: errno.into() }
}

impl AsFd for Capture {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Sends whole frames out of one device.
#[derive(Debug)]
pub struct Sender {
    fd: OwnedFd,
    device: String,
}

impl Sender {
    /// For a device of the calling thread's namespace.
    ///
    /// # Errors
    /// [`PacketError::Socket`].
    pub fn open(device: &str) -> Result<Self, PacketError> {
        let fail = |action| move |e| failure(device, action, e);
        let index = nix::net::if_::if_nametoindex(device).map_err(fail("looking up the device"))?;
        let fd = raw_socket().map_err(fail("opening"))?;
        // Protocol 0: nothing is received on this socket.
        bind(&fd, index, 0).map_err(fail("binding"))?;
        Ok(Self { fd, device: device.to_owned() })
    }

    /// For a device of another namespace.
    ///
    /// # Errors
    /// [`PacketError::Namespace`], [`PacketError::Socket`].
    pub fn open_in(netns: &NetNs, device: &str) -> Result<Self, PacketError> {
        netns.run(|| Self::open(device))?
    }

    /// Sends one frame, Ethernet header included, exactly as given.
    ///
    /// # Errors
    /// [`PacketError::Socket`].
    pub fn send(&self, frame: &[u8]) -> Result<(), PacketError> {
        nix::sys::socket::send(self.fd.as_raw_fd(), frame, MsgFlags::empty())
            .map(drop)
            .map_err(|e| failure(&self.device, "sending", e))
    }
}

fn raw_socket() -> nix::Result<OwnedFd> {
    // Protocol 0: silent until bound.
    socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None)
}

fn size_of_u32<T>() -> libc::socklen_t {
    libc::socklen_t::try_from(size_of::<T>()).unwrap_or(libc::socklen_t::MAX)
}

fn bind(fd: &OwnedFd, index: u32, protocol: libc::c_int) -> nix::Result<()> {
    let address = libc::sockaddr_ll {
        sll_family: libc::c_ushort::try_from(libc::AF_PACKET).map_err(|_| Errno::EINVAL)?,
        sll_protocol: u16::try_from(protocol).map_err(|_| Errno::EINVAL)?.to_be(),
        sll_ifindex: libc::c_int::try_from(index).map_err(|_| Errno::EINVAL)?,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    #[expect(unsafe_code, reason = "nix has no constructor for a link-layer address")]
    // SAFETY: the pointer is to a complete `sockaddr_ll` of the length given, which outlives the call.
    let result = unsafe {
        libc::bind(fd.as_raw_fd(), (&raw const address).cast(), size_of_u32::<libc::sockaddr_ll>())
    };
    Errno::result(result).map(drop)
}

fn promiscuous(fd: &OwnedFd, index: u32) -> nix::Result<()> {
    let request = libc::packet_mreq {
        mr_ifindex: libc::c_int::try_from(index).map_err(|_| Errno::EINVAL)?,
        mr_type: libc::c_ushort::try_from(libc::PACKET_MR_PROMISC).map_err(|_| Errno::EINVAL)?,
        mr_alen: 0,
        mr_address: [0; 8],
    };
    #[expect(unsafe_code, reason = "no safe wrapper exists for this socket option")]
    // SAFETY: the pointer is to a complete `packet_mreq` of the length given, which outlives the call.
    let result = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_ADD_MEMBERSHIP,
            (&raw const request).cast(),
            size_of_u32::<libc::packet_mreq>(),
        )
    };
    Errno::result(result).map(drop)
}
