//! `PendingPause`: what a caller of `PUT /paused` has asked for and not got yet.

use std::time::{Duration, Instant};

use log::info;

use super::{response::Response, routes::Caller};
use crate::{handle::Handle, pause::WaitState};

/// How long reset connections may take to be gone. A worker closes them in its next turn.
pub(super) const KILL_TIMEOUT: Duration = Duration::from_secs(5);

/// A pause that is undone when this is dropped, unless it stands for itself by then. So it is undone however its caller goes,
/// and if the front panics.
pub(super) struct PendingPause {
    handle: Handle,
    asker: String,
    request_id: u64,
    begun: Instant,
    /// How many connections were reset for it.
    reset: u64,
    /// Whether there may be something to undo.
    is_open: bool,
}

impl PendingPause {
    pub(super) fn new(handle: Handle, asker: Caller<'_>) -> Self {
        let (begun, Caller { name, request_id }) = (Instant::now(), asker);
        Self { handle, asker: name.to_owned(), request_id, begun, reset: 0, is_open: true }
    }

    /// Whether what it waits for has come about.
    pub(super) fn look(&self) -> WaitState {
        self.handle.pauses().wait_state(self.request_id)
    }

    /// Whether the pause holds.
    pub(super) fn holds(&self) -> bool {
        self.look() != WaitState::Ended
    }

    pub(super) fn handle(&self) -> &Handle {
        &self.handle
    }

    /// The caller has sent a byte: the time of its pause begins anew.
    pub(super) fn renew(&self) {
        self.handle.pauses().renew(self.request_id);
    }

    /// Resets what is left.
    pub(super) fn kill(&mut self) {
        self.reset += self.handle.pauses().kill(&self.asker);
    }

    /// The pause stands for itself from now on.
    pub(super) fn settle(self) {
        self.handle.pauses().settle(self.request_id);
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
        self.handle.pauses().forbid(self.request_id);
    }

    /// Ends the pause with its connection.
    pub(super) fn close(mut self) {
        self.is_open = false;
        self.handle.pauses().close(self.request_id);
    }

    /// Undoes the pause.
    pub(super) fn undo(mut self, because: &str) {
        self.is_open = false;
        self.handle.pauses().undo(self.request_id, because);
    }

    /// The answer to a caller whose pause has begun.
    pub(super) fn success(&self, is_idle: bool) -> Response {
        let (waited, reset) = (self.begun.elapsed().as_secs_f64(), self.reset);
        let body = format!(
            "{{\"paused\": true, \"idle\": {is_idle}, \"waited_seconds\": {waited:.3}, \"reset\": {reset}}}\n"
        );
        Response { status: 201, ..Response::json(body) }
    }

    /// The answer to a caller whose pause is not idle in time.
    pub(super) fn failure(handle: &Handle) -> Response {
        let paused = handle.is_paused();
        let active = handle.pauses().gate.passes();
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
        Response { status: 504, ..Response::json(body) }
    }
}

impl Drop for PendingPause {
    fn drop(&mut self) {
        if self.is_open {
            self.handle.pauses().undo(self.request_id, "its caller has gone");
        }
    }
}
