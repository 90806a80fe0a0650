//! Counters of one worker: only that worker writes them, and the status reads them.

use std::sync::atomic::{AtomicU64, Ordering};

/// A number with one writer. It needs only plain loads and stores, so no locked instruction lies on the way of a byte.
#[derive(Debug, Default)]
pub(crate) struct Count(AtomicU64);

/// Counters of one worker, on cache lines of their own: two, since processors fetch them in pairs.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(crate) struct Counters {
    /// Present number of clients that wait without a pass: for the resume, for their turn, or for an absent upstream.
    pub(crate) held: Count,
    /// Present number of clients whose upstream is being dialled.
    pub(crate) connecting: Count,
    /// Present number of connections that are relayed.
    pub(crate) active: Count,
    /// Beginning of the oldest relayed connection, in milliseconds after the start of the proxy, plus one; 0 if there
    /// is none.
    pub(crate) oldest: Count,
    /// Present number of clients that are being rejected, or closed in good order.
    pub(crate) rejecting: Count,
    /// Clients accepted.
    pub(crate) accepted: Count,
    /// Clients rejected.
    pub(crate) rejected: Count,
    /// Connections whose upstream could not be reached.
    pub(crate) failed: Count,
    /// Clients that left before they were served.
    pub(crate) left: Count,
    /// Connections that a pause or a stop has closed as quiet.
    pub(crate) drained: Count,
    /// Connections reset because a pause was not to wait for them.
    pub(crate) killed: Count,
    /// Panics of the worker, written by its supervisor on the same thread.
    pub(crate) panics: Count,
    /// Bytes carried from clients to the upstream.
    pub(crate) bytes_to_upstream: Count,
    /// Bytes carried from the upstream to clients.
    pub(crate) bytes_to_client: Count,
    /// The number of accepted clients at which the worker is to panic, for the tests of the supervisor.
    #[cfg(test)]
    pub(crate) panic_at: Count,
}

impl Count {
    /// Returns the number.
    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// Sets the number. Only its one writer may call it.
    pub(crate) fn set(&self, number: u64) {
        self.0.store(number, Ordering::Relaxed);
    }

    /// Adds to the number. Only its one writer may call it.
    pub(crate) fn add(&self, more: u64) {
        self.set(self.get() + more);
    }
}

impl Counters {
    /// Returns the number of the worker's clients in all states.
    pub(crate) fn clients(&self) -> u64 {
        [&self.held, &self.connecting, &self.active, &self.rejecting]
            .into_iter()
            .map(Count::get)
            .sum()
    }

    /// Panics if a test has asked for it.
    #[cfg(test)]
    pub(crate) fn panic_if_due(&self) {
        assert_ne!(self.accepted.get(), self.panic_at.get(), "a test has asked for this panic");
    }
}
