//! The relay against a direct connection: bulk by size, round trips, short connections.
//!
//! Client, proxy (one worker) and server share this process and the loopback, so the figures compare kinds of addresses and
//! say little about a network. `make bench` runs all; `cargo bench --bench relay -- bulk-up/64M` runs one group.
#![expect(clippy::expect_used, reason = "a bench that cannot run shall stop")]

#[path = "../tests/common/stream.rs"]
mod stream;

use std::{
    io::{self, Read, Write},
    net::{TcpListener, TcpStream},
    num::NonZeroUsize,
    os::unix::net::{UnixListener, UnixStream},
    path::Path,
    thread::Builder,
    time::Duration,
};

use criterion::{Criterion, SamplingMode, Throughput, criterion_group, criterion_main};
use stream::Stream;
use tcpause::{Address, Config, Server};
use tempfile::TempDir;

/// Measurement of requests and answers of these lengths.
struct Case {
    group: &'static str,
    request_bytes: usize,
    answer_bytes: usize,
    /// True if each request has a connection of its own.
    connects: bool,
}

const CASES: [Case; 11] = [
    stays("bulk-up/64K", 64 * KIB, HEAD_BYTES),
    stays("bulk-up/1M", MIB, HEAD_BYTES),
    stays("bulk-up/64M", 64 * MIB, HEAD_BYTES),
    stays("bulk-down/64K", HEAD_BYTES, 64 * KIB),
    stays("bulk-down/1M", HEAD_BYTES, MIB),
    stays("bulk-down/64M", HEAD_BYTES, 64 * MIB),
    stays("round-trip/64", 64, 64),
    stays("round-trip/1K", KIB, KIB),
    stays("round-trip/16K", 16 * KIB, 16 * KIB),
    stays("round-trip/64K", 64 * KIB, 64 * KIB),
    Case { connects: true, ..stays("short-connection/64", 64, 64) },
];

const KIB: usize = 1024;
const MIB: usize = 1024 * KIB;

/// Length of a request's head, which has the length of the request and that of the answer.
const HEAD_BYTES: usize = 16;
/// Most bytes that are written or read at once.
const CHUNK_BYTES: usize = 64 * KIB;
/// Connections that a server serves at a time. One is not enough, as the previous connection may still be ending.
const SERVER_THREADS: usize = 4;

/// Longest time of a read or a write, so that a stalled proxy does not stall the bench.
const TIMEOUT: Duration = Duration::from_secs(60);

const WARM_UP_TIME: Duration = Duration::from_millis(300);
const MEASUREMENT_TIME: Duration = Duration::from_secs(1);

/// Returns a case whose requests share a connection.
const fn stays(group: &'static str, request_bytes: usize, answer_bytes: usize) -> Case {
    Case { group, request_bytes, answer_bytes, connects: false }
}

/// Measures every case on every way between client and server.
fn relay(criterion: &mut Criterion) {
    let ways = Ways::start();
    for case in CASES {
        let mut group = criterion.benchmark_group(case.group);
        group.sampling_mode(SamplingMode::Flat).throughput(
            if case.request_bytes == case.answer_bytes {
                Throughput::Elements(1)
            } else {
                Throughput::Bytes(case.request_bytes.max(case.answer_bytes) as u64)
            },
        );
        for (name, address) in &ways.addresses {
            group.bench_function(name, |bencher| {
                let mut client = Client::new(address, &case);
                bencher.iter(|| client.ask().expect("an answer"));
            });
        }
        group.finish();
    }
    ways.end();
}

/// Addresses of the servers themselves, and of proxies in front of them, with and without pipes.
struct Ways {
    addresses: Vec<(String, Address)>,
    proxies: Vec<Server>,
    /// The place of the socket files.
    _folder: TempDir,
}

impl Ways {
    fn start() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let unix = |name: &str| Address::Unix(folder.path().join(name));
        let tcp_server = serve_tcp();
        let unix_server = unix("server");
        serve_unix(&folder.path().join("server"));

        let port = || Address::tcp("127.0.0.1", 0);
        let mut ways = vec![
            ("direct/tcp".to_owned(), tcp_server.clone()),
            ("direct/unix".to_owned(), unix_server.clone()),
        ];
        let mut proxies = Vec::new();
        for (suffix, pipes) in [("pipes", None), ("copy", Some(0))] {
            for (route, addr, upstream) in [
                ("tcp-tcp", port(), &tcp_server),
                ("tcp-unix", port(), &unix_server),
                ("unix-unix", unix(suffix), &unix_server),
            ] {
                let proxy = proxy(addr, upstream.clone(), pipes);
                ways.push((format!("{route}/{suffix}"), proxy.proxy_addr().clone()));
                proxies.push(proxy);
            }
        }
        Self { addresses: ways, proxies, _folder: folder }
    }

    fn end(self) {
        for proxy in self.proxies {
            proxy.abort();
            proxy.join();
        }
    }
}

