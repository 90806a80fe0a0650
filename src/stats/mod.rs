//! Counters of one worker: only that worker writes them, and the control plane reads them.

pub(crate) mod cause;
pub(crate) mod histogram;
pub(crate) mod words;

use std::{
    io,
    sync::atomic::{AtomicU64, Ordering, fence},
    thread,
    time::Duration,
};

use cause::{CloseCause, ConnectResult};
use rustix::io::Errno;

use histogram::{ConnectBounds, Histogram, LifeBounds, WaitBounds};

/// Reads of a balance before one is taken that the worker may be changing. Each lets other threads run first.
const BALANCE_READS_MAX: usize = 1000;

/// A number with one writer. It needs only plain loads and stores, so no locked instruction lies on the way of a byte.
#[derive(Debug, Default)]
pub(crate) struct Count(AtomicU64);

/// Counters of one worker, on cache lines of their own: two, since processors fetch them in pairs.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(crate) struct Counters {
    /// Version of the balance: odd while it is changed (a sequence lock).
    version: AtomicU64,
    /// Clients accepted.
    accepted: Count,
    /// Ended connections by cause.
    closed: [Count; CloseCause::ALL.len()],
    /// Present number of clients that wait without a pass: for the resume, for their turn, or for an absent upstream.
    pub(crate) held: Count,
    /// Present number of clients whose upstream is being dialled.
    pub(crate) connecting: Count,
    /// Present number of connections that are relayed.
    pub(crate) active: Count,
    /// Present number of clients that are being rejected, or closed in good order.
    pub(crate) rejecting: Count,
    /// Present number of clients that wait for an upstream that is away. They are held, too.
    pub(crate) awaiting_upstream: Count,
    /// Arrival of the client that has been held longest, in milliseconds after the start of the proxy, plus one; 0 if
    /// there is none.
    pub(crate) oldest_held: Count,
    /// The same for clients whose upstream is being dialled.
    pub(crate) oldest_connecting: Count,
    /// The same for the beginning of relayed connections.
    pub(crate) oldest: Count,
    /// Clients rejected.
    pub(crate) rejected: Count,
    /// Connections that a pause or a stop has closed as quiet.
    pub(crate) drained: Count,
    /// Panics of the worker, written by its supervisor on the same thread.
    pub(crate) panics: Count,
    /// Bytes carried from clients to the upstream.
    pub(crate) bytes_to_upstream: Count,
    /// Bytes carried from the upstream to clients.
    pub(crate) bytes_to_client: Count,
    /// Bytes of these that were spliced.
    pub(crate) spliced_to_upstream: Count,
    /// Bytes of these that were spliced.
    pub(crate) spliced_to_client: Count,
    /// Dials of addresses by result.
    pub(crate) dials: [Count; ConnectResult::ALL.len()],
    /// Failures to accept a client for want of descriptors, of memory, and others.
    pub(crate) accept_errors: [Count; 3],
    /// Time outside of the wait for events, in nanoseconds.
    pub(crate) busy_nanos: Count,
    /// Present number of pipes with bytes in them, and without.
    pub(crate) pipes: [Count; 2],
    /// Time that clients were held.
    pub(crate) hold: Waits,
    /// Time that clients have waited for an upstream that was away.
    pub(crate) outage: Waits,
    /// Time of successful attempts to connect.
    pub(crate) connect: Histogram<ConnectBounds>,
    /// Time from the accept of connections to their end.
    pub(crate) life: Histogram<LifeBounds>,
    /// The number of accepted clients at which the worker is to panic, for the tests of the supervisor.
    #[cfg(test)]
    pub(crate) panic_at: Count,
}

/// Waits of clients by their outcome.
#[derive(Debug, Default)]
pub(crate) struct Waits {
    pub(crate) served: Histogram<WaitBounds>,
    pub(crate) left: Histogram<WaitBounds>,
    pub(crate) refused: Histogram<WaitBounds>,
}

