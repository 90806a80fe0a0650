//! A connect that waits for its answer, for threads that may block.

use std::{
    borrow::Cow,
    io,
    net::{IpAddr, SocketAddr},
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::{Errno, ioctl_fionbio, retry_on_intr},
    net::{
        AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect, send,
        socket_with, sockopt,
    },
};

use super::{Dialled, Socket, SocketAddress};

/// Both addresses of a TCP connection: that of this end, and that of the other.
pub(crate) type Ends = (SocketAddr, SocketAddr);

/// Connects to `address` from `source`, or from an address that the system chooses, and sends the bytes of `header`, which may
/// tell both addresses. Returns the connection. An error tells that nothing has answered within `timeout`.
pub(crate) fn reach(
    address: &SocketAddress,
    source: Option<IpAddr>,
    header: impl FnOnce(Option<Ends>) -> Cow<'static, [u8]>,
    timeout: Duration,
) -> io::Result<OwnedFd> {
    let unix = match address {
        &SocketAddress::Inet(other) => {
            let header = |own: Option<SocketAddr>| header(own.map(|own| (own, other)));
            return reach_tcp(address, source, header, timeout);
        }
        SocketAddress::Unix(path) => SocketAddrUnix::new(path)?,
        SocketAddress::Abstract(name) => SocketAddrUnix::new_abstract_name(name.as_bytes())?,
    };
    // A blocking connect waits for room in a full backlog.
    let flags = SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, Some(timeout))?;
    retry_on_intr(|| connect(&socket, &unix)).map_err(|error| match error {
        Errno::AGAIN => io::Error::from(io::ErrorKind::TimedOut),
        error => error.into(),
    })?;
    // A server that does not read it is there all the same.
    let header = header(None);
    retry_on_intr(|| send(&socket, &header, SendFlags::NOSIGNAL)).ok();
    Ok(socket)
}

fn reach_tcp(
    address: &SocketAddress,
    source: Option<IpAddr>,
    header: impl FnOnce(Option<SocketAddr>) -> Cow<'static, [u8]>,
    timeout: Duration,
) -> io::Result<OwnedFd> {
    let deadline = Instant::now() + timeout;
    let (socket, dialled) = Socket::dial(address, source)?;
    if dialled == Dialled::InProgress {
        let mut look = [PollFd::new(&socket, PollFlags::OUT)];
        let answered = retry_on_intr(|| {
            let left = deadline.saturating_duration_since(Instant::now());
            // A time beyond the range of the kernel's is no time limit.
            poll(&mut look, Timespec::try_from(left).ok().as_ref())
        })?;
        if answered == 0 {
            return Err(io::ErrorKind::TimedOut.into());
        }
    }
    if let Some(error) = socket.take_dial_error() {
        return Err(error);
    }
    if socket.is_self_connected() {
        socket.reset_on_close();
        return Err(io::ErrorKind::ConnectionRefused.into());
    }
    socket.send(&header(socket.local_inet())).ok();
    ioctl_fionbio(&socket, false)?;
    Ok(socket.fd)
}

#[cfg(test)]
mod tests {
    use std::{io::Read, net::TcpListener, os::unix::net::UnixListener};

    use super::*;

    const DEADLINE: Duration = Duration::from_secs(10);

    fn nothing(_ends: Option<Ends>) -> Cow<'static, [u8]> {
        Cow::Borrowed(&[])
    }

    #[test]
    fn one_that_listens_is_reached_and_reads_an_orderly_end() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = SocketAddress::Inet(listener.local_addr().unwrap());
        let source = [127, 0, 0, 9].into();
        reach(&address, Some(source), nothing, DEADLINE).unwrap();
        let (mut peer, from) = listener.accept().unwrap();
        assert_eq!((from.ip(), peer.read(&mut [0]).unwrap()), (source, 0));
        let tell = |ends: Option<Ends>| format!("{:?}", ends.unwrap()).into_bytes().into();
        reach(&address, Some(source), tell, DEADLINE).unwrap();
        let (peer, from) = listener.accept().unwrap();
        let ends = (from, listener.local_addr().unwrap());
        assert_eq!(io::read_to_string(peer).unwrap(), format!("{ends:?}"));
        drop(listener);
        let error = reach(&address, None, nothing, DEADLINE).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    }

    #[test]
    fn one_that_is_silent_takes_the_whole_time_and_no_more() {
        // Its backlog is full, so that further SYNs are dropped.
        let listener =
            socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None)
                .unwrap();
        rustix::net::bind(&listener, &SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
        rustix::net::listen(&listener, 0).unwrap();
        let address = rustix::net::getsockname(&listener).unwrap();
        let address = SocketAddress::try_from(address).unwrap();
        let moment = Duration::from_millis(50);
        let begin = Instant::now();
        let filled = [(); 3].map(|()| reach(&address, None, nothing, moment));
        let error = filled.into_iter().find_map(Result::err).unwrap();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(begin.elapsed() >= moment && begin.elapsed() < DEADLINE);
    }

    #[test]
    fn a_unix_socket_is_reached_by_its_path() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let address = SocketAddress::Unix(path.clone());
        assert_eq!(
            reach(&address, None, nothing, DEADLINE).unwrap_err().kind(),
            io::ErrorKind::NotFound
        );
        let listener = UnixListener::bind(path).unwrap();
        reach(&address, None, nothing, DEADLINE).unwrap();
        assert_eq!(listener.accept().unwrap().0.read(&mut [0]).unwrap(), 0);
        let header = |ends: Option<Ends>| {
            assert!(ends.is_none(), "{ends:?}");
            Cow::Borrowed(&b"header"[..])
        };
        reach(&address, None, header, DEADLINE).unwrap();
        assert_eq!(io::read_to_string(listener.accept().unwrap().0).unwrap(), "header");
    }
}
