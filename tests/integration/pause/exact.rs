//! The pause is exact: behind its answer no connection to the upstream begins, and nobody notices.

use std::{
    collections::HashMap,
    fs,
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    thread,
    time::{Duration, Instant},
};

use crate::harness::{
    Addr, End, PATIENCE, Proxy, Received, Upstream, amount, pattern, spawn, wait_until,
};

/// Clients that connect, ask and leave, again and again.
const BUSY_CLIENTS: usize = 12;
const MESSAGE: &[u8] = b"sixty-four bytes of a request that is answered with just itself.";

/// An upstream that notes in which order connections came: its one accept queue is served first come, first served.
struct Noting {
    addr: SocketAddr,
    came: Arc<Mutex<Vec<(SocketAddr, Instant)>>>,
}

impl Noting {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        let came = Arc::new(Mutex::new(Vec::new()));
        let notes = came.clone();
        drop(spawn(move || {
            for stream in listener.incoming() {
                let stream = stream.unwrap();
                // One that was reset in the queue has no address any more.
                let Ok(peer) = stream.peer_addr() else { continue };
                notes.lock().unwrap().push((peer, Instant::now()));
                drop(spawn(move || drop(answer(stream))));
            }
        }));
        Self { addr, came }
    }

    /// A connection of the test's own: whatever comes behind it began later.
    fn mark(&self) -> usize {
        // Another may have had the same port before.
        let before = self.count();
        let marker = TcpStream::connect(self.addr).unwrap();
        let addr = marker.local_addr().unwrap();
        let place = || {
            let came = self.came.lock().unwrap();
            came.iter().skip(before).position(|&(peer, _)| peer == addr)
        };
        wait_until("the mark has come", || place().is_some());
        before + place().unwrap() + 1
    }

    fn count(&self) -> usize {
        self.came.lock().unwrap().len()
    }

    fn time_of(&self, place: usize) -> Instant {
        wait_until("another connection has come", || self.count() > place);
        self.came.lock().unwrap()[place].1
    }
}

fn answer(mut stream: TcpStream) -> std::io::Result<()> {
    let mut message = [0; MESSAGE.len()];
    stream.read_exact(&mut message)?;
    stream.write_all(&message)
}

/// One request of a client; true when it was answered with its own bytes.
fn ask(addr: SocketAddr) -> std::io::Result<bool> {
    let mut stream = TcpStream::connect(addr)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(MESSAGE)?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    Ok(answer == MESSAGE)
}

fn inet(addr: &Addr) -> SocketAddr {
    match addr {
        Addr::Tcp(addr) => *addr,
        other => panic!("{other} is no port"),
    }
}

#[test]
fn nothing_begins_behind_the_answer_to_a_pause() {
    let upstream = Noting::start();
    let proxy = Proxy::builder()
        .args(["--proxy-threads", "2"])
        .upstream_at(&format!("tcp://{}", upstream.addr))
        .start();
    let (control, addr) = (proxy.control(), inet(proxy.addr()));
    let cycles = amount(200, 2000);
    let (over, served, failed) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    let client = || {
        while !over.load(SeqCst) {
            let count = if ask(addr).is_ok_and(|is_right| is_right) { &served } else { &failed };
            count.fetch_add(1, SeqCst);
        }
    };
    let (mut late, mut slowest) = (0, Duration::ZERO);
    thread::scope(|scope| {
        (0..BUSY_CLIENTS).for_each(|_| drop(scope.spawn(client)));
        for _cycle in 0..cycles {
            let before = served.load(SeqCst);
            wait_until("clients are served", || served.load(SeqCst) > before + BUSY_CLIENTS as u64);
            control.pause();
            let paused_at = upstream.mark();
            control.wait_idle();
            control.wait_status("all are held", |status| status.held == BUSY_CLIENTS as u64);
            late += upstream.count() - paused_at;
            let resumed = Instant::now();
            control.resume();
            slowest = slowest.max(upstream.time_of(paused_at).duration_since(resumed));
        }
        over.store(true, SeqCst);
    });
    let (served, failed) = (served.load(SeqCst), failed.load(SeqCst));
    println!(
        "{cycles} pauses: {late} connections began behind the answer, {failed} of {served} requests failed; after a \
         resume the first one began within {slowest:?}"
    );
    assert_eq!((late, failed), (0, 0));
    assert!(slowest < PATIENCE);
}

