//! The threads from the peers to the TUN device. Each has sockets of its own, among which the kernel shares out the
//! peers.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::Range;
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use boringtun::noise::TunnResult;
use mesh_sys::tun::{Coalescer, Tun, steer};
use mesh_sys::udp::{Destination, Piece, ReceiveBatch, SendBatch, Sockets, UdpSocket};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;

use crate::counters::DropReason;
use crate::device::Device;
use crate::handshake::{self, COOKIE, COOKIE_LEN, DATA, INITIATION, INITIATION_LEN, RESPONSE, RESPONSE_LEN};
use crate::peer::Peer;
use crate::session::{HEADER_LEN, OVERHEAD};
use crate::tunnel::{Received, Refused, word};

/// Pieces of up to 64 KiB per system call.
const SLOTS: usize = 8;
/// Calls per socket before the other one has its turn.
const TURNS: usize = 4;
/// Answers to handshakes, and packets that waited for one.
const BATCH: usize = 512 << 10;

/// Messages of one session in a run, mostly: what one piece holds.
const RUN: usize = 64;

/// Pause after a failure that would otherwise repeat at once.
const RELIEF: Duration = Duration::from_millis(100);

/// The body of thread `number`. Ends when it is asked to.
pub(crate) fn run(device: &Device, tun: &Tun, number: usize) -> io::Result<()> {
    let mut receive = ReceiveBatch::new(SLOTS);
    let mut inbound = Inbound {
        device,
        number,
        tun,
        coalescer: Coalescer::new(tun.offloads().udp),
        run: Vec::with_capacity(RUN),
        places: Vec::with_capacity(RUN),
        batch: SendBatch::new(BATCH),
        refused: false,
    };
    while !device.is_stopping() {
        // Sockets may have been replaced; the old ones are closed when the last thread lets go.
        let group = device.sockets();
        let sockets = group.as_ref().map(|group| group.of(number));
        wait(&device.wake_inbound[number], sockets)?;
        for socket in sockets.into_iter().flat_map(Sockets::iter) {
            inbound.drain(&mut receive, socket);
        }
    }
    Ok(())
}

