//! What can go wrong before any traffic flows.

use std::{error, fmt};

/// Why a proxy could not start. Traffic never ends in an error: it ends in a closed connection and a log line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Error {
    /// A setting is wrong: the text names it and the remedy.
    Config(String),
    /// The system refused something: the text names it and the remedy.
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
