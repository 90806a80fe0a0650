//! Carrying bytes: every kind of address, every way for a stream to end.
//!
//! Each scenario also runs directly, without a proxy: if that fails, the test is at fault and not the proxy.

use std::{io::Write, time::Duration};

use crate::harness::{
    End, Family, Listener, Proxy, Received, Stream, Upstream, assert_same, echo, pattern, record,
    reserve, spawn, wait_until,
};

/// The way from a client to the upstream.
#[derive(Debug, Clone, Copy)]
struct Route {
    client: Family,
    upstream: Family,
    proxied: bool,
}

/// One route, set up.
struct Link {
    upstream: Upstream,
    proxy: Option<Proxy>,
}

impl Route {
    const fn direct(family: Family) -> Self {
        Self { client: family, upstream: family, proxied: false }
    }

    const fn proxied(client: Family, upstream: Family) -> Self {
        Self { client, upstream, proxied: true }
    }

    fn link(self, behaviour: impl Fn(Stream) -> Received + Send + Sync + 'static) -> Link {
        let upstream = Upstream::start(self.upstream, behaviour);
        let proxy =
            self.proxied.then(|| Proxy::builder().listen(self.client).upstream(&upstream).start());
        Link { upstream, proxy }
    }
}

impl Link {
    fn connect(&self) -> Stream {
        self.proxy.as_ref().map_or_else(|| self.upstream.addr(), Proxy::addr).connect()
    }
}

/// Makes a test of each scenario on each route.
macro_rules! on_each_route {
    ($($scenario:ident)*) => { $(
        mod $scenario {
            use super::{Family::{Tcp4, Tcp6, Unix}, Route};

            fn run(route: Route) {
                if route.client.is_available() && route.upstream.is_available() {
                    super::$scenario(route);
                } else {
                    println!("skipped: there is no IPv6 on this machine");
                }
            }

            #[test] fn direct_tcp() { run(Route::direct(Tcp4)) }
            #[test] fn direct_unix() { run(Route::direct(Unix)) }
            #[test] fn tcp_to_tcp() { run(Route::proxied(Tcp4, Tcp4)) }
            #[test] fn tcp_to_unix() { run(Route::proxied(Tcp4, Unix)) }
            #[test] fn unix_to_tcp() { run(Route::proxied(Unix, Tcp4)) }
            #[test] fn unix_to_unix() { run(Route::proxied(Unix, Unix)) }
            #[test] fn tcp6_to_tcp6() { run(Route::proxied(Tcp6, Tcp6)) }
            #[test] fn tcp6_to_tcp4() { run(Route::proxied(Tcp6, Tcp4)) }
        }
    )* };
}

on_each_route! {
    small_messages_are_echoed
    megabytes_go_both_ways_at_once
    a_client_that_shuts_first_gets_its_whole_answer
    an_upstream_that_shuts_first_gets_late_bytes
    a_reset_of_the_client_reaches_the_upstream
    a_reset_of_the_upstream_reaches_the_client
    an_answer_to_an_unread_request_arrives
    an_idle_connection_that_closes_ends_on_both_sides
}

fn small_messages_are_echoed(route: Route) {
    let link = route.link(echo);
    let mut client = link.connect();
    for message in [&b"a"[..], b"few", b"small messages"] {
        client.assert_echo(message);
    }
    client.finish();
    assert_eq!(client.receive_all(), Received { bytes: Vec::new(), end: End::Eof });
    assert_eq!(
        link.upstream.received(),
        Received { bytes: b"afewsmall messages".to_vec(), end: End::Eof }
    );
    assert_eq!(link.upstream.accepted(), 1);
}

