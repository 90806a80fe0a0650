//! The real binary as a proxy that serves.

use std::{
    env,
    ffi::{OsStr, OsString},
    fs,
    io::ErrorKind,
    os::{fd::AsFd, unix::net::UnixDatagram},
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, prlimit};
use tempfile::TempDir;

use super::{
    Addr, Control, Family, Finished, PATIENCE, Program, Response, Stream, Upstream,
    program::{Process, program},
};

/// Variable with the number of pipes of each worker, for proxies of tests that do not set it themselves.
const PIPES: &str = "TCPAUSE_PIPES";

/// Unit in which the kernel shows processor time (`USER_HZ`).
const CPU_TICKS_PER_SECOND: u32 = 100;

/// Time over which the use of the processor is measured.
const CPU_WINDOW: Duration = Duration::from_millis(500);

/// Largest share of a core, in percent, that an idle proxy may use. The share is far less on a machine without other load.
pub(crate) const CPU_PERCENT_MAX: u128 = 20;

/// A proxy that is to be started.
pub(crate) struct Builder {
    program: Program,
    proxy: Option<Addr>,
    control: Option<Addr>,
    upstream: Option<String>,
    level: Option<&'static str>,
    grace_period: Option<&'static str>,
}

impl Builder {
    /// Sets the kind of address that clients connect to; the default is IPv4.
    pub(crate) fn listen(self, family: Family) -> Self {
        let addr = Addr::free(family, self.program.dir.path(), "proxy.sock");
        self.listen_at(&addr)
    }

    pub(crate) fn listen_at(self, addr: &Addr) -> Self {
        Self { proxy: Some(addr.clone()), ..self }
    }

    /// Sets the kind of address of the control API; the default is IPv4.
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

