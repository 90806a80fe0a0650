//! `tcpause demo`: a server is restarted behind the proxy, under load, and no client notices.
//!
//! The upstream, the proxy and the clients run in this one process, on free ports of the loopback. What an operator would
//! do is done by the operator's means: `tcpause exec` runs as a process of its own, and restarts the upstream.

use std::{
    env,
    error::Error,
    fmt::Display,
    io::{self, BufRead, BufReader, IsTerminal, Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    process::{Child, ChildStdin, ChildStdout, Command, ExitCode, Stdio},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc::{Receiver, RecvTimeoutError, channel},
    },
    thread::{self, Builder, JoinHandle, Scope, ScopedJoinHandle},
    time::{Duration, Instant},
};

use tcpause::{Address, Config, Handle, Outcome, Server};

/// How many clients there are. Each makes one connection after the other.
const CLIENTS: usize = 32;
/// How many of them ask for what takes the upstream long, so that waiting for idle is a wait.
const SLOW_CLIENTS: usize = 2;
/// How long a client rests between two connections: about a thousand a second are plenty to watch.
const CLIENT_REST: Duration = Duration::from_millis(30);
/// How long the upstream thinks about a slow request.
const SLOW_ANSWER: Duration = Duration::from_millis(600);

/// How long the load runs before the pause, and after the resume.
const RUNNING: Duration = Duration::from_secs(3);
/// How long the upstream is stopped.
const STOPPED: Duration = Duration::from_secs(3);

/// A client that has waited for so long has failed.
const OPERATION_TIMEOUT: Duration = Duration::from_secs(30);
/// How long exec may wait for idle.
const IDLE_TIMEOUT: &str = "10s";

/// How often the live line is rewritten on a terminal, and how often it is written anywhere else.
const TERMINAL_INTERVAL: Duration = Duration::from_millis(200);
const LOG_INTERVAL: Duration = Duration::from_secs(1);

/// The longest line that the upstream echoes.
const LINE_BYTES_MAX: u64 = 128;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// Shows the main job. The exit code is 1 if a client noticed.
pub(crate) fn run() -> ExitCode {
    let screen = Screen::new();
    match show(&screen) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            screen.tell("FAILED", error);
            ExitCode::FAILURE
        }
    }
}

fn show(screen: &Screen) -> Result<()> {
    screen.print("tcpause demo: a server is restarted behind the proxy, under load\n\n");
    let mut upstream = Upstream::start(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))?;
    screen.tell("upstream", format_args!("a server that echoes lines, on {}", upstream.address));
    let mut config = Config::default();
    config.proxy.addr = Address::tcp("127.0.0.1", 0);
    config.control.addr = Address::tcp("127.0.0.1", 0);
    config.upstream.addr = upstream.address.to_string().parse()?;
    let server = Server::start(config)?;
    let control = socket_address(server.control_addr())?;
    let load = Load::new(socket_address(server.proxy_addr())?);
    screen.tell("tcpause", format_args!("proxy on {}, control API on {control}", load.proxy));

    let first_answered = thread::scope(|scope| {
        let (live, ended) = channel();
        let show_live = {
            let (load, handle) = (&load, server.handle());
            move || screen.show_live(load, &handle, &ended)
        };
        let told = spawn(scope, show_live)
            .and_then(|_thread| load.start(scope))
            .map_err(Into::into)
            .and_then(|clients| restart(screen, &mut upstream, control, &load, clients));
        // No client shall wait for a resume that will not come.
        if told.is_err() {
            server.abort();
        }
        load.stop();
        drop(live);
        told
    })?;
    server.stop();
    let outcome = server.join();
    let answered = upstream.stop();
    screen.tell("end", format_args!("requests answered by the upstream before its restart: {first_answered}, after it: {answered}"));
    sum_up(screen, &load, outcome)
}

/// Restarts the upstream as an operator would. Returns how many requests it had answered before.
fn restart(
    screen: &Screen,
    upstream: &mut Upstream,
    control: SocketAddr,
    load: &Load,
    clients: Vec<ScopedJoinHandle<'_, ()>>,
) -> Result<u64> {
    screen.tell(
        "load",
        format_args!("{CLIENTS} clients: connect, send a line, check its echo, close, again"),
    );
    thread::sleep(RUNNING);

    let mut exec = Exec::start(screen, control)?;
    exec.wait_for_command()?;

    let address = upstream.address;
    let answered = upstream.stop();
    let before = load.operations();
    screen.tell("upstream", format_args!("stopped; requests answered: {answered}"));
    match echo(address, "anyone there?\n") {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            screen.tell("upstream", format_args!("connecting to {address} directly: {error}"));
        }
        result => return Err(format!("the upstream is not down: {result:?}").into()),
    }
    thread::sleep(STOPPED);
    if load.operations() != before {
        return Err("a request was answered while the upstream was down".into());
    }

    *upstream = Upstream::start(address)?;
    screen.tell("upstream", format_args!("started again on {address}"));
    exec.end(screen)?;
    thread::sleep(RUNNING);
    if load.operations() == before {
        return Err("no request was answered after the resume".into());
    }

    load.stop();
    for client in clients {
        client.join().map_err(|_panic| "a client panicked")?;
    }
    Ok(answered)
}

