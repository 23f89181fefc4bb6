//! News that a node passes on, a few times each.

use std::collections::{BTreeMap, VecDeque};

use super::catalogue::{Kind, Name};

/// So many times a piece of news may be replaced while it is passed on and still be told at once, each time. A member that
/// says something new of itself all the time is passed on at the pace of repetitions.
const HURRIED: u8 = 4;

/// What is still to be told, to whom does not matter.
#[derive(Debug, Default)]
pub(super) struct Rumours {
    told: BTreeMap<Name, Told>,
    /// Names by how often they have been told, the newest last.
    queues: Vec<VecDeque<(Name, u64)>>,
    places: u64,
}

#[derive(Clone, Copy, Debug)]
struct Told {
    /// How often.
    times: u8,
    /// Which of its places in the queues counts.
    place: u64,
    /// How often it was replaced by something newer.
    replaced: u8,
}

impl Rumours {
    /// There is something new under this name.
    pub(super) fn add(&mut self, name: Name) {
        let replaced = self.told.get(&name).map_or(0, |told| told.replaced.saturating_add(1));
        // Who accuses whom comes from many members within a moment, and is limited elsewhere.
        let hurried = replaced <= HURRIED || name.kind == Kind::LIVENESS;
        self.queue(name, u8::from(!hurried), replaced);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.told.is_empty()
    }

    pub(super) fn len(&self) -> usize {
        self.told.len()
    }

    /// Whether something has never been told.
    pub(super) fn has_untold(&self) -> bool {
        self.queues.first().is_some_and(|queue| !queue.is_empty())
    }

    /// Takes out up to `most` names, those told least and of these the newest first; with `untold_only` no others. Each
    /// must be given back by [`Rumours::told`] or [`Rumours::put_back`], or is forgotten by [`Rumours::forget`].
    pub(super) fn take(&mut self, most: usize, untold_only: bool) -> Vec<Name> {
        let mut taken = Vec::new();
        let queues = if untold_only { 1 } else { self.queues.len() };
        for queue in self.queues.iter_mut().take(queues) {
            while taken.len() < most
                && let Some((name, place)) = queue.pop_back()
            {
                if self.told.get(&name).is_some_and(|told| told.place == place) {
                    taken.push(name);
                }
            }
        }
        taken
    }

    /// `name` has been told `times` more; it is forgotten when that makes `limit`.
    pub(super) fn told(&mut self, name: Name, times: u8, limit: u8) {
        let Some(told) = self.told.get(&name).copied() else { return };
        let times = told.times.saturating_add(times);
        if times >= limit {
            self.told.remove(&name);
        } else {
            self.queue(name, times, told.replaced);
        }
    }

    /// `name` has not been told after all.
    pub(super) fn put_back(&mut self, name: Name) {
        if let Some(told) = self.told.get(&name).copied() {
            self.queue(name, told.times, told.replaced);
        }
    }

    /// There is nothing under this name any more.
    pub(super) fn forget(&mut self, name: &Name) {
        self.told.remove(name);
    }

    fn queue(&mut self, name: Name, times: u8, replaced: u8) {
        let queue = usize::from(times);
        if self.queues.len() <= queue {
            self.queues.resize_with(queue + 1, VecDeque::new);
        }
        self.places += 1;
        self.told.insert(name, Told { times, place: self.places, replaced });
        self.queues[queue].push_back((name, self.places));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(byte: u8) -> Name {
        Name { id: [byte; 16], kind: Kind(1) }
    }

    fn tell(rumours: &mut Rumours, most: usize, untold_only: bool) -> Vec<u8> {
        let taken = rumours.take(most, untold_only);
        taken.iter().for_each(|name| rumours.told(*name, 3, 6));
        taken.iter().map(|name| name.id[0]).collect()
    }

    #[test]
    fn the_untold_go_first_and_all_get_their_share() {
        let mut rumours = Rumours::default();
        (1..=4).for_each(|byte| rumours.add(name(byte)));
        assert_eq!(tell(&mut rumours, 3, true), [4, 3, 2]);
        assert!(rumours.has_untold());
        rumours.add(name(9));
        assert_eq!(tell(&mut rumours, 3, false), [9, 1, 2]);
        rumours.add(name(4));
        assert_eq!(tell(&mut rumours, 9, true), [4]);
        assert_eq!(tell(&mut rumours, 9, false), [4, 1, 9, 3], "2 has been told often enough");
        assert!(rumours.is_empty() && !rumours.has_untold());
    }

    #[test]
    fn what_is_put_back_or_news_again_is_not_lost_and_what_is_gone_is() {
        let mut rumours = Rumours::default();
        (1..=3).for_each(|byte| rumours.add(name(byte)));
        let taken = rumours.take(9, false);
        rumours.put_back(taken[0]);
        rumours.forget(&taken[1]);
        rumours.told(taken[2], 3, 6);
        rumours.add(taken[2]);
        assert_eq!((rumours.len(), tell(&mut rumours, 9, false)), (2, vec![1, 3]));
    }
    #[test]
    fn what_is_replaced_all_the_time_waits_for_the_next_repetition() {
        let mut rumours = Rumours::default();
        let mut hurried = 0;
        for _ in 0..20 {
            rumours.add(name(1));
            hurried += tell(&mut rumours, 9, true).len();
        }
        assert_eq!(hurried, 1 + usize::from(HURRIED));
        assert!(!rumours.has_untold());
        assert_eq!(tell(&mut rumours, 9, false), [1], "and is told then");
        while !tell(&mut rumours, 9, false).is_empty() {}
        rumours.add(name(1));
        assert_eq!(tell(&mut rumours, 9, true), [1], "after a while without news it is news again");
        let life = Name { kind: Kind::LIVENESS, ..name(2) };
        for _ in 0..20 {
            rumours.add(life);
            assert_eq!(tell(&mut rumours, 9, true), [2]);
        }
    }
}
