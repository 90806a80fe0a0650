//! Facts in the line of a connection, and the bound of such lines.

use std::{
    collections::{BTreeMap, HashSet},
    process, thread,
    time::{Duration, Instant},
};

use rustix::process::getuid;

use super::connections::{lines, logging, wait_lines};
use crate::harness::{Family, Proxy, Stream, Upstream, echo, reserve, wait_until};

/// The delay that a busy machine is allowed.
const DELAY_MAX: Duration = Duration::from_secs(3);

/// Connections of the tests of the bound.
const SHORT_ONES: usize = 1_000;

#[test]
fn a_line_tells_how_long_a_client_was_held_and_what_was_carried() {
    const HELD: Duration = Duration::from_secs(1);
    for format in ["text", "json"] {
        let upstream = Upstream::tcp(echo);
        let proxy = logging(format).upstream(&upstream).start();
        proxy.control().pause();
        let mut client = proxy.connect_held();
        thread::sleep(HELD);
        proxy.control().resume();
        client.assert_echo(b"hello");
        drop(client);
        let line = wait_lines(&proxy, 1).remove(0);
        let held = HELD.as_secs_f64()..(HELD + DELAY_MAX).as_secs_f64();
        assert!(held.contains(&line.held) && line.took >= line.held, "{line:?}");
        assert!(line.connect > 0.0 && line.connect < DELAY_MAX.as_secs_f64(), "{line:?}");
        assert_eq!((line.to_upstream, line.to_client), (5, 5));
        assert_eq!(line.upstream, upstream.addr().to_string());
        // One that is served at once was not held.
        proxy.connect().assert_echo(b"hello");
        let line = wait_lines(&proxy, 2).remove(1);
        assert!(line.held == 0.0 && line.connect > 0.0, "{line:?}");
    }
}

#[test]
fn a_line_names_the_client_and_the_upstream() {
    for format in ["text", "json"] {
        for family in [Family::Tcp4, Family::Tcp6, Family::Unix, Family::Abstract] {
            if !family.is_available() {
                println!("skipped: IPv6 is switched off");
                continue;
            }
            let upstream = Upstream::start(family, echo);
            let proxy = logging(format).listen(family).upstream(&upstream).start();
            let mut client = proxy.connect();
            client.assert_echo(b"hello");
            let name = match &client {
                Stream::Tcp(tcp) => format!("tcp://{}", tcp.local_addr().unwrap()),
                Stream::Unix(_) => {
                    format!("uid {}, pid {}", getuid().as_raw(), process::id())
                }
            };
            // A reset takes the address from the socket.
            client.reset();
            let line = wait_lines(&proxy, 1).remove(0);
            assert_eq!((line.client, line.upstream), (name, upstream.addr().to_string()));
        }
    }
}

#[test]
fn an_id_is_the_worker_and_a_number_that_never_comes_again() {
    const CLIENTS: usize = 60;
    // UNIX clients are handed from the worker that accepts to others.
    for family in [Family::Tcp4, Family::Unix] {
        let upstream = Upstream::tcp(echo);
        let proxy = logging("text").listen(family).upstream(&upstream).start();
        let workers = proxy.control().status().threads;
        for _round in 0..2 {
            let mut clients: Vec<_> = (0..CLIENTS / 2).map(|_| proxy.connect()).collect();
            for client in &mut clients {
                client.assert_echo(b"hello");
            }
        }
        let ids: HashSet<String> =
            wait_lines(&proxy, CLIENTS).into_iter().map(|line| line.id).collect();
        assert_eq!(ids.len(), CLIENTS, "{ids:?}");
        let mut numbers = Vec::new();
        for id in &ids {
            let (worker, number) = id.split_once('.').expect("worker.number");
            assert!(worker.parse::<usize>().unwrap() < workers, "{id}");
            numbers.push(number.parse::<usize>().unwrap());
        }
        // They count over all workers, so that their order is that of the arrivals.
        numbers.sort_unstable();
        assert_eq!(numbers, (1..=CLIENTS).collect::<Vec<_>>());
    }
}

