//! `Response`: what a caller of the control API gets, and how it is written on the wire.

use std::{fmt, time::Duration};

use tiny_http::StatusCode;

use super::query::{OnTimeout, Wait};
use crate::config::duration::nanos;

/// The name of the header by which the private server has the front go on before it answers.
const HOLD_HEADER: &str = "X-Hold";

/// A status with an optional JSON body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Response {
    pub(super) status: u16,
    /// JSON, or empty for an answer without a body.
    pub(super) body: String,
    /// The name and value of a header that this answer needs besides the usual ones.
    pub(super) header: Option<(&'static str, String)>,
}

impl Response {
    pub(super) fn empty(status: u16) -> Self {
        Self { status, body: String::new(), header: None }
    }

    pub(super) fn json(body: String) -> Self {
        Self { status: 200, body, header: None }
    }

    /// `text` is a sentence that tells the caller what to do.
    pub(super) fn error(status: u16, text: &str) -> Self {
        let text = serde_json::Value::from(text);
        // The end of the line is for those who read it on a terminal.
        let body = format!("{{\"error\": {text}, \"status\": {status}}}\n");
        Self { status, body, header: None }
    }

    pub(super) fn with_header(self, name: &'static str, value: String) -> Self {
        Self { header: Some((name, value)), ..self }
    }

    /// Has the front give it once the proxy is idle, or another one when `timeout` is over; none is five centuries.
    pub(super) fn when_idle(self, timeout: Option<Duration>) -> Self {
        let time = timeout.unwrap_or(Duration::from_nanos(u64::MAX));
        self.with_header(HOLD_HEADER, Deferred::Idle(time).to_string())
    }

    /// Has the front answer for the pause that has begun.
    pub(super) fn for_pause(self, wait: Option<Wait>, is_tied: bool) -> Self {
        self.with_header(HOLD_HEADER, Deferred::Pause { wait, is_tied }.to_string())
    }

    /// The bytes that the front writes when it answers by itself.
    pub(super) fn to_bytes(&self, head_only: bool) -> Vec<u8> {
        let length = match self.status {
            204 => String::new(),
            _ => format!("Content-Length: {}\r\n", self.body.len()),
        };
        self.write(&length, if head_only { "" } else { &self.body })
    }

    /// As `to_bytes`, of an answer behind which the connection stays open.
    pub(super) fn to_endless_bytes(&self) -> Vec<u8> {
        self.write("", &self.body)
    }

    /// Makes of it what the private server's writing would become.
    pub(super) fn into_relayed(mut self, head_only: bool) -> Relayed {
        let hold = self.header.take_if(|(name, _)| *name == HOLD_HEADER);
        let hold = hold.and_then(|(_, value)| Deferred::parse(&value));
        Relayed { bytes: self.to_bytes(head_only), hold }
    }

    fn write(&self, length: &str, body: &str) -> Vec<u8> {
        let (status, reason) = (self.status, StatusCode(self.status).default_reason_phrase());
        let kind = if self.body.is_empty() { "" } else { "Content-Type: application/json\r\n" };
        let header = self.header.as_ref().map(|(name, value)| format!("{name}: {value}\r\n"));
        let header = header.unwrap_or_default();
        format!(
            "HTTP/1.1 {status} {reason}\r\n{header}{kind}{length}Connection: close\r\n\r\n{body}"
        )
        .into_bytes()
    }
}

/// Why an answer is held back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Deferred {
    /// It is given once the proxy is idle, for so long at most.
    Idle(Duration),
    /// A pause has begun, and depends on what comes of it.
    Pause {
        /// How it waits for idle, if it does.
        wait: Option<Wait>,
        /// Whether it lasts as long as the caller's connection.
        is_tied: bool,
    },
}

impl fmt::Display for Deferred {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Idle(time) => write!(f, "{}", nanos(*time)),
            Self::Pause { wait, is_tied } => {
                write!(f, "{}", if *is_tied { TIED } else { UNTIED })?;
                let Some(Wait { time, on_timeout }) = wait else { return Ok(()) };
                let name = |(_, of_all): &&(_, OnTimeout)| of_all == on_timeout;
                let word = OnTimeout::ALL.iter().find(name).map_or("", |(word, _)| word);
                write!(f, " {} {word}", nanos(*time))
            }
        }
    }
}

