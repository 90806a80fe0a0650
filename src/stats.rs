//! What one worker counts: written by that worker alone, read by whoever asks for the status.

use std::sync::atomic::{AtomicU64, Ordering};

/// A number with one writer. Plain loads and stores: no locked instruction on the way of a byte.
#[derive(Debug, Default)]
pub(crate) struct Count(AtomicU64);

/// The numbers of one worker, on cache lines of their own (two, since processors fetch them in pairs).
#[derive(Debug, Default)]
#[repr(align(128))]
pub(crate) struct Counters {
    /// Clients that wait for the resume, now.
    pub(crate) held: Count,
    /// Connections whose upstream is being dialled, now.
    pub(crate) connecting: Count,
    /// Connections that are carried, now.
    pub(crate) active: Count,
    /// When the oldest of these began, in milliseconds after the start of the proxy and one more; 0 if there is none.
    pub(crate) oldest: Count,
    /// Clients that are being rejected, now.
    pub(crate) rejecting: Count,
    /// Clients accepted.
    pub(crate) accepted: Count,
    /// Clients rejected.
    pub(crate) rejected: Count,
    /// Connections whose upstream could not be reached.
    pub(crate) failed: Count,
    /// Clients that left before they were served.
    pub(crate) left: Count,
    /// Connections closed because they were quiet during a pause.
    pub(crate) drained: Count,
    /// Connections reset because a pause was not to wait for them.
    pub(crate) killed: Count,
    /// How often the worker has panicked; written by its supervisor, on the same thread.
    pub(crate) panics: Count,
    /// Bytes carried from clients to the upstream.
    pub(crate) bytes_to_upstream: Count,
    /// Bytes carried from the upstream to clients.
    pub(crate) bytes_to_client: Count,
}

impl Count {
    /// The number now.
    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// Sets the number; for its one writer.
    pub(crate) fn set(&self, number: u64) {
        self.0.store(number, Ordering::Relaxed);
    }

    /// Adds to the number; for its one writer.
    pub(crate) fn add(&self, more: u64) {
        self.set(self.get() + more);
    }
}

impl Counters {
    /// How many clients the worker has, in whatever state.
    pub(crate) fn clients(&self) -> u64 {
        [&self.held, &self.connecting, &self.active, &self.rejecting]
            .into_iter()
            .map(Count::get)
            .sum()
    }
}
