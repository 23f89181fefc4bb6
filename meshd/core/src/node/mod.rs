//! The node: the state machine that decides everything.
//!
//! # Contract
//!
//! The caller owns time, sockets, disk and kernel. It feeds one [`Input`] at a time to [`Node::handle`], each
//! with the current [`Time`] (never earlier than before), and then takes outputs from [`Node::poll_output`] until
//! it returns [`Output::Timeout`]: the moment at which [`Input::Tick`] is due if nothing else happens first.
//! Outputs are carried out in the order given; in particular everything after an [`Output::Persist`] may rely on
//! the files being durable, unless the caller reports [`Input::PersistFailed`].
//!
//! The same seed and the same inputs give the same outputs, byte for byte.

mod allowance;
mod attach;
mod carry;
mod copies;
mod datagrams;
mod desired;
mod diagnose;
mod dial;
mod flows;
mod gossip;
mod ipam;
mod join;
mod leave;
mod mtu;
mod nat;
mod overlap;
mod paths;
mod policy;
mod psk;
mod registrations;
mod removal;
mod sessions;
mod status;
#[cfg(test)]
mod tests;
mod tokens;
mod tries;
mod vanished;
mod writing;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use ipnet::{IpNet, Ipv4Net};
use mesh_keys::join::JoinKey;
use mesh_keys::password::{Password, PasswordRecord};
use mesh_keys::{
    Identity, IdentityKey, JoinToken, JoinWindow, NodeId, SessionSecrets, TokenId, WgPublic, WgSecret,
};
use rand_chacha::ChaCha20Rng;
use rand_core::{RngCore, SeedableRng};
use zeroize::Zeroizing;

use crate::api::{
    ApiError, AttachRequest, Attachment, AttachmentId, DoctorReport, GcReport, GcRequest, JoinWindowStatus,
    NewToken, RemovalPlan, Status, TokenList, WhyReport, WhyRequest,
};
use crate::diagnose::Setting;
use crate::host::HostState;
use crate::leases::Leases;
use crate::overlap::HostPrefix;
use crate::relay::Endpoint;
use crate::state::{StateFile, Stored, StoredNode, Writes};
use crate::time::Time;
use crate::view::{Delta, View};

pub use carry::{CarriedId, CarriedInput, CarriedOutput, PIECE, WINDOW};
pub use copies::{NoStartMark, StartMark, Superseded};
pub use dial::MAX_CALLS;
pub use vanished::{GONE_FOR, NetnsLook, Remains};

/// What the operator decided.
#[derive(Debug)]
pub struct Config {
    /// Label of the node.
    pub name: String,
    /// Name of the cluster, if this node founds it.
    pub cluster_name: String,
    /// IPv4 range of the cluster, if this node founds it.
    pub ipv4_range: Ipv4Net,
    /// Length of the prefix of a block, if this node founds the cluster.
    pub block_prefix: u8,
    /// The admin keys of the cluster, if this node founds it; none for a flat one.
    pub admin_keys: Vec<IdentityKey>,
    /// What lets this node in, and what it asks of others.
    pub secret: JoinSecret,
    /// Where to find members; empty on a node that may found a cluster by itself.
    pub seeds: Vec<Seed>,
    /// Addresses to tell others instead of those of the host's devices.
    pub advertise: Vec<IpAddr>,
    /// Port for control sessions (TCP) and gossip (UDP).
    pub control_port: u16,
    /// Calls to members under way at a time, seeds apart; 0: none are called.
    pub max_calls: usize,
    /// The tunnel devices.
    pub lanes: Vec<LaneConfig>,
    /// MTU inside the tunnels in bytes; derived from the underlay when absent.
    pub mtu: Option<u32>,
    /// Pause between two tries to find a larger path MTU: [`RAISED`](crate::path::mtu::RAISED).
    pub mtu_raise: Duration,
    /// Version of the daemon.
    pub software: String,
    /// Identifies the boot of the host.
    pub boot: String,
    /// What [`Node::start_to_note`] said last, if that was on this host and since its boot: from a place that does not
    /// outlive the boot and is on no copy of the disk.
    pub previous_start: Option<StartMark>,
    /// Who carries the tunnels, and why; for the status.
    pub backend: (crate::api::Backend, String),
}

