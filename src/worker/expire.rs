//! Deadlines of a worker's connections: the next one, and what is due.

use std::time::{Duration, Instant};

use super::{Worker, accept::Accepting};
use crate::connection::{Connection, deadline::Deadline};

/// Connections with one kind of deadline that expire in one turn, at most.
const TURN_EXPIRES_MAX: usize = 64;
/// Time between the checks of any two stalled connections: of five hundred, each is checked once a second.
const STALLED_PACE: Duration = Duration::from_millis(2);

impl Worker<'_> {
    /// Returns the time until the next deadline; none without one.
    pub(super) fn next_deadline(&self, now: Instant) -> Option<Duration> {
        let accept_again = match self.accepting {
            Accepting::RetryAt(until) => Some(until),
            Accepting::Ready | Accepting::Full => None,
        };
        let deadlines = (0..self.deadlines.len()).filter_map(|index| {
            let (deadline, length) = self.deadline(index)?;
            let (_key, since) = self.timers.first(deadline)?;
            self.runs_since(deadline, since)?.checked_add(length)
        });
        let next = deadlines
            .chain(accept_again)
            .chain(self.may_start_at(now))
            .chain(self.look_for_quiet)
            .chain(self.vanished.next_at())
            .chain(self.doomed.next_at())
            .chain(self.log.tell_at())
            .chain(self.resources.shared.shutdown.deadline())
            .min()?;
        Some(next.saturating_duration_since(now))
    }

    /// Returns a kind of deadline and its length, if it is in force now. The hold timeout is in force only during a pause,
    /// and the patience with an absent upstream only without one.
    fn deadline(&self, index: usize) -> Option<(Deadline, Duration)> {
        let deadline = self.deadlines.get(index).copied();
        let is_paused = self.resources.shared.pauses.gate.is_paused();
        match deadline? {
            (Deadline::Held, _) if !is_paused => None,
            (Deadline::AwaitingUpstream, _) if is_paused => None,
            (Deadline::Stalled, at_least) => {
                Some((Deadline::Stalled, at_least.max(self.stalled_pace())))
            }
            other => Some(other),
        }
    }

    /// Returns the moment from which a deadline runs that began at `since`; none while it does not run.
    fn runs_since(&self, deadline: Deadline, since: Instant) -> Option<Instant> {
        match deadline {
            Deadline::AwaitingUpstream => {
                self.resources.shared.upstream.breaker().patience_since(since)
            }
            _ => Some(since),
        }
    }

    /// Returns the interval between two checks of a stalled connection. The kernel reports no progress of these, so the
    /// interval grows with their number, to bound the work.
    fn stalled_pace(&self) -> Duration {
        u32::try_from(self.timers.len(Deadline::Stalled))
            .map_or(Duration::MAX, |n| STALLED_PACE * n)
    }

    /// Expires connections whose deadline has passed.
    pub(super) fn expire(&mut self, now: Instant) {
        if self.resources.shared.freeze.asks_workers() {
            // Not all may have been driven whose events have come, such as the answer to a dial.
            return;
        }
        for index in 0..self.deadlines.len() {
            let Some((deadline, length)) = self.deadline(index) else { continue };
            let is_over = |since: Option<Instant>| {
                since.is_some_and(|since| now.saturating_duration_since(since) >= length)
            };
            // A connection that keeps its kind of deadline goes to the tail of the list, so the count prevents that it is
            // expired twice. The rest follow in the next turn, after its events.
            for _connection in 0..self.timers.len(deadline).min(TURN_EXPIRES_MAX) {
                match self.timers.first(deadline) {
                    Some((key, since)) if is_over(self.runs_since(deadline, since)) => {
                        self.act(key, now, Connection::expire);
                    }
                    _ => break,
                }
            }
        }
    }
}
