//! The gate: one atomic word that says whether the proxy is paused and how many connections it serves.
//!
//! Pausing and admission are changes of the *same* word, so they are totally ordered by it alone: a connection either
//! entered before the pause, and is counted, or sees the pause, and does not enter. "Admitted but not counted" cannot
//! happen, and no argument about two variables is needed to know it.

use std::{
    sync::{Arc, PoisonError},
    time::Instant,
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

/// The bit of the word that says "paused".
const PAUSED: u64 = 1 << 63;
/// The bit that says, while it is paused, that whoever comes is to be rejected.
const REJECTING: u64 = 1 << 62;
/// The bits that count the passes.
const PASSES: u64 = REJECTING - 1;

/// What is done with those who come during a pause.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// They wait for the resume.
    Hold,
    /// They get an answer and go.
    Reject,
}

/// Admits connections, or not, and tells when the last one has left.
#[derive(Debug)]
pub(crate) struct Gate {
    word: AtomicU64,
    idle: Mutex<Idle>,
    became_idle: Condvar,
}

/// What those who wait for idle share.
#[derive(Default)]
struct Idle {
    /// How many idle moments there were: a waiter that sleeps through a short one still learns of it.
    moments: u64,
    /// How many wait for the next one: as long as none does, an idle moment costs no call.
    waiters: usize,
    /// Called at each of them.
    watchers: Vec<Box<dyn Fn() + Send + Sync>>,
}

/// The right to be served. Dropping it is leaving, so drop it after the sockets are closed.
#[derive(Debug)]
pub(crate) struct Pass {
    gate: Arc<Gate>,
    /// Whether it was given in spite of a pause.
    in_spite: bool,
}

impl Gate {
    /// An open gate.
    pub(crate) fn new() -> Self {
        Self {
            word: AtomicU64::new(0),
            idle: Mutex::new(Idle::default()),
            became_idle: Condvar::new(),
        }
    }

    /// Lets nobody in from now on, and has those who come treated by `mode`. Returns whether the gate was open.
    pub(crate) fn pause(&self, mode: Mode) -> bool {
        let bits = match mode {
            Mode::Hold => PAUSED,
            Mode::Reject => PAUSED | REJECTING,
        };
        self.change(|word| word & PASSES | bits) & PAUSED == 0
    }

    /// Opens the gate. Returns whether it was paused.
    pub(crate) fn resume(&self) -> bool {
        self.change(|word| word & PASSES) & PAUSED != 0
    }

    /// Whether nobody is let in.
    pub(crate) fn is_paused(&self) -> bool {
        self.word.load(Ordering::Acquire) & PAUSED != 0
    }

    /// What is done with those who come, if it is paused.
    pub(crate) fn mode(&self) -> Option<Mode> {
        match self.word.load(Ordering::Acquire) & !PASSES {
            0 => None,
            PAUSED => Some(Mode::Hold),
            _ => Some(Mode::Reject),
        }
    }

    /// How many passes are out.
    pub(crate) fn passes(&self) -> u64 {
        self.word.load(Ordering::Acquire) & PASSES
    }

    /// A pass, unless the gate is paused.
    pub(crate) fn enter(self: &Arc<Self>) -> Option<Pass> {
        let admit = |word| (word & PAUSED == 0).then_some(word + 1);
        self.word.fetch_update(Ordering::AcqRel, Ordering::Acquire, admit).ok()?;
        Some(Pass { gate: Arc::clone(self), in_spite: false })
    }

    /// A pass in spite of a pause, for one that the operator lets through.
    pub(crate) fn enter_bypassing(self: &Arc<Self>) -> Pass {
        self.word.fetch_add(1, Ordering::AcqRel);
        Pass { gate: Arc::clone(self), in_spite: true }
    }

    fn change(&self, change: impl Fn(u64) -> u64) -> u64 {
        let changed = |word| Some(change(word));
        match self.word.fetch_update(Ordering::AcqRel, Ordering::Acquire, changed) {
            Ok(before) | Err(before) => before,
        }
    }

