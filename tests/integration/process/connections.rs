//! The line of each connection: every cause of an end is provoked, and found in log, status and metrics alike.

use std::{collections::BTreeMap, io::Write as _, net::Ipv4Addr, thread, time::Duration};

use serde_json::Value;

use crate::harness::{
    Addr, Builder, End, Family, Listener, Proxy, Received, Upstream, echo, in_namespace, reserve,
    wait_until,
};

const FORMATS: [&str; 2] = ["text", "json"];

/// Line of a connection, with the facts that both formats have.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Line {
    pub(super) level: String,
    pub(super) id: String,
    pub(super) client: String,
    pub(super) upstream: String,
    pub(super) held: f64,
    pub(super) connect: f64,
    pub(super) took: f64,
    pub(super) to_upstream: u64,
    pub(super) to_client: u64,
    pub(super) cause: String,
    pub(super) error: Option<String>,
}

impl Line {
    /// Reads a line of the log; none if it is not of a connection.
    #[track_caller]
    fn parse(line: &str) -> Option<Self> {
        if line.starts_with('{') { Self::parse_json(line) } else { Self::parse_text(line) }
    }

    #[track_caller]
    fn parse_json(line: &str) -> Option<Self> {
        let object: Value = serde_json::from_str(line).expect("an object");
        if object["event"] != "connection" {
            return None;
        }
        let text = |key: &str| object[key].as_str().map(str::to_owned);
        let word = |key: &str| text(key).unwrap_or_else(|| panic!("no {key}: {line}"));
        // Text has no word for a client that was not held or not connected.
        let seconds = |key: &str| {
            if object[key].is_null() { 0.0 } else { object[key].as_f64().expect("seconds") }
        };
        let bytes = |key: &str| object[key].as_u64().expect("a count");
        Some(Self {
            level: word("level"),
            id: word("id"),
            client: word("client"),
            upstream: word("upstream"),
            held: seconds("held_seconds"),
            connect: seconds("connect_seconds"),
            took: seconds("duration_seconds"),
            to_upstream: bytes("bytes_to_upstream"),
            to_client: bytes("bytes_to_client"),
            cause: word("cause"),
            error: text("error"),
        })
    }

    #[track_caller]
    fn parse_text(line: &str) -> Option<Self> {
        let (head, rest) = line.split_once(" connection ")?;
        // Other lines have the word in the middle of a sentence.
        let level = head.split(' ').nth(1).filter(|level| head.ends_with(level))?;
        let (id, rest) = rest.split_once(' ').expect("fields");
        // A name with a space is in quotes.
        let mut is_quoted = false;
        let ends_field = |letter| {
            is_quoted ^= letter == '"';
            letter == ' ' && !is_quoted
        };
        let field = |field: &str| {
            let (key, value) = field.split_once('=').expect("a field");
            (key.to_owned(), value.trim_matches('"').to_owned())
        };
        let fields: BTreeMap<String, String> = rest.split(ends_field).map(field).collect();
        let number = |key: &str, unit: &str| -> f64 {
            if fields[key] == "-" {
                return 0.0;
            }
            fields[key].strip_suffix(unit).expect("a unit").parse().expect("a number")
        };
        Some(Self {
            level: level.to_lowercase(),
            id: id.to_owned(),
            client: fields["client"].clone(),
            upstream: fields["upstream"].clone(),
            held: number("held", "s"),
            connect: number("connect", "ms") / 1e3,
            took: number("took", "s"),
            to_upstream: fields["to_upstream"].parse().expect("a count"),
            to_client: fields["to_client"].parse().expect("a count"),
            cause: fields["cause"].clone(),
            error: fields.get("error").cloned(),
        })
    }
}

/// Returns the lines of connections in the log so far.
#[track_caller]
pub(super) fn lines(log: &str) -> Vec<Line> {
    log.lines().filter_map(Line::parse).collect()
}

/// A proxy that logs each connection in `format`.
pub(super) fn logging(format: &str) -> Builder {
    Proxy::builder().args(["--proxy-threads", "2", "--log-connections", "all"]).args([
        "--log-format",
        format,
        "--log-connections-rate",
        "1000",
    ])
}