/// A tunnel device of this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LaneConfig {
    /// Number of the lane.
    pub index: u8,
    /// Name of the device.
    pub device: String,
    /// UDP port.
    pub port: u16,
    /// Its public key.
    key: WgPublic,
    /// Its key: to prove to others that it is this node's. The kernel's state does not have it; the caller configures
    /// the device with it.
    secret: WgSecret,
}

impl LaneConfig {
    /// A device with this key.
    pub fn new(index: u8, device: impl Into<String>, port: u16, secret: WgSecret) -> Self {
        Self { index, device: device.into(), port, key: secret.public(), secret }
    }
}

/// An address from the list of the operator, and what it stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seed {
    /// As the operator wrote it.
    pub text: String,
    /// What it resolves to at present.
    pub addresses: Vec<SocketAddr>,
}

/// What admits nodes to the cluster.
pub enum JoinSecret {
    /// A key file.
    Key(JoinKey),
    /// A password, and the record by which this node checks others'.
    Password {
        /// For joining.
        password: Password,
        /// For admitting.
        record: Box<PasswordRecord>,
    },
    /// A token: it lets this node in, and nobody else by it.
    Token(Box<JoinToken>),
    /// None: it is a member that came by a token.
    None,
}

impl std::fmt::Debug for JoinSecret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Key(_) => f.write_str("JoinSecret::Key(redacted)"),
            Self::Password { .. } => f.write_str("JoinSecret::Password(redacted)"),
            Self::Token(token) => write!(f, "JoinSecret::Token({})", token.id),
            Self::None => f.write_str("JoinSecret::None"),
        }
    }
}

/// What the host is like at present.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostFacts {
    /// Addresses of the host's devices that others might reach, ours left out.
    pub addresses: Vec<IpAddr>,
    /// Largest MTU of the devices with those addresses, in bytes.
    pub underlay_mtu: Option<u32>,
    /// Whether frames between bridge ports go through iptables (`bridge-nf-call-*`, either family).
    pub bridge_netfilter: bool,
    /// Devices that take IPv6 configuration from router advertisements, and would stop when forwarding is on.
    pub router_advertisements: Vec<String>,
    /// Networks that the host has without the mesh, in order.
    pub prefixes: Vec<HostPrefix>,
    /// Whether the bridge of a mesh is there.
    pub bridge: bool,
    /// Ranges that a route of ours ends already: those of a mesh that is in force on this host.
    pub closed: Vec<IpNet>,
    /// Ranges that a route of ours leads into a tunnel, each with its MTU, in bytes, if it has one. To be told only until
    /// there is a desired state: what was found by the daemon before this one.
    pub route_mtus: BTreeMap<IpNet, Option<u32>>,
}

/// What WireGuard tells of a peer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TunnelFacts {
    /// Where its packets go.
    pub endpoint: Option<SocketAddr>,
    /// Time since the last handshake.
    pub handshake_age: Option<Duration>,
    /// Bytes received.
    pub rx_bytes: u64,
    /// Bytes sent.
    pub tx_bytes: u64,
}

/// Names a control session; never used twice by one process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId(pub u64);

/// Names a request of the control API.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u64);

/// Names a write to disk whose success the node waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(pub u64);

