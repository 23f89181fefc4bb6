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
use crate::holder::{self, HolderSpec};
use crate::host::Host;
use crate::inspect::ClusterRanges;
use crate::network::Network;
use crate::plan::Segment;
use crate::pod::{POD_IFACE, Pod};
use crate::router;
use crate::space::Space;
use crate::state::{HolderState, HostState, LAB_ROOT, LabState, lab_dir};
use crate::topology::Topology;
use crate::underlay::{self, Neighbours};
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
    /// Number of hosts, called h1, h2 and so on.
    pub nodes: usize,
    /// How they are connected. By default all are on the public underlay.
    pub topology: Topology,
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
            topology: Topology::default(),
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
    /// As this process has seen it last; the file counts.
    network: Mutex<Network>,
    /// Copies of what never changes in the state.
    name: String,
    binaries: Binaries,
}

impl Shared {
    fn new(state: LabState, network: Network, log_filter: Option<String>) -> Result<Self> {
        let (name, binaries) = (state.name.clone(), state.binaries.clone());
        let (state, network) = (Mutex::new(state), Mutex::new(network));
        Ok(Self { dir: lab_dir(&name)?, log_filter, state, network, name, binaries })
    }

    /// The network as it is now; of a lab that is down, as it was when this process looked last.
    pub(crate) fn network(&self) -> Network {
        let mut known = self.network.lock().unwrap_or_else(PoisonError::into_inner);
        if let Ok(network) = Network::load(&self.dir) {
            *known = network;
        }
        known.clone()
    }

