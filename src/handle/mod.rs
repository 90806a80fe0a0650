//! `Handle`: what the operator can do with a running proxy, and `Shared`: what its threads share.

pub(crate) mod ledger;

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU8, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use crossbeam_channel::Sender;
use mio::Waker;
use serde::Serialize;

use crate::{
    admission::{
        hold::{Full, HoldDecision, HoldLimits},
        queue::WaitQueue,
        semaphore::{Permit, Semaphore},
    },
    connection::reject::policy::RejectPolicy,
    log_limit::LogLimit,
    pause::{
        barrier::Barrier,
        drain::DrainOrders,
        gate::{Gate, Mode},
        leases::{Lease, Lifetime, NAME_DEFAULT, PROGRAM, Terms, mode_name},
    },
    stats::{Count, Counters},
    sys::{self, Socket},
    upstream::Upstream,
};
use ledger::Pauses;

/// Pauses, resumes and observes a running proxy. Clones act on the same proxy.
#[derive(Debug, Clone)]
pub struct Handle(pub(crate) Arc<Shared>);

/// A snapshot of the proxy, as `GET /status` shows it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Status {
    /// The version of tcpause.
    pub version: &'static str,
    /// Seconds since the proxy started.
    pub uptime_seconds: f64,
    /// Whether new clients are held or rejected now.
    pub paused: bool,
    /// Since when it is paused, in RFC 3339; null when it is not.
    pub paused_since: Option<String>,
    /// What it is paused by.
    pub leases: Vec<LeaseStatus>,
    /// Clients that wait for the resume.
    pub held: u64,
    /// Connections whose upstream is being dialled.
    pub connecting: u64,
    /// Connections that are carried.
    pub active: u64,
    /// The age of the oldest connection that is carried, in seconds; null when there is none.
    pub oldest_seconds: Option<f64>,
    /// Clients that are being rejected.
    pub rejecting: u64,
    /// Clients accepted since the start.
    pub accepted: u64,
    /// Clients rejected since the start, with whatever answer.
    pub rejected: u64,
    /// Connections whose upstream could not be reached since the start.
    pub failed: u64,
    /// Clients that left while they were held since the start.
    pub left: u64,
    /// Connections that were closed as quiet during a pause since the start.
    pub drained: u64,
    /// Connections that were reset as they had not ended in time for a pause since the start.
    pub killed: u64,
    /// Bytes carried from clients to the upstream.
    pub bytes_to_upstream: u64,
    /// Bytes carried from the upstream to clients.
    pub bytes_to_client: u64,
    /// The upstream as configured.
    pub upstream: String,
    /// The number of worker threads.
    pub threads: usize,
    /// How often a worker has panicked, which costs its connections: each time is a defect of tcpause.
    pub worker_panics: u64,
}

/// One of the pauses that hold, as `GET /status` shows it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LeaseStatus {
    /// Its name.
    pub name: String,
    /// Why it was asked for; null if that was not told.
    pub reason: Option<String>,
    /// Who has asked for it: an address, or the user and the process of a UNIX caller.
    pub by: String,
    /// What is done with new clients: `hold` or `reject`.
    pub mode: &'static str,
    /// Since when its name holds, in RFC 3339.
    pub since: String,
    /// When it ends by itself; null for never.
    pub expires_in_seconds: Option<f64>,
    /// How long a connection may be silent before it is closed; null for ever.
    pub drain_quiet_seconds: Option<f64>,
}

/// What the threads of a proxy share. Workers read it without a lock.
#[derive(Debug)]
pub(crate) struct Shared {
    /// Paused or not, and how many connections are served.
    pub(crate) gate: Arc<Gate>,
    /// Where a pause waits for the workers.
    pub(crate) barrier: Barrier,
    /// How many clients there may be.
    pub(crate) slots: Arc<Semaphore>,
    /// Limits what is logged of clients that cannot be accepted.
    pub(crate) accept_troubles: AcceptTroubles,
    /// Where the upstream is.
    pub(crate) upstream: Arc<Upstream>,
    /// How clients are rejected.
    pub(crate) reject_policy: RejectPolicy,
    /// What is done with new clients during a pause that does not say it.
    pub(crate) default_mode: Mode,
    /// What else the workers are to do.
    pub(crate) orders: DrainOrders,
    /// How clients are held.
    pub(crate) hold: HoldLimits,
    /// Who of those that wait is the next.
    pub(crate) line: WaitQueue,
    /// How many pipes a worker may have.
    pub(crate) pipes_per_worker: usize,
    /// How long connections may go on after a stop.
    pub(crate) grace_period: Duration,
    /// One for each worker.
    pub(crate) workers: Box<[WorkerHandle]>,
    /// How many workers still listen.
    pub(crate) listening: AtomicUsize,
    /// When the proxy started.
    pub(crate) started: Instant,
    /// What it is paused by; its lock also orders pauses and resumes, which are the operator's and rare.
    pub(crate) ledger: Pauses,
    /// Whether the proxy stops: only ever raised.
    pub(crate) stop_level: AtomicU8,
    /// When a stop ends.
    pub(crate) stop_deadline: OnceLock<Instant>,
}

