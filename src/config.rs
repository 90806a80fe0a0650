//! The configuration: every setting, its default and its meaning.

use std::{num::NonZeroUsize, path::PathBuf, time::Duration};

use crate::Address;

/// All settings of a proxy. [`Config::default`] is complete and runs.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// How long running connections may go on after a stop was asked for.
    pub grace_period: Duration,
    /// The most verbose level that is logged; the library itself ignores it.
    pub log_level: log::LevelFilter,
    /// The side of the clients.
    pub proxy: Proxy,
    /// The HTTP API of the operator.
    pub control: Control,
    /// The server that the bytes are carried to.
    pub upstream: Upstream,
}

/// The side of the clients: `proxy.*`.
#[derive(Debug, Clone, PartialEq)]
pub struct Proxy {
    /// Where clients connect to.
    pub addr: Address,
    /// Whether new clients are rejected with a 503 while paused, rather than held.
    pub reject_clients: bool,
    /// The `Retry-After` of a rejection; zero leaves the header out.
    pub retry_after_interval: Duration,
    /// Accepted for compatibility; has no effect.
    pub block_poll_interval: Duration,
    /// Accepted for compatibility; has no effect.
    pub close_poll_interval: Duration,
    /// What a rejected TLS client is answered with.
    pub tls: Tls,
    /// How many worker threads; the number of cores when absent.
    pub threads: Option<NonZeroUsize>,
}

/// The certificate files: `proxy.tls.*`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tls {
    /// PEM bundle that a client's certificate, if it sends one, is verified against.
    pub ca_cert: Option<PathBuf>,
    /// PEM certificate chain of the proxy.
    pub cert: Option<PathBuf>,
    /// PEM private key that belongs to `cert`.
    pub key: Option<PathBuf>,
}

/// The HTTP API of the operator: `control.*`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Control {
    /// Where the API listens.
    pub addr: Address,
    /// Further names that a `Host` header may carry.
    pub hosts: Vec<String>,
}

/// The server behind the proxy: `upstream.*`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Upstream {
    /// Where the upstream listens.
    pub addr: Address,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            grace_period: Duration::from_secs(10),
            log_level: log::LevelFilter::Info,
            proxy: Proxy::default(),
            control: Control::default(),
            upstream: Upstream::default(),
        }
    }
}

impl Default for Proxy {
    fn default() -> Self {
        Self {
            addr: Address::tcp("localhost", 3000),
            reject_clients: false,
            retry_after_interval: Duration::from_secs(3),
            block_poll_interval: Duration::from_millis(100),
            close_poll_interval: Duration::from_millis(100),
            tls: Tls::default(),
            threads: None,
        }
    }
}

impl Default for Control {
    fn default() -> Self {
        Self { addr: Address::tcp("localhost", 3001), hosts: Vec::new() }
    }
}

impl Default for Upstream {
    fn default() -> Self {
        Self { addr: Address::tcp("localhost", 3002) }
    }
}
