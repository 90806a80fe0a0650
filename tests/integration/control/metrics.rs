//! The metrics on the real program: their numbers, their cost, and the verdict of Prometheus' own tools.

use std::{
    collections::BTreeMap,
    fs,
    io::{ErrorKind, Write as _},
    process::{Command, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Resource, getrlimit};

use crate::harness::{Control, Proxy, Response, Upstream, amount, echo, wait_until};

/// Longest answer to a scrape.
const BYTES_MAX: usize = 24 << 10;

/// Samples of one scrape, by name and labels.
struct Scrape(BTreeMap<String, f64>);

impl Scrape {
    #[track_caller]
    fn of(control: &Control) -> Self {
        Self::parse(&control.get("/metrics"))
    }

    #[track_caller]
    fn parse(response: &Response) -> Self {
        assert_eq!(response.status, 200, "{response}");
        let format = "text/plain; version=0.0.4; charset=utf-8";
        assert_eq!(response.header("Content-Type"), Some(format), "{response}");
        assert!(response.body.len() <= BYTES_MAX, "{} bytes", response.body.len());
        let samples = response.text().lines().filter(|line| !line.starts_with('#'));
        let sample = |line: &str| {
            let (name, value) = line.rsplit_once(' ').unwrap();
            (name.to_owned(), value.parse().unwrap_or_else(|error| panic!("{line}: {error}")))
        };
        Self(samples.map(sample).collect())
    }

    #[track_caller]
    fn get(&self, name: &str) -> f64 {
        *self.0.get(name).unwrap_or_else(|| panic!("no {name}"))
    }

    /// Returns true if a value, which is whole or told to a millisecond, is this one.
    #[track_caller]
    fn is(&self, name: &str, value: f64) -> bool {
        same(self.get(name), value)
    }

    /// Returns the sum over all labels of a family.
    fn sum(&self, family: &str) -> f64 {
        self.of_family(family).map(|(_, value)| value).sum()
    }

    /// Checks that each accepted client has ended for a cause, or is in a state.
    #[track_caller]
    fn assert_balanced(&self) {
        let accepted = self.get("tcpause_accepted_total");
        let (closed, open) = (self.sum("tcpause_closed_total"), self.sum("tcpause_connections"));
        assert!(same(accepted, closed + open), "{accepted} accepted, {closed} closed, {open} open");
    }

    fn of_family<'a>(&'a self, family: &str) -> impl Iterator<Item = (&'a str, f64)> {
        let begin = format!("{family}{{");
        self.0
            .iter()
            .filter(move |(name, _)| name.starts_with(&begin))
            .map(|(name, it)| (&**name, *it))
    }

    /// Lists what only ever grows.
    fn counters(&self) -> impl Iterator<Item = (&String, f64)> {
        let grows = |name: &str| {
            let bare = name.split('{').next().unwrap();
            ["_total", "_bucket", "_sum", "_count"].iter().any(|end| bare.ends_with(end))
        };
        self.0.iter().filter(move |(name, _)| grows(name)).map(|(name, value)| (name, *value))
    }
}

/// Waits until a scrape is as wanted.
#[track_caller]
fn wait_for(control: &Control, what: &str, condition: impl Fn(&Scrape) -> bool) -> Scrape {
    let mut last = None;
    wait_until(what, || condition(last.insert(Scrape::of(control))));
    last.expect("a scrape")
}

fn same(left: f64, right: f64) -> bool {
    (left - right).abs() < 0.000_5
}

#[track_caller]
fn assert_is(scrape: &Scrape, expected: &[(&str, f64)]) {
    for (name, value) in expected {
        assert!(scrape.is(name, *value), "{name}: {}", scrape.get(name));
    }
}

