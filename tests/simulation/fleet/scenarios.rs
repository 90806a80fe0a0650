//! Single scenarios of the machines on the model of etcd, where a seed would not tell what was missed.

use std::time::Duration;

use crate::{
    etcd::Etcd,
    fleet::{
        clock::BootTime,
        coordinator::{Coordinator, CoordinatorConfig, EndedBy, Margins, Phase, Refusal, Wanted},
        keys::{KeySpace, MemberRecord, OnDisconnect},
        member::{Member, MemberConfig, Trouble},
        step::{Doing, Step},
        store::{Operation, Request, StoreError},
    },
    proxy::Proxy,
    world::micros,
};

const KEEP_FOR: Duration = Duration::from_secs(600);

fn seconds(count: u64) -> BootTime {
    BootTime(Duration::from_secs(count))
}

fn member(identity: &str, instance: &str) -> (Member, Proxy) {
    named("web-1", identity, instance)
}

fn named(host: &str, identity: &str, instance: &str) -> (Member, Proxy) {
    of_start("b", host, identity, instance)
}

fn of_start(boot: &str, host: &str, identity: &str, instance: &str) -> (Member, Proxy) {
    let record = MemberRecord {
        identity: identity.to_owned(),
        boot: boot.to_owned(),
        on_disconnect: OnDisconnect::Serve,
        fence: Duration::from_secs(15),
        grace: Duration::from_secs(5),
        version: "1".to_owned(),
    };
    let config = MemberConfig {
        keys: KeySpace::new("/t", "f"),
        host: host.to_owned(),
        instance: instance.to_owned(),
        record,
        start_wait: Duration::from_secs(30),
    };
    (Member::new(config, seconds(0)), Proxy::starting())
}

fn coordinator(id: &str, now: BootTime) -> Coordinator {
    let config = CoordinatorConfig {
        keys: KeySpace::new("/t", "f"),
        host: "web-1".to_owned(),
        id: id.to_owned(),
        began: 7,
        is_bound: true,
        margins: Margins::default(),
    };
    let ttl = Duration::from_secs(15);
    let wanted = Wanted { name: "db".to_owned(), by: id.to_owned(), ttl, ..Wanted::default() };
    Coordinator::new(config, wanted, now)
}

/// Drives a member until `until`, with a store that answers at once. Returns its deeds.
fn drive(
    (member, proxy): &mut (Member, Proxy),
    etcd: &mut Etcd,
    from: u64,
    until: u64,
) -> Vec<Doing> {
    let mut now = seconds(from);
    let mut deeds = Vec::new();
    while now < seconds(until) {
        etcd.expire(micros(now.0));
        match member.poll(now, &proxy.view()) {
            Step::Ask(request, _) => {
                let result = etcd.ask(micros(now.0), &request, 1);
                member.answered(now, now, result);
            }
            Step::Do(doing) => {
                proxy.carry_out(&doing, now, KEEP_FOR);
                member.done(now);
                deeds.push(doing);
            }
            Step::Wait(at) => now = at,
            Step::Over => break,
        }
    }
    deeds
}

/// Drives a coordinator until it waits.
fn coordinate(coordinator: &mut Coordinator, etcd: &mut Etcd, now: BootTime) {
    while let Step::Ask(request, _) = coordinator.poll(now) {
        let result = etcd.ask(micros(now.0), &request, 1);
        coordinator.answered(now, now, result);
    }
}

/// Returns a store, the one host of its fleet, and the coordinator of a pause that is idle after two seconds.
fn idle_at_two_seconds() -> (Etcd, (Member, Proxy), Coordinator) {
    let mut etcd = Etcd::new();
    let mut host = member("machine-1", "a");
    drive(&mut host, &mut etcd, 0, 1);
    let mut pause = coordinator("id-1", seconds(1));
    coordinate(&mut pause, &mut etcd, seconds(1));
    host.0.woken();
    drive(&mut host, &mut etcd, 1, 2);
    pause.woken();
    coordinate(&mut pause, &mut etcd, seconds(2));
    (etcd, host, pause)
}

#[test]
fn the_name_of_a_host_with_a_session_is_taken() {
    let mut etcd = Etcd::new();
    let mut first = member("machine-1", "first");
    drive(&mut first, &mut etcd, 0, 1);
    assert!(first.0.has_session() && !first.1.is_starting);

    let mut stranger = member("machine-2", "stranger");
    drive(&mut stranger, &mut etcd, 1, 2);
    assert_eq!(stranger.0.trouble(), Some(&Trouble::NameTaken("machine-1".to_owned())));
    assert!(!stranger.0.has_session() && stranger.1.is_starting);

    // The same machine has restarted.
    let mut restarted = member("machine-1", "restarted");
    drive(&mut restarted, &mut etcd, 2, 3);
    assert!(restarted.0.has_session() && !restarted.1.is_starting);
}

