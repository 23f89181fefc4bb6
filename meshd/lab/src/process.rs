//! Processes by id *and* start time, so that a recycled id is never taken for the process meant.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use crate::wait::poll_until;

/// A process of this machine, seen from the outermost pid namespace we are in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessRef {
    /// Process id.
    pub pid: i32,
    /// Clock ticks after boot at which it started (proc_pid_stat(5), field 22).
    pub start_ticks: u64,
}

impl ProcessRef {
    /// The running process `pid`.
    ///
    /// # Errors
    /// When there is none.
    pub fn of(pid: i32) -> Result<Self> {
        let stat = Stat::read(pid).with_context(|| format!("process {pid} does not exist"))?;
        Ok(Self { pid, start_ticks: stat.start_ticks })
    }

    /// Whether exactly this process still runs. A zombie does not.
    #[must_use]
    pub fn is_alive(self) -> bool {
        Stat::read(self.pid).is_some_and(|stat| stat.start_ticks == self.start_ticks && !stat.dead)
    }

    /// Whether it is gone, or will never run a step of its own code again.
    ///
    /// A holder can stay in that state: the kernel lets pid 1 of a namespace end only when all processes
    /// that others put there are reaped by those others. Its files and namespaces are released already.
    pub(crate) fn is_doomed(self) -> bool {
        Stat::read(self.pid)
            .is_none_or(|stat| stat.start_ticks != self.start_ticks || stat.dead || stat.exiting)
    }

    /// Sends `signal`; a process that is gone is success.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn signal(self, signal: Signal) -> Result<()> {
        if !self.is_alive() {
            return Ok(());
        }
        match kill(Pid::from_raw(self.pid), signal) {
            Ok(()) | Err(Errno::ESRCH) => Ok(()),
            Err(errno) => bail!("sending {signal} to process {}: {errno}", self.pid),
        }
    }

    /// Waits until it runs no more.
    ///
    /// # Errors
    /// When it still runs after `timeout`.
    pub fn wait_gone(self, timeout: Duration) -> Result<()> {
        poll_until(&format!("end of process {}", self.pid), timeout, || !self.is_alive())
    }

    /// Resident memory in bytes.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn resident_bytes(self) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid))?;
        let kib = status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:"))
            .and_then(|rest| rest.trim().strip_suffix("kB"))
            .and_then(|kib| kib.trim().parse::<u64>().ok())
            .with_context(|| format!("process {} has no VmRSS", self.pid))?;
        Ok(kib * 1024)
    }
}

/// Flag of a process that is on its way out (`linux/sched.h`).
const PF_EXITING: u64 = 0x4;

/// The parts of `/proc/PID/stat` that matter here.
struct Stat {
    /// A zombie, and none of its threads runs.
    dead: bool,
    exiting: bool,
    start_ticks: u64,
}

impl Stat {
    fn read(pid: i32) -> Option<Self> {
        Self::of(&stat_fields(pid)?)
    }

    fn of(fields: &[String]) -> Option<Self> {
        let [state, _, _, _, _, _, flags, ..] = fields else { return None };
        let flags: u64 = flags.parse().ok()?;
        let start_ticks = fields.get(19)?.parse().ok()?;
        // As long as one thread is not gone yet, the process holds its files, locks among them.
        let threads: u64 = fields.get(17)?.parse().ok()?;
        let dead = matches!(state.as_str(), "Z" | "X" | "x") && threads <= 1;
        Some(Self { dead, exiting: flags & PF_EXITING != 0, start_ticks })
    }
}

/// The fields of `/proc/PID/stat` (proc_pid_stat(5)) from the third, the state, on.
pub(crate) fn stat_fields(pid: i32) -> Option<Vec<String>> {
    fields_after_name(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// The command name may hold anything, parentheses too: fields are counted after the last one.
fn fields_after_name(text: &str) -> Option<Vec<String>> {
    let fields = text.get(text.rfind(')')? + 1..)?;
    Some(fields.split_ascii_whitespace().map(str::to_owned).collect())
}

/// The inode number of a namespace of a process, such as `net`; what `readlink /proc/PID/ns/net` shows.
pub(crate) fn namespace_inode(pid: i32, kind: &str) -> Option<u64> {
    let link = fs::read_link(format!("/proc/{pid}/ns/{kind}")).ok()?;
    link.to_str()?.strip_prefix(kind)?.strip_prefix(":[")?.strip_suffix(']')?.parse().ok()
}

/// Every process id there is right now.
pub(crate) fn all_pids() -> Result<Vec<i32>> {
    let entries = fs::read_dir("/proc").context("reading /proc")?;
    Ok(entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect())
}

/// The process that has id `inner` in the pid namespace `namespace`.
pub(crate) fn find_in_namespace(namespace: u64, inner: i32) -> Result<Option<ProcessRef>> {
    for pid in all_pids()? {
        if namespace_inode(pid, "pid") == Some(namespace) && inner_pid(pid) == Some(inner) {
            return Ok(ProcessRef::of(pid).ok());
        }
    }
    Ok(None)
}

/// A process' id in its own, innermost pid namespace.
pub(crate) fn inner_pid(pid: i32) -> Option<i32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("NSpid:"))?.split_ascii_whitespace().last()?.parse().ok()
}

/// The arguments of a process; empty for a zombie and for kernel threads.
pub(crate) fn arguments(pid: i32) -> Vec<String> {
    let bytes = fs::read(Path::new("/proc").join(pid.to_string()).join("cmdline")).unwrap_or_default();
    bytes
        .split(|byte| *byte == 0)
        .filter(|argument| !argument.is_empty())
        .map(|argument| String::from_utf8_lossy(argument).into_owned())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_full_of_parentheses_does_not_confuse_the_fields() {
        let text = "12 (a) R (b)) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4242 20";
        let parse = |text| Stat::of(&fields_after_name(text)?);
        let stat = parse(text).unwrap();
        assert_eq!((stat.dead, stat.exiting, stat.start_ticks), (false, true, 4242));
        let zombie = |threads: &str| {
            let text = format!("12 (a) Z 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 {threads} 18 4242 20");
            Stat::of(&fields_after_name(&text).unwrap()).unwrap().dead
        };
        assert!(zombie("1") && zombie("0"));
        assert!(!zombie("2"), "another thread has not ended yet");
        assert!(parse("12 (a").is_none());
        assert!(parse("12 (a) R 1").is_none());
        assert!(parse("").is_none());
    }

    #[test]
    fn another_start_time_is_another_process() {
        let own = ProcessRef::of(i32::try_from(std::process::id()).unwrap()).unwrap();
        assert!(own.is_alive());
        assert!(!ProcessRef { start_ticks: own.start_ticks + 1, ..own }.is_alive());
        assert!(own.resident_bytes().unwrap() > 0);
    }

    #[test]
    fn a_process_that_has_ended_is_gone_even_before_it_is_reaped() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let process = ProcessRef::of(i32::try_from(child.id()).unwrap()).unwrap();
        assert!(process.is_alive());
        process.signal(Signal::SIGKILL).unwrap();
        process.wait_gone(Duration::from_secs(5)).unwrap();
        child.wait().unwrap();
        process.signal(Signal::SIGKILL).unwrap();
    }
}
