//! Tests of the states of a connection: each is built with real sockets, and the event is sent.

mod attempt;
mod crowd;
mod half_closed;
mod header;
mod quiet;
mod refused;
mod rejected;
mod words;

use std::{
    net::SocketAddr,
    os::{fd::OwnedFd, unix::net::UnixListener},
    sync::Arc,
};

use mio::{Events, Poll, Token};
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, listen, socket_with};

use super::*;
use crate::{
    admission::{pace::Pace, semaphore::Semaphore},
    config,
    connection::reject::policy::RejectResponse,
    pause::gate::{Gate, Mode},
    sys::{Listener, SocketAddress},
    upstream::{breaker::Cause, loop_guard::LoopGuard},
};

const DEADLINE: Duration = Duration::from_secs(10);
const CLIENT: Token = Token(0);
const UPSTREAM: Token = Token(1);

/// A worker's resources, for one connection.
struct Bench {
    poll: Poll,
    gate: Arc<Gate>,
    clients: Arc<Semaphore>,
    pace: Arc<Pace>,
    hold: HoldLimits,
    orders: DrainOrders,
    buffers: RelayBuffers,
    upstream: Upstream,
    cached: Cached,
    dialer: Dialer,
    reject_policy: RejectPolicy,
    proxy_headers: ProxyHeaders,
    counters: Counters,
    workers: WorkerPool,
    now: Instant,
}

impl Bench {
    fn new(upstream: &SocketAddress) -> Self {
        Self {
            poll: Poll::new().unwrap(),
            gate: Arc::new(Gate::new()),
            clients: Arc::new(Semaphore::new(1)),
            pace: Pace::new(2, Instant::now()),
            hold: HoldLimits::new(&config::HoldConfig::default()),
            orders: DrainOrders::default(),
            buffers: RelayBuffers::new(2),
            upstream: {
                let addr = upstream.to_string().parse().unwrap();
                let settings = config::UpstreamConfig { addr, ..config::UpstreamConfig::default() };
                Upstream::new(settings, LoopGuard::default(), Instant::now()).unwrap()
            },
            cached: Cached::default(),
            dialer: Dialer::default(),
            reject_policy: RejectPolicy::new(RejectResponse::http(Duration::ZERO), None),
            proxy_headers: ProxyHeaders::default(),
            counters: Counters::default(),
            workers: WorkerPool::new([].into(), 0),
            now: Instant::now(),
        }
    }

    /// Returns a bench whose upstream refuses connections.
    fn nowhere() -> Self {
        Self::new(&refusing())
    }

    /// Returns the connection of an accepted client.
    fn newcomer(&self, client: Socket) -> Connection {
        client.register(self.poll.registry(), CLIENT).unwrap();
        Connection::new(client, None, self.clients.take().unwrap(), None, self.now)
    }

    /// Returns the connection of a client that is held.
    fn connection(&self, client: Socket) -> Connection {
        let mut connection = self.newcomer(client);
        connection.hold(None);
        connection
    }

    fn serve(&mut self, connection: &mut Connection) -> Verdict {
        let ticket = ConnectTicket::Window(self.pace.take(self.now).unwrap());
        self.release(connection, ticket)
    }

    /// Starts a waiting client.
    fn release(&mut self, connection: &mut Connection, ticket: ConnectTicket) -> Verdict {
        let pass = self.gate.enter().unwrap();
        self.act(|context| connection.start_attempt(pass, ticket, context))
    }

    /// Serves a client whose upstream refuses.
    fn serve_refused(&mut self, connection: &mut Connection) {
        let mut verdict = self.serve(connection);
        if matches!(verdict, Verdict::WaitSince(Deadline::ConnectingLast, _)) {
            verdict = self.until(connection, |_, verdict| !matches!(verdict, Verdict::Stay));
        }
        assert!(
            matches!(verdict, Verdict::WaitSince(Deadline::AwaitingUpstream, _)),
            "{verdict:?}"
        );
        assert!(self.upstream.breaker().is_open());
    }

