//! One caller of the control API: a small state machine from its first byte to its close.

use std::{
    mem,
    net::SocketAddr,
    os::fd::{AsRawFd, OwnedFd},
    sync::Arc,
    time::{Duration, Instant},
};

use log::debug;
use mio::{Interest, Registry, Token, event::Event, unix::SourceFd};
use rustix::{
    io::{Errno, retry_on_intr},
    net::{SendFlags, Shutdown, getpeername, send, shutdown, sockopt::socket_peercred},
};

use super::{
    Timeouts,
    answer::{Answer, relayed},
    private::{CALLER_HEADER, ID_HEADER, Notice, Private, RETRY_INTERVAL},
    request::{HEAD_BYTES_MAX, HostPolicy, Progress, check},
};

/// The longest answer of the private server.
const ANSWER_BYTES_MAX: usize = 64 << 10;
/// What a caller may send behind its request before it is cut off.
const LINGER_BYTES_MAX: usize = 1 << 20;
/// How often a request is passed on before it is given up: five seconds' worth.
const TRIES_MAX: u32 = 50;

/// What a caller's steps need besides the caller.
pub(super) struct Means {
    pub(super) registry: Registry,
    pub(super) private: Arc<Private>,
    pub(super) hosts: HostPolicy,
    pub(super) timeouts: Timeouts,
    /// Once the control API stops: when the last caller has to be gone.
    pub(super) stops_at: Option<Instant>,
    pub(super) scratch: Vec<u8>,
}

pub(super) struct Caller {
    /// Never used again, unlike the slot; by it the private server knows whose request it has.
    pub(super) id: u64,
    /// When [`Caller::expire`] is due.
    pub(super) deadline: Option<Instant>,
    socket: OwnedFd,
    /// Who asks, for the log.
    name: String,
    /// It has closed its sending side, and over TCP perhaps all.
    half_closed: bool,
    /// It cannot be answered any more.
    gone: bool,
    state: State,
}

enum State {
    /// The request is arriving.
    Reading { bytes: Vec<u8>, continued: bool },
    /// The request is to be passed on, again after a while if the private server does not accept.
    Dialling { request: Vec<u8>, tries: u32 },
    /// The private server has the request.
    Asking { request: Vec<u8>, tries: u32, private: OwnedFd, answer: Vec<u8> },
    /// The caller has gone; the private server is told so until it gives the request up.
    Abandoned { private: OwnedFd },
    /// The answer is being written.
    Answering { bytes: Vec<u8>, sent: usize },
    /// The answer is written; what else the caller sends is discarded until it closes.
    Lingering { discarded: usize },
}

/// How a step ended.
pub(super) enum Step {
    /// The next one can follow at once.
    Again,
    /// Nothing to do before the next event or the deadline.
    Blocked,
    /// The caller is done with.
    Done,
}

impl Caller {
    pub(super) fn new(id: u64, socket: OwnedFd, is_unix: bool, timeouts: &Timeouts) -> Self {
        let name = name(&socket, is_unix);
        let state = State::Reading { bytes: Vec::new(), continued: false };
        let deadline = Some(Instant::now() + timeouts.request);
        Self { id, deadline, socket, name, half_closed: false, gone: false, state }
    }

    /// Remembers what an event of the caller's own socket says; everything else is found out by trying.
    pub(super) fn mark(&mut self, event: &Event) {
        self.half_closed |= event.is_read_closed();
        self.gone |= event.is_write_closed() || event.is_error();
    }

    /// Goes as far as one system call can. `token` is for a connection to the private server.
    pub(super) fn step(&mut self, token: Token, means: &mut Means) -> Step {
        match &mut self.state {
            State::Reading { .. } => self.read(means),
            State::Dialling { .. } => self.dial(token, means),
            State::Asking { .. } => self.ask(means),
            State::Abandoned { private } => match read(private, &mut means.scratch) {
                Ok(1..) => Step::Again,
                ended => blocked_or_done(ended),
            },
            State::Answering { .. } => self.write(means),
            State::Lingering { discarded } => match read(&self.socket, &mut means.scratch) {
                Ok(count @ 1..) if *discarded < LINGER_BYTES_MAX => {
                    *discarded += count;
                    Step::Again
                }
                ended => blocked_or_done(ended),
            },
        }
    }

