//! Closes connections that are silent while a pause wants it: pools and keep-alive connections never end by themselves. A stop
//! does not wait for those whose server has ended its stream, and whose client keeps the rest for its next use.

use std::time::{Duration, Instant};

use super::Worker;
use crate::{
    connection::{Connection, QuietLimits, deadline::Deadline},
    shared::Phase,
};

/// Silence after which a connection whose server has ended its stream is over for a stop. Where only the client has ended its
/// own, the server may be in the middle of an answer: nobody has asked for that to be cut.
const STOPPING_ENDED_QUIET: Duration = Duration::from_secs(1);

/// How many connections are closed as quiet in one turn.
const TURN_QUIET_MAX: usize = 64;
/// How long at least until the next look for quiet connections, which looks at all.
const QUIET_LOOK_INTERVAL: Duration = Duration::from_millis(50);
/// One of how many that are carried is closed in a look: not all of their clients shall connect anew at once. A thousand
/// that have fallen silent at the same moment take five seconds.
const QUIET_ONE_OF: usize = 20;

impl Worker<'_> {
    /// Closes connections that have been silent for as long as the operator says.
    pub(super) fn close_quiet(&mut self, now: Instant) {
        let shared = &self.resources.shared;
        let is_running = shared.phase() == Phase::Running;
        let limits = QuietLimits {
            any: shared.pauses.drain.quiet().filter(|_| shared.pauses.gate.is_paused()),
            ended: (!is_running).then_some(STOPPING_ENDED_QUIET),
        };
        if std::mem::replace(&mut self.quiet, limits) != limits {
            self.look_for_quiet = None;
        }
        let Some(quiet) = limits.any.into_iter().chain(limits.ended).min() else { return };
        if self.look_for_quiet.is_some_and(|at| now < at) {
            return;
        }
        // Whoever falls silent from now on is quiet later than that.
        let mut next = now.checked_add(quiet);
        let carried =
            self.queues.len(Deadline::NoKeepaliveYet) + self.queues.len(Deadline::Relaying);
        let mut left = carried.div_ceil(QUIET_ONE_OF).min(TURN_QUIET_MAX);
        for slot in 0..self.connections.end() {
            let connection = self.connections.get_mut(slot);
            let Some(at) = connection.and_then(|it| it.quiet_at(limits)) else { continue };
            if at > now || left == 0 {
                next = next.map(|next| next.min(at));
                continue;
            }
            left -= 1;
            self.act(slot, now, Connection::end_quiet);
        }
        self.look_for_quiet = next.map(|next| next.max(now + QUIET_LOOK_INTERVAL));
    }
}
