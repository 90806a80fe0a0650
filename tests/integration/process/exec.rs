//! `tcpause exec`: the pause is as long as the command, whatever becomes of either.

use std::{
    ffi::OsStr,
    fs::{self, Permissions},
    io::{BufRead, BufReader, Read, Write as _},
    os::unix::{fs::PermissionsExt as _, process::ExitStatusExt as _},
    process::{Child, ChildStdin, Command, Stdio},
    sync::mpsc::{Receiver, channel},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};

use crate::harness::{
    Control, End, Family, Finished, PATIENCE, Proxy, Random, Upstream, binary, echo, program,
    spawn, wait_until,
};

/// A command that tells when it has been started, goes on until it is told to end, and ends with this exit code.
pub(crate) const COMMAND: &str = "echo started; read ended; exit 7";

/// A lease that no test outlasts: only the end of the connection can end it in time.
const LONG: &str = "--ttl=1h";

/// A running exec; it dies with its owner.
pub(crate) struct Exec {
    child: Child,
    pub(crate) stdin: Option<ChildStdin>,
    pub(crate) stdout: Receiver<String>,
    pub(crate) stderr: Receiver<String>,
}

impl Exec {
    pub(crate) fn start<S: AsRef<OsStr>>(
        control: &Control,
        arguments: impl IntoIterator<Item = S>,
    ) -> Self {
        let mut command = Command::new(binary());
        command.arg("exec").arg(format!("--control-addr={}", control.addr())).args(arguments);
        Self::spawn(&mut command)
    }

    /// Runs [`COMMAND`] and waits until it runs.
    #[track_caller]
    pub(crate) fn running(control: &Control, options: &[&str]) -> Self {
        let mut exec =
            Self::start(control, [options, &[LONG, "--", "sh", "-c", COMMAND][..]].concat());
        exec.wait_started();
        exec
    }

    /// As `running`, by a caller that ignores a signal. Not each shell can do that with every signal: bash can.
    #[track_caller]
    fn ignoring(signal: &str, control: &Control) -> Self {
        let mut command = Command::new("bash");
        let script = format!("trap '' {signal}; exec \"$0\" exec \"$@\"");
        command.arg("-c").arg(script).arg(binary());
        command.arg(format!("--control-addr={}", control.addr())).args(["--", "sh", "-c", COMMAND]);
        let mut exec = Self::spawn(&mut command);
        exec.wait_started();
        exec
    }

    pub(crate) fn spawn(command: &mut Command) -> Self {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("the binary");
        let stdout = lines(child.stdout.take().unwrap());
        let stderr = lines(child.stderr.take().unwrap());
        Self { stdin: child.stdin.take(), stdout, stderr, child }
    }

    #[track_caller]
    pub(crate) fn wait_started(&mut self) {
        let line = self.stdout.recv_timeout(PATIENCE);
        let told = || self.stderr.try_iter().collect::<Vec<_>>();
        assert_eq!(line.as_deref(), Ok("started"), "{:?}", told());
    }

    #[track_caller]
    pub(crate) fn wait_told(&self, text: &str) {
        let line = self.stderr.recv_timeout(PATIENCE).expect("a line on stderr");
        assert!(line.contains(text), "{line}");
    }

    pub(super) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("a process of ours");
    }

    /// Lets the command end.
    pub(crate) fn end(&mut self) {
        drop(self.stdin.take().expect("the first call").write_all(b"\n"));
    }

    /// Waits until exec has ended. The exit code is one, not a signal: it outlives its command.
    #[track_caller]
    pub(crate) fn code(&mut self) -> i32 {
        let mut status = None;
        wait_until("exec has ended", || {
            status = self.child.try_wait().expect("a child");
            status.is_some()
        });
        let status = status.unwrap();
        status.code().unwrap_or_else(|| panic!("ended by signal {:?}", status.signal()))
    }

    /// Kills it as nothing can prevent, and waits until it is gone.
    pub(crate) fn kill(&mut self) {
        self.child.kill().expect("a process of ours");
        self.child.wait().expect("a child");
    }
}

