//! The end of a run: everything is mended, the operators do their part, and the cluster has to be whole again.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use mesh_core::gossip::catalogue::Sum;
use mesh_core::host::Route;
use mesh_core::node::Node;
use mesh_keys::NodeId;

use crate::node::LANE;
use crate::settings::Fault;
use crate::world::World;

/// How long a cluster may take to be whole after everything is mended.
pub const HEALING: Duration = Duration::from_secs(600);

/// Pause between two looks of the operators.
const OPERATORS: Duration = Duration::from_secs(20);

impl World {
    /// Mends everything; then all hosts that are left have to make one cluster again.
    pub fn heal(&mut self) -> Option<Duration> {
        self.say("everything is mended".to_owned());
        self.network.heal(self.queue.now);
        self.network.lose_more(0);
        self.network_changed();
        self.evil.clear();
        self.outsider = None;
        if self.settings.is_scarce() {
            // There may be no more addresses than nodes: who has no pods hands blocks on.
            self.settings.pod_pause = Duration::ZERO;
            self.end_all_pods();
        }
        for at in 0..self.hosts.len() {
            self.network.slow_down(at, Duration::ZERO);
            self.hosts[at].disk_full = false;
            if self.hosts[at].evil || self.hosts[at].secret != crate::model::SECRET {
                self.power_off(at);
                self.hosts[at].retired = true;
            }
        }
        self.part_copies();
        for at in 0..self.hosts.len() {
            self.hosts[at].clock_error = 0;
            self.tell_wall_clock(at);
            self.start(at);
        }
        let begun = self.queue.now;
        let mut next = begun + OPERATORS;
        let took = self.run_until(HEALING, Duration::from_secs(1), |world| {
            if world.queue.now >= next {
                next = world.queue.now + OPERATORS;
                world.operate();
            }
            world.is_whole().is_ok()
        });
        if took.is_none()
            && let Err(why) = self.is_whole()
        {
            self.model.breach(
                self.queue.now,
                "P6",
                format!("not whole {HEALING:?} after all is mended: {why}"),
            );
        }
        took
    }

    /// Of several hosts with copies of one disk, one keeps it.
    fn part_copies(&mut self) {
        let mut seen: BTreeSet<NodeId> = BTreeSet::new();
        for at in 0..self.hosts.len() {
            if !self.hosts[at].retired && !seen.insert(self.hosts[at].id()) {
                self.say(format!("host{at}: the operator removes the copy of a disk"));
                self.power_off(at);
                self.wipe(at);
            }
        }
    }

    /// The operators do what `meshctl status` asks them to: nodes with old disks and removed ones join anew, members
    /// that are no more are removed.
    fn operate(&mut self) {
        self.give_key_files();
        for at in 0..self.hosts.len() {
            if !self.hosts[at].outdated() && !self.hosts[at].is_out() {
                continue;
            }
            self.power_off(at);
            if self.is_elsewhere(at) {
                self.say(format!("host{at}: the operator removes the state directory"));
                self.wipe(at);
            } else {
                // The other thing that the status proposes.
                self.say(format!("host{at}: the operator reboots the last host that has the cluster"));
            }
            self.start(at);
        }
        let Some(by) = self.hosts.iter().find(|host| host.serves() && !host.outdated()).map(|host| host.at)
        else {
            return;
        };
        self.open_the_doors(by);
        self.see_leaves_through(by);
        for subject in self.lost(by) {
            self.ask_removal(by, subject);
        }
    }

    /// In what two hosts differ.
    fn difference(&self, a: usize, b: usize) -> String {
        let items = |at: usize| -> BTreeSet<_> {
            self.hosts[at].node().and_then(Node::view).map(|view| view.items().collect()).unwrap_or_default()
        };
        let (ours, theirs) = (items(a), items(b));
        let kinds: BTreeSet<u8> = ours.symmetric_difference(&theirs).map(|(name, _)| name.kind.0).collect();
        format!("host{a} and host{b} know different things, of kinds {kinds:?} (none: of who is alive)")
    }

