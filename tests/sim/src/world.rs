//! All hosts and the network under one clock.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use ipnet::Ipv4Net;
use mesh_core::message::Message;
use mesh_core::node::{Input, Node, Request, RequestId, SessionId};
use mesh_core::state::StateFile;
use mesh_core::time::Time;
use mesh_core::view::View;
use mesh_keys::AdminKey;
use sha2::{Digest as _, Sha256};

use crate::dice::Dice;
use crate::evil::Adversary;
use crate::host::Host;
use crate::links::{Arrival, Links, Piece};
use crate::model::{Breach, Model, SECRET};
use crate::nat::NatKind;
use crate::network::Network;
use crate::node::{self, Act};
use crate::operators;
use crate::outsider::Outsider;
use crate::pods::Asked;
use crate::queue::{Call, Event, Queue};
use crate::settings::Settings;

/// A failed call is reported after this time.
pub const CALL_LIMIT: Duration = Duration::from_secs(10);

/// The simulated world.
pub struct World {
    /// What the run is like.
    pub settings: Settings,
    /// What is due, and the clock.
    pub queue: Queue,
    /// The network.
    pub network: Network,
    /// The control sessions.
    pub links: Links,
    /// The hosts.
    pub hosts: Vec<Host>,
    /// What must hold.
    pub model: Model,
    /// Adversaries, by host.
    pub evil: BTreeMap<usize, Box<dyn Adversary>>,
    /// Who listens on the network.
    pub outsider: Option<Outsider>,
    /// Choices of what happens.
    pub dice: Dice,
    /// The range of the cluster, and the length of the prefix of blocks.
    pub range: (Ipv4Net, u8),
    /// What happened, for people.
    pub trail: Vec<(Time, String)>,
    /// Bytes of frames and datagrams sent.
    pub sent: u64,
    /// Events handled.
    pub events: u64,
    /// Time that this machine has spent in the code that ships; not the same in two runs.
    pub busy: Duration,
    pub(crate) followed: Vec<crate::figures::Followed>,
    pub(crate) spread: Vec<Duration>,
    pub(crate) asked: BTreeMap<RequestId, Asked>,
    pub(crate) requests: u64,
    pub(crate) pod_names: u64,
    pub(crate) clones: usize,
    /// Addresses in use at two copies of one disk that reached no common member: the exception of P2.
    pub excused: usize,
    /// The admin key, in an anchored cluster.
    pub(crate) admin: Option<AdminKey>,
    /// Calls that a node may have under way: see [`mesh_core::node::Config::max_calls`].
    pub max_calls: usize,
    trace: Sha256,
}

impl World {
    /// A world without hosts. Signatures are remembered in this thread from now on, unless the settings say otherwise.
    pub fn new(settings: Settings) -> Self {
        if settings.plain {
            mesh_keys::memo::install_notes();
        } else {
            mesh_keys::memo::install();
        }
        let admin = operators::admin_key(&settings);
        Self {
            queue: Queue::default(),
            network: Network::new(settings.network.clone(), settings.seed),
            links: Links::default(),
            hosts: Vec::new(),
            model: Model::new(admin.as_ref().map(AdminKey::public)),
            evil: BTreeMap::new(),
            outsider: None,
            dice: Dice::new(settings.seed, 0),
            range: settings.range,
            trail: Vec::new(),
            sent: 0,
            events: 0,
            busy: Duration::ZERO,
            followed: Vec::new(),
            spread: Vec::new(),
            asked: BTreeMap::new(),
            requests: 0,
            pod_names: 0,
            clones: 0,
            excused: 0,
            admin,
            max_calls: mesh_core::node::MAX_CALLS,
            trace: Sha256::new(),
            settings,
        }
    }

    /// The clock.
    pub fn now(&self) -> Time {
        self.queue.now
    }

    /// What a host takes the cluster for.
    pub(crate) fn view(&self, at: usize) -> Option<&View> {
        self.hosts[at].node().and_then(Node::view)
    }

    /// A hash of all that happened.
    pub fn trace(&self) -> String {
        hex::encode(self.trace.clone().finalize())
    }

    /// Notes what happened.
    pub fn say(&mut self, text: String) {
        self.trace.update(&text);
        self.trail.push((self.queue.now, text));
    }

    /// Adds a host that is off.
    pub fn add_host(&mut self, seeds: Vec<usize>, secret: u8, nat: Option<NatKind>) -> usize {
        let at = self.hosts.len();
        self.network.add(nat);
        let host = Host::new(at, seeds, secret, &mut self.dice);
        self.model.meet(&host);
        self.hosts.push(host);
        at
    }

