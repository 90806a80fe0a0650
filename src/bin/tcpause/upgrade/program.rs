//! The program that was called, and its start anew as the process that takes over.

use std::{
    env,
    ffi::{CString, OsStr, OsString},
    io,
    os::{
        fd::OwnedFd,
        unix::{ffi::OsStrExt as _, net::UnixStream, process::ExitStatusExt as _},
    },
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus},
    thread,
    time::Duration,
};

use crossbeam_channel::{Receiver, RecvTimeoutError, bounded};
use nix::unistd::execve;
use rustix::{
    fs::{Access, access},
    io::{Errno, retry_on_intr},
    process::{Pid, Signal, WaitId, WaitIdOptions, kill_process, waitid},
    stdio::dup2_stdin,
};
use signal_hook::{consts::SIGKILL, low_level::signal_name};
use tcpause::TakerProcess;

use super::{Attempt, GUARD, TAKE_BACK, TAKE_OVER};
use crate::{
    EXIT_REFUSED,
    client::look_up,
    signals::{block, unblock},
    systemd,
};

/// Longest wait for the end of a killed process. One that the kernel keeps for longer runs no code of its own any more.
const KILL_TIMEOUT: Duration = Duration::from_secs(1);

/// Program as it was called: at this place, an upgrade finds its successor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Program {
    /// Absolute path. A symlink stays one, as an update may lead it to another file.
    file: PathBuf,
    arguments: Vec<OsString>,
    folder: PathBuf,
}

impl Program {
    /// Remembers how this process was called. Later, the file may be replaced and the working directory be gone.
    pub(crate) fn remember() -> Result<Self, String> {
        let folder = env::current_dir().map_err(|error| {
            format!("there was no working directory at the start of this process: {error}")
        })?;
        Self::called(env::args_os(), folder, &env::var_os("PATH").unwrap_or_default())
    }

    fn called(
        mut words: impl Iterator<Item = OsString>,
        folder: PathBuf,
        path: &OsStr,
    ) -> Result<Self, String> {
        let name = words.next().unwrap_or_default();
        let found = if name.as_encoded_bytes().contains(&b'/') {
            PathBuf::from(name)
        } else {
            look_up(&name, path).map_err(|error| {
                let name = name.display();
                format!("this process was called {name:?}, and no such program can be run: {error}")
            })?
        };
        let words: Vec<OsString> = words.collect();
        let internal = match words.first() {
            Some(word) if word == TAKE_OVER => 1,
            Some(word) if word == TAKE_BACK || word == GUARD => 2,
            _ => 0,
        };
        let arguments = words.into_iter().skip(internal).collect();
        // As components, the path is without a dot.
        let file = folder.join(found).components().collect();
        Ok(Self { file, arguments, folder })
    }

    /// Starts the program as it was called before, with `channel` as standard input.
    pub(super) fn start(&self, channel: UnixStream, attempt: &Attempt) -> Result<Taker, String> {
        let (file, folder) = (self.file.display(), self.folder.display());
        // The error of the start itself would not tell which of the two is missing.
        access(self.folder.join("."), Access::EXEC_OK).map_err(|error| {
            format!("the working directory {folder} cannot be entered any more: {error}")
        })?;
        let mut command = Command::new(&self.file);
        command.arg(TAKE_OVER).args(&self.arguments).current_dir(&self.folder);
        for name in systemd::own_variables() {
            command.env_remove(name);
        }
        // A child has the signals of the thread that starts it.
        unblock();
        let child = command.stdin(OwnedFd::from(channel)).spawn();
        block();
        let child = child.map_err(|error| {
            format!("the new program {file} cannot be run: {error}{}", remedy(&error))
        })?;
        Taker::new(child, file.to_string(), attempt)
    }
}

