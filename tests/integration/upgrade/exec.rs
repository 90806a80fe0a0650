//! `tcpause exec` over upgrades in each of its phases: its pause moves, and ends with the command or with the caller.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use super::SetAtDrop;
use crate::{
    harness::{Proxy, hangup, in_namespace, wait_until},
    process::exec::{COMMAND, Exec, proxy},
    upstream::names::{self, Answer, NameServer, ONE},
};

/// Waits until exec is the one that has paused.
fn wait_paused(proxy: &Proxy) {
    wait_until("exec has paused", || proxy.control().is_paused());
}

#[test]
fn one_that_waits_for_idle_runs_its_command_behind_an_upgrade() {
    let (_upstream, proxy) = proxy();
    let mut client = proxy.connect();
    client.assert_echo(b"carried");
    let mut exec = Exec::start(proxy.control(), ["--ttl=1h", "--", "sh", "-c", COMMAND]);
    wait_paused(&proxy);
    proxy.upgrade();
    client.assert_echo(b"still carried");
    assert_eq!(exec.stdout.try_recv().ok(), None, "it is not idle");
    drop(client);
    exec.wait_started();
    assert!(proxy.control().is_paused());
    exec.end();
    assert_eq!(exec.code(), 7);
    assert!(!proxy.control().is_paused());
}

#[test]
fn one_that_is_killed_while_it_waits_leaves_no_pause_behind() {
    let (_upstream, proxy) = proxy();
    let mut client = proxy.connect();
    client.assert_echo(b"carried");
    let mut exec = Exec::start(proxy.control(), ["--ttl=1h", "--", "echo", "started"]);
    wait_paused(&proxy);
    let mut held = proxy.connect_held();
    proxy.upgrade();
    exec.kill();
    held.assert_echo(b"served");
    wait_until("it is not paused", || !proxy.control().is_paused());
    client.assert_echo(b"still carried");
}

/// The lease is far shorter than the command, and each renewal comes to another process.
#[test]
fn a_running_command_stays_paused_over_upgrades() {
    let (_upstream, proxy) = proxy();
    let mut exec = Exec::start(proxy.control(), ["--ttl=600ms", "--", "sh", "-c", COMMAND]);
    exec.wait_started();
    let mut held = proxy.connect_held();
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_millis(1_800) {
        proxy.upgrade();
        let status = proxy.control().status();
        assert!(status.paused && status.held == 1, "{status:?}");
        assert_eq!(status.leases.len(), 1);
    }
    exec.end();
    assert_eq!(exec.code(), 7);
    held.assert_echo(b"served");
    let told: Vec<_> = exec.stderr.iter().collect();
    assert!(told.len() == 1 && told[0].ends_with("; the command ended with 7"), "{told:?}");
    assert!(!proxy.control().is_paused());
}

#[test]
fn one_that_is_killed_while_its_command_runs_leaves_no_pause_behind() {
    let (_upstream, proxy) = proxy();
    let mut exec = Exec::running(proxy.control(), &[]);
    let mut held = proxy.connect_held();
    proxy.upgrade();
    exec.kill();
    held.assert_echo(b"served");
    wait_until("it is not paused", || !proxy.control().is_paused());
}

/// The look-up that precedes each resume takes its second, and the upgrade is asked for meanwhile.
#[test]
fn a_resume_under_way_ends_before_the_upgrade() {
    in_namespace("upgrade::exec::a_resume_under_way_ends_before_the_upgrade", || {
        let names = NameServer::start(Answer::Addresses(vec![ONE]));
        let _upstream = names::upstream(ONE);
        let proxy = names::proxy();
        let mut exec = Exec::running(proxy.control(), &[]);
        let mut held = proxy.connect_held();
        names.set(Answer::Silence);
        let asked = names.asked();
        exec.end();
        wait_until("the name is looked up", || names.asked() > asked);
        proxy.signal(hangup());
        names.set(Answer::Addresses(vec![ONE]));
        held.assert_echo(b"served");
        assert_eq!(exec.code(), 7);
        wait_until("the new process goes on", || proxy.heirs().len() == 1);
        assert!(!proxy.control().is_paused());
        held.assert_echo(b"and carried on");
        proxy.connect().assert_echo(b"and so are new ones");
    });
}

/// The moments of the upgrades are anywhere between the start of an exec and its end.
#[test]
fn upgrades_at_any_moment_of_an_exec_cost_nothing() {
    const EXECS: usize = 12;
    let (_upstream, proxy) = proxy();
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        let end = SetAtDrop(&is_over);
        let clients = scope.spawn(|| {
            let mut served = 0;
            while !is_over.load(Ordering::Relaxed) {
                proxy.connect().assert_echo(b"served");
                served += 1;
            }
            served
        });
        let execs = scope.spawn(|| {
            for _exec in 0..EXECS {
                let mut exec = Exec::start(proxy.control(), ["--wait=10s", "--", "true"]);
                assert_eq!(exec.code(), 0, "{:?}", exec.stderr.iter().collect::<Vec<_>>());
            }
        });
        while !execs.is_finished() {
            proxy.upgrade();
        }
        drop(end);
        println!("{} upgrades, {} clients", proxy.heirs().len(), clients.join().unwrap());
    });
    let status = proxy.control().status();
    assert_eq!((status.paused, status.failed, status.held), (false, 0, 0), "{status:?}");
}
