//! The real binary: run to its end, or as a proxy that serves.

use std::{
    env,
    ffi::{OsStr, OsString},
    fs,
    io::{BufRead, BufReader, ErrorKind, Read},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Condvar, Mutex},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, prlimit};
use tempfile::TempDir;

use super::{Addr, Control, Family, GLANCE, PATIENCE, Stream, Upstream, spawn};

/// Tells how many pipes the proxies of the tests may have, where a test does not say so itself.
const PIPES: &str = "TCPAUSE_PIPES";

/// Tells where the binary is, if it is not where it was built: `.ci/unprivileged` copies it.
const BINARY: &str = "TCPAUSE_BIN";

/// Where the binary under test is.
pub(crate) fn binary() -> OsString {
    env::var_os(BINARY).unwrap_or_else(|| env!("CARGO_BIN_EXE_tcpause").into())
}

/// The unit in which the kernel shows processor time (`USER_HZ`).
const CPU_TICKS_PER_SECOND: u32 = 100;

/// How long processor time is looked at.
const CPU_WINDOW: Duration = Duration::from_millis(500);

/// What a proxy with nothing to do may use of a core, in percent. It is far less on a machine that has time.
pub(crate) const CPU_PERCENT_MAX: u128 = 20;

/// The binary under test, with no configuration of this machine in reach.
pub(crate) fn program() -> Program {
    Program {
        args: Vec::new(),
        envs: Vec::new(),
        dir: Arc::new(tempfile::tempdir().expect("a directory")),
        before: String::new(),
        under: String::new(),
    }
}

/// One call of the binary, to be run.
pub(crate) struct Program {
    args: Vec<OsString>,
    envs: Vec<(String, String)>,
    dir: Arc<TempDir>,
    /// Shell commands that run first in its process, each with `&&` behind it.
    before: String,
    /// The words of the shell before its name: what runs it, if that is another program.
    under: String,
}

impl Program {
    pub(crate) fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    pub(crate) fn args<S: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.args.extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    pub(crate) fn env(mut self, name: &str, value: &str) -> Self {
        self.envs.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Writes a file into the program's working directory.
    pub(crate) fn file(self, name: &str, content: impl AsRef<[u8]>) -> Self {
        fs::write(self.path(name), content).expect("a file");
        self
    }

    /// A path in the program's working directory.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Runs it to its end.
    #[track_caller]
    pub(crate) fn run(self) -> Finished {
        let called = format!("{:?}", self.args);
        let mut process = Process::start(&self);
        let code = process
            .wait()
            .unwrap_or_else(|| panic!("tcpause {called} does not end:\n{}", process.log()));
        Finished { code, stdout: process.stdout(), stderr: process.log() }
    }

    fn command(&self) -> Command {
        let binary = binary();
        // What a child inherits can only be set in the child itself, without unsafe code: the shell does it and becomes
        // the program.
        let mut command = if self.before.is_empty() && self.under.is_empty() {
            Command::new(binary)
        } else {
            let mut shell = Command::new("/bin/sh");
            let line = format!("{}exec {} \"$0\" \"$@\"", self.before, self.under);
            shell.arg("-c").arg(line).arg(binary);
            shell
        };
        command.args(&self.args).current_dir(self.dir.path()).env_remove("RUST_LOG");
        command.envs(self.envs.iter().map(|(name, value)| (name, value)));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }
}

/// What a call has left behind.
#[derive(Debug, Clone)]
pub(crate) struct Finished {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// A running process; it dies with its owner.
struct Process {
    child: Child,
    log: Arc<Log>,
    stdout: Option<JoinHandle<String>>,
}

/// What the process has written to stderr so far.
#[derive(Default)]
struct Log {
    state: Mutex<LogState>,
    grown: Condvar,
}

#[derive(Default)]
struct LogState {
    lines: Vec<String>,
    ended: bool,
}

impl Process {
    fn start(program: &Program) -> Self {
        let mut child = program.command().spawn().expect("the binary");
        let log = Arc::new(Log::default());
        let (stderr, lines) = (child.stderr.take().expect("a pipe"), log.clone());
        drop(spawn(move || lines.fill(stderr)));
        let mut stdout = child.stdout.take().expect("a pipe");
        let stdout = spawn(move || {
            let mut text = Vec::new();
            stdout.read_to_end(&mut text).expect("a pipe that can be read");
            String::from_utf8(text).expect("text on stdout")
        });
        Self { child, log, stdout: Some(stdout) }
    }

