//! Rejecting plain clients while paused.

use std::{
    collections::BTreeMap,
    fmt,
    io::{self, ErrorKind, Read, Write},
    thread,
    time::{Duration, Instant},
};

use crate::harness::{
    Builder, End, Family, Proxy, Response, Stream, Upstream, amount, echo, pattern,
};

/// The time for which a client may be silent before it gets its answer.
const SILENCE: Duration = Duration::from_secs(1);

/// The time for which a client may wait at least, for its handshake or its answer, before the proxy gives it up.
const ALLOWED: Duration = Duration::from_secs(1);

fn rejecting(upstream: &Upstream) -> Builder {
    Proxy::builder().upstream(upstream).arg("--proxy-reject-clients")
}

/// Sends the whole request and only then reads: fails if anything cannot be sent, or if the end is not clean.
fn strict_client(mut stream: Stream, request: &[u8]) -> Vec<u8> {
    stream.send(request);
    let received = stream.receive_all();
    assert_eq!(received.end, End::Eof, "after {:?}", String::from_utf8_lossy(&received.bytes));
    received.bytes
}

/// The head of a rejection, line by line; the order of the headers is free.
#[track_caller]
fn assert_rejection(answer: &[u8], retry_after: Option<u32>) {
    let text = std::str::from_utf8(answer).unwrap();
    let head =
        text.strip_suffix("\r\n\r\n").unwrap_or_else(|| panic!("not exactly one head: {text:?}"));
    let mut lines: Vec<&str> = head.split("\r\n").collect();
    assert_eq!(lines.remove(0), "HTTP/1.1 503 Service Unavailable");
    lines.sort_unstable();
    let retry_after = retry_after.map(|seconds| format!("Retry-After: {seconds}"));
    let mut wanted = vec!["Connection: close", "Content-Length: 0"];
    wanted.extend(retry_after.as_deref());
    assert_eq!(lines, wanted);
}

/// The outcome of a strict client: one that fails on any error, sends all, and only then reads, to the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Outcome {
    /// Everything was sent, and the whole answer came with an orderly end behind it.
    Clean,
    Refused,
    Reset,
    Timeout,
    /// The end came before any answer, or out of order.
    Eof,
    /// A part of the answer came.
    Short,
    WrongBytes,
    /// Anything else: a TLS alert is [`ErrorKind::InvalidData`].
    Failed(ErrorKind),
    /// Any of these, of a client that was slower than the proxy allows, as the machine is busy.
    Late,
}

impl Outcome {
    pub(crate) fn of(
        stream: io::Result<impl Read + Write>,
        request: &[u8],
        expected: &[u8],
    ) -> Self {
        let mut answer = Vec::new();
        let end = stream.and_then(|mut stream| {
            stream.write_all(request)?;
            stream.flush()?;
            stream.read_to_end(&mut answer)
        });
        match end.map_err(|error| error.kind()) {
            Ok(_) if answer == expected => Self::Clean,
            Ok(0) | Err(ErrorKind::UnexpectedEof) => Self::Eof,
            Ok(_) if expected.starts_with(&answer) => Self::Short,
            Ok(_) => Self::WrongBytes,
            Err(ErrorKind::ConnectionRefused) => Self::Refused,
            Err(ErrorKind::WouldBlock | ErrorKind::TimedOut) => Self::Timeout,
            Err(ErrorKind::ConnectionReset | ErrorKind::BrokenPipe) => Self::Reset,
            Err(kind) => Self::Failed(kind),
        }
    }
}

/// The number of clients with each outcome.
#[derive(Debug, Default)]
pub(crate) struct Tally(BTreeMap<Outcome, usize>);

impl Tally {
    /// Sends bodies of each size from so many clients at the same time; `make soak` repeats it.
    pub(crate) fn of_batches(clients: usize, client: impl Fn(usize) -> Outcome + Sync) -> Self {
        let rounds = amount(1, 20);
        let mut tally = Self::default();
        for length in [0, 20_000, 1_000_000].repeat(rounds) {
            for outcome in batch(clients, || client(length)) {
                *tally.0.entry(outcome).or_default() += 1;
            }
        }
        tally
    }

    #[track_caller]
    pub(crate) fn assert_all_clean(&self) {
        let is_fine = |&outcome: &Outcome| matches!(outcome, Outcome::Clean | Outcome::Late);
        assert!(self.0.keys().all(is_fine), "{self}");
        let late = self.0.get(&Outcome::Late).copied().unwrap_or_default();
        assert!(late <= self.0.values().sum::<usize>() / 4, "too busy a machine: {self}");
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let clean = self.0.get(&Outcome::Clean).copied().unwrap_or_default();
        write!(f, "{clean} of {} clean", self.0.values().sum::<usize>())?;
        let mut others = self.0.iter().filter(|&(&outcome, _)| outcome != Outcome::Clean);
        others.try_for_each(|(outcome, count)| write!(f, ", {count} {outcome:?}"))
    }
}

/// Returns the outcomes of clients that come at the same time.
fn batch(clients: usize, client: impl Fn() -> Outcome + Sync) -> Vec<Outcome> {
    let timed = || {
        let begin = Instant::now();
        match client() {
            Outcome::Clean => Outcome::Clean,
            _ if begin.elapsed() >= ALLOWED => Outcome::Late,
            other => other,
        }
    };
    thread::scope(|scope| {
        let clients: Vec<_> = (0..clients).map(|_| scope.spawn(timed)).collect();
        clients.into_iter().map(|client| client.join().unwrap()).collect()
    })
}

