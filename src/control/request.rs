//! Checks one control request, byte by byte, before anything acts on it.
//!
//! `tiny_http` trusts what it reads: a wrong length aborts the process, an endless line fills the memory. Nothing of a caller's
//! bytes but the method and the target passes this file.

use serde::{Deserialize, Serialize};

use super::{body::Body, hosts::HostPolicy};
use crate::handover::parcel::{self, Misfit, Outgoing};

/// Longest head of a request.
pub(super) const HEAD_BYTES_MAX: usize = 8 << 10;
const HEADERS_MAX: usize = 64;

/// Request that is in order as HTTP.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Request {
    /// In capitals; `Command` knows the methods of each path.
    pub(super) method: String,
    /// Path and query: printable ASCII that begins with a slash, or `*`.
    pub(super) target: String,
    /// True if the caller names HTML among the types that it accepts, as browsers do.
    pub(super) accepts_html: bool,
}

/// State of a request on its way in.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// The request goes on.
    More,
    /// The head is whole, which is told once; the caller sends the body once it is told to continue.
    Continue,
    /// The request is whole; bytes behind it are ignored.
    Whole(Request),
}

/// Refusal of a request: a status, and a sentence that tells the caller the remedy.
pub(super) type HttpError = (u16, &'static str);

/// Request on its way in.
#[derive(Debug, Default)]
pub(super) struct Incoming {
    /// The bytes of its head, until that is whole.
    bytes: Vec<u8>,
    /// The whole head, and the body behind it.
    parts: Option<(Request, Body)>,
}

/// Request on its way in, in a hand-over: the number of the bytes of its head in the parcel, or the parts of a whole one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct IncomingWords {
    bytes: usize,
    parts: Option<(Request, Body)>,
}

impl Incoming {
    /// Describes it for a hand-over.
    pub(super) fn describe(&self, parcel: &mut Outgoing<'_>) -> IncomingWords {
        let Self { bytes, parts } = self;
        IncomingWords { bytes: parcel.append(bytes), parts: parts.clone() }
    }

    /// Makes it of its words.
    pub(super) fn rebuild(
        words: IncomingWords,
        parcel: &mut parcel::Incoming,
    ) -> Result<Self, Misfit> {
        let IncomingWords { bytes, parts } = words;
        Ok(Self { bytes: parcel.bytes(bytes)?.to_vec(), parts })
    }

    /// Takes the next bytes that a caller has sent.
    pub(super) fn take(&mut self, bytes: &[u8], hosts: &HostPolicy) -> Result<Progress, HttpError> {
        let (request, body, continues) = match &mut self.parts {
            Some((request, body)) => {
                body.take(bytes)?;
                (request, body, false)
            }
            parts @ None => {
                self.bytes.extend_from_slice(bytes);
                let Some(head) = check(&self.bytes, hosts)? else { return Ok(Progress::More) };
                let (request, body) = parts.insert((head.request, head.body));
                let bytes = std::mem::take(&mut self.bytes);
                body.take(bytes.get(head.length..).unwrap_or_default())?;
                (request, body, head.continues)
            }
        };
        Ok(if body.is_whole() {
            Progress::Whole(request.clone())
        } else if continues {
            Progress::Continue
        } else {
            Progress::More
        })
    }

    /// Returns true while nothing has come.
    pub(super) fn is_empty(&self) -> bool {
        self.parts.is_none() && self.bytes.is_empty()
    }

    /// Returns true if the answer is to have no body.
    pub(super) fn is_head(&self) -> bool {
        match &self.parts {
            Some((request, _)) => request.method == "HEAD",
            None => self.bytes.starts_with(b"HEAD "),
        }
    }
}

/// Whole head of a request.
struct Head {
    request: Request,
    body: Body,
    /// True if the caller waits to be told to send the body.
    continues: bool,
    /// Its length in bytes.
    length: usize,
}

/// Checks a head as far as it has come. Returns it once it is whole.
fn check(bytes: &[u8], hosts: &HostPolicy) -> Result<Option<Head>, HttpError> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut head = httparse::Request::new(&mut headers);
    let (length, whole) = match head.parse(bytes).map_err(malformed)? {
        httparse::Status::Complete(length) => (length, true),
        httparse::Status::Partial => (bytes.len(), false),
    };
    if length > HEAD_BYTES_MAX {
        return Err((431, "The request's head is too long: at most 8 KiB are read."));
    }
    check_lines(bytes.get(..length).unwrap_or_default())?;
    if !whole {
        return Ok(None);
    }
    let method = head.method.unwrap_or_default();
    // tiny_http takes any case; RFC 9110 (9.1) does not.
    if !method.bytes().all(|byte| byte.is_ascii_uppercase()) {
        return Err((501, "The method is not known here: write it in capitals."));
    }
    let headers = Headers(head.headers);
    let is_recent = head.version == Some(1);
    let body = body(&headers, is_recent)?;
    check_origin(&headers, is_recent, hosts)?;
    let target = target(head.path.unwrap_or_default(), hosts)?;
    let continues = continues(&headers)? && is_recent;
    let accepts_html = headers.names_html();
    let request = Request { method: method.to_owned(), target, accepts_html };
    Ok(Some(Head { request, body, continues, length }))
}