/// Waits until `wanted` lines of connections are logged, and returns them.
#[track_caller]
pub(super) fn wait_lines(proxy: &Proxy, wanted: usize) -> Vec<Line> {
    let mut found = Vec::new();
    wait_until(&format!("{wanted} connections are logged"), || {
        found = lines(&proxy.log_so_far());
        found.len() >= wanted
    });
    assert_eq!(found.len(), wanted, "{found:?}");
    found
}

/// Checks that `count` connections have ended, all by `cause`, in the words of log, status and metrics. Returns the lines.
#[track_caller]
fn assert_all(proxy: &Proxy, cause: &str, count: usize) -> Vec<Line> {
    let control = proxy.control();
    let closed = |closed: &BTreeMap<String, u64>| -> Vec<(String, u64)> {
        closed.iter().filter(|it| *it.1 > 0).map(|(word, &count)| (word.clone(), count)).collect()
    };
    control.wait_counts(|status| closed(&status.closed), vec![(cause.to_owned(), count as u64)]);
    let metrics = control.get("/metrics");
    let ended = metrics.text().lines().filter_map(|line| {
        let (word, number) =
            line.strip_prefix("tcpause_closed_total{cause=\"")?.split_once("\"} ")?;
        Some((word.to_owned(), number.parse().expect("a count")))
    });
    let ended: BTreeMap<String, u64> = ended.collect();
    assert_eq!(closed(&ended), [(cause.to_owned(), count as u64)]);
    assert_eq!(ended, control.status().closed, "other words");

    let lines = wait_lines(proxy, count);
    let level = match cause {
        "hold-timeout" | "hold-overflow" | "unreachable" | "stalled" | "stopped" => "warn",
        _ => "info",
    };
    for line in &lines {
        assert_eq!((&*line.cause, &*line.level), (cause, level), "{line:?}");
        assert_eq!(line.error.is_some(), cause == "unreachable", "{line:?}");
    }
    lines
}

/// Calls `test` for each format, and for a proxy on TCP and on a UNIX socket.
fn each(test: impl Fn(&dyn Fn() -> Builder, Family)) {
    for format in FORMATS {
        for family in [Family::Tcp4, Family::Unix] {
            println!("{format}, {family:?}");
            test(&|| logging(format).listen(family), family);
        }
    }
}

#[test]
fn both_streams_have_ended() {
    each(|proxy, family| {
        let upstream = Upstream::start(family, echo);
        let proxy = proxy().upstream(&upstream).start();
        let mut client = proxy.connect();
        client.assert_echo(b"hello");
        client.finish();
        assert_eq!(client.receive_all().end, End::Eof);
        let line = assert_all(&proxy, "ended", 1).remove(0);
        assert_eq!((line.to_upstream, line.to_client), (5, 5));
        assert_eq!(line.upstream, upstream.addr().to_string());
    });
}

#[test]
fn one_side_was_the_first_to_reset() {
    each(|proxy, family| {
        let upstream = Upstream::start(family, echo);
        let by_client = proxy().upstream(&upstream).start();
        let mut client = by_client.connect();
        client.send(b"hello");
        by_client.control().wait_counts(|status| status.bytes_to_client, 5);
        // With bytes that it has not read.
        client.reset();
        let line = assert_all(&by_client, "client-reset", 1).remove(0);
        assert_eq!((line.to_upstream, line.to_client), (5, 5));

        let upstream = Upstream::start(family, |mut stream| {
            let bytes = stream.receive(1);
            stream.reset();
            Received { bytes, end: End::Eof }
        });
        let by_upstream = proxy().upstream(&upstream).start();
        let mut client = by_upstream.connect();
        client.send(b"hello");
        client.receive_all();
        let line = assert_all(&by_upstream, "upstream-reset", 1).remove(0);
        assert_eq!((line.to_upstream, line.to_client), (5, 0));
    });
}

#[test]
fn the_client_left_before_it_was_served() {
    each(|proxy, family| {
        let upstream = Upstream::start(family, echo);
        let holding = proxy().upstream(&upstream).start();
        holding.control().pause();
        drop(holding.connect_held());
        holding.control().wait_counts(|status| status.held, 0);
        holding.connect_held().reset();
        for line in assert_all(&holding, "left-held", 2) {
            assert_eq!((line.connect, line.to_upstream), (0.0, 0), "{line:?}");
        }

        let vacant = reserve();
        let waiting = proxy().upstream_at(&vacant.addr()).arg("--upstream-retry-for=20s").start();
        let client = waiting.connect();
        waiting.control().wait_counts(|status| status.awaiting_upstream, 1);
        drop(client);
        assert_all(&waiting, "left-connecting", 1);
    });
}

