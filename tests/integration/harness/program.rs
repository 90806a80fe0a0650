//! The real binary: run to its end, or as a proxy that serves.

use std::{
    env,
    ffi::{OsStr, OsString},
    fs,
    io::{BufRead, BufReader, Read},
    os::fd::OwnedFd,
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::{Arc, Condvar, Mutex},
    thread::{self, JoinHandle},
    time::Instant,
};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use super::{GLANCE, PATIENCE, spawn};

/// Variable with the path of the binary, if it is not where it was built: `.ci/unprivileged` copies it.
const BINARY: &str = "TCPAUSE_BIN";

/// Returns the path of the binary under test.
pub(crate) fn binary() -> OsString {
    env::var_os(BINARY).unwrap_or_else(|| env!("CARGO_BIN_EXE_tcpause").into())
}

/// Returns a call of the binary under test, in an empty directory, so that it finds no configuration of this machine.
pub(crate) fn program() -> Program {
    Program {
        args: Vec::new(),
        envs: Vec::new(),
        dir: Arc::new(tempfile::tempdir().expect("a directory")),
        sockets: Vec::new(),
        before: String::new(),
        under: String::new(),
    }
}

/// Call of the binary, before it runs.
pub(crate) struct Program {
    pub(super) args: Vec<OsString>,
    pub(super) envs: Vec<(String, String)>,
    pub(super) dir: Arc<TempDir>,
    /// Sockets that it begins with, at most two: the descriptors of input and output are the only ones that can be passed.
    pub(super) sockets: Vec<OwnedFd>,
    /// Shell commands that run first in its process, each with a trailing `&&`.
    pub(super) before: String,
    /// Shell words before its name, for another program that runs it.
    pub(super) under: String,
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

    /// Returns a path in the program's working directory.
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
        // Without unsafe code, inherited limits can only be set by the child itself. So the child is a shell, which sets them
        // and becomes the program.
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
        let mut sockets = self.sockets.iter().map(|socket| socket.try_clone().expect("a socket"));
        command.stdin(sockets.next().map_or_else(Stdio::null, Stdio::from));
        command.stdout(sockets.next().map_or_else(Stdio::piped, Stdio::from));
        command.stderr(Stdio::piped());
        command
    }
}

/// Outcome of a call.
#[derive(Debug, Clone)]
pub(crate) struct Finished {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// Running process, which is killed when this is dropped.
pub(super) struct Process {
    pub(super) child: Child,
    pub(super) log: Arc<Log>,
    stdout: Option<JoinHandle<String>>,
}

/// Lines that the process has written to stderr so far.
#[derive(Default)]
pub(super) struct Log {
    pub(super) state: Mutex<LogState>,
    grown: Condvar,
}

#[derive(Default)]
pub(super) struct LogState {
    pub(super) lines: Vec<String>,
    ended: bool,
}

impl Process {
    pub(super) fn start(program: &Program) -> Self {
        let mut child = program.command().spawn().expect("the binary");
        let log = Arc::new(Log::default());
        let (stderr, lines) = (child.stderr.take().expect("a pipe"), log.clone());
        drop(spawn(move || lines.fill(stderr)));
        let stdout = child.stdout.take();
        let stdout = spawn(move || {
            let mut text = Vec::new();
            stdout.map(|mut pipe| pipe.read_to_end(&mut text).expect("a pipe that can be read"));
            String::from_utf8(text).expect("text on stdout")
        });
        Self { child, log, stdout: Some(stdout) }
    }

    /// Waits for the end and returns the exit code, or 128 and the signal's number for a killed process. Returns `None` if the
    /// process does not end in time.
    pub(super) fn wait(&mut self) -> Option<i32> {
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

    pub(super) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("a process of ours");
    }

    pub(super) fn stdout(&mut self) -> String {
        self.stdout.take().expect("the first call").join().expect("the reader of stdout")
    }

    /// Returns the whole log. It waits for the log's end, so the process must have ended.
    pub(super) fn log(&self) -> String {
        self.log.wait(|state| state.ended.then(|| state.lines.join("\n"))).unwrap_or_default()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // An error means that the process has ended already.
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

    /// Waits until `look` finds something in the log, and returns it. Returns `None` if the log ends, or after [`PATIENCE`].
    pub(super) fn wait<T>(&self, mut look: impl FnMut(&LogState) -> Option<T>) -> Option<T> {
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

    pub(super) fn text(&self) -> String {
        self.state.lock().unwrap().lines.join("\n")
    }
}
