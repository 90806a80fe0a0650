//! Pauses of a fleet as operators see, name, leave out, force and end them.

use serde_json::Value;

use super::{Fleet, json, refused, row};
use crate::{
    harness::{End, program},
    process::exec::Exec,
};

/// Exit code of an exec whose command may not begin now.
const EX_TEMPFAIL: i32 = 75;
/// Exit code of an exec that cannot reach what it needs.
const EX_UNAVAILABLE: i32 = 69;

fn states(table: &Value) -> Vec<&str> {
    let rows = table["hosts"].as_array().unwrap();
    rows.iter().map(|row| row["state"].as_str().unwrap()).collect()
}

#[test]
fn pauses_of_two_names_add_up_and_one_name_holds_once() {
    let Some(fleet) = Fleet::start(3, 1) else { return };
    let table = fleet.wait_table(0, "all serve", |table| states(table) == ["serving"; 3]);
    assert_eq!(table["pauses"], Value::Array(Vec::new()), "{table}");

    let pause = fleet.control(0).put("/fleet/paused?name=first&wait=20s&reason=one&ttl=1m");
    assert_eq!(pause.status, 201, "{pause}");
    let taken = fleet.control(1).put("/fleet/paused?name=first");
    let sentence = taken.assert_error(409);
    assert!(sentence.contains("There is a pause \"first\" of the fleet, by "), "{sentence}");
    assert!(sentence.contains(" on h00, since 20"), "{sentence}");
    let (code, lines) = refused(fleet.exec(2, "first", &[]));
    assert!(code == EX_TEMPFAIL && lines.contains(" on h00"), "{code}: {lines}");
    let second = fleet.control(1).put("/fleet/paused?name=second&wait=20s&ttl=1m");
    assert_eq!(second.status, 201, "{second}");

    let table = fleet.wait_table(2, "all are idle", |table| states(table) == ["idle"; 3]);
    let names: Vec<&str> =
        table["pauses"].as_array().unwrap().iter().map(|it| it["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["first", "second"], "{table}");
    let resumed = fleet.control(2).delete("/fleet/paused?name=first");
    assert_eq!(resumed.status, 204, "{resumed}");
    fleet.all_resumed("first");
    fleet.each(|_host, proxy| assert!(proxy.control().is_paused()));

    let stays = fleet.control(2).delete("/paused");
    assert!(stays.assert_error(409).contains("fleet/second by "), "{stays}");
    let unknown = fleet.control(2).delete("/fleet/paused?name=first");
    unknown.assert_error(404);
    let addr = fleet.control(2).addr().to_string();
    let control = format!("--control-addr={addr}");
    let finished = program().args(["resume", "--fleet", "second", &control]).run();
    assert_eq!(finished.code, 0, "{finished:?}");
    fleet.all_resumed("second");
    fleet.each(|host, _proxy| drop(fleet.busy(host)));
}

#[test]
fn a_host_that_carries_is_named_left_out_or_reset() {
    let Some(fleet) = Fleet::start(2, 1) else { return };
    let mut busy = fleet.busy(1);
    let (code, lines) = refused(fleet.exec(0, "named", &["--wait=1s"]));
    assert_eq!(code, EX_TEMPFAIL, "{lines}");
    assert!(lines.contains("hosts left: 1 (h01: carries 1, the oldest for "), "{lines}");
    fleet.all_resumed("named");

    let (run, began) = fleet.run(0, "without", &["--wait=20s", "--without=h01"]);
    busy.assert_echo(&[1]);
    // Nobody waits for it, so it may be paused a moment later.
    fleet.control(1).wait_status("it is paused", |status| status.paused);
    let mut held = fleet.host(1).connect_held();
    let (ended, _lines) = run.end();
    held.assert_echo(&[1]);
    assert_eq!(fleet.server.carried(began, ended, |host| host == 1).len(), 1);

    drop(held);
    let (run, began) = fleet.run(0, "kill", &["--wait=1s", "--on-timeout=kill"]);
    assert_eq!(busy.receive_all().end, End::Reset);
    fleet.server.wait_empty();
    let (ended, _lines) = run.end();
    fleet.assert_quiet(began, ended, |_host| true);
    fleet.all_resumed("kill");
}

#[test]
fn an_operators_force_is_told_to_the_coordinator() {
    let Some(fleet) = Fleet::start(3, 1) else { return };
    let mut busy = fleet.busy(2);
    let exec: Exec = fleet.exec(0, "deploy", &["--wait=5s"]);
    fleet.paused_at(1, "deploy");
    let forced = fleet.control(1).delete("/paused?force=yes");
    assert_eq!(forced.status, 204, "{forced}");
    drop(fleet.busy(1));
    let table = fleet.wait_table(0, "a host is forced", |table| row(table, 1)["state"] == "forced");
    assert_eq!(row(&table, 1)["why"], "was resumed there", "{table}");
    busy.assert_echo(&[2]);
    let (code, lines) = refused(exec);
    assert_eq!(code, EX_TEMPFAIL, "{lines}");
    assert!(lines.contains("h01: was resumed by an operator; h02: carries 1"), "{lines}");
    // The next pause holds there too.
    drop(busy);
    let (mut run, _began) = fleet.run(0, "next", &["--wait=20s", "--if-lost=kill"]);
    assert!(fleet.control(1).is_paused());
    // One that comes while the command runs is told at once, as a loss.
    let forced = fleet.control(2).delete("/paused?force=yes");
    assert_eq!(forced.status, 204, "{forced}");
    run.0.wait_told("an operator has resumed hosts by force: h02; the command is sent SIGTERM");
    fleet.host(0).wait_for_log("has resumed the host h02 in the middle of the pause next");
    assert_eq!(run.0.code(), 128 + 15);
}

#[test]
fn without_etcd_clients_are_served_and_no_command_begins() {
    let Some(mut fleet) = Fleet::start(1, 1) else { return };
    fleet.cluster.kill(0);
    let (code, lines) = refused(fleet.exec(0, "deploy", &[]));
    assert_eq!(code, EX_UNAVAILABLE, "{lines}");
    assert!(lines.contains("cannot reach etcd"), "{lines}");
    let answer = fleet.control(0).get("/fleet/status");
    assert_eq!(json(&answer)["kind"], "unreachable", "{answer}");
    answer.assert_error(503);
    drop(fleet.busy(0));
    fleet.cluster.restart(0);
    let (run, began) = fleet.run(0, "again", &["--wait=20s"]);
    let (ended, lines) = run.end();
    fleet.assert_quiet(began, ended, |_host| true);
    println!("etcd back: {lines}");
}
