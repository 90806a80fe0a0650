//! Pauses with a name and an end: each holds by itself, and who has asked for it is told.

use std::{process, time::Instant};

use rustix::net::{AddressFamily, SocketFlags, SocketType, netlink::SOCK_DIAG, socket_with};

use crate::harness::{Family, Proxy, Response, Stream, Upstream, echo, in_namespace, wait_until};

/// The names of the pauses that hold.
fn names(proxy: &Proxy) -> Vec<String> {
    proxy.control().status().leases.into_iter().map(|lease| lease.name).collect()
}

fn put(proxy: &Proxy, query: &str) {
    let response = proxy.control().put(&format!("/paused?{query}"));
    assert_eq!((response.status, response.text()), (201, ""), "{query}: {response}");
}

fn delete(proxy: &Proxy, query: &str) {
    let response = proxy.control().delete(&format!("/paused?{query}"));
    assert_eq!((response.status, response.text()), (204, ""), "{query}: {response}");
}

#[test]
fn a_pause_ends_at_its_deadline() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::to(&upstream);
    let begin = Instant::now();
    put(&proxy, "ttl=300ms&name=deploy&reason=version%202");
    let mut client = proxy.connect_held();
    client.assert_echo(b"served without a call");
    assert!(begin.elapsed().as_millis() >= 300);
    assert!(!proxy.control().is_paused());
    // One line tells all, and is a warning: the script that was to end the pause has not.
    let line = proxy.wait_for_log("pause expired");
    let (_, seconds) = line.split_once(" WARN resumed after ").expect(&line);
    assert!(seconds.split(' ').next().unwrap().parse::<f64>().unwrap() >= 0.3, "{line}");
    for part in
        ["; it was by 127.0.0.1:", " as \"deploy\" because \"version 2\"", "; clients held: 1"]
    {
        assert!(line.contains(part), "no {part} in {line}");
    }
    assert_eq!(proxy.log_count("resumed"), 1, "{}", proxy.log_so_far());
}

#[test]
fn the_same_call_renews_it() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::to(&upstream);
    put(&proxy, "ttl=1m&name=a");
    let left = || proxy.control().status().leases[0].expires_in_seconds.unwrap();
    let since = proxy.control().status().leases[0].since.clone();
    wait_until("time passes", || left() < 59.95);
    put(&proxy, "ttl=1m&name=a");
    let later = proxy.control().status();
    assert_eq!((later.leases.len(), &later.leases[0].since), (1, &since));
    assert!(later.leases[0].expires_in_seconds.unwrap() > 59.95, "{later:?}");
    // Its terms are replaced as a whole: the deadline goes, too, and comes again.
    put(&proxy, "name=a");
    assert_eq!(proxy.control().status().leases[0].expires_in_seconds, None);
    put(&proxy, "name=a&ttl=100ms");
    wait_until("it ends", || !proxy.control().is_paused());
    let line = proxy.wait_for_log("pause expired");
    assert!(line.contains(" WARN resumed after "), "{line}");
    assert_eq!(proxy.log_count("pause renewed by"), 3);
}

#[test]
fn it_is_paused_while_any_name_holds() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::to(&upstream);
    put(&proxy, "name=a");
    put(&proxy, "name=b%20c");
    proxy.control().pause();
    let mut client = proxy.connect_held();
    client.send(b"hello");
    assert_eq!(names(&proxy), ["a", "b c", "default"]);
    delete(&proxy, "name=a");
    delete(&proxy, "name=unknown");
    delete(&proxy, "name=default");
    assert_eq!(names(&proxy), ["b c"]);
    assert_eq!(proxy.control().status().held, 1);
    delete(&proxy, "name=b+c");
    assert_eq!(client.receive(5), b"hello");
    assert!(!proxy.control().is_paused());
    let line = proxy.wait_for_log(" as \"a\"; it stays paused");
    assert!(line.contains(" INFO pause lifted by 127.0.0.1:"), "{line}");
    let line = proxy.wait_for_log(" as \"b c\"; clients held: 1");
    assert!(line.contains(" INFO resumed after "), "{line}");
    assert_eq!((proxy.log_count("pause lifted by"), proxy.log_count("resumed")), (3, 1));
}

#[test]
fn a_bare_resume_lifts_all() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::to(&upstream);
    put(&proxy, "name=a");
    put(&proxy, "name=b&ttl=1h");
    proxy.control().resume();
    let status = proxy.control().status();
    assert!(!status.paused && status.paused_since.is_none() && status.leases.is_empty());
    let line = proxy.wait_for_log("resumed after ");
    assert!(line.contains(" s: pause lifted by 127.0.0.1:") && line.contains("\"b\""), "{line}");
    assert_eq!(proxy.log_count("pause lifted by 127.0.0.1:"), 2);
    assert_eq!(proxy.log_count("resumed"), 1);
}

