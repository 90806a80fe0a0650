//! Upgrades of the members of a fleet.

use std::{fs, net::SocketAddr, path::PathBuf, time::Duration};

use super::{Fleet, Run, TTL, clock, millis, row};
use crate::harness::{
    Builder, End, Proxy,
    etcd::{Cluster, Relay},
};

/// Time from the loss of a host that holds until it resets what is left.
const GRACE: Duration = Duration::from_secs(2);

/// Time in which a host notices what has become of a request.
const ROOM: Duration = Duration::from_secs(3);

/// Settings of a host of the fleet, the last ones in `more`.
fn settings(endpoint: SocketAddr, more: &str) -> String {
    format!("fleet:\n  endpoints: [\"http://{endpoint}\"]\n  ttl: 5s\n{more}")
}

/// Returns the builder of a host with these settings, and their file, which an upgrade reads anew.
fn configured(fleet: &Fleet, settings: &str) -> (Builder, PathBuf) {
    let builder = Proxy::builder().upstream_at(fleet.server.addr());
    let file = builder.path("tcpause.yml");
    fs::write(&file, settings).unwrap();
    (builder.arg("--config").arg(&file), file)
}

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

#[test]
fn a_host_that_is_cut_off_is_reset_in_time_behind_an_upgrade() {
    let Some(mut fleet) = Fleet::start(1, 1) else { return };
    let relay = Relay::start(fleet.cluster.addr(0));
    let builder = fleet.builder_at(1, &format!("http://{}", relay.addr()));
    fleet.add(builder.args(["--fleet-on-disconnect=hold", "--grace-period", "2s"]));
    let mut busy = fleet.busy(1);
    let run = Run(fleet.exec(0, "deploy", &["--wait=20s"]));
    fleet.paused_at(1, "deploy");
    relay.cut();
    let cut = clock();
    fleet.host(1).upgrade();
    busy.assert_echo(b"goes on");
    assert_eq!(busy.receive_all().end, End::Reset);
    let reset = clock();
    println!("cut off and upgraded: reset {} ms behind the cut", millis(cut, reset));
    assert!(reset + TTL / 3 + Duration::from_secs(1) > cut + TTL + GRACE, "reset early");
    assert!(reset < cut + TTL + GRACE + ROOM, "reset late");
    let began = run.told();
    assert!(began > reset, "the command began before");
    run.end();
    let mut held = fleet.host(1).connect_held();
    held.send(&[1]);
    relay.heal();
    fleet.resumed_at(1, "deploy");
    fleet.resumed_at(1, "lost");
    assert_eq!(held.receive(1), [1]);
}

#[test]
fn no_upgrade_leaves_clients_held_for_ever() {
    let Some(mut fleet) = Fleet::empty(1) else { return };
    let relay = Relay::start(fleet.cluster.addr(0));
    let with = |more: &str| settings(relay.addr(), &format!("  host: h00\n{more}"));
    let hold = with("  on-disconnect: hold\n");
    let serve = with("  start-wait: 1s\n");
    let (builder, file) = configured(&fleet, &hold);
    fleet.add(builder);
    let host = fleet.host(0);
    let upgrade_to = |settings: &str| {
        fs::write(&file, settings).unwrap();
        host.upgrade();
    };
    relay.cut();
    host.wait_for_log("as \"fleet/lost\"");
    let mut client = host.connect_held();
    client.send(&[0]);
    upgrade_to(&hold);
    assert!(host.control().is_paused());
    upgrade_to(&serve);
    assert_eq!(client.receive(1), [0]);
    upgrade_to(&hold);
    drop(client);
    host.control().wait_status("it is lost anew", |status| status.paused);
    fs::write(&file, "fleet: [").unwrap();
    host.control().request("POST", "/upgrade", &[]).assert_error(409);
    let mut client = host.connect_held();
    client.send(&[0]);
    assert_eq!(host.log_count("tcpause fleet forget"), 0, "{}", host.log_so_far());
    upgrade_to("{}");
    assert_eq!(client.receive(1), [0]);
    assert_eq!(host.log_count("tcpause fleet forget h00"), 1, "{}", host.log_so_far());
    assert!(!host.control().is_paused());
}

#[test]
fn clients_that_wait_for_a_first_contact_wait_over_upgrades_and_not_for_ever() {
    let Some(mut fleet) = Fleet::empty(1) else { return };
    let relay = Relay::start(fleet.cluster.addr(0));
    relay.cut();
    let with = |more: &str| settings(relay.addr(), &format!("  host: h00\n{more}"));
    let hold = with("  on-disconnect: hold\n");
    let (builder, file) = configured(&fleet, &hold);
    fleet.hosts.push(Some(builder.start()));
    let host = fleet.host(0);
    let mut client = host.connect_held();
    client.send(&[0]);
    host.upgrade();
    assert_eq!(host.control().status().held, 1);
    fs::write(&file, with("  start-wait: 1s\n")).unwrap();
    host.upgrade();
    assert_eq!(client.receive(1), [0]);
    fs::write(&file, &hold).unwrap();
    host.upgrade();
    drop(client);
    let mut client = host.connect_held();
    client.send(&[0]);
    relay.heal();
    assert_eq!(client.receive(1), [0]);
}

#[test]
fn an_upgraded_host_leaves_no_member_behind_in_silence() {
    let Some(mut fleet) = Fleet::start(1, 1) else { return };
    let Some(other) = Cluster::start(1) else { return };
    let addr = fleet.cluster.addr(0);
    let (builder, file) = configured(&fleet, &settings(addr, "  host: h01\n"));
    fleet.add(builder);
    let upgrade_to = |settings: &str| {
        fs::write(&file, settings).unwrap();
        fleet.host(1).upgrade();
    };
    let (run, began) = fleet.run(0, "deploy", &["--wait=20s"]);
    upgrade_to(&settings(addr, "  host: h02\n"));
    fleet.wait_table(0, "the old name is gone", |table| row(table, 1).is_null());
    fleet.wait_table(0, "the new one is paused", |table| row(table, 2)["state"] == "idle");
    let (ended, _lines) = run.end();
    fleet.assert_quiet(began, ended, |_host| true);
    fleet.all_resumed("deploy");
    fleet.run(0, "again", &["--wait=20s"]).0.end();
    assert_eq!(fleet.host(1).log_count("tcpause fleet forget"), 0);

    upgrade_to(&settings(addr, "  host: h03\n  name: other\n"));
    fleet.host(1).wait_for_log("tcpause fleet forget h02 takes it out");
    fleet.wait_table(0, "it is lost", |table| row(table, 2)["state"] == "lost");
    upgrade_to(&settings(other.addr(0), "  host: h03\n  name: other\n"));
    fleet.host(1).wait_for_log("tcpause fleet forget h03 takes it out");
    assert_eq!(fleet.host(1).log_count("tcpause fleet forget"), 2, "each is told once");
}
