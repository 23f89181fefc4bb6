//! The device itself: making it, asking about it, reading and writing.

use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt as _;

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use nix::errno::Errno;
use nix::sys::uio::{readv, writev};

use super::coalesce::{MAX_PIECES, Superpacket};
use super::header::{VNET_HEADER_LEN, VnetHeader};

const CLONE_DEVICE: &str = "/dev/net/tun";

/// Why there is no device. No device was left behind.
#[derive(Debug, thiserror::Error)]
pub enum TunError {
    /// The kernel has no TUN driver, or this container was not given it.
    #[error("/dev/net/tun does not exist: load the kernel module tun, or give the container this device")]
    NoDriver,
    /// The process may not make network devices.
    #[error("no permission to make TUN device {name}: it takes CAP_NET_ADMIN (run as root)")]
    NoPermission {
        /// The name asked for.
        name: String,
    },
    /// Another process holds a TUN device of that name.
    #[error("interface {name} exists and is in use by another process")]
    Busy {
        /// The name asked for.
        name: String,
    },
    /// There is an interface of that name which is not a TUN device, or one of another mode.
    #[error("interface {name} exists and is not a TUN device of this kind")]
    Taken {
        /// The name asked for.
        name: String,
    },
    /// The name cannot be an interface's name.
    #[error("{name:?} cannot name an interface: 1 to 15 bytes, no '/', no space, no '%', not '.' or '..'")]
    BadName {
        /// The name asked for.
        name: String,
    },
    /// The kernel lacks the virtio header, which every kernel since 2.6.27 has.
    #[error("TUN device {name}: {what} failed: {source}")]
    Io {
        /// The name asked for.
        name: String,
        /// The step.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

/// What the kernel agreed to hand over and take in one piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Offloads {
    /// Packets with an open checksum; without it there are no superpackets at all.
    pub checksum: bool,
    /// TCP superpackets, both families.
    pub tcp: bool,
    /// UDP superpackets, both families (Linux 6.2).
    pub udp: bool,
}

/// A TUN device held by this process. It goes away with it unless it was made persistent by someone else.
#[derive(Debug)]
pub struct Tun {
    /// At least one.
    queues: Vec<Queue>,
    offloads: Offloads,
    /// For interface requests, in the namespace the device was made in.
    control: socket2::Socket,
}

/// One of a TUN device's queues. The kernel keeps a flow in the queue to which its answers are written (see
/// [`steer`](super::steer())); a new flow comes in any.
#[derive(Debug)]
pub struct Queue(File);

impl Tun {
    /// Makes the device `name` with that many queues, at least one, or attaches to a persistent one that nobody
    /// holds, with the one queue that such a device has. Reads do not block.
    ///
    /// # Errors
    /// [`TunError`] names the likely cause.
    pub fn open(name: &str, queues: usize) -> Result<Self, TunError> {
        let valid = !name.is_empty()
            && name.len() < libc::IFNAMSIZ
            && name != "."
            && name != ".."
            && !name.contains(|c: char| c == '/' || c == ':' || c == '%' || c.is_whitespace() || c == '\0');
        if !valid {
            return Err(TunError::BadName { name: name.to_owned() });
        }
        let failed = |what| move |source| TunError::Io { name: name.to_owned(), what, source };
        let file = match attach(name, MODE | libc::IFF_MULTI_QUEUE | libc::IFF_TUN_EXCL) {
            Err(TunError::Busy { .. }) => match attach(name, MODE) {
                // It has several queues, so one like us made it.
                Err(TunError::Taken { name }) if is_multi_queue(&name) => {
                    return Err(TunError::Busy { name });
                }
                other => other?,
            },
            Err(error) => return Err(error),
            Ok(first) => {
                let mut files = vec![Queue(first)];
                for _ in 1..queues {
                    files.push(Queue(attach(name, MODE | libc::IFF_MULTI_QUEUE)?));
                }
                return Self::prepare(files).map_err(failed("setting it up"));
            }
        };
        Self::prepare(vec![Queue(file)]).map_err(failed("setting it up"))
    }

    fn prepare(queues: Vec<Queue>) -> io::Result<Self> {
        let header_len = VNET_HEADER_LEN as libc::c_int;
        let mut offloads = Offloads { checksum: false, tcp: false, udp: false };
        for queue in &queues {
            set_int(queue.as_fd(), libc::TUNSETVNETHDRSZ, &header_len)?;
            offloads = negotiate(queue.as_fd());
        }
        let control = socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::DGRAM, None)?;
        Ok(Self { queues, offloads, control })
    }

    /// Its queues; at least one.
    #[must_use]
    pub fn queues(&self) -> &[Queue] {
        &self.queues
    }

