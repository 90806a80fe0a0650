//! The barrier: waits until every worker has reached the end of a turn.
//!
//! A worker that was let through the gate just before a pause may be about to dial. The pausing thread therefore begins
//! a new epoch and waits until all workers have acknowledged it. All that they do from then on comes after the pause.

use std::{
    sync::PoisonError,
    time::{Duration, Instant},
};

#[cfg(loom)]
use loom::sync::{
    Condvar, Mutex, MutexGuard,
    atomic::{AtomicU64, Ordering},
};
#[cfg(not(loom))]
use std::sync::{
    Condvar, Mutex, MutexGuard,
    atomic::{AtomicU64, Ordering},
};

/// Epoch of a worker that has ended; it counts as having acknowledged every future one.
const FOR_EVER: u64 = u64::MAX;

/// Meeting point of workers and of threads that wait for them.
#[derive(Debug)]
pub(crate) struct Barrier {
    /// Number of the latest epoch.
    latest: AtomicU64,
    /// Latest epoch that each worker has acknowledged.
    acked: Mutex<Box<[u64]>>,
    one_acked: Condvar,
}

/// An epoch that every worker has to acknowledge.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Epoch(u64);

impl Barrier {
    /// Returns a barrier for `workers` workers.
    pub(crate) fn new(workers: usize) -> Self {
        Self {
            latest: AtomicU64::new(0),
            acked: Mutex::new(vec![0; workers].into()),
            one_acked: Condvar::new(),
        }
    }

    /// Begins an epoch. The caller has to wake the workers.
    pub(crate) fn ask(&self) -> Epoch {
        Epoch(self.latest.fetch_add(1, Ordering::AcqRel) + 1)
    }

    /// Waits until every worker has acknowledged `epoch`. Returns false if `timeout` is over first.
    pub(crate) fn wait(&self, epoch: Epoch, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        let mut acked = self.lock();
        while acked.iter().any(|&acked| acked < epoch.0) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            acked =
                self.one_acked.wait_timeout(acked, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// Acknowledges the latest epoch, at the end of a worker's turn. `seen` is the epoch that it acknowledged last:
    /// without a new one, it takes no lock.
    pub(crate) fn ack(&self, worker: usize, seen: &mut u64) {
        // The pause came before this epoch, so all that this worker does from here on sees it.
        let latest = self.latest.load(Ordering::Acquire);
        if latest != *seen {
            *seen = latest;
            self.note(worker, latest);
        }
    }

    /// Excludes a worker that has ended from all future waits.
    pub(crate) fn leave(&self, worker: usize) {
        self.note(worker, FOR_EVER);
    }

    fn note(&self, worker: usize, epoch: u64) {
        if let Some(acked) = self.lock().get_mut(worker) {
            *acked = epoch;
        }
        self.one_acked.notify_all();
    }

    /// Locks the acknowledgements. It ignores poison, as no panic can leave them half-changed.
    fn lock(&self) -> MutexGuard<'_, Box<[u64]>> {
        self.acked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn all_workers_have_to_pass_or_to_have_ended() {
        let barrier = Barrier::new(2);
        let (mut first, mut second) = (0, 0);
        let epoch = barrier.ask();
        assert!(!barrier.wait(epoch, Duration::ZERO));
        barrier.ack(0, &mut first);
        assert!(!barrier.wait(epoch, Duration::ZERO), "the second has not passed");
        barrier.ack(1, &mut second);
        assert!(barrier.wait(epoch, Duration::ZERO));

        let next = barrier.ask();
        assert!(!barrier.wait(next, Duration::ZERO), "what was passed before does not count");
        barrier.leave(0);
        barrier.ack(1, &mut second);
        assert!(barrier.wait(next, Duration::ZERO));
        assert!(barrier.wait(epoch, Duration::ZERO));
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use loom::{
        sync::{Arc, atomic::AtomicBool},
        thread,
    };

    use super::*;

    /// No dial begins after a thread has paused and waited: a worker either dials before it acknowledges, or sees the
    /// pause.
    #[test]
    fn barrier_nothing_begins_behind_a_pause() {
        loom::model(|| {
            let barrier = Arc::new(Barrier::new(1));
            let paused = Arc::new(AtomicBool::new(false));
            let dials = Arc::new(AtomicU64::new(0));
            let worker = thread::spawn({
                let (barrier, paused, dials) = (barrier.clone(), paused.clone(), dials.clone());
                move || {
                    let mut seen = 0;
                    for _turn in 0..2 {
                        if !paused.load(Ordering::Acquire) {
                            dials.fetch_add(1, Ordering::Relaxed);
                        }
                        barrier.ack(0, &mut seen);
                    }
                    barrier.leave(0);
                }
            });
            paused.store(true, Ordering::Release);
            let epoch = barrier.ask();
            // loom does not know the clock, so the timeout is far away.
            assert!(barrier.wait(epoch, Duration::from_secs(3600)));
            let before = dials.load(Ordering::Relaxed);
            worker.join().unwrap();
            assert_eq!(dials.load(Ordering::Relaxed), before);
        });
    }
}
