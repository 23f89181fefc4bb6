//! The daemon: one loop around [`mesh_core::node::Node`], and the tasks that do its input and output.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, Result, bail};
use mesh_core::api::AttachmentId;
use mesh_core::node::{self, Input, JoinSecret, LaneConfig, Node, Output, RequestId, Response, Seed};
use mesh_core::relay::Endpoint;
use mesh_core::time::Time;
use mesh_keys::join::JoinKey;
use mesh_keys::password::{Password, PasswordRecord};
use mesh_keys::rand_core::{OsRng, RngCore};
use mesh_keys::{JoinToken, NodeId, WgPublic};
use mesh_sys::files;
use mesh_sys::udp::{narrow, send_from, send_whole_from};
use socket2::SockRef;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{mpsc, oneshot, watch};
use zeroize::Zeroizing;

use crate::config::{Config, JoinAddress, SecretSource};
use crate::datagrams::{Datagrams, Incoming};
use crate::dataplane;
use crate::links::{LinkEvent, Links};
use crate::marks::{Heartbeat, Starts};
use crate::session::{self, MAX_SEGMENT, TlsIdentity};
use crate::store::Store;
use crate::{api, http, remains};

/// Inputs that may wait before their senders do.
const QUEUE: usize = 4096;

/// Time for a TCP connection and its TLS handshake.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(5);

/// Pause between two looks at seeds' names and at tombstones.
const HOUSEKEEPING: Duration = Duration::from_secs(5);

/// Pause between two looks at what is left of the attachments.
const LOOK_FOR_REMAINS: Duration = Duration::from_secs(15);

/// Pause between two times at which the node is told what the host's clock shows.
const TELL_TIME: Duration = Duration::from_secs(60);

/// The host's clock was set when it is this many seconds off.
const CLOCK_SLACK: u64 = 2;

/// Longest password or key file.
const MAX_SECRET_FILE: usize = 4096;

/// A request of the control API on its way to the node.
#[derive(Debug)]
pub struct Call {
    /// What is asked.
    pub request: node::Request,
    /// Where the answer goes.
    pub answer: oneshot::Sender<Result<Response, mesh_core::api::ApiError>>,
}

