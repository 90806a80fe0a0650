//! The rival: stands for another worker. It publishes heads in the wait queue, takes shares of the window and probes, and
//! must be woken when its head is the next to start.

use std::time::Duration;

use crossbeam_channel::bounded;
use mio::Waker;

use crate::{
    admission::semaphore::Permit, drive::Course, stats::Counters, sys, upstream::breaker::Cause,
    worker_pool::WorkerHandle,
};

/// The index of the rival among the workers.
pub(crate) const RIVAL: usize = 1;
/// The rival's number of clients: so large that none is sent over to it.
const CLIENTS: u64 = 1 << 40;
/// Times that its head may have waited when it is published, in microseconds.
const WAITS_MAX: [usize; 4] = [1, 1, 50_000, 2_000_000];

/// State of the rival.
#[derive(Debug, Default)]
pub(crate) struct Rival {
    /// Arrival of its head.
    head: Option<Duration>,
    /// Arrival of its head when this worker's turn began.
    head_before: Option<Duration>,
    /// Set while another worker's head is earlier, so that the rival waits to be woken.
    waits: bool,
    /// Its share of the window.
    share: Option<Permit>,
    /// Its permit to probe an upstream that is away.
    probe: Option<Permit>,
}

impl Rival {
    /// Returns the handle of another worker than the one that is simulated.
    pub(crate) fn worker(index: usize) -> WorkerHandle {
        let counters = Counters::default();
        counters.active.set(CLIENTS);
        WorkerHandle { waker: Waker(index), mailbox: bounded(1).0, counters }
    }

    /// Returns the arrival of its head, if that was the same all through this turn.
    pub(crate) fn unchanged_head(&self) -> Option<Duration> {
        self.head.filter(|_| self.head == self.head_before)
    }

    /// Returns true while it probes an upstream that is away.
    pub(crate) fn probes(&self) -> bool {
        self.probe.is_some()
    }

    /// Returns the number of its shares of the window.
    pub(crate) fn shares(&self) -> usize {
        usize::from(self.share.is_some())
    }
}

impl Course {
    /// Remembers the rival's head, as a turn of this worker begins.
    pub(crate) fn note_rivals_head(&mut self) {
        self.rival.head_before = self.rival.head;
    }

    /// Lets the rival do something at random.
    pub(crate) fn rival_acts(&mut self) {
        if !self.rules.has_rival {
            return;
        }
        let now = sys::elapsed();
        match crate::with(|kernel| kernel.random.below(7)) {
            0 | 2 if self.rival.head.is_none() => {
                let ago = crate::with(|kernel| {
                    let most = kernel.random.one_of(WAITS_MAX);
                    kernel.random.below(most)
                });
                self.rival_publishes(Some(now.saturating_sub(Duration::from_micros(ago as u64))));
            }
            1 if self.rival.head.is_some() => self.rival_publishes(Some(now)),
            2 | 3 => self.rival_publishes(None),
            4 if self.rival.share.is_none() => {
                self.rival.share = self.shared.admission.queue.under_way().take();
            }
            5 if self.shared.upstream.breaker().is_open() && self.rival.probe.is_none() => {
                self.rival.probe = self.shared.upstream.breaker().take_probe();
            }
            _ => self.rival_gives_back(),
        }
    }

    /// Takes back all that the rival has published and taken.
    pub(crate) fn rival_leaves(&mut self) {
        self.rival_publishes(None);
        self.rival_gives_back();
    }

    fn rival_publishes(&mut self, head: Option<Duration>) {
        let next = self
            .shared
            .admission
            .queue
            .publish_head(RIVAL, head.map(crate::instant))
            .and_then(|change| change.wake);
        self.rival.head = head;
        crate::with(|kernel| kernel.is_rival_woken = false);
        if let Some(next) = next {
            self.shared.workers.wake(next);
        }
        self.rival.waits = head.is_some_and(|at| !self.is_rival_next(at));
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
        assert!(!is_left, "the end of a probe wakes nobody");
    }

    /// Moves the rival to the parts of another process, where it has the same.
    pub(crate) fn rival_moves(&mut self) {
        let shared = &self.shared;
        let rival = &mut self.rival;
        rival.share =
            rival.share.take().map(|_share| shared.admission.queue.under_way().take_beyond());
        rival.probe = rival.probe.take().map(|_probe| shared.upstream.target().restore_probe());
        self.rival_publishes(self.rival.head);
    }

    /// Checks after a turn of this worker that the rival was woken, if it waited and its head is the next.
    pub(crate) fn look_at_rival(&mut self) {
        if let Some(at) = self.rival.head {
            let is_next = self.is_rival_next(at);
            let is_woken = crate::with(|kernel| std::mem::take(&mut kernel.is_rival_woken));
            assert!(
                !(self.rival.waits && is_next) || is_woken,
                "the rival has the next head and is not woken"
            );
            self.rival.waits &= !is_next;
        }
    }

    /// Returns true if no head of this worker came before `at` or together with it.
    fn is_rival_next(&self, at: Duration) -> bool {
        self.shared.admission.queue.is_head(RIVAL, crate::instant(at + Duration::from_nanos(1)))
    }

    /// Returns true if this worker's head came before the rival's.
    pub(crate) fn is_ahead_of_rival(&self) -> bool {
        self.rival
            .head
            .is_none_or(|at| !self.shared.admission.queue.is_head(RIVAL, crate::instant(at)))
    }
}
