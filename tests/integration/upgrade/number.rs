//! The process keeps its number where nobody could be told to follow another: a child has everything for a moment.

use std::{
    fs,
    os::unix::{
        fs::{MetadataExt, PermissionsExt, symlink},
        net::UnixDatagram,
    },
    path::Path,
};

use rustix::process::{Pid, Signal, kill_process};

use super::{Scene, crash::FAULT};
use crate::harness::{Proxy, Upstream, binary, echo, hangup, wait_until};

/// Starts a proxy with a fault on the way back.
fn scene(upstream: &Upstream, fault: &str) -> (Scene, Pid) {
    let scene = Scene::set(Proxy::builder().upstream(upstream).env(FAULT, fault).start());
    let pid = Pid::from_raw(scene.proxy.pid().cast_signed()).unwrap();
    (scene, pid)
}

/// Begins an upgrade, and waits until the process that takes everything back stands still at its fault.
fn stop_on_the_way_back(scene: &Scene) {
    scene.proxy.signal(hangup());
    wait_until("it stands still", || scene.proxy.state() == 'T');
    assert_eq!(scene.proxy.children(), ['S'], "its child has everything");
}

/// Reads a line of the status of a process.
fn status_of(pid: Pid, name: &str) -> String {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim().to_owned()
}

#[test]
fn nothing_is_left_of_the_process_in_between() {
    let upstream = Upstream::tcp(echo);
    let builder = Proxy::builder().upstream(&upstream).env("INVOCATION_ID", "of a plain service");
    let scene = Scene::set(builder.start());
    // It is answered behind the caller that waits, which the API has accepted then.
    scene.proxy.control().status();
    let first = scene.proxy.descriptors();
    let pid = scene.proxy.pid();
    for _upgrade in 0..4 {
        scene.proxy.upgrade();
        wait_until("the child has ended", || scene.proxy.child_pids().is_empty());
        wait_until("all that was open is closed", || scene.proxy.descriptors() <= first);
    }
    assert_eq!(scene.proxy.log_count("upgraded: "), 0, "one line tells an upgrade");
    assert_eq!(scene.proxy.log_count("took over from process"), 4);
    let mut proxy = scene.finish();
    proxy.terminate();
    assert_eq!((proxy.exit_code(), proxy.pid()), (0, pid));
}

/// A signal that comes while the process runs the program anew waits for it.
#[test]
fn a_burst_of_signals_ends_nobody() {
    let upstream = Upstream::tcp(echo);
    let mut proxy = Proxy::to(&upstream);
    let mut client = proxy.connect();
    wait_until("it has been upgraded often", || {
        for signal in [hangup(), Signal::USR2, Signal::USR1] {
            proxy.signal(signal);
            client.assert_echo(b"carried");
        }
        proxy.log_count("took over from process") > 20
    });
    drop(client);
    proxy.terminate();
    assert_eq!(proxy.exit_code(), 0);
}

/// A stop that comes while the child has everything reaches that, and the number ends with it.
#[test]
fn a_stop_on_the_way_back_stops_the_child() {
    for message in ["hello", "warm", "ready"] {
        let upstream = Upstream::tcp(echo);
        let (scene, pid) = scene(&upstream, &format!("back-taker:{message}:stop"));
        stop_on_the_way_back(&scene);
        kill_process(pid, Signal::TERM).unwrap();
        kill_process(pid, Signal::CONT).unwrap();
        scene.proxy.wait_for_log("SIGTERM: stopping");
        let mut proxy = scene.finish();
        assert_eq!(proxy.exit_code(), 0, "{message}");
    }
}

