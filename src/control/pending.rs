//! `PendingPause`: a pause that its caller has asked for and that is not committed yet.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    thread,
    time::{Duration, Instant},
};

use log::{error, info};
use serde::{Deserialize, Serialize};

use super::{command::Caller, fleet, response::Response};
use crate::{
    fleet::{BootTime, Fleet, WaitingFor},
    handle::Handle,
    handover::parcel::{Incoming, Moment, Outgoing},
    pause::WaitState,
};

/// Longest time that reset connections may take to be gone. A worker closes them in its next turn.
pub(super) const KILL_TIMEOUT: Duration = Duration::from_secs(5);

/// Owner of a pause, which is undone when this is dropped: however its caller goes, and if a thread panics.
pub(super) struct PendingPause {
    pauser: Pauser,
    caller: Caller,
    begun: Instant,
    /// Number of connections that were reset for it.
    reset: u64,
    /// False while or once the pause is not to be undone.
    is_owned: bool,
}

/// Party that pauses.
#[derive(Clone)]
pub(super) enum Pauser {
    /// This proxy.
    Proxy(Handle),
    /// All hosts of the fleet.
    Fleet(Fleet),
}

/// Obstacles to a pause whose time is up.
pub(super) enum Left {
    /// The oldest connections of this proxy.
    Connections(Vec<String>),
    Hosts(Vec<WaitingFor>),
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
    /// Describes it for a hand-over; `None` for one of the fleet, which this process alone looks after.
    pub(super) fn describe(&self, parcel: &Outgoing<'_>) -> Option<PendingWords> {
        // It is owned wherever it can be described: what lets go of it consumes it.
        let Self { pauser: _, caller, begun, reset, is_owned: _ } = self;
        let Caller { name, request_id } = caller.clone();
        let words = PendingWords { name, request_id, begun: parcel.moment(*begun), reset: *reset };
        (!self.is_of_fleet()).then_some(words)
    }

    /// Makes the owner of the pause of these words. It undoes nothing before it [owns](Self::own) the pause.
    pub(super) fn rebuild(words: PendingWords, parcel: &Incoming, handle: Handle) -> Self {
        let PendingWords { name, request_id, begun, reset } = words;
        let caller = Caller { name, request_id };
        let pauser = Pauser::Proxy(handle);
        Self { pauser, caller, begun: parcel.instant(begun), reset, is_owned: false }
    }

    /// Owns the pause from now on, as its hand-over is over: until then, the other process owns it.
    pub(super) fn own(&mut self) {
        self.is_owned = true;
    }

    /// Owns the pause that the request of `caller` begins from now on.
    pub(super) fn new(pauser: Pauser, caller: Caller) -> Self {
        Self { pauser, caller, begun: Instant::now(), reset: 0, is_owned: true }
    }

    /// Returns true for a pause of all hosts.
    pub(super) fn is_of_fleet(&self) -> bool {
        matches!(self.pauser, Pauser::Fleet(_))
    }

    /// Returns the state of its wait for idle.
    pub(super) fn wait_state(&self) -> WaitState {
        let request_id = self.caller.request_id;
        match &self.pauser {
            Pauser::Proxy(handle) => handle.pauses().wait_state(request_id),
            Pauser::Fleet(fleet) => fleet.wait_state(request_id),
        }
    }

    /// Returns true while it cannot be proven that the pause holds.
    pub(super) fn is_lost(&self) -> bool {
        match &self.pauser {
            Pauser::Proxy(_) => false,
            Pauser::Fleet(fleet) => fleet.is_lost(self.caller.request_id),
        }
    }

    /// Returns the time up to which it holds without another proof; none for one that is lost, or of this proxy.
    pub(super) fn kept_until(&self) -> Option<BootTime> {
        match &self.pauser {
            Pauser::Proxy(_) => None,
            Pauser::Fleet(fleet) => fleet.kept_until(self.caller.request_id),
        }
    }

    /// Returns the hosts that an operator has resumed since all were idle; none for a pause of this proxy.
    pub(super) fn forced(&self) -> Vec<String> {
        match &self.pauser {
            Pauser::Proxy(_) => Vec::new(),
            Pauser::Fleet(fleet) => fleet.forced(self.caller.request_id),
        }
    }

