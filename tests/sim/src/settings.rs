//! What a run is like.

use std::time::Duration;

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
}

impl Fault {
    /// All of them.
    pub const ALL: [Self; 14] = [
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
}

impl Settings {
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
        }
    }

    /// The network of the figures, and nothing else.
    pub fn standard(nodes: usize, seed: u64, span: Duration) -> Self {
        Self {
            faults: Vec::new(),
            pod_pause: Duration::ZERO,
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
