//! Requests and answers as the JSON of the gateway: 64-bit numbers are strings, keys and values base64, and zeros may be missing.

use std::time::Duration;

use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde::{Deserialize, Deserializer, de::DeserializeOwned};
use serde_json::{Value, json};

use super::{
    answer::{HttpAnswer, Problem},
    failure::{self, Failure},
    files::Login,
};
use crate::fleet::store::{
    Answer, Compare, KeyValue, Keys, LeaseId, Operation, Reply, Request, Revision, StoreError,
    Transaction,
};

pub(super) const LOGIN_PATH: &str = "/v3/auth/authenticate";
pub(super) const WATCH_PATH: &str = "/v3/watch";

/// Oldest version with the paths `/v3/`.
const OLDEST: (u64, u64) = (3, 4);

/// Returns path and body of a request.
pub(super) fn encode(request: &Request) -> (&'static str, String) {
    let (path, body) = match request {
        // The store counts in whole seconds, and a lease must not end early.
        Request::Grant { ttl } => {
            let seconds = ttl.as_secs() + u64::from(ttl.subsec_nanos() > 0);
            ("/v3/lease/grant", json!({ "TTL": seconds.to_string() }))
        }
        Request::KeepAlive { lease } => {
            ("/v3/lease/keepalive", json!({ "ID": lease.0.to_string() }))
        }
        Request::Revoke { lease } => ("/v3/lease/revoke", json!({ "ID": lease.0.to_string() })),
        Request::Transact(transaction) => ("/v3/kv/txn", encode_transaction(transaction)),
    };
    (path, body.to_string())
}

fn encode_transaction(transaction: &Transaction) -> Value {
    let operations = |list: &[Operation]| list.iter().map(encode_operation).collect::<Vec<_>>();
    json!({
        "compare": transaction.compares.iter().map(encode_compare).collect::<Vec<_>>(),
        "success": operations(&transaction.then),
        "failure": operations(&transaction.otherwise),
    })
}

fn encode_compare(compare: &Compare) -> Value {
    match compare {
        Compare::Absent { key } => {
            json!({ "key": base64(key), "target": "CREATE", "result": "EQUAL", "create_revision": "0" })
        }
        Compare::Present { key } => {
            json!({ "key": base64(key), "target": "CREATE", "result": "GREATER", "create_revision": "0" })
        }
        Compare::ModifiedAt { key, revision } => {
            json!({ "key": base64(key), "target": "MOD", "result": "EQUAL", "mod_revision": revision.0.to_string() })
        }
        Compare::Value { key, value } => {
            json!({ "key": base64(key), "target": "VALUE", "result": "EQUAL", "value": base64(value) })
        }
    }
}

fn encode_operation(operation: &Operation) -> Value {
    match operation {
        Operation::Put { key, value, lease } => {
            let lease = lease.map_or(0, |lease| lease.0).to_string();
            json!({ "request_put": { "key": base64(key), "value": base64(value), "lease": lease } })
        }
        Operation::Delete { key } => json!({ "request_delete_range": { "key": base64(key) } }),
        // Without `serializable`, so that the member asks the others.
        Operation::Range { keys: Keys::One(key) } => {
            json!({ "request_range": { "key": base64(key) } })
        }
        Operation::Range { keys: Keys::Prefix(prefix) } => {
            json!({ "request_range": { "key": base64(prefix), "range_end": prefix_end(prefix) } })
        }
    }
}

pub(super) fn encode_login(login: &Login) -> String {
    json!({ "name": login.username, "password": login.password }).to_string()
}

/// Returns the body that begins a watch of all keys with `prefix`. Without a start revision no compaction can matter.
pub(super) fn encode_watch(prefix: &str) -> String {
    json!({ "create_request": { "key": base64(prefix), "range_end": prefix_end(prefix) } })
        .to_string()
}

fn base64(text: &str) -> String {
    BASE64_STANDARD.encode(text)
}

/// Returns the first key behind all that begin with `prefix`.
fn prefix_end(prefix: &str) -> String {
    let mut end = prefix.as_bytes().to_vec();
    while let Some(last) = end.pop() {
        if let Some(next) = last.checked_add(1) {
            end.push(next);
            return BASE64_STANDARD.encode(end);
        }
    }
    // All keys.
    BASE64_STANDARD.encode([0])
}

