//! One look at the kernel, and the steps from what is there to what should be.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::Context as _;
use ipnet::IpNet;
use mesh_core::api::{BRIDGE, MacAddr};
use mesh_core::host::{Bridge, HostState, Lane, Op, Route, diff};
use mesh_core::node::{GUARD_OBJECT, HostFacts, Problem};
use mesh_sys::rtnl::{self, Address, AddressSpec, Blocking, Link, Mac, Neighbour, Scope};

use super::keeper::Keeper;
use super::lanes::{self, Lanes, NO_KEY};
use super::nexthops::{self, Ways};
use super::pods;
use super::routes::{self, Lead};
use super::settings::{self, Settings};
use super::{Options, facts};

/// Beginning of the names of our tunnel devices.
const LANE_PREFIX: &str = "meshwg";

/// Tries to bring the kernel to a state, before what is left is a problem.
pub(super) const ATTEMPTS: usize = 2;

/// The kernel side of this host: everything of [`HostState`] can be read and changed through it.
///
/// All calls block. They belong to the network namespace of the thread that called [`Plane::open`], and must come
/// from threads of that namespace, because settings below `/proc/sys` belong to the thread that opens them.
#[derive(Debug)]
pub struct Plane {
    rtnl: Blocking,
    keeper: Arc<Mutex<Keeper>>,
    settings: Settings,
    lanes: Lanes,
    /// Whether the kernel knows the bridge port flag of that name (Linux 5.18).
    locked: bool,
    /// Indices of our devices at the last look.
    devices: BTreeSet<u32>,
}

/// What was seen at one look.
struct Seen {
    state: HostState,
    /// Neighbours on the bridge that belong to no port.
    strays: Vec<(u32, Neighbour)>,
    /// Every route of ours as the kernel has it, by destination.
    routes: Vec<rtnl::Route>,
    /// Nexthops of ours by which nothing goes.
    unused: Vec<u32>,
    /// What could not be read, although the rest could.
    problems: Vec<Problem>,
}

/// What one attempt did.
#[derive(Debug, Default)]
pub(super) struct Attempt {
    /// Something was changed, or should have been.
    pub(super) changed: bool,
    /// What failed.
    pub(super) problems: Vec<Problem>,
}

impl Plane {
    /// Opens handles in the namespace of the calling thread. Nothing is changed.
    ///
    /// # Errors
    /// The kernel has no rtnetlink or nftables for us; most likely root is missing.
    pub fn open(options: Options) -> anyhow::Result<Self> {
        let Options { mesh_wg, lanes, state_dir, proc_sys } = options;
        Ok(Self {
            rtnl: Blocking::open().context("rtnetlink")?,
            keeper: Arc::new(Mutex::new(Keeper::open().context("nftables")?)),
            settings: Settings::new(proc_sys.as_deref(), &state_dir),
            lanes: Lanes::new(mesh_wg, lanes),
            locked: true,
            devices: BTreeSet::new(),
        })
    }

    pub(super) fn keeper(&self) -> Arc<Mutex<Keeper>> {
        Arc::clone(&self.keeper)
    }

    /// Devices whose keys we hold.
    pub(super) fn lane_names(&self) -> BTreeSet<String> {
        self.lanes.names().cloned().collect()
    }

    /// Indices of our devices at the last look.
    pub(super) fn devices(&self) -> &BTreeSet<u32> {
        &self.devices
    }