/// A request with a body.
pub(crate) fn post(length: usize) -> Vec<u8> {
    let mut request =
        format!("POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n")
            .into_bytes();
    request.extend(pattern(1, length));
    request
}

#[test]
fn a_plain_client_gets_a_503() {
    for family in [Family::Tcp4, Family::Unix] {
        let upstream = Upstream::tcp(echo);
        let proxy = rejecting(&upstream).listen(family).start();
        proxy.connect().assert_echo(b"not paused yet");
        proxy.control().pause();
        assert_rejection(
            &strict_client(proxy.connect(), b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"),
            Some(3),
        );
        proxy
            .control()
            .wait_counts(|status| (status.rejected, status.held, status.accepted), (1, 0, 2));
        proxy.control().resume();
        proxy.connect().assert_echo(b"resumed");
        assert_eq!(upstream.accepted(), 2);
    }
}

#[test]
fn the_retry_interval_is_rounded_up_to_seconds() {
    for (interval, seconds) in
        [("3s", Some(3)), ("1500ms", Some(2)), ("1ms", Some(1)), ("2m", Some(120)), ("0s", None)]
    {
        let upstream = Upstream::tcp(echo);
        let proxy = rejecting(&upstream).args(["--proxy-retry-after-interval", interval]).start();
        proxy.control().pause();
        assert_rejection(&strict_client(proxy.connect(), b"GET / HTTP/1.1\r\n\r\n"), seconds);
    }
}

#[test]
fn whatever_is_no_other_protocol_is_answered_plain() {
    let upstream = Upstream::tcp(echo);
    let proxy = rejecting(&upstream).start();
    proxy.control().pause();
    for request in
        [&b"G"[..], b"\0\0\0\x85\xffSMB", b"SEARCH / HTTP/1.1\r\n", b"\x80\x2e\x01", b"\xff"]
    {
        assert_rejection(&strict_client(proxy.connect(), request), Some(3));
    }
}

#[test]
fn a_silent_client_is_answered_after_a_second() {
    let upstream = Upstream::tcp(echo);
    let proxy = rejecting(&upstream).start();
    proxy.control().pause();
    let start = Instant::now();
    let clients: Vec<_> = (0..20).map(|_| proxy.connect()).collect();
    for mut client in clients {
        let received = client.receive_all();
        assert!(start.elapsed() >= SILENCE, "answered after {:?}", start.elapsed());
        assert_eq!(received.end, End::Eof);
        assert_rejection(&received.bytes, Some(3));
    }
    proxy.control().wait_status("all are counted", |status| status.rejected == 20);
    assert_eq!(upstream.accepted(), 0);
}

#[test]
fn strict_clients_all_get_the_answer_and_a_clean_end() {
    for family in [Family::Tcp4, Family::Unix] {
        let upstream = Upstream::tcp(echo);
        let proxy = rejecting(&upstream).listen(family).start();
        proxy.control().pause();
        let answer = strict_client(proxy.connect(), b"GET / HTTP/1.1\r\n\r\n");
        assert_rejection(&answer, Some(3));
        let tally = Tally::of_batches(50, |length| {
            Outcome::of(proxy.addr().try_connect(), &post(length), &answer)
        });
        println!("plain, {family:?}: {tally}");
        tally.assert_all_clean();
    }
}

#[test]
fn pipelined_requests_get_one_answer_and_no_reset() {
    let upstream = Upstream::tcp(echo);
    let proxy = rejecting(&upstream).start();
    proxy.control().pause();
    let requests = b"GET /1 HTTP/1.1\r\n\r\n".repeat(100);
    for _ in 0..20 {
        assert_rejection(&strict_client(proxy.connect(), &requests), Some(3));
    }
}

#[test]
fn a_client_that_shuts_its_side_is_answered() {
    let upstream = Upstream::tcp(echo);
    let proxy = rejecting(&upstream).start();
    proxy.control().pause();
    for request in [&b"GET / HTTP/1.0\r\n\r\n"[..], b""] {
        let mut client = proxy.connect();
        client.send(request);
        client.finish();
        assert_eq!(Response::read(&mut client).status, 503);
    }
}

#[test]
fn a_client_that_never_closes_is_let_go() {
    let upstream = Upstream::tcp(echo);
    let proxy = rejecting(&upstream).start();
    proxy.control().pause();
    let before = proxy.descriptors();
    let mut client = proxy.connect();
    client.send(b"GET / HTTP/1.1\r\n\r\n");
    assert_eq!(Response::read(&mut client).status, 503);
    crate::harness::wait_until("the proxy has closed its side", || proxy.descriptors() <= before);
}

#[test]
fn running_connections_are_not_rejected() {
    let upstream = Upstream::tcp(echo);
    let proxy = rejecting(&upstream).start();
    let mut running = proxy.connect();
    running.assert_echo(b"before");
    proxy.control().pause();
    running.assert_echo(b"during");
    assert_eq!(Response::parse(&strict_client(proxy.connect(), b"GET")).status, 503);
    proxy.control().resume();
    running.assert_echo(b"after");
}

#[test]
fn a_resume_serves_a_client_that_is_still_silent() {
    let upstream = Upstream::tcp(echo);
    let proxy = rejecting(&upstream).start();
    // The answer comes after a second: a try on a machine too busy to resume within that does not count.
    for _ in 0..10 {
        proxy.control().pause();
        let accepted = proxy.control().status().accepted;
        let start = Instant::now();
        let mut client = proxy.connect();
        proxy.control().wait_status("it is there", |status| status.accepted == accepted + 1);
        proxy.control().resume();
        if start.elapsed() < SILENCE {
            client.assert_echo(b"served after all");
            return;
        }
    }
    panic!("the machine is too busy for this test");
}
