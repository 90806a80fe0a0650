//! Several requests for an upgrade at once: each gets an outcome, and the count is right.

use std::{collections::BTreeSet, thread};

use rustix::process::{Pid, Signal, kill_process};

use super::{Scene, crash::FAULT};
use crate::harness::{Proxy, Response, Upstream, amount, echo, hangup, program, wait_until};

/// Starts a proxy whose taker stops right before it says `message`.
fn scene(upstream: &Upstream, message: &str) -> Scene {
    let fault = format!("taker:{message}:stop");
    Scene::set(Proxy::builder().upstream(upstream).followed().env(FAULT, &fault).start())
}

/// Waits until the taker is stopped, and signals it.
#[track_caller]
fn signal_taker(proxy: &Proxy, signal: Signal) {
    wait_until("the taker is stopped", || proxy.children() == ['T']);
    let taker = proxy.child_pids().pop().and_then(|pid| Pid::from_raw(pid.cast_signed()));
    kill_process(taker.unwrap(), signal).unwrap();
}

/// Asks for an upgrade by both signals, and waits until they are obeyed.
#[track_caller]
fn ask_by_signals(proxy: &Proxy) {
    for (signal, name) in
        [(hangup(), " asks for an upgrade"), (Signal::USR2, "SIGUSR2 asks for an upgrade")]
    {
        let before = proxy.log_count(name);
        proxy.signal(signal);
        wait_until("it is heard", || proxy.log_count(name) > before);
    }
    // They are obeyed in turn.
    let before = proxy.log_count("SIGUSR1 is ignored");
    proxy.signal(Signal::USR1);
    wait_until("they are obeyed", || proxy.log_count("SIGUSR1 is ignored") > before);
}

#[test]
fn commands_at_once_each_print_an_outcome() {
    let rounds = amount(4, 40);
    for is_followed in [true, false] {
        let upstream = Upstream::tcp(echo);
        let builder = Proxy::builder().upstream(&upstream);
        let builder = if is_followed { builder.followed() } else { builder };
        let scene = Scene::set(builder.start());
        let addr = scene.proxy.control().addr().to_string();
        let mut told = BTreeSet::new();
        for _round in 0..rounds {
            let call = || {
                let finished = program().args(["upgrade", "--control-addr", &addr]).run();
                assert_eq!((finished.code, &*finished.stderr), (0, ""), "{finished:?}");
                let pid = finished.stdout.split_once(", pid ").unwrap().1;
                pid.split_once(':').unwrap().0.parse::<u32>().unwrap()
            };
            thread::scope(|scope| {
                let calls = [(); 2].map(|()| scope.spawn(call));
                told.extend(calls.map(|call| call.join().unwrap()));
            });
        }
        let upgrades = usize::try_from(scene.proxy.control().status().upgrades).unwrap();
        wait_until("the log tells each", || scene.proxy.heirs().len() == upgrades);
        assert_eq!(scene.proxy.heirs().into_iter().collect::<BTreeSet<_>>(), told);
        // Each upgrade was asked for by one of them.
        let upgrades_of_them = if is_followed { told.len() } else { upgrades };
        assert_eq!(upgrades, upgrades_of_them);
        assert!((rounds..=2 * rounds).contains(&upgrades), "{upgrades} in {rounds} rounds");
        assert_eq!(told.len() == 1, !is_followed);
        scene.finish();
    }
}

#[test]
fn requests_for_one_upgrade_share_its_outcome_and_a_signal_meanwhile_is_another() {
    let upstream = Upstream::tcp(echo);
    let scene = scene(&upstream, "warm");
    let control = scene.proxy.control();
    let mut callers: Vec<_> = Vec::new();
    callers.push(control.send("POST", "/upgrade", &[]));
    wait_until("the taker is stopped", || scene.proxy.children() == ['T']);
    callers.push(control.send("POST", "/upgrade", &[]));
    // Answered behind it, so that it waits by now.
    assert_eq!(control.status().upgrades, 0);
    ask_by_signals(&scene.proxy);
    let giver = scene.proxy.pid();
    signal_taker(&scene.proxy, Signal::CONT);
    let answers = callers.iter_mut().map(Response::read).collect::<Vec<_>>();
    wait_until("the log tells it", || scene.proxy.heirs().len() == 1);
    let told = format!("\"pid\": {}", scene.proxy.pid());
    for answer in &answers {
        assert!(answer.status == 200 && answer.text().contains(&told), "{answer}");
    }
    assert_ne!(scene.proxy.pid(), giver);
    // Both signals came for the first process, and it has passed one of them on.
    signal_taker(&scene.proxy, Signal::CONT);
    wait_until("the log tells the second", || scene.proxy.heirs().len() == 2);
    assert_eq!(scene.proxy.control().status().upgrades, 2);
    assert!(scene.finish().children().is_empty());
}

#[test]
fn a_failure_is_told_to_all_that_came_before_it_and_a_signal_meanwhile_is_another_try() {
    let upstream = Upstream::tcp(echo);
    let scene = scene(&upstream, "warm");
    let control = scene.proxy.control();
    let mut callers: Vec<_> = Vec::new();
    callers.push(control.send("POST", "/upgrade", &[]));
    wait_until("the taker is stopped", || scene.proxy.children() == ['T']);
    callers.push(control.send("POST", "/upgrade", &[]));
    assert_eq!(control.status().upgrades, 0);
    ask_by_signals(&scene.proxy);
    signal_taker(&scene.proxy, Signal::KILL);
    for caller in &mut callers {
        let why = Response::read(caller).assert_error(409);
        assert!(why.contains("ended before it took over"), "{why}");
    }
    wait_until("the second is there", || scene.proxy.children() == ['T']);
    signal_taker(&scene.proxy, Signal::KILL);
    wait_until("it is told, too", || scene.proxy.log_count("not upgraded: ") == 2);
    assert_eq!(scene.proxy.control().status().upgrades, 0);
    let proxy = scene.finish();
    assert!(proxy.children().is_empty() && proxy.heirs().is_empty());
    assert_eq!(proxy.log_count("not upgraded: "), 2);
}

/// A request that comes while everything stands still is one to the process that goes on.
#[test]
fn a_request_in_the_standstill_is_another_upgrade() {
    let upstream = Upstream::tcp(echo);
    let scene = scene(&upstream, "ready");
    let control = scene.proxy.control();
    let mut first = control.send("POST", "/upgrade", &[]);
    wait_until("the taker is stopped", || scene.proxy.children() == ['T']);
    let mut second = control.send("POST", "/upgrade", &[]);
    signal_taker(&scene.proxy, Signal::CONT);
    assert_eq!(Response::read(&mut first).status, 200);
    wait_until("the log tells it", || scene.proxy.heirs().len() == 1);
    signal_taker(&scene.proxy, Signal::CONT);
    assert_eq!(Response::read(&mut second).status, 200);
    wait_until("the log tells the second", || scene.proxy.heirs().len() == 2);
    assert_eq!(scene.proxy.control().status().upgrades, 2);
    scene.finish();
}
