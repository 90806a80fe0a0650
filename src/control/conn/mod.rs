//! Caller of the control API: a small state machine from its first byte to its close.

mod executing;
mod pausing;
mod switching;
mod upgrading;
mod words;

use std::{
    io,
    net::SocketAddr,
    os::fd::{AsRawFd, OwnedFd},
    sync::Arc,
    time::Instant,
};

use crossbeam_channel::Sender;
use log::{debug, error};
use mio::{Interest, Registry, Token, event::Event, unix::SourceFd};
use rustix::{
    io::{Errno, retry_on_intr},
    net::{SendFlags, Shutdown, getpeername, send, shutdown},
};
use serde::{Deserialize, Serialize};

use super::{
    RETRY_INTERVAL, Timeouts,
    backend::unserved,
    command::{Awaited, Command},
    executor::{Job, Reply},
    hosts::HostPolicy,
    index::Scope,
    listener::Notifier,
    metrics::Source,
    pending::{PendingPause, wait_in_vain},
    query::{OnTimeout, Switch},
    request::{HEAD_BYTES_MAX, HttpError, Incoming, Progress, Request},
    response::Response,
};
use crate::{
    config::address::Address, fleet::BootTime, handle::Handle, handover::request::Attempt,
    log_limit::LogLimit, sys::peer_process,
};

use switching::{Examination, upstream_in_use};
pub(super) use words::CallerWords;

/// Most bytes that a caller may send behind its request before it is cut off.
const LINGER_BYTES_MAX: usize = 1 << 20;

const STOPPING: HttpError = (503, "tcpause is stopping.");
const STARVED: HttpError =
    (503, "The control API is busy, or lacks descriptors or threads: try again.");
const CROWDED: HttpError = (503, "Too many callers wait already: try again later.");

/// Everything that callers share.
pub(super) struct ControlContext {
    pub(super) notifier: Arc<Notifier>,
    pub(super) handle: Handle,
    /// The way to the executor.
    pub(super) jobs: Sender<Job>,
    /// The way to the executor of requests about the fleet, if there is one.
    pub(super) fleet_jobs: Option<Sender<Job>>,
    /// The way to the executor of switches.
    pub(super) switch_jobs: Sender<Job>,
    pub(super) metrics: Arc<Source>,
    pub(super) hosts: HostPolicy,
    pub(super) timeouts: Timeouts,
    /// Most callers that may wait at once; each has a clone of `permit`.
    pub(super) waiters_max: usize,
    pub(super) permit: Arc<()>,
    /// Number of the last request.
    pub(super) last_request_id: u64,
    pub(super) scratch: Vec<u8>,
    /// End of a rest: descriptors are short, and nobody is accepted before.
    pub(super) short_until: Option<Instant>,
    /// Moment at which the last caller has to be gone, once the control API stops.
    pub(super) stops_at: Option<Instant>,
    pub(super) log_limit: LogLimit,
}

impl ControlContext {
    /// Rests after a failure that may not last.
    pub(super) fn run_short(&mut self, of: &str, error: &io::Error) {
        self.short_until = Some(Instant::now() + RETRY_INTERVAL);
        self.log_failure(&format!("the control API cannot {of}: {error}; it is tried again"));
    }

    /// Logs a failure, at most one a second.
    pub(super) fn log_failure(&mut self, text: &str) {
        if let Some(more) = self.log_limit.allow(Instant::now()) {
            error!("{text}{more}");
        }
    }

    /// Takes one of the permits to wait.
    fn try_acquire(&self) -> Result<Arc<()>, HttpError> {
        let is_full = Arc::strong_count(&self.permit) > self.waiters_max;
        if is_full { Err(CROWDED) } else { Ok(Arc::clone(&self.permit)) }
    }
}

/// Connection of one caller.
pub(super) struct ControlConn {
    /// End of its state, whatever it does.
    pub(super) deadline: Option<Instant>,
    /// True while there may be something to do before.
    pub(super) ready: bool,
    socket: OwnedFd,
    /// Name of the caller, for the log.
    name: String,
    arrived: Instant,
    /// Requests that its listener is for.
    pub(super) scope: Scope,
    timeouts: Timeouts,
    peer: Peer,
    /// The bytes that it has sent.
    request: Incoming,
    /// Its pause, which is undone if the caller goes or is refused.
    pause: Option<PendingPause>,
    /// Permit to wait, until its answer begins.
    permit: Option<Arc<()>>,
    state: State,
}

