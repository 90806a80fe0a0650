//! `tcpause demo`: a server is restarted behind the proxy, under load, and no client notices.
//!
//! The upstream, the proxy and the clients run in this one process, on free ports of the loopback.

use std::{
    error::Error,
    fmt::Display,
    io::{self, BufRead, BufReader, Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, Builder, JoinHandle},
    time::{Duration, Instant},
};

use tcpause::{Address, Config, Outcome, Server};

/// Number of clients, each of which makes one connection after the other.
const CLIENTS: usize = 32;
/// Number of clients with slow requests, so that the pause has connections to wait for.
const SLOW_CLIENTS: usize = 2;
/// Rest of a client between two connections, which leaves about a thousand requests a second.
const CLIENT_REST: Duration = Duration::from_millis(30);
/// Time that the upstream takes for a slow request.
const SLOW_ANSWER: Duration = Duration::from_millis(600);

/// Time of load before the pause, and again after the resume.
const RUNNING: Duration = Duration::from_secs(3);
/// Time for which the upstream is stopped.
const STOPPED: Duration = Duration::from_secs(3);

/// Longest time of each step of a client. A client that waits longer has failed.
const OPERATION_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest wait for running connections.
const IDLE_TIMEOUT: Duration = Duration::from_secs(10);

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
        let server = start_proxy(address)?;
        let (proxy, control) = (server.proxy_addr(), server.control_addr());
        self.tell("tcpause", format_args!("proxy on {proxy}, control API on {control}"));
        let load = Load::start(proxy.to_string().trim_start_matches("tcp://").parse()?)?;
        self.tell(
            "load",
            format_args!("{CLIENTS} clients: connect, send a line, check its echo, close, again"),
        );
        thread::sleep(RUNNING);

        let handle = server.handle();
        handle.pause();
        self.tell(
            "pause",
            "new clients are held from now on, as by tcpause exec; running connections go on",
        );
        if !handle.wait_idle(Some(IDLE_TIMEOUT)) {
            return Err(format!("connections go on after {IDLE_TIMEOUT:?}").into());
        }
        upstream.stop();
        match echo(address, "anyone there?\n") {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                self.tell("upstream", format_args!("idle, and stopped; asked directly: {error}"));
            }
            result => return Err(format!("the upstream is not down: {result:?}").into()),
        }
        thread::sleep(STOPPED);

        let held = handle.status().held;
        let before = load.progress.answered.load(Ordering::Relaxed);
        let upstream = Upstream::start(address)?;
        self.tell("upstream", format_args!("started again on {address}; clients held: {held}"));
        handle.resume();
        self.tell("resume", "held clients are served, oldest first");
        thread::sleep(RUNNING);

        let (answered, longest) = load.end()?;
        server.stop();
        let outcome = server.join();
        upstream.stop();
        if outcome != Outcome::Drained {
            return Err(format!("the proxy did not drain: {outcome:?}").into());
        }
        let after = answered - before;
        if after == 0 {
            return Err("no request was answered after the resume".into());
        }
        self.tell(
            "result",
            format_args!(
                "requests answered: {before} before the restart, {after} after it; failed: 0"
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

fn start_proxy(upstream: SocketAddr) -> Result<Server> {
    let mut config = Config::default();
    config.proxy.addr = Address::tcp("127.0.0.1", 0);
    config.control.addr = Address::tcp("127.0.0.1", 0);
    config.upstream.addr = upstream.to_string().parse()?;
    Ok(Server::start(config)?)
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