impl Program {
    /// Runs the program in this process, as it was called before, with further arguments before the others and `channel` as
    /// standard input. Where it cannot be run, or is not known, that of this process is run again. Nothing of this process is
    /// left but its number, its parent and its children; signals wait if all threads block them. Returns the reason if that is
    /// impossible.
    pub(super) fn replace(
        program: Option<&Self>,
        further: [&str; 2],
        channel: Option<UnixStream>,
    ) -> io::Error {
        if let Some(channel) = channel
            && let Err(error) = dup2_stdin(channel)
        {
            return error.into();
        }
        let (file, arguments): (&Path, &[_]) = match program {
            // Where the folder is gone, this process is in it all the same.
            Some(Self { file, arguments, folder }) => {
                env::set_current_dir(folder).ok();
                (file, arguments)
            }
            None => (Path::new(OWN), &[]),
        };
        let words = [file.as_os_str()].into_iter().chain(further.map(OsStr::new));
        let words: Vec<_> =
            words.chain(arguments.iter().map(OsString::as_os_str)).map(c_string).collect();
        let mut variables: Vec<_> = env::vars_os().collect();
        variables.retain(|(name, _)| !systemd::of_sockets().any(|own| name == own));
        let variables = variables.into_iter().map(|(mut name, value)| {
            name.push("=");
            name.push(value);
            c_string(&name)
        });
        let variables: Vec<_> = variables.collect();
        let run = |file: &Path| match execve(&c_string(file.as_os_str()), &words, &variables) {
            Err(error) => io::Error::from(error),
        };
        let error = run(file);
        log::warn!("{} cannot be run any more, and its old program is: {error}", file.display());
        run(Path::new(OWN))
    }
}

/// Returns the remedy for a shortage, with the semicolon before it; nothing for another error.
pub(super) fn remedy(error: &io::Error) -> &'static str {
    match Errno::from_io_error(error) {
        Some(Errno::AGAIN) => "; raise the limit of processes (ulimit -u, TasksMax)",
        Some(Errno::NOMEM) => "; free memory, or raise the limit of memory (MemoryMax)",
        Some(Errno::MFILE) => "; raise the limit of open files (ulimit -n, LimitNOFILE)",
        _ => "",
    }
}

/// Program of this process, also if its file has been replaced.
const OWN: &str = "/proc/self/exe";

/// Returns the text for the kernel. What the kernel has passed to this process has no zero in it.
fn c_string(text: &OsStr) -> CString {
    CString::new(text.as_bytes()).unwrap_or_default()
}

/// Process that is to take over, a child of this one.
pub(super) struct Taker {
    child: Child,
    file: String,
    /// Channel that ends when the child does.
    end: Receiver<()>,
    status: Option<ExitStatus>,
    attempt: Attempt,
}

impl Taker {
    fn new(mut child: Child, file: String, attempt: &Attempt) -> Result<Self, String> {
        match wait_for(&child, WaitIdOptions::EXITED) {
            Ok(end) => {
                attempt.set_started(Some(Pid::from_child(&child)));
                Ok(Self { child, file, end, status: None, attempt: attempt.clone() })
            }
            Err(error) => {
                drop(child.kill().and_then(|()| child.wait()));
                Err(format!(
                    "cannot start the thread that waits for the new program: {error}; raise the limit of processes (ulimit -u, TasksMax)"
                ))
            }
        }
    }

    pub(super) fn number(&self) -> Pid {
        Pid::from_child(&self.child)
    }
}

/// Returns a channel that ends once a change of the child's state has come.
fn wait_for(child: &Child, change: WaitIdOptions) -> io::Result<Receiver<()>> {
    let pid = Pid::from_child(child);
    let (running, end) = bounded::<()>(0);
    let wait = move || {
        // The number stays that of the child until `Child::wait`, so that no other process is killed.
        retry_on_intr(|| waitid(WaitId::Pid(pid), change | WaitIdOptions::NOWAIT)).ok();
        drop(running);
    };
    thread::Builder::new().name("taker".to_owned()).spawn(wait)?;
    Ok(end)
}

impl TakerProcess for Taker {
    fn pid(&self) -> u32 {
        self.child.id()
    }

    fn stop(&mut self) {
        kill_process(self.number(), Signal::STOP).ok();
        match wait_for(&self.child, WaitIdOptions::EXITED | WaitIdOptions::STOPPED) {
            // One that the kernel keeps for longer runs no code of its own any more.
            Ok(stands) => drop(stands.recv_timeout(KILL_TIMEOUT)),
            Err(_) => self.kill(),
        }
    }

