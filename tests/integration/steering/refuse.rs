//! Connections that cannot be steered: `on` is refused, and `auto` relays and says why.

use super::{Client, Scene, server::Server, steering};
use crate::harness::{Builder, Family, Proxy, Upstream, echo, in_namespace, wait_until};

/// Options that contradict steering, each with the key that a refusal names.
const CONTRADICTIONS: [(&[&str], &str); 4] = [
    (&["--upstream-send-proxy", "v2"], "upstream.send-proxy"),
    (&["--upstream-source-addrs", "127.0.0.2"], "upstream.source-addrs"),
    (&["--proxy-accept-proxy-from", "127.0.0.0/8"], "proxy.accept-proxy-from"),
    (&["--upstream-addr", "unix:///nowhere/server.sock"], "upstream.addr"),
];

#[test]
fn on_is_refused_where_something_contradicts() {
    let server = Server::start();
    let refused = |builder: Builder, key: &str| {
        let ended = builder.args(["--upstream-steer", "on"]).fail();
        assert_ne!(ended.code, 0, "{key}: {ended:?}");
        assert!(ended.stderr.contains(key), "{key}: {ended:?}");
        assert!(ended.stderr.contains("upstream-steer"), "{key}: {ended:?}");
    };
    for (options, key) in CONTRADICTIONS {
        refused(Proxy::builder().upstream_at(&server.url()).args(options), key);
    }
    refused(Proxy::builder().upstream_at(&server.url()).listen(Family::Unix), "proxy.addr");
}

#[test]
fn auto_relays_and_says_why() {
    let server = Server::start();
    for (options, key) in &CONTRADICTIONS[1..2] {
        let proxy = super::builder(&server).args(*options).start();
        assert_unavailable(&proxy, key);
        assert!(!Client::greeted(proxy.connect()).is_steered);
    }
    let upstream = Upstream::start(Family::Unix, echo);
    let proxy = Proxy::builder().upstream(&upstream).arg("--upstream-steer=auto").start();
    assert_unavailable(&proxy, "upstream.addr");
    proxy.connect().assert_echo(b"relayed");
    let proxy = super::builder(&server).listen(Family::Unix).start();
    assert_unavailable(&proxy, "proxy.addr");
    proxy.connect().receive(super::server::GREETING_BYTES);
}

/// In a container, root has no rights outside of it.
#[test]
fn where_the_system_refuses_bpf_auto_relays_and_on_does_not_start() {
    let name = "steering::refuse::where_the_system_refuses_bpf_auto_relays_and_on_does_not_start";
    in_namespace(name, || {
        let server = Server::start();
        let proxy = super::builder(&server).start();
        proxy.wait_for_log("CAP_BPF");
        wait_until("the refusal is known", || steering(proxy.control())["state"] == "unavailable");
        assert_unavailable(&proxy, "CAP_BPF");
        let mut client = Client::greeted(proxy.connect());
        assert!(!client.is_steered);
        let control = proxy.control();
        assert_eq!(control.put("/paused?wait=50ms").status, 504);
        control.pause();
        let accepted = server.accepted();
        let held = proxy.connect_held();
        client.assert_served();
        client.end();
        control.wait_idle();
        assert_eq!((server.accepted(), server.open()), (accepted, 0));
        control.resume();
        assert!(!Client::greeted(held).is_steered);
        let on = Proxy::builder().upstream_at(&server.url()).arg("--upstream-steer=on").fail();
        assert!(on.code != 0 && on.stderr.contains("CAP_BPF"), "{on:?}");
    });
}

#[track_caller]
fn assert_unavailable(proxy: &Proxy, key: &str) {
    let state = steering(proxy.control());
    assert_eq!(state["state"], "unavailable", "{state}");
    assert!(state["why"].as_str().unwrap().contains(key), "{state}");
    proxy.wait_for_log(key);
}

#[test]
fn a_server_that_listens_by_mptcp_is_relayed_to() {
    let mut server = Server::away();
    server.listen_by_mptcp();
    let Some(mut scene) = Scene::with(server, |builder| builder) else { return };
    assert_relaying(&scene, "MPTCP");
    for _ in 0..5 {
        assert!(!scene.connect().is_steered);
    }
    assert_relaying(&scene, "MPTCP");
    // The remedy helps without a start of tcpause.
    scene.server.kill();
    let addr = scene.server.addr();
    scene.server.listen(&[addr]);
    wait_until("newcomers are steered", || scene.connect().is_steered);
}

#[test]
fn a_server_of_another_host_is_relayed_to() {
    let server = Server::start();
    let elsewhere = |builder: Builder| builder.upstream_at(&"tcp://192.0.2.1:9");
    let Some(scene) = Scene::with(server, elsewhere) else { return };
    assert_relaying(&scene, "an address of this host and network namespace");
}

#[track_caller]
fn assert_relaying(scene: &Scene, why: &str) {
    let state = steering(scene.control());
    assert_eq!(state["state"], "relaying", "{state}");
    assert!(state["why"].as_str().unwrap().contains(why), "{state}");
}

#[test]
fn a_listener_of_one_device_is_relayed_to() {
    let mut server = Server::away();
    server.listen_at_device();
    let Some(scene) = Scene::with(server, |builder| builder) else { return };
    assert_relaying(&scene, "bound to a device");
    assert!(!scene.connect().is_steered);
}