/// What happened.
#[derive(Debug)]
pub enum Input {
    /// The time of the last [`Output::Timeout`] has come.
    Tick,
    /// What the host's clock shows. To be told at the start, every minute or so, and when it was set; before the
    /// first time nothing that expires is taken to be valid.
    WallClock {
        /// Seconds since 1970.
        unix_seconds: u64,
    },
    /// The host is different from what it was.
    Host(HostFacts),
    /// The seeds resolve to other addresses.
    Seeds(Vec<Seed>),
    /// A control session is set up: both ends have proved their identity keys.
    SessionOpened {
        /// Its name.
        session: SessionId,
        /// The other end.
        peer: IdentityKey,
        /// Where it was dialled; absent when the other end dialled.
        dialled: Option<SocketAddr>,
        /// Address of the other end.
        remote: SocketAddr,
        /// Bound to the session.
        secrets: SessionSecrets,
    },
    /// A control session is set up on a connection that another member carries: both ends have proved their identity keys.
    CarriedOpened {
        /// The connection.
        id: CarriedId,
        /// Its name.
        session: SessionId,
        /// The other end.
        peer: IdentityKey,
        /// Bound to the session.
        secrets: SessionSecrets,
    },
    /// Something has happened with a connection that another member carries.
    Carried {
        /// The connection.
        id: CarriedId,
        /// What.
        what: CarriedInput,
    },
    /// A frame came in.
    SessionFrame {
        /// On which session.
        session: SessionId,
        /// The frame.
        frame: Zeroizing<Vec<u8>>,
    },
    /// A session ended, whoever ended it.
    SessionClosed {
        /// Which.
        session: SessionId,
        /// Why.
        reason: String,
    },
    /// Nobody answered at an address, or not as a node does.
    DialFailed {
        /// The address.
        target: SocketAddr,
        /// Why.
        reason: String,
    },
    /// The files of an [`Output::Persist`] are durable.
    Persisted(Ticket),
    /// They are not; the old ones are intact.
    PersistFailed(Ticket, String),
    /// The kernel is as [`Output::Desired`] of that revision wants it, but for the problems.
    Applied {
        /// The revision.
        revision: u64,
        /// What could not be done.
        problems: Vec<Problem>,
    },
    /// A datagram came in on the control port.
    Datagram {
        /// Where from.
        from: SocketAddr,
        /// To which address of this host, if that is known.
        to: Option<IpAddr>,
        /// All of it.
        bytes: Vec<u8>,
    },
    /// A lane is registered at the relay: see [`Output::Register`].
    Registered {
        /// Whose it is.
        node: NodeId,
        /// Its public key.
        key: WgPublic,
        /// Where it is.
        address: SocketAddr,
        /// Of the registration.
        serial: u64,
        /// Whether it was registered before already.
        known: bool,
    },
    /// What WireGuard tells, of all peers.
    Tunnels(BTreeMap<WgPublic, TunnelFacts>),
    /// A request of the control API.
    Request(RequestId, Request),
    /// Attachments that were deleted while the daemon was away.
    Tombstones(Vec<AttachmentId>),
    /// What is left of attachments; of those that are not named, nothing is known.
    Remains {
        /// When the look began.
        begun: Time,
        /// What was seen.
        remains: BTreeMap<AttachmentId, Remains>,
    },
}

/// Something in the kernel is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The device it is about; the guard and sysctls have names of their own.
    pub object: String,
    /// A sentence.
    pub text: String,
}

/// The object of a [`Problem`] with the guard ruleset.
pub const GUARD_OBJECT: &str = "nftables";

/// A request of the control API.
#[derive(Debug)]
pub enum Request {
    /// `GET /v1/status`
    Status,
    /// `POST /v1/why`
    Why(WhyRequest),
    /// `GET /v1/doctor`
    Doctor {
        /// Whether members that were not heard of late are probed.
        look: bool,
        /// Settings of the host that the daemon has changed; or why that is not known.
        settings: Result<Vec<Setting>, String>,
    },
    /// `GET /v1/ready`
    Ready,
    /// `POST /v1/attachments`
    Attach(AttachRequest),
    /// `POST /v1/attachments/{container}/{ifname}/activate`
    Activate(AttachmentId),
    /// `GET /v1/attachments/{container}/{ifname}`
    Get(AttachmentId),
    /// `GET /v1/attachments`
    List,
    /// `DELETE /v1/attachments/{container}/{ifname}`
    Detach(AttachmentId),
    /// `POST /v1/attachments/gc`
    Gc(GcRequest),
    /// `POST /v1/removals` without a signature: a member is removed for good, by the signature of this node.
    Remove(NodeId),
    /// The same and other statements of an authority, with signatures: all of it is taken, or nothing.
    Declare(Box<Delta>),
    /// `GET /v1/removals/prepare`: what the removal of a node has to say.
    PrepareRemoval(String),
    /// `POST` and `DELETE /v1/leave`: this node leaves the cluster, or stays after all.
    Leave(bool),
    /// `GET /v1/join-window`
    JoinWindow,
    /// `PUT /v1/join-window` without a signature
    SetJoinWindow(JoinWindow),
    /// `GET /v1/tokens`
    Tokens,
    /// `POST /v1/tokens` without a signature
    CreateToken(NewToken),
    /// `POST /v1/tokens/revocations` without a signature
    RevokeToken(TokenId),
}