impl Deferred {
    fn parse(text: &str) -> Option<Self> {
        let duration = |text: &str| text.parse().ok().map(Duration::from_nanos);
        let mut words = text.split(' ');
        let is_tied = match words.next()? {
            TIED => true,
            UNTIED => false,
            time => return duration(time).map(Self::Idle),
        };
        let wait = match words.next() {
            None => None,
            Some(time) => {
                let word = words.next()?;
                let (_, on_timeout) = OnTimeout::ALL.into_iter().find(|(name, _)| *name == word)?;
                Some(Wait { time: duration(time)?, on_timeout })
            }
        };
        Some(Self::Pause { wait, is_tied })
    }
}

const TIED: &str = "tied";
const UNTIED: &str = "untied";

/// What the private server has answered.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Relayed {
    /// What the caller gets.
    pub(super) bytes: Vec<u8>,
    /// Why it is held back, if it is.
    pub(super) hold: Option<Deferred>,
}

/// Makes of all that the private server wrote what the caller gets. None if that is no whole answer: then its request was lost.
pub(super) fn relayed(written: &str, head_only: bool) -> Option<Relayed> {
    let (head, body) = written.split_once("\r\n\r\n")?;
    let (status, headers) = head.split_once("\r\n")?;
    let (mut kept, mut length, mut hold) = (status.to_owned(), None, None);
    for header in headers.split("\r\n") {
        let (name, value) = header.split_once(": ")?;
        match name {
            "Server" | "Connection" => continue,
            HOLD_HEADER => {
                hold = Deferred::parse(value);
                continue;
            }
            "Content-Length" => length = value.parse().ok(),
            _ => {}
        }
        if name != "Content-Length" || !status.contains(" 204 ") {
            kept.extend(["\r\n", header]);
        }
    }
    let whole =
        length.is_some_and(|length: usize| body.len() == if head_only { 0 } else { length });
    // A request that tiny_http drops is answered with an empty 500, which the routes never send.
    let dropped = status.contains(" 500 ") && length == Some(0);
    let bytes = format!("{kept}\r\nConnection: close\r\n\r\n{body}").into_bytes();
    (whole && !dropped).then_some(Relayed { bytes, hold })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_relayed_whole_or_not_at_all() {
        let whole = "HTTP/1.1 200 OK\r\nServer: x\r\nContent-Length: 2\r\n\r\nhi";
        assert_eq!(
            relayed(whole, false).unwrap().bytes,
            b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nhi"
        );
        for end in 0..whole.len() {
            assert_eq!(relayed(&whole[..end], false), None, "{end}");
        }
        let empty = "HTTP/1.1 204 No Content\r\nX-Hold: 5\r\nContent-Length: 0\r\n\r\n";
        let bytes = b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n".to_vec();
        let hold = Some(Deferred::Idle(Duration::from_nanos(5)));
        assert_eq!(relayed(empty, false), Some(Relayed { bytes, hold }));
        assert_eq!(
            relayed("HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n", false),
            None
        );
        assert!(relayed("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n", true).is_some());
    }

    #[test]
    fn a_hold_is_read_as_it_was_written() {
        let time = Duration::from_nanos(7);
        let waits = OnTimeout::ALL.map(|(_, on_timeout)| Some(Wait { time, on_timeout }));
        let pauses = waits
            .into_iter()
            .chain([None])
            .flat_map(|wait| [true, false].map(|is_tied| Deferred::Pause { wait, is_tied }));
        for hold in pauses.chain([Deferred::Idle(time)]) {
            assert_eq!(Deferred::parse(&hold.to_string()), Some(hold));
        }
    }

    #[test]
    fn an_error_is_json_whatever_its_text() {
        let answer = Response::error(400, "a \"quoted\"\nline");
        assert_eq!(answer.body, concat!(r#"{"error": "a \"quoted\"\nline", "status": 400}"#, "\n"));
        assert!(answer.to_bytes(true).ends_with(b"\r\n\r\n"));
    }
}