/// Known condition of the caller's side of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Peer {
    Open,
    /// It has closed its sending side, and over TCP perhaps all.
    HalfClosed,
    /// It cannot be answered any more.
    Gone,
}

enum State {
    /// The request is arriving.
    Reading,
    /// The request waits until the proxy is idle.
    Waiting { idle_moments: u64, until: Option<Instant> },
    /// The executor has the request. A caller that has gone makes no difference to a change; a question goes with it.
    /// It is answered with `late` if its outcome does not come in time.
    Executing { reply: Reply, is_change: bool, late: HttpError },
    /// The pause that it has asked for waits until the proxy is idle.
    Pausing { on_timeout: OnTimeout, is_bound: bool },
    /// The upgrade that it has asked for is under way.
    Upgrading { attempt: Attempt },
    /// The upstream that it wants to switch to is examined, once it was driven.
    Switching { wanted: Switch, examination: Option<Examination> },
    /// The request waits until no connection to an upstream is left.
    AwaitingUpstream { address: Address, until: Option<Instant> },
    /// The answer is being written.
    Answering { bytes: Vec<u8>, sent: usize, then: Then },
    /// The answer is written; the pause lasts until the caller closes. It was told whether the pause is lost, of so many hosts
    /// that an operator has resumed, and for how long the pause is kept.
    ConnectionBound { told_lost: bool, told_forced: usize, told_kept: Option<BootTime> },
    /// The caller has ended its pause of the fleet, and waits until it has ended on all hosts.
    Ending,
    /// The answer is written; further bytes of the caller are discarded until it closes.
    Lingering { discarded: usize },
}

/// Next state behind an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Then {
    /// The caller closes; a pause that it has asked for is committed.
    Linger,
    /// The caller stays, and its pause with it.
    ConnectionBound,
}

/// Reason why a step did not lead on.
enum Halt {
    /// There is nothing to do before the next event or the deadline.
    Blocked,
    /// The caller is answered with an error.
    Refused(HttpError),
    /// The caller is done with.
    Done,
}

impl From<HttpError> for Halt {
    fn from(refusal: HttpError) -> Self {
        Self::Refused(refusal)
    }
}

impl From<Errno> for Halt {
    fn from(errno: Errno) -> Self {
        if errno == Errno::AGAIN { Self::Blocked } else { Self::Done }
    }
}

impl ControlConn {
    /// Begins to serve a caller.
    pub(super) fn new(socket: OwnedFd, scope: Scope, timeouts: Timeouts) -> Self {
        let arrived = Instant::now();
        Self {
            deadline: Some(arrived + timeouts.exchange),
            ready: true,
            name: name(&socket),
            socket,
            arrived,
            scope,
            timeouts,
            peer: Peer::Open,
            request: Incoming::default(),
            pause: None,
            permit: None,
            state: State::Reading,
        }
    }

    /// Registers its socket.
    pub(super) fn register(&self, registry: &Registry, token: Token) -> io::Result<()> {
        let interest = Interest::READABLE | Interest::WRITABLE;
        registry.register(&mut SourceFd(&self.socket.as_raw_fd()), token, interest)
    }

    /// Ends the registration before a close, which does not end it while another process has a copy of the socket.
    pub(super) fn deregister(&self, registry: &Registry) {
        // An error means that it has none.
        registry.deregister(&mut SourceFd(&self.socket.as_raw_fd())).ok();
    }

    /// Remembers an event; everything else is found out by trying.
    pub(super) fn mark(&mut self, event: &Event) {
        self.ready = true;
        if event.is_write_closed() || event.is_error() {
            self.peer = Peer::Gone;
        } else if event.is_read_closed() {
            self.peer = self.peer.max(Peer::HalfClosed);
        }
    }

    /// Goes as far as it can. Returns true if the caller stays.
    pub(super) fn drive(&mut self, context: &mut ControlContext) -> bool {
        let mut step = if self.deadline.is_some_and(|deadline| deadline <= Instant::now()) {
            self.expire(context)
        } else if std::mem::take(&mut self.ready) {
            Ok(())
        } else {
            return true;
        };
        loop {
            match step {
                Ok(()) => {}
                Err(Halt::Refused((status, text))) => {
                    debug!("control request of {} refused: {status} {text}", self.name);
                    if let Some(pause) = self.take_pause() {
                        pause.undo(text.trim_end_matches('.'));
                    }
                    self.answer(Response::error(status, text).to_bytes(self.request.is_head()));
                }
                Err(Halt::Blocked) => return true,
                Err(Halt::Done) => return false,
            }
            step = self.step(context);
        }
    }

