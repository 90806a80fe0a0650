//! The circuit breaker: open while the upstream is away, or while this host is too short of something to dial it. All
//! workers share it.
//!
//! As usual for circuit breakers, *closed* lets all clients dial, and *open* makes them wait. During an upstream's
//! restart thousands may wait. Of these only one at a time dials, as a probe, and its success closes the breaker.

use std::{
    ops::RangeInclusive,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU8, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

use crate::{
    admission::semaphore::{Permit, Semaphore},
    config::duration::nanos,
    handover::parcel::{Incoming, Moment, Outgoing},
    sys,
    timestamp::Rfc3339,
};

/// State of the upstream by the results of attempts.
#[derive(Debug)]
pub(crate) struct CircuitBreaker {
    /// Start of the proxy.
    begin: Instant,
    /// The [`Cause`] as a number while the breaker is open; 0 while it is closed.
    cause: AtomicU8,
    /// Time at which the breaker last opened, in nanoseconds after `begin`.
    opened: AtomicU64,
    /// Time of the next probe, in nanoseconds after `begin`.
    due: AtomicU64,
    /// Time from the last failure to that probe, in nanoseconds.
    interval: AtomicU64,
    /// Time of day at which the upstream was first reached, went away or came back, in milliseconds after 1970; 0 before.
    changed: AtomicU64,
    /// Length of an outage that has ended and was not told yet, in nanoseconds; 0 for none.
    last_outage: AtomicU64,
    /// Length of all outages that have ended, in nanoseconds.
    outages: AtomicU64,
    /// Longest time that was told as the length of all outages, in nanoseconds.
    told: AtomicU64,
    /// The permit to probe the present upstream.
    probe: Mutex<Arc<Semaphore>>,
}

/// Reason for the failure of an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Cause {
    /// This host was short of something that may be free again at any moment, such as room in a UNIX backlog.
    Shortage = 1,
    /// The upstream was not reached at any address.
    Away = 2,
}

/// State of the breaker in a hand-over. A probe that is under way travels with its client.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct BreakerWords {
    /// None while the breaker is closed.
    cause: Option<Cause>,
    opened: Moment,
    due: Moment,
    interval: Duration,
    /// In milliseconds after 1970.
    changed: u64,
    last_outage: Duration,
    outages: Duration,
    told: Duration,
}

impl Cause {
    /// Returns the shortest and the longest time from a failure to the next probe. It starts with the shortest, and doubles
    /// with each failed probe. A server that takes clients out of a small backlog makes room within a millisecond.
    fn intervals(self) -> RangeInclusive<Duration> {
        let (min, max) = match self {
            Self::Shortage => (1, 10),
            Self::Away => (10, 250),
        };
        Duration::from_millis(min)..=Duration::from_millis(max)
    }
}

impl CircuitBreaker {
    /// Returns a closed breaker of a proxy that started at `begin`, with the permit to probe its upstream.
    pub(super) fn new(begin: Instant, probe: &Arc<Semaphore>) -> Self {
        Self {
            begin,
            cause: AtomicU8::new(0),
            opened: AtomicU64::new(0),
            due: AtomicU64::new(0),
            interval: AtomicU64::new(0),
            changed: AtomicU64::new(0),
            last_outage: AtomicU64::new(0),
            outages: AtomicU64::new(0),
            told: AtomicU64::new(0),
            probe: Mutex::new(Arc::clone(probe)),
        }
    }

    /// Returns true while the breaker is open: only a probe may dial.
    pub(crate) fn is_open(&self) -> bool {
        self.cause.load(Ordering::Acquire) > 0
    }

    /// Returns true while the breaker is open because the upstream is away. Then the patience of clients begins that have
    /// made no attempt, too.
    pub(crate) fn is_away(&self) -> bool {
        self.cause.load(Ordering::Acquire) == Cause::Away as u8
    }

    /// Returns the moment from which the patience of a client runs that waits for the upstream since `since`. None while
    /// the breaker is closed: a client that then waits for others loses no patience.
    pub(crate) fn patience_since(&self, since: Instant) -> Option<Instant> {
        let opened = || self.begin + Duration::from_nanos(self.opened.load(Ordering::Relaxed));
        self.is_open().then(|| since.max(opened()))
    }

