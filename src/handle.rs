//! `Handle`: pauses, resumes and observes a running proxy.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

use crate::{
    pause::{
        Pauses,
        leases::{Lease, mode_name},
    },
    shared::{Phase, Shared},
    stats::{Count, Counters},
    sys,
};

/// Handle that pauses, resumes and observes a running proxy. Clones act on the same proxy.
#[derive(Debug, Clone)]
pub struct Handle(Arc<Shared>);

/// A snapshot of the proxy, as `GET /status` shows it.
///
/// Fields that an older proxy does not show are zero when they are read.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// The version of tcpause.
    pub version: String,
    /// Seconds since the proxy started.
    pub uptime_seconds: f64,
    /// True while new clients are held or rejected.
    pub paused: bool,
    /// Time at which the pause began, in RFC 3339; null while the proxy is not paused.
    pub paused_since: Option<String>,
    /// Pauses that hold now.
    #[serde(default)]
    pub leases: Vec<LeaseStatus>,
    /// Clients that wait for the resume, for their turn, or for an upstream that is away.
    pub held: u64,
    /// Clients whose upstream is being dialled.
    pub connecting: u64,
    /// Connections that are relayed.
    pub active: u64,
    /// Age of the oldest relayed connection, in seconds; null without one.
    pub oldest_seconds: Option<f64>,
    /// Clients that are being rejected, or closed in good order, such as quiet ones.
    pub rejecting: u64,
    /// Clients accepted since the start.
    #[serde(default)]
    pub accepted: u64,
    /// Clients rejected since the start, with any answer.
    #[serde(default)]
    pub rejected: u64,
    /// Connections whose upstream could not be reached since the start.
    #[serde(default)]
    pub failed: u64,
    /// Clients that left before they were served since the start.
    #[serde(default)]
    pub left: u64,
    /// Connections that a pause or a stop has closed as quiet since the start.
    #[serde(default)]
    pub drained: u64,
    /// Connections that were reset as they had not ended in time for a pause since the start.
    #[serde(default)]
    pub killed: u64,
    /// Bytes carried from clients to the upstream.
    pub bytes_to_upstream: u64,
    /// Bytes carried from the upstream to clients.
    pub bytes_to_client: u64,
    /// The upstream as configured.
    pub upstream: String,
    /// The number of worker threads.
    #[serde(default)]
    pub threads: usize,
    /// Panics of workers since the start. Each one costs that worker's connections, and is a defect of tcpause.
    #[serde(default)]
    pub worker_panics: u64,
}

/// One of the pauses that hold, as `GET /status` shows it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LeaseStatus {
    /// Name of the pause.
    pub name: String,
    /// Reason given by the caller; null without one.
    pub reason: Option<String>,
    /// Caller that paused: an address, or the user and the process of a UNIX caller.
    pub by: String,
    /// Treatment of new clients: `hold` or `reject`.
    pub mode: String,
    /// Time since which a pause of this name holds, in RFC 3339.
    pub since: String,
    /// Seconds until it ends by itself; null for never.
    pub expires_in_seconds: Option<f64>,
    /// Seconds for which a connection may be silent before it is closed; null for ever.
    pub drain_quiet_seconds: Option<f64>,
}

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

    /// Ends all pauses, whichever caller began them, and serves held clients, oldest first. Returns true if the proxy
    /// was paused before. It first looks the upstream's name up, for a second at most.
    pub fn resume(&self) -> bool {
        self.pauses().lift(None, "the program")
    }

    /// Returns true while the proxy is paused.
    pub fn is_paused(&self) -> bool {
        self.pauses().gate.is_paused()
    }

    /// Returns true if no connection is relayed or connecting at this moment. Held and rejected clients do not count.
    pub fn is_idle(&self) -> bool {
        self.pauses().gate.passes() == 0
    }

    /// Waits until no connection is relayed or connecting. Returns false if `timeout` is over first.
    pub fn wait_idle(&self, timeout: Option<Duration>) -> bool {
        // A timeout beyond the clock's range means none.
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        self.pauses().gate.wait_idle(deadline)
    }

    /// Returns a snapshot of the proxy. The counts are read one after the other while the proxy goes on.
    pub fn status(&self) -> Status {
        let Shared { pauses, workers, upstream, started, .. } = &*self.0;
        let sum = |count: fn(&Counters) -> &Count| workers.sum(count);
        let now = sys::now();
        let (paused_since, leases) = {
            let leases = pauses.lock();
            let shown = leases.iter().map(|lease| LeaseStatus::new(lease, now)).collect();
            (leases.paused_since(), shown)
        };
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            uptime_seconds: seconds(started.elapsed()),
            paused: paused_since.is_some(),
            paused_since: paused_since.map(|since| since.shown.to_string()),
            leases,
            held: workers.held(),
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
            upstream: upstream.address().to_string(),
            threads: workers.len(),
            worker_panics: sum(|counters| &counters.panics),
        }
    }

    /// Returns the pauses of the proxy.
    pub(crate) fn pauses(&self) -> &Pauses {
        &self.0.pauses
    }

    /// Returns true once a stop has begun.
    pub(crate) fn is_stopping(&self) -> bool {
        self.0.phase() != Phase::Running
    }

    /// Returns the age of the oldest relayed connection.
    pub(crate) fn oldest(&self) -> Option<Duration> {
        let began = self.0.workers.oldest_began()?;
        let uptime = sys::now().saturating_duration_since(self.0.started);
        Some(uptime.saturating_sub(Duration::from_millis(began)))
    }
}

impl LeaseStatus {
    fn new(lease: &Lease, now: Instant) -> Self {
        let (terms, ends) = (&lease.terms, lease.ends);
        Self {
            name: terms.name.clone(),
            reason: terms.reason.clone(),
            by: terms.by.clone(),
            mode: mode_name(terms.mode).to_owned(),
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
