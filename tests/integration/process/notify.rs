//! Notifications for the service manager, whose part the test plays.

use std::{
    fs,
    io::ErrorKind,
    os::{
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixDatagram},
    },
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use super::upgrade::Heir;
use crate::harness::{Family, PATIENCE, Proxy, Upstream, echo, hangup};

/// A manager that was told nothing for so long will not be told more.
const SILENCE: Duration = Duration::from_millis(300);

/// Manager that listens at `name`, as `NOTIFY_SOCKET` has it.
struct Manager {
    socket: UnixDatagram,
    name: String,
    _dir: TempDir,
}

impl Manager {
    fn new(family: Family) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify").display().to_string();
        let (socket, name) = if family == Family::Abstract {
            let address = SocketAddr::from_abstract_name(&path).unwrap();
            (UnixDatagram::bind_addr(&address), format!("@{path}"))
        } else {
            (UnixDatagram::bind(&path), path)
        };
        let socket = socket.unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        Self { socket, name, _dir: dir }
    }

    /// Returns the next message.
    fn next(&self) -> String {
        let mut buffer = [0; 4096];
        let length = self.socket.recv(&mut buffer).expect("a message in time");
        String::from_utf8(buffer[..length].to_vec()).unwrap()
    }

    /// Returns the first message that begins with `start`, and passes over others.
    fn wait_for(&self, start: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let message = self.next();
            if message.starts_with(start) {
                return message;
            }
            assert!(Instant::now() < deadline, "no {start} in time");
        }
    }

    /// Waits until the state is that of a proxy without waiting clients.
    fn wait_for_running(&self) {
        while self.wait_for("STATUS=running") != "STATUS=running" {}
    }

    /// Checks that no message comes for a while.
    fn assert_silent(&self) {
        self.socket.set_read_timeout(Some(SILENCE)).unwrap();
        let error = self.socket.recv(&mut [0; 64]).expect_err("silence");
        assert_eq!(error.kind(), ErrorKind::WouldBlock);
        self.socket.set_read_timeout(Some(PATIENCE)).unwrap();
    }
}

/// Starts a proxy that notifies `manager`, and does not wait until it listens.
fn launch(manager: &Manager, upstream: &Upstream, envs: &[(&str, &str)]) -> Proxy {
    let builder = Proxy::builder()
        .upstream(upstream)
        .listen(Family::Unix)
        .control(Family::Unix)
        .grace_period(Some("7s"))
        .env("NOTIFY_SOCKET", &manager.name);
    envs.iter().fold(builder, |builder, (name, value)| builder.env(name, value)).launch()
}

/// Returns the number of times that the thread has slept so far.
fn wakes(proxy: &Proxy) -> String {
    let status = fs::read_to_string(proxy.threads_named("systemd")[0].join("status")).unwrap();
    status.lines().find(|line| line.starts_with("voluntary")).unwrap().to_owned()
}

#[test]
fn the_manager_is_told_of_the_start_the_pauses_and_the_stop() {
    let upstream = Upstream::tcp(echo);
    for family in [Family::Unix, Family::Abstract] {
        let manager = Manager::new(family);
        let mut proxy = launch(&manager, &upstream, &[]);
        assert_eq!(manager.next(), "READY=1");
        // From that moment on it serves, and so does the API.
        proxy.connect().assert_echo(b"served");
        assert!(!proxy.control().is_paused());
        manager.wait_for_running();
        // Nothing ticks while nothing changes.
        manager.assert_silent();
        let before = wakes(&proxy);
        manager.assert_silent();
        assert_eq!(wakes(&proxy), before);
        proxy.control().pause();
        manager.wait_for("STATUS=paused");
        let told = Instant::now();
        proxy.control().resume();
        manager.wait_for_running();
        let interval = told.elapsed();
        assert!(interval > Duration::from_millis(900), "two within {interval:?}");
        manager.assert_silent();
        proxy.terminate();
        // The grace period, and five seconds for the end.
        assert_eq!(manager.wait_for("STOPPING=1"), "STOPPING=1\nEXTEND_TIMEOUT_USEC=12000000");
        assert_eq!(proxy.exit_code(), 0);
    }
}

#[test]
fn the_manager_is_told_of_an_outage() {
    let manager = Manager::new(Family::Unix);
    let reserved = crate::harness::reserve();
    let proxy = Proxy::builder()
        .upstream_at(&reserved.addr())
        .arg("--upstream-retry-for=1h")
        .env("NOTIFY_SOCKET", &manager.name)
        .start();
    manager.wait_for_running();
    let mut client = proxy.connect();
    let told = manager.wait_for("STATUS=running, but the upstream is away for ");
    assert!(told.contains("refused"), "{told}");
    let _upstream = Upstream::on(reserved.listen(), echo);
    client.assert_echo(b"served");
    manager.wait_for_running();
    manager.assert_silent();
}

#[test]
fn a_start_that_fails_is_not_ready() {
    let manager = Manager::new(Family::Unix);
    let upstream = Upstream::tcp(echo);
    let failed = Proxy::builder()
        .upstream(&upstream)
        .arg("--proxy-addr=192.0.2.1:1")
        .env("NOTIFY_SOCKET", &manager.name)
        .fail();
    assert_eq!(failed.code, 1, "{failed:?}");
    manager.assert_silent();
}

