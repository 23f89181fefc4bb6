//! The UDP port of the control plane: gossip, and WireGuard's datagrams that are passed on for others.
//!
//! One thread receives, in batches. What begins like WireGuard goes to the [relay](mesh_core::relay) and leaves from there
//! in batches too; the rest is the node's.

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use mesh_core::node::Input;
use mesh_core::relay::{Dropped, Endpoint, Limits, Relay, is_wireguard};
use mesh_core::time::Time;
use mesh_keys::frame::MAX_LONG_DATAGRAM;
use mesh_sys::udp::{Destination, Piece, ReceiveBatch, SendBatch, Sockets, Source, UdpSocket};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use socket2::SockRef;
use tokio::sync::mpsc;

/// Pieces of up to 64 KiB in one system call.
const SLOTS: usize = 16;

/// Calls for one socket before the other one has its turn.
const TURNS: usize = 4;

/// Room for what is passed on of one call.
const BATCH: usize = SLOTS * 65_536;

/// Pause between two times at which the relay forgets what is over.
const TIDY: Duration = Duration::from_secs(5);

/// Datagrams that wait for the node, and for how long at most. Answers to older ones would come too late for whoever waits
/// for them: a node that cannot keep up would be busy with what is over, and all that it says would be late too.
const QUEUE: usize = 4096;
const STALE: Duration = Duration::from_millis(500);

/// Pause after a failure that would otherwise repeat at once.
const RELIEF: Duration = Duration::from_millis(100);

/// The port, of both families, as far as the host has them. Clones share it; with the last one it is closed.
#[derive(Clone, Debug)]
pub struct Datagrams(Arc<Port>);

#[derive(Debug)]
struct Port {
    sockets: Sockets,
    relay: Mutex<Relay>,
    counters: Counters,
}

/// What became of datagrams that are none of the node's.
#[derive(Debug, Default)]
pub struct Counters {
    /// Passed on.
    pub passed_on: AtomicU64,
    /// Bytes in these.
    pub passed_on_bytes: AtomicU64,
    /// Not passed on, by reason.
    dropped: [AtomicU64; Dropped::ALL.len()],
    /// Refused by the kernel.
    pub send_failed: AtomicU64,
    /// For the node, which did not get to them in time.
    pub stale: AtomicU64,
}

impl Counters {
    /// Datagrams that were dropped for that reason.
    #[must_use]
    pub fn dropped(&self, reason: Dropped) -> u64 {
        self.dropped[reason as usize].load(Ordering::Relaxed)
    }
}

/// The datagrams that are the node's.
#[derive(Debug)]
pub struct Incoming {
    queue: mpsc::Receiver<(Time, Input)>,
    port: Datagrams,
    _thread: Option<Receiver>,
}

impl Incoming {
    /// What a test puts into a queue.
    #[cfg(test)]
    pub(crate) fn of(queue: mpsc::Receiver<(Time, Input)>) -> Self {
        Self { queue, port: Datagrams::bind(0, Time::ZERO).unwrap(), _thread: None }
    }

