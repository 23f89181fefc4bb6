//! Taking a lab down, whatever is left of it.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::Signal;

use crate::holder;
use crate::lab::{Lab, check_rights};
use crate::process::{self, ProcessRef};
use crate::space::Space;
use crate::state::{HolderState, LAB_ROOT, LabState, lab_dir};
use crate::wait::poll_until;

impl Lab {
    /// Takes a lab down, however far it came and whatever of it has crashed. Returns whether there was
    /// anything.
    ///
    /// # Errors
    /// When something of it is still there afterwards; the error names it.
    pub fn down(name: &str) -> Result<bool> {
        check_rights(false)?;
        let dir = lab_dir(name)?;
        let state = if dir.exists() { LabState::load(name).ok() } else { None };
        let mut holders: Vec<HolderState> = state.iter().flat_map(LabState::holders).cloned().collect();
        // A lab whose state is lost, or that died while it grew, is found by its holders' arguments.
        for process in stray_holders(&dir)? {
            if !holders.iter().any(|holder| holder.process == process) {
                holders.extend(Space::open(process).and_then(|space| space.describe()).ok());
            }
        }
        let existed = dir.exists() || !holders.is_empty();
        for holder in &holders {
            holder.process.signal(Signal::SIGKILL)?;
        }
        // The kernel ends whatever runs in their pid namespaces. Others may have entered the network.
        let mut left = Vec::new();
        let gone = poll_until("end of all processes of the lab", Duration::from_secs(10), || {
            left = leftovers(&holders);
            left.is_empty()
        });
        gone.with_context(|| format!("still there: {}", left.join("; ")))?;
        if dir.exists() {
            fs::remove_dir_all(&dir).with_context(|| format!("removing {}", dir.display()))?;
        }
        // Fails while other labs are up, as it should.
        let _ = fs::remove_dir(LAB_ROOT);
        Ok(existed)
    }
}

/// Holders of the lab in this directory, by their arguments.
fn stray_holders(dir: &Path) -> Result<Vec<ProcessRef>> {
    let mut found = Vec::new();
    for pid in process::all_pids()? {
        let arguments = process::arguments(pid);
        let Some(at) = arguments.iter().position(|argument| argument == "--dir") else { continue };
        let ours = arguments.iter().any(|argument| argument == holder::HOST_INIT)
            && arguments.get(at + 1).is_some_and(|argument| Path::new(argument).starts_with(dir))
            && process::inner_pid(pid) == Some(1);
        if ours {
            found.extend(ProcessRef::of(pid).ok());
        }
    }
    Ok(found)
}

/// Living processes in a namespace of one of the holders.
fn leftovers(holders: &[HolderState]) -> Vec<String> {
    let inside = |pid: i32| {
        let pid_ns = process::namespace_inode(pid, "pid");
        let net_ns = process::namespace_inode(pid, "net");
        holders.iter().any(|holder| pid_ns == Some(holder.pid_ns) || net_ns == Some(holder.net_ns))
    };
    let pids = process::all_pids().unwrap_or_default();
    let own = i32::try_from(std::process::id()).unwrap_or(-1);
    pids.into_iter()
        .filter(|pid| {
            *pid != own && inside(*pid) && ProcessRef::of(*pid).is_ok_and(|process| !process.is_doomed())
        })
        .map(|pid| format!("process {pid} ({})", process::arguments(pid).join(" ")))
        .collect()
}
