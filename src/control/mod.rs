//! Control API: a front that checks every request, an executor that carries it out, and `tiny_http` behind it.
//!
//! ```text
//! caller ─▶ front: one thread, one Poll ─ Job ─▶ executor: may block ─▶ backend: tiny_http
//!        ◀─ bounds, checks, waits for idle ◀─ Outcome ─┘ executes a command once   writes the answer
//! ```
//!
//! - The front reads a request and parses it into a `Command`, which also tells the event that its answer waits for.
//! - The executor carries the command out and has the backend write the answer, or writes it where the backend cannot.
//! - A pause is owned by a `PendingPause` until it is committed. Dropped anywhere, it undoes the pause.
//! - Job and connection share the place of the outcome. A job that nobody awaits is not carried out.
//! - Requests about the fleet have an executor of their own, as etcd may not answer: a pause of this host waits for none.
//! - Switches of the upstream have one, too, as they write to a disk.
//! - The front may block for a second, too: where it ends the last pause, it waits for the look-up of a name.
//! - `tiny_http` alone can be aborted with one packet and frozen with two lines: it parses nothing that a caller has sent.
//!   Names and reasons pass it in the bodies of answers.

mod backend;
mod body;
mod command;
mod conn;
mod connections;
mod executor;
mod fleet;
mod hosts;
mod index;
mod lift;
mod listener;
mod metrics;
mod page;
mod pending;
mod query;
mod request;
mod response;
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
use crossbeam_channel::bounded;
use executor::Executor;
pub(crate) use hosts::HostPolicy;
pub(crate) use index::Scope;
use listener::ControlListener;
pub(crate) use listener::{ControlListenersWords, ControlWords, Notifier};
use log::error;
use metrics::Source;
use mio::Poll;

use crate::{
    error::Error, fleet::Fleet, handle::Handle, handover::parcel::Incoming, log_limit::LogLimit,
    pause::leases::PROGRAM,
};

/// Most bytes of one read.
const READ_BYTES: usize = 16 << 10;
/// Rest after a failure for want of descriptors or threads.
const RETRY_INTERVAL: Duration = Duration::from_millis(100);

/// Callers of another process, with their parcel.
pub(crate) type Inherited = (ControlWords, Incoming);

/// Running control API. Dropped, it answers or closes open connections and ends its threads.
#[derive(Debug)]
pub(crate) struct Control {
    notifier: Arc<Notifier>,
    /// The front goes first: without it, the executor ends.
    threads: Vec<JoinHandle<()>>,
}

impl Control {
    /// Serves the API on `listeners`, bound, listening, non-blocking sockets, for up to `callers_max` callers at once. It goes on
    /// with the callers of another process, if there are any.
    pub(crate) fn start(
        listeners: Vec<(OwnedFd, Scope)>,
        handle: Handle,
        fleet: Option<Fleet>,
        hosts: HostPolicy,
        callers_max: usize,
        inherited: Option<Inherited>,
    ) -> Result<Self, Error> {
        Backend::start()
            .and_then(|backend| {
                let timeouts = TIMEOUTS;
                let parts =
                    assemble(listeners, (handle, fleet), hosts, callers_max, backend, timeouts)?;
                Self::start_with(parts, inherited)
            })
            .map_err(|error| match error.kind() {
                // Sockets that are made and bound give it to no one; a thread that is refused does.
                io::ErrorKind::WouldBlock => Error::no_thread("answers the control API", &error),
                _ => Error::System(format!("the control API cannot start: {error}")),
            })
    }

    fn start_with(parts: Parts, inherited: Option<Inherited>) -> io::Result<Self> {
        let Parts { notifier, mut front, executors } = parts;
        if let Some((words, parcel)) = inherited {
            front.inherit(words, parcel)?;
        }
        let mut threads = Vec::new();
        for (name, executor) in executors {
            threads.push(Builder::new().name(name.into()).spawn(move || executor.run())?);
        }
        threads.insert(0, Builder::new().name("control-front".into()).spawn(move || front.run())?);
        Ok(Self { notifier, threads })
    }
}

