//! The gate: one atomic word with a paused bit, a rejecting bit and the number of connections being served.
//!
//! Pausing and admission are changes of the *same* word, so they are totally ordered by it alone. A connection either
//! entered before the pause and is counted, or sees the pause and does not enter. "Admitted but not counted" cannot
//! happen, and no argument about two variables is needed to prove it. The one exception is deliberate:
//! [`Gate::enter_bypassing`] enters during a pause, for a client that the operator lets through, and counts it.
//!
//! Behind the deadline of its fence, the gate admits nobody either, as if it were paused. Each admission compares it.

use std::{
    sync::{Arc, PoisonError},
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

use super::fence::Fence;

/// Bit of the word that is set while paused.
const PAUSED: u64 = 1 << 63;
/// Bit that is set while paused if new clients are to be rejected.
const REJECTING: u64 = 1 << 62;
/// Bits that count the passes.
const PASSES: u64 = REJECTING - 1;

/// Treatment of clients that come during a pause.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Clients wait for the resume.
    Hold,
    /// Clients get an answer and are closed.
    Reject,
}

/// Admission of connections, and notice of the moment at which the last one has left.
#[derive(Debug)]
pub(crate) struct Gate {
    word: AtomicU64,
    fence: Fence,
    idle: Mutex<Idle>,
    became_idle: Condvar,
}

/// State that threads waiting for idle share.
#[derive(Default)]
struct Idle {
    /// Number of idle moments so far. A waiter that sleeps through a short one still learns of it.
    moments: u64,
    /// Number of waiting threads. While there are none, an idle moment costs no call.
    waiters: usize,
    /// Callbacks at each idle moment.
    watchers: Vec<Box<dyn Fn() + Send + Sync>>,
}

/// The right to be served. Dropping it leaves the gate, so it is dropped after the sockets are closed.
#[derive(Debug)]
pub(crate) struct Pass {
    gate: Arc<Gate>,
    /// Set if it was given in spite of a pause.
    bypasses: bool,
}

impl Gate {
    /// Returns an open gate.
    pub(crate) fn new() -> Self {
        Self {
            word: AtomicU64::new(0),
            fence: Fence::new(),
            idle: Mutex::new(Idle::default()),
            became_idle: Condvar::new(),
        }
    }

    /// Pauses, or changes the mode of a pause. Returns true if the gate was open.
    pub(crate) fn pause(&self, mode: Mode) -> bool {
        let bits = match mode {
            Mode::Hold => PAUSED,
            Mode::Reject => PAUSED | REJECTING,
        };
        self.change(|word| word & PASSES | bits) & PAUSED == 0
    }

    /// Opens the gate. Returns true if it was paused.
    pub(crate) fn resume(&self) -> bool {
        self.change(|word| word & PASSES) & PAUSED != 0
    }

    /// Admits nobody from this time since the start of the host on, until another one is set. Returns true if clients that
    /// wait may go on, so that the workers are to be woken.
    pub(crate) fn fence_at(&self, deadline: Option<Duration>) -> bool {
        self.fence.set(deadline)
    }

    /// Returns that time, which is 0 once it has come.
    pub(crate) fn fence(&self) -> Option<Duration> {
        self.fence.deadline()
    }

    /// Returns true if the fence's deadline has come.
    pub(crate) fn is_fenced(&self) -> bool {
        self.fence.has_come()
    }

    /// Returns true while paused, and while the fence is down.
    pub(crate) fn is_paused(&self) -> bool {
        self.word.load(Ordering::Acquire) & PAUSED != 0 || self.fence.is_down()
    }

    /// Returns the treatment of new clients, or `None` while open.
    pub(crate) fn mode(&self) -> Option<Mode> {
        match self.word.load(Ordering::Acquire) & !PASSES {
            0 => self.fence.is_down().then_some(Mode::Hold),
            PAUSED => Some(Mode::Hold),
            _ => Some(Mode::Reject),
        }
    }

    /// Returns the number of passes given and not yet dropped.
    pub(crate) fn passes(&self) -> u64 {
        self.word.load(Ordering::Acquire) & PASSES
    }

    /// Gives a pass unless the gate is paused or the fence has come down.
    pub(crate) fn enter(self: &Arc<Self>) -> Option<Pass> {
        if self.fence.has_come() {
            return None;
        }
        let admit = |word| (word & PAUSED == 0).then_some(word + 1);
        self.word.fetch_update(Ordering::AcqRel, Ordering::Acquire, admit).ok()?;
        Some(Pass { gate: Arc::clone(self), bypasses: false })
    }

    /// Gives a pass in spite of a pause, for a client that the operator lets through.
    pub(crate) fn enter_bypassing(self: &Arc<Self>) -> Pass {
        self.restore(true)
    }

    /// Gives a pass whatever the bits are, for a connection that had one in another process. `bypasses` is what
    /// [`Pass::bypasses`] was there.
    pub(crate) fn restore(self: &Arc<Self>, bypasses: bool) -> Pass {
        self.word.fetch_add(1, Ordering::AcqRel);
        Pass { gate: Arc::clone(self), bypasses }
    }

    fn change(&self, change: impl Fn(u64) -> u64) -> u64 {
        let changed = |word| Some(change(word));
        match self.word.fetch_update(Ordering::AcqRel, Ordering::Acquire, changed) {
            Ok(before) | Err(before) => before,
        }
    }

