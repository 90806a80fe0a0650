//! `FleetView`: the state of the fleet as its threads know it, for the status and the metrics.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use serde_json::Value;

/// Latest state of the fleet; none where the proxy is in no fleet.
#[derive(Debug, Default)]
pub(crate) struct FleetView {
    status: Mutex<Option<FleetStatus>>,
    /// Description of the member for another process, in words of the fleet's own: as it came from the process before, until
    /// the member has told anew.
    parcel: Mutex<Option<Value>>,
}

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
        change(lock(&self.status).get_or_insert_default());
    }

    /// Tells that nobody looks after the membership any more, for this reason.
    pub(crate) fn tell_trouble(&self, why: &str) {
        self.update(|status| (status.connected, status.trouble) = (false, Some(why.to_owned())));
    }

    /// Returns the latest state.
    pub(crate) fn read(&self) -> Option<FleetStatus> {
        lock(&self.status).clone()
    }

    /// Has the next process go on from this description.
    pub(crate) fn put_parcel(&self, parcel: Option<Value>) {
        *lock(&self.parcel) = parcel;
    }

    /// Returns the latest description of the member.
    pub(crate) fn parcel(&self) -> Option<Value> {
        lock(&self.parcel).clone()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
