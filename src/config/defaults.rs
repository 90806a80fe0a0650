//! The defaults of the settings that are not those of their types.

use std::{
    num::{NonZeroU32, NonZeroUsize},
    time::Duration,
};

use log::LevelFilter;

use super::{
    address::Address,
    fleet::FleetConfig,
    settings::{
        Config, ControlConfig, HoldConfig, LogConfig, MonitorConfig, PauseConfig, ProxyConfig,
        ResumeConfig, TlsConfig, UpstreamConfig,
    },
    values::{ConnectionLog, LogFormat, RejectWith, SendProxy, Steer},
};

/// Default of `log.connections-rate`. The journal of systemd drops the lines of a service beyond some 300 in a second.
const CONNECTION_LINES_MAX: NonZeroU32 = NonZeroU32::new(100).unwrap();
/// Default of `resume.max-connecting`, a common length of a server's backlog.
const CONNECTING_MAX: NonZeroUsize = NonZeroUsize::new(128).unwrap();

impl Default for Config {
    fn default() -> Self {
        Self {
            grace_period: Duration::from_secs(10),
            log_level: LevelFilter::Info,
            log: LogConfig::default(),
            proxy: ProxyConfig::default(),
            pause: PauseConfig::default(),
            hold: HoldConfig::default(),
            resume: ResumeConfig::default(),
            control: ControlConfig::default(),
            monitor: MonitorConfig::default(),
            upstream: UpstreamConfig::default(),
            fleet: FleetConfig::default(),
            file: None,
        }
    }
}

impl Default for LogConfig {
    fn default() -> Self {
        Self {
            format: LogFormat::default(),
            connections: ConnectionLog::default(),
            connections_rate: CONNECTION_LINES_MAX,
        }
    }
}

impl Default for ProxyConfig {
    fn default() -> Self {
        Self {
            addr: Address::tcp("localhost", 3000),
            mode: None,
            reject_clients: false,
            reject_with: RejectWith::default(),
            retry_after_interval: Duration::from_secs(3),
            block_poll_interval: Duration::from_millis(100),
            close_poll_interval: Duration::from_millis(100),
            tls: TlsConfig::default(),
            threads: None,
            pipes: None,
            max_connections: None,
            accept_proxy_from: Vec::new(),
        }
    }
}

impl Default for ResumeConfig {
    fn default() -> Self {
        Self { max_connecting: CONNECTING_MAX, rate: None }
    }
}

impl Default for ControlConfig {
    fn default() -> Self {
        Self { addr: Address::tcp("localhost", 3001), mode: 0o600, group: None, hosts: Vec::new() }
    }
}

impl ControlConfig {
    /// Returns the mode that the socket file gets: with a group, the default would keep the group out.
    pub fn effective_mode(&self) -> u32 {
        let is_default = self.mode == Self::default().mode;
        if self.group.is_some() && is_default { 0o660 } else { self.mode }
    }
}

impl Default for MonitorConfig {
    fn default() -> Self {
        Self { addr: None, mode: 0o600 }
    }
}

impl Default for UpstreamConfig {
    fn default() -> Self {
        Self {
            addr: Address::tcp("localhost", 3002),
            connect_timeout: Duration::from_secs(5),
            retry_for: Duration::ZERO,
            source_addrs: Vec::new(),
            send_proxy: SendProxy::default(),
            steer: Steer::default(),
            state_file: None,
        }
    }
}
