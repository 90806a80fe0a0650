//! Publishing of a worker's state: counts and ages for operators, and the arrival of its oldest waiting client for the other
//! workers.

use std::time::Instant;

use super::Worker;
use crate::connection::{
    Connection,
    deadline::{DIALLED, Deadline, RELAYED},
};

impl Worker<'_> {
    /// Publishes all of it.
    pub(super) fn publish(&self) {
        let shared = &self.resources.shared;
        let counters = shared.workers.counters(self.resources.index);
        let since = |at: Option<Instant>| at.map_or(0, |at| shared.millis(at) + 1);
        let head = self.publish_head();
        counters.oldest_held.set(since(head));
        let [used, free] = &counters.pipes;
        let pipes = &self.buffers.pipes;
        used.set(pipes.used());
        free.set(pipes.free());
        // Most turns carry bytes, and change no list.
        if !self.timers.take_change() {
            return;
        }
        counters.change(|| self.timers.publish(counters));
        let first = |&deadline: &Deadline| self.connections.get(self.timers.first(deadline)?.0);
        // In each list the oldest come first, or nearly so.
        let oldest = |deadlines: &[Deadline]| {
            since(deadlines.iter().filter_map(first).map(Connection::accepted).min())
        };
        counters.oldest.set(oldest(&RELAYED));
        counters.oldest_connecting.set(oldest(&DIALLED));
    }

    /// Publishes the arrival of the client that has waited longest, and returns it. If another worker has the next client to
    /// start, this wakes it.
    pub(super) fn publish_head(&self) -> Option<Instant> {
        let shared = &self.resources.shared;
        let head = self.first_waiting().map(|(_key, arrived)| arrived);
        let queue = &shared.admission.queue;
        if let Some(change) = queue.publish_head(self.resources.index, head) {
            if let Some(next) = change.wake {
                shared.workers.wake(next);
            }
            if queue.has_vain_bypass() {
                // The last client that was to bypass the pause has left, and no pass tells of it.
                shared.pauses.notify();
            }
        }
        head
    }
}
