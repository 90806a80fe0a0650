//! The control API: a front that checks every request, and a private `tiny_http` server behind it that answers them.
//!
//! ```text
//! caller ──▶ front: one thread, one Poll ──▶ private UNIX socket ──▶ tiny_http ──▶ routes ──▶ Handle
//!            bounds, deadlines, checks        one request each                     one thread
//! ```
//!
//! `tiny_http` alone can be aborted with one packet and frozen with two lines; it never meets a byte that the front has not checked.

mod answer;
mod caller;
mod front;
mod private;
mod request;
mod routes;
#[cfg(test)]
mod tests;

use std::{
    fmt, io,
    os::fd::OwnedFd,
    sync::Arc,
    thread::{Builder, JoinHandle},
    time::{Duration, Instant},
};

use front::Front;
use log::error;
use mio::Waker;
use private::Private;
pub(crate) use request::HostPolicy;

use crate::{Error, Handle};

/// How many descriptors a caller may need: its socket, and the private connection with what `tiny_http` makes of it.
pub(crate) const CALLER_FILES: usize = 4;

/// A running control API. Dropped, it answers or closes what is open and ends its threads.
pub(crate) struct Control {
    private: Arc<Private>,
    stop_front: Waker,
    serving: Option<JoinHandle<()>>,
    front: Option<JoinHandle<()>>,
}

impl Control {
    /// Serves the API on `listener`, a bound, listening, non-blocking socket, for up to `callers_max` callers at once.
    pub(crate) fn start(
        listener: OwnedFd,
        is_unix: bool,
        handle: Handle,
        hosts: HostPolicy,
        callers_max: usize,
    ) -> Result<Self, Error> {
        Self::start_with(listener, is_unix, handle, hosts, callers_max, Timeouts::default())
    }

    fn start_with(
        listener: OwnedFd,
        is_unix: bool,
        handle: Handle,
        hosts: HostPolicy,
        callers_max: usize,
        timeouts: Timeouts,
    ) -> Result<Self, Error> {
        let refused =
            |error: io::Error| Error::System(format!("the control API cannot start: {error}"));
        let (private, inbox) = Private::new(callers_max / 2).map_err(refused)?;
        let private = Arc::new(private);
        let (front, stop_front) =
            Front::new(listener, is_unix, hosts, Arc::clone(&private), callers_max, timeouts)
                .map_err(refused)?;
        // From here on the drop of `control` ends whatever has been started.
        let mut control =
            Self { private: Arc::clone(&private), stop_front, serving: None, front: None };
        let watched = Arc::clone(&private);
        handle.on_idle(move || watched.idle());
        let serve = move || private::serve(&private, &inbox, &handle);
        control.serving =
            Some(Builder::new().name("control".into()).spawn(serve).map_err(refused)?);
        control.front = Some(
            Builder::new()
                .name("control-front".into())
                .spawn(move || front.run())
                .map_err(refused)?,
        );
        Ok(control)
    }

    /// Answers or closes what is open, ends the threads and removes the private directory.
    pub(crate) fn shut_down(self) {
        drop(self);
    }
}

impl Drop for Control {
    /// The serving thread ends first, so that the front can still deliver its last answers.
    fn drop(&mut self) {
        self.private.stop();
        join(self.serving.take());
        match self.stop_front.wake() {
            Ok(()) => join(self.front.take()),
            Err(error) => error!("the control API cannot be woken to stop: {error}"),
        }
    }
}

impl fmt::Debug for Control {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Control").finish_non_exhaustive()
    }
}

fn join(thread: Option<JoinHandle<()>>) {
    if thread.is_some_and(|thread| thread.join().is_err()) {
        error!("a defect: a thread of the control API panicked");
    }
}

/// How long the front waits for a caller.
#[derive(Debug, Clone, Copy)]
struct Timeouts {
    /// For the whole request.
    request: Duration,
    /// For the caller to take the whole answer.
    answer: Duration,
    /// For the caller to close after the answer: closing first could reset it, and the answer would be lost.
    linger: Duration,
    /// For the answer to a caller that has closed its sending side. Over TCP nobody can tell whether it still listens, so it may not wait for long.
    half_closed: Duration,
    /// For all callers together when the API stops.
    stop: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        let second = Duration::from_secs(1);
        Self {
            request: 5 * second,
            answer: 5 * second,
            linger: second,
            half_closed: second,
            stop: second,
        }
    }
}

/// Logs errors that may repeat quickly, at most one a second.
#[derive(Default)]
struct Seldom {
    last: Option<Instant>,
}

impl Seldom {
    fn error(&mut self, text: &str) {
        if self.last.is_none_or(|last| last.elapsed() >= Duration::from_secs(1)) {
            self.last = Some(Instant::now());
            error!("{text}");
        }
    }
}