#[test]
fn the_client_left_while_its_upstream_was_dialled() {
    let full = full_listener();
    for format in FORMATS {
        let proxy =
            logging(format).upstream_at(&full.addr()).arg("--upstream-connect-timeout=20s").start();
        let client = proxy.connect();
        proxy.control().wait_counts(|status| status.connecting, 1);
        client.reset();
        assert_all(&proxy, "left-connecting", 1);
    }
}

#[test]
fn a_pause_rejected_the_client() {
    each(|proxy, family| {
        let upstream = Upstream::start(family, echo);
        let proxy = proxy().upstream(&upstream).start();
        assert_eq!(proxy.control().put("/paused?mode=reject").status, 201);
        ask_in_vain(&proxy);
        let line = assert_all(&proxy, "rejected", 1).remove(0);
        assert_eq!((line.held, line.to_upstream, line.to_client), (0.0, 0, 0));
    });
}

#[test]
fn the_client_was_held_for_too_long() {
    const TIMEOUT: Duration = Duration::from_millis(100);
    each(|proxy, family| {
        for overflow in ["reject", "close"] {
            let upstream = Upstream::start(family, echo);
            let timeout = format!("--hold-timeout={TIMEOUT:?}");
            let proxy = proxy()
                .upstream(&upstream)
                .args([timeout, format!("--hold-overflow={overflow}")])
                .start();
            proxy.control().pause();
            ask_in_vain(&proxy);
            let line = assert_all(&proxy, "hold-timeout", 1).remove(0);
            assert!(line.held >= TIMEOUT.as_secs_f64() && line.held <= line.took, "{line:?}");
        }
    });
}

#[test]
fn too_many_clients_were_held() {
    each(|proxy, family| {
        for overflow in ["reject", "close"] {
            let upstream = Upstream::start(family, echo);
            let proxy = proxy()
                .upstream(&upstream)
                .args(["--hold-max=1", &format!("--hold-overflow={overflow}")])
                .start();
            proxy.control().pause();
            let held = proxy.connect_held();
            ask_in_vain(&proxy);
            let line = assert_all(&proxy, "hold-overflow", 1).remove(0);
            assert!(line.held == 0.0, "{line:?}");
            drop(held);
        }
    });
}

#[test]
fn the_upstream_was_not_reached() {
    let (vacant, full) = (reserve(), full_listener());
    each(|proxy, _family| {
        let missing = Addr::Unix(proxy().path("nobody.sock"));
        for (upstream, error) in
            [(vacant.addr(), "refused"), (missing, "missing"), (full.addr(), "timeout")]
        {
            let proxy =
                proxy().upstream_at(&upstream).arg("--upstream-connect-timeout=100ms").start();
            proxy.connect().receive_all();
            let line = assert_all(&proxy, "unreachable", 1).remove(0);
            assert_eq!(line.error.as_deref(), Some(error));
            let metrics = proxy.control().get("/metrics");
            let dials = format!("tcpause_connect_attempts_total{{result=\"{error}\"}} ");
            let dials = metrics.text().lines().find_map(|line| line.strip_prefix(&dials));
            assert!(dials.is_some_and(|dials| dials != "0"), "{error}: {dials:?}");
            assert_eq!((&*line.upstream, line.connect), (&*upstream.to_string(), 0.0));
            assert_eq!(proxy.control().status().failed, 1);
        }
    });
}

#[test]
fn no_route_led_to_the_upstream() {
    in_namespace("process::connections::no_route_led_to_the_upstream", || {
        for format in FORMATS {
            let proxy = logging(format)
                .upstream_at(&"tcp://10.1.2.3:4")
                .arg("--upstream-connect-timeout=100ms")
                .start();
            proxy.connect().receive_all();
            let line = assert_all(&proxy, "unreachable", 1).remove(0);
            assert_eq!(line.error.as_deref(), Some("unreachable"));
        }
    });
}