fn megabytes_go_both_ways_at_once(route: Route) {
    const LENGTH: usize = 5 << 20;
    let link = route.link(|mut stream| {
        let mut writer = stream.try_clone();
        let sending = spawn(move || {
            writer.send(&pattern(2, LENGTH));
            writer.finish();
        });
        let received = stream.receive_all();
        sending.join().unwrap();
        received
    });
    let mut client = link.connect();
    let mut writer = client.try_clone();
    let sending = spawn(move || {
        writer.send(&pattern(1, LENGTH));
        writer.finish();
    });
    let received = client.receive_all();
    sending.join().unwrap();
    assert_eq!(received.end, End::Eof);
    assert_same(&received.bytes, &pattern(2, LENGTH));
    let received = link.upstream.received();
    assert_eq!(received.end, End::Eof);
    assert_same(&received.bytes, &pattern(1, LENGTH));
}

fn a_client_that_shuts_first_gets_its_whole_answer(route: Route) {
    let link = route.link(|mut stream| {
        let received = stream.receive_all();
        stream.send(&pattern(3, 100_000));
        received
    });
    let mut client = link.connect();
    client.send(b"a question");
    client.finish();
    let answer = client.receive_all();
    assert_eq!(answer.end, End::Eof);
    assert_same(&answer.bytes, &pattern(3, 100_000));
    assert_eq!(link.upstream.received(), Received { bytes: b"a question".to_vec(), end: End::Eof });
}

fn an_upstream_that_shuts_first_gets_late_bytes(route: Route) {
    let link = route.link(|mut stream| {
        stream.finish();
        stream.receive_all()
    });
    let mut client = link.connect();
    assert_eq!(client.receive_all(), Received { bytes: Vec::new(), end: End::Eof });
    client.send(&pattern(4, 300_000));
    client.finish();
    let received = link.upstream.received();
    assert_eq!(received.end, End::Eof);
    assert_same(&received.bytes, &pattern(4, 300_000));
}

fn a_reset_of_the_client_reaches_the_upstream(route: Route) {
    let link = route.link(|mut stream| {
        stream.send(b"hello");
        stream.receive_all()
    });
    let mut client = link.connect();
    client.receive(1); // The rest stays unread, so that a UNIX socket resets too.
    client.send(&pattern(5, 30_000));
    client.reset();
    let received = link.upstream.received();
    assert_same(&received.bytes, &pattern(5, 30_000));
    if route.upstream.is_tcp() || !route.proxied {
        assert_eq!(received.end, End::Reset);
    }
}

fn a_reset_of_the_upstream_reaches_the_client(route: Route) {
    let link = route.link(|mut stream| {
        let bytes = stream.receive(1); // The rest stays unread, so that a UNIX socket resets too.
        stream.send(&pattern(6, 30_000));
        stream.reset();
        Received { bytes, end: End::Reset }
    });
    let mut client = link.connect();
    client.send(b"hello");
    let received = client.receive_all();
    assert_same(&received.bytes, &pattern(6, 30_000));
    if route.client.is_tcp() || !route.proxied {
        assert_eq!(received.end, End::Reset);
    }
}

fn an_answer_to_an_unread_request_arrives(route: Route) {
    let link = route.link(|mut stream| {
        let bytes = stream.receive(1);
        stream.send(&pattern(7, 50_000));
        Received { bytes, end: End::Reset }
    });
    let mut client = link.connect();
    // The upstream may close in the middle of it.
    drop(client.write_all(&pattern(8, 100_000)));
    let received = client.receive_all();
    assert_same(&received.bytes, &pattern(7, 50_000));
    assert!(matches!(received.end, End::Eof | End::Reset), "{:?}", received.end);
}

fn an_idle_connection_that_closes_ends_on_both_sides(route: Route) {
    let link = route.link(record);
    drop(link.connect());
    assert_eq!(link.upstream.received(), Received { bytes: Vec::new(), end: End::Eof });
    if let Some(proxy) = &link.proxy {
        proxy.control().wait_status("the connection is closed", |status| {
            status.active == 0 && status.accepted == 1
        });
    }
}

