//! `Step`: orders of a state machine to its driver, and `ProxyView`, the proxy as a machine sees it.

use std::{collections::BTreeSet, time::Duration};

use crate::fleet::{clock::BootTime, keys::Record, store::Request};

/// Order of a state machine. The driver carries out exactly one, reports its end, and polls again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Step {
    /// Ask the store, for so long at most; then call `answered`.
    Ask(Request, Duration),
    /// Carry this out; then call `done`.
    Do(Doing),
    /// Wait until this time, or until `woken` or another input was called.
    Wait(BootTime),
    /// Nothing is left to be done.
    Over,
}

/// Deed of the proxy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Doing {
    /// Put the lease `fleet/NAME` with the record's terms, for `fleet.keep-paused-for` from now on, in place of another
    /// of this name and of an operator's order to go on without it. Nobody is admitted any more when this is done.
    Pause { name: String, record: Record },
    /// Begin the lease's time anew.
    Renew { name: String },
    /// Lift the lease, and forget that an operator has.
    Resume { name: String },
    /// Reset what the pause has left.
    Kill { name: String },
    /// Lift `fleet/starting`.
    Start,
    /// Admit nobody from this time on, unless another time is ordered before it.
    FenceAt(Option<BootTime>),
    /// Put the lease `fleet/lost`. Nobody is admitted any more when this is done.
    Lose,
    /// Lift `fleet/lost`.
    Find,
    /// Reset all that is left.
    Cut,
}

/// State of the proxy, read in one moment under the lock of its pauses.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct ProxyView {
    /// True if nothing is carried or dialled.
    pub(crate) is_idle: bool,
    pub(crate) held: u64,
    pub(crate) active: u64,
    pub(crate) connecting: u64,
    /// Age of the oldest connection.
    pub(crate) oldest: Option<Duration>,
    /// True from `fleet/starting` until the member has lifted it, also once an operator has.
    pub(crate) is_starting: bool,
    /// The same of `fleet/lost`.
    pub(crate) is_lost: bool,
    /// Names of the leases of pauses that hold, without their prefix.
    pub(crate) holding: BTreeSet<String>,
    /// Names of those that an operator has lifted here alone.
    pub(crate) forced: BTreeSet<String>,
}