/// Runs the daemon until it is told to stop.
///
/// # Errors
/// What keeps it from starting, in one sentence with its causes.
pub async fn run(config: Config) -> Result<()> {
    match raise_open_files() {
        Ok(limit) => tracing::debug!(limit, "open files"),
        Err(error) => tracing::warn!(%error, "the limit of open files cannot be raised"),
    }
    let store = Store::open(&config.state_dir)?;
    let identity = store.identity(&mut OsRng)?;
    let lane_key = store.lane_key(0, &mut OsRng)?;
    let mut stored = store.read()?;
    let me = identity.public();
    tracing::info!(node = %me.node_id(), name = config.name, version = env!("CARGO_PKG_VERSION"), "meshd starts");
    let secret = join_secret(config.secret.clone(), me, stored.view.is_some()).await?;

    if matches!(secret, JoinSecret::Token(_)) && config.join.is_empty() {
        bail!("token-file: give --join HOST too: a host with a token joins a cluster and founds none");
    }

    let control = listen(config.port).await.with_context(|| {
        format!("port: cannot listen on TCP {}; is another meshd running on this host?", config.port)
    })?;
    let origin = Instant::now();
    let clock = move || Time::from_origin(origin.elapsed());
    let datagrams = Datagrams::bind(config.port, clock()).with_context(|| {
        format!("port: cannot listen on UDP {}; is another meshd running on this host?", config.port)
    })?;
    let (calls, called) = mpsc::channel::<Call>(QUEUE);
    let metrics = match config.metrics_listen {
        Some(address) => Some(
            TcpListener::bind(address)
                .await
                .with_context(|| format!("metrics-listen: cannot listen on TCP {address}"))?,
        ),
        None => None,
    };
    let socket = api::bind(&config.control_socket).context("control-socket")?;
    let boot = boot_id()?;
    let starts = Starts::new(&config.control_socket, &boot);
    let previous_start = starts.read();
    let mut stop = std::pin::pin!(stop_signal()?);

    let tls = TlsIdentity::new(&identity)?;
    let (inputs, input) = mpsc::channel::<Input>(QUEUE);
    let (link_events, links_happened) = mpsc::channel::<LinkEvent>(QUEUE);
    let (desired, desired_seen) = watch::channel(None);

    let lane = LaneConfig::new(0, "meshwg0", config.wireguard_port, lane_key.clone());
    let plane = dataplane::Options {
        mesh_wg: config.mesh_wg.clone(),
        lanes: vec![dataplane::LaneSecret { device: lane.device.clone(), secret: lane_key }],
        state_dir: config.state_dir.clone(),
        proc_sys: None,
    };
    let mut plane = tokio::spawn(dataplane::run(plane, desired_seen, inputs.clone()));
    tokio::spawn(accept(control, tls.clone(), link_events.clone()));
    let incoming = datagrams.receive(clock).context("port: receiving datagrams")?;
    let mut links = Links::new(tls, link_events, HANDSHAKE_LIMIT);

    let node_config = node::Config {
        name: config.name.clone(),
        cluster_name: config.cluster_name.clone(),
        ipv4_range: config.range,
        block_prefix: 24,
        admin_keys: config.admin_key.clone(),
        secret,
        // Names are resolved while the node runs: that may take long, and fail.
        seeds: config.join.iter().map(unresolved).collect(),
        advertise: config.advertise.clone(),
        control_port: config.port,
        max_calls: node::MAX_CALLS,
        lanes: vec![lane],
        mtu: config.mtu,
        mtu_raise: config.mtu_raise,
        software: env!("CARGO_PKG_VERSION").to_owned(),
        boot,
        previous_start,
        backend: dataplane::backend(),
    };
    let mut seed = Zeroizing::new([0; 32]);
    OsRng.fill_bytes(&mut *seed);
    // Counted when nothing can fail any more, and noted at once: a start that is counted and not noted leaves the next
    // one in doubt.
    store.count_start(&mut stored, &identity.public().node_id(), previous_start.as_ref())?;
    let mut node = Node::new(node_config, identity, stored, *seed, clock());
    let mut shell = Shell {
        store,
        starts,
        datagrams,
        desired,
        answers: BTreeMap::new(),
        requests: 0,
        dead_letters: Vec::new(),
    };
    shell.starts.note(node.start_to_note());

    let mut wall_clock = WallClock::default();
    wall_clock.tell(&mut node, clock());

    // Whoever was detached while we were away is gone before anyone can ask for an address.
    shell.bury(&mut node, clock());
    let mut next = shell.drain(&mut node, &mut links, clock)?;

    let heartbeat = Heartbeat::new(&config.control_socket);
    let config = Arc::new(config);
    tokio::spawn(api::serve(socket, calls.clone(), config.clone()));
    if let Some(listener) = metrics {
        tokio::spawn(http::serve(listener, calls, shell.datagrams.clone()));
    }
    let mut housekeeping = tokio::time::interval(HOUSEKEEPING);
    housekeeping.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut looks = tokio::time::interval(LOOK_FOR_REMAINS);
    looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);

    let mut inbox = Inbox { links: links_happened, input, called, datagrams: incoming };
    loop {
        // Also while more comes in than can be dealt with.
        if next <= clock() {
            node.handle(Input::Tick, clock());
            next = shell.drain(&mut node, &mut links, clock)?;
        }
        let wait = next.since(clock());
        // In no order: whoever has most to say does not keep the others waiting.
        tokio::select! {
            () = &mut stop => {
                tracing::info!("meshd stops; devices, routes and rules stay as they are");
                return Ok(());
            }
            ended = &mut plane => {
                return ended.context("the kernel task")?.context("the kernel task ended");
            }
            arrived = inbox.next(clock) => match arrived {
                Arrived::Link(event) => {
                    if let Some(input) = links.happened(event) {
                        node.handle(input, clock());
                    }
                }
                Arrived::Input(input) => node.handle(input, clock()),
                // Without gossip it would be taken for dead, and think so of the others.
                Arrived::NoDatagrams => bail!("the thread that receives datagrams has ended"),
                Arrived::Call(call) => {
                    let id = shell.register(call.answer);
                    node.handle(Input::Request(id, call.request), clock());
                }
            },
            () = tokio::time::sleep(wait) => node.handle(Input::Tick, clock()),
            _ = housekeeping.tick() => {
                shell.bury(&mut node, clock());
                wall_clock.tell(&mut node, clock());
                if node.view().is_none() || !config.join.is_empty() {
                    // Names may resolve to other addresses by now; a slow resolver holds nothing up.
                    let (config, inputs) = (config.clone(), inputs.clone());
                    tokio::spawn(async move {
                        let seeds = resolve(&config).await;
                        let _ = inputs.send(Input::Seeds(seeds)).await;
                    });
                }
                if node.is_ready() {
                    heartbeat.beat();
                }
            }
            _ = looks.tick() => look_for_remains(&node, inputs.clone(), clock()),
        }
        next = shell.drain(&mut node, &mut links, clock)?;
    }
}

