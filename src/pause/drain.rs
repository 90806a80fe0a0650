//! Orders to all workers: to close quiet connections and half-closed held clients during a pause, to reset connections that
//! are left, and to reset loops.
//! `worker/` carries them out; `Flow::drain` of the relay is another matter.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use crate::config::{HalfClosed, duration::nanos};

/// Orders to all workers. A thread that changes one has to wake them.
#[derive(Debug, Default)]
pub(crate) struct DrainOrders {
    /// Nanoseconds for which a connection may be silent; 0 for ever.
    quiet: AtomicU64,
    /// Nanoseconds for which an idle session of PostgreSQL may be silent; 0 for ever.
    postgres_quiet: AtomicU64,
    /// Number of changes between serving and dropping half-closed held clients; odd while they are dropped.
    half_closed: AtomicU64,
    /// Number of orders to reset all connections.
    resets: AtomicU64,
    /// Number of orders to reset connections that lead back to tcpause itself.
    loop_resets: AtomicU64,
}

impl DrainOrders {
    /// Orders workers to close connections that are silent for `quiet`, and idle sessions of PostgreSQL that are silent for
    /// `postgres`. `None` takes an order back.
    pub(crate) fn close_quiet(&self, quiet: Option<Duration>, postgres: Option<Duration>) {
        self.quiet.store(quiet.map_or(0, nanos), Ordering::Release);
        self.postgres_quiet.store(postgres.map_or(0, nanos), Ordering::Release);
    }

    /// Returns the time for which a connection may be silent, if it is limited.
    pub(crate) fn quiet(&self) -> Option<Duration> {
        limit(&self.quiet)
    }

    /// Returns the time for which an idle session of PostgreSQL may be silent, if it is limited.
    pub(crate) fn postgres_quiet(&self) -> Option<Duration> {
        limit(&self.postgres_quiet)
    }

    /// Orders workers to drop held clients that have ended their stream, or takes the order back. The leases' lock orders
    /// the calls.
    pub(crate) fn treat_half_closed(&self, treatment: HalfClosed) {
        if self.drops_half_closed() != (treatment == HalfClosed::Drop) {
            self.half_closed.fetch_add(1, Ordering::AcqRel);
        }
    }

    /// Returns true if held clients that have ended their stream are dropped.
    pub(crate) fn drops_half_closed(&self) -> bool {
        self.half_closed_changes() % 2 == 1
    }

    /// Returns the number of changes of their treatment. A worker compares it with the number that it has obeyed.
    pub(crate) fn half_closed_changes(&self) -> u64 {
        self.half_closed.load(Ordering::Acquire)
    }

    /// Orders workers to reset all connections that have a pass.
    pub(crate) fn reset_all(&self) {
        self.resets.fetch_add(1, Ordering::AcqRel);
    }

    /// Returns the number of orders to reset all connections. A worker compares it with the number that it has obeyed.
    pub(crate) fn resets(&self) -> u64 {
        self.resets.load(Ordering::Acquire)
    }

    /// Orders workers to reset connections that lead back to tcpause itself.
    pub(crate) fn reset_loops(&self) {
        self.loop_resets.fetch_add(1, Ordering::AcqRel);
    }

    /// Returns the number of orders to reset connections that lead back to tcpause itself.
    pub(crate) fn loop_resets(&self) -> u64 {
        self.loop_resets.load(Ordering::Acquire)
    }
}

fn limit(nanos: &AtomicU64) -> Option<Duration> {
    match nanos.load(Ordering::Acquire) {
        0 => None,
        nanos => Some(Duration::from_nanos(nanos)),
    }
}
