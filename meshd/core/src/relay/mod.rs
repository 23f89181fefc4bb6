//! The blind relay: WireGuard's datagrams are passed on between two members that cannot reach each other.
//!
//! Nothing is allocated by request and nothing is put in front of the datagrams: they say themselves where they go
//! (WireGuard paper, section 5.4), so it works with any WireGuard at both ends, and the relay cannot read what it passes
//! on.
//!
//! | message | goes to | and then |
//! |---|---|---|
//! | initiation | the lane whose key its MAC1 fits | answers with its index are the initiator's |
//! | response, cookie | whose initiation had that index | after a response: data in both directions |
//! | data | whose response or initiation had that index | |
//!
//! An index means something only together with the lane that it comes from. A handshake that would give an index two
//! meanings is dropped; WireGuard tries again with another one.
//!
//! ## What nobody gets out of it
//!
//! - Only lanes are served that a member has registered ([`Relay::register`]), from the address that it was last heard
//!   from; in both directions. Whatever else comes is dropped for the price of a look into a table.
//! - Data flows to a lane only after that has answered an initiation, with its index and a MAC1 for the initiator's key: who
//!   registers an address that is not its own gets nothing sent there but initiations, as many as it may send itself.
//! - One datagram in, at most one out, of the same length; the relay says nothing itself.
//! - Tables have bounds, for each lane and altogether; so have initiations for each lane, and the search for whom they
//!   are, which costs most.
//! - Who sends initiations from the address of a lane uses up its searches; what the lane itself sends to those that it has
//!   talked to before is found without. What was recorded and is sent again is passed on twice, and has no effect.
//! - Nothing tells an initiation that a lane has sent from one that was sent with its address and marked for one of its peers.
//!   Whoever knows both uses up what that lane may begin; sessions that there are go on until they end.
//!
//! Time and bytes are arguments, and the answer is where to send: the shell receives and sends.

mod routes;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use mesh_keys::WgPublic;
use mesh_keys::mac1::{INITIATION_LEN, Mac1Key, RESPONSE_LEN};

use self::routes::Routes;
use crate::time::Time;

/// Lengths of WireGuard's other messages, in bytes: a cookie's, and the least of a data message.
const COOKIE_LEN: usize = 64;
const DATA_LEN: usize = 32;

/// A registration counts for so long. NATs keep a mapping for 30 s at the least, mostly; ends say it three times in this
/// time.
pub const REGISTERED_FOR: Duration = Duration::from_secs(75);

/// What a relay may spend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Lanes that are registered.
    pub lanes: usize,
    /// Indices with a meaning, altogether.
    pub routes: usize,
    /// Indices that a lane's handshakes give a meaning, answered and not.
    pub routes_per_lane: u32,
    /// New initiations of one lane per second, after a burst of as many.
    pub initiations: u32,
    /// Searches per second for whom initiations of one lane are, after a burst of as many.
    pub searches: u32,
    /// MACs per second that all searches may compute, after a burst of as many.
    pub macs: u32,
}

impl Default for Limits {
    /// For a cluster of 5,000, in which a lane may have one relay for all its peers.
    fn default() -> Self {
        Self {
            lanes: 16_384,
            routes: 262_144,
            routes_per_lane: 16_384,
            initiations: 500,
            searches: 50,
            macs: 200_000,
        }
    }
}

/// Why a datagram is not passed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Dropped {
    /// It is not from a registered lane.
    Stranger,
    /// It is none of WireGuard's messages.
    Malformed,
    /// An initiation for a lane that is not registered, or for its sender.
    NoSuchLane,
    /// More initiations than a lane may send.
    TooMany,
    /// Whom an initiation is for was not searched: too much of that was done already.
    Busy,
    /// Its index would have, or has, two meanings.
    Collision,
    /// A table is full.
    Full,
    /// Its index means nothing, or not yet.
    NoRoute,
    /// A response that is not for whom its index says.
    Mismatch,
}

