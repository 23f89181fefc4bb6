//! Entering the namespaces of a host.

use std::fs::File;
use std::os::fd::AsFd;
use std::panic::resume_unwind;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::thread;

use anyhow::{Context, Result, ensure};
use mesh_sys::netns::NetNs;
use nix::sched::{CloneFlags, setns, unshare};

use crate::process::{ProcessRef, namespace_inode};
use crate::state::HolderState;

/// The four namespaces of a host, held open.
#[derive(Debug)]
pub(crate) struct Space {
    holder: ProcessRef,
    mnt: File,
    uts: File,
    pid: File,
    net: NetNs,
}

impl Space {
    /// Opens the namespaces of a holder.
    ///
    /// # Errors
    /// When the holder is gone, also when its process id now belongs to another process.
    pub(crate) fn open(holder: ProcessRef) -> Result<Self> {
        let open = |kind: &str| {
            let path = format!("/proc/{}/ns/{kind}", holder.pid);
            File::open(&path).with_context(|| format!("opening {path}"))
        };
        let gone = || format!("the holder of the host, process {}, is gone", holder.pid);
        let space = Self {
            holder,
            mnt: open("mnt").with_context(gone)?,
            uts: open("uts").with_context(gone)?,
            pid: open("pid").with_context(gone)?,
            net: NetNs::open(format!("/proc/{}/ns/net", holder.pid)).with_context(gone)?,
        };
        // Asked last: whatever was opened before belonged to the holder, if it is still there now.
        ensure!(holder.is_alive(), gone());
        Ok(space)
    }

    /// The host's network namespace.
    pub(crate) fn net(&self) -> &NetNs {
        &self.net
    }

    /// Its first process.
    pub(crate) fn pid(&self) -> i32 {
        self.holder.pid
    }

    /// The host's root directory, reached from the real machine.
    pub(crate) fn root(&self) -> PathBuf {
        format!("/proc/{}/root", self.holder.pid).into()
    }

    /// The network namespace that the host knows as `/run/netns/NAME`.
    pub(crate) fn named_net(&self, name: &str) -> Result<NetNs> {
        // Through /proc, because the name is bound in the host's mount namespace only.
        Ok(NetNs::open(format!("/proc/{}/root/run/netns/{name}", self.holder.pid))?)
    }

    /// The figures by which leftovers are recognised.
    pub(crate) fn describe(&self) -> Result<HolderState> {
        let inode = |kind| {
            namespace_inode(self.holder.pid, kind)
                .with_context(|| format!("reading the {kind} namespace of the holder"))
        };
        Ok(HolderState { process: self.holder, pid_ns: inode("pid")?, net_ns: inode("net")? })
    }

    /// Runs `work` on a thread that sees the host's files, network and name, and whose children are
    /// processes of the host. The thread must not start threads (clone(2), EINVAL for CLONE_THREAD).
    pub(crate) fn run<T: Send>(&self, net: Option<&NetNs>, work: impl FnOnce() -> T + Send) -> Result<T> {
        let enter = || -> nix::Result<()> {
            // A mount namespace can only be entered with a root and working directory of one's own.
            unshare(CloneFlags::CLONE_FS)?;
            setns(&self.mnt, CloneFlags::CLONE_NEWNS)?;
            setns(&self.uts, CloneFlags::CLONE_NEWUTS)?;
            setns(&self.pid, CloneFlags::CLONE_NEWPID)?;
            setns(net.unwrap_or(&self.net).as_fd(), CloneFlags::CLONE_NEWNET)
        };
        thread::scope(|scope| {
            let thread = thread::Builder::new()
                .name("lab-space".to_owned())
                .spawn_scoped(scope, || enter().map(|()| work()))
                .context("starting a thread")?;
            match thread.join() {
                Ok(result) => result.context("entering the namespaces of the host"),
                Err(panic) => resume_unwind(panic),
            }
        })
    }

    /// Starts a process in the host, or in one of its pods.
    pub(crate) fn spawn(&self, net: Option<&NetNs>, mut command: Command) -> Result<Child> {
        let program = command.get_program().to_string_lossy().into_owned();
        let child = self.run(net, move || command.spawn())?;
        child.with_context(|| format!("starting {program:?}"))
    }
}