    /// What the host is like, ours left out.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn facts(&mut self, desired: Option<&HostState>) -> anyhow::Result<HostFacts> {
        let inside = desired.map(ranges).unwrap_or_default();
        facts::read(&mut self.rtnl, &self.settings, &inside, desired.is_none())
    }

    /// Whether frames between bridge ports go through iptables. Cheap.
    pub(super) fn bridge_netfilter(&self) -> anyhow::Result<bool> {
        facts::bridge_netfilter(&self.settings)
    }

    /// What the kernel holds of ours. Of settings, those that `desired` names.
    ///
    /// # Errors
    /// Something could not be read. What is returned is complete.
    pub fn observe(&mut self, desired: &HostState) -> anyhow::Result<HostState> {
        let seen = self.look(desired)?;
        match seen.problems.first() {
            Some(problem) => anyhow::bail!("{}: {}", problem.object, problem.text),
            None => Ok(seen.state),
        }
    }

    /// Brings the kernel to the desired state; returns what is not as it should be.
    pub fn reconcile(&mut self, desired: &HostState) -> Vec<Problem> {
        let mut last = Attempt::default();
        for _ in 0..ATTEMPTS {
            last = self.attempt(desired);
            if !last.changed {
                return last.problems;
            }
        }
        self.remaining(desired, last.problems)
    }

    /// Looks, and does what is to be done.
    pub(super) fn attempt(&mut self, desired: &HostState) -> Attempt {
        self.guard().want(desired.guard.as_ref());
        let seen = match self.look(desired) {
            Ok(seen) => seen,
            Err(error) => return Attempt { changed: false, problems: vec![unreadable(&error)] },
        };
        for (index, neighbour) in &seen.strays {
            let wanted = desired.ports.values().any(|port| {
                neighbour.mac == Some(Mac(port.mac.0))
                    && [IpAddr::V4(port.ipv4), IpAddr::V6(port.ipv6)].contains(&neighbour.ip)
            });
            if wanted {
                continue;
            }
            // Nobody's neighbour any more; whoever gets the address next sets it anew. Not worth a problem.
            if let Err(error) = self.rtnl.del_neighbour(*index, neighbour.ip) {
                tracing::debug!(ip = %neighbour.ip, %error, "stale neighbour stays");
            }
        }
        let ops = in_order(diff(&seen.state, desired));
        let changed = !ops.is_empty();
        let mut round = Round {
            closed: true,
            known: known_peers(&seen.state),
            problems: seen.problems,
            ranges: ranges(desired),
            bridge: bridge_name(desired),
            lanes: desired.lanes.keys().map(String::as_str).collect(),
            routes: seen.routes,
            ways: None,
        };
        let mut collect = !seen.unused.is_empty();
        for op in &ops {
            tracing::debug!(action = describe(op), "the kernel is told");
            collect |= matches!(op, Op::SetRoute { .. } | Op::RemoveRoute { .. });
            if let Err(error) = self.apply(op, &mut round) {
                let (object, text) = (object(op, &seen.state, desired), format!("{error:#}"));
                tracing::debug!(object, text, "not done");
                round.problems.push(Problem { object, text });
            }
        }
        // In nobody's way, and tried again; not worth a problem.
        if collect && let Err(error) = nexthops::collect(&mut self.rtnl) {
            tracing::debug!(%error, "unused nexthops stay");
        }
        Attempt { changed, problems: round.problems }
    }

    /// What is not as it should be, after all attempts: what is seen counts, not what went wrong on the way. For
    /// each object the reason that the last attempt gave, if it gave one.
    pub(super) fn remaining(&mut self, desired: &HostState, reasons: Vec<Problem>) -> Vec<Problem> {
        let seen = match self.look(desired) {
            Ok(seen) => seen,
            Err(error) => return vec![unreadable(&error)],
        };
        let mut problems = seen.problems;
        for op in diff(&seen.state, desired) {
            let object = object(&op, &seen.state, desired);
            if problems.iter().any(|problem| problem.object == object) {
                continue;
            }
            let reason = reasons.iter().find(|problem| problem.object == object);
            problems.push(reason.cloned().unwrap_or_else(|| Problem {
                object,
                text: format!("the kernel does not keep {}", describe(&op)),
            }));
        }
        problems
    }

    fn guard(&self) -> MutexGuard<'_, Keeper> {
        // A panic in it leaves at worst a stale idea of what is in force, which the next look corrects.
        self.keeper.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn look(&mut self, desired: &HostState) -> anyhow::Result<Seen> {
        let mut problems = Vec::new();
        let guard = self.guard().look().unwrap_or_else(|error| {
            problems.push(Problem { object: GUARD_OBJECT.to_owned(), text: error.to_string() });
            None
        });
        let links = self.rtnl.links()?;
        let addresses = self.rtnl.addresses(None)?;
        let name = bridge_name(desired);
        let bridge = links.iter().find(|link| link.name == name && link.kind.as_deref() == Some("bridge"));
        self.devices =
            links.iter().filter(|link| self.is_ours(&link.name, desired)).map(|link| link.index).collect();
        let (mut ports, mut strays) = (BTreeMap::new(), Vec::new());
        if let Some(bridge) = bridge {
            let fdb = self.rtnl.fdb(bridge.index)?;
            let neighbours = self.rtnl.neighbours(bridge.index)?;
            ports = pods::observe(&links, bridge.index, &fdb, &neighbours, self.locked);
            let owned = |mac| ports.values().any(|port| port.mac.0 == mac);
            let stray = neighbours.iter().filter(|n| n.permanent && n.mac.is_none_or(|mac| !owned(mac.0)));
            strays = stray.map(|n| (bridge.index, n.clone())).collect();
        }
        let mut found = routes::list(&mut self.rtnl)?;
        found.sort_by_key(|route| route.dst);
        let nexthops = self.rtnl.nexthops()?;
        let spreads = nexthops::spreads(&nexthops, &found);
        let routes = routes::observe(&found, &links, &spreads, &ranges(desired));
        let lanes = self.look_at_lanes(desired, &links, &addresses, &mut problems);
        let mut sysctls = BTreeMap::new();
        for (path, wanted) in &desired.sysctls {
            if let Some(value) = self.settings.read(path)? {
                let value = if settings::same(&value, wanted) { wanted.clone() } else { value };
                sysctls.insert(path.clone(), value);
            }
        }
        let bridge = bridge.map(|link| Bridge {
            name: link.name.clone(),
            mac: MacAddr(link.mac.unwrap_or_default().0),
            // A bridge that is down is none that anybody wants.
            mtu: if link.up { link.mtu } else { 0 },
            addresses: own_addresses(link.index, &addresses),
        });
        let state = HostState { sysctls, guard, bridge, lanes, ports, routes };
        let unused = nexthops::unused(&nexthops, &found);
        Ok(Seen { state, strays, routes: found, unused, problems })
    }

    /// Whether a device is the bridge, a port or a lane, by its name.
    fn is_ours(&self, name: &str, desired: &HostState) -> bool {
        name == bridge_name(desired) || name.starts_with(pods::PORT_PREFIX) || self.is_lane(name, desired)
    }

    fn is_lane(&self, name: &str, desired: &HostState) -> bool {
        desired.lanes.contains_key(name) || self.lanes.names().any(|known| known == name) || is_lane(name)
    }

    fn look_at_lanes(
        &self,
        desired: &HostState,
        links: &[Link],
        addresses: &[Address],
        problems: &mut Vec<Problem>,
    ) -> BTreeMap<String, Lane> {
        let mut found = BTreeMap::new();
        let tunnels = links.iter().filter(|link| link.kind.as_deref() == Some("tun"));
        for link in tunnels.filter(|link| self.is_lane(&link.name, desired)) {
            let addresses = own_addresses(link.index, addresses);
            match lanes::observe(link) {
                Ok(Some(lane)) => {
                    found.insert(link.name.clone(), Lane { addresses, ..lane });
                }
                Ok(None) if desired.lanes.contains_key(&link.name) => {}
                Ok(None) => {
                    let (port, public_key, peers) = (0, NO_KEY, BTreeMap::new());
                    found.insert(
                        link.name.clone(),
                        Lane { port, public_key, mtu: link.mtu, addresses, peers },
                    );
                }
                Err(error) => {
                    problems.push(Problem { object: link.name.clone(), text: error.to_string() });
                    // Nothing is known of it, so nothing is changed of it.
                    if let Some(lane) = desired.lanes.get(&link.name) {
                        found.insert(link.name.clone(), lane.clone());
                    }
                }
            }
        }
        found
    }

    fn apply(&mut self, op: &Op, round: &mut Round<'_>) -> anyhow::Result<()> {
        match op {
            Op::SetSysctl { path, value } => Ok(self.settings.set(path, value, &round.lanes)?),
            Op::SetGuard(guard) => {
                let set = self.guard().set(guard);
                round.closed &= set.is_ok();
                Ok(set?)
            }
            Op::SetBridge(bridge) => Ok(pods::set_bridge(&mut self.rtnl, &self.settings, bridge)?),
            Op::SetLane { device, port, public_key, mtu } => {
                Ok(self.lanes.set(&mut self.rtnl, device, *port, *public_key, *mtu)?)
            }
            Op::AddAddress { device, address } => {
                let index = self.index(device)?;
                Ok(self.rtnl.add_address(index, AddressSpec::plain(IpNet::from(*address)))?)
            }
            Op::RemoveAddress { device, address } => {
                let index = self.index(device)?;
                self.rtnl.del_address(index, IpNet::from(*address))?;
                Ok(())
            }
            Op::SetPeer { .. } | Op::RemovePeer { .. } => Ok(self.lanes.peer(op, &mut round.known)?),
            Op::SetPort { name, port } => {
                round.must_be_closed()?;
                let (rtnl, bridge) = (&mut self.rtnl, round.bridge.as_str());
                Ok(pods::set_port(rtnl, &self.settings, bridge, name, port, &mut self.locked)?)
            }
            Op::RemovePort { name, port } => {
                Ok(pods::remove_port(&mut self.rtnl, &round.bridge, name, port)?)
            }
            Op::SetRoute { to, route } => {
                let Some(wanted) = Lead::of(*to, route) else {
                    let set = routes::end(&mut self.rtnl, *to, routes::to(&round.routes, to));
                    round.closed &= set.is_ok();
                    return Ok(set?);
                };
                round.must_be_closed()?;
                let Round { routes, ranges, ways, .. } = round;
                Ok(routes::lead(&mut self.rtnl, ways, &wanted, routes, ranges)?)
            }
            Op::RemoveRoute { to } => Ok(routes::remove(&mut self.rtnl, routes::to(&round.routes, to))?),
            Op::RemoveLane { device } => Ok(lanes::remove(&mut self.rtnl, device)?),
            Op::RemoveBridge { name } => Ok(pods::remove_bridge(&mut self.rtnl, name)?),
        }
    }

    fn index(&mut self, device: &str) -> anyhow::Result<u32> {
        let link = self.rtnl.link(device)?;
        Ok(link.with_context(|| format!("device {device} does not exist"))?.index)
    }
}

