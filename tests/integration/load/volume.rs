//! Load: every byte exact among hundreds of connections, nothing left behind by thousands.
//!
//! The amounts here suit `make test`; `make soak` sets them to what a busy week would bring. One test runs at a time, as
//! each takes thousands of descriptors.

#![allow(clippy::cast_possible_truncation, reason = "lengths here are far below 4 GiB")]

use std::{
    io::{Read, Write},
    net::Ipv4Addr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::SeqCst},
        mpsc,
    },
    thread,
    time::Instant,
};

use rustix::process::{Resource, getrlimit};

use crate::{
    harness::{
        Addr, Builder, End, Family, Listener, PATIENCE, Proxy, Random, Received, Stream, Upstream,
        amount, spawn, wait_until,
    },
    load::talk::{PERIOD, Role, Script, text},
};

/// Workers of each proxy.
const WORKERS: usize = 2;

/// Clients that are at work at the same time.
const BUSY_CLIENTS: usize = 16;

/// The most that a proxy with so many workers may keep after a burst of whatever size.
const KEPT_KIB_MAX: usize = 1024;

/// Descriptors of the test process that are kept for everything else.
const SPARE_FILES: usize = 1000;

/// The result of upstreams that check by themselves.
const NOTHING: Received = Received { bytes: Vec::new(), end: End::Eof };

#[test]
fn load_every_byte_arrives_over_tcp() {
    carry_exactly(Family::Tcp4);
}

#[test]
fn load_every_byte_arrives_over_unix_sockets() {
    carry_exactly(Family::Unix);
}

/// Talks by random scripts until the total has been carried, half of it over each kind of socket.
fn carry_exactly(family: Family) {
    let _alone = alone();
    let total = amount(256, 10_240) as u64 * (1 << 20) / 2;
    let (numbers, carried) = (AtomicU64::new(0), Arc::new(AtomicU64::new(0)));
    let (verdicts, outcomes) = mpsc::channel();
    let count = carried.clone();
    let upstream = Upstream::start(family, move |mut stream| {
        let mut head = [0; 8];
        let outcome = match stream.read_exact(&mut head) {
            Ok(()) => Script::new(u64::from_le_bytes(head), family).play(stream, Role::Upstream),
            Err(error) => Err(format!("no head: {error}")),
        };
        count.fetch_add(*outcome.as_ref().unwrap_or(&0), SeqCst);
        // The test may have failed already.
        drop(verdicts.send(outcome));
        NOTHING
    });
    let proxy = builder(family, upstream.addr()).start();
    let client = || {
        while carried.load(SeqCst) < total {
            let script = Script::new(numbers.fetch_add(1, SeqCst), family);
            let mut client = proxy.connect();
            client.send(&script.number.to_le_bytes());
            carried.fetch_add(script.play(client, Role::Client).unwrap(), SeqCst);
        }
    };
    thread::scope(|scope| (0..BUSY_CLIENTS).for_each(|_| drop(scope.spawn(client))));

    let talks = numbers.load(SeqCst);
    for _ in 0..talks {
        outcomes.recv_timeout(PATIENCE).expect("one more talk").unwrap();
    }
    proxy.control().wait_counts(|status| (status.active, status.failed), (0, 0));
    assert_eq!(proxy.control().status().accepted, talks);
    println!("{family:?}: {talks} talks, {} MiB", carried.load(SeqCst) >> 20);
}

#[test]
fn load_leaves_no_descriptor_behind() {
    const PIPES: usize = 4;
    let _alone = alone();
    let count = amount(3000, 100_000) as u64;
    let upstream = Upstream::tcp(mirror);
    let proxy =
        builder(Family::Tcp4, upstream.addr()).args(["--proxy-pipes", &PIPES.to_string()]).start();
    let open = |kind| proxy.descriptors_of(kind);
    let (all, sockets, pipes) = (proxy.descriptors(), open("socket:"), open("pipe:"));
    let numbers = AtomicU64::new(0);
    let client = || {
        loop {
            match numbers.fetch_add(1, SeqCst) {
                number if number < count => come_and_go(&proxy, number),
                _ => break,
            }
        }
    };
    thread::scope(|scope| (0..BUSY_CLIENTS).for_each(|_| drop(scope.spawn(client))));

    proxy.control().wait_counts(|status| (status.accepted, status.active), (count, 0));
    wait_until("no socket is left", || open("socket:") == sockets);
    // The pools keep what they have.
    let pooled = open("pipe:") - pipes;
    assert!(pooled <= 2 * PIPES * WORKERS, "{pooled} ends of pipes");
    // At first, the C library may just have looked how many processors there are.
    let left = proxy.descriptors();
    assert!(left <= all + pooled, "{left} of {all} and {pooled} ends of pipes");
    println!("{count} connections: {pooled} ends of pipes in the pools, nothing else");
}

