//! Words for the ends of connections and the results of dials. Log, metrics and status share them.

use std::io;

use log::Level;
use serde::{Deserialize, Serialize};

/// Makes an enum whose values have words, in the order of their numbers.
macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$meaning:meta])* $value:ident = $word:literal,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
        pub(crate) enum $name {
            $($(#[$meaning])* #[serde(rename = $word)] $value,)*
        }

        impl $name {
            /// All values, in the order of their numbers.
            pub(crate) const ALL: [Self; [$($word),*].len()] = [$(Self::$value),*];

            /// Returns the word.
            pub(crate) fn word(self) -> &'static str {
                match self {
                    $(Self::$value => $word,)*
                }
            }
        }
    };
}

words! {
    /// Cause of the end of a connection.
    CloseCause {
        /// Both streams have ended.
        Ended = "ended",
        /// The client was the first to reset.
        ClientReset = "client-reset",
        /// The upstream was the first to reset.
        UpstreamReset = "upstream-reset",
        /// The client's host no longer answers.
        ClientVanished = "client-vanished",
        /// The upstream's host no longer answers.
        UpstreamVanished = "upstream-vanished",
        /// The client left while it was held.
        LeftHeld = "left-held",
        /// The client left while its upstream was dialled or awaited.
        LeftConnecting = "left-connecting",
        /// The client did not begin with the PROXY header that is due from its address.
        BadProxyHeader = "bad-proxy-header",
        /// A pause rejects clients.
        Rejected = "rejected",
        /// `hold.timeout` was over.
        HoldTimeout = "hold-timeout",
        /// As many clients were held as `hold.max` allows.
        HoldOverflow = "hold-overflow",
        /// The upstream could not be reached.
        Unreachable = "unreachable",
        /// One side was reset, and the other did not take the bytes before.
        Stalled = "stalled",
        /// The connection was silent, with no answer owed, while a pause or a stop waited for it.
        Drained = "drained",
        /// The operator had all connections reset that were left in a pause.
        KilledPause = "killed-pause",
        /// The operator had the connection ended.
        KilledOperator = "killed-operator",
        /// The proxy stopped.
        Stopped = "stopped",
        /// The worker panicked.
        Panic = "panic",
    }
}

words! {
    /// Result of a dial of one address.
    ConnectResult {
        Ok = "ok",
        Refused = "refused",
        Timeout = "timeout",
        Unreachable = "unreachable",
        /// The socket file is missing.
        Missing = "missing",
        /// No local port is free.
        NoPort = "no-port",
        Other = "other",
    }
}

impl CloseCause {
    /// Returns true if the client could complain of it.
    pub(crate) fn is_failure(self) -> bool {
        self.level() < Level::Info || matches!(self, Self::KilledPause | Self::KilledOperator)
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
            | Self::BadProxyHeader
            | Self::Unreachable
            | Self::Stalled
            | Self::KilledPause
            | Self::KilledOperator
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
            | Self::BadProxyHeader
            | Self::Unreachable
            | Self::Stalled
            | Self::Stopped => Level::Warn,
            _ => Level::Info,
        }
    }
}

impl ConnectResult {
    /// Returns the kind of an error with this result.
    pub(crate) fn kind(self) -> io::ErrorKind {
        match self {
            Self::NoPort => io::ErrorKind::AddrNotAvailable,
            Self::Refused => io::ErrorKind::ConnectionRefused,
            Self::Timeout => io::ErrorKind::TimedOut,
            Self::Unreachable => io::ErrorKind::HostUnreachable,
            Self::Missing => io::ErrorKind::NotFound,
            Self::Ok | Self::Other => io::ErrorKind::Other,
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
