//! A worker's panic in a whole proxy: it costs the connections of that worker, and nothing else.

mod fence;
mod handover;
mod recorded;

use std::{
    io::{self, ErrorKind, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    num::NonZeroUsize,
    os::unix::net::UnixStream,
    sync::Mutex,
    thread,
    time::{Duration, Instant},
};

use crossbeam_channel::bounded;

use super::{
    listen::{Listeners, Listening},
    *,
};
use crate::{
    handle::Status,
    handover::channel::{Channel, Outbox},
    stats::cause::CloseCause,
};

/// Time that is long enough for any machine; only a defect makes a test wait for it.
const DEADLINE: Duration = Duration::from_secs(20);
/// Time after a panic in which it may affect further clients.
const AFTERMATH: Duration = Duration::from_millis(100);
/// Time until the test sees a panic.
const DELAY: Duration = Duration::from_millis(300);

/// Starts a proxy that listens at each of `ips`, before an upstream that echoes. Returns the addresses with their port.
fn start(
    ips: &[[u8; 4]],
    threads: usize,
    max_connections: Option<usize>,
) -> (Server, Vec<SocketAddr>) {
    let upstream = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut config = Config::default();
    config.upstream.addr = upstream.local_addr().unwrap().to_string().parse().unwrap();
    config.proxy.threads = NonZeroUsize::new(threads);
    config.proxy.max_connections = max_connections.and_then(NonZeroUsize::new);
    // The thread runs until the tests end.
    let accept = move || {
        for client in upstream.incoming().map_while(Result::ok) {
            let echo = move || io::copy(&mut &client, &mut &client);
            thread::Builder::new().spawn(echo).unwrap();
        }
    };
    thread::Builder::new().spawn(accept).unwrap();
    let any_port = |&ip: &[u8; 4]| SocketAddr::from((ip, 0));
    let control = Listening::tcp(&[any_port(&[127, 0, 0, 1])], 1).unwrap();
    let proxy = Listening::tcp(&ips.iter().map(any_port).collect::<Vec<_>>(), threads).unwrap();
    let addresses = proxy.listeners[0].iter().map(|it| it.local_inet().unwrap()).collect();
    let plan = Plan::new(config).unwrap();
    (plan.assemble(Listeners { proxy, control, monitor: None }, None).unwrap().0, addresses)
}

/// Sends a few bytes and waits for their echo.
fn echo(client: &mut TcpStream) -> io::Result<()> {
    let mut answer = [0; 5];
    client.set_read_timeout(Some(DEADLINE))?;
    client.write_all(b"hello")?;
    client.read_exact(&mut answer)?;
    assert_eq!(&answer, b"hello");
    Ok(())
}

/// Checks that each accepted client is in one state or has ended by one cause, and that no count has fallen.
#[track_caller]
fn assert_balanced(before: &Status, now: &Status) {
    let present = now.held + now.connecting + now.active + now.rejecting;
    assert_eq!(now.accepted, now.closed.values().sum::<u64>() + present, "{now:?}");
    assert!(now.accepted >= before.accepted, "{before:?} {now:?}");
    let falls = |(cause, count): (&String, &u64)| *count < before.closed[cause];
    assert!(!now.closed.iter().any(falls), "{before:?} {now:?}");
}

/// Makes one short connection.
fn come_and_go(proxy: SocketAddr) -> io::Result<()> {
    echo(&mut TcpStream::connect_timeout(&proxy, DEADLINE)?)
}

/// Waits until the status shows these numbers of relayed clients, of held ones, and of panics.
#[track_caller]
fn wait_for(server: &Server, expected: (u64, u64, u64)) {
    let deadline = Instant::now() + DEADLINE;
    let counts = |status: Status| (status.active, status.held, status.worker_panics);
    while counts(server.handle().status()) != expected {
        assert!(Instant::now() < deadline, "{:?}", server.handle().status());
        thread::park_timeout(Duration::from_millis(1));
    }
}

#[test]
fn a_panic_costs_the_connections_of_its_worker_alone() {
    const LASTING: usize = 40;
    const LOADERS: usize = 4;
    const PANICS: usize = 3;
    /// Number of clients that a worker accepts before it panics, and number of clients that are served after the last panic.
    const BETWEEN: u64 = 150;
    const AFTER: u64 = 300;

    let (server, addresses) = start(&[[127, 0, 0, 1]], 2, None);
    let proxy = addresses[0];
    let counters = server.shared.workers.counters(0);
    let mut lasting: Vec<_> = (0..LASTING).map(|_| TcpStream::connect(proxy).unwrap()).collect();
    for client in &mut lasting {
        echo(client).unwrap();
    }

    let (mut failures, mut panics, mut later) = (Vec::new(), Vec::new(), 0);
    let mut before = server.handle().status();
    let (sender, finished) = bounded(0);
    counters.panic_at.set(counters.balance().accepted + BETWEEN);
    thread::scope(|scope| {
        for _loader in 0..LOADERS {
            let sender = sender.clone();
            scope.spawn(move || {
                let mut begin = Instant::now();
                while sender.send((begin, come_and_go(proxy), Instant::now())).is_ok() {
                    begin = Instant::now();
                }
            });
        }
        while later < AFTER {
            let (begin, result, end) = finished.recv_timeout(DEADLINE).unwrap();
            let status = server.handle().status();
            assert_balanced(&before, &status);
            before = status;
            if (panics.len() as u64) < counters.panics.get() {
                panics.push(Instant::now());
                let is_last = panics.len() == PANICS;
                counters.panic_at.set(if is_last {
                    0
                } else {
                    counters.balance().accepted + BETWEEN
                });
            }
            match result {
                Ok(()) if panics.len() == PANICS => later += 1,
                Ok(()) => {}
                Err(error) => failures.push((begin, end, error)),
            }
        }
        drop(finished);
    });

    for (begin, end, error) in &failures {
        let is_excused = |panic: &Instant| *begin < *panic + AFTERMATH && *panic < *end + DELAY;
        assert!(panics.iter().any(is_excused), "{error} without a panic");
    }
    assert!(failures.len() <= PANICS * LOADERS, "{failures:?}");
    // The other worker's connections go on. The lost ones are reset, so that no client takes this for the end of a stream.
    let (survivors, ends): (Vec<_>, Vec<_>) = lasting
        .into_iter()
        .map(|mut client| (echo(&mut client).map_err(|error| error.kind()), client))
        .partition(|(result, _)| result.is_ok());
    let is_reset = |result: &Result<(), ErrorKind>| {
        matches!(result, Err(ErrorKind::ConnectionReset | ErrorKind::BrokenPipe))
    };
    assert!(ends.iter().all(|(result, _)| is_reset(result)), "{ends:?}");
    assert!(!survivors.is_empty() && !ends.is_empty(), "both workers had some");
    wait_for(&server, (survivors.len() as u64, 0, PANICS as u64));
    let status = server.handle().status();
    assert_balanced(&before, &status);
    // Each panic took the client that was being accepted with it, and may have taken others.
    let lost = status.closed["panic"];
    assert!(lost >= (ends.len() + PANICS) as u64, "{lost} of {} and more", ends.len());
    // A loader may be at its next connection while the worker still has the one before.
    assert!(lost <= (ends.len() + 2 * PANICS * LOADERS) as u64, "{lost}: {}", ends.len());
    server.handle().pause();
    let mut held = TcpStream::connect(proxy).unwrap();
    wait_for(&server, (survivors.len() as u64, 1, PANICS as u64));
    drop(survivors);
    assert!(server.handle().wait_idle(Some(DEADLINE)));
    wait_for(&server, (0, 1, PANICS as u64));
    server.handle().resume();
    echo(&mut held).unwrap();
}

#[test]
fn a_panic_keeps_no_client_of_any_address_out() {
    const CLIENTS: usize = 40;

    let (server, addresses) = start(&[[127, 0, 0, 1], [127, 0, 0, 2]], 1, Some(2));
    let counters = server.shared.workers.counters(0);
    counters.panic_at.set(7);
    let lost = thread::scope(|scope| {
        let clients: Vec<_> = addresses
            .iter()
            .cycle()
            .take(CLIENTS)
            .map(|&address| scope.spawn(move || come_and_go(address)))
            .collect();
        clients.into_iter().filter_map(|client| client.join().unwrap().err()).count()
    });
    // The panic costs the two served clients, and the client that is being accepted.
    assert!(lost <= 3, "{lost} of {CLIENTS} clients are lost");
    assert_eq!(server.handle().status().worker_panics, 1);
    for address in addresses {
        come_and_go(address).unwrap();
    }
}

#[test]
fn workers_share_the_clients_of_an_inherited_socket() {
    const CLIENTS: usize = 40;

    let upstream = TcpListener::bind("127.0.0.1:0").unwrap();
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    let proxy = socket.local_addr().unwrap();
    let mut config = Config::default();
    config.upstream.addr = upstream.local_addr().unwrap().to_string().parse().unwrap();
    config.control.addr = Address::tcp("127.0.0.1", 0);
    config.proxy.threads = NonZeroUsize::new(2);
    let mut sockets = Sockets::default();
    sockets.add("proxy", socket.try_clone().unwrap().into()).unwrap();
    let server = Server::start_on(sockets, config).unwrap();
    assert_eq!(server.proxy_addr().to_string(), format!("tcp://{proxy}"));
    let _clients: Vec<_> = (0..CLIENTS).map(|_| TcpStream::connect(proxy).unwrap()).collect();
    wait_for(&server, (CLIENTS as u64, 0, 0));
    for worker in 0..2 {
        let clients = server.shared.workers.counters(worker).clients();
        assert!(clients > CLIENTS as u64 / 4, "worker {worker} has {clients} of {CLIENTS}");
    }
    server.abort();
    assert_eq!(server.join(), Outcome::Aborted);
    TcpStream::connect(proxy).unwrap();
}

#[test]
fn the_heart_beats_only_while_every_worker_ends_its_turns() {
    const MOMENT: Duration = Duration::from_millis(100);

    let (server, addresses) = start(&[[127, 0, 0, 1]], 2, None);
    let heartbeat = server.heartbeat();
    assert!(heartbeat.wait(DEADLINE) && heartbeat.wait(DEADLINE));
    // The worker that closes the last connection hangs, as this callback is its own.
    let (hang, hanging) = bounded::<()>(0);
    server.shared.pauses.gate.watch_idle(move || {
        hanging.recv().ok();
    });
    come_and_go(addresses[0]).unwrap();
    let begin = Instant::now();
    while heartbeat.wait(MOMENT) {
        assert!(begin.elapsed() < DEADLINE, "none hangs");
    }
    assert!(!heartbeat.wait(MOMENT), "one hangs");
    drop(hang);
    assert!(heartbeat.wait(DEADLINE), "it goes on");
    server.stop();
    assert_eq!(server.join(), Outcome::Drained);
    assert!(heartbeat.wait(DEADLINE), "ended threads do not hang");
}

#[test]
fn a_standstill_does_not_wait_for_threads_that_a_stop_has_ended() {
    let (mut server, _addresses) = start(&[[127, 0, 0, 1]], 2, None);
    let shared = Arc::clone(&server.shared);
    let assert_stands = |control: Option<&Control>| {
        shared.freeze.ask_all();
        if let Some(control) = control {
            control.notifier().notify();
        }
        let stands = shared.freeze.await_standing(Instant::now() + DEADLINE);
        shared.freeze.thaw();
        assert!(stands);
    };
    server.stop();
    for worker in server.workers.drain(..) {
        assert_eq!(worker.join().unwrap(), End::Drained);
    }
    assert_stands(server.control.as_ref());
    drop(server.control.take());
    assert_stands(None);
    shared.freeze.ask_all();
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let outbox = Outbox { begin: Instant::now(), channel: Mutex::new(Channel::new(ours)).into() };
    let described = shared.freeze.describe(Arc::new(outbox), Instant::now() + DEADLINE);
    assert_eq!(described, Err("it is stopping".to_owned()));
}

#[test]
fn a_stop_counts_the_connections_that_it_cuts() {
    let (server, addresses) = start(&[[127, 0, 0, 1]], 2, None);
    let shared = Arc::clone(&server.shared);
    let mut carried = TcpStream::connect(addresses[0]).unwrap();
    echo(&mut carried).unwrap();
    server.handle().pause();
    let held = TcpStream::connect(addresses[0]).unwrap();
    wait_for(&server, (1, 1, 0));
    server.abort();
    assert_eq!(server.join(), Outcome::Aborted);
    let balance = shared.workers.balance();
    assert_eq!((balance.accepted, balance.closed[CloseCause::Stopped as usize]), (2, 2));
    assert_eq!((balance.held, balance.active), (0, 0));
    drop(held);
}