/// A client that has been accepted.
#[derive(Debug)]
pub(crate) struct Accepted {
    pub(crate) client: Socket,
    pub(crate) slot: Permit,
    /// Its place among those that are held, if it was accepted for it.
    pub(crate) place: Option<Permit>,
}

/// Reasons for which clients wait in the backlog. Each has a limit of lines of its own, or one would hide another.
#[derive(Debug, Default)]
pub(crate) struct AcceptTroubles {
    pub(crate) too_many_held: LogLimit,
    pub(crate) no_place: LogLimit,
    pub(crate) shortage: LogLimit,
}

/// How a worker is reached, and what it shows.
#[derive(Debug)]
pub(crate) struct WorkerHandle {
    /// Ends its wait.
    pub(crate) waker: Waker,
    /// Takes clients that another worker has accepted.
    pub(crate) mailbox: Sender<Accepted>,
    /// What it counts.
    pub(crate) counters: Counters,
}

/// What the workers are to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Accept and serve.
    Running,
    /// Listen no more; what there is may go on until the deadline.
    Stopping {
        /// When what is left is closed.
        deadline: Instant,
    },
    /// Close everything.
    Aborting,
}

// The levels of `Shared::stop_level`; below them the proxy runs.
const STOPPING: u8 = 1;
const ABORTING: u8 = 2;

impl Handle {
    /// Pauses, until it is resumed or `pause.max-ttl` is over: once this has returned, no further client is admitted, and no
    /// connection to the upstream begins. Connections that run go on; those under way to the upstream were admitted before,
    /// and are counted. Returns whether it was running before.
    pub fn pause(&self) -> bool {
        let was_running = self.close_gate();
        self.await_turns();
        was_running
    }

    /// The first half of a pause, which waits for nobody.
    pub(crate) fn close_gate(&self) -> bool {
        let terms = Terms {
            name: NAME_DEFAULT.to_owned(),
            reason: None,
            by: "the program".to_owned(),
            mode: self.0.default_mode,
            ttl: self.0.ledger.max_ttl,
            quiet: None,
        };
        // The program is never refused.
        self.take(terms, Lifetime::Committed, PROGRAM).unwrap_or(false)
    }

    /// Resumes, whoever has paused: held clients are served, oldest first. The upstream's name is looked up before, for a
    /// second at most. Returns whether it was paused before.
    pub fn resume(&self) -> bool {
        self.lift(None, "the program")
    }

    /// Whether it is paused.
    pub fn is_paused(&self) -> bool {
        self.0.gate.is_paused()
    }

    /// Whether no connection is carried or dialled for at this moment. Held and rejected clients do not count.
    pub fn is_idle(&self) -> bool {
        self.0.gate.passes() == 0
    }

    /// Waits until no connection is carried or dialled for; false when `timeout` is over first.
    pub fn wait_idle(&self, timeout: Option<Duration>) -> bool {
        // A timeout beyond the clock's range is none.
        self.0.gate.wait_idle(timeout.and_then(|timeout| Instant::now().checked_add(timeout)))
    }

    /// How many idle moments there were: when it has changed, the proxy was idle in between.
    pub(crate) fn idle_moments(&self) -> u64 {
        self.0.gate.idle_moments()
    }

    /// Has `callback` called whenever the last connection has closed, on the thread that closed it: it must neither block
    /// nor ask for idle moments.
    pub(crate) fn on_idle(&self, callback: impl Fn() + Send + Sync + 'static) {
        self.0.gate.watch_idle(callback);
    }

