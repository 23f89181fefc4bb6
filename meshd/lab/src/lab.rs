//! Bringing a lab up, using it, and taking it down.

use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use mesh_sys::files;
use mesh_sys::packet::Frame;
use nix::unistd::geteuid;

use crate::binaries::Binaries;
use crate::capture::{self, RunningCapture, Where};
use crate::cni;
use crate::family::Family;
use crate::holder::{self, HolderSpec};
use crate::host::Host;
use crate::inspect::ClusterRanges;
use crate::pod::{POD_IFACE, Pod};
use crate::space::Space;
use crate::state::{HostState, LAB_ROOT, LabState, lab_dir};
use crate::underlay::{self, Link, Neighbours};
use crate::wait::poll_until;

/// The figures 1 to 253 of a /24 are for hosts.
const MAX_HOSTS: usize = 253;

/// What the nodes prove their right to join with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Secret {
    /// A random password in `/etc/meshd/password`.
    Password,
    /// A key made by `meshctl keygen` in `/etc/meshd/key`.
    Key,
}

impl Secret {
    fn file(self) -> &'static str {
        match self {
            Self::Password => "password",
            Self::Key => "key",
        }
    }
}

/// What to bring up.
#[derive(Clone, Debug)]
pub struct Options {
    /// Name of the lab: 1 to 32 lower-case letters, digits and hyphens.
    pub name: String,
    /// Number of hosts.
    pub nodes: usize,
    /// Pods of each host.
    pub pods: usize,
    /// Whether daemons are started. Pods need them.
    pub daemons: bool,
    /// What the nodes join with.
    pub secret: Secret,
    /// More arguments for every daemon.
    pub daemon_args: Vec<String>,
    /// `RUST_LOG` of the daemons.
    pub log_filter: Option<String>,
    /// How long the daemons may take to become ready.
    pub patience: Duration,
    /// The lab outlives the value that stands for it, even if bringing it up fails.
    pub keep: bool,
    /// The programs.
    pub binaries: Binaries,
}

impl Options {
    /// Three hosts without pods, daemons with a password.
    #[must_use]
    pub fn new(name: &str, binaries: Binaries) -> Self {
        Self {
            name: name.to_owned(),
            nodes: 3,
            pods: 0,
            daemons: true,
            secret: Secret::Password,
            daemon_args: Vec::new(),
            log_filter: None,
            patience: Duration::from_secs(30),
            keep: false,
            binaries,
        }
    }
}

/// What hosts and the lab share.
#[derive(Debug)]
pub(crate) struct Shared {
    dir: PathBuf,
    log_filter: Option<String>,
    state: Mutex<LabState>,
    /// Copies of what never changes in the state.
    name: String,
    binaries: Binaries,
}

impl Shared {
    fn new(state: LabState, log_filter: Option<String>) -> Result<Self> {
        let (name, binaries) = (state.name.clone(), state.binaries.clone());
        Ok(Self { dir: lab_dir(&name)?, log_filter, state: Mutex::new(state), name, binaries })
    }

    fn state(&self) -> MutexGuard<'_, LabState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change<T>(&self, change: impl FnOnce(&mut LabState) -> T) -> Result<T> {
        let mut state = self.state();
        let value = change(&mut state);
        state.save()?;
        Ok(value)
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    pub(crate) fn host_dir(&self, host: &str) -> PathBuf {
        self.dir.join("hosts").join(host)
    }

    pub(crate) fn binaries(&self) -> &Binaries {
        &self.binaries
    }

    pub(crate) fn log_filter(&self) -> Option<&str> {
        self.log_filter.as_deref()
    }

    pub(crate) fn daemon_args(&self) -> Vec<String> {
        self.state().daemon_args.clone()
    }

    pub(crate) fn host_state(&self, name: &str) -> Result<HostState> {
        let state = self.state();
        state
            .hosts
            .iter()
            .find(|host| host.name == name)
            .cloned()
            .with_context(|| format!("no host {name:?}"))
    }

    pub(crate) fn change_host(&self, name: &str, change: impl FnOnce(&mut HostState)) -> Result<()> {
        self.change(|state| {
            let host = state.hosts.iter_mut().find(|host| host.name == name);
            host.map(change).with_context(|| format!("no host {name:?}"))
        })?
    }
}

/// A lab that is up. Dropping it takes it down, unless it is to be kept.
#[derive(Debug)]
pub struct Lab {
    shared: Arc<Shared>,
    switch: Space,
    switch_child: Option<Child>,
    hosts: Mutex<Vec<Host>>,
    neighbours: Neighbours,
    keep: AtomicBool,
}

