//! Hosts and their daemons.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use mesh_sys::netns::NetNs;
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::cni::{self, Container, Verb};
use crate::family::Family;
use crate::holder;
use crate::lab::Shared;
use crate::ping;
use crate::pod::{Pod, succeed};
use crate::process::{self, ProcessRef};
use crate::space::Space;
use crate::state::{DaemonState, HostState, PodState, check_name};
use crate::wait::poll_until_some;

/// Name of the hidden subcommand that starts a daemon.
pub(crate) const SPAWN_DETACHED: &str = "spawn-detached";

/// A running process ends within this time of SIGKILL, or something is badly wrong.
const KILL_PATIENCE: Duration = Duration::from_secs(10);

/// A host of a lab. Clones are the same host.
#[derive(Clone, Debug)]
pub struct Host(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    lab: Arc<Shared>,
    name: String,
    number: u8,
    dir: PathBuf,
    space: Space,
    /// The holder, when this process started it and has to reap it.
    child: Mutex<Option<Child>>,
}

/// A daemon as it was started last; it may have ended since.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Daemon {
    /// The process as the lab sees it.
    pub process: ProcessRef,
    /// Its id inside the host.
    pub inner_pid: i32,
}

impl Host {
    pub(crate) fn open(lab: Arc<Shared>, state: &HostState, child: Option<Child>) -> Result<Self> {
        let space = Space::open(state.holder.process).with_context(|| format!("host {}", state.name))?;
        let dir = lab.host_dir(&state.name);
        Ok(Self(Arc::new(Inner {
            lab,
            name: state.name.clone(),
            number: state.number,
            dir,
            space,
            child: Mutex::new(child),
        })))
    }

    /// Name of the host.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Its number, from 1.
    #[must_use]
    pub fn number(&self) -> u8 {
        self.0.number
    }

    /// Its own address on the underlay, behind a NAT a private one.
    ///
    /// # Panics
    /// When it has none of this family: then ask [`Host::address`].
    #[must_use]
    pub fn underlay(&self, family: Family) -> IpAddr {
        self.address(family).unwrap_or_else(|| panic!("{} has no {family} on the underlay", self.name()))
    }

    /// Its own address on the underlay, if it has one of this family.
    #[must_use]
    pub fn address(&self, family: Family) -> Option<IpAddr> {
        self.0.lab.network().plan().host_address(self.0.number, family)
    }

