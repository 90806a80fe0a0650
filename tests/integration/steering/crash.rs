//! tcpause ends: the steered go on, and the next process counts them.

use std::{thread, time::Duration};

use rustix::process::Signal;

use super::{
    Client, Scene, builder,
    clients::Clients,
    server::{GOODBYE, Server},
    steering, wait_steering,
};
use crate::harness::{End, Proxy, amount, wait_until};

const BUSY_CLIENTS: usize = 6;

/// Time for which a pause holds.
const HOLD: Duration = Duration::from_millis(10);

/// Kills the proxy, and starts another one at the same addresses.
fn killed_and_started(scene: &mut Scene) -> Proxy {
    scene.proxy.signal(Signal::KILL);
    // Until then, a thread of it may have the listener.
    assert_eq!(scene.proxy.exit_code(), 128 + 9);
    builder(&scene.server).listen_at(scene.proxy.addr()).start()
}

#[test]
fn the_steered_outlive_a_crash_and_count_behind_it() {
    const CLIENTS: usize = 5;
    let starts = amount(4, 20);
    for start in 0..starts {
        let Some(mut scene) = Scene::start() else { return };
        scene.wait_steering();
        let mut clients: Vec<Client> = (0..CLIENTS).map(|_| scene.connect_steered()).collect();
        let proxy = killed_and_started(&mut scene);
        let control = proxy.control();
        clients.iter_mut().for_each(Client::assert_served);
        // Every second time the first request meets a process that has not counted yet.
        if start % 2 == 0 {
            wait_steering(control);
            assert_eq!(steering(control)["active"], CLIENTS);
            let later = Client::greeted(proxy.connect());
            assert!(later.is_steered);
            clients.push(later);
        }
        let answer = control.put("/paused?wait=100ms&on-timeout=keep");
        assert_eq!(answer.status, 504, "{answer}");
        let count = clients.len() as u64;
        control.wait_status("all are counted", |status| status.active == count);
        for mut client in clients {
            client.assert_served();
            client.end();
        }
        control.wait_idle();
        assert_eq!(scene.server.open(), 0);
    }
    println!("{starts} crashes: {CLIENTS} steered clients outlived each, and were counted");
}

#[test]
fn a_stop_neither_waits_for_the_steered_nor_ends_them() {
    let Some(mut scene) = Scene::start() else { return };
    scene.wait_steering();
    let mut kept = scene.connect_steered();
    scene.proxy.terminate();
    // The grace period is an hour.
    assert_eq!(scene.proxy.exit_code(), 0);
    kept.assert_served();
    let proxy = builder(&scene.server).listen_at(scene.proxy.addr()).start();
    wait_steering(proxy.control());
    proxy.control().wait_status("it is counted", |status| status.active == 1);
    kept.assert_served();
    kept.end();
}

#[test]
fn a_port_that_steered_connections_keep_from_being_bound_is_served() {
    let Some(mut scene) = Scene::with(Server::unshared(), |builder| builder) else { return };
    scene.wait_steering();
    let starts = amount(6, 20);
    let mut kept = vec![scene.connect_steered()];
    for start in 0..starts {
        // Every second time, no connection is left but one in TIME-WAIT, as the server has closed first.
        if start % 2 == 1 {
            for mut client in kept.drain(..) {
                client.stream.send(&[GOODBYE]);
                assert_eq!(client.stream.receive_all().end, End::Eof);
            }
            scene.server.wait_open(0);
        }
        let addr = scene.proxy.addr().clone();
        scene.proxy = killed_and_started(&mut scene);
        scene.proxy.wait_for_log("so it is not bound");
        kept.iter_mut().for_each(Client::assert_served);
        let connect = || Client::greeted(addr.connect());
        connect().end();
        wait_steering(scene.control());
        let client = connect();
        assert!(client.is_steered, "start {start}");
        kept.push(client);
        scene.control().pause();
        let accepted = scene.server.accepted();
        let held = addr.connect();
        scene.control().wait_status("it is held", |status| status.held == 1);
        let count = kept.len() as u64;
        scene.control().wait_status("all are counted", |status| status.active == count);
        assert_eq!(scene.server.accepted(), accepted);
        scene.control().resume();
        assert!(!Client::greeted(held).is_steered);
    }
    let clients = Clients::start(BUSY_CLIENTS, scene.proxy.addr());
    let upgrades = 2;
    for _upgrade in 0..upgrades {
        clients.wait_served(BUSY_CLIENTS);
        scene.proxy.upgrade();
        wait_until("newcomers are steered", || scene.connect().is_steered);
        scene.control().pause();
        let accepted = scene.server.accepted();
        thread::sleep(HOLD);
        assert_eq!(scene.server.accepted(), accepted);
        scene.control().resume();
    }
    let tally = clients.end();
    kept.iter_mut().for_each(Client::assert_served);
    println!(
        "{starts} starts at a port that cannot be bound: all were served; {upgrades} upgrades behind them: {} of {} clients \
         failed",
        tally.failures.len(),
        tally.count(),
    );
    assert!(tally.failures.is_empty(), "{:?}", tally.failures);
    assert_eq!(scene.proxy.log_count("another BPF program"), 0);
}
