//! System calls that fail on purpose, and everything at random for a while.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use rustix::process::{Pid, Signal, kill_process};

use crate::harness::{End, Proxy, Received, Status, Upstream, echo, pattern, wait_until};

/// Each line is injected at once; none may be felt but as a delay.
const INJECTIONS: [&[&str]; 5] = [
    &["accept4:error=EMFILE:when=1+3", "socket:error=EMFILE:when=1+2", "pipe2:error=EMFILE"],
    &["accept4:error=ENFILE:when=1+3", "socket:error=ENFILE:when=1+2", "pipe2:error=ENFILE"],
    &[
        "accept4:error=ENOBUFS:when=1+3",
        "socket:error=ENOBUFS:when=1+2",
        "epoll_ctl:error=ENOMEM:when=1+3",
    ],
    &[
        "accept4:error=ECONNABORTED:when=1+2",
        "socket:error=ENOMEM:when=1+2",
        "epoll_ctl:error=ENOSPC:when=2+3",
    ],
    &[
        "accept4:error=EINTR:when=1+2",
        "recvfrom:error=EINTR:when=1+2",
        "sendto:error=EINTR:when=1+2",
        "splice:error=EINTR:when=1+2",
        "epoll_wait:error=EINTR:when=1+2",
    ],
];

#[test]
fn system_calls_that_fail_delay_and_nothing_else() {
    const CLIENTS: u64 = 10;
    if let Err(reason) = can_trace() {
        println!("skipped: {reason}");
        return;
    }
    let mut injected = 0;
    for injections in INJECTIONS {
        let upstream = Upstream::tcp(echo);
        let proxy = Proxy::builder().upstream(&upstream).args(["--proxy-threads", "1"]).start();
        let tracer = Tracer::attach(&proxy, "worker-0", injections);
        for is_held in [false, true] {
            if is_held {
                proxy.control().pause();
            }
            let mut clients: Vec<_> = (0..CLIENTS).map(|_| proxy.connect()).collect();
            for client in &mut clients {
                client.send(b"hello");
            }
            if is_held {
                proxy.control().wait_counts(|status| status.held, CLIENTS);
                proxy.control().resume();
            }
            for (number, mut client) in clients.into_iter().enumerate() {
                assert_eq!(client.receive(5), b"hello", "{injections:?}");
                // Much at once is spliced.
                let bytes = pattern(number as u64, 1 << 20);
                assert!(client.round_trip(&bytes) == bytes, "other bytes: {injections:?}");
                client.finish();
                assert_eq!(client.receive_all(), Received { bytes: Vec::new(), end: End::Eof });
            }
        }
        injected += tracer.finish();
        let counts = |status: &Status| (status.active, status.held, status.failed);
        proxy.control().wait_counts(counts, (0, 0, 0));
        let status = proxy.control().status();
        assert_eq!((status.accepted, status.worker_panics), (2 * CLIENTS, 0));
        proxy.control().wait_counts(|status| status.closed["ended"], 2 * CLIENTS);
        proxy.connect().assert_echo(b"all is as before");
    }
    println!("{injected} calls failed, and no client has felt one");
}

/// An answer that the private server loses is written without it: the caller is told what holds. A caller that is told
/// to try again has paused nothing (`a_pause_that_is_not_answered_does_not_stand` in `src/control/tests/server.rs`).
#[test]
fn a_pause_whose_answer_is_lost_by_the_server_is_answered_without_it() {
    if let Err(reason) = can_trace() {
        println!("skipped: {reason}");
        return;
    }
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::to(&upstream);
    let tracer = Tracer::attach(&proxy, "control", &["write,sendto:error=EPIPE"]);
    assert_eq!(proxy.control().put("/paused?name=lost").status, 201);
    let lost = tracer.finish();
    assert!(lost > 0, "no answer was lost");
    proxy.wait_for_log("it is written without the server");
    assert!(proxy.control().is_paused());
    proxy.control().resume();
    proxy.connect().assert_echo(b"carried");
    println!("{lost} calls failed until its caller was told");
}

/// Returns whether this machine has strace and lets it look at other processes.
fn can_trace() -> Result<(), String> {
    let mut sleeper = Command::new("sleep").arg("60").spawn().map_err(|error| error.to_string())?;
    let mut tracer = strace(sleeper.id(), Path::new("/dev/null"), &["accept4:error=EINTR"]);
    let result = match &mut tracer {
        Err(error) => Err(format!("strace: {error}")),
        Ok(tracer) => {
            let status = format!("/proc/{}/status", sleeper.id());
            wait_until("strace is there, or has given up", || {
                is_traced(&status) || tracer.try_wait().is_ok_and(|exit| exit.is_some())
            });
            if is_traced(&status) { Ok(()) } else { Err("strace may not trace here".to_owned()) }
        }
    };
    drop((sleeper.kill(), sleeper.wait()));
    if let Ok(tracer) = &mut tracer {
        drop((tracer.kill(), tracer.wait()));
    }
    result
}

fn strace(thread: u32, log: &Path, injections: &[&str]) -> std::io::Result<Child> {
    let mut command = Command::new("strace");
    command.arg("-qq").arg("-o").arg(log).args(["-p", &thread.to_string()]);
    command.args(injections.iter().map(|injection| format!("--inject={injection}")));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()
}

fn is_traced(status: &str) -> bool {
    fs::read_to_string(status).is_ok_and(|text| {
        text.lines().any(|line| line.starts_with("TracerPid:") && !line.ends_with("\t0"))
    })
}

/// An strace that makes calls of a thread of a proxy fail. The rest of the program is left alone.
struct Tracer {
    process: Child,
    log: PathBuf,
}

impl Tracer {
    fn attach(proxy: &Proxy, name: &str, injections: &[&str]) -> Self {
        let mut thread = PathBuf::new();
        wait_until("the thread has its name", || {
            let found = proxy.threads_named(name).into_iter().find(|path| {
                fs::read_to_string(path.join("comm")).is_ok_and(|comm| comm.trim() == name)
            });
            found.map(|path| thread = path).is_some()
        });
        let id = thread.file_name().and_then(|name| name.to_str()?.parse().ok());
        let log = proxy.dir().join("strace.log");
        let process = strace(id.expect("a number"), &log, injections).expect("strace");
        let tracer = Self { process, log };
        let status = thread.join("status").to_string_lossy().into_owned();
        wait_until("strace is there", || is_traced(&status));
        tracer
    }

    /// Lets go of the thread; returns how many calls have failed.
    fn finish(mut self) -> usize {
        // Killed, it would not write the rest of its log.
        kill_process(Pid::from_child(&self.process), Signal::TERM).expect("a process of ours");
        wait_until("strace ends", || self.process.try_wait().is_ok_and(|exit| exit.is_some()));
        let injected = fs::read_to_string(&self.log).expect("a log").matches("(INJECTED)").count();
        assert!(injected > 0, "nothing was injected");
        injected
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        drop((self.process.kill(), self.process.wait()));
    }
}
