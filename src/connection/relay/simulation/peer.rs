//! The peers of a relay under test, and the bytes that they write.

use std::{
    io,
    sync::LazyLock,
    time::{Duration, Instant},
};

use rustix::net::{SendFlags, send};

use crate::sys::{
    Listener, Socket, SocketAddress,
    socket_file::{Access, SocketFile},
};

/// Time far beyond what a schedule needs to come to its end.
pub(super) const DEADLINE: Duration = Duration::from_secs(20);
/// Bytes that a peer writes at once, at most.
pub(super) const WRITE_BYTES_MAX: usize = 100_000;
/// Bytes after which the written pattern repeats: a prime, so that no buffer's size divides it.
pub(super) const PERIOD: usize = 65_521;

/// Pattern that peers write. Received bytes show which peer wrote them, and where in its stream they stood.
static PATTERN: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut random = Random(1);
    let period: Vec<u8> = (0..PERIOD).map(|_| random.next().to_le_bytes()[0]).collect();
    period.iter().copied().cycle().take(PERIOD + WRITE_BYTES_MAX).collect()
});

/// Xorshift generator; any seed but 0.
pub(super) struct Random(pub(super) u64);

/// End of a stream as a peer saw it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ending {
    Orderly,
    Aborted,
}

/// Way in which a peer left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Left {
    Closed,
    Reset,
}

/// A client or an upstream.
#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
pub(super) struct Peer {
    pub(super) socket: Option<Socket>,
    pub(super) is_unix: bool,
    /// Position in the pattern at which its stream begins.
    pub(super) key: usize,
    pub(super) sent: usize,
    pub(super) received: usize,
    pub(super) shut: bool,
    /// Set once a write has failed with a reset, which the kernel then reports to no read.
    pub(super) broken: bool,
    pub(super) seen: Option<Ending>,
    pub(super) left: Option<Left>,
    /// Set if it left in good order: a UNIX socket that was closed with nothing unread.
    pub(super) left_in_order: bool,
    /// Number of its bytes that had reached the relay's kernel when it left.
    pub(super) owed: usize,
}

/// A listener that makes the sockets of one side.
pub(super) struct Port {
    pub(super) listener: Listener,
    pub(super) address: SocketAddress,
    pub(super) _file: Option<(SocketFile, tempfile::TempDir)>,
}

impl Peer {
    pub(super) fn new(socket: Socket) -> Self {
        Self {
            is_unix: socket.is_unix(),
            socket: Some(socket),
            key: 0,
            sent: 0,
            received: 0,
            shut: false,
            broken: false,
            seen: None,
            left: None,
            left_in_order: false,
            owed: 0,
        }
    }

    pub(super) fn write(&mut self, bytes: usize, flags: SendFlags) {
        let Some(socket) = self.socket.as_ref().filter(|_| !self.shut) else { return };
        let start = (self.key + self.sent) % PERIOD;
        match send(socket, &PATTERN[start..start + bytes], flags).map_err(io::Error::from) {
            Ok(bytes) => self.sent += bytes,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => self.broken = true,
        }
    }

    /// Reads up to `bytes`, and asserts that the peer with `key` sent them.
    pub(super) fn read(&mut self, bytes: usize, key: usize) {
        let Some(socket) = &self.socket else { return };
        let mut buffer = vec![0; bytes];
        match socket.recv(&mut buffer).map(|read| read.bytes) {
            Ok(0) if self.broken => self.seen = Some(Ending::Aborted),
            Ok(0) => self.seen = self.seen.or(Some(Ending::Orderly)),
            Ok(bytes) => {
                let start = (key + self.received) % PERIOD;
                let expected = &PATTERN[start..start + bytes];
                assert!(buffer[..bytes] == *expected, "other bytes were sent");
                assert_eq!(self.seen, None, "nothing comes behind the end");
                self.received += bytes;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => self.seen = Some(Ending::Aborted),
        }
    }

    pub(super) fn shut(&mut self) {
        if let Some(socket) = &self.socket {
            self.shut = true;
            // The relay may have closed the connection already.
            socket.shut_down_write().ok();
        }
    }
}

impl Port {
    pub(super) fn tcp() -> Self {
        let listener = Listener::tcp("127.0.0.1:0".parse().unwrap(), 1).unwrap().pop().unwrap();
        let address = SocketAddress::Inet(listener.local_inet().unwrap());
        Self { listener, address, _file: None }
    }

    pub(super) fn unix() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let (listener, file) = Listener::unix(&path, Access::default()).unwrap();
        Self { listener, address: SocketAddress::Unix(path), _file: Some((file, folder)) }
    }

    /// Returns the dialling and the accepted end of a new connection.
    pub(super) fn connect(&self) -> (Socket, Socket) {
        let deadline = Instant::now() + DEADLINE;
        let (dialled, _) = Socket::dial(&self.address, None).unwrap();
        loop {
            match self.listener.accept() {
                Ok((accepted, _address)) => return (dialled, accepted),
                Err(error) => assert!(Instant::now() < deadline, "nobody comes: {error}"),
            }
            std::thread::yield_now();
        }
    }
}

impl Random {
    pub(super) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub(super) fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() >> 33).unwrap() % limit
    }
}
