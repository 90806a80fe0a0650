//! The control API: a front that checks every request, and a private `tiny_http` server behind it that answers them.
//!
//! ```text
//! caller ──▶ front: one thread, one Poll ──▶ private UNIX socket ──▶ tiny_http ──▶ routes ──▶ Handle
//!            bounds, deadlines, checks        one request each                     one thread
//! ```
//!
//! `tiny_http` alone can be aborted with one packet and frozen with two lines; it never meets a byte that the front has not checked.

mod backend;
mod body;
mod conn;
mod listener;
mod pending;
mod query;
mod request;
mod response;
mod routes;
#[cfg(test)]
mod tests;

use std::{
    io,
    os::fd::OwnedFd,
    sync::Arc,
    thread::{Builder, JoinHandle},
    time::Duration,
};

use backend::Backend;
use conn::ControlContext;
use listener::{ControlListener, Notifier};
use log::error;
use mio::Poll;
pub(crate) use request::HostPolicy;

use crate::{error::Error, handle::Handle, log_limit::LogLimit, pause::leases::PROGRAM};

const READ_BYTES: usize = 16 << 10;

/// A running control API. Dropped, it answers or closes what is open and ends its threads.
#[derive(Debug)]
pub(crate) struct Control {
    bell: Arc<Notifier>,
    front: Option<JoinHandle<()>>,
}

impl Control {
    /// Serves the API on `listeners`, bound, listening, non-blocking sockets, for up to `callers_max` callers at once.
    pub(crate) fn start(
        listeners: Vec<OwnedFd>,
        handle: Handle,
        hosts: HostPolicy,
        callers_max: usize,
    ) -> Result<Self, Error> {
        Backend::start(handle.clone())
            .and_then(|private| {
                Self::start_with(listeners, handle, hosts, callers_max, private, TIMEOUTS)
            })
            .map_err(|error| match error.kind() {
                // Sockets that are made and bound give it to no one; a thread that is refused does.
                io::ErrorKind::WouldBlock => Error::no_thread("answers the control API", &error),
                _ => Error::System(format!("the control API cannot start: {error}")),
            })
    }

    fn start_with(
        listeners: Vec<OwnedFd>,
        handle: Handle,
        hosts: HostPolicy,
        callers_max: usize,
        private: Backend,
        timeouts: Timeouts,
    ) -> io::Result<Self> {
        let poll = Poll::new()?;
        let bell = Arc::new(Notifier::new(&poll)?);
        let idle_bell = Arc::clone(&bell);
        handle.pauses().gate.watch_idle(move || idle_bell.idle());
        let pause_bell = Arc::clone(&bell);
        handle.pauses().watch(move || pause_bell.ring());
        let means = ControlContext {
            bell: Arc::clone(&bell),
            handle,
            private,
            hosts,
            timeouts,
            waiters_max: callers_max / 2,
            seat: Arc::new(()),
            last_request_id: PROGRAM,
            scratch: vec![0; READ_BYTES],
            short_until: None,
            stops_at: None,
            troubles: LogLimit::default(),
        };
        let front = ControlListener::new(poll, listeners, callers_max, means)?;
        let front = Builder::new().name("control-front".into()).spawn(move || front.run())?;
        Ok(Self { bell, front: Some(front) })
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.bell.stop();
        if self.front.take().is_some_and(|front| front.join().is_err()) {
            error!("a defect: a thread of the control API panicked");
        }
    }
}

/// The times for which the front waits.
#[derive(Debug, Clone, Copy)]
struct Timeouts {
    /// For the private server, asked over and over.
    ask: Duration,
    /// For a caller's whole request, and for it to take the whole answer. With `linger`, a bad caller is gone after 5 s.
    exchange: Duration,
    /// For callers that should have gone: for one to close after its answer (closing first could reset it, and the answer
    /// would be lost); for idle where the caller has closed its sending side (over TCP nobody can tell whether it still
    /// listens); and for all of them together when the API stops.
    linger: Duration,
}

const TIMEOUTS: Timeouts = Timeouts {
    ask: Duration::from_secs(10),
    exchange: Duration::from_secs(4),
    linger: Duration::from_secs(1),
};