/// What the operations of one attempt share.
struct Round<'a> {
    /// Guard and routes that end are in force.
    closed: bool,
    /// Peers that exist.
    known: BTreeSet<(String, mesh_keys::WgPublic)>,
    problems: Vec<Problem>,
    ranges: Vec<IpNet>,
    bridge: String,
    lanes: Vec<&'a str>,
    /// Every route of ours before this attempt, by destination.
    routes: Vec<rtnl::Route>,
    /// What routes to devices are made of, once one was.
    ways: Option<Ways>,
}

impl Round<'_> {
    /// Fail closed: nothing is opened that the guard does not watch.
    fn must_be_closed(&self) -> anyhow::Result<()> {
        anyhow::ensure!(self.closed, "left closed, because the guard is not in force");
        Ok(())
    }
}

/// Within what is neither devices nor routes, order is free; between settings it is not.
fn in_order(ops: Vec<Op>) -> Vec<Op> {
    let (mut sysctls, mut others): (Vec<Op>, Vec<Op>) =
        ops.into_iter().partition(|op| matches!(op, Op::SetSysctl { .. }));
    sysctls.sort_by_key(|op| if let Op::SetSysctl { path, .. } = op { settings::order(path) } else { 0 });
    // They come when the devices they belong to are there, and before what opens.
    let opens =
        |op: &Op| matches!(op, Op::SetPort { .. } | Op::SetRoute { route: Route::Devices { .. }, .. });
    let removes = |op: &Op| {
        matches!(
            op,
            Op::RemoveRoute { .. } | Op::RemovePort { .. } | Op::RemoveLane { .. } | Op::RemoveBridge { .. }
        )
    };
    let at = others.iter().position(|op| opens(op) || removes(op)).unwrap_or(others.len());
    others.splice(at..at, sysctls);
    others
}

