//! Whole clusters of nodes in one thread: virtual time, a network that loses sessions and can be cut, disks
//! that keep what was written, kernels that do what is asked.

mod addresses;
mod authority;
mod carried;
mod copies;
mod leave;
mod links;
mod mtu;
mod paths;
mod removal;
mod scenarios;
mod tunnels;
mod versions;
mod why;
mod wire;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use mesh_keys::channel::testing::MemoryChannel;
use mesh_keys::join::JoinKey;
use mesh_keys::password::{Password, PasswordRecord};
use mesh_keys::{GenesisFields, Identity, Secret32, SessionSecrets, WgSecret};
use rand_chacha::ChaCha20Rng;
use rand_core::{RngCore, SeedableRng};

use self::wire::{Happened, Wire};
use super::*;
use crate::api::{AttachmentState, Backend, NetnsId};
use crate::host::{HostState, Op, Route, diff};
use crate::ranges::RangeSet;
use crate::relay::{Limits, Relay};

/// Identity of every pod's network namespace.
pub(super) const NETNS: NetnsId = NetnsId { dev: 4, ino: 4_026_532_000 };

/// One-way delay of the simulated network.
const DELAY: Duration = Duration::from_millis(5);

pub(super) struct Host {
    pub(super) node: Option<Node>,
    identity: Identity,
    lane: WgSecret,
    secret: SimSecret,
    seeds: Vec<usize>,
    pub(super) disk: BTreeMap<StateFile, Vec<u8>>,
    /// What the host keeps until its next boot: the boot, and what the node has had noted.
    pub(super) last_start: Option<(&'static str, StartMark)>,
    pub(super) kernel: HostState,
    /// Peers that were removed from it, since somebody has looked.
    pub(super) peers_gone: BTreeSet<WgPublic>,
    pub(super) replies: BTreeMap<RequestId, Result<Response, ApiError>>,
    next: Time,
    pub(super) disk_full: bool,
    pub(super) wrote: usize,
    /// Networks that the host has without the mesh.
    pub(super) prefixes: Vec<HostPrefix>,
    /// Why the daemon ended by itself.
    pub(super) refused: Option<String>,
    /// Connections that others carry.
    carried: BTreeMap<CarriedId, (Wire, Option<SessionId>)>,
    /// What it relays for; gone with the process.
    pub(super) relay: Relay,
    /// A tunnel key that it says is its own, without the secret.
    pub(super) claims: Option<Claim>,
    /// What its kernel was told of ways that are narrow.
    pub(super) narrowed: Vec<(IpAddr, u16)>,
}

/// As which lane a host claims a key.
#[derive(Clone, Copy, Debug)]
pub(super) enum Claim {
    First(WgPublic),
    Second(WgPublic),
}

/// What a message becomes on its way from one host to another.
pub(super) type Lie = Box<dyn FnMut(usize, usize, crate::message::Message) -> crate::message::Message>;

#[derive(Clone)]
pub(super) enum SimSecret {
    Key(u8),
    Password(&'static str),
    Token(mesh_keys::JoinToken),
    None,
}

#[derive(Clone, Debug)]
enum Event {
    Deliver { to: usize, session: SessionId, frame: Vec<u8> },
    Datagram { to: usize, from: SocketAddr, bytes: Vec<u8> },
    Open { from: usize, target: SocketAddr },
    Closed { to: usize, session: SessionId, reason: String },
    Applied { to: usize, revision: u64 },
    Tick { to: usize },
}

pub(super) struct Sim {
    pub(super) hosts: Vec<Host>,
    pub(super) now: Time,
    rng: ChaCha20Rng,
    queue: BTreeMap<(Time, u64), Event>,
    sequence: u64,
    sessions: BTreeMap<(usize, SessionId), (usize, SessionId)>,
    next_session: u64,
    next_request: u64,
    /// Range of a cluster that is founded.
    pub(super) range: Ipv4Net,
    /// Identifies the boot of the hosts.
    pub(super) boot: &'static str,
    pub(super) cut: BTreeSet<(usize, usize)>,
    /// Longest packets that get from one host to another, where that is less than any host sends.
    pub(super) narrow: BTreeMap<(usize, usize), usize>,
    /// Datagrams that measured a way.
    pub(super) measured: usize,
    /// Admin keys of a cluster that is founded.
    pub(super) admin_keys: Vec<IdentityKey>,
    /// What the hosts' clocks show at the start of the simulation; `None` for a daemon that does not tell.
    pub(super) unix: Option<u64>,
    /// Names of hosts that do not have the usual one.
    pub(super) names: BTreeMap<usize, String>,
    /// What becomes of a frame that a host sends.
    pub(super) on_wire: fn(usize, Vec<u8>) -> Vec<Vec<u8>>,
    pub(super) lie: Option<Lie>,
}

impl Host {
    /// The connection of a session that another host carries.
    fn wire(&mut self, session: SessionId) -> Option<(CarriedId, &mut Wire)> {
        let mut all = self.carried.iter_mut();
        all.find(|(_, (_, name))| *name == Some(session)).map(|(id, (wire, _))| (*id, wire))
    }
}

/// What an end may send now.
fn pieces(id: CarriedId, wire: &mut Wire) -> Vec<Input> {
    let pieces = std::iter::from_fn(|| wire.take(PIECE));
    pieces.map(|bytes| Input::Carried { id, what: CarriedInput::Bytes(bytes) }).collect()
}

/// Which way a tunnel takes is not on disk: keepalives, and peers that are being made anew.
fn is_of_a_path(op: &Op, kernel: &HostState) -> bool {
    let Op::SetPeer { device, peer, psk, endpoint, add_allowed_ips, remove_allowed_ips, .. } = op else {
        return false;
    };
    let is_there = kernel.lanes.get(device).is_some_and(|lane| lane.peers.contains_key(peer));
    let only_keepalive =
        psk.is_none() && endpoint.is_none() && add_allowed_ips.is_empty() && remove_allowed_ips.is_empty();
    !is_there || only_keepalive
}

pub(super) fn address(host: usize) -> SocketAddr {
    SocketAddr::new(IpAddr::V4(Ipv4Addr::new(198, 18, (host / 250) as u8, (host % 250) as u8 + 1)), 6783)
}

impl Sim {
    pub(super) fn new(seed: u64) -> Self {
        Self {
            hosts: Vec::new(),
            now: Time::ZERO + Duration::from_secs(1),
            rng: ChaCha20Rng::seed_from_u64(seed),
            queue: BTreeMap::new(),
            sequence: 0,
            sessions: BTreeMap::new(),
            next_session: 0,
            next_request: 0,
            range: GenesisFields::default_ipv4_range(),
            boot: "boot",
            cut: BTreeSet::new(),
            narrow: BTreeMap::new(),
            measured: 0,
            admin_keys: Vec::new(),
            unix: Some(1_700_000_000),
            names: BTreeMap::new(),
            on_wire: |_, frame| vec![frame],
            lie: None,
        }
    }

