//! Running out of local ports to reach the upstream from, in a network of the test's own with very few.

use std::{
    fs,
    time::{Duration, Instant},
};

use crate::harness::{
    Addr, Builder, FIGURE, Family, Listener, PATIENCE, Proxy, Stream, Upstream, echo, in_namespace,
    wait_until,
};

/// The number of local ports.
const PORTS: usize = 200;

/// The number of clients.
const CLIENTS: usize = 260;

/// Runs `test`, which has the name `name`, where there are few ports.
fn with_few_ports(name: &str, test: fn()) {
    in_namespace(&format!("upstream::ports::{name}"), || {
        // One port less would be as good; the lowest must be beyond those that the upstreams have.
        fs::write("/proc/sys/net/ipv4/ip_local_port_range", format!("40000 {}", 39_999 + PORTS))
            .unwrap();
        test();
    });
}

/// An upstream outside the range of local ports.
fn upstream(port: u16) -> Upstream {
    Upstream::on(Listener::bind(&Addr::Tcp(([127, 0, 0, 1], port).into())), echo)
}

/// A proxy whose clients and operator take no port.
fn builder(upstream: &Upstream) -> Builder {
    Proxy::builder().listen(Family::Unix).control(Family::Unix).upstream(upstream)
}

fn crowd(proxy: &Proxy, count: usize) -> Vec<Stream> {
    let mut clients: Vec<_> = (0..count).map(|_| proxy.connect()).collect();
    for client in &mut clients {
        client.send(b"hello");
    }
    clients
}

/// Waits until as many are served as there are ports, and have their answers.
fn wait_full(proxy: &Proxy) {
    let (served, left) = (PORTS as u64, (CLIENTS - PORTS) as u64);
    proxy.control().wait_counts(
        |status| (status.active, status.held, status.bytes_to_client),
        (served, left, 5 * served),
    );
}

#[test]
fn clients_wait_for_a_port_and_are_served_as_others_leave() {
    with_few_ports("clients_wait_for_a_port_and_are_served_as_others_leave", || {
        let upstream = upstream(5000);
        let proxy = builder(&upstream).args(["--upstream-connect-timeout", "20s"]).start();
        let mut clients = crowd(&proxy, CLIENTS);
        wait_full(&proxy);
        let line = proxy.wait_for_log("no local port is free to reach the upstream");
        assert!(line.contains("tcp://127.0.0.1:5000"), "{line}");
        assert!(line.ends_with("add addresses to upstream.source-addrs"), "{line}");
        // As many leave as wait, of those who were served.
        let (begin, cpu) = (Instant::now(), proxy.cpu_time());
        let mut left = CLIENTS - PORTS;
        clients.retain_mut(|client| {
            client.read_timeout(Duration::from_millis(1));
            let leaves = left > 0 && std::io::Read::read(client, &mut [0; 5]).is_ok();
            left -= usize::from(leaves);
            !leaves
        });
        proxy.control().wait_counts(|status| (status.active, status.held), (PORTS as u64, 0));
        assert_eq!(proxy.control().status().failed, 0);
        wait_until("the upstream has taken all", || upstream.accepted() == CLIENTS);
        println!(
            "{FIGURE}{CLIENTS} clients, {PORTS} ports: the last {} served {:?} after as many had left, with {:?} of CPU time",
            CLIENTS - PORTS,
            begin.elapsed(),
            proxy.cpu_time().saturating_sub(cpu)
        );
    });
}

#[test]
fn clients_without_a_port_are_given_up_in_time() {
    with_few_ports("clients_without_a_port_are_given_up_in_time", || {
        let upstream = upstream(5000);
        let proxy = builder(&upstream).args(["--upstream-connect-timeout", "500ms"]).start();
        let clients = crowd(&proxy, CLIENTS);
        let left = (CLIENTS - PORTS) as u64;
        proxy.control().wait_counts(
            |status| (status.active, status.held, status.failed),
            (PORTS as u64, 0, left),
        );
        proxy.wait_for_log(" cause=unreachable error=no-port");
        println!("{FIGURE}{CLIENTS} clients, {PORTS} ports: {left} given up");
        drop(clients);
    });
}

