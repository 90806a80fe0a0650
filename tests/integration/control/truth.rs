//! The status tells the truth: an upstream that is away and back again, waits of clients, limits, and the state in words.

use std::{
    net::Ipv4Addr,
    process,
    sync::atomic::{AtomicBool, Ordering::SeqCst},
    thread,
    time::{Duration, Instant},
};

use rustix::process::getuid;
use serde_json::Value;

use crate::harness::{
    Addr, Control, Family, Listener, Proxy, Response, Status, Stream, Upstream, echo,
};

/// Time after which the status knows of an upstream that is away, with what a busy machine may add.
const KNOWN_WITHIN: Duration = Duration::from_secs(1);

/// Waits long enough for an age to show.
const WHILE: Duration = Duration::from_millis(300);

/// Takes the whole seconds out of a state in words, which differ with the machine.
fn words(status: &Status) -> String {
    let is_time = |word: &str| {
        let bare = word.trim_end_matches([',', ':', ';']);
        bare.ends_with('s') && bare.starts_with(|first: char| first.is_ascii_digit())
    };
    let words = status.state.split(' ').map(|word| match word {
        time if is_time(time) => {
            format!("TIME{}", time.trim_start_matches(|it: char| it.is_alphanumeric()))
        }
        other => other.to_owned(),
    });
    words.collect::<Vec<_>>().join(" ")
}

#[test]
fn an_upstream_that_is_away_and_back_again_is_told() {
    for family in [Family::Tcp4, Family::Unix] {
        let dir = tempfile::tempdir().unwrap();
        let upstream =
            Upstream::on(Listener::bind(&Addr::free(family, dir.path(), "server")), echo);
        let addr = upstream.addr().clone();
        let proxy = Proxy::builder().upstream(&upstream).arg("--upstream-retry-for=20s").start();
        let control = proxy.control();
        proxy.connect().assert_echo(b"hello");
        let before = control.status();
        assert!(before.upstream_up && before.upstream_error.is_none(), "{before:?}");

        drop(upstream);
        let begin = Instant::now();
        let mut client = proxy.connect();
        client.send(b"hello");
        // The worker publishes its counts at the end of the turn in which the attempt has failed.
        let away = control.wait_status("it is away", |status| {
            !status.upstream_up
                && (status.held, status.connecting, status.awaiting_upstream) == (1, 0, 1)
        });
        assert!(begin.elapsed() < KNOWN_WITHIN, "after {:?}", begin.elapsed());
        let error =
            if family.is_tcp() { "Connection refused" } else { "No such file or directory" };
        assert_eq!(away.upstream_error.as_deref(), Some(error));
        assert_eq!(
            words(&away),
            format!("running, but the upstream is away for TIME: {error}; 1 client waits")
        );
        assert!(away.upstream_since > before.upstream_since, "{away:?}");
        let second = proxy.connect();
        let two = control.wait_status("two wait", |status| status.awaiting_upstream == 2);
        assert!(two.state.ends_with("; 2 clients wait"), "{two:?}");
        assert_eq!(two.upstream_since, away.upstream_since);
        // While paused, nobody waits for the upstream, and it is away all the same.
        control.pause();
        let paused = control.wait_status("they are held", |status| status.awaiting_upstream == 0);
        assert!(paused.held == 2 && !paused.upstream_up, "{paused:?}");
        assert_eq!(
            words(&paused),
            "paused for TIME, the oldest client waits for TIME; the upstream is away"
        );
        control.resume();
        drop(second);
        control.wait_counts(|status| (status.held, status.awaiting_upstream), (1, 1));

        let upstream = Upstream::on(Listener::bind(&addr), echo);
        assert_eq!(client.receive(5), b"hello");
        let back = control.wait_status("it is back", |status| status.upstream_up);
        assert_eq!((back.upstream_error, back.awaiting_upstream), (None, 0));
        assert!(back.upstream_since > away.upstream_since);
        assert_eq!(back.state, "running");
        let line = proxy.wait_for_log(" is back after ");
        assert!(line.contains(&format!("INFO upstream {addr} is back after ")), "{line}");
        assert!(line.ends_with(" s; clients that waited: 1"), "{line}");
        drop(upstream);
    }
}

