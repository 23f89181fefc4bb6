//! What the kernel knows about a running engine (proc(5)).

use std::fs;

use anyhow::{Context, Result};

/// What all threads of a process have used so far.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Usage {
    /// Processor time in seconds.
    pub(crate) cpu: f64,
    /// How often a thread waited for something: each time, something woke it up later.
    pub(crate) waits: f64,
}

/// User and system time of a process, in seconds, in steps of 10 ms. It includes threads that have ended.
pub(crate) fn cpu_seconds(pid: u32) -> Result<f64> {
    let ticks = ticks(&read(pid, "stat")?).context("cannot read the times in /proc/PID/stat")?;
    Ok(ticks as f64 / TICKS_PER_SECOND)
}

/// Resident memory of a process, in MiB.
pub(crate) fn resident_mib(pid: u32) -> Result<f64> {
    let kib = field(&read(pid, "status")?, "VmRSS").context("/proc/PID/status has no VmRSS")?;
    Ok(kib / 1024.0)
}

/// What the living threads of a process have used, to the nanosecond where the kernel tells.
pub(crate) fn usage(pid: u32) -> Result<Usage> {
    let mut usage = Usage::default();
    let mut exact = Some(0.0);
    for thread in fs::read_dir(format!("/proc/{pid}/task")).context("an engine has ended")? {
        let thread = thread?.path();
        // A thread may end while we look.
        let Ok(status) = fs::read_to_string(thread.join("status")) else { continue };
        usage.waits += field(&status, "voluntary_ctxt_switches").context("no voluntary_ctxt_switches")?;
        // In milliseconds; a kernel without CONFIG_SCHED_DEBUG has no such file.
        let run = fs::read_to_string(thread.join("sched")).ok();
        let run = run.and_then(|sched| field(&sched, "se.sum_exec_runtime"));
        exact = exact.zip(run).map(|(sum, run)| sum + run / 1e3);
    }
    usage.cpu = match exact {
        Some(seconds) => seconds,
        None => cpu_seconds(pid)?,
    };
    Ok(usage)
}

fn read(pid: u32, file: &str) -> Result<String> {
    fs::read_to_string(format!("/proc/{pid}/{file}")).context("an engine has ended")
}

/// The number behind `NAME:`, with any space around the colon.
fn field(text: &str, name: &str) -> Option<f64> {
    text.lines().find_map(|line| {
        let (found, value) = line.split_once(':')?;
        if found.trim_end() == name { value.split_whitespace().next()?.parse().ok() } else { None }
    })
}

/// utime and stime (fields 14 and 15); the name in field 2 may hold anything, so count after it.
fn ticks(stat: &str) -> Option<u64> {
    let mut fields = stat.rsplit_once(") ")?.1.split(' ').skip(11);
    Some(fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?)
}

/// `USER_HZ` is 100 on every architecture that we build for.
const TICKS_PER_SECOND: f64 = 100.0;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processor_time_is_read_behind_any_name() {
        let stat = "7 (a b) c) S 1 7 7 0 -1 4194560 1 0 0 0 250 50 0 0 20 0 1 0 100 0 0";
        assert_eq!(ticks(stat), Some(300));
        assert_eq!(ticks("7 (x"), None);
    }

    #[test]
    fn fields_are_found_by_their_whole_name() {
        let status = "VmRSS:\t    2048 kB\nvoluntary_ctxt_switches:\t12\nnonvoluntary_ctxt_switches:\t3\n";
        assert_eq!(field(status, "VmRSS"), Some(2048.0));
        assert_eq!(field(status, "ctxt_switches"), None);
        assert_eq!(field(status, "nonvoluntary_ctxt_switches"), Some(3.0));
        assert_eq!(field("se.sum_exec_runtime      :         12.25\n", "se.sum_exec_runtime"), Some(12.25));
    }

    #[test]
    fn our_own_usage_is_read() {
        let pid = std::process::id();
        assert!(usage(pid).unwrap().cpu >= 0.0);
        assert!(resident_mib(pid).unwrap() > 0.1);
    }
}
