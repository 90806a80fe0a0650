//! The order in which a worker's clients that wait are started, and the only way out of waiting.

use std::time::Instant;

use super::Worker;
use super::timers::Key;
use crate::connection::{Connection, deadline::Deadline};

/// How many clients are released in one turn after a resume.
const TURN_RELEASES_MAX: usize = 64;

impl Worker<'_> {
    /// Returns the client that has waited longest, and when it came.
    pub(super) fn first_waiting(&self) -> Option<(Key, Instant)> {
        let awaiting = self.timers.first(Deadline::AwaitingUpstream).map(|(key, since)| {
            let connection = self.connections.get(key);
            (key, connection.and_then(Connection::arrived).unwrap_or(since))
        });
        let heads = [awaiting, self.first_held()];
        heads.into_iter().flatten().min_by_key(|&(_key, arrived)| arrived)
    }

    /// Returns the first client that is held, or after a resume, is to be rejected and was not touched yet.
    pub(super) fn first_held(&self) -> Option<(Key, Instant)> {
        let first = |deadline| self.timers.first(deadline);
        let untouched = || first(Deadline::AwaitingHandshake).or_else(|| first(Deadline::Sniffing));
        let is_open = !self.resources.shared.pauses.gate.is_paused();
        first(Deadline::Held).or_else(|| if is_open { untouched() } else { None })
    }

    /// Returns the moment from which the first client that waits may be started, unless something else will wake the worker.
    pub(super) fn may_start_at(&self, now: Instant) -> Option<Instant> {
        let (_key, arrived) = self.first_waiting()?;
        self.resources.shared.may_start_at(self.resources.index, arrived, now)
    }

    /// Returns true if a client that waits can be released now, or waits for the wrong thing.
    pub(super) fn can_release(&self, now: Instant) -> bool {
        self.first_to_await_upstream().is_some()
            || self.first_to_hold().is_some()
            || self.may_start_at(now).is_some_and(|at| at <= now)
    }

    /// Returns the first client that waits for the upstream although a pause has come: all are held.
    fn first_to_hold(&self) -> Option<Key> {
        let (key, _since) = self.timers.first(Deadline::AwaitingUpstream)?;
        self.resources.shared.pauses.gate.is_paused().then_some(key)
    }

    /// Returns the first client that waits for its turn although the upstream is away: the patience of all has an end. Where
    /// this host is short of something, only the clients that have tried lose it.
    fn first_to_await_upstream(&self) -> Option<(Key, Instant)> {
        let shared = &self.resources.shared;
        let is_away = shared.upstream.breaker().is_away() && !shared.pauses.gate.is_paused();
        self.first_held().filter(|_first| is_away)
    }

    /// Starts clients that wait, oldest first, as far as admission lets them.
    pub(super) fn release(&mut self, now: Instant) {
        for _client in 0..TURN_RELEASES_MAX {
            if let Some(key) = self.first_to_hold() {
                self.act(key, now, |connection, _context| connection.end_patience());
            } else if let Some((key, arrived)) = self.first_to_await_upstream() {
                self.act(key, now, |connection, context| {
                    connection.begin_patience(arrived, context)
                });
            } else if !self.start_first(now) {
                return;
            }
        }
    }

    /// Starts the client that has waited longest, if it may be.
    fn start_first(&mut self, now: Instant) -> bool {
        let Some((key, arrived)) = self.first_waiting() else { return false };
        let shared = &self.resources.shared;
        let Some((pass, ticket)) = shared.try_start(self.resources.index, arrived, now) else {
            return false;
        };
        self.act(key, now, |connection, context| {
            connection.release(pass, ticket, arrived, context)
        });
        true
    }
}
