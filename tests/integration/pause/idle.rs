//! Waiting until nothing is carried.

use std::io::Read;

use crate::harness::{Proxy, Response, Upstream, echo, spawn, wait_until};

const WAIT: &str = "/paused/block-until-idle";

#[test]
fn the_wait_returns_at_once_when_idle() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::to(&upstream);
    proxy.control().wait_idle();
    proxy.control().pause();
    proxy.control().wait_idle();
    assert_eq!(proxy.control().get(&format!("{WAIT}?timeout=0s")).status, 204);
}

#[test]
fn held_clients_do_not_count() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::to(&upstream);
    proxy.control().pause();
    let mut client = proxy.connect_held();
    client.send(b"hello");
    proxy.control().wait_idle();
    assert_eq!(proxy.control().status().held, 1);
    proxy.control().resume();
    assert_eq!(client.receive(5), b"hello");
}

#[test]
fn rejected_clients_do_not_count() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::builder().upstream(&upstream).arg("--proxy-reject-clients").start();
    proxy.control().pause();
    let mut silent = proxy.connect();
    proxy.control().wait_status("it is there", |status| status.accepted == 1);
    proxy.control().wait_idle();
    assert_eq!(Response::read(&mut silent).status, 503);
}

#[test]
fn the_wait_returns_when_the_last_connection_has_closed() {
    for paused in [false, true] {
        let upstream = Upstream::tcp(echo);
        let proxy = Proxy::to(&upstream);
        let mut first = proxy.connect();
        let mut last = proxy.connect();
        first.assert_echo(b"hello");
        last.assert_echo(b"hello");
        if paused {
            proxy.control().pause();
        }
        let control = proxy.control().clone();
        let waiter = spawn(move || control.get(WAIT));
        drop(first);
        proxy.control().wait_status("one is left", |status| status.active == 1);
        last.assert_echo(b"still carried");
        assert!(!waiter.is_finished());
        drop(last);
        assert_eq!(waiter.join().unwrap().status, 204);
        proxy.control().wait_counts(|status| status.active, 0);
    }
}

#[test]
fn a_connection_that_is_being_dialled_counts() {
    let anywhere = crate::harness::Addr::Tcp((std::net::Ipv4Addr::LOCALHOST, 0).into());
    let listener = crate::harness::Listener::bind(&anywhere);
    listener.backlog(0);
    let proxy = Proxy::builder().upstream_at(&listener.addr()).start();
    let clients: Vec<_> = (0..5).map(|_| proxy.connect()).collect();
    proxy.control().wait_status("some are dialled for", |status| status.connecting > 0);
    assert_eq!(proxy.control().get(&format!("{WAIT}?timeout=10ms")).status, 504);
    drop(clients);
    let _upstream = Upstream::on(listener, echo);
    proxy.control().wait_idle();
}

#[test]
fn many_wait_at_once() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::to(&upstream);
    let mut client = proxy.connect();
    client.assert_echo(b"hello");
    let mut waiters: Vec<_> = (0..40).map(|_| proxy.control().send("GET", WAIT, &[])).collect();
    assert!(!proxy.control().is_paused(), "the API answers others meanwhile");
    client.assert_echo(b"still carried");
    drop(client);
    for waiter in &mut waiters {
        let response = Response::read(waiter);
        assert_eq!(response.status, 204, "{response}");
    }
}

#[test]
fn a_waiter_that_leaves_costs_nothing_that_lasts() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::to(&upstream);
    let mut client = proxy.connect();
    client.assert_echo(b"hello");
    proxy.control().wait_status("it is carried", |status| status.active == 1);
    let (descriptors, threads) = (proxy.descriptors(), proxy.threads());
    for round in 0..300 {
        let waiter = proxy.control().send("GET", WAIT, &[]);
        if round % 2 == 0 {
            waiter.reset();
        } else {
            drop(waiter);
        }
        // Each answer shows that the API has come past the waiter, and that no place is used up.
        assert!(!proxy.control().is_paused());
    }
    wait_until("no descriptor is left", || proxy.descriptors() <= descriptors);
    wait_until("no thread is left", || proxy.has_no_more_threads_than(threads));
    drop(client);
    proxy.control().wait_idle();
}

#[test]
fn the_wait_may_have_a_timeout() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::to(&upstream);
    let mut client = proxy.connect();
    client.assert_echo(b"hello");
    for timeout in ["0s", "50ms", "0.1s"] {
        proxy.control().get(&format!("{WAIT}?timeout={timeout}")).assert_error(504);
    }
    let mut waiter = proxy.control().send("GET", &format!("{WAIT}?timeout=1h"), &[]);
    client.assert_echo(b"still carried");
    drop(client);
    let mut answer = Vec::new();
    waiter.read_to_end(&mut answer).unwrap();
    assert_eq!(Response::parse(&answer).status, 204);
}
