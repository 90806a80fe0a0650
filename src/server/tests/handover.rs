//! A whole hand-over within one process: what a process has once goes on in the other.

use std::{
    os::unix::net::{UnixListener, UnixStream},
    sync::atomic::AtomicBool,
};

use super::*;
use crate::{
    config::{HalfClosed, MonitorConfig},
    pause::{
        gate::Mode,
        leases::{Lifetime, Terms},
    },
};

/// Returns a configuration before an upstream that echoes, with the addresses `proxy` and sockets of the API in `folder`.
fn config(proxy: Address, threads: usize, folder: &std::path::Path) -> Config {
    let at = |name: &str| Address::Unix(folder.join(name));
    let upstream = UnixListener::bind(folder.join("upstream.sock")).unwrap();
    let echo = move || {
        for client in upstream.incoming().map_while(Result::ok) {
            let echo = move || io::copy(&mut &client, &mut &client);
            thread::Builder::new().spawn(echo).unwrap();
        }
    };
    thread::Builder::new().spawn(echo).unwrap();
    let mut config = Config::default();
    config.proxy.addr = proxy;
    config.proxy.threads = NonZeroUsize::new(threads);
    config.upstream.addr = at("upstream.sock");
    config.control.addr = at("control.sock");
    config.monitor = MonitorConfig { addr: Some(at("monitor.sock")), ..config.monitor };
    config
}

/// Taker within this process, over which the giver has no power.
struct Immortal;

impl TakerProcess for Immortal {
    fn pid(&self) -> u32 {
        std::process::id()
    }
    fn stop(&mut self) {}
    fn resume(&mut self) {}
    fn kill(&mut self) {}
}

/// Hands everything over to a server with this configuration. The giver stands still for ever, as if its process had ended.
fn hand_over(before: Server, config: Config) -> Server {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let after = thread::Builder::new()
        .spawn(move || Server::take_over(theirs, config, &AtomicBool::new(false)));
    let outcome = before.giver().give(ours, &mut Immortal, &|| {}, false);
    let after = after.unwrap().join().unwrap();
    Box::leak(Box::new(before));
    assert!(outcome.is_ok(), "{outcome:?}, {after:?}");
    after.unwrap().0
}

fn names(folder: &std::path::Path) -> Vec<String> {
    let names = std::fs::read_dir(folder).unwrap();
    let mut names: Vec<_> =
        names.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn totals_pauses_and_files_go_on_with_another_number_of_threads() {
    let folder = tempfile::tempdir().unwrap();
    let proxy = folder.path().join("proxy.sock");
    let mut config = config(Address::Unix(proxy.clone()), 3, folder.path());
    let server = Server::start(config.clone()).unwrap();
    let mut lasting: Vec<_> = (0..7).map(|_| UnixStream::connect(&proxy).unwrap()).collect();
    let mut answer = [0; 5];
    for client in &mut lasting {
        client.write_all(b"hello").unwrap();
        client.read_exact(&mut answer).unwrap();
    }
    lasting.truncate(4);
    wait_for(&server, (4, 0, 0));
    let terms = Terms {
        name: "deploy".to_owned(),
        reason: None,
        by: "a test".to_owned(),
        mode: Mode::Hold,
        ttl: Some(Duration::from_secs(3_600)),
        quiet: None,
        half_closed: HalfClosed::Serve,
    };
    server.shared.pauses.put(terms, Lifetime::Committed, 1).unwrap();
    let mut held = UnixStream::connect(&proxy).unwrap();
    wait_for(&server, (4, 1, 0));
    let last_number = server.shared.workers.last_number();
    let before = server.handle().status();
    let addresses = (server.proxy_addr().clone(), server.control_addr().clone());
    let ends = server.shared.pauses.lock().next_end();

    config.proxy.threads = NonZeroUsize::new(2);
    let server = hand_over(server, config.clone());
    let now = server.handle().status();
    assert_balanced(&before, &now);
    assert!(now.uptime_seconds >= before.uptime_seconds, "{} falls", now.uptime_seconds);
    assert_eq!((now.active, now.held, now.accepted), (4, 1, before.accepted));
    assert_eq!((now.bytes_to_client, now.closed), (before.bytes_to_client, before.closed));
    assert_eq!((now.paused_since, now.leases[0].name.as_str()), (before.paused_since, "deploy"));
    assert_eq!((now.upgrades, now.last_upgrade.unwrap().connections), (1, Some(5)));
    assert_eq!((server.proxy_addr().clone(), server.control_addr().clone()), addresses);
    assert_eq!(now.listeners, before.listeners);
    // It has come over the channel, and a moment may pass until its begin is noted.
    let moved = server.shared.pauses.lock().next_end().unwrap().duration_since(ends.unwrap());
    assert!(moved < Duration::from_secs(1), "the lease is longer by {moved:?}");
    let expected = ["control.sock", "monitor.sock", "proxy.sock", "upstream.sock"];
    assert_eq!(names(folder.path()), expected);

    // Once more, as an upgrade is no exception.
    let server = hand_over(server, config);
    assert_eq!(server.handle().status().upgrades, 2);
    assert_eq!(server.shared.workers.last_number(), last_number);
    assert!(server.handle().resume());
    for client in lasting.iter_mut().chain([&mut held]) {
        client.write_all(b"world").unwrap();
        client.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"world");
    }
    drop((lasting, held));
    server.stop();
    assert_eq!(server.join(), Outcome::Drained);
    assert_eq!(names(folder.path()), ["upstream.sock"]);
}

