//! The table of settings: what the YAML file and the command line share.

use std::{
    net::IpAddr,
    num::{NonZeroU32, NonZeroUsize},
    path::PathBuf,
    time::Duration,
};

use log::LevelFilter;
use serde_yaml::Value;

use super::{Config, Overflow, RejectWith};
use super::{
    duration::{format_duration, parse_duration},
    suggest::nearest,
};

/// One key of the configuration.
pub(super) struct Setting {
    /// Its place in the file, with dots between the levels.
    pub(super) key: &'static str,
    /// Reads it from a configuration; null when it is not set.
    pub(super) get: fn(&Config) -> Value,
    /// Sets it from text.
    pub(super) set: fn(&mut Config, &str) -> Result<(), String>,
}

/// Every setting, in the order of the file.
pub(super) static SETTINGS: [Setting; 28] = [
    Setting {
        key: "grace-period",
        get: |config| format_duration(config.grace_period).into(),
        set: |config, text| store(&mut config.grace_period, parse_duration(text)),
    },
    Setting {
        key: "log-level",
        get: |config| config.log_level.as_str().to_lowercase().into(),
        set: |config, text| store(&mut config.log_level, parse_level(text)),
    },
    Setting {
        key: "proxy.addr",
        get: |config| config.proxy.addr.to_string().into(),
        set: |config, text| store(&mut config.proxy.addr, text.parse()),
    },
    Setting {
        key: "proxy.mode",
        get: |config| config.proxy.mode.map_or(Value::Null, mode_value),
        set: |config, text| store(&mut config.proxy.mode, parse_mode(text).map(Some)),
    },
    Setting {
        key: "proxy.reject-clients",
        get: |config| config.proxy.reject_clients.into(),
        set: |config, text| store(&mut config.proxy.reject_clients, parse_bool(text)),
    },
    Setting {
        key: "proxy.reject-with",
        get: |config| reject_with_value(&config.proxy.reject_with),
        set: |config, text| store(&mut config.proxy.reject_with, parse_reject_with(text)),
    },
    Setting {
        key: "proxy.retry-after-interval",
        get: |config| format_duration(config.proxy.retry_after_interval).into(),
        set: |config, text| store(&mut config.proxy.retry_after_interval, parse_duration(text)),
    },
    Setting {
        key: "proxy.block-poll-interval",
        get: |config| format_duration(config.proxy.block_poll_interval).into(),
        set: |config, text| store(&mut config.proxy.block_poll_interval, parse_duration(text)),
    },
    Setting {
        key: "proxy.close-poll-interval",
        get: |config| format_duration(config.proxy.close_poll_interval).into(),
        set: |config, text| store(&mut config.proxy.close_poll_interval, parse_duration(text)),
    },
    Setting {
        key: "proxy.tls.ca-cert",
        get: |config| path_value(config.proxy.tls.ca_cert.as_ref()),
        set: |config, text| store(&mut config.proxy.tls.ca_cert, parse_path(text)),
    },
    Setting {
        key: "proxy.tls.cert",
        get: |config| path_value(config.proxy.tls.cert.as_ref()),
        set: |config, text| store(&mut config.proxy.tls.cert, parse_path(text)),
    },
    Setting {
        key: "proxy.tls.key",
        get: |config| path_value(config.proxy.tls.key.as_ref()),
        set: |config, text| store(&mut config.proxy.tls.key, parse_path(text)),
    },
    Setting {
        key: "proxy.threads",
        get: |config| config.proxy.threads.map_or(Value::Null, |threads| threads.get().into()),
        set: |config, text| store(&mut config.proxy.threads, parse_threads(text)),
    },
    Setting {
        key: "proxy.pipes",
        get: |config| config.proxy.pipes.map_or(Value::Null, Into::into),
        set: |config, text| store(&mut config.proxy.pipes, parse_pipes(text)),
    },
    Setting {
        key: "proxy.max-connections",
        get: |config| config.proxy.max_connections.map_or(Value::Null, |max| max.get().into()),
        set: |config, text| store(&mut config.proxy.max_connections, parse_connections(text)),
    },
    Setting {
        key: "pause.max-ttl",
        get: |config| duration_value(config.pause.max_ttl),
        set: |config, text| store(&mut config.pause.max_ttl, parse_duration(text).map(Some)),
    },
    Setting {
        key: "hold.timeout",
        get: |config| duration_value(config.hold.timeout),
        set: |config, text| store(&mut config.hold.timeout, parse_duration(text).map(Some)),
    },
    Setting {
        key: "hold.max",
        get: |config| config.hold.max.map_or(Value::Null, |max| max.get().into()),
        set: |config, text| store(&mut config.hold.max, parse_held(text)),
    },
    Setting {
        key: "hold.overflow",
        get: |config| overflow_value(config.hold.overflow).into(),
        set: |config, text| store(&mut config.hold.overflow, parse_overflow(text)),
    },
    Setting {
        key: "resume.max-connecting",
        get: |config| config.resume.max_connecting.get().into(),
        set: |config, text| store(&mut config.resume.max_connecting, parse_connecting(text)),
    },
    Setting {
        key: "resume.rate",
        get: |config| config.resume.rate.map_or(Value::Null, |rate| rate.get().into()),
        set: |config, text| store(&mut config.resume.rate, parse_rate(text)),
    },
    Setting {
        key: "control.addr",
        get: |config| config.control.addr.to_string().into(),
        set: |config, text| store(&mut config.control.addr, text.parse()),
    },
    Setting {
        key: "control.mode",
        get: |config| mode_value(config.control.mode),
        set: |config, text| store(&mut config.control.mode, parse_mode(text)),
    },
    Setting {
        key: "control.hosts",
        get: |config| config.control.hosts.clone().into(),
        set: |config, text| store(&mut config.control.hosts, parse_hosts(text)),
    },
    Setting {
        key: "upstream.addr",
        get: |config| config.upstream.addr.to_string().into(),
        set: |config, text| store(&mut config.upstream.addr, text.parse()),
    },
    Setting {
        key: "upstream.connect-timeout",
        get: |config| format_duration(config.upstream.connect_timeout).into(),
        set: |config, text| store(&mut config.upstream.connect_timeout, parse_duration(text)),
    },
    Setting {
        key: "upstream.retry-for",
        get: |config| format_duration(config.upstream.retry_for).into(),
        set: |config, text| store(&mut config.upstream.retry_for, parse_duration(text)),
    },
    Setting {
        key: "upstream.source-addrs",
        get: |config| {
            let ips = config.upstream.source_addrs.iter().map(IpAddr::to_string);
            ips.collect::<Vec<_>>().into()
        },
        set: |config, text| store(&mut config.upstream.source_addrs, parse_ips(text)),
    },
];