#[test]
fn the_waits_of_the_oldest_clients_are_told() {
    let full = full_listener();
    let proxy = Proxy::builder()
        .upstream_at(&full.addr())
        .args(["--proxy-threads", "2", "--upstream-connect-timeout", "20s"])
        .start();
    let control = proxy.control();
    let begin = Instant::now();
    let client = proxy.connect();
    let dialled = control.wait_status("it has been dialled for a while", |status| {
        status.oldest_connecting_seconds.is_some_and(|age| age >= WHILE.as_secs_f64())
    });
    let age = dialled.oldest_connecting_seconds.unwrap();
    // Moments and ages are told in whole milliseconds.
    assert!(age <= begin.elapsed().as_secs_f64() + 0.002, "{dialled:?}");
    assert_eq!((dialled.connecting, dialled.oldest_held_seconds), (1, None), "{dialled:?}");
    assert_eq!((&*dialled.state, dialled.upstream_up), ("running", true));
    drop(client);

    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::to(&upstream);
    let control = proxy.control();
    control.pause();
    assert_eq!(words(&control.status()), "paused for TIME, no client waits");
    let begin = Instant::now();
    let oldest = proxy.connect_held();
    thread::sleep(WHILE);
    let younger = Instant::now();
    let _younger = proxy.connect_held();
    let held = control.status();
    let age = held.oldest_held_seconds.unwrap();
    assert!(age >= WHILE.as_secs_f64() && age <= begin.elapsed().as_secs_f64(), "{held:?}");
    assert_eq!(words(&held), "paused for TIME, the oldest client waits for TIME");
    drop(oldest);
    let left = control.wait_status("one has left", |status| status.held == 1);
    let age = left.oldest_held_seconds.unwrap();
    assert!(age <= younger.elapsed().as_secs_f64(), "{left:?}");
    control.resume();
    let resumed = control.wait_status("none is held", |status| status.held == 0);
    assert_eq!((resumed.oldest_held_seconds, &*resumed.state), (None, "running"));
}

#[test]
fn the_limits_and_the_file_are_those_in_use() {
    let upstream = Upstream::tcp(echo);
    for (limits, expected) in [
        (&["--proxy-max-connections=70", "--hold-max=7"][..], (70, Some(7))),
        (&["--proxy-max-connections=70", "--hold-max=700"], (70, Some(70))),
        (&["--proxy-max-connections=70"], (70, Some(70))),
    ] {
        let proxy = Proxy::builder().upstream(&upstream).args(limits).start();
        let status = proxy.control().status();
        assert_eq!((status.connections_max, status.hold_max), expected, "{limits:?}");
        assert_eq!((status.config_file, status.pid), (None, proxy.pid()));
    }
    let builder = Proxy::builder().upstream(&upstream).file("my.yml", "hold:\n  max: 9\n");
    let (file, max) = (builder.path("my.yml").display().to_string(), Some(9));
    let proxy = builder.args(["--config", &file]).start();
    let status = proxy.control().status();
    assert_eq!((status.config_file, status.hold_max), (Some(file), max));
}

#[test]
fn a_pause_that_rejects_and_a_stop_are_told_in_words() {
    let upstream = Upstream::tcp(echo);
    let mut proxy = Proxy::to(&upstream);
    let control = proxy.control().clone();
    assert_eq!(control.put("/paused?mode=reject").status, 201);
    assert_eq!(words(&control.status()), "paused for TIME, new clients are rejected");
    control.resume();
    let mut clients = [proxy.connect(), proxy.connect()];
    for client in &mut clients {
        client.assert_echo(b"hello");
    }
    proxy.terminate();
    proxy.wait_refused();
    let [first, last] = clients;
    let state = |status: &Status| status.state.clone();
    control.wait_counts(state, "stopping, 2 connections are left".to_owned());
    drop(first);
    control.wait_counts(state, "stopping, 1 connection is left".to_owned());
    drop(last);
    assert_eq!(proxy.exit_code(), 0);
}

