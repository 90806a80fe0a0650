//! The private `tiny_http` server: on a UNIX socket that only the front dials, served by one thread.
//!
//! `tiny_http`'s accept thread ends for good when descriptors or threads run out, sometimes without a word. So the server is
//! replaceable: a new one is built in a new directory, and the front asks again what was lost with the old one.

use std::{
    collections::HashMap,
    env, fs,
    hash::{BuildHasher, RandomState},
    io,
    os::{
        fd::OwnedFd,
        unix::{fs::DirBuilderExt, net::UnixListener},
    },
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use crossbeam_channel::{Receiver, Sender, bounded};
use log::error;
use rustix::{
    io::Errno,
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType},
};
use tiny_http::{Header, Request, Response, Server};

use super::{
    Seldom,
    answer::Answer,
    routes::{Outcome, route},
};
use crate::Handle;

/// After which time something that failed for want of descriptors or threads is tried again.
pub(super) const RETRY_INTERVAL: Duration = Duration::from_millis(100);
/// The longest wait of the serving thread; nothing depends on it, it only bounds the wait.
const WAIT_MAX: Duration = Duration::from_secs(3600);
/// Notices are repeated until they have worked, so that one that does not fit is no loss.
const NOTICES_MAX: usize = 256;

/// The names of the headers by which the front tells what the private server cannot see.
pub(super) const ID_HEADER: &str = "X-Front-Id";
pub(super) const CALLER_HEADER: &str = "X-Front-Caller";

/// The private server as the front, the serving thread and the one who closes the last connection share it.
pub(super) struct Private {
    built: Mutex<Option<Built>>,
    notices: Sender<Notice>,
    stopping: AtomicBool,
    /// How many callers may wait for idle at once.
    waiters_max: usize,
    /// Whether the serving thread is to be woken at the next idle moment.
    wants_idle: AtomicBool,
}

/// A server with the directory of its socket. It is dropped first: its drop dials its own socket to end its accept thread.
struct Built {
    server: Arc<Server>,
    directory: Directory,
    generation: u64,
}

/// What the front tells the serving thread.
pub(super) enum Notice {
    /// The caller with this id has gone: it waits no longer.
    Gone(u64),
    /// The server of this generation does not accept.
    Refused(u64),
}

impl Private {
    /// Builds the first server; [`serve`] is to answer what it reads.
    pub(super) fn new(waiters_max: usize) -> io::Result<(Self, Receiver<Notice>)> {
        let built = Mutex::new(Some(build(0)?));
        let (notices, inbox) = bounded(NOTICES_MAX);
        let (stopping, wants_idle) = (AtomicBool::new(false), AtomicBool::new(false));
        Ok((Self { built, notices, stopping, waiters_max, wants_idle }, inbox))
    }

    /// Connects to the private server. Any error means: try again later.
    pub(super) fn dial(&self) -> Result<OwnedFd, Errno> {
        let guard = self.built();
        let built = guard.as_ref().ok_or(Errno::CONNREFUSED)?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        let address = SocketAddrUnix::new(built.directory.socket())?;
        let generation = built.generation;
        let connected = rustix::net::connect(&socket, &address);
        drop(guard);
        if matches!(connected, Err(Errno::CONNREFUSED | Errno::NOENT)) {
            self.notify(Notice::Refused(generation));
        }
        connected.map(|()| socket)
    }

    /// Tells the serving thread; a notice that does not fit is lost.
    pub(super) fn notify(&self, notice: Notice) {
        if self.notices.try_send(notice).is_ok() {
            self.wake();
        }
    }

    /// The last connection has closed. Called on the thread that closed it: wakes the serving thread only if somebody waits.
    pub(super) fn idle(&self) {
        if self.wants_idle.swap(false, Ordering::SeqCst) {
            self.wake();
        }
    }

    /// Has the serving thread answer all waiters and end.
    pub(super) fn stop(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        self.wake();
    }

    fn stops(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }

    fn wake(&self) {
        // The lock is held meanwhile, so that the server's last owner, whose drop blocks, is always the serving thread.
        if let Some(built) = self.built().as_ref() {
            built.server.unblock();
        }
    }