/// Reads the answer to `request`. Returns it without the connection's number, and the member that has answered.
pub(super) fn decode(
    request: &Request,
    url: &str,
    answer: &HttpAnswer,
) -> Result<(Reply, u64), Failure> {
    if answer.status != 200 {
        return Err(failure::of_status(url, answer));
    }
    let (header, answer) = match request {
        Request::Grant { .. } => decode_grant(url, &answer.body)?,
        Request::KeepAlive { .. } => decode_renewal(url, &answer.body)?,
        Request::Revoke { .. } => {
            let revoked: Revoked = parse(url, &answer.body)?;
            (revoked.header, Answer::Revoked)
        }
        Request::Transact(transaction) => decode_transaction(transaction, url, &answer.body)?,
    };
    if header.cluster_id == 0 {
        return Err(failure::corrupt(url, "it names no cluster"));
    }
    let revision = Revision(header.revision);
    Ok((Reply { cluster: header.cluster_id, revision, connection: 0, answer }, header.member_id))
}

fn decode_grant(url: &str, body: &[u8]) -> Result<(Header, Answer), Failure> {
    let granted: Lease = parse(url, body)?;
    match granted.seconds {
        Some(seconds) if granted.id != 0 => {
            let ttl = Duration::from_secs(seconds);
            Ok((granted.header, Answer::Granted { lease: LeaseId(granted.id), ttl }))
        }
        _ => Err(failure::corrupt(url, "it names no lease")),
    }
}

/// Reads the first message of a stream, which has one for each request.
fn decode_renewal(url: &str, body: &[u8]) -> Result<(Header, Answer), Failure> {
    let first = body.split(|&byte| byte == b'\n').next().unwrap_or_default();
    let message: Streamed<Lease> = parse(url, first)?;
    match (message.result, message.error) {
        (Some(lease), None) => {
            let ttl = lease.seconds.map(Duration::from_secs);
            Ok((lease.header, Answer::Renewed { ttl }))
        }
        (_, Some(problem)) => Err(failure::of_store(url, problem.code(), &problem.message)),
        (None, None) => Err(failure::corrupt(url, "it is empty")),
    }
}

fn decode_transaction(
    transaction: &Transaction,
    url: &str,
    body: &[u8],
) -> Result<(Header, Answer), Failure> {
    let done: Transacted = parse(url, body)?;
    let branch = if done.succeeded { &transaction.then } else { &transaction.otherwise };
    if branch.len() != done.responses.len() {
        return Err(failure::corrupt(url, "it has another number of results"));
    }
    let mut found = Vec::new();
    for (operation, response) in branch.iter().zip(done.responses) {
        if !matches!(operation, Operation::Range { .. }) {
            continue;
        }
        let range =
            response.response_range.ok_or_else(|| failure::corrupt(url, "a range is missing"))?;
        let pairs: Option<Vec<_>> = range.kvs.into_iter().map(Pair::decode).collect();
        found.push(pairs.ok_or_else(|| failure::corrupt(url, "a key is no base64"))?);
    }
    Ok((done.header, Answer::Transacted { succeeded: done.succeeded, found }))
}

/// Reads a token, which is empty if the store asks nobody for one.
pub(super) fn decode_login(
    login: &Login,
    url: &str,
    answer: &HttpAnswer,
) -> Result<String, Failure> {
    if answer.status == 200 {
        let token: Token = parse(url, &answer.body)?;
        return Ok(token.token);
    }
    failure::of_login(url, &login.username, answer).map(|()| String::new())
}

/// Refuses an endpoint that is no etcd, or one that is too old.
pub(super) fn check_version(url: &str, answer: &HttpAnswer) -> Result<(), Failure> {
    if answer.status != 200 {
        return Err(failure::of_stranger(url, answer));
    }
    let told: Option<Version> = serde_json::from_slice(&answer.body).ok();
    let Some(version) = told.map(|told| told.etcdserver) else {
        return Err(failure::of_stranger(url, answer));
    };
    let mut parts = version.split(['.', '-']).map(str::parse);
    match (parts.next(), parts.next()) {
        (Some(Ok(major)), Some(Ok(minor))) if (major, minor) >= OLDEST => Ok(()),
        (Some(Ok(_)), Some(Ok(_))) => Err(Failure::Endpoint(StoreError::Refused(format!(
            "etcd at {url} is of version {version}, which is too old; etcd 3.4 or later is needed"
        )))),
        _ => Err(failure::of_stranger(url, answer)),
    }
}