    /// What the kernel agreed to.
    #[must_use]
    pub fn offloads(&self) -> Offloads {
        self.offloads
    }

    /// The device's present name; it may have been renamed.
    ///
    /// # Errors
    /// `EBADFD` when the device has been deleted.
    pub fn name(&self) -> io::Result<String> {
        let mut request = Request::empty();
        request.call(self.queues[0].as_fd(), libc::TUNGETIFF)?;
        let bytes: Vec<u8> =
            request.0.ifr_name.iter().map(|c| c.cast_unsigned()).take_while(|byte| *byte != 0).collect();
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// The device's present MTU in bytes.
    ///
    /// # Errors
    /// `EBADFD` when the device has been deleted, `ENODEV` when it has been moved to another network namespace.
    pub fn mtu(&self) -> io::Result<u32> {
        let mut request = self.request()?;
        request.call(self.control.as_fd(), libc::SIOCGIFMTU)?;
        // SAFETY: SIOCGIFMTU has succeeded, so the kernel has written this member; every bit pattern is an integer.
        #[expect(unsafe_code, reason = "the kernel's interface request is a union")]
        let mtu = unsafe { request.0.ifr_ifru.ifru_mtu };
        Ok(mtu.max(0).cast_unsigned())
    }

    /// Sets the device's MTU in bytes.
    ///
    /// # Errors
    /// What the system says: out of range, device gone, no permission.
    pub fn set_mtu(&self, mtu: u32) -> io::Result<()> {
        let mut request = self.request()?;
        request.0.ifr_ifru.ifru_mtu =
            libc::c_int::try_from(mtu).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        request.call(self.control.as_fd(), libc::SIOCSIFMTU)
    }

    fn request(&self) -> io::Result<Request> {
        Request::named(&self.name()?).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }
}

impl Queue {
    /// Reads one packet or superpacket into `packet`, which should hold 65,575 bytes, and returns its length.
    ///
    /// # Errors
    /// `WouldBlock` when there is none; `EBADFD` or `EIO` when the device is gone or down; `InvalidData` when the
    /// kernel's answer is shorter than its header.
    pub fn read(&self, packet: &mut [u8]) -> io::Result<(VnetHeader, usize)> {
        let mut header = [0; VNET_HEADER_LEN];
        let length = readv(&self.0, &mut [IoSliceMut::new(&mut header), IoSliceMut::new(packet)])?;
        let length = length.checked_sub(VNET_HEADER_LEN).ok_or(io::ErrorKind::InvalidData)?;
        Ok((VnetHeader::decode(&header), length))
    }