    /// The exit code, with 128 and the signal's number for a killed process; nothing if it does not end.
    fn wait(&mut self) -> Option<i32> {
        use std::os::unix::process::ExitStatusExt as _;
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().expect("a child") {
                return status.code().or_else(|| status.signal().map(|signal| 128 + signal));
            }
            if Instant::now() > deadline {
                return None;
            }
            thread::sleep(GLANCE);
        }
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("a process of ours");
    }

    fn stdout(&mut self) -> String {
        self.stdout.take().expect("the first call").join().expect("the reader of stdout")
    }

    /// The whole log; waits for the end of it, so only for a process that has ended.
    fn log(&self) -> String {
        self.log.wait(|state| state.ended.then(|| state.lines.join("\n"))).unwrap_or_default()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // An error says that it has ended already.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

impl Log {
    fn fill(&self, stderr: impl Read) {
        for line in BufReader::new(stderr).split(b'\n') {
            let line =
                String::from_utf8_lossy(&line.expect("a pipe that can be read")).into_owned();
            self.state.lock().unwrap().lines.push(line);
            self.grown.notify_all();
        }
        self.state.lock().unwrap().ended = true;
        self.grown.notify_all();
    }

    /// Waits until `look` sees what it wants.
    fn wait<T>(&self, mut look: impl FnMut(&LogState) -> Option<T>) -> Option<T> {
        let deadline = Instant::now() + PATIENCE;
        let mut state = self.state.lock().unwrap();
        loop {
            if let Some(seen) = look(&state) {
                return Some(seen);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || state.ended {
                return None;
            }
            state = self.grown.wait_timeout(state, left).unwrap().0;
        }
    }

    fn text(&self) -> String {
        self.state.lock().unwrap().lines.join("\n")
    }
}

/// How a proxy is to be started.
pub(crate) struct Builder {
    program: Program,
    proxy: Option<Addr>,
    control: Option<Addr>,
    upstream: Option<String>,
    level: Option<&'static str>,
    grace_period: Option<&'static str>,
}

impl Builder {
    /// The kind of address that clients connect to; the default is IPv4.
    pub(crate) fn listen(self, family: Family) -> Self {
        let addr = Addr::free(family, self.program.dir.path(), "proxy.sock");
        self.listen_at(&addr)
    }

    pub(crate) fn listen_at(self, addr: &Addr) -> Self {
        Self { proxy: Some(addr.clone()), ..self }
    }

    /// The kind of address of the control API; the default is IPv4.
    pub(crate) fn control(self, family: Family) -> Self {
        let addr = Addr::free(family, self.program.dir.path(), "control.sock");
        self.control_at(&addr)
    }

    pub(crate) fn control_at(self, addr: &Addr) -> Self {
        Self { control: Some(addr.clone()), ..self }
    }

    pub(crate) fn upstream(self, upstream: &Upstream) -> Self {
        self.upstream_at(upstream.addr())
    }

    pub(crate) fn upstream_at(self, addr: &impl ToString) -> Self {
        Self { upstream: Some(addr.to_string()), ..self }
    }

    pub(crate) fn arg(self, arg: impl AsRef<OsStr>) -> Self {
        Self { program: self.program.arg(arg), ..self }
    }

    pub(crate) fn args<S: AsRef<OsStr>>(self, args: impl IntoIterator<Item = S>) -> Self {
        Self { program: self.program.args(args), ..self }
    }

    pub(crate) fn env(self, name: &str, value: &str) -> Self {
        Self { program: self.program.env(name, value), ..self }
    }

    pub(crate) fn file(self, name: &str, content: impl AsRef<[u8]>) -> Self {
        Self { program: self.program.file(name, content), ..self }
    }

    /// A path in the proxy's working directory.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.program.path(name)
    }

    /// The flag `--log-level`; the default of the tests is `debug`, and nothing leaves the flag out.
    pub(crate) fn log_level(self, level: Option<&'static str>) -> Self {
        Self { level, ..self }
    }

    /// How long a stop may take. The default of the tests is far beyond their patience, so that a stop that only ends
    /// because its time is up is found out. Nothing leaves the flag out.
    pub(crate) fn grace_period(self, grace_period: Option<&'static str>) -> Self {
        Self { grace_period, ..self }
    }

    /// Runs a shell command in the proxy's process before it is the proxy.
    pub(crate) fn before(mut self, command: &str) -> Self {
        self.program.before.push_str(command);
        self.program.before.push_str(" && ");
        self
    }

    /// The limit of open files of the proxy's process.
    pub(crate) fn descriptors(self, files: u32) -> Self {
        self.before(&format!("ulimit -n {files}"))
    }

    /// The umask of the proxy's process.
    pub(crate) fn umask(self, umask: u32) -> Self {
        self.before(&format!("umask {umask:04o}"))
    }

    /// Has another program run the proxy, in words of the shell. It gets the signals that the proxy would.
    pub(crate) fn under(mut self, program: impl Into<String>) -> Self {
        self.program.under = program.into();
        self
    }

    /// Starts it and waits until it serves.
    #[track_caller]
    pub(crate) fn start(self) -> Proxy {
        let mut proxy = self.launch();
        let listens = |name: &str| {
            let mark = format!("{name} listens on ");
            let line = proxy
                .process
                .log
                .wait(|state| state.lines.iter().find(|line| line.contains(&mark)).cloned());
            let line = line
                .unwrap_or_else(|| panic!("no \"{mark}…\" in the log:\n{}", proxy.log_so_far()));
            let rest = line.split_once(&mark).expect("it was found").1;
            let word = rest
                .split_whitespace()
                .next()
                .unwrap_or_default()
                .trim_end_matches([',', ';', '.']);
            Addr::parse(word).unwrap_or_else(|| panic!("no address: {line}"))
        };
        let (addr, control) = (listens("proxy"), listens("control"));
        proxy.addr = addr;
        proxy.control = Control::new(control);
        proxy
    }

    /// Starts it without waiting: the addresses must be known beforehand, as the log is not read.
    ///
    /// `TCPAUSE_PIPES=n` gives every proxy of the tests so many pipes for each worker; `make test-pipes` sets it.
    #[track_caller]
    pub(crate) fn launch(self) -> Proxy {
        let dir = self.program.dir.path();
        let addr = self.proxy.unwrap_or_else(|| Addr::free(Family::Tcp4, dir, "proxy.sock"));
        let control = self.control.unwrap_or_else(|| Addr::free(Family::Tcp4, dir, "control.sock"));
        let mut program =
            Program { dir: self.program.dir.clone(), args: Vec::new(), ..self.program };
        let options: [(&str, Option<OsString>); 6] = [
            ("--proxy-addr", Some(addr.to_string().into())),
            ("--control-addr", Some(control.to_string().into())),
            ("--upstream-addr", self.upstream.map(Into::into)),
            ("--log-level", self.level.map(Into::into)),
            ("--grace-period", self.grace_period.map(Into::into)),
            ("--proxy-pipes", env::var_os(PIPES)),
        ];
        // What a test says itself is not said twice.
        let given = &self.program.args;
        for (name, value) in options {
            if let Some(value) = value.filter(|_| given.iter().all(|arg| arg != name)) {
                program.args.extend([name.into(), value]);
            }
        }
        program.args.extend(self.program.args);
        let process = Process::start(&program);
        Proxy { process, addr, control: Control::new(control), dir: program.dir }
    }

    /// Starts it and waits until it has given up.
    #[track_caller]
    pub(crate) fn fail(self) -> Finished {
        self.launch().finish()
    }
}

/// A running proxy. It dies with its owner, and shows its log if the test has failed.
pub(crate) struct Proxy {
    process: Process,
    addr: Addr,
    control: Control,
    dir: Arc<TempDir>,
}

impl Proxy {
    pub(crate) fn builder() -> Builder {
        Builder {
            program: program(),
            proxy: None,
            control: None,
            upstream: None,
            level: Some("debug"),
            grace_period: Some("1h"),
        }
    }

    /// The usual proxy: TCP in front of `upstream`.
    #[track_caller]
    pub(crate) fn to(upstream: &Upstream) -> Self {
        Self::builder().upstream(upstream).start()
    }

    /// A builder of another proxy in the same directory.
    pub(crate) fn sibling(&self) -> Builder {
        let builder = Self::builder();
        Builder { program: Program { dir: self.dir.clone(), ..builder.program }, ..builder }
    }

    /// Where clients connect to.
    pub(crate) fn addr(&self) -> &Addr {
        &self.addr
    }

    pub(crate) fn control(&self) -> &Control {
        &self.control
    }

    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    #[track_caller]
    pub(crate) fn connect(&self) -> Stream {
        self.addr.connect()
    }

    /// Connects and waits until the proxy holds this client too.
    #[track_caller]
    pub(crate) fn connect_held(&self) -> Stream {
        let before = self.control.status().held;
        let stream = self.connect();
        self.control.wait_status("one more client is held", |status| status.held == before + 1);
        stream
    }

    pub(crate) fn terminate(&self) {
        self.process.signal(Signal::TERM);
    }

    pub(crate) fn signal(&self, signal: Signal) {
        self.process.signal(signal);
    }

    /// Signals it a second after a stop has begun: then a second signal counts.
    pub(crate) fn signal_a_second_later(&self, signal: Signal) {
        thread::sleep(Duration::from_secs(1));
        self.process.signal(signal);
    }

    /// Waits until new clients are refused, which shows that a stop has begun.
    #[track_caller]
    pub(crate) fn wait_refused(&self) {
        // Not merely left waiting: that is a timeout.
        super::wait_until("new clients are refused", || {
            self.addr.try_connect().is_err_and(|error| {
                matches!(error.kind(), ErrorKind::ConnectionRefused | ErrorKind::NotFound)
            })
        });
    }

    /// The exit code, with 128 and the signal's number for a killed process.
    #[track_caller]
    pub(crate) fn exit_code(&mut self) -> i32 {
        self.process
            .wait()
            .unwrap_or_else(|| panic!("it does not end:\n{}", self.process.log.text()))
    }

    /// Whether the process has ended.
    pub(crate) fn has_ended(&mut self) -> bool {
        self.process.child.try_wait().expect("a child").is_some()
    }

    /// Waits until it has given up.
    #[track_caller]
    pub(crate) fn finish(mut self) -> Finished {
        let code =
            self.process.wait().unwrap_or_else(|| panic!("it started:\n{}", self.log_so_far()));
        Finished { code, stdout: self.process.stdout(), stderr: self.process.log() }
    }

    #[track_caller]
    pub(crate) fn wait_for_log(&self, text: &str) -> String {
        let line = self
            .process
            .log
            .wait(|state| state.lines.iter().find(|line| line.contains(text)).cloned());
        line.unwrap_or_else(|| panic!("no {text:?} in the log:\n{}", self.log_so_far()))
    }

    /// How many lines of the log have `text` in them so far.
    pub(crate) fn log_count(&self, text: &str) -> usize {
        self.log_so_far().lines().filter(|line| line.contains(text)).count()
    }

    pub(crate) fn log_so_far(&self) -> String {
        self.process.log.text()
    }

    /// How many descriptors the process has open.
    pub(crate) fn descriptors(&self) -> usize {
        self.count_in("fd")
    }

    /// How many descriptors of one kind it has open; `socket:` and `pipe:` are kinds.
    pub(crate) fn descriptors_of(&self, kind: &str) -> usize {
        fs::read_dir(self.proc("fd"))
            .expect("a running process")
            // One that has been closed meanwhile has no target.
            .filter_map(|entry| fs::read_link(entry.ok()?.path()).ok())
            .filter(|target| target.to_string_lossy().starts_with(kind))
            .count()
    }

    pub(crate) fn threads(&self) -> usize {
        self.count_in("task")
    }

    /// Whether it has as many threads as `before`, or fewer. Those that `tiny_http` keeps for requests to come may be missing
    /// from an early count: it starts them in its own time.
    pub(crate) fn has_no_more_threads_than(&self, before: usize) -> bool {
        const KEPT_BY_TINY_HTTP: usize = 4;
        self.threads() <= before + KEPT_BY_TINY_HTTP
    }

    /// Where `/proc` shows the threads whose names begin with `name`.
    pub(crate) fn threads_named(&self, name: &str) -> Vec<PathBuf> {
        let tasks = fs::read_dir(self.proc("task")).expect("a running process");
        let is_named = |path: &PathBuf| {
            fs::read_to_string(path.join("comm")).is_ok_and(|comm| comm.starts_with(name))
        };
        tasks.map(|entry| entry.expect("a thread").path()).filter(is_named).collect()
    }

    /// The resident memory in KiB.
    pub(crate) fn memory_kib(&self) -> usize {
        self.status_kib("VmRSS:")
    }

    /// The most resident memory that there was at any time, in KiB.
    pub(crate) fn memory_peak_kib(&self) -> usize {
        self.status_kib("VmHWM:")
    }

    /// Changes a limit of the running process; nothing means the most that it may have.
    pub(crate) fn limit(&self, resource: Resource, current: Option<u64>) {
        let pid = Some(Pid::from_child(&self.process.child));
        let maximum = getrlimit(resource).maximum;
        prlimit(pid, resource, Rlimit { current: current.or(maximum), maximum }).expect("a limit");
    }

    fn status_kib(&self, name: &str) -> usize {
        let status = fs::read_to_string(self.proc("status")).expect("a running process");
        let line = status.lines().find_map(|line| line.strip_prefix(name)).expect("a line of it");
        line.trim().trim_end_matches(" kB").parse().expect("a number")
    }

    /// The processor time that it has used so far.
    pub(crate) fn cpu_time(&self) -> Duration {
        let stat = fs::read_to_string(self.proc("stat")).expect("a running process");
        // The name is the second field, in brackets, and may have anything in it.
        let fields = stat.rsplit_once(')').expect("a name").1.split_whitespace();
        // The fields 14 and 15: the time in the program and in the kernel.
        let ticks = fields.skip(11).take(2).map(|field| field.parse::<u64>().expect("a number"));
        Duration::from_secs(ticks.sum()) / CPU_TICKS_PER_SECOND
    }

    /// What it uses of a core, in percent, looked at for [`CPU_WINDOW`].
    pub(crate) fn cpu_percent(&self) -> u128 {
        let (begin, before) = (Instant::now(), self.cpu_time());
        thread::sleep(CPU_WINDOW);
        let used = self.cpu_time().saturating_sub(before);
        used.as_nanos() * 100 / begin.elapsed().as_nanos()
    }

    fn count_in(&self, name: &str) -> usize {
        fs::read_dir(self.proc(name)).expect("a running process").count()
    }

    fn proc(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/{name}", self.process.child.id()))
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        if thread::panicking() {
            println!("the log of tcpause {}:\n{}", self.process.child.id(), self.log_so_far());
        }
    }
}
