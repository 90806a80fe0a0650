//! The load: clients, and an upstream that obeys the first byte of each connection.
//!
//! Both run in this process, on threads of their own. The proxy under test is another process with CPU time of its own. The
//! load's CPU time is part of the whole system's only. It is the same for all programs that pass on bytes in the same portions.

use std::{
    collections::VecDeque,
    io::{self, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use mio::{Events, Interest, Poll, Token, event::Source};

use super::stream::Stream;

/// Command to echo all further bytes.
pub(crate) const ECHO: u8 = b'E';
/// Command to read as many mebibytes as the next four bytes say, and then to answer with one byte. A half-close could not mark
/// the end, as not every peer passes it on.
const UPLOAD: u8 = b'U';
/// Command to send as many mebibytes as the next four bytes say, and then to end the stream.
const DOWNLOAD: u8 = b'D';

/// Longest time of any step, so that a stalled proxy does not stall the bench.
const TIMEOUT: Duration = Duration::from_secs(60);
const MIB: usize = 1024 * 1024;

/// An address to connect to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Address {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

/// The direction of bulk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    Up,
    Down,
}

/// A connection of either kind, for an event loop.
enum Polled {
    Tcp(mio::net::TcpStream),
    Unix(mio::net::UnixStream),
}

/// Serves at a TCP port of the loopback and at `path` until the process ends.
pub(crate) fn serve(path: &Path) -> io::Result<(Address, Address)> {
    let tcp = TcpListener::bind("127.0.0.1:0")?;
    let unix = UnixListener::bind(path)?;
    let addresses = (Address::Tcp(tcp.local_addr()?), Address::Unix(path.into()));
    tcp.set_nonblocking(true)?;
    unix.set_nonblocking(true)?;
    let (tcp, unix) =
        (mio::net::TcpListener::from_std(tcp), mio::net::UnixListener::from_std(unix));
    thread::Builder::new().name("upstream".into()).spawn(move || serve_all(tcp, unix))?;
    Ok(addresses)
}

/// Moves `mebibytes` over each of `connections` at once.
pub(crate) fn bulk(
    address: &Address,
    way: Way,
    connections: usize,
    mebibytes: u32,
) -> io::Result<()> {
    let threads: Vec<_> = (0..connections)
        .map(|_| {
            let address = address.clone();
            thread::Builder::new().spawn(move || match way {
                Way::Up => upload(&address, mebibytes),
                Way::Down => download(&address, mebibytes),
            })
        })
        .collect::<io::Result<_>>()?;
    threads
        .into_iter()
        .try_for_each(|thread| thread.join().unwrap_or_else(|_| Err(io::ErrorKind::Other.into())))
}

/// Connections that repeatedly send a message and await its echo.
pub(crate) struct RoundTrips {
    poll: Poll,
    clients: Vec<Client>,
    size: usize,
}

impl RoundTrips {
    /// Opens `connections`, and awaits the echo of one byte on each, by which the way to the upstream is open.
    pub(crate) fn open(address: &Address, connections: usize, size: usize) -> io::Result<Self> {
        let mut trips = Self { poll: Poll::new()?, clients: Vec::new(), size };
        for index in 0..connections {
            let mut stream = connect(address)?;
            stream.write_all(&[ECHO, 0])?;
            stream.read_exact(&mut [0])?;
            let stream = Polled::from_blocking(stream, &trips.poll, index)?;
            // The client sends nothing before its first trip begins.
            trips.clients.push(Client { stream, sent: size, received: 0, began: Instant::now() });
        }
        Ok(trips)
    }

    /// Makes `count` round trips on the first `busy` connections together; returns their times, sorted.
    pub(crate) fn run(&mut self, busy: usize, count: usize) -> io::Result<Vec<Duration>> {
        let message = vec![b'x'; self.size];
        let mut scratch = vec![0; self.size.max(4096)];
        let mut times = Vec::with_capacity(count);
        let mut begun = 0;
        for client in self.clients.iter_mut().take(busy) {
            begun += 1;
            client.begin();
            client.write(&message)?;
        }
        let mut events = Events::with_capacity(1024);
        while times.len() < count {
            wait(&mut self.poll, &mut events, Some(TIMEOUT))?;
            if events.is_empty() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            for event in &events {
                let client = &mut self.clients[event.token().0];
                client.write(&message)?;
                while client.read(&mut scratch)? {
                    if client.received < self.size {
                        continue;
                    }
                    times.push(client.began.elapsed());
                    client.sent = self.size;
                    client.received = 0;
                    if begun < count {
                        begun += 1;
                        client.begin();
                        client.write(&message)?;
                    }
                }
            }
        }
        times.sort_unstable();
        Ok(times)
    }
}

/// Opens `count` connections, `at_once` at a time. Each sends 64 bytes, awaits their echo and closes.
pub(crate) fn short(address: &Address, count: usize, at_once: usize) -> io::Result<()> {
    let mut poll = Poll::new()?;
    let mut clients: Vec<Option<Client>> = (0..at_once).map(|_| None).collect();
    let mut message = [b'x'; 65];
    message[0] = ECHO;
    let mut scratch = [0; 4096];
    let (mut opened, mut done) = (0, 0);
    let mut events = Events::with_capacity(1024);
    while done < count {
        for (index, place) in clients.iter_mut().enumerate() {
            if place.is_none() && opened < count {
                opened += 1;
                let stream = Polled::connect(address, &poll, index)?;
                *place = Some(Client { stream, sent: 0, received: 0, began: Instant::now() });
            }
        }
        wait(&mut poll, &mut events, Some(TIMEOUT))?;
        if events.is_empty() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        for event in &events {
            let place = &mut clients[event.token().0];
            let Some(client) = place else { continue };
            if event.is_writable() {
                client.write(&message)?;
            }
            while client.received < 64 && client.read(&mut scratch)? {}
            if client.received >= 64 {
                *place = None;
                done += 1;
            }
        }
    }
    Ok(())
}

/// Opens `count` connections, which stay idle after the echo of one byte.
pub(crate) fn idle(address: &Address, count: usize) -> io::Result<Vec<impl Sized>> {
    let open = |_| {
        let mut stream = connect(address)?;
        stream.write_all(&[ECHO, 0])?;
        stream.read_exact(&mut [0])?;
        Ok(stream)
    };
    (0..count).map(open).collect()
}

/// Lowers the priority of this thread below the threads that make round trips (Linux counts niceness by thread, `nice(2)`).
/// Otherwise this thread would delay them, and their times would not show the proxy.
fn step_back() {
    rustix::process::nice(19).ok();
}

fn upload(address: &Address, mebibytes: u32) -> io::Result<()> {
    step_back();
    let mut stream = connect(address)?;
    let chunk = vec![b'u'; MIB];
    stream.write_all(&[UPLOAD])?;
    stream.write_all(&mebibytes.to_be_bytes())?;
    for _ in 0..mebibytes {
        stream.write_all(&chunk)?;
    }
    stream.read_exact(&mut [0])
}

fn download(address: &Address, mebibytes: u32) -> io::Result<()> {
    step_back();
    let mut stream = connect(address)?;
    stream.write_all(&[DOWNLOAD])?;
    stream.write_all(&mebibytes.to_be_bytes())?;
    let mut chunk = vec![0; 256 * 1024];
    let mut left = mebibytes as usize * MIB;
    while left > 0 {
        match stream.read(&mut chunk)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            bytes => left -= bytes,
        }
    }
    Ok(())
}