    /// Runs for a time.
    pub fn run(&mut self, span: Duration) {
        let end = self.queue.now + span;
        while let Some((host, epoch, event)) = self.queue.take(end) {
            self.step(host, epoch, event);
        }
        self.queue.now = end;
    }

    /// Runs until `done`, which is asked `every` so often, at most for `limit`; how long it took.
    pub fn run_until(
        &mut self,
        limit: Duration,
        every: Duration,
        mut done: impl FnMut(&mut Self) -> bool,
    ) -> Option<Duration> {
        let begun = self.queue.now;
        while !done(self) {
            if self.queue.now.since(begun) >= limit {
                return None;
            }
            self.run(every);
        }
        Some(self.queue.now.since(begun))
    }

    fn step(&mut self, host: usize, epoch: u64, event: Event) {
        self.events += 1;
        self.model.clock = self.queue.now;
        self.trace.update(self.queue.now.since_origin().as_micros().to_le_bytes());
        self.trace.update((host as u64).to_le_bytes());
        match event {
            Event::Tick
            | Event::Tell(_)
            | Event::Written(..)
            | Event::Apply
            | Event::Opened(..)
            | Event::Arrived(..)
            | Event::Traffic
            | Event::Tunnels
            | Event::Look => {
                let alive = self.hosts.get(host).is_some_and(|h| h.epoch == epoch && h.process.is_some());
                if alive {
                    self.process_event(host, event);
                }
            }
            Event::Called(call) => self.called(&call),
            Event::Expired(id) => {
                if self.links.expired(id, self.queue.now)
                    && let Some(link) = self.links.drop_link(id)
                {
                    for end in link.ends.iter().filter(|end| end.open) {
                        let reason = "nothing got through".to_owned();
                        self.tell(end.host, Input::SessionClosed { session: end.session, reason });
                    }
                }
            }
            Event::Pods => self.pods_move(host),
            Event::Evil => self.evil_acts(host),
            Event::Outsider => self.outsider_acts(),
            Event::Relief(relief) => self.relieve(host, relief),
            Event::Fault => self.next_fault(),
        }
    }

    fn process_event(&mut self, at: usize, event: Event) {
        match event {
            Event::Tick => {
                let now = self.queue.now;
                let Some(process) = self.process(at) else { return };
                if process.alarm != Some(now) {
                    // It was set for earlier meanwhile: this one is of no use, and must not set another.
                    return;
                }
                process.alarm = None;
                let due = process.wake <= now;
                if due {
                    self.tell(at, Input::Tick);
                } else {
                    self.set_alarm(at);
                }
            }
            Event::Tell(input) => {
                if let (Input::Datagram { from, bytes, .. }, Some(adversary)) =
                    (&*input, self.evil.get_mut(&at))
                {
                    adversary.overhear(*from, bytes);
                }
                self.tell(at, *input);
            }
            Event::Written(ticket, files) => {
                let Some(host) = self.hosts.get_mut(at) else { return };
                let input = if host.disk_full {
                    Input::PersistFailed(ticket, "no space left on device".to_owned())
                } else {
                    let node = host.process.as_ref().and_then(|process| process.node.view());
                    host.disk.write(files, node);
                    Input::Persisted(ticket)
                };
                if let Some(process) = &mut host.process {
                    process.writing = false;
                    process.inbox.push_front(input);
                }
                self.drive(at);
            }
            Event::Apply => self.apply(at),
            Event::Opened(id, end) => self.opened(id, end),
            Event::Arrived(id, end) => {
                if let Some(arrival) = self.links.arrived(id, end, &self.network) {
                    self.arrived(at, arrival);
                }
            }
            Event::Look => self.look(at),
            Event::Traffic => self.send_through_tunnels(at),
            Event::Tunnels => self.look_at_tunnels(at),
            Event::Called(_)
            | Event::Expired(_)
            | Event::Pods
            | Event::Evil
            | Event::Outsider
            | Event::Relief(_)
            | Event::Fault => {}
        }
    }

    fn arrived(&mut self, at: usize, Arrival { session, from, piece }: Arrival) {
        match piece {
            Piece::Frame(frame) => {
                self.trace.update(&frame);
                if let Some(adversary) = self.evil.get_mut(&at) {
                    adversary.hear(&frame);
                }
                let peer = self.hosts[from].serves() && self.hosts[from].id() != self.hosts[at].id();
                if let (true, Some(process)) = (peer, self.process(at)) {
                    process.confirmed = true;
                }
                let intruder = self.hosts[at].secret != SECRET;
                if intruder && matches!(Message::decode(&frame), Ok(Message::JoinKeyOk { .. })) {
                    // It does not care whether the member has the secret: it wants in.
                    return self.send_frame(at, session, Message::JoinAsk.encode().to_vec());
                }
                self.tell(at, Input::SessionFrame { session, frame: frame.into() });
            }
            Piece::End(reason) => self.tell(at, Input::SessionClosed { session, reason }),
        }
    }