/// A proxy with one worker thread.
fn proxy(addr: Address, upstream: Address, pipes: Option<usize>) -> Server {
    let mut config = Config::default();
    config.proxy.addr = addr;
    config.proxy.threads = Some(NonZeroUsize::MIN);
    config.proxy.pipes = pipes;
    config.control.addr = Address::tcp("127.0.0.1", 0);
    config.upstream.addr = upstream;
    Server::start(config).expect("a proxy")
}

/// A client that sends requests.
struct Client<'a> {
    address: &'a Address,
    case: &'a Case,
    stream: Option<Stream>,
    request: Vec<u8>,
    answer: Vec<u8>,
}

impl<'a> Client<'a> {
    fn new(address: &'a Address, case: &'a Case) -> Self {
        let mut request = vec![7; case.request_bytes];
        let head = [case.request_bytes, case.answer_bytes].map(usize::to_le_bytes);
        request.splice(..HEAD_BYTES, head.into_iter().flatten());
        let answer = vec![0; case.answer_bytes.min(CHUNK_BYTES)];
        Self { address, case, stream: None, request, answer }
    }

    /// Sends one request and reads the whole answer.
    fn ask(&mut self) -> io::Result<()> {
        let mut stream = match self.stream.take() {
            Some(stream) => stream,
            None => connect(self.address)?,
        };
        for chunk in self.request.chunks(CHUNK_BYTES) {
            stream.write_all(chunk)?;
        }
        let mut left = self.case.answer_bytes;
        while left > 0 {
            match stream.read(&mut self.answer)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                bytes => left -= bytes,
            }
        }
        self.stream = (!self.case.connects).then_some(stream);
        Ok(())
    }
}

fn connect(address: &Address) -> io::Result<Stream> {
    match address {
        Address::Unix(path) => Stream::unix(UnixStream::connect(path)?, TIMEOUT),
        Address::Abstract(_) => Err(io::ErrorKind::Unsupported.into()),
        Address::Tcp { host, port } => {
            Stream::tcp(TcpStream::connect((host.as_str(), *port))?, TIMEOUT)
        }
    }
}

/// A server on a port of its own, until the process ends.
fn serve_tcp() -> Address {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
    for _thread in 0..SERVER_THREADS {
        let listener = listener.try_clone().expect("a descriptor");
        serve_each(move || {
            let (stream, _address) = listener.accept()?;
            answer_all(Stream::tcp(stream, TIMEOUT)?)
        });
    }
    let address = listener.local_addr().expect("an address");
    Address::tcp(address.ip().to_string(), address.port())
}

fn serve_unix(path: &Path) {
    let listener = UnixListener::bind(path).expect("a listener");
    for _thread in 0..SERVER_THREADS {
        let listener = listener.try_clone().expect("a descriptor");
        serve_each(move || answer_all(Stream::unix(listener.accept()?.0, TIMEOUT)?));
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

/// Answers one request after the other, each once it has come whole.
fn answer_all(mut stream: Stream) -> io::Result<()> {
    let mut chunk = vec![0; CHUNK_BYTES];
    loop {
        let mut received = 0;
        while received < HEAD_BYTES {
            match stream.read(chunk.get_mut(received..).unwrap_or_default())? {
                0 => return Ok(()),
                bytes => received += bytes,
            }
        }
        let [request_bytes, mut left] = head(&chunk);
        while received < request_bytes {
            match stream.read(&mut chunk)? {
                0 => return Ok(()),
                bytes => received += bytes,
            }
        }
        while left > 0 {
            let piece = left.min(CHUNK_BYTES);
            stream.write_all(chunk.get(..piece).unwrap_or_default())?;
            left -= piece;
        }
    }
}

/// The lengths of a request and of its answer.
fn head(chunk: &[u8]) -> [usize; 2] {
    let (words, _rest) = chunk.as_chunks();
    [0, 1].map(|word| words.get(word).copied().map_or(0, usize::from_le_bytes))
}

criterion_group! {
    name = benches;
    config = Criterion::default().warm_up_time(WARM_UP_TIME).measurement_time(MEASUREMENT_TIME).sample_size(10);
    targets = relay
}
criterion_main!(benches);