fn sum_up(screen: &Screen, load: &Load, outcome: Outcome) -> Result<()> {
    let (operations, failed) = (load.operations(), load.failed.load(Ordering::Relaxed));
    let longest = Duration::from_micros(load.longest_micros.load(Ordering::Relaxed));
    screen.print(&format!(
        "\noperations    {operations}\nlongest wait  {:.2}s, of which the upstream was stopped for {:.2}s\nfailed        {failed}\n",
        longest.as_secs_f64(),
        STOPPED.as_secs_f64(),
    ));
    if let Some(error) = &*load.first_error() {
        return Err(format!("operations failed: {failed}; the first: {error}").into());
    }
    if outcome != Outcome::Drained {
        return Err(format!("the proxy did not drain: {outcome:?}").into());
    }
    screen.print("\nThe server was restarted, and no client noticed more than a wait.\n");
    Ok(())
}

/// A running `tcpause exec`: this very program, as the operator would call it.
struct Exec {
    child: Child,
    /// Ends the command. So does its drop: then the command goes no further, and exec resumes.
    to_command: ChildStdin,
    from_command: BufReader<ChildStdout>,
}

impl Exec {
    /// What exec runs: it tells that it has been started, and ends when the upstream has been restarted.
    const COMMAND: &str = "echo started; read ended";

    fn start(screen: &Screen, control: SocketAddr) -> Result<Self> {
        let mut command = Command::new(env::current_exe()?);
        command.args(["exec", "--wait", IDLE_TIMEOUT, "--control-addr", &control.to_string()]);
        command.args(["--", "sh", "-c", Self::COMMAND]);
        screen.tell(
            "exec",
            format_args!("tcpause exec --wait {IDLE_TIMEOUT} --control-addr {control} -- COMMAND"),
        );
        screen.tell("", "COMMAND restarts the upstream, as systemctl restart does for a service");
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
        let to_command = stdin.ok_or("exec has no standard input")?;
        let from_command = BufReader::new(stdout.ok_or("exec has no standard output")?);
        Ok(Self { child, to_command, from_command })
    }

    /// Waits until exec has paused the proxy, has seen it idle and runs the command.
    fn wait_for_command(&mut self) -> Result<()> {
        let mut line = String::new();
        if self.from_command.read_line(&mut line)? == 0 {
            return Err("exec has not run its command".into());
        }
        Ok(())
    }

    /// Ends the command and waits for exec, which resumes.
    fn end(mut self, screen: &Screen) -> Result<()> {
        self.to_command.write_all(b"\n")?;
        let status = self.child.wait()?;
        screen.tell("exec", format_args!("has resumed and ended: {status}"));
        if status.success() { Ok(()) } else { Err("exec has failed".into()) }
    }
}

/// One operation of a client: connects, sends `line`, and checks that just this line comes back, and nothing else.
fn echo(address: SocketAddr, line: &str) -> io::Result<()> {
    let mut stream = connect(address)?;
    stream.write_all(line.as_bytes())?;
    let mut answer = String::new();
    BufReader::new(stream.take(LINE_BYTES_MAX)).read_line(&mut answer)?;
    if answer == line {
        return Ok(());
    }
    Err(io::Error::new(io::ErrorKind::InvalidData, format!("sent {line:?}, got {answer:?}")))
}

fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&address, OPERATION_TIMEOUT)?;
    stream.set_read_timeout(Some(OPERATION_TIMEOUT))?;
    stream.set_write_timeout(Some(OPERATION_TIMEOUT))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

fn socket_address(address: &Address) -> Result<SocketAddr> {
    match address {
        Address::Tcp { host, port } => Ok(SocketAddr::new(host.parse()?, *port)),
        Address::Unix(_) | Address::Abstract(_) => Err(format!("{address} is not of TCP").into()),
    }
}

fn spawn<'scope>(
    scope: &'scope Scope<'scope, '_>,
    run: impl FnOnce() + Send + 'scope,
) -> io::Result<ScopedJoinHandle<'scope, ()>> {
    Builder::new().spawn_scoped(scope, run)
}

/// What the clients do, and what has become of it.
struct Load {
    proxy: SocketAddr,
    stopping: AtomicBool,
    succeeded: AtomicU64,
    failed: AtomicU64,
    longest_micros: AtomicU64,
    first_error: Mutex<Option<String>>,
}

impl Load {
    fn new(proxy: SocketAddr) -> Self {
        Self {
            proxy,
            stopping: AtomicBool::new(false),
            succeeded: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            longest_micros: AtomicU64::new(0),
            first_error: Mutex::new(None),
        }
    }

