//! Holding clients while paused, and serving them on resume.

use crate::harness::{Addr, End, Family, Proxy, Received, Upstream, echo, record};

#[test]
fn a_held_client_is_served_on_resume() {
    for family in [Family::Tcp4, Family::Unix] {
        let upstream = Upstream::tcp(echo);
        let proxy = Proxy::builder().listen(family).upstream(&upstream).start();
        proxy.control().pause();
        let mut client = proxy.connect_held();
        client.send(b"early");
        proxy
            .control()
            .wait_counts(|status| (status.held, status.connecting, status.active), (1, 0, 0));
        assert_eq!(upstream.accepted(), 0);

        proxy.control().resume();
        assert_eq!(client.receive(5), b"early");
        client.assert_echo(b"late");
        proxy.control().wait_counts(
            |status| (status.held, status.active, status.accepted, status.failed),
            (0, 1, 1, 0),
        );
        assert_eq!(upstream.accepted(), 1);
    }
}

#[test]
fn a_held_client_without_bytes_is_served_on_resume() {
    let upstream = Upstream::tcp(|mut stream| {
        stream.send(b"the server speaks first");
        stream.receive_all()
    });
    let proxy = Proxy::to(&upstream);
    proxy.control().pause();
    let mut client = proxy.connect_held();
    proxy.control().resume();
    assert_eq!(client.receive(23), b"the server speaks first");
}

#[test]
fn bytes_and_a_fin_of_a_held_client_are_kept() {
    for family in [Family::Tcp4, Family::Unix] {
        let upstream = Upstream::tcp(|mut stream| {
            let received = stream.receive_all();
            stream.send(b"the whole answer");
            received
        });
        let proxy = Proxy::builder().listen(family).upstream(&upstream).start();
        proxy.control().pause();
        let mut client = proxy.connect();
        client.send(b"a whole request");
        client.finish();
        proxy.control().wait_status("it is held", |status| status.held == 1);

        proxy.control().resume();
        assert_eq!(
            client.receive_all(),
            Received { bytes: b"the whole answer".to_vec(), end: End::Eof }
        );
        assert_eq!(
            upstream.received(),
            Received { bytes: b"a whole request".to_vec(), end: End::Eof }
        );
    }
}

#[test]
fn what_a_client_has_sent_before_it_closed_reaches_the_server() {
    for family in [Family::Tcp4, Family::Unix] {
        let upstream = Upstream::tcp(record);
        let proxy = Proxy::builder().listen(family).upstream(&upstream).start();
        proxy.control().pause();
        let (mut client, waits) = (proxy.connect_held(), proxy.connect_held());
        client.send(b"a line of the log");
        drop(client);
        // The close is known by the time that this one's is.
        drop(waits);
        proxy.control().wait_status("the silent one has gone", |status| {
            status.closed["left-held"] == 1 && status.held == 1
        });
        proxy.control().resume();
        assert_eq!(upstream.received(), Received::ended(b"a line of the log"), "{family:?}");
    }
}

#[test]
fn a_half_closed_unix_client_without_bytes_is_no_ghost() {
    let upstream = Upstream::tcp(|mut stream| {
        let received = stream.receive_all();
        stream.send(b"for an empty request");
        received
    });
    let proxy = Proxy::builder().listen(Family::Unix).upstream(&upstream).start();
    proxy.control().pause();
    let mut client = proxy.connect_held();
    client.finish();
    proxy.connect_held();
    proxy.control().wait_status("the other has gone, this one is held", |status| status.held == 1);
    proxy.control().resume();
    assert_eq!(
        client.receive_all(),
        Received { bytes: b"for an empty request".to_vec(), end: End::Eof }
    );
}

#[test]
fn held_clients_are_served_oldest_first() {
    const COUNT: u8 = 50;
    let upstream = Upstream::tcp(record);
    let proxy = Proxy::builder().upstream(&upstream).args(["--proxy-threads", "1"]).start();
    proxy.control().pause();
    let clients: Vec<_> = (0..COUNT)
        .map(|number| {
            let mut client = proxy.connect();
            client.send(&[number]);
            client
        })
        .collect();
    proxy.control().wait_status("all are held", |status| status.held == u64::from(COUNT));
    proxy.control().resume();
    drop(clients);
    let mut order: Vec<_> = (0..COUNT).map(|_| upstream.session()).collect();
    order.sort_by_key(|session| session.number);
    let order: Vec<u8> = order.into_iter().flat_map(|session| session.received.bytes).collect();
    assert_eq!(order, (0..COUNT).collect::<Vec<_>>());
}

