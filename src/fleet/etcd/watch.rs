//! `Watch`: news of changed keys, which only wake. A read decides what has changed.

use std::{
    io::{BufRead, BufReader, Read as _},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use ureq::{Agent, tls::TlsConfig};

use super::{
    http,
    words::{self, WatchLine},
};

/// Most bytes of one line.
const LINE_BYTES_MAX: u64 = 2 << 20;

/// Longest time of connecting.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// Pause behind a stream that has ended early.
const RETRY: Duration = Duration::from_secs(1);

/// Watch of all keys with a prefix, for a thread of its own.
#[derive(Debug)]
pub(crate) struct Watch {
    tls: TlsConfig,
    needs_token: bool,
    shared: Arc<Shared>,
}

/// One stream of news: its client, which ends it, its endpoint and its rights.
pub(super) struct Stream {
    agent: Agent,
    url: String,
    token: Option<String>,
    prefix: String,
}

/// State that client and watch share.
#[derive(Debug)]
pub(super) struct Shared {
    state: Mutex<SharedState>,
    changed: Condvar,
}

#[derive(Debug)]
struct SharedState {
    /// Endpoint of the requests.
    url: String,
    /// Begin of the keys that are looked at.
    prefix: String,
    /// Token of the last login; it is empty if the store asks nobody for one.
    token: Option<String>,
    /// Client of the stream that is open.
    stream: Option<Agent>,
    is_stopped: bool,
}

/// Ends or turns a watch from another thread.
#[derive(Debug, Clone)]
pub(crate) struct WatchStopper(Arc<Shared>);

impl WatchStopper {
    /// Ends the watch: [`Watch::run`] returns, after the time of connecting at most.
    pub(crate) fn stop(&self) {
        self.0.change(|state| state.is_stopped = true);
    }

    /// Has the watch look at keys with this prefix from now on.
    pub(crate) fn look_at(&self, prefix: &str) {
        self.0.change(|state| prefix.clone_into(&mut state.prefix));
    }
}

impl Watch {
    pub(super) fn new(tls: TlsConfig, needs_token: bool, shared: Arc<Shared>) -> Self {
        Self { tls, needs_token, shared }
    }

    pub(crate) fn stopper(&self) -> WatchStopper {
        WatchStopper(Arc::clone(&self.shared))
    }

    /// Calls `wake` whenever a key with `prefix` may have changed, until it is stopped. A stream without a word for `silence`
    /// is dead or at rest: it is begun anew, and so is one at an endpoint that requests have left.
    pub(crate) fn run(&self, prefix: &str, silence: Duration, mut wake: impl FnMut()) {
        prefix.clone_into(&mut self.shared.lock().prefix);
        while let Some(stream) = self.begin() {
            let began = Instant::now();
            let reason = self.follow(&stream, silence, &mut wake);
            log::debug!("the watch at etcd {} has ended: {reason}", stream.url);
            let was_early = began.elapsed() < silence.min(RETRY);
            self.end(&stream, if was_early { RETRY } else { Duration::ZERO });
        }
    }

    /// Takes note of a new stream. Returns `None` once the watch is stopped.
    pub(super) fn begin(&self) -> Option<Stream> {
        let agent = http::agent_of_watch(self.tls.clone());
        let mut state = self.shared.lock();
        state.stream = Some(agent.clone());
        (!state.is_stopped).then(|| Stream {
            agent,
            url: state.url.clone(),
            token: state.token.clone(),
            prefix: state.prefix.clone(),
        })
    }

    /// Waits until endpoint or token differ, the watch is stopped, or the pause is over.
    fn end(&self, stream: &Stream, pause: Duration) {
        let mut state = self.shared.lock();
        state.stream = None;
        drop(self.shared.changed.wait_timeout_while(state, pause, |state| {
            !state.is_stopped
                && state.url == stream.url
                && state.token == stream.token
                && state.prefix == stream.prefix
        }));
    }

    /// Follows one stream to its end, and returns the reason.
    pub(super) fn follow(
        &self,
        stream: &Stream,
        silence: Duration,
        wake: &mut impl FnMut(),
    ) -> String {
        if self.needs_token && stream.token.is_none() {
            return "no request has logged in yet".to_owned();
        }
        let connect = CONNECT_TIMEOUT.min(silence);
        let request = stream
            .agent
            .post(format!("{}{}", stream.url, words::WATCH_PATH))
            .config()
            .timeout_connect(Some(connect))
            .timeout_per_read(Some(silence))
            .timeout_per_write(Some(silence))
            .build()
            .header("content-type", "application/json")
            // Without a leader the stream is to end instead of falling silent.
            .header("Grpc-Metadata-hasleader", "true");
        let request = match &stream.token {
            Some(token) if !token.is_empty() => request.header("authorization", token),
            _ => request,
        };
        let mut response = match request.send(words::encode_watch(&stream.prefix)) {
            Ok(response) => response,
            Err(error) => return error.to_string(),
        };
        if response.status() != 200 {
            return format!("the answer has status {}", response.status().as_u16());
        }
        let reader = response.body_mut().with_config().limit(u64::MAX).reader();
        let mut reader = BufReader::new(reader);
        let mut line = Vec::new();
        loop {
            line.clear();
            match (&mut reader).take(LINE_BYTES_MAX).read_until(b'\n', &mut line) {
                Ok(0) => return "it was closed".to_owned(),
                Ok(_) => {}
                Err(error) => return error.to_string(),
            }
            match words::decode_watch(&line) {
                // What has changed before it began is seen by nobody else.
                WatchLine::Created | WatchLine::Changed => wake(),
                WatchLine::Other => {}
                WatchLine::Ended(reason) => return reason,
            }
        }
    }
}

impl Shared {
    pub(super) fn new(url: &str) -> Self {
        let state = SharedState {
            url: url.to_owned(),
            prefix: String::new(),
            token: None,
            stream: None,
            is_stopped: false,
        };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    pub(super) fn token(&self) -> Option<String> {
        self.lock().token.clone()
    }

    pub(super) fn set_token(&self, token: String) {
        self.lock().token = Some(token);
        self.changed.notify_all();
    }

    /// Leads the watch to another endpoint.
    pub(super) fn set_url(&self, url: &str) {
        self.change(|state| url.clone_into(&mut state.url));
    }

    /// Changes the state, and ends the stream that is open.
    fn change(&self, change: impl FnOnce(&mut SharedState)) {
        let mut state = self.lock();
        change(&mut state);
        let stream = state.stream.take();
        drop(state);
        self.changed.notify_all();
        if let Some(agent) = stream {
            agent.shutdown();
        }
    }

    fn lock(&self) -> MutexGuard<'_, SharedState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