    fn read(&mut self, means: &mut Means) -> Step {
        let State::Reading { bytes, continued } = &mut self.state else { return Step::Blocked };
        match read(&self.socket, &mut means.scratch) {
            Ok(0) if !bytes.is_empty() => {
                return self
                    .answer(&Answer::error(400, "The request ended before it was whole."), means);
            }
            Ok(count @ 1..) => {
                bytes.extend_from_slice(means.scratch.get(..count).unwrap_or_default());
            }
            ended => return blocked_or_done(ended),
        }
        match check(bytes, &means.hosts) {
            Ok(Progress::More) => {}
            Ok(Progress::Continue) => {
                // These are the first bytes to the caller: there is room for them.
                if !mem::replace(continued, true) {
                    let _ =
                        send(&self.socket, b"HTTP/1.1 100 Continue\r\n\r\n", SendFlags::NOSIGNAL);
                }
            }
            Ok(Progress::Whole { method, target }) => {
                let (id, name) = (self.id, &self.name);
                let private_headers = format!("{ID_HEADER}: {id}\r\n{CALLER_HEADER}: {name}\r\n");
                let request = format!(
                    "{method} {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{private_headers}\r\n"
                );
                self.state = State::Dialling { request: request.into_bytes(), tries: 0 };
            }
            Err(answer) => {
                debug!("control request of {} refused: {}", self.name, answer.body);
                return self.answer(&answer, means);
            }
        }
        Step::Again
    }

    /// Passes the request on, although the caller may have gone meanwhile: it has asked.
    fn dial(&mut self, token: Token, means: &Means) -> Step {
        let State::Dialling { request, tries } = &mut self.state else { return Step::Blocked };
        *tries += 1;
        if *tries > TRIES_MAX {
            let text = "The control API lacks descriptors or threads just now: try again.";
            return self.answer(&Answer::error(503, text), means);
        }
        match pass_on(request, token, means) {
            Ok(private) => {
                let (request, tries) = (mem::take(request), *tries);
                self.state = State::Asking { request, tries, private, answer: Vec::new() };
                self.deadline = None;
                Step::Again
            }
            Err(_) => self.wait_for(RETRY_INTERVAL),
        }
    }

    fn ask(&mut self, means: &mut Means) -> Step {
        let State::Asking { request, tries, private, answer } = &mut self.state else {
            return Step::Blocked;
        };
        match read(private, &mut means.scratch) {
            Ok(count @ 1..) if answer.len() < ANSWER_BYTES_MAX => {
                answer.extend_from_slice(means.scratch.get(..count).unwrap_or_default());
                return Step::Again;
            }
            Err(Errno::AGAIN) if self.gone => return self.abandon(means),
            Err(Errno::AGAIN) if self.half_closed && self.deadline.is_none() => {
                return self.wait_for(means.timeouts.half_closed);
            }
            Err(Errno::AGAIN) => return Step::Blocked,
            _ => {} // the end
        }
        if let Some(bytes) = relayed(answer, request.starts_with(b"HEAD ")) {
            return self.answer_with(bytes, means);
        }
        // The private server has been replaced meanwhile. Every request of the API may be made twice.
        self.state = State::Dialling { request: mem::take(request), tries: *tries };
        if means.stops_at.is_some() {
            return self.answer(&Answer::stopping(), means);
        }
        self.wait_for(RETRY_INTERVAL)
    }

    fn write(&mut self, means: &Means) -> Step {
        let State::Answering { bytes, sent } = &mut self.state else { return Step::Blocked };
        let rest = bytes.get(*sent..).unwrap_or_default();
        match retry_on_intr(|| send(&self.socket, rest, SendFlags::NOSIGNAL)) {
            Ok(count) if count == rest.len() => {
                let _ = shutdown(&self.socket, Shutdown::Write);
                self.state = State::Lingering { discarded: 0 };
                self.deadline = Some(Instant::now() + means.timeouts.linger);
                Step::Again
            }
            Ok(count) => {
                *sent += count;
                Step::Again
            }
            ended => blocked_or_done(ended),
        }
    }

    fn answer(&mut self, answer: &Answer, means: &Means) -> Step {
        let (State::Reading { bytes: request, .. } | State::Dialling { request, .. }) = &self.state
        else {
            return Step::Done;
        };
        self.answer_with(answer.to_bytes(request.starts_with(b"HEAD ")), means)
    }

    fn answer_with(&mut self, bytes: Vec<u8>, means: &Means) -> Step {
        self.state = State::Answering { bytes, sent: 0 };
        self.deadline = Some(Instant::now() + means.timeouts.answer);
        Step::Again
    }

