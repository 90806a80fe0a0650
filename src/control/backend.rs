//! Backend: a private `tiny_http` server that writes the answers. Nothing outside this file knows of the server.
//!
//! It listens on a UNIX socket without a name, which only the executor's thread can dial. For each answer, this thread sends
//! a request of its own making, takes it from the server, responds, and reads the written answer. So `tiny_http`
//! parses nothing that a caller has sent, and a command whose answer is lost is not executed again.
//!
//! `tiny_http`'s accept thread ends for good when descriptors or threads run out, sometimes without a word. Another server is
//! started where one accepts no more.
//!
//! The socket has a file for a moment. Where no directory takes one, there is no server, and answers are written without
//! it: an abstract name or a port would let every user of the host reach `tiny_http`, past all checks.

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
    thread::Builder,
    time::{Duration, Instant},
};

use log::{info, warn};
use rustix::{
    fs::{Mode, OFlags},
    io::Errno,
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with},
};
use tiny_http::{HTTPVersion, Header, Request, Server};

use super::response::Response;

/// Longest head of an answer.
const HEAD_BYTES_MAX: usize = 4 << 10;
/// Longest body that the server is given. An answer is read only once it is written, so a socket's buffer has to hold it.
const BODY_BYTES_MAX: usize = 64 << 10;

/// Writer of answers, by a private server if there is one. Dropped, it ends the server's threads.
pub(super) struct Backend(Option<Private>);

/// Server and the way to it. The order of drops counts: the server learns that it is closed, and the door's last dial makes
/// its accept thread look.
struct Private {
    server: Server,
    door: UnlinkedListener,
    /// Number of the last request to it.
    asked: u64,
}

impl Backend {
    /// Starts a server, or goes without. A want of descriptors passes, and is an error.
    pub(super) fn start() -> io::Result<Self> {
        match UnlinkedListener::open() {
            Ok((listener, door)) => Self::behind(door, listener),
            Err(error) if lacks_descriptors(&error) => Err(error),
            Err(error) => {
                info!(
                    "the control API writes its answers without tiny_http's server, as none of /run, /dev/shm, /tmp and TMPDIR takes its socket file: {error}"
                );
                Ok(Self::without())
            }
        }
    }

    /// Writes answers without a server.
    pub(super) fn without() -> Self {
        Self(None)
    }

    /// Starts a server on `listener`, which `door` leads to.
    pub(super) fn behind(door: UnlinkedListener, listener: UnixListener) -> io::Result<Self> {
        // Where the system refuses threads, this is an error, and tiny_http would panic.
        drop(Builder::new().name("control-probe".into()).spawn(|| {})?.join());
        let server = catch_unwind(AssertUnwindSafe(|| Server::from_listener(listener, None)))
            .map_err(|_| {
                io::Error::other(
                    "no thread can be had; raise the limit of processes (ulimit -u, TasksMax)",
                )
            })?
            .map_err(io::Error::other)?;
        Ok(Self(Some(Private { server, door, asked: 0 })))
    }

    /// Writes an answer, replacing a server that accepts no more. Behind an error it may be used again. Each step blocks for
    /// `silence` at most.
    pub(super) fn write(
        &mut self,
        response: &Response,
        is_head: bool,
        silence: Duration,
    ) -> io::Result<Vec<u8>> {
        if response.body.len() > BODY_BYTES_MAX {
            return Ok(unserved(response, is_head));
        }
        let dialled = match self.dial() {
            Some(Err(Errno::CONNREFUSED)) => {
                *self = Self::start()?;
                self.dial()
            }
            dialled => dialled,
        };
        match (&mut self.0, dialled) {
            (Some(private), Some(dialled)) => {
                let socket = UnixStream::from(dialled?);
                socket.set_nonblocking(false)?;
                socket.set_read_timeout(Some(silence))?;
                private.write(response, is_head, socket, silence)
            }
            _ => Ok(unserved(response, is_head)),
        }
    }

    /// Connects to the server, if there is one.
    fn dial(&self) -> Option<Result<OwnedFd, Errno>> {
        self.0.as_ref().map(|private| private.door.dial())
    }
}

