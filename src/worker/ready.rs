//! The connections that a worker is to drive, first come, first served.

use std::collections::VecDeque;

use super::timers::Key;

/// Connections to be driven; each stands here at most once.
#[derive(Debug, Default)]
pub(crate) struct Ready {
    slots: VecDeque<Key>,
    /// Which slots stand in `slots`.
    is_ready: Vec<bool>,
}

impl Ready {
    /// Puts `slot` at the end, unless it stands here already.
    pub(crate) fn push(&mut self, slot: Key) {
        if self.is_ready.len() <= slot as usize {
            self.is_ready.resize(slot as usize + 1, false);
        }
        if let Some(is_ready) = self.is_ready.get_mut(slot as usize)
            && !std::mem::replace(is_ready, true)
        {
            self.slots.push_back(slot);
        }
    }

    /// Takes the first one out.
    pub(crate) fn pop(&mut self) -> Option<Key> {
        let slot = self.slots.pop_front()?;
        if let Some(is_ready) = self.is_ready.get_mut(slot as usize) {
            *is_ready = false;
        }
        Some(slot)
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.slots.len()
    }

    /// Whether there is none.
    pub(crate) fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_is_ready_stands_in_line_once() {
        let mut ready = Ready::default();
        for slot in [7, 3, 7] {
            ready.push(slot);
        }
        assert_eq!((ready.pop(), ready.len()), (Some(7), 1));
        ready.push(7);
        assert_eq!([ready.pop(), ready.pop(), ready.pop()], [Some(3), Some(7), None]);
        assert!(ready.is_empty());
    }
}