    /// The next one that has not waited for too long by `clock`; none when the thread that receives has failed. Can be
    /// dropped and called again without losing anything.
    pub async fn next(&mut self, clock: impl Fn() -> Time) -> Option<Input> {
        loop {
            let (received, input) = self.queue.recv().await?;
            if clock().since(received) < STALE {
                return Some(input);
            }
            self.port.counters().stale.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// A thread that receives. It ends when this is dropped.
#[derive(Debug)]
struct Receiver {
    stop: Arc<EventFd>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Drop for Receiver {
    fn drop(&mut self) {
        if let Err(error) = self.stop.write(1) {
            return tracing::error!(%error, "the thread that receives datagrams could not be stopped");
        }
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the thread that receives datagrams had panicked");
        }
    }
}

impl Datagrams {
    /// Binds the port on all addresses.
    ///
    /// # Errors
    /// Those of the kernel; the port is taken, most likely.
    pub fn bind(port: u16, now: Time) -> io::Result<Self> {
        let sockets = Sockets::bind(port)?;
        // What is passed on for others is as long as they make it.
        sockets.allow_fragments()?;
        let relay = Mutex::new(Relay::new(Limits::default(), now));
        Ok(Self(Arc::new(Port { sockets, relay, counters: Counters::default() })))
    }

    /// The port in use.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.0.sockets.port()
    }

    /// The relay: whom it serves.
    pub fn relay(&self) -> MutexGuard<'_, Relay> {
        self.0.relay.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the relay has done.
    #[must_use]
    pub fn counters(&self) -> &Counters {
        &self.0.counters
    }

    /// Begins to receive: what is passed on is passed on, everything else is the node's. When that does not keep up, datagrams
    /// are dropped.
    ///
    /// # Errors
    /// Those of the kernel.
    pub fn receive(&self, clock: impl Fn() -> Time + Send + 'static) -> io::Result<Incoming> {
        let (node, queue) = mpsc::channel(QUEUE);
        let stop = Arc::new(EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?);
        let (port, stopped) = (self.clone(), Arc::clone(&stop));
        let thread = std::thread::Builder::new().name("datagrams".to_owned()).spawn(move || {
            let mut receiving = Receiving { port: &port, node: &node, batch: SendBatch::new(BATCH) };
            if let Err(error) = receiving.run(&stopped, clock) {
                tracing::error!(%error, "no datagrams are received any more");
            }
        })?;
        let thread = Some(Receiver { stop, thread: Some(thread) });
        Ok(Incoming { queue, port: self.clone(), _thread: thread })
    }

    /// Sends a datagram, if that is possible at once.
    pub fn send(&self, to: SocketAddr, bytes: &[u8]) {
        let Some(socket) = self.0.sockets.for_address(to.ip()) else { return };
        // Not by way of the runtime, which would have to be told first that there is room.
        if let Err(error) =
            SockRef::from(socket).send_to_with_flags(bytes, &to.into(), nix::libc::MSG_DONTWAIT)
        {
            tracing::trace!(%to, %error, "datagram not sent");
        }
    }
}

struct Receiving<'a> {
    port: &'a Datagrams,
    node: &'a mpsc::Sender<(Time, Input)>,
    batch: SendBatch,
}

impl Receiving<'_> {
    fn run(&mut self, stop: &EventFd, clock: impl Fn() -> Time) -> io::Result<()> {
        let mut receive = ReceiveBatch::new(SLOTS);
        let mut tidied = clock();
        loop {
            let sockets = &self.port.0.sockets;
            // Unused places name the first descriptor once more.
            let mut fds = [(); 3].map(|()| PollFd::new(stop.as_fd(), PollFlags::POLLIN));
            let mut count = 1;
            for socket in sockets.iter() {
                fds[count] = PollFd::new(socket.as_fd(), PollFlags::POLLIN);
                count += 1;
            }
            match poll(&mut fds[..count], PollTimeout::try_from(TIDY).unwrap_or(PollTimeout::MAX)) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
            if fds[0].any().unwrap_or(true) {
                return Ok(());
            }
            for socket in sockets.iter() {
                self.drain(&mut receive, socket, &clock);
            }
            let now = clock();
            if now.since(tidied) >= TIDY {
                tidied = now;
                self.port.relay().expire(now);
            }
        }
    }

    fn drain(&mut self, receive: &mut ReceiveBatch, socket: &UdpSocket, clock: &impl Fn() -> Time) {
        for _ in 0..TURNS {
            match receive.receive(socket) {
                Ok(_count) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => {
                    // Short of memory, or an error queued for the socket: the next datagram may be fine.
                    tracing::warn!(%error, "receiving datagrams failed");
                    std::thread::sleep(RELIEF);
                    break;
                }
            }
            let now = clock();
            let (pieces, data) = receive.parts();
            let port = self.port;
            let mut relay = None;
            for piece in pieces {
                // Of one sender, and the kernel joins what it has to say to the relay and to the node.
                for place in piece.datagrams() {
                    let datagram = &data[place];
                    if is_wireguard(datagram) {
                        self.pass_on(relay.get_or_insert_with(|| port.relay()), piece.from, datagram, now);
                    } else {
                        self.hand_over(piece, datagram, now);
                    }
                }
            }
            drop(relay);
            self.send();
        }
    }