#[test]
fn the_numbers_are_those_of_the_status() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::builder().upstream(&upstream).arg("--proxy-max-connections=70").start();
    let control = proxy.control();
    proxy.connect().assert_echo(b"hello");
    let mut client = proxy.connect();
    client.assert_echo(&[7; 100]);
    // A worker publishes its counts a moment after the clients have seen their cause.
    let scrape = wait_for(control, "the first client is gone, and all is counted", |it| {
        it.is("tcpause_closed_total{cause=\"ended\"}", 1.0)
            && it.is("tcpause_carried_bytes_total{to=\"client\"}", 105.0)
    });
    let version = concat!("tcpause_build_info{version=\"", env!("CARGO_PKG_VERSION"), "\"}");
    assert_is(
        &scrape,
        &[
            (version, 1.0),
            ("tcpause_paused", 0.0),
            ("tcpause_accepted_total", 2.0),
            ("tcpause_connections{state=\"active\"}", 1.0),
            ("tcpause_connections{state=\"held\"}", 0.0),
            ("tcpause_connections_max", 70.0),
            ("tcpause_hold_max", 70.0),
            ("tcpause_closed_total{cause=\"unreachable\"}", 0.0),
            ("tcpause_carried_bytes_total{to=\"upstream\"}", 105.0),
            ("tcpause_carried_bytes_total{to=\"client\"}", 105.0),
            ("tcpause_connect_attempts_total{result=\"ok\"}", 2.0),
            ("tcpause_connect_duration_seconds_count", 2.0),
            ("tcpause_connection_duration_seconds_count", 1.0),
            ("tcpause_upstream_up", 1.0),
            ("tcpause_worker_panics_total", 0.0),
        ],
    );
    let uptime = control.status().uptime_seconds;
    let started = Command::new("date").arg("+%s.%N").output().unwrap();
    let now: f64 = String::from_utf8(started.stdout).unwrap().trim().parse().unwrap();
    let start = scrape.get("process_start_time_seconds");
    assert!((now - uptime - start).abs() < 5.0, "{now} {uptime} {start}");
    assert!(scrape.get("process_open_fds") > 10.0);
    assert!(scrape.get("process_resident_memory_bytes") > 1e6);
    assert_eq!(
        scrape.of_family("tcpause_worker_busy_seconds_total").count(),
        control.status().threads
    );
    // The scrapes themselves are answers, too.
    let before = scrape.get("tcpause_control_requests_total{class=\"2xx\"}");
    control.get("/nothing");
    let scrape = Scrape::of(control);
    assert!(scrape.get("tcpause_control_requests_total{class=\"2xx\"}") > before);
    assert_is(&scrape, &[("tcpause_control_requests_total{class=\"4xx\"}", 1.0)]);
    for wrong in ["/metrics?x", "/metrics?name[]=a"] {
        control.get(wrong).assert_error(400);
    }
    let refused = control.request("POST", "/metrics", &[]);
    assert_eq!((refused.status, refused.header("Allow")), (405, Some("GET, HEAD")));
    assert_eq!(control.request("HEAD", "/metrics", &[]).text(), "");
}

#[test]
fn a_pause_is_told_with_its_begin_and_its_end() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::to(&upstream);
    let control = proxy.control();
    assert_eq!(control.put("/paused?name=a&ttl=1h").status, 201);
    let scrape = Scrape::of(control);
    let since = scrape.get("tcpause_paused_since_timestamp_seconds");
    let lasts = scrape.get("tcpause_resume_expected_timestamp_seconds") - since;
    assert!((3_595.0..3_605.0).contains(&lasts), "{lasts}");
    assert_is(
        &scrape,
        &[
            ("tcpause_paused", 1.0),
            ("tcpause_pauses{end=\"open\"}", 0.0),
            ("tcpause_pauses{end=\"expires\"}", 1.0),
            ("tcpause_pauses_total", 1.0),
        ],
    );
    control.pause();
    let scrape = Scrape::of(control);
    assert!(!scrape.0.contains_key("tcpause_resume_expected_timestamp_seconds"), "it is open");
    assert_is(
        &scrape,
        &[("tcpause_pauses{end=\"open\"}", 1.0), ("tcpause_paused_since_timestamp_seconds", since)],
    );
    control.resume();
    assert_eq!(control.put("/paused?name=b&ttl=10ms").status, 201);
    // The caller hangs up before its pause is idle.
    let mut client = proxy.connect();
    let scrape = wait_for(control, "the pause has expired", |it| it.is("tcpause_paused", 0.0));
    assert!(!scrape.0.contains_key("tcpause_paused_since_timestamp_seconds"));
    client.assert_echo(b"served");
    drop(control.send("PUT", "/paused?name=c&wait=1h", &[]));
    let how = |how: &str| format!("tcpause_pauses_ended_total{{how=\"{how}\"}}");
    let scrape = wait_for(control, "the pause is undone", |it| {
        it.is("tcpause_paused", 0.0) && it.is("tcpause_pauses_total", 4.0)
    });
    assert_is(&scrape, &[(&how("lifted"), 2.0), (&how("expired"), 1.0)]);
    assert!(same(scrape.sum("tcpause_pauses_ended_total"), 4.0), "{:?}", scrape.0);
}

