//! `Handle`: pauses, resumes and observes a running proxy.

mod metrics;
mod status;
pub(crate) mod switch;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

pub use crate::pause::steer::SteeringStatus;
pub(crate) use metrics::Metrics;
pub use status::{LeaseStatus, MemberStatus, Status};

use crate::{
    config::address::Address,
    fleet_view::FleetView,
    handover::{freeze::Freeze, request::UpgradeRequests},
    listing::{Filter, Purpose, Selected, Selection},
    pause::Pauses,
    shared::{Phase, Shared},
    stats::Balance,
    sys,
};

/// Longest wait for the workers' lists of connections. A turn takes well below a millisecond, and many waits may end at once.
const LIST_TIMEOUT: Duration = Duration::from_millis(25);

/// Longest wait for the workers' selections, which take many turns.
const SELECT_TIMEOUT: Duration = Duration::from_secs(1);

/// Handle that pauses, resumes and observes a running proxy. Clones act on the same proxy.
#[derive(Debug, Clone)]
pub struct Handle(Arc<Shared>);

impl Handle {
    /// Returns a handle to a proxy.
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self(shared)
    }

    /// Pauses until a resume, or until `pause.max-ttl` is over. Returns true if the proxy was running before.
    ///
    /// Once this has returned, no further client is admitted and no connection to the upstream begins; only if a worker's
    /// turn takes longer than a second, which is logged, it may still begin those of clients that it had admitted. Running
    /// connections go on. Connections under way to the upstream were admitted before, and are counted.
    pub fn pause(&self) -> bool {
        self.pauses().pause()
    }

    /// Ends all pauses, whichever caller began them, but for those of the fleet, and serves held clients, oldest first.
    /// Returns true if the proxy has resumed. It first looks the upstream's name up, for a second at most.
    pub fn resume(&self) -> bool {
        self.pauses().lift(None, "the program")
    }

    /// Returns true while the proxy is paused.
    pub fn is_paused(&self) -> bool {
        self.pauses().gate.is_paused()
    }

    /// Returns true if no connection is relayed or connecting at this moment. Held and rejected clients do not count.
    pub fn is_idle(&self) -> bool {
        let passes = self.pauses().gate.passes();
        passes == 0 || self.pauses().steer().is_some_and(|steer| steer.await_idle(passes))
    }

    /// Waits until no connection is relayed or connecting. Returns false if `timeout` is over first.
    pub fn wait_idle(&self, timeout: Option<Duration>) -> bool {
        // A timeout beyond the clock's range means none.
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        self.is_idle() || self.pauses().gate.wait_idle(deadline)
    }

    /// Registers a callback for each begin and end of a pause and of an outage of the upstream. It runs on the thread that
    /// makes or notices the change, so it must not block.
    pub fn watch(&self, watcher: impl Fn() + Send + Sync + 'static) {
        self.pauses().watch(watcher);
    }

    /// Asks the program that runs the proxy for an upgrade, unless it is about to do one. Returns false if the program does not
    /// upgrade itself.
    pub fn upgrade(&self) -> bool {
        self.upgrade_requests().ask().is_some()
    }

    /// Returns a snapshot of the proxy. The counts of each worker are those of one moment.
    pub fn status(&self) -> Status {
        Status::new(&self.0)
    }

    /// Returns the numbers of the proxy for its metrics.
    pub(crate) fn metrics(&self) -> Metrics {
        Metrics::new(&self.0)
    }

    /// Returns the requests for an upgrade.
    pub(crate) fn upgrade_requests(&self) -> &UpgradeRequests {
        &self.0.upgrade_requests
    }

    /// Returns the standstill of a hand-over.
    pub(crate) fn freeze(&self) -> &Freeze {
        &self.0.freeze
    }

    /// Returns the index of the control API's front in a standstill, which is behind the workers.
    pub(crate) fn front_index(&self) -> usize {
        self.0.workers.len()
    }

    /// Returns the pauses of the proxy.
    pub(crate) fn pauses(&self) -> &Pauses {
        &self.0.pauses
    }

    /// Returns true once a stop has begun.
    pub(crate) fn is_stopping(&self) -> bool {
        self.0.phase() != Phase::Running
    }

    /// Returns the oldest connections that are relayed or connecting, in words. Waits a moment for busy workers.
    pub(crate) fn oldest_connections(&self) -> Vec<String> {
        self.0.workers.oldest_served(LIST_TIMEOUT)
    }

    /// Has all workers select connections. Returns none if one does not answer within a second.
    pub(crate) fn select(&self, filter: Filter, purpose: Purpose) -> Option<Selected> {
        let begun = sys::now();
        let until = begun + SELECT_TIMEOUT;
        self.0.workers.select(Selection { filter, purpose, begun, until })
    }

    /// Returns the address of the control API.
    pub(crate) fn control_addr(&self) -> &Address {
        &self.0.control_addr
    }

    /// Returns the counts of clients, of one moment for each worker.
    pub(crate) fn balance(&self) -> Balance {
        self.0.workers.balance()
    }

    /// Returns the place for the state of the fleet.
    pub(crate) fn fleet(&self) -> &FleetView {
        &self.0.fleet
    }

    /// Returns the age of the oldest relayed connection.
    pub(crate) fn oldest(&self) -> Option<Duration> {
        self.0.age_of_oldest(|counters| &counters.oldest)
    }
}
