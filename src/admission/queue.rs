//! The line: who of those that wait is the next, over all workers, and how fast they go.
//!
//! Every worker has its own queue, and shows here when the first of it came. Whoever came before all others may go, so that
//! who is served first does not depend on which worker has accepted whom.

use std::{
    num::NonZeroU32,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use super::{
    pace::{Pace, UnderWay},
    semaphore::Semaphore,
};
use crate::{
    config::{ResumeConfig, duration::nanos},
    sys,
};

/// Shown where nobody waits.
const NONE: u64 = u64::MAX;

/// How far a worker that wakes late may catch up with the rate.
const LATENESS_MAX: Duration = Duration::from_millis(20);

/// The first of each worker's queue, and what bounds those who go.
#[derive(Debug)]
pub(crate) struct WaitQueue {
    begin: Instant,
    /// When the first of each worker came, in nanoseconds after `begin`.
    heads: Box<[AtomicU64]>,
    pace: Arc<Pace>,
    rate: Option<Rate>,
    /// How many may go in spite of the pause.
    bypasses_left: AtomicU64,
    /// When the last of those came.
    bypass_until: AtomicU64,
}

/// How many may go in a second.
#[derive(Debug)]
struct Rate {
    interval: Duration,
    /// When the next may go, in nanoseconds after the line's begin.
    next: AtomicU64,
}

impl WaitQueue {
    /// The line of so many workers.
    pub(crate) fn new(workers: usize, settings: &ResumeConfig) -> Self {
        let rate = |per_second: NonZeroU32| Rate {
            interval: Duration::from_secs(1) / per_second.get(),
            next: AtomicU64::new(0),
        };
        Self {
            begin: sys::now(),
            heads: (0..workers).map(|_| AtomicU64::new(NONE)).collect(),
            pace: Pace::new(settings.max_connecting.get()),
            rate: settings.rate.map(rate),
            bypasses_left: AtomicU64::new(0),
            bypass_until: AtomicU64::new(0),
        }
    }

    /// Shows when the first of a worker's queue came. Returns the worker whose turn it is now, if that is another.
    pub(crate) fn publish_head(&self, worker: usize, head: Option<Instant>) -> Option<usize> {
        let head = head.map_or(NONE, |at| self.nanos(at));
        let own = self.heads.get(worker)?;
        // The only writer: nothing is lost between the look and the swap.
        if own.load(Ordering::Relaxed) == head {
            return None;
        }
        // Both this worker and the one that waits for it show first and look then, so one of them sees the other.
        own.swap(head, Ordering::SeqCst);
        let heads = self.heads.iter().map(|head| head.load(Ordering::SeqCst)).enumerate();
        let (next, at) = heads.min_by_key(|&(_worker, at)| at)?;
        (next != worker && at != NONE).then_some(next)
    }

    /// Whether nobody else's first came before `at`.
    pub(crate) fn is_head(&self, worker: usize, at: Instant) -> bool {
        let at = self.nanos(at);
        let mut others = self.heads.iter().enumerate().filter(|&(other, _)| other != worker);
        others.all(|(_other, head)| at <= head.load(Ordering::SeqCst))
    }

    /// Whether a worker has shown that somebody waits.
    pub(crate) fn is_anyone_waiting(&self) -> bool {
        self.heads.iter().any(|head| head.load(Ordering::Relaxed) != NONE)
    }

    /// The places of those under way.
    pub(crate) fn under_way(&self) -> &Arc<Semaphore> {
        self.pace.window()
    }

    /// How fast those who wait go, but for the rate.
    pub(crate) fn pace(&self) -> &Arc<Pace> {
        &self.pace
    }

    /// When the rate lets the next one go; none if it does not matter.
    pub(crate) fn next_at(&self) -> Option<Instant> {
        let next = self.rate.as_ref()?.next.load(Ordering::Relaxed);
        Some(self.begin + Duration::from_nanos(next))
    }

    /// A place for the next one, if there is one and the rate lets it go.
    pub(crate) fn try_acquire(&self, now: Instant) -> Option<Box<UnderWay>> {
        let share = self.pace.take(now)?;
        let is_due = self.rate.as_ref().is_none_or(|rate| rate.take(self.nanos(now)));
        is_due.then_some(share)
    }

    /// Lets `count` more of those who have come until now go in spite of the pause.
    pub(crate) fn bypass(&self, count: u64, now: Instant) {
        if !self.is_bypass_pending() {
            // Whoever has not used what was given before has gone.
            self.end_bypass();
        }
        self.bypass_until.store(self.nanos(now), Ordering::SeqCst);
        self.bypasses_left.fetch_add(count, Ordering::SeqCst);
    }

    /// Whether somebody is still to go in spite of the pause.
    pub(crate) fn is_bypass_pending(&self) -> bool {
        let until = self.bypass_until.load(Ordering::SeqCst);
        let mut heads = self.heads.iter();
        self.bypasses_left.load(Ordering::SeqCst) > 0
            && heads.any(|head| head.load(Ordering::SeqCst) <= until)
    }

    /// Returns true if some may still go in spite of the pause, and nobody is left to do so.
    pub(crate) fn bypasses_in_vain(&self) -> bool {
        self.let_through.load(Ordering::SeqCst) > 0 && !self.is_letting_through()
    }

    /// Lets nobody through any more.
    pub(crate) fn end_bypass(&self) {
        self.bypasses_left.store(0, Ordering::SeqCst);
    }

    /// Whether one that came at `at` may go in spite of the pause.
    pub(crate) fn lets_bypass(&self, at: Instant) -> bool {
        self.bypasses_left.load(Ordering::SeqCst) > 0
            && self.nanos(at) <= self.bypass_until.load(Ordering::SeqCst)
    }

    /// Counts one that goes in spite of the pause, if it may.
    pub(crate) fn take_bypass(&self, at: Instant) -> bool {
        let less = |count: u64| count.checked_sub(1);
        self.lets_bypass(at)
            && self.bypasses_left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, less).is_ok()
    }

    fn nanos(&self, at: Instant) -> u64 {
        nanos(at.saturating_duration_since(self.begin)).min(NONE - 1)
    }
}

