//! The bounds of held clients: their number and their time, and the end of those beyond.

use std::{
    io::Write as _,
    time::{Duration, Instant},
};

use crate::harness::{Builder, End, Family, Proxy, Received, Response, Upstream, echo};

/// The bytes and the end of a client that is closed in order.
const CLOSED: Received = Received { bytes: Vec::new(), end: End::Eof };

const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nHost: service\r\n\r\n";

/// A proxy of two workers: what is bounded is the sum.
fn builder(upstream: &Upstream, max: usize) -> Builder {
    let max = max.to_string();
    Proxy::builder().upstream(upstream).args(["--proxy-threads", "2", "--hold-max", &max])
}

/// Whatever the workers could have done with those who are there, they have done: a pause answers when each of them has ended
/// a turn, and it is one already.
fn settle(proxy: &Proxy) {
    proxy.control().pause();
    proxy.control().pause();
}

#[test]
fn further_clients_wait_in_the_backlog_and_are_served_on_resume() {
    for family in [Family::Tcp4, Family::Unix] {
        let upstream = Upstream::tcp(echo);
        let proxy = builder(&upstream, 3).listen(family).start();
        proxy.control().pause();
        let mut clients: Vec<_> = (0..10).map(|_| proxy.connect()).collect();
        for (client, number) in clients.iter_mut().zip(0..) {
            client.send(&[number]);
        }
        proxy.control().wait_counts(|status| status.held, 3);
        settle(&proxy);
        let status = proxy.control().status();
        assert_eq!((status.held, status.accepted, status.rejected), (3, 3, 0), "{family:?}");

        proxy.control().resume();
        for (client, number) in clients.iter_mut().zip(0..) {
            assert_eq!(client.receive(1), [number], "{family:?}");
        }
        // More are carried than may be held.
        proxy.connect().assert_echo(b"and one more");
        let status = proxy.control().status();
        assert_eq!((status.accepted, status.rejected, status.failed), (11, 0, 0));
    }
}

#[test]
fn a_client_of_the_backlog_is_accepted_when_a_held_one_leaves() {
    for family in [Family::Tcp4, Family::Unix] {
        let upstream = Upstream::tcp(echo);
        let proxy = builder(&upstream, 2).listen(family).start();
        proxy.control().pause();
        let mut held = [proxy.connect_held(), proxy.connect_held()].into_iter();
        let mut waiting: Vec<_> = (0..6).map(|_| proxy.connect()).collect();
        settle(&proxy);
        for gone in 1..=2 {
            assert_eq!(proxy.control().status().accepted, 1 + gone, "{family:?}");
            drop(held.next());
            proxy.control().wait_counts(|status| (status.held, status.accepted), (2, 2 + gone));
            proxy.control().wait_counts(|status| status.left, gone);
            settle(&proxy);
        }
        proxy.control().resume();
        for client in &mut waiting {
            client.assert_echo(b"all of them");
        }
        assert_eq!(upstream.accepted(), waiting.len());
    }
}

#[test]
fn further_clients_are_rejected_at_once() {
    for family in [Family::Tcp4, Family::Unix] {
        let upstream = Upstream::tcp(echo);
        let proxy =
            builder(&upstream, 2).listen(family).args(["--hold-overflow", "reject"]).start();
        proxy.control().pause();
        let mut held = vec![proxy.connect_held(), proxy.connect_held()];
        for rejected in 1..=4 {
            let mut client = proxy.connect();
            client.send(REQUEST);
            let response = Response::read(&mut client);
            assert_eq!((response.status, response.header("Retry-After")), (503, Some("3")));
            proxy.control().wait_counts(|status| (status.held, status.rejected), (2, rejected));
        }
        // A place that is free again is taken by the next.
        drop(held.pop());
        proxy.control().wait_counts(|status| status.held, 1);
        held.push(proxy.connect_held());
        proxy.control().resume();
        for client in &mut held {
            client.assert_echo(b"held");
        }
        assert_eq!(upstream.accepted(), 2);
        proxy.control().wait_counts(|status| status.left, 1);
    }
}

/// Those who have said nothing yet need no answer: they are served behind those who are held, at the same pace.
#[test]
fn further_clients_that_are_silent_are_served_when_it_is_their_turn() {
    const SILENT: usize = 8;
    let upstream = Upstream::tcp(echo);
    let proxy =
        builder(&upstream, 2).args(["--hold-overflow", "reject", "--resume-rate", "20"]).start();
    proxy.control().pause();
    let held = [proxy.connect_held(), proxy.connect_held()];
    let silent: Vec<_> = (0..SILENT).map(|_| proxy.connect()).collect();
    proxy.control().wait_counts(|status| status.rejecting, SILENT as u64);
    proxy.control().resume();
    proxy.control().wait_counts(|status| status.active, 2 + SILENT as u64);
    for mut client in held.into_iter().chain(silent) {
        client.assert_echo(b"served");
    }
}