    /// A host that is off; `seeds` are host numbers.
    pub(super) fn add(&mut self, seeds: &[usize], secret: SimSecret) -> usize {
        let host = Host {
            node: None,
            identity: Identity::generate(&mut self.rng),
            lane: WgSecret::generate(&mut self.rng),
            secret,
            seeds: seeds.to_vec(),
            disk: BTreeMap::new(),
            last_start: None,
            kernel: HostState::default(),
            peers_gone: BTreeSet::new(),
            replies: BTreeMap::new(),
            next: Time::ZERO,
            disk_full: false,
            wrote: 0,
            prefixes: Vec::new(),
            refused: None,
            carried: BTreeMap::new(),
            relay: Relay::new(Limits::default(), self.now),
            narrowed: Vec::new(),
            claims: None,
        };
        self.hosts.push(host);
        self.hosts.len() - 1
    }

    pub(super) fn start(&mut self, at: usize) {
        let mut seed = [0; 32];
        self.rng.fill_bytes(&mut seed);
        let secret = match &self.hosts[at].secret {
            SimSecret::Key(byte) => JoinSecret::Key(JoinKey::from_secret(Secret32::from_bytes([*byte; 32]))),
            SimSecret::Password(text) => {
                let password = Password::from_file_contents(text.as_bytes().to_vec()).unwrap();
                let me = self.hosts[at].identity.public();
                let record = PasswordRecord::create(&password, &me, &mut self.rng).unwrap();
                JoinSecret::Password { password, record: Box::new(record) }
            }
            SimSecret::Token(token) => JoinSecret::Token(Box::new(token.clone())),
            SimSecret::None => JoinSecret::None,
        };
        let (node, counted) = self.boot(at, secret, seed);
        let host = &mut self.hosts[at];
        host.disk.extend([counted]);
        host.node = Some(node);
        if let Some(unix) = self.unix {
            let unix_seconds = unix + self.now.since_origin().as_secs();
            self.input(at, Input::WallClock { unix_seconds });
        }
        self.look(at);
    }

