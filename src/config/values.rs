//! The types of settings, each with its reading from text and its writing to YAML.

use std::{
    net::IpAddr,
    num::{NonZeroU32, NonZeroUsize},
    path::PathBuf,
    str::FromStr,
    time::Duration,
};

use log::LevelFilter;
use serde::{Deserialize, Serialize};
use serde_yaml::Value as Yaml;

use super::{
    address::Address,
    duration::{format_duration, parse_duration},
    network::Network,
    suggest::nearest,
};

/// The levels of the log, least verbose first.
pub(super) const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];
/// The words of `log.format`.
pub(super) const LOG_FORMATS: [&str; 3] = ["auto", "text", "json"];
/// The words of `log.connections`.
pub(super) const CONNECTION_LOGS: [&str; 3] = ["off", "failures", "all"];
/// The words of `hold.overflow`.
pub(super) const OVERFLOWS: [&str; 3] = ["reject", "close", "backlog"];
/// The words of `hold.half-closed`.
pub(super) const HALF_CLOSED: [&str; 2] = [HalfClosed::Serve.word(), HalfClosed::Drop.word()];
/// The words of `proxy.reject-with`; a file may be named, too.
pub(super) const REJECTIONS: [&str; 3] = ["http", "close", "reset"];
/// The words of `upstream.send-proxy`.
pub(super) const PROXY_VERSIONS: [&str; 3] = ["off", "v1", "v2"];

/// The words of `upstream.steer`.
pub(super) const STEER: [&str; 3] = ["off", "auto", "on"];

/// Response to rejected clients, as `proxy.reject-with` names it; `RejectResponse` is the loaded answer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum RejectWith {
    /// A 503; clients of SSH and PostgreSQL get the end of the stream.
    #[default]
    Http,
    /// The end of the stream.
    Close,
    /// A reset.
    Reset,
    /// The bytes of this file.
    File(PathBuf),
}

/// Treatment of a client that exceeds `hold.max`, or is held for longer than `hold.timeout`: `hold.overflow`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Overflow {
    /// The client is rejected, as `proxy.reject-with` says.
    Reject,
    /// The end of the stream.
    Close,
    /// A client beyond `hold.max` waits in the kernel's backlog. After `hold.timeout`, a client is rejected.
    #[default]
    Backlog,
}

/// Treatment of a held client that has ended its stream: `hold.half-closed`. The strictest is the greatest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HalfClosed {
    /// It is served on resume, as it may wait for its answer.
    #[default]
    Serve,
    /// It is closed, as it may have given up.
    Drop,
}

impl HalfClosed {
    /// Both treatments, the less strict one first.
    pub(crate) const ALL: [Self; 2] = [Self::Serve, Self::Drop];

    /// Returns the word of the setting, the API and the status.
    pub(crate) const fn word(self) -> &'static str {
        match self {
            Self::Serve => "serve",
            Self::Drop => "drop",
        }
    }
}

/// Format of the lines of the log: `log.format`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// Text; in the journal of systemd, with the journal's level in place of a time.
    #[default]
    Auto,
    /// Text with a time.
    Text,
    /// An object of JSON.
    Json,
}

/// Connections of which the end is logged: `log.connections`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ConnectionLog {
    /// None.
    Off,
    /// Those that a client could complain of.
    #[default]
    Failures,
    /// All.
    All,
}

/// Version of the PROXY protocol that the upstream is told its clients by: `upstream.send-proxy`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum SendProxy {
    /// None: it is told nothing.
    #[default]
    Off,
    /// The line of text.
    V1,
    /// The binary header.
    V2,
}

/// Steering of new connections straight to the upstream while nothing is paused: `upstream.steer`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Steer {
    /// All connections are relayed.
    #[default]
    Off,
    /// They are steered where that is possible, and relayed elsewhere.
    Auto,
    /// A host on which they cannot be steered is an error at the start.
    On,
}

/// Clients that begin with a header of the PROXY protocol: an item of `proxy.accept-proxy-from`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProxySource {
    /// Clients of a UNIX socket.
    Unix,
    /// Clients with an address of this network.
    Network(Network),
}

/// Name of a group of users.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupName(pub String);

/// Words for the errors of a number.
#[derive(Clone, Copy)]
pub(super) struct Count {
    /// The things that are counted.
    pub(super) things: &'static str,
    /// The number that applies without the setting.
    pub(super) otherwise: &'static str,
}

/// Type of a setting's value.
pub(super) trait Value: Sized {
    /// Reads a value from text. The error shows the text and the remedy, and does not name the setting.
    fn parse(text: &str, count: Count) -> Result<Self, String>;

    /// Writes the value, so that its text is read as the same value.
    fn to_yaml(&self) -> Yaml;
}

/// Optional value; null if it is not set.
impl<T: Value> Value for Option<T> {
    fn parse(text: &str, count: Count) -> Result<Self, String> {
        T::parse(text, count).map(Some)
    }