/// Meaning of one line of a watch.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum WatchLine {
    /// The watch has begun.
    Created,
    /// Keys have changed.
    Changed,
    /// Nothing more will come.
    Ended(String),
    /// A sign of life.
    Other,
}

pub(super) fn decode_watch(line: &[u8]) -> WatchLine {
    let Ok(message) = serde_json::from_slice::<Streamed<Watched>>(line) else {
        return WatchLine::Ended("a line is no JSON".to_owned());
    };
    match (message.result, message.error) {
        (_, Some(problem)) => WatchLine::Ended(problem.message),
        (Some(watched), _) if watched.canceled => WatchLine::Ended(watched.cancel_reason),
        (Some(watched), _) if watched.created => WatchLine::Created,
        (Some(watched), _) if !watched.events.is_empty() => WatchLine::Changed,
        _ => WatchLine::Other,
    }
}

fn parse<T: DeserializeOwned>(url: &str, body: &[u8]) -> Result<T, Failure> {
    serde_json::from_slice(body).map_err(|error| failure::corrupt(url, &error.to_string()))
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Header {
    #[serde(deserialize_with = "number")]
    cluster_id: u64,
    #[serde(deserialize_with = "number")]
    member_id: u64,
    #[serde(deserialize_with = "number")]
    revision: i64,
}

#[derive(Deserialize)]
struct Lease {
    header: Header,
    #[serde(rename = "ID", default, deserialize_with = "number")]
    id: i64,
    /// Missing if there is no such lease.
    #[serde(rename = "TTL", default, deserialize_with = "seconds")]
    seconds: Option<u64>,
}

#[derive(Deserialize)]
struct Revoked {
    header: Header,
}

/// Message of a stream.
#[derive(Deserialize)]
struct Streamed<T> {
    result: Option<T>,
    error: Option<Problem>,
}

#[derive(Deserialize)]
struct Transacted {
    header: Header,
    #[serde(default)]
    succeeded: bool,
    #[serde(default)]
    responses: Vec<Response>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Response {
    response_range: Option<Range>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Range {
    kvs: Vec<Pair>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Pair {
    key: String,
    value: String,
    #[serde(deserialize_with = "number")]
    mod_revision: i64,
    #[serde(deserialize_with = "number")]
    lease: i64,
}

impl Pair {
    /// Returns the pair with its texts. Bytes of somebody else that are no text are shown as such.
    fn decode(self) -> Option<KeyValue> {
        let text = |it: &str| {
            BASE64_STANDARD.decode(it).ok().map(|it| String::from_utf8_lossy(&it).into_owned())
        };
        Some(KeyValue {
            key: text(&self.key)?,
            value: text(&self.value)?,
            modified: Revision(self.mod_revision),
            lease: (self.lease != 0).then_some(LeaseId(self.lease)),
        })
    }
}

#[derive(Deserialize)]
struct Token {
    token: String,
}

#[derive(Deserialize)]
struct Version {
    etcdserver: String,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Watched {
    created: bool,
    canceled: bool,
    cancel_reason: String,
    events: Vec<serde::de::IgnoredAny>,
}

/// Number, as such or as a string.
#[derive(Deserialize)]
#[serde(untagged)]
enum Number<T> {
    Bare(T),
    Quoted(String),
}

fn number<'de, D: Deserializer<'de>, T: Deserialize<'de> + std::str::FromStr>(
    from: D,
) -> Result<T, D::Error> {
    match Number::deserialize(from)? {
        Number::Bare(number) => Ok(number),
        Number::Quoted(text) => {
            text.parse().map_err(|_| serde::de::Error::custom(format!("{text:?} is no number")))
        }
    }
}

fn seconds<'de, D: Deserializer<'de>>(from: D) -> Result<Option<u64>, D::Error> {
    let seconds: i64 = number(from)?;
    Ok(u64::try_from(seconds).ok().filter(|&seconds| seconds > 0))
}
