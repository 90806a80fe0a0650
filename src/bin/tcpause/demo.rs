//! `tcpause demo`: a server is restarted behind the proxy, and the proxy upgrades itself, under load, and no client notices.
//!
//! The upstream and the clients run in this process, on free ports of the loopback. The proxy has a process of its own, as it
//! ends by an upgrade.

use std::{
    env,
    error::Error,
    fmt::Display,
    io::{self, BufRead, BufReader, Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    process::{Child, Command, ExitCode, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, Builder, JoinHandle},
    time::{Duration, Instant},
};

use crossbeam_channel::{Receiver, bounded};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::client::Api;

/// Number of clients, each of which makes one connection after the other.
const CLIENTS: usize = 32;
/// Number of clients with slow requests, so that the pause has connections to wait for.
const SLOW_CLIENTS: usize = 2;
/// Rest of a client between two connections, which leaves about a thousand requests a second.
const CLIENT_REST: Duration = Duration::from_millis(30);
/// Time that the upstream takes for a slow request.
const SLOW_ANSWER: Duration = Duration::from_millis(600);

/// Time of load before the pause, after the resume, and after the upgrade.
const RUNNING: Duration = Duration::from_secs(2);
/// Time for which the upstream is stopped.
const STOPPED: Duration = Duration::from_secs(3);

/// Longest time of each step of a client. A client that waits longer has failed.
const OPERATION_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest wait for running connections.
const IDLE_TIMEOUT: Duration = Duration::from_secs(10);
/// Variables of a service or a shell that would change the proxy.
const FOREIGN_VARIABLES: [&str; 4] = ["RUST_LOG", "NOTIFY_SOCKET", "INVOCATION_ID", "LISTEN_PID"];
/// Beginnings of the lines of the log that the story needs.
const LINES_HEEDED: [&str; 3] = ["proxy listens on ", "control listens on ", "stopped: "];

/// Longest line that the upstream echoes.
const LINE_BYTES_MAX: u64 = 128;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// Plays the story. The exit code is 1 if a client noticed the restart.
pub(crate) fn run() -> ExitCode {
    let story = Story(Instant::now());
    match story.play() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            story.tell("FAILED", error);
            ExitCode::FAILURE
        }
    }
}

/// Story of a restart, with the moment at which it began.
struct Story(Instant);

impl Story {
    fn play(&self) -> Result<()> {
        let upstream = Upstream::start(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))?;
        let address = upstream.address;
        self.tell("upstream", format_args!("a server that echoes lines, on {address}"));
        let mut proxy = Proxy::start(address)?;
        let Proxy { address: at, control, pid, .. } = &proxy;
        self.tell("tcpause", format_args!("proxy on {at}, control API on {control}, pid {pid}"));
        let load = Load::start(*at)?;
        self.tell(
            "load",
            format_args!("{CLIENTS} clients: connect, send a line, check its echo, close, again"),
        );
        thread::sleep(RUNNING);

        proxy.ask("PUT", "/paused")?;
        self.tell(
            "pause",
            "new clients are held from now on, as by tcpause exec; running connections go on",
        );
        proxy.ask("GET", &format!("/paused/block-until-idle?timeout={IDLE_TIMEOUT:?}"))?;
        upstream.stop();
        match echo(address, "anyone there?\n") {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                self.tell("upstream", format_args!("idle, and stopped; asked directly: {error}"));
            }
            result => return Err(format!("the upstream is not down: {result:?}").into()),
        }
        thread::sleep(STOPPED);

        let held = number(&proxy.ask("GET", "/status")?, "held");
        let before = load.answered();
        let upstream = Upstream::start(address)?;
        self.tell("upstream", format_args!("started again on {address}; clients held: {held}"));
        proxy.ask("DELETE", "/paused")?;
        self.tell("resume", "held clients are served, oldest first");
        thread::sleep(RUNNING);

        let resumed = load.answered() - before;
        let upgrade = proxy.upgrade()?;
        self.tell("upgrade", format_args!("tcpause has started itself anew: {upgrade}"));
        thread::sleep(RUNNING);

        let (answered, longest) = load.end()?;
        proxy.stop()?;
        upstream.stop();
        let upgraded = answered - before - resumed;
        if resumed == 0 || upgraded == 0 {
            return Err("no request was answered after the resume, or after the upgrade".into());
        }
        self.tell(
            "result",
            format_args!(
                "requests answered: {before} before the restart, {resumed} after it, {upgraded} after the upgrade; failed: 0"
            ),
        );
        self.tell(
            "result",
            format_args!(
                "longest wait: {:.2}s, of which the server was stopped for {:.2}s",
                longest.as_secs_f64(),
                STOPPED.as_secs_f64()
            ),
        );
        Ok(())
    }

    /// Prints a step with its time. A reader that has left does not stop the story.
    fn tell(&self, part: &str, text: impl Display) {
        let time = self.0.elapsed().as_secs_f64();
        drop(crate::print(&format!("{time:6.2}s {part:<9} {text}\n")));
    }
}

