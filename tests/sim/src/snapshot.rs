//! A cluster that is there from the start: one view that has everybody, made once and copied to all.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::time::Duration;

use ipnet::Ipv4Net;
use mesh_core::leases::Leases;
use mesh_core::node::{Input, StartMark};
use mesh_core::ranges::RangeSet;
use mesh_core::state::{StateFile, Stored, StoredGroup, StoredKey, StoredNode, encode_group, encode_node};
use mesh_core::time::Time;
use mesh_core::view::{Delta, Grant, NodeRecord, View};
use mesh_keys::frame::GroupKey;
use mesh_keys::{BodyId, Genesis, GenesisFields, JoinMode, JoinModes, NodeId, Psk, Signed, SignedAdmission};

use crate::model::SECRET;
use crate::world::World;

/// The range of a cluster of thousands, and its blocks.
const RANGE: (Ipv4Net, u8) = (Ipv4Net::new_assert(Ipv4Addr::new(10, 32, 0, 0), 12), 26);

/// In larger clusters members do not call each other: keys for the tunnels between all of them would not fit.
const MOST_WITH_TUNNELS: usize = 200;

/// How long a cluster may take to come about.
const GATHERING: Duration = Duration::from_secs(300);

impl World {
    /// A cluster to be measured: there from the start, or, in plain settings, gathered.
    ///
    /// # Errors
    /// Why there is none.
    pub fn cluster(&mut self, linked: &[usize]) -> Result<(), String> {
        if !self.settings.plain {
            return self.converged(linked);
        }
        self.range = RANGE;
        self.found();
        let whole = self.run_until(GATHERING, Duration::from_secs(1), |world| world.is_whole().is_ok());
        whole.map(|_| ()).ok_or_else(|| match self.is_whole() {
            Ok(()) => "it is whole only now".to_owned(),
            Err(missing) => format!("no cluster within {} s: {missing}", GATHERING.as_secs()),
        })
    }

    /// Adds the hosts of the settings, as members of one cluster that know each other, and starts them. Where not all
    /// can have tunnels to all, all have one to each of the hosts `linked`.
    ///
    /// # Errors
    /// What the cluster cannot be made of.
    fn converged(&mut self, linked: &[usize]) -> Result<(), String> {
        self.range = RANGE;
        let nodes = self.settings.nodes;
        for _ in 0..nodes {
            self.add_host(vec![0], SECRET, None);
        }
        let keys = self.common_keys(linked);
        let group = StoredGroup { keys: vec![(0, GroupKey::generate(self.dice.rng()))] };
        if nodes > MOST_WITH_TUNNELS {
            self.max_calls = 0;
        }
        let (mut view, addresses) = self.common_statements()?;
        let mut starts = Vec::new();
        for (at, address) in addresses.into_iter().enumerate() {
            let node = StoredNode { generation: 2, mesh_ipv4: Some(address), leaving: false };
            let keys = keys.get(&at).cloned().unwrap_or_default();
            let stored = Stored { node, group: group.clone(), keys, ..Stored::default() };
            let host = &mut self.hosts[at];
            let writes = stored.writes;
            host.last_start = Some(StartMark { node: host.id(), generation: 1, writes, superseded: None });
            host.disk.files.insert(StateFile::Node, encode_node(&stored.node));
            host.disk.files.insert(StateFile::Group, encode_group(group.clone()));
            starts.push((stored, self.dice.bytes()));
        }
        let records = self.records(&view, &starts)?;
        if let Some(refused) = view.merge(&Delta { records, ..Delta::default() }).refused.into_iter().next() {
            return Err(refused);
        }
        view.drop_news(view.merged_so_far());
        // What is computed of a view is shared by all its copies.
        view.catalogue();
        view.contested_prefixes();
        for (at, (stored, seed)) in starts.into_iter().enumerate() {
            self.hosts[at].disk.view = Some(view.clone());
            let node = self.new_node(at, Stored { view: Some(view.clone()), ..stored }, seed);
            self.run_node(at, node);
            // The model has nothing to say against what it was given.
            if let Some(process) = self.process(at) {
                process.judged = view.merged_so_far();
            }
        }
        Ok(())
    }

