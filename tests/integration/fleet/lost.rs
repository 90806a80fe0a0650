//! A coordinator that loses etcd, a start without etcd, and stops.

use std::time::Duration;

use rustix::process::Signal;

use super::{Fleet, LINGER, TTL, clock, json, millis, row};
use crate::harness::{End, etcd::Relay};

/// Time in which a process notices what has become of a request.
const ROOM: Duration = Duration::from_secs(5);

#[test]
fn a_command_is_ended_before_hosts_resume_without_their_coordinator() {
    let Some(mut fleet) = Fleet::start(0, 1) else { return };
    let relay = Relay::start(fleet.cluster.addr(0));
    let coordinator = fleet.builder_at(0, &format!("http://{}", relay.addr()));
    fleet.add(coordinator);
    let builder = fleet.builder(1);
    fleet.add(builder);
    let asked = clock();
    let (mut run, began) = fleet.run(0, "deploy", &["--wait=20s", "--if-lost=kill"]);
    relay.cut();
    let cut = clock();
    run.0.wait_told("it is not certain any more that all hosts are paused, as the pause cannot be renewed in etcd; the command is sent SIGTERM");
    let told = clock();
    let ended = run.told();
    let resumed = fleet.resumed_at(1, "deploy");
    println!(
        "coordinator cut off: told after {} ms, the command ended after {} ms, the other host resumed after {} ms",
        millis(cut, told),
        millis(cut, ended),
        millis(cut, resumed)
    );
    fleet.assert_quiet(began, resumed, |_host| true);
    // k + ttl - 1 s, as k is behind the order.
    assert!(told + Duration::from_secs(1) > asked + TTL, "too early");
    // L + 1 s before any host can resume.
    assert!(ended + LINGER < resumed, "too near to the resume");
    assert!(resumed < cut + TTL + LINGER + ROOM, "too late");
    relay.heal();
    fleet.resumed_at(0, "deploy");
    assert_eq!(run.0.code(), 128 + 15);
}

#[test]
fn a_command_is_ended_before_hosts_resume_without_a_coordinator_that_stands_still() {
    let Some(fleet) = Fleet::start(2, 1) else { return };
    let (mut run, began) = fleet.run(0, "deploy", &["--wait=20s", "--if-lost=kill"]);
    // It hears of no loss over more than the time to live.
    std::thread::sleep(TTL + Duration::from_secs(1));
    assert_eq!(run.0.stderr.try_iter().collect::<Vec<_>>(), [""; 0]);
    fleet.host(0).signal(Signal::STOP);
    let stopped = clock();
    run.0.wait_told("it is not certain any more that all hosts are paused, as the proxy does not answer; the command is sent SIGTERM");
    let told = clock();
    let ended = run.told();
    let resumed = fleet.resumed_at(1, "deploy");
    println!(
        "coordinator stopped by SIGSTOP: told after {} ms, the command ended after {} ms, the other host resumed after {} ms",
        millis(stopped, told),
        millis(stopped, ended),
        millis(stopped, resumed)
    );
    assert!(ended + Duration::from_secs(2) < resumed, "too near to the resume");
    fleet.assert_quiet(began, resumed, |_host| true);
    fleet.host(0).signal(Signal::CONT);
    fleet.resumed_at(0, "deploy");
    assert_eq!(run.0.code(), 128 + 15);
}

#[test]
fn a_host_that_looks_after_pauses_is_fenced_and_tells_of_their_loss_in_time() {
    let Some(mut fleet) = Fleet::start(0, 1) else { return };
    let grace = Duration::from_secs(2);
    let builder = fleet.builder(0);
    fleet.add(builder.args(["--fleet-on-disconnect=hold", "--grace-period=2s"]));
    let mut busy = fleet.busy(0);
    let run = |pause: u8| fleet.run(0, &format!("p{pause}"), &["--wait=20s", "--without=h00"]).0;
    let runs: Vec<_> = (0..8).map(run).collect();
    fleet.paused_at(0, "p7");
    fleet.cluster.stop(0);
    let stopped = clock();
    busy.assert_echo(&[0]);
    for run in &runs {
        run.0.wait_told(
            "it is not certain any more that all hosts are paused, as the pause cannot be renewed in etcd",
        );
    }
    let told = clock();
    assert_eq!(busy.receive_all().end, End::Reset);
    let reset = clock();
    println!(
        "etcd stopped under 8 pauses: told after {} ms, reset after {} ms",
        millis(stopped, told),
        millis(stopped, reset)
    );
    // All was sent before the stop: k + ttl - 1 s, and s + T + G.
    let second = Duration::from_secs(1);
    assert!(told < stopped + TTL, "told too late");
    assert!(reset < stopped + TTL + grace + second, "reset too late");
    // The last round was a period before the stop at the earliest.
    assert!(reset + TTL / 3 + second > stopped + TTL + grace, "reset too early");
    fleet.cluster.go_on(0);
}

