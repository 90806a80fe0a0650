//! The private `tiny_http` server: on a UNIX socket without a name, which only the front can dial, served by one thread.
//!
//! `tiny_http`'s accept thread ends for good when descriptors or threads run out, sometimes without a word. No request is
//! lost with it: the front starts another server where one accepts no more, and asks again.
//!
//! The socket has a file for a moment. Where no directory takes one, there is no server, and requests are carried out on the
//! front's own thread: an abstract name or a port would let every user of the host reach `tiny_http`, past all checks.

use std::{
    env, fs,
    hash::{BuildHasher, RandomState},
    io::{self, Read, Write},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{
            fs::{DirBuilderExt, PermissionsExt},
            net::{UnixListener, UnixStream},
        },
    },
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::{Arc, mpsc::sync_channel},
    thread::Builder,
    time::{Duration, Instant},
};

use log::{error, info, warn};
use rustix::{
    fs::{Mode, OFlags},
    io::Errno,
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with},
};
use tiny_http::{Header, Request, Server};

use super::{
    request,
    response::{Relayed, Response, relayed},
    routes::{Caller, route},
};
use crate::handle::Handle;

/// The longest answer of the server.
const ANSWER_BYTES_MAX: u64 = 64 << 10;
/// The longest silence of the server; a resume may take a second.
const SILENCE_TIMEOUT: Duration = Duration::from_secs(3);
/// The name of the header by which the front tells who asks.
const CALLER_HEADER: &str = "X-ControlConn";
/// The name of the header with the number of the request.
const TICKET_HEADER: &str = "X-Ticket";

/// The front's hold on a private server: dropped, it ends the server's threads.
pub(super) struct Backend {
    /// None where no server can be had.
    inside: Option<Arc<Inside>>,
    handle: Handle,
}

/// Dropped in this order: the server learns that it is closed, and the door's last dial makes its accept thread look.
struct Inside {
    server: Server,
    door: UnlinkedListener,
}

impl Backend {
    /// Starts a server and the thread that answers what it reads, or goes without.
    pub(super) fn start(handle: Handle) -> io::Result<Self> {
        match UnlinkedListener::open() {
            Ok((listener, door)) => Self::behind(door, listener, handle),
            Err(error) => {
                info!(
                    "the control API serves all requests on one thread, as none of /run, /dev/shm, /tmp and TMPDIR takes its socket file: {error}"
                );
                Ok(Self::without(handle))
            }
        }
    }

    /// Carries requests out on the thread that asks.
    pub(super) fn without(handle: Handle) -> Self {
        Self { inside: None, handle }
    }

    pub(super) fn behind(
        door: UnlinkedListener,
        listener: UnixListener,
        handle: Handle,
    ) -> io::Result<Self> {
        let (give, take) = sync_channel::<Arc<Inside>>(1);
        let private_handle = handle.clone();
        // Before the server: where the system refuses threads, this is an error, and tiny_http would panic.
        Builder::new().name("control".into()).spawn(move || {
            take.recv().map(|inside| serve(&inside.server, &handle)).ok();
        })?;
        let server = catch_unwind(AssertUnwindSafe(|| Server::from_listener(listener, None)))
            .map_err(|_| {
                io::Error::other(
                    "no thread can be had; raise the limit of processes (ulimit -u, TasksMax)",
                )
            })?
            .map_err(io::Error::other)?;
        let inside = Arc::new(Inside { server, door });
        // The thread waits for it.
        give.send(Arc::clone(&inside)).ok();
        Ok(Self { inside: Some(inside), handle: private_handle })
    }

    /// Waits for the answer to a request. A server that accepts no more is replaced; any error means: ask again later. This
    /// may block, for about as long as the one serving thread would keep others waiting too.
    pub(super) fn ask(
        &mut self,
        asker: Caller<'_>,
        request: &request::Request,
    ) -> io::Result<Relayed> {
        let dialled = match self.dial() {
            Some(Err(Errno::CONNREFUSED)) => {
                *self = Self::start(self.handle.clone())?;
                self.dial()
            }
            dialled => dialled,
        };
        let head_only = request.method == "HEAD";
        let Some(dialled) = dialled else {
            let answer = carry_out(&request.method, &request.target, asker, &self.handle);
            return Ok(answer.into_relayed(head_only));
        };
        let mut server = UnixStream::from(dialled?);
        server.set_nonblocking(false)?;
        server.set_read_timeout(Some(SILENCE_TIMEOUT))?;
        server.set_write_timeout(Some(SILENCE_TIMEOUT))?;
        server.write_all(&request_of(asker, request))?;
        let mut written = String::new();
        server.take(ANSWER_BYTES_MAX).read_to_string(&mut written)?;
        relayed(&written, head_only).ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }

    /// Connects to the server, if there is one.
    fn dial(&self) -> Option<Result<OwnedFd, Errno>> {
        self.inside.as_ref().map(|inside| inside.door.dial())
    }
}

/// What the server is asked for a caller.
pub(super) fn request_of(asker: Caller<'_>, request: &request::Request) -> Vec<u8> {
    let (Caller { name, request_id }, request::Request { method, target }) = (asker, request);
    format!(
        "{method} {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{CALLER_HEADER}: {name}\r\n{TICKET_HEADER}: {request_id}\r\n\r\n"
    )
    .into_bytes()
}

impl Drop for Backend {
    fn drop(&mut self) {
        if let Some(inside) = &self.inside {
            inside.server.unblock();
        }
    }
}

