//! Listening sockets, TCP and UNIX.

use std::{
    io,
    net::SocketAddr,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::Path,
};

use mio::{Interest, Registry, Token, unix::SourceFd};
use rustix::{
    io::{Errno, ioctl_fionbio, retry_on_intr},
    net::{
        AddressFamily, Shutdown, SocketAddrUnix, SocketType, acceptfrom_with, bind, getsockname,
        listen, shutdown, socket_with, sockopt,
    },
};
use serde::{Deserialize, Serialize};

use super::{
    Descriptor, Lent, OPEN, Socket, SocketAddress, family, keep_alive, pacing, rcvbuf, register,
    socket_file::{Access, SocketFile},
    unix_socket,
};

/// Requested backlog; the kernel cuts it to `net.core.somaxconn`.
const BACKLOG_MAX: i32 = i32::MAX;

/// A non-blocking listening socket.
#[derive(Debug)]
pub(crate) struct Listener {
    fd: OwnedFd,
    is_unix: bool,
    is_paced: bool,
    is_inherited: bool,
}

/// Facts of a listener that its descriptor does not tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ListenerWords {
    is_unix: bool,
    is_paced: bool,
    is_inherited: bool,
}

impl Listener {
    /// Returns its words.
    pub(crate) fn describe(&self) -> ListenerWords {
        let Self { fd: _, is_unix, is_paced, is_inherited } = *self;
        ListenerWords { is_unix, is_paced, is_inherited }
    }

