//! The server behind a fleet, which remembers when it has carried something, and the clients before it.

use std::{
    io::{self, Read as _, Write as _},
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, SystemTime},
};

use crate::harness::{Addr, End, PATIENCE, Received, Stream, Upstream, spawn};

/// Time between two clients of a host.
const CLIENT_INTERVAL: Duration = Duration::from_millis(100);
/// Time for which a client is under way.
const TALK: Duration = Duration::from_millis(20);

/// Returns the time since 1970. The logs, the server and the commands share this clock.
pub(super) fn clock() -> Duration {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("a time after 1970")
}

/// Server that echoes. The first byte of a client is the number of its host.
pub(super) struct Server {
    upstream: Upstream,
    seen: Arc<Seen>,
}

#[derive(Default)]
struct Seen {
    /// Times of all bytes that came, each with the number of a host.
    bytes: Mutex<Vec<(Duration, usize)>>,
    open: Mutex<usize>,
    changed: Condvar,
}

impl Server {
    pub(super) fn start() -> Self {
        let seen = Arc::new(Seen::default());
        let shared = Arc::clone(&seen);
        let upstream = Upstream::tcp(move |stream| {
            shared.count(1);
            let end = shared.echo(stream).map_or_else(End::from, |()| End::Eof);
            shared.count(-1);
            Received { bytes: Vec::new(), end }
        });
        Self { upstream, seen }
    }

    pub(super) fn addr(&self) -> &Addr {
        self.upstream.addr()
    }

    /// Returns the times between two at which bytes came from a host that is meant.
    ///
    /// A client goes only when it has its answer, so each of these bytes comes while its proxy is not idle.
    pub(super) fn carried(
        &self,
        from: Duration,
        to: Duration,
        is_meant: impl Fn(usize) -> bool,
    ) -> Vec<(Duration, usize)> {
        let bytes = self.seen.bytes.lock().unwrap();
        let carried = bytes.iter().filter(|(at, host)| (from..=to).contains(at) && is_meant(*host));
        carried.copied().collect()
    }

    /// Waits until no connection is left.
    #[track_caller]
    pub(super) fn wait_empty(&self) {
        let open = self.seen.open.lock().unwrap();
        let waits = |open: &mut usize| *open > 0;
        let waited = self.seen.changed.wait_timeout_while(open, PATIENCE, waits);
        assert_eq!(*waited.unwrap().0, 0, "connections that are left");
    }
}

impl Seen {
    fn count(&self, change: isize) {
        let mut open = self.open.lock().unwrap();
        *open = open.checked_add_signed(change).unwrap();
        self.changed.notify_all();
    }

    fn echo(&self, mut stream: Stream) -> io::Result<()> {
        let mut buffer = [0; 64];
        let mut host = None;
        loop {
            let length = stream.read(&mut buffer)?;
            if length == 0 {
                return Ok(());
            }
            let host = *host.get_or_insert(usize::from(buffer[0]));
            self.bytes.lock().unwrap().push((clock(), host));
            stream.write_all(&buffer[..length])?;
        }
    }
}

/// Clients of some hosts, one after the other at each.
pub(super) struct Clients {
    is_over: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Result<usize, String>>>,
}

impl Clients {
    /// Has clients come to these hosts, each given by its number and address.
    pub(super) fn start<'a>(hosts: impl Iterator<Item = (usize, &'a Addr)>) -> Self {
        let is_over = Arc::new(AtomicBool::new(false));
        let threads = hosts.map(|(host, addr)| {
            let (is_over, addr) = (Arc::clone(&is_over), addr.clone());
            spawn(move || {
                let mut served = 0;
                while !is_over.load(Ordering::SeqCst) {
                    talk(host, &addr).map_err(|error| format!("host {host}: {error}"))?;
                    served += 1;
                    std::thread::sleep(CLIENT_INTERVAL);
                }
                Ok(served)
            })
        });
        let threads = threads.collect();
        Self { is_over, threads }
    }

    /// Ends them, and checks that none has failed. Returns their number.
    #[track_caller]
    pub(super) fn end(mut self) -> usize {
        self.is_over.store(true, Ordering::SeqCst);
        let results = self.threads.drain(..).map(|thread| thread.join().unwrap());
        let results: Vec<_> = results.collect();
        results.into_iter().map(|result| result.unwrap_or_else(|error| panic!("{error}"))).sum()
    }
}

impl Drop for Clients {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::SeqCst);
    }
}

/// Plays a client: two requests with their answers, and an end in good order.
fn talk(host: usize, addr: &Addr) -> io::Result<()> {
    let mut stream = addr.try_connect()?;
    // A pause may last as long as etcd is away.
    stream.read_timeout(3 * PATIENCE);
    let request = [u8::try_from(host).unwrap(), 1, 2, 3];
    for pause in [TALK, Duration::ZERO] {
        let mut answer = [0; 4];
        stream.write_all(&request)?;
        stream.read_exact(&mut answer)?;
        if answer != request {
            return Err(io::Error::other(format!("the answer was {answer:?}")));
        }
        std::thread::sleep(pause);
    }
    stream.finish();
    match stream.receive_all() {
        rest if rest == Received::ended(b"") => Ok(()),
        rest => Err(io::Error::other(format!("the end was {rest:?}"))),
    }
}