    /// Changes the network as it is now, whoever changed it before, and keeps everybody else from doing so meanwhile. When
    /// `change` fails, it is as it was.
    pub(crate) fn change_network<T>(&self, change: impl FnOnce(&mut Network) -> Result<T>) -> Result<T> {
        let _lock = Network::lock(&self.dir)?;
        let mut network = Network::load(&self.dir)?;
        let value = change(&mut network)?;
        network.save(&self.dir)?;
        *self.network.lock().unwrap_or_else(PoisonError::into_inner) = network;
        Ok(value)
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
    pub(crate) shared: Arc<Shared>,
    pub(crate) switch: Space,
    /// In the order of their numbers.
    pub(crate) routers: Vec<Space>,
    /// First processes of the switch and the routers, where this process has started them.
    children: Vec<Child>,
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
        options.topology.check().context("the topology")?;
        let routers = options.topology.routers.len();
        ensure!(
            options.nodes + routers <= MAX_HOSTS,
            "a lab has at most {MAX_HOSTS} hosts and routers together, not {} and {routers}",
            options.nodes
        );
        ensure!(
            options.topology.hosts_named() <= options.nodes,
            "the topology names h{}, but the lab has {} hosts",
            options.topology.hosts_named(),
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
        let network = Network { topology: options.topology, ..Network::default() };
        let mut daemon_args = vec![
            format!("--{}-file", options.secret.file()),
            format!("/etc/meshd/{}", options.secret.file()),
        ];
        let nodes = u8::try_from(options.nodes).context("number of hosts")?;
        match network.plan().join_addresses(nodes) {
            Some(addresses) => daemon_args
                .extend(addresses.iter().flat_map(|address| ["--join".to_owned(), address.to_string()])),
            None => ensure!(
                !options.daemons,
                "the topology has no host on the public underlay that every other one can call, so that the daemons \
                 could not find each other; a lab without daemons can have it"
            ),
        }
        daemon_args.extend(options.daemon_args.iter().cloned());
        let state = LabState::new(&options.name, options.binaries, daemon_args);
        state.save()?;
        let shared = Arc::new(Shared::new(state, network.clone(), options.log_filter)?);
        network.save(&shared.dir)?;
        fs::create_dir(shared.dir.join("logs"))?;

        let (switch, child) = start_holder(&shared, "switch", |state, holder| state.switch = Some(holder))?;
        underlay::make_switch(switch.net(), network.plan())?;
        underlay::nft(switch.net(), &underlay::rules(&network)?)?;
        let keep = AtomicBool::new(options.keep);
        let mut lab = Self {
            shared,
            switch,
            routers: Vec::new(),
            children: vec![child],
            hosts: Mutex::default(),
            neighbours: Neighbours::of_lab(options.nodes),
            keep,
        };
        progress("the underlay is there: 198.18.0.0/24 and fd00:18::/64");
        lab.add_routers(&network)?;
        if !lab.routers.is_empty() {
            progress(&format!("{} routers are there", lab.routers.len()));
        }

        lab.make_secret(options.secret)?;
        for _ in 0..options.nodes {
            lab.add_host()?;
        }
        let hosts = lab.hosts();
        progress(&format!("{} hosts are there", hosts.len()));
        lab.set_first_links(&network.topology.links)?;
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
        let routers = state.routers.iter().map(|router| Space::open(router.process).context("a router"));
        let routers = routers.collect::<Result<Vec<_>>>().with_context(broken)?;
        let network = Network::load(&lab_dir(name)?).with_context(broken)?;
        let shared = Arc::new(Shared::new(state.clone(), network, None)?);
        let hosts = state.hosts.iter().map(|host| Host::open(Arc::clone(&shared), host, None));
        let hosts = hosts.collect::<Result<Vec<_>>>().with_context(broken)?;
        Ok(Self {
            shared,
            switch,
            routers,
            children: Vec::new(),
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
        ensure!(
            hosts.len() + self.routers.len() < MAX_HOSTS,
            "the underlay has room for {MAX_HOSTS} hosts and routers"
        );
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
        let network = self.shared.change_network(|network| {
            let plan = network.plan();
            let figure = if plan.is_free(number) { Some(number) } else { plan.free_figure() };
            network.figures.insert(number, figure.context("the underlay has no address left")?);
            Ok(network.clone())
        })?;
        let (switch, plan) = (self.switch.net(), network.plan());
        underlay::plug(switch, host.net(), process.pid, plan, number, self.neighbours)?;
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

    /// Starts all routers, those nearer to the public underlay first.
    fn add_routers(&mut self, network: &Network) -> Result<()> {
        let plan = network.plan();
        for (_, name, _) in plan.routers() {
            let (space, child) = start_holder(&self.shared, &format!("router-{name}"), |state, holder| {
                state.routers.push(holder)
            })?;
            self.routers.push(space);
            self.children.push(child);
        }
        let mut order: Vec<u8> = plan.routers().map(|(number, _, _)| number).collect();
        order.sort_by_key(|number| plan.way_up(Segment(*number)).len());
        for number in order {
            let space = &self.routers[usize::from(number) - 1];
            router::plug(plan, number, self.switch.net(), space.net(), space.pid())
                .with_context(|| format!("router {number}"))?;
        }
        for (number, _, _) in plan.routers() {
            let net = self.routers[usize::from(number) - 1].net();
            underlay::ip_batch(net, &router::routes_down(plan, Some(number)))?;
        }
        underlay::route_down(self.switch.net(), plan)
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
}

impl Drop for Lab {
    fn drop(&mut self) {
        if self.keep.load(Ordering::Relaxed) {
            return;
        }
        let result = Self::down(self.shared.name());
        let mut children: Vec<Child> = self.lock_hosts().iter().filter_map(Host::take_child).collect();
        children.append(&mut self.children);
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

/// Starts the first process of the switch or of a router.
fn start_holder(
    shared: &Shared,
    what: &str,
    record: impl FnOnce(&mut LabState, HolderState),
) -> Result<(Space, Child)> {
    let host = format!("{}-{what}", shared.name);
    let spec = HolderSpec { host, dir: shared.dir.join(what), switch: true, cni: None };
    let (process, child) = holder::start(&shared.binaries.helper, &spec, |process| {
        let holder = Space::open(process)?.describe()?;
        shared.change(|state| record(state, holder))
    })?;
    Ok((Space::open(process)?, child))
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
