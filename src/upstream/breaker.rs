//! The circuit breaker: the knowledge of all workers about an upstream that is away, or that this host is too short of
//! something to dial.
//!
//! Clients whose attempt has failed wait, and may be thousands: a restart takes longer than a dial. As long as the upstream is
//! away one of them at a time tries it, and the first that gets through opens the way for all.

use std::{
    ops::RangeInclusive,
    sync::{
        Arc,
        atomic::{AtomicU8, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use crate::{
    admission::semaphore::{Permit, Semaphore},
    config::duration::nanos,
    sys,
};

/// State of the upstream, as far as attempts have told.
#[derive(Debug)]
pub(crate) struct CircuitBreaker {
    begin: Instant,
    /// The [`Cause`] of the outage, as a number; 0 without one.
    cause: AtomicU8,
    /// When it is tried next, in nanoseconds after `begin`.
    due: AtomicU64,
    /// How long after that once more, in nanoseconds.
    interval: AtomicU64,
    /// The right to try it, of which there is one.
    probe: Arc<Semaphore>,
}

/// Reason for which an attempt has failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cause {
    /// This host was short of something that may be free again at any moment, such as a place in a UNIX backlog.
    Shortage = 1,
    /// The upstream was not reached at any address.
    Away = 2,
}

impl Cause {
    /// Returns the time after the first failure until the upstream is tried again, and the longest; each further failure
    /// doubles it. A server that takes clients out of a small backlog makes room within a millisecond.
    fn intervals(self) -> RangeInclusive<Duration> {
        let (min, max) = match self {
            Self::Shortage => (1, 10),
            Self::Away => (10, 250),
        };
        Duration::from_millis(min)..=Duration::from_millis(max)
    }
}

impl CircuitBreaker {
    /// Returns the state of an upstream that is there, as far as is known.
    pub(crate) fn new() -> Self {
        Self {
            begin: sys::now(),
            cause: AtomicU8::new(0),
            due: AtomicU64::new(0),
            interval: AtomicU64::new(0),
            probe: Arc::new(Semaphore::new(1)),
        }
    }

    /// Returns true if the last attempt to end has failed: then only the client that probes dials.
    pub(crate) fn is_open(&self) -> bool {
        self.cause.load(Ordering::Acquire) > 0
    }

    /// Returns true if that is because the upstream is away. Clients that have not tried yet then lose their patience too.
    pub(crate) fn is_away(&self) -> bool {
        self.cause.load(Ordering::Acquire) == Cause::Away as u8
    }

    /// Learns that an attempt has failed: one that has probed, or one of those begun before the outage. Those tell nothing
    /// new.
    pub(crate) fn failed(&self, cause: Cause, was_probe: bool, now: Instant) {
        let interval = match (self.is_open(), was_probe) {
            (false, _) => *cause.intervals().start(),
            (true, true) => {
                let last = Duration::from_nanos(self.interval.load(Ordering::Relaxed));
                let (min, max) = cause.intervals().into_inner();
                (2 * last).clamp(min, max)
            }
            (true, false) => return,
        };
        self.interval.store(nanos(interval), Ordering::Relaxed);
        self.due
            .store(nanos(now.saturating_duration_since(self.begin) + interval), Ordering::Relaxed);
        // A shortage tells nothing new about an upstream that is away.
        self.cause.fetch_max(cause as u8, Ordering::AcqRel);
    }

    /// Learns that an attempt has got through. Returns true if that ends an outage: then the clients that wait are to be told.
    pub(crate) fn succeeded(&self) -> bool {
        self.is_open() && self.cause.swap(0, Ordering::AcqRel) > 0
    }

    /// Learns that the upstream has just taken a client out of its backlog: a shortage may be over.
    pub(crate) fn made_room(&self, now: Instant) {
        if self.cause.load(Ordering::Relaxed) == Cause::Shortage as u8 {
            self.due.fetch_min(nanos(now.saturating_duration_since(self.begin)), Ordering::Relaxed);
        }
    }

    /// Returns the time of the next probe; none while a probe is under way, whose end is told like a free permit, and none
    /// without an outage.
    pub(crate) fn probe_at(&self) -> Option<Instant> {
        let at = || self.begin + Duration::from_nanos(self.due.load(Ordering::Relaxed));
        (self.is_open() && self.probe.is_any_free_or_wish()).then(at)
    }

    /// Takes the permit to probe, if it is free.
    pub(crate) fn take_probe(&self) -> Option<Permit> {
        self.probe.take()
    }

    /// Returns true once if a worker waits for the permit to probe and it is free.
    pub(crate) fn take_wanted(&self) -> bool {
        self.probe.take_wanted()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_at_a_time_tries_ever_less_often_until_one_gets_through() {
        let breaker = CircuitBreaker::new();
        let begin = breaker.begin;
        let at = |millis| begin + Duration::from_millis(millis);
        assert!(!breaker.is_open() && breaker.probe_at().is_none() && !breaker.succeeded());
        breaker.failed(Cause::Away, false, at(100));
        assert!(breaker.is_open());
        assert_eq!(breaker.probe_at(), Some(at(110)));
        breaker.failed(Cause::Away, false, at(105));
        assert_eq!(breaker.probe_at(), Some(at(110)), "one that was under way tells nothing new");
        let mut now = 110;
        for interval in [20, 40, 80, 160, 250, 250] {
            let probe = breaker.take_probe();
            assert!(probe.is_some() && breaker.probe_at().is_none() && !breaker.take_wanted());
            breaker.failed(Cause::Away, true, at(now));
            drop(probe);
            assert!(breaker.take_wanted(), "who asked meanwhile is told");
            now += interval;
            assert_eq!(breaker.probe_at(), Some(at(now)));
        }
        assert!(breaker.succeeded() && !breaker.succeeded());
        breaker.failed(Cause::Away, false, at(now));
        assert_eq!(breaker.probe_at(), Some(at(now + 10)), "another outage begins anew");
    }

    #[test]
    fn where_this_host_is_short_of_something_it_is_tried_again_soon() {
        let breaker = CircuitBreaker::new();
        let begin = breaker.begin;
        let at = |millis| begin + Duration::from_millis(millis);
        for (now, interval) in [(100, 1), (101, 2), (103, 4), (107, 8), (115, 10), (125, 10)] {
            breaker.failed(Cause::Shortage, now > 100, at(now));
            assert_eq!(breaker.probe_at(), Some(at(now + interval)));
            assert!(breaker.is_open() && !breaker.is_away());
        }
        breaker.made_room(at(130));
        assert_eq!(breaker.probe_at(), Some(at(130)), "a place in the backlog has become free");
        breaker.failed(Cause::Away, true, at(130));
        breaker.made_room(at(131));
        assert_eq!(breaker.probe_at(), Some(at(150)), "that says nothing of one that is away");
        breaker.failed(Cause::Shortage, true, at(150));
        assert!(breaker.is_away() && breaker.succeeded() && !breaker.is_away());
    }
}