    fn to_yaml(&self) -> Yaml {
        self.as_ref().map_or(Yaml::Null, T::to_yaml)
    }
}

/// List of values, with commas between them in text.
impl<T: Value> Value for Vec<T> {
    fn parse(text: &str, count: Count) -> Result<Self, String> {
        text.split(',').map(|item| T::parse(item.trim(), count)).collect()
    }

    fn to_yaml(&self) -> Yaml {
        self.iter().map(T::to_yaml).collect()
    }
}

impl Value for Duration {
    fn parse(text: &str, _: Count) -> Result<Self, String> {
        parse_duration(text)
    }

    fn to_yaml(&self) -> Yaml {
        format_duration(*self).into()
    }
}

impl Value for Address {
    fn parse(text: &str, _: Count) -> Result<Self, String> {
        text.parse()
    }

    fn to_yaml(&self) -> Yaml {
        self.to_string().into()
    }
}

impl Value for bool {
    fn parse(text: &str, _: Count) -> Result<Self, String> {
        match text {
            "true" | "True" | "TRUE" => Ok(true),
            "false" | "False" | "FALSE" => Ok(false),
            _ => Err(format!("{text:?} is not a boolean; write true or false")),
        }
    }

    fn to_yaml(&self) -> Yaml {
        (*self).into()
    }
}

impl Value for LevelFilter {
    fn parse(text: &str, _: Count) -> Result<Self, String> {
        text.parse().map_err(|_| {
            let (levels, hint) = (LEVELS.join(", "), did_you_mean(text, &LEVELS));
            format!("{text:?} is not a level; the levels are {levels}{hint}")
        })
    }

    fn to_yaml(&self) -> Yaml {
        self.as_str().to_lowercase().into()
    }
}

/// Makes values of enums whose words stand in the order of their variants.
macro_rules! words {
    ($($name:ident = $words:ident of $values:expr, $complaint:literal;)+) => {$(
        impl Value for $name {
            fn parse(text: &str, _: Count) -> Result<Self, String> {
                choose(text, &$words, $values, $complaint)
            }

            fn to_yaml(&self) -> Yaml {
                word(*self as usize, &$words)
            }
        }
    )+};
}

words! {
    LogFormat = LOG_FORMATS of [LogFormat::Auto, LogFormat::Text, LogFormat::Json], "is no format of the log";
    ConnectionLog = CONNECTION_LOGS of [ConnectionLog::Off, ConnectionLog::Failures, ConnectionLog::All], "names no connections to be logged";
    Overflow = OVERFLOWS of [Overflow::Reject, Overflow::Close, Overflow::Backlog], "is nothing that can be done with a client";
    SendProxy = PROXY_VERSIONS of [SendProxy::Off, SendProxy::V1, SendProxy::V2], "is no version of the PROXY protocol";
    Steer = STEER of [Steer::Off, Steer::Auto, Steer::On], "is no way to steer connections";
}

impl Value for HalfClosed {
    fn parse(text: &str, _: Count) -> Result<Self, String> {
        choose(text, &HALF_CLOSED, Self::ALL, "is nothing that can be done with a client")
    }

    fn to_yaml(&self) -> Yaml {
        word(*self as usize, &HALF_CLOSED)
    }
}

impl Value for ProxySource {
    fn parse(text: &str, _: Count) -> Result<Self, String> {
        if text == "unix" {
            return Ok(Self::Unix);
        }
        let hint = match did_you_mean(text, &["unix"]) {
            hint if hint.is_empty() => ", or unix for the clients of a UNIX socket".to_owned(),
            hint => hint,
        };
        text.parse().map(Self::Network).map_err(|error: String| error + &hint)
    }

    fn to_yaml(&self) -> Yaml {
        match self {
            Self::Unix => "unix".into(),
            Self::Network(network) => network.to_string().into(),
        }
    }
}

impl Value for RejectWith {
    fn parse(text: &str, _: Count) -> Result<Self, String> {
        match text {
            "http" => Ok(Self::Http),
            "close" => Ok(Self::Close),
            "reset" => Ok(Self::Reset),
            _ => match text.strip_prefix("file:") {
                Some("") => {
                    Err("a path is missing; write it as in `file:/etc/tcpause/answer`".to_owned())
                }
                Some(path) if path.contains(char::is_control) => Err(format!(
                    "{text:?} has a control character in it; write `file:` and the path of a file"
                )),
                Some(path) => Ok(Self::File(path.into())),
                None => {
                    let hint = did_you_mean(text, &["http", "close", "reset", "file:PATH"]);
                    Err(format!(
                        "{text:?} is no way to reject; write http, close, reset or file:PATH{hint}"
                    ))
                }
            },
        }
    }

    fn to_yaml(&self) -> Yaml {
        match self {
            Self::Http => "http".into(),
            Self::Close => "close".into(),
            Self::Reset => "reset".into(),
            Self::File(path) => format!("file:{}", path.to_string_lossy()).into(),
        }
    }
}

