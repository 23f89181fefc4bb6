//! The network between the hosts: who reaches whom, how fast, and what gets lost.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use mesh_core::time::Time;

use crate::dice::Dice;
use crate::nat::{Nat, NatKind};
use crate::settings::{Chance, NetworkSettings};

/// UDP and TCP port of the control plane.
pub const CONTROL_PORT: u16 = 6783;

/// Where a host is on the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The address of its device.
    pub own: IpAddr,
    /// The address of the NAT in front of it.
    pub nat: Option<IpAddr>,
}

impl Place {
    /// The place of host number `host`.
    pub fn of(host: usize, behind_nat: bool) -> Self {
        let address = |first: u8, second: u8| {
            let [_, _, _, high, middle, low] = {
                let bytes = (host as u64).to_be_bytes();
                [bytes[2], bytes[3], bytes[4], bytes[5], bytes[6], bytes[7]]
            };
            IpAddr::V4(Ipv4Addr::new(first, second | high, middle, low))
        };
        if behind_nat {
            Self { own: address(172, 16), nat: Some(address(203, 0)) }
        } else {
            Self { own: address(198, 18), nat: None }
        }
    }

    /// Where its calls and datagrams seem to come from.
    pub fn seen(self) -> IpAddr {
        self.nat.unwrap_or(self.own)
    }
}

/// A datagram on its way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flight {
    /// How long it takes.
    pub after: Duration,
    /// Where it arrives.
    pub to: usize,
    /// The source that is seen there.
    pub from: SocketAddr,
}

/// Who does not reach whom.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Closed {
    /// Hosts in different parts do not reach each other; those that are not here form one more.
    parts: BTreeMap<usize, usize>,
    /// From, to.
    cuts: BTreeSet<(usize, usize)>,
}

impl Closed {
    fn passes(&self, from: usize, to: usize) -> bool {
        self.parts.get(&from) == self.parts.get(&to) && !self.cuts.contains(&(from, to))
    }
}

/// The network.
pub struct Network {
    settings: NetworkSettings,
    seed: u64,
    dice: Dice,
    places: Vec<Place>,
    hosts: BTreeMap<IpAddr, usize>,
    closed: Closed,
    extra_loss: Chance,
    slow: BTreeMap<usize, Duration>,
    /// What splits and cuts there were, each with when it ended.
    past: Vec<(Time, Closed)>,
    nats: BTreeMap<usize, Nat>,
}

impl Network {
    /// A network without hosts.
    pub fn new(settings: NetworkSettings, seed: u64) -> Self {
        Self {
            settings,
            seed,
            dice: Dice::new(seed, 1),
            places: Vec::new(),
            hosts: BTreeMap::new(),
            closed: Closed::default(),
            extra_loss: 0,
            slow: BTreeMap::new(),
            past: Vec::new(),
            nats: BTreeMap::new(),
        }
    }

    /// Adds the next host, and a NAT in front of it.
    pub fn add(&mut self, nat: Option<NatKind>) -> Place {
        let host = self.places.len();
        let place = Place::of(host, nat.is_some());
        self.places.push(place);
        self.hosts.insert(place.own, host);
        self.hosts.extend(place.nat.map(|nat| (nat, host)));
        self.nats.extend(nat.map(|kind| (host, Nat::new(kind))));
        place
    }

    /// What the NAT in front of a host is like, if there is one.
    pub fn nat(&self, host: usize) -> Option<NatKind> {
        self.nats.get(&host).map(Nat::kind)
    }

    /// Where a host is.
    pub fn place(&self, host: usize) -> Place {
        self.places.get(host).copied().unwrap_or_else(|| Place::of(host, false))
    }

    /// Who has an address.
    pub fn host_at(&self, address: IpAddr) -> Option<usize> {
        self.hosts.get(&address).copied()
    }

    /// Whether a host can be called: it is behind no NAT, and the address is its own.
    pub fn listens(&self, host: usize, address: IpAddr) -> bool {
        let place = self.place(host);
        place.nat.is_none() && place.own == address
    }

    /// Whether packets pass one way.
    pub fn passes(&self, from: usize, to: usize) -> bool {
        self.closed.passes(from, to)
    }

    /// Whether packets pass both ways.
    pub fn open(&self, a: usize, b: usize) -> bool {
        self.passes(a, b) && self.passes(b, a)
    }

