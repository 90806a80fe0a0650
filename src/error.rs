//! Errors before any traffic flows.

use std::{error, fmt};

/// A reason for which a proxy could not start. Traffic never ends in an error, but in a closed connection and a log
/// line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Error {
    /// A wrong setting. The text names it and the remedy.
    Config(String),
    /// A refusal by the system. The text names it and the remedy.
    System(String),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Config(text) | Self::System(text) => f.write_str(text),
        }
    }
}

impl error::Error for Error {}
