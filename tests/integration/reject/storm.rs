//! A storm of TLS handshakes with clients to reject: everything else goes on.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    thread,
    time::{Duration, Instant},
};

use crate::harness::{
    Authority, Proxy, Response, Stream, TlsClient, Upstream, amount, echo, pattern, wait_until,
};

const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n";

/// TLS connections with clients to reject that there may be at a time.
const HANDSHAKES_MAX: usize = 512;

/// The time for which a client may wait for a handshake before it gets an alert.
const KNOCKING: Duration = Duration::from_secs(1);

/// Between two clients of one kind: with four kinds, some 500 a second.
const PACE: Duration = Duration::from_millis(8);

/// Clients of one kind that stay at a time: longer than the proxy keeps them, and few enough for this process.
const KEPT_MAX: usize = 500;

/// The longest that the operator may wait for an answer: a hundred times what it takes, as the machine may be busy with
/// other tests.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(5);

/// A record of TLS that holds the alert `close_notify`.
const GOODBYE: &[u8] = b"\x15\x03\x03\0\x02\x01\0";

/// The messages of the storm's clients, besides those that go the whole way.
#[derive(Debug, Clone, Copy)]
enum Kind {
    HalfHello,
    OneByteARecord,
    HelloAndGoodbye,
}

impl Kind {
    fn bytes(self, hello: &[u8]) -> Vec<u8> {
        match self {
            Self::HalfHello => hello[..hello.len() / 2].to_vec(),
            Self::OneByteARecord => {
                hello[5..].iter().flat_map(|&byte| [0x16, 3, 1, 0, 1, byte]).collect()
            }
            Self::HelloAndGoodbye => [hello, GOODBYE].concat(),
        }
    }
}

/// A proxy of one worker with a certificate, running.
fn start(authority: &Authority, upstream: &Upstream) -> Proxy {
    let builder = Proxy::builder().upstream(upstream).log_level(Some("info")).args([
        "--proxy-reject-clients",
        "--proxy-threads",
        "1",
    ]);
    let files = authority.write_files(builder.path("").as_path());
    builder.args(files.options()).start()
}

/// Has `work` done again and again while `goes_on`, and returns the longest time it took.
fn longest(goes_on: &AtomicBool, mut work: impl FnMut()) -> Duration {
    let mut longest = Duration::ZERO;
    while goes_on.load(SeqCst) {
        let begin = Instant::now();
        work();
        longest = longest.max(begin.elapsed());
    }
    longest
}

#[test]
fn a_storm_of_handshakes_is_felt_by_nobody_else() {
    let seconds = amount(2, 30) as u64;
    let authority = Authority::new("ours");
    let upstream = Upstream::tcp(echo);
    let proxy = start(&authority, &upstream);
    let sockets = proxy.descriptors_of("socket:");

    let mut carried = proxy.connect();
    carried.assert_echo(b"before the pause");
    proxy.control().pause();
    let (hello, message) = (TlsClient::new(&authority).hello(), pattern(1, 64));
    let (storms, is_paused) = (AtomicBool::new(true), AtomicBool::new(true));
    let (clients, outcomes) = (AtomicU64::new(0), std::sync::Mutex::new(BTreeMap::new()));

    let send = |kind: Kind| {
        let bytes = kind.bytes(&hello);
        let mut kept = Vec::new();
        while storms.load(SeqCst) {
            let mut client = proxy.connect();
            client.send(&bytes);
            clients.fetch_add(1, SeqCst);
            kept.push(client);
            if kept.len() == KEPT_MAX {
                kept.clear();
            }
            thread::sleep(PACE);
        }
    };
    let go_the_whole_way = || {
        while is_paused.load(SeqCst) {
            let answer = TlsClient::new(&authority).exchange(proxy.connect(), REQUEST);
            let outcome = match answer {
                Ok(answer) => Response::parse(&answer).status.to_string(),
                Err(error) => error.to_string(),
            };
            *outcomes.lock().unwrap().entry(outcome).or_insert(0) += 1;
            clients.fetch_add(1, SeqCst);
            thread::sleep(PACE);
        }
    };
    thread::scope(|scope| {
        for kind in [Kind::HalfHello, Kind::OneByteARecord, Kind::HelloAndGoodbye] {
            let send = &send;
            scope.spawn(move || send(kind));
        }
        let whole_way = scope.spawn(go_the_whole_way);
        let asks = scope.spawn(|| longest(&is_paused, || assert!(proxy.control().is_paused())));
        let plays = scope.spawn(|| longest(&storms, || carried.assert_echo(&message)));
        thread::sleep(Duration::from_secs(seconds));
        is_paused.store(false, SeqCst);
        let answered = asks.join().unwrap();
        whole_way.join().unwrap();

        let begin = Instant::now();
        proxy.control().resume();
        proxy.connect().assert_echo(b"served, though the storm goes on");
        let resumed = begin.elapsed();
        storms.store(false, SeqCst);
        let played = plays.join().unwrap();
        println!(
            "{} handshakes in {seconds} s: the operator waits {answered:?} at most, a carried \
             connection {played:?}, a resume {resumed:?}; whole handshakes end with {:?}",
            clients.load(SeqCst),
            outcomes.lock().unwrap()
        );
        assert!(answered < ANSWER_TIME_MAX, "{answered:?}");
    });
    assert_eq!(outcomes.lock().unwrap().keys().collect::<Vec<_>>(), ["503"]);

    drop(carried);
    proxy.control().wait_counts(
        |status| (status.rejecting, status.active, status.connecting, status.held),
        (0, 0, 0, 0),
    );
    wait_until("no socket is left", || proxy.descriptors_of("socket:") == sockets);
}

#[test]
fn handshakes_beyond_the_cap_wait_and_then_get_an_alert() {
    let authority = Authority::new("ours");
    let upstream = Upstream::tcp(echo);
    let proxy = start(&authority, &upstream);
    proxy.control().pause();
    let exchange = || TlsClient::new(&authority).exchange(proxy.connect(), REQUEST);
    let hello = TlsClient::new(&authority).hello();
    let fill = || -> Vec<Stream> {
        let half = Kind::HalfHello.bytes(&hello);
        let clients: Vec<_> = (0..HANDSHAKES_MAX)
            .map(|_| {
                let mut client = proxy.connect();
                client.send(&half);
                client
            })
            .collect();
        proxy.control().wait_counts(|status| status.rejecting, HANDSHAKES_MAX as u64);
        clients
    };

    let clients = fill();
    let error = exchange().expect_err("no handshake is free");
    assert!(error.to_string().contains("HandshakeFailure"), "{error}");
    drop(clients);
    proxy.control().wait_counts(|status| status.rejecting, 0);

    // Who still knocks when handshakes become free is welcome; a try on a machine too busy for that does not count.
    for _ in 0..10 {
        let (clients, begin) = (fill(), Instant::now());
        let answer = thread::scope(|scope| {
            let knocks = scope.spawn(exchange);
            proxy
                .control()
                .wait_status("it knocks", |status| status.rejecting > HANDSHAKES_MAX as u64);
            drop(clients);
            knocks.join().unwrap()
        });
        if begin.elapsed() < KNOCKING {
            assert_eq!(Response::parse(&answer.unwrap()).status, 503);
            return;
        }
    }
    panic!("the machine is too busy for this test");
}
