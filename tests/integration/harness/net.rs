//! Addresses, listeners and streams that are TCP or UNIX alike, with timeouts everywhere.

use std::{
    fmt, fs,
    io::{self, ErrorKind, Read, Write},
    net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        linux::net::SocketAddrExt as _,
        unix::net::{self as unix, UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::net::{
    AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
    sockopt::{self, Timeout},
};

use super::{PATIENCE, raise_descriptor_limit, stream::Stream};

/// Backlog of the tests' listeners.
const BACKLOG: i32 = 4096;

/// The kinds of addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Family {
    Tcp4,
    Tcp6,
    Unix,
    Abstract,
}

impl Family {
    pub(crate) fn is_tcp(self) -> bool {
        matches!(self, Self::Tcp4 | Self::Tcp6)
    }

    /// Returns true if this machine has such addresses. IPv6 may be switched off.
    pub(crate) fn is_available(self) -> bool {
        self != Self::Tcp6 || TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).is_ok()
    }
}

/// Address of a listener.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Addr {
    Tcp(SocketAddr),
    Unix(PathBuf),
    Abstract(String),
}

impl Addr {
    /// Returns a free address to listen at: port 0, or the file `name` in `dir`.
    pub(crate) fn free(family: Family, dir: &Path, name: &str) -> Self {
        match family {
            Family::Tcp4 => Self::Tcp((Ipv4Addr::LOCALHOST, 0).into()),
            Family::Tcp6 => Self::Tcp((Ipv6Addr::LOCALHOST, 0).into()),
            Family::Unix => Self::Unix(dir.join(name)),
            // The name of the directory is unique on this machine, and so are names that begin with it.
            Family::Abstract => Self::Abstract(dir.join(name).display().to_string()),
        }
    }

    /// Reads `tcp://ip:port`, `unix:///path` or `unix://@name`, as the log writes it.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        if let Some(name) = text.strip_prefix("unix://@") {
            return Some(Self::Abstract(name.to_owned()));
        }
        if let Some(path) = text.strip_prefix("unix://") {
            return Some(Self::Unix(path.into()));
        }
        text.strip_prefix("tcp://")?.parse().ok().map(Self::Tcp)
    }

    pub(crate) fn port(&self) -> u16 {
        match self {
            Self::Tcp(addr) => addr.port(),
            Self::Unix(_) | Self::Abstract(_) => panic!("{self} has no port"),
        }
    }

    pub(crate) fn path(&self) -> &Path {
        match self {
            Self::Tcp(_) | Self::Abstract(_) => panic!("{self} has no path"),
            Self::Unix(path) => path,
        }
    }

    pub(crate) fn try_connect(&self) -> io::Result<Stream> {
        raise_descriptor_limit();
        match self {
            Self::Tcp(addr) => TcpStream::connect_timeout(addr, PATIENCE)?.try_into(),
            Self::Unix(path) => connect_unix(&SocketAddrUnix::new(path)?),
            Self::Abstract(name) => {
                connect_unix(&SocketAddrUnix::new_abstract_name(name.as_bytes())?)
            }
        }
    }

    #[track_caller]
    pub(crate) fn connect(&self) -> Stream {
        self.try_connect().unwrap_or_else(|error| panic!("cannot connect to {self}: {error}"))
    }
}

impl fmt::Display for Addr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(addr) => write!(f, "tcp://{addr}"),
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
            Self::Abstract(name) => write!(f, "unix://@{name}"),
        }
    }
}

/// Connects to a UNIX socket within a time; the standard library's connect would wait for ever on a full backlog.
fn connect_unix(addr: &SocketAddrUnix) -> io::Result<Stream> {
    let flags = SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    sockopt::set_socket_timeout(&socket, Timeout::Send, Some(PATIENCE))?;
    rustix::net::connect(&socket, addr)?;
    UnixStream::from(socket).try_into()
}

/// A listening socket of the tests.
#[derive(Debug)]
pub(crate) enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Listener {
    pub(crate) fn bind(addr: &Addr) -> Self {
        raise_descriptor_limit();
        let listener = match addr {
            Addr::Tcp(addr) => Self::Tcp(TcpListener::bind(addr).expect("a free port")),
            Addr::Unix(path) => Self::Unix(UnixListener::bind(path).expect("a free path")),
            Addr::Abstract(name) => {
                let addr = unix::SocketAddr::from_abstract_name(name).expect("a short name");
                Self::Unix(UnixListener::bind_addr(&addr).expect("a free name"))
            }
        };
        listener.backlog(BACKLOG);
        listener
    }

    /// Sets the number of connections that may wait to be accepted.
    pub(crate) fn backlog(&self, connections: i32) {
        rustix::net::listen(self, connections).expect("a listening socket");
    }

    /// Fills the accept queue of a TCP listener that accepts no connection. Returns the number of connections in it.
    pub(crate) fn fill(&self) -> usize {
        let Addr::Tcp(addr) = self.addr() else { panic!("no queue that drops") };
        let connect = || TcpStream::connect_timeout(&addr, Duration::from_millis(200));
        let mut waiting = 0;
        // A queued connection stays in the queue although its client is dropped here.
        while connect().is_ok() {
            waiting += 1;
        }
        waiting
    }

    pub(crate) fn addr(&self) -> Addr {
        match self {
            Self::Tcp(listener) => Addr::Tcp(listener.local_addr().expect("a bound socket")),
            Self::Unix(listener) => {
                let addr = listener.local_addr().expect("a bound socket");
                match addr.as_abstract_name() {
                    Some(name) => Addr::Abstract(String::from_utf8_lossy(name).into_owned()),
                    None => Addr::Unix(addr.as_pathname().expect("a socket with a path").into()),
                }
            }
        }
    }

    pub(crate) fn accept(&self) -> io::Result<Stream> {
        match self {
            Self::Tcp(listener) => listener.accept()?.0.try_into(),
            Self::Unix(listener) => listener.accept()?.0.try_into(),
        }
    }

    /// Stops listening. A thread that waits in `accept` gets an error, and further clients are refused.
    pub(crate) fn close(&self) {
        // An error means that it was closed before.
        let _ = rustix::net::shutdown(self, rustix::net::Shutdown::Both);
        if let Addr::Unix(path) = self.addr() {
            drop(fs::remove_file(path));
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(listener) => listener.as_fd(),
            Self::Unix(listener) => listener.as_fd(),
        }
    }
}

