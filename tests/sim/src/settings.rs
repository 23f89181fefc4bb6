//! What a run is like.

use std::net::Ipv4Addr;
use std::time::Duration;

use ipnet::Ipv4Net;

use crate::node::RANGE;

/// How often, in ten thousandths.
pub type Chance = u32;

/// What may go wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// The daemon is killed and started again; kernel and pods stay.
    Kill,
    /// The host loses power; what is on disk stays.
    PowerLoss,
    /// The host comes back with an empty disk: a new identity.
    LostDisk,
    /// The host comes back with an older state of its disk.
    OldDisk,
    /// A second host starts with a copy of a disk, often where it reaches nobody.
    ClonedDisk,
    /// The disk takes nothing for a while.
    FullDisk,
    /// The network falls into parts.
    Partition,
    /// Packets from one host to another are lost.
    OneWayCut,
    /// A fifth of all packets is lost.
    Loss,
    /// A host handles what arrives seconds later.
    Slow,
    /// A new host joins.
    Join,
    /// A host without the secret tries to join.
    Intruder,
    /// The operator removes a member: one that is lost, or one that runs.
    Remove,
    /// A member turns against the others.
    Evil,
    /// Somebody who is no member repeats what he hears on the network.
    Outsider,
    /// The wall clock of a host is set, by seconds or by years.
    ClockStep,
    /// The operator closes joining, opens it for a while, or for good.
    JoinWindow,
    /// A host joins by a token, which may end before it is used.
    Token,
    /// NATs forget all mappings.
    NatReboot,
}

impl Fault {
    /// All of them.
    pub const ALL: [Self; 19] = [
        Self::Kill,
        Self::PowerLoss,
        Self::LostDisk,
        Self::OldDisk,
        Self::ClonedDisk,
        Self::FullDisk,
        Self::Partition,
        Self::OneWayCut,
        Self::Loss,
        Self::Slow,
        Self::Join,
        Self::Intruder,
        Self::Remove,
        Self::Evil,
        Self::Outsider,
        Self::ClockStep,
        Self::JoinWindow,
        Self::Token,
        Self::NatReboot,
    ];

    /// Name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kill => "kill",
            Self::PowerLoss => "power-loss",
            Self::LostDisk => "lost-disk",
            Self::OldDisk => "old-disk",
            Self::ClonedDisk => "cloned-disk",
            Self::FullDisk => "full-disk",
            Self::Partition => "partition",
            Self::OneWayCut => "one-way-cut",
            Self::Loss => "loss",
            Self::Slow => "slow",
            Self::Join => "join",
            Self::Intruder => "intruder",
            Self::Remove => "remove",
            Self::Evil => "evil",
            Self::Outsider => "outsider",
            Self::ClockStep => "clock-step",
            Self::JoinWindow => "join-window",
            Self::Token => "token",
            Self::NatReboot => "nat-reboot",
        }
    }

    /// The fault with a name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|fault| fault.name() == name)
    }
}

/// The network without faults.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkSettings {
    /// Shortest delay one way.
    pub least_delay: Duration,
    /// Longest delay one way.
    pub most_delay: Duration,
    /// Added to each packet at random, so that packets overtake each other.
    pub jitter: Duration,
    /// Packets that are lost.
    pub loss: Chance,
    /// Datagrams that arrive twice.
    pub duplicates: Chance,
    /// Hosts behind a NAT of their own.
    pub nat: Chance,
}

impl Default for NetworkSettings {
    fn default() -> Self {
        Self {
            least_delay: Duration::from_millis(20),
            most_delay: Duration::from_millis(120),
            jitter: Duration::from_millis(10),
            loss: 200,
            duplicates: 50,
            nat: 0,
        }
    }
}

/// A run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Number of hosts at the start.
    pub nodes: usize,
    /// Everything random follows from it.
    pub seed: u64,
    /// How long faults go on.
    pub span: Duration,
    /// Which faults.
    pub faults: Vec<Fault>,
    /// Mean pause between two faults.
    pub fault_pause: Duration,
    /// Mean pause between two pods that come or go on one host; zero for none.
    pub pod_pause: Duration,
    /// The network.
    pub network: NetworkSettings,
    /// The range of the cluster, and the length of the prefix of its blocks.
    pub range: (Ipv4Net, u8),
    /// Packets go through the tunnels, and nodes are told of them.
    pub tunnels: bool,
    /// What the wall clocks show at the start, in seconds since 1970.
    pub wall_clock: u64,
    /// The cluster has an admin key, which operators sign with.
    pub anchored: bool,
    /// Nothing is saved: each node checks each signature, and a cluster that is measured has come about by itself.
    pub plain: bool,
}

/// Blocks of 30 usable addresses.
const BLOCK: u8 = 27;

/// What the wall clocks show at the start.
const WALL_CLOCK: u64 = 1_750_000_000;

/// A range with so few blocks that they are all owned soon, and addresses come back into use.
fn scarce(nodes: usize) -> (Ipv4Net, u8) {
    let blocks = (nodes + nodes / 2).next_power_of_two().max(16);
    let prefix = BLOCK.saturating_sub(u8::try_from(blocks.ilog2()).unwrap_or(BLOCK));
    (Ipv4Net::new(Ipv4Addr::new(10, 32, 0, 0), prefix).unwrap_or(RANGE), BLOCK)
}

impl Settings {
    /// A run of the test suite: few nodes, many faults in a short time.
    pub fn short(seed: u64) -> Self {
        let nodes = 5 + usize::try_from(seed % 6).unwrap_or_default();
        Self { fault_pause: Duration::from_secs(2), ..Self::chaos(nodes, seed, Duration::from_secs(25)) }
    }

    /// Hosts that there may be: each needs a block in the end.
    pub fn most_hosts(&self) -> usize {
        let blocks = 1usize << self.range.1.saturating_sub(self.range.0.prefix_len()).min(16);
        (self.nodes * 2).min(blocks.saturating_sub(2))
    }

    /// Whether addresses are scarce: see [`Settings::range`].
    pub fn is_scarce(&self) -> bool {
        self.range.0.prefix_len() > RANGE.prefix_len()
    }

    /// Random faults of all kinds.
    pub fn chaos(nodes: usize, seed: u64, span: Duration) -> Self {
        Self {
            nodes,
            seed,
            span,
            faults: Fault::ALL.to_vec(),
            fault_pause: Duration::from_secs(6),
            pod_pause: Duration::from_millis(1200),
            network: NetworkSettings { nat: 1_000, ..NetworkSettings::default() },
            range: if seed.is_multiple_of(3) { scarce(nodes) } else { (RANGE, BLOCK) },
            tunnels: true,
            wall_clock: WALL_CLOCK,
            // The last digit in base four, as scarcity is the last in base three: all combinations come.
            anchored: seed % 4 == 3,
            plain: false,
        }
    }

    /// The network of the figures, and nothing else.
    pub fn standard(nodes: usize, seed: u64, span: Duration) -> Self {
        Self {
            faults: Vec::new(),
            pod_pause: Duration::ZERO,
            range: (RANGE, BLOCK),
            tunnels: false,
            anchored: false,
            network: NetworkSettings::default(),
            ..Self::chaos(nodes, seed, span)
        }
    }

    /// A network that loses nothing.
    pub fn calm(nodes: usize, seed: u64, span: Duration) -> Self {
        let network = NetworkSettings { loss: 0, duplicates: 0, ..NetworkSettings::default() };
        Self { network, ..Self::standard(nodes, seed, span) }
    }
}