/// The only way to a listening socket whose file is gone: nothing of it is left behind, however the process ends.
pub(super) struct UnlinkedListener(OwnedFd);

impl UnlinkedListener {
    /// Opens one in the first directory that takes it.
    pub(super) fn open() -> io::Result<(UnixListener, Self)> {
        fs::metadata(OWN_FILES)
            .map_err(|error| io::Error::new(error.kind(), format!("{OWN_FILES}: {error}")))?;
        let mut result = Err(io::ErrorKind::NotFound.into());
        for place in places() {
            result = Self::open_in(&place).map_err(|error| {
                let text = format!("no socket can be made in {}: {error}", place.display());
                io::Error::new(error.kind(), text)
            });
            if result.is_ok() {
                break;
            }
        }
        result
    }

    fn open_in(place: &Path) -> io::Result<(UnixListener, Self)> {
        let directory =
            place.join(format!("tcpause-{:016x}", RandomState::new().hash_one(Instant::now())));
        let path = directory.join("control");
        // Nobody else can enter it in the meantime.
        let opened = fs::DirBuilder::new().mode(0o700).create(&directory).and_then(|()| {
            // A umask that is made for sockets takes the right to enter it.
            fs::set_permissions(&directory, fs::Permissions::from_mode(0o700))?;
            let listener = UnixListener::bind(&path)?;
            let file = rustix::fs::open(&path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
            Ok((listener, Self(file)))
        });
        drop((fs::remove_file(&path), fs::remove_dir(&directory)));
        opened
    }

    fn dial(&self) -> Result<OwnedFd, Errno> {
        // A full backlog must not make it wait.
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        // The link leads to the socket itself, whether or not it still has a name.
        let address = SocketAddrUnix::new(format!("{OWN_FILES}/{}", self.0.as_raw_fd()))?;
        connect(&socket, &address)?;
        Ok(socket)
    }
}

impl Drop for UnlinkedListener {
    /// `tiny_http` ends its accept thread by dialling a name, which is gone.
    fn drop(&mut self) {
        drop(self.dial());
    }
}

const OWN_FILES: &str = "/proc/self/fd";

/// Lists the directories that may take the file of a socket: the service's own by systemd, then those in which most systems
/// let files be made. Containers that may write nothing else have one in `/dev/shm`.
fn places() -> impl Iterator<Item = PathBuf> {
    let runtime = env::var_os("RUNTIME_DIRECTORY").unwrap_or_default();
    let runtime = env::split_paths(&runtime).collect::<Vec<_>>();
    let temporary = env::var_os("TMPDIR").map(PathBuf::from);
    let usual = ["/run", "/dev/shm", "/tmp"].map(PathBuf::from);
    runtime.into_iter().chain(temporary).chain(usual).filter(|place| place.is_absolute())
}

/// The serving thread: answers what the front passes on, until it is woken for nothing, which is the end.
fn serve(server: &Server, handle: &Handle) {
    loop {
        match server.recv_timeout(Duration::MAX) {
            Ok(Some(request)) => answer(request, handle),
            Ok(None) => return,
            // What has been accepted before is still to be answered.
            Err(error) => warn!("the control API's server accepts no more: {error}"),
        }
    }
}

fn answer(request: Request, handle: &Handle) {
    let header = |name: &'static str| {
        let mut headers = request.headers().iter();
        headers.find(|header| header.field.equiv(name)).map(|header| header.value.as_str())
    };
    let asker = header(CALLER_HEADER)
        .zip(header(TICKET_HEADER).and_then(|request_id| request_id.parse().ok()))
        .map(|(name, request_id)| Caller { name, request_id });
    // The front tells with every request who asks.
    let answer = asker.map_or_else(defect, |asker| {
        carry_out(request.method().as_str(), request.url(), asker, handle)
    });
    let mut response =
        tiny_http::Response::from_data(answer.body.as_bytes()).with_status_code(answer.status);
    let kind = (!answer.body.is_empty()).then(|| ("Content-Type", "application/json".to_owned()));
    for (name, value) in answer.header.into_iter().chain(kind) {
        if let Ok(header) = Header::from_bytes(name, value) {
            response.add_header(header);
        }
    }
    // A socket's buffer takes the whole answer: this does not block. If the front has gone, nobody is left to tell.
    drop(request.respond(response));
}

/// Does what is asked for. A panic costs the answer and nothing else.
fn carry_out(method: &str, target: &str, asker: Caller<'_>, handle: &Handle) -> Response {
    catch_unwind(AssertUnwindSafe(|| route(method, target, asker, handle))).unwrap_or_else(|_| {
        error!("a defect: the control API panicked at a request of {}", asker.name);
        defect()
    })
}

fn defect() -> Response {
    Response::error(500, "The control API has a defect: the log says more.")
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn a_private_server_leaves_nothing_behind() {
        let (listener, door) = UnlinkedListener::open().unwrap();
        let address = listener.local_addr().unwrap();
        assert!(!address.as_pathname().unwrap().parent().unwrap().exists());
        let again = UnlinkedListener(door.0.try_clone().unwrap());
        let private = Backend::behind(door, listener, crate::control::tests::handle()).unwrap();
        drop(private.dial().unwrap().unwrap());
        drop(private);
        let deadline = Instant::now() + Duration::from_secs(10);
        while again.dial().map(drop) != Err(Errno::CONNREFUSED) {
            assert!(Instant::now() < deadline, "the accept thread goes on");
            thread::yield_now();
        }
    }
}
