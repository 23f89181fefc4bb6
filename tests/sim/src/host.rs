//! A host: its disk, its kernel, its container runtime, and the daemon when that runs.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::IpAddr;
use std::sync::Arc;

use mesh_core::api::{AttachmentId, Membership};
use mesh_core::host::HostState;
use mesh_core::node::{Input, NetnsLook, Node, Remains, RequestId, StartMark};
use mesh_core::relay::Relay;
use mesh_core::state::{StateFile, Stored, UnusableState, Writes, write_of};
use mesh_core::time::Time;
use mesh_core::view::View;
use mesh_keys::frame::GroupKey;
use mesh_keys::{Identity, JoinToken, NodeId, WgPublic, WgSecret};

use crate::carried::Connections;
use crate::dice::Dice;
use crate::tunnels::Traffic;

/// The state directory.
#[derive(Clone)]
pub struct Disk {
    /// The node's identity.
    pub identity: Identity,
    /// Which node that is.
    pub id: NodeId,
    /// The key of its lane,
    pub lane: WgSecret,
    /// and what others know of it.
    pub lane_key: WgPublic,
    /// The files.
    pub files: BTreeMap<StateFile, Vec<u8>>,
    /// What the files of the cluster have, in their place: thousands of such files would not fit into memory.
    pub view: Option<View>,
    /// Which writes that is from.
    pub view_writes: Writes,
}

impl Disk {
    /// An empty one: identity and keys are new.
    pub fn new(dice: &mut Dice) -> Self {
        let identity = Identity::generate(dice.rng());
        let lane = WgSecret::generate(dice.rng());
        Self {
            id: identity.node_id(),
            identity,
            lane_key: lane.public(),
            lane,
            files: BTreeMap::new(),
            view: None,
            view_writes: Writes::default(),
        }
    }

    /// Replaces files.
    pub fn write(&mut self, files: Vec<(StateFile, Vec<u8>)>, view: Option<&View>) {
        for (file, bytes) in files {
            if matches!(file, StateFile::Cluster | StateFile::Changes) && self.view.is_some() {
                self.view = view.cloned();
                self.view_writes.note(file, write_of(&bytes));
            } else {
                self.files.insert(file, bytes);
            }
        }
    }

    /// Whether the cluster is on it.
    pub fn is_of_a_member(&self) -> bool {
        self.view.is_some() || self.files.contains_key(&StateFile::Cluster)
    }

    /// The newest key of the group, for adversaries.
    pub fn group_key(&self) -> Option<GroupKey> {
        let stored = Stored::decode(&self.files).ok()?;
        stored.group.keys.into_iter().map(|(_, key)| key).next_back()
    }

    /// Reads what is stored and counts the start, as the daemon does.
    ///
    /// # Errors
    /// The node wrote what it cannot read.
    pub fn load(&mut self, before: Option<&StartMark>) -> Result<Stored, UnusableState> {
        let mut stored = Stored::decode(&self.files)?;
        stored.view = stored.view.or_else(|| self.view.clone());
        stored.writes.join(&self.view_writes);
        self.files.extend([stored.count_start(&self.identity.public().node_id(), before)]);
        Ok(stored)
    }
}

/// The daemon.
pub struct Process {
    /// The code that ships.
    pub node: Node,
    /// When it started.
    pub started: Time,
    /// It waits for the disk.
    pub writing: bool,
    /// What happened meanwhile.
    pub inbox: VecDeque<Input>,
    /// When it wants to be woken.
    pub wake: Time,
    /// The earliest waking that is in the queue.
    pub alarm: Option<Time>,
    /// The newest state that it wants the kernel to have, not applied yet.
    pub desired: Option<(u64, Arc<HostState>)>,
    /// It has heard from a member since it started.
    pub confirmed: bool,
    /// How much of what its view has the model has looked at: see [`View::merged_so_far`].
    pub judged: usize,
    /// Members it knows to be removed: they must stay so.
    pub removed: BTreeSet<NodeId>,
    /// What it relays.
    pub relay: Relay,
    /// Connections that other hosts carry.
    pub(crate) carried: Connections,
    /// What it was last told of the wall clock, in seconds since 1970, and when.
    pub wall: Option<(u64, Time)>,
}

