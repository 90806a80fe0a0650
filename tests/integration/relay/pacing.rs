//! The congestion control of the proxy's sockets, in a network of the test's own whose default paces.

use std::{fs, net::IpAddr, process::Command};

use crate::harness::{Addr, Family, Listener, Proxy, Upstream, echo, in_namespace};

/// A default that paces.
const PACED: &str = "bbr";

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
        if let Err(error) = fs::write("/proc/sys/net/ipv4/tcp_congestion_control", PACED) {
            return println!("skipped: {PACED} cannot be the default here: {error}");
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