    /// Its directory on the real machine: `etc`, `state` and `cni` in it are `/etc/meshd`, `/var/lib/meshd`
    /// and `/etc/cni/net.d` of the host.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.0.dir
    }

    /// Its network namespace.
    #[must_use]
    pub fn net(&self) -> &NetNs {
        self.0.space.net()
    }

    /// A file of the host, reached from the real machine; `path` is relative to the host's root.
    pub(crate) fn file(&self, path: &str) -> PathBuf {
        self.0.space.root().join(path)
    }

    pub(crate) fn space(&self) -> &Space {
        &self.0.space
    }

    pub(crate) fn take_child(&self) -> Option<Child> {
        self.0.child.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// A command with the environment of a host and nothing else; the programs under test come first in
    /// `PATH`.
    #[must_use]
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command
            .env_clear()
            .env("PATH", self.0.lab.binaries().search_path())
            .env("HOME", "/root")
            .env("LANG", "C.UTF-8");
        if let Some(term) = std::env::var_os("TERM") {
            command.env("TERM", term);
        }
        command
    }

    pub(crate) fn command_of(&self, words: &[&str]) -> Result<Command> {
        let (program, args) = words.split_first().context("no command given")?;
        let mut command = self.command(program);
        command.args(args);
        Ok(command)
    }

    /// Starts a process in the host.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn spawn(&self, command: Command) -> Result<Child> {
        self.0.space.spawn(None, command)
    }

    /// Runs a command in the host to its end.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn exec(&self, command: &[&str]) -> Result<Output> {
        let mut command = self.command_of(command)?;
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Ok(self.spawn(command)?.wait_with_output()?)
    }

    /// Runs a command in the host and returns its output; its failure is an error.
    ///
    /// # Errors
    /// When it cannot be started, or fails.
    pub fn exec_ok(&self, command: &[&str]) -> Result<String> {
        succeed(command, &self.exec(command)?).with_context(|| format!("on {}", self.name()))
    }

    /// Processes of the host, with their arguments.
    ///
    /// # Errors
    /// When `/proc` cannot be read.
    pub fn processes(&self) -> Result<Vec<(ProcessRef, Vec<String>)>> {
        let namespace = self.0.lab.host_state(self.name())?.holder.pid_ns;
        let pids = process::all_pids()?;
        Ok(pids
            .into_iter()
            .filter(|pid| process::namespace_inode(*pid, "pid") == Some(namespace))
            .filter_map(|pid| Some((ProcessRef::of(pid).ok()?, process::arguments(pid))))
            .filter(|(process, _)| process.is_alive())
            .collect())
    }

    /// Where the daemon's output goes.
    #[must_use]
    pub fn log_path(&self) -> PathBuf {
        self.0.lab.dir().join("logs").join(format!("{}.log", self.name()))
    }

    /// What the daemon has printed so far, all its starts together.
    ///
    /// # Errors
    /// When the log cannot be read.
    pub fn log(&self) -> Result<String> {
        let path = self.log_path();
        let bytes = fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    fn log_tail(&self) -> String {
        let log = self.log().unwrap_or_default();
        let lines: Vec<_> = log.lines().collect();
        lines[lines.len().saturating_sub(12)..].join("\n")
    }

    /// Starts the daemon with the lab's own arguments (secret, `--join`) and `extra`.
    ///
    /// # Errors
    /// When it runs already, or ends at once; its last words are in the error.
    pub fn spawn_daemon(&self, extra: &[&str]) -> Result<Daemon> {
        let mut args = self.0.lab.daemon_args();
        args.extend(extra.iter().map(|&arg| arg.to_owned()));
        self.spawn_daemon_with(args)
    }

    /// Starts the daemon with exactly these arguments.
    ///
    /// # Errors
    /// As [`Host::spawn_daemon`].
    pub fn spawn_daemon_with(&self, args: Vec<String>) -> Result<Daemon> {
        let binary = self.0.lab.binaries().meshd.to_string_lossy().into_owned();
        self.spawn_program(&binary, args)
    }

    /// Starts any program in the daemon's place: same log, same book-keeping.
    ///
    /// # Errors
    /// As [`Host::spawn_daemon`].
    pub fn spawn_program(&self, program: &str, args: Vec<String>) -> Result<Daemon> {
        if self.daemon().is_some_and(|daemon| daemon.process.is_alive()) {
            bail!("the daemon of {} runs already", self.name());
        }
        let helper = self.0.lab.binaries().helper.clone();
        let (first, rest) = helper.split_first().context("the lab's helper command is empty")?;
        let mut command = self.command(first);
        command.args(rest).arg(SPAWN_DETACHED).arg("--").arg(program).args(&args);
        if let Some(filter) = self.0.lab.log_filter() {
            command.env("RUST_LOG", filter);
        }
        let log = holder::log_file(&self.log_path())?;
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log);
        let output = self.spawn(command)?.wait_with_output()?;
        let words = || {
            format!("{program} on {} could not be started; its log ends:\n{}", self.name(), self.log_tail())
        };
        let inner_pid: i32 = String::from_utf8_lossy(&output.stdout).trim().parse().with_context(words)?;
        let namespace = self.0.lab.host_state(self.name())?.holder.pid_ns;
        let process = process::find_in_namespace(namespace, inner_pid)?.with_context(words)?;
        self.0.lab.change_host(self.name(), |host| {
            host.daemon = Some(DaemonState { process, inner_pid, args: args.clone() });
        })?;
        Ok(Daemon { process, inner_pid })
    }

    /// The daemon that was started last, if there was one.
    #[must_use]
    pub fn daemon(&self) -> Option<Daemon> {
        let daemon = self.0.lab.host_state(self.name()).ok()?.daemon?;
        Some(Daemon { process: daemon.process, inner_pid: daemon.inner_pid })
    }

    fn last_daemon(&self) -> Result<Daemon> {
        self.daemon().with_context(|| format!("no daemon was started on {}", self.name()))
    }

    /// How the daemon ended (`exited 1`, `killed SIGKILL`); `None` while it runs.
    ///
    /// # Errors
    /// When none was started, or the holder's log cannot be read.
    pub fn daemon_ending(&self) -> Result<Option<String>> {
        let daemon = self.last_daemon()?;
        if daemon.process.is_alive() {
            return Ok(None);
        }
        let ending = poll_until_some("how the daemon ended", Duration::from_secs(2), || {
            holder::ending(self.dir(), daemon.inner_pid)
        })?;
        Ok(Some(ending))
    }

    /// Kills the daemon with SIGKILL and waits for its end. Its engines go on.
    ///
    /// # Errors
    /// When none was started, or it does not end.
    pub fn kill9_daemon(&self) -> Result<()> {
        let daemon = self.last_daemon()?;
        daemon.process.signal(Signal::SIGKILL)?;
        daemon.process.wait_gone(KILL_PATIENCE)
    }

    /// Asks the daemon to end (SIGTERM) and waits for it.
    ///
    /// # Errors
    /// When none was started, or it does not end within ten seconds.
    pub fn stop_daemon(&self) -> Result<()> {
        let daemon = self.last_daemon()?;
        daemon.process.signal(Signal::SIGTERM)?;
        daemon.process.wait_gone(KILL_PATIENCE)
    }

    /// Stops the daemon, if it runs, and starts it with its last arguments.
    ///
    /// # Errors
    /// When none was started, it does not end, or does not start.
    pub fn restart_daemon(&self) -> Result<Daemon> {
        let args = self.0.lab.host_state(self.name())?.daemon.context("no daemon was started")?.args;
        self.stop_daemon()?;
        self.spawn_daemon_with(args)
    }

    /// `meshctl status -o json`, run in the host.
    ///
    /// # Errors
    /// When the daemon does not answer.
    pub fn status(&self) -> Result<Value> {
        let text =
            self.exec_ok(&[&self.0.lab.binaries().meshctl.to_string_lossy(), "status", "-o", "json"])?;
        serde_json::from_str(&text).context("meshctl status printed something else than JSON")
    }

    /// The mesh addresses of the node.
    ///
    /// # Errors
    /// When the daemon does not answer or has no addresses yet.
    pub fn mesh_addresses(&self) -> Result<(Ipv4Addr, Ipv6Addr)> {
        let status = self.status()?;
        let addresses = &status["addresses"];
        let v4 = addresses["ipv4"].as_str().and_then(|text| text.parse().ok());
        let v6 = addresses["ipv6"].as_str().and_then(|text| text.parse().ok());
        v4.zip(v6)
            .with_context(|| format!("{} has no mesh addresses yet: {}", self.name(), status["membership"]))
    }

    /// Waits until the plugin says that it can attach pods (verb STATUS).
    ///
    /// # Errors
    /// When it does not within `timeout`, or the daemon has ended; its last words are in the error.
    pub fn wait_ready(&self, timeout: Duration) -> Result<()> {
        let mut ended = None;
        let ready = poll_until_some(&format!("{} ready to attach pods", self.name()), timeout, || {
            if let Some(daemon) = self.daemon()
                && !daemon.process.is_alive()
            {
                ended = Some(self.daemon_ending()?.unwrap_or_default());
                return Ok(Some(()));
            }
            cni::run(self, Verb::Status, None).map(|_| Some(()))
        });
        let last_words = || format!("the log of {} ends:\n{}", self.name(), self.log_tail());
        ready.with_context(last_words)?;
        match ended {
            Some(ending) => bail!("the daemon has ended ({ending}); {}", last_words()),
            None => Ok(()),
        }
    }

    /// Pings all targets from the host at once, the missing ones again every 200 ms, until each has answered or
    /// `timeout` has passed. Returns the time to the first answer of each, in the order of `targets`.
    ///
    /// # Errors
    /// When the sockets fail; an answer that does not come is in the result.
    pub fn sweep(&self, targets: &[IpAddr], timeout: Duration) -> Result<Vec<Option<Duration>>> {
        Ok(self.net().run(|| ping::sweep(targets, Instant::now() + timeout))??)
    }

    /// Makes a pod and attaches it.
    ///
    /// # Errors
    /// When the namespace exists, or the plugin refuses; the namespace is removed again then.
    pub fn add_pod(&self, name: &str) -> Result<Pod> {
        check_name("pod", name)?;
        self.exec_ok(&["ip", "netns", "add", name])?;
        let attached = self.attach(name);
        if attached.is_err() {
            self.exec_ok(&["ip", "netns", "delete", name])?;
        }
        attached
    }

    fn attach(&self, name: &str) -> Result<Pod> {
        let (container_id, netns) = (self.container_id(name), netns_path(name));
        let container = Container { id: &container_id, netns: &netns, previous: None };
        let result = cni::run(self, Verb::Add, Some(container))?;
        let (ipv4, ipv6) = cni::addresses(&result)?;
        let net = self.0.space.named_net(name)?;
        let state = PodState { name: name.to_owned(), container_id, result };
        self.0.lab.change_host(self.name(), |host| host.pods.push(state))?;
        Ok(Pod::new(self.clone(), name, net, ipv4, ipv6))
    }

    /// Detaches a pod and deletes its namespace.
    ///
    /// # Errors
    /// When there is no such pod, or the plugin fails.
    pub fn remove_pod(&self, name: &str) -> Result<()> {
        let pod = self.pod_state(name)?;
        let netns = netns_path(name);
        let container = Container { id: &pod.container_id, netns: &netns, previous: Some(&pod.result) };
        cni::run(self, Verb::Del, Some(container))?;
        self.exec_ok(&["ip", "netns", "delete", name])?;
        self.0.lab.change_host(self.name(), |host| host.pods.retain(|pod| pod.name != name))
    }

    /// A pod that somebody else attached, such as a container runtime: `netns` is a path inside the host.
    ///
    /// # Errors
    /// When the path is not that of a network namespace.
    pub fn foreign_pod(&self, name: &str, netns: &str, ipv4: Ipv4Addr, ipv6: Ipv6Addr) -> Result<Pod> {
        let net = self.0.space.run(None, || NetNs::open(netns))??;
        Ok(Pod::new(self.clone(), name, net, ipv4, ipv6))
    }

    /// The pods, in the order in which they were attached.
    ///
    /// # Errors
    /// When the namespace of one is gone.
    pub fn pods(&self) -> Result<Vec<Pod>> {
        self.0.lab.host_state(self.name())?.pods.iter().map(|pod| self.open_pod(pod)).collect()
    }

    /// A pod by number, from 0.
    ///
    /// # Errors
    /// When there are not that many.
    pub fn pod(&self, index: usize) -> Result<Pod> {
        let host = self.0.lab.host_state(self.name())?;
        let pod =
            host.pods.get(index).with_context(|| format!("{} has {} pods", self.name(), host.pods.len()))?;
        self.open_pod(pod)
    }

    /// A pod by name.
    ///
    /// # Errors
    /// When there is none; the error lists those there are.
    pub fn pod_named(&self, name: &str) -> Result<Pod> {
        self.open_pod(&self.pod_state(name)?)
    }

    fn pod_state(&self, name: &str) -> Result<PodState> {
        let pods = self.0.lab.host_state(self.name())?.pods;
        let known = || pods.iter().map(|pod| pod.name.as_str()).collect::<Vec<_>>().join(", ");
        let found = pods.iter().find(|pod| pod.name == name).cloned();
        found.with_context(|| format!("{} has no pod {name:?}; it has: {}", self.name(), known()))
    }

    fn open_pod(&self, pod: &PodState) -> Result<Pod> {
        let (ipv4, ipv6) = cni::addresses(&pod.result)?;
        Ok(Pod::new(self.clone(), &pod.name, self.0.space.named_net(&pod.name)?, ipv4, ipv6))
    }

    fn container_id(&self, pod: &str) -> String {
        format!("{}-{}-{pod}", self.0.lab.name(), self.name())
    }
}

fn netns_path(pod: &str) -> String {
    format!("/run/netns/{pod}")
}
