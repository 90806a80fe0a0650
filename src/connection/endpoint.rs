//! One side of a connection: a socket, its remembered readiness, and the state of its peer.

use std::io;

use mio::{Interest, Registry, Token, event::Event};
use serde::{Deserialize, Serialize};

use super::pipe::Pipe;
use crate::{
    handover::parcel::{Incoming, Misfit, Outgoing},
    sys::{EVERYTHING, READABLE, Socket, SocketWords},
};

/// A socket with its remembered readiness.
///
/// Registration is edge-triggered, so the kernel reports readiness once. It is therefore remembered until a system call
/// shows that it is over.
#[derive(Debug)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a fact of its own; no two exclude each other"
)]
pub(crate) struct Endpoint {
    socket: Socket,
    /// Set while a read may yield bytes, an end or an error.
    readable: bool,
    /// Set while a write may be accepted.
    writable: bool,
    /// Set once the peer has ended its stream. The end follows the last bytes without an event of its own.
    read_closed: bool,
    /// Set once the connection was reset or has died. From then on an end of stream is not orderly.
    reset: bool,
    /// Set once the peer's host counts as gone, by keepalive or by our own check.
    vanished: bool,
    /// Set once the peer has sent urgent bytes. The kernel stops a read at each of them, so a short read does not mean
    /// that the socket is empty.
    urgent: bool,
    /// Events that the kernel reports. It always reports resets.
    interest: Interest,
    /// Set if another process may have a copy of the socket, as it has handed it over.
    is_adopted: bool,
}

/// Words of an endpoint. A fact that they do not name is false.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[expect(clippy::struct_excessive_bools, reason = "as in the endpoint")]
pub(crate) struct EndpointWords {
    socket: SocketWords,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    readable: bool,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    writable: bool,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    read_closed: bool,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    reset: bool,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    vanished: bool,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    urgent: bool,
}

/// Registry and tokens of a connection's two sockets.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Registration<'a> {
    /// Epoll instance of the worker.
    pub(crate) registry: &'a Registry,
    /// Token of the client's socket.
    pub(crate) client: Token,
    /// Token of the upstream's socket.
    pub(crate) upstream: Token,
}

/// Events that a connection waits for at one of its sides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Awaited {
    /// Something to read.
    pub(crate) readable: bool,
    /// Room to write.
    pub(crate) writable: bool,
}

/// Result of a read, a peek or a splice from the socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Received {
    /// Number of bytes, at least one.
    Bytes(usize),
    /// No bytes now; an event follows.
    Nothing,
    /// The orderly end of the stream.
    End,
    /// The end of a stream that was reset.
    Reset,
    /// A refusal by the kernel to splice this socket.
    Unsupported,
}

/// Result of a write or of a splice to the socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sent {
    /// Number of bytes accepted, perhaps fewer than offered.
    Bytes(usize),
    /// No room now; an event follows.
    Nothing,
    /// A peer that takes no more bytes.
    Broken,
}

impl Endpoint {
    /// Returns the endpoint of an accepted client or of an upstream that is connected.
    pub(crate) fn connected(socket: Socket) -> Self {
        Self {
            readable: false,
            writable: true,
            read_closed: false,
            reset: false,
            vanished: false,
            urgent: false,
            interest: socket.first_interest(),
            is_adopted: false,
            socket,
        }
    }

    /// Returns the endpoint of an upstream that is being dialled. It becomes writable by an event.
    pub(crate) fn connecting(socket: Socket) -> Self {
        Self { writable: false, ..Self::connected(socket) }
    }

