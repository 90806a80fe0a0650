//! Starting of waiting clients, in the order of arrival. A newcomer starts at once while no other client waits (see
//! `accept.rs`), and a wait also ends with its deadline or when the client leaves.

use std::time::Instant;

use super::Worker;
use super::timers::Key;
use crate::connection::{Connection, deadline::Deadline};

/// Waiting clients that are started in one turn, at most.
const TURN_STARTS_MAX: usize = 64;

impl Worker<'_> {
    /// Returns the client that has waited longest, and its arrival.
    pub(super) fn first_waiting(&self) -> Option<(Key, Instant)> {
        let awaiting = self.timers.first(Deadline::AwaitingUpstream).map(|(key, since)| {
            let connection = self.connections.get(key);
            (key, connection.map_or(since, Connection::accepted))
        });
        let heads = [awaiting, self.first_held()];
        heads.into_iter().flatten().min_by_key(|&(_key, arrived)| arrived)
    }

    /// Returns the first held client. If there is none and no pause, returns the first client that an earlier pause has
    /// rejected but that was not answered yet, as it can still be served.
    pub(super) fn first_held(&self) -> Option<(Key, Instant)> {
        let first = |deadline| self.timers.first(deadline);
        let untouched = || first(Deadline::AwaitingHandshake).or_else(|| first(Deadline::Sniffing));
        let is_open = !self.resources.shared.pauses.gate.is_paused();
        first(Deadline::Held).or_else(|| if is_open { untouched() } else { None })
    }

    /// Returns the time from which the first waiting client may start; none if an event will wake the worker instead.
    pub(super) fn may_start_at(&self, now: Instant) -> Option<Instant> {
        let (_key, arrived) = self.first_waiting()?;
        self.resources.shared.may_start_at(self.resources.index, arrived, now)
    }

    /// Returns true if a waiting client can start now, or has to wait for something else from now on.
    pub(super) fn can_start_waiting(&self, now: Instant) -> bool {
        self.first_to_await_upstream().is_some()
            || self.first_to_hold().is_some()
            || self.may_start_at(now).is_some_and(|at| at <= now)
    }

    /// Returns the first client that waits for the upstream although a pause has begun: it is to be held.
    fn first_to_hold(&self) -> Option<Key> {
        let (key, _since) = self.timers.first(Deadline::AwaitingUpstream)?;
        self.resources.shared.pauses.gate.is_paused().then_some(key)
    }

    /// Returns the first client that waits in the queue although the upstream is away: its patience is to begin. During a
    /// shortage of this host, such as a full UNIX backlog, held clients keep it until their first attempt: a server that is
    /// slow to start takes them in the end.
    fn first_to_await_upstream(&self) -> Option<(Key, Instant)> {
        let shared = &self.resources.shared;
        let is_away = shared.upstream.breaker().is_away() && !shared.pauses.gate.is_paused();
        self.first_held().filter(|_first| is_away)
    }

    /// Starts waiting clients, oldest first, as far as admission lets them. A client that has to wait for something else
    /// is moved before.
    pub(super) fn start_waiting(&mut self, now: Instant) {
        for _client in 0..TURN_STARTS_MAX {
            if let Some(key) = self.first_to_hold() {
                self.act(key, now, Connection::end_patience);
            } else if let Some((key, _since)) = self.first_to_await_upstream() {
                self.act(key, now, |connection, context| connection.begin_patience(context));
            } else if !self.start_first(now) {
                return;
            }
        }
    }

    /// Starts the client that has waited longest. Returns false if it may not start now.
    fn start_first(&mut self, now: Instant) -> bool {
        let Some((key, arrived)) = self.first_waiting() else { return false };
        let shared = &self.resources.shared;
        let Some((pass, ticket)) = shared.try_start(self.resources.index, arrived, now) else {
            return false;
        };
        self.act(key, now, |connection, context| connection.start_attempt(pass, ticket, context));
        true
    }
}
