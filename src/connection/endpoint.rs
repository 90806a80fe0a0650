//! One side of a connection: a socket, what is known of its readiness, and what became of its peer.

use std::io;

use mio::{Interest, Registry, Token, event::Event};

use super::pipe::Pipe;
use crate::sys::{EVERYTHING, READABLE, Socket};

/// A socket and what is remembered of it.
///
/// Readiness is told once (the registration is edge-triggered), so it is remembered, and falls only when an operation
/// shows that it is over.
#[derive(Debug)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a fact of its own; no two exclude each other"
)]
pub(crate) struct Endpoint {
    socket: Socket,
    /// Reading may yield something.
    readable: bool,
    /// Writing may get something through.
    writable: bool,
    /// The peer has ended its stream: behind the last bytes comes the end, with no event of its own.
    read_closed: bool,
    /// The peer has reset the connection, or it has died: whatever reads as an end of stream is none.
    reset: bool,
    /// The peer sends urgent bytes: the kernel stops at each, so a short read does not mean that nothing is left.
    urgent: bool,
    /// Which events the kernel tells of; resets it always does.
    interest: Interest,
}

/// Where the sockets of a connection are registered, and as what.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Registration<'a> {
    /// Where.
    pub(crate) registry: &'a Registry,
    /// The token of the client.
    pub(crate) client: Token,
    /// The token of its upstream.
    pub(crate) upstream: Token,
}

/// What a connection waits for at one of its sides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Awaited {
    /// Something to read.
    pub(crate) readable: bool,
    /// Room to write.
    pub(crate) writable: bool,
}

/// What reading yielded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Received {
    /// So many bytes, at least one.
    Bytes(usize),
    /// Nothing now.
    Nothing,
    /// The orderly end of the stream.
    End,
    /// The end of an aborted stream.
    Reset,
    /// This socket cannot be spliced.
    Unsupported,
}

/// What writing got through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sent {
    /// So many bytes, perhaps not all.
    Bytes(usize),
    /// Nothing now.
    Nothing,
    /// The peer takes nothing any more.
    Broken,
}

impl Endpoint {
    /// An accepted client, or an upstream that is connected.
    pub(crate) fn connected(socket: Socket) -> Self {
        Self {
            readable: false,
            writable: true,
            read_closed: false,
            reset: false,
            urgent: false,
            interest: socket.first_interest(),
            socket,
        }
    }

    /// An upstream that is being dialled: an event will tell.
    pub(crate) fn connecting(socket: Socket) -> Self {
        Self { writable: false, ..Self::connected(socket) }
    }

    /// Remembers what `event` tells.
    pub(crate) fn mark(&mut self, event: &Event) {
        self.readable |= event.is_readable() || event.is_read_closed() || event.is_error();
        self.writable |= event.is_writable() || event.is_write_closed() || event.is_error();
        self.read_closed |= event.is_read_closed();
        self.reset |= event.is_error();
        self.urgent |= event.is_priority();
    }

    /// The socket, for what does not move bytes.
    pub(crate) fn socket(&self) -> &Socket {
        &self.socket
    }

    /// Whether reading may yield something.
    pub(crate) fn is_readable(&self) -> bool {
        self.readable
    }

    /// Whether writing may get something through.
    pub(crate) fn is_writable(&self) -> bool {
        self.writable
    }

    /// Whether the peer has ended its stream or the connection has died.
    pub(crate) fn is_read_closed(&self) -> bool {
        self.read_closed || self.reset
    }

    /// Whether the connection was aborted.
    pub(crate) fn is_reset(&self) -> bool {
        self.reset
    }

    /// Treats a peer whose host does not answer any more as one that has reset: what it sent before is still read. Returns true
    /// if it is so.
    pub(crate) fn give_up_vanished(&mut self) -> bool {
        let has_vanished = !self.reset && self.socket.has_vanished();
        if has_vanished {
            self.socket.shut_down_read();
            (self.reset, self.readable) = (true, true);
        }
        has_vanished
    }

    /// Whether bytes are to be spliced from here to `sink`. A splice never gets past an urgent byte; a read does. And what a
    /// UNIX socket holds costs half as much by splice as by copy, but more where TCP paces it.
    pub(crate) fn is_worth_splicing_to(&self, sink: &Self) -> bool {
        let costs_more = self.socket.is_unix() && sink.socket.is_paced();
        !self.urgent && !costs_more
    }

