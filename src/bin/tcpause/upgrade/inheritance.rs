//! The start of a process that takes over from another one.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
};

use rustix::{
    net::{
        AddressFamily, SocketType,
        sockopt::{socket_domain, socket_type},
    },
    process::{Pid, PidfdFlags, pidfd_open},
    stdio::dup2_stdin,
};

/// Way to the process that this one takes over from.
pub(crate) struct Inheritance {
    /// Channel to the giver, which has no other owner here.
    pub(crate) channel: UnixStream,
    /// Descriptor that can be read once the giver has ended.
    pub(crate) end_of_giver: OwnedFd,
}

impl Inheritance {
    /// Takes the channel to `giver` out of standard input, which is empty from here on: no child of this process may keep it
    /// open.
    pub(crate) fn take(giver: Pid) -> Result<Self, String> {
        let stdin = io::stdin();
        if !is_unix_stream(&stdin) {
            return Err(
                "--take-over: standard input is no UNIX stream socket; a running tcpause passes one when it upgrades itself, as by tcpause upgrade"
                    .to_owned(),
            );
        }
        let (channel, null) = take_out(&stdin)
            .map_err(|error| format!("--take-over: cannot replace standard input: {error}"))?;
        // A kernel or a sandbox may refuse it. The other descriptor can always be read.
        let end_of_giver = pidfd_open(giver, PidfdFlags::empty()).unwrap_or_else(|_| null.into());
        Ok(Self { channel: channel.into(), end_of_giver })
    }
}

fn is_unix_stream(socket: impl AsFd) -> bool {
    socket_domain(&socket) == Ok(AddressFamily::UNIX)
        && socket_type(&socket) == Ok(SocketType::STREAM)
}

/// Puts `/dev/null` in place of standard input. Returns what it was, and a descriptor of `/dev/null`.
fn take_out(stdin: &io::Stdin) -> io::Result<(OwnedFd, File)> {
    let channel = stdin.as_fd().try_clone_to_owned()?;
    let null = File::open("/dev/null")?;
    dup2_stdin(&null)?;
    Ok((channel, null))
}

#[cfg(test)]
mod tests {
    use std::{
        net::{TcpListener, TcpStream},
        os::unix::net::UnixDatagram,
    };

    use super::*;

    #[test]
    fn a_channel_is_a_unix_stream_socket() {
        let (stream, _other) = UnixStream::pair().unwrap();
        assert!(is_unix_stream(&stream));
        let (datagram, _other) = UnixDatagram::pair().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let tcp = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (pipe, _other) = io::pipe().unwrap();
        let null = File::open("/dev/null").unwrap();
        for other in [datagram.as_fd(), listener.as_fd(), tcp.as_fd(), pipe.as_fd(), null.as_fd()] {
            assert!(!is_unix_stream(other));
        }
    }
}
