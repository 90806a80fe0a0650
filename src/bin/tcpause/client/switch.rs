//! `tcpause switch`: leads new connections to another server, and waits for the end of those to others.

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use serde_json::Value;
use tcpause::{Address, format_duration};

use super::{Api, Failure, duration, http};
use crate::{cli::Invocation, logger::OneLine, print, tell};

/// Longest time of a switch beyond that of an answer, for an `upstream.connect-timeout` that is far longer than usual.
const SWITCH_TIMEOUT: Duration = Duration::from_secs(120);

/// Longest time that connections that were reset may take to be gone.
const KILL_TIMEOUT: Duration = Duration::from_secs(5);

/// Switches, and prints where connections lead from now on.
pub(super) fn run(api: &Api, invocation: &Invocation) -> Result<ExitCode, Failure> {
    if invocation.asked("on-timeout").is_some() && invocation.asked("wait").is_none() {
        let text = "--on-timeout: it says how --wait ends: add one such as --wait 5m";
        return Err(Failure::Usage(text.to_owned()));
    }
    let kills = invocation.asked("on-timeout") == Some("kill");
    let body = switch(api, invocation)?;
    let present = upstream(&body).to_owned();
    let lasts = match body.get("persistent") {
        Some(Value::Bool(true)) => "",
        _ => ", until the next start",
    };
    let others = others(&body, &present);
    let Some(wait) = duration(invocation, "wait") else {
        let line = format!("switched to {present}{lasts}{}", left(&others));
        return Ok(print(&format!("{}\n", OneLine(line)))?);
    };
    if !others.is_empty() {
        // The switch is done, whatever becomes of the wait.
        let wait = format_duration(wait);
        tell(format!("switched to {present}{lasts}; waiting for up to {wait}{}", left(&others)));
    }
    let begin = Instant::now();
    await_others(api, &present, wait, kills)?;
    let waited = begin.elapsed().as_secs_f64();
    let line = format!("switched to {present}{lasts}, the only one after {waited:.1}s");
    Ok(print(&format!("{}\n", OneLine(line)))?)
}

/// Asks for the switch. Returns the upstream and the connections behind it.
fn switch(api: &Api, invocation: &Invocation) -> Result<Value, Failure> {
    let check = invocation.asked("check").unwrap_or("connect");
    let to = match (invocation.arguments.first(), invocation.asked("configured")) {
        (Some(_), Some(_)) => {
            let text = "switch: --configured names the server; leave out either it or the address";
            return Err(Failure::Usage(text.to_owned()));
        }
        (None, None) => {
            let text = "switch: name a server: tcpause switch localhost:3003, or add --configured";
            return Err(Failure::Usage(text.to_owned()));
        }
        // An address that is wrong is told before anything is asked.
        (Some(text), None) => {
            let address = Address::of_server(text);
            Some(address.map_err(|error| Failure::Usage(format!("switch: {error}")))?.to_string())
        }
        (None, Some(_)) => None,
    };
    let (method, done) = if to.is_some() { ("PUT", 200) } else { ("DELETE", 204) };
    let mut parameters = vec![("check", check)];
    parameters.extend(to.as_deref().map(|to| ("addr", to)));
    let answer = api.ask(method, &http::target("/upstream", &parameters), Some(SWITCH_TIMEOUT))?;
    if answer.status != done {
        return Err(match Failure::refused(api, &answer) {
            // The address is an argument here, and no option; the check is an option.
            Failure::Usage(text) => Failure::Usage(text.replacen("--addr:", "switch:", 1)),
            Failure::NotNow(text) => Failure::NotNow(text.replacen("check=", "--check ", 1)),
            other => other,
        });
    }
    if to.is_some() { Ok(answer.json()) } else { ask(api) }
}

fn ask(api: &Api) -> Result<Value, Failure> {
    let answer = api.ask("GET", "/upstream", None)?;
    if answer.status == 200 { Ok(answer.json()) } else { Err(Failure::refused(api, &answer)) }
}