#[test]
fn rejecting_wins_and_goes_with_its_pause() {
    let upstream = Upstream::tcp(echo);
    for option in ["--no-proxy-reject-clients", "--proxy-reject-clients"] {
        let is_default = option == "--proxy-reject-clients";
        let proxy = Proxy::builder().upstream(&upstream).args(is_default.then_some(option)).start();
        let is_rejected = || {
            let mut client = proxy.connect();
            client.send(b"GET / HTTP/1.0\r\n\r\n");
            Response::read(&mut client).status == 503
        };
        put(&proxy, "name=holds&mode=hold");
        let held = proxy.connect_held();
        put(&proxy, "name=rejects&mode=reject");
        assert!(is_rejected());
        delete(&proxy, "name=rejects");
        let mut later = proxy.connect_held();
        let modes: Vec<_> =
            proxy.control().status().leases.into_iter().map(|lease| lease.mode).collect();
        assert_eq!(modes, ["hold"]);
        // Without the parameter, it is as configured.
        put(&proxy, "name=default");
        let status = proxy.control().status();
        assert_eq!(status.leases[1].mode, if is_default { "reject" } else { "hold" });
        assert_eq!(is_default && is_rejected(), is_default);
        proxy.control().resume();
        later.assert_echo(b"hello");
        drop(held);
    }
}

/// Returns true if the system tells the users of TCP connections over the loopback.
fn tells_users() -> bool {
    let flags = SocketFlags::CLOEXEC;
    socket_with(AddressFamily::NETLINK, SocketType::DGRAM, flags, Some(SOCK_DIAG)).is_ok()
}

#[test]
fn the_status_lists_who_why_and_until_when() {
    for family in [Family::Tcp4, Family::Unix] {
        let upstream = Upstream::tcp(echo);
        let proxy = Proxy::builder().control(family).upstream(&upstream).start();
        assert!(proxy.control().status().leases.is_empty());
        put(
            &proxy,
            "name=a&reason=it's+%22v2%22&ttl=90s&mode=reject&drain=quiet:1500ms&half-closed=drop",
        );
        proxy.control().pause();
        let status = proxy.control().status();
        let [first, bare] = &status.leases[..] else { panic!("{status:?}") };
        assert_eq!((first.name.as_str(), first.mode.as_str()), ("a", "reject"));
        assert_eq!(first.reason.as_deref(), Some("it's \"v2\""));
        assert_eq!(first.drain_quiet_seconds, Some(1.5));
        let left = first.expires_in_seconds.unwrap();
        assert!((1.0..=90.0).contains(&left), "{left}");
        assert_eq!((bare.name.as_str(), bare.mode.as_str()), ("default", "hold"));
        assert_eq!(
            (&bare.reason, bare.expires_in_seconds, bare.drain_quiet_seconds),
            (&None, None, None)
        );
        assert_eq!(status.paused_since.as_ref(), Some(&first.since));
        let by = match family {
            Family::Unix => {
                let uid = rustix::process::getuid().as_raw();
                format!("uid {uid}, pid {}", process::id())
            }
            _ => "127.0.0.1:".to_owned(),
        };
        assert!(first.by.starts_with(&by), "{} is not {by}", first.by);
        let uid = format!("uid {}", rustix::process::getuid().as_raw());
        assert!(first.by.contains(&uid) || !tells_users(), "no {uid} in {}", first.by);
        let line = proxy.wait_for_log("paused by");
        assert!(line.contains(&by) && line.contains("because \"it's \\\"v2\\\"\""), "{line}");
        let terms = "for 1m30s, closing what is quiet for 1s500ms, dropping held clients that end their stream, mode reject";
        assert!(line.contains(terms), "{line}");
    }
}

/// As when the proxy runs in a container and its operator outside: the caller's process has no number in there.
#[test]
fn the_caller_of_another_pid_namespace_has_a_user() {
    in_namespace("pause::lease::the_caller_of_another_pid_namespace_has_a_user", || {
        let upstream = Upstream::tcp(echo);
        let proxy = Proxy::builder()
            .control(Family::Unix)
            .upstream(&upstream)
            .under("unshare --pid --fork --kill-child")
            .start();
        put(&proxy, "name=a");
        assert_eq!(proxy.control().status().leases[0].by, "uid 0");
        proxy.wait_for_log("paused by uid 0 as \"a\"");
        delete(&proxy, "name=a");
        proxy.wait_for_log(" s: pause lifted by uid 0; it was by uid 0 as \"a\"");
    });
}