    fn wait_for(&mut self, time: Duration) -> Step {
        self.deadline = Some(Instant::now() + time);
        Step::Blocked
    }

    /// Tells the private server that nobody waits, now and at every deadline until it has given the request up: a notice can
    /// arrive before its request, or not fit.
    fn abandon(&mut self, means: &Means) -> Step {
        means.private.notify(Notice::Gone(self.id));
        self.deadline = Some(Instant::now() + RETRY_INTERVAL);
        match mem::replace(&mut self.state, State::Lingering { discarded: 0 }) {
            State::Asking { private, .. } | State::Abandoned { private } => {
                self.state = State::Abandoned { private };
                Step::Again
            }
            _ => Step::Done,
        }
    }

    /// The deadline has passed.
    pub(super) fn expire(&mut self, means: &Means) -> Step {
        match self.state {
            State::Reading { .. } => {
                self.answer(&Answer::error(408, "The request took too long to arrive."), means)
            }
            State::Dialling { .. } => Step::Again,
            State::Asking { .. } | State::Abandoned { .. } => self.abandon(means),
            State::Answering { .. } | State::Lingering { .. } => Step::Done,
        }
    }

    /// The control API stops: whoever has not been asked for yet is sent away, and all have until `deadline`.
    pub(super) fn stop(&mut self, deadline: Instant, means: &Means) {
        if matches!(self.state, State::Reading { .. } | State::Dialling { .. }) {
            self.answer(&Answer::stopping(), means);
        }
        self.deadline = Some(self.deadline.map_or(deadline, |own| own.min(deadline)));
    }

    /// The order in which callers make room. What the private server has in hand is seen through to its end.
    pub(super) fn expendable(&self) -> Option<u8> {
        match self.state {
            State::Lingering { .. } => Some(0),
            State::Reading { .. } => Some(1),
            State::Answering { .. } => Some(2),
            State::Dialling { .. } | State::Asking { .. } | State::Abandoned { .. } => None,
        }
    }

    /// Makes room for another caller.
    pub(super) fn evict(self) {
        if matches!(self.state, State::Reading { .. }) {
            refuse(&self.socket);
        }
    }
}

/// Tells a caller that there is no room for it, if its socket takes that. Its request is read first if it is there: to close
/// with bytes unread resets the connection, and the answer may be lost.
pub(super) fn refuse(socket: &OwnedFd) {
    let _ = read(socket, &mut [0; HEAD_BYTES_MAX]);
    let answer = Answer::error(503, "Too many callers at once: try again.");
    let _ = send(socket, &answer.to_bytes(false), SendFlags::NOSIGNAL);
    let _ = shutdown(socket, Shutdown::Write);
}

fn read(socket: &OwnedFd, scratch: &mut [u8]) -> Result<usize, Errno> {
    retry_on_intr(|| rustix::io::read(socket, &mut *scratch))
}

/// For what is left when the fruitful results have been dealt with.
fn blocked_or_done(result: Result<usize, Errno>) -> Step {
    if result == Err(Errno::AGAIN) { Step::Blocked } else { Step::Done }
}

fn pass_on(request: &[u8], token: Token, means: &Means) -> Result<OwnedFd, Errno> {
    let private = means.private.dial()?;
    let registered =
        means.registry.register(&mut SourceFd(&private.as_raw_fd()), token, Interest::READABLE);
    registered.map_err(|_| Errno::NOMEM)?;
    // A fresh socket's buffer takes a whole request, or something is wrong.
    if send(&private, request, SendFlags::NOSIGNAL)? == request.len() {
        Ok(private)
    } else {
        Err(Errno::AGAIN)
    }
}

/// The peer's address, or over UNIX sockets its user and process.
fn name(socket: &OwnedFd, is_unix: bool) -> String {
    if is_unix {
        return socket_peercred(socket).map_or("an unknown process".into(), |peer| {
            format!("uid {}, pid {}", peer.uid.as_raw(), peer.pid.as_raw_nonzero())
        });
    }
    // A caller that has reset its connection has no address any more.
    let peer = getpeername(socket).ok().flatten().and_then(|peer| SocketAddr::try_from(peer).ok());
    peer.map_or("an unknown address".into(), |peer| {
        SocketAddr::new(peer.ip().to_canonical(), peer.port()).to_string()
    })
}
