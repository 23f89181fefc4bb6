//! The process that packets of one direction of a bad link pass through.
//!
//! The kernel hands it frames by a TAP device that is a port of the sender's segment, to which the bridge itself sends
//! nothing; what it writes there goes on as if it came from the sender. It ends when it is told to (SIGTERM) and nothing
//! is under way any more, so that a link can change without losing what is on it: the next process takes the new frames
//! while this one delivers the old.

use std::io::{self, ErrorKind};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::AsFd;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use mesh_sys::tun::Tap;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::time::TimeSpec;

use crate::binaries::Binaries;
use crate::delay_line::DelayLine;
use crate::family::Family;
use crate::holder;
use crate::host::SPAWN_DETACHED;
use crate::impairment::Impairment;
use crate::lab::Lab;
use crate::network::{Forwarder, Network};
use crate::plan::{GATEWAY, Segment};
use crate::process::{self, ProcessRef};
use crate::stream::next_random;
use crate::too_long::{self, Answer, Complainer};
use crate::underlay::ip_batch;
use crate::wait::poll_until;

/// Name of the hidden subcommand.
pub(crate) const LINK: &str = "link-forwarder";

/// Room for the longest frame of a device of MTU 1500, and for those that should not be there.
const FRAME_ROOM: usize = 9 << 10;

/// How many frames are read before those that have arrived are written.
const BATCH: usize = 64;

/// How many frames the kernel keeps for us while we do something else: some 15 MB.
const QUEUE: usize = 10_000;

/// What a forwarder is to do.
#[derive(Clone, Debug, PartialEq, Eq, clap::Args)]
pub(crate) struct ForwarderSpec {
    /// Which link of which lab, for people who look at processes.
    #[arg(long)]
    link: String,
    /// Name of the TAP device to make.
    #[arg(long)]
    device: String,
    /// The impairment, as JSON.
    #[arg(long)]
    impairment: String,
    /// Whence the random numbers come.
    #[arg(long)]
    seed: u64,
    /// The address that complains about long packets.
    #[arg(long)]
    ipv4: Ipv4Addr,
    /// The same for IPv6.
    #[arg(long)]
    ipv6: Ipv6Addr,
}

/// The hidden subcommand: returns when told to end and all frames are delivered.
pub(crate) fn forward(spec: &ForwarderSpec) -> Result<()> {
    let impairment: Impairment = serde_json::from_str(&spec.impairment).context("the impairment")?;
    // No host has this address: the second last byte tells what kind of thing it is of.
    let complainer = Complainer { mac: [2, 0, 0xc6, 0x12, 3, 1], v4: spec.ipv4, v6: spec.ipv6 };
    let mut ending = SigSet::empty();
    ending.add(Signal::SIGTERM);
    ending.thread_block()?;
    let signals = SignalFd::with_flags(&ending, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
    let tap = Tap::create(&spec.device)?;
    let mut link = OneWay { tap, line: DelayLine::new(impairment, spec.seed), impairment, complainer };
    let mut told = false;
    loop {
        let idle = link.read_some()?;
        link.deliver(Instant::now())?;
        told = told || signals.read_signal()?.is_some();
        if idle && told && link.line.poll_timeout().is_none() {
            return Ok(());
        }
        if idle {
            let wait = link.line.poll_timeout().map(|at| at.saturating_duration_since(Instant::now()));
            let mut polled = [
                PollFd::new(link.tap.as_fd(), PollFlags::POLLIN),
                PollFd::new(signals.as_fd(), PollFlags::POLLIN),
            ];
            match ppoll(&mut polled, wait.map(TimeSpec::from), None) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno).context("waiting for frames"),
            }
        }
    }
}

/// A direction of a link with its device.
struct OneWay {
    tap: Tap,
    line: DelayLine<Box<[u8]>>,
    impairment: Impairment,
    complainer: Complainer,
}

impl OneWay {
    /// Reads what has come, but for a batch at most; returns whether that was all.
    fn read_some(&mut self) -> Result<bool> {
        let mut buffer = [0; FRAME_ROOM];
        for _ in 0..BATCH {
            match self.tap.read(&mut buffer) {
                Ok(length) => self.take(&buffer[..length], Instant::now())?,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(true),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error).context("reading a frame"),
            }
        }
        Ok(false)
    }

    fn take(&mut self, frame: &[u8], now: Instant) -> Result<()> {
        let mut offer = |frame: &[u8]| {
            self.line.handle_frame(frame.into(), frame.len(), now);
        };
        let longest = self
            .impairment
            .mtu
            .filter(|mtu| too_long::ip_length(frame).is_some_and(|length| length > usize::from(*mtu)));
        match longest {
            None => offer(frame),
            Some(_) if !self.impairment.too_big => {}
            Some(mtu) => match too_long::answer(frame, mtu, &self.complainer) {
                Answer::Complaint(complaint) => self.write(&complaint)?,
                Answer::Fragments(fragments) => fragments.iter().for_each(|fragment| offer(fragment)),
                Answer::None => {}
            },
        }
        Ok(())
    }

    /// Writes what has arrived by now.
    fn deliver(&mut self, now: Instant) -> Result<()> {
        while let Some(frame) = self.line.poll_frame(now) {
            self.write(&frame)?;
        }
        Ok(())
    }

    fn write(&self, frame: &[u8]) -> Result<()> {
        match self.tap.write(frame) {
            Ok(()) => Ok(()),
            // Lost, as on any link: the kernel has no room, or takes it for no frame.
            Err(error) if lossy(&error) => Ok(()),
            Err(error) => Err(error).context("writing a frame"),
        }
    }
}