#[test]
fn a_lease_that_ends_meanwhile_ends_in_the_taker_alone() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(Address::tcp("127.0.0.1", 0), 1, folder.path());
    let server = Server::start(config.clone()).unwrap();
    let terms = Terms {
        name: "short".to_owned(),
        reason: None,
        by: "a test".to_owned(),
        mode: Mode::Hold,
        ttl: Some(Duration::from_secs(1)),
        quiet: None,
        half_closed: HalfClosed::Serve,
    };
    server.shared.pauses.put(terms, Lifetime::Committed, 1).unwrap();
    let watch = |server: &Server| {
        let (sender, changed) = bounded(1);
        server.handle().watch(move || {
            sender.try_send(()).ok();
        });
        changed
    };
    let in_giver = watch(&server);
    let server = hand_over(server, config);
    let resumed = watch(&server);
    if server.handle().is_paused() {
        resumed.recv_timeout(DEADLINE).unwrap();
    }
    assert!(!server.handle().is_paused());
    assert!(in_giver.recv_timeout(AFTERMATH).is_err());
}

/// Returns the status of the answer to a caller that names this host.
fn status_for(host: &str, control: SocketAddr) -> String {
    let mut caller = TcpStream::connect(control).unwrap();
    caller.set_read_timeout(Some(DEADLINE)).unwrap();
    write!(caller, "GET /status HTTP/1.0\r\nHost: {host}\r\n\r\n").unwrap();
    let mut answer = String::new();
    caller.read_to_string(&mut answer).unwrap();
    answer.split(' ').nth(1).unwrap().to_owned()
}

#[test]
fn sockets_that_were_passed_keep_their_addresses_in_place_of_those_of_the_configuration() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = config(Address::tcp("127.0.0.1", 0), 1, folder.path());
    config.control.addr = Address::tcp("control.example", 1);
    config.monitor.addr = Some(Address::tcp("monitor.example", 1));
    let control = TcpListener::bind("127.0.0.1:0").unwrap();
    let path = folder.path().join("passed.sock");
    let mut sockets = Sockets::default();
    sockets.add("control", control.try_clone().unwrap().into()).unwrap();
    sockets.add("monitor", UnixListener::bind(&path).unwrap().into()).unwrap();
    let mut server = Server::start_on(sockets, config.clone()).unwrap();
    let control = control.local_addr().unwrap();
    let monitors = [Address::tcp("another.example", 1), Address::Unix(folder.path().join("new"))];
    for next in monitors.map(Some).into_iter().chain([None]) {
        for (host, status) in [
            ("control.example", "403"),
            ("monitor.example", "403"),
            ("another.example", "403"),
            ("localhost", "200"),
        ] {
            assert_eq!(status_for(host, control), status, "{host}");
        }
        assert_eq!(server.control_addr().to_string(), format!("tcp://{control}"));
        assert_eq!(server.monitor_addr(), Some(&Address::Unix(path.clone())));
        config.monitor.addr = next;
        server = hand_over(server, config.clone());
    }
    assert_eq!(server.monitor_addr(), Some(&Address::Unix(path)));
}

#[test]
fn the_pace_goes_on_with_the_same_upstream_alone() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = config(Address::tcp("127.0.0.1", 0), 1, folder.path());
    let server = Server::start(config.clone()).unwrap();
    let window = |server: &Server| server.shared.admission.queue.under_way().max();
    assert!(server.shared.admission.queue.under_way().resize(|_window| Some(37)));
    let server = hand_over(server, config.clone());
    assert_eq!(window(&server), 37);
    config.upstream.addr = Address::Unix(folder.path().join("another.sock"));
    let server = hand_over(server, config);
    assert_eq!(window(&server), 4);
}
