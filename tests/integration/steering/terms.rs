//! The terms of a pause, with clients that are steered: kill, expiry, several leases, reject, release.

use std::thread;

use super::{Client, Scene, steering};
use crate::harness::End;

#[test]
fn a_kill_resets_the_steered() {
    const CLIENTS: usize = 20;
    let Some(scene) = Scene::start() else { return };
    scene.wait_steering();
    let clients: Vec<Client> = (0..CLIENTS).map(|_| scene.connect_steered()).collect();
    let answer = scene.control().put("/paused?wait=50ms&on-timeout=kill");
    assert_eq!(answer.status, 201, "{answer}");
    println!("killed: {}", answer.text());
    let body: serde_json::Value = serde_json::from_slice(&answer.body).unwrap();
    assert_eq!(body["idle"], true);
    for mut client in clients {
        assert_eq!(client.stream.receive_all().end, End::Reset);
    }
    scene.control().wait_idle();
    scene.server.wait_open(0);
    scene.control().resume();
    scene.wait_steering();
    scene.connect_steered();
}

#[test]
fn behind_the_end_of_the_last_lease_newcomers_are_steered_again() {
    let Some(scene) = Scene::start() else { return };
    scene.wait_steering();
    let control = scene.control();
    assert_eq!(control.put("/paused?name=one").status, 201);
    assert_eq!(control.put("/paused?name=two&ttl=1s").status, 201);
    assert_eq!(control.delete("/paused?name=one").status, 204);
    let accepted = scene.server.accepted();
    // The second pause may be over any moment.
    let held = scene.proxy.connect();
    let (came, is_paused) = (scene.server.accepted(), control.is_paused());
    assert!(came == accepted || !is_paused, "let through");
    assert!(!Client::greeted(held).is_steered);
    scene.wait_steering();
    scene.connect_steered();
}

#[test]
fn rejected_clients_do_not_reach_the_server() {
    let Some(scene) = Scene::start() else { return };
    scene.wait_steering();
    let (control, mut busy) = (scene.control(), scene.connect_steered());
    assert_eq!(control.put("/paused?mode=reject").status, 201);
    let accepted = scene.server.accepted();
    for _ in 0..20 {
        let mut client = scene.proxy.connect();
        client.send(b"GET / HTTP/1.1\r\n\r\n");
        let answer = client.receive_all();
        assert!(answer.bytes.starts_with(b"HTTP/1.1 503 "), "{answer:?}");
    }
    busy.assert_served();
    assert_eq!(scene.server.accepted(), accepted);
    control.resume();
    scene.wait_steering();
    scene.connect_steered();
}

#[test]
fn released_clients_are_relayed_and_nobody_else_comes() {
    let Some(scene) = Scene::start() else { return };
    scene.wait_steering();
    let control = scene.control();
    control.pause();
    let accepted = scene.server.accepted();
    let mut held: Vec<_> = (0..3).map(|_| scene.proxy.connect_held()).collect();
    assert_eq!(control.delete("/paused?release=2").text(), "{\"released\": 2}\n");
    let last = held.pop().unwrap();
    let released: Vec<Client> = held.into_iter().map(Client::greeted).collect();
    assert!(released.iter().all(|client| !client.is_steered));
    let newcomer = scene.proxy.connect();
    control.wait_status("the newcomer is held", |status| status.held == 2);
    assert_eq!(steering(control)["state"], "relaying");
    released.into_iter().for_each(Client::end);
    control.wait_idle();
    assert_eq!(scene.server.accepted(), accepted + 2);
    control.resume();
    assert!([last, newcomer].map(Client::greeted).iter().all(|client| !client.is_steered));
    scene.wait_steering();
    scene.connect_steered();
}

#[test]
fn a_wait_without_a_pause_ends_once_nobody_is_steered() {
    let Some(scene) = Scene::start() else { return };
    scene.wait_steering();
    let wait = |time: &str| {
        let path = format!("/paused/block-until-idle?timeout={time}");
        scene.control().request("GET", &path, &[]).status
    };
    assert_eq!(wait("20s"), 204, "nobody is there");
    let client = scene.connect_steered();
    assert_eq!(wait("50ms"), 504);
    thread::scope(|scope| {
        let waiting = scope.spawn(|| wait("20s"));
        client.end();
        assert_eq!(waiting.join().unwrap(), 204);
    });
    scene.connect_steered();
}