    /// Since when packets pass both ways; `None` when they do not.
    pub fn open_since(&self, a: usize, b: usize) -> Option<Time> {
        let shut = |closed: &Closed| !closed.passes(a, b) || !closed.passes(b, a);
        let last = self.past.iter().rev().find(|(_, closed)| shut(closed));
        self.open(a, b).then(|| last.map_or(Time::ZERO, |(ended, _)| *ended))
    }

    /// The delay from one host to another, without jitter: the same during a run.
    pub fn base_delay(&self, from: usize, to: usize) -> Duration {
        let mut mixed = self.seed ^ ((from as u64) << 32 | to as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^= mixed >> 31;
        let width = self.settings.most_delay.saturating_sub(self.settings.least_delay).as_micros();
        let width = u64::try_from(width).unwrap_or(u64::MAX).max(1);
        self.settings.least_delay + Duration::from_micros(mixed % width)
    }

    /// The delay of one packet.
    pub fn delay(&mut self, from: usize, to: usize) -> Duration {
        let jitter = self.dice.span(Duration::ZERO, self.settings.jitter);
        let late = self.slow.get(&to).copied().unwrap_or_default();
        let late = if late.is_zero() { late } else { self.dice.span(Duration::ZERO, late) };
        self.base_delay(from, to) + jitter + late
    }

    /// Whether this packet gets lost.
    pub fn loses(&mut self) -> bool {
        self.dice.chance(self.settings.loss + self.extra_loss)
    }

    /// The delay of a segment that is sent again until it arrives.
    pub fn reliable_delay(&mut self, from: usize, to: usize) -> Duration {
        let mut wait =
            (self.base_delay(from, to) + self.base_delay(to, from)).max(Duration::from_millis(200));
        let mut delay = self.delay(from, to);
        while self.loses() {
            delay += wait;
            wait *= 2;
        }
        delay
    }

    /// Where a datagram from a port of a host seems to come from; a NAT makes a mapping for it, if it has none.
    pub fn source(&mut self, from: usize, port: u16, to: SocketAddr, now: Time) -> SocketAddr {
        let sender = self.place(from);
        let Some(nat) = sender.nat else { return SocketAddr::new(sender.own, port) };
        let port = self.nats.get_mut(&from).map_or(port, |nat| nat.sends(port, to, now));
        SocketAddr::new(nat, port)
    }

    /// The host, and the port of it, that a datagram gets to, as far as addresses and NATs go.
    pub fn destination(&mut self, source: SocketAddr, to: SocketAddr, now: Time) -> Option<(usize, u16)> {
        let host = self.host_at(to.ip())?;
        let Some(nat) = self.place(host).nat else { return Some((host, to.port())) };
        let port = self.nats.get_mut(&host).filter(|_| nat == to.ip())?.receives(source, to.port(), now)?;
        Some((host, port))
    }

    /// Sends a datagram from a port of a host to the control port of another: none, one or two arrive.
    pub fn datagram(&mut self, from: usize, port: u16, to: SocketAddr, now: Time) -> Vec<Flight> {
        let source = self.source(from, port, to, now);
        let arrives = self.destination(source, to, now).filter(|(_, port)| *port == CONTROL_PORT);
        let Some((host, _)) = arrives else { return Vec::new() };
        if !self.passes(from, host) || self.loses() {
            return Vec::new();
        }
        let copies = 1 + usize::from(self.dice.chance(self.settings.duplicates));
        (0..copies).map(|_| Flight { after: self.delay(from, host), to: host, from: source }).collect()
    }

    // Faults.

    /// Puts hosts into parts that do not reach each other; hosts that are not named form one more.
    pub fn split(&mut self, parts: BTreeMap<usize, usize>, now: Time) {
        self.change(now, |closed| closed.parts = parts);
    }

    /// Loses every packet from one host to another.
    pub fn cut(&mut self, from: usize, to: usize, now: Time) {
        self.change(now, |closed| {
            closed.cuts.insert((from, to));
        });
    }

    /// Ends all cuts and splits.
    pub fn heal(&mut self, now: Time) {
        self.change(now, |closed| *closed = Closed::default());
    }

    /// Puts a host where it reaches nobody; a split that is in force stays.
    pub fn isolate(&mut self, host: usize, now: Time) {
        let part = 1_000 + host;
        self.change(now, |closed| {
            closed.parts.insert(host, part);
        });
    }

    /// All NATs forget their mappings: what comes in is lost until something goes out, by another port.
    pub fn reboot_nats(&mut self) {
        self.nats.values_mut().for_each(Nat::reboot);
    }

    /// Loses more packets.
    pub fn lose_more(&mut self, chance: Chance) {
        self.extra_loss = chance;
    }

    /// Makes a host handle packets up to `late` later; zero ends that.
    pub fn slow_down(&mut self, host: usize, late: Duration) {
        if late.is_zero() {
            self.slow.remove(&host);
        } else {
            self.slow.insert(host, late);
        }
    }

    fn change(&mut self, now: Time, change: impl FnOnce(&mut Closed)) {
        let mut next = self.closed.clone();
        change(&mut next);
        let before = std::mem::replace(&mut self.closed, next);
        if before != Closed::default() && before != self.closed {
            self.past.push((now, before));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nat::{Depends, MAPPING_LIFE};

    const SYMMETRIC: NatKind =
        NatKind { mapping: Depends::AddressAndPort, filtering: Depends::AddressAndPort };

    fn network(nats: &[bool]) -> Network {
        let settings = NetworkSettings { loss: 0, duplicates: 0, ..NetworkSettings::default() };
        let mut network = Network::new(settings, 7);
        nats.iter().for_each(|nat| {
            network.add(nat.then_some(SYMMETRIC));
        });
        network
    }

    fn control(address: IpAddr) -> SocketAddr {
        SocketAddr::new(address, CONTROL_PORT)
    }

    #[test]
    fn a_host_behind_nat_is_reached_only_at_a_mapping_it_opened_and_while_that_is_fresh() {
        let mut network = network(&[false, true, false]);
        let (outside, inside, other) = (network.place(0), network.place(1), network.place(2));
        let now = Time::ZERO;
        assert_eq!(network.datagram(0, CONTROL_PORT, control(inside.seen()), now), []);
        let out = network.datagram(1, CONTROL_PORT, control(outside.own), now);
        assert_eq!(out.len(), 1);
        let seen = out[0].from;
        assert_eq!(Some(seen.ip()), inside.nat);
        assert_eq!(network.datagram(0, CONTROL_PORT, seen, now).len(), 1);
        assert_eq!(
            network.datagram(2, CONTROL_PORT, seen, now),
            [],
            "from another source than the one it was opened to"
        );
        network.reboot_nats();
        assert_eq!(network.datagram(0, CONTROL_PORT, seen, now), []);
        let again = network.datagram(1, CONTROL_PORT, control(outside.own), now)[0].from;
        assert_ne!(again, seen, "another port after a reboot");
        assert_eq!(network.datagram(0, CONTROL_PORT, again, now).len(), 1);
        assert_eq!(network.datagram(0, CONTROL_PORT, again, now + MAPPING_LIFE), []);
        assert!(!network.listens(1, inside.seen()) && network.listens(2, other.own));
    }

    #[test]
    fn cuts_are_one_way_and_healing_is_noted() {
        let mut network = network(&[false, false, false]);
        let later = Time::ZERO + Duration::from_secs(5);
        network.cut(0, 1, Time::ZERO);
        assert!(!network.passes(0, 1) && network.passes(1, 0) && network.open(0, 2));
        assert_eq!(network.open_since(0, 1), None);
        network.heal(later);
        assert_eq!(network.open_since(1, 0), Some(later));
        assert_eq!(network.open_since(1, 2), Some(Time::ZERO));
    }

    #[test]
    fn loss_and_duplicates_are_as_often_as_asked() {
        let settings = NetworkSettings { loss: 1_000, duplicates: 1_000, ..NetworkSettings::default() };
        let mut network = Network::new(settings, 3);
        (0..2).for_each(|_| {
            network.add(None);
        });
        let to = control(network.place(1).own);
        let counts = (0..10_000).map(|_| network.datagram(0, CONTROL_PORT, to, Time::ZERO).len());
        let mut seen = [0usize; 3];
        counts.for_each(|count| seen[count] += 1);
        assert!((900..1_100).contains(&seen[0]), "{seen:?}");
        assert!((800..1_000).contains(&seen[2]), "{seen:?}");
    }
}
