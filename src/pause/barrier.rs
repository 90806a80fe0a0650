//! The barrier: waits until every worker has passed the end of a turn.
//!
//! A worker that was let through the gate just before a pause may be about to dial. Whoever has paused asks, and once all
//! workers have passed, what they do from then on comes behind the pause.

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

/// What a worker that has ended has passed: every question to come.
const FOR_EVER: u64 = u64::MAX;

/// Where workers pass and others wait for them.
#[derive(Debug)]
pub(crate) struct Barrier {
    /// How often was asked.
    asked: AtomicU64,
    /// The last question that each worker has passed.
    passed: Mutex<Box<[u64]>>,
    one_passed: Condvar,
}

/// A question to all workers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Question(u64);

impl Barrier {
    /// A barrier for so many workers.
    pub(crate) fn new(workers: usize) -> Self {
        Self {
            asked: AtomicU64::new(0),
            passed: Mutex::new(vec![0; workers].into()),
            one_passed: Condvar::new(),
        }
    }

    /// Asks every worker to pass; the caller ends their wait for events.
    pub(crate) fn ask(&self) -> Question {
        Question(self.asked.fetch_add(1, Ordering::AcqRel) + 1)
    }

    /// Waits until every worker has passed since `question` was asked; false when `timeout` is over first.
    pub(crate) fn wait(&self, question: Question, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        let mut passed = self.lock();
        while passed.iter().any(|&passed| passed < question.0) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            passed = self
                .one_passed
                .wait_timeout(passed, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        true
    }

    /// A worker is at the end of its turn. `seen` is what it has passed last: while nobody asks, it takes no lock.
    pub(crate) fn ack(&self, worker: usize, seen: &mut u64) {
        // Whoever asked had paused before: what this worker does from here on sees it.
        let asked = self.asked.load(Ordering::Acquire);
        if asked != *seen {
            *seen = asked;
            self.note(worker, asked);
        }
    }

    /// A worker has ended, and is not waited for any more.
    pub(crate) fn leave(&self, worker: usize) {
        self.note(worker, FOR_EVER);
    }

    fn note(&self, worker: usize, question: u64) {
        if let Some(passed) = self.lock().get_mut(worker) {
            *passed = question;
        }
        self.one_passed.notify_all();
    }

    /// The lock, which no panic can leave half-changed.
    fn lock(&self) -> MutexGuard<'_, Box<[u64]>> {
        self.passed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn all_workers_have_to_pass_or_to_have_ended() {
        let barrier = Barrier::new(2);
        let (mut first, mut second) = (0, 0);
        let question = barrier.ask();
        assert!(!barrier.wait(question, Duration::ZERO));
        barrier.ack(0, &mut first);
        assert!(!barrier.wait(question, Duration::ZERO), "the second has not passed");
        barrier.ack(1, &mut second);
        assert!(barrier.wait(question, Duration::ZERO));

        let next = barrier.ask();
        assert!(!barrier.wait(next, Duration::ZERO), "what was passed before does not count");
        barrier.leave(0);
        barrier.ack(1, &mut second);
        assert!(barrier.wait(next, Duration::ZERO));
        assert!(barrier.wait(question, Duration::ZERO));
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use loom::{
        sync::{Arc, atomic::AtomicBool},
        thread,
    };

    use super::*;

    /// Whoever has paused and waited finds no dial that began after that: a worker either dials before it passes, or sees
    /// the pause.
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
            let question = barrier.ask();
            // The timeout is the clock's, which loom does not know: it is far away.
            assert!(barrier.wait(question, Duration::from_secs(3600)));
            let before = dials.load(Ordering::Relaxed);
            worker.join().unwrap();
            assert_eq!(dials.load(Ordering::Relaxed), before);
        });
    }
}
