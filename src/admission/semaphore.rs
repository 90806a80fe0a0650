//! A counting semaphore, shared by the workers. It never blocks: a worker without a permit is woken later.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

/// A bounded number of permits: for clients, held clients, the window of clients under way, probes, or TLS handshakes.
#[derive(Debug)]
pub(crate) struct Semaphore {
    taken: AtomicUsize,
    max: AtomicUsize,
    /// Set while a worker waits for a permit and must be woken when one is free.
    wanted: AtomicBool,
}

/// A unit of a semaphore. Dropping it gives it back.
#[derive(Debug)]
pub(crate) struct Permit(Arc<Semaphore>);

impl Semaphore {
    /// Returns a semaphore with `max` free permits.
    pub(crate) fn new(max: usize) -> Self {
        Self {
            taken: AtomicUsize::new(0),
            max: AtomicUsize::new(max),
            wanted: AtomicBool::new(false),
        }
    }

    /// Returns the number of permits, free or taken.
    pub(crate) fn max(&self) -> usize {
        self.max.load(Ordering::SeqCst)
    }

    /// Sets the number of permits to the result of `change`, if it returns one. Taken permits stay valid. Returns true
    /// if the number was set.
    pub(crate) fn resize(&self, change: impl Fn(usize) -> Option<usize>) -> bool {
        self.max.fetch_update(Ordering::SeqCst, Ordering::SeqCst, change).is_ok()
    }

    /// Returns the number of taken permits.
    pub(crate) fn taken(&self) -> usize {
        self.taken.load(Ordering::SeqCst)
    }

    fn is_any_free(&self) -> bool {
        self.taken() < self.max()
    }

    /// Returns true if a permit is free. Otherwise it registers a wish for one, as [`Semaphore::take`] does.
    pub(crate) fn is_any_free_or_wish(&self) -> bool {
        self.is_any_free() || {
            self.wanted.store(true, Ordering::SeqCst);
            self.is_any_free()
        }
    }

    /// Takes a permit. If none is free, it registers a wish for one: [`Semaphore::take_wanted`] returns true once a
    /// permit is given back.
    pub(crate) fn take(self: &Arc<Self>) -> Option<Permit> {
        self.try_take().or_else(|| {
            self.wanted.store(true, Ordering::SeqCst);
            // A permit given back before the wish was registered wakes nobody, so this looks again.
            self.try_take()
        })
    }

    /// Takes a permit whether or not one is free, for a client that had one in another process. Beyond the maximum, no
    /// other is given until enough are given back.
    pub(crate) fn take_beyond(self: &Arc<Self>) -> Permit {
        self.taken.fetch_add(1, Ordering::SeqCst);
        Permit(Arc::clone(self))
    }

    /// Returns true once if a worker waits for a permit and one is free. A worker that may have given permits back asks,
    /// and then wakes the others. The wish is kept while no permit is free, so that waiting workers do not wake each
    /// other in a loop.
    pub(crate) fn take_wanted(&self) -> bool {
        self.wanted.load(Ordering::SeqCst)
            && self.is_any_free()
            && self.wanted.swap(false, Ordering::SeqCst)
    }

    fn try_take(self: &Arc<Self>) -> Option<Permit> {
        let more = |taken| (taken < self.max()).then_some(taken + 1);
        self.taken.fetch_update(Ordering::SeqCst, Ordering::SeqCst, more).ok()?;
        Some(Permit(Arc::clone(self)))
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.taken.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wish_is_reported_once_when_its_permit_is_free() {
        let semaphore = Arc::new(Semaphore::new(1));
        let permit = semaphore.take().unwrap();
        assert!(!semaphore.take_wanted());
        assert!(semaphore.take().is_none());
        assert!(!semaphore.take_wanted(), "none is free: a woken worker would only wish again");
        drop(permit);
        assert!(semaphore.take_wanted());
        assert!(!semaphore.take_wanted());
        assert!(semaphore.take().is_some());
    }

    #[test]
    fn permits_beyond_the_maximum_are_given_back_before_another_is_given() {
        let semaphore = Arc::new(Semaphore::new(1));
        let mut beyond: Vec<_> = (0..3).map(|_| semaphore.take_beyond()).collect();
        assert_eq!(semaphore.taken(), 3);
        while beyond.pop().is_some_and(|_| !beyond.is_empty()) {
            assert!(semaphore.take().is_none(), "{} are taken", semaphore.taken());
            assert!(!semaphore.take_wanted());
        }
        assert!(semaphore.take_wanted());
        assert!(semaphore.take().is_some());
    }
}
