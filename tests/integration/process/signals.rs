//! Signals: those that stop, those that do nothing, and a log that may not grow.

use std::fs::{self, OpenOptions};

use rustix::process::Signal;

use crate::harness::{Family, Proxy, Upstream, echo, wait_until};

#[test]
fn sigquit_stops_in_good_order() {
    let upstream = Upstream::tcp(echo);
    let mut proxy = Proxy::to(&upstream);
    let mut client = proxy.connect();
    client.assert_echo(b"before");
    proxy.signal(Signal::QUIT);
    proxy.wait_for_log("SIGQUIT: stopping");
    proxy.wait_refused();
    client.assert_echo(b"still carried");
    drop(client);
    assert_eq!(proxy.exit_code(), 0);
}

#[test]
fn sigusr1_does_nothing_and_says_so() {
    let upstream = Upstream::tcp(echo);
    let mut proxy = Proxy::to(&upstream);
    let mut client = proxy.connect();
    proxy.signal(Signal::USR1);
    proxy.wait_for_log("SIGUSR1 is ignored: the log goes to standard error");
    client.assert_echo(b"still carried");
    proxy.connect().assert_echo(b"and so are new ones");
    drop(client);
    proxy.terminate();
    assert_eq!(proxy.exit_code(), 0);
}

#[test]
fn sigxfsz_does_nothing() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::to(&upstream);
    proxy.signal(Signal::XFSZ);
    proxy.connect().assert_echo(b"carried");
}

/// The file takes a part of a line and refuses the rest, until it is emptied, as `copytruncate` of logrotate does.
#[test]
fn a_log_file_at_its_limit_costs_lines_and_not_the_process() {
    // Eight blocks of the shell.
    const BYTES_MAX: usize = 4096;
    const PAUSES: usize = 60;

    let upstream = Upstream::tcp(echo);
    // Their addresses are known without the log.
    let mut proxy = Proxy::builder()
        .listen(Family::Unix)
        .control(Family::Unix)
        .upstream(&upstream)
        .log_level(None)
        .before("ulimit -S -f 8")
        .before("exec 2>>log")
        .launch();
    let path = proxy.dir().join("log");
    wait_until("it serves", || proxy.control().probe() == Some(200));
    let pause = |number| {
        let target = format!("/paused?name=a&reason=pause-{number}.");
        assert_eq!(proxy.control().put(&target).status, 201);
    };
    (0..PAUSES).for_each(pause);
    wait_until("the file is full", || fs::read(&path).unwrap().len() == BYTES_MAX);
    proxy.control().resume();
    proxy.connect().assert_echo(b"carried all the same");

    let old = fs::read_to_string(&path).unwrap();
    OpenOptions::new().write(true).open(&path).unwrap().set_len(0).unwrap();
    pause(PAUSES);
    proxy.control().resume();
    // Each resume has a line, too.
    let logged = PAUSES + 1 + 2;
    let (whole, torn) = old.rsplit_once('\n').unwrap();
    assert_ne!(torn, "");
    let count = |text: &str| text.lines().filter(|line| line.contains("pause-")).count();
    let mut new = String::new();
    wait_until("each line is there or counted", || {
        new = fs::read_to_string(&path).unwrap();
        let lost = new.lines().filter_map(|line| line.split_once("WARN log lines dropped: "));
        let lost: usize = lost.map(|(_, count)| count.parse::<usize>().unwrap()).sum();
        lost > 0 && count(whole) + count(&new) + lost == logged
    });
    // What stands behind the torn line begins on a line of its own.
    for line in whole.lines().chain(new.lines().skip(1)) {
        assert!(line.starts_with("20") && line.contains("Z "), "{line:?}");
    }
    proxy.terminate();
    assert_eq!(proxy.exit_code(), 0);
}
