//! The lists that every client of a worker stands in: one for each kind of deadline, in the order in which they began. A
//! client is in at most one list. Held clients are kept here, too, oldest first.
//!
//! All deadlines of one kind have one length, so the first of a list is always the first to expire: no timer wheel and
//! no heap. The lists are linked through one array by key, so a connection leaves in constant time from any position
//! and no stale entry remains.

use std::{cell::Cell, time::Instant};

use crate::{
    connection::deadline::{DIALLED, Deadline, REJECTED, RELAYED, WAITING},
    stats::Counters,
};

/// Key of a connection in the worker's table.
pub(crate) type Key = u32;

/// Number of kinds of deadline, and so of lists.
const KINDS: usize = Deadline::Lingering as usize + 1;

/// Key that stands for none.
const NONE: Key = Key::MAX;

/// Lists of a worker's deadlines.
#[derive(Debug)]
pub(crate) struct Timers {
    /// Links by key.
    links: Vec<Option<Link>>,
    ends: [Ends; KINDS],
    /// Set if a list has changed since its numbers were last published.
    has_changed: Cell<bool>,
}

/// Neighbours of a connection in the list of its deadline.
#[derive(Debug, Clone, Copy)]
struct Link {
    deadline: Deadline,
    /// Beginning of the deadline's time.
    since: Instant,
    before: Key,
    behind: Key,
}

#[derive(Debug, Clone, Copy)]
struct Ends {
    first: Key,
    last: Key,
    len: u32,
}

impl Timers {
    /// Returns empty lists.
    pub(crate) fn new() -> Self {
        let ends = [Ends { first: NONE, last: NONE, len: 0 }; KINDS];
        Self { links: Vec::new(), ends, has_changed: Cell::new(true) }
    }

    /// Moves `key` to the list of `deadline`, sorted by `since`. New entries go to the tail; a returning client gets its
    /// old position.
    pub(crate) fn enqueue(&mut self, deadline: Deadline, key: Key, since: Instant) {
        self.remove(key);
        self.has_changed.set(true);
        if self.links.len() <= key as usize {
            self.links.resize(key as usize + 1, None);
        }
        let (mut before, mut behind) = (self.ends(deadline).last, NONE);
        while let Some(link) = self.link_mut(before).filter(|link| link.since > since) {
            (before, behind) = (link.before, before);
        }
        match self.link_mut(before) {
            Some(link) => link.behind = key,
            None => self.ends_mut(deadline).first = key,
        }
        match self.link_mut(behind) {
            Some(link) => link.before = key,
            None => self.ends_mut(deadline).last = key,
        }
        if let Some(link) = self.links.get_mut(key as usize) {
            *link = Some(Link { deadline, since, before, behind });
        }
        self.ends_mut(deadline).len += 1;
    }

    /// Removes `key` from its list, if it is in one.
    pub(crate) fn remove(&mut self, key: Key) {
        let Some(link) = self.links.get_mut(key as usize).and_then(Option::take) else { return };
        self.has_changed.set(true);
        match self.link_mut(link.before) {
            Some(before) => before.behind = link.behind,
            None => self.ends_mut(link.deadline).first = link.behind,
        }
        match self.link_mut(link.behind) {
            Some(behind) => behind.before = link.before,
            None => self.ends_mut(link.deadline).last = link.before,
        }
        self.ends_mut(link.deadline).len -= 1;
    }

    /// Gives memory back. No key from `end` on may be in use.
    pub(crate) fn forget_from(&mut self, end: Key) {
        let end = end as usize;
        if end < self.links.len() {
            self.links.truncate(end);
            if end < self.links.capacity() / 4 {
                self.links.shrink_to(end);
            }
        }
    }

    /// Returns the first key of a list, and the beginning of its deadline's time.
    pub(crate) fn first(&self, deadline: Deadline) -> Option<(Key, Instant)> {
        let key = self.ends(deadline).first;
        let link = self.links.get(key as usize)?.as_ref()?;
        Some((key, link.since))
    }

    /// Returns the list that `key` is in, and the beginning of its deadline's time.
    pub(crate) fn position(&self, key: Key) -> Option<(Deadline, Instant)> {
        let link = self.links.get(key as usize)?.as_ref()?;
        Some((link.deadline, link.since))
    }

    /// Returns the keys of a list, in its order.
    pub(crate) fn keys(&self, deadline: Deadline) -> impl Iterator<Item = Key> {
        let first = self.first(deadline).map(|(key, _since)| key);
        std::iter::successors(first, |&key| {
            let behind = self.links.get(key as usize)?.as_ref()?.behind;
            (behind != NONE).then_some(behind)
        })
    }

