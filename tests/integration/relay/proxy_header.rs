//! Headers of the PROXY protocol: for the server, and from balancers in front.

use std::{
    thread,
    time::{Duration, Instant},
};

use crate::harness::{
    Builder, End, Family, Proxy, Received, Stream, Upstream, echo, program, record, wait_until,
};

/// First bytes of version 2.
const SIGNATURE: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";

/// A header of version 1, and the address that it tells.
const HEADER: &[u8] = b"PROXY TCP4 203.0.113.7 198.51.100.1 51544 443\r\n";
const CLIENT: &str = "client=tcp://203.0.113.7:51544 ";

/// A proxy that tells its upstream by `version` of its clients.
fn sending(version: &str, upstream: &Upstream) -> Builder {
    Proxy::builder().upstream(upstream).args(["--upstream-send-proxy", version])
}

/// A proxy whose clients, on the loopback and of UNIX sockets, begin with a header.
fn accepting(upstream: &Upstream) -> Builder {
    Proxy::builder()
        .upstream(upstream)
        .args(["--proxy-accept-proxy-from", "127.0.0.0/8,::1,unix"])
        .args(["--log-connections", "all", "--log-format", "text"])
}

fn local_addr(client: &Stream) -> std::net::SocketAddr {
    let Stream::Tcp(client) = client else { panic!("a TCP client") };
    client.local_addr().unwrap()
}

/// Returns the header of version 1 of a client that has connected to `proxy`.
fn line_of(client: &Stream, proxy: &Proxy) -> String {
    let (addr, family) = (local_addr(client), proxy.addr().to_string());
    let version = if addr.is_ipv4() { "TCP4" } else { "TCP6" };
    let (port, destination) = (proxy.addr().port(), addr.ip());
    assert!(family.contains(&destination.to_string()), "{family}");
    format!("PROXY {version} {} {destination} {} {port}\r\n", addr.ip(), addr.port())
}

#[test]
fn the_server_learns_the_address_of_each_client() {
    for family in [Family::Tcp4, Family::Tcp6].into_iter().filter(|it| it.is_available()) {
        let upstream = Upstream::start(family, record);
        let proxy = sending("v1", &upstream).listen(family).start();
        let mut direct = proxy.connect();
        proxy.control().wait_counts(|it| it.active, 1);
        proxy.control().pause();
        let (mut held, mut talkative) = (proxy.connect_held(), proxy.connect_held());
        talkative.send(b"early");
        proxy.control().resume();
        proxy.control().wait_counts(|it| it.active, 3);
        for (client, bytes) in [(&mut direct, "one"), (&mut held, "two"), (&mut talkative, "")] {
            client.send(bytes.as_bytes());
            client.finish();
            let early = if bytes.is_empty() { "early" } else { bytes };
            let expected = line_of(client, &proxy) + early;
            assert_eq!(upstream.received(), Received::ended(expected.as_bytes()));
        }
    }
}

#[test]
fn a_header_of_version_2_has_the_id_of_the_log_and_counts_as_no_byte() {
    let upstream = Upstream::tcp(record);
    let proxy =
        sending("v2", &upstream).args(["--log-connections", "all", "--log-format", "text"]).start();
    let mut client = proxy.connect();
    client.send(b"hello");
    client.finish();
    let received = upstream.received().bytes;
    let addr = local_addr(&client);
    assert_eq!(client.receive_all(), Received::ended(b""));
    let log = proxy.wait_for_log("to_upstream=5 to_client=0 cause=ended");
    let (_, line) = log.split_once("connection ").unwrap();
    let (id, _) = line.split_once(' ').unwrap();
    let mut expected = SIGNATURE.to_vec();
    expected.extend([0x21, 0x11, 0, 15 + u8::try_from(id.len()).unwrap()]);
    expected.extend([127, 0, 0, 1, 127, 0, 0, 1]);
    expected.extend(addr.port().to_be_bytes());
    expected.extend(proxy.addr().port().to_be_bytes());
    expected.extend([5, 0, u8::try_from(id.len()).unwrap()]);
    expected.extend(id.as_bytes());
    expected.extend(b"hello");
    assert_eq!(received, expected);
}

#[test]
fn a_client_of_a_unix_socket_has_no_address() {
    for (version, header) in
        [("v1", b"PROXY UNKNOWN\r\n".to_vec()), ("v2", [SIGNATURE, b"\x20\0\0\0"].concat())]
    {
        let upstream = Upstream::start(Family::Unix, record);
        let proxy = sending(version, &upstream).listen(Family::Unix).start();
        let mut client = proxy.connect();
        client.send(b"hello");
        client.finish();
        assert_eq!(upstream.received().bytes, [&header[..], b"hello"].concat());
    }
}

