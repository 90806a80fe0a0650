//! `Answer`: what a caller of the control API gets, and how it is written on the wire.

use std::fmt::Write;

use tiny_http::StatusCode;

/// A status with an optional JSON body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Answer {
    pub(super) status: u16,
    /// JSON, or empty for an answer without a body.
    pub(super) body: String,
    /// The methods that the path knows, where the answer has to name them.
    pub(super) allow: Option<&'static str>,
}

impl Answer {
    pub(super) fn empty(status: u16) -> Self {
        Self { status, body: String::new(), allow: None }
    }

    pub(super) fn json(body: impl Into<String>) -> Self {
        Self { status: 200, body: body.into(), allow: None }
    }

    /// `text` is a sentence that tells the caller what to do.
    pub(super) fn error(status: u16, text: &str) -> Self {
        let text = serde_json::Value::from(text);
        Self { status, body: format!(r#"{{"error": {text}, "status": {status}}}"#), allow: None }
    }

    pub(super) fn stopping() -> Self {
        Self::error(503, "tcpause is stopping.")
    }

    pub(super) fn with_allow(self, methods: &'static str) -> Self {
        Self { allow: Some(methods), ..self }
    }

    /// The bytes that the front writes when it answers by itself.
    pub(super) fn to_bytes(&self, head_only: bool) -> Vec<u8> {
        let reason = StatusCode(self.status).default_reason_phrase();
        let mut text = format!("HTTP/1.1 {} {reason}\r\n", self.status);
        if !self.body.is_empty() {
            text.push_str("Content-Type: application/json\r\n");
        }
        // Writing to a String cannot fail.
        let _ = write!(text, "Content-Length: {}\r\nConnection: close\r\n\r\n", self.body.len());
        if !head_only {
            text.push_str(&self.body);
        }
        text.into_bytes()
    }
}

/// Makes of all that the private server wrote what the caller gets. None if that is no whole answer: then its request was lost.
pub(super) fn relayed(bytes: &[u8], head_only: bool) -> Option<Vec<u8>> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut head = httparse::Response::new(&mut headers);
    let httparse::Status::Complete(head_len) = head.parse(bytes).ok()? else { return None };
    let (status, body) = (head.code?, bytes.get(head_len..)?);
    let length =
        head.headers.iter().find(|header| header.name.eq_ignore_ascii_case("Content-Length"))?;
    let length: usize = std::str::from_utf8(length.value).ok()?.parse().ok()?;
    // A request that tiny_http drops is answered with an empty 500, which the routes never send.
    if (status == 500 && length == 0) || body.len() != if head_only { 0 } else { length } {
        return None;
    }
    let mut answer =
        format!("HTTP/1.1 {status} {}\r\n", head.reason.unwrap_or_default()).into_bytes();
    for header in head.headers.iter() {
        let dropped = match header.name {
            "Server" | "Connection" => true,
            "Content-Length" => status == 204,
            _ => false,
        };
        if !dropped {
            for part in [header.name.as_bytes(), b": ", header.value, b"\r\n"] {
                answer.extend_from_slice(part);
            }
        }
    }
    answer.extend_from_slice(b"Connection: close\r\n\r\n");
    answer.extend_from_slice(body);
    Some(answer)
}

/// `tiny_http`'s own and ours, with room to spare.
const HEADERS_MAX: usize = 16;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_relayed_whole_or_not_at_all() {
        let whole = b"HTTP/1.1 200 OK\r\nServer: x\r\nContent-Length: 2\r\n\r\nhi";
        let relayed_whole = relayed(whole, false).unwrap();
        assert_eq!(
            relayed_whole,
            b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nhi"
        );
        for end in 0..whole.len() {
            assert_eq!(relayed(&whole[..end], false), None, "{end}");
        }
        let empty = b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n";
        assert_eq!(
            relayed(empty, false).unwrap(),
            b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n"
        );
        assert_eq!(
            relayed(b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n", false),
            None
        );
        assert!(relayed(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n", true).is_some());
    }

    #[test]
    fn an_error_is_json_whatever_its_text() {
        let answer = Answer::error(400, "a \"quoted\"\nline");
        assert_eq!(answer.body, r#"{"error": "a \"quoted\"\nline", "status": 400}"#);
        assert!(answer.to_bytes(true).ends_with(b"\r\n\r\n"));
    }
}
