//! `tcpause status`: the status of a running proxy, once or again and again.

use std::process::ExitCode;

use tcpause::{Rfc3339, Status};

use super::{
    Answer, Api, Failure,
    screen::{watch, write},
    table::{age, table},
};
use crate::cli::Invocation;

/// Shows the status, once or repeatedly.
pub(super) fn show(api: &Api, invocation: &Invocation) -> Result<ExitCode, Failure> {
    let is_raw = invocation.asked("json").is_some();
    if invocation.asked("watch").is_some() {
        let mut before = None;
        return watch(is_raw, || look(api, is_raw, &mut before));
    }
    let answer = ask(api)?;
    let text = if is_raw { answer.body } else { table(&read(&answer)?, None).into_bytes() };
    write(&text)?;
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
