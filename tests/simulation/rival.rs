//! Another worker, as far as this one hears of it: it stands in the line, takes places of it, and must be woken.

use std::time::Duration;

use crossbeam_channel::bounded;
use mio::Waker;

use crate::{
    admission::semaphore::Permit, drive::Course, stats::Counters, sys, upstream::breaker::Cause,
    worker_pool::WorkerHandle,
};

/// The index of the rival among the workers.
pub(crate) const RIVAL: usize = 1;
/// So many clients that none is sent over to it.
const CLIENTS: u64 = 1 << 40;
/// The times for which its first may have waited when that is shown, in microseconds.
const WAITS_MAX: [usize; 4] = [1, 1, 50_000, 2_000_000];

/// The state that the rival shows.
#[derive(Debug, Default)]
pub(crate) struct Rival {
    /// The arrival of the first of its queue.
    first: Option<Duration>,
    /// The same when this worker's turn began.
    first_before: Option<Duration>,
    /// True if somebody else's first came before, so that it waits to be woken.
    waits: bool,
    share: Option<Permit>,
    /// Its right to try an upstream that is away.
    probe: Option<Permit>,
}

impl Rival {
    pub(crate) fn worker() -> WorkerHandle {
        let counters = Counters::default();
        counters.active.set(CLIENTS);
        WorkerHandle { waker: Waker(RIVAL), mailbox: bounded(1).0, counters }
    }

    /// Returns the arrival of its first, if that was shown all through this turn.
    pub(crate) fn stood_first(&self) -> Option<Duration> {
        self.first.filter(|_| self.first == self.first_before)
    }

    /// Returns whether it tries an upstream that is away.
    pub(crate) fn probes(&self) -> bool {
        self.probe.is_some()
    }

    /// Returns the number of its places.
    pub(crate) fn shares(&self) -> usize {
        usize::from(self.share.is_some())
    }
}

impl Course {
    /// A turn of this worker begins.
    pub(crate) fn rival_is_shown(&mut self) {
        self.rival.first_before = self.rival.first;
    }

    /// It does something.
    pub(crate) fn rival_acts(&mut self) {
        if !self.rules.has_rival {
            return;
        }
        let now = sys::elapsed();
        match crate::with(|kernel| kernel.random.below(7)) {
            0 | 2 if self.rival.first.is_none() => {
                let ago = crate::with(|kernel| {
                    let most = kernel.random.one_of(WAITS_MAX);
                    kernel.random.below(most)
                });
                self.rival_shows(Some(now.saturating_sub(Duration::from_micros(ago as u64))));
            }
            1 if self.rival.first.is_some() => self.rival_shows(Some(now)),
            2 | 3 => self.rival_shows(None),
            4 if self.rival.share.is_none() => {
                self.rival.share = self.shared.admission.queue.under_way().take();
            }
            5 if self.shared.upstream.breaker().is_open() && self.rival.probe.is_none() => {
                self.rival.probe = self.shared.upstream.breaker().take_probe();
            }
            _ => self.rival_gives_back(),
        }
    }

    /// Nothing of it is left.
    pub(crate) fn rival_leaves(&mut self) {
        self.rival_shows(None);
        self.rival_gives_back();
    }

    fn rival_shows(&mut self, first: Option<Duration>) {
        let queue = &self.shared.admission.queue;
        let next = queue.publish_head(RIVAL, first.map(crate::instant)).flatten();
        self.rival.first = first;
        crate::with(|kernel| kernel.is_rival_woken = false);
        if let Some(next) = next {
            self.shared.workers.wake(next);
        }
        self.rival.waits = first.is_some_and(|at| !self.is_rivals_turn(at));
    }

    fn rival_gives_back(&mut self) {
        drop(self.rival.share.take());
        if let Some(probe) = self.rival.probe.take() {
            if self.shared.upstream.breaker().is_open() {
                let now = sys::elapsed();
                let breaker = self.shared.upstream.breaker();
                breaker.failed(Cause::Away, true, crate::instant(now));
                crate::with(|kernel| kernel.failed = now);
            }
            drop(probe);
        }
        if self.shared.take_wanted() {
            self.shared.workers.wake_all();
        }
        let is_left = self.shared.upstream.breaker().take_wanted();
        assert!(!is_left, "the end of a try is told to nobody");
    }

    /// After a turn of this worker: whoever waits for it and is the next has been woken.
    pub(crate) fn look_at_rival(&mut self) {
        if let Some(at) = self.rival.first {
            let is_its_turn = self.is_rivals_turn(at);
            let is_woken = crate::with(|kernel| std::mem::take(&mut kernel.is_rival_woken));
            assert!(!(self.rival.waits && is_its_turn) || is_woken, "its turn is told to nobody");
            self.rival.waits &= !is_its_turn;
        }
    }

    /// Returns whether this worker's first came later.
    fn is_rivals_turn(&self, at: Duration) -> bool {
        self.shared.admission.queue.is_head(RIVAL, crate::instant(at + Duration::from_nanos(1)))
    }

    /// Returns whether this worker's first came before its.
    pub(crate) fn is_ahead_of_rival(&self) -> bool {
        self.rival
            .first
            .is_none_or(|at| !self.shared.admission.queue.is_head(RIVAL, crate::instant(at)))
    }
}
