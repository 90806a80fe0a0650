//! Either process dies, stops or panics at each message: exactly one goes on, and as long as one is left, no byte is lost.

use rustix::process::{Pid, Signal, kill_process};

use super::Cast;
use crate::harness::{Proxy, Received, Response, Upstream, echo, hangup, wait_until};

/// Variable by which a debug build is told of a fault.
pub(super) const FAULT: &str = "TCPAUSE_HANDOVER_AT";

/// Sets the scene for a fault in the hand-over.
fn cast(fault: &str) -> Cast {
    Cast::set(Proxy::builder().followed().env(FAULT, fault))
}

/// Has the taker fail, and checks that the giver goes on and says why.
#[track_caller]
fn the_giver_goes_on(message: &str, action: &str) {
    // The giver waits for a taker's first words for long, as nobody notices it.
    let is_long = action == "stop" && ["hello", "warm"].contains(&message);
    let mut cast = cast(&format!("taker:{message}:{action}"));
    if is_long {
        cast = cast.without_rejected();
    }
    let pid = cast.proxy.pid();
    let answer = Response::read(&mut cast.ask());
    assert_eq!(answer.status, 409, "{answer:?}");
    assert!(cast.proxy.child_pids().is_empty(), "the taker is left");
    let status = cast.proxy.control().status();
    assert_eq!((status.pid, status.upgrades), (pid, 0));
    let why = status.last_upgrade.unwrap().error.unwrap();
    assert!(!why.is_empty());
    wait_until("the log tells it once", || cast.proxy.log_count(&why) == 1);
    let (mut proxy, _upstream) = cast.finish();
    assert!(proxy.heirs().is_empty());
    proxy.terminate();
    assert_eq!(proxy.exit_code(), 0);
}