    /// Returns its rank in the order in which callers make room. The first are callers with an answer, perhaps in its midst;
    /// then come those whose request arrives. A caller that waits, or has a pause, or whose command is executed stays.
    pub(super) fn expendable(&self) -> Option<(u8, Instant)> {
        match self.state {
            _ if self.pause.is_some() => None,
            State::Answering { .. } | State::Lingering { .. } => Some((0, self.arrived)),
            State::Reading => Some((1, self.arrived)),
            _ => None,
        }
    }

    /// Tells the caller that there is no room for it, if it has no answer yet and its socket takes this one. Its request is
    /// read first if it is there: to close with bytes unread resets the connection, and the answer may be lost.
    pub(super) fn refuse(self, metrics: &Source) {
        if matches!(self.state, State::Reading) {
            let _ = read(&self.socket, &mut [0; HEAD_BYTES_MAX]);
            let answer =
                Response::error(503, "Too many callers at once: try again.").to_bytes(false);
            let _ = send(&self.socket, &answer, SendFlags::NOSIGNAL);
            metrics.count(&answer);
            let _ = shutdown(&self.socket, Shutdown::Write);
        }
    }

    fn expire(&mut self, context: &ControlContext) -> Result<(), Halt> {
        let (now, handle) = (Instant::now(), &context.handle);
        Err(Halt::Refused(match self.state {
            State::Reading => (408, "The request took too long to arrive."),
            State::Executing { ref reply, .. } if reply.lock().answer.is_some() => return Ok(()),
            State::Executing { late, .. } => late,
            State::Waiting { until, .. } if until.is_some_and(|until| until <= now) => {
                let answer = wait_in_vain(handle, handle.oldest_connections());
                self.answer(answer.to_bytes(self.request.is_head()));
                return Ok(());
            }
            State::Pausing { .. } => return self.time_out(handle),
            State::Ending => return self.finish_end(),
            State::Switching { .. } => {
                self.end_examination(context);
                return Ok(());
            }
            State::AwaitingUpstream { ref address, until }
                if until.is_some_and(|until| until <= now) =>
            {
                let answer = match handle.connections_to(address) {
                    0 => Response::empty(204),
                    left => upstream_in_use(address, left),
                };
                self.answer(answer.to_bytes(self.request.is_head()));
                return Ok(());
            }
            State::Upgrading { .. } if self.peer == Peer::Open => upgrading::NO_OUTCOME,
            _ => return Err(Halt::Done),
        }))
    }

    /// Goes as far as one system call can.
    fn step(&mut self, context: &mut ControlContext) -> Result<(), Halt> {
        let stops = context.stops_at.is_some();
        match self.state {
            State::Reading if stops => Err(Halt::Refused(STOPPING)),
            State::Reading => self.read(context),
            State::Waiting { .. } => self.wait(context),
            State::Executing { is_change: false, .. } if self.peer == Peer::Gone => Err(Halt::Done),
            State::Executing { .. } => self.take_outcome(),
            State::Pausing { .. } => self.pause(context),
            State::Upgrading { .. } => self.await_upgrade(context),
            State::Switching { .. } => self.await_examination(context),
            State::AwaitingUpstream { .. } => self.await_upstream(context),
            State::Answering { .. } => self.write(&context.metrics),
            State::ConnectionBound { .. } => self.attend(context),
            State::Ending => self.await_end(context),
            State::Lingering { discarded } => {
                let count = read(&self.socket, &mut context.scratch)?;
                if count == 0 || discarded > LINGER_BYTES_MAX {
                    return Err(Halt::Done);
                }
                self.state = State::Lingering { discarded: discarded + count };
                Ok(())
            }
        }
    }

    fn read(&mut self, context: &mut ControlContext) -> Result<(), Halt> {
        let count = read(&self.socket, &mut context.scratch)?;
        if count == 0 && self.request.is_empty() {
            return Err(Halt::Done);
        }
        if count == 0 {
            return Err(Halt::Refused((400, "The request ended before it was whole.")));
        }
        let bytes = context.scratch.get(..count).unwrap_or_default();
        match self.request.take(bytes, &context.hosts)? {
            Progress::More => {}
            Progress::Continue => {
                // These are the first bytes to the caller: there is room for them.
                send(&self.socket, b"HTTP/1.1 100 Continue\r\n\r\n", SendFlags::NOSIGNAL)?;
            }
            Progress::Whole(request) => self.begin(&request, context)?,
        }
        Ok(())
    }

