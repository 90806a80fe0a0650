//! Deadlines of a worker's connections: one list for each kind, in order of arrival. A connection is in at most one of
//! them.
//!
//! All deadlines of one kind have one length, so the first of a list is always the first to expire: no timer wheel and
//! no heap. The lists are linked through one array by key, so a connection leaves in constant time from any position
//! and no stale entry remains.

use std::time::Instant;

use crate::{connection::deadline::Deadline, stats::Counters, sys::KEEPALIVE_INTERVAL};

/// Key of a connection in the worker's table.
pub(crate) type Key = u32;

/// Number of kinds of deadline.
const KINDS: usize = Deadline::Lingering as usize + 1;

/// Key that stands for none.
const NONE: Key = Key::MAX;

/// All deadlines of a worker.
#[derive(Debug)]
pub(crate) struct Timers {
    links: Vec<Option<Link>>,
    ends: [Ends; KINDS],
}

#[derive(Debug, Clone, Copy)]
struct Link {
    queue: Deadline,
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
        Self { links: Vec::new(), ends: [Ends { first: NONE, last: NONE, len: 0 }; KINDS] }
    }

    /// Moves `slot` to the list of `queue`, sorted by `since`. New entries go to the tail; a returning client gets its
    /// old position.
    pub(crate) fn enqueue(&mut self, queue: Deadline, slot: Key, since: Instant) {
        self.remove(slot);
        if self.links.len() <= slot as usize {
            self.links.resize(slot as usize + 1, None);
        }
        let (mut before, mut behind) = (self.ends(queue).last, NONE);
        while let Some(link) = self.link_mut(before).filter(|link| link.since > since) {
            (before, behind) = (link.before, before);
        }
        match self.link_mut(before) {
            Some(link) => link.behind = slot,
            None => self.ends_mut(queue).first = slot,
        }
        match self.link_mut(behind) {
            Some(link) => link.before = slot,
            None => self.ends_mut(queue).last = slot,
        }
        if let Some(link) = self.links.get_mut(slot as usize) {
            *link = Some(Link { queue, since, before, behind });
        }
        self.ends_mut(queue).len += 1;
    }

    /// Removes `slot` from its list, if it is in one.
    pub(crate) fn remove(&mut self, slot: Key) {
        let Some(link) = self.links.get_mut(slot as usize).and_then(Option::take) else { return };
        match self.link_mut(link.before) {
            Some(before) => before.behind = link.behind,
            None => self.ends_mut(link.queue).first = link.behind,
        }
        match self.link_mut(link.behind) {
            Some(behind) => behind.before = link.before,
            None => self.ends_mut(link.queue).last = link.before,
        }
        self.ends_mut(link.queue).len -= 1;
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

    /// Returns the first entry of a list and its time.
    pub(crate) fn first(&self, queue: Deadline) -> Option<(Key, Instant)> {
        let slot = self.ends(queue).first;
        let link = self.links.get(slot as usize)?.as_ref()?;
        Some((slot, link.since))
    }

    /// Returns the length of a list.
    pub(crate) fn len(&self, queue: Deadline) -> usize {
        self.ends(queue).len as usize
    }

    /// Returns the beginning of the oldest relayed connection, to within a moment.
    pub(crate) fn oldest(&self) -> Option<Instant> {
        let since = |queue| Some(self.first(queue)?.1);
        // A connection enters this list one keepalive interval after its beginning.
        let relaying = since(Deadline::Relaying).and_then(|at| at.checked_sub(KEEPALIVE_INTERVAL));
        let others = [
            Deadline::NoKeepaliveYet,
            Deadline::AwaitingFirstByte,
            Deadline::AwaitingAcks,
            Deadline::Stalled,
        ];
        others.into_iter().filter_map(since).chain(relaying).min()
    }

    /// Copies the numbers of clients in each state to `counters`.
    pub(crate) fn publish(&self, counters: &Counters) {
        let len = |queues: &[Deadline]| queues.iter().map(|&queue| self.len(queue) as u64).sum();
        counters.held.set(len(&[Deadline::Held, Deadline::AwaitingUpstream]));
        counters.connecting.set(len(&[
            Deadline::Connecting,
            Deadline::ConnectingLast,
            Deadline::Unanswered,
        ]));
        counters.active.set(len(&[
            Deadline::AwaitingFirstByte,
            Deadline::NoKeepaliveYet,
            Deadline::Relaying,
            Deadline::AwaitingAcks,
            Deadline::Stalled,
        ]));
        counters.rejecting.set(len(&[
            Deadline::Sniffing,
            Deadline::AwaitingHandshake,
            Deadline::Handshaking,
            Deadline::AwaitingRequest,
            Deadline::Lingering,
        ]));
    }

    fn link_mut(&mut self, slot: Key) -> Option<&mut Link> {
        self.links.get_mut(slot as usize)?.as_mut()
    }

    #[expect(clippy::indexing_slicing, reason = "there is one pair of ends for each kind of queue")]
    fn ends(&self, queue: Deadline) -> &Ends {
        &self.ends[queue as usize]
    }

    #[expect(clippy::indexing_slicing, reason = "there is one pair of ends for each kind of queue")]
    fn ends_mut(&mut self, queue: Deadline) -> &mut Ends {
        &mut self.ends[queue as usize]
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::connection::Connection;

    fn order(queues: &Timers, queue: Deadline) -> Vec<Key> {
        let first = queues.first(queue).map(|(slot, _since)| slot);
        let behind = |&slot: &Key| {
            let behind = queues.links.get(slot as usize)?.as_ref()?.behind;
            (behind != NONE).then_some(behind)
        };
        let order: Vec<_> = std::iter::successors(first, behind).collect();
        assert_eq!(order.len(), queues.len(queue));
        order
    }

    #[test]
    fn a_queue_keeps_the_order_of_arrival_whoever_leaves() {
        let (mut queues, now) = (Timers::new(), Instant::now());
        for slot in [5, 0, 3, 9] {
            queues.enqueue(Deadline::Held, slot, now);
        }
        assert_eq!(order(&queues, Deadline::Held), [5, 0, 3, 9]);
        queues.remove(0);
        assert_eq!(order(&queues, Deadline::Held), [5, 3, 9]);
        queues.remove(5);
        queues.remove(9);
        assert_eq!(order(&queues, Deadline::Held), [3]);
        queues.remove(9);
        queues.enqueue(Deadline::Held, 5, now);
        assert_eq!(order(&queues, Deadline::Held), [3, 5]);
    }

    #[test]
    fn one_that_comes_back_stands_where_it_was() {
        let (mut queues, now) = (Timers::new(), Instant::now());
        let at = |millis| now + Duration::from_millis(millis);
        for (slot, since) in [(1, 1), (2, 2), (4, 4)] {
            queues.enqueue(Deadline::Held, slot, at(since));
        }
        queues.enqueue(Deadline::Held, 3, at(2));
        assert_eq!(order(&queues, Deadline::Held), [1, 2, 3, 4]);
        queues.enqueue(Deadline::Held, 4, at(0));
        assert_eq!(order(&queues, Deadline::Held), [4, 1, 2, 3]);
        queues.remove(3);
        queues.enqueue(Deadline::Held, 5, at(9));
        assert_eq!(order(&queues, Deadline::Held), [4, 1, 2, 5]);
    }

    #[test]
    fn a_slot_stands_in_one_queue_at_a_time() {
        let (mut queues, now) = (Timers::new(), Instant::now());
        queues.enqueue(Deadline::Held, 1, now);
        queues.enqueue(Deadline::Connecting, 1, now);
        queues.enqueue(Deadline::Connecting, 2, now);
        queues.enqueue(Deadline::Connecting, 1, now);
        assert!(order(&queues, Deadline::Held).is_empty());
        assert_eq!(order(&queues, Deadline::Connecting), [2, 1]);
    }

    /// The architecture's table of costs tells it: held, idle or busy, a connection has one place of this size.
    #[test]
    fn a_connection_is_small() {
        let (bytes, link) = (size_of::<Connection>(), size_of::<Option<Link>>());
        println!("a connection: {bytes} bytes, {link} in its list");
        assert!(bytes + link <= 256, "{bytes} bytes");
    }
}