fn unreadable(error: &anyhow::Error) -> Problem {
    // Everything hangs on the bridge: while nothing is known, nobody is attached.
    Problem { object: BRIDGE.to_owned(), text: format!("the kernel's state cannot be read: {error:#}") }
}

fn bridge_name(desired: &HostState) -> String {
    desired.bridge.as_ref().map_or(BRIDGE, |bridge| bridge.name.as_str()).to_owned()
}

fn ranges(desired: &HostState) -> Vec<IpNet> {
    let guard = desired.guard.iter();
    guard.flat_map(|guard| [IpNet::V4(guard.cluster_ipv4), IpNet::V6(guard.cluster_ipv6)]).collect()
}

fn known_peers(state: &HostState) -> BTreeSet<(String, mesh_keys::WgPublic)> {
    let lanes = state.lanes.iter();
    lanes.flat_map(|(device, lane)| lane.peers.keys().map(|key| (device.clone(), *key))).collect()
}

/// `meshwg` and a number.
pub(super) fn is_lane(name: &str) -> bool {
    let number = name.strip_prefix(LANE_PREFIX).unwrap_or_default();
    !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit())
}

/// Host addresses (/32 and /128) of a device; whatever else is there was made by the kernel or somebody else.
fn own_addresses(index: u32, addresses: &[Address]) -> BTreeSet<IpAddr> {
    let ours = addresses.iter().filter(|address| {
        address.index == index
            && address.scope == Scope::Universe
            && address.net.prefix_len() == address.net.max_prefix_len()
            && !address.tentative
            && !address.duplicate
    });
    ours.map(|address| address.net.addr()).collect()
}

