//! One thing in more than one notation, and one name with more than one address: on which of them it listens.

use std::{
    fs,
    io::{ErrorKind, Read as _},
};

use crate::{
    harness::{
        Addr, Builder, End, Family, Listener, Proxy, Received, Stream, Upstream, echo,
        in_namespace, program, spawn, wait_until,
    },
    process::stop::assert_gave_up,
};

/// Runs `test`, which has the name `name`, where `localhost` has an address of each family, as on most machines.
fn with_two_addresses(name: &str, test: impl FnOnce()) {
    in_namespace(&format!("process::addresses::{name}"), || {
        fs::write("/etc/nsswitch.conf", "hosts: files\n").unwrap();
        // Without it, glibc takes one line for each name.
        fs::write("/etc/host.conf", "multi on\n").unwrap();
        fs::write("/etc/hosts", "127.0.0.1 localhost\n::1 localhost\n").unwrap();
        if Family::Tcp6.is_available() {
            test();
        } else {
            println!("skipped: IPv6 is switched off");
        }
    });
}

/// A proxy and its API at `localhost`, each with a port that the system chooses.
fn at_localhost(upstream: &Upstream) -> Builder {
    let addr = ["--proxy-addr", "localhost:0", "--control-addr", "localhost:0"];
    Proxy::builder().upstream(upstream).args(addr)
}

/// The same port at the address of either family.
fn both(addr: &Addr) -> [Addr; 2] {
    ["127.0.0.1", "[::1]"].map(|ip| Addr::Tcp(format!("{ip}:{}", addr.port()).parse().unwrap()))
}

/// Tells a client from where its proxy has connected.
fn tell_peer(mut stream: Stream) -> Received {
    let Stream::Tcp(tcp) = &stream else { panic!("an upstream on TCP") };
    let peer = tcp.peer_addr().unwrap().ip().to_string();
    stream.send(peer.as_bytes());
    Received { bytes: Vec::new(), end: End::Eof }
}

#[test]
fn an_ipv4_address_that_is_written_as_an_ipv6_one_is_itself() {
    if !Family::Tcp6.is_available() {
        println!("skipped: IPv6 is switched off");
        return;
    }
    let upstream = Upstream::tcp(tell_peer);
    let written = |port: u16| Addr::Tcp(format!("[::ffff:127.0.0.1]:{port}").parse().unwrap());
    let proxy = Proxy::builder()
        .listen_at(&written(0))
        .control_at(&written(0))
        .upstream_at(&written(upstream.addr().port()))
        .args(["--upstream-source-addrs", "::ffff:127.0.0.2"])
        .start();
    assert!(proxy.addr().to_string().starts_with("tcp://127.0.0.1:"), "{}", proxy.addr());
    assert_eq!(proxy.connect().receive_all().bytes, b"127.0.0.2");
    assert_eq!(proxy.control().status().upstream, upstream.addr().to_string());
    // Its callers may write it so as well.
    let control = written(proxy.control().addr().port());
    let asked = program().args(["status", "--control-addr", &control.to_string()]).run();
    assert_eq!(asked.code, 0, "{asked:?}");
    let host = format!("Host: {}", control.to_string().trim_start_matches("tcp://"));
    assert_eq!(proxy.control().request("GET", "/paused", &[&host]).status, 200);
}

#[test]
fn a_name_is_listened_on_at_all_its_addresses() {
    with_two_addresses("a_name_is_listened_on_at_all_its_addresses", || {
        const CLIENTS: usize = 100;
        let upstream = Upstream::tcp(echo);
        let mut proxy = at_localhost(&upstream).args(["--proxy-threads", "2"]).start();
        for (name, addr) in [("proxy", proxy.addr()), ("control", proxy.control().addr())] {
            let [v4, v6] = both(addr);
            proxy.wait_for_log(&format!("{name} listens on {v4} and {v6}"));
            v4.connect();
            v6.connect();
        }
        let addrs = both(proxy.addr());
        let listeners = proxy.control().status().listeners;
        assert_eq!(listeners, addrs.each_ref().map(ToString::to_string));
        let crowd = |count: usize| addrs.iter().cycle().take(count).map(Addr::connect);
        for mut client in crowd(CLIENTS) {
            client.assert_echo(b"carried");
        }
        // The API pauses by one address and resumes by the other.
        let [v4, v6] = both(proxy.control().addr()).map(|addr| {
            move |word: &str| {
                let run = program().args([word, "--control-addr", &addr.to_string()]).run();
                assert_eq!(run.code, 0, "{run:?}");
            }
        });
        v4("pause");
        let held: Vec<Stream> = crowd(CLIENTS).collect();
        proxy.control().wait_counts(|status| status.held, CLIENTS as u64);
        v6("resume");
        for mut client in held {
            client.assert_echo(b"resumed");
        }
        // Who is in a queue when it stops is served, whichever queue it is.
        proxy.signal(rustix::process::Signal::STOP);
        let queued: Vec<Stream> = crowd(CLIENTS).collect();
        proxy.terminate();
        proxy.signal(rustix::process::Signal::CONT);
        for mut client in queued {
            client.assert_echo(b"taken in");
        }
        for addr in &addrs {
            let is_refused = |error: std::io::Error| error.kind() == ErrorKind::ConnectionRefused;
            wait_until("it is refused", || addr.try_connect().is_err_and(is_refused));
        }
        assert_eq!(proxy.exit_code(), 0);
    });
}