#[test]
fn ghosts_are_dropped_and_never_dialled_for() {
    for family in [Family::Tcp4, Family::Unix] {
        let upstream = Upstream::tcp(echo);
        let proxy = Proxy::builder().listen(family).upstream(&upstream).start();
        proxy.control().pause();
        let mut loyal = proxy.connect_held();

        let mut ghosts: Vec<_> = (0..10).map(|_| proxy.connect()).collect();
        // A UNIX socket has no reset: what was sent before a close is served.
        let talkative = if family.is_tcp() { 5 } else { 0 };
        for ghost in &mut ghosts[..talkative] {
            ghost.send(b"never mind");
        }
        proxy.control().wait_status("all are held", |status| status.held == 11);
        for (number, ghost) in ghosts.into_iter().enumerate() {
            // A TCP client that closes after it has sent looks like one that waits for its answer: those reset.
            if number < talkative { ghost.reset() } else { drop(ghost) }
        }
        let status = proxy.control().wait_status("the ghosts are gone", |status| status.held == 1);
        assert_eq!((status.accepted, status.failed), (11, 0));

        proxy.control().resume();
        loyal.assert_echo(b"still here");
        proxy.control().wait_status("nobody else is served", |status| {
            status.active == 1 && status.connecting == 0
        });
        assert_eq!(upstream.accepted(), 1);
    }
}

#[test]
fn a_ghost_frees_its_descriptor_while_paused() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::to(&upstream);
    proxy.control().pause();
    drop(proxy.connect_held());
    proxy.control().wait_status("it is gone", |status| status.held == 0);
    let before = proxy.descriptors();
    for _ in 0..20 {
        drop(proxy.connect_held());
        proxy.control().wait_status("it is gone", |status| status.held == 0);
    }
    crate::harness::wait_until("the descriptors are closed", || proxy.descriptors() <= before);
}

#[test]
fn thousands_of_held_clients_are_all_served() {
    const COUNT: usize = 2_000;
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::to(&upstream);
    proxy.control().pause();
    let mut clients: Vec<_> = (0..COUNT)
        .map(|number| {
            let mut client = proxy.connect();
            client.send(format!("{number:8}").as_bytes());
            client
        })
        .collect();
    proxy.control().wait_status("all are held", |status| status.held == COUNT as u64);
    assert_eq!(upstream.accepted(), 0);
    proxy.control().resume();
    for (number, client) in clients.iter_mut().enumerate() {
        assert_eq!(client.receive(8), format!("{number:8}").as_bytes());
    }
    proxy
        .control()
        .wait_counts(|status| (status.held, status.active, status.failed), (0, COUNT as u64, 0));
    drop(clients);
    proxy.control().wait_idle();
    assert_eq!(upstream.accepted(), COUNT);
}

#[test]
fn running_connections_go_on_while_paused() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::to(&upstream);
    let mut running = proxy.connect();
    running.assert_echo(b"before");
    proxy.control().pause();
    let mut held = proxy.connect_held();
    running.assert_echo(b"during");
    let megabyte = vec![1; 1 << 20];
    crate::harness::assert_same(&running.round_trip(&megabyte), &megabyte);
    running.finish();
    assert_eq!(running.receive_all().end, End::Eof);
    assert_eq!(upstream.accepted(), 1);
    proxy.control().resume();
    held.assert_echo(b"after");
}

#[test]
fn pause_and_resume_may_be_repeated() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::to(&upstream);
    proxy.control().resume();
    proxy.control().pause();
    let since = proxy.control().status().paused_since;
    let mut client = proxy.connect_held();
    proxy.control().pause();
    assert!(proxy.control().is_paused());
    assert_eq!(proxy.control().status().paused_since, since, "the second pause changes nothing");
    assert_eq!(proxy.control().status().held, 1);
    proxy.control().resume();
    proxy.control().resume();
    assert!(!proxy.control().is_paused());
    client.assert_echo(b"once");
    assert_eq!(upstream.accepted(), 1);
}

#[test]
fn a_client_may_be_held_again_and_again() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::to(&upstream);
    for round in 1..=20 {
        proxy.control().pause();
        let mut client = proxy.connect_held();
        proxy.control().resume();
        client.assert_echo(b"served");
        assert_eq!(upstream.accepted(), round);
    }
}

#[test]
fn a_client_held_for_a_dead_upstream_fails_on_resume() {
    let dir = tempfile::tempdir().unwrap();
    let proxy = Proxy::builder().upstream_at(&Addr::Unix(dir.path().join("nobody.sock"))).start();
    proxy.control().pause();
    let mut client = proxy.connect_held();
    proxy.control().resume();
    assert_eq!(client.receive_all(), Received { bytes: Vec::new(), end: End::Reset });
    proxy.control().wait_status("it is counted", |status| status.failed == 1 && status.active == 0);
    proxy.control().wait_idle();
}
