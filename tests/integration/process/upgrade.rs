//! Upgrades as the program carries them out: refusals, which change nothing, and signals that come in between.

use std::{
    fs,
    io::Read,
    os::{
        fd::OwnedFd,
        unix::{
            fs::symlink,
            net::{UnixDatagram, UnixStream},
        },
    },
    path::Path,
    process::{Command, Stdio},
};

use rustix::process::{Pid, Signal, kill_process};

use crate::harness::{Proxy, Upstream, binary, echo, hangup, program, wait_until};

/// Process that takes over, and is no child of this one. It is killed when this is dropped.
pub(super) struct Heir(pub(super) Pid);

impl Heir {
    pub(super) fn signal(&self, signal: Signal) {
        kill_process(self.0, signal).expect("a process of ours");
    }
}

impl Drop for Heir {
    fn drop(&mut self) {
        // An error means that it has ended.
        kill_process(self.0, Signal::KILL).ok();
    }
}

/// Starts a proxy by the name `./tcpause`, a symlink in its working directory.
fn start_by_symlink(upstream: &Upstream) -> Proxy {
    let by_symlink = r#"ln -s "$0" tcpause && exec ./tcpause "$@""#;
    Proxy::builder().upstream(upstream).before(by_symlink).start()
}

/// Asks for an upgrade by a signal, and returns the line that tells why there is none.
fn refused(proxy: &Proxy, signal: Signal) -> String {
    let before = proxy.log_count("not upgraded: ");
    proxy.signal(signal);
    wait_until("it is refused", || proxy.log_count("not upgraded: ") > before);
    let log = proxy.log_so_far();
    log.lines().rfind(|line| line.contains("not upgraded: ")).unwrap().to_owned()
}

#[test]
fn a_program_that_cannot_take_over_is_refused_and_nothing_changes() {
    let upstream = Upstream::tcp(echo);
    let mut proxy = start_by_symlink(&upstream);
    let mut client = proxy.connect();
    let place = proxy.dir().join("tcpause");
    let text = proxy.dir().join("text");
    fs::write(&text, "no program").unwrap();
    for (target, told) in [
        ("/nonexistent", "cannot be run: No such file or directory"),
        (text.to_str().unwrap(), "cannot be run: Permission denied"),
        ("/", "cannot be run: Permission denied"),
        (
            "/bin/false",
            "ended with exit code 1 before it took over; it may be too old to take over",
        ),
        ("/bin/true", "ended with exit code 0 before it took over"),
    ] {
        fs::remove_file(&place).unwrap();
        symlink(target, &place).unwrap();
        for signal in [hangup(), Signal::USR2] {
            let line = refused(&proxy, signal);
            let expected = format!("not upgraded: the new program {} {told}", place.display());
            assert!(line.contains(" ERROR ") && line.contains(&expected), "{line}");
            client.assert_echo(b"still carried");
            proxy.connect().assert_echo(b"and so are new ones");
        }
    }
    drop(client);
    proxy.terminate();
    assert_eq!(proxy.exit_code(), 0);
}

/// A script that is put to the place of the program and has tcpause as a child: nobody could follow that one.
#[test]
fn a_program_that_is_another_process_than_the_one_that_was_started_is_refused() {
    let upstream = Upstream::tcp(echo);
    let proxy = start_by_symlink(&upstream);
    let mut client = proxy.connect();
    let place = proxy.dir().join("tcpause");
    fs::remove_file(&place).unwrap();
    let binary = binary().into_string().unwrap();
    let script =
        format!("#!/bin/bash\ngrep SigBlk /proc/self/status > mask\n{binary} \"$@\"\nexit $?\n");
    write_program(&place, &script);
    let line = refused(&proxy, hangup());
    assert!(line.contains("; write exec before the command in its script"), "{line}");
    client.assert_echo(b"still carried");
    let mask = fs::read_to_string(proxy.dir().join("mask")).unwrap();
    assert_eq!(mask, "SigBlk:\t0000000000000000\n", "no signal is kept from a new program");
}

/// Writes a program by another process: a child that another test starts meanwhile would keep a file of ours open, and an open
/// file cannot be run.
fn write_program(place: &Path, text: &str) {
    let write = r#"printf %s "$1" > "$0" && chmod 755 "$0""#;
    let mut shell = Command::new("/bin/sh");
    assert!(shell.arg("-c").arg(write).arg(place).arg(text).status().unwrap().success());
}

#[test]
fn a_configuration_that_is_broken_is_told_once_and_nothing_changes() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::builder().upstream(&upstream).file("tcpause.yml", "{}").start();
    let mut client = proxy.connect();
    for (text, told) in [
        ("prox: 1", "not upgraded: tcpause.yml:1:1: unknown key `prox`"),
        ("grace-period: 5", "not upgraded: tcpause.yml:1:15: "),
        ("control: {group: nosuchgroup}", "not upgraded: control.group: "),
        ("proxy: {reject-with: 'file:/nosuch'}", "not upgraded: proxy.reject-with: "),
    ] {
        fs::write(proxy.dir().join("tcpause.yml"), text).unwrap();
        let line = refused(&proxy, hangup());
        assert!(line.contains(told), "{line}");
        let (_, sentence) = line.split_once("not upgraded: ").unwrap();
        assert_eq!(proxy.log_count(sentence), 1, "{sentence}");
        client.assert_echo(b"still carried");
    }
}