    pub(crate) fn process(&mut self, at: usize) -> Option<&mut crate::host::Process> {
        self.hosts.get_mut(at)?.process.as_mut()
    }

    /// Tells the node of a host something.
    pub fn tell(&mut self, at: usize, input: Input) {
        if let Some(process) = self.process(at) {
            process.inbox.push_back(input);
            self.drive(at);
        }
    }

    fn handle(&mut self, at: usize, input: Input, now: Time) {
        let Some(process) = self.process(at) else { return };
        let begun = Instant::now();
        process.node.handle(input, now);
        self.busy += begun.elapsed();
    }

    /// Asks the node of a host something; the answer is noted under the name that is returned.
    pub fn ask(&mut self, at: usize, request: Request, asked: Asked) -> RequestId {
        self.requests += 1;
        let id = RequestId(self.requests);
        self.asked.insert(id, asked);
        self.tell(at, Input::Request(id, request));
        id
    }

    /// Carries out what the node wants, in order, and gives it what has happened meanwhile, as the daemon does.
    fn drive(&mut self, at: usize) {
        loop {
            let now = self.queue.now;
            let Some(process) = self.process(at) else { return };
            if process.writing {
                return;
            }
            match node::act(process.node.poll_output()) {
                Act::Wait(next) => {
                    let started = process.started;
                    if let Some(input) = process.inbox.pop_front() {
                        self.handle(at, input, node::clock(now, started));
                        continue;
                    }
                    process.wake = now + node::until(next, now, started);
                    self.set_alarm(at);
                    return self.settled(at);
                }
                Act::Dial(target) => {
                    let epoch = self.hosts[at].epoch;
                    let to = self.network.host_at(target.ip()).unwrap_or(at);
                    let after = self.network.reliable_delay(at, to);
                    let call = Call { from: (at, epoch), target };
                    self.queue.put(after, at, epoch, Event::Called(Box::new(call)));
                }
                Act::Send(session, frame) => self.send_frame(at, session, frame),
                Act::Carry(id, what) => self.carry_on(at, id, what),
                Act::Close(session, reason) => {
                    process.inbox.push_front(Input::SessionClosed { session, reason: reason.clone() });
                    self.close_carried(at, session, &reason);
                    if let Some(end) = self.links.of(at, session) {
                        let reason = "closed by the other end";
                        self.links.close(end, reason, &mut self.network, &mut self.queue);
                    }
                }
                Act::Persist(ticket, files) => {
                    process.writing = true;
                    if files.iter().any(|(file, _)| matches!(file, StateFile::Cluster | StateFile::Changes)) {
                        self.scan(at);
                    }
                    let took = self.dice.span(Duration::from_micros(300), Duration::from_millis(8));
                    let epoch = self.hosts[at].epoch;
                    self.queue.put(took, at, epoch, Event::Written(ticket, files));
                }
                Act::Desired(revision, state) => {
                    process.desired = Some((revision, state.clone()));
                    self.model.wants(&self.hosts[at], &state, now);
                    let took = self.dice.span(Duration::from_millis(2), Duration::from_millis(40));
                    let epoch = self.hosts[at].epoch;
                    self.queue.put(took, at, epoch, Event::Apply);
                }
                Act::Reply(id, answer) => self.answered(at, id, answer),
                Act::Refuse(reason) => {
                    self.say(format!("host{at} ends by itself: {reason}"));
                    return self.kill(at);
                }
                Act::Datagram(port, to, bytes) => self.send_datagram(at, port, to, bytes),
                Act::Register(node, key, endpoint, serial) => {
                    let (address, clock) = (endpoint.remote, node::clock(now, process.started));
                    let known = process.relay.serves(&key, clock);
                    if process.relay.register(key, endpoint, serial, clock).is_ok() {
                        let done = Input::Registered { node, key, address, serial, known };
                        process.inbox.push_front(done);
                    }
                }
                Act::Nothing => {}
            }
        }
    }

    /// Sends a frame on a session of a host.
    pub(crate) fn send_frame(&mut self, at: usize, session: SessionId, frame: Vec<u8>) {
        if self.send_carried(at, session, &frame) {
            return;
        }
        if let Some((link, end)) = self.links.of(at, session) {
            self.sent += frame.len() as u64;
            self.links.send(link, end, Piece::Frame(frame), &mut self.network, &mut self.queue);
        }
    }

