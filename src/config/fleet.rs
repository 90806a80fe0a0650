//! The settings of a fleet, `fleet.*`: their types, defaults and conditions.

use std::{fmt, net::IpAddr, path::PathBuf, time::Duration};

use serde::{Deserialize, Serialize};
use serde_yaml::Value as Yaml;

use super::{
    duration::format_duration,
    settings::{Config, TlsConfig},
    values::{Count, Value, choose, word},
};

/// The words of `fleet.on-disconnect`.
pub(super) const ON_DISCONNECT: [&str; 2] = ["serve", "hold"];

/// Bounds of `fleet.ttl`.
const TTL_MIN: Duration = Duration::from_secs(5);
const TTL_MAX: Duration = Duration::from_secs(10 * 60);
/// Longest name of a fleet or of a host, and longest prefix.
const NAME_BYTES_MAX: usize = 64;
/// Longest name of a user.
const USERNAME_BYTES_MAX: usize = 128;
/// Port of etcd.
const PORT: u16 = 2379;

/// The fleet of hosts that are paused as one, by etcd: `fleet.*`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FleetConfig {
    /// Members of etcd; without any, this proxy is in no fleet.
    pub endpoints: Vec<Endpoint>,
    /// Name of the fleet.
    pub name: FleetName,
    /// Begin of the keys in etcd.
    pub prefix: FleetPrefix,
    /// Name of this host, unique in the fleet; that of the system when absent.
    pub host: Option<FleetName>,
    /// Time to live of this host's session.
    pub ttl: Duration,
    /// Treatment of clients while etcd cannot be reached.
    pub on_disconnect: OnDisconnect,
    /// Longest time that clients wait at a start for etcd.
    pub start_wait: Duration,
    /// Longest time that a pause outlasts the loss of etcd.
    pub keep_paused_for: Duration,
    /// Certificates for `https`.
    pub tls: TlsConfig,
    /// User of etcd.
    pub username: Option<Username>,
    /// File with the user's password.
    pub password_file: Option<PathBuf>,
}

/// Address of a member of etcd: an item of `fleet.endpoints`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// True for `https`.
    pub is_tls: bool,
    /// Name or IP address, an IPv6 address without its brackets.
    pub host: String,
    /// Port of clients.
    pub port: u16,
}

/// Name of a fleet, or of a host in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FleetName(pub String);

/// Begin of a fleet's keys, such as `/tcpause`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FleetPrefix(pub String);

/// Name of a user of etcd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Username(pub String);

/// Treatment of clients while etcd cannot be reached: `fleet.on-disconnect`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnDisconnect {
    /// They are served, unless a pause holds. A host that cannot be heard blocks the next one.
    #[default]
    Serve,
    /// They are held once the session's time is over.
    Hold,
}

impl OnDisconnect {
    /// Returns its word in the configuration.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Serve => "serve",
            Self::Hold => "hold",
        }
    }
}

impl Default for FleetConfig {
    fn default() -> Self {
        Self {
            endpoints: Vec::new(),
            name: FleetName("default".to_owned()),
            prefix: FleetPrefix("/tcpause".to_owned()),
            host: None,
            ttl: Duration::from_secs(15),
            on_disconnect: OnDisconnect::default(),
            start_wait: Duration::from_secs(30),
            keep_paused_for: Duration::from_secs(10 * 60),
            tls: TlsConfig::default(),
            username: None,
            password_file: None,
        }
    }
}

impl FleetConfig {
    /// Returns the name of this host: the setting, or the name of the system.
    pub(crate) fn host(&self) -> Result<FleetName, String> {
        if let Some(host) = &self.host {
            return Ok(host.clone());
        }
        let system = rustix::system::uname();
        let name = system.nodename().to_string_lossy();
        FleetName::check(&name).map_err(|_| {
            format!(
                "fleet.host: the name of this host, {name:?}, has to be letters, digits, dots, dashes and underscores, at most {NAME_BYTES_MAX} bytes; set fleet.host"
            )
        })
    }

