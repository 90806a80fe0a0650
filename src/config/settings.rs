//! The settings of a proxy: the structs that hold them, their defaults, and the table that describes each setting.

use std::{
    net::IpAddr,
    num::{NonZeroU32, NonZeroUsize},
    path::PathBuf,
    time::Duration,
};

use log::LevelFilter;
use serde_yaml::Value as Yaml;

use super::{
    address::Address,
    fleet::{FleetConfig, ON_DISCONNECT},
    values::{
        CONNECTION_LOGS, ConnectionLog, Count, GroupName, HALF_CLOSED, HalfClosed, LEVELS,
        LOG_FORMATS, LogFormat, OVERFLOWS, Overflow, PROXY_VERSIONS, ProxySource, REJECTIONS,
        RejectWith, STEER, SendProxy, Steer, Value,
    },
};

/// One setting. The YAML file, the command line, its help, the man page, the completions, the sample file and the reference
/// follow from it.
pub struct Setting {
    /// Place in the file, with dots between the levels. The option has dashes instead.
    pub key: &'static str,
    /// Letter of the option after one dash.
    pub short: Option<char>,
    /// Word that stands for the value in the help; `None` for a switch.
    pub value: Option<&'static str>,
    /// Meaning in one line for the help, without a full stop.
    pub help: &'static str,
    /// Whole sentences that the man page adds.
    pub more: &'static str,
    /// Words that a shell offers for the value.
    pub completion: Completion,
    field: Field,
    count: Count,
}

/// Kind of words that a shell offers for the value of an option.
#[derive(Clone, Copy)]
pub enum Completion {
    /// Nothing.
    None,
    /// Names of files.
    File,
    /// Names of groups.
    Group,
    /// These words.
    Choices(&'static [&'static str]),
}

/// Access to one field of the configuration.
struct Field {
    get: fn(&Config) -> Yaml,
    set: fn(&mut Config, &str, Count) -> Result<(), String>,
}

/// Makes the [`Field`] of a place in [`Config`], by the syntax of its type.
macro_rules! field {
    ($($name:ident).+) => {
        Field {
            get: |config| config.$($name).+.to_yaml(),
            set: |config, text, count| {
                config.$($name).+ = Value::parse(text, count)?;
                Ok(())
            },
        }
    };
}

/// Sections of the file, each with its heading in the help. Keys without a dot lie in the first section.
pub const SECTIONS: [(&str, &str); 10] = [
    ("", "Options"),
    ("log", "Log, the lines on standard error"),
    ("proxy", "Proxy, the side of the clients"),
    ("pause", "Pause, which holds the clients or rejects them"),
    ("hold", "Hold, the clients that wait during a pause"),
    ("resume", "Resume, the pace at which waiting clients are served"),
    ("control", "Control, the HTTP API that pauses and resumes"),
    ("monitor", "Monitor, a second listener of the API that changes nothing"),
    ("upstream", "Upstream, the server behind the proxy"),
    ("fleet", "Fleet, the hosts that are paused as one, by etcd"),
];