    /// Whether all hosts are members of one cluster with equal views, know each other and have tunnels between
    /// every two that can have a session.
    ///
    /// # Errors
    /// What is missing.
    pub fn is_whole(&self) -> Result<(), String> {
        let hosts: Vec<_> = self.hosts.iter().filter(|host| !host.retired).collect();
        let mut first: Option<(usize, Option<Sum>)> = None;
        for host in &hosts {
            let at = host.at;
            let node = host.node().ok_or_else(|| format!("host{at} does not run"))?;
            let view = node.view().ok_or_else(|| format!("host{at} is in no cluster"))?;
            if !node.is_ready() {
                return Err(format!("host{at} is not ready: {:?}", node.status().problems));
            }
            let print = node.gossip_fingerprint();
            match first {
                None => first = Some((at, print)),
                Some((other, theirs)) if theirs != print => {
                    return Err(self.difference(other, at));
                }
                Some(_) => {}
            }
            if let Some(other) = hosts.iter().find(|other| view.record(&other.id()).is_none()) {
                return Err(format!("host{at} does not know host{}", other.at));
            }
            if let Some(lost) = self.lost(at).first() {
                return Err(format!("host{at} takes {} for a member, which is gone", lost.short()));
            }
        }
        for a in &hosts {
            for b in hosts.iter().filter(|b| b.at != a.at) {
                let nat = |host: usize| self.network.place(host).nat.is_some();
                // Two behind NATs need somebody who carries their session.
                let apart = nat(a.at) && nat(b.at) && hosts.iter().all(|host| nat(host.at));
                let carries = self.tunnel(a.at, b.at).and_then(|()| self.carries(a.at, b.at));
                if let (false, Err(why)) = (apart, carries) {
                    return Err(format!("no tunnel from host{} to host{}: {why}", a.at, b.at));
                }
            }
        }
        Ok(())
    }

    /// Whether a packet from one host would get to the other through their lanes, by the kernels of both.
    ///
    /// # Errors
    /// What is missing.
    pub fn tunnel(&self, a: usize, b: usize) -> Result<(), &'static str> {
        let (here, there) = (&self.hosts[a], &self.hosts[b]);
        let lanes = (here.kernel.lanes.get(LANE), there.kernel.lanes.get(LANE));
        let (Some(lane), Some(other)) = lanes else { return Err("no lane") };
        let out =
            lane.peers.get(&there.disk.lane_key).ok_or("the first does not have the second as a peer")?;
        let back =
            other.peers.get(&here.disk.lane_key).ok_or("the second does not have the first as a peer")?;
        let routed = |net| matches!(here.kernel.routes.get(net), Some(Route::Devices { devices, .. }) if devices.contains(LANE));
        if !out.allowed_ips.iter().all(routed) {
            return Err("the first has no route");
        }
        let mut addresses = there.kernel.bridge.iter().flat_map(|bridge| &bridge.addresses);
        if !addresses.all(|address| out.allowed_ips.iter().any(|net| net.contains(address))) {
            return Err("the second's address is not behind it");
        }
        if out.psk == back.psk { Ok(()) } else { Err("the pre-shared keys differ") }
    }

    /// How many hosts of each kind there are, for the trail.
    pub fn census(&self) -> BTreeMap<&'static str, usize> {
        let count =
            |what: fn(&crate::host::Host) -> bool| self.hosts.iter().filter(|host| what(host)).count();
        BTreeMap::from([
            ("hosts", self.hosts.len()),
            ("running", count(|host| host.process.is_some())),
            ("evil", count(|host| host.evil)),
            ("pods", self.hosts.iter().map(|host| host.pods.len()).sum()),
            ("members", count(|host| host.node().and_then(Node::view).is_some())),
        ])
    }
}

/// What a run of chaos has come to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// How long the cluster took to be whole again.
    pub healed: Option<Duration>,
    /// What was broken.
    pub breaches: Vec<crate::model::Breach>,
    /// How often the exception of P2 for copies of a disk was made use of.
    pub excused: usize,
    /// A hash of all that happened.
    pub trace: String,
    /// Events handled.
    pub events: u64,
    /// Lines that tell what happened.
    pub trail: Vec<String>,
    /// The one command that does the same again.
    pub replay: String,
}

/// Runs chaos for one seed.
pub fn chaos(settings: crate::settings::Settings) -> Outcome {
    let replay = replay(&settings);
    let mut world = World::new(settings);
    world.found();
    world.chaos();
    let healed = world.heal();
    let trail = world.trail.iter();
    let trail = trail.map(|(at, text)| format!("{:9.3} {text}", at.since_origin().as_secs_f64())).collect();
    Outcome {
        healed,
        breaches: world.model.breaches.clone(),
        excused: world.excused,
        trace: world.trace(),
        events: world.events,
        trail,
        replay,
    }
}

fn replay(settings: &crate::settings::Settings) -> String {
    let mut command = format!(
        "cargo xtask sim --nodes {} --seed {} --seconds {} --pause {} --faults chaos",
        settings.nodes,
        settings.seed,
        settings.span.as_secs(),
        settings.fault_pause.as_secs()
    );
    if settings.plain {
        command.push_str(" --plain");
    }
    if settings.faults != Fault::ALL {
        let names: Vec<&str> = settings.faults.iter().map(|fault| fault.name()).collect();
        command.push_str(&format!(" --only {}", names.join(",")));
    }
    command
}
