//! Sockets that the service manager has opened: the proxy listens on them, and a restart refuses nobody.

use std::{
    fs::{self, File},
    net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket},
    os::{
        fd::AsFd,
        unix::net::{UnixDatagram, UnixListener},
    },
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    thread,
    time::Instant,
};

use crate::harness::{Addr, Control, Family, Proxy, Upstream, echo, hangup, wait_until};

/// Backlog of a socket of systemd.
const BACKLOG: i32 = 4096;

fn tcp() -> (TcpListener, Addr) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    rustix::net::listen(&listener, BACKLOG).unwrap();
    let addr = Addr::Tcp(listener.local_addr().unwrap());
    (listener, addr)
}

#[test]
fn a_passed_socket_replaces_the_address_and_outlives_the_proxy() {
    let upstream = Upstream::tcp(echo);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("proxy.sock");
    let unix = UnixListener::bind(&path).unwrap();
    let (tcp, tcp_addr) = tcp();
    let sockets: [(&dyn AsFd, Addr); 2] = [(&tcp, tcp_addr), (&unix, Addr::Unix(path.clone()))];
    for (socket, addr) in &sockets {
        // Without a name, systemd takes that of the unit.
        for names in [None, Some("proxy"), Some("tcpause.socket")] {
            let mut proxy = Proxy::builder().upstream(&upstream).pass(names, &[*socket]).start();
            assert_eq!(proxy.addr().to_string(), addr.to_string());
            assert_eq!(proxy.log_count("so proxy.addr has no effect"), 1);
            proxy.connect().assert_echo(b"served");
            proxy.terminate();
            assert_eq!(proxy.exit_code(), 0);
        }
        // Clients of the time in between wait, and the next proxy serves them.
        let mut waiting = addr.connect();
        let proxy = Proxy::builder().upstream(&upstream).pass(None, &[*socket]).start();
        waiting.assert_echo(b"served by the next");
        drop(proxy);
    }
    assert!(fs::metadata(path).is_ok(), "its file is not ours");
}

#[test]
fn a_restart_on_a_passed_socket_refuses_and_loses_nobody() {
    const RESTARTS: usize = 20;
    const CLIENTS: usize = 16;

    let upstream = Upstream::tcp(echo);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("proxy.sock");
    let unix = UnixListener::bind(&path).unwrap();
    rustix::net::listen(&unix, BACKLOG).unwrap();
    let (tcp, tcp_addr) = tcp();
    let sockets: [(&dyn AsFd, Addr); 2] = [(&tcp, tcp_addr), (&unix, Addr::Unix(path))];
    for (socket, addr) in &sockets {
        let start = || Proxy::builder().upstream(&upstream).pass(None, &[*socket]).start();
        let (is_over, served) = (AtomicBool::new(false), AtomicUsize::new(0));
        let begin = Instant::now();
        let mut proxy = start();
        thread::scope(|scope| {
            for _client in 0..CLIENTS {
                scope.spawn(|| {
                    while !is_over.load(Ordering::SeqCst) {
                        addr.connect().assert_echo(b"neither refused nor lost");
                        served.fetch_add(1, Ordering::SeqCst);
                    }
                });
            }
            for _restart in 0..RESTARTS {
                let before = served.load(Ordering::SeqCst);
                wait_until("clients are served", || served.load(Ordering::SeqCst) > before + 100);
                proxy.terminate();
                assert_eq!(proxy.exit_code(), 0);
                proxy = start();
            }
            is_over.store(true, Ordering::SeqCst);
        });
        println!("{} clients in {:?}, {RESTARTS} restarts", served.into_inner(), begin.elapsed());
    }
}

#[test]
fn a_passed_socket_moves_in_an_upgrade() {
    let upstream = Upstream::tcp(echo);
    let (listener, addr) = tcp();
    let proxy = Proxy::builder().upstream(&upstream).pass(None, &[&listener]).start();
    let mut client = proxy.connect();
    client.assert_echo(b"before");
    proxy.signal(hangup());
    proxy.wait_for_log(" has taken over");
    client.assert_echo(b"still carried");
    addr.connect().assert_echo(b"and so are new ones");
}

