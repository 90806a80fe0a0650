//! A small HTTP client of the control API: one request on a connection of its own.

use std::{
    fmt::Write as _,
    io,
    net::{TcpStream, ToSocketAddrs},
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use rustix::{
    io::{Errno, retry_on_intr},
    net::{
        AddressFamily, RecvFlags, SendFlags, Shutdown, SocketAddrUnix, SocketFlags, SocketType,
        shutdown,
        sockopt::{self, Timeout},
    },
};
use serde_json::Value;
use tcpause::Address;

use super::Failure;

/// Longest time to connect to one address.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest time for an answer, beyond the time that the API was asked to wait.
pub(super) const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest answer that is read; 64 pauses with their reasons are a small part of it.
const ANSWER_BYTES_MAX: usize = 1 << 20;
const READ_BYTES: usize = 4 << 10;
const HEADERS_MAX: usize = 64;

/// The control API of a proxy.
#[derive(Debug, Clone)]
pub(crate) struct Api {
    address: Address,
}

/// Answer of the API.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) body: Vec<u8>,
    /// Bytes behind the first line that have come with it, for [`Ending::Line`].
    pub(super) rest: Vec<u8>,
}

impl Answer {
    /// Returns the body as JSON; null if it is not JSON.
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_default()
    }

    /// Checks that a pause with a wait has waited: the original ignores parameters, and pauses at once.
    pub(super) fn check_idle(&self) -> Result<(), Failure> {
        if self.json().get("idle") == Some(&Value::Bool(true)) {
            return Ok(());
        }
        Err(Failure::Other(
            "the proxy has paused without a wait, as the original does: lift that with tcpause resume"
                .to_owned(),
        ))
    }
}

impl Api {
    pub(crate) fn new(address: Address) -> Self {
        Self { address }
    }

    /// Makes a request and reads its answer, for [`ANSWER_TIMEOUT`] beyond `wait`.
    pub(crate) fn ask(
        &self,
        method: &str,
        target: &str,
        wait: Option<Duration>,
    ) -> Result<Answer, Failure> {
        let connection = self.connect()?;
        self.send(&connection, method, target)?;
        self.answer(&connection, wait, Ending::Whole)
    }

    /// Connects to the first address of the name that accepts a connection.
    pub(super) fn connect(&self) -> Result<Connection, Failure> {
        let socket = match &self.address {
            Address::Tcp { host, port } => connect_tcp(listening(host), *port),
            Address::Unix(path) => {
                SocketAddrUnix::new(path).and_then(|addr| connect_unix(&addr)).map_err(Into::into)
            }
            Address::Abstract(name) => SocketAddrUnix::new_abstract_name(name.as_bytes())
                .and_then(|addr| connect_unix(&addr))
                .map_err(Into::into),
        };
        socket.map(Connection).map_err(|error| self.unreachable(&error))
    }

    pub(super) fn send(
        &self,
        connection: &Connection,
        method: &str,
        target: &str,
    ) -> Result<(), Failure> {
        let host = self.host();
        let request =
            format!("{method} {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
        connection.send(request.as_bytes()).map_err(|error| self.unreachable(&error.into()))
    }

    /// Reads the answer, for [`ANSWER_TIMEOUT`] beyond the time that the API was asked to wait.
    pub(super) fn answer(
        &self,
        connection: &Connection,
        wait: Option<Duration>,
        ending: Ending,
    ) -> Result<Answer, Failure> {
        let patience = ANSWER_TIMEOUT.saturating_add(wait.unwrap_or_default());
        let deadline = Instant::now().checked_add(patience);
        let mut bytes = Vec::new();
        loop {
            let is_over = match connection.receive(&mut bytes, deadline) {
                Ok(count) => count == 0,
                Err(Errno::AGAIN) => return Err(self.silent("takes too long to answer")),
                Err(error) if bytes.is_empty() => return Err(self.unreachable(&error.into())),
                Err(_) => true,
            };
            match parse(&bytes, ending, is_over).map_err(|what| self.odd(what))? {
                Some(answer) => return Ok(answer),
                None if !is_over => {}
                None if bytes.is_empty() => return Err(self.silent("gives no answer")),
                None => return Err(self.odd("an answer that is cut")),
            }
        }
    }

    /// Returns the `Host` that curl would send, without the zone of an IPv6 address, which has a meaning on this host only.
    fn host(&self) -> String {
        match &self.address {
            Address::Tcp { host, port } => {
                let host = listening(host).split('%').next().unwrap_or_default();
                if host.contains(':') {
                    format!("[{host}]:{port}")
                } else {
                    format!("{host}:{port}")
                }
            }
            Address::Unix(_) | Address::Abstract(_) => "localhost".to_owned(),
        }
    }

    fn name(&self) -> String {
        format!("the control API at {}", self.address)
    }

    pub(super) fn silent(&self, what: &str) -> Failure {
        Failure::Unreachable(format!(
            "{} {what}; see whether the proxy still runs, or whether this is its address",
            self.name()
        ))
    }

    fn odd(&self, what: &str) -> Failure {
        self.stranger(&format!("sent {what}"))
    }

    /// Returns the failure for an answer that is not tcpause's.
    pub(super) fn stranger(&self, what: &str) -> Failure {
        Failure::Unreachable(format!(
            "{} is not the control API of a tcpause (it {what}); is it the proxy's own address?",
            self.address
        ))
    }

    fn unreachable(&self, error: &io::Error) -> Failure {
        let remedy = match error.kind() {
            io::ErrorKind::PermissionDenied => {
                "let this user write to its file, or be the one that runs the proxy"
            }
            _ => "start the proxy, or name its address with --control-addr",
        };
        Failure::Unreachable(format!("cannot reach {}: {error}; {remedy}", self.name()))
    }
}

/// The end of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ending {
    /// End that the head or the connection tells.
    Whole,
    /// End of the first line, if the head tells none, for an answer whose connection stays open.
    Line,
}

