//! Addresses to listen at or to dial.

use std::{
    fmt, io,
    net::{Ipv6Addr, SocketAddr, ToSocketAddrs},
    path::{Path, PathBuf},
    str::FromStr,
};

/// The longest path or name of a UNIX socket, in bytes: the kernel's 108 less the NUL at the end, or at the beginning.
const UNIX_PATH_BYTES_MAX: usize = 107;
/// The longest host name, in bytes, as DNS has it.
const HOST_BYTES_MAX: usize = 253;

/// Address as the operator writes it. Its host name is looked up later.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// `tcp://host:port` or `host:port`. An empty host means all interfaces.
    Tcp {
        /// A name or an IP literal, without brackets; an IPv6 literal may end in `%zone`.
        host: String,
        /// 0 lets the system choose (listeners only).
        port: u16,
    },
    /// `unix:///absolute/path`.
    Unix(PathBuf),
    /// `unix://@name`: a UNIX socket without a file. Every user in the network namespace may connect.
    Abstract(String),
}

impl Address {
    /// Returns the TCP address `host:port`. An IPv4 address in the notation of IPv6 (`::ffff:192.0.2.1`) becomes plain IPv4.
    pub fn tcp(host: impl Into<String>, port: u16) -> Self {
        let host = host.into();
        let mapped = host.parse::<Ipv6Addr>().ok().and_then(|ip| ip.to_ipv4_mapped());
        Self::Tcp { host: mapped.map_or(host, |ip| ip.to_string()), port }
    }

    /// Reads the address of a server, where a port alone cannot be that of all interfaces. The error shows the right form.
    pub fn of_server(text: &str) -> Result<Self, String> {
        if let Ok(port) = text.parse::<u16>() {
            return Err(format!("{text:?} is only a number; did you mean `localhost:{port}`?"));
        }
        let address: Self = text.parse()?;
        address.check_dialled().map(|()| address)
    }

    /// Checks that a server can listen there. The error shows the right form.
    pub(crate) fn check_dialled(&self) -> Result<(), String> {
        match self {
            Self::Tcp { port: 0, .. } => {
                Err(format!("{self} has port 0; write the port that the upstream listens on"))
            }
            Self::Tcp { host, port } if host.is_empty() => {
                Err(format!("{self} names no host; did you mean `localhost:{port}`?"))
            }
            _ => Ok(()),
        }
    }
}

/// Asks the system for the addresses of a host, which may take long.
pub(crate) fn look_up(host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
    let canonical = |found: SocketAddr| match found.ip().to_canonical() {
        ip if ip.is_ipv4() => SocketAddr::new(ip, port),
        _ => found,
    };
    Ok((host, port).to_socket_addrs()?.map(canonical).collect())
}

impl FromStr for Address {
    type Err = String;

    /// Reads an address. The error names the text and shows the right form.
    fn from_str(text: &str) -> Result<Self, String> {
        if text.is_empty() {
            return Err(format!("an address is missing; {FORMS}"));
        }
        if text.chars().any(char::is_control) || text.trim() != text {
            return Err(format!("{text:?} has white space or a control character in it; {FORMS}"));
        }
        if text.starts_with('/') {
            return Err(format!(
                "{text:?} is a path, not an address; did you mean `unix://{text}`?"
            ));
        }
        if text.starts_with('@') {
            return Err(format!("{text:?} lacks its scheme; did you mean `unix://{text}`?"));
        }
        match text.split_once("://") {
            Some(("tcp", rest)) => parse_tcp(text, rest),
            Some(("unix", path)) => parse_unix(text, path),
            Some((scheme, _)) => {
                Err(format!("{text:?} has the unknown scheme {scheme:?}; {FORMS}"))
            }
            None => match text.strip_prefix("unix:") {
                Some(path) => Err(format!(
                    "{text:?} lacks slashes; did you mean `unix://{}`?",
                    absolute(path)
                )),
                None => parse_tcp(text, text),
            },
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "tcp://[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "tcp://{host}:{port}"),
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
            Self::Abstract(name) => write!(f, "unix://@{name}"),
        }
    }
}

