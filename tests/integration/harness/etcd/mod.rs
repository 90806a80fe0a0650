//! A cluster of real etcd on free ports of the loopback, and a relay that cuts clients off from it.
//!
//! The library's own tests of its client compile this file too, so it needs nothing else of the harness.

mod certs;
mod relay;

use std::{
    collections::VecDeque,
    env,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process, waitid};
use tempfile::TempDir;

pub(crate) use certs::Certs;
pub(crate) use relay::Relay;

/// Variable that makes the absence of etcd a failure.
const NEEDED: &str = "TCPAUSE_NEEDS_ETCD";

/// Longest wait for anything that must happen.
const PATIENCE: Duration = Duration::from_secs(30);

/// Ports that outgoing connections do not use.
const PORTS: std::ops::Range<u32> = 12_000..32_000;

/// Most lines of a member's log that are kept for a failure.
const LOG_LINES: usize = 40;

/// Returns the path of etcd. Returns `None`, and says that the test is skipped, where there is none.
pub(crate) fn binary() -> Option<PathBuf> {
    let tools = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/tools/bin");
    let path = env::var_os("PATH").unwrap_or_default();
    let found = env::split_paths(&path).chain([tools]).map(|dir| dir.join("etcd"));
    let found = found.into_iter().find(|path| path.is_file());
    if found.is_none() {
        assert!(env::var_os(NEEDED).is_none(), "there is no etcd, though {NEEDED} is set");
        println!("skipped, as there is no etcd; Debian has it as etcd-server");
    }
    found
}

/// Kind of the connections between clients and the cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Transport {
    Plain,
    Tls,
    MutualTls,
}

/// Cluster of real etcd, whose members are killed when it is dropped.
pub(crate) struct Cluster {
    members: Vec<Member>,
    binary: PathBuf,
    args: Vec<String>,
    transport: Transport,
    pub(crate) certs: Certs,
    dir: TempDir,
}

/// Member of a cluster.
struct Member {
    /// Port for clients, also with TLS.
    client: u16,
    /// Port for the test, always in plain.
    admin: u16,
    peer: u16,
    process: Option<Child>,
    log: Arc<Log>,
}

/// Last lines of a member's log.
#[derive(Default)]
struct Log {
    state: Mutex<LogState>,
    grown: Condvar,
}

#[derive(Default)]
struct LogState {
    lines: VecDeque<String>,
    is_ready: bool,
    has_ended: bool,
}

impl Cluster {
    /// Starts a cluster in plain. Returns `None` where there is no etcd.
    pub(crate) fn start(members: usize) -> Option<Self> {
        Self::start_with(members, Transport::Plain, &[])
    }

    /// Starts a cluster with further arguments for each member.
    pub(crate) fn start_with(members: usize, transport: Transport, args: &[&str]) -> Option<Self> {
        let binary = binary()?;
        // A sync of a disk may take seconds where many tests run.
        let memory = Path::new("/dev/shm");
        let dir = if memory.is_dir() {
            tempfile::Builder::new().prefix("tcpause-etcd-").tempdir_in(memory)
        } else {
            tempfile::tempdir()
        };
        let dir = dir.expect("a directory");
        let new = |_| Member {
            client: free_port(),
            admin: free_port(),
            peer: free_port(),
            process: None,
            log: Arc::default(),
        };
        let mut cluster = Self {
            members: (0..members).map(new).collect(),
            binary,
            args: args.iter().map(|&arg| arg.to_owned()).collect(),
            transport,
            certs: Certs::write(dir.path()),
            dir,
        };
        for index in 0..members {
            cluster.spawn(index);
        }
        for index in 0..members {
            cluster.await_ready(index);
        }
        Some(cluster)
    }

    /// Returns the URL of each member, for clients.
    pub(crate) fn urls(&self) -> Vec<String> {
        let scheme = if self.transport == Transport::Plain { "http" } else { "https" };
        self.members.iter().map(|it| format!("{scheme}://127.0.0.1:{}", it.client)).collect()
    }

