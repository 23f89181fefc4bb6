//! The thread from the TUN device to the peers.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsFd as _;
use std::sync::atomic::Ordering;
use std::time::Instant;

use mesh_sys::tun::{Tun, VnetHeader, segment};
use mesh_sys::udp::SendBatch;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::counters::DropReason;
use crate::device::Device;
use crate::tunnel::{OVERHEAD, Sealed};

/// Longest packet or superpacket: an IPv6 header and 65,535 bytes behind it.
const LONGEST_PACKET: usize = 65_575;
/// Bytes sealed before they are sent: a few superpackets. More would fall out of the second-level cache.
const BATCH: usize = 256 << 10;
/// Data messages are padded to a multiple of this (paper, section 5.4.6).
const PADDING: usize = 16;

/// Why the thread ended.
#[derive(Debug)]
pub(crate) enum Ended {
    /// It was asked to.
    Stopped,
    /// The interface was deleted.
    DeviceGone,
}

/// The thread's body.
pub(crate) fn run(device: &Device, tun: &Tun) -> io::Result<Ended> {
    let mut outbound = Outbound {
        device,
        packet: vec![0; LONGEST_PACKET].into_boxed_slice(),
        segment: vec![0; LONGEST_PACKET + PADDING].into_boxed_slice(),
        batch: SendBatch::new(BATCH),
    };
    loop {
        let mut fds = [
            PollFd::new(tun.as_fd(), PollFlags::POLLIN),
            PollFd::new(device.wake_outbound.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) => {}
            Err(Errno::EINTR) => continue,
            Err(error) => return Err(error.into()),
        }
        if device.is_stopping() {
            return Ok(Ended::Stopped);
        }
        if let Err(error) = outbound.drain(tun) {
            // EBADFD: deleted. EFAULT: being deleted, or its queue is detached.
            if tun.name().is_err() {
                return Ok(Ended::DeviceGone);
            }
            tracing::debug!(%error, "reading from the TUN device failed");
            // An interface that is neither readable nor gone must not make this loop spin.
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
    }
}

struct Outbound<'a> {
    device: &'a Device,
    packet: Box<[u8]>,
    segment: Box<[u8]>,
    batch: SendBatch,
}

impl Outbound<'_> {
    /// Reads and sends until the device has no more.
    fn drain(&mut self, tun: &Tun) -> io::Result<()> {
        let result = loop {
            match tun.read(&mut self.packet) {
                Ok((header, length)) => self.take(&header, length),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => break Err(error),
            }
        };
        self.device.send(&mut self.batch);
        result
    }

    fn take(&mut self, header: &VnetHeader, length: usize) {
        let device = self.device;
        let packet = &self.packet[..length];
        let Some(destination) = destination(packet) else {
            device.counters.count(DropReason::MalformedPacket);
            return;
        };
        let Some(peer) = device.allowed().lookup(destination).cloned() else {
            device.counters.count(DropReason::NoPeer);
            tracing::trace!(%destination, "no peer owns this address");
            return;
        };
        let mut segments = match segment(header, packet) {
            Ok(segments) => segments,
            Err(error) => {
                device.counters.count(DropReason::MalformedPacket);
                tracing::debug!(%error, ?header, "packet from the TUN device dropped");
                return;
            }
        };
        let mtu = device.mtu.load(Ordering::Relaxed) as usize;
        let room = segments.max_len() + PADDING + OVERHEAD;
        let now = Instant::now();
        let mut more = true;
        while more {
            if !self.batch.has_space(room) {
                device.send(&mut self.batch);
            }
            let mut tunnel = peer.tunnel();
            while self.batch.has_space(room) {
                let Some(length) = segments.write_next(&mut self.segment) else {
                    more = false;
                    break;
                };
                let padded = length.next_multiple_of(PADDING).min(mtu.max(length));
                self.segment[length..padded].fill(0);
                match tunnel.seal(&self.segment[..padded], now, &mut self.batch) {
                    Sealed::Sent | Sealed::Staged => {}
                    Sealed::NoEndpoint => device.counters.count(DropReason::NoEndpoint),
                    Sealed::BatchFull => {
                        // Staged packets took the room; they go first.
                        drop(tunnel);
                        device.send(&mut self.batch);
                        tunnel = peer.tunnel();
                        if tunnel.seal(&self.segment[..padded], now, &mut self.batch) == Sealed::BatchFull {
                            device.counters.count(DropReason::SendFailed);
                        }
                    }
                }
            }
        }
        device.timers.arm(&peer);
    }
}

fn destination(packet: &[u8]) -> Option<IpAddr> {
    match packet.first()? >> 4 {
        4 => {
            let octets: [u8; 4] = packet.get(16..20)?.try_into().ok()?;
            Some(Ipv4Addr::from(octets).into())
        }
        6 => {
            let octets: [u8; 16] = packet.get(24..40)?.try_into().ok()?;
            Some(Ipv6Addr::from(octets).into())
        }
        _ => None,
    }
}