/// What waits for the node, from all sides.
struct Inbox {
    links: mpsc::Receiver<LinkEvent>,
    input: mpsc::Receiver<Input>,
    called: mpsc::Receiver<Call>,
    datagrams: Incoming,
}

/// What is next.
enum Arrived {
    Link(LinkEvent),
    Input(Input),
    Call(Call),
    /// There will be no datagrams any more.
    NoDatagrams,
}

impl Inbox {
    /// Each side that has something gets its turn soon, however much the others have. Can be dropped and called again
    /// without losing anything.
    async fn next(&mut self, clock: impl Fn() -> Time) -> Arrived {
        tokio::select! {
            Some(event) = self.links.recv() => Arrived::Link(event),
            Some(input) = self.input.recv() => Arrived::Input(input),
            Some(call) = self.called.recv() => Arrived::Call(call),
            input = self.datagrams.next(clock) => input.map_or(Arrived::NoDatagrams, Arrived::Input),
        }
    }
}

/// Has the process open as many files as the host permits: a member may have a session with each of thousands of others
/// at a time, and the customary limit is 1,024.
///
/// # Errors
/// Those of the kernel.
fn raise_open_files() -> nix::Result<u64> {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if soft < hard {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    }
    Ok(hard)
}

/// What the loop owns besides the node.
struct Shell {
    store: Store,
    starts: Starts,
    datagrams: Datagrams,
    desired: watch::Sender<Option<(u64, Arc<mesh_core::host::HostState>)>>,
    answers: BTreeMap<RequestId, oneshot::Sender<Result<Response, mesh_core::api::ApiError>>>,
    requests: u64,
    /// Tombstones whose attachments are being released.
    dead_letters: Vec<(AttachmentId, PathBuf)>,
}

impl Shell {
    fn register(&mut self, answer: oneshot::Sender<Result<Response, mesh_core::api::ApiError>>) -> RequestId {
        self.requests += 1;
        let id = RequestId(self.requests);
        self.answers.insert(id, answer);
        id
    }

    /// Carries out what the node wants, in order. What is done at once comes back as further input before the
    /// loop goes on.
    ///
    /// # Errors
    /// Why the node cannot work on this host.
    fn drain(&mut self, node: &mut Node, links: &mut Links, clock: impl Fn() -> Time) -> Result<Time> {
        loop {
            // Before anybody hears of what was written.
            self.starts.note(node.start_to_note());
            let answer = match node.poll_output() {
                Output::Timeout(next) => {
                    self.unlink_tombstones(node);
                    return Ok(next);
                }
                Output::Dial { target } => {
                    links.dial(target);
                    None
                }
                Output::Send { session, frame } => {
                    links.send(session, &frame);
                    None
                }
                Output::Datagram { to, bytes } => {
                    self.datagrams.send(to, &bytes);
                    None
                }
                Output::LaneDatagram { port, to, bytes } => {
                    if let Err(error) = send_from(port, to, &bytes) {
                        tracing::debug!(%to, %error, "a lane cannot be registered at a relay");
                    }
                    None
                }
                Output::Measure { to, bytes } => {
                    if let Err(error) = send_whole_from(self.datagrams.port(), to, &bytes) {
                        tracing::trace!(%to, %error, length = bytes.len(), "a probe of the path's MTU was not sent");
                    }
                    None
                }
                Output::Narrow { to, mtu } => {
                    let of_ours = SocketAddr::new(to, self.datagrams.port());
                    if let Err(error) = narrow(self.datagrams.port(), of_ours, mtu) {
                        tracing::debug!(%to, mtu, %error, "the kernel cannot be told of a path's MTU");
                    }
                    None
                }
                Output::Register { node, key, endpoint, serial } => {
                    self.relay_for(node, key, endpoint, serial, clock())
                }
                Output::Carried { id, what } => {
                    links.carry(id, what);
                    None
                }
                Output::Trust { session } => {
                    links.trust(session);
                    None
                }
                Output::Close { session, reason } => {
                    links.close(session);
                    Some(Input::SessionClosed { session, reason })
                }
                Output::Persist { ticket, files } => {
                    let written = files.iter().try_for_each(|(file, bytes)| self.store.write(*file, bytes));
                    Some(match written {
                        Ok(()) => Input::Persisted(ticket),
                        Err(error) => Input::PersistFailed(ticket, format!("{error:#}")),
                    })
                }
                Output::Desired { revision, state } => {
                    self.datagrams.relay().retain(|key| node.knows_lane(key));
                    self.desired.send_replace(Some((revision, state)));
                    None
                }
                Output::Reply(id, answer) => {
                    if let Some(waiting) = self.answers.remove(&id) {
                        // Whoever asked may have gone away meanwhile.
                        let _ = waiting.send(answer);
                    }
                    None
                }
                Output::Refuse { reason } => bail!(reason),
            };
            if let Some(answer) = answer {
                node.handle(answer, clock());
            }
        }
    }

