//! What processes have used: memory and processor time.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::unistd::{SysconfVar, sysconf};

use crate::host::Host;
use crate::process::{ProcessRef, stat_fields};

/// What a process uses now, and has used since its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Resident memory in bytes, what it shares with others included.
    pub resident: u64,
    /// Its share of resident memory in bytes: of pages that several processes have, each counts its part.
    pub proportional: u64,
    /// Processor time of all its threads, in user and system mode; in steps of the kernel's clock, 10 ms.
    pub processor: Duration,
}

impl ProcessRef {
    /// What it uses.
    ///
    /// # Errors
    /// When it is gone.
    pub fn usage(self) -> Result<Usage> {
        let path = format!("/proc/{}/smaps_rollup", self.pid);
        let memory = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
        let bytes = |field| kib(&memory, field).with_context(|| format!("{path} has no {field}"));
        let stat = stat_fields(self.pid).with_context(|| format!("process {} is gone", self.pid))?;
        let per_second = sysconf(SysconfVar::CLK_TCK)?.context("the kernel's clock has no rate")?;
        let usage = Usage {
            resident: bytes("Rss:")? * 1024,
            proportional: bytes("Pss:")? * 1024,
            processor: Duration::from_secs_f64(processor_ticks(&stat)? as f64 / per_second as f64),
        };
        // Asked last: all of it was this process', if that is there still.
        anyhow::ensure!(self.is_alive(), "process {} has ended", self.pid);
        Ok(usage)
    }
}

impl Host {
    /// The running processes of the host whose program has this name.
    ///
    /// # Errors
    /// When `/proc` cannot be read.
    pub fn processes_of(&self, program: &str) -> Result<Vec<ProcessRef>> {
        let is_it = |arguments: &[String]| {
            let first = arguments.first().map(Path::new);
            first.and_then(Path::file_name).is_some_and(|name| name == program)
        };
        let processes = self.processes()?.into_iter();
        Ok(processes.filter(|(_, arguments)| is_it(arguments)).map(|(process, _)| process).collect())
    }

    /// Bytes that the host has sent on the underlay.
    ///
    /// # Errors
    /// When the kernel does not say.
    pub fn underlay_bytes_sent(&self) -> Result<u64> {
        let table = self.net().run(|| fs::read_to_string("/proc/thread-self/net/dev"))??;
        bytes_sent(&table, crate::underlay::HOST_IFACE).context("/proc/net/dev has no underlay device")
    }
}

/// A field of `/proc/PID/smaps_rollup` (proc_pid_smaps(5)), in KiB.
fn kib(text: &str, field: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(field))?.trim().strip_suffix("kB")?.trim().parse().ok()
}

/// Fields 14 and 15 of `/proc/PID/stat` (proc_pid_stat(5)); the fields given begin with the third.
fn processor_ticks(fields: &[String]) -> Result<u64> {
    let ticks = |number: usize| fields.get(number - 3).and_then(|field| field.parse::<u64>().ok());
    ticks(14).zip(ticks(15)).map(|(user, system)| user + system).context("/proc/PID/stat is short")
}

/// The ninth column of a device in `/proc/net/dev` (proc_pid_net(5)).
fn bytes_sent(table: &str, device: &str) -> Option<u64> {
    let of_device = |line: &str| {
        let (name, columns) = line.split_once(':')?;
        (name.trim() == device).then(|| columns.split_ascii_whitespace().nth(8)?.parse().ok())?
    };
    table.lines().find_map(of_device)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_knows_what_it_uses() {
        let own = ProcessRef::of(i32::try_from(std::process::id()).unwrap()).unwrap();
        let before = own.usage().unwrap();
        assert!(before.proportional > 0 && before.resident >= before.proportional);
        let mut sum = 0u64;
        while own.usage().unwrap().processor == before.processor {
            sum = (0..1_000_000u64).fold(sum, |sum, n| sum.wrapping_mul(31).wrapping_add(n));
        }
        assert_ne!(sum, 1);
        assert!(ProcessRef { start_ticks: own.start_ticks + 1, ..own }.usage().is_err());
    }

    #[test]
    fn the_right_columns_are_read() {
        let rollup = "00400000-7ffe0000 ---p 00000000 00:00 0 [rollup]\nRss:    2048 kB\nPss:     100 kB\nPss_Dirty: 7 kB\n";
        assert_eq!(
            (kib(rollup, "Rss:"), kib(rollup, "Pss:"), kib(rollup, "Swap:")),
            (Some(2048), Some(100), None)
        );
        let fields: Vec<String> = (3..20).map(|number: u32| (number * 100).to_string()).collect();
        assert_eq!(processor_ticks(&fields).unwrap(), 1400 + 1500);
        assert!(processor_ticks(&fields[..12]).is_err());
        let table = "Inter-| Receive | Transmit\n face |bytes ...\n  eth0: 1 2 3 4 5 6 7 8 90 10\n eth01: 0 0 0 0 0 0 0 0 7 0\n";
        assert_eq!(
            (bytes_sent(table, "eth0"), bytes_sent(table, "eth01"), bytes_sent(table, "lo")),
            (Some(90), Some(7), None)
        );
    }
}
