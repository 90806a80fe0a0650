//! The oldest served connections of a worker, for an operator whose pause is not idle in time.

use std::time::Instant;

use super::Worker;
use crate::{
    connection::deadline::{DIALLED, RELAYED},
    worker_pool::{LISTED_MAX, ListedConnection},
};

impl Worker<'_> {
    /// Returns the oldest connections with a pass. In each list the oldest come first, or nearly so.
    pub(super) fn oldest_served(&self, now: Instant) -> Vec<ListedConnection> {
        let lists = DIALLED.iter().chain(&RELAYED);
        let keys = lists.flat_map(|&deadline| self.timers.keys(deadline).take(LISTED_MAX));
        keys.filter_map(|key| self.connections.get(key))
            .map(|connection| ListedConnection {
                accepted: connection.accepted(),
                text: connection.summary(now),
            })
            .collect()
    }
}