    /// Opens the breaker after a failed attempt, or delays the next probe if the attempt `was_probe`. An attempt that began
    /// before the breaker opened, and so is no probe, changes nothing.
    pub(crate) fn failed(&self, cause: Cause, was_probe: bool, now: Instant) {
        let elapsed = now.saturating_duration_since(self.begin);
        let interval = match (self.is_open(), was_probe) {
            (false, _) => {
                self.opened.store(nanos(elapsed), Ordering::Relaxed);
                *cause.intervals().start()
            }
            (true, true) => {
                let last = Duration::from_nanos(self.interval.load(Ordering::Relaxed));
                let (min, max) = cause.intervals().into_inner();
                (2 * last).clamp(min, max)
            }
            (true, false) => return,
        };
        self.interval.store(nanos(interval), Ordering::Relaxed);
        self.due.store(nanos(elapsed + interval), Ordering::Relaxed);
        // The maximum: a shortage does not show that an upstream that was away is back.
        let was = self.cause.fetch_max(cause as u8, Ordering::AcqRel);
        if cause == Cause::Away && was != cause as u8 {
            self.changed.store(Rfc3339::now().unix_millis(), Ordering::Relaxed);
        }
    }

    /// Closes the breaker after a successful attempt. Returns true if it was open: then all workers are to be woken, as
    /// their clients wait.
    pub(crate) fn succeeded(&self) -> bool {
        if self.changed.load(Ordering::Relaxed) == 0 {
            self.changed.store(Rfc3339::now().unix_millis(), Ordering::Relaxed);
        }
        if !self.is_open() {
            return false;
        }
        let (was_open, outage) = self.close();
        if let Some(lasted) = outage {
            self.changed.store(Rfc3339::now().unix_millis(), Ordering::Relaxed);
            self.last_outage.store(lasted, Ordering::Relaxed);
        }
        was_open
    }

    /// Closes the breaker for another upstream with its own permit to `probe`. The outage was that of the earlier one.
    pub(super) fn begin_anew(&self, probe: &Arc<Semaphore>) {
        *self.probe() = Arc::clone(probe);
        self.close();
        for of_earlier in [&self.changed, &self.last_outage] {
            of_earlier.store(0, Ordering::Relaxed);
        }
    }

    /// Closes the breaker. Returns true if it was open, and the length of the outage that has ended, in nanoseconds.
    fn close(&self) -> (bool, Option<u64>) {
        let away_since = self.away_since();
        let was_open = self.cause.swap(0, Ordering::AcqRel) > 0;
        let outage = away_since.filter(|_since| was_open).map(|since| {
            let lasted = nanos(sys::now().saturating_duration_since(since));
            self.outages.fetch_add(lasted, Ordering::Release);
            lasted
        });
        (was_open, outage)
    }

    /// Returns the beginning of the present outage; none while the upstream is not known to be away.
    pub(crate) fn away_since(&self) -> Option<Instant> {
        let opened = || self.begin + Duration::from_nanos(self.opened.load(Ordering::Relaxed));
        self.is_away().then(opened)
    }

    /// Returns the time of day at which the upstream was first reached, went away or came back. None before the first dial has
    /// ended.
    pub(crate) fn changed_at(&self) -> Option<Rfc3339> {
        let changed = self.changed.load(Ordering::Relaxed);
        (changed > 0).then(|| Rfc3339::of_unix_millis(changed))
    }

    /// Returns the time since the last failed attempt, while the breaker is open.
    pub(crate) fn failed_ago(&self) -> Duration {
        let due = Duration::from_nanos(self.due.load(Ordering::Relaxed));
        let interval = Duration::from_nanos(self.interval.load(Ordering::Relaxed));
        sys::now().saturating_duration_since(self.begin + due.saturating_sub(interval))
    }

    /// Returns the time for which the upstream was away in all. It never falls, as the end of an outage shows in two steps.
    pub(crate) fn time_away(&self) -> Duration {
        // In this order an outage that ends in between is missed for a moment. In the other it would count twice.
        let past = self.outages.load(Ordering::Acquire);
        let present = self.away_since().map(|since| sys::now().saturating_duration_since(since));
        let all = past + present.map_or(0, nanos);
        Duration::from_nanos(self.told.fetch_max(all, Ordering::Relaxed).max(all))
    }

    /// Takes the length of an outage that has ended and was not told yet.
    pub(crate) fn take_last_outage(&self) -> Option<Duration> {
        let lasted = self.last_outage.swap(0, Ordering::Relaxed);
        (lasted > 0).then(|| Duration::from_nanos(lasted))
    }

