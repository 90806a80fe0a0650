//! A command while all hosts are idle, and nothing fails.

use super::{Fleet, clock, millis};

/// Bound of each figure in milliseconds: ten times what an idle machine needs, as others work beside.
const SOON: u128 = 5_000;

#[test]
fn a_command_runs_while_twenty_hosts_are_idle_and_no_client_notices() {
    const HOSTS: usize = 20;
    let Some(fleet) = Fleet::start(HOSTS, 3) else { return };
    let clients = fleet.clients(0..HOSTS);
    let mut last = fleet.busy(7);

    let asked = clock();
    let exec = fleet.exec(3, "deploy", &["--wait=20s"]);
    let mut paused = Vec::new();
    fleet.each(|host, _proxy| paused.push(fleet.paused_at(host, "deploy")));
    let (first_paused, last_paused) = (paused.iter().min().unwrap(), paused.iter().max().unwrap());
    last.assert_echo(b"under way");
    assert!(exec.stdout.try_recv().is_err(), "the command runs though a host carries");
    let last_end = clock();
    last.finish();
    last.receive_all();

    let run = super::Run(exec);
    let began = run.told();
    fleet.server.wait_empty();
    fleet.each(|_host, proxy| {
        proxy.control().wait_status("a client is held", |status| status.held > 0);
    });
    let (ended, lines) = run.end();
    let (_first, resumed) = fleet.all_resumed("deploy");
    let served = clients.end();
    fleet.assert_quiet(began, ended, |_host| true);

    println!(
        "{HOSTS} hosts: paused {} to {} ms after the order, the command began {} ms after the last connection's end, all resumed {} ms after its end; {served} clients, none failed; {lines}",
        millis(asked, *first_paused),
        millis(asked, *last_paused),
        millis(last_end, began),
        millis(ended, resumed),
    );
    assert!(served >= HOSTS, "each host has served");
    assert!(millis(asked, *last_paused) < SOON);
    assert!(millis(last_end, began) < SOON);
    assert!(millis(ended, resumed) < SOON);
}