#[test]
fn held_clients_are_counted_with_the_time_of_their_wait() {
    /// Length of the pause.
    const HELD: Duration = Duration::from_secs(2);
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::to(&upstream);
    let control = proxy.control();
    control.pause();
    let mut clients: Vec<_> = (0..3).map(|_| proxy.connect_held()).collect();
    let left = proxy.connect_held();
    let begin = Instant::now();
    wait_for(control, "all are held", |it| it.is("tcpause_connections{state=\"held\"}", 4.0));
    drop(left);
    wait_for(control, "the oldest has waited", |it| {
        it.get("tcpause_oldest_age_seconds{state=\"held\"}") >= HELD.as_secs_f64()
    });
    control.resume();
    for client in &mut clients {
        client.assert_echo(b"hello");
    }
    let waited = begin.elapsed().as_secs_f64() + 1.0;
    let scrape = Scrape::of(control);
    let hold = |end: &str| format!("tcpause_hold_duration_seconds_{end}");
    let least = 3.0 * (HELD.as_secs_f64() - 0.1);
    let sum = scrape.get(&hold("sum{outcome=\"served\"}"));
    assert!(sum >= least && sum <= 3.0 * waited, "{sum} of {waited}");
    assert_is(
        &scrape,
        &[
            (&hold("count{outcome=\"served\"}"), 3.0),
            (&hold("count{outcome=\"left\"}"), 1.0),
            (&hold("count{outcome=\"refused\"}"), 0.0),
            (&hold("bucket{outcome=\"served\",le=\"1\"}"), 0.0),
            (&hold("bucket{outcome=\"served\",le=\"+Inf\"}"), 3.0),
            ("tcpause_closed_total{cause=\"left-held\"}", 1.0),
        ],
    );
}

#[test]
fn an_absent_server_is_told() {
    let addr = crate::harness::reserve().addr();
    let proxy = Proxy::builder().upstream_at(&addr).arg("--upstream-connect-timeout=300ms").start();
    let control = proxy.control();
    drop(proxy.connect().receive_all());
    let scrape = wait_for(control, "the client is lost", |it| {
        it.is("tcpause_closed_total{cause=\"unreachable\"}", 1.0)
    });
    assert_is(
        &scrape,
        &[("tcpause_upstream_up", 0.0), ("tcpause_connect_attempts_total{result=\"ok\"}", 0.0)],
    );
    assert!(scrape.get("tcpause_connect_attempts_total{result=\"refused\"}") >= 1.0);
    assert!(scrape.get("tcpause_upstream_down_seconds_total") > 0.0);
    assert_is(&scrape, &[("tcpause_outage_wait_seconds_count{outcome=\"refused\"}", 1.0)]);
}

