//! Load: every byte exact among hundreds of connections, nothing left behind by thousands.
//!
//! The amounts here suit `make test`; `make soak` sets them to what a busy week would bring. One test runs at a time, as
//! each takes thousands of descriptors.

#![allow(clippy::cast_possible_truncation, reason = "lengths here are far below 4 GiB")]

use std::{
    io::{self, ErrorKind, Read, Write},
    net::Ipv4Addr,
    sync::{
        Arc, LazyLock, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::SeqCst},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Resource, getrlimit};

use crate::harness::{
    Addr, Builder, Dice, End, Family, Listener, PATIENCE, Proxy, Received, Stream, Upstream,
    amount, pattern, spawn, wait_until,
};

/// How many workers the proxies have.
const WORKERS: usize = 2;

/// How many clients are at work at the same time.
const BUSY_CLIENTS: usize = 16;

/// What a proxy with so many workers may keep after a burst of whatever size.
const KEPT_KIB_MAX: usize = 1024;

/// Descriptors of the test process that are kept for everything else.
const SPARE_FILES: usize = 1000;

/// What upstreams return that check by themselves.
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
    let total = amount("TCPAUSE_LOAD_MIB", 256) as u64 * (1 << 20) / 2;
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
    let count = amount("TCPAUSE_LOAD_CONNECTIONS", 3000) as u64;
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
    let count = crowd_size("TCPAUSE_LOAD_BURST", 2000);
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
    let count = crowd_size("TCPAUSE_LOAD_HELD", 1000);
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
    let count = crowd_size("TCPAUSE_LOAD_BACKLOG", 5000);
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
    let count = crowd_size("TCPAUSE_LOAD_OPEN", 1000);
    let idle = answered(&proxy, count - BUSY, b'.');
    let mut busy = answered(&proxy, BUSY, MORE);
    thread::scope(|scope| {
        for clients in busy.chunks_mut(BUSY / BUSY_CLIENTS) {
            scope.spawn(move || {
                let mut dice = Dice::new(1);
                for round in 0..ROUNDS {
                    for client in &mut *clients {
                        let message = text(round, dice.spread(32 << 10));
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
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// As `amount`, for clients that are there at the same time: each takes two descriptors of this process.
fn crowd_size(name: &str, default: usize) -> usize {
    let files = getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX) as usize;
    amount(name, default).min(files.saturating_sub(SPARE_FILES) / 2)
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

/// What a client of the crowd sends, and gets back.
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

/// What asks for bytes without end.
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

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Client,
    Upstream,
}

/// What both ends of one connection do; each end derives it from the number.
#[derive(Debug)]
struct Script {
    number: u64,
    client: Part,
    upstream: Part,
    /// Who resets the connection in the middle, if anyone does.
    resetter: Option<Role>,
}

/// What one end does.
#[derive(Debug, Clone, Copy)]
struct Part {
    /// Where in the pattern its bytes begin.
    start: u64,
    length: u64,
    /// Whether its kernel takes little at a time for it to send.
    is_tight: bool,
    writes_slowly: bool,
    reads_slowly: bool,
}

impl Script {
    fn new(number: u64, family: Family) -> Self {
        let mut dice = Dice::new(number);
        let (mut client, mut upstream) = (Part::new(&mut dice), Part::new(&mut dice));
        // A UNIX socket knows no reset of its own.
        let resetter = match dice.below(8) {
            0 if family.is_tcp() => Some(Role::Client),
            1 if family.is_tcp() => Some(Role::Upstream),
            _ => None,
        };
        // A resetter reads a part of what comes, and writes little before.
        match resetter {
            Some(Role::Client) => (client.length, upstream.length) = (100, upstream.length + 1000),
            Some(Role::Upstream) => (client.length, upstream.length) = (client.length + 1000, 100),
            None => {}
        }
        Self { number, client, upstream, resetter }
    }

    /// Plays one part to its end; returns how many bytes came, all of them exact.
    fn play(&self, stream: Stream, role: Role) -> Result<u64, String> {
        let (mine, theirs) = match role {
            Role::Client => (self.client, self.upstream),
            Role::Upstream => (self.upstream, self.client),
        };
        if mine.is_tight {
            // The kernel takes its least.
            rustix::net::sockopt::set_socket_send_buffer_size(&stream, 1).unwrap();
        }
        let played = match self.resetter {
            Some(resetter) if resetter == role => reset_midway(stream, mine, theirs),
            resetter => talk(stream, mine, theirs).and_then(|(heard, said)| {
                // A socket tells of its reset once: to who reads or to who writes.
                let was_reset = heard.end == End::Reset || said.as_ref().is_err_and(is_reset);
                let is_whole = heard.bytes == theirs.length && heard.end == End::Eof;
                let is_right =
                    if resetter.is_some() { was_reset } else { is_whole && said.is_ok() };
                if is_right { Ok(heard.bytes) } else { Err(format!("{heard:?}, {said:?}")) }
            }),
        };
        played.map_err(|error| format!("{role:?} of {self:?}: {error}"))
    }
}

fn is_reset(error: &io::Error) -> bool {
    use ErrorKind::{BrokenPipe, ConnectionReset, NotConnected};
    matches!(error.kind(), ConnectionReset | BrokenPipe | NotConnected)
}

impl Part {
    fn new(dice: &mut Dice) -> Self {
        // TCP is slow with a buffer of a few segments: what it sends is less.
        let is_tight = dice.below(8) == 0;
        let length_max = if is_tight { 64 << 10 } else { 16 << 20 };
        Self {
            start: dice.below(PERIOD),
            // A stream in eight has no bytes: its end comes first.
            length: if dice.below(8) == 0 { 0 } else { dice.spread(length_max) },
            is_tight,
            writes_slowly: dice.below(4) == 0,
            reads_slowly: dice.below(4) == 0,
        }
    }
}

/// How many bytes came, all of them exact, and what came last.
#[derive(Debug)]
struct Heard {
    bytes: u64,
    end: End,
}

/// Writes and reads at the same time, both to the end.
fn talk(mut stream: Stream, mine: Part, theirs: Part) -> Result<(Heard, io::Result<()>), String> {
    let mut writer = stream.try_clone();
    thread::scope(|scope| {
        let writing = scope.spawn(move || {
            write(&mut writer, mine)?;
            Ok(rustix::net::shutdown(&writer, rustix::net::Shutdown::Write)?)
        });
        let heard = read(&mut stream, theirs, u64::MAX);
        Ok((heard?, writing.join().unwrap()))
    })
}

/// Writes all, reads a part, and resets.
fn reset_midway(mut stream: Stream, mine: Part, theirs: Part) -> Result<u64, String> {
    write(&mut stream, mine).map_err(|error| format!("cannot write: {error}"))?;
    // At least one byte, which shows that the other end has been reached.
    let enough = 1 + theirs.length / 4;
    let heard = read(&mut stream, theirs, enough)?;
    stream.reset();
    if heard.bytes < enough { Err(format!("too early: {heard:?}")) } else { Ok(heard.bytes) }
}

fn write(stream: &mut Stream, part: Part) -> io::Result<()> {
    let mut dice = Dice::new(part.start);
    let mut sent = 0;
    let mut pace = Pace::new(part.writes_slowly);
    while sent < part.length {
        let piece = dice.spread(pace.piece_max()).min(part.length - sent);
        stream.write_all(text(part.start + sent, piece))?;
        sent += piece;
        pace.step();
    }
    Ok(())
}

/// Reads and compares, up to the end or until enough bytes have come.
fn read(stream: &mut Stream, part: Part, enough: u64) -> Result<Heard, String> {
    let mut pace = Pace::new(part.reads_slowly);
    let mut buffer = vec![0; pace.piece_max() as usize];
    let mut received = 0;
    while received < enough {
        let bytes = match stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(bytes) => bytes,
            Err(error) => return Ok(Heard { bytes: received, end: error.into() }),
        };
        if received + bytes as u64 > part.length
            || buffer[..bytes] != *text(part.start + received, bytes as u64)
        {
            return Err(format!("after {received} bytes came others than were sent"));
        }
        received += bytes as u64;
        pace.step();
    }
    Ok(Heard { bytes: received, end: End::Eof })
}

/// The most that is written or read at once.
const PIECE_MAX: u64 = 1 << 20;

/// The period of what is sent: a prime, so that nothing shifted by a buffer's size looks the same.
const PERIOD: u64 = 1_048_573;

/// A piece of the endless text that every stream is a part of.
fn text(position: u64, length: u64) -> &'static [u8] {
    static TEXT: LazyLock<Vec<u8>> = LazyLock::new(|| {
        let once = pattern(1, PERIOD as usize);
        once.repeat(3)
    });
    let start = (position % PERIOD) as usize;
    &TEXT[start..start + length as usize]
}

/// How fast an end is: a slow one takes small pieces and rests.
struct Pace {
    slow: bool,
    steps: u32,
}

impl Pace {
    fn new(slow: bool) -> Self {
        Self { slow, steps: 0 }
    }

    fn piece_max(&self) -> u64 {
        if self.slow { 4 << 10 } else { PIECE_MAX }
    }

    fn step(&mut self) {
        self.steps += 1;
        if self.slow && self.steps.is_multiple_of(8) {
            thread::sleep(Duration::from_millis(1));
        }
    }
}