    fn resume(&mut self) {
        kill_process(self.number(), Signal::CONT).ok();
    }

    fn kill(&mut self) {
        if self.status.is_some() {
            return;
        }
        // An error means that it has ended.
        self.child.kill().ok();
        if self.end.recv_timeout(KILL_TIMEOUT) == Err(RecvTimeoutError::Timeout) {
            log::error!(
                "the new program, pid {}, does not die of SIGKILL; closes of connections reach their peers once it is gone",
                self.child.id()
            );
            return;
        }
        self.attempt.set_started(None);
        self.status = self.child.wait().ok();
    }
}

impl Taker {
    /// Returns the sentence for a hand-over that has failed by `why`, with the path of the program if that is the cause.
    pub(super) fn explain(&self, why: &str) -> String {
        let file = &self.file;
        // After a kill, the cause is the giver's; a taker that has told its own ends with a code of its own.
        let is_told = |status: &ExitStatus| {
            status.signal() == Some(SIGKILL) || status.code() == Some(EXIT_REFUSED.into())
        };
        if let Some(status) = self.status.filter(|status| !is_told(status)) {
            let end = end_of(status);
            return format!(
                "the new program {file} {end} before it took over; it may be too old to take over, and its own lines on standard error may tell why"
            );
        }
        match why.strip_prefix("the new program ") {
            Some(rest) => format!("the new program {file} {rest}"),
            None => why.to_owned(),
        }
    }
}