/// One connection to the API.
#[derive(Debug)]
pub(super) struct Connection(OwnedFd);

impl Connection {
    pub(super) fn send(&self, mut bytes: &[u8]) -> Result<(), Errno> {
        while !bytes.is_empty() {
            let count = retry_on_intr(|| rustix::net::send(&self.0, bytes, SendFlags::NOSIGNAL))?;
            bytes = bytes.get(count..).unwrap_or_default();
        }
        Ok(())
    }

    /// Ends the stream to the other side, by which the API sees that the caller is done.
    pub(super) fn end(&self) {
        // An error means that the connection has ended.
        let _ = shutdown(&self.0, Shutdown::Write);
    }

    /// Waits until the connection ends. Hands each line on that comes until then, from `bytes` that have come already on;
    /// one that is too long ends it, too.
    pub(super) fn lines_to_end(&self, mut bytes: Vec<u8>, mut take: impl FnMut(&[u8])) {
        loop {
            while let Some(end) = bytes.iter().position(|byte| *byte == b'\n') {
                take(bytes.get(..end).unwrap_or_default());
                bytes.drain(..=end);
            }
            let is_short = bytes.len() < ANSWER_BYTES_MAX;
            if !is_short || !self.receive(&mut bytes, None).is_ok_and(|count| count > 0) {
                return;
            }
        }
    }

    /// Appends the next bytes and returns their number. Zero is the end of the stream; the error `AGAIN` is the deadline.
    fn receive(&self, bytes: &mut Vec<u8>, deadline: Option<Instant>) -> Result<usize, Errno> {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        if left.is_some_and(|left| left.is_zero()) {
            return Err(Errno::AGAIN);
        }
        sockopt::set_socket_timeout(&self.0, Timeout::Recv, left)?;
        let mut buffer = [0; READ_BYTES];
        let (count, _) =
            retry_on_intr(|| rustix::net::recv(&self.0, &mut buffer[..], RecvFlags::empty()))?;
        bytes.extend_from_slice(buffer.get(..count).unwrap_or_default());
        Ok(count)
    }
}

/// Returns a request's target. Only values are encoded, as the names of parameters are our own.
pub(super) fn target(path: &str, parameters: &[(&str, &str)]) -> String {
    let mut target = path.to_owned();
    for (index, (name, value)) in parameters.iter().enumerate() {
        target.push(if index == 0 { '?' } else { '&' });
        target.push_str(name);
        target.push('=');
        for byte in value.bytes() {
            match byte {
                b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                    target.push(char::from(byte));
                }
                _ => drop(write!(target, "%{byte:02X}")),
            }
        }
    }
    target
}

/// Returns the host to connect to: the loopback for an API on all interfaces.
fn listening(host: &str) -> &str {
    if host.is_empty() { "localhost" } else { host }
}

fn connect_tcp(host: &str, port: u16) -> io::Result<OwnedFd> {
    let mut result = Err(io::Error::new(io::ErrorKind::NotFound, "the name has no address"));
    for addr in (host, port).to_socket_addrs()? {
        result = TcpStream::connect_timeout(&addr, CONNECT_TIMEOUT);
        if result.is_ok() {
            break;
        }
    }
    let stream = result?;
    stream.set_nodelay(true)?;
    stream.set_write_timeout(Some(ANSWER_TIMEOUT))?;
    Ok(stream.into())
}

/// Connects within a time; the standard library's connect would wait for ever on a full backlog.
fn connect_unix(addr: &SocketAddrUnix) -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    sockopt::set_socket_timeout(&socket, Timeout::Send, Some(CONNECT_TIMEOUT))?;
    rustix::net::connect(&socket, addr)?;
    Ok(socket)
}