/// Clients of one moment: those accepted are those that have ended and those in each state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Balance {
    pub(crate) accepted: u64,
    pub(crate) closed: [u64; CloseCause::ALL.len()],
    pub(crate) held: u64,
    pub(crate) connecting: u64,
    pub(crate) active: u64,
    pub(crate) rejecting: u64,
}

impl Balance {
    /// Returns the sum of both.
    pub(crate) fn plus(mut self, other: Self) -> Self {
        for (sum, more) in self.closed.iter_mut().zip(other.closed) {
            *sum += more;
        }
        Self {
            accepted: self.accepted + other.accepted,
            held: self.held + other.held,
            connecting: self.connecting + other.connecting,
            active: self.active + other.active,
            rejecting: self.rejecting + other.rejecting,
            ..self
        }
    }
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

    /// Adds to the number, which wraps around. Only its one writer may call it.
    pub(crate) fn add(&self, more: u64) {
        self.set(self.get().wrapping_add(more));
    }
}

impl Counters {
    /// Counts an accepted client, which is held until its worker has decided about it.
    pub(crate) fn accept(&self) {
        self.change(|| {
            self.accepted.add(1);
            self.held.add(1);
        });
    }

    /// Counts the end of a connection, together with a change of the present numbers.
    pub(crate) fn close(&self, cause: CloseCause, publish: impl FnOnce()) {
        self.change(|| {
            if let Some(closed) = self.closed.get(cause as usize) {
                closed.add(1);
            }
            publish();
        });
    }

    /// Counts the loss of all connections by a panic. Returns their number.
    pub(crate) fn lose_all(&self) -> u64 {
        let lost = self.clients();
        self.change(|| {
            if let Some(closed) = self.closed.get(CloseCause::Panic as usize) {
                closed.add(lost);
            }
            for count in [&self.held, &self.connecting, &self.active, &self.rejecting] {
                count.set(0);
            }
        });
        self.panics.add(1);
        lost
    }

    /// Counts the result of a dial.
    pub(crate) fn dialled(&self, result: ConnectResult) {
        if let Some(count) = self.dials.get(result as usize) {
            count.add(1);
        }
    }

    /// Counts a failure to accept a client.
    pub(crate) fn accept_failed(&self, error: &io::Error) {
        let [descriptors, memory, other] = &self.accept_errors;
        match error.raw_os_error().map(Errno::from_raw_os_error) {
            Some(Errno::MFILE | Errno::NFILE) => descriptors,
            Some(Errno::NOMEM | Errno::NOBUFS) => memory,
            _ => other,
        }
        .add(1);
    }

    /// Changes numbers of the balance together, so that no reader sees a part of the change.
    pub(crate) fn change(&self, change: impl FnOnce()) {
        // The order of a sequence lock's writer: odd, the numbers, even.
        let version = self.version.load(Ordering::Relaxed);
        self.version.store(version.wrapping_add(1), Ordering::Relaxed);
        fence(Ordering::Release);
        change();
        self.version.store(version.wrapping_add(2), Ordering::Release);
    }

    /// Returns the clients of one moment.
    pub(crate) fn balance(&self) -> Balance {
        for _read in 0..BALANCE_READS_MAX {
            let before = self.version.load(Ordering::Acquire);
            let balance = self.read_balance();
            fence(Ordering::Acquire);
            if before.is_multiple_of(2) && self.version.load(Ordering::Relaxed) == before {
                return balance;
            }
            thread::yield_now();
        }
        self.read_balance()
    }

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

    fn read_balance(&self) -> Balance {
        Balance {
            accepted: self.accepted.get(),
            closed: self.closed.each_ref().map(Count::get),
            held: self.held.get(),
            connecting: self.connecting.get(),
            active: self.active.get(),
            rejecting: self.rejecting.get(),
        }
    }
}

impl Waits {
    /// Counts the wait of a client whose connection ended by `cause` before it was served.
    pub(crate) fn end(&self, cause: CloseCause, wait: Duration) {
        if cause.has_left() { &self.left } else { &self.refused }.observe(wait);
    }
}