    fn built(&self) -> MutexGuard<'_, Option<Built>> {
        self.built.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The serving thread: answers what the front passes on, until it is stopped. A panic loses what it was at, and nothing more.
pub(super) fn serve(private: &Private, inbox: &Receiver<Notice>, handle: &Handle) {
    let mut serving = Serving {
        private,
        inbox,
        handle,
        waiters: HashMap::new(),
        generation: 0,
        complaints: Seldom::default(),
    };
    while !private.stops() {
        if catch_unwind(AssertUnwindSafe(|| serving.turn())).is_err() {
            error!("a defect: the control API's serving thread panicked; it goes on");
        }
    }
    serving.stop();
}

struct Serving<'a> {
    private: &'a Private,
    inbox: &'a Receiver<Notice>,
    handle: &'a Handle,
    /// Requests that wait for idle, by the front's id.
    waiters: HashMap<u64, Waiter>,
    /// The generation of the server built last.
    generation: u64,
    complaints: Seldom,
}

struct Waiter {
    request: Request,
    /// The count of idle moments when it came: any later one is its own.
    since: u64,
    deadline: Option<Instant>,
}

impl Serving<'_> {
    fn turn(&mut self) {
        self.answer_waiters();
        let server = self.private.built().as_ref().map(|built| Arc::clone(&built.server));
        let Some(server) = server else { return self.rebuild() };
        match server.recv_timeout(self.time_left()) {
            Ok(Some(request)) => self.take(request),
            Ok(None) => {} // woken, or a deadline
            Err(error) => {
                self.complaints.error(&format!(
                    "the control API's server has failed ({error}): it is built anew"
                ));
                drop(server);
                return self.retire();
            }
        }
        drop(server);
        while let Ok(notice) = self.inbox.try_recv() {
            self.obey(&notice);
        }
    }

    /// Until the next deadline.
    fn time_left(&self) -> Duration {
        let next = self.waiters.values().filter_map(|waiter| waiter.deadline).min();
        next.map_or(WAIT_MAX, |next| next.saturating_duration_since(Instant::now()).min(WAIT_MAX))
    }

    fn obey(&mut self, notice: &Notice) {
        match notice {
            Notice::Gone(id) => drop(self.waiters.remove(id)),
            Notice::Refused(generation) if *generation == self.generation => {
                self.complaints.error("the control API's server accepts no more: it is built anew");
                self.retire();
            }
            Notice::Refused(_) => {} // that server has been replaced already
        }
    }

    fn take(&mut self, request: Request) {
        let id = header(&request, ID_HEADER).and_then(|id| id.parse().ok()).unwrap_or_default();
        let caller = header(&request, CALLER_HEADER).unwrap_or("an unknown caller");
        let since = self.handle.idle_moments();
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            route(request.method(), request.url(), caller, self.handle)
        }));
        match outcome {
            Ok(Outcome::Answered(answer)) => respond(request, &answer),
            Ok(Outcome::Waits(_)) if self.waiters.len() >= self.private.waiters_max => {
                respond(
                    request,
                    &Answer::error(503, "Too many callers wait for idle already: try again later."),
                );
            }
            Ok(Outcome::Waits(timeout)) => {
                let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
                self.waiters.insert(id, Waiter { request, since, deadline });
            }
            Err(_) => {
                error!("a defect: the control API panicked at a request of {caller}");
                respond(
                    request,
                    &Answer::error(500, "The control API has a defect: the log says more."),
                );
            }
        }
    }

    /// Answers whoever has seen an idle moment or run out of time. The wish to be woken comes before the look, lest a moment
    /// between them be missed.
    fn answer_waiters(&mut self) {
        if self.waiters.is_empty() {
            return;
        }
        self.private.wants_idle.store(true, Ordering::SeqCst);
        let moments = self.handle.idle_moments();
        let (idle, now) = (self.handle.is_idle(), Instant::now());
        for (_, waiter) in self.waiters.extract_if(|_, waiter| {
            idle || waiter.since != moments
                || waiter.deadline.is_some_and(|deadline| deadline <= now)
        }) {
            let answer = if idle || waiter.since != moments {
                Answer::empty(204)
            } else {
                Answer::error(
                    504,
                    "The time is up: connections are still running. GET /status counts them.",
                )
            };
            respond(waiter.request, &answer);
        }
    }

    /// Builds a server where there is none, or waits a little before the next try.
    fn rebuild(&mut self) {
        match build(self.generation + 1) {
            Ok(built) => {
                self.generation = built.generation;
                *self.private.built() = Some(built);
            }
            Err(error) => {
                self.complaints.error(&format!(
                    "the control API's server cannot be built ({error}): it is tried again"
                ));
                if let Ok(notice) = self.inbox.recv_timeout(RETRY_INTERVAL) {
                    self.obey(&notice);
                }
            }
        }
    }

    /// Takes the server out of service, with what it has read already.
    fn retire(&mut self) {
        let built = self.private.built().take();
        if let Some(built) = built {
            while let Ok(Some(request)) = built.server.try_recv() {
                self.take(request);
            }
        }
    }

    fn stop(&mut self) {
        self.retire();
        // Who has seen idle hears of it, not of the stop.
        self.answer_waiters();
        for (_, waiter) in self.waiters.drain() {
            respond(waiter.request, &Answer::stopping());
        }
    }
}

