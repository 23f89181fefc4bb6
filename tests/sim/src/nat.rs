//! A NAT, as RFC 4787 sorts them: by what a mapping depends on (section 4.1), and by whom it lets in (section 5).

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use mesh_core::time::Time;

/// How long a mapping is kept that nothing passes through: less than most have.
pub const MAPPING_LIFE: Duration = Duration::from_secs(30);

/// What of the address outside makes a difference.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Depends {
    /// Nothing: endpoint-independent.
    Nothing,
    /// Its IP address.
    Address,
    /// Its IP address and its port.
    AddressAndPort,
}

impl Depends {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Nothing, Self::Address, Self::AddressAndPort];

    fn of(self, outside: SocketAddr) -> (Option<IpAddr>, Option<u16>) {
        match self {
            Self::Nothing => (None, None),
            Self::Address => (Some(outside.ip()), None),
            Self::AddressAndPort => (Some(outside.ip()), Some(outside.port())),
        }
    }
}

/// What a NAT is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NatKind {
    /// Where a datagram goes to decides what it seems to come from.
    pub mapping: Depends,
    /// Who may answer: from where something was sent to.
    pub filtering: Depends,
}

impl NatKind {
    /// Every combination.
    pub fn all() -> impl Iterator<Item = Self> {
        let all = |mapping| Depends::ALL.into_iter().map(move |filtering| Self { mapping, filtering });
        Depends::ALL.into_iter().flat_map(all)
    }
}

/// Whether two hosts, each behind a NAT, get to each other directly, when a third one outside tells them how it sees them.
///
/// Each sends to where that one sees the other. That gets there if the other's NAT lets in anybody, or has the same
/// mapping for this sender and lets in where it has sent to itself. What comes back has to get in, too.
pub fn meet_directly(a: NatKind, b: NatKind) -> bool {
    let fixed = |nat: NatKind| nat.mapping == Depends::Nothing;
    let gets_there = |from: NatKind, to: NatKind| match to.filtering {
        Depends::Nothing => true,
        Depends::Address => fixed(to),
        Depends::AddressAndPort => fixed(to) && fixed(from),
    };
    let and_back = |from: NatKind, to: NatKind| from.filtering != Depends::AddressAndPort || fixed(to);
    [(a, b), (b, a)].into_iter().any(|(from, to)| gets_there(from, to) && and_back(from, to))
}

type Key = (u16, (Option<IpAddr>, Option<u16>));

#[derive(Debug)]
struct Mapping {
    outside: u16,
    used: Time,
    /// Who may answer, and since when nobody there has.
    contacts: BTreeMap<(Option<IpAddr>, Option<u16>), Time>,
}

/// A NAT with one host behind it.
#[derive(Debug)]
pub struct Nat {
    kind: NatKind,
    mappings: BTreeMap<Key, Mapping>,
    by_outside: BTreeMap<u16, Key>,
    /// The next port outside: not that of before, when it has forgotten everything.
    next: u16,
}

impl Nat {
    /// One that knows nothing yet.
    pub fn new(kind: NatKind) -> Self {
        Self { kind, mappings: BTreeMap::new(), by_outside: BTreeMap::new(), next: 20_000 }
    }

    /// What it is like.
    pub fn kind(&self) -> NatKind {
        self.kind
    }

    /// A datagram goes out from a port of the host: the port that it seems to come from.
    pub fn sends(&mut self, port: u16, to: SocketAddr, now: Time) -> u16 {
        let key = (port, self.kind.mapping.of(to));
        let contact = self.kind.filtering.of(to);
        self.forget(&key, now);
        if !self.mappings.contains_key(&key) {
            let outside = self.next;
            self.next = self.next.checked_add(1).unwrap_or(20_000);
            if let Some(old) = self.by_outside.insert(outside, key) {
                self.mappings.remove(&old);
            }
            self.mappings.insert(key, Mapping { outside, used: now, contacts: BTreeMap::new() });
        }
        let Some(mapping) = self.mappings.get_mut(&key) else { return port };
        mapping.used = now;
        mapping.contacts.insert(contact, now);
        mapping.outside
    }

    /// A datagram comes in for a port outside: that of the host, if it gets there.
    pub fn receives(&mut self, from: SocketAddr, port: u16, now: Time) -> Option<u16> {
        let key = *self.by_outside.get(&port)?;
        self.forget(&key, now);
        let mapping = self.mappings.get_mut(&key)?;
        let contact = mapping.contacts.get_mut(&self.kind.filtering.of(from))?;
        if now.since(*contact) >= MAPPING_LIFE {
            return None;
        }
        (*contact, mapping.used) = (now, now);
        Some(key.0)
    }

    /// It forgets everything.
    pub fn reboot(&mut self) {
        self.mappings.clear();
        self.by_outside.clear();
    }

    fn forget(&mut self, key: &Key, now: Time) {
        let old = self.mappings.get(key).filter(|mapping| now.since(mapping.used) >= MAPPING_LIFE);
        if let Some(outside) = old.map(|mapping| mapping.outside) {
            self.mappings.remove(key);
            self.by_outside.remove(&outside);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two addresses with two ports each.
    const OUTSIDE: [([u8; 4], u16); 4] =
        [([192, 0, 2, 1], 1), ([192, 0, 2, 1], 2), ([192, 0, 2, 2], 1), ([192, 0, 2, 2], 2)];

    #[test]
    fn each_kind_is_what_its_name_says() {
        for kind in NatKind::all() {
            let mut nat = Nat::new(kind);
            let mut mapped = OUTSIDE.map(|outside| nat.sends(7, outside.into(), Time::ZERO)).to_vec();
            mapped.dedup();
            let count = match kind.mapping {
                Depends::Nothing => 1,
                Depends::Address => 2,
                Depends::AddressAndPort => 4,
            };
            assert_eq!(mapped.len(), count, "{kind:?}");
            let mut nat = Nat::new(kind);
            let port = nat.sends(7, OUTSIDE[0].into(), Time::ZERO);
            let lets_in = OUTSIDE.map(|outside| nat.receives(outside.into(), port, Time::ZERO) == Some(7));
            let expected = match kind.filtering {
                Depends::Nothing => [true; 4],
                Depends::Address => [true, true, false, false],
                Depends::AddressAndPort => [true, false, false, false],
            };
            assert_eq!(lets_in, expected, "{kind:?}");
        }
    }

    #[test]
    fn what_is_not_used_is_forgotten_and_so_is_everything_by_a_reboot() {
        let kind = NatKind { mapping: Depends::Nothing, filtering: Depends::AddressAndPort };
        let mut nat = Nat::new(kind);
        let [first, .., last] = OUTSIDE.map(SocketAddr::from);
        let at = |seconds| Time::ZERO + Duration::from_secs(seconds);
        let port = nat.sends(7, first, at(0));
        assert_eq!(nat.receives(first, port, at(29)), Some(7));
        assert_eq!(nat.receives(first, port, at(58)), Some(7), "what comes in counts as use");
        assert_eq!(nat.receives(first, port, at(88)), None);
        let port = nat.sends(7, first, at(100));
        assert_eq!(nat.sends(7, last, at(125)), port);
        assert_eq!(nat.receives(first, port, at(131)), None, "the mapping is in use, by others");
        assert_eq!(nat.receives(last, port, at(131)), Some(7));
        nat.reboot();
        assert_eq!(nat.receives(last, port, at(131)), None);
        assert_ne!(nat.sends(7, last, at(131)), port, "another port after a reboot");
    }
}