/// Every setting, in the order of the file and of the help. Defaults are those of [`Config::default`].
pub(super) static SETTINGS: &[Setting] = &[
    setting("grace-period", "DURATION", field!(grace_period))
        .short('g')
        .help("Time that running connections have after SIGTERM, SIGINT or SIGQUIT")
        .more("Connections that remain are closed then."),
    setting("log-level", "LEVEL", field!(log_level))
        .choices(&LEVELS)
        .help("Log this level and above: off, error, warn, info, debug or trace")
        .more("The environment variable RUST_LOG beats it."),
    setting("log.format", "FORMAT", field!(log.format))
        .choices(&LOG_FORMATS)
        .help("Format of the lines of the log: auto, text or json")
        .more("With auto, a line is text, and where standard error is the journal of systemd, it has the journal's level and no time."),
    setting("log.connections", "WHICH", field!(log.connections))
        .choices(&CONNECTION_LOGS)
        .help("Ends of connections to be logged: off, failures or all")
        .more("Failures are those that a client could complain of."),
    setting("log.connections-rate", "N", field!(log.connections_rate))
        .count("lines", "100; or set log.connections to off")
        .help("Most lines about connections in a second; the others are counted"),
    setting("proxy.addr", "ADDRESS", field!(proxy.addr)).help("Address that clients connect to"),
    setting("proxy.mode", "MODE", field!(proxy.mode))
        .help("Mode of the socket file of --proxy-addr, as in 0660; left to the umask if not set")
        .more("A client needs write permission to connect."),
    switch("proxy.reject-clients", field!(proxy.reject_clients))
        .help("While paused, reject new clients instead of holding them")
        .more("It also takes a value behind an equals sign: --proxy-reject-clients=false."),
    setting("proxy.reject-with", "HOW", field!(proxy.reject_with))
        .choices(&REJECTIONS)
        .help("Response to rejected clients: http (a 503), close, reset or file:PATH")
        .more("A file is read at start, and its bytes, 64 KiB at most, are the whole response. With http, clients of SSH and PostgreSQL are closed without a response."),
    setting("proxy.retry-after-interval", "DURATION", field!(proxy.retry_after_interval))
        .help("Retry-After header of the 503; 0s leaves it out")
        .more("It is rounded up to whole seconds."),
    setting("proxy.block-poll-interval", "DURATION", field!(proxy.block_poll_interval))
        .help("Has no effect; known for compatibility")
        .more("Nothing polls here."),
    setting("proxy.close-poll-interval", "DURATION", field!(proxy.close_poll_interval))
        .help("Has no effect; known for compatibility")
        .more("Nothing polls here."),
    setting("proxy.tls.ca-cert", "FILE", field!(proxy.tls.ca_cert))
        .file()
        .help("PEM bundle that a rejected client's certificate, if it sends one, is verified against")
        .more("It needs a certificate and a key."),
    setting("proxy.tls.cert", "FILE", field!(proxy.tls.cert))
        .file()
        .help("PEM certificate chain for clients that open with TLS and are rejected")
        .more("It needs a key. Without them, such a client is closed and reads no 503."),
    setting("proxy.tls.key", "FILE", field!(proxy.tls.key))
        .file()
        .help("PEM private key that belongs to the certificate"),
    setting("proxy.threads", "N", field!(proxy.threads))
        .count("threads", "one thread a core")
        .help("Number of worker threads; one a core if not set"),
    setting("proxy.pipes", "N", field!(proxy.pipes))
        .count("pipes", "a share of the open files")
        .help("Most pipes of a thread for splicing bulk data; 0 copies all")
        .more("Large transfers pass through kernel pipes without being copied. By default all threads together take a share of the open files."),
    setting("proxy.max-connections", "N", field!(proxy.max_connections))
        .count("connections", "as many as the open files allow")
        .help("Most clients at a time; as many as the open files allow if not set")
        .more("Held and rejected clients count too. Further clients wait in the kernel's backlog and are not refused."),
    setting("proxy.accept-proxy-from", "CIDRS", field!(proxy.accept_proxy_from))
        .help("Networks, with commas between them, whose clients begin with a PROXY header")
        .more("Write unix for the clients of a UNIX socket. A client from there without a header is closed; the bytes of others are never taken for one."),
    setting("pause.max-ttl", "DURATION", field!(pause.max_ttl))
        .help("Longest time that a pause lasts; no limit if not set")
        .more("A pause without a time to live gets this one; a request for a longer one is refused."),
    setting("hold.timeout", "DURATION", field!(hold.timeout))
        .help("Longest time that a client is held; as long as the pause lasts if not set")
        .more("After that, the client is treated as --hold-overflow says; with backlog, it is rejected."),
    setting("hold.max", "N", field!(hold.max))
        .count("held clients", "no bound; to hold nobody, set proxy.reject-clients")
        .help("Most clients held at a time; as many as --proxy-max-connections if not set"),
    setting("hold.overflow", "WHAT", field!(hold.overflow))
        .choices(&OVERFLOWS)
        .help("Treatment of clients beyond --hold-max: reject, close or backlog")
        .more("With reject, they are rejected as if --proxy-reject-clients were given. With close, their stream is ended. With backlog, they wait in the kernel's backlog, unaccepted, until there is room."),
    setting("hold.half-closed", "WHAT", field!(hold.half_closed))
        .choices(&HALF_CLOSED)
        .help("Treatment of held clients that have ended their stream: serve or drop")
        .more("With serve, they are served on resume, and probed often until then; a TCP client that has closed altogether is dropped about a minute later, with what it sent. With drop, they are closed while it is paused. A pause may say otherwise by --half-closed; of several pauses the strictest counts."),
    setting("resume.max-connecting", "N", field!(resume.max_connecting))
        .count("connections", "128")
        .help("Most connection attempts at a time for clients that have waited")
        .more("The limit is for all threads together. The number begins with 4 and adapts to the backlog of the server."),
    setting("resume.rate", "N", field!(resume.rate))
        .count("clients in a second", "no bound")
        .help("Most waiting clients that are served per second; no limit if not set")
        .more("A low rate spares a server with cold caches."),
    setting("control.addr", "ADDRESS", field!(control.addr))
        .help("Address of the API, which has no login")
        .more("Keep it on the loopback or on a UNIX socket."),
    setting("control.mode", "MODE", field!(control.mode))
        .help("Mode of the socket file of --control-addr, as in 0660")
        .more("Every user with write permission can pause the proxy."),
    setting("control.group", "NAME", field!(control.group))
        .group()
        .help("Group of the socket file of --control-addr, whose members can pause the proxy")
        .more("With it, a mode of 0600 becomes 0660. tcpause runs as root or as a member of the group."),
    setting("control.hosts", "NAMES", field!(control.hosts))
        .help("Further host names that requests to the API may carry, with commas between them")
        .more("IP addresses, localhost and this host's own name are always allowed; other names are refused, so that no web page can pause a service."),
    setting("monitor.addr", "ADDRESS", field!(monitor.addr))
        .help("Address that answers GET of /, /status, /metrics, /ready and /fleet/status; off if not set")
        .more("It tells neither reasons nor callers of pauses, and may listen beyond the loopback."),
    setting("monitor.mode", "MODE", field!(monitor.mode))
        .help("Mode of the socket file of --monitor-addr, as in 0660")
        .more("Every user with write permission can read the status and the metrics."),
    setting("upstream.addr", "ADDRESS", field!(upstream.addr))
        .help("Address of the server")
        .more("A name is looked up again while the proxy runs; all its addresses are tried."),
    setting("upstream.connect-timeout", "DURATION", field!(upstream.connect_timeout))
        .help("Longest time for one attempt to reach the server")
        .more("A server that refuses, or is away, is tried again until the longer of this and --upstream-retry-for is over."),
    setting("upstream.retry-for", "DURATION", field!(upstream.retry_for))
        .help("Time to wait for an absent server, at least --upstream-connect-timeout")
        .more("A client that has waited for so long is reset. A value below --upstream-connect-timeout has no effect."),
    setting("upstream.source-addrs", "IPS", field!(upstream.source_addrs))
        .help("Addresses of this host, with commas between them, to reach the server from in turn")
        .more("Each address has ports of its own, enough for about 28,000 connections to one address and port of a server. By default the system chooses one address."),
    setting("upstream.send-proxy", "VERSION", field!(upstream.send_proxy))
        .choices(&PROXY_VERSIONS)
        .help("PROXY header that tells the server each client's address: off, v1 or v2")
        .more("The server must expect it. A header of v2 has the id of the connection, as the log shows it, unless it says LOCAL."),
    setting("upstream.state-file", "FILE", field!(upstream.state_file))
        .file()
        .help("File that remembers a switch to another server over restarts; none if not set")
        .more("It holds as long as --upstream-addr stays as it was at the switch. Its folder has to be there, and its path is absolute."),
    setting("upstream.steer", "WHEN", field!(upstream.steer))
        .choices(&STEER)
        .help("Steer connections past the proxy to a server on this host: off, auto or on")
        .more("While nothing is paused, no byte of new connections passes tcpause, and the server sees their clients' own addresses. It needs CAP_BPF and CAP_NET_ADMIN. With auto, connections that cannot be steered are relayed; with on, tcpause does not start without the rights."),
    setting("fleet.endpoints", "URLS", field!(fleet.endpoints))
        .help("Members of etcd, with commas between them, as in https://etcd1:2379; no fleet if not set")
        .more("At least one makes this proxy a member of the fleet."),
    setting("fleet.name", "NAME", field!(fleet.name)).help("Name of the fleet"),
    setting("fleet.prefix", "PREFIX", field!(fleet.prefix))
        .help("Begin of the keys in etcd")
        .more("All keys lie below --fleet-prefix, a slash, and --fleet-name."),
    setting("fleet.host", "NAME", field!(fleet.host))
        .help("Name of this host, unique in the fleet; the host's own name if not set"),
    setting("fleet.ttl", "DURATION", field!(fleet.ttl))
        .help("Time after which a host that is not heard of counts as lost, 5s to 10m"),
    setting("fleet.on-disconnect", "WHAT", field!(fleet.on_disconnect))
        .choices(&ON_DISCONNECT)
        .help("Treatment of clients without contact to etcd: serve or hold")
        .more("With serve, they are served unless a pause holds, and a lost host blocks the next pause. With hold, they are held after --fleet-ttl, and what is left is reset after the grace period; a lost host blocks no pause for longer."),
    setting("fleet.start-wait", "DURATION", field!(fleet.start_wait))
        .help("Longest time that clients are held at a start without etcd")
        .more("With --fleet-on-disconnect hold, they are held until etcd answers."),
    setting("fleet.keep-paused-for", "DURATION", field!(fleet.keep_paused_for))
        .help("Longest time that a pause of the fleet outlasts the loss of etcd on a host")
        .more("It has to be some three times --fleet-ttl, and at most --pause-max-ttl."),
    setting("fleet.tls.ca-cert", "FILE", field!(fleet.tls.ca_cert))
        .file()
        .help("PEM bundle that the certificates of etcd are verified against; https needs it"),
    setting("fleet.tls.cert", "FILE", field!(fleet.tls.cert))
        .file()
        .help("PEM certificate chain for an etcd that asks for one")
        .more("It needs a key. Where etcd has users, the certificate must not have a common name."),
    setting("fleet.tls.key", "FILE", field!(fleet.tls.key))
        .file()
        .help("PEM private key that belongs to the certificate"),
    setting("fleet.username", "NAME", field!(fleet.username))
        .help("User of etcd, for one that has users"),
    setting("fleet.password-file", "FILE", field!(fleet.password_file))
        .file()
        .help("File whose first line is the password of --fleet-username"),
];

