//! Upgrades with steering on: only one of both processes steers, and no client notices.

use std::{fs, thread, time::Duration};

use super::{Client, Scene, clients::Clients, server::Server, status, steering};
use crate::harness::{Builder, Proxy, amount, wait_until};

const BUSY_CLIENTS: usize = 8;

/// Variable by which a debug build is told of a fault.
const FAULT: &str = "TCPAUSE_HANDOVER_AT";

/// Time for which each of the pauses behind an upgrade holds.
const HOLD: Duration = Duration::from_millis(10);

#[track_caller]
fn upgrades_under_load(options: fn(Builder) -> Builder) {
    let Some(scene) = Scene::with(Server::start(), options) else { return };
    scene.wait_steering();
    let (control, upgrades) = (scene.control(), amount(3, 30));
    let mut kept = scene.connect_steered();
    let clients = Clients::start(BUSY_CLIENTS, scene.proxy.addr());
    let (mut late, mut pauses) = (0, 0);
    for _upgrade in 0..upgrades {
        clients.wait_served(BUSY_CLIENTS);
        scene.proxy.upgrade();
        kept.assert_served();
        // With two programs attached, one of them would go on in the pause of the other.
        for _pause in 0..5 {
            late += scene.late_in_a_pause(HOLD);
            pauses += 1;
            scene.wait_steering();
        }
    }
    let tally = clients.end();
    println!(
        "{upgrades} upgrades: {} clients were steered, {} relayed, {} failed; {pauses} pauses behind them: {late} \
         connections reached the server",
        tally.steered,
        tally.relayed,
        tally.failures.len(),
    );
    assert_eq!(late, 0);
    assert!(tally.failures.is_empty(), "{:?}", tally.failures);
    control.wait_status("the kept one is left", |status| status.active == 1);
    assert_eq!(steering(control)["active"], 1);
    let answer = control.put("/paused?wait=50ms");
    assert_eq!(answer.status, 504, "{answer}");
    kept.assert_served();
    kept.end();
    let answer = control.put("/paused?wait=20s");
    assert_eq!((answer.status, scene.server.open()), (201, 0), "{answer}");
}

#[test]
fn nobody_notices_an_upgrade_to_another_process() {
    upgrades_under_load(Builder::followed);
}

#[test]
fn nobody_notices_an_upgrade_that_keeps_the_process() {
    upgrades_under_load(|builder| builder);
}

#[test]
fn pauses_amid_upgrades_are_exact() {
    let Some(scene) = Scene::start() else { return };
    scene.wait_steering();
    let (control, upgrades) = (scene.control(), amount(4, 40));
    let clients = Clients::start(BUSY_CLIENTS, scene.proxy.addr());
    let (mut late, mut pauses) = (0, 0);
    for _upgrade in 0..upgrades {
        clients.wait_served(BUSY_CLIENTS);
        scene.wait_steering();
        thread::scope(|scope| {
            let upgrade = scope.spawn(|| control.request("POST", "/upgrade", &[]));
            while !upgrade.is_finished() {
                late += scene.late_in_a_pause(HOLD);
                pauses += 1;
                // It takes over amid steering, too.
                thread::sleep(HOLD);
            }
            let answer = upgrade.join().unwrap();
            assert_eq!(answer.status, 200, "{answer}");
        });
    }
    let tally = clients.end();
    println!(
        "{pauses} pauses amid {upgrades} upgrades: {late} connections reached the server; {} clients were steered, {} \
         relayed, {} failed",
        tally.steered,
        tally.relayed,
        tally.failures.len(),
    );
    assert_eq!(late, 0);
    assert!(tally.failures.is_empty(), "{:?}", tally.failures);
}

