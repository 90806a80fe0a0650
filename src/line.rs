//! The line: who of those that wait is the next, over all workers.
//!
//! Every worker has its own queue, and shows here when the first of it came. Whoever came before all others may go, so that
//! who is served first does not depend on which worker has accepted whom.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Instant,
};

/// Shown where nobody waits.
const NOBODY: u64 = u64::MAX;

/// The first of each worker's queue, and how many may go in spite of a pause.
#[derive(Debug)]
pub(crate) struct Line {
    begin: Instant,
    /// When the first of each worker came, in nanoseconds after `begin`.
    firsts: Box<[AtomicU64]>,
    /// How many may go in spite of the pause.
    let_through: AtomicU64,
    /// When the last of those came.
    let_through_until: AtomicU64,
}

impl Line {
    /// The line of so many workers.
    pub(crate) fn new(workers: usize) -> Self {
        Self {
            begin: Instant::now(),
            firsts: (0..workers).map(|_| AtomicU64::new(NOBODY)).collect(),
            let_through: AtomicU64::new(0),
            let_through_until: AtomicU64::new(0),
        }
    }

    /// Lets `count` more of those who have come until now go in spite of the pause.
    pub(crate) fn let_through(&self, count: u64, now: Instant) {
        self.let_through_until.store(self.nanos(now), Ordering::SeqCst);
        self.let_through.fetch_add(count, Ordering::SeqCst);
    }

    /// Lets nobody through any more.
    pub(crate) fn let_nobody_through(&self) {
        self.let_through.store(0, Ordering::SeqCst);
    }

    fn nanos(&self, at: Instant) -> u64 {
        u64::try_from(at.saturating_duration_since(self.begin).as_nanos()).unwrap_or(NOBODY - 1)
    }
}