    /// Waits until no pass is out; false when `deadline` comes first.
    pub(crate) fn wait_idle(&self, deadline: Option<Instant>) -> bool {
        let mut idle = self.lock();
        idle.waiters += 1;
        let since = idle.moments;
        // The last leaver notifies under this lock, after the count has fallen: it cannot do so between look and wait.
        let mut in_time = true;
        while in_time && self.passes() != 0 && idle.moments == since {
            idle = match deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()))
            {
                None => self.became_idle.wait(idle).unwrap_or_else(PoisonError::into_inner),
                Some(left) if left.is_zero() => {
                    in_time = false;
                    idle
                }
                Some(left) => {
                    self.became_idle
                        .wait_timeout(idle, left)
                        .unwrap_or_else(PoisonError::into_inner)
                        .0
                }
            };
        }
        idle.waiters -= 1;
        in_time
    }

    /// How many idle moments there were: when it has changed, the gate was idle in between.
    pub(crate) fn idle_moments(&self) -> u64 {
        self.lock().moments
    }

    /// Has `watcher` called at each idle moment, by the thread that leaves and under a lock of the gate: it must neither
    /// block nor ask the gate.
    pub(crate) fn watch_idle(&self, watcher: impl Fn() + Send + Sync + 'static) {
        self.lock().watchers.push(Box::new(watcher));
    }

    fn leave(&self) {
        let before = self.word.fetch_sub(1, Ordering::AcqRel);
        debug_assert_ne!(before & PASSES, 0, "more left than entered");
        if before & PASSES == 1 {
            let mut idle = self.lock();
            // Another may have entered since. Then this moment is over, and whoever has begun to wait after it must not
            // take it for its own; the last to leave will be back here.
            if self.passes() == 0 {
                idle.moments += 1;
                if idle.waiters > 0 {
                    self.became_idle.notify_all();
                }
                idle.watchers.iter().for_each(|watcher| watcher());
            }
        }
    }

    /// The lock of the idle state, which no panic can leave half-changed.
    fn lock(&self) -> MutexGuard<'_, Idle> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pass {
    /// Whether the gate that it is for is paused now.
    pub(crate) fn is_paused(&self) -> bool {
        self.gate.is_paused()
    }

    /// Whether it would not be given any more: a pause has come since.
    pub(crate) fn is_void(&self) -> bool {
        self.is_paused() && !self.in_spite
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        self.gate.leave();
    }
}

impl std::fmt::Debug for Idle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Idle").field("moments", &self.moments).finish_non_exhaustive()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_paused_gate_admits_nobody_and_counts_those_inside() {
        let gate = Arc::new(Gate::new());
        let inside = gate.enter().unwrap();
        assert!(!inside.is_void());
        assert!(gate.pause(Mode::Hold));
        assert!(inside.is_void(), "it would not be given now");
        assert!(!gate.pause(Mode::Hold), "the second pause changes nothing");
        assert!(gate.enter().is_none());
        assert_eq!(gate.passes(), 1);
        drop(inside);
        assert_eq!(gate.passes(), 0);
        assert_eq!(gate.mode(), Some(Mode::Hold));
        assert!(!gate.pause(Mode::Reject), "only the mode is another");
        assert_eq!(gate.mode(), Some(Mode::Reject));
        let let_through = gate.enter_bypassing();
        assert_eq!(gate.passes(), 1);
        assert!(let_through.is_paused() && !let_through.is_void());
        drop(let_through);
        assert_eq!(gate.passes(), 0);
        assert!(gate.resume());
        assert_eq!(gate.mode(), None);
        assert!(!gate.resume());
        assert!(gate.enter().is_some());
    }

    #[test]
    fn waiting_for_idle_ends_at_once_at_the_last_leave_or_at_the_deadline() {
        let gate = Arc::new(Gate::new());
        assert!(gate.wait_idle(None), "idle already");
        let pass = gate.enter().unwrap();
        assert!(!gate.wait_idle(Some(Instant::now() + Duration::from_millis(5))));
        let waiter = std::thread::Builder::new().spawn({
            let gate = Arc::clone(&gate);
            move || gate.wait_idle(Some(Instant::now() + Duration::from_secs(10)))
        });
        drop(pass);
        assert!(waiter.unwrap().join().unwrap());
    }

    #[test]
    fn watchers_hear_of_each_idle_moment() {
        let gate = Arc::new(Gate::new());
        let heard = Arc::new(AtomicU64::new(0));
        gate.watch_idle({
            let heard = Arc::clone(&heard);
            move || {
                heard.fetch_add(1, Ordering::Relaxed);
            }
        });
        let (first, second) = (gate.enter(), gate.enter());
        drop(first);
        assert_eq!(heard.load(Ordering::Relaxed), 0);
        drop(second);
        drop(gate.enter());
        assert_eq!(heard.load(Ordering::Relaxed), 2);
    }

    #[test]
    fn a_waiter_hears_of_an_idle_moment_that_was_over_before_it_woke() {
        let gate = Arc::new(Gate::new());
        let pass = gate.enter();
        let (told, name) = std::sync::mpsc::channel();
        let waiter = std::thread::Builder::new().spawn({
            let gate = Arc::clone(&gate);
            move || {
                told.send(std::fs::read_link("/proc/thread-self").unwrap()).unwrap();
                gate.wait_idle(Some(Instant::now() + Duration::from_secs(10)))
            }
        });
        let status = std::path::Path::new("/proc").join(name.recv().unwrap()).join("stat");
        let deadline = Instant::now() + Duration::from_secs(10);
        while !std::fs::read_to_string(&status).unwrap().contains(") S ") {
            assert!(Instant::now() < deadline, "it never comes to wait");
            std::thread::yield_now();
        }
        // The next client is there before the waiter can look.
        let next = Arc::new(Mutex::new(None));
        gate.watch_idle({
            let (gate, next) = (Arc::downgrade(&gate), Arc::clone(&next));
            move || *next.lock().unwrap() = gate.upgrade().and_then(|gate| gate.enter())
        });
        drop(pass);
        assert!(waiter.unwrap().join().unwrap());
        assert_eq!(gate.passes(), 1);
        // A watcher that is called by this leave must not enter again.
        gate.pause(Mode::Hold);
        let last = next.lock().unwrap().take();
        drop(last);
    }
}

