//! The oldest served connections of a worker, for an operator whose pause is not idle in time.

use std::time::Instant;

use super::Worker;
use crate::{
    connection::deadline::Deadline,
    worker_pool::{LISTED_MAX, ListedConnection},
};

/// Lists of clients with a pass.
const SERVED: [Deadline; 8] = [
    Deadline::Connecting,
    Deadline::ConnectingLast,
    Deadline::Unanswered,
    Deadline::AwaitingFirstByte,
    Deadline::NoKeepaliveYet,
    Deadline::Relaying,
    Deadline::AwaitingAcks,
    Deadline::Stalled,
];

impl Worker<'_> {
    /// Returns the oldest connections with a pass. In each list the oldest come first, or nearly so.
    pub(super) fn oldest_served(&self, now: Instant) -> Vec<ListedConnection> {
        let keys = SERVED.iter().flat_map(|&deadline| self.timers.keys(deadline).take(LISTED_MAX));
        keys.filter_map(|key| self.connections.get(key))
            .map(|connection| ListedConnection {
                accepted: connection.accepted(),
                text: connection.describe(now),
            })
            .collect()
    }
}
