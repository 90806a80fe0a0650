//! Hosts that are cut off from etcd, and go on: bytes to it are swallowed, and neither side is told.

use std::{fs, path::PathBuf, thread, time::Duration};

use rustix::process::Signal;

use super::{Fleet, TTL, clock, millis, refused, time_of};
use crate::harness::{End, etcd::Relay, wait_until};

/// Exit code of an exec whose command may not begin now.
const EX_TEMPFAIL: i32 = 75;

/// Time in which a host notices what has become of a request.
const ROOM: Duration = Duration::from_secs(3);

/// Time from the last round of a host that holds until it resets what is left.
const GRACE: Duration = Duration::from_secs(2);

/// Difference of two clocks, and the rounding of times in text.
const SLACK: Duration = Duration::from_millis(50);

/// Shortest `fleet.keep-paused-for` with the shortest `fleet.ttl`.
const KEEP: Duration = Duration::from_secs(20);

/// Number of the host that is cut off.
const CUT: usize = 1;

/// Starts one host that reaches etcd, and one by a relay, with these options.
fn start(options: &[&str]) -> Option<(Fleet, Relay)> {
    let mut fleet = Fleet::start(1, 1)?;
    let relay = Relay::start(fleet.cluster.addr(0));
    let builder = fleet.builder_at(CUT, &format!("http://{}", relay.addr()));
    fleet.add(builder.args(options));
    Some((fleet, relay))
}

#[test]
fn a_host_that_is_cut_off_blocks_is_left_out_and_comes_back() {
    let Some((fleet, relay)) = start(&[]) else { return };
    let clients = fleet.clients([0, CUT]);
    relay.cut();
    fleet.wait_table(0, "it is lost", |table| super::row(table, CUT)["state"] == "lost");
    let (code, lines) = refused(fleet.exec(0, "blocked", &["--wait=1s"]));
    assert_eq!(code, EX_TEMPFAIL, "{lines}");
    assert!(lines.contains("hosts left: 1 (h01: lost for "), "{lines}");
    let (run, began) = fleet.run(0, "without", &["--wait=20s", "--without=h01"]);
    // It carries all the while, as was said by leaving it out.
    drop(fleet.busy(CUT));
    let (ended, _lines) = run.end();
    assert_ne!(fleet.server.carried(began, ended, |host| host == CUT), []);
    fleet.assert_quiet(began, ended, |host| host != CUT);
    relay.heal();
    let healed = clock();
    fleet.wait_table(0, "it is back", |table| super::row(table, CUT)["state"] == "serving");
    println!("cut off: back {} ms after the end of the cut", millis(healed, clock()));
    let (run, began) = fleet.run(0, "whole", &["--wait=20s"]);
    let (ended, _lines) = run.end();
    fleet.assert_quiet(began, ended, |_host| true);
    println!("{} clients, none failed", clients.end());
}

#[test]
fn a_silent_watch_and_a_compacted_history_cost_a_moment() {
    let Some((fleet, relay)) = start(&[]) else { return };
    let clients = fleet.clients([0, CUT]);
    relay.silence();
    let asked = clock();
    let (run, began) = fleet.run(0, "silent", &["--wait=20s"]);
    let paused = fleet.paused_at(CUT, "silent");
    println!("watch dead in silence: paused after {} ms", millis(asked, paused));
    assert!(paused < asked + TTL / 3 + ROOM, "too late");
    let (ended, _lines) = run.end();
    fleet.assert_quiet(began, ended, |_host| true);
    fleet.all_resumed("silent");

    let state = fleet.cluster.ask(0, "/v3/kv/range", "{\"key\": \"AA==\"}");
    let state: serde_json::Value = serde_json::from_str(&state).unwrap();
    let compact = format!("{{\"revision\": {}, \"physical\": true}}", state["header"]["revision"]);
    let done = fleet.cluster.ask(0, "/v3/kv/compaction", &compact);
    assert!(done.contains("header"), "{done}");
    let asked = clock();
    let (run, began) = fleet.run(0, "compacted", &["--wait=20s"]);
    println!("all revisions compacted: the command begins after {} ms", millis(asked, began));
    let (ended, _lines) = run.end();
    fleet.assert_quiet(began, ended, |_host| true);
    println!("{} clients, none failed", clients.end());
}