    /// Lends its descriptor.
    pub(crate) fn lend(&self) -> Lent<'_> {
        self.fd.as_fd()
    }

    /// Returns the listener of a descriptor that has come with `words`, with its queue. Changes nothing in it, as its giver
    /// may go on.
    pub(crate) fn adopt(fd: Descriptor, words: ListenerWords) -> Self {
        let ListenerWords { is_unix, is_paced, is_inherited } = words;
        Self { fd, is_unix, is_paced, is_inherited }
    }

    /// Makes `count` TCP listeners on one port, one for each worker. Another process that listens there is an error
    /// even if it shares the port (`SO_REUSEPORT`): half of the clients would miss a pause.
    pub(crate) fn tcp(address: SocketAddr, count: usize) -> io::Result<Vec<Self>> {
        // The first socket binds and listens without sharing the port, which fails beside any other listener. It shares
        // the port only then. Two sockets that are bound but do not listen do not exclude each other, so the port must
        // not be shared before one listens.
        let first = Self::open(&address)?;
        bind(&first, &address)?;
        listen(&first, BACKLOG_MAX)?;
        let address = first.local_inet()?;
        if count > 1 {
            sockopt::set_socket_reuseport(&first, true)?;
        }
        let mut bound = vec![first];
        for _more in 1..count {
            bound.push(Self::join(address)?);
        }
        Ok(bound)
    }

    /// Makes a TCP socket that is to listen.
    fn open(address: &SocketAddr) -> io::Result<Self> {
        let socket = socket_with(family(address), SocketType::STREAM, OPEN, None)?;
        if address.is_ipv6() {
            sockopt::set_ipv6_v6only(&socket, !address.ip().is_unspecified())?;
        }
        sockopt::set_socket_reuseaddr(&socket, true)?;
        // Accepted sockets inherit these options.
        tune(&socket)?;
        let is_paced = pacing::spare(&socket, address);
        Ok(Self { fd: socket, is_unix: false, is_paced, is_inherited: false })
    }

    /// Makes a TCP listener beside those of this process that listen at `address` already.
    pub(crate) fn join(address: SocketAddr) -> io::Result<Self> {
        let listener = Self::open(&address)?;
        sockopt::set_socket_reuseport(&listener, true)?;
        bind(&listener, &address)?;
        listen(&listener, BACKLOG_MAX)?;
        Ok(listener)
    }

    /// Has the kernel tell this process as the owner of a UNIX listener that another one has made, by which a loop is known
    /// (`SO_PEERCRED` of its clients). Its queue stays.
    pub(crate) fn own(&self) {
        if self.is_unix {
            listen(&self.fd, BACKLOG_MAX).ok();
        }
    }

    /// Lets further listeners of this user join at its address, if it is TCP and was not passed. Where that cannot be, they
    /// fail.
    pub(crate) fn let_others_join(&self) {
        if !self.is_shared() {
            sockopt::set_socket_reuseport(&self.fd, true).ok();
        }
    }

    /// Makes a UNIX listener. It replaces a socket file on which no process listens any more. `access` holds from the
    /// moment at which the file is visible.
    pub(crate) fn unix(path: &Path, access: Access) -> io::Result<(Self, SocketFile)> {
        let fd = unix_socket()?;
        let file = SocketFile::listen(&fd, path, access, BACKLOG_MAX)?;
        Ok((Self { fd, is_unix: true, is_paced: false, is_inherited: false }, file))
    }

    /// Makes a UNIX listener without a file. Every process in the network namespace may connect.
    pub(crate) fn abstract_unix(name: &str) -> io::Result<Self> {
        let fd = unix_socket()?;
        bind(&fd, &SocketAddrUnix::new_abstract_name(name.as_bytes())?)?;
        listen(&fd, BACKLOG_MAX)?;
        Ok(Self { fd, is_unix: true, is_paced: false, is_inherited: false })
    }

    /// Takes over a socket that listens already, and gives it the options of our own ones.
    pub(crate) fn inherit(fd: OwnedFd) -> io::Result<Self> {
        let refuse = |text| Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        if sockopt::socket_type(&fd)? != SocketType::STREAM {
            return refuse("it is no stream socket");
        }
        if !sockopt::socket_acceptconn(&fd)? {
            return refuse("it does not listen");
        }
        ioctl_fionbio(&fd, true)?;
        let is_unix = sockopt::socket_domain(&fd)? == AddressFamily::UNIX;
        let mut is_paced = false;
        if !is_unix {
            tune(&fd)?;
            is_paced = pacing::spare(&fd, &local_inet(&fd)?);
            rcvbuf::restore(&fd)?;
        }
        Ok(Self { fd, is_unix, is_paced, is_inherited: true })
    }

    /// Accepts the client that has waited longest. Returns the address of a TCP client, too, or `WouldBlock` if none waits.
    pub(crate) fn accept(&self) -> io::Result<(Socket, Option<SocketAddr>)> {
        let (fd, address) = match retry_on_intr(|| acceptfrom_with(self, OPEN)) {
            // EINVAL comes from a UNIX listener whose read side is shut and whose queue is empty.
            Err(Errno::INVAL) if self.is_unix => return Err(Errno::AGAIN.into()),
            result => result?,
        };
        if self.is_unix {
            // Unlike TCP sockets, UNIX sockets do not inherit this option.
            sockopt::set_socket_oobinline(&fd, true)?;
        }
        let address = address.and_then(|address| SocketAddr::try_from(address).ok());
        let (is_unix, is_paced) = (self.is_unix, self.is_paced);
        Ok((Socket { fd, is_unix, is_paced, usual_probes: None }, address))
    }

    /// Returns true for a UNIX listener.
    pub(crate) fn is_unix(&self) -> bool {
        self.is_unix
    }

    /// Returns true if another process keeps the socket open, and serves its queue or passes it on.
    pub(crate) fn is_inherited(&self) -> bool {
        self.is_inherited
    }

    /// Returns true if it is the only one at its address, so that one worker has to accept for all.
    pub(crate) fn is_shared(&self) -> bool {
        self.is_unix || self.is_inherited
    }

    /// Refuses new clients and keeps the queued ones. On TCP only a close refuses, and it resets the queue.
    pub(crate) fn refuse_more(&self) {
        if self.is_unix {
            // It fails only on sockets that neither listen nor are connected.
            shutdown(self, Shutdown::Read).ok();
        }
    }

    /// Sets the backlog to 0, so that a client is queued only when no other is. The kernel of a later client repeats
    /// its SYN, perhaps to a successor.
    pub(crate) fn cut_backlog(&self) {
        // If it fails, the queue is accepted all the same.
        listen(self, 0).ok();
    }

    /// Returns the address with the port that the system chose.
    pub(crate) fn local_inet(&self) -> io::Result<SocketAddr> {
        local_inet(&self.fd)
    }

    /// Returns the address of any family.
    pub(crate) fn local_address(&self) -> io::Result<SocketAddress> {
        if !self.is_unix {
            return Ok(SocketAddress::Inet(self.local_inet()?));
        }
        let local = SocketAddrUnix::try_from(getsockname(self)?)?;
        let text = |name: &[u8]| String::from_utf8_lossy(name).into_owned();
        match (local.path_bytes(), local.abstract_name()) {
            (Some(path), _) => Ok(SocketAddress::Unix(text(path).into())),
            (None, Some(name)) => Ok(SocketAddress::Abstract(text(name))),
            (None, None) => Err(io::ErrorKind::AddrNotAvailable.into()),
        }
    }

    /// Registers for arriving clients, edge-triggered.
    pub(crate) fn register(&self, registry: &Registry, token: Token) -> io::Result<()> {
        register(self, registry, token, Interest::READABLE)
    }

    /// Ends the registration, if there is one.
    pub(crate) fn deregister(&self, registry: &Registry) {
        registry.deregister(&mut SourceFd(&self.fd.as_raw_fd())).ok();
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl From<Listener> for OwnedFd {
    fn from(listener: Listener) -> Self {
        listener.fd
    }
}

/// Returns the address of a TCP socket.
pub(super) fn local_inet(socket: &OwnedFd) -> io::Result<SocketAddr> {
    match SocketAddress::try_from(getsockname(socket)?) {
        Ok(SocketAddress::Inet(address)) => Ok(address),
        Ok(SocketAddress::Unix(_) | SocketAddress::Abstract(_)) | Err(()) => {
            Err(io::ErrorKind::InvalidInput.into())
        }
    }
}

/// Sets the options that accepted TCP sockets inherit: no delay for small writes, urgent bytes kept in line so that
/// none is lost, and keepalive.
fn tune(listener: &OwnedFd) -> rustix::io::Result<()> {
    sockopt::set_tcp_nodelay(listener, true)?;
    sockopt::set_socket_oobinline(listener, true)?;
    keep_alive(listener)
}
