//! The outage: what all workers know of an upstream that is away, and who of their clients tries it.
//!
//! Clients whose dial has failed wait, and may be thousands: a restart takes longer than a dial. As long as the upstream is
//! away one of them at a time tries it, and whoever gets through opens the way for all.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use crate::{
    admission::semaphore::{Permit, Semaphore},
    config::duration::nanos,
    sys,
};

/// How long after the first failure it is tried again; twice as long after each further one.
const PROBE_INTERVAL_MIN: Duration = Duration::from_millis(10);
/// The longest time between two tries.
const PROBE_INTERVAL_MAX: Duration = Duration::from_millis(250);

/// Whether the upstream is away.
#[derive(Debug)]
pub(crate) struct CircuitBreaker {
    begin: Instant,
    is_on: AtomicBool,
    /// When it is tried next, in nanoseconds after `begin`.
    due: AtomicU64,
    /// How long after that once more, in nanoseconds.
    interval: AtomicU64,
    /// The right to try it, of which there is one.
    probe: Arc<Semaphore>,
}

impl CircuitBreaker {
    /// None, as far as is known.
    pub(crate) fn new() -> Self {
        Self {
            begin: sys::now(),
            is_on: AtomicBool::new(false),
            due: AtomicU64::new(0),
            interval: AtomicU64::new(0),
            probe: Arc::new(Semaphore::new(1)),
        }
    }

    /// Whether the last dial to end has failed: then nobody dials but who probes.
    pub(crate) fn is_on(&self) -> bool {
        self.is_on.load(Ordering::Acquire)
    }

    /// A dial has failed at all addresses: one by which it was probed, or one of those begun before the outage.
    pub(crate) fn failed(&self, was_probe: bool, now: Instant) {
        let interval = if !self.is_on() {
            PROBE_INTERVAL_MIN
        } else if was_probe {
            let last = Duration::from_nanos(self.interval.load(Ordering::Relaxed));
            (2 * last).clamp(PROBE_INTERVAL_MIN, PROBE_INTERVAL_MAX)
        } else {
            return;
        };
        self.interval.store(nanos(interval), Ordering::Relaxed);
        self.due
            .store(nanos(now.saturating_duration_since(self.begin) + interval), Ordering::Relaxed);
        self.is_on.store(true, Ordering::Release);
    }

    /// A dial has got through. Returns whether that ends an outage: then those who wait are to be told.
    pub(crate) fn succeeded(&self) -> bool {
        self.is_on() && self.is_on.swap(false, Ordering::AcqRel)
    }

    /// When one of those who wait may try, unless one does; otherwise the end of its try is told like a free slot.
    pub(crate) fn probe_at(&self) -> Option<Instant> {
        let at = || self.begin + Duration::from_nanos(self.due.load(Ordering::Relaxed));
        (self.is_on() && self.probe.is_any_free_or_wish()).then(at)
    }

    /// The right to try it.
    pub(crate) fn take_probe(&self) -> Option<Permit> {
        self.probe.take()
    }

    /// Whether somebody waits for the right to try it and it is free, once.
    pub(crate) fn take_wanted(&self) -> bool {
        self.probe.take_wanted()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_at_a_time_tries_ever_less_often_until_one_gets_through() {
        let outage = CircuitBreaker::new();
        let begin = outage.begin;
        let at = |millis| begin + Duration::from_millis(millis);
        assert!(!outage.is_on() && outage.probe_at().is_none() && !outage.succeeded());
        outage.failed(false, at(100));
        assert!(outage.is_on());
        assert_eq!(outage.probe_at(), Some(at(110)));
        outage.failed(false, at(105));
        assert_eq!(outage.probe_at(), Some(at(110)), "one that was under way tells nothing new");
        let mut now = 110;
        for interval in [20, 40, 80, 160, 250, 250] {
            let probe = outage.take_probe();
            assert!(probe.is_some() && outage.probe_at().is_none() && !outage.take_wanted());
            outage.failed(true, at(now));
            drop(probe);
            assert!(outage.take_wanted(), "who asked meanwhile is told");
            now += interval;
            assert_eq!(outage.probe_at(), Some(at(now)));
        }
        assert!(outage.succeeded() && !outage.succeeded());
        outage.failed(false, at(now));
        assert_eq!(outage.probe_at(), Some(at(now + 10)), "another outage begins anew");
    }
}
