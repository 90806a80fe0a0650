//! Upgrades in the midst of what takes its time: a release, a drain, an outage, a deadline, a wait, a stop. Where something would
//! begin anew with each upgrade, upgrades follow each other so closely that it would never end.

use std::{
    io::{self, Read as _, Write as _},
    thread,
    time::{Duration, Instant},
};

use rustix::{
    io::Errno,
    net::{RecvFlags, recv},
};

use crate::{
    harness::{
        End, GLANCE, PATIENCE, Proxy, Received, Response, Status, Stream, Upstream, echo, hangup,
        reserve, spawn, wait_until,
    },
    pause::pace::{Counter, Manner, held},
};

/// Length of what would never end if each upgrade began it anew.
const LONG: Duration = Duration::from_millis(1500);

/// Upgrades the proxy until it is over.
#[track_caller]
fn upgrade_until(proxy: &Proxy, what: &str, mut is_over: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_over() {
        assert!(
            Instant::now() < deadline,
            "in vain: {} upgrades until {what}",
            proxy.heirs().len()
        );
        proxy.upgrade();
    }
    assert!(!proxy.heirs().is_empty(), "{what} before the first upgrade");
}

/// Returns true if a stream has something to read, or has ended.
fn is_readable(stream: &Stream) -> bool {
    stream.read_timeout(GLANCE);
    let peeked = recv(stream, &mut [0; 1][..], RecvFlags::PEEK);
    stream.read_timeout(PATIENCE);
    peeked != Err(Errno::AGAIN)
}

/// Checks that all clients are served, in their order.
#[track_caller]
fn assert_served(upstream: &Counter, clients: &mut [Stream]) {
    let count = u8::try_from(clients.len()).unwrap();
    assert_eq!(upstream.next(clients.len()), (0..count).collect::<Vec<_>>());
    for (client, number) in clients.iter_mut().zip(0..) {
        assert_eq!(client.receive(1), [number]);
    }
}

#[test]
fn a_release_keeps_its_order_and_its_rate() {
    const COUNT: u8 = 7;
    const INTERVAL: Duration = Duration::from_millis(250);
    /// Time that a start may catch up on, as documented in the queue.
    const LATENESS: Duration = Duration::from_millis(20);
    let upstream = Counter::start(Manner::Answers);
    let proxy = Proxy::builder().upstream_at(&upstream.addr()).args(["--resume-rate=4"]).start();
    proxy.control().pause();
    let mut clients = held(&proxy, 0..COUNT);
    let begun = Instant::now();
    proxy.control().resume();
    for (client, number) in clients.iter_mut().zip(0..) {
        assert_eq!((client.receive(1), upstream.next(1)), (vec![number], vec![number]));
        if number < 5 {
            // It comes right behind a start, and must not bring the next one forward.
            proxy.upgrade();
        }
    }
    let taken = begun.elapsed();
    assert!(taken + LATENESS >= INTERVAL * u32::from(COUNT - 1), "{taken:?}");
    assert_eq!(proxy.control().status().failed, 0);
}

#[test]
fn as_many_are_let_through_as_before_an_upgrade_and_no_more() {
    let upstream = Counter::start(Manner::Answers);
    let proxy = Proxy::builder().upstream_at(&upstream.addr()).args(["--resume-rate=4"]).start();
    proxy.control().pause();
    let mut clients = held(&proxy, 0..8);
    assert_eq!(proxy.control().delete("/paused?release=4").text(), "{\"released\": 4}\n");
    assert_eq!(upstream.next(1), [0]);
    proxy.upgrade();
    assert_eq!(upstream.next(1), [1]);
    proxy.upgrade();
    assert_eq!(upstream.next(2), [2, 3]);
    proxy.upgrade();
    // Another word of the operator has each worker look again.
    proxy.control().pause();
    let status = proxy.control().status();
    assert_eq!((status.held, status.active, status.paused), (4, 4, true), "{status:?}");
    proxy.control().resume();
    assert_eq!(upstream.next(4), [4, 5, 6, 7]);
    for (client, number) in clients.iter_mut().zip(0..) {
        assert_eq!(client.receive(1), [number]);
    }
}

