//! The queue of waiting clients over all workers, and the rate at which they start.
//!
//! Every worker keeps its own waiting clients, and publishes here the arrival of its head, the client that came first.
//! Only the earliest of all heads may start, so the order does not depend on the workers that accepted the clients. No
//! client is kept here: they stand in `worker/timers.rs`.

use std::{
    num::NonZeroU32,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

use super::{
    pace::{Pace, UnderWay},
    semaphore::Semaphore,
};
use crate::{
    config::{ResumeConfig, duration::nanos},
    handover::parcel::{Incoming, Moment, Outgoing},
};

/// Published by a worker without waiting clients.
const NONE: u64 = u64::MAX;

/// Lateness that a worker may make up for by starting clients faster than the rate.
const LATENESS_MAX: Duration = Duration::from_millis(20);

/// Heads of the workers' queues, and the bounds of clients that start.
#[derive(Debug)]
pub(crate) struct WaitQueue {
    /// Start of the proxy, before which no client came.
    begin: Instant,
    /// Arrival of each worker's head, in nanoseconds after `begin`.
    heads: Box<[AtomicU64]>,
    pace: Arc<Pace>,
    rate: Option<Rate>,
    /// Number of clients that may still bypass the pause.
    bypasses_left: AtomicU64,
    /// Latest arrival of a client that may bypass the pause, in nanoseconds after `begin`.
    bypass_until: AtomicU64,
}

/// Limit of starts by time (`resume.rate`).
#[derive(Debug)]
struct Rate {
    /// Time between two starts.
    interval: Duration,
    /// Time of the next start, in nanoseconds after the queue's `begin`.
    next: AtomicU64,
}

/// State of the queue in a hand-over. The heads follow from the clients that wait.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct QueueWords {
    bypasses_left: u64,
    bypass_until: Moment,
    /// Time of the next start; none without a rate.
    next: Option<Moment>,
}

/// Change of a worker's head.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct HeadChange {
    /// Worker that has the earliest head now, if that is another one: it must be woken.
    pub(crate) wake: Option<usize>,
}

impl WaitQueue {
    /// Returns an empty queue for `workers` workers of a proxy that started at `begin`.
    pub(crate) fn new(workers: usize, settings: &ResumeConfig, begin: Instant) -> Self {
        let rate = |per_second: NonZeroU32| Rate {
            interval: Duration::from_secs(1) / per_second.get(),
            next: AtomicU64::new(0),
        };
        Self {
            begin,
            heads: (0..workers).map(|_| AtomicU64::new(NONE)).collect(),
            pace: Pace::new(settings.max_connecting.get(), begin),
            rate: settings.rate.map(rate),
            bypasses_left: AtomicU64::new(0),
            bypass_until: AtomicU64::new(0),
        }
    }

    /// Publishes the arrival of a worker's head. Returns none if it is the same as before.
    pub(crate) fn publish_head(&self, worker: usize, head: Option<Instant>) -> Option<HeadChange> {
        let head = head.map_or(NONE, |at| self.nanos(at));
        let own = self.heads.get(worker)?;
        // Only this worker writes the entry, so it cannot change between load and swap.
        if own.load(Ordering::Relaxed) == head {
            return None;
        }
        // Each worker publishes first and looks at the others then. So of two that do both at once, one sees the other.
        own.swap(head, Ordering::SeqCst);
        let heads = self.heads.iter().map(|head| head.load(Ordering::SeqCst)).enumerate();
        let (next, at) = heads.min_by_key(|&(_worker, at)| at)?;
        Some(HeadChange { wake: (next != worker && at != NONE).then_some(next) })
    }

    /// Returns true if no other worker's head came before `at`.
    pub(crate) fn is_head(&self, worker: usize, at: Instant) -> bool {
        let at = self.nanos(at);
        let mut others = self.heads.iter().enumerate().filter(|&(other, _)| other != worker);
        others.all(|(_other, head)| at <= head.load(Ordering::SeqCst))
    }

    /// Returns true if any worker has published a waiting client.
    pub(crate) fn is_anyone_waiting(&self) -> bool {
        self.heads.iter().any(|head| head.load(Ordering::Relaxed) != NONE)
    }

    /// Returns the window of clients under way.
    pub(crate) fn under_way(&self) -> &Arc<Semaphore> {
        self.pace.window()
    }

    /// Returns the pace of waiting clients, which the rate bounds further.
    pub(crate) fn pace(&self) -> &Arc<Pace> {
        &self.pace
    }

    /// Returns the time from which the rate allows the next start; none without a rate.
    pub(crate) fn next_at(&self) -> Option<Instant> {
        let next = self.rate.as_ref()?.next.load(Ordering::Relaxed);
        Some(self.begin + Duration::from_nanos(next))
    }

    /// Takes a share of the window for the next client, if one is free and the rate allows a start.
    pub(crate) fn try_acquire(&self, now: Instant) -> Option<Box<UnderWay>> {
        let share = self.pace.take(now)?;
        let is_due = self.rate.as_ref().is_none_or(|rate| rate.take(self.nanos(now)));
        is_due.then_some(share)
    }

    /// Lets `count` more of the clients that have come until `now` bypass the pause.
    pub(crate) fn bypass(&self, count: u64, now: Instant) {
        if !self.is_bypass_pending() {
            // The clients that earlier bypasses were meant for have gone.
            self.end_bypass();
        }
        self.bypass_until.store(self.nanos(now), Ordering::SeqCst);
        self.bypasses_left.fetch_add(count, Ordering::SeqCst);
    }