    /// The shell tells what the host is like.
    pub(super) fn look(&mut self, at: usize) {
        let facts = self.facts(at);
        self.input(at, Input::Host(facts));
    }

    fn facts(&self, at: usize) -> HostFacts {
        let host = &self.hosts[at];
        let ends = host.kernel.routes.iter().filter(|(_, route)| **route == Route::Unreachable);
        HostFacts {
            addresses: vec![address(at).ip()],
            underlay_mtu: Some(1500),
            prefixes: host.prefixes.clone(),
            closed: ends.map(|(range, _)| *range).collect(),
            bridge: host.kernel.bridge.is_some(),
            route_mtus: host.kernel.tunnel_mtus(),
            ..HostFacts::default()
        }
    }

    /// What the host's disk makes of it.
    fn boot(&self, at: usize, secret: JoinSecret, seed: [u8; 32]) -> (Node, (StateFile, Vec<u8>)) {
        let host = &self.hosts[at];
        let mut stored = Stored::decode(&host.disk).unwrap();
        let before = host.last_start.filter(|(boot, _)| *boot == self.boot).map(|(_, mark)| mark);
        let counted = stored.count_start(&host.identity.public().node_id(), before.as_ref());
        let mut lanes = vec![LaneConfig::new(0, "meshwg0", 6784, host.lane.clone())];
        match host.claims {
            Some(Claim::First(key)) => lanes[0].key = key,
            Some(Claim::Second(key)) => {
                lanes.push(LaneConfig { key, ..LaneConfig::new(1, "meshwg1", 6785, host.lane.clone()) });
            }
            None => {}
        }
        let config = Config {
            name: self.names.get(&at).cloned().unwrap_or_else(|| format!("host{at}")),
            cluster_name: "sim".into(),
            ipv4_range: self.range,
            block_prefix: 24,
            admin_keys: self.admin_keys.clone(),
            secret,
            seeds: host
                .seeds
                .iter()
                .map(|seed| Seed { text: address(*seed).to_string(), addresses: vec![address(*seed)] })
                .collect(),
            advertise: Vec::new(),
            control_port: 6783,
            max_calls: MAX_CALLS,
            lanes,
            mtu: None,
            mtu_raise: crate::path::mtu::RAISED,
            software: "sim".into(),
            boot: self.boot.into(),
            previous_start: before,
            backend: (Backend::Userspace, "simulated".into()),
        };
        (Node::new(config, host.identity.clone(), stored, seed, self.now), counted)
    }

    /// A daemon that is killed at this instant, and comes back, changes nothing in the kernel.
    fn check_crash(&self, at: usize) {
        let secret = JoinSecret::Key(JoinKey::from_secret(Secret32::from_bytes([0; 32])));
        let (mut reborn, _) = self.boot(at, secret, [0; 32]);
        reborn.handle(Input::Host(self.facts(at)), self.now);
        let state = std::iter::from_fn(|| Some(reborn.poll_output()))
            .take_while(|output| !matches!(output, Output::Timeout(_)))
            .find_map(|output| if let Output::Desired { state, .. } = output { Some(state) } else { None })
            .expect("a member knows what the kernel should hold");
        let kernel = &self.hosts[at].kernel;
        let forgotten: Vec<Op> =
            diff(kernel, &state).into_iter().filter(|op| !is_of_a_path(op, kernel)).collect();
        assert_eq!(forgotten, [], "host{at} forgets when it is killed");
    }

    /// The process dies: what is on disk and in the kernel stays.
    pub(super) fn kill(&mut self, at: usize) {
        self.hosts[at].node = None;
        self.hosts[at].carried.clear();
        self.hosts[at].relay = Relay::new(Limits::default(), self.now);
        let gone: Vec<_> = self.sessions.keys().filter(|(host, _)| *host == at).copied().collect();
        for end in gone {
            if let Some(other) = self.sessions.remove(&end) {
                self.sessions.remove(&other);
                self.schedule(
                    DELAY,
                    Event::Closed { to: other.0, session: other.1, reason: "connection reset".into() },
                );
            }
        }
        self.queue.retain(|_, event| {
            !matches!(event, Event::Deliver { to, .. } | Event::Datagram { to, .. } | Event::Applied { to, .. } | Event::Tick { to } if *to == at)
        });
    }