/// One of the ways in which a client can come and go.
fn come_and_go(proxy: &Proxy, number: u64) {
    let mut client = proxy.connect();
    if number.is_multiple_of(50) {
        // It takes the beginning of a flood, and resets while pipes are full.
        client.send(&[FLOOD]);
        assert!(client.receive(1 << 20) == text(0, 1 << 20));
        return client.reset();
    }
    match number % 5 {
        0 => client.assert_echo(b"hello"),
        1 => assert!(client.round_trip(text(number, 128 << 10)) == text(number, 128 << 10)),
        2 => {
            client.assert_echo(b"!");
            client.send(text(number, 128 << 10));
            client.reset();
        }
        3 => {
            client.finish();
            assert_eq!(client.receive_all(), NOTHING);
        }
        _ => drop(client),
    }
}

#[test]
fn load_gives_its_memory_back() {
    let _alone = alone();
    let crowd = Crowd::start();
    let proxy = builder(Family::Tcp4, &crowd.addr).start();
    let count = crowd_size(amount(2000, 9000));
    let fresh = proxy.memory_kib();
    let burst = || {
        let clients = answered(&proxy, count, b'.');
        let peak = proxy.memory_kib();
        drop(clients);
        crowd.hang_up();
        proxy.control().wait_counts(|status| status.active, 0);
        (peak, proxy.memory_kib())
    };
    let (first_peak, first) = burst();
    let (second_peak, second) = burst();
    println!(
        "{count} connections: {fresh} KiB before, {first_peak} with the first burst, {first} after, \
         {second_peak} with the second, {second} after"
    );
    // What the C library keeps for the next ones, and the memory of what had not been used before the first.
    assert!(second <= fresh + KEPT_KIB_MAX, "{fresh} KiB before the bursts, {second} after");
    assert!(second <= first + first / 10, "{first} KiB after one burst, {second} after another");
}

#[test]
fn load_of_held_clients_is_answered_after_the_resume() {
    let _alone = alone();
    let crowd = Crowd::start();
    let proxy = builder(Family::Tcp4, &crowd.addr).start();
    let count = crowd_size(amount(1000, 5000));
    proxy.control().pause();
    let mut clients: Vec<_> = (0..count).map(|_| proxy.connect()).collect();
    for (client, number) in clients.iter_mut().zip(0..) {
        client.send(text(number, MESSAGE_BYTES));
    }
    proxy.control().wait_counts(|status| status.held, count as u64);
    let begin = Instant::now();
    proxy.control().resume();
    for (client, number) in clients.iter_mut().zip(0..) {
        assert_eq!(client.receive(MESSAGE_BYTES as usize), text(number, MESSAGE_BYTES));
    }
    println!("{count} held clients: all answered {:?} after the resume began", begin.elapsed());
    proxy.control().wait_counts(|status| (status.held, status.failed), (0, 0));
}

#[test]
fn load_of_held_clients_survives_a_backlog_of_sixteen() {
    let _alone = alone();
    let listener = Listener::bind(&Addr::Tcp((Ipv4Addr::LOCALHOST, 0).into()));
    listener.backlog(16);
    let addr = listener.addr();
    let upstream = Arc::new(listener);
    let acceptor = upstream.clone();
    drop(spawn(move || {
        // One after the other: meanwhile the next ones wait in the backlog.
        while let Ok(mut stream) = acceptor.accept() {
            let message = stream.receive(MESSAGE_BYTES as usize);
            stream.send(&message);
        }
    }));
    let proxy = builder(Family::Tcp4, &addr).start();
    let count = crowd_size(5000);
    proxy.control().pause();
    let mut clients: Vec<_> = (0..count).map(|_| proxy.connect()).collect();
    for (client, number) in clients.iter_mut().zip(0..) {
        client.send(text(number, MESSAGE_BYTES));
    }
    proxy.control().wait_counts(|status| status.held, count as u64);
    let begin = Instant::now();
    proxy.control().resume();
    for (client, number) in clients.iter_mut().zip(0..) {
        let received = client.receive_all();
        assert_eq!((&*received.bytes, received.end), (text(number, MESSAGE_BYTES), End::Eof));
    }
    println!("{count} held clients, a backlog of 16: all answered after {:?}", begin.elapsed());
    proxy.control().wait_counts(|status| (status.held, status.failed), (0, 0));
    upstream.close();
}