    /// Returns the address of a member, for a relay before it.
    pub(crate) fn addr(&self, index: usize) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.members[index].client).into()
    }

    /// Kills a member (SIGKILL).
    pub(crate) fn kill(&mut self, index: usize) {
        if let Some(mut process) = self.members[index].process.take() {
            process.kill().expect("a process of ours");
            process.wait().expect("a child");
        }
    }

    /// Stops a member (SIGSTOP) until [`Self::go_on`]: it holds its connections and answers nothing.
    pub(crate) fn stop(&self, index: usize) {
        let pid = self.signal(index, Signal::STOP);
        // The signal stops a process of many threads a moment later: until all have stopped, one of them may still answer.
        let options = WaitIdOptions::STOPPED | WaitIdOptions::NOWAIT;
        waitid(WaitId::Pid(pid), options).expect("a process of ours");
    }

    pub(crate) fn go_on(&self, index: usize) {
        self.signal(index, Signal::CONT);
    }

    /// Starts a member that was killed, with its data, and waits until it serves. For that a majority must be there.
    pub(crate) fn restart(&mut self, index: usize) {
        self.spawn(index);
        self.await_ready(index);
    }

    /// Starts members that were killed at once, and waits until they serve.
    pub(crate) fn restart_all(&mut self, indices: &[usize]) {
        for &index in indices {
            self.spawn(index);
        }
        for &index in indices {
            self.await_ready(index);
        }
    }

    /// Restores the only member from a backup that was made before its first key.
    pub(crate) fn restore(&mut self) {
        self.kill(0);
        std::fs::remove_dir_all(self.dir.path().join("m0")).expect("its data");
        self.restart(0);
    }

    /// Returns the index of the leader.
    pub(crate) fn leader(&self) -> usize {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let leads = |index: &usize| {
                let status = self.try_ask(*index, "/v3/maintenance/status", "{}").ok();
                let status: Option<serde_json::Value> =
                    status.and_then(|it| serde_json::from_str(&it).ok());
                status.is_some_and(|it| it["leader"] == it["header"]["member_id"])
            };
            let running = (0..self.members.len()).filter(|&it| self.members[it].process.is_some());
            if let Some(index) = running.into_iter().find(leads) {
                return index;
            }
            assert!(Instant::now() < deadline, "no leader\n{}", self.logs());
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Sends a request of the test to the plain port of a member, and returns the body.
    #[track_caller]
    pub(crate) fn ask(&self, index: usize, path: &str, body: &str) -> String {
        self.try_ask(index, path, body).unwrap_or_else(|error| panic!("{path}: {error}"))
    }

    fn try_ask(&self, index: usize, path: &str, body: &str) -> std::io::Result<String> {
        let addr = SocketAddr::from((Ipv4Addr::LOCALHOST, self.members[index].admin));
        let mut stream = TcpStream::connect_timeout(&addr, Duration::from_secs(3))?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        let length = body.len();
        write!(stream, "POST {path} HTTP/1.0\r\ncontent-length: {length}\r\n\r\n{body}")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (_, body) = answer.split_once("\r\n\r\n").unwrap_or_default();
        Ok(body.to_owned())
    }

    /// Lets the time of a token pass since its last use. Each look at whether it holds would be a use.
    pub(crate) fn await_token_end(ttl: Duration) {
        thread::sleep(ttl * 4);
    }

    /// Returns the last lines of all logs.
    pub(crate) fn logs(&self) -> String {
        let lines = |member: &Member| {
            let state = member.log.state.lock().expect("a log");
            state.lines.iter().cloned().collect::<Vec<_>>().join("\n")
        };
        self.members.iter().map(lines).collect::<Vec<_>>().join("\n---\n")
    }

    fn signal(&self, index: usize, signal: Signal) -> Pid {
        let process = self.members[index].process.as_ref().expect("a running member");
        let pid = Pid::from_child(process);
        kill_process(pid, signal).expect("a process of ours");
        pid
    }

    fn spawn(&mut self, index: usize) {
        let url = |scheme: &str, port: u16| format!("{scheme}://127.0.0.1:{port}");
        let all = self.members.iter().enumerate();
        let all: Vec<String> =
            all.map(|(at, it)| format!("m{at}={}", url("http", it.peer))).collect();
        let member = &mut self.members[index];
        let scheme = if self.transport == Transport::Plain { "http" } else { "https" };
        let (client, admin) = (url(scheme, member.client), url("http", member.admin));
        let peer = url("http", member.peer);
        let mut command = Command::new(&self.binary);
        command
            .args(["--name", &format!("m{index}")])
            .arg("--data-dir")
            .arg(self.dir.path().join(format!("m{index}")))
            .args(["--listen-client-urls", &format!("{client},{admin}")])
            .args(["--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &all.join(","), "--initial-cluster-state", "new"])
            .args(&self.args);
        if self.transport != Transport::Plain {
            command.arg("--cert-file").arg(&self.certs.server_cert);
            command.arg("--key-file").arg(&self.certs.server_key);
        }
        if self.transport == Transport::MutualTls {
            command.arg("--client-cert-auth").arg("--trusted-ca-file").arg(&self.certs.ca_cert);
        }
        let mut process = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("etcd");
        let (stderr, log) = (process.stderr.take().expect("a pipe"), Arc::new(Log::default()));
        member.log = Arc::clone(&log);
        member.process = Some(process);
        drop(thread::Builder::new().spawn(move || log.fill(stderr)).expect("a thread"));
    }

    #[track_caller]
    fn await_ready(&self, index: usize) {
        let is_ready = self.members[index].log.await_ready();
        assert!(is_ready, "member {index} does not serve:\n{}", self.logs());
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for process in self.members.iter_mut().filter_map(|it| it.process.as_mut()) {
            // An error means that it has ended already.
            drop(process.kill());
            drop(process.wait());
        }
    }
}

impl Log {
    fn fill(&self, stderr: impl std::io::Read) {
        for line in BufReader::new(stderr).split(b'\n').map_while(Result::ok) {
            let line = String::from_utf8_lossy(&line).into_owned();
            let mut state = self.state.lock().expect("a log");
            state.is_ready |= line.contains("ready to serve client requests");
            if state.lines.len() == LOG_LINES {
                state.lines.pop_front();
            }
            state.lines.push_back(line);
            drop(state);
            self.grown.notify_all();
        }
        self.state.lock().expect("a log").has_ended = true;
        self.grown.notify_all();
    }

    fn await_ready(&self) -> bool {
        let state = self.state.lock().expect("a log");
        let waits = |state: &mut LogState| !state.is_ready && !state.has_ended;
        self.grown.wait_timeout_while(state, PATIENCE, waits).expect("a log").0.is_ready
    }
}

/// Returns a port that is free, and that no other call of this process gets.
fn free_port() -> u16 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let count = PORTS.end - PORTS.start;
    for _ in 0..count {
        let next = NEXT.fetch_add(1, Ordering::Relaxed);
        // Processes of one machine begin far from each other.
        let port = PORTS.start + std::process::id().wrapping_mul(97).wrapping_add(next) % count;
        let port = u16::try_from(port).expect("a port");
        if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            return port;
        }
    }
    panic!("no free port in {PORTS:?}");
}