    /// Sends a datagram from a port of a host.
    pub(crate) fn send_datagram(&mut self, at: usize, port: u16, to: std::net::SocketAddr, bytes: Vec<u8>) {
        self.sent += bytes.len() as u64;
        for flight in self.network.datagram(at, port, to, self.queue.now) {
            let epoch = self.hosts.get(flight.to).map_or(0, |host| host.epoch);
            if let Some(outsider) = &mut self.outsider {
                outsider.overhear(flight.from, flight.to, &bytes);
            }
            let input = Input::Datagram { from: flight.from, to: None, bytes: bytes.clone() };
            self.queue.put(flight.after, flight.to, epoch, Event::Tell(Box::new(input)));
        }
    }

    fn set_alarm(&mut self, at: usize) {
        let now = self.queue.now;
        let Some(host) = self.hosts.get_mut(at) else { return };
        let epoch = host.epoch;
        let Some(process) = &mut host.process else { return };
        if process.alarm.is_none_or(|alarm| alarm > process.wake) {
            process.alarm = Some(process.wake);
            let after = process.wake.since(now);
            self.queue.put(after, at, epoch, Event::Tick);
        }
    }

    /// The node of a host has nothing more to say for now.
    fn settled(&mut self, at: usize) {
        let Some(host) = self.hosts.get_mut(at) else { return };
        let Some(process) = &host.process else { return };
        host.tombstones.retain(|id| process.node.has_lease(id));
        if let Some(mark) = process.node.start_to_note() {
            host.last_start = Some(mark);
        }
        if !self.followed.is_empty() {
            self.follow(at);
        }
    }

    /// Looks at what the node of a host believes.
    fn scan(&mut self, at: usize) {
        let now = self.queue.now;
        if let Some(host) = self.hosts.get_mut(at) {
            self.model.believes(host, now);
        }
    }

    /// The kernel of a host takes up what the node wants.
    fn apply(&mut self, at: usize) {
        let Some(host) = self.hosts.get_mut(at) else { return };
        let Some((revision, state)) = host.process.as_mut().and_then(|process| process.desired.take()) else {
            return;
        };
        let own = |state: &mesh_core::host::HostState| {
            state.bridge.iter().flat_map(|bridge| bridge.addresses.iter().copied()).collect::<Vec<_>>()
        };
        let (before, after) = (own(&host.kernel), own(&state));
        host.kernel = state;
        self.take_up_peers(at);
        for address in before.iter().filter(|address| !after.contains(address)) {
            self.model.ends(at, *address);
        }
        for address in after.into_iter().filter(|address| !before.contains(address)) {
            self.begins(at, address, false);
        }
        self.tell(at, Input::Applied { revision, problems: Vec::new() });
    }

    /// An address is in use at a host from now on.
    pub(crate) fn begins(&mut self, at: usize, address: std::net::IpAddr, pod: bool) {
        let id = self.hosts[at].id();
        self.model.clock = self.queue.now;
        let clash = self.model.begins(at, id, address, pod);
        for other in clash {
            // The one exception of P2: no common member; and then new leases wait until one peer has confirmed the
            // boot counter, so whoever has heard of no member since it started must not lease.
            let confirmed = self.hosts[at].process.as_ref().is_some_and(|process| process.confirmed);
            if other.same_disk && confirmed && !self.share_a_member(at, other.host) {
                self.say(format!(
                    "{address} is used at host{at} and host{}, copies of one disk that reach no common member",
                    other.host
                ));
                self.excused += 1;
                continue;
            }
            let text = format!(
                "{address} is used at host{} since {:.3} s and begins to be used at host{at}",
                other.host,
                other.since.since_origin().as_secs_f64()
            );
            self.model.breach(self.queue.now, "P2", text);
        }
    }

    /// Whether some member that runs can be reached by both hosts: packets pass both ways. Where one of the two was
    /// running already before that was so, and may have been confirmed by somebody else, only after the longest pause of
    /// a node between two calls: a start hears of another in the ten seconds for which it waits, a node that runs by its
    /// next call.
    fn share_a_member(&self, a: usize, b: usize) -> bool {
        const PAUSE: Duration = Duration::from_secs(60);
        let now = self.queue.now;
        let both_up = self.hosts[a].up_since.max(self.hosts[b].up_since);
        let near = |x: usize, y: usize| {
            let callable = self.network.place(x).nat.is_none() || self.network.place(y).nat.is_none();
            self.network.open_since(x, y).filter(|_| callable)
        };
        let copy = self.hosts[a].id();
        let others = self.hosts.iter().filter(|host| host.at != a && host.at != b && host.id() != copy);
        others
            .filter(|host| host.serves())
            .filter_map(|host| Some(near(a, host.at)?.max(near(b, host.at)?).max(host.up_since)))
            .any(|open| both_up >= open || now.since(open) >= PAUSE)
    }

    /// The first breaches, with what led to them.
    pub fn breaches(&self) -> &[Breach] {
        &self.model.breaches
    }
}
