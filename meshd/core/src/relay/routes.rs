//! What indices mean, and until when.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use super::{Dropped, LaneId, Limits};
use crate::time::Time;

/// An initiation that is not answered is forgotten after this time: WireGuard sends another one after 5 s.
pub(super) const UNANSWERED_FOR: Duration = Duration::from_secs(10);

/// WireGuard makes new keys after 120 s and takes no data after 180 s (`REJECT_AFTER_TIME`); the rest is for slow paths.
pub(super) const ANSWERED_FOR: Duration = Duration::from_secs(210);

/// What an index means in datagrams from one lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Route {
    /// Whose index it is.
    pub(super) to: LaneId,
    /// Whether its owner began the handshake.
    pub(super) initiated: bool,
    /// Whether the handshake was answered: before that no data flows.
    pub(super) answered: bool,
    /// How often the handshake message that gave it its meaning was passed on.
    passed: u8,
    until: Time,
}

impl Route {
    /// Whether its handshake has only just been. A message that comes later may belong to another one, for which the same
    /// index was drawn: its session would outlive the route, and the index could be somebody else's before it ends.
    fn is_new(&self, now: Time) -> bool {
        !self.answered || self.until > now + (ANSWERED_FOR - UNANSWERED_FOR)
    }
}

/// Handshake messages are never sent again by their sender; the network may double them.
const MOST_PASSED: u8 = 3;

type Key = (LaneId, u32);

/// All indices with a meaning.
#[derive(Debug, Default)]
pub(super) struct Routes {
    all: BTreeMap<Key, Route>,
    /// In the order of time, each kind for itself. What was put off or removed meanwhile is found to be so.
    unanswered: VecDeque<(Time, Key)>,
    answered: VecDeque<(Time, Key)>,
    /// How many indices are each lane's.
    held: BTreeMap<LaneId, u32>,
}

impl Routes {
    pub(super) fn len(&self) -> usize {
        self.all.len()
    }

    /// What an index in a datagram from a lane means.
    pub(super) fn get(&self, from: LaneId, index: u32, now: Time) -> Result<Route, Dropped> {
        self.all.get(&(from, index)).copied().filter(|route| route.until > now).ok_or(Dropped::NoRoute)
    }

    /// `to` has sent an initiation to the lane of `key`, with its index.
    pub(super) fn begin(&mut self, key: Key, to: LaneId, limits: &Limits, now: Time) -> Result<(), Dropped> {
        self.reserve(to, limits, now)?;
        let until = now + UNANSWERED_FOR;
        self.put(key, Route { to, initiated: true, answered: false, passed: 1, until });
        self.unanswered.push_back((until, key));
        Ok(())
    }

    /// A handshake message from `to` that would give the index at `key` a meaning, which it has already.
    pub(super) fn again(
        &mut self,
        key: Key,
        route: Route,
        (to, initiated): (LaneId, bool),
        now: Time,
    ) -> Result<(), Dropped> {
        if (route.to, route.initiated) != (to, initiated) || !route.is_new(now) {
            return Err(Dropped::Collision);
        }
        if route.passed >= MOST_PASSED {
            return Err(Dropped::TooMany);
        }
        self.all.insert(key, Route { passed: route.passed + 1, ..route });
        Ok(())
    }

    /// The initiation by which `there` had a meaning was answered: data may flow, also by the index of the response. Another
    /// answer, with another index, prolongs nothing, and there are few: only one is the responder's.
    pub(super) fn answer(
        &mut self,
        (there, asked): (Key, Route),
        back: Key,
        limits: &Limits,
        now: Time,
    ) -> Result<(), Dropped> {
        if !asked.is_new(now) {
            return Err(Dropped::Collision);
        }
        let end = now + ANSWERED_FOR;
        let (passed, until) = if asked.answered { (asked.passed + 1, asked.until) } else { (1, end) };
        if passed > MOST_PASSED {
            return Err(Dropped::TooMany);
        }
        self.reserve(there.0, limits, now)?;
        self.put(there, Route { answered: true, passed, until, ..asked });
        self.put(back, Route { to: there.0, initiated: false, answered: true, passed: 1, until });
        if !asked.answered {
            self.answered.push_back((end, there));
        }
        // In the order of time, though it may be over earlier.
        self.answered.push_back((end, back));
        Ok(())
    }

    /// Makes sure of room for one more index of the lane `of`.
    fn reserve(&mut self, of: LaneId, limits: &Limits, now: Time) -> Result<(), Dropped> {
        let fits = |routes: &Self| {
            let held = routes.held.get(&of).copied().unwrap_or_default();
            // The queues also hold what is answered or removed already: they are bounded too.
            routes.unanswered.len().max(routes.answered.len()) < limits.routes
                && routes.all.len() < limits.routes
                && held < limits.routes_per_lane
        };
        if !fits(self) {
            self.expire(now);
        }
        if fits(self) { Ok(()) } else { Err(Dropped::Full) }
    }

    fn put(&mut self, key: Key, route: Route) {
        let before = self.all.insert(key, route);
        if let Some(before) = before {
            self.release(before.to);
        }
        *self.held.entry(route.to).or_default() += 1;
    }

    fn release(&mut self, of: LaneId) {
        if let Some(held) = self.held.get_mut(&of) {
            *held = held.saturating_sub(1);
            if *held == 0 {
                self.held.remove(&of);
            }
        }
    }

    pub(super) fn expire(&mut self, now: Time) {
        while let Some((_, key)) = due(&mut self.unanswered, now).or_else(|| due(&mut self.answered, now)) {
            // It may have been answered since.
            if self.all.get(&key).is_some_and(|route| route.until <= now)
                && let Some(route) = self.all.remove(&key)
            {
                self.release(route.to);
            }
        }
    }

    /// A lane is registered no more: nothing from it means anything. What went to it ends by itself.
    pub(super) fn remove_of(&mut self, from: LaneId) {
        let gone: Vec<(Key, Route)> =
            self.all.range((from, 0)..=(from, u32::MAX)).map(|(key, route)| (*key, *route)).collect();
        for (key, route) in gone {
            self.all.remove(&key);
            self.release(route.to);
        }
    }
}

fn due(queue: &mut VecDeque<(Time, Key)>, now: Time) -> Option<(Time, Key)> {
    queue.pop_front_if(|(until, _)| *until <= now)
}
