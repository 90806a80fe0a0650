//! What is asked of all workers at once: by the operator during a pause, beside the pause itself, and of loops.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use crate::config::duration::nanos;

/// Orders to all workers. Whoever changes one wakes them.
#[derive(Debug, Default)]
pub(crate) struct DrainOrders {
    /// For how many nanoseconds a connection may be silent; 0 for ever.
    quiet: AtomicU64,
    /// How often all connections were to be reset.
    resets: AtomicU64,
    /// How often the connections that lead back to tcpause itself were to be reset.
    loop_resets: AtomicU64,
}

impl DrainOrders {
    /// Has connections closed that are silent for so long; `None` takes it back.
    pub(crate) fn close_quiet(&self, quiet: Option<Duration>) {
        self.quiet.store(quiet.map_or(0, nanos), Ordering::Release);
    }

    /// For how long a connection may be silent, if that matters.
    pub(crate) fn quiet(&self) -> Option<Duration> {
        match self.quiet.load(Ordering::Acquire) {
            0 => None,
            nanos => Some(Duration::from_nanos(nanos)),
        }
    }

    /// Has all connections reset that have a pass.
    pub(crate) fn reset_all(&self) {
        self.resets.fetch_add(1, Ordering::AcqRel);
    }

    /// How often they were to be reset: a worker compares it with what it has done.
    pub(crate) fn resets(&self) -> u64 {
        self.resets.load(Ordering::Acquire)
    }

    /// Has all connections reset that lead back to tcpause itself.
    pub(crate) fn reset_loops(&self) {
        self.loop_resets.fetch_add(1, Ordering::AcqRel);
    }

    /// Returns how often they were to be reset.
    pub(crate) fn loop_resets(&self) -> u64 {
        self.loop_resets.load(Ordering::Acquire)
    }
}