/// A process that hangs on the way back leaves everything to its child, or goes on by itself once it has said so.
#[test]
fn a_process_that_hangs_on_the_way_back_becomes_a_guard() {
    for (message, is_back) in [("hello", false), ("ready", false), ("taken", true)] {
        let upstream = Upstream::tcp(echo);
        let (scene, pid) = scene(&upstream, &format!("back-taker:{message}:stop"));
        stop_on_the_way_back(&scene);
        let child = scene.proxy.child_pids()[0];
        if is_back {
            scene.proxy.wait_for_log("nothing moves until it does, or ends");
        } else {
            scene.proxy.wait_for_log("has taken over");
            assert_eq!(scene.proxy.pid(), child);
        }
        kill_process(pid, Signal::CONT).unwrap();
        scene.proxy.wait_for_log("has taken over");
        let status = scene.proxy.control().status();
        let answering = if is_back { pid.as_raw_pid().cast_unsigned() } else { child };
        assert_eq!((status.pid, status.upgrades), (answering, 1));
        let mut proxy = scene.finish();
        // The guard passes the stop on, and ends with its child.
        kill_process(pid, Signal::TERM).unwrap();
        assert_eq!(proxy.exit_code(), 0, "{message}");
    }
}

/// The number is gone, and its supervisor starts the service anew: the child makes room in good order.
#[test]
fn a_process_that_dies_on_the_way_back_stops_its_child() {
    for (message, action) in [("hello", "kill"), ("ready", "exit"), ("taken", "kill")] {
        let upstream = Upstream::tcp(echo);
        let (scene, _pid) = scene(&upstream, &format!("back-taker:{message}:{action}"));
        let answer = scene.proxy.control().request("POST", "/upgrade", &[]);
        // The stop or the end of the attempt comes first.
        assert!([409, 503].contains(&answer.status), "{message}: {answer:?}");
        scene.proxy.wait_for_log("SIGTERM: stopping");
        let mut proxy = scene.finish();
        assert_ne!(proxy.exit_code(), 0, "{message}");
        proxy.wait_for_log("stopped: every connection had ended");
    }
}

/// The giver dies before its child goes on: nobody is left whose number a supervisor could follow.
#[test]
fn a_child_whose_giver_is_killed_stops_in_good_order() {
    for message in ["ready", "taken"] {
        let upstream = Upstream::tcp(echo);
        let (scene, pid) = scene(&upstream, &format!("taker:{message}:stop"));
        scene.proxy.signal(hangup());
        wait_until("the taker is stopped", || scene.proxy.children() == ['T']);
        let taker = scene.proxy.child_pids().pop().and_then(|pid| Pid::from_raw(pid.cast_signed()));
        kill_process(pid, Signal::KILL).unwrap();
        kill_process(taker.unwrap(), Signal::CONT).unwrap();
        scene.proxy.wait_for_log("SIGTERM: stopping");
        scene.finish().wait_for_log("stopped: every connection had ended");
    }
}

/// A defect on the way back makes the process a guard: its end would be that of the service.
#[test]
fn a_process_that_panics_on_the_way_back_becomes_a_guard() {
    for message in ["hello", "warm", "ready", "taken"] {
        let upstream = Upstream::tcp(echo);
        let (scene, pid) = scene(&upstream, &format!("back-taker:{message}:panic"));
        let answer = scene.proxy.control().request("POST", "/upgrade", &[]);
        assert_eq!(answer.status, 200, "{message}: {answer:?}");
        assert_eq!(scene.proxy.control().status().upgrades, 1);
        let number = pid.as_raw_pid().cast_unsigned();
        wait_until("the log tells it", || scene.proxy.pid() != number);
        let mut proxy = scene.finish();
        kill_process(pid, Signal::TERM).unwrap();
        assert_eq!(proxy.exit_code(), 0, "{message}");
    }
}

/// The program at its place runs in the process, and not the old one again.
#[test]
fn the_new_program_runs_in_the_old_process() {
    let upstream = Upstream::tcp(echo);
    let copy = r#"cp "$0" tcpause && exec ./tcpause "$@""#;
    let builder = Proxy::builder().upstream(&upstream).log_level(Some("info")).before(copy);
    let scene = Scene::set(builder.start());
    let place = scene.proxy.dir().join("tcpause");
    let new = scene.proxy.dir().join("new");
    fs::copy(&place, &new).unwrap();
    fs::rename(&new, &place).unwrap();
    let pid = scene.proxy.pid();
    scene.proxy.upgrade();
    assert_eq!(scene.proxy.pid(), pid);
    let identity = |path: &Path| fs::metadata(path).map(|it| (it.dev(), it.ino())).unwrap();
    let running = format!("/proc/{pid}/exe");
    assert_eq!(identity(Path::new(&running)), identity(&place));
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap();
    assert_eq!(name, "tcpause\n");
    scene.finish();
}