    /// The lane of a member is relayed for from now on, if there is room.
    fn relay_for(
        &self,
        node: NodeId,
        key: WgPublic,
        endpoint: Endpoint,
        serial: u64,
        now: Time,
    ) -> Option<Input> {
        let address = endpoint.remote;
        let mut relay = self.datagrams.relay();
        let known = relay.serves(&key, now);
        match relay.register(key, endpoint, serial, now) {
            Ok(_) => Some(Input::Registered { node, key, address, serial, known }),
            Err(error) => {
                tracing::warn!(peer = %node.short(), %address, %error, "no relay for a lane");
                None
            }
        }
    }

    /// Releases what was detached while the daemon was away. The files go once the release is durable: the
    /// node's answer comes within the same drain.
    fn bury(&mut self, node: &mut Node, now: Time) {
        let tombstones = self.store.tombstones();
        if !tombstones.is_empty() {
            tracing::info!(attachments = tombstones.len(), "detached while the daemon was away");
            node.handle(Input::Tombstones(tombstones.iter().map(|(id, _)| id.clone()).collect()), now);
            self.dead_letters = tombstones;
        }
    }

    fn unlink_tombstones(&mut self, node: &Node) {
        for (id, path) in self.dead_letters.drain(..) {
            if node.has_lease(&id) {
                // The release could not be written to disk: the file stays for the next look.
                continue;
            }
            if let Err(error) = files::remove_durable(&path) {
                tracing::warn!(path = %path.display(), %error, "tombstone cannot be removed");
            }
        }
    }
}

/// What the node was last told of the host's clock: seconds since 1970, and when.
#[derive(Default)]
struct WallClock(Option<(u64, Time)>);

impl WallClock {
    /// Tells the node the time when it is due, or when the clock was set since.
    fn tell(&mut self, node: &mut Node, now: Time) {
        let unix_seconds =
            SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let news = self.0.is_none_or(|(told, at)| {
            let passed = now.since(at);
            passed >= TELL_TIME || unix_seconds.abs_diff(told + passed.as_secs()) > CLOCK_SLACK
        });
        if news {
            self.0 = Some((unix_seconds, now));
            node.handle(Input::WallClock { unix_seconds }, now);
        }
    }
}

/// Has somebody look at what is left of the attachments, and tell the node.
fn look_for_remains(node: &Node, inputs: mpsc::Sender<Input>, begun: Time) {
    let wanted: Vec<(AttachmentId, PathBuf)> =
        node.leases().map(|(id, lease)| (id.clone(), PathBuf::from(&lease.netns))).collect();
    if wanted.is_empty() {
        return;
    }
    tokio::spawn(async move {
        match tokio::task::spawn_blocking(move || remains::look(wanted)).await {
            Ok(Ok(remains)) => {
                let _ = inputs.send(Input::Remains { begun, remains }).await;
            }
            Ok(Err(error)) => tracing::warn!("attachments cannot be looked at: {error:#}"),
            Err(error) => tracing::error!(%error, "looking at attachments"),
        }
    });
}

