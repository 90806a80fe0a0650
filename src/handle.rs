//! `Handle`: what the operator can do with a running proxy.

use std::time::{Duration, SystemTime};

use serde::Serialize;

/// Pauses, resumes and observes a running proxy. Clones act on the same proxy.
#[derive(Clone)]
pub struct Handle;

/// A snapshot of the proxy, as `GET /status` shows it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Status {
    /// The version of tcpause.
    pub version: &'static str,
    /// Seconds since the proxy started.
    pub uptime_seconds: f64,
    /// Whether new clients are held or rejected now.
    pub paused: bool,
    /// Since when it is paused, in RFC 3339; null when it is not.
    pub paused_since: Option<String>,
    /// Clients that wait for the resume.
    pub held: u64,
    /// Connections whose upstream is being dialled.
    pub connecting: u64,
    /// Connections that are carried.
    pub active: u64,
    /// Clients accepted since the start.
    pub accepted: u64,
    /// Clients answered with a 503 since the start.
    pub rejected: u64,
    /// Connections whose upstream could not be reached since the start.
    pub failed: u64,
    /// Bytes carried from clients to the upstream.
    pub bytes_to_upstream: u64,
    /// Bytes carried from the upstream to clients.
    pub bytes_to_client: u64,
    /// The upstream as configured.
    pub upstream: String,
    /// The number of worker threads.
    pub threads: usize,
}

impl Handle {
    /// Pauses: from now on no new client is served. Returns whether it was running before.
    pub fn pause(&self) -> bool {
        unimplemented!()
    }

    /// Resumes: held clients are served. Returns whether it was paused before.
    pub fn resume(&self) -> bool {
        unimplemented!()
    }

    /// Whether it is paused.
    pub fn is_paused(&self) -> bool {
        unimplemented!()
    }

    /// Whether no connection is carried or dialled for at this moment.
    pub fn is_idle(&self) -> bool {
        unimplemented!()
    }

    /// Waits until no connection is carried or dialled for; false when the time is up first.
    pub fn wait_idle(&self, timeout: Option<Duration>) -> bool {
        let _ = timeout;
        unimplemented!()
    }

    /// Has `callback` called whenever the last connection has closed, on the thread that closed it: it must not block.
    pub fn on_idle(&self, callback: impl Fn() + Send + Sync + 'static) {
        let _ = callback;
    }

    /// A snapshot of all counts.
    pub fn status(&self) -> Status {
        unimplemented!("{:?}", SystemTime::now())
    }
}
