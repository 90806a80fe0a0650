//! The configuration: every setting, its default and its meaning.

pub(crate) mod address;
pub(crate) mod duration;
mod settings;
pub mod suggest;
mod validate;
mod yaml;

use std::{
    fmt,
    fs::File,
    io::{ErrorKind, Read},
    net::IpAddr,
    num::{NonZeroU32, NonZeroUsize},
    path::{Path, PathBuf},
    time::Duration,
};

use crate::error::Error;
use address::Address;

/// The largest configuration file: ours has a kibibyte or two, and a huge one costs the parser seconds.
const FILE_BYTES_MAX: usize = 1024 * 1024;

/// The connections under way by default: what the backlog of a server often takes.
const CONNECTING_MAX: NonZeroUsize = NonZeroUsize::new(128).unwrap();

/// All settings of a proxy. [`Config::default`] is complete and runs.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// How long running connections may go on after a stop was asked for.
    pub grace_period: Duration,
    /// The most verbose level that is logged; the library itself ignores it.
    pub log_level: log::LevelFilter,
    /// The side of the clients.
    pub proxy: ProxyConfig,
    /// What a pause may be.
    pub pause: PauseConfig,
    /// The clients that are held while it is paused.
    pub hold: HoldConfig,
    /// How those who have waited are let go.
    pub resume: ResumeConfig,
    /// The HTTP API of the operator.
    pub control: ControlConfig,
    /// The server that the bytes are carried to.
    pub upstream: UpstreamConfig,
}

/// The side of the clients: `proxy.*`.
#[derive(Debug, Clone, PartialEq)]
pub struct ProxyConfig {
    /// Where clients connect to.
    pub addr: Address,
    /// The mode of the socket file at `addr`, such as `0o660`; what the umask leaves when absent.
    pub mode: Option<u32>,
    /// Whether new clients are rejected while paused, rather than held.
    pub reject_clients: bool,
    /// What they are rejected with.
    pub reject_with: RejectWith,
    /// The `Retry-After` of a rejection; zero leaves the header out.
    pub retry_after_interval: Duration,
    /// Accepted for compatibility; has no effect.
    pub block_poll_interval: Duration,
    /// Accepted for compatibility; has no effect.
    pub close_poll_interval: Duration,
    /// What a rejected TLS client is answered with.
    pub tls: TlsConfig,
    /// How many worker threads; the number of cores when absent.
    pub threads: Option<NonZeroUsize>,
    /// How many pipes each worker may splice bulk data through, 0 to copy all of it; a share of the open files when absent.
    pub pipes: Option<usize>,
    /// How many clients there may be at a time; as many as the open files allow when absent.
    pub max_connections: Option<NonZeroUsize>,
}

/// What new clients are rejected with: `proxy.reject-with`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum RejectWith {
    /// A 503; clients of SSH and PostgreSQL get the end of the stream.
    #[default]
    Http,
    /// The end of the stream.
    Close,
    /// A reset.
    Reset,
    /// What is in this file.
    File(PathBuf),
}

/// The certificate files: `proxy.tls.*`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TlsConfig {
    /// PEM bundle that a client's certificate, if it sends one, is verified against.
    pub ca_cert: Option<PathBuf>,
    /// PEM certificate chain of the proxy.
    pub cert: Option<PathBuf>,
    /// PEM private key that belongs to `cert`.
    pub key: Option<PathBuf>,
}

/// What a pause may be: `pause.*`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PauseConfig {
    /// The longest that a pause lasts, and how long one without a deadline does; without a bound when absent.
    pub max_ttl: Option<Duration>,
}

/// The clients that are held while the proxy is paused: `hold.*`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HoldConfig {
    /// How long one is held, before it gets what `overflow` says; as long as the pause lasts when absent.
    pub timeout: Option<Duration>,
    /// How many are held at a time; as many as there may be clients when absent.
    pub max: Option<NonZeroUsize>,
    /// What further ones get.
    pub overflow: Overflow,
}

/// What a client gets that is one more than may be held, or is held for too long: `hold.overflow`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Overflow {
    /// It is rejected, as `proxy.reject-with` says.
    Reject,
    /// The end of the stream.
    Close,
    /// One more than may be held waits in the kernel's backlog; one that is held for too long is rejected.
    #[default]
    Backlog,
}

/// How those who have waited are let go: `resume.*`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResumeConfig {
    /// How many connections for them may be under way at a time, over all workers, at most: how many the upstream takes is
    /// found out.
    pub max_connecting: NonZeroUsize,
    /// How many of them are dialled for in a second; without a bound when absent.
    pub rate: Option<NonZeroU32>,
}