#[test]
fn a_reset_cuts_a_transfer_in_the_middle() {
    let upstream = Upstream::tcp(|mut stream| {
        stream.send(&pattern(9, 3 << 20));
        stream.receive(1);
        stream.reset();
        Received { bytes: Vec::new(), end: End::Reset }
    });
    let proxy = Proxy::to(&upstream);
    let mut client = proxy.connect();
    assert_same(&client.receive(3 << 20), &pattern(9, 3 << 20));
    client.send(b"!");
    assert_eq!(client.receive_all(), Received { bytes: Vec::new(), end: End::Reset });
    proxy.control().wait_status("nothing is left", |status| status.active == 0);
}

#[test]
fn hundreds_of_connections_at_once() {
    const COUNT: usize = 400;
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::to(&upstream);
    let mut clients: Vec<_> = (0..COUNT).map(|_| proxy.connect()).collect();
    for round in 0..3 {
        for (number, client) in clients.iter_mut().enumerate() {
            client.send(format!("{round} {number:5}").as_bytes());
        }
        for (number, client) in clients.iter_mut().enumerate() {
            assert_eq!(client.receive(7), format!("{round} {number:5}").as_bytes());
        }
    }
    proxy.control().wait_counts(
        |status| (status.active, status.connecting, status.accepted, status.failed),
        (COUNT as u64, 0, COUNT as u64, 0),
    );
    drop(clients);
    let status = proxy.control().wait_status("all have left", |status| status.active == 0);
    assert_eq!(
        (status.bytes_to_upstream, status.bytes_to_client),
        (COUNT as u64 * 21, COUNT as u64 * 21)
    );
    assert_eq!(upstream.accepted(), COUNT);
}

#[test]
fn nothing_stays_open_after_the_connections() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::to(&upstream);
    proxy.connect().assert_echo(b"once, so that whatever is kept for good is there");
    proxy.control().wait_status("it has left", |status| status.active == 0);
    let before = proxy.descriptors();
    let mut clients: Vec<_> = (0..50).map(|_| proxy.connect()).collect();
    for client in &mut clients {
        client.assert_echo(b"hello");
    }
    // Two sockets each, and no pipe as long as nothing big is under way.
    wait_until("the descriptors are two a client", || {
        proxy.descriptors() <= before + 2 * clients.len()
    });
    drop(clients);
    wait_until("the descriptors are closed", || proxy.descriptors() <= before);
}

#[test]
fn a_slow_reader_holds_the_sender_back_and_costs_no_memory() {
    const LENGTH: usize = 64 << 20;
    let upstream = Upstream::tcp(|mut stream| {
        stream.send(&vec![7; LENGTH]);
        Received { bytes: Vec::new(), end: End::Eof }
    });
    let proxy = Proxy::to(&upstream);
    let mut client = proxy.connect();
    for _ in 0..500 {
        client.receive(1024);
    }
    assert!(proxy.memory_kib() < 48 << 10, "{} KiB", proxy.memory_kib());
    let rest = client.receive_all();
    assert_eq!((rest.bytes.len(), rest.end), (LENGTH - 500 * 1024, End::Eof));
}

#[test]
fn a_bulk_transfer_does_not_starve_a_small_one() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::builder().upstream(&upstream).args(["--proxy-threads", "1"]).start();
    let mut bulk = proxy.connect();
    let sending =
        spawn(move || assert_same(&bulk.round_trip(&pattern(10, 8 << 20)), &pattern(10, 8 << 20)));
    let mut small = proxy.connect();
    for _ in 0..100 {
        small.assert_echo(b"ping");
    }
    sending.join().unwrap();
}

#[test]
fn urgent_data_arrives_in_line() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::to(&upstream);
    let mut client = proxy.connect();
    client.send(b"abc");
    client.send_urgent(b'!');
    client.send(b"def");
    assert_eq!(client.receive(7), b"abc!def");
    assert_same(&client.round_trip(&pattern(11, 1 << 20)), &pattern(11, 1 << 20));
    client.send_urgent(b'?');
    client.finish();
    assert_eq!(client.receive_all(), Received { bytes: b"?".to_vec(), end: End::Eof });
}

