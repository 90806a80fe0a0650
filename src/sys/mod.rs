//! The system calls that mio lacks, in one place, by rustix's safe interface.
//!
//! mio's own sockets want all I/O to go through them; on epoll, readiness is a matter of the descriptor alone (epoll(7)),
//! so descriptors of ours, registered through `SourceFd`, serve as well.

mod listener;
pub(crate) mod pacing;
pub(crate) mod rcvbuf;
pub(crate) mod socket_file;
pub(crate) mod tcp_info;

use std::{
    io::{self, IoSliceMut},
    net::{IpAddr, SocketAddr, SocketAddrV4, SocketAddrV6},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::PathBuf,
    time::{Duration, Instant},
};

pub(crate) use listener::Listener;
use mio::{Interest, Registry, Token, unix::SourceFd};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::{Errno, retry_on_intr},
    net::{
        AddressFamily, RecvAncillaryBuffer, RecvFlags, ReturnFlags, SendFlags, Shutdown,
        SocketAddrAny, SocketAddrUnix, SocketFlags, SocketType, bind, connect, getpeername,
        getsockname, recv, recvmsg, send, shutdown, socket_with, sockopt,
    },
    pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice},
    process::{Resource, Rlimit, getrlimit, setrlimit},
};
use tcp_info::TcpInfo;

/// After how long a silence, and how often, the kernel asks whether the peer is still there.
pub(crate) const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(15);

/// Time in which every connection is looked at once, for a peer that has vanished.
pub(crate) const SWEEP_TIME: Duration = Duration::from_secs(60);

/// Something to read, urgent bytes included.
pub(crate) const READABLE: Interest = Interest::READABLE.add(Interest::PRIORITY);

/// Room to write, too.
pub(crate) const EVERYTHING: Interest = READABLE.add(Interest::WRITABLE);

const OPEN: SocketFlags = SocketFlags::CLOEXEC.union(SocketFlags::NONBLOCK);

const SPLICE: SpliceFlags = SpliceFlags::MOVE.union(SpliceFlags::NONBLOCK);

/// A connected, or connecting, stream socket: TCP or UNIX, never blocking.
#[derive(Debug)]
pub(crate) struct Socket {
    fd: OwnedFd,
    is_unix: bool,
    is_paced: bool,
}

/// An address that can be dialled or bound as it is: names are resolved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum SocketAddress {
    /// IPv4 or IPv6.
    Inet(SocketAddr),
    /// A path in the file system.
    Unix(PathBuf),
    /// A name of a UNIX socket that is no file.
    Abstract(String),
}

/// How far a dial has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Dialled {
    /// Connected already, as UNIX sockets always are.
    Connected,
    /// The socket becomes writable, or fails.
    InProgress,
}

/// What a read yielded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Read {
    /// How many bytes.
    pub(crate) bytes: usize,
    /// Whether more may be there although the buffer is not full.
    pub(crate) was_stopped: bool,
}

/// The two ends of a pipe.
#[derive(Debug)]
pub(crate) struct PipeEnds {
    read: OwnedFd,
    write: OwnedFd,
}

impl Socket {
    /// Begins to connect, from `source` or from where the system chooses. A full UNIX backlog is `WouldBlock`, and no event
    /// follows: try again later.
    pub(crate) fn dial(
        address: &SocketAddress,
        source: Option<IpAddr>,
    ) -> io::Result<(Self, Dialled)> {
        let mut is_paced = false;
        let (socket, result) = match address {
            SocketAddress::Inet(address) => {
                let socket = socket_with(family(address), SocketType::STREAM, OPEN, None)?;
                sockopt::set_tcp_nodelay(&socket, true)?;
                sockopt::set_socket_oobinline(&socket, true)?;
                is_paced = pacing::spare(&socket, address);
                if let Some(source) = source {
                    bind_source(&socket, source)?;
                }
                let result = connect(&socket, address);
                (socket, result)
            }
            SocketAddress::Unix(path) => {
                let socket = unix_socket()?;
                let result = connect(&socket, &SocketAddrUnix::new(path)?);
                (socket, result)
            }
            SocketAddress::Abstract(name) => {
                let socket = unix_socket()?;
                let result = connect(&socket, &SocketAddrUnix::new_abstract_name(name.as_bytes())?);
                (socket, result)
            }
        };
        let is_unix = !matches!(address, SocketAddress::Inet(_));
        let socket = Self { fd: socket, is_unix, is_paced };
        match result {
            Ok(()) => Ok((socket, Dialled::Connected)),
            Err(Errno::INPROGRESS) => Ok((socket, Dialled::InProgress)),
            Err(error) => Err(error.into()),
        }
    }