/// The setting of a key.
pub(super) fn find(key: &str) -> Option<&'static Setting> {
    SETTINGS.iter().find(|setting| setting.key == key)
}

fn store<T>(place: &mut T, value: Result<T, String>) -> Result<(), String> {
    *place = value?;
    Ok(())
}

fn duration_value(duration: Option<Duration>) -> Value {
    duration.map_or(Value::Null, |duration| format_duration(duration).into())
}

fn path_value(path: Option<&PathBuf>) -> Value {
    path.map_or(Value::Null, |path| path.to_string_lossy().into_owned().into())
}

fn reject_with_value(reject_with: &RejectWith) -> Value {
    match reject_with {
        RejectWith::Http => "http".into(),
        RejectWith::Close => "close".into(),
        RejectWith::Reset => "reset".into(),
        RejectWith::File(path) => format!("file:{}", path.to_string_lossy()).into(),
    }
}

fn overflow_value(overflow: Overflow) -> &'static str {
    match overflow {
        Overflow::Reject => "reject",
        Overflow::Close => "close",
        Overflow::Backlog => "backlog",
    }
}

fn parse_overflow(text: &str) -> Result<Overflow, String> {
    const ALL: [Overflow; 3] = [Overflow::Reject, Overflow::Close, Overflow::Backlog];
    ALL.into_iter().find(|overflow| overflow_value(*overflow) == text).ok_or_else(|| {
        let words = ALL.map(overflow_value);
        let hint = nearest(text, words)
            .map_or_else(String::new, |word| format!("; did you mean `{word}`?"));
        format!(
            "{text:?} is nothing that can be done with a client; write {}{hint}",
            words.join(", ")
        )
    })
}

fn parse_level(text: &str) -> Result<LevelFilter, String> {
    const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];
    text.parse().map_err(|_| {
        let hint = nearest(text, LEVELS)
            .map_or_else(String::new, |level| format!("; did you mean `{level}`?"));
        format!("{text:?} is not a level; the levels are {}{hint}", LEVELS.join(", "))
    })
}

fn parse_bool(text: &str) -> Result<bool, String> {
    match text {
        "true" | "True" | "TRUE" => Ok(true),
        "false" | "False" | "FALSE" => Ok(false),
        _ => Err(format!("{text:?} is not a boolean; write true or false")),
    }
}