/// Proxy in a process of its own.
struct Proxy {
    /// The process that was started. An upgrade ends it.
    child: Child,
    /// The process that runs.
    pid: Pid,
    address: SocketAddr,
    control: SocketAddr,
    /// Lines of the log that are heeded. It ends with the last process.
    lines: Receiver<String>,
}

impl Proxy {
    fn start(upstream: SocketAddr) -> Result<Self> {
        let mut command = Command::new(env::current_exe()?);
        command
            .args(["--config=/dev/null", "--log-level=info", "--log-format=text"])
            .args(["--proxy-addr=127.0.0.1:0", "--control-addr=127.0.0.1:0"])
            .arg(format!("--upstream-addr={upstream}"));
        for variable in FOREIGN_VARIABLES {
            command.env_remove(variable);
        }
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn()?;
        let pid = Pid::from_child(&child);
        let log = child.stderr.take().ok_or("the proxy has no standard error")?;
        // There are five of them at most.
        let (sender, lines) = bounded(16);
        Builder::new().spawn(move || {
            for line in BufReader::new(log).lines().map_while(io::Result::ok) {
                if LINES_HEEDED.iter().any(|heeded| line.contains(heeded)) {
                    drop(sender.try_send(line));
                }
            }
        })?;
        let unknown = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
        // From here on, an error ends the process.
        let mut proxy = Self { child, pid, address: unknown, control: unknown, lines };
        proxy.address = proxy.listening("proxy")?;
        proxy.control = proxy.listening("control")?;
        Ok(proxy)
    }

    /// Reads from the log where a part of the proxy listens.
    fn listening(&self, part: &str) -> Result<SocketAddr> {
        let line = self.lines.recv_timeout(OPERATION_TIMEOUT)?;
        let (_, rest) = line.split_once(" listens on tcp://").ok_or("the proxy does not listen")?;
        let address = rest.split(' ').next().unwrap_or_default();
        address.parse().map_err(|error| format!("{part} at {address:?}: {error}").into())
    }

    /// Asks the control API. An answer of an error is one.
    fn ask(&self, method: &str, target: &str) -> Result<Value> {
        let api = Api::new(self.control.to_string().parse()?);
        let answer = api.ask(method, target, Some(OPERATION_TIMEOUT));
        let answer = answer.map_err(|failure| failure.told().1.to_owned())?;
        match answer.status {
            200..300 => Ok(answer.json()),
            status => Err(format!("{method} {target}: {status} {}", answer.json()).into()),
        }
    }

    /// Has the proxy start itself anew, and tells what came of it.
    fn upgrade(&mut self) -> Result<String> {
        let told = self.ask("POST", "/upgrade")?;
        let pid = told.get("pid").and_then(Value::as_i64);
        let pid = pid.and_then(|pid| Pid::from_raw(pid.try_into().ok()?));
        self.pid = pid.ok_or("the new process has no number")?;
        let (connections, stall) = (number(&told, "connections"), number(&told, "stall_seconds"));
        let stall = stall * 1e3;
        Ok(format!("pid {}, {connections} connections moved in {stall:.1} ms", self.pid))
    }

    /// Stops the proxy in good order, and waits for its end.
    fn stop(&self) -> Result<()> {
        kill_process(self.pid, Signal::TERM)?;
        let line = self.lines.iter().find(|line| line.contains("stopped: "));
        match line {
            Some(line) if line.contains("every connection had ended") => Ok(()),
            other => Err(format!("the proxy did not drain: {other:?}").into()),
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        // An error means that it has ended.
        kill_process(self.pid, Signal::KILL).ok();
        self.child.wait().ok();
    }
}

/// Connects, sends `line`, and checks that this very line comes back.
fn echo(address: SocketAddr, line: &str) -> io::Result<()> {
    let mut stream = TcpStream::connect_timeout(&address, OPERATION_TIMEOUT)?;
    stream.set_read_timeout(Some(OPERATION_TIMEOUT))?;
    stream.set_write_timeout(Some(OPERATION_TIMEOUT))?;
    stream.set_nodelay(true)?;
    stream.write_all(line.as_bytes())?;
    let mut answer = String::new();
    BufReader::new(stream.take(LINE_BYTES_MAX)).read_line(&mut answer)?;
    if answer == line {
        return Ok(());
    }
    Err(io::Error::new(io::ErrorKind::InvalidData, format!("sent {line:?}, got {answer:?}")))
}

/// Running clients.
struct Load {
    progress: Arc<Progress>,
    /// Threads of the clients. Each returns its longest wait, or the error of its first failed request.
    clients: Vec<JoinHandle<io::Result<Duration>>>,
}

#[derive(Default)]
struct Progress {
    answered: AtomicU64,
    stopping: AtomicBool,
}

impl Load {
    fn start(proxy: SocketAddr) -> io::Result<Self> {
        let progress = Arc::<Progress>::default();
        let start = |number| {
            let progress = Arc::clone(&progress);
            Builder::new().spawn(move || request(proxy, number, &progress))
        };
        let clients = (0..CLIENTS).map(start).collect::<io::Result<_>>()?;
        Ok(Self { progress, clients })
    }

