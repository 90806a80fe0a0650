//! The whole control API on a loopback listener, under friendly and hostile callers.

use std::{
    fs::File,
    io::{Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    os::unix::net::{UnixListener, UnixStream},
    process::Command,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Instant,
};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

mod corpus;
mod fleet;
mod handover;
mod server;
mod switching;
mod upgrade;
mod waits;

use super::{backend::UnlinkedListener, *};
use crate::{
    config::HalfClosed,
    handle::Handle,
    handover::parcel::Outgoing,
    pause::{
        gate::{Mode, Pass},
        leases::{Lifetime, Terms},
    },
};

const WAIT_MAX: Duration = Duration::from_secs(10);

/// As many callers as the server allows where descriptors are plenty.
const CALLERS_MAX: usize = 128;

const TIMEOUTS_SHORT: Timeouts = Timeouts {
    outcome: Duration::from_secs(1),
    silence: Duration::from_millis(250),
    exchange: Duration::from_millis(500),
    linger: Duration::from_millis(250),
};

/// A handle to a proxy that is idle.
pub(super) fn handle() -> Handle {
    crate::tests::handle()
}

/// Returns the parts that callers share, before an executor that executes nothing.
pub(super) fn context() -> ControlContext {
    ControlContext {
        notifier: Arc::new(Notifier::new(&Poll::new().unwrap()).unwrap()),
        handle: handle(),
        jobs: bounded(1).0,
        fleet_jobs: None,
        switch_jobs: bounded(1).0,
        metrics: Arc::new(Source::new()),
        hosts: HostPolicy::new([], &[]),
        timeouts: TIMEOUTS_SHORT,
        waiters_max: CALLERS_MAX / 2,
        permit: Arc::new(()),
        last_request_id: PROGRAM,
        scratch: vec![0; READ_BYTES],
        short_until: None,
        stops_at: None,
        log_limit: LogLimit::default(),
    }
}

/// Begins a pause of a request that is not committed.
pub(super) fn put_pending(handle: &Handle, request_id: u64) {
    let (name, by) = ("a".to_owned(), "a test".to_owned());
    let half_closed = HalfClosed::Serve;
    let terms =
        Terms { name, by, reason: None, mode: Mode::Hold, ttl: None, quiet: None, half_closed };
    handle.pauses().put(terms, Lifetime::Pending, request_id).unwrap();
}

/// A parcel as it arrives: with copies of the descriptors.
pub(super) fn parcel_of(parcel: Outgoing<'_>, begin: Instant) -> Incoming {
    let (lent, bytes) = parcel.into_parts();
    let copies = lent.iter().map(|it| it.try_clone_to_owned().unwrap()).collect();
    Incoming::new(begin, copies, bytes)
}

/// One connection that is carried until it is dropped.
struct Busy(#[expect(dead_code, reason = "its drop is the end of the connection")] Pass);

impl Busy {
    fn new(handle: &Handle) -> Self {
        Self(handle.pauses().gate.enter().expect("the gate is open"))
    }
}

struct Api {
    control: Control,
    handle: Handle,
    addr: SocketAddr,
}

impl Api {
    fn start() -> Self {
        Self::start_before(Backend::start().unwrap(), TIMEOUTS_SHORT)
    }

    /// As where no directory takes a file.
    fn start_without_a_server() -> Self {
        Self::start_before(Backend::without(), TIMEOUTS_SHORT)
    }

    /// Before a private server that is played by the test, and lost with the listener.
    fn start_before_ours(timeouts: Timeouts) -> (Self, UnixListener) {
        let (ours, door) = UnlinkedListener::open().unwrap();
        let unused = UnlinkedListener::open().unwrap().0;
        (Self::start_before(Backend::behind(door, unused).unwrap(), timeouts), ours)
    }

    fn start_before(backend: Backend, timeouts: Timeouts) -> Self {
        let handle = handle();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        rustix::net::listen(&listener, 4096).unwrap(); // as the server does
        let addr = listener.local_addr().unwrap();
        let control = start(listener.into(), &handle, backend, timeouts);
        Self { control, handle, addr }
    }

    fn connect(&self) -> TcpStream {
        connect(self.addr)
    }

    /// Sends `request` and returns the status of the answer, which must end cleanly.
    fn status(&self, request: &str) -> u16 {
        let mut caller = self.connect();
        caller.write_all(request.as_bytes()).unwrap();
        status(&answer(&mut caller))
    }

    fn send(&self, request: &str) -> TcpStream {
        let mut caller = self.connect();
        caller.write_all(request.as_bytes()).unwrap();
        caller
    }

    fn assert_answers(&self, after: &str) {
        assert_eq!(self.status(GET), 200, "after {after}");
        assert!(!self.handle.is_paused(), "{after} has paused");
    }
}

const GET: &str = "GET /paused HTTP/1.1\r\nHost: localhost\r\n\r\n";
const WAIT: &str = "GET /paused/block-until-idle HTTP/1.1\r\nHost: localhost\r\n\r\n";

fn start(listener: OwnedFd, handle: &Handle, backend: Backend, timeouts: Timeouts) -> Control {
    let (hosts, listeners) = (HostPolicy::new([], &[]), vec![(listener, Scope::Full)]);
    let subject = (handle.clone(), None);
    let parts = assemble(listeners, subject, hosts, CALLERS_MAX, backend, timeouts).unwrap();
    Control::start_with(parts, None).unwrap()
}

fn connect(addr: SocketAddr) -> TcpStream {
    let caller = TcpStream::connect(addr).unwrap();
    caller.set_read_timeout(Some(WAIT_MAX)).unwrap();
    caller.set_write_timeout(Some(WAIT_MAX)).unwrap();
    caller
}

fn answer(caller: &mut impl Read) -> String {
    let mut text = String::new();
    caller.read_to_string(&mut text).unwrap();
    text
}

fn status(answer: &str) -> u16 {
    answer
        .get(9..12)
        .and_then(|status| status.parse().ok())
        .unwrap_or_else(|| panic!("no answer: {answer:?}"))
}

/// An answer as a head without its `Date`, and a body.
fn parts(answer: &str) -> (String, &str) {
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (
        head.split("\r\n")
            .filter(|line| !line.starts_with("Date: "))
            .collect::<Vec<_>>()
            .join("\n"),
        body,
    )
}

#[test]
fn the_contract_to_the_byte() {
    for api in [Api::start(), Api::start_without_a_server()] {
        assert_contract(&api);
    }
}

fn assert_contract(api: &Api) {
    let json = |length| {
        format!(
            "HTTP/1.1 200 OK\nContent-Type: application/json\nContent-Length: {length}\nConnection: close"
        )
    };
    let no_content = "HTTP/1.1 204 No Content\nConnection: close".to_owned();
    let created = "HTTP/1.1 201 Created\nContent-Length: 0\nConnection: close".to_owned();
    let table = [
        ("GET /paused", json(17), r#"{"paused": false}"#),
        ("PUT /paused", created.clone(), ""),
        ("PUT /paused", created, ""),
        ("GET /paused", json(16), r#"{"paused": true}"#),
        ("HEAD /paused", json(16), ""),
        ("DELETE /paused", no_content.clone(), ""),
        ("DELETE /paused", no_content.clone(), ""),
        ("GET /paused/block-until-idle", no_content.clone(), ""),
        ("HEAD /paused/block-until-idle?timeout=1s", no_content, ""),
    ];
    for (line, head, body) in table {
        for request in [
            format!("{line} HTTP/1.1\r\nHost: localhost\r\n\r\n"),
            format!("{line} HTTP/1.0\r\n\r\n"),
        ] {
            let answer = answer(&mut api.send(&request));
            assert_eq!(parts(&answer), (head.clone(), body), "{request}");
        }
    }
    let text = answer(&mut api.send("POST /paused HTTP/1.0\r\n\r\n"));
    assert!(
        text.contains("\r\nAllow: GET, HEAD, PUT, DELETE\r\n") && status(&text) == 405,
        "{text}"
    );
    let text = answer(&mut api.send("GET /status HTTP/1.0\r\n\r\n"));
    let value: serde_json::Value = serde_json::from_str(parts(&text).1).unwrap();
    assert_eq!(value["paused"], false);
    let text = answer(&mut api.send("GET / HTTP/1.0\r\nAccept: */*\r\n\r\n"));
    assert!(text.contains("\r\nContent-Type: text/plain; charset=utf-8\r\n"), "{text}");
    assert!(parts(&text).1.contains("\nGET    /status "), "{text}");
    let text = answer(&mut api.send("GET /nothing HTTP/1.0\r\n\r\n"));
    let value: serde_json::Value = serde_json::from_str(parts(&text).1).unwrap();
    assert!(value["status"] == 404 && value["error"].is_string(), "{text}");
}

/// Some of them would break `tiny_http`, were it to read them.
#[test]
fn hostile_requests_are_refused_and_change_nothing() {
    let api = Api::start();
    let table = [
        (413, "PUT /paused HTTP/1.1\r\nHost: localhost\r\nContent-Length: 70368744177664\r\n\r\n"),
        (
            413,
            "PUT /paused HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9223372036854775809\r\n\r\n",
        ),
        (408, "PUT /paused HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1025\r\n\r\n"),
        (505, "GET / HTTP/2.0\r\n\r\n"),
        (
            400,
            "PUT /paused HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n",
        ),
        (
            400,
            "PUT /paused HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\nContent-Length: 5\r\n\r\n",
        ),
        (400, "PUT /paused HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n"),
        (400, "PUT /paused HTTP/1.1\nHost: localhost\n\n"),
        (400, "\x16\x03\x01\x02\0\x01\0\x01\u{7c}\x03\x03"),
        (403, "PUT /paused HTTP/1.1\r\nHost: localhost\r\nOrigin: http://localhost\r\n\r\n"),
        (403, "PUT /paused HTTP/1.1\r\nHost: evil.example\r\n\r\n"),
        (403, "PUT /paused HTTP/1.1\r\nHost: localhost\r\nSec-Fetch-Site: cross-site\r\n\r\n"),
        (408, "PUT /paused HTTP/1.1\r\nHost: localhost\r\n"),
    ];
    for (expected, request) in table {
        assert_eq!(api.status(request), expected, "{request:?}");
        api.assert_answers(request);
    }
    assert_eq!(parts(&answer(&mut api.send("HEAD / HTTP/1.0\r\nOrigin: a\r\n\r\n"))).1, "");
}

#[test]
fn a_body_is_read_and_ignored() {
    let api = Api::start();
    let head = format!(
        "PUT /paused HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n",
        body::BODY_BYTES_MAX
    );
    let body = vec![b'x'; body::BODY_BYTES_MAX];
    let mut caller = api.send(&format!("{head}Expect: 100-continue\r\n\r\n"));
    let mut interim = [0; 25];
    caller.read_exact(&mut interim).unwrap();
    assert_eq!(&interim, b"HTTP/1.1 100 Continue\r\n\r\n");
    assert!(!api.handle.is_paused());
    caller.write_all(&body).unwrap();
    assert_eq!(status(&answer(&mut caller)), 201);
    assert!(api.handle.is_paused());
    api.handle.resume();
    assert_eq!(api.status(&format!("{head}Expect: 100-continue\r\n\r\n")), 100, "and then 408");
    api.assert_answers("a body that never comes");
}

/// Bytes that are pipelined behind a request are neither carried out nor in its way.
#[test]
fn a_pipelined_request_is_ignored() {
    let api = Api::start();
    let busy = Busy::new(&api.handle);
    let mut waiter = api.send(&format!("{WAIT}PUT /paused HTTP/1.1\r\nHost: localhost\r\n\r\n"));
    api.assert_answers("a pipelined request");
    drop(busy);
    let text = answer(&mut waiter);
    assert_eq!(status(&text), 204);
    assert_eq!(text.matches("HTTP/1.1 ").count(), 1, "{text}");
    api.assert_answers("a pipelined request that was answered");
}

#[test]
fn endless_senders_are_cut_off() {
    let api = Api::start();
    for (begin, part) in [("GET / HTTP/1.0\r\nA: ", "a".repeat(1 << 16)), ("", GET.repeat(1000))] {
        let mut caller = api.send(begin);
        let mut sent = 0;
        while let Ok(count) = caller.write(part.as_bytes()) {
            sent += count;
            assert!(sent < 200 << 20, "nobody stops the sender");
        }
        api.assert_answers("an endless request");
    }
}

/// An operator goes on working meanwhile.
#[test]
fn two_thousand_half_requests_do_not_keep_out_a_whole_one() {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }).unwrap();
    let api = Api::start();
    let (busy, waiter) = (Busy::new(&api.handle), api.send(WAIT));
    let attacking = AtomicBool::new(true);
    thread::scope(|scope| {
        scope.spawn(|| {
            let half = (0..2_000)
                .map(|_| api.send("PUT /paused HTTP/1.1\r\nHost: loc"))
                .collect::<Vec<_>>();
            attacking.store(false, Ordering::SeqCst);
            half
        });
        let (mut answered, mut refused, mut longest) = (0, 0, Duration::ZERO);
        while attacking.load(Ordering::SeqCst) || answered < 20 {
            let begin = Instant::now();
            match api.status(GET) {
                200 => answered += 1,
                // The machine let a whole house of attackers pass between the connect and the request.
                503 => refused += 1,
                status => panic!("{status}"),
            }
            longest = longest.max(begin.elapsed());
            assert!(
                refused <= 2 + answered / 10,
                "{refused} requests refused, {answered} answered"
            );
        }
        assert!(!api.handle.is_paused());
        println!("{answered} requests answered under attack, the longest after {longest:?}");
    });
    drop(busy);
    assert_eq!(status(&answer(&mut { waiter })), 204, "the waiter outlives the attack");
}

#[test]
fn a_burst_is_answered_whole() {
    let api = Api::start();
    for _ in 0..5 {
        let mut callers = (0..60).map(|_| api.connect()).collect::<Vec<_>>();
        for caller in &mut callers {
            caller.write_all(GET.as_bytes()).unwrap();
        }
        for caller in &mut callers {
            assert_eq!(status(&answer(caller)), 200);
        }
    }
}

/// Runs in a process of its own, whose descriptors can run out without harm to other tests.
#[test]
fn a_shortage_of_descriptors_is_survived() {
    const CHILD: &str = "TCPAUSE_TEST_SHORTAGE";
    if std::env::var_os(CHILD).is_none() {
        let name = "control::tests::a_shortage_of_descriptors_is_survived";
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", name])
            .env(CHILD, "1")
            .output()
            .unwrap();
        return assert!(child.status.success(), "{child:?}");
    }
    setrlimit(Resource::Nofile, Rlimit { current: Some(64), maximum: Some(64) }).unwrap();
    let api = Api::start();
    for left in 0..8 {
        let mut callers = [api.connect(), api.connect()];
        let mut hoard = std::iter::from_fn(|| File::open("/dev/null").ok()).collect::<Vec<_>>();
        hoard.truncate(hoard.len() - left);
        callers[0].write_all(GET.as_bytes()).unwrap();
        let short = Duration::from_millis(300);
        callers[0].set_read_timeout(Some(short)).unwrap();
        let mut text = String::new();
        let during = callers[0].read_to_string(&mut text);
        drop(hoard);
        callers[0].set_read_timeout(Some(WAIT_MAX)).unwrap();
        if during.is_err() {
            callers[0].read_to_string(&mut text).unwrap();
        }
        assert_eq!(status(&text), 200, "{left} descriptors were left: {text}");
        api.assert_answers("a shortage");
    }
}

#[test]
fn callers_that_reset_leave_nothing_behind() {
    let api = Api::start();
    let _busy = Busy::new(&api.handle);
    for request in ["", GET, "GET /pau", WAIT] {
        for _ in 0..100 {
            let caller = api.send(request);
            rustix::net::sockopt::set_socket_linger(&caller, Some(Duration::ZERO)).unwrap();
        }
        api.assert_answers("resets");
    }
    waits::assert_house_empties(&api);
}

/// As many as fit have waited and left, by a reset or by an ordinary close.
#[test]
fn unix_callers_and_half_closed_ones_are_answered() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("control.sock");
    let listener = UnixListener::bind(&path).unwrap();
    listener.set_nonblocking(true).unwrap();
    let handle = handle();
    let control = start(listener.into(), &handle, Backend::start().unwrap(), TIMEOUTS_SHORT);
    for (request, expected) in
        [("GET /paused HTTP/1.0\r\n\r\n", 200), (WAIT, 204), ("GET /paused", 400)]
    {
        let mut caller = UnixStream::connect(&path).unwrap();
        caller.set_read_timeout(Some(WAIT_MAX)).unwrap();
        caller.write_all(request.as_bytes()).unwrap();
        caller.shutdown(Shutdown::Write).unwrap();
        assert_eq!(status(&answer(&mut caller)), expected, "{request}");
    }
    // Who has closed altogether is heard all the same.
    UnixStream::connect(&path).unwrap().write_all(b"PUT /paused HTTP/1.0\r\n\r\n").unwrap();
    let deadline = Instant::now() + WAIT_MAX;
    while !handle.is_paused() {
        assert!(Instant::now() < deadline);
        thread::yield_now();
    }
    drop(control);
}

#[test]
fn a_half_closed_waiter_counts_as_gone() {
    let api = Api::start();
    let _busy = Busy::new(&api.handle);
    let mut waiter = api.send(WAIT);
    waiter.shutdown(Shutdown::Write).unwrap();
    assert_eq!(answer(&mut waiter), "");
    let mut caller = api.send(GET);
    caller.shutdown(Shutdown::Write).unwrap();
    assert_eq!(status(&answer(&mut caller)), 200);
}

#[test]
fn shut_down_answers_who_is_there() {
    let api = Api::start();
    let _busy = Busy::new(&api.handle);
    let (mut waiter, mut half, _silent) = (api.send(WAIT), api.send("GET /pa"), api.connect());
    api.assert_answers("the beginning");
    drop(api.control);
    assert_eq!(status(&answer(&mut waiter)), 503);
    assert_eq!(status(&answer(&mut half)), 503);
    assert!(TcpStream::connect(api.addr).is_err());
}
