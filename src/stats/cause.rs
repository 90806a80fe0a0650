//! Words for the ends of connections and the results of dials. Log, metrics and status share them.

use std::io;

use log::Level;

/// Cause of the end of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum CloseCause {
    /// Both streams have ended.
    Ended,
    /// The client was the first to reset.
    ClientReset,
    /// The upstream was the first to reset.
    UpstreamReset,
    /// The client's host no longer answers.
    ClientVanished,
    /// The upstream's host no longer answers.
    UpstreamVanished,
    /// The client left while it was held.
    LeftHeld,
    /// The client left while its upstream was dialled or awaited.
    LeftConnecting,
    /// A pause rejects clients.
    Rejected,
    /// `hold.timeout` was over.
    HoldTimeout,
    /// As many clients were held as `hold.max` allows.
    HoldOverflow,
    /// The upstream could not be reached.
    Unreachable,
    /// One side was reset, and the other did not take the bytes before.
    Stalled,
    /// The connection was silent, with no answer owed, while a pause or a stop waited for it.
    Drained,
    /// The operator had all connections reset that were left in a pause.
    KilledPause,
    /// The proxy stopped.
    Stopped,
    /// The worker panicked.
    Panic,
}

/// Result of a dial of one address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ConnectResult {
    Ok,
    Refused,
    Timeout,
    Unreachable,
    /// The socket file is missing.
    Missing,
    /// No local port is free.
    NoPort,
    Other,
}

impl CloseCause {
    /// All causes, in the order of their numbers.
    pub(crate) const ALL: [Self; 16] = [
        Self::Ended,
        Self::ClientReset,
        Self::UpstreamReset,
        Self::ClientVanished,
        Self::UpstreamVanished,
        Self::LeftHeld,
        Self::LeftConnecting,
        Self::Rejected,
        Self::HoldTimeout,
        Self::HoldOverflow,
        Self::Unreachable,
        Self::Stalled,
        Self::Drained,
        Self::KilledPause,
        Self::Stopped,
        Self::Panic,
    ];

    /// Returns the word.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Ended => "ended",
            Self::ClientReset => "client-reset",
            Self::UpstreamReset => "upstream-reset",
            Self::ClientVanished => "client-vanished",
            Self::UpstreamVanished => "upstream-vanished",
            Self::LeftHeld => "left-held",
            Self::LeftConnecting => "left-connecting",
            Self::Rejected => "rejected",
            Self::HoldTimeout => "hold-timeout",
            Self::HoldOverflow => "hold-overflow",
            Self::Unreachable => "unreachable",
            Self::Stalled => "stalled",
            Self::Drained => "drained",
            Self::KilledPause => "killed-pause",
            Self::Stopped => "stopped",
            Self::Panic => "panic",
        }
    }

    /// Returns true if the client could complain of it.
    pub(crate) fn is_failure(self) -> bool {
        self.level() < Level::Info || self == Self::KilledPause
    }

    /// Returns true if the client left before it was served.
    pub(crate) fn has_left(self) -> bool {
        matches!(self, Self::LeftHeld | Self::LeftConnecting)
    }

    /// Returns true if the close is no orderly end, and so resets both sides.
    pub(crate) fn is_reset(self) -> bool {
        match self {
            Self::ClientReset
            | Self::UpstreamReset
            | Self::ClientVanished
            | Self::UpstreamVanished
            | Self::Unreachable
            | Self::Stalled
            | Self::KilledPause
            | Self::Stopped
            | Self::Panic => true,
            Self::Ended
            | Self::LeftHeld
            | Self::LeftConnecting
            | Self::Rejected
            | Self::HoldTimeout
            | Self::HoldOverflow
            | Self::Drained => false,
        }
    }

    /// Returns the level of its line in the log.
    pub(crate) fn level(self) -> Level {
        match self {
            Self::Panic => Level::Error,
            Self::HoldTimeout
            | Self::HoldOverflow
            | Self::Unreachable
            | Self::Stalled
            | Self::Stopped => Level::Warn,
            _ => Level::Info,
        }
    }
}

impl ConnectResult {
    /// All results, in the order of their numbers.
    pub(crate) const ALL: [Self; 7] = [
        Self::Ok,
        Self::Refused,
        Self::Timeout,
        Self::Unreachable,
        Self::Missing,
        Self::NoPort,
        Self::Other,
    ];

    /// Returns the word.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Refused => "refused",
            Self::Timeout => "timeout",
            Self::Unreachable => "unreachable",
            Self::Missing => "missing",
            Self::NoPort => "no-port",
            Self::Other => "other",
        }
    }
}

impl From<&io::Error> for ConnectResult {
    fn from(error: &io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::AddrNotAvailable => Self::NoPort,
            io::ErrorKind::ConnectionRefused => Self::Refused,
            io::ErrorKind::TimedOut => Self::Timeout,
            io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable => Self::Unreachable,
            io::ErrorKind::NotFound => Self::Missing,
            _ => Self::Other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_stand_in_the_order_of_their_numbers() {
        for (number, cause) in CloseCause::ALL.into_iter().enumerate() {
            assert_eq!(cause as usize, number, "{}", cause.word());
        }
        for (number, result) in ConnectResult::ALL.into_iter().enumerate() {
            assert_eq!(result as usize, number, "{}", result.word());
        }
    }
}