    /// Returns the linger: after so long without a holder, a pause is over. It is P + 3τ of the time to live.
    fn linger(&self) -> Duration {
        let timeout = (self.ttl / 10).clamp(Duration::from_secs(1), Duration::from_secs(3));
        self.ttl / 3 + 3 * timeout
    }

    /// Returns the lines to warn of settings that have no effect, and of secrets in plain text.
    pub(crate) fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        if self.endpoints.is_empty() && *self != Self::default() {
            warnings.push(
                "fleet.endpoints is not set, so that no other setting of fleet has an effect; write where etcd listens, or remove them".to_owned(),
            );
        }
        if let Some(plain) = self.endpoints.iter().find(|it| !it.is_tls && !it.is_on_loopback()) {
            warnings.push(format!(
                "fleet.endpoints: {plain} is not encrypted: whoever can read or change what passes can pause or resume the fleet; write https, and set fleet.tls.ca-cert"
            ));
        }
        warnings
    }
}

/// Returns the first conflict of the settings of a fleet.
pub(super) fn validate(config: &Config) -> Result<(), String> {
    let fleet = &config.fleet;
    if !(TTL_MIN..=TTL_MAX).contains(&fleet.ttl) {
        let ttl = format_duration(fleet.ttl);
        return Err(format!(
            "fleet.ttl: {ttl} is out of bounds; write 5s at least and 10m at most"
        ));
    }
    let TlsConfig { ca_cert, cert, key } = &fleet.tls;
    match (cert, key) {
        (Some(_), None) => {
            return Err(
                "fleet.tls.key is missing: fleet.tls.cert needs the private key that belongs to it"
                    .to_owned(),
            );
        }
        (None, Some(_)) => {
            return Err(
                "fleet.tls.cert is missing: fleet.tls.key needs the certificate that belongs to it"
                    .to_owned(),
            );
        }
        _ => {}
    }
    match (&fleet.username, &fleet.password_file) {
        (Some(_), None) => return Err("fleet.password-file is missing: fleet.username needs a file with the password of this user".to_owned()),
        (None, Some(_)) => return Err("fleet.username is missing: fleet.password-file needs the user whose password it has".to_owned()),
        _ => {}
    }
    let Some(first) = fleet.endpoints.first() else { return Ok(()) };
    let tls = fleet.endpoints.iter().find(|endpoint| endpoint.is_tls);
    match (tls, ca_cert) {
        (Some(endpoint), None) => {
            return Err(format!(
                "fleet.tls.ca-cert is missing: {endpoint} needs the PEM bundle that its certificate is verified against, as there are no built-in roots"
            ));
        }
        (None, Some(_)) => {
            return Err(format!(
                "fleet.tls.ca-cert: no endpoint is spoken to in TLS; write https in place of http ({first}), or leave fleet.tls away"
            ));
        }
        (None, None) if cert.is_some() => {
            return Err(format!(
                "fleet.tls.cert: no endpoint is spoken to in TLS; write https in place of http ({first}), or leave fleet.tls away"
            ));
        }
        _ => {}
    }
    fleet.host()?;
    check_keep(config)
}

/// Checks how long a pause outlasts the loss of etcd.
fn check_keep(config: &Config) -> Result<(), String> {
    let fleet = &config.fleet;
    let (keep, least) = (fleet.keep_paused_for, 2 * (fleet.ttl + fleet.linger()));
    if keep < least {
        let (keep, least) = (format_duration(keep), format_duration(least));
        return Err(format!(
            "fleet.keep-paused-for: {keep} is too short for fleet.ttl, as hosts would resume before the end of a pause is certain; write {least} at least"
        ));
    }
    match config.pause.max_ttl.filter(|max| keep > *max) {
        Some(max) => Err(format!(
            "fleet.keep-paused-for: {} is more than pause.max-ttl allows; write {} at most",
            format_duration(keep),
            format_duration(max)
        )),
        None => Ok(()),
    }
}

