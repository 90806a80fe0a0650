//! `Response`: an answer to a caller of the control API, and its form on the wire.

use tiny_http::StatusCode;

/// Media type of JSON.
const JSON: &str = "application/json";
/// Media type of text that people read.
pub(super) const TEXT: &str = "text/plain; charset=utf-8";

/// Answer: a status with an optional body, and the headers that it needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Response {
    pub(super) status: u16,
    /// Text, or empty for an answer without a body.
    pub(super) body: String,
    /// Media type of the body.
    pub(super) content_type: &'static str,
    /// Names and values of the headers that this answer needs besides the usual ones.
    pub(super) headers: Vec<(&'static str, String)>,
}

impl Response {
    /// Makes an answer of status 200 from a body.
    pub(super) fn new(content_type: &'static str, body: String) -> Self {
        Self { status: 200, body, content_type, headers: Vec::new() }
    }

    /// Makes an answer without a body.
    pub(super) fn empty(status: u16) -> Self {
        Self { status, ..Self::json(String::new()) }
    }

    /// Makes an answer of status 200 from a JSON text.
    pub(super) fn json(body: String) -> Self {
        Self::new(JSON, body)
    }

    /// Makes an error of a sentence that tells the caller what to do.
    pub(super) fn error(status: u16, text: &str) -> Self {
        let text = serde_json::Value::from(text);
        // The line ends for readers at a terminal.
        let body = format!("{{\"error\": {text}, \"status\": {status}}}\n");
        Self { status, ..Self::json(body) }
    }

    /// Adds a header. The usual ones, and those that frame the answer, are not to be given.
    pub(super) fn with_header(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    /// Returns the bytes that the front writes when it answers by itself.
    pub(super) fn to_bytes(&self, is_head: bool) -> Vec<u8> {
        let length = match self.status {
            204 => String::new(),
            _ => format!("Content-Length: {}\r\n", self.body.len()),
        };
        self.write(&length, if is_head { "" } else { &self.body })
    }

    /// Returns the bytes of an answer behind which the connection stays open.
    pub(super) fn to_endless_bytes(&self) -> Vec<u8> {
        self.write("", &self.body)
    }

    /// Lists the headers that depend on the answer, but for its length.
    pub(super) fn headers(&self) -> impl Iterator<Item = (&'static str, &str)> {
        let headers = self.headers.iter().map(|(name, value)| (*name, value.as_str()));
        let kind = (!self.body.is_empty()).then_some(("Content-Type", self.content_type));
        headers.chain(kind)
    }

    fn write(&self, length: &str, body: &str) -> Vec<u8> {
        let (status, reason) = (self.status, StatusCode(self.status).default_reason_phrase());
        let lines = self.headers().map(|(name, value)| [name, ": ", value, "\r\n"].concat());
        let headers = lines.collect::<String>();
        format!("HTTP/1.1 {status} {reason}\r\n{headers}{length}Connection: close\r\n\r\n{body}")
            .into_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_json_whatever_its_text() {
        let answer = Response::error(400, "a \"quoted\"\nline");
        assert_eq!(answer.body, concat!(r#"{"error": "a \"quoted\"\nline", "status": 400}"#, "\n"));
        assert!(answer.to_bytes(true).ends_with(b"\r\n\r\n"));
    }

    #[test]
    fn an_answer_has_its_type_and_any_number_of_headers() {
        let answer = Response::new(TEXT, "hi\n".to_owned())
            .with_header("Cache-Control", "no-store")
            .with_header("Referrer-Policy", "no-referrer".to_owned());
        let head = "HTTP/1.1 200 OK\r\nCache-Control: no-store\r\nReferrer-Policy: no-referrer\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: 3\r\nConnection: close\r\n\r\n";
        assert_eq!(answer.to_bytes(false), [head, "hi\n"].concat().into_bytes());
        assert_eq!(answer.to_bytes(true), head.as_bytes());
    }
}