/// Sleeps until a socket or the device has something.
fn wait(wake: &EventFd, sockets: Option<&Sockets>) -> io::Result<()> {
    // Unused places name the first descriptor once more.
    let mut fds = [(); 3].map(|()| PollFd::new(wake.as_fd(), PollFlags::POLLIN));
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
        match wake.read() {
            Ok(_) | Err(Errno::EAGAIN) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

struct Inbound<'a> {
    device: &'a Device,
    /// Of the thread.
    number: usize,
    tun: &'a Tun,
    coalescer: Coalescer,
    /// Messages of one session that were opened, and where in the memory they lie; reused.
    run: Vec<Received>,
    places: Vec<Range<usize>>,
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
            let (pieces, data) = receive.parts();
            for piece in pieces {
                self.take(piece, data, now);
            }
            self.write(data);
            self.device.send(self.number, &mut self.batch);
        }
    }

    fn take(&mut self, piece: &Piece, data: &mut [u8], now: Instant) {
        let from = Destination {
            address: piece.from,
            source: piece.to.filter(|to| to.address.is_ipv4() == piece.from.is_ipv4()),
        };
        let mut datagrams = piece.datagrams().peekable();
        while let Some(first) = datagrams.next() {
            let Some(index) = data_index(&data[first.clone()]) else {
                self.take_handshake(&data[first], &from, now);
                continue;
            };
            let Some((peer, session)) = self.device.indices.session(index) else {
                self.device.counters.count(DropReason::UnknownDatagram);
                continue;
            };
            // A run of messages of one session is opened without any lock, and accounted for with one.
            let mut next = Some(first);
            while let Some(place) = next {
                match session.open(&mut data[place.clone()]) {
                    Ok((counter, length)) => {
                        let message = place.len();
                        self.run.push(Received { counter, length: message, data: length > 0, fresh: false });
                        self.places.push(place.start + HEADER_LEN..place.start + HEADER_LEN + length);
                    }
                    Err(_) => self.device.counters.count(DropReason::NotAuthentic),
                }
                next = datagrams.next_if(|next| data_index(&data[next.clone()]) == Some(index));
            }
            let noticed = peer.tunnel().receive(&session, &from, now, &mut self.run, &mut self.batch);
            if let Err(reason) = noticed {
                tracing::trace!(peer = %peer.key, %reason, "data messages dropped");
            }
            self.collect(&peer, data);
            self.device.timers.arm(&peer);
        }
    }

    /// Has the packets of a run written, if they are from an address of their peer.
    fn collect(&mut self, peer: &Arc<Peer>, data: &[u8]) {
        let allowed = self.device.allowed();
        let mut last_source = None;
        for (message, place) in self.run.drain(..).zip(self.places.drain(..)) {
            if !message.fresh {
                self.device.counters.count(DropReason::NotAuthentic);
                continue;
            }
            if !message.data {
                continue;
            }
            let Some((source, length)) = source_and_length(&data[place.clone()]) else {
                self.device.counters.count(DropReason::MalformedPacket);
                continue;
            };
            if last_source != Some(source) {
                if !allowed.lookup(source).is_some_and(|owner| Arc::ptr_eq(owner, peer)) {
                    tracing::debug!(peer = %peer.key, %source, "packet with a foreign source address dropped");
                    self.device.counters.count(DropReason::ForeignSource);
                    continue;
                }
                last_source = Some(source);
            }
            self.coalescer.push(data, place.start..place.start + length);
        }
    }

    fn take_handshake(&mut self, message: &[u8], from: &Destination, now: Instant) {
        if !self.batch.has_space(BATCH / 2) {
            self.device.send(self.number, &mut self.batch);
        }
        let result = match (word(message, 0), message.len()) {
            (Some(INITIATION), INITIATION_LEN) => self.take_initiation(message, from, now),
            (Some(RESPONSE), RESPONSE_LEN) => self.take_response(message, from, now),
            (Some(COOKIE), COOKIE_LEN) => self.take_cookie(message, now),
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
        let mut message: [u8; INITIATION_LEN] = message.try_into().map_err(|_| Refused::NotAuthentic)?;
        let claimed = handshake::read_initiation(&keys, &mut message).map_err(|_| Refused::NotAuthentic)?;
        let peer = self.device.peer(&claimed.sender).ok_or(Refused::UnknownIndex)?;
        peer.tunnel().handle_initiation(claimed, from, now, &mut self.batch)?;
        self.device.timers.arm(&peer);
        Ok(())
    }

    fn take_response(&mut self, message: &[u8], from: &Destination, now: Instant) -> Result<(), Refused> {
        let keys = self.device.local().ok_or(Refused::NoKey)?;
        if !self.passes(&keys, message, from)? {
            return Ok(());
        }
        let index = word(message, 8).ok_or(Refused::NotAuthentic)?;
        let peer = self.device.indices.peer(index).ok_or(Refused::UnknownIndex)?;
        peer.tunnel().handle_response(message, from, now, &mut self.batch)?;
        self.device.timers.arm(&peer);
        Ok(())
    }

    fn take_cookie(&mut self, message: &[u8], now: Instant) -> Result<(), Refused> {
        let index = word(message, 4).ok_or(Refused::NotAuthentic)?;
        let peer = self.device.indices.peer(index).ok_or(Refused::UnknownIndex)?;
        peer.tunnel().handle_cookie(message, now)
    }

    /// Writes what has been collected, each flow to its queue.
    fn write(&mut self, data: &mut [u8]) {
        let queues = self.tun.queues();
        for packet in self.coalescer.finish(data) {
            let queue = steer(&data[packet.pieces[0].clone()], queues.len());
            match queues[queue].write(&packet, data) {
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
    }
}

/// The receiver index of a data message.
fn data_index(message: &[u8]) -> Option<u32> {
    if message.len() < OVERHEAD || word(message, 0)? != DATA {
        return None;
    }
    word(message, 4)
}

/// Source and length of a packet that may be followed by padding.
fn source_and_length(packet: &[u8]) -> Option<(IpAddr, usize)> {
    let length = |at: usize| Some(usize::from(u16::from_be_bytes([*packet.get(at)?, *packet.get(at + 1)?])));
    let (source, length) = match packet.first()? >> 4 {
        4 if packet.len() >= 20 => {
            let octets: [u8; 4] = packet[12..16].try_into().ok()?;
            (Ipv4Addr::from(octets).into(), length(2).filter(|length| *length >= 20)?)
        }
        6 if packet.len() >= 40 => {
            let octets: [u8; 16] = packet[8..24].try_into().ok()?;
            (Ipv6Addr::from(octets).into(), length(4)? + 40)
        }
        _ => return None,
    };
    (length <= packet.len()).then_some((source, length))
}
