//! Everything at random for a while: clients of all kinds, pauses, an upstream that comes and goes. Then nothing is left.
//!
//! A quarter of a minute, multiplied by `TCPAUSE_SCALE`; `make soak` takes an hour.

use std::{
    collections::HashSet,
    fs,
    io::{self, Read, Write},
    net::Ipv4Addr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    thread,
    time::{Duration, Instant},
};

use rustix::net::{Shutdown, shutdown};

use crate::harness::{
    Addr, End, Listener, Proxy, Random, Received, Status, Stream, Upstream, amount, pattern,
    wait_until,
};

/// The time between two looks at what is left.
const ROUND: Duration = Duration::from_secs(4);
/// Clients that are at work at the same time.
const CLIENTS: u64 = 8;
/// Connections that are open at a look, and clients that are held.
const OPEN: usize = 20;
const HELD: usize = 10;
/// Pipes of a worker: the pools keep what they have.
const PIPES: usize = 4;
const WORKERS: usize = 2;
/// The growth that the memory of the process is allowed: a heap is never the same twice.
const SLACK_KIB: usize = 1024;

/// The memory of the upstream: none.
const NOTHING: Received = Received { bytes: Vec::new(), end: End::Eof };

/// The outcomes of clients.
#[derive(Debug, Default)]
struct Fates {
    served: AtomicU64,
    left: AtomicU64,
    /// The upstream was away.
    refused: AtomicU64,
}

#[test]
fn soak_leaves_nothing_behind() {
    let seconds = amount(15, 3600) as u64;
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut upstream = Some(start_upstream(&Addr::Tcp((Ipv4Addr::LOCALHOST, 0).into())));
    let addr = upstream.as_ref().map(|it| it.addr().clone()).expect("an upstream");
    let proxy = Proxy::builder()
        .upstream_at(&addr)
        .log_level(Some("info"))
        .args(["--proxy-threads", &WORKERS.to_string(), "--proxy-pipes", &PIPES.to_string()])
        .start();
    let standard_pipes = pipes(&proxy);
    let (descriptors, threads) = (proxy.descriptors() - standard_pipes, proxy.threads());
    let fates = Fates::default();
    let (mut rounds, mut memory) = (0, Vec::new());
    let mut counts = Counts { last: proxy.control().status(), reads: 0 };
    while rounds < 3 || Instant::now() < end {
        rounds += 1;
        round(&proxy, rounds, &addr, &mut upstream, &fates, &mut counts);
        compare_gauges(&proxy, &addr);
        let counts = |status: &Status| (status.active, status.connecting, status.held);
        proxy.control().wait_counts(counts, (0, 0, 0));
        wait_until("all descriptors are closed", || {
            proxy.descriptors() - pipes(&proxy) == descriptors
        });
        assert!(pipes(&proxy) <= standard_pipes + 2 * PIPES * WORKERS);
        // A busy moment of the control API takes one more, for some seconds.
        wait_until("all threads of that round have ended", || {
            proxy.has_no_more_threads_than(threads)
        });
        memory.push(proxy.memory_kib());
    }
    // The first rounds find out how much is needed at a time.
    let (first, last) = (memory[1], memory[memory.len() - 1]);
    println!("{} times, the ends added up: {:?}", counts.reads, counts.last.closed);
    println!(
        "{rounds} rounds, {fates:?}; {first} KiB after the second round, {last} after the last"
    );
    assert!(last <= first + first / 10 + SLACK_KIB, "it grows: {memory:?} KiB");
    assert_eq!(proxy.control().status().worker_panics, 0);
}

/// Counts of the status, which are read all along.
struct Counts {
    last: Status,
    reads: usize,
}

impl Counts {
    /// Reads the status. Each accepted client is in one state or has ended by one cause, and no total falls.
    #[track_caller]
    fn read(&mut self, proxy: &Proxy) {
        let status = proxy.control().status();
        let present = status.held + status.connecting + status.active + status.rejecting;
        let ended: u64 = status.closed.values().sum();
        assert_eq!(status.accepted, ended + present, "{status:?}");
        assert!(status.accepted >= self.last.accepted, "{:?} {status:?}", self.last);
        for (cause, count) in &status.closed {
            assert!(*count >= self.last.closed[cause], "{cause}: {:?} {status:?}", self.last);
        }
        (self.last, self.reads) = (status, self.reads + 1);
    }
}

