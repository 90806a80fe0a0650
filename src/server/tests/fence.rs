//! The fence of a whole process, which a signal stops before the deadline and lets go on behind it.

use std::{
    env,
    io::{BufRead, BufReader, Lines, stdin},
    process::{Child, ChildStdout, Command, Stdio},
};

use nix::{
    sys::{
        signal::{Signal, kill},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};

use super::*;
use crate::{
    config::HalfClosed,
    pause::{
        gate::Mode,
        leases::{Lifetime, Terms},
    },
    sys::boot::boot_time,
};

/// Variable of the process that is stopped.
const IS_STOPPED: &str = "TCPAUSE_TEST_IS_STOPPED";
const NAME: &str =
    "server::tests::fence::a_process_that_was_stopped_admits_nobody_behind_its_deadline";
/// Number of clients that are held before the stop, and of those that come while the process is stopped.
const CLIENTS: usize = 20;
/// Time until the deadline, and until the pause ends, which is later.
const FENCED_IN: Duration = Duration::from_millis(300);
const PAUSED_FOR: Duration = Duration::from_millis(400);

/// A process of this test, which is killed in the end.
struct Stopped {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Stopped {
    fn start() -> Self {
        let program = env::current_exe().unwrap();
        let mut child = Command::new(program)
            .args(["--exact", NAME, "--nocapture"])
            .env(IS_STOPPED, "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Self { child, lines }
    }

    /// Returns what it tells under this word.
    fn hear(&mut self, word: &str) -> String {
        let mut lines = self.lines.by_ref().map(Result::unwrap);
        lines.find_map(|line| Some(line.split_once(word)?.1.trim().to_owned())).expect(word)
    }

    fn tell(&mut self, word: &str) {
        writeln!(self.child.stdin.as_mut().unwrap(), "{word}").unwrap();
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().try_into().unwrap())
    }

    fn stop(&self) {
        kill(self.pid(), Signal::SIGSTOP).unwrap();
        let status = waitpid(self.pid(), Some(WaitPidFlag::WUNTRACED)).unwrap();
        assert_eq!(status, WaitStatus::Stopped(self.pid(), Signal::SIGSTOP));
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

#[test]
fn a_process_that_was_stopped_admits_nobody_behind_its_deadline() {
    if env::var_os(IS_STOPPED).is_some() {
        return be_stopped();
    }
    let mut proxy = Stopped::start();
    let addr: SocketAddr = proxy.hear("address").parse().unwrap();
    let connect = || TcpStream::connect_timeout(&addr, DEADLINE).unwrap();
    let mut clients: Vec<_> = (0..CLIENTS).map(|_client| connect()).collect();
    proxy.tell("they are there");
    let deadline = Duration::from_millis(proxy.hear("deadline").parse().unwrap());
    proxy.stop();
    clients.extend((0..CLIENTS).map(|_client| connect()));
    while boot_time() < deadline {
        thread::park_timeout(deadline.saturating_sub(boot_time()));
    }
    kill(proxy.pid(), Signal::SIGCONT).unwrap();
    proxy.tell("go on");
    proxy.hear("nobody was admitted");
    proxy.tell("open");
    for client in &mut clients {
        echo(client).unwrap();
    }
    drop(proxy.child.stdin.take());
    assert!(proxy.child.wait().unwrap().success());
}

/// Is the process that is stopped. No thread but the workers looks at the fence.
fn be_stopped() {
    let mut orders = stdin().lines().map(Result::unwrap);
    let (server, addresses) = start(&[[127, 0, 0, 1]], 2, None);
    let pauses = &server.shared.pauses;
    let terms = |ttl| Terms {
        name: "default".to_owned(),
        reason: None,
        by: "a test".to_owned(),
        mode: Mode::Hold,
        ttl,
        quiet: None,
        half_closed: HalfClosed::Serve,
    };
    pauses.put(terms(None), Lifetime::Committed, 1).unwrap();
    println!("address {}", addresses[0]);
    orders.next().unwrap();
    wait_for(&server, (0, CLIENTS as u64, 0));
    let deadline = boot_time() + FENCED_IN;
    pauses.fence_at(Some(deadline));
    pauses.put(terms(Some(PAUSED_FOR)), Lifetime::Committed, 2).unwrap();
    println!("deadline {}", deadline.as_millis() + 1);

    assert_eq!(orders.next().as_deref(), Some("go on"));
    wait_for(&server, (0, 2 * CLIENTS as u64, 0));
    while pauses.lock().holds_name("default") {
        thread::park_timeout(Duration::from_millis(1));
    }
    // Each worker has had a turn in which no pause kept it from starting the clients, so that only the fence did.
    assert!(pauses.await_turns(DEADLINE) && pauses.await_turns(DEADLINE));
    wait_for(&server, (0, 2 * CLIENTS as u64, 0));
    assert_eq!((server.handle().status().connecting, pauses.connections()), (0, 0));
    assert_eq!(pauses.gate.fence(), Some(Duration::ZERO), "some have tried");
    println!("nobody was admitted");
    orders.next().unwrap();
    pauses.fence_at(None);
    assert_eq!(orders.next(), None);
}
