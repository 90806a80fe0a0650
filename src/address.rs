//! Where something listens or is dialled.

use std::{fmt, path::PathBuf, str::FromStr};

use serde::Deserialize;

/// An address as the operator writes it; a host name is not looked up here.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub enum Address {
    /// `tcp://host:port` or `host:port`. An empty host means all interfaces.
    Tcp {
        /// A name or an IP literal, without brackets.
        host: String,
        /// 0 lets the system choose (listeners only).
        port: u16,
    },
    /// `unix:///absolute/path`.
    Unix(PathBuf),
}

impl Address {
    /// The TCP address `host:port`.
    pub fn tcp(host: impl Into<String>, port: u16) -> Self {
        Self::Tcp { host: host.into(), port }
    }
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (host, port) = text.rsplit_once(':').ok_or("stub")?;
        Ok(Self::tcp(host, port.parse().map_err(|_| "stub")?))
    }
}

impl TryFrom<String> for Address {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "tcp://[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "tcp://{host}:{port}"),
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
        }
    }
}