#[test]
fn the_api_takes_a_passed_socket_too() {
    let upstream = Upstream::tcp(echo);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("control.sock");
    let control = UnixListener::bind(&path).unwrap();
    let (proxy, proxy_addr) = tcp();
    for (names, sockets) in [
        ("control", &[&control as &dyn AsFd][..]),
        ("proxy:control", &[&proxy, &control]),
        ("control:proxy", &[&control, &proxy]),
    ] {
        // A mode and a group are no more than an address.
        let mut running = Proxy::builder()
            .upstream(&upstream)
            .control(Family::Unix)
            .arg("--control-mode=0660")
            .pass(Some(names), sockets)
            .start();
        assert_eq!(running.control().addr().path(), path);
        assert_eq!(running.addr().to_string() == proxy_addr.to_string(), names != "control");
        running.control().pause();
        running.connect_held();
        running.control().resume();
        running.terminate();
        assert_eq!(running.exit_code(), 0);
        assert!(path.exists(), "its file is not ours");
    }
}

#[test]
fn the_monitor_takes_a_passed_socket_too() {
    let upstream = Upstream::tcp(echo);
    let (socket, addr) = tcp();
    let _proxy = Proxy::builder().upstream(&upstream).pass(Some("monitor"), &[&socket]).start();
    let monitor = Control::new(addr);
    assert_eq!(monitor.get("/status").status, 200);
    monitor.put("/status").assert_error(405);
}

#[test]
fn several_sockets_of_one_name_are_several_addresses() {
    let upstream = Upstream::tcp(echo);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("proxy.sock");
    let (unix, (tcp, tcp_addr)) = (UnixListener::bind(&path).unwrap(), tcp());
    let proxy = Proxy::builder().upstream(&upstream).pass(Some("proxy:proxy"), &[&tcp, &unix]);
    let proxy = proxy.start();
    for addr in [tcp_addr, Addr::Unix(path)] {
        addr.connect().assert_echo(b"served");
    }
    assert_eq!(proxy.log_count(" and unix://"), 1);
}

#[test]
fn what_cannot_be_listened_on_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (listener, addr) = tcp();
    let udp = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let datagram = UnixDatagram::bind(dir.path().join("datagram")).unwrap();
    let connected = TcpStream::connect(("127.0.0.1", addr.port())).unwrap();
    let file = File::create(dir.path().join("file")).unwrap();
    let no_stream = "\"proxy\" cannot be used: it is no stream socket";
    for (names, sockets, told) in [
        (None, &[&udp as &dyn AsFd][..], no_stream),
        (Some("proxy"), &[&datagram], no_stream),
        (Some("proxy"), &[&file], no_stream),
        (Some("control"), &[&connected], "\"control\" cannot be used: it does not listen"),
        (Some("prox"), &[&listener], "the unknown name \"prox\""),
        (Some("prox"), &[&listener], "write FileDescriptorName=proxy, control or monitor"),
        (Some("prox"), &[&listener], "did you mean proxy?"),
        (Some("proxy:"), &[&listener, &listener], "the unknown name \"\""),
        (None, &[&listener, &listener], "the unknown name \"\""),
        (Some("proxy:control"), &[&listener], "there are 2 names and 1 sockets"),
    ] {
        let failed = Proxy::builder().upstream_at(&"127.0.0.1:9").pass(names, sockets).fail();
        assert_eq!(failed.code, 2, "{names:?}: {failed:?}");
        assert!(failed.stderr.contains(told), "{names:?}: {failed:?}");
        assert_eq!(failed.stderr.lines().count(), 1, "{failed:?}");
    }
    let failed = Proxy::builder().upstream_at(&addr).pass(None, &[&listener]).fail();
    assert!(failed.stderr.contains("leads back to proxy.addr"), "{failed:?}");
    // Those that belong to another process are left alone.
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::builder().upstream(&upstream).pass(Some("prox"), &[&listener]);
    proxy.before("export LISTEN_PID=1").start().connect().assert_echo(b"its own socket");
}