impl Rate {
    /// Counts one that goes at `now`, if it may.
    fn take(&self, now: u64) -> bool {
        let earliest = now.saturating_sub(nanos(LATENESS_MAX));
        let advance = |next: u64| {
            (next <= now).then(|| next.max(earliest).saturating_add(nanos(self.interval)))
        };
        self.next.fetch_update(Ordering::Relaxed, Ordering::Relaxed, advance).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queue(max_connecting: usize, rate: Option<u32>) -> (WaitQueue, Instant) {
        let queue = WaitQueue::new(
            2,
            &ResumeConfig {
                max_connecting: max_connecting.try_into().unwrap(),
                rate: rate.map(|rate| rate.try_into().unwrap()),
            },
        );
        let begin = queue.begin;
        (queue, begin)
    }

    #[test]
    fn whoever_came_first_goes_and_the_next_worker_is_named() {
        let (queue, begin) = queue(1, None);
        let [early, late] = [1, 2].map(|second| begin + Duration::from_secs(second));
        assert!(!queue.is_anyone_waiting());
        assert_eq!(queue.publish_head(0, Some(early)), None);
        assert_eq!(queue.publish_head(1, Some(late)), Some(0));
        assert!(queue.is_head(0, early) && !queue.is_head(1, late));
        assert_eq!(queue.publish_head(0, None), Some(1));
        assert_eq!(queue.publish_head(0, None), None, "nothing has changed");
        assert!(queue.is_head(1, late) && queue.is_anyone_waiting());
        assert_eq!(queue.publish_head(1, None), None);
        assert!(!queue.is_anyone_waiting());
    }

    #[test]
    fn only_so_many_are_under_way() {
        let (queue, begin) = queue(1, None);
        let share = queue.try_acquire(begin);
        assert!(share.is_some() && queue.try_acquire(begin).is_none());
        drop(share);
        assert!(queue.try_acquire(begin).is_some());
    }

    #[test]
    fn a_rate_lets_one_go_in_each_interval_and_catches_up_a_little() {
        let (queue, begin) = queue(100, Some(100));
        let at = |millis| begin + Duration::from_millis(millis);
        let go = |millis| queue.try_acquire(at(millis)).is_some();
        assert!(go(0) && !go(0) && !go(9) && go(10));
        assert_eq!(queue.next_at(), Some(at(20)));
        // Late by much: what is caught up with is bounded.
        let caught_up = (0..100).filter(|_| go(1000)).count();
        assert_eq!(caught_up, 3);
    }

    #[test]
    fn those_let_through_have_come_before() {
        let (queue, begin) = queue(1, None);
        let [early, late] = [1, 2].map(|second| begin + Duration::from_secs(second));
        assert!(!queue.take_bypass(early));
        queue.bypass(2, early);
        assert!(!queue.take_bypass(late), "it came after the order");
        assert!(queue.take_bypass(early) && queue.take_bypass(early) && !queue.take_bypass(early));
        queue.bypass(2, late);
        queue.end_bypass();
        assert!(!queue.take_bypass(early));
    }

    #[test]
    fn what_those_who_have_gone_leave_over_is_for_nobody() {
        let (queue, begin) = queue(1, None);
        let [early, late] = [1, 2].map(|second| begin + Duration::from_secs(second));
        queue.publish_head(0, Some(early));
        queue.bypass(2, early);
        queue.bypass(1, early);
        assert!(queue.take_bypass(early) && queue.take_bypass(early), "both orders count");
        queue.bypass(1, early);
        assert!(queue.is_bypass_pending());
        queue.publish_head(0, Some(late));
        assert!(!queue.is_bypass_pending());
        queue.bypass(1, late);
        assert!(queue.take_bypass(late) && !queue.take_bypass(late));
    }
}