impl Private {
    fn write(
        &mut self,
        response: &Response,
        is_head: bool,
        mut socket: UnixStream,
        silence: Duration,
    ) -> io::Result<Vec<u8>> {
        self.asked += 1;
        let (method, target) = (if is_head { "HEAD" } else { "GET" }, format!("/{}", self.asked));
        let head =
            format!("{method} {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n");
        socket.write_all(format!("{head}\r\n").as_bytes())?;
        // The socket's buffer takes the whole answer, of `BODY_BYTES_MAX`: this does not block.
        self.receive(&target, silence)?.respond(of_server(response))?;
        let mut written = String::new();
        let bytes_max = HEAD_BYTES_MAX + response.body.len();
        socket.take(bytes_max as u64).read_to_string(&mut written)?;
        let body = if is_head { "" } else { &response.body };
        relayed(&written, response.status, body).ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }

    /// Takes the request for `target` from the server. Older ones are late: each was given up.
    fn receive(&self, target: &str, silence: Duration) -> io::Result<Request> {
        loop {
            match self.server.recv_timeout(silence) {
                Ok(Some(request)) if request.url() == target => return Ok(request),
                Ok(Some(_late)) => {}
                Ok(None) => return Err(io::ErrorKind::TimedOut.into()),
                Err(error) => {
                    warn!("the control API's server accepts no more: {error}");
                    return Err(error);
                }
            }
        }
    }
}

/// Returns the bytes that the server would write, without it.
pub(super) fn unserved(response: &Response, is_head: bool) -> Vec<u8> {
    let mut written = Vec::new();
    let body = if is_head { "" } else { &response.body };
    of_server(response)
        .raw_print(&mut written, HTTPVersion(1, 1), &[], is_head, None)
        .ok()
        .and_then(|()| String::from_utf8(written).ok())
        .and_then(|written| relayed(&written, response.status, body))
        .unwrap_or_else(|| response.to_bytes(is_head))
}

/// Converts an answer into the server's type. Without the threshold, the server would send a long one in chunks.
fn of_server(response: &Response) -> tiny_http::Response<io::Cursor<Vec<u8>>> {
    let headers =
        response.headers().filter_map(|(name, value)| Header::from_bytes(name, value).ok());
    let answer = tiny_http::Response::from_data(response.body.as_bytes())
        .with_status_code(response.status)
        .with_chunked_threshold(usize::MAX);
    headers.fold(answer, tiny_http::Response::with_header)
}

/// Returns the caller's form of a written answer, or none if it is not whole: then its rest is lost.
fn relayed(written: &str, status: u16, body: &str) -> Option<Vec<u8>> {
    let head = written.strip_suffix(body)?.strip_suffix("\r\n\r\n")?;
    if !head.starts_with(&format!("HTTP/1.1 {status} ")) {
        return None;
    }
    let is_kept = |line: &&str| {
        let name = line.split(':').next().unwrap_or_default();
        !(matches!(name, "Server" | "Connection") || name == "Content-Length" && status == 204)
    };
    let kept: Vec<&str> = head.split("\r\n").filter(is_kept).collect();
    Some(format!("{}\r\nConnection: close\r\n\r\n{body}", kept.join("\r\n")).into_bytes())
}

/// Only way to a listening socket whose file is gone: nothing of it is left behind, however the process ends.
pub(super) struct UnlinkedListener(OwnedFd);

impl UnlinkedListener {
    /// Opens one in the first directory that takes it.
    pub(super) fn open() -> io::Result<(UnixListener, Self)> {
        fs::metadata(OWN_FILES)
            .map_err(|error| io::Error::new(error.kind(), format!("{OWN_FILES}: {error}")))?;
        let mut failure = io::ErrorKind::NotFound.into();
        for place in places() {
            match Self::open_in(&place) {
                Err(error) if !lacks_descriptors(&error) => {
                    let text = format!("no socket can be made in {}: {error}", place.display());
                    failure = io::Error::new(error.kind(), text);
                }
                result => return result,
            }
        }
        Err(failure)
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
        // The link leads to the socket itself, with or without a name.
        let address = SocketAddrUnix::new(format!("{OWN_FILES}/{}", self.0.as_raw_fd()))?;
        connect(&socket, &address)?;
        Ok(socket)
    }
}

impl Drop for UnlinkedListener {
    /// Wakes the accept thread of `tiny_http`, which would dial a name for that, and the name is gone.
    fn drop(&mut self) {
        drop(self.dial());
    }
}

const OWN_FILES: &str = "/proc/self/fd";

fn lacks_descriptors(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::MFILE | Errno::NFILE))
}