    fn act(&mut self, act: impl FnOnce(&mut Context<'_>) -> Verdict) -> Verdict {
        act(&mut Context {
            registration: Registration {
                registry: self.poll.registry(),
                client: CLIENT,
                upstream: UPSTREAM,
            },
            buffers: &mut self.buffers,
            upstream: &self.upstream,
            cached: &mut self.cached,
            dialer: &mut self.dialer,
            reject_policy: &self.reject_policy,
            hold: &self.hold,
            proxy_headers: &self.proxy_headers,
            orders: &self.orders,
            counters: &self.counters,
            workers: &self.workers,
            handshake_steps: &mut 1,
            now: self.now,
        })
    }

    /// Waits for the next events, and marks them.
    fn mark(&mut self, connection: &mut Connection) {
        let mut events = Events::with_capacity(8);
        self.poll.poll(&mut events, Some(DEADLINE)).unwrap();
        assert!(!events.is_empty(), "no event in {DEADLINE:?}");
        for event in &events {
            match event.token() {
                CLIENT => connection.mark_client(event),
                _ => connection.mark_upstream(event),
            }
        }
    }

    /// Takes events and drives the connection until a verdict is `enough`.
    fn until(
        &mut self,
        connection: &mut Connection,
        enough: impl Fn(&Connection, &Verdict) -> bool,
    ) -> Verdict {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let mut verdict = self.act(|context| connection.drive(context));
            while matches!(verdict, Verdict::Again | Verdict::Enter(_)) {
                verdict = self.act(|context| connection.drive(context));
            }
            if enough(connection, &verdict) {
                return verdict;
            }
            assert!(Instant::now() < deadline, "{verdict:?} in {connection:?}");
            self.mark(connection);
        }
    }

    /// Drives the connection until it is closed. Returns the cause.
    fn cause(&mut self, connection: &mut Connection) -> CloseCause {
        match self.until(connection, |_, verdict| matches!(verdict, Verdict::Close(_))) {
            Verdict::Close(cause) => cause,
            other => unreachable!("{other:?}"),
        }
    }

    fn until_relaying(&mut self, connection: &mut Connection) {
        self.until(connection, |it, _| matches!(it.state, State::Relaying(_)));
    }

    /// Closes the connection, and checks that its pass and permit are given back.
    fn close(&self, connection: Connection, cause: CloseCause) {
        connection.close(cause);
        assert_eq!(self.gate.passes(), 0, "the pass is given back");
        assert!(self.clients.take().is_some(), "the permit is free");
    }
}

/// Returns the client's end and the accepted end of a TCP connection.
fn tcp_pair() -> (Socket, Socket) {
    let (listener, address) = tcp_listener();
    let (client, _) = Socket::dial(&address, None).unwrap();
    (client, accept(&listener))
}

fn tcp_listener() -> (Listener, SocketAddress) {
    let listener = Listener::tcp("127.0.0.1:0".parse().unwrap(), 1).unwrap().pop().unwrap();
    let address = SocketAddress::Inet(listener.local_inet().unwrap());
    (listener, address)
}

fn accept(listener: &Listener) -> Socket {
    let deadline = Instant::now() + DEADLINE;
    loop {
        match listener.accept() {
            Ok((socket, _address)) => return socket,
            Err(error) => assert!(Instant::now() < deadline, "nobody comes: {error}"),
        }
        std::thread::yield_now();
    }
}

/// Returns the address of a socket that is bound and does not listen: it refuses, and no other test can bind it.
fn refusing() -> SocketAddress {
    static BOUND: std::sync::OnceLock<(OwnedFd, SocketAddr)> = std::sync::OnceLock::new();
    let (_, address) = BOUND.get_or_init(|| {
        let socket =
            socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None);
        let socket = socket.unwrap();
        bind(&socket, &"127.0.0.1:0".parse::<SocketAddr>().unwrap()).unwrap();
        let address = rustix::net::getsockname(&socket).unwrap().try_into().unwrap();
        (socket, address)
    });
    SocketAddress::Inet(*address)
}

/// Reads the bytes that are there, after a wait for the first. Returns none when the stream has ended.
fn read(socket: &Socket) -> io::Result<Vec<u8>> {
    let mut buffer = vec![0; 64 * 1024];
    let deadline = Instant::now() + DEADLINE;
    loop {
        match socket.recv(&mut buffer) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                assert!(Instant::now() < deadline, "nothing comes");
                std::thread::yield_now();
            }
            result => return result.map(|read| buffer[..read.bytes].into()),
        }
    }
}

#[test]
fn a_held_client_that_ends_without_a_word_has_left() {
    let mut bench = Bench::nowhere();
    let (client, accepted) = tcp_pair();
    let mut connection = bench.connection(accepted);
    client.shut_down_write().unwrap();
    let cause = bench.cause(&mut connection);
    assert_eq!(cause, CloseCause::LeftHeld);
    bench.close(connection, cause);
}

#[test]
fn a_held_client_that_ends_behind_its_request_stays_and_is_served() {
    let (listener, address) = tcp_listener();
    let mut bench = Bench::new(&address);
    let (client, accepted) = tcp_pair();
    let mut connection = bench.connection(accepted);
    client.send(b"request").unwrap();
    client.shut_down_write().unwrap();
    bench.until(&mut connection, |it, verdict| {
        assert!(matches!(verdict, Verdict::Stay), "{verdict:?}");
        it.client.is_read_closed()
    });
    assert!(
        bench.buffers.pipes.alive.get() == 0 && matches!(connection.state, State::Waiting { .. })
    );

    bench.serve(&mut connection);
    bench.until_relaying(&mut connection);
    let server = accept(&listener);
    server.send(b"answer").unwrap();
    server.shut_down_write().unwrap();
    let cause = bench.cause(&mut connection);
    assert_eq!(cause, CloseCause::Ended);
    bench.close(connection, cause);
    assert_eq!(read(&server).unwrap(), b"request");
    assert_eq!(read(&server).unwrap(), b"");
    assert_eq!(read(&client).unwrap(), b"answer");
    assert_eq!(read(&client).unwrap(), b"");
    let counters = &bench.counters;
    assert_eq!((counters.bytes_to_upstream.get(), counters.bytes_to_client.get()), (7, 6));
}