    /// Returns the length of a list.
    pub(crate) fn len(&self, deadline: Deadline) -> usize {
        self.ends(deadline).len as usize
    }

    /// Returns true once if a list has changed.
    pub(crate) fn take_change(&self) -> bool {
        self.has_changed.replace(false)
    }

    /// Copies the numbers of clients in each state to `counters`.
    pub(crate) fn publish(&self, counters: &Counters) {
        let len = |deadlines: &[Deadline]| {
            deadlines.iter().map(|&deadline| self.len(deadline) as u64).sum()
        };
        counters.held.set(len(&WAITING));
        counters.awaiting_upstream.set(len(&[Deadline::AwaitingUpstream]));
        counters.connecting.set(len(&DIALLED));
        counters.active.set(len(&RELAYED));
        counters.rejecting.set(len(&REJECTED));
    }

    fn link_mut(&mut self, key: Key) -> Option<&mut Link> {
        self.links.get_mut(key as usize)?.as_mut()
    }

    #[expect(
        clippy::indexing_slicing,
        reason = "there is one pair of ends for each kind of deadline"
    )]
    fn ends(&self, deadline: Deadline) -> &Ends {
        &self.ends[deadline as usize]
    }

    #[expect(
        clippy::indexing_slicing,
        reason = "there is one pair of ends for each kind of deadline"
    )]
    fn ends_mut(&mut self, deadline: Deadline) -> &mut Ends {
        &mut self.ends[deadline as usize]
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::connection::Connection;

    fn order(timers: &Timers, deadline: Deadline) -> Vec<Key> {
        let order: Vec<_> = timers.keys(deadline).collect();
        assert_eq!(order.len(), timers.len(deadline));
        order
    }

    #[test]
    fn a_list_keeps_its_order_when_keys_leave() {
        let (mut timers, now) = (Timers::new(), Instant::now());
        for key in [5, 0, 3, 9] {
            timers.enqueue(Deadline::Held, key, now);
        }
        assert_eq!(order(&timers, Deadline::Held), [5, 0, 3, 9]);
        timers.remove(0);
        assert_eq!(order(&timers, Deadline::Held), [5, 3, 9]);
        timers.remove(5);
        timers.remove(9);
        assert_eq!(order(&timers, Deadline::Held), [3]);
        timers.remove(9);
        timers.enqueue(Deadline::Held, 5, now);
        assert_eq!(order(&timers, Deadline::Held), [3, 5]);
    }

    #[test]
    fn a_returning_key_gets_its_old_position() {
        let (mut timers, now) = (Timers::new(), Instant::now());
        let at = |millis| now + Duration::from_millis(millis);
        for (key, since) in [(1, 1), (2, 2), (4, 4)] {
            timers.enqueue(Deadline::Held, key, at(since));
        }
        timers.enqueue(Deadline::Held, 3, at(2));
        assert_eq!(order(&timers, Deadline::Held), [1, 2, 3, 4]);
        timers.enqueue(Deadline::Held, 4, at(0));
        assert_eq!(order(&timers, Deadline::Held), [4, 1, 2, 3]);
        timers.remove(3);
        timers.enqueue(Deadline::Held, 5, at(9));
        assert_eq!(order(&timers, Deadline::Held), [4, 1, 2, 5]);
    }

    #[test]
    fn a_key_is_in_one_list_at_a_time() {
        let (mut timers, now) = (Timers::new(), Instant::now());
        timers.enqueue(Deadline::Held, 1, now);
        timers.enqueue(Deadline::Connecting, 1, now);
        timers.enqueue(Deadline::Connecting, 2, now);
        timers.enqueue(Deadline::Connecting, 1, now);
        assert!(order(&timers, Deadline::Held).is_empty());
        assert_eq!(order(&timers, Deadline::Connecting), [2, 1]);
        assert_eq!(timers.position(2), Some((Deadline::Connecting, now)));
        assert_eq!((timers.position(0), timers.position(9)), (None, None));
    }

    /// Holds the memory of a connection, which src/README.md's table of costs states.
    #[test]
    fn a_connection_is_small() {
        let (bytes, link) = (size_of::<Connection>(), size_of::<Option<Link>>());
        println!("a connection: {bytes} bytes, {link} in its list");
        assert!(bytes + link <= 312, "{bytes} bytes");
    }
}
