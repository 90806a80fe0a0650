//! Upgrades of the members of a fleet.

use super::{Fleet, row};
use crate::harness::etcd::Relay;

#[test]
fn an_upgrade_is_refused_while_its_host_looks_after_a_pause() {
    let Some(fleet) = Fleet::start(2, 1) else { return };
    let (run, _began) = fleet.run(0, "deploy", &["--wait=20s"]);
    let refused = fleet.control(0).request("POST", "/upgrade", &[]).assert_error(409);
    assert!(refused.contains("\"deploy\""), "{refused}");
    assert!(fleet.control(0).is_paused());
    run.end();
    fleet.all_resumed("deploy");
    fleet.host(0).upgrade();
    let (run, _began) = fleet.run(0, "again", &["--wait=20s"]);
    run.end();
}

#[test]
fn an_upgraded_member_keeps_its_pause_and_its_session() {
    let Some(fleet) = Fleet::start(2, 1) else { return };
    let (run, began) = fleet.run(0, "deploy", &["--wait=20s"]);
    let mut held = fleet.host(1).connect_held();
    held.send(&[1]);
    fleet.host(1).upgrade();
    assert!(fleet.control(1).is_paused());
    assert_eq!(fleet.control(1).status().held, 1);
    fleet.wait_table(0, "it is a member", |table| row(table, 1)["state"] == "idle");
    let (ended, _lines) = run.end();
    assert_eq!(held.receive(1), [1]);
    drop(held);
    fleet.assert_quiet(began, ended, |_host| true);
    fleet.all_resumed("deploy");

    fleet.host(1).upgrade();
    let (run, _began) = fleet.run(1, "by-the-taker", &["--wait=20s"]);
    assert!(fleet.control(0).is_paused());
    run.end();
    fleet.all_resumed("by-the-taker");
}

#[test]
fn what_ends_during_an_upgrade_ends_in_the_taker() {
    let Some(mut fleet) = Fleet::start(1, 1) else { return };
    let relay = Relay::start(fleet.cluster.addr(0));
    let builder = fleet.builder_at(1, &format!("http://{}", relay.addr()));
    fleet.add(builder.arg("--fleet-on-disconnect=hold"));
    let (run, _began) = fleet.run(0, "deploy", &["--wait=20s"]);
    let mut held = fleet.host(1).connect_held();
    held.send(&[1]);
    relay.cut();
    fleet.host(1).wait_for_log("as \"fleet/lost\"");
    fleet.host(1).upgrade();
    run.end();
    assert!(fleet.control(1).is_paused());
    relay.heal();
    fleet.resumed_at(1, "deploy");
    fleet.resumed_at(1, "lost");
    assert_eq!(held.receive(1), [1]);
}