#[test]
fn what_is_wrong_is_refused_and_changes_nothing() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::builder().upstream(&upstream).args(["--pause-max-ttl", "1h"]).start();
    for (query, part) in [
        ("tll=1s", "ttl"),
        ("ttl=5", "5s"),
        ("ttl=0s", "90s"),
        ("ttl=61m", "1h"),
        ("ttl=1s&ttl=2s", "more than once"),
        ("mode=x", "hold or reject"),
        ("wait=soon", "wait"),
        ("on-timeout=kill", "wait=30s"),
        ("wait=1s&on-timeout=die", "resume, keep or kill"),
        ("drain=2s", "quiet:2s"),
        ("drain=quiet:1ms", "quiet:100ms"),
        ("half-closed=close", "serve or drop"),
        ("while=it-rains", "connected"),
        ("wait=1s&on-timeout=keep&while=connected", "resume or kill"),
        ("name=", "name"),
        ("name=a%0Ab", "name"),
        ("reason=%1b[m", "reason"),
        ("name=%ff", "UTF-8"),
        ("timeout=1s", "timeout"),
    ] {
        let sentence = proxy.control().put(&format!("/paused?{query}")).assert_error(400);
        assert!(sentence.contains(part), "{query}: {sentence}");
    }
    let long = ["name", "reason"].map(|name| format!("{name}={}", "x".repeat(201)));
    for query in &long {
        proxy.control().put(&format!("/paused?{query}")).assert_error(400);
    }
    assert!(!proxy.control().is_paused());
    proxy.control().pause();
    for query in ["nam=a", "name=", "release=x", "release=0", "release=1&name=a", "ttl=1s"] {
        proxy.control().delete(&format!("/paused?{query}")).assert_error(400);
    }
    assert_eq!(names(&proxy), ["default"]);
}

#[test]
fn the_longest_pause_is_the_settings() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::builder().upstream(&upstream).args(["--pause-max-ttl", "200ms"]).start();
    let sentence = proxy.control().put("/paused?ttl=201ms").assert_error(400);
    assert!(sentence.contains("pause.max-ttl") && sentence.contains("200ms"), "{sentence}");
    assert!(!proxy.control().is_paused());
    for query in ["", "?ttl=200ms"] {
        assert_eq!(proxy.control().put(&format!("/paused{query}")).status, 201);
        let mut client = proxy.connect();
        client.assert_echo(b"served without a call");
    }
    wait_until("both are told of", || proxy.log_count("pause expired") == 2);
}

#[test]
fn there_are_only_so_many() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::to(&upstream);
    for number in 0..64 {
        put(&proxy, &format!("name={number}"));
    }
    proxy.control().put("/paused?name=more").assert_error(409);
    proxy.control().put("/paused?name=0&while=connected").assert_error(409);
    put(&proxy, "name=0&ttl=1h");
    delete(&proxy, "name=7");
    put(&proxy, "name=more");
    assert_eq!(names(&proxy).len(), 64);
}

/// Returns the answer that a caller gets, to the byte.
fn whole(proxy: &Proxy, method: &str, target: &str) -> String {
    let request = format!("{method} {target} HTTP/1.1\r\nHost: localhost\r\n\r\n");
    let text = String::from_utf8(proxy.control().raw(request.as_bytes())).unwrap();
    let lines = text.split("\r\n").filter(|line| !line.starts_with("Date: "));
    lines.collect::<Vec<_>>().join("\r\n")
}

#[test]
fn the_four_calls_without_parameters_are_as_they_were() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::to(&upstream);
    let get = |paused: bool| {
        let body = format!("{{\"paused\": {paused}}}");
        let head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length:";
        format!("{head} {}\r\nConnection: close\r\n\r\n{body}", body.len())
    };
    let created = "HTTP/1.1 201 Created\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
    let no_content = "HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n";
    for _round in 0..2 {
        assert_eq!(whole(&proxy, "GET", "/paused"), get(false));
        assert_eq!(whole(&proxy, "PUT", "/paused"), created);
        assert_eq!(whole(&proxy, "PUT", "/paused?name=other&ttl=1h"), created);
        assert_eq!(whole(&proxy, "GET", "/paused"), get(true));
        assert_eq!(whole(&proxy, "GET", "/paused/block-until-idle"), no_content);
        assert_eq!(whole(&proxy, "DELETE", "/paused"), no_content);
        assert_eq!(whole(&proxy, "DELETE", "/paused"), no_content);
    }
}

#[test]
fn some_are_let_through_and_it_stays_paused() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::to(&upstream);
    let release = |count: u32| proxy.control().delete(&format!("/paused?release={count}"));
    release(3).assert_error(409);
    proxy.control().pause();
    assert_eq!((release(3).status, release(3).text()), (200, "{\"released\": 0}\n"));
    let mut clients: Vec<Stream> = (0..3)
        .map(|number| {
            let client = proxy.connect();
            proxy.control().wait_counts(|status| status.held, number + 1);
            client
        })
        .collect();
    let response = release(2);
    assert_eq!((response.status, response.text()), (200, "{\"released\": 2}\n"));
    assert_eq!(response.header("Content-Type"), Some("application/json"));
    clients[0].assert_echo(b"the oldest");
    clients[1].assert_echo(b"the next");
    proxy.control().wait_counts(|status| (status.paused, status.held, status.active), (true, 1, 2));
    assert_eq!(release(9).text(), "{\"released\": 1}\n");
    clients[2].assert_echo(b"the last");
    assert_eq!(proxy.control().wait_status("it is there", |status| status.held == 0).active, 3);
    assert_eq!(names(&proxy), ["default"]);
}