#[test]
fn another_source_address_has_ports_of_its_own() {
    with_few_ports("another_source_address_has_ports_of_its_own", || {
        let upstream = upstream(5000);
        let proxy =
            builder(&upstream).args(["--upstream-source-addrs", "127.0.0.1,127.0.0.2"]).start();
        let clients = crowd(&proxy, CLIENTS);
        for mut client in clients {
            assert_eq!(client.receive(5), b"hello");
        }
        assert_eq!((upstream.accepted(), proxy.control().status().failed), (CLIENTS, 0));
        println!("{FIGURE}{CLIENTS} clients, {PORTS} ports at each of two addresses: all served");
    });
}

/// A port that is chosen when the socket is bound is lost to all servers, and not to one.
#[test]
fn a_source_address_has_all_its_ports_for_each_upstream() {
    with_few_ports("a_source_address_has_all_its_ports_for_each_upstream", || {
        let (one, other) = (upstream(5000), upstream(5001));
        let elsewhere: Vec<_> = (0..150).map(|_| other.addr().connect()).collect();
        let proxy = builder(&one).args(["--upstream-source-addrs", "127.0.0.1"]).start();
        for mut client in crowd(&proxy, PORTS) {
            assert_eq!(client.receive(5), b"hello");
        }
        assert_eq!((one.accepted(), proxy.control().status().failed), (PORTS, 0));
        drop(elsewhere);
    });
}

/// TCP connects to itself where nobody listens and the system dials from the very port that it dials to.
#[test]
fn a_dial_that_reaches_itself_is_no_upstream_and_leaves_the_port_to_it() {
    in_namespace(
        "upstream::ports::a_dial_that_reaches_itself_is_no_upstream_and_leaves_the_port_to_it",
        || {
            let range = |ports| fs::write("/proc/sys/net/ipv4/ip_local_port_range", ports).unwrap();
            range("41000 41001");
            let addr = Addr::Tcp(([127, 0, 0, 1], 40_000).into());
            let proxy = Proxy::builder()
                .listen(Family::Unix)
                .control(Family::Unix)
                .upstream_at(&addr)
                .args(["--proxy-threads", "1", "--upstream-connect-timeout", "20s"])
                .start();
            let mut client = proxy.connect();
            client.send(b"hello");
            proxy.wait_for_log("Connection refused");
            // Of two ports that are free, the system prefers the even one.
            range("40000 40001");
            // Several dials.
            client.read_timeout(Duration::from_millis(500));
            let heard = std::io::Read::read(&mut client, &mut [0; 5]);
            assert!(heard.is_err(), "the client hears itself");
            assert_eq!(proxy.control().status().active, 0);
            let mut upstream = None;
            wait_until("the port is free", || {
                upstream = std::net::TcpListener::bind("127.0.0.1:40000").ok();
                upstream.is_some()
            });
            let upstream = Upstream::on(Listener::Tcp(upstream.unwrap()), echo);
            client.read_timeout(PATIENCE);
            assert_eq!(client.receive(5), b"hello");
            assert_eq!(upstream.accepted(), 1);
        },
    );
}

#[test]
fn a_source_address_that_this_host_has_not_is_refused_at_the_start() {
    let upstream = Upstream::tcp(echo);
    let finished = Proxy::builder()
        .upstream(&upstream)
        .args(["--upstream-source-addrs", "127.0.0.1,192.0.2.1"])
        .fail();
    assert_eq!(finished.code, 1);
    let wanted = "upstream.source-addrs: cannot connect from 192.0.2.1: 192.0.2.1 is no address of this host";
    assert!(finished.stderr.contains(wanted), "{}", finished.stderr);
}