    /// Returns a path in the proxy's working directory.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.program.path(name)
    }

    /// Sets `--log-level`; the default of the tests is `debug`, and `None` leaves the option out.
    pub(crate) fn log_level(self, level: Option<&'static str>) -> Self {
        Self { level, ..self }
    }

    /// Sets `--grace-period`. The default of the tests is far beyond [`PATIENCE`](super::PATIENCE), so that a stop that only
    /// ends with its grace period fails the test. `None` leaves the option out.
    pub(crate) fn grace_period(self, grace_period: Option<&'static str>) -> Self {
        Self { grace_period, ..self }
    }

    /// Passes sockets to the proxy as systemd does, with the names of `LISTEN_FDNAMES`.
    pub(crate) fn pass(mut self, names: Option<&str>, sockets: &[&dyn AsFd]) -> Self {
        let own = |socket: &&dyn AsFd| socket.as_fd().try_clone_to_owned().expect("a socket");
        self.program.sockets = sockets.iter().map(own).collect();
        let count = sockets.len();
        let moved =
            if count > 1 { "exec 3<&0 4>&1 </dev/null >/dev/null" } else { "exec 3<&0 </dev/null" };
        let variable = names.map_or_else(String::new, |names| format!(" LISTEN_FDNAMES={names}"));
        self.before(&format!("{moved} && export LISTEN_PID=$$ LISTEN_FDS={count}{variable}"))
    }

    /// Runs a shell command in the process that then becomes the proxy.
    pub(crate) fn before(mut self, command: &str) -> Self {
        self.program.before.push_str(command);
        self.program.before.push_str(" && ");
        self
    }

    /// Sets the limit of open files of the proxy's process.
    pub(crate) fn descriptors(self, files: u32) -> Self {
        self.before(&format!("ulimit -n {files}"))
    }

    /// Sets the umask of the proxy's process.
    pub(crate) fn umask(self, umask: u32) -> Self {
        self.before(&format!("umask {umask:04o}"))
    }

    /// Has a service manager follow the proxy, as systemd does: an upgrade then leads to another process.
    pub(crate) fn followed(self) -> Self {
        let path = self.path("notify");
        let manager = UnixDatagram::bind(&path).expect("a socket");
        manager.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        // It closes descriptors that come along, as they are not received.
        super::spawn(move || while manager.recv(&mut [0; 4096]).is_ok() {});
        self.env("NOTIFY_SOCKET", &path.display().to_string())
    }

    /// Runs the proxy under another program, given in the shell's syntax. That program gets the signals meant for the proxy.
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
                .trim_end_matches([',', ';', '.', '"', '}']);
            Addr::parse(word).unwrap_or_else(|| panic!("no address: {line}"))
        };
        let (addr, control) = (listens("proxy"), listens("control"));
        proxy.addr = addr;
        proxy.control = Control::new(control);
        proxy
    }

    /// Starts it without waiting. The addresses must be known beforehand, as the log is not read.
    ///
    /// `TCPAUSE_PIPES=n` gives every proxy of the tests `n` pipes for each worker; `make test-pipes` sets it.
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
        // An option of the test itself replaces the default.
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

    /// Starts it and waits until the start has failed.
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

    /// Returns the address that clients connect to.
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
        self.signal(Signal::TERM);
    }

    pub(crate) fn signal(&self, signal: Signal) {
        match self.heirs().pop().and_then(|pid| Pid::from_raw(pid.cast_signed())) {
            Some(heir) => kill_process(heir, signal).expect("a running process"),
            None => self.process.signal(signal),
        }
    }

    /// Signals it a second after a stop has begun. A further stop signal counts only then.
    pub(crate) fn signal_a_second_later(&self, signal: Signal) {
        thread::sleep(Duration::from_secs(1));
        self.process.signal(signal);
    }

    /// Waits until new clients are refused, which shows that a stop has begun.
    #[track_caller]
    pub(crate) fn wait_refused(&self) {
        // A timeout would mean that the client waits in the backlog, and is not refused.
        super::wait_until("new clients are refused", || {
            self.addr.try_connect().is_err_and(|error| {
                matches!(error.kind(), ErrorKind::ConnectionRefused | ErrorKind::NotFound)
            })
        });
    }

    /// Waits for the end and returns the exit code, or 128 and the signal's number for a killed process.
    #[track_caller]
    pub(crate) fn exit_code(&mut self) -> i32 {
        self.process
            .wait()
            .unwrap_or_else(|| panic!("it does not end:\n{}", self.process.log.text()))
    }

    /// Returns true if the process has ended.
    pub(crate) fn has_ended(&mut self) -> bool {
        self.process.child.try_wait().expect("a child").is_some()
    }

    /// Waits until the process has ended.
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

    /// Returns the number of lines of the log so far that have `text` in them.
    pub(crate) fn log_count(&self, text: &str) -> usize {
        self.log_so_far().lines().filter(|line| line.contains(text)).count()
    }

    pub(crate) fn log_so_far(&self) -> String {
        self.process.log.text()
    }

    /// Returns the number of the process: the first one, or the last that has taken over.
    pub(crate) fn pid(&self) -> u32 {
        self.heirs().pop().unwrap_or_else(|| self.first_pid())
    }

    /// Returns the number of the first process.
    pub(crate) fn first_pid(&self) -> u32 {
        self.process.child.id()
    }

    /// Has a new process take over. Returns the answer.
    #[track_caller]
    pub(crate) fn upgrade(&self) -> Response {
        let before = self.heirs().len();
        let answer = self.control.request("POST", "/upgrade", &[]);
        assert_eq!(answer.status, 200, "{answer:?}\n{}", self.log_so_far());
        super::wait_until("the log tells who goes on", || self.heirs().len() > before);
        answer
    }

    /// Lists the processes that have taken over.
    pub(crate) fn heirs(&self) -> Vec<u32> {
        let log = self.log_so_far();
        let told = log.lines().filter_map(|line| line.split_once(" has taken over, pid "));
        let pids = told.filter_map(|(_, rest)| rest.split([',', ' ']).next()?.parse().ok());
        pids.collect()
    }

    /// Returns the number of descriptors that the process has open.
    pub(crate) fn descriptors(&self) -> usize {
        self.count_in("fd")
    }

    /// Returns the number of descriptors of one kind that it has open; `socket:` and `pipe:` are kinds.
    pub(crate) fn descriptors_of(&self, kind: &str) -> usize {
        fs::read_dir(self.proc("fd"))
            .expect("a running process")
            // A descriptor that was closed meanwhile has no target.
            .filter_map(|entry| fs::read_link(entry.ok()?.path()).ok())
            .filter(|target| target.to_string_lossy().starts_with(kind))
            .count()
    }

    pub(crate) fn threads(&self) -> usize {
        self.count_in("task")
    }

    /// Returns true if it has no more threads than `before`. Four more are allowed, which `tiny_http` keeps for later requests
    /// and may start after an early count.
    pub(crate) fn has_no_more_threads_than(&self, before: usize) -> bool {
        const KEPT_BY_TINY_HTTP: usize = 4;
        self.threads() <= before + KEPT_BY_TINY_HTTP
    }

    /// Returns the folders of `/proc` of the threads whose names begin with `name`.
    pub(crate) fn threads_named(&self, name: &str) -> Vec<PathBuf> {
        let tasks = fs::read_dir(self.proc("task")).expect("a running process");
        let is_named = |path: &PathBuf| {
            fs::read_to_string(path.join("comm")).is_ok_and(|comm| comm.starts_with(name))
        };
        tasks.map(|entry| entry.expect("a thread").path()).filter(is_named).collect()
    }

    /// Returns the resident memory in KiB, without pages of files, as the binary's pages come and go.
    pub(crate) fn memory_kib(&self) -> usize {
        self.status_kib("RssAnon:")
    }

    /// Returns the peak of the resident memory in KiB.
    pub(crate) fn memory_peak_kib(&self) -> usize {
        self.status_kib("VmHWM:")
    }

    /// Changes a limit of the running process; `None` means its hard limit.
    pub(crate) fn limit(&self, resource: Resource, current: Option<u64>) {
        let pid = Pid::from_raw(self.pid().cast_signed());
        let maximum = getrlimit(resource).maximum;
        prlimit(pid, resource, Rlimit { current: current.or(maximum), maximum }).expect("a limit");
    }

    /// Lowers the limit of open files until so many more can be opened: the limit bounds their numbers, not their count.
    pub(crate) fn leave_descriptors(&self, count: usize) {
        let is_free = |number: &u64| !self.proc(&format!("fd/{number}")).exists();
        let limit = (0..).filter(is_free).nth(count).expect("a free number");
        self.limit(Resource::Nofile, Some(limit));
    }

    fn status_kib(&self, name: &str) -> usize {
        let status = fs::read_to_string(self.proc("status")).expect("a running process");
        let line = status.lines().find_map(|line| line.strip_prefix(name)).expect("a line of it");
        line.trim().trim_end_matches(" kB").parse().expect("a number")
    }

    /// Returns the processor time that it has used so far.
    pub(crate) fn cpu_time(&self) -> Duration {
        let stat = fs::read_to_string(self.proc("stat")).expect("a running process");
        // The name is the second field, in brackets, and may have anything in it.
        let fields = stat.rsplit_once(')').expect("a name").1.split_whitespace();
        // Fields 14 and 15 are the time in the program and in the kernel.
        let ticks = fields.skip(11).take(2).map(|field| field.parse::<u64>().expect("a number"));
        Duration::from_secs(ticks.sum()) / CPU_TICKS_PER_SECOND
    }

    /// Returns the share of a core that it uses, in percent, measured over [`CPU_WINDOW`].
    pub(crate) fn cpu_percent(&self) -> u128 {
        let (begin, before) = (Instant::now(), self.cpu_time());
        thread::sleep(CPU_WINDOW);
        let used = self.cpu_time().saturating_sub(before);
        used.as_nanos() * 100 / begin.elapsed().as_nanos()
    }

    /// Returns the letter of its state (proc(5)): `T` for one that is stopped.
    pub(crate) fn state(&self) -> char {
        state_of(self.pid())
    }

    /// Returns the states of the processes that it has started.
    pub(crate) fn children(&self) -> Vec<char> {
        self.child_pids().into_iter().map(state_of).collect()
    }

    /// Returns the processes that it has started.
    pub(crate) fn child_pids(&self) -> Vec<u32> {
        child_pids_of(self.pid())
    }

    fn count_in(&self, name: &str) -> usize {
        fs::read_dir(self.proc(name)).expect("a running process").count()
    }

    fn proc(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/{name}", self.pid()))
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        if thread::panicking() {
            println!("the log of tcpause {}:\n{}", self.process.child.id(), self.log_so_far());
        }
        // They are children of nobody here. An error means that one has ended already.
        for heir in self.heirs().into_iter().filter_map(|pid| Pid::from_raw(pid.cast_signed())) {
            kill_process(heir, Signal::KILL).ok();
        }
    }
}

/// Returns the processes that a process has started.
pub(crate) fn child_pids_of(pid: u32) -> Vec<u32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("a running process");
    let list = |task: PathBuf| fs::read_to_string(task.join("children")).unwrap_or_default();
    let lists: String = tasks.flatten().map(|task| list(task.path())).collect();
    lists.split(' ').filter_map(|pid| pid.parse().ok()).collect()
}

/// Returns the letter of a process's state, `Z` for one that is gone.
pub(crate) fn state_of(pid: u32) -> char {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next()).unwrap_or('Z')
}
