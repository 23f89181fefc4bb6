//! `lab demo`: a mesh comes up, works, and proves that nothing crosses the underlay in the clear.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::capture::Where;
use crate::family::Family;
use crate::inspect::Scanner;
use crate::lab::{Lab, Options};
use crate::measure;
use crate::ping::PingOptions;

/// Bytes of each checked transfer while the underlay is captured.
const PROOF_BYTES: u64 = 128 << 20;

/// Bytes of the transfer that the positive control watches.
const CONTROL_BYTES: u64 = 1 << 20;

/// How long each figure of throughput is measured, about.
const MEASURE_FOR: Duration = Duration::from_secs(2);

/// Runs the demonstration and leaves the lab up.
pub(crate) fn demo(options: Options, out: &mut (dyn Write + Send)) -> Result<()> {
    let lab = up(options, out)?;
    lab.set_keep(true);
    check(&lab, out)?;
    prove(&lab, out)?;
    throughput(&lab, out)?;
    memory(&lab, out)?;

    let host = lab.host(0);
    writeln!(out, "\nmeshctl status on {}:", host.name())?;
    let name = lab.name();
    write!(out, "{}", host.exec_ok(&["meshctl", "status"])?)?;
    let other = lab.host(1).pod(0)?;
    // As it can be typed here: it need not be in the search path.
    let meshctl = lab.meshctl();
    let meshctl =
        std::env::current_dir().ok().and_then(|dir| meshctl.strip_prefix(dir).ok()).unwrap_or(meshctl);
    let meshctl = meshctl.display();
    writeln!(out, "\nThe lab {name:?} stays up. Try next:")?;
    let flag = if name == "default" { String::new() } else { format!(" --name {name}") };
    for command in [
        format!("lab pods{flag}"),
        format!("lab exec{flag} h1/p1 ping -c 3 {}", other.address(Family::V4)),
        format!("lab exec{flag} h2 meshctl status"),
        format!("lab check{flag}"),
        format!("lab down{flag}"),
    ] {
        writeln!(out, "  {meshctl} {command}")?;
    }
    Ok(())
}

/// Brings a lab up, with progress and the time to the last pod's ping.
pub(crate) fn up(options: Options, out: &mut (dyn Write + Send)) -> Result<Lab> {
    let start = Instant::now();
    let pods = options.pods * options.nodes;
    let patience = options.patience;
    let shared = std::sync::Mutex::new(out);
    let say = |line: &str| {
        let mut out = shared.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        // Progress that cannot be shown stops nothing.
        let _ = writeln!(out, "{:6.2} s  {line}", start.elapsed().as_secs_f64());
        let _ = out.flush();
    };
    let lab = Lab::up_with(options, &say)?;
    if pods > 1 {
        lab.wait_connected(patience)?;
        say("every pod has an answer from every other, IPv4 and IPv6");
    }
    Ok(lab)
}

/// Prints the matrix; a failed probe is an error.
pub(crate) fn check(lab: &Lab, out: &mut dyn Write) -> Result<()> {
    let start = Instant::now();
    let report = lab.check(Duration::from_secs(5))?;
    ensure!(
        !report.probes.is_empty(),
        "the lab has no pods to check from; `meshctl lab up --pods 2` makes some"
    );
    writeln!(out, "\nPing and TCP with checked payload, IPv4 and IPv6; nodes by ping:")?;
    writeln!(out, "{}", report.matrix())?;
    let failed = report.failed().count();
    for probe in report.failed().take(20) {
        let why = probe.outcome.as_ref().err().map_or("", String::as_str);
        writeln!(out, "{} > {} ({}) {}: {why}", probe.from, probe.to, probe.address, probe.what)?;
    }
    for (host, why) in &report.silent {
        writeln!(out, "{host} was not asked, its daemon does not tell its mesh addresses: {why}")?;
    }
    let total = report.probes.len();
    ensure!(failed == 0, "{failed} of {total} probes failed");
    ensure!(
        report.silent.is_empty(),
        "{} of {} daemons do not answer",
        report.silent.len(),
        lab.hosts().len()
    );
    writeln!(out, "all {total} probes succeeded in {:.2} s", start.elapsed().as_secs_f64())?;
    Ok(())
}