/// TCP port that refuses connections and cannot be taken by others, as it is bound and does not listen yet.
pub(crate) struct Reserved {
    socket: OwnedFd,
    addr: SocketAddr,
}

/// Reserves a port of 127.0.0.1.
pub(crate) fn reserve() -> Reserved {
    let flags = SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::INET, SocketType::STREAM, flags, None)
        .expect("a socket");
    rustix::net::bind(&socket, &SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).expect("a free port");
    let addr = rustix::net::getsockname(&socket).expect("a bound socket");
    Reserved { socket, addr: addr.try_into().expect("an IP address") }
}

impl Reserved {
    pub(crate) fn addr(&self) -> Addr {
        Addr::Tcp(self.addr)
    }

    pub(crate) fn listen(self) -> Listener {
        rustix::net::listen(&self.socket, BACKLOG).expect("a listening socket");
        Listener::Tcp(TcpListener::from(self.socket))
    }
}

/// The end of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// The peer has shut its write side.
    Eof,
    /// The peer has aborted the connection.
    Reset,
    /// Another error; a timeout is [`ErrorKind::WouldBlock`].
    Failed(ErrorKind),
}

impl From<io::Error> for End {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            ErrorKind::ConnectionReset => Self::Reset,
            kind => Self::Failed(kind),
        }
    }
}

/// All bytes that came, and the end after them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Received {
    pub(crate) bytes: Vec<u8>,
    pub(crate) end: End,
}

impl Received {
    /// Returns these bytes and the orderly end behind them.
    pub(crate) fn ended(bytes: &[u8]) -> Self {
        Self { bytes: bytes.to_vec(), end: End::Eof }
    }
}

impl Stream {
    pub(crate) fn try_clone(&self) -> Self {
        match self {
            Self::Tcp(stream) => Self::Tcp(stream.try_clone().expect("a second descriptor")),
            Self::Unix(stream) => Self::Unix(stream.try_clone().expect("a second descriptor")),
        }
    }

    #[track_caller]
    pub(crate) fn send(&mut self, bytes: &[u8]) {
        self.write_all(bytes)
            .unwrap_or_else(|error| panic!("cannot send {} bytes: {error}", bytes.len()));
    }

    /// Sends one byte of urgent data (TCP only).
    #[track_caller]
    pub(crate) fn send_urgent(&mut self, byte: u8) {
        assert_eq!(rustix::net::send(&*self, &[byte], SendFlags::OOB), Ok(1));
    }

    /// Reads exactly `length` bytes.
    #[track_caller]
    pub(crate) fn receive(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.read_exact(&mut bytes)
            .unwrap_or_else(|error| panic!("cannot read {length} bytes: {error}"));
        bytes
    }

    /// Reads until the stream ends, is reset or times out.
    pub(crate) fn receive_all(&mut self) -> Received {
        let mut bytes = Vec::new();
        let end = self.read_to_end(&mut bytes).map_or_else(End::from, |_| End::Eof);
        Received { bytes, end }
    }

    /// Shuts the write side: the peer reads an EOF.
    #[track_caller]
    pub(crate) fn finish(&self) {
        match self {
            Self::Tcp(stream) => stream.shutdown(Shutdown::Write),
            Self::Unix(stream) => stream.shutdown(Shutdown::Write),
        }
        .expect("a connected socket");
    }

    /// Closes with a reset. A UNIX socket does so only if unread bytes are left.
    pub(crate) fn reset(self) {
        if let Self::Tcp(stream) = &self {
            sockopt::set_socket_linger(stream, Some(Duration::ZERO)).expect("SO_LINGER");
        }
    }

    /// Sends `bytes` and reads as many back at the same time, as an echo stalls a client that first sends all and then reads.
    #[track_caller]
    pub(crate) fn round_trip(&mut self, bytes: &[u8]) -> Vec<u8> {
        let mut writer = self.try_clone();
        std::thread::scope(|scope| {
            scope.spawn(move || writer.send(bytes));
            self.receive(bytes.len())
        })
    }

    /// Checks that the other side echoes.
    #[track_caller]
    pub(crate) fn assert_echo(&mut self, bytes: &[u8]) {
        self.send(bytes);
        let got = self.receive(bytes.len());
        assert_eq!(got, bytes);
    }

    /// Sets the longest time of a read.
    pub(crate) fn read_timeout(&self, timeout: Duration) {
        self.set_read_timeout(timeout).expect("a timeout above zero");
    }

    /// Sets the longest time of a write.
    pub(crate) fn write_timeout(&self, timeout: Duration) {
        self.set_write_timeout(timeout).expect("a timeout above zero");
    }
}

impl TryFrom<TcpStream> for Stream {
    type Error = io::Error;

    fn try_from(stream: TcpStream) -> io::Result<Self> {
        Self::tcp(stream, PATIENCE)
    }
}

impl TryFrom<UnixStream> for Stream {
    type Error = io::Error;

    fn try_from(stream: UnixStream) -> io::Result<Self> {
        Self::unix(stream, PATIENCE)
    }
}