/// Parts of an API whose threads do not run yet.
struct Parts {
    notifier: Arc<Notifier>,
    front: ControlListener,
    /// Each with the name of its thread.
    executors: Vec<(&'static str, Executor)>,
}

/// Makes the parts of an API.
fn assemble(
    listeners: Vec<(OwnedFd, Scope)>,
    (handle, fleet): (Handle, Option<Fleet>),
    hosts: HostPolicy,
    callers_max: usize,
    backend: Backend,
    timeouts: Timeouts,
) -> io::Result<Parts> {
    let poll = Poll::new()?;
    let notifier = Arc::new(Notifier::new(&poll)?);
    let idle_notifier = Arc::clone(&notifier);
    handle.pauses().watch_idle(move || idle_notifier.notify_idle());
    let upstream_notifier = Arc::clone(&notifier);
    handle.watch_upstreams(move || upstream_notifier.notify_idle());
    let pause_notifier = Arc::clone(&notifier);
    handle.pauses().watch(move || pause_notifier.notify());
    let upgrade_notifier = Arc::clone(&notifier);
    handle.upgrade_requests().watch(move || upgrade_notifier.notify());
    if let Some(fleet) = &fleet {
        let fleet_notifier = Arc::clone(&notifier);
        fleet.watch(Box::new(move || fleet_notifier.notify()));
    }
    let metrics = Arc::new(Source::new());
    // A caller has one job at a time.
    let (sender, jobs) = bounded(callers_max);
    let executor = |jobs, fleet, backend| Executor {
        jobs,
        handle: handle.clone(),
        fleet,
        backend,
        metrics: Arc::clone(&metrics),
        notifier: Arc::clone(&notifier),
        silence: timeouts.silence,
        log_limit: LogLimit::default(),
    };
    let mut executors = vec![("control", executor(jobs, None, backend))];
    let (switch_jobs, jobs) = bounded(callers_max);
    executors.push(("control-switch", executor(jobs, None, Backend::without())));
    let fleet_jobs = fleet.map(|fleet| {
        let (sender, jobs) = bounded(callers_max);
        executors.push(("control-fleet", executor(jobs, Some(fleet), Backend::without())));
        sender
    });
    let context = ControlContext {
        notifier: Arc::clone(&notifier),
        handle,
        jobs: sender,
        fleet_jobs,
        switch_jobs,
        metrics,
        hosts,
        timeouts,
        waiters_max: callers_max / 2,
        permit: Arc::new(()),
        last_request_id: PROGRAM,
        scratch: vec![0; READ_BYTES],
        short_until: None,
        stops_at: None,
        log_limit: LogLimit::default(),
    };
    let front = ControlListener::new(poll, listeners, callers_max, context)?;
    Ok(Parts { notifier, front, executors })
}

impl Control {
    /// Returns the way to wake the front.
    pub(crate) fn notifier(&self) -> Arc<Notifier> {
        Arc::clone(&self.notifier)
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.notifier.stop();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                error!("a defect: a thread of the control API panicked");
            }
        }
    }
}

/// Longest waits of the control API.
#[derive(Debug, Clone, Copy)]
struct Timeouts {
    /// For the outcome of a request.
    outcome: Duration,
    /// For each step of the private server.
    silence: Duration,
    /// For a caller's whole request, and for it to take the whole answer. With `linger`, a bad caller is gone after 5 s.
    exchange: Duration,
    /// For callers that should have gone: for one to close after its answer (closing first could reset it, and the answer
    /// would be lost); for an event where the caller has closed its sending side (over TCP nobody can tell whether it
    /// still listens); and for all of them together when the API stops.
    linger: Duration,
}

const TIMEOUTS: Timeouts = Timeouts {
    outcome: Duration::from_secs(10),
    silence: Duration::from_secs(1),
    exchange: Duration::from_secs(4),
    linger: Duration::from_secs(1),
};