    /// Why the connection attempt failed, if it has. Clears the error, so it is for dials alone: once bytes flow, a reset
    /// must be learnt from the data path, after the bytes before it.
    pub(crate) fn take_dial_error(&self) -> Option<io::Error> {
        match sockopt::socket_error(self) {
            Ok(Ok(())) => None,
            Ok(Err(error)) | Err(error) => Some(error.into()),
        }
    }

    /// Has the kernel ask silent peers whether they are there. Dialled sockets get it late: most connections end before it
    /// matters, and it takes three calls. (Accepted ones inherit it.)
    pub(crate) fn keep_alive(&self) {
        if !self.is_unix && keep_alive(&self.fd).is_err() {
            log::debug!("the system refused a keepalive");
        }
    }

    /// Tells what it is registered for at first. A UNIX socket would tell of room whenever its peer has read, so it is asked
    /// for that only where a write has found none.
    pub(crate) fn first_interest(&self) -> Interest {
        if self.is_unix { READABLE } else { EVERYTHING }
    }

    /// Registers for its first interest, edge-triggered. What is ready already is told at the next poll.
    pub(crate) fn register(&self, registry: &Registry, token: Token) -> io::Result<()> {
        register(self, registry, token, self.first_interest())
    }

    /// Changes what it is registered for. What is ready already is told at the next poll.
    pub(crate) fn reregister(
        &self,
        registry: &Registry,
        token: Token,
        interest: Interest,
    ) -> io::Result<()> {
        registry.reregister(&mut SourceFd(&self.fd.as_raw_fd()), token, interest)
    }

    /// Reads at most a buffer full. 0 is the end of the stream.
    pub(crate) fn recv(&self, buffer: &mut [u8]) -> io::Result<Read> {
        if self.is_unix {
            // A read stops at each message that carries descriptors. They are not carried on, and so cut off.
            let mut into = [IoSliceMut::new(buffer)];
            let mut nothing = RecvAncillaryBuffer::default();
            let read =
                retry_on_intr(|| recvmsg(self, &mut into, &mut nothing, RecvFlags::CMSG_CLOEXEC))?;
            let was_stopped = read.flags.contains(ReturnFlags::CTRUNC);
            return Ok(Read { bytes: read.bytes, was_stopped });
        }
        let (_, bytes) = retry_on_intr(|| recv(self, &mut *buffer, RecvFlags::empty()))?;
        Ok(Read { bytes, was_stopped: false })
    }

    /// Looks at the first bytes and leaves them where they are.
    pub(crate) fn peek(&self, buffer: &mut [u8]) -> io::Result<usize> {
        Ok(retry_on_intr(|| recv(self, &mut *buffer, RecvFlags::PEEK))?.1)
    }

    /// Writes what fits.
    pub(crate) fn send(&self, bytes: &[u8]) -> io::Result<usize> {
        Ok(retry_on_intr(|| send(self, bytes, SendFlags::NOSIGNAL))?)
    }

    /// Passes on the end of the stream: a FIN behind all that was written.
    pub(crate) fn shut_down_write(&self) -> io::Result<()> {
        Ok(shutdown(self, Shutdown::Write)?)
    }

    /// Makes the close to come a reset, which also discards what the peer has not yet acknowledged. UNIX sockets know no
    /// reset; they close.
    pub(crate) fn reset_on_close(&self) {
        // The socket may be dead already; then it is closed all the same.
        sockopt::set_socket_linger(self, Some(Duration::ZERO)).ok();
    }

