//! The worker pool: handles by which other threads reach each worker and read its counters.

use std::{
    net::SocketAddr,
    sync::atomic::{AtomicUsize, Ordering},
};

use crossbeam_channel::Sender;
use mio::Waker;

use crate::{
    admission::semaphore::Permit,
    stats::{Balance, Count, Counters},
    sys::Socket,
};

/// All workers of a proxy.
#[derive(Debug)]
pub(crate) struct WorkerPool {
    workers: Box<[WorkerHandle]>,
    /// Number of workers that still listen.
    listening: AtomicUsize,
}

/// Handle of one worker: its waker, its mailbox and its counters.
#[derive(Debug)]
pub(crate) struct WorkerHandle {
    /// Waker of the worker's poll.
    pub(crate) waker: Waker,
    /// Sender of clients that another worker has accepted.
    pub(crate) mailbox: Sender<Accepted>,
    /// Counters, which only this worker writes.
    pub(crate) counters: Counters,
}

/// A client that was accepted, with its permits.
#[derive(Debug)]
pub(crate) struct Accepted {
    pub(crate) client: Socket,
    /// Address of a TCP client.
    pub(crate) address: Option<SocketAddr>,
    /// Permit that counts it among all clients (`proxy.max-connections`).
    pub(crate) permit: Permit,
    /// Permit that counts it among held clients, if it was accepted to be held.
    pub(crate) hold_permit: Option<Permit>,
}

impl WorkerPool {
    /// Returns a pool of which `listening` workers listen.
    pub(crate) fn new(workers: Box<[WorkerHandle]>, listening: usize) -> Self {
        Self { workers, listening: AtomicUsize::new(listening) }
    }

    /// Returns the number of workers.
    pub(crate) fn len(&self) -> usize {
        self.workers.len()
    }

    /// Ends one worker's wait for events.
    pub(crate) fn wake(&self, worker: usize) {
        if let Some(worker) = self.workers.get(worker) {
            worker.wake();
        }
    }

    /// Ends every worker's wait for events.
    pub(crate) fn wake_all(&self) {
        self.workers.iter().for_each(WorkerHandle::wake);
    }

    /// Returns the counters of the worker `index`.
    #[expect(clippy::indexing_slicing, reason = "each worker has a handle")]
    pub(crate) fn counters(&self, index: usize) -> &Counters {
        &self.workers[index].counters
    }

    /// Returns the sum of one count over all workers.
    pub(crate) fn sum(&self, count: fn(&Counters) -> &Count) -> u64 {
        self.workers.iter().map(|worker| count(&worker.counters).get()).sum()
    }

    /// Returns the counters of each worker.
    pub(crate) fn each(&self) -> impl Iterator<Item = &Counters> {
        self.workers.iter().map(|worker| &worker.counters)
    }

    /// Returns the sum of the balances of all workers, each of one moment.
    pub(crate) fn balance(&self) -> Balance {
        self.each().map(Counters::balance).fold(Balance::default(), Balance::plus)
    }

    /// Returns the number of held clients.
    pub(crate) fn held(&self) -> u64 {
        self.sum(|counters| &counters.held)
    }

    /// Returns the earliest of the beginnings that a counter of each worker tells, in milliseconds after the start.
    pub(crate) fn oldest(&self, oldest: fn(&Counters) -> &Count) -> Option<u64> {
        self.each().filter_map(|counters| oldest(counters).get().checked_sub(1)).min()
    }

    /// Returns the worker with the fewest clients, other than `except`, and their number.
    pub(crate) fn least_loaded(&self, except: usize) -> Option<(usize, u64)> {
        let load = |worker: &WorkerHandle| worker.counters.clients() + worker.mailbox.len() as u64;
        let others = self.workers.iter().enumerate().filter(|&(index, _worker)| index != except);
        others.map(|(index, worker)| (index, load(worker))).min_by_key(|&(_index, load)| load)
    }

    /// Sends a client to the worker `index`. Returns it if that worker's mailbox is full.
    pub(crate) fn send(&self, index: usize, accepted: Accepted) -> Result<(), Accepted> {
        let Some(worker) = self.workers.get(index) else { return Err(accepted) };
        worker.mailbox.try_send(accepted).map_err(crossbeam_channel::TrySendError::into_inner)?;
        worker.wake();
        Ok(())
    }

    /// Records that a worker has closed its listeners. After the last one it wakes all workers: no client can be sent to
    /// them any more, so each may end.
    pub(crate) fn stopped_listening(&self) {
        if self.listening.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.wake_all();
        }
    }

    /// Returns true while any worker listens, and so may send clients to others.
    pub(crate) fn is_listening(&self) -> bool {
        self.listening.load(Ordering::Acquire) > 0
    }
}

impl WorkerHandle {
    fn wake(&self) {
        // Writing to an eventfd fails only when it is full, and then the worker is awake.
        self.waker.wake().ok();
    }
}
