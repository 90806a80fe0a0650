//! The congestion control of the proxy's sockets, in a network of the test's own whose default paces.

use std::{
    fs,
    net::{IpAddr, TcpListener, TcpStream},
    process::Command,
};

use crate::harness::{Addr, Family, Listener, Proxy, Upstream, echo, in_namespace};

/// A default that paces.
const PACED: &str = "bbr";
/// The page that names the route.
const PAGE: &str = include_str!("../../../src/bin/tcpause/help/cost.md");

/// Makes the default of this network pace; false, with a word, where it cannot.
fn pace_by_default() -> bool {
    let written = fs::write("/proc/sys/net/ipv4/tcp_congestion_control", PACED);
    if let Err(error) = &written {
        println!("skipped: {PACED} cannot be the default here: {error}");
    }
    written.is_ok()
}

/// Tells the congestion control of the one established socket that `filter` lets through (`ss(8)`).
fn congestion_control(filter: &str) -> String {
    let output = Command::new("ss")
        .args(["--tcp", "--info", "--no-header", "state", "established", filter])
        .output()
        .expect("ss, of the package that ip is of");
    let text = String::from_utf8(output.stdout).unwrap();
    let known = ["bbr", "cubic", "reno"];
    let found: Vec<_> = text.split_whitespace().filter(|word| known.contains(word)).collect();
    assert_eq!(found.len(), 1, "sockets of {filter}: {text}");
    found[0].to_owned()
}

/// Tells the congestion controls of a proxy's sockets towards a client and towards the upstream, both at `ip`.
fn congestion_controls(ip: &str) -> [String; 2] {
    let free = Addr::Tcp((ip.parse::<IpAddr>().unwrap(), 0).into());
    let upstream = Upstream::on(Listener::bind(&free), echo);
    let proxy = Proxy::builder().listen_at(&free).control(Family::Unix).upstream(&upstream).start();
    let mut client = proxy.connect();
    client.assert_echo(b"hello");
    let (front, back) = (proxy.addr().port(), upstream.addr().port());
    [format!("sport = :{front}"), format!("dport = :{back}")].map(|it| congestion_control(&it))
}

#[test]
fn bulk_over_the_loopback_is_not_paced_where_the_default_congestion_control_paces() {
    let name = "relay::pacing::bulk_over_the_loopback_is_not_paced_where_the_default_congestion_control_paces";
    in_namespace(name, || {
        if !pace_by_default() {
            return;
        }
        let added = Command::new("ip").args(["addr", "add", "192.0.2.1/32", "dev", "lo"]).status();
        assert!(added.unwrap().success());
        assert_eq!(congestion_controls("127.0.0.1"), ["reno", "reno"]);
        if Family::Tcp6.is_available() {
            assert_eq!(congestion_controls("::1"), ["reno", "reno"]);
        }
        // Peers elsewhere may be behind a link that wants it.
        assert_eq!(congestion_controls("192.0.2.1"), [PACED, PACED]);
    });
}

/// Tells the congestion controls of a server and of its client over 127.0.0.1, neither of which is the proxy.
fn congestion_controls_of_others() -> [String; 2] {
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = server.local_addr().unwrap();
    let _client = TcpStream::connect(addr).unwrap();
    let _served = server.accept().unwrap();
    let port = addr.port();
    [format!("sport = :{port}"), format!("dport = :{port}")].map(|it| congestion_control(&it))
}

#[test]
fn the_route_of_the_help_takes_the_pacing_off_clients_and_server() {
    let name = "relay::pacing::the_route_of_the_help_takes_the_pacing_off_clients_and_server";
    in_namespace(name, || {
        if !pace_by_default() {
            return;
        }
        assert_eq!(congestion_controls_of_others(), [PACED, PACED]);
        let mut routes = PAGE.lines().filter(|line| line.starts_with("ip route change "));
        let (route, more) = (routes.next().expect("a route in the page"), routes.next());
        assert_eq!(more, None);
        let mut words = route.split_whitespace();
        let changed = Command::new(words.next().unwrap()).args(words).status();
        assert!(changed.unwrap().success(), "{route}");
        assert_eq!(congestion_controls_of_others(), ["reno", "reno"]);
    });
}
