//! The server behind the proxy: it tells each client the address that it comes from, and can end and listen anew.

use std::{
    collections::HashMap,
    io::{self, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    os::fd::OwnedFd,
    sync::{
        Arc, Condvar, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Instant,
};

use nix::sys::socket::{setsockopt, sockopt::BindToDevice};
use rustix::{
    event::{PollFd, PollFlags, poll},
    net::{AddressFamily, Protocol, SocketFlags, SocketType, sockopt},
};

use crate::harness::{Addr, PATIENCE, Stream, spawn};

/// Bytes of the greeting: the client's place in the order of acceptance, the port of the server's end, the client's address
/// as the server sees it, and spaces.
pub(super) const GREETING_BYTES: usize = 80;

/// Byte at which the server closes first.
pub(super) const GOODBYE: u8 = 0;

const BACKLOG: i32 = 1024;

/// Server on a port of the loopback. It greets, and echoes.
pub(super) struct Server {
    addr: SocketAddr,
    seen: Arc<Seen>,
    running: Option<Running>,
    /// Socket that keeps the port from others while nobody listens.
    _keeper: Option<OwnedFd>,
}

/// Listeners from a start to an end.
struct Running {
    listeners: Arc<[Listener]>,
    thread: JoinHandle<()>,
}

struct Listener {
    socket: TcpListener,
    is_open: AtomicBool,
}

#[derive(Default)]
struct Seen {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Listeners by which all connections came, each by its number.
    members: Vec<usize>,
    /// Connections that are not closed, by their place in that order.
    open: HashMap<usize, TcpStream>,
}

impl Server {
    /// Listens at a free port of 127.0.0.1.
    pub(super) fn start() -> Self {
        Self::at(Ipv4Addr::LOCALHOST.into())
    }

    /// Listens at a free port of an address.
    pub(super) fn at(ip: IpAddr) -> Self {
        let mut server = Self::away_at(ip);
        server.listen(&[server.addr]);
        server
    }

    /// Takes a port of 127.0.0.1 without listening.
    pub(super) fn away() -> Self {
        Self::away_at(Ipv4Addr::LOCALHOST.into())
    }

    fn away_at(ip: IpAddr) -> Self {
        let keeper = socket((ip, 0).into(), None);
        share(&keeper);
        let addr = bind(&keeper, (ip, 0).into());
        Self { addr, seen: Arc::default(), running: None, _keeper: Some(keeper) }
    }

    /// Listens at a free port of 127.0.0.1 without `SO_REUSEADDR`: nobody can bind the port of one of its connections.
    pub(super) fn unshared() -> Self {
        let any = (Ipv4Addr::LOCALHOST, 0).into();
        let socket = socket(any, None);
        let addr = bind(&socket, any);
        let mut server = Self { addr, seen: Arc::default(), running: None, _keeper: None };
        server.serve([Listener::new(socket)].into());
        server
    }

    /// Listens at these addresses, of which several may be the same.
    pub(super) fn listen(&mut self, addrs: &[SocketAddr]) {
        self.listen_by(addrs, None);
    }

    /// Listens by MPTCP, as programs in Go do.
    pub(super) fn listen_by_mptcp(&mut self) {
        self.listen_by(&[self.addr], Some(rustix::net::ipproto::MPTCP));
    }

    /// Listens at the device `lo` alone.
    pub(super) fn listen_at_device(&mut self) {
        let socket = socket(self.addr, None);
        share(&socket);
        setsockopt(&socket, BindToDevice, &"lo".into()).expect("the right to bind to a device");
        bind(&socket, self.addr);
        self.serve([Listener::new(socket)].into());
    }

    fn listen_by(&mut self, addrs: &[SocketAddr], protocol: Option<Protocol>) {
        assert!(self.running.is_none(), "it listens");
        let listener = |&addr: &SocketAddr| {
            let socket = socket(addr, protocol);
            share(&socket);
            bind(&socket, addr);
            Listener::new(socket)
        };
        self.serve(addrs.iter().map(listener).collect());
    }

    fn serve(&mut self, listeners: Arc<[Listener]>) {
        let (seen, all) = (Arc::clone(&self.seen), Arc::clone(&listeners));
        let thread = spawn(move || {
            while await_event(&all) {
                seen.take_in(&all);
            }
        });
        self.running = Some(Running { listeners, thread });
    }

    /// Stops listening, and closes all connections, as the end of a process does. Returns the time at which nobody listens.
    pub(super) fn kill(&mut self) -> Instant {
        let Running { listeners, thread } = self.running.take().expect("a server that listens");
        listeners.iter().for_each(Listener::close);
        thread.join().expect("no panic");
        let ended = Instant::now();
        for stream in self.seen.lock().open.values() {
            // It may be closed by the client.
            stream.shutdown(Shutdown::Both).ok();
        }
        self.wait_open(0);
        ended
    }

    /// Closes one of the listeners.
    pub(super) fn close(&self, member: usize) {
        self.running.as_ref().expect("a server that listens").listeners[member].close();
    }

    pub(super) fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Returns the address as `--upstream-addr` takes it.
    pub(super) fn url(&self) -> Addr {
        Addr::Tcp(self.addr)
    }

    /// Takes in what waits in the queues. Returns the number of all connections so far.
    ///
    /// On the loopback, a handshake ends in the client's `connect`, and so in the queue.
    pub(super) fn accepted(&self) -> usize {
        let running = self.running.as_ref().expect("a server that listens");
        self.seen.take_in(&running.listeners);
        self.seen.lock().members.len()
    }

    /// Returns the number of connections that it has not closed.
    pub(super) fn open(&self) -> usize {
        self.accepted();
        self.seen.lock().open.len()
    }

    /// Returns the listeners by which all connections came, each by its number.
    pub(super) fn members(&self) -> Vec<usize> {
        self.accepted();
        self.seen.lock().members.clone()
    }

    /// Waits until it has so many connections.
    #[track_caller]
    pub(super) fn wait_open(&self, count: usize) {
        let differs = |state: &mut State| state.open.len() != count;
        let waited = self.seen.changed.wait_timeout_while(self.seen.lock(), PATIENCE, differs);
        assert_eq!(waited.expect("no panic").0.open.len(), count, "connections");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if self.running.is_some() && !std::thread::panicking() {
            self.kill();
        }
    }
}

impl Listener {
    fn new(socket: OwnedFd) -> Self {
        rustix::net::listen(&socket, BACKLOG).expect("a listener");
        let socket = TcpListener::from(socket);
        // The queue may be empty again between an event and `accept`.
        socket.set_nonblocking(true).expect("a socket");
        Self { socket, is_open: AtomicBool::new(true) }
    }

    /// Stops listening, which resets what is in the queue.
    fn close(&self) {
        if self.is_open.swap(false, Ordering::SeqCst) {
            rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Both).expect("a listener");
        }
    }
}

impl Seen {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic")
    }

    /// Accepts all connections that wait.
    fn take_in(self: &Arc<Self>, listeners: &[Listener]) {
        let mut state = self.lock();
        for (member, listener) in listeners.iter().enumerate() {
            loop {
                let stream = match listener.socket.accept() {
                    Ok((stream, _peer)) => stream,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    // It was closed.
                    Err(_ended) => break,
                };
                let place = state.members.len();
                state.members.push(member);
                state.open.insert(place, stream.try_clone().expect("a second descriptor"));
                let seen = Arc::clone(self);
                drop(spawn(move || {
                    // The client or `kill` has ended it.
                    serve(&stream, place).ok();
                    // First: a client that counts is in the list.
                    let listed = seen.lock().open.remove(&place);
                    seen.changed.notify_all();
                    drop((listed, stream));
                }));
            }
        }
        self.changed.notify_all();
    }
}