/// The answer to a [`Request`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Response {
    /// Done; there is nothing to tell.
    Done,
    /// To a status request.
    Status(Box<Status>),
    /// What a flow meets.
    Why(Box<WhyReport>),
    /// How the host is.
    Doctor(Box<DoctorReport>),
    /// To attach, activate and get.
    Attachment(Box<Attachment>),
    /// To list.
    Attachments(Vec<Attachment>),
    /// To a garbage collection.
    Gc(GcReport),
    /// To a removal that is being prepared.
    RemovalPlan(Box<RemovalPlan>),
    /// To a question for the join window.
    JoinWindow(JoinWindowStatus),
    /// To a question for the tokens.
    Tokens(TokenList),
}

/// What is to be done.
#[derive(Debug)]
pub enum Output {
    /// Open a control session, and report [`Input::SessionOpened`] or [`Input::DialFailed`].
    Dial {
        /// Where to.
        target: SocketAddr,
    },
    /// Something is to be done with a connection that another member carries.
    Carried {
        /// The connection.
        id: CarriedId,
        /// What.
        what: CarriedOutput,
    },
    /// Send a frame.
    Send {
        /// On which session.
        session: SessionId,
        /// The frame.
        frame: Zeroizing<Vec<u8>>,
    },
    /// The other end is a member: longer frames may come.
    Trust {
        /// Which session.
        session: SessionId,
    },
    /// End a session once all that was sent is out. [`Input::SessionClosed`] follows.
    Close {
        /// Which.
        session: SessionId,
        /// Why, for the log.
        reason: String,
    },
    /// Send a datagram from the control port. Nothing depends on whether it arrives.
    Datagram {
        /// Where to.
        to: SocketAddr,
        /// All of it.
        bytes: Vec<u8>,
    },
    /// Send a datagram with the port of a lane as its source. Nothing depends on whether it arrives.
    LaneDatagram {
        /// The lane's port.
        port: u16,
        /// Where to.
        to: SocketAddr,
        /// All of it.
        bytes: Vec<u8>,
    },
    /// Send a datagram from the control port as one packet: neither this host nor others may cut it up, and what the kernel
    /// believes of the way's MTU does not matter. Nothing depends on whether it arrives.
    Measure {
        /// Where to.
        to: SocketAddr,
        /// All of it.
        bytes: Vec<u8>,
    },
    /// Tell the kernel that packets to an address may have so many bytes at most, IP header included, as a router does.
    Narrow {
        /// Where they go.
        to: IpAddr,
        /// At least 1,280.
        mtu: u16,
    },
    /// Relay for a lane, and report [`Input::Registered`] if that is possible: see
    /// [`Relay::register`](crate::relay::Relay::register). With each [`Output::Desired`] those lanes are no longer served
    /// that the node does not [know](Node::knows_lane).
    Register {
        /// Whose it is.
        node: NodeId,
        /// Its public key.
        key: WgPublic,
        /// Where it is.
        endpoint: Endpoint,
        /// Orders the registrations of the lane.
        serial: u64,
    },
    /// Replace files, durably, each as a whole; then report [`Input::Persisted`] or [`Input::PersistFailed`].
    Persist {
        /// Its name.
        ticket: Ticket,
        /// The files. Some hold secrets: mode 0600.
        files: Vec<(StateFile, Zeroizing<Vec<u8>>)>,
    },
    /// Make the kernel so; report [`Input::Applied`], also when nothing had to be done.
    Desired {
        /// Counts the states.
        revision: u64,
        /// The state.
        state: Arc<HostState>,
    },
    /// Answer a request.
    Reply(RequestId, Result<Response, ApiError>),
    /// The node cannot work on this host: the process ends and tells why. Nothing was set up.
    Refuse {
        /// A sentence that names what is in the way and what to change.
        reason: String,
    },
    /// All is done. Come back at this moment at the latest.
    Timeout(Time),
}

/// A node of the mesh.
pub struct Node {
    config: Config,
    identity: Identity,
    me: IdentityKey,
    id: NodeId,
    rng: ChaCha20Rng,
    started: Time,
    now: Time,
    /// What the host's clock showed, and when.
    wall_clock: Option<(u64, Time)>,
    /// `None` until the shell has looked; nothing is done to the kernel before.
    host: Option<HostFacts>,

