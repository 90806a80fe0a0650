//! The monitor: the listener for those that only look.

use std::{fs, os::unix::fs::PermissionsExt as _};

use serde_json::Value;

use crate::harness::{
    Addr, Control, End, Family, Proxy, Response, Upstream, echo, program, wait_until,
};

/// Callers that the monitor serves at a time, a quarter of all.
const SEATS: usize = 32;

/// Returns the monitor of a proxy that has one.
#[track_caller]
pub(super) fn monitor(proxy: &Proxy) -> Control {
    let line = proxy.wait_for_log("monitor listens on ");
    let word = line.split_once("listens on ").unwrap().1.split_whitespace().next().unwrap();
    Control::new(Addr::parse(word).unwrap_or_else(|| panic!("no address: {line}")))
}

#[test]
fn it_shows_the_status_without_reasons_and_changes_nothing() {
    let upstream = Upstream::tcp(echo);
    for family in [Family::Tcp4, Family::Unix] {
        let builder = Proxy::builder().upstream(&upstream);
        let addr = match family {
            Family::Unix => format!("unix://{}", builder.path("monitor.sock").display()),
            _ => "127.0.0.1:0".to_owned(),
        };
        let proxy = builder.arg(format!("--monitor-addr={addr}")).start();
        let monitor = monitor(&proxy);
        assert_eq!(proxy.control().put("/paused?name=deploy&reason=secret&ttl=1h").status, 201);

        let response = monitor.get("/status");
        let status: Value = serde_json::from_slice(&response.body).unwrap();
        let lease = &status["leases"][0];
        assert_eq!(
            (lease["name"].as_str(), lease["mode"].as_str()),
            (Some("deploy"), Some("hold"))
        );
        assert!(lease["reason"].is_null() && lease["by"].is_null(), "{response}");
        assert!(lease["since"].is_string() && lease["expires_in_seconds"].is_number());
        assert!(proxy.control().get("/status").text().contains("secret"));
        assert_eq!(monitor.get("/status").status, 200);
        assert_eq!(monitor.request("HEAD", "/status", &[]).text(), "");
        let list = monitor.get("/");
        assert!(list.text().contains("/status") && !list.text().contains("/paused"), "{list}");

        for (method, target) in
            [("DELETE", "/paused"), ("PUT", "/paused?name=x"), ("POST", "/status"), ("PUT", "/")]
        {
            let response = monitor.request(method, target, &[]);
            let sentence = response.assert_error(405);
            assert!(sentence.contains("only reads") && sentence.contains("control.addr"));
            assert_eq!(response.header("Allow"), Some("GET, HEAD"), "{response}");
        }
        for target in ["/paused", "/paused/block-until-idle", "/statu"] {
            monitor.get(target).assert_error(404);
        }
        assert!(monitor.get("/status?pretty").assert_error(400).contains("takes none"));
        assert!(proxy.control().is_paused());
    }
}

#[test]
fn web_pages_are_refused_there_too() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::builder()
        .upstream(&upstream)
        .args(["--monitor-addr=127.0.0.1:0", "--control-hosts=proxy.example"])
        .start();
    let monitor = monitor(&proxy);
    monitor.request("POST", "/status", &["Origin: http://localhost"]).assert_error(403);
    monitor.request("GET", "/status", &["Origin: http://localhost"]).assert_error(403);
    let sentence = monitor.request("GET", "/status", &["Host: a.example"]).assert_error(403);
    assert!(sentence.contains("control.hosts"), "{sentence}");
    assert_eq!(monitor.request("GET", "/status", &["Host: proxy.example:9100"]).status, 200);
}

#[test]
fn its_address_is_its_own() {
    for (args, parts) in [
        (["--monitor-addr=localhost:3000", ""], ["--monitor-addr", "proxy.addr"]),
        (["--monitor-addr=:3001", ""], ["--monitor-addr", "control.addr"]),
        (
            ["--monitor-addr=unix:///a", "--control-addr=unix:///a"],
            ["--monitor-addr", "control.addr"],
        ),
        (["--monitor-addr=9100", ""], ["--monitor-addr", "9100"]),
        (["--monitor-addr=", ""], ["--monitor-addr", "ADDRESS"]),
        (["--monitor-addr=localhost:99999", ""], ["--monitor-addr", "99999"]),
        (["--monitor-addr=unix://a", ""], ["--monitor-addr", "unix://"]),
        (["--monitor-addr=:9100", "--monitor-mode=0660"], ["--monitor-mode", "file"]),
        (["--monitor-mode=066", ""], ["--monitor-mode", "0660"]),
    ] {
        let args = args.iter().filter(|arg| !arg.is_empty());
        let finished = program().args(args).run();
        assert_eq!(finished.code, 2, "{finished:?}");
        assert!(parts.iter().all(|part| finished.stderr.contains(part)), "{parts:?}: {finished:?}");
        assert_eq!(finished.stderr.lines().count(), 1, "{finished:?}");
    }
    let upstream = Upstream::tcp(echo);
    let taken = format!("--monitor-addr={}", upstream.addr());
    let finished = Proxy::builder().upstream_at(&"localhost:1").arg(taken).fail();
    assert_eq!(finished.code, 1, "{finished:?}");
    assert!(finished.stderr.contains("monitor.addr: cannot listen on"), "{finished:?}");
}