#[test]
fn a_server_that_speaks_first_has_the_header_before() {
    let upstream = Upstream::tcp(|mut stream| {
        let header = stream.receive(16);
        stream.send(b"220 hello\r\n");
        Received { bytes: header, end: End::Eof }
    });
    let proxy = sending("v1", &upstream).start();
    let mut client = proxy.connect();
    assert_eq!(client.receive(11), b"220 hello\r\n");
    assert!(upstream.received().bytes.starts_with(b"PROXY TCP4 127.0"));
}

#[test]
fn a_header_tells_the_address_and_is_not_passed_on() {
    for family in [Family::Tcp4, Family::Unix] {
        let upstream = Upstream::tcp(record);
        let proxy = accepting(&upstream).listen(family).start();
        let mut client = proxy.connect();
        // In single bytes, each in a segment of its own.
        for byte in HEADER {
            client.send(&[*byte]);
        }
        client.send(b"hello");
        client.finish();
        assert_eq!(upstream.received(), Received::ended(b"hello"));
        proxy.wait_for_log(&format!("{CLIENT}upstream="));
        proxy.wait_for_log("to_upstream=5 ");
    }
}

#[test]
fn a_header_in_front_becomes_the_header_behind() {
    let six = b"\x20\x01\x0d\xb8\0\0\0\0\0\0\0\0\0\0\0\x01";
    let v2 = [SIGNATURE, b"\x21\x21\0\x24", six, six, b"\x01\x02\x01\xbb"].concat();
    let mapped = b"PROXY TCP6 ::ffff:203.0.113.7 ::ffff:198.51.100.1 51544 443\r\n";
    let local = [SIGNATURE, b"\x20\x11\0\x0c\x01\x02\x03\x04\x05\x06\x07\x08\0\x01\0\x02"].concat();
    for (header, expected) in [
        (HEADER, Some(HEADER)),
        (&v2, Some(&b"PROXY TCP6 2001:db8::1 2001:db8::1 258 443\r\n"[..])),
        (mapped, Some(HEADER)),
        (b"PROXY UNKNOWN\r\n", None),
        (&local, None),
    ] {
        let upstream = Upstream::tcp(record);
        let proxy = accepting(&upstream).args(["--upstream-send-proxy", "v1"]).start();
        proxy.control().pause();
        let mut client = proxy.connect_held();
        client.send(header);
        client.send(b"hello");
        proxy.control().resume();
        client.finish();
        // Without one that tells an address, it is that of the socket.
        let own = line_of(&client, &proxy);
        let expected = expected.unwrap_or(own.as_bytes());
        assert_eq!(upstream.received().bytes, [expected, b"hello"].concat());
    }
}

#[test]
fn another_clients_header_is_its_own_affair() {
    let upstream = Upstream::tcp(record);
    let proxy = Proxy::builder()
        .upstream(&upstream)
        .args(["--proxy-accept-proxy-from", "10.0.0.0/8,unix"])
        .start();
    let mut client = proxy.connect();
    client.send(HEADER);
    client.finish();
    assert_eq!(upstream.received(), Received::ended(HEADER));
}

#[test]
fn a_client_without_its_header_is_reset() {
    let upstream = Upstream::tcp(echo);
    let proxy = accepting(&upstream).start();
    let endless = [&b"PROXY UNKNOWN "[..], &[b'x'; 522]].concat();
    let large = [SIGNATURE, b"\x21\x11\x02\x09"].concat();
    let wrong = [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        b"PROXY TCP4 1.2.3.4\r\n",
        &endless,
        &large,
        b"\x16\x03\x01",
    ];
    for bytes in wrong {
        let mut client = proxy.connect();
        client.send(bytes);
        assert_eq!(client.receive_all(), Received { bytes: Vec::new(), end: End::Reset });
    }
    // One that ends within it.
    let mut client = proxy.connect();
    client.send(b"PROXY TCP4 1.2");
    client.finish();
    assert_eq!(client.receive_all().bytes, b"");
    // One that takes too long for it, also with a byte now and then.
    let mut late = proxy.connect();
    for byte in HEADER.iter().take(4) {
        late.send(&[*byte]);
        thread::sleep(Duration::from_millis(500));
    }
    assert_eq!(late.receive_all(), Received { bytes: Vec::new(), end: End::Reset });
    assert_eq!(upstream.accepted(), 0, "it was not dialled");
    let metrics = proxy.control().get("/metrics");
    let expected =
        format!("tcpause_closed_total{{cause=\"bad-proxy-header\"}} {}", wrong.len() + 2);
    assert!(metrics.text().contains(&expected), "{}", metrics.text());
    assert!(proxy.log_count("cause=bad-proxy-header") > 0);
    let warned = proxy.log_count("does the proxy in front of tcpause send one?");
    assert!((1..=5).contains(&warned), "{warned} warnings");
    proxy.wait_for_log("has not sent a PROXY header in time");
}

