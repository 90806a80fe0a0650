//! One caller of the control API: a small state machine from its first byte to its close.

mod pausing;

use std::{
    io,
    net::SocketAddr,
    os::fd::OwnedFd,
    sync::Arc,
    time::{Duration, Instant},
};

use log::{debug, error};
use mio::event::Event;
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use rustix::{
    io::{Errno, retry_on_intr},
    net::{SendFlags, Shutdown, getpeername, send, shutdown},
};

use super::{
    Timeouts,
    backend::Backend,
    listener::Notifier,
    pending::PendingPause,
    query::OnTimeout,
    request::{HEAD_BYTES_MAX, HostPolicy, HttpError, Incoming, Progress, Request},
    response::{Deferred, Response},
    routes::Caller,
};
use crate::{handle::Handle, log_limit::LogLimit, pause::WaitState};

/// What a caller may send behind its request before it is cut off.
const LINGER_BYTES_MAX: usize = 1 << 20;
/// After which time something that failed for want of descriptors or threads is tried again.
const RETRY_INTERVAL: Duration = Duration::from_millis(100);

const STOPPING: HttpError = (503, "tcpause is stopping.");

/// What callers need besides themselves.
pub(super) struct ControlContext {
    pub(super) bell: Arc<Notifier>,
    pub(super) handle: Handle,
    pub(super) private: Backend,
    pub(super) hosts: HostPolicy,
    pub(super) timeouts: Timeouts,
    /// How many callers may wait for idle at once; each has a clone of `seat`.
    pub(super) waiters_max: usize,
    pub(super) seat: Arc<()>,
    /// The number of the last request.
    pub(super) last_request_id: u64,
    pub(super) scratch: Vec<u8>,
    /// Descriptors or threads are short: nothing that needs one is tried before.
    pub(super) short_until: Option<Instant>,
    /// Once the control API stops: when the last caller has to be gone.
    pub(super) stops_at: Option<Instant>,
    pub(super) troubles: LogLimit,
}

impl ControlContext {
    /// Something failed that may work in a while.
    pub(super) fn run_short(&mut self, of: &str, error: &io::Error) {
        self.short_until = Some(Instant::now() + RETRY_INTERVAL);
        self.complain(&format!("the control API cannot {of}: {error}; it is tried again"));
    }

    pub(super) fn complain(&mut self, text: &str) {
        if let Some(more) = self.troubles.allow(Instant::now()) {
            error!("{text}{more}");
        }
    }
}

pub(super) struct ControlConn {
    /// When its state ends, whatever it does.
    pub(super) deadline: Option<Instant>,
    /// Whether there may be something to do before.
    pub(super) ready: bool,
    socket: OwnedFd,
    /// Who asks, for the log.
    name: String,
    arrived: Instant,
    timeouts: Timeouts,
    /// It has closed its sending side, and over TCP perhaps all.
    half_closed: bool,
    /// It cannot be answered any more.
    gone: bool,
    /// The bytes that it has sent.
    request: Incoming,
    /// What is undone if it goes, or does not get what it wants.
    claim: Option<PendingPause>,
    state: State,
}

enum State {
    /// The request is arriving.
    Reading,
    /// The private server is to be asked, perhaps not for the first time. Whether the caller has gone makes no difference.
    AwaitingRequest { request: Request, request_id: u64 },
    /// The answer is held back until the proxy is idle.
    Waiting { answer: Vec<u8>, idle_moments: u64, until: Option<Instant>, _seat: Arc<()> },
    /// The pause that it has asked for waits until the proxy is idle.
    Pausing { on_timeout: OnTimeout, is_tied: bool, seat: Arc<()> },
    /// The answer is being written.
    Answering { bytes: Vec<u8>, sent: usize, then: Then },
    /// The answer is written; the pause lasts until the caller closes.
    Attached { _seat: Arc<()> },
    /// The answer is written; what else the caller sends is discarded until it closes.
    Lingering { discarded: usize },
}

/// What comes behind an answer.
enum Then {
    /// The caller closes; a pause that it has asked for stands.
    Linger,
    /// The caller stays, and its pause with it.
    Attach(Arc<()>),
}

/// Why a step did not lead on.
enum Halt {
    /// There is nothing to do before the next event or the deadline.
    Blocked,
    /// The caller is to be told why it does not get what it wants.
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
    pub(super) fn new(socket: OwnedFd, timeouts: Timeouts) -> Self {
        let arrived = Instant::now();
        Self {
            deadline: Some(arrived + timeouts.exchange),
            ready: true,
            name: name(&socket),
            socket,
            arrived,
            timeouts,
            half_closed: false,
            gone: false,
            request: Incoming::default(),
            claim: None,
            state: State::Reading,
        }
    }