impl Lab {
    /// Brings a lab up; the daemons are ready and the pods attached when it returns.
    ///
    /// # Errors
    /// When a right or a program is missing, a lab of that name is up, or a step fails: then nothing is
    /// left, unless `keep` is set.
    pub fn up(options: Options) -> Result<Self> {
        Self::up_with(options, &|_| {})
    }

    /// As [`Lab::up`], with a word on each step.
    ///
    /// # Errors
    /// As [`Lab::up`].
    pub fn up_with(options: Options, progress: &(dyn Fn(&str) + Sync)) -> Result<Self> {
        check_rights(options.daemons)?;
        ensure!(
            (1..=MAX_HOSTS).contains(&options.nodes),
            "a lab has 1 to {MAX_HOSTS} nodes, not {}",
            options.nodes
        );
        ensure!(options.pods <= 250, "a host of the lab has at most 250 pods, not {}", options.pods);
        ensure!(
            options.pods == 0 || options.daemons,
            "pods need daemons: the plugin asks them for addresses"
        );
        if options.daemons {
            options.binaries.check()?;
        }
        let dir = lab_dir(&options.name)?;
        claim(&options.name, &dir)?;
        let (name, keep) = (options.name.clone(), options.keep);
        Self::build(options, progress).map_err(|error| {
            if keep {
                return error;
            }
            match Self::down(&name) {
                Ok(_) => error,
                Err(also) => error.context(format!("and the rest could not be removed: {also:#}")),
            }
        })
    }

    fn build(options: Options, progress: &(dyn Fn(&str) + Sync)) -> Result<Self> {
        let mut daemon_args = vec![
            format!("--{}-file", options.secret.file()),
            format!("/etc/meshd/{}", options.secret.file()),
            "--join".to_owned(),
            underlay::address(1, Family::V4).to_string(),
        ];
        daemon_args.extend(options.daemon_args.iter().cloned());
        let state = LabState::new(&options.name, options.binaries, daemon_args);
        state.save()?;
        let shared = Arc::new(Shared::new(state, options.log_filter)?);
        fs::create_dir(shared.dir.join("logs"))?;

        let switch_dir = shared.dir.join("switch");
        let spec =
            HolderSpec { host: format!("{}-switch", options.name), dir: switch_dir, switch: true, cni: None };
        let (process, child) = holder::start(&shared.binaries.helper, &spec, |process| {
            let holder = Space::open(process)?.describe()?;
            shared.change(|state| state.switch = Some(holder))
        })?;
        let switch = Space::open(process)?;
        underlay::make_switch(switch.net())?;
        let keep = AtomicBool::new(options.keep);
        let lab = Self {
            shared,
            switch,
            switch_child: Some(child),
            hosts: Mutex::default(),
            neighbours: Neighbours::of_lab(options.nodes),
            keep,
        };
        progress("the underlay is there: 198.18.0.0/24 and fd00:18::/64");

        lab.make_secret(options.secret)?;
        for _ in 0..options.nodes {
            lab.add_host()?;
        }
        let hosts = lab.hosts();
        progress(&format!("{} hosts are there", hosts.len()));
        if options.daemons {
            for host in &hosts {
                host.spawn_daemon(&[])?;
            }
            progress("the daemons have been started");
            in_parallel(&hosts, |host| host.wait_ready(options.patience))?;
            progress("the daemons are ready");
            in_parallel(&hosts, |host| {
                (1..=options.pods).try_for_each(|number| host.add_pod(&format!("p{number}")).map(drop))
            })?;
            if options.pods > 0 {
                progress(&format!("{} pods are attached", options.pods * hosts.len()));
            }
        }
        Ok(lab)
    }

    /// A lab that another process, or an earlier value of this one, brought up. It is kept when the value
    /// goes.
    ///
    /// # Errors
    /// When it is not up, or a host of it is gone.
    pub fn open(name: &str) -> Result<Self> {
        check_rights(false)?;
        let state = LabState::load(name)?;
        let broken =
            || format!("lab {name:?} is broken; `meshctl lab down --name {name}` removes what is left");
        let switch = state.switch.as_ref().with_context(broken)?.process;
        let switch = Space::open(switch).context("the underlay").with_context(broken)?;
        let shared = Arc::new(Shared::new(state.clone(), None)?);
        let hosts = state.hosts.iter().map(|host| Host::open(Arc::clone(&shared), host, None));
        let hosts = hosts.collect::<Result<Vec<_>>>().with_context(broken)?;
        Ok(Self {
            shared,
            switch,
            switch_child: None,
            neighbours: Neighbours::of_lab(hosts.len()),
            hosts: Mutex::new(hosts),
            keep: AtomicBool::new(true),
        })
    }

    /// Name of the lab.
    #[must_use]
    pub fn name(&self) -> &str {
        self.shared.name()
    }