    /// A snapshot of all counts. They are read one after the other while the proxy goes on.
    pub fn status(&self) -> Status {
        let shared = &self.0;
        let sum = |count: fn(&Counters) -> &Count| {
            shared.workers.iter().map(|worker| count(&worker.counters).get()).sum()
        };
        let now = sys::now();
        let (paused_since, leases) = {
            let leases = shared.ledger.lock();
            let shown = leases.iter().map(|lease| LeaseStatus::new(lease, now)).collect();
            (leases.paused_since(), shown)
        };
        Status {
            version: env!("CARGO_PKG_VERSION"),
            uptime_seconds: seconds(shared.started.elapsed()),
            paused: paused_since.is_some(),
            paused_since: paused_since.map(|since| since.shown.to_string()),
            leases,
            held: shared.held(),
            connecting: sum(|counters| &counters.connecting),
            active: sum(|counters| &counters.active),
            oldest_seconds: self.oldest().map(seconds),
            rejecting: sum(|counters| &counters.rejecting),
            accepted: sum(|counters| &counters.accepted),
            rejected: sum(|counters| &counters.rejected),
            failed: sum(|counters| &counters.failed),
            left: sum(|counters| &counters.left),
            drained: sum(|counters| &counters.drained),
            killed: sum(|counters| &counters.killed),
            bytes_to_upstream: sum(|counters| &counters.bytes_to_upstream),
            bytes_to_client: sum(|counters| &counters.bytes_to_client),
            upstream: shared.upstream.address().to_string(),
            threads: shared.workers.len(),
            worker_panics: sum(|counters| &counters.panics),
        }
    }

    /// The age of the oldest connection that is carried.
    pub(crate) fn oldest(&self) -> Option<Duration> {
        let begins = self.0.workers.iter().map(|worker| worker.counters.oldest.get());
        let begin = begins.filter_map(|begin| begin.checked_sub(1)).min()?;
        let uptime = sys::now().saturating_duration_since(self.0.started);
        Some(uptime.saturating_sub(Duration::from_millis(begin)))
    }
}

impl LeaseStatus {
    fn new(lease: &Lease, now: Instant) -> Self {
        let (terms, ends) = (&lease.terms, lease.ends);
        Self {
            name: terms.name.clone(),
            reason: terms.reason.clone(),
            by: terms.by.clone(),
            mode: mode_name(terms.mode),
            since: lease.since.shown.to_string(),
            expires_in_seconds: ends.map(|end| seconds(end.saturating_duration_since(now))),
            drain_quiet_seconds: terms.quiet.map(seconds),
        }
    }
}

/// Rounds a time to milliseconds, so that JSON shows no more digits.
fn seconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1_000.0).round() / 1_000.0
}

impl Shared {
    /// What the workers are to do.
    pub(crate) fn phase(&self) -> Phase {
        match (self.stop_level.load(Ordering::Acquire), self.stop_deadline.get()) {
            (STOPPING, Some(&deadline)) => Phase::Stopping { deadline },
            (ABORTING, _) => Phase::Aborting,
            _ => Phase::Running,
        }
    }

    /// Begins to stop; the first call sets the deadline.
    pub(crate) fn stop(&self) {
        let now = sys::now();
        // A grace period beyond the clock's range is a day.
        let day = Duration::from_secs(24 * 60 * 60);
        self.stop_deadline.get_or_init(|| now.checked_add(self.grace_period).unwrap_or(now + day));
        self.raise_stop_level(STOPPING);
    }

    /// Closes everything.
    pub(crate) fn abort(&self) {
        self.raise_stop_level(ABORTING);
    }

    /// Whether everything is to be closed at once.
    pub(crate) fn is_aborting(&self) -> bool {
        self.phase() == Phase::Aborting
    }

    /// When a stop ends, if one has begun.
    pub(crate) fn stop_deadline(&self) -> Option<Instant> {
        self.stop_deadline.get().copied()
    }

