//! A host that holds when it is cut off from etcd: its fence holds for steered clients, even while the process stands still.

use std::{fs, path::PathBuf, thread, time::Duration, time::Instant};

use rustix::process::Signal;

use super::{Client, Scene, server::Server, steering};
use crate::harness::{
    Builder, Proxy,
    etcd::{Cluster, Relay},
    wait_until,
};

/// The shortest time to live of a session.
const TTL: Duration = Duration::from_secs(5);

/// Starts a member of a fleet that reaches etcd by a relay. Returns `None` where there is no etcd or no BPF.
fn start() -> Option<(Scene, Relay, Cluster)> {
    let cluster = Cluster::start(1)?;
    let relay = Relay::start(cluster.addr(0));
    let endpoints = format!("--fleet-endpoints=http://{}", relay.addr());
    let member = |builder: Builder| {
        builder.args([
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
    let Some((scene, relay, _cluster)) = start() else { return };
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
