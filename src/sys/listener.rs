//! Listening sockets.

use std::{
    io,
    net::SocketAddr,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::Path,
};

use mio::{Interest, Registry, Token, unix::SourceFd};
use rustix::{
    io::{Errno, retry_on_intr},
    net::{
        Shutdown, SocketAddrUnix, SocketType, accept_with, bind, listen, shutdown, socket_with,
        sockopt,
    },
};

use super::{
    OPEN, Socket, family, keep_alive, local_inet, pacing, register, socket_file::SocketFile,
    unix_socket,
};

/// The kernel cuts it to `net.core.somaxconn`.
const BACKLOG_MAX: i32 = i32::MAX;

/// A listening socket, never blocking.
#[derive(Debug)]
pub(crate) struct Listener {
    fd: OwnedFd,
    is_unix: bool,
    is_paced: bool,
}

impl Listener {
    /// As many TCP listeners on one port as there are threads to serve them. Another process that listens there is an
    /// error, even if it shares its port (`SO_REUSEPORT`): half of the clients would miss a pause.
    pub(crate) fn tcp(address: SocketAddr, count: usize) -> io::Result<Vec<Self>> {
        let open = || -> io::Result<Self> {
            let socket = socket_with(family(&address), SocketType::STREAM, OPEN, None)?;
            if address.is_ipv6() {
                sockopt::set_ipv6_v6only(&socket, !address.ip().is_unspecified())?;
            }
            sockopt::set_socket_reuseaddr(&socket, true)?;
            // Inherited by every accepted socket.
            tune(&socket)?;
            let is_paced = pacing::spare(&socket, &address);
            Ok(Self { fd: socket, is_unix: false, is_paced })
        };
        // The first binds and listens alone, which fails beside any listener, and shares its port only then. Two that are
        // bound and do not listen yet pass each other by, so nothing is shared before one of them listens.
        let first = open()?;
        bind(&first, &address)?;
        listen(&first, BACKLOG_MAX)?;
        let address = first.local_inet()?;
        if count > 1 {
            sockopt::set_socket_reuseport(&first, true)?;
        }
        let mut bound = vec![first];
        for _more in 1..count {
            let socket = open()?;
            sockopt::set_socket_reuseport(&socket, true)?;
            bind(&socket, &address)?;
            listen(&socket, BACKLOG_MAX)?;
            bound.push(socket);
        }
        Ok(bound)
    }

    /// A UNIX listener. A socket file that nobody listens on any more is replaced; `mode`, if given, holds from the first
    /// moment at which anyone can see it.
    pub(crate) fn unix(path: &Path, mode: Option<u32>) -> io::Result<(Self, SocketFile)> {
        let fd = unix_socket()?;
        let file = SocketFile::listen(&fd, path, mode, BACKLOG_MAX)?;
        Ok((Self { fd, is_unix: true, is_paced: false }, file))
    }

    /// A UNIX listener without a file; everybody in the network namespace may connect.
    pub(crate) fn abstract_unix(name: &str) -> io::Result<Self> {
        let fd = unix_socket()?;
        bind(&fd, &SocketAddrUnix::new_abstract_name(name.as_bytes())?)?;
        listen(&fd, BACKLOG_MAX)?;
        Ok(Self { fd, is_unix: true, is_paced: false })
    }

    /// Takes the client that has waited longest; `WouldBlock` when none waits.
    pub(crate) fn accept(&self) -> io::Result<Socket> {
        let fd = match retry_on_intr(|| accept_with(self, OPEN)) {
            // A UNIX listener that refuses more has nobody left.
            Err(Errno::INVAL) if self.is_unix => return Err(Errno::AGAIN.into()),
            result => result?,
        };
        if self.is_unix {
            // Unlike TCP sockets, UNIX sockets do not inherit it from their listener.
            sockopt::set_socket_oobinline(&fd, true)?;
        }
        Ok(Socket { fd, is_unix: self.is_unix, is_paced: self.is_paced })
    }

    /// Whether it is a UNIX socket.
    pub(crate) fn is_unix(&self) -> bool {
        self.is_unix
    }

    /// Refuses whoever comes from now on, and keeps who is queued. On TCP nothing but a close does so, which resets them.
    pub(crate) fn refuse_more(&self) {
        if self.is_unix {
            // It can fail for sockets alone that are not connected and do not listen.
            shutdown(self, Shutdown::Read).ok();
        }
    }

    /// Lets nobody new into the queue while someone is in it; their SYNs are repeated, perhaps to a successor.
    pub(crate) fn cut_backlog(&self) {
        // Refused or not: the queue is taken in all the same.
        listen(self, 0).ok();
    }

    /// Where it listens, with the port that the system chose.
    pub(crate) fn local_inet(&self) -> io::Result<SocketAddr> {
        local_inet(&self.fd)
    }

    /// Registers for clients that arrive, edge-triggered.
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

/// What accepted TCP sockets inherit: no delay for small writes, urgent bytes kept in line, where none is lost, and a look
/// after silent peers.
fn tune(listener: &OwnedFd) -> rustix::io::Result<()> {
    sockopt::set_tcp_nodelay(listener, true)?;
    sockopt::set_socket_oobinline(listener, true)?;
    keep_alive(listener)
}