    /// Remembers what an event says; everything else is found out by trying.
    pub(super) fn mark(&mut self, event: &Event) {
        self.ready = true;
        self.half_closed |= event.is_read_closed();
        self.gone |= event.is_write_closed() || event.is_error();
    }

    /// Goes as far as it can. Returns whether the caller stays.
    pub(super) fn drive(&mut self, means: &mut ControlContext) -> bool {
        let mut step = if self.deadline.is_some_and(|deadline| deadline <= Instant::now()) {
            self.expire()
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
                    if let Some(claim) = self.claim.take() {
                        claim.undo(text.trim_end_matches('.'));
                    }
                    self.answer(Response::error(status, text).to_bytes(self.request.is_head()));
                }
                Err(Halt::Blocked) => return true,
                Err(Halt::Done) => return false,
            }
            step = self.step(means);
        }
    }

    /// The order in which callers make room. Who has asked is seen through to the end.
    pub(super) fn expendable(&self) -> Option<(u8, Instant)> {
        match self.state {
            _ if self.claim.is_some() => None,
            State::Answering { .. } | State::Lingering { .. } => Some((0, self.arrived)),
            State::Reading => Some((1, self.arrived)),
            _ => None,
        }
    }

    /// Tells the caller that there is no room for it, if it has no answer yet and its socket takes this one. Its request is
    /// read first if it is there: to close with bytes unread resets the connection, and the answer may be lost.
    pub(super) fn refuse(self) {
        if matches!(self.state, State::Reading) {
            let _ = read(&self.socket, &mut [0; HEAD_BYTES_MAX]);
            let answer = Response::error(503, "Too many callers at once: try again.");
            let _ = send(&self.socket, &answer.to_bytes(false), SendFlags::NOSIGNAL);
            let _ = shutdown(&self.socket, Shutdown::Write);
        }
    }

    fn expire(&mut self) -> Result<(), Halt> {
        let now = Instant::now();
        Err(Halt::Refused(match self.state {
            State::Reading => (408, "The request took too long to arrive."),
            State::AwaitingRequest { .. } => {
                (503, "The control API lacks descriptors or threads: try again.")
            }
            State::Waiting { until, .. } if until.is_some_and(|until| until <= now) => (
                504,
                "The time is up: connections are still carried or dialled for. GET /status counts them.",
            ),
            State::Pausing { .. } => return self.time_out(),
            _ => return Err(Halt::Done),
        }))
    }

    /// Goes as far as one system call can.
    fn step(&mut self, means: &mut ControlContext) -> Result<(), Halt> {
        let stops = means.stops_at.is_some();
        match self.state {
            State::Reading | State::AwaitingRequest { .. } if stops => Err(Halt::Refused(STOPPING)),
            State::Reading => self.read(means),
            State::AwaitingRequest { .. } => self.ask(means),
            State::Waiting { .. } => self.wait(means),
            State::Pausing { .. } => self.pause(means),
            State::Answering { .. } => self.write(),
            State::Attached { .. } => self.attend(means),
            State::Lingering { discarded } => {
                let count = read(&self.socket, &mut means.scratch)?;
                if count == 0 || discarded > LINGER_BYTES_MAX {
                    return Err(Halt::Done);
                }
                self.state = State::Lingering { discarded: discarded + count };
                Ok(())
            }
        }
    }

    fn read(&mut self, means: &mut ControlContext) -> Result<(), Halt> {
        let count = read(&self.socket, &mut means.scratch)?;
        if count == 0 && self.request.is_empty() {
            return Err(Halt::Done);
        }
        if count == 0 {
            return Err(Halt::Refused((400, "The request ended before it was whole.")));
        }
        let bytes = means.scratch.get(..count).unwrap_or_default();
        match self.request.take(bytes, &means.hosts)? {
            Progress::More => {}
            Progress::Continue => {
                // These are the first bytes to the caller: there is room for them.
                send(&self.socket, b"HTTP/1.1 100 Continue\r\n\r\n", SendFlags::NOSIGNAL)?;
            }
            Progress::Whole(request) => {
                means.last_request_id += 1;
                let request_id = means.last_request_id;
                let asker = Caller { name: &self.name, request_id };
                let is_put = request.method == "PUT";
                self.claim = is_put.then(|| PendingPause::new(means.handle.clone(), asker));
                self.state = State::AwaitingRequest { request, request_id };
                self.deadline = Some(Instant::now() + self.timeouts.ask);
            }
        }
        Ok(())
    }

    fn ask(&mut self, means: &mut ControlContext) -> Result<(), Halt> {
        let State::AwaitingRequest { request, request_id } = &self.state else { return Ok(()) };
        if means.short_until.is_some() {
            return Err(Halt::Blocked);
        }
        // Every request of the API may be made twice.
        let asker = Caller { name: &self.name, request_id: *request_id };
        let relayed = means.private.ask(asker, request).map_err(|error| {
            means.run_short("get an answer", &error);
            Halt::Blocked
        })?;
        let Some(hold) = relayed.hold else {
            // It has not asked for more than it has got, and that stands even if the caller has gone.
            if let Some(claim) = self.claim.take() {
                claim.settle();
            }
            self.answer(relayed.bytes);
            return Ok(());
        };
        if Arc::strong_count(&means.seat) > means.waiters_max {
            let text = "Too many callers wait already: try again later.";
            return Err(Halt::Refused((503, text)));
        }
        let (now, seat) = (Instant::now(), Arc::clone(&means.seat));
        match hold {
            Deferred::Idle(time) => {
                self.deadline = now.checked_add(time);
                self.state = State::Waiting {
                    answer: relayed.bytes,
                    idle_moments: means.handle.pauses().gate.idle_moments(),
                    until: self.deadline,
                    _seat: seat,
                };
            }
            Deferred::Pause { wait: Some(wait), is_tied } => {
                self.deadline = now.checked_add(wait.time);
                self.state = State::Pausing { on_timeout: wait.on_timeout, is_tied, seat };
            }
            Deferred::Pause { wait: None, .. } => {
                let bytes = self
                    .claim
                    .as_ref()
                    .map(|claim| claim.success(claim.look() == WaitState::Idle).to_endless_bytes());
                self.begin_answer(bytes.unwrap_or_default(), Then::Attach(seat));
            }
        }
        Ok(())
    }

    fn wait(&mut self, means: &ControlContext) -> Result<(), Halt> {
        let State::Waiting { answer, idle_moments, .. } = &mut self.state else { return Ok(()) };
        if self.gone {
            return Err(Halt::Done);
        }
        // Before the look, lest a moment between them be missed.
        means.bell.await_idle();
        if means.handle.is_idle() || means.handle.pauses().gate.idle_moments() != *idle_moments {
            let answer = std::mem::take(answer);
            self.answer(answer);
            return Ok(());
        }
        // Who has seen idle hears of it, not of the stop.
        if means.stops_at.is_some() {
            return Err(Halt::Refused(STOPPING));
        }
        if self.half_closed {
            let soon = Instant::now() + self.timeouts.linger;
            self.deadline = Some(self.deadline.map_or(soon, |deadline| deadline.min(soon)));
        }
        Err(Halt::Blocked)
    }

    fn write(&mut self) -> Result<(), Halt> {
        let State::Answering { bytes, sent, then } = &mut self.state else { return Ok(()) };
        let rest = bytes.get(*sent..).unwrap_or_default();
        let count = retry_on_intr(|| send(&self.socket, rest, SendFlags::NOSIGNAL))?;
        *sent += count;
        if *sent < bytes.len() {
            return Ok(());
        }
        match then {
            Then::Linger => {
                // The caller has got what it wanted.
                if let Some(claim) = self.claim.take() {
                    claim.settle();
                }
                self.end_answer()
            }
            Then::Attach(seat) => {
                self.state = State::Attached { _seat: Arc::clone(seat) };
                self.deadline = None;
                Ok(())
            }
        }
    }

    fn answer(&mut self, bytes: Vec<u8>) {
        self.begin_answer(bytes, Then::Linger);
    }

    fn begin_answer(&mut self, bytes: Vec<u8>, then: Then) {
        self.state = State::Answering { bytes, sent: 0, then };
        self.deadline = Some(Instant::now() + self.timeouts.exchange);
    }

    fn end_answer(&mut self) -> Result<(), Halt> {
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
        Ok(None) => match getsockopt(socket, PeerCredentials).map(|it| (it.uid(), it.pid())) {
            // A process of another PID namespace has no number here.
            Ok((uid, 0)) => format!("uid {uid}"),
            Ok((uid, pid)) => format!("uid {uid}, pid {pid}"),
            Err(_) => "an unknown process".into(),
        },
        // It has reset its connection already.
        Err(_) => "an unknown address".into(),
    }
}
