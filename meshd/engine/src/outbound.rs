//! The threads from the TUN device to the peers.
//!
//! Each thread serves some of the device's queues, in turns, one packet or superpacket of each: a flow with little to
//! send does not wait behind one with much. What they read goes segment by segment into the buffer it is sent from,
//! and is sealed there.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsFd as _;
use std::sync::atomic::Ordering;
use std::time::Instant;

use mesh_sys::tun::{Queue, Segments, Tun, VnetHeader, segment};
use mesh_sys::udp::{Destination, SendBatch};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::counters::DropReason;
use crate::device::Device;
use crate::peer::Peer;
use crate::session::{HEADER_LEN, OVERHEAD, Session};
use crate::tunnel::Reserved;

/// Longest packet or superpacket: an IPv6 header and 65,535 bytes behind it.
const LONGEST_PACKET: usize = 65_575;
/// Bytes sealed before they are sent: a few superpackets. More would fall out of the second-level cache.
const BATCH: usize = 256 << 10;
/// Data messages are padded to a multiple of this (paper, section 5.4.6).
const PADDING: usize = 16;
/// Queues that one thread serves at most.
pub(crate) const QUEUES: usize = 4;

/// Why the thread ended.
#[derive(Debug)]
pub(crate) enum Ended {
    /// It was asked to.
    Stopped,
    /// The interface was deleted.
    DeviceGone,
}

/// The body of thread `number` of `threads`.
pub(crate) fn run(device: &Device, tun: &Tun, number: usize, threads: usize) -> io::Result<Ended> {
    let queues: Vec<&Queue> = tun.queues().iter().skip(number).step_by(threads).take(QUEUES).collect();
    let mut outbound = Outbound {
        device,
        packet: vec![0; LONGEST_PACKET].into_boxed_slice(),
        padded: vec![0; LONGEST_PACKET + PADDING].into_boxed_slice(),
        sender: Sender { device, number, batch: SendBatch::new(BATCH) },
    };
    loop {
        let ready = wait(device, &queues)?;
        if device.is_stopping() {
            return Ok(Ended::Stopped);
        }
        if let Err(error) = outbound.serve(&queues, ready) {
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

/// Sleeps until a queue has something, or the device; says which queues do.
fn wait(device: &Device, queues: &[&Queue]) -> io::Result<[bool; QUEUES]> {
    let wake = || PollFd::new(device.wake_outbound.as_fd(), PollFlags::POLLIN);
    // Unused places name the last descriptor once more.
    let mut fds: [PollFd<'_>; QUEUES + 1] = std::array::from_fn(|index| match queues.get(index) {
        Some(queue) => PollFd::new(queue.as_fd(), PollFlags::POLLIN),
        None => wake(),
    });
    match poll(&mut fds[..=queues.len().min(QUEUES)], PollTimeout::NONE) {
        Ok(_) => Ok(std::array::from_fn(|index| index < queues.len() && fds[index].any().unwrap_or(true))),
        Err(Errno::EINTR) => Ok([false; QUEUES]),
        Err(error) => Err(error.into()),
    }
}

struct Outbound<'a> {
    device: &'a Device,
    packet: Box<[u8]>,
    /// A packet that has to wait for a handshake, with its padding.
    padded: Box<[u8]>,
    sender: Sender<'a>,
}

impl Outbound<'_> {
    /// Reads from the queues that are ready, in turns, until they are empty or the batch is nearly full, and sends.
    fn serve(&mut self, queues: &[&Queue], mut ready: [bool; QUEUES]) -> io::Result<()> {
        let mut result = Ok(());
        'rounds: while ready.contains(&true) && self.sender.batch.has_space(LONGEST_PACKET) {
            for (queue, ready) in queues.iter().zip(&mut ready).filter(|(_, ready)| **ready) {
                match queue.read(&mut self.packet) {
                    Ok((header, length)) => self.take(&header, length),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => *ready = false,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => {
                        result = Err(error);
                        break 'rounds;
                    }
                }
            }
        }
        self.sender.send();
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
        let padded = |length: usize| length.next_multiple_of(PADDING).min(mtu.max(length));
        let count = segments.count();
        let bytes =
            (count - 1) * (padded(segments.max_len()) + OVERHEAD) + padded(segments.last_len()) + OVERHEAD;
        let now = Instant::now();
        match self.sender.reserve(&peer, count, bytes, now) {
            Reserved::Ready { session, mut counter, to } => {
                while self.sender.seal(&mut segments, padded, &session, counter, &to) {
                    counter += 1;
                }
            }
            Reserved::Stage => {
                while let Some(length) = segments.write_next(&mut self.padded) {
                    let padded = padded(length);
                    self.padded[length..padded].fill(0);
                    peer.tunnel().stage(&self.padded[..padded], now, &mut self.sender.batch);
                }
            }
            Reserved::NoEndpoint => device.counters.count_many(DropReason::NoEndpoint, count),
            Reserved::BatchFull => device.counters.count_many(DropReason::SendFailed, count),
        }
        device.timers.arm(&peer);
    }
}

/// The way out of one thread.
struct Sender<'a> {
    device: &'a Device,
    /// Of the thread.
    number: usize,
    batch: SendBatch,
}

impl Sender<'_> {
    fn send(&mut self) {
        self.device.send(self.number, &mut self.batch);
    }

    /// As the tunnel's, and makes room in the batch if it has to.
    fn reserve(&mut self, peer: &Peer, count: usize, bytes: usize, now: Instant) -> Reserved {
        for _attempt in 0..2 {
            let reserved = peer.tunnel().reserve(count, bytes, now, &mut self.batch);
            if !matches!(reserved, Reserved::BatchFull) {
                return reserved;
            }
            // Staged packets took the room; they go first.
            self.send();
        }
        Reserved::BatchFull
    }

    /// Writes a packet into the batch and seals it there, without any lock. False when there are no more.
    fn seal(
        &mut self,
        segments: &mut Segments<'_>,
        padded: impl Fn(usize) -> usize,
        session: &Session,
        counter: u64,
        to: &Destination,
    ) -> bool {
        let room = segments.max_len() + PADDING + OVERHEAD;
        if !self.batch.has_space(room) {
            self.send();
        }
        let Some(space) = self.batch.space(room) else { return false };
        let Some(length) = segments.write_next(&mut space[HEADER_LEN..]) else { return false };
        let end = HEADER_LEN + padded(length);
        space[HEADER_LEN + length..end].fill(0);
        let message = end + OVERHEAD - HEADER_LEN;
        match session.seal(counter, &mut space[..message]) {
            Ok(()) => self.batch.commit(to, message),
            Err(_) => self.device.counters.count(DropReason::SendFailed),
        }
        true
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
