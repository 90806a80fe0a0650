//! The system calls on the way of a byte that mio lacks, by the safe interfaces of rustix and nix. The control plane has
//! a few of its own (`control/`).
//!
//! mio wants all I/O of its own socket types to go through them. On epoll, readiness belongs to the descriptor alone
//! (epoll(7)), so our own descriptors, registered through `SourceFd`, serve as well.

pub(crate) mod boot;
mod keepalive;
mod listener;
pub(crate) mod pacing;
mod peer;
pub(crate) mod rcvbuf;
pub(crate) mod reach;
pub(crate) mod sock_diag;
pub(crate) mod socket_file;
pub(crate) mod tcp_info;
pub(crate) mod tcp_table;
mod words;

use std::{
    io::{self, IoSliceMut},
    net::{IpAddr, SocketAddr, SocketAddrV4, SocketAddrV6},
    num::NonZeroU8,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::PathBuf,
    time::{Duration, Instant},
};

pub(crate) use keepalive::KEEPALIVE_INTERVAL;
use keepalive::keep_alive;
pub(crate) use listener::{Listener, ListenerWords};
use mio::{Interest, Registry, Token, unix::SourceFd};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
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
use serde::{Deserialize, Serialize};
pub(crate) use std::os::fd::{BorrowedFd as Lent, OwnedFd as Descriptor};
use tcp_info::TcpInfo;
pub(crate) use words::SocketWords;

/// Time in which every connection is checked once for a peer that has vanished.
pub(crate) const SWEEP_TIME: Duration = Duration::from_secs(60);

/// Interest in bytes to read, urgent ones included.
pub(crate) const READABLE: Interest = Interest::READABLE.add(Interest::PRIORITY);

/// Interest in bytes to read and in room to write.
pub(crate) const EVERYTHING: Interest = READABLE.add(Interest::WRITABLE);

const OPEN: SocketFlags = SocketFlags::CLOEXEC.union(SocketFlags::NONBLOCK);

const SPLICE: SpliceFlags = SpliceFlags::MOVE.union(SpliceFlags::NONBLOCK);

/// A non-blocking stream socket, TCP or UNIX, connected or connecting.
#[derive(Debug)]
pub(crate) struct Socket {
    fd: OwnedFd,
    is_unix: bool,
    is_paced: bool,
    /// Number of keepalive probes to return to, while the peer is probed often.
    usual_probes: Option<NonZeroU8>,
}

/// An address that can be dialled or bound without a name lookup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum SocketAddress {
    /// IPv4 or IPv6.
    Inet(SocketAddr),
    /// Path of a socket file.
    Unix(PathBuf),
    /// Name of a UNIX socket without a file (unix(7), abstract).
    Abstract(String),
}

/// Progress of a dial.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Dialled {
    /// Connected at once, as UNIX sockets always are.
    Connected,
    /// Under way: the socket becomes writable or fails.
    InProgress,
}

/// Result of a read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Read {
    /// Number of bytes.
    pub(crate) bytes: usize,
    /// Set if more bytes may be there although the buffer is not full.
    pub(crate) was_stopped: bool,
}

/// The two ends of a pipe.
#[derive(Debug)]
pub(crate) struct PipeEnds {
    read: OwnedFd,
    write: OwnedFd,
}

