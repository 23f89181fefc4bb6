//! Pid 1 of a host: makes the host's private files, reaps, and keeps the namespaces until it is killed.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, dup2_stdin, dup2_stdout, sethostname, setsid};

use crate::process::ProcessRef;

/// Name of the hidden subcommand that is pid 1 of a host.
pub(crate) const HOST_INIT: &str = "host-init";

/// What a holder is to be.
#[derive(Clone, Debug, PartialEq, Eq, clap::Args)]
pub(crate) struct HolderSpec {
    /// Host name inside.
    #[arg(long)]
    pub(crate) host: String,
    /// The host's directory on the real machine; it also says whose the process is.
    #[arg(long)]
    pub(crate) dir: PathBuf,
    /// The holder of the underlay or of a router: it needs no files of its own.
    #[arg(long)]
    pub(crate) switch: bool,
    /// The CNI plugin, to appear as /opt/cni/bin/mesh-cni.
    #[arg(long)]
    pub(crate) cni: Option<PathBuf>,
}

/// Directories of a host that outlive a restart of its daemon, and where the host sees them.
pub(crate) const PRIVATE_DIRS: [(&str, &str); 3] =
    [("etc", "/etc/meshd"), ("state", "/var/lib/meshd"), ("cni", "/etc/cni/net.d")];

/// Directories that a host may change as it likes without the machine noticing.
const OVERLAID: [&str; 3] = ["/etc", "/opt", "/var/lib"];

/// Starts a holder. `record` runs before it does anything: when this process dies before or in it, the
/// holder sees its standard input end and goes away, so no holder is ever unrecorded.
///
/// # Errors
/// When namespaces cannot be made, or the holder fails; its own words are in the error.
pub(crate) fn start(
    helper: &[String],
    spec: &HolderSpec,
    record: impl FnOnce(ProcessRef) -> Result<()>,
) -> Result<(ProcessRef, Child)> {
    let (program, prefix) = helper.split_first().context("the lab's helper command is empty")?;
    fs::create_dir_all(&spec.dir).with_context(|| format!("creating {}", spec.dir.display()))?;
    let log = log_file(&spec.dir.join("holder.log"))?;
    let mut command = Command::new(program);
    command.args(prefix).arg(HOST_INIT).arg("--host").arg(&spec.host).arg("--dir").arg(&spec.dir);
    if spec.switch {
        command.arg("--switch");
    }
    if let Some(cni) = &spec.cni {
        command.arg("--cni").arg(cni);
    }
    command.current_dir("/").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(log);

    // A thread of its own is moved into fresh namespaces; its first child is pid 1 there.
    let spawned = thread::scope(|scope| {
        let thread = scope.spawn(|| -> Result<Child> {
            unshare(
                CloneFlags::CLONE_NEWNS
                    | CloneFlags::CLONE_NEWNET
                    | CloneFlags::CLONE_NEWUTS
                    | CloneFlags::CLONE_NEWPID,
            )
            .context("making namespaces (the lab needs root with CAP_SYS_ADMIN and CAP_NET_ADMIN)")?;
            command.spawn().with_context(|| format!("starting {program}"))
        });
        thread.join()
    });
    let mut child = match spawned {
        Ok(child) => child?,
        Err(panic) => std::panic::resume_unwind(panic),
    };
    let process = i32::try_from(child.id()).context("process id").and_then(ProcessRef::of);
    let outcome = process.and_then(|process| {
        record(process)?;
        converse(&mut child).with_context(|| format!("host {}", spec.host))?;
        Ok(process)
    });
    match outcome {
        Ok(process) => Ok((process, child)),
        Err(error) => {
            // It may have ended by itself; reaping is what counts.
            let _ = child.kill();
            child.wait().context("reaping the holder")?;
            Err(error)
        }
    }
}

/// Tells the holder to go on and waits until it is ready.
fn converse(child: &mut Child) -> Result<()> {
    let mut input = child.stdin.take().context("the holder has no standard input")?;
    input.write_all(b"go\n").context("the holder ended at once; is the helper command right?")?;
    let mut answer = String::new();
    child.stdout.take().context("the holder has no standard output")?.read_to_string(&mut answer)?;
    match answer.trim() {
        "ready" => Ok(()),
        "" => bail!("the holder ended without a word; its log is beside its files"),
        error => bail!("{error}"),
    }
}

/// The hidden subcommand `host-init`. Returns only on failure or when told to end.
pub(crate) fn host_init(spec: &HolderSpec) -> Result<()> {
    ensure!(
        std::process::id() == 1,
        "host-init is started by the lab itself, as pid 1 of a new pid namespace"
    );
    setsid().context("starting a session")?;
    SigSet::all().thread_block()?;
    let mut go = String::new();
    io::stdin().lock().read_line(&mut go)?;
    if go != "go\n" {
        bail!("the starting process went away");
    }
    let made = make_host(spec);
    let mut out = io::stdout().lock();
    match &made {
        Ok(()) => writeln!(out, "ready")?,
        Err(error) => writeln!(out, "{error:#}")?,
    }
    out.flush()?;
    made?;
    let null = OpenOptions::new().read(true).write(true).open("/dev/null").context("opening /dev/null")?;
    dup2_stdin(&null)?;
    dup2_stdout(&null)?;
    reap_until_told()
}

fn reap_until_told() -> Result<()> {
    let signals = SigSet::all();
    let mut log = io::stderr().lock();
    loop {
        if matches!(signals.wait()?, Signal::SIGTERM | Signal::SIGINT) {
            return Ok(());
        }
        loop {
            match waitpid(None::<Pid>, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, status)) => writeln!(log, "{pid} exited {status}")?,
                Ok(WaitStatus::Signaled(pid, signal, _)) => writeln!(log, "{pid} killed {signal}")?,
                Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => break,
                // Stopped or traced: not an end.
                Ok(_) => {}
                Err(errno) => bail!("waiting for children: {errno}"),
            }
        }
    }
}

