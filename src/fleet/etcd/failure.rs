//! Failures of requests, each as one sentence that names the endpoint and the remedy.

use std::io;

use rustls::{AlertDescription, CertificateError};

use super::answer::{HttpAnswer, decode_problem};
use crate::fleet::store::StoreError;

/// Failure of one attempt.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Failure {
    /// It concerns this endpoint; another one may answer.
    Endpoint(StoreError),
    /// Each endpoint would answer so.
    Store(StoreError),
    /// The token is missing, or no longer good. The text is for somebody without a user.
    LoginNeeded(String),
}

/// Part of an exchange that has failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// Nothing was sent.
    Connect,
    /// Nothing was sent but the question for the version.
    Greet,
    /// The request may have been carried out.
    Answer,
}

/// Codes of gRPC that the store answers with.
mod code {
    pub(super) const INVALID_ARGUMENT: u64 = 3;
    pub(super) const DEADLINE_EXCEEDED: u64 = 4;
    pub(super) const NOT_FOUND: u64 = 5;
    pub(super) const PERMISSION_DENIED: u64 = 7;
    pub(super) const RESOURCE_EXHAUSTED: u64 = 8;
    pub(super) const FAILED_PRECONDITION: u64 = 9;
    pub(super) const UNAVAILABLE: u64 = 14;
    pub(super) const UNAUTHENTICATED: u64 = 16;
}

/// Most characters of a foreign text in a sentence.
const QUOTE_MAX: usize = 200;

/// Returns the failure of an exchange that has brought no answer.
pub(super) fn of_http(url: &str, error: &ureq::Error, phase: Phase, has_cert: bool) -> Failure {
    if let Some(error) = tls_error(error) {
        return Failure::Endpoint(of_tls(url, error, has_cert));
    }
    if let ureq::Error::BodyExceedsLimit(_) = error {
        return Failure::Store(StoreError::Refused(format!(
            "etcd at {url} has answered with more than 2 MiB; split the fleet (fleet.name)"
        )));
    }
    let problem = match error {
        ureq::Error::Timeout(_) => "no answer in time".to_owned(),
        ureq::Error::HostNotFound => "there is no such host".to_owned(),
        ureq::Error::Io(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
            let hint = match (phase, url.starts_with("https")) {
                (Phase::Answer, _) => "",
                (_, false) => "; if it speaks TLS, give it as https://",
                (_, true) => "; if it does not speak TLS, give it as http://",
            };
            format!("it closed the connection before it answered{hint}")
        }
        ureq::Error::Io(error) => error.to_string(),
        ureq::Error::Protocol(_) => {
            "it does not speak HTTP; give the client URL of etcd".to_owned()
        }
        error => error.to_string(),
    };
    let text = format!("cannot reach etcd at {url}: {}", short(&problem));
    Failure::Endpoint(match phase {
        Phase::Connect | Phase::Greet => StoreError::Unreachable(text),
        Phase::Answer => StoreError::TimedOut(text),
    })
}

/// Finds the error of TLS, which a read of the connection wraps.
fn tls_error(error: &ureq::Error) -> Option<&rustls::Error> {
    match error {
        ureq::Error::Rustls(error) => Some(error),
        ureq::Error::Io(error) => {
            let inner = error.get_ref()?;
            inner.downcast_ref().or_else(|| inner.source()?.downcast_ref())
        }
        _ => None,
    }
}

fn of_tls(url: &str, error: &rustls::Error, has_cert: bool) -> StoreError {
    use AlertDescription as Alert;
    StoreError::Denied(match error {
        rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer) => {
            format!(
                "the certificate of etcd at {url} is not signed by any authority of fleet.tls.ca-cert"
            )
        }
        rustls::Error::InvalidCertificate(error) => {
            format!("the certificate of etcd at {url} cannot be trusted: {error}")
        }
        rustls::Error::AlertReceived(
            Alert::CertificateRequired
            | Alert::BadCertificate
            | Alert::UnknownCA
            | Alert::CertificateUnknown
            | Alert::UnsupportedCertificate
            | Alert::CertificateExpired
            | Alert::CertificateRevoked
            | Alert::AccessDenied
            | Alert::HandshakeFailure,
        ) if !has_cert => {
            format!("etcd at {url} asks for a certificate; set fleet.tls.cert and fleet.tls.key")
        }
        rustls::Error::AlertReceived(alert) => {
            format!("etcd at {url} refuses the certificate of fleet.tls.cert: {alert:?}")
        }
        rustls::Error::InvalidMessage(_) => {
            format!("etcd at {url} does not speak TLS; give it as http://, or set up TLS there")
        }
        error => format!("no TLS with etcd at {url}: {error}"),
    })
}