impl Socket {
    /// Begins to connect, from `source` or from an address that the system chooses. A full UNIX backlog is
    /// `WouldBlock`; no event follows, so the caller has to try again later.
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
        let socket = Self { fd: socket, is_unix, is_paced, usual_probes: None };
        match result {
            Ok(()) => Ok((socket, Dialled::Connected)),
            Err(Errno::INPROGRESS) => Ok((socket, Dialled::InProgress)),
            Err(error) => Err(error.into()),
        }
    }

    /// Takes the error of the connection attempt if it failed. Reading `SO_ERROR` clears it, so this is for dials
    /// alone: once bytes flow, a reset must be learnt from the data path, after the bytes before it.
    pub(crate) fn take_dial_error(&self) -> Option<io::Error> {
        match sockopt::socket_error(self) {
            Ok(Ok(())) => None,
            Ok(Err(error)) | Err(error) => Some(error.into()),
        }
    }

    /// Returns the interest of the first registration. A UNIX socket would report room whenever its peer has read, so
    /// it is asked for room only after a write found none.
    pub(crate) fn first_interest(&self) -> Interest {
        if self.is_unix { READABLE } else { EVERYTHING }
    }

    /// Registers for the first interest, edge-triggered. Present readiness is reported at the next poll.
    pub(crate) fn register(&self, registry: &Registry, token: Token) -> io::Result<()> {
        register(self, registry, token, self.first_interest())
    }

    /// Changes the interest. Present readiness is reported at the next poll.
    pub(crate) fn reregister(
        &self,
        registry: &Registry,
        token: Token,
        interest: Interest,
    ) -> io::Result<()> {
        registry.reregister(&mut SourceFd(&self.fd.as_raw_fd()), token, interest)
    }

    /// Reads into `buffer`. Returns 0 bytes at the end of the stream.
    pub(crate) fn recv(&self, buffer: &mut [u8]) -> io::Result<Read> {
        if self.is_unix {
            // A read stops at each message that carries descriptors. They are not passed on: without room for them, the
            // kernel closes them and sets `MSG_CTRUNC`.
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

    /// Copies the first bytes without taking them from the socket.
    pub(crate) fn peek(&self, buffer: &mut [u8]) -> io::Result<usize> {
        Ok(retry_on_intr(|| recv(self, &mut *buffer, RecvFlags::PEEK))?.1)
    }

    /// Writes as many bytes as fit.
    pub(crate) fn send(&self, bytes: &[u8]) -> io::Result<usize> {
        Ok(retry_on_intr(|| send(self, bytes, SendFlags::NOSIGNAL))?)
    }

    /// Ends the stream: sends a FIN behind all bytes written before.
    pub(crate) fn shut_down_write(&self) -> io::Result<()> {
        Ok(shutdown(self, Shutdown::Write)?)
    }

    /// Turns the coming close into a reset, which also discards unacknowledged bytes. UNIX sockets have no reset; they
    /// close.
    pub(crate) fn reset_on_close(&self) {
        // It fails only on a dead socket, which needs no reset.
        sockopt::set_socket_linger(self, Some(Duration::ZERO)).ok();
    }

    /// Returns true if a peer whose bytes are not read yet has gone: it has reset, or closed without sending a byte.
    ///
    /// A client with queued bytes may wait for its answer, or need none. On TCP, a full close and a half-close look alike
    /// until we write; without bytes, both are a health check that has gone. UNIX sockets tell the two apart. The first
    /// `header` bytes are not the client's own, and count as none.
    pub(crate) fn has_gone(&self, header: u64) -> bool {
        let mut look = [PollFd::new(self, PollFlags::RDHUP)];
        if poll(&mut look, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_err() {
            return false;
        }
        let seen = look.map(|fd| fd.revents())[0];
        // TCP hangs up on both directions only with a reset.
        let (gone, ended) = if self.is_unix {
            (PollFlags::ERR, PollFlags::HUP)
        } else {
            (PollFlags::ERR | PollFlags::HUP, PollFlags::RDHUP)
        };
        let silent = || rustix::io::ioctl_fionread(self).is_ok_and(|bytes| bytes <= header);
        seen.intersects(gone) || seen.contains(ended) && silent()
    }

    /// Returns the peer's address for the log. A peer that has reset has none.
    pub(crate) fn peer(&self) -> String {
        match getpeername(self) {
            _ if self.is_unix => peer_process(self),
            Ok(Some(address)) => SocketAddress::try_from(address)
                .map_or_else(|()| "unknown".into(), |it| it.to_string()),
            Ok(None) | Err(_) => "unknown".into(),
        }
    }

    /// Returns the address that the peer of a TCP socket is connected to.
    pub(crate) fn local_inet(&self) -> Option<SocketAddr> {
        listener::local_inet(&self.fd).ok()
    }

    /// Returns true for a UNIX socket.
    pub(crate) fn is_unix(&self) -> bool {
        self.is_unix
    }

    /// Returns true if the kernel paces the bytes sent (see `pacing.rs`).
    pub(crate) fn is_paced(&self) -> bool {
        self.is_paced
    }

    /// Returns true if the socket is connected to itself. TCP allows that (RFC 9293, 3.5): it happens when no process
    /// listens on a port of this host and the system chooses the same port as the source.
    pub(crate) fn is_self_connected(&self) -> bool {
        let ends = (getsockname(self), getpeername(self));
        !self.is_unix && matches!(ends, (Ok(own), Ok(Some(peer))) if own == peer)
    }

    /// Returns the kernel's TCP state of the connection, or `None` for UNIX sockets and on failure.
    pub(crate) fn tcp_info(&self) -> Option<TcpInfo> {
        if self.is_unix { None } else { TcpInfo::of(self).ok() }
    }

    /// Returns true if the peer is this very process, which listens on `own`. A UNIX socket is recognised by its peer's
    /// process id: it does not show the peer's file, whose path another process may have used before.
    pub(crate) fn is_loop(&self, own: &[SocketAddress]) -> bool {
        if self.is_unix {
            let peer =
                nix::sys::socket::getsockopt(self, nix::sys::socket::sockopt::PeerCredentials);
            return peer.is_ok_and(|peer| u32::try_from(peer.pid()) == Ok(std::process::id()));
        }
        let peer = getpeername(self).ok().flatten().map(SocketAddress::try_from);
        matches!(peer, Some(Ok(peer)) if own.contains(&peer))
    }

    /// Returns the memory of bytes that the peer's kernel has not acknowledged: a reset would discard them. Returns 0
    /// for a UNIX socket, whose peer receives at once.
    pub(crate) fn unacknowledged(&self) -> io::Result<u32> {
        if self.is_unix { Ok(0) } else { tcp_info::unacknowledged(self) }
    }

    /// Returns true if the peer's host does not answer any more, and false if the kernel does not tell.
    pub(crate) fn has_vanished(&self) -> bool {
        !self.is_unix && tcp_info::has_peer_vanished(self).unwrap_or(false)
    }

    /// Shuts the read side. Bytes that have arrived are still read, and the end of the stream behind them.
    pub(crate) fn shut_down_read(&self) {
        // It fails only on a dead socket, whose stream has ended.
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

    /// Moves up to `len` bytes from the pipe to a socket. `SPLICE_F_MORE` is not set: it would delay the last bytes by
    /// 200 ms. A dead peer raises SIGPIPE, which Rust programs ignore.
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

/// Returns the monotonic time. Workers go by this clock, which the simulation replaces.
pub(crate) fn now() -> Instant {
    Instant::now()
}

/// Makes a pipe of `bytes`, or of the default size if the system refuses that.
pub(crate) fn pipe(bytes: usize) -> io::Result<PipeEnds> {
    let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
    // The system refuses beyond the user's share (pipe(7)).
    fcntl_setpipe_size(&write, bytes).ok();
    Ok(PipeEnds { read, write })
}

/// Returns true if a call failed for want of a resource that may be free again in a moment: a descriptor, memory, room
/// in a UNIX backlog, or a watch of an epoll instance.
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

/// Names the user and the process at the other end of a UNIX socket.
pub(crate) fn peer_process(socket: &impl AsFd) -> String {
    match getsockopt(&socket.as_fd(), PeerCredentials).map(|it| (it.uid(), it.pid())) {
        // A process of another PID namespace has no number here.
        Ok((uid, 0)) => format!("uid {uid}"),
        Ok((uid, pid)) => format!("uid {uid}, pid {pid}"),
        Err(_) => "an unknown process".into(),
    }
}

/// Returns true if a dial failed because no local port is free. The kernel's search for one takes long.
pub(crate) fn is_port_shortage(error: &io::Error) -> bool {
    error.raw_os_error() == Some(Errno::ADDRNOTAVAIL.raw_os_error())
}

/// Checks that sockets can be bound to `ip`, which must be an address of this host.
pub(crate) fn check_source(ip: IpAddr) -> io::Result<()> {
    let address = SocketAddr::new(ip, 0);
    let socket = socket_with(family(&address), SocketType::STREAM, OPEN, None)?;
    bind_source(&socket, ip)
}

/// Raises the limit of open files to the hard limit. Returns the new limit.
pub(crate) fn raise_open_files() -> u64 {
    let limit = getrlimit(Resource::Nofile);
    // The system refuses if this process may not change the limit; then the present one has to do.
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum }).ok();
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// Makes `source` the address that `socket` connects from. The port is chosen at the connect
/// (`IP_BIND_ADDRESS_NO_PORT`): chosen now, it would be taken from all destinations instead of one.
fn bind_source(socket: &OwnedFd, source: IpAddr) -> io::Result<()> {
    nix::sys::socket::setsockopt(socket, nix::sys::socket::sockopt::IpBindAddressNoPort, &true)?;
    bind(socket, &SocketAddr::new(source, 0)).map_err(|error| match error {
        // A connect fails with the same error when ports are used up.
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

/// Makes a UNIX socket with urgent bytes kept in line.
fn unix_socket() -> rustix::io::Result<OwnedFd> {
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, OPEN, None)?;
    sockopt::set_socket_oobinline(&socket, true)?;
    Ok(socket)
}

fn family(address: &SocketAddr) -> AddressFamily {
    if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 }
}

/// Makes two UNIX sockets that are connected to each other.
#[cfg(test)]
pub(crate) fn socket_pair() -> io::Result<(Socket, Socket)> {
    let (one, other) =
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, OPEN, None)?;
    let socket = |fd| Socket { fd, is_unix: true, is_paced: false, usual_probes: None };
    Ok((socket(one), socket(other)))
}

#[cfg(test)]
mod tests {
    use std::{sync::Barrier, thread};

    use super::*;

    #[test]
    fn of_two_that_listen_on_a_port_at_once_one_has_it() {
        const ROUNDS: usize = 200;
        // No other test uses this address, so the port stays free.
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
