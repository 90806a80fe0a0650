//! The operator's side: a plain HTTP client of the control API that sees each byte.

use std::{
    collections::BTreeMap,
    fmt::{self, Debug},
    io::Write,
    thread,
    time::Instant,
};

use serde::Deserialize;
use serde_json::Value;

use super::{Addr, End, GLANCE, PATIENCE, Stream};

/// The control API of one proxy.
#[derive(Debug, Clone)]
pub(crate) struct Control {
    addr: Addr,
}

/// The answer to `GET /status`.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Status {
    pub(crate) version: String,
    pub(crate) uptime_seconds: f64,
    pub(crate) paused: bool,
    pub(crate) paused_since: Option<String>,
    pub(crate) leases: Vec<Lease>,
    pub(crate) held: u64,
    pub(crate) connecting: u64,
    pub(crate) active: u64,
    pub(crate) oldest_seconds: Option<f64>,
    pub(crate) rejecting: u64,
    pub(crate) accepted: u64,
    pub(crate) rejected: u64,
    pub(crate) failed: u64,
    pub(crate) left: u64,
    pub(crate) drained: u64,
    pub(crate) killed: u64,
    pub(crate) bytes_to_upstream: u64,
    pub(crate) bytes_to_client: u64,
    pub(crate) upstream: String,
    pub(crate) threads: usize,
    pub(crate) worker_panics: u64,
    pub(crate) state: String,
    pub(crate) oldest_held_seconds: Option<f64>,
    pub(crate) oldest_connecting_seconds: Option<f64>,
    pub(crate) upstream_up: bool,
    pub(crate) upstream_since: Option<String>,
    pub(crate) upstream_error: Option<String>,
    pub(crate) upstream_addresses: Vec<String>,
    pub(crate) awaiting_upstream: u64,
    pub(crate) connections_max: u64,
    pub(crate) hold_max: Option<u64>,
    pub(crate) listeners: Vec<String>,
    pub(crate) pid: u32,
    pub(crate) config_file: Option<String>,
    pub(crate) closed: BTreeMap<String, u64>,
    pub(crate) upgrades: u64,
    pub(crate) last_upgrade: Option<LastUpgrade>,
}

/// Last upgrade in the status.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct LastUpgrade {
    pub(crate) error: Option<String>,
}

/// Pause in the status.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Lease {
    pub(crate) name: String,
    pub(crate) reason: Option<String>,
    pub(crate) by: String,
    pub(crate) mode: String,
    pub(crate) since: String,
    pub(crate) expires_in_seconds: Option<f64>,
    pub(crate) drain_quiet_seconds: Option<f64>,
    pub(crate) drain_postgres: bool,
}

impl Control {
    pub(crate) fn new(addr: Addr) -> Self {
        Self { addr }
    }

    pub(crate) fn addr(&self) -> &Addr {
        &self.addr
    }

    #[track_caller]
    pub(crate) fn get(&self, target: &str) -> Response {
        self.request("GET", target, &[])
    }

    #[track_caller]
    pub(crate) fn put(&self, target: &str) -> Response {
        self.request("PUT", target, &[])
    }

    #[track_caller]
    pub(crate) fn delete(&self, target: &str) -> Response {
        self.request("DELETE", target, &[])
    }

    /// Sends one request and returns its whole answer.
    #[track_caller]
    pub(crate) fn request(&self, method: &str, target: &str, headers: &[&str]) -> Response {
        Response::read(&mut self.send(method, target, headers))
    }

    /// Sends one request and returns the stream, from which the caller reads the answer.
    #[track_caller]
    pub(crate) fn send(&self, method: &str, target: &str, headers: &[&str]) -> Stream {
        let mut lines = vec![format!("{method} {target} HTTP/1.1"), "Connection: close".to_owned()];
        if !headers.iter().any(|header| header.starts_with("Host:")) {
            lines.push(format!("Host: {}", self.host()));
        }
        lines.extend(headers.iter().map(|&header| header.to_owned()));
        let mut stream = self.addr.connect();
        stream.send(format!("{}\r\n\r\n", lines.join("\r\n")).as_bytes());
        stream
    }

    /// Sends `bytes` as they are and returns all bytes that come back. The other side may close or reset at any moment.
    #[track_caller]
    pub(crate) fn raw(&self, bytes: &[u8]) -> Vec<u8> {
        let mut stream = self.addr.connect();
        drop(stream.write_all(bytes));
        let received = stream.receive_all();
        assert!(matches!(received.end, End::Eof | End::Reset), "{received:?}");
        received.bytes
    }

    /// Returns the status code of a `GET /paused`; `None` without an answer, as when the API is too busy.
    pub(crate) fn probe(&self) -> Option<u16> {
        self.try_get().map(|response| response.status)
    }

    /// Returns the answer to a `GET /paused`; `None` without one.
    pub(crate) fn try_get(&self) -> Option<Response> {
        let mut stream = self.addr.try_connect().ok()?;
        write!(
            stream,
            "GET /paused HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n",
            self.host()
        )
        .ok()?;
        Response::try_parse(&stream.receive_all().bytes)
    }

