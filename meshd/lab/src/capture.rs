//! Seeing every frame in a network namespace.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::Result;
use mesh_sys::netns::NetNs;
use mesh_sys::packet::{Capture, CaptureConfig, Frame};

use crate::host::Host;
use crate::pod::Pod;

/// A frame of this length may have been longer: the capture's buffer has room for 66 KiB, any segmentation
/// offload frame fits except those of "BIG TCP".
const CUT_SHORT: usize = 66 << 10;

/// Bytes the kernel may hold for us before it drops.
const QUEUE_BYTES: usize = 256 << 20;

/// How many different findings a report keeps in words.
const KEPT_FINDINGS: usize = 20;

/// Where to listen.
#[derive(Clone, Debug)]
pub enum Where {
    /// On every port of the underlay: each frame between two hosts is seen at least twice.
    Underlay,
    /// On all interfaces of a host, or on one.
    Host(Host, Option<String>),
    /// On the pod's side of its veth pair.
    Pod(Pod),
}

/// What a capture found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CaptureReport {
    /// Frames seen.
    pub frames: u64,
    /// Their bytes, Ethernet headers included.
    pub bytes: u64,
    /// Frames that the kernel dropped because we were too slow. A proof needs 0.
    pub dropped: u64,
    /// Frames for which the inspector said something.
    pub found: u64,
    /// The first different things it said, with their number.
    pub findings: BTreeMap<String, u64>,
}

/// A capture that goes on until it is stopped.
#[derive(Debug)]
pub struct RunningCapture<I> {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<(CaptureReport, I)>>,
}

impl<I> RunningCapture<I> {
    /// Ends the capture, once what the kernel has queued so far is inspected.
    ///
    /// # Errors
    /// When the socket failed.
    pub fn stop(self) -> Result<(CaptureReport, I)> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

/// Starts a capture; everything from the return on is seen.
pub(crate) fn start<I>(net: &NetNs, interface: Option<&str>, mut inspector: I) -> Result<RunningCapture<I>>
where
    I: FnMut(&Frame<'_>) -> Option<String> + Send + 'static,
{
    let config = CaptureConfig {
        device: interface.map(str::to_owned),
        buffer: QUEUE_BYTES,
        ..CaptureConfig::default()
    };
    let mut capture = Capture::open_in(net, &config)?;
    let stop = Arc::new(AtomicBool::new(false));
    let stopping = Arc::clone(&stop);
    let thread = thread::Builder::new().name("lab-capture".to_owned()).spawn(move || {
        let report = listen(&mut capture, &stopping, &mut inspector)?;
        Ok((report, inspector))
    })?;
    Ok(RunningCapture { stop, thread })
}

fn listen(
    capture: &mut Capture,
    stop: &AtomicBool,
    inspect: &mut impl FnMut(&Frame<'_>) -> Option<String>,
) -> Result<CaptureReport> {
    let mut report = CaptureReport::default();
    let mut each = |frame: &Frame<'_>| {
        report.frames += 1;
        report.bytes += frame.data.len() as u64;
        let said = if frame.data.len() >= CUT_SHORT {
            Some("a frame too long to capture".to_owned())
        } else {
            inspect(frame)
        };
        if let Some(finding) = said {
            report.found += 1;
            if report.findings.len() < KEPT_FINDINGS || report.findings.contains_key(&finding) {
                *report.findings.entry(finding).or_default() += 1;
            }
        }
    };
    while !stop.load(Ordering::Relaxed) {
        capture.read_for(Duration::from_millis(20), &mut each)?;
    }
    // What is queued by now; on a line that never falls silent that has no end of its own.
    let deadline = Instant::now() + Duration::from_secs(5);
    while capture.read_for(Duration::ZERO, &mut each)? > 0 && Instant::now() < deadline {}
    report.dropped = capture.statistics()?.dropped;
    Ok(report)
}