#[test]
fn a_full_etcd_that_loses_a_holder_ends_the_pause_and_that_is_told_before() {
    let Some(fleet) = Fleet::start(2, 1) else { return };
    let (run, began) = fleet.run(0, "deploy", &["--wait=20s", "--ttl=12s"]);
    let ask = |path: &str, body: &str| -> serde_json::Value {
        serde_json::from_str(&fleet.cluster.ask(0, path, body)).unwrap()
    };
    let alarm = ask("/v3/maintenance/alarm", r#"{"action": "ACTIVATE", "alarm": "NOSPACE"}"#);
    assert_eq!(alarm["alarms"][0]["alarm"], "NOSPACE", "{alarm}");
    // The key of the holder, in base64.
    let holder = r#"{"key": "L3RjcGF1c2UvZGVmYXVsdC9wYXVzZS9ob2xkZXIvZGVwbG95"}"#;
    let holder = ask("/v3/kv/range", holder);
    let lease = format!("{{\"ID\": {}}}", holder["kvs"][0]["lease"]);
    let revoked = clock();
    ask("/v3/lease/revoke", &lease);
    run.0.wait_told("it is not certain any more that all hosts are paused, as the pause cannot be renewed in etcd; the command goes on");
    let told = clock();
    let resumed = fleet.resumed_at(1, "deploy");
    println!(
        "holder lost in a full etcd: told after {} ms, resumed after {} ms",
        millis(revoked, told),
        millis(revoked, resumed)
    );
    assert!(told + Duration::from_millis(800) < resumed, "too near to the resume");
    // P + 3τ of 12 s: 7.6 s, and so before its time would be over.
    assert!(resumed < revoked + Duration::from_secs(8) + ROOM, "too late");
    fleet.assert_quiet(began, resumed, |_host| true);
    run.0.wait_told("the pause has ended before the command: it was lifted");
    run.end();
}

#[test]
fn a_host_that_starts_without_etcd_serves_after_a_while_or_holds_until_it_is_there() {
    let Some(mut fleet) = Fleet::start(1, 1) else { return };
    let relays = [(); 2].map(|()| Relay::start(fleet.cluster.addr(0)));
    relays.iter().for_each(Relay::cut);
    let (serves, holds) = (1, 2);
    for (host, policy) in [(serves, "serve"), (holds, "hold")] {
        let builder = fleet.builder_at(host, &format!("http://{}", relays[host - 1].addr()));
        let policy = format!("--fleet-on-disconnect={policy}");
        let builder = builder.args([&*policy, "--fleet-start-wait=2s"]);
        fleet.hosts.push(Some(builder.start()));
    }
    let mut held = fleet.host(holds).connect_held();
    held.send(&[2]);
    let started = clock();
    let mut client = fleet.host(serves).connect();
    client.assert_echo(&[1]);
    let waited = millis(fleet.paused_at(serves, "starting"), fleet.resumed_at(serves, "starting"));
    println!("start without etcd: served after {waited} ms");
    assert!((1_990..2_000 + ROOM.as_millis()).contains(&waited), "{waited} ms");
    drop(client);
    assert!(fleet.control(holds).is_paused());
    fleet.assert_quiet(started, clock(), |host| host == 2);

    relays.iter().for_each(Relay::heal);
    assert_eq!(held.receive(1), [2]);
    drop(held);
    fleet.each(|_host, proxy| drop(proxy.wait_for_log("is a member of the fleet")));
    let (run, began) = fleet.run(0, "deploy", &["--wait=20s"]);
    let (ended, _lines) = run.end();
    fleet.assert_quiet(began, ended, |_host| true);
}

#[test]
fn a_member_that_stops_leaves_and_a_coordinator_ends_its_pause() {
    let Some(mut fleet) = Fleet::start(3, 1) else { return };
    let (run, began) = fleet.run(0, "deploy", &["--wait=20s"]);
    fleet.host(2).terminate();
    assert_eq!(fleet.hosts[2].as_mut().unwrap().exit_code(), 0);
    fleet.hosts[2] = None;
    let table = json(&fleet.control(1).get("/fleet/status"));
    assert!(row(&table, 2).is_null() && !row(&table, 1).is_null(), "{table}");

    let stopped = clock();
    fleet.host(0).terminate();
    let resumed = fleet.resumed_at(1, "deploy");
    println!("coordinator stopped: resumed after {} ms", millis(stopped, resumed));
    fleet.assert_quiet(began, resumed, |_host| true);
    assert!(resumed < stopped + ROOM);
    assert_eq!(fleet.hosts[0].as_mut().unwrap().exit_code(), 0);
    fleet.hosts[0] = None;
    run.0.wait_told("the command goes on");
    let table = json(&fleet.control(1).get("/fleet/status"));
    assert!(row(&table, 0).is_null() && table["pauses"] == serde_json::json!([]), "{table}");
    let (run, _began) = fleet.run(1, "alone", &["--wait=20s"]);
    run.end();
}

#[test]
fn a_paused_member_that_stops_serves_its_held_clients_first() {
    let Some(mut fleet) = Fleet::start(2, 1) else { return };
    let (run, began) = fleet.run(0, "deploy", &["--wait=20s"]);
    let mut held = fleet.host(1).connect_held();
    held.send(&[1]);
    fleet.host(1).terminate();
    fleet.host(1).wait_refused();
    let table = json(&fleet.control(0).get("/fleet/status"));
    assert_eq!(row(&table, 1)["state"], "idle", "{table}");
    let (ended, _lines) = run.end();
    fleet.assert_quiet(began, ended, |_host| true);
    assert_eq!(held.receive(1), [1]);
    drop(held);
    assert_eq!(fleet.hosts[1].as_mut().unwrap().exit_code(), 0);
    let table = json(&fleet.control(0).get("/fleet/status"));
    assert!(row(&table, 1).is_null(), "{table}");
}
