//! A pause that waits for idle and rolls back, and one that lasts as long as the connection it is asked for on.

use std::{
    io::{BufRead as _, BufReader, Read as _},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::harness::{Addr, End, Family, Proxy, Response, Stream, Upstream, echo, wait_until};

/// A proxy with one connection that is carried.
fn busy(upstream: &Upstream) -> (Proxy, Stream) {
    let proxy = Proxy::to(upstream);
    let mut client = proxy.connect();
    client.assert_echo(b"hello");
    proxy.control().wait_counts(|status| status.active, 1);
    (proxy, client)
}

/// An answer whose body is JSON.
fn json(response: &Response, status: u16) -> Value {
    assert_eq!(response.status, status, "{response}");
    assert_eq!(response.header("Content-Type"), Some("application/json"), "{response}");
    serde_json::from_slice(&response.body).unwrap_or_else(|error| panic!("{error}: {response}"))
}

/// Sends a PUT that is not answered yet; returns when its pause has begun.
fn begin(proxy: &Proxy, query: &str) -> Stream {
    let before = proxy.control().status().leases.len();
    let stream = proxy.control().send("PUT", &format!("/paused?{query}"), &[]);
    proxy.control().wait_status("the pause has begun", |status| status.leases.len() > before);
    stream
}

/// Reads the head and the line of an answer behind which the connection stays open.
fn attached(stream: &mut Stream) -> Value {
    let mut text = String::new();
    while !text.ends_with("}\n") {
        text.push(char::from(stream.receive(1)[0]));
    }
    let (head, line) = text.split_once("\r\n\r\n").unwrap();
    assert_eq!(head, "HTTP/1.1 201 Created\r\nContent-Type: application/json\r\nConnection: close");
    serde_json::from_str(line).unwrap()
}

#[track_caller]
fn assert_resumed(proxy: &Proxy) {
    wait_until("it is not paused any more", || !proxy.control().is_paused());
    proxy.connect().assert_echo(b"served");
}

#[test]
fn it_answers_once_the_last_that_was_released_has_left_without_being_served() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::builder().upstream(&upstream).arg("--resume-rate=1").start();
    proxy.control().pause();
    let mut held: Vec<Stream> = (0..3).map(|_| proxy.connect()).collect();
    proxy.control().wait_counts(|status| status.held, 3);
    assert_eq!(proxy.control().delete("/paused?release=3").text(), "{\"released\": 3}\n");
    held[0].assert_echo(b"the first is served");
    let begun = Instant::now();
    let mut caller = begin(&proxy, "wait=1m&name=deploy");
    // The others leave before the rate lets them go.
    held.into_iter().for_each(Stream::reset);
    assert_eq!(json(&Response::read(&mut caller), 201)["idle"], true);
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
}

#[test]
fn it_answers_once_it_is_idle() {
    let upstream = Upstream::tcp(echo);
    let (proxy, client) = busy(&upstream);
    let mut caller = begin(&proxy, "wait=1h&name=deploy");
    drop(client);
    let response = Response::read(&mut caller);
    let answer = json(&response, 201);
    assert!(response.text().ends_with("}\n"), "{response}");
    let expected = serde_json::json!({
        "paused": true, "idle": true, "reset": 0, "waited_seconds": answer["waited_seconds"]
    });
    assert_eq!(answer, expected);
    assert!(answer["waited_seconds"].as_f64().is_some_and(|seconds| seconds > 0.0));
    // It stays paused, although the caller has gone.
    let status = proxy.control().status();
    assert_eq!((status.leases.len(), status.leases[0].name.as_str()), (1, "deploy"));
    let idle = json(&proxy.control().put("/paused?wait=0s"), 201);
    assert_eq!((&idle["idle"], &idle["paused"]), (&Value::Bool(true), &Value::Bool(true)));
}