    /// Puts a datagram into the batch, if it goes on to somebody.
    fn pass_on(&mut self, relay: &mut Relay, from: SocketAddr, datagram: &[u8], now: Time) {
        let counters = &self.port.0.counters;
        let from = relay.source(&from).ok_or(Dropped::Stranger);
        match from.and_then(|from| relay.route(from, datagram, now)) {
            Ok(to) => {
                if !self.batch.has_space(datagram.len()) {
                    self.send();
                }
                if let Some(space) = self.batch.space(datagram.len()) {
                    space.copy_from_slice(datagram);
                    self.batch.commit(&destination(to), datagram.len());
                    counters.passed_on.fetch_add(1, Ordering::Relaxed);
                    counters.passed_on_bytes.fetch_add(datagram.len() as u64, Ordering::Relaxed);
                }
            }
            Err(reason) => {
                counters.dropped[reason as usize].fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    fn hand_over(&self, piece: &Piece, datagram: &[u8], now: Time) {
        // Longer ones are nobody's.
        if datagram.len() > MAX_LONG_DATAGRAM {
            return;
        }
        let to = piece.to.map(|source| source.address);
        let input = Input::Datagram { from: piece.from, to, bytes: datagram.to_vec() };
        if self.node.try_send((now, input)).is_err() {
            self.port.counters().stale.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn send(&mut self) {
        if self.batch.is_empty() {
            return;
        }
        let report = self.batch.send(&self.port.0.sockets);
        let counters = &self.port.0.counters;
        counters.send_failed.fetch_add(report.dropped as u64, Ordering::Relaxed);
        if let Some(error) = report.io_error() {
            tracing::debug!(%error, dropped = report.dropped, "datagrams could not be passed on");
        }
    }
}

fn destination(to: Endpoint) -> Destination {
    Destination { address: to.remote, source: to.local.map(|address| Source { address, interface: 0 }) }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use mesh_keys::WgPublic;

    use super::*;

    fn bound() -> Datagrams {
        Datagrams::bind(0, Time::ZERO).unwrap()
    }

    async fn next(incoming: &mut Incoming) -> Option<Input> {
        incoming.next(|| Time::ZERO).await
    }

    #[tokio::test]
    async fn both_families_come_and_go_and_what_is_too_long_does_not() {
        let here = bound();
        let mut input = here.receive(|| Time::ZERO).unwrap();
        for family in ["127.0.0.1", "::1"] {
            let there = bound();
            let mut answers = there.receive(|| Time::ZERO).unwrap();
            let from = SocketAddr::new(family.parse().unwrap(), there.port());
            let to = SocketAddr::new(from.ip(), here.port());
            there.send(to, &[7; MAX_LONG_DATAGRAM + 1]);
            there.send(to, &[9; MAX_LONG_DATAGRAM]);
            let received = tokio::time::timeout(Duration::from_secs(5), next(&mut input)).await.unwrap();
            let Some(Input::Datagram { from: seen, to: Some(to), bytes }) = received else {
                panic!("{received:?}")
            };
            assert_eq!((seen, to, bytes), (from, from.ip(), vec![9; MAX_LONG_DATAGRAM]));
            here.send(from, b"answer");
            let answer = tokio::time::timeout(Duration::from_secs(5), next(&mut answers)).await.unwrap();
            assert!(matches!(answer, Some(Input::Datagram { bytes, .. }) if bytes == b"answer"));
        }
    }

    #[tokio::test]
    async fn what_has_waited_for_too_long_is_dropped_and_counted() {
        let (here, there) = (bound(), bound());
        let mut input = here.receive(|| Time::ZERO).unwrap();
        let to = SocketAddr::from((Ipv4Addr::LOCALHOST, here.port()));
        there.send(to, b"first");
        let late = tokio::time::timeout(Duration::from_millis(500), input.next(|| Time::ZERO + STALE)).await;
        assert!(late.is_err(), "{late:?}");
        there.send(to, b"second");
        let received = tokio::time::timeout(Duration::from_secs(5), next(&mut input)).await.unwrap();
        assert!(matches!(received, Some(Input::Datagram { bytes, .. }) if bytes == b"second"));
        assert_eq!(here.counters().stale.load(Ordering::Relaxed), 1);
    }

    #[tokio::test]
    async fn the_thread_ends_with_what_it_receives_for() {
        let here = bound();
        let mut input = here.receive(|| Time::ZERO).unwrap();
        input._thread = None;
        assert!(next(&mut input).await.is_none());
    }

    #[tokio::test]
    async fn what_looks_like_wireguard_is_the_relays_and_never_the_nodes() {
        let here = bound();
        let mut input = here.receive(|| Time::ZERO).unwrap();
        let (known, stranger) = (bound(), bound());
        let at = |port: u16| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let endpoint = Endpoint { remote: at(known.port()), local: None };
        here.relay().register(WgPublic::from_bytes([1; 32]), endpoint, 0, Time::ZERO).unwrap();
        let mut data = [0; 32];
        data[0] = 4;
        stranger.send(at(here.port()), &data);
        known.send(at(here.port()), &data);
        known.send(at(here.port()), b"gossip");
        let received = tokio::time::timeout(Duration::from_secs(5), next(&mut input)).await.unwrap();
        assert!(
            matches!(received, Some(Input::Datagram { bytes, .. }) if bytes == b"gossip"),
            "and nothing before"
        );
        assert_eq!(here.counters().dropped(Dropped::Stranger), 1);
        assert_eq!(here.counters().dropped(Dropped::NoRoute), 1);
    }

    #[tokio::test]
    async fn what_the_kernel_joins_is_told_apart() {
        let here = bound();
        let mut input = here.receive(|| Time::ZERO).unwrap();
        let there = bound();
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, here.port()));
        let mut data = [0; 64];
        data[0] = 4;
        // One piece, also when it arrives: the last datagram of a run may be shorter.
        let mut batch = SendBatch::new(1_000);
        for datagram in [&data[..], &data, b"gossip"] {
            batch.space(datagram.len()).unwrap().copy_from_slice(datagram);
            batch.commit(&Destination { address, source: None }, datagram.len());
        }
        assert_eq!(batch.send(&there.0.sockets).sent, 3);
        let received = tokio::time::timeout(Duration::from_secs(5), next(&mut input)).await.unwrap();
        assert!(matches!(received, Some(Input::Datagram { bytes, .. }) if bytes == b"gossip"));
        assert_eq!(here.counters().dropped(Dropped::Stranger), 2);
    }
}