    /// The cluster, once this node is a member and that is durable.
    view: Option<View>,
    stored: StoredNode,
    version: u64,
    leases: Leases,
    standing: copies::Standing,
    /// Since when it is known that nothing is left of these attachments; so it was at every look since.
    vanishing: BTreeMap<AttachmentId, Time>,
    /// What of the host overlaps with the cluster's ranges, in a sentence.
    overlap: Option<String>,
    /// It was a member when it started.
    was_member: bool,
    /// It cannot work on this host.
    refused: bool,

    sessions: sessions::Sessions,
    dialer: dial::Dialer,
    carrier: carry::Carrier,
    join: join::Join,
    tries: tries::Watch,
    pairs: psk::Pairs,
    paths: paths::Paths,
    nats: nat::Nats,
    mtus: mtu::Mtus,
    registrations: registrations::Registrations,
    /// For people only.
    flows: flows::Flows,
    looks: diagnose::Looks,
    /// Whose each tunnel key is.
    owners: BTreeMap<WgPublic, NodeId>,
    tunnels: BTreeMap<WgPublic, TunnelFacts>,
    /// What all members know and who is alive, while this node is a member.
    gossip: Option<crate::gossip::Gossip>,
    early: gossip::Early,
    datagrams: datagrams::Datagrams,
    heirs: gossip::Heirs,
    /// When promises that came in are looked at.
    next_settle: Option<Time>,
    addresses_asked: Option<Time>,
    /// How many members were asked since there were enough.
    asked_in_vain: usize,
    /// When other members were given addresses last.
    gave: BTreeMap<NodeId, Time>,
    /// The operator has decided that this node leaves the cluster.
    leave: Option<leave::Leave>,

    /// Writes in flight and what follows them.
    pending: BTreeMap<Ticket, writing::Pending>,
    tickets: u64,
    /// Number of the last write that was asked for, and the writes that are under way.
    writes: u64,
    writing: BTreeMap<Ticket, (Writes, usize)>,
    /// The writes that are on disk.
    durable: Writes,
    /// What has changed since it was last written.
    dirty: BTreeSet<StateFile>,
    /// When what others say of themselves is written, if nothing else is: it could be had from them again.
    dirty_later: Option<Time>,
    /// What could not be written yet, and so was not said.
    unsaid: Delta,
    flushed: Time,
    next_flush: Time,
    desired: Arc<HostState>,
    /// Something may have changed since `desired` was computed.
    stale: bool,
    /// When it may be computed again.
    next_desired: Time,
    /// It has changed, and waits for the next write.
    held: bool,
    /// Somebody waits for the revision after this one.
    promised: bool,
    revision: u64,
    applied: u64,
    /// What the kernel had when it last was as wanted.
    in_kernel: Arc<HostState>,
    problems: Vec<Problem>,
    /// Activations that wait for a revision.
    activating: Vec<(RequestId, AttachmentId, u64)>,
    outputs: VecDeque<Output>,
    next: Time,
}