    /// Makes a probe due at once if there is a shortage, as the upstream has just taken a client out of its backlog.
    pub(crate) fn made_room(&self, now: Instant) {
        if self.cause.load(Ordering::Relaxed) == Cause::Shortage as u8 {
            self.due.fetch_min(nanos(now.saturating_duration_since(self.begin)), Ordering::Relaxed);
        }
    }

    /// Returns the time of the next probe. None while the breaker is closed, and while a probe is under way: its end is
    /// signalled through [`CircuitBreaker::take_wanted`].
    pub(crate) fn probe_at(&self) -> Option<Instant> {
        let at = || self.begin + Duration::from_nanos(self.due.load(Ordering::Relaxed));
        (self.is_open() && self.probe().is_any_free_or_wish()).then(at)
    }

    /// Describes the breaker for a hand-over.
    pub(crate) fn describe(&self, parcel: &Outgoing<'_>) -> BreakerWords {
        let Self {
            begin: _,
            cause: _,
            opened,
            due,
            interval,
            changed,
            last_outage,
            outages,
            told,
            probe: _,
        } = self;
        let span = |nanos: &AtomicU64| Duration::from_nanos(nanos.load(Ordering::Relaxed));
        let moment = |nanos: &AtomicU64| parcel.moment(self.begin + span(nanos));
        BreakerWords {
            cause: self
                .is_open()
                .then(|| if self.is_away() { Cause::Away } else { Cause::Shortage }),
            opened: moment(opened),
            due: moment(due),
            interval: span(interval),
            changed: changed.load(Ordering::Relaxed),
            last_outage: span(last_outage),
            outages: span(outages),
            told: span(told),
        }
    }

    /// Takes over a breaker that was described.
    pub(crate) fn restore(&self, words: &BreakerWords, parcel: &Incoming) {
        let BreakerWords { cause, opened, due, interval, changed, last_outage, outages, told } =
            words;
        let after_begin =
            |moment: &Moment| nanos(parcel.instant(*moment).saturating_duration_since(self.begin));
        for (number, value) in [
            (&self.opened, after_begin(opened)),
            (&self.due, after_begin(due)),
            (&self.interval, nanos(*interval)),
            (&self.changed, *changed),
            (&self.last_outage, nanos(*last_outage)),
            (&self.outages, nanos(*outages)),
            (&self.told, nanos(*told)),
        ] {
            number.store(value, Ordering::Relaxed);
        }
        self.cause.store(cause.map_or(0, |cause| cause as u8), Ordering::Release);
    }

    /// Takes the permit to probe, if it is free.
    pub(crate) fn take_probe(&self) -> Option<Permit> {
        self.probe().take()
    }

    /// Returns true once if a worker waits for the permit to probe and it is free. The end of an outage wakes all workers
    /// anyway, so nobody waits while the breaker is closed, and no lock is taken.
    pub(crate) fn take_wanted(&self) -> bool {
        self.is_open() && self.probe().take_wanted()
    }

    fn probe(&self) -> MutexGuard<'_, Arc<Semaphore>> {
        self.probe.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn permit() -> Arc<Semaphore> {
        Arc::new(Semaphore::new(1))
    }

    #[test]
    fn one_probe_at_a_time_is_made_ever_less_often_until_one_succeeds() {
        let breaker = CircuitBreaker::new(Instant::now(), &permit());
        let begin = breaker.begin;
        let at = |millis| begin + Duration::from_millis(millis);
        assert!(!breaker.is_open() && breaker.probe_at().is_none() && !breaker.succeeded());
        breaker.failed(Cause::Away, false, at(100));
        assert!(breaker.is_open());
        assert_eq!(breaker.probe_at(), Some(at(110)));
        breaker.failed(Cause::Away, false, at(105));
        assert_eq!(breaker.probe_at(), Some(at(110)), "an earlier attempt tells nothing new");
        let mut now = 110;
        for interval in [20, 40, 80, 160, 250, 250] {
            let probe = breaker.take_probe();
            assert!(probe.is_some() && breaker.probe_at().is_none() && !breaker.take_wanted());
            breaker.failed(Cause::Away, true, at(now));
            drop(probe);
            assert!(breaker.take_wanted(), "the worker that asked meanwhile is woken");
            now += interval;
            assert_eq!(breaker.probe_at(), Some(at(now)));
        }
        assert!(breaker.succeeded() && !breaker.succeeded());
        breaker.failed(Cause::Away, false, at(now));
        assert_eq!(breaker.probe_at(), Some(at(now + 10)), "another outage begins anew");
    }

