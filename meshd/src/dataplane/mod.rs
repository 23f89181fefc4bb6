//! Bringing the kernel of this host to the state that the node wants, and telling the node what it is like.
//!
//! The node says what should be; [`Plane`] looks at what is, and carries out the difference. That happens for every
//! new desired state, whenever the kernel tells of a change to something of ours, and every 30 s. Nothing is
//! assumed: a problem is what a last look still finds different.
//!
//! | part | concept |
//! |---|---|
//! | `plane` | one look, one attempt, what remains |
//! | `guard`, `keeper` | the nftables rules, and keeping them in force |
//! | `pods` | the bridge and its ports |
//! | `lanes` | tunnel engines and their peers |
//! | `routes` | routes of our protocol number |
//! | `nexthops` | the groups by which routes go over several devices |
//! | `settings` | values below `/proc/sys`, and what they were before |
//! | `facts` | what the host is like |
//!
//! # Fail closed
//! The guard and the routes that end come first. When one of them is refused, nothing that opens is done in that
//! attempt. Both stay when this process ends.

mod facts;
mod guard;
mod keeper;
mod lanes;
mod nexthops;
mod plane;
mod pods;
mod routes;
mod settings;

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use futures_util::FutureExt as _;
use mesh_core::api::{BRIDGE, Backend};
use mesh_core::host::{HostState, ROUTE_PROTOCOL};
use mesh_core::node::{HostFacts, Input, Problem};
use mesh_keys::WgSecret;
use mesh_sys::{nft, rtnl};
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};

use keeper::Keeper;
use plane::{ATTEMPTS, Attempt};

pub use plane::Plane;
pub use settings::changed_settings;

/// What the task needs to know.
#[derive(Debug)]
pub struct Options {
    /// The userspace engine.
    pub mesh_wg: PathBuf,
    /// Secrets of the lanes.
    pub lanes: Vec<LaneSecret>,
    /// The state directory, for settings of the host as they were before.
    pub state_dir: PathBuf,
    /// Where `/proc/sys` is, when not there.
    pub proc_sys: Option<PathBuf>,
}

/// The secret key of a lane.
#[derive(Debug)]
pub struct LaneSecret {
    /// Name of the device.
    pub device: String,
    /// Its key.
    pub secret: WgSecret,
}

/// Who carries the tunnels, and why.
pub fn backend() -> (Backend, String) {
    let why = "the kernel's WireGuard backend is not built into this version (mesh-wg carries the tunnels)";
    (Backend::Userspace, why.to_owned())
}

/// The latest desired state with its revision.
type Desired = watch::Receiver<Option<(u64, Arc<HostState>)>>;

/// Changes of devices come in bursts; this long after the first, the kernel is looked at.
const DEBOUNCE: Duration = Duration::from_millis(20);

/// How often to look at what the kernel tells nobody about.
const POLL: Duration = Duration::from_secs(1);

/// How often everything is looked at, whatever was told.
const FULL: Duration = Duration::from_secs(30);

/// How often the tunnels are asked about their peers.
const TUNNELS: Duration = Duration::from_secs(1);

/// Reading what the host is like may take long where others keep many routes: pauses between two reads are this
/// many times as long as the last one took.
const FACTS_SHARE: u32 = 20;

/// First pause before what failed is tried again; it doubles up to [`FULL`].
const FIRST_RETRY: Duration = Duration::from_secs(1);

/// Longest pause between two rounds that were caused by changes and ended with the same problems. Short enough for
/// an engine that ends meanwhile, long enough to be no load.
const LONGEST_SPACING: Duration = Duration::from_secs(1);

