//! Putting the device together, and taking it apart.

use std::io;
use std::num::NonZero;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use mesh_sys::tun::{LinkWatch, Tun, TunError};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::control;
use crate::counters::{Counters, DropReason};
use crate::device::Device;
use crate::socket_file::{SocketError, SocketFile, refuse_live};
use crate::{inbound, outbound, timers};

/// What the TUN device starts with: fits an IPv6 underlay of 1,500 bytes.
const DEFAULT_MTU: u32 = 1420;

/// Most threads for one direction. Further processors are for what the packets are for.
const MAX_THREADS: usize = 8;

/// Why the device did not start. Nothing was left behind.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The TUN device.
    #[error(transparent)]
    Tun(#[from] TunError),
    /// The configuration socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// A step failed.
    #[error("{what}: {source}")]
    Io {
        /// The step.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

/// Why the device ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// A signal asked for it.
    Signal(Signal),
    /// The interface was deleted.
    InterfaceGone,
    /// The configuration socket was removed.
    SocketGone,
}

/// A running device. [`Engine::run`] serves it until it ends.
pub struct Engine {
    device: Arc<Device>,
    tun: Arc<Tun>,
    socket: SocketFile,
    links: LinkWatch,
    signals: SignalFd,
    failure: Arc<Failure>,
    threads: Vec<JoinHandle<()>>,
}

/// How a thread tells that it ended before its time.
struct Failure {
    event: EventFd,
    reason: Mutex<Option<Result<Exit, String>>>,
}

impl Failure {
    fn report(&self, reason: Result<Exit, String>) {
        self.reason.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(reason);
        if let Err(error) = self.event.write(1) {
            tracing::error!(%error, "the end of a thread could not be reported");
        }
    }
}

/// Reports a thread's end also when it panics: a device with half of its threads must not go on.
struct Sentinel {
    name: &'static str,
    failure: Arc<Failure>,
    armed: bool,
}

impl Drop for Sentinel {
    fn drop(&mut self) {
        if self.armed {
            self.failure.report(Err(format!("thread {} panicked", self.name)));
        }
    }
}

impl Engine {
    /// Makes the interface `name` and its configuration socket at `socket`, and starts the threads.
    ///
    /// Blocks SIGTERM, SIGINT and SIGHUP in the calling thread, which should be the only one.
    ///
    /// # Errors
    /// [`StartError`].
    pub fn start(name: &str, socket: &Path) -> Result<Self, StartError> {
        let io = |what| move |source: io::Error| StartError::Io { what, source };
        let errno = |what| move |errno: Errno| StartError::Io { what, source: errno.into() };
        // First of all: a second instance must not disturb the first.
        refuse_live(socket)?;
        let mut mask = SigSet::empty();
        for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
            mask.add(signal);
        }
        mask.thread_block().map_err(errno("blocking signals"))?;
        let flags = SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC;
        let signals = SignalFd::with_flags(&mask, flags).map_err(errno("listening for signals"))?;
        let links = LinkWatch::new().map_err(io("listening for changes of links"))?;

        let threads = std::thread::available_parallelism().map_or(1, NonZero::get).min(MAX_THREADS);
        let tun = Tun::open(name, threads * outbound::QUEUES)?;
        tun.set_mtu(DEFAULT_MTU).map_err(io("setting the interface's MTU"))?;
        let device = Arc::new(Device::new(DEFAULT_MTU, threads).map_err(io("making events"))?);
        let socket = SocketFile::bind(socket)?;
        let event = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)
            .map_err(errno("making events"))?;
        let failure = Arc::new(Failure { event, reason: Mutex::new(None) });
        tracing::info!(interface = name, socket = %socket.path().display(), offloads = ?tun.offloads(), "device is up");

        let tun = Arc::new(tun);
        let mut engine = Self { device, tun, socket, links, signals, failure, threads: Vec::new() };
        let threads = threads.min(engine.tun.queues().len());
        let started = (0..threads).try_for_each(|number| {
            engine.spawn("outbound", move |device, tun| match outbound::run(device, tun, number, threads) {
                Ok(outbound::Ended::Stopped) => None,
                Ok(outbound::Ended::DeviceGone) => Some(Ok(Exit::InterfaceGone)),
                Err(error) => Some(Err(error.to_string())),
            })
        });
        let started = started.and_then(|()| {
            (0..engine.device.wake_inbound.len()).try_for_each(|number| {
                engine.spawn("inbound", move |device, tun| {
                    inbound::run(device, tun, number).err().map(|error| Err(error.to_string()))
                })
            })
        });
        let started = started.and_then(|()| {
            engine.spawn("timers", |device, _tun| {
                timers::run(device);
                None
            })
        });
        match started {
            Ok(()) => Ok(engine),
            Err(source) => {
                engine.shut_down();
                Err(StartError::Io { what: "starting threads", source })
            }
        }
    }

    fn spawn(
        &mut self,
        name: &'static str,
        body: impl FnOnce(&Device, &Tun) -> Option<Result<Exit, String>> + Send + 'static,
    ) -> io::Result<()> {
        let (device, tun) = (Arc::clone(&self.device), Arc::clone(&self.tun));
        let failure = Arc::clone(&self.failure);
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            let mut sentinel = Sentinel { name, failure, armed: true };
            let ended = body(&device, &tun);
            sentinel.armed = false;
            if let Some(reason) = ended {
                sentinel.failure.report(reason.map_err(|error| format!("thread {name}: {error}")));
            }
        })?;
        self.threads.push(thread);
        Ok(())
    }

    /// What has been dropped so far.
    #[must_use]
    pub fn counters(&self) -> &Counters {
        &self.device.counters
    }

    /// Serves the configuration socket until the device ends, then removes socket and interface.
    ///
    /// # Errors
    /// When a part of the device failed. Everything has been removed all the same.
    pub fn run(mut self) -> io::Result<Exit> {
        let ended = self.serve();
        self.shut_down();
        ended
    }

    fn serve(&self) -> io::Result<Exit> {
        let open = Arc::new(AtomicUsize::new(0));
        loop {
            let descriptors: [BorrowedFd<'_>; 5] = [
                self.signals.as_fd(),
                self.failure.event.as_fd(),
                self.links.as_fd(),
                self.socket.watch(),
                self.socket.listener().as_fd(),
            ];
            let mut fds = descriptors.map(|fd| PollFd::new(fd, PollFlags::POLLIN));
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) => {}
                Err(Errno::EINTR) => continue,
                Err(error) => return Err(error.into()),
            }
            let [signal, failure, link, file, client] = fds.map(|fd| fd.any().unwrap_or(true));
            if signal && let Some(info) = self.signals.read_signal()? {
                let signal = Signal::try_from(info.ssi_signo.cast_signed()).unwrap_or(Signal::SIGTERM);
                return Ok(Exit::Signal(signal));
            }
            if failure {
                let reason = self.failure.reason.lock().unwrap_or_else(PoisonError::into_inner).take();
                return reason.unwrap_or(Ok(Exit::InterfaceGone)).map_err(io::Error::other);
            }
            if link && self.links.drain()? && !self.follow_link() {
                return Ok(Exit::InterfaceGone);
            }
            if file && !self.socket.is_present() {
                return Ok(Exit::SocketGone);
            }
            if client {
                control::accept(self.socket.listener(), &self.device, &open);
            }
        }
    }

    /// Takes over a changed MTU. False when the interface is gone.
    fn follow_link(&self) -> bool {
        match self.tun.mtu() {
            Ok(mtu) => {
                if self.device.mtu.swap(mtu, Ordering::Relaxed) != mtu {
                    tracing::info!(mtu, "the interface has a new MTU");
                }
                true
            }
            // Deleted, or moved to another namespace, where it goes on working with the MTU it has.
            Err(error) => {
                let present = self.tun.name().is_ok();
                if present {
                    tracing::debug!(%error, "the interface cannot be asked for its MTU");
                }
                present
            }
        }
    }

    fn shut_down(&mut self) {
        self.device.stop();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a thread had panicked");
            }
        }
        self.device.clear();
        let dropped = |reason| self.device.counters.dropped(reason);
        tracing::info!(
            no_peer = dropped(DropReason::NoPeer),
            no_endpoint = dropped(DropReason::NoEndpoint),
            malformed = dropped(DropReason::MalformedPacket),
            send_failed = dropped(DropReason::SendFailed),
            unknown = dropped(DropReason::UnknownDatagram),
            not_authentic = dropped(DropReason::NotAuthentic),
            foreign_source = dropped(DropReason::ForeignSource),
            tun_refused = dropped(DropReason::TunRefused),
            "device is down; packets dropped since its start"
        );
    }
}