fn malformed(error: httparse::Error) -> HttpError {
    match error {
        httparse::Error::TooManyHeaders => (431, "Too many headers: at most 64 are read."),
        httparse::Error::Version => (505, "Only HTTP/1.0 and HTTP/1.1 are spoken here."),
        _ => (400, "Not an HTTP request: plain HTTP/1.1 is spoken here, without TLS."),
    }
}

/// Checks that lines end with CR LF and hold no other control byte. httparse is more lenient, and two readings of one request
/// are a way in.
fn check_lines(head: &[u8]) -> Result<(), HttpError> {
    let mut previous = 0;
    for &byte in head {
        let plain = match byte {
            b'\n' => previous == b'\r',
            b'\t' => previous != b'\r',
            _ => previous != b'\r' && (byte == b'\r' || !byte.is_ascii_control()),
        };
        if !plain {
            return Err((400, "The head holds a control byte, or a line without CR LF."));
        }
        previous = byte;
    }
    Ok(())
}

/// Finds out how the body is framed. Two ways at once could be read as either.
fn body(headers: &Headers<'_>, may_be_chunked: bool) -> Result<Body, HttpError> {
    let length = headers.one("Content-Length")?;
    match headers.one("Transfer-Encoding")? {
        None => {}
        Some(_) if length.is_some() || !may_be_chunked => {
            let text = "Chunks need HTTP/1.1 and no Content-Length: send no body, none is needed.";
            return Err((400, text));
        }
        Some(coding) if coding.eq_ignore_ascii_case(b"chunked") => return Ok(Body::chunked()),
        Some(_) => return Err((501, "The only Transfer-Encoding known here is chunked.")),
    }
    let Some(length) = length else { return Body::sized(0) };
    if length.is_empty() || !length.iter().all(u8::is_ascii_digit) {
        return Err((400, "The Content-Length is not a number."));
    }
    let length = std::str::from_utf8(length).ok().and_then(|text| text.parse().ok());
    Body::sized(length.unwrap_or(usize::MAX)) // beyond 64 bits
}

/// Refuses requests that a web page in the operator's browser could send: they carry an `Origin`, a foreign
/// `Sec-Fetch-Site`, or, by DNS rebinding, a foreign `Host`.
///
/// `same-site` is foreign: the other ports of this host are, the proxied service among them. `none` is a typed address, and
/// `same-origin` a request that a browser makes on its own behind that. Neither changes anything: a browser sends no PUT or
/// DELETE without an `Origin`.
fn check_origin(
    headers: &Headers<'_>,
    host_needed: bool,
    hosts: &HostPolicy,
) -> Result<(), HttpError> {
    let site = headers.one("Sec-Fetch-Site")?.unwrap_or(b"none");
    if headers.any("Origin") || !matches!(site, b"none" | b"same-origin") {
        return Err((403, "Web pages are refused: use curl, or send no Origin header."));
    }
    match headers.one("Host")? {
        None if host_needed => Err((400, "HTTP/1.1 needs a Host header.")),
        Some(host) if !hosts.allow(host) => Err(FOREIGN_HOST),
        _ => Ok(()),
    }
}

const FOREIGN_HOST: HttpError =
    (403, "A foreign Host: use an IP address or localhost, or add the name to control.hosts.");

/// Returns path and query of the target, whose absolute form names a host too.
fn target(target: &str, hosts: &HostPolicy) -> Result<String, HttpError> {
    let path = match target.split_at_checked(7) {
        Some((scheme, rest)) if scheme.eq_ignore_ascii_case("http://") => {
            let (authority, path) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
            if authority.is_empty() || !hosts.allow(authority.as_bytes()) {
                return Err(FOREIGN_HOST);
            }
            path
        }
        _ => target,
    };
    if !path.bytes().all(|byte| byte.is_ascii_graphic()) || !(path.starts_with('/') || path == "*")
    {
        return Err((400, "The request's target is no path: try /paused or /status."));
    }
    Ok(path.to_owned())
}

