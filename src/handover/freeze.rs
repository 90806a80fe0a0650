//! The standstill of a hand-over: each thread that moves bytes or answers callers stops at the end of a turn and describes
//! itself. It goes on once the hand-over is given up, or ends with its process.
//!
//! In the taker, the same threads stand still from their start until the taker has said that it goes on.

use std::{
    fmt::Display,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU8, Ordering},
    },
    time::Instant,
};

use super::channel::Outbox;

// Levels of `Freeze`; each asks more threads to stand still.
const NOBODY: u8 = 0;
const FRONT: u8 = 1;
const EVERYBODY: u8 = 2;

/// Standstill of the workers and of the control API's front, which is behind them by index.
#[derive(Debug)]
pub(crate) struct Freeze {
    /// Level, which threads read in each turn.
    level: AtomicU8,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    /// Number of standstills that are over. A thread that wakes late must not take the next one for the one that it was in.
    over: u64,
    threads: Box<[Progress]>,
    /// Way for the descriptions, once all threads stand still.
    outbox: Option<Arc<Outbox>>,
}

/// Progress of one thread.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Progress {
    Running,
    Standing,
    Described,
    /// It cannot be described, or not be rebuilt.
    Failed(String),
    Ended,
}

impl Freeze {
    /// Returns the standstill of a proxy with so many workers, in which all threads run.
    pub(crate) fn new(workers: usize) -> Self {
        Self {
            level: AtomicU8::new(NOBODY),
            state: Mutex::new(State {
                over: 0,
                threads: vec![Progress::Running; workers + 1].into(),
                outbox: None,
            }),
            changed: Condvar::new(),
        }
    }

    /// Returns the standstill of a taker: all threads are to stand still from the start.
    pub(crate) fn from_start(workers: usize) -> Self {
        Self { level: AtomicU8::new(EVERYBODY), ..Self::new(workers) }
    }

    /// Returns true while the workers are to stand still.
    pub(crate) fn asks_workers(&self) -> bool {
        self.level.load(Ordering::Acquire) == EVERYBODY
    }

    /// Returns true while the control API's front is to stand still.
    pub(crate) fn asks_front(&self) -> bool {
        self.level.load(Ordering::Acquire) >= FRONT
    }