    /// Its directory: `logs` is in it.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.shared.dir()
    }

    /// The command line tool that the lab uses.
    #[must_use]
    pub fn meshctl(&self) -> &Path {
        &self.shared.binaries.meshctl
    }

    /// Whether dropping the value leaves the lab up.
    pub fn set_keep(&self, keep: bool) {
        self.keep.store(keep, Ordering::Relaxed);
    }

    /// Adds a host to the underlay. The lab's secret is in its `/etc/meshd`; no daemon runs yet.
    ///
    /// # Errors
    /// When a step fails.
    pub fn add_host(&self) -> Result<Host> {
        let mut hosts = self.lock_hosts();
        ensure!(hosts.len() < MAX_HOSTS, "the underlay has room for {MAX_HOSTS} hosts");
        let number = u8::try_from(hosts.len() + 1).context("number of the host")?;
        let name = format!("h{number}");
        let spec = HolderSpec {
            host: name.clone(),
            dir: self.shared.host_dir(&name),
            switch: false,
            cni: Some(self.shared.binaries.mesh_cni.clone()).filter(|path| path.is_file()),
        };
        let (process, child) = holder::start(&self.shared.binaries.helper, &spec, |process| {
            let holder = Space::open(process)?.describe()?;
            let state = HostState { name: name.clone(), number, holder, daemon: None, pods: Vec::new() };
            self.shared.change(|lab| lab.hosts.push(state))
        })?;
        let host = Host::open(Arc::clone(&self.shared), &self.shared.host_state(&name)?, Some(child))?;
        underlay::plug(self.switch.net(), host.net(), process.pid, number, self.neighbours)?;
        files::write_atomic(
            &host.dir().join("cni").join(cni::CONFLIST_NAME),
            cni::CONFLIST.as_bytes(),
            0o600,
        )?;
        for secret in [Secret::Password, Secret::Key] {
            let source = self.shared.dir.join(secret.file());
            if source.exists() {
                let bytes = files::read_secret(&source, 4096)?;
                files::write_atomic(&host.dir().join("etc").join(secret.file()), &bytes, 0o600)?;
            }
        }
        hosts.push(host.clone());
        Ok(host)
    }

    fn make_secret(&self, secret: Secret) -> Result<()> {
        let path = self.shared.dir.join(secret.file());
        match secret {
            Secret::Password => {
                let mut random = [0u8; 16];
                File::open("/dev/urandom")
                    .and_then(|mut file| file.read_exact(&mut random))
                    .context("/dev/urandom")?;
                let text: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
                files::write_atomic(&path, format!("{text}\n").as_bytes(), 0o600)?;
            }
            Secret::Key => {
                let output = std::process::Command::new(&self.shared.binaries.meshctl)
                    .arg("keygen")
                    .output()
                    .context("running meshctl keygen")?;
                ensure!(
                    output.status.success() && !output.stdout.is_empty(),
                    "meshctl keygen failed: {}",
                    String::from_utf8_lossy(&output.stderr).trim()
                );
                files::write_atomic(&path, &output.stdout, 0o600)?;
            }
        }
        Ok(())
    }

    fn lock_hosts(&self) -> MutexGuard<'_, Vec<Host>> {
        self.hosts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All hosts.
    #[must_use]
    pub fn hosts(&self) -> Vec<Host> {
        self.lock_hosts().clone()
    }

    /// A host by position, from 0.
    ///
    /// # Panics
    /// When there are not that many.
    #[must_use]
    pub fn host(&self, index: usize) -> Host {
        self.lock_hosts()[index].clone()
    }

    /// A host by name.
    ///
    /// # Errors
    /// When there is none; the error lists those there are.
    pub fn host_named(&self, name: &str) -> Result<Host> {
        let hosts = self.lock_hosts();
        let known = || hosts.iter().map(Host::name).collect::<Vec<_>>().join(", ");
        let found = hosts.iter().find(|host| host.name() == name).cloned();
        found.with_context(|| format!("lab {:?} has no host {name:?}; it has: {}", self.name(), known()))
    }

    /// All pods of all hosts.
    ///
    /// # Errors
    /// When the namespace of one is gone.
    pub fn pods(&self) -> Result<Vec<Pod>> {
        let mut pods = Vec::new();
        for host in self.hosts() {
            pods.extend(host.pods()?);
        }
        Ok(pods)
    }

    /// The cluster's ranges, as the first host that is in a cluster says.
    ///
    /// # Errors
    /// When none is.
    pub fn cluster_ranges(&self) -> Result<ClusterRanges> {
        let mut last = anyhow!("the lab has no hosts");
        for host in self.hosts() {
            let ranges = host.status().and_then(|status| {
                let cluster = &status["cluster"];
                let ipv4 = cluster["ipv4"].as_str().context("no cluster yet")?.parse()?;
                let ipv6 = cluster["ipv6"].as_str().context("no cluster yet")?.parse()?;
                Ok(ClusterRanges { ipv4, ipv6 })
            });
            match ranges {
                Ok(ranges) => return Ok(ranges),
                Err(error) => last = error.context(format!("host {}", host.name())),
            }
        }
        Err(last)
    }

    /// Starts to capture. The inspector sees every frame and says what is wrong with it, if anything is.
    ///
    /// # Errors
    /// When there is no such interface, or no packet socket.
    pub fn capture<I>(&self, place: &Where, inspector: I) -> Result<RunningCapture<I>>
    where
        I: FnMut(&Frame<'_>) -> Option<String> + Send + 'static,
    {
        match place {
            Where::Underlay => capture::start(self.switch.net(), None, inspector),
            Where::Host(host, interface) => capture::start(host.net(), interface.as_deref(), inspector),
            Where::Pod(pod) => capture::start(pod.net(), Some(POD_IFACE), inspector),
        }
    }

    /// Drops everything between two hosts, both directions.
    ///
    /// # Errors
    /// When nftables refuses.
    pub fn cut(&self, a: &Host, b: &Host) -> Result<()> {
        underlay::set_links(self.switch.net(), &[(a.number(), b.number())], Link::Cut)
    }

    /// Ends a cut between two hosts.
    ///
    /// # Errors
    /// When nftables refuses.
    pub fn heal(&self, a: &Host, b: &Host) -> Result<()> {
        underlay::set_links(self.switch.net(), &[(a.number(), b.number())], Link::Whole)
    }

    /// Drops everything between hosts of different groups, all pairs at the same moment.
    ///
    /// # Errors
    /// When nftables refuses.
    pub fn cut_groups(&self, groups: &[&[Host]]) -> Result<()> {
        let mut pairs = Vec::new();
        for (number, group) in groups.iter().enumerate() {
            for other in &groups[number + 1..] {
                pairs.extend(group.iter().flat_map(|a| other.iter().map(|b| (a.number(), b.number()))));
            }
        }
        underlay::set_links(self.switch.net(), &pairs, Link::Cut)
    }

    /// Ends all cuts.
    ///
    /// # Errors
    /// When nftables refuses.
    pub fn heal_all(&self) -> Result<()> {
        underlay::heal_all(self.switch.net())
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if self.keep.load(Ordering::Relaxed) {
            return;
        }
        let result = Self::down(self.shared.name());
        let mut children: Vec<Child> = self.lock_hosts().iter().filter_map(Host::take_child).collect();
        children.extend(self.switch_child.take());
        for mut child in children {
            // Killed above; it only has to be reaped. It cannot be as long as a command that somebody
            // started in the host is not: then it stays a zombie until this process ends.
            let _ = poll_until("the holder's end", Duration::from_secs(1), || {
                !matches!(child.try_wait(), Ok(None))
            });
        }
        if let Err(error) = result {
            tracing::error!(lab = self.shared.name(), error = format!("{error:#}"), "taking the lab down");
        }
    }
}

