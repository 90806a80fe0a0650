//! The ledger: the leases under their lock, which also orders all changes of the gate, and the thread that ends those whose
//! time is up.

use std::{
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    thread,
    time::{Duration, Instant},
};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};

use super::{Handle, Shared};
use crate::{
    config::duration::format_duration,
    error::Error,
    pause::leases::{Ended, Lease, Leases, Lifetime, Refused, Terms, Timestamp, mode_name},
    sys,
    timestamp::Rfc3339,
};

/// How long a pause waits for every worker to end its turn, which takes well below a millisecond.
const TURN_TIMEOUT: Duration = Duration::from_secs(1);

/// How long the thread that ends pauses rests after a panic.
const PANIC_INTERVAL: Duration = Duration::from_secs(1);

/// How long a resume waits for the upstream's name to be looked up anew.
const REFRESH_TIMEOUT: Duration = Duration::from_secs(1);

/// The leases, and who hears of their changes.
pub(crate) struct Pauses {
    leases: Mutex<Leases>,
    /// The longest that a lease may last without being renewed.
    pub(crate) max_ttl: Option<Duration>,
    /// To the thread that ends them.
    rings: Sender<()>,
    watchers: Mutex<Vec<Box<dyn Fn() + Send + Sync>>>,
}

/// What has come of the lease of a request that waits for idle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum WaitState {
    /// It holds, and no connection is carried or dialled for.
    Idle,
    /// It holds, and some are.
    Busy,
    /// It does not hold any more.
    Ended,
}

/// Why leases end.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Why<'a> {
    /// Somebody has lifted them.
    Lifted {
        /// Who.
        by: &'a str,
    },
    /// Their time is up.
    Expired,
    /// The connection that they depend on has ended.
    Closed,
    /// What was asked for along with it has not come about.
    Undone {
        /// Why not.
        because: &'a str,
    },
}

impl Pauses {
    /// An empty one, and what its thread waits for.
    pub(crate) fn new(max_ttl: Option<Duration>) -> (Self, Receiver<()>) {
        // One ring is as good as several.
        let (rings, receiver) = bounded(1);
        let (leases, watchers) = (Mutex::default(), Mutex::default());
        (Self { leases, max_ttl, rings, watchers }, receiver)
    }

    /// The leases. Whoever changes them has the gate obey under the same lock.
    pub(crate) fn lock(&self) -> MutexGuard<'_, Leases> {
        self.leases.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has `watcher` called after each change, by the thread that has made it.
    pub(crate) fn watch(&self, watcher: impl Fn() + Send + Sync + 'static) {
        self.watchers.lock().unwrap_or_else(PoisonError::into_inner).push(Box::new(watcher));
    }

    fn tell(&self) {
        // A full channel means that the thread looks anyway.
        self.rings.try_send(()).ok();
        let watchers = self.watchers.lock().unwrap_or_else(PoisonError::into_inner);
        watchers.iter().for_each(|watcher| watcher());
    }
}

impl fmt::Debug for Pauses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pauses").field("leases", &self.leases).finish_non_exhaustive()
    }
}

/// Starts the thread that ends leases. It ends itself when `shared` goes.
pub(crate) fn start(shared: &Arc<Shared>, rings: Receiver<()>) -> Result<(), Error> {
    let weak = Arc::downgrade(shared);
    let run = move || run(&weak, &rings);
    thread::Builder::new().name("leases".into()).spawn(run).map(drop).map_err(|error| {
        Error::System(format!("cannot start the thread that ends pauses: {error}"))
    })
}

fn run(shared: &Weak<Shared>, rings: &Receiver<()>) {
    let mut due = None;
    loop {
        let rung = match due {
            Some(due) => rings.recv_deadline(due),
            None => rings.recv().map_err(RecvTimeoutError::from),
        };
        match (rung, shared.upgrade()) {
            (Err(RecvTimeoutError::Disconnected), _) | (_, None) => return,
            (_, Some(shared)) => {
                // Without this thread, no pause would ever end by itself.
                due = catch_unwind(AssertUnwindSafe(|| Handle(shared).expire())).unwrap_or_else(
                    |_| {
                        log::error!("a defect: the thread that ends pauses panicked; it goes on");
                        Some(sys::now() + PANIC_INTERVAL)
                    },
                );
            }
        }
    }
}

impl Handle {
    /// Pauses, or changes the terms of a pause. Behind this, no further client is admitted, and no connection to the upstream
    /// begins.
    pub(crate) fn put(
        &self,
        terms: Terms,
        standing: Lifetime,
        request_id: u64,
    ) -> Result<(), Refused> {
        self.take(terms, standing, request_id)?;
        self.await_turns();
        Ok(())
    }

