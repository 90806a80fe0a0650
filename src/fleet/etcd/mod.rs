//! `Etcd`: the store of a fleet, over the JSON gateway of etcd 3.4 and later.

mod answer;
mod failure;
mod files;
mod http;
#[cfg(test)]
mod tests;
mod watch;
mod words;

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};

#[allow(unused_imports, reason = "the thread follows")]
pub(crate) use watch::{Watch, WatchStopper};

use super::store::{Reply, Request, Store, StoreError, StoreSettings};
use crate::error::Error;

use answer::HttpAnswer;
use failure::Failure;
use files::Login;
use http::Http;
use watch::Shared;

/// Client of etcd that asks one endpoint at a time, and the next one once that fails.
#[derive(Debug)]
pub(crate) struct Etcd {
    http: Http,
    /// Endpoint in use.
    endpoint: Endpoint,
    /// All others, in the order in which they are tried.
    others: VecDeque<Endpoint>,
    login: Option<Login>,
    shared: Arc<Shared>,
}

/// URL of a member, and facts about the connection to it.
#[derive(Debug)]
struct Endpoint {
    url: String,
    /// True once it has told a version that is new enough.
    is_checked: bool,
    /// Number of the connection, and the member behind it: a balancer may spread the requests of one connection.
    connection: u64,
    member: u64,
}

impl Etcd {
    /// Reads all files that the settings name. Nothing is connected yet.
    pub(crate) fn new(settings: &StoreSettings) -> Result<Self, Error> {
        let urls = files::endpoints(settings)?;
        let mut endpoints: VecDeque<Endpoint> = urls.into_iter().map(Endpoint::new).collect();
        let endpoint =
            endpoints.pop_front().ok_or_else(|| files::refuse("fleet.endpoints", "is empty"))?;
        let shared = Arc::new(Shared::new(&endpoint.url));
        Ok(Self {
            http: Http::new(files::tls(settings)?),
            login: files::login(settings)?,
            endpoint,
            others: endpoints,
            shared,
        })
    }

    /// Returns another client of the same store. It has connections and a login of its own.
    pub(crate) fn another(&self) -> Self {
        let another = |endpoint: &Endpoint| Endpoint::new(endpoint.url.clone());
        Self {
            http: Http::new(self.http.tls()),
            endpoint: another(&self.endpoint),
            others: self.others.iter().map(another).collect(),
            login: self.login.clone(),
            shared: Arc::new(Shared::new(&self.endpoint.url)),
        }
    }

    /// Returns a watch that follows this client: it asks the same endpoint, by the same rights.
    pub(crate) fn watch(&self) -> Watch {
        Watch::new(self.http.tls(), self.login.is_some(), Arc::clone(&self.shared))
    }

    /// Carries out one request at the endpoint in use.
    fn ask_endpoint(&mut self, request: &Request, deadline: Instant) -> Result<Reply, Failure> {
        if !self.endpoint.is_checked {
            let answer = self.http.get(&self.endpoint.url, "/version", deadline)?;
            self.endpoint.note(&answer);
            words::check_version(&self.endpoint.url, &answer)?;
            self.endpoint.is_checked = true;
        }
        if self.login.is_some() && self.shared.token().is_none() {
            self.log_in(deadline)?;
        }
        match self.post(request, deadline) {
            Err(Failure::LoginNeeded(_)) if self.login.is_some() => {
                self.log_in(deadline)?;
                self.post(request, deadline)
            }
            result => result,
        }
    }

    fn post(&mut self, request: &Request, deadline: Instant) -> Result<Reply, Failure> {
        let (path, body) = words::encode(request);
        let token = self.shared.token();
        let answer = self.http.post(&self.endpoint.url, path, token.as_deref(), &body, deadline)?;
        self.endpoint.note(&answer);
        let (reply, member) = words::decode(request, &self.endpoint.url, &answer)?;
        Ok(Reply { connection: self.endpoint.number(member, &self.http), ..reply })
    }

    /// Gets a token for user and password. A store without authentication needs none.
    fn log_in(&mut self, deadline: Instant) -> Result<(), Failure> {
        let Some(login) = &self.login else { return Ok(()) };
        let body = words::encode_login(login);
        let path = words::LOGIN_PATH;
        let answer = self.http.post(&self.endpoint.url, path, None, &body, deadline)?;
        self.endpoint.note(&answer);
        self.shared.set_token(words::decode_login(login, &self.endpoint.url, &answer)?);
        Ok(())
    }

    /// Leads requests, and the watch with them, to the next endpoint.
    fn move_on(&mut self) {
        self.endpoint.is_checked = false;
        if let Some(next) = self.others.pop_front() {
            self.others.push_back(std::mem::replace(&mut self.endpoint, next));
            self.shared.set_url(&self.endpoint.url);
        }
    }
}

impl Store for Etcd {
    fn ask(&mut self, request: &Request, timeout: Duration) -> Result<Reply, StoreError> {
        let deadline = Instant::now() + timeout;
        let mut failures = Vec::new();
        // With one endpoint too a second attempt may succeed, as the store may have closed the connection meanwhile.
        for _ in 0..=self.others.len().max(1) {
            let (error, is_last) = match self.ask_endpoint(request, deadline) {
                Ok(reply) => return Ok(reply),
                Err(Failure::Store(StoreError::NoSuchLease)) => {
                    return Err(StoreError::NoSuchLease);
                }
                Err(Failure::Store(error)) => (error, true),
                Err(Failure::LoginNeeded(text)) => (StoreError::Denied(text), true),
                Err(Failure::Endpoint(error)) => (error, false),
            };
            failures.push(error);
            if is_last {
                break;
            }
            self.move_on();
            if Instant::now() >= deadline {
                break;
            }
        }
        Err(failure::sum(&failures))
    }
}

impl Endpoint {
    fn new(url: String) -> Self {
        Self { url, is_checked: false, connection: 0, member: 0 }
    }

    /// Takes the number of a new connection over, whichever request has made it.
    fn note(&mut self, answer: &HttpAnswer) {
        self.connection = answer.connection.unwrap_or(self.connection);
    }

    /// Returns the number of the connection over which `member` has answered.
    fn number(&mut self, member: u64, http: &Http) -> u64 {
        if self.member != member {
            self.connection = http.next_number();
        }
        self.member = member;
        self.connection
    }
}