#[test]
fn a_header_and_an_end_is_a_health_check() {
    let upstream = Upstream::tcp(echo);
    let proxy = accepting(&upstream).start();
    proxy.control().pause();
    for header in [HEADER, b""] {
        let mut check = proxy.connect();
        check.send(header);
        check.finish();
        assert_eq!(check.receive_all().bytes, b"");
    }
    proxy.control().wait_counts(|it| it.held, 0);
    wait_until("both are logged", || proxy.log_count("cause=left-held") == 2);
    assert_eq!(proxy.log_count(CLIENT), 1);
    proxy.control().resume();
    assert_eq!(upstream.accepted(), 0);
    // One that has said something else waits for its answer.
    let mut client = proxy.connect();
    client.send(&[HEADER, b"hello"].concat());
    client.finish();
    assert_eq!(client.receive_all(), Received::ended(b"hello"));
}

#[test]
fn a_rejected_client_is_answered_by_what_comes_behind_its_header() {
    let upstream = Upstream::tcp(echo);
    let proxy = accepting(&upstream).arg("--proxy-reject-clients").start();
    proxy.control().pause();
    for (bytes, answer) in [
        (&b"GET / HTTP/1.1\r\n\r\n"[..], &b"HTTP/1.1 503 "[..]),
        (b"SSH-2.0-client\r\n", b""),
        (b"", b"HTTP/1.1 503 "),
    ] {
        let mut client = proxy.connect();
        client.send(&[HEADER, bytes].concat());
        let received = client.receive_all();
        assert_eq!(received.end, End::Eof);
        assert_eq!(received.bytes.get(..answer.len()), Some(answer), "{received:?}");
        assert!(!answer.is_empty() || received.bytes.is_empty(), "{received:?}");
    }
    wait_until("all are logged", || proxy.log_count(CLIENT) == 3);
    assert_eq!(proxy.log_count("cause=rejected"), 3);
    // A silent one is served if the pause ends before its answer.
    let mut silent = proxy.connect();
    silent.send(HEADER);
    proxy.control().wait_counts(|it| it.rejecting, 1);
    proxy.control().resume();
    silent.assert_echo(b"hello");
}

#[test]
fn headers_travel_to_a_new_process() {
    let upstream = Upstream::tcp(record);
    let proxy = accepting(&upstream).args(["--upstream-send-proxy", "v1"]).start();
    proxy.control().pause();
    let (mut whole, mut half) = (proxy.connect_held(), proxy.connect());
    whole.send(&[HEADER, b"hello"].concat());
    half.send(&HEADER[..20]);
    proxy.control().wait_counts(|it| it.held, 2);
    proxy.upgrade();
    half.send(&[&HEADER[20..], b"hello"].concat());
    proxy.control().resume();
    for mut client in [whole, half] {
        client.finish();
        assert_eq!(upstream.received().bytes, [HEADER, b"hello"].concat());
        assert_eq!(client.receive_all(), Received::ended(b""));
    }
    wait_until("both are logged", || proxy.log_count(CLIENT) == 2);
}

#[test]
fn the_log_asks_once_if_a_server_expects_headers() {
    let upstream = Upstream::tcp(|mut stream| {
        let bytes = stream.receive(5);
        Received { bytes, end: End::Eof }
    });
    let proxy = Proxy::to(&upstream);
    for _client in 0..3 {
        let mut client = proxy.connect();
        client.send(b"hello");
        assert_eq!(client.receive_all().bytes, b"");
    }
    proxy.wait_for_log("does the server expect a PROXY header? upstream.send-proxy is off");
    assert_eq!(proxy.log_count("does the server expect"), 1);
}

/// Time in which a health check leaves behind its header.
const CHECK_TIMEOUT: Duration = Duration::from_millis(100);

/// Closes each connection with the first byte of its client.
fn close_at_once(mut stream: Stream) -> Received {
    Received { bytes: stream.receive(1), end: End::Eof }
}

#[test]
fn the_log_asks_nothing_if_a_server_closes_a_silent_connection_later() {
    let upstream = Upstream::tcp(close_at_once);
    let proxy = Proxy::builder()
        .upstream(&upstream)
        .args(["--log-connections", "all", "--log-format", "text"])
        .start();
    let mut late = proxy.connect();
    proxy.control().wait_counts(|it| it.active, 1);
    thread::sleep(Duration::from_millis(1100));
    late.send(b"x");
    assert_eq!(late.receive_all().bytes, b"");
    drop(late);
    proxy.wait_for_log("cause=");
    assert_eq!(proxy.log_count("does the server expect"), 0);
    // The question is not used up.
    let mut soon = proxy.connect();
    soon.send(b"x");
    assert_eq!(soon.receive_all().bytes, b"");
    proxy.wait_for_log("does the server expect a PROXY header?");
}