/// The path of a file.
impl Value for PathBuf {
    fn parse(text: &str, _: Count) -> Result<Self, String> {
        if text.is_empty() {
            return Err("a path is missing; write the path of a file".to_owned());
        }
        if text.contains(char::is_control) {
            return Err(format!(
                "{text:?} has a control character in it; write the path of a file"
            ));
        }
        Ok(text.into())
    }

    fn to_yaml(&self) -> Yaml {
        self.to_string_lossy().into_owned().into()
    }
}

/// Mode of a socket file, in octal: `0660`, `660` or `0o660`. It is read as text, as YAML could take it for a decimal number.
impl Value for u32 {
    fn parse(text: &str, _: Count) -> Result<Self, String> {
        let digits = text.strip_prefix("0o").unwrap_or(text);
        let mode = match Self::from_str_radix(digits, 8) {
            Ok(mode) if digits.len() >= 3 && !digits.starts_with('+') && mode <= 0o777 => mode,
            _ => {
                return Err(format!(
                    "{text:?} is not the mode of a socket; write three octal digits behind a 0, as in `0660`"
                ));
            }
        };
        // This also refuses most modes that a tool has turned into decimals (0660 is 432).
        if mode & 0o600 != 0o600 {
            return Err(format!(
                "{text:?} keeps the socket's own user out; write an octal mode that begins with 06 or 07, as in `0660`"
            ));
        }
        Ok(mode)
    }

    fn to_yaml(&self) -> Yaml {
        format!("{self:04o}").into()
    }
}

impl Value for usize {
    fn parse(text: &str, count: Count) -> Result<Self, String> {
        parse_number(text, 0, count)
    }

    fn to_yaml(&self) -> Yaml {
        (*self).into()
    }
}

impl Value for NonZeroUsize {
    fn parse(text: &str, count: Count) -> Result<Self, String> {
        parse_number(text, 1, count)
    }

    fn to_yaml(&self) -> Yaml {
        self.get().into()
    }
}

impl Value for NonZeroU32 {
    fn parse(text: &str, count: Count) -> Result<Self, String> {
        parse_number(text, 1, count)
    }

    fn to_yaml(&self) -> Yaml {
        self.get().into()
    }
}

/// An IP address of this host.
impl Value for IpAddr {
    fn parse(text: &str, _: Count) -> Result<Self, String> {
        text.parse().map_err(|_| {
            format!("{text:?} is not an IP address; write addresses of this host with commas between them, as in `192.0.2.1,192.0.2.2`")
        })
    }

    fn to_yaml(&self) -> Yaml {
        self.to_string().into()
    }
}

impl Value for GroupName {
    fn parse(text: &str, _: Count) -> Result<Self, String> {
        if text.is_empty() || text.contains(|letter: char| letter.is_control() || letter == ':') {
            return Err(format!("{text:?} is not the name of a group; write one of /etc/group"));
        }
        Ok(Self(text.to_owned()))
    }

    fn to_yaml(&self) -> Yaml {
        self.0.as_str().into()
    }
}

/// A host name.
impl Value for String {
    fn parse(text: &str, _: Count) -> Result<Self, String> {
        let is_letter = |byte: u8| byte.is_ascii_alphanumeric() || b".-_".contains(&byte);
        match text {
            "" => Err("a host name is missing; write names with commas between them, as in `a.example,b.example`".to_owned()),
            _ if text.bytes().all(is_letter) => Ok(text.to_owned()),
            _ => Err(format!("{text:?} is not a host name; write the name alone, without scheme and port")),
        }
    }

    fn to_yaml(&self) -> Yaml {
        self.as_str().into()
    }
}

fn parse_number<T: FromStr>(text: &str, least: u8, count: Count) -> Result<T, String> {
    let Count { things, otherwise } = count;
    text.parse().map_err(|_| {
        format!("{text:?} is not a number of {things}; write {least} or more, or leave it away for {otherwise}")
    })
}

/// Finds the value of a word, or tells the words.
pub(super) fn choose<T, const N: usize>(
    text: &str,
    words: &[&'static str; N],
    values: [T; N],
    complaint: &str,
) -> Result<T, String> {
    let found = words.iter().zip(values).find(|(word, _value)| **word == text);
    found.map(|(_word, value)| value).ok_or_else(|| {
        let (words, hint) = (words.join(", "), did_you_mean(text, words));
        format!("{text:?} {complaint}; write {words}{hint}")
    })
}

pub(super) fn word(index: usize, words: &[&'static str]) -> Yaml {
    words.get(index).copied().map_or(Yaml::Null, Yaml::from)
}

fn did_you_mean(text: &str, words: &[&'static str]) -> String {
    nearest(text, words.iter().copied())
        .map_or_else(String::new, |word| format!("; did you mean `{word}`?"))
}