    /// A worker has closed its listener.
    pub(crate) fn stopped_listening(&self) {
        if self.listening.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.wake_all();
        }
    }

    /// Whether a worker still listens, and may send clients to others.
    pub(crate) fn is_listening(&self) -> bool {
        self.listening.load(Ordering::Acquire) > 0
    }

    /// What the worker `index` counts.
    #[expect(clippy::indexing_slicing, reason = "each worker has a handle")]
    pub(crate) fn counters(&self, index: usize) -> &Counters {
        &self.workers[index].counters
    }

    /// The worker other than `except` with the fewest clients, and how many.
    pub(crate) fn least_loaded(&self, except: usize) -> Option<(usize, u64)> {
        let load = |worker: &WorkerHandle| worker.counters.clients() + worker.mailbox.len() as u64;
        let others = self.workers.iter().enumerate().filter(|&(index, _desk)| index != except);
        others.map(|(index, worker)| (index, load(worker))).min_by_key(|&(_index, load)| load)
    }

    /// Sends a client to the worker `index`; gives it back when that worker's mailbox is full.
    pub(crate) fn send(&self, index: usize, arrival: Accepted) -> Result<(), Accepted> {
        match self.workers.get(index) {
            Some(worker) => {
                worker
                    .mailbox
                    .try_send(arrival)
                    .map_err(crossbeam_channel::TrySendError::into_inner)?;
                worker.wake();
                Ok(())
            }
            None => Err(arrival),
        }
    }

    /// Resets every connection that has a pass, soon.
    pub(crate) fn reset_all(&self) {
        self.orders.reset_all();
        self.wake_all();
    }

    /// Has connections closed that are silent for so long; `None` takes it back.
    pub(crate) fn close_quiet(&self, quiet: Option<Duration>) {
        self.orders.close_quiet(quiet);
        self.wake_all();
    }

    /// Lets the `count` oldest of those who are held through in spite of the pause, or as many as there are. Returns how
    /// many.
    pub(crate) fn bypass(&self, count: u64) -> u64 {
        let count = count.min(self.held());
        self.line.bypass(count, sys::now());
        self.wake_all();
        count
    }

    /// The place of a client that is to be accepted, if it will need one.
    pub(crate) fn try_reserve(&self) -> Result<Option<Permit>, Full> {
        match self.gate.mode() {
            Some(Mode::Hold) => self.hold.try_reserve(),
            None | Some(Mode::Reject) => Ok(None),
        }
    }

    /// What becomes of a client that is not let through now, and may have a place already.
    pub(crate) fn hold_decision(&self, place: Option<Permit>) -> HoldDecision {
        match (self.gate.mode(), place) {
            (Some(Mode::Reject), _) => HoldDecision::Reject,
            (Some(Mode::Hold), None) => self.hold.decide(),
            // Without a pause, it waits for its turn behind others.
            (None | Some(Mode::Hold), place) => HoldDecision::Hold(place),
        }
    }

    /// Whether a worker waits for a place of whatever kind that has become free.
    pub(crate) fn take_wanted(&self) -> bool {
        self.slots.take_wanted()
            | self.reject_policy.handshakes().take_wanted()
            | self.hold.take_wanted()
            | self.line.under_way().take_wanted()
            | self.upstream.outage().take_wanted()
    }

    /// A moment in milliseconds after the start.
    pub(crate) fn millis(&self, at: Instant) -> u64 {
        u64::try_from(at.saturating_duration_since(self.started).as_millis())
            .unwrap_or(u64::MAX - 1)
    }

    /// Ends the wait of one worker.
    pub(crate) fn wake(&self, worker: usize) {
        if let Some(worker) = self.workers.get(worker) {
            worker.wake();
        }
    }

    /// How many clients are held.
    pub(crate) fn held(&self) -> u64 {
        self.workers.iter().map(|worker| worker.counters.held.get()).sum()
    }

    /// Has all connections reset that lead back to tcpause itself.
    pub(crate) fn reset_loops(&self) {
        self.orders.reset_loops();
        self.wake_all();
    }

    /// Ends every worker's wait.
    pub(crate) fn wake_all(&self) {
        self.workers.iter().for_each(WorkerHandle::wake);
    }

    fn raise_stop_level(&self, level: u8) {
        self.stop_level.fetch_max(level, Ordering::AcqRel);
        self.wake_all();
    }
}

#[cfg(test)]
impl Shared {
    /// For tests of what does without workers.
    pub(crate) fn without_workers() -> Arc<Self> {
        let addr = crate::config::address::Address::tcp("127.0.0.1", 9);
        let settings = crate::config::UpstreamConfig { addr, ..Default::default() };
        let guard = crate::upstream::loop_guard::LoopGuard::default();
        let upstream = Upstream::new(settings, guard).expect("another address");
        Arc::new(Self {
            gate: Arc::new(Gate::new()),
            barrier: Barrier::new(0),
            slots: Arc::new(Semaphore::new(1)),
            accept_troubles: AcceptTroubles::default(),
            upstream: Arc::new(upstream),
            reject_policy: RejectPolicy::new(
                crate::connection::reject::policy::RejectResponse::Close,
                None,
            ),
            default_mode: Mode::Hold,
            orders: DrainOrders::default(),
            hold: HoldLimits::new(&crate::config::HoldConfig::default()),
            line: WaitQueue::new(0, &crate::config::ResumeConfig::default()),
            pipes_per_worker: 0,
            grace_period: Duration::ZERO,
            workers: [].into(),
            listening: AtomicUsize::new(0),
            started: Instant::now(),
            ledger: Pauses::new(None).0,
            stop_level: AtomicU8::new(0),
            stop_deadline: OnceLock::new(),
        })
    }
}

impl WorkerHandle {
    fn wake(&self) {
        // Writing to an eventfd fails only when it is full, and then the worker is awake.
        self.waker.wake().ok();
    }
}