/// Clients that wait in both queues are served as places become free.
#[test]
fn no_address_keeps_out_the_clients_of_another() {
    with_two_addresses("no_address_keeps_out_the_clients_of_another", || {
        const CLIENTS: usize = 40;
        let upstream = Upstream::tcp(echo);
        let proxy = at_localhost(&upstream)
            .args(["--proxy-threads", "1", "--proxy-max-connections", "2"])
            .start();
        let addrs = both(proxy.addr());
        let served = |mut client: Stream| {
            client.send(b"hello");
            let mut answer = [0; 5];
            client.read_exact(&mut answer).is_ok_and(|()| &answer == b"hello")
        };
        let clients: Vec<_> = addrs
            .iter()
            .cycle()
            .take(CLIENTS)
            .map(Addr::connect)
            .map(|client| spawn(move || served(client)))
            .collect();
        let served = clients.into_iter().map(|client| client.join().unwrap());
        let lost = served.filter(|is_served| !is_served).count();
        assert_eq!(lost, 0, "of {CLIENTS} clients");
        for addr in addrs {
            addr.connect().assert_echo(b"as before");
        }
    });
}

#[test]
fn a_port_that_is_taken_at_one_address_is_not_chosen() {
    with_two_addresses("a_port_that_is_taken_at_one_address_is_not_chosen", || {
        const RANGE: &str = "/proc/sys/net/ipv4/ip_local_port_range";
        let usual = fs::read_to_string(RANGE).unwrap();
        let at_v6 = |port: u16| Addr::Tcp(format!("[::1]:{port}").parse().unwrap());
        // It takes no port.
        let upstream = Upstream::start(Family::Unix, echo);
        let taken: Vec<Listener> =
            (40_000..40_006).map(|port| Listener::bind(&at_v6(port))).collect();
        fs::write(RANGE, "40000 40007").unwrap();
        let proxy = at_localhost(&upstream).launch();
        let lines =
            ["proxy", "control"].map(|name| proxy.wait_for_log(&format!("{name} listens on")));
        fs::write(RANGE, usual).unwrap();
        let of =
            |port: u16| lines.iter().filter(|line| line.contains(&at_v6(port).to_string())).count();
        assert_eq!((of(40_006), of(40_007)), (1, 1), "{lines:?}");

        // One that is written down is an error, which names the address.
        let port = taken[0].addr().port();
        let failed = Proxy::builder()
            .upstream(&upstream)
            .args(["--proxy-addr", &format!("localhost:{port}")])
            .log_level(None)
            .fail();
        assert_gave_up(&failed, &[&format!("in use (os error 98) at [::1]:{port}; ")]);
    });
}

#[test]
fn an_address_of_a_family_that_is_switched_off_is_left_out() {
    with_two_addresses("an_address_of_a_family_that_is_switched_off_is_left_out", || {
        fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1").unwrap();
        let upstream = Upstream::tcp(echo);
        let proxy = at_localhost(&upstream).start();
        proxy.connect().assert_echo(b"carried");
        for addr in [proxy.addr(), proxy.control().addr()] {
            assert!(addr.to_string().starts_with("tcp://127.0.0.1:"), "{addr}");
            let [_, v6] = both(addr).map(|addr| addr.to_string().replace("tcp://", ""));
            proxy.wait_for_log(&format!("not listening on {v6}, as IPv6 is switched off here: "));
        }
        // A name with no other address is an error, and so is an address that is no matter of a family.
        fs::write("/etc/hosts", "::1 six\n127.0.0.1 four\n192.0.2.1 four\n").unwrap();
        for (name, part) in [
            ("six", "Cannot assign"),
            ("four", "Cannot assign requested address (os error 99) at 192.0.2.1:"),
        ] {
            let failed = Proxy::builder()
                .upstream(&upstream)
                .args(["--proxy-addr", &format!("{name}:0")])
                .log_level(None)
                .fail();
            assert_gave_up(
                &failed,
                &[&format!("proxy.addr: cannot listen on tcp://{name}:0: "), part],
            );
        }
    });
}