    /// Returns its words. The interest follows from the state of the connection.
    pub(super) fn describe<'a>(&'a self, parcel: &mut Outgoing<'a>) -> EndpointWords {
        let Self {
            ref socket,
            readable,
            writable,
            read_closed,
            reset,
            vanished,
            urgent,
            interest: _,
            is_adopted: _,
        } = *self;
        parcel.lend(socket.lend());
        let socket = socket.describe();
        EndpointWords { socket, readable, writable, read_closed, reset, vanished, urgent }
    }

    /// Returns the endpoint of `words`, which is not registered yet.
    pub(super) fn rebuild(words: EndpointWords, parcel: &mut Incoming) -> Result<Self, Misfit> {
        let EndpointWords { socket, readable, writable, read_closed, reset, vanished, urgent } =
            words;
        let socket = Socket::adopt(parcel.descriptor()?, socket);
        // A client that waits to be registered gets its first interest then.
        let interest = socket.first_interest();
        Ok(Self {
            socket,
            readable,
            writable,
            read_closed,
            reset,
            vanished,
            urgent,
            interest,
            is_adopted: true,
        })
    }

    /// Registers an endpoint from another process, which reports all that is ready once more. While there is room, a relay
    /// does not ask for it, as each connection would cause an event. It asks once a write finds none, other states do not.
    pub(super) fn adopt_registration(
        &mut self,
        is_relayed: bool,
        registry: &Registry,
        token: Token,
    ) -> io::Result<()> {
        self.interest = if self.writable && is_relayed { READABLE } else { EVERYTHING };
        self.socket.register_for(registry, token, self.interest)
    }

    /// Ends the registration of a socket that is about to be closed, if another process may have a copy: a close would not
    /// end it then, and its events would be taken for those of the next socket with its token.
    pub(crate) fn deregister(&self, registry: &Registry) {
        if self.is_adopted {
            self.socket.deregister(registry);
        }
    }

    /// Remembers the readiness that `event` reports.
    pub(crate) fn mark(&mut self, event: &Event) {
        self.readable |= event.is_readable() || event.is_read_closed() || event.is_error();
        self.writable |= event.is_writable() || event.is_write_closed() || event.is_error();
        self.read_closed |= event.is_read_closed();
        self.reset |= event.is_error();
        self.urgent |= event.is_priority();
    }

    /// Returns the socket, for calls that move no bytes.
    pub(crate) fn socket(&self) -> &Socket {
        &self.socket
    }

    /// Returns the socket, to change its keepalive.
    pub(super) fn socket_mut(&mut self) -> &mut Socket {
        &mut self.socket
    }

    /// Returns true if a read may yield something.
    pub(crate) fn is_readable(&self) -> bool {
        self.readable
    }

    /// Returns true if a write may be accepted.
    pub(crate) fn is_writable(&self) -> bool {
        self.writable
    }

    /// Returns true if the peer has ended its stream or the connection has died.
    pub(crate) fn is_read_closed(&self) -> bool {
        self.read_closed || self.reset
    }

    /// Returns true if the connection was reset or has died.
    pub(crate) fn is_reset(&self) -> bool {
        self.reset
    }

    /// Returns true if the peer's host counts as gone.
    pub(crate) fn has_vanished(&self) -> bool {
        self.vanished
    }

    /// Treats a peer whose host no longer answers as one that has reset. Bytes that it sent before are still read.
    /// Returns true if the peer has vanished.
    pub(crate) fn give_up_vanished(&mut self) -> bool {
        let has_vanished = !self.reset && self.socket.has_vanished();
        if has_vanished {
            self.socket.shut_down_read();
            (self.reset, self.readable, self.vanished) = (true, true, true);
        }
        has_vanished
    }

    /// Returns true if bytes from here to `sink` are spliced rather than copied. A splice never gets past an urgent
    /// byte, a read does. Splicing from a UNIX socket costs half as much as copying, but more than copying where TCP
    /// paces the sink.
    pub(crate) fn is_worth_splicing_to(&self, sink: &Self) -> bool {
        let costs_more = self.socket.is_unix() && sink.socket.is_paced();
        !self.urgent && !costs_more
    }

    /// Sets the epoll interest to `awaited`. Interest is narrowed only when an event `was_in_vain`, because each change
    /// costs an `epoll_ctl` and most connections never have a useless event.
    ///
    /// `EPOLL_CTL_MOD` reports at once what is ready already (epoll(7)), so no event is lost in between. Returns true
    /// if the kernel will report all that is awaited; otherwise the call failed and has to be repeated.
    pub(crate) fn await_events(
        &mut self,
        awaited: Awaited,
        was_in_vain: bool,
        registry: &Registry,
        token: Token,
    ) -> bool {
        let readable = awaited.readable || (self.interest.is_readable() && !was_in_vain);
        // TCP reports room only after a write found none; UNIX sockets report it whenever the peer has read.
        let is_quiet = !was_in_vain || !self.socket.is_unix();
        let writable = awaited.writable || (self.interest.is_writable() && is_quiet);
        let interest = match (readable, writable) {
            (true, true) => EVERYTHING,
            (true, false) => READABLE,
            // Interest in urgent bytes would report each of them, and mio cannot register an empty interest.
            (false, _) => Interest::WRITABLE,
        };
        if interest != self.interest && self.socket.reregister(registry, token, interest).is_ok() {
            self.interest = interest;
        }
        (self.interest.is_readable() || !awaited.readable)
            && (self.interest.is_writable() || !awaited.writable)
    }

    /// Waits for bytes, and for room if a write has found none. Returns true if the kernel will report both.
    pub(crate) fn await_room(&mut self, registry: &Registry, token: Token) -> bool {
        let awaited = Awaited { readable: true, writable: !self.writable };
        self.await_events(awaited, false, registry, token)
    }

    /// Reads into `buffer`, and drops the readiness after a short read.
    pub(crate) fn recv(&mut self, buffer: &mut [u8]) -> Received {
        let result = self.socket.recv(buffer);
        if let Ok(read) = result
            && read.bytes < buffer.len()
        {
            // A short read has emptied the socket, and later bytes cause a new event. An end that arrived with these
            // bytes, or bytes behind an urgent one, cause none.
            self.readable = self.read_closed || self.urgent || read.was_stopped;
        }
        self.received(result.map(|read| read.bytes))
    }

    /// Copies the first bytes without taking them from the socket.
    pub(crate) fn peek(&mut self, buffer: &mut [u8]) -> Received {
        let result = self.socket.peek(buffer);
        self.received(result)
    }

    /// Splices up to `len` bytes into `pipe`.
    pub(crate) fn splice_into(&mut self, pipe: &mut Pipe, len: usize) -> Received {
        let result = pipe.fill(&self.socket, len);
        self.received(result)
    }

    /// Writes as much of `bytes` as fits.
    pub(crate) fn send(&mut self, bytes: &[u8]) -> Sent {
        let result = self.socket.send(bytes);
        self.sent(result)
    }

    /// Splices the content of `pipe`, or the part that fits, to the socket.
    pub(crate) fn splice_out_of(&mut self, pipe: &mut Pipe) -> Sent {
        let result = pipe.drain(&self.socket);
        self.sent(result)
    }

    /// Ends the stream to the peer.
    pub(crate) fn shut_down_write(&mut self) -> Sent {
        let result = self.socket.shut_down_write().map(|()| 0);
        self.sent(result)
    }

    fn received(&mut self, result: io::Result<usize>) -> Received {
        match result {
            // The kernel reports a reset to the first call only; later reads return 0, like an orderly end.
            Ok(0) if self.reset => Received::Reset,
            Ok(0) => Received::End,
            Ok(bytes) => Received::Bytes(bytes),
            Err(error) => match error.kind() {
                io::ErrorKind::WouldBlock => {
                    self.readable = false;
                    Received::Nothing
                }
                io::ErrorKind::InvalidInput => Received::Unsupported,
                kind => {
                    self.reset = true;
                    self.vanished |= is_silence(kind);
                    Received::Reset
                }
            },
        }
    }

    fn sent(&mut self, result: io::Result<usize>) -> Sent {
        match result {
            Ok(bytes) => Sent::Bytes(bytes),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.writable = false;
                Sent::Nothing
            }
            Err(error) => {
                // A UNIX peer that has closed in good order also causes EPIPE, and the bytes that it sent before are
                // valid.
                let in_order = self.socket.is_unix() && error.kind() == io::ErrorKind::BrokenPipe;
                self.reset |= !in_order;
                self.vanished |= is_silence(error.kind());
                // Bytes that the peer sent before it went, and the end behind them, are still to be read.
                self.readable = true;
                Sent::Broken
            }
        }
    }
}

