//! What changes in a lab's network while it is up: addresses, mappings, links. It is in a file of its own, because
//! `meshctl lab link` changes it beside whoever brought the lab up.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;

use anyhow::{Context, Result};
use mesh_sys::files;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use crate::impairment::Impairment;
use crate::plan::{Plan, Segment};
use crate::process::ProcessRef;
use crate::topology::Topology;

/// More than any real file has, in bytes.
const MAX_FILE: usize = 16 << 20;

/// The network of a lab.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Network {
    pub(crate) topology: Topology,
    /// The last figures of the hosts' addresses, by their numbers.
    pub(crate) figures: BTreeMap<u8, u8>,
    /// How often each router has forgotten its mappings, by its number.
    pub(crate) rebinds: BTreeMap<u8, u16>,
    /// What happens to packets from one host to another; pairs to which nothing happens are not in it.
    pub(crate) ways: Vec<Way>,
    /// Number of the next forwarder: each has names of its own.
    pub(crate) next_forwarder: u32,
}

/// One direction between two hosts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Way {
    pub(crate) from: u8,
    pub(crate) to: u8,
    pub(crate) impairment: Impairment,
    /// What its packets pass through, when the kernel alone cannot do it.
    pub(crate) forwarder: Option<Forwarder>,
}

/// A process that packets of one way pass through.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Forwarder {
    pub(crate) process: ProcessRef,
    /// Its TAP device in the switch.
    pub(crate) device: String,
    /// What it was started with.
    pub(crate) impairment: Impairment,
    /// Where its device is a port.
    pub(crate) segment: Segment,
}

impl Network {
    pub(crate) fn plan(&self) -> Plan<'_> {
        Plan { topology: &self.topology, figures: &self.figures }
    }

    /// What happens to packets from one host to another.
    pub(crate) fn impairment(&self, from: u8, to: u8) -> Impairment {
        let way = self.ways.iter().find(|way| (way.from, way.to) == (from, to));
        way.map_or(Impairment::NONE, |way| way.impairment)
    }

    /// Says what shall happen to packets from one host to another.
    pub(crate) fn impair(&mut self, from: u8, to: u8, change: impl FnOnce(&mut Impairment)) {
        let at = self.ways.partition_point(|way| (way.from, way.to) < (from, to));
        if self.ways.get(at).is_none_or(|way| (way.from, way.to) != (from, to)) {
            self.ways.insert(at, Way { from, to, impairment: Impairment::NONE, forwarder: None });
        }
        change(&mut self.ways[at].impairment);
    }

    /// All processes that packets pass through.
    pub(crate) fn forwarders(&self) -> impl Iterator<Item = ProcessRef> {
        self.ways.iter().filter_map(|way| Some(way.forwarder.as_ref()?.process))
    }

    /// Reads the file in a lab's directory.
    pub(crate) fn load(dir: &Path) -> Result<Self> {
        let path = dir.join("network.json");
        let bytes = files::read_limited(&path, MAX_FILE)?;
        serde_json::from_slice(&bytes).with_context(|| format!("{} is not a lab's network", path.display()))
    }

    /// Writes the file, so that a reader sees the old or the new one.
    pub(crate) fn save(&self, dir: &Path) -> Result<()> {
        files::write_atomic(&dir.join("network.json"), &serde_json::to_vec_pretty(self)?, 0o600)?;
        Ok(())
    }

    /// Keeps other processes from changing the network as long as the value lives.
    pub(crate) fn lock(dir: &Path) -> Result<Flock<File>> {
        let path = dir.join("network.lock");
        let file = File::options().create(true).append(true).open(&path);
        let file = file.with_context(|| format!("opening {}", path.display()))?;
        Flock::lock(file, FlockArg::LockExclusive)
            .map_err(|(_, errno)| errno)
            .with_context(|| format!("locking {}", path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_survives_its_file_and_ways_stay_in_order() {
        let mut network = Network::default();
        for (from, to) in [(2, 1), (1, 3), (1, 2), (2, 1)] {
            network.impair(from, to, |impairment| impairment.cut = true);
        }
        network.figures.insert(7, 200);
        let order: Vec<_> = network.ways.iter().map(|way| (way.from, way.to)).collect();
        assert_eq!(order, [(1, 2), (1, 3), (2, 1)]);
        assert!(network.impairment(1, 3).cut && !network.impairment(3, 1).cut);
        let dir = tempfile::tempdir().unwrap();
        let _lock = Network::lock(dir.path()).unwrap();
        network.save(dir.path()).unwrap();
        assert_eq!(Network::load(dir.path()).unwrap(), network);
    }
}