/// Makes the lab's directory: whoever makes it, owns the name.
fn claim(name: &str, dir: &Path) -> Result<()> {
    loop {
        fs::create_dir_all(LAB_ROOT).with_context(|| format!("creating {LAB_ROOT}"))?;
        let Err(error) = fs::DirBuilder::new().mode(0o700).create(dir) else { return Ok(()) };
        if error.kind() == ErrorKind::AlreadyExists {
            bail!(
                "lab {name:?} is up already; `meshctl lab down --name {name}` takes it down, `--name` starts another"
            );
        }
        // Otherwise the last other lab was taken down just now, and the root with it.
        if error.kind() != ErrorKind::NotFound {
            return Err(error).with_context(|| format!("creating {}", dir.display()));
        }
    }
}

/// Root, and the tunnel device where it is needed.
pub(crate) fn check_rights(tun: bool) -> Result<()> {
    ensure!(geteuid().is_root(), "the lab needs root: it makes namespaces and network devices");
    if tun {
        ensure!(
            Path::new("/dev/net/tun").exists(),
            "the lab needs /dev/net/tun: load the module with `modprobe tun`, or hand the device to the container"
        );
    }
    Ok(())
}

/// Does the same on every host at once; the first error wins.
pub(crate) fn in_parallel<T: Sync>(items: &[T], work: impl Fn(&T) -> Result<()> + Sync) -> Result<()> {
    thread::scope(|scope| {
        let threads: Vec<_> = items.iter().map(|item| scope.spawn(|| work(item))).collect();
        // All are waited for before the first error is told.
        let results = threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        results.collect::<Vec<_>>().into_iter().collect()
    })
}