/// Asks for a pause that is not idle in time. Returns the oldest connections of the answer.
#[track_caller]
fn wait_in_vain(control: &Control, wait: &str) -> Vec<String> {
    let response: Response = control.put(&format!("/paused?wait={wait}"));
    response.assert_error(504);
    let answer: Value = serde_json::from_slice(&response.body).unwrap();
    let oldest = answer["oldest"].as_array().unwrap_or_else(|| panic!("{response}"));
    oldest.iter().map(|it| it.as_str().unwrap().to_owned()).collect()
}

/// The workers are asked by their mailboxes, through which clients of UNIX listeners come, too.
#[test]
fn the_oldest_connections_are_named_under_load() {
    /// Difference of age, which is told in whole seconds.
    const OLDER: Duration = Duration::from_secs(3);
    const ROUNDS: usize = 10;
    for family in [Family::Tcp4, Family::Unix] {
        let upstream = Upstream::tcp(echo);
        let proxy = Proxy::builder()
            .listen(family)
            .upstream(&upstream)
            .args(["--proxy-threads", "4", "--proxy-max-connections", "200"])
            .start();
        let mut oldest = [proxy.connect(), proxy.connect(), proxy.connect()];
        for client in &mut oldest {
            client.assert_echo(b"old");
        }
        thread::sleep(OLDER);
        let ends = AtomicBool::new(false);
        thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    while !ends.load(SeqCst) {
                        let mut client = proxy.connect();
                        client.assert_echo(b"short");
                    }
                });
            }
            let ended = End(&ends);
            for _ in 0..ROUNDS {
                let named = wait_in_vain(proxy.control(), "20ms");
                assert_eq!(named.len(), 3, "{named:?}");
                let mut clients: Vec<_> =
                    named.iter().map(|it| it.split_once(" for ").unwrap().0).collect();
                clients.sort_unstable();
                let mut expected: Vec<_> = oldest.iter().map(name).collect();
                expected.sort_unstable();
                assert_eq!(clients, expected);
                for it in &named {
                    let age = it.split_once(" for ").unwrap().1.split(',').next().unwrap();
                    let seconds: u64 = age.trim_end_matches('s').parse().unwrap();
                    assert!(seconds >= OLDER.as_secs(), "{named:?}");
                }
                // The others go on until the next pause.
                proxy.control().wait_status("more are served", |status| status.held == 0);
            }
            drop(ended);
        });
    }
}

/// Flag that is set when this is dropped, even by a panic, so that no thread waits for it in vain.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, SeqCst);
    }
}

/// Returns the name of a client in answers.
fn name(client: &Stream) -> String {
    match client {
        Stream::Tcp(tcp) => format!("tcp://{}", tcp.local_addr().unwrap()),
        Stream::Unix(_) => {
            let uid = getuid().as_raw();
            format!("uid {uid}, pid {}", process::id())
        }
    }
}

#[test]
fn connections_that_are_still_dialled_for_are_among_the_oldest() {
    let full = full_listener();
    for family in [Family::Tcp4, Family::Unix] {
        let proxy = Proxy::builder()
            .listen(family)
            .upstream_at(&full.addr())
            .args(["--proxy-threads", "3", "--upstream-connect-timeout", "20s"])
            .start();
        let clients: Vec<_> = (0..2).map(|_| proxy.connect()).collect();
        proxy.control().wait_counts(|status| status.connecting, 2);
        let named = wait_in_vain(proxy.control(), "50ms");
        assert_eq!(named.len(), 2, "{named:?}");
        for client in &clients {
            let begin = format!("{} for ", name(client));
            let found =
                named.iter().any(|it| it.starts_with(&begin) && it.ends_with(", connecting"));
            assert!(found, "{named:?}");
        }
    }
}

/// Returns a TCP listener that never answers a dial.
fn full_listener() -> Listener {
    let full = Listener::bind(&Addr::Tcp((Ipv4Addr::LOCALHOST, 0).into()));
    full.backlog(0);
    full.fill();
    full
}
