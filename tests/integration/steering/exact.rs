//! A pause is exact for steered clients, too, and waits count them.

use std::{thread, time::Duration};

use super::{Client, Scene, clients::Clients, status, steering};
use crate::{
    harness::{Random, Status, Stream, amount, wait_until},
    process::exec::Exec,
};

/// Clients that connect, ask and leave, again and again.
const BUSY_CLIENTS: usize = 12;

/// Clients that are held together, and those that come at a time when they are let go.
const HELD: usize = 200;
const NEWCOMERS: usize = 4;

/// Seed of the times for which clients are held.
const SEED: u64 = 16;

#[test]
fn nothing_reaches_the_server_behind_the_answer_to_a_pause() {
    let Some(scene) = Scene::start() else { return };
    scene.wait_steering();
    let (control, server) = (scene.control(), &scene.server);
    let (cycles, mut random) = (amount(200, 2000), Random::new(SEED));
    let clients = Clients::start(BUSY_CLIENTS, scene.proxy.addr());
    let (mut late, mut unfinished, mut waits) = (0, 0, 0);
    for cycle in 0..cycles {
        clients.wait_served(BUSY_CLIENTS);
        if cycle % 4 < 2 {
            let answer = control.put("/paused?wait=20s");
            assert_eq!(answer.status, 201, "{answer}");
            unfinished += server.open();
            waits += 1;
        } else {
            control.pause();
        }
        let before = server.accepted();
        thread::sleep(Duration::from_millis(5 + random.next() % 16));
        late += server.accepted() - before;
        control.resume();
        // Every second pause may come while the steering begins; else none would meet steered clients for sure.
        if cycle % 2 == 1 {
            scene.wait_steering();
        }
    }
    let tally = clients.end();
    println!(
        "{cycles} pauses: {late} connections reached the server behind the answer; {waits} waits: {unfinished} were left \
         behind the answer; {} clients were steered, {} relayed, {} failed",
        tally.steered,
        tally.relayed,
        tally.failures.len(),
    );
    assert_eq!((late, unfinished), (0, 0));
    assert!(tally.failures.is_empty(), "{:?}", tally.failures);
    assert!(tally.steered > cycles, "few were steered");
    assert!(tally.relayed > 0, "nobody was held");
}

#[test]
fn waits_count_the_steered_and_never_the_held() {
    let Some(scene) = Scene::start() else { return };
    scene.wait_steering();
    let (control, server) = (scene.control(), &scene.server);
    let mut busy: Vec<Client> = (0..3).map(|_| scene.connect_steered()).collect();
    control.wait_status("all are counted", |status| status.active == 3);
    assert_eq!(steering(control)["active"], 3);

    let answer = control.put("/paused?wait=50ms&on-timeout=keep");
    assert_eq!(answer.status, 504, "{answer}");
    let held: Vec<_> = (0..5).map(|_| scene.proxy.connect_held()).collect();
    let now = status(control);
    assert_eq!((&now["active"], &now["held"]), (&3.into(), &5.into()), "{now}");
    let accepted = server.accepted();
    for left in (0..3).rev() {
        let answer = control.get("/paused/block-until-idle?timeout=50ms");
        assert_eq!(answer.status, 504, "{answer}");
        let mut client = busy.pop().unwrap();
        client.assert_served();
        client.end();
        wait_until("it is counted no more", || status(control)["active"] == left);
    }
    control.wait_idle();
    assert_eq!((server.open(), server.accepted()), (0, accepted));
    control.resume();
    for stream in held {
        let client = Client::greeted(stream);
        assert!(!client.is_steered);
        client.end();
    }

    scene.wait_steering();
    let mut client = scene.connect_steered();
    let mut exec = Exec::start(
        control,
        ["--wait=20s", "--ttl=1h", "--", "sh", "-c", "echo started; read ended"],
    );
    control.wait_status("it is paused", |status| status.paused);
    let held = scene.proxy.connect_held();
    client.assert_served();
    assert!(exec.stdout.try_recv().is_err(), "the command runs while a client is served");
    client.end();
    exec.wait_started();
    assert_eq!(server.open(), 0);
    exec.end();
    assert_eq!(exec.code(), 0);
    assert!(!Client::greeted(held).is_steered);
}

#[test]
fn the_held_come_first_and_newcomers_are_steered_behind_them() {
    let Some(mut scene) = Scene::start() else { return };
    let rounds = amount(10, 100);
    let mut order = Order::default();
    for _round in 0..rounds {
        scene.wait_steering();
        scene.control().pause();
        let held = hold(&scene, |status| status.held);
        scene.control().resume();
        order.watch(&scene, held);
    }
    println!("{rounds} times {HELD} clients that a pause holds: {order:?}");
    assert_eq!(order.overtaken, 0);

    let (addr, rounds) = (scene.server.addr(), amount(5, 50));
    let mut order = Order::default();
    for _round in 0..rounds {
        scene.wait_steering();
        scene.server.kill();
        let held = hold(&scene, |status| status.awaiting_upstream);
        scene.server.listen(&[addr]);
        order.watch(&scene, held);
    }
    println!("{rounds} times {HELD} clients that wait for the server: {order:?}");
    assert_eq!(order.overtaken, 0);
}

/// Has clients come, and waits until so many of them are held in this way.
fn hold(scene: &Scene, count: fn(&Status) -> u64) -> Vec<Stream> {
    let held = (0..HELD).map(|_| scene.proxy.connect()).collect();
    scene.control().wait_status("all are held", |status| count(status) == HELD as u64);
    held
}

/// Order in which clients have come to the server.
#[derive(Debug, Default)]
struct Order {
    /// Held ones behind the first one that was steered.
    overtaken: usize,
    /// Newcomers before that one.
    relayed: usize,
}

impl Order {
    /// Has newcomers come until they are steered.
    fn watch(&mut self, scene: &Scene, held: Vec<Stream>) {
        let come = || {
            let mut relayed = 0;
            loop {
                let newcomer = scene.connect();
                if newcomer.is_steered {
                    return (newcomer.place, relayed);
                }
                relayed += 1;
            }
        };
        let newcomers: Vec<_> = thread::scope(|scope| {
            let threads: Vec<_> = (0..NEWCOMERS).map(|_| scope.spawn(come)).collect();
            threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
        });
        self.relayed += newcomers.iter().map(|(_place, relayed)| relayed).sum::<usize>();
        let held: Vec<_> = held.into_iter().map(Client::greeted).collect();
        assert!(held.iter().all(|client| !client.is_steered));
        let first = newcomers.iter().map(|(place, _relayed)| *place).min().expect("newcomers");
        self.overtaken += held.iter().filter(|client| client.place > first).count();
    }
}