#[test]
fn a_held_client_that_resets_has_left_whatever_it_sent() {
    let mut bench = Bench::nowhere();
    let (client, accepted) = tcp_pair();
    let mut connection = bench.connection(accepted);
    client.send(b"request").unwrap();
    client.reset_on_close();
    drop(client);
    let cause = bench.cause(&mut connection);
    assert_eq!(cause, CloseCause::LeftHeld);
    bench.close(connection, cause);
}

/// A client may leave at the moment of the resume, before any event.
#[test]
fn the_upstream_is_not_dialled_for_a_client_that_has_gone() {
    let (listener, address) = tcp_listener();
    let mut bench = Bench::new(&address);
    let (client, accepted) = tcp_pair();
    let mut connection = bench.connection(accepted);
    drop(client);
    let verdict = bench.serve(&mut connection);
    assert!(matches!(verdict, Verdict::Close(CloseCause::LeftHeld)), "{verdict:?}");
    assert_eq!(bench.gate.passes(), 0);
    let error = listener.accept().unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::WouldBlock, "nobody was dialled");
}

#[test]
fn only_a_connecting_or_relaying_client_has_a_pass() {
    let (listener, address) = tcp_listener();
    let mut bench = Bench::new(&address);
    let (_client, accepted) = tcp_pair();
    let mut connection = bench.connection(accepted);
    assert_eq!(bench.gate.passes(), 0, "held");
    bench.act(|context| connection.reject(CloseCause::Rejected, context));
    assert_eq!(bench.gate.passes(), 0, "to be rejected");
    bench.serve(&mut connection);
    assert!(matches!(connection.state, State::Connecting(_)), "{connection:?}");
    assert_eq!(bench.gate.passes(), 1, "connecting");
    bench.until_relaying(&mut connection);
    assert_eq!(bench.gate.passes(), 1, "relaying");
    drop(accept(&listener));
    bench.close(connection, CloseCause::Ended);
}

#[test]
fn a_client_that_resets_while_its_upstream_is_dialled_has_left() {
    let (silent, _full) = full_tcp_listener();
    let mut bench = Bench::new(&silent);
    let (client, accepted) = tcp_pair();
    let mut connection = bench.connection(accepted);
    bench.serve(&mut connection);
    client.reset_on_close();
    drop(client);
    let cause = bench.cause(&mut connection);
    assert_eq!(cause, CloseCause::LeftConnecting);
    bench.close(connection, cause);
}

#[test]
fn an_upstream_that_speaks_and_resets_at_once_is_heard() {
    let (listener, address) = tcp_listener();
    let mut bench = Bench::new(&address);
    let (client, accepted) = tcp_pair();
    let mut connection = bench.connection(accepted);
    bench.serve(&mut connection);
    let upstream = accept(&listener);
    upstream.send(b"too many connections").unwrap();
    upstream.reset_on_close();
    drop(upstream);
    let cause = bench.cause(&mut connection);
    assert_eq!(cause, CloseCause::UpstreamReset);
    bench.close(connection, cause);
    assert_eq!(read(&client).unwrap(), b"too many connections");
    assert_eq!(read(&client).unwrap_err().kind(), io::ErrorKind::ConnectionReset);
}

#[test]
fn a_client_that_ends_its_stream_while_its_upstream_is_dialled_is_waited_for() {
    let (silent, _full) = full_tcp_listener();
    let mut bench = Bench::new(&silent);
    let (client, accepted) = tcp_pair();
    let mut connection = bench.connection(accepted);
    bench.serve(&mut connection);
    client.send(b"request").unwrap();
    client.shut_down_write().unwrap();
    bench.until(&mut connection, |it, verdict| {
        assert!(matches!(verdict, Verdict::Stay), "{verdict:?}");
        it.client.is_read_closed()
    });
}