/// Every interleaving of small histories: `RUSTFLAGS="--cfg loom" cargo test --release --lib gate`.
#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;
    use loom::thread;

    #[test]
    fn after_a_pause_everyone_is_counted_or_outside() {
        loom::model(|| {
            let gate = Arc::new(Gate::new());
            let client = thread::spawn({
                let gate = Arc::clone(&gate);
                move || gate.enter()
            });
            gate.pause(Mode::Hold);
            let seen = gate.passes();
            let pass = client.join().unwrap();
            assert_eq!(seen, u64::from(pass.is_some()), "nobody enters behind the pause");
            drop(pass);
            assert_eq!(gate.passes(), 0, "whoever entered has left");
            assert!(gate.is_paused(), "neither entering nor leaving touches the pause");
        });
    }

    #[test]
    fn what_was_served_before_the_pause_is_finished_when_idle_is_reported() {
        loom::model(|| {
            let gate = Arc::new(Gate::new());
            let work = Arc::new(loom::cell::UnsafeCell::new(0));
            let pass = gate.enter().unwrap();
            let server = thread::spawn({
                let work = Arc::clone(&work);
                move || {
                    work.with_mut(|_done| ());
                    drop(pass);
                }
            });
            gate.pause(Mode::Hold);
            assert!(gate.wait_idle(None));
            // loom fails the model if this access is not ordered after the one above.
            work.with_mut(|_done| ());
            server.join().unwrap();
        });
    }

    #[test]
    fn no_waiter_sleeps_through_the_last_leave() {
        loom::model(|| {
            let gate = Arc::new(Gate::new());
            let passes = (gate.enter(), gate.enter());
            let threads = [passes.0, passes.1].map(|pass| thread::spawn(move || drop(pass)));
            assert!(gate.wait_idle(None));
            threads.into_iter().for_each(|thread| thread.join().unwrap());
        });
    }

    /// The late word of an idle moment before the wait must not end it: the upstream would be stopped under a connection.
    #[test]
    fn a_wait_ends_only_after_all_who_were_inside_when_it_began() {
        loom::model(|| {
            let gate = Arc::new(Gate::new());
            let early = gate.enter().unwrap();
            let early = thread::spawn(move || drop(early));
            let late = gate.enter().unwrap();
            let left = Arc::new(loom::sync::atomic::AtomicBool::new(false));
            let late = thread::spawn({
                let left = Arc::clone(&left);
                move || {
                    left.store(true, Ordering::SeqCst);
                    drop(late);
                }
            });
            assert!(gate.wait_idle(None));
            assert!(left.load(Ordering::SeqCst));
            early.join().unwrap();
            late.join().unwrap();
        });
    }

    #[test]
    fn the_last_leave_wakes_every_waiter() {
        loom::model(|| {
            let gate = Arc::new(Gate::new());
            let pass = gate.enter();
            let waiters = [(); 2].map(|()| {
                let gate = Arc::clone(&gate);
                thread::spawn(move || gate.wait_idle(None))
            });
            drop(pass);
            waiters.into_iter().for_each(|waiter| assert!(waiter.join().unwrap()));
        });
    }

    #[test]
    fn a_pause_and_a_resume_never_lose_a_count() {
        loom::model(|| {
            let gate = Arc::new(Gate::new());
            let operator = thread::spawn({
                let gate = Arc::clone(&gate);
                move || {
                    gate.pause(Mode::Hold);
                    gate.resume();
                }
            });
            let pass = gate.enter();
            assert_eq!(gate.passes(), u64::from(pass.is_some()));
            drop(pass);
            operator.join().unwrap();
            assert!(!gate.is_paused());
            assert_eq!(gate.passes(), 0);
        });
    }
}