/// What a problem with an operation is about.
fn object(op: &Op, observed: &HostState, desired: &HostState) -> String {
    match op {
        Op::SetSysctl { path, .. } => path.clone(),
        // A range that is not closed concerns everybody, as the guard does.
        Op::SetGuard(_) | Op::SetRoute { route: Route::Unreachable, .. } => GUARD_OBJECT.to_owned(),
        Op::SetBridge(Bridge { name, .. })
        | Op::RemoveBridge { name }
        | Op::SetPort { name, .. }
        | Op::RemovePort { name, .. } => name.clone(),
        Op::SetLane { device, .. }
        | Op::AddAddress { device, .. }
        | Op::RemoveAddress { device, .. }
        | Op::SetPeer { device, .. }
        | Op::RemovePeer { device, .. }
        | Op::RemoveLane { device } => device.clone(),
        Op::SetRoute { to, route: Route::Devices { devices, .. } } => {
            // The route to a pod is the pod's matter alone.
            let pod = desired.ports.iter().find(|(_, port)| {
                *to == IpNet::from(IpAddr::V4(port.ipv4)) || *to == IpNet::from(IpAddr::V6(port.ipv6))
            });
            let had = match observed.routes.get(to) {
                Some(Route::Devices { devices, .. }) => Some(devices),
                Some(Route::Unreachable) | None => None,
            };
            // Of several devices, the one that the route lacks.
            let lacking = devices.iter().find(|device| had.is_none_or(|had| !had.contains(*device)));
            let device = || lacking.or(devices.first()).cloned().unwrap_or_default();
            pod.map_or_else(device, |(name, _)| name.clone())
        }
        Op::RemoveRoute { to } => to.to_string(),
    }
}

