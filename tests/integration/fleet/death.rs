//! Hosts that die, and hosts that come back.

use std::time::Duration;

use super::{Fleet, LINGER, TTL, clock, millis, refused, row};

/// Exit code of an exec whose command may not begin now.
const EX_TEMPFAIL: i32 = 75;

/// Room for a machine on which others work too.
const ROOM: Duration = Duration::from_secs(5);

#[test]
fn all_resume_when_the_coordinators_host_is_killed() {
    let Some(mut fleet) = Fleet::start(4, 1) else { return };
    let clients = fleet.clients(1..4);
    let asked = clock();
    let (run, began) = fleet.run(0, "deploy", &["--wait=20s"]);
    let killed = clock();
    fleet.kill(0);
    run.0.wait_told("the proxy has gone away; the command goes on");
    let (first, last) = fleet.all_resumed("deploy");
    let served = clients.end();
    println!(
        "coordinator killed: resumed {} to {} ms later; {served} clients, none failed",
        millis(killed, first),
        millis(killed, last)
    );
    fleet.assert_quiet(began, first, |_host| true);
    // At the earliest as if it had never renewed; logs round down.
    assert!(first + Duration::from_millis(1) > asked + TTL + LINGER, "too early");
    assert!(last < killed + TTL + LINGER + ROOM);
}

#[test]
fn a_killed_host_blocks_until_it_is_forgotten_and_is_paused_when_it_comes_back() {
    let Some(mut fleet) = Fleet::start(3, 1) else { return };
    let clients = fleet.clients(0..2);
    let has_session = fleet.control(0).delete("/fleet/hosts?host=h02").assert_error(409);
    assert!(has_session.contains("The host h02 has a session"), "{has_session}");
    fleet.kill(2);
    fleet.wait_table(0, "it is lost", |table| row(table, 2)["state"] == "lost");
    let (code, lines) = refused(fleet.exec(0, "too-early", &["--wait=1s"]));
    assert_eq!(code, EX_TEMPFAIL, "{lines}");
    assert!(lines.contains("hosts left: 1 (h02: lost for "), "{lines}");
    let forgotten = fleet.control(1).delete("/fleet/hosts?host=h02");
    assert_eq!(forgotten.status, 204, "{forgotten}");
    let asked = clock();
    let (run, began) = fleet.run(0, "deploy", &["--wait=20s"]);
    println!("after forget: the command begins after {} ms", millis(asked, began));

    let builder = fleet.builder(2);
    fleet.hosts[2] = Some(builder.start());
    let mut held = fleet.host(2).connect_held();
    held.send(&[2]);
    let paused = fleet.paused_at(2, "deploy");
    let started = super::time_of(&fleet.host(2).wait_for_log("proxy listens on"));
    println!("a host that starts in the middle is paused {} ms later", millis(started, paused));
    fleet.wait_table(0, "it is idle", |table| row(table, 2)["state"] == "idle");
    let (ended, _lines) = run.end();
    assert_eq!(held.receive(1), [2]);
    drop(held);
    fleet.all_resumed("deploy");
    fleet.assert_quiet(began, ended, |_host| true);
    clients.end();
}

#[test]
fn a_host_that_dies_while_it_is_paused_is_paused_when_it_comes_back() {
    let Some(mut fleet) = Fleet::start(2, 1) else { return };
    let (run, began) = fleet.run(0, "deploy", &["--wait=20s"]);
    fleet.kill(1);
    // Its session is still there, and it is the same host.
    let builder = fleet.builder(1);
    fleet.hosts[1] = Some(builder.start());
    let mut held = fleet.host(1).connect_held();
    held.send(&[1]);
    fleet.paused_at(1, "deploy");
    let (ended, _lines) = run.end();
    assert_eq!(held.receive(1), [1]);
    fleet.assert_quiet(began, ended, |_host| true);
}