/// The kernel keeps an answer for a client that does not read, and its server has died meanwhile.
#[test]
fn one_side_was_reset_and_the_other_took_nothing() {
    /// Time that the proxy gives the other side, but for a few seconds.
    const NEARLY_SETTLED: Duration = Duration::from_secs(25);
    const ANSWER_BYTES: usize = 400_000;

    let proxies = FORMATS.map(|format| {
        let upstream = Upstream::tcp(|mut stream| {
            let bytes = stream.receive(8);
            stream.send(&vec![7; ANSWER_BYTES]);
            // The second question comes when the answer is out of the server's hands.
            stream.receive(3);
            stream.reset();
            Received { bytes, end: End::Eof }
        });
        let proxy = logging(format).upstream(&upstream).start();
        let mut client = proxy.connect();
        client.send(b"question");
        let all = ANSWER_BYTES as u64;
        proxy.control().wait_counts(|status| status.bytes_to_client, all);
        client.send(b"die");
        (proxy, client, upstream)
    });
    thread::sleep(NEARLY_SETTLED);
    for (proxy, _client, _upstream) in &proxies {
        proxy.control().wait_counts(|status| (status.active, status.closed["stalled"]), (1, 0));
    }
    for (proxy, client, upstream) in proxies {
        let line = assert_all(&proxy, "stalled", 1).remove(0);
        assert_eq!((line.to_upstream, line.to_client), (11, ANSWER_BYTES as u64));
        drop((client, upstream));
    }
}

#[test]
fn the_connection_was_quiet_during_a_pause() {
    each(|proxy, family| {
        let upstream = Upstream::start(family, echo);
        let proxy = proxy().upstream(&upstream).start();
        let mut client = proxy.connect();
        client.assert_echo(b"hello");
        let response = proxy.control().put("/paused?drain=quiet:100ms&wait=20s");
        assert_eq!(response.status, 201, "{response}");
        assert_eq!(client.receive_all().end, End::Eof);
        drop(client);
        let line = assert_all(&proxy, "drained", 1).remove(0);
        assert_eq!((line.to_upstream, line.to_client), (5, 5));
    });
}

#[test]
fn a_pause_had_what_was_left_reset() {
    let full = full_listener();
    each(|proxy, family| {
        let upstream = Upstream::start(family, echo);
        let carrying = proxy().upstream(&upstream).start();
        let mut carried = carrying.connect();
        carried.assert_echo(b"hello");
        let dialling =
            proxy().upstream_at(&full.addr()).arg("--upstream-connect-timeout=20s").start();
        let dialled = dialling.connect();
        dialling.control().wait_counts(|status| status.connecting, 1);
        for (proxy, mut client) in [(carrying, carried), (dialling, dialled)] {
            let response = proxy.control().put("/paused?wait=1ms&on-timeout=kill");
            assert_eq!(response.status, 201, "{response}");
            client.receive_all();
            assert_all(&proxy, "killed-pause", 1);
        }
    });
}

/// The status is gone by then, and the numbers are checked in `src/server/tests.rs`.
#[test]
fn the_proxy_stopped() {
    each(|proxy, family| {
        let upstream = Upstream::start(family, echo);
        let proxy = proxy().upstream(&upstream).grace_period(Some("100ms")).start();
        let mut carried = proxy.connect();
        carried.assert_echo(b"hello");
        proxy.control().pause();
        let held = proxy.connect_held();
        proxy.terminate();
        let found = lines(&proxy.finish().stderr);
        let [first, second] = &found[..] else { panic!("{found:?}") };
        for line in [first, second] {
            assert_eq!((&*line.cause, &*line.level), ("stopped", "warn"), "{line:?}");
        }
        assert_eq!(first.to_upstream + second.to_upstream, 5, "{found:?}");
        drop(held);
    });
}

/// Makes a request that is not served, and leaves when its answer or its end has come.
fn ask_in_vain(proxy: &Proxy) {
    let mut client = proxy.connect();
    // One that was closed already may refuse it.
    drop(client.write_all(b"GET / HTTP/1.1\r\n\r\n"));
    client.receive_all();
}

/// Returns a TCP listener that never answers a dial.
fn full_listener() -> Listener {
    let full = Listener::bind(&Addr::Tcp((Ipv4Addr::LOCALHOST, 0).into()));
    full.backlog(0);
    full.fill();
    full
}