#[test]
fn the_watchdog_is_fed_at_half_of_its_time() {
    const BEATS: u32 = 5;
    const INTERVAL: Duration = Duration::from_millis(100);

    let manager = Manager::new(Family::Unix);
    let upstream = Upstream::tcp(echo);
    let proxy = launch(&manager, &upstream, &[("WATCHDOG_USEC", "200000")]);
    manager.wait_for("READY=1");
    let begin = Instant::now();
    for _beat in 0..BEATS {
        manager.wait_for("WATCHDOG=1");
    }
    let passed = begin.elapsed();
    assert!(passed > INTERVAL * (BEATS - 1), "{BEATS} beats in {passed:?}");
    // A pause, held clients and a stop do not keep it from being fed.
    proxy.control().pause();
    let held = proxy.connect_held();
    manager.wait_for("STATUS=paused");
    manager.wait_for("WATCHDOG=1");
    proxy.terminate();
    manager.wait_for("STOPPING=1");
    manager.wait_for("WATCHDOG=1");
    drop(held);
}

#[test]
fn a_watchdog_of_another_process_is_not_fed() {
    let manager = Manager::new(Family::Unix);
    let upstream = Upstream::tcp(echo);
    for envs in [
        &[("WATCHDOG_USEC", "20000"), ("WATCHDOG_PID", "1")][..],
        &[("WATCHDOG_USEC", "0")],
        &[("WATCHDOG_USEC", "soon")],
        &[],
    ] {
        let _proxy = launch(&manager, &upstream, envs);
        assert_eq!(manager.wait_for("READY=1"), "READY=1");
        manager.wait_for_running();
        manager.assert_silent();
    }
}

#[test]
fn a_manager_that_is_not_there_is_a_warning() {
    let upstream = Upstream::tcp(echo);
    for name in ["/nowhere/notify", "@no-such-manager", &"a".repeat(200)] {
        let proxy = Proxy::builder().upstream(&upstream).env("NOTIFY_SOCKET", name).start();
        let line = proxy.wait_for_log("systemd");
        assert!(line.contains(" WARN "), "{line}");
        proxy.connect().assert_echo(b"served all the same");
    }
}

#[test]
fn the_manager_is_told_of_a_new_process_which_then_tells_it_all() {
    let manager = Manager::new(Family::Unix);
    let upstream = Upstream::tcp(echo);
    let mut proxy = Proxy::builder()
        .upstream(&upstream)
        .env("NOTIFY_SOCKET", &manager.name)
        .env("INVOCATION_ID", "5")
        .env("WATCHDOG_USEC", "2000000")
        .before("export WATCHDOG_PID=$$ SYSTEMD_EXEC_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=x")
        .start();
    manager.wait_for_running();
    let mut client = proxy.connect();
    client.assert_echo(b"before");
    proxy.signal(hangup());
    let mut heirs = Vec::new();
    for round in 0..3 {
        // The new process has the whole time of the watchdog before it.
        manager.wait_for("WATCHDOG=1");
        let told = manager.wait_for("MAINPID=");
        let pid = told.strip_prefix("MAINPID=").unwrap().parse().unwrap();
        let heir = Heir(Pid::from_raw(pid).unwrap());
        assert_eq!(manager.next(), "BARRIER=1");
        assert_eq!(manager.next(), "READY=1", "once systemd follows it, and not before");
        manager.wait_for_running();
        // It is watched, and feeds the watchdog.
        manager.wait_for("WATCHDOG=1");
        client.assert_echo(b"still carried");
        let environment = fs::read_to_string(format!("/proc/{pid}/environ")).unwrap();
        for variable in ["LISTEN_", "WATCHDOG_PID", "SYSTEMD_EXEC_PID"] {
            assert!(!environment.contains(variable), "{environment:?}");
        }
        // A process that has taken over can be taken over from.
        kill_process(heir.0, if round < 2 { Signal::USR2 } else { Signal::TERM }).unwrap();
        heirs.push(heir);
    }
    assert_eq!(proxy.exit_code(), 0, "the first");
    manager.wait_for("STOPPING=1");
    drop(client);
    proxy.wait_for_log("stopped: every connection had ended, exit code 0");
}

/// The faults are those of debug builds.
#[cfg(debug_assertions)]
#[test]
fn the_watchdog_is_fed_right_before_a_standstill() {
    const HOUR_MICROS: &str = "3600000000";

    let upstream = Upstream::tcp(echo);
    for (fault, stands_still) in [("taker:warm:exit", false), ("taker:ready:exit", true)] {
        let manager = Manager::new(Family::Unix);
        let envs = [("WATCHDOG_USEC", HOUR_MICROS), ("TCPAUSE_HANDOVER_AT", fault)];
        let proxy = launch(&manager, &upstream, &envs);
        manager.wait_for_running();
        proxy.signal(hangup());
        proxy.wait_for_log("not upgraded: ");
        if stands_still {
            assert_eq!(manager.next(), "WATCHDOG=1");
        }
        manager.assert_silent();
    }
}