    /// Has the kernel tell when there is something to read, or room to write, where that is `awaited`. It goes on telling of
    /// what is not until an event `was_in_vain`: most never cause one, and each change of mind costs a call.
    ///
    /// The kernel tells at once what is ready when it is asked (`EPOLL_CTL_MOD`, epoll(7)): no event is lost in between.
    /// Returns whether it will tell of all that is awaited: if it could not be asked, it is to be asked again.
    pub(crate) fn await_events(
        &mut self,
        awaited: Awaited,
        was_in_vain: bool,
        registry: &Registry,
        token: Token,
    ) -> bool {
        let readable = awaited.readable || (self.interest.is_readable() && !was_in_vain);
        // TCP tells of room only where a write found none; UNIX sockets tell whenever the peer has read.
        let is_quiet = !was_in_vain || !self.socket.is_unix();
        let writable = awaited.writable || (self.interest.is_writable() && is_quiet);
        let interest = match (readable, writable) {
            (true, true) => EVERYTHING,
            (true, false) => READABLE,
            // Asked for urgent bytes, the kernel tells of any; and to ask for nothing is not possible.
            (false, _) => Interest::WRITABLE,
        };
        if interest != self.interest && self.socket.reregister(registry, token, interest).is_ok() {
            self.interest = interest;
        }
        (self.interest.is_readable() || !awaited.readable)
            && (self.interest.is_writable() || !awaited.writable)
    }

    /// Has the kernel tell when there is room to write, where a write has found none, and when there is something to read.
    /// Returns whether it will.
    pub(crate) fn await_room(&mut self, registry: &Registry, token: Token) -> bool {
        let awaited = Awaited { readable: true, writable: !self.writable };
        self.await_events(awaited, false, registry, token)
    }

    /// Reads into `buffer`.
    pub(crate) fn recv(&mut self, buffer: &mut [u8]) -> Received {
        let result = self.socket.recv(buffer);
        if let Ok(read) = result
            && read.bytes < buffer.len()
        {
            // The socket is empty; the next bytes are an event of their own. But an end that came along with them, or
            // bytes behind an urgent one, would never be told again.
            self.readable = self.read_closed || self.urgent || read.was_stopped;
        }
        self.received(result.map(|read| read.bytes))
    }

    /// Looks at the first bytes and leaves them where they are.
    pub(crate) fn peek(&mut self, buffer: &mut [u8]) -> Received {
        let result = self.socket.peek(buffer);
        self.received(result)
    }

    /// Splices up to `len` bytes into `pipe`.
    pub(crate) fn splice_into(&mut self, pipe: &mut Pipe, len: usize) -> Received {
        let result = pipe.fill(&self.socket, len);
        self.received(result)
    }

    /// Writes from `bytes`.
    pub(crate) fn send(&mut self, bytes: &[u8]) -> Sent {
        let result = self.socket.send(bytes);
        self.sent(result)
    }

    /// Splices out of `pipe`.
    pub(crate) fn splice_out_of(&mut self, pipe: &mut Pipe) -> Sent {
        let result = pipe.drain(&self.socket);
        self.sent(result)
    }

    /// Passes on the end of the stream.
    pub(crate) fn shut_down_write(&mut self) -> Sent {
        let result = self.socket.shut_down_write().map(|()| 0);
        self.sent(result)
    }

    fn received(&mut self, result: io::Result<usize>) -> Received {
        match result {
            // The kernel reports a reset once, to whichever call comes first; from then on it reads as an end.
            Ok(0) if self.reset => Received::Reset,
            Ok(0) => Received::End,
            Ok(bytes) => Received::Bytes(bytes),
            Err(error) => match error.kind() {
                io::ErrorKind::WouldBlock => {
                    self.readable = false;
                    Received::Nothing
                }
                io::ErrorKind::InvalidInput => Received::Unsupported,
                _ => {
                    self.reset = true;
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
                // A UNIX peer that has closed in good order breaks the pipe too, and what it sent before stands.
                let in_order = self.socket.is_unix() && error.kind() == io::ErrorKind::BrokenPipe;
                self.reset |= !in_order;
                // What the peer sent before it went is still to be read, and the end behind it.
                self.readable = true;
                Sent::Broken
            }
        }
    }
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