    /// Begins its time anew, as the caller has sent a byte.
    pub(super) fn renew(&self) {
        let request_id = self.caller.request_id;
        match &self.pauser {
            Pauser::Proxy(handle) => handle.pauses().renew(request_id),
            Pauser::Fleet(fleet) => fleet.renew(request_id),
        }
    }

    /// Resets the connections that are left. Those of other hosts are not counted.
    pub(super) fn kill(&mut self) {
        match &self.pauser {
            Pauser::Proxy(handle) => self.reset += handle.pauses().kill(&self.caller.name),
            Pauser::Fleet(fleet) => fleet.kill(self.caller.request_id),
        }
    }

    /// Returns the obstacles at this moment.
    pub(super) fn left(&self) -> Left {
        match &self.pauser {
            Pauser::Proxy(handle) => Left::Connections(handle.oldest_connections()),
            Pauser::Fleet(fleet) => Left::Hosts(fleet.waiting_for(self.caller.request_id)),
        }
    }

    /// Commits the pause.
    pub(super) fn commit(self) {
        let request_id = self.caller.request_id;
        match &self.pauser {
            Pauser::Proxy(handle) => handle.pauses().commit(request_id),
            // It ends without its caller only if that was connection-bound, and then it is never committed.
            Pauser::Fleet(_) => {}
        }
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
        let request_id = self.caller.request_id;
        match &self.pauser {
            Pauser::Proxy(handle) => handle.pauses().close(request_id),
            Pauser::Fleet(fleet) => fleet.end(request_id, "its caller has gone"),
        }
    }

    /// Begins to end a pause of the fleet with its connection. Returns false for one of this proxy.
    pub(super) fn begin_end(&mut self) -> bool {
        let Pauser::Fleet(fleet) = &self.pauser else { return false };
        fleet.end(self.caller.request_id, "its caller has gone");
        self.is_owned = false;
        true
    }

    /// Returns the hosts that are waited for; none for a pause of this proxy.
    pub(super) fn waiting_for(&self) -> Vec<WaitingFor> {
        match &self.pauser {
            Pauser::Proxy(_) => Vec::new(),
            Pauser::Fleet(fleet) => fleet.waiting_for(self.caller.request_id),
        }
    }

    /// Lets go of a pause whose connection is ended here. One of this proxy ends with it, if it has not ended yet.
    pub(super) fn let_go(self) {
        if let Pauser::Fleet(fleet) = &self.pauser {
            fleet.end(self.caller.request_id, "tcpause is stopping");
        }
        self.forget();
    }

    /// Undoes the pause.
    pub(super) fn undo(mut self, because: &str) {
        self.is_owned = false;
        self.take_back(because);
    }

    /// Undoes the pause. A panic ends here: out of a drop it would end the thread, and behind another panic the process.
    fn take_back(&self, because: &str) {
        let request_id = self.caller.request_id;
        let undo = || match &self.pauser {
            Pauser::Proxy(handle) => handle.pauses().undo(request_id, because),
            Pauser::Fleet(fleet) => fleet.end(request_id, because),
        };
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

impl Left {
    /// Returns the answer to a caller whose pause was not idle in time.
    pub(super) fn answer(self, handle: &Handle, is_kept: bool) -> Response {
        match self {
            Self::Connections(oldest) => not_idle_in_time(handle, oldest),
            Self::Hosts(hosts) => fleet::not_idle_in_time(&hosts, is_kept),
        }
    }
}

/// Returns the answer to a caller whose pause was not idle in time, with the oldest connections at that moment.
fn not_idle_in_time(handle: &Handle, oldest: Vec<String>) -> Response {
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
    let steered = handle.pauses().steered().filter(|steered| *steered > 0);
    let steered = steered.map_or(String::new(), |steered| format!(", \"steered\": {steered}"));
    let body = format!(
        "{{\"error\": \"The time is up: connections are still carried or dialled for. {sentence}\", \"status\": 504, \"active\": {active}, \"oldest_seconds\": {seconds}, \"oldest\": {oldest}{steered}{field}}}\n"
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
