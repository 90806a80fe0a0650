//! `FleetView`: the state of the fleet as its threads know it, for the status and the metrics.

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

/// Latest state of the fleet; none where the proxy is in no fleet.
#[derive(Debug, Default)]
pub(crate) struct FleetView(Mutex<Option<FleetStatus>>);

/// State of the fleet as one of its members knows it.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct FleetStatus {
    /// Name of the fleet.
    pub(crate) name: String,
    /// Name of this host in it.
    pub(crate) host: String,
    /// True while the store answers, and has this host as a member.
    pub(crate) connected: bool,
    /// Time of the last answer since the start of the host; none before the first one.
    pub(crate) last_contact: Option<Duration>,
    /// Treatment of clients without contact: `serve` or `hold`.
    pub(crate) on_disconnect: String,
    /// Number of hosts that count, by the last census.
    pub(crate) members: u64,
    /// Number of those without a session.
    pub(crate) lost: u64,
    /// Number of rounds since the start that have failed.
    pub(crate) rounds_failed: u64,
    /// Last failure, until a round has succeeded.
    pub(crate) trouble: Option<String>,
    /// Names of the pauses that this host looks after.
    pub(crate) coordinating: Vec<String>,
}

impl FleetView {
    /// Changes the state. Two threads know a part of it each.
    pub(crate) fn update(&self, change: impl FnOnce(&mut FleetStatus)) {
        change(self.0.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_default());
    }

    /// Tells that nobody looks after the membership any more, for this reason.
    pub(crate) fn tell_trouble(&self, why: &str) {
        self.update(|status| (status.connected, status.trouble) = (false, Some(why.to_owned())));
    }

    /// Returns the latest state.
    pub(crate) fn read(&self) -> Option<FleetStatus> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