    #[test]
    fn another_upstream_begins_with_a_closed_breaker_and_a_probe_of_its_own() {
        let breaker = CircuitBreaker::new(Instant::now(), &permit());
        breaker.failed(Cause::Away, false, breaker.begin);
        let probe = breaker.take_probe();
        assert!(probe.is_some() && breaker.take_probe().is_none());
        breaker.begin_anew(&permit());
        assert!(!breaker.is_open() && breaker.changed_at().is_none());
        assert!(breaker.time_away() > Duration::ZERO && breaker.take_last_outage().is_none());
        breaker.failed(Cause::Away, false, breaker.begin);
        assert!(breaker.probe_at().is_some() && breaker.take_probe().is_some());
        drop(probe);
    }

    #[test]
    fn the_time_of_all_outages_never_falls() {
        let breaker = CircuitBreaker::new(Instant::now(), &permit());
        breaker.failed(Cause::Away, false, breaker.begin);
        let present = breaker.time_away();
        assert!(present > Duration::ZERO);
        // As between the end of the outage and the addition of its length.
        breaker.cause.store(0, Ordering::Relaxed);
        assert_eq!(breaker.time_away(), present);
        breaker.failed(Cause::Away, false, breaker.begin);
        assert!(breaker.succeeded() && breaker.time_away() >= present);
    }

    #[test]
    fn an_outage_is_handed_over_with_its_length_and_the_time_of_the_next_probe() {
        let giver = CircuitBreaker::new(Instant::now(), &permit());
        let at = |millis| giver.begin + Duration::from_millis(millis);
        giver.failed(Cause::Away, false, giver.begin);
        assert!(giver.succeeded() && giver.time_away() > Duration::ZERO);
        giver.failed(Cause::Away, false, at(100));
        giver.failed(Cause::Away, true, at(110));
        // The taker's clock is another one.
        let shift = Duration::from_secs(1_000);
        let taker = CircuitBreaker::new(giver.begin + shift, &permit());
        let hand_over = || {
            let words = giver.describe(&Outgoing::new(at(115)));
            let incoming = Incoming::new(at(115) + shift, Vec::new(), Vec::new());
            let text = serde_json::to_string(&words).unwrap();
            taker.restore(&serde_json::from_str(&text).unwrap(), &incoming);
            assert_eq!(taker.describe(&Outgoing::new(at(115) + shift)), words);
        };
        hand_over();
        assert!(taker.is_away() && taker.changed_at() == giver.changed_at());
        assert_eq!(taker.probe_at(), Some(at(130) + shift));
        assert_eq!(taker.patience_since(giver.begin), Some(at(100) + shift));
        assert!(taker.time_away() >= giver.time_away());
        assert!(taker.take_last_outage().is_some());
        giver.succeeded();
        hand_over();
        assert!(!taker.is_open() && taker.time_away() >= giver.time_away());
        giver.failed(Cause::Shortage, false, at(200));
        hand_over();
        assert!(taker.is_open() && !taker.is_away());
    }

    #[test]
    fn a_shortage_of_this_host_is_probed_again_soon() {
        let breaker = CircuitBreaker::new(Instant::now(), &permit());
        let begin = breaker.begin;
        let at = |millis| begin + Duration::from_millis(millis);
        for (now, interval) in [(100, 1), (101, 2), (103, 4), (107, 8), (115, 10), (125, 10)] {
            breaker.failed(Cause::Shortage, now > 100, at(now));
            assert_eq!(breaker.probe_at(), Some(at(now + interval)));
            assert!(breaker.is_open() && !breaker.is_away());
        }
        breaker.made_room(at(130));
        assert_eq!(breaker.probe_at(), Some(at(130)), "room in the backlog has become free");
        breaker.failed(Cause::Away, true, at(130));
        breaker.made_room(at(131));
        assert_eq!(
            breaker.probe_at(),
            Some(at(150)),
            "room does not show that an upstream is back"
        );
        breaker.failed(Cause::Shortage, true, at(150));
        assert!(breaker.is_away() && breaker.succeeded() && !breaker.is_away());
    }
}
