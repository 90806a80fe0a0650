//! The worker pool: handles by which other threads reach each worker and read its counters.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};
use mio::Waker;

use crate::{
    admission::semaphore::Permit,
    listing::{ConnectionId, Entry, Selected, Selection},
    stats::{Balance, Count, Counters},
    sys::{Listener, Socket},
};

/// Connections that are listed for an operator, at most.
pub(crate) const LISTED_MAX: usize = 3;

/// All workers of a proxy.
#[derive(Debug)]
pub(crate) struct WorkerPool {
    workers: Box<[WorkerHandle]>,
    /// Number of workers that still listen.
    listening: AtomicUsize,
    /// Number of the last accepted client. It goes on over hand-overs, so that none repeats.
    last_number: LastNumber,
}

/// Number that all workers change, on cache lines of its own: what stands beside it is read in every turn.
#[derive(Debug, Default)]
#[repr(align(128))]
struct LastNumber(AtomicU64);

/// Handle of one worker: its waker, its mailbox and its counters.
#[derive(Debug)]
pub(crate) struct WorkerHandle {
    /// Waker of the worker's poll.
    pub(crate) waker: Waker,
    pub(crate) mailbox: Sender<Mail>,
    /// Counters, which only this worker writes.
    pub(crate) counters: Counters,
}

/// Message to a worker.
#[derive(Debug)]
pub(crate) enum Mail {
    /// A client that another worker has accepted.
    Client(Accepted),
    /// A further listener.
    Listen(Listener),
    /// Question for the oldest connections with a pass.
    ListOldest(Sender<Vec<Entry>>),
    /// Selection of connections.
    Select(Arc<Selection>, Sender<Selected>),
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
        let (listening, last_number) = (AtomicUsize::new(listening), LastNumber::default());
        Self { workers, listening, last_number }
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
        let sent = worker.mailbox.try_send(Mail::Client(accepted));
        if let Err(Mail::Client(accepted)) = sent.map_err(TrySendError::into_inner) {
            return Err(accepted);
        }
        worker.wake();
        Ok(())
    }

    /// Asks all workers for the oldest connections with a pass. Leaves out workers that do not answer within `timeout`.
    pub(crate) fn oldest_served(&self, timeout: Duration) -> Vec<String> {
        let deadline = Instant::now() + timeout;
        let (reply, lists) = bounded(self.workers.len());
        for worker in &self.workers {
            // A full mailbox belongs to a worker that will not answer in time.
            if worker.mailbox.try_send(Mail::ListOldest(reply.clone())).is_ok() {
                worker.wake();
            }
        }
        drop(reply);
        let mut oldest = Vec::new();
        while let Ok(list) = lists.recv_deadline(deadline) {
            oldest.extend(list);
        }
        oldest.sort_by(|one: &Entry, other| other.age_seconds.total_cmp(&one.age_seconds));
        oldest.into_iter().take(LISTED_MAX).map(|entry| entry.to_string()).collect()
    }

    /// Has all workers select connections. Returns none if a worker does not answer in time.
    pub(crate) fn select(&self, selection: Selection) -> Option<Selected> {
        let (until, limit) = (selection.until, selection.purpose.limit());
        let (mut asked, results) = self.begin_selection(&Arc::new(selection))?;
        let mut all = Selected::default();
        while asked > 0 {
            all.merge(results.recv_deadline(until).ok()?, limit);
            asked -= 1;
        }
        Some(all)
    }

    /// Sends a selection to all workers that have not ended. Returns their number, and the way of their results; none if a
    /// worker takes no more orders.
    pub(crate) fn begin_selection(
        &self,
        selection: &Arc<Selection>,
    ) -> Option<(usize, Receiver<Selected>)> {
        let (reply, results) = bounded(self.workers.len());
        let mut asked = 0;
        for worker in &self.workers {
            match worker.mailbox.try_send(Mail::Select(Arc::clone(selection), reply.clone())) {
                Ok(()) => {
                    worker.wake();
                    asked += 1;
                }
                // It has ended, and has no connections.
                Err(TrySendError::Disconnected(_)) => {}
                Err(TrySendError::Full(_)) => return None,
            }
        }
        Some((asked, results))
    }

    /// Returns the id of a client that the worker `worker` has accepted, behind all ids before.
    pub(crate) fn next_id(&self, worker: usize) -> ConnectionId {
        let number = self.last_number.0.fetch_add(1, Ordering::Relaxed) + 1;
        ConnectionId::new(worker, number)
    }

    /// Returns the number of the last client that was accepted.
    pub(crate) fn last_number(&self) -> u64 {
        self.last_number.0.load(Ordering::Relaxed)
    }

    /// Makes the numbers of clients go on after `last`, so that none repeats one of the process before.
    pub(crate) fn number_after(&self, last: u64) {
        self.last_number.0.store(last, Ordering::Relaxed);
    }

    /// Returns the number of workers that listen.
    pub(crate) fn listening(&self) -> usize {
        self.listening.load(Ordering::Acquire)
    }

    /// Has the worker `index`, which has no listener so far, listen.
    pub(crate) fn listen(&self, index: usize, listener: Listener) {
        let Some(worker) = self.workers.get(index) else { return };
        self.listening.fetch_add(1, Ordering::AcqRel);
        match worker.mailbox.try_send(Mail::Listen(listener)) {
            Ok(()) => worker.wake(),
            Err(_full) => self.stopped_listening(),
        }
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