#[test]
fn at_the_deadline_it_is_undone_or_kept() {
    let upstream = Upstream::tcp(echo);
    let (proxy, mut client) = busy(&upstream);
    for (query, paused) in
        [("", false), ("&on-timeout=resume", false), ("&ttl=1h&name=a&on-timeout=keep", true)]
    {
        let begin = Instant::now();
        let response = proxy.control().put(&format!("/paused?wait=150ms{query}"));
        assert!(begin.elapsed() >= Duration::from_millis(150));
        response.assert_error(504);
        let answer = json(&response, 504);
        assert_eq!((&answer["active"], &answer["paused"]), (&1.into(), &paused.into()));
        assert!(answer["oldest_seconds"].as_f64().is_some_and(|age| age >= 0.1), "{response}");
        let oldest: Vec<_> =
            answer["oldest"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
        assert!(oldest.len() == 1 && oldest[0].starts_with("tcp://127.0.0.1:"), "{response}");
        assert!(oldest[0].contains(" for ") && oldest[0].contains(", idle 0s"), "{response}");
        assert_eq!(proxy.control().is_paused(), paused, "{query}");
        client.assert_echo(b"nobody has noticed");
    }
    let line = proxy.wait_for_log("pause undone: it was not idle in time; it was by 127.0.0.1:");
    assert!(line.contains(" WARN resumed after "), "{line}");
    proxy.control().resume();
}

#[test]
fn at_the_deadline_what_is_left_is_reset() {
    let upstream = Upstream::tcp(echo);
    let (proxy, mut client) = busy(&upstream);
    let mut other = proxy.connect();
    other.assert_echo(b"hello");
    let response = proxy.control().put("/paused?wait=50ms&on-timeout=kill");
    let answer = json(&response, 201);
    assert_eq!((&answer["idle"], &answer["reset"]), (&true.into(), &2.into()), "{response}");
    assert_eq!(client.receive_all().end, End::Reset);
    assert_eq!(other.receive_all().end, End::Reset);
    assert_eq!(upstream.received().end, End::Reset);
    assert_eq!(upstream.received().end, End::Reset);
    proxy
        .control()
        .wait_counts(|status| (status.paused, status.active, status.killed), (true, 0, 2));
}

#[test]
fn what_is_undone_leaves_an_older_pause_of_its_name() {
    let upstream = Upstream::tcp(echo);
    let (proxy, client) = busy(&upstream);
    assert_eq!(proxy.control().put("/paused?name=a&reason=old&mode=reject&ttl=1h").status, 201);
    let response = proxy.control().put("/paused?name=a&reason=new&wait=10ms");
    assert_eq!(json(&response, 504)["paused"], true);
    let lease = proxy.control().status().leases.remove(0);
    assert_eq!((lease.reason.as_deref(), lease.mode.as_str()), (Some("old"), "reject"));
    assert!(lease.expires_in_seconds.is_some());
    // What is not undone takes its place.
    drop(client);
    json(&proxy.control().put("/paused?name=a&reason=new&wait=1h"), 201);
    let leases =
        proxy.control().wait_status("one is left", |status| status.leases.len() == 1).leases;
    assert_eq!((leases[0].reason.as_deref(), leases[0].expires_in_seconds), (Some("new"), None));
    drop(proxy.connect_held());
}

#[test]
fn a_caller_that_hangs_up_has_asked_for_nothing() {
    let upstream = Upstream::tcp(echo);
    for query in ["wait=1h", "wait=1h&on-timeout=keep&ttl=1h", "wait=1h&while=connected"] {
        for ways in 0..3 {
            let (proxy, _client) = busy(&upstream);
            let mut caller = begin(&proxy, query);
            let hung_up = Instant::now();
            match ways {
                0 => drop(caller),
                1 => caller.reset(),
                _ => {
                    caller.finish();
                    // Whoever still reads is told why.
                    drop(caller.receive_all());
                }
            }
            assert_resumed(&proxy);
            assert!(hung_up.elapsed() < Duration::from_secs(10));
            proxy.wait_for_log("pause undone: its caller has gone; it was by ");
        }
    }
}

#[test]
fn a_wait_ends_with_its_pause() {
    let upstream = Upstream::tcp(echo);
    let (proxy, _client) = busy(&upstream);
    for while_connected in ["", "&while=connected"] {
        let mut caller = proxy.control().send(
            "PUT",
            &format!("/paused?wait=1h&ttl=100ms{while_connected}"),
            &[],
        );
        Response::read(&mut caller).assert_error(409);
        for lift in ["/paused", "/paused?name=a"] {
            let mut caller = begin(&proxy, &format!("wait=1h&name=a{while_connected}"));
            proxy.control().delete("/paused?name=another");
            assert!(proxy.control().is_paused());
            proxy.control().delete(lift);
            let sentence = Response::read(&mut caller).assert_error(409);
            assert!(sentence.contains("lifted"), "{sentence}");
        }
    }
    assert_resumed(&proxy);
}

#[test]
fn a_renewal_by_another_call_ends_no_wait() {
    let upstream = Upstream::tcp(echo);
    let (proxy, client) = busy(&upstream);
    let mut caller = begin(&proxy, "wait=1h&name=a&ttl=1h");
    assert_eq!(proxy.control().put("/paused?name=a&ttl=2h").status, 201);
    drop(client);
    json(&Response::read(&mut caller), 201);
    let leases =
        proxy.control().wait_status("one is left", |status| status.leases.len() == 1).leases;
    assert!(leases[0].expires_in_seconds.is_some_and(|left| left > 3600.0), "{leases:?}");
}

#[test]
fn all_who_wait_under_one_name_are_answered() {
    let upstream = Upstream::tcp(echo);
    let (proxy, client) = busy(&upstream);
    let mut first = begin(&proxy, "wait=1h&name=a");
    let begin_another = |query: &str| {
        let stream = proxy.control().send("PUT", &format!("/paused?name=a&{query}"), &[]);
        proxy.control().wait_status("its terms hold", |status| {
            status.leases[0].reason.as_deref().is_some_and(|reason| query.contains(reason))
        });
        stream
    };
    let mut second = begin_another("wait=1h&reason=second");
    let third = proxy.control().put("/paused?name=a&wait=0s&on-timeout=keep");
    assert_eq!(json(&third, 504)["paused"], true);
    let mut fourth = begin_another("wait=1h&reason=fourth");
    drop(client);
    for caller in [&mut first, &mut second, &mut fourth] {
        assert_eq!(json(&Response::read(caller), 201)["idle"], true);
    }
    assert_eq!(proxy.control().status().leases.len(), 1);
}

#[test]
fn it_is_paused_while_the_caller_is_connected() {
    for family in [Family::Tcp4, Family::Unix] {
        let upstream = Upstream::tcp(echo);
        let proxy = Proxy::builder().control(family).upstream(&upstream).start();
        for way in 0..3 {
            proxy.control().wait_idle();
            let mut caller = proxy.control().send("PUT", "/paused?while=connected", &[]);
            let answer = attached(&mut caller);
            assert_eq!((&answer["paused"], &answer["idle"]), (&true.into(), &true.into()));
            assert!(proxy.control().is_paused());
            let mut held = proxy.connect_held();
            match way {
                0 => drop(caller),
                1 => caller.reset(),
                _ => {
                    caller.finish();
                    assert_eq!(caller.receive_all().bytes, b"");
                }
            }
            held.assert_echo(b"served as the caller has gone");
            assert!(!proxy.control().is_paused());
        }
        let line = proxy.wait_for_log("pause ended with its connection");
        assert!(line.contains(" INFO resumed after ") && line.contains("\"default\""), "{line}");
    }
}

#[test]
fn it_is_told_at_once_whether_it_is_idle() {
    let upstream = Upstream::tcp(echo);
    let (proxy, mut client) = busy(&upstream);
    let mut caller = proxy.control().send("PUT", "/paused?while=connected", &[]);
    assert_eq!(attached(&mut caller)["idle"], false);
    client.assert_echo(b"still carried");
    // Beside a pause of that name that does not depend on a connection.
    assert_eq!(proxy.control().put("/paused").status, 201);
    drop(caller);
    proxy.control().wait_status("one is left", |status| status.leases.len() == 1);
    assert!(proxy.control().is_paused());
}

#[test]
fn first_it_waits_and_then_it_lasts_as_long_as_the_connection() {
    let upstream = Upstream::tcp(echo);
    let (proxy, client) = busy(&upstream);
    let response = proxy.control().put("/paused?wait=10ms&while=connected");
    assert_eq!(json(&response, 504)["paused"], false);
    let mut caller = begin(&proxy, "wait=1h&while=connected");
    drop(client);
    assert_eq!(attached(&mut caller)["idle"], true);
    let mut held = proxy.connect_held();
    drop(caller);
    held.assert_echo(b"served");
    // With connections that do not end.
    let mut caller =
        proxy.control().send("PUT", "/paused?wait=10ms&while=connected&on-timeout=kill", &[]);
    assert_eq!(attached(&mut caller)["reset"], 1);
    assert_eq!(held.receive_all().end, End::Reset);
    drop(caller);
    assert_resumed(&proxy);
}

#[test]
fn a_caller_that_is_killed_pauses_no_more() {
    let Some(curl) = curl() else {
        println!("skipped: there is no curl on this machine");
        return;
    };
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::to(&upstream);
    let url = match proxy.control().addr() {
        Addr::Tcp(addr) => format!("http://{addr}/paused?while=connected"),
        other => panic!("{other}"),
    };
    let mut caller = Command::new(curl)
        .args(["-sSfN", "-X", "PUT", &url])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(caller.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert!(line.contains("\"paused\": true"), "{line}");
    assert!(proxy.control().is_paused());
    caller.kill().unwrap();
    caller.wait().unwrap();
    assert_resumed(&proxy);
}

/// The name of curl, if this machine has it.
pub(crate) fn curl() -> Option<&'static str> {
    Command::new("curl").arg("--version").stdout(Stdio::null()).status().ok()?;
    Some("curl")
}

#[test]
fn each_byte_of_the_caller_renews() {
    let upstream = Upstream::tcp(echo);
    let (proxy, client) = busy(&upstream);
    let mut waiting = begin(&proxy, "name=a&while=connected&ttl=1h&wait=1h");
    let left = || {
        let leases = proxy.control().status().leases;
        leases.iter().map(|lease| lease.expires_in_seconds.unwrap()).fold(1e9, f64::min)
    };
    for round in 0..2 {
        wait_until("time passes", || left() < 3599.9);
        waiting.send(b"\n");
        wait_until("the time has begun anew", || left() > 3599.9);
        if round == 0 {
            drop(client.try_clone());
            client.finish();
            assert_eq!(attached(&mut waiting)["idle"], true);
        }
    }
    // Nobody's turn is taken by one that never stops.
    let mut flood = waiting.try_clone();
    let flooding = crate::harness::spawn(move || {
        let noise = vec![b'.'; 64 << 10];
        while std::io::Write::write_all(&mut flood, &noise).is_ok() {}
    });
    for _ask in 0..20 {
        assert!(proxy.control().is_paused());
    }
    proxy.control().resume();
    flooding.join().unwrap();
}

#[test]
fn all_that_a_caller_has_sent_is_read_to_its_end() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::to(&upstream);
    let mut caller = proxy.control().send("PUT", "/paused?while=connected&ttl=1h", &[]);
    attached(&mut caller);
    let mut held = proxy.connect_held();
    caller.send(&vec![b'.'; 300 << 10]);
    drop(caller);
    // No other call makes the API look.
    held.assert_echo(b"served as the caller has gone");
}

