//! `Steer`: the way past the workers, on which new connections lead straight to the upstream, as a pause sees it.
//!
//! Steered connections hold passes of the gate like all others, so that only their begin and their reset need words here.

use std::{fmt, time::Duration};

use serde::{Deserialize, Serialize};

use super::Pauses;
use crate::sys::Lent;

/// Way past the workers.
pub(crate) trait Steer: fmt::Debug + Send + Sync {
    /// Steers nobody from now on. Called under locks: it must not wait. Connections under way are known behind
    /// [`Steer::settle`].
    fn stop(&self);
    /// Waits until all that was steered before a stop is known and counted.
    fn settle(&self);
    /// Stops, and keeps it so until [`Steer::go_on`].
    fn suspend(&self);
    fn go_on(&self);
    /// Steers nobody from this time since the start of the host on, until another one is set.
    fn fence_at(&self, deadline: Option<Duration>);
    /// Returns true if `passes`, all that the gate has given, are those of the steering, and nobody is steered at present. Else
    /// the gate will have an idle moment once that is so.
    fn await_idle(&self, passes: u64) -> bool;
    /// Lends the map that marks tcpause's own connections, for a successor; none before the programs are loaded.
    fn marks(&self) -> Option<Lent<'_>>;
    /// Tells of a listener of tcpause, whose clients do not count as steered.
    fn mark(&self, listener: Lent<'_>);
    /// Resets all steered connections.
    fn reset(&self);
    fn status(&self) -> SteeringStatus;
}

/// State of the steering, as `GET /status` shows it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SteeringStatus {
    /// `steering`, `relaying` or `unavailable`.
    pub state: String,
    /// Reason for another state than `steering`; null in that one.
    pub why: Option<String>,
    /// Connections that were steered and are there. They are among the active ones.
    pub active: u64,
    /// SYN packets that this process has steered, with repeated ones: an upgrade begins anew at 0.
    pub total: u64,
}

impl Pauses {
    /// Sets the way past the workers. There is one.
    pub(crate) fn steer_by(&self, steer: Box<dyn Steer>) {
        self.steer.get_or_init(|| steer);
    }

    /// Returns the way past the workers, if there is one.
    pub(crate) fn steer(&self) -> Option<&dyn Steer> {
        self.steer.get().map(AsRef::as_ref)
    }

    /// Returns the number of steered connections, as of the last look at them; none where all are relayed.
    pub(crate) fn steered(&self) -> Option<u64> {
        self.steer().map(|steer| steer.status().active)
    }

    /// Returns the number of connections that run, with that of the steered ones.
    pub(super) fn running(&self, steered: Option<u64>) -> u64 {
        let Some(steered) = steered else { return self.gate.passes() };
        // While connections are steered, their passes stand for the time at which that began.
        let relayed = self.workers.balance();
        relayed.active + relayed.connecting + steered
    }

    /// Runs `begin` unless it is paused. No pause begins meanwhile.
    pub(crate) fn while_open(&self, begin: impl FnOnce()) {
        let leases = self.lock();
        if leases.mode().is_none() && !self.gate.is_paused() {
            begin();
        }
    }
}