#[test]
fn a_copy_of_a_machine_is_told_apart_from_a_restart() {
    let mut etcd = Etcd::new();
    let mut first = of_start("b", "web-1", "machine-1", "first");
    drive(&mut first, &mut etcd, 0, 1);
    let mut copy = of_start("c", "web-1", "machine-1", "copy");
    drive(&mut copy, &mut etcd, 1, 10);
    let taken = "machine-1, a copy of this machine or this one before its last start";
    assert_eq!(copy.0.trouble(), Some(&Trouble::NameTaken(taken.to_owned())));
    assert!(copy.0.is_nameless());
    // Where nothing is known of the start, the process has restarted.
    let mut unknown = of_start("", "web-1", "machine-1", "unknown");
    drive(&mut unknown, &mut etcd, 10, 11);
    assert!(unknown.0.has_session());
    // The machine has started anew, and its session ends.
    let mut restarted = of_start("d", "web-1", "machine-1", "restarted");
    drive(&mut restarted, &mut etcd, 11, 40);
    assert!(restarted.0.has_session() && !restarted.1.is_starting);
}

#[test]
fn nothing_is_written_at_rest_and_counts_are_only_while_busy() {
    let mut etcd = Etcd::new();
    let mut host = member("machine-1", "a");
    drive(&mut host, &mut etcd, 0, 1);
    let revision = etcd.revision;
    drive(&mut host, &mut etcd, 1, 60);
    assert_eq!(etcd.revision, revision, "a host at rest writes");

    host.1.carried.insert(1);
    let mut pause = coordinator("id-1", seconds(60));
    coordinate(&mut pause, &mut etcd, seconds(60));
    host.0.woken();
    let revision = etcd.revision;
    drive(&mut host, &mut etcd, 60, 70);
    // Its acknowledgement, and counts once in between.
    assert_eq!(etcd.revision - revision, 2);
    coordinate(&mut pause, &mut etcd, seconds(70));
    let Phase::Waiting(waiting_for) = pause.phase() else { panic!("{:?}", pause.phase()) };
    assert_eq!(waiting_for[0].host, "web-1");
    assert_eq!(waiting_for[0].why, "carries 1, the oldest for 1 s");

    host.1.carried.clear();
    let revision = etcd.revision;
    drive(&mut host, &mut etcd, 70, 74);
    coordinate(&mut pause, &mut etcd, seconds(74));
    assert_eq!(pause.phase(), &Phase::Idle);
    drive(&mut host, &mut etcd, 74, 80);
    assert_eq!(etcd.revision - revision, 1, "a host that is paused and idle writes once");
}

#[test]
fn paused_and_idle_at_once_is_one_write() {
    let mut etcd = Etcd::new();
    let mut host = member("machine-1", "a");
    drive(&mut host, &mut etcd, 0, 1);
    let mut pause = coordinator("id-1", seconds(1));
    coordinate(&mut pause, &mut etcd, seconds(1));
    host.0.woken();
    let revision = etcd.revision;
    drive(&mut host, &mut etcd, 1, 3);
    assert_eq!(etcd.revision - revision, 1);
}

#[test]
fn a_force_in_the_middle_of_a_command_is_noticed_once() {
    let (mut etcd, mut host, mut pause) = idle_at_two_seconds();
    assert_eq!((pause.phase(), pause.forced()), (&Phase::Idle, &[][..]));

    host.1.leases.clear();
    host.1.forced.insert("db".to_owned());
    host.0.woken();
    drive(&mut host, &mut etcd, 2, 3);
    for _ in 0..2 {
        pause.woken();
        coordinate(&mut pause, &mut etcd, seconds(3));
        assert_eq!((pause.phase(), pause.forced()), (&Phase::Idle, &["web-1".to_owned()][..]));
    }
}

#[test]
fn the_end_of_a_lease_that_fails_is_tried_again_for_a_while() {
    for (fails, leases) in [(1, 0), (usize::MAX, 1)] {
        let mut etcd = Etcd::new();
        let mut pause = coordinator("id-1", seconds(1));
        coordinate(&mut pause, &mut etcd, seconds(1));
        pause.end(seconds(2));
        let (mut now, mut tries) = (seconds(2), 0);
        while let Step::Ask(request, timeout) = pause.poll(now) {
            tries += usize::from(matches!(request, Request::Revoke { .. }));
            if (1..=fails).contains(&tries) {
                now = now + timeout;
                pause.answered(now, now, Err(StoreError::TimedOut("silence".to_owned())));
            } else {
                let result = etcd.ask(micros(now.0), &request, 1);
                pause.answered(now, now, result);
            }
        }
        let phase = Phase::Ended { by: EndedBy::Caller, still_paused: Vec::new() };
        assert_eq!((pause.phase(), tries), (&phase, 2));
        assert_eq!(etcd.any_lease(0).iter().count(), leases);
        assert!(now <= seconds(5), "{now:?}");
    }
}

