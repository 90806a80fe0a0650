//! Queue of the connections that a worker is to drive, first in, first out.

use std::collections::VecDeque;

use super::timers::Key;

/// Connections to be driven, each at most once.
#[derive(Debug, Default)]
pub(crate) struct Ready {
    keys: VecDeque<Key>,
    /// Flag of each key: set while it is in the queue.
    is_ready: Vec<bool>,
}

impl Ready {
    /// Appends `key` unless it is in the queue already.
    pub(crate) fn push(&mut self, key: Key) {
        if self.is_ready.len() <= key as usize {
            self.is_ready.resize(key as usize + 1, false);
        }
        if let Some(is_ready) = self.is_ready.get_mut(key as usize)
            && !std::mem::replace(is_ready, true)
        {
            self.keys.push_back(key);
        }
    }

    /// Appends `key` if it is due and not in the queue already.
    pub(crate) fn push_if(&mut self, is_due: bool, key: Key) {
        if is_due {
            self.push(key);
        }
    }

    /// Removes and returns the first key.
    pub(crate) fn pop(&mut self) -> Option<Key> {
        let key = self.keys.pop_front()?;
        if let Some(is_ready) = self.is_ready.get_mut(key as usize) {
            *is_ready = false;
        }
        Some(key)
    }

    /// Returns true if `key` is in the queue.
    pub(crate) fn contains(&self, key: Key) -> bool {
        self.is_ready.get(key as usize).is_some_and(|&is_ready| is_ready)
    }

    /// Returns the number of connections in the queue.
    pub(crate) fn len(&self) -> usize {
        self.keys.len()
    }

    /// Returns true if the queue is empty.
    pub(crate) fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ready_key_is_queued_once() {
        let mut ready = Ready::default();
        for key in [7, 3, 7] {
            ready.push(key);
        }
        assert_eq!([7, 3, 2, 9].map(|key| ready.contains(key)), [true, true, false, false]);
        assert_eq!((ready.pop(), ready.len()), (Some(7), 1));
        assert!(!ready.contains(7));
        ready.push(7);
        assert_eq!([ready.pop(), ready.pop(), ready.pop()], [Some(3), Some(7), None]);
        assert!(ready.is_empty());
    }
}