#[test]
fn a_hangup_that_is_ignored_stays_ignored() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::builder().upstream(&upstream).before("trap '' HUP").start();
    proxy.signal(Signal::HUP);
    proxy.signal(Signal::USR1);
    proxy.wait_for_log("SIGUSR1 is ignored");
    assert_eq!(proxy.log_count("SIGHUP"), 0);
    proxy.connect().assert_echo(b"still carried");
}

#[test]
fn a_new_process_needs_a_channel() {
    let finished = program().arg("--take-over").run();
    assert_eq!(finished.code, 2, "{finished:?}");
    assert!(finished.stderr.contains("standard input is no UNIX stream socket"), "{finished:?}");
    assert_eq!(finished.stderr.lines().count(), 1, "{finished:?}");
    let (datagram, _other) = UnixDatagram::pair().unwrap();
    let stdin = Stdio::from(OwnedFd::from(datagram));
    let output = Command::new(binary()).arg("--take-over").stdin(stdin).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    // It is no option of its own: nobody is to write it.
    for args in [&["--proxy-addr=:1", "--take-over"][..], &["status", "--take-over"]] {
        let finished = program().args(args).run();
        assert!(finished.stderr.contains("unknown option --take-over"), "{finished:?}");
    }
}

/// A command line that the new program does not know is told through the channel, and printed nowhere.
#[test]
fn a_new_process_tells_the_giver_why_it_cannot_start() {
    for (args, told) in [
        (&["--nonsense"][..], "unknown option --nonsense"),
        (&["--config=/nonexistent"], "/nonexistent"),
        (&["status"], "--take-over takes no command"),
    ] {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let stdin = Stdio::from(OwnedFd::from(theirs));
        let mut command = Command::new(binary());
        command.arg("--take-over").args(args).stdin(stdin);
        let output = command.output().unwrap();
        drop(command);
        assert_eq!((output.status.code(), &*output.stderr), (Some(4), &b""[..]), "{args:?}");
        let mut heard = Vec::new();
        ours.read_to_end(&mut heard).unwrap();
        let heard = String::from_utf8_lossy(&heard);
        assert!(heard.contains(told), "{args:?}: {heard}");
    }
}

/// Begins an upgrade whose new process stops at a fault, and returns that process.
#[cfg(debug_assertions)]
fn stop_at_fault(proxy: &Proxy) -> Heir {
    proxy.signal(hangup());
    let mut found = None;
    wait_until("the new process stands still", || {
        found = fs::read_dir("/proc").unwrap().find_map(|entry| {
            let entry = entry.ok()?;
            let status = fs::read_to_string(entry.path().join("status")).ok()?;
            let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name));
            let is_child = field("PPid:")?.trim() == proxy.pid().to_string();
            (is_child && field("State:")?.trim().starts_with('T'))
                .then(|| entry.file_name().to_str()?.parse().ok())?
        });
        found.is_some()
    });
    Heir(found.and_then(Pid::from_raw).unwrap())
}

/// The faults are those of debug builds.
#[cfg(debug_assertions)]
#[test]
fn a_stop_reaches_the_process_that_goes_on() {
    let upstream = Upstream::tcp(echo);
    let start = |fault: &str| {
        Proxy::builder().upstream(&upstream).env("TCPAUSE_HANDOVER_AT", fault).start()
    };
    // The new process has not taken over: the old one stops, and the new one is killed.
    let mut proxy = start("taker:ready:stop");
    let mut client = proxy.connect();
    client.assert_echo(b"carried");
    let heir = stop_at_fault(&proxy);
    proxy.terminate();
    proxy.wait_for_log("SIGTERM: stopping");
    heir.signal(Signal::CONT);
    // An idle one may be gone before it can tell.
    proxy.wait_for_log("not upgraded: it is stopping");
    drop(client);
    assert_eq!(proxy.exit_code(), 0);
    assert_eq!(proxy.log_count("not upgraded: it is stopping"), 1);

    // The new process alone is to stop: the old one goes on.
    let proxy = start("taker:ready:stop");
    let mut client = proxy.connect();
    let heir = stop_at_fault(&proxy);
    heir.signal(Signal::TERM);
    heir.signal(Signal::CONT);
    proxy.wait_for_log("was ended by SIGTERM before it took over");
    client.assert_echo(b"still carried");

    // The old process has given its word: it passes the stop on.
    let mut proxy = start("taker:taken:stop");
    let heir = stop_at_fault(&proxy);
    proxy.terminate();
    proxy.wait_for_log("SIGTERM: stopping");
    heir.signal(Signal::CONT);
    assert_eq!(proxy.exit_code(), 0);
    proxy.wait_for_log("stopped: every connection had ended");
    assert_eq!((proxy.log_count("SIGTERM: stopping"), proxy.log_count(" stopped: ")), (2, 1));
}
