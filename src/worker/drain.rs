//! Closing of silent connections and of half-closed held clients, by the orders of `pause/drain.rs`.
//!
//! During a pause, the operator may order it, as pools and keep-alive connections never end by themselves. A stop
//! closes connections whose server has ended its stream, while the client keeps its side for its next use.

use std::time::{Duration, Instant};

use super::Worker;
use crate::{
    connection::{Connection, deadline::Deadline, quiet::QuietLimits},
    shared::Phase,
};

/// Silence after which a stop closes a connection whose server has ended its stream. If only the client has ended its
/// stream, the server may be in the middle of an answer, which must not be cut.
const STOPPING_ENDED_QUIET: Duration = Duration::from_secs(1);

/// Connections that are closed as quiet in one turn, at most.
const TURN_QUIET_MAX: usize = 64;
/// Least interval between two searches for quiet connections, each of which looks at all.
const QUIET_LOOK_INTERVAL: Duration = Duration::from_millis(50);
/// Divisor of the relayed connections that one search may close, so that not all of their clients reconnect at once. A
/// thousand that fell silent at the same moment take five seconds.
const QUIET_ONE_OF: usize = 20;

impl Worker<'_> {
    /// Drives the waiting clients that have ended their stream, once a pause drops these: their events came before.
    pub(super) fn drop_half_closed(&mut self) {
        let changes = self.resources.shared.pauses.drain.half_closed_changes();
        if std::mem::replace(&mut self.half_closed_changes, changes) == changes {
            return;
        }
        for key in self.timers.keys(Deadline::Held) {
            if self.connections.get(key).is_some_and(Connection::is_waiting_half_closed) {
                self.ready.push(key);
            }
        }
    }

    /// Closes connections that have been silent for the ordered time.
    pub(super) fn close_quiet(&mut self, now: Instant) {
        let shared = &self.resources.shared;
        let is_running = shared.phase() == Phase::Running;
        let (orders, is_paused) = (&shared.pauses.drain, shared.pauses.gate.is_paused());
        let limits = QuietLimits {
            any: orders.quiet().filter(|_| is_paused),
            postgres: orders.postgres_quiet().filter(|_| is_paused),
            ended: (!is_running).then_some(STOPPING_ENDED_QUIET),
        };
        self.buffers.copies_all = limits.postgres.is_some();
        if std::mem::replace(&mut self.quiet, limits) != limits {
            self.look_for_quiet = None;
        }
        let Some(quiet) = limits.shortest() else { return };
        if self.look_for_quiet.is_some_and(|at| now < at) {
            return;
        }
        // A connection that falls silent from now on is due later than this.
        let mut next = now.checked_add(quiet);
        let relayed =
            self.timers.len(Deadline::NoKeepaliveYet) + self.timers.len(Deadline::Relaying);
        let mut left = relayed.div_ceil(QUIET_ONE_OF).min(TURN_QUIET_MAX);
        for key in 0..self.connections.end() {
            let connection = self.connections.get_mut(key);
            let Some(at) = connection.and_then(|it| it.quiet_at(limits)) else { continue };
            if at > now || left == 0 {
                next = next.map(|next| next.min(at));
                continue;
            }
            left -= 1;
            self.act(key, now, Connection::end_quiet);
        }
        self.look_for_quiet = next.map(|next| next.max(now + QUIET_LOOK_INTERVAL));
    }
}