const fn setting(key: &'static str, value: &'static str, field: Field) -> Setting {
    Setting { value: Some(value), ..switch(key, field) }
}

const fn switch(key: &'static str, field: Field) -> Setting {
    Setting {
        key,
        short: None,
        value: None,
        help: "",
        more: "",
        completion: Completion::None,
        field,
        count: Count { things: "", otherwise: "" },
    }
}

impl Setting {
    const fn short(self, letter: char) -> Self {
        Self { short: Some(letter), ..self }
    }

    const fn help(self, help: &'static str) -> Self {
        Self { help, ..self }
    }

    const fn more(self, more: &'static str) -> Self {
        Self { more, ..self }
    }

    const fn file(self) -> Self {
        Self { completion: Completion::File, ..self }
    }

    const fn group(self) -> Self {
        Self { completion: Completion::Group, ..self }
    }

    const fn choices(self, words: &'static [&'static str]) -> Self {
        Self { completion: Completion::Choices(words), ..self }
    }

    /// Adds the words for the errors of a number: the things that it counts, and the number that applies without the setting.
    const fn count(self, things: &'static str, otherwise: &'static str) -> Self {
        Self { count: Count { things, otherwise }, ..self }
    }

    /// Returns the section that the key lies in; empty for a key without a dot.
    pub fn section(&self) -> &'static str {
        self.key.split_once('.').map_or("", |(section, _)| section)
    }

    /// Returns the value of the setting in a configuration; null if it is not set.
    pub(super) fn get(&self, config: &Config) -> Yaml {
        (self.field.get)(config)
    }

    /// Sets the setting from text.
    pub(super) fn set(&self, config: &mut Config, text: &str) -> Result<(), String> {
        (self.field.set)(config, text, self.count)
    }
}