#[test]
fn load_of_a_few_among_thousands() {
    const BUSY: usize = 64;
    const ROUNDS: u64 = 100;
    let _alone = alone();
    let crowd = Crowd::start();
    let proxy = builder(Family::Tcp4, &crowd.addr).start();
    let count = crowd_size(amount(1000, 4000));
    let idle = answered(&proxy, count - BUSY, b'.');
    let mut busy = answered(&proxy, BUSY, MORE);
    thread::scope(|scope| {
        for clients in busy.chunks_mut(BUSY / BUSY_CLIENTS) {
            scope.spawn(move || {
                let mut random = Random::new(1);
                for round in 0..ROUNDS {
                    for client in &mut *clients {
                        let message = text(round, random.spread(32 << 10));
                        client.send(message);
                        assert!(client.receive(message.len()) == message, "other bytes");
                    }
                }
            });
        }
    });
    let status = proxy.control().status();
    assert_eq!((status.active, status.failed), (count as u64, 0));
    drop(idle);
}

/// Only one of these tests runs at a time: together they would be out of descriptors.
pub(super) fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Bounds a number of simultaneous clients by the descriptors of this process, of which each takes two.
pub(super) fn crowd_size(wanted: usize) -> usize {
    let files = getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX) as usize;
    wanted.min(files.saturating_sub(SPARE_FILES) / 2)
}

/// A proxy that says nothing of single connections.
fn builder(family: Family, upstream: &Addr) -> Builder {
    Proxy::builder()
        .listen(family)
        .upstream_at(upstream)
        .log_level(Some("info"))
        .args(["--proxy-threads", &WORKERS.to_string()])
}

/// So many clients, each of which has had an answer to a message of these bytes.
fn answered(proxy: &Proxy, count: usize, byte: u8) -> Vec<Stream> {
    let greeted = |_| {
        let mut client = proxy.connect();
        client.assert_echo(&[byte; MESSAGE_BYTES as usize]);
        client
    };
    (0..count).map(greeted).collect()
}

/// An upstream for thousands: a few threads answer each client's message and keep the connection until they are told.
struct Crowd {
    listener: Arc<Listener>,
    addr: Addr,
    kept: Arc<Mutex<Vec<Stream>>>,
}

/// The length of the message that a client of the crowd sends, and gets back.
const MESSAGE_BYTES: u64 = 64;

/// The first of its bytes, if it wants more than one answer.
const MORE: u8 = b'+';

impl Crowd {
    fn start() -> Self {
        let listener = Arc::new(Listener::bind(&Addr::Tcp((Ipv4Addr::LOCALHOST, 0).into())));
        let crowd = Self { addr: listener.addr(), listener, kept: Arc::default() };
        for _ in 0..2 {
            let (listener, kept) = (crowd.listener.clone(), crowd.kept.clone());
            drop(spawn(move || {
                while let Ok(mut stream) = listener.accept() {
                    let message = stream.receive(MESSAGE_BYTES as usize);
                    stream.send(&message);
                    if message[0] == MORE {
                        drop(spawn(move || mirror(stream)));
                    } else {
                        kept.lock().unwrap().push(stream);
                    }
                }
            }));
        }
        crowd
    }

    /// Closes what was kept.
    fn hang_up(&self) {
        self.kept.lock().unwrap().clear();
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        self.listener.close();
    }
}

/// The request for bytes without end.
const FLOOD: u8 = b'#';

/// Sends back what comes, and remembers nothing.
fn mirror(mut stream: Stream) -> Received {
    let mut buffer = vec![0; 16 << 10];
    while let Ok(bytes @ 1..) = stream.read(&mut buffer) {
        if buffer[..bytes] == [FLOOD] {
            while stream.write_all(text(0, PERIOD)).is_ok() {}
            break;
        }
        if stream.write_all(&buffer[..bytes]).is_err() {
            break;
        }
    }
    NOTHING
}
