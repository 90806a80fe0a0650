//! `Answer`: what a caller of the control API gets, and how it is written on the wire.

use std::time::Duration;

use tiny_http::StatusCode;

/// The name of the header by which the private server has an answer held back until the proxy is idle, and for how many
/// nanoseconds at most.
const HOLD_HEADER: &str = "X-Hold";

/// A status with an optional JSON body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Answer {
    pub(super) status: u16,
    /// JSON, or empty for an answer without a body.
    pub(super) body: String,
    /// The name and value of a header that this answer needs besides the usual ones.
    pub(super) header: Option<(&'static str, String)>,
}

impl Answer {
    pub(super) fn empty(status: u16) -> Self {
        Self { status, body: String::new(), header: None }
    }

    pub(super) fn json(body: String) -> Self {
        Self { status: 200, body, header: None }
    }

    /// `text` is a sentence that tells the caller what to do.
    pub(super) fn error(status: u16, text: &str) -> Self {
        let text = serde_json::Value::from(text);
        Self { status, body: format!(r#"{{"error": {text}, "status": {status}}}"#), header: None }
    }

    pub(super) fn with_header(self, name: &'static str, value: String) -> Self {
        Self { header: Some((name, value)), ..self }
    }

    /// Has the front give it once the proxy is idle, or another one when `timeout` is over; none is five centuries.
    pub(super) fn when_idle(self, timeout: Option<Duration>) -> Self {
        let nanos = timeout.and_then(|timeout| u64::try_from(timeout.as_nanos()).ok());
        self.with_header(HOLD_HEADER, nanos.unwrap_or(u64::MAX).to_string())
    }

    /// The bytes that the front writes when it answers by itself.
    pub(super) fn to_bytes(&self, head_only: bool) -> Vec<u8> {
        let reason = StatusCode(self.status).default_reason_phrase();
        let (status, length) = (self.status, self.body.len());
        let body = if head_only { "" } else { &self.body };
        format!(
            "HTTP/1.1 {status} {reason}\r\nContent-Type: application/json\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"
        )
        .into_bytes()
    }
}

/// What the private server has answered.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Relayed {
    /// What the caller gets.
    pub(super) bytes: Vec<u8>,
    /// For how long it may be held back until the proxy is idle.
    pub(super) hold: Option<Duration>,
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
                hold = value.parse().ok().map(Duration::from_nanos);
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
        let hold = Some(Duration::from_nanos(5));
        assert_eq!(relayed(empty, false), Some(Relayed { bytes, hold }));
        assert_eq!(
            relayed("HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n", false),
            None
        );
        assert!(relayed("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n", true).is_some());
    }

    #[test]
    fn an_error_is_json_whatever_its_text() {
        let answer = Answer::error(400, "a \"quoted\"\nline");
        assert_eq!(answer.body, r#"{"error": "a \"quoted\"\nline", "status": 400}"#);
        assert!(answer.to_bytes(true).ends_with(b"\r\n\r\n"));
    }
}
