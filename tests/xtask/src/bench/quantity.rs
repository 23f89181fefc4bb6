//! What is measured: the tests in their order, and the names and units of what comes out of them.

use super::load::{Direction, Family, Load};

/// One measurement, and what it tells.
pub(crate) struct Test {
    /// What goes on during the measurement.
    pub(crate) load: Load,
    /// In the order in which [`Load::measure`] gives them.
    pub(crate) quantities: &'static [Quantity],
}

/// Something with a value for each carrier and round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Quantity {
    /// Its name in the tables and in JSON.
    pub(crate) name: &'static str,
    /// Its unit.
    pub(crate) unit: Unit,
    /// Whether `--quick` measures it.
    pub(crate) quick: bool,
}

/// A unit of a [`Quantity`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unit {
    /// 10⁹ bits of payload for each second.
    GigabitsPerSecond,
    /// 1000 datagrams for each second.
    KilopacketsPerSecond,
    /// Milliseconds.
    Milliseconds,
    /// Seconds of processor time for each 10⁹ bytes of payload.
    SecondsPerGigabyte,
    /// Milliseconds of processor time for each second.
    MillisecondsPerSecond,
    /// Events for each second.
    PerSecond,
    /// 2²⁰ bytes.
    Mebibytes,
}

impl Unit {
    /// As it is written behind a number.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::GigabitsPerSecond => "Gbit/s",
            Self::KilopacketsPerSecond => "k/s",
            Self::Milliseconds => "ms",
            Self::SecondsPerGigabyte => "s/GB",
            Self::MillisecondsPerSecond => "ms/s",
            Self::PerSecond => "/s",
            Self::Mebibytes => "MiB",
        }
    }

    /// How many decimals mean something.
    pub(crate) fn decimals(self) -> usize {
        match self {
            Self::Milliseconds | Self::MillisecondsPerSecond => 3,
            Self::GigabitsPerSecond | Self::SecondsPerGigabyte => 2,
            Self::KilopacketsPerSecond | Self::PerSecond | Self::Mebibytes => 1,
        }
    }

    /// Whether the better of two carriers has the larger value.
    pub(crate) fn more_is_better(self) -> bool {
        match self {
            Self::GigabitsPerSecond | Self::KilopacketsPerSecond => true,
            Self::Milliseconds
            | Self::SecondsPerGigabyte
            | Self::MillisecondsPerSecond
            | Self::PerSecond
            | Self::Mebibytes => false,
        }
    }
}

impl Quantity {
    const fn new(name: &'static str, unit: Unit) -> Self {
        Self { name, unit, quick: false }
    }

    const fn quick(self) -> Self {
        Self { quick: true, ..self }
    }
}

const fn gigabits(name: &'static str) -> Quantity {
    Quantity::new(name, Unit::GigabitsPerSecond)
}

const fn kilopackets(name: &'static str) -> Quantity {
    Quantity::new(name, Unit::KilopacketsPerSecond)
}

const fn milliseconds(name: &'static str) -> Quantity {
    Quantity::new(name, Unit::Milliseconds)
}

const fn tcp(family: Family, streams: u8, direction: Direction) -> Load {
    Load::Tcp { family, streams, direction }
}

/// All tests. Idleness comes first, while nothing has happened yet, and memory last, when everything has.
pub(crate) const TESTS: &[Test] = &[
    Test {
        load: Load::Nothing,
        quantities: &[
            Quantity::new("idle_cpu", Unit::MillisecondsPerSecond),
            Quantity::new("idle_wakeups", Unit::PerSecond),
        ],
    },
    Test {
        load: Load::Ping { streams: 0 },
        quantities: &[milliseconds("ping_idle_p50"), milliseconds("ping_idle_p99")],
    },
    Test {
        load: tcp(Family::V4, 1, Direction::Forward),
        quantities: &[
            gigabits("tcp4_1").quick(),
            Quantity::new("cpu_per_gb", Unit::SecondsPerGigabyte).quick(),
        ],
    },
    Test { load: tcp(Family::V4, 4, Direction::Forward), quantities: &[gigabits("tcp4_4").quick()] },
    Test { load: tcp(Family::V4, 1, Direction::Reverse), quantities: &[gigabits("tcp4_1_reverse")] },
    Test { load: tcp(Family::V4, 4, Direction::Reverse), quantities: &[gigabits("tcp4_4_reverse")] },
    Test { load: tcp(Family::V6, 1, Direction::Forward), quantities: &[gigabits("tcp6_1")] },
    Test { load: tcp(Family::V6, 4, Direction::Forward), quantities: &[gigabits("tcp6_4")] },
    Test { load: tcp(Family::V6, 1, Direction::Reverse), quantities: &[gigabits("tcp6_1_reverse")] },
    Test { load: tcp(Family::V6, 4, Direction::Reverse), quantities: &[gigabits("tcp6_4_reverse")] },
    Test {
        load: Load::Ping { streams: 1 },
        quantities: &[milliseconds("ping_load_p50").quick(), milliseconds("ping_load_p99")],
    },
    Test {
        load: Load::Ping { streams: 4 },
        quantities: &[milliseconds("ping_load4_p50"), milliseconds("ping_load4_p99")],
    },
    Test { load: Load::Udp { bytes: 64 }, quantities: &[kilopackets("udp64").quick()] },
    Test { load: Load::Udp { bytes: 512 }, quantities: &[kilopackets("udp512")] },
    Test { load: Load::Memory, quantities: &[Quantity::new("rss_mib", Unit::Mebibytes)] },
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn names_are_unique_and_the_quick_ones_are_few() {
        let all: Vec<Quantity> = TESTS.iter().flat_map(|test| test.quantities).copied().collect();
        let names: BTreeSet<&str> = all.iter().map(|quantity| quantity.name).collect();
        assert_eq!(names.len(), all.len());
        let quick: BTreeSet<&str> = all.iter().filter(|found| found.quick).map(|found| found.name).collect();
        assert_eq!(quick, BTreeSet::from(["tcp4_1", "tcp4_4", "cpu_per_gb", "ping_load_p50", "udp64"]));
    }
}
