//! Receive buffers of held clients, whose bytes the kernel keeps until they are read: some 128 KiB each by default.
//!
//! While new clients are held, the listener has a small receive buffer. Accepted sockets inherit it, so the window that
//! they offer at first is small. It must be set before the handshake, as an offered window is never taken back (RFC
//! 9293, 3.8.6).
//!
//! Setting a size locks it (`SOCK_RCVBUF_LOCK`), so neither the listener's nor the clients' buffers would grow again.
//! `SO_BUF_LOCK` takes the lock off (Linux 5.14), and after the resume a client's window grows as it is read.

use std::{io, os::fd::AsFd};

use nix::{libc, setsockopt_impl, sockopt_impl, sys::socket::setsockopt};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with, sockopt};

/// Receive buffer while clients are held. The kernel doubles it for its own needs, and up to two segments more arrive.
const HELD_RECEIVE_BYTES: usize = 4 * 1024;

/// Value of `SO_BUF_LOCK` that locks neither buffer.
const NONE_LOCKED: usize = 0;

sockopt_impl!(
    /// `SO_BUF_LOCK`: the buffers of a socket that keep the size that was set.
    BufferLock,
    SetOnly,
    libc::SOL_SOCKET,
    libc::SO_BUF_LOCK,
    usize
);

/// Gives future clients of a TCP listener a small window until they are read.
pub(crate) fn narrow(listener: impl AsFd) -> io::Result<()> {
    set(listener, HELD_RECEIVE_BYTES)
}

/// Gives future clients of a TCP listener the system's default window, as far as `net.core.rmem_max` allows.
pub(crate) fn widen(listener: impl AsFd) -> io::Result<()> {
    let fresh = socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    // The kernel returns the doubled size.
    set(listener, sockopt::socket_recv_buffer_size(fresh)? / 2)
}

/// Widens the window of a listener that another process has narrowed and left so: it may have ended during a pause.
pub(crate) fn restore(listener: impl AsFd) -> io::Result<()> {
    // The kernel returns the doubled size.
    let is_narrow = sockopt::socket_recv_buffer_size(&listener)? == 2 * HELD_RECEIVE_BYTES;
    if is_narrow { widen(listener) } else { Ok(()) }
}

fn set(listener: impl AsFd, bytes: usize) -> io::Result<()> {
    // A kernel without `SO_BUF_LOCK` fails here, before anything is changed.
    setsockopt(&listener, BufferLock, &NONE_LOCKED)?;
    sockopt::set_socket_recv_buffer_size(&listener, bytes)?;
    Ok(setsockopt(&listener, BufferLock, &NONE_LOCKED)?)
}

#[cfg(test)]
mod tests {
    use std::{
        io::{ErrorKind, Write},
        net::{TcpListener, TcpStream},
    };

    use super::*;

    const MANY: usize = 1 << 20;

    /// Returns a connection whose bytes are not read, and the number of bytes that the client got through.
    fn parked(listener: &TcpListener) -> (TcpStream, TcpStream, u64) {
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (accepted, _) = listener.accept().unwrap();
        client.set_nonblocking(true).unwrap();
        let error = loop {
            if let Err(error) = client.write(&[7; 8 * 1024]) {
                break error;
            }
        };
        assert_eq!(error.kind(), ErrorKind::WouldBlock);
        let parked = rustix::io::ioctl_fionread(&accepted).unwrap();
        (client, accepted, parked)
    }

    #[test]
    fn a_window_is_narrow_until_it_is_read_and_then_as_wide_as_any() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        narrow(&listener).unwrap();
        let (mut client, mut accepted, bytes) = parked(&listener);
        assert!(bytes <= 16 * 1024, "{bytes} bytes are parked");
        client.set_nonblocking(false).unwrap();
        let sender = std::thread::Builder::new().spawn(move || {
            client.write_all(&vec![7; MANY]).unwrap();
        });
        // The whole stream is read, as the parked bytes come on top.
        let read = io::copy(&mut accepted, &mut io::sink()).unwrap();
        assert!(read > MANY as u64, "{read} bytes have come");
        sender.unwrap().join().unwrap();
        let grown = sockopt::socket_recv_buffer_size(&accepted).unwrap();
        assert!(grown > 4 * HELD_RECEIVE_BYTES, "{grown} bytes is all that it has grown to");

        widen(&listener).unwrap();
        let (_client, _accepted, bytes) = parked(&listener);
        assert!(bytes > 32 * 1024, "only {bytes} bytes are parked");
    }

    #[test]
    fn a_listener_that_was_left_narrow_is_restored() {
        let size = |listener: &TcpListener| sockopt::socket_recv_buffer_size(listener).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let fresh = size(&listener);
        restore(&listener).unwrap();
        assert_eq!(size(&listener), fresh);
        narrow(&listener).unwrap();
        assert!(size(&listener) < fresh);
        restore(&listener).unwrap();
        assert_eq!(size(&listener), fresh);
    }
}