    /// Whether the peer, whose bytes nobody reads yet, has gone: has reset, has closed fully, or has shut its write side
    /// without a word.
    ///
    /// On TCP a full close and a half-close look alike until we write. With bytes queued it is a client that waits for its
    /// answer (as it would in a server's accept queue); without, a health check that has gone. UNIX sockets tell the two
    /// apart.
    pub(crate) fn has_gone(&self) -> bool {
        let mut look = [PollFd::new(self, PollFlags::RDHUP)];
        if poll(&mut look, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_err() {
            return false;
        }
        let seen = look.map(|fd| fd.revents())[0];
        if seen.intersects(PollFlags::ERR | PollFlags::HUP) {
            return true;
        }
        let silent = || rustix::io::ioctl_fionread(self).is_ok_and(|bytes| bytes == 0);
        seen.contains(PollFlags::RDHUP) && silent() && !self.is_unix()
    }

    /// The peer's address, for the log. A peer that has reset has none.
    pub(crate) fn peer(&self) -> String {
        match getpeername(self) {
            Ok(Some(address)) => SocketAddress::try_from(address)
                .map_or_else(|()| "unix".into(), |it| it.to_string()),
            Ok(None) | Err(_) => "unknown".into(),
        }
    }

    /// Whether it is a UNIX socket, which knows no reset.
    pub(crate) fn is_unix(&self) -> bool {
        self.is_unix
    }

    /// Returns true if the kernel paces what is sent (see `pacing.rs`).
    pub(crate) fn is_paced(&self) -> bool {
        self.is_paced
    }

    /// Whether it is connected to itself. TCP does so (RFC 9293, 3.5) where nobody listens at a port of this host, and the
    /// system happens to choose the same one to dial from.
    pub(crate) fn is_self_connected(&self) -> bool {
        let ends = (getsockname(self), getpeername(self));
        !self.is_unix && matches!(ends, (Ok(own), Ok(Some(peer))) if own == peer)
    }

    /// What TCP knows of the connection.
    pub(crate) fn tcp_info(&self) -> Option<TcpInfo> {
        if self.is_unix { None } else { TcpInfo::of(self).ok() }
    }

    /// Tells whether its peer is this very process, which listens at `own`. A UNIX socket does not tell where its peer's file
    /// was, and others may have listened by that name before.
    pub(crate) fn is_loop(&self, own: &[SocketAddress]) -> bool {
        if self.is_unix {
            let peer =
                nix::sys::socket::getsockopt(self, nix::sys::socket::sockopt::PeerCredentials);
            return peer.is_ok_and(|peer| u32::try_from(peer.pid()) == Ok(std::process::id()));
        }
        let peer = getpeername(self).ok().flatten().map(SocketAddress::try_from);
        matches!(peer, Some(Ok(peer)) if own.contains(&peer))
    }

    /// Returns the memory of all that the peer's kernel has not acknowledged yet: a reset would discard it. 0 on a UNIX socket,
    /// whose peer has at once what is written.
    pub(crate) fn unacknowledged(&self) -> io::Result<u32> {
        if self.is_unix { Ok(0) } else { tcp_info::unacknowledged(self) }
    }

    /// Returns true if the peer's host does not answer any more. False where the kernel does not tell.
    pub(crate) fn has_vanished(&self) -> bool {
        !self.is_unix && tcp_info::has_peer_vanished(self).unwrap_or(false)
    }

    /// Ends the reading: what has come is still read, and the end of the stream behind it.
    pub(crate) fn shut_down_read(&self) {
        // It can fail for a dead socket alone, whose stream has ended.
        shutdown(self, Shutdown::Read).ok();
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl PipeEnds {
    /// Moves up to `len` bytes from a socket into the pipe.
    pub(crate) fn splice_from(&self, source: &Socket, len: usize) -> io::Result<usize> {
        Ok(retry_on_intr(|| splice(source, None, &self.write, None, len, SPLICE))?)
    }

    /// Moves up to `len` bytes from the pipe to a socket. No `SPLICE_F_MORE`: it would delay the last bytes by 200 ms. A
    /// dead peer raises SIGPIPE, which Rust programs ignore.
    pub(crate) fn splice_to(&self, sink: &Socket, len: usize) -> io::Result<usize> {
        Ok(retry_on_intr(|| splice(&self.read, None, sink, None, len, SPLICE))?)
    }
}

impl std::fmt::Display for SocketAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Inet(address) => write!(f, "tcp://{address}"),
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
            Self::Abstract(name) => write!(f, "unix://@{name}"),
        }
    }
}

impl TryFrom<SocketAddrAny> for SocketAddress {
    type Error = ();

    fn try_from(address: SocketAddrAny) -> Result<Self, ()> {
        if let Ok(inet) = SocketAddrV4::try_from(address.clone()) {
            return Ok(Self::Inet(inet.into()));
        }
        SocketAddrV6::try_from(address).map(|inet| Self::Inet(inet.into())).map_err(drop)
    }
}

/// The time by which workers go.
pub(crate) fn now() -> Instant {
    Instant::now()
}

/// A new pipe of `bytes`, or as large as the system allows.
pub(crate) fn pipe(bytes: usize) -> io::Result<PipeEnds> {
    let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
    // Refused beyond the user's share; then it has the size that pipes have by default.
    fcntl_setpipe_size(&write, bytes).ok();
    Ok(PipeEnds { read, write })
}

/// Whether something has failed for want of what is free again in a moment: a descriptor, memory, a place in a UNIX backlog,
/// a watch of an epoll instance.
pub(crate) fn is_shortage(error: &io::Error) -> bool {
    error.raw_os_error().map(Errno::from_raw_os_error).is_some_and(|errno| {
        matches!(
            errno,
            Errno::AGAIN
                | Errno::MFILE
                | Errno::NFILE
                | Errno::NOBUFS
                | Errno::NOMEM
                | Errno::NOSPC
        )
    })
}

