//! One thing in more than one notation, and one name with more than one address: on which of them it listens.

use crate::harness::{Addr, End, Family, Proxy, Received, Stream, Upstream, program};

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
