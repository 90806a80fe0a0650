//! Rejecting: what clients get while paused, in plain and inside TLS.

pub(crate) mod plain;
mod storm;
pub(crate) mod tls;
mod with;