impl Node {
    /// A node as it was when it last wrote its state. This start is counted already ([`Stored::count_start`]), and that
    /// is durable. `seed` is random.
    pub fn new(config: Config, identity: Identity, stored: Stored, seed: [u8; 32], now: Time) -> Self {
        let me = identity.public();
        let known = !stored.leases.leases.is_empty() || !stored.leases.resting.is_empty();
        let other_boot = known && stored.leases.boot != config.boot;
        let leave = stored.node.leaving.then(|| leave::Leave::new(now));
        let leases = Leases::restore(stored.leases, &config.boot, now);
        let mut rng = ChaCha20Rng::from_seed(seed);
        let datagrams = datagrams::Datagrams::restore(stored.group, me.node_id(), &mut rng);
        let disk = StartMark {
            node: me.node_id(),
            generation: stored.node.generation,
            writes: stored.writes,
            superseded: None,
        };
        let is_member = stored.view.is_some();
        let standing = copies::Standing::new(rng.next_u64(), config.previous_start, disk, is_member);
        let mut node = Self {
            id: me.node_id(),
            me,
            identity,
            rng,
            started: now,
            now,
            wall_clock: None,
            host: None,
            was_member: is_member,
            view: stored.view,
            stored: stored.node,
            version: 0,
            leases,
            standing,
            vanishing: BTreeMap::new(),
            overlap: None,
            refused: false,
            sessions: sessions::Sessions::default(),
            dialer: dial::Dialer::default(),
            carrier: carry::Carrier::default(),
            join: join::Join::default(),
            tries: tries::Watch::default(),
            pairs: psk::Pairs::restore(stored.keys, &config.lanes),
            paths: paths::Paths::default(),
            nats: nat::Nats::default(),
            mtus: mtu::Mtus::default(),
            registrations: registrations::Registrations::default(),
            flows: flows::Flows::default(),
            looks: diagnose::Looks::default(),
            owners: BTreeMap::new(),
            tunnels: BTreeMap::new(),
            gossip: None,
            early: gossip::Early::default(),
            datagrams,
            heirs: gossip::Heirs::default(),
            next_settle: None,
            addresses_asked: None,
            asked_in_vain: 0,
            gave: BTreeMap::new(),
            leave,
            pending: BTreeMap::new(),
            tickets: 0,
            writes: stored.writes.last(),
            writing: BTreeMap::new(),
            durable: stored.writes,
            // How long the addresses of the last boot have to rest is known from now on.
            dirty: if other_boot { BTreeSet::from([StateFile::Leases]) } else { BTreeSet::new() },
            dirty_later: None,
            unsaid: Delta::default(),
            flushed: now,
            next_flush: now,
            desired: Arc::new(HostState::default()),
            stale: true,
            next_desired: now,
            held: false,
            promised: false,
            revision: 0,
            applied: 0,
            in_kernel: Arc::new(HostState::default()),
            problems: Vec::new(),
            activating: Vec::new(),
            outputs: VecDeque::new(),
            next: now,
            config,
        };
        node.dialer.set_seeds(&node.config.seeds);
        node.refresh_record();
        node.start_gossip();
        node
    }

    /// Takes one input.
    pub fn handle(&mut self, input: Input, now: Time) {
        self.now = now.max(self.now);
        self.leases.expire(self.now);
        self.stale |= self.changes_desired(&input);
        match input {
            Input::Tick => {}
            Input::Datagram { from, to, bytes } => self.on_datagram(from, to, &bytes),
            Input::Registered { node, key, address, serial, known } => {
                self.on_registered(node, key, serial, address, known);
            }
            Input::WallClock { unix_seconds } => self.wall_clock = Some((unix_seconds, self.now)),
            Input::Host(facts) => self.on_host(facts),
            Input::Seeds(seeds) => {
                self.dialer.set_seeds(&seeds);
                self.config.seeds = seeds;
            }
            Input::SessionOpened { session, peer, dialled, remote, secrets } => {
                let way = match dialled {
                    Some(target) => sessions::Way::Dialled(target),
                    None => sessions::Way::Accepted(remote),
                };
                self.on_session_opened(session, peer, way, secrets);
            }
            Input::CarriedOpened { id, session, peer, secrets } => {
                self.on_carried_opened(id, session, peer, secrets);
            }
            Input::Carried { id, what } => self.on_carried(id, what),
            Input::SessionFrame { session, frame } => self.on_frame(session, &frame),
            Input::SessionClosed { session, reason } => self.on_session_closed(session, &reason),
            Input::DialFailed { target, reason } => self.on_dial_failed(target, reason),
            Input::Persisted(ticket) => self.on_persisted(ticket),
            Input::PersistFailed(ticket, error) => self.on_persist_failed(ticket, &error),
            Input::Applied { revision, problems } => self.on_applied(revision, problems),
            Input::Tunnels(tunnels) => self.on_tunnels(tunnels),
            Input::Request(id, request) => self.on_request(id, request),
            Input::Tombstones(ids) => self.on_tombstones(&ids),
            Input::Remains { begun, remains } => self.on_remains(&remains, begun),
        }
        self.advance();
    }

    /// Takes one output; [`Output::Timeout`] when there is nothing else.
    #[must_use]
    pub fn poll_output(&mut self) -> Output {
        self.outputs.pop_front().unwrap_or(Output::Timeout(self.next))
    }

    /// Whether an attach could be served now.
    pub fn is_ready(&self) -> bool {
        self.readiness().is_ok()
    }

