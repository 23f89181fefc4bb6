//! What a cluster costs and how fast it is.

mod members;
mod reach;
mod spread;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

pub use self::spread::Followed;
use crate::settings::{NetworkSettings, Settings};
use crate::world::World;

/// How long a figure is waited for.
const LIMIT: Duration = Duration::from_secs(300);

/// A newcomer and the members are so far from each other, one way.
const JOIN_DELAY: Duration = Duration::from_millis(50);

/// What can be measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Figure {
    /// A changed record.
    Record,
    /// Bytes and processor time in peace.
    Peace,
    /// A host that loses power.
    Crash,
    /// An even split.
    Split,
    /// Live nodes that are called unreachable.
    Doubt,
    /// New hosts.
    Join,
    /// The removal of members.
    Removal,
}

impl Figure {
    /// All of them.
    pub const ALL: [Self; 7] =
        [Self::Record, Self::Peace, Self::Crash, Self::Split, Self::Doubt, Self::Join, Self::Removal];

    /// Name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Record => "record",
            Self::Peace => "peace",
            Self::Crash => "crash",
            Self::Split => "split",
            Self::Doubt => "doubt",
            Self::Join => "join",
            Self::Removal => "removal",
        }
    }

    /// The figure with a name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|figure| figure.name() == name)
    }
}

/// The figures; what was not asked for or could not be had in time is absent.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Figures {
    /// Time in which 99 of 100 changes of a record were known to all.
    pub record_to_all_p99: Option<Duration>,
    /// Bytes of frames and datagrams that a node sends per second in peace.
    pub bytes_per_node: Option<f64>,
    /// The longest time until all knew of a crash.
    pub crash_known: Option<Duration>,
    /// Time until all views were equal after an even split.
    pub heal: Option<Duration>,
    /// How often a live node was called unreachable.
    pub false_unreachable: Option<u64>,
    /// Time in which 99 of 100 newcomers had their first tunnel, and in which all had their records.
    pub join_p99: Option<(Duration, Duration)>,
    /// Time in which 99 of 100 tunnels to removed members were gone.
    pub removal_p99: Option<Duration>,
    /// What was broken meanwhile.
    pub breaches: usize,
}

impl Figures {
    /// Whether that one was taken.
    pub fn has(&self, figure: Figure) -> bool {
        match figure {
            Figure::Record => self.record_to_all_p99.is_some(),
            Figure::Peace => self.bytes_per_node.is_some(),
            Figure::Crash => self.crash_known.is_some(),
            Figure::Split => self.heal.is_some(),
            Figure::Doubt => self.false_unreachable.is_some(),
            Figure::Join => self.join_p99.is_some(),
            Figure::Removal => self.removal_p99.is_some(),
        }
    }
}

/// What taking them has cost on this machine; not the same in two runs.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Costs {
    /// Time for each of the figures.
    pub wall: BTreeMap<Figure, Duration>,
    /// Share of one processor that the code of one node took in peace.
    pub busy: Option<f64>,
}

/// Takes figures, and says after each which it was.
///
/// # Errors
/// The cluster could not be made.
pub fn take(
    settings: Settings,
    which: &[Figure],
    mut taken: impl FnMut(Figure, &Figures, &Costs),
) -> Result<(Figures, Costs), String> {
    let (mut figures, mut costs) = (Figures::default(), Costs::default());
    // In the order that they have: who was removed never agrees with the others again.
    let common: BTreeSet<Figure> = which.iter().copied().filter(|figure| *figure != Figure::Join).collect();
    if !common.is_empty() {
        take_from_one(settings.clone(), &common, &mut figures, &mut costs, &mut taken)?;
    }
    if which.contains(&Figure::Join) {
        let begun = Instant::now();
        let network =
            NetworkSettings { least_delay: JOIN_DELAY, most_delay: JOIN_DELAY, ..settings.network.clone() };
        let mut world = World::new(Settings { network, ..settings });
        world.cluster(&[])?;
        world.run(Duration::from_secs(60));
        figures.join_p99 = members::join(&mut world);
        figures.breaches += world.breaches().len();
        costs.wall.insert(Figure::Join, begun.elapsed());
        taken(Figure::Join, &figures, &costs);
    }
    Ok((figures, costs))
}

fn take_from_one(
    settings: Settings,
    which: &BTreeSet<Figure>,
    figures: &mut Figures,
    costs: &mut Costs,
    taken: &mut impl FnMut(Figure, &Figures, &Costs),
) -> Result<(), String> {
    let (nodes, quiet) = (settings.nodes, settings.span.max(Duration::from_secs(60)));
    let removed: Vec<usize> = (1..nodes).take(members::removed(nodes)).collect();
    let linked: &[usize] = if which.contains(&Figure::Removal) { &removed } else { &[] };
    let mut world = World::new(settings);
    world.cluster(linked)?;
    world.run(Duration::from_secs(60));
    for figure in which {
        let begun = Instant::now();
        match figure {
            Figure::Record => figures.record_to_all_p99 = spread::record_to_all(&mut world),
            Figure::Peace => {
                world.run(Duration::from_secs(30));
                let (sent, busy) = (world.sent, world.busy);
                world.run(quiet);
                let spans = nodes as f64 * quiet.as_secs_f64();
                figures.bytes_per_node = Some((world.sent - sent) as f64 / spans);
                costs.busy = Some((world.busy - busy).as_secs_f64() / spans);
            }
            Figure::Crash => figures.crash_known = reach::crash_known(&mut world),
            Figure::Split => figures.heal = reach::heal(&mut world),
            Figure::Doubt => figures.false_unreachable = Some(reach::false_unreachable(&mut world, quiet)),
            Figure::Removal => figures.removal_p99 = members::removal(&mut world, &removed),
            Figure::Join => {}
        }
        costs.wall.insert(*figure, begun.elapsed());
        taken(*figure, figures, costs);
    }
    figures.breaches += world.breaches().len();
    Ok(())
}

/// The value that 99 of 100 do not exceed.
fn p99(mut took: Vec<Duration>) -> Option<Duration> {
    took.sort_unstable();
    took.get((took.len() * 99).div_ceil(100).saturating_sub(1)).copied()
}
