//! Held clients that have sent something and ended their stream: they are served, or dropped if a pause says so.

use std::{
    fs,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use super::wait::curl;
use crate::harness::{Addr, End, FIGURE, Family, Proxy, Received, Stream, Upstream, in_namespace};

/// Time in which a client is noticed that its kernel has forgotten: a second for that, 3 s until the next probe, and some more.
const NOTICED_AFTER_MAX: Duration = Duration::from_secs(15);

/// Answers one HTTP request.
fn http(mut stream: Stream) -> Received {
    let bytes = stream.receive(4);
    stream.send(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nConnection: close\r\n\r\nyes");
    Received { bytes, end: End::Eof }
}

/// Answers behind the end of the request.
fn late(mut stream: Stream) -> Received {
    let received = stream.receive_all();
    stream.send(b"the answer");
    received
}

fn port(proxy: &Proxy) -> u16 {
    let Addr::Tcp(addr) = proxy.addr() else { panic!("a TCP proxy") };
    addr.port()
}

fn left_held(proxy: &Proxy) -> u64 {
    proxy.control().status().closed["left-held"]
}

/// Returns a client that has sent a request and ended its stream.
fn half_closed(proxy: &Proxy) -> Stream {
    let mut client = proxy.connect();
    client.send(b"a request");
    client.finish();
    client
}

#[track_caller]
fn pause(proxy: &Proxy, query: &str) {
    assert_eq!(proxy.control().put(&format!("/paused?{query}")).status, 201, "{query}");
}

/// Starts a program that must be there.
fn start(command: &mut Command) -> Child {
    command.stdout(Stdio::piped()).spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"))
}

fn output(child: Child) -> String {
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn an_http_client_that_times_out_and_tries_again_sends_its_request_twice_only_under_serve() {
    let Some(curl) = curl() else {
        println!("skipped: curl is missing");
        return;
    };
    for (treatment, requests) in [("serve", 2), ("drop", 1)] {
        let upstream = Upstream::tcp(http);
        let proxy = Proxy::to(&upstream);
        pause(&proxy, &format!("half-closed={treatment}"));
        let url = format!("http://127.0.0.1:{}/", port(&proxy));
        let first = start(Command::new(curl).args(["-s", "--max-time", "0.3", &url]))
            .wait_with_output()
            .unwrap();
        assert_eq!(first.status.code(), Some(28), "it has timed out");
        let dropped = u64::from(treatment == "drop");
        proxy.control().wait_status("the first try is known", |status| {
            status.closed["left-held"] == dropped && status.held == 1 - dropped
        });
        let second = start(Command::new(curl).args(["-s", "--max-time", "60", &url]));
        proxy.control().wait_status("the second try is held", |status| status.held == 2 - dropped);
        proxy.control().resume();
        assert_eq!(output(second), "yes");
        for _ in 0..requests {
            assert_eq!(upstream.session().received.bytes, b"GET ", "{treatment}");
        }
        assert_eq!(upstream.accepted(), requests, "{treatment}");
        assert_eq!(left_held(&proxy), dropped);
    }
}

#[test]
fn netcat_that_ends_its_stream_gets_its_answer_under_serve_and_the_end_under_drop() {
    // Only one of its makes has the option.
    let helped = Command::new("nc").arg("-h").output();
    if !helped.is_ok_and(|it| String::from_utf8_lossy(&it.stderr).contains("-N")) {
        println!("skipped: there is no nc with the option -N");
        return;
    }
    for (treatment, answer) in [("serve", "the answer"), ("drop", "")] {
        let upstream = Upstream::tcp(late);
        let proxy =
            Proxy::builder().upstream(&upstream).args(["--hold-half-closed", treatment]).start();
        proxy.control().pause();
        let script = format!("printf request | nc -N 127.0.0.1 {}", port(&proxy));
        let netcat = start(Command::new("sh").args(["-c", &script]));
        if treatment == "serve" {
            proxy.control().wait_status("it is held", |status| status.held == 1);
        } else {
            proxy.control().wait_status("it is dropped", |status| {
                status.closed["left-held"] == 1 && status.held == 0
            });
        }
        proxy.control().resume();
        assert_eq!(output(netcat), answer);
        let is_served = treatment == "serve";
        if is_served {
            assert_eq!(upstream.received().bytes, b"request");
        }
        assert_eq!(upstream.accepted(), usize::from(is_served));
        let status = proxy.control().status();
        assert_eq!((status.rejected, status.failed), (0, 0));
    }
}

#[test]
fn the_strictest_pause_counts_also_for_clients_that_came_before_it() {
    for family in [Family::Tcp4, Family::Unix] {
        let upstream = Upstream::tcp(late);
        let proxy = Proxy::builder()
            .listen(family)
            .upstream(&upstream)
            .args(["--hold-half-closed", "drop"])
            .start();
        pause(&proxy, "name=a&half-closed=serve");
        let mut first = half_closed(&proxy);
        let mut open = proxy.connect();
        open.send(b"a request");
        proxy.control().wait_status("all are held", |status| status.held == 2);
        pause(&proxy, "name=a&half-closed=serve");
        assert_eq!(proxy.control().status().held, 2, "{family:?}");

        // One without the word has the setting's.
        pause(&proxy, "name=b");
        assert_eq!(first.receive_all(), Received { bytes: Vec::new(), end: End::Eof });
        let mut second = half_closed(&proxy);
        assert_eq!(second.receive_all(), Received { bytes: Vec::new(), end: End::Eof });
        proxy.control().wait_status("both are dropped", |status| {
            status.closed["left-held"] == 2 && (status.held, status.rejecting) == (1, 0)
        });
        assert_eq!(proxy.control().delete("/paused?name=b").status, 204);
        let mut third = half_closed(&proxy);
        proxy.control().wait_status("it is held", |status| status.held == 2);
        open.finish();
        proxy.control().resume();
        for client in [&mut open, &mut third] {
            assert_eq!(client.receive_all().bytes, b"the answer", "{family:?}");
        }
        let status = proxy.control().status();
        assert_eq!((upstream.accepted(), status.rejected, status.failed), (2, 0, 0));
    }
}

#[test]
fn a_client_behind_a_balancer_is_dropped_with_its_header_unread() {
    let upstream = Upstream::tcp(late);
    let proxy = Proxy::builder()
        .upstream(&upstream)
        .args(["--proxy-accept-proxy-from", "127.0.0.0/8", "--hold-half-closed", "drop"])
        .start();
    proxy.control().pause();
    let mut client = proxy.connect();
    client.send(b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\na request");
    client.finish();
    assert_eq!(client.receive_all(), Received { bytes: Vec::new(), end: End::Eof });
    proxy.control().wait_status("it is dropped", |status| status.closed["left-held"] == 1);
    assert_eq!(upstream.accepted(), 0);
}

#[test]
fn an_upgrade_keeps_the_treatment() {
    let upstream = Upstream::tcp(late);
    let proxy = Proxy::to(&upstream);
    pause(&proxy, "name=a");
    let mut served = half_closed(&proxy);
    proxy.control().wait_status("it is held", |status| status.held == 1);
    assert_eq!(proxy.upgrade().status, 200);
    assert_eq!(proxy.control().status().held, 1, "it is still held");
    assert_eq!(proxy.control().put("/paused?name=b&half-closed=drop").status, 201);
    assert_eq!(served.receive_all(), Received { bytes: Vec::new(), end: End::Eof });
    assert_eq!(proxy.upgrade().status, 200);
    assert_eq!(half_closed(&proxy).receive_all().end, End::Eof);
    proxy.control().wait_status("both are dropped", |status| {
        status.closed["left-held"] == 2 && status.held == 0
    });
    assert_eq!(proxy.control().delete("/paused?name=b").status, 204);
    let mut served = half_closed(&proxy);
    proxy.control().wait_status("it is held", |status| status.held == 1);
    proxy.control().resume();
    assert_eq!(served.receive_all().bytes, b"the answer");
}

/// In a network of its own, where a kernel forgets a closed connection after a second instead of a minute.
#[test]
fn a_client_is_noticed_that_its_kernel_has_forgotten() {
    in_namespace("pause::half_closed::a_client_is_noticed_that_its_kernel_has_forgotten", || {
        if let Err(error) = fs::write("/proc/sys/net/ipv4/tcp_fin_timeout", "1") {
            return println!("skipped: the time in FIN-WAIT-2 cannot be changed: {error}");
        }
        let upstream = Upstream::tcp(late);
        let proxy = Proxy::to(&upstream);
        proxy.control().pause();
        let mut waits = half_closed(&proxy);
        let gone = half_closed(&proxy);
        proxy.control().wait_status("both are held", |status| status.held == 2);
        let begin = Instant::now();
        drop(gone);
        let status = proxy.control().wait_status("one is left", |status| status.held == 1);
        let took = begin.elapsed();
        println!("{FIGURE}a client that has gone is noticed after {took:?}");
        assert!(took < NOTICED_AFTER_MAX, "{took:?}");
        assert_eq!(status.closed["left-held"], 1);
        proxy.control().resume();
        assert_eq!(waits.receive_all().bytes, b"the answer");
        assert_eq!(upstream.accepted(), 1);
    });
}