fn serve(mut stream: &TcpStream, place: usize) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let (peer, own_port) = (stream.peer_addr()?, stream.local_addr()?.port());
    let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
    let greeting = format!("{place} {own_port} {peer}");
    write!(stream, "{greeting:<GREETING_BYTES$}")?;
    let mut buffer = [0; 256];
    loop {
        match stream.read(&mut buffer)? {
            0 => return Ok(()),
            length if buffer[..length].contains(&GOODBYE) => return Ok(()),
            length => stream.write_all(&buffer[..length])?,
        }
    }
}

/// Waits until a client has come or a listener has ended. Returns false once all have.
fn await_event(listeners: &[Listener]) -> bool {
    let open = listeners.iter().filter(|listener| listener.is_open.load(Ordering::SeqCst));
    let mut events: Vec<_> =
        open.map(|listener| PollFd::new(&listener.socket, PollFlags::IN)).collect();
    !events.is_empty() && poll(&mut events, None).is_ok()
}

fn socket(addr: SocketAddr, protocol: Option<Protocol>) -> OwnedFd {
    let family = if addr.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::CLOEXEC;
    rustix::net::socket_with(family, SocketType::STREAM, flags, protocol).expect("a socket")
}

/// Lets others of ours have the same address.
fn share(socket: &OwnedFd) {
    sockopt::set_socket_reuseaddr(socket, true).expect("an option");
    sockopt::set_socket_reuseport(socket, true).expect("an option");
}

/// Binds a socket. Returns its address.
fn bind(socket: &OwnedFd, addr: SocketAddr) -> SocketAddr {
    rustix::net::bind(socket, &addr).expect("an address of this host");
    let bound = rustix::net::getsockname(socket).expect("a bound socket");
    bound.try_into().expect("an IP address")
}

/// Reads the greeting. Returns true if no proxy is in between, and the client's place in the order of acceptance.
///
/// The server sees the client's own address then, and the port that the client has dialled. The one alone would be no proof,
/// as both ends of a relay may have the same port by chance.
pub(super) fn greeting(stream: &mut Stream) -> io::Result<(bool, usize)> {
    let mut greeting = [0; GREETING_BYTES];
    stream.read_exact(&mut greeting)?;
    let text = String::from_utf8_lossy(&greeting);
    let words: Vec<&str> = text.split_whitespace().collect();
    let (&[place, port, peer], Stream::Tcp(own)) = (&words[..], &*stream) else {
        return Err(io::Error::other(format!("no greeting over TCP: {text}")));
    };
    let is_steered =
        own.local_addr()?.to_string() == peer && own.peer_addr()?.port().to_string() == port;
    Ok((is_steered, place.parse().map_err(io::Error::other)?))
}
