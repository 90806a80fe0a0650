//! `tcpause status`: the status of a running proxy, once or again and again.

use std::{
    io::{self, IsTerminal as _},
    process::ExitCode,
    time::Duration,
};

use tcpause::{Rfc3339, Status};

use super::{
    Answer, Api, Failure,
    screen::{Screen, frame, write},
    table::{age, table},
};
use crate::{cli::Invocation, logger::OneLine, tell};

/// Time between two requests of `--watch`.
const WATCH_INTERVAL: Duration = Duration::from_secs(1);

/// Shows the status, once or repeatedly.
pub(super) fn show(api: &Api, invocation: &Invocation) -> Result<ExitCode, Failure> {
    let is_raw = invocation.asked("json").is_some();
    if invocation.asked("watch").is_some() {
        return watch(api, is_raw);
    }
    let answer = ask(api)?;
    let text = if is_raw { answer.body } else { table(&read(&answer)?, None).into_bytes() };
    write(&text)?;
    Ok(ExitCode::SUCCESS)
}

/// Shows the status each second, until a signal ends the program or the reader of the output has gone.
fn watch(api: &Api, is_raw: bool) -> Result<ExitCode, Failure> {
    let on_screen = io::stdout().is_terminal() && !is_raw;
    let _screen = on_screen.then(Screen::enter).transpose()?;
    let mut before = None;
    let mut due = crossbeam_channel::after(Duration::ZERO);
    while due.recv().is_ok() {
        let text = match look(api, is_raw, &mut before) {
            Ok(text) if on_screen => frame(&text),
            Ok(text) => text,
            Err(failure) => {
                let line = failure.told().1;
                // On a terminal that shows both outputs, the line would be written over the frame.
                if !on_screen || !io::stderr().is_terminal() {
                    tell(line);
                }
                if on_screen {
                    frame(&format!("tcpause: {}", OneLine(line)))
                } else {
                    String::new()
                }
            }
        };
        if !write(text.as_bytes())? {
            break;
        }
        due = crossbeam_channel::after(WATCH_INTERVAL);
    }
    Ok(ExitCode::SUCCESS)
}

/// Asks for the status, and returns it with the time as a block of text, or as it is.
fn look(api: &Api, is_raw: bool, before: &mut Option<Status>) -> Result<String, Failure> {
    let answer = ask(api)?;
    if is_raw {
        return Ok(String::from_utf8_lossy(&answer.body).into_owned());
    }
    let status = read(&answer)?;
    let gap = if before.is_some() { "\n" } else { "" };
    let text = format!("{gap}{}\n{}", Rfc3339::now(), table(&status, before.as_ref()));
    *before = Some(status);
    Ok(text)
}

/// Returns the remaining time of the pause with this name; `None` if it has no end, or if the proxy does not answer.
pub(super) fn time_left(api: &Api, name: &str) -> Option<String> {
    let status = read(&ask(api).ok()?).ok()?;
    let lease = status.leases.iter().find(|lease| lease.name == name)?;
    lease.expires_in_seconds.map(|seconds| age(seconds.round()))
}

/// Returns the names of the pauses that hold.
pub(super) fn pauses(api: &Api) -> Result<Vec<String>, Failure> {
    Ok(read(&ask(api)?)?.leases.into_iter().map(|lease| lease.name).collect())
}

fn ask(api: &Api) -> Result<Answer, Failure> {
    let answer = api.ask("GET", "/status", None)?;
    match answer.status {
        200 if answer.json().is_object() => Ok(answer),
        _ => Err(Failure::refused(api, &answer)),
    }
}

fn read(answer: &Answer) -> Result<Status, Failure> {
    serde_json::from_slice(&answer.body).map_err(|error| {
        Failure::Other(format!("the status cannot be read: {error}; --json shows it as it is"))
    })
}
