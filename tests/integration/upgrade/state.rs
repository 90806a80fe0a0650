//! All that a process keeps is there after an upgrade.

use std::{cell::Cell, path::Path, thread, time::Duration};

use rustix::process::Signal;

use super::{Cast, Scene};
use crate::harness::{Family, Proxy, Received, Response, Upstream, echo, pattern, wait_until};

#[test]
fn every_state_goes_on_over_three_upgrades() {
    for (listen, control, upstream, is_followed) in [
        (Family::Tcp4, Family::Unix, Family::Tcp4, true),
        (Family::Unix, Family::Tcp4, Family::Unix, true),
        (Family::Abstract, Family::Abstract, Family::Tcp4, true),
        (Family::Tcp4, Family::Unix, Family::Tcp4, false),
        (Family::Unix, Family::Tcp4, Family::Unix, false),
        (Family::Abstract, Family::Abstract, Family::Unix, false),
    ] {
        let builder = Proxy::builder().listen(listen).control(control);
        let builder = if is_followed { builder.followed() } else { builder };
        let mut cast = Cast::before(upstream, builder);
        let before = cast.proxy.control().status();
        for count in 1..=3 {
            let pid = cast.proxy.pid();
            let mut caller = cast.ask();
            // A handshake that has begun in between would hold up the way back.
            cast.answer_rejected();
            assert_eq!(Response::read(&mut caller).status, 200);
            let now = cast.proxy.control().status();
            assert_eq!(now.pid != pid, is_followed, "without a manager, the number stays");
            assert_eq!((now.upgrades, now.held, now.active), (count, before.held, before.active));
            assert!(now.accepted >= before.accepted, "{now:?}");
            assert!(now.bytes_to_client >= before.bytes_to_client);
            assert_eq!(now.paused_since, before.paused_since);
            assert_eq!(now.leases.len(), 3);
            assert!(now.uptime_seconds >= before.uptime_seconds);
        }
        let (proxy, _upstream) = cast.finish();
        let accepted = proxy.control().status().accepted;
        proxy.connect().assert_echo(b"and new ones");
        assert_eq!(proxy.control().status().accepted, accepted + 1);
    }
}

/// Fewer threads have several listeners each, as closing one would reset the clients in its queue. More get them back.
#[test]
fn listeners_do_not_grow_in_number() {
    let upstream = Upstream::tcp(echo);
    let text = |threads: usize| format!("proxy:\n  threads: {threads}\n");
    let proxy = Proxy::builder().upstream(&upstream).file("tcpause.yml", text(6)).start();
    let sockets = || proxy.descriptors_of("socket:");
    let before = sockets();
    for threads in [1, 6, 2, 6] {
        std::fs::write(proxy.dir().join("tcpause.yml"), text(threads)).unwrap();
        proxy.upgrade();
        wait_until("there are no more than before", || sockets() <= before);
    }
}

#[test]
fn the_socket_files_go_with_the_last_process() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::builder().listen(Family::Unix).control(Family::Unix).upstream(&upstream);
    let proxy = proxy.start();
    let paths = [proxy.addr().path().to_owned(), proxy.control().addr().path().to_owned()];
    let identities = || {
        paths.each_ref().map(|path| std::fs::metadata(path).unwrap()).map(|it| {
            use std::os::unix::fs::MetadataExt;
            (it.ino(), it.mode())
        })
    };
    let before = identities();
    proxy.upgrade();
    proxy.upgrade();
    assert_eq!(identities(), before);
    proxy.connect().assert_echo(b"by the same file");
    proxy.terminate();
    wait_until("the files have gone", || paths.iter().all(|path| !path.exists()));
}

/// An abstract name has no file: it is there as long as one process listens.
#[test]
fn abstract_names_go_with_the_last_process() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::builder().listen(Family::Abstract).control(Family::Abstract);
    let mut proxy = proxy.upstream(&upstream).start();
    for _upgrade in 0..2 {
        proxy.upgrade();
        proxy.connect().assert_echo(b"by the same name");
    }
    // The name is taken while it is the heir's.
    let other = Proxy::builder().listen_at(proxy.addr()).upstream(&upstream).fail();
    assert!(other.code == 1 && other.stderr.contains("in use"), "{other:?}");
    let addrs = [proxy.addr().clone(), proxy.control().addr().clone()];
    proxy.terminate();
    wait_until("the names have gone", || addrs.iter().all(|addr| addr.try_connect().is_err()));
    assert_eq!(proxy.exit_code(), 0);
}

/// Bytes that wait in the proxy were copied, or are in a pipe that moves with its connection.
#[test]
fn bytes_under_way_arrive_without_pipes_and_with_one_for_each_worker() {
    for pipes in ["0", "1"] {
        // The buffers of UNIX sockets are small: a client that sends and does not read soon fills all of them.
        let upstream = Upstream::start(Family::Unix, echo);
        let builder = Proxy::builder().listen(Family::Unix).upstream(&upstream);
        let proxy = builder.args(["--proxy-pipes", pipes]).start();
        let others = proxy.descriptors_of("pipe:");
        let bytes = pattern(7, 8 << 20);
        let mut clients: Vec<_> = (0..4).map(|_| proxy.connect()).collect();
        let scene = thread::scope(|scope| {
            for client in &clients {
                let (mut sender, bytes) = (client.try_clone(), &bytes);
                scope.spawn(move || {
                    sender.send(bytes);
                    sender.finish();
                });
            }
            let moved = Cell::new(0);
            proxy.control().wait_status("nothing moves", |status| {
                let before = moved.replace(status.bytes_to_client);
                before > 0 && before == moved.get()
            });
            let scene = Scene::set(proxy);
            for _upgrade in 0..2 {
                let in_use = scene.proxy.descriptors_of("pipe:") - others;
                assert_eq!(in_use > 0, pipes == "1", "{in_use}");
                scene.proxy.upgrade();
            }
            for client in &mut clients {
                assert!(client.receive_all() == Received::ended(&bytes), "bytes differ");
            }
            scene
        });
        scene.finish();
    }
}

