//! An upstream that is tcpause itself, by whatever name: it is never dialled, and costs no other client anything.

use std::{
    fs,
    os::unix::fs::symlink,
    process::Command,
    time::{Duration, Instant},
};

use crate::harness::{
    Addr, Builder, End, Family, Listener, Proxy, Received, Upstream, echo, in_namespace,
};

/// A name that the tests give addresses to.
const NAME: &str = "server.test";
const PORT: u16 = 4000;

/// The time for which the proxy waits for an upstream that it cannot reach.
const TIMEOUT: Duration = Duration::from_millis(300);

/// A configuration error.
const EXIT_USAGE: i32 = 2;

/// Gives this network's host another address.
fn add_address(address: &str) {
    let added = Command::new("ip").args(["addr", "add", address, "dev", "lo"]).status();
    assert!(added.unwrap().success(), "{address}");
}

/// Gives the name these addresses.
fn set_name(addresses: &[&str]) {
    let lines = addresses.iter().map(|address| format!("{address} {NAME}\n"));
    fs::write("/etc/hosts", lines.collect::<String>()).unwrap();
    fs::write("/etc/host.conf", "multi on\n").unwrap();
    fs::write("/etc/nsswitch.conf", "hosts: files\n").unwrap();
}

fn tcp(host: &str) -> Addr {
    Addr::Tcp(format!("{host}:{PORT}").parse().unwrap())
}

fn proxy(listens: &Addr, upstream: &impl ToString) -> Builder {
    Proxy::builder()
        .listen_at(listens)
        .upstream_at(upstream)
        .args(["--upstream-connect-timeout", &format!("{TIMEOUT:?}")])
        .args(["--proxy-max-connections", "50"])
}

#[track_caller]
fn assert_refused(proxy: Builder, setting: &str) {
    let refused = proxy.fail();
    let expected = format!("leads back to {setting}");
    assert!(refused.stderr.contains(&expected), "{}", refused.stderr);
    assert_eq!(refused.code, EXIT_USAGE);
}

#[test]
fn an_address_of_its_own_is_refused_at_the_start() {
    in_namespace("upstream::loops::an_address_of_its_own_is_refused_at_the_start", || {
        add_address("10.9.9.9/32");
        for (listens, upstream) in [
            ("127.0.0.1", "[::ffff:127.0.0.1]"),
            ("0.0.0.0", "[::ffff:127.0.0.1]"),
            ("0.0.0.0", "127.0.0.9"),
            ("0.0.0.0", "10.9.9.9"),
            ("0.0.0.0", "[::ffff:10.9.9.9]"),
            ("10.9.9.9", "[::ffff:10.9.9.9]"),
        ] {
            let upstream = format!("{upstream}:{PORT}");
            assert_refused(proxy(&tcp(listens), &upstream), "proxy.addr");
            let control = proxy(&tcp("127.0.0.8"), &upstream).control_at(&tcp(listens));
            if listens == "127.0.0.1" || listens == "10.9.9.9" {
                assert_refused(control, "control.addr");
            }
        }
        if Family::Tcp6.is_available() {
            add_address("fd00::9/128");
            for upstream in ["127.0.0.1", "10.9.9.9", "[::1]", "[fd00::9]"] {
                let proxy = proxy(&tcp("[::]"), &format!("{upstream}:{PORT}"));
                assert_refused(proxy, "proxy.addr");
            }
        }
    });
}

#[test]
fn another_address_at_the_same_port_is_none_of_its_own() {
    in_namespace("upstream::loops::another_address_at_the_same_port_is_none_of_its_own", || {
        let upstream = Upstream::on(Listener::bind(&tcp("127.0.0.2")), echo);
        let near = proxy(&tcp("127.0.0.1"), &tcp("127.0.0.2")).start();
        near.connect().assert_echo(b"served");
        drop((near, upstream));
        // An address that can be bound need not be this host's.
        fs::write("/proc/sys/net/ipv4/ip_nonlocal_bind", "1").unwrap();
        let away = proxy(&tcp("0.0.0.0"), &tcp("10.9.9.8")).start();
        assert_eq!(away.connect().receive_all().end, End::Reset);
    });
}

#[test]
fn a_file_of_its_own_is_refused_at_the_start_by_any_path() {
    let dir = tempfile::tempdir().unwrap();
    let place = dir.path().display();
    fs::create_dir(dir.path().join("folder")).unwrap();
    symlink("own", dir.path().join("link")).unwrap();
    symlink(dir.path(), dir.path().join("folder/up")).unwrap();
    let own = Addr::Unix(dir.path().join("own"));
    for path in ["./own", "folder/../own", "link", "folder/up/own"] {
        let upstream = format!("unix://{place}/{path}");
        assert_refused(proxy(&own, &upstream), "proxy.addr");
        let control = proxy(&Addr::Unix(dir.path().join("proxy")), &upstream).control_at(&own);
        assert_refused(control, "control.addr");
    }
}

