//! Members of etcd that die or stop: nobody resumes, and a command begins late at most.

use std::time::Duration;

use super::{Fleet, clock, millis};

/// Longest time for which the commit of a pause is waited for.
const COMMIT_MAX: Duration = Duration::from_secs(5);

const HOSTS: usize = 6;

#[test]
fn a_leader_that_dies_and_a_follower_that_stops_cost_no_pause() {
    let Some(mut fleet) = Fleet::start(HOSTS, 3) else { return };
    let clients = fleet.clients(0..HOSTS);
    let leader = fleet.cluster.leader();
    let follower = (leader + 1) % 3;
    fleet.cluster.stop(follower);
    let asked = clock();
    let (run, began) = fleet.run(0, "stopped", &["--wait=20s"]);
    let (ended, _lines) = run.end();
    let (first, last) = fleet.all_resumed("stopped");
    println!(
        "follower stopped: the command begins after {} ms, all resumed {} ms after its end",
        millis(asked, began),
        millis(ended, last),
    );
    fleet.assert_quiet(began, ended, |_host| true);
    assert!(first >= ended || millis(first, ended) == 0);
    fleet.cluster.go_on(follower);

    let (run, began) = fleet.run(1, "during", &["--wait=20s"]);
    let leader = fleet.cluster.leader();
    fleet.cluster.kill(leader);
    let killed = clock();
    let next = fleet.cluster.leader();
    println!("leader killed: another one after {} ms", millis(killed, clock()));
    assert_ne!(next, leader);
    // The session of a host and the holder of a pause would be gone after this time without a renewal.
    std::thread::sleep(super::TTL);
    fleet.each(|host, _proxy| assert_eq!(fleet.end_of(host, "during"), None, "host {host}"));
    let (ended, lines) = run.end();
    assert!(!lines.contains("not certain"), "{lines}");
    fleet.all_resumed("during");
    fleet.assert_quiet(began, ended, |_host| true);
    fleet.cluster.restart(leader);

    let leader = fleet.cluster.leader();
    let asked = clock();
    fleet.cluster.kill(leader);
    let (run, began) = fleet.run(2, "begin", &["--wait=20s"]);
    println!("leader killed before: the command begins after {} ms", millis(asked, began));
    assert!(began < asked + 2 * COMMIT_MAX);
    let (ended, _lines) = run.end();
    fleet.all_resumed("begin");
    fleet.assert_quiet(began, ended, |_host| true);
    println!("{} clients, none failed", clients.end());
}

#[test]
fn nobody_resumes_while_etcd_has_lost_its_majority() {
    let Some(mut fleet) = Fleet::start(HOSTS, 3) else { return };
    let clients = fleet.clients(0..HOSTS);
    let (run, began) = fleet.run(0, "deploy", &["--wait=20s"]);
    for member in [0, 1] {
        fleet.cluster.kill(member);
    }
    run.0.wait_told("it is not certain any more that all hosts are paused");
    let (ended, lines) = run.end();
    assert!(
        lines.contains("etcd does not answer, so that the end of the pause is not certain"),
        "{lines}"
    );
    fleet.each(|host, _proxy| assert_eq!(fleet.end_of(host, "deploy"), None, "host {host}"));
    let back = clock();
    fleet.cluster.restart_all(&[0, 1]);
    let (first, last) = fleet.all_resumed("deploy");
    println!(
        "majority lost for {} ms: resumed {} to {} ms after its return",
        millis(began, back),
        millis(back, first),
        millis(back, last),
    );
    fleet.assert_quiet(began, ended, |_host| true);
    fleet.assert_quiet(began, first, |_host| true);
    println!("{} clients, none failed", clients.end());
}