/// The bytes that each client sends: far more than its kernel takes before they are read.
const FLOOD_BYTES: usize = 8 * 1024 * 1024;
const FLOOD_SEED: u64 = 7;
/// The most that the kernel may keep of it for a client that is held.
const PARKED_BYTES_MAX: u64 = 16 * 1024;
/// The most that a held client may take of the proxy's own memory, in KiB.
const HELD_KIB_MAX: usize = 2;

#[test]
fn held_clients_that_flood_park_little() {
    const CLIENTS: usize = 100;
    let upstream = Upstream::tcp(|mut stream| {
        let mut said = vec![0; FLOOD_BYTES];
        stream.read_exact(&mut said).expect("all that the client has to say");
        stream.send(if said == pattern(FLOOD_SEED, FLOOD_BYTES) { b"right" } else { b"wrong" });
        Received { bytes: Vec::new(), end: End::Eof }
    });
    let proxy = Proxy::builder().upstream(&upstream).start();
    let flood = pattern(FLOOD_SEED, FLOOD_BYTES);
    proxy.control().pause();
    // What the first client ever takes is not its own.
    drop(proxy.connect_held());
    proxy.control().wait_counts(|status| status.held, 0);
    let before = proxy.memory_kib();
    let mut clients: Vec<(TcpStream, usize)> =
        (0..CLIENTS).map(|_| (TcpStream::connect(inet(proxy.addr())).unwrap(), 0)).collect();
    for (client, sent) in &mut clients {
        client.set_nonblocking(true).unwrap();
        while let Ok(bytes) = client.write(&flood[*sent..]) {
            *sent += bytes;
        }
        assert!(*sent < FLOOD_BYTES, "its own buffers take it all: nothing is shown");
    }
    proxy.control().wait_counts(|status| status.held, CLIENTS as u64);
    let used = proxy.memory_kib().saturating_sub(before);
    let port = inet(proxy.addr()).port();
    let parked = parked(port);
    assert_eq!(parked.len(), CLIENTS);
    let most = *parked.values().max().unwrap();
    println!(
        "{CLIENTS} held clients that flood: {most} bytes parked at most, {used} KiB of the proxy's memory for all"
    );
    assert!(most <= PARKED_BYTES_MAX, "{most} bytes are parked");
    assert!(used <= HELD_KIB_MAX * CLIENTS, "{used} KiB for {CLIENTS} clients");

    proxy.control().resume();
    thread::scope(|scope| {
        for (mut client, sent) in clients {
            let flood = &flood;
            scope.spawn(move || {
                client.set_nonblocking(false).unwrap();
                client.set_read_timeout(Some(PATIENCE)).unwrap();
                client.set_write_timeout(Some(PATIENCE)).unwrap();
                client.write_all(&flood[sent..]).unwrap();
                let mut verdict = Vec::new();
                client.read_to_end(&mut verdict).unwrap();
                assert_eq!(verdict, b"right");
            });
        }
    });
}

/// Returns the bytes that wait to be read at each connection that came in at `port` (proc(5): `rx_queue`).
fn parked(port: u16) -> HashMap<String, u64> {
    const ESTABLISHED: &str = "01";
    let table = fs::read_to_string("/proc/net/tcp").unwrap();
    let lines = table.lines().skip(1).map(|line| line.split_whitespace().collect::<Vec<_>>());
    // The table may show a connection twice when it changes while it is read.
    lines
        .filter(|fields| fields[1].ends_with(&format!(":{port:04X}")) && fields[3] == ESTABLISHED)
        .map(|fields| {
            let bytes = fields[4].split_once(':').unwrap().1;
            (fields[2].to_owned(), u64::from_str_radix(bytes, 16).unwrap())
        })
        .collect()
}