#[test]
fn a_name_of_its_own_is_not_dialled() {
    in_namespace("upstream::loops::a_name_of_its_own_is_not_dialled", || {
        set_name(&["10.9.9.9"]);
        add_address("10.9.9.9/32");
        for (listens, upstream) in
            [("127.0.0.1", "127.1"), ("0.0.0.0", "127.1"), ("10.9.9.9", NAME), ("0.0.0.0", NAME)]
        {
            let proxy = proxy(&tcp(listens), &format!("{upstream}:{PORT}")).start();
            proxy.wait_for_log("leads back to proxy.addr");
            let begin = Instant::now();
            let mut client = proxy.connect();
            client.send(b"one client");
            assert_eq!(client.receive_all(), Received { bytes: Vec::new(), end: End::Reset });
            assert!(begin.elapsed() >= TIMEOUT, "it is handled as one that is away");
            proxy.wait_for_log("it is tcpause itself");
            let status = proxy.control().status();
            assert_eq!((status.accepted, status.failed, status.active), (1, 1, 0), "{listens}");
        }
    });
}

#[test]
fn a_name_is_dialled_at_those_addresses_that_are_not_its_own() {
    in_namespace(
        "upstream::loops::a_name_is_dialled_at_those_addresses_that_are_not_its_own",
        || {
            set_name(&["127.0.0.1", "127.0.0.2"]);
            let upstream = Upstream::on(Listener::bind(&tcp("127.0.0.2")), echo);
            let proxy = proxy(&tcp("127.0.0.1"), &format!("{NAME}:{PORT}")).start();
            proxy.wait_for_log("leads back to proxy.addr");
            for _client in 0..5 {
                proxy.connect().assert_echo(b"served by the other");
            }
            // At the cut-over it is moved to the proxy; later it is set right.
            set_name(&["127.0.0.1"]);
            proxy.control().pause();
            proxy.control().resume();
            assert_eq!(proxy.connect().receive_all().end, End::Reset);
            set_name(&["127.0.0.2"]);
            proxy.control().pause();
            proxy.control().resume();
            proxy.connect().assert_echo(b"served again");
            assert_eq!((upstream.accepted(), proxy.control().status().accepted), (6, 7));
        },
    );
}

#[test]
fn an_address_that_becomes_its_own_costs_only_its_own_connections() {
    in_namespace(
        "upstream::loops::an_address_that_becomes_its_own_costs_only_its_own_connections",
        || {
            let proxy = proxy(&tcp("0.0.0.0"), &tcp("10.9.9.9")).start();
            add_address("10.9.9.9/32");
            // For one of them the proxy connects to itself until no place is left; all stay.
            let mut clients: Vec<_> = (0..3).map(|_| proxy.connect()).collect();
            for client in &mut clients {
                client.send(b"one client");
            }
            proxy.wait_for_log("leads back to proxy.addr");
            proxy.control().wait_status("all places are free", |status| {
                status.active + status.connecting + status.rejecting == 0
            });
            for client in &mut clients {
                assert_eq!(client.receive_all(), Received { bytes: Vec::new(), end: End::Reset });
            }
        },
    );
}

#[test]
fn a_path_that_becomes_its_own_costs_only_its_own_connections() {
    let dir = tempfile::tempdir().unwrap();
    let [server, own, link] = ["server", "own", "link"].map(|name| dir.path().join(name));
    let _upstream = Upstream::on(Listener::bind(&Addr::Unix(server.clone())), echo);
    symlink(&server, &link).unwrap();
    let proxy = proxy(&Addr::Unix(own.clone()), &Addr::Unix(link.clone())).start();
    let mut earlier = proxy.connect();
    earlier.assert_echo(b"by the server");
    fs::remove_file(&link).unwrap();
    symlink(&own, &link).unwrap();
    let mut client = proxy.connect();
    client.send(b"one client");
    drop(client);
    proxy.wait_for_log("leads back to proxy.addr");
    proxy.control().wait_status("all other places are free", |status| {
        (status.active, status.connecting) == (1, 0)
    });
    earlier.assert_echo(b"still by the server");
    fs::remove_file(&link).unwrap();
    symlink(&server, &link).unwrap();
    proxy.control().pause();
    proxy.control().resume();
    proxy.connect().assert_echo(b"by the server again");
}