    /// Returns the `Host` that curl would send.
    pub(crate) fn host(&self) -> String {
        match &self.addr {
            Addr::Tcp(addr) => addr.to_string(),
            Addr::Unix(_) | Addr::Abstract(_) => "localhost".to_owned(),
        }
    }

    #[track_caller]
    pub(crate) fn pause(&self) {
        let response = self.put("/paused");
        assert_eq!(response.status, 201, "{response}");
    }

    #[track_caller]
    pub(crate) fn resume(&self) {
        let response = self.delete("/paused");
        assert_eq!(response.status, 204, "{response}");
    }

    #[track_caller]
    pub(crate) fn wait_idle(&self) {
        let response = self.get("/paused/block-until-idle");
        assert_eq!(response.status, 204, "{response}");
    }

    #[track_caller]
    pub(crate) fn is_paused(&self) -> bool {
        let response = self.get("/paused");
        match response.text() {
            r#"{"paused": true}"# => true,
            r#"{"paused": false}"# => false,
            _ => panic!("{response}"),
        }
    }

    #[track_caller]
    pub(crate) fn status(&self) -> Status {
        let response = self.get("/status");
        assert_eq!(response.status, 200, "{response}");
        serde_json::from_slice(&response.body)
            .unwrap_or_else(|error| panic!("{error} in {response}"))
    }

    /// Waits until the `counts` of the status are as wanted. A worker may publish them a moment after the test sees their cause.
    #[expect(clippy::needless_pass_by_value, reason = "callers write it on the spot")]
    #[track_caller]
    pub(crate) fn wait_counts<T: PartialEq + Debug>(
        &self,
        counts: impl Fn(&Status) -> T,
        wanted: T,
    ) {
        self.wait_status(&format!("the counts are {wanted:?}"), |status| counts(status) == wanted);
    }

    /// Waits until `condition` holds for the status. `what` names the condition in the failure.
    #[track_caller]
    pub(crate) fn wait_status(&self, what: &str, condition: impl Fn(&Status) -> bool) -> Status {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let status = self.status();
            if condition(&status) {
                return status;
            }
            assert!(
                Instant::now() < deadline,
                "in vain: waited until {what}; at last it was {status:?}"
            );
            thread::sleep(GLANCE);
        }
    }
}

/// Whole answer of the API.
#[derive(Debug, Clone)]
pub(crate) struct Response {
    pub(crate) status: u16,
    pub(crate) reason: String,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
}

impl Response {
    /// Reads an answer up to the end of the connection, which must not be a reset.
    #[track_caller]
    pub(crate) fn read(stream: &mut Stream) -> Self {
        let received = stream.receive_all();
        assert_eq!(received.end, End::Eof, "after {:?}", String::from_utf8_lossy(&received.bytes));
        Self::parse(&received.bytes)
    }

    /// Parses an answer. All bytes after the head are the body.
    #[track_caller]
    pub(crate) fn parse(bytes: &[u8]) -> Self {
        Self::try_parse(bytes)
            .unwrap_or_else(|| panic!("no answer: {:?}", String::from_utf8_lossy(bytes)))
    }

    pub(crate) fn try_parse(bytes: &[u8]) -> Option<Self> {
        let head_end = bytes.windows(4).position(|window| window == b"\r\n\r\n")?;
        let head = std::str::from_utf8(&bytes[..head_end]).ok()?;
        let mut lines = head.split("\r\n");
        let mut status_line = lines.next()?.splitn(3, ' ');
        if status_line.next()? != "HTTP/1.1" {
            return None;
        }
        let status = status_line.next()?.parse().ok()?;
        let reason = status_line.next()?.to_owned();
        let headers = lines
            .map(|line| {
                line.split_once(':').map(|(name, value)| (name.to_owned(), value.trim().to_owned()))
            })
            .collect::<Option<_>>()?;
        Some(Self { status, reason, headers, body: bytes[head_end + 4..].to_vec() })
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(key, _)| key.eq_ignore_ascii_case(name))
            .map(|(_, value)| value.as_str())
    }

    #[track_caller]
    pub(crate) fn text(&self) -> &str {
        std::str::from_utf8(&self.body).expect("text")
    }

    /// Checks that it is an error in the API's form, JSON with a sentence and the status. Returns the sentence.
    #[track_caller]
    pub(crate) fn assert_error(&self, status: u16) -> String {
        assert_eq!(self.status, status, "{self}");
        assert_eq!(self.header("Content-Type"), Some("application/json"), "{self}");
        let body: Value =
            serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error} in {self}"));
        assert_eq!(body["status"], status, "{self}");
        let sentence = body["error"].as_str().unwrap_or_else(|| panic!("no sentence in {self}"));
        assert!(sentence.len() > 10, "this helps nobody: {self}");
        sentence.to_owned()
    }
}

impl fmt::Display for Response {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} {} {:?} {:?}",
            self.status,
            self.reason,
            self.headers,
            String::from_utf8_lossy(&self.body)
        )
    }
}