    /// Stands still as the thread `index`, for as long as it is asked. Once all threads stand still, it calls `describe`.
    pub(crate) fn stand_still<E: Display>(
        &self,
        index: usize,
        describe: impl FnOnce(&Outbox) -> Result<(), E>,
    ) {
        let mut describe = Some(describe);
        let mut state = self.lock();
        let over = state.over;
        // A failure to rebuild stays known.
        if state.threads.get(index) == Some(&Progress::Running) {
            self.note(&mut state, index, Progress::Standing);
        }
        while state.over == over && self.asks(&state, index) {
            if let Some(outbox) = state.outbox.clone()
                && let Some(describe) = describe.take()
            {
                drop(state);
                let progress = progress_of(|| describe(&outbox));
                state = self.lock();
                if state.over == over {
                    self.note(&mut state, index, progress);
                }
            } else {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }

    /// Records that the thread `index` cannot go on where another process stopped.
    pub(crate) fn fail(&self, index: usize, why: String) {
        self.note(&mut self.lock(), index, Progress::Failed(why));
    }

    /// Records that the thread `index` has ended, as threads do after a stop. No standstill waits for it.
    pub(crate) fn leave(&self, index: usize) {
        self.note(&mut self.lock(), index, Progress::Ended);
    }

    /// Asks the control API's front to stand still. The caller has to wake it.
    pub(crate) fn ask_front(&self) {
        self.level.store(FRONT, Ordering::Release);
    }

    /// Asks all threads to stand still. The caller has to wake them.
    pub(crate) fn ask_all(&self) {
        self.level.store(EVERYBODY, Ordering::Release);
    }

    /// Waits until all threads that are asked stand still. Returns false if `deadline` comes first.
    pub(crate) fn await_standing(&self, deadline: Instant) -> bool {
        self.await_all(deadline, |progress| *progress != Progress::Running).is_some()
    }

    /// Has all threads describe themselves. Returns the reason if one cannot, or not before `deadline`.
    pub(crate) fn describe(&self, outbox: Arc<Outbox>, deadline: Instant) -> Result<(), String> {
        self.lock().outbox = Some(outbox);
        self.changed.notify_all();
        let is_done = |progress: &Progress| {
            matches!(progress, Progress::Described | Progress::Failed(_) | Progress::Ended)
        };
        let state = self.await_all(deadline, is_done).ok_or("it takes too long")?;
        Self::result(&state)
    }

    /// Waits until all threads stand still that another process had begun. Returns the reason if one cannot.
    pub(crate) fn await_rebuilt(&self, deadline: Instant) -> Result<(), String> {
        let is_done = |progress: &Progress| *progress != Progress::Running;
        let state = self.await_all(deadline, is_done).ok_or("it takes too long")?;
        Self::result(&state)
    }

    /// Lets all threads go on. The caller has to wake them.
    pub(crate) fn thaw(&self) {
        let mut state = self.lock();
        state.outbox = None;
        state.over += 1;
        let remaining = state.threads.iter_mut().filter(|progress| **progress != Progress::Ended);
        remaining.for_each(|progress| *progress = Progress::Running);
        self.level.store(NOBODY, Ordering::Release);
        drop(state);
        self.changed.notify_all();
    }

    fn result(state: &State) -> Result<(), String> {
        let failure = state.threads.iter().find_map(|progress| match progress {
            Progress::Failed(why) => Some(why.clone()),
            Progress::Ended => Some("it is stopping".to_owned()),
            Progress::Running | Progress::Standing | Progress::Described => None,
        });
        failure.map_or(Ok(()), Err)
    }

    fn await_all(
        &self,
        deadline: Instant,
        is_done: impl Fn(&Progress) -> bool,
    ) -> Option<MutexGuard<'_, State>> {
        let mut state = self.lock();
        loop {
            let mut asked = (0..state.threads.len()).filter(|&index| self.asks(&state, index));
            if asked.all(|index| state.threads.get(index).is_some_and(&is_done)) {
                return Some(state);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Returns true if the thread `index` is to stand still.
    fn asks(&self, state: &State, index: usize) -> bool {
        if index + 1 == state.threads.len() { self.asks_front() } else { self.asks_workers() }
    }

    fn note(&self, state: &mut State, index: usize, progress: Progress) {
        if let Some(thread) = state.threads.get_mut(index) {
            *thread = progress;
        }
        self.changed.notify_all();
    }

    /// Locks the state. It ignores poison, as no panic can leave it half-changed.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Describes a thread. A panic must not cost its connections, as nothing of them was changed.
fn progress_of<E: Display>(describe: impl FnOnce() -> Result<(), E>) -> Progress {
    match catch_unwind(AssertUnwindSafe(describe)) {
        Ok(Ok(())) => Progress::Described,
        Ok(Err(error)) => Progress::Failed(error.to_string()),
        Err(_panic) => Progress::Failed("a defect: the description panicked".into()),
    }
}

#[cfg(test)]
mod tests {
    use std::{
        os::unix::net::UnixStream,
        sync::atomic::{AtomicBool, AtomicUsize},
        thread,
        time::Duration,
    };

    use super::*;
    use crate::handover::channel::Channel;

    /// The thread may not have woken from the first one yet, and must not count as described.
    #[test]
    fn a_standstill_right_behind_another_is_described_too() {
        let freeze = Freeze::new(0);
        let (described, is_over) = (AtomicUsize::new(0), AtomicBool::new(false));
        let deadline = Instant::now() + Duration::from_secs(10);
        thread::scope(|scope| {
            scope.spawn(|| {
                while !is_over.load(Ordering::SeqCst) && Instant::now() < deadline {
                    if freeze.asks_front() {
                        freeze.stand_still(0, |_| {
                            described.fetch_add(1, Ordering::SeqCst);
                            Ok::<(), String>(())
                        });
                    }
                }
            });
            for count in 1..=100 {
                freeze.ask_all();
                let is_standing = freeze.await_standing(deadline);
                let channel = Mutex::new(Channel::new(UnixStream::pair().unwrap().0)).into();
                let outbox = Outbox { begin: Instant::now(), channel };
                let result = freeze.describe(Arc::new(outbox), deadline);
                let found = described.load(Ordering::SeqCst);
                is_over.store(count == 100 || found != count, Ordering::SeqCst);
                freeze.thaw();
                assert_eq!((is_standing, result, found), (true, Ok(()), count));
            }
        });
    }
}
