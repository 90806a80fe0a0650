//! The part of the configuration that the sources read. The real one needs files, and nothing of it is under test here.

#[path = "../../src/config/address.rs"]
pub(crate) mod address;
#[path = "../../src/config/duration.rs"]
pub(crate) mod duration;
#[path = "../../src/config/network.rs"]
pub(crate) mod network;

use std::{
    net::IpAddr,
    num::{NonZeroU32, NonZeroUsize},
    path::PathBuf,
    time::Duration,
};

use serde::{Deserialize, Serialize};

use crate::config::{address::Address, network::Network};

#[derive(Debug, Clone, Copy)]
pub(crate) struct LogConfig {
    pub(crate) connections: ConnectionLog,
    pub(crate) connections_rate: NonZeroU32,
}

impl Default for LogConfig {
    /// All are logged, as far as the rate allows.
    fn default() -> Self {
        Self { connections: ConnectionLog::All, connections_rate: NonZeroU32::MIN }
    }
}

#[derive(Debug, Clone, Copy)]
pub(crate) enum ConnectionLog {
    Off,
    Failures,
    All,
}

#[derive(Debug)]
pub(crate) struct UpstreamConfig {
    pub(crate) addr: Address,
    pub(crate) connect_timeout: Duration,
    pub(crate) retry_for: Duration,
    pub(crate) source_addrs: Vec<IpAddr>,
    pub(crate) send_proxy: SendProxy,
    pub(crate) state_file: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum SendProxy {
    #[default]
    Off,
    V1,
    V2,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ProxySource {
    Unix,
    Network(Network),
}

#[derive(Debug, Default)]
pub(crate) struct HoldConfig {
    pub(crate) timeout: Option<Duration>,
    pub(crate) max: Option<NonZeroUsize>,
    pub(crate) overflow: Overflow,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Overflow {
    Reject,
    Close,
    #[default]
    Backlog,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum HalfClosed {
    #[default]
    Serve,
    Drop,
}

#[derive(Debug)]
pub(crate) struct ResumeConfig {
    pub(crate) max_connecting: NonZeroUsize,
    pub(crate) rate: Option<NonZeroU32>,
}

#[derive(Debug)]
pub(crate) struct ProxyConfig {
    pub(crate) reject_with: RejectWith,
    pub(crate) retry_after_interval: Duration,
    pub(crate) tls: TlsConfig,
}

#[derive(Debug)]
pub(crate) enum RejectWith {
    Http,
    Close,
    Reset,
    File(PathBuf),
}

#[derive(Debug)]
pub(crate) struct TlsConfig {
    pub(crate) ca_cert: Option<PathBuf>,
    pub(crate) cert: Option<PathBuf>,
    pub(crate) key: Option<PathBuf>,
}