    /// What each node says of itself as soon as it has started: then it has nothing new to say when it is started with
    /// that, and all know all from the first moment.
    fn records(&self, view: &View, starts: &[(Stored, [u8; 32])]) -> Result<Vec<Signed<NodeRecord>>, String> {
        let record = |(at, (stored, seed)): (usize, &(Stored, [u8; 32]))| {
            let stored = Stored { view: Some(view.clone()), ..stored.clone() };
            let mut node = self.new_node(at, stored, *seed);
            node.handle(Input::Host(self.facts(at)), Time::ZERO);
            node.view().and_then(|view| view.signed_record(&self.hosts[at].id())).cloned()
        };
        let records: Option<_> = starts.iter().enumerate().map(record).collect();
        records.ok_or_else(|| "a node that says nothing of itself".to_owned())
    }

    /// Keys for the tunnels between all and those `linked`, which both ends have installed.
    fn common_keys(&mut self, linked: &[usize]) -> BTreeMap<usize, BTreeMap<NodeId, Vec<StoredKey>>> {
        let mut keys: BTreeMap<usize, BTreeMap<NodeId, Vec<StoredKey>>> = BTreeMap::new();
        for a in 0..self.hosts.len() {
            for b in linked.iter().copied().filter(|b| *b != a) {
                let psk = Psk::random(self.dice.rng());
                for (here, there) in [(a, b), (b, a)] {
                    let lane = |host: usize| self.hosts[host].disk.lane_key;
                    let key =
                        StoredKey { psk: psk.clone(), keys: (lane(here), lane(there)), confirmed: true };
                    keys.entry(here).or_default().entry(self.hosts[there].id()).or_default().push(key);
                }
            }
        }
        keys
    }

    /// Who has let in whom, and who owns what.
    fn common_statements(&self) -> Result<(View, Vec<Ipv4Addr>), String> {
        let text = |error: &dyn std::fmt::Display| error.to_string();
        let founder = self.hosts.first().ok_or("no hosts")?.disk.identity.clone();
        let mut rng = crate::dice::Dice::new(self.settings.seed, 9);
        let mut fields = GenesisFields::flat("sim", founder.public(), JoinModes::KEY_FILE, rng.rng());
        (fields.ipv4_range, fields.block_prefix) = RANGE;
        let genesis = Genesis::new(fields).map_err(|error| text(&error))?;
        let cluster = genesis.id();
        let mut delta = Delta::default();
        let mut addresses = Vec::new();
        let blocks = RANGE.0.subnets(RANGE.1).map_err(|error| text(&error))?;
        for (host, block) in self.hosts.iter().zip(blocks.collect::<Vec<_>>().into_iter().rev()) {
            let me = host.disk.identity.public();
            let owned: RangeSet = if host.at == 0 { [RANGE.0] } else { [block] }.into_iter().collect();
            let address = Leases::default().first_unused(&owned).ok_or("a block without addresses")?;
            if host.at > 0 {
                let serial = 1 << 32 | host.at as u64;
                let admission = SignedAdmission::issue(cluster, me, &founder, JoinMode::KeyFile, serial);
                delta.admissions.push(admission.map_err(|error| text(&error))?);
                let grant = Grant {
                    cluster,
                    parent: BodyId::from_bytes(*cluster.as_bytes()),
                    network: block.network(),
                    prefix: block.prefix_len(),
                    from: founder.public(),
                    to: me,
                };
                delta.grants.push(Signed::sign(&grant, &founder).map_err(|error| text(&error))?);
            }
            addresses.push(address);
        }
        let mut view = View::new(genesis);
        match view.merge(&delta).refused.into_iter().next() {
            Some(refused) => Err(refused),
            None => Ok((view, addresses)),
        }
    }
}