/// Whether a dial has failed because no local port is free. To look for one takes the kernel long.
pub(crate) fn is_port_shortage(error: &io::Error) -> bool {
    error.raw_os_error() == Some(Errno::ADDRNOTAVAIL.raw_os_error())
}

/// Whether sockets can be bound to `ip`: whether it is an address of this host.
pub(crate) fn check_source(ip: IpAddr) -> io::Result<()> {
    let address = SocketAddr::new(ip, 0);
    let socket = socket_with(family(&address), SocketType::STREAM, OPEN, None)?;
    bind_source(&socket, ip)
}

/// Raises the limit of open files as far as an unprivileged process may. Returns the limit.
pub(crate) fn raise_open_files() -> u64 {
    let limit = getrlimit(Resource::Nofile);
    // Refused only where the limit is not ours to change; then what is there must do.
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum }).ok();
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// Makes `source` the address that `socket` connects from. Its port is chosen when it connects: chosen now, it would be
/// taken from all servers instead of from one.
fn bind_source(socket: &OwnedFd, source: IpAddr) -> io::Result<()> {
    nix::sys::socket::setsockopt(socket, nix::sys::socket::sockopt::IpBindAddressNoPort, &true)?;
    bind(socket, &SocketAddr::new(source, 0)).map_err(|error| match error {
        // The same error as when ports are used up, and another cause.
        Errno::ADDRNOTAVAIL => io::Error::new(
            io::ErrorKind::AddrNotAvailable,
            format!("{source} is no address of this host"),
        ),
        error => error.into(),
    })
}

fn register(
    fd: &impl AsFd,
    registry: &Registry,
    token: Token,
    interest: Interest,
) -> io::Result<()> {
    registry.register(&mut SourceFd(&fd.as_fd().as_raw_fd()), token, interest)
}

/// The idle time comes last: set on a socket that has been silent for longer, it has the kernel ask at once.
fn keep_alive(socket: &OwnedFd) -> rustix::io::Result<()> {
    sockopt::set_socket_keepalive(socket, true)?;
    sockopt::set_tcp_keepintvl(socket, KEEPALIVE_INTERVAL)?;
    sockopt::set_tcp_keepidle(socket, KEEPALIVE_INTERVAL)
}

/// A UNIX socket, with urgent bytes kept in line.
fn unix_socket() -> rustix::io::Result<OwnedFd> {
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, OPEN, None)?;
    sockopt::set_socket_oobinline(&socket, true)?;
    Ok(socket)
}

fn family(address: &SocketAddr) -> AddressFamily {
    if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 }
}

fn local_inet(socket: &OwnedFd) -> io::Result<SocketAddr> {
    match SocketAddress::try_from(getsockname(socket)?) {
        Ok(SocketAddress::Inet(address)) => Ok(address),
        Ok(SocketAddress::Unix(_) | SocketAddress::Abstract(_)) | Err(()) => {
            Err(io::ErrorKind::InvalidInput.into())
        }
    }
}

/// Two UNIX sockets connected to each other.
#[cfg(any(test, fuzzing))]
pub(crate) fn socket_pair() -> io::Result<(Socket, Socket)> {
    let (one, other) =
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, OPEN, None)?;
    let socket = |fd| Socket { fd, is_unix: true, is_paced: false };
    Ok((socket(one), socket(other)))
}

#[cfg(test)]
mod tests {
    use std::{sync::Barrier, thread};

    use super::*;

    #[test]
    fn of_two_that_listen_on_a_port_at_once_one_has_it() {
        const ROUNDS: usize = 200;
        // An address of this test alone, so that the port stays free.
        let any: SocketAddr = "127.7.7.8:0".parse().unwrap();
        let address = Listener::tcp(any, 1).unwrap().first().unwrap().local_inet().unwrap();
        for round in 0..ROUNDS {
            let barrier = Barrier::new(2);
            let start = || {
                barrier.wait();
                Listener::tcp(address, 3)
            };
            let results = thread::scope(|scope| {
                [scope.spawn(start), scope.spawn(start)].map(|thread| thread.join().unwrap())
            });
            let owners = results.iter().filter(|result| result.is_ok()).count();
            assert_eq!(owners, 1, "round {round}: {results:?}");
        }
    }

    #[test]
    fn all_listeners_of_a_port_get_clients() {
        let listeners = Listener::tcp("127.0.0.1:0".parse().unwrap(), 3).unwrap();
        let address = SocketAddress::Inet(listeners.first().unwrap().local_inet().unwrap());
        let mut waiting = listeners.iter().collect::<Vec<_>>();
        let mut clients = Vec::new();
        while !waiting.is_empty() {
            assert!(clients.len() < 1000, "{} listeners get none", waiting.len());
            clients.push(Socket::dial(&address, None).unwrap());
            waiting.retain(|listener| listener.accept().is_err());
        }
    }
}