/// Polls, and does so again if a signal interrupts it.
fn wait(poll: &mut Poll, events: &mut Events, timeout: Option<Duration>) -> io::Result<()> {
    loop {
        match poll.poll(events, timeout) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

/// Connection of the event loops above.
struct Client {
    stream: Polled,
    sent: usize,
    received: usize,
    began: Instant,
}

impl Client {
    fn begin(&mut self) {
        (self.sent, self.received, self.began) = (0, 0, Instant::now());
    }

    fn write(&mut self, message: &[u8]) -> io::Result<()> {
        while self.sent < message.len() {
            match self.stream.as_write().write(&message[self.sent..]) {
                Ok(bytes) => self.sent += bytes,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Reads once. Returns false if there is nothing to read.
    fn read(&mut self, scratch: &mut [u8]) -> io::Result<bool> {
        match self.stream.as_read().read(scratch) {
            Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(bytes) => {
                self.received += bytes;
                Ok(true)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(error),
        }
    }
}

/// The upstream's event loop. Bulk is handed over to threads.
fn serve_all(mut tcp: mio::net::TcpListener, mut unix: mio::net::UnixListener) -> io::Result<()> {
    const TCP: Token = Token(usize::MAX);
    const UNIX: Token = Token(usize::MAX - 1);
    let mut poll = Poll::new()?;
    poll.registry().register(&mut tcp, TCP, Interest::READABLE)?;
    poll.registry().register(&mut unix, UNIX, Interest::READABLE)?;
    let mut peers: Vec<Option<Peer>> = Vec::new();
    let mut free: Vec<usize> = Vec::new();
    let mut events = Events::with_capacity(1024);
    let mut scratch = vec![0; 64 * 1024];
    loop {
        wait(&mut poll, &mut events, None)?;
        for event in &events {
            let token = event.token();
            if token == TCP || token == UNIX {
                loop {
                    let accepted = if token == TCP {
                        tcp.accept().map(|(stream, _)| Polled::Tcp(stream))
                    } else {
                        unix.accept().map(|(stream, _)| Polled::Unix(stream))
                    };
                    let Ok(mut stream) = accepted else { break };
                    let slot = free.pop().unwrap_or_else(|| {
                        peers.push(None);
                        peers.len() - 1
                    });
                    stream.register(&poll, slot)?;
                    peers[slot] = Some(Peer { stream, asked: false, backlog: VecDeque::new() });
                }
                continue;
            }
            let slot = token.0;
            let Some(peer) = &mut peers[slot] else { continue };
            match peer.echo(&mut scratch) {
                Ok(Echo::Wait) => {}
                Ok(Echo::Bulk(rest)) => {
                    let Some(mut peer) = peers[slot].take() else { continue };
                    free.push(slot);
                    peer.stream.deregister(&poll)?;
                    let stream = peer.stream.into_blocking()?;
                    thread::Builder::new().spawn(move || serve_bulk(stream, &rest))?;
                }
                Ok(Echo::End) | Err(_) => {
                    peers[slot] = None;
                    free.push(slot);
                }
            }
        }
    }
}

/// A connection of the upstream.
struct Peer {
    stream: Polled,
    asked: bool,
    backlog: VecDeque<u8>,
}

enum Echo {
    Wait,
    End,
    Bulk(Vec<u8>),
}

impl Peer {
    fn echo(&mut self, scratch: &mut [u8]) -> io::Result<Echo> {
        loop {
            while !self.backlog.is_empty() {
                match self.stream.as_write().write(self.backlog.as_slices().0) {
                    Ok(bytes) => drop(self.backlog.drain(..bytes)),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        return Ok(Echo::Wait);
                    }
                    Err(error) => return Err(error),
                }
            }
            let bytes = match self.stream.as_read().read(scratch) {
                Ok(0) => return Ok(Echo::End),
                Ok(bytes) => bytes,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Echo::Wait),
                Err(error) => return Err(error),
            };
            let mut bytes = &scratch[..bytes];
            if !self.asked {
                self.asked = true;
                if bytes[0] != ECHO {
                    return Ok(Echo::Bulk(bytes.to_vec()));
                }
                bytes = &bytes[1..];
            }
            // Most answers fit at once.
            let written = match self.stream.as_write().write(bytes) {
                Ok(written) => written,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
                Err(error) => return Err(error),
            };
            self.backlog.extend(&bytes[written..]);
        }
    }
}

fn serve_bulk(mut stream: Stream, rest: &[u8]) -> io::Result<()> {
    step_back();
    let mut asked = rest.to_vec();
    while asked.len() < 5 {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        asked.extend(byte);
    }
    let mebibytes = u32::from_be_bytes([asked[1], asked[2], asked[3], asked[4]]);
    if asked[0] == UPLOAD {
        let mut left = (mebibytes as usize * MIB).saturating_sub(asked.len() - 5);
        let mut chunk = vec![0; 256 * 1024];
        while left > 0 {
            match stream.read(&mut chunk)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                bytes => left = left.saturating_sub(bytes),
            }
        }
        stream.write_all(b"k")?;
    } else {
        let chunk = vec![b'd'; MIB];
        for _ in 0..mebibytes {
            stream.write_all(&chunk)?;
        }
    }
    // The client closes first.
    while stream.read(&mut [0; 64])? > 0 {}
    Ok(())
}

pub(crate) fn connect(address: &Address) -> io::Result<Stream> {
    match address {
        Address::Tcp(address) => {
            Stream::tcp(TcpStream::connect_timeout(address, TIMEOUT)?, TIMEOUT)
        }
        Address::Unix(path) => Stream::unix(UnixStream::connect(path)?, TIMEOUT),
    }
}

impl Polled {
    fn from_blocking(stream: Stream, poll: &Poll, index: usize) -> io::Result<Self> {
        let mut polled = match stream {
            Stream::Tcp(stream) => {
                stream.set_nonblocking(true)?;
                Self::Tcp(mio::net::TcpStream::from_std(stream))
            }
            Stream::Unix(stream) => {
                stream.set_nonblocking(true)?;
                Self::Unix(mio::net::UnixStream::from_std(stream))
            }
        };
        polled.register(poll, index)?;
        Ok(polled)
    }

    fn connect(address: &Address, poll: &Poll, index: usize) -> io::Result<Self> {
        let mut stream = match address {
            Address::Tcp(address) => Self::Tcp(mio::net::TcpStream::connect(*address)?),
            Address::Unix(path) => Self::Unix(mio::net::UnixStream::connect(path)?),
        };
        stream.register(poll, index)?;
        Ok(stream)
    }

    fn register(&mut self, poll: &Poll, index: usize) -> io::Result<()> {
        let interest = Interest::READABLE | Interest::WRITABLE;
        self.as_source().register(poll.registry(), Token(index), interest)
    }

    fn deregister(&mut self, poll: &Poll) -> io::Result<()> {
        self.as_source().deregister(poll.registry())
    }

    fn into_blocking(self) -> io::Result<Stream> {
        match self {
            Self::Tcp(stream) => {
                let stream = TcpStream::from(std::os::fd::OwnedFd::from(stream));
                stream.set_nonblocking(false)?;
                Ok(Stream::Tcp(stream))
            }
            Self::Unix(stream) => {
                let stream = UnixStream::from(std::os::fd::OwnedFd::from(stream));
                stream.set_nonblocking(false)?;
                Ok(Stream::Unix(stream))
            }
        }
    }

    fn as_source(&mut self) -> &mut dyn Source {
        match self {
            Self::Tcp(stream) => stream,
            Self::Unix(stream) => stream,
        }
    }

    fn as_read(&mut self) -> &mut dyn Read {
        match self {
            Self::Tcp(stream) => stream,
            Self::Unix(stream) => stream,
        }
    }

    fn as_write(&mut self) -> &mut dyn Write {
        match self {
            Self::Tcp(stream) => stream,
            Self::Unix(stream) => stream,
        }
    }
}
