//! A resume with a thousand held clients, and the gate that admits them.
//!
//! Clients, proxy (one worker) and server share this process. `cargo bench --bench pause -- gate` runs the gate alone.
#![expect(clippy::expect_used, reason = "a bench that cannot run shall stop")]

/// The clock of the fence.
#[path = "../src/sys/boot.rs"]
mod boot;
#[path = "../src/pause/fence.rs"]
#[allow(dead_code, unused_imports, reason = "the same")]
mod fence;
#[path = "../src/pause/gate.rs"]
#[allow(
    dead_code,
    unused_imports,
    reason = "this bench enters and leaves only, and runs none of the gate's tests"
)]
mod gate;
mod sys {
    pub(crate) use super::boot;
}

use std::{
    io::{self, Read, Write},
    net::{TcpListener, TcpStream},
    num::NonZeroUsize,
    sync::{Arc, Barrier},
    thread::{self, Builder},
    time::{Duration, Instant},
};

use criterion::{Criterion, SamplingMode, Throughput, criterion_group, criterion_main};
use gate::Gate;
use tcpause::{Address, Config, Server};

const CLIENTS: usize = 1000;
const MESSAGE_BYTES: usize = 64;
/// Threads that accept and answer connections, enough that no connection waits for long.
const SERVER_THREADS: usize = 2;

/// Time within which all clients must be held.
const PATIENCE: Duration = Duration::from_secs(20);
/// Interval between two checks of the number of held clients.
const GLANCE: Duration = Duration::from_millis(1);

const WARM_UP_TIME: Duration = Duration::from_millis(500);
const MEASUREMENT_TIME: Duration = Duration::from_secs(2);

/// Measures the time from the call of resume until the last client has its answer. Each client has sent its message before.
fn resume(criterion: &mut Criterion) {
    let proxy = proxy(serve());
    let Address::Tcp { port, .. } = *proxy.proxy_addr() else { unreachable!("it listens on TCP") };
    let mut group = criterion.benchmark_group("resume");
    group.sampling_mode(SamplingMode::Flat).sample_size(10);
    group.throughput(Throughput::Elements(CLIENTS as u64));
    group.bench_function(format!("{CLIENTS} held clients"), |bencher| {
        bencher.iter_custom(|rounds| {
            (0..rounds).map(|_round| resume_once(&proxy, port).expect("answers")).sum()
        });
    });
    group.finish();
    proxy.abort();
    proxy.join();
}

fn resume_once(proxy: &Server, port: u16) -> io::Result<Duration> {
    let handle = proxy.handle();
    handle.pause();
    let mut clients = Vec::with_capacity(CLIENTS);
    for _client in 0..CLIENTS {
        let mut client = TcpStream::connect(("127.0.0.1", port))?;
        client.write_all(&[7; MESSAGE_BYTES])?;
        clients.push(client);
    }
    let deadline = Instant::now() + PATIENCE;
    while handle.status().held < CLIENTS as u64 {
        assert!(Instant::now() < deadline, "in vain: waited until all are held");
        thread::sleep(GLANCE);
    }
    let begin = Instant::now();
    handle.resume();
    for client in &mut clients {
        client.read_exact(&mut [0; MESSAGE_BYTES])?;
    }
    let taken = begin.elapsed();
    drop(clients);
    assert!(handle.wait_idle(Some(PATIENCE)), "in vain: waited until all have left");
    Ok(taken)
}

/// Measures entering and leaving the gate by more and more threads at once: with another pass given, and without, so that a
/// leaving may be the last; and with a fence, whose deadline each entering compares with the clock.
fn gate(criterion: &mut Criterion) {
    let threads_max = thread::available_parallelism().map_or(2, NonZeroUsize::get).max(2);
    let hour = Duration::from_secs(3600);
    for (name, held, is_fenced) in
        [("gate/busy", 1, false), ("gate/idle", 0, false), ("gate/busy with a fence", 1, true)]
    {
        let gate = Arc::new(Gate::new());
        gate.fence_at(is_fenced.then(|| sys::boot::boot_time() + hour));
        let passes: Vec<_> = (0..held).map(|_pass| gate.enter()).collect();
        let mut group = criterion.benchmark_group(name);
        for threads in 1..=threads_max {
            group.throughput(Throughput::Elements(threads as u64));
            group.bench_function(format!("{threads} threads"), |bencher| {
                bencher.iter_custom(|rounds| enter_and_leave(&gate, threads, rounds));
            });
        }
        group.finish();
        drop(passes);
    }
}

/// Returns the time that the slowest thread takes for `rounds`.
fn enter_and_leave(gate: &Arc<Gate>, threads: usize, rounds: u64) -> Duration {
    let start = Barrier::new(threads);
    let work = || {
        start.wait();
        let begin = Instant::now();
        for _round in 0..rounds {
            drop(gate.enter().expect("an open gate"));
        }
        begin.elapsed()
    };
    thread::scope(|scope| {
        let threads: Vec<_> = (0..threads)
            .map(|_thread| Builder::new().spawn_scoped(scope, work).expect("a thread"))
            .collect();
        let times = threads.into_iter().map(|thread| thread.join().expect("no panic"));
        times.max().unwrap_or_default()
    })
}

/// Starts a server that answers one message on each connection and closes it, until the process ends.
fn serve() -> Address {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
    for _thread in 0..SERVER_THREADS {
        let listener = listener.try_clone().expect("a descriptor");
        let serve = move || {
            while let Ok((stream, _address)) = listener.accept() {
                // A failure shows at the client's side.
                answer(stream).ok();
            }
        };
        Builder::new().spawn(serve).expect("a thread");
    }
    let address = listener.local_addr().expect("an address");
    Address::tcp(address.ip().to_string(), address.port())
}

fn answer(mut stream: TcpStream) -> io::Result<()> {
    let mut message = [0; MESSAGE_BYTES];
    stream.read_exact(&mut message)?;
    stream.write_all(&message)
}

/// A proxy with one worker thread.
fn proxy(upstream: Address) -> Server {
    let mut config = Config::default();
    config.proxy.addr = Address::tcp("127.0.0.1", 0);
    config.proxy.threads = Some(NonZeroUsize::MIN);
    config.control.addr = Address::tcp("127.0.0.1", 0);
    config.upstream.addr = upstream;
    Server::start(config).expect("a proxy")
}

criterion_group! {
    name = benches;
    config = Criterion::default().warm_up_time(WARM_UP_TIME).measurement_time(MEASUREMENT_TIME).sample_size(20);
    targets = resume, gate
}
criterion_main!(benches);
