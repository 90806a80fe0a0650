//! One test for each bug that was found, named after it: in tcpause itself, or in the proxies it was measured against.

use std::{
    io::Write,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use crate::harness::{
    End, Family, Proxy, Received, Stream, Upstream, assert_same, echo, pattern, spawn, wait_until,
};

/// A small message and the FIN behind it come as one event: whoever stops at a short read never sees the end.
#[test]
fn data_and_fin_in_one_event() {
    let upstream = Upstream::tcp(|mut stream| {
        let received = stream.receive_all();
        stream.send(&received.bytes);
        received
    });
    let proxy = Proxy::to(&upstream);
    for round in 0..300 {
        let mut client = proxy.connect();
        let bytes = pattern(round, 1 + usize::try_from(round).unwrap());
        client.send(&bytes);
        client.finish();
        assert_eq!(client.receive_all(), Received { bytes, end: End::Eof });
    }
}

/// Lengths that fill a buffer exactly are the ones for which an end is missed or awaited.
#[test]
fn lengths_around_the_buffers() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::to(&upstream);
    for buffer in [4 << 10, 8 << 10, 16 << 10, 32 << 10, 64 << 10, 128 << 10, 1 << 20] {
        for length in [buffer - 1, buffer, buffer + 1] {
            let bytes = pattern(length as u64, length);
            let mut client = proxy.connect();
            assert_same(&client.round_trip(&bytes), &bytes);
            assert_same(&client.round_trip(&bytes), &bytes);
            client.finish();
            assert_eq!(client.receive_all(), Received { bytes: Vec::new(), end: End::Eof });
        }
    }
}

/// A client that comes between the bit of the pause and the release of the held ones must not be forgotten.
#[test]
fn a_client_between_pause_and_resume() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::to(&upstream);
    let goes_on = Arc::new(AtomicBool::new(true));
    let clients: Vec<_> = (0..8)
        .map(|_| {
            let (addr, goes_on) = (proxy.addr().clone(), goes_on.clone());
            spawn(move || {
                while goes_on.load(Ordering::SeqCst) {
                    addr.connect().assert_echo(b"nobody is forgotten");
                }
            })
        })
        .collect();
    for _ in 0..200 {
        proxy.control().pause();
        proxy.control().resume();
    }
    goes_on.store(false, Ordering::SeqCst);
    for client in clients {
        client.join().unwrap();
    }
    let accepted = upstream.accepted() as u64;
    proxy.control().wait_counts(
        |status| (status.active, status.held, status.connecting, status.failed, status.accepted),
        (0, 0, 0, 0, accepted),
    );
}

/// With edge-triggered events a burst that is larger than one turn accepts must not wait for the next client.
#[test]
fn a_burst_of_clients_that_all_wait_in_the_backlog() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::builder().upstream(&upstream).args(["--proxy-threads", "1"]).start();
    proxy.signal(rustix::process::Signal::STOP);
    let mut clients: Vec<_> = (0..1_000).map(|_| proxy.connect()).collect();
    for client in &mut clients {
        client.send(b"hello");
    }
    proxy.signal(rustix::process::Signal::CONT);
    for client in &mut clients {
        assert_eq!(client.receive(5), b"hello");
    }
    assert_eq!(upstream.accepted(), 1_000);
}

/// Clients that reset before they are accepted must not end the worker, nor be counted for ever.
#[test]
fn clients_that_reset_before_they_are_accepted() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::builder().upstream(&upstream).args(["--proxy-threads", "1"]).start();
    for paused in [false, true] {
        if paused {
            proxy.control().pause();
        }
        proxy.signal(rustix::process::Signal::STOP);
        let clients: Vec<_> = (0..50).map(|_| proxy.connect()).collect();
        for client in clients {
            client.reset();
        }
        proxy.signal(rustix::process::Signal::CONT);
        proxy.control().wait_status("nobody is left", |status| {
            status.held == 0 && status.active == 0 && status.connecting == 0
        });
    }
    proxy.control().resume();
    proxy.connect().assert_echo(b"all is as before");
}

/// An upstream that is blocked in writing to a client that has reset never comes to read what that client had sent.
#[test]
fn a_reset_reaches_an_upstream_that_is_blocked_in_writing() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::to(&upstream);
    let client = proxy.connect();
    let Stream::Tcp(stream) = &client else { panic!("the proxy listens on TCP") };
    stream.set_nonblocking(true).unwrap();
    // The client reads nothing, so the echo comes to a halt, and then the upload.
    let chunk = vec![7; 256 << 10];
    let mut carried = 0;
    wait_until("nothing moves any more", || {
        let before = std::mem::replace(&mut carried, proxy.control().status().bytes_to_upstream);
        let blocked = (&*stream).write(&chunk).is_err();
        blocked && before == carried && carried > 0
    });
    client.reset();
    proxy.control().wait_status("the connection has ended", |status| status.active == 0);
}

/// Nobody read what it wrote, so it never came to read the answer, and after 30 s that was lost.
#[test]
fn a_client_that_writes_on_hears_the_answer_of_a_unix_upstream_that_has_closed() {
    /// More than the client's socket takes unread, less than all buffers together.
    const ANSWER_BYTES: usize = 512 << 10;
    let upstream = Upstream::start(Family::Unix, |mut stream| {
        let bytes = stream.receive(5);
        stream.send(&pattern(1, ANSWER_BYTES));
        // It has read all that was sent: its close is in good order.
        Received { bytes, end: End::Eof }
    });
    let proxy = Proxy::builder().upstream(&upstream).start();
    let mut client = proxy.connect();
    client.send(b"hello");
    upstream.session();
    client.send(&pattern(2, 32 << 20));
    assert_same(&client.receive(ANSWER_BYTES), &pattern(1, ANSWER_BYTES));
}

/// A UNIX client that reads nothing ends one flow in good order. What its upstream goes on writing was read a share at each
/// event, and a writer that waits for most of its buffer to be free causes none: both waited for ever.
#[test]
fn an_upstream_that_writes_before_it_reads_hears_a_client_that_only_writes() {
    const BYTES: usize = 8 << 20;
    let upstream = Upstream::start(Family::Unix, |mut stream| {
        stream.write_all(&pattern(1, BYTES)).expect("somebody takes it");
        stream.receive_all()
    });
    let proxy = Proxy::builder().listen(Family::Unix).upstream(&upstream).start();
    let mut client = proxy.connect();
    rustix::net::shutdown(&client, rustix::net::Shutdown::Read).expect("a connected socket");
    client.send(&pattern(2, BYTES));
    client.finish();
    let received = upstream.received();
    assert_eq!((received.bytes.len(), received.end), (BYTES, End::Eof));
    assert!(received.bytes == pattern(2, BYTES), "other bytes");
}
