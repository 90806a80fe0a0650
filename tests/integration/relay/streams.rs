//! Streams end as they would without a proxy: each way of ending, on each pair of addresses, many times at once.
//!
//! Every scenario also runs directly, which shows that the table below is right. UNIX sockets know no reset of their own: a
//! close with bytes unread is one, and what a proxy passes on as a reset arrives there as a close.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    io::{self, ErrorKind, Read, Write},
    ops::Range,
    sync::{
        Arc, Condvar, LazyLock, Mutex,
        mpsc::{self, Receiver},
    },
    time::{Duration, Instant},
};

use rustix::net::sockopt;

use crate::harness::{
    Addr, End, Family, PATIENCE, Proxy, Received, Stream, Upstream, pattern, spawn,
};

/// Runs of each scenario on each route.
const TIMES: usize = 100;

/// On how many connections at once: what blocked writers have written takes the kernel's memory.
const AT_ONCE: usize = 25;

/// The length of the first message of a client: the scenario, and the number of the connection.
const HEAD_BYTES: usize = 9;

/// A writer that could write nothing for so long is blocked.
const BLOCKED: Duration = Duration::from_millis(50);

/// The bytes that the kernel takes in for a client that reads little.
const RECEIVE_BUFFER: usize = 64 << 10;

/// The bytes that are written to a client that does not read: more than the proxy's kernel takes for it, so that the proxy
/// is blocked.
const FLOOD_BYTES: usize = 6 << 20;

/// At how many places of the text a stream may begin.
const STARTS: usize = 1 << 16;

/// The sights of one end.
type Seen = (Bytes, Ending);

/// The fate of the bytes that the other end had sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Bytes {
    /// All of them and no others.
    Whole,
    /// The first of them, or all.
    Short,
    /// Others.
    Wrong,
}

/// The end of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Ending {
    Eof,
    Reset,
    Timeout,
    /// Reading had not ended: writing was refused.
    Refused,
    /// This end was the first to go.
    Left,
    Other,
}

use Bytes::{Short, Whole};
use Ending::{Eof, Left, Refused, Reset};

/// The behaviour of both ends of a connection, and the sights that they must have.
struct Scenario {
    name: &'static str,
    client: fn(&Case, Stream) -> Seen,
    upstream: fn(&Case, Stream) -> Seen,
    expected: fn(Route) -> (Seen, Seen),
}

/// One connection.
struct Case {
    route: Route,
    number: u64,
    signals: Arc<Signals>,
}

/// The way from a client to the upstream.
#[derive(Debug, Clone, Copy)]
struct Route {
    client: Family,
    upstream: Family,
    proxied: bool,
}

impl Route {
    /// Returns the end that this kind of address shows when the other side was aborted.
    fn abort_at(self, end: Family) -> Ending {
        if end.is_tcp() || !self.proxied { Reset } else { Eof }
    }

    fn abort_at_client(self) -> Ending {
        self.abort_at(self.client)
    }

    fn abort_at_upstream(self) -> Ending {
        self.abort_at(self.upstream)
    }
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let way = if self.proxied { "to" } else { "directly to" };
        write!(f, "{:?} {way} {:?}", self.client, self.upstream)
    }
}