#[test]
fn a_socket_file_that_is_lost_is_told_with_the_remedy() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::builder().listen(Family::Unix).control(Family::Unix).upstream(&upstream);
    let proxy = proxy.start();
    let (front, api) = (proxy.addr().path(), proxy.control().addr().path());
    let warning = |setting: &str, path: &Path| {
        format!(
            "{setting}: the socket file {} is gone or is another one, so nobody can connect to tcpause by it; stop tcpause and start it again",
            path.display()
        )
    };
    let warnings = || proxy.log_count("the socket file");
    proxy.upgrade();
    assert_eq!(warnings(), 0);
    std::fs::remove_file(front).unwrap();
    proxy.upgrade();
    proxy.wait_for_log(&warning("proxy.addr", front));
    assert_eq!(warnings(), 1, "the other file is there");
    // Each upgrade tells of a file, also of one that was lost before the last.
    std::fs::rename(api, api.with_extension("old")).unwrap();
    let _another = std::os::unix::net::UnixListener::bind(api).unwrap();
    let before = proxy.heirs().len();
    proxy.signal(Signal::USR2);
    proxy.wait_for_log("SIGUSR2 asks for an upgrade");
    wait_until("the log tells who goes on", || proxy.heirs().len() > before);
    proxy.wait_for_log(&warning("control.addr", api));
    assert_eq!(warnings(), 3);
}

#[test]
fn held_clients_are_served_in_their_order_and_a_deadline_does_not_move() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::to(&upstream);
    assert_eq!(proxy.control().put("/paused?name=a&ttl=1h&reason=because").status, 201);
    let mut held: Vec<_> = (0..20).map(|_| proxy.connect_held()).collect();
    let before = proxy.control().status();
    proxy.upgrade();
    let now = proxy.control().status();
    let [lease, was] = [&now.leases[0], &before.leases[0]];
    assert_eq!((&lease.name, &lease.reason, &lease.by), (&was.name, &was.reason, &was.by));
    assert_eq!((&lease.since, &now.paused_since), (&was.since, &before.paused_since));
    assert!(lease.expires_in_seconds < was.expires_in_seconds, "{lease:?}, {was:?}");
    assert_eq!(proxy.control().delete("/paused?release=3").status, 200);
    for client in &mut held[..3] {
        client.assert_echo(b"released");
    }
    held[3].read_timeout(Duration::from_millis(200));
    held[3].send(b"waits");
    proxy.upgrade();
    proxy.control().resume();
    for client in &mut held[4..] {
        client.assert_echo(b"resumed");
    }
    assert_eq!(held[3].receive(5), b"waits");
}

#[test]
fn settings_change_and_both_addresses_stay() {
    let upstream = Upstream::tcp(echo);
    let other = Upstream::tcp(|mut stream| {
        stream.send(b"the other");
        stream.receive_all()
    });
    let builder = Proxy::builder();
    let file = builder.path("tcpause.yml");
    let text = |upstream: &Upstream, threads: usize, addr: &str| {
        format!("upstream:\n  addr: {}\nproxy:\n  threads: {threads}\n{addr}", upstream.addr())
    };
    std::fs::write(&file, text(&upstream, 1, "")).unwrap();
    let proxy = builder.arg("--config").arg(&file).start();
    let mut old = proxy.connect();
    old.assert_echo(b"by one thread");
    for (upgrades, threads) in [(1, 4), (2, 2), (3, 3)] {
        std::fs::write(&file, text(&other, threads, "")).unwrap();
        proxy.upgrade();
        assert_eq!(proxy.control().status().threads, threads);
        // The log tells what is in force, once an upgrade.
        for (line, count) in [
            (format!("upstream is {}; while paused, new clients are held", other.addr()), upgrades),
            (format!("proxy listens on {} with ", proxy.addr()), upgrades + 1),
            (format!("control listens on {}", proxy.control().addr()), upgrades + 1),
            (format!(" with {threads} threads, for up to "), 1),
        ] {
            assert_eq!(proxy.log_count(&line), count, "{line}");
        }
        old.assert_echo(b"goes on");
        for _client in 0..20 {
            let mut client = proxy.connect();
            assert_eq!(client.receive(9), b"the other");
            client.finish();
            assert_eq!(client.receive_all(), Received::ended(b""));
        }
    }
    let pid = proxy.pid();
    std::fs::write(&file, "upstream: [").unwrap();
    let answer = proxy.control().request("POST", "/upgrade", &[]);
    assert_eq!(answer.status, 409);
    assert!(answer.text().contains("tcpause.yml"), "{}", answer.text());
    assert_eq!(proxy.pid(), pid);
    old.assert_echo(b"goes on");
    // The attempt that has failed is counted over the next upgrade.
    std::fs::write(&file, text(&other, 1, "")).unwrap();
    proxy.upgrade();
    let metrics = proxy.control().get("/metrics");
    for sample in [
        "\ntcpause_upgrades_total{result=\"succeeded\"} 4\n",
        "\ntcpause_upgrades_total{result=\"failed\"} 1\n",
    ] {
        assert!(metrics.text().contains(sample), "{metrics}");
    }
    assert_eq!(proxy.control().status().upgrades, 4);
}