/// Lists the directories that may take the file of a socket: the service's own by systemd, then those in which most systems
/// let files be made. Containers that may write nothing else have one in `/dev/shm`.
fn places() -> impl Iterator<Item = PathBuf> {
    let runtime = env::var_os("RUNTIME_DIRECTORY").unwrap_or_default();
    let runtime = env::split_paths(&runtime).collect::<Vec<_>>();
    let temporary = env::var_os("TMPDIR").map(PathBuf::from);
    let usual = ["/run", "/dev/shm", "/tmp"].map(PathBuf::from);
    runtime.into_iter().chain(temporary).chain(usual).filter(|place| place.is_absolute())
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::{super::response::TEXT, *};

    const SILENCE: Duration = Duration::from_secs(10);

    /// Takes away the date, which every answer has.
    fn undated(written: &str) -> String {
        let is_date = |line: &&str| line.starts_with("Date: ");
        written.replace(written.split_inclusive("\r\n").find(is_date).unwrap(), "")
    }

    #[test]
    fn a_private_server_leaves_nothing_behind() {
        let (listener, door) = UnlinkedListener::open().unwrap();
        let address = listener.local_addr().unwrap();
        assert!(!address.as_pathname().unwrap().parent().unwrap().exists());
        let again = UnlinkedListener(door.0.try_clone().unwrap());
        let backend = Backend::behind(door, listener).unwrap();
        drop(backend.dial().unwrap().unwrap());
        drop(backend);
        let deadline = Instant::now() + Duration::from_secs(10);
        while again.dial().map(drop) != Err(Errno::CONNREFUSED) {
            assert!(Instant::now() < deadline, "the accept thread goes on");
            thread::yield_now();
        }
    }

    #[test]
    fn an_answer_is_relayed_whole_or_not_at_all() {
        let whole = "HTTP/1.1 200 OK\r\nServer: x\r\nContent-Length: 2\r\n\r\nhi";
        assert_eq!(
            relayed(whole, 200, "hi").unwrap(),
            b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nhi"
        );
        for end in 0..whole.len() {
            assert_eq!(relayed(&whole[..end], 200, "hi"), None, "{end}");
        }
        let empty = "HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n";
        let bytes = b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n".to_vec();
        assert_eq!(relayed(empty, 204, ""), Some(bytes));
        // A request that tiny_http drops is answered so.
        let dropped = "HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n";
        assert_eq!(relayed(dropped, 200, ""), None);
        assert!(relayed("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n", 200, "").is_some());
    }

    #[test]
    fn an_answer_of_any_length_is_written_whole() {
        let mut backend = Backend::start().unwrap();
        for length in [0, 1, 32 << 10, 64 << 10] {
            let response = Response::new(TEXT, "x".repeat(length))
                .with_header("X-Content-Type-Options", "nosniff")
                .with_header("Content-Security-Policy", "default-src 'none'");
            for is_head in [false, true] {
                let written = backend.write(&response, is_head, SILENCE).unwrap();
                for written in [written, unserved(&response, is_head)] {
                    let written = String::from_utf8(written).unwrap();
                    let expected = String::from_utf8(response.to_bytes(is_head)).unwrap();
                    assert_eq!(undated(&written), expected, "{length} {is_head}");
                }
            }
        }
    }

    #[test]
    fn an_answer_that_no_buffer_holds_is_written_without_the_server() {
        let (sender, written) = std::sync::mpsc::channel();
        let response = Response::json("x".repeat(1 << 20));
        let expected = String::from_utf8(response.to_bytes(false)).unwrap();
        // A thread of its own, as it may never return.
        let write = move || {
            sender.send(Backend::start().unwrap().write(&response, false, SILENCE).unwrap())
        };
        Builder::new().spawn(write).unwrap();
        let written = String::from_utf8(written.recv_timeout(SILENCE).unwrap()).unwrap();
        assert!(undated(&written) == expected);
    }

    #[test]
    fn a_late_request_is_not_taken_for_another() {
        let mut backend = Backend::start().unwrap();
        let response = Response::json("hi".to_owned());
        let late = "GET /late HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
        for _ in 0..10 {
            let mut abandoned = UnixStream::from(backend.dial().unwrap().unwrap());
            abandoned.write_all(late.as_bytes()).unwrap();
            drop(abandoned);
            let written = backend.write(&response, false, SILENCE).unwrap();
            assert!(written.ends_with(b"\r\n\r\nhi"), "{written:?}");
        }
    }
}