/// Runs until the receiver closes.
///
/// First sends [`Input::Host`]; then, after each new desired state, each relevant change in the kernel, and every
/// 30 s, [`Input::Applied`]. Sends [`Input::Host`] again when the host has changed, and [`Input::Tunnels`] every second
/// when the tunnels have.
///
/// # Errors
/// The kernel cannot be watched at all.
pub async fn run(options: Options, desired: Desired, inputs: mpsc::Sender<Input>) -> anyhow::Result<()> {
    let plane = Plane::open(options)?;
    let keeper = plane.keeper();
    // Watched before the first look: nothing can change unseen in between.
    let tables = nft::Monitor::open(vec![guard::inet(), guard::bridge()], vec![lock(&keeper).port()])?;
    let links = rtnl::Monitor::open()?;
    let names = plane.lane_names();
    let restored = Arc::new(Notify::new());
    let reconciler = Reconciler {
        plane: Arc::new(Mutex::new(plane)),
        links,
        desired: desired.clone(),
        inputs: inputs.clone(),
        names: names.clone(),
        facts: None,
        facts_rest: Instant::now(),
        devices: BTreeSet::new(),
        round_at: None,
        facts_at: None,
        retry: None,
        full_at: Instant::now() + FULL,
        later: false,
        problems: Vec::new(),
        spacing: Duration::ZERO,
        last_round: Instant::now(),
    };
    tokio::select! {
        ended = reconciler.run(Arc::clone(&restored)) => ended,
        ended = keep_guard(tables, keeper, restored) => ended,
        ended = report_tunnels(names, desired, inputs) => ended,
    }
}

/// Puts the guard back as soon as somebody else changes it; not held up by anything else.
async fn keep_guard(
    mut tables: nft::Monitor,
    keeper: Arc<Mutex<Keeper>>,
    restored: Arc<Notify>,
) -> anyhow::Result<()> {
    loop {
        let event = tables.next().await.context("watching nftables")?;
        let changed = !matches!(event, nft::Event::Deleted(_));
        let keeper = Arc::clone(&keeper);
        match tokio::task::spawn_blocking(move || lock(&keeper).restore(changed)).await? {
            Ok(true) => {
                tracing::warn!("somebody changed or flushed the mesh's nftables rules; they are back")
            }
            Ok(false) => continue,
            Err(error) => {
                tracing::warn!(%error, "the mesh's nftables rules were changed and cannot be restored")
            }
        }
        restored.notify_one();
    }
}

async fn report_tunnels(
    names: BTreeSet<String>,
    desired: Desired,
    inputs: mpsc::Sender<Input>,
) -> anyhow::Result<()> {
    let mut ticks = interval(TUNNELS);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut last = None;
    loop {
        ticks.tick().await;
        let mut devices = names.clone();
        if let Some((_, state)) = &*desired.borrow() {
            devices.extend(state.lanes.keys().cloned());
        }
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let found = tokio::task::spawn_blocking(move || lanes::tunnels(&devices, wall)).await?;
        if last.as_ref() == Some(&found) || (last.is_none() && found.is_empty()) {
            continue;
        }
        last = Some(found.clone());
        if inputs.send(Input::Tunnels(found)).await.is_err() {
            return Ok(());
        }
    }
}

/// Decides when to look, and what to tell the node.
struct Reconciler {
    plane: Arc<Mutex<Plane>>,
    links: rtnl::Monitor,
    desired: Desired,
    inputs: mpsc::Sender<Input>,
    /// Lanes whose keys we hold.
    names: BTreeSet<String>,
    /// As told last.
    facts: Option<HostFacts>,
    /// Until then the facts are not read again.
    facts_rest: Instant,
    /// Indices of our devices.
    devices: BTreeSet<u32>,
    /// When a round is due because something changed.
    round_at: Option<Instant>,
    /// When the facts are due because something changed.
    facts_at: Option<Instant>,
    /// When what failed is due again, and the pause before it.
    retry: Option<(Instant, Duration)>,
    full_at: Instant,
    /// Something changed that hardly concerns us: a round with the next poll.
    later: bool,
    /// Of the last round.
    problems: Vec<Problem>,
    /// Least time between the last round and one caused by a change.
    spacing: Duration,
    last_round: Instant,
}