/// Random clients, with random pauses and one restart of the upstream.
fn round(
    proxy: &Proxy,
    number: u64,
    addr: &Addr,
    upstream: &mut Option<Upstream>,
    fates: &Fates,
    counts: &mut Counts,
) {
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(SeqCst) {
                counts.read(proxy);
            }
        });
        for client in 0..CLIENTS {
            let (is_over, mut random) = (&is_over, Random::new(number << 8 | client));
            scope.spawn(move || {
                while !is_over.load(SeqCst) {
                    let fate = match play(proxy, &mut random) {
                        Ok(true) => &fates.served,
                        Ok(false) => &fates.left,
                        Err(_) => &fates.refused,
                    };
                    fate.fetch_add(1, SeqCst);
                }
            });
        }
        let (mut random, end) = (Random::new(number), Instant::now() + ROUND);
        while Instant::now() < end {
            if random.below(2) == 0 {
                proxy.control().pause();
            }
            thread::sleep(Duration::from_millis(random.below(150)));
            if random.below(8) == 0 {
                drop(upstream.take());
                thread::sleep(Duration::from_millis(random.below(100)));
                *upstream = Some(start_upstream(addr));
            }
            proxy.control().resume();
            thread::sleep(Duration::from_millis(random.below(50)));
        }
        is_over.store(true, SeqCst);
    });
}

/// One client. True when all that it sent has come back, false when it left before; an error when the upstream was away.
fn play(proxy: &Proxy, random: &mut Random) -> io::Result<bool> {
    let mut client = proxy.addr().try_connect()?;
    let bytes = pattern(random.below(1 << 32), 1 << random.below(20));
    match random.below(8) {
        0 => return Ok(false),
        1 => shutdown(&client, Shutdown::Write)?,
        2 => {
            client.write_all(b"leaving")?;
            client.reset();
            return Ok(false);
        }
        3 => {
            client.write_all(b"leaving")?;
            client.read_exact(&mut [0])?;
            client.reset();
            return Ok(false);
        }
        4 => {
            client.write_all(b"the end")?;
            shutdown(&client, Shutdown::Write)?;
            let Received { bytes, end } = client.receive_all();
            if end != End::Eof {
                return Err(io::ErrorKind::ConnectionReset.into());
            }
            assert_eq!(bytes, b"the end");
        }
        _ => {
            for _ in 0..=random.below(4) {
                assert!(exchange(&mut client, &bytes)? == bytes, "other bytes");
            }
        }
    }
    Ok(true)
}

/// Writes `bytes` and reads as many at the same time.
fn exchange(client: &mut Stream, bytes: &[u8]) -> io::Result<Vec<u8>> {
    let mut writer = client.try_clone();
    thread::scope(|scope| {
        let writing = scope.spawn(move || writer.write_all(bytes));
        let mut answer = vec![0; bytes.len()];
        let reading = client.read_exact(&mut answer);
        writing.join().expect("no panic")?;
        reading.map(|()| answer)
    })
}

/// Some clients are open and some are held: the status counts what the kernel does.
fn compare_gauges(proxy: &Proxy, upstream: &Addr) {
    proxy.control().wait_counts(|status| (status.active, status.held), (0, 0));
    let mut open: Vec<_> = (0..OPEN).map(|_| proxy.connect()).collect();
    for client in &mut open {
        client.assert_echo(b"hello");
    }
    proxy.control().pause();
    let held: Vec<_> = (0..HELD).map(|_| proxy.connect()).collect();
    let counts = |status: &Status| (status.active, status.connecting, status.held);
    proxy.control().wait_counts(counts, (OPEN as u64, 0, HELD as u64));
    assert_eq!(established(proxy.addr().port(), 1), OPEN + HELD, "sockets of clients");
    assert_eq!(established(upstream.port(), 2), OPEN, "sockets to the upstream");
    drop((open, held));
    proxy.control().wait_idle();
    proxy.control().resume();
}

/// Returns the number of TCP connections with this port in this column of `/proc/net/tcp`: 1 is the local address, 2 the
/// peer's. While others change the table, a reader may see a line twice, so that each pair of addresses counts once.
fn established(port: u16, column: usize) -> usize {
    let table = fs::read_to_string("/proc/net/tcp").expect("a table");
    let end = format!(":{port:04X}");
    let pairs = table.lines().skip(1).filter_map(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        let is_meant = fields[3] == "01" && fields[column].ends_with(&end);
        is_meant.then(|| (fields[1].to_owned(), fields[2].to_owned()))
    });
    pairs.collect::<HashSet<_>>().len()
}

/// Sends back what comes, and resets now and then.
fn start_upstream(addr: &Addr) -> Upstream {
    let random = Arc::new(Mutex::new(Random::new(0)));
    Upstream::on(Listener::bind(addr), move |mut stream| {
        let resets = random.lock().unwrap().below(32) == 0;
        let mut buffer = vec![0; 16 << 10];
        while let Ok(bytes @ 1..) = stream.read(&mut buffer) {
            if stream.write_all(&buffer[..bytes]).is_err() {
                break;
            }
            if resets && bytes > 1000 {
                stream.reset();
                return NOTHING;
            }
        }
        NOTHING
    })
}

fn pipes(proxy: &Proxy) -> usize {
    proxy.descriptors_of("pipe:")
}