/// What an operation is for, without secrets.
fn describe(op: &Op) -> String {
    match op {
        Op::SetSysctl { path, value } => format!("the value {value} of {path}"),
        Op::SetGuard(_) => "the guard ruleset".to_owned(),
        Op::SetBridge(bridge) => format!("bridge {} as it was made", bridge.name),
        Op::SetLane { device, .. } => format!("tunnel device {device} with its key, port and MTU"),
        Op::AddAddress { device, address } => format!("address {address} on {device}"),
        Op::RemoveAddress { device, address } => format!("{device} without address {address}"),
        Op::SetPeer { device, peer, .. } => format!("peer {peer} of {device}"),
        Op::RemovePeer { device, peer } => format!("{device} without peer {peer}"),
        Op::SetPort { name, .. } => format!("port {name} with its flags and addresses"),
        Op::RemovePort { name, .. } => format!("the bridge without port {name}"),
        Op::SetRoute { to, .. } => format!("the route to {to}"),
        Op::RemoveRoute { to } => format!("the table without the route to {to}"),
        Op::RemoveLane { device } => format!("the host without device {device}"),
        Op::RemoveBridge { name } => format!("the host without bridge {name}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_core::host::{Guard, Port};

    fn desired() -> HostState {
        let port = Port {
            mac: MacAddr([2, 0, 0, 0, 0, 9]),
            ipv4: [10, 32, 0, 9].into(),
            ipv6: "fd00::9".parse().unwrap(),
            mtu: 1420,
            isolated: true,
        };
        let lane = |device: &str| Route::to_device(device, None, None);
        let mut state = HostState {
            guard: Some(Guard {
                cluster_ipv4: "10.32.0.0/12".parse().unwrap(),
                cluster_ipv6: "fd00::/48".parse().unwrap(),
                bridge_mac: MacAddr([2, 0, 0, 0, 0, 1]),
                ports: BTreeMap::new(),
            }),
            bridge: Some(Bridge {
                name: BRIDGE.to_owned(),
                mac: MacAddr([2, 0, 0, 0, 0, 1]),
                mtu: 1420,
                addresses: BTreeSet::from([[10, 32, 0, 1].into()]),
            }),
            ports: BTreeMap::from([("mv0".to_owned(), port)]),
            routes: BTreeMap::from([
                ("10.32.0.0/12".parse().unwrap(), Route::Unreachable),
                ("10.32.0.9/32".parse().unwrap(), lane(BRIDGE)),
                ("10.32.1.0/24".parse().unwrap(), lane("meshwg0")),
            ]),
            ..HostState::default()
        };
        for path in ["net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding", "net/ipv6/conf/eth0/accept_ra"] {
            state.sysctls.insert(path.to_owned(), "1".to_owned());
        }
        state
    }

    #[test]
    fn settings_come_before_what_opens_and_routers_before_forwarding() {
        let ops = in_order(diff(&HostState::default(), &desired()));
        let at = |wanted: &str| {
            ops.iter()
                .position(|op| matches!(op, Op::SetSysctl { path, .. } if path.ends_with(wanted)))
                .unwrap()
        };
        assert!(at("accept_ra") < at("forwarding"));
        let first_port = ops.iter().position(|op| matches!(op, Op::SetPort { .. })).unwrap();
        let bridge = ops.iter().position(|op| matches!(op, Op::SetBridge(_))).unwrap();
        assert!(bridge < at("accept_ra") && at("forwarding") < first_port);
        assert_eq!(ops.len(), diff(&HostState::default(), &desired()).len());
    }

    #[test]
    fn a_problem_blames_what_it_concerns() {
        let mut desired = desired();
        let spread = |devices: &[&str]| {
            let devices = devices.iter().map(|device| (*device).to_owned()).collect();
            Route::Devices { devices, source: None, mtu: None }
        };
        let two: IpNet = "10.32.2.0/24".parse().unwrap();
        desired.routes.insert(two, spread(&["meshwg0", "meshwg1"]));
        let mut observed = HostState::default();
        let blamed = |to: &str, observed: &HostState| {
            let to: IpNet = to.parse().unwrap();
            object(&Op::SetRoute { to, route: desired.routes[&to].clone() }, observed, &desired)
        };
        assert_eq!(blamed("10.32.0.0/12", &observed), GUARD_OBJECT);
        assert_eq!(blamed("10.32.0.9/32", &observed), "mv0");
        assert_eq!(blamed("10.32.1.0/24", &observed), "meshwg0");
        assert_eq!(blamed("10.32.2.0/24", &observed), "meshwg0");
        observed.routes.insert(two, spread(&["meshwg0"]));
        assert_eq!(blamed("10.32.2.0/24", &observed), "meshwg1");
    }

    #[test]
    fn our_lanes_are_known_by_name() {
        assert!(is_lane("meshwg0") && is_lane("meshwg12"));
        assert!(!is_lane("meshwg") && !is_lane("meshwgx") && !is_lane("wg0"));
    }
}
