//! Starting and stopping hosts and their daemons, and the calls between them.

use std::collections::{BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use mesh_core::host::{HostState, Route};
use mesh_core::node::{HostFacts, Input, Node};
use mesh_core::relay::{Limits, Relay};
use mesh_core::state::Stored;
use mesh_core::time::Time;
use mesh_keys::AdminKey;

use crate::carried::Connections;
use crate::host::{Disk, Process};
use crate::links::LinkId;
use crate::network::CONTROL_PORT;
use crate::node::{self, Plan};
use crate::queue::{Call, Event};
use crate::tunnels::LOOK_AT_TUNNELS;
use crate::world::{CALL_LIMIT, World};

/// Pause between two looks at what is left of pods.
const LOOK_EVERY: Duration = Duration::from_secs(20);

impl World {
    /// Where the control plane of a host listens.
    pub fn address(&self, host: usize) -> SocketAddr {
        SocketAddr::new(self.network.place(host).own, CONTROL_PORT)
    }

    /// Starts the daemon of a host.
    pub fn start(&mut self, at: usize) {
        let host = &mut self.hosts[at];
        if host.process.is_some() || host.retired {
            return;
        }
        match host.disk.load(host.last_start.as_ref()) {
            Ok(stored) => self.start_from(at, stored),
            Err(error) => {
                let text = format!("host{at} cannot read what it wrote: {error}");
                self.model.breach(self.queue.now, "P7", text);
            }
        }
    }

    /// Starts the daemon of a host with what it would read from disk.
    pub(crate) fn start_from(&mut self, at: usize, stored: Stored) {
        let seed = self.dice.bytes();
        let node = self.new_node(at, stored, seed);
        self.run_node(at, node);
    }

    /// The node of a host, as its daemon makes it when it starts.
    pub(crate) fn new_node(&self, at: usize, stored: Stored, seed: [u8; 32]) -> Node {
        let host = &self.hosts[at];
        let plan = Plan {
            host: at,
            seeds: host.seeds.iter().map(|seed| self.address(*seed)).collect(),
            secret: host.secret,
            token: host.token.clone(),
            lane: host.disk.lane.clone(),
            boot: format!("boot {at} {}", host.boot),
            previous_start: host.last_start,
            max_calls: self.max_calls,
            admin: self.admin.as_ref().map(AdminKey::public),
            range: self.range,
        };
        Node::new(node::config(&plan), host.disk.identity.clone(), stored, seed, Time::ZERO)
    }

    /// The daemon of a host runs from now on.
    pub(crate) fn run_node(&mut self, at: usize, node: Node) {
        let now = self.queue.now;
        let host = &mut self.hosts[at];
        host.powered = true;
        host.epoch += 1;
        host.up_since = now;
        host.process = Some(Process {
            node,
            started: now,
            writing: false,
            inbox: VecDeque::new(),
            wake: now,
            alarm: None,
            desired: None,
            confirmed: false,
            relay: Relay::new(Limits::default(), Time::ZERO),
            carried: Connections::default(),
            judged: 0,
            removed: BTreeSet::new(),
            wall: None,
        });
        let tombstones = host.tombstones.clone();
        let facts = self.facts(at);
        self.tell_wall_clock(at);
        self.tell(at, Input::Host(facts));
        if !tombstones.is_empty() {
            self.tell(at, Input::Tombstones(tombstones));
        }
        let epoch = self.hosts[at].epoch;
        self.queue.put(LOOK_EVERY, at, epoch, Event::Look);
        if self.settings.tunnels {
            self.queue.put(LOOK_AT_TUNNELS / 2, at, epoch, Event::Traffic);
            self.queue.put(LOOK_AT_TUNNELS, at, epoch, Event::Tunnels);
        }
    }

    /// What a host is like.
    pub(crate) fn facts(&self, at: usize) -> HostFacts {
        let kernel = &self.hosts[at].kernel;
        let ends = kernel.routes.iter().filter(|(_, route)| **route == Route::Unreachable);
        HostFacts {
            addresses: vec![self.network.place(at).own],
            underlay_mtu: Some(1500),
            closed: ends.map(|(range, _)| *range).collect(),
            bridge: kernel.bridge.is_some(),
            route_mtus: kernel.tunnel_mtus(),
            ..HostFacts::default()
        }
    }

    /// The daemon dies at once: what is on disk, the kernel and the pods stay. Of a write that is under way, the
    /// first files may be on disk.
    pub fn kill(&mut self, at: usize) {
        self.end_process(at);
        for end in self.links.of_host(at) {
            self.links.close(end, "connection reset", &mut self.network, &mut self.queue);
        }
    }

    /// The host loses power: only the disk stays.
    pub fn power_off(&mut self, at: usize) {
        self.end_process(at);
        for (link, end) in self.links.of_host(at) {
            self.links.die(link, end, &mut self.queue);
        }
        let host = &mut self.hosts[at];
        host.powered = false;
        host.boot += 1;
        host.last_start = None;
        host.kernel = Arc::new(HostState::default());
        host.pods.clear();
        host.forgotten.clear();
        host.traffic.clear();
        let put_back = std::mem::take(&mut host.put_back);
        self.model.all_end(at);
        if put_back {
            self.model.rest_is_forgotten(at);
        }
    }

    fn end_process(&mut self, at: usize) {
        let writing = self.hosts[at].process.take().is_some_and(|process| process.writing);
        if writing && self.dice.chance(5_000) {
            self.write_anyway(at);
        }
        self.hosts[at].epoch += 1;
        self.pods_lose_daemon(at);
    }

    /// What was being written when the daemon died is on disk all the same: of several files, the first ones.
    fn write_anyway(&mut self, at: usize) {
        let epoch = self.hosts[at].epoch;
        if let Some(mut files) = self.queue.written(at, epoch) {
            let count = 1 + self.dice.below(files.len());
            files.truncate(count);
            self.hosts[at].disk.files.extend(files);
        }
    }

    /// Keeps a copy of the disk, for later.
    pub fn back_up(&mut self, at: usize) {
        let host = &mut self.hosts[at];
        if host.backups.len() < 8 {
            host.backups.push(host.disk.clone());
        }
    }

    /// The host has an empty disk from now on, and is somebody else.
    pub fn wipe(&mut self, at: usize) {
        let host = &mut self.hosts[at];
        host.disk = Disk::new(&mut self.dice);
        host.backups.clear();
        host.tombstones.clear();
        host.token = None;
        self.model.meet(&self.hosts[at]);
    }

    // Calls.

    pub(crate) fn called(&mut self, call: &Call) {
        let (from, epoch) = call.from;
        if self.hosts[from].epoch != epoch {
            return;
        }
        let failed = |reason: &str| {
            Event::Tell(Box::new(Input::DialFailed { target: call.target, reason: reason.to_owned() }))
        };
        let to = self.network.host_at(call.target.ip()).filter(|to| {
            self.network.listens(*to, call.target.ip())
                && self.hosts[*to].powered
                && self.network.open(from, *to)
        });
        let Some(to) = to else {
            return self.queue.put(CALL_LIMIT, from, epoch, failed("no answer"));
        };
        let back = self.network.reliable_delay(to, from);
        if self.hosts[to].process.is_none() {
            return self.queue.put(back, from, epoch, failed("connection refused"));
        }
        let there = self.hosts[to].epoch;
        let forth = self.network.reliable_delay(from, to);
        let link = self.links.add((from, epoch), (to, there));
        self.queue.put(back, from, epoch, Event::Opened(link, 0));
        self.queue.put(back + forth, to, there, Event::Opened(link, 1));
    }

    pub(crate) fn opened(&mut self, id: LinkId, at: usize) {
        let Some([dialler, acceptor]) = self.links.ends(id) else { return };
        if !self.network.open(dialler.host, acceptor.host) {
            self.links.drop_link(id);
            let input = if at == 0 {
                let target = self.address(acceptor.host);
                Input::DialFailed { target, reason: "no answer".to_owned() }
            } else {
                Input::SessionClosed { session: dialler.session, reason: "nothing got through".to_owned() }
            };
            return self.queue.put(CALL_LIMIT, dialler.host, dialler.epoch, Event::Tell(Box::new(input)));
        }
        let (here, there) = if at == 0 { (dialler, acceptor) } else { (acceptor, dialler) };
        let target = self.address(acceptor.host);
        let port = 40_000 + u16::try_from(id.0 % 20_000).unwrap_or_default();
        let remote =
            if at == 0 { target } else { SocketAddr::new(self.network.place(dialler.host).seen(), port) };
        let input = Input::SessionOpened {
            session: here.session,
            peer: self.hosts[there.host].disk.identity.public(),
            dialled: (at == 0).then_some(target),
            remote,
            secrets: node::session_secrets(self.settings.seed, id.0),
        };
        self.links.opened(id, at, &mut self.queue);
        self.tell(here.host, input);
    }

    pub(crate) fn look(&mut self, at: usize) {
        self.tell_wall_clock(at);
        let host = &self.hosts[at];
        let Some(process) = &host.process else { return };
        let now = node::clock(self.queue.now, process.started);
        let remains = host.remains(&process.node);
        let (epoch, tombstones) = (host.epoch, host.tombstones.clone());
        if !remains.is_empty() {
            self.tell(at, Input::Remains { begun: now, remains });
        }
        if !tombstones.is_empty() {
            self.tell(at, Input::Tombstones(tombstones));
        }
        self.queue.put(LOOK_EVERY, at, epoch, Event::Look);
    }
}