impl Dropped {
    /// All of them, in order.
    pub const ALL: [Self; 9] = [
        Self::Stranger,
        Self::Malformed,
        Self::NoSuchLane,
        Self::TooMany,
        Self::Busy,
        Self::Collision,
        Self::Full,
        Self::NoRoute,
        Self::Mismatch,
    ];

    /// Name in metrics.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Stranger => "stranger",
            Self::Malformed => "malformed",
            Self::NoSuchLane => "no_such_lane",
            Self::TooMany => "too_many",
            Self::Busy => "busy",
            Self::Collision => "collision",
            Self::Full => "full",
            Self::NoRoute => "no_route",
            Self::Mismatch => "mismatch",
        }
    }
}

/// A registered lane, as long as it is: see [`Relay::source`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct LaneId(u64);

/// Where a lane is, as the relay sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// The address that its datagrams come from.
    pub remote: SocketAddr,
    /// The address of the relay that they come to: a NAT on the way lets answers in from no other.
    pub local: Option<IpAddr>,
}

/// A lane that can be sent to.
#[derive(Debug)]
struct Lane {
    key: WgPublic,
    mac1: Mac1Key,
    endpoint: Endpoint,
    /// Orders the registrations of the lane.
    serial: u64,
    until: Time,
    initiations: Bucket,
    searches: Bucket,
    /// With whom it has had a handshake, the latest first.
    peers: Vec<LaneId>,
}

/// Peers of a lane that are tried before all others.
const REMEMBERED: usize = 16;

/// So many things per second, after a burst of as many.
#[derive(Clone, Copy, Debug)]
struct Bucket {
    left: u32,
    filled: Time,
}

impl Bucket {
    fn full(rate: u32, now: Time) -> Self {
        Self { left: rate, filled: now }
    }

    /// Takes `wanted`, or nothing; whether there were so many. What is refused costs nothing, or who asks all the time would get
    /// nothing ever.
    fn take(&mut self, wanted: u32, rate: u32, now: Time) -> bool {
        let micros = u64::try_from(now.since(self.filled).as_micros()).unwrap_or(u64::MAX);
        let gained = micros.saturating_mul(u64::from(rate)) / 1_000_000;
        if gained > 0 {
            let gained = u32::try_from(gained).unwrap_or(u32::MAX);
            self.left = self.left.saturating_add(gained).min(rate);
            self.filled = now;
        }
        let may = wanted <= self.left;
        if may {
            self.left -= wanted;
        }
        may
    }
}

/// The relay.
#[derive(Debug)]
pub struct Relay {
    limits: Limits,
    next: u64,
    lanes: BTreeMap<LaneId, Lane>,
    by_address: BTreeMap<SocketAddr, LaneId>,
    by_key: BTreeMap<WgPublic, LaneId>,
    routes: Routes,
    macs: Bucket,
}

/// Why a lane is not registered. Nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RegisterError {
    /// The same, or a later one, was there before.
    #[error("a registration came again, or after a newer one")]
    Outdated,
    /// The table is full.
    #[error("as many lanes are registered as may be")]
    Full,
}

impl Relay {
    /// A relay that serves nobody yet.
    #[must_use]
    pub fn new(limits: Limits, now: Time) -> Self {
        Self {
            limits,
            next: 0,
            lanes: BTreeMap::new(),
            by_address: BTreeMap::new(),
            by_key: BTreeMap::new(),
            routes: Routes::default(),
            macs: Bucket::full(limits.macs, now),
        }
    }