fn parse_reject_with(text: &str) -> Result<RejectWith, String> {
    match text {
        "http" => Ok(RejectWith::Http),
        "close" => Ok(RejectWith::Close),
        "reset" => Ok(RejectWith::Reset),
        _ => match text.strip_prefix("file:") {
            Some("") => {
                Err("a path is missing; write it as in `file:/etc/tcpause/answer`".to_owned())
            }
            Some(path) if path.contains(char::is_control) => Err(format!(
                "{text:?} has a control character in it; write `file:` and the path of a file"
            )),
            Some(path) => Ok(RejectWith::File(path.into())),
            None => {
                let hint = nearest(text, ["http", "close", "reset", "file:PATH"])
                    .map_or_else(String::new, |word| format!("; did you mean `{word}`?"));
                Err(format!(
                    "{text:?} is no way to reject; write http, close, reset or file:PATH{hint}"
                ))
            }
        },
    }
}

fn parse_path(text: &str) -> Result<Option<PathBuf>, String> {
    if text.is_empty() {
        return Err("a path is missing; write the path of a PEM file".to_owned());
    }
    if text.contains(char::is_control) {
        return Err(format!(
            "{text:?} has a control character in it; write the path of a PEM file"
        ));
    }
    Ok(Some(text.into()))
}

fn mode_value(mode: u32) -> Value {
    format!("{mode:04o}").into()
}

/// The mode of a socket file, in octal: `0660`, `660` or `0o660`. Read as text, it is not the decimal that YAML may make of it.
fn parse_mode(text: &str) -> Result<u32, String> {
    let digits = text.strip_prefix("0o").unwrap_or(text);
    let mode = match u32::from_str_radix(digits, 8) {
        Ok(mode) if digits.len() >= 3 && !digits.starts_with('+') && mode <= 0o777 => mode,
        _ => {
            return Err(format!(
                "{text:?} is not the mode of a socket; write three octal digits behind a 0, as in `0660`"
            ));
        }
    };
    // Most modes that were turned into decimals by a tool (0660 is 432) end here, too.
    if mode & 0o600 != 0o600 {
        return Err(format!(
            "{text:?} keeps the socket's own user out; write an octal mode that begins with 06 or 07, as in `0660`"
        ));
    }
    Ok(mode)
}

fn parse_threads(text: &str) -> Result<Option<NonZeroUsize>, String> {
    text.parse().map(Some).map_err(|_| {
        format!("{text:?} is not a number of threads; write 1 or more, or leave it away for one thread a core")
    })
}

fn parse_pipes(text: &str) -> Result<Option<usize>, String> {
    text.parse().map(Some).map_err(|_| {
        format!("{text:?} is not a number of pipes; write 0 or more, or leave it away for a share of the open files")
    })
}

fn parse_connections(text: &str) -> Result<Option<NonZeroUsize>, String> {
    text.parse().map(Some).map_err(|_| {
        format!("{text:?} is not a number of connections; write 1 or more, or leave it away for as many as the open files allow")
    })
}

fn parse_held(text: &str) -> Result<Option<NonZeroUsize>, String> {
    text.parse().map(Some).map_err(|_| {
        format!("{text:?} is not a number of held clients; write 1 or more, or leave it away for no bound; to hold nobody, set proxy.reject-clients")
    })
}

fn parse_connecting(text: &str) -> Result<NonZeroUsize, String> {
    text.parse().map_err(|_| {
        format!(
            "{text:?} is not a number of connections; write 1 or more, or leave it away for 128"
        )
    })
}

fn parse_rate(text: &str) -> Result<Option<NonZeroU32>, String> {
    text.parse().map(Some).map_err(|_| {
        format!("{text:?} is not a number of clients in a second; write 1 or more, or leave it away for no bound")
    })
}

fn parse_ips(text: &str) -> Result<Vec<IpAddr>, String> {
    text.split(',')
        .map(str::trim)
        .map(|ip| {
            ip.parse().map_err(|_| {
                format!("{ip:?} is not an IP address; write addresses of this host with commas between them, as in `192.0.2.1,192.0.2.2`")
            })
        })
        .collect()
}

fn parse_hosts(text: &str) -> Result<Vec<String>, String> {
    let is_name = |byte: u8| byte.is_ascii_alphanumeric() || b".-_".contains(&byte);
    text.split(',')
        .map(str::trim)
        .map(|host| match host {
            "" => Err("a host name is missing; write names with commas between them, as in `a.example,b.example`".to_owned()),
            _ if host.bytes().all(is_name) => Ok(host.to_owned()),
            _ => Err(format!("{host:?} is not a host name; write the name alone, without scheme and port")),
        })
        .collect()
}