/// Both peers see a reset for each cause that is no orderly end.
#[test]
fn the_cause_decides_between_a_reset_and_an_end() {
    for cause in CloseCause::ALL {
        let (listener, address) = tcp_listener();
        let mut bench = Bench::new(&address);
        let (client, accepted) = tcp_pair();
        let mut connection = bench.connection(accepted);
        bench.serve(&mut connection);
        bench.until_relaying(&mut connection);
        let server = accept(&listener);
        bench.close(connection, cause);
        let is_orderly = matches!(
            cause.word(),
            "ended"
                | "left-held"
                | "left-connecting"
                | "rejected"
                | "hold-timeout"
                | "hold-overflow"
                | "drained"
        );
        let aborted = [client, server].map(|peer| read(&peer).is_err());
        assert_eq!(aborted, [!is_orderly; 2], "{}", cause.word());
    }
}

#[test]
fn a_reset_waits_until_the_other_side_has_everything() {
    let (listener, address) = tcp_listener();
    let mut bench = Bench::new(&address);
    let (client, accepted) = tcp_pair();
    let mut connection = bench.connection(accepted);
    bench.serve(&mut connection);
    bench.until_relaying(&mut connection);
    let server = accept(&listener);
    // Fill the server's receive buffer, until bytes to it stay unacknowledged.
    let deadline = Instant::now() + DEADLINE;
    loop {
        client.send(&[7; 16 * 1024]).ok();
        bench.until(&mut connection, |_, _| true);
        let State::Relaying(it) = &connection.state else { panic!("{connection:?}") };
        if it.relay.upstream().socket().unacknowledged().unwrap() > 0 {
            break;
        }
        assert!(Instant::now() < deadline, "the server's buffers have no end");
        bench.mark(&mut connection);
    }
    client.reset_on_close();
    drop(client);
    let verdict = bench.until(&mut connection, |_, verdict| !matches!(verdict, Verdict::Stay));
    assert!(matches!(verdict, Verdict::Wait(Deadline::AwaitingAcks)), "{verdict:?}");

    let before = bench.now;
    bench.now = before + SETTLE_TIMEOUT.saturating_sub(Duration::from_millis(1));
    let verdict = bench.act(|context| connection.expire(context));
    assert!(matches!(verdict, Verdict::Wait(Deadline::AwaitingAcks)), "{verdict:?}");
    for _look in 0..QUICK_LOOKS_MAX {
        bench.act(|context| connection.expire(context));
    }
    let verdict = bench.act(|context| connection.expire(context));
    assert!(matches!(verdict, Verdict::Wait(Deadline::Stalled)), "{verdict:?}");
    bench.now = before + SETTLE_TIMEOUT;
    let verdict = bench.act(|context| connection.expire(context));
    assert!(matches!(verdict, Verdict::Close(CloseCause::Stalled)), "{verdict:?}");
    assert!(!read(&server).unwrap().is_empty());
}

/// Returns an address that neither accepts nor refuses, as its backlog is full and further SYNs are dropped.
fn full_tcp_listener() -> (SocketAddress, (OwnedFd, Vec<Socket>)) {
    let socket = socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None);
    let socket = socket.unwrap();
    bind(&socket, &"127.0.0.1:0".parse::<SocketAddr>().unwrap()).unwrap();
    listen(&socket, 0).unwrap();
    let address: SocketAddr = rustix::net::getsockname(&socket).unwrap().try_into().unwrap();
    let address = SocketAddress::Inet(address);
    // A backlog of 0 takes one.
    let mut waiting = vec![Socket::dial(&address, None).unwrap().0];
    let deadline = Instant::now() + DEADLINE;
    while waiting[0].peer() == "unknown" {
        assert!(Instant::now() < deadline, "the first is not taken");
        std::thread::yield_now();
    }
    waiting.push(Socket::dial(&address, None).unwrap().0);
    (address, (socket, waiting))
}

#[test]
fn a_connection_that_lasts_gets_its_keepalive() {
    let upstream = Listener::tcp("127.0.0.1:0".parse().unwrap(), 1).unwrap().pop().unwrap();
    let mut bench = Bench::new(&SocketAddress::Inet(upstream.local_inet().unwrap()));
    let (_client, accepted) = tcp_pair();
    let mut connection = bench.connection(accepted);
    bench.serve(&mut connection);
    bench.until(&mut connection, |connection, _| matches!(connection.state, State::Relaying(_)));
    let has_keepalive = |connection: &Connection| match &connection.state {
        State::Relaying(session) => {
            rustix::net::sockopt::socket_keepalive(session.relay.upstream().socket()).unwrap()
        }
        state => panic!("{state:?}"),
    };
    // The connection has a share of the window, and the upstream sends nothing for a while.
    let verdict = bench.act(|context| connection.expire(context));
    assert!(matches!(verdict, Verdict::Wait(Deadline::NoKeepaliveYet)), "{verdict:?}");
    assert!(!has_keepalive(&connection));
    let verdict = bench.act(|context| connection.expire(context));
    assert!(matches!(verdict, Verdict::Wait(Deadline::Relaying)), "{verdict:?}");
    assert!(has_keepalive(&connection));
}