impl Endpoint {
    /// Returns true if nothing leaves this host.
    fn is_on_loopback(&self) -> bool {
        self.host == "localhost" || self.host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { is_tls, host, port } = self;
        let scheme = if *is_tls { "https" } else { "http" };
        if host.contains(':') {
            write!(f, "{scheme}://[{host}]:{port}")
        } else {
            write!(f, "{scheme}://{host}:{port}")
        }
    }
}

impl Value for Endpoint {
    fn parse(text: &str, _: Count) -> Result<Self, String> {
        let example = format!("write it as in `https://etcd1:{PORT}`");
        let (is_tls, rest) = match text.split_once("://") {
            Some(("https", rest)) => (true, rest),
            Some(("http", rest)) => (false, rest),
            Some((scheme, _)) => {
                return Err(format!(
                    "{text:?} has the scheme {scheme:?}, which is not spoken; {example}"
                ));
            }
            None => return Err(format!("{text:?} lacks http:// or https://; {example}")),
        };
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        let wrong = || format!("{text:?} is not the address of an etcd; {example}");
        let (host, port) =
            rest.rsplit_once(':').filter(|(host, _)| !host.ends_with(':')).ok_or_else(wrong)?;
        let host = match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
            Some(host) if host.parse::<IpAddr>().is_ok_and(|ip| ip.is_ipv6()) => host,
            None if !host.is_empty() && host.bytes().all(is_plain) => host,
            _ => return Err(wrong()),
        };
        let port = port.parse().ok().filter(|port| *port > 0).ok_or_else(wrong)?;
        Ok(Self { is_tls, host: host.to_owned(), port })
    }

    fn to_yaml(&self) -> Yaml {
        self.to_string().into()
    }
}

/// Returns true for the bytes of names, which need no quotes anywhere.
fn is_plain(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b".-_".contains(&byte)
}

impl FleetName {
    /// Checks a name. The error is a clause for the operator.
    pub(crate) fn check(text: &str) -> Result<Self, String> {
        if text.is_empty() || text.len() > NAME_BYTES_MAX || !text.bytes().all(is_plain) {
            return Err(format!(
                "{text:?} is not a name; write letters, digits, dots, dashes and underscores, at most {NAME_BYTES_MAX}"
            ));
        }
        Ok(Self(text.to_owned()))
    }
}

impl Value for FleetName {
    fn parse(text: &str, _: Count) -> Result<Self, String> {
        Self::check(text)
    }

    fn to_yaml(&self) -> Yaml {
        self.0.as_str().into()
    }
}

impl Value for FleetPrefix {
    fn parse(text: &str, _: Count) -> Result<Self, String> {
        let parts = text.strip_prefix('/').filter(|_| text.len() <= NAME_BYTES_MAX);
        let is_good = |part: &str| !part.is_empty() && part.bytes().all(is_plain);
        match parts {
            Some(parts) if parts.split('/').all(is_good) => Ok(Self(text.to_owned())),
            _ => Err(format!(
                "{text:?} is not the begin of keys; write names behind slashes, as in `/tcpause`, at most {NAME_BYTES_MAX} letters"
            )),
        }
    }

    fn to_yaml(&self) -> Yaml {
        self.0.as_str().into()
    }
}

impl Value for Username {
    fn parse(text: &str, _: Count) -> Result<Self, String> {
        if text.is_empty() || text.len() > USERNAME_BYTES_MAX || text.contains(char::is_control) {
            return Err(format!(
                "{text:?} is not the name of a user of etcd; write one that `etcdctl user list` shows"
            ));
        }
        Ok(Self(text.to_owned()))
    }

    fn to_yaml(&self) -> Yaml {
        self.0.as_str().into()
    }
}

impl Value for OnDisconnect {
    fn parse(text: &str, _: Count) -> Result<Self, String> {
        let values = [Self::Serve, Self::Hold];
        choose(text, &ON_DISCONNECT, values, "is nothing that can be done with clients")
    }

    fn to_yaml(&self) -> Yaml {
        word(*self as usize, &ON_DISCONNECT)
    }
}