#[test]
fn the_log_asks_nothing_of_a_server_that_has_answered_any_client() {
    const COUNT: usize = 16;
    let upstream = Upstream::tcp(|mut stream| {
        let bytes = stream.receive(1);
        if bytes == b"?" {
            stream.send(b"!");
        }
        Received { bytes, end: End::Eof }
    });
    let proxy = Proxy::builder()
        .upstream(&upstream)
        .args(["--proxy-threads", "2", "--log-connections", "all", "--log-format", "text"])
        .start();
    let mut first = proxy.connect();
    first.send(b"?");
    assert_eq!(first.receive(1), b"!");
    // A worker counts what it has sent at the end of its turn.
    proxy.control().wait_counts(|it| it.bytes_to_client, 1);
    // The kernel spreads them over both workers.
    for _client in 0..COUNT {
        let mut client = proxy.connect();
        client.send(b"x");
        assert_eq!(client.receive_all().bytes, b"");
    }
    wait_until("all are logged", || proxy.log_count("to_upstream=1 to_client=0 cause=") == COUNT);
    assert_eq!(proxy.log_count("does the server expect"), 0);
}

#[test]
fn a_health_check_whose_end_comes_later_reaches_no_server() {
    let local = [SIGNATURE, b"\x20\0\0\0"].concat();
    let upstream = Upstream::tcp(echo);
    let proxy = accepting(&upstream).start();
    let mut slow = 0;
    for header in [&local[..], b"PROXY UNKNOWN\r\n"].repeat(20) {
        let mut check = proxy.connect();
        let begin = Instant::now();
        check.send(header);
        check.reset();
        slow += usize::from(begin.elapsed() >= CHECK_TIMEOUT);
    }
    let status = proxy.control().wait_status("all have gone", |status| {
        status.accepted == 40 && status.closed.values().sum::<u64>() == 40
    });
    assert!(upstream.accepted() <= slow, "{} dialled, {slow} slow", upstream.accepted());
    assert!(
        usize::try_from(status.closed["left-connecting"]).unwrap() >= 40 - slow,
        "{:?}",
        status.closed
    );
    // A client that waits for the server's first word is served all the same.
    let mut client = proxy.connect();
    client.send(&local);
    proxy.control().wait_counts(|it| it.active, 1);
    client.assert_echo(b"hello");
}

#[test]
fn a_client_that_resets_within_its_header_is_no_failure() {
    let upstream = Upstream::tcp(echo);
    let proxy = accepting(&upstream).start();
    let mut client = proxy.connect();
    client.send(&HEADER[..20]);
    proxy.control().wait_counts(|it| it.held, 1);
    client.reset();
    proxy.wait_for_log("cause=left-connecting");
    assert_eq!(proxy.log_count("within the PROXY header"), 0);
    assert_eq!(proxy.control().status().failed, 0);
}

/// Expects a header with addresses, as Postfix does, and greets.
fn postfix(mut stream: Stream) -> Received {
    let mut bytes = stream.receive(14);
    if !bytes.starts_with(b"PROXY TCP") {
        return Received { bytes, end: End::Eof };
    }
    while !bytes.ends_with(b"\r\n") {
        bytes.extend(stream.receive(1));
    }
    stream.send(b"220 hello\r\n");
    let Received { bytes: rest, end } = stream.receive_all();
    Received { bytes: [bytes, rest].concat(), end }
}

#[test]
fn checks_over_tcp_tell_the_addresses_of_their_socket() {
    for family in [Family::Tcp4, Family::Tcp6].into_iter().filter(|it| it.is_available()) {
        let upstream = Upstream::start(family, postfix);
        let addr = upstream.addr().to_string();
        let finished = program()
            .args(["--check-config", "--upstream-send-proxy", "v1", "--upstream-addr", &addr])
            .run();
        assert_eq!(finished.code, 0, "{finished:?}");
        let said = finished.stdout + &finished.stderr;
        assert!(!said.contains("does the server expect"), "{said}");
        let ends = if family == Family::Tcp4 { "TCP4 127.0.0.1 127.0.0.1" } else { "TCP6 ::1 ::1" };
        let told = String::from_utf8(upstream.received().bytes).unwrap();
        assert!(told.starts_with(&format!("PROXY {ends} ")), "{told}");
        assert!(told.ends_with(&format!(" {}\r\n", upstream.addr().port())), "{told}");
    }
}
