//! Pauses: the gate that admits connections, the leases that keep it closed, and their one owner.
//!
//! [`Pauses`] changes the gate only under the lock of the leases, so that both always agree. Each change takes the same
//! steps: leases, gate, drain orders, and then every worker is woken. Workers read gate and orders without a lock. They
//! take the barrier's only to acknowledge a new pause, and the gate's when the last pass is dropped.

pub(crate) mod barrier;
pub(crate) mod drain;
pub(crate) mod expiry;
mod fence;
pub(crate) mod fleet;
pub(crate) mod gate;
pub(crate) mod leases;
mod lines;
pub(crate) mod steer;
pub(crate) mod words;

use std::{
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use crossbeam_channel::{Receiver, Sender, bounded};

use crate::{
    admission::queue::WaitQueue, config::HalfClosed, sys, timestamp::Rfc3339, upstream::Upstream,
    worker_pool::WorkerPool,
};
use barrier::Barrier;
use drain::DrainOrders;
use gate::{Gate, Mode};
use leases::{Full, Lease, Leases, Lifetime, NAME_DEFAULT, PROGRAM, Terms, Timestamp};
use steer::Steer;

/// Longest wait of a pause for every worker to end its turn, which takes well below a millisecond.
const TURN_TIMEOUT: Duration = Duration::from_secs(1);

/// Longest wait of a resume for a new look-up of the upstream's name.
const REFRESH_TIMEOUT: Duration = Duration::from_secs(1);

/// Owner of the parts of a pause, which are changed in one order.
pub(crate) struct Pauses {
    /// Admits connections, and counts them.
    pub(crate) gate: Arc<Gate>,
    /// Tells when every worker has seen a change of the gate.
    pub(crate) barrier: Barrier,
    /// Orders to the workers.
    pub(crate) drain: DrainOrders,
    /// Treatment of new clients during a pause that names none.
    pub(crate) default_mode: Mode,
    /// Treatment of half-closed held clients during a pause that names none.
    pub(crate) default_half_closed: HalfClosed,
    /// Longest time that a lease may last without being renewed.
    pub(crate) max_ttl: Option<Duration>,
    /// Leases, whose lock orders all changes. It is seldom contended, as operators pause rarely.
    leases: Mutex<Leases>,
    pub(crate) counts: PauseCounts,
    /// Wakes the thread that ends expired leases.
    expiry: Sender<()>,
    /// True in a taker until it goes on: its leases do not expire before.
    awaits_word: AtomicBool,
    watchers: Mutex<Vec<Watcher>>,
    /// Way past the workers; empty where all connections are relayed.
    steer: OnceLock<Box<dyn Steer>>,
    queue: Arc<WaitQueue>,
    upstream: Arc<Upstream>,
    workers: Arc<WorkerPool>,
}

/// Numbers of pauses since the start.
#[derive(Debug, Default)]
pub(crate) struct PauseCounts {
    pub(crate) begun: AtomicU64,
    pub(crate) lifted: AtomicU64,
    pub(crate) expired: AtomicU64,
    pub(crate) undone: AtomicU64,
    pub(crate) caller_gone: AtomicU64,
}

type Watcher = Box<dyn Fn() + Send + Sync>;

/// State of a request that waits for idle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum WaitState {
    /// Its lease holds, and no connection is relayed or connecting.
    Idle,
    /// Its lease holds, and some connections are left.
    Busy,
    /// Its lease holds no more.
    Ended,
}