/// Drives a coordinator until it waits, with a store that takes no more data.
fn coordinate_full(coordinator: &mut Coordinator, etcd: &mut Etcd, now: BootTime) {
    while let Step::Ask(request, _) = coordinator.poll(now) {
        let puts = |it: &Operation| matches!(it, Operation::Put { .. });
        let is_refused = match &request {
            Request::Grant { .. } => true,
            Request::Transact(request) => request.then.iter().any(puts),
            _ => false,
        };
        let full = || Err(StoreError::Full("no space".to_owned()));
        let result = if is_refused { full() } else { etcd.ask(micros(now.0), &request, 1) };
        coordinator.answered(now, now, result);
    }
}

#[test]
fn a_pause_that_a_full_store_lets_end_is_told_as_lost_before() {
    let (mut etcd, mut host, mut pause) = idle_at_two_seconds();
    assert_eq!((pause.phase(), pause.lost_at()), (&Phase::Idle, seconds(1 + 15 - 1)));

    let lease = etcd.holder("db").and_then(|holder| holder.lease).expect("a holder");
    etcd.revoke(micros(seconds(3).0), lease);
    host.0.woken();
    let mut now = 3;
    while etcd.record("db").is_some() {
        pause.woken();
        coordinate_full(&mut pause, &mut etcd, seconds(now));
        drive(&mut host, &mut etcd, now, now + 1);
        now += 1;
    }
    // A linger of 9.5 s behind the revocation, and behind the last look that has found the holder.
    assert_eq!(now, 3 + 10);
    assert_eq!(pause.lost_at(), seconds(2) + Duration::from_millis(8_500));
    pause.woken();
    coordinate_full(&mut pause, &mut etcd, seconds(now));
    let phase = Phase::Ended { by: EndedBy::Others, still_paused: Vec::new() };
    assert!(pause.phase() == &phase || pause.phase() == &Phase::Ending, "{:?}", pause.phase());
}

#[test]
fn a_second_pause_of_a_name_is_told_whose_it_is() {
    let mut etcd = Etcd::new();
    let mut host = member("machine-1", "a");
    drive(&mut host, &mut etcd, 0, 1);
    let mut first = coordinator("id-1", seconds(1));
    coordinate(&mut first, &mut etcd, seconds(1));
    let mut second = coordinator("id-2", seconds(1));
    coordinate(&mut second, &mut etcd, seconds(1));
    let refusal = Refusal::Taken { by: "id-1".to_owned(), began: 7 };
    assert_eq!(second.phase(), &Phase::Refused(refusal));

    // An operator ends the first.
    etcd.resume("db");
    first.woken();
    coordinate(&mut first, &mut etcd, seconds(2));
    let phase = Phase::Ended { by: EndedBy::Others, still_paused: Vec::new() };
    assert_eq!(first.phase(), &phase);
}

#[test]
fn a_restored_store_may_have_the_record_of_another_at_the_same_revision() {
    let mut etcd = Etcd::new();
    let backup = etcd.clone();
    let mut first = coordinator("id-1", seconds(1));
    coordinate(&mut first, &mut etcd, seconds(1));
    etcd.restore(&backup, micros(seconds(2).0), false);
    let mut second = coordinator("id-2", seconds(2));
    coordinate(&mut second, &mut etcd, seconds(2));

    // Its lease is not there any more, so that it puts its record anew before it has looked.
    coordinate(&mut first, &mut etcd, seconds(7));
    let phase = Phase::Ended { by: EndedBy::Others, still_paused: Vec::new() };
    assert_eq!(first.phase(), &phase);
    assert_eq!(etcd.record("db").map(|record| record.id).as_deref(), Some("id-2"));
}

#[test]
fn a_fleet_without_this_host_is_not_idle() {
    let mut etcd = Etcd::new();
    let mut pause = coordinator("id-1", seconds(1));
    coordinate(&mut pause, &mut etcd, seconds(1));
    let Phase::Waiting(waiting_for) = pause.phase() else { panic!("{:?}", pause.phase()) };
    assert_eq!(waiting_for[0].why, "has not joined");
}