/// Parses the bytes of an answer so far. Returns `None` if bytes are missing. `is_over` tells that the stream has ended.
fn parse(bytes: &[u8], ending: Ending, is_over: bool) -> Result<Option<Answer>, &'static str> {
    if bytes.len() > ANSWER_BYTES_MAX {
        return Err("an answer that does not end");
    }
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut head = httparse::Response::new(&mut headers);
    let httparse::Status::Complete(start) = head.parse(bytes).map_err(|_| "what is no HTTP")?
    else {
        return Ok(None);
    };
    let status = head.code.unwrap_or_default();
    let body = bytes.get(start..).unwrap_or_default();
    let length =
        head.headers.iter().find(|header| header.name.eq_ignore_ascii_case("Content-Length"));
    let length = match length {
        Some(header) => {
            let text = std::str::from_utf8(header.value).unwrap_or_default();
            Some(text.parse::<usize>().map_err(|_| "a wrong Content-Length")?)
        }
        None => None,
    };
    let line = body.iter().position(|byte| *byte == b'\n').map(|end| end + 1);
    let end = match (length, line) {
        _ if status == 204 => Some(0),
        (Some(length), _) => Some(length),
        (None, Some(line)) if ending == Ending::Line => Some(line),
        (None, _) => Some(body.len()).filter(|_| is_over),
    };
    let parts = end.and_then(|end| body.split_at_checked(end));
    Ok(parts.map(|(body, rest)| Answer { status, body: body.to_vec(), rest: rest.to_vec() }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_encoded() {
        assert_eq!(target("/paused", &[]), "/paused");
        assert_eq!(
            target("/paused", &[("name", "a-b_c.d~1"), ("reason", "\u{e4} &=+%?#\"\n")]),
            "/paused?name=a-b_c.d~1&reason=%C3%A4%20%26%3D%2B%25%3F%23%22%0A"
        );
    }

    #[test]
    fn the_host_is_what_curl_would_send() {
        for (address, host) in [
            ("localhost:3001", "localhost:3001"),
            (":3001", "localhost:3001"),
            ("[::1]:3001", "[::1]:3001"),
            ("[fe80::1%eth0]:3001", "[fe80::1]:3001"),
            ("unix:///c", "localhost"),
            ("unix://@c", "localhost"),
        ] {
            assert_eq!(Api::new(address.parse().unwrap()).host(), host);
        }
    }

    /// An answer is complete at the same byte, and not before, for every way in which it may arrive.
    #[test]
    fn an_answer_ends_where_it_says() {
        let parse = |bytes: &[u8], ending, is_over| {
            let answer = super::parse(bytes, ending, is_over)?;
            Ok::<_, &str>(answer.map(|it| (it.status, String::from_utf8(it.body).unwrap())))
        };
        let whole = |status, body: &str| Some((status, body.to_owned()));
        for (bytes, ending, least, answer) in [
            (
                "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nabc",
                Ending::Whole,
                40,
                whole(200, "ab"),
            ),
            ("HTTP/1.1 204 No Content\r\n\r\n", Ending::Whole, 27, whole(204, "")),
            ("HTTP/1.1 201 Created\r\nA: b\r\n\r\n{}\n", Ending::Line, 33, whole(201, "{}\n")),
            (
                "HTTP/1.1 504 T\r\nContent-Length: 3\r\n\r\n{}\n",
                Ending::Line,
                40,
                whole(504, "{}\n"),
            ),
            ("HTTP/1.1 201 C\r\nA: b\r\n\r\n{}\n{", Ending::Line, 27, whole(201, "{}\n")),
        ] {
            for length in 0..=bytes.len() {
                let found = parse(&bytes.as_bytes()[..length], ending, false).unwrap();
                assert_eq!(found, answer.clone().filter(|_| length >= least), "{bytes:?} {length}");
            }
        }
        let open = b"HTTP/1.1 200 OK\r\n\r\nab";
        assert_eq!(parse(open, Ending::Whole, false), Ok(None));
        assert_eq!(parse(open, Ending::Whole, true), Ok(whole(200, "ab")));
        let cut = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nab";
        assert_eq!(parse(cut, Ending::Whole, true), Ok(None));
        for odd in [&b"SSH-2.0-x\r\n"[..], b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n"] {
            assert!(parse(odd, Ending::Whole, false).is_err());
        }
        assert!(parse(&vec![b'a'; ANSWER_BYTES_MAX + 1], Ending::Whole, false).is_err());
    }

    /// A loss that comes with the answer in one segment is told as one that comes alone.
    #[test]
    fn lines_behind_the_first_are_handed_on() {
        let bytes = b"HTTP/1.1 201 C\r\n\r\n{\"idle\": true}\n{\"lost\": true}\n{\"lo";
        let answer = parse(bytes, Ending::Line, false).unwrap().unwrap();
        answer.check_idle().unwrap();
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        Connection(theirs.into()).send(b"st\": false}\ncut").unwrap();
        let mut lines = Vec::new();
        Connection(ours.into()).lines_to_end(answer.rest, |line| {
            lines.push(String::from_utf8_lossy(line).into_owned());
        });
        assert_eq!(lines, ["{\"lost\": true}", "{\"lost\": false}"]);
    }
}
