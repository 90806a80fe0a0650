//! `Metrics`: the numbers that `GET /metrics` shows besides the status.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use super::Status;
use crate::{
    log_limit::LOG_LINES_DROPPED,
    pause::leases::Lease,
    shared::Shared,
    stats::{
        Count, Counters, Waits,
        cause::ConnectResult,
        histogram::{Histogram, HistogramSnapshot},
    },
    sys,
    timestamp::Rfc3339,
};

/// Numbers of a proxy for its metrics.
#[derive(Debug)]
pub(crate) struct Metrics {
    pub(crate) status: Status,
    /// Moment of the beginning of the present pause, by the wall clock, in seconds after 1970.
    pub(crate) paused_since: Option<f64>,
    /// Moment of the latest expiry, if all pauses expire.
    pub(crate) resume_expected: Option<f64>,
    /// Pauses that have begun, without renewals.
    pub(crate) pauses: u64,
    /// Pauses that have ended, by how.
    pub(crate) pauses_ended: [(&'static str, u64); 4],
    /// Lines that the log has dropped.
    pub(crate) log_lines_dropped: u64,
    /// Failures to accept a client, by reason.
    pub(crate) accept_errors: [(&'static str, u64); 3],
    /// Dials of addresses, by result.
    pub(crate) connect_attempts: [(&'static str, u64); ConnectResult::ALL.len()],
    /// Holds of clients, by outcome.
    pub(crate) hold: [(&'static str, HistogramSnapshot); 3],
    /// Waits for an upstream that was away, by outcome.
    pub(crate) outage: [(&'static str, HistogramSnapshot); 3],
    pub(crate) connect: HistogramSnapshot,
    pub(crate) life: HistogramSnapshot,
    /// Bytes spliced to the upstream, and to clients.
    pub(crate) spliced: (u64, u64),
    pub(crate) upstream_down: Duration,
    /// Look-ups of the upstream's name that have succeeded, and that have failed.
    pub(crate) look_ups: (u64, u64),
    /// Switches to another upstream that were done, and that were refused.
    pub(crate) switches: (u64, u64),
    /// Upgrades that have succeeded, and that have failed.
    pub(crate) upgrades: (u64, u64),
    /// Time of each worker outside of its wait for events.
    pub(crate) busy: Vec<Duration>,
    /// Pipes with bytes in them, empty ones, and the most of all workers.
    pub(crate) pipes: (u64, u64, u64),
}

impl Metrics {
    /// Reads all numbers.
    pub(super) fn new(shared: &Shared) -> Self {
        let Shared { pauses, workers, upstream, .. } = shared;
        let sum = |count: fn(&Counters) -> &Count| workers.sum(count);
        // A clock that was set since must not move a moment to come.
        let unix = |at: Instant| {
            Rfc3339::now().after(at.saturating_duration_since(sys::now())).unix_seconds()
        };
        let (paused_since, resume_expected) = {
            let leases = pauses.lock();
            let ends = leases.iter().map(|lease: &Lease| lease.ends).collect::<Option<Vec<_>>>();
            let last = ends.and_then(|ends| ends.into_iter().max());
            (leases.paused_since().map(|since| since.shown.unix_seconds()), last.map(unix))
        };
        let waits = |waits: fn(&Counters) -> &Waits| {
            let sum =
                |one: fn(&Waits) -> &_| Histogram::sum(workers.each().map(|it| one(waits(it))));
            [
                ("served", sum(|waits| &waits.served)),
                ("left", sum(|waits| &waits.left)),
                ("refused", sum(|waits| &waits.refused)),
            ]
        };
        let dials = |result: ConnectResult| {
            let of = |it: &Counters| it.dials.get(result as usize).map_or(0, Count::get);
            (result.word(), workers.each().map(of).sum())
        };
        let number = |atomic: &AtomicU64| atomic.load(Ordering::Relaxed);
        let [found, lost] = &upstream.look_ups;
        let [done, refused] = &upstream.switches;
        let counts = &pauses.counts;
        let upgrades = shared.upgrades.describe();
        Self {
            status: Status::new(shared),
            paused_since,
            resume_expected,
            pauses: number(&counts.begun),
            pauses_ended: [
                ("lifted", number(&counts.lifted)),
                ("expired", number(&counts.expired)),
                ("undone", number(&counts.undone)),
                ("caller-gone", number(&counts.caller_gone)),
            ],
            log_lines_dropped: number(&LOG_LINES_DROPPED),
            accept_errors: [
                ("descriptors", sum(|it| &it.accept_errors[0])),
                ("memory", sum(|it| &it.accept_errors[1])),
                ("other", sum(|it| &it.accept_errors[2])),
            ],
            connect_attempts: ConnectResult::ALL.map(dials),
            hold: waits(|counters| &counters.hold),
            outage: waits(|counters| &counters.outage),
            connect: Histogram::sum(workers.each().map(|it| &it.connect)),
            life: Histogram::sum(workers.each().map(|it| &it.life)),
            spliced: (sum(|it| &it.spliced_to_upstream), sum(|it| &it.spliced_to_client)),
            upstream_down: upstream.breaker().time_away(),
            look_ups: (number(found), number(lost)),
            switches: (number(done), number(refused)),
            upgrades: (upgrades.count, upgrades.failed),
            busy: workers.each().map(|it| Duration::from_nanos(it.busy_nanos.get())).collect(),
            pipes: (
                sum(|it| &it.pipes[0]),
                sum(|it| &it.pipes[1]),
                (shared.pipes_per_worker * workers.len()) as u64,
            ),
        }
    }
}