#[test]
fn an_upgrade_in_a_pause_keeps_the_held_and_counts_the_steered() {
    let Some(scene) = Scene::start() else { return };
    scene.wait_steering();
    let control = scene.control();
    let mut steered = scene.connect_steered();
    control.pause();
    let held: Vec<_> = (0..10).map(|_| scene.proxy.connect_held()).collect();
    let accepted = scene.server.accepted();
    scene.proxy.upgrade();
    let later: Vec<_> = (0..10).map(|_| scene.proxy.connect()).collect();
    control.wait_status("all are held", |status| status.held == 20);
    let answer = control.get("/paused/block-until-idle?timeout=50ms");
    assert_eq!(answer.status, 504, "{answer}");
    assert_eq!(status(control)["active"], 1);
    steered.assert_served();
    steered.end();
    control.wait_idle();
    assert_eq!((scene.server.accepted(), scene.server.open()), (accepted, 0));
    control.resume();
    for stream in held.into_iter().chain(later) {
        let client = Client::greeted(stream);
        assert!(!client.is_steered);
        client.end();
    }
    scene.wait_steering();
    scene.connect_steered();
}

#[test]
fn behind_an_upgrade_that_fails_the_old_process_steers_on() {
    for fault in ["taker:warm:exit", "taker:ready:exit", "taker:taken:kill"] {
        let with_fault = |builder: Builder| builder.followed().env(FAULT, fault);
        let Some(scene) = Scene::with(Server::start(), with_fault) else { return };
        scene.wait_steering();
        let control = scene.control();
        let mut kept = scene.connect_steered();
        let clients = Clients::start(BUSY_CLIENTS / 2, scene.proxy.addr());
        clients.wait_served(BUSY_CLIENTS);
        let answer = control.request("POST", "/upgrade", &[]);
        assert_eq!(answer.status, 409, "{fault}: {answer}");
        scene.wait_steering();
        wait_until("newcomers are steered", || scene.connect().is_steered);
        kept.assert_served();
        let late = scene.late_in_a_pause(HOLD);
        let tally = clients.end();
        println!(
            "{fault}: {} of {} clients failed; {late} connections reached the server in a pause behind it",
            tally.failures.len(),
            tally.count(),
        );
        assert!(tally.failures.is_empty(), "{:?}", tally.failures);
        assert_eq!(late, 0);
        drop(kept);
    }
}

#[test]
fn clients_that_wait_to_be_accepted_do_not_count_behind_an_upgrade() {
    let full = |builder: Builder| builder.args(["--hold-max=2", "--hold-overflow=backlog"]);
    let Some(scene) = Scene::with(Server::start(), |builder| full(builder).followed()) else {
        return;
    };
    scene.wait_steering();
    let control = scene.control();
    control.pause();
    let clients: Vec<_> = (0..6).map(|_| scene.proxy.connect()).collect();
    control.wait_status("two are held", |status| status.held == 2);
    scene.proxy.upgrade();
    let answer = control.put("/paused?wait=20s");
    assert_eq!((answer.status, steering(control)["active"].as_u64()), (201, Some(0)), "{answer}");
    control.resume();
    for client in clients {
        assert!(!Client::greeted(client).is_steered);
    }
}

#[test]
fn an_upgrade_does_not_end_the_steering_over_living_connections() {
    let server = Server::start();
    let url = server.url();
    let text = |steer: &str| format!("upstream: {{ addr: '{url}', steer: {steer} }}\n");
    let proxy = Proxy::builder().file("tcpause.yml", text("auto")).start();
    let scene = Scene { proxy, server };
    if !scene.has_bpf() {
        return;
    }
    scene.wait_steering();
    let mut client = scene.connect_steered();
    fs::write(scene.proxy.dir().join("tcpause.yml"), text("off")).unwrap();
    let answer = scene.control().request("POST", "/upgrade", &[]);
    assert!(answer.assert_error(409).contains("upstream.steer: an upgrade cannot end"), "{answer}");
    client.assert_served();
    client.end();
    scene.control().pause();
    scene.control().wait_status("nobody is left", |status| status.active == 0);
    scene.proxy.upgrade();
    scene.control().resume();
    assert!(!scene.connect().is_steered);
}
