//! The front: accepts callers, reads one whole request of each under a bound and a deadline, asks the private server, and
//! brings the answer back. One thread, one `Poll`; every caller is a small state machine.

use std::{
    io,
    net::SocketAddr,
    os::fd::{AsRawFd, OwnedFd},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use log::{debug, error};
use mio::{Events, Interest, Poll, Registry, Token, Waker, unix::SourceFd};
use rustix::{
    io::Errno,
    net::{
        SendFlags, Shutdown, SocketFlags, accept_with, getpeername, send, shutdown,
        sockopt::socket_peercred,
    },
};
use slab::Slab;

use super::{
    Seldom, Timeouts,
    answer::{Answer, relayed},
    private::{CALLER_HEADER, ID_HEADER, Notice, Private, RETRY_INTERVAL, STOPPING},
    request::{HostPolicy, Progress, check},
};

/// How many callers are served at once, waiting ones included. For one more, the one that matters least has to go.
pub(super) const CALLERS_MAX: usize = 128;
/// Accepted in one turn, so that callers already here are not starved.
const ACCEPTS_PER_TURN: usize = 64;
/// The longest answer of the private server.
const ANSWER_BYTES_MAX: usize = 64 << 10;
/// What a caller may send behind its request before it is cut off.
const LINGER_BYTES_MAX: usize = 1 << 20;
/// How often a request is passed on before it is given up: five seconds' worth.
const TRIES_MAX: u32 = 50;
const READ_BYTES: usize = 16 << 10;

const LISTENER: Token = Token(usize::MAX);
const BELL: Token = Token(usize::MAX - 1);

/// Ends the front.
pub(super) struct Bell {
    waker: Waker,
    rung: Arc<AtomicBool>,
}

impl Bell {
    pub(super) fn ring(&self) {
        self.rung.store(true, Ordering::SeqCst);
        if let Err(error) = self.waker.wake() {
            error!("the control API cannot be woken to stop: {error}");
        }
    }
}

pub(super) struct Front {
    poll: Poll,
    listener: OwnedFd,
    is_unix: bool,
    /// When to accept, although no event says so: after a full turn, or when accepting has failed (no further edge comes then).
    accept_at: Option<Instant>,
    callers: Slab<Caller>,
    next_id: u64,
    means: Means,
    rung: Arc<AtomicBool>,
    complaints: Seldom,
}

/// What a caller's steps need besides the caller.
struct Means {
    registry: Registry,
    private: Arc<Private>,
    hosts: HostPolicy,
    timeouts: Timeouts,
    scratch: Vec<u8>,
}

struct Caller {
    /// Never used again, unlike the slot; by it the private server knows whose request it has.
    id: u64,
    socket: OwnedFd,
    /// Who asks, for the log.
    name: String,
    /// It has closed its sending side, and over TCP perhaps all.
    half_closed: bool,
    /// It cannot be answered any more.
    gone: bool,
    deadline: Option<Instant>,
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
enum Step {
    /// The next one can follow at once.
    Again,
    /// Nothing to do before the next event or the deadline.
    Blocked,
    /// The caller is done with.
    Done,
}

impl Front {
    pub(super) fn new(
        listener: OwnedFd,
        is_unix: bool,
        hosts: HostPolicy,
        private: Arc<Private>,
        timeouts: Timeouts,
    ) -> io::Result<(Self, Bell)> {
        let poll = Poll::new()?;
        let registry = poll.registry().try_clone()?;
        registry.register(&mut SourceFd(&listener.as_raw_fd()), LISTENER, Interest::READABLE)?;
        let rung = Arc::new(AtomicBool::new(false));
        let bell = Bell { waker: Waker::new(&registry, BELL)?, rung: Arc::clone(&rung) };
        let means = Means { registry, private, hosts, timeouts, scratch: vec![0; READ_BYTES] };
        let callers = Slab::with_capacity(CALLERS_MAX);
        let complaints = Seldom::default();
        Ok((
            Self {
                poll,
                listener,
                is_unix,
                accept_at: None,
                callers,
                next_id: 1,
                means,
                rung,
                complaints,
            },
            bell,
        ))
    }

    /// Serves callers until the bell rings. A panic costs the callers of the moment, and no later ones.
    pub(super) fn run(mut self) {
        let mut events = Events::with_capacity(2 * CALLERS_MAX);
        while !self.rung.load(Ordering::SeqCst) {
            self.turn_safely(&mut events, true);
        }
        let deadline = Instant::now() + self.means.timeouts.stop;
        for caller in self.callers.iter_mut().map(|(_, caller)| caller) {
            caller.deadline = caller.deadline.map_or(Some(deadline), |own| Some(own.min(deadline)));
            if matches!(caller.state, State::Reading { .. } | State::Dialling { .. }) {
                caller.answer(&Answer::error(503, STOPPING), deadline);
            }
        }
        self.drive(self.callers.iter().map(|(key, _)| key).collect());
        while !self.callers.is_empty() && Instant::now() < deadline {
            self.turn_safely(&mut events, false);
        }
    }

    fn turn_safely(&mut self, events: &mut Events, accepting: bool) {
        if catch_unwind(AssertUnwindSafe(|| self.turn(events, accepting))).is_err() {
            error!(
                "a defect: the control API's front panicked; its callers are cut off and it goes on"
            );
            self.callers.clear();
            self.accept_at = Some(Instant::now());
        }
    }

    /// Wait, mark, drive, accept, expire. Marking closes nothing, so that no slot is reused while events still name it.
    fn turn(&mut self, events: &mut Events, accepting: bool) {
        let deadlines = self.callers.iter().filter_map(|(_, caller)| caller.deadline);
        let next = deadlines.chain(self.accept_at.filter(|_| accepting)).min();
        let timeout = next.map(|next| next.saturating_duration_since(Instant::now()));
        match self.poll.poll(events, timeout) {
            Err(error) if error.kind() != io::ErrorKind::Interrupted => {
                self.complaints.error(&format!("the control API cannot wait for callers: {error}"));
            }
            _ => {}
        }
        let ready = self.mark(events);
        self.drive(ready);
        if accepting && self.accept_at.is_some_and(|at| at <= Instant::now()) {
            self.accept();
        }
        self.expire();
    }

    fn mark(&mut self, events: &Events) -> Vec<usize> {
        let mut ready = Vec::new();
        for event in events {
            match event.token() {
                LISTENER => self.accept_at = Some(Instant::now()),
                BELL => {}
                Token(token) => {
                    let key = token / 2;
                    if let Some(caller) = self.callers.get_mut(key) {
                        let its_own = token % 2 == 0; // else of its connection to the private server
                        caller.half_closed |= its_own && event.is_read_closed();
                        caller.gone |= its_own && (event.is_write_closed() || event.is_error());
                        ready.push(key);
                    }
                }
            }
        }
        ready
    }

    fn drive(&mut self, ready: Vec<usize>) {
        for key in ready {
            while let Some(caller) = self.callers.get_mut(key) {
                match caller.step(key, &mut self.means) {
                    Step::Again => {}
                    Step::Blocked => break,
                    Step::Done => drop(self.callers.remove(key)),
                }
            }
        }
    }

    fn accept(&mut self) {
        for _ in 0..ACCEPTS_PER_TURN {
            match accept_with(&self.listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
                Ok(socket) => self.admit(socket),
                Err(Errno::AGAIN) => {
                    self.accept_at = None;
                    return;
                }
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(error) => {
                    self.complaints.error(&format!(
                        "the control API cannot accept a caller: {error}; it is tried again"
                    ));
                    self.accept_at = Some(Instant::now() + RETRY_INTERVAL);
                    return;
                }
            }
        }
    }

    fn admit(&mut self, socket: OwnedFd) {
        if self.callers.len() >= CALLERS_MAX && !self.evict() {
            refuse(&socket);
            return;
        }
        let name = caller_name(&socket, self.is_unix);
        let slot = self.callers.vacant_entry();
        let (key, interest) = (slot.key(), Interest::READABLE | Interest::WRITABLE);
        let registered = self.means.registry.register(
            &mut SourceFd(&socket.as_raw_fd()),
            Token(2 * key),
            interest,
        );
        if let Err(error) = registered {
            self.complaints.error(&format!("the control API cannot serve a caller: {error}"));
            return;
        }
        let state = State::Reading { bytes: Vec::new(), continued: false };
        let deadline = Some(Instant::now() + self.means.timeouts.request);
        slot.insert(Caller {
            id: self.next_id,
            socket,
            name,
            half_closed: false,
            gone: false,
            deadline,
            state,
        });
        self.next_id += 1;
        self.drive(vec![key]);
    }

    /// Closes the caller that matters least. One that sends half a request must not keep out one that sends a whole one.
    fn evict(&mut self) -> bool {
        let victim = self
            .callers
            .iter()
            .filter_map(|(key, caller)| Some((caller.expendable()?, caller.id, key)))
            .min();
        let Some((_, _, key)) = victim else { return false };
        let caller = self.callers.remove(key);
        if matches!(caller.state, State::Reading { .. }) {
            refuse(&caller.socket);
        }
        true
    }

    fn expire(&mut self) {
        let now = Instant::now();
        let late = self
            .callers
            .iter_mut()
            .filter(|(_, caller)| caller.deadline.is_some_and(|deadline| deadline <= now));
        let late = late.map(|(key, caller)| (key, caller.expire(&self.means))).collect::<Vec<_>>();
        for (key, step) in late {
            match step {
                Step::Done => drop(self.callers.remove(key)),
                Step::Again => self.drive(vec![key]),
                Step::Blocked => {}
            }
        }
    }
}

impl Caller {
    fn step(&mut self, key: usize, means: &mut Means) -> Step {
        match &mut self.state {
            State::Reading { .. } => self.read(means),
            State::Dialling { .. } => self.dial(key, means),
            State::Asking { .. } => self.ask(means),
            State::Abandoned { private } => {
                match rustix::io::read(&*private, &mut means.scratch[..]) {
                    Err(Errno::AGAIN) => Step::Blocked,
                    Ok(1..) | Err(Errno::INTR) => Step::Again,
                    _ => Step::Done,
                }
            }
            State::Answering { bytes, sent } => match send(
                &self.socket,
                bytes.get(*sent..).unwrap_or_default(),
                SendFlags::NOSIGNAL,
            ) {
                Ok(count) => {
                    *sent += count;
                    if *sent == bytes.len() {
                        let _ = shutdown(&self.socket, Shutdown::Write);
                        self.deadline = Some(Instant::now() + means.timeouts.linger);
                        self.state = State::Lingering { discarded: 0 };
                    }
                    Step::Again
                }
                Err(Errno::AGAIN) => Step::Blocked,
                Err(Errno::INTR) => Step::Again,
                Err(_) => Step::Done,
            },
            State::Lingering { discarded } => {
                match rustix::io::read(&self.socket, &mut means.scratch[..]) {
                    Ok(count @ 1..) if *discarded < LINGER_BYTES_MAX => {
                        *discarded += count;
                        Step::Again
                    }
                    Err(Errno::AGAIN) => Step::Blocked,
                    Err(Errno::INTR) => Step::Again,
                    _ => Step::Done,
                }
            }
        }
    }

    fn read(&mut self, means: &mut Means) -> Step {
        let State::Reading { bytes, continued } = &mut self.state else { return Step::Blocked };
        match rustix::io::read(&self.socket, &mut means.scratch[..]) {
            Ok(0) if bytes.is_empty() => return Step::Done,
            Ok(0) => {
                let deadline = Instant::now() + means.timeouts.answer;
                return self.answer(
                    &Answer::error(400, "The request ended before it was whole."),
                    deadline,
                );
            }
            Ok(count) => bytes.extend_from_slice(means.scratch.get(..count).unwrap_or_default()),
            Err(Errno::AGAIN) => return Step::Blocked,
            Err(Errno::INTR) => return Step::Again,
            Err(_) => return Step::Done,
        }
        match check(bytes, &means.hosts) {
            Ok(Progress::More) => Step::Again,
            Ok(Progress::Continue) => {
                // These are the first bytes to the caller: there is room for them.
                if !std::mem::replace(continued, true) {
                    let _ =
                        send(&self.socket, b"HTTP/1.1 100 Continue\r\n\r\n", SendFlags::NOSIGNAL);
                }
                Step::Again
            }
            Ok(Progress::Whole { method, target }) => {
                let (id, name) = (self.id, &self.name);
                let request = format!(
                    "{method} {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{ID_HEADER}: {id}\r\n{CALLER_HEADER}: {name}\r\n\r\n"
                );
                self.state = State::Dialling { request: request.into_bytes(), tries: 0 };
                Step::Again
            }
            Err(answer) => {
                debug!(
                    "control request of {} refused with {}: {}",
                    self.name, answer.status, answer.body
                );
                self.answer(&answer, Instant::now() + means.timeouts.answer)
            }
        }
    }

    /// Passes the request on. What cannot be taken now is tried again, although the caller may have gone: it has asked.
    fn dial(&mut self, key: usize, means: &Means) -> Step {
        let State::Dialling { request, tries } = &mut self.state else { return Step::Blocked };
        if *tries > TRIES_MAX {
            let text = "The control API lacks descriptors or threads just now: try again.";
            return self.answer(&Answer::error(503, text), Instant::now() + means.timeouts.answer);
        }
        *tries += 1;
        let passed = means.private.dial().and_then(|private| {
            let (source, token) = (private.as_raw_fd(), Token(2 * key + 1));
            let registered =
                means.registry.register(&mut SourceFd(&source), token, Interest::READABLE);
            registered.map_err(|_| Errno::NOMEM)?;
            // A fresh socket's buffer takes a whole request, or something is wrong.
            match send(&private, request, SendFlags::NOSIGNAL)? {
                count if count == request.len() => Ok(private),
                _ => Err(Errno::AGAIN),
            }
        });
        if let Ok(private) = passed {
            let (request, tries) = (std::mem::take(request), *tries);
            self.deadline = None;
            self.state = State::Asking { request, tries, private, answer: Vec::new() };
            return Step::Again;
        }
        self.deadline = Some(Instant::now() + RETRY_INTERVAL);
        Step::Blocked
    }

    fn ask(&mut self, means: &mut Means) -> Step {
        let State::Asking { request, tries, private, answer } = &mut self.state else {
            return Step::Blocked;
        };
        match rustix::io::read(&*private, &mut means.scratch[..]) {
            Ok(count @ 1..) if answer.len() < ANSWER_BYTES_MAX => {
                answer.extend_from_slice(means.scratch.get(..count).unwrap_or_default());
                return Step::Again;
            }
            Err(Errno::INTR) => return Step::Again,
            Err(Errno::AGAIN) if self.gone => return self.abandon(means),
            Err(Errno::AGAIN) => {
                if self.half_closed && self.deadline.is_none() {
                    self.deadline = Some(Instant::now() + means.timeouts.half_closed);
                }
                return Step::Blocked;
            }
            _ => {} // the end
        }
        if let Some(bytes) = relayed(answer, request.starts_with(b"HEAD ")) {
            self.deadline = Some(Instant::now() + means.timeouts.answer);
            self.state = State::Answering { bytes, sent: 0 };
            Step::Again
        } else {
            // The private server has been replaced meanwhile; every request may be made twice.
            self.state = State::Dialling { request: std::mem::take(request), tries: *tries };
            self.deadline = Some(Instant::now() + RETRY_INTERVAL);
            Step::Blocked
        }
    }

    fn answer(&mut self, answer: &Answer, deadline: Instant) -> Step {
        let head_only = match &self.state {
            State::Reading { bytes, .. } | State::Dialling { request: bytes, .. } => {
                bytes.starts_with(b"HEAD ")
            }
            _ => false,
        };
        self.deadline = Some(deadline);
        self.state = State::Answering { bytes: answer.to_bytes(head_only), sent: 0 };
        Step::Again
    }

    /// Tells the private server that nobody waits, now and at every deadline until it has given the request up: a notice can
    /// arrive before its request, or not fit.
    fn abandon(&mut self, means: &Means) -> Step {
        means.private.notify(Notice::Gone(self.id));
        self.deadline = Some(Instant::now() + RETRY_INTERVAL);
        let state = std::mem::replace(&mut self.state, State::Lingering { discarded: 0 });
        match state {
            State::Asking { private, .. } | State::Abandoned { private } => {
                self.state = State::Abandoned { private };
                Step::Again
            }
            _ => Step::Done,
        }
    }

    fn expire(&mut self, means: &Means) -> Step {
        match self.state {
            State::Reading { .. } => {
                let text = "The request took too long to arrive.";
                self.answer(&Answer::error(408, text), Instant::now() + means.timeouts.answer)
            }
            State::Dialling { .. } => Step::Again,
            State::Asking { .. } | State::Abandoned { .. } => self.abandon(means),
            State::Answering { .. } | State::Lingering { .. } => Step::Done,
        }
    }

    /// The order in which callers make room; a whole request that is being answered is kept.
    fn expendable(&self) -> Option<u8> {
        match self.state {
            State::Lingering { .. } => Some(0),
            State::Reading { .. } => Some(1),
            State::Abandoned { .. } => Some(2),
            State::Answering { .. } => Some(3),
            State::Dialling { .. } | State::Asking { .. } => None,
        }
    }
}

/// Tells a caller that there is no room for it, if its socket takes that.
fn refuse(socket: &OwnedFd) {
    let answer = Answer::error(503, "Too many callers at once: try again.");
    let _ = send(socket, &answer.to_bytes(false), SendFlags::NOSIGNAL);
    let _ = shutdown(socket, Shutdown::Write);
}

/// The peer's address, or over UNIX sockets its user and process.
fn caller_name(socket: &OwnedFd, is_unix: bool) -> String {
    if is_unix {
        let peer = socket_peercred(socket);
        return peer.map_or("an unknown process".into(), |peer| {
            format!("uid {}, pid {}", peer.uid.as_raw(), peer.pid.as_raw_nonzero())
        });
    }
    // A caller that has reset its connection has no address any more.
    let peer = getpeername(socket).ok().flatten().and_then(|peer| SocketAddr::try_from(peer).ok());
    peer.map_or("an unknown address".into(), |peer| peer.to_string())
}
