//! Addresses of the proxy and of the server: names, wildcards, both families, and those of the host.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};

use super::{Client, Scene, server::Server};
use crate::harness::{Addr, wait_until};

fn at(ip: impl Into<IpAddr>, port: u16) -> Addr {
    Addr::Tcp((ip.into(), port).into())
}

/// Returns an address of this host that is not of the loopback, if it has one.
fn host_ip() -> Option<IpAddr> {
    // No packet is sent: the kernel chooses the source for a host that is not there.
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).ok()?;
    socket.connect((Ipv4Addr::new(192, 0, 2, 254), 9)).ok()?;
    Some(socket.local_addr().ok()?.ip())
}

#[test]
fn a_server_at_a_name_is_steered_to() {
    let server = Server::start();
    let name = format!("tcp://localhost:{}", server.addr().port());
    let Some(scene) = Scene::with(server, |builder| builder.upstream_at(&name)) else { return };
    wait_until("newcomers are steered", || scene.connect().is_steered);
}

#[test]
fn clients_at_every_address_of_a_wildcard_are_steered() {
    let listen = at(Ipv4Addr::UNSPECIFIED, 0);
    let Some(scene) = Scene::with(Server::start(), |builder| builder.listen_at(&listen)) else {
        return;
    };
    scene.wait_steering();
    let ips = (1..4).map(|last| Ipv4Addr::new(127, 0, 0, last).into()).chain(host_ip());
    for ip in ips {
        let client = Client::greeted(at(ip, scene.proxy.addr().port()).connect());
        assert!(client.is_steered, "{ip}");
        client.end();
    }
}

#[test]
fn both_families_are_steered_where_the_server_takes_them() {
    if UdpSocket::bind((Ipv6Addr::LOCALHOST, 0)).is_err() {
        return println!("skipped: there is no IPv6 on this machine");
    }
    let listen = at(Ipv6Addr::UNSPECIFIED, 0);
    let Some(mut scene) = Scene::with(Server::start(), |builder| builder.listen_at(&listen)) else {
        return;
    };
    scene.wait_steering();
    let port = scene.proxy.addr().port();
    let connect = |ip: IpAddr| Client::greeted(at(ip, port).connect());
    let (ipv4, ipv6) = (Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into());
    assert!(connect(ipv4).is_steered);
    // The server at 127.0.0.1 cannot take it.
    assert!(!connect(ipv6).is_steered);
    let place = scene.server.addr().port();
    scene.server.kill();
    scene.server.listen(&[(Ipv6Addr::UNSPECIFIED, place).into()]);
    wait_until("newcomers are steered", || connect(ipv4).is_steered);
    assert!(connect(ipv6).is_steered);
    scene.control().pause();
    let accepted = scene.server.accepted();
    let held = [ipv4, ipv6].map(|ip| at(ip, port).connect());
    scene.control().wait_status("both are held", |status| status.held == 2);
    assert_eq!(scene.server.accepted(), accepted);
    scene.control().resume();
    assert!(held.map(Client::greeted).iter().all(|client| !client.is_steered));
}

#[test]
fn a_server_at_an_address_of_the_host_is_steered_to() {
    let Some(ip) = host_ip() else { return println!("skipped: this host has no address") };
    let Some(mut scene) = Scene::with(Server::at(ip), |builder| builder) else { return };
    scene.wait_steering();
    scene.connect_steered().end();
    let addr = scene.server.addr();
    scene.server.kill();
    scene.server.listen(&[addr]);
    wait_until("newcomers are steered", || scene.connect().is_steered);
}
