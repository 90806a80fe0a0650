//! Reaching the upstream: one that refuses, is away, or does not answer.

use std::{
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use crate::harness::{
    Addr, Builder, CPU_PERCENT_MAX, End, Family, Listener, Proxy, Received, Stream, Upstream, echo,
    reserve, spawn,
};

/// The connect timeout of those tests that wait for its end.
const TIMEOUT: Duration = Duration::from_millis(600);

/// The delay of giving up an attempt that a busy machine is allowed.
const DELAY_MAX: Duration = Duration::from_secs(3);

/// The same of the quickest of a few.
const SHORTEST_DELAY_MAX: Duration = Duration::from_millis(200);

/// A place where nobody listens until somebody does.
enum Vacant {
    Tcp(crate::harness::Reserved),
    Unix(Addr, tempfile::TempDir),
}

impl Vacant {
    fn new(family: Family) -> Self {
        if family.is_tcp() {
            return Self::Tcp(reserve());
        }
        let dir = tempfile::tempdir().unwrap();
        Self::Unix(Addr::Unix(dir.path().join("upstream.sock")), dir)
    }

    fn addr(&self) -> Addr {
        match self {
            Self::Tcp(port) => port.addr(),
            Self::Unix(addr, _dir) => addr.clone(),
        }
    }

    /// The upstream comes; the directory of its socket file stays as long as what is returned.
    fn open(self) -> (Upstream, Option<tempfile::TempDir>) {
        match self {
            Self::Tcp(port) => (Upstream::on(port.listen(), echo), None),
            Self::Unix(addr, dir) => (Upstream::on(Listener::bind(&addr), echo), Some(dir)),
        }
    }

    fn proxy(&self) -> Builder {
        Proxy::builder().upstream_at(&self.addr()).args(["--proxy-threads", "2"])
    }
}

/// Clients of an upstream that is away: they wait, and have asked already.
fn waiting(proxy: &Proxy, count: usize) -> Vec<Stream> {
    let mut clients: Vec<_> = (0..count).map(|_| proxy.connect()).collect();
    for client in &mut clients {
        client.send(b"hello");
    }
    proxy.control().wait_counts(|status| status.held, count as u64);
    clients
}

#[test]
fn an_upstream_that_is_away_for_a_while_costs_no_client_its_connection() {
    const COUNT: usize = 600;
    for family in [Family::Tcp4, Family::Unix] {
        let vacant = Vacant::new(family);
        let proxy = vacant.proxy().args(["--upstream-connect-timeout", "20s"]).start();
        let clients = waiting(&proxy, COUNT);
        let percent = proxy.cpu_percent();
        assert!(!proxy.control().is_paused());
        let (upstream, _dir) = vacant.open();
        let begin = Instant::now();
        for mut client in clients {
            assert_eq!(client.receive(5), b"hello");
        }
        println!(
            "{family:?}: {COUNT} clients waited at {percent} % of a core, all served {:?} after the start",
            begin.elapsed()
        );
        assert!(percent < CPU_PERCENT_MAX, "{percent} % of a core");
        assert_eq!(upstream.accepted(), COUNT);
        assert_eq!(proxy.control().status().failed, 0);
        proxy.wait_for_log("trying again");
    }
}

#[test]
fn an_upstream_that_stays_away_is_given_up_in_time() {
    for family in [Family::Tcp4, Family::Unix] {
        let vacant = Vacant::new(family);
        let proxy =
            vacant.proxy().args(["--upstream-connect-timeout", &format!("{TIMEOUT:?}")]).start();
        let begin = Instant::now();
        let clients: Vec<_> = (0..20).map(|_| proxy.connect()).collect();
        assert_reset_in_time(begin, clients);
        proxy.control().wait_counts(|status| (status.failed, status.held), (20, 0));
        proxy.wait_for_log("a client is reset");
    }
}

fn assert_reset_in_time(begin: Instant, clients: Vec<Stream>) {
    for mut client in clients {
        let is_tcp = matches!(client, Stream::Tcp(_));
        let received = client.receive_all();
        let end = if is_tcp { End::Reset } else { End::Eof };
        assert_eq!(received, Received { bytes: Vec::new(), end });
        let elapsed = begin.elapsed();
        assert!(elapsed >= TIMEOUT && elapsed < TIMEOUT + DELAY_MAX, "given up after {elapsed:?}");
    }
}

#[test]
fn a_black_hole_ends_in_time_and_the_other_clients_do_not_feel_it() {
    const CARRIED: usize = 4;
    const LOST: usize = 30;
    for family in [Family::Tcp4, Family::Unix] {
        let dir = tempfile::tempdir().unwrap();
        let listener = Listener::bind(&Addr::free(family, dir.path(), "upstream.sock"));
        let proxy = Proxy::builder()
            .upstream_at(&listener.addr())
            .args(["--proxy-threads", "1"])
            .args(["--upstream-connect-timeout", &format!("{TIMEOUT:?}")])
            .start();
        let mut carried: Vec<_> = (0..CARRIED).map(|_| proxy.connect()).collect();
        for _ in 0..CARRIED {
            let stream = listener.accept().unwrap();
            drop(spawn(move || echo(stream)));
        }
        // From here on nobody is accepted, and the queue holds one or two.
        listener.backlog(0);
        let begin = Instant::now();
        let lost: Vec<_> = (0..LOST).map(|_| proxy.connect()).collect();
        let status = proxy.control().wait_status("they wait", |status| {
            status.held + status.connecting + status.active == (CARRIED + LOST) as u64
        });
        let mut rounds = 0;
        while proxy.control().status().failed == 0 {
            for client in &mut carried {
                client.assert_echo(b"still carried");
            }
            rounds += 1;
        }
        assert!(rounds > 0, "{status:?}");
        let queued = CARRIED as u64..=CARRIED as u64 + 2;
        let status = proxy.control().wait_status("the others are given up", |status| {
            status.held + status.connecting == 0 && queued.contains(&status.active)
        });
        let elapsed = begin.elapsed();
        assert!(elapsed >= TIMEOUT && elapsed < TIMEOUT + DELAY_MAX, "given up after {elapsed:?}");
        assert_eq!(status.failed + status.active, (CARRIED + LOST) as u64);
        println!(
            "{family:?}: {} clients given up after {elapsed:?}, {rounds} rounds of others meanwhile",
            status.failed
        );
        drop(lost);
    }
}

#[test]
fn connect_timeout_is_not_rounded_up_to_the_pace_of_addresses() {
    const ROUNDS: usize = 5;
    let full = Listener::bind(&Addr::Tcp((Ipv4Addr::LOCALHOST, 0).into()));
    full.backlog(0);
    full.fill();
    for (connect_timeout, retry_for, expected) in
        [(50, 0, 50), (350, 0, 350), (1000, 0, 1000), (100, 450, 450)]
    {
        let proxy = Proxy::builder()
            .upstream_at(&full.addr())
            .args(["--upstream-connect-timeout", &format!("{connect_timeout}ms")])
            .args(["--upstream-retry-for", &format!("{retry_for}ms")])
            .start();
        let expected = Duration::from_millis(expected);
        let waits = (0..ROUNDS).map(|_| {
            let begin = Instant::now();
            assert_eq!(proxy.connect().receive_all().end, End::Reset);
            let elapsed = begin.elapsed();
            assert!(elapsed >= expected, "given up after {elapsed:?} instead of {expected:?}");
            elapsed
        });
        let shortest = waits.min().unwrap();
        println!("{connect_timeout} ms, for {retry_for} ms: given up after {shortest:?}");
        assert!(shortest < expected + SHORTEST_DELAY_MAX, "{shortest:?} instead of {expected:?}");
    }
}

#[test]
fn a_client_that_leaves_while_the_upstream_is_away_is_never_dialled_for() {
    let vacant = Vacant::new(Family::Tcp4);
    let proxy = vacant.proxy().args(["--upstream-connect-timeout", "20s"]).start();
    let mut clients: Vec<_> = (0..30).map(|_| proxy.connect()).collect();
    proxy.control().wait_counts(|status| status.held, 30);
    for (number, client) in clients.drain(10..).enumerate() {
        if number % 2 == 0 { client.reset() } else { drop(client) }
    }
    proxy.control().wait_counts(|status| (status.held, status.failed), (10, 0));
    let (upstream, _dir) = vacant.open();
    for client in &mut clients {
        client.assert_echo(b"still here");
    }
    assert_eq!(upstream.accepted(), 10);
}

#[test]
fn a_client_that_waits_for_the_upstream_is_held_when_a_pause_comes() {
    let vacant = Vacant::new(Family::Tcp4);
    let proxy = vacant.proxy().args(["--upstream-connect-timeout", "20s"]).start();
    let clients = waiting(&proxy, 20);
    proxy.control().pause();
    // A turn may have been under way at the first one; now another has passed, with all of them.
    proxy.control().pause();
    let status = proxy.control().status();
    assert_eq!((status.held, status.connecting), (20, 0), "nobody waits for those who only wait");
    proxy.control().wait_idle();
    let (upstream, _dir) = vacant.open();
    assert_eq!(upstream.accepted(), 0);
    proxy.control().resume();
    for mut client in clients {
        assert_eq!(client.receive(5), b"hello");
    }
    assert_eq!(proxy.control().status().failed, 0);
}

#[test]
fn a_client_that_waits_for_the_upstream_is_rejected_when_a_pause_comes() {
    let vacant = Vacant::new(Family::Tcp4);
    let proxy = vacant
        .proxy()
        .args(["--proxy-reject-clients", "--upstream-connect-timeout", "20s"])
        .start();
    let clients = waiting(&proxy, 20);
    proxy.control().pause();
    for mut client in clients {
        let received = client.receive_all();
        assert!(received.bytes.starts_with(b"HTTP/1.1 503 "), "{received:?}");
    }
    proxy.control().wait_counts(|status| (status.rejected, status.failed), (20, 0));
}