/// A pod that the runtime has started, or is starting.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    /// What it was leased; nothing before the answer.
    pub addresses: Vec<IpAddr>,
    /// The request that is under way.
    pub waits: Option<RequestId>,
    /// It is being deleted.
    pub leaving: bool,
}

/// A host.
pub struct Host {
    /// Its number.
    pub at: usize,
    /// Whether it has power.
    pub powered: bool,
    /// Counts the processes: what was under way for an earlier one is void.
    pub epoch: u64,
    /// Counts the boots.
    pub boot: u64,
    /// What the node has had noted last, until the next boot.
    pub last_start: Option<StartMark>,
    /// Since when the present process runs.
    pub up_since: Time,
    /// The daemon, when it runs.
    pub process: Option<Process>,
    /// Its disk.
    pub disk: Disk,
    /// Older states of the disk.
    pub backups: Vec<Disk>,
    /// The disk was put back while the host ran on: it does not know what its pods have had since.
    pub put_back: bool,
    /// The disk takes nothing.
    pub disk_full: bool,
    /// The kernel.
    pub kernel: Arc<HostState>,
    /// Who is attached.
    pub pods: BTreeMap<AttachmentId, Pod>,
    /// Deleted while the daemon was away.
    pub tombstones: Vec<AttachmentId>,
    /// Deleted without a word.
    pub forgotten: BTreeSet<AttachmentId>,
    /// Which key file it has.
    pub secret: u8,
    /// Numbers of the hosts in its list.
    pub seeds: Vec<usize>,
    /// It may not be started again: its operator gave it up.
    pub retired: bool,
    /// It acts against the others.
    pub evil: bool,
    /// How far its wall clock is off, in seconds.
    pub clock_error: i64,
    /// What it joins by instead of a key file.
    pub token: Option<JoinToken>,
    /// What its tunnels have carried, by the key of the peer.
    pub traffic: BTreeMap<WgPublic, Traffic>,
}

impl Host {
    /// A host that is off, with an empty disk.
    pub fn new(at: usize, seeds: Vec<usize>, secret: u8, dice: &mut Dice) -> Self {
        Self {
            at,
            powered: true,
            epoch: 0,
            boot: 1,
            last_start: None,
            up_since: Time::ZERO,
            process: None,
            disk: Disk::new(dice),
            backups: Vec::new(),
            put_back: false,
            disk_full: false,
            kernel: Arc::new(HostState::default()),
            pods: BTreeMap::new(),
            tombstones: Vec::new(),
            forgotten: BTreeSet::new(),
            secret,
            seeds,
            retired: false,
            evil: false,
            clock_error: 0,
            token: None,
            traffic: BTreeMap::new(),
        }
    }

    /// Who it is.
    pub fn id(&self) -> NodeId {
        self.disk.id
    }

    /// The node, when it runs.
    pub fn node(&self) -> Option<&Node> {
        self.process.as_ref().map(|process| &process.node)
    }

    /// Whether it runs, is a member by its own account, and means well.
    pub fn serves(&self) -> bool {
        let key = self.disk.identity.public();
        let member = |node: &Node| node.view().is_some_and(|view| view.admissions().contains(&key));
        !self.evil && self.node().is_some_and(member)
    }

    /// Whether the node says of itself that its disk is an old one.
    pub fn outdated(&self) -> bool {
        let Some(node) = self.node() else { return false };
        let status = node.status();
        match &status.membership {
            Membership::Joining { waiting_for } => waiting_for.contains("is a member already"),
            Membership::Member => {
                let why =
                    ["another host has this node's identity", "the disk was put back to an older state"];
                status.problems.iter().any(|problem| why.iter().any(|why| problem.contains(why)))
            }
        }
    }

    /// Whether the node knows that it was removed.
    pub fn is_out(&self) -> bool {
        let key = self.disk.identity.public();
        self.node().and_then(Node::view).is_some_and(|view| !view.admissions().contains(&key))
    }

    /// What is left of the attachments that the node has leases for.
    pub fn remains(&self, node: &Node) -> BTreeMap<AttachmentId, Remains> {
        let left = |id: &AttachmentId| match self.pods.contains_key(id) {
            true => Remains { host_end: true, netns: NetnsLook::Unknown },
            false => Remains { host_end: false, netns: NetnsLook::Missing },
        };
        node.leases().map(|(id, _)| (id.clone(), left(id))).collect()
    }
}
