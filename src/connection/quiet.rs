//! Silence after which a connection is closed.

use std::time::Duration;

/// `ReadyForQuery` of PostgreSQL with the status *idle*, which ends each answer outside transactions.
pub(super) const POSTGRES_IDLE: &[u8] = b"Z\0\0\0\x05I";

/// Times of silence after which connections are closed as quiet; `None` closes none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct QuietLimits {
    /// Time for any connection.
    pub(crate) any: Option<Duration>,
    /// Time for a session of PostgreSQL that is known to be outside transactions.
    pub(crate) postgres: Option<Duration>,
    /// Time for a connection whose upstream has ended its stream.
    pub(crate) ended: Option<Duration>,
}

impl QuietLimits {
    /// Returns the shortest of all times.
    pub(crate) fn shortest(self) -> Option<Duration> {
        let Self { any, postgres, ended } = self;
        any.into_iter().chain(postgres).chain(ended).min()
    }

    /// Returns the time for a connection. A server that has ended its stream has ended its transactions, too.
    pub(super) fn of(self, can_answer: bool, is_postgres_idle: bool) -> Option<Duration> {
        let postgres = self.postgres.filter(|_| is_postgres_idle || !can_answer);
        let ended = self.ended.filter(|_| !can_answer);
        Self { any: self.any, postgres, ended }.shortest()
    }
}
