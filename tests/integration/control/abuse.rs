//! The control API under requests that mean no good: it goes on answering, and nothing grows.

use std::{
    io::{Read, Write},
    time::{Duration, Instant},
};

use crate::harness::{Control, End, Family, Proxy, Response, Stream, Upstream, echo, wait_until};

const GET: &[u8] = b"GET /paused HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";

/// Whoever is not answered well is closed after so long; a busy machine may take twice that.
const CLOSED_AFTER: Duration = Duration::from_secs(5);

/// More memory than this is a leak or a buffer without bound.
const MEMORY_MAX_KIB: usize = 64 << 10;

fn proxy() -> (Upstream, Proxy) {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::to(&upstream);
    // Whatever the API starts with its first request is there from now on.
    assert_alive(proxy.control());
    (upstream, proxy)
}

#[track_caller]
fn assert_alive(control: &Control) {
    let response = control.get("/paused");
    assert_eq!((response.status, response.text()), (200, r#"{"paused": false}"#));
}

/// Returns whether the answer is an error, or nothing at all.
#[track_caller]
fn assert_refused(request: &[u8], answer: &[u8]) {
    if !answer.is_empty() {
        let status = Response::parse(answer).status;
        assert!(
            (400..=599).contains(&status),
            "{status} to {:?}",
            String::from_utf8_lossy(request)
        );
    }
}

#[test]
fn a_request_may_come_byte_by_byte() {
    let (_upstream, proxy) = proxy();
    let mut slow = proxy.control().addr().connect();
    for (number, byte) in GET.iter().enumerate() {
        slow.send(&[*byte]);
        if number % 8 == 0 {
            assert_alive(proxy.control());
        }
    }
    assert_eq!(Response::read(&mut slow).text(), r#"{"paused": false}"#);
}

#[test]
fn silent_and_half_requests_block_nobody() {
    let (_upstream, proxy) = proxy();
    let descriptors = proxy.descriptors();
    let mut idlers: Vec<Stream> = (0..50).map(|_| proxy.control().addr().connect()).collect();
    for (number, idler) in idlers.iter_mut().enumerate() {
        idler.send(&GET[..number % GET.len()]);
    }
    for _ in 0..20 {
        assert_alive(proxy.control());
    }
    assert!(proxy.threads() < 40, "{} threads", proxy.threads());
    // Nobody may stay for ever: each is closed at its deadline.
    for mut idler in idlers {
        let received = idler.receive_all();
        assert!(matches!(received.end, End::Eof | End::Reset), "{received:?}");
        assert_refused(b"half a request", &received.bytes);
    }
    wait_until("no descriptor is left", || proxy.descriptors() <= descriptors);
    assert_alive(proxy.control());
}

#[test]
fn a_crowd_of_silent_clients_is_outlasted() {
    let (_upstream, proxy) = proxy();
    let _crowd: Vec<Stream> = (0..500).map(|_| proxy.control().addr().connect()).collect();
    wait_until("the API answers", || proxy.control().probe() == Some(200));
    assert!(proxy.threads() < 40, "{} threads", proxy.threads());
}

#[test]
fn a_burst_of_connections_that_are_kept_is_answered() {
    let (_upstream, proxy) = proxy();
    let mut clients: Vec<Stream> = (0..40).map(|_| proxy.control().addr().connect()).collect();
    for client in &mut clients {
        client.send(b"GET /paused HTTP/1.1\r\nHost: localhost\r\n\r\n");
    }
    for client in &mut clients {
        let mut answer = Vec::new();
        while !answer.ends_with(b"}") {
            let mut buffer = [0; 512];
            let length = client.read(&mut buffer).unwrap();
            assert_ne!(length, 0, "{:?}", String::from_utf8_lossy(&answer));
            answer.extend_from_slice(&buffer[..length]);
        }
        assert_eq!(Response::parse(&answer).text(), r#"{"paused": false}"#);
    }
}

#[test]
fn an_endless_head_is_cut_off() {
    const CHUNK: usize = 64 << 10;
    let (_upstream, proxy) = proxy();
    let chunk = vec![b'a'; CHUNK];
    for start in ["GET /paused HTTP/1.1\r\nX: ", "GET /", "X"] {
        let mut stream = proxy.control().addr().connect();
        stream.send(start.as_bytes());
        let mut sent = 0;
        while stream.write_all(&chunk).is_ok() {
            sent += CHUNK;
            assert!(sent < 64 << 20, "64 MiB of head were taken");
        }
        assert_alive(proxy.control());
    }
    let many =
        [b"GET /paused HTTP/1.1\r\nHost: localhost\r\n".to_vec(), b"A: b\r\n".repeat(100_000)]
            .concat();
    assert_refused(&many, &proxy.control().raw(&many));
    assert!(proxy.memory_kib() < MEMORY_MAX_KIB, "{} KiB", proxy.memory_kib());
    assert_alive(proxy.control());
}

#[test]
fn a_large_body_is_refused() {
    let (_upstream, proxy) = proxy();
    let mut request =
        b"PUT /paused HTTP/1.1\r\nHost: localhost\r\nContent-Length: 8388608\r\n\r\n".to_vec();
    request.resize(request.len() + (8 << 20), b'x');
    assert_refused(&request, &proxy.control().raw(&request));
    assert!(proxy.memory_kib() < MEMORY_MAX_KIB, "{} KiB", proxy.memory_kib());
    assert_alive(proxy.control());
}

/// The requests that are refused, each with its status; the method, a host that is ours and the header of chunks are put in.
const REFUSED: &[(u16, &str)] = &[
    // Framing that two readers could read in two ways, or that is too large to be meant.
    (413, "{M} /paused HTTP/1.1\r\n{H}\r\nContent-Length: 70368744177664\r\n\r\n"),
    (413, "{M} /paused HTTP/1.1\r\n{H}\r\nContent-Length: 9223372036854775808\r\n\r\n"),
    (413, "{M} /paused HTTP/1.1\r\n{H}\r\nContent-Length: 99999999999999999999999999\r\n\r\n"),
    (413, "{M} /paused HTTP/1.1\r\n{H}\r\nContent-Length: 8388608\r\n\r\n"),
    (400, "{M} /paused HTTP/1.1\r\n{H}\r\nContent-Length: -1\r\n\r\n"),
    (400, "{M} /paused HTTP/1.1\r\n{H}\r\nContent-Length: +2\r\n\r\n{}"),
    (400, "{M} /paused HTTP/1.1\r\n{H}\r\nContent-Length: 0x2\r\n\r\n{}"),
    (400, "{M} /paused HTTP/1.1\r\n{H}\r\nContent-Length:\r\n\r\n"),
    (400, "{M} /paused HTTP/1.1\r\n{H}\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}"),
    (400, "{M} /paused HTTP/1.1\r\n{H}\r\n{T}\r\nContent-Length: 2\r\n\r\n{}"),
    (400, "{M} /paused HTTP/1.1\r\n{H}\r\nContent-Length: 5\r\n{T}\r\n\r\n0\r\n\r\n"),
    (400, "{M} /paused HTTP/1.1\r\n{H}\r\n{T}\r\n{T}\r\n\r\n0\r\n\r\n"),
    (400, "{M} /paused HTTP/1.0\r\n{H}\r\n{T}\r\n\r\n0\r\n\r\n"),
    (400, "{M} /paused HTTP/1.1\r\n{H}\r\nTransfer-Encoding : chunked\r\n\r\n0\r\n\r\n"),
    (501, "{M} /paused HTTP/1.1\r\n{H}\r\nTransfer-Encoding: identity\r\n\r\n"),
    (501, "{M} /paused HTTP/1.1\r\n{H}\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n"),
    (501, "{M} /paused HTTP/1.1\r\n{H}\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n"),
    // Chunks that are none, or too many.
    (400, "{M} /paused HTTP/1.1\r\n{H}\r\n{T}\r\n\r\n{}"),
    (400, "{M} /paused HTTP/1.1\r\n{H}\r\n{T}\r\n\r\n-1\r\n"),
    (400, "{M} /paused HTTP/1.1\r\n{H}\r\n{T}\r\n\r\n0x2\r\n{}\r\n0\r\n\r\n"),
    (400, "{M} /paused HTTP/1.1\r\n{H}\r\n{T}\r\n\r\n2\n{}\n0\n\n"),
    (400, "{M} /paused HTTP/1.1\r\n{H}\r\n{T}\r\n\r\n2;a\nb\r\n{}\r\n0\r\n\r\n"),
    (400, "{M} /paused HTTP/1.1\r\n{H}\r\n{T}\r\n\r\n1\r\n{}\r\n0\r\n\r\n"),
    (400, "{M} /paused HTTP/1.1\r\n{H}\r\n{T}\r\n\r\n0\r\nNo colon\r\n\r\n"),
    (413, "{M} /paused HTTP/1.1\r\n{H}\r\n{T}\r\n\r\n4001\r\n"),
    (413, "{M} /paused HTTP/1.1\r\n{H}\r\n{T}\r\n\r\nffffffffffffffff\r\n"),
    (413, "{M} /paused HTTP/1.1\r\n{H}\r\n{T}\r\n\r\n10000000000000000\r\n"),
    (417, "{M} /paused HTTP/1.1\r\n{H}\r\nExpect: wonders\r\n\r\n"),
    (400, "{M} /paused HTTP/1.1\r\n{H}\r\nNo colon\r\n\r\n"),
    (400, "{M} /paused HTTP/1.1\r\n{H}\r\nSpace : before the colon\r\n\r\n"),
    (400, "{M} /paused HTTP/1.1\r\n{H}\r\nX: folded\r\n line\r\n\r\n"),
    // Control bytes.
    (400, "{M} /paused HTTP/1.1\r\n{H}\r\nX: nul\0\r\n\r\n"),
    (400, "{M} /paused HTTP/1.1\r\n{H}\r\nX: lonely\rreturn\r\n\r\n"),
    (400, "{M} /paused HTTP/1.1\r\n{H}\r\nX: lonely\nX-Caller: newline\r\n\r\n"),
    (400, "{M} /pau\0sed HTTP/1.1\r\n{H}\r\n\r\n"),
    (400, "{M} /paused HTTP/1.1\n{H}\n\n"),
    (400, "\0\0\0\0\r\n\r\n"),
    // Other protocols and other versions.
    (400, "{M} /paused\r\n\r\n"),
    (400, "{M}\r\n\r\n"),
    (505, "{M} /paused HTTP/0.9\r\n{H}\r\n\r\n"),
    (505, "{M} /paused HTTP/1.2\r\n{H}\r\n\r\n"),
    (505, "{M} /paused HTTP/2.0\r\n{H}\r\n\r\n"),
    (505, "{M} /paused HTTP/9\r\n{H}\r\n\r\n"),
    (505, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    (400, "\x16\x03\x01\x02\0\x01\0\x01\u{7c}\x03\x03\r\n\r\n"),
    (400, "{M}  /paused  HTTP/1.1\r\n{H}\r\n\r\n"),
    (400, "{M} paused HTTP/1.1\r\n{H}\r\n\r\n"),
    (501, "m{M} /paused HTTP/1.1\r\n{H}\r\n\r\n"),
    // Who has not been sent by the operator.
    (400, "{M} /paused HTTP/1.1\r\n\r\n"),
    (400, "{M} /paused HTTP/1.1\r\n{H}\r\nHost: evil.example\r\n\r\n"),
    (403, "{M} /paused HTTP/1.1\r\nHost: evil.example\r\n\r\n"),
    (403, "{M} /paused HTTP/1.1\r\nHost: \u{e4}\r\n\r\n"),
    (403, "{M} http://evil.example/paused HTTP/1.1\r\n{H}\r\n\r\n"),
    (403, "{M} /paused HTTP/1.1\r\n{H}\r\nOrigin: http://localhost\r\n\r\n"),
    (403, "{M} /paused HTTP/1.1\r\n{H}\r\nOrigin:\r\n\r\n"),
    (403, "{M} /paused HTTP/1.1\r\n{H}\r\nSec-Fetch-Site: cross-site\r\n\r\n"),
    (403, "{M} /paused HTTP/1.1\r\n{H}\r\nSec-Fetch-Site: same-site\r\n\r\n"),
    (403, "{M} /paused HTTP/1.1\r\n{H}\r\nSec-Fetch-Site:\r\n\r\n"),
    (400, "{M} /paused HTTP/1.1\r\n{H}\r\nSec-Fetch-Site: none\r\nSec-Fetch-Site: none\r\n\r\n"),
    // What never becomes whole.
    (408, ""),
    (408, "\r\n\r\n\r\n\r\n"),
    (408, "{M} /paused HTTP/1.1\r\n{H}\r\n"),
    (408, "{M} /paused HTTP/1.1\r\n{H}\r\nContent-Length: 3\r\n\r\n{}"),
    (408, "{M} /paused HTTP/1.1\r\n{H}\r\n{T}\r\n\r\n2\r\n{}\r\n0\r\n"),
    (408, "{M} /paused HTTP/1.1\r\n{H}\r\n{T}\r\n\r\n3\r\n{}"),
];

#[test]
fn what_is_refused_has_its_status_and_changes_nothing() {
    for family in [Family::Tcp4, Family::Unix] {
        let upstream = Upstream::tcp(echo);
        let proxy = Proxy::builder().control(family).upstream(&upstream).start();
        for (paused, method) in [(false, "PUT"), (true, "DELETE")] {
            if paused {
                proxy.control().pause();
            }
            let (descriptors, threads) = (proxy.descriptors(), proxy.threads());
            // All at once, as one that waits for more costs its deadline.
            let mut callers: Vec<Stream> = Vec::new();
            let begin = Instant::now();
            for (_, request) in REFUSED {
                let request = request
                    .replace("{M}", method)
                    .replace("{H}", "Host: localhost")
                    .replace("{T}", "Transfer-Encoding: chunked");
                let mut caller = proxy.control().addr().connect();
                caller.send(request.as_bytes());
                callers.push(caller);
            }
            for (caller, (status, request)) in callers.iter_mut().zip(REFUSED) {
                let received = caller.receive_all();
                assert_eq!(received.end, End::Eof, "{request:?}");
                let response = Response::parse(&received.bytes);
                assert_eq!(response.status, *status, "{request:?}: {response}");
                response.assert_error(*status);
            }
            let elapsed = begin.elapsed();
            assert!(elapsed < 2 * CLOSED_AFTER, "the last of them was closed after {elapsed:?}");
            println!("{} requests refused within {elapsed:?}", REFUSED.len());
            drop(callers);
            assert_eq!(proxy.control().is_paused(), paused);
            wait_until("no descriptor is left", || proxy.descriptors() <= descriptors);
            wait_until("no thread is left", || proxy.has_no_more_threads_than(threads));
        }
    }
}

#[test]
fn a_body_in_endless_chunks_is_cut_off() {
    // More than is read, and little enough for what lies between the two.
    const BODY_BYTES: usize = 64 << 10;
    let (_upstream, proxy) = proxy();
    let head = "PUT /paused HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n";
    for (begin, again) in [
        ("", "1\r\n{\r\n"),
        ("", "3e8\r\n{}\r\n"),
        ("0", "0"),
        ("1;", "extension"),
        ("0\r\n", "Trailer: one of many\r\n"),
        ("0\r\nTrailer: ", "an endless one"),
    ] {
        let again = again.replace("{}", &"x".repeat(1000));
        let request = format!("{head}{begin}{}", again.repeat(BODY_BYTES / again.len()));
        Response::parse(&proxy.control().raw(request.as_bytes())).assert_error(413);
        assert_alive(proxy.control());
    }
}

#[test]
fn a_body_that_never_comes_blocks_nobody() {
    let (_upstream, proxy) = proxy();
    let mut waiting = proxy.control().addr().connect();
    waiting.send(b"PUT /paused HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1025\r\n\r\n");
    let mut expecting = proxy.control().addr().connect();
    expecting.send(b"PUT /paused HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n");
    for _ in 0..20 {
        let response = proxy.control().get("/status");
        assert_eq!(response.status, 200);
    }
}

#[test]
fn an_expecting_client_is_answered() {
    let (_upstream, proxy) = proxy();
    let mut client = proxy.control().addr().connect();
    client.send(b"PUT /paused HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n{}");
    let received = client.receive_all();
    let answer =
        received.bytes.strip_prefix(b"HTTP/1.1 100 Continue\r\n\r\n").unwrap_or(&received.bytes);
    // To refuse the expectation is allowed too, but not to leave the client alone.
    let status = Response::parse(answer).status;
    assert!(status == 201 || status == 417, "{status}");
    assert_eq!(proxy.control().is_paused(), status == 201);
}

#[test]
fn a_request_behind_a_waiting_one_blocks_nobody() {
    let (_upstream, proxy) = proxy();
    let mut carried = proxy.connect();
    carried.assert_echo(b"so that it is not idle");
    for _ in 0..5 {
        let mut pipelined = proxy.control().addr().connect();
        pipelined.send(b"GET /paused/block-until-idle HTTP/1.1\r\nHost: localhost\r\n\r\n");
        pipelined.send(b"GET /paused HTTP/1.1\r\nHost: localhost\r\n\r\n");
        assert_alive(proxy.control());
        drop(pipelined);
        assert_alive(proxy.control());
    }
    drop(carried);
    proxy.control().wait_idle();
}

#[test]
fn a_client_that_does_not_read_blocks_nobody() {
    let (_upstream, proxy) = proxy();
    let many = GET.repeat(200);
    let mut deaf: Vec<Stream> = (0..10).map(|_| proxy.control().addr().connect()).collect();
    for stream in &mut deaf {
        // The other side may close in the middle of it.
        drop(stream.write_all(&many));
    }
    for _ in 0..20 {
        assert_alive(proxy.control());
    }
}

#[test]
fn a_port_scan_leaves_nothing_behind() {
    let (_upstream, proxy) = proxy();
    let (descriptors, threads) = (proxy.descriptors(), proxy.threads());
    for round in 0..200 {
        let mut stream = proxy.control().addr().connect();
        if round % 3 == 1 {
            stream.send(&GET[..20]);
        } else if round % 3 == 2 {
            stream.send(GET);
        }
        stream.reset();
    }
    assert_alive(proxy.control());
    wait_until("no descriptor is left", || proxy.descriptors() <= descriptors);
    wait_until("no thread is left", || proxy.has_no_more_threads_than(threads));
}

#[test]
fn an_answer_never_repeats_what_was_sent() {
    let (_upstream, proxy) = proxy();
    let answer = proxy.control().raw(
        b"GET /a%0d%0aSet-Cookie:%20x=1 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nX: <script>\r\n\r\n",
    );
    let response = Response::parse(&answer);
    response.assert_error(404);
    assert!(response.header("Set-Cookie").is_none());
}
