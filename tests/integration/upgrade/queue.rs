//! Accept queues that are full at the moment of an upgrade: each client in one is served, and so is each that found no room.

use std::{
    fs,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

use crate::harness::{Family, Proxy, Received, Upstream, echo, in_namespace, pattern, wait_until};

/// File with the largest backlog of a listener.
const BACKLOG_MAX: &str = "/proc/sys/net/core/somaxconn";
const BACKLOG: usize = 4;
/// Connections that the proxy may have at a time.
const CONNECTIONS: usize = 4;
const CLIENTS: usize = 40;

#[test]
fn clients_in_a_full_queue_are_served() {
    in_namespace("upgrade::queue::clients_in_a_full_queue_are_served", || {
        clients_wait(Family::Tcp4, 2);
        clients_wait(Family::Unix, 1);
    });
}

/// Has more clients than there is room for in `queues` queues, and the number of threads change meanwhile.
fn clients_wait(family: Family, queues: usize) {
    let upstream = Upstream::tcp(echo);
    let builder = Proxy::builder().listen(family).upstream(&upstream);
    let file = builder.path("tcpause.yml");
    let threads = |count| fs::write(&file, format!("proxy:\n  threads: {count}\n")).unwrap();
    threads(2);
    let usual = fs::read_to_string(BACKLOG_MAX).unwrap();
    fs::write(BACKLOG_MAX, BACKLOG.to_string()).unwrap();
    let builder = builder.arg("--config").arg(&file);
    let proxy = builder.args(["--proxy-max-connections", &CONNECTIONS.to_string()]).start();
    fs::write(BACKLOG_MAX, usual).unwrap();
    let mut served: Vec<_> = (0..CONNECTIONS).map(|_| proxy.connect()).collect();
    for client in &mut served {
        client.assert_echo(b"before");
    }
    let connected = AtomicUsize::new(0);
    thread::scope(|scope| {
        for seed in 0..CLIENTS {
            let (proxy, connected) = (&proxy, &connected);
            scope.spawn(move || {
                let mut client = proxy.connect();
                connected.fetch_add(1, Ordering::Relaxed);
                client.assert_echo(&pattern(seed as u64, 700));
                client.finish();
                assert_eq!(client.receive_all(), Received::ended(b""));
            });
        }
        // A queue takes one more than its backlog.
        let is_full = || connected.load(Ordering::Relaxed) >= queues * (BACKLOG + 1);
        wait_until("the queues are full", is_full);
        for count in [1, 3] {
            threads(count);
            proxy.upgrade();
            assert_eq!(proxy.control().status().threads, count);
        }
        assert_eq!(proxy.control().status().accepted, CONNECTIONS as u64);
        for mut client in served {
            client.assert_echo(b"after");
            client.finish();
            assert_eq!(client.receive_all(), Received::ended(b""));
        }
    });
    let status = proxy.control().status();
    assert_eq!((status.accepted, status.failed), ((CONNECTIONS + CLIENTS) as u64, 0));
}
