//! `Claim`: what a caller of `PUT /paused` has asked for and not got yet.

use std::time::{Duration, Instant};

use log::info;

use super::{response::Answer, routes::Asker};
use crate::handle::{Handle, ledger::Look};

/// How long reset connections may take to be gone. A worker closes them in its next turn.
pub(super) const KILL_TIMEOUT: Duration = Duration::from_secs(5);

/// A pause that is undone when this is dropped, unless it stands for itself by then. So it is undone however its caller goes,
/// and if the front panics.
pub(super) struct Claim {
    handle: Handle,
    asker: String,
    ticket: u64,
    begun: Instant,
    /// How many connections were reset for it.
    reset: u64,
    /// Whether there may be something to undo.
    is_open: bool,
}

impl Claim {
    pub(super) fn new(handle: Handle, asker: Asker<'_>) -> Self {
        let (begun, Asker { name, ticket }) = (Instant::now(), asker);
        Self { handle, asker: name.to_owned(), ticket, begun, reset: 0, is_open: true }
    }

    /// Whether what it waits for has come about.
    pub(super) fn look(&self) -> Look {
        self.handle.look(self.ticket)
    }

    /// Whether the pause holds.
    pub(super) fn holds(&self) -> bool {
        self.look() != Look::Ended
    }

    pub(super) fn handle(&self) -> &Handle {
        &self.handle
    }

    /// The caller has sent a byte: the time of its pause begins anew.
    pub(super) fn renew(&self) {
        self.handle.renew(self.ticket);
    }

    /// Resets what is left.
    pub(super) fn kill(&mut self) {
        self.reset += self.handle.kill(&self.asker);
    }

    /// The pause stands for itself from now on.
    pub(super) fn settle(self) {
        self.handle.settle(self.ticket);
        self.forget();
    }

    /// As `settle`, although it is not idle.
    pub(super) fn keep(self) {
        info!(
            "the pause that {} has asked for is kept, although it is not idle in time",
            self.asker
        );
        self.settle();
    }

    /// There is nothing that could be undone, and nothing to come.
    pub(super) fn forget(mut self) {
        self.is_open = false;
        self.handle.forbid(self.ticket);
    }

    /// Ends the pause with its connection.
    pub(super) fn close(mut self) {
        self.is_open = false;
        self.handle.close(self.ticket);
    }

    /// Undoes the pause.
    pub(super) fn undo(mut self, because: &str) {
        self.is_open = false;
        self.handle.undo(self.ticket, because);
    }

    /// The answer to a caller whose pause has begun.
    pub(super) fn success(&self, is_idle: bool) -> Answer {
        let (waited, reset) = (self.begun.elapsed().as_secs_f64(), self.reset);
        let body = format!(
            "{{\"paused\": true, \"idle\": {is_idle}, \"waited_seconds\": {waited:.3}, \"reset\": {reset}}}\n"
        );
        Answer { status: 201, ..Answer::json(body) }
    }

    /// The answer to a caller whose pause is not idle in time.
    pub(super) fn failure(handle: &Handle) -> Answer {
        let paused = handle.is_paused();
        let active = handle.0.gate.passes();
        let oldest =
            handle.oldest().map_or("null".to_owned(), |age| format!("{:.3}", age.as_secs_f64()));
        let text = if paused {
            "The time is up: connections are still carried or dialled for. It stays paused."
        } else {
            "The time is up: connections are still carried or dialled for. The pause is undone."
        };
        let body = format!(
            "{{\"error\": \"{text}\", \"status\": 504, \"active\": {active}, \"oldest_seconds\": {oldest}, \"paused\": {paused}}}\n"
        );
        Answer { status: 504, ..Answer::json(body) }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if self.is_open {
            self.handle.undo(self.ticket, "its caller has gone");
        }
    }
}