/// Reason for the end of leases.
#[derive(Debug, Clone, Copy)]
enum EndReason<'a> {
    /// A caller or the program has lifted them.
    Lifted { by: &'a str },
    /// An operator has lifted leases of the fleet here alone.
    Forced { by: &'a str },
    /// Their time is up.
    Expired,
    /// The connection that they depend on has ended.
    Closed,
    /// Their request was given up, for this reason.
    Undone { because: &'a str },
}

impl Pauses {
    /// Returns pauses with an open gate, and the notifications for the thread that ends expired leases.
    pub(crate) fn new(
        default_mode: Mode,
        default_half_closed: HalfClosed,
        max_ttl: Option<Duration>,
        queue: Arc<WaitQueue>,
        upstream: Arc<Upstream>,
        workers: Arc<WorkerPool>,
    ) -> (Arc<Self>, Receiver<()>) {
        // One notification is as good as several.
        let (expiry, notifications) = bounded(1);
        let pauses = Self {
            gate: Arc::new(Gate::new()),
            barrier: Barrier::new(workers.len()),
            drain: DrainOrders::default(),
            default_mode,
            default_half_closed,
            max_ttl,
            leases: Mutex::default(),
            counts: PauseCounts::default(),
            expiry,
            awaits_word: AtomicBool::new(false),
            watchers: Mutex::default(),
            steer: OnceLock::new(),
            queue,
            upstream,
            workers,
        };
        (Arc::new(pauses), notifications)
    }

    /// Pauses on behalf of the program that runs the proxy; see `Handle::pause`.
    pub(crate) fn pause(&self) -> bool {
        let terms = Terms {
            name: NAME_DEFAULT.to_owned(),
            reason: None,
            by: "the program".to_owned(),
            mode: self.default_mode,
            ttl: self.max_ttl,
            quiet: None,
            half_closed: self.default_half_closed,
        };
        // The program is never refused.
        let was_running = self.begin(terms, Lifetime::Committed, PROGRAM).unwrap_or(false);
        self.await_workers();
        was_running
    }

    /// Pauses, or changes the terms of a pause. Once this has returned, no further client is admitted, and no connection to
    /// the upstream begins, unless a worker's turn takes longer than [`TURN_TIMEOUT`].
    pub(crate) fn put(
        &self,
        terms: Terms,
        lifetime: Lifetime,
        request_id: u64,
    ) -> Result<(), Full> {
        self.begin(terms, lifetime, request_id)?;
        self.await_workers();
        Ok(())
    }

    /// Adds a lease, and closes the gate, but waits for no worker. Returns true if the gate was open.
    pub(crate) fn begin(
        &self,
        terms: Terms,
        lifetime: Lifetime,
        request_id: u64,
    ) -> Result<bool, Full> {
        let shown = terms.clone();
        // Before the stop, behind which they are counted in the background.
        let steered = self.steered();
        let now = Timestamp { at: sys::now(), shown: Rfc3339::now() };
        let (is_renewed, was_open) = {
            let mut leases = self.lock();
            let is_renewed = leases.holds_name(&terms.name);
            leases.put(terms, lifetime, request_id, now)?;
            self.counts.begun.fetch_add(u64::from(!is_renewed), Ordering::Relaxed);
            (is_renewed, self.apply(&leases))
        };
        lines::log_begin(&shown, is_renewed, self.running(steered), steered);
        // Only after the log line, or the log could tell of the end of the pause before its begin.
        self.notify();
        Ok(was_open)
    }

    /// Ends the pause of that name, or all pauses, but for those of the fleet. A resume first looks the upstream's name up
    /// anew, for a second at most. Returns true if the proxy has resumed.
    pub(crate) fn lift(&self, name: Option<&str>, by: &str) -> bool {
        let is_meant = |lease: &Lease| name.is_none_or(|name| lease.terms.name == name);
        self.end(EndReason::Lifted { by }, |lease| is_meant(lease) && !lease.is_of_fleet())
    }

    /// Gives up a request: its pause ends, unless it is committed.
    pub(crate) fn undo(&self, request_id: u64, because: &str) {
        self.end(EndReason::Undone { because }, |lease| lease.is_undone_with(request_id));
    }

    /// Ends the pause of a request that depends on its connection, which has ended.
    pub(crate) fn close(&self, request_id: u64) {
        self.end(EndReason::Closed, |lease| lease.is_undone_with(request_id));
    }

    /// Restarts the time to live of a request's lease.
    pub(crate) fn renew(&self, request_id: u64) {
        let of_request = |lease: &Lease| lease.request_id == request_id;
        if self.lock().renew(of_request, sys::now()) {
            log::trace!("the pause of request {request_id} is renewed by its caller's bytes");
        }
    }

    /// Commits the lease of a request, which then no longer depends on its caller.
    pub(crate) fn commit(&self, request_id: u64) {
        let mut leases = self.lock();
        leases.commit(request_id);
        self.apply(&leases);
    }

    /// Returns the state of a request's wait. Lease and idleness are read at one moment: while the leases are locked the
    /// pause goes on, and only clients that bypass it are admitted.
    pub(crate) fn wait_state(&self, request_id: u64) -> WaitState {
        let leases = self.lock();
        match (leases.holds(request_id), self.is_idle()) {
            (false, _) => WaitState::Ended,
            (true, true) => WaitState::Idle,
            (true, false) => WaitState::Busy,
        }
    }

    /// Returns true if no connection is relayed or connecting, and no client is about to bypass the pause.
    fn is_idle(&self) -> bool {
        // In this order: a client that bypasses has its pass before its bypass is used up.
        !self.queue.is_bypass_pending() && self.gate.passes() == 0
    }

    /// Orders the workers to reset all connections. Returns the number of connections, and does not wait.
    pub(crate) fn kill(&self, by: &str) -> u64 {
        let count = self.gate.passes();
        log::info!(
            event = "killed", by = by, connections = count;
            "{by} has those connections reset that have not ended in time: {count}"
        );
        self.drain.reset_all();
        self.workers.wake_all();
        self.steer().into_iter().for_each(Steer::reset);
        count
    }

    /// Lets the oldest `count` held clients bypass the pause, or all if they are fewer. Returns their number; none if
    /// nothing is paused.
    pub(crate) fn release(&self, count: u64, by: &str) -> Option<u64> {
        let leases = self.lock();
        leases.mode()?;
        let released = count.min(self.workers.held());
        self.queue.bypass(released, sys::now());
        self.workers.wake_all();
        drop(leases);
        log::info!(
            event = "released", by = by, clients = released;
            "{by} lets held clients through: {released}; it stays paused"
        );
        Some(released)
    }

    /// Locks the leases.
    pub(crate) fn lock(&self) -> MutexGuard<'_, Leases> {
        self.leases.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the number of connections that are relayed or connecting.
    pub(crate) fn connections(&self) -> u64 {
        self.gate.passes()
    }

    /// Returns the number of idle moments so far: when it has changed, the proxy was idle in between.
    pub(crate) fn idle_moments(&self) -> u64 {
        self.gate.idle_moments()
    }

    /// Registers a callback for each idle moment; see `Gate::watch_idle`.
    pub(crate) fn watch_idle(&self, watcher: impl Fn() + Send + Sync + 'static) {
        self.gate.watch_idle(watcher);
    }

    /// Registers a callback for each change. It runs on the thread that makes the change.
    pub(crate) fn watch(&self, watcher: impl Fn() + Send + Sync + 'static) {
        self.watchers.lock().unwrap_or_else(PoisonError::into_inner).push(Box::new(watcher));
    }

    /// Ends expired leases. Returns the moment at which the next one expires, of which [`Pauses::go_on`] tells in a taker.
    fn expire(&self) -> Option<Instant> {
        if self.awaits_word.load(Ordering::Acquire) {
            return None;
        }
        let now = sys::now();
        self.end(EndReason::Expired, |lease| lease.has_expired(now));
        self.lock().next_end()
    }

    /// Waits until every worker has finished the turn in which a pause or a switch began. Needed even if it was paused already:
    /// the earlier caller may still be waiting.
    pub(crate) fn await_workers(&self) {
        if !self.await_turns(TURN_TIMEOUT) {
            log::warn!("a worker's turn takes long: what it has admitted may still be under way");
        }
        self.steer().into_iter().for_each(Steer::settle);
    }

    /// Waits until every worker has ended a turn. Returns false if `timeout` is over first.
    pub(crate) fn await_turns(&self, timeout: Duration) -> bool {
        let epoch = self.barrier.ask();
        self.workers.wake_all();
        self.barrier.wait(epoch, timeout)
    }

    /// Applies the leases to the gate and the workers, under the lock of the leases. Returns true if the gate was open.
    fn apply(&self, leases: &Leases) -> bool {
        // Before the gate opens, so that nobody is dropped behind a pause.
        self.drain.treat_half_closed(leases.half_closed());
        let was_open = if let Some(mode) = leases.mode() {
            self.steer().into_iter().for_each(Steer::stop);
            self.gate.pause(mode)
        } else {
            self.queue.end_bypass();
            !self.gate.resume()
        };
        self.drain.close_quiet(leases.quiet(), leases.postgres_quiet());
        self.workers.wake_all();
        was_open
    }

    /// Ends the leases for which `is_over` returns true. Returns true if the proxy has resumed.
    fn end(&self, reason: EndReason<'_>, is_over: impl Fn(&Lease) -> bool) -> bool {
        if self.lock().would_resume(&is_over) {
            self.upstream.refresh(REFRESH_TIMEOUT);
        }
        let held = self.workers.held();
        let count = match reason {
            EndReason::Lifted { .. } | EndReason::Forced { .. } => &self.counts.lifted,
            EndReason::Expired => &self.counts.expired,
            EndReason::Undone { .. } => &self.counts.undone,
            EndReason::Closed => &self.counts.caller_gone,
        };
        let ended = {
            let mut leases = self.lock();
            let ended = leases.remove(is_over);
            count.fetch_add(ended.leases.len() as u64, Ordering::Relaxed);
            if let EndReason::Forced { .. } = reason {
                ended.leases.iter().for_each(|lease| leases.force(&lease.terms.name));
            }
            if !ended.leases.is_empty() {
                self.apply(&leases);
            }
            ended
        };
        if !ended.leases.is_empty() {
            self.notify();
        }
        lines::log_end(&ended, reason, held);
        ended.paused_since.is_some()
    }

    /// Tells the thread that ends leases, and all watchers, of a change.
    pub(crate) fn notify(&self) {
        // If the channel is full, a notification waits already.
        self.expiry.try_send(()).ok();
        let watchers = self.watchers.lock().unwrap_or_else(PoisonError::into_inner);
        watchers.iter().for_each(|watcher| watcher());
    }
}

impl fmt::Debug for Pauses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pauses").field("leases", &self.leases).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn terms() -> Terms {
        let (name, by) = ("a".to_owned(), "a test".to_owned());
        let half_closed = HalfClosed::Serve;
        Terms { name, by, reason: None, mode: Mode::Hold, ttl: None, quiet: None, half_closed }
    }

    #[test]
    fn the_gate_is_paused_exactly_while_a_lease_holds() {
        let pauses = crate::tests::pauses();
        assert_eq!(pauses.wait_state(1), WaitState::Ended);
        let pass = pauses.gate.enter();
        pauses.put(terms(), Lifetime::Pending, 1).unwrap();
        let seen = (pauses.wait_state(1), pauses.gate.mode());
        assert_eq!(seen, (WaitState::Busy, Some(Mode::Hold)));
        drop(pass);
        assert_eq!(pauses.wait_state(1), WaitState::Idle);
        let strict = Terms { mode: Mode::Reject, name: "b".to_owned(), ..terms() };
        pauses.put(strict, Lifetime::Committed, 2).unwrap();
        assert_eq!(pauses.gate.mode(), Some(Mode::Reject));
        assert!(!pauses.lift(Some("b"), "a test"));
        assert_eq!(pauses.gate.mode(), Some(Mode::Hold));
        pauses.undo(1, "it is over");
        assert_eq!((pauses.wait_state(1), pauses.gate.mode()), (WaitState::Ended, None));
        assert!(!pauses.lift(None, "a test") && pauses.pause() && !pauses.pause());
        assert!(pauses.lift(None, "a test"));
    }
}