/// The node is gone: there is nobody to tell.
struct Gone;

impl Reconciler {
    async fn run(mut self, restored: Arc<Notify>) -> anyhow::Result<()> {
        if self.report_facts().await?.is_err() {
            return Ok(());
        }
        self.desired.mark_changed();
        let mut polls = interval(POLL);
        polls.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let told = tokio::select! {
                changed = self.desired.changed() => {
                    if changed.is_err() {
                        return Ok(());
                    }
                    self.retry = None;
                    self.round("new desired state").await?
                }
                event = self.links.next() => {
                    self.note(&event.context("watching devices")?);
                    Ok(())
                }
                () = restored.notified() => self.round("guard restored").await?,
                () = at(self.round_at) => self.round("change in the kernel").await?,
                () = at(self.facts_at) => self.report_facts().await?,
                _ = polls.tick() => self.poll().await?,
            };
            if told.is_err() {
                return Ok(());
            }
        }
    }

    /// Whether a change concerns us, and how soon.
    fn note(&mut self, event: &rtnl::Event) {
        use rtnl::Event;
        tracing::trace!(?event, "kernel event");
        match event {
            Event::LinkChanged { name, .. } => {
                self.facts_soon();
                if name == BRIDGE || name.starts_with(pods::PORT_PREFIX) || self.is_lane(name) {
                    self.round_soon();
                }
            }
            Event::AddrChanged { index } => {
                self.facts_soon();
                if self.devices.contains(index) {
                    self.round_soon();
                }
            }
            Event::RouteChanged { protocol, .. } | Event::NexthopChanged { protocol, .. }
                if *protocol == ROUTE_PROTOCOL =>
            {
                self.round_soon()
            }
            // A route that replaces one of ours looks like this; so does everything a routing daemon does.
            Event::RouteChanged { .. } => {
                self.facts_soon();
                self.later = true;
            }
            // Likewise.
            Event::NexthopChanged { .. } => self.later = true,
            Event::NeighChanged { index } if self.devices.contains(index) => self.round_soon(),
            Event::NeighChanged { .. } | Event::RuleChanged => {}
            Event::Resync => {
                self.facts_soon();
                self.round_soon();
            }
            other => tracing::debug!(?other, "kernel event of an unknown kind"),
        }
    }

    fn is_lane(&self, name: &str) -> bool {
        name.starts_with("meshwg") || self.names.contains(name)
    }

    fn round_soon(&mut self) {
        let soon = (Instant::now() + DEBOUNCE).max(self.last_round + self.spacing);
        self.round_at.get_or_insert(soon);
    }

    fn facts_soon(&mut self) {
        self.facts_at.get_or_insert(Instant::now() + DEBOUNCE * 5);
    }

    /// What no event tells, and what is due by time.
    async fn poll(&mut self) -> anyhow::Result<Result<(), Gone>> {
        let now = Instant::now();
        let netfilter = self.on_plane(|plane| plane.bridge_netfilter()).await?;
        let known = self.facts.as_ref().map(|facts| facts.bridge_netfilter);
        match netfilter {
            Ok(value) if known != Some(value) => {
                tracing::info!(on = value, "bridge-nf-call has changed");
                if let Err(gone) = self.report_facts().await? {
                    return Ok(Err(gone));
                }
            }
            Ok(_) => {}
            Err(error) => tracing::warn!(error = format!("{error:#}"), "bridge-nf-call cannot be read"),
        }
        let retry = self.retry.is_some_and(|(at, _)| at <= now);
        match (now >= self.full_at, retry, self.later) {
            (true, _, _) => self.round("time").await,
            (false, true, _) => self.round("another try").await,
            (false, false, true) => self.round("change of others' routes").await,
            (false, false, false) => Ok(Ok(())),
        }
    }

    /// Brings the kernel to the latest desired state and tells how it went.
    async fn round(&mut self, cause: &'static str) -> anyhow::Result<Result<(), Gone>> {
        let latest = self.desired.borrow_and_update().clone();
        (self.round_at, self.later, self.full_at) = (None, false, Instant::now() + FULL);
        let Some((revision, state)) = latest else { return Ok(Ok(())) };
        let started = Instant::now();
        let mut last = Attempt::default();
        let (mut changed, mut settled) = (false, false);
        for _ in 0..ATTEMPTS {
            let wanted = Arc::clone(&state);
            last = self.on_plane(move |plane| plane.attempt(&wanted)).await?;
            if !last.changed {
                settled = true;
                break;
            }
            changed = true;
            self.forget_events().await?;
        }
        let problems = if settled {
            last.problems
        } else {
            let reasons = last.problems;
            self.on_plane(move |plane| plane.remaining(&state, reasons)).await?
        };
        self.devices = self.on_plane(|plane| plane.devices().clone()).await?;
        let took = started.elapsed();
        tracing::debug!(revision, cause, changed, problems = problems.len(), ?took, "kernel looked at");
        self.plan(&problems);
        self.last_round = Instant::now();
        self.problems.clone_from(&problems);
        if self.inputs.send(Input::Applied { revision, problems }).await.is_err() {
            return Ok(Err(Gone));
        }
        self.report_facts().await
    }

    /// When to try again what failed, and how far apart rounds must be.
    fn plan(&mut self, problems: &[Problem]) {
        if problems.is_empty() {
            (self.retry, self.spacing) = (None, Duration::ZERO);
            return;
        }
        let pause = self.retry.map_or(FIRST_RETRY, |(_, pause)| (pause * 2).min(FULL));
        self.retry = Some((Instant::now() + pause, pause));
        // What is tried in vain may itself cause changes that call for a round.
        self.spacing = if self.problems == problems {
            (self.spacing * 2).clamp(DEBOUNCE, LONGEST_SPACING)
        } else {
            Duration::ZERO
        };
    }

    /// Skips what the kernel has told so far: what we did ourselves, above all. A look follows that sees whatever
    /// else was among it.
    async fn forget_events(&mut self) -> anyhow::Result<()> {
        // Lets the runtime notice what has arrived.
        tokio::task::yield_now().await;
        while let Some(event) = self.links.next().now_or_never() {
            event.context("watching devices")?;
        }
        self.round_at = None;
        Ok(())
    }

    /// Tells the node what the host is like, if that is new.
    async fn report_facts(&mut self) -> anyhow::Result<Result<(), Gone>> {
        let started = Instant::now();
        if started < self.facts_rest {
            self.facts_at.get_or_insert(self.facts_rest);
            return Ok(Ok(()));
        }
        self.facts_at = None;
        let desired = self.desired.borrow().as_ref().map(|(_, state)| Arc::clone(state));
        let read = self.on_plane(move |plane| plane.facts(desired.as_deref())).await?;
        self.facts_rest = Instant::now() + started.elapsed() * FACTS_SHARE;
        let facts = match read {
            Ok(facts) => facts,
            Err(error) => {
                tracing::warn!(error = format!("{error:#}"), "the host's addresses cannot be read");
                self.facts_at = Some(Instant::now() + FIRST_RETRY);
                return Ok(Ok(()));
            }
        };
        if self.facts.as_ref() == Some(&facts) {
            return Ok(Ok(()));
        }
        tracing::debug!(?facts, "host");
        self.facts = Some(facts.clone());
        Ok(self.inputs.send(Input::Host(facts)).await.map_err(|_| Gone))
    }

    /// Runs what blocks on a thread for that.
    async fn on_plane<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Plane) -> T + Send + 'static,
    ) -> anyhow::Result<T> {
        let plane = Arc::clone(&self.plane);
        Ok(tokio::task::spawn_blocking(move || work(&mut lock(&plane))).await?)
    }
}

/// Waits until then; for ever without a time.
async fn at(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time).await,
        None => std::future::pending().await,
    }
}

/// A panic while it was held ends the daemon by way of the task that panicked.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