macro_rules! the_giver_goes_on {
    ($($name:ident: $message:literal, $action:literal;)*) => {
        $(#[test] fn $name() { the_giver_goes_on($message, $action); })*
    };
}

the_giver_goes_on! {
    a_taker_killed_before_its_first_word: "hello", "kill";
    a_taker_that_exits_before_its_first_word: "hello", "exit";
    a_taker_that_hangs_before_its_first_word: "hello", "stop";
    a_taker_that_panics_before_its_first_word: "hello", "panic";
    a_taker_killed_before_it_is_warm: "warm", "kill";
    a_taker_that_hangs_before_it_is_warm: "warm", "stop";
    a_taker_killed_before_it_is_ready: "ready", "kill";
    a_taker_that_exits_before_it_is_ready: "ready", "exit";
    a_taker_that_hangs_before_it_is_ready: "ready", "stop";
    a_taker_that_panics_before_it_is_ready: "ready", "panic";
    a_taker_killed_before_it_has_taken_over: "taken", "kill";
    a_taker_that_exits_before_it_has_taken_over: "taken", "exit";
    a_taker_that_hangs_before_it_has_taken_over: "taken", "stop";
    a_taker_that_panics_before_it_has_taken_over: "taken", "panic";
}

/// Kills the giver once the taker has everything: the taker goes on alone.
#[test]
fn a_giver_killed_before_its_last_word_leaves_all_to_the_taker() {
    let mut cast = cast("giver:go:kill");
    let before = cast.proxy.pid();
    cast.proxy.signal(hangup());
    cast.knock(|_proxy| false);
    wait_until("the taker goes on", || cast.proxy.heirs().len() == 1);
    assert_ne!(cast.proxy.pid(), before);
    let (mut proxy, _upstream) = cast.finish();
    assert_eq!(proxy.exit_code(), 128 + 9);
    proxy.connect().assert_echo(b"served");
}

/// Kills the giver once it has sent everything, while the taker rebuilds it or is about to say that it goes on.
#[test]
fn a_giver_killed_behind_the_end_leaves_all_to_the_taker() {
    for message in ["ready", "taken"] {
        let mut cast = cast(&format!("taker:{message}:stop"));
        let giver = Pid::from_raw(cast.proxy.pid().cast_signed()).unwrap();
        cast.proxy.signal(hangup());
        cast.knock(|_proxy| false);
        wait_until("the taker is stopped", || cast.proxy.children() == ['T']);
        let taker = cast.proxy.child_pids().pop().and_then(|pid| Pid::from_raw(pid.cast_signed()));
        kill_process(giver, Signal::KILL).unwrap();
        kill_process(taker.unwrap(), Signal::CONT).unwrap();
        wait_until("the taker goes on", || cast.proxy.heirs().len() == 1);
        let (proxy, _upstream) = cast.finish();
        proxy.connect().assert_echo(b"served");
    }
}

/// A defect of the giver costs the upgrade, and nothing else.
#[test]
fn a_giver_that_panics_goes_on() {
    for message in ["hello", "begin", "connections", "control", "rest", "end", "go"] {
        let mut cast = cast(&format!("giver:{message}:panic"));
        assert_eq!(Response::read(&mut cast.ask()).status, 409, "{message}");
        let (proxy, _upstream) = cast.finish();
        assert!(proxy.heirs().is_empty(), "{message}");
    }
}

/// Kills the giver while it still describes itself: all is lost, as by any kill, and no process is left.
#[test]
fn a_giver_killed_in_the_midst_takes_the_taker_with_it() {
    for message in ["hello", "begin", "listeners", "connections", "control", "rest", "end"] {
        let mut cast = cast(&format!("giver:{message}:kill")).without_rejected();
        cast.proxy.signal(hangup());
        assert_eq!(cast.proxy.exit_code(), 128 + 9, "{message}");
        assert!(cast.relayed.client.receive_all().bytes.is_empty(), "{message}");
        cast.proxy.wait_refused();
        assert!(cast.proxy.heirs().is_empty(), "{message}");
    }
}

/// A giver that hangs behind the end keeps the ends of connections from the peers, so the taker ends it.
#[test]
fn a_giver_that_does_not_end_is_killed() {
    let mut cast = cast("giver:left:stop");
    cast.proxy.signal(hangup());
    cast.knock(|_proxy| false);
    wait_until("the taker goes on", || cast.proxy.heirs().len() == 1);
    let (mut proxy, _upstream) = cast.finish();
    assert_eq!(proxy.exit_code(), 128 + 9);
    proxy.wait_for_log("does not end and is killed");
}

/// A giver that was stopped before its last word finds the taker gone, and goes on.
#[test]
fn a_giver_that_was_stopped_for_long_goes_on() {
    let mut cast = cast("giver:go:stop").without_rejected();
    let pid = Pid::from_raw(cast.proxy.pid().cast_signed()).unwrap();
    let mut caller = cast.ask();
    wait_until("it is stopped", || cast.proxy.state() == 'T');
    wait_until("the taker has given up", || cast.proxy.children() == ['Z']);
    kill_process(pid, Signal::CONT).unwrap();
    assert_eq!(Response::read(&mut caller).status, 409);
    let (proxy, _upstream) = cast.finish();
    assert!(proxy.heirs().is_empty());
}

/// A closed socket goes on telling of itself as long as the giver has a copy. Whoever has its place must not hear of it.
#[test]
fn sockets_that_a_giver_still_has_confuse_nobody() {
    let upstream = Upstream::tcp(echo);
    let builder = Proxy::builder().upstream(&upstream).followed();
    let proxy = builder.env(FAULT, "giver:left:stop").start();
    let mut clients: Vec<_> = (0..40).map(|_| proxy.connect()).collect();
    for client in &mut clients {
        client.assert_echo(b"by the giver");
    }
    proxy.signal(hangup());
    wait_until("the taker goes on", || proxy.heirs().len() == 1);
    for client in clients {
        client.finish();
        let mut next = proxy.connect();
        next.assert_echo(b"by the taker");
        client.reset();
        proxy.control().status();
        next.assert_echo(b"and it stays");
        next.finish();
        assert_eq!(next.receive_all(), Received::ended(b""));
    }
    assert_eq!(proxy.log_count("is killed"), 0, "the giver was there all the time");
}
