//! The thread from the peers to the TUN device.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use boringtun::noise::TunnResult;
use mesh_sys::tun::{Coalescer, Tun};
use mesh_sys::udp::{Datagrams, Destination, ReceiveBatch, SendBatch, Sockets, UdpSocket};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::counters::DropReason;
use crate::device::Device;
use crate::index::Prefix;
use crate::initiation::{self, INITIATION_LEN};
use crate::tunnel::{Opened, Refused, word};

/// Pieces of up to 64 KiB per system call.
const SLOTS: usize = 8;
/// Calls per socket before the other one has its turn.
const TURNS: usize = 4;
/// Plaintext collected before it is written: all that one call can bring.
const ARENA: usize = SLOTS * (64 << 10);
/// Answers to handshakes, and packets that waited for one.
const BATCH: usize = 512 << 10;
/// Longest plaintext of one piece of datagrams.
const PIECE: usize = 64 << 10;

/// Pause after a failure that would otherwise repeat at once.
const RELIEF: Duration = Duration::from_millis(100);

const DATA: u32 = 4;
const DATA_MIN: usize = 32;
const RESPONSE: u32 = 2;
const RESPONSE_LEN: usize = 92;
const COOKIE: u32 = 3;
const COOKIE_LEN: usize = 64;
const INITIATION: u32 = 1;

/// The thread's body. Ends when it is asked to.
pub(crate) fn run(device: &Device, tun: &Tun) -> io::Result<()> {
    let mut receive = ReceiveBatch::new(SLOTS);
    let mut inbound = Inbound {
        device,
        tun,
        arena: vec![0; ARENA + PIECE].into_boxed_slice(),
        used: 0,
        coalescer: Coalescer::new(tun.offloads().udp),
        batch: SendBatch::new(BATCH),
        refused: false,
    };
    while !device.is_stopping() {
        // Sockets may have been replaced; the old ones are closed when the last thread lets go.
        let sockets = device.sockets();
        wait(device, sockets.as_deref())?;
        for socket in sockets.iter().flat_map(|sockets| sockets.iter()) {
            inbound.drain(&mut receive, socket);
        }
    }
    Ok(())
}

