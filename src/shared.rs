//! `Shared`: the parts of a proxy that its threads share. On the way of a byte, workers read it without a lock; the few
//! moments with one are listed under the invariants of `src/README.md`.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicU8, Ordering},
    },
    time::{Duration, Instant},
};

use crate::{
    admission::{
        Admission,
        hold::{Full, HoldDecision},
        semaphore::Permit,
    },
    config::{LogConfig, address::Address},
    connection::{ConnectTicket, reject::policy::RejectPolicy},
    fleet_view::FleetView,
    handover::{freeze::Freeze, request::UpgradeRequests, upgrades::Upgrades},
    pause::{
        Pauses,
        gate::{Mode, Pass},
        steer::Steer,
    },
    proxy_header::ProxyHeaders,
    stats::{Count, Counters, cause::CloseCause},
    sys::{self, socket_file::SocketFile},
    upstream::Upstream,
    worker_pool::WorkerPool,
};

/// Parts of a proxy that its threads share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) pauses: Arc<Pauses>,
    pub(crate) admission: Admission,
    pub(crate) upstream: Arc<Upstream>,
    pub(crate) reject_policy: RejectPolicy,
    pub(crate) proxy_headers: ProxyHeaders,
    pub(crate) workers: Arc<WorkerPool>,
    /// Lines about ended connections.
    pub(crate) log: LogConfig,
    pub(crate) shutdown: Shutdown,
    /// Standstill of the threads during a hand-over.
    pub(crate) freeze: Freeze,
    /// Largest number of pipes of a worker.
    pub(crate) pipes_per_worker: usize,
    pub(crate) started: Instant,
    /// Addresses that clients connect to.
    pub(crate) listeners: Box<[Address]>,
    pub(crate) socket_files: SocketFiles,
    /// Address of the control API.
    pub(crate) control_addr: Address,
    pub(crate) config_file: Option<PathBuf>,
    pub(crate) upgrade_requests: UpgradeRequests,
    pub(crate) upgrades: Upgrades,
    /// Empty where the proxy is in no fleet.
    pub(crate) fleet: FleetView,
}

/// Files of UNIX listeners. Each goes before its listener, as another process may take over a file without one.
#[derive(Debug, Default)]
pub(crate) struct SocketFiles {
    pub(crate) proxy: Mutex<Option<SocketFile>>,
    /// Those of the control API and of the monitor.
    pub(crate) control: Mutex<Vec<SocketFile>>,
}

/// State of a shutdown. It only ever advances.
#[derive(Debug)]
pub(crate) struct Shutdown {
    /// Time that connections may go on after a stop.
    grace_period: Duration,
    /// Level of the shutdown, which is never lowered.
    level: AtomicU8,
    deadline: OnceLock<Instant>,
}

/// Phase of the proxy's life, which tells workers how to treat connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Accept and serve clients.
    Running,
    /// Do not listen any more; connections may go on until the deadline.
    Stopping { deadline: Instant },
    /// Close every connection.
    Aborting,
}

// Levels of `Shutdown`; below them the proxy runs.
const STOPPING: u8 = 1;
const ABORTING: u8 = 2;

impl Shared {
    /// Returns the present phase.
    pub(crate) fn phase(&self) -> Phase {
        self.shutdown.phase()
    }

    /// Begins to stop, and wakes the workers. The first call sets the deadline.
    pub(crate) fn stop(&self) {
        self.shutdown.begin();
        self.pauses.steer().into_iter().for_each(Steer::suspend);
        self.workers.wake_all();
    }

    /// Makes the workers close every connection at once.
    pub(crate) fn abort(&self) {
        self.shutdown.raise(ABORTING);
        self.pauses.steer().into_iter().for_each(Steer::suspend);
        self.workers.wake_all();
    }

    /// Makes the workers reset connections that lead back to tcpause itself.
    pub(crate) fn reset_loops(&self) {
        self.pauses.drain.reset_loops();
        self.workers.wake_all();
    }

    /// Reserves a hold permit before `accept` if the client will need one.
    pub(crate) fn try_reserve(&self) -> Result<Option<Permit>, Full> {
        match self.pauses.gate.mode() {
            Some(Mode::Hold) => self.admission.hold.try_reserve(),
            None | Some(Mode::Reject) => Ok(None),
        }
    }

    /// Decides about a client that is not admitted now. It brings its hold permit, if it has one.
    pub(crate) fn hold_decision(&self, permit: Option<Permit>) -> HoldDecision {
        match (self.pauses.gate.mode(), permit) {
            (Some(Mode::Reject), _) => HoldDecision::Reject(CloseCause::Rejected),
            (Some(Mode::Hold), None) => self.admission.hold.decide(),
            // Without a pause, the client waits behind others, and `hold.max` does not apply.
            (None | Some(Mode::Hold), permit) => HoldDecision::Hold(permit),
        }
    }

    /// Returns the time from which the head of a worker's queue, which came at `arrived`, may start. None while it has to
    /// wait for an earlier client, a resume or a permit, each of which wakes the worker.
    pub(crate) fn may_start_at(
        &self,
        worker: usize,
        arrived: Instant,
        now: Instant,
    ) -> Option<Instant> {
        let queue = &self.admission.queue;
        if !queue.is_head(worker, arrived) {
            return None;
        }
        match self.pauses.gate.is_paused() {
            true if !queue.lets_bypass(arrived) => None,
            // Only without a pause: a client that bypasses one dials even with an open breaker, to find out.
            false if self.upstream.breaker().is_open() => self.upstream.breaker().probe_at(),
            _ => queue.under_way().is_any_free_or_wish().then(|| queue.next_at().unwrap_or(now)),
        }
    }

