//! `Fleet`: the fleet as the control API sees it, and the words of its answers.

use std::{fmt, ops::Deref, sync::Arc};

use serde::Serialize;

use super::{
    BootTime, coordinator,
    coordinator::{WaitingFor, Wanted},
    store::StoreError,
    table::{Table, time_of_day},
};
use crate::pause::WaitState;

/// Fleet that this proxy is a member of. Clones act on the same one.
#[derive(Debug, Clone)]
pub(crate) struct Fleet(Arc<dyn Fleets>);

/// Deeds of a fleet. Each pause that was asked for here is known by the number of its request.
pub(crate) trait Fleets: fmt::Debug + Send + Sync {
    /// Begins a pause of all hosts, which a connection-bound caller renews. Blocks until it is committed or refused, for 5 s at
    /// most.
    fn pause(&self, wanted: Wanted, request_id: u64, is_bound: bool) -> Result<(), Refusal>;

    /// Returns the state of a request's wait until all hosts are idle.
    fn wait_state(&self, request_id: u64) -> WaitState;

    /// Returns the hosts that a request still waits for; behind its end, those that have not resumed yet.
    fn waiting_for(&self, request_id: u64) -> Vec<WaitingFor>;

    /// Returns true while it cannot be proven that a request's pause holds, from one second before another host may end it.
    fn is_lost(&self, request_id: u64) -> bool;

    /// Returns the time up to which a request's pause holds without another proof; none for one that is lost.
    fn kept_until(&self, request_id: u64) -> Option<BootTime>;

    /// Returns the hosts that an operator has resumed since all were idle. Each stays in its place.
    fn forced(&self, request_id: u64) -> Vec<String>;

    /// Has every host reset the connections that are left.
    fn kill(&self, request_id: u64);

    /// Begins the time of a request's pause anew, as its caller has sent a byte.
    fn renew(&self, request_id: u64);

    /// Ends a request's pause, for this reason. Never blocks: its state is `Ended` once the record is gone and the hosts have
    /// had a moment to resume. Does nothing for a request that is not known.
    fn end(&self, request_id: u64, because: &str);

    /// Ends the pause of this name, whichever host it was asked at. Blocks for 2 s at most.
    fn resume(&self, name: &str, by: &str) -> Result<(), Refusal>;

    /// Returns the pauses and hosts of the fleet. Blocks for 5 s at most.
    fn table(&self) -> Result<Table, Refusal>;

    /// Takes a host without a session out of the fleet. Blocks for 2 s at most.
    fn forget(&self, host: &str, by: &str) -> Result<(), Refusal>;

    /// Returns the names of the pauses that were asked for here and are looked after here.
    fn coordinating(&self) -> Vec<String>;

    /// Registers a callback for each change of a request's state. It runs on the thread that makes the change.
    fn watch(&self, watcher: Box<dyn Fn() + Send + Sync>);
}

/// Refusal of a request to the fleet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) kind: RefusalKind,
    /// Sentence for the operator, with a full stop.
    pub(crate) text: String,
}

/// Kind of a refusal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum RefusalKind {
    /// A pause of this name holds; the sentence tells whose it is, and since when.
    Taken,
    /// The store does not answer.
    Unreachable,
    /// The store refuses this member, or is of a wrong kind.
    Denied,
    /// The store, or a host, takes no more.
    Full,
    /// The host has a session, so that it counts.
    HasSession,
    /// There is no such host.
    Unknown,
}

impl Refusal {
    /// Refuses a pause whose name is taken, since so many seconds after 1970.
    pub(crate) fn taken(name: &str, by: &str, began: u64) -> Self {
        let since = time_of_day(began);
        Self::new(
            RefusalKind::Taken,
            format!(
                "There is a pause {name:?} of the fleet, by {by}, since {since}: wait for its end, or use another name."
            ),
        )
    }

    /// Refuses one pause too many.
    pub(crate) fn too_many() -> Self {
        let text =
            "The fleet has as many pauses as a host can keep: end some, or use one of their names.";
        Self::new(RefusalKind::Taken, text.to_owned())
    }

    /// Refuses what etcd has not answered to, for this reason.
    pub(crate) fn unreachable(why: &str) -> Self {
        let text = format!("The fleet is out of reach: {why}. Whatever is paused stays paused.");
        Self::new(RefusalKind::Unreachable, text)
    }

    /// Refuses what etcd refuses, for this reason.
    pub(crate) fn denied(why: &str) -> Self {
        Self::new(RefusalKind::Denied, format!("The fleet does not take this from here: {why}."))
    }

    /// Refuses what etcd has no room for, for this reason.
    pub(crate) fn full(why: &str) -> Self {
        Self::new(RefusalKind::Full, format!("The fleet takes nothing new: {why}."))
    }

    /// Refuses to end a pause that is not there.
    pub(crate) fn no_pause(name: &str) -> Self {
        let text = format!(
            "The fleet has no pause of the name {name:?}; tcpause status --fleet lists them."
        );
        Self::new(RefusalKind::Unknown, text)
    }

    /// Refuses to forget a host that counts.
    pub(crate) fn has_session(host: &str) -> Self {
        let text = format!(
            "The host {host} has a session: stop its tcpause before it is forgotten. If that was killed, wait for fleet.ttl."
        );
        Self::new(RefusalKind::HasSession, text)
    }

    /// Refuses to forget a host that is not there.
    pub(crate) fn unknown(host: &str) -> Self {
        let text = format!("There is no host {host:?} in the fleet: GET /fleet/status lists them.");
        Self::new(RefusalKind::Unknown, text)
    }

    fn new(kind: RefusalKind, text: String) -> Self {
        Self { kind, text }
    }
}

impl Refusal {
    /// Tells a caller why there is no pause of this name.
    pub(super) fn of_pause(name: &str, refusal: &coordinator::Refusal) -> Self {
        match refusal {
            coordinator::Refusal::Taken { by, began } => Self::taken(name, by, *began),
            coordinator::Refusal::TooMany => Self::too_many(),
            coordinator::Refusal::Unreachable(text) => Self::unreachable(text),
            coordinator::Refusal::Full(text) => Self::full(text),
            coordinator::Refusal::Denied(text) | coordinator::Refusal::Refused(text) => {
                Self::denied(text)
            }
        }
    }
}

impl From<StoreError> for Refusal {
    fn from(error: StoreError) -> Self {
        Self::of_pause("", &coordinator::Refusal::from(error))
    }
}

impl Fleet {
    /// Makes the fleet of what carries its deeds out.
    pub(crate) fn new(fleets: Arc<dyn Fleets>) -> Self {
        Self(fleets)
    }
}

impl Deref for Fleet {
    type Target = dyn Fleets;

    fn deref(&self) -> &Self::Target {
        &*self.0
    }
}