/// Sleeps until a socket or the device has something.
fn wait(device: &Device, sockets: Option<&Sockets>) -> io::Result<()> {
    // Unused places name the first descriptor once more.
    let mut fds = [(); 3].map(|()| PollFd::new(device.wake_inbound.as_fd(), PollFlags::POLLIN));
    let mut count = 1;
    for socket in sockets.into_iter().flat_map(Sockets::iter) {
        fds[count] = PollFd::new(socket.as_fd(), PollFlags::POLLIN);
        count += 1;
    }
    match poll(&mut fds[..count], PollTimeout::NONE) {
        Ok(_) | Err(Errno::EINTR) => {}
        Err(error) => return Err(error.into()),
    }
    if fds[0].any().unwrap_or(false) {
        match device.wake_inbound.read() {
            Ok(_) | Err(Errno::EAGAIN) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

struct Inbound<'a> {
    device: &'a Device,
    tun: &'a Tun,
    /// Plaintext packets one behind the other.
    arena: Box<[u8]>,
    used: usize,
    coalescer: Coalescer,
    batch: SendBatch,
    /// The TUN device refused the last packet; said once.
    refused: bool,
}

impl Inbound<'_> {
    fn drain(&mut self, receive: &mut ReceiveBatch, socket: &UdpSocket) {
        for _ in 0..TURNS {
            match receive.receive(socket) {
                Ok(_count) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => {
                    // Short of memory, or an error queued for the socket: the next datagram may be fine.
                    tracing::warn!(%error, "receiving failed");
                    std::thread::sleep(RELIEF);
                    break;
                }
            }
            let now = Instant::now();
            for datagrams in receive.iter() {
                if self.used + PIECE > ARENA {
                    self.write();
                }
                self.take(&datagrams, now);
            }
            self.write();
            self.device.send(&mut self.batch);
        }
    }

    fn take(&mut self, datagrams: &Datagrams<'_>, now: Instant) {
        let from = Destination {
            address: datagrams.from,
            source: datagrams.to.filter(|to| to.address.is_ipv4() == datagrams.from.is_ipv4()),
        };
        let mut datagrams = datagrams.iter().peekable();
        while let Some(first) = datagrams.peek().copied() {
            let Some(prefix) = data_prefix(first) else {
                datagrams.next();
                self.take_handshake(first, &from, now);
                continue;
            };
            let Some(peer) = self.device.indices.peer(prefix) else {
                datagrams.next();
                self.device.counters.count(DropReason::UnknownDatagram);
                continue;
            };
            // One lock for a run of packets of one peer, which is decryption of at most 64 KiB: about 50 µs.
            let mut tunnel = peer.tunnel();
            let allowed = self.device.allowed();
            let mut last_source = None;
            while let Some(message) = datagrams.next_if(|next| data_prefix(next) == Some(prefix)) {
                let plain = &mut self.arena[self.used..];
                let length = match tunnel.open(message, &from, now, plain, &mut self.batch) {
                    Ok(Opened::Packet(length)) => length,
                    Ok(Opened::Keepalive) => continue,
                    Err(reason) => {
                        tracing::trace!(peer = %peer.key, %reason, "data message dropped");
                        self.device.counters.count(DropReason::NotAuthentic);
                        continue;
                    }
                };
                let Some(source) = source(&plain[..length]) else {
                    self.device.counters.count(DropReason::MalformedPacket);
                    continue;
                };
                if last_source != Some(source) {
                    if !allowed.lookup(source).is_some_and(|owner| Arc::ptr_eq(owner, &peer)) {
                        tracing::debug!(peer = %peer.key, %source, "packet with a foreign source address dropped");
                        self.device.counters.count(DropReason::ForeignSource);
                        continue;
                    }
                    last_source = Some(source);
                }
                let range = self.used..self.used + length;
                self.used = range.end;
                self.coalescer.push(&self.arena, range);
            }
            drop(allowed);
            drop(tunnel);
            self.device.timers.arm(&peer);
        }
    }

    fn take_handshake(&mut self, message: &[u8], from: &Destination, now: Instant) {
        if !self.batch.has_space(BATCH / 2) {
            self.device.send(&mut self.batch);
        }
        let result = match (word(message, 0), message.len()) {
            (Some(INITIATION), INITIATION_LEN) => self.take_initiation(message, from, now),
            (Some(RESPONSE), RESPONSE_LEN) => self.take_response(message, from, now),
            (Some(COOKIE), COOKIE_LEN) => self.take_cookie(message),
            _ => Err(Refused::UnknownIndex),
        };
        if let Err(reason) = result {
            tracing::debug!(endpoint = %from.address, %reason, "handshake message dropped");
            self.device.counters.count(match reason {
                Refused::UnknownIndex | Refused::NoKey => DropReason::UnknownDatagram,
                Refused::BatchFull => DropReason::SendFailed,
                Refused::Expired | Refused::Replayed | Refused::NotAuthentic | Refused::Flood => {
                    DropReason::NotAuthentic
                }
            });
        }
    }

    /// Checks MAC1, and MAC2 under load. False when the sender was sent a cookie instead.
    fn passes(
        &mut self,
        keys: &crate::keys::LocalKeys,
        message: &[u8],
        from: &Destination,
    ) -> Result<bool, Refused> {
        // Does nothing but once a second.
        keys.limiter.reset_count();
        let space = self.batch.space(COOKIE_LEN).ok_or(Refused::BatchFull)?;
        match keys.limiter.verify_packet(Some(from.address.ip()), message, space) {
            Ok(_) => Ok(true),
            Err(TunnResult::WriteToNetwork(cookie)) => {
                let length = cookie.len();
                self.batch.commit(from, length);
                tracing::debug!(endpoint = %from.address, "under load: sent a cookie");
                Ok(false)
            }
            Err(_) => Err(Refused::NotAuthentic),
        }
    }

    fn take_initiation(&mut self, message: &[u8], from: &Destination, now: Instant) -> Result<(), Refused> {
        let keys = self.device.local().ok_or(Refused::NoKey)?;
        if !self.passes(&keys, message, from)? {
            return Ok(());
        }
        let claimed = initiation::claimed(&keys, message).map_err(|_| Refused::NotAuthentic)?;
        let peer = self.device.peer(&claimed.sender).ok_or(Refused::UnknownIndex)?;
        peer.tunnel().handle_initiation(claimed, message, from, now, &mut self.batch)?;
        self.device.timers.arm(&peer);
        Ok(())
    }

    fn take_response(&mut self, message: &[u8], from: &Destination, now: Instant) -> Result<(), Refused> {
        let keys = self.device.local().ok_or(Refused::NoKey)?;
        if !self.passes(&keys, message, from)? {
            return Ok(());
        }
        let prefix = Prefix::of(word(message, 8).ok_or(Refused::NotAuthentic)?);
        let peer = self.device.indices.peer(prefix).ok_or(Refused::UnknownIndex)?;
        peer.tunnel().handle_response(message, from, now, &mut self.batch)?;
        self.device.timers.arm(&peer);
        Ok(())
    }

    fn take_cookie(&mut self, message: &[u8]) -> Result<(), Refused> {
        let prefix = Prefix::of(word(message, 4).ok_or(Refused::NotAuthentic)?);
        let peer = self.device.indices.peer(prefix).ok_or(Refused::UnknownIndex)?;
        peer.tunnel().handle_cookie(message)
    }

    /// Writes what has been collected.
    fn write(&mut self) {
        for packet in self.coalescer.finish(&mut self.arena) {
            match self.tun.write(&packet, &self.arena) {
                Ok(()) => self.refused = false,
                Err(error) => {
                    self.device.counters.count_many(DropReason::TunRefused, packet.pieces.len());
                    // EIO: the interface is down, as it is between being made and `ip link set up`.
                    if !std::mem::replace(&mut self.refused, true) {
                        tracing::debug!(%error, header = ?packet.header, "the TUN device refused a packet");
                    }
                }
            }
        }
        self.coalescer.clear();
        self.used = 0;
    }
}

fn data_prefix(message: &[u8]) -> Option<Prefix> {
    if message.len() < DATA_MIN || word(message, 0)? != DATA {
        return None;
    }
    Some(Prefix::of(word(message, 4)?))
}

/// The source of a packet whose header is complete.
fn source(packet: &[u8]) -> Option<IpAddr> {
    match packet.first()? >> 4 {
        4 if packet.len() >= 20 => {
            let octets: [u8; 4] = packet[12..16].try_into().ok()?;
            Some(Ipv4Addr::from(octets).into())
        }
        6 if packet.len() >= 40 => {
            let octets: [u8; 16] = packet[8..24].try_into().ok()?;
            Some(Ipv6Addr::from(octets).into())
        }
        _ => None,
    }
}
