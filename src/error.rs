//! Errors before any traffic flows.

use std::{error, fmt, io};

/// A reason for which a proxy could not start. Traffic never ends in an error, but in a closed connection and a log
/// line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Error {
    /// A wrong setting. The text names it and the remedy.
    Config(String),
    /// A refusal by the system. The text names it and the remedy.
    System(String),
}

impl Error {
    /// Returns the error for a thread that the system refuses, with the remedy.
    #[doc(hidden)]
    pub fn no_thread(purpose: &str, error: &io::Error) -> Self {
        Self::System(format!(
            "cannot start the thread that {purpose}: {error}; raise the limit of processes (RLIMIT_NPROC, which ulimit -u shows, or TasksMax of the systemd unit)"
        ))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Config(text) | Self::System(text) => f.write_str(text),
        }
    }
}

impl error::Error for Error {}
