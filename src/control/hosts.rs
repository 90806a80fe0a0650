//! Hosts that requests may name: a foreign name may be the work of a web page.

use std::{
    collections::HashSet,
    net::{Ipv4Addr, Ipv6Addr},
};

use crate::config::address::Address;

/// Policy on `Host` headers. Allowed are IP literals, `localhost` and names below it, the hosts that the API listens on, this
/// machine's own name with and without its domain, and `control.hosts`; an empty one names no host and is allowed too.
#[derive(Debug, Clone)]
pub(crate) struct HostPolicy {
    names: HashSet<String>,
}

impl HostPolicy {
    /// Allows the hosts of `listeners` and `hosts`, besides those that are always allowed.
    pub(crate) fn new<'a>(
        listeners: impl IntoIterator<Item = &'a Address>,
        hosts: &[String],
    ) -> Self {
        let machine = rustix::system::uname().nodename().to_string_lossy().into_owned();
        let mut names = vec![machine.split('.').next().unwrap_or_default().to_owned(), machine];
        for address in listeners {
            if let Address::Tcp { host, .. } = address {
                names.push(host.clone());
            }
        }
        names.extend(hosts.iter().cloned());
        Self {
            names: names.iter().map(|name| normal(name)).filter(|name| !name.is_empty()).collect(),
        }
    }

    /// Returns true if a request may name this host, with or without a port.
    pub(super) fn allow(&self, authority: &[u8]) -> bool {
        let Ok(authority) = std::str::from_utf8(authority) else { return false };
        if let Some(literal) = authority.strip_prefix('[') {
            return literal.split_once(']').is_some_and(|(address, port)| {
                let address = address.split('%').next().unwrap_or_default();
                address.parse::<Ipv6Addr>().is_ok()
                    && (port.is_empty() || port.strip_prefix(':').is_some_and(is_port))
            });
        }
        let (host, port) = authority.split_once(':').unwrap_or((authority, ""));
        let host = normal(host);
        is_port(port)
            && (host.is_empty()
                || host == "localhost"
                || host.ends_with(".localhost")
                || host.parse::<Ipv4Addr>().is_ok()
                || self.names.contains(&host))
    }
}

fn is_port(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_digit())
}

/// Returns a name in small letters and without the root's dot, as names are compared.
fn normal(name: &str) -> String {
    name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_ours_or_foreign() {
        let listeners =
            [Address::tcp("Control.Example", 3001), Address::tcp("monitor.example", 9100)];
        let policy = HostPolicy::new(&listeners, &["lb.example.".to_owned()]);
        let machine = rustix::system::uname().nodename().to_str().unwrap().to_owned();
        let ours = [
            "localhost",
            "LocalHost:3001",
            "db.localhost",
            "127.0.0.1",
            "10.1.2.3:80",
            "[::1]:3001",
            "[fe80::1%25eth0]",
            "[::1]",
            "[::ffff:127.0.0.1]:3001",
        ];
        let named = [
            "control.example:3001",
            "Monitor.example:9100",
            "lb.example",
            "LB.EXAMPLE.",
            "",
            machine.as_str(),
        ];
        for host in ours.iter().chain(&named) {
            assert!(policy.allow(host.as_bytes()), "{host}");
        }
        let foreign = [
            "evil.example",
            "localhost.evil.example",
            "notlocalhost",
            "127.0.0.1.evil.example",
            "[::1",
            "[x]",
            "::1",
        ];
        let odd = [
            "localhost:80:80",
            "localhost:x",
            "a@localhost",
            "127.1",
            "0x7f.1",
            "localhost ",
            "[::1]x",
            "[::1]:x",
        ];
        for host in foreign.iter().chain(&odd) {
            assert!(!policy.allow(host.as_bytes()), "{host}");
        }
        assert!(!policy.allow(b"\xff"));
    }
}