fn continues(headers: &Headers<'_>) -> Result<bool, HttpError> {
    match headers.one("Expect")? {
        None => Ok(false),
        Some(value) if value.eq_ignore_ascii_case(b"100-continue") => Ok(true),
        Some(_) => Err((417, "Only `Expect: 100-continue` is understood.")),
    }
}

struct Headers<'a>(&'a [httparse::Header<'a>]);

impl<'a> Headers<'a> {
    fn all(&self, name: &str) -> impl Iterator<Item = &'a [u8]> {
        self.0
            .iter()
            .filter(move |header| header.name.eq_ignore_ascii_case(name))
            .map(|header| header.value)
    }

    fn any(&self, name: &str) -> bool {
        self.all(name).next().is_some()
    }

    fn one(&self, name: &str) -> Result<Option<&'a [u8]>, HttpError> {
        let mut values = self.all(name);
        let first = values.next();
        if values.next().is_some() {
            return Err((400, "A header that may come once is given more than once."));
        }
        Ok(first)
    }

    /// Returns true if an `Accept` header names HTML, whatever weight it gives it.
    fn names_html(&self) -> bool {
        self.all("Accept").flat_map(|value| value.split(|&byte| byte == b',')).any(|part| {
            let name = part.split(|&byte| byte == b';').next().unwrap_or_default();
            name.trim_ascii().eq_ignore_ascii_case(b"text/html")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hosts() -> HostPolicy {
        HostPolicy::new([], &[])
    }

    fn status(request: &[u8]) -> u16 {
        match Incoming::default().take(request, &hosts()) {
            Ok(Progress::More) => 0,
            Ok(Progress::Continue) => 100,
            Ok(Progress::Whole(_)) => 200,
            Err((status, _)) => status,
        }
    }

    #[test]
    fn requests_are_whole_or_refused() {
        let table: &[(u16, &str)] = &[
            (200, "GET /paused HTTP/1.0\r\n\r\n"),
            (200, "GET /paused HTTP/1.1\r\nHost: localhost\r\n\r\n"),
            (200, "\r\nGET /paused HTTP/1.1\r\nhOST:localhost\r\n\r\n"),
            (200, "GET http://localhost:3001/paused?a=b HTTP/1.1\r\nHost: localhost\r\n\r\n"),
            (200, "PUT /paused HTTP/1.0\r\nContent-Length: 3\r\n\r\nabc"),
            (200, "PUT /paused HTTP/1.0\r\nContent-Length: 0\r\n\r\nGET /paused HTTP/1.0\r\n\r\n"),
            (200, "GET / HTTP/1.0\r\nSec-Fetch-Site: none\r\n\r\n"),
            (200, "GET / HTTP/1.0\r\nX: caf\u{e9}\ta\r\n\r\n"),
            (0, ""),
            (0, "GET /paused HTTP/1.1\r\nHost: localhost\r\n"),
            (0, "PUT /paused HTTP/1.0\r\nContent-Length: 3\r\n\r\nab"),
            (0, "PUT /paused HTTP/1.0\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n"),
            (
                100,
                "PUT /paused HTTP/1.1\r\nHost:\r\nContent-Length: 3\r\nExpect: 100-Continue\r\n\r\n",
            ),
            (400, "GET /paused HTTP/1.1\r\n\r\n"),
            (400, "GET /paused HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n"),
            (400, "GET /paused HTTP/1.0\n\n"),
            (400, "GET /paused HTTP/1.0\r\nA: b\n\r\n"),
            (400, "\nGET /paused HTTP/1.0\r\n\r\n"),
            (400, "GET /paused HTTP/1.0\r\nA: \0\r\n\r\n"),
            (400, "GET /paused HTTP/1.0\r\nA: b\rc\r\n\r\n"),
            (400, "GET /paused HTTP/1.0\r\nA: b\r\n folded\r\n\r\n"),
            (400, "GET /paused HTTP/1.0\r\nContent-Length : 3\r\n\r\n"),
            (400, "GET /paused HTTP/1.0\r\nContent-Length: 0\r\nContent-Length: 0\r\n\r\n"),
            (400, "GET /paused HTTP/1.0\r\nContent-Length: +2\r\n\r\n"),
            (400, "GET /paused HTTP/1.0\r\nContent-Length: 1, 1\r\n\r\n"),
            (400, "GET /paused HTTP/1.0\r\nContent-Length:\r\n\r\n"),
            (400, "GET paused HTTP/1.0\r\n\r\n"),
            (400, "GET /p\u{e4}used HTTP/1.0\r\n\r\n"),
            (400, "GET http://localhost HTTP/1.0\r\n\r\n"),
            (400, "\x16\x03\x01\x02"),
            (403, "GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n"),
            (403, "GET http://evil.example/ HTTP/1.1\r\nHost: localhost\r\n\r\n"),
            (403, "PUT /paused HTTP/1.0\r\nOrigin: null\r\n\r\n"),
            (403, "PUT /paused HTTP/1.0\r\nSec-Fetch-Site: same-site\r\n\r\n"),
            (403, "PUT /paused HTTP/1.0\r\nSec-Fetch-Site: cross-site\r\n\r\n"),
            (413, "PUT /paused HTTP/1.0\r\nContent-Length: 70368744177664\r\n\r\n"),
            (413, "PUT /paused HTTP/1.0\r\nContent-Length: 99999999999999999999999\r\n\r\n"),
            (413, "PUT /paused HTTP/1.0\r\nContent-Length: 16385\r\n\r\n"),
            (417, "PUT /paused HTTP/1.0\r\nExpect: wonders\r\n\r\n"),
            (400, "PUT /paused HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
            (501, "PUT /paused HTTP/1.1\r\nHost:\r\nTransfer-Encoding: gzip, chunked\r\n\r\n"),
            (501, "PUT /paused HTTP/1.1\r\nHost:\r\nTransfer-Encoding: chunked;a\r\n\r\n"),
            (501, "PUT /paused HTTP/1.1\r\nHost:\r\nTransfer-Encoding:\r\n\r\n"),
            (200, "PUT / HTTP/1.1\r\nHost:\r\nTransfer-Encoding: Chunked\r\n\r\n0\r\n\r\nGET"),
            (0, "PUT / HTTP/1.1\r\nHost:\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r"),
            (501, "get /paused HTTP/1.0\r\n\r\n"),
            (400, "CONNECT localhost:80 HTTP/1.0\r\n\r\n"),
            (505, "GET / HTTP/2.0\r\n\r\n"),
            (505, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
            (505, "GET / HTTP/1.2\r\n\r\n"),
        ];
        for (expected, request) in table {
            assert_eq!(status(request.as_bytes()), *expected, "{request:?}");
        }
    }

    #[test]
    fn long_heads_are_refused_before_they_end() {
        let long = format!("GET / HTTP/1.0\r\nA: {}", "a".repeat(HEAD_BYTES_MAX));
        assert_eq!(status(long.as_bytes()), 431);
        assert_eq!(status(format!("{long}\r\n\r\n").as_bytes()), 431);
        assert_eq!(
            status("A: b\r\n".repeat(65).replacen("A: b", "GET / HTTP/1.0", 1).as_bytes()),
            0
        );
        assert_eq!(
            status("A: b\r\n".repeat(66).replacen("A: b", "GET / HTTP/1.0", 1).as_bytes()),
            431
        );
        assert!(
            matches!(status(b"GET /paused\r\n"), 400 | 505),
            "HTTP/0.9 is answered without waiting for more"
        );
    }

    #[test]
    fn browsers_are_told_from_other_callers() {
        for (accept, expected) in [
            ("", false),
            ("Accept: */*\r\n", false),
            ("Accept: text/plain;version=0.0.4;q=0.5,*/*;q=0.1\r\n", false),
            ("Accept: text/htmlx, xtext/html\r\n", false),
            ("X: text/html\r\n", false),
            ("Accept: text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8\r\n", true),
            ("accept:application/json , Text/HTML;q=0.9\r\n", true),
            ("Accept: application/json\r\nAccept: text/html\r\n", true),
        ] {
            let request = format!("GET / HTTP/1.0\r\n{accept}\r\n");
            let taken = Incoming::default().take(request.as_bytes(), &hosts());
            let Ok(Progress::Whole(request)) = taken else { panic!("{taken:?}") };
            assert_eq!(request.accepts_html, expected, "{accept}");
        }
    }

    #[test]
    fn a_request_may_come_in_any_pieces() {
        let head = "PUT /paused?a=b HTTP/1.1\r\nHost: localhost:3001\r\nA: b\r\n";
        for body in [
            "Content-Length: 4\r\n\r\nbody",
            "Transfer-Encoding: chunked\r\n\r\n4;a\r\nbody\r\n0\r\nA: b\r\n\r\n",
        ] {
            let text = format!("{head}{body}");
            let request = text.as_bytes();
            let whole = Progress::Whole(Request {
                method: "PUT".into(),
                target: "/paused?a=b".into(),
                accepts_html: false,
            });
            for split in 0..request.len() {
                let (begin, end) = request.split_at(split);
                let mut incoming = Incoming::default();
                assert_eq!(incoming.take(begin, &hosts()), Ok(Progress::More), "{split}");
                assert_eq!(incoming.take(end, &hosts()).as_ref(), Ok(&whole), "{split}");
            }
            assert_eq!(Incoming::default().take(request, &hosts()), Ok(whole));
        }
    }
}