    /// Writes one packet or superpacket whose pieces lie in `arena`.
    ///
    /// # Errors
    /// What the system says: `EIO` when the device is down, `EBADFD` when it is gone, `EINVAL` when the kernel does
    /// not take this superpacket.
    pub fn write(&self, packet: &Superpacket<'_>, arena: &[u8]) -> io::Result<()> {
        let header = packet.header.encode();
        let mut slices = [IoSlice::new(&[]); MAX_PIECES + 1];
        slices[0] = IoSlice::new(&header);
        for (slice, piece) in slices[1..].iter_mut().zip(packet.pieces) {
            *slice = IoSlice::new(&arena[piece.clone()]);
        }
        loop {
            match writev(&self.0, &slices[..=packet.pieces.len().min(MAX_PIECES)]) {
                Ok(_length) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl AsFd for Queue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Packets, with a header that tells of offloads.
const MODE: libc::c_int = libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// Attaches a queue to the device `name`, which is made if it does not exist. `flags` are those of TUNSETIFF.
pub(super) fn attach(name: &str, flags: libc::c_int) -> Result<File, TunError> {
    let failed = |what| move |source| TunError::Io { name: name.to_owned(), what, source };
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(CLONE_DEVICE)
        .map_err(|error| match error.raw_os_error() {
            Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => TunError::NoDriver,
            Some(libc::EACCES | libc::EPERM) => TunError::NoPermission { name: name.to_owned() },
            _ => failed("opening /dev/net/tun")(error),
        })?;
    let mut request = Request::named(name).ok_or_else(|| TunError::BadName { name: name.to_owned() })?;
    request.0.ifr_ifru.ifru_flags = flags as libc::c_short;
    request.call(file.as_fd(), libc::TUNSETIFF).map_err(|error| match error.raw_os_error() {
        Some(libc::EPERM) => TunError::NoPermission { name: name.to_owned() },
        Some(libc::EBUSY) => TunError::Busy { name: name.to_owned() },
        Some(libc::EINVAL) => TunError::Taken { name: name.to_owned() },
        _ => failed("making it")(error),
    })?;
    Ok(file)
}

/// Whether the interface is a TUN device with several queues, of whomever.
fn is_multi_queue(name: &str) -> bool {
    let flags = std::fs::read_to_string(format!("/sys/class/net/{name}/tun_flags")).unwrap_or_default();
    let flags = libc::c_int::from_str_radix(flags.trim().trim_start_matches("0x"), 16).unwrap_or_default();
    flags & libc::IFF_MULTI_QUEUE != 0
}

/// Asks for everything, then for less: kernels refuse the whole set when they do not know one flag.
fn negotiate(file: BorrowedFd<'_>) -> Offloads {
    const TCP: libc::c_uint = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6;
    const UDP: libc::c_uint = libc::TUN_F_USO4 | libc::TUN_F_USO6;
    let ladder = [
        (TCP | UDP, Offloads { checksum: true, tcp: true, udp: true }),
        (TCP, Offloads { checksum: true, tcp: true, udp: false }),
        (libc::TUN_F_CSUM, Offloads { checksum: true, tcp: false, udp: false }),
    ];
    for (flags, offloads) in ladder {
        // SAFETY: TUNSETOFFLOAD takes its argument by value and keeps no pointer; the descriptor is open.
        #[expect(unsafe_code, reason = "ioctl has no safe form")]
        let result =
            unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(flags)) };
        if result == 0 {
            return offloads;
        }
    }
    Offloads { checksum: false, tcp: false, udp: false }
}

/// The kernel's `struct ifreq`, all zeroes but for what was set.
struct Request(libc::ifreq);

impl Request {
    fn empty() -> Self {
        // SAFETY: `ifreq` is plain old data of integers, arrays and a union of such; all zeroes is a valid value.
        #[expect(unsafe_code, reason = "a C struct with a union has no safe constructor")]
        Self(unsafe { MaybeUninit::zeroed().assume_init() })
    }

    /// `None` when the name does not fit with its closing zero byte.
    fn named(name: &str) -> Option<Self> {
        let mut request = Self::empty();
        if name.len() >= request.0.ifr_name.len() {
            return None;
        }
        for (to, from) in request.0.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from.cast_signed();
        }
        Some(request)
    }

    /// Runs a request that takes a `struct ifreq`: TUNSETIFF, TUNGETIFF, SIOCGIFMTU, SIOCSIFMTU.
    fn call(&mut self, descriptor: BorrowedFd<'_>, number: libc::Ioctl) -> io::Result<()> {
        // SAFETY: the callers pass only requests that read or write one `struct ifreq`, which `self.0` is; the kernel
        // keeps no pointer to it.
        #[expect(unsafe_code, reason = "ioctl has no safe form")]
        let result = unsafe { libc::ioctl(descriptor.as_raw_fd(), number, &raw mut self.0) };
        Errno::result(result)?;
        Ok(())
    }
}

fn set_int(descriptor: BorrowedFd<'_>, number: libc::Ioctl, value: &libc::c_int) -> io::Result<()> {
    // SAFETY: the one request used, TUNSETVNETHDRSZ, reads one `int` through the pointer and keeps none.
    #[expect(unsafe_code, reason = "ioctl has no safe form")]
    let result = unsafe { libc::ioctl(descriptor.as_raw_fd(), number, std::ptr::from_ref(value)) };
    Errno::result(result)?;
    Ok(())
}

/// Becomes readable when any link of the namespace it was made in changes. What changed is then asked of the device.
#[derive(Debug)]
pub struct LinkWatch(Socket);

impl LinkWatch {
    /// Starts watching.
    ///
    /// # Errors
    /// What the system says.
    pub fn new() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind(&SocketAddr::new(0, libc::RTMGRP_LINK.cast_unsigned()))?;
        socket.set_non_blocking(true)?;
        Ok(Self(socket))
    }

    /// Takes all pending notices; returns whether there were any. An overflow counts as one.
    ///
    /// # Errors
    /// What the system says, other than that there is nothing.
    pub fn drain(&self) -> io::Result<bool> {
        let mut any = false;
        let mut buffer = bytes_buffer();
        loop {
            match self.0.recv(&mut &mut buffer[..], 0) {
                Ok(_length) => any = true,
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => any = true,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(any),
                Err(error) => return Err(error),
            }
        }
    }
}

/// Longer notices are cut, which does no harm: only their arrival counts.
fn bytes_buffer() -> [u8; 512] {
    [0; 512]
}

impl AsFd for LinkWatch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the socket owns this descriptor and lives as long as the borrow of `self`.
        #[expect(unsafe_code, reason = "netlink_sys::Socket only has AsRawFd")]
        unsafe {
            BorrowedFd::borrow_raw(self.0.as_raw_fd())
        }
    }
}