#[test]
fn further_clients_are_closed_at_once() {
    for family in [Family::Tcp4, Family::Unix] {
        let upstream = Upstream::tcp(echo);
        let proxy = builder(&upstream, 2).listen(family).args(["--hold-overflow", "close"]).start();
        proxy.control().pause();
        let mut held = [proxy.connect_held(), proxy.connect_held()];
        for bytes in [&b""[..], REQUEST] {
            let mut client = proxy.connect();
            // One that was closed already may refuse it.
            drop(client.write_all(bytes));
            assert_eq!(client.receive_all(), CLOSED, "{family:?}, {} bytes", bytes.len());
        }
        proxy.control().wait_counts(|status| (status.held, status.rejecting), (2, 0));
        proxy.control().resume();
        for client in &mut held {
            client.assert_echo(b"held");
        }
        assert_eq!((upstream.accepted(), proxy.control().status().left), (2, 0));
    }
}

#[test]
fn a_client_that_is_held_for_too_long_gets_the_overflow_action() {
    const TIMEOUT: Duration = Duration::from_millis(200);
    for overflow in ["reject", "close", "backlog"] {
        let upstream = Upstream::tcp(echo);
        let proxy = Proxy::builder()
            .upstream(&upstream)
            .args(["--hold-timeout", &format!("{TIMEOUT:?}"), "--hold-overflow", overflow])
            .start();
        proxy.control().pause();
        let begin = Instant::now();
        let mut client = proxy.connect();
        client.send(REQUEST);
        if overflow == "close" {
            assert_eq!(client.receive_all(), CLOSED);
        } else {
            assert_eq!(Response::read(&mut client).status, 503, "{overflow}");
            proxy.control().wait_counts(|status| status.rejected, 1);
        }
        assert!(begin.elapsed() >= TIMEOUT, "{overflow} after {:?}", begin.elapsed());
        drop(client);
        proxy.control().wait_counts(|status| (status.held, status.rejecting), (0, 0));
        assert_eq!((upstream.accepted(), proxy.control().status().left), (0, 0));

        // The bound is one for the hold, and not for the connection.
        proxy.control().resume();
        let mut served = proxy.connect();
        served.assert_echo(b"before");
        proxy.control().pause();
        let mut client = proxy.connect();
        client.send(REQUEST);
        drop(client.receive_all());
        served.assert_echo(b"behind a hold that was too long");
    }
}

#[test]
fn each_is_held_for_as_long_as_the_others() {
    const TIMEOUT: Duration = Duration::from_millis(500);
    let upstream = Upstream::tcp(echo);
    let proxy = builder(&upstream, 9)
        .args(["--hold-timeout", &format!("{TIMEOUT:?}"), "--hold-overflow", "close"])
        .start();
    proxy.control().pause();
    let clients = [(); 3].map(|()| (Instant::now(), proxy.connect()));
    for (begin, mut client) in clients {
        assert_eq!(client.receive_all(), CLOSED);
        assert!(begin.elapsed() >= TIMEOUT, "after {:?}", begin.elapsed());
    }
}

#[test]
fn a_hold_that_was_too_long_makes_room_for_the_next() {
    const TIMEOUT: Duration = Duration::from_millis(200);
    let upstream = Upstream::tcp(echo);
    let proxy = builder(&upstream, 1).args(["--hold-timeout", &format!("{TIMEOUT:?}")]).start();
    proxy.control().pause();
    let begin = Instant::now();
    let clients = [(); 3].map(|()| {
        let mut client = proxy.connect();
        client.send(REQUEST);
        client
    });
    for mut client in clients {
        assert_eq!(Response::read(&mut client).status, 503);
    }
    // Each has waited in the backlog until the one before it had been held for so long.
    assert!(begin.elapsed() >= TIMEOUT * 3, "after {:?}", begin.elapsed());
    proxy
        .control()
        .wait_counts(|status| (status.accepted, status.rejected, status.held), (3, 3, 0));
}

#[test]
fn those_who_leave_while_held_are_counted() {
    for family in [Family::Tcp4, Family::Unix] {
        let upstream = Upstream::tcp(echo);
        let proxy = Proxy::builder().listen(family).upstream(&upstream).start();
        proxy.connect().assert_echo(b"not held");
        proxy.control().wait_counts(|status| status.active, 0);
        proxy.control().pause();
        assert_eq!(proxy.control().status().left, 0);
        let mut clients: Vec<_> = (0..5).map(|_| proxy.connect_held()).collect();
        clients.pop().unwrap().reset();
        drop(clients.split_off(2));
        proxy.control().wait_counts(|status| status.held, 2);
        proxy.control().wait_counts(|status| status.left, 3);

        proxy.control().resume();
        for client in &mut clients {
            client.assert_echo(b"stayed");
        }
        drop(clients);
        proxy.control().wait_counts(|status| status.active, 0);
        let status = proxy.control().status();
        assert_eq!((status.failed, status.left), (0, 3), "those who are served do not count");
    }
}
