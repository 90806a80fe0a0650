//! Members of a fleet: pauses count the steered, and the fence of a host that is cut off from etcd holds for them, even while
//! the process stands still.

use std::{
    fs,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use rustix::process::Signal;

use super::{Client, Scene, server::Server, steering};
use crate::{
    harness::{
        Builder, End, Proxy,
        etcd::{Cluster, Relay},
        wait_until,
    },
    process::exec::Exec,
};

/// The shortest time to live of a session.
const TTL: Duration = Duration::from_secs(5);

/// Time from the fence until a host that holds resets what is left.
const GRACE: Duration = Duration::from_secs(2);

/// Time in which a host notices what has become of a request.
const ROOM: Duration = Duration::from_secs(3);

/// Starts a member of a fleet that reaches etcd by a relay. Returns `None` where there is no etcd or no BPF.
fn start(grace_period: &'static str) -> Option<(Scene, Relay, Cluster)> {
    let cluster = Cluster::start(1)?;
    let relay = Relay::start(cluster.addr(0));
    let endpoints = format!("--fleet-endpoints=http://{}", relay.addr());
    let member = |builder: Builder| {
        builder.grace_period(Some(grace_period)).args([
            &*endpoints,
            "--fleet-host=h00",
            "--fleet-ttl=5s",
            "--fleet-on-disconnect=hold",
        ])
    };
    let scene = Scene::with(Server::start(), member)?;
    scene.proxy.wait_for_log("is a member of the fleet");
    scene.wait_steering();
    Some((scene, relay, cluster))
}

fn stop(proxy: &Proxy) {
    proxy.signal(Signal::STOP);
    let is_stopped = |task: PathBuf| {
        fs::read_to_string(task.join("stat")).is_ok_and(|stat| stat.contains(") T "))
    };
    wait_until("all threads are stopped", || proxy.threads_named("").into_iter().all(is_stopped));
}

#[test]
fn nobody_is_steered_behind_the_fence_of_a_process_that_stands_still() {
    let Some((scene, relay, _cluster)) = start("1h") else { return };
    let mut kept = scene.connect_steered();
    relay.cut();
    let cut = Instant::now();
    stop(&scene.proxy);
    // The kernel needs no process to steer, until the fence.
    scene.connect_steered().end();
    thread::sleep((cut + TTL).saturating_duration_since(Instant::now()));
    let accepted = scene.server.accepted();
    let held: Vec<_> = (0..4).map(|_| scene.proxy.connect()).collect();
    assert_eq!(scene.server.accepted(), accepted);
    scene.proxy.signal(Signal::CONT);
    scene.proxy.wait_for_log("as \"fleet/lost\"");
    scene.control().wait_status("all are held", |status| status.held == 4);
    assert_eq!(steering(scene.control())["state"], "relaying");
    assert_eq!(scene.server.accepted(), accepted);
    kept.assert_served();
    relay.heal();
    for stream in held {
        assert!(!Client::greeted(stream).is_steered);
    }
    scene.wait_steering();
    scene.connect_steered();
}

#[test]
fn a_host_that_is_cut_off_steers_nobody_and_resets_the_steered() {
    let Some((scene, relay, _cluster)) = start("2s") else { return };
    let mut kept = scene.connect_steered();
    relay.cut();
    let cut = Instant::now();
    scene.proxy.wait_for_log("as \"fleet/lost\"");
    let held_at = cut.elapsed();
    let accepted = scene.server.accepted();
    let held = scene.proxy.connect_held();
    kept.assert_served();
    assert_eq!(kept.stream.receive_all().end, End::Reset);
    let reset_at = cut.elapsed();
    println!(
        "cut off with hold: held {held_at:?} behind the cut, the steered reset {reset_at:?} behind it"
    );
    assert!(held_at < TTL + ROOM && reset_at < held_at + GRACE + ROOM);
    scene.server.wait_open(0);
    assert_eq!(scene.server.accepted(), accepted);
    relay.heal();
    assert!(!Client::greeted(held).is_steered);
    scene.wait_steering();
    scene.connect_steered();
}

#[test]
fn a_pause_of_the_fleet_waits_for_the_steered() {
    let Some((scene, _relay, _cluster)) = start("1h") else { return };
    let mut kept = scene.connect_steered();
    let script = "echo started; read ended";
    let options = ["--fleet", "--name=deploy", "--ttl=5s", "--wait=20s", "--", "sh", "-c", script];
    let mut exec = Exec::start(scene.control(), options);
    scene.control().wait_status("it is paused", |status| status.paused);
    let held = scene.proxy.connect_held();
    kept.assert_served();
    assert!(exec.stdout.try_recv().is_err(), "the command runs while a client is served");
    kept.end();
    exec.wait_started();
    assert_eq!(scene.server.open(), 0);
    exec.end();
    assert_eq!(exec.code(), 0);
    assert!(!Client::greeted(held).is_steered);
    scene.wait_steering();
    scene.connect_steered();
}