#[test]
fn a_caller_that_says_nothing_loses_its_pause() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::to(&upstream);
    let mut caller = proxy.control().send("PUT", "/paused?while=connected&ttl=100ms", &[]);
    attached(&mut caller);
    // The proxy closes, in order: nothing more comes.
    let mut rest = Vec::new();
    caller.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"");
    assert!(!proxy.control().is_paused());
    proxy.wait_for_log("pause expired");
    // So it is if another lifts it.
    let mut caller = proxy.control().send("PUT", "/paused?while=connected&name=a", &[]);
    attached(&mut caller);
    proxy.control().delete("/paused?name=a");
    caller.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"");
}

#[test]
fn a_stop_ends_it() {
    let upstream = Upstream::tcp(echo);
    let mut proxy = Proxy::to(&upstream);
    let mut caller = proxy.control().send("PUT", "/paused?while=connected", &[]);
    attached(&mut caller);
    proxy.terminate();
    assert_eq!(caller.receive_all().bytes, b"");
    assert_eq!(proxy.exit_code(), 0);
}

/// An operator that waits for idle would restart the upstream behind a proxy that is gone.
#[test]
fn a_proxy_that_stops_is_not_what_a_pause_waits_for() {
    let upstream = Upstream::tcp(echo);
    let (proxy, client) = busy(&upstream);
    let mut caller = begin(&proxy, "wait=1h");
    proxy.terminate();
    proxy.wait_refused();
    drop(client);
    let sentence = Response::read(&mut caller).assert_error(503);
    assert!(sentence.contains("stopping"), "{sentence}");
}