    /// Adds a lease, and closes the gate. Returns whether it was open.
    pub(crate) fn take(
        &self,
        terms: Terms,
        standing: Lifetime,
        request_id: u64,
    ) -> Result<bool, Refused> {
        let shared = &self.0;
        let text = terms.to_string();
        let now = Timestamp { at: sys::now(), shown: Rfc3339::now() };
        let (is_renewed, was_open) = {
            let mut leases = shared.ledger.lock();
            let is_renewed = leases.holds_name(&terms.name);
            leases.put(terms, standing, request_id, now)?;
            (is_renewed, self.obey(&leases))
        };
        let what = if is_renewed { "pause renewed" } else { "paused" };
        log::info!("{what} by {text}; connections that run: {}", shared.gate.passes());
        // Only now, so that the log does not tell of its end first.
        shared.ledger.tell();
        Ok(was_open)
    }

    /// Waits until no worker is about to do what it was let in for before a pause. Also if it was paused already: perhaps by
    /// another who still waits for this.
    pub(crate) fn await_turns(&self) {
        let question = self.0.barrier.ask();
        self.0.wake_all();
        if !self.0.barrier.wait(question, TURN_TIMEOUT) {
            log::warn!("a worker's turn takes long: what it has admitted may still be under way");
        }
    }

    /// Ends the pause of that name, or all. The upstream's name is looked up before, for a second at most. Returns whether
    /// this has resumed.
    pub(crate) fn lift(&self, name: Option<&str>, by: &str) -> bool {
        self.end(Why::Lifted { by }, |lease| name.is_none_or(|name| lease.terms.name == name))
    }

    /// Gives a request up: the pause that it has asked for ends, unless it stands for itself.
    pub(crate) fn undo(&self, request_id: u64, because: &str) {
        self.forbid(request_id);
        self.end(Why::Undone { because }, |lease| lease.is_undone_with(request_id));
    }

    /// Ends the pause of a request that depends on its connection, which has ended.
    pub(crate) fn close(&self, request_id: u64) {
        self.forbid(request_id);
        self.end(Why::Closed, |lease| lease.is_undone_with(request_id));
    }

    /// Has a request that is over pause nothing any more: a copy of it may still be under way.
    pub(crate) fn forbid(&self, request_id: u64) {
        self.0.ledger.lock().forbid(request_id);
    }

    /// Ends what has expired. Returns when the next lease does.
    pub(crate) fn expire(&self) -> Option<Instant> {
        let now = sys::now();
        self.end(Why::Expired, |lease| lease.has_expired(now));
        self.0.ledger.lock().next_end()
    }

    /// Has the time of a request's lease begin anew.
    pub(crate) fn renew(&self, request_id: u64) {
        if self.0.ledger.lock().renew(request_id, sys::now()) {
            log::trace!("the pause of request {request_id} is renewed by its caller's bytes");
        }
    }

    /// Has the lease of a request stand for itself.
    pub(crate) fn settle(&self, request_id: u64) {
        let mut leases = self.0.ledger.lock();
        leases.settle(request_id);
        self.obey(&leases);
    }

    /// Whether the lease of a request holds, and what it waits for has come about. Both at one moment: as long as it is
    /// locked, the pause goes on, and nobody enters but those who are let through in spite of it.
    pub(crate) fn look(&self, request_id: u64) -> WaitState {
        let leases = self.0.ledger.lock();
        match (leases.holds(request_id), self.is_idle() && !self.0.line.is_letting_through()) {
            (false, _) => WaitState::Ended,
            (true, true) => WaitState::Idle,
            (true, false) => WaitState::Busy,
        }
    }

    /// Resets all connections, soon. Returns how many there are.
    pub(crate) fn kill(&self, by: &str) -> u64 {
        let count = self.0.gate.passes();
        log::info!("{by} has those connections reset that have not ended in time: {count}");
        self.0.reset_all();
        count
    }

    /// Lets the oldest held clients through in spite of the pause. Returns how many there are of `count`; none when it is not
    /// paused.
    pub(crate) fn release(&self, count: u64, by: &str, request_id: u64) -> Option<u64> {
        let mut leases = self.0.ledger.lock();
        leases.mode()?;
        let released = leases.released_once(request_id, || self.0.bypass(count));
        drop(leases);
        log::info!("{by} lets held clients through: {released}; it stays paused");
        Some(released)
    }

    /// Has the gate and the workers do what the leases say, and is called under their lock. Returns whether the gate was open.
    fn obey(&self, leases: &Leases) -> bool {
        let shared = &self.0;
        let was_open = if let Some(mode) = leases.mode() {
            shared.gate.pause(mode)
        } else {
            shared.line.end_bypass();
            !shared.gate.resume()
        };
        // This wakes the workers, who look at the gate too.
        shared.close_quiet(leases.quiet());
        was_open
    }

    fn end(&self, why: Why<'_>, is_over: impl Fn(&Lease) -> bool) -> bool {
        let shared = &self.0;
        if shared.ledger.lock().would_resume(&is_over) {
            shared.upstream.refresh(REFRESH_TIMEOUT);
        }
        let held = shared.held();
        let ended = {
            let mut leases = shared.ledger.lock();
            let ended = leases.remove(is_over);
            if !ended.leases.is_empty() {
                self.obey(&leases);
            }
            ended
        };
        if !ended.leases.is_empty() {
            shared.ledger.tell();
        }
        report(&ended, why, held);
        ended.paused_since.is_some()
    }
}