/// The remedy of most errors.
const FORMS: &str =
    "write `host:port`, `:port`, `[ipv6]:port`, `unix:///absolute/path` or `unix://@name`";

fn parse_unix(text: &str, path: &str) -> Result<Address, String> {
    if path.is_empty() {
        return Err(format!(
            "{text:?} lacks the path of the socket; write `unix:///absolute/path`"
        ));
    }
    if let Some(name) = path.strip_prefix('@') {
        if name.is_empty() {
            return Err(format!("{text:?} lacks the name behind the `@`; write `unix://@name`"));
        }
        check_length(text, "name", name)?;
        return Ok(Address::Abstract(name.to_owned()));
    }
    if !path.starts_with('/') {
        return Err(format!(
            "{text:?} has a relative path; did you mean `unix://{}`?",
            absolute(path)
        ));
    }
    if path.ends_with('/') || Path::new(path).file_name().is_none() {
        return Err(format!(
            "{text:?} names a directory; write the path of a socket file, as in `unix:///run/tcpause.sock`"
        ));
    }
    check_length(text, "path", path)?;
    Ok(Address::Unix(path.into()))
}

fn check_length(text: &str, what: &str, path: &str) -> Result<(), String> {
    let length = path.len();
    if length > UNIX_PATH_BYTES_MAX {
        return Err(format!(
            "{text:?} has a {what} of {length} bytes; the system allows {UNIX_PATH_BYTES_MAX}: choose a shorter one"
        ));
    }
    Ok(())
}

/// Guesses the absolute path for a relative one. It is shown and not used, as only the operator knows the right path.
fn absolute(path: &str) -> String {
    if path.starts_with('@') {
        return path.to_owned();
    }
    format!("/{}", path.trim_start_matches(['.', '/']))
}

fn parse_tcp(text: &str, rest: &str) -> Result<Address, String> {
    if rest.contains(char::is_whitespace) {
        return Err(format!("{text:?} has white space in it; {FORMS}"));
    }
    if rest.contains('@') {
        return Err(format!("{text:?} has user information in it; nobody logs in here: {FORMS}"));
    }
    if rest.contains(['/', '?', '#']) {
        return Err(format!("{text:?} has something after the port; {FORMS}"));
    }
    let (host, port) = match rest.strip_prefix('[') {
        Some(inner) => {
            let (literal, after) =
                inner.split_once(']').ok_or_else(|| format!("{text:?} lacks a `]`; {FORMS}"))?;
            check_v6(text, literal)?;
            (literal, after.strip_prefix(':').ok_or_else(|| no_port(text))?)
        }
        None => rest.rsplit_once(':').ok_or_else(|| no_port(text))?,
    };
    if !rest.starts_with('[') {
        check_host(text, host)?;
    }
    if port.is_empty() {
        return Err(no_port(text));
    }
    let number =
        if port.bytes().all(|byte| byte.is_ascii_digit()) { port.parse().ok() } else { None };
    let port = number.ok_or_else(|| {
        format!("{text:?} has the port {port:?}; a port is a number from 0 to 65535")
    })?;
    // Names do not differ by case; the zone of an IPv6 address does.
    let host = if host.contains(':') { host.to_owned() } else { host.to_ascii_lowercase() };
    Ok(Address::tcp(host, port))
}

fn no_port(text: &str) -> String {
    match text.parse::<u16>() {
        Ok(port) => format!("{text:?} is only a number; did you mean `:{port}`?"),
        Err(_) => format!("{text:?} lacks a port; {FORMS}"),
    }
}

fn check_v6(text: &str, literal: &str) -> Result<(), String> {
    let (ip, zone) = literal.split_once('%').map_or((literal, None), |(ip, zone)| (ip, Some(zone)));
    let is_link_local = |ip: Ipv6Addr| ip.is_unicast_link_local();
    if zone.is_none() && ip.parse().is_ok_and(is_link_local) {
        return Err(format!(
            "{text:?} is link-local and lacks its interface; write it behind the address, as in `[{ip}%eth0]:port`"
        ));
    }
    let is_name = |zone: &str| !zone.is_empty() && !zone.contains(['%', '[', ']', ':']);
    if ip.parse::<Ipv6Addr>().is_err() || !zone.is_none_or(is_name) {
        return Err(format!(
            "{text:?} has no IPv6 address between its brackets; write `[::1]:port` or `[fe80::1%eth0]:port`"
        ));
    }
    Ok(())
}