    /// Returns true while a client that may bypass the pause still waits.
    pub(crate) fn is_bypass_pending(&self) -> bool {
        let until = self.bypass_until.load(Ordering::SeqCst);
        let mut heads = self.heads.iter();
        self.bypasses_left.load(Ordering::SeqCst) > 0
            && heads.any(|head| head.load(Ordering::SeqCst) <= until)
    }

    /// Returns true if bypasses are left, and no client that may use them.
    pub(crate) fn has_vain_bypass(&self) -> bool {
        self.bypasses_left.load(Ordering::SeqCst) > 0 && !self.is_bypass_pending()
    }

    /// Withdraws all unused bypasses.
    pub(crate) fn end_bypass(&self) {
        self.bypasses_left.store(0, Ordering::SeqCst);
    }

    /// Returns true if a client that came at `at` may bypass the pause.
    pub(crate) fn lets_bypass(&self, at: Instant) -> bool {
        self.bypasses_left.load(Ordering::SeqCst) > 0
            && self.nanos(at) <= self.bypass_until.load(Ordering::SeqCst)
    }

    /// Uses up a bypass for a client that came at `at`. Returns false if it may not bypass the pause.
    pub(crate) fn take_bypass(&self, at: Instant) -> bool {
        let less = |count: u64| count.checked_sub(1);
        self.lets_bypass(at)
            && self.bypasses_left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, less).is_ok()
    }

    /// Describes the queue for a hand-over.
    pub(crate) fn describe(&self, parcel: &Outgoing<'_>) -> QueueWords {
        let Self { begin: _, heads: _, pace: _, rate: _, bypasses_left, bypass_until } = self;
        let until = Duration::from_nanos(bypass_until.load(Ordering::SeqCst));
        QueueWords {
            bypasses_left: bypasses_left.load(Ordering::SeqCst),
            bypass_until: parcel.moment(self.begin + until),
            next: self.next_at().map(|next| parcel.moment(next)),
        }
    }

    /// Takes over a queue that was described. A rate that the present configuration lacks is dropped.
    pub(crate) fn restore(&self, words: &QueueWords, parcel: &Incoming) {
        let QueueWords { bypasses_left, bypass_until, next } = *words;
        let nanos = |moment| self.nanos(parcel.instant(moment));
        self.bypass_until.store(nanos(bypass_until), Ordering::SeqCst);
        self.bypasses_left.store(bypasses_left, Ordering::SeqCst);
        if let (Some(rate), Some(next)) = (&self.rate, next) {
            rate.next.store(nanos(next), Ordering::Relaxed);
        }
    }

    fn nanos(&self, at: Instant) -> u64 {
        nanos(at.saturating_duration_since(self.begin)).min(NONE - 1)
    }
}

impl Rate {
    /// Uses up a start at `now`. Returns false if the rate does not allow one yet.
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
            Instant::now(),
        );
        let begin = queue.begin;
        (queue, begin)
    }

    #[test]
    fn the_earliest_head_starts_and_the_next_worker_is_named() {
        let (queue, begin) = queue(1, None);
        let [early, late] = [1, 2].map(|second| begin + Duration::from_secs(second));
        assert!(!queue.is_anyone_waiting());
        assert_eq!(queue.publish_head(0, Some(early)), Some(HeadChange { wake: None }));
        assert_eq!(queue.publish_head(1, Some(late)), Some(HeadChange { wake: Some(0) }));
        assert!(queue.is_head(0, early) && !queue.is_head(1, late));
        assert_eq!(queue.publish_head(0, None), Some(HeadChange { wake: Some(1) }));
        assert_eq!(queue.publish_head(0, None), None, "nothing has changed");
        assert!(queue.is_head(1, late) && queue.is_anyone_waiting());
        assert_eq!(queue.publish_head(1, None), Some(HeadChange { wake: None }));
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
        // Even a worker that is late by far starts only a few at once.
        let caught_up = (0..100).filter(|_| go(1000)).count();
        assert_eq!(caught_up, 3);
    }

    #[test]
    fn only_clients_that_came_before_the_order_bypass() {
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
    fn bypasses_and_rate_are_handed_over() {
        let (giver, begin) = queue(1, Some(10));
        let [early, late] = [1, 2].map(|second| begin + Duration::from_secs(second));
        giver.bypass(3, early);
        assert!(giver.take_bypass(early) && giver.try_acquire(early).is_some());
        let words = giver.describe(&Outgoing::new(late));
        // The taker's clock is another one.
        let shift = Duration::from_secs(1_000);
        let incoming = Incoming::new(late + shift, Vec::new(), Vec::new());
        let settings = ResumeConfig { rate: NonZeroU32::new(10), ..ResumeConfig::default() };
        let taker = WaitQueue::new(3, &settings, begin + shift);
        let text = serde_json::to_string(&words).unwrap();
        taker.restore(&serde_json::from_str(&text).unwrap(), &incoming);
        assert_eq!(taker.describe(&Outgoing::new(late + shift)), words);
        let [early, late] = [early, late].map(|at| at + shift);
        assert_eq!(taker.next_at(), giver.next_at().map(|next| next + shift));
        assert!(!taker.take_bypass(late) && taker.take_bypass(early) && taker.take_bypass(early));
        assert!(!taker.take_bypass(early));
    }

    #[test]
    fn bypasses_of_clients_that_have_gone_expire() {
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
