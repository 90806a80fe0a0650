//! The relay against a direct connection: bulk, round trips, short connections.
//!
//! Client, proxy (one worker) and server share this process and the loopback, so the figures compare the two ways and
//! say little about a network. `make bench` runs all; `cargo bench -- bulk` runs one group.
#![expect(clippy::expect_used, reason = "a bench that cannot run shall stop")]

use std::{
    io::{self, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    num::NonZeroUsize,
    os::unix::net::{UnixListener, UnixStream},
    path::Path,
    thread::Builder,
    time::Duration,
};

use criterion::{
    BenchmarkGroup, Criterion, SamplingMode, Throughput, criterion_group, criterion_main,
    measurement::WallTime,
};
use tcpause::{Address, Config, Server};

const BULK_BYTES: u64 = 64 * 1024 * 1024;
const CHUNK_BYTES: usize = 64 * 1024;
const MESSAGE_BYTES: usize = 64;

/// How many connections the echoing server serves at a time: more than one, as the last one may still be ending.
const ECHO_THREADS: usize = 4;

const WARM_UP_TIME: Duration = Duration::from_millis(500);
const MEASUREMENT_TIME: Duration = Duration::from_secs(2);

/// One way, a large transfer: from the first byte written to the word that the last was read.
fn bulk(criterion: &mut Criterion) {
    let sink = tcp_server(count_bytes);
    let server = proxy(&Address::tcp("127.0.0.1", 0), &address(sink));
    let mut group = criterion.benchmark_group("bulk");
    group
        .throughput(Throughput::Bytes(BULK_BYTES))
        .sample_size(10)
        .sampling_mode(SamplingMode::Flat);
    for (way, target) in [("direct", sink), ("relay", tcp(server.proxy_addr()))] {
        group.bench_function(format!("tcp/{way}"), |bencher| {
            bencher.iter(|| send_bulk(target).expect("a transfer"));
        });
    }
    group.finish();
    end(server);
}

/// There and back again, on a connection that stays.
fn round_trips(criterion: &mut Criterion) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = |name: &str| folder.path().join(name);
    let mut group = criterion.benchmark_group("round-trip");
    group.throughput(Throughput::Elements(1));

    let upstream = tcp_server(echo);
    let server = proxy(&Address::tcp("127.0.0.1", 0), &address(upstream));
    for (way, target) in [("direct", upstream), ("relay", tcp(server.proxy_addr()))] {
        round_trip(&mut group, &format!("tcp/{way}"), connect(target).expect("a connection"));
    }
    end(server);

    unix_server(&path("upstream"), echo);
    let server = proxy(&Address::Unix(path("proxy")), &Address::Unix(path("upstream")));
    for (way, name) in [("direct", "upstream"), ("relay", "proxy")] {
        let stream = UnixStream::connect(path(name)).expect("a connection");
        round_trip(&mut group, &format!("unix/{way}"), stream);
    }
    end(server);
    group.finish();
}

/// Connect, there and back again, close.
fn short_connections(criterion: &mut Criterion) {
    let upstream = tcp_server(echo);
    let server = proxy(&Address::tcp("127.0.0.1", 0), &address(upstream));
    let mut group = criterion.benchmark_group("short-connection");
    group.throughput(Throughput::Elements(1));
    for (way, target) in [("direct", upstream), ("relay", tcp(server.proxy_addr()))] {
        group.bench_function(format!("tcp/{way}"), |bencher| {
            bencher
                .iter(|| connect(target).and_then(|mut it| exchange(&mut it)).expect("an answer"));
        });
    }
    group.finish();
    end(server);
}

fn round_trip(group: &mut BenchmarkGroup<'_, WallTime>, name: &str, mut stream: impl Read + Write) {
    group.bench_function(name, |bencher| {
        bencher.iter(|| exchange(&mut stream).expect("an answer"));
    });
}

/// Sends a message and reads it back.
fn exchange(stream: &mut (impl Read + Write)) -> io::Result<()> {
    let mut answer = [0; MESSAGE_BYTES];
    stream.write_all(&[7; MESSAGE_BYTES])?;
    stream.read_exact(&mut answer)
}

/// Sends the whole amount, and waits until the other side has read it all.
fn send_bulk(address: SocketAddr) -> io::Result<()> {
    let mut stream = connect(address)?;
    let chunk = vec![7; CHUNK_BYTES];
    for _chunk in 0..BULK_BYTES / CHUNK_BYTES as u64 {
        stream.write_all(&chunk)?;
    }
    stream.shutdown(Shutdown::Write)?;
    let mut received = [0; 8];
    stream.read_exact(&mut received)?;
    assert_eq!(u64::from_le_bytes(received), BULK_BYTES);
    Ok(())
}

fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Reads to the end and answers how much there was.
fn count_bytes(mut stream: impl Read + Write) -> io::Result<()> {
    let mut chunk = vec![0; CHUNK_BYTES];
    let mut received = 0u64;
    loop {
        match stream.read(&mut chunk)? {
            0 => return stream.write_all(&received.to_le_bytes()),
            bytes => received += bytes as u64,
        }
    }
}

/// Sends back what it reads.
fn echo(mut stream: impl Read + Write) -> io::Result<()> {
    let mut message = [0; MESSAGE_BYTES];
    loop {
        match stream.read(&mut message)? {
            0 => return Ok(()),
            bytes => stream.write_all(message.get(..bytes).unwrap_or_default())?,
        }
    }
}

/// A server on a port of its own, until the process ends.
fn tcp_server(serve: fn(TcpStream) -> io::Result<()>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
    for _thread in 0..ECHO_THREADS {
        let listener = listener.try_clone().expect("a descriptor");
        serve_each(move || {
            let (stream, _address) = listener.accept()?;
            stream.set_nodelay(true)?;
            serve(stream)
        });
    }
    listener.local_addr().expect("an address")
}

fn unix_server(path: &Path, serve: fn(UnixStream) -> io::Result<()>) {
    let listener = UnixListener::bind(path).expect("a listener");
    for _thread in 0..ECHO_THREADS {
        let listener = listener.try_clone().expect("a descriptor");
        serve_each(move || serve(listener.accept()?.0));
    }
}

/// Serves one client after the other; a failure shows at the client's side.
fn serve_each(serve_next: impl Fn() -> io::Result<()> + Send + 'static) {
    let serve = move || {
        loop {
            serve_next().ok();
        }
    };
    Builder::new().spawn(serve).expect("a thread");
}

/// A proxy with one worker thread.
fn proxy(addr: &Address, upstream: &Address) -> Server {
    let mut config = Config::default();
    config.proxy.addr = addr.clone();
    config.proxy.threads = Some(NonZeroUsize::MIN);
    config.control.addr = Address::tcp("127.0.0.1", 0);
    config.upstream.addr = upstream.clone();
    Server::start(config).expect("a proxy")
}

fn end(server: Server) {
    server.abort();
    server.join();
}

/// The address of a proxy on TCP.
fn tcp(address: &Address) -> SocketAddr {
    let text = address.to_string();
    text.trim_start_matches("tcp://").parse().expect("an IP and a port")
}

fn address(address: SocketAddr) -> Address {
    Address::tcp(address.ip().to_string(), address.port())
}

criterion_group! {
    name = benches;
    config = Criterion::default().warm_up_time(WARM_UP_TIME).measurement_time(MEASUREMENT_TIME).sample_size(30);
    targets = bulk, round_trips, short_connections
}
criterion_main!(benches);