    fn start<'scope>(
        &'scope self,
        scope: &'scope Scope<'scope, '_>,
    ) -> io::Result<Vec<ScopedJoinHandle<'scope, ()>>> {
        (0..CLIENTS).map(|client| spawn(scope, move || self.run(client))).collect()
    }

    /// Lets the clients end after their present operation.
    fn stop(&self) {
        self.stopping.store(true, Ordering::Relaxed);
    }

    fn operations(&self) -> u64 {
        self.succeeded.load(Ordering::Relaxed)
    }

    fn first_error(&self) -> std::sync::MutexGuard<'_, Option<String>> {
        self.first_error.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self, client: usize) {
        let kind = if client < SLOW_CLIENTS { "slow" } else { "fast" };
        for operation in 1.. {
            if self.stopping.load(Ordering::Relaxed) {
                return;
            }
            let begun = Instant::now();
            match echo(self.proxy, &format!("{kind} request {operation} of client {client}\n")) {
                Ok(()) => {
                    self.succeeded.fetch_add(1, Ordering::Relaxed);
                }
                Err(error) => {
                    self.failed.fetch_add(1, Ordering::Relaxed);
                    self.first_error().get_or_insert_with(|| error.to_string());
                }
            }
            let micros = u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX);
            self.longest_micros.fetch_max(micros, Ordering::Relaxed);
            thread::sleep(CLIENT_REST);
        }
    }
}

/// A server that echoes lines. It has one thread that accepts, and one for each connection.
struct Upstream {
    address: SocketAddr,
    stopping: Arc<AtomicBool>,
    accepting: Option<JoinHandle<u64>>,
}

impl Upstream {
    fn start(address: SocketAddr) -> io::Result<Self> {
        let listener = TcpListener::bind(address)?;
        let address = listener.local_addr()?;
        let stopping = Arc::new(AtomicBool::new(false));
        let stop = Arc::clone(&stopping);
        let accepting =
            Builder::new().name("upstream".into()).spawn(move || accept(listener, &stop))?;
        Ok(Self { address, stopping, accepting: Some(accepting) })
    }

    /// Closes the listener, waits for its connections to end, and returns how many requests have been answered.
    fn stop(&mut self) -> u64 {
        self.stopping.store(true, Ordering::Release);
        // This one is not served: it ends the wait for clients.
        drop(TcpStream::connect(self.address));
        self.accepting.take().and_then(|thread| thread.join().ok()).unwrap_or_default()
    }
}

fn accept(listener: TcpListener, stopping: &AtomicBool) -> u64 {
    let answered = AtomicU64::new(0);
    thread::scope(|scope| {
        while let Ok((client, _address)) = listener.accept() {
            if stopping.load(Ordering::Acquire) {
                break;
            }
            let answered = &answered;
            if spawn(scope, move || answer_lines(&client, answered)).is_err() {
                break;
            }
        }
        // Nobody listens from here on; the scope waits for the connections that are left.
        drop(listener);
    });
    answered.into_inner()
}

/// Answers each line with itself until the client ends; a client in trouble will tell of it by itself.
fn answer_lines(mut client: &TcpStream, answered: &AtomicU64) {
    if client.set_read_timeout(Some(OPERATION_TIMEOUT)).is_err() {
        return;
    }
    let mut lines = BufReader::new(client);
    let mut line = String::new();
    while lines.by_ref().take(LINE_BYTES_MAX).read_line(&mut line).is_ok_and(|bytes| bytes > 0) {
        if line.starts_with("slow") {
            thread::sleep(SLOW_ANSWER);
        }
        if client.write_all(line.as_bytes()).is_err() {
            return;
        }
        answered.fetch_add(1, Ordering::Relaxed);
        line.clear();
    }
}

/// Prints the story: a line for each step, and the live line below them.
struct Screen {
    started: Instant,
    is_terminal: bool,
}

impl Screen {
    fn new() -> Self {
        Self { started: Instant::now(), is_terminal: io::stdout().is_terminal() }
    }

    /// Tells a step, with its time.
    fn tell(&self, who: &str, what: impl Display) {
        self.print(&format!("{} {who:<9} {what}\n", self.time()));
    }

    /// Writes the live line until `ended` has no sender any more.
    fn show_live(&self, load: &Load, handle: &Handle, ended: &Receiver<()>) {
        let interval = if self.is_terminal { TERMINAL_INTERVAL } else { LOG_INTERVAL };
        while ended.recv_timeout(interval) == Err(RecvTimeoutError::Timeout) {
            let status = handle.status();
            let state = if status.paused { "paused" } else { "running" };
            self.print(&format!(
                "{} {state:<9} requests {:>6}   held {:>2}   active {:>2}   failed {}{}",
                self.time(),
                load.operations(),
                status.held,
                status.connecting + status.active,
                load.failed.load(Ordering::Relaxed),
                if self.is_terminal { "" } else { "\n" },
            ));
        }
    }

    /// Writes `text` over the live line, at once and whole. Whether somebody reads it does not matter to the story.
    fn print(&self, text: &str) {
        let erase = if self.is_terminal { "\r\x1b[K" } else { "" };
        let mut stdout = io::stdout().lock();
        stdout.write_all(format!("{erase}{text}").as_bytes()).and_then(|()| stdout.flush()).ok();
    }

    fn time(&self) -> String {
        format!("{:6.2}s", self.started.elapsed().as_secs_f64())
    }
}