/// How a daemonised process of the host ended, from the holder's log; `None` while it runs.
pub(crate) fn ending(dir: &Path, inner_pid: i32) -> Result<Option<String>> {
    let path = dir.join("holder.log");
    let file = File::open(&path).with_context(|| format!("opening {}", path.display()))?;
    let prefix = format!("{inner_pid} ");
    let mut last = None;
    for line in BufReader::new(file).lines() {
        if let Some(ending) = line?.strip_prefix(&prefix) {
            last = Some(ending.to_owned());
        }
    }
    Ok(last)
}

fn make_host(spec: &HolderSpec) -> Result<()> {
    mount_at(None, "/", None, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None)?;
    sethostname(&spec.host).context("setting the host name")?;
    if !spec.switch {
        private_files(&spec.dir, spec.cni.as_deref())?;
    }
    fresh_proc_and_sys()?;
    if !spec.switch {
        mount_at(
            Some("tmpfs"),
            "/run",
            Some("tmpfs"),
            MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
            Some("mode=0755"),
        )?;
        for dir in ["/run/netns", "/run/lock"] {
            fs::create_dir(dir).with_context(|| format!("creating {dir}"))?;
        }
    }
    run_tool(Command::new("ip").args(["link", "set", "lo", "up"]))
}

/// Overlays with the upper half in memory, then the host's own directories on top: missing mount points
/// are created in the overlay and never on the machine.
fn private_files(dir: &Path, cni: Option<&Path>) -> Result<()> {
    let memory = dir.join("overlay");
    create_private(&memory)?;
    let memory = memory.to_str().context("the lab's directory is not UTF-8")?;
    mount_at(Some("tmpfs"), memory, Some("tmpfs"), MsFlags::empty(), Some("mode=0700"))?;
    for lower in OVERLAID {
        let half = |kind: &str| -> Result<String> {
            let path = format!("{memory}/{}.{kind}", lower.trim_start_matches('/').replace('/', "-"));
            fs::create_dir(&path).with_context(|| format!("creating {path}"))?;
            Ok(path)
        };
        let options = format!("lowerdir={lower},upperdir={},workdir={}", half("upper")?, half("work")?);
        mount_at(Some("overlay"), lower, Some("overlay"), MsFlags::empty(), Some(&options))
            .context("a host needs the kernel's overlay file system (`modprobe overlay` loads it)")?;
    }
    for (name, target) in PRIVATE_DIRS {
        let source = dir.join(name);
        create_private(&source)?;
        fs::create_dir_all(target).with_context(|| format!("creating {target}"))?;
        mount_at(source.to_str(), target, None, MsFlags::MS_BIND, None)?;
    }
    let Some(cni) = cni else { return Ok(()) };
    fs::create_dir_all("/opt/cni/bin").context("creating /opt/cni/bin")?;
    let plugin = "/opt/cni/bin/mesh-cni";
    File::create(plugin).with_context(|| format!("creating {plugin}"))?;
    mount_at(cni.to_str(), plugin, None, MsFlags::MS_BIND, None)
}

/// `/proc` of the new pid namespace, `/sys` of the new network namespace; the control groups stay.
fn fresh_proc_and_sys() -> Result<()> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount_at(Some("proc"), "/proc", Some("proc"), flags, None)?;
    let cgroup = File::open("/sys/fs/cgroup");
    mount_at(Some("sysfs"), "/sys", Some("sysfs"), flags, None)?;
    if let Ok(old) = cgroup {
        use std::os::fd::AsRawFd;
        let source = format!("/proc/self/fd/{}", old.as_raw_fd());
        mount_at(Some(&source), "/sys/fs/cgroup", None, MsFlags::MS_BIND | MsFlags::MS_REC, None)?;
    }
    Ok(())
}

fn mount_at(
    source: Option<&str>,
    target: &str,
    kind: Option<&str>,
    flags: MsFlags,
    options: Option<&str>,
) -> Result<()> {
    mount(source, target, kind, flags, options).with_context(|| {
        let what = kind.or(source).unwrap_or("private propagation");
        format!("mounting {what} on {target}")
    })
}

fn create_private(dir: &Path) -> Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .with_context(|| format!("creating {}", dir.display()))
}

/// Opens a log for appending.
pub(crate) fn log_file(path: &Path) -> Result<File> {
    OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)
        .with_context(|| format!("opening {}", path.display()))
}

/// Runs a tool to its end; its standard error is in the error.
pub(crate) fn run_tool(command: &mut Command) -> Result<()> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("running {program:?} (is the Debian package that has it installed?)"))?;
    if output.status.success() {
        return Ok(());
    }
    bail!("{program} failed ({}): {}", output.status, String::from_utf8_lossy(&output.stderr).trim())
}

/// The hidden subcommand `spawn-detached`: starts a program that becomes a child of pid 1, so that the
/// host itself reaps it, and prints its process id. Standard error is the log.
pub(crate) fn spawn_detached(command: &[String]) -> Result<()> {
    let (program, args) = command.split_first().context("no command given")?;
    setsid().context("starting a session")?;
    let log = File::options().append(true).open("/proc/self/fd/2").context("opening the log again")?;
    let child = Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .stdout(log)
        .stderr(Stdio::inherit())
        .spawn()
        .with_context(|| format!("starting {program}"))?;
    writeln!(io::stdout(), "{}", child.id())?;
    Ok(())
}

/// Exit code for a shell: the command's own, or 128 and the signal that ended it.
pub(crate) fn exit_code(status: ExitStatus) -> i32 {
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}
