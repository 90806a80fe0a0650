//! `Response`: an answer to a caller of the control API, and its form on the wire.

use tiny_http::StatusCode;

/// Answer: a status with an optional JSON body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Response {
    pub(super) status: u16,
    /// JSON, or empty for an answer without a body.
    pub(super) body: String,
    /// Name and value of a header that this answer needs besides the usual ones.
    pub(super) header: Option<(&'static str, String)>,
}

impl Response {
    /// Makes an answer without a body.
    pub(super) fn empty(status: u16) -> Self {
        Self { status, body: String::new(), header: None }
    }

    /// Makes an answer of status 200 from a JSON text.
    pub(super) fn json(body: String) -> Self {
        Self { status: 200, body, header: None }
    }

    /// Makes an error of a sentence that tells the caller what to do.
    pub(super) fn error(status: u16, text: &str) -> Self {
        let text = serde_json::Value::from(text);
        // The line ends for readers at a terminal.
        let body = format!("{{\"error\": {text}, \"status\": {status}}}\n");
        Self { status, body, header: None }
    }

    /// Adds the one header that an answer may have of its own.
    pub(super) fn with_header(self, name: &'static str, value: String) -> Self {
        Self { header: Some((name, value)), ..self }
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
        let header = self.header.as_ref().map(|(name, value)| (*name, value.as_str()));
        let kind = (!self.body.is_empty()).then_some(("Content-Type", "application/json"));
        header.into_iter().chain(kind)
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
}