/// Finds the setting of a key.
pub(super) fn find(key: &str) -> Option<&'static Setting> {
    SETTINGS.iter().find(|setting| setting.key == key)
}

/// All settings of a proxy. [`Config::default`] is complete and runs.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Time that running connections have after a stop is requested.
    pub grace_period: Duration,
    /// Most verbose level that is logged; the library itself ignores it.
    pub log_level: LevelFilter,
    /// The lines on standard error; the library itself ignores their format.
    pub log: LogConfig,
    /// The side of the clients.
    pub proxy: ProxyConfig,
    /// Bounds of a pause.
    pub pause: PauseConfig,
    /// The clients that are held while it is paused.
    pub hold: HoldConfig,
    /// The rate at which waiting clients are served.
    pub resume: ResumeConfig,
    /// The HTTP API of the operator.
    pub control: ControlConfig,
    /// The part of the API that changes nothing.
    pub monitor: MonitorConfig,
    /// The server that the bytes are carried to.
    pub upstream: UpstreamConfig,
    /// The hosts that are paused as one.
    pub fleet: FleetConfig,
    /// File of the configuration, for the status.
    pub file: Option<PathBuf>,
}

/// The lines on standard error: `log.*`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogConfig {
    /// Format of a line.
    pub format: LogFormat,
    /// Connections of which the end is logged.
    pub connections: ConnectionLog,
    /// Most lines about connections in a second, over all workers.
    pub connections_rate: NonZeroU32,
}