/// The HTTP API of the operator: `control.*`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ControlConfig {
    /// Where the API listens.
    pub addr: Address,
    /// The mode of the socket file at `addr`.
    pub mode: u32,
    /// Further names that a `Host` header may carry.
    pub hosts: Vec<String>,
}

/// The server behind the proxy: `upstream.*`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UpstreamConfig {
    /// Where the upstream listens.
    pub addr: Address,
    /// How long one attempt to reach it may take.
    pub connect_timeout: Duration,
    /// How long a client waits for an upstream that is away; never less than `connect_timeout`.
    pub retry_for: Duration,
    /// The addresses of this host to reach it from, in turn; the system chooses when there are none.
    pub source_addrs: Vec<IpAddr>,
}

impl Config {
    /// Reads a YAML file. What it leaves out keeps its default. The error names the file, line, column and key, and the remedy.
    pub fn load(path: impl AsRef<Path>) -> Result<Self, Error> {
        let path = path.as_ref();
        let name = path.display();
        let mut bytes = Vec::new();
        // One byte more than allowed is enough to see that there are too many.
        let limit = FILE_BYTES_MAX as u64 + 1;
        if let Err(error) =
            File::open(path).and_then(|file| file.take(limit).read_to_end(&mut bytes))
        {
            let remedy = match error.kind() {
                ErrorKind::NotFound => "check the path",
                ErrorKind::PermissionDenied => "let this user read it",
                ErrorKind::IsADirectory => "name a file",
                _ => "name a readable file",
            };
            return Err(Error::Config(format!(
                "{name}: cannot read the configuration: {error}; {remedy}"
            )));
        }
        match String::from_utf8(bytes) {
            Ok(text) => Self::parse(&text, &name.to_string()),
            Err(error) if error.as_bytes().len() > FILE_BYTES_MAX => Err(too_large(&name)),
            Err(error) => {
                let good = String::from_utf8_lossy(
                    error.as_bytes().get(..error.utf8_error().valid_up_to()).unwrap_or_default(),
                );
                let (line, column) = (
                    good.split('\n').count(),
                    good.rsplit('\n').next().unwrap_or_default().chars().count() + 1,
                );
                Err(Error::Config(format!(
                    "{name}:{line}:{column}: this is not UTF-8; save the file as UTF-8"
                )))
            }
        }
    }

    /// Reads YAML. `name` stands for the file in errors.
    pub fn parse(text: &str, name: &str) -> Result<Self, Error> {
        if text.len() > FILE_BYTES_MAX {
            return Err(too_large(name));
        }
        yaml::parse(text).map_err(|error| Error::Config(format!("{name}:{error}")))
    }

    /// Every key, in the order of the file: `grace-period`, `log-level`, `proxy.addr` and so on.
    pub fn keys() -> impl Iterator<Item = &'static str> {
        settings::SETTINGS.iter().map(|setting| setting.key)
    }

    /// Sets one key from text, as an option of the command line does. The error does not name the key.
    pub fn set(&mut self, key: &str, text: &str) -> Result<(), String> {
        let setting = settings::find(key).ok_or_else(|| format!("there is no key {key:?}"))?;
        (setting.set)(self, text)
    }

    /// The value of one key, so that [`Config::set`] takes it; `None` when it is not set or there is no such key.
    pub fn get(&self, key: &str) -> Option<String> {
        yaml::to_text(&(settings::find(key)?.get)(self))
    }

    /// Checks what one key alone does not tell: that the settings fit together.
    pub fn validate(&self) -> Result<(), Error> {
        validate::validate(self).map_err(Error::Config)
    }
}

fn too_large(name: impl fmt::Display) -> Error {
    Error::Config(format!(
        "{name}: the configuration is larger than {FILE_BYTES_MAX} bytes; is this the right file?"
    ))
}

/// YAML that [`Config::parse`] reads the same.
impl fmt::Display for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&yaml::format(self).map_err(|_| fmt::Error)?)
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            grace_period: Duration::from_secs(10),
            log_level: log::LevelFilter::Info,
            proxy: ProxyConfig::default(),
            pause: PauseConfig::default(),
            hold: HoldConfig::default(),
            resume: ResumeConfig::default(),
            control: ControlConfig::default(),
            upstream: UpstreamConfig::default(),
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
        Self { addr: Address::tcp("localhost", 3001), mode: 0o600, hosts: Vec::new() }
    }
}

impl Default for UpstreamConfig {
    fn default() -> Self {
        Self {
            addr: Address::tcp("localhost", 3002),
            connect_timeout: Duration::from_secs(5),
            retry_for: Duration::ZERO,
            source_addrs: Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests;