fn header<'a>(request: &'a Request, name: &'static str) -> Option<&'a str> {
    request
        .headers()
        .iter()
        .find(|header| header.field.equiv(name))
        .map(|header| header.value.as_str())
}

/// The front buffers the answer, which is smaller than a socket's buffer: this does not block. If it has gone, nobody is left to tell.
fn respond(request: Request, answer: &Answer) {
    let mut response = Response::from_data(answer.body.as_bytes()).with_status_code(answer.status);
    let allow = answer.allow.map(|methods| ("Allow", methods));
    let kind = (!answer.body.is_empty()).then_some(("Content-Type", "application/json"));
    for (name, value) in allow.into_iter().chain(kind) {
        if let Ok(header) = Header::from_bytes(name, value) {
            response.add_header(header);
        }
    }
    drop(request.respond(response));
}

/// A fresh server at a fresh place.
fn build(generation: u64) -> io::Result<Built> {
    let mut failure = io::Error::from(io::ErrorKind::NotFound);
    // A runtime directory may be missing, read-only or too deep for a socket's path.
    for parent in env::var_os("XDG_RUNTIME_DIR")
        .map(PathBuf::from)
        .into_iter()
        .chain([env::temp_dir(), "/tmp".into()])
    {
        match build_in(&parent, generation) {
            Ok(built) => return Ok(built),
            Err(error) => failure = error,
        }
    }
    Err(failure)
}

fn build_in(parent: &Path, generation: u64) -> io::Result<Built> {
    let directory = Directory::create(parent)?;
    let listener = UnixListener::bind(directory.socket())?;
    // tiny_http panics when the system refuses a thread.
    let server = catch_unwind(AssertUnwindSafe(|| Server::from_listener(listener, None)));
    let server =
        server.map_err(|_| io::Error::other("no thread to be had"))?.map_err(io::Error::other)?;
    Ok(Built { server: Arc::new(server), directory, generation })
}

/// A directory that only this user can enter, removed with its socket when dropped.
struct Directory(PathBuf);

impl Directory {
    fn create(parent: &Path) -> io::Result<Self> {
        let path =
            parent.join(format!("tcpause-{:016x}", RandomState::new().hash_one(Instant::now())));
        fs::DirBuilder::new().mode(0o700).create(&path)?;
        Ok(Self(path))
    }

    fn socket(&self) -> PathBuf {
        self.0.join("control")
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        // The server's own drop removes the socket as well.
        drop(fs::remove_file(self.socket()));
        drop(fs::remove_dir(&self.0));
    }
}

#[cfg(test)]
impl Private {
    pub(super) fn socket(&self) -> Option<PathBuf> {
        self.built().as_ref().map(|built| built.directory.socket())
    }
}