/// The side of the clients: `proxy.*`.
#[derive(Debug, Clone, PartialEq)]
pub struct ProxyConfig {
    /// Address that clients connect to.
    pub addr: Address,
    /// Mode of the socket file at `addr`, such as `0o660`; the umask decides when absent.
    pub mode: Option<u32>,
    /// True to reject new clients during a pause, false to hold them.
    pub reject_clients: bool,
    /// Response to rejected clients.
    pub reject_with: RejectWith,
    /// `Retry-After` header of a rejection; zero leaves it out.
    pub retry_after_interval: Duration,
    /// Accepted for compatibility; has no effect.
    pub block_poll_interval: Duration,
    /// Accepted for compatibility; has no effect.
    pub close_poll_interval: Duration,
    /// Certificate for the response to rejected TLS clients.
    pub tls: TlsConfig,
    /// Number of worker threads; the number of cores when absent.
    pub threads: Option<NonZeroUsize>,
    /// Number of pipes that each worker may splice bulk data through, 0 to copy all of it; a share of the open files when absent.
    pub pipes: Option<usize>,
    /// Most clients at a time; as many as the open files allow when absent.
    pub max_connections: Option<NonZeroUsize>,
    /// Clients that begin with a header of the PROXY protocol; nobody when empty.
    pub accept_proxy_from: Vec<ProxySource>,
}

/// The certificate files: `proxy.tls.*` and `fleet.tls.*`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TlsConfig {
    /// PEM bundle that the other side's certificate is verified against. A client need not send one.
    pub ca_cert: Option<PathBuf>,
    /// PEM certificate chain of the proxy.
    pub cert: Option<PathBuf>,
    /// PEM private key that belongs to `cert`.
    pub key: Option<PathBuf>,
}

/// Bounds of a pause: `pause.*`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PauseConfig {
    /// Longest time that a pause lasts, and the length of a pause that names none; no limit when absent.
    pub max_ttl: Option<Duration>,
}

/// The clients that are held while the proxy is paused: `hold.*`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HoldConfig {
    /// Longest time that a client is held, before it is treated as `overflow` says; as long as the pause lasts when absent.
    pub timeout: Option<Duration>,
    /// Most clients held at a time; as many as `proxy.max_connections` when absent.
    pub max: Option<NonZeroUsize>,
    /// Treatment of clients beyond `max`.
    pub overflow: Overflow,
    /// Treatment of clients that have ended their stream, during a pause that names none.
    pub half_closed: HalfClosed,
}

/// The rate at which waiting clients are served: `resume.*`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResumeConfig {
    /// Most connection attempts for waiting clients at a time, over all workers. The number within this limit adapts to the
    /// backlog of the upstream.
    pub max_connecting: NonZeroUsize,
    /// Most waiting clients that are served per second; no limit when absent.
    pub rate: Option<NonZeroU32>,
}

/// The HTTP API of the operator: `control.*`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ControlConfig {
    /// Address that the API listens on.
    pub addr: Address,
    /// Mode of the socket file at `addr`; with a `group`, its default counts as 0660.
    pub mode: u32,
    /// Group of the socket file at `addr`; the group of the process when absent.
    pub group: Option<GroupName>,
    /// Further names that a `Host` header may carry.
    pub hosts: Vec<String>,
}

/// The listener for those that only look: `monitor.*`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MonitorConfig {
    /// Address to listen on; nothing listens when absent.
    pub addr: Option<Address>,
    /// Mode of the socket file at `addr`.
    pub mode: u32,
}

/// The server behind the proxy: `upstream.*`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UpstreamConfig {
    /// Address that the upstream listens on.
    pub addr: Address,
    /// Longest time for one attempt to reach the upstream.
    pub connect_timeout: Duration,
    /// Time that a client waits for an upstream that is away; never less than `connect_timeout`.
    pub retry_for: Duration,
    /// Addresses of this host to reach the upstream from, in turn; the system chooses when there are none.
    pub source_addrs: Vec<IpAddr>,
    /// Version of the PROXY protocol that tells the upstream each client's address.
    pub send_proxy: SendProxy,
    /// Steering of new connections straight to an upstream on this host.
    pub steer: Steer,
    /// File that remembers a switch of the upstream; a switch ends with the process when absent.
    pub state_file: Option<PathBuf>,
}