#[test]
fn the_setting_chooses_the_ends_that_are_logged() {
    let settings: [(&[&str], &[&str]); 4] = [
        (&["--log-connections", "off"], &[]),
        (&["--log-connections", "failures"], &["killed-pause"]),
        (&[], &["killed-pause"]),
        (&["--log-connections", "all"], &["ended", "killed-pause"]),
    ];
    for (options, causes) in settings {
        let upstream = Upstream::tcp(echo);
        let proxy = Proxy::builder().upstream(&upstream).args(options).start();
        proxy.connect().assert_echo(b"hello");
        proxy.control().wait_counts(|status| status.closed["ended"], 1);
        let mut client = proxy.connect();
        client.assert_echo(b"hello");
        assert_eq!(proxy.control().put("/paused?wait=1ms&on-timeout=kill").status, 201);
        client.receive_all();
        proxy.terminate();
        let lines = lines(&proxy.finish().stderr);
        let found: Vec<&str> = lines.iter().map(|line| &*line.cause).collect();
        assert_eq!(found, causes, "{options:?}");
    }
}

/// Returns the numbers of connections that were not logged, by cause.
fn not_logged(log: &str) -> BTreeMap<String, usize> {
    let mut told = BTreeMap::new();
    for line in log.lines() {
        let Some((_, counts)) = line.split_once(" connections not logged: ") else { continue };
        for count in counts.split(", ") {
            let (number, cause) = count.split_once(' ').expect("a number and a cause");
            *told.entry(cause.to_owned()).or_default() += number.parse::<usize>().unwrap();
        }
    }
    told
}

/// Makes short connections as fast as it can.
fn storm(proxy: &Proxy) {
    const THREADS: usize = 4;
    thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                for _ in 0..SHORT_ONES / THREADS {
                    let mut client = proxy.connect();
                    client.send(b"hello");
                    client.finish();
                    client.receive_all();
                }
            });
        }
    });
}

#[test]
fn lines_of_a_second_are_bounded_and_the_rest_is_told_though_nothing_more_ends() {
    let upstream = Upstream::tcp(echo);
    for (rate, options) in [(100, &[][..]), (7, &["--log-connections-rate", "7"])] {
        let proxy = Proxy::builder()
            .upstream(&upstream)
            .args(["--proxy-threads", "2", "--log-connections", "all"])
            .args(options)
            .start();
        let begin = Instant::now();
        storm(&proxy);
        let seconds = usize::try_from(begin.elapsed().as_secs()).unwrap() + 1;
        let (mut logged, mut told) = (0, BTreeMap::new());
        wait_until("each connection is told of", || {
            let log = proxy.log_so_far();
            (logged, told) = (lines(&log).len(), not_logged(&log));
            logged + told.values().sum::<usize>() >= SHORT_ONES
        });
        println!("{rate} a second: {logged} lines in {seconds} s, and {told:?}");
        assert_eq!(told, [("ended".to_owned(), SHORT_ONES - logged)].into());
        // Each of the two workers has half of them, rounded up, for each second that it has begun. A tenth is left to
        // failures.
        assert!(
            logged >= rate - rate / 10 && logged <= (rate + 1) * (seconds + 1),
            "{logged} lines"
        );
        assert_eq!(proxy.control().status().closed["ended"], SHORT_ONES as u64);
    }
}

#[test]
fn a_stop_tells_the_rest_at_once() {
    const CLIENTS: usize = 20;
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::builder()
        .upstream(&upstream)
        .grace_period(Some("0s"))
        .args(["--proxy-threads", "2", "--log-connections-rate", "2"])
        .start();
    let mut clients: Vec<_> = (0..CLIENTS).map(|_| proxy.connect()).collect();
    for client in &mut clients {
        client.assert_echo(b"hello");
    }
    proxy.terminate();
    let log = proxy.finish().stderr;
    let (logged, told) = (lines(&log).len(), not_logged(&log));
    assert!((1..=2).contains(&logged), "{logged} lines");
    assert_eq!(told, [("stopped".to_owned(), CLIENTS - logged)].into());
}

/// An operator who looks at warnings alone is told of all failures.
#[test]
fn the_count_of_failures_is_a_warning_as_their_lines_are() {
    const CLIENTS: usize = 20;
    let vacant = reserve();
    let proxy = Proxy::builder()
        .upstream_at(&vacant.addr())
        .args(["--proxy-threads", "1", "--upstream-connect-timeout", "100ms"])
        .args(["--log-connections", "all", "--log-connections-rate", "1"])
        .start();
    let clients: Vec<_> = (0..CLIENTS).map(|_| proxy.connect()).collect();
    for mut client in clients {
        client.receive_all();
    }
    let line = proxy.wait_for_log(" connections not logged: ");
    assert!(line.contains(" WARN ") && line.ends_with(" unreachable"), "{line}");
}
