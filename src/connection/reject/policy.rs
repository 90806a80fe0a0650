//! Policy for rejected clients, loaded once at start from the configuration.

use std::{
    fmt::Write as _,
    fs::{self, File},
    io::{self, Read},
    path::Path,
    sync::Arc,
    time::Duration,
};

use rustls::ServerConfig;

use super::{protocol::Protocol, tls};
use crate::{
    admission::semaphore::Semaphore,
    config::{ProxyConfig, RejectWith},
    error::Error,
};

/// Largest file that can be an answer. It is meant for an error message, and each client that does not read may keep a
/// copy.
const ANSWER_BYTES_MAX: usize = 64 * 1024;

/// TLS sessions with clients to reject at a time, over all workers. One takes some 80 KiB at worst, as rustls buffers
/// up to 64 KiB of a handshake message.
const HANDSHAKES_MAX: usize = 512;

/// Policy for rejected clients.
#[derive(Debug)]
pub(crate) struct RejectPolicy {
    answer: RejectResponse,
    tls: Option<Arc<ServerConfig>>,
    handshakes: Arc<Semaphore>,
}

/// Answer to a rejected client, loaded: the setting `RejectWith` names it, and a file is read here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum RejectResponse {
    /// This 503; a client of another protocol gets the end of the stream.
    Http(Arc<[u8]>),
    /// These bytes, in any protocol.
    File(Arc<[u8]>),
    /// The end of the stream, at once.
    Close,
    /// A reset, at once.
    Reset,
}

impl RejectPolicy {
    /// Loads the policy from the files that the configuration names.
    pub(crate) fn load(proxy: &ProxyConfig) -> Result<Self, Error> {
        let answer = match &proxy.reject_with {
            RejectWith::Http => RejectResponse::http(proxy.retry_after_interval),
            RejectWith::Close => RejectResponse::Close,
            RejectWith::Reset => RejectResponse::Reset,
            RejectWith::File(path) => RejectResponse::File(read(path)?),
        };
        Ok(Self::new(answer, tls::load(&proxy.tls)?))
    }

    /// Returns a policy with `answer`, which also answers inside TLS if `tls` is given.
    pub(crate) fn new(answer: RejectResponse, tls: Option<Arc<ServerConfig>>) -> Self {
        Self { answer, tls, handshakes: Arc::new(Semaphore::new(HANDSHAKES_MAX)) }
    }

    /// Returns the configured answer.
    pub(crate) fn answer(&self) -> &RejectResponse {
        &self.answer
    }

    /// Returns the bytes for a client of this protocol.
    pub(crate) fn answer_to(&self, protocol: Protocol) -> Arc<[u8]> {
        match (&self.answer, protocol) {
            (RejectResponse::File(bytes), _)
            | (RejectResponse::Http(bytes), Protocol::Tls | Protocol::Other) => Arc::clone(bytes),
            // An HTTP response would only confuse clients of another protocol.
            (RejectResponse::Http(_), Protocol::Ssh | Protocol::Postgres)
            | (RejectResponse::Close | RejectResponse::Reset, _) => Arc::default(),
        }
    }

    /// Returns the TLS configuration; without one, TLS clients get an alert.
    pub(crate) fn tls(&self) -> Option<&Arc<ServerConfig>> {
        self.tls.as_ref()
    }

    /// Returns the permits for TLS handshakes with clients to reject.
    pub(crate) fn handshakes(&self) -> &Arc<Semaphore> {
        &self.handshakes
    }

    /// Describes the fate of new clients while paused, for the log.
    pub(crate) fn describe(&self) -> &'static str {
        match (&self.answer, &self.tls) {
            (RejectResponse::Close, _) => "rejected by a close",
            (RejectResponse::Reset, _) => "rejected by a reset",
            (RejectResponse::Http(_) | RejectResponse::File(_), Some(_)) => {
                "rejected, in TLS if they speak it"
            }
            (RejectResponse::Http(_) | RejectResponse::File(_), None) => {
                "rejected, without a certificate for those who speak TLS"
            }
        }
    }
}

impl RejectResponse {
    /// Returns a 503 with `Retry-After`, rounded up to whole seconds. With zero, the header is left out.
    pub(crate) fn http(retry_after: Duration) -> Self {
        let seconds = retry_after.as_secs() + u64::from(retry_after.subsec_nanos() > 0);
        let mut text = String::from("HTTP/1.1 503 Service Unavailable\r\n");
        if seconds > 0 {
            // Writing to a String cannot fail.
            write!(text, "Retry-After: {seconds}\r\n").ok();
        }
        text.push_str("Connection: close\r\nContent-Length: 0\r\n\r\n");
        Self::Http(text.into_bytes().into())
    }
}

/// Reads the file that is the answer.
fn read(path: &Path) -> Result<Arc<[u8]>, Error> {
    let refuse =
        |problem: &str| Error::Config(format!("proxy.reject-with: {}: {problem}", path.display()));
    let unreadable = |error: io::Error| {
        let remedy = match error.kind() {
            io::ErrorKind::NotFound => "check the path",
            io::ErrorKind::PermissionDenied => "let this user read it",
            _ => "name a readable file",
        };
        refuse(&format!("cannot read it: {error}; {remedy}"))
    };
    // Opening a FIFO would block until a writer comes.
    if !fs::metadata(path).map_err(unreadable)?.is_file() {
        return Err(refuse("it is not a file; name the file whose bytes are the answer"));
    }
    let mut bytes = Vec::new();
    // One byte beyond the limit is enough to see that the file is too large.
    let limit = ANSWER_BYTES_MAX as u64 + 1;
    File::open(path)
        .and_then(|file| file.take(limit).read_to_end(&mut bytes))
        .map_err(unreadable)?;
    if bytes.is_empty() {
        return Err(refuse("it is empty; to answer nothing, write `close`"));
    }
    if bytes.len() > ANSWER_BYTES_MAX {
        return Err(refuse(&format!(
            "it is larger than {ANSWER_BYTES_MAX} bytes; is this the right file?"
        )));
    }
    Ok(bytes.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_retry_interval_is_rounded_up_and_left_out_when_zero() {
        for (interval, line) in [
            (Duration::from_secs(3), "Retry-After: 3\r\n"),
            (Duration::from_millis(1500), "Retry-After: 2\r\n"),
            (Duration::from_nanos(1), "Retry-After: 1\r\n"),
            (Duration::ZERO, ""),
        ] {
            let answer = format!(
                "HTTP/1.1 503 Service Unavailable\r\n{line}Connection: close\r\nContent-Length: 0\r\n\r\n"
            );
            assert_eq!(
                RejectResponse::http(interval),
                RejectResponse::Http(answer.into_bytes().into())
            );
        }
    }

    #[test]
    fn a_file_is_read_up_to_its_bound() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("answer");
        let read_back = |length: usize| {
            fs::write(&path, vec![b'x'; length]).unwrap();
            read(&path).map(|bytes| bytes.len()).map_err(|error| error.to_string())
        };
        assert_eq!(read_back(1), Ok(1));
        assert_eq!(read_back(ANSWER_BYTES_MAX), Ok(ANSWER_BYTES_MAX));
        assert!(read_back(ANSWER_BYTES_MAX + 1).unwrap_err().contains("65536"));
        assert!(read_back(0).unwrap_err().contains("empty"));
        for (path, words) in
            [(dir.path(), "not a file"), (&dir.path().join("no"), "check the path")]
        {
            let error = read(path).unwrap_err().to_string();
            assert!(error.contains(words) && error.starts_with("proxy.reject-with: "), "{error}");
        }
    }
}
