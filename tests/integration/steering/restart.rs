//! The server ends and listens anew: its clients are relayed meanwhile, and steered again soon.

use std::{
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    time::{Duration, Instant},
};

use super::{Client, Scene, clients::Clients, server::Server, steering};
use crate::harness::{amount, wait_until};

const BUSY_CLIENTS: usize = 6;

/// Time within which newcomers are steered to a server that listens again.
const AGAIN: Duration = Duration::from_secs(1);

/// Returns the addresses at which the server of a port may listen, each with what they are.
fn places(port: u16) -> [(&'static str, Vec<SocketAddr>); 5] {
    let loopback = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    [
        ("the loopback", vec![loopback]),
        ("a group of four", vec![loopback; 4]),
        ("0.0.0.0", vec![(Ipv4Addr::UNSPECIFIED, port).into()]),
        ("::", vec![(Ipv6Addr::UNSPECIFIED, port).into()]),
        ("a group of two at ::", vec![(Ipv6Addr::UNSPECIFIED, port).into(); 2]),
    ]
}

#[test]
fn a_server_that_is_killed_is_found_again() {
    let Some(mut scene) = Scene::start() else { return };
    scene.wait_steering();
    let places = places(scene.server.addr().port());
    let clients = Clients::start(BUSY_CLIENTS, scene.proxy.addr());
    let (mut kills, mut slowest) = (Vec::new(), Duration::ZERO);
    let rounds = amount(2, 20);
    for (name, addrs) in std::iter::repeat_n(&places, rounds).flatten() {
        clients.wait_served(BUSY_CLIENTS);
        kills.push(scene.server.kill());
        // Nobody is refused: it waits for the server.
        let waiting = scene.proxy.connect();
        scene
            .control()
            .wait_status("clients wait for the server", |status| status.awaiting_upstream > 0);
        scene.server.listen(addrs);
        let listens = Instant::now();
        assert!(!Client::greeted(waiting).is_steered, "{name}");
        wait_until("newcomers are steered", || scene.connect().is_steered);
        slowest = slowest.max(listens.elapsed());
        assert!(listens.elapsed() < AGAIN, "{name}: {:?}", listens.elapsed());
    }
    let tally = clients.end();
    let in_its_hands =
        |began: Instant| kills.iter().any(|&kill| began < kill && kill - began < AGAIN);
    let strange: Vec<_> =
        tally.failures.iter().filter(|failure| !in_its_hands(failure.began)).collect();
    println!(
        "{} kills: {} of {} clients failed with the server, and {} others; steered again within {slowest:?}",
        kills.len(),
        tally.failures.len() - strange.len(),
        tally.count(),
        strange.len(),
    );
    assert!(strange.is_empty(), "{strange:?}");
    assert!(tally.failures.len() <= kills.len() * BUSY_CLIENTS);
}

#[test]
fn a_server_is_restarted_in_a_pause_and_nobody_notices() {
    let Some(mut scene) = Scene::start() else { return };
    scene.wait_steering();
    let places = places(scene.server.addr().port());
    let clients = Clients::start(BUSY_CLIENTS, scene.proxy.addr());
    let (mut left, mut slowest) = (0, Duration::ZERO);
    for (_name, addrs) in &places {
        clients.wait_served(BUSY_CLIENTS);
        let answer = scene.control().put("/paused?wait=20s");
        assert_eq!(answer.status, 201, "{answer}");
        left += scene.server.open();
        scene.server.kill();
        scene.server.listen(addrs);
        scene.control().resume();
        let resumed = Instant::now();
        wait_until("newcomers are steered", || scene.connect().is_steered);
        slowest = slowest.max(resumed.elapsed());
    }
    let tally = clients.end();
    println!(
        "{} restarts: {left} connections were left, {} of {} clients failed; steered again within {slowest:?}",
        places.len(),
        tally.failures.len(),
        tally.count(),
    );
    assert_eq!(left, 0);
    assert!(tally.failures.is_empty(), "{:?}", tally.failures);
    assert!(slowest < AGAIN);
}

#[test]
fn members_of_a_group_come_and_go() {
    const CLIENTS: usize = 200;
    let Some(mut scene) = Scene::start() else { return };
    let addr = scene.server.addr();
    scene.server.kill();
    scene.server.listen(&[addr; 8]);
    wait_until("newcomers are steered", || scene.connect().is_steered);
    let count = |scene: &Scene| {
        let before = scene.server.accepted();
        (0..CLIENTS).for_each(|_| scene.connect_steered().end());
        let mut counts = [0; 8];
        scene.server.members()[before..].iter().for_each(|&member| counts[member] += 1);
        counts
    };
    let all = count(&scene);
    let mut relayed = 0;
    for member in 0..7 {
        scene.server.close(member);
        let closed = Instant::now();
        // Once all members that were found have left, a client is relayed, and others are found.
        while !scene.connect().is_steered {
            relayed += 1;
            assert!(closed.elapsed() < AGAIN, "{}", steering(scene.control()));
        }
    }
    let last = count(&scene);
    println!(
        "connections of each member: {all:?}, and {last:?} once only the last was left; {relayed} clients were relayed \
         while seven left"
    );
    assert!(all.iter().all(|&count| count > 0));
    assert_eq!(last[7], CLIENTS);
}

#[test]
fn a_server_that_comes_late_is_found() {
    let Some(mut scene) = Scene::with(Server::away(), |builder| builder) else { return };
    assert_eq!(steering(scene.control())["state"], "relaying");
    let waiting = scene.proxy.connect();
    scene.control().wait_status("it waits", |status| status.awaiting_upstream == 1);
    let addr = scene.server.addr();
    scene.server.listen(&[addr]);
    assert!(!Client::greeted(waiting).is_steered);
    let listens = Instant::now();
    wait_until("newcomers are steered", || scene.connect().is_steered);
    println!("a server that comes late: steered {:?} behind the first client", listens.elapsed());
    assert!(listens.elapsed() < AGAIN);
}

#[test]
fn a_server_that_is_away_or_changed_is_told_and_leaves_nobody_behind() {
    let Some(mut scene) = Scene::start() else { return };
    scene.wait_steering();
    scene.server.kill();
    let waiting = scene.proxy.connect();
    wait_until("the absence is told", || {
        let state = steering(scene.control());
        state["state"] == "relaying" && state["why"].to_string().contains("nobody listens")
    });
    scene.server.listen_by_mptcp();
    let client = Client::greeted(waiting);
    wait_until("the change is told", || {
        let state = steering(scene.control());
        state["why"].to_string().contains("MPTCP") && state["active"] == 0
    });
    client.end();
    assert_eq!(scene.control().put("/paused?wait=20s").status, 201);
}