fn end_of(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("ended with exit code {code}"),
        (None, Some(signal)) => match signal_name(signal) {
            Some(name) => format!("was ended by {name}"),
            None => format!("was ended by signal {signal}"),
        },
        (None, None) => "ended".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        io::{Read, Write},
        net::Shutdown,
        os::unix::fs::{PermissionsExt as _, symlink},
        time::Instant,
    };

    use tempfile::TempDir;

    use super::*;

    /// Time that is long enough for any machine; only a defect makes a test wait for it.
    const DEADLINE: Duration = Duration::from_secs(20);

    fn words(words: &[&str]) -> impl Iterator<Item = OsString> {
        words.iter().map(OsString::from).collect::<Vec<_>>().into_iter()
    }

    fn called(name: &str, path: &str) -> Result<Program, String> {
        Program::called(words(&[name, "-c", "a"]), "/work".into(), OsStr::new(path))
    }

    #[test]
    fn the_program_is_the_one_that_was_called() {
        let folder = tempfile::tempdir().unwrap();
        let place = |name: &str| folder.path().join(name).display().to_string();
        fs::write(place("release-1"), "").unwrap();
        fs::set_permissions(place("release-1"), fs::Permissions::from_mode(0o755)).unwrap();
        symlink("release-1", place("tcpause")).unwrap();
        let path = format!("/nonexistent:{}", folder.path().display());
        for (name, file) in [
            (place("tcpause").as_str(), place("tcpause")),
            // A file that is not there may be there later.
            ("./bin/tcpause", "/work/bin/tcpause".to_owned()),
            ("../tcpause", "/work/../tcpause".to_owned()),
            ("/opt/tcpause", "/opt/tcpause".to_owned()),
            // A symlink stays one.
            ("tcpause", place("tcpause")),
        ] {
            let program = called(name, &path).unwrap();
            assert_eq!(program.file, Path::new(&file), "{name}");
            assert_eq!(program.arguments, ["-c", "a"]);
            assert_eq!(program.folder, Path::new("/work"));
        }
        for name in ["nosuch", ""] {
            let error = called(name, &path).unwrap_err();
            assert!(error.contains(&format!("{name:?}")) && error.contains("PATH"), "{error}");
        }
        // One that has taken over itself is called as the first was.
        let heir = words(&["/a", TAKE_OVER, "-c", "a"]);
        let heir = Program::called(heir, "/work".into(), OsStr::new("")).unwrap();
        assert_eq!(heir.arguments, ["-c", "a"]);
    }

    /// Returns a program that is this script for the shell, and the folder in which it lies and runs.
    fn script(text: &str) -> (Program, TempDir) {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("new");
        // Another process writes it: a child that a test starts meanwhile would keep a file of ours open, and an open file
        // cannot be run.
        let write = r#"printf '#!/bin/sh\n%s\n' "$1" > "$0" && chmod 755 "$0""#;
        let mut shell = Command::new("/bin/sh");
        assert!(shell.arg("-c").arg(write).arg(&file).arg(text).status().unwrap().success());
        let arguments = vec!["one".into(), "two words".into()];
        (Program { file, arguments, folder: folder.path().into() }, folder)
    }

    /// Starts a script, and returns what it writes into the channel until it ends it.
    fn start(text: &str) -> (Taker, String) {
        let (program, _folder) = script(text);
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(DEADLINE)).unwrap();
        let taker = program.start(theirs, &Attempt::default()).unwrap();
        let mut told = String::new();
        ours.read_to_string(&mut told).unwrap();
        (taker, told)
    }

    #[test]
    fn the_new_program_has_the_arguments_the_folder_and_the_channel() {
        let (program, folder) = script(r#"printf '%s;' "$@" >&0; pwd -P >&0; exec cat <&0 >&0"#);
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(DEADLINE)).unwrap();
        let mut taker = program.start(theirs, &Attempt::default()).unwrap();
        ours.write_all(b"heard").unwrap();
        ours.shutdown(Shutdown::Write).unwrap();
        let mut told = String::new();
        ours.read_to_string(&mut told).unwrap();
        let place = folder.path().canonicalize().unwrap();
        assert_eq!(told, format!("--take-over;one;two words;{}\nheard", place.display()));
        taker.kill();
    }

    #[test]
    fn the_end_of_a_new_program_is_told_with_its_path() {
        for (text, why, expected) in [
            (
                "exit 7",
                "x",
                "the new program FILE ended with exit code 7 before it took over; it may",
            ),
            ("kill -SEGV $$", "x", "the new program FILE was ended by SIGSEGV before it took over"),
            ("exit 4", "proxy.addr: another one", "proxy.addr: another one"),
            // It has left the channel, and is killed.
            ("exec sleep 60 <&-", "the new program takes too long", "the new program FILE takes"),
            ("exec sleep 60 <&-", "tcpause is stopping", "tcpause is stopping"),
        ] {
            let (mut taker, _told) = start(text);
            let begun = Instant::now();
            taker.kill();
            assert!(taker.status.is_some() && begun.elapsed() < DEADLINE, "{text}");
            let expected = expected.replace("FILE", &taker.file);
            let told = taker.explain(why);
            assert!(told.starts_with(&expected), "{text}: {told}");
            // A second kill does nothing, as the number may be another process's by now.
            taker.kill();
        }
    }

    #[test]
    fn a_shortage_is_told_with_the_limit_to_raise() {
        for (errno, expected) in
            [(Errno::AGAIN, "ulimit -u"), (Errno::NOMEM, "MemoryMax"), (Errno::MFILE, "ulimit -n")]
        {
            let told = remedy(&errno.into());
            assert!(told.starts_with("; ") && told.contains(expected), "{told}");
        }
        assert_eq!(remedy(&Errno::NOENT.into()), "");
    }

    #[test]
    fn a_program_that_cannot_be_run_is_told_with_its_path() {
        let (program, folder) = script("exit 0");
        let place = |name: &str| folder.path().join(name);
        fs::write(place("text"), "").unwrap();
        let error = |program: Program| {
            let (_ours, theirs) = UnixStream::pair().unwrap();
            program.start(theirs, &Attempt::default()).err().unwrap()
        };
        for name in ["nosuch", "text", "."] {
            let told = error(Program { file: place(name), ..program.clone() });
            let expected = format!("the new program {} cannot be run: ", place(name).display());
            assert!(told.starts_with(&expected), "{told}");
        }
        let told = error(Program { folder: place("gone"), ..program });
        let expected = format!("the working directory {} cannot be", place("gone").display());
        assert!(told.starts_with(&expected), "{told}");
    }
}