/// Quiet connections are closed after their silence, the busy one is reset at the deadline, and the caller is told both.
#[test]
fn a_drain_goes_on_to_its_deadline() {
    const QUIET: u64 = 5;
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::to(&upstream);
    let mut quiet: Vec<_> = (0..QUIET).map(|_| proxy.connect()).collect();
    for client in &mut quiet {
        client.assert_echo(b"last words");
    }
    let silent_since = Instant::now();
    let mut busy = proxy.connect();
    busy.assert_echo(b"busy");
    let talk = spawn(move || {
        loop {
            if let Err(error) = talk(&mut busy) {
                return End::from(error);
            }
            thread::sleep(GLANCE);
        }
    });
    let begun = Instant::now();
    let target = "/paused?name=drain&drain=quiet:800ms&wait=3s&on-timeout=kill";
    let mut caller = proxy.control().send("PUT", target, &[]);
    upgrade_until(&proxy, "all are quiet", || proxy.control().status().drained == QUIET);
    assert!(silent_since.elapsed() >= Duration::from_millis(800));
    for client in &mut quiet {
        assert_eq!(client.receive_all(), Received::ended(b""));
    }
    assert!(!is_readable(&caller) && !talk.is_finished());
    upgrade_until(&proxy, "the wait is over", || is_readable(&caller));
    assert!(begun.elapsed() >= Duration::from_secs(3));
    let response = Response::read(&mut caller);
    assert_eq!(response.status, 201);
    assert!(response.text().contains("\"idle\": true"), "{response}");
    assert!(response.text().contains("\"reset\": 1"), "{response}");
    assert_eq!(talk.join().unwrap(), End::Reset);
    let status = proxy.control().status();
    assert_eq!((status.drained, status.killed, status.active), (QUIET, 1, 0), "{status:?}");
    assert_eq!((status.leases.len(), status.leases[0].name.as_str()), (1, "drain"));
}

/// Asks and awaits the echo.
fn talk(stream: &mut Stream) -> io::Result<()> {
    stream.write_all(b"question")?;
    stream.read_exact(&mut [0; 8])
}

/// Returns what the status tells of an outage.
fn outage(status: &Status) -> (bool, Option<String>, Option<String>, u64, u64) {
    let Status { upstream_up, upstream_since, upstream_error, awaiting_upstream, failed, .. } =
        status.clone();
    (upstream_up, upstream_since, upstream_error, awaiting_upstream, failed)
}

#[test]
fn clients_wait_for_an_upstream_that_is_away_and_are_served_in_their_order() {
    const COUNT: u8 = 5;
    let vacant = reserve();
    let proxy = Proxy::builder()
        .upstream_at(&vacant.addr())
        .args(["--upstream-retry-for=1m", "--resume-max-connecting=1"])
        .start();
    let mut clients: Vec<_> = (0..COUNT)
        .map(|number| {
            let mut client = proxy.connect();
            client.send(&[number]);
            proxy.control().wait_counts(|it| it.awaiting_upstream, u64::from(number) + 1);
            client
        })
        .collect();
    let before = proxy.control().status();
    assert!(!before.upstream_up && before.upstream_error.is_some(), "{before:?}");
    for _upgrade in 0..2 {
        proxy.upgrade();
        // One of them may be the probe at this moment.
        proxy
            .control()
            .wait_status("the outage is as before", |now| outage(now) == outage(&before));
    }
    let upstream = Counter::on(vacant.listen(), Manner::Answers);
    assert_served(&upstream, &mut clients);
    let status = proxy.control().wait_status("the outage is over", |status| status.upstream_up);
    assert_eq!((status.failed, status.held), (0, 0), "{status:?}");
}