#[test]
fn a_host_that_holds_when_cut_off_need_not_be_waited_for() {
    let Some((fleet, relay)) = start(&["--fleet-on-disconnect=hold", "--grace-period", "2s"])
    else {
        return;
    };
    let mut busy = fleet.busy(CUT);
    let looked = clock();
    let status = super::json(&fleet.control(CUT).get("/status"));
    relay.cut();
    let cut = clock();
    let age = Duration::from_secs_f64(status["fleet"]["last_contact_seconds"].as_f64().unwrap());
    let asked = clock();
    let exec = fleet.exec(0, "deploy", &["--wait=20s"]);
    let paused = fleet.paused_at(0, "deploy");

    let held = time_of(&fleet.host(CUT).wait_for_log("as \"fleet/lost\""));
    let mut late = fleet.host(CUT).connect_held();
    late.send(&[1]);
    busy.assert_echo(b"still");
    assert_eq!(busy.receive_all().end, End::Reset);
    let reset = clock();
    let run = super::Run(exec);
    let began = run.told();
    fleet.assert_quiet(began, clock(), |_host| true);
    println!(
        "cut off with hold: last contact {age:?} before the cut, held {} ms and reset {} ms behind it, the command began {} ms behind the commit",
        millis(cut, held),
        millis(cut, reset),
        millis(paused, began),
    );
    assert!(held < cut + TTL + ROOM, "held late");
    assert!(held + age + SLACK > looked + TTL, "held early");
    assert!(reset < held + GRACE + ROOM, "reset late");
    // c + (T + G)(1 + 2ρ) + δ + 1 s at the earliest: the commit is before a host pauses, and behind the order. The
    // coordinator counts from its first look without a session, which ends a time to live behind the cut.
    let quiet = (TTL + GRACE) * 1_002 / 1_000 + Duration::from_secs(2);
    assert!(began >= asked + quiet, "too early");
    assert!(began < cut.max(paused) + TTL + quiet + ROOM, "too late");
    let (ended, _lines) = run.end();
    fleet.assert_quiet(began, ended, |_host| true);
    relay.heal();
    assert_eq!(late.receive(1), [1]);
    fleet.host(CUT).wait_for_log("it was by the fleet as \"fleet/lost\"");
}

#[test]
fn a_process_that_was_stopped_admits_nobody_behind_its_fence() {
    let Some((fleet, relay)) = start(&["--fleet-on-disconnect=hold"]) else { return };
    drop(fleet.busy(CUT));
    relay.cut();
    let cut = clock();
    let host = fleet.host(CUT);
    host.signal(Signal::STOP);
    let is_stopped = |task: PathBuf| {
        fs::read_to_string(task.join("stat")).is_ok_and(|stat| stat.contains(") T "))
    };
    wait_until("all threads are stopped", || host.threads_named("").into_iter().all(is_stopped));
    // The kernel takes them in.
    let mut clients = [(); 4].map(|()| fleet.host(CUT).connect());
    for client in &mut clients {
        client.send(&[1]);
    }
    thread::sleep((cut + TTL).saturating_sub(clock()));
    host.signal(Signal::CONT);
    host.wait_for_log("as \"fleet/lost\"");
    fleet.control(CUT).wait_status("all are held", |status| status.held == 4);
    fleet.assert_quiet(cut, clock(), |_host| true);
    relay.heal();
    for client in &mut clients {
        assert_eq!(client.receive(1), [1]);
    }
}

#[test]
fn a_paused_host_that_is_cut_off_stays_paused_for_so_long() {
    let Some((fleet, relay)) = start(&["--fleet-keep-paused-for=20s"]) else { return };
    let asked = clock();
    let (run, began) = fleet.run(0, "deploy", &["--wait=20s"]);
    relay.cut();
    let cut = clock();
    let mut held = fleet.host(CUT).connect_held();
    held.send(&[1]);
    fleet.wait_table(0, "it is lost", |table| super::row(table, CUT)["state"] == "lost");
    thread::sleep((asked + KEEP * 4 / 5).saturating_sub(clock()));
    assert!(fleet.control(CUT).is_paused());
    fleet.assert_quiet(began, clock(), |_host| true);
    let resumed = fleet.resumed_at(CUT, "deploy");
    assert_eq!(held.receive(1), [1]);
    println!("cut off while paused: resumed {} ms later", millis(cut, resumed));
    assert!(resumed + SLACK > asked + KEEP, "too early");
    assert!(resumed < cut + KEEP + ROOM, "too late");
    assert!(fleet.control(0).is_paused());
    drop(held);
    let (ended, _lines) = run.end();
    fleet.assert_quiet(began, ended, |host| host != CUT);
}