    /// Returns the number of requests that were answered so far.
    fn answered(&self) -> u64 {
        self.progress.answered.load(Ordering::Relaxed)
    }

    /// Ends the clients after their present requests. Returns the number of answered requests, and the longest wait for an
    /// answer.
    fn end(self) -> Result<(u64, Duration)> {
        self.progress.stopping.store(true, Ordering::Relaxed);
        let mut longest = Duration::ZERO;
        let mut errors = Vec::new();
        for client in self.clients {
            match client.join().map_err(|_panic| "a client panicked")? {
                Ok(wait) => longest = longest.max(wait),
                Err(error) => errors.push(error),
            }
        }
        match errors.first() {
            Some(error) => {
                Err(format!("clients failed: {}; the first: {error}", errors.len()).into())
            }
            None => Ok((self.progress.answered.load(Ordering::Relaxed), longest)),
        }
    }
}

/// Makes one request after the other. Returns the longest wait for an answer.
fn request(proxy: SocketAddr, client: usize, progress: &Progress) -> io::Result<Duration> {
    let kind = if client < SLOW_CLIENTS { "slow" } else { "fast" };
    let mut longest = Duration::ZERO;
    for request in 1.. {
        if progress.stopping.load(Ordering::Relaxed) {
            break;
        }
        let begun = Instant::now();
        echo(proxy, &format!("{kind} request {request} of client {client}\n"))?;
        longest = longest.max(begun.elapsed());
        progress.answered.fetch_add(1, Ordering::Relaxed);
        thread::sleep(CLIENT_REST);
    }
    Ok(longest)
}

/// Server that echoes lines, with a thread that accepts and a thread for each connection.
struct Upstream {
    address: SocketAddr,
    stopping: Arc<AtomicBool>,
    accepting: JoinHandle<()>,
}

impl Upstream {
    fn start(address: SocketAddr) -> io::Result<Self> {
        let listener = TcpListener::bind(address)?;
        let address = listener.local_addr()?;
        let stopping = Arc::<AtomicBool>::default();
        let stop = Arc::clone(&stopping);
        let accepting = Builder::new().spawn(move || accept(listener, &stop))?;
        Ok(Self { address, stopping, accepting })
    }

    /// Closes the listener and waits for the connections to end.
    fn stop(self) {
        self.stopping.store(true, Ordering::Release);
        // This connection is not served. It wakes the accepting thread, which then ends.
        drop(TcpStream::connect(self.address));
        drop(self.accepting.join());
    }
}

fn accept(listener: TcpListener, stopping: &AtomicBool) {
    thread::scope(|scope| {
        while let Ok((client, _address)) = listener.accept() {
            let serve = move || drop(answer_lines(&client));
            if stopping.load(Ordering::Acquire)
                || Builder::new().spawn_scoped(scope, serve).is_err()
            {
                break;
            }
        }
        // New clients are refused from here on, and the scope waits for the remaining connections.
        drop(listener);
    });
}

/// Answers each line with itself until the client ends its stream. An error shows at the client.
fn answer_lines(mut client: &TcpStream) -> io::Result<()> {
    client.set_read_timeout(Some(OPERATION_TIMEOUT))?;
    let mut lines = BufReader::new(client);
    let mut line = String::new();
    while lines.by_ref().take(LINE_BYTES_MAX).read_line(&mut line)? > 0 {
        if line.starts_with("slow") {
            thread::sleep(SLOW_ANSWER);
        }
        client.write_all(line.as_bytes())?;
        line.clear();
    }
    Ok(())
}
/// Returns a number of an answer of the API; 0 without one.
fn number(answer: &Value, name: &str) -> f64 {
    answer.get(name).and_then(Value::as_f64).unwrap_or_default()
}