async fn join_secret(
    source: SecretSource,
    me: mesh_keys::IdentityKey,
    is_member: bool,
) -> Result<JoinSecret> {
    match source {
        // Used, expired or gone: a member has no need of it.
        SecretSource::TokenFile(_) if is_member => Ok(JoinSecret::None),
        SecretSource::TokenFile(path) => {
            let bytes = files::read_secret(&path, MAX_SECRET_FILE).context("token-file")?;
            let text = std::str::from_utf8(&bytes)
                .with_context(|| format!("token-file {} is not text", path.display()))?;
            let token =
                JoinToken::from_text(text).with_context(|| format!("token-file {}", path.display()))?;
            Ok(JoinSecret::Token(Box::new(token)))
        }
        SecretSource::KeyFile(path) => {
            let bytes = files::read_secret(&path, MAX_SECRET_FILE).context("key-file")?;
            let text = std::str::from_utf8(&bytes)
                .with_context(|| format!("key-file {} is not text", path.display()))?;
            Ok(JoinSecret::Key(
                JoinKey::from_text(text).with_context(|| format!("key-file {}", path.display()))?,
            ))
        }
        SecretSource::PasswordFile(path) => {
            let mut contents = files::read_secret(&path, MAX_SECRET_FILE).context("password-file")?;
            let password = Password::from_file_contents(std::mem::take(&mut *contents))
                .with_context(|| format!("password-file {}", path.display()))?;
            if let Some(weakness) = password.weakness() {
                tracing::warn!("password-file: {weakness}");
            }
            // A quarter of a second of Argon2id.
            let for_record = password.clone();
            let record =
                tokio::task::spawn_blocking(move || PasswordRecord::create(&for_record, &me, &mut OsRng))
                    .await??;
            Ok(JoinSecret::Password { password, record: Box::new(record) })
        }
    }
}

/// Listens for both families on one port; for IPv4 alone where the host has no IPv6.
async fn listen(port: u16) -> Result<TcpListener> {
    let open = |socket: std::io::Result<TcpSocket>, address: SocketAddr| -> std::io::Result<TcpListener> {
        let socket = socket?;
        socket.set_reuseaddr(true)?;
        SockRef::from(&socket).set_tcp_mss(MAX_SEGMENT)?;
        socket.bind(address)?;
        socket.listen(1024)
    };
    match open(TcpSocket::new_v6(), (Ipv6Addr::UNSPECIFIED, port).into()) {
        Err(error) if error.raw_os_error() == Some(nix::libc::EAFNOSUPPORT) => {
            Ok(open(TcpSocket::new_v4(), (Ipv4Addr::UNSPECIFIED, port).into())?)
        }
        other => Ok(other?),
    }
}

async fn accept(listener: TcpListener, tls: TlsIdentity, events: mpsc::Sender<LinkEvent>) {
    loop {
        let tcp: TcpStream = match listener.accept().await {
            Ok((tcp, _)) => tcp,
            Err(error) => {
                // Out of file descriptors, most likely: let some close.
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let (tls, events) = (tls.clone(), events.clone());
        tokio::spawn(async move {
            match session::accept(tcp, &tls, HANDSHAKE_LIMIT).await {
                Ok(session) => {
                    let _ = events.send(LinkEvent::Accepted(Box::new(session))).await;
                }
                Err(error) => tracing::debug!("{error}"),
            }
        });
    }
}

/// A seed as it is given: an address is one, a name is none yet.
fn unresolved(join: &JoinAddress) -> Seed {
    let address = join.host.parse().map(|ip: IpAddr| SocketAddr::new(ip, join.port));
    Seed { text: join.to_string(), addresses: address.into_iter().collect() }
}

/// The seeds with what their names resolve to now.
async fn resolve(config: &Config) -> Vec<Seed> {
    let mut seeds = Vec::new();
    for join in &config.join {
        let mut addresses: Vec<SocketAddr> =
            match tokio::net::lookup_host((join.host.as_str(), join.port)).await {
                Ok(found) => found.collect(),
                Err(error) => {
                    tracing::warn!(join = %join, %error, "name does not resolve; it is tried again");
                    Vec::new()
                }
            };
        addresses.sort_unstable();
        addresses.dedup();
        seeds.push(Seed { text: join.to_string(), addresses });
    }
    seeds
}

fn boot_id() -> Result<String> {
    let path = "/proc/sys/kernel/random/boot_id";
    Ok(std::fs::read_to_string(path).with_context(|| path.to_owned())?.trim().to_owned())
}

fn stop_signal() -> Result<impl Future<Output = ()>> {
    use tokio::signal::unix::{SignalKind, signal};
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    Ok(async move {
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
        }
    })
}

#[cfg(test)]
mod tests;