    /// Waits until the number of passes is 0. Returns false if `deadline` comes first.
    pub(crate) fn wait_idle(&self, deadline: Option<Instant>) -> bool {
        let mut idle = self.lock();
        idle.waiters += 1;
        let since = idle.moments;
        // The thread that drops the last pass notifies under this lock, after the count has fallen. So it cannot notify
        // between the check and the wait.
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

    /// Returns the number of idle moments so far. If it has changed, the gate was idle in between.
    pub(crate) fn idle_moments(&self) -> u64 {
        self.lock().moments
    }

    /// Makes the number of idle moments go on after `moments`, those of the process before.
    pub(crate) fn restore_idle_moments(&self, moments: u64) {
        self.lock().moments = moments;
    }

    /// Registers a callback for each idle moment. It runs on the leaving thread and under a lock of the gate, so it
    /// must neither block nor call the gate.
    pub(crate) fn watch_idle(&self, watcher: impl Fn() + Send + Sync + 'static) {
        self.lock().watchers.push(Box::new(watcher));
    }

    fn leave(&self) {
        let before = self.word.fetch_sub(1, Ordering::AcqRel);
        debug_assert_ne!(before & PASSES, 0, "more left than entered");
        if before & PASSES == 1 {
            let mut idle = self.lock();
            // A connection may have entered since. Then this idle moment is over and must not be reported: it would end
            // a wait that began after it. The last one to leave will come here again.
            if self.passes() == 0 {
                idle.moments += 1;
                if idle.waiters > 0 {
                    self.became_idle.notify_all();
                }
                idle.watchers.iter().for_each(|watcher| watcher());
            }
        }
    }

    /// Locks the idle state. It ignores poison, as no panic can leave the state half-changed.
    fn lock(&self) -> MutexGuard<'_, Idle> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pass {
    /// Returns true while the gate is paused.
    pub(crate) fn is_paused(&self) -> bool {
        self.gate.is_paused()
    }

    /// Returns true if it was given in spite of a pause.
    pub(crate) fn bypasses(&self) -> bool {
        let Self { gate: _, bypasses } = *self;
        bypasses
    }

    /// Returns true if a pause has begun or the fence has come down since it was given, and it was not given in spite of a
    /// pause.
    pub(crate) fn is_void(&self) -> bool {
        (self.is_paused() || self.gate.fence.has_come()) && !self.bypasses
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
    fn a_fence_that_is_down_holds_everyone_as_a_pause_does() {
        let gate = Arc::new(Gate::new());
        let inside = gate.enter().unwrap();
        assert!(!gate.fence_at(Some(Duration::from_millis(1))));
        assert!(!gate.is_paused(), "nobody has come to it yet");
        assert!(inside.is_void(), "it dials no further address");
        assert_eq!((gate.is_paused(), gate.mode()), (true, Some(Mode::Hold)));
        assert!(gate.enter().is_none());
        let let_through = gate.enter_bypassing();
        assert!(!let_through.is_void(), "an operator has asked for it");
        assert!(gate.pause(Mode::Reject), "no pause had begun");
        assert_eq!(gate.mode(), Some(Mode::Reject));
        assert!(gate.resume() && gate.is_paused() && gate.enter().is_none());
        assert!(gate.fence_at(None) && !gate.is_paused() && gate.mode().is_none());
        assert!(!inside.is_void() && gate.enter().is_some());
    }

    #[test]
    fn a_restored_pass_counts_in_a_pause_and_is_what_it_was() {
        let gate = Arc::new(Gate::new());
        gate.pause(Mode::Reject);
        for bypasses in [false, true] {
            let pass = gate.restore(bypasses);
            assert_eq!((pass.bypasses(), pass.is_void()), (bypasses, !bypasses));
            assert_eq!((gate.passes(), gate.mode()), (1, Some(Mode::Reject)));
            drop(pass);
            assert_eq!((gate.passes(), gate.mode()), (0, Some(Mode::Reject)));
        }
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
        let (sender, receiver) = std::sync::mpsc::channel();
        let waiter = std::thread::Builder::new().spawn({
            let gate = Arc::clone(&gate);
            move || {
                sender.send(std::fs::read_link("/proc/thread-self").unwrap()).unwrap();
                gate.wait_idle(Some(Instant::now() + Duration::from_secs(10)))
            }
        });
        let status = std::path::Path::new("/proc").join(receiver.recv().unwrap()).join("stat");
        let deadline = Instant::now() + Duration::from_secs(10);
        while !std::fs::read_to_string(&status).unwrap().contains(") S ") {
            assert!(Instant::now() < deadline, "it never comes to wait");
            std::thread::yield_now();
        }
        // The next client enters before the waiter can check.
        let next = Arc::new(Mutex::new(None));
        gate.watch_idle({
            let (gate, next) = (Arc::downgrade(&gate), Arc::clone(&next));
            move || *next.lock().unwrap() = gate.upgrade().and_then(|gate| gate.enter())
        });
        drop(pass);
        assert!(waiter.unwrap().join().unwrap());
        assert_eq!(gate.passes(), 1);
        // The watcher is called once more by this drop, and must not enter again.
        gate.pause(Mode::Hold);
        let last = next.lock().unwrap().take();
        drop(last);
    }
}

/// Model checks of every interleaving of small histories: `RUSTFLAGS="--cfg loom" cargo test --release --lib pause::gate`.
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

    /// A late notice of an idle moment before the wait must not end it: the upstream would be stopped under a
    /// connection.
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