/// Connects, and is reset: perhaps before the connecting call has returned.
#[track_caller]
fn assert_reset(proxy: &Proxy) {
    match proxy.addr().try_connect() {
        Ok(mut client) => {
            assert_eq!(client.receive_all(), Received { bytes: Vec::new(), end: End::Reset });
        }
        Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset),
    }
}

#[test]
fn a_refused_connection_fails_alone() {
    let port = reserve();
    let proxy = Proxy::builder()
        .upstream_at(&port.addr())
        .args(["--upstream-connect-timeout", "50ms"])
        .start();
    for failed in 1..=3 {
        assert_reset(&proxy);
        proxy
            .control()
            .wait_status("it is counted", |status| status.failed == failed && status.active == 0);
    }
    let _upstream = Upstream::on(port.listen(), echo);
    let mut client = proxy.connect();
    client.assert_echo(b"now it is there");
    proxy
        .control()
        .wait_counts(|status| (status.failed, status.accepted, status.active), (3, 4, 1));
}

#[test]
fn a_unix_upstream_may_come_later() {
    let dir = tempfile::tempdir().unwrap();
    let addr = crate::harness::Addr::Unix(dir.path().join("later.sock"));
    let proxy = Proxy::builder().upstream_at(&addr).start();
    let mut client = proxy.connect();
    proxy.control().wait_status("it waits", |status| status.held == 1);
    let _upstream = Upstream::on(Listener::bind(&addr), echo);
    client.assert_echo(b"now it is there");
    assert_eq!(proxy.control().status().failed, 0);
}

#[test]
fn a_full_backlog_of_a_unix_upstream_is_waited_for() {
    const COUNT: usize = 30;
    let dir = tempfile::tempdir().unwrap();
    let listener = Listener::bind(&crate::harness::Addr::Unix(dir.path().join("upstream.sock")));
    listener.backlog(1);
    let proxy = Proxy::builder().upstream_at(&listener.addr()).start();
    let mut clients: Vec<_> = (0..COUNT).map(|_| proxy.connect()).collect();
    proxy
        .control()
        .wait_status("most of them wait", |status| status.held > 20 && status.failed == 0);
    let upstream = Upstream::on(listener, echo);
    for client in &mut clients {
        client.assert_echo(b"served at last");
    }
    assert_eq!(upstream.accepted(), COUNT);
}

#[test]
fn a_name_is_looked_up_and_each_address_is_tried() {
    // Where the name has an IPv6 address too, that one refuses; only the IPv4 address answers.
    let upstream = Upstream::tcp(echo);
    for addr in [
        format!("localhost:{}", upstream.addr().port()),
        format!("tcp://localhost:{}", upstream.addr().port()),
    ] {
        let proxy = Proxy::builder().upstream_at(&addr).start();
        proxy.connect().assert_echo(b"found");
        assert_eq!(proxy.control().status().failed, 0);
    }
}

#[test]
fn each_number_of_threads_serves() {
    for threads in [1, 2, 5] {
        let upstream = Upstream::tcp(echo);
        let proxy = Proxy::builder()
            .upstream(&upstream)
            .args(["--proxy-threads", &threads.to_string()])
            .start();
        for _ in 0..20 {
            proxy.connect().assert_echo(b"hello");
        }
        assert_eq!(proxy.control().status().threads, threads);
    }
}

#[test]
fn a_client_in_no_hurry_is_not_cut_off() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::to(&upstream);
    let mut client = proxy.connect();
    client.assert_echo(b"hello");
    client.read_timeout(Duration::from_millis(300));
    assert_eq!(client.receive_all().end, End::Failed(std::io::ErrorKind::WouldBlock));
    client.assert_echo(b"still here");
}