const SCENARIOS: [Scenario; 9] = [
    Scenario {
        name: "the client half-closes, and its answer comes after that",
        client: |case, mut stream| {
            stream.send(case.request(10_000));
            stream.finish();
            case.compare(stream.receive_all(), Part::Answer, 100_000)
        },
        upstream: |case, mut stream| {
            let seen = case.compare(stream.receive_all(), Part::Request, 10_000);
            stream.send(case.answer(100_000));
            seen
        },
        expected: |_route| ((Whole, Eof), (Whole, Eof)),
    },
    Scenario {
        name: "the upstream half-closes while the upload goes on",
        client: |case, mut stream| {
            let request = case.request(300_000);
            stream.send(&request[..100_000]);
            let seen = case.compare(stream.receive_all(), Part::Answer, 0);
            stream.send(&request[100_000..]);
            stream.finish();
            seen
        },
        upstream: |case, mut stream| {
            stream.finish();
            case.compare(stream.receive_all(), Part::Request, 300_000)
        },
        expected: |_route| ((Whole, Eof), (Whole, Eof)),
    },
    Scenario {
        name: "the client resets in the middle of its upload",
        client: |case, mut stream| {
            stream.send(case.request(40_000));
            // The second byte stays unread.
            stream.receive(1);
            stream.reset();
            (Whole, Left)
        },
        upstream: |case, mut stream| {
            let mut received = stream.receive(20_000);
            stream.send(b"!!");
            let rest = stream.receive_all();
            received.extend(rest.bytes);
            case.compare(Received { bytes: received, end: rest.end }, Part::Request, 40_000)
        },
        expected: |route| ((Whole, Left), (Whole, route.abort_at_upstream())),
    },
    Scenario {
        name: "the upstream resets in the middle of a download",
        client: |case, mut stream| {
            let mut received = stream.receive(20_000);
            stream.send(b"!!");
            let rest = stream.receive_all();
            received.extend(rest.bytes);
            case.compare(Received { bytes: received, end: rest.end }, Part::Answer, 40_000)
        },
        upstream: |case, mut stream| {
            stream.send(case.answer(40_000));
            stream.receive(1);
            stream.reset();
            (Whole, Left)
        },
        expected: |route| ((Whole, route.abort_at_client()), (Whole, Left)),
    },
    Scenario {
        name: "the upstream answers and closes with the request unread",
        client: |case, mut stream| {
            stream.send(case.request(20_000));
            case.compare(stream.receive_all(), Part::Answer, 50_000)
        },
        upstream: |case, mut stream| {
            // Its first byte is there, so the rest of the same segment is.
            stream.receive(1);
            stream.send(case.answer(50_000));
            (Whole, Left)
        },
        expected: |route| ((Whole, route.abort_at_client()), (Whole, Left)),
    },
    Scenario {
        name: "the client reads slowly",
        client: |case, mut stream| {
            shrink(&stream);
            stream.finish();
            let mut pieces = Vec::new();
            let mut buffer = [0; 4096];
            let mut end = End::Eof;
            loop {
                match stream.read(&mut buffer) {
                    Ok(0) => break,
                    Ok(bytes) => pieces.extend_from_slice(&buffer[..bytes]),
                    Err(error) => {
                        end = error.into();
                        break;
                    }
                }
                std::thread::yield_now();
            }
            case.compare(Received { bytes: pieces, end }, Part::Answer, 500_000)
        },
        upstream: |case, mut stream| {
            stream.send(case.answer(500_000));
            case.compare(stream.receive_all(), Part::Request, 0)
        },
        expected: |_route| ((Whole, Eof), (Whole, Eof)),
    },
    Scenario {
        name: "the client stops reading, and the upstream closes",
        client: |case, mut stream| {
            shrink(&stream);
            let flood = case.signals.wait(case.number);
            let seen = case.compare(stream.receive_all(), Part::Answer, flood);
            stream.finish();
            seen
        },
        upstream: |case, mut stream| {
            let flood = case.flood(&mut stream);
            stream.finish();
            case.signals.raise(case.number, flood);
            case.compare(stream.receive_all(), Part::Request, 0)
        },
        expected: |_route| ((Whole, Eof), (Whole, Eof)),
    },
    Scenario {
        name: "the client stops reading, and the upstream resets",
        client: |case, mut stream| {
            shrink(&stream);
            // It stays unread, so that a UNIX socket resets too.
            stream.send(b"!");
            let flood = case.signals.wait(case.number);
            let (bytes, ending) = case.compare(stream.receive_all(), Part::Answer, flood);
            // A UNIX socket keeps what was written; on TCP, a reset discards what was not sent yet.
            (if case.route.upstream.is_tcp() { bytes.max(Short) } else { bytes }, ending)
        },
        upstream: |case, mut stream| {
            let flood = case.flood(&mut stream);
            stream.reset();
            case.signals.raise(case.number, flood);
            (Whole, Left)
        },
        expected: |route| {
            let bytes = if route.upstream.is_tcp() { Short } else { Whole };
            ((bytes, route.abort_at_client()), (Whole, Left))
        },
    },
    Scenario {
        name: "the client stops reading, and resets",
        client: |case, stream| {
            shrink(&stream);
            case.signals.wait(case.number);
            stream.reset();
            (Whole, Left)
        },
        upstream: |case, mut stream| {
            let flood = case.flood(&mut stream);
            case.signals.raise(case.number, flood);
            loop {
                if let Err(error) = stream.write_all(case.answer(FLOOD_BYTES)) {
                    return (Whole, refusal(&error));
                }
            }
        },
        expected: |_route| ((Whole, Left), (Whole, Refused)),
    },
];