fn lossy(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error().map(Errno::from_raw),
        Some(Errno::ENOBUFS | Errno::ENOMEM | Errno::EINVAL | Errno::EAGAIN)
    )
}

impl Lab {
    /// Starts the forwarders that the network needs and does not have. Those that it has and does not need are the
    /// caller's to end, when the kernel sends them nothing more.
    ///
    /// # Errors
    /// When one does not start; those started are ended again, and the network is not to be used.
    pub(crate) fn start_forwarders(&self, network: &mut Network) -> Result<Vec<ProcessRef>> {
        let mut started = Vec::new();
        let outcome = (0..network.ways.len()).try_for_each(|at| {
            let way = &network.ways[at];
            let (from, to, impairment) = (way.from, way.to, Impairment { cut: false, ..way.impairment });
            if !impairment.needs_forwarder() {
                network.ways[at].forwarder = None;
                return Ok(());
            }
            let segment = network.plan().passage(from, to)?.segment;
            let serves = |forwarder: &Forwarder| {
                (forwarder.impairment, forwarder.segment) == (impairment, segment)
                    && forwarder.process.is_alive()
            };
            if network.ways[at].forwarder.as_ref().is_some_and(serves) {
                return Ok(());
            }
            let device = format!("link{}", network.next_forwarder);
            network.next_forwarder += 1;
            let process = self
                .start_forwarder(network, (from, to), segment, &device, impairment, &mut started)
                .with_context(|| format!("the link from h{from} to h{to}"))?;
            network.ways[at].forwarder = Some(Forwarder { process, device, impairment, segment });
            Ok(())
        });
        if outcome.is_err() {
            end(&started, Signal::SIGKILL);
        }
        outcome.map(|()| started)
    }

    fn start_forwarder(
        &self,
        network: &Network,
        (from, to): (u8, u8),
        segment: Segment,
        device: &str,
        impairment: Impairment,
        started: &mut Vec<ProcessRef>,
    ) -> Result<ProcessRef> {
        let Binaries { helper, .. } = self.shared.binaries();
        let (program, prefix) = helper.split_first().context("the lab's helper command is empty")?;
        let plan = network.plan();
        let link = format!("{}: h{from} > h{to}", self.name());
        let mut seed = network.topology.seed ^ (u64::from(from) << 8) ^ u64::from(to);
        let seed = next_random(&mut seed);
        // Whoever is asked on the way: the gateway of the public underlay.
        let complainer = |family| plan.address(Segment::PUBLIC, GATEWAY, family).context("no gateway");
        let log = self.shared.dir().join("logs").join("links.log");
        let mut command = Command::new(program);
        command
            .args(prefix)
            .args([SPAWN_DETACHED, "--", program])
            .args(prefix)
            .args([
                LINK,
                "--link",
                &link,
                "--device",
                device,
                "--impairment",
                &serde_json::to_string(&impairment)?,
            ])
            .args(["--seed", &seed.to_string()])
            .args(["--ipv4", &complainer(Family::V4)?.to_string()])
            .args(["--ipv6", &complainer(Family::V6)?.to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(holder::log_file(&log)?);
        let output = self.switch.spawn(None, command)?.wait_with_output()?;
        let words = || format!("its forwarder could not be started; see {}", log.display());
        let inner: i32 = String::from_utf8_lossy(&output.stdout).trim().parse().with_context(words)?;
        let namespace = self.switch.describe()?.pid_ns;
        let process = process::find_in_namespace(namespace, inner)?.with_context(words)?;
        started.push(process);
        let switch = self.switch.net();
        poll_until("the forwarder's device", Duration::from_secs(5), || {
            !process.is_alive()
                || switch.run(|| nix::net::if_::if_nametoindex(device).is_ok()).unwrap_or(false)
        })
        .with_context(words)?;
        ensure!(process.is_alive(), words());
        // A link does not wait for a processor: on a busy machine a packet would be late by as much as it is delayed.
        // Some containers forbid it, and have to do with that.
        let hasten =
            holder::run_tool(Command::new("chrt").args(["--rr", "--pid", "1", &process.pid.to_string()]));
        if let Err(error) = hasten {
            tracing::debug!(device, error = format!("{error:#}"), "a link without real-time scheduling");
        }
        // The bridge must send nothing there, or it would come back; and it must not look for the sender there.
        ip_batch(
            switch,
            &format!(
                "link set {device} mtu 1500 txqueuelen {QUEUE} addrgenmode none master {bridge}\n\
                 link set {device} type bridge_slave learning off flood off mcast_flood off bcast_flood off\n\
                 link set {device} up\n",
                bridge = segment.bridge()
            ),
        )?;
        Ok(process)
    }
}

/// Ends forwarders: by SIGTERM when they have delivered what they have, by SIGKILL at once. Those that are gone already do
/// no harm.
pub(crate) fn end(forwarders: &[ProcessRef], signal: Signal) {
    for process in forwarders {
        if let Err(error) = process.signal(signal) {
            tracing::warn!(pid = process.pid, error = format!("{error:#}"), "ending a forwarder");
        }
    }
}