fn report(ended: &Ended, why: Why<'_>, held: u64) {
    let duration_since = |since: Timestamp| {
        let seconds = sys::now().saturating_duration_since(since.at).as_secs_f64();
        format!("since {}, for {seconds:.3} s", since.shown)
    };
    for lease in &ended.leases {
        let how = match why {
            Why::Lifted { by } => format!("lifted by {by}"),
            Why::Expired => "expired".to_owned(),
            Why::Closed => "ended with its connection".to_owned(),
            Why::Undone { because } => format!("undone: {because}"),
        };
        log::info!("pause {how}; it was by {}, {}", lease.terms, duration_since(lease.since));
    }
    match (ended.paused_since, why) {
        (Some(since), _) => {
            let by = match why {
                Why::Lifted { by } => by,
                Why::Expired => "expiry",
                Why::Closed => "the end of a connection",
                Why::Undone { .. } => "undoing the last pause",
            };
            log::info!("resumed by {by}, paused {}; clients held: {held}", duration_since(since));
        }
        (None, Why::Lifted { by }) if ended.leases.is_empty() => {
            log::debug!("asked to resume by {by}: there was nothing to lift");
        }
        _ => {}
    }
}

impl fmt::Display for Terms {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} as {:?}", self.by, self.name)?;
        if let Some(reason) = &self.reason {
            write!(f, " because {reason:?}")?;
        }
        if let Some(ttl) = self.ttl {
            write!(f, " for {}", format_duration(ttl))?;
        }
        if let Some(quiet) = self.quiet {
            write!(f, ", closing what is quiet for {}", format_duration(quiet))?;
        }
        write!(f, ", mode {}", mode_name(self.mode))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pause::gate::Mode;

    fn terms() -> Terms {
        let (name, by) = ("a".to_owned(), "a test".to_owned());
        Terms { name, by, reason: None, mode: Mode::Hold, ttl: None, quiet: None }
    }

    #[test]
    fn the_gate_is_paused_exactly_while_a_lease_holds() {
        let handle = Handle(Shared::without_workers());
        assert_eq!(handle.look(1), WaitState::Ended);
        let pass = handle.0.gate.enter();
        handle.put(terms(), Lifetime::Pending, 1).unwrap();
        assert_eq!((handle.look(1), handle.0.gate.mode()), (WaitState::Busy, Some(Mode::Hold)));
        drop(pass);
        assert_eq!(handle.look(1), WaitState::Idle);
        let strict = Terms { mode: Mode::Reject, name: "b".to_owned(), ..terms() };
        handle.put(strict, Lifetime::Committed, 2).unwrap();
        assert_eq!(handle.0.gate.mode(), Some(Mode::Reject));
        assert!(!handle.lift(Some("b"), "a test"));
        assert_eq!(handle.0.gate.mode(), Some(Mode::Hold));
        handle.undo(1, "it is over");
        assert_eq!((handle.look(1), handle.0.gate.mode()), (WaitState::Ended, None));
        assert!(!handle.resume() && handle.pause() && !handle.pause() && handle.resume());
    }

    #[test]
    fn a_request_that_was_given_up_pauses_nothing() {
        let handle = Handle(Shared::without_workers());
        handle.undo(7, "it took too long");
        assert_eq!(handle.put(terms(), Lifetime::ConnectionBound, 7), Err(Refused::Undone));
        assert!(!handle.is_paused());
        // Nor does one whose answer was lost, and that was asked for again in the meantime.
        handle.put(terms(), Lifetime::Pending, 8).unwrap();
        handle.undo(8, "its answer is lost");
        assert_eq!(handle.put(terms(), Lifetime::Pending, 8), Err(Refused::Undone));
        assert!(!handle.is_paused());
        // Nor one that was answered at the second time of asking, and lifted since.
        handle.put(terms(), Lifetime::Pending, 9).unwrap();
        handle.settle(9);
        handle.forbid(9);
        assert!(handle.is_paused() && handle.lift(None, "a test"));
        assert_eq!(handle.put(terms(), Lifetime::Pending, 9), Err(Refused::Undone));
        handle.put(terms(), Lifetime::ConnectionBound, 10).unwrap();
        handle.close(10);
        assert_eq!(handle.put(terms(), Lifetime::ConnectionBound, 10), Err(Refused::Undone));
        assert!(!handle.is_paused());
    }

    #[test]
    fn the_thread_ends_with_the_proxy() {
        let shared = Shared::without_workers();
        let weak = Arc::downgrade(&shared);
        let (ledger, rings) = Pauses::new(None);
        let thread = thread::Builder::new().spawn(move || run(&weak, &rings)).unwrap();
        ledger.tell();
        drop((shared, ledger));
        let deadline = Instant::now() + Duration::from_secs(10);
        while !thread.is_finished() {
            assert!(Instant::now() < deadline, "it goes on");
            thread::yield_now();
        }
    }
}