    pub(super) fn cut(&mut self, a: usize, b: usize) {
        self.cut.insert((a.min(b), a.max(b)));
        let broken: Vec<_> = self
            .sessions
            .iter()
            .filter(|((x, _), (y, _))| (*x == a && *y == b) || (*x == b && *y == a))
            .map(|(end, _)| *end)
            .collect();
        for end in broken {
            self.sessions.remove(&end);
            self.schedule(
                Duration::from_secs(15),
                Event::Closed { to: end.0, session: end.1, reason: "timed out".into() },
            );
        }
    }

    pub(super) fn heal(&mut self) {
        self.cut.clear();
    }

    fn connected(&self, a: usize, b: usize) -> bool {
        !self.cut.contains(&(a.min(b), a.max(b)))
    }

    fn schedule(&mut self, after: Duration, event: Event) {
        self.sequence += 1;
        self.queue.insert((self.now + after, self.sequence), event);
    }

    pub(super) fn request(&mut self, at: usize, request: Request) -> RequestId {
        self.next_request += 1;
        let id = RequestId(self.next_request);
        self.input(at, Input::Request(id, request));
        id
    }

    fn input(&mut self, at: usize, input: Input) {
        let now = self.now;
        let Some(node) = self.hosts[at].node.as_mut() else { return };
        node.handle(input, now);
        let mut answers = VecDeque::new();
        loop {
            let host = &mut self.hosts[at];
            let Some(node) = host.node.as_mut() else { return };
            if let Some(mark) = node.start_to_note() {
                host.last_start = Some((self.boot, mark));
            }
            match node.poll_output() {
                Output::Timeout(next) => {
                    if let Some(answer) = answers.pop_front() {
                        node.handle(answer, now);
                        continue;
                    }
                    assert!(next > now, "a deadline in the past");
                    assert!(node.desires_what_it_should(), "host{at} has missed a change");
                    self.hosts[at].next = next;
                    self.schedule(next - now, Event::Tick { to: at });
                    return;
                }
                Output::Dial { target } => self.schedule(DELAY, Event::Open { from: at, target }),
                Output::Send { session, frame } => {
                    if let Some((id, wire)) = self.hosts[at].wire(session) {
                        wire.send(&frame);
                        answers.extend(pieces(id, wire));
                    } else if let Some((to, session)) = self.sessions.get(&(at, session)).copied() {
                        let frame = match (&mut self.lie, crate::message::Message::decode(&frame)) {
                            (Some(lie), Ok(message)) => lie(at, to, message).encode(),
                            _ => frame,
                        };
                        for frame in (self.on_wire)(at, frame.to_vec()) {
                            self.schedule(DELAY, Event::Deliver { to, session, frame });
                        }
                    }
                }
                Output::Datagram { to, bytes } => {
                    let target = (0..self.hosts.len()).find(|host| address(*host) == to);
                    if let Some(to) = target.filter(|to| self.connected(at, *to)) {
                        self.schedule(DELAY, Event::Datagram { to, from: address(at), bytes });
                    }
                }
                Output::Measure { to, bytes } => {
                    self.measured += 1;
                    let target = (0..self.hosts.len()).find(|host| address(*host) == to);
                    let passes =
                        |to: &usize| self.narrow.get(&(at, *to)).is_none_or(|most| bytes.len() + 28 <= *most);
                    if let Some(to) = target.filter(|to| self.connected(at, *to) && passes(to)) {
                        self.schedule(DELAY, Event::Datagram { to, from: address(at), bytes });
                    }
                }
                Output::Narrow { to, mtu } => self.hosts[at].narrowed.push((to, mtu)),
                Output::LaneDatagram { port, to, bytes } => {
                    let target = (0..self.hosts.len()).find(|host| address(*host) == to);
                    if let Some(to) = target.filter(|to| self.connected(at, *to)) {
                        let from = SocketAddr::new(address(at).ip(), port);
                        self.schedule(DELAY, Event::Datagram { to, from, bytes });
                    }
                }
                Output::Register { node, key, endpoint, serial } => {
                    let address = endpoint.remote;
                    let known = self.hosts[at].relay.serves(&key, now);
                    if self.hosts[at].relay.register(key, endpoint, serial, now).is_ok() {
                        answers.push_back(Input::Registered { node, key, address, serial, known });
                    }
                }
                Output::Carried { id, what } => answers.extend(self.carried(at, id, what)),
                Output::Trust { .. } => {}
                Output::Close { session, reason } => {
                    if let Some((id, _)) = self.hosts[at].wire(session) {
                        self.hosts[at].carried.remove(&id);
                        answers.push_back(Input::Carried { id, what: CarriedInput::Ended(reason.clone()) });
                    } else if let Some(other) = self.sessions.remove(&(at, session)) {
                        // What was sent before is delivered first.
                        self.schedule(
                            DELAY,
                            Event::Closed {
                                to: other.0,
                                session: other.1,
                                reason: "closed by the other end".into(),
                            },
                        );
                    }
                    answers.push_back(Input::SessionClosed { session, reason });
                }
                Output::Persist { ticket, files } => {
                    let host = &mut self.hosts[at];
                    if host.disk_full {
                        answers.push_back(Input::PersistFailed(ticket, "no space left on device".into()));
                    } else {
                        host.wrote += 1;
                        host.disk.extend(files.into_iter().map(|(file, bytes)| (file, bytes.to_vec())));
                        answers.push_back(Input::Persisted(ticket));
                    }
                }
                Output::Desired { revision, state } => {
                    let Host { kernel, peers_gone, .. } = &mut self.hosts[at];
                    for op in diff(kernel, &state) {
                        kernel.apply(&op);
                        if let Op::RemovePeer { peer, .. } = op {
                            peers_gone.insert(peer);
                        }
                    }
                    assert_eq!(diff(kernel, &state), [], "applying the difference leaves none");
                    if !self.hosts[at].disk_full {
                        self.check_crash(at);
                    }
                    self.schedule(Duration::from_millis(2), Event::Applied { to: at, revision });
                }
                Output::Refuse { reason } => {
                    self.hosts[at].refused = Some(reason);
                    return self.kill(at);
                }
                Output::Reply(id, answer) => {
                    self.hosts[at].replies.insert(id, answer);
                }
            }
        }
    }