    /// The node's id.
    pub fn id(&self) -> NodeId {
        self.id
    }

    /// The node's copy of what all members agree on.
    pub fn view(&self) -> Option<&View> {
        self.view.as_ref()
    }

    /// One value that nodes have in common that know the same, lives of members included; absent before it is in a
    /// cluster.
    pub fn gossip_fingerprint(&self) -> Option<crate::gossip::catalogue::Sum> {
        self.gossip.as_ref().map(crate::gossip::Gossip::fingerprint)
    }

    /// Whether gossip thinks that a member can be reached; `false` for those that are none.
    pub fn is_reachable(&self, id: &NodeId) -> bool {
        self.gossip.as_ref().is_some_and(|gossip| gossip.is_reachable(id))
    }

    /// Whether the kernel's state may have to change because of this input itself. The others come often, and what
    /// they bring about says so when it matters.
    fn changes_desired(&self, input: &Input) -> bool {
        match input {
            Input::Tick
            | Input::Datagram { .. }
            | Input::Registered { .. }
            | Input::WallClock { .. }
            | Input::Seeds(_)
            | Input::SessionFrame { .. }
            | Input::DialFailed { .. }
            | Input::Tunnels(_)
            | Input::PersistFailed(..)
            | Input::Applied { .. }
            | Input::SessionOpened { .. }
            | Input::CarriedOpened { .. }
            | Input::Carried { .. }
            | Input::SessionClosed { .. }
            | Input::Tombstones(_)
            | Input::Remains { .. } => false,
            Input::Persisted(ticket) => {
                self.pending.get(ticket).is_some_and(writing::Pending::is_of_the_view)
            }
            Input::Request(_, Request::Remove(_) | Request::Declare(_)) | Input::Host(_) => true,
            Input::Request(..) => false,
        }
    }

    /// Whether the lane with this key is a member's, as far as this node has had proof.
    pub fn knows_lane(&self, key: &WgPublic) -> bool {
        self.owners.contains_key(key)
    }

    /// How often this node has taken a member for unreachable.
    pub fn given_up(&self) -> u64 {
        self.gossip.as_ref().map_or(0, crate::gossip::Gossip::given_up)
    }

    /// The members that gossip thinks cannot be reached.
    pub fn unreachable(&self) -> Vec<NodeId> {
        self.gossip.as_ref().map(|gossip| gossip.unreachable_members().collect()).unwrap_or_default()
    }

    /// All that is due by itself.
    fn advance(&mut self) {
        self.sweep_sessions();
        self.sweep_carried();
        self.advance_tries();
        self.advance_join();
        self.advance_dialer();
        self.advance_gossip();
        self.advance_addresses();
        self.advance_leave();
        self.advance_pairs();
        self.advance_paths();
        self.advance_mtus();
        self.advance_registrations();
        self.advance_nats();
        self.recompute_desired();
        self.flush();
        self.next = self.next_deadline();
    }

    fn next_deadline(&self) -> Time {
        let deadlines = [
            self.session_deadline(),
            self.carried_deadline(),
            self.join_deadline(),
            self.dial_deadline(),
            self.gossip_deadline(),
            self.pair_deadline(),
            self.path_deadline(),
            self.mtu_deadline(),
            self.registration_deadline(),
            self.nats_deadline(),
            self.addresses_deadline(),
            self.leave_deadline(),
            self.flush_deadline(),
            self.desired_deadline(),
            self.standing_deadline(),
        ];
        let next = deadlines.into_iter().flatten().min().unwrap_or(self.now + IDLE_TICK);
        // A deadline in the past would spin: something due was just done, or waits for an input.
        next.max(self.now + MIN_TICK)
    }

    fn emit(&mut self, output: Output) {
        self.outputs.push_back(output);
    }

    /// A random part of up to a quarter, so that nodes do not act in step.
    fn jitter(&mut self, span: Duration) -> Duration {
        let share = u32::from(self.rng.next_u32() as u16);
        span + span * share / (4 * 65_536)
    }
}

/// How long the node may sleep when it expects nothing.
const IDLE_TICK: Duration = Duration::from_secs(30);

/// Shortest sleep: bounds the rate at which a mistake in a deadline could make the loop spin.
const MIN_TICK: Duration = Duration::from_millis(10);