/// Transfers between pods of different hosts while every frame of the underlay is inspected, and a control
/// that shows that the inspection would have found them.
fn prove(lab: &Lab, out: &mut dyn Write) -> Result<()> {
    let (a, b) = (lab.host(0).pod(0)?, lab.host(1).pod(0)?);
    let scanner = Scanner::new(Some(lab.cluster_ranges()?));
    let inspector = scanner.clone();
    let underlay = lab.capture(&Where::Underlay, move |frame| inspector.inspect(frame))?;

    let marked = Arc::new(AtomicU64::new(0));
    let (counter, finder) = (Arc::clone(&marked), scanner.clone());
    let control = lab.capture(&Where::Pod(a.clone()), move |frame| {
        if finder.has_marker(frame.data) {
            counter.fetch_add(1, Ordering::Relaxed);
        }
        None
    })?;
    for family in Family::BOTH {
        let pings = PingOptions { count: 10, interval: Duration::from_millis(10), ..PingOptions::default() };
        let stats = a.ping(b.address(family), pings)?;
        ensure!(stats.all_answered(), "{} of {} pings over {family} were lost", stats.lost, stats.sent);
        a.tcp_send_to(&b, family, CONTROL_BYTES)?;
    }
    let (control, _) = control.stop()?;
    writeln!(
        out,
        "\nChecked TCP from {} to {}, every frame of the underlay inspected:",
        a.full_name(),
        b.full_name()
    )?;
    for family in Family::BOTH {
        let transfer = a.tcp_send_to(&b, family, PROOF_BYTES)?;
        writeln!(
            out,
            "{family}: {} MiB in {:.2} s, every byte compared ({:.2} Gbit/s while captured)",
            transfer.bytes >> 20,
            transfer.elapsed.as_secs_f64(),
            transfer.gbit_per_second()
        )?;
    }
    let (report, _) = underlay.stop()?;
    writeln!(out, "{}", scanner.tally())?;
    writeln!(
        out,
        "underlay, each frame seen at every port it passes: {} frames, {} bytes, {} dropped by the kernel unseen, \
         {} in the clear or foreign",
        report.frames, report.bytes, report.dropped, report.found
    )?;
    let marked = marked.load(Ordering::Relaxed);
    writeln!(
        out,
        "control, the same search inside the pod: {} frames, {} bytes, {marked} with the payload's marker",
        control.frames, control.bytes
    )?;
    for (finding, times) in &report.findings {
        writeln!(out, "  {times} × {finding}")?;
    }
    ensure!(report.found == 0, "{} frames on the underlay are not what a mesh may send", report.found);
    ensure!(report.dropped == 0, "the capture is incomplete: {} frames were dropped unseen", report.dropped);
    ensure!(marked > 0, "the control did not find the marker inside the pod: the search proves nothing");
    let least = 2 * PROOF_BYTES;
    ensure!(
        report.bytes > least,
        "the underlay carried {} bytes, less than the payload: captured in the wrong place?",
        report.bytes
    );
    writeln!(out, "proved: no pod address and no pod byte crossed the underlay in the clear")?;
    Ok(())
}

/// Pods on different hosts beside hosts on the bare underlay.
fn throughput(lab: &Lab, out: &mut dyn Write) -> Result<()> {
    let (from, to) = (lab.host(0), lab.host(1));
    let (a, b) = (from.pod(0)?, to.pod(0)?);
    writeln!(out, "\nTCP, one stream, payload checked, nothing captured:")?;
    for family in Family::BOTH {
        // A first transfer tells how much fits in the time.
        let size = |first: crate::stream::Transfer| {
            (first.bytes as f64 / first.elapsed.as_secs_f64() * MEASURE_FOR.as_secs_f64()) as u64
        };
        let probe = measure::underlay_transfer(&from, &to, family, 64 << 20)?;
        let bare = measure::underlay_transfer(&from, &to, family, size(probe))?;
        let probe = a.tcp_send_to(&b, family, 16 << 20)?;
        let mesh = a.tcp_send_to(&b, family, size(probe))?;
        writeln!(
            out,
            "{family}: {:.2} Gbit/s between pods through the mesh, {:.2} between hosts on the bare underlay (veth)",
            mesh.gbit_per_second(),
            bare.gbit_per_second()
        )?;
    }
    Ok(())
}

fn memory(lab: &Lab, out: &mut dyn Write) -> Result<()> {
    let host = lab.host(0);
    for program in ["meshd", "mesh-wg"] {
        let sizes = measure::resident_bytes(&host, program)?;
        let sizes: Vec<_> =
            sizes.iter().map(|bytes| format!("{:.1} MiB", *bytes as f64 / f64::from(1 << 20))).collect();
        let sizes = if sizes.is_empty() { "not running".to_owned() } else { sizes.join(", ") };
        writeln!(out, "resident memory of {program} on {}: {sizes}", host.name()).context("printing")?;
    }
    Ok(())
}
