//! `PendingPause`: a pause that its caller has asked for and that is not committed yet.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    thread,
    time::{Duration, Instant},
};

use log::{error, info};
use serde::{Deserialize, Serialize};

use super::{command::Caller, response::Response};
use crate::{
    handle::Handle,
    handover::parcel::{Incoming, Moment, Outgoing},
    pause::WaitState,
};

/// Longest time that reset connections may take to be gone. A worker closes them in its next turn.
pub(super) const KILL_TIMEOUT: Duration = Duration::from_secs(5);

/// Owner of a pause, which is undone when this is dropped: however its caller goes, and if a thread panics.
pub(super) struct PendingPause {
    handle: Handle,
    caller: Caller,
    begun: Instant,
    /// Number of connections that were reset for it.
    reset: u64,
    /// False while or once the pause is not to be undone.
    is_owned: bool,
}

/// Pause that is not committed yet, in a hand-over. Its lease travels with the others.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct PendingWords {
    name: String,
    request_id: u64,
    begun: Moment,
    reset: u64,
}

impl PendingPause {
    /// Describes it for a hand-over.
    pub(super) fn describe(&self, parcel: &Outgoing<'_>) -> PendingWords {
        // It is owned wherever it can be described: what lets go of it consumes it.
        let Self { handle: _, caller, begun, reset, is_owned: _ } = self;
        let Caller { name, request_id } = caller.clone();
        PendingWords { name, request_id, begun: parcel.moment(*begun), reset: *reset }
    }

    /// Makes the owner of the pause of these words. It undoes nothing before it [owns](Self::own) the pause.
    pub(super) fn rebuild(words: PendingWords, parcel: &Incoming, handle: Handle) -> Self {
        let PendingWords { name, request_id, begun, reset } = words;
        let caller = Caller { name, request_id };
        Self { handle, caller, begun: parcel.instant(begun), reset, is_owned: false }
    }

    /// Owns the pause from now on, as its hand-over is over: until then, the other process owns it.
    pub(super) fn own(&mut self) {
        self.is_owned = true;
    }

    /// Owns the pause that the request of `caller` begins from now on.
    pub(super) fn new(handle: Handle, caller: Caller) -> Self {
        Self { handle, caller, begun: Instant::now(), reset: 0, is_owned: true }
    }

    /// Returns the state of its wait for idle.
    pub(super) fn wait_state(&self) -> WaitState {
        self.handle.pauses().wait_state(self.caller.request_id)
    }

    /// Begins its time anew, as the caller has sent a byte.
    pub(super) fn renew(&self) {
        self.handle.pauses().renew(self.caller.request_id);
    }

    /// Resets the connections that are left.
    pub(super) fn kill(&mut self) {
        self.reset += self.handle.pauses().kill(&self.caller.name);
    }

    /// Commits the pause.
    pub(super) fn commit(self) {
        self.handle.pauses().commit(self.caller.request_id);
        self.forget();
    }

    /// Commits the pause, although it is not idle.
    pub(super) fn keep(self) {
        info!(
            event = "kept", by = self.caller.name;
            "the pause that {} has asked for is kept, although it is not idle in time",
            self.caller.name
        );
        self.commit();
    }

    /// Lets go of a pause that has not begun, has ended, or is committed.
    pub(super) fn forget(mut self) {
        self.is_owned = false;
    }

    /// Ends the pause with its connection.
    pub(super) fn close(mut self) {
        self.is_owned = false;
        self.handle.pauses().close(self.caller.request_id);
    }

    /// Undoes the pause.
    pub(super) fn undo(mut self, because: &str) {
        self.is_owned = false;
        self.take_back(because);
    }

    /// Undoes the pause. A panic ends here: out of a drop it would end the thread, and behind another panic the process.
    fn take_back(&self, because: &str) {
        let undo = || self.handle.pauses().undo(self.caller.request_id, because);
        if catch_unwind(AssertUnwindSafe(undo)).is_err() {
            error!("a defect: the control API panicked undoing a pause of {}", self.caller.name);
        }
    }

    /// Returns the answer to a caller whose pause has begun.
    pub(super) fn success(&self, is_idle: bool) -> Response {
        let (waited, reset) = (self.begun.elapsed().as_secs_f64(), self.reset);
        let body = format!(
            "{{\"paused\": true, \"idle\": {is_idle}, \"waited_seconds\": {waited:.3}, \"reset\": {reset}}}\n"
        );
        Response { status: 201, ..Response::json(body) }
    }
}

/// Returns the answer to a caller whose pause was not idle in time, with the oldest connections at that moment.
pub(super) fn not_idle_in_time(handle: &Handle, oldest: Vec<String>) -> Response {
    let paused = handle.is_paused();
    let fate = if paused { "It stays paused." } else { "The pause is undone." };
    time_is_up(handle, oldest, fate, &format!(", \"paused\": {paused}"))
}

/// Returns the answer to a caller that has waited in vain, and has no pause that could be undone.
pub(super) fn wait_in_vain(handle: &Handle, oldest: Vec<String>) -> Response {
    time_is_up(handle, oldest, "GET /status counts them.", "")
}

fn time_is_up(handle: &Handle, oldest: Vec<String>, sentence: &str, field: &str) -> Response {
    let active = handle.pauses().connections();
    let seconds =
        handle.oldest().map_or("null".to_owned(), |age| format!("{:.3}", age.as_secs_f64()));
    let oldest = serde_json::Value::from(oldest);
    let body = format!(
        "{{\"error\": \"The time is up: connections are still carried or dialled for. {sentence}\", \"status\": 504, \"active\": {active}, \"oldest_seconds\": {seconds}, \"oldest\": {oldest}{field}}}\n"
    );
    Response { status: 504, ..Response::json(body) }
}

impl Drop for PendingPause {
    fn drop(&mut self) {
        if self.is_owned {
            let failed = thread::panicking();
            self.take_back(if failed { "its request has failed" } else { "its caller has gone" });
        }
    }
}
