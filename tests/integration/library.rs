//! The crate as a library: a proxy inside a program of somebody else's.

use std::{thread, time::Duration};

use tcpause::{Address, Config, Error, Outcome, Server};

use crate::harness::{self, Addr, Listener, Upstream, echo, wait_until};

fn config(upstream: &Upstream) -> Config {
    let mut config = Config::default();
    config.proxy.addr = Address::tcp("127.0.0.1", 0);
    config.control.addr = Address::tcp("127.0.0.1", 0);
    // Longer than any test waits: a stop must end because all is done.
    config.grace_period = Duration::from_secs(60 * 60);
    config.upstream.addr = upstream.addr().to_string().parse().unwrap();
    config
}

fn addr(address: &Address) -> Addr {
    Addr::parse(&address.to_string()).unwrap()
}

#[test]
fn a_server_is_paused_resumed_and_stopped() {
    let upstream = Upstream::tcp(echo);
    let server = Server::start(config(&upstream)).unwrap();
    let (handle, proxy) = (server.handle(), addr(server.proxy_addr()));
    let mut running = proxy.connect();
    running.assert_echo(b"hello");
    assert!(!handle.is_paused() && !handle.is_idle());
    assert!(!handle.wait_idle(Some(Duration::from_millis(10))));

    assert!(handle.pause(), "it was running before");
    assert!(!handle.pause(), "it was paused before");
    assert!(harness::Control::new(addr(server.control_addr())).is_paused());
    let mut held = proxy.connect();
    wait_until("the client is held", || handle.status().held == 1);
    drop(running);
    assert!(handle.wait_idle(Some(harness::PATIENCE)));
    assert!(handle.is_idle() && handle.clone().is_paused());

    assert!(handle.resume(), "it was paused before");
    assert!(!handle.resume(), "it was running before");
    held.assert_echo(b"served");
    assert_eq!(handle.status().accepted, 2);

    server.stop();
    held.assert_echo(b"still carried");
    drop(held);
    assert_eq!(server.join(), Outcome::Drained);
    assert!(proxy.try_connect().is_err());
}

#[test]
fn many_threads_wait_for_idle() {
    let upstream = Upstream::tcp(echo);
    let server = Server::start(config(&upstream)).unwrap();
    let mut client = addr(server.proxy_addr()).connect();
    client.assert_echo(b"hello");
    thread::scope(|scope| {
        let waiters: Vec<_> =
            (0..8).map(|_| scope.spawn(|| server.handle().wait_idle(None))).collect();
        drop(client);
        for waiter in waiters {
            assert!(waiter.join().unwrap());
        }
    });
    server.stop();
    assert_eq!(server.join(), Outcome::Drained);
}

#[test]
fn a_server_may_be_aborted_or_run_out_of_time() {
    for abort in [true, false] {
        let upstream = Upstream::tcp(echo);
        let server =
            Server::start(Config { grace_period: Duration::from_millis(100), ..config(&upstream) })
                .unwrap();
        let mut client = addr(server.proxy_addr()).connect();
        client.assert_echo(b"hello");
        if abort {
            server.abort();
            assert_eq!(server.join(), Outcome::Aborted);
        } else {
            server.stop();
            assert_eq!(server.join(), Outcome::DeadlineHit);
        }
        assert_ne!(client.receive_all().end, harness::End::Failed(std::io::ErrorKind::WouldBlock));
    }
}

#[test]
fn a_dropped_server_has_closed_everything() {
    const COUNT: u64 = 400;
    let upstream = Upstream::tcp(echo);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("proxy");
    let mut config = config(&upstream);
    config.proxy.addr = format!("unix://{}", path.display()).parse().unwrap();
    let server = Server::start(config).unwrap();
    let (handle, proxy) = (server.handle(), addr(server.proxy_addr()));
    handle.pause();
    let _clients: Vec<_> = (0..COUNT).map(|_| proxy.connect()).collect();
    wait_until("they are held", || handle.status().held == COUNT);
    drop(server);
    assert_eq!(handle.status().held, 0);
    assert!(!path.exists(), "the socket file is still there");
}

#[test]
fn two_servers_do_not_know_each_other() {
    let upstream = Upstream::tcp(echo);
    let (first, second) =
        (Server::start(config(&upstream)).unwrap(), Server::start(config(&upstream)).unwrap());
    first.handle().pause();
    addr(second.proxy_addr()).connect().assert_echo(b"not paused");
    assert!(!second.handle().is_paused());
    for server in [first, second] {
        server.stop();
        assert_eq!(server.join(), Outcome::Drained);
    }
}

#[test]
fn a_start_that_fails_says_what_is_at_fault() {
    let upstream = Upstream::tcp(echo);
    let taken = Listener::bind(&Addr::parse("tcp://127.0.0.1:0").unwrap());
    let mut wrong = config(&upstream);
    wrong.proxy.addr = taken.addr().to_string().parse().unwrap();
    match Server::start(wrong) {
        Err(Error::System(text)) => {
            assert!(text.contains(&taken.addr().port().to_string()), "{text}");
        }
        Err(Error::Config(text)) => panic!("the configuration is not at fault: {text}"),
        Ok(_) => panic!("it started at an address that is taken"),
    }
    let mut wrong = config(&upstream);
    wrong.proxy.tls.cert = Some("/nowhere/cert.pem".into());
    match Server::start(wrong) {
        Err(Error::Config(text)) => assert!(text.contains("key"), "{text}"),
        Err(Error::System(text)) => panic!("the system is not at fault: {text}"),
        Ok(_) => panic!("it started with half a certificate"),
    }
}