    /// The shell's part in a connection that another host carries.
    fn carried(&mut self, at: usize, id: CarriedId, what: CarriedOutput) -> Vec<Input> {
        let me = self.hosts[at].identity.public();
        let happened = match what {
            CarriedOutput::Begin { dials } => {
                let mut nonce = [0; 32];
                self.rng.fill_bytes(&mut nonce);
                let wire = Wire::new(dials, *me.as_bytes(), nonce, WINDOW as usize);
                self.hosts[at].carried.insert(id, (wire, None));
                Vec::new()
            }
            CarriedOutput::End => {
                let session = self.hosts[at].carried.remove(&id).and_then(|(_, session)| session);
                let reason = "the carried connection has ended".to_owned();
                return session.map(|session| Input::SessionClosed { session, reason }).into_iter().collect();
            }
            CarriedOutput::Bytes(bytes) => {
                let Some((wire, _)) = self.hosts[at].carried.get_mut(&id) else { return Vec::new() };
                let mut happened: Vec<Input> = Vec::new();
                let taken = u32::try_from(bytes.len()).unwrap();
                happened.push(Input::Carried { id, what: CarriedInput::Taken(taken) });
                for what in wire.receive(&bytes) {
                    let (wire, session) = self.hosts[at].carried.get_mut(&id).unwrap();
                    match what {
                        Happened::Frame(frame) => {
                            let session = session.expect("opened");
                            happened.push(Input::SessionFrame { session, frame: frame.into() });
                        }
                        Happened::Opened { peer, seed } => {
                            self.next_session += 1;
                            let name = SessionId(self.next_session);
                            *session = Some(name);
                            let dials = wire.dials;
                            let known = self.hosts.iter().map(|host| host.identity.public());
                            let Some(peer) = known.into_iter().find(|key| *key.as_bytes() == peer) else {
                                let what = CarriedInput::Ended("it is nobody".to_owned());
                                return vec![Input::Carried { id, what }];
                            };
                            let ends = if dials { (me, peer) } else { (peer, me) };
                            let (dialler, acceptor) = MemoryChannel::pair(ends.0, ends.1, &seed);
                            let channel = if dials { dialler } else { acceptor };
                            let secrets = SessionSecrets::derive(&channel).unwrap();
                            happened.push(Input::CarriedOpened { id, session: name, peer, secrets });
                        }
                    }
                }
                happened
            }
            CarriedOutput::Credit(bytes) => {
                if let Some((wire, _)) = self.hosts[at].carried.get_mut(&id) {
                    wire.add_credit(bytes as usize);
                }
                Vec::new()
            }
        };
        let wire = self.hosts[at].carried.get_mut(&id);
        // What is said comes before what follows from what was heard.
        let said = wire.map(|(wire, _)| pieces(id, wire)).unwrap_or_default();
        said.into_iter().chain(happened).collect()
    }

