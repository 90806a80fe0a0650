//! `drain=quiet:…`: while paused, connections that have fallen silent are closed in good order.

use std::{
    io::Write,
    net::Shutdown,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use crate::harness::{
    Control, End, Family, Proxy, Received, Response, Stream, Upstream, assert_same, echo, pattern,
    spawn, wait_until,
};

/// The silence that is asked for.
const QUIET: Duration = Duration::from_millis(300);

/// Long enough for whatever is quiet to be closed.
const LONG: Duration = Duration::from_millis(2500);

const FAMILIES: [Family; 2] = [Family::Tcp4, Family::Unix];

fn proxy(family: Family, upstream: &Upstream) -> Proxy {
    Proxy::builder().listen(family).upstream(upstream).args(["--proxy-threads", "2"]).start()
}

#[track_caller]
fn pause(control: &Control) {
    let response = control.put("/paused?drain=quiet:300ms");
    assert_eq!(response.status, 201, "{response}");
}

/// A client that has had an answer.
fn served(proxy: &Proxy) -> Stream {
    let mut client = proxy.connect();
    client.assert_echo(b"question");
    client
}

#[track_caller]
fn assert_ends_in_order(client: &mut Stream) {
    assert_eq!(client.receive_all(), Received { bytes: Vec::new(), end: End::Eof });
}

#[test]
fn quiet_connections_end_in_order_beside_busy_ones() {
    const QUIET_ONES: usize = 30;
    for family in FAMILIES {
        let upstream = Upstream::start(family, echo);
        let proxy = proxy(family, &upstream);
        let mut quiet: Vec<_> = (0..QUIET_ONES).map(|_| served(&proxy)).collect();
        // One that never carried anything.
        quiet.push(proxy.connect());
        let mut busy = served(&proxy);
        proxy.control().wait_counts(|status| status.active, QUIET_ONES as u64 + 2);
        let control = proxy.control().clone();
        let begin = Instant::now();
        let waits = spawn(move || control.put("/paused?drain=quiet:300ms&wait=20s"));
        let ends: Vec<_> = quiet
            .into_iter()
            .map(|mut client| {
                spawn(move || {
                    assert_ends_in_order(&mut client);
                    Instant::now()
                })
            })
            .collect();
        while proxy.control().status().active > 1 {
            busy.assert_echo(b"still busy");
        }
        busy.assert_echo(b"still busy");
        assert!(!waits.is_finished(), "a busy connection runs");
        let mut ends: Vec<_> = ends.into_iter().map(|end| end.join().unwrap() - begin).collect();
        ends.sort();
        println!("{family:?}: quiet for {QUIET:?}, ended after {:?} to {:?}", ends[0], ends[30]);
        assert!(
            ends[30] > ends[0] + Duration::from_millis(100),
            "not all in one instant: {ends:?}"
        );
        assert_ends_in_order(&mut busy);
        let response: Response = waits.join().unwrap();
        assert_eq!(response.status, 201, "{response}");
        for _ in 0..QUIET_ONES + 2 {
            assert_eq!(upstream.session().received.end, End::Eof);
        }
        let status = proxy.control().status();
        assert_eq!((status.drained, status.active, status.failed), (QUIET_ONES as u64 + 2, 0, 0));
        proxy.control().wait_status("their causes are counted", |status| {
            status.closed["drained"] == QUIET_ONES as u64 + 2 && status.closed["ended"] == 0
        });
    }
}

#[test]
fn whoever_waits_for_an_answer_is_not_quiet() {
    for family in FAMILIES {
        let upstream = Upstream::start(family, |mut stream| {
            let request = stream.receive(8);
            thread::sleep(LONG);
            stream.send(b"answer");
            Received { bytes: request, end: stream.receive_all().end }
        });
        let proxy = proxy(family, &upstream);
        let mut client = proxy.connect();
        client.send(b"question");
        proxy.control().wait_counts(|status| status.bytes_to_upstream, 8);
        pause(proxy.control());
        assert_eq!(client.receive(6), b"answer");
        assert_ends_in_order(&mut client);
        proxy.control().wait_counts(|status| (status.drained, status.active), (1, 0));
    }
}

#[test]
fn an_answer_that_its_client_has_not_taken_is_not_cut() {
    const BYTES: usize = 16 << 20;
    for family in FAMILIES {
        let upstream = Upstream::start(family, |mut stream| {
            let request = stream.receive(8);
            drop(stream.write_all(&pattern(5, BYTES)));
            Received { bytes: request, end: stream.receive_all().end }
        });
        let proxy = proxy(family, &upstream);
        let mut client = proxy.connect();
        client.send(b"question");
        assert_eq!(client.receive(1), pattern(5, BYTES)[..1]);
        pause(proxy.control());
        // It reads nothing for far longer than is quiet: the answer waits, in part in the kernel.
        thread::sleep(LONG);
        assert_eq!(proxy.control().status().active, 1);
        assert_same(&client.receive(BYTES - 1), &pattern(5, BYTES)[1..]);
        assert_ends_in_order(&mut client);
    }
}

#[test]
fn a_request_that_crosses_the_end_causes_no_reset() {
    for family in FAMILIES {
        let upstream = Upstream::start(family, echo);
        let proxy = proxy(family, &upstream);
        let mut client = served(&proxy);
        pause(proxy.control());
        proxy.control().wait_counts(|status| status.drained, 1);
        client.send(b"too late");
        assert_ends_in_order(&mut client);
        assert_eq!(upstream.received(), Received { bytes: b"question".into(), end: End::Eof });
    }
}

/// An ended stream owes nothing: the server has ended its idle one, and the client notices at its next use.
#[test]
fn a_connection_whose_server_has_ended_its_stream_is_quiet() {
    for family in FAMILIES {
        let upstream = Upstream::start(family, |mut stream| {
            let bytes = stream.receive(8);
            stream.send(b"answer");
            stream.finish();
            Received { bytes, end: stream.receive_all().end }
        });
        let proxy = proxy(family, &upstream);
        let mut client = proxy.connect();
        client.send(b"question");
        assert_eq!(client.receive(6), b"answer");
        assert_ends_in_order(&mut client);
        proxy.control().wait_counts(|status| status.active, 1);
        let response = proxy.control().put("/paused?drain=quiet:300ms&wait=20s");
        assert_eq!(response.status, 201, "{response}");
        assert_eq!(upstream.received().end, End::Eof);
        proxy.control().wait_counts(|status| (status.drained, status.active), (1, 0));
    }
}

/// A client that has ended its stream and has its answer owes nothing, nor does its server.
#[test]
fn a_connection_whose_client_has_ended_its_stream_is_quiet_once_it_was_answered() {
    for family in FAMILIES {
        let is_over = Arc::new(AtomicBool::new(false));
        let upstream = Upstream::start(family, {
            let is_over = Arc::clone(&is_over);
            move |mut stream| {
                let received = stream.receive_all();
                thread::sleep(LONG);
                stream.send(b"answer");
                wait_until("the test is over", || is_over.load(Ordering::SeqCst));
                received
            }
        });
        let proxy = proxy(family, &upstream);
        let mut client = proxy.connect();
        client.send(b"question");
        client.finish();
        proxy.control().wait_counts(|status| status.bytes_to_upstream, 8);
        pause(proxy.control());
        assert_eq!(client.receive(6), b"answer", "an answer is owed for far longer than is quiet");
        assert_ends_in_order(&mut client);
        proxy.control().wait_counts(|status| (status.drained, status.active), (1, 0));
        is_over.store(true, Ordering::SeqCst);
        assert_eq!(upstream.received(), Received { bytes: b"question".into(), end: End::Eof });
    }
}

/// A server that reads no more owes nothing to what is discarded for it.
#[test]
fn a_connection_whose_server_takes_nothing_any_more_is_quiet() {
    let is_over = Arc::new(AtomicBool::new(false));
    // Over TCP, a socket that is shut for reading takes bytes all the same.
    let upstream = Upstream::start(Family::Unix, {
        let is_over = Arc::clone(&is_over);
        move |mut stream| {
            let bytes = stream.receive(8);
            let Stream::Unix(socket) = &stream else { panic!("a UNIX upstream") };
            socket.shutdown(Shutdown::Read).unwrap();
            stream.send(b"answer");
            wait_until("the test is over", || is_over.load(Ordering::SeqCst));
            Received { bytes, end: End::Eof }
        }
    });
    let proxy = proxy(Family::Tcp4, &upstream);
    let mut client = proxy.connect();
    client.send(b"question");
    assert_eq!(client.receive(6), b"answer");
    client.send(b"taken by nobody");
    pause(proxy.control());
    assert_ends_in_order(&mut client);
    proxy.control().wait_counts(|status| (status.drained, status.active), (1, 0));
    is_over.store(true, Ordering::SeqCst);
    assert_eq!(upstream.received().bytes, b"question");
}

#[test]
fn without_a_pause_silence_is_no_reason() {
    let upstream = Upstream::tcp(echo);
    let proxy = proxy(Family::Tcp4, &upstream);
    let mut client = served(&proxy);
    // Another pause goes on, and does not want it.
    assert_eq!(proxy.control().put("/paused?name=other").status, 201);
    assert_eq!(proxy.control().put("/paused?drain=quiet:30s").status, 201);
    pause(proxy.control());
    assert_eq!(proxy.control().delete("/paused?name=default").status, 204);
    thread::sleep(LONG);
    client.assert_echo(b"still here");
    assert_eq!(proxy.control().status().drained, 0);
}

#[test]
fn a_shorter_silence_that_is_asked_for_later_counts_at_once() {
    let upstream = Upstream::tcp(echo);
    let proxy = proxy(Family::Tcp4, &upstream);
    let mut client = served(&proxy);
    assert_eq!(proxy.control().put("/paused?drain=quiet:1h").status, 201);
    pause(proxy.control());
    assert_ends_in_order(&mut client);
}