fn check_host(text: &str, host: &str) -> Result<(), String> {
    if host == "*" {
        return Err(format!(
            "{text:?} has `*` for a host; leave the host away for all interfaces: `:port`"
        ));
    }
    if host.contains(':') {
        return Err(format!(
            "{text:?} has more than one colon; an IPv6 address needs brackets, as in `[::1]:3000`"
        ));
    }
    if host.len() > HOST_BYTES_MAX
        || !host.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".-_".contains(&byte))
    {
        return Err(format!(
            "{text:?} has the host {host:?}, which is neither a name nor an IP address; {FORMS}"
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_every_form_and_shows_it_so_that_it_reads_the_same() {
        for (text, expected) in [
            ("localhost:3000", Address::tcp("localhost", 3000)),
            ("tcp://localhost:3000", Address::tcp("localhost", 3000)),
            ("127.0.0.1:0", Address::tcp("127.0.0.1", 0)),
            (":3000", Address::tcp("", 3000)),
            ("tcp://:65535", Address::tcp("", 65_535)),
            ("db_1.example.org.:5432", Address::tcp("db_1.example.org.", 5432)),
            ("[::1]:80", Address::tcp("::1", 80)),
            ("tcp://[::]:80", Address::tcp("::", 80)),
            ("[::ffff:127.0.0.1]:80", Address::Tcp { host: "127.0.0.1".into(), port: 80 }),
            ("[::FFFF:7f00:1]:80", Address::Tcp { host: "127.0.0.1".into(), port: 80 }),
            ("[::127.0.0.1]:80", Address::Tcp { host: "::127.0.0.1".into(), port: 80 }),
            ("[fe80::1%eth0]:80", Address::tcp("fe80::1%eth0", 80)),
            ("[::ffff:127.0.0.1]:80", Address::tcp("::ffff:127.0.0.1", 80)),
            ("unix:///run/tcpause.sock", Address::Unix("/run/tcpause.sock".into())),
            ("unix:///run/my app/ä.sock", Address::Unix("/run/my app/ä.sock".into())),
            ("unix:///@app", Address::Unix("/@app".into())),
            ("unix://@app/1", Address::Abstract("app/1".into())),
            ("unix://@@", Address::Abstract("@".into())),
        ] {
            let address: Address = text.parse().expect(text);
            assert_eq!(address, expected);
            assert_eq!(address.to_string().parse(), Ok(expected), "{address}");
        }
    }

    #[test]
    fn a_server_has_a_host_and_a_port() {
        for (text, part) in [
            ("3000", "did you mean `localhost:3000`?"),
            (":3000", "did you mean `localhost:3000`?"),
            ("localhost:0", "has port 0"),
            ("localhost", "lacks a port"),
        ] {
            let error = Address::of_server(text).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
        assert_eq!(Address::of_server("a:1"), Ok(Address::tcp("a", 1)));
    }

    #[test]
    fn an_ipv4_address_is_found_as_one() {
        for (host, expected) in [
            ("127.0.0.1", "127.0.0.1:80"),
            ("::ffff:127.0.0.1", "127.0.0.1:80"),
            ("::1", "[::1]:80"),
        ] {
            assert_eq!(look_up(host, 80).unwrap(), [expected.parse().unwrap()]);
        }
    }

    #[test]
    fn refuses_what_is_wrong_and_shows_the_right_form() {
        for (text, part) in [
            ("", "an address is missing"),
            ("localhost", "lacks a port"),
            ("tcp://localhost", "lacks a port"),
            ("localhost:", "lacks a port"),
            (":", "lacks a port"),
            ("[::1]", "lacks a port"),
            ("[::1]80", "lacks a port"),
            ("[::1]:", "lacks a port"),
            ("3000", "did you mean `:3000`?"),
            ("localhost:http", "has the port \"http\""),
            ("localhost:-1", "has the port \"-1\""),
            ("localhost:+80", "has the port \"+80\""),
            ("localhost:65536", "a port is a number from 0 to 65535"),
            ("localhost:99999999999999999999", "a port is a number"),
            ("http://localhost:80", "unknown scheme \"http\""),
            ("udp://localhost:80", "unknown scheme \"udp\""),
            ("TCP://localhost:80", "unknown scheme \"TCP\""),
            ("://localhost:80", "unknown scheme \"\""),
            ("me@localhost:80", "user information"),
            ("tcp://me:secret@localhost:80", "user information"),
            ("localhost:80/", "after the port"),
            ("tcp://localhost:80/path", "after the port"),
            ("localhost:80?x", "after the port"),
            ("local host:80", "white space"),
            (" localhost:80", "white space"),
            ("localhost:80\n", "white space or a control character"),
            ("localhost:80\0", "control character"),
            ("unix:///run/a\nb", "control character"),
            ("::1:80", "`[::1]:3000`"),
            ("::1", "`[::1]:3000`"),
            ("fe80::1%eth0:80", "`[::1]:3000`"),
            ("a:b:80", "more than one colon"),
            ("[localhost]:80", "no IPv6 address"),
            ("[127.0.0.1]:80", "no IPv6 address"),
            ("[]:80", "no IPv6 address"),
            ("[::1%]:80", "no IPv6 address"),
            ("[::1%a%b]:80", "no IPv6 address"),
            (
                "[fe80::1]:80",
                "lacks its interface; write it behind the address, as in `[fe80::1%eth0]:port`",
            ),
            ("tcp://[febf::1]:80", "is link-local and lacks its interface"),
            ("[::1:80", "lacks a `]`"),
            ("*:80", "`:port`"),
            ("exämple.org:80", "neither a name nor an IP address"),
            ("a]:80", "neither a name nor an IP address"),
            ("/run/tcpause.sock", "did you mean `unix:///run/tcpause.sock`?"),
            ("unix:/run/tcpause.sock", "did you mean `unix:///run/tcpause.sock`?"),
            ("unix:tcpause.sock", "did you mean `unix:///tcpause.sock`?"),
            ("unix://", "lacks the path"),
            ("unix://@", "lacks the name behind the `@`"),
            ("@app", "did you mean `unix://@app`?"),
            ("unix:@app", "did you mean `unix://@app`?"),
            ("unix://run/tcpause.sock", "did you mean `unix:///run/tcpause.sock`?"),
            ("unix://./tcpause.sock", "has a relative path"),
            ("unix:///", "names a directory"),
            ("unix:///run/", "names a directory"),
            ("unix:///run/..", "names a directory"),
        ] {
            let error = text.parse::<Address>().expect_err(text);
            assert!(error.contains(part), "{text:?}: {error}");
            assert!(
                error.contains(&format!("{text:?}")) || text.is_empty(),
                "{text:?} is not named: {error}"
            );
            assert!(!error.contains(char::is_control), "{error:?}");
        }
    }

    #[test]
    fn long_names_have_a_limit() {
        let path = |length: usize| format!("unix:///{}", "a".repeat(length - 1));
        assert!(path(UNIX_PATH_BYTES_MAX).parse::<Address>().is_ok());
        let error = path(UNIX_PATH_BYTES_MAX + 1).parse::<Address>().unwrap_err();
        assert!(error.contains("has a path of 108 bytes; the system allows 107:"), "{error}");
        let name = |length: usize| format!("unix://@{}", "a".repeat(length));
        assert!(name(UNIX_PATH_BYTES_MAX).parse::<Address>().is_ok());
        let error = name(UNIX_PATH_BYTES_MAX + 1).parse::<Address>().unwrap_err();
        assert!(error.contains("has a name of 108 bytes; the system allows 107:"), "{error}");
        assert!(format!("{}:80", "a".repeat(HOST_BYTES_MAX)).parse::<Address>().is_ok());
        assert!(format!("{}:80", "a".repeat(HOST_BYTES_MAX + 1)).parse::<Address>().is_err());
    }
}