/// And at the end each client is in one place.
#[test]
fn counters_never_fall_under_load() {
    const LOADERS: usize = 4;
    let scrapes = amount(200, 1_000);
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::builder().upstream(&upstream).log_level(Some("info")).start();
    let control = proxy.control();
    let loading = AtomicBool::new(true);
    thread::scope(|scope| {
        for _ in 0..LOADERS {
            scope.spawn(|| {
                while loading.load(Ordering::SeqCst) {
                    proxy.connect().assert_echo(b"hello");
                }
            });
        }
        let mut last = Scrape::of(control);
        for number in 0..scrapes {
            if number % 20 == 0 {
                control.put("/paused?ttl=5ms");
            }
            let scrape = Scrape::of(control);
            scrape.assert_balanced();
            for (name, value) in last.counters() {
                assert!(
                    scrape.get(name) >= value,
                    "{name} fell from {value} to {}",
                    scrape.get(name)
                );
            }
            last = scrape;
        }
        loading.store(false, Ordering::SeqCst);
    });
    control.resume();
    let scrape = wait_for(control, "all are gone", |it| same(it.sum("tcpause_connections"), 0.0));
    let (accepted, closed) =
        (scrape.get("tcpause_accepted_total"), scrape.sum("tcpause_closed_total"));
    assert!(accepted > 100.0 && same(closed, accepted), "{accepted} accepted, {closed} closed");
    let ended = scrape.get("tcpause_connection_duration_seconds_count");
    assert!(same(ended, closed), "{ended} lives, {closed} ends");
}

#[test]
fn a_scrape_is_small_among_thousands() {
    /// Descriptors of this process for everything but the clients, and the share of all of them that this test takes.
    const SPARE: usize = 400;
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::builder().upstream(&upstream).log_level(Some("info")).start();
    let control = proxy.control();
    let files = getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX);
    let files = usize::try_from(files).unwrap_or(usize::MAX);
    let count = amount(3_000, 9_000).min((files / 2).saturating_sub(SPARE)).max(1);
    let held_series = r#"tcpause_connections{state="held"}"#;
    control.pause();
    let held: Vec<_> = (0..count).map(|_| proxy.connect()).collect();
    wait_until("all are held", || control.status().held == count as u64);
    let mut longest = Duration::ZERO;
    let before = proxy.cpu_time();
    for _ in 0..50 {
        let begin = Instant::now();
        let scrape = Scrape::of(control);
        longest = longest.max(begin.elapsed());
        assert_eq!(scrape.get(held_series).to_string(), count.to_string());
    }
    let cpu = proxy.cpu_time().saturating_sub(before) / 50;
    println!(
        "{count} held: the longest of 50 scrapes took {longest:?}, and each {cpu:?} of CPU time"
    );
    drop(held);
}

/// Debian has it in the package `prometheus`.
#[test]
fn promtool_accepts_metrics_and_alerts() {
    // Copies, as a user without privileges may not see the folder of the source.
    let folder = tempfile::tempdir().unwrap();
    for (file, text) in [
        ("src/bin/tcpause/alerts.yml", include_str!("../../../src/bin/tcpause/alerts.yml")),
        ("tests/alerts.yml", include_str!("../../alerts.yml")),
    ] {
        let file = folder.path().join(file);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, text).unwrap();
    }
    let run = |args: &[&str], input: &[u8]| {
        let child = Command::new("promtool")
            .args(args)
            .current_dir(folder.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        let mut child = match child {
            Err(error) if error.kind() == ErrorKind::NotFound => return None,
            child => child.unwrap(),
        };
        child.stdin.take().unwrap().write_all(input).unwrap();
        Some(child.wait_with_output().unwrap())
    };
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::to(&upstream);
    proxy.control().put("/paused?ttl=1h");
    let text = proxy.control().get("/metrics").body;
    let Some(checked) = run(&["check", "metrics"], &text) else {
        return println!("skipped: there is no promtool on this machine");
    };
    assert!(checked.status.success(), "{checked:?}");
    assert!(checked.stdout.is_empty() && checked.stderr.is_empty(), "{checked:?}");
    for args in
        [["check", "rules", "src/bin/tcpause/alerts.yml"], ["test", "rules", "tests/alerts.yml"]]
    {
        let checked = run(&args, b"").unwrap();
        assert!(checked.status.success(), "{args:?}: {checked:?}");
    }
}
