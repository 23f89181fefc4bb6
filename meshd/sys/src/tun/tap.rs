//! A device of whole Ethernet frames, for links that we make ourselves.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, BorrowedFd};

use super::device::{TunError, attach};

/// A TAP device held by this process, with which it goes away.
///
/// It has no offloads: the kernel cuts every packet to the device's MTU and completes its checksums before it is read
/// here, and takes only such frames.
#[derive(Debug)]
pub struct Tap(File);

impl Tap {
    /// Makes the device `name`, in the namespace of the calling thread. Reads do not block.
    ///
    /// # Errors
    /// [`TunError`] names the likely cause. No device was made.
    pub fn create(name: &str) -> Result<Self, TunError> {
        attach(name, libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_TUN_EXCL).map(Self)
    }

    /// Reads one frame, from its Ethernet header on, and returns its length.
    ///
    /// # Errors
    /// `WouldBlock` when there is none; what the system says when the device is gone.
    pub fn read(&self, frame: &mut [u8]) -> io::Result<usize> {
        (&self.0).read(frame)
    }

    /// Writes one frame: the kernel takes it as received by the device.
    ///
    /// # Errors
    /// What the system says: `EIO` when the device is down, `EINVAL` when it is no frame.
    pub fn write(&self, frame: &[u8]) -> io::Result<()> {
        (&self.0).write(frame).map(drop)
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
