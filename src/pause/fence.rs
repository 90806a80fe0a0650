//! The fence: one atomic deadline from which on the gate admits nobody.
//!
//! The fleet's thread sets it, and moves it on with each contact. That thread may hang, and the whole process may be stopped
//! and go on behind the deadline, so each admission compares it by itself.

use std::time::Duration;

#[cfg(loom)]
use loom::sync::atomic::{AtomicU64, Ordering};
#[cfg(not(loom))]
use std::sync::atomic::{AtomicU64, Ordering};

use crate::sys::boot::boot_time;

/// Deadline that never comes.
const NEVER: u64 = u64::MAX;
/// Deadline that has come, so that no clock is read any more.
const DOWN: u64 = 0;

/// Deadline in milliseconds since the start of the host. That clock goes on while the host is suspended.
#[derive(Debug)]
pub(super) struct Fence(AtomicU64);

impl Fence {
    /// Returns a fence whose deadline never comes.
    pub(super) fn new() -> Self {
        Self(AtomicU64::new(NEVER))
    }

    /// Sets another deadline, or none. Returns true if the fence was down: those that wait behind it may go on.
    pub(super) fn set(&self, deadline: Option<Duration>) -> bool {
        let deadline = deadline.map_or(NEVER, |at| millis(at).min(NEVER - 1));
        self.0.swap(deadline, Ordering::AcqRel) == DOWN && deadline != DOWN
    }

    /// Returns the deadline, which is 0 once it has come.
    pub(super) fn deadline(&self) -> Option<Duration> {
        let deadline = self.0.load(Ordering::Acquire);
        (deadline != NEVER).then(|| Duration::from_millis(deadline))
    }

    /// Returns true if [`Fence::has_come`] has found that the deadline has come. It reads no clock.
    pub(super) fn is_down(&self) -> bool {
        self.0.load(Ordering::Acquire) == DOWN
    }

    /// Returns true if the deadline has come. It reads the clock only if there is a deadline.
    pub(super) fn has_come(&self) -> bool {
        let deadline = self.0.load(Ordering::Acquire);
        if deadline == NEVER || deadline != DOWN && millis(boot_time()) < deadline {
            return false;
        }
        // A deadline that was set meanwhile stays, and the next admission compares it.
        self.0.compare_exchange(deadline, DOWN, Ordering::AcqRel, Ordering::Acquire).ok();
        true
    }
}

/// Returns a time in milliseconds, as a deadline is kept.
pub(super) fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(NEVER)
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn the_fence_comes_down_at_its_deadline_and_goes_up_with_another() {
        let fence = Fence::new();
        assert!(!fence.has_come() && !fence.is_down() && fence.deadline().is_none());
        let hour = Duration::from_secs(3600);
        assert!(!fence.set(Some(boot_time() + hour)));
        assert!(!fence.has_come() && !fence.is_down() && fence.deadline().is_some());
        assert!(!fence.set(Some(boot_time())));
        assert!(!fence.is_down(), "nobody has looked at the clock");
        assert!(fence.has_come() && fence.is_down());
        assert_eq!(fence.deadline(), Some(Duration::ZERO));
        assert!(!fence.set(Some(Duration::ZERO)), "it stays down");
        assert!(fence.has_come());
        assert!(fence.set(Some(boot_time() + hour)));
        assert!(!fence.has_come() && !fence.is_down());
        fence.set(Some(Duration::ZERO));
        assert!(fence.set(None) && !fence.has_come());
        assert!(!fence.set(Some(Duration::MAX)) && !fence.has_come() && fence.deadline().is_some());
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use loom::{sync::Arc, thread};

    use super::*;

    /// An admission that has compared an old deadline must not bring the fence down that stands for a new one: nobody would
    /// raise it again.
    #[test]
    fn fence_a_new_deadline_is_never_lost() {
        loom::model(|| {
            let fence = Arc::new(Fence::new());
            fence.set(Some(Duration::from_millis(1)));
            let workers = [(); 2].map(|()| {
                let fence = fence.clone();
                thread::spawn(move || fence.has_come())
            });
            let was_down = fence.set(None);
            let came = workers.map(|worker| worker.join().unwrap());
            assert!(!fence.has_come() && !fence.is_down());
            assert!(!was_down || came.contains(&true), "it was brought down by one of them");
        });
    }
}