/// Returns true for an error by which the kernel reports that a peer's host no longer answers: keepalive and repeated
/// segments end with `ETIMEDOUT`, or with what routers have told meanwhile.
fn is_silence(kind: io::ErrorKind) -> bool {
    use io::ErrorKind::{HostUnreachable, NetworkUnreachable, TimedOut};
    matches!(kind, TimedOut | HostUnreachable | NetworkUnreachable)
}

#[cfg(test)]
mod tests {
    use std::{io::IoSlice, mem::MaybeUninit, os::fd::AsFd};

    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

    use super::*;
    use crate::sys::socket_pair;

    #[test]
    fn a_short_read_of_a_unix_socket_ends_the_reading_but_at_descriptors() {
        let (socket, peer) = socket_pair().unwrap();
        let mut endpoint = Endpoint { readable: true, ..Endpoint::connected(socket) };
        let mut buffer = [0; 64];
        peer.send(b"one").unwrap();
        peer.send(b"two").unwrap();
        assert_eq!(endpoint.recv(&mut buffer), Received::Bytes(6));
        assert!(!endpoint.is_readable());

        endpoint.readable = true;
        let descriptors = [peer.as_fd()];
        let mut space = [MaybeUninit::uninit(); 64];
        let mut along = SendAncillaryBuffer::new(&mut space);
        assert!(along.push(SendAncillaryMessage::ScmRights(&descriptors)));
        sendmsg(&peer, &[IoSlice::new(b"with")], &mut along, SendFlags::empty()).unwrap();
        peer.send(b"behind").unwrap();
        assert_eq!(endpoint.recv(&mut buffer), Received::Bytes(4));
        assert!(endpoint.is_readable(), "no event would tell of the rest");
        assert_eq!(endpoint.recv(&mut buffer), Received::Bytes(6));
        assert!(!endpoint.is_readable());
    }
}