#[test]
fn it_may_listen_anywhere_and_its_file_has_a_mode() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::builder().upstream(&upstream).arg("--monitor-addr=0.0.0.0:0").start();
    assert_eq!(Control::new(monitor(&proxy).addr().clone()).get("/status").status, 200);
    assert_eq!(proxy.log_count(" WARN "), 0, "{}", proxy.log_so_far());

    let builder = Proxy::builder().upstream(&upstream).arg("--monitor-mode=0666");
    let path = builder.path("monitor.sock");
    let proxy = builder.arg(format!("--monitor-addr=unix://{}", path.display())).start();
    assert_eq!(monitor(&proxy).get("/status").status, 200);
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o666);
}

#[test]
fn both_listeners_answer_until_the_last_connection_is_gone() {
    let upstream = Upstream::tcp(echo);
    let builder = Proxy::builder().upstream(&upstream);
    let path = builder.path("monitor.sock");
    let mut proxy = builder.arg(format!("--monitor-addr=unix://{}", path.display())).start();
    let monitor = monitor(&proxy);
    let mut client = proxy.connect();
    client.assert_echo(b"hello");
    proxy.terminate();
    proxy.wait_refused();
    for api in [&monitor, proxy.control()] {
        assert_eq!(api.get("/status").status, 200);
        assert!(api.get("/ready").assert_error(503).contains("stopping"));
    }
    client.assert_echo(b"still here");
    client.finish();
    assert_eq!(client.receive_all().end, End::Eof);
    assert_eq!(proxy.exit_code(), 0);
    assert!(!path.exists(), "the socket file is left behind");
}

#[test]
fn a_paused_proxy_is_ready_unless_it_is_asked_otherwise() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::builder().upstream(&upstream).arg("--monitor-addr=127.0.0.1:0").start();
    for api in [&monitor(&proxy), proxy.control()] {
        let ready = |target: &str| {
            let response = api.get(target);
            let body: Value = serde_json::from_slice(&response.body).unwrap();
            assert_eq!(body["ready"], response.status == 200, "{response}");
            response.status
        };
        assert_eq!((ready("/ready"), ready("/ready?paused=503")), (200, 200));
        proxy.control().pause();
        assert_eq!((ready("/ready"), ready("/ready?paused=503")), (200, 503));
        proxy.control().resume();
        for wrong in ["/ready?paused=200", "/ready?paused", "/ready?x=1"] {
            api.get(wrong).assert_error(400);
        }
        api.request("POST", "/ready", &[]).assert_error(405);
    }
}

/// Callers of the monitor may be many and slow. They take a quarter of the seats, and the newest takes that of the oldest.
#[test]
fn its_callers_keep_no_operator_out() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::builder().upstream(&upstream).arg("--monitor-addr=127.0.0.1:0").start();
    let monitor = monitor(&proxy);
    let half = |api: &Control| {
        let mut caller = api.addr().connect();
        caller.send(format!("GET /status HTTP/1.1\r\nHost: {}\r\n", api.host()).as_bytes());
        caller
    };
    let mut operators: Vec<_> = (0..20).map(|_| half(proxy.control())).collect();
    let mut callers: Vec<_> = (0..4 * SEATS).map(|_| half(&monitor)).collect();
    // Each that came too early has made room.
    for caller in &mut callers[..3 * SEATS] {
        let answer = Response::read(caller);
        assert!(matches!(answer.status, 503), "{answer}");
    }
    for operator in &mut operators {
        operator.send(b"\r\n");
        assert_eq!(Response::read(operator).status, 200);
    }
    let mut answered = 0;
    for caller in &mut callers[3 * SEATS..] {
        caller.send(b"\r\n");
        answered += usize::from(Response::read(caller).status == 200);
    }
    assert_eq!(answered, SEATS);
    drop(callers);
    wait_until("the monitor has room", || monitor.get("/status").status == 200);
}