    fn step(&mut self) -> bool {
        let Some(((time, _), event)) = self.queue.pop_first() else { return false };
        self.now = time;
        match event {
            Event::Tick { to } => {
                if self.hosts[to].next <= self.now {
                    self.input(to, Input::Tick);
                }
            }
            Event::Deliver { to, session, frame } => {
                self.input(to, Input::SessionFrame { session, frame: frame.into() });
            }
            Event::Datagram { to, from, bytes } => self.input(to, Input::Datagram { from, to: None, bytes }),
            Event::Closed { to, session, reason } => {
                self.sessions.remove(&(to, session));
                self.input(to, Input::SessionClosed { session, reason });
            }
            Event::Applied { to, revision } => {
                self.input(to, Input::Applied { revision, problems: Vec::new() })
            }
            Event::Open { from, target } => self.open(from, target),
        }
        true
    }

    fn open(&mut self, from: usize, target: SocketAddr) {
        let to = (0..self.hosts.len()).find(|host| address(*host) == target);
        let reachable = to.filter(|to| self.hosts[*to].node.is_some() && self.connected(from, *to));
        let Some(to) = reachable else {
            return self.input(from, Input::DialFailed { target, reason: "connection refused".into() });
        };
        if self.hosts[from].node.is_none() {
            return;
        }
        let mut seed = [0; 32];
        self.rng.fill_bytes(&mut seed);
        let (a, b) = (self.hosts[from].identity.public(), self.hosts[to].identity.public());
        let (at_from, at_to) = MemoryChannel::pair(a, b, &seed);
        self.next_session += 2;
        let (dialler, acceptor) = (SessionId(self.next_session), SessionId(self.next_session + 1));
        self.sessions.insert((from, dialler), (to, acceptor));
        self.sessions.insert((to, acceptor), (from, dialler));
        let ephemeral = SocketAddr::new(address(from).ip(), 40_000);
        self.input(
            to,
            Input::SessionOpened {
                session: acceptor,
                peer: a,
                dialled: None,
                remote: ephemeral,
                secrets: SessionSecrets::derive(&at_to).unwrap(),
            },
        );
        self.input(
            from,
            Input::SessionOpened {
                session: dialler,
                peer: b,
                dialled: Some(target),
                remote: target,
                secrets: SessionSecrets::derive(&at_from).unwrap(),
            },
        );
    }

    pub(super) fn run(&mut self, span: Duration) {
        let end = self.now + span;
        while self.queue.first_key_value().is_some_and(|((time, _), _)| *time <= end) {
            self.step();
        }
        self.now = end;
    }

    /// Runs until `done`, at most `limit`; returns how long it took.
    pub(super) fn run_until(
        &mut self,
        limit: Duration,
        mut done: impl FnMut(&Self) -> bool,
    ) -> Option<Duration> {
        let start = self.now;
        while !done(self) {
            if self.now.since(start) > limit || !self.step() {
                return None;
            }
        }
        Some(self.now.since(start))
    }

    pub(super) fn running(&self) -> Vec<usize> {
        (0..self.hosts.len()).filter(|host| self.hosts[*host].node.is_some()).collect()
    }

    pub(super) fn node(&self, at: usize) -> &Node {
        self.hosts[at].node.as_ref().unwrap()
    }

