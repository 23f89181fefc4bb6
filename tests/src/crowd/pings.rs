//! Everybody pings everybody.

use std::collections::VecDeque;
use std::fmt;
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Result;
use mesh_lab::Host;

/// Hosts that ping at the same time. Each pings all its targets at once.
const AT_ONCE: usize = 6;

/// How many pairs are named when they fail.
const SHOWN: usize = 20;

/// What came of the pings.
#[derive(Debug, Default)]
pub(super) struct Pings {
    pub(super) answered: usize,
    /// Who asked whom in vain.
    pub(super) unanswered: Vec<(String, IpAddr)>,
    /// Time to the slowest first answer of any pair; what was lost is asked again.
    slowest: Duration,
    took: Duration,
}

impl Pings {
    pub(super) fn some_unanswered(&self) -> String {
        let shown = self.unanswered.iter().take(SHOWN).map(|(from, to)| format!("{from} > {to}"));
        shown.collect::<Vec<_>>().join(", ")
    }
}

impl fmt::Display for Pings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (seconds, slowest) = (self.took.as_secs_f64(), self.slowest.as_secs_f64());
        let (answered, unanswered) = (self.answered, self.unanswered.len());
        write!(f, "{answered} pings answered, {unanswered} not, in {seconds:.2} s; slowest {slowest:.3} s")
    }
}

/// Every host of `hosts` pings what `targets` names for it, until each has answered; `patience` for each host.
///
/// # Errors
/// When the pings cannot be made; what does not answer is in the result.
pub(super) fn ping_everybody(
    hosts: &[Host],
    patience: Duration,
    targets: impl Fn(&Host) -> Result<Vec<IpAddr>> + Sync,
) -> Result<Pings> {
    let start = Instant::now();
    let waiting: Mutex<VecDeque<&Host>> = Mutex::new(hosts.iter().collect());
    let next = || waiting.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
    let work = || -> Result<Pings> {
        let mut pings = Pings::default();
        while let Some(host) = next() {
            let targets = targets(host)?;
            for (target, answer) in targets.iter().zip(host.sweep(&targets, patience)?) {
                match answer {
                    Some(after) => {
                        pings.answered += 1;
                        pings.slowest = pings.slowest.max(after);
                    }
                    None => pings.unanswered.push((host.name().to_owned(), *target)),
                }
            }
        }
        Ok(pings)
    };
    let mut all = Pings::default();
    std::thread::scope(|scope| -> Result<()> {
        let threads: Vec<_> = (0..AT_ONCE).map(|_| scope.spawn(work)).collect();
        for thread in threads {
            let pings = thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            all.answered += pings.answered;
            all.unanswered.extend(pings.unanswered);
            all.slowest = all.slowest.max(pings.slowest);
        }
        Ok(())
    })?;
    Ok(Pings { took: start.elapsed(), ..all })
}
