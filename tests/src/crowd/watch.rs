//! Waiting until all daemons say the same.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use mesh_lab::Host;
use serde_json::Value;

/// Pause between two rounds of questions. Each question costs the daemon a millisecond or two, on the processors
/// that are watched.
const PAUSE: Duration = Duration::from_millis(500);

/// How many hosts are named when a wait fails.
const SHOWN: usize = 10;

/// How long it took from the moment that counts.
#[derive(Clone, Copy, Debug)]
pub(super) struct Waited {
    /// Until half of the daemons said so.
    pub(super) half: Duration,
    /// Until the last did.
    pub(super) all: Duration,
}

/// Asks all daemons for their status until `says` is content with each, and once more with all of them in a row.
///
/// # Errors
/// When they are not within `patience` of now: those that are not, and why.
pub(super) fn wait_for_all(
    hosts: &[Host],
    since: Instant,
    patience: Duration,
    says: impl Fn(&Host, &Value) -> Result<()>,
) -> Result<Waited> {
    let deadline = Instant::now() + patience;
    let mut open: Vec<&Host> = hosts.iter().collect();
    let mut half = None;
    loop {
        let mut still = Vec::new();
        for host in &open {
            match host.ask("/v1/status").and_then(|status| says(host, &status)) {
                Ok(()) => {}
                Err(error) => still.push((*host, error)),
            }
        }
        let elapsed = since.elapsed();
        if still.len() <= hosts.len() / 2 {
            half.get_or_insert(elapsed);
        }
        match (still.is_empty(), open.len() == hosts.len()) {
            (true, true) => return Ok(Waited { half: half.unwrap_or(elapsed), all: elapsed }),
            // Each has said so once. Whether all do at the same time is seen without a pause.
            (true, false) => {
                open = hosts.iter().collect();
                continue;
            }
            (false, _) => {}
        }
        if Instant::now() >= deadline {
            let reasons =
                still.iter().take(SHOWN).map(|(host, error)| format!("\n    {}: {error:#}", host.name()));
            bail!(
                "{} of {} daemons are not there after {:.0} s:{}",
                still.len(),
                hosts.len(),
                elapsed.as_secs_f64(),
                reasons.collect::<String>()
            );
        }
        open = still.into_iter().map(|(host, _)| host).collect();
        std::thread::sleep(PAUSE);
    }
}
