//! `upstream.retry-for`: clients wait for an upstream that is away, and one at a time tries it for all.

use std::{
    fs,
    net::Ipv4Addr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use crate::harness::{
    Addr, Builder, End, FIGURE, Family, Listener, Proxy, Received, Stream, Upstream, echo,
    in_namespace, reserve, spawn, wait_until,
};

/// The delay that a busy machine is allowed.
const DELAY_MAX: Duration = Duration::from_secs(3);

fn proxy(upstream: &Addr, retry_for: &str) -> Builder {
    Proxy::builder()
        .upstream_at(upstream)
        .args(["--proxy-threads", "2", "--upstream-retry-for", retry_for])
        .args(["--upstream-connect-timeout", "300ms"])
}

/// Clients that have come one after the other, each with its number to say.
fn come(proxy: &Proxy, count: u8) -> Vec<Stream> {
    (0..count)
        .map(|number| {
            let mut client = proxy.connect();
            client.send(&[number]);
            proxy.control().wait_counts(|status| status.held, u64::from(number) + 1);
            client
        })
        .collect()
}

#[test]
fn an_upstream_that_is_away_for_seconds_under_load_costs_nobody_anything() {
    const AWAY: Duration = Duration::from_secs(5);
    const THREADS: usize = 8;
    let vacant = reserve();
    let proxy = proxy(&vacant.addr(), "30s").start();
    let (addr, ends) = (proxy.addr().clone(), Arc::new(AtomicBool::new(false)));
    let load: Vec<_> = (0..THREADS)
        .map(|_| {
            let (addr, ends) = (addr.clone(), Arc::clone(&ends));
            spawn(move || {
                let mut served = 0;
                while !ends.load(Ordering::SeqCst) {
                    let mut client = addr.connect();
                    client.assert_echo(b"short");
                    served += 1;
                }
                served
            })
        })
        .collect();
    proxy.control().wait_counts(|status| status.held, THREADS as u64);
    thread::sleep(AWAY);
    assert_eq!(proxy.control().status().active, 0);
    let upstream = Upstream::on(vacant.listen(), echo);
    proxy.control().wait_status("all are served", |status| {
        status.accepted > 20 * THREADS as u64 && status.held < THREADS as u64
    });
    ends.store(true, Ordering::SeqCst);
    let served: usize = load.into_iter().map(|thread| thread.join().unwrap()).sum();
    println!("{served} connections, each served, {THREADS} at a time; away for {AWAY:?}");
    assert_eq!(proxy.control().status().failed, 0);
    drop(upstream);
}

#[test]
fn one_client_at_a_time_tries_and_ever_less_often() {
    const CLIENTS: usize = 200;
    in_namespace("upstream::retry::one_client_at_a_time_tries_and_ever_less_often", || {
        let vacant = reserve();
        let proxy = proxy(&vacant.addr(), "30s").start();
        let clients: Vec<_> = (0..CLIENTS).map(|_| proxy.connect()).collect();
        proxy.control().wait_counts(|status| status.held, CLIENTS as u64);
        // Those that were dialled for before the outage was known do not count.
        let (begin, before) = (Instant::now(), failed_dials());
        thread::sleep(Duration::from_secs(2));
        let (dials, elapsed) = (failed_dials() - before, begin.elapsed());
        println!("{FIGURE}{dials} dials in {elapsed:?}, while {CLIENTS} clients wait");
        // Some more come until the interval has grown to 250 ms.
        let most = 5 + elapsed.as_millis() / 250;
        assert!((4..=most).contains(&u128::from(dials)), "{dials} dials, {most} at most");
        let upstream = Upstream::on(vacant.listen(), echo);
        for mut client in clients {
            client.assert_echo(b"served");
        }
        assert_eq!(upstream.accepted(), CLIENTS);
    });
}

/// Returns the number of connections that this network could not make so far.
fn failed_dials() -> u64 {
    let counts = fs::read_to_string("/proc/net/snmp").unwrap();
    let mut lines = counts.lines().filter_map(|line| line.strip_prefix("Tcp: "));
    let (names, numbers) = (lines.next().unwrap(), lines.next().unwrap());
    let place = names.split(' ').position(|name| name == "AttemptFails").unwrap();
    numbers.split(' ').nth(place).unwrap().parse().unwrap()
}

#[test]
fn those_who_have_waited_longest_are_served_first() {
    const CLIENTS: u8 = 30;
    let vacant = reserve();
    let proxy = proxy(&vacant.addr(), "30s").args(["--resume-max-connecting", "1"]).start();
    let clients = come(&proxy, CLIENTS);
    let (seen, order) = mpsc::channel();
    let upstream = Upstream::on(vacant.listen(), move |mut stream| {
        let number = stream.receive(1);
        seen.send(number[0]).unwrap();
        stream.send(&number);
        Received { bytes: number, end: End::Eof }
    });
    for (number, mut client) in (0..).zip(clients) {
        assert_eq!(client.receive(1), [number]);
    }
    let order: Vec<_> = order.try_iter().collect();
    assert_eq!(order, (0..CLIENTS).collect::<Vec<_>>());
    drop(upstream);
}

#[test]
fn a_client_waits_for_as_long_as_it_says_and_no_longer() {
    const RETRY_FOR: Duration = Duration::from_millis(1500);
    let vacant = reserve();
    let proxy = proxy(&vacant.addr(), "1500ms").start();
    let begin = Instant::now();
    let clients: Vec<_> = (0..20).map(|_| proxy.connect()).collect();
    for mut client in clients {
        assert_eq!(client.receive_all(), Received { bytes: Vec::new(), end: End::Reset });
        let elapsed = begin.elapsed();
        assert!(
            elapsed >= RETRY_FOR && elapsed < RETRY_FOR + DELAY_MAX,
            "given up after {elapsed:?}"
        );
    }
    proxy.control().wait_counts(|status| (status.failed, status.held), (20, 0));
}

/// One of them has dialled, and the others have waited for it. All are told the same, in the log and in the status.
#[test]
fn the_clients_of_one_outage_have_one_cause() {
    const CLIENTS: u8 = 5;
    let vacant = reserve();
    let proxy = proxy(&vacant.addr(), "500ms").start();
    for mut client in come(&proxy, CLIENTS) {
        assert_eq!(client.receive_all().end, End::Reset);
    }
    proxy.control().wait_counts(|status| status.failed, CLIENTS.into());
    proxy.wait_for_log("cause=unreachable");
    wait_until("each has a line", || {
        proxy.log_count(" cause=unreachable error=refused") == usize::from(CLIENTS)
    });
    let log = proxy.log_so_far();
    assert!(!log.contains("timed out") && !log.contains("error=timeout"), "{log}");
}

#[test]
fn a_server_that_hangs_is_tried_again_after_the_connect_timeout() {
    let listener = Listener::bind(&Addr::Tcp((Ipv4Addr::LOCALHOST, 0).into()));
    let proxy = proxy(&listener.addr(), "30s").start();
    // Its backlog is full: from here on it does not even answer.
    listener.backlog(0);
    let mut queued = Vec::new();
    while proxy.control().status().connecting == 0 {
        queued.push(proxy.connect());
        thread::sleep(Duration::from_millis(20));
    }
    proxy.wait_for_log("timed out; trying again");
    assert_eq!(proxy.control().status().failed, 0);
    let upstream = Upstream::on(listener, echo);
    for mut client in queued {
        client.assert_echo(b"served");
    }
    drop(upstream);
}

#[test]
fn a_resume_may_come_before_the_server_listens() {
    let vacant = reserve();
    let proxy = proxy(&vacant.addr(), "30s").start();
    proxy.control().pause();
    let clients: Vec<_> = (0..200).map(|_| proxy.connect()).collect();
    proxy.control().wait_counts(|status| status.held, 200);
    proxy.control().resume();
    // All wait for the server now, and none stands behind another's timeout.
    proxy.wait_for_log("trying again");
    proxy.control().wait_counts(|status| (status.held, status.connecting), (200, 0));
    let upstream = Upstream::on(vacant.listen(), echo);
    for mut client in clients {
        client.assert_echo(b"served");
    }
    assert_eq!((upstream.accepted(), proxy.control().status().failed), (200, 0));
}

/// The server listens on a UNIX socket, and takes a client out of its backlog of one or two each 20 ms. All clients wait for
/// longer than their patience of 300 ms, which begins anew whenever one has got through.
#[test]
fn a_slow_server_with_a_small_backlog_serves_all_that_come_at_once() {
    const CLIENTS: u32 = 50;
    const PACE: Duration = Duration::from_millis(20);
    let dir = tempfile::tempdir().unwrap();
    let listener = Listener::bind(&Addr::free(Family::Unix, dir.path(), "upstream.sock"));
    listener.backlog(0);
    let proxy = proxy(&listener.addr(), "0s").start();
    let mut clients: Vec<_> = (0..CLIENTS).map(|_| proxy.connect()).collect();
    let begin = Instant::now();
    spawn(move || {
        for turn in 1..=CLIENTS {
            let stream = listener.accept().unwrap();
            drop(spawn(move || echo(stream)));
            thread::sleep((begin + PACE * turn).saturating_duration_since(Instant::now()));
        }
    });
    for client in &mut clients {
        client.assert_echo(b"served");
    }
    assert!(begin.elapsed() > Duration::from_millis(300), "{:?}", begin.elapsed());
    assert_eq!(proxy.control().status().failed, 0);
}

#[test]
fn clients_that_wait_for_the_rate_lose_no_patience_once_the_upstream_is_back() {
    const CLIENTS: u8 = 50;
    let vacant = reserve();
    let proxy = proxy(&vacant.addr(), "2s").args(["--resume-rate", "20"]).start();
    let mut clients = come(&proxy, CLIENTS);
    let begin = Instant::now();
    let upstream = Upstream::on(vacant.listen(), echo);
    for (number, client) in (0..).zip(&mut clients) {
        assert_eq!(client.receive(1), [number]);
    }
    assert!(begin.elapsed() > Duration::from_secs(2), "{:?}", begin.elapsed());
    assert_eq!(proxy.control().status().failed, 0);
    drop(upstream);
}
