//! How many there may be of something: a count shared by the workers.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

/// A bounded number of places: for clients, as many as the descriptors allow, for those of a crowd that are under way, and for
/// TLS handshakes. Beyond them, clients wait.
#[derive(Debug)]
pub(crate) struct Semaphore {
    taken: AtomicUsize,
    max: AtomicUsize,
    /// Whether a worker has stopped for want of a slot and must be woken when one is free.
    wanted: AtomicBool,
}

/// The place of one client; dropping it frees the place.
#[derive(Debug)]
pub(crate) struct Permit(Arc<Semaphore>);

impl Semaphore {
    /// `max` free places.
    pub(crate) fn new(max: usize) -> Self {
        Self {
            taken: AtomicUsize::new(0),
            max: AtomicUsize::new(max),
            wanted: AtomicBool::new(false),
        }
    }

    /// How many places there are.
    pub(crate) fn max(&self) -> usize {
        self.max.load(Ordering::SeqCst)
    }

    /// Changes how many places there are, if `change` says so; those that are taken stay so. Returns whether it did.
    pub(crate) fn resize(&self, change: impl Fn(usize) -> Option<usize>) -> bool {
        self.max.fetch_update(Ordering::SeqCst, Ordering::SeqCst, change).is_ok()
    }

    /// Returns how many are taken.
    pub(crate) fn taken(&self) -> usize {
        self.taken.load(Ordering::SeqCst)
    }

    /// Whether a place is free.
    fn is_any_free(&self) -> bool {
        self.taken() < self.max()
    }

    /// Whether a place is free; otherwise it is on record that one is wanted, as by [`Semaphore::take`].
    pub(crate) fn is_any_free_or_wish(&self) -> bool {
        self.is_any_free() || {
            self.wanted.store(true, Ordering::SeqCst);
            self.is_any_free()
        }
    }

    /// A place, if one is free; otherwise the next [`Semaphore::take_wanted`] after one was freed says that it is wanted.
    pub(crate) fn take(self: &Arc<Self>) -> Option<Permit> {
        self.try_take().or_else(|| {
            self.wanted.store(true, Ordering::SeqCst);
            // One may have been freed before the wish was on record: look again, or nobody would ever tell.
            self.try_take()
        })
    }

    /// Whether someone waits for a place that is free, once: who may have freed one asks, and wakes the workers. While all
    /// are taken the wish stays on record, or those who wait would wake each other in a circle.
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
    fn a_freed_slot_is_told_once_to_whoever_wanted_it() {
        let slots = Arc::new(Semaphore::new(1));
        let slot = slots.take().unwrap();
        assert!(!slots.take_wanted());
        assert!(slots.take().is_none());
        assert!(!slots.take_wanted(), "none is free: waking would only ask again");
        drop(slot);
        assert!(slots.take_wanted());
        assert!(!slots.take_wanted());
        assert!(slots.take().is_some());
    }
}