fn refusal(error: &io::Error) -> Ending {
    match error.kind() {
        ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => Refused,
        ErrorKind::WouldBlock => Ending::Timeout,
        _ => Ending::Other,
    }
}

/// The stream that bytes belong to.
#[derive(Clone, Copy)]
enum Part {
    Request,
    Answer,
}

impl Case {
    /// A piece of one endless text, another for each stream.
    fn bytes(&self, part: Part, length: usize) -> &'static [u8] {
        static TEXT: LazyLock<Vec<u8>> = LazyLock::new(|| pattern(1, FLOOD_BYTES + STARTS));
        let start = usize::try_from(2 * self.number + part as u64).unwrap() % STARTS;
        &TEXT[start..start + length]
    }

    fn request(&self, length: usize) -> &'static [u8] {
        self.bytes(Part::Request, length)
    }

    fn answer(&self, length: usize) -> &'static [u8] {
        self.bytes(Part::Answer, length)
    }

    #[expect(clippy::needless_pass_by_value, reason = "callers read it on the spot")]
    fn compare(&self, received: Received, part: Part, length: usize) -> Seen {
        let wanted = self.bytes(part, length);
        let bytes = match received.bytes.len() {
            got if got == length && received.bytes == wanted => Whole,
            got if got < length && received.bytes == wanted[..got] => Short,
            _ => Bytes::Wrong,
        };
        let ending = match received.end {
            End::Eof => Eof,
            End::Reset => Reset,
            End::Failed(ErrorKind::WouldBlock) => Ending::Timeout,
            End::Failed(_) => Ending::Other,
        };
        (bytes, ending)
    }

    /// Writes much to a client that does not read, as long as something gets through; returns how much did.
    fn flood(&self, stream: &mut Stream) -> usize {
        stream.write_timeout(BLOCKED);
        let mut written = 0;
        while written < FLOOD_BYTES {
            match stream.write(&self.answer(FLOOD_BYTES)[written..]) {
                Ok(bytes) => written += bytes,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => panic!("after {written} bytes: {error}"),
            }
        }
        stream.write_timeout(PATIENCE);
        written
    }
}

/// The signals between both ends of a connection, past the connection.
#[derive(Default)]
struct Signals {
    raised: Mutex<HashMap<u64, usize>>,
    changed: Condvar,
}

impl Signals {
    fn raise(&self, number: u64, value: usize) {
        self.raised.lock().unwrap().insert(number, value);
        self.changed.notify_all();
    }

    fn wait(&self, number: u64) -> usize {
        let is_missing = |raised: &mut HashMap<_, _>| !raised.contains_key(&number);
        let raised = self.raised.lock().unwrap();
        let (raised, _) = self.changed.wait_timeout_while(raised, PATIENCE, is_missing).unwrap();
        *raised.get(&number).expect("a signal from the other end")
    }
}

#[test]
fn direct_tcp() {
    run(Route { client: Family::Tcp4, upstream: Family::Tcp4, proxied: false });
}

#[test]
fn direct_unix() {
    run(Route { client: Family::Unix, upstream: Family::Unix, proxied: false });
}

#[test]
fn tcp_to_tcp() {
    run(Route { client: Family::Tcp4, upstream: Family::Tcp4, proxied: true });
}