    /// Serves the lane with `key` at `endpoint`, until [`REGISTERED_FOR`] has passed. The caller knows that whoever holds the
    /// key has said so, from there; `serial` grows with each time. What is under way goes on when the address changes.
    ///
    /// # Errors
    /// [`RegisterError`].
    pub fn register(
        &mut self,
        key: WgPublic,
        endpoint: Endpoint,
        serial: u64,
        now: Time,
    ) -> Result<LaneId, RegisterError> {
        let until = now + REGISTERED_FOR;
        if let Some(id) = self.by_key.get(&key).copied()
            && let Some(lane) = self.lanes.get_mut(&id)
        {
            if serial <= lane.serial {
                return Err(RegisterError::Outdated);
            }
            let before = std::mem::replace(&mut lane.endpoint, endpoint).remote;
            (lane.serial, lane.until) = (serial, until);
            if before != endpoint.remote {
                self.by_address.remove(&before);
                self.place(endpoint.remote, id);
            }
            return Ok(id);
        }
        if self.lanes.len() >= self.limits.lanes {
            self.expire(now);
            if self.lanes.len() >= self.limits.lanes {
                return Err(RegisterError::Full);
            }
        }
        let id = LaneId(self.next);
        self.next = self.next.wrapping_add(1);
        let lane = Lane {
            key,
            mac1: Mac1Key::of(&key),
            endpoint,
            serial,
            until,
            initiations: Bucket::full(self.limits.initiations, now),
            searches: Bucket::full(self.limits.searches, now),
            peers: Vec::new(),
        };
        self.lanes.insert(id, lane);
        self.by_key.insert(key, id);
        self.place(endpoint.remote, id);
        Ok(id)
    }

    /// Two lanes cannot be at one address: the one that was there before is there no more.
    fn place(&mut self, address: SocketAddr, id: LaneId) {
        if let Some(before) = self.by_address.insert(address, id) {
            self.remove(before);
        }
    }

    fn remove(&mut self, id: LaneId) {
        let Some(lane) = self.lanes.remove(&id) else { return };
        self.by_key.remove(&lane.key);
        if self.by_address.get(&lane.endpoint.remote) == Some(&id) {
            self.by_address.remove(&lane.endpoint.remote);
        }
        self.routes.remove_of(id);
    }

    /// Serves the lanes with keys that `keep` says, and no others from now on.
    pub fn retain(&mut self, keep: impl Fn(&WgPublic) -> bool) {
        let gone: Vec<LaneId> = self.by_key.iter().filter(|(key, _)| !keep(key)).map(|(_, id)| *id).collect();
        gone.into_iter().for_each(|id| self.remove(id));
    }

    /// Forgets what has come to its end. To be called now and then: nothing rests on when.
    pub fn expire(&mut self, now: Time) {
        let over = self.lanes.iter().filter(|(_, lane)| lane.until <= now).map(|(id, _)| *id);
        let over: Vec<LaneId> = over.collect();
        over.into_iter().for_each(|id| self.remove(id));
        self.routes.expire(now);
    }

    /// Number of lanes that are registered, and of indices with a meaning.
    #[must_use]
    pub fn load(&self) -> (usize, usize) {
        (self.lanes.len(), self.routes.len())
    }

    /// Whether the lane with `key` is registered.
    #[must_use]
    pub fn serves(&self, key: &WgPublic, now: Time) -> bool {
        self.endpoint_of(key, now).is_some()
    }

    /// Where the lane with `key` is, if it is registered.
    #[must_use]
    pub fn endpoint_of(&self, key: &WgPublic, now: Time) -> Option<Endpoint> {
        let lane = self.lanes.get(self.by_key.get(key)?)?;
        (lane.until > now).then_some(lane.endpoint)
    }

    /// The lane that is registered at `address`.
    #[must_use]
    pub fn source(&self, address: &SocketAddr) -> Option<LaneId> {
        self.by_address.get(address).copied()
    }

    /// Where a datagram from a registered lane goes.
    ///
    /// # Errors
    /// Why nowhere.
    pub fn route(&mut self, from: LaneId, message: &[u8], now: Time) -> Result<Endpoint, Dropped> {
        let is_there = |lane: Option<&Lane>| lane.is_some_and(|lane| lane.until > now);
        if !is_there(self.lanes.get(&from)) {
            return Err(Dropped::Stranger);
        }
        let to = match (word(message, 0), message.len()) {
            (Some(1), INITIATION_LEN) => self.initiation(from, message, now)?,
            (Some(2), RESPONSE_LEN) => self.response(from, message, now)?,
            (Some(3), COOKIE_LEN) => self.routes.get(from, index(message, 4)?, now)?.to,
            (Some(4), DATA_LEN..) => {
                let route = self.routes.get(from, index(message, 4)?, now)?;
                if !route.answered {
                    return Err(Dropped::NoRoute);
                }
                route.to
            }
            _ => return Err(Dropped::Malformed),
        };
        let lane = self.lanes.get(&to).filter(|lane| lane.until > now);
        lane.map(|lane| lane.endpoint).ok_or(Dropped::NoRoute)
    }

