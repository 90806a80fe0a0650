//! Finds peers that have vanished with bytes on their way to them: the kernel would repeat those for a quarter of an hour, and
//! keepalive does not ask meanwhile. No event tells, so every connection is looked at now and then.

use std::time::Instant;

use super::Worker;
use crate::{
    connection::{Connection, deadline::Deadline},
    sys::SWEEP_TIME,
};

/// Connections looked at in one turn. Each costs two calls.
const TURN_LOOKS_MAX: u32 = 64;

/// A walk over all connections, a few at a time.
#[derive(Debug, Default)]
pub(super) struct VanishedSweep {
    /// Key that is looked at next.
    next: u32,
    /// Time of the next look; none while no connection has lasted long enough to have its keepalive.
    next_at: Option<Instant>,
}

impl VanishedSweep {
    pub(super) fn next_at(&self) -> Option<Instant> {
        self.next_at
    }
}

impl Worker<'_> {
    /// Looks at some of the connections, if it is time. One that is new has a minute before anybody could miss its peer.
    pub(super) fn look_for_vanished(&mut self, now: Instant) {
        let end = self.connections.end();
        let looks = end.div_ceil(TURN_LOOKS_MAX);
        if self.queues.len(Deadline::Relaying) == 0 {
            self.vanished.next_at = None;
            return;
        }
        let due = *self.vanished.next_at.get_or_insert(now + SWEEP_TIME / looks);
        if now < due {
            return;
        }
        for _connection in 0..TURN_LOOKS_MAX.min(end) {
            let slot = if self.vanished.next < end { self.vanished.next } else { 0 };
            self.vanished.next = slot + 1;
            self.act(slot, now, |connection, _context| Connection::look_for_vanished(connection));
        }
        self.vanished.next_at = Some(now + SWEEP_TIME / looks);
    }
}