    /// Refuses the request, begins to wait for the event that it asks for alone, or hands it to the executor.
    fn begin(&mut self, request: &Request, context: &mut ControlContext) -> Result<(), Halt> {
        let command = match Command::parse(request, self.scope) {
            Ok(command) => command,
            Err(refusal) => {
                self.answer(unserved(&refusal, self.request.is_head()));
                return Ok(());
            }
        };
        let awaited = command.awaited();
        if awaited.is_some() {
            self.permit = Some(context.try_acquire()?);
        }
        let timeout = match awaited {
            Some(Awaited::Idle { timeout }) => timeout,
            Some(Awaited::Upgrade) => return self.begin_upgrade(context),
            Some(Awaited::Examination(wanted)) => return self.begin_switch(wanted, context),
            Some(Awaited::UpstreamIdle { address, timeout }) => {
                self.begin_wait(address, timeout, context);
                return Ok(());
            }
            Some(Awaited::Pause { .. }) | None => return self.submit(command, context),
        };
        let idle_moments = context.handle.pauses().idle_moments();
        self.deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        self.state = State::Waiting { idle_moments, until: self.deadline };
        Ok(())
    }

    /// Waits until the proxy is idle, or was since the request came.
    fn wait(&mut self, context: &mut ControlContext) -> Result<(), Halt> {
        let State::Waiting { idle_moments, .. } = self.state else { return Ok(()) };
        if self.peer == Peer::Gone {
            return Err(Halt::Done);
        }
        // Before the look, lest a moment between them be missed.
        context.notifier.await_idle();
        if context.handle.is_idle() || context.handle.pauses().idle_moments() != idle_moments {
            self.answer(unserved(&Response::empty(204), self.request.is_head()));
            return Ok(());
        }
        // A wait that has come to its end is answered so, in spite of a stop.
        if context.stops_at.is_some() {
            return Err(Halt::Refused(STOPPING));
        }
        Err(self.block())
    }

    /// Waits for the next event, and not for long if the caller may have gone.
    fn block(&mut self) -> Halt {
        if self.peer == Peer::HalfClosed {
            let soon = Instant::now() + self.timeouts.linger;
            self.deadline = Some(self.deadline.map_or(soon, |deadline| deadline.min(soon)));
        }
        Halt::Blocked
    }

    fn write(&mut self, metrics: &Source) -> Result<(), Halt> {
        let State::Answering { bytes, sent, then } = &mut self.state else { return Ok(()) };
        let rest = bytes.get(*sent..).unwrap_or_default();
        let count = retry_on_intr(|| send(&self.socket, rest, SendFlags::NOSIGNAL))?;
        *sent += count;
        if *sent < bytes.len() {
            return Ok(());
        }
        metrics.count(bytes);
        match then {
            Then::Linger => {
                self.pause.take().into_iter().for_each(PendingPause::commit);
                self.end_answer()
            }
            Then::ConnectionBound => {
                self.state =
                    State::ConnectionBound { told_lost: false, told_forced: 0, told_kept: None };
                self.deadline = None;
                Ok(())
            }
        }
    }

    fn answer(&mut self, bytes: Vec<u8>) {
        self.permit = None;
        self.begin_answer(bytes, Then::Linger);
    }

    fn begin_answer(&mut self, bytes: Vec<u8>, then: Then) {
        self.state = State::Answering { bytes, sent: 0, then };
        self.deadline = Some(Instant::now() + self.timeouts.exchange);
    }

    fn end_answer(&mut self) -> Result<(), Halt> {
        self.permit = None;
        shutdown(&self.socket, Shutdown::Write)?;
        self.state = State::Lingering { discarded: 0 };
        self.deadline = Some(Instant::now() + self.timeouts.linger);
        Ok(())
    }
}

fn read(socket: &OwnedFd, scratch: &mut [u8]) -> Result<usize, Errno> {
    retry_on_intr(|| rustix::io::read(socket, &mut *scratch))
}

/// Names the caller by its address, or over UNIX sockets by its user and process.
fn name(socket: &OwnedFd) -> String {
    match getpeername(socket).map(|peer| peer.and_then(|peer| SocketAddr::try_from(peer).ok())) {
        Ok(Some(peer)) => SocketAddr::new(peer.ip().to_canonical(), peer.port()).to_string(),
        Ok(None) => peer_process(socket),
        // It has reset its connection already.
        Err(_) => "an unknown address".into(),
    }
}