#[test]
fn a_pause_goes_on_in_another_process_and_one_that_was_forced_does_not() {
    let mut etcd = Etcd::new();
    let mut host = member("machine-1", "giver");
    drive(&mut host, &mut etcd, 0, 1);
    let mut pause = coordinator("id-1", seconds(1));
    coordinate(&mut pause, &mut etcd, seconds(1));
    pause.kill();
    host.0.woken();
    drive(&mut host, &mut etcd, 1, 2);
    coordinate(&mut pause, &mut etcd, seconds(2));
    assert_eq!(pause.phase(), &Phase::Idle);
    host.0.woken();
    drive(&mut host, &mut etcd, 2, 3);
    for is_forced in [false, true] {
        if is_forced {
            host.1.leases.clear();
            host.1.forced.insert("db".to_owned());
        }
        let mut taker = member("machine-1", "taker");
        taker.1 = host.1;
        taker.0.go_on(host.0.describe(), &taker.1.view());
        let before = etcd.revision;
        let deeds = drive(&mut taker, &mut etcd, 3, 4);
        let is_renewal =
            |doing: &Doing| matches!(doing, Doing::Renew { .. } | Doing::FenceAt(None));
        assert!(deeds.iter().all(is_renewal), "{deeds:?}");
        assert_eq!(etcd.revision - before, 1, "a join tells of the pause, too");
        host = taker;
    }
    pause.end(seconds(4));
    coordinate(&mut pause, &mut etcd, seconds(4));
    let mut taker = member("machine-1", "last");
    taker.1 = host.1;
    taker.0.go_on(host.0.describe(), &taker.1.view());
    let deeds = drive(&mut taker, &mut etcd, 4, 5);
    assert!(deeds.contains(&Doing::Resume { name: "db".to_owned() }), "{deeds:?}");
}

#[test]
fn a_host_with_another_name_joins_and_then_takes_its_old_one_out() {
    let mut etcd = Etcd::new();
    let mut giver = member("machine-1", "giver");
    drive(&mut giver, &mut etcd, 0, 1);
    let mut taker = named("web-2", "machine-1", "taker");
    taker.1 = giver.1;
    taker.0.go_on(giver.0.describe(), &taker.1.view());
    let keys = KeySpace::new("/t", "f");
    let (old, new) = (keys.member("web-1"), keys.member("web-2"));
    while etcd.keys.contains_key(&old) {
        match taker.0.poll(seconds(1), &taker.1.view()) {
            Step::Ask(request, _) => {
                let result = etcd.ask(micros(seconds(1).0), &request, 1);
                taker.0.answered(seconds(1), seconds(1), result);
            }
            Step::Do(_) => taker.0.done(seconds(1)),
            step => panic!("{step:?}"),
        }
        assert!(etcd.keys.contains_key(&old) || etcd.keys.contains_key(&new), "a gap");
    }
    assert!(etcd.keys.contains_key(&new) && !etcd.keys.contains_key(&keys.state("web-1")));
    assert_eq!(taker.0.take_stranded(), []);

    // Another host has the name by now, so that it stays.
    let mut third = named("web-3", "machine-1", "third");
    third.1 = taker.1;
    third.0.go_on(taker.0.describe(), &third.1.view());
    let mut stranger = named("web-2", "machine-2", "stranger");
    etcd.keys.remove(&keys.state("web-2"));
    drive(&mut stranger, &mut etcd, 1, 2);
    drive(&mut third, &mut etcd, 2, 3);
    assert!(third.0.has_session() && stranger.0.has_session());
    assert!(etcd.keys.contains_key(&new) && etcd.keys.contains_key(&keys.state("web-2")));
}

#[test]
fn what_a_host_leaves_in_another_fleet_or_store_is_told_once() {
    let mut etcd = Etcd::new();
    let mut giver = member("machine-1", "giver");
    drive(&mut giver, &mut etcd, 0, 1);
    let mut elsewhere = Etcd::new();
    elsewhere.cluster += 1;
    let mut taker = named("web-2", "machine-1", "taker");
    taker.0.go_on(giver.0.describe(), &taker.1.view());
    assert_eq!(taker.0.take_stranded(), []);
    drive(&mut taker, &mut elsewhere, 1, 2);
    let stranded = taker.0.take_stranded();
    let keys: Vec<_> = stranded.iter().map(|it| (it.host.as_str(), it.key.as_str())).collect();
    assert_eq!(keys, [("web-1", "/t/f/member/web-1")]);
    let mut next = named("web-2", "machine-1", "next");
    next.0.go_on(taker.0.describe(), &next.1.view());
    drive(&mut next, &mut elsewhere, 2, 3);
    assert_eq!(next.0.take_stranded(), []);
}