    fn initiation(&mut self, from: LaneId, message: &[u8], now: Time) -> Result<LaneId, Dropped> {
        let to = self.addressee(from, message, now)?;
        let index = index(message, 4)?;
        if let Ok(route) = self.routes.get(to, index, now) {
            return self.routes.again((to, index), route, (from, true), now).map(|()| to);
        }
        let lane = self.lanes.get_mut(&from).ok_or(Dropped::Stranger)?;
        if !lane.initiations.take(1, self.limits.initiations, now) {
            return Err(Dropped::TooMany);
        }
        self.routes.begin((to, index), from, &self.limits, now)?;
        Ok(to)
    }

    /// The lane that an initiation is for.
    fn addressee(&mut self, from: LaneId, message: &[u8], now: Time) -> Result<LaneId, Dropped> {
        let lanes = &self.lanes;
        let fits = |id: &LaneId| lanes.get(id).is_some_and(|lane| lane.mac1.matches(message));
        let remembered = lanes.get(&from).map(|lane| lane.peers.as_slice()).unwrap_or_default();
        if let Some(at) = remembered.iter().position(fits) {
            let lane = self.lanes.get_mut(&from).ok_or(Dropped::Stranger)?;
            lane.peers[..=at].rotate_right(1);
            return Ok(lane.peers[0]);
        }
        let macs = u32::try_from(lanes.len()).unwrap_or(u32::MAX);
        let searcher = self.lanes.get_mut(&from).ok_or(Dropped::Stranger)?;
        if !searcher.searches.take(1, self.limits.searches, now)
            || !self.macs.take(macs, self.limits.macs.max(macs), now)
        {
            return Err(Dropped::Busy);
        }
        let fits = |(_, lane): &(&LaneId, &Lane)| lane.mac1.matches(message);
        let to = self.lanes.iter().find(fits).map(|(id, _)| *id);
        to.filter(|to| *to != from).ok_or(Dropped::NoSuchLane)
    }

    /// Who answers an initiation is a peer. Were it who is asked, then whoever sends from the address of a lane, and knows the
    /// keys of sixteen others, would have its peers forgotten.
    fn remember(&mut self, of: LaneId, peer: LaneId) {
        let Some(lane) = self.lanes.get_mut(&of) else { return };
        lane.peers.retain(|before| *before != peer);
        lane.peers.insert(0, peer);
        lane.peers.truncate(REMEMBERED);
    }

    fn response(&mut self, from: LaneId, message: &[u8], now: Time) -> Result<LaneId, Dropped> {
        let (sender, receiver) = (index(message, 4)?, index(message, 8)?);
        let asked = self.routes.get(from, receiver, now)?;
        let lane = self.lanes.get(&asked.to).filter(|_| asked.initiated).ok_or(Dropped::NoRoute)?;
        let to = asked.to;
        if !lane.mac1.matches(message) {
            return Err(Dropped::Mismatch);
        }
        match self.routes.get(to, sender, now) {
            Ok(_) if !asked.answered => return Err(Dropped::Collision),
            Ok(route) => self.routes.again((to, sender), route, (from, false), now)?,
            Err(_) => {
                self.routes.answer(((from, receiver), asked), (to, sender), &self.limits, now)?;
                self.remember(to, from);
                self.remember(from, to);
            }
        }
        Ok(to)
    }
}

/// Whether a datagram looks like one of WireGuard's, by its first bytes: what else comes to the same port begins otherwise.
#[must_use]
pub fn is_wireguard(datagram: &[u8]) -> bool {
    matches!(datagram, [1..=4, 0, 0, 0, ..])
}

fn word(message: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(message.get(at..at + 4)?.try_into().ok()?))
}

fn index(message: &[u8], at: usize) -> Result<u32, Dropped> {
    word(message, at).ok_or(Dropped::Malformed)
}
