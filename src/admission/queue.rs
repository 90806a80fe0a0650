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
const NOBODY: u64 = u64::MAX;

/// How far a worker that wakes late may catch up with the rate.
const LATENESS_MAX: Duration = Duration::from_millis(20);

/// The first of each worker's queue, and what bounds those who go.
#[derive(Debug)]
pub(crate) struct WaitQueue {
    begin: Instant,
    /// When the first of each worker came, in nanoseconds after `begin`.
    firsts: Box<[AtomicU64]>,
    pace: Arc<Pace>,
    rate: Option<Rate>,
    /// How many may go in spite of the pause.
    let_through: AtomicU64,
    /// When the last of those came.
    let_through_until: AtomicU64,
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
            firsts: (0..workers).map(|_| AtomicU64::new(NOBODY)).collect(),
            pace: Pace::new(settings.max_connecting.get()),
            rate: settings.rate.map(rate),
            let_through: AtomicU64::new(0),
            let_through_until: AtomicU64::new(0),
        }
    }

    /// Shows when the first of a worker's queue came. Returns none if that is as before, or else the worker whose turn it is
    /// now, if that is another.
    pub(crate) fn publish_head(
        &self,
        worker: usize,
        first: Option<Instant>,
    ) -> Option<Option<usize>> {
        let first = first.map_or(NOBODY, |at| self.nanos(at));
        let shown = self.firsts.get(worker)?;
        // The only writer: nothing is lost between the look and the swap.
        if shown.load(Ordering::Relaxed) == first {
            return None;
        }
        // Both this worker and the one that waits for it show first and look then, so one of them sees the other.
        shown.swap(first, Ordering::SeqCst);
        let firsts = self.firsts.iter().map(|first| first.load(Ordering::SeqCst)).enumerate();
        let (next, at) = firsts.min_by_key(|&(_worker, at)| at)?;
        Some((next != worker && at != NOBODY).then_some(next))
    }

    /// Whether nobody else's first came before `at`.
    pub(crate) fn is_head(&self, worker: usize, at: Instant) -> bool {
        let at = self.nanos(at);
        let mut others = self.firsts.iter().enumerate().filter(|&(other, _)| other != worker);
        others.all(|(_other, first)| at <= first.load(Ordering::SeqCst))
    }

    /// Whether a worker has shown that somebody waits.
    pub(crate) fn is_anyone_there(&self) -> bool {
        self.firsts.iter().any(|first| first.load(Ordering::Relaxed) != NOBODY)
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
        let place = self.pace.take(now)?;
        let is_due = self.rate.as_ref().is_none_or(|rate| rate.take(self.nanos(now)));
        is_due.then_some(place)
    }

    /// Lets `count` more of those who have come until now go in spite of the pause.
    pub(crate) fn bypass(&self, count: u64, now: Instant) {
        if !self.is_letting_through() {
            // Whoever has not used what was given before has gone.
            self.end_bypass();
        }
        self.let_through_until.store(self.nanos(now), Ordering::SeqCst);
        self.let_through.fetch_add(count, Ordering::SeqCst);
    }

    /// Whether somebody is still to go in spite of the pause.
    pub(crate) fn is_letting_through(&self) -> bool {
        let until = self.let_through_until.load(Ordering::SeqCst);
        let mut firsts = self.firsts.iter();
        self.let_through.load(Ordering::SeqCst) > 0
            && firsts.any(|first| first.load(Ordering::SeqCst) <= until)
    }

    /// Returns true if some may still go in spite of the pause, and nobody is left to do so.
    pub(crate) fn bypasses_in_vain(&self) -> bool {
        self.let_through.load(Ordering::SeqCst) > 0 && !self.is_letting_through()
    }

    /// Lets nobody through any more.
    pub(crate) fn end_bypass(&self) {
        self.let_through.store(0, Ordering::SeqCst);
    }

    /// Whether one that came at `at` may go in spite of the pause.
    pub(crate) fn lets_bypass(&self, at: Instant) -> bool {
        self.let_through.load(Ordering::SeqCst) > 0
            && self.nanos(at) <= self.let_through_until.load(Ordering::SeqCst)
    }

    /// Counts one that goes in spite of the pause, if it may.
    pub(crate) fn take_bypass(&self, at: Instant) -> bool {
        let less = |count: u64| count.checked_sub(1);
        self.lets_bypass(at)
            && self.let_through.fetch_update(Ordering::SeqCst, Ordering::SeqCst, less).is_ok()
    }

    fn nanos(&self, at: Instant) -> u64 {
        nanos(at.saturating_duration_since(self.begin)).min(NOBODY - 1)
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

    fn line(max_connecting: usize, rate: Option<u32>) -> (WaitQueue, Instant) {
        let line = WaitQueue::new(
            2,
            &ResumeConfig {
                max_connecting: max_connecting.try_into().unwrap(),
                rate: rate.map(|rate| rate.try_into().unwrap()),
            },
        );
        let begin = line.begin;
        (line, begin)
    }

    #[test]
    fn whoever_came_first_goes_and_the_next_worker_is_named() {
        let (line, begin) = line(1, None);
        let [early, late] = [1, 2].map(|second| begin + Duration::from_secs(second));
        assert!(!line.is_anyone_there());
        assert_eq!(line.publish_head(0, Some(early)), Some(None));
        assert_eq!(line.publish_head(1, Some(late)), Some(Some(0)));
        assert!(line.is_head(0, early) && !line.is_head(1, late));
        assert_eq!(line.publish_head(0, None), Some(Some(1)));
        assert_eq!(line.publish_head(0, None), None, "nothing has changed");
        assert!(line.is_head(1, late) && line.is_anyone_there());
        assert_eq!(line.publish_head(1, None), Some(None));
        assert!(!line.is_anyone_there());
    }

    #[test]
    fn only_so_many_are_under_way() {
        let (line, begin) = line(1, None);
        let place = line.try_acquire(begin);
        assert!(place.is_some() && line.try_acquire(begin).is_none());
        drop(place);
        assert!(line.try_acquire(begin).is_some());
    }

    #[test]
    fn a_rate_lets_one_go_in_each_interval_and_catches_up_a_little() {
        let (line, begin) = line(100, Some(100));
        let at = |millis| begin + Duration::from_millis(millis);
        let go = |millis| line.try_acquire(at(millis)).is_some();
        assert!(go(0) && !go(0) && !go(9) && go(10));
        assert_eq!(line.next_at(), Some(at(20)));
        // Late by much: what is caught up with is bounded.
        let caught_up = (0..100).filter(|_| go(1000)).count();
        assert_eq!(caught_up, 3);
    }

    #[test]
    fn those_let_through_have_come_before() {
        let (line, begin) = line(1, None);
        let [early, late] = [1, 2].map(|second| begin + Duration::from_secs(second));
        assert!(!line.take_bypass(early));
        line.bypass(2, early);
        assert!(!line.take_bypass(late), "it came after the order");
        assert!(line.take_bypass(early) && line.take_bypass(early) && !line.take_bypass(early));
        line.bypass(2, late);
        line.end_bypass();
        assert!(!line.take_bypass(early));
    }

    #[test]
    fn what_those_who_have_gone_leave_over_is_for_nobody() {
        let (line, begin) = line(1, None);
        let [early, late] = [1, 2].map(|second| begin + Duration::from_secs(second));
        line.publish_head(0, Some(early));
        line.bypass(2, early);
        line.bypass(1, early);
        assert!(line.take_bypass(early) && line.take_bypass(early), "both orders count");
        line.bypass(1, early);
        assert!(line.is_letting_through());
        line.publish_head(0, Some(late));
        assert!(!line.is_letting_through());
        line.bypass(1, late);
        assert!(line.take_bypass(late) && !line.take_bypass(late));
    }
}