impl Drop for Exec {
    fn drop(&mut self) {
        // An error says that it has ended already. Its command reads the end of its input, and ends.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

fn lines(source: impl Read + Send + 'static) -> Receiver<String> {
    let (sender, receiver) = channel();
    drop(spawn(move || {
        for line in BufReader::new(source).lines().map_while(Result::ok) {
            drop(sender.send(line));
        }
    }));
    receiver
}

/// Runs exec to its end.
#[track_caller]
fn run(control: &Control, arguments: &[&str]) -> Finished {
    let addr = format!("--control-addr={}", control.addr());
    program().arg("exec").arg(addr).args(arguments).run()
}

pub(crate) fn proxy() -> (Upstream, Proxy) {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::to(&upstream);
    (upstream, proxy)
}

/// `tcpause: paused for 2.1s, idle after 0.1s; the command ended with 0`
#[track_caller]
fn assert_summary(line: &str, end: &str) {
    let middle = line.strip_prefix("tcpause: paused for ").and_then(|rest| rest.strip_suffix(end));
    let times = middle.and_then(|middle| middle.split_once("s, idle after "));
    let is_time = |text: &str| text.parse::<f64>().is_ok();
    let is_it = |(paused, idle): (&str, &str)| {
        is_time(paused) && is_time(idle.strip_suffix('s').unwrap_or_default())
    };
    assert!(times.is_some_and(is_it), "{line}");
}

#[track_caller]
fn assert_serves(proxy: &Proxy) {
    assert!(!proxy.control().is_paused());
    proxy.connect().assert_echo(b"served");
}

#[test]
fn clients_are_held_as_long_as_the_command_runs() {
    for family in [Family::Tcp4, Family::Unix, Family::Abstract] {
        let upstream = Upstream::tcp(echo);
        let proxy = Proxy::builder().upstream(&upstream).control(family).start();
        let mut exec = Exec::running(proxy.control(), &[]);
        let status = proxy.control().get("/status");
        let reason = format!("sh -c {COMMAND}");
        assert!(status.text().contains(&reason), "no {reason:?} in {status}");
        let name = format!("\"exec-{}\"", exec.child.id());
        assert!(status.text().contains(&name), "no {name} in {status}");
        let mut held = proxy.connect_held();
        exec.end();
        assert_eq!(exec.code(), 7, "{family:?}");
        held.assert_echo(b"served");
        assert_serves(&proxy);
    }
}

#[test]
fn the_exit_code_is_that_of_the_command() {
    let (_upstream, proxy) = proxy();
    for (command, code, told) in [
        (&["true"][..], 0, "tcpause: paused for 0."),
        (&["sh", "-c", "exit 69"], 69, "s; the command ended with 69"),
        (&["sh", "-c", "echo told >&2; kill -9 $$"], 128 + 9, "told\ntcpause: paused for 0."),
    ] {
        let finished = run(proxy.control(), &[&[LONG, "--"], command].concat());
        assert_eq!((finished.code, &*finished.stdout), (code, ""), "{command:?}: {finished:?}");
        assert!(finished.stderr.contains(told), "{finished:?}");
        assert_serves(&proxy);
    }
    // The dashes are for commands that look like options, and arguments are the command's own.
    let finished = run(proxy.control(), &["echo", "--wait", "--", "-h"]);
    assert_eq!((finished.code, &*finished.stdout), (0, "--wait -- -h\n"));
}

#[test]
fn nobody_is_held_for_a_command_that_cannot_run() {
    let (_upstream, proxy) = proxy();
    // The wait for this client would take an hour.
    let mut client = proxy.connect();
    client.assert_echo(b"carried");
    for (command, code, told) in [
        ("/nonexistent", 127, "cannot run \"/nonexistent\": No such file"),
        ("no-such-command", 127, "cannot run \"no-such-command\": it is not in PATH"),
        ("/", 126, "cannot run \"/\": Permission denied"),
    ] {
        let finished = run(proxy.control(), &["--wait=1h", "--", command]);
        assert_eq!((finished.code, &*finished.stdout), (code, ""), "{finished:?}");
        assert!(finished.stderr.starts_with(&format!("tcpause: {told}")), "{finished:?}");
        assert!(finished.stderr.ends_with("; nothing was paused"), "{finished:?}");
    }
    assert_eq!(proxy.log_count("paused by"), 0);
    // What only the system finds out, it finds out while it is paused.
    drop(client);
    let script = program().file("script", "#!/nonexistent\n");
    let path = script.path("script");
    fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
    let finished = run(proxy.control(), &["--", path.to_str().unwrap()]);
    assert_eq!(finished.code, 127, "{finished:?}");
    assert!(finished.stderr.ends_with("; the pause is lifted"), "{finished:?}");
    assert_serves(&proxy);
}

#[test]
fn a_command_does_not_run_unless_idle() {
    let (_upstream, proxy) = proxy();
    let mut client = proxy.connect();
    client.assert_echo(b"carried");
    let finished = run(proxy.control(), &["--wait=50ms", "--", "sh", "-c", "echo it runs; exit 0"]);
    assert_eq!((finished.code, &*finished.stdout), (75, ""), "{finished:?}");
    assert!(finished.stderr.starts_with("tcpause: "), "{finished:?}");
    assert_eq!(finished.stderr.lines().count(), 1, "{finished:?}");
    let told = "--drain and --on-timeout kill; the command was not run";
    assert!(finished.stderr.ends_with(told), "{finished:?}");
    client.assert_echo(b"still carried");
    assert_serves(&proxy);

    let finished = run(proxy.control(), &["--wait=50ms", "--on-timeout=kill", "--", "echo", "ran"]);
    assert_eq!((finished.code, &*finished.stdout), (0, "ran\n"), "{finished:?}");
    let told = "s, connections reset: 1; the command ended with 0";
    assert!(finished.stderr.ends_with(told), "{finished:?}");
    assert_eq!(client.receive_all().end, End::Reset);
    assert_serves(&proxy);
}

#[test]
fn the_command_runs_once_the_last_client_has_left() {
    let (_upstream, proxy) = proxy();
    let mut client = proxy.connect();
    client.assert_echo(b"carried");
    let mut exec = Exec::start(proxy.control(), [LONG, "--", "sh", "-c", COMMAND]);
    wait_until("it is paused", || proxy.control().is_paused());
    client.assert_echo(b"still carried");
    assert_eq!(exec.stdout.try_recv().ok(), None);
    drop(client);
    exec.wait_started();
    exec.end();
    assert_eq!(exec.code(), 7);
    assert_serves(&proxy);
}

#[test]
fn kill_9_while_waiting_for_idle_ends_the_pause() {
    let (_upstream, proxy) = proxy();
    let mut client = proxy.connect();
    client.assert_echo(b"carried");
    let mut exec = Exec::start(proxy.control(), [LONG, "--", "echo", "started"]);
    wait_until("it is paused", || proxy.control().is_paused());
    let mut held = proxy.connect_held();
    exec.kill();
    held.assert_echo(b"served");
    wait_until("it is not paused", || !proxy.control().is_paused());
    assert_eq!(exec.stdout.recv_timeout(PATIENCE).ok(), None, "the command has run");
    client.assert_echo(b"still carried");
}

/// The command goes on, and has not inherited what the pause hangs on.
#[test]
fn kill_9_while_the_command_runs_ends_the_pause() {
    for family in [Family::Tcp4, Family::Unix] {
        let upstream = Upstream::tcp(echo);
        let proxy = Proxy::builder().upstream(&upstream).control(family).start();
        let mut exec = Exec::running(proxy.control(), &[]);
        let mut held = proxy.connect_held();
        exec.kill();
        held.assert_echo(b"served");
        wait_until("it is not paused", || !proxy.control().is_paused());
    }
}

/// The moment is anywhere between the start of exec and its end.
#[test]
fn kill_9_at_any_moment_ends_the_pause() {
    let (_upstream, proxy) = proxy();
    let begun = Instant::now();
    assert_eq!(run(proxy.control(), &[LONG, "--", "true"]).code, 0);
    let whole = u64::try_from(begun.elapsed().as_micros()).unwrap();
    let mut random = Random::new(5);
    for _ in 0..30 {
        let mut exec = Exec::start(proxy.control(), [LONG, "--", "true"]);
        std::thread::sleep(Duration::from_micros(random.below(whole)));
        exec.kill();
        proxy.connect().assert_echo(b"served");
        wait_until("it is not paused", || !proxy.control().is_paused());
    }
}

#[test]
fn a_stopped_exec_pauses_for_its_ttl_and_says_so() {
    let (_upstream, proxy) = proxy();
    let mut exec = Exec::start(proxy.control(), ["--ttl=300ms", "--", "sh", "-c", COMMAND]);
    exec.wait_started();
    exec.signal(Signal::STOP);
    let mut held = proxy.connect();
    held.assert_echo(b"served");
    wait_until("it is not paused", || !proxy.control().is_paused());
    exec.signal(Signal::CONT);
    exec.wait_told("the pause has ended before the command");
    exec.end();
    assert_eq!(exec.code(), 7);
}

#[test]
fn a_long_command_stays_paused() {
    let (_upstream, proxy) = proxy();
    let mut exec = Exec::start(proxy.control(), ["--ttl=600ms", "--", "sh", "-c", COMMAND]);
    exec.wait_started();
    let mut held = proxy.connect_held();
    // Three times as long as the lease lasts unless it is renewed.
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_millis(1_800) {
        let status = proxy.control().status();
        assert!(status.paused && status.held == 1, "{status:?}");
    }
    exec.end();
    assert_eq!(exec.code(), 7);
    held.assert_echo(b"served");
    let told = exec.stderr.iter().collect::<Vec<_>>();
    assert_eq!(told.len(), 1, "{told:?}");
    assert_summary(&told[0], "; the command ended with 7");
}

#[test]
fn of_two_at_once_the_last_one_resumes() {
    let (_upstream, proxy) = proxy();
    let (mut first, mut second) =
        (Exec::running(proxy.control(), &[]), Exec::running(proxy.control(), &[]));
    first.end();
    assert_eq!(first.code(), 7);
    let mut held = proxy.connect_held();
    assert!(proxy.control().is_paused());
    second.end();
    assert_eq!(second.code(), 7);
    held.assert_echo(b"served");
    assert_serves(&proxy);
}

#[test]
fn it_lifts_no_pause_but_its_own() {
    let (_upstream, proxy) = proxy();
    let mut first = Exec::running(proxy.control(), &["--name=deploy"]);
    let mut second = Exec::running(proxy.control(), &["--name=deploy"]);
    first.end();
    assert_eq!(first.code(), 7);
    assert!(proxy.control().is_paused());
    assert_eq!(proxy.control().put("/paused?name=deploy").status, 201);
    second.end();
    assert_eq!(second.code(), 7);
    let told = second.stderr.iter().collect::<String>();
    assert_summary(&told, "; the command ended with 7; still paused by deploy");
    assert_eq!(proxy.control().status().leases.len(), 1);
}

#[test]
fn one_may_run_inside_another() {
    let (_upstream, proxy) = proxy();
    let inner = format!(
        "{} exec --name inner --control-addr={} sh -c 'exit 3'; echo started $?; read ended; exit 7",
        binary().to_str().unwrap(),
        proxy.control().addr(),
    );
    let mut exec = Exec::start(proxy.control(), ["--name=outer", LONG, "--", "sh", "-c", &inner]);
    assert_eq!(exec.stdout.recv_timeout(PATIENCE).as_deref(), Ok("started 3"));
    let status = proxy.control().get("/status");
    assert!(status.text().contains("outer") && !status.text().contains("\"inner\""), "{status}");
    let mut held = proxy.connect_held();
    exec.end();
    assert_eq!(exec.code(), 7);
    held.assert_echo(b"served");
}

#[test]
fn a_pause_that_is_lifted_meanwhile_is_told_and_the_command_goes_on() {
    let (_upstream, proxy) = proxy();
    let mut exec = Exec::running(proxy.control(), &["--name=deploy"]);
    proxy.control().resume();
    exec.wait_told("the pause has ended before the command");
    assert_serves(&proxy);
    // Another's pause of that name is not lifted at the end.
    assert_eq!(proxy.control().put("/paused?name=deploy").status, 201);
    exec.end();
    assert_eq!(exec.code(), 7);
    assert!(proxy.control().is_paused());
}

#[test]
fn a_proxy_that_dies_meanwhile_is_told_and_the_command_goes_on() {
    for (command, code) in [(COMMAND, 7), ("echo started; read ended", 69)] {
        let (_upstream, mut proxy) = proxy();
        let mut exec = Exec::start(proxy.control(), [LONG, "--", "sh", "-c", command]);
        exec.wait_started();
        proxy.signal(Signal::KILL);
        proxy.exit_code();
        exec.wait_told("the proxy has gone away");
        exec.end();
        assert_eq!(exec.code(), code);
        exec.wait_told("the proxy went away while the command ran");
    }
}

#[test]
fn without_a_proxy_nothing_runs() {
    let (_upstream, mut proxy) = proxy();
    proxy.signal(Signal::KILL);
    proxy.exit_code();
    let finished = run(proxy.control(), &["--", "echo", "ran"]);
    assert_eq!((finished.code, &*finished.stdout), (69, ""), "{finished:?}");
    assert!(finished.stderr.contains("cannot reach the control API at tcp://"), "{finished:?}");
}

#[test]
fn a_signal_while_waiting_undoes_the_pause() {
    let (_upstream, proxy) = proxy();
    let mut client = proxy.connect();
    client.assert_echo(b"carried");
    for signal in [Signal::INT, Signal::TERM, Signal::HUP] {
        let mut exec = Exec::start(proxy.control(), [LONG, "--", "echo", "started"]);
        wait_until("it is paused", || proxy.control().is_paused());
        exec.signal(signal);
        assert_eq!(exec.code(), 128 + signal.as_raw());
        wait_until("it is not paused", || !proxy.control().is_paused());
        assert_eq!(exec.stdout.recv_timeout(PATIENCE).ok(), None, "the command has run");
        exec.wait_told("the command was not run");
    }
}

#[test]
fn signals_are_passed_on_to_the_command() {
    let (_upstream, proxy) = proxy();
    for (signal, name) in
        [(Signal::TERM, "TERM"), (Signal::HUP, "HUP"), (Signal::INT, "INT"), (Signal::QUIT, "QUIT")]
    {
        let command = format!("trap 'exit 5' {name}; {COMMAND}");
        let mut exec = Exec::start(proxy.control(), [LONG, "--", "sh", "-c", &command]);
        exec.wait_started();
        exec.signal(signal);
        assert_eq!(exec.code(), 5, "{name}");
        assert_serves(&proxy);
    }
}

/// A caller that ignores the ends of its children hands that on, and the kernel would reap the command.
#[test]
fn the_exit_code_comes_also_where_children_are_ignored() {
    let (_upstream, proxy) = proxy();
    let mut exec = Exec::ignoring("CHLD", proxy.control());
    exec.end();
    assert_eq!(exec.code(), 7);
}

#[test]
fn what_is_ignored_stays_ignored() {
    let (_upstream, proxy) = proxy();
    let mut exec = Exec::ignoring("HUP", proxy.control());
    exec.signal(Signal::HUP);
    exec.end();
    assert_eq!(exec.code(), 7);
}