#[test]
fn the_patience_with_an_upstream_does_not_begin_anew() {
    let vacant = reserve();
    let proxy = Proxy::builder()
        .upstream_at(&vacant.addr())
        .args(["--upstream-retry-for=1500ms", "--upstream-connect-timeout=100ms"])
        .start();
    let begun = Instant::now();
    let clients: Vec<_> = (0..3).map(|_| proxy.connect()).collect();
    proxy.control().wait_counts(|status| status.awaiting_upstream, 3);
    upgrade_until(&proxy, "they are given up", || proxy.control().status().failed > 0);
    for mut client in clients {
        assert_eq!(client.receive_all(), Received { bytes: Vec::new(), end: End::Reset });
    }
    assert!(begun.elapsed() >= LONG, "{:?}", begun.elapsed());
    proxy.control().wait_counts(|status| (status.failed, status.held), (3, 0));
    wait_until("each has a line", || proxy.log_count(" cause=unreachable error=refused") == 3);
}

#[test]
fn a_pause_ends_at_its_deadline() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::to(&upstream);
    let begun = Instant::now();
    assert_eq!(proxy.control().put("/paused?name=deploy&ttl=1500ms&reason=v2").status, 201);
    let mut client = proxy.connect_held();
    let before = proxy.control().status();
    proxy.upgrade();
    let now = proxy.control().status();
    let [lease, was] = [&now.leases[0], &before.leases[0]];
    assert_eq!((&lease.name, &lease.since, &lease.by), (&was.name, &was.since, &was.by));
    assert!(lease.expires_in_seconds < was.expires_in_seconds, "{lease:?}, {was:?}");
    upgrade_until(&proxy, "it ends", || !proxy.control().is_paused());
    client.assert_echo(b"served without a call");
    assert!(begun.elapsed() >= LONG, "{:?}", begun.elapsed());
    let line = proxy.wait_for_log("pause expired");
    let (_, seconds) = line.split_once(" WARN resumed after ").expect(&line);
    assert!(seconds.split(' ').next().unwrap().parse::<f64>().unwrap() >= 1.5, "{line}");
    assert!(line.contains(" as \"deploy\" because \"v2\"; clients held: 1"), "{line}");
    assert_eq!(proxy.log_count("resumed"), 1, "{}", proxy.log_so_far());
}

#[test]
fn waits_end_at_their_deadlines_and_with_their_callers() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::to(&upstream);
    let mut client = proxy.connect();
    client.assert_echo(b"before");
    let begun = Instant::now();
    let idle = "/paused/block-until-idle";
    let mut patient = proxy.control().send("GET", idle, &[]);
    let mut hasty = proxy.control().send("GET", &format!("{idle}?timeout=1500ms"), &[]);
    let pausing = proxy.control().send("PUT", "/paused?name=deploy&wait=1h", &[]);
    wait_until("it is paused", || proxy.control().is_paused());
    let mut held = proxy.connect_held();
    upgrade_until(&proxy, "one is tired of it", || is_readable(&hasty));
    assert!(begun.elapsed() >= LONG, "{:?}", begun.elapsed());
    let response = Response::read(&mut hasty);
    response.assert_error(504);
    assert!(response.text().contains("\"active\": 1"), "{response}");
    assert!(proxy.control().is_paused());
    // The new process notices that the caller of a pause is gone.
    drop(pausing);
    held.assert_echo(b"served");
    wait_until("it is not paused", || !proxy.control().is_paused());
    proxy.wait_for_log("its caller has gone");
    assert!(!is_readable(&patient));
    drop((client, held));
    assert_eq!(Response::read(&mut patient).status, 204);
}

#[test]
fn a_proxy_that_stops_is_not_upgraded() {
    let upstream = Upstream::tcp(echo);
    let mut proxy = Proxy::to(&upstream);
    let mut client = proxy.connect();
    client.assert_echo(b"before");
    proxy.terminate();
    proxy.wait_refused();
    let sentence = proxy.control().request("POST", "/upgrade", &[]).assert_error(503);
    assert!(sentence.contains("stopping"), "{sentence}");
    proxy.signal(hangup());
    let line = proxy.wait_for_log("not upgraded: ");
    assert!(line.ends_with(" ERROR not upgraded: tcpause is stopping"), "{line}");
    client.assert_echo(b"goes on");
    client.finish();
    assert_eq!(client.receive_all(), Received::ended(b""));
    assert_eq!(proxy.exit_code(), 0);
    assert_eq!((proxy.log_count("not upgraded: "), proxy.heirs().len()), (1, 0));
}