/// Returns the failure that an answer with another status than 200 tells.
pub(super) fn of_status(url: &str, answer: &HttpAnswer) -> Failure {
    match decode_problem(&answer.body) {
        Some((code, text)) => of_store(url, code, &text),
        // An etcd that shuts down, or a balancer without a member behind it.
        None if answer.status >= 500 => {
            let text = format!("etcd at {url} has answered with status {}", answer.status);
            Failure::Endpoint(StoreError::TimedOut(text))
        }
        None => of_stranger(url, answer),
    }
}

/// Returns the failure that etcd tells by a code of gRPC and a text.
pub(super) fn of_store(url: &str, code: u64, text: &str) -> Failure {
    let text = short(text);
    let told = format!("etcd at {url} has answered: {text}");
    match code {
        code::NOT_FOUND if text.contains("lease not found") => {
            Failure::Store(StoreError::NoSuchLease)
        }
        code::UNAUTHENTICATED => Failure::LoginNeeded(told),
        code::INVALID_ARGUMENT if text.contains("user name is empty") => Failure::LoginNeeded(
            format!("etcd at {url} asks for a user; set fleet.username and fleet.password-file"),
        ),
        code::INVALID_ARGUMENT if text.contains("auth store is old") => Failure::LoginNeeded(told),
        code::PERMISSION_DENIED => Failure::LoginNeeded(format!(
            "etcd at {url} denies the fleet's keys to this user ({text}); grant its role readwrite on fleet.prefix/fleet.name/"
        )),
        code::RESOURCE_EXHAUSTED if text.contains("space exceeded") => {
            Failure::Store(StoreError::Full(format!(
                "etcd at {url} is full ({text}); compact and defragment it, then etcdctl alarm disarm"
            )))
        }
        code::DEADLINE_EXCEEDED | code::UNAVAILABLE => {
            Failure::Endpoint(StoreError::TimedOut(told))
        }
        _ => Failure::Store(StoreError::Refused(told)),
    }
}

/// Returns the failure of a login, or nothing if the store has no authentication.
pub(super) fn of_login(url: &str, user: &str, answer: &HttpAnswer) -> Result<(), Failure> {
    match decode_problem(&answer.body) {
        Some((code::FAILED_PRECONDITION, text)) if text.contains("not enabled") => Ok(()),
        Some((code::INVALID_ARGUMENT, text)) if text.contains("authentication failed") => {
            Err(Failure::Store(StoreError::Denied(format!(
                "etcd at {url} knows no user {user} with this password; see fleet.username and fleet.password-file"
            ))))
        }
        _ => Err(of_status(url, answer)),
    }
}

/// Returns the failure of an endpoint that does not answer as etcd.
pub(super) fn of_stranger(url: &str, answer: &HttpAnswer) -> Failure {
    let status = answer.status;
    let body = String::from_utf8_lossy(&answer.body);
    // The gateway answers so before it looks at the request.
    if body.contains("CommonName") {
        return Failure::Store(StoreError::Denied(format!(
            "etcd at {url} takes no certificate with a CommonName over its gateway while its authentication is on; use one without"
        )));
    }
    Failure::Endpoint(StoreError::Refused(match &answer.location {
        Some(target) if (300..400).contains(&status) => {
            format!("{url} leads elsewhere ({}); give the URL of etcd itself", short(target))
        }
        _ => {
            format!("{url} is no etcd: it has answered with status {status} and {:?}", short(&body))
        }
    }))
}

/// Returns the failure of an answer that cannot be read. The request may have been carried out.
pub(super) fn corrupt(url: &str, problem: &str) -> Failure {
    let text = format!("the answer of etcd at {url} cannot be read: {problem}");
    Failure::Endpoint(StoreError::TimedOut(text))
}

/// Returns one error for all failures of one request. If an attempt may have been carried out, that is told before all else;
/// a refusal goes before endpoints that cannot be reached, as only a person can mend it.
pub(super) fn sum(failures: &[StoreError]) -> StoreError {
    let may_be_done = failures.iter().any(|it| matches!(it, StoreError::TimedOut(_)));
    let is_refusal = |it: &&StoreError| !matches!(it, StoreError::Unreachable(_));
    if let Some(refusal) = failures.iter().find(is_refusal).filter(|_| !may_be_done) {
        return refusal.clone();
    }
    let mut texts: Vec<String> = failures.iter().map(ToString::to_string).collect();
    texts.dedup();
    let text = texts.join("; ");
    if may_be_done { StoreError::TimedOut(text) } else { StoreError::Unreachable(text) }
}

/// Returns the beginning of a foreign text, as one line.
fn short(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ").chars().take(QUOTE_MAX).collect()
}
