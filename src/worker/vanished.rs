//! Search for peers that have vanished while bytes were in flight to them.
//!
//! The kernel would retransmit those bytes for a quarter of an hour, and sends no keepalive meanwhile. No event reports
//! it, so every connection is checked now and then.

use std::time::Instant;

use super::Worker;
use crate::{
    connection::{Connection, deadline::Deadline},
    sys::SWEEP_TIME,
};

/// Connections checked in one turn. Each costs two calls.
const TURN_LOOKS_MAX: u32 = 64;

/// A walk over all connections, a few at a time.
#[derive(Debug, Default)]
pub(super) struct VanishedSweep {
    /// Key to be checked next.
    next: u32,
    /// Time of the next check; `None` while no connection has lasted long enough to have its keepalive.
    next_at: Option<Instant>,
}

impl VanishedSweep {
    pub(super) fn next_at(&self) -> Option<Instant> {
        self.next_at
    }
}

impl Worker<'_> {
    /// Checks some of the connections if that is due. The first check waits as long as the others: a peer counts as
    /// vanished only after 150 s.
    pub(super) fn look_for_vanished(&mut self, now: Instant) {
        let end = self.connections.end();
        let looks = end.div_ceil(TURN_LOOKS_MAX);
        if self.timers.len(Deadline::Relaying) == 0 {
            self.vanished.next_at = None;
            return;
        }
        let due = *self.vanished.next_at.get_or_insert(now + SWEEP_TIME / looks);
        if now < due {
            return;
        }
        for _connection in 0..TURN_LOOKS_MAX.min(end) {
            let key = if self.vanished.next < end { self.vanished.next } else { 0 };
            self.vanished.next = key + 1;
            self.act(key, now, |connection, _context| Connection::look_for_vanished(connection));
        }
        self.vanished.next_at = Some(now + SWEEP_TIME / looks);
    }
}