/// Waits until `present` is the only server with connections. If it is not within `wait`, those to others are reset if `kills`.
/// Asks before each step if it is still the upstream, as another switch may have led back meanwhile.
fn await_others(api: &Api, present: &str, wait: Duration, kills: bool) -> Result<(), Failure> {
    let (mut begin, mut wait, mut has_killed) = (Instant::now(), wait, false);
    loop {
        let body = ask(api)?;
        let now = upstream(&body);
        if now != present {
            let reset = if has_killed { "" } else { "; no connection was reset" };
            return Err(Failure::NotNow(format!(
                "switched to {present}, but another switch leads to {now} since{reset}"
            )));
        }
        let others = others(&body, present);
        let Some((upstream, _active)) = others.first() else { return Ok(()) };
        let rest = wait.saturating_sub(begin.elapsed());
        if !rest.is_zero() {
            await_end(api, upstream, rest)?;
        } else if kills && !has_killed {
            for (upstream, _active) in &others {
                kill(api, upstream)?;
            }
            (begin, wait, has_killed) = (Instant::now(), KILL_TIMEOUT, true);
        } else {
            return Err(Failure::Left(format!(
                "switched to {present}, but the time is up{}; end them by tcpause kill --upstream ADDRESS",
                left(&others)
            )));
        }
    }
}

fn upstream(body: &Value) -> &str {
    body.get("upstream").and_then(Value::as_str).unwrap_or("another server")
}

/// Returns the other servers that have connections, each with their number.
fn others(body: &Value, present: &str) -> Vec<(String, u64)> {
    let listed = body.get("connections").and_then(Value::as_array).into_iter().flatten();
    let all = listed.filter_map(|it| {
        Some((it.get("upstream")?.as_str()?.to_owned(), it.get("active")?.as_u64()?))
    });
    all.filter(|(upstream, active)| upstream != present && *active > 0).collect()
}

/// Tells the connections that are left, as the end of a line.
fn left(others: &[(String, u64)]) -> String {
    let left = others.iter().map(|(upstream, active)| format!("{active} at {upstream}"));
    let left: Vec<String> = left.collect();
    if left.is_empty() { String::new() } else { format!("; connections left: {}", left.join(", ")) }
}

/// Has all connections to `upstream` reset, unless it is the present upstream by now.
fn kill(api: &Api, upstream: &str) -> Result<(), Failure> {
    let target = http::target("/connections", &[("upstream", upstream), ("how", "reset")]);
    let answer = api.ask("DELETE", &target, None)?;
    match answer.status {
        200 | 409 => Ok(()),
        _ => Err(Failure::refused(api, &answer)),
    }
}

/// Waits until no connection to `upstream` is left, it is the present upstream, or the time is up.
fn await_end(api: &Api, upstream: &str, wait: Duration) -> Result<(), Failure> {
    let timeout = format_duration(wait);
    let parameters = [("addr", upstream), ("timeout", timeout.as_str())];
    let target = http::target("/upstream/block-until-idle", &parameters);
    let answer = api.ask("GET", &target, Some(wait))?;
    match answer.status {
        204 | 409 => Ok(()),
        504 if answer.json().get("active").is_some() => Ok(()),
        _ => Err(Failure::refused(api, &answer)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_to_other_servers_are_told() {
        let body = r#"{"connections": [
            {"upstream": "tcp://a:1", "active": 2}, {"upstream": "tcp://b:1", "active": 3},
            {"upstream": "tcp://c:1", "active": 0}, {"upstream": "tcp://d:1", "active": 1}
        ]}"#;
        let others = others(&serde_json::from_str(body).unwrap(), "tcp://b:1");
        assert_eq!(left(&others), "; connections left: 2 at tcp://a:1, 1 at tcp://d:1");
        assert_eq!(left(&[]), "");
    }
}
