//! The guard: a process whose number a supervisor follows, while a child of it has everything.

use std::{
    ffi::OsString,
    fs,
    process::{self, ExitCode},
};

use nix::sys::signal::Signal::SIGCHLD;
use rustix::process::{Pid, WaitOptions, WaitStatus, getppid, waitpid};
use signal_hook::iterator::Signals as Caught;

use super::Program;
use crate::{
    EXIT_FAILURE, fail,
    signals::{SIGNALS, pass_on, unblock},
};

/// First argument of a guard; behind it stands the number of its child.
pub(crate) const GUARD: &str = "--guard";

/// Added to the number of the signal by which a child was ended, as shells tell it.
const EXIT_SIGNAL: i32 = 128;

/// Returns the process of which an argument has the number, with an error for the command line.
pub(crate) fn process_of(argument: Option<OsString>) -> Result<Pid, String> {
    let number = argument.and_then(|argument| argument.to_str()?.parse().ok());
    number.and_then(Pid::from_raw).ok_or_else(|| "a process passes its number".to_owned())
}

/// Makes this process the guard of its child, without anything that it has open. Returns only if that is impossible. It has to
/// be called by the first thread: the end of that one would be that of the parent for the child.
pub(crate) fn become_guard(child: Pid) -> ExitCode {
    // The file at the place of the program may be the one that has just failed.
    let error = Program::replace(None, [GUARD, &child.to_string()], None);
    fail(
        EXIT_FAILURE,
        format_args!("cannot wait for process {child}, which has everything: {error}"),
    )
}

/// Returns true if the parent of this process is its guard.
pub(super) fn is_guarded() -> bool {
    let words = getppid().map(|parent| fs::read(format!("/proc/{parent}/cmdline")));
    let words = words.and_then(Result::ok).unwrap_or_default();
    let mut words = words.split(|&byte| byte == 0).skip(1);
    let own = process::id().to_string();
    words.next() == Some(GUARD.as_bytes()) && words.next() == Some(own.as_bytes())
}

/// Passes all signals on to the child, and ends as it does.
pub(crate) fn guard(child: Pid) -> ExitCode {
    let signals = SIGNALS.into_iter().chain([SIGCHLD]).map(|signal| signal as i32);
    let mut caught = match Caught::new(signals) {
        Ok(caught) => caught,
        Err(error) => return fail(EXIT_FAILURE, format_args!("cannot listen to signals: {error}")),
    };
    unblock();
    loop {
        match waitpid(Some(child), WaitOptions::NOHANG) {
            Ok(None) => {}
            Ok(Some((_, status))) => process::exit(code_of(status)),
            Err(error) => return fail(EXIT_FAILURE, format_args!("{child} is no child: {error}")),
        }
        for signal in caught.wait().filter(|&signal| signal != SIGCHLD as i32) {
            pass_on(signal, child);
        }
    }
}

fn code_of(status: WaitStatus) -> i32 {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => code,
        (None, Some(signal)) => EXIT_SIGNAL + signal,
        (None, None) => EXIT_FAILURE.into(),
    }
}
