//! Rejecting by other means than a 503, and protocols that a 503 means nothing to.

use std::fs;

use crate::harness::{
    Authority, Builder, End, Family, Proxy, Received, TlsClient, Upstream, echo, pattern, program,
};

/// The beginnings of conversations in other protocols than HTTP: the banner of SSH, and PostgreSQL's requests for
/// TLS, for GSSAPI and to cancel, and its startup message.
const OTHERS: [&[u8]; 5] = [
    b"SSH-2.0-OpenSSH_9.2\r\n",
    b"\0\0\0\x08\x04\xd2\x16\x2f",
    b"\0\0\0\x08\x04\xd2\x16\x30",
    b"\0\0\0\x10\x04\xd2\x16\x2e\0\0\0\x01\0\0\0\x02",
    b"\0\0\0\x13\0\x03\0\0user\0anna\0\0",
];

fn rejecting(upstream: &Upstream, with: &str) -> Builder {
    Proxy::builder().upstream(upstream).args([
        "--proxy-reject-clients",
        "--proxy-reject-with",
        with,
    ])
}

/// Returns the bytes that a client reads that has sent `request`.
fn exchange(proxy: &Proxy, request: &[u8]) -> Received {
    let mut client = proxy.connect();
    client.send(request);
    client.receive_all()
}

#[track_caller]
fn assert_closed(received: &Received) {
    assert_eq!((received.bytes.as_slice(), received.end), (&b""[..], End::Eof));
}

#[test]
fn a_client_of_ssh_or_postgresql_gets_no_http_text() {
    for family in [Family::Tcp4, Family::Unix] {
        let upstream = Upstream::tcp(echo);
        let proxy = rejecting(&upstream, "http").listen(family).start();
        proxy.control().pause();
        for bytes in OTHERS {
            assert_closed(&exchange(&proxy, bytes));
            // In two parts, the first of which may be anything.
            let mut client = proxy.connect();
            client.send(&bytes[..2]);
            client.send(&bytes[2..]);
            assert_closed(&client.receive_all());
        }
        proxy.control().wait_counts(|status| (status.rejected, status.rejecting), (10, 0));
        proxy.control().resume();
        for bytes in OTHERS {
            proxy.connect().assert_echo(bytes);
        }
    }
}

#[test]
fn a_client_of_postgresql_inside_tls_gets_no_http_text() {
    let authority = Authority::new("ours");
    let upstream = Upstream::tcp(echo);
    let builder = rejecting(&upstream, "http");
    let files = authority.write_files(builder.path("").as_path());
    let proxy = builder.args(files.options()).start();
    proxy.control().pause();
    let answer = TlsClient::new(&authority).exchange(proxy.connect(), OTHERS[4]).unwrap();
    assert_eq!(answer, b"", "closed by close_notify");
}

#[test]
fn close_ends_the_stream_in_order_whatever_the_client_sends() {
    let large = pattern(1, 1 << 20);
    for family in [Family::Tcp4, Family::Unix] {
        let upstream = Upstream::tcp(echo);
        let proxy = rejecting(&upstream, "close").listen(family).start();
        proxy.control().pause();
        for request in [&b""[..], b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01", OTHERS[0], &large] {
            assert_closed(&exchange(&proxy, request));
        }
        proxy.control().wait_counts(|status| (status.rejected, status.rejecting), (5, 0));
        proxy.control().resume();
        proxy.connect().assert_echo(b"resumed");
    }
}

#[test]
fn reset_resets_at_once() {
    let upstream = Upstream::tcp(echo);
    let proxy = rejecting(&upstream, "reset").start();
    let before = proxy.descriptors();
    proxy.control().pause();
    for _ in 0..20 {
        // It says nothing, and may be reset before it knows that it is connected.
        match proxy.addr().try_connect() {
            Ok(mut client) => {
                let received = client.receive_all();
                assert_eq!((received.bytes.as_slice(), received.end), (&b""[..], End::Reset));
            }
            Err(error) => assert_eq!(End::from(error), End::Reset),
        }
    }
    proxy.control().wait_counts(|status| (status.rejected, status.rejecting), (20, 0));
    crate::harness::wait_until("all are closed", || proxy.descriptors() == before);
    proxy.control().resume();
    proxy.connect().assert_echo(b"resumed");
}

#[test]
fn reset_on_a_unix_socket_is_a_close() {
    let upstream = Upstream::tcp(echo);
    let proxy = rejecting(&upstream, "reset").listen(Family::Unix).start();
    proxy.control().pause();
    assert_closed(&proxy.connect().receive_all());
}

#[test]
fn a_file_is_the_whole_answer() {
    let authority = Authority::new("ours");
    for length in [1, 1_000, 64 << 10] {
        let content = pattern(2, length);
        let upstream = Upstream::tcp(echo);
        let builder = rejecting(&upstream, "file:sorry").file("sorry", &content);
        let files = authority.write_files(builder.path("").as_path());
        let proxy = builder.args(files.options()).start();
        // It was read at the start.
        fs::remove_file(proxy.dir().join("sorry")).unwrap();
        proxy.control().pause();
        // The silent one is answered too, and one that sends much before it reads.
        for request in [&b""[..], b"EHLO me\r\n", OTHERS[0], OTHERS[1], &pattern(3, 1 << 20)] {
            let received = exchange(&proxy, request);
            assert_eq!(received.end, End::Eof);
            assert!(received.bytes == content, "{} other bytes", received.bytes.len());
        }
        for request in [&b"EHLO me\r\n"[..], OTHERS[4], &pattern(3, 1 << 20)] {
            let answer = TlsClient::new(&authority).exchange(proxy.connect(), request).unwrap();
            assert!(answer == content, "{} other bytes inside TLS", answer.len());
        }
        proxy.control().wait_counts(|status| (status.rejected, status.rejecting), (8, 0));
    }
}

#[test]
fn a_way_to_reject_that_does_not_work_is_refused_at_start() {
    for (with, words) in [
        ("file:missing", &["reject-with", "missing", "check the path"][..]),
        ("file:/", &["reject-with", "not a file"]),
        ("file:empty", &["reject-with", "empty", "close"]),
        ("file:large", &["reject-with", "large", "65536"]),
        ("file:", &["reject-with", "file:/"]),
        ("nothing", &["reject-with", "nothing", "http, close, reset or file:PATH"]),
    ] {
        for check in [&[][..], &["--check-config"]] {
            let finished = program()
                .file("empty", "")
                .file("large", pattern(1, (64 << 10) + 1))
                .args(["--proxy-reject-with", with])
                .args(check)
                .run();
            assert_eq!((finished.code, &*finished.stdout), (2, ""), "{finished:?}");
            for word in words {
                assert!(finished.stderr.contains(word), "no {word:?} in {finished:?}");
            }
        }
    }
}