#[test]
fn tcp_to_unix() {
    run(Route { client: Family::Tcp4, upstream: Family::Unix, proxied: true });
}

#[test]
fn unix_to_tcp() {
    run(Route { client: Family::Unix, upstream: Family::Tcp4, proxied: true });
}

#[test]
fn unix_to_unix() {
    run(Route { client: Family::Unix, upstream: Family::Unix, proxied: true });
}

/// An upstream for all scenarios, and what its ends of the connections have seen.
struct Stage {
    route: Route,
    upstream: Upstream,
    verdicts: Receiver<(u64, Seen)>,
    signals: Arc<Signals>,
}

impl Stage {
    fn new(route: Route) -> Self {
        let signals = Arc::new(Signals::default());
        let (sender, verdicts) = mpsc::channel();
        let shared = signals.clone();
        let upstream = Upstream::start(route.upstream, move |mut stream| {
            let head = stream.receive(HEAD_BYTES);
            let number = u64::from_le_bytes(head[1..].try_into().unwrap());
            let case = Case { route, number, signals: shared.clone() };
            let seen = (SCENARIOS[usize::from(head[0])].upstream)(&case, stream);
            // The test may have failed already.
            sender.send((number, seen)).ok();
            Received { bytes: Vec::new(), end: End::Eof }
        });
        Self { route, upstream, verdicts, signals }
    }

    /// Plays a scenario on connections with these numbers, all at once; returns what both ends of each have seen.
    fn play(&self, addr: &Addr, index: usize, numbers: Range<u64>) -> Vec<(Seen, Seen)> {
        let client = |number: u64| {
            let (addr, signals, route) = (addr.clone(), self.signals.clone(), self.route);
            spawn(move || {
                let mut stream = addr.connect();
                let mut head = vec![u8::try_from(index).unwrap()];
                head.extend(number.to_le_bytes());
                stream.send(&head);
                (SCENARIOS[index].client)(&Case { route, number, signals }, stream)
            })
        };
        let clients: Vec<_> = numbers.map(|number| (number, client(number))).collect();
        let end = |_client: &_| self.verdicts.recv_timeout(2 * PATIENCE).expect("one more end");
        let mut upstreams: HashMap<u64, Seen> = clients.iter().map(end).collect();
        let seen = clients.into_iter().map(|(number, client)| {
            (client.join().unwrap(), upstreams.remove(&number).expect("each number once"))
        });
        seen.collect()
    }
}

/// Runs every scenario on a route, with pipes and without.
fn run(route: Route) {
    let stage = Stage::new(route);
    let proxy = |pipes| {
        let builder = Proxy::builder().listen(route.client).upstream(&stage.upstream);
        builder.args(["--proxy-pipes", pipes, "--proxy-threads", "2"]).start()
    };
    let proxies = if route.proxied { vec![proxy("16"), proxy("0")] } else { Vec::new() };
    let direct = (!route.proxied).then(|| stage.upstream.addr());
    let mut number = 0;
    for addr in proxies.iter().map(Proxy::addr).chain(direct) {
        for (index, scenario) in SCENARIOS.iter().enumerate() {
            let begin = Instant::now();
            let mut outcomes = BTreeMap::new();
            for played in (0..TIMES).step_by(AT_ONCE) {
                let next = number + AT_ONCE.min(TIMES - played) as u64;
                for seen in stage.play(addr, index, number..next) {
                    *outcomes.entry(seen).or_insert(0) += 1;
                }
                number = next;
            }
            println!("{route}, {}: {outcomes:?} in {:?}", scenario.name, begin.elapsed());
            let expected = (scenario.expected)(route);
            assert_eq!(outcomes, BTreeMap::from([(expected, TIMES)]), "{}", scenario.name);
        }
    }
    for proxy in &proxies {
        proxy.control().wait_counts(|status| (status.active, status.failed), (0, 0));
    }
}

/// Has a client take in little at a time.
fn shrink(stream: &Stream) {
    sockopt::set_socket_recv_buffer_size(stream, RECEIVE_BUFFER).unwrap();
}