/// A process below a guard stays below it, and the manager above never hears of another process.
#[test]
fn a_guarded_process_keeps_its_number_in_all_later_upgrades() {
    let upstream = Upstream::tcp(echo);
    let script = r#"#!/bin/bash
case $1 in --take-back) test -e refused || { touch refused; set -- "$1" "$2" --nonsense; } ;; esac
exec -a "$0" "$TCPAUSE_REAL" "$@"
"#;
    let builder = Proxy::builder().upstream(&upstream).file("tcpause", script);
    let path = builder.path("tcpause");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    let name = builder.path("notify");
    let manager = UnixDatagram::bind(&name).unwrap();
    manager.set_nonblocking(true).unwrap();
    symlink("/bin/sh", builder.path("tini")).unwrap();
    let proxy = builder
        .env("TCPAUSE_REAL", &binary().to_string_lossy())
        .env("NOTIFY_SOCKET", &name.to_string_lossy())
        .before(r#"exec ./tini -c './tcpause "$@"; exit $?' tini "$@""#)
        .start();
    let mut pids = Vec::new();
    for count in 1..=4 {
        let answer = proxy.control().request("POST", "/upgrade", &[]);
        assert_eq!(answer.status, 200, "{answer:?}");
        let status = proxy.control().status();
        assert_eq!(status.upgrades, count);
        pids.push(status.pid);
        proxy.connect().assert_echo(b"served");
    }
    assert!(pids.iter().all(|&pid| pid == pids[0]), "{pids:?}");
    let mut message = [0; 4096];
    while let Ok(length) = manager.recv(&mut message) {
        let told = String::from_utf8_lossy(&message[..length]);
        assert!(!told.contains("MAINPID"), "{told}");
    }
    let guard = Pid::from_raw(pids[0].cast_signed()).map(|pid| status_of(pid, "PPid:"));
    let guard = guard.and_then(|guard| Pid::from_raw(guard.parse().unwrap())).unwrap();
    kill_process(guard, Signal::KILL).unwrap();
    proxy.wait_for_log("stopped: every connection had ended");
}

/// A program that refuses the way back guards its child: signals, further upgrades and the exit code go through it.
#[test]
fn a_program_that_refuses_the_way_back_is_a_guard() {
    let upstream = Upstream::tcp(echo);
    let builder = Proxy::builder().upstream(&upstream);
    let script = r#"#!/bin/bash
case $1 in --take-back) set -- "$1" "$2" --nonsense ;; esac
exec -a "$0" "$TCPAUSE_REAL" "$@"
"#;
    let builder = builder.file("tcpause", script);
    let path = builder.path("tcpause");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    let builder = builder.env("TCPAUSE_REAL", &binary().to_string_lossy());
    let scene = Scene::set(builder.before(r#"exec ./tcpause "$@""#).start());
    let pid = Pid::from_raw(scene.proxy.pid().cast_signed()).unwrap();
    for count in 1..=2 {
        scene.proxy.upgrade();
        assert_eq!(scene.proxy.log_count("unknown option --nonsense"), count);
        assert_eq!(scene.proxy.control().status().upgrades, count as u64);
    }
    assert!(status_of(pid, "Threads:") == "1", "a guard has nothing else to do");
    assert_ne!(pid.as_raw_pid().cast_unsigned(), scene.proxy.pid());
    kill_process(pid, Signal::USR1).unwrap();
    scene.proxy.wait_for_log("SIGUSR1 is ignored");
    let mut proxy = scene.finish();
    kill_process(pid, Signal::TERM).unwrap();
    assert_eq!(proxy.exit_code(), 0);
}
