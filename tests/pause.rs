//! The pause is exact: behind its answer no connection to the upstream begins, and nobody notices.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    thread,
    time::{Duration, Instant},
};

use crate::harness::{Addr, PATIENCE, Proxy, amount, spawn, wait_until};

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
        Addr::Unix(path) => panic!("{} is no port", path.display()),
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
    let cycles = amount("TCPAUSE_PAUSE_CYCLES", 200);
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
