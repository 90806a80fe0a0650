//! Result of a relay's turn.

use serde::{Deserialize, Serialize};

/// Bytes that a relay delivered in its turn, and its next step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Progress {
    /// Bytes delivered to the upstream.
    pub(crate) to_upstream: u64,
    /// Bytes delivered to the client.
    pub(crate) to_client: u64,
    /// Bytes of these that were spliced.
    pub(crate) spliced_to_upstream: u64,
    /// Bytes of these that were spliced.
    pub(crate) spliced_to_client: u64,
    /// Next step of the relay.
    pub(crate) next: Next,
}

/// Next step after a relay's turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    /// Wait for an event.
    Wait,
    /// Drive again: its share of this turn is used up.
    Again,
    /// One side was reset, and the other still has to receive the bytes that came before.
    Settle {
        /// Memory of its unacknowledged bytes.
        unacknowledged: u32,
        /// Side that was reset; none if it only takes no more bytes.
        aborted: Option<Side>,
    },
    /// Both streams have ended: close.
    Close,
    /// This side was reset, and the other has received all that came before: reset it too, and close.
    Reset(Side),
}

/// Side of a relay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Side {
    Client,
    Upstream,
}
