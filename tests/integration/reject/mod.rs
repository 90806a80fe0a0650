//! Rejecting: what clients get while paused, in plain and inside TLS.

pub(crate) mod plain;
mod storm;
mod tls;
mod with;