    /// Takes a pass and a ticket for that client, if it may start now.
    pub(crate) fn try_start(
        &self,
        worker: usize,
        arrived: Instant,
        now: Instant,
    ) -> Option<(Pass, ConnectTicket)> {
        self.may_start_at(worker, arrived, now).filter(|&at| at <= now)?;
        let (queue, gate, breaker) =
            (&self.admission.queue, &self.pauses.gate, self.upstream.breaker());
        let ticket = if breaker.is_open() && !gate.is_paused() {
            ConnectTicket::Probe {
                _permit: breaker.take_probe()?,
                under_way: queue.pace().take(now),
            }
        } else {
            ConnectTicket::Window(queue.try_acquire(now)?)
        };
        let pass = match gate.enter() {
            Some(pass) => pass,
            None if queue.lets_bypass(arrived) => {
                // Counted before its right is used up, or the proxy would look idle in between.
                let pass = gate.enter_bypassing();
                queue.take_bypass(arrived).then_some(pass)?
            }
            None => return None,
        };
        Some((pass, ticket))
    }

    /// Takes a pass and a ticket for a client that comes while no other waits. No window bounds it, and with an open
    /// breaker it is a probe.
    pub(crate) fn try_start_alone(&self) -> Option<(Pass, ConnectTicket)> {
        let breaker = self.upstream.breaker();
        let ticket = if breaker.is_open() {
            ConnectTicket::Probe { _permit: breaker.take_probe()?, under_way: None }
        } else {
            ConnectTicket::Alone
        };
        Some((self.pauses.gate.enter()?, ticket))
    }

    /// Returns true once if a worker waits for a permit of any kind that has become free.
    pub(crate) fn take_wanted(&self) -> bool {
        self.admission.take_wanted()
            | self.reject_policy.handshakes().take_wanted()
            | self.upstream.breaker().take_wanted()
    }

    /// Returns the age of the oldest client that a counter of the workers tells.
    pub(crate) fn age_of_oldest(&self, oldest: fn(&Counters) -> &Count) -> Option<Duration> {
        let began = self.workers.oldest(oldest)?;
        let uptime = sys::now().saturating_duration_since(self.started);
        Some(uptime.saturating_sub(Duration::from_millis(began)))
    }

    /// Returns the number of clients in whatever state.
    pub(crate) fn clients(&self) -> u64 {
        self.workers.each().map(Counters::clients).sum()
    }

    /// Returns the addresses at which each worker can have a listener.
    pub(crate) fn joinable(&self) -> impl Iterator<Item = SocketAddr> {
        self.listeners.iter().filter_map(|address| match address {
            Address::Tcp { host, port } => Some(SocketAddr::new(host.parse().ok()?, *port)),
            Address::Unix(_) | Address::Abstract(_) => None,
        })
    }

    /// Returns `at` in milliseconds after the start.
    pub(crate) fn millis(&self, at: Instant) -> u64 {
        u64::try_from(at.saturating_duration_since(self.started).as_millis())
            .unwrap_or(u64::MAX - 1)
    }
}

impl SocketFiles {
    /// Adds the file of the proxy's listener.
    pub(crate) fn add_of_proxy(&self, file: Option<SocketFile>) {
        *self.proxy.lock().unwrap_or_else(PoisonError::into_inner) = file;
    }

    /// Adds a file of the control API or of the monitor.
    pub(crate) fn add_of_control(&self, file: SocketFile) {
        self.control.lock().unwrap_or_else(PoisonError::into_inner).push(file);
    }

    /// Returns true if a file at `path` is among them.
    pub(crate) fn has(&self, path: &Path) -> bool {
        let proxy = self.proxy.lock().unwrap_or_else(PoisonError::into_inner);
        let control = self.control.lock().unwrap_or_else(PoisonError::into_inner);
        proxy.iter().chain(control.iter()).any(|file| file.path() == path)
    }

    /// Removes the file of the proxy's listener.
    pub(crate) fn remove_of_proxy(&self) {
        drop(self.proxy.lock().unwrap_or_else(PoisonError::into_inner).take());
    }

    /// Removes the files of the control API and of the monitor.
    pub(crate) fn remove_of_control(&self) {
        self.control.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

impl Shutdown {
    /// Returns the state of a running proxy.
    pub(crate) fn new(grace_period: Duration) -> Self {
        Self { grace_period, level: AtomicU8::new(0), deadline: OnceLock::new() }
    }

    /// Returns the end of the grace period if a stop has begun.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.deadline.get().copied()
    }

    fn phase(&self) -> Phase {
        match (self.level.load(Ordering::Acquire), self.deadline()) {
            (STOPPING, Some(deadline)) => Phase::Stopping { deadline },
            (ABORTING, _) => Phase::Aborting,
            _ => Phase::Running,
        }
    }

    fn begin(&self) {
        let now = sys::now();
        // A grace period beyond the clock's range is a day.
        let day = Duration::from_secs(24 * 60 * 60);
        self.deadline.get_or_init(|| now.checked_add(self.grace_period).unwrap_or(now + day));
        self.raise(STOPPING);
    }

    fn raise(&self, level: u8) {
        self.level.fetch_max(level, Ordering::AcqRel);
    }
}