    /// One cluster, equal views, and a usable tunnel between every two running hosts.
    pub(super) fn meshed(&self) -> bool {
        let running = self.running();
        let views: Option<Vec<&View>> = running.iter().map(|host| self.node(*host).view()).collect();
        let Some(views) = views else { return false };
        let equal = views.windows(2).all(|pair| pair[0].items().eq(pair[1].items()));
        equal
            && running.iter().all(|host| self.node(*host).is_ready())
            && running.iter().all(|a| running.iter().all(|b| a == b || self.tunnel(*a, *b)))
    }

    /// Whether a packet from host `a` would get to host `b` through their lanes, in the kernels of both.
    pub(super) fn tunnel(&self, a: usize, b: usize) -> bool {
        let (here, there) = (&self.hosts[a], &self.hosts[b]);
        let (Some(lane), Some(other)) = (here.kernel.lanes.get("meshwg0"), there.kernel.lanes.get("meshwg0"))
        else {
            return false;
        };
        let (Some(out), Some(back)) =
            (lane.peers.get(&there.lane.public()), other.peers.get(&here.lane.public()))
        else {
            return false;
        };
        let routed = out.allowed_ips.iter().all(|net| {
            matches!(here.kernel.routes.get(net), Some(Route::Devices { devices, .. }) if devices.contains("meshwg0"))
        });
        let owned = there
            .kernel
            .bridge
            .iter()
            .flat_map(|bridge| &bridge.addresses)
            .all(|address| out.allowed_ips.iter().any(|net| net.contains(address)));
        routed && owned && out.psk == back.psk && out.endpoint == Some(SocketAddr::new(address(b).ip(), 6784))
    }

    /// What must hold at every moment.
    pub(super) fn check(&self) {
        let mut addresses = BTreeMap::new();
        for (at, host) in self.hosts.iter().enumerate() {
            for lane in host.kernel.lanes.values() {
                for key in lane.peers.keys() {
                    let owner = self.hosts.iter().position(|other| other.lane.public() == *key).unwrap();
                    assert_ne!(owner, at, "a node is its own peer");
                }
            }
            let cluster = host.node.as_ref().and_then(Node::view).map(View::cluster);
            if host.node.as_ref().is_some_and(Node::is_out) {
                continue;
            }
            let own = host.kernel.bridge.iter().flat_map(|bridge| bridge.addresses.iter().copied());
            let pods =
                host.kernel.ports.values().flat_map(|port| [IpAddr::V4(port.ipv4), IpAddr::V6(port.ipv6)]);
            for address in own.chain(pods) {
                assert_eq!(
                    addresses.insert((cluster, address), at),
                    None,
                    "address {address} has two owners"
                );
            }
            if let Some(view) = host.node.as_ref().and_then(Node::view) {
                assert!(view.grants().conflicts().is_empty(), "a range was granted twice");
                assert!(
                    host.kernel.routes.values().filter(|route| **route == Route::Unreachable).count() >= 2
                );
                assert!(host.kernel.guard.is_some());
            }
        }
    }

    /// Attaches a pod as the plugin does.
    pub(super) fn attach(&mut self, at: usize, name: &str) -> Result<crate::api::Attachment, ApiError> {
        let id = AttachmentId::new(name, "eth0").unwrap();
        let request = AttachRequest {
            id: id.clone(),
            netns: "/run/netns/x".into(),
            network: "mesh".into(),
            pod: None,
            netns_id: Some(NETNS),
        };
        let lease = self.request(at, Request::Attach(request));
        match self.answer(at, lease) {
            Ok(Response::Attachment(attachment)) => assert_eq!(attachment.state, AttachmentState::Leased),
            Ok(other) => panic!("{other:?}"),
            Err(error) => return Err(error),
        }
        let activate = self.request(at, Request::Activate(id));
        match self.answer(at, activate)? {
            Response::Attachment(attachment) => Ok(*attachment),
            other => panic!("{other:?}"),
        }
    }

    pub(super) fn answer(&mut self, at: usize, id: RequestId) -> Result<Response, ApiError> {
        self.run_until(Duration::from_secs(5), |sim| sim.hosts[at].replies.contains_key(&id))
            .expect("an answer");
        self.hosts[at].replies.remove(&id).unwrap()
    }

    pub(super) fn fingerprint(&self) -> Vec<Arc<HostState>> {
        self.running().into_iter().map(|host| self.node(host).desired.clone()).collect()
    }
}
