//! Switching offloads of a network device, as `ethtool -K` does.

use std::mem::MaybeUninit;
use std::os::fd::AsRawFd as _;

use nix::errno::Errno;

use super::Namespace;

/// An offload, by the two commands that read and set it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Offload {
    /// Received checksums.
    Receive = 0x14,
    /// Checksums left to the device; without it there is no segmentation by the device either.
    Transmit = 0x16,
    /// Packets in several pieces of memory.
    ScatterGather = 0x18,
    /// TCP superpackets handed to the device.
    Tcp = 0x1e,
    /// Superpackets inside of the kernel.
    Segmentation = 0x23,
    /// Joining what is received.
    Coalescing = 0x2b,
}

/// `struct ethtool_value`.
#[repr(C)]
struct Value {
    command: u32,
    data: u32,
}

/// Switches an offload of an interface in `namespace`, and checks that it is as wished.
pub fn set(namespace: &Namespace, interface: &str, offload: Offload, on: bool) {
    namespace.inside(|| {
        let read = offload as u32;
        call(interface, Value { command: read + 1, data: on.into() });
        let now = call(interface, Value { command: read, data: 0 });
        assert_eq!(now != 0, on, "{offload:?} of {interface}");
    });
}

/// Runs one command and returns the value in its answer.
fn call(interface: &str, mut value: Value) -> u32 {
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    // SAFETY: `ifreq` is plain old data, for which all zeroes is a valid value.
    #[expect(unsafe_code, reason = "a C struct with a union has no safe constructor")]
    let mut request: libc::ifreq = unsafe { MaybeUninit::zeroed().assume_init() };
    assert!(interface.len() < request.ifr_name.len());
    for (to, from) in request.ifr_name.iter_mut().zip(interface.bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_data = (&raw mut value).cast();
    // SAFETY: the commands of `Offload` read and write one `struct ethtool_value`, which `value` is and which outlives
    // the call.
    #[expect(unsafe_code, reason = "ioctl has no safe form")]
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCETHTOOL, &raw mut request) };
    Errno::result(result).unwrap();
    value.data
}
